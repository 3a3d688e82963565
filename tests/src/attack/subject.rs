//! Who makes the attempt: tasks and sockets of one user, of two, and of users that are not what they seem.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd},
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use socket2::Socket;

use super::{
    Attempt, Who, check,
    dial::{make, timed},
};

/// The attempt, by a thread that has entered a cgroup by itself where one is named.
pub(super) fn on_thread(attempt: &Attempt) -> io::Result<Duration> {
    let Some(cgroup) = &attempt.thread_cgroup else {
        return once(attempt);
    };
    let thread = || {
        std::fs::write(cgroup.join("cgroup.threads"), nix::unistd::gettid().to_string())?;
        once(attempt)
    };
    std::thread::scope(|scope| scope.spawn(thread).join()).map_err(|_| io::Error::other("the thread panicked"))?
}

fn once(attempt: &Attempt) -> io::Result<Duration> {
    let user = attempt.uid;
    if attempt.as_is {
        let socket = make(attempt)?;
        return timed(attempt, &socket);
    }
    match attempt.who {
        Who::User => {
            become_user(user, user, 0)?;
            let socket = make(attempt)?;
            if let Some(cgroup) = &attempt.then_cgroup {
                become_user(user, 0, 0)?;
                enter(cgroup)?;
            }
            become_user(user, user, user)?;
            timed(attempt, &socket)
        }
        Who::SocketOfRoot => {
            let socket = make(attempt)?;
            become_user(user, user, user)?;
            timed(attempt, &socket)
        }
        Who::SocketForRoot => {
            become_user(0, user, 0)?;
            let socket = make(attempt)?;
            become_user(0, 0, 0)?;
            timed(attempt, &socket)
        }
        Who::Chowned => {
            let socket = make(attempt)?;
            // SAFETY: a plain call on our own descriptor.
            check(unsafe { libc::fchown(socket.as_raw_fd(), user, u32::MAX) })?;
            timed(attempt, &socket)
        }
        Who::EffectiveRoot => {
            become_user(user, 0, 0)?;
            let socket = make(attempt)?;
            timed(attempt, &socket)
        }
        Who::Handed => handed(attempt, 0, user),
        Who::HandedToRoot => handed(attempt, user, 0),
        Who::SavedRoot => {
            become_user(user, user, 0)?;
            let socket = make(attempt)?;
            timed(attempt, &socket)
        }
        Who::EffectiveUser => {
            become_user(0, user, 0)?;
            let socket = make(attempt)?;
            timed(attempt, &socket)
        }
        Who::FilesystemRoot => {
            become_user(user, user, 0)?;
            // SAFETY: changes this process's filesystem UID only; allowed, as the saved UID is root's.
            unsafe { libc::setfsuid(0) };
            let socket = make(attempt)?;
            timed(attempt, &socket)
        }
        Who::UserNamespace => {
            become_user(user, user, user)?;
            unshare(CloneFlags::CLONE_NEWUSER)?;
            std::fs::write("/proc/self/setgroups", "deny")?;
            std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
            become_user(0, 0, 0)?;
            let socket = make(attempt)?;
            timed(attempt, &socket)
        }
        Who::CgroupNamespace => {
            unshare(CloneFlags::CLONE_NEWCGROUP)?;
            become_user(user, user, user)?;
            let socket = make(attempt)?;
            timed(attempt, &socket)
        }
    }
}

/// A process of `maker` makes the socket, this one becomes `dialler` and receives it (man 7 unix, `SCM_RIGHTS`).
fn handed(attempt: &Attempt, maker: u32, dialler: u32) -> io::Result<Duration> {
    use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
    let (here, there) = std::os::unix::net::UnixStream::pair()?;
    // SAFETY: this process has one thread.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let made = become_user(maker, maker, maker).and_then(|()| make(attempt));
        let sent = made.and_then(|socket| {
            let fds = [socket.as_raw_fd()];
            let control = [ControlMessage::ScmRights(&fds)];
            let data = [io::IoSlice::new(b"s")];
            Ok(sendmsg::<UnixAddr>(
                there.as_raw_fd(),
                &data,
                &control,
                MsgFlags::empty(),
                None,
            )?)
        });
        let failed = sent.err().map(|error| error.raw_os_error().unwrap_or(libc::EIO));
        std::process::exit(failed.unwrap_or(0));
    }
    check(pid)?;
    drop(there);
    become_user(dialler, dialler, dialler)?;
    let mut byte = [0];
    let mut data = [io::IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(i32);
    let message = recvmsg::<UnixAddr>(here.as_raw_fd(), &mut data, Some(&mut space), MsgFlags::empty())?;
    let received = message.cmsgs()?.find_map(|control| {
        let ControlMessageOwned::ScmRights(fds) = control else {
            return None;
        };
        fds.first().copied()
    });
    let mut status = 0;
    // SAFETY: our own child.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    let fd = received.ok_or_else(|| io::Error::from_raw_os_error(libc::WEXITSTATUS(status)))?;
    // SAFETY: the kernel has just made it for us.
    timed(attempt, &unsafe { Socket::from_raw_fd(fd) })
}

pub(super) fn become_user(real: u32, effective: u32, saved: u32) -> io::Result<()> {
    // SAFETY: changes this process's credentials only.
    check(unsafe { libc::setresuid(real, effective, saved) })?;
    // A change of credentials makes /proc/self root's, where a user namespace's maps are written.
    // SAFETY: as above.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) })
}

pub(super) fn enter(cgroup: &std::path::Path) -> io::Result<()> {
    std::fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
}

/// Does `work` in a thread that has become another user, all others staying who they are.
pub fn as_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let thread = || {
        // SAFETY: the system call itself, unlike the C library's function, changes this thread's credentials only.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) };
        (changed == 0).then(work).ok_or_else(io::Error::last_os_error)
    };
    std::thread::scope(|scope| scope.spawn(thread).join()).map_err(|_| io::Error::other("the thread panicked"))?
}
