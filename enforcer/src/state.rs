//! The last known addresses of each name, so that a restart protects them before any look-up (N7).

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{policy::Name, ruleset::Resolved};

const FILE: &str = "names.json";
const SCHEMA: &str = "enforcer/names/1";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    schema: String,
    names: BTreeMap<String, Vec<IpAddr>>,
}

/// Why the state cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file operation.
    #[error("{action} {}: {error}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Somebody else could have written it (F6).
    #[error("{} is owned by uid {uid} with mode {mode:04o}, so it is not trusted; remove it, or make it root's with mode 0700", path.display())]
    Untrusted {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// Not what we write.
    #[error("{} is damaged or of another version ({error}); remove it if this stays", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: serde_json::Error,
    },
}

/// Reads the addresses known last; none where there is no file.
pub fn load(dir: &Path) -> Result<Resolved, StateError> {
    let path = dir.join(FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Resolved::new()),
        Err(error) => {
            return Err(StateError::Io {
                action: "read",
                path,
                error,
            });
        }
    };
    trusted(dir)?;
    let saved: Saved = serde_json::from_slice(&text).map_err(|error| StateError::Malformed {
        path: path.clone(),
        error,
    })?;
    if saved.schema != SCHEMA {
        let error = serde::de::Error::custom(format_args!("schema {}", saved.schema));
        return Err(StateError::Malformed { path, error });
    }
    let named = saved
        .names
        .into_iter()
        .filter_map(|(name, addresses)| Some((Name::parse(&name).ok()?, addresses.into_iter().collect())));
    Ok(named.collect())
}

/// Keeps the addresses, whole or not at all: written aside, synced, renamed.
pub fn save(dir: &Path, resolved: &Resolved) -> Result<(), StateError> {
    if resolved.is_empty() && !dir.join(FILE).exists() {
        return Ok(());
    }
    let failed = |action, path: &Path| {
        let path = path.to_path_buf();
        move |error| StateError::Io { action, path, error }
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed("make", dir))?;
    trusted(dir)?;
    let names = resolved
        .iter()
        .map(|(name, addresses)| (name.to_string(), addresses.iter().copied().collect()))
        .collect();
    let path = dir.join(FILE);
    let aside = dir.join(format!("{FILE}.new"));
    let text = serde_json::to_vec_pretty(&Saved {
        schema: SCHEMA.to_owned(),
        names,
    })
    .map_err(|error| failed("write", &path)(error.into()))?;
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&aside)
        .map_err(failed("write", &aside))?;
    file.write_all(&text)
        .and_then(|()| file.sync_all())
        .map_err(failed("write", &aside))?;
    fs::rename(&aside, &path).map_err(failed("replace", &path))?;
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(failed("sync", dir))
}

fn trusted(dir: &Path) -> Result<(), StateError> {
    let meta = fs::metadata(dir).map_err(|error| StateError::Io {
        action: "look at",
        path: dir.into(),
        error,
    })?;
    if meta.uid() == 0 && meta.mode() & 0o022 == 0 {
        Ok(())
    } else {
        Err(StateError::Untrusted {
            path: dir.into(),
            uid: meta.uid(),
            mode: meta.mode() & 0o7777,
        })
    }
}
