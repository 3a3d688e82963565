//! The verdict on an attempt, and what is wrong with a configuration.

use serde::Serialize;

use super::{Schema, Verdict};

/// `enforcer check --json`, one line an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// `enforcer/check/1`.
    pub schema: Schema,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Whether a target has the destination.
    pub judged: bool,
    /// Protocol, address and port.
    pub destination: String,
    /// Number of the rule set that decided.
    pub generation: u64,
    /// The targets that have it.
    pub targets: Vec<CheckTarget>,
    /// Why.
    pub reason: String,
}

/// A target of an attempt's destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckTarget {
    /// Its name.
    pub name: String,
    /// Whether it allows the attempt.
    pub admits: bool,
    /// Why.
    pub reason: String,
}

/// `enforcer config check --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConfigCheck {
    /// `enforcer/config-check/1`.
    pub schema: Schema,
    /// The file.
    pub path: String,
    /// Whether it is there; without one the defaults hold.
    pub exists: bool,
    /// Who else could have written it, for which the daemon rejects it; null where it is root's alone.
    pub untrusted: Option<String>,
    /// How many targets it has; 0 where it is not valid.
    pub targets: usize,
    /// Whether the file itself has none, so that those of a BOSH VM are protected.
    pub defaults: bool,
    /// What is odd.
    pub warnings: Vec<String>,
    /// What does not exist yet: users and cgroups, which match nobody until then, and names whose port is closed.
    pub absent: Vec<String>,
    /// Which of `cgroup`, `pin_dir`, `state_dir` and `socket` a start could not use, and why.
    pub places: Vec<String>,
    /// Names that will not be protected as it is.
    pub unprotected: Vec<String>,
    /// Why it is not valid, in the order of files and lines; empty where it is.
    pub errors: Vec<ConfigMistake>,
    /// How many errors there are besides.
    pub more_errors: usize,
    /// What only the host itself can tell, and was not asked.
    pub not_checked: Vec<&'static str>,
}

/// What is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConfigMistake {
    /// The file.
    pub path: String,
    /// The line, from 1; null where it is not a line that is wrong.
    pub line: Option<usize>,
    /// The target, where it is in one.
    pub target: Option<String>,
    /// The key, where it is one: `dns.retain`; in a target `allow`.
    pub key: Option<String>,
    /// What is wrong, and what to do.
    pub message: String,
}
