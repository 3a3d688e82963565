//! The chain that rules of BOSH jobs are in (B5): read whenever `nf_tables` changes, before rules are made; written
//! once they are active.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{About, Daemon, Drift};
use crate::{
    backend::{
        NftablesError,
        jobs::{Accept, CHAIN, ChainDump, JobsChain, TABLE},
    },
    config::Settings,
    grants::Grantee,
    inputs::{HostConfig, Inputs},
    jobs::{self, Ignored, JobRules},
    policy::{MONIT, Policy},
};

/// How often a change is tried while others change the chain too.
const TRIES: usize = 3;
/// Rules that are logged one by one, of those that are others after a change.
const LOGGED: usize = 16;
/// How long a kernel that has no `nf_tables` is not asked again: each time it looks for a module.
const MISSING: Duration = Duration::from_mins(1);

/// Why the chain does not say what was granted.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChainError {
    /// It cannot be read or written.
    #[error(transparent)]
    Nftables(#[from] NftablesError),
    /// What is written does not stay.
    #[error(
        "another process keeps removing grants from nftables chain inet {TABLE} {CHAIN}; they are written again after \
         a pause"
    )]
    Undone,
}

/// The chain, and what it said last.
#[derive(Debug)]
pub(super) struct ChainKeeper {
    way: Option<JobsChain>,
    /// When the kernel had no `nf_tables`.
    missing: Option<Instant>,
    /// The generation of `nf_tables` at which it was read.
    seen: Option<u32>,
    /// What was logged of each rule, by its handle.
    logged: BTreeMap<u64, Result<Grantee, Ignored>>,
    held: Held,
    /// What of ours was written last.
    written: Option<BTreeSet<Accept>>,
    /// How often that had to be written again.
    drift: Drift,
}

/// Whether something of ours is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// What an earlier process left, perhaps.
    Unknown,
    /// The chain is there for this process.
    Ours,
    /// Nothing.
    Nothing,
}

impl ChainKeeper {
    pub(super) fn new() -> Self {
        Self {
            way: None,
            missing: None,
            seen: None,
            logged: BTreeMap::new(),
            held: Held::Unknown,
            written: None,
            drift: Drift::default(),
        }
    }

    /// The way there; none where the kernel has no `nf_tables`.
    fn way(&mut self, settings: &Settings) -> Result<Option<&mut JobsChain>, NftablesError> {
        if self.way.is_none() && self.missing.is_none_or(|missing| missing.elapsed() >= MISSING) {
            self.way = JobsChain::open(settings)?;
            self.missing = self.way.is_none().then(Instant::now);
        }
        Ok(self.way.as_mut())
    }

    /// Reads what rules of jobs say, where they may be others than before, and looks which of their cgroups are there.
    pub(super) fn look(&mut self, config: &HostConfig, rules: &mut JobRules) -> Result<(), NftablesError> {
        if !may_be_granted(&config.policy) {
            self.seen = None;
            if rules.chain().exists {
                rules.take(ChainDump::default(), &config.mount);
            }
            return Ok(());
        }
        let seen = self.seen;
        let Some(way) = self.way(config.settings())? else {
            return Ok(());
        };
        if seen == Some(way.genid()?) {
            rules.look(&config.mount);
        } else {
            let found = way.read()?;
            self.seen = Some(found.genid);
            rules.take(found, &config.mount);
        }
        Ok(())
    }

