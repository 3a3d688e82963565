//! The hooks: a socket call's context becomes an attempt, the attempt a decision, a denial an event.

#![no_std]
#![no_main]
#![allow(
    unsafe_code,
    reason = "contexts, helpers and kernel pointers are raw by nature; the verifier checks each access"
)]
#![allow(missing_docs, reason = "a program has no API")]

mod path;

use core::{borrow::Borrow, mem::offset_of};

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::bpf_sock_addr,
    cty::c_void,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid,
        bpf_get_current_task, bpf_get_current_task_btf, bpf_get_current_uid_gid, bpf_get_netns_cookie,
        bpf_ktime_get_boot_ns, bpf_probe_read_kernel, bpf_skc_to_tcp_sock,
    },
    macros::{cgroup_sock_addr, map},
    maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf, lpm_trie},
    programs::SockAddrContext,
};
use aya_log_ebpf::trace;
use enforcer_ebpf::{
    Address, AllCounters, BUCKETS as SLOT_BUCKETS, Bucket, Counters, DIAL_BYTES, DialRecord, EVENT_BYTES, EndpointKey,
    EventRecord, Generation, KEY_BITS, MAX_NAT64, MAX_TARGETS, NO_UID, Nat64, Owners, PrefixKey, PrincipalKey, TCP,
    TargetName, UDP, Verdict, canonical4, canonical6,
    decide::{self, Decision, Destination, SocketUser, Subject, Tables, Task},
    entries, gate,
};

const _: () = assert!(size_of::<lpm_trie::Key<EndpointKey>>() == size_of::<PrefixKey>());

/// `IPPROTO_MPTCP`, of which some kernels show the low byte only, which is TCP's number.
const MPTCP: u32 = 262;
/// `PF_KTHREAD` of linux/sched.h.
const PF_KTHREAD: u32 = 0x0020_0000;
const BPF_F_NO_PREALLOC: u32 = 1;
/// Of what the loader reads whole.
const BPF_F_MMAPABLE: u32 = 1 << 10;

/// Offset of `sk_uid` in `struct sock`, from the kernel's BTF; 0 where it has none.
#[unsafe(no_mangle)]
static SK_UID_OFFSET: Global<u32> = Global::new(0);
/// Offset of `flags` in `struct task_struct`, from the kernel's BTF; 0 where it has none.
#[unsafe(no_mangle)]
static TASK_FLAGS_OFFSET: Global<u32> = Global::new(0);
/// Number of `struct sock` in the kernel's BTF; 0 where pointers cannot be cast.
#[unsafe(no_mangle)]
static SOCK_TYPE: Global<u32> = Global::new(0);
/// The same of `struct task_struct`.
#[unsafe(no_mangle)]
static TASK_TYPE: Global<u32> = Global::new(0);
/// Offset of `cred` in `struct task_struct`, where pointers can be cast.
#[unsafe(no_mangle)]
static TASK_CRED_OFFSET: Global<u32> = Global::new(0);
/// Offset of `uid` in `struct cred`, where pointers can be cast.
#[unsafe(no_mangle)]
static CRED_UID_OFFSET: Global<u32> = Global::new(0);
/// 0 where the kernel has no `bpf_get_current_task_btf` (Linux 5.11, for this type of program 5.15), which lets a task
/// be read without a helper's call for each word.
#[unsafe(no_mangle)]
static TYPED_TASK: Global<u32> = Global::new(0);
/// 0 where `bpf_probe_read_kernel` is withheld (`lockdown=confidentiality`): the verifier then leaves out what calls
/// it, and the programs load.
#[unsafe(no_mangle)]
static READS_KERNEL: Global<u32> = Global::new(1);

