//! Another configuration: read on a signal, on request or when users mean other numbers, and made active whole or not
//! at all (F4).

use std::{collections::BTreeSet, path::Path, time::Instant};

use ipnet::IpNet;
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use super::{About, Daemon, DaemonError};
use crate::{
    backend::Start,
    bosh,
    config::{self, ConfigError, Forward},
    grants::Key,
    inputs::{HostConfig, InputError, Inputs},
    policy::{Destination, Endpoint, Mode},
    ruleset::covers,
    wire::{GrantChange, ReloadReport, Reply, Schema, UnprotectedEndpoint},
};

/// Changes that are logged one by one.
const LOGGED_CHANGES: usize = 32;

/// A reload that is to be reported once the disk has what it made active.
#[derive(Debug)]
pub(super) struct Reloaded {
    report: ReloadReport,
    /// Who waits for that; nobody after a signal.
    replies: Option<mpsc::Sender<Reply>>,
}

impl Reloaded {
    /// Whether a caller waits for it.
    pub(super) fn is_awaited(&self) -> bool {
        self.replies.is_some()
    }
}

impl Daemon {
    /// Takes the configuration as it is now. A file that was there and has gone is a mistake, not the wish for the
    /// defaults (F4).
    pub(super) fn take_configuration(&mut self) -> Result<(), DaemonError> {
        let config = self.read_configuration()?;
        self.change_to(config)?;
        self.pending = None;
        Ok(())
    }

    fn read_configuration(&self) -> Result<HostConfig, DaemonError> {
        let path = &self.inputs.config.path;
        if self.inputs.config.from_file && !path.exists() {
            let path = path.clone();
            // Only of the default one the absence may be meant, later (B1).
            let error = if path == Path::new(config::DEFAULT_PATH) {
                ConfigError::Gone { path }
            } else {
                ConfigError::Missing { path }
            };
            return Err(InputError::from(error).into());
        }
        Ok(HostConfig::load_knowing(path, &self.inputs.config.users)?)
    }

    /// Takes the configuration for a signal, or for a caller who waits for a reply.
    pub(super) fn reload(&mut self, replies: Option<mpsc::Sender<Reply>>) {
        let (before, held) = (self.inputs.clone(), self.guard.is_held());
        match self.take_configuration() {
            Ok(()) => {
                self.faults.set_silently(About::Reload, None);
                let report = ReloadReport {
                    applied: true,
                    generation: self.guard.generation(),
                    ..compare(&before, &self.inputs, held)
                };
                self.report_reload(Reloaded { report, replies });
            }
            Err(error) => {
                let stays = "the previous rules stay active until a reload succeeds";
                let fault = format!("reload: {error}; {stays}");
                let lines = match error.lines() {
                    several if several.len() > 1 => several.into_iter().chain([format!("reload: {stays}")]).collect(),
                    _ => vec![fault.clone()],
                };
                // Each time, not once a change: it answers a signal.
                for line in &lines {
                    error!("{line}");
                }
                if let Some(replies) = replies {
                    let _ = replies.try_send(Reply::Error(lines.join("\n")));
                }
                self.faults.set_silently(About::Reload, Some(fault));
            }
        }
    }

    /// What a reload would change. Nothing is changed.
    pub(super) fn preview(&mut self) -> Result<ReloadReport, DaemonError> {
        let config = self.read_configuration()?;
        self.ensure_same_place(&config)?;
        let now = Instant::now();
        let mut inputs = self.inputs.clone();
        if let Some(dir) = config.config.bus_dir()
            && let Some(bus) = bosh::read(dir).after(inputs.bus.as_ref())
        {
            inputs.bus = Some(bus.endpoints);
        }
        inputs.set_config(config, now);
        inputs.settle(now);
        inputs.look_at_cgroups();
        inputs.desired(now)?;
        Ok(ReloadReport {
            generation: self.enforcement.observe_quickly()?.generation,
            ..compare(&self.inputs, &inputs, self.guard.is_held())
        })
    }

