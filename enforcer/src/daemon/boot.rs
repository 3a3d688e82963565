//! The start: the last known good rule set first (F4), then the configuration; whichever can be made active.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use tracing::{error, info, warn};

use super::{
    About, Daemon, DaemonError, capabilities, confine,
    machine::{Machine, ThisMachine},
};
use crate::{
    backend::{self, ActiveRules},
    config::{self, ConfigError, Settings},
    control::{self, ControlError, ControlSocket},
    host,
    inputs::{HostConfig, InputError, SavedRun},
    state::{LastGood, Mark},
    sweep,
    wire::{DaemonStatus, Status},
};

/// Between two tries of a configuration that was refused at the start, at first and at last.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_mins(1);

/// A configuration that was refused at the start: it is tried again until it is taken.
pub(super) struct Pending {
    due: Instant,
    wait: Duration,
    /// Of the files, when they were tried last.
    seen: Vec<(PathBuf, Option<SystemTime>)>,
    /// Whether the files without mistakes are active.
    is_partly: bool,
}

impl Pending {
    fn new(path: &Path) -> Self {
        Self {
            due: Instant::now() + FIRST_RETRY,
            wait: FIRST_RETRY,
            seen: config::modified(path),
            is_partly: false,
        }
    }

    /// Whether parts of it are active.
    pub(super) fn is_partly(&self) -> bool {
        self.is_partly
    }

    fn partly(path: &Path) -> Self {
        Self {
            is_partly: true,
            ..Self::new(path)
        }
    }

    /// Whether to try again: the file is another one, or users and cgroups may be.
    pub(super) fn is_due(&mut self, path: &Path, now: Instant) -> bool {
        let found = config::modified(path);
        let changed = found != self.seen;
        if !changed && now < self.due {
            return false;
        }
        self.seen = found;
        self.wait = if changed {
            FIRST_RETRY
        } else {
            (self.wait * 2).min(LAST_RETRY)
        };
        self.due = now + self.wait;
        true
    }
}

/// Starts a daemon that enforces: its first rule set is active when this returns, and it has no more rights than it
/// needs.
pub(super) fn start(path: &Path) -> Result<(Daemon, ControlSocket), DaemonError> {
    backend::look_ahead();
    let (mut daemon, listener) = enforce(&ThisMachine, path)?;
    daemon.load_denials();
    // Nothing that follows, lookups above all, runs with more.
    capabilities::reduce()?;
    confine::to(daemon.inputs.settings());
    Ok((daemon, listener))
}

