//! The pinned maps as typed tables: written slot by slot, read back, judged by from outside.

use std::{
    collections::BTreeSet,
    io,
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use enforcer_ebpf::{
    AllCounters, Counters, DIAL_BYTES, EVENT_BYTES, EndpointKey, Generation, KEY_BITS, MAX_NAT64, MAX_TARGETS, Nat64,
    Owners, PrefixKey, PrincipalKey, TargetName, decide::Tables, entries, gate, scope,
};

use super::{
    BackendError,
    image::{Image, Names},
    sys::{self, MapInfo, Plain},
};

/// Entries moved by one batch call.
const BATCH: usize = 4096;
/// Up to here changes are written and read back one by one, beyond it in batches.
const FEW: usize = 64;

const ARRAY: u32 = 2;
const HASH: u32 = 1;
const PERCPU_ARRAY: u32 = 6;
const LPM_TRIE: u32 = 11;
const RINGBUF: u32 = 27;

/// A map by its descriptor, its keys and values typed.
#[derive(Debug)]
pub(crate) struct Table<K, V> {
    fd: OwnedFd,
    name: &'static str,
    types: PhantomData<(K, V)>,
}

/// A part of a slot, to be read by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Exact endpoints and prefixes: perhaps a hundred thousand.
    Endpoints,
    /// All else.
    Rest,
}

