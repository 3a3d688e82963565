//! A configuration read, understood, and found possible on this host.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    time::Instant,
};

use ipnet::IpNet;
use tracing::warn;

use super::{DaemonError, boot::Left};
use crate::{
    backend::{BackendError, nftables},
    config::{Backend, Bosh, Config, Settings, Understood},
    grants::{self, Grants},
    host::{self, NoMatch},
    jobs::JobRules,
    policy::{Account, CgroupPath, Endpoint, FileUsers, HostUsers, Listed, Policy, Uid, Users},
    resolve::Names,
    ruleset::{Host, Resolved, RuleSet, compile},
    state::LastGood,
};

/// Where cgroups are looked for when none is mounted: there are none.
const USUAL_MOUNT: &str = "/sys/fs/cgroup";

/// A configuration that was read, understood and found possible on this host.
#[derive(Debug)]
pub struct Wanted {
    pub(super) path: PathBuf,
    /// Whether that file was there, so that the defaults are not what was asked for (B1).
    pub(super) from_file: bool,
    pub(super) config: Config,
    pub(super) policy: Policy,
    /// The cgroup to attach to; none where no cgroup v2 is mounted and nothing needs one.
    pub(super) cgroup: Option<PathBuf>,
    /// Where cgroup paths of principals start.
    pub(super) mount: PathBuf,
    pub(super) warnings: Vec<String>,
    /// The users and groups that its targets list.
    pub(super) listed: Vec<Listed>,
    /// The users and groups that it names, as looked up; none for one that does not exist.
    pub(super) users: KnownUsers,
    /// Why principals match nobody (F8).
    pub(super) absent: Vec<String>,
}

/// The UIDs of users and of groups' members, as looked up.
pub(super) type KnownUsers = BTreeMap<Account, Option<BTreeSet<Uid>>>;

/// Users as known before, for those that cannot be looked up now: a name service that fails changes nothing (F4).
struct Remembered<'a> {
    users: &'a dyn Users,
    before: &'a KnownUsers,
    found: RefCell<KnownUsers>,
}

impl Users for Remembered<'_> {
    fn uids(&self, account: &Account) -> io::Result<Option<BTreeSet<Uid>>> {
        let found = match (self.users.uids(account), self.before.get(account)) {
            (Err(_), Some(before)) => before.clone(),
            (found, _) => found?,
        };
        self.found.borrow_mut().insert(account.clone(), found.clone());
        Ok(found)
    }
}

impl Wanted {
    /// Reads a configuration file.
    pub fn load(path: &Path) -> Result<Self, DaemonError> {
        Self::load_knowing(path, &BTreeMap::new())
    }

    /// As [`Wanted::load`], with users as they were known before.
    pub(super) fn load_knowing(path: &Path, before: &KnownUsers) -> Result<Self, DaemonError> {
        Self::understand(Config::load(path)?, &HostUsers, before)
    }

    /// The same configuration, with its users looked up again (N9).
    pub(super) fn with_users(&self, users: &dyn Users) -> Result<Self, DaemonError> {
        let again = Self::understand(self.config.clone(), users, &self.users)?;
        Ok(Self {
            from_file: self.from_file,
            warnings: Vec::new(),
            ..again
        })
    }

    fn understand(config: Config, users: &dyn Users, before: &KnownUsers) -> Result<Self, DaemonError> {
        let users = Remembered {
            users,
            before,
            found: RefCell::default(),
        };
        let Understood {
            policy,
            warnings,
            absent,
            listed,
        } = Policy::from_config(&config, &users)?;
        let (cgroup, mount) = cgroups(&config.settings, &policy)?;
        Ok(Self {
            path: config.path.clone(),
            from_file: config.path.exists(),
            config,
            policy,
            cgroup,
            mount,
            warnings: warnings.iter().map(ToString::to_string).collect(),
            listed,
            users: users.found.into_inner(),
            absent: absent.iter().map(ToString::to_string).collect(),
        })
    }

    /// Why it asks for less than it says, if it does.
    pub(super) fn fault(&self) -> Option<String> {
        (!self.absent.is_empty()).then(|| self.absent.join("; "))
    }

    /// What was active last. Names of users and groups mean whom the host's files name now (N9); nothing else is asked, as early at boot
    /// that might hang.
    pub(super) fn of(path: &Path, good: &LastGood) -> Result<Self, DaemonError> {
        let (mut policy, mut listed) = (good.policy.clone(), good.listed.clone());
        match FileUsers::below(Path::new("/")) {
            Ok(files) => {
                for account in policy.name_again(&mut listed, &files) {
                    warn!("{account} means somebody else now than when the last rules were kept");
                }
            }
            Err(error) => warn!("read /etc/passwd: {error}; users have the numbers that they had"),
        }
        let (cgroup, mount) = cgroups(&good.settings, &policy)?;
        Ok(Self {
            path: path.into(),
            from_file: path.exists(),
            config: Config {
                path: path.into(),
                mode: good.policy.mode,
                settings: good.settings.clone(),
                dns: good.policy.dns,
                nat64: good.policy.nat64.clone(),
                bosh: good.bosh.clone().map(|dir| Bosh { dir }),
                targets: BTreeMap::new(),
            },
            policy,
            cgroup,
            mount,
            warnings: Vec::new(),
            listed,
            users: BTreeMap::new(),
            absent: Vec::new(),
        })
    }

    /// The cgroup to attach to, to be shown.
    pub(super) fn cgroup_shown(&self) -> String {
        let shown = self.cgroup.as_ref().map(|cgroup| cgroup.display().to_string());
        shown.unwrap_or_else(|| "no cgroup".to_owned())
    }

