//! The loop: receives what happened, computes what is wanted, puts it in force. The only place that knows everybody.

mod boot;
mod bus;
mod capabilities;
mod confine;
mod denials;
mod dials;
mod drift;
mod error;
mod faults;
mod grants;
mod jobs;
mod journal;
mod keep;
mod lookups;
mod recent;
mod report;
mod sources;
mod tally;
mod trace;
mod users;
mod wanted;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    path::Path,
    time::{Duration, Instant},
};

use tokio::{
    io::unix::AsyncFd,
    sync::{broadcast, mpsc},
    task::{self, JoinSet},
};
use tracing::{error, info, warn};

use self::{
    boot::{Left, Pending},
    bus::Unfinished,
    denials::{rest_after, send_events},
    dials::Dials,
    drift::Drift,
    faults::{About, Faults},
    jobs::Chain,
    journal::Journal,
    keep::Kept,
    recent::{KEPT_EVENTS, Origin, Recent},
    sources::{Ends, changed, readable, ready_to_read, ready_to_take},
    tally::Tally,
    users::UserLookups,
};
use crate::{
    backend::{Enforcement, Start, nftables},
    bosh::Watch,
    config::ConfigError,
    control::{self, Call},
    grants::Grants,
    host::LocalChanges,
    policy::{Endpoint, Name, Policy},
    resolve::{Known, Looked, Names},
    ruleset::{Host, Resolved, RuleSet},
    sweep::{self, Job, Jobs},
    wire::{ExistingStatus, Line, Lost, Reply, Request, Status, Verification},
};

pub(crate) use self::wanted::complete;
pub(crate) use self::{boot::apply_last_good, error::DaemonError, wanted::Wanted};

/// How often links and cgroups are looked at.
const TICK: Duration = Duration::from_secs(1);
/// How long word of local routes is left to gather once some was taken: they may come by thousands.
const GATHER: Duration = Duration::from_millis(100);
/// How long changes of `nf_tables` are left to gather once one was looked at.
const CALM: Duration = Duration::from_millis(20);
/// How often what is local is listed without such word. Some routes go without any, with what they depended on.
const LIST_AGAIN: Duration = Duration::from_mins(1);

/// Connections of one user that a sweep logs one by one.
const LOGGED_OF_SWEEP: usize = 16;

/// What runs.
struct Daemon {
    wanted: Wanted,
    /// What it means, with what was granted.
    policy: Policy,
    grants: Grants,
    chain: Chain,
    /// The file does not hold them as they are.
    grants_unsaved: bool,
    enforcement: Enforcement,
    /// Whether this process goes on after its first rule set.
    stays: bool,
    /// Why it is not known whether the host sees what this process keeps.
    visibility_unknown: Option<String>,
    names: Names,
    host: Host,
    /// When what is local was listed last.
    listed: Instant,
    lookups: JoinSet<Looked>,
    user_lookups: UserLookups,
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
    recent: Recent,
    followers: broadcast::Sender<Line>,
    journal: Journal,
    tally: Tally,
    /// Those that the kernel programs could not hand over, as far as they were told.
    lost: Option<u64>,
    /// Since when there was more to be taken than was taken at once.
    flood: Option<Instant>,
    /// Denials that nftables has logged and this process was too slow to take.
    lost_logged: u64,
    /// Names whose first answer readiness waits for.
    unanswered: BTreeSet<Name>,
    dials: Dials,
    applied: Option<Applied>,
    faults: Faults,
    /// The message bus as far as it is known (B2).
    bus: Option<BTreeSet<Endpoint>>,
    /// Settings of the agent's that are being written.
    unfinished: Option<Unfinished>,
    /// What was known of names before this process, for those that come late.
    known_before: Known,
    kept: Kept,
    /// A configuration that was refused at the start.
    pending: Option<Pending>,
    /// Whether what is in force is newer than all that this process knows, so that it stays until a configuration is taken (F1).
    frozen: bool,
    /// Whether that is only so until names are looked up, as what the last run knew of them is lost.
    forgetful: bool,
    /// What is to be swept by (D9), and what came of it.
    sweeps: Jobs,
    existing: Option<ExistingStatus>,
}

