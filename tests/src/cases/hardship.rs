//! F1, F3, F4, F10: a host that runs out of disk, descriptors or memory: what is enforced stays enforced, the cause is
//! reported, and all recovers.

use std::{
    fs,
    io::Write as _,
    os::unix::{fs::DirBuilderExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Case, faults::limit_files};
use crate::{
    backend::{ALL, Backend},
    world::{Daemon, Listener, NOBODY, World, binary, cgroup_mount, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f4_a_full_disk_degrades_and_opens_nothing).on(ALL),
        case!(f4_a_read_only_disk_degrades_and_opens_nothing).on(ALL),
        case!(f3_a_start_with_few_descriptors_works_or_says_why).on(BINARY),
        case!(f4_a_daemon_with_few_descriptors_enforces_or_says_why),
        case!(f10_callers_that_take_every_descriptor_open_nothing).on(ALL),
        case!(f1_a_daemon_without_memory_leaves_its_verdicts).on(ALL),
    ]
}

/// Where the binary is started as it is: what takes BPF from it first has files of its own to open.
const BINARY: &[Backend] = &[Backend::Ebpf, Backend::Nftables, Backend::Both];
/// Somebody who may be let in.
const OTHER: u32 = 33;

/// One endpoint of root's, which may be granted, and as many more where nobody is.
fn configure(world: &World, more: u32) -> Result<()> {
    let port = world.port;
    let mut endpoints = vec![format!("tcp://{}", world.here())];
    endpoints.extend((0..more).map(|number| format!("tcp://10.{}.{}.1:{port}", number / 256, number % 256)));
    world.configure(&format!(
        "[target.main]\nendpoints = {endpoints:?}\nallow = [\"root\"]\ngrants = true\n"
    ))
}

/// A world whose listener everybody reaches before anything is enforced, then root alone by its configuration.
pub(super) fn guarded() -> Result<(World, Listener)> {
    let world = World::new()?;
    let listener = world.listen()?;
    world.attack(NOBODY).reaches()?;
    world.attack(OTHER).reaches()?;
    configure(&world, 0)?;
    Ok((world, listener))
}

pub(super) fn enforces(world: &World) -> Result<()> {
    world.attack(NOBODY).is_refused()?;
    world.attack(OTHER).is_refused()?;
    world.attack(0).reaches()
}

fn is_well(world: &World) -> Result<()> {
    let mut status = Value::Null;
    until("all is well again", || {
        status = world.status()?;
        Ok(status["state"] == "enforcing")
    })
    .with_context(|| status.to_string())
}

/// A small disk of its own for a world's state; the host sees it, as it does the state.
struct Disk(PathBuf);

impl Disk {
    fn new(world: &World) -> Result<Self> {
        let dir = world.path("state");
        fs::DirBuilder::new().mode(0o700).create(&dir)?;
        let disk = Self(dir);
        ran(Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=128k,mode=700", "tmpfs"])
            .arg(&disk.0))?
        .demand(0)?;
        Ok(disk)
    }

    /// As for whoever looks it up from now on: a file system does not become read-only while a daemon has its lock open
    /// there.
    fn shut(&self) -> Result<()> {
        let mount = |arguments: &[&str]| ran(Command::new("mount").args(arguments).arg(&self.0))?.demand(0);
        ran(Command::new("mount").arg("--bind").args([&self.0, &self.0]))?.demand(0)?;
        mount(&["-o", "remount,bind,ro"]).map(drop)
    }

