//! The hooks: a socket call's context becomes an attempt, the attempt a decision, a denial an event.

#![no_std]
#![no_main]
#![allow(
    unsafe_code,
    reason = "contexts, helpers and kernel pointers are raw by nature; the verifier checks each access"
)]
#![allow(missing_docs, reason = "a program has no API")]

mod of_maps;
mod path;
mod structures;

use core::{
    borrow::Borrow,
    cell::UnsafeCell,
    mem::{MaybeUninit, offset_of},
};

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_ktime_get_boot_ns},
    macros::{cgroup_sock_addr, map},
    maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf, lpm_trie},
    programs::SockAddrContext,
};
use aya_log_ebpf::trace;
use enforcer_ebpf::{
    Address, AllCounters, BUCKETS as SLOT_BUCKETS, Bucket, Counters, DIAL_BYTES, DialRecord, EVENT_BYTES, EndpointKey,
    EventRecord, Generation, KEY_BITS, MAX_NAT64, MAX_TARGETS, NO_UID, Nat64, Owners, PrefixKey, PrincipalKey, SLOTS,
    TCP, TargetName, UDP, Verdict, canonical4, canonical6,
    decide::{self, Decision, Destination, SocketUser, Subject, Tables, Task},
    eight_passes, entries, gate,
};

use self::{of_maps::ArrayOfMaps, structures::Running};

const _: () = assert!(size_of::<lpm_trie::Key<EndpointKey>>() == size_of::<PrefixKey>());

/// `IPPROTO_MPTCP`, of which some kernels show the low byte only, which is TCP's number.
const MPTCP: u32 = 262;
const BPF_F_NO_PREALLOC: u32 = 1;
/// Of what the loader reads and writes as memory.
const BPF_F_MMAPABLE: u32 = 1 << 10;

/// 0: no rule set active; else its slot plus 1. One byte, so that it is read and written whole.
///
/// All that is `.bss.…` here is the only value of a pinned array of that name, which programs address without a lookup.
/// Named without mangling, or the compiler takes what no program writes for the zeros that it begins with.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.active")]
static ACTIVE: Shared<u8, { entries::ACTIVE as usize }> = Shared::ZERO;
/// This one and others are looked up, as the verifier holds a number that an address comes from for exact, and what it
/// comes from with it.
#[map(name = "generations")]
static GENERATIONS: Array<Generation> = Array::pinned(entries::GENERATIONS, BPF_F_MMAPABLE);
/// By port: what each slot has on it ([`enforcer_ebpf::port`]).
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.ports")]
static PORTS: Shared<u8, { entries::PORTS as usize }> = Shared::ZERO;
/// Slot by slot, what its exact endpoints come to.
#[map(name = "buckets")]
static BUCKETS: Array<Bucket> = Array::pinned(entries::BUCKETS, BPF_F_MMAPABLE);
#[map(name = "endpoints")]
static ENDPOINTS: HashMap<EndpointKey, Owners> = HashMap::pinned(entries::ENDPOINTS, BPF_F_NO_PREALLOC);
/// Of more than few endpoints, the map that they lie in.
#[map(name = "many")]
static MANY: ArrayOfMaps = ArrayOfMaps::pinned(entries::MANY);
#[map(name = "prefixes")]
static PREFIXES: LpmTrie<EndpointKey, Owners> = LpmTrie::pinned(entries::PREFIXES, BPF_F_NO_PREALLOC);
/// Slot by slot, NAT64 prefixes.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.nat64")]
static NAT64: Shared<Nat64, { entries::NAT64 as usize }> = Shared::ZERO;
#[map(name = "principals")]
static PRINCIPALS: HashMap<PrincipalKey, Owners> = HashMap::pinned(entries::PRINCIPALS, BPF_F_NO_PREALLOC);
/// Slot by slot, the names of its targets.
#[map(name = "targets")]
static TARGETS: Array<TargetName> = Array::pinned(entries::TARGETS, BPF_F_MMAPABLE);
#[map(name = "counters")]
static COUNTERS: PerCpuArray<AllCounters> = PerCpuArray::pinned(entries::COUNTERS, 0);
#[map(name = "events")]
static EVENTS: RingBuf = RingBuf::pinned(EVENT_BYTES, 0);
/// Denials that found the ring buffer full.
#[map(name = "lost")]
static LOST: PerCpuArray<u64> = PerCpuArray::pinned(entries::LOST, 0);
/// By port: one of [`gate`].
#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.gates")]
static GATES: Shared<u8, { entries::GATES as usize }> = Shared::ZERO;
#[map(name = "dials")]
static DIALS: RingBuf = RingBuf::pinned(DIAL_BYTES, 0);