    /// What it means.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The rules that it asks for by the addresses known last, and the id of the cgroup to be judged: for those who look from outside.
    pub fn rules_known_last(&self) -> Result<(RuleSet, u64), DaemonError> {
        let failed = |action| move |error| DaemonError::Io { action, error };
        let dir = &self.config.settings.state_dir;
        let (left, _) = Left::load(dir);
        if let Some(fault) = left.fault {
            return Err(failed("read what was in force last")(io::Error::other(fault)));
        }
        let mut grants = grants::load(dir)
            .map_err(io::Error::other)
            .map_err(failed("read the grants"))?;
        grants.expire(crate::grants::Moment::now());
        let mut jobs = JobRules::default();
        let chain = nftables::jobs::read(&self.config.settings).map_err(BackendError::from)?;
        jobs.take(chain, &self.mount);
        let policy = complete(&self.config, self.policy.clone(), left.bus.as_ref(), &grants, &jobs);
        let mut names = Names::new(policy.dns);
        let now = Instant::now();
        names.set(policy.asked(), now);
        names.restore(&left.names, now);
        let rules = self.rules(&policy, &names.resolved(now), &self.host(&policy, local(&policy)?))?;
        let cgroup = match &self.cgroup {
            Some(cgroup) => host::directory_id(cgroup).ok_or(DaemonError::NoCgroup2)?,
            // No program is attached anywhere then.
            None => 0,
        };
        Ok((rules, cgroup))
    }

    /// Takes the message bus as far as it is known, where the configuration leaves it to the agent's settings (B2). True if
    /// the policy is another one by it.
    pub(super) fn take_bus(&mut self, bus: Option<&BTreeSet<Endpoint>>) -> bool {
        take_bus(&self.config, &mut self.policy, bus)
    }

    /// This host as a policy needs it known.
    pub(super) fn host(&self, policy: &Policy, local: BTreeSet<IpNet>) -> Host {
        host::with_cgroups(local, Some(&self.mount), &policy.cgroups())
    }

    /// The rules that its policy, completed, comes to.
    pub(super) fn rules(&self, policy: &Policy, resolved: &Resolved, host: &Host) -> Result<RuleSet, DaemonError> {
        compile(policy, resolved, host).map_err(|error| DaemonError::Compile {
            path: self.path.clone(),
            error,
        })
    }

    /// How and where it is enforced.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.config.settings
    }

    /// What is allowed, but probably not meant.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Why principals of a cgroup match nobody now, though it is nobody else's.
    pub(super) fn why_nobody(&self, cgroup: &CgroupPath) -> Option<String> {
        let mount = self.mount.display();
        match host::cgroup(&self.mount, cgroup) {
            Err(NoMatch::Missing) => Some(format!(
                "cgroup {cgroup} does not exist below {mount}; its principals match nobody until it does"
            )),
            Err(NoMatch::Unplaced) => Some(format!(
                "how deep cgroup {cgroup} lies is not known, as {mount} is the root of a cgroup namespace alone; its principals match \
                 nobody: run enforcer in the host's cgroup namespace"
            )),
            Err(NoMatch::Writable(_)) | Ok(_) => None,
        }
    }

    /// What does not exist on this host yet, and matches nobody until it does: users, and cgroups.
    #[must_use]
    pub fn absent(&self) -> Vec<String> {
        let cgroups = self.policy.cgroups();
        let cgroups = cgroups.iter().filter_map(|cgroup| self.why_nobody(cgroup));
        let cgroups = cgroups.map(|why| format!("{}: {why}", self.path.display()));
        self.absent.iter().cloned().chain(cgroups).collect()
    }
}

/// What is local to this host. Where no endpoint asks for that it is of use to sweeps alone, which can do without (D9).
pub(super) fn local(policy: &Policy) -> Result<BTreeSet<IpNet>, DaemonError> {
    match host::local() {
        Ok(local) => Ok(local),
        Err(_) if !policy.names_this_host() => Ok(BTreeSet::new()),
        Err(error) => Err(DaemonError::Io {
            action: "list what is local to this host",
            error,
        }),
    }
}

/// What a configuration means with what is known besides: the message bus of a BOSH agent's settings, what was granted, and what rules of
/// jobs say. Pure.
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

fn take_bus(config: &Config, policy: &mut Policy, bus: Option<&BTreeSet<Endpoint>>) -> bool {
    let bus = bus.filter(|_| config.bus_dir().is_some());
    bus.is_some_and(|bus| policy.set_bus(bus))
}

/// The cgroup to attach to, if something needs or has one, and where paths of cgroups start.
fn cgroups(settings: &Settings, policy: &Policy) -> Result<(Option<PathBuf>, PathBuf), DaemonError> {
    let mount = host::cgroup2_mount().map_err(|error| DaemonError::Io {
        action: "read /proc/self/mountinfo",
        error,
    })?;
    let cgroup = settings.cgroup.clone().or_else(|| mount.clone());
    let needs_one = match settings.backend {
        Backend::Ebpf | Backend::Both => true,
        Backend::Nftables | Backend::Auto => !policy.cgroups().is_empty(),
    };
    if cgroup.is_none() && needs_one {
        return Err(DaemonError::NoCgroup2);
    }
    let mount = mount.or_else(|| cgroup.clone()).unwrap_or_else(|| USUAL_MOUNT.into());
    Ok((cgroup, mount))
}
