//! One guest under QEMU, from its start to its end: the console to a file, results from the second serial line.

use std::{
    fs,
    io::{IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::Value;

/// Between two looks at the serial lines.
const PAUSE: Duration = Duration::from_millis(100);
/// A guest that has not booted by then under KVM never will.
const KVM_BOOT: Duration = Duration::from_secs(30);
/// How many lines of the console tell of a failure.
const LAST_LINES: usize = 25;

/// How to run guests.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) kvm: bool,
    pub(super) memory: u32,
    /// Show the console.
    pub(super) log: bool,
    /// The console is the user's terminal.
    pub(super) shell: bool,
    /// What the kernel is booted with besides.
    pub(super) parameters: String,
    /// A disk, if it has one.
    pub(super) disk: Option<PathBuf>,
    /// Silence for so long is a hang.
    pub(super) patience: Duration,
    /// What is being done in all guests.
    pub(super) progress: MultiProgress,
}

/// What became of a guest.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// The kernel's release and the seconds from its start to the first process's work.
    pub(super) booted: Option<(String, f64)>,
    pub(super) cells: Vec<Cell>,
    /// What `auto` took with each layout of hierarchies.
    pub(super) auto: Vec<(String, Value)>,
    /// Why the guest as such failed.
    pub(super) failure: Option<String>,
    pub(super) time: Duration,
}

/// A part of the suite with one layout.
#[derive(Debug)]
pub(super) struct Cell {
    pub(super) layout: String,
    pub(super) suite: String,
    pub(super) seconds: f64,
    pub(super) cases: Vec<Case>,
    /// Why the part failed besides its cases, or did not end.
    pub(super) failure: Option<String>,
}

#[derive(Debug)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) seconds: f64,
    pub(super) error: Option<String>,
}

impl Cell {
    pub(super) fn failed(&self) -> usize {
        self.cases.iter().filter(|case| case.error.is_some()).count()
    }
}

impl Outcome {
    /// Adds what became of another guest with this kernel, or of this one's next boot.
    pub(super) fn add(&mut self, other: Self) {
        self.booted = self.booted.take().or(other.booted);
        self.cells.extend(other.cells);
        self.auto.extend(other.auto);
        self.failure = match (self.failure.take(), other.failure) {
            (Some(one), Some(other)) => Some(format!("{one}\n{other}")),
            (one, other) => one.or(other),
        };
        self.time += other.time;
    }

    pub(super) fn is_green(&self) -> bool {
        self.failure.is_none()
            && self
                .cells
                .iter()
                .all(|cell| cell.failure.is_none() && cell.failed() == 0)
    }
}

/// A line from the guest; each has some of these.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Line {
    booted: Option<String>,
    seconds: f64,
    hierarchy: Option<String>,
    auto: Value,
    suite: Option<String>,
    suite_ended: Option<String>,
    code: Option<i32>,
    began: Option<String>,
    ended: Option<String>,
    error: Option<String>,
    failed: Option<String>,
    shell: bool,
    done: bool,
}

/// Boots a guest and waits for its end.
pub(super) fn run(name: &str, image: &Path, initramfs: &Path, dir: &Path, settings: &Settings) -> Result<Outcome> {
    let (console, results) = (dir.join("console.log"), dir.join("results.jsonl"));
    for file in [&console, &results] {
        fs::write(file, "").with_context(|| format!("write {}", file.display()))?;
    }
    let started = Instant::now();
    let mut child = start(image, initramfs, &console, &results, settings)?;
    let (mut lines, mut shown) = (Tail::new(results), Tail::new(console.clone()));
    let mut reading = Reading::new(name, settings);
    let mut last = Instant::now();
    let mut fatal = None;
    let failure = loop {
        let ended = child.0.try_wait()?;
        for line in lines.read()? {
            last = Instant::now();
            reading.line(&line);
        }
        for line in shown.read()? {
            if settings.log && !settings.shell {
                writeln!(std::io::stdout(), "{line}")?;
            }
            fatal = fatal.or_else(|| explained(&line));
        }
        if let Some(status) = ended {
            break (!reading.done).then(|| format!("the guest ended early ({status})"));
        }
        // Where KVM only seems to be there, guests hang at their first instructions.
        let booting = settings.kvm && reading.outcome.booted.is_none();
        let patience = if booting {
            settings.patience.min(KVM_BOOT)
        } else {
            settings.patience
        };
        if last.elapsed() > patience && !reading.in_shell {
            break Some(format!("the guest said nothing for {} s", patience.as_secs()));
        }
        thread::sleep(PAUSE);
    };
    drop(child);
    let mut outcome = reading.end();
    outcome.time = started.elapsed();
    if let Some(failure) = outcome.failure.take().or(failure) {
        let why = fatal.map(|fatal| format!("{fatal}: ")).unwrap_or_default();
        outcome.failure = Some(format!("{why}{failure}\n{}", last_lines(&console)));
    }
    Ok(outcome)
}

