//! What the kernel programs and the loader share: map keys, values and sizes, limits, and the pure decision.

#![no_std]
#![allow(
    clippy::inline_always,
    reason = "the kernel programs must be one function each, without calls"
)]

mod bucket;
pub mod decide;

pub use bucket::{BUCKETS, Bucket, Spot};

#[cfg(not(target_arch = "bpf"))]
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Version of everything in this file, and of the maps' names and types in `main.rs`; maps of another version are never
/// reused.
pub const ABI: u32 = 7;

/// Exact endpoints of one rule set, and with them an entry or two for the unspecified address of every port (D5).
pub const MAX_ENDPOINTS: u32 = 131_072;
/// Exact endpoints of a rule set that the map `endpoints` has room for; where there are more, all lie in another one,
/// which is made when it is first needed. The kernel prepares each bucket of a hash that it makes, and goes through all
/// of them to read it.
pub const FEW_ENDPOINTS: u32 = 4_096;
/// Endpoints of one rule set that name a prefix.
pub const MAX_PREFIXES: u32 = 16_384;
/// Principal keys (user, user in a cgroup, anybody in a cgroup, kernel) of one rule set, over all targets.
pub const MAX_PRINCIPALS: u32 = 16_384;
/// Targets of one rule set: the bits of [`Owners`].
pub const MAX_TARGETS: u32 = 64;
/// NAT64 prefixes of one rule set besides the well-known one.
pub const MAX_NAT64: u32 = 3;
/// Bytes of a target's name.
pub const MAX_TARGET_NAME: usize = 48;
/// Different depths of all cgroups that principals name.
pub const MAX_CGROUP_LEVELS: u32 = 8;
/// Depth of the deepest cgroup that a principal can name; the root has depth 0.
pub const MAX_CGROUP_DEPTH: u32 = 254;
/// Bytes of the event ring buffer.
pub const EVENT_BYTES: u32 = 1 << 20;
/// Bytes of the ring buffer of dials: a page of the largest size that kernels have.
pub const DIAL_BYTES: u32 = 1 << 16;

/// Components of a program's path that a record has room for, the last ones of the path.
pub const MAX_COMPONENTS: usize = 8;
/// Bytes of a component of a program's path that a record has room for.
pub const COMPONENT_BYTES: usize = 40;

/// Every rule set in the kernel lies in one of two slots; readers use the active one, the loader writes the other.
pub const SLOTS: u32 = 2;

/// Most entries of each map; of an array that is one value, its elements.
pub mod entries {
    use super::{
        BUCKETS as SLOT_BUCKETS, FEW_ENDPOINTS, MAX_ENDPOINTS, MAX_NAT64, MAX_PREFIXES, MAX_PRINCIPALS, MAX_TARGETS,
        SLOTS,
    };

    /// Of `active`.
    pub const ACTIVE: u32 = 1;
    /// Of `generations`, one a slot.
    pub const GENERATIONS: u32 = SLOTS;
    /// Of `ports`, one a port.
    pub const PORTS: u32 = 1 << 16;
    /// Of `buckets`, slot by slot.
    pub const BUCKETS: u32 = SLOTS * SLOT_BUCKETS;
    /// Of `endpoints`.
    pub const ENDPOINTS: u32 = SLOTS * FEW_ENDPOINTS;
    /// Of `many`.
    pub const MANY: u32 = 1;
    /// Of what `many` holds.
    pub const MANY_ENDPOINTS: u32 = SLOTS * MAX_ENDPOINTS;
    /// Of `prefixes`.
    pub const PREFIXES: u32 = SLOTS * MAX_PREFIXES;
    /// Of `principals`.
    pub const PRINCIPALS: u32 = SLOTS * MAX_PRINCIPALS;
    /// Of `targets`, slot by slot.
    pub const TARGETS: u32 = SLOTS * MAX_TARGETS;
    /// Of `counters`, one for all targets.
    pub const COUNTERS: u32 = 1;
    /// Of `lost`.
    pub const LOST: u32 = 1;
    /// Of `nat64`, slot by slot.
    pub const NAT64: u32 = SLOTS * MAX_NAT64;
    /// Of `gates`, one a port.
    pub const GATES: u32 = 1 << 16;
}

