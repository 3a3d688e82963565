//! Users and cgroups by name: what a number meant when something happened, as it may be gone when somebody asks. What
//! that costs is bounded, whoever makes things happen (F10).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use super::{cgroup2_of, directory_id, walk_cgroups};
use crate::policy::{Account, FileUsers, Uid};

/// Where users have names. A directory server's are known where the configuration lists them.
const PASSWD: &str = "/etc/passwd";
/// Cgroups remembered, and looked at in one walk of the hierarchy: some milliseconds.
const CGROUPS: usize = 2048;
/// Bytes of a path that are kept: whoever may make cgroups chooses how long it is.
const LONGEST: usize = 256;
/// Between two walks.
const WALK_AGAIN: Duration = Duration::from_secs(5);

/// What is known of users and cgroups.
#[derive(Debug, Default)]
pub struct Identities {
    /// Where the hierarchy is mounted, if it is.
    mount: PathBuf,
    configured: HashMap<Uid, String>,
    users: HashMap<Uid, String>,
    /// The file as it was when users were read.
    seen: Option<(u64, SystemTime)>,
    /// The kernel gives no id twice, and a cgroup keeps its path.
    cgroups: HashMap<u64, String>,
    walked: Option<Instant>,
}

impl Identities {
    /// Of users whom the configuration names, and the host's.
    #[must_use]
    pub fn new(mount: &Path, configured: &BTreeMap<Account, Option<BTreeSet<Uid>>>) -> Self {
        let mut identities = Self::default();
        identities.follow(mount, configured);
        identities
    }

    /// Takes another configuration, and users as they are now.
    pub fn follow(&mut self, mount: &Path, configured: &BTreeMap<Account, Option<BTreeSet<Uid>>>) {
        if self.mount != mount {
            self.cgroups.clear();
            self.mount = mount.to_path_buf();
        }
        self.configured = HashMap::new();
        for (account, uids) in configured {
            if let Account::User(name) = account {
                let uids = uids.iter().flatten();
                self.configured.extend(uids.map(|uid| (*uid, name.clone())));
            }
        }
        self.look_at_users();
    }

    /// Takes users as they are now.
    pub fn look_at_users(&mut self) {
        let meta = fs::metadata(PASSWD).ok();
        let seen = meta.and_then(|meta| Some((meta.ino(), meta.modified().ok()?)));
        if seen != self.seen {
            self.seen = seen;
            let passwd = super::read_lossy(PASSWD).unwrap_or_default();
            let files = FileUsers {
                passwd,
                group: String::new(),
            };
            self.users = files.by_uid();
        }
    }

    /// The name of a user.
    fn user(&self, uid: u32) -> Option<&str> {
        let uid = Uid(uid);
        self.configured
            .get(&uid)
            .or_else(|| self.users.get(&uid))
            .map(String::as_str)
    }

    /// The name of a user, where there is one.
    #[must_use]
    pub fn name_of(&self, uid: Option<u32>) -> Option<String> {
        self.user(uid?).map(str::to_owned)
    }

    /// As [`Identities::cgroup`], where there is one.
    pub fn path_of(&mut self, cgroup: Option<u64>, task: Option<u32>, now: Instant) -> Option<String> {
        self.cgroup(cgroup?, task, now).map(str::to_owned)
    }

    /// The path of a cgroup from the root of the hierarchy; that of `task`, if it is still there, is found first.
    fn cgroup(&mut self, id: u64, task: Option<u32>, now: Instant) -> Option<&str> {
        if !self.cgroups.contains_key(&id) {
            let mount = self.mount.clone();
            if let Some(path) = task.and_then(|task| cgroup_of(&mount, id, task)) {
                self.remember(id, path);
            } else if self
                .walked
                .is_none_or(|walked| now.duration_since(walked) >= WALK_AGAIN)
            {
                self.walked = Some(now);
                self.walk(&mount);
            }
        }
        self.cgroups.get(&id).map(String::as_str)
    }

    /// Remembers all cgroups, so many at most.
    fn walk(&mut self, mount: &Path) {
        // Without a hierarchy nothing is known.
        let _ = walk_cgroups(mount, CGROUPS, |path, id, _| self.remember(id, shown(mount, path)));
    }

    /// One that is known makes room for another.
    fn remember(&mut self, id: u64, path: String) {
        if self.cgroups.len() >= CGROUPS
            && let Some(other) = self.cgroups.keys().next().copied()
        {
            self.cgroups.remove(&other);
        }
        self.cgroups.insert(id, path);
    }
}

/// The path of a task's cgroup, if it has that id.
fn cgroup_of(mount: &Path, id: u64, task: u32) -> Option<String> {
    let text = fs::read(format!("/proc/{task}/cgroup")).ok()?;
    let path = String::from_utf8_lossy(cgroup2_of(&text)?).into_owned();
    // A cgroup that is not below our namespace's root has no path here. Another task may have the number by now.
    let dir = mount.join(path.strip_prefix('/')?);
    (!path.starts_with("/..") && directory_id(&dir) == Some(id)).then(|| shortened(path))
}

/// A cgroup's directory, from the root of the hierarchy.
fn shown(mount: &Path, dir: &Path) -> String {
    let below = dir.strip_prefix(mount).unwrap_or(dir);
    shortened(Path::new("/").join(below).to_string_lossy().into_owned())
}

fn shortened(mut path: String) -> String {
    if path.len() > LONGEST {
        path.truncate(path.floor_char_boundary(LONGEST));
        path.push('…');
    }
    path
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn cgroups_are_found_by_their_ids_and_remembered() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(dir.path().join("a/b")).expect("cgroups");
        let id = |path: &str| directory_id(&dir.path().join(path)).expect("an id");
        let (root, b, now) = (id(""), id("a/b"), Instant::now());
        let mut identities = Identities::new(dir.path(), &BTreeMap::new());
        // No task of that number is in such a directory.
        assert_eq!(identities.cgroup(b, Some(std::process::id()), now), Some("/a/b"));
        assert_eq!(identities.cgroup(root, None, now), Some("/"));
        // Gone, and still known; new, and known after the next walk.
        fs::remove_dir(dir.path().join("a/b")).expect("it ends");
        fs::create_dir(dir.path().join("c")).expect("another");
        assert_eq!(identities.cgroup(b, None, now), Some("/a/b"));
        let c = id("c");
        if c != b {
            assert_eq!(identities.cgroup(c, None, now), None);
            assert_eq!(identities.cgroup(c, None, now + WALK_AGAIN), Some("/c"));
        }
        assert_eq!(Identities::default().cgroup(b, None, now), None);
    }

    #[test]
    fn users_have_the_names_that_the_configuration_gives_them() {
        let root = BTreeMap::from([(
            Account::User("admin".to_owned()),
            Some(BTreeSet::from([Uid(0), Uid(4_000_000_000)])),
        )]);
        let mut identities = Identities::new(Path::new(""), &root);
        assert_eq!(identities.user(0), Some("admin"));
        assert_eq!(identities.user(4_000_000_000), Some("admin"));
        identities.follow(Path::new(""), &BTreeMap::new());
        assert_eq!(identities.user(0), Some("root"));
        assert_eq!(identities.user(4_000_000_000), None);
    }
}