/// A machine; ended when dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(image: &Path, initramfs: &Path, console: &Path, results: &Path, settings: &Settings) -> Result<Machine> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-no-reboot", "-display", "none"]);
    command.args(["-m", &settings.memory.to_string()]);
    if settings.kvm {
        command.args(["-accel", "kvm", "-cpu", "host", "-smp", "2"]);
    } else {
        // One processor. With a thread for each of two, QEMU before 8.1 translates a page while the other processor
        // writes to it, so a kernel that patches a static branch dies of an int3 that nobody expects: 7.3, within two
        // seconds of netfilter hooks that come and go. With one thread for both, each waits up to 100 ms for what the
        // other is to do at once. Without five-level page tables, which cost emulation more than they bring.
        command.args(["-accel", "tcg", "-cpu", "max,la57=off", "-smp", "1"]);
    }
    if let Some(disk) = &settings.disk {
        let drive = format!("file={},format=raw,if=virtio,cache=unsafe", escaped(disk));
        command.args(["-drive", &drive]);
    }
    command.arg("-kernel").arg(image).arg("-initrd").arg(initramfs);
    let parameters = format!(
        "console=ttyS0 loglevel=4 panic=-1 reboot=t nokaslr mitigations=off random.trust_cpu=on {}",
        settings.parameters
    );
    command.args(["-append", parameters.trim_end()]);
    if settings.shell {
        let console = format!("stdio,id=console,mux=on,logfile={}", escaped(console));
        command.args([
            "-chardev",
            &console,
            "-serial",
            "chardev:console",
            "-mon",
            "chardev=console",
        ]);
    } else {
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.stdin(Stdio::null());
    }
    command.arg("-serial").arg(format!("file:{}", results.display()));
    let child = command
        .spawn()
        .context("run qemu-system-x86_64; install qemu-system-x86")?;
    Ok(Machine(child))
}

/// As QEMU's options want it.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// What a line of the console says about the guest as such.
fn explained(line: &str) -> Option<&'static str> {
    let memory = [
        "Out of memory",
        "out of memory",
        "Initramfs unpacking failed: write error",
    ];
    if memory.iter().any(|said| line.contains(said)) {
        Some("the guest ran out of memory (give it more with --memory)")
    } else if line.contains("Kernel panic") {
        Some("the kernel panicked")
    } else {
        None
    }
}

fn last_lines(console: &Path) -> String {
    let bytes = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    let from = lines.len().saturating_sub(LAST_LINES);
    let mut shown = format!("the last lines of {}:\n", console.display());
    for line in lines.get(from..).unwrap_or_default() {
        shown.push_str(&format!("  | {line}\n"));
    }
    shown
}

/// Takes what the guest says.
struct Reading {
    name: String,
    outcome: Outcome,
    layout: String,
    in_shell: bool,
    done: bool,
    progress: ProgressBar,
    all: MultiProgress,
}

