//! The loop: receives what happened, computes what is wanted, makes it active. The only place that knows everybody.

mod boot;
mod bus;
mod capabilities;
mod configure;
mod confine;
mod denials;
mod dials;
mod door;
mod drift;
mod error;
#[cfg(test)]
mod fake;
mod faults;
mod feed;
mod granted;
mod grants;
mod guard;
mod history;
mod jobs;
mod journal;
mod links;
mod lookups;
mod machine;
mod memory;
mod recent;
mod report;
mod requests;
mod rounds;
mod save;
mod sources;
mod tally;
mod ticks;
mod trace;
mod users;

use std::{
    collections::HashMap,
    path::Path,
    time::{Duration, Instant},
};

use tokio::{
    sync::mpsc,
    task::{self, JoinSet},
};
use tracing::{info, warn};

use self::{
    boot::Pending,
    bus::Unfinished,
    dials::Dials,
    door::Door,
    drift::Drift,
    faults::{About, Faults},
    feed::Feed,
    guard::{Applied, Guard},
    history::History,
    jobs::ChainKeeper,
    machine::Machine,
    rounds::Rounds,
    save::StateKeeper,
    sources::{Sources, Wakeup},
    users::UserLookups,
};
use crate::{
    backend::{LinksSeen, Start, Store},
    bosh::Watch,
    control::ControlSocket,
    host::Identities,
    inputs::{HostConfig, Inputs, SavedRun},
    jobs::JobRules,
    policy::Name,
    resolve::PartialAnswer,
    sweep::{SweepJob, SweepQueue},
    text::counted,
    wire::{ExistingStatus, Reply},
};

pub(crate) use self::{
    boot::{apply_last_good, apply_once},
    error::DaemonError,
    granted::report as report_grants,
};

/// How often links and cgroups are looked at.
const TICK: Duration = Duration::from_secs(1);
/// How often what is local is listed without such word. Some routes go without any, with what they depended on.
const LIST_AGAIN: Duration = Duration::from_mins(1);

/// What runs.
struct Daemon {
    /// What rules are made from.
    inputs: Inputs,
    chain: ChainKeeper,
    /// The file does not hold the grants as they are.
    grants_unsaved: bool,
    enforcement: Box<dyn Store>,
    /// Whether this process goes on after its first rule set.
    stays: bool,
    /// Why it is not known whether the host sees what this process keeps.
    visibility_unknown: Option<String>,
    /// When what is local was listed last.
    listed: Instant,
    lookups: JoinSet<PartialAnswer>,
    user_lookups: UserLookups,
    /// The name and round of each lookup under way.
    under_way: HashMap<task::Id, (Name, u64)>,
    /// Whose answers count, and who waits for them.
    rounds: Rounds<mpsc::Sender<Reply>>,
    /// How much the kernel programs tell.
    log_level: u8,
    guard: Guard,
    feed: Feed,
    history: History,
    identities: Identities,
    dials: Dials,
    faults: Faults,
    /// Settings of the agent's that are being written.
    unfinished: Option<Unfinished>,
    kept: StateKeeper,
    /// A configuration that was refused at the start.
    pending: Option<Pending>,
    /// What is to be swept by (D9), and what came of it.
    sweeps: SweepQueue,
    existing: Option<ExistingStatus>,
}

/// Why a daemon ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It was told to stop: what is active stays (F1).
    Stopped,
    /// It was told to unload: nothing is active, and nobody is to start it again by himself.
    Unloaded,
}

/// Runs until SIGTERM or SIGINT, which leave enforcement active (F1), or until it is to unload.
pub(crate) async fn run(path: &Path) -> Result<End, DaemonError> {
    // What needs no lookup is active before any; readiness waits for the names' first answers.
    let (daemon, socket) = boot::start(path)?;
    turn(daemon, socket).await
}

/// The loop, until the daemon is to end.
async fn turn(mut daemon: Daemon, socket: ControlSocket) -> Result<End, DaemonError> {
    let (mut door, calls) = Door::open(socket);
    let mut sources = Sources::open(&mut daemon, calls)?;
    if let Some(trace) = daemon.enforcement.trace() {
        trace::follow(trace);
    }
    daemon.enforcement.retire(daemon.inputs.settings());
    daemon.look_up_due(Instant::now());
    let mut ready = false;
    loop {
        if !ready && daemon.rounds.has_first_answers() && !daemon.is_unsettled() {
            ready = true;
            daemon.save_soon().await;
            daemon.ready()?;
        }
        let wakeup = sources.next(&mut daemon).await;
        if matches!(wakeup, Wakeup::Tick) {
            daemon.faults.set(About::Socket, door.keep_open());
        }
        match daemon.step(wakeup, &mut sources) {
            Step::Wait => {}
            Step::Follow => sources.follow(&mut daemon),
            Step::Stop => {
                daemon.tell_rest_of_denials();
                daemon.save_now().await;
                daemon.until_heard().await;
                daemon.keep_denials_now().await;
                return daemon.stop(door).map(|()| End::Stopped);
            }
            Step::Unload(replies) => {
                daemon.tell_rest_of_denials();
                daemon.keep_denials_now().await;
                let result = daemon.unload();
                // Who starts another one once it is told finds the place free.
                drop(door);
                tell(&result, &replies).await;
                return result.map(|()| End::Unloaded);
            }
        }
    }
}

