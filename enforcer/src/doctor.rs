//! `enforcer doctor`: what this host, or an unpacked image of one, can do, what would enforce here, and what weakens protection.
//!
//! Facts → findings → text. Each subject has a file: its `collect` looks and changes nothing, its `findings` is pure. `findings` puts the
//! report together, `render` makes text of it.

use std::path::Path;

use serde::Serialize;

mod buses;
mod cycles;
mod devices;
mod files;
mod findings;
mod firewall;
mod image;
mod instance;
mod namespaces;
mod network;
mod old_rules;
mod programs;
mod render;
#[cfg(test)]
mod tests;

use crate::backend::probe::{Facts, Place, choose, probe};
use findings::{Findings, Gaps};

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
    /// The cgroup below which connections are evaluated.
    pub cgroup: Option<String>,
    /// Process id of the daemon.
    pub daemon: Option<u32>,
    /// What is active: `ebpf`, `nftables` or `both`.
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
    /// It may come to that, or an allowed user be denied.
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

/// What was seen of this host.
#[derive(Clone, Debug, Default)]
struct Seen {
    kernel: String,
    instance: instance::Instance,
    features: Facts,
    files: files::Files,
    firewall: firewall::Firewall,
    network: network::Network,
    namespaces: namespaces::Namespaces,
    programs: Vec<programs::Program>,
    cycles: Vec<cycles::Cycle>,
    gaps: Gaps,
}

impl Seen {
    async fn collect(config: &Path) -> Self {
        let mut gaps = Gaps::default();
        let instance = instance::Instance::collect(config, &mut gaps).await;
        let (cgroup, settings) = (instance.cgroup.as_deref(), &instance.settings);
        let place = Place {
            cgroup,
            pin_dir: &settings.pin_dir,
        };
        let name = nix::sys::utsname::uname();
        Self {
            kernel: name.map_or_else(
                |_| "unknown".into(),
                |name| name.release().to_string_lossy().into_owned(),
            ),
            features: probe(place).await,
            files: files::Files::collect(&instance, &mut gaps),
            firewall: firewall::Firewall::collect(&mut gaps),
            network: network::Network::collect(&mut gaps).await,
            namespaces: namespaces::Namespaces::collect(&mut gaps),
            programs: programs::collect(cgroup, &settings.pin_dir, &mut gaps),
            cycles: gaps
                .saw("the order of systemd's units", cycles::collect())
                .unwrap_or_default(),
            instance,
            gaps,
        }
    }

    fn report(self) -> Report {
        let wanted = self.instance.settings.backend;
        let enforces = self.instance.active;
        let enforces = enforces.or_else(|| choose(&self.features.works(), wanted).backend);
        let mut findings = Findings::default();
        self.instance.findings(&mut findings);
        findings::of_features(&self.features, enforces, &mut findings);
        self.files.findings(&self.instance.host, &mut findings);
        self.firewall.findings(&self.instance, enforces, &mut findings);
        old_rules::findings(&self.firewall, &self.instance, &mut findings);
        self.network.findings(&self.instance, enforces, &mut findings);
        self.namespaces.findings(enforces, &mut findings);
        programs::findings(&self.programs, enforces, &mut findings);
        cycles::findings(&self.cycles, &mut findings);
        let instance = self.instance;
        let host = HostReport {
            root: None,
            kernel: self.kernel,
            config: instance.config.display().to_string(),
            cgroup: instance.cgroup.map(|path| path.display().to_string()),
            daemon: instance.daemon.and_then(|status| status.daemon.pid),
            in_force: instance.active.map(|backend| backend.to_string()),
        };
        findings.report(host, &self.features, wanted, self.gaps)
    }
}

/// Looks at this host.
pub async fn host(config: &Path) -> Report {
    Seen::collect(config).await.report()
}

/// Looks at an unpacked image, of which nothing is run.
pub fn image(root: &Path, config: &Path) -> std::io::Result<Report> {
    Ok(image::Image::collect(root, config)?.report())
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
