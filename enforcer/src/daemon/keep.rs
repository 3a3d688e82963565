//! Keeps what is in force for the next start (F4, N7): only once it is, and only if it is another.

use std::{
    io,
    time::{Duration, Instant},
};

use tracing::warn;

use super::{About, Daemon};
use crate::state::{self, LastGoodRef, Mark, Record};

/// What the file holds.
#[derive(Debug)]
pub(super) struct Kept {
    /// None where there is no file, or none that can be used.
    mark: Option<Mark>,
    /// Whether there is a file that cannot be used: its owner may want to see it.
    damaged: bool,
    /// When to look whether what is in force is something else, if it may be.
    due: Option<Instant>,
}

/// How long after a change: whoever waits for the kernel does not wait for the disk (B3).
const DELAY: Duration = Duration::from_millis(50);
/// How long after a failure.
const RETRY: Duration = Duration::from_secs(1);

impl Kept {
    pub(super) fn new(mark: Option<Mark>, damaged: bool) -> Self {
        Self {
            mark,
            damaged,
            due: None,
        }
    }

    /// Takes note that something else may be in force, or known of names.
    pub(super) fn changed(&mut self) {
        self.due.get_or_insert_with(|| Instant::now() + DELAY);
    }

    /// When to [`Daemon::keep_for_next_start`].
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Takes note that the file has gone.
    fn lost(&mut self) {
        self.mark = None;
        self.changed();
    }

    pub(super) fn mark(&self) -> Option<Mark> {
        self.mark
    }
}

impl Daemon {
    /// What was kept may have been removed.
    pub(super) fn look_at_kept(&mut self) {
        let path = self.wanted.config.settings.state_dir.join(state::FILE);
        let gone = || {
            path.symlink_metadata()
                .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        if self.kept.mark.is_some() && self.kept.due.is_none() && gone() {
            warn!("somebody removed {}; it is written again", path.display());
            self.kept.lost();
        }
    }

    /// Keeps what is in force now, if it has changed. What failed is tried again.
    pub(super) fn keep_for_next_start(&mut self) {
        if self.kept.due.take().is_none() {
            return;
        }
        if self.applied.is_none() || self.faults.of(About::RuleSet).is_some() {
            // What is wanted is not in force.
            self.kept.due = Some(Instant::now() + RETRY);
            return;
        }
        let names = self.names.known(Instant::now());
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
            due: saved.is_err().then(|| Instant::now() + RETRY),
            mark: saved.ok(),
            damaged,
        };
    }
}