pub(super) fn enforce(machine: &impl Machine, path: &Path) -> Result<(Daemon, ControlSocket), DaemonError> {
    if path != Path::new(config::DEFAULT_PATH) && !path.exists() {
        // Whose instance it is cannot be told.
        return Err(InputError::from(ConfigError::Missing { path: path.into() }).into());
    }
    let (left, good) = saved(path);
    let mut early = None;
    if let Some(good) = &good {
        // The socket first: whoever has it enforces there.
        let listener = match control::listen(&good.settings.socket) {
            Err(error @ ControlError::Busy { .. }) => return Err(error.into()),
            listener => listener.ok(),
        };
        match LastRun::take_over(machine, path, good, left.mark) {
            Ok(run) => early = Some((run, listener)),
            Err(DaemonError::Backend(error)) if error.is_busy() => return Err(error.into()),
            Err(error) => warn!("the last known good rules cannot be applied: {error}"),
        }
    }
    let wanted = HostConfig::load(path);
    let wanted = wanted.and_then(|wanted| wanted.ensure_present(good.as_ref()).map(|()| wanted));
    let has_saved = good.is_some();
    let (Some((run, listener)), Some(good)) = (early, good) else {
        if let (Err(_), Some(fault)) = (&wanted, &left.fault) {
            error!("{fault}"); // F4: the end of the process tells of the configuration alone.
        }
        let (wanted, rejected) = match wanted {
            Ok(wanted) => (wanted, None),
            // Rules that are saved and could not be applied are more than those files have.
            Err(error) if has_saved => return Err(error.into()),
            Err(error) => {
                without_mistakes(path, error).map(|(wanted, error)| (wanted, Some(DaemonError::from(error))))?
            }
        };
        let begin = || {
            let listener = control::listen(&wanted.config.settings.socket)?;
            Ok((Daemon::begin(machine, wanted, left)?, listener))
        };
        let (mut daemon, listener) = begin().inspect_err(|_: &DaemonError| {
            for line in rejected.iter().flat_map(DaemonError::lines) {
                error!("{line}");
            }
        })?;
        if let Some(error) = rejected {
            daemon.pending = Some(Pending::partly(path));
            daemon.refused(&error);
        }
        return Ok((daemon, listener));
    };
    let mut daemon = match wanted {
        Ok(wanted) if run.daemon.fixed_keys(&wanted).is_empty() => {
            let mut daemon = run.daemon;
            if let Err(error) = daemon.change_to(wanted) {
                daemon.stay_with_last_good(&error)?;
            }
            daemon
        }
        Ok(wanted) => run.move_to(machine, wanted, &good)?,
        Err(error) => {
            let mut daemon = run.daemon;
            daemon.inputs.config.from_file |= matches!(error, InputError::Config(ConfigError::Gone { .. }));
            daemon.stay_with_last_good(&error.into())?;
            daemon
        }
    };
    let names = daemon.inputs.policy().names();
    daemon.rounds.await_first(names);
    let socket = &daemon.inputs.settings().socket;
    let listener = match listener.filter(|_| *socket == good.settings.socket) {
        Some(listener) => listener,
        None => control::listen(socket)?,
    };
    Ok((daemon, listener))
}

/// What of a configuration with mistakes can be enforced where nothing is saved: all but the files in `conf.d` that
/// have one (F8). Where rules are active, or may be, they stay (F4).
fn without_mistakes(path: &Path, error: InputError) -> Result<(HostConfig, InputError), InputError> {
    let settings = config::place(path, true).unwrap_or_default();
    match ActiveRules::may_be_there(&settings) {
        Ok(false) => {}
        Ok(true) => {
            warn!("the rules that are active in the kernel stay active, and are not followed");
            return Err(error);
        }
        Err(_) => return Err(error),
    }
    if error.mistakes().is_none() {
        return Err(error);
    }
    match HostConfig::load_what_is_right(path) {
        Ok(Some(wanted)) => Ok((wanted, error)),
        Ok(None) | Err(_) => Err(error),
    }
}

/// What the last run has left. A directory that another user has put in its place is removed first; but neither while a
/// daemon has it, nor on the word of a file that another user could have written (F6).
fn saved(path: &Path) -> (SavedRun, Option<LastGood>) {
    let Some(dir) = config::state_dir(path) else {
        // The file is refused, too.
        return (SavedRun::nothing(), None);
    };
    let (left, good) = SavedRun::load(&dir);
    if good.is_some() {
        return (left, good);
    }
    let is_default = path == Path::new(config::DEFAULT_PATH);
    let is_in_use = || {
        let settings = config::place(path, is_default).unwrap_or_default();
        control::is_served(&settings.socket)
    };
    match config::ensure_trusted(path) {
        Err(_) if is_default => SavedRun::load(&Settings::default().state_dir),
        Ok(()) if !is_in_use() => SavedRun::claim(&dir),
        Ok(()) | Err(_) => (left, None),
    }
}

/// Of a status: this process does not stay.
const NO_DAEMON: DaemonStatus = DaemonStatus {
    running: false,
    pid: None,
};