/// 0: no rule set active; else its slot plus 1. One byte, so that it is read and written whole.
#[map(name = "active")]
static ACTIVE: Array<u8> = Array::pinned(entries::ACTIVE, 0);
#[map(name = "generations")]
static GENERATIONS: Array<Generation> = Array::pinned(entries::GENERATIONS, 0);
/// By port: what each slot has on it ([`enforcer_ebpf::port`]).
#[map(name = "ports")]
static PORTS: Array<u8> = Array::pinned(entries::PORTS, BPF_F_MMAPABLE);
/// Slot by slot, what its exact endpoints come to.
#[map(name = "buckets")]
static BUCKETS: Array<Bucket> = Array::pinned(entries::BUCKETS, BPF_F_MMAPABLE);
#[map(name = "endpoints")]
static ENDPOINTS: HashMap<EndpointKey, Owners> = HashMap::pinned(entries::ENDPOINTS, BPF_F_NO_PREALLOC);
#[map(name = "prefixes")]
static PREFIXES: LpmTrie<EndpointKey, Owners> = LpmTrie::pinned(entries::PREFIXES, BPF_F_NO_PREALLOC);
/// Slot by slot, NAT64 prefixes.
#[map(name = "nat64")]
static NAT64: Array<Nat64> = Array::pinned(entries::NAT64, BPF_F_MMAPABLE);
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
#[map(name = "gates")]
static GATES: Array<u8> = Array::pinned(entries::GATES, 0);
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
    match decision.verdict {
        Verdict::Unjudged => {
            if decision.missed {
                tell_dial(&destination);
            }
            return 1;
        }
        Verdict::Allow => {}
        Verdict::Deny | Verdict::WouldDeny => report(&attempt, family, dialled, &destination, &decision),
    }
    count(&decision);
    // Copies: what is logged is named by its place, and the decision would have to lie in memory for all.
    let (owners, refused) = (decision.owners, decision.refused);
    trace!(context, "owners {:x} refused {:x}", owners, refused);
    i32::from(!matches!(decision.verdict, Verdict::Deny))
}

/// Adds an attempt to the counters: of the first target that refuses it, which its event names too, or of all that
/// admit it.
#[inline(always)]
fn count(decision: &Decision) {
    let Some(all) = COUNTERS.get_ptr_mut(0) else { return };
    let counters = |target: u32| {
        // SAFETY: the verifier proved the pointer, and the index is below the number of targets; the element is this
        // CPU's own.
        unsafe { &mut *all.cast::<Counters>().add(target as usize) }
    };
    if decision.refused != 0 {
        let counters = counters(lowest(decision.refused));
        match decision.verdict {
            Verdict::WouldDeny => counters.would_deny += 1,
            Verdict::Unjudged | Verdict::Allow | Verdict::Deny => counters.denied += 1,
        }
        return;
    }
    let second = decision.owners & decision.owners.wrapping_sub(1);
    if second & second.wrapping_sub(1) == 0 {
        counters(lowest(decision.owners)).allowed += 1;
        if second != 0 {
            counters(lowest(second)).allowed += 1;
        }
        return;
    }
    // More than two, which is rare. Without a branch: the verifier follows each way through each pass.
    (0..MAX_TARGETS).for_each(|target| counters(target).allowed += decision.owners >> target & 1);
}

/// Number of the lowest bit.
#[inline(always)]
fn lowest(owners: Owners) -> u32 {
    let found = owners.trailing_zeros();
    // The compiler knows that this is below 64 and would leave the mask out; the verifier wants to see it.
    // SAFETY: a stack word of our own.
    unsafe { (&raw const found).read_volatile() & (MAX_TARGETS - 1) }
}

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
        let pid_tgid = bpf_get_current_pid_tgid();
        #[allow(clippy::cast_possible_truncation, reason = "two 32-bit ids in one word")]
        let (pid, tid) = ((pid_tgid >> 32) as u32, pid_tgid as u32);
        (*record).time = bpf_ktime_get_boot_ns();
        (*record).generation = decision.generation;
        (*record).cgroup = bpf_get_current_cgroup_id();
        (*record).netns = attempt.netns();
        // By words; what may overlap would be moved byte by byte.
        (&raw mut (*record).target).copy_from_nonoverlapping(target, 1);
        (*record).dialled = dialled;
        (*record).judged = decision.judged;
        (*record).pid = pid;
        (*record).tid = tid;
        (*record).task_uid = current_user();
        (*record).socket_uid = socket_uid;
        bpf_get_current_comm((&raw mut (*record).task).cast(), 16);
        (*record).port = destination.port;
        (*record).protocol = destination.protocol;
        (*record).verdict = decision.verdict as u8;
        (*record).family = family;
        (*record).kernel_thread = u8::from(decision.kernel);
        (*record).components = 0;
        (*record).rooted = 0;
        path::write(record);
    }
    entry.submit(0);
}

