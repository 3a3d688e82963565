//! The chain that rules of BOSH jobs are in (B5): read whenever `nf_tables` changes, before rules are made; written once they are active.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use tracing::{info, warn};

use super::{About, Daemon, Wanted, grants::writable};
use crate::{
    backend::nftables::{
        NftablesError,
        jobs::{CHAIN, Jobs, JobsChain},
    },
    control::JobRuleStatus,
    grants::{Grantee, Grants},
    host,
    jobs::{self, Ignored, JobRules},
    policy::{MONIT, Policy},
    ruleset::Host,
};

/// How often a change is tried while others change the chain too.
const TRIES: usize = 3;
/// Rules that are logged one by one, of those that are others after a change.
const LOGGED: usize = 16;

/// The chain, and what it said last.
#[derive(Debug)]
pub(super) struct Chain {
    /// The name of this instance's own table, by which its rules are known.
    instance: String,
    way: Option<JobsChain>,
    /// The generation of `nf_tables` at which it was read.
    seen: Option<u32>,
    pub(super) rules: JobRules,
    /// Revision of the rules that the policy has been made with.
    taken: u64,
    /// What was logged of each rule, by its handle.
    logged: BTreeMap<u64, Result<Grantee, Ignored>>,
    held: Held,
}

/// Whether something of ours is there.
#[derive(Clone, Copy, Debug)]
enum Held {
    /// What an earlier process left, perhaps.
    Unknown,
    /// The chain is there for this process.
    Ours,
    /// Nothing.
    Nothing,
}

impl Chain {
    pub(super) fn new(instance: &str) -> Self {
        Self {
            instance: instance.to_owned(),
            way: None,
            seen: None,
            rules: JobRules::default(),
            taken: 0,
            logged: BTreeMap::new(),
            held: Held::Unknown,
        }
    }

    /// The way there; none where the kernel has no `nf_tables`.
    fn way(&mut self) -> Result<Option<&mut JobsChain>, NftablesError> {
        if self.way.is_none() {
            self.way = JobsChain::open(&self.instance)?;
        }
        Ok(self.way.as_mut())
    }

    /// Reads what rules of jobs say, where they may be others than before, and looks which of their cgroups are there.
    pub(super) fn look(&mut self, policy: &Policy, mount: &Path) -> Result<(), NftablesError> {
        if !may_be_granted(policy) {
            self.seen = None;
            self.rules.take(Jobs::default(), mount);
            return Ok(());
        }
        let seen = self.seen;
        let Some(way) = self.way()? else { return Ok(()) };
        if seen != Some(way.generation()?) {
            let found = way.read()?;
            self.seen = Some(found.generation);
            self.rules.take(found, mount);
        }
        self.rules.look(mount);
        Ok(())
    }

    /// Has the chain there with what was granted in it, where monit may be granted; else nothing of ours.
    fn keep(&mut self, policy: &Policy, mount: &Path, grants: &Grants, host: &Host) -> Result<(), NftablesError> {
        if !may_be_granted(policy) {
            return self.let_go();
        }
        self.held = Held::Ours;
        let mut result = Ok(());
        // Somebody may change the chain meanwhile.
        for _ in 0..TRIES {
            let chain = self.rules.chain();
            let granted = if chain.agents {
                jobs::rules_of(grants, policy, host)
            } else {
                BTreeSet::new()
            };
            let (remove, add) = self.rules.changes(&granted);
            if chain.exists && remove.is_empty() && add.is_empty() {
                return Ok(());
            }
            let exists = chain.exists;
            self.seen = None;
            let Some(way) = self.way()? else { return Ok(()) };
            result = way.change(&remove, &add);
            // Before Linux 5.13 nf_tables knows no cgroups: what can be written is. A transaction without a change would wake us again.
            let mut users = add;
            users.retain(|accept| accept.subject.cgroup.is_none());
            if result.is_err() && (!exists || !remove.is_empty() || !users.is_empty()) {
                let _ = way.change(&remove, &users);
            }
            self.look(policy, mount)?;
            if result.is_ok() {
                break;
            }
        }
        result
    }