/// The targets that own an endpoint, or that admit a user: a bit a target.
pub type Owners = u64;

/// IANA protocol number of TCP.
pub const TCP: u8 = 6;
/// IANA protocol number of UDP.
pub const UDP: u8 = 17;

/// Bits of [`EndpointKey::scope`].
pub mod scope {
    /// The slot, 0 or 1.
    pub const SLOT: u8 = 1;
    /// The address is not IPv4, so that an IPv6 prefix can hold no mapped address (D4).
    pub const V6: u8 = 2;
    /// The unspecified address as dialled in another network namespace (D5, D6).
    pub const FOREIGN: u8 = 4;
}

/// What a slot has on a port: half a byte for each slot.
pub mod port {
    /// Some endpoint, or a name.
    pub const LISTED: u8 = 1;
    /// A prefix, so that no bucket rules an address out.
    pub const WIDE: u8 = 2;
    /// A name, so that a dial of another address may be told (N8).
    pub const NAMED: u8 = 4;

    /// The bits of one slot.
    #[inline(always)]
    #[must_use]
    pub const fn of(slots: u8, slot: u8) -> u8 {
        slots >> shift(slot) & (LISTED | WIDE | NAMED)
    }

    /// How far the bits of a slot lie from the lowest.
    #[inline(always)]
    #[must_use]
    pub const fn shift(slot: u8) -> u8 {
        4 * (slot & 1)
    }
}

/// An address as four words in network byte order; IPv4 is `::ffff:a.b.c.d`, unspecified is `::` (D4).
pub type Address = [u32; 4];

/// The first 96 bits of an address: a NAT64 prefix, behind which an IPv4 address follows (RFC 6052).
pub type Nat64 = [u32; 3];

/// `64:ff9b::/96`.
pub const WELL_KNOWN_NAT64: Nat64 = [0x0064_ff9b_u32.to_be(), 0, 0];

/// Key of the exact endpoints, and the data part of the prefixes' keys.
#[repr(C)]
#[cfg_attr(not(target_arch = "bpf"), derive(FromBytes, IntoBytes, Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointKey {
    /// Bits of [`scope`].
    pub scope: u8,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Port in network byte order.
    pub port: u16,
    /// Canonical address.
    pub address: Address,
}

/// Bits of [`EndpointKey`] before the address: what a prefix's length counts besides its own bits.
pub const KEY_BITS: u32 = 32;

/// Key of a prefix: its length, [`KEY_BITS`] included, and its data (`struct bpf_lpm_trie_key` of linux/bpf.h).
#[repr(C)]
#[cfg_attr(not(target_arch = "bpf"), derive(FromBytes, IntoBytes, Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrefixKey {
    /// Bits that count.
    pub bits: u32,
    /// Scope, protocol, port and address.
    pub key: EndpointKey,
}

/// Who asks, as far as one lookup sees.
#[repr(C)]
#[cfg_attr(not(target_arch = "bpf"), derive(FromBytes, IntoBytes, Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrincipalKey {
    /// A cgroup's id, or 0 for anywhere.
    pub cgroup: u64,
    /// The user; 0 where `kind` is not [`kind::USER`].
    pub uid: u32,
    /// One of [`kind`].
    pub kind: u8,
    /// The slot.
    pub slot: u8,
    /// Always 0.
    pub zero: u16,
}

/// Kinds of principals.
pub mod kind {
    /// A user.
    pub const USER: u8 = 0;
    /// Kernel threads.
    pub const KERNEL: u8 = 1;
    /// Every user below a cgroup; looked up only under [`super::flag::ANYBODY`].
    pub const ANYBODY: u8 = 2;
}

/// What holds for a whole rule set.
#[repr(C)]
#[cfg_attr(not(target_arch = "bpf"), derive(FromBytes, IntoBytes, Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Generation {
    /// Counts rule sets; 0 is none.
    pub number: u64,
    /// Cookie of the network namespace that loopback endpoints belong to; 0 where the kernel cannot tell.
    pub netns: u64,
    /// The depths of the cgroups that principals name, each plus 1 in a byte of its own, the lowest bytes first.
    pub levels: u64,
    /// Bits of [`flag`].
    pub flags: u64,
    /// The first users that are admitted anywhere.
    pub few: Few,
}

/// Users that [`Few`] has room for.
pub const FEW_USERS: usize = 4;

