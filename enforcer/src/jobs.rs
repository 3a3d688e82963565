//! Rules that BOSH jobs have in the chain `inet bosh_agent monit_access_jobs`, as principals of target `monit` (B5):
//! which of them count, and what of our grants is written there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    path::Path,
};

use enforcer_ebpf::NO_UID;

use crate::{
    backend::jobs::{Accept, ChainDump, JobRule, RuleDestination, RuleOrigin, RuleSubject, Unknown},
    grants::{self, Grantee, Grants, LimitError, MAX_GRANTS},
    host::{self, hierarchy},
    policy::{self, CgroupPath, Endpoint, MONIT, Policy, Protocol, Target, Uid},
    ruleset::{Cgroup, Host},
};

/// What the chain holds, and which cgroups its rules mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct JobRules {
    chain: ChainDump,
    /// The cgroups that rules name by id, as far as they were found.
    paths: BTreeMap<Cgroup, CgroupPath>,
    /// Those of them that are there still: a cgroup made again under the same path has another id.
    there: BTreeSet<Cgroup>,
    /// Whether the hierarchy is seen, so that what is not there has gone.
    sees: bool,
    /// Counts changes of whom they let in.
    revision: u64,
}

/// Why a rule lets nobody in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ignored {
    /// It is of no known shape.
    Unknown(Unknown),
    /// It is for something else than an endpoint of monit.
    Elsewhere,
    /// Its cgroup has gone, or lies at another level than it says.
    Gone,
    /// It means every process of the host.
    Everybody,
    /// Its user is the number that no user can have.
    Nobody,
    /// There are [`MAX_GRANTS`] before it (F7).
    TooMany,
    /// Its cgroup lies too deep, or at one depth too many (F7).
    Depth(LimitError),
}

impl fmt::Display for Ignored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(why) => write!(f, "{why}"),
            Self::Elsewhere => f.write_str("it is not for an endpoint of target monit"),
            Self::Gone => f.write_str("no cgroup has that id at that level; the cgroup has gone"),
            Self::Everybody => f.write_str("it is for every process of the host"),
            Self::Nobody => f.write_str("no user can have its UID"),
            Self::TooMany => write!(
                f,
                "{MAX_GRANTS} rules before it allow somebody, which is the maximum; remove some of them"
            ),
            Self::Depth(why) => write!(f, "{why}"),
        }
    }
}

/// A rule and what becomes of it: whom it lets in, or why nobody.
pub(crate) type Effect<'a> = (&'a JobRule, Result<Grantee, Ignored>);

impl JobRules {
    /// Takes the chain as it is now: looks up the cgroups that are new in it below a mount, and whether all are still
    /// there.
    pub(crate) fn take(&mut self, chain: ChainDump, mount: &Path) {
        let is_same = chain.exists == self.chain.exists && chain.rules == self.chain.rules;
        self.chain = chain;
        if !is_same {
            self.find_new(mount);
            self.revision += 1;
        }
        self.look(mount);
    }

    fn find_new(&mut self, mount: &Path) {
        let named: BTreeSet<Cgroup> = self.of_others().filter_map(cgroup_of).collect();
        self.paths.retain(|id, _| named.contains(id));
        let missing: BTreeSet<Cgroup> = named.into_iter().filter(|id| !self.paths.contains_key(id)).collect();
        if !missing.is_empty() {
            self.paths.extend(find(mount, &missing));
        }
    }

    /// Looks whether the cgroups are still there.
    pub(crate) fn look(&mut self, mount: &Path) {
        // A part of it, or a namespace's own root, says nothing of what lies elsewhere.
        self.sees = hierarchy::depth(mount) == Some(0) && mount.join("cgroup.procs").exists();
        let id = |path: &CgroupPath| host::directory_id(&mount.join(path.as_str().trim_start_matches('/')));
        let there = self.paths.iter().filter(|(cgroup, path)| id(path) == Some(cgroup.id));
        let there: BTreeSet<Cgroup> = there.map(|(cgroup, _)| *cgroup).collect();
        if there != self.there {
            self.there = there;
            self.revision += 1;
        }
    }

