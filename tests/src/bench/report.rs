//! What was measured: as JSON, as a table, and beside what an earlier run found.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::{
    conditions::{Conditions, Machine},
    instructions::Count,
    statistics::Estimate,
};

/// Version of the JSON: it grows where a key changes its meaning or goes.
pub(super) const SCHEMA: u32 = 1;

/// A run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Where it ran.
    pub machine: Machine,
    /// Whether it was only a trial, of few rounds.
    pub quick: bool,
    /// What else the machine did before.
    pub before: Conditions,
    /// And after.
    pub after: Conditions,
    /// What makes the figures doubtful.
    pub warnings: Vec<String>,
    /// All figures.
    pub figures: Vec<Figure>,
    /// What could not be measured.
    pub missing: Vec<Missing>,
    /// Instructions by path.
    pub instructions: Vec<Count>,
}

/// One figure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Figure {
    /// The budgets that it stands for, `P1` or `P4 P8`; empty for none.
    pub budget: String,
    /// What was measured.
    pub what: String,
    /// Of whom.
    pub who: String,
    /// How many endpoints were protected.
    pub endpoints: Option<u32>,
    /// `ratio`, `µs`, `ms`, `ns`, `%`, `/s` or `KiB`.
    pub unit: String,
    /// How much.
    pub estimate: Estimate,
}

/// What could not be measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Missing {
    /// What.
    pub what: String,
    /// Why.
    pub why: String,
}

impl Figure {
    /// Whether both are of the same thing.
    fn same(&self, other: &Self) -> bool {
        (&self.what, &self.who, self.endpoints, &self.unit) == (&other.what, &other.who, other.endpoints, &other.unit)
    }
}

/// A number with as many places as it deserves.
fn number(value: f64, unit: &str) -> String {
    match value.abs() {
        _ if unit == "ratio" => format!("{value:.3}"),
        0.0..10.0 => format!("{value:.2}"),
        10.0..1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// The table of figures, and beside each the one of an older run where there is one.
#[must_use]
pub(super) fn table(report: &Report, old: Option<&Report>) -> String {
    let mut text = String::new();
    let mut kinds: Vec<&str> = Vec::new();
    for figure in &report.figures {
        if !kinds.contains(&figure.what.as_str()) {
            kinds.push(&figure.what);
        }
    }
    let mut before = None;
    let mut figures: Vec<&Figure> = report.figures.iter().collect();
    figures.sort_by_key(|figure| kinds.iter().position(|kind| figure.what == *kind));
    for figure in figures {
        if before != Some(&figure.what) {
            let budget = if figure.budget.is_empty() {
                String::new()
            } else {
                format!(" [{}]", figure.budget)
            };
            let _ = writeln!(text, "\n{}, {}{budget}", figure.what, figure.unit);
            before = Some(&figure.what);
        }
        let Estimate {
            median,
            low,
            high,
            samples,
        } = figure.estimate;
        let [median, low, high] = [median, low, high].map(|value| number(value, &figure.unit));
        let endpoints = figure.endpoints.map(|count| count.to_string()).unwrap_or_default();
        let _ = write!(
            text,
            "  {:<34} {endpoints:>7} {median:>10}  [{low}, {high}], {samples} samples",
            figure.who
        );
        if let Some(older) = old.and_then(|old| old.figures.iter().find(|one| one.same(figure))) {
            let was = number(older.estimate.median, &figure.unit);
            let word = match figure.estimate.differs(&older.estimate) {
                false => "no difference",
                true if figure.estimate.median > older.estimate.median => "MORE",
                true => "less",
            };
            let _ = write!(text, "; was {was}: {word}");
        }
        text.push('\n');
    }
    if !report.instructions.is_empty() {
        let _ = write!(
            text,
            "\ninstructions executed, exact [P2]\n{}",
            super::instructions::table(&report.instructions)
        );
    }
    let conditions = [("before", &report.before), ("after", &report.after)];
    let _ = writeln!(text, "\non {}", report.machine);
    for (when, conditions) in conditions {
        let _ = writeln!(text, "{when}: {conditions}");
    }
    for missing in &report.missing {
        let _ = writeln!(text, "not measured: {}: {}", missing.what, missing.why);
    }
    for warning in &report.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    text
}
