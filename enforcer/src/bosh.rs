//! A BOSH agent's settings files → the endpoints of its message bus (B2). What a file holds is shown nowhere but for
//! scheme, host and port of a URL: the rest may be credentials.

mod fault;
mod file;
#[cfg(test)]
mod tests;
mod urls;
mod watch;

use std::{
    collections::BTreeSet,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

pub use self::{
    fault::{BoshError, BoshFault},
    watch::Watch,
};
use self::{file::Trust, urls::Named};
use crate::policy::Endpoint;

/// Most bytes of a settings file (F7).
pub const MAX_BYTES: usize = 8 << 20;

/// The user whose files are trusted.
const ROOT: u32 = 0;

/// Most message-bus URLs of a file (F7).
pub const MAX_URLS: usize = 256;

/// How long a file may be without its end before that is a fault: agents make it empty first, and then write it.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// How often such a file is looked at meanwhile.
pub const AGAIN: Duration = Duration::from_millis(50);

/// What an operator's update left for the agent.
const UPDATE: &str = "update_settings.json";
/// What the director gave the agent.
const SETTINGS: &str = "settings.json";

/// Where the files name message buses: agents of different ages dial different ones of these.
const PLACES: [(&str, &[&[&str]]); 2] = [
    (UPDATE, &[&["mbus", "urls"]]),
    (SETTINGS, &[&["env", "bosh", "mbus", "urls"], &["mbus"]]),
];

/// What the settings say now.
#[derive(Debug, Default)]
pub struct AgentSettings {
    /// The message bus by files that only root can write, where one of them names any.
    pub bus: Option<Bus>,
    /// The message bus by files of root's that a group can write too.
    pub doubtful: Option<Bus>,
    /// All that is wrong, or not there yet.
    pub faults: Vec<BoshError>,
}

/// A message bus.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bus {
    /// Where it answers; none where all URLs were skipped.
    pub endpoints: BTreeSet<Endpoint>,
    /// The files that name it.
    pub files: Vec<PathBuf>,
}

impl AgentSettings {
    /// The bus that follows one that was known. Settings with a fault add to that and take nothing away: what they do
    /// not name may be what is damaged (F4, F8). What a group can write counts only where nothing is known: it is
    /// better than nothing, and opens nothing.
    #[must_use]
    pub fn after(&self, known: Option<&BTreeSet<Endpoint>>) -> Option<Bus> {
        let more = match known {
            Some(_) if self.faults.is_empty() => return self.bus.clone(),
            Some(known) => Some(Bus {
                endpoints: known.clone(),
                files: Vec::new(),
            }),
            None => self.doubtful.clone(),
        };
        match (self.bus.clone(), more) {
            (Some(mut bus), Some(more)) => {
                bus.add(more);
                Some(bus)
            }
            (bus, more) => bus.or(more),
        }
    }

