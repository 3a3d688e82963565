//! Runs commands: says what, shows that it is still at it, and fails with what it printed.

use std::{
    env,
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// The workspace's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
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
    eprintln!("{what}");
    let spinner = if std::io::stderr().is_terminal() {
        let spinner = ProgressBar::new_spinner();
        spinner.set_style(ProgressStyle::with_template("  {spinner} {elapsed}")?);
        spinner.enable_steady_tick(Duration::from_millis(120));
        spinner
    } else {
        ProgressBar::hidden()
    };
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {}", text(command)))?;
    spinner.finish_and_clear();
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

/// What a command prints on stdout, if it succeeds.
pub(crate) fn read(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Whether a program is on the path.
pub(crate) fn has(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join(program).is_file())
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

fn text(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}
