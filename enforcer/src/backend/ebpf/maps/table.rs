//! A map whose keys and values are typed: opened if it is as it should be, changed from one list of entries to another,
//! and read back.

use std::{io, marker::PhantomData, os::fd::AsRawFd as _, path::Path};

use aya::maps::MapType;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{FEW_KNOWN, open_checked};
use crate::backend::ebpf::{
    BackendError,
    sys::{Batch, ElementOp, Map, found},
};

/// Entries moved by one batch call.
const BATCH: usize = 4096;
/// Up to here changes are written and read back one by one, beyond it in batches.
const FEW: usize = 64;

/// A type whose bytes the kernel may read and write.
pub(super) trait Plain: Copy + FromBytes + IntoBytes + Immutable {}

impl<T: Copy + FromBytes + IntoBytes + Immutable> Plain for T {}

/// A map, its keys and values typed.
#[derive(Debug)]
pub(super) struct Table<K, V> {
    map: Map,
    name: &'static str,
    types: PhantomData<(K, V)>,
}

impl<K: Plain + Ord, V: Plain + PartialEq> Table<K, V> {
    pub(super) fn open(
        dir: &Path,
        name: &'static str,
        map_type: MapType,
        max_entries: u32,
    ) -> Result<Self, BackendError> {
        #[allow(clippy::cast_possible_truncation, reason = "sizes of small structures")]
        let (key, value) = (size_of::<K>() as u32, size_of::<V>() as u32);
        Ok(Self {
            map: open_checked(dir, name, (map_type, key, value, max_entries))?,
            name,
            types: PhantomData,
        })
    }

    pub(super) fn named(&self) -> (&'static str, &Map) {
        (self.name, &self.map)
    }

    /// The number of its descriptor, as an array of maps takes it.
    pub(super) fn descriptor(&self) -> u32 {
        self.map.as_fd().as_raw_fd().cast_unsigned()
    }

    pub(super) fn id(&self) -> u32 {
        self.map.id()
    }

    pub(super) fn get(&self, key: &K) -> Result<Option<V>, BackendError> {
        let mut value = V::new_zeroed();
        let found = self.get_bytes(key, value.as_mut_bytes())?;
        Ok(found.then_some(value))
    }

    /// The values of all CPUs.
    pub(super) fn get_all(&self, key: &K) -> Result<Vec<V>, BackendError> {
        const {
            assert!(
                size_of::<V>().is_multiple_of(8),
                "the kernel leaves no gaps between them"
            );
        }
        let mut values = vec![V::new_zeroed(); self.map.value_bytes() / size_of::<V>()];
        self.get_bytes(key, values.as_mut_bytes())?;
        Ok(values)
    }

    fn get_bytes(&self, key: &K, value: &mut [u8]) -> Result<bool, BackendError> {
        found(self.map.element(ElementOp::Get(key.as_bytes(), value))).map_err(self.failed("read"))
    }