/// What the rule set in force was made from, besides the policy.
struct Applied {
    generation: u64,
    host: Host,
    resolved: Resolved,
    /// Revision of the grants.
    grants: u64,
    /// Revision of the rules of jobs.
    jobs: u64,
}

struct Waiting {
    round: u64,
    names: BTreeSet<Name>,
    replies: mpsc::Sender<Reply>,
}

/// Puts a configuration in force once, looking every name up, and returns what is then in force.
pub(crate) async fn apply_once(path: &Path) -> Result<Status, DaemonError> {
    let wanted = Wanted::load(path)?;
    control::nobody_listens(&wanted.config.settings.socket)?;
    let (left, good) = Left::claim(&wanted.config.settings.state_dir);
    let wanted = boot::has_not_gone(wanted, good.as_ref())?;
    let moved = good.filter(|good| boot::lies_elsewhere(&good.settings, &wanted.config.settings));
    if let Some(good) = &moved {
        control::nobody_listens(&good.settings.socket)?;
    }
    let mut daemon = Daemon::start(wanted, false, left)?;
    daemon.take_whole_bus().await;
    daemon.look_up_all();
    while let Some(joined) = daemon.lookups.join_next_with_id().await {
        daemon.answered(joined);
    }
    // Lookups take their time.
    daemon.take_host();
    daemon.apply_now()?;
    daemon.keep_chain();
    daemon.enforcement.retire(&daemon.wanted.config.settings);
    if let Some(good) = moved {
        boot::leave(&good.settings, &daemon.wanted.config.settings);
    }
    if let Some(report) = sweep::once(&daemon.sweeps).await {
        daemon.swept(report);
    }
    daemon.keep_now().await;
    let mut status = daemon.status();
    status.daemon = crate::wire::DaemonStatus {
        running: false,
        pid: None,
    };
    Ok(status)
}

/// Why a daemon ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It was told to stop: what is in force stays (F1).
    Stopped,
    /// It was told to unload: nothing is in force, and nobody is to start it again by himself.
    Unloaded,
}