    fn reopen(&self) -> Result<()> {
        ran(Command::new("umount").arg("--lazy").arg(&self.0))?
            .demand(0)
            .map(drop)
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    fn fill(&self) -> Result<()> {
        let mut filler = fs::File::create(self.filler())?;
        while filler.write_all(&[0; 4096]).is_ok() {}
        let full = fs::write(self.0.join("more"), "x")
            .err()
            .and_then(|error| error.raw_os_error());
        fs::remove_file(self.0.join("more"))?;
        ensure!(full == Some(libc::ENOSPC), "the disk is not full: {full:?}");
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The shut one above it too, where a case failed before it was opened again.
        while ran(Command::new("umount").arg("--lazy").arg(&self.0)).is_ok_and(|ran| ran.code == 0) {}
    }
}

fn f4_a_full_disk_degrades_and_opens_nothing() -> Result<()> {
    disk_fails("No space left on device", Disk::fill, |disk| {
        Ok(fs::remove_file(disk.filler())?)
    })
}

fn f4_a_read_only_disk_degrades_and_opens_nothing() -> Result<()> {
    disk_fails("Read-only file system", Disk::shut, Disk::reopen)
}

/// A reload, a grant, a kill and a start while the disk takes nothing; then it does again.
fn disk_fails(cause: &str, fail: impl Fn(&Disk) -> Result<()>, recover: impl Fn(&Disk) -> Result<()>) -> Result<()> {
    let (world, _listener) = guarded()?;
    let disk = Disk::new(&world)?;
    let other = OTHER.to_string();
    let ask = |what: &str| world.enforcer(&[what, "main", "--user", &other]);
    let degraded = || {
        let mut status = Value::Null;
        until("the cause is in the status", || {
            status = world.status()?;
            Ok(status["state"] == "degraded" && status["causes"].to_string().contains(cause))
        })
        .with_context(|| status.to_string())
    };
    let further = format!("10.0.0.1:{}", world.port);
    let judges_further = |code| world.enforcer(&["check", "nobody", &further])?.demand(code).map(drop);
    let daemon = world.daemon()?;
    is_well(&world)?;
    ask("grant")?.demand(0)?;
    world.attack(OTHER).reaches()?;
    ask("revoke")?.demand(0)?;
    enforces(&world)?;
    judges_further(0)?;

    fail(&disk)?;
    configure(&world, 1)?;
    daemon.reload()?;
    judges_further(1)?;
    degraded()?;
    let refused = ask("grant")?.demand(2)?.stderr;
    ensure!(
        refused.contains(cause) && refused.contains("nothing was granted"),
        "{refused}"
    );
    enforces(&world)?;
    let before = daemon.log().len();
    thread::sleep(Duration::from_millis(2500));
    // It has tried again meanwhile, and said no more.
    let log = daemon.log();
    let since = log.get(before..).unwrap_or_default();
    ensure!(!since.contains(cause) && log.matches(cause).count() <= 4, "{log}");

    // What is not on disk is not lost for those who are kept out.
    daemon.kill()?;
    enforces(&world)?;
    let daemon = world.daemon()?;
    enforces(&world)?;
    judges_further(1)?;
    degraded()?;
    recover(&disk)?;
    is_well(&world)?;
    until("what is active is kept", || {
        Ok(fs::read_to_string(disk.0.join("last-good.json"))?.contains("10.0.0.1"))
    })?;
    ask("grant")?.demand(0)?;
    world.attack(OTHER).reaches()?;
    world.enforcer(&["unload"])?.demand(0)?;
    drop(daemon);

    // A first start there, with nothing kept.
    for entry in fs::read_dir(&disk.0)? {
        fs::remove_file(entry?.path())?;
    }
    fail(&disk)?;
    let _daemon = world.daemon()?;
    enforces(&world)?;
    degraded()?;
    recover(&disk)?;
    is_well(&world)
}

/// From too few for the loader to those that are enough: each start makes the rules active, or says why not and
/// changes nothing.
fn f3_a_start_with_few_descriptors_works_or_says_why() -> Result<()> {
    let (world, _listener) = guarded()?;
    world.apply()?;
    enforces(&world)?;
    let (mut worked, mut failed) = (0, 0);
    for most in [3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 64] {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={most}:{most}")).arg(binary("enforcer")?);
        let tried = ran(command.arg("--config").arg(world.path("enforcer.toml")).arg("apply"))?;
        match tried.code {
            0 => worked += 1,
            // 127 is the loader's, which opens libraries.
            code @ (2 | 127) => {
                failed += 1;
                ensure!(
                    tried.stderr.contains("oo many open files") || code == 127,
                    "with {most}: {tried:?}"
                );
            }
            _ => anyhow::bail!("with {most}: {tried:?}"),
        }
        let outcome = world.attack(NOBODY).run()?;
        ensure!(outcome.errno.is_some(), "with {most} something was opened: {tried:?}");
    }
    ensure!(worked > 0 && failed > 0, "{worked} starts worked, {failed} failed");
    enforces(&world)
}

/// As [`few_descriptors`], of the daemon: with so few it enforces or says why not; what was active before stays
/// either way.
fn f4_a_daemon_with_few_descriptors_enforces_or_says_why() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.attack(NOBODY).reaches()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    world.apply()?;
    let mut told = 0;
    for limit in [4, 8, 12, 16, 20, 24, 32, 64] {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={limit}")).arg(binary("enforcer")?);
        command.arg("--config").arg(world.path("enforcer.toml")).arg("run");
        let log = world.path("said");
        let mut child = command.stdout(Stdio::null()).stderr(fs::File::create(&log)?).spawn()?;
        let says_why = || {
            let said = fs::read_to_string(&log).unwrap_or_default();
            said.contains("open files") || said.contains("error while loading shared libraries")
        };
        let waited = until("it answers or says why it cannot", || {
            // One that ends while it is asked answers nothing.
            let answers = world.enforcer(&["status"])?.stdout.contains("running, pid");
            Ok(answers || says_why())
        });
        let _ = child.kill();
        let _ = child.wait();
        waited.with_context(|| format!("with {limit}"))?;
        told += usize::from(says_why());
        world.attack(NOBODY).is_refused()?;
        world.attack(0).reaches()?;
    }
    println!("    {told} of 8 starts had too few");
    ensure!(told > 0, "every start had enough");
    let _daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()
}

