//! The files of a configuration: the one that is named, and `conf.d/*.toml` beside it, which add targets and nothing
//! else.

use std::{
    collections::BTreeMap,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::unistd::Uid;

use super::{
    Bosh, Config, ConfigError, ConfigFault, DEFAULT_PATH, FileFault, MAX_BYTES, Mistake, Mistakes, TargetSection, read,
};

/// Who may write whatever is read.
const ROOT: u32 = 0;

/// The directory of more targets, beside the configuration file.
pub(super) const MORE: &str = "conf.d";

/// Reads the configuration file at `path` and what is beside it. No file at [`DEFAULT_PATH`] is as an empty one (B1).
pub(super) fn load(path: &Path) -> Result<Config, ConfigError> {
    load_from(path, path == Path::new(DEFAULT_PATH), &Bosh::default().dir)
}

/// As [`load`], of a file that may be missing, on a host whose BOSH agent has its settings in `agent`, if it has one.
pub(super) fn load_from(path: &Path, may_be_missing: bool, agent: &Path) -> Result<Config, ConfigError> {
    let (main, beside) = read_from(path, may_be_missing, agent)?;
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

/// As [`load`], without the files beside the configuration file that have a mistake of their own (F8).
pub(super) fn load_what_is_right(path: &Path) -> Result<Config, ConfigError> {
    let may_be_missing = path == Path::new(DEFAULT_PATH);
    let (main, beside) = read_from(path, may_be_missing, &Bosh::default().dir)?;
    let right = beside.into_iter().filter(|(_, targets)| {
        let alone = |targets: &Targets| Config {
            targets: targets.clone(),
            ..Config::default()
        };
        targets
            .as_ref()
            .is_ok_and(|targets| alone(targets).mistakes().is_empty())
    });
    let (config, _) = add(main?, right.collect());
    Ok(read::with_defaults(config))
}

type Targets = BTreeMap<String, TargetSection>;
/// What a file adds, in the order of their names.
type Beside = Vec<(PathBuf, Result<Targets, Mistakes>)>;

/// The configuration file, and what is beside it.
fn read_from(
    path: &Path,
    may_be_missing: bool,
    agent: &Path,
) -> Result<(Result<Config, Mistakes>, Beside), ConfigError> {
    let mut room = MAX_BYTES;
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
    let beside = match list_beside(path) {
        Ok(files) => files,
        Err(fault) => return Ok((config, vec![(directory(path), Err(Mistakes::of(fault)))])),
    };
    let read = |file: PathBuf| {
        let targets = targets_of(&file, path, &mut room);
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
fn targets_of(file: &Path, main: &Path, room: &mut usize) -> Result<Targets, Mistakes> {
    let mut read = || {
        let opened = open(file).map_err(unreadable(file))?;
        ensure_ours(file, &opened.metadata().map_err(unreadable(file))?, main)?;
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
fn list_beside(path: &Path) -> Result<Vec<PathBuf>, FileFault> {
    let dir = directory(path);
    match fs::symlink_metadata(&dir) {
        Err(cause) if matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        found => ensure_ours(&dir, &found.map_err(unreadable(&dir))?, path)?,
    }
    ensure_ours(&dir, &fs::metadata(&dir).map_err(unreadable(&dir))?, path)?;
    list(&dir).map_err(unreadable(&dir))
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

/// F6: that nobody but root, or who runs this, can have written the configuration file, nor can put another in its
/// place. Not asked of a file that is only to be checked.
pub fn ensure_trusted(path: &Path) -> Result<(), FileFault> {
    let mut looked_at = vec![path.to_path_buf()];
    // By its name and, where that is a link, by the one behind it.
    looked_at.extend(path.canonicalize().ok().filter(|real| real != path));
    for path in looked_at {
        let Ok(meta) = fs::metadata(&path) else {
            // None, or none that can be read: that is said elsewhere.
            continue;
        };
        let ours = [ROOT, Uid::effective().as_raw()];
        ensure_owned(&path, &meta, &ours, false)?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        let meta = fs::metadata(dir).map_err(unreadable(dir))?;
        ensure_owned(dir, &meta, &ours, meta.mode() & libc::S_ISVTX != 0)?;
    }
    Ok(())
}

/// F6: beside a file in a directory like `/tmp` anybody can make a `conf.d`.
fn ensure_ours(path: &Path, meta: &Metadata, main: &Path) -> Result<(), FileFault> {
    let owner = fs::metadata(main).map_or(ROOT, |meta| meta.uid());
    // A link has every right, and none counts.
    ensure_owned(path, meta, &[ROOT, owner, Uid::effective().as_raw()], meta.is_symlink())
}

fn ensure_owned(path: &Path, meta: &Metadata, owners: &[u32], is_writable: bool) -> Result<(), FileFault> {
    if owners.contains(&meta.uid()) && (is_writable || meta.mode() & 0o022 == 0) {
        return Ok(());
    }
    Err(FileFault::Untrusted {
        path: path.into(),
        uid: meta.uid(),
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
