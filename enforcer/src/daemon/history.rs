//! Keeps what denials come to over restarts: written at most once a minute, by a thread of its own, and at the end.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::{task::JoinSet, time::timeout};
use tracing::warn;

use super::Daemon;
use crate::events::kept::{self, Kept};

/// Between two writes.
const PERIOD: Duration = Duration::from_mins(1);
/// How long the end waits for the disk.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is being written, and how that went.
#[derive(Debug)]
pub(super) struct History {
    last: Instant,
    saving: JoinSet<Result<(), String>>,
    /// Whether it is logged that it cannot be kept.
    failed: bool,
}

impl History {
    pub(super) fn new() -> Self {
        Self {
            last: Instant::now(),
            saving: JoinSet::new(),
            failed: false,
        }
    }

    fn begin(&mut self, kept: Kept, dir: PathBuf) {
        self.last = Instant::now();
        let save = move || kept.save(&dir).map_err(|error| error.to_string());
        self.saving.spawn_blocking(save);
    }

    async fn saved(&mut self) {
        while let Some(Ok(result)) = self.saving.join_next().await {
            self.ended(&result);
        }
    }

    fn ended(&mut self, result: &Result<(), String>) {
        if let Err(error) = result
            && !self.failed
        {
            warn!("{error}; until this is fixed, a restart forgets the latest denials of enforcer events --summary");
        }
        self.failed = result.is_err();
    }
}

impl Daemon {
    /// Takes what denials came to before this process.
    pub(super) fn load_denials(&mut self) {
        match kept::load(&self.inputs.settings().state_dir, Timestamp::now()) {
            Ok(summary) => self.feed.summary = summary,
            Err(error) => warn!("{error}; enforcer events --summary begins anew"),
        }
    }

    /// Begins to write, if it is time and something has changed.
    pub(super) fn keep_denials(&mut self) {
        while let Some(Ok(result)) = self.history.saving.try_join_next() {
            self.history.ended(&result);
        }
        if self.history.saving.is_empty() && self.history.last.elapsed() >= PERIOD {
            self.write_denials();
        }
    }

    fn write_denials(&mut self) {
        let failed = self.history.failed;
        if self.feed.summary.take_changed(Timestamp::now()) || failed {
            let dir = self.inputs.settings().state_dir.clone();
            self.history.begin(Kept::of(&self.feed.summary), dir);
        }
    }

    /// Writes it, and returns when the disk has it, or takes too long.
    pub(super) async fn keep_denials_now(&mut self) {
        let written = async {
            self.history.saved().await;
            self.write_denials();
            self.history.saved().await;
        };
        // What hangs is not worth an end that hangs.
        let _ = timeout(PATIENCE, written).await;
    }
}
