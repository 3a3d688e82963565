//! Who is at the other end of the control socket, and in which cgroup.

use std::{
    fs, io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::{
        signal::kill,
        socket::{getsockopt, sockopt},
    },
    unistd::Pid,
};
use tokio::net::UnixStream;

use crate::{
    grants::Asker,
    host,
    policy::{CgroupPath, CgroupPathError},
};

/// A caller, as the kernel remembers it from its `connect` (unix(7), `SO_PEERCRED`).
#[derive(Debug)]
pub(crate) struct Peer {
    /// Its process in our PID namespace; 0 where that cannot see it.
    pub pid: u32,
    pub uid: u32,
    process: Process,
}

/// The process itself, not its number, which another may get later (unix(7), `SO_PEERPIDFD`).
#[derive(Debug)]
enum Process {
    Held(OwnedFd),
    /// It had ended before it could be held: Linux 6.5 to 6.15 fail then, later ones hand out what is left of it.
    Ended,
    /// The kernel remembers its number alone, before Linux 6.5.
    Number,
}

/// Why the cgroup of a process is not known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// A container's, seen from another one.
    #[error(
        "the calling process is not visible in the daemon's PID namespace; name the cgroup with --cgroup, as the host \
         has it"
    )]
    Invisible,
    /// `--pid` with numbers of another namespace.
    #[error(
        "the caller runs in a PID namespace of its own, where --pid {pid} means another process than here; name the \
         cgroup with --cgroup, as the host has it"
    )]
    Namespace { pid: u32 },
    /// It has ended.
    #[error("process {pid} does not exist; name a running process, or the cgroup with --cgroup")]
    Gone { pid: u32 },
    /// `/proc` shows others to root with `CAP_SYS_PTRACE` alone, or to a group (proc(5), `hidepid=`).
    #[error(
        "/proc hides process {pid} from the daemon (hidepid=); name the cgroup with --cgroup, or mount /proc with \
         gid=0 or without hidepid="
    )]
    Hidden { pid: u32 },
    /// It cannot be read.
    #[error("read /proc/{pid}/cgroup: {error}; name the cgroup with --cgroup")]
    Proc { pid: u32, error: io::Error },
    /// No line `0::`.
    #[error("process {pid} is in no cgroup v2; name one with --cgroup")]
    NoCgroup2 { pid: u32 },
    /// Not below the mount.
    #[error(
        "process {pid} is in cgroup {cgroup}, which is outside what is mounted here; run enforcer on the host, not in \
         a cgroup namespace"
    )]
    Outside { pid: u32, cgroup: String },
    /// A path that no rule can name.
    #[error("process {pid} is in cgroup {cgroup:?}: {error}")]
    Path {
        pid: u32,
        cgroup: String,
        error: CgroupPathError,
    },
}

impl Peer {
    /// Asks the kernel.
    pub(crate) fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        let process = Process::from(getsockopt(stream, sockopt::PeerPidfd));
        let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok());
        Ok(Self {
            pid: pid.unwrap_or(0),
            uid: credentials.uid(),
            process,
        })
    }

    /// Its name, which it chooses itself.
    #[must_use]
    pub(crate) fn comm(&self) -> String {
        host::task_name(self.pid)
    }

    /// As grants remember who asked.
    pub(crate) fn asker(&self) -> Asker {
        Asker {
            pid: self.pid,
            uid: self.uid,
            comm: self.comm(),
            parent: self.parent(),
            login_uid: self.login_uid(),
        }
    }

    /// The process that started it, by number and name, which that chooses itself: a command tells nothing of whoever
    /// runs it.
    fn parent(&self) -> Option<(u32, String)> {
        let status = host::read_lossy(format!("/proc/{}/status", self.pid)).ok()?;
        let parent = host::status_field(&status, "PPid")?.parse().ok()?;
        // None of this PID namespace's.
        (parent != 0).then(|| (parent, host::task_name(parent)))
    }

    /// The user who logged in and led to it; none where a service did (proc(5), `loginuid`).
    fn login_uid(&self) -> Option<u32> {
        let uid = host::read_lossy(format!("/proc/{}/loginuid", self.pid)).ok()?;
        uid.trim().parse().ok().filter(|uid| *uid != u32::MAX)
    }

    /// The cgroup that it is in now.
    pub(crate) fn cgroup(&self) -> Result<CgroupPath, CgroupError> {
        if self.pid == 0 {
            return Err(CgroupError::Invisible);
        }
        let cgroup = cgroup_of(self.pid)?;
        // Its number was still its own while it was looked at (B4).
        let is_its_own = match &self.process {
            Process::Held(process) => is_still(process, self.pid),
            Process::Ended => false,
            Process::Number => true,
        };
        if is_its_own {
            Ok(cgroup)
        } else {
            Err(CgroupError::Gone { pid: self.pid })
        }
    }

    /// The cgroup of a process to which it gave a number.
    pub(crate) fn cgroup_of(&self, pid: u32) -> Result<CgroupPath, CgroupError> {
        let status = host::read_lossy(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let numbers = host::status_field(&status, "NSpid");
        if status.is_empty() && lives(self.pid) {
            return Err(CgroupError::Hidden { pid: self.pid });
        }
        // One number: that of our own PID namespace, which is its own too (proc(5)).
        if numbers.is_none_or(|numbers| numbers.split_whitespace().count() != 1) {
            return Err(CgroupError::Namespace { pid });
        }
        let Some(before) = started(pid) else {
            // What would tell it from a later one of its number is not to be seen (B4).
            return Err(if lives(pid) {
                CgroupError::Hidden { pid }
            } else {
                CgroupError::Gone { pid }
            });
        };
        let cgroup = cgroup_of(pid)?;
        if started(pid) != Some(before) {
            return Err(CgroupError::Gone { pid });
        }
        Ok(cgroup)
    }
}