/// Tells of a dial at an address that is no endpoint, where the daemon asks for that (N8). Two that come at once may
/// both be told.
#[inline(always)]
fn tell_dial(destination: &Destination) {
    let Some(gate) = GATES.get_ptr_mut(u32::from(destination.port)) else {
        return;
    };
    // SAFETY: the verifier proved the pointer; volatile, because others write it at any time.
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
        task_uid: current_user(),
        port: destination.port,
        protocol: destination.protocol,
        zero: 0,
    });
    entry.submit(0);
}

/// The maps as the decision sees them.
struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn port(&self, port: u16) -> Option<impl Fn() -> u8> {
        let slots = PORTS.get_ptr(u32::from(port))?;
        // SAFETY: the verifier proved the pointer; volatile, because the loader writes it at any time.
        Some(move || unsafe { slots.read_volatile() })
    }

    #[inline(always)]
    fn active(&self) -> Option<u8> {
        ACTIVE.get_ptr(0).and_then(|active| {
            // SAFETY: the verifier proved the pointer; volatile, because the loader flips it at any time.
            match unsafe { active.read_volatile() } {
                1 => Some(0),
                2 => Some(1),
                _ => None,
            }
        })
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
        unsafe { ENDPOINTS.get(key) }.copied()
    }

    #[inline(always)]
    fn prefix(&self, key: &EndpointKey) -> Option<Owners> {
        PREFIXES.get(lpm_trie::Key::new(KEY_BITS + 128, *key)).copied()
    }

    #[inline(always)]
    fn nat64(&self, slot: u8, number: u32) -> Option<Nat64> {
        NAT64.get(u32::from(slot) * MAX_NAT64 + number).copied()
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
        let offset = TASK_FLAGS_OFFSET.load();
        if TASK_TYPE.load() != 0 {
            let task = cast_task();
            let user = user_of(task);
            // SAFETY: the running task is there while it runs; the offset is the kernel's own.
            let is_kernels = || unsafe { task.add(offset as usize).cast::<u32>().read_volatile() } & PF_KTHREAD != 0;
            return if user == 0 && offset != 0 && is_kernels() {
                Task::Kernel
            } else {
                Task::User(user)
            };
        }
        let user = current_user();
        // D3: a kernel thread that has taken a user's credentials makes that user's call (`io_wq_switch_creds`, before
        // Linux 5.12).
        if user != 0 || offset == 0 {
            return Task::User(user);
        }
        let flags = if TYPED_TASK.load() != 0 {
            // SAFETY: the running task is there while it runs, and the verifier knows its type.
            let task = unsafe { bpf_get_current_task_btf() }.cast::<u8>();
            // SAFETY: as above; the offset is the kernel's own.
            Some(unsafe { task.add(offset as usize).cast::<u32>().read_volatile() })
        } else if READS_KERNEL.load() != 0 {
            // SAFETY: a helper without arguments.
            let task = unsafe { bpf_get_current_task() };
            read_kernel::<u32>((task + u64::from(offset)) as *const c_void)
        } else {
            return Task::User(user); // D3
        };
        match flags {
            Some(flags) if flags & PF_KTHREAD == 0 => Task::User(user),
            Some(_) | None => Task::Kernel,
        }
    }

    #[inline(always)]
    fn socket_user(&self) -> SocketUser {
        let offset = SK_UID_OFFSET.load();
        if offset == 0 {
            return SocketUser::Unsupported; // D3
        }
        // SAFETY: the context's socket is never null, and the verifier knows its type.
        let socket = unsafe { (&raw const (*self.context.sock_addr).__bindgen_anon_1.sk).read_volatile() };
        if SOCK_TYPE.load() != 0 {
            // Of whatever protocol: each begins with a `struct sock`.
            let sock = cast(socket.cast(), SOCK_TYPE.load());
            // SAFETY: the socket is there during its call; the offset is the kernel's own.
            return SocketUser::Uid(unsafe { sock.add(offset as usize).cast::<u32>().read_volatile() });
        }
        // SAFETY: the helper takes a socket; its result is checked before use, and the offset is the kernel's own.
        let tcp = unsafe { bpf_skc_to_tcp_sock(socket.cast()) };
        if !tcp.is_null() {
            // SAFETY: as above; the verifier allows a load anywhere within the kernel's `struct tcp_sock`.
            return SocketUser::Uid(unsafe { tcp.cast::<u8>().add(offset as usize).cast::<u32>().read_volatile() });
        }
        if READS_KERNEL.load() == 0 {
            return SocketUser::Unsupported; // D3
        }
        // UDP, and MPTCP's own socket: no typed pointer is to be had for them. The verifier forbids arithmetic on the
        // socket but not reading the stack word that holds it, which gives the address as a number.
        let mut word: u64 = 0;
        // SAFETY: a stack word of our own.
        unsafe { (&raw mut word).write_volatile(socket as u64) };
        let Some(address) = read_kernel::<u64>((&raw const word).cast()) else {
            return SocketUser::Unreadable;
        };
        match read_kernel::<u32>((address + u64::from(offset)) as *const c_void) {
            Some(uid) => SocketUser::Uid(uid),
            None => SocketUser::Unreadable,
        }
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

/// The real UID of the task.
#[inline(always)]
fn current_user() -> u32 {
    if TASK_TYPE.load() != 0 {
        return user_of(cast_task());
    }
    // By a helper: for each pointer loaded from a task that it trusts, the verifier looks through all of the kernel's
    // types several times, which a start waits for.
    // SAFETY: a helper without arguments; the lower half is the real UID.
    #[allow(clippy::cast_possible_truncation, reason = "two 32-bit ids in one word")]
    unsafe {
        bpf_get_current_uid_gid() as u32
    }
}

/// The running task, to be read where [`TASK_TYPE`] is known.
#[inline(always)]
fn cast_task() -> *const u8 {
    // SAFETY: a helper without arguments.
    cast(unsafe { bpf_get_current_task() } as *const c_void, TASK_TYPE.load())
}

/// The real UID of the running task: no other changes its credentials, which are there as long as it has them.
#[inline(always)]
fn user_of(task: *const u8) -> u32 {
    // SAFETY: as above; the offsets are the kernel's own.
    unsafe {
        let credentials = task
            .add(TASK_CRED_OFFSET.load() as usize)
            .cast::<*const u8>()
            .read_volatile();
        credentials
            .add(CRED_UID_OFFSET.load() as usize)
            .cast::<u32>()
            .read_volatile()
    }
}

/// A pointer into the kernel's memory, which the verifier then takes for one to a structure of that number. Loads of
/// what is not mapped give zeros, as all typed loads do.
#[inline(always)]
fn cast(object: *const c_void, structure: u32) -> *const u8 {
    // SAFETY: a call to a number is how helpers are called; the loader has replaced this one where it is reached.
    unsafe {
        let cast: unsafe extern "C" fn(*const c_void, u32) -> *const u8 =
            core::mem::transmute(enforcer_ebpf::CAST as usize);
        cast(object, structure)
    }
}

/// A value of kernel memory, or nothing where it cannot be read.
#[inline(always)]
fn read_kernel<T: Default>(address: *const c_void) -> Option<T> {
    let mut value = T::default();
    #[allow(clippy::cast_possible_truncation, reason = "words of 4 and 8 bytes")]
    let size = size_of::<T>() as u32;
    // SAFETY: the helper checks the address and writes at most `size` bytes.
    let result = unsafe { bpf_probe_read_kernel((&raw mut value).cast(), size, address) };
    (result == 0).then_some(value)
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
