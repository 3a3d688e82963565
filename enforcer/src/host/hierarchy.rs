//! The cgroup v2 hierarchy as it is mounted here (F9): the mount that shows all of it, or how much is shown.
//!
//! A bind mount shows it from some cgroup on; so does a mount made in a cgroup namespace, which looks like the whole.
//! What tells them from the whole is that the true root alone has no `cgroup.events`
//! (Documentation/admin-guide/cgroup-v2.rst).

use std::{
    collections::VecDeque,
    fs, io,
    path::{Component, Path, PathBuf},
};

use super::mounts::{Mount, Mounts};

/// The cgroup namespace that the kernel starts with (`PROC_CGROUP_INIT_INO` in `include/uapi/linux/nsfs.h`).
const INITIAL_NAMESPACE: &str = "cgroup:[4026531835]";

/// A mount of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where.
    pub mount: PathBuf,
    /// From which cgroup on, as this process's cgroup namespace has it.
    pub shown: PathBuf,
    /// How deep that lies below the true root; none where it is not known.
    pub depth: Option<u32>,
}

impl Hierarchy {
    /// The mount to use, if there is any: one that shows everything before others, and never one that another mount
    /// hides.
    pub fn find() -> io::Result<Option<Self>> {
        let is_initial =
            fs::read_link("/proc/self/ns/cgroup").map_or(true, |name| name == Path::new(INITIAL_NAMESPACE));
        Ok(Self::among(&Mounts::own()?, is_root, is_initial))
    }

    fn among(mounts: &Mounts, is_root: impl Fn(&Path) -> bool, is_initial: bool) -> Option<Self> {
        let found = mounts.of_kind("cgroup2").filter(|mount| mounts.is_visible(mount));
        let depth = |mount: &Mount| {
            let named = mount
                .root
                .components()
                .filter(|part| matches!(part, Component::Normal(_)));
            match (is_root(&mount.point), is_initial) {
                (true, _) => Some(0),
                (false, true) => u32::try_from(named.count()).ok(),
                (false, false) => None,
            }
        };
        let all = found.map(|mount| Self {
            mount: mount.point.clone(),
            shown: mount.root.clone(),
            depth: depth(mount),
        });
        // Of equals the first.
        all.min_by_key(|one| one.depth.unwrap_or(u32::MAX))
    }
}

/// Whether a directory is the true root of the hierarchy, or no cgroup at all.
#[must_use]
pub fn is_root(dir: &Path) -> bool {
    fs::symlink_metadata(dir.join("cgroup.events")).is_err()
}

/// Most cgroups that are looked into: a user to whom a subtree is delegated makes as many as he likes.
const MOST: usize = 1 << 16;

/// A cgroup's directory and all below it, with how deep each lies below it. Breadth first: whoever makes many of them
/// makes them deep below. Ends after [`MOST`].
pub(crate) fn walk(top: &Path) -> impl Iterator<Item = (PathBuf, u32)> + use<> {
    let mut waiting = VecDeque::from([(top.to_path_buf(), 0)]);
    std::iter::from_fn(move || {
        let (dir, depth) = waiting.pop_front()?;
        if waiting.len() < MOST {
            // A cgroup that has just been removed is no fault.
            let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
            let children = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            waiting.extend(children.map(|entry| (entry.path(), depth + 1)));
        }
        Some((dir, depth))
    })
    .take(MOST)
}

/// The path of a cgroup below a mount, as rules have it; none where its name is no text.
pub(crate) fn path_below(mount: &Path, dir: &Path) -> Option<String> {
    dir.strip_prefix(mount).ok()?.to_str().map(|below| format!("/{below}"))
}

/// The cgroup below a mount that lists a process's first thread, of which `/proc` may show nothing (proc(5),
/// `hidepid=`); none where no cgroup does, or where that has no name that a rule can have. Where cgroups are threaded,
/// `cgroup.procs` would name the domain's root.
#[must_use]
pub(crate) fn listing(mount: &Path, pid: u32) -> Option<String> {
    let pid = pid.to_string();
    let lists = |cgroup: &Path| {
        let members = fs::read_to_string(cgroup.join("cgroup.threads")).unwrap_or_default();
        members.lines().any(|member| member == pid)
    };
    let (found, _) = walk(mount).find(|(cgroup, _)| lists(cgroup))?;
    path_below(mount, &found)
}

