//! The mount table, and whether the host sees at a path what this process sees there (F1).
//!
//! What must outlive this process, or be found by another one, has to lie where the host's mount namespace has it too.
//! PID 1 stands for the host: its mount table is compared with our own. Both are world-readable, unlike `/proc/1/ns`
//! and `/proc/1/root`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use procfs_core::process::{MountInfo, MountOptFields};

/// A mount table as in man 5 `proc_pid_mountinfo`.
#[derive(Debug)]
pub struct Mounts(Vec<Mount>);

/// One mount.
#[derive(Debug)]
pub struct Mount {
    id: i32,
    parent: i32,
    /// Of the file system, as `st_dev` has it.
    device: String,
    /// Which directory of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// Mounts below it appear on every mount of this group.
    peers: Option<u32>,
    /// Its type.
    pub kind: String,
}

/// What another process finds at a path of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostView {
    /// The same file system and the same directory of it.
    Same,
    /// Something else.
    Other,
    /// It could not be determined, and why.
    Unknown(String),
}

impl Mounts {
    /// Of this process.
    pub fn own() -> io::Result<Self> {
        fs::read("/proc/self/mountinfo").map(|text| Self::parse(&text))
    }

    /// Of the host, as far as PID 1 stands for it.
    pub fn host() -> io::Result<Self> {
        if std::process::id() == 1 {
            return Err(io::Error::other(
                "this process is PID 1 of its container, so the host cannot be inspected",
            ));
        }
        let read = fs::read("/proc/1/mountinfo").map(|text| Self::parse(&text));
        read.map_err(|error| io::Error::other(format!("read /proc/1/mountinfo: {error}")))
    }

    /// From its text; a line that is none is left out.
    pub(crate) fn parse(text: &[u8]) -> Self {
        let lines = text.split(|byte| *byte == b'\n');
        let mounts = lines.filter_map(|line| MountInfo::from_line(&String::from_utf8_lossy(line)).ok());
        Self(mounts.map(Mount::from).collect())
    }

    /// Those of a type, in the order in which they were mounted.
    pub fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Mount> {
        self.0.iter().filter(move |mount| mount.kind == kind)
    }

    /// Whether its mount point leads to it: no later mount hides it.
    #[must_use]
    pub fn is_visible(&self, mount: &Mount) -> bool {
        self.reached(&mount.point).is_some_and(|reached| reached.id == mount.id)
    }

    /// The mount that an absolute path without links ends in. Goes as the kernel does, from the root on across each
    /// mount point on the way, so that a mount that a later one hides is not taken for it.
    fn reached(&self, path: &Path) -> Option<&Mount> {
        let crossed_first = |mounts: &mut dyn Iterator<Item = &Mount>| {
            let on_the_way = mounts.filter(|mount| path.starts_with(&mount.point));
            on_the_way
                .min_by_key(|mount| mount.point.components().count())
                .map(|mount| mount.id)
        };
        let is_listed = |id| self.0.iter().any(|mount| mount.id == id);
        let mut roots = self
            .0
            .iter()
            .filter(|mount| !is_listed(mount.parent) || mount.parent == mount.id);
        let mut at = crossed_first(&mut roots)?;
        // Each mount is crossed once at most.
        for _ in &self.0 {
            let mut below = self.0.iter().filter(|mount| mount.parent == at && mount.id != at);
            let Some(next) = crossed_first(&mut below) else { break };
            at = next;
        }
        self.0.iter().find(|mount| mount.id == at)
    }

    /// Which directory of which file system a path is.
    fn identity(&self, path: &Path) -> Option<(&str, PathBuf)> {
        let mount = self.reached(path)?;
        let inside = path.strip_prefix(&mount.point).ok()?;
        Some((&mount.device, mount.root.join(inside)))
    }
}

impl From<MountInfo> for Mount {
    fn from(info: MountInfo) -> Self {
        let peers = info.opt_fields.iter().find_map(|field| match field {
            MountOptFields::Shared(group) => Some(*group),
            MountOptFields::Master(_) | MountOptFields::PropagateFrom(_) | MountOptFields::Unbindable => None,
        });
        Self {
            id: info.mnt_id,
            parent: info.pid,
            device: info.majmin,
            root: unescape(&info.root),
            point: unescape(&info.mount_point.to_string_lossy()),
            peers,
            kind: info.fs_type,
        }
    }
}