    /// Whether a file ends before its content does, as while it is being written.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        self.faults.iter().any(BoshError::is_unfinished)
    }

    /// What is wrong, in one line; none where nothing is.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        /// Most that are listed.
        const LISTED: usize = 4;
        let (listed, more) = self.faults.split_at(self.faults.len().min(LISTED));
        let mut texts: Vec<String> = listed.iter().map(ToString::to_string).collect();
        if !more.is_empty() {
            texts.push(format!("and {} more", more.len()));
        }
        (!texts.is_empty()).then(|| texts.join("; "))
    }

    /// Whether a file that is not there yet is all that is wrong.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        !self.faults.is_empty() && self.faults.iter().all(BoshError::is_missing)
    }

    /// Adds what a file says, of the two places the one that is there. One that cannot be read, or is not root's alone,
    /// hides no other.
    fn add(&mut self, owner: u32, dir: &Path, name: &str, keys: &[&[&'static str]]) {
        let (first, second) = places(dir, name);
        let mut found = false;
        for path in [first, second.clone()] {
            let (trust, bytes) = match file::read(owner, &path) {
                Ok(read) => read,
                Err(BoshFault::Missing) => continue,
                Err(fault) => {
                    found = true;
                    self.faults.push(BoshError { path, fault });
                    continue;
                }
            };
            found = true;
            let read = urls::read(&bytes, keys);
            match trust {
                Trust::Root => {
                    let whole = read.is_ok();
                    self.take(path, read);
                    if whole {
                        break;
                    }
                }
                Trust::Group(fault) => {
                    let (endpoints, file) = (read.ok().and_then(|named| named.endpoints), path.clone());
                    // What else is wrong in it is for those who can write it to choose.
                    self.faults.push(BoshError { path, fault });
                    join(&mut self.doubtful, endpoints, file);
                }
            }
        }
        if !found && name == SETTINGS {
            let fault = BoshFault::Missing;
            self.faults.push(BoshError { path: second, fault });
        }
    }

    fn take(&mut self, path: PathBuf, read: Result<Named, BoshFault>) {
        let (endpoints, faults) = match read {
            Ok(named) => (named.endpoints, named.faults),
            Err(fault) => (None, vec![fault]),
        };
        let faults = faults.into_iter().map(|fault| BoshError {
            path: path.clone(),
            fault,
        });
        self.faults.extend(faults);
        join(&mut self.bus, endpoints, path);
    }
}

impl Bus {
    fn add(&mut self, other: Self) {
        self.endpoints.extend(other.endpoints);
        self.files.extend(other.files);
    }
}

fn join(bus: &mut Option<Bus>, endpoints: Option<BTreeSet<Endpoint>>, file: PathBuf) {
    if let Some(endpoints) = endpoints {
        let files = vec![file];
        bus.get_or_insert_default().add(Bus { endpoints, files });
    }
}

/// Reads what is in `dir`, or in `settings` below it, which on some stemcells is a tmpfs and counts first.
#[must_use]
pub fn read(dir: &Path) -> AgentSettings {
    read_of(ROOT, dir)
}

/// As [`read`], but waits a moment for the end of a file that is being written.
#[must_use]
pub fn read_whole(dir: &Path) -> AgentSettings {
    let started = Instant::now();
    loop {
        let settings = read(dir);
        if !settings.is_unfinished() || started.elapsed() >= PATIENCE {
            return settings;
        }
        thread::sleep(AGAIN);
    }
}

/// As [`read`], from files of `owner`'s.
fn read_of(owner: u32, dir: &Path) -> AgentSettings {
    let mut settings = AgentSettings::default();
    for (name, keys) in PLACES {
        settings.add(owner, dir, name, keys);
    }
    if settings.faults.is_empty() && settings.bus.is_none() {
        // The one that was read.
        let (first, second) = places(dir, SETTINGS);
        let path = if first.symlink_metadata().is_ok() {
            first
        } else {
            second
        };
        let fault = BoshFault::NoUrl;
        settings.faults.push(BoshError { path, fault });
    }
    settings
}

/// The two places of a file, the one to prefer first.
fn places(dir: &Path, file: &str) -> (PathBuf, PathBuf) {
    (dir.join("settings").join(file), dir.join(file))
}

/// What changes when a settings file does, or when another takes its place.
fn fingerprint(dir: &Path) -> Vec<Option<[i128; 7]>> {
    let (update, main) = (places(dir, UPDATE), places(dir, SETTINGS));
    [update.0, update.1, main.0, main.1]
        .iter()
        .map(|path| {
            let meta = path.symlink_metadata().ok()?;
            let time = |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
            Some([
                meta.dev().into(),
                meta.ino().into(),
                meta.size().into(),
                meta.mode().into(),
                meta.uid().into(),
                time(meta.mtime(), meta.mtime_nsec()),
                time(meta.ctime(), meta.ctime_nsec()),
            ])
        })
        .collect()
}

/// The nearest directory that exists.
fn nearest(path: &Path) -> io::Result<&Path> {
    path.ancestors()
        .find(|ancestor| ancestor.is_dir())
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}