/// Users at hand, so that a rule set that admits few of them needs no lookup.
#[repr(C)]
#[cfg_attr(not(target_arch = "bpf"), derive(FromBytes, IntoBytes, Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Few {
    /// The users, [`NO_UID`] where there are fewer.
    pub users: [u32; FEW_USERS],
    /// The targets that admit each of them.
    pub admitting: [Owners; FEW_USERS],
}

impl Few {
    /// The targets that admit a user, where it is one of the few.
    #[inline(always)]
    #[must_use]
    pub fn find(&self, user: u32) -> Option<Owners> {
        let mut each = self.users.iter().zip(&self.admitting);
        each.find(|(uid, _)| **uid == user).map(|(_, admitting)| *admitting)
    }
}

impl Default for Few {
    fn default() -> Self {
        Self {
            users: [NO_UID; FEW_USERS],
            admitting: [0; FEW_USERS],
        }
    }
}

/// Bits of [`Generation::flags`].
pub mod flag {
    /// Refuse nothing.
    pub const AUDIT: u64 = 1;
    /// Made active by a daemon that means to stay.
    pub const DAEMON: u64 = 4;
    /// The programs check the socket's owner too (D3): that of TCP sockets.
    pub const SOCKET_USER: u64 = 8;
    /// No user is admitted anywhere but those that the generation itself names.
    pub const FEW: u64 = 16;
    /// Some principals are cgroups without a user.
    pub const ANYBODY: u64 = 32;
    /// The rule set has NAT64 prefixes besides the well-known one.
    pub const NAT64: u64 = 64;
    /// Of sockets that are not TCP's they do not see the owner.
    pub const TCP_SOCKET_USER_ALONE: u64 = 128;
    /// They do not tell the kernel's threads from root's tasks.
    pub const NO_THREADS: u64 = 256;
}

/// Number of a helper that no kernel has: where the kernel has `bpf_rdonly_cast`, the loader makes each call of the one
/// a call of the other, which takes a pointer and the number of a type and does nothing but tell the verifier.
pub const CAST: u32 = 0x7ffe;

/// A target's name, padded with zeros. Aligned, so that it is copied by words.
#[repr(C, align(8))]
#[cfg_attr(not(target_arch = "bpf"), derive(FromBytes, IntoBytes, Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetName(pub [u8; MAX_TARGET_NAME]);

/// What a target did, a CPU.
#[repr(C)]
#[cfg_attr(not(target_arch = "bpf"), derive(FromBytes, IntoBytes, Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Attempts that the target admitted.
    pub allowed: u64,
    /// Attempts that it refused.
    pub denied: u64,
    /// Attempts that it would have refused, were it not for audit mode.
    pub would_deny: u64,
}

/// What all targets did, a CPU, by bit of [`Owners`]. One value, so that a program looks it up once.
pub type AllCounters = [Counters; MAX_TARGETS as usize];

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// Not an endpoint of any target (D1).
    Unjudged = 0,
    /// Every owner admits it (D2).
    Allow = 1,
    /// Some owner does not.
    Deny = 2,
    /// Some owner does not, in audit mode.
    WouldDeny = 3,
}

/// A denial as the ring buffer carries it.
#[repr(C)]
#[cfg_attr(not(target_arch = "bpf"), derive(FromBytes, IntoBytes, Immutable))]
#[derive(Clone, Copy, Debug)]
pub struct EventRecord {
    /// Nanoseconds since boot, suspend included (`CLOCK_BOOTTIME`).
    pub time: u64,
    /// Generation that denied.
    pub generation: u64,
    /// cgroup v2 id of the task.
    pub cgroup: u64,
    /// Cookie of the socket's network namespace.
    pub netns: u64,
    /// Name of the first of the targets that refused.
    pub target: TargetName,
    /// Address as given to the call, in the form that its family has.
    pub dialled: Address,
    /// Address as judged.
    pub judged: Address,
    /// Thread group id: what user space calls the process id.
    pub pid: u32,
    /// Thread id.
    pub tid: u32,
    /// Real UID of the task.
    pub task_uid: u32,
    /// Owner of the socket; [`NO_UID`] where the kernel cannot tell.
    pub socket_uid: u32,
    /// Name of the task.
    pub task: [u8; 16],
    /// Port in network byte order.
    pub port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// A [`Verdict`].
    pub verdict: u8,
    /// 4 or 6: the family of the call.
    pub family: u8,
    /// 1 for a kernel thread.
    pub kernel_thread: u8,
    /// Components in [`EventRecord::path`]; 0 where the kernel does not tell of the program's file.
    pub components: u8,
    /// 1 where the last of them lies in the root of its file system, so that the path is whole.
    pub rooted: u8,
    /// Bytes that each component has, as far as a byte tells: more than [`COMPONENT_BYTES`] is cut.
    pub lengths: [u8; MAX_COMPONENTS],
    /// The path of the task's program within its file system, the last component first; those beyond
    /// [`EventRecord::components`] mean nothing.
    pub path: [[u8; COMPONENT_BYTES]; MAX_COMPONENTS],
}

