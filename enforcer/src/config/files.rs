//! The files of a configuration: the one that is named, and `conf.d/*.toml` beside it, which add targets and nothing
//! else.

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::unistd::Uid;

use super::{Bosh, Config, ConfigError, ConfigFault, DEFAULT_PATH, MAX_BYTES, Mistake, Mistakes, read};

/// The directory of more targets, beside the configuration file.
const MORE: &str = "conf.d";

/// Reads the configuration file at `path` and what is beside it. No file at [`DEFAULT_PATH`] is as an empty one (B1).
pub(super) fn load(path: &Path) -> Result<Config, ConfigError> {
    load_from(path, path == Path::new(DEFAULT_PATH), &Bosh::default().dir)
}

/// As [`load`], of a file that may be missing, on a host whose BOSH agent has its settings in `agent`, if it has one.
pub(super) fn load_from(path: &Path, may_be_missing: bool, agent: &Path) -> Result<Config, ConfigError> {
    let mut room = MAX_BYTES;
    let main = match open(path).and_then(|file| content(file, &mut room)) {
        Ok(bytes) => bytes.ok_or_else(|| ConfigError::TooLong { path: path.into() })?,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound && may_be_missing => Vec::new(),
        Err(cause) => return Err(unreadable(path, cause)),
    };
    let more = targets_beside(path)?;
    let mut mistakes = Mistakes::default();
    let parsed = text(main, path).and_then(|text| read::config(&text, path));
    let mut config = parsed.unwrap_or_else(|found| {
        mistakes.append(found);
        Config::default()
    });
    // B1: what a package or a job brings takes no protection from a BOSH VM.
    if config.targets.is_empty() && agent.exists() {
        config.bosh.get_or_insert_default();
    }
    for file in more {
        let failed = |cause| ConfigError::Unreadable {
            path: file.clone(),
            cause,
        };
        let opened = open(&file).map_err(failed)?;
        ensure_trusted(&file, &opened.metadata().map_err(failed)?, path)?;
        let bytes = content(opened, &mut room).map_err(failed)?;
        let bytes = bytes.ok_or_else(|| ConfigError::TooLong { path: file.clone() })?;
        match text(bytes, &file).and_then(|text| read::targets(&text, &file, path)) {
            Ok(targets) => {
                for (name, target) in targets {
                    match config.targets.get(&name) {
                        Some(first) => mistakes.add(twice(&name, target.line, &file, (&first.path, first.line))),
                        None => drop(config.targets.insert(name, target)),
                    }
                }
            }
            Err(found) => mistakes.append(found),
        }
    }
    if !mistakes.is_empty() {
        // What could be read may be wrong, too.
        mistakes.append(config.mistakes());
        return Err(mistakes.into());
    }
    Ok(read::with_defaults(config))
}

/// The files besides the configuration file that are read, as far as they can be listed, and their directory.
#[must_use]
pub fn beside(path: &Path) -> Vec<PathBuf> {
    let dir = directory(path);
    let files = list(&dir).unwrap_or_default();
    Some(dir).into_iter().filter(|dir| dir.exists()).chain(files).collect()
}

/// Another value once a file of the configuration is made, written or removed.
pub(crate) fn modified(path: &Path) -> Vec<(PathBuf, Option<SystemTime>)> {
    let all = [path.to_path_buf()].into_iter().chain(beside(path));
    all.map(|path| {
        let time = path.metadata().and_then(|meta| meta.modified()).ok();
        (path, time)
    })
    .collect()
}

fn directory(path: &Path) -> PathBuf {
    path.with_file_name(MORE)
}

/// The files that add targets to those of `path`, in the order of their names.
fn targets_beside(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let dir = directory(path);
    let failed = |cause| ConfigError::Unreadable {
        path: dir.clone(),
        cause,
    };
    match fs::symlink_metadata(&dir) {
        Err(cause) if matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        found => ensure_trusted(&dir, &found.map_err(failed)?, path)?,
    }
    ensure_trusted(&dir, &fs::metadata(&dir).map_err(failed)?, path)?;
    list(&dir).map_err(failed)
}

/// By name; neither hidden files nor those that editors and package managers leave (`x.toml~`, `x.toml.dpkg-new`).
fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let bytes = name.as_encoded_bytes();
        if bytes.ends_with(b".toml") && !bytes.starts_with(b".") {
            files.push(dir.join(name));
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// F6: beside a file in a directory like `/tmp` anybody can make a `conf.d`.
fn ensure_trusted(path: &Path, meta: &Metadata, main: &Path) -> Result<(), ConfigError> {
    let uid = meta.uid();
    let owner = fs::metadata(main).map(|meta| meta.uid()).unwrap_or_default();
    let is_ours = [0, owner, Uid::effective().as_raw()].contains(&uid);
    // A link has every right, and none counts.
    if is_ours && (meta.is_symlink() || meta.mode() & 0o022 == 0) {
        return Ok(());
    }
    Err(ConfigError::Untrusted {
        path: path.into(),
        uid,
        mode: meta.mode() & 0o7777,
    })
}

/// Opens a file to be read, but nothing that would keep a reader waiting.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_fifo() || kind.is_socket() {
        return Err(io::Error::other("it is a pipe, not a file"));
    }
    Ok(file)
}

/// All of a file, if there is room for it.
fn content(file: File, room: &mut usize) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    file.take(*room as u64 + 1).read_to_end(&mut bytes)?;
    let left = room.checked_sub(bytes.len());
    Ok(left.map(|left| {
        *room = left;
        bytes
    }))
}

fn text(bytes: Vec<u8>, path: &Path) -> Result<String, Mistakes> {
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.as_bytes().iter().take(error.utf8_error().valid_up_to());
        read::alone(Mistake::Form {
            path: path.into(),
            line: 1 + valid.filter(|byte| **byte == b'\n').count(),
            keys: Vec::new(),
            fault: ConfigFault::NotUtf8,
        })
    })
}

fn twice(name: &str, line: usize, path: &Path, (first, at): (&Path, usize)) -> Mistake {
    Mistake::Form {
        path: path.into(),
        line,
        keys: vec!["target".to_owned(), name.to_owned()],
        fault: ConfigFault::TargetTwice {
            path: first.into(),
            line: at,
        },
    }
}

fn unreadable(path: &Path, cause: io::Error) -> ConfigError {
    let path = path.into();
    if cause.kind() == io::ErrorKind::NotFound {
        ConfigError::Missing { path }
    } else {
        ConfigError::Unreadable { path, cause }
    }
}

#[cfg(test)]
mod tests;