/// What the loop does after an event.
enum Step {
    Wait,
    /// Another configuration may have brought another backend and other settings.
    Follow,
    Stop,
    /// Unloads, and replies.
    Unload(mpsc::Sender<Reply>),
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
    fn start(machine: &impl Machine, wanted: HostConfig, stays: bool, left: SavedRun) -> Result<Self, DaemonError> {
        for warning in &wanted.warnings {
            warn!("{warning}");
        }
        let settings = wanted.settings();
        let level = trace::level();
        let enforcement = machine.take_over(Start {
            settings,
            cgroup: wanted.cgroup.as_deref(),
            daemon: stays,
            log_level: level,
        })?;
        let mut faults = Faults::default();
        let (grants, fault) = Self::load_grants(&settings.state_dir, stays);
        faults.set(About::Grants, fault); // F4
        faults.set(About::Users, wanted.fault()); // F8
        let mut chain = ChainKeeper::new();
        let mut jobs = JobRules::default();
        if let Err(error) = chain.look(&wanted, &mut jobs) {
            warn!("{error}; rules of jobs allow nobody until they can be read");
        }
        let identities = Identities::new(&wanted.mount, &wanted.users);
        let inputs = Inputs::new(wanted, &left, grants, jobs, Instant::now())?;
        let fault = left.fault.map(|error| {
            format!("{error}; the saved rules are lost: DNS names have no addresses until the first lookup")
        });
        faults.set(About::State, fault.clone()); // F4
        Ok(Self {
            rounds: Rounds::new(inputs.policy().names()),
            inputs,
            chain,
            grants_unsaved: false,
            enforcement,
            stays,
            visibility_unknown: None,
            log_level: level,
            guard: Guard::default(),
            listed: Instant::now(),
            lookups: JoinSet::new(),
            user_lookups: UserLookups::new(),
            under_way: HashMap::new(),
            feed: Feed::default(),
            history: History::new(),
            identities,
            dials: Dials::default(),
            faults,
            unfinished: None,
            kept: StateKeeper::new(left.mark, fault.is_some()),
            pending: None,
            sweeps: SweepQueue::default(),
            existing: None,
        })
    }

    /// Has what happened change what it is about, and what is active follow.
    fn step(&mut self, wakeup: Wakeup, sources: &mut Sources) -> Step {
        match wakeup {
            Wakeup::Reload => {
                self.reload(None);
                return Step::Follow;
            }
            Wakeup::Stop => return Step::Stop,
            Wakeup::Answer(joined) => {
                self.answered(joined);
                // What else has come is made active with it: thousands of names are not as many rule sets.
                while let Some(joined) = self.lookups.try_join_next_with_id() {
                    self.answered(joined);
                }
                self.apply_or_keep();
                self.answer_waiting();
            }
            Wakeup::Users(found) => {
                if self.users_found(&found) {
                    return Step::Follow;
                }
            }
            Wakeup::Links(seen) => self.links_seen(seen),
            Wakeup::Due => self.look_up_due(Instant::now()),
            Wakeup::Routes => {
                self.look_at_routes();
                sources.gather_routes();
            }
            Wakeup::Tables => {
                self.look_at_host();
                sources.gather_tables();
            }
            Wakeup::Expiry => self.look_at_host(),
            Wakeup::Denials => sources.take_denials(|source| self.take_events(source)),
            Wakeup::Logged => sources.take_logged(|source| self.take_logged(source)),
            Wakeup::Dials => sources.take_dials(|source| self.take_dials(source)),
            Wakeup::Settings => self.look_at_settings(sources.settings()),
            Wakeup::Save => self.catch_up(),
            Wakeup::Saved(saved) => self.was_kept(&saved),
            Wakeup::Swept(report) => self.swept(report),
            Wakeup::Tick => {
                feed_watchdog();
                // First: mostly the answer is there once the rest is done, and need not wake the loop.
                if let Some(look) = self.enforcement.link_look() {
                    sources.look_at_links(look);
                }
                if self.tick(sources.settings()) || sources.misses_some() {
                    return Step::Follow;
                }
            }
            Wakeup::Call(call) => return self.answer(call),
        }
        Step::Wait
    }

    /// Makes active what is desired now.
    fn apply_now(&mut self) -> Result<u64, DaemonError> {
        let applied = self.guard.apply(&mut *self.enforcement, &self.inputs, Instant::now())?;
        Ok(self.applied(applied))
    }

