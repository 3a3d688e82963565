//! Another configuration: read on a signal or when users mean other numbers, and made active whole or not at all (F4).

use std::time::Instant;

use tracing::{error, warn};

use super::{About, Daemon, DaemonError};
use crate::{
    backend::Start,
    config::ConfigError,
    inputs::{HostConfig, InputError, Inputs},
};

impl Daemon {
    /// Takes the configuration as it is now. A file that was there and has gone is a mistake, not the wish for the
    /// defaults (F4).
    pub(super) fn take_configuration(&mut self) -> Result<(), DaemonError> {
        let path = &self.inputs.config.path;
        if self.inputs.config.from_file && !path.exists() {
            return Err(InputError::from(ConfigError::Missing { path: path.clone() }).into());
        }
        let config = HostConfig::load_knowing(path, &self.inputs.config.users)?;
        self.change_to(config)
    }

    pub(super) fn reload(&mut self) {
        let loaded = self.take_configuration();
        match loaded {
            Ok(()) => {
                self.faults.set_silently(About::Reload, None);
                self.report_reload();
            }
            Err(error) => {
                // Each time, not once a change: it answers a signal.
                let fault = format!("reload: {error}; the previous rules stay active");
                error!("{fault}");
                self.faults.set_silently(About::Reload, Some(fault));
            }
        }
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
        let keys = self.fixed_keys(&config);
        if !keys.is_empty() {
            return Err(DaemonError::FixedKeys {
                path: config.path,
                keys,
            });
        }
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
        self.sync_chain();
        self.look_at_visibility();
        self.faults.set(About::RuleSet, None);
        self.faults.set(About::Host, None);
        self.faults.set(About::Users, self.inputs.config.fault());
        self.pending = None;
        self.rounds.retain(&self.inputs.policy().names());
        self.look_up_due(Instant::now());
        self.answer_waiting();
        Ok(())
    }
}