/// Spaces, tabs, line feeds and backslashes are written as octal numbers (`mangle` in `fs/seq_file.c`).
fn unescape(text: &str) -> PathBuf {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        if let Some(byte) = part.get(..3).and_then(|octal| u8::from_str_radix(octal, 8).ok()) {
            plain.push(char::from(byte));
            plain.push_str(part.get(3..).unwrap_or_default());
        } else {
            plain.push('\\');
            plain.push_str(part);
        }
    }
    plain.into()
}

/// What this process sees and what the host sees, as they were at one time.
#[derive(Debug)]
pub struct Views(io::Result<(Mounts, Mounts)>);

impl Views {
    /// Reads both.
    #[must_use]
    pub fn read() -> Self {
        Self(Mounts::own().and_then(|own| Ok((own, Mounts::host()?))))
    }

    /// Whether the host finds at a path what this process finds there.
    #[must_use]
    pub fn seen_by_host(&self, path: &Path) -> HostView {
        self.compare(path, same)
    }

    /// Whether the host would see a file system that this process mounts at a path.
    #[must_use]
    pub fn host_would_see_mount(&self, path: &Path) -> HostView {
        self.compare(path, reaches)
    }

    fn compare(&self, path: &Path, is_so: fn(&Mounts, &Mounts, &Path) -> bool) -> HostView {
        match &self.0 {
            Ok((own, host)) if is_so(own, host, &resolved(path)) => HostView::Same,
            Ok(_) => HostView::Other,
            Err(error) => HostView::Unknown(error.to_string()),
        }
    }
}

/// Whether a path is the same directory in both tables.
fn same(own: &Mounts, host: &Mounts, path: &Path) -> bool {
    let own = own.identity(path);
    own.is_some() && own == host.identity(path)
}

/// Whether a mount on a path in the first table appears in the second: it is made on the same mount, or on one of its
/// peer group (Documentation/filesystems/sharedsubtree.rst; a slave receives mounts and sends none).
fn reaches(own: &Mounts, host: &Mounts, path: &Path) -> bool {
    match (own.reached(path), host.reached(path)) {
        (Some(own), Some(host)) => own.id == host.id || (own.peers.is_some() && own.peers == host.peers),
        (None, _) | (_, None) => false,
    }
}

