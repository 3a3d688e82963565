//! Elements one after another in an array, read and written in the kernel's own memory.

use std::{marker::PhantomData, ops::Range, path::Path};

use aya::maps::MapType;
use zerocopy::IntoBytes as _;

use super::{Map, open_checked, table::Plain};
use crate::backend::ebpf::{BackendError, sys::Bytes};

/// Such a map, its elements typed.
#[derive(Debug)]
pub(super) struct Array<V> {
    map: Map,
    name: &'static str,
    elements: PhantomData<V>,
}

impl<V: Plain + PartialEq> Array<V> {
    /// One whose elements are the only value.
    pub(super) fn whole(dir: &Path, name: &'static str, elements: u32) -> Result<Self, BackendError> {
        Self::open(dir, name, (elements * Self::BYTES, 1))
    }

    /// One whose elements are values.
    pub(super) fn keyed(dir: &Path, name: &'static str, elements: u32) -> Result<Self, BackendError> {
        const { assert!(Self::BYTES.is_multiple_of(8), "the kernel leaves no gaps between them") };
        Self::open(dir, name, (Self::BYTES, elements))
    }

    #[allow(clippy::cast_possible_truncation, reason = "the sizes of small structures")]
    const BYTES: u32 = size_of::<V>() as u32;

    fn open(dir: &Path, name: &'static str, (value, entries): (u32, u32)) -> Result<Self, BackendError> {
        Ok(Self {
            map: open_checked(dir, name, (MapType::Array, 4, value, entries))?,
            name,
            elements: PhantomData,
        })
    }

    pub(super) fn named(&self) -> (&'static str, &Map) {
        (self.name, &self.map)
    }

    pub(super) fn id(&self) -> u32 {
        self.map.id()
    }

    pub(super) fn get(&self, element: u32) -> Result<V, BackendError> {
        let mut value = V::new_zeroed();
        let bytes = self.bytes("read", element..element + 1)?;
        bytes.read(place::<V>(element), value.as_mut_bytes());
        Ok(value)
    }

    /// So many elements from one on.
    pub(super) fn read(&self, first: u32, count: u32) -> Result<Vec<V>, BackendError> {
        let mut values = vec![V::new_zeroed(); count as usize];
        let bytes = self.bytes("read", first..first + count)?;
        bytes.read(place::<V>(first), values.as_mut_bytes());
        Ok(values)
    }

    /// Whether it has such elements.
    pub(super) fn has(&self, wanted: impl Iterator<Item = (u32, V)> + Clone) -> Result<bool, BackendError> {
        let bytes = self.bytes("read", span(wanted.clone()))?;
        let mut value = V::new_zeroed();
        let mut wanted = wanted;
        Ok(wanted.all(|(element, wanted)| {
            bytes.read(place::<V>(element), value.as_mut_bytes());
            value == wanted
        }))
    }

    /// Writes an element that others may write too.
    pub(super) fn set(&self, element: u32, value: V) -> Result<(), BackendError> {
        let bytes = self.bytes("write", element..element + 1)?;
        bytes.write(place::<V>(element), value.as_bytes());
        Ok(())
    }

    /// Writes elements, and reads each back.
    pub(super) fn put(&self, elements: impl Iterator<Item = (u32, V)> + Clone) -> Result<(), BackendError> {
        let bytes = self.bytes("write", span(elements.clone()))?;
        let mut value = V::new_zeroed();
        for (element, wanted) in elements {
            bytes.write(place::<V>(element), wanted.as_bytes());
            bytes.read(place::<V>(element), value.as_mut_bytes());
            if value != wanted {
                return Err(BackendError::ReadBack { map: self.name });
            }
        }
        Ok(())
    }

    /// Elements as memory, one at least.
    fn bytes(&self, action: &'static str, elements: Range<u32>) -> Result<Bytes, BackendError> {
        let end = elements.end.max(elements.start + 1);
        let bytes = self.map.bytes(place::<V>(elements.start)..place::<V>(end));
        bytes.map_err(|error| BackendError::Map {
            action,
            map: self.name,
            error,
        })
    }
}

/// The elements from the first of some to the last.
fn span<V>(elements: impl Iterator<Item = (u32, V)>) -> Range<u32> {
    let ends = elements.fold(None, |ends: Option<(u32, u32)>, (element, _)| {
        let (first, last) = ends.unwrap_or((element, element));
        Some((first.min(element), last.max(element)))
    });
    ends.map_or(0..0, |(first, last)| first..last + 1)
}

/// Where an element begins.
fn place<V>(element: u32) -> usize {
    element as usize * size_of::<V>()
}
