//! `enforcer doctor`: what this host, or an unpacked image of one, can do, what would enforce here, and what weakens it.
//!
//! Collect → judge → render: only `collect` and `image` look at anything, `judge` is pure.

use std::path::Path;

use serde::Serialize;

mod buses;
mod collect;
mod image;
mod judge;
mod legacy;
mod links;
mod order;
mod render;
#[cfg(test)]
mod tests;

/// `enforcer doctor --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// `enforcer/doctor/1`.
    pub schema: &'static str,
    /// What was looked at.
    pub host: HostReport,
    /// What the kernel can do.
    pub features: Vec<FeatureReport>,
    /// What would enforce here.
    pub choice: ChoiceReport,
    /// What weakens protection, the worst first.
    pub findings: Vec<Finding>,
    /// What could not be looked at.
    pub unseen: Vec<Unseen>,
}

/// What was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HostReport {
    /// The image's directory; null for this host.
    pub root: Option<String>,
    /// Release of the kernel.
    pub kernel: String,
    /// The configuration file.
    pub config: String,
    /// The cgroup to judge below.
    pub cgroup: Option<String>,
    /// Process id of the daemon.
    pub daemon: Option<u32>,
    /// What is in force: `ebpf`, `nftables` or `both`.
    pub in_force: Option<String>,
}

/// A feature, and whether it is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FeatureReport {
    /// Never changes.
    pub id: String,
    /// In a few words.
    pub title: String,
    /// `ebpf`, `nftables` or `either`.
    pub of: &'static str,
    /// Whether its backend does not work without it.
    pub required: bool,
    /// `supported`, `missing` or `inconclusive`.
    pub state: &'static str,
    /// Why it is not supported, or what then is so.
    pub why: Option<String>,
    /// The first Linux that has it, and the option that leaves it out.
    pub since: String,
}

/// What would enforce here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ChoiceReport {
    /// As configured.
    pub wanted: String,
    /// `ebpf`, `nftables` or `both`; null where nothing can.
    pub backend: Option<String>,
    /// Why.
    pub why: String,
}

/// How much something weakens protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Weight {
    /// Who is not allowed may get through.
    High,
    /// It may come to that, or an allowed user be refused.
    Medium,
    /// Worth knowing.
    Low,
}

/// Something that weakens protection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Never changes.
    pub id: &'static str,
    /// How much.
    pub weight: Weight,
    /// What is so, and what comes of it.
    pub what: String,
    /// Where: at most 16.
    pub items: Vec<String>,
    /// What to do about it.
    #[serde(rename = "do")]
    pub remedy: String,
}

/// Something that could not be looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unseen {
    /// What.
    pub what: String,
    /// Why not.
    pub why: String,
}

/// Looks at this host.
pub async fn host(config: &Path) -> Report {
    judge::host(&collect::host(config).await)
}

/// Looks at an unpacked image, of which nothing is run.
pub fn image(root: &Path, config: &Path) -> std::io::Result<Report> {
    Ok(judge::image(&image::collect(root, config)?))
}

impl Report {
    /// As the exit code: 0 nothing weakens, 1 something does, 2 something could not be looked at.
    #[must_use]
    pub fn code(&self) -> u8 {
        match (self.findings.is_empty(), self.unseen.is_empty()) {
            (false, _) => 1,
            (true, false) => 2,
            (true, true) => 0,
        }
    }
}
