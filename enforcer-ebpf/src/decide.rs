//! The decision: a verdict from an attempt, lookups and a subject. Pure; the kernel runs it over maps, `check` over
//! the same maps from outside, the tests over tables of their own.

use core::borrow::Borrow;

use crate::{
    Address, Bucket, EndpointKey, Generation, MAX_CGROUP_LEVELS, MAX_NAT64, Nat64, Owners, PrincipalKey, Spot, Verdict,
    WELL_KNOWN_NAT64, canonical4, flag, is_loopback, is_unspecified, is_v4, kind, port, scope,
};

/// Where an attempt goes.
#[derive(Clone, Copy, Debug)]
pub struct Destination {
    /// [`crate::TCP`] or [`crate::UDP`].
    pub protocol: u8,
    /// Port in network byte order.
    pub port: u16,
    /// Canonical address (D4).
    pub address: Address,
}

/// The active rule set, lookup by lookup.
pub trait Tables {
    /// What each slot has on a port, as [`port::of`] takes it apart, to be read as often as it is asked for; never
    /// narrower than what the slot holds.
    fn port(&self, port: u16) -> impl Fn() -> u8;
    /// The active slot.
    fn active(&self) -> Option<u8>;
    /// What holds for all of a slot; a reference where it can be looked at without a copy.
    fn generation(&self, slot: u8) -> Option<impl Borrow<Generation>>;
    /// What a bucket of a slot holds.
    fn bucket(&self, slot: u8, bucket: u32) -> Option<impl Borrow<Bucket>>;
    /// Owners of an exact endpoint, those of prefixes and `local` that cover it included.
    fn exact(&self, key: &EndpointKey) -> Option<Owners>;
    /// Owners of the longest prefix, those of shorter ones that cover it included.
    fn prefix(&self, key: &EndpointKey) -> Option<Owners>;
    /// A NAT64 prefix of a slot besides the well-known one, all zeros for none; looked up only under [`flag::NAT64`].
    fn nat64(&self, slot: u8, number: u32) -> Nat64;
    /// Targets that admit a principal.
    fn principal(&self, key: &PrincipalKey) -> Option<Owners>;
}

/// Owner of a socket as far as the kernel can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketUser {
    /// `sk_uid`.
    Uid(u32),
    /// The kernel cannot tell for any socket: the task decides alone (D3).
    Unsupported,
    /// The kernel can tell, but did not for this one: nobody.
    Unreadable,
}

/// A task as it counts (D3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Its real UID, in the initial user namespace.
    User(u32),
    /// It is the kernel's own, with root's UID: one that has a user's makes that user's call.
    Kernel,
}

/// Who asks; each part is looked at only when it matters.
pub trait Subject {
    /// Cookie of the socket's network namespace.
    fn netns(&self) -> u64;
    /// The connecting task.
    fn task(&self) -> Task;
    /// Owner of the socket, in the initial user namespace.
    fn socket_user(&self) -> SocketUser;
    /// cgroup v2 id of the task's ancestor of this depth, 0 where there is none.
    fn cgroup(&self, level: u32) -> u64;
}

/// What an attempt comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Targets that own the endpoint; none where it is not judged.
    pub owners: Owners,
    /// Those of them that do not admit the subject.
    pub refused: Owners,
    /// Slot that decided.
    pub slot: u8,
    /// Generation that decided.
    pub generation: u64,
    /// Its bits of [`flag`].
    pub flags: u64,
    /// The address that the owners have as an endpoint.
    pub judged: Address,
    /// Whether the kernel itself asks, where that was looked at.
    pub kernel: bool,
    /// The port is one of a name's, and the address no endpoint (N8).
    pub missed: bool,
}

impl Decision {
    /// What becomes of the attempt.
    #[must_use]
    pub const fn verdict(&self) -> Verdict {
        match (self.owners, self.refused) {
            (0, _) => Verdict::Unjudged,
            (_, 0) => Verdict::Allow,
            _ if self.audit() != 0 => Verdict::WouldDeny,
            _ => Verdict::Deny,
        }
    }

    /// 1 where nothing is refused, else 0. A number, because the verifier follows each way of a branch through all that
    /// comes after it.
    #[inline(always)]
    #[must_use]
    pub const fn audit(&self) -> u8 {
        const { assert!(flag::AUDIT == 1) };
        (self.flags & flag::AUDIT) as u8
    }
}

const UNJUDGED: Decision = Decision {
    owners: 0,
    refused: 0,
    slot: 0,
    generation: 0,
    flags: 0,
    judged: [0; 4],
    kernel: false,
    missed: false,
};

