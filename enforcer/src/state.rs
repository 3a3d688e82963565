//! The last known good rule set, on disk: with it a start enforces before configuration, settings or DNS are asked (F4,
//! N7).
//!
//! Whole or not at all: written aside, synced, renamed; a checksum over its content tells whatever a power cut left.

mod content;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

pub(crate) use self::content::{LastGood, LastGoodRef};
use crate::{config::Settings, host::own_dir};

/// The file, in `state_dir`.
pub(crate) const FILE: &str = "last-good.json";
const SCHEMA: &str = "enforcer/last-good/1";
/// Most bytes of it (F7): room for the most endpoints, and an end to what is none of ours.
const MAX_BYTES: u64 = 64 << 20;
/// The user whose files and directories are trusted (F6).
pub(crate) const ROOT: u32 = 0;

/// Why the state cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// A file operation.
    #[error("{action} {}: {error}{}", path.display(), remedy(error))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Somebody else could have written it (F6).
    #[error("{} is owned by uid {uid} with mode {mode:04o}, so it is not trusted; make root its owner and the only \
             user who can write it (chown root, chmod go-w)", path.display())]
    Untrusted {
        /// The file or directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// Another version's.
    #[error("{} is of another version ({schema}, not {SCHEMA}) and ignored; it is replaced once rules are active. If \
             this message persists, remove the file", path.display())]
    OtherVersion {
        /// The file.
        path: PathBuf,
        /// What it says it is.
        schema: String,
    },
    /// Not what we write.
    #[error("{} is damaged ({fault}) and ignored; it is replaced once rules are active. If this message persists, \
             remove the file", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
}

/// The file: content behind its checksum, byte for byte.
#[derive(Serialize, Deserialize)]
struct Envelope<C> {
    schema: String,
    crc32: Option<String>,
    content: Option<C>,
}

/// What tells one content from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    length: usize,
    crc: u32,
}

/// Content ready to be written.
#[derive(Debug)]
pub(crate) struct Record {
    text: Box<RawValue>,
    /// What tells it from others.
    pub mark: Mark,
}

impl Record {
    /// The content of a rule set that is active.
    pub(crate) fn new(good: &LastGoodRef<'_>) -> io::Result<Self> {
        let text = serde_json::value::to_raw_value(&content::Content::from(good))?;
        Ok(Self {
            mark: Mark::of(text.get()),
            text,
        })
    }
}

impl Mark {
    fn of(text: &str) -> Self {
        Self {
            length: text.len(),
            crc: crc32fast::hash(text.as_bytes()),
        }
    }
}

/// Reads the last known good rule set; none where there is none yet.
pub(crate) fn load(dir: &Path) -> Result<Option<(LastGood, Mark)>, StateError> {
    load_of(ROOT, dir)
}

/// How and where the last known good rules were enforced, and nothing more of them.
pub(crate) fn settings(dir: &Path) -> Result<Option<Settings>, StateError> {
    #[derive(Deserialize)]
    struct Alone {
        settings: Settings,
    }
    let path = dir.join(FILE);
    let Some(bytes) = read(ROOT, dir, &path)? else {
        return Ok(None);
    };
    let (content, _) = open(&bytes, &path)?;
    let alone: Result<Alone, _> = serde_json::from_str(content.get());
    alone
        .map(|alone| Some(alone.settings))
        .map_err(|error| damaged(&path, error.to_string()))
}

/// As [`load`], from a file of `owner`'s.
fn load_of(owner: u32, dir: &Path) -> Result<Option<(LastGood, Mark)>, StateError> {
    let path = dir.join(FILE);
    let Some(bytes) = read(owner, dir, &path)? else {
        return Ok(None);
    };
    parse(&bytes, &path).map(Some)
}

/// What to do about a disk that refuses.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "; free space there",
        Some(libc::EROFS) => "; mount it writable",
        Some(libc::ENOTDIR | libc::ENAMETOOLONG | libc::ELOOP) => "; set another state_dir",
        Some(_) | None => crate::host::remedy(error),
    }
}

/// Removes what another user has put where the directory belongs (F6).
pub(crate) fn reclaim(dir: &Path) -> Result<(), StateError> {
    own_dir::reclaim(dir).map_err(made(dir))
}

fn made(dir: &Path) -> impl Fn(io::Error) -> StateError {
    |error| StateError::Io {
        action: "make",
        path: dir.into(),
        error,
    }
}

/// Makes the directory, where it is missing.
pub(crate) fn make(dir: &Path) -> Result<(), StateError> {
    own_dir::make_all(dir).map_err(made(dir))
}

/// Whether [`save`] would find a place that it can use. Makes nothing.
pub(crate) fn check_usable(dir: &Path) -> Result<(), StateError> {
    own_dir::check(dir, true).map_err(made(dir))?;
    match own_dir::metadata(dir) {
        Ok(Some(meta)) => trusted(ROOT, dir, &meta),
        Ok(None) | Err(_) => Ok(()),
    }
}

