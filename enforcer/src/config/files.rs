//! The files of a configuration: the one that is named, and `conf.d/*.toml` beside it, which add targets and nothing
//! else.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{
    Bosh, Config, ConfigError, ConfigFault, DEFAULT_PATH, FileFault, MAX_BYTES, Mistake, Mistakes, TargetSection, read,
    trust,
};

/// The directory of more targets, beside the configuration file.
pub(super) const MORE: &str = "conf.d";

/// Whether files count that another user could have written (F6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// They do not.
    Needed,
    /// They do: they are only to be checked, or shown.
    Ignored,
}

/// Reads the configuration file at `path` and what is beside it. No file at [`DEFAULT_PATH`] is as an empty one (B1).
pub(super) fn load(path: &Path, trust: Trust) -> Result<Config, ConfigError> {
    load_from(path, trust, path == Path::new(DEFAULT_PATH), &Bosh::default().dir)
}

/// As [`load`], of a file that may be missing, on a host whose BOSH agent has its settings in `agent`, if it has one.
pub(super) fn load_from(path: &Path, trust: Trust, may_be_missing: bool, agent: &Path) -> Result<Config, ConfigError> {
    let (main, beside) = read_from(path, trust, may_be_missing, agent)?;
    let (mut mistakes, config) = match main {
        Ok(config) => (Mistakes::default(), config),
        Err(found) => (found, Config::default()),
    };
    let (config, found) = add(config, beside);
    mistakes.append(found);
    if !mistakes.is_empty() {
        // What could be read may be wrong, too.
        mistakes.append(config.mistakes());
        return Err(mistakes.into());
    }
    Ok(read::with_defaults(config))
}

/// As [`load`], without the files beside the configuration file that have a mistake of their own (F8). None where that
/// leaves no target of those that are written.
pub(super) fn load_what_is_right(path: &Path) -> Result<Option<Config>, ConfigError> {
    let may_be_missing = path == Path::new(DEFAULT_PATH);
    let (main, beside) = read_from(path, Trust::Needed, may_be_missing, &Bosh::default().dir)?;
    let mut config = main?;
    for (_, targets) in beside {
        let Ok(targets) = targets else { continue };
        let alone = Config {
            targets,
            ..Config::default()
        };
        let is_new = alone.targets.keys().all(|name| !config.targets.contains_key(name));
        if is_new && alone.mistakes().is_empty() {
            config.targets.extend(alone.targets);
        }
    }
    // B1: the built-in ones are not what was written.
    let is_meant = !config.targets.is_empty() || config.bosh.is_some();
    Ok(is_meant.then_some(config))
}

type Targets = BTreeMap<String, TargetSection>;
/// What a file adds, in the order of their names.
type Beside = Vec<(PathBuf, Result<Targets, Mistakes>)>;

/// The configuration file, and what is beside it.
fn read_from(
    path: &Path,
    trust: Trust,
    may_be_missing: bool,
    agent: &Path,
) -> Result<(Result<Config, Mistakes>, Beside), ConfigError> {
    let mut room = MAX_BYTES;
    ensure(trust, path)?;
    let bytes = match open(path).and_then(|file| content(file, &mut room)) {
        Ok(bytes) => bytes.ok_or_else(|| FileFault::TooLong { path: path.into() })?,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound && may_be_missing => Vec::new(),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            return Err(ConfigError::Missing { path: path.into() });
        }
        Err(cause) => return Err(unreadable(path)(cause).into()),
    };
    let mut config = text(bytes, path).and_then(|text| read::config(&text, path));
    // B1: what a package or a job brings takes no protection from a BOSH VM.
    if let Ok(config) = &mut config
        && config.targets.is_empty()
        && agent.exists()
    {
        config.bosh.get_or_insert_default();
    }
    let beside = match list_beside(path, trust) {
        Ok(files) => files,
        Err(fault) => return Ok((config, vec![(directory(path), Err(Mistakes::of(fault)))])),
    };
    let read = |file: PathBuf| {
        let targets = targets_of(&file, path, trust, &mut room);
        (file, targets)
    };
    Ok((config, beside.into_iter().map(read).collect()))
}

