//! The message bus that a BOSH agent's settings name (B2): read when they change, kept when they say nothing usable (F4).

use std::{path::Path, time::Instant};

use tracing::{info, warn};

use super::{About, Daemon};
use crate::bosh::{self, Bus, Watch};

impl Daemon {
    /// Watches the settings that the configuration names, if it does: as before, where they are the same.
    pub(super) fn watch(&self, before: Option<Watch>) -> Option<Watch> {
        if before.as_ref().map(Watch::dir) == self.wanted.config.bus_dir() {
            return before;
        }
        let (watch, error) = Watch::start(self.wanted.config.bus_dir()?);
        if let Some(error) = error {
            warn!(
                "watch {}: {error}; it is looked at once a second",
                watch.dir().display()
            );
        }
        Some(watch)
    }

    /// Reads the settings in `dir`. What was known before stays where they say nothing usable.
    pub(super) fn read_bus(&mut self, dir: Option<&Path>) {
        let Some(dir) = dir else {
            self.faults.set(About::Bus, None);
            return;
        };
        let read = bosh::read(dir);
        if let Some(Bus { endpoints, file }) = read.usable(self.bus.as_ref()).cloned()
            && self.bus.as_ref() != Some(&endpoints)
        {
            let list: Vec<String> = endpoints.iter().map(ToString::to_string).collect();
            let list = if list.is_empty() {
                "of a new director's own, nothing to protect".to_owned()
            } else {
                list.join(", ")
            };
            info!("message bus, by {}: {list}", file.display());
            self.bus = Some(endpoints);
        }
        let fault = read.fault.map(|fault| match (&self.bus, fault.is_missing()) {
            (None, _) => format!("message bus not known yet: {fault}; target nats protects nothing until it is"),
            (Some(_), true) => format!("message bus not known yet: {fault}; the last one known stays protected"),
            (Some(_), false) => format!("message bus: {fault}; what is known of it stays protected"),
        });
        self.faults.set(About::Bus, fault);
    }

    /// Takes the settings as they are now. True if the policy is another one by them.
    pub(super) fn take_bus(&mut self) -> bool {
        let dir = self.wanted.config.bus_dir().map(Path::to_path_buf);
        self.read_bus(dir.as_deref());
        let changed = self.wanted.take_bus(self.bus.as_ref());
        if changed {
            self.policy = self.grants.add_to(&self.wanted.policy);
            self.names.set(self.wanted.policy.names(), Instant::now());
            self.names.restore(&self.known_before, Instant::now());
        }
        changed
    }

    /// As [`Daemon::take_bus`], and puts in force what follows.
    pub(super) fn settings_changed(&mut self) {
        if self.take_bus() {
            self.applied = None;
            self.forget_gone_names();
            self.look_up_due(Instant::now());
            self.answer_waiting();
        }
    }

    /// Whether the policy has another bus than the one known, as after a change that was given up half-way.
    pub(super) fn misses_bus(&self) -> bool {
        self.wanted.config.bus_dir().is_some() && self.bus.is_some() && self.wanted.policy.bus() != self.bus.as_ref()
    }
}
