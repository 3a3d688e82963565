//! What came of a run: the matrix for a terminal, in Markdown, as `JUnit` XML, and the table of what each kernel can
//! do.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use comfy_table::{Table, presets};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use serde_json::Value;

use super::{
    machine::{Cell, Outcome},
    plan::{LAYOUTS, SYSTEMD},
    table::Entry,
};
use crate::run::root;

/// Around the table in the README.
const BEGIN: &str = "<!-- kernels: written by cargo xtask vm --update-readme -->\n";
const END: &str = "<!-- kernels end -->";

/// A kernel of the run.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) entry: Entry,
    /// What its guest did, or in a line why there was none.
    pub(super) outcome: Result<Outcome, String>,
}

impl Row {
    pub(super) fn is_green(&self) -> bool {
        self.outcome.as_ref().is_ok_and(Outcome::is_green)
    }
}

/// Writes all files, and says the matrix.
pub(super) fn write(rows: &[Row], dir: &Path, time: Duration) -> Result<()> {
    let mut shown = matrix(rows);
    shown.load_preset(presets::UTF8_FULL_CONDENSED);
    println!("{shown}");
    let mut text = String::from("# Kernels\n\n");
    let mut shown = matrix(rows);
    shown.load_preset(presets::ASCII_MARKDOWN);
    text.push_str(&format!(
        "{shown}\n\nA number of cases, and the seconds that they took together, under emulation. All in {:.0} s.\n",
        time.as_secs_f64()
    ));
    if cells(rows).any(|cell| cell.layout != SYSTEMD) {
        text.push_str(&format!("\n## What `auto` takes\n\n{}", capabilities(rows)));
    }
    let failures = failures(rows);
    if !failures.is_empty() {
        text.push_str("\n## Failures\n");
        for (place, what) in &failures {
            text.push_str(&format!("\n### {place}\n\n```\n{what}\n```\n"));
            println!("\n{place}\n{what}");
        }
    }
    fs::write(dir.join("matrix.md"), text)?;
    let xml = junit(rows, time).to_string()?;
    fs::write(dir.join("junit.xml"), xml).with_context(|| format!("write to {}", dir.display()))
}

fn matrix(rows: &[Row]) -> Table {
    let mut columns: Vec<&str> = Vec::new();
    for cell in cells(rows) {
        if !columns.contains(&cell.suite.as_str()) {
            columns.push(&cell.suite);
        }
    }
    let mut table = Table::new();
    table.set_header(
        ["kernel", "cgroups", "boot"]
            .into_iter()
            .chain(columns.iter().copied())
            .chain(["all"]),
    );
    for row in rows {
        let name = row.entry.name.as_str();
        let outcome = match &row.outcome {
            Ok(outcome) => outcome,
            Err(why) => {
                table.add_row([name, "", "none", why.lines().next().unwrap_or_default()]);
                continue;
            }
        };
        let boot = outcome
            .booted
            .as_ref()
            .map_or("failed".to_owned(), |(_, seconds)| format!("{seconds:.1} s"));
        if outcome.cells.is_empty() {
            table.add_row([name, "", &boot]);
        }
        for layout in LAYOUTS.iter().map(|(layout, _)| *layout).chain([SYSTEMD]) {
            let of_layout: Vec<&Cell> = outcome.cells.iter().filter(|cell| cell.layout == layout).collect();
            if of_layout.is_empty() {
                continue;
            }
            let found = |column: &str| of_layout.iter().find(|cell| cell.suite == column);
            let texts = columns
                .iter()
                .map(|column| found(column).map_or("–".to_owned(), |cell| shown(cell)));
            let all: f64 = of_layout.iter().map(|cell| cell.seconds).sum();
            let row = [name.to_owned(), layout.to_owned(), boot.clone()];
            table.add_row(row.into_iter().chain(texts).chain([format!("{all:.0} s")]));
        }
    }
    table
}

fn cells(rows: &[Row]) -> impl Iterator<Item = &Cell> {
    rows.iter()
        .filter_map(|row| row.outcome.as_ref().ok())
        .flat_map(|outcome| &outcome.cells)
}

fn shown(cell: &Cell) -> String {
    let (failed, all) = (cell.failed(), cell.cases.len());
    match (&cell.failure, failed) {
        (None, 0) => format!("{all} ok {:.1} s", cell.seconds),
        (None, failed) => format!("{failed} of {all} FAILED"),
        (Some(_), _) => "FAILED".to_owned(),
    }
}

fn failures(rows: &[Row]) -> Vec<(String, String)> {
    let mut failures = Vec::new();
    for row in rows {
        let name = &row.entry.name;
        let outcome = match &row.outcome {
            Ok(outcome) => outcome,
            Err(why) => {
                failures.push((name.clone(), why.clone()));
                continue;
            }
        };
        failures.extend(outcome.failure.iter().map(|failure| (name.clone(), failure.clone())));
        for cell in &outcome.cells {
            let place = format!("{name} {} {}", cell.layout, cell.suite);
            failures.extend(cell.failure.iter().map(|failure| (place.clone(), failure.clone())));
            for case in &cell.cases {
                let error = case.error.iter();
                failures.extend(error.map(|error| (format!("{place} {}", case.name), error.clone())));
            }
        }
    }
    failures
}

