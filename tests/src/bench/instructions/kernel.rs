//! As much of a kernel as the programs ask for: maps over memory of our own, helpers, a task and a socket.
//!
//! Programs read and write all of it by address, as they do in the kernel; every address that a helper is given is
//! looked up among the memories, so that nothing here is unsafe.

use std::{
    cell::{Cell, RefCell},
    ops::Range,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya_obj::{Map, generated::bpf_map_type};
use rbpf::ebpf::Helper;

/// What one ring buffer hands out at most.
const RECORD: usize = 4096;
/// Bytes of a kernel structure; where its members lie is told to the programs, as the loader does.
const STRUCTURE: usize = 1024;

/// Members of the kernel's structures, by the globals that tell the programs where they are.
pub(super) const OFFSETS: [(&str, u32); 18] = [
    ("TASK_CRED_OFFSET", 888),
    ("CRED_UID_OFFSET", 8),
    ("SK_UID_OFFSET", 528),
    ("TASK_FLAGS_OFFSET", 44),
    ("TASK_MM_OFFSET", 920),
    ("MM_EXE_OFFSET", 64),
    ("FILE_DENTRY_OFFSET", 72),
    ("DENTRY_PARENT_OFFSET", 24),
    ("DENTRY_LENGTH_OFFSET", 36),
    ("DENTRY_NAME_OFFSET", 40),
    ("DENTRY_INLINE_OFFSET", 56),
    ("TASK_PID_OFFSET", 600),
    ("TASK_TGID_OFFSET", 604),
    ("TASK_NAME_OFFSET", 608),
    ("TASK_CGROUPS_OFFSET", 624),
    ("CGROUPS_DEFAULT_OFFSET", 112),
    ("CGROUP_NODE_OFFSET", 256),
    ("NODE_ID_OFFSET", 96),
];

/// The path of the task's program, from its last component to the root.
const PROGRAM: [&str; 4] = ["curl", "bin", "usr", "/"];

/// Memory at an address that stays.
#[derive(Debug)]
pub(super) struct Memory(Box<[Cell<u8>]>);

impl Memory {
    pub(super) fn new(bytes: usize) -> Self {
        Self(vec![Cell::new(0); bytes].into())
    }

    pub(super) fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    pub(super) fn range(&self) -> Range<u64> {
        self.address()..self.address() + self.0.len() as u64
    }

    fn cells(&self, address: u64, bytes: usize) -> Option<&[Cell<u8>]> {
        let start = usize::try_from(address.checked_sub(self.address())?).ok()?;
        self.0.get(start..start.checked_add(bytes)?)
    }

    fn read(&self, address: u64, bytes: usize) -> Option<Vec<u8>> {
        Some(self.cells(address, bytes)?.iter().map(Cell::get).collect())
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Option<()> {
        let cells = self.cells(address, bytes.len())?;
        cells.iter().zip(bytes).for_each(|(cell, byte)| cell.set(*byte));
        Some(())
    }

    pub(super) fn put(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        let written = self.write(self.address() + offset as u64, bytes);
        written.with_context(|| format!("{} bytes at {offset} do not fit", bytes.len()))
    }
}

/// How a map finds its values.
#[derive(Debug)]
enum Shape {
    /// By a number.
    Array,
    /// By an equal key.
    Hash(Vec<Vec<u8>>),
    /// By the key whose first bits, as many as it says, are equal, the longest first.
    Prefix(Vec<Vec<u8>>),
    /// Records come, and are counted.
    Ring(u64),
    /// Of maps, of which there are none.
    Maps,
}

/// A map, its values one after the other.
#[derive(Debug)]
struct Emulated {
    name: String,
    shape: Shape,
    key: usize,
    value: usize,
    values: Memory,
}

impl Emulated {
    /// A map as the object defines it. Those with keys have room for as many entries as come here.
    fn new(name: &str, map: &Map, entries: usize) -> Result<Self> {
        use bpf_map_type as kind;
        let (key, value) = (map.key_size() as usize, map.value_size() as usize);
        let is = |one: kind| map.map_type() == one as u32;
        let (shape, bytes) = if is(kind::BPF_MAP_TYPE_ARRAY) || is(kind::BPF_MAP_TYPE_PERCPU_ARRAY) {
            (Shape::Array, value * map.max_entries() as usize)
        } else if is(kind::BPF_MAP_TYPE_HASH) {
            (Shape::Hash(Vec::new()), value * entries)
        } else if is(kind::BPF_MAP_TYPE_LPM_TRIE) {
            (Shape::Prefix(Vec::new()), value * entries)
        } else if is(kind::BPF_MAP_TYPE_RINGBUF) {
            (Shape::Ring(0), RECORD)
        } else if is(kind::BPF_MAP_TYPE_ARRAY_OF_MAPS) {
            (Shape::Maps, 0)
        } else {
            bail!("map {name} is of type {}, which is not emulated yet", map.map_type())
        };
        let values = Memory::new(bytes);
        if !map.data().is_empty() {
            values.put(0, map.data())?;
        }
        Ok(Self {
            name: name.trim_start_matches(".bss.").to_owned(),
            shape,
            key,
            value,
            values,
        })
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        if value.len() < self.value && matches!(self.shape, Shape::Array) {
            // One of the parts of an only value.
            let at = u32::from_ne_bytes(key.try_into()?) as usize;
            return self.values.put(at * value.len(), value);
        }
        ensure!(
            (key.len(), value.len()) == (self.key, self.value),
            "an entry of {} has {} and {} bytes, not {} and {}",
            self.name,
            key.len(),
            value.len(),
            self.key,
            self.value
        );
        let at = match &mut self.shape {
            Shape::Array => self.index(key).context("no such element")?,
            Shape::Hash(keys) | Shape::Prefix(keys) => {
                keys.push(key.to_vec());
                keys.len() - 1
            }
            Shape::Ring(_) | Shape::Maps => bail!("map {} takes no entries here", self.name),
        };
        self.values.put(at * self.value, value)
    }

    fn index(&self, key: &[u8]) -> Option<usize> {
        let at = u32::from_ne_bytes(key.try_into().ok()?) as usize;
        ((at + 1) * self.value <= self.values.0.len()).then_some(at)
    }

    /// The address of a value, 0 where there is none.
    fn find(&self, key: &[u8]) -> u64 {
        let at = match &self.shape {
            Shape::Array => self.index(key),
            Shape::Hash(keys) => keys.iter().position(|one| one == key),
            Shape::Prefix(keys) => longest(keys, key),
            Shape::Ring(_) | Shape::Maps => None,
        };
        at.map_or(0, |at| self.values.address() + (at * self.value) as u64)
    }
}

/// The longest prefix among keys of the form of `struct bpf_lpm_trie_key`.
fn longest(keys: &[Vec<u8>], key: &[u8]) -> Option<usize> {
    let bits = |key: &[u8]| key.first_chunk().map(|bits| u32::from_ne_bytes(*bits));
    let bit = |key: &[u8], number: u32| {
        let byte = key.get(4 + number as usize / 8)?;
        Some(byte >> (7 - number % 8) & 1)
    };
    let matches = |(_, one): &(usize, &Vec<u8>)| {
        bits(one).is_some_and(|length| (0..length).all(|number| bit(one, number) == bit(key, number)))
    };
    let found = keys.iter().enumerate().filter(matches);
    found.max_by_key(|(_, one)| bits(one)).map(|(at, _)| at)
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Instructions executed, calls and `exit` included; one that fills two places counts once.
    pub(super) instructions: u64,
    /// Of them calls that look a map up.
    pub(super) lookups: u64,
    /// Of them calls of other helpers.
    pub(super) calls: u64,
    /// Records that ring buffers got.
    pub(super) records: u64,
}

/// Who connects.
#[derive(Clone, Copy, Debug)]
pub(super) struct Task {
    /// The real UID of the task.
    pub(super) uid: u32,
    /// The owner of the socket.
    pub(super) owner: u32,
    /// The ids of the task's cgroups, the root's first.
    pub(super) cgroups: &'static [u64],
    /// The cookie of the socket's network namespace.
    pub(super) netns: u64,
    /// Whether the socket is TCP's.
    pub(super) tcp: bool,
    /// Whether the kernel has casts.
    pub(super) casts: bool,
}

/// Maps, memory and who connects.
#[derive(Debug)]
pub(super) struct Kernel {
    maps: Vec<Emulated>,
    /// The programs' stack, larger than theirs: below lies what counting needs.
    pub(super) stack: Memory,
    pub(super) context: Memory,
    socket: Memory,
    structure: Memory,
    /// What leads from the task to its user, its cgroup and the path of its program.
    program: Vec<Memory>,
    who: Task,
    tally: Tally,
    fault: Option<String>,
}

impl Kernel {
    pub(super) fn new(who: Task) -> Result<Self> {
        let [
            cred,
            cred_uid,
            sk_uid,
            flags,
            mm,
            exe,
            file_dentry,
            parent,
            length,
            name,
            inline,
            pid,
            tgid,
            task_name,
            cgroups,
            default,
            node,
            id,
        ] = OFFSETS.map(|(_, offset)| offset as usize);
        let new = || Memory::new(STRUCTURE);
        let (socket, structure) = (new(), new());
        socket.put(sk_uid, &who.owner.to_ne_bytes())?;
        structure.put(flags, &0_u32.to_ne_bytes())?;
        let (credentials, memory, file, dentries) = (new(), new(), new(), PROGRAM.map(|_| new()));
        credentials.put(cred_uid, &who.uid.to_ne_bytes())?;
        let point = |from: &Memory, offset, to: u64| from.put(offset, &to.to_ne_bytes());
        let set = [new(), new(), new()];
        let [groups, cgroup, its_node] = &set;
        structure.put(pid, &7_u32.to_ne_bytes())?;
        structure.put(tgid, &7_u32.to_ne_bytes())?;
        structure.put(task_name, b"curl")?;
        point(&structure, cgroups, groups.address())?;
        point(groups, default, cgroup.address())?;
        point(cgroup, node, its_node.address())?;
        its_node.put(id, &who.cgroups.last().copied().unwrap_or_default().to_ne_bytes())?;
        let [last, .., root] = &dentries;
        point(&structure, cred, credentials.address())?;
        point(&structure, mm, memory.address())?;
        point(&memory, exe, file.address())?;
        point(&file, file_dentry, last.address())?;
        let parents = dentries.iter().skip(1).chain([root]);
        for ((dentry, parent_of_it), component) in dentries.iter().zip(parents).zip(PROGRAM) {
            point(dentry, parent, parent_of_it.address())?;
            dentry.put(length, &u32::try_from(component.len())?.to_ne_bytes())?;
            point(dentry, name, dentry.address() + inline as u64)?;
            dentry.put(inline, component.as_bytes())?;
        }
        Ok(Self {
            maps: Vec::new(),
            stack: Memory::new(2 * STRUCTURE),
            context: new(),
            socket,
            structure,
            program: dentries
                .into_iter()
                .chain(set)
                .chain([credentials, memory, file])
                .collect(),
            who,
            tally: Tally::default(),
            fault: None,
        })
    }

    /// Takes a map in. Its number stands in the programs for its descriptor.
    pub(super) fn add_map(&mut self, name: &str, map: &Map, entries: usize) -> Result<()> {
        self.maps.push(Emulated::new(name, map, entries)?);
        Ok(())
    }

    /// Writes an entry of a map.
    pub(super) fn put(&mut self, map: &str, key: &[u8], value: &[u8]) -> Result<()> {
        let found = self.maps.iter_mut().find(|one| one.name == map);
        found
            .with_context(|| format!("the programs have no map {map}"))?
            .put(key, value)
    }

    /// The address of the values of a map, by its number.
    pub(super) fn values(&self, map: usize) -> Option<u64> {
        Some(self.maps.get(map)?.values.address())
    }

    pub(super) fn socket(&self) -> u64 {
        self.socket.address()
    }

    fn memories(&self) -> impl Iterator<Item = &Memory> {
        let own = [&self.stack, &self.context, &self.socket, &self.structure];
        own.into_iter()
            .chain(&self.program)
            .chain(self.maps.iter().map(|map| &map.values))
    }

    /// All that programs may read and write.
    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        self.memories().map(Memory::range).collect()
    }

    fn read(&self, address: u64, bytes: usize) -> Option<Vec<u8>> {
        self.memories().find_map(|memory| memory.read(address, bytes))
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Option<()> {
        self.memories().find_map(|memory| memory.write(address, bytes))
    }

    fn map(&mut self, number: u64) -> Option<&mut Emulated> {
        self.maps.get_mut(usize::try_from(number).ok()?)
    }

    fn lookup(&mut self, map: u64, key: u64) -> Option<u64> {
        let bytes = self.map(map)?.key;
        let key = self.read(key, bytes)?;
        Some(self.map(map)?.find(&key))
    }

    fn reserve(&mut self, map: u64, bytes: u64) -> Option<u64> {
        let map = self.map(map)?;
        let Shape::Ring(records) = &mut map.shape else {
            return None;
        };
        *records += 1;
        Some(if bytes <= RECORD as u64 {
            map.values.address()
        } else {
            0
        })
    }
}

thread_local! {
    /// The kernel of the program that this thread runs: helpers are functions without state.
    static KERNEL: RefCell<Option<Kernel>> = const { RefCell::new(None) };
}

/// Runs a program over a kernel, and says what it did.
pub(super) fn running(kernel: Kernel, run: impl FnOnce() -> Result<u64>) -> Result<(u64, Tally)> {
    KERNEL.with_borrow_mut(|here| *here = Some(kernel));
    let result = run();
    let kernel = KERNEL.with_borrow_mut(Option::take).context("no kernel")?;
    if let Some(fault) = kernel.fault {
        bail!("{fault}");
    }
    Ok((result?, kernel.tally))
}

/// What a helper does; what it cannot do ends the run as a fault.
fn helper(what: &str, work: impl FnOnce(&mut Kernel) -> Option<u64>) -> u64 {
    KERNEL.with_borrow_mut(|kernel| {
        let Some(kernel) = kernel else { return 0 };
        kernel.tally.calls += 1;
        let answer = work(kernel);
        if answer.is_none() {
            kernel.fault = Some(format!("{what} was given what it cannot take"));
        }
        answer.unwrap_or(0)
    })
}

/// Called before each instruction.
pub(super) fn step(_: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    KERNEL.with_borrow_mut(|kernel| {
        if let Some(kernel) = kernel {
            kernel.tally.instructions += 1;
        }
    });
    0
}

/// The helpers by their numbers (`linux/bpf.h`), each of the kernel's own. One that is missing fails the run by its
/// number.
pub(super) const HELPERS: [(u32, Helper); 16] = [
    (1, |map, key, _, _, _| {
        helper("bpf_map_lookup_elem", |kernel| {
            kernel.tally.calls -= 1;
            kernel.tally.lookups += 1;
            kernel.lookup(map, key)
        })
    }),
    (5, |_, _, _, _, _| helper("bpf_ktime_get_ns", |_| Some(1))),
    (8, |_, _, _, _, _| helper("bpf_get_smp_processor_id", |_| Some(0))),
    (14, |_, _, _, _, _| {
        helper("bpf_get_current_pid_tgid", |_| Some(7 << 32 | 8))
    }),
    (15, |_, _, _, _, _| {
        helper("bpf_get_current_uid_gid", |kernel| Some(u64::from(kernel.who.uid)))
    }),
    (16, |to, bytes, _, _, _| {
        helper("bpf_get_current_comm", |kernel| {
            let mut name = b"curl".to_vec();
            name.resize(usize::try_from(bytes).ok()?, 0);
            kernel.write(to, &name).map(|()| 0)
        })
    }),
    (35, |_, _, _, _, _| {
        helper("bpf_get_current_task", |kernel| Some(kernel.structure.address()))
    }),
    (80, |_, _, _, _, _| {
        helper("bpf_get_current_cgroup_id", |kernel| kernel.who.cgroups.last().copied())
    }),
    (113, |to, bytes, from, _, _| {
        helper("bpf_probe_read_kernel", |kernel| {
            let read = kernel.read(from, usize::try_from(bytes).ok()?)?;
            kernel.write(to, &read).map(|()| 0)
        })
    }),
    (122, |_, _, _, _, _| {
        helper("bpf_get_netns_cookie", |kernel| Some(kernel.who.netns))
    }),
    (123, |level, _, _, _, _| {
        helper("bpf_get_current_ancestor_cgroup_id", |kernel| {
            let level = usize::try_from(level).ok()?;
            Some(kernel.who.cgroups.get(level).copied().unwrap_or(0))
        })
    }),
    (125, |_, _, _, _, _| helper("bpf_ktime_get_boot_ns", |_| Some(1))),
    (131, |map, bytes, _, _, _| {
        helper("bpf_ringbuf_reserve", |kernel| kernel.reserve(map, bytes))
    }),
    (132, |_, _, _, _, _| {
        helper("bpf_ringbuf_submit", |kernel| {
            kernel.tally.records += 1;
            Some(0)
        })
    }),
    (137, |socket, _, _, _, _| {
        helper("bpf_skc_to_tcp_sock", |kernel| {
            Some(if kernel.who.tcp { socket } else { 0 })
        })
    }),
    (158, |_, _, _, _, _| {
        helper("bpf_get_current_task_btf", |kernel| Some(kernel.structure.address()))
    }),
];
