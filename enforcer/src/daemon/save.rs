//! Keeps what is active for the next start (F4, N7): only once it is, and only if it is another. A thread of its own
//! writes, as a disk that any user keeps busy takes seconds to sync (F10).

use std::{
    io,
    time::{Duration, Instant},
};

use tokio::{
    sync::mpsc,
    task::{self, JoinHandle},
    time::timeout,
};
use tracing::warn;

use super::{About, Daemon, configure::Reloaded};
use crate::{
    state::{self, LastGoodRef, Mark, Record},
    wire::Reply,
};

/// What the file holds.
#[derive(Debug)]
pub(super) struct StateKeeper {
    /// None where there is no file, or none that can be used.
    mark: Option<Mark>,
    /// Whether there is a file that cannot be used: its owner may want to see it.
    damaged: bool,
    /// When to look whether what is active is something else, if it may be.
    due: Option<Instant>,
    /// What is being written: one at a time.
    saving: Option<Saving>,
    /// Reloads that are to be reported once what they made active is kept.
    reloaded: Vec<Reloaded>,
    /// Who was told of a reload, and may not have read it yet.
    told: Vec<mpsc::Sender<Reply>>,
}

#[derive(Debug)]
struct Saving {
    task: JoinHandle<SaveResult>,
    /// Reloads that are to be reported with it.
    reloaded: Vec<Reloaded>,
}

/// What was written, or why it was not.
pub(super) type SaveResult = Result<Mark, String>;

/// How long after a change: whoever waits for the kernel does not wait for the disk (B3).
const DELAY: Duration = Duration::from_millis(50);
/// How long a caller may take to read a reply at the end of the process.
const HEARD: Duration = Duration::from_millis(500);
/// How long a start waits for the disk.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long after a failure.
const RETRY: Duration = Duration::from_secs(1);

impl StateKeeper {
    pub(super) fn new(mark: Option<Mark>, damaged: bool) -> Self {
        Self {
            mark,
            damaged,
            due: None,
            saving: None,
            reloaded: Vec::new(),
            told: Vec::new(),
        }
    }

    /// Takes note that something else may be active, or known of names.
    pub(super) fn changed(&mut self) {
        self.due.get_or_insert_with(|| Instant::now() + DELAY);
    }

    /// When to [`Daemon::catch_up`]: not before what is being written is.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due.filter(|_| self.saving.is_none())
    }

    /// Takes note that the file has gone.
    fn lost(&mut self) {
        self.mark = None;
        self.changed();
    }

    pub(super) fn mark(&self) -> Option<Mark> {
        self.mark
    }

    /// Waits until what is being written is, for [`Daemon::was_kept`]; for ever where nothing is. Nothing is lost if
    /// nobody waits on.
    pub(super) async fn saved(&mut self) -> SaveResult {
        match &mut self.saving {
            Some(saving) => (&mut saving.task)
                .await
                .unwrap_or_else(|error| Err(format!("save the active rules: {error}"))),
            None => std::future::pending().await,
        }
    }
}