/// Runs until SIGTERM or SIGINT, which leave enforcement in force (F1), or until it is to unload.
pub(crate) async fn run(path: &Path) -> Result<End, DaemonError> {
    // What needs no look-up is in force before any; readiness waits for the names' first answers.
    let (mut daemon, listener) = boot::start(path)?;
    let socket = daemon.wanted.config.settings.socket.clone();
    let failed = |action| move |error| DaemonError::Io { action, error };
    let (mut hangup, mut ends) = (sources::hangup()?, Ends::new()?);
    let routes = daemon.watch_routes().map_err(failed("watch local routes"))?;
    let mut denials = daemon.denials()?;
    let mut dials = daemon.dials()?;
    let mut logged = daemon.logged()?;
    let changes = nftables::Changes::subscribe().and_then(readable).ok();
    if let Some(kernel) = daemon.enforcement.kernel() {
        trace::start(kernel);
    }
    let (calls, mut requests) = mpsc::channel(64);
    tokio::spawn(control::serve(listener, calls));
    let (reports, mut swept) = mpsc::channel(1);
    tokio::spawn(sweep::run(daemon.sweeps.clone(), reports));

    daemon.enforcement.retire(&daemon.wanted.config.settings);
    daemon.look_up_due(Instant::now());
    let mut watch = daemon.watch(None);
    let mut ready = false;
    let (mut again, mut missed) = (false, false);
    let (mut rest, mut gather, mut calm) = (None, None, None);
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        if !ready && daemon.unanswered.is_empty() && !daemon.is_unsettled() {
            ready = true;
            daemon.keep_now().await;
            daemon.ready()?;
        }
        if std::mem::take(&mut again) {
            // Another configuration may have brought another backend and other settings.
            missed = !daemon.follow_denials(&mut denials, &mut dials, &mut logged);
            watch = daemon.watch(watch);
        }
        let until_expiry = daemon.until_expiry();
        let due = daemon.next_due().unwrap_or_else(|| Instant::now() + TICK);
        let keep = daemon.kept.due();
        tokio::select! {
            _ = hangup.recv() => {
                daemon.reload();
                again = true;
            }
            () = ends.recv() => break,
            Some(joined) = daemon.lookups.join_next_with_id() => {
                daemon.answered(joined);
                // What else has come is put in force with it: thousands of names are not as many rule sets.
                while let Some(joined) = daemon.lookups.try_join_next_with_id() {
                    daemon.answered(joined);
                }
                daemon.apply_or_keep();
                daemon.answer_waiting();
            }
            Some(Ok(found)) = daemon.user_lookups.under_way.join_next() => daemon.users_found(&found),
            () = tokio::time::sleep_until(due.into()) => daemon.look_up_due(Instant::now()),
            Ok(mut guard) = routes.readable(), if gather.is_none() => {
                guard.get_inner().drain();
                guard.clear_ready();
                daemon.look_at_routes();
                gather = Some(Instant::now() + GATHER);
            }
            () = tokio::time::sleep_until(gather.unwrap_or(due).into()), if gather.is_some() => gather = None,
            () = tokio::time::sleep_until(calm.unwrap_or(due).into()), if calm.is_some() => calm = None,
            Some(Ok(mut guard)) = ready_to_read(changes.as_ref()), if calm.is_none() => {
                guard.get_inner().drain();
                guard.clear_ready();
                daemon.look_at_host();
                calm = Some(Instant::now() + CALM);
            }
            Some(Ok(mut guard)) = ready_to_take(denials.as_mut()), if rest.is_none() => {
                let all = daemon.take_events(guard.get_inner_mut());
                rest = rest_after(all, guard);
            }
            Some(Ok(mut guard)) = ready_to_take(logged.as_mut()), if rest.is_none() => {
                let all = daemon.take_logged(guard.get_inner_mut());
                rest = rest_after(all, guard);
            }
            Some(Ok(told)) = ready_to_take(dials.as_mut()) => daemon.take_dials(told),
            () = tokio::time::sleep_until(rest.unwrap_or(due).into()), if rest.is_some() => rest = None,
            () = changed(watch.as_mut()) => daemon.look_at_settings(watch.as_mut()),
            () = tokio::time::sleep_until(keep.unwrap_or(due).into()), if keep.is_some() => daemon.catch_up(),
            saved = daemon.kept.saved() => daemon.was_kept(&saved),
            _ = tick.tick() => {
                again = daemon.tick(watch.as_mut()) || missed;
                still_runs();
            }
            () = tokio::time::sleep(until_expiry) => daemon.look_at_host(),
            Some(report) = swept.recv() => daemon.swept(report),
            Some(call) = requests.recv() => if let Some(replies) = daemon.answer(call) {
                let result = daemon.unload();
                // Who starts another one once it is told finds the place free.
                let _ = std::fs::remove_file(&socket);
                tell(&result, &replies).await;
                return result.map(|()| End::Unloaded);
            },
        }
    }
    daemon.keep_now().await;
    daemon.stop(&socket).map(|()| End::Stopped)
}

/// Tells how unloading went.
async fn tell(result: &Result<(), DaemonError>, replies: &mpsc::Sender<Reply>) {
    let reply = match result {
        Ok(()) => Reply::Done,
        Err(error) => Reply::Error(error.to_string()),
    };
    let _ = replies.send(reply).await;
    // The caller hangs up once it has read the answer.
    let _ = tokio::time::timeout(TICK, replies.closed()).await;
}