#[cgroup_sock_addr(connect4)]
fn connect4(context: SockAddrContext) -> i32 {
    judge4(&context)
}

#[cgroup_sock_addr(connect6)]
fn connect6(context: SockAddrContext) -> i32 {
    judge6(&context)
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(context: SockAddrContext) -> i32 {
    judge4(&context)
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(context: SockAddrContext) -> i32 {
    judge6(&context)
}

#[inline(always)]
fn judge4(context: &SockAddrContext) -> i32 {
    let address = word(context, offset_of!(bpf_sock_addr, user_ip4));
    judge(context, 4, [address, 0, 0, 0], canonical4(address))
}

#[inline(always)]
fn judge6(context: &SockAddrContext) -> i32 {
    let address = [
        word(context, offset_of!(bpf_sock_addr, user_ip6)),
        word(context, offset_of!(bpf_sock_addr, user_ip6) + 4),
        word(context, offset_of!(bpf_sock_addr, user_ip6) + 8),
        word(context, offset_of!(bpf_sock_addr, user_ip6) + 12),
    ];
    judge(context, 6, address, canonical6(address))
}

/// A word of the context. The verifier wants each read as a load of its own, which only a volatile read promises.
#[inline(always)]
fn word(context: &SockAddrContext, offset: usize) -> u32 {
    // SAFETY: the kernel hands every program of this type a context, and the verifier checks offset and size.
    unsafe { context.sock_addr.byte_add(offset).cast::<u32>().read_volatile() }
}

/// 1 lets the call go on, 0 makes it fail with EPERM (D8).
#[inline(always)]
fn judge(context: &SockAddrContext, family: u8, dialled: Address, address: Address) -> i32 {
    #[allow(
        clippy::cast_possible_truncation,
        reason = "the kernel keeps the 16-bit port in a 32-bit field"
    )]
    let port = word(context, offset_of!(bpf_sock_addr, user_port)) as u16;
    let protocol = match word(context, offset_of!(bpf_sock_addr, protocol)) {
        6 | MPTCP => TCP,
        17 => UDP,
        _ => return 1, // D1
    };
    let destination = Destination {
        protocol,
        port,
        address,
    };
    let attempt = Attempt { context };
    let decision = decide::decide(&Maps, &attempt, &destination);
    if decision.owners == 0 {
        if decision.missed {
            tell_dial(&destination);
        }
        return 1;
    }
    // Copies: what is logged is named by its place, and the decision would have to lie in memory for all.
    let (owners, refused) = (decision.owners, decision.refused);
    trace!(context, "owners {:x} refused {:x}", owners, refused);
    if refused == 0 {
        count_allowed(owners);
        return 1;
    }
    count_refused(&decision);
    report(&attempt, family, dialled, &destination, &decision);
    i32::from(decision.audit())
}

/// The counters of a target, on this CPU.
#[inline(always)]
fn counters() -> Option<impl Fn(u32) -> *mut Counters> {
    let all = COUNTERS.get_ptr_mut(0)?;
    // SAFETY: the verifier proved the pointer, and a target is below their number.
    Some(move |target: u32| unsafe { all.cast::<Counters>().add(target as usize) })
}

/// Counts an attempt for the first target that refuses it, which its event names too.
#[inline(always)]
fn count_refused(decision: &Decision) {
    let Some(counters) = counters() else { return };
    let refusing = counters(lowest(decision.refused));
    // Without a branch: in audit mode the field after it.
    const { assert!(offset_of!(Counters, would_deny) == offset_of!(Counters, denied) + size_of::<u64>()) };
    // SAFETY: fields of a structure that is this CPU's own.
    unsafe { *(&raw mut (*refusing).denied).add(decision.audit().into()) += 1 };
}

