//! `enforcer doctor`: what this host, or an unpacked image of one, can do, what would enforce here, and what weakens
//! protection.
//!
//! Facts → findings → text. Each subject has a file: its `collect` looks and changes nothing, its `findings` is pure.
//! `findings` puts the report together, `render` makes text of it.

use std::path::Path;

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

use crate::{
    backend::probe::{Facts, TrialSite, choose, probe},
    wire::{
        ActiveBackend, Backend,
        doctor::{HostReport, Report},
    },
};
use findings::{Findings, Gaps};

/// What was seen of this host.
#[derive(Clone, Debug, Default)]
struct Observations {
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

impl Observations {
    async fn collect(config: &Path) -> Self {
        let mut gaps = Gaps::default();
        let instance = instance::Instance::collect(config, &mut gaps).await;
        let (cgroup, settings) = (instance.cgroup.as_deref(), &instance.settings);
        let place = TrialSite {
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
        let would = || match choose(&self.features.works(), wanted).backend {
            Some(Backend::Ebpf | Backend::Auto) => ActiveBackend::Ebpf,
            Some(Backend::Nftables) => ActiveBackend::Nftables,
            Some(Backend::Both) => ActiveBackend::Both,
            None => ActiveBackend::None,
        };
        let enforces = self.instance.active.unwrap_or_else(would);
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
            daemon: instance.status.and_then(|status| status.daemon.pid),
            active: instance.active,
        };
        findings.report(host, &self.features, wanted, self.gaps)
    }
}

/// Looks at this host.
pub(crate) async fn host(config: &Path) -> Report {
    Observations::collect(config).await.report()
}

/// Looks at an unpacked image, of which nothing is run.
pub(crate) fn image(root: &Path, config: &Path) -> std::io::Result<Report> {
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
