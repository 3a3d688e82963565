//! A scratch root: a minimal Debian, made once and kept as an archive, unpacked for each run, entered in namespaces of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::run::{quiet, root};

/// What the checks need, and nothing that brings libmnl or libnftnl: that the program starts without them is one of the checks.
const PACKAGES: &str = "systemd,man-db,groff,bash-completion,zsh,fish,runit,procps";
const SUITE: &str = "bookworm";
/// Runs with the root's path as its argument and the commands on stdin. `/sys` is that of the new network namespace, the bpffs
/// a new one, so that nothing of the host's is seen but its cgroups.
const ENTER: &str = r#"
set -e
ip link set lo up
mount --bind "$1" "$1"
mount -t proc -o nosuid,nodev,noexec proc "$1/proc"
mount -t sysfs -o nosuid,nodev,noexec sysfs "$1/sys"
mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs "$1/run"
mount --bind /dev "$1/dev"
mount -t cgroup2 -o nosuid,nodev,noexec none "$1/sys/fs/cgroup"
exec chroot "$1" /bin/sh -eu
"#;

/// An unpacked root; removed at the end.
pub(super) struct Scratch {
    dir: PathBuf,
}

impl Scratch {
    /// Unpacks the archive, made first if there is none.
    pub(super) fn new() -> Result<Self> {
        let place = root().join("target/package");
        let archive = place.join(format!("root-{SUITE}.tar"));
        if !archive.exists() {
            let aside = archive.with_extension("new.tar");
            let include = format!("--include={PACKAGES}");
            let mut make = Command::new("mmdebstrap");
            make.args(["--variant=minbase", &include, SUITE]).arg(&aside);
            quiet(
                &format!("package: make a minimal Debian {SUITE} to install into (a few minutes, once)"),
                &mut make,
            )?;
            fs::rename(&aside, &archive).with_context(|| format!("rename {}", aside.display()))?;
        }
        let dir = place.join("root");
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("remove the old {}", dir.display()))?;
        }
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        let scratch = Self { dir };
        let mut unpack = Command::new("tar");
        unpack.arg("-xf").arg(&archive).arg("-C").arg(&scratch.dir);
        quiet("package: unpack it", unpack.args(["--exclude", "./dev/*"]))?;
        Ok(scratch)
    }

    /// Where it is.
    pub(super) fn path(&self, inside: &str) -> PathBuf {
        self.dir.join(inside.trim_start_matches('/'))
    }

    /// Runs shell commands as root inside, in new mount, network, process and IPC namespaces that end with them.
    pub(super) fn run(&self, commands: &str) -> Result<Output> {
        let script = self.path("/tmp/commands");
        fs::write(&script, commands).with_context(|| format!("write {}", script.display()))?;
        Command::new("unshare")
            .args(["--mount", "--net", "--pid", "--ipc", "--fork", "--kill-child"])
            .args(["sh", "-c", ENTER, "enter"])
            .arg(&self.dir)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::from(
                fs::File::open(&script).with_context(|| format!("open {}", script.display()))?,
            ))
            .output()
            .context("run unshare")
    }

    /// As `run`; what the commands print on stdout, or an error with all that they print.
    pub(super) fn read(&self, commands: &str) -> Result<String> {
        let output = self.run(commands)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!(
                "`{}` fails in the scratch root ({}):\n{text}{}",
                commands.trim(),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(text)
    }

    /// Brings a file in, as `/tmp/NAME`.
    pub(super) fn bring(&self, file: &Path) -> Result<String> {
        let inside = format!("/tmp/{}", file.file_name().unwrap_or_default().to_string_lossy());
        fs::copy(file, self.path(&inside)).with_context(|| format!("copy {}", file.display()))?;
        Ok(inside)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("package: {} could not be removed: {error}", self.dir.display());
        }
    }
}
