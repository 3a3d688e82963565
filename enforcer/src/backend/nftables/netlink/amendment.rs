//! Few addresses and rules of a table, changed in place by one transaction and read back one by one.

use std::io;

use netlink_packet_core::{DefaultNla, NLA_HEADER_SIZE};
use nftnl::{MsgType, Rule as NlRule};

use super::{
    INET, Netlink, TransactionError,
    attributes::nfta,
    dumps::element,
    messages::{Steps, chain_message, inet, make_rules, set_message},
    text,
};
use crate::backend::nftables::{
    image::{Element, Image, Set, SetKind},
    in_place::Amendment,
};

impl Netlink {
    /// Changes little of a table in place, in one transaction, which fails if any table has changed since a generation
    /// of all of `nf_tables`.
    pub(in crate::backend::nftables) fn amend(
        &mut self,
        table: &str,
        image: &Image,
        amendment: &Amendment,
        genid: u32,
    ) -> Result<(), TransactionError> {
        let Amendment { elements, renewed } = amendment;
        let table = inet(table);
        let mut batch = Steps::new();
        for (name, changes) in elements {
            let kinds = [("empty", MsgType::Del), ("fill", MsgType::Add)];
            for ((what, step), elements) in kinds.into_iter().zip(changes) {
                let set = image.sets.get(name).filter(|_| !elements.is_empty());
                let Some(Set { kind, .. }) = set else { continue };
                let changed = Set {
                    kind: *kind,
                    elements: elements.clone(),
                };
                for elements in set_message(&table, name, 0, &changed).elems_iter() {
                    batch.add(&format!("{what} set {name}"), &elements, step);
                }
            }
        }
        for name in renewed {
            let chain = chain_message(&table, name, None);
            batch.add(&format!("empty chain {name}"), &NlRule::new(&chain), MsgType::Del);
        }
        make_rules(&mut batch, &table, image, |name, _| renewed.contains(name));
        self.commit_at(batch, Some(genid))
    }

    /// One element of a set, by its key.
    fn element(&mut self, table: &str, set: &str, kind: SetKind, key: &[u8]) -> io::Result<Option<Element>> {
        let name = |name: &str| text(name).into_bytes_with_nul();
        let key = nested(nfta::DATA_VALUE, key);
        let list = nested(nfta::LIST_ELEM, &nested(nfta::SET_ELEM_KEY, &key));
        let within = vec![
            DefaultNla::new(nfta::SET_ELEM_LIST_TABLE, name(table)),
            DefaultNla::new(nfta::SET_ELEM_LIST_SET, name(set)),
            DefaultNla::new(nfta::SET_ELEM_LIST_ELEMENTS, list),
        ];
        let mut found = None;
        let asked = self.ask_of(INET, libc::NFT_MSG_GETSETELEM, 0, within, |_, message| {
            let mut elements = message.list(nfta::SET_ELEM_LIST_ELEMENTS);
            found = elements.next().map(|object| element(object, kind));
        });
        match asked {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            asked => asked.map(|()| found),
        }
    }

    /// Whether all that was written in place is there, and what went is not; with the generation of all of `nf_tables`
    /// at which that was read.
    pub(in crate::backend::nftables) fn is_amended(
        &mut self,
        table: &str,
        image: &Image,
        amendment: &Amendment,
    ) -> io::Result<(bool, u32)> {
        self.at_one_generation(|netlink| netlink.is_amended_once(table, image, amendment))
    }

    fn is_amended_once(&mut self, table: &str, image: &Image, amendment: &Amendment) -> io::Result<bool> {
        for name in &amendment.renewed {
            let found = self.rules(table, Some(name))?;
            let wanted = image.chains.get(name).map_or(&[][..], |chain| &chain.rules);
            if !found.iter().map(|found| &found.rule).eq(wanted) {
                return Ok(false);
            }
        }
        for (name, [gone, come]) in &amendment.elements {
            let changes = gone.iter().map(|element| (element, None));
            for (element, wanted) in changes.chain(come.iter().map(|element| (element, Some(element)))) {
                let set = image.sets.get(name).ok_or(io::ErrorKind::NotFound)?;
                if self.element(table, name, set.kind, &element.key)?.as_ref() != wanted {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

/// An attribute; what is within ends at a multiple of four bytes.
fn nested(number: u16, within: &[u8]) -> Vec<u8> {
    let length = u16::try_from(NLA_HEADER_SIZE + within.len()).unwrap_or_default();
    [&length.to_ne_bytes()[..], &number.to_ne_bytes(), within].concat()
}

/// The message that begins a batch, with the generation at which alone the kernel may carry it out
/// (`NFNL_BATCH_GENID`), for which libnftnl has no room; and what follows it.
pub(super) fn begin_at(page: &[u8], genid: u32) -> Option<(Vec<u8>, &[u8])> {
    // A netlink header and one of netfilter.
    const LENGTH: usize = 20;
    const NFNL_BATCH_GENID: u16 = 1;
    let (begin, rest) = page.split_at_checked(LENGTH)?;
    let (_, behind) = begin.split_at_checked(4)?;
    let attribute = [8_u16.to_ne_bytes(), NFNL_BATCH_GENID.to_ne_bytes()].concat();
    let begin = [
        &u32::try_from(LENGTH + 8).ok()?.to_ne_bytes()[..],
        behind,
        &attribute,
        &genid.to_be_bytes(),
    ];
    Some((begin.concat(), rest))
}
