//! The pinned maps as typed tables: written slot by slot, read back, judged by from outside.

mod array;
mod endpoints;
mod outside;
mod ports;
mod table;

use std::{collections::BTreeMap, io, path::Path};

use aya::maps::MapType;
use enforcer_ebpf::{
    AllCounters, BUCKETS, Bucket, Counters, DIAL_BYTES, EVENT_BYTES, EndpointKey, Generation, MAX_NAT64, MAX_TARGETS,
    Nat64, Owners, PrefixKey, PrincipalKey, TargetName, entries, gate, scope,
};

use self::{array::Array, endpoints::Endpoints, ports::Ports, table::Table};
pub(crate) use self::{endpoints::one_of_many, outside::Outside};
use super::{
    BackendError,
    image::{Image, TargetNames},
    sys::{ElementOp, Map},
};

/// How a slot is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// At all that lies in it, added entries included: whole maps, of perhaps a hundred thousand.
    Whole,
    /// At what it is known to hold, as far as that is few entries: some calls.
    Known,
}

/// Up to here entries that are known are read one by one.
const FEW_KNOWN: usize = 64;

/// All maps of one ABI.
#[derive(Debug)]
pub(crate) struct Maps {
    active: Array<u8>,
    generations: Array<Generation>,
    ports: Ports,
    buckets: Array<Bucket>,
    endpoints: Endpoints,
    prefixes: Table<PrefixKey, Owners>,
    principals: Table<PrincipalKey, Owners>,
    nat64: Array<Nat64>,
    targets: Array<TargetName>,
    counters: Table<u32, AllCounters>,
    lost: Table<u32, u64>,
    gates: Array<u8>,
    events: Map,
    dials: Map,
}