impl Reading {
    fn new(name: &str, settings: &Settings) -> Self {
        let progress = if std::io::stderr().is_terminal() && !settings.shell {
            let progress = settings.progress.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template("  {spinner} {elapsed} {wide_msg}") {
                progress.set_style(style);
            }
            progress.enable_steady_tick(Duration::from_millis(120));
            progress
        } else {
            ProgressBar::hidden()
        };
        Self {
            name: name.to_owned(),
            outcome: Outcome::default(),
            layout: String::new(),
            in_shell: false,
            done: false,
            progress,
            all: settings.progress.clone(),
        }
    }

    fn line(&mut self, text: &str) {
        let line: Line = match serde_json::from_str(text) {
            Ok(line) => line,
            Err(error) => {
                self.outcome.failure = Some(format!("the guest said {text:?}: {error}"));
                return;
            }
        };
        self.in_shell = line.shell;
        self.done |= line.done;
        if let Some(release) = line.booted {
            self.say(&format!("{release} runs after {:.1} s", line.seconds));
            self.outcome.booted = Some((release, line.seconds));
        }
        if let Some(layout) = line.hierarchy {
            self.outcome.auto.push((layout.clone(), line.auto));
            self.layout = layout;
        }
        if let Some(suite) = line.suite {
            self.outcome.cells.push(Cell {
                layout: self.layout.clone(),
                suite,
                seconds: 0.0,
                cases: Vec::new(),
                failure: Some("did not end".to_owned()),
            });
        }
        let cell = self.outcome.cells.last_mut();
        if let (Some(cell), Some(name)) = (cell, line.ended) {
            cell.cases.push(Case {
                name,
                seconds: line.seconds,
                error: line.error,
            });
        }
        if let Some(case) = line.began {
            let cell = self.outcome.cells.last();
            let (suite, cases) = cell.map_or(("", 0), |cell| (cell.suite.as_str(), cell.cases.len()));
            self.progress.set_message(format!(
                "{} {} {suite}: {cases} done, now {case}",
                self.name, self.layout
            ));
        }
        if line.suite_ended.is_some() {
            self.ended(line.code, line.seconds);
        }
        if let Some(failure) = line.failed {
            self.outcome.failure = Some(failure);
        }
    }

    fn ended(&mut self, code: Option<i32>, seconds: f64) {
        let Some(cell) = self.outcome.cells.last_mut() else {
            return;
        };
        cell.seconds = seconds;
        let failed = cell.failed();
        // Failed cases make it 101; whatever else goes wrong has no case to show for it.
        cell.failure = match code {
            Some(0) => None,
            Some(101) if failed > 0 => None,
            Some(code) => Some(format!("the suite ended with exit code {code}")),
            None => Some("the suite was killed".to_owned()),
        };
        let said = match (&cell.failure, failed) {
            (Some(failure), _) => failure.clone(),
            (None, 0) => "passed".to_owned(),
            (None, failed) => format!("passed but for {failed}"),
        };
        let text = format!(
            "{}, {}: {} cases {said} in {seconds:.1} s",
            cell.layout,
            cell.suite,
            cell.cases.len()
        );
        self.say(&text);
    }

    fn say(&self, text: &str) {
        self.all.suspend(|| eprintln!("vm: {}: {text}", self.name));
    }

    fn end(self) -> Outcome {
        self.progress.finish_and_clear();
        self.outcome
    }
}

/// A file that grows, by whole lines.
struct Tail {
    path: PathBuf,
    at: u64,
    rest: String,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            at: 0,
            rest: String::new(),
        }
    }

    fn read(&mut self) -> Result<Vec<String>> {
        let mut file = fs::File::open(&self.path).with_context(|| format!("open {}", self.path.display()))?;
        file.seek(SeekFrom::Start(self.at))?;
        let mut bytes = Vec::new();
        self.at += u64::try_from(file.read_to_end(&mut bytes)?)?;
        self.rest.push_str(&String::from_utf8_lossy(&bytes));
        let mut lines: Vec<String> = self.rest.split('\n').map(|line| line.trim_end().to_owned()).collect();
        self.rest = lines.pop().unwrap_or_default();
        lines.retain(|line| !line.is_empty());
        Ok(lines)
    }
}
