//! What a host can do, and what weakens protection there.

use serde::Serialize;

use super::{ActiveBackend, Backend, Schema};

/// `enforcer doctor --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// `enforcer/doctor/1`.
    pub schema: Schema,
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
    /// The cgroup below which attempts are evaluated.
    pub cgroup: Option<String>,
    /// Process id of the daemon.
    pub daemon: Option<u32>,
    /// What enforces; null where nothing does.
    pub active: Option<ActiveBackend>,
}

/// A feature, and whether it is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FeatureReport {
    /// Never changes.
    pub id: String,
    /// In a few words.
    pub title: String,
    /// What asks for it.
    pub of: Side,
    /// Whether its backend does not work without it.
    pub required: bool,
    /// Whether it is there.
    pub state: FeatureState,
    /// Why it is not supported, or what then is so.
    pub why: Option<String>,
    /// The first Linux that has it, and the option that leaves it out.
    pub since: String,
}

/// What would enforce here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChoiceReport {
    /// As configured.
    pub wanted: Backend,
    /// What that comes to; null where nothing can enforce.
    pub backend: Option<Backend>,
    /// Why.
    pub why: String,
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

words! {
    /// What asks for a feature.
    Side {
        /// The eBPF backend.
        Ebpf = "ebpf",
        /// The nftables backend.
        Nftables = "nftables",
        /// Either.
        Either = "either",
    }
}

words! {
    /// Whether a feature is there.
    FeatureState {
        /// It was tried and works.
        Supported = "supported",
        /// The kernel does not have it, or not here.
        Missing = "missing",
        /// It could not be found out.
        Inconclusive = "inconclusive",
    }
}

words! {
    /// How much something weakens protection.
    Weight {
        /// A user who is not allowed may connect.
        High = "high",
        /// It may come to that, or an allowed user may be denied.
        Medium = "medium",
        /// Worth knowing.
        Low = "low",
    }
}
