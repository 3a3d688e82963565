//! The pin directory: made, owned and locked by us alone (F6), on a bpffs that is mounted if need be.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    fcntl::Flock,
    mount::{MsFlags, mount},
};

use super::BackendError;
use crate::{
    backend::writer,
    host::{
        is_bpffs,
        mounts::{HostView, Views},
        own_dir,
    },
};

/// Where a bpffs belongs (Documentation/bpf, systemd's own mount).
const BPFFS: &str = "/sys/fs/bpf";

/// A pin directory that is ours.
#[derive(Clone, Debug)]
pub(crate) struct Pins {
    dir: PathBuf,
}

/// Held while this process is the one that writes.
#[derive(Debug)]
pub(crate) struct Lock(Flock<File>);

impl Lock {
    /// Whether it is on the directory that is there now.
    pub(crate) fn is_of(&self, pins: &Pins) -> bool {
        let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
        let held = self.0.metadata().map(id);
        matches!((held, pins.dir.symlink_metadata().map(id)), (Ok(held), Ok(found)) if held == found)
    }
}

impl Pins {
    /// Takes an existing directory after checking that nobody else can write it; nothing where there is none.
    pub(crate) fn open(dir: &Path) -> Result<Option<Self>, BackendError> {
        let found = own_dir::metadata(dir).map_err(|error| BackendError::Io {
            action: "look at",
            object: dir.into(),
            error,
        })?;
        let Some(meta) = found else { return Ok(None) };
        if !meta.is_dir() || meta.uid() != 0 || meta.mode() & 0o077 != 0 {
            return Err(BackendError::Untrusted {
                path: dir.into(),
                uid: meta.uid(),
                mode: meta.mode() & 0o7777,
            });
        }
        if !is_bpffs(dir) {
            return Err(BackendError::NotBpffs { path: dir.into() });
        }
        Ok(Some(Self { dir: dir.into() }))
    }

    /// Opens the directory, or makes it.
    pub(crate) fn create(dir: &Path) -> Result<Self, BackendError> {
        let parent = dir.parent().unwrap_or(Path::new("/"));
        if misses_bpffs(parent) {
            mount_bpffs()?;
        }
        trust_parent(dir, parent)?;
        make_dir(dir)?;
        Self::open(dir)?.ok_or_else(|| BackendError::NotBpffs { path: dir.into() })
    }

    /// Whether [`Pins::create`] would find a place that it can use. Makes nothing.
    pub(crate) fn check_usable(dir: &Path) -> Result<(), BackendError> {
        let parent = dir.parent().unwrap_or(Path::new("/"));
        if misses_bpffs(parent) {
            return may_mount();
        }
        trust_parent(dir, parent)?;
        Self::open(dir).map(drop)
    }

    /// Where they are.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Path of a pin.
    #[must_use]
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A directory below, made if missing.
    pub(crate) fn subdir(&self, name: &str) -> Result<PathBuf, BackendError> {
        let path = self.path(name);
        make_dir(&path)?;
        Self::open(&path)?;
        Ok(path)
    }

    /// Claims the right to write, waiting a few seconds for another process that holds it.
    pub(crate) fn lock(&self) -> Result<Lock, BackendError> {
        self.lock_within(writer::PATIENCE)
    }

    /// As [`Pins::lock`], without waiting.
    pub(crate) fn lock_at_once(&self) -> Result<Lock, BackendError> {
        self.lock_within(Duration::ZERO)
    }

    fn lock_within(&self, patience: Duration) -> Result<Lock, BackendError> {
        let file = File::open(&self.dir).map_err(|error| BackendError::Io {
            action: "open",
            object: self.dir.clone(),
            error,
        })?;
        writer::lock(file, &self.dir, patience).map(Lock)
    }

    /// Removes a pin, or a directory of pins; fine if there is none.
    pub(crate) fn remove(&self, name: &str) -> Result<(), BackendError> {
        let path = self.path(name);
        let result = if path.is_dir() {
            // On a bpffs there is nothing but directories and pins.
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(BackendError::Io {
                action: "remove",
                object: path,
                error,
            }),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Gives a directory of pins another name; what had that name is gone.
    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), BackendError> {
        self.remove(to)?;
        let path = self.path(from);
        fs::rename(&path, self.path(to)).map_err(|error| BackendError::Io {
            action: "rename",
            object: path,
            error,
        })
    }

    /// Names of all that lies in the directory; none where another process has removed it.
    pub(crate) fn list(&self) -> Result<Vec<String>, BackendError> {
        let failed = |error| BackendError::Io {
            action: "list",
            object: self.dir.clone(),
            error,
        };
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let name =
            |entry: io::Result<fs::DirEntry>| Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
        entries.map(name).collect()
    }

    /// Removes the directory itself, which must be empty.
    pub(crate) fn remove_dir(self) -> Result<(), BackendError> {
        match fs::remove_dir(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(BackendError::Io {
                action: "remove",
                object: self.dir,
                error,
            }),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// Whether the usual bpffs, on which the directory is to lie, is not mounted.
fn misses_bpffs(parent: &Path) -> bool {
    parent.starts_with(BPFFS) && !is_bpffs(Path::new(BPFFS))
}

/// F1: a bpffs that the host does not see ends with this mount namespace, and with it the pins, the links and
/// enforcement.
fn may_mount() -> Result<(), BackendError> {
    match Views::read().host_would_see_mount(Path::new(BPFFS)) {
        HostView::Same => Ok(()),
        HostView::Other => Err(BackendError::PrivateMounts {
            why: "one mounted here would end with this mount namespace, which is not the host's".to_owned(),
        }),
        HostView::Unknown(why) => Err(BackendError::PrivateMounts {
            why: format!("it is not known whether one mounted here would outlive this process ({why})"),
        }),
    }
}

fn mount_bpffs() -> Result<(), BackendError> {
    may_mount()?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700")).map_err(|error| BackendError::Io {
        action: "mount a bpffs on",
        object: BPFFS.into(),
        error: error.into(),
    })
}

/// Where the directory lies: on a bpffs, and nobody else's to change.
fn trust_parent(dir: &Path, parent: &Path) -> Result<(), BackendError> {
    if !is_bpffs(parent) {
        return Err(BackendError::NotBpffs { path: dir.into() });
    }
    let meta = fs::metadata(parent).map_err(|error| BackendError::Io {
        action: "look at",
        object: parent.into(),
        error,
    })?;
    // Who can write the parent could put another directory in ours' place, unless it is sticky.
    if meta.uid() != 0 || (meta.mode() & 0o022 != 0 && meta.mode() & 0o1000 == 0) {
        return Err(BackendError::Untrusted {
            path: parent.into(),
            uid: meta.uid(),
            mode: meta.mode() & 0o7777,
        });
    }
    Ok(())
}

fn make_dir(dir: &Path) -> Result<(), BackendError> {
    own_dir::make(dir).map_err(|error| BackendError::Io {
        action: "make",
        object: dir.into(),
        error,
    })
}
