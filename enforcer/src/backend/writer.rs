//! One writer an instance (F11): whoever starts, applies or unloads holds a lock before it touches anything, whatever
//! the backend.
//!
//! The lock is on a file in the state directory, as that is what every instance has of its own, on every backend and in
//! every namespace; the pin directory is locked besides, for instances that share that alone. The kernel lets go of
//! both when the holder ends.

use std::{
    fmt,
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag, openat},
    sys::stat::{Mode, major, minor},
};
use procfs_core::{FromRead as _, LockType, Locks};
use tracing::warn;

use super::BackendError;
use crate::host::own_dir;

/// The file, in `state_dir`.
const FILE: &str = "lock";
/// How long another writer is waited for: `apply` takes a fraction of it.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);
/// Longest command line of a holder that is printed.
const LONGEST_COMMAND: usize = 200;

/// The right to write, for as long as it lives.
#[derive(Debug)]
pub(super) struct Writer(#[allow(dead_code, reason = "held for its drop")] Flock<File>);

/// Who has it.
#[derive(Debug)]
pub(crate) struct Holder {
    pid: i32,
    command: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}

impl Writer {
    /// Takes the lock of the instance with this state directory, waiting a few seconds for another holder. None where
    /// no lock can be had at all, as on a read-only disk at first boot: that is logged, and is no reason to protect
    /// nothing (F4).
    pub(super) fn of(state_dir: &Path, make: bool) -> Result<Option<Self>, BackendError> {
        match open(state_dir, make) {
            Ok(file) => Ok(Some(Self(lock(file, &state_dir.join(FILE), PATIENCE)?))),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !make => Ok(None),
            // Who is not root is refused by what follows, with what to do.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(None),
            Err(error) => {
                let path = state_dir.join(FILE);
                warn!(
                    "{}: {error}; nothing keeps another enforcer from writing at the same time",
                    path.display()
                );
                Ok(None)
            }
        }
    }
}

/// The daemon that has the right to write at a state directory, if one has.
pub(super) fn daemon(state_dir: &Path) -> Option<Holder> {
    let holder = holder_of(&open(state_dir, false).ok()?)?;
    holder.command.split(' ').any(|word| word == "run").then_some(holder)
}

/// A file that root alone can open, and so lock (F6).
fn open(state_dir: &Path, make: bool) -> io::Result<File> {
    if make {
        own_dir::make_all(state_dir)?;
    }
    let untrusted = |what, meta: &Metadata| {
        let (uid, mode) = (meta.uid(), meta.mode() & 0o7777);
        io::Error::other(format!(
            "{what} is owned by uid {uid} with mode {mode:04o}, so it is not trusted; make root its owner and the only \
             user who can write it (chown root, chmod go-w)"
        ))
    };
    // What is at the path may be another directory at each look; this one stays.
    let dir = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NONBLOCK)
        .open(state_dir)?;
    let meta = dir.metadata()?;
    if meta.uid() != 0 || meta.mode() & 0o022 != 0 {
        return Err(untrusted("the directory", &meta));
    }
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let create = if make { OFlag::O_CREAT } else { OFlag::empty() };
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let file = match openat(&dir, FILE, flags | OFlag::O_RDWR | create, mode) {
        Err(Errno::EROFS) => openat(&dir, FILE, flags | OFlag::O_RDONLY, mode),
        opened => opened,
    }?;
    let file = File::from(file);
    let meta = file.metadata()?;
    if !meta.is_file() || meta.uid() != 0 || meta.mode() & 0o077 != 0 {
        return Err(untrusted("it", &meta));
    }
    Ok(file)
}

/// Locks what is open, waiting for another holder.
pub(super) fn lock(mut file: File, path: &Path, patience: Duration) -> Result<Flock<File>, BackendError> {
    let deadline = Instant::now() + patience;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, nix::Error::EWOULDBLOCK)) if Instant::now() < deadline => {
                file = back;
                thread::sleep(PAUSE);
            }
            Err((back, nix::Error::EWOULDBLOCK)) => {
                return Err(BackendError::Busy {
                    path: path.into(),
                    holder: holder_of(&back),
                });
            }
            Err((_, error)) => {
                return Err(BackendError::Io {
                    action: "lock",
                    object: path.into(),
                    error: error.into(),
                });
            }
        }
    }
}

/// Who holds a lock on a file (man 5 `proc_locks`); none where that is a process that cannot be seen from here.
pub(super) fn holder_of(file: &File) -> Option<Holder> {
    let meta = file.metadata().ok()?;
    let device = (major(meta.dev()), minor(meta.dev()));
    let Locks(locks) = Locks::from_file("/proc/locks").ok()?;
    let held = locks.iter().find(|lock| {
        let on = (u64::from(lock.devmaj), u64::from(lock.devmin));
        matches!(lock.lock_type, LockType::FLock) && on == device && lock.inode == meta.ino()
    });
    let pid = held?.pid.filter(|pid| *pid > 0)?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = String::from_utf8_lossy(&command)
        .trim_end_matches('\0')
        .replace('\0', " ");
    Some(Holder {
        pid,
        command: words.chars().take(LONGEST_COMMAND).collect(),
    })
}