/// Makes a configuration active once, looking every name up, and returns what is then active.
pub(crate) async fn apply_once(path: &Path) -> Result<Status, DaemonError> {
    backend::look_ahead();
    let wanted = HostConfig::load(path)?;
    control::ensure_socket_free(&wanted.config.settings.socket)?;
    let (left, good) = SavedRun::claim(&wanted.config.settings.state_dir);
    wanted.ensure_present(good.as_ref())?;
    let moved = good.filter(|good| lies_elsewhere(&good.settings, &wanted.config.settings));
    if let Some(good) = &moved {
        control::ensure_socket_free(&good.settings.socket)?;
    }
    let mut daemon = Daemon::start(&ThisMachine, wanted, false, left)?;
    daemon.take_whole_bus().await;
    daemon.look_up_all();
    while let Some(joined) = daemon.lookups.join_next_with_id().await {
        daemon.answered(joined);
    }
    // Lookups take their time.
    daemon.take_host();
    daemon.apply_now()?;
    daemon.sync_chain();
    daemon.enforcement.retire(daemon.inputs.settings());
    if let Some(good) = moved {
        backend::remove_old_places(&good.settings, daemon.inputs.settings());
    }
    if let Some(report) = sweep::once(&daemon.sweeps).await {
        daemon.swept(report);
    }
    daemon.save_now().await;
    let mut status = daemon.status_after_apply();
    status.daemon = NO_DAEMON;
    Ok(status)
}

/// Makes the last known good rule set active: no configuration, no lookup. None where there is none yet; a generation
/// that is active already stays.
pub(crate) fn apply_last_good(path: &Path) -> Result<Option<Status>, DaemonError> {
    backend::look_ahead();
    let (left, good) = saved(path);
    if let Some(fault) = left.fault {
        return Err(fault.into());
    }
    let Some(good) = good else { return Ok(None) };
    let mark = left.mark;
    let wanted = HostConfig::of(path, &good)?;
    let mut daemon = Daemon::start(&ThisMachine, wanted, false, SavedRun::of(&good, mark))?;
    daemon.resume()?;
    let mut status = daemon.status_after_apply();
    status.daemon = NO_DAEMON;
    Ok(Some(status))
}

/// A daemon that has what the last run knew.
struct LastRun {
    daemon: Daemon,
}

impl LastRun {
    /// Sees to it that something is active: what is, else the last known good rule set.
    fn take_over(
        machine: &impl Machine,
        path: &Path,
        good: &LastGood,
        mark: Option<Mark>,
    ) -> Result<Self, DaemonError> {
        let wanted = HostConfig::of(path, good)?;
        let mut daemon = Daemon::start(machine, wanted, true, SavedRun::of(good, mark))?;
        if let Some(generation) = daemon.resume()? {
            info!("the last known good rules are active, generation {generation}");
        }
        Ok(Self { daemon })
    }

    /// Goes on at other places, which the configuration names; where that fails, at the old ones.
    fn move_to(self, machine: &impl Machine, wanted: HostConfig, good: &LastGood) -> Result<Daemon, DaemonError> {
        let Self { daemon } = self;
        let (path, mark) = (daemon.inputs.config.path.clone(), daemon.kept.mark());
        // Lets go of the pins' lock; what is active stays.
        drop(daemon);
        let new = wanted.config.settings.clone();
        let (left, _) = SavedRun::load(&new.state_dir);
        match Daemon::begin(machine, wanted, left) {
            Ok(daemon) => {
                backend::remove_old_places(&good.settings, &new);
                Ok(daemon)
            }
            Err(error) => {
                let mut daemon = Self::take_over(machine, &path, good, mark)?.daemon;
                daemon.stay_with_last_good(&error)?;
                Ok(daemon)
            }
        }
    }
}

/// Whether what enforces lies at other places than before.
pub(super) fn lies_elsewhere(old: &Settings, new: &Settings) -> bool {
    old.pin_dir != new.pin_dir || old.nft_table != new.nft_table
}

impl Daemon {
    /// Makes what was active last active, unless something is.
    fn resume(&mut self) -> Result<Option<u64>, DaemonError> {
        let applied = self
            .guard
            .resume(&mut *self.enforcement, &self.inputs, Instant::now())?;
        Ok(applied.map(|applied| self.applied(applied)))
    }