impl Daemon {
    fn start(mut wanted: Wanted, stays: bool, left: Left) -> Result<Self, DaemonError> {
        for warning in &wanted.warnings {
            warn!("{warning}");
        }
        wanted.take_bus(left.bus.as_ref());
        let settings = &wanted.config.settings;
        let mut names = Names::new(wanted.policy.dns);
        names.set(wanted.policy.asked(), Instant::now());
        names.restore(&left.names, Instant::now());
        let level = trace::level();
        let enforcement = Enforcement::take_over(Start {
            settings,
            cgroup: wanted.cgroup.as_deref(),
            daemon: stays,
            log_level: level,
        })?;
        let mut faults = Faults::default();
        let (grants, fault) = Self::load_grants(&settings.state_dir, stays);
        faults.set(About::Grants, fault); // F4
        faults.set(About::Users, wanted.fault()); // F8
        let mut chain = Chain::new();
        if let Err(error) = chain.look(&wanted) {
            warn!("{error}; rules of jobs let nobody in until they can be read");
        }
        let policy = chain.rules.add_to(grants.add_to(&wanted.policy));
        let host = wanted.host(&policy, wanted::local(&policy)?);
        let fault = left.fault.map(|error| {
            format!(
                "{error}; what was in force before is not known, nor the addresses of names until they are looked up"
            )
        });
        faults.set(About::State, fault.clone()); // F4
        Ok(Self {
            unanswered: wanted.policy.names(),
            wanted,
            policy,
            grants,
            chain,
            grants_unsaved: false,
            enforcement,
            stays,
            visibility_unknown: None,
            log_level: level,
            drift: Drift::default(),
            names,
            host,
            listed: Instant::now(),
            lookups: JoinSet::new(),
            user_lookups: UserLookups::new(),
            under_way: HashMap::new(),
            round: 0,
            answered_rounds: BTreeMap::new(),
            waiting: Vec::new(),
            recent: Recent::default(),
            followers: broadcast::channel(KEPT_EVENTS).0,
            journal: Journal::default(),
            tally: Tally::default(),
            lost: None,
            flood: None,
            lost_logged: 0,
            dials: Dials::default(),
            applied: None,
            faults,
            bus: left.bus,
            unfinished: None,
            known_before: left.names,
            kept: Kept::new(left.mark, fault.is_some()),
            pending: None,
            frozen: false,
            forgetful: false,
            sweeps: Jobs::default(),
            existing: None,
        })
    }

