//! The loop: receives what happened, computes what is wanted, puts it in force. The only place that knows everybody.

mod capabilities;
mod drift;
mod faults;
mod mounts;
mod trace;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    io,
    os::fd::AsRawFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use tokio::{
    io::{
        Interest,
        unix::{AsyncFd, AsyncFdReadyGuard, AsyncFdReadyMutGuard},
    },
    signal::unix::{SignalKind, signal},
    sync::{broadcast, mpsc},
    task::{self, JoinSet},
};
use tracing::{error, info, warn};

use self::drift::Drift;
use self::faults::{About, Faults};
use self::mounts::Mounts;
use crate::{
    backend::{BackendError, Enforcement, Start, ebpf::Events, nftables},
    config::{Config, ConfigError},
    control::{self, Call, ControlError, Reply, Request},
    events::{self, Line, Lost},
    host::{self, AddressChanges},
    policy::{HostUsers, Name, Policy, PolicyError},
    resolve::{Answer, LOOKUP_TIMEOUT, Names, Outcome, lookup},
    ruleset::{CompileError, Host, Resolved, compile},
    state,
    status::{Context, ExistingStatus, Status, status},
    sweep::{self, Job, Jobs},
};

/// How often links and cgroups are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Denials read at once, and the rest after so many: what comes faster is counted as lost.
const EVENTS_AT_ONCE: usize = 1024;
const EVENT_REST: Duration = Duration::from_millis(50);
/// Denials kept for callers that ask later.
const KEPT_EVENTS: usize = 1024;

/// Why the daemon cannot start, or an attempt to put a configuration in force failed.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What it says.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A limit.
    #[error("{}: {error}", path.display())]
    Compile {
        /// The configuration file.
        path: PathBuf,
        /// Which limit.
        error: CompileError,
    },
    /// The kernel.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A cgroup that a principal names.
    #[error("{}: cgroup {cgroup} does not exist below {}; make it first, or start enforcer after the unit that does", path.display(), mount.display())]
    NoCgroup {
        /// The configuration file.
        path: PathBuf,
        /// The cgroup.
        cgroup: String,
        /// Where cgroups are looked for.
        mount: PathBuf,
    },
    /// Keys that hold for the whole run have changed.
    #[error("{}: {} cannot change while enforcer runs; restart it", path.display(), keys.join(", "))]
    FixedKeys {
        /// The configuration file.
        path: PathBuf,
        /// Which keys.
        keys: Vec<&'static str>,
    },
    /// No cgroup v2 at all.
    #[error(
        "no cgroup v2 hierarchy is mounted; mount one (mount -t cgroup2 none /sys/fs/cgroup), or name its directory with `cgroup`"
    )]
    NoCgroup2,
    /// Something of the operating system.
    #[error("{action}: {error}{}", host::remedy(error))]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why not.
        error: io::Error,
    },
}

/// A configuration that was read, understood and found possible on this host.
#[derive(Debug)]
pub struct Wanted {
    path: PathBuf,
    config: Config,
    policy: Policy,
    /// The cgroup to attach to.
    cgroup: PathBuf,
    /// Where cgroup paths of principals start.
    mount: PathBuf,
    warnings: Vec<String>,
}

impl Wanted {
    /// Reads a configuration file.
    pub fn load(path: &std::path::Path) -> Result<Self, DaemonError> {
        let config = Config::load(path)?;
        let (policy, warnings) = Policy::from_config(&config, &HostUsers)?;
        let mount = host::cgroup2_mount().map_err(|error| DaemonError::Io {
            action: "read /proc/self/mountinfo",
            error,
        })?;
        let cgroup = config
            .settings
            .cgroup
            .clone()
            .or_else(|| mount.clone())
            .ok_or(DaemonError::NoCgroup2)?;
        let mount = mount.unwrap_or_else(|| cgroup.clone());
        for path_of in policy.cgroups() {
            if host::cgroup(&mount, &path_of).is_none() {
                return Err(DaemonError::NoCgroup {
                    path: path.into(),
                    cgroup: path_of.to_string(),
                    mount,
                });
            }
        }
        let warnings = warnings.iter().map(ToString::to_string).collect();
        Ok(Self {
            path: path.into(),
            config,
            policy,
            cgroup,
            mount,
            warnings,
        })
    }