/// Whether a dial of a port, at an address that is no endpoint, is told (N8). The daemon opens a gate, and whoever
/// dials closes it: an attempt in a flood of them costs no more than a look at it.
pub mod gate {
    /// No target has a name with this port, or no daemon asks.
    pub const NONE: u8 = 0;
    /// The next dial is told.
    pub const OPEN: u8 = 1;
    /// One was told.
    pub const CLOSED: u8 = 2;
    /// One was told, and others came after it.
    pub const KNOCKED: u8 = 3;
}

/// A dial of a port of names, at an address that is no endpoint (N8).
#[repr(C)]
#[cfg_attr(not(target_arch = "bpf"), derive(FromBytes, IntoBytes, Immutable))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DialRecord {
    /// Canonical address.
    pub address: Address,
    /// Real UID of the task.
    pub task_uid: u32,
    /// Port in network byte order.
    pub port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Always 0.
    pub zero: u8,
}

/// The UID that no user has.
pub const NO_UID: u32 = u32::MAX;

const _: () = {
    assert!(size_of::<EndpointKey>() == 20);
    assert!(size_of::<PrefixKey>() == 24);
    assert!(size_of::<PrincipalKey>() == 16);
    assert!(size_of::<Generation>() == 80);
    assert!(size_of::<TargetName>() == 48);
    assert!(size_of::<Counters>() == 24);
    assert!(size_of::<AllCounters>() == 24 * MAX_TARGETS as usize);
    assert!(size_of::<EventRecord>() == 480);
    assert!(size_of::<DialRecord>() == 24);
};

const MAPPED: u32 = 0xffff_u32.to_be();

/// The canonical address of an IPv4 destination (D4, D5).
#[inline(always)]
#[must_use]
pub const fn canonical4(address: u32) -> Address {
    if address == 0 { [0; 4] } else { [0, 0, MAPPED, address] }
}

/// The canonical address of an IPv6 destination (D4, D5).
#[inline(always)]
#[must_use]
pub const fn canonical6(address: Address) -> Address {
    let [a, b, c, v4] = address;
    let unspecified = is_v4(address) && v4 == 0;
    [a, b, if unspecified { 0 } else { c }, v4]
}

/// Whether a canonical address is IPv4.
#[inline(always)]
#[must_use]
pub const fn is_v4(address: Address) -> bool {
    let [a, b, c, _] = address;
    a | b | (c ^ MAPPED) == 0
}

/// Whether a canonical address is the unspecified one.
#[inline(always)]
#[must_use]
pub const fn is_unspecified(address: Address) -> bool {
    let [a, b, c, d] = address;
    a | b | c | d == 0
}

/// Whether a canonical address is in 127.0.0.0/8 or is `::1`.
#[inline(always)]
#[must_use]
pub const fn is_loopback(address: Address) -> bool {
    const ONE: u32 = 1_u32.to_be();
    let [a, b, c, d] = address;
    is_v4(address) && u32::from_be(d) >> 24 == 127 || a | b | c | (d ^ ONE) == 0
}

impl TargetName {
    /// No target.
    pub const NONE: Self = Self([0; MAX_TARGET_NAME]);

    /// The name as text; empty where it is not UTF-8, which no loader writes.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(MAX_TARGET_NAME);
        self.0
            .get(..end)
            .and_then(|bytes| core::str::from_utf8(bytes).ok())
            .unwrap_or_default()
    }
}