impl Maps {
    /// Opens the pins of a directory and checks that each is the map it is named for; nothing where it has no pins.
    pub(crate) fn open(dir: &Path) -> Result<Option<Self>, BackendError> {
        match std::fs::read_dir(dir).map(|mut pins| pins.next().is_none()) {
            Ok(false) => {}
            Ok(true) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(BackendError::Io {
                    action: "list",
                    object: dir.into(),
                    error,
                });
            }
        }
        Ok(Some(Self {
            events: open_checked(dir, "events", (MapType::RingBuf, 0, 0, EVENT_BYTES))?,
            dials: open_checked(dir, "dials", (MapType::RingBuf, 0, 0, DIAL_BYTES))?,
            active: Array::whole(dir, "active", entries::ACTIVE)?,
            generations: Array::keyed(dir, "generations", entries::GENERATIONS)?,
            ports: Ports::open(dir)?,
            buckets: Array::keyed(dir, "buckets", entries::BUCKETS)?,
            endpoints: Endpoints::open(dir)?,
            prefixes: Table::open(dir, "prefixes", MapType::LpmTrie, entries::PREFIXES)?,
            principals: Table::open(dir, "principals", MapType::Hash, entries::PRINCIPALS)?,
            nat64: Array::whole(dir, "nat64", entries::NAT64)?,
            targets: Array::keyed(dir, "targets", entries::TARGETS)?,
            counters: Table::open(dir, "counters", MapType::PerCpuArray, entries::COUNTERS)?,
            lost: Table::open(dir, "lost", MapType::PerCpuArray, entries::LOST)?,
            gates: Array::whole(dir, "gates", entries::GATES)?,
        }))
    }

    /// The active slot.
    pub(crate) fn active_slot(&self) -> Result<Option<u8>, BackendError> {
        Ok(match self.active.get(0)? {
            active @ 1..=2 => Some(active - 1),
            _ => None,
        })
    }

    /// Makes a slot active: one byte, read back (F2, F3).
    pub(crate) fn activate(&self, slot: u8) -> Result<(), BackendError> {
        // The entries must be visible to every CPU before the flip is.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.active.put([(0, slot + 1)].into_iter())
    }

    /// Ids of the maps that every program's verdict rests on.
    #[must_use]
    pub(crate) fn ids(&self) -> [u32; 8] {
        let [few, many] = self.endpoints.ids();
        [
            self.active.id(),
            self.generations.id(),
            self.ports.id(),
            self.buckets.id(),
            few,
            many,
            self.prefixes.id(),
            self.principals.id(),
        ]
    }

    /// All of them, by the names of their pins: the next start takes over what is pinned.
    pub(crate) fn all(&self) -> Vec<(&'static str, &Map)> {
        let others = [
            self.active.named(),
            self.generations.named(),
            self.ports.named(),
            self.buckets.named(),
            self.prefixes.named(),
            self.principals.named(),
            self.nat64.named(),
            self.targets.named(),
            self.counters.named(),
            self.lost.named(),
            self.gates.named(),
            ("events", &self.events),
            ("dials", &self.dials),
        ];
        others.into_iter().chain(self.endpoints.named()).collect()
    }

    /// What holds for all of a slot.
    pub(crate) fn generation_of(&self, slot: u8) -> Result<Generation, BackendError> {
        self.generations.get(slot.into())
    }

    /// Names of a slot's targets.
    pub(crate) fn names(&self, slot: u8) -> Result<TargetNames, BackendError> {
        let names = self.targets.read(name_index(slot), MAX_TARGETS)?;
        names.try_into().map_err(|_| BackendError::ReadBack { map: "targets" })
    }

    /// All that a slot holds.
    pub(crate) fn read_slot(&self, slot: u8) -> Result<Image, BackendError> {
        self.read_with(slot, self.endpoints.read(slot)?)
    }

    /// The same with exact endpoints that have been read.
    fn read_with(&self, slot: u8, endpoints: Vec<(EndpointKey, Owners)>) -> Result<Image, BackendError> {
        let generation = self.generation_of(slot)?;
        Ok(Image {
            flags: generation.flags,
            levels: generation.levels,
            netns: generation.netns,
            few: generation.few,
            nat64: self.read_nat64(slot)?,
            ports: self.ports.read(slot)?,
            buckets: self.read_buckets(slot)?,
            endpoints,
            prefixes: self.read_prefixes(slot)?,
            principals: self.read_principals(slot)?,
            names: self.names(slot)?,
        })
    }

    /// Whether a slot holds an image. The filter of ports may hold more: such ports cost time alone.
    pub(crate) fn holds(&self, slot: u8, image: &Image, look: Look) -> Result<bool, BackendError> {
        match look {
            Look::Whole => Ok(self.endpoints.read(slot)? == image.endpoints
                && self.read_prefixes(slot)? == image.prefixes
                && self.read_principals(slot)? == image.principals
                && self.read_buckets(slot)? == image.buckets),
            Look::Known => {
                let generation = self.generation_of(slot)?;
                Ok(generation == image.generation(generation.number)
                    && self.endpoints.has(slot, &image.endpoints)?
                    && self.prefixes.has(&image.prefixes, |key| prefix_in_slot(key, slot))?
                    && self
                        .principals
                        .has(&image.principals, |key| PrincipalKey { slot, ..key })?
                    && self.has_buckets(slot, &image.buckets)?
                    && self.names(slot)? == image.names
                    && self.read_nat64(slot)? == image.nat64
                    && self.ports.has(slot, &image.ports)?)
            }
        }
    }

    fn read_nat64(&self, slot: u8) -> Result<[Nat64; MAX_NAT64 as usize], BackendError> {
        let prefixes = self.nat64.read(nat64_index(slot), MAX_NAT64)?;
        prefixes.try_into().map_err(|_| BackendError::ReadBack { map: "nat64" })
    }

    fn read_buckets(&self, slot: u8) -> Result<Vec<(u32, Bucket)>, BackendError> {
        let all = self.buckets.read(u32::from(slot) * BUCKETS, BUCKETS)?;
        let held = (0..).zip(all).filter(|(_, bucket)| *bucket != Bucket::default());
        let in_any = |(index, mut bucket): (u32, Bucket)| {
            bucket.key.scope ^= slot;
            (index, bucket)
        };
        Ok(held.map(in_any).collect())
    }

    fn read_prefixes(&self, slot: u8) -> Result<Vec<(PrefixKey, Owners)>, BackendError> {
        let mut prefixes = Vec::new();
        for mut key in self.prefixes.keys()? {
            if key.key.scope & scope::SLOT == slot {
                let owners = self
                    .prefixes
                    .get(&key)?
                    .ok_or(BackendError::ReadBack { map: "prefixes" })?;
                key.key.scope &= !scope::SLOT;
                prefixes.push((key, owners));
            }
        }
        prefixes.sort_unstable();
        Ok(prefixes)
    }

    fn read_principals(&self, slot: u8) -> Result<Vec<(PrincipalKey, Owners)>, BackendError> {
        let mut principals = Vec::new();
        self.principals.for_each(|mut key, owners| {
            if key.slot == slot {
                key.slot = 0;
                principals.push((key, owners));
            }
        })?;
        principals.sort_unstable();
        Ok(principals)
    }

    /// Makes a slot that no program reads hold `want`, and reads the change back (F3): after `have`, where this process
    /// has written that whole, and else after what is found in it.
    pub(crate) fn write_slot(
        &mut self,
        slot: u8,
        have: Option<&Image>,
        want: &Image,
        number: u64,
    ) -> Result<(), BackendError> {
        let endpoints = have.map(|have| have.endpoints.as_slice());
        let found;
        let have = if let Some(have) = have {
            have
        } else {
            found = self.read_with(slot, Vec::new())?;
            &found
        };
        self.ports.replace(slot, &have.ports, &want.ports)?;
        self.endpoints.replace(slot, endpoints, &want.endpoints)?;
        self.prefixes
            .replace_each(&have.prefixes, &want.prefixes, |key| prefix_in_slot(key, slot))?;
        self.principals
            .replace(&have.principals, &want.principals, |key| PrincipalKey { slot, ..key })?;
        self.write_buckets(slot, &have.buckets, &want.buckets)?;
        let names = (name_index(slot)..).zip(want.names);
        self.targets.put(names)?;
        self.nat64.put((nat64_index(slot)..).zip(want.nat64))?;
        self.generations
            .put([(slot.into(), want.generation(number))].into_iter())
    }

    /// Sets the counters of some targets to zero. What others count at this very moment may be lost.
    pub(crate) fn clear_counters(&self, bits: Owners) -> Result<(), BackendError> {
        let mut all = self.counters.get_all(&0)?;
        for (bit, counters) in all.iter_mut().flat_map(|cpu| (0..).zip(cpu)) {
            if bits >> bit & 1 == 1 {
                *counters = Counters::default();
            }
        }
        self.counters.put_all(&0, &all)
    }

    /// The counters of every target by its bit, all CPUs together.
    pub(crate) fn counters(&self) -> Result<AllCounters, BackendError> {
        let mut sums = [Counters::default(); MAX_TARGETS as usize];
        for cpu in self.counters.get_all(&0)? {
            for (sum, counters) in sums.iter_mut().zip(cpu) {
                sum.allowed += counters.allowed;
                sum.denied += counters.denied;
                sum.would_deny += counters.would_deny;
            }
        }
        Ok(sums)
    }

    /// Denials that the ring buffer had no room for.
    pub(crate) fn lost(&self) -> Result<u64, BackendError> {
        Ok(self.lost.get_all(&0)?.iter().sum())
    }

    /// Has the next dial of a port told, or none (N8).
    pub(crate) fn set_gate(&self, port: u16, open: bool) -> Result<(), BackendError> {
        let gate = if open { gate::OPEN } else { gate::NONE };
        self.gates.set(port.to_be().into(), gate)
    }

    /// Whether a port was dialled again after a dial was told. What comes from now on counts anew.
    pub(crate) fn take_knock(&self, port: u16) -> Result<bool, BackendError> {
        let port = u32::from(port.to_be());
        let knocked = self.gates.get(port)? == gate::KNOCKED;
        if knocked {
            self.gates.set(port, gate::CLOSED)?;
        }
        Ok(knocked)
    }

    fn has_buckets(&self, slot: u8, wanted: &[(u32, Bucket)]) -> Result<bool, BackendError> {
        self.buckets
            .has(wanted.iter().map(|entry| bucket_in_slot(*entry, slot)))
    }

    fn write_buckets(&self, slot: u8, have: &[(u32, Bucket)], want: &[(u32, Bucket)]) -> Result<(), BackendError> {
        let mut changed: BTreeMap<u32, Bucket> = have.iter().map(|(index, _)| (*index, Bucket::default())).collect();
        changed.extend(want.iter().copied());
        for (index, held) in have {
            if changed.get(index) == Some(held) {
                changed.remove(index);
            }
        }
        self.buckets.put(
            changed
                .iter()
                .map(|(index, bucket)| bucket_in_slot((*index, *bucket), slot)),
        )
    }
}

