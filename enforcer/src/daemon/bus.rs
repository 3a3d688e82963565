//! The message bus that a BOSH agent's settings name (B2): read when they change, kept when they say nothing usable
//! (F4).

use std::{path::Path, time::Instant};

use tracing::{info, warn};

use super::{About, Daemon};
use crate::bosh::{self, Bus, Watch};

/// Settings that end before their content does.
#[derive(Clone, Copy)]
pub(super) struct Unfinished {
    since: Instant,
    /// Whether they have been so for too long, and that is a fault.
    reported: bool,
}

impl Unfinished {
    fn now() -> Self {
        Self {
            since: Instant::now(),
            reported: false,
        }
    }

    fn is_overdue(self) -> bool {
        self.since.elapsed() >= bosh::PATIENCE
    }
}

impl Daemon {
    /// Watches the settings that the configuration names, if it does: as before, where they are the same.
    pub(super) fn watch(&self, before: Option<Watch>) -> Option<Watch> {
        if before.as_ref().map(Watch::dir) == self.inputs.config.config.bus_dir() {
            return before;
        }
        let (watch, errors) = Watch::start(self.inputs.config.config.bus_dir()?);
        for error in errors {
            warn!(
                "watch {}: {error}; it is read once a second instead",
                watch.dir().display()
            );
        }
        Some(watch)
    }

    /// Reads the settings in `dir`. What was known before stays where they say nothing usable.
    pub(super) fn read_bus(&mut self, dir: Option<&Path>) {
        let Some(dir) = dir else {
            self.unfinished = None;
            self.faults.set(About::Bus, None);
            return;
        };
        let read = bosh::read(dir);
        if let Some(Bus { endpoints, files }) = read.after(self.inputs.bus.as_ref())
            && self.inputs.bus.as_ref() != Some(&endpoints)
        {
            let list: Vec<String> = endpoints.iter().map(ToString::to_string).collect();
            let list = if list.is_empty() {
                "a new director's own, nothing to protect".to_owned()
            } else {
                list.join(", ")
            };
            let files: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
            info!("message bus from {}: {list}", files.join(" and "));
            self.inputs.bus = Some(endpoints);
        }
        let fault = read.fault().map(|fault| match (&self.inputs.bus, read.is_missing()) {
            (None, _) => format!("message bus not known yet: {fault}; target nats protects nothing until it is"),
            (Some(_), true) => format!("message bus not known yet: {fault}; the last known one stays protected"),
            (Some(_), false) => format!("message bus: {fault}; its known servers stay protected"),
        });
        let reported = self.unfinished.is_some_and(|unfinished| unfinished.reported);
        let unfinished = read
            .is_unfinished()
            .then(|| self.unfinished.unwrap_or_else(Unfinished::now));
        self.unfinished = unfinished.map(|unfinished| Unfinished {
            reported: unfinished.is_overdue(),
            ..unfinished
        });
        match self.unfinished {
            Some(Unfinished { reported: false, .. }) => {
                // Known or not, that is no news; where nothing is known, `status` does not hide it.
                if self.inputs.bus.is_none() && self.faults.of(About::Bus).is_none() {
                    self.faults.set_silently(About::Bus, fault);
                }
            }
            // Where such a file ends is no news.
            Some(Unfinished { reported: true, .. }) if reported => {}
            Some(Unfinished { reported: true, .. }) | None => self.faults.set(About::Bus, fault),
        }
    }

    /// Settings may be others, or be there at last, or be without an end for too long.
    pub(super) fn look_at_settings(&mut self, mut watch: Option<&mut Watch>) {
        let overdue = self
            .unfinished
            .is_some_and(|unfinished| !unfinished.reported && unfinished.is_overdue());
        let changed = watch.as_deref_mut().is_some_and(Watch::poll_changed);
        if (changed || overdue) && self.take_bus() {
            self.look_up_due(Instant::now());
            self.answer_waiting();
        }
        if let Some(watch) = watch {
            watch.look_again(self.is_unsettled().then_some(bosh::AGAIN));
        }
    }

    /// Whether settings are being written.
    pub(super) fn is_unsettled(&self) -> bool {
        self.unfinished.is_some_and(|unfinished| !unfinished.reported)
    }

    /// Takes the settings as they are now. True if the policy is another one by them.
    pub(super) fn take_bus(&mut self) -> bool {
        let dir = self.inputs.config.config.bus_dir().map(Path::to_path_buf);
        self.read_bus(dir.as_deref());
        self.settle()
    }

    /// As [`Daemon::take_bus`], once what is being written has been.
    pub(super) async fn take_whole_bus(&mut self) {
        self.take_bus();
        while self.is_unsettled() {
            tokio::time::sleep(bosh::AGAIN).await;
            self.take_bus();
        }
    }
}