    /// Whether it has such entries; true where they are more than few, which is for others to see.
    pub(super) fn has(&self, wanted: &[(K, V)], place: impl Fn(K) -> K) -> Result<bool, BackendError> {
        if wanted.len() > FEW_KNOWN {
            return Ok(true);
        }
        for (key, value) in wanted {
            if self.get(&place(*key))? != Some(*value) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn put(&self, key: &K, value: V) -> Result<(), BackendError> {
        self.put_all(key, &[value])
    }

    /// Writes the values of all CPUs.
    pub(super) fn put_all(&self, key: &K, values: &[V]) -> Result<(), BackendError> {
        let put = ElementOp::Put(key.as_bytes(), values.as_bytes());
        self.map.element(put).map_err(self.failed("write"))
    }

    pub(super) fn put_read_back(&self, key: &K, value: V) -> Result<(), BackendError> {
        self.put(key, value)?;
        if self.get(key)? == Some(value) {
            Ok(())
        } else {
            Err(BackendError::ReadBack { map: self.name })
        }
    }

    pub(super) fn keys(&self) -> Result<Vec<K>, BackendError> {
        let mut keys = Vec::new();
        let mut next = K::new_zeroed();
        loop {
            let after = ElementOp::Next(keys.last().map(K::as_bytes), next.as_mut_bytes());
            if !found(self.map.element(after)).map_err(self.failed("list"))? {
                return Ok(keys);
            }
            keys.push(next);
        }
    }

    /// All entries, in batches.
    pub(super) fn for_each(&self, mut each: impl FnMut(K, V)) -> Result<(), BackendError> {
        let (.., entries) = self.map.shape();
        let batch = BATCH.min(entries.try_into().unwrap_or(BATCH));
        let mut keys = vec![K::new_zeroed(); batch].into_boxed_slice();
        let mut values = vec![V::new_zeroed(); batch].into_boxed_slice();
        let mut cursor = None;
        loop {
            let next = Batch::Get(&mut cursor, keys.as_mut_bytes(), values.as_mut_bytes());
            let (read, more) = self.map.batch(next).map_err(self.failed("read all of"))?;
            keys.iter()
                .zip(&values)
                .take(read)
                .for_each(|(key, value)| each(*key, *value));
            if !more {
                return Ok(());
            }
        }
    }

    /// From `have` to `want`, both sorted, and read back: one by one while few change, in batches beyond.
    pub(super) fn replace(&self, have: &[(K, V)], want: &[(K, V)], place: impl Fn(K) -> K) -> Result<(), BackendError> {
        let Diff { gone, new } = change(have, want);
        if gone.len() + new.len() <= FEW {
            return self.replace_each(have, want, place);
        }
        let gone: Vec<K> = gone.into_iter().map(&place).collect();
        self.delete_all(&gone)?;
        let (keys, values): (Vec<K>, Vec<V>) = new.into_iter().map(|(key, value)| (place(key), value)).unzip();
        for (keys, values) in keys.chunks(BATCH).zip(values.chunks(BATCH)) {
            let put = Batch::Put(keys.as_bytes(), values.as_bytes());
            self.map.batch(put).map_err(self.failed("write"))?;
        }
        // Every wanted entry must be met once, and nothing else of this slot.
        let mut expected: Vec<(K, V)> = want.iter().map(|(key, value)| (place(*key), *value)).collect();
        expected.sort_unstable_by_key(|(key, _)| *key);
        let (mut met, mut wrong) = (0_usize, false);
        self.for_each(|key, value| {
            if place(key) == key {
                met += 1;
                let found = expected
                    .binary_search_by_key(&key, |(key, _)| *key)
                    .ok()
                    .and_then(|at| expected.get(at));
                wrong |= found != Some(&(key, value));
            }
        })?;
        if wrong || met != want.len() {
            Err(BackendError::ReadBack { map: self.name })
        } else {
            Ok(())
        }
    }

    /// Removes an entry, if it is there.
    pub(super) fn delete(&self, key: &K) -> Result<(), BackendError> {
        let delete = ElementOp::Delete(key.as_bytes());
        found(self.map.element(delete)).map_err(self.failed("delete from"))?;
        Ok(())
    }

    /// Removes the entries of some keys.
    pub(super) fn clear(&self, of: impl Fn(&K) -> bool) -> Result<(), BackendError> {
        let mut gone = Vec::new();
        self.for_each(|key, _| gone.extend(of(&key).then_some(key)))?;
        self.delete_all(&gone)
    }

    fn delete_all(&self, keys: &[K]) -> Result<(), BackendError> {
        for keys in keys.chunks(BATCH) {
            let delete = Batch::Delete(keys.as_bytes());
            self.map.batch(delete).map_err(self.failed("delete from"))?;
        }
        Ok(())
    }

    pub(super) fn replace_each(
        &self,
        have: &[(K, V)],
        want: &[(K, V)],
        place: impl Fn(K) -> K,
    ) -> Result<(), BackendError> {
        let Diff { gone, new } = change(have, want);
        for key in gone {
            self.delete(&place(key))?;
        }
        for (key, value) in new {
            self.put_read_back(&place(key), value)?;
        }
        Ok(())
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> BackendError {
        let map = self.name;
        move |error| BackendError::Map { action, map, error }
    }
}

/// What must be removed and what written.
struct Diff<K, V> {
    gone: Vec<K>,
    new: Vec<(K, V)>,
}

/// The difference of two sorted lists.
fn change<K: Copy + Ord, V: Copy + PartialEq>(have: &[(K, V)], want: &[(K, V)]) -> Diff<K, V> {
    let (mut gone, mut new) = (Vec::new(), Vec::new());
    let (mut have, mut want) = (have.iter().peekable(), want.iter().peekable());
    loop {
        match (have.peek(), want.peek()) {
            (None, None) => return Diff { gone, new },
            (Some((key, _)), None) => {
                gone.push(*key);
                have.next();
            }
            (None, Some(entry)) => {
                new.push(**entry);
                want.next();
            }
            (Some((old, before)), Some(entry @ (key, after))) => match old.cmp(key) {
                std::cmp::Ordering::Less => {
                    gone.push(*old);
                    have.next();
                }
                std::cmp::Ordering::Greater => {
                    new.push(**entry);
                    want.next();
                }
                std::cmp::Ordering::Equal => {
                    if before != after {
                        new.push(**entry);
                    }
                    have.next();
                    want.next();
                }
            },
        }
    }
}