/// Opens a pin that must be such a map.
fn open_checked(dir: &Path, name: &str, shape: (MapType, u32, u32, u32)) -> Result<Map, BackendError> {
    let path = dir.join(name);
    match Map::open(&path) {
        Ok(map) if map.shape() == shape => Ok(map),
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => {
            Err(BackendError::Io {
                action: "open",
                object: path,
                error,
            })
        }
        Ok(_) | Err(_) => Err(BackendError::Damaged { path }),
    }
}

/// Makes nothing active in the maps of a directory, of whatever layout: from here on no program judges by them.
pub(crate) fn deactivate(dir: &Path) -> io::Result<()> {
    let active = Map::open(&dir.join("active"))?;
    if active.shape().0 != MapType::Array {
        return Err(io::ErrorKind::InvalidData.into());
    }
    active.element(ElementOp::Put(&[0; 4], &vec![0; active.value_bytes()]))
}

fn in_slot(key: EndpointKey, slot: u8) -> EndpointKey {
    EndpointKey {
        scope: key.scope & !scope::SLOT | slot,
        ..key
    }
}

fn prefix_in_slot(key: PrefixKey, slot: u8) -> PrefixKey {
    PrefixKey {
        key: in_slot(key.key, slot),
        ..key
    }
}

/// Index and value; one that is empty is the same in both slots.
fn bucket_in_slot((index, bucket): (u32, Bucket), slot: u8) -> (u32, Bucket) {
    let held = Bucket {
        key: in_slot(bucket.key, slot),
        ..bucket
    };
    let empty = bucket == Bucket::default();
    (u32::from(slot) * BUCKETS + index, if empty { bucket } else { held })
}

fn nat64_index(slot: u8) -> u32 {
    u32::from(slot) * MAX_NAT64
}

fn name_index(slot: u8) -> u32 {
    u32::from(slot) * MAX_TARGETS
}
