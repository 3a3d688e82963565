//! What is granted.

use serde::{Deserialize, Serialize};

use super::Schema;

/// `enforcer grants --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantsReport {
    /// `enforcer/grants/1`.
    pub schema: Schema,
    /// Most grants at a time.
    pub limit: usize,
    /// All of them.
    pub grants: Vec<GrantStatus>,
    /// Rules that BOSH jobs, their containers and the agent have in the chain `inet bosh_agent monit_access_jobs`:
    /// principals of target `monit` as well.
    #[serde(default)]
    pub job_rules: Vec<JobRuleStatus>,
}

/// A rule of the chain that BOSH jobs write to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRuleStatus {
    /// As `nft -a list chain inet bosh_agent monit_access_jobs` shows it.
    pub handle: u64,
    /// The user who is allowed; absent for everybody in the cgroup, and where `ignored` says why nobody is.
    pub user: Option<u32>,
    /// Their name, where there is one.
    #[serde(default)]
    pub user_name: Option<String>,
    /// The cgroup below which they are; absent for anywhere.
    pub cgroup: Option<String>,
    /// Why it lets nobody in, if it does not.
    pub ignored: Option<String>,
}

/// A grant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantStatus {
    /// The target.
    pub target: String,
    /// The user who is allowed; absent for everybody in the cgroup.
    pub user: Option<u32>,
    /// Their name, where there is one.
    #[serde(default)]
    pub user_name: Option<String>,
    /// The cgroup below which they are; absent for anywhere.
    pub cgroup: Option<String>,
    /// Whether that exists now; while it does not, the grant lets nobody in.
    pub cgroup_exists: Option<bool>,
    /// What of it or of an ancestor other users than root can write, so that it lets nobody in (F6).
    #[serde(default)]
    pub cgroup_writable: Option<String>,
    /// Whether the target is configured, with `grants = true`.
    pub active: bool,
    /// RFC 3339, UTC.
    pub since: String,
    /// When it ends by itself.
    pub expires: Option<String>,
    /// Process that asked for it last.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// That user's name, where there is one.
    #[serde(default)]
    pub asker_name: Option<String>,
    /// Its name.
    pub comm: String,
}
