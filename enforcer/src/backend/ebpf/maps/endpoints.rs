//! Exact endpoints: few of a rule set in one map, many in another, which is made when it is first needed.
//!
//! Programs look a key up in both, one after the other.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use aya::maps::MapType;
use enforcer_ebpf::{EndpointKey, FEW_ENDPOINTS, Owners, entries, scope};

use super::{Map, in_slot, table::Table};
use crate::backend::ebpf::{BackendError, sys};

type Entry = (EndpointKey, Owners);

/// The name of the map that `many` holds.
const INNER: &str = "many_endpoints";

/// The maps of exact endpoints.
#[derive(Debug)]
pub(super) struct Endpoints {
    few: Table<EndpointKey, Owners>,
    /// The array through which programs find the one below.
    many: Table<u32, u32>,
    inner: Option<Table<EndpointKey, Owners>>,
    /// Where they are pinned.
    dir: PathBuf,
}

/// A map such as `many` holds.
pub(crate) fn one_of_many(entries: u32) -> io::Result<OwnedFd> {
    #[allow(clippy::cast_possible_truncation, reason = "sizes of small structures")]
    sys::create_hash(
        INNER,
        size_of::<EndpointKey>() as u32,
        size_of::<Owners>() as u32,
        entries,
    )
}

impl Endpoints {
    pub(super) fn open(dir: &Path) -> Result<Self, BackendError> {
        let path = dir.join(INNER);
        let inner = path
            .exists()
            .then(|| Table::open(dir, INNER, MapType::Hash, entries::MANY_ENDPOINTS));
        let endpoints = Self {
            few: Table::open(dir, "endpoints", MapType::Hash, entries::ENDPOINTS)?,
            many: Table::open(dir, "many", MapType::ArrayOfMaps, entries::MANY)?,
            inner: inner.transpose()?,
            dir: dir.into(),
        };
        // Programs find another map than the one that is pinned.
        let astray = endpoints.many.get(&0)?.is_some() && !endpoints.is_linked()?;
        if astray {
            return Err(BackendError::Damaged { path });
        }
        Ok(endpoints)
    }

    /// Ids of the maps that programs name.
    pub(super) fn ids(&self) -> [u32; 2] {
        [self.few.id(), self.many.id()]
    }

    /// All maps, by the names of their pins.
    pub(super) fn named(&self) -> impl Iterator<Item = (&'static str, &Map)> {
        let always = [self.few.named(), self.many.named()];
        always.into_iter().chain(self.inner.as_ref().map(Table::named))
    }

    pub(super) fn get(&self, key: &EndpointKey) -> Result<Option<Owners>, BackendError> {
        match self.few.get(key)? {
            None => self.found()?.map_or(Ok(None), |inner| inner.get(key)),
            found => Ok(found),
        }
    }

    /// All of a slot, sorted.
    pub(super) fn read(&self, slot: u8) -> Result<Vec<Entry>, BackendError> {
        let mut found = Vec::new();
        for table in [Some(&self.few), self.found()?].into_iter().flatten() {
            table.for_each(|mut key, owners| {
                if key.scope & scope::SLOT == slot {
                    key.scope &= !scope::SLOT;
                    found.push((key, owners));
                }
            })?;
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Whether programs find these, as far as that is seen by few calls.
    pub(super) fn has(&self, slot: u8, wanted: &[Entry]) -> Result<bool, BackendError> {
        let table = self.inner.as_ref().filter(|_| are_many(wanted)).unwrap_or(&self.few);
        Ok(self.is_linked()? && table.has(wanted, |key| in_slot(key, slot))?)
    }

    /// Makes a slot that no program reads hold `want` after `have`, both sorted, and reads it back.
    pub(super) fn replace(&mut self, slot: u8, have: &[Entry], want: &[Entry]) -> Result<(), BackendError> {
        if are_many(want) && self.inner.is_none() {
            self.inner = Some(self.make_inner()?);
        }
        let (used, other) = match &self.inner {
            Some(inner) if are_many(want) => (inner, Some(&self.few)),
            inner => (&self.few, inner.as_ref()),
        };
        if let Some(other) = other {
            other.clear(|key| key.scope & scope::SLOT == slot)?;
        }
        let have = if are_many(have) == are_many(want) { have } else { &[] };
        used.replace(have, want, |key| in_slot(key, slot))?;
        self.link()
    }

    fn make_inner(&self) -> Result<Table<EndpointKey, Owners>, BackendError> {
        let failed = |action| {
            move |error| BackendError::Map {
                action,
                map: INNER,
                error,
            }
        };
        let made = one_of_many(entries::MANY_ENDPOINTS).map_err(failed("make"))?;
        sys::pin(made.as_fd(), &self.dir.join(INNER)).map_err(failed("pin"))?;
        Table::open(&self.dir, INNER, MapType::Hash, entries::MANY_ENDPOINTS)
    }

    /// The map of many endpoints, where programs find it.
    fn found(&self) -> Result<Option<&Table<EndpointKey, Owners>>, BackendError> {
        let linked = self.is_linked()?;
        Ok(self.inner.as_ref().filter(|_| linked))
    }

    /// Whether programs find the map of many endpoints where there is one, and none where not.
    fn is_linked(&self) -> Result<bool, BackendError> {
        Ok(self.many.get(&0)? == self.inner.as_ref().map(Table::id))
    }

    fn link(&self) -> Result<(), BackendError> {
        if self.is_linked()? {
            return Ok(());
        }
        match &self.inner {
            // An element is written as a descriptor, and read as an id.
            Some(inner) => {
                let put = self.many.put(&0, inner.descriptor());
                if let Err(BackendError::Map { action, map, error }) = &put
                    && error.kind() == io::ErrorKind::InvalidInput
                {
                    let error = io::Error::other(format!("more than {FEW_ENDPOINTS} endpoints need Linux 5.10"));
                    return Err(BackendError::Map { action, map, error });
                }
                put?;
            }
            None => self.many.delete(&0)?,
        }
        if self.is_linked()? {
            Ok(())
        } else {
            Err(BackendError::ReadBack { map: "many" })
        }
    }
}

/// Whether these are more than `endpoints` has room for.
fn are_many(entries: &[Entry]) -> bool {
    entries.len() > FEW_ENDPOINTS as usize
}
