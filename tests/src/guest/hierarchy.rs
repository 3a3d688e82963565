//! cgroup hierarchies: version 2 alone, beside version 1, or not there at all.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use serde::Deserialize;

const ROOT: &str = "/sys/fs/cgroup";
/// Controllers of version 1, each with a hierarchy of its own where the kernel has it.
const CONTROLLERS: [&str; 4] = ["cpu,cpuacct", "memory", "pids", "net_cls,net_prio"];

/// How the hierarchies are mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Layout {
    /// Version 2 at `/sys/fs/cgroup`.
    Unified,
    /// Version 1, and version 2 without controllers at `/sys/fs/cgroup/unified`.
    Hybrid,
    /// Version 1 alone.
    None,
}

impl Layout {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Unified => "unified",
            Self::Hybrid => "hybrid",
            Self::None => "none",
        }
    }
}

/// Unmounts what is there and mounts what is wanted.
pub(super) fn lay_out(layout: Layout) -> Result<()> {
    clear()?;
    let root = Path::new(ROOT);
    match layout {
        Layout::Unified => attach("cgroup2", root, None),
        Layout::Hybrid => {
            version_1(root)?;
            let unified = root.join("unified");
            fs::create_dir(&unified)?;
            attach("cgroup2", &unified, None)
        }
        Layout::None => version_1(root),
    }
}

/// As distributions did it: a directory of hierarchies, one of which has no controller.
fn version_1(root: &Path) -> Result<()> {
    attach("tmpfs", root, None)?;
    let there = fs::read_to_string("/proc/cgroups")?;
    let has = |name: &str| there.lines().any(|line| line.split('\t').next() == Some(name));
    for group in CONTROLLERS {
        let names: Vec<&str> = group.split(',').filter(|name| has(name)).collect();
        if names.is_empty() {
            continue;
        }
        let dir = root.join(group);
        fs::create_dir(&dir)?;
        // Newer kernels may have a controller for version 2 alone.
        match attach("cgroup", &dir, Some(&names.join(","))) {
            Err(error) if error.downcast_ref::<Errno>() == Some(&Errno::EINVAL) => fs::remove_dir(&dir)?,
            result => result?,
        }
    }
    let systemd = root.join("systemd");
    fs::create_dir(&systemd)?;
    attach("cgroup", &systemd, Some("none,name=systemd"))
}

fn attach(kind: &str, at: &Path, options: Option<&str>) -> Result<()> {
    // A controller is free only when the hierarchy that had it before has died, a moment after its unmounting.
    for _ in 0..100 {
        match mount(Some(kind), at, Some(kind), MsFlags::empty(), options) {
            Err(Errno::EBUSY) => thread::sleep(Duration::from_millis(20)),
            result => {
                return result.with_context(|| format!("mount {kind} {} at {}", options.unwrap_or(""), at.display()));
            }
        }
    }
    bail!(
        "mount {kind} {} at {}: busy for 2 s",
        options.unwrap_or(""),
        at.display()
    )
}

/// Unmounts everything at and below the root, the last mounted first.
fn clear() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let points = mounts.lines().rev().filter_map(|line| line.split(' ').nth(1));
    for point in points.filter(|point| Path::new(point).starts_with(ROOT)) {
        umount2(point, MntFlags::empty()).with_context(|| format!("unmount {point}"))?;
    }
    Ok(())
}
