//! Who else could write a file of the configuration, or put another one in its place (F6).

use std::{
    collections::VecDeque,
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Component, Path, PathBuf},
};

use nix::unistd::Uid;

use super::FileFault;

/// Who may write whatever is read.
const ROOT: u32 = 0;
/// As many links as the kernel follows (`path_resolution(7)`).
const MAX_LINKS: usize = 40;

/// Fails where a user other than root, and than the one who runs this, can write the file or directory at `path`, or
/// can make the path lead elsewhere: each directory and each link on the way there is looked at. As far as there is
/// something; what is missing is for the reader to miss.
pub(super) fn ensure(path: &Path) -> Result<(), FileFault> {
    let unreadable = |cause| FileFault::Unreadable {
        path: path.into(),
        cause,
    };
    let trusted = trusted_owners();
    let whole = std::path::absolute(path).map_err(unreadable)?;
    let mut rest: VecDeque<PathBuf> = parts(&whole).collect();
    let (mut at, mut links) = (PathBuf::new(), 0);
    while let Some(part) = rest.pop_front() {
        if part.as_os_str() == ".." {
            // What is before it is no link.
            at.pop();
            continue;
        }
        at.push(part);
        let meta = match fs::symlink_metadata(&at) {
            Ok(meta) => meta,
            Err(cause) if matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => break,
            Err(cause) => return Err(unreadable(cause)),
        };
        if !trusted.contains(&meta.uid()) || is_writable_by_others(&meta) {
            return Err(FileFault::Untrusted {
                path: at,
                uid: meta.uid(),
                mode: meta.mode() & 0o7777,
            });
        }
        if meta.is_symlink() {
            links += 1;
            if links > MAX_LINKS {
                break;
            }
            let target = fs::read_link(&at).map_err(unreadable)?;
            at.pop();
            for part in parts(&target).collect::<Vec<_>>().into_iter().rev() {
                rest.push_front(part);
            }
        }
    }
    Ok(())
}

/// In the order in which they are walked; an absolute one begins anew at the root.
fn parts(path: &Path) -> impl Iterator<Item = PathBuf> {
    let parts = path.components().filter(|part| *part != Component::CurDir);
    parts.map(|part| PathBuf::from(part.as_os_str()))
}

/// In a directory with the sticky bit nobody replaces what is another user's, and what is not there yet is missed. A
/// link has every right, and none counts.
fn is_writable_by_others(meta: &Metadata) -> bool {
    let is_sticky = meta.is_dir() && meta.mode() & libc::S_ISVTX != 0;
    meta.mode() & 0o022 != 0 && !meta.is_symlink() && !is_sticky
}

/// In a user namespace other than the initial one the host's root has the UID of all who are not mapped, unless that is
/// somebody's.
fn trusted_owners() -> Vec<u32> {
    let number = |text: &str| text.trim().parse::<u32>().ok();
    let overflow = fs::read_to_string("/proc/sys/kernel/overflowuid").ok();
    let overflow = overflow.and_then(|text| number(&text));
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let is_mapped = |uid: &u32| {
        map.lines().any(|line| {
            let mut words = line.split_whitespace().map(number);
            let (first, _, count) = (words.next().flatten(), words.next(), words.next().flatten());
            first
                .zip(count)
                .is_some_and(|(first, count)| (first..first.saturating_add(count)).contains(uid))
        })
    };
    let unmapped = overflow.filter(|uid| !map.is_empty() && !is_mapped(uid));
    [ROOT, Uid::effective().as_raw()].into_iter().chain(unmapped).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    type Fallible = Result<(), Box<dyn std::error::Error>>;

    fn mode(path: &Path, mode: u32) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    }

    /// What is at fault, if anything is.
    fn fault(path: &Path) -> Option<PathBuf> {
        ensure(path).err().map(|fault| fault.path().to_path_buf())
    }

    /// Whoever can write any part of the way there says what is read.
    #[test]
    fn f6_the_way_to_a_file_is_its_owners_alone() -> Fallible {
        let home = tempfile::tempdir()?;
        let (a, b, file) = (
            home.path().join("a"),
            home.path().join("a/b"),
            home.path().join("a/b/x.toml"),
        );
        fs::create_dir_all(&b)?;
        fs::write(&file, "")?;
        for (path, wrong, right) in [
            (&file, 0o664, 0o644),
            (&file, 0o646, 0o600),
            (&b, 0o777, 0o755),
            (&b, 0o775, 0o700),
            (&a, 0o757, 0o755),
        ] {
            assert_eq!(fault(&file), None);
            mode(path, wrong)?;
            assert_eq!(fault(&file).as_ref(), Some(path), "{wrong:o}");
            // So it is where there is none yet, which anybody there could make.
            let gone = path != &file && fault(&b.join("none.toml")).as_ref() == Some(path);
            assert!(gone || path == &file, "{wrong:o}");
            mode(path, right)?;
        }
        // In a directory like /tmp nobody replaces what is another's.
        mode(&b, 0o1777)?;
        assert_eq!(fault(&file), None);
        assert_eq!(fault(&home.path().join("none/x.toml")), None);
        Ok(())
    }

    #[test]
    fn f6_a_link_is_as_good_as_all_that_it_leads_through() -> Fallible {
        let home = tempfile::tempdir()?;
        let path = |name: &str| home.path().join(name);
        for dir in ["etc", "release", "release/7"] {
            fs::create_dir(path(dir))?;
        }
        fs::write(path("release/7/x.toml"), "")?;
        symlink("7", path("release/current"))?;
        symlink("../release/./current/x.toml", path("etc/x.toml"))?;
        symlink(path("etc/x.toml"), path("x.toml"))?;
        let real = path("x.toml");
        assert_eq!(fault(&real), None);
        for dir in ["etc", "release", "release/7"] {
            mode(&path(dir), 0o777)?;
            assert_eq!(fault(&real), Some(path(dir)));
            mode(&path(dir), 0o755)?;
        }
        symlink("around", path("around"))?;
        assert_eq!(fault(&path("around")), None, "the kernel says what is wrong with it");
        Ok(())
    }

    #[test]
    fn a_relative_path_is_one_from_here() -> Fallible {
        let here = std::env::current_dir()?;
        assert_eq!(fault(Path::new("Cargo.toml")), fault(&here.join("Cargo.toml")));
        Ok(())
    }
}