    /// Compiles what is wanted now and puts it in force.
    fn apply_now(&mut self) -> Result<u64, DaemonError> {
        if self.frozen {
            return Err(DaemonError::Frozen);
        }
        let resolved = self.names.resolved(Instant::now());
        let rules = self.rules(&resolved)?;
        let generation = self.enforcement.apply(&rules)?;
        self.applied = Some(Applied {
            generation,
            host: self.host.clone(),
            resolved,
            grants: self.grants.revision(),
            jobs: self.chain.taken,
        });
        self.kept.changed();
        if self.stays {
            self.follow_dials();
        }
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

    /// Takes what a sweep found and did.
    fn swept(&mut self, report: sweep::Report) {
        self.faults.set(About::Sweep, report.fault);
        let mut logged: HashMap<Origin, usize> = HashMap::new();
        let mut more = 0_u64;
        for existing in report.news {
            let text = existing.to_string();
            let line = Line::Existing(existing);
            let of_user = logged.entry(Origin::from_line(&line)).or_default();
            if *of_user < LOGGED_OF_SWEEP {
                *of_user += 1;
                warn!("{text}");
            } else {
                more += 1;
            }
            self.publish(line);
        }
        if more > 0 {
            warn!("{more} more connections older than the rules are against them (see enforcer events)");
        }
        if report.lost > 0 {
            self.publish(Line::Lost(Lost::new(report.lost)));
        }
        self.existing = Some(report.existing);
    }

    /// Sees to it that what is wanted is in force; a failure leaves in force what is (F4).
    fn apply_or_keep(&mut self) {
        let now = Instant::now();
        self.remember();
        if self.frozen || self.drift.rests(now) {
            return;
        }
        let resolved = self.names.resolved(now);
        let unchanged = self.applied.as_ref().is_some_and(|applied| {
            applied.host == self.host
                && applied.resolved == resolved
                && applied.grants == self.grants.revision()
                && applied.jobs == self.chain.taken
        });
        let restored = self.enforcement.restored();
        let kept = match &self.applied {
            Some(applied) if unchanged && self.faults.of(About::RuleSet).is_none() => {
                self.enforcement.keep(applied.generation).map_err(DaemonError::from)
            }
            Some(_) | None => Ok(None),
        };
        if self.enforcement.restored() != restored {
            self.drift.happened(now);
            if kept.is_ok() {
                warn!("somebody removed or changed rules of ours; they are in force again");
            } else {
                warn!("somebody removed or changed rules of ours");
            }
        }
        let fault = match kept {
            Ok(Some(generation)) => {
                if let Some(applied) = &mut self.applied {
                    applied.generation = generation;
                }
                None
            }
            Ok(None) => self.apply_now().err(),
            Err(error) => Some(error),
        };
        let fault = fault.map(|error| format!("{error}; the rule set before stays in force"));
        self.faults.set(About::RuleSet, fault);
    }

    fn ready(&mut self) -> Result<(), DaemonError> {
        self.keep_chain();
        self.look_at_visibility();
        let observed = self.enforcement.observe()?;
        if let Some(kernel) = self.enforcement.kernel() {
            kernel.trim_memory();
        }
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

    /// What is to be looked at every second. True if another configuration was taken.
    fn tick(&mut self, watch: Option<&mut Watch>) -> bool {
        self.look_at_settings(watch);
        if self.faults.of(About::Host).is_some() || self.listed.elapsed() >= LIST_AGAIN {
            self.look_at_routes();
        } else {
            self.look_at_host();
        }
        self.look_at_users();
        self.look_at_kept();
        self.tell_denials();
        self.retry()
    }

    /// Takes the configuration as it is now. A file that was there and has gone is a mistake, not the wish for the defaults (F4).
    fn take_configuration(&mut self) -> Result<(), DaemonError> {
        let path = &self.wanted.path;
        if self.wanted.from_file && !path.exists() {
            return Err(ConfigError::Missing { path: path.clone() }.into());
        }
        Wanted::load_knowing(path, &self.wanted.users).and_then(|wanted| self.change_to(wanted))
    }

    fn reload(&mut self) {
        let loaded = self.take_configuration();
        match loaded {
            Ok(()) => {
                self.faults.put(About::Reload, None);
                self.report_reload();
            }
            Err(error) => {
                // Each time, not once a change: it answers a signal.
                let fault = format!("reload: {error}; the rule set before stays in force");
                error!("{fault}");
                self.faults.put(About::Reload, Some(fault));
            }
        }
    }

    /// Keys that hold for the whole run and are others in another configuration.
    fn fixed_keys(&self, wanted: &Wanted) -> Vec<&'static str> {
        let (old, new) = (&self.wanted.config.settings, &wanted.config.settings);
        let fixed = [
            ("cgroup", self.wanted.cgroup != wanted.cgroup),
            ("pin_dir", old.pin_dir != new.pin_dir),
            ("state_dir", old.state_dir != new.state_dir),
            ("socket", old.socket != new.socket),
            ("nft_table", old.nft_table != new.nft_table),
        ];
        let changed = fixed.iter().filter(|(_, changed)| *changed);
        changed.map(|(key, _)| *key).collect()
    }

    /// Puts another configuration in force, or keeps this one whole.
    fn change_to(&mut self, mut wanted: Wanted) -> Result<(), DaemonError> {
        let keys = self.fixed_keys(&wanted);
        if !keys.is_empty() {
            return Err(DaemonError::FixedKeys {
                path: wanted.path,
                keys,
            });
        }
        for warning in &wanted.warnings {
            warn!("{warning}");
        }
        self.read_bus(wanted.config.bus_dir());
        wanted.take_bus(self.bus.as_ref());
        if let Err(error) = self.chain.look(&wanted) {
            warn!("{error}; rules of jobs count as they were read last");
        }
        let policy = self.completed(&wanted.policy);
        let host = wanted.host(&policy, wanted::local(&policy)?);
        let mut names = self.names.clone();
        names.configure(wanted.policy.dns);
        names.set(wanted.policy.asked(), Instant::now());
        let names = std::mem::replace(&mut self.names, names);
        let taken = std::mem::replace(&mut self.chain.taken, self.chain.rules.revision());
        let before = (
            std::mem::replace(&mut self.wanted, wanted),
            std::mem::replace(&mut self.policy, policy),
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
        let frozen = std::mem::take(&mut self.frozen);
        if let Err(error) = extended.and_then(|()| self.apply_now()) {
            self.frozen = frozen;
            (self.wanted, self.policy, self.host, self.names) = before;
            self.chain.taken = taken;
            // Goes back to what was needed before.
            self.enforcement.retire(&self.wanted.config.settings);
            return Err(error);
        }
        self.enforcement.retire(&self.wanted.config.settings);
        self.keep_chain();
        self.look_at_visibility();
        self.faults.set(About::RuleSet, None);
        self.faults.set(About::Host, None);
        self.faults.set(About::Users, self.wanted.fault());
        self.pending = None;
        self.forgetful = false;
        self.forget_gone_names();
        self.look_up_due(Instant::now());
        self.answer_waiting();
        Ok(())
    }

    /// What is no longer a name keeps nobody waiting.
    fn forget_gone_names(&mut self) {
        let names = self.wanted.policy.names();
        self.unanswered.retain(|name| names.contains(name));
        for waiting in &mut self.waiting {
            waiting.names.retain(|name| names.contains(name));
        }
    }

    /// Word of local routes, from now on.
    fn watch_routes(&mut self) -> io::Result<AsyncFd<LocalChanges>> {
        let routes = LocalChanges::subscribe().and_then(readable)?;
        // Some may have changed before.
        self.look_at_routes();
        Ok(routes)
    }

    /// Local routes come and go.
    fn look_at_routes(&mut self) {
        self.listed = Instant::now();
        let fault = match wanted::local(&self.policy) {
            Ok(local) => {
                self.host.local = local;
                None
            }
            Err(error) => Some(format!("{error}; what comes and goes is not followed")),
        };
        self.faults.set(About::Host, fault);
        self.look_at_host();
    }

    /// Cgroups and rules of jobs come and go; links may be taken away.
    fn look_at_host(&mut self) {
        self.end_expired();
        self.take_host();
        self.apply_or_keep();
        self.keep_chain();
    }

    /// Takes cgroups and rules of jobs as they are now.
    fn take_host(&mut self) {
        self.look_at_jobs();
        let local = std::mem::take(&mut self.host.local);
        self.host = self.wanted.host(&self.policy, local);
    }

    /// Answers a request, but for `unload`, which is the end of the loop: that answer's way is returned.
    fn answer(&mut self, call: Call) -> Option<mpsc::Sender<Reply>> {
        let Call { request, peer, replies } = call;
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
                let kept: Vec<Line> = self.recent.all().cloned().collect();
                let live = follow.then(|| self.followers.subscribe());
                tokio::spawn(send_events(kept, live, replies));
            }
            Request::Grant(asked) => drop(replies.try_send(self.answer_grant(&asked, &peer))),
            Request::Revoke(asked) => drop(replies.try_send(self.answer_revoke(&asked, &peer))),
            Request::Grants => drop(replies.try_send(Reply::Grants(self.grants_report()))),
            Request::Verify => {
                let reply = match self.verify() {
                    Ok(verification) => Reply::Verification(Box::new(verification)),
                    Err(error) => Reply::Error(error.to_string()),
                };
                drop(replies.try_send(reply));
            }
            Request::Unload => return Some(replies),
        }
        None
    }