fn open_files(daemon: &Daemon) -> Result<u32> {
    Ok(fs::read_dir(format!("/proc/{}/fd", daemon.pid()))?.count().try_into()?)
}

/// Root's own doing: connections that say nothing, more than the daemon may have descriptors.
fn f10_callers_that_take_every_descriptor_open_nothing() -> Result<()> {
    const TOLD: &str = "accept on the control socket";
    let (world, _listener) = guarded()?;
    let daemon = world.daemon()?;
    enforces(&world)?;
    let before = open_files(&daemon)?;
    limit_files(&daemon, before + 4)?;
    let connect = || UnixStream::connect(world.path("run/control.sock"));
    let callers = (0..100).map(|_| connect()).collect::<Result<Vec<_>, _>>()?;
    until("none is left", || Ok(open_files(&daemon)? >= before + 4))?;
    configure(&world, 1)?;
    daemon.signal(Signal::SIGHUP)?;
    for _ in 0..4 {
        enforces(&world)?;
        thread::sleep(Duration::from_millis(300));
    }
    drop(callers);
    // Those that say nothing are let go within five seconds, and more of them wait.
    is_answered(&world)?;
    limit_files(&daemon, 1024)?;
    daemon.reload()?;
    is_well(&world)?;
    let further = format!("10.0.0.1:{}", world.port);
    world.enforcer(&["check", "nobody", &further])?.demand(1)?;
    let log = daemon.log();
    ensure!((1..=2).contains(&log.matches(TOLD).count()), "{log}");
    enforces(&world)
}

fn is_answered(world: &World) -> Result<()> {
    until("the status is answered", || {
        Ok(world.enforcer(&["status", "--json"])?.stdout.contains("\"daemon\""))
    })
}

/// What bounds a daemon's memory.
enum Memory {
    /// A cgroup, of whichever hierarchy has that controller here.
    Cgroup {
        cgroup: PathBuf,
        used: &'static str,
        limit: &'static str,
        kills: &'static str,
    },
    /// No cgroup here can: the limit of its address space, by which allocations fail. What it bears it is killed after,
    /// by hand.
    AddressSpace,
}

