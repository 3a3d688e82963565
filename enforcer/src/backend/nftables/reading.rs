//! The table for those who do not write it, but for its removal.

use std::io;

use super::{
    NftablesError, Observed, dump, failed,
    image::Image,
    is_ours,
    netlink::{Dump, Netlink, TransactionError},
    observe::observe,
};

/// The table for those who only read it; none where nothing of ours is there.
pub(crate) fn open(table: &str) -> Result<Option<Reading>, NftablesError> {
    let Some(mut netlink) = reach(table)? else {
        return Ok(None);
    };
    Ok(dump(&mut netlink, table)?.filter(is_ours).map(Reading))
}

/// A way to ask `nf_tables`; none where the kernel has none, and so no table. That it may not be asked is an error:
/// nothing is known then.
pub(super) fn reach(table: &str) -> Result<Option<Netlink>, NftablesError> {
    match Netlink::open().and_then(|mut netlink| netlink.genid().map(|_| netlink)) {
        Ok(netlink) => Ok(Some(netlink)),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(failed(table, "look for the table", error)),
    }
}

/// What a kernel without netfilter says to the socket, and one without `nf_tables` to a question.
fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT | libc::EINVAL | libc::EOPNOTSUPP)
    )
}

/// A table as read.
#[derive(Debug)]
pub(crate) struct Reading(pub(super) Dump);

impl Reading {
    /// What is active.
    #[must_use]
    pub(crate) fn observe(&self) -> Observed {
        observe(&self.0)
    }

    /// Whether no packet meets it.
    pub(crate) fn is_dormant(&self) -> bool {
        self.0.dormant
    }

    /// Leaves out what belongs to the slot that is not active.
    pub(crate) fn forget_the_other_slot(&mut self) {
        self.0.image.forget_the_other_slot();
    }

    /// The rules as read.
    #[must_use]
    pub(crate) fn image(&self) -> &Image {
        &self.0.image
    }
}

/// Removes the table if it is ours; false where there was none.
pub(crate) fn unload(table: &str) -> Result<bool, NftablesError> {
    let Some(mut netlink) = reach(table)? else {
        return Ok(false);
    };
    if !dump(&mut netlink, table)?.as_ref().is_some_and(is_ours) {
        return Ok(false);
    }
    let removed = netlink.remove(table);
    removed.map_err(|TransactionError { step, error }| failed(table, &step, error))?;
    Ok(true)
}
