//! What is not as it should be yet: a count for each file, which may only become smaller, and imports that go up.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{Complaint, Files};

/// Where the exceptions are.
pub(super) const FILE: &str = "xtask/tidy.toml";

/// The exceptions.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Exceptions {
    #[serde(default)]
    length: BTreeMap<String, usize>,
    #[serde(default)]
    wide: BTreeMap<String, usize>,
    #[serde(default)]
    numbers: BTreeMap<String, usize>,
    #[serde(default)]
    pub(super) arrows: Vec<Arrow>,
    #[serde(skip)]
    text: String,
}

/// An import that no room should have.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Arrow {
    pub(super) from: String,
    pub(super) to: String,
    /// Why it is there, and what ends it.
    #[serde(rename = "why")]
    _why: String,
}

/// A rule that a file may break as often as the file's ceiling says.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    /// Lines of a file without its tests.
    Length,
    /// Lines wider than is allowed.
    Wide,
    /// Numbers of guarantees in string literals.
    Numbers,
}

impl Rule {
    pub(super) const ALL: [Self; 3] = [Self::Length, Self::Wide, Self::Numbers];

    /// The table of the exceptions.
    pub(super) fn table(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Wide => "wide",
            Self::Numbers => "numbers",
        }
    }

    /// What any file may have.
    pub(super) fn free(self) -> usize {
        match self {
            Self::Length => 500,
            Self::Wide | Self::Numbers => 0,
        }
    }
}

impl Exceptions {
    pub(super) fn of(files: &Files) -> Result<Self> {
        let text = files.get(FILE).map_or("", String::as_str);
        let exceptions: Self = toml::from_str(text).with_context(|| format!("read {FILE}"))?;
        Ok(Self {
            text: text.to_owned(),
            ..exceptions
        })
    }

    fn ceilings(&self, rule: Rule) -> &BTreeMap<String, usize> {
        match rule {
            Rule::Length => &self.length,
            Rule::Wide => &self.wide,
            Rule::Numbers => &self.numbers,
        }
    }

    /// What a file may have.
    pub(super) fn allowed(&self, rule: Rule, path: &str) -> usize {
        self.ceilings(rule).get(path).copied().unwrap_or(rule.free())
    }

    /// Ceilings that are too high for what there is by now.
    pub(super) fn loose(&self, rule: Rule, found: &BTreeMap<&str, usize>) -> Vec<Complaint> {
        let mut complaints = Vec::new();
        for (path, ceiling) in self.ceilings(rule) {
            let now = found.get(path.as_str()).copied().unwrap_or(0);
            let entry = format!("{path:?} = {ceiling}");
            let line = self.line_of(rule.table(), &entry);
            let what = format!("[{}] has {entry}, and there are {now}", rule.table());
            if now <= rule.free() {
                complaints.push(Complaint::new(FILE, line, what, "remove this line"));
            } else if now * 5 < ceiling * 4 {
                let remedy = format!("write {path:?} = {now}");
                complaints.push(Complaint::new(FILE, line, what, remedy));
            }
        }
        complaints
    }

    /// Where an entry of a table stands.
    pub(super) fn line_of(&self, table: &str, entry: &str) -> usize {
        let lines = self.text.lines().enumerate();
        let mut of_table = lines.skip_while(|(_, line)| line.trim_matches(['[', ']']) != table);
        of_table.find(|(_, line)| *line == entry).map_or(1, |(at, _)| at + 1)
    }
}
