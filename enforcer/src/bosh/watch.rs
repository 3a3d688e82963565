//! Tells when a BOSH agent's settings may have changed: inotify on the nearest directories that exist, and the mount
//! table, as a tmpfs that is mounted over a directory is no event in it.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use futures_util::{FutureExt as _, StreamExt as _};
use inotify::{EventStream, Inotify, WatchDescriptor, WatchMask};
use tokio::io::{Interest, unix::AsyncFd};

use super::{fingerprint, nearest};

/// Bytes of events read at once; what they say is not looked at.
const BUFFER: usize = 4096;

/// Most events that are read at once: more than the kernel queues (`/proc/sys/fs/inotify/max_queued_events`).
const MOST: usize = 1 << 15;

/// How long nothing is heard after an event: anybody can make files in a directory like `/tmp`, as often as he likes
/// (F10).
const REST: Duration = Duration::from_millis(50);

/// Watches one directory of settings, whether it exists yet or not.
pub struct Watch {
    dir: PathBuf,
    events: Option<EventStream<[u8; BUFFER]>>,
    mounts: Option<AsyncFd<File>>,
    watched: BTreeMap<PathBuf, WatchDescriptor>,
    seen: Option<Vec<Option<[i128; 7]>>>,
    rest: Option<Instant>,
    due: Option<Instant>,
}

impl Watch {
    /// Watches; what cannot be watched only [`Watch::poll_changed`] tells, and the errors say why.
    #[must_use]
    pub fn start(dir: &Path) -> (Self, Vec<io::Error>) {
        let mut errors = Vec::new();
        let events = Inotify::init().and_then(|inotify| inotify.into_event_stream([0; BUFFER]));
        let events = events.map_err(|error| errors.push(error)).ok();
        let mounts = mounts().map_err(|error| errors.push(error)).ok();
        let watch = Self {
            dir: dir.into(),
            events,
            mounts,
            watched: BTreeMap::new(),
            seen: None,
            rest: None,
            due: None,
        };
        (watch, errors)
    }

    /// What is watched.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Asks to be looked at again so much later, whatever happens; or no more.
    pub fn look_again(&mut self, after: Option<Duration>) {
        self.due = after.map(|after| Instant::now() + after);
    }

    /// Waits until something happens there; then it is time to [`Watch::poll_changed`].
    pub async fn changed(&mut self) {
        let due = self.due;
        tokio::select! {
            () = self.told() => {}
            () = sleep_until(due) => self.due = None,
        }
    }

    async fn told(&mut self) {
        if self.rest.is_some() {
            sleep_until(self.rest).await;
            self.rest = None;
        }
        tokio::select! {
            is_open = heard(self.events.as_mut()) => if !is_open {
                self.events = None;
            },
            () = mounted(self.mounts.as_ref()) => {}
        }
        self.rest = Some(Instant::now() + REST);
    }

    /// Whether the files may be others than at the last look. Follows directories that have come or gone.
    pub fn poll_changed(&mut self) -> bool {
        // Before the look: what comes between the two is told.
        self.follow();
        let now = fingerprint(&self.dir);
        let changed = self.seen.as_ref() != Some(&now);
        self.seen = Some(now);
        changed
    }

    fn follow(&mut self) {
        let Some(events) = &self.events else { return };
        let mut watches = events.watches();
        let mask = WatchMask::CREATE
            | WatchMask::MODIFY
            | WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::DELETE
            | WatchMask::ATTRIB
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        let below = self.dir.join("settings");
        let mut now = BTreeMap::new();
        for dir in [nearest(&self.dir), nearest(&below)].into_iter().flatten() {
            // The same directory again gives the same descriptor (inotify_add_watch(2)).
            if let Ok(descriptor) = watches.add(dir, mask) {
                now.insert(dir.to_path_buf(), descriptor);
            }
        }
        for (_, gone) in std::mem::replace(&mut self.watched, now) {
            if !self.watched.values().any(|kept| *kept == gone) {
                // One whose directory was removed is gone already.
                let _ = watches.remove(gone);
            }
        }
    }
}

#[allow(
    deprecated,
    reason = "the successor is the same call, marked unsafe for owners that change their descriptor"
)]
/// The mount table of this process, which is ready with priority data when it changes (man 5 `proc_pid_mounts`).
fn mounts() -> io::Result<AsyncFd<File>> {
    AsyncFd::with_interest(File::open("/proc/self/mountinfo")?, Interest::PRIORITY)
}

/// Waits for events and takes all that there are. False where none can come any more.
async fn heard(events: Option<&mut EventStream<[u8; BUFFER]>>) -> bool {
    let Some(events) = events else {
        return std::future::pending().await;
    };
    let mut next = events.next().await;
    for _ in 0..MOST {
        match next {
            None => return false,
            Some(_) => match events.next().now_or_never() {
                Some(another) => next = another,
                None => return true,
            },
        }
    }
    true
}

/// Waits for a change of the mount table.
async fn mounted(mounts: Option<&AsyncFd<File>>) {
    let changed = match mounts {
        Some(mounts) => mounts.ready(Interest::PRIORITY).await,
        None => std::future::pending().await,
    };
    match changed {
        Ok(mut guard) => guard.clear_ready(),
        Err(_) => std::future::pending().await,
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