/// All maps of one ABI.
#[derive(Debug)]
pub(crate) struct Maps {
    active: Table<u32, u8>,
    generations: Table<u32, Generation>,
    ports: Table<u32, u8>,
    endpoints: Table<EndpointKey, Owners>,
    prefixes: Table<PrefixKey, Owners>,
    principals: Table<PrincipalKey, Owners>,
    nat64: Table<u32, Nat64>,
    targets: Table<u32, TargetName>,
    counters: Table<u32, AllCounters>,
    lost: Table<u32, u64>,
    gates: Table<u32, u8>,
    cpus: usize,
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
        let cpus = aya::util::nr_cpus().map_err(|(what, error)| BackendError::Io {
            action: "read",
            object: what.into(),
            error,
        })?;
        open_checked(dir, "events", RINGBUF, 0, 0, EVENT_BYTES)?;
        open_checked(dir, "dials", RINGBUF, 0, 0, DIAL_BYTES)?;
        Ok(Some(Self {
            active: Table::open(dir, "active", ARRAY, entries::ACTIVE)?,
            generations: Table::open(dir, "generations", ARRAY, entries::GENERATIONS)?,
            ports: Table::open(dir, "ports", ARRAY, entries::PORTS)?,
            endpoints: Table::open(dir, "endpoints", HASH, entries::ENDPOINTS)?,
            prefixes: Table::open(dir, "prefixes", LPM_TRIE, entries::PREFIXES)?,
            principals: Table::open(dir, "principals", HASH, entries::PRINCIPALS)?,
            nat64: Table::open(dir, "nat64", ARRAY, entries::NAT64)?,
            targets: Table::open(dir, "targets", ARRAY, entries::TARGETS)?,
            counters: Table::open(dir, "counters", PERCPU_ARRAY, entries::COUNTERS)?,
            lost: Table::open(dir, "lost", PERCPU_ARRAY, entries::LOST)?,
            gates: Table::open(dir, "gates", ARRAY, entries::GATES)?,
            cpus,
        }))
    }

    /// The slot in force.
    pub(crate) fn active_slot(&self) -> Result<Option<u8>, BackendError> {
        Ok(match self.active.get(&0)? {
            Some(active @ 1..=2) => Some(active - 1),
            Some(_) | None => None,
        })
    }

    /// Puts a slot in force: one byte, read back (F2, F3).
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
    pub(crate) fn ids(&self) -> Result<[u32; 6], BackendError> {
        Ok([
            self.active.id()?,
            self.generations.id()?,
            self.ports.id()?,
            self.endpoints.id()?,
            self.prefixes.id()?,
            self.principals.id()?,
        ])
    }

    /// The id of the one that only the programs of IPv6 ask.
    pub(crate) fn nat64_id(&self) -> Result<u32, BackendError> {
        self.nat64.id()
    }

    /// What holds for all of a slot.
    pub(crate) fn generation_of(&self, slot: u8) -> Result<Generation, BackendError> {
        Ok(self.generations.get(&u32::from(slot))?.unwrap_or_default())
    }

    /// Names of a slot's targets.
    pub(crate) fn names(&self, slot: u8) -> Result<Names, BackendError> {
        let mut names = [TargetName::NONE; MAX_TARGETS as usize];
        for (index, name) in (name_index(slot, 0)..).zip(&mut names) {
            *name = self.targets.get(&index)?.unwrap_or(TargetName::NONE);
        }
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
            endpoints: self.read_endpoints(slot)?,
            prefixes: self.read_prefixes(slot)?,
            principals: self.read_principals(slot)?,
            names: self.names(slot)?,
        })
    }

    /// Whether a slot holds a part of an image. The filter of ports may hold more: it is never narrower than what it stands before.
    pub(crate) fn holds(&self, slot: u8, image: &Image, part: Part) -> Result<bool, BackendError> {
        match part {
            Part::Endpoints => {
                Ok(self.read_endpoints(slot)? == image.endpoints && self.read_prefixes(slot)? == image.prefixes)
            }
            Part::Rest => {
                let Generation {
                    number: _,
                    netns,
                    levels,
                    flags,
                    few,
                } = self.generation_of(slot)?;
                Ok(
                    (netns, levels, flags, few) == (image.netns, image.levels, image.flags, image.few)
                        && self.read_principals(slot)? == image.principals
                        && self.names(slot)? == image.names
                        && self.read_nat64(slot)? == image.nat64
                        && self.lets_through(slot, image)?,
                )
            }
        }
    }

    fn lets_through(&self, slot: u8, image: &Image) -> Result<bool, BackendError> {
        /// Up to here ports are read one by one, beyond it all of them at once.
        const FEW_PORTS: usize = 1024;
        if image.ports.len() > FEW_PORTS {
            return Ok(image.ports.is_subset(&self.read_ports(slot)?));
        }
        for port in &image.ports {
            if self.ports.get(&u32::from(*port))?.unwrap_or(0) >> slot & 1 == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn read_nat64(&self, slot: u8) -> Result<[Nat64; MAX_NAT64 as usize], BackendError> {
        let mut prefixes = [Nat64::default(); MAX_NAT64 as usize];
        for (index, prefix) in (nat64_index(slot)..).zip(&mut prefixes) {
            *prefix = self.nat64.get(&index)?.unwrap_or_default();
        }
        Ok(prefixes)
    }

    fn read_ports(&self, slot: u8) -> Result<BTreeSet<u16>, BackendError> {
        let mut ports = BTreeSet::new();
        self.ports.for_each_batch(|port, slots| {
            if slots >> slot & 1 == 1
                && let Ok(port) = u16::try_from(port)
            {
                ports.insert(port);
            }
        })?;
        Ok(ports)
    }

    fn read_endpoints(&self, slot: u8) -> Result<Vec<(EndpointKey, Owners)>, BackendError> {
        let mut endpoints = Vec::new();
        self.endpoints.for_each_batch(|mut key, owners| {
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
        self.principals.for_each_batch(|mut key, owners| {
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
        let bit = 1_u8 << slot;
        // The filter first on the way in and last on the way out: it is never narrower than what it stands before.
        for port in want.ports.difference(&have.ports) {
            self.set_port(*port, |slots| slots | bit)?;
        }
        let in_slot = |mut key: EndpointKey| {
            key.scope = key.scope & !scope::SLOT | slot;
            key
        };
        self.endpoints.replace(&have.endpoints, &want.endpoints, in_slot)?;
        self.prefixes
            .replace_each(&have.prefixes, &want.prefixes, |key| PrefixKey {
                key: in_slot(key.key),
                ..key
            })?;
        self.principals
            .replace(&have.principals, &want.principals, |key| PrincipalKey { slot, ..key })?;
        for port in have.ports.difference(&want.ports) {
            self.set_port(*port, |slots| slots & !bit)?;
        }
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
        let generation = Generation {
            number,
            netns: want.netns,
            levels: want.levels,
            flags: want.flags,
            few: want.few,
        };
        self.generations.put_read_back(&u32::from(slot), generation)
    }

    /// Sets the counters of some targets to zero. What others count at this very moment may be lost.
    pub(crate) fn clear_counters(&self, bits: Owners) -> Result<(), BackendError> {
        let mut all = self.counters.get_all(&0, self.cpus)?;
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
        for cpu in self.counters.get_all(&0, self.cpus)? {
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
        Ok(self.lost.get_all(&0, self.cpus)?.iter().sum())
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

    fn set_port(&self, port: u16, change: impl Fn(u8) -> u8) -> Result<(), BackendError> {
        let key = u32::from(port);
        let slots = self.ports.get(&key)?.unwrap_or(0);
        self.ports.put_read_back(&key, change(slots))
    }
}

/// The maps as the kernel's own decision sees them, for `check`. What cannot be read counts as absent and is kept.
#[derive(Debug)]
pub(crate) struct Outside<'a> {
    maps: &'a Maps,
    error: std::cell::RefCell<Option<BackendError>>,
}

impl<'a> Outside<'a> {
    /// A view of the maps.
    #[must_use]
    pub(crate) fn new(maps: &'a Maps) -> Self {
        Self {
            maps,
            error: std::cell::RefCell::new(None),
        }
    }

    /// What could not be read while deciding, if anything.
    pub(crate) fn finish(self) -> Result<(), BackendError> {
        self.error.into_inner().map_or(Ok(()), Err)
    }

    fn keep<T>(&self, result: Result<Option<T>, BackendError>) -> Option<T> {
        result.unwrap_or_else(|error| {
            self.error.borrow_mut().get_or_insert(error);
            None
        })
    }
}

impl Tables for Outside<'_> {
    fn port(&self, port: u16) -> bool {
        self.keep(self.maps.ports.get(&u32::from(port)))
            .is_some_and(|slots| slots != 0)
    }

    fn active(&self) -> Option<u8> {
        self.keep(self.maps.active_slot())
    }

    fn generation(&self, slot: u8) -> Option<Generation> {
        self.keep(self.maps.generation_of(slot).map(Some))
    }

    fn few(&self, slot: u8, user: u32) -> Option<Owners> {
        self.generation(slot)?.few.find(user)
    }

    fn exact(&self, key: &EndpointKey) -> Option<Owners> {
        self.keep(self.maps.endpoints.get(key))
    }

    fn prefix(&self, key: &EndpointKey) -> Option<Owners> {
        self.keep(self.maps.prefixes.get(&PrefixKey {
            bits: KEY_BITS + 128,
            key: *key,
        }))
    }

    fn nat64(&self, slot: u8, number: u32) -> Option<Nat64> {
        self.keep(self.maps.nat64.get(&(nat64_index(slot) + number)))
    }

    fn principal(&self, key: &PrincipalKey) -> Option<Owners> {
        self.keep(self.maps.principals.get(key))
    }
}

impl<K: Plain + Ord, V: Plain + PartialEq> Table<K, V> {
    fn open(dir: &Path, name: &'static str, map_type: u32, max_entries: u32) -> Result<Self, BackendError> {
        #[allow(clippy::cast_possible_truncation, reason = "sizes of small structures")]
        let (key_size, value_size) = (size_of::<K>() as u32, size_of::<V>() as u32);
        let fd = open_checked(dir, name, map_type, key_size, value_size, max_entries)?;
        Ok(Self {
            fd,
            name,
            types: PhantomData,
        })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn id(&self) -> Result<u32, BackendError> {
        sys::map_id(self.fd()).map_err(self.failed("ask for the id of"))
    }

    fn get(&self, key: &K) -> Result<Option<V>, BackendError> {
        let mut value = [sys::zeroed::<V>()];
        let found = sys::lookup(self.fd(), key, &mut value).map_err(self.failed("read"))?;
        let [value] = value;
        Ok(found.then_some(value))
    }

    fn get_all(&self, key: &K, cpus: usize) -> Result<Vec<V>, BackendError> {
        let mut values = vec![sys::zeroed::<V>(); cpus];
        sys::lookup(self.fd(), key, &mut values).map_err(self.failed("read"))?;
        Ok(values)
    }

    fn put(&self, key: &K, value: V) -> Result<(), BackendError> {
        sys::update(self.fd(), key, &[value]).map_err(self.failed("write"))
    }

    fn put_all(&self, key: &K, values: &[V]) -> Result<(), BackendError> {
        sys::update(self.fd(), key, values).map_err(self.failed("write"))
    }

    fn put_read_back(&self, key: &K, value: V) -> Result<(), BackendError> {
        self.put(key, value)?;
        if self.get(key)? == Some(value) {
            Ok(())
        } else {
            Err(BackendError::ReadBack { map: self.name })
        }
    }

    fn keys(&self) -> Result<Vec<K>, BackendError> {
        let mut keys = Vec::new();
        let mut next = sys::zeroed::<K>();
        while sys::next_key(self.fd(), keys.last(), &mut next).map_err(self.failed("list"))? {
            keys.push(next);
        }
        Ok(keys)
    }

    fn for_each_batch(&self, mut each: impl FnMut(K, V)) -> Result<(), BackendError> {
        let mut keys = vec![sys::zeroed::<K>(); BATCH];
        let mut values = vec![sys::zeroed::<V>(); BATCH];
        let mut cursor = None;
        loop {
            let (read, more) = sys::lookup_batch(self.fd(), &mut cursor, &mut keys, &mut values)
                .map_err(self.failed("read all of"))?;
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
    fn replace(&self, have: &[(K, V)], want: &[(K, V)], place: impl Fn(K) -> K) -> Result<(), BackendError> {
        let Change { gone, new } = change(have, want);
        if gone.len() + new.len() <= FEW {
            return self.replace_each(have, want, place);
        }
        let gone: Vec<K> = gone.into_iter().map(&place).collect();
        for keys in gone.chunks(BATCH) {
            sys::delete_batch(self.fd(), keys).map_err(self.failed("delete from"))?;
        }
        let (keys, values): (Vec<K>, Vec<V>) = new.into_iter().map(|(key, value)| (place(key), value)).unzip();
        for (keys, values) in keys.chunks(BATCH).zip(values.chunks(BATCH)) {
            sys::update_batch(self.fd(), keys, values).map_err(self.failed("write"))?;
        }
        // Every wanted entry must be met once, and nothing else of this slot.
        let mut expected: Vec<(K, V)> = want.iter().map(|(key, value)| (place(*key), *value)).collect();
        expected.sort_unstable_by_key(|(key, _)| *key);
        let (mut met, mut wrong) = (0_usize, false);
        self.for_each_batch(|key, value| {
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

    fn replace_each(&self, have: &[(K, V)], want: &[(K, V)], place: impl Fn(K) -> K) -> Result<(), BackendError> {
        let Change { gone, new } = change(have, want);
        for key in gone {
            sys::delete(self.fd(), &place(key)).map_err(self.failed("delete from"))?;
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
struct Change<K, V> {
    gone: Vec<K>,
    new: Vec<(K, V)>,
}

/// The difference of two sorted lists.
fn change<K: Copy + Ord, V: Copy + PartialEq>(have: &[(K, V)], want: &[(K, V)]) -> Change<K, V> {
    let (mut gone, mut new) = (Vec::new(), Vec::new());
    let (mut have, mut want) = (have.iter().peekable(), want.iter().peekable());
    loop {
        match (have.peek(), want.peek()) {
            (None, None) => return Change { gone, new },
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

fn open_checked(
    dir: &Path,
    name: &'static str,
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
) -> Result<OwnedFd, BackendError> {
    let path = dir.join(name);
    let failed = |error| BackendError::Io {
        action: "open",
        object: path.clone(),
        error,
    };
    let fd = match sys::open_pin(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(BackendError::Damaged { path }),
        opened => opened.map_err(failed)?,
    };
    let found = sys::map_info(fd.as_fd()).map_err(failed)?;
    if found
        == (MapInfo {
            map_type,
            key_size,
            value_size,
            max_entries,
        })
    {
        Ok(fd)
    } else {
        Err(BackendError::Damaged { path })
    }
}

/// Puts nothing in force in the maps of a directory, of whatever layout: from here on no program judges by them.
pub(crate) fn deactivate(dir: &Path) -> io::Result<()> {
    let active = sys::open_pin(&dir.join("active"))?;
    let info = sys::map_info(active.as_fd())?;
    if (info.map_type, info.key_size) != (ARRAY, 4) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    sys::update(active.as_fd(), &0_u32, &vec![0_u8; info.value_size as usize])
}

fn nat64_index(slot: u8) -> u32 {
    u32::from(slot) * MAX_NAT64
}

fn name_index(slot: u8, bit: u32) -> u32 {
    u32::from(slot) * MAX_TARGETS + bit
}