    /// Starts, and makes a configuration active.
    fn begin(machine: &impl Machine, wanted: HostConfig, left: SavedRun) -> Result<Self, DaemonError> {
        let mut daemon = Self::start(machine, wanted, true, left)?;
        daemon.take_bus();
        let has_record = daemon.kept.mark().is_some();
        let (guard, store) = (&mut daemon.guard, &mut *daemon.enforcement);
        if let Some(applied) = guard.begin(store, &daemon.inputs, has_record, Instant::now())? {
            daemon.applied(applied);
        } else {
            let fault = "the saved rules are missing or damaged, and some DNS names have not been looked up yet; the \
                         active rules stay until they have been";
            daemon.faults.set(About::RuleSet, Some(fault.to_owned()));
        }
        Ok(daemon)
    }

    /// Stays with the last known good rules, as the configuration cannot be used (F4).
    fn stay_with_last_good(&mut self, error: &DaemonError) -> Result<(), DaemonError> {
        let config = &self.inputs.config;
        let cgroup = config.cgroup.as_deref().and_then(host::directory_id);
        let (guard, store) = (&mut self.guard, &mut *self.enforcement);
        if let Some(applied) = guard.fall_back(store, &self.inputs, cgroup.unwrap_or_default(), Instant::now())? {
            self.applied(applied);
        }
        self.pending = Some(Pending::new(&self.inputs.config.path));
        self.refused(error);
        Ok(())
    }

    fn refused(&mut self, error: &DaemonError) {
        let stays = if self.pending.as_ref().is_some_and(Pending::is_partly) {
            "only the files that were right at the start are enforced"
        } else if self.guard.is_held() {
            "the rules that were active before the start stay, and names are not followed until this is fixed"
        } else {
            "the last known good rules are active instead"
        };
        let fault = format!("{error}; {stays}");
        if self.faults.of(About::Reload) != Some(fault.as_str()) {
            let mistakes = error.lines();
            for line in mistakes.iter().filter(|_| mistakes.len() > 1) {
                error!("{line}");
            }
        }
        self.faults.set(About::Reload, Some(fault));
    }

    /// Tries a configuration again that was refused at the start, if it is time. True if it was taken.
    pub(super) fn retry(&mut self) -> bool {
        let path = self.inputs.config.path.clone();
        let Some(pending) = &mut self.pending else {
            return false;
        };
        let before = pending.seen.clone();
        if !pending.is_due(&path, Instant::now()) {
            return false;
        }
        let is_same = pending.seen == before;
        match self.take_configuration() {
            Ok(()) => {
                self.faults.set(About::Reload, None);
                true
            }
            // Its places are others than those of the last known good rules: why it was refused at first still holds.
            Err(DaemonError::FixedKeys { .. }) if is_same && self.faults.of(About::Reload).is_some() => false,
            Err(error) => {
                self.refused(&error);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io,
    };

    use super::*;

    #[test]
    fn a_refused_configuration_is_tried_again_less_and_less_often() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("enforcer.toml");
        fs::write(&path, "")?;
        let (before, mut pending, after) = (Instant::now(), Pending::new(&path), Instant::now());
        let second = Duration::from_secs(1);
        assert!(pending.due >= before + second && pending.due <= after + second);
        let mut now = pending.due;
        assert!(pending.is_due(&path, now));
        for wait in [2, 4, 8, 16, 32, 60, 60] {
            assert!(!pending.is_due(&path, now + Duration::from_millis(wait * 1000 - 1)));
            now += Duration::from_secs(wait);
            assert!(pending.is_due(&path, now));
        }
        // So is one beside it.
        fs::create_dir(dir.path().join("conf.d"))?;
        fs::write(dir.path().join("conf.d/a.toml"), "")?;
        now += second;
        assert!(pending.is_due(&path, now) && !pending.is_due(&path, now));
        // Another file is tried at once, and again soon.
        File::options()
            .write(true)
            .open(&path)?
            .set_modified(SystemTime::UNIX_EPOCH)?;
        now += second;
        assert!(pending.is_due(&path, now) && !pending.is_due(&path, now));
        assert_eq!(pending.due, now + second);
        fs::remove_file(&path)?;
        assert!(pending.is_due(&path, now), "a file that has gone is another one");
        Ok(())
    }
}