impl Memory {
    fn new(world: &World) -> Result<Self> {
        let name = format!("{}_m", world.name());
        let controls = |mount: &Path| {
            fs::read_to_string(mount.join("cgroup.subtree_control")).is_ok_and(|all| all.contains("memory"))
        };
        let mounts = fs::read_to_string("/proc/mounts")?;
        let first = mounts.lines().find_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            match words.as_slice() {
                [_, path, "cgroup", options, ..] => options
                    .split(',')
                    .any(|option| option == "memory")
                    .then(|| PathBuf::from(path)),
                _ => None,
            }
        });
        let memory = if let Some(mount) = cgroup_mount().ok().filter(|mount| controls(mount)) {
            Self::Cgroup {
                cgroup: mount.join(name),
                used: "memory.current",
                limit: "memory.max",
                kills: "memory.events",
            }
        } else if let Some(mount) = first {
            Self::Cgroup {
                cgroup: mount.join(name),
                used: "memory.usage_in_bytes",
                limit: "memory.limit_in_bytes",
                kills: "memory.oom_control",
            }
        } else {
            Self::AddressSpace
        };
        if let Self::Cgroup { cgroup, .. } = &memory {
            fs::create_dir(cgroup)?;
        }
        Ok(memory)
    }

    /// The binary, to be started in it.
    fn command(&self) -> Result<Command> {
        let mut command = Command::new("sh");
        let script = "[ -z \"$1\" ] || echo $$ > \"$1/cgroup.procs\"; shift; exec \"$@\"";
        command.args(["-ec", script, "sh"]);
        match self {
            Self::Cgroup { cgroup, .. } => command.arg(cgroup),
            Self::AddressSpace => command.arg(""),
        };
        command.arg(binary("enforcer")?);
        Ok(command)
    }

    /// So many bytes more than are used now.
    fn leave(&self, daemon: &Daemon, bytes: u64) -> Result<()> {
        match self {
            Self::Cgroup {
                cgroup, used, limit, ..
            } => {
                let used: u64 = fs::read_to_string(cgroup.join(used))?.trim().parse()?;
                fs::write(cgroup.join(limit), (used + bytes).to_string())?;
            }
            Self::AddressSpace => {
                let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid()))?;
                let size = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
                let size = size
                    .and_then(|size| size.trim().strip_suffix(" kB"))
                    .context("no VmSize")?;
                let most = (size.parse::<u64>()? << 10) + bytes;
                let pid = daemon.pid().to_string();
                ran(Command::new("prlimit").args(["--pid", &pid, &format!("--as={most}:{most}")]))?.demand(0)?;
            }
        }
        Ok(())
    }

    /// Waits until the daemon has ended, by a signal and for want of memory.
    fn ends(&self, daemon: &mut Daemon) -> Result<()> {
        let killed = || -> Result<bool> {
            let Self::Cgroup { cgroup, kills, .. } = self else {
                return Ok(true);
            };
            let text = fs::read_to_string(cgroup.join(kills))?;
            Ok(text
                .lines()
                .any(|line| line.starts_with("oom_kill ") && line != "oom_kill 0"))
        };
        if matches!(self, Self::AddressSpace) {
            thread::sleep(Duration::from_secs(2));
            daemon.signal(Signal::SIGKILL)?;
        }
        let code = daemon.wait()?;
        ensure!(
            code == -1 && killed()?,
            "it ended with {code}, not for want of memory: {}",
            daemon.log()
        );
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let Self::Cgroup { cgroup, .. } = self else { return };
        for _ in 0..100 {
            if fs::remove_dir(&*cgroup).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Killed while it takes a larger rule set, under fire.
fn f1_a_daemon_without_memory_leaves_its_verdicts() -> Result<()> {
    let (world, _listener) = guarded()?;
    let memory = Memory::new(&world)?;
    let mut daemon = world.daemon_with(&mut memory.command()?)?;
    enforces(&world)?;
    let fire = world.path("fire");
    fs::write(&fire, "")?;
    let hammer = world.attack(NOBODY).hammer(&fire)?;
    configure(&world, 30_000)?;
    memory.leave(&daemon, 1 << 20)?;
    daemon.signal(Signal::SIGHUP)?;
    memory.ends(&mut daemon)?;
    enforces(&world)?;
    let dead = world.status()?;
    ensure!(dead["daemon"]["running"] == false && dead["endpoints"] == 1, "{dead}");
    configure(&world, 1)?;
    let _daemon = world.daemon()?;
    is_well(&world)?;
    enforces(&world)?;
    fs::remove_file(&fire)?;
    let blows = hammer.finish()?;
    ensure!(
        blows.connected + blows.other == 0 && blows.refused + blows.reset > 100,
        "{blows:?}"
    );
    let further = format!("10.0.0.1:{}", world.port);
    world.enforcer(&["check", "nobody", &further])?.demand(1).map(drop)
}
