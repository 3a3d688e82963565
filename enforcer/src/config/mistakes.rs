//! Everything that is wrong with a configuration, in the order of files and lines, one line each.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::{ConfigFault, FileFault, PolicyFault, Remark};

/// Most mistakes that are listed; the others are counted. A file may have a million.
pub const MAX_LISTED: usize = 20;

/// Something that is wrong with a configuration file.
#[derive(Debug, Error)]
pub enum Mistake {
    /// Its form is.
    #[error("{}:{line}: {}", path.display(), said(keys, fault))]
    Form {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The keys that lead there; an element of an array has an empty one.
        keys: Vec<String>,
        /// What is wrong.
        fault: ConfigFault,
    },
    /// It is not read.
    #[error(transparent)]
    File(#[from] FileFault),
    /// A target means nothing that can be done.
    #[error(transparent)]
    Target(#[from] Remark<PolicyFault>),
}

impl Mistake {
    /// The file that has it.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Form { path, .. } | Self::Target(Remark { path, .. }) => path,
            Self::File(fault) => fault.path(),
        }
    }

    /// Its line, from 1; none where it is the file as a whole.
    #[must_use]
    pub fn line(&self) -> Option<usize> {
        match self {
            Self::Form { line, .. } | Self::Target(Remark { line, .. }) => Some(*line),
            Self::File(_) => None,
        }
    }

    /// The target that it is in.
    #[must_use]
    pub fn target(&self) -> Option<&str> {
        match self {
            Self::Form { keys, .. } => within_target(keys).map(|(target, _)| target),
            Self::File(_) => None,
            Self::Target(Remark { target, .. }) => Some(target),
        }
    }

    /// The key, with its section: `dns.retain`; in a target without it: `allow`.
    #[must_use]
    pub fn key(&self) -> Option<String> {
        let (keys, fault) = match self {
            Self::Form { keys, fault, .. } => (keys, fault),
            Self::File(_) => return None,
            Self::Target(Remark { what, .. }) => return what.key().map(str::to_owned),
        };
        let keys = within_target(keys).map_or(keys.as_slice(), |(_, keys)| keys);
        let last = match fault {
            ConfigFault::UnknownKey { key, .. } | ConfigFault::NoTarget { key, .. } => Some(key.as_str()),
            ConfigFault::MissingKey { key } => Some(*key),
            ConfigFault::RefreshOrder { .. } => Some("dns.min_refresh"),
            ConfigFault::Nat64Prefixes { .. } => Some("nat64"),
            ConfigFault::NotUtf8
            | ConfigFault::Syntax { .. }
            | ConfigFault::Twice
            | ConfigFault::TargetTwice { .. }
            | ConfigFault::Kind { .. }
            | ConfigFault::Word { .. }
            | ConfigFault::Number
            | ConfigFault::Value { .. } => None,
        };
        let keys = keys.iter().map(String::as_str).filter(|key| !key.is_empty());
        let all: Vec<&str> = keys.chain(last).collect();
        (!all.is_empty()).then(|| all.join("."))
    }

    /// What is wrong, without the place.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::Form { keys, fault, .. } => said(keys, fault),
            Self::File(fault) => fault.to_string(),
            Self::Target(remark) => remark.message(),
        }
    }

    fn order(&self) -> (usize, &Path, usize) {
        order(self.path(), self.line().unwrap_or_default())
    }
}

/// By file and line. The directory of more targets comes after the file itself, which lies one level above.
pub(super) fn order(path: &Path, line: usize) -> (usize, &Path, usize) {
    (path.components().count(), path, line)
}

/// The name of a target and what lies within it.
fn within_target(keys: &[String]) -> Option<(&str, &[String])> {
    match keys {
        [section, target, keys @ ..] if section == "target" => Some((target, keys)),
        _ => None,
    }
}

/// What is at fault and why: `retain in [dns] is …`, or `[dns] has …` where it is a section as a whole.
fn said(keys: &[String], fault: &ConfigFault) -> String {
    let whole = matches!(
        fault,
        ConfigFault::UnknownKey { .. }
            | ConfigFault::NoTarget { .. }
            | ConfigFault::TargetTwice { .. }
            | ConfigFault::MissingKey { .. }
    );
    let thing = match keys {
        [] if whole => "the top of the file".to_owned(),
        [] => return fault.to_string(),
        keys if whole => section(keys),
        keys => value(keys),
    };
    format!("{thing} {fault}")
}

fn value(keys: &[String]) -> String {
    let (name, parents) = match keys {
        [parents @ .., key, element] if element.is_empty() => (format!("an element of {key}"), parents),
        [parents @ .., key] => (key.clone(), parents),
        [] => return String::new(),
    };
    if parents.is_empty() {
        name
    } else {
        format!("{name} in {}", section(parents))
    }
}

fn section(keys: &[String]) -> String {
    if keys.iter().any(String::is_empty) {
        value(keys)
    } else {
        format!("[{}]", keys.join("."))
    }
}

/// Whatever is wrong with a configuration: the first [`MAX_LISTED`], and how many more.
#[derive(Debug, Default)]
pub struct Mistakes {
    listed: Vec<Mistake>,
    more: usize,
}

impl Mistakes {
    /// Adds one where it belongs.
    pub(super) fn add(&mut self, mistake: impl Into<Mistake>) {
        let mistake = mistake.into();
        let place = self.listed.partition_point(|other| other.order() <= mistake.order());
        self.listed.insert(place, mistake);
        if self.listed.len() > MAX_LISTED {
            self.listed.truncate(MAX_LISTED);
            self.more += 1;
        }
    }

    /// One alone: it hides all others.
    pub(super) fn of(mistake: impl Into<Mistake>) -> Self {
        let mut mistakes = Self::default();
        mistakes.add(mistake);
        mistakes
    }

    /// Adds those of another part of the configuration.
    pub(super) fn append(&mut self, others: Self) {
        for mistake in others.listed {
            self.add(mistake);
        }
        self.more += others.more;
    }

    /// The first of them.
    pub fn iter(&self) -> impl Iterator<Item = &Mistake> {
        self.listed.iter()
    }

    /// How many there are besides.
    #[must_use]
    pub fn more(&self) -> usize {
        self.more
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    /// As a person reads them, a line each.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let more = (self.more > 0).then(|| format!("and {} more", self.more));
        self.listed.iter().map(ToString::to_string).chain(more).collect()
    }
}

/// Where there is room for one line: the first.
impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.listed.as_slice() {
            [] => Ok(()),
            [only] => only.fmt(f),
            [first, others @ ..] => {
                let others = others.len() + self.more;
                write!(f, "{first} (and {others} more: enforcer config check lists them)")
            }
        }
    }
}

impl std::error::Error for Mistakes {}

#[cfg(test)]
mod tests;