impl From<Result<OwnedFd, Errno>> for Process {
    fn from(asked: Result<OwnedFd, Errno>) -> Self {
        match asked {
            Ok(process) => Self::Held(process),
            Err(Errno::ENOPROTOOPT) => Self::Number,
            // ESRCH or EINVAL, by version; whatever else it is, nothing vouches for the number.
            Err(_) => Self::Ended,
        }
    }
}

/// Whether a process still has a number (`Pid:` in `/proc/self/fdinfo` of its descriptor, -1 once it has ended).
fn is_still(process: &OwnedFd, pid: u32) -> bool {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", process.as_raw_fd())).unwrap_or_default();
    let number = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    number.is_some_and(|number| number.trim().parse() == Ok(pid))
}

/// When a process was started, in ticks since boot (proc(5), stat field 22): tells it from a later one of the same
/// number.
fn started(pid: u32) -> Option<u64> {
    let stat = host::read_lossy(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// Whether there is a process of this number, whatever `/proc` shows.
fn lives(pid: u32) -> bool {
    let number = i32::try_from(pid).ok().filter(|number| *number > 0);
    number.is_some_and(|number| kill(Pid::from_raw(number), None) != Err(Errno::ESRCH))
}

fn cgroup_of(pid: u32) -> Result<CgroupPath, CgroupError> {
    let at = |error| CgroupError::Proc { pid, error };
    match fs::read(format!("/proc/{pid}/cgroup")) {
        Ok(text) => read(pid, &text, &host::cgroup2_root().map_err(at)?),
        // ESRCH: it ended between being opened and being read. EPERM: `hidepid=1`.
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) if !lives(pid) => Err(CgroupError::Gone { pid }),
            Some(libc::ENOENT | libc::ESRCH | libc::EPERM | libc::EACCES) => listed(pid),
            _ => Err(at(error)),
        },
    }
}

/// The cgroup that lists a process which `/proc` hides.
fn listed(pid: u32) -> Result<CgroupPath, CgroupError> {
    let mount = host::cgroup2_mount().map_err(|error| CgroupError::Proc { pid, error })?;
    let mount = mount.ok_or(CgroupError::NoCgroup2 { pid })?;
    let cgroup = host::hierarchy::listing(&mount, pid).ok_or(CgroupError::Hidden { pid })?;
    CgroupPath::parse(&cgroup).map_err(|error| CgroupError::Path { pid, cgroup, error })
}

/// The path, below a mount that shows the hierarchy from `shown` on, that `/proc/PID/cgroup` tells.
fn read(pid: u32, text: &[u8], shown: &Path) -> Result<CgroupPath, CgroupError> {
    let line = host::cgroup2_of(text).ok_or(CgroupError::NoCgroup2 { pid })?;
    let cgroup = String::from_utf8(line.to_vec()).map_err(|_| CgroupError::Path {
        pid,
        cgroup: String::from_utf8_lossy(line).into_owned(),
        error: CgroupPathError::Encoding,
    })?;
    if cgroup.ends_with(" (deleted)") {
        return Err(CgroupError::Gone { pid });
    }
    let outside = || CgroupError::Outside {
        pid,
        cgroup: cgroup.clone(),
    };
    if cgroup.split('/').any(|part| part == "..") {
        return Err(outside());
    }
    let below = Path::new(&cgroup).strip_prefix(shown).map_err(|_| outside())?;
    CgroupPath::parse(&format!("/{}", below.display())).map_err(|error| CgroupError::Path {
        pid,
        cgroup: cgroup.clone(),
        error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, shown: &str, expected: &str) {
        let found = read(7, text.as_bytes(), Path::new(shown));
        let said = found.map_or_else(|error| error.to_string(), |path| path.to_string());
        assert!(said.contains(expected), "{text:?} below {shown}: {said}");
    }

    #[test]
    fn the_line_of_version_2_counts_as_the_mount_shows_it() {
        check("0::/a/b\n", "/", "/a/b");
        check("12:memory:/v1\n1:name=systemd:/other\n0::/a\n", "/", "/a");
        check("0::/\n", "/", "/");
        check("12:memory:/v1\n", "/", "no cgroup v2");
        check("0::/box/a\n", "/box", "/a");
        check("0::/boxes/a\n", "/box", "outside");
        check("0::/../other\n", "/", "outside");
        check("0::/a (deleted)\n", "/", "does not exist");
        check("0::/a\u{1b}b\n", "/", "control");
    }

    #[test]
    fn only_a_kernel_that_cannot_tell_leaves_it_to_the_number() {
        assert!(matches!(Process::from(Err(Errno::ENOPROTOOPT)), Process::Number));
        for errno in [Errno::ESRCH, Errno::EINVAL, Errno::ENODATA, Errno::EMFILE] {
            assert!(matches!(Process::from(Err(errno)), Process::Ended), "{errno}");
        }
        let caller = |process| Peer {
            pid: std::process::id(),
            uid: 0,
            process,
        };
        assert!(matches!(
            caller(Process::Ended).cgroup(),
            Err(CgroupError::Gone { .. } | CgroupError::Proc { .. } | CgroupError::NoCgroup2 { .. })
        ));
    }

    #[test]
    fn this_process_is_told_by_its_start() {
        let pid = std::process::id();
        assert!(started(pid).is_some_and(|start| start > 0));
        assert_eq!(started(pid), started(pid));
        assert_eq!(started(u32::MAX), None);
        assert!(matches!(cgroup_of(u32::MAX), Err(CgroupError::Gone { .. })));
        assert!(lives(pid) && lives(1) && !lives(u32::MAX) && !lives(0));
    }
}
