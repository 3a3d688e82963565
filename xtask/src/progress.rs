//! Shows how far a long command is: a bar or a spinner on a terminal, elsewhere a line every 20 seconds.

use std::{
    collections::BTreeSet,
    io::{self, BufRead as _, BufReader, IsTerminal as _, Read},
    process::{Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;

use crate::run::{cargo, text};

/// Between two lines where there is no terminal.
const EVERY: Duration = Duration::from_secs(20);

/// How far something is.
pub(crate) struct Progress {
    what: String,
    bar: ProgressBar,
    total: Option<u64>,
    done: u64,
    began: Instant,
    next: Instant,
}

impl Progress {
    /// Says what begins; with a total it counts crates.
    pub(crate) fn start(what: &str, total: Option<u64>) -> Result<Self> {
        eprintln!("{what}");
        let bar = match total {
            _ if !io::stderr().is_terminal() => ProgressBar::hidden(),
            Some(total) => {
                let bar = ProgressBar::new(total);
                bar.with_style(ProgressStyle::with_template(
                    "  {bar:30} {pos} of {len} crates, {elapsed}",
                )?)
            }
            None => ProgressBar::new_spinner().with_style(ProgressStyle::with_template("  {spinner} {elapsed}")?),
        };
        bar.enable_steady_tick(Duration::from_millis(120));
        let began = Instant::now();
        // "setup: build bpf-linker 0.10.3 (a minute or two)" goes on as "setup: build bpf-linker 0.10.3: 20 s".
        let what = what.split(" (").next().unwrap_or(what).to_owned();
        Ok(Self {
            what,
            bar,
            total,
            done: 0,
            began,
            next: began + EVERY,
        })
    }

    /// Prints a line without disturbing the bar.
    fn print(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// One more crate is built.
    fn advance(&mut self) {
        self.done += 1;
        self.bar.inc(1);
    }

    /// The line that is due, if one is.
    fn tick(&mut self) {
        if Instant::now() >= self.next {
            self.next += EVERY;
            if self.bar.is_hidden() {
                eprintln!("{}", self.line());
            }
        }
    }

    fn line(&self) -> String {
        let elapsed = elapsed(self.began.elapsed());
        match self.total {
            Some(total) => format!("{}: {} of {total} crates, {elapsed}", self.what, self.done),
            None => format!("{}: {elapsed}", self.what),
        }
    }
}

fn elapsed(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds / 60 {
        0 => format!("{seconds} s"),
        minutes => format!("{minutes} min {} s", seconds % 60),
    }
}

/// Runs a command and hands over each line that it prints, and whether that is on stderr.
pub(crate) fn watch(
    command: &mut Command,
    progress: &mut Progress,
    mut line: impl FnMut(&mut Progress, &str, bool),
) -> io::Result<ExitStatus> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (sender, lines) = mpsc::channel();
    let readers = [
        child.stdout.take().map(|from| forward(from, false, sender.clone())),
        child.stderr.take().map(|from| forward(from, true, sender)),
    ];
    loop {
        let wait = progress.next.saturating_duration_since(Instant::now());
        match lines.recv_timeout(wait) {
            Ok((printed, errors)) => line(progress, &printed, errors),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        progress.tick();
    }
    for reader in readers.into_iter().flatten() {
        let _ = reader.join();
    }
    progress.bar.finish_and_clear();
    child.wait()
}

fn forward(from: impl Read + Send + 'static, errors: bool, to: Sender<(String, bool)>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let printed = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
            if to.send((printed, errors)).is_err() {
                return;
            }
            line.clear();
        }
    })
}

/// What cargo says of each thing that it has built, or finds built; everything else it says has another reason.
#[derive(Deserialize)]
struct Message {
    reason: String,
    package_id: Option<String>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
}