    /// Makes active what other inputs come to, or leaves everything as it is. Returns the inputs before.
    fn commit(&mut self, inputs: Inputs) -> Result<Inputs, DaemonError> {
        let applied = self.guard.apply(&mut *self.enforcement, &inputs, Instant::now())?;
        let before = std::mem::replace(&mut self.inputs, inputs);
        self.applied(applied);
        Ok(before)
    }

    /// What follows once other rules are active.
    fn applied(&mut self, applied: Applied) -> u64 {
        let Applied { generation, rules } = applied;
        self.kept.changed();
        if self.stays {
            self.follow_dials();
        }
        self.sweeps.set(SweepJob {
            generation,
            rules,
            action: self.inputs.settings().existing,
            cgroup: (!self.enforcement.backend().has_nftables())
                .then(|| self.inputs.config.cgroup.clone())
                .flatten(),
            mount: self.inputs.config.mount.clone(),
            local: self.inputs.host.local.clone(),
        });
        generation
    }

    /// Sees to it that what is desired is active; a failure leaves active what is (F4).
    fn apply_or_keep(&mut self) {
        let again = self.faults.of(About::RuleSet).is_some();
        let now = Instant::now();
        let Some(found) = self.guard.reconcile(&mut *self.enforcement, &self.inputs, again, now) else {
            return;
        };
        if found.drifted {
            if found.applied.is_ok() {
                warn!("another process removed or changed enforcer's rules; they are active again");
            } else {
                warn!("another process removed or changed enforcer's rules");
            }
        }
        let applied = found
            .applied
            .map(|applied| applied.map(|applied| self.applied(applied)));
        let fault = applied
            .err()
            .map(|error| format!("{error}; the previous rules stay active"));
        self.faults.set(About::RuleSet, fault);
    }

    fn ready(&mut self) -> Result<(), DaemonError> {
        self.sync_chain();
        self.look_at_visibility();
        // This process has read back or read what is active; what it has not is read now.
        let observed = self.enforcement.observe_quickly()?;
        memory::trim();
        info!(
            "{} generation {}: {} of {} on {}",
            if observed.audit { "auditing" } else { "enforcing" },
            observed.generation,
            counted(observed.endpoints, "endpoint"),
            counted(observed.targets.len(), "target"),
            self.inputs.config.cgroup_shown()
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
        self.look_at_kept_grants();
        self.tell_denials();
        self.identities.look_at_users();
        self.keep_denials();
        self.retry()
    }

    fn links_seen(&mut self, seen: LinksSeen) {
        if self.enforcement.links_seen(seen) {
            self.apply_or_keep();
        }
    }

    /// Has the policy follow what it is made of. True if the message bus is another one.
    fn settle(&mut self) -> bool {
        let settled = self.inputs.settle(Instant::now());
        if settled.policy {
            self.chain.log(&self.inputs);
        }
        if settled.bus {
            self.rounds.retain(&self.inputs.policy().names());
        }
        settled.bus
    }

    /// Local routes come and go.
    fn look_at_routes(&mut self) {
        self.listed = Instant::now();
        let fault = match self.inputs.local() {
            Ok(local) => {
                self.inputs.host.local = local;
                None
            }
            Err(error) => Some(format!("{error}; changes are not followed until this works")),
        };
        self.faults.set(About::Host, fault);
        self.look_at_host();
    }

    /// Cgroups and rules of jobs come and go; links may be taken away.
    fn look_at_host(&mut self) {
        self.end_expired();
        self.take_host();
        self.apply_or_keep();
        self.sync_chain();
        self.answer_waiting();
    }

    /// Takes cgroups and rules of jobs as they are now.
    fn take_host(&mut self) {
        self.look_at_jobs();
        self.settle();
        self.inputs.look_at_cgroups();
    }

    /// Ends, with everything of ours removed.
    fn unload(mut self) -> Result<(), DaemonError> {
        self.enforcement.unload()?;
        // Nothing is enforced any more: what stays there only lets in.
        if let Err(error) = self.chain.remove_all_ours(self.inputs.settings()) {
            warn!("{error}; rules that were written there for grants stay");
        }
        info!("unloaded: nothing is active any more");
        Ok(())
    }

    /// Ends, and leaves active what is (F1).
    fn stop(mut self, door: Door) -> Result<(), DaemonError> {
        drop(door);
        let generation = self.enforcement.observe_quickly()?.generation;
        info!("stopping; generation {generation} stays active");
        Ok(())
    }
}

/// Tells the service manager that the loop turns, where that asked for it (`WATCHDOG_USEC`, man 3
/// `sd_watchdog_enabled`).
fn feed_watchdog() {
    if sd_notify::watchdog_enabled().is_some() {
        // Whoever does not hear it will restart us.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    }
}

#[cfg(test)]
mod tests;
