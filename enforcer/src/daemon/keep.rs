//! Keeps what is in force for the next start (F4, N7): only once it is, and only if it is another.

use std::time::Instant;

use super::{About, Daemon};
use crate::{
    resolve::Known,
    state::{self, LastGoodRef, Mark, Record},
};

/// What the file holds.
#[derive(Debug)]
pub(super) struct Kept {
    /// None where there is no file, or none that can be used.
    mark: Option<Mark>,
    names: Known,
    /// Whether there is a file that cannot be used: its owner may want to see it.
    damaged: bool,
    /// Whether what is in force may be something else.
    stale: bool,
}

impl Kept {
    pub(super) fn new(mark: Option<Mark>, damaged: bool) -> Self {
        Self {
            mark,
            names: Known::new(),
            damaged,
            stale: true,
        }
    }

    /// Takes note that something else is in force.
    pub(super) fn changed(&mut self) {
        self.stale = true;
    }

    pub(super) fn mark(&self) -> Option<Mark> {
        self.mark
    }
}

impl Daemon {
    /// Keeps what is in force now. What failed is tried again at each tick.
    pub(super) fn keep_for_next_start(&mut self) {
        let names = self.names.known(Instant::now());
        if !self.kept.stale && names == self.kept.names {
            return;
        }
        // Not replaced by something that knows less.
        if self.kept.damaged && names.is_empty() && !self.wanted.policy.names().is_empty() {
            return;
        }
        let settings = &self.wanted.config.settings;
        let saved = Record::new(&LastGoodRef {
            settings,
            policy: &self.wanted.policy,
            names: &names,
            bosh: self.wanted.config.bus_dir(),
        })
        .map_err(|error| error.to_string())
        .and_then(|record| {
            if self.kept.mark != Some(record.mark) {
                state::save(&settings.state_dir, &record).map_err(|error| error.to_string())?;
            }
            Ok(record.mark)
        });
        let fault = |error| format!("{error}; after a restart what was kept before is in force until all is looked up");
        self.faults.set(About::State, saved.as_ref().err().map(fault));
        let damaged = self.kept.damaged && saved.is_err();
        self.kept = Kept {
            stale: saved.is_err(),
            mark: saved.ok(),
            names,
            damaged,
        };
    }
}