/// Counts an attempt for all targets that own its endpoint.
#[inline(always)]
fn count_allowed(owners: Owners) {
    let Some(counters) = counters() else { return };
    // SAFETY: as above.
    let add = |target, attempts| unsafe { (*counters(target)).allowed += attempts };
    let second = owners & owners.wrapping_sub(1);
    if second & second.wrapping_sub(1) == 0 {
        add(lowest(owners), 1);
        if second != 0 {
            add(lowest(second), 1);
        }
        return;
    }
    const { assert!(MAX_TARGETS == 64, "a pass for each target") };
    // More than two, which is rare. Without a branch: the verifier follows each way through each pass.
    eight_passes! { octave => {
        eight_passes! { step => {
            let target = 8 * octave + step;
            add(target, owners >> target & 1);
        }}
    }}
}

/// Number of the lowest bit.
#[inline(always)]
fn lowest(owners: Owners) -> u32 {
    bounded::<MAX_TARGETS>(owners.trailing_zeros())
}

/// What is below a power of two anyway, which the compiler knows; the verifier wants to see it.
#[inline(always)]
fn bounded<const END: u32>(number: u32) -> u32 {
    const { assert!(END.is_power_of_two()) };
    // SAFETY: a stack word of our own.
    unsafe { (&raw const number).read_volatile() & (END - 1) }
}

const _: () = assert!(Verdict::WouldDeny as u8 == Verdict::Deny as u8 + 1);