    /// Logs what a reload has changed, and replies to the caller who waits, if any, who is returned.
    pub(super) fn reloaded(reload: Reloaded, unsaved: Option<&str>) -> Option<mpsc::Sender<Reply>> {
        let Reloaded { mut report, replies } = reload;
        report.causes.extend(unsaved.map(str::to_owned));
        info!("reloaded {}", report.path);
        for line in report.lines().take(LOGGED_CHANGES) {
            info!("reloaded: {line}");
        }
        let more = report.lines().count().saturating_sub(LOGGED_CHANGES);
        if more > 0 {
            info!("reloaded: {more} more changes");
        }
        for UnprotectedEndpoint { endpoint, target } in report.unprotected.iter().take(LOGGED_CHANGES) {
            warn!("{endpoint} of target {target} is no longer protected");
        }
        let more = report.unprotected.len().saturating_sub(LOGGED_CHANGES);
        if more > 0 {
            warn!("{more} more endpoints are no longer protected");
        }
        let replies = replies?;
        let _ = replies.try_send(Reply::Reload(Box::new(report)));
        Some(replies)
    }

    fn ensure_same_place(&self, wanted: &HostConfig) -> Result<(), DaemonError> {
        let keys = self.fixed_keys(wanted);
        if keys.is_empty() {
            return Ok(());
        }
        Err(DaemonError::FixedKeys {
            path: wanted.path.clone(),
            keys,
        })
    }

    /// Keys that hold for the whole run and are others in another configuration.
    pub(super) fn fixed_keys(&self, wanted: &HostConfig) -> Vec<&'static str> {
        let (old, new) = (self.inputs.settings(), wanted.settings());
        let fixed = [
            ("cgroup", self.inputs.config.cgroup != wanted.cgroup),
            ("pin_dir", old.pin_dir != new.pin_dir),
            ("state_dir", old.state_dir != new.state_dir),
            ("socket", old.socket != new.socket),
            ("nft_table", old.nft_table != new.nft_table),
        ];
        let changed = fixed.iter().filter(|(_, changed)| *changed);
        changed.map(|(key, _)| *key).collect()
    }

    /// Makes another configuration active, or keeps this one whole.
    pub(super) fn change_to(&mut self, config: HostConfig) -> Result<(), DaemonError> {
        self.ensure_same_place(&config)?;
        for warning in &config.warnings {
            warn!("{warning}");
        }
        self.read_bus(config.config.bus_dir());
        let mut inputs = self.inputs.clone();
        inputs.set_config(config, Instant::now());
        inputs.host.local = inputs.local()?;
        let Inputs { config, jobs, .. } = &mut inputs;
        if let Err(error) = self.chain.look(config, jobs) {
            warn!("{error}; the rules of jobs that were read last stay in use");
        }
        inputs.settle(Instant::now());
        inputs.look_at_cgroups();
        let start = Start {
            settings: inputs.settings(),
            cgroup: inputs.config.cgroup.as_deref(),
            daemon: true,
            log_level: self.log_level,
        };
        let (guard, store) = (&mut self.guard, &mut *self.enforcement);
        let extended = store.extend(start).map_err(DaemonError::from);
        match extended.and_then(|()| guard.apply_configured(store, &inputs, Instant::now())) {
            Ok(applied) => {
                self.inputs = inputs;
                self.applied(applied);
            }
            Err(error) => {
                self.chain.unread();
                // Goes back to what was needed before.
                self.enforcement.retire(self.inputs.settings());
                return Err(error);
            }
        }
        self.enforcement.retire(self.inputs.settings());
        self.identities
            .follow(&self.inputs.config.mount, &self.inputs.config.users);
        self.sync_chain();
        self.look_at_visibility();
        self.faults.set(About::RuleSet, None);
        self.faults.set(About::Host, None);
        self.faults.set(About::Users, self.inputs.config.fault());
        self.rounds.retain(&self.inputs.policy().names());
        self.look_up_due(Instant::now());
        self.answer_waiting();
        Ok(())
    }
}

