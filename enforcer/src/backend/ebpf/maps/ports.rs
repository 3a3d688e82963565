//! What each slot has on each port: a byte a port, which both slots share.

use std::{collections::BTreeMap, path::Path};

use enforcer_ebpf::{entries, port};

use super::{Map, array::Array};
use crate::backend::ebpf::BackendError;

/// The ports of both slots.
#[derive(Debug)]
pub(super) struct Ports(Array<u8>);

impl Ports {
    pub(super) fn open(dir: &Path) -> Result<Self, BackendError> {
        Array::whole(dir, "ports", entries::PORTS).map(Self)
    }

    pub(super) fn named(&self) -> (&'static str, &Map) {
        self.0.named()
    }

    pub(super) fn id(&self) -> u32 {
        self.0.id()
    }

    /// What both slots have on a port.
    pub(super) fn get(&self, number: u16) -> Result<u8, BackendError> {
        self.0.get(number.into())
    }

    /// The ports of a slot, and what it has there.
    pub(super) fn read(&self, slot: u8) -> Result<BTreeMap<u16, u8>, BackendError> {
        let all = self.0.read(0, entries::PORTS)?;
        let listed = (0..=u16::MAX)
            .zip(all)
            .map(|(number, slots)| (number, port::of(slots, slot)));
        Ok(listed.filter(|(_, listed)| *listed != 0).collect())
    }

    /// Whether a slot lets these through; it may have more.
    pub(super) fn has(&self, slot: u8, wanted: &BTreeMap<u16, u8>) -> Result<bool, BackendError> {
        let all = self.0.read(0, entries::PORTS)?;
        let mut wanted = wanted.iter();
        Ok(wanted.all(|(number, want)| {
            let slots = all.get(usize::from(*number)).copied().unwrap_or(0);
            want & !port::of(slots, slot) == 0
        }))
    }

    /// Makes a slot that no program reads have `want` after `have`, and reads it back.
    pub(super) fn replace(
        &self,
        slot: u8,
        have: &BTreeMap<u16, u8>,
        want: &BTreeMap<u16, u8>,
    ) -> Result<(), BackendError> {
        let all = self.0.read(0, entries::PORTS)?;
        let changed = have.keys().chain(want.keys()).map(|number| {
            let slots = all.get(usize::from(*number)).copied().unwrap_or(0);
            let others = slots & !(port::of(u8::MAX, slot) << port::shift(slot));
            let listed = want.get(number).copied().unwrap_or(0);
            (u32::from(*number), others | listed << port::shift(slot))
        });
        self.0.put(changed)
    }
}
