//! When to sweep, and the effects: after every new rule set, again shortly after, then each minute while something is
//! found.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashSet},
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use enforcer_ebpf::Verdict;
use tokio::sync::{Notify, mpsc};
use tracing::debug;

use super::{
    Cgroups, Connection, Doubt, Listener, OffendingConnection, SweepError, judge, mark_accepted, principal_cgroups,
};
use crate::{
    host::{self, sock_diag},
    policy::Protocol,
    ruleset::RuleSet,
    wire::{Existing, ExistingAction, ExistingEvent, ExistingStatus, Schema, rfc3339},
};

/// A call that was judged just before the rules changed may become a connection just after they were swept.
const RECHECK: Duration = Duration::from_secs(1);
/// How often what was found is looked at again, and what failed tried again.
const AGAIN: Duration = Duration::from_mins(1);
/// The share of time that sweeping may take: a part in so many.
const SHARE: u32 = 5;
/// Most connections that one round keeps in memory, to report and to cut; where more were found and cut, another
/// follows.
const MAX_FOUND: usize = 4096;
/// Most connections that `status` lists.
const MAX_LISTED: usize = 256;
/// Most events of one round; the rest is counted as lost.
const MAX_EVENTS: usize = 1024;

/// A rule set made active, and what else sweeping by it needs.
#[derive(Debug)]
pub(crate) struct SweepJob {
    pub generation: u64,
    pub rules: RuleSet,
    /// Report, or cut too.
    pub action: Existing,
    /// The cgroup below which is judged; none where every one is, as by nftables.
    pub cgroup: Option<PathBuf>,
    /// Where cgroup v2 is mounted.
    pub mount: PathBuf,
    /// This host's addresses.
    pub local: BTreeSet<ipnet::IpNet>,
}

/// The next job: a later one takes the place of one that nobody has begun.
#[derive(Clone, Debug, Default)]
pub(crate) struct SweepQueue(Arc<JobSlot>);

#[derive(Debug, Default)]
struct JobSlot {
    job: Mutex<Option<SweepJob>>,
    news: Notify,
}

/// What a round came to.
#[derive(Clone, Debug)]
pub(crate) struct SweepReport {
    /// For `status`.
    pub existing: ExistingStatus,
    /// What was not reported before.
    pub news: Vec<ExistingEvent>,
    /// How many more there would have been.
    pub lost: u64,
    /// Why not all is known or done.
    pub fault: Option<String>,
}

impl SweepQueue {
    /// Sets the next job.
    pub(crate) fn set(&self, job: SweepJob) {
        *self.0.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
        self.0.news.notify_one();
    }

    fn take(&self) -> Option<SweepJob> {
        self.0.job.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    async fn wait(&self) {
        while self.0.job.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            self.0.news.notified().await;
        }
    }
}

/// Sweeps once by the job that waits, if one does.
pub(crate) async fn once(jobs: &SweepQueue) -> Option<SweepReport> {
    let job = jobs.take()?;
    Some(Rounds::default().round(&job).await.0)
}

/// Sweeps by every job, until nobody takes the reports.
pub(crate) async fn run(jobs: SweepQueue, reports: mpsc::Sender<SweepReport>) {
    let mut rounds = Rounds::default();
    let mut job = None;
    let mut rechecked = false;
    loop {
        let started = Instant::now();
        if let Some(newer) = jobs.take() {
            job = Some(newer);
            rechecked = false;
        }
        let mut rest = None;
        if let Some(current) = &job {
            let (report, more) = rounds.round(current).await;
            let clean = report.existing.found == 0 && report.fault.is_none();
            if reports.send(report).await.is_err() {
                return;
            }
            rest = until_next(more, rechecked, clean);
            if rest.is_none() {
                // Nothing is left to look at: the rule set need not be held.
                job = None;
            }
            rechecked = rechecked || !more;
        }
        tokio::time::sleep(started.elapsed() * (SHARE - 1)).await;
        match rest {
            Some(rest) => drop(tokio::time::timeout(rest, jobs.wait()).await),
            None => jobs.wait().await,
        }
    }
}

/// How long to rest after a round; none where there is no other until another rule set comes.
fn until_next(more: bool, rechecked: bool, clean: bool) -> Option<Duration> {
    match (more, rechecked, clean) {
        (true, _, _) => Some(Duration::ZERO),
        (false, false, _) => Some(RECHECK),
        (false, true, false) => Some(AGAIN),
        (false, true, true) => None,
    }
}