/// A path with the links resolved in as much of it as exists.
fn resolved(path: &Path) -> PathBuf {
    let found = path
        .ancestors()
        .find_map(|there| Some((there, fs::canonicalize(there).ok()?)));
    match found {
        Some((there, real)) => path
            .strip_prefix(there)
            .map_or_else(|_| real.clone(), |rest| real.join(rest)),
        None => path.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with systemd: everything is shared, `/var` is a file system of its own.
    const HOST: &str = "\
22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /sys rw shared:2 - sysfs sysfs rw
24 23 0:30 / /sys/fs/bpf rw shared:3 - bpf bpf rw,mode=700
25 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw
26 22 8:2 / /var rw shared:5 - ext4 /dev/sda2 rw
27 22 0:23 / /run rw shared:6 - tmpfs tmpfs rw
";
    /// A unit with `PrivateTmp=yes` and `StateDirectory=` there: slaves of the host's mounts, and a `/tmp` of its own.
    const UNIT: &str = "\
122 99 8:1 / / rw master:1 - ext4 /dev/sda1 rw
123 122 0:21 / /sys rw master:2 - sysfs sysfs rw
124 123 0:30 / /sys/fs/bpf rw master:3 - bpf bpf rw,mode=700
125 123 0:26 / /sys/fs/cgroup rw master:4 - cgroup2 cgroup2 rw
126 122 8:2 / /var rw master:5 - ext4 /dev/sda2 rw
127 122 0:23 / /run rw master:6 - tmpfs tmpfs rw
128 126 8:2 /lib/enforcer /var/lib/enforcer rw master:5 - ext4 /dev/sda2 rw
129 122 8:1 /tmp/systemd-private-1/tmp /tmp rw master:1 - ext4 /dev/sda1 rw
";

    fn same(own: &str, host: &str, path: &str) -> bool {
        super::same(
            &Mounts::parse(own.as_bytes()),
            &Mounts::parse(host.as_bytes()),
            Path::new(path),
        )
    }

    fn reaches(own: &str, host: &str) -> bool {
        let path = Path::new("/sys/fs/bpf");
        super::reaches(&Mounts::parse(own.as_bytes()), &Mounts::parse(host.as_bytes()), path)
    }

    fn without_bpffs(table: &str) -> String {
        let lines = table.lines().filter(|line| !line.contains(" bpf "));
        lines.flat_map(|line| [line, "\n"]).collect()
    }

    #[test]
    fn a_unit_sees_the_hosts_bpffs_state_and_socket_but_has_its_own_tmp() {
        for path in [
            "/sys/fs/bpf/enforcer",
            "/var/lib/enforcer/last-good.json",
            "/run/enforcer",
            "/sys/fs/cgroup",
        ] {
            assert!(same(UNIT, HOST, path), "{path}");
        }
        assert!(!same(UNIT, HOST, "/tmp/enforcer"));
    }

    #[test]
    fn a_bpffs_of_ones_own_is_not_the_hosts() {
        let own = UNIT.replace("0:30", "0:77");
        assert!(!same(&own, HOST, "/sys/fs/bpf/enforcer"));
        // Nor is one that hides the host's, or one where the host has none.
        let over = format!("{UNIT}130 124 0:77 / /sys/fs/bpf rw - bpf bpf rw\n");
        assert!(!same(&over, HOST, "/sys/fs/bpf/enforcer"));
        assert!(!same(UNIT, &without_bpffs(HOST), "/sys/fs/bpf/enforcer"));
    }

    #[test]
    fn a_mount_reaches_the_host_in_its_namespace_and_by_a_shared_parent_alone() {
        let (host, unit) = (without_bpffs(HOST), without_bpffs(UNIT));
        assert!(reaches(&host, &host), "the host's own namespace");
        assert!(!reaches(&unit, &host), "slaves receive, and do not send");
        assert!(!reaches(&unit.replace("master:2 ", ""), &host), "private");
        assert!(reaches(&unit.replace("master:2", "shared:2"), &host), "one peer group");
        assert!(
            !reaches(&unit.replace("master:2", "shared:8"), &host),
            "another peer group"
        );
    }

    #[test]
    fn what_a_later_mount_hides_is_not_reached() {
        let table = "\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 0:30 / /a/b rw - tmpfs tmpfs rw
3 1 0:31 / /a rw - tmpfs tmpfs rw
4 3 0:32 / /a rw - tmpfs tmpfs rw
";
        let table = Mounts::parse(table.as_bytes());
        let reached = |path| table.reached(Path::new(path)).map(|mount| mount.id);
        assert_eq!(reached("/a/b/c"), Some(4));
        assert_eq!(reached("/ab"), Some(1));
    }

    #[test]
    fn escaped_names_and_odd_lines() {
        let table = b"1 0 8:1 / / rw - ext4 /dev/sda1 rw\nnonsense\n\xff\n\
            2 1 0:30 /x\\040y /m\\134n\\040o rw - cgroup2 cgroup2 rw\n";
        let table = Mounts::parse(table);
        let found: Vec<_> = table
            .of_kind("cgroup2")
            .map(|mount| (&*mount.root, &*mount.point))
            .collect();
        assert_eq!(found, [(Path::new("/x y"), Path::new("/m\\n o"))]);
        assert_eq!(table.0.len(), 2);
    }

    #[test]
    fn a_root_that_no_mount_is_listed_for_has_no_identity() {
        // As in a chroot whose root is no mount point.
        let table = "9 1 0:21 / /proc rw - proc proc rw\n";
        assert!(!same(table, table, "/sys/fs/bpf"));
    }
}
