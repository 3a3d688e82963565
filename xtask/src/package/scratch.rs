//! A scratch root: a minimal Debian, made once and kept as an archive, unpacked for each run, with networks of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    root::{Recipe, Root},
    run::{digest_of, root},
    setup::packages::SCRATCH,
};

const SUITE: &str = "bookworm";
/// `/sys` is that of the new network namespace, so that nothing of the host's is seen but its cgroups.
const MOUNTS: &str = include_str!("mounts.sh");

/// An unpacked root; removed at the end.
pub(super) struct Scratch(Root);

impl Scratch {
    /// Unpacks the archive, made first if there is none.
    pub(super) fn new() -> Result<Self> {
        let place = root().join("target/package");
        let recipe = Recipe {
            suite: SUITE,
            packages: SCRATCH,
            sources: &[],
            keyring: None,
        };
        let key = digest_of(&format!("{recipe:?}"));
        let archive = place.join(format!("root-{SUITE}-{}.tar", key.get(..12).unwrap_or(&key)));
        if !archive.exists() {
            let what = format!("package: make a minimal Debian {SUITE} to install into (a few minutes, once)");
            recipe.make(&what, &archive)?;
        }
        let dir = place.join("root");
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("remove the old {}", dir.display()))?;
        }
        Root::unpack("package: unpack it", &archive, dir).map(Self)
    }

    /// Where it is.
    pub(super) fn path(&self, inside: &str) -> PathBuf {
        self.0.path(inside)
    }

    /// Runs shell commands as root inside, in new mount, network, process and IPC namespaces that end with them.
    pub(super) fn run(&self, commands: &str) -> Result<Output> {
        let script = self.path("/tmp/commands");
        fs::write(&script, commands).with_context(|| format!("write {}", script.display()))?;
        self.0
            .enter(true, MOUNTS, &["/bin/sh", "-eu"])
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