    /// Removes what is ours: all of it where this process has had it, else, as it may be that the agent makes its table just now, rules alone.
    fn let_go(&mut self) -> Result<(), NftablesError> {
        let held = self.held;
        let Some(way) = self.way()? else { return Ok(()) };
        match held {
            Held::Ours => drop(way.leave()?),
            Held::Unknown => drop(way.forget()?),
            Held::Nothing => {}
        }
        self.held = Held::Nothing;
        Ok(())
    }

    /// Logs each rule of which something else comes than before.
    fn log(&mut self, policy: &Policy) {
        let effects = self.rules.effects(policy).into_iter();
        let now: BTreeMap<_, _> = effects.map(|(rule, effect)| (rule.handle, effect)).collect();
        let news = now
            .iter()
            .filter(|(handle, effect)| self.logged.get(handle) != Some(effect));
        let news: Vec<_> = news.collect();
        for (handle, effect) in news.iter().take(LOGGED) {
            match effect {
                Ok(grantee) => info!("rule {handle} of chain {CHAIN} lets {grantee} in to {MONIT}"),
                Err(why) => warn!("rule {handle} of chain {CHAIN} lets nobody in to {MONIT}: {why}"),
            }
        }
        if let Some(more) = news.len().checked_sub(LOGGED).filter(|more| *more > 0) {
            info!("{more} more rules of chain {CHAIN} are new, see enforcer grants");
        }
        self.logged = now;
    }

    /// Removes what is ours.
    pub(super) fn leave(&mut self) -> Result<(), NftablesError> {
        self.way()?.map_or(Ok(()), |way| way.leave().map(drop))
    }
}

fn may_be_granted(policy: &Policy) -> bool {
    policy.target(MONIT).is_some_and(|monit| monit.grants)
}

impl Daemon {
    /// What a policy means with what was granted, and what rules of jobs say.
    pub(super) fn completed(&self, policy: &Policy) -> Policy {
        self.chain.rules.add_to(self.grants.add_to(policy))
    }

    /// Takes the rules of jobs as they are now.
    pub(super) fn look_at_jobs(&mut self) {
        let looked = self.chain.look(&self.wanted.policy, &self.wanted.mount);
        let fault = |error| format!("{error}; rules of jobs count as they were read last");
        self.faults.set(About::JobRules, looked.err().map(fault));
        let revision = self.chain.rules.revision();
        if revision != self.chain.taken {
            self.chain.taken = revision;
            self.policy = self.completed(&self.wanted.policy);
            self.chain.log(&self.wanted.policy);
        }
    }

    /// Sees to it that the chain is there, and says what was granted.
    pub(super) fn keep_chain(&mut self) {
        let Wanted { policy, mount, .. } = &self.wanted;
        let kept = self.chain.keep(policy, mount, &self.grants, &self.host);
        let fault =
            |error| format!("{error}; where the BOSH agent's own rules are active, they drop whom monit is granted to");
        self.faults.set(About::JobsChain, kept.err().map(fault));
    }

    /// What `enforcer grants` says of the rules of jobs.
    pub(super) fn job_rules(&self) -> Vec<JobRuleStatus> {
        let status = |handle, grantee: Option<&Grantee>, ignored| JobRuleStatus {
            handle,
            user: grantee.and_then(Grantee::user).map(|uid| uid.0),
            cgroup: grantee.and_then(Grantee::cgroup).map(ToString::to_string),
            ignored,
        };
        let effects = self.chain.rules.effects(&self.wanted.policy).into_iter();
        let all = effects.map(|(rule, effect)| match effect {
            Ok(grantee) => {
                let found = grantee.cgroup().map(|cgroup| host::cgroup(&self.wanted.mount, cgroup));
                let ignored = found.as_ref().and_then(writable);
                status(rule.handle, Some(&grantee), ignored)
            }
            Err(why) => status(rule.handle, None, Some(why.to_string())),
        });
        all.collect()
    }
}
