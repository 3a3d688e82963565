//! Everything that decides which rules are desired, and the one place that puts it together: for the daemon, `apply`,
//! the last known good rules, `verify` and (in part) `doctor`.

mod error;
mod host_config;
mod saved;

use std::{collections::BTreeSet, io, path::Path, sync::Arc, time::Instant};

use ipnet::IpNet;

pub(crate) use self::saved::SavedRun;
pub(crate) use self::{
    error::InputError,
    host_config::{HostConfig, is_gone},
};
use crate::{
    backend::{self, BackendError},
    config::{Config, Settings},
    grants::{self, Grants, Moment},
    host,
    jobs::JobRules,
    policy::{BUS, Destination, Endpoint, Policy, Target},
    resolve::{Known, Names},
    ruleset::{Host, Resolved, RuleSet, compile},
};

/// Whatever rules are made from. Plain data: a change that may be refused is made to a clone.
#[derive(Clone, Debug)]
pub(crate) struct Inputs {
    /// The configuration; the message bus is in its policy.
    pub(crate) config: HostConfig,
    /// The message bus as far as it is known (B2).
    pub(crate) bus: Option<BTreeSet<Endpoint>>,
    pub(crate) grants: Grants,
    pub(crate) jobs: JobRules,
    pub(crate) names: Names,
    /// What was known of names before this process, for those that come late.
    known_before: Known,
    pub(crate) host: Host,
    /// What the configuration means with bus, grants and rules of jobs: another one whenever these are.
    policy: Arc<Policy>,
    /// Revisions of grants and of rules of jobs that it is made with.
    made_with: (u64, u64),
}

/// What is desired at a moment.
#[derive(Clone, Debug)]
pub(crate) struct Desired {
    pub(crate) resolved: Resolved,
    pub(crate) rules: RuleSet,
}

/// What [`Inputs::settle`] found changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settled {
    /// The policy.
    pub(crate) policy: bool,
    /// The message bus in it, and so perhaps the names to look up.
    pub(crate) bus: bool,
}

impl Inputs {
    /// What is known at a start.
    pub(crate) fn new(
        config: HostConfig,
        saved: &SavedRun,
        grants: Grants,
        jobs: JobRules,
        now: Instant,
    ) -> Result<Self, InputError> {
        let mut inputs = Self {
            policy: Arc::new(config.policy.clone()),
            names: Names::new(config.policy.dns),
            config,
            bus: saved.bus.clone(),
            grants,
            jobs,
            known_before: saved.names.clone(),
            host: Host::default(),
            made_with: (0, 0),
        };
        inputs.take_bus();
        inputs.make(now);
        inputs.names.restore(&inputs.known_before, now);
        inputs.host.local = inputs.local()?;
        inputs.look_at_cgroups();
        Ok(inputs)
    }

    /// What a configuration comes to beside what the last run left on disk, for those who look from outside.
    pub(crate) fn from_disk(config: HostConfig) -> Result<Self, InputError> {
        let dir = &config.settings().state_dir;
        let (saved, good) = SavedRun::load(dir);
        if let Some(fault) = saved.fault {
            return Err(InputError::Io {
                action: "read the last known good rules",
                error: io::Error::other(fault),
            });
        }
        config.ensure_present(good.as_ref())?;
        let mut grants = load_grants(dir)?;
        grants.expire(Moment::now());
        let mut jobs = JobRules::default();
        let chain = backend::jobs::read(config.settings()).map_err(BackendError::from)?;
        jobs.take(chain, &config.mount);
        Self::new(config, &saved, grants, jobs, Instant::now())
    }

    /// The same with the grants on disk that have ended, which stay in the kernel where no daemon was there to end
    /// them; and these.
    pub(crate) fn with_ended_grants(
        &self,
        now: Moment,
    ) -> Result<(Self, Vec<(grants::Key, grants::Term)>), InputError> {
        let mut inputs = self.clone();
        inputs.grants = load_grants(&self.settings().state_dir)?;
        let ended = inputs.grants.clone().expire(now);
        inputs.settle(now.monotonic);
        inputs.look_at_cgroups();
        Ok((inputs, ended))
    }

    /// How and where it is enforced.
    pub(crate) fn settings(&self) -> &Settings {
        self.config.settings()
    }

