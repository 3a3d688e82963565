//! A minimal system in a directory: made once by mmdebstrap, kept as an archive, unpacked for each use, entered in
//! namespaces of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    run::quiet,
    setup::{
        self,
        packages::{self, Package},
    },
};

/// Runs with the root's path, further mounts as shell text, and the command to run inside. Its root is a mount point,
/// without which `ip -n` fails inside; nothing is seen outside, and with the process namespace all of it ends.
const ENTER: &str = r#"
set -e
root=$1 mounts=$2
shift 2
mount --bind "$root" "$root"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -t sysfs -o nosuid,nodev,noexec sysfs "$root/sys"
mount --rbind /dev "$root/dev"
eval "$mounts"
cd "$root"
pivot_root . .
umount -l .
cd /
exec "$@"
"#;

/// Of what a root consists.
#[derive(Debug)]
pub(crate) struct Recipe<'a> {
    /// The release, by its code name.
    pub(crate) suite: &'a str,
    /// What is added to the packages that every system has.
    pub(crate) packages: &'a [Package],
    /// Lines of a sources.list; without any, what mmdebstrap knows of the release.
    pub(crate) sources: &'a [String],
    /// Instead of the keys that apt has.
    pub(crate) keyring: Option<&'a Path>,
}

impl Recipe<'_> {
    /// Makes the archive, which appears only when it is whole.
    pub(crate) fn make(&self, what: &str, archive: &Path) -> Result<()> {
        setup::also(&[packages::ROOT])?;
        let aside = archive.with_extension("new.tar");
        let mut make = Command::new("mmdebstrap");
        make.args(["--quiet", "--variant=minbase"]);
        make.arg(format!("--include={}", packages::names(self.packages)));
        if let Some(keyring) = self.keyring {
            make.arg(format!("--keyring={}", keyring.display()));
        }
        make.arg(self.suite).arg(&aside).args(self.sources);
        if let Err(error) = quiet(what, &mut make) {
            let _ = fs::remove_file(&aside);
            return Err(error);
        }
        fs::rename(&aside, archive).with_context(|| format!("make {}", archive.display()))
    }
}

/// An unpacked root; removed at the end.
#[derive(Debug)]
pub(crate) struct Root {
    dir: PathBuf,
}

impl Root {
    /// Unpacks an archive into a directory that is not there yet.
    pub(crate) fn unpack(what: &str, archive: &Path, dir: PathBuf) -> Result<Self> {
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        let root = Self { dir };
        let mut unpack = Command::new("tar");
        unpack.arg("-xf").arg(archive).arg("-C").arg(&root.dir);
        quiet(what, unpack.args(["--exclude", "./dev/*"]))?;
        Ok(root)
    }

    /// Where something inside is, seen from here.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.dir.join(inside.trim_start_matches('/'))
    }

    /// A command inside, as root, in new mount and process namespaces, and `apart` in new network and IPC namespaces
    /// too, which end with it. `mounts` is shell text that runs before, with the root's path as `$root`.
    pub(crate) fn enter(&self, apart: bool, mounts: &str, command: &[&str]) -> Command {
        let mut enter = Command::new("unshare");
        enter.args(["--mount", "--pid", "--fork", "--kill-child"]);
        if apart {
            enter.args(["--net", "--ipc"]);
        }
        enter
            .args(["sh", "-c", ENTER, "enter"])
            .arg(&self.dir)
            .arg(mounts)
            .args(command);
        enter
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("{} could not be removed: {error}", self.dir.display());
        }
    }
}