/// Runs a cargo command that builds, counting crates; what compilers and build scripts print is shown in full.
pub(crate) fn build(what: &str, command: &mut Command) -> Result<()> {
    let arguments: Vec<String> = command
        .get_args()
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let total = cargo()
        .args(tree(&arguments))
        .stdin(Stdio::null())
        .output()
        .context("run cargo tree")?;
    if !total.status.success() {
        bail!(
            "cargo tree does not name the crates: {}",
            String::from_utf8_lossy(&total.stderr).trim()
        );
    }
    let total = String::from_utf8_lossy(&total.stdout);
    let total: BTreeSet<&str> = total
        .lines()
        .map(|line| line.trim_end_matches(" (*)"))
        .filter(|line| !line.is_empty())
        .collect();
    let mut progress = Progress::start(what, Some(total.len() as u64))?;
    let mut with = cargo();
    with.args(messages(&arguments));
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => with.env(name, value),
            None => with.env_remove(name),
        };
    }
    if io::stderr().is_terminal() {
        with.env("CARGO_TERM_COLOR", "always");
    }
    let mut built = BTreeSet::new();
    let status = watch(&mut with, &mut progress, |progress, line, errors| {
        match (errors, serde_json::from_str::<Message>(line)) {
            (false, Ok(message)) => {
                if let Some(package) = crate_of(message)
                    && built.insert(package)
                {
                    progress.advance();
                }
            }
            (true | false, _) => progress.print(line),
        }
    })
    .with_context(|| format!("run {}", text(&with)))?;
    if !status.success() {
        bail!("{} failed ({status})", text(command));
    }
    if progress.began.elapsed() >= EVERY {
        eprintln!("{}", progress.line());
    }
    Ok(())
}

/// The crate that a message says is built; a crate's build script does not count.
fn crate_of(message: Message) -> Option<String> {
    let built = message.reason == "compiler-artifact" && message.target?.kind != ["custom-build"];
    message.package_id.filter(|_| built)
}

/// The same command, made to tell what it builds.
fn messages(arguments: &[String]) -> Vec<&str> {
    let own = arguments
        .iter()
        .position(|argument| argument == "--")
        .unwrap_or(arguments.len());
    let (before, after) = arguments.split_at(own);
    let mut all: Vec<&str> = before.iter().map(String::as_str).collect();
    all.extend(["--locked", "--quiet", "--message-format=json-render-diagnostics"]);
    all.extend(after.iter().map(String::as_str));
    all
}

/// Arguments of the `cargo tree` that names every crate of such a command.
fn tree(arguments: &[String]) -> Vec<&str> {
    let mut all = vec!["tree", "--locked", "--prefix", "none", "--format", "{p}"];
    let mut tests = false;
    let mut words = arguments.iter().map(String::as_str).take_while(|word| *word != "--");
    while let Some(word) = words.next() {
        match word {
            "test" | "--all-targets" | "--example" => tests = true,
            "--workspace" => all.push(word),
            "--package" => all.extend(std::iter::once(word).chain(words.next())),
            _ => {}
        }
    }
    let edges = if tests { "normal,build,dev" } else { "normal,build" };
    all.extend(["--edges", edges]);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn the_crates_of_a_build_are_those_of_its_packages() {
        assert_eq!(
            tree(&words("build --release --package a --package b --bins")).join(" "),
            "tree --locked --prefix none --format {p} --package a --package b --edges normal,build"
        );
        assert_eq!(
            tree(&words("clippy --workspace --all-targets -- --package x")).join(" "),
            "tree --locked --prefix none --format {p} --workspace --edges normal,build,dev"
        );
    }

    #[test]
    fn what_is_for_the_compiler_stays_behind_the_dashes() {
        assert_eq!(
            messages(&words("clippy -- --deny warnings")).join(" "),
            "clippy --locked --quiet --message-format=json-render-diagnostics -- --deny warnings"
        );
    }

    #[test]
    fn crates_count_and_build_scripts_do_not() -> serde_json::Result<()> {
        let of = |kind: &str, reason: &str| {
            let line = format!(r#"{{"reason":"{reason}","package_id":"p","target":{{"kind":["{kind}"]}}}}"#);
            serde_json::from_str(&line).map(crate_of)
        };
        assert_eq!(of("lib", "compiler-artifact")?.as_deref(), Some("p"));
        assert_eq!(of("custom-build", "compiler-artifact")?, None);
        assert_eq!(of("lib", "build-script-executed")?, None);
        Ok(())
    }

    #[test]
    fn times_read_as_one_says_them() {
        assert_eq!(elapsed(Duration::from_secs(59)), "59 s");
        assert_eq!(elapsed(Duration::from_secs(80)), "1 min 20 s");
    }
}
