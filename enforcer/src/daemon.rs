//! The loop: receives what happened, computes what is wanted, puts it in force. The only place that knows everybody.

mod capabilities;
mod denials;
mod drift;
mod error;
mod faults;
mod lookups;
mod report;
mod sources;
mod trace;
mod wanted;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    path::Path,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{broadcast, mpsc},
    task::{self, JoinSet},
};
use tracing::{error, info, warn};

use self::{
    denials::{KEPT_EVENTS, send_events},
    drift::Drift,
    faults::{About, Faults},
    sources::{readable, ready_to_read, ready_to_take},
};
use crate::{
    backend::{Enforcement, Start, nftables},
    control::{self, Call, Reply, Request},
    events::{Line, Lost},
    host::{self, AddressChanges},
    policy::Name,
    resolve::{Answer, Names},
    ruleset::{Host, Resolved, compile},
    state,
    status::{ExistingStatus, Status},
    sweep::{self, Job, Jobs},
};

pub use self::{error::DaemonError, wanted::Wanted};

/// How often links and cgroups are looked at.
const TICK: Duration = Duration::from_secs(1);
/// The rest between two helpings of denials, so that a flood does not keep the loop from its work.
const EVENT_REST: Duration = Duration::from_millis(50);

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
pub async fn apply_once(path: &Path) -> Result<Status, DaemonError> {
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
pub async fn run(path: &Path) -> Result<(), DaemonError> {
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
            _ = tick.tick() => daemon.look_at_host(),
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
            cgroup: wanted.cgroup.as_deref(),
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
                .then(|| self.wanted.cgroup.clone())
                .flatten(),
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
            self.wanted.cgroup_shown()
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
            cgroup: self.wanted.cgroup.as_deref(),
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
}