/// Keeps a rule set, whole or not at all.
pub(crate) fn save(dir: &Path, record: &Record) -> Result<(), StateError> {
    make(dir)?;
    save_as(ROOT, dir, record)
}

/// As [`save`], into a directory of `owner`'s that is there.
fn save_as(owner: u32, dir: &Path, record: &Record) -> Result<(), StateError> {
    let envelope = Envelope {
        schema: SCHEMA.to_owned(),
        crc32: Some(format!("{:08x}", record.mark.crc)),
        content: Some(&record.text),
    };
    let text = serde_json::to_vec(&envelope).map_err(|error| StateError::Io {
        action: "write",
        path: dir.join(FILE),
        error: error.into(),
    })?;
    write(owner, dir, FILE, &text)
}

/// Replaces a file of the directory, if the directory is its owner's alone.
pub(crate) fn write(owner: u32, dir: &Path, name: &str, text: &[u8]) -> Result<(), StateError> {
    let meta = fs::metadata(dir).map_err(|error| StateError::Io {
        action: "look at",
        path: dir.into(),
        error,
    })?;
    trusted(owner, dir, &meta)?;
    replace(dir, name, text).map_err(|(action, path, error)| StateError::Io { action, path, error })
}

/// Gives a file of `dir` another text, whole or not at all, readable by its owner alone: written aside, synced,
/// renamed. An error says what was tried, on which path, and why not.
pub(crate) fn replace(dir: &Path, name: &str, text: &[u8]) -> Result<(), (&'static str, PathBuf, io::Error)> {
    let failed = |action, path: &Path| {
        let path = path.to_path_buf();
        move |error| (action, path, error)
    };
    let path = dir.join(name);
    let aside = dir.join(format!("{name}.new"));
    // Not whatever lies there under that name: what a killed process left, or a link.
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &aside)(error)),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&aside)
        .map_err(failed("write", &aside))?;
    file.write_all(text)
        .and_then(|()| file.sync_all())
        .map_err(failed("write", &aside))?;
    fs::rename(&aside, &path).map_err(failed("replace", &path))?;
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(failed("sync", dir))
}

/// The bytes of a file that only its owner can have written, and one more than the most; none where there is no file.
pub(crate) fn read(owner: u32, dir: &Path, path: &Path) -> Result<Option<Vec<u8>>, StateError> {
    let failed = |action| {
        move |error| StateError::Io {
            action,
            path: path.into(),
            error,
        }
    };
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read")(error)),
    };
    let meta = fs::metadata(dir).map_err(failed("look at the directory of"))?;
    trusted(owner, dir, &meta)?;
    let meta = file.metadata().map_err(failed("look at"))?;
    trusted(owner, path, &meta)?;
    let mut bytes = Vec::new();
    let read = if meta.is_file() {
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes)
    } else {
        Err(io::Error::other("not a regular file"))
    };
    read.map_err(failed("read"))?;
    Ok(Some(bytes))
}

fn damaged(path: &Path, fault: String) -> StateError {
    let path = path.into();
    StateError::Damaged { path, fault }
}

fn parse(bytes: &[u8], path: &Path) -> Result<(LastGood, Mark), StateError> {
    let (content, mark) = open(bytes, path)?;
    let content: content::Content =
        serde_json::from_str(content.get()).map_err(|error| damaged(path, error.to_string()))?;
    Ok((content.into(), mark))
}

/// What is in the envelope, if it is whole.
fn open<'a>(bytes: &'a [u8], path: &Path) -> Result<(&'a RawValue, Mark), StateError> {
    let damaged = |fault: String| damaged(path, fault);
    if bytes.len() as u64 > MAX_BYTES {
        return Err(damaged(format!("longer than {} MiB", MAX_BYTES >> 20)));
    }
    let envelope: Envelope<&RawValue> = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
    if envelope.schema != SCHEMA {
        // Printed only as far as it looks like one.
        let plain = |c: char| c.is_ascii_alphanumeric() || "/-".contains(c);
        return Err(StateError::OtherVersion {
            path: path.into(),
            schema: envelope.schema.chars().take(40).filter(|c| plain(*c)).collect(),
        });
    }
    let (Some(crc32), Some(content)) = (envelope.crc32, envelope.content) else {
        return Err(damaged("no checksum or no content".to_owned()));
    };
    let mark = Mark::of(content.get());
    if crc32 != format!("{:08x}", mark.crc) {
        return Err(damaged("the checksum does not match".to_owned()));
    }
    Ok((content, mark))
}

fn trusted(owner: u32, path: &Path, meta: &fs::Metadata) -> Result<(), StateError> {
    if meta.uid() == owner && meta.mode() & 0o022 == 0 {
        Ok(())
    } else {
        Err(StateError::Untrusted {
            path: path.into(),
            uid: meta.uid(),
            mode: meta.mode() & 0o7777,
        })
    }
}