    /// What the configuration means with the message bus, what was granted and what rules of jobs say.
    pub(crate) fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    /// What the configuration means without rules of jobs, for which grants leave the room.
    pub(crate) fn granted(&self) -> Policy {
        self.grants.add_to(&self.config.policy)
    }

    /// Makes the policy anew where what it is made of is something else.
    pub(crate) fn settle(&mut self, now: Instant) -> Settled {
        let bus = self.take_bus();
        let policy = bus || self.made_with != (self.grants.revision(), self.jobs.revision());
        if policy {
            self.make(now);
        }
        if bus {
            self.names.restore(&self.known_before, now);
        }
        Settled { policy, bus }
    }

    /// Takes another configuration.
    pub(crate) fn set_config(&mut self, config: HostConfig, now: Instant) {
        self.names.configure(config.policy.dns);
        self.config = config;
        self.take_bus();
        self.make(now);
    }

    /// Takes cgroups as they are now.
    pub(crate) fn look_at_cgroups(&mut self) {
        let local = std::mem::take(&mut self.host.local);
        self.host = host::with_cgroups(local, Some(&self.config.mount), &self.policy.cgroups());
    }

    /// What is local to this host. Where no endpoint asks for that it is of use to sweeps alone, which can do without
    /// (D9).
    pub(crate) fn local(&self) -> Result<BTreeSet<IpNet>, InputError> {
        match host::local() {
            Ok(local) => Ok(local),
            Err(_) if !self.policy.has_local_endpoint() => Ok(BTreeSet::new()),
            Err(error) => Err(InputError::Io {
                action: "list what is local to this host",
                error,
            }),
        }
    }

    /// The rules that all this comes to.
    pub(crate) fn desired(&self, now: Instant) -> Result<Desired, InputError> {
        let resolved = self.names.resolved(now);
        let rules = compile(&self.policy, &resolved, &self.host).map_err(|error| InputError::Compile {
            path: self.config.path.clone(),
            error,
        })?;
        Ok(Desired { resolved, rules })
    }

    /// Targets of whose endpoints some are not known.
    pub(crate) fn targets_unknown(&self, now: Instant) -> impl Iterator<Item = &str> {
        let resolved = self.names.resolved(now);
        let bus_is_unknown = self.bus.is_none() && self.config.config.bus_dir().is_some();
        let unknown = move |target: &&Target| {
            (target.name == BUS && bus_is_unknown)
                || target.endpoints.iter().any(|endpoint| match &endpoint.destination {
                    Destination::Name(name) => !resolved.contains_key(name),
                    Destination::Address(_) | Destination::Prefix(_) | Destination::Local => false,
                })
        };
        let targets = self.policy.targets.iter().filter(unknown);
        targets.map(|target| target.name.as_str())
    }

    fn make(&mut self, now: Instant) {
        self.policy = Arc::new(self.jobs.add_to(self.granted()));
        self.made_with = (self.grants.revision(), self.jobs.revision());
        self.names.set(self.policy.asked(), now);
    }

    /// Has the configuration's policy name the message bus that is known. True if it named another one.
    fn take_bus(&mut self) -> bool {
        let HostConfig { config, policy, .. } = &mut self.config;
        take_bus(config, policy, self.bus.as_ref())
    }
}

fn load_grants(dir: &Path) -> Result<Grants, InputError> {
    grants::load(dir).map_err(|error| InputError::Grants { error })
}

/// Puts the message bus into a policy, where the configuration leaves it to the agent's settings (B2). True if that
/// changes anything.
fn take_bus(config: &Config, policy: &mut Policy, bus: Option<&BTreeSet<Endpoint>>) -> bool {
    bus.filter(|_| config.bus_dir().is_some())
        .is_some_and(|bus| policy.set_bus(bus))
}

/// What a configuration means with the message bus of a BOSH agent's settings, what was granted, and what rules of jobs
/// say.
pub(crate) fn complete(
    config: &Config,
    mut policy: Policy,
    bus: Option<&BTreeSet<Endpoint>>,
    grants: &Grants,
    jobs: &JobRules,
) -> Policy {
    take_bus(config, &mut policy, bus);
    jobs.add_to(grants.add_to(&policy))
}