/// What rounds have seen so far.
#[derive(Debug, Default)]
struct Rounds {
    /// What was reported and still exists: not reported again.
    known: HashSet<[u8; 8]>,
    /// Connections cut since the start.
    cut: u64,
}

/// What became of a connection.
enum Fate {
    Stays,
    Cut,
    /// It was to be cut.
    Kept(String),
}

impl Rounds {
    /// Facts, decision, effect. True with it if more was found than one round can cut, and there was progress.
    async fn round(&mut self, job: &SweepJob) -> (SweepReport, bool) {
        let mut fault = None;
        let mut note = |error: SweepError| {
            fault.get_or_insert_with(|| error.to_string());
        };
        let cgroups = cgroups(job).unwrap_or_else(|error| {
            note(error);
            Cgroups {
                judged: Some(0),
                ..Cgroups::default()
            }
        });
        let mut found = Vec::new();
        let mut more = 0_u64;
        let mut seen = 0_u64;
        let started = Instant::now();
        let protocols = protocols(&job.rules);
        for (protocol, v6) in protocols {
            let listed = sock_diag::connections(protocol, v6, |connection| {
                seen += 1;
                if let Some(one) = judge(&job.rules, &cgroups, &connection) {
                    if found.len() < MAX_FOUND {
                        found.push(one);
                    } else {
                        more += 1;
                    }
                }
            });
            let listed = listed.await.map_err(|error| SweepError::List { protocol, v6, error });
            listed.unwrap_or_else(&mut note);
        }
        debug!(
            "swept {seen} connections by generation {} in {:?}: {} against it",
            job.generation,
            started.elapsed(),
            found.len() as u64 + more
        );
        let found = if found.is_empty() {
            found
        } else {
            let listeners = listeners(&found, &mut note).await;
            mark_accepted(found, &listeners, &job.local)
        };
        let before = self.cut;
        let mut judged = Vec::with_capacity(found.len());
        let mut unable = None;
        for one in found {
            let fate = self.cut(job, &one, &mut unable, &mut note).await;
            judged.extend(fate.map(|fate| (one, fate)));
        }
        let report = self.report(job, &judged, more, fault);
        (report, more > 0 && self.cut > before)
    }

    /// None if it had ended by itself.
    async fn cut(
        &mut self,
        job: &SweepJob,
        found: &OffendingConnection,
        unable: &mut Option<String>,
        note: &mut impl FnMut(SweepError),
    ) -> Option<Fate> {
        match (job.action, found.verdict, found.doubt, unable.as_ref()) {
            (Existing::Report, _, _, _) | (_, Verdict::WouldDeny | Verdict::Allow | Verdict::Unjudged, _, _) => {
                Some(Fate::Stays)
            }
            // D9: an allowed user's connection is never cut.
            (Existing::Cut, Verdict::Deny, Some(doubt), _) => Some(Fate::Kept(doubt.to_string())),
            (Existing::Cut, Verdict::Deny, None, Some(unable)) => Some(Fate::Kept(unable.clone())),
            (Existing::Cut, Verdict::Deny, None, None) => match sock_diag::destroy(&found.connection).await {
                Ok(true) => {
                    self.cut += 1;
                    Some(Fate::Cut)
                }
                Ok(false) => None,
                Err(error) => {
                    let Connection { protocol, remote, .. } = found.connection;
                    let error = SweepError::Cut {
                        protocol,
                        remote,
                        error,
                    };
                    let text = error.to_string();
                    *unable = Some(text.clone());
                    note(error);
                    Some(Fate::Kept(text))
                }
            },
        }
    }

    fn report(
        &mut self,
        job: &SweepJob,
        judged: &[(OffendingConnection, Fate)],
        more: u64,
        fault: Option<String>,
    ) -> SweepReport {
        let time = rfc3339(SystemTime::now());
        let mut known = HashSet::new();
        let mut connections = Vec::new();
        let mut news = Vec::new();
        let mut stay = more;
        let mut lost = 0;
        for (found, fate) in judged {
            let cut = matches!(fate, Fate::Cut);
            let cookie = found.connection.cookie;
            let event = event(job, found, fate, &time);
            if cut || !self.known.contains(&cookie) {
                if news.len() < MAX_EVENTS {
                    news.push(event.clone());
                } else {
                    lost += 1;
                }
            }
            if !cut {
                known.insert(cookie);
                stay += 1;
                if connections.len() < MAX_LISTED {
                    connections.push(event);
                }
            }
        }
        self.known = known;
        SweepReport {
            existing: ExistingStatus {
                action: job.action,
                time,
                generation: job.generation,
                found: stay,
                cut: self.cut,
                connections,
            },
            news,
            lost,
            fault,
        }
    }
}

