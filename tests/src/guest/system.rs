//! What a first process owes the others: file systems, modules, a loopback device, and an end.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        resource::{Resource, setrlimit},
    },
    unistd::{chdir, chroot, setsid},
};

use crate::{
    kernel::{Feature, has},
    world::{ran, until},
};

/// How many files a process may open, as under systemd.
const FILES: u64 = 524_288;

/// Mounts what every program takes for granted.
pub(super) fn mount_all() -> Result<()> {
    for (kind, at) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
    ] {
        fs::create_dir_all(at)?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount {kind} at {at}"))?;
    }
    fs::set_permissions("/tmp", std::os::unix::fs::PermissionsExt::from_mode(0o1777))?;
    fs::create_dir_all("/run/netns")?;
    if has(Feature::Bpf)? {
        let at = "/sys/fs/bpf";
        mount(Some("bpf"), at, Some("bpf"), MsFlags::empty(), None::<&str>).context("mount bpf at /sys/fs/bpf")?;
    }
    Ok(())
}

/// Loads a module; one that is built in or loaded already is as good.
pub(super) fn load_module(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("load {}", path.display())),
    }
}

/// Mounts a device as the root and becomes its `/sbin/init`, which mounts the rest anew.
pub(super) fn go_on_with(device: &Path) -> Result<()> {
    until("the disk is there", || Ok(device.exists()))?;
    fs::create_dir("/root-of-disk")?;
    mount(
        Some(device),
        "/root-of-disk",
        Some("ext4"),
        MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("mount {}", device.display()))?;
    chdir("/root-of-disk")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move the root")?;
    chroot(".")?;
    chdir("/")?;
    Err(Command::new("/sbin/init").exec()).context("run /sbin/init")
}

/// What an ordinary host has by the time that its services start.
pub(super) fn prepare() -> Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES)?;
    ran(Command::new("ip").args(["link", "set", "lo", "up"]))?
        .demand(0)
        .map(drop)
}

/// A shell on the console, until it ends.
#[allow(unsafe_code, reason = "what runs between fork and exec")]
pub(super) fn shell(environment: &[(&str, &str)]) -> Result<()> {
    let console = File::options().read(true).write(true).open("/dev/ttyS0")?;
    eprintln!(
        "\nguest: a shell; leave it to switch the machine off; `privileged --backend BACKEND NAME` runs a case again"
    );
    let mut command = Command::new("/bin/busybox");
    command
        .arg("sh")
        .env("PS1", "guest:\\w# ")
        .env("ENFORCER_BIN", "/bin/enforcer")
        .envs(environment.iter().copied())
        .stdin(console.try_clone()?)
        .stdout(console.try_clone()?)
        .stderr(console);
    // SAFETY: system calls only.
    unsafe {
        command.pre_exec(|| {
            setsid()?;
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            Ok(())
        });
    }
    command.status().context("run /bin/busybox sh")?;
    Ok(())
}

/// Switches the machine off: QEMU is told to end where the machine would start again.
pub(super) fn end() -> ExitCode {
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    eprintln!("guest: switch off: {error}");
    ExitCode::FAILURE
}