/// Judges one attempt.
#[inline(always)]
pub fn decide<T: Tables, S: Subject>(tables: &T, subject: &S, destination: &Destination) -> Decision {
    let slots = tables.port(destination.port);
    if slots() == 0 {
        return UNJUDGED; // D1
    }
    // Read once: all that follows comes from one slot, so no attempt sees half of two generations (F2).
    let Some(slot) = tables.active() else { return UNJUDGED };
    // Read again: what was read before the slot may be from before the slot's bits were set.
    let listed = port::of(slots(), slot);
    let Some(generation) = tables.generation(slot) else {
        return UNJUDGED;
    };
    let generation = generation.borrow();
    if listed & port::LISTED == 0 {
        return UNJUDGED; // D1
    }
    let Some((owners, judged)) = owners(tables, subject, destination, slot, listed, generation) else {
        // D1
        return Decision {
            missed: listed & port::NAMED != 0,
            ..UNJUDGED
        };
    };
    let task = subject.task();
    let refused = owners & !admitted(tables, subject, task, owners, slot, generation); // D2
    Decision {
        owners,
        refused,
        slot,
        generation: generation.number,
        flags: generation.flags,
        judged,
        kernel: matches!(task, Task::Kernel),
        missed: false,
    }
}

/// The targets that own a destination: as the IPv4 address that a network makes of it (D4), and if that is no endpoint
/// as it is.
#[inline(always)]
fn owners<T: Tables, S: Subject>(
    tables: &T,
    subject: &S,
    destination: &Destination,
    slot: u8,
    listed: u8,
    generation: &Generation,
) -> Option<(Owners, Address)> {
    let translated = translated(tables, destination.address, slot, generation.flags);
    let there = Destination {
        address: translated.unwrap_or(destination.address),
        ..*destination
    };
    match owners_at(tables, subject, &there, slot, listed, generation) {
        Some(owners) => return Some((owners, there.address)),
        None if translated.is_none() => return None,
        None => {}
    }
    // Behind a NAT64 prefix there is neither an IPv4 address nor an unspecified or loopback one. Such attempts are
    // rare, so the buckets are skipped: checking them here would cost verifier time at every start.
    let key = EndpointKey {
        scope: slot | scope::V6,
        protocol: destination.protocol,
        port: destination.port,
        address: destination.address,
    };
    let owners = tables.exact(&key).or_else(|| covering(tables, &key, listed))?;
    Some((owners, destination.address))
}

/// The IPv4 address that a NAT64 makes of a canonical address.
#[inline(always)]
fn translated<T: Tables>(tables: &T, address: Address, slot: u8, flags: u64) -> Option<Address> {
    let [a, b, c, v4] = address;
    if is_v4(address) || v4 == 0 {
        return None;
    }
    let within = |prefix: Nat64| prefix == [a, b, c];
    let own = || (0..MAX_NAT64).any(|number| within(tables.nat64(slot, number)));
    let inside = within(WELL_KNOWN_NAT64) || flags & flag::NAT64 != 0 && a != 0 && own();
    inside.then(|| canonical4(v4))
}

/// The targets that own an address on a port.
#[inline(always)]
fn owners_at<T: Tables, S: Subject>(
    tables: &T,
    subject: &S,
    destination: &Destination,
    slot: u8,
    listed: u8,
    generation: &Generation,
) -> Option<Owners> {
    let Destination {
        protocol,
        port,
        address,
    } = *destination;
    let mut key = EndpointKey {
        scope: if is_v4(address) { slot } else { slot | scope::V6 },
        protocol,
        port,
        address,
    };
    // Those that mean this host mean that of a network namespace (D6).
    let foreign = || generation.netns != 0 && subject.netns() != generation.netns;
    if is_unspecified(address) {
        // It has an entry of its own for every port of the rule set (D5), which no bucket has.
        if foreign() {
            key.scope |= scope::FOREIGN; // D5
        }
        return tables.exact(&key);
    }
    // Each question is asked once: where the verifier knows an answer already, it holds all that the answer comes from
    // for exact, back to the address, and then follows each kind of address by itself.
    let spot = Spot::of(protocol, port, address);
    let bucket = tables.bucket(slot, spot.bucket)?;
    let bucket = bucket.borrow();
    if bucket.filter & spot.bit == 0 {
        if listed & port::WIDE == 0 || is_loopback(address) && foreign() {
            return None;
        }
        return tables.prefix(&key);
    }
    if is_loopback(address) && foreign() {
        return None; // D6
    }
    let known = if bucket.key.is(&key) { bucket.owners } else { 0 };
    if known != 0 {
        return Some(known);
    }
    tables.exact(&key).or_else(|| covering(tables, &key, listed))
}

