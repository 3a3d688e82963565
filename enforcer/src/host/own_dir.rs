//! A directory of ours in one that others may share: whoever makes its path first neither keeps us from starting nor is
//! trusted (F6).

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, Metadata, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use enforcer_client::trust;
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
    mount::{MntFlags, umount2},
    unistd::{AccessFlags, access},
};
use tracing::warn;

use super::is_bpffs;

/// The user whose files and directories are trusted.
const ROOT: u32 = 0;
/// Tries before another user who makes the path again and again is given up on.
const TRIES: u32 = 100;
/// Random characters in a name beside ours: nobody can have taken all of them.
const RANDOM: usize = 16;

/// Makes a directory, 0700, if it is missing. What another user has put at its path is moved away: nothing in it is
/// read, no link is followed, and what that user mounted there is unmounted. A directory of root's stays as it is;
/// whether it is fit is for the caller to see.
pub fn make(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => reclaim(dir),
        made => made,
    }
}

/// As [`make`], with the directories that lead to it.
pub fn make_all(dir: &Path) -> io::Result<()> {
    if let Some(parent) = dir.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    make(dir)
}

/// Whether [`make`], or [`make_all`], would leave a directory that can be written. Makes nothing.
pub fn check(dir: &Path, with_parents: bool) -> io::Result<()> {
    if let Some(uid) = is_mounted(dir).filter(|_| mounted_by(dir).is_none()) {
        return Err(mounted_for(dir, uid));
    }
    let is_there = |path: &Path| fs::symlink_metadata(path).is_ok();
    let above = || {
        let above = dir.ancestors().skip(1);
        above
            .take(if with_parents { usize::MAX } else { 1 })
            .find(|path| !with_parents || is_there(path))
    };
    let written = if metadata(dir)?.is_some() {
        dir
    } else {
        above().unwrap_or(Path::new("/"))
    };
    if !fs::metadata(written)?.is_dir() {
        return Err(Errno::ENOTDIR.into());
    }
    Ok(access(written, AccessFlags::W_OK)?)
}

/// As [`make`], but where nothing is at the path nothing is made.
pub fn reclaim(dir: &Path) -> io::Result<()> {
    let mut last = Ok(());
    for _ in 0..TRIES {
        if let Some(uid) = mounted_by(dir) {
            umount2(dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
            warn!(
                "user {uid} had mounted a file system on {}: it was unmounted",
                dir.display()
            );
            continue;
        }
        last = match fs::symlink_metadata(dir) {
            Ok(meta) if is_foreign(dir, &meta) => replace(dir, meta.uid()),
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => Err(error),
        };
        // Something was mounted there meanwhile; to root it may be closed (fuse(4), `allow_root`).
        let was_mounted = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EACCES));
        if !last.as_ref().is_err_and(was_mounted) {
            return last;
        }
    }
    match is_mounted(dir) {
        Some(uid) if last.is_err() => Err(mounted_for(dir, uid)),
        Some(_) | None => last,
    }
}

/// Whose the root of a file system is that is mounted there, by root or before we look: it cannot be moved away.
fn is_mounted(dir: &Path) -> Option<u32> {
    let (meta, above) = (fs::symlink_metadata(dir).ok()?, fs::metadata(dir.parent()?).ok()?);
    (meta.uid() != ROOT && meta.dev() != above.dev()).then(|| meta.uid())
}

fn mounted_for(dir: &Path, uid: u32) -> io::Error {
    let dir = dir.display();
    let text = format!(
        "the file system that is mounted there belongs to user {uid}, and cannot be moved aside; give it to root \
         (chown root {dir} && chmod 0700 {dir}), or unmount it (umount {dir})"
    );
    io::Error::new(io::ErrorKind::ResourceBusy, text)
}