    /// Compares all that the kernel holds with what is wanted now.
    fn verify(&mut self) -> Result<Verification, DaemonError> {
        let resolved = self.names.resolved(Instant::now());
        let rules = self.rules(&resolved)?;
        Ok(self.enforcement.verify(&rules)?)
    }

    /// What is wanted now, with these addresses.
    fn rules(&self, resolved: &Resolved) -> Result<RuleSet, DaemonError> {
        self.wanted.rules(&self.policy, resolved, &self.host)
    }

    /// Ends, with everything of ours removed.
    fn unload(mut self) -> Result<(), DaemonError> {
        self.tell_rest_of_denials();
        self.enforcement.unload()?;
        // Nothing is enforced any more: what stays there only lets in.
        if let Err(error) = self.chain.leave(self.wanted.settings()) {
            warn!("{error}; rules that were written there for grants stay");
        }
        info!("unloaded: nothing is in force any more");
        Ok(())
    }

    /// Ends, and leaves in force what is (F1).
    fn stop(mut self, socket: &Path) -> Result<(), DaemonError> {
        self.tell_rest_of_denials();
        let _ = std::fs::remove_file(socket);
        let generation = self.enforcement.observe_quickly()?.generation;
        info!("stopping; generation {generation} stays in force");
        Ok(())
    }
}

/// Tells the service manager that the loop turns, where that asked for it (`WATCHDOG_USEC`, man 3 `sd_watchdog_enabled`).
fn still_runs() {
    if sd_notify::watchdog_enabled().is_some() {
        // Whoever does not hear it will restart us.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    }
}