/// Adds targets; those that an earlier file has are mistakes.
fn add(mut config: Config, beside: Beside) -> (Config, Mistakes) {
    let mut mistakes = Mistakes::default();
    for (file, targets) in beside {
        let targets = targets.unwrap_or_else(|found| {
            mistakes.append(found);
            Targets::default()
        });
        for (name, target) in targets {
            match config.targets.get(&name) {
                Some(first) => mistakes.add(twice(&name, target.line, &file, (&first.path, first.line))),
                None => drop(config.targets.insert(name, target)),
            }
        }
    }
    (config, mistakes)
}

/// The targets that a file adds to those of `main`.
fn targets_of(file: &Path, main: &Path, trust: Trust, room: &mut usize) -> Result<Targets, Mistakes> {
    let mut read = || {
        ensure(trust, file)?;
        let opened = open(file).map_err(unreadable(file))?;
        let bytes = content(opened, room).map_err(unreadable(file))?;
        bytes.ok_or_else(|| FileFault::TooLong { path: file.into() })
    };
    let bytes = read().map_err(Mistakes::of)?;
    text(bytes, file).and_then(|text| read::targets(&text, file, main))
}

/// The files besides the configuration file that are read, as far as they can be listed, and their directory.
#[must_use]
pub fn beside(path: &Path) -> Vec<PathBuf> {
    let dir = directory(path);
    let files = list(&dir).unwrap_or_default();
    Some(dir).into_iter().filter(|dir| dir.exists()).chain(files).collect()
}

/// What else lies beside them, but for hidden files: whoever put it there may think that it is read.
pub(crate) fn unread_beside(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory(path)).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name());
    let unread = names.filter(|name| !name.as_encoded_bytes().starts_with(b".") && !is_read(name));
    let mut unread: Vec<PathBuf> = unread.map(|name| directory(path).join(name)).collect();
    unread.sort_unstable();
    unread
}

/// Neither hidden files nor those that editors and package managers leave (`x.toml~`, `x.toml.dpkg-new`).
fn is_read(name: &OsStr) -> bool {
    let bytes = name.as_encoded_bytes();
    bytes.ends_with(b".toml") && !bytes.starts_with(b".")
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
fn list_beside(path: &Path, trust: Trust) -> Result<Vec<PathBuf>, FileFault> {
    let dir = directory(path);
    let is_missing = |cause: &io::Error| matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    match fs::symlink_metadata(&dir) {
        Err(cause) if is_missing(&cause) => return Ok(Vec::new()),
        Err(cause) => return Err(unreadable(&dir)(cause)),
        Ok(_) => {}
    }
    ensure(trust, &dir)?;
    let meta = fs::metadata(&dir).map_err(unreadable(&dir))?;
    // What may be added to it is read, whoever's it is: here the sticky bit is of no help.
    if trust == Trust::Needed && meta.mode() & 0o022 != 0 {
        return Err(FileFault::Untrusted {
            path: dir,
            uid: meta.uid(),
            mode: meta.mode() & 0o7777,
        });
    }
    list(&dir).map_err(unreadable(&dir))
}

/// By name.
fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if is_read(&name) {
            files.push(dir.join(name));
        }
    }
    files.sort_unstable();
    Ok(files)
}

fn ensure(trust: Trust, path: &Path) -> Result<(), FileFault> {
    match trust {
        Trust::Needed => trust::ensure(path),
        Trust::Ignored => Ok(()),
    }
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
        Mistakes::of(Mistake::Form {
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

fn unreadable(path: &Path) -> impl Fn(io::Error) -> FileFault {
    |cause| FileFault::Unreadable {
        path: path.into(),
        cause,
    }
}

#[cfg(test)]
mod tests;
