//! What the kernel's structures say of who connects: the running task and its socket. Read by loads through cast
//! pointers where the kernel has casts, and else by helpers as far as these are to be had (D3).

use aya_ebpf::{
    Global,
    cty::c_void,
    helpers::generated::{
        bpf_get_current_task, bpf_get_current_task_btf, bpf_get_current_uid_gid, bpf_probe_read_kernel,
        bpf_skc_to_tcp_sock,
    },
    programs::SockAddrContext,
};
use enforcer_ebpf::{
    CAST,
    decide::{SocketUser, Task},
};

/// `PF_KTHREAD` of linux/sched.h.
const PF_KTHREAD: u32 = 0x0020_0000;

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
pub(crate) static TASK_TYPE: Global<u32> = Global::new(0);
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
pub(crate) static READS_KERNEL: Global<u32> = Global::new(1);

/// The running task.
#[inline(always)]
pub(crate) fn task() -> Task {
    let cast = (TASK_TYPE.load() != 0).then(cast_task);
    let user = cast.map_or_else(told_user, user_of);
    let offset = TASK_FLAGS_OFFSET.load();
    // D3: a kernel thread that has taken a user's credentials makes that user's call (`io_wq_switch_creds`, before
    // Linux 5.12).
    if user != 0 || offset == 0 {
        return Task::User(user);
    }
    // SAFETY: the running task is there while it runs, and the verifier knows its type; the offset is the kernel's own.
    let read = |task: *const u8| unsafe { task.add(offset as usize).cast::<u32>().read_volatile() };
    let flags = if let Some(task) = cast {
        Some(read(task))
    } else if TYPED_TASK.load() != 0 {
        // SAFETY: a helper without arguments.
        Some(read(unsafe { bpf_get_current_task_btf() }.cast()))
    } else if READS_KERNEL.load() != 0 {
        // SAFETY: as above.
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

/// The owner of the socket.
#[inline(always)]
pub(crate) fn socket_user(context: &SockAddrContext) -> SocketUser {
    let offset = SK_UID_OFFSET.load();
    if offset == 0 {
        return SocketUser::Unsupported; // D3
    }
    // SAFETY: the context's socket is never null, and the verifier knows its type.
    let socket = unsafe { (&raw const (*context.sock_addr).__bindgen_anon_1.sk).read_volatile() };
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

/// The real UID of the task.
#[inline(always)]
pub(crate) fn current_user() -> u32 {
    let cast = (TASK_TYPE.load() != 0).then(cast_task);
    cast.map_or_else(told_user, user_of)
}

/// The same by a helper: for each pointer loaded from a task that it trusts, the verifier looks through all of the
/// kernel's types several times, which a start waits for.
#[inline(always)]
fn told_user() -> u32 {
    // SAFETY: a helper without arguments; the lower half is the real UID.
    #[allow(clippy::cast_possible_truncation, reason = "two 32-bit ids in one word")]
    unsafe {
        bpf_get_current_uid_gid() as u32
    }
}

/// The running task, to be read where [`TASK_TYPE`] is known.
#[inline(always)]
pub(crate) fn cast_task() -> *const u8 {
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
        let cast: unsafe extern "C" fn(*const c_void, u32) -> *const u8 = core::mem::transmute(CAST as usize);
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
