//! A directory of ours in one that others may share: whoever makes its path first neither keeps us from starting nor is trusted (F6).

use std::{
    fs::{self, DirBuilder, Metadata},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
};
use tracing::warn;

/// The user whose files and directories are trusted.
const ROOT: u32 = 0;
/// Tries before another user who makes the path again and again is given up on, where the kernel cannot exchange two names.
const TRIES: u32 = 100;

/// Makes a directory, 0700, if it is missing. What another user has put at its path is moved away and removed: nothing in it is read, and
/// no link is followed. A directory of root's stays as it is; whether it is fit is for the caller to see.
pub fn make(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => reclaim(dir),
        made => made,
    }
}

/// As [`make`], but where nothing is at the path nothing is made.
pub fn reclaim(dir: &Path) -> io::Result<()> {
    match fs::symlink_metadata(dir) {
        Ok(meta) if is_foreign(dir, &meta) => replace(dir, meta.uid()),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// What lies at a path that is ours: none where there is nothing, or something of another user's. A link is followed only if it is root's.
pub fn metadata(path: &Path) -> io::Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(meta) if is_foreign(path, &meta) => Ok(None),
        Ok(meta) if meta.is_symlink() => fs::metadata(path).map(Some),
        Ok(meta) => Ok(Some(meta)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Another user's. A directory with something of root's in it is ours with a changed owner: moving that away could end enforcement, so it
/// is for the caller to refuse.
fn is_foreign(path: &Path, meta: &Metadata) -> bool {
    let is_roots = |entry: io::Result<fs::DirEntry>| {
        entry
            .and_then(|entry| entry.metadata())
            .is_ok_and(|meta| meta.uid() == ROOT)
    };
    let holds_roots = || fs::read_dir(path).is_ok_and(|mut entries| entries.any(is_roots));
    meta.uid() != ROOT && !(meta.is_dir() && holds_roots())
}

/// Puts a directory of ours in the place of another user's entry.
fn replace(dir: &Path, uid: u32) -> io::Result<()> {
    let aside = aside(dir)?;
    DirBuilder::new().mode(0o700).create(&aside)?;
    let replaced = exchange(&aside, dir);
    // Now it is theirs, or still ours and empty.
    let _ = fs::remove_dir_all(&aside).or_else(|_| fs::remove_file(&aside));
    replaced?;
    warn!("user {uid} had made {} before enforcer: it was replaced", dir.display());
    Ok(())
}

/// A path beside it that does not exist.
fn aside(dir: &Path) -> io::Result<PathBuf> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // bpffs allows no dot in names.
    let candidates =
        (0..TRIES).map(|number| dir.with_file_name(format!("{name}_aside_{}_{number}", std::process::id())));
    candidates
        .into_iter()
        .find(|path| fs::symlink_metadata(path).is_err())
        .ok_or_else(|| io::Error::other("no name beside it is free"))
}

fn exchange(aside: &Path, dir: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, aside, AT_FDCWD, dir, RenameFlags::RENAME_EXCHANGE) {
        // bpffs exchanges names from Linux 5.15 on (`simple_rename_exchange` in fs/libfs.c).
        Err(Errno::EINVAL | Errno::ENOSYS) => {}
        done => return Ok(done?),
    }
    let mut last = Ok(());
    for _ in 0..TRIES {
        let _ = fs::remove_dir_all(dir).or_else(|_| fs::remove_file(dir));
        last = fs::rename(aside, dir);
        if last.is_ok() {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

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
