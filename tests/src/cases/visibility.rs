//! What must outlive the daemon, or be found by other processes, lies where the host sees it, or nothing claims so
//! (F1): on a host of its own, that is a mount and a process namespace in which no bpffs is mounted.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::Case;
use crate::{
    backend::EBPF,
    world::{Daemon, Listener, NOBODY, Ran, World, binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f1_a_bpffs_mounted_on_the_host_outlives_the_daemon).on(EBPF),
        case!(f1_no_bpffs_is_mounted_in_a_private_namespace).on(EBPF),
        case!(f1_auto_takes_nftables_in_a_private_namespace).on(EBPF),
        case!(f1_a_bpffs_is_mounted_where_the_host_receives_it).on(EBPF),
        case!(f1_a_private_bpffs_is_degraded).on(EBPF),
        case!(f1_a_hidden_socket_and_state_are_degraded),
        case!(f1_an_unreadable_mount_table_of_the_host_is_no_permission).on(EBPF),
    ]
}

/// A host of its own: all but the mount and the process namespace is shared with this one, so that the world's
/// listener, cgroup and files are there. PID 1 holds it; when that ends, so does everything that is mounted there.
pub(super) struct Host {
    init: Child,
    pid: String,
    pub(super) world: World,
    _listener: Listener,
}

impl Drop for Host {
    /// The namespace's own first process is gone only when all others in it are: a daemon that still ran would make
    /// again what the world removes. `unshare` ends after it.
    fn drop(&mut self) {
        if let Ok(pid) = self.pid.parse() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = until("the host is gone", || Ok(self.init.try_wait()?.is_some()));
        let _ = self.init.kill();
        let _ = self.init.wait();
    }
}

impl Host {
    /// Mounts are `private` or `shared`.
    pub(super) fn new(propagation: &str) -> Result<Self> {
        let world = World::new()?;
        let listener = world.listen()?;
        world.attack(NOBODY).reaches()?;
        let without = format!("mount --make-r{propagation} /; umount --all --types bpf; exec sleep 600");
        let init = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["sh", "-c", &without])
            .stdin(Stdio::null())
            // It has a word on how its child ended.
            .stderr(Stdio::null())
            .spawn()?;
        let mut pid = String::new();
        until("the host's init runs", || {
            pid = child_of(init.id())?;
            Ok(fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep"))
        })?;
        Ok(Self {
            init,
            pid,
            world,
            _listener: listener,
        })
    }

    pub(super) fn configure(&self, backend: &str) -> Result<()> {
        self.world.configure(&format!(
            "backend = {backend:?}\n[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\n",
            self.world.here()
        ))
    }

    /// A program on it.
    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid, "--mount", "--pid"]).arg(program);
        command
    }

    /// The binary on it.
    pub(super) fn enforcer(&self, arguments: &[&str]) -> Result<Ran> {
        let mut command = self.command(&binary("enforcer")?);
        ran(command
            .arg("--config")
            .arg(self.world.path("enforcer.toml"))
            .args(arguments))
    }

    /// The binary in a mount namespace that the host does not share, after some preparation.
    fn private(&self, unshare: &[&str], preparation: &str) -> Result<Command> {
        let mut command = self.command(Path::new("unshare"));
        let script = format!("{preparation} shift; exec \"$@\"");
        command.arg("--mount").args(unshare).args(["sh", "-c", &script, "sh"]);
        command.arg(self.world.path("")).arg(binary("enforcer")?);
        Ok(command)
    }

    fn privately(&self, unshare: &[&str], preparation: &str, arguments: &[&str]) -> Result<Ran> {
        let mut command = self.private(unshare, preparation)?;
        ran(command
            .arg("--config")
            .arg(self.world.path("enforcer.toml"))
            .args(arguments))
    }

    fn has_bpffs(&self) -> Result<bool> {
        let mounts = ran(self.command(Path::new("cat")).arg("/proc/mounts"))?
            .demand(0)?
            .stdout;
        Ok(mounts.contains(" /sys/fs/bpf bpf "))
    }

    /// That the endpoint is guarded, and that a command on the host says so.
    pub(super) fn is_guarded(&self) -> Result<()> {
        self.world.attack(NOBODY).is_refused()?;
        self.allows_root_alone()
    }

    fn allows_root_alone(&self) -> Result<()> {
        self.world.attack(0).reaches()?;
        let here = self.world.here().to_string();
        self.enforcer(&["check", "nobody", &here])?.demand(1)?;
        self.enforcer(&["check", "root", &here])?.demand(0).map(drop)
    }
}

/// The process that a process has forked, as nsenter and unshare do to enter a process namespace.
fn child_of(pid: u32) -> Result<String> {
    Ok(fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?
        .trim()
        .to_owned())
}

/// As `kill -9`, of a daemon that nsenter has started.
pub(super) fn crash(daemon: Daemon) -> Result<()> {
    kill(Pid::from_raw(child_of(daemon.pid())?.parse()?), Signal::SIGKILL)?;
    let mut daemon = daemon;
    daemon.wait().map(drop)
}

fn f1_a_bpffs_mounted_on_the_host_outlives_the_daemon() -> Result<()> {
    let host = Host::new("private")?;
    host.configure("ebpf")?;
    ensure!(!host.has_bpffs()?, "a bpffs is mounted already");
    let daemon = host.world.daemon_with(&mut host.command(&binary("enforcer")?))?;
    ensure!(host.has_bpffs()?, "the daemon has mounted none");
    host.is_guarded()?;
    host.enforcer(&["status"])?.demand(0)?;
    crash(daemon)?;
    host.is_guarded()?;
    host.enforcer(&["unload"])?.demand(0)?;
    host.world.attack(NOBODY).reaches()
}

