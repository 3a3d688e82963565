//! `cargo xtask tidy`: what can be told from the sources alone and no compiler tells. Every rule says where, what and
//! the remedy; exceptions stand in `xtask/tidy.toml` and may only become fewer.

mod crates;
mod guarantees;
mod programs;
mod ratchet;
mod rooms;
mod shape;
mod source;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use self::{
    ratchet::{Exceptions, Rule},
    source::Source,
};
use crate::run::{root, text};

/// Every file that git would take, by its path in the workspace; of those that are no text only that they are there.
type Files = BTreeMap<String, String>;

/// What is wrong where, and what to do.
#[derive(Debug, PartialEq, Eq)]
struct Complaint {
    path: String,
    line: usize,
    what: String,
    remedy: String,
}

impl Complaint {
    fn new(path: &str, line: usize, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            line,
            what: what.into(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}; {}", self.path, self.line, self.what, self.remedy)
    }
}

/// Checks the tree.
pub(crate) fn run() -> Result<()> {
    let files = files(root())?;
    let sources = sources(&files)?;
    let mut complaints = check(&files, &sources)?;
    complaints.extend(programs::check(&files, &sources)?);
    complaints.extend(crates::check(&files)?);
    for complaint in &complaints {
        println!("{complaint}");
    }
    ensure!(complaints.is_empty(), "{} places are untidy", complaints.len());
    Ok(())
}

/// Prints the ceilings as they would be if everything there is were allowed.
pub(crate) fn ceilings() -> Result<()> {
    let files = files(root())?;
    let sources = sources(&files)?;
    for rule in Rule::ALL {
        println!("[{}]", rule.table());
        let found = match rule {
            Rule::Length => shape::counts(&sources, shape::length),
            Rule::Wide => shape::counts(&sources, |source| shape::wide_lines(source).len()),
            Rule::Numbers => guarantees::counts_of_numbers(&files, &sources),
        };
        for (path, count) in found.iter().filter(|(_, count)| **count > rule.free()) {
            println!("{path:?} = {count}");
        }
        println!();
    }
    Ok(())
}

/// What needs nothing but the tree.
fn check(files: &Files, sources: &[Source]) -> Result<Vec<Complaint>> {
    let exceptions = Exceptions::of(files)?;
    let mut complaints = shape::check(sources, &exceptions);
    complaints.extend(rooms::check(files, sources, &exceptions));
    complaints.extend(guarantees::check(files, sources, &exceptions));
    Ok(complaints)
}

fn files(root: &Path) -> Result<Files> {
    let mut command = Command::new("git");
    command
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root);
    let output = command.output().with_context(|| format!("run {}", text(&command)))?;
    ensure!(output.status.success(), "{} failed ({})", text(&command), output.status);
    let mut files = Files::new();
    for path in String::from_utf8(output.stdout)?.lines() {
        // One that is in the index may have gone.
        if root.join(path).exists() {
            files.insert(path.to_owned(), fs::read_to_string(root.join(path)).unwrap_or_default());
        }
    }
    Ok(files)
}

fn sources(files: &Files) -> Result<Vec<Source>> {
    let rust = files.iter().filter(|(path, _)| is_a(path, "rs"));
    rust.map(|(path, text)| Source::new(path, text)).collect()
}

fn is_a(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}