/// How deep below the true root a directory lies that paths of cgroups start from.
pub(crate) fn depth(mount: &Path) -> Option<u32> {
    if is_root(mount) {
        return Some(0);
    }
    let found = Hierarchy::find().ok().flatten().filter(|found| found.mount == mount);
    found.and_then(|found| found.depth)
}

/// Processes whose cgroup a mount does not show, as far as they are seen from here.
#[must_use]
pub fn outside(shown: &Path) -> Vec<u32> {
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_outside = |pid: &u32| {
        let text = fs::read(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        super::cgroup2_of(&text).is_some_and(|path| {
            let path = String::from_utf8_lossy(path);
            let path = Path::new(&*path);
            path.components().any(|part| part == Component::ParentDir) || !path.starts_with(shown)
        })
    };
    let mut found: Vec<u32> = pids.filter(is_outside).collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use super::*;

    const HOST: &str = "\
22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /sys rw shared:2 - sysfs sysfs rw
";
    const WHOLE: &str = "25 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";
    const PART: &str = "24 22 0:26 /system.slice/a.service /jail/cg rw shared:4 - cgroup2 cgroup2 rw\n";
    const HIDING: &str = "31 25 0:40 / /sys/fs/cgroup rw shared:9 - tmpfs tmpfs rw\n";

    fn find(lines: &[&str], root: &str, is_initial: bool) -> Option<(String, Option<u32>)> {
        let mounts = Mounts::parse([&[HOST], lines].concat().concat().as_bytes());
        let found = Hierarchy::among(&mounts, |point| point == Path::new(root), is_initial)?;
        Some((found.mount.display().to_string(), found.depth))
    }

    fn at(mount: &str, depth: Option<u32>) -> (String, Option<u32>) {
        (mount.to_owned(), depth)
    }

    #[test]
    fn f9_the_whole_comes_before_a_part_wherever_it_is_listed() {
        assert_eq!(find(&[], "/sys/fs/cgroup", true), None);
        for lines in [[PART, WHOLE], [WHOLE, PART]] {
            assert_eq!(
                find(&lines, "/sys/fs/cgroup", true),
                Some(at("/sys/fs/cgroup", Some(0)))
            );
            assert_eq!(
                find(&lines, "/sys/fs/cgroup", false),
                Some(at("/sys/fs/cgroup", Some(0)))
            );
        }
        assert_eq!(find(&[PART], "/sys/fs/cgroup", true), Some(at("/jail/cg", Some(2))));
        let deeper = PART.replace("a.service", "a.service/b").replace("/jail", "/other");
        assert_eq!(find(&[&deeper, PART], "", true), Some(at("/jail/cg", Some(2))));
    }

    #[test]
    fn f9_what_is_hidden_is_not_taken() {
        let elsewhere = WHOLE
            .replace("25 23", "40 22")
            .replace("/sys/fs/cgroup rw", "/run/cgroup2 rw");
        let whole = |lines: &[&str]| find(lines, "/run/cgroup2", true);
        assert_eq!(whole(&[WHOLE, HIDING, &elsewhere]), Some(at("/run/cgroup2", Some(0))));
        assert_eq!(whole(&[WHOLE, HIDING]), None);
        let below = HIDING
            .replace("31 25", "31 23")
            .replace("/sys/fs/cgroup rw", "/sys/fs rw");
        assert_eq!(whole(&[WHOLE, &below, &elsewhere]), Some(at("/run/cgroup2", Some(0))));
    }

    #[test]
    fn a_process_is_where_it_is_listed() {
        let root = tempfile::tempdir().expect("a directory");
        for (cgroup, members) in [("", "1\n2\n"), ("a", "30\n"), ("a/b", "3\n4\n"), ("c", "")] {
            let dir = root.path().join(cgroup);
            fs::create_dir_all(&dir).expect("a directory");
            fs::write(dir.join("cgroup.threads"), members).expect("a file");
        }
        for (pid, expected) in [(2, Some("/")), (30, Some("/a")), (3, Some("/a/b")), (0, None)] {
            assert_eq!(listing(root.path(), pid).as_deref(), expected, "{pid}");
        }
    }

    #[test]
    fn f9_a_namespaces_own_root_is_not_the_true_one() {
        assert_eq!(find(&[WHOLE], "", false), Some(at("/sys/fs/cgroup", None)));
        // Inherited from outside it is, whatever it is called from within.
        let inherited = WHOLE.replace(" / /sys", " /../.. /sys");
        assert_eq!(
            find(&[&inherited], "/sys/fs/cgroup", false),
            Some(at("/sys/fs/cgroup", Some(0)))
        );
    }
}