/// Sends a denial to the ring buffer, or counts it as lost.
#[inline(always)]
fn report(attempt: &Attempt<'_>, family: u8, dialled: Address, destination: &Destination, decision: &Decision) {
    let name = u32::from(decision.slot) * MAX_TARGETS + lowest(decision.refused);
    let Some(target) = TARGETS.get(name) else { return };
    let Some(mut entry) = EVENTS.reserve::<EventRecord>(0) else {
        if let Some(lost) = LOST.get_ptr_mut(0) {
            // SAFETY: the verifier proved the pointer; the element is this CPU's own.
            unsafe { *lost += 1 };
        }
        return;
    };
    let socket_uid = match attempt.socket_user() {
        SocketUser::Uid(uid) => uid,
        SocketUser::Unsupported | SocketUser::Unreadable => NO_UID,
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the buffer's own memory, as large as a record, written field by field: a whole record is more than the
    // stack holds. What the path does not need stays as it was, which only root can read.
    unsafe {
        (*record).time = bpf_ktime_get_boot_ns();
        (*record).generation = decision.generation;
        (*record).netns = attempt.netns();
        // By words; what may overlap would be moved byte by byte.
        (&raw mut (*record).target).copy_from_nonoverlapping(target, 1);
        (*record).dialled = dialled;
        (*record).judged = decision.judged;
        (*record).socket_uid = socket_uid;
        (*record).port = destination.port;
        (*record).protocol = destination.protocol;
        (*record).verdict = Verdict::Deny as u8 + decision.audit();
        (*record).family = family;
        (*record).kernel_thread = u8::from(decision.kernel);
        (*record).components = 0;
        (*record).rooted = 0;
        let task = Running::now();
        task.write(record);
        path::write(record, task);
    }
    entry.submit(0);
}

/// Tells of a dial at an address that is no endpoint, where the daemon asks for that (N8). Two that come at once may
/// both be told.
#[inline(always)]
fn tell_dial(destination: &Destination) {
    let gate = GATES.at(destination.port.into());
    // SAFETY: volatile, because others write it at any time.
    match unsafe { gate.read_volatile() } {
        gate::OPEN => {}
        gate::CLOSED => {
            // SAFETY: as above.
            unsafe { gate.write_volatile(gate::KNOCKED) };
            return;
        }
        _ => return,
    }
    // Where there is no room it stays open.
    let Some(mut entry) = DIALS.reserve::<DialRecord>(0) else {
        return;
    };
    // SAFETY: as above.
    unsafe { gate.write_volatile(gate::CLOSED) };
    entry.write(DialRecord {
        address: destination.address,
        task_uid: Running::now().user(),
        port: destination.port,
        protocol: destination.protocol,
        zero: 0,
    });
    entry.submit(0);
}

/// What programs and the loader both read and write, element by element.
#[repr(transparent)]
struct Shared<T, const ELEMENTS: usize>(UnsafeCell<MaybeUninit<[T; ELEMENTS]>>);

// SAFETY: what two may write at once are single bytes; of all else the loader writes what no program reads (F2).
unsafe impl<T, const ELEMENTS: usize> Sync for Shared<T, ELEMENTS> {}

impl<T, const ELEMENTS: usize> Shared<T, ELEMENTS> {
    /// Zeros, which each of these types may be.
    const ZERO: Self = Self(UnsafeCell::new(MaybeUninit::zeroed()));

    /// Where an element is. The verifier proves that there are so many.
    #[inline(always)]
    const fn at(&self, element: u32) -> *mut T {
        // SAFETY: as above.
        unsafe { self.0.get().cast::<T>().add(element as usize) }
    }
}

/// The maps as the decision sees them.
struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn port(&self, port: u16) -> impl Fn() -> u8 {
        // SAFETY: volatile, because the loader writes it at any time.
        move || unsafe { PORTS.at(port.into()).read_volatile() }
    }

    #[inline(always)]
    fn active(&self) -> Option<u8> {
        // SAFETY: volatile, because the loader flips it at any time.
        let slot = unsafe { ACTIVE.at(0).read_volatile() }.wrapping_sub(1);
        (u32::from(slot) < SLOTS).then_some(slot)
    }

    #[inline(always)]
    fn generation(&self, slot: u8) -> Option<impl Borrow<Generation>> {
        GENERATIONS.get(u32::from(slot))
    }

    #[inline(always)]
    fn bucket(&self, slot: u8, bucket: u32) -> Option<impl Borrow<Bucket>> {
        BUCKETS.get(u32::from(slot) * SLOT_BUCKETS + bucket)
    }

    #[inline(always)]
    fn exact(&self, key: &EndpointKey) -> Option<Owners> {
        // SAFETY: elements of the slot in use are not removed before a grace period has passed.
        if let Some(owners) = unsafe { ENDPOINTS.get(key) } {
            return Some(*owners);
        }
        // SAFETY: as above; it is a map of such keys and values.
        unsafe { MANY.get(0)?.get(key) }.copied()
    }

    #[inline(always)]
    fn prefix(&self, key: &EndpointKey) -> Option<Owners> {
        PREFIXES.get(lpm_trie::Key::new(KEY_BITS + 128, *key)).copied()
    }

    #[inline(always)]
    fn nat64(&self, slot: u8, number: u32) -> Nat64 {
        // SAFETY: as above.
        unsafe { *NAT64.at(bounded::<SLOTS>(slot.into()) * MAX_NAT64 + number) }
    }

    #[inline(always)]
    fn principal(&self, key: &PrincipalKey) -> Option<Owners> {
        // SAFETY: as in `exact`.
        unsafe { PRINCIPALS.get(key) }.copied()
    }
}

/// The attempt's context as the decision sees it.
struct Attempt<'a> {
    context: &'a SockAddrContext,
}

impl Subject for Attempt<'_> {
    #[inline(always)]
    fn netns(&self) -> u64 {
        // SAFETY: the helper takes the context.
        unsafe { bpf_get_netns_cookie(self.context.as_ptr()) }
    }

    #[inline(always)]
    fn task(&self) -> Task {
        Running::now().counts()
    }

    #[inline(always)]
    fn socket_user(&self) -> SocketUser {
        structures::socket_user(self.context)
    }

    #[inline(always)]
    fn cgroup(&self, level: u32) -> u64 {
        // SAFETY: a helper without pointer arguments; it answers 0 for a level that the task does not reach.
        #[allow(clippy::cast_possible_wrap, reason = "levels are small")]
        unsafe {
            bpf_get_current_ancestor_cgroup_id(level as i32)
        }
    }
}

/// What the kernel checks before it lets a program use GPL-only helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