fn junit(rows: &[Row], time: Duration) -> Report {
    let mut report = Report::new("enforcer on kernels");
    report.set_time(time);
    let failed = |why: &str| {
        let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
        status.set_message(why.lines().next().unwrap_or_default());
        status.set_description(why);
        status
    };
    for row in rows {
        let name = &row.entry.name;
        let mut guest = TestSuite::new(name.clone());
        let status = match &row.outcome {
            Ok(outcome) => outcome.failure.as_deref().map_or_else(TestCaseStatus::success, failed),
            Err(why) => failed(why),
        };
        guest.add_test_case(TestCase::new("the guest boots and ends", status));
        report.add_test_suite(guest);
        for cell in row.outcome.iter().flat_map(|outcome| &outcome.cells) {
            let mut suite = TestSuite::new(format!("{name} {} {}", cell.layout, cell.suite));
            suite.set_time(Duration::from_secs_f64(cell.seconds.max(0.0)));
            if let Some(failure) = &cell.failure {
                suite.add_test_case(TestCase::new("the suite ends", failed(failure)));
            }
            for case in &cell.cases {
                let status = case.error.as_deref().map_or_else(TestCaseStatus::success, failed);
                let mut test = TestCase::new(case.name.clone(), status);
                test.set_classname(format!("{name}.{}.{}", cell.layout, cell.suite));
                test.set_time(Duration::from_secs_f64(case.seconds.max(0.0)));
                suite.add_test_case(test);
            }
            report.add_test_suite(suite);
        }
    }
    report
}

/// What each kernel can do, in Markdown.
pub(super) fn capabilities(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["kernel", "cgroup v2", "`auto` takes", "who is checked", "reduced"]);
    for row in rows {
        let Ok(outcome) = &row.outcome else { continue };
        for (layout, auto) in outcome.auto.iter().filter(|(layout, _)| layout != SYSTEMD) {
            let text = |key: &str| auto.get(key).and_then(Value::as_str).unwrap_or_default();
            let backend = auto
                .get("error")
                .and_then(Value::as_str)
                .map_or_else(|| text("backend"), |_| "nothing");
            let subject = match text("subject") {
                "task+socket" => "task and socket's owner",
                "task+tcp-socket" => "task, and owner of TCP sockets",
                "task" => "task only",
                "file" => "whoever opened the socket",
                other => other,
            };
            let reduced = reduced(&row.entry, layout);
            let reduced = if reduced.is_empty() {
                "–".to_owned()
            } else {
                reduced.join("; ")
            };
            table.add_row([
                row.entry.name.as_str(),
                where_mounted(layout),
                backend,
                subject,
                &reduced,
            ]);
        }
    }
    format!("{table}\n")
}

fn where_mounted(layout: &str) -> &'static str {
    match layout {
        "unified" => "alone",
        "hybrid" => "beside v1",
        _ => "not mounted",
    }
}

/// In words, what `kernel_has_what_it_should` has found missing.
fn reduced(entry: &Entry, layout: &str) -> Vec<&'static str> {
    let mut missing: Vec<&str> = entry.lacks.iter().map(String::as_str).collect();
    missing.extend(
        LAYOUTS
            .iter()
            .filter(|(name, _)| *name == layout)
            .flat_map(|(_, lacks)| *lacks),
    );
    let hides_owners = ["casts", "kernel-reads"].iter().all(|lack| missing.contains(lack));
    missing
        .into_iter()
        .filter_map(|lack| match lack {
            "bpf" => Some("no BPF"),
            "cgroup2" => Some("principals with a cgroup are rejected"),
            "netns-cookie" => Some("loopback is evaluated in every network namespace"),
            "socket-cgroup" => Some("with nftables, principals with a cgroup match nobody"),
            "mptcp" => Some("no MPTCP"),
            "kernel-reads" if hides_owners => Some("for UDP and MPTCP sockets only the task's user is checked"),
            "kernel-reads" => Some("denials do not show long names in a program's path"),
            // Without BPF nobody asks for types.
            _ => None,
        })
        .collect()
}

/// Compares the README's table with this run's, or writes it there.
pub(super) fn readme(rows: &[Row], update: bool) -> Result<()> {
    let path = root().join("README.md");
    let text = fs::read_to_string(&path)?;
    let (before, rest) = text
        .split_once(BEGIN)
        .context("README.md has no mark for the table of kernels")?;
    let (there, after) = rest
        .split_once(END)
        .context("README.md has no end mark for the table of kernels")?;
    let wanted = format!("\n{}\n", capabilities(rows));
    if update {
        return Ok(fs::write(&path, format!("{before}{BEGIN}{wanted}{END}{after}"))?);
    }
    ensure!(
        there == wanted,
        "README.md says something else about kernels than this run; see target/vm/matrix.md, and run cargo xtask vm \
         --update-readme"
    );
    Ok(())
}
