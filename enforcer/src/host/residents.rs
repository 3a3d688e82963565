//! Whether a cgroup is a job's alone, or holds what supervises others as well (B4): whoever lets that in lets in all
//! that it starts.

use std::{fs, path::Path};

use super::{hierarchy, read_lossy, status_field};

/// Names of processes that start what is not theirs: BOSH's agent and monit, runit, systemd.
const SUPERVISORS: [&str; 7] = [
    "bosh-agent",
    "monit",
    "monit-actual",
    "runsv",
    "runsvdir",
    "systemd",
    "init",
];
/// Units of theirs, which they may be about to start in.
const UNITS: [&str; 5] = [
    "agent.service",
    "bosh-agent.service",
    "init.scope",
    "monit.service",
    "runit.service",
];
/// Most cgroups that are looked into: more than a job has.
const MOST: usize = 1 << 12;

/// What a cgroup holds besides a job, in words; none where nothing is found.
#[must_use]
pub fn supervisor(mount: &Path, cgroup: &str) -> Option<String> {
    let last = cgroup.rsplit('/').next().unwrap_or_default();
    if UNITS.contains(&last) {
        return Some(format!("everything that {last} starts"));
    }
    let dirs = hierarchy::walk(&mount.join(cgroup.trim_start_matches('/')));
    for (number, (dir, _)) in dirs.enumerate() {
        if number >= MOST {
            return Some(format!("more than {MOST} cgroups"));
        }
        // Of a threaded cgroup it cannot be read; its processes are those of an ancestor.
        let members = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for pid in members.lines().filter_map(|line| line.parse().ok()) {
            if let Some(name) = supervises(pid) {
                return Some(format!("{name} (pid {pid}) with everything that it starts"));
            }
        }
    }
    None
}

/// The name of a process that supervises others: root's, and started by init or another of them. A job can have itself
/// any name, and calls monit by monit's own.
fn supervises(pid: u32) -> Option<&'static str> {
    let process = Process::read(pid)?;
    let name = process.supervisor()?;
    let started_by = Process::read(process.parent);
    (process.parent <= 1 || started_by.is_some_and(|parent| parent.supervisor().is_some())).then_some(name)
}

/// What `/proc/PID/status` says of a process (proc(5)).
struct Process {
    name: String,
    parent: u32,
    uid: u32,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let status = read_lossy(format!("/proc/{pid}/status")).ok()?;
        let field = |name| status_field(&status, name);
        Some(Self {
            name: field("Name")?.to_owned(),
            parent: field("PPid")?.parse().ok()?,
            uid: field("Uid")?.split_whitespace().next()?.parse().ok()?,
        })
    }

    fn supervisor(&self) -> Option<&'static str> {
        let found = SUPERVISORS.into_iter().find(|name| *name == self.name);
        found.filter(|_| self.uid == 0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn units_of_supervisors_are_known_by_name() {
        let root = tempfile::tempdir().expect("a directory");
        for unit in UNITS {
            assert!(
                supervisor(root.path(), &format!("/system.slice/{unit}")).is_some(),
                "{unit}"
            );
        }
        for other in [
            "/system.slice/job.service",
            "/system.slice/runc-bpm-job.scope",
            "/a/my-agent.service",
        ] {
            assert_eq!(supervisor(root.path(), other), None, "{other}");
        }
    }
}
