//! cgroup v1 with `net_cls`, by which iptables rules of jammy's stemcells match.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result, ensure};

use crate::world::{World, ran, until};

/// What such rules let through.
pub const CLASSID: &str = "2958295041";

/// Held by whoever has a hierarchy of cgroup v1 with `net_cls`, of which a kernel has one.
pub static ALONE: Mutex<()> = Mutex::new(());

/// Where the host has the controller mounted that rules of jammy's match by.
pub fn mounted() -> Result<Option<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    Ok(mounts.lines().find_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let is_it = words.get(2) == Some(&"cgroup") && words.get(3)?.split(',').any(|option| option == "net_cls");
        is_it.then_some(PathBuf::from(*words.get(1)?))
    }))
}

/// Ends a hierarchy that only a mount namespace had, which has gone. It stays, without a mount, if a group of it was
/// still being released then; so it is mounted once more, where no other case sees it.
pub fn end(place: &Path) -> Result<()> {
    until("the hierarchy is gone", || {
        if !fs::read_to_string("/proc/self/cgroup")?.contains(":net_cls:") {
            return Ok(true);
        }
        let again = "mount -t cgroup -o net_cls none \"$1\"; sleep 0.1";
        let mut command = Command::new("unshare");
        ran(command.args(["--mount", "sh", "-c", again, "sh"]).arg(place))?;
        Ok(false)
    })
}

/// A hierarchy of cgroup v1 with `net_cls`, seen in a mount namespace of its own unless the host has it, with the group
/// that rules of jammy's let through.
#[derive(Debug)]
pub struct NetCls {
    /// Where it is mounted, in its mount namespace.
    pub place: PathBuf,
    is_hosts: bool,
    holder: Child,
    _alone: MutexGuard<'static, ()>,
}

impl NetCls {
    /// `None` where the kernel has none.
    pub fn new(world: &World) -> Result<Option<Self>> {
        if !fs::read_to_string("/proc/cgroups")?.contains("\nnet_cls\t") {
            return Ok(None);
        }
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (is_hosts, place) = match mounted()? {
            Some(place) => (true, place),
            None => (false, world.path("net_cls")),
        };
        let script = "set -e; [ -n \"$3\" ] || { mkdir \"$1\"; mount -t cgroup -o net_cls none \"$1\"; }\n\
            mkdir -p \"$1/monit-api-access\"; echo \"$2\" > \"$1/monit-api-access/net_cls.classid\"; echo ready; exec \
            sleep 600";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh"]).arg(&place);
        command.args([CLASSID, if is_hosts { "hosts" } else { "" }]);
        let holder = command.stdout(Stdio::piped()).spawn()?;
        let mut this = Self {
            place,
            is_hosts,
            holder,
            _alone: alone,
        };
        let mut said = String::new();
        BufReader::new(this.holder.stdout.take().context("no stdout")?).read_line(&mut said)?;
        ensure!(said == "ready\n", "net_cls cannot be mounted: {said:?}");
        Ok(Some(this))
    }

    /// A process in its mount namespace.
    #[must_use]
    pub fn holder(&self) -> u32 {
        self.holder.id()
    }
}

impl Drop for NetCls {
    fn drop(&mut self) {
        let group = self.place.join("monit-api-access");
        let mut remove = Command::new("nsenter");
        remove.arg(format!("--mount=/proc/{}/ns/mnt", self.holder()));
        remove.args(["--", "rmdir"]).arg(group);
        let _ = until("the group is empty", || Ok(ran(&mut remove)?.code == 0));
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        if !self.is_hosts {
            let _ = end(&self.place);
        }
    }
}