/// What differs between two inputs, for the report of a reload. While rules are `held` that nobody
/// knows, they are what is active before, and not what the inputs come to.
fn compare(old: &Inputs, new: &Inputs, held: bool) -> ReloadReport {
    let mut warnings = new.config.warnings.clone();
    if (old.policy().mode, new.policy().mode) == (Mode::Enforce, Mode::Audit) {
        warnings.push("mode = \"audit\": nothing is denied from then on, on any target".to_owned());
    }
    if (old.settings().forward, new.settings().forward) == (Forward::Refuse, Forward::Allow) {
        warnings.push(
            "forward = \"allow\": what this host forwards, as for containers, may reach every endpoint".to_owned(),
        );
    }
    if held {
        let unknown = "the active rules were not made from the configuration that this is compared with: what only \
                       they protect is not listed";
        warnings.push(unknown.to_owned());
    }
    ReloadReport {
        schema: Schema::Reload,
        path: new.config.path.display().to_string(),
        applied: false,
        generation: 0,
        changes: old.config.config.changes(&new.config.config),
        unprotected: unprotected(old, new),
        grants: grants(old, new),
        warnings,
        state: None,
        causes: Vec::new(),
    }
}

/// Grants that were active and are not any more, or the other way round.
fn grants(old: &Inputs, new: &Inputs) -> Vec<GrantChange> {
    let may = |inputs: &Inputs, key: &Key| {
        let target = inputs.config.policy().target(&key.target);
        target.is_some_and(|target| target.grants)
    };
    let changes = old.grants.iter().filter_map(|(key, _)| {
        let active = may(new, key);
        (active != may(old, key)).then(|| GrantChange {
            target: key.target.clone(),
            user: key.to.user().map(|uid| uid.0),
            cgroup: key.to.cgroup().map(ToString::to_string),
            active,
        })
    });
    changes.collect()
}

/// Endpoints that were protected, and that no target has any more, nor a prefix or `local` around them.
fn unprotected(old: &Inputs, new: &Inputs) -> Vec<UnprotectedEndpoint> {
    let of = |inputs: &Inputs| -> BTreeSet<(Endpoint, String)> {
        let targets = inputs.policy().targets.iter();
        let all = targets.flat_map(|target| target.endpoints.iter().map(|endpoint| (endpoint, &target.name)));
        all.map(|(endpoint, name)| (endpoint.clone(), name.clone())).collect()
    };
    let still: BTreeSet<Endpoint> = of(new).into_iter().map(|(endpoint, _)| endpoint).collect();
    let gone: Vec<_> = of(old).into_iter().filter(|(one, _)| !still.contains(one)).collect();
    if gone.is_empty() {
        return Vec::new();
    }
    let now = Instant::now();
    let rules = new.desired(now).map(|desired| desired.rules).ok();
    let resolved = old.names.resolved(now);
    let is_covered = |endpoint: &Endpoint| {
        let covered = |net: IpNet| {
            let covers = |rules| covers(rules, endpoint.protocol, net, endpoint.port.get());
            rules.as_ref().is_some_and(covers)
        };
        match &endpoint.destination {
            Destination::Address(address) => covered((*address).into()),
            Destination::Prefix(net) => covered(*net),
            Destination::Local => false,
            Destination::Name(name) => resolved
                .get(name)
                .is_some_and(|known| !known.is_empty() && known.iter().all(|address| covered((*address).into()))),
        }
    };
    let gone = gone.into_iter().filter(|(endpoint, _)| !is_covered(endpoint));
    gone.map(|(endpoint, target)| UnprotectedEndpoint {
        endpoint: endpoint.to_string(),
        target,
    })
    .collect()
}
