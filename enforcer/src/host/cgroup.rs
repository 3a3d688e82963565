//! The cgroup that a path names, and whether it is root's alone (F6): a user who could make a cgroup anew under its
//! path, or move into it, would be whom its principals allow.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::hierarchy;
use crate::{
    policy::CgroupPath,
    ruleset::{Cgroup, Writable},
};

/// Who may move a process into a cgroup is who can write one of these (`cgroup_procs_write_permission`), in it or in an
/// ancestor. Threads of a threaded cgroup are moved by the latter.
const MEMBERS: [&str; 2] = ["cgroup.procs", "cgroup.threads"];
/// Bits of a mode by which a group or everybody writes.
const WRITABLE: u32 = 0o022;

/// Why a path matches nobody now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoMatch {
    /// There is no such cgroup.
    Missing,
    /// It is there, and not root's alone.
    Writable(Writable),
    /// It is there, and how deep it lies is not known from within this cgroup namespace (F9).
    Unplaced,
}

/// The cgroup that a path names now. It and each ancestor have to be root's: the directory, by which children are made
/// and removed, and the files by which processes and threads are moved.
pub fn cgroup(mount: &Path, path: &CgroupPath) -> Result<Cgroup, NoMatch> {
    CgroupLookup::new(mount, ROOT).cgroup(path)
}

/// The user who may own cgroups.
const ROOT: u32 = 0;

/// What paths name now: those that match, and those that are not root's. What does not exist is in neither.
pub(super) fn all(
    mount: &Path,
    paths: &BTreeSet<CgroupPath>,
) -> (BTreeMap<CgroupPath, Cgroup>, BTreeMap<CgroupPath, Writable>) {
    let mut looks = CgroupLookup::new(mount, ROOT);
    let (mut found, mut writable) = (BTreeMap::new(), BTreeMap::new());
    for path in paths {
        match looks.cgroup(path) {
            Ok(cgroup) => drop(found.insert(path.clone(), cgroup)),
            Err(NoMatch::Writable(by)) => drop(writable.insert(path.clone(), by)),
            Err(NoMatch::Missing | NoMatch::Unplaced) => {}
        }
    }
    (found, writable)
}

/// Looks at cgroups once each: many paths have ancestors in common.
struct CgroupLookup<'m> {
    mount: &'m Path,
    owner: u32,
    /// How deep the mount's own root lies.
    depth: Option<u32>,
    known: BTreeMap<PathBuf, Result<u64, NoMatch>>,
}

impl<'m> CgroupLookup<'m> {
    fn new(mount: &'m Path, owner: u32) -> Self {
        Self {
            mount,
            owner,
            depth: hierarchy::depth(mount),
            known: BTreeMap::new(),
        }
    }

    fn cgroup(&mut self, path: &CgroupPath) -> Result<Cgroup, NoMatch> {
        let mut at = PathBuf::new();
        let mut id = self.look(&at)?;
        let mut level = self.depth.unwrap_or_default();
        for part in path.as_str().split('/').filter(|part| !part.is_empty()) {
            at.push(part);
            id = self.look(&at)?;
            level += 1;
        }
        if self.depth.is_none() {
            return Err(NoMatch::Unplaced);
        }
        Ok(Cgroup { id, level })
    }

    /// The id of the cgroup at a path below the mount, if it is the owner's alone.
    fn look(&mut self, at: &Path) -> Result<u64, NoMatch> {
        if let Some(known) = self.known.get(at) {
            return known.clone();
        }
        let found = self.look_now(at);
        self.known.insert(at.to_path_buf(), found.clone());
        found
    }

    fn look_now(&self, at: &Path) -> Result<u64, NoMatch> {
        let dir = self.mount.join(at);
        // One look tells id and owner: what is made under the path later has another id.
        let meta = fs::symlink_metadata(&dir).map_err(|_| NoMatch::Missing)?;
        if !meta.is_dir() {
            return Err(NoMatch::Missing);
        }
        self.owned(at, &meta)?;
        for file in MEMBERS {
            // Before Linux 4.14 there are no threads to be moved. What has gone since the directory was looked at is
            // another's soon.
            let Ok(meta) = fs::symlink_metadata(dir.join(file)) else {
                continue;
            };
            self.owned(&at.join(file), &meta)?;
        }
        Ok(meta.ino())
    }

    fn owned(&self, at: &Path, meta: &fs::Metadata) -> Result<(), NoMatch> {
        if meta.uid() == self.owner && meta.mode() & WRITABLE == 0 {
            return Ok(());
        }
        Err(NoMatch::Writable(Writable {
            at: Path::new("/").join(at),
            uid: meta.uid(),
            mode: meta.mode() & 0o7777,
        }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use std::{
        fs::{File, Permissions},
        os::unix::fs::PermissionsExt as _,
    };

    use super::*;

    /// Directories and files as cgroups have them, of whoever runs this.
    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for dir in ["", "a", "a/b"] {
            let dir = root.path().join(dir);
            fs::create_dir_all(&dir).expect("a cgroup");
            for file in MEMBERS {
                File::create(dir.join(file)).expect("its file");
                chmod(&dir.join(file), 0o644);
            }
            chmod(&dir, 0o755);
        }
        root
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("chmod");
    }

    fn look(root: &tempfile::TempDir, owner: u32, path: &str) -> Result<Cgroup, NoMatch> {
        let path = CgroupPath::parse(path).expect("a path");
        CgroupLookup::new(root.path(), owner).cgroup(&path)
    }

    #[test]
    fn f6_it_and_all_above_it_are_its_owners() {
        let root = tree();
        let me = nix::unistd::geteuid().as_raw();
        let id = fs::metadata(root.path().join("a/b")).expect("it").ino();
        assert_eq!(look(&root, me, "/a/b"), Ok(Cgroup { id, level: 2 }));
        assert_eq!(look(&root, me, "/a/c"), Err(NoMatch::Missing));
        assert_eq!(look(&root, me, "/a/b/cgroup.procs"), Err(NoMatch::Missing));
        let other = look(&root, me + 1, "/a/b").expect_err("another's");
        assert!(
            matches!(other, NoMatch::Writable(ref by) if by.uid == me && by.at == Path::new("/")),
            "{other:?}"
        );
        for (file, good) in [
            ("", 0o755),
            ("a", 0o755),
            ("a/b", 0o755),
            ("cgroup.procs", 0o644),
            ("a/cgroup.procs", 0o644),
            ("a/b/cgroup.procs", 0o644),
            ("a/b/cgroup.threads", 0o644),
        ] {
            let path = root.path().join(file);
            for writable in [0o020, 0o002] {
                chmod(&path, good | writable);
                let found = look(&root, me, "/a/b").expect_err("writable");
                assert!(
                    matches!(found, NoMatch::Writable(ref by) if by.at == Path::new("/").join(file) && by.mode == good | writable),
                    "{file}: {found:?}"
                );
            }
            chmod(&path, good);
            assert!(look(&root, me, "/a/b").is_ok(), "{file}");
        }
    }

    #[test]
    fn f6_a_link_is_no_cgroup() {
        let root = tree();
        std::os::unix::fs::symlink("b", root.path().join("a/link")).expect("a link");
        let me = nix::unistd::geteuid().as_raw();
        assert_eq!(look(&root, me, "/a/link"), Err(NoMatch::Missing));
    }
}
