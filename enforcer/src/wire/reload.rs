//! What another configuration changes.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Schema, State};
use crate::text::Page;

/// `enforcer reload --json` and `enforcer config diff --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadReport {
    /// `enforcer/reload/1`.
    pub schema: Schema,
    /// The file that the daemon has read.
    pub path: String,
    /// Whether it is active now; false where it was only compared.
    pub applied: bool,
    /// Number of the rule set that is active now.
    pub generation: u64,
    /// Settings that differ, by section and key.
    pub changes: Vec<SettingChange>,
    /// Endpoints that were protected, and are in no target any more.
    pub unprotected: Vec<UnprotectedEndpoint>,
    /// Grants that take effect or no longer do, as `grants = true` of their target has come or gone, or the target has.
    #[serde(default)]
    pub grants: Vec<GrantChange>,
    /// What is allowed, but probably not meant.
    pub warnings: Vec<String>,
    /// The state afterwards, once new names were looked up; null where it was not waited for.
    #[serde(default)]
    pub state: Option<State>,
    /// Why it is degraded.
    #[serde(default)]
    pub causes: Vec<String>,
}

/// A setting that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingChange {
    /// The section, such as `target.api`; empty for a key at the top of the file.
    pub section: String,
    /// The key.
    pub key: String,
    /// Its value before, or the elements of its list that have gone, as TOML.
    pub removed: Vec<String>,
    /// Its value now, or the elements of its list that are new.
    pub added: Vec<String>,
}

/// A grant that takes effect, or no longer does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantChange {
    /// Its target.
    pub target: String,
    /// The user who is allowed; absent for everybody in the cgroup.
    pub user: Option<u32>,
    /// The cgroup below which they are; absent for anywhere.
    pub cgroup: Option<String>,
    /// Whether it is active from then on.
    pub active: bool,
}

/// An endpoint that no target has any more.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UnprotectedEndpoint {
    /// As configured, or as the agent's settings have it.
    pub endpoint: String,
    /// The target that had it.
    pub target: String,
}

impl ReloadReport {
    /// As text: a line for each change, as `diff` marks them.
    #[must_use]
    pub fn render(&self) -> String {
        let mut page = Page::default();
        let what = match (self.applied, self.is_same()) {
            (true, true) => "reloaded; nothing changes",
            (true, false) => "reloaded",
            (false, true) => "valid; a reload changes nothing",
            (false, false) => "valid; a reload changes:",
        };
        page.line(format_args!("{}: {what}", self.path));
        for line in self.lines() {
            page.line(format_args!("  {line}"));
        }
        for warning in &self.warnings {
            page.line(format_args!("warning: {warning}"));
        }
        for UnprotectedEndpoint { endpoint, target } in &self.unprotected {
            let now = if self.applied {
                "is no longer"
            } else {
                "would no longer be"
            };
            page.line(format_args!("warning: {endpoint} of target {target} {now} protected"));
        }
        if let Some(state) = self.state {
            page.line(format_args!("{state}, generation {}", self.generation));
        }
        for cause in &self.causes {
            page.line(format_args!("  ! {cause}"));
        }
        page.into_text()
    }

    /// Whether nothing differs.
    #[must_use]
    pub fn is_same(&self) -> bool {
        self.changes.is_empty() && self.unprotected.is_empty() && self.grants.is_empty()
    }

    /// A line for each value, element or grant that has gone or is new.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        let changes = self.changes.iter().flat_map(|change| {
            let removed = change.removed.iter().map(move |value| format!("- {change}{value}"));
            let added = change.added.iter().map(move |value| format!("+ {change}{value}"));
            removed.chain(added)
        });
        let grants = self.grants.iter().map(|grant| {
            let mark = if grant.active { '+' } else { '-' };
            format!("{mark} {grant}")
        });
        changes.chain(grants)
    }
}

impl fmt::Display for GrantChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "grant of {} to ", self.target)?;
        match (self.user, &self.cgroup) {
            (Some(user), None) => write!(f, "user {user}")?,
            (Some(user), Some(cgroup)) => write!(f, "user {user} in {cgroup}")?,
            (None, cgroup) => write!(f, "anybody in {}", cgroup.as_deref().unwrap_or_default())?,
        }
        f.write_str(if self.active {
            ": becomes active"
        } else {
            ": no longer active"
        })
    }
}

/// Where it is, before its value.
impl fmt::Display for SettingChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.section.is_empty() {
            write!(f, "[{}] ", self.section)?;
        }
        write!(f, "{} = ", self.key)
    }
}