    /// What the chain holds.
    #[must_use]
    pub(crate) fn chain(&self) -> &ChainDump {
        &self.chain
    }

    /// Changes whenever whom they let in may have.
    #[must_use]
    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// The policy with whom the rules of jobs let in to monit, where that may be granted.
    #[must_use]
    pub(crate) fn add_to(&self, mut policy: Policy) -> Policy {
        let effects = self.effects(&policy);
        let let_in: Vec<_> = effects
            .into_iter()
            .filter_map(|(_, effect)| Some(effect.ok()?.principal()))
            .collect();
        if let Some(monit) = policy.targets.iter_mut().find(|target| target.name == MONIT) {
            monit.principals.extend(let_in);
        }
        policy
    }

    /// Each rule that is not ours, with what becomes of it.
    #[must_use]
    pub(crate) fn effects(&self, policy: &Policy) -> Vec<Effect<'_>> {
        let Some(monit) = policy.target(MONIT).filter(|monit| monit.grants) else {
            return Vec::new();
        };
        // One rule too many, or too deep, must not refuse the whole policy (F4).
        let mut depths: BTreeSet<usize> = policy.depths();
        let mut counted = BTreeSet::new();
        let mut effects = Vec::new();
        for rule in self.of_others() {
            let effect = self.grantee(rule, monit).and_then(|grantee| {
                if counted.contains(&grantee) {
                    return Ok(grantee);
                }
                if counted.len() >= MAX_GRANTS {
                    return Err(Ignored::TooMany);
                }
                let with_its_own: BTreeSet<usize> = depths
                    .iter()
                    .copied()
                    .chain(grantee.cgroup().map(CgroupPath::depth))
                    .collect();
                grants::check_depths(&with_its_own).map_err(Ignored::Depth)?;
                depths = with_its_own;
                counted.insert(grantee.clone());
                Ok(grantee)
            });
            effects.push((rule, effect));
        }
        effects
    }

    fn grantee(&self, rule: &JobRule, monit: &Target) -> Result<Grantee, Ignored> {
        let accept = rule.accepts.as_ref().map_err(|why| Ignored::Unknown(why.clone()))?;
        if !monit.endpoints.iter().any(|endpoint| leads_to(&accept.to, endpoint)) {
            return Err(Ignored::Elsewhere);
        }
        let RuleSubject { user, cgroup } = accept.subject;
        if user == Some(NO_UID) {
            return Err(Ignored::Nobody);
        }
        let cgroup = cgroup.map(|id| {
            let there = self.there.contains(&id).then(|| self.paths.get(&id)).flatten();
            there.cloned().ok_or(Ignored::Gone)
        });
        match (user.map(Uid), cgroup.transpose()?) {
            (None, Some(cgroup)) if cgroup.as_str() == "/" => Err(Ignored::Everybody),
            (None, Some(cgroup)) => Ok(Grantee::Cgroup(cgroup)),
            (Some(uid), Some(cgroup)) => Ok(Grantee::UserWithin(uid, cgroup)),
            (Some(uid), None) => Ok(Grantee::User(uid)),
            (None, None) => Err(Ignored::Unknown(Unknown::Nobody)),
        }
    }

    /// What to remove from the chain, by handle, and what to add to it, so that it says what was granted.
    #[must_use]
    pub(crate) fn changes(&self, wanted: &BTreeSet<Accept>) -> (Vec<u64>, Vec<Accept>) {
        let mut found = BTreeSet::new();
        let stale = self.chain.rules.iter().filter(|rule| match rule.writer {
            // Once is enough.
            RuleOrigin::Grants => !rule
                .accepts
                .as_ref()
                .is_ok_and(|accept| wanted.contains(accept) && found.insert(*accept)),
            // Its container has ended; the next one has another id.
            RuleOrigin::Container => self.sees && cgroup_of(rule).is_some_and(|id| !self.there.contains(&id)),
            RuleOrigin::Other => false,
        });
        let stale = stale.map(|rule| rule.handle).collect();
        (stale, wanted.difference(&found).copied().collect())
    }

    fn of_others(&self) -> impl Iterator<Item = &JobRule> {
        self.chain.rules.iter().filter(|rule| rule.writer != RuleOrigin::Grants)
    }
}

