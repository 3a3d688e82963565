//! The pinned maps as typed tables: written slot by slot, read back, judged by from outside.

mod outside;
mod table;

use std::{collections::BTreeMap, io, path::Path};

use aya::maps::MapType;
use enforcer_ebpf::{
    AllCounters, BUCKETS, Bucket, Counters, DIAL_BYTES, EVENT_BYTES, EndpointKey, Generation, MAX_NAT64, MAX_TARGETS,
    Nat64, Owners, PrefixKey, PrincipalKey, TargetName, entries, gate, port, scope,
};

pub(crate) use self::outside::Outside;
use self::table::Table;
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
    active: Table<u32, u8>,
    generations: Table<u32, Generation>,
    ports: Table<u32, u8>,
    buckets: Table<u32, Bucket>,
    endpoints: Table<EndpointKey, Owners>,
    prefixes: Table<PrefixKey, Owners>,
    principals: Table<PrincipalKey, Owners>,
    nat64: Table<u32, Nat64>,
    targets: Table<u32, TargetName>,
    counters: Table<u32, AllCounters>,
    lost: Table<u32, u64>,
    gates: Table<u32, u8>,
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
            active: Table::open(dir, "active", MapType::Array, entries::ACTIVE)?,
            generations: Table::open(dir, "generations", MapType::Array, entries::GENERATIONS)?,
            ports: Table::open(dir, "ports", MapType::Array, entries::PORTS)?,
            buckets: Table::open(dir, "buckets", MapType::Array, entries::BUCKETS)?,
            endpoints: Table::open(dir, "endpoints", MapType::Hash, entries::ENDPOINTS)?,
            prefixes: Table::open(dir, "prefixes", MapType::LpmTrie, entries::PREFIXES)?,
            principals: Table::open(dir, "principals", MapType::Hash, entries::PRINCIPALS)?,
            nat64: Table::open(dir, "nat64", MapType::Array, entries::NAT64)?,
            targets: Table::open(dir, "targets", MapType::Array, entries::TARGETS)?,
            counters: Table::open(dir, "counters", MapType::PerCpuArray, entries::COUNTERS)?,
            lost: Table::open(dir, "lost", MapType::PerCpuArray, entries::LOST)?,
            gates: Table::open(dir, "gates", MapType::Array, entries::GATES)?,
        }))
    }

    /// The active slot.
    pub(crate) fn active_slot(&self) -> Result<Option<u8>, BackendError> {
        Ok(match self.active.get(&0)? {
            Some(active @ 1..=2) => Some(active - 1),
            Some(_) | None => None,
        })
    }

    /// Makes a slot active: one byte, read back (F2, F3).
    pub(crate) fn activate(&self, slot: u8) -> Result<(), BackendError> {
        // The entries must be visible to every CPU before the flip is.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.active.put(&0, slot + 1)?;
        match self.active_slot()? {
            Some(read) if read == slot => Ok(()),
            Some(_) | None => Err(BackendError::ReadBack { map: "active" }),
        }
    }

    /// Ids of the maps that every program's verdict rests on.
    #[must_use]
    pub(crate) fn ids(&self) -> [u32; 7] {
        [
            self.active.id(),
            self.generations.id(),
            self.ports.id(),
            self.buckets.id(),
            self.endpoints.id(),
            self.prefixes.id(),
            self.principals.id(),
        ]
    }

    /// All of them, by the names of their pins: the next start takes over what is pinned.
    pub(crate) fn all(&self) -> [(&'static str, &Map); 14] {
        [
            self.active.named(),
            self.generations.named(),
            self.ports.named(),
            self.buckets.named(),
            self.endpoints.named(),
            self.prefixes.named(),
            self.principals.named(),
            self.nat64.named(),
            self.targets.named(),
            self.counters.named(),
            self.lost.named(),
            self.gates.named(),
            ("events", &self.events),
            ("dials", &self.dials),
        ]
    }

    /// What holds for all of a slot.
    pub(crate) fn generation_of(&self, slot: u8) -> Result<Generation, BackendError> {
        Ok(self.generations.get(&u32::from(slot))?.unwrap_or_default())
    }

    /// Names of a slot's targets.
    pub(crate) fn names(&self, slot: u8) -> Result<TargetNames, BackendError> {
        let mut names = [TargetName::NONE; MAX_TARGETS as usize];
        self.targets.for_each(|index, name| {
            let bit = index.checked_sub(name_index(slot, 0));
            if let Some(into) = bit.and_then(|bit| names.get_mut(bit as usize)) {
                *into = name;
            }
        })?;
        Ok(names)
    }

    /// All that a slot holds.
    pub(crate) fn read_slot(&self, slot: u8) -> Result<Image, BackendError> {
        let generation = self.generation_of(slot)?;
        Ok(Image {
            flags: generation.flags,
            levels: generation.levels,
            netns: generation.netns,
            few: generation.few,
            nat64: self.read_nat64(slot)?,
            ports: self.read_ports(slot)?,
            buckets: self.read_buckets(slot)?,
            endpoints: self.read_endpoints(slot)?,
            prefixes: self.read_prefixes(slot)?,
            principals: self.read_principals(slot)?,
            names: self.names(slot)?,
        })
    }

    /// Whether a slot holds an image. The filter of ports may hold more: such ports cost time alone.
    pub(crate) fn holds(&self, slot: u8, image: &Image, look: Look) -> Result<bool, BackendError> {
        match look {
            Look::Whole => Ok(self.read_endpoints(slot)? == image.endpoints
                && self.read_prefixes(slot)? == image.prefixes
                && self.read_principals(slot)? == image.principals
                && self.read_buckets(slot)? == image.buckets),
            Look::Known => {
                let generation = self.generation_of(slot)?;
                Ok(generation == image.generation(generation.number)
                    && self.endpoints.has(&image.endpoints, |key| in_slot(key, slot))?
                    && self.prefixes.has(&image.prefixes, |key| prefix_in_slot(key, slot))?
                    && self
                        .principals
                        .has(&image.principals, |key| PrincipalKey { slot, ..key })?
                    && self.has_buckets(slot, &image.buckets)?
                    && self.names(slot)? == image.names
                    && self.read_nat64(slot)? == image.nat64
                    && self.lets_through(slot, image)?)
            }
        }
    }

    fn lets_through(&self, slot: u8, image: &Image) -> Result<bool, BackendError> {
        let within = |want: u8, found: u8| want & !found == 0;
        if image.ports.len() > FEW_KNOWN {
            let found = self.read_ports(slot)?;
            let mut ports = image.ports.iter();
            return Ok(ports.all(|(port, want)| within(*want, found.get(port).copied().unwrap_or(0))));
        }
        for (port, want) in &image.ports {
            let found = self.ports.get(&u32::from(*port))?.unwrap_or(0);
            if !within(*want, port::of(found, slot)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn read_nat64(&self, slot: u8) -> Result<[Nat64; MAX_NAT64 as usize], BackendError> {
        let mut prefixes = [Nat64::default(); MAX_NAT64 as usize];
        self.nat64.for_each(|index, prefix| {
            let number = index.checked_sub(nat64_index(slot));
            if let Some(into) = number.and_then(|number| prefixes.get_mut(number as usize)) {
                *into = prefix;
            }
        })?;
        Ok(prefixes)
    }

    fn read_ports(&self, slot: u8) -> Result<BTreeMap<u16, u8>, BackendError> {
        let mut ports = BTreeMap::new();
        self.ports.for_each(|number, slots| {
            let listed = port::of(slots, slot);
            if listed != 0
                && let Ok(number) = u16::try_from(number)
            {
                ports.insert(number, listed);
            }
        })?;
        Ok(ports)
    }

    fn read_buckets(&self, slot: u8) -> Result<Vec<(u32, Bucket)>, BackendError> {
        let mut buckets = Vec::new();
        self.buckets.for_each(|index, mut bucket| {
            let empty = bucket == Bucket::default();
            if index / BUCKETS == u32::from(slot) && !empty {
                bucket.key.scope ^= slot;
                buckets.push((index % BUCKETS, bucket));
            }
        })?;
        Ok(buckets)
    }

    fn read_endpoints(&self, slot: u8) -> Result<Vec<(EndpointKey, Owners)>, BackendError> {
        let mut endpoints = Vec::new();
        self.endpoints.for_each(|mut key, owners| {
            if key.scope & scope::SLOT == slot {
                key.scope &= !scope::SLOT;
                endpoints.push((key, owners));
            }
        })?;
        endpoints.sort_unstable();
        Ok(endpoints)
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

    /// Makes a slot that no program reads hold `want`, given that it holds `have`, and reads the change back (F3).
    pub(crate) fn write_slot(&self, slot: u8, have: &Image, want: &Image, number: u64) -> Result<(), BackendError> {
        // No program reads these bits of a port while it is written, as none reads the slot.
        let listed = |image: &Image, port: &u16| image.ports.get(port).copied().unwrap_or(0);
        for port in have.ports.keys().chain(want.ports.keys()) {
            if listed(have, port) != listed(want, port) {
                self.set_port(*port, slot, listed(want, port))?;
            }
        }
        self.endpoints
            .replace(&have.endpoints, &want.endpoints, |key| in_slot(key, slot))?;
        self.prefixes
            .replace_each(&have.prefixes, &want.prefixes, |key| prefix_in_slot(key, slot))?;
        self.principals
            .replace(&have.principals, &want.principals, |key| PrincipalKey { slot, ..key })?;
        self.write_buckets(slot, &have.buckets, &want.buckets)?;
        for ((index, name), have) in (name_index(slot, 0)..).zip(&want.names).zip(&have.names) {
            if name != have {
                self.targets.put_read_back(&index, *name)?;
            }
        }
        for ((index, prefix), have) in (nat64_index(slot)..).zip(&want.nat64).zip(&have.nat64) {
            if prefix != have {
                self.nat64.put_read_back(&index, *prefix)?;
            }
        }
        self.generations
            .put_read_back(&u32::from(slot), want.generation(number))
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
        self.gates.put(&u32::from(port.to_be()), gate)
    }

    /// Whether a port was dialled again after a dial was told. What comes from now on counts anew.
    pub(crate) fn take_knock(&self, port: u16) -> Result<bool, BackendError> {
        let key = u32::from(port.to_be());
        let knocked = self.gates.get(&key)? == Some(gate::KNOCKED);
        if knocked {
            self.gates.put(&key, gate::CLOSED)?;
        }
        Ok(knocked)
    }

    fn set_port(&self, number: u16, slot: u8, listed: u8) -> Result<(), BackendError> {
        let key = u32::from(number);
        let slots = self.ports.get(&key)?.unwrap_or(0);
        let others = slots & !(port::of(u8::MAX, slot) << port::shift(slot));
        self.ports.put_read_back(&key, others | listed << port::shift(slot))
    }

    fn has_buckets(&self, slot: u8, wanted: &[(u32, Bucket)]) -> Result<bool, BackendError> {
        let wanted = wanted.iter().map(|entry| bucket_in_slot(*entry, slot));
        self.buckets.has(&wanted.collect::<Vec<_>>(), |index| index)
    }

    fn write_buckets(&self, slot: u8, have: &[(u32, Bucket)], want: &[(u32, Bucket)]) -> Result<(), BackendError> {
        let mut changed: BTreeMap<u32, Bucket> = have.iter().map(|(index, _)| (*index, Bucket::default())).collect();
        changed.extend(want.iter().copied());
        for (index, held) in have {
            if changed.get(index) == Some(held) {
                changed.remove(index);
            }
        }
        let entries = changed.into_iter().map(|entry| bucket_in_slot(entry, slot));
        self.buckets.overwrite(&entries.collect::<Vec<_>>())
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

fn name_index(slot: u8, bit: u32) -> u32 {
    u32::from(slot) * MAX_TARGETS + bit
}