fn f1_no_bpffs_is_mounted_in_a_private_namespace() -> Result<()> {
    let host = Host::new("private")?;
    host.configure("ebpf")?;
    for arguments in [["apply"], ["run"]] {
        let refused = host.privately(&[], "", &arguments)?.demand(2)?.stderr;
        for part in ["/sys/fs/bpf", "mount namespace", "mount -t bpf bpf /sys/fs/bpf"] {
            ensure!(refused.contains(part), "no {part} in {refused}");
        }
    }
    // A slave, as systemd gives to units with PrivateTmp= and the like.
    let refused = host.privately(&["--propagation", "slave"], "", &["apply"])?.demand(2)?;
    ensure!(refused.stderr.contains("mount namespace"), "{refused:?}");
    ensure!(!host.has_bpffs()?, "a bpffs was mounted");
    host.world.attack(NOBODY).reaches()?;
    // What the message says is a remedy.
    let mut mount = host.command(Path::new("mount"));
    ran(mount.args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))?.demand(0)?;
    host.privately(&[], "", &["apply"])?.demand(0)?;
    host.is_guarded()
}

fn f1_auto_takes_nftables_in_a_private_namespace() -> Result<()> {
    let host = Host::new("private")?;
    host.configure("auto")?;
    let is_refused_by_nftables = || {
        let errno = host.world.attack(NOBODY).run()?.errno;
        ensure!(errno == Some(libc::ECONNREFUSED), "{errno:?}");
        host.allows_root_alone()
    };
    host.privately(&[], "", &["apply"])?.demand(0)?;
    is_refused_by_nftables()?;
    host.enforcer(&["unload"])?.demand(0)?;
    let _daemon = host.world.daemon_with(&mut host.private(&[], "")?)?;
    is_refused_by_nftables()?;
    let status: serde_json::Value = serde_json::from_str(&host.enforcer(&["status", "--json"])?.demand(0)?.stdout)?;
    ensure!(status["backend"] == "nftables", "{status}");
    ensure!(
        status["backend_reason"].to_string().contains("mount namespace"),
        "{status}"
    );
    Ok(())
}

fn f1_a_bpffs_is_mounted_where_the_host_receives_it() -> Result<()> {
    let host = Host::new("shared")?;
    host.configure("ebpf")?;
    host.privately(&["--propagation", "unchanged"], "", &["apply"])?
        .demand(0)?;
    ensure!(host.has_bpffs()?, "the host did not receive the bpffs");
    host.is_guarded()
}

fn f1_a_private_bpffs_is_degraded() -> Result<()> {
    let host = Host::new("private")?;
    host.configure("ebpf")?;
    let mounted = "mount -t bpf -o mode=0700 bpf /sys/fs/bpf &&";
    let applied = host.privately(&[], mounted, &["apply"])?.demand(1)?;
    for part in ["degraded", "pin directory", "ends with the namespace"] {
        ensure!(applied.stdout.contains(part), "no {part} in {applied:?}");
    }
    // As it says: it ends with the namespace, which the kernel takes down in its own time, and the host sees nothing.
    until("enforcement has ended", || {
        Ok(host.world.attack(NOBODY).run()?.errno.is_none())
    })?;
    host.enforcer(&["status"])?.demand(1)?;
    // A daemon, the namespace of which goes on with it.
    let _daemon = host.world.daemon_with(&mut host.private(&[], mounted)?)?;
    host.world.attack(NOBODY).is_refused()?;
    let status = host.enforcer(&["status"])?.demand(1)?;
    ensure!(status.stdout.contains("mount the bpffs on the host"), "{status:?}");
    let report = host.privately(
        &[],
        &format!("{mounted} mkdir -m 0700 {} &&", host.world.pins().display()),
        &["doctor", "--json"],
    )?;
    let report: serde_json::Value = serde_json::from_str(&report.demand(1)?.stdout)?;
    let findings = report["findings"].as_array().cloned().unwrap_or_default();
    let found = findings.iter().find(|finding| finding["id"] == "hidden-from-host");
    ensure!(found.is_some_and(|found| found["weight"] == "high"), "{report}");
    Ok(())
}

fn f1_a_hidden_socket_and_state_are_degraded() -> Result<()> {
    let host = Host::new("private")?;
    host.configure(crate::backend::Backend::current().configured())?;
    let mut mount = host.command(Path::new("mount"));
    ran(mount.args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))?;
    for name in ["run", "state"] {
        let dir = host.world.path(name);
        fs::create_dir_all(&dir)?;
        fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    }
    host.enforcer(&["apply"])?.demand(0)?;
    let hide = |name: &str| format!("mount -t tmpfs -o mode=0700 tmpfs \"$1/{name}\" &&");
    for (name, says) in [("run", "control socket"), ("state", "state directory")] {
        let daemon = host.world.daemon_with(&mut host.private(&[], &hide(name))?)?;
        ensure!(daemon.log().contains(says), "no {says} in {}", daemon.log());
        if name == "state" {
            let status = host.enforcer(&["status"])?.demand(1)?;
            ensure!(status.stdout.contains(says), "no {says} in {status:?}");
        }
        host.is_guarded()?;
        crash(daemon)?;
    }
    host.enforcer(&["unload"])?.demand(0).map(drop)
}

fn f1_an_unreadable_mount_table_of_the_host_is_no_permission() -> Result<()> {
    let host = Host::new("private")?;
    host.configure("ebpf")?;
    // A /proc that shows no other processes.
    let blind = "mount -t tmpfs tmpfs /proc && mkdir /proc/1 /proc/self && touch /proc/self/mountinfo &&";
    let refused = host.privately(&[], blind, &["apply"])?.demand(2)?.stderr;
    ensure!(refused.contains("/proc/1/mountinfo"), "{refused}");
    host.world.attack(NOBODY).reaches()
}
