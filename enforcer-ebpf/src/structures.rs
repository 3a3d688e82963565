//! What the kernel's structures say of who connects: the running task and its socket. Read by loads through cast
//! pointers where the kernel has casts, and else by helpers as far as these are to be had (D3).

use aya_ebpf::{
    Global,
    cty::c_void,
    helpers::generated::{
        bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_task,
        bpf_get_current_task_btf, bpf_get_current_uid_gid, bpf_probe_read_kernel, bpf_skc_to_tcp_sock,
    },
    programs::SockAddrContext,
};
use enforcer_ebpf::{
    CAST, EventRecord,
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
static TASK_TYPE: Global<u32> = Global::new(0);
/// Offset of `cred` in `struct task_struct`, where pointers can be cast.
#[unsafe(no_mangle)]
static TASK_CRED_OFFSET: Global<u32> = Global::new(0);
/// Offset of `uid` in `struct cred`, where pointers can be cast.
#[unsafe(no_mangle)]
static CRED_UID_OFFSET: Global<u32> = Global::new(0);
/// Offset of `pid` in `struct task_struct`; 0 where not all of what is named from here to [`NODE_ID_OFFSET`] is known.
#[unsafe(no_mangle)]
static TASK_PID_OFFSET: Global<u32> = Global::new(0);
/// Offset of `tgid` in `struct task_struct`.
#[unsafe(no_mangle)]
static TASK_TGID_OFFSET: Global<u32> = Global::new(0);
/// Offset of `comm` in `struct task_struct`.
#[unsafe(no_mangle)]
static TASK_NAME_OFFSET: Global<u32> = Global::new(0);
/// Offset of `cgroups` in `struct task_struct`.
#[unsafe(no_mangle)]
static TASK_CGROUPS_OFFSET: Global<u32> = Global::new(0);
/// Offset of `dfl_cgrp` in `struct css_set`: the task's place in the cgroup v2 hierarchy.
#[unsafe(no_mangle)]
static CGROUPS_DEFAULT_OFFSET: Global<u32> = Global::new(0);
/// Offset of `kn` in `struct cgroup`.
#[unsafe(no_mangle)]
static CGROUP_NODE_OFFSET: Global<u32> = Global::new(0);
/// Offset of `id` in `struct kernfs_node`.
#[unsafe(no_mangle)]
static NODE_ID_OFFSET: Global<u32> = Global::new(0);
/// 0 where the kernel has no `bpf_get_current_task_btf` (Linux 5.11, for this type of program 5.15), which lets a task
/// be read without a helper's call for each word.
#[unsafe(no_mangle)]
static TYPED_TASK: Global<u32> = Global::new(0);
/// 0 where `bpf_probe_read_kernel` is withheld (`lockdown=confidentiality`): the verifier then leaves out what calls
/// it, and the programs load.
#[unsafe(no_mangle)]
pub(crate) static READS_KERNEL: Global<u32> = Global::new(1);

/// The running task, which is there while it runs: what is known of it where pointers can be cast.
#[derive(Clone, Copy)]
pub(crate) struct Running {
    cast: Option<*const u8>,
}

impl Running {
    #[inline(always)]
    pub(crate) fn now() -> Self {
        // SAFETY: a helper without arguments.
        let task = || unsafe { bpf_get_current_task() } as *const c_void;
        Self {
            // Loaded twice, as in [`socket_user`].
            cast: (TASK_TYPE.load() != 0).then(|| cast(task(), TASK_TYPE.load())),
        }
    }

    /// As it counts.
    #[inline(always)]
    pub(crate) fn counts(self) -> Task {
        let (user, flags_at) = (self.user(), TASK_FLAGS_OFFSET.load());
        // D3: a kernel thread that has taken a user's credentials makes that user's call (`io_wq_switch_creds`, before
        // Linux 5.12).
        if user != 0 || flags_at == 0 {
            return Task::User(user);
        }
        let flags = if let Some(task) = self.typed() {
            // SAFETY: as above.
            Some(unsafe { member::<u32>(task, flags_at) })
        } else if READS_KERNEL.load() != 0 {
            // SAFETY: a helper without arguments.
            let task = unsafe { bpf_get_current_task() };
            read_kernel::<u32>((task + u64::from(flags_at)) as *const c_void)
        } else {
            return Task::User(user); // D3
        };
        match flags {
            Some(flags) if flags & PF_KTHREAD == 0 => Task::User(user),
            Some(_) | None => Task::Kernel,
        }
    }

    /// Its real UID: no other task changes its credentials, which are there as long as it has them.
    #[inline(always)]
    pub(crate) fn user(self) -> u32 {
        if let Some(task) = self.cast {
            // SAFETY: as above.
            return unsafe { member(member(task, TASK_CRED_OFFSET.load()), CRED_UID_OFFSET.load()) };
        }
        // Of a task that it trusts the verifier looks, for each pointer loaded from it, through all of the kernel's
        // types several times, which a start waits for.
        // SAFETY: a helper without arguments; the lower half is the real UID.
        #[allow(clippy::cast_possible_truncation, reason = "two 32-bit ids in one word")]
        unsafe {
            bpf_get_current_uid_gid() as u32
        }
    }

    /// A pointer to it, where its members can be read.
    #[inline(always)]
    pub(crate) fn typed(self) -> Option<*const u8> {
        if self.cast.is_some() {
            return self.cast;
        }
        // SAFETY: a helper without arguments.
        (TYPED_TASK.load() != 0).then(|| unsafe { bpf_get_current_task_btf() }.cast_const().cast())
    }

    /// Writes which task it is, and its cgroup.
    ///
    /// # Safety
    ///
    /// `record` is the memory of a record in the ring buffer.
    #[inline(always)]
    pub(crate) unsafe fn write(self, record: *mut EventRecord) {
        // SAFETY: as above.
        unsafe {
            (*record).task_uid = self.user();
            if let Some(task) = self.cast
                && TASK_PID_OFFSET.load() != 0
            {
                (*record).pid = member(task, TASK_TGID_OFFSET.load());
                (*record).tid = member(task, TASK_PID_OFFSET.load());
                let cgroup = member(member(task, TASK_CGROUPS_OFFSET.load()), CGROUPS_DEFAULT_OFFSET.load());
                (*record).cgroup = member(member(cgroup, CGROUP_NODE_OFFSET.load()), NODE_ID_OFFSET.load());
                // By words, as the verifier wants them; whatever changes it meanwhile leaves its last zero.
                let to = (&raw mut (*record).task).cast::<u64>();
                let from = task.add(TASK_NAME_OFFSET.load() as usize).cast::<u64>();
                to.write(from.read_volatile());
                to.add(1).write(from.add(1).read_volatile());
                return;
            }
            let pid_tgid = bpf_get_current_pid_tgid();
            #[allow(clippy::cast_possible_truncation, reason = "two 32-bit ids in one word")]
            let (pid, tid) = ((pid_tgid >> 32) as u32, pid_tgid as u32);
            (*record).pid = pid;
            (*record).tid = tid;
            (*record).cgroup = bpf_get_current_cgroup_id();
            bpf_get_current_comm((&raw mut (*record).task).cast(), 16);
        }
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
    let structure = SOCK_TYPE.load();
    if structure != 0 {
        // Of whatever protocol: each begins with a `struct sock`.
        let sock = cast(socket.cast(), structure);
        // The offset is loaded again: a number that a branch and an address come from is one that the verifier holds
        // for exact, and so tells states apart that are the same.
        // SAFETY: the socket is there during its call.
        return SocketUser::Uid(unsafe { member(sock, SK_UID_OFFSET.load()) });
    }
    // SAFETY: the helper takes a socket; its result is checked before use, and the offset is the kernel's own.
    let tcp = unsafe { bpf_skc_to_tcp_sock(socket.cast()) };
    if !tcp.is_null() {
        // SAFETY: as above; the verifier allows a load anywhere within the kernel's `struct tcp_sock`.
        return SocketUser::Uid(unsafe { member(tcp.cast::<u8>(), offset) });
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

/// A member of a structure, whose type the verifier knows.
///
/// # Safety
///
/// The structure is there, or a load from it gives zeros.
#[inline(always)]
pub(crate) unsafe fn member<T>(structure: *const u8, offset: u32) -> T {
    // SAFETY: as the caller says; the offset is the kernel's own.
    unsafe { structure.add(offset as usize).cast::<T>().read_volatile() }
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