    /// What it means.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// What is allowed, but probably not meant.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// What runs.
struct Daemon {
    wanted: Wanted,
    enforcement: Enforcement,
    names: Names,
    host: Host,
    lookups: JoinSet<Answer>,
    /// The name and round of each look-up under way.
    under_way: HashMap<task::Id, (Name, u64)>,
    /// Counts refresh requests: only look-ups begun after one answer it (B3).
    round: u64,
    /// The newest round of each name that was answered.
    answered_rounds: BTreeMap<Name, u64>,
    /// Refresh requests that wait for look-ups begun after them.
    waiting: Vec<Waiting>,
    /// How much the kernel programs tell.
    log_level: u8,
    drift: Drift,
    events: VecDeque<Line>,
    followers: broadcast::Sender<Line>,
    lost: u64,
    /// Names whose first answer readiness waits for.
    unanswered: BTreeSet<Name>,
    applied: Option<Applied>,
    faults: Faults,
    /// What the state file holds; none where it could not be read or written.
    saved: Option<Resolved>,
    /// What is to be swept by (D9), and what came of it.
    sweeps: Jobs,
    existing: Option<ExistingStatus>,
}

/// What the rule set in force was made from, besides the policy.
struct Applied {
    generation: u64,
    host: Host,
    resolved: Resolved,
}

struct Waiting {
    round: u64,
    names: BTreeSet<Name>,
    replies: mpsc::Sender<Reply>,
}

/// Puts a configuration in force once, looking every name up, and returns what is then in force.
pub async fn apply_once(path: &std::path::Path) -> Result<Status, DaemonError> {
    let mut daemon = Daemon::start(Wanted::load(path)?, false)?;
    daemon.look_up_all();
    while let Some(joined) = daemon.lookups.join_next_with_id().await {
        daemon.answered(joined);
    }
    daemon.apply_now()?;
    daemon.enforcement.retire(&daemon.wanted.config.settings);
    if let Some(report) = sweep::once(&daemon.sweeps).await {
        daemon.swept(report);
    }
    let mut status = daemon.status();
    status.daemon = crate::status::DaemonStatus {
        running: false,
        pid: None,
    };
    Ok(status)
}

/// Runs until SIGTERM or SIGINT, which leave enforcement in force (F1).
pub async fn run(path: &std::path::Path) -> Result<(), DaemonError> {
    let wanted = Wanted::load(path)?;
    let socket = wanted.config.settings.socket.clone();
    let listener = control::listen(&socket)?;
    let mut daemon = Daemon::start(wanted, true)?;
    let failed = |action| move |error| DaemonError::Io { action, error };
    let mut hangup = signal(SignalKind::hangup()).map_err(failed("wait for SIGHUP"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("wait for SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("wait for SIGINT"))?;
    let addresses = AddressChanges::subscribe().map_err(failed("watch addresses"))?;
    let addresses = readable(addresses).map_err(failed("watch addresses"))?;
    let mut denials = daemon.denials()?;
    let mut logged = daemon.logged()?;
    let changes = nftables::Changes::subscribe()
        .ok()
        .and_then(|changes| readable(changes).ok());
    if let Some(kernel) = daemon.enforcement.kernel() {
        trace::start(kernel);
    }
    let (calls, mut requests) = mpsc::channel(64);
    tokio::spawn(control::serve(listener, calls));
    let (reports, mut swept) = mpsc::channel(1);
    tokio::spawn(sweep::run(daemon.sweeps.clone(), reports));

    // Addresses and literals are in force before any look-up; readiness waits for the names' first answers.
    daemon.apply_now()?;
    daemon.enforcement.retire(&daemon.wanted.config.settings);
    daemon.look_up_all();
    let mut ready = false;
    let mut rest = None;
    let mounts = Mounts::from_environment();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        if !ready && daemon.unanswered.is_empty() {
            ready = true;
            daemon.ready()?;
        }
        let due = daemon.names.next_due().unwrap_or_else(|| Instant::now() + TICK);
        tokio::select! {
            _ = hangup.recv() => {
                daemon.reload();
                denials = daemon.denials()?;
                if let Some(fresh) = daemon.logged()? {
                    logged = Some(fresh);
                }
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            Some(joined) = daemon.lookups.join_next_with_id() => {
                daemon.answered(joined);
                daemon.apply_or_keep();
                daemon.answer_waiting();
            }
            () = tokio::time::sleep_until(due.into()) => daemon.look_up_due(Instant::now()),
            Ok(mut guard) = addresses.readable() => {
                guard.get_inner().drain();
                guard.clear_ready();
                daemon.look_at_host();
            }
            Some(Ok(mut guard)) = ready_to_read(changes.as_ref()) => {
                guard.get_inner().drain();
                guard.clear_ready();
                daemon.apply_or_keep();
            }
            Some(Ok(mut guard)) = ready_to_take(denials.as_mut()), if rest.is_none() => {
                if daemon.take_events(guard.get_inner_mut()) {
                    guard.clear_ready();
                } else {
                    rest = Some(Instant::now() + EVENT_REST);
                }
            }
            Some(Ok(mut guard)) = ready_to_take(logged.as_mut()) => {
                daemon.take_logged(guard.get_inner_mut());
                guard.clear_ready();
            }
            () = tokio::time::sleep_until(rest.unwrap_or(due).into()), if rest.is_some() => rest = None,
            _ = tick.tick() => {
                daemon.look_at_host();
                if !goes_on(&mounts) {
                    break;
                }
            }
            Some(report) = swept.recv() => daemon.swept(report),
            Some(call) = requests.recv() => if let Some(replies) = daemon.answer(call) {
                let result = daemon.unload();
                let reply = result.as_ref().map_or_else(|error| Reply::Error(error.to_string()), |()| Reply::Done);
                let _ = replies.send(reply).await;
                // The caller hangs up once it has read the answer.
                let _ = tokio::time::timeout(TICK, replies.closed()).await;
                let _ = std::fs::remove_file(&socket);
                return result;
            },
        }
    }
    let _ = std::fs::remove_file(&socket);
    info!(
        "stopping; generation {} stays in force",
        daemon.enforcement.observe()?.generation
    );
    Ok(())
}

impl Daemon {
    fn start(wanted: Wanted, stays: bool) -> Result<Self, DaemonError> {
        for warning in &wanted.warnings {
            warn!("{warning}");
        }
        let settings = &wanted.config.settings;
        let mut names = Names::new(wanted.policy.dns);
        names.set(wanted.policy.names(), Instant::now());
        let mut faults = Faults::default();
        let saved = match state::load(&settings.state_dir) {
            Ok(known) => Some(known),
            Err(error) => {
                let fault = format!("{error}; the addresses known before are not protected until they are looked up");
                faults.set(About::State, Some(fault)); // F4
                None
            }
        };
        for (name, addresses) in saved.iter().flatten() {
            names.seed(name, addresses);
        }
        let level = trace::level();
        let enforcement = Enforcement::take_over(Start {
            settings,
            cgroup: &wanted.cgroup,
            daemon: stays,
            log_level: level,
        })?;
        let host = host::snapshot(Some(&wanted.mount), &wanted.policy.cgroups()).map_err(|error| DaemonError::Io {
            action: "list this host's addresses",
            error,
        })?;
        Ok(Self {
            unanswered: wanted.policy.names(),
            wanted,
            enforcement,
            log_level: level,
            drift: Drift::default(),
            names,
            host,
            lookups: JoinSet::new(),
            under_way: HashMap::new(),
            round: 0,
            answered_rounds: BTreeMap::new(),
            waiting: Vec::new(),
            events: VecDeque::new(),
            followers: broadcast::channel(KEPT_EVENTS).0,
            lost: 0,
            applied: None,
            faults,
            saved,
            sweeps: Jobs::default(),
            existing: None,
        })
    }

    /// The ring buffer of the kernel programs, where they are in force.
    fn denials(&mut self) -> Result<Option<AsyncFd<Events>>, DaemonError> {
        let Some(kernel) = self.enforcement.kernel() else {
            return Ok(None);
        };
        let source = readable(kernel.events()?).map_err(|error| DaemonError::Io {
            action: "watch the ring buffer",
            error,
        })?;
        Ok(Some(source))
    }

    /// The denials of nftables, where it has just begun to log them.
    fn logged(&mut self) -> Result<Option<AsyncFd<nftables::Denials>>, DaemonError> {
        let denials = self.enforcement.nftables().and_then(nftables::Nftables::denials);
        denials.map(readable).transpose().map_err(|error| DaemonError::Io {
            action: "watch the denials of nftables",
            error,
        })
    }

    /// Takes what has come; the rules send no more than so many a second.
    fn take_logged(&mut self, source: &mut nftables::Denials) {
        while let Some(denial) = source.take() {
            let event = events::read_logged(&denial, std::time::SystemTime::now());
            self.publish(Line::Event(event));
        }
    }

    /// Compiles what is wanted now and puts it in force.
    fn apply_now(&mut self) -> Result<u64, DaemonError> {
        let resolved = self.names.resolved(Instant::now());
        let rules = compile(&self.wanted.policy, &resolved, &self.host).map_err(|error| DaemonError::Compile {
            path: self.wanted.path.clone(),
            error,
        })?;
        let generation = self.enforcement.apply(&rules)?;
        self.applied = Some(Applied {
            generation,
            host: self.host.clone(),
            resolved: resolved.clone(),
        });
        self.save(resolved);
        self.sweeps.set(Job {
            generation,
            rules,
            action: self.wanted.config.settings.existing,
            cgroup: self
                .enforcement
                .nftables()
                .is_none()
                .then(|| self.wanted.cgroup.clone()),
            mount: self.wanted.mount.clone(),
            local: self.host.local.clone(),
        });
        Ok(generation)
    }

    /// Keeps the addresses for the next start (N7), which alone would miss them; what failed is tried again at each tick.
    fn save(&mut self, resolved: Resolved) {
        let due = match &self.saved {
            Some(saved) => *saved != resolved,
            // A file that cannot be read is kept for its owner to see until there is something to replace it with.
            None => !resolved.is_empty() || self.wanted.policy.names().is_empty(),
        };
        if !due {
            return;
        }
        let saved = state::save(&self.wanted.config.settings.state_dir, &resolved);
        let fault = |error| format!("{error}; after a restart names are unprotected until they are looked up");
        self.faults.set(About::State, saved.as_ref().err().map(fault));
        self.saved = saved.is_ok().then_some(resolved);
    }

    /// Takes what a sweep found and did.
    fn swept(&mut self, report: sweep::Report) {
        self.faults.set(About::Sweep, report.fault);
        for existing in report.news {
            warn!("{existing}");
            self.publish(Line::Existing(existing));
        }
        if report.lost > 0 {
            self.publish(Line::Lost(Lost::new(report.lost)));
        }
        self.existing = Some(report.existing);
    }

    /// Sees to it that what is wanted is in force; a failure leaves in force what is (F4).
    fn apply_or_keep(&mut self) {
        let now = Instant::now();
        if self.drift.rests(now) {
            return;
        }
        let resolved = self.names.resolved(now);
        let unchanged =
            (self.applied.as_ref()).is_some_and(|applied| applied.host == self.host && applied.resolved == resolved);
        let restored = self.enforcement.restored();
        let kept = match &self.applied {
            Some(applied) if unchanged && self.faults.of(About::RuleSet).is_none() => {
                self.enforcement.keep(applied.generation).map_err(DaemonError::from)
            }
            Some(_) | None => Ok(None),
        };
        if self.enforcement.restored() != restored {
            self.drift.happened(now);
            warn!("somebody removed or changed rules of ours; they are in force again");
        }
        let fault = match kept {
            Ok(Some(generation)) => {
                if let Some(applied) = &mut self.applied {
                    applied.generation = generation;
                }
                self.save(resolved);
                None
            }
            Ok(None) => self.apply_now().err(),
            Err(error) => Some(error),
        };
        let fault = fault.map(|error| format!("{error}; the rule set before stays in force"));
        self.faults.set(About::RuleSet, fault);
    }

    fn ready(&mut self) -> Result<(), DaemonError> {
        let observed = self.enforcement.observe()?;
        if let Some(kernel) = self.enforcement.kernel() {
            kernel.trim_memory();
        }
        capabilities::reduce()?;
        info!(
            "enforcing generation {}: {} endpoints of {} targets on {}",
            observed.generation,
            observed.endpoints,
            observed.targets.len(),
            self.wanted.cgroup.display()
        );
        sd_notify::notify(&[sd_notify::NotifyState::Ready]).map_err(|error| DaemonError::Io {
            action: "notify the service manager",
            error,
        })
    }

    fn reload(&mut self) {
        let loaded = Wanted::load(&self.wanted.path).and_then(|wanted| self.change_to(wanted));
        match loaded {
            Ok(()) => {
                self.faults.put(About::Reload, None);
                info!("reloaded {}", self.wanted.path.display());
            }
            Err(error) => {
                // Each time, not once a change: it answers a signal.
                let fault = format!("reload: {error}; the rule set before stays in force");
                error!("{fault}");
                self.faults.put(About::Reload, Some(fault));
            }
        }
    }

    /// Puts another configuration in force, or keeps this one whole.
    fn change_to(&mut self, wanted: Wanted) -> Result<(), DaemonError> {
        let (old, new) = (&self.wanted.config.settings, &wanted.config.settings);
        let fixed = [
            ("cgroup", self.wanted.cgroup != wanted.cgroup),
            ("pin_dir", old.pin_dir != new.pin_dir),
            ("state_dir", old.state_dir != new.state_dir),
            ("socket", old.socket != new.socket),
            ("nft_table", old.nft_table != new.nft_table),
        ];
        let keys: Vec<_> = fixed
            .iter()
            .filter(|(_, changed)| *changed)
            .map(|(key, _)| *key)
            .collect();
        if !keys.is_empty() {
            return Err(DaemonError::FixedKeys {
                path: wanted.path,
                keys,
            });
        }
        for warning in &wanted.warnings {
            warn!("{warning}");
        }
        let host = host::snapshot(Some(&wanted.mount), &wanted.policy.cgroups()).map_err(|error| DaemonError::Io {
            action: "list this host's addresses",
            error,
        })?;
        let mut names = self.names.clone();
        names.configure(wanted.policy.dns);
        names.set(wanted.policy.names(), Instant::now());
        let names = std::mem::replace(&mut self.names, names);
        let before = (
            std::mem::replace(&mut self.wanted, wanted),
            std::mem::replace(&mut self.host, host),
            names,
        );
        let start = Start {
            settings: &self.wanted.config.settings,
            cgroup: &self.wanted.cgroup,
            daemon: true,
            log_level: self.log_level,
        };
        let extended = self.enforcement.extend(start).map_err(DaemonError::from);
        if let Err(error) = extended.and_then(|()| self.apply_now()) {
            (self.wanted, self.host, self.names) = before;
            // Goes back to what was needed before.
            self.enforcement.retire(&self.wanted.config.settings);
            return Err(error);
        }
        self.enforcement.retire(&self.wanted.config.settings);
        self.faults.set(About::RuleSet, None);
        self.faults.set(About::Host, None);
        // What is no longer a name keeps nobody waiting.
        let names = self.wanted.policy.names();
        self.unanswered.retain(|name| names.contains(name));
        for waiting in &mut self.waiting {
            waiting.names.retain(|name| names.contains(name));
        }
        self.look_up_due(Instant::now());
        self.answer_waiting();
        Ok(())
    }

    fn look_up_all(&mut self) {
        for name in self.wanted.policy.names() {
            self.look_up(name);
        }
    }

    fn look_up_due(&mut self, now: Instant) {
        for name in self.names.due(now) {
            self.look_up(name);
        }
        self.apply_or_keep(); // Retained addresses expire (N4).
    }

    fn look_up(&mut self, name: Name) {
        self.names.begin(&name);
        let asked = name.clone();
        let task = self.lookups.spawn(async move { lookup(&asked, LOOKUP_TIMEOUT).await });
        self.under_way.insert(task.id(), (name, self.round));
    }

    /// Takes the answer to a look-up, unless a later one was answered before it.
    fn answered(&mut self, joined: Result<(task::Id, Answer), task::JoinError>) {
        let (id, answer) = match joined {
            Ok((id, answer)) => (id, answer),
            Err(error) => {
                let failed = Outcome::Failed("the look-up ended by itself".to_owned());
                error!("a look-up ended by itself: {error}");
                (
                    error.id(),
                    Answer::Dns {
                        a: failed.clone(),
                        aaaa: failed,
                    },
                )
            }
        };
        let Some((name, round)) = self.under_way.remove(&id) else {
            return;
        };
        self.unanswered.remove(&name);
        let newest = self.answered_rounds.entry(name.clone()).or_default();
        if round < *newest {
            return;
        }
        *newest = round;
        for note in self.names.answered(Instant::now(), &name, answer) {
            if note.is_fault() {
                warn!("{note}");
            } else {
                info!("{note}");
            }
        }
        for waiting in self.waiting.iter_mut().filter(|waiting| waiting.round <= round) {
            waiting.names.remove(&name);
        }
    }

    fn answer_waiting(&mut self) {
        let (done, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|one| one.names.is_empty());
        self.waiting = waiting;
        let done: Vec<Waiting> = done;
        if !done.is_empty() {
            let reply = self.applied_reply();
            for one in done {
                let _ = one.replies.try_send(reply.clone());
            }
        }
    }

    fn applied_reply(&mut self) -> Reply {
        match self.faults.of(About::RuleSet) {
            Some(fault) => Reply::Error(fault.to_owned()),
            None => Reply::Status(Box::new(self.status())),
        }
    }

    /// Addresses and cgroups come and go; links may be taken away.
    fn look_at_host(&mut self) {
        let fault = match host::snapshot(Some(&self.wanted.mount), &self.wanted.policy.cgroups()) {
            Ok(host) => {
                self.host = host;
                None
            }
            Err(error) => Some(format!(
                "list this host's addresses: {error}; those that come and go are not followed"
            )),
        };
        self.faults.set(About::Host, fault);
        self.apply_or_keep();
    }

    /// Takes what has come, up to a limit: a flood of denials must not keep the loop from its work. True if all was taken.
    fn take_events(&mut self, source: &mut Events) -> bool {
        let Ok(boot) = events::boot_time() else { return true };
        let mut taken = 0;
        while taken < EVENTS_AT_ONCE {
            let Some(record) = source.take() else { break };
            self.publish(Line::Event(events::read(&record, boot)));
            taken += 1;
        }
        let lost = self.enforcement.kernel().and_then(|kernel| kernel.lost().ok());
        if let Some(lost) = lost
            && lost > self.lost
        {
            self.publish(Line::Lost(Lost::new(lost - self.lost)));
            self.lost = lost;
        }
        taken < EVENTS_AT_ONCE
    }

    fn publish(&mut self, line: Line) {
        if self.events.len() == KEPT_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(line.clone());
        let _ = self.followers.send(line);
    }

    /// Answers a request, but for `unload`, which is the end of the loop: that answer's way is returned.
    fn answer(&mut self, call: Call) -> Option<mpsc::Sender<Reply>> {
        let Call { request, replies } = call;
        match request {
            Request::Status => drop(replies.try_send(Reply::Status(Box::new(self.status())))),
            Request::Refresh => {
                let names = self.wanted.policy.names();
                self.round += 1;
                self.look_up_all();
                self.waiting.push(Waiting {
                    round: self.round,
                    names,
                    replies,
                });
                self.answer_waiting();
            }
            Request::Events { follow } => {
                let kept: Vec<Line> = self.events.iter().cloned().collect();
                let live = follow.then(|| self.followers.subscribe());
                tokio::spawn(send_events(kept, live, replies));
            }
            Request::Unload => return Some(replies),
        }
        None
    }

    fn unload(self) -> Result<(), DaemonError> {
        self.enforcement.unload()?;
        info!("unloaded: nothing is in force any more");
        Ok(())
    }

    fn status(&mut self) -> Status {
        let mut causes: Vec<String> = self.faults.all().map(ToOwned::to_owned).collect();
        for path in self.wanted.policy.cgroups() {
            if !self.host.cgroups.contains_key(&path) {
                causes.push(format!(
                    "cgroup {path} is gone; its principals match nobody until it is made again"
                ));
            }
        }
        if self.enforcement.ignores_cgroups() && !self.wanted.policy.cgroups().is_empty() {
            causes.push("this kernel's nftables cannot tell a socket's cgroup (Linux 5.13 can); principals with a cgroup match nobody".to_owned());
        }
        if self.drift.is_recent(Instant::now()) {
            causes.push(format!(
                "somebody removed or changed rules of ours {} times so far, last in the past {} s; find out who (nft monitor, bpftool)",
                self.enforcement.restored(),
                Drift::MEMORY.as_secs()
            ));
        }
        let observed = self.enforcement.observe();
        if let Err(error) = &observed {
            causes.push(error.to_string());
        }
        let names = self.names.report();
        let settings = &self.wanted.config.settings;
        let context = Context {
            daemon: Some(std::process::id()),
            cgroup: self.wanted.cgroup.display().to_string(),
            pin_dir: settings.pin_dir.display().to_string(),
            nft_table: settings.nft_table.clone(),
            backend: self.enforcement.name().to_owned(),
            backend_reason: self.enforcement.reason().map(str::to_owned),
            restored: self.enforcement.restored(),
            names,
            causes,
            existing: self.existing.clone(),
            unread: observed.is_err(),
        };
        status(observed.as_ref().ok(), context)
    }
}

/// Whether the loop is to turn on. Tells the service manager that it does, where that asked for it (`WATCHDOG_USEC`, man 3
/// `sd_watchdog_enabled`).
fn goes_on(mounts: &Mounts) -> bool {
    if sd_notify::watchdog_enabled().is_some() {
        // Whoever does not hear it will restart us.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    }
    let Some(mount) = mounts.unseen() else { return true };
    warn!(
        "{} was mounted after the start and cannot be seen from here; ending, to be started again",
        mount.display()
    );
    false
}

async fn send_events(kept: Vec<Line>, live: Option<broadcast::Receiver<Line>>, replies: mpsc::Sender<Reply>) {
    for line in kept {
        if replies.send(Reply::Event(line)).await.is_err() {
            return;
        }
    }
    let Some(mut live) = live else { return };
    loop {
        let line = match live.recv().await {
            Ok(line) => line,
            Err(broadcast::error::RecvError::Lagged(lost)) => Line::Lost(Lost::new(lost)),
            Err(broadcast::error::RecvError::Closed) => return,
        };
        if replies.send(Reply::Event(line)).await.is_err() {
            return;
        }
    }
}

/// Waits until there is something to read; for ever where there is no source.
async fn ready_to_read<T: AsRawFd>(source: Option<&AsyncFd<T>>) -> Option<io::Result<AsyncFdReadyGuard<'_, T>>> {
    match source {
        Some(source) => Some(source.readable().await),
        None => std::future::pending().await,
    }
}

/// As [`ready_to_read`], for a source that reading changes.
async fn ready_to_take<T: AsRawFd>(source: Option<&mut AsyncFd<T>>) -> Option<io::Result<AsyncFdReadyMutGuard<'_, T>>> {
    match source {
        Some(source) => Some(source.readable_mut().await),
        None => std::future::pending().await,
    }
}

/// Lets the loop wait for a descriptor. Its owner moves into the result, so that it cannot be closed meanwhile.
#[allow(
    deprecated,
    reason = "the successor is the same call, marked unsafe for owners that change their descriptor"
)]
fn readable<T: AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(owner, Interest::READABLE)
}