/// What was granted of monit as rules of the chain: where the agent's own chain is, which drops whomever none of them
/// accepts.
#[must_use]
pub(crate) fn rules_of(grants: &Grants, policy: &Policy, host: &Host) -> BTreeSet<Accept> {
    let Some(monit) = policy.target(MONIT).filter(|monit| monit.grants) else {
        return BTreeSet::new();
    };
    let to = destinations(monit);
    let granted = grants.iter().filter(|(key, _)| key.target == MONIT);
    let subjects = granted.filter_map(|(key, _)| {
        let cgroup = match key.to.cgroup() {
            // One that is not there has no id now.
            Some(path) => Some(*host.cgroups.get(path)?),
            None => None,
        };
        let user = key.to.user().map(|uid| uid.0);
        Some(RuleSubject { user, cgroup })
    });
    subjects
        .flat_map(|subject| to.iter().map(move |to| Accept { subject, to: *to }))
        .collect()
}

/// A target's endpoints as such rules name them: of whatever is no single address, the port.
#[must_use]
pub(crate) fn destinations(target: &Target) -> Vec<RuleDestination> {
    let endpoints = target
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.protocol == Protocol::Tcp);
    let destination = |endpoint: &Endpoint| RuleDestination {
        address: match endpoint.destination {
            policy::Destination::Address(address) => Some(address),
            policy::Destination::Prefix(_) | policy::Destination::Local | policy::Destination::Name(_) => None,
        },
        port: Some(endpoint.port.get()),
    };
    endpoints.map(destination).collect()
}

/// Whether a rule lets through to an endpoint of monit. To no more than a part of a prefix or of this host is enough: a
/// rule names an address.
pub(crate) fn leads_to(to: &RuleDestination, endpoint: &Endpoint) -> bool {
    let is_there = |address: IpAddr| match &endpoint.destination {
        policy::Destination::Address(own) => *own == address,
        policy::Destination::Prefix(net) => net.contains(&address),
        policy::Destination::Local => address.is_loopback(),
        policy::Destination::Name(_) => false,
    };
    endpoint.protocol == Protocol::Tcp
        && to.port.is_none_or(|port| port == endpoint.port.get())
        && to.address.is_none_or(is_there)
}

fn cgroup_of(rule: &JobRule) -> Option<Cgroup> {
    rule.accepts.as_ref().ok()?.subject.cgroup
}

/// The paths of cgroups below a mount; of those that are not found, nothing.
fn find(mount: &Path, wanted: &BTreeSet<Cgroup>) -> BTreeMap<Cgroup, CgroupPath> {
    let Some(top) = hierarchy::depth(mount) else {
        return BTreeMap::new();
    };
    let deepest = wanted.iter().map(|cgroup| cgroup.level).max().unwrap_or_default();
    let mut found = BTreeMap::new();
    for (dir, below) in hierarchy::walk(mount).take_while(|(_, below)| top + below <= deepest) {
        let cgroup = host::directory_id(&dir).map(|id| Cgroup { id, level: top + below });
        if let Some(cgroup) = cgroup.filter(|cgroup| wanted.contains(cgroup))
            && let Some(path) = hierarchy::path_below(mount, &dir)
            && let Ok(path) = CgroupPath::parse(&path)
        {
            found.insert(cgroup, path);
            if found.len() == wanted.len() {
                break;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests;