/// What lies at a path that is ours: none where there is nothing, or something of another user's. A link is followed
/// only if it is root's.
pub fn metadata(path: &Path) -> io::Result<Option<Metadata>> {
    if is_anothers(path) {
        return Ok(None);
    }
    match fs::metadata(path) {
        Ok(meta) => Ok(Some(meta)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether what lies at a path of ours is another user's.
fn is_anothers(path: &Path) -> bool {
    mounted_by(path).is_some() || fs::symlink_metadata(path).is_ok_and(|meta| is_foreign(path, &meta))
}

/// The user, other than root, who has mounted a file system of their own there: what it shows, owners too, is that
/// user's word.
fn mounted_by(dir: &Path) -> Option<u32> {
    trust::mounted_by(dir).filter(|uid| *uid != ROOT)
}

/// Another user's. Of a bpffs a directory with something of root's in it is ours with a changed owner: moving that away
/// could end enforcement, so it is for the caller to refuse. Elsewhere others can come by files of root's, and put them
/// where they like; on a bpffs only by hard links.
fn is_foreign(path: &Path, meta: &Metadata) -> bool {
    let is_roots = |entry: io::Result<fs::DirEntry>| {
        let meta = entry.and_then(|entry| entry.metadata());
        meta.is_ok_and(|meta| meta.uid() == ROOT && (meta.is_dir() || meta.nlink() == 1))
    };
    let holds_roots = || is_bpffs(path) && fs::read_dir(path).is_ok_and(|mut entries| entries.any(is_roots));
    meta.uid() != ROOT && !(meta.is_dir() && holds_roots())
}

/// Puts a directory of ours in the place of another user's entry. That is left beside it unless it is gone with one
/// call: to walk through it would take as long as that user likes.
fn replace(dir: &Path, uid: u32) -> io::Result<()> {
    let aside = tempfile::Builder::new()
        .prefix(OsStr::new("enforcer_aside_"))
        .rand_bytes(RANDOM)
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(dir.parent().unwrap_or(Path::new("/")))?
        .keep();
    match exchange(&aside, dir) {
        Ok(theirs) => {
            let left = if remove(&theirs).is_ok() {
                String::new()
            } else {
                format!(
                    "; what was there is now {}, and nothing in it is used",
                    theirs.display()
                )
            };
            warn!(
                "{} belonged to user {uid}, not root: it was replaced{left}",
                dir.display()
            );
            Ok(())
        }
        Err(error) => {
            let _ = fs::remove_dir(&aside);
            Err(error)
        }
    }
}

/// What goes with one call: a directory only if it is empty.
fn remove(path: &Path) -> io::Result<()> {
    fs::remove_dir(path).or_else(|_| fs::remove_file(path))
}

/// Exchanges two names; returns where that of `dir` is then.
fn exchange(aside: &Path, dir: &Path) -> io::Result<PathBuf> {
    match renameat2(AT_FDCWD, aside, AT_FDCWD, dir, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => return Ok(aside.into()),
        // bpffs exchanges names from Linux 5.15 on (`simple_rename_exchange` in fs/libfs.c).
        Err(Errno::EINVAL | Errno::ENOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    let mut last = Errno::EEXIST.into();
    for number in 0..TRIES {
        let theirs = PathBuf::from([aside.as_os_str(), OsStr::new(&format!("_{number}"))].join(OsStr::new("")));
        // They may have removed it, or make it again before ours is there.
        let _ = fs::rename(dir, &theirs);
        match fs::rename(aside, dir) {
            Ok(()) => return Ok(theirs),
            Err(error) => last = error,
        }
        let _ = remove(&theirs);
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn whether_it_can_be_made_is_known_before() {
        let parent = tempfile::tempdir().expect("a directory");
        let path = |name: &str| parent.path().join(name);
        let kind = |name: &str, with_parents| check(&path(name), with_parents).map_err(|error| error.kind());
        assert_eq!(kind("", false), Ok(()));
        assert_eq!(kind("ours", false), Ok(()));
        assert_eq!(kind("a/b/ours", true), Ok(()));
        assert_eq!(kind("a/ours", false), Err(io::ErrorKind::NotFound));
        fs::write(path("file"), "").expect("written");
        for with_parents in [false, true] {
            assert_eq!(kind("file", with_parents), Err(io::ErrorKind::NotADirectory));
            assert_eq!(kind("file/ours", with_parents), Err(io::ErrorKind::NotADirectory));
        }
        assert!(!path("ours").exists() && !path("a").exists());
    }

    #[test]
    fn what_is_missing_is_made_closed_to_others() {
        let parent = tempfile::tempdir().expect("a directory");
        let dir = parent.path().join("ours");
        assert!(metadata(&dir).expect("looked at").is_none());
        reclaim(&dir).expect("nothing to do");
        assert!(!dir.exists());
        make(&dir).expect("made");
        let meta = fs::metadata(&dir).expect("there");
        assert_eq!(meta.permissions().mode() & 0o7777, 0o700);
    }
}
