//! Grants on disk: `grants.json` in the state directory, versioned and checksummed, replaced whole (F1, F4, F6).

use std::{
    fs::{self, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Asker, Grantee, Grants, Key, MAX_GRANTS, Term};
use crate::{
    host::own_dir,
    policy::{CgroupPath, Uid},
    state,
};

const FILE: &str = "grants.json";
const SCHEMA: &str = "enforcer/grants-file/1";
/// Room for the most grants with the longest paths, and an end (F7).
const MAX_BYTES: u64 = 16 << 20;

/// What is read first, of whatever version.
#[derive(Deserialize)]
struct Version {
    schema: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    schema: String,
    /// CRC-32 of `grants` as serialized without white space.
    crc32: u32,
    grants: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    target: String,
    user: Option<u32>,
    cgroup: Option<String>,
    since: String,
    expires: Option<String>,
    pid: u32,
    uid: u32,
    comm: String,
    /// Earlier versions did not know it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    own: bool,
}

/// Why grants cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A file operation.
    #[error("{action} {}: {error}{}", path.display(), state::remedy(error))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Somebody else could have written it (F6).
    #[error("{} is owned by uid {uid} with mode {mode:04o}, so no grant in it is trusted; make root its owner and \
             the only user who can write it (chown root, chmod go-w)", path.display())]
    Untrusted {
        /// The file or its directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// What another version wrote.
    #[error("{} is of another version ({schema:?}), so no grant in it can be used; start the version that wrote it, or \
        remove it and grant again", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says it is.
        schema: String,
    },
    /// Not what we write.
    #[error("{} is damaged ({what}), so no grant in it can be used; grant again, which replaces it, or \
        restore the file and restart the daemon", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// Reads what was granted; nothing where there is no file.
pub fn load(dir: &Path) -> Result<Grants, FileError> {
    let path = dir.join(FILE);
    let failed = |action| {
        let path = path.clone();
        move |error| FileError::Io { action, path, error }
    };
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(&path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Grants::default()),
        Err(error) => return Err(failed("read")(error)),
    };
    let meta = file.metadata().map_err(failed("look at"))?;
    trusted(&path, &meta, meta.is_file(), 0o077)?;
    directory(dir)?;
    let mut text = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(failed("read"))?;
    parse(&text).map_err(|fault| match fault {
        Fault::Version(schema) => FileError::Version {
            path: path.clone(),
            schema,
        },
        Fault::Damaged(what) => FileError::Damaged {
            path: path.clone(),
            what,
        },
    })
}

/// Whether there is a file, whatever is in it.
pub(crate) fn is_saved(dir: &Path) -> bool {
    let found = dir.join(FILE).symlink_metadata();
    !found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Keeps what was granted, whole or not at all: written aside, synced, renamed.
pub fn save(dir: &Path, grants: &Grants) -> Result<(), FileError> {
    let failed = |action, path: &Path| {
        let path = path.to_path_buf();
        move |error| FileError::Io { action, path, error }
    };
    own_dir::make_all(dir).map_err(failed("make", dir))?;
    directory(dir)?;
    let path = dir.join(FILE);
    let text = text(grants).map_err(|error| failed("write", &path)(error.into()))?;
    state::replace(dir, FILE, &text).map_err(|(action, path, error)| FileError::Io { action, path, error })
}

/// What is wrong with a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Version(String),
    Damaged(String),
}

pub(super) fn text(grants: &Grants) -> serde_json::Result<Vec<u8>> {
    let grants: Vec<Entry> = grants.iter().map(|(key, term)| Entry::of(key, term)).collect();
    let saved = Saved {
        schema: SCHEMA.to_owned(),
        crc32: checksum(&grants)?,
        grants,
    };
    serde_json::to_vec_pretty(&saved)
}

pub(super) fn parse(text: &[u8]) -> Result<Grants, Fault> {
    let damaged = |error: serde_json::Error| Fault::Damaged(error.to_string());
    if text.len() as u64 > MAX_BYTES {
        return Err(Fault::Damaged(format!("longer than {MAX_BYTES} bytes")));
    }
    let version: Version = serde_json::from_slice(text).map_err(damaged)?;
    if version.schema != SCHEMA {
        return Err(Fault::Version(version.schema));
    }
    let saved: Saved = serde_json::from_slice(text).map_err(damaged)?;
    if checksum(&saved.grants).map_err(damaged)? != saved.crc32 {
        return Err(Fault::Damaged("its checksum does not match".to_owned()));
    }
    let mut grants = Grants::default();
    for entry in saved.grants {
        let (key, term) = entry
            .read()
            .ok_or_else(|| Fault::Damaged("an entry is no grant".to_owned()))?;
        grants
            .grant(key, term)
            .map_err(|_| Fault::Damaged(format!("more than {MAX_GRANTS} grants")))?;
    }
    Ok(grants)
}

fn checksum(grants: &[Entry]) -> serde_json::Result<u32> {
    Ok(crc32fast::hash(&serde_json::to_vec(grants)?))
}

impl Entry {
    fn of(key: &Key, term: &Term) -> Self {
        Self {
            target: key.target.clone(),
            user: key.to.user().map(|uid| uid.0),
            cgroup: key.to.cgroup().map(ToString::to_string),
            since: term.since.to_string(),
            expires: term.expires.map(|end| end.to_string()),
            pid: term.by.pid,
            uid: term.by.uid,
            comm: term.by.comm.clone(),
            own: term.own,
        }
    }

    /// None if it is no grant: never more than was granted.
    fn read(self) -> Option<(Key, Term)> {
        let cgroup = self.cgroup.map(|path| CgroupPath::parse(&path)).transpose().ok()?;
        let to = match (self.user.map(Uid), cgroup) {
            (Some(uid), Some(cgroup)) => Grantee::UserWithin(uid, cgroup),
            (Some(uid), None) => Grantee::User(uid),
            (None, Some(cgroup)) if cgroup.as_str() != "/" => Grantee::Cgroup(cgroup),
            (None, Some(_) | None) => return None,
        };
        let expires = self.expires.map(|end| end.parse::<Timestamp>()).transpose().ok()?;
        let by = Asker {
            pid: self.pid,
            uid: self.uid,
            comm: self.comm,
            ..Asker::default()
        };
        let since = self.since.parse().ok()?;
        Some((
            Key {
                target: self.target,
                to,
            },
            Term {
                since,
                expires,
                by,
                own: self.own,
            },
        ))
    }
}

fn directory(dir: &Path) -> Result<(), FileError> {
    let meta = fs::metadata(dir).map_err(|error| FileError::Io {
        action: "look at",
        path: dir.into(),
        error,
    })?;
    trusted(dir, &meta, meta.is_dir(), 0o022)
}

/// F6: root's, of the kind it should be, and closed to others.
fn trusted(path: &Path, meta: &fs::Metadata, is_kind: bool, others: u32) -> Result<(), FileError> {
    if is_kind && meta.uid() == 0 && meta.mode() & others == 0 {
        return Ok(());
    }
    Err(FileError::Untrusted {
        path: path.into(),
        uid: meta.uid(),
        mode: meta.mode() & 0o7777,
    })
}
