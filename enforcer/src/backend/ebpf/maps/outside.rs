//! The maps as the kernel's own decision sees them, read from outside.

use std::{borrow::Borrow, cell::RefCell};

use enforcer_ebpf::{
    BUCKETS, Bucket, EndpointKey, Generation, KEY_BITS, Nat64, Owners, PrefixKey, PrincipalKey, decide::Tables,
};

use super::{Maps, nat64_index};
use crate::backend::ebpf::BackendError;

/// The maps as the kernel's own decision sees them, for `check`. What cannot be read counts as absent and is kept.
#[derive(Debug)]
pub(crate) struct Outside<'a> {
    maps: &'a Maps,
    error: RefCell<Option<BackendError>>,
}

impl<'a> Outside<'a> {
    /// A view of the maps.
    #[must_use]
    pub(crate) fn new(maps: &'a Maps) -> Self {
        Self {
            maps,
            error: RefCell::new(None),
        }
    }

    /// What could not be read while deciding, if anything.
    pub(crate) fn finish(self) -> Result<(), BackendError> {
        self.error.into_inner().map_or(Ok(()), Err)
    }

    fn note_error<T>(&self, result: Result<Option<T>, BackendError>) -> Option<T> {
        result.unwrap_or_else(|error| {
            self.error.borrow_mut().get_or_insert(error);
            None
        })
    }
}

impl Tables for Outside<'_> {
    fn port(&self, port: u16) -> impl Fn() -> u8 {
        move || self.note_error(self.maps.ports.get(port).map(Some)).unwrap_or(0)
    }

    fn active(&self) -> Option<u8> {
        self.note_error(self.maps.active_slot())
    }

    fn generation(&self, slot: u8) -> Option<impl Borrow<Generation>> {
        self.note_error(self.maps.generation_of(slot).map(Some))
    }

    fn bucket(&self, slot: u8, bucket: u32) -> Option<impl Borrow<Bucket>> {
        self.note_error(self.maps.buckets.get(u32::from(slot) * BUCKETS + bucket).map(Some))
    }

    fn exact(&self, key: &EndpointKey) -> Option<Owners> {
        self.note_error(self.maps.endpoints.get(key))
    }

    fn prefix(&self, key: &EndpointKey) -> Option<Owners> {
        self.note_error(self.maps.prefixes.get(&PrefixKey {
            bits: KEY_BITS + 128,
            key: *key,
        }))
    }

    fn nat64(&self, slot: u8, number: u32) -> Nat64 {
        self.note_error(self.maps.nat64.get(nat64_index(slot) + number).map(Some))
            .unwrap_or_default()
    }

    fn principal(&self, key: &PrincipalKey) -> Option<Owners> {
        self.note_error(self.maps.principals.get(key))
    }
}
