//! What the rules depend on in this host: what is local to it and its cgroups, and word of their changes.

mod cgroup;
pub mod hierarchy;
mod identities;
mod local;
pub mod mounts;
pub mod own_dir;
mod residents;
pub(crate) mod sock_diag;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

pub(crate) use enforcer_client::ask::START;
pub use enforcer_client::ask::remedy;
use ipnet::IpNet;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use self::hierarchy::Hierarchy;
pub use self::{
    cgroup::{NoMatch, cgroup},
    identities::Identities,
    local::{LocalChanges, MAX_LOCAL, local},
    residents::supervisor,
};
use crate::{policy::CgroupPath, ruleset::Host};

/// Whether the packaged service would start: as its unit's conditions and runit's script ask (packaging/systemd).
pub(crate) fn service_starts() -> bool {
    let is_there = |path: &str| Path::new(path).exists();
    let more = || {
        let mut entries = fs::read_dir("/etc/enforcer/conf.d").into_iter().flatten().flatten();
        entries.any(|entry| entry.path().extension().is_some_and(|end| end == "toml"))
    };
    [
        "/var/vcap/bosh",
        "/etc/enforcer/enforcer.toml",
        "/var/lib/enforcer/last-good.json",
    ]
    .into_iter()
    .any(is_there)
        || more()
}

/// A file of which others chose a part: bytes that are no text neither hide the rest nor fail it.
pub(crate) fn read_lossy(path: impl AsRef<Path>) -> io::Result<String> {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether a path lies on a bpffs.
pub(crate) fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC)
}

/// The name of a task, which it chooses itself; empty where it has ended.
pub(crate) fn task_name(pid: u32) -> String {
    let name = read_lossy(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.strip_suffix('\n').unwrap_or(&name).to_owned()
}

/// A field of what `/proc/PID/status` says (proc(5)).
pub(crate) fn status_field<'s>(status: &'s str, name: &str) -> Option<&'s str> {
    let mut fields = status.lines().filter_map(|line| line.split_once(':'));
    fields.find_map(|(found, value)| (found == name).then(|| value.trim()))
}

/// Where the cgroup v2 hierarchy is mounted (F9).
pub fn cgroup2_mount() -> io::Result<Option<PathBuf>> {
    Ok(Hierarchy::find()?.map(|found| found.mount))
}

/// The cgroup that the mount of [`cgroup2_mount`] shows as its root: `/` but in odd containers.
pub fn cgroup2_root() -> io::Result<PathBuf> {
    let found = Hierarchy::find()?.map(|found| found.shown);
    Ok(found.unwrap_or_else(|| PathBuf::from("/")))
}

/// The cgroup in the v2 hierarchy, of a text as `/proc/PID/cgroup` has it (cgroups(7)).
pub(crate) fn cgroup2_of(text: &[u8]) -> Option<&[u8]> {
    text.split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"0::"))
}

/// Ids of a cgroup and all its ancestors, the true root's first, and 0 for those that are not shown here; an error
/// names what does not exist. Where no hierarchy is mounted everybody is in the root, which has no id.
pub fn ancestors(mount: Option<&Path>, path: &CgroupPath) -> io::Result<Vec<u64>> {
    let Some(mount) = mount else {
        return if path.as_str() == "/" {
            Ok(Vec::new())
        } else {
            Err(io::Error::other("no cgroup v2 hierarchy is mounted"))
        };
    };
    let mut at = mount.to_path_buf();
    let mut ids = vec![0; hierarchy::depth(mount).unwrap_or_default() as usize];
    ids.push(fs::metadata(&at)?.ino());
    for part in path.as_str().split('/').filter(|part| !part.is_empty()) {
        at.push(part);
        ids.push(fs::metadata(&at)?.ino());
    }
    Ok(ids)
}

/// The id of a cgroup given by its directory.
#[must_use]
pub fn directory_id(cgroup: &Path) -> Option<u64> {
    fs::metadata(cgroup).ok().map(|meta| meta.ino())
}

/// The parent of every cgroup below a mount, by id; the mount's own is itself.
pub fn cgroup_parents(mount: &Path) -> io::Result<HashMap<u64, u64>> {
    let mut parents = HashMap::new();
    walk_cgroups(mount, usize::MAX, |_, id, parent| {
        parents.insert(id, parent);
    })?;
    Ok(parents)
}

/// Every cgroup below a mount, so many at most, with its directory, its id and its parent's: parents first, and of the
/// mount's own its own.
fn walk_cgroups(mount: &Path, most: usize, mut each: impl FnMut(&Path, u64, u64)) -> io::Result<()> {
    let root = fs::metadata(mount)?.ino();
    let mut waiting = VecDeque::from([(mount.to_path_buf(), root, root)]);
    let mut left = most.saturating_sub(1);
    while let Some((dir, id, parent)) = waiting.pop_front() {
        each(&dir, id, parent);
        // A cgroup that has just been removed is no fault.
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        // Whoever may make cgroups may have made any number in one.
        for entry in dirs.take(left) {
            let Ok(meta) = entry.metadata() else { continue };
            left -= 1;
            waiting.push_back((entry.path(), meta.ino(), id));
        }
    }
    Ok(())
}

/// This host as it is now; cgroups that do not exist are left out.
pub fn snapshot(mount: Option<&Path>, cgroups: &BTreeSet<CgroupPath>) -> io::Result<Host> {
    Ok(with_cgroups(local()?, mount, cgroups))
}

/// This host, of which is known what is local, with its cgroups as they are now.
#[must_use]
pub fn with_cgroups(local: BTreeSet<IpNet>, mount: Option<&Path>, cgroups: &BTreeSet<CgroupPath>) -> Host {
    let (cgroups, writable) = mount.map(|mount| cgroup::all(mount, cgroups)).unwrap_or_default();
    Host {
        local,
        cgroups,
        writable,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn ancestors_with_and_without_a_hierarchy() {
        let path = |text| CgroupPath::parse(text).expect("a path");
        assert_eq!(ancestors(None, &path("/")).ok(), Some(Vec::new()));
        let error = ancestors(None, &path("/a")).expect_err("there is none");
        assert!(error.to_string().contains("no cgroup v2 hierarchy"), "{error}");
        // Any directories do.
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(dir.path().join("a/b")).expect("more");
        let ids = ancestors(Some(dir.path()), &path("/a/b")).expect("they are there");
        let wanted = ["", "a", "a/b"].map(|part| directory_id(&dir.path().join(part)).expect("an id"));
        assert_eq!(ids, wanted);
        assert!(ancestors(Some(dir.path()), &path("/a/c")).is_err());
    }
}