/// The targets that own a prefix around an address on a port.
#[inline(always)]
fn covering<T: Tables>(tables: &T, key: &EndpointKey, listed: u8) -> Option<Owners> {
    if listed & port::WIDE == 0 {
        return None;
    }
    tables.prefix(key)
}

/// Eight passes, written out: kernels before 6.8 take a loop only where it closes by a jump, and the compiler closes
/// some by whatever instruction comes last (`check_cfg` in the verifier; `loops_close_by_jumps` looks for it).
#[macro_export]
macro_rules! eight_passes {
    ($number:ident => $pass:block) => {
        $crate::eight_passes!($number $pass 0 1 2 3 4 5 6 7)
    };
    ($number:ident $pass:block $($at:literal)+) => {
        $({
            let $number: u32 = $at;
            $pass
        })+
    };
}
const _: () = assert!(MAX_CGROUP_LEVELS == 8, "a pass for each level");

/// The targets that admit the subject: both its users, or the kernel thread it is (D3).
#[inline(always)]
fn admitted<T: Tables, S: Subject>(
    tables: &T,
    subject: &S,
    task: Task,
    owners: Owners,
    slot: u8,
    generation: &Generation,
) -> Owners {
    let owner = subject.socket_user();
    let Task::User(uid) = task else {
        // D3: a thread of the kernel's may carry a user's call, as RxRPC's do and io_uring's did before Linux 5.12.
        // Then the socket is the user's.
        if !matches!(owner, SocketUser::Uid(0) | SocketUser::Unsupported) {
            return 0;
        }
        let key = PrincipalKey {
            cgroup: 0,
            uid: 0,
            kind: kind::KERNEL,
            slot,
            zero: 0,
        };
        return tables.principal(&key).unwrap_or(0);
    };
    let mut task = PrincipalKey {
        cgroup: 0,
        uid,
        kind: kind::USER,
        slot,
        zero: 0,
    };
    let mut socket = task;
    match owner {
        SocketUser::Uid(uid) => socket.uid = uid,
        SocketUser::Unsupported => {}
        SocketUser::Unreadable => return 0,
    }
    let mut admits_task = admitted_anywhere(tables, &task, generation);
    let mut admits_socket = if task.uid == socket.uid {
        admits_task
    } else {
        admitted_anywhere(tables, &socket, generation)
    };
    if generation.levels == 0 || owners & !(admits_task & admits_socket) == 0 {
        return admits_task & admits_socket;
    }
    // Each pass costs the verifier, and so every start, dearly: few depths, and no short cut for equal users.
    'levels: {
        eight_passes! { number => {
            #[allow(clippy::cast_possible_truncation, reason = "one byte of eight")]
            let level = (generation.levels >> (8 * number)) as u32 & 0xff;
            if level == 0 {
                break 'levels;
            }
            // The connecting task's, for both users. A task that is less deep has 0 there, which no principal names.
            let cgroup = subject.cgroup(level - 1);
            if cgroup != 0 {
                task.cgroup = cgroup;
                socket.cgroup = cgroup;
                admits_task |= tables.principal(&task).unwrap_or(0);
                admits_socket |= tables.principal(&socket).unwrap_or(0);
            }
        }}
    }
    let both = admits_task & admits_socket;
    if generation.flags & flag::ANYBODY == 0 {
        return both;
    }
    // What admits anybody admits both users by itself. A loop of its own: within the one above it costs the verifier
    // far more.
    let mut within = 0;
    task.uid = 0;
    task.kind = kind::ANYBODY;
    'levels: {
        eight_passes! { number => {
            #[allow(clippy::cast_possible_truncation, reason = "one byte of eight")]
            let level = (generation.levels >> (8 * number)) as u32 & 0xff;
            if level == 0 {
                break 'levels;
            }
            // A task that is less deep has 0 there, which no principal names.
            task.cgroup = subject.cgroup(level - 1);
            within |= tables.principal(&task).unwrap_or(0);
        }}
    }
    both | within
}

/// The targets that admit a user whatever its cgroup.
#[inline(always)]
fn admitted_anywhere<T: Tables>(tables: &T, user: &PrincipalKey, generation: &Generation) -> Owners {
    match generation.few.find(user.uid) {
        Some(admitting) => admitting,
        None if generation.flags & flag::FEW != 0 => 0,
        None => tables.principal(user).unwrap_or(0),
    }
}
