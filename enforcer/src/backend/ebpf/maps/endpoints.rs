//! Exact endpoints: few of a rule set in one map, many in another, which is made when it is first needed.
//!
//! Programs look a key up in both, one after the other.

use std::{
    fs, io,
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
        let few = Table::open(dir, "endpoints", MapType::Hash, entries::ENDPOINTS)?;
        let many: Table<u32, u32> = Table::open(dir, "many", MapType::ArrayOfMaps, entries::MANY)?;
        // First what programs find, as a map is pinned before they do.
        let found = many.get(&0)?;
        let inner = path.exists().then(|| open_inner(dir)).transpose()?;
        if found.is_some() && found != inner.as_ref().map(Table::id) {
            // Another map than the one that is pinned.
            return Err(BackendError::Damaged { path });
        }
        Ok(Self {
            few,
            many,
            inner,
            dir: dir.into(),
        })
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
        entries_of([Some(&self.few), self.found()?].into_iter().flatten(), slot)
    }

    /// Whether programs find these, as far as that is seen by few calls.
    pub(super) fn has(&self, slot: u8, wanted: &[Entry]) -> Result<bool, BackendError> {
        // Of more than few known ones the table says nothing.
        Ok(self.is_linked(are_many(wanted))? && self.few.has(wanted, |key| in_slot(key, slot))?)
    }

    /// Makes a slot that no program reads hold `want`, sorted, and reads it back: after `have`, sorted too, where this
    /// process has written that whole, and else after whatever lies there.
    pub(super) fn replace(&mut self, slot: u8, have: Option<&[Entry]>, want: &[Entry]) -> Result<(), BackendError> {
        let place = |key| in_slot(key, slot);
        if are_many(want) {
            self.make_inner()?;
        }
        self.link(are_many(want))?;
        let Some(have) = have else {
            let used = self.table(want);
            for other in self.tables().filter(|other| other.id() != used.id()) {
                other.clear(|key| key.scope & scope::SLOT == slot)?;
            }
            let have = entries_of([used], slot)?;
            return used.replace(&have, want, place);
        };
        if are_many(have) == are_many(want) {
            return self.table(want).replace(have, want, place);
        }
        self.table(have).replace(have, &[], place)?;
        self.table(want).replace(&[], want, place)
    }

    fn tables(&self) -> impl Iterator<Item = &Table<EndpointKey, Owners>> {
        [Some(&self.few), self.inner.as_ref()].into_iter().flatten()
    }

    /// Where so many lie.
    fn table(&self, entries: &[Entry]) -> &Table<EndpointKey, Owners> {
        self.inner.as_ref().filter(|_| are_many(entries)).unwrap_or(&self.few)
    }

    fn make_inner(&mut self) -> Result<(), BackendError> {
        if self.inner.is_some() {
            return Ok(());
        }
        let failed = |action| {
            move |error| BackendError::Map {
                action,
                map: INNER,
                error,
            }
        };
        let path = self.dir.join(INNER);
        let made = one_of_many(entries::MANY_ENDPOINTS).map_err(failed("make"))?;
        // One that is there was left by a call that failed.
        let _none = fs::remove_file(&path);
        sys::pin(made.as_fd(), &path).map_err(failed("pin"))?;
        self.inner = Some(open_inner(&self.dir)?);
        self.link(true).inspect_err(|_| {
            self.inner = None;
            let _left = fs::remove_file(&path);
        })
    }

    /// The map of many endpoints, where programs find it.
    fn found(&self) -> Result<Option<&Table<EndpointKey, Owners>>, BackendError> {
        let found = self.many.get(&0)?;
        Ok(self.inner.as_ref().filter(|inner| Some(inner.id()) == found))
    }

    /// Whether programs find the map of many endpoints, where it is needed, and no other one.
    fn is_linked(&self, needed: bool) -> Result<bool, BackendError> {
        Ok(match self.many.get(&0)? {
            None => !needed,
            found => found == self.inner.as_ref().map(Table::id),
        })
    }

    /// Sees to that.
    fn link(&self, needed: bool) -> Result<(), BackendError> {
        if self.is_linked(needed)? {
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
        if self.is_linked(self.inner.is_some())? {
            Ok(())
        } else {
            Err(BackendError::ReadBack { map: "many" })
        }
    }
}

fn open_inner(dir: &Path) -> Result<Table<EndpointKey, Owners>, BackendError> {
    Table::open(dir, INNER, MapType::Hash, entries::MANY_ENDPOINTS)
}

/// What some tables have of a slot, sorted.
fn entries_of<'a>(
    tables: impl IntoIterator<Item = &'a Table<EndpointKey, Owners>>,
    slot: u8,
) -> Result<Vec<Entry>, BackendError> {
    let mut found = Vec::new();
    for table in tables {
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

/// Whether these are more than `endpoints` has room for.
fn are_many(entries: &[Entry]) -> bool {
    entries.len() > FEW_ENDPOINTS as usize
}