fn event(job: &SweepJob, found: &OffendingConnection, fate: &Fate, time: &str) -> ExistingEvent {
    let Connection {
        protocol,
        state,
        local,
        remote,
        cgroup,
        ..
    } = &found.connection;
    let (action, reason) = match fate {
        Fate::Stays => (
            ExistingAction::Reported,
            found.doubt.map(|doubt: Doubt| doubt.to_string()),
        ),
        Fate::Cut => (ExistingAction::Cut, None),
        Fate::Kept(reason) => (ExistingAction::Kept, Some(reason.clone())),
    };
    ExistingEvent {
        schema: Schema::Existing,
        time: time.to_owned(),
        verdict: found.verdict.into(),
        action,
        reason,
        protocol: *protocol,
        state: *state,
        local: std::net::SocketAddr::new(local.ip().to_canonical(), local.port()).to_string(),
        remote: std::net::SocketAddr::new(remote.ip().to_canonical(), remote.port()).to_string(),
        uid: found.user.map(|uid| uid.0),
        user: None,
        cgroup_id: *cgroup,
        cgroup: None,
        target: job
            .rules
            .targets
            .get(found.target)
            .map(|target| target.name.clone())
            .unwrap_or_default(),
        generation: job.generation,
    }
}

/// The protocols and address families that have endpoints; IPv4 may be dialled over sockets of either.
fn protocols(rules: &RuleSet) -> Vec<(Protocol, bool)> {
    [Protocol::Tcp, Protocol::Udp]
        .into_iter()
        .filter(|protocol| rules.places.iter().any(|(place, _)| place.protocol == *protocol))
        .flat_map(|protocol| [(protocol, false), (protocol, true)])
        .collect()
}

/// Who waits for callers at an end of something found.
async fn listeners(found: &[OffendingConnection], note: &mut impl FnMut(SweepError)) -> Vec<Listener> {
    let ports: HashSet<u16> = found
        .iter()
        .flat_map(|one| [one.connection.local.port(), one.connection.remote.port()])
        .collect();
    let protocols: BTreeSet<Protocol> = found.iter().map(|one| one.connection.protocol).collect();
    let mut listeners = Vec::new();
    for (protocol, v6) in protocols
        .into_iter()
        .flat_map(|protocol| [(protocol, false), (protocol, true)])
    {
        let listed = sock_diag::listeners(protocol, v6, |listener| {
            if ports.contains(&listener.at.port()) && !listeners.contains(&listener) {
                listeners.push(listener);
            }
        });
        let listed = listed.await.map_err(|error| SweepError::List { protocol, v6, error });
        listed.unwrap_or_else(&mut *note);
    }
    listeners
}

/// Every socket of a protocol that waits for others, in this network namespace.
pub(crate) async fn listening(protocol: Protocol) -> Result<Vec<Listener>, SweepError> {
    let mut all = Vec::new();
    for v6 in [false, true] {
        let listed = sock_diag::listeners(protocol, v6, |listener| all.push(listener)).await;
        listed.map_err(|error| SweepError::List { protocol, v6, error })?;
    }
    Ok(all)
}

/// The cgroups, where they matter: where not all is judged, or a principal names one.
fn cgroups(job: &SweepJob) -> Result<Cgroups, SweepError> {
    /// Inode of the root of the whole hierarchy (`kernfs_create_root`).
    const ROOT: u64 = 1;
    let failed = |error| SweepError::Cgroups {
        mount: job.mount.display().to_string(),
        error,
    };
    let judged = job.cgroup.as_ref().map(std::fs::metadata).transpose().map_err(failed)?;
    let judged = judged.map(|meta| meta.ino()).filter(|id| *id != ROOT);
    let parents = if judged.is_some() || !principal_cgroups(&job.rules).is_empty() {
        host::cgroup_parents(&job.mount).map_err(failed)?
    } else {
        std::collections::HashMap::new()
    };
    Ok(Cgroups { judged, parents })
}
