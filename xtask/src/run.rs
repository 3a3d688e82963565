//! Runs commands: says what, shows that it is still at it, and fails with what it printed.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use crate::progress::{Progress, watch};

/// The workspace's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Where `name` is kept between runs: below `XDG_CACHE_HOME`, or the home directory's `.cache`.
pub(crate) fn cache_dir(name: &str) -> Result<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")));
    Ok(base.context("neither HOME nor XDG_CACHE_HOME is set")?.join(name))
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command whose output the user sees.
pub(crate) fn shown(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {}", text(command)))?;
    if !status.success() {
        bail!("{} failed ({status})", text(command));
    }
    Ok(())
}

/// Runs a long command behind a spinner; what it printed is shown only if it fails.
pub(crate) fn quiet(what: &str, command: &mut Command) -> Result<()> {
    let output = captured(what, command)?;
    if !output.status.success() {
        eprint!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        bail!("{} failed ({})", text(command), output.status);
    }
    Ok(())
}

/// Runs a long command behind a spinner; what it printed, and whether it succeeded, is for the caller.
pub(crate) fn captured(what: &str, command: &mut Command) -> Result<Output> {
    let mut progress = Progress::start(what, None)?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let status = watch(command, &mut progress, |_, line, errors| {
        let all = if errors { &mut stderr } else { &mut stdout };
        all.extend_from_slice(line.as_bytes());
        all.push(b'\n');
    })
    .with_context(|| format!("run {}", text(command)))?;
    Ok(Output { status, stdout, stderr })
}

/// What a command prints on stdout, if it succeeds.
pub(crate) fn read(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(root())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Whether a program is on the path, or where only root's path leads.
pub(crate) fn has(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let roots = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(roots)
        .any(|dir| dir.join(program).is_file())
}

/// Whether we are root.
pub(crate) fn is_root() -> bool {
    read("id", &["-u"]).as_deref() == Some("0")
}

/// A program to be run as root: itself, through sudo, or not at all.
pub(crate) fn as_root(program: &Path) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    if !has("sudo") {
        bail!(
            "{} needs root, and there is no sudo; run this task as root",
            program.display()
        );
    }
    let mut command = Command::new("sudo");
    command.arg("--preserve-env=ENFORCER_BIN,PATH").arg(program);
    Ok(command)
}

/// Fails where a file system has less than `needed` MiB free.
pub(crate) fn check_space(dir: &Path, needed: u64) -> Result<()> {
    let path = dir.display().to_string();
    let free = read("df", &["--output=avail", "-m", &path]);
    let Some(free) = free.and_then(|text| text.lines().last()?.trim().parse::<u64>().ok()) else {
        return Ok(());
    };
    ensure!(
        free >= needed,
        "{path} has {free} MiB free, and this needs {needed} MiB; free some, then run this again"
    );
    Ok(())
}

/// SHA-256 of text.
pub(crate) fn digest_of(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

/// Bytes as digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// A command as one would type it.
pub(crate) fn text(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}