impl Daemon {
    /// What was kept may have been removed.
    pub(super) fn look_at_kept(&mut self) {
        let path = self.inputs.settings().state_dir.join(state::FILE);
        let gone = || {
            path.symlink_metadata()
                .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        if self.kept.mark.is_some() && self.kept.due.is_none() && gone() {
            warn!("another process removed {}; it is written again", path.display());
            self.kept.lost();
        }
    }

    /// Reports a reload once what it made active is kept: whoever reads so may count on it over a crash.
    pub(super) fn report_reload(&mut self, reloaded: Reloaded) {
        // A disk that hangs keeps nobody's signals.
        if !reloaded.is_awaited() {
            self.kept.reloaded.retain(Reloaded::is_awaited);
        }
        self.kept.reloaded.push(reloaded);
        self.catch_up();
    }

    /// Begins what is put off until nobody waits for it.
    pub(super) fn catch_up(&mut self) {
        self.save_for_next_start();
        self.enforcement.begin_to_wait_for_readers();
    }

    /// Begins to keep what is active now, if it has changed. What fails is tried again; what changes meanwhile is kept
    /// afterwards.
    fn save_for_next_start(&mut self) {
        if self.kept.saving.is_some() {
            return;
        }
        let reloaded = std::mem::take(&mut self.kept.reloaded);
        let Some(record) = self.record_to_keep() else {
            self.reported(reloaded, None);
            return;
        };
        let dir = self.inputs.settings().state_dir.clone();
        let save = move || {
            let saved = state::save(&dir, &record).map_err(|error| error.to_string());
            saved.map(|()| record.mark)
        };
        self.kept.saving = Some(Saving {
            task: task::spawn_blocking(save),
            reloaded,
        });
    }

    /// As [`Daemon::save_for_next_start`], and returns when the disk has it.
    pub(super) async fn save_now(&mut self) {
        self.end_saving().await;
        self.save_for_next_start();
        self.end_saving().await;
    }

    /// As [`Daemon::save_now`], for as long as whoever waits for the start can wait: rules are active, whatever the
    /// disk does.
    pub(super) async fn save_soon(&mut self) {
        let _ = timeout(PATIENCE, self.save_now()).await;
    }

    async fn end_saving(&mut self) {
        if self.kept.saving.is_some() {
            let saved = self.kept.saved().await;
            self.was_kept(&saved);
        }
    }

    /// Takes note of what was written.
    pub(super) fn was_kept(&mut self, saved: &SaveResult) {
        let reloaded = self.kept.saving.take().map(|saving| saving.reloaded);
        self.note_kept(saved);
        let unsaved = self.faults.of(About::State).map(str::to_owned);
        self.reported(reloaded.unwrap_or_default(), unsaved.as_deref());
    }

    /// Reports reloads, and remembers who was told, for the end.
    fn reported(&mut self, reloaded: Vec<Reloaded>, unsaved: Option<&str>) {
        let told = reloaded
            .into_iter()
            .filter_map(|reload| Self::reloaded(reload, unsaved));
        self.kept.told.retain(|told| !told.is_closed());
        self.kept.told.extend(told);
    }

    /// Waits until those who were told have heard it, for a moment at most.
    pub(super) async fn until_heard(&mut self) {
        for told in std::mem::take(&mut self.kept.told) {
            let _ = timeout(HEARD, told.closed()).await;
        }
    }

    /// What is to be written; nothing where the file holds it, or what is active is not to be kept.
    fn record_to_keep(&mut self) -> Option<Record> {
        self.kept.due.take()?;
        if !self.guard.is_active() || self.faults.of(About::RuleSet).is_some() {
            // What is desired is not active.
            self.kept.due = Some(Instant::now() + RETRY);
            return None;
        }
        let names = self.inputs.names.known(Instant::now());
        // Not replaced by something that knows less.
        if self.kept.damaged && names.is_empty() && !self.inputs.config.policy.names().is_empty() {
            return None;
        }
        let record = Record::new(&LastGoodRef {
            settings: self.inputs.settings(),
            policy: &self.inputs.config.policy,
            listed: &self.inputs.config.listed,
            names: &names,
            bosh: self.inputs.config.config.bus_dir(),
        });
        match record {
            Ok(record) if self.kept.mark != Some(record.mark) => Some(record),
            Ok(record) => {
                self.note_kept(&Ok(record.mark));
                None
            }
            Err(error) => {
                self.note_kept(&Err(error.to_string()));
                None
            }
        }
    }

    /// Whether there are rules that a start can begin with.
    fn has_saved(&self) -> bool {
        let file = self.inputs.settings().state_dir.join(state::FILE);
        !self.kept.damaged && file.symlink_metadata().is_ok()
    }

    fn note_kept(&mut self, saved: &SaveResult) {
        let fault = |error: &String| unsaved(error, self.has_saved());
        let fault = saved.as_ref().err().map(fault);
        self.faults.set(About::State, fault);
        if let Ok(mark) = *saved {
            self.kept.mark = Some(mark);
            self.kept.damaged = false;
        } else {
            self.kept.mark = None;
            self.kept.due = Some(Instant::now() + RETRY);
        }
    }
}

/// What comes of it that the active rules are not saved.
fn unsaved(error: &str, has_saved: bool) -> String {
    let start = if has_saved {
        "a restart begins with the previously saved rules"
    } else {
        "no rules are saved: after a reboot nothing is protected before the configuration is read and its names are \
         looked up"
    };
    format!("{error}; until this is fixed, {start}")
}

#[cfg(test)]
mod tests {
    use super::unsaved;

    #[test]
    fn a_restart_is_promised_no_rules_that_were_never_saved() {
        assert!(unsaved("E", true).starts_with("E; until this is fixed, a restart begins with the previously saved"));
        let never = unsaved("E", false);
        assert!(
            never.contains("no rules are saved") && !never.contains("previously"),
            "{never}"
        );
    }
}
