//! A machine of its own for the suite, the demo and the benchmarks: this one, but with a first process, mounts, a bpffs
//! and an `/etc` that nothing outside shares. What is pinned or mounted there ends with the run, however that ends;
//! `/proc/1` has the mounts that every case sees, as on a host; and a root that is bare, with no bpffs and half of
//! `/etc`, is as good as any other.
//!
//! The program runs itself twice more: outside it makes the namespaces and waits; as their first process it mounts, and
//! reaps orphans; as that process' child it does its work.

use std::{
    env,
    fs::{self, File},
    path::Path,
    process::{self, Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_pdeathsig,
        signal::Signal,
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// Says that the machine is made: by its number outside, or by nothing where the whole machine is the suite's.
pub const MACHINE: &str = "ENFORCER_TEST_MACHINE";
const BPFFS: &str = "/sys/fs/bpf";
const NETNS: &str = "/run/netns";
/// Where worlds lie, in memory: a case must not wait until a busy disk has synced what it wrote.
const SCRATCH: &str = "/var/local";
/// Cases mount their own over these, and a bare root lacks some. Empty, each means what its absence means.
const REPLACED: [&str; 3] = ["/etc/hosts", "/etc/nsswitch.conf", "/etc/resolv.conf"];

/// Does the work in a machine of its own.
pub fn inside(work: impl FnOnce() -> ExitCode) -> ExitCode {
    let waited = match (env::var_os(MACHINE), process::id()) {
        (None, _) => wait_outside(),
        (Some(_), 1) => be_first(),
        (Some(_), _) => return work(),
    };
    waited.unwrap_or_else(|error| {
        eprintln!("no machine of its own to run in: {error:#}");
        ExitCode::from(2)
    })
}

/// A number that nothing else on the host has, for names and addresses that are not the machine's own: cgroups, tables,
/// ports.
#[must_use]
pub fn number() -> u32 {
    let said = env::var(MACHINE).ok();
    said.and_then(|said| said.parse().ok()).unwrap_or_else(process::id)
}

/// A signal that ends this process ends all of the machine.
fn wait_outside() -> Result<ExitCode> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID).context("make namespaces for mounts and processes")?;
    // So that nothing mounted here is mounted outside.
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .context("make all mounts private (where / is no mount point, pivot_root into it first)")?;
    let status = again()?
        .env(MACHINE, process::id().to_string())
        .status()
        .context("run itself as first process")?;
    Ok(exit_code(status.code()))
}

/// Ends when its child ends, and with it whatever runs.
fn be_first() -> Result<ExitCode> {
    set_pdeathsig(Signal::SIGKILL).context("end with the process outside")?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    attach("proc", "/proc", safe, None)?;
    own_bpffs(safe)?;
    fs::create_dir_all(NETNS).with_context(|| format!("make {NETNS}"))?;
    attach("tmpfs", NETNS, safe, Some("mode=0755"))?;
    own_etc()?;
    attach("tmpfs", SCRATCH, MsFlags::empty(), Some("mode=0755"))?;
    let child = again()?.env("TMPDIR", SCRATCH).spawn().context("run itself")?;
    let child = Pid::from_raw(child.id().try_into()?);
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => return Ok(exit_code(Some(code))),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                eprintln!("ended by {signal}");
                return Ok(exit_code(None));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for its end"),
        }
    }
}

/// In place of the host's, if there is one; no kernel without bpf(2) has the directory.
fn own_bpffs(flags: MsFlags) -> Result<()> {
    while umount2(BPFFS, MntFlags::MNT_DETACH).is_ok() {}
    if Path::new(BPFFS).exists() {
        attach("bpf", BPFFS, flags, Some("mode=0700"))?;
    }
    Ok(())
}

/// A copy.
fn own_etc() -> Result<()> {
    attach("tmpfs", SCRATCH, MsFlags::MS_NODEV, Some("mode=0755"))?;
    let copied = Command::new("cp").args(["-a", "/etc/.", SCRATCH]).status();
    ensure!(copied.context("run cp")?.success(), "copy /etc");
    mount(Some(SCRATCH), "/etc", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move the copy to /etc")?;
    for path in REPLACED.map(Path::new) {
        if !path.exists() {
            // A link to what is not there.
            let _ = fs::remove_file(path);
            File::create(path).with_context(|| format!("make {}", path.display()))?;
        }
    }
    Ok(())
}

fn attach(kind: &str, at: &str, flags: MsFlags, options: Option<&str>) -> Result<()> {
    mount(Some(kind), at, Some(kind), flags, options).with_context(|| format!("mount {kind} at {at}"))
}

fn again() -> Result<Command> {
    let mut command = Command::new(env::current_exe()?);
    command.args(env::args_os().skip(1));
    Ok(command)
}

fn exit_code(code: Option<i32>) -> ExitCode {
    code.and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from)
}