    /// Has the chain there with what was granted in it, where monit may be granted; else nothing of ours.
    fn keep(&mut self, inputs: &mut Inputs) -> Result<(), ChainError> {
        let Inputs {
            config,
            grants,
            jobs: rules,
            host,
            ..
        } = inputs;
        if !may_be_granted(&config.policy) {
            return Ok(self.let_go(config.settings())?);
        }
        self.held = Held::Ours;
        let mut result = Ok(());
        // Somebody may change the chain meanwhile.
        for _ in 0..TRIES {
            let chain = rules.chain();
            let granted = if chain.agents {
                jobs::rules_of(grants, &config.policy, host)
            } else {
                BTreeSet::new()
            };
            let (remove, add) = rules.changes(&granted);
            if chain.exists && remove.is_empty() && add.is_empty() {
                self.written = Some(granted);
                return Ok(());
            }
            let exists = chain.exists;
            let is_undone = self.written.as_ref() == Some(&granted) && (!exists || !add.is_empty());
            // As with rules of our own, who fights us is not fought without pause (F5).
            if is_undone && self.drift.is_paused(Instant::now()) {
                return Err(ChainError::Undone);
            }
            self.seen = None;
            let Some(way) = self.way(config.settings())? else {
                return Ok(());
            };
            result = way.change(&remove, &add);
            // Before Linux 5.13 nf_tables knows no cgroups: what can be written is. A transaction without a change
            // would wake us again.
            let mut users = add;
            users.retain(|accept| accept.subject.cgroup.is_none());
            if result.is_err() && (!exists || !remove.is_empty() || !users.is_empty()) {
                let _ = way.change(&remove, &users);
            }
            self.look(config, rules)?;
            if result.is_ok() {
                if is_undone {
                    self.drift.happened(Instant::now());
                }
                self.written = Some(granted);
                break;
            }
        }
        Ok(result?)
    }

    /// Removes what is ours: all of it where this process has had it, else, as it may be that the agent makes its table
    /// just now, rules alone.
    fn let_go(&mut self, settings: &Settings) -> Result<(), NftablesError> {
        let held = self.held;
        if held == Held::Nothing {
            return Ok(());
        }
        if let Some(way) = self.way(settings)? {
            match held {
                Held::Ours => way.remove_all_ours()?,
                Held::Unknown | Held::Nothing => drop(way.remove_rules()?),
            }
        }
        (self.held, self.written) = (Held::Nothing, None);
        Ok(())
    }

    /// Logs each rule of which something else comes than before.
    pub(super) fn log(&mut self, inputs: &Inputs) {
        let granted = inputs.granted();
        let effects = inputs.jobs.effects(&granted).into_iter();
        let now: BTreeMap<_, _> = effects.map(|(rule, effect)| (rule.handle, effect)).collect();
        let news = now
            .iter()
            .filter(|(handle, effect)| self.logged.get(handle) != Some(effect));
        let news: Vec<_> = news.collect();
        for (handle, effect) in news.iter().take(LOGGED) {
            match effect {
                Ok(grantee) => info!("rule {handle} of chain {CHAIN} allows {grantee} to connect to {MONIT}"),
                Err(why) => warn!("rule {handle} of chain {CHAIN} allows nobody to connect to {MONIT}: {why}"),
            }
        }
        if let Some(more) = news.len().checked_sub(LOGGED).filter(|more| *more > 0) {
            info!("{more} more rules of chain {CHAIN} are new, see enforcer grants");
        }
        self.logged = now;
    }

    /// Has the chain read again: what was read last is not what is known.
    pub(super) fn unread(&mut self) {
        self.seen = None;
    }

    /// Removes what is ours.
    pub(super) fn remove_all_ours(&mut self, settings: &Settings) -> Result<(), NftablesError> {
        self.way(settings)?.map_or(Ok(()), JobsChain::remove_all_ours)
    }
}

fn may_be_granted(policy: &Policy) -> bool {
    policy.target(MONIT).is_some_and(|monit| monit.grants)
}

impl Daemon {
    /// Takes the rules of jobs as they are now.
    pub(super) fn look_at_jobs(&mut self) {
        let Inputs { config, jobs, .. } = &mut self.inputs;
        let looked = self.chain.look(config, jobs);
        let fault = |error| format!("{error}; the rules of jobs that were read last stay in use");
        self.faults.set(About::JobRules, looked.err().map(fault));
    }

    /// Sees to it that the chain is there, and says what was granted.
    pub(super) fn sync_chain(&mut self) {
        let kept = self.chain.keep(&mut self.inputs);
        let fault = |error| format!("{error}; the BOSH agent's own rules, if active, drop what grants of monit allow");
        self.faults.set(About::JobsChain, kept.err().map(fault));
    }
}
