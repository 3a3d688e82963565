//! Whose a directory is and who listens on a socket: what is not root's is neither believed nor asked (F6).

use std::{
    fs::{self, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd as _},
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::Path,
};

use nix::{
    fcntl::OFlag,
    sys::socket::{getsockopt, sockopt::PeerCredentials},
};

/// The user, other than the one trusted, who could put a socket of their own in the place of this one.
pub(crate) fn foreign_directory(socket: &Path, trusted: u32) -> Option<u32> {
    let socket = std::path::absolute(socket).ok()?;
    let dir = socket.parent()?;
    // A mount first: what it shows, owners too, is the word of the user who mounted it.
    let owner = || fs::symlink_metadata(dir).ok().map(|meta| meta.uid());
    let is_foreign = |uid: &u32| *uid != trusted;
    mounted_by(dir)
        .filter(is_foreign)
        .or_else(|| owner().filter(is_foreign))
}

/// The user, other than the one trusted, who listens: the kernel's word (unix(7), `SO_PEERCRED`).
pub(crate) fn foreign_listener(stream: &impl AsFd, trusted: u32) -> io::Result<Option<u32>> {
    let uid = getsockopt(stream, PeerCredentials)?.uid();
    Ok((uid != trusted).then_some(uid))
}

/// The process that listens; none where it lies outside our PID namespace.
pub(crate) fn listener(stream: &impl AsFd) -> Option<u32> {
    let pid = getsockopt(stream, PeerCredentials).ok()?.pid();
    u32::try_from(pid).ok().filter(|pid| *pid != 0)
}

/// The user who has mounted a file system exactly there, as far as it says so (`user_id=` of FUSE,
/// Documentation/filesystems/fuse.rst; fusermount lets users do that). No link is followed at the path's end, and
/// nothing of the file system is read, whose server may never answer.
#[must_use]
pub fn mounted_by(dir: &Path) -> Option<u32> {
    dir.file_name()?;
    let id = mount_id(dir).ok()?;
    if id == mount_id(dir.parent()?).ok()? {
        return None;
    }
    let table = fs::read("/proc/self/mountinfo").ok()?;
    user_of(&String::from_utf8_lossy(&table), &id)
}

/// The mount that a path leads to, as `/proc/PID/mountinfo` numbers it (`proc_pid_fdinfo(5)`).
fn mount_id(path: &Path) -> io::Result<String> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    id.map(|id| id.trim().to_owned())
        .ok_or_else(|| io::ErrorKind::Unsupported.into())
}

/// The user who made a mount, by its own options, which end its line. Blanks within a field are escaped.
fn user_of(table: &str, id: &str) -> Option<u32> {
    let line = table.lines().find(|line| line.split(' ').next() == Some(id))?;
    let (_, of_file_system) = line.split_once(" - ")?;
    let options = of_file_system.split(' ').next_back()?.split(',');
    options
        .filter_map(|option| option.strip_prefix("user_id="))
        .next_back()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_its_users() {
        let table = "\
28 1 8:1 / / rw - ext4 /dev/sda1 rw
280 28 0:50 / /run/enforcer rw - fuse.user_id=7 user_id=8 rw,user_id=1000,group_id=9
281 28 0:51 / /a\\040-\\040b rw,user_id=5 shared:1 - fuse x ro
";
        assert_eq!(user_of(table, "280"), Some(1000));
        assert_eq!(
            (user_of(table, "28"), user_of(table, "281"), user_of(table, "2")),
            (None, None, None)
        );
    }

    #[test]
    fn a_mount_of_the_kernels_is_nobodys() {
        assert_ne!(mount_id(Path::new("/proc")).ok(), mount_id(Path::new("/")).ok());
        assert_eq!(mounted_by(Path::new("/proc")), None);
    }
}
