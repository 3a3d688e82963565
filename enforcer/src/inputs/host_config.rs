//! A configuration read, understood, and found possible on this host.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use tracing::warn;

use super::InputError;
use crate::{
    config::{Backend, Bosh, Config, ConfigError, Remark, Settings, Understood},
    host::{self, NoMatch},
    policy::{Account, BUS, CgroupPath, FileUsers, HostUsers, Listed, MONIT, Policy, Target, Uid, Users},
    state::LastGood,
};

/// What a BOSH agent keeps its settings in.
const AGENT: &str = "/var/vcap/bosh";
/// Where cgroups are looked for when none is mounted: there are none.
const USUAL_MOUNT: &str = "/sys/fs/cgroup";

/// A configuration that was read, understood and found possible on this host.
#[derive(Clone, Debug)]
pub(crate) struct HostConfig {
    pub(crate) path: PathBuf,
    /// Whether that file was there, so that the defaults are not what was asked for (B1).
    pub(crate) from_file: bool,
    pub(crate) config: Config,
    pub(crate) policy: Policy,
    /// The cgroup to attach to; none where no cgroup v2 is mounted and nothing needs one.
    pub(crate) cgroup: Option<PathBuf>,
    /// Where cgroup paths of principals start.
    pub(crate) mount: PathBuf,
    pub(crate) warnings: Vec<String>,
    /// The users and groups that its targets list.
    pub(crate) listed: Vec<Listed>,
    /// The users and groups that it names, as looked up; none for one that does not exist.
    pub(crate) users: KnownUsers,
    /// Why principals match nobody (F8).
    pub(crate) absent: Vec<String>,
    /// Where it names cgroups.
    pub(crate) cgroups: Vec<Remark<CgroupPath>>,
}

/// The UIDs of users and of groups' members, as looked up.
pub(crate) type KnownUsers = BTreeMap<Account, Option<BTreeSet<Uid>>>;

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

impl HostConfig {
    /// Reads a configuration file that nobody else can have written.
    pub(crate) fn load(path: &Path) -> Result<Self, InputError> {
        Self::load_knowing(path, &BTreeMap::new())
    }

    /// As [`HostConfig::load`], with users as they were known before.
    pub(crate) fn load_knowing(path: &Path, before: &KnownUsers) -> Result<Self, InputError> {
        Self::understand(Config::load(path)?, &HostUsers, before)
    }

    /// As [`HostConfig::load`], of a file that is only to be checked.
    pub(crate) fn load_to_check(path: &Path) -> Result<Self, InputError> {
        Self::understand(Config::load_to_check(path)?, &HostUsers, &BTreeMap::new())
    }

    /// As [`HostConfig::load`], without the files in `conf.d` that have mistakes (F8); none where they have all the
    /// targets.
    pub(crate) fn load_what_is_right(path: &Path) -> Result<Option<Self>, InputError> {
        let config = Config::load_what_is_right(path)?;
        let understand = |config| Self::understand(config, &HostUsers, &BTreeMap::new());
        config.map(understand).transpose()
    }

    /// The same configuration, with its users looked up again (N9).
    pub(crate) fn with_users(&self, users: &dyn Users) -> Result<Self, InputError> {
        let again = Self::understand(self.config.clone(), users, &self.users)?;
        Ok(Self {
            from_file: self.from_file,
            warnings: Vec::new(),
            ..again
        })
    }

    fn understand(config: Config, users: &dyn Users, before: &KnownUsers) -> Result<Self, InputError> {
        let users = Remembered {
            users,
            before,
            found: RefCell::default(),
        };
        let Understood {
            policy,
            warnings,
            absent,
            cgroups,
            listed,
        } = Policy::from_config(&config, &users).map_err(ConfigError::from)?;
        let (cgroup, mount) = mounted(&config.settings, &policy)?;
        let is_without = config.bosh.is_none() && policy.target(MONIT).or(policy.target(BUS)).is_none();
        let no_bosh = (is_without && Path::new(AGENT).exists()).then(|| {
            format!(
                "{}: this is a BOSH VM, and neither monit nor the message bus is protected, as the file has targets of \
                 its own; add the section [bosh] to protect both",
                config.path.display()
            )
        });
        Ok(Self {
            path: config.path.clone(),
            from_file: config.path.exists(),
            config,
            policy,
            cgroup,
            mount,
            warnings: warnings.iter().map(ToString::to_string).chain(no_bosh).collect(),
            listed,
            users: users.found.into_inner(),
            absent: absent.iter().map(ToString::to_string).collect(),
            cgroups,
        })
    }

    /// F4: fails where the file named targets which were active last, and has gone.
    pub(crate) fn ensure_present(&self, good: Option<&LastGood>) -> Result<(), InputError> {
        if !self.from_file && is_gone(&self.policy, good) {
            return Err(ConfigError::Gone {
                path: self.path.clone(),
            }
            .into());
        }
        Ok(())
    }

    /// Why it asks for less than it says, if it does.
    pub(crate) fn fault(&self) -> Option<String> {
        (!self.absent.is_empty()).then(|| self.absent.join("; "))
    }

    /// What was active last. Names of users and groups mean whom the host's files name now (N9); nothing else is asked,
    /// as early at boot that might hang.
    pub(crate) fn of(path: &Path, good: &LastGood) -> Result<Self, InputError> {
        let (mut policy, mut listed) = (good.policy.clone(), good.listed.clone());
        match FileUsers::below(Path::new("/")) {
            Ok(files) => {
                for account in policy.name_again(&mut listed, &files) {
                    warn!("{account} has a different UID than when the last rules were saved");
                }
            }
            Err(error) => warn!("cannot read /etc/passwd: {error}; keeping the saved UIDs"),
        }
        let (cgroup, mount) = mounted(&good.settings, &policy)?;
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
            cgroups: Vec::new(),
        })
    }

    /// The id of the cgroup to attach to; 0 where no program is attached anywhere.
    pub(crate) fn cgroup_id(&self) -> Result<u64, InputError> {
        match &self.cgroup {
            Some(cgroup) => host::directory_id(cgroup).ok_or(InputError::NoCgroup2),
            None => Ok(0),
        }
    }

    /// The cgroup to attach to, to be shown.
    pub(crate) fn cgroup_shown(&self) -> String {
        let shown = self.cgroup.as_ref().map(|cgroup| cgroup.display().to_string());
        shown.unwrap_or_else(|| "no cgroup".to_owned())
    }

    /// What it means.
    #[must_use]
    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// How and where it is enforced.
    #[must_use]
    pub(crate) fn settings(&self) -> &Settings {
        &self.config.settings
    }

    /// What is allowed, but probably not meant.
    #[must_use]
    pub(crate) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Why principals of a cgroup match nobody now, though it is nobody else's, and the first of them.
    pub(crate) fn why_nobody(&self, cgroup: &CgroupPath) -> Option<String> {
        let why = self.why_missing(cgroup)?;
        let named = self.cgroups.iter().find(|named| named.what == *cgroup);
        Some(named.map_or_else(|| why.clone(), |named| named.with(&why).to_string()))
    }

    fn why_missing(&self, cgroup: &CgroupPath) -> Option<String> {
        let mount = self.mount.display();
        match host::cgroup(&self.mount, cgroup) {
            Err(NoMatch::Missing) if cgroup.as_str().starts_with(USUAL_MOUNT) => Some(format!(
                "cgroup {cgroup} does not exist below {mount}: a cgroup's path starts at the root of the hierarchy; \
                 write it without {USUAL_MOUNT}; its principals match nobody until then"
            )),
            Err(NoMatch::Missing) => Some(format!(
                "cgroup {cgroup} does not exist below {mount}; its principals match nobody until it does"
            )),
            Err(NoMatch::Unplaced) => Some(format!(
                "the depth of cgroup {cgroup} is not known, as {mount} is only the root of a cgroup namespace; its \
                 principals match nobody; run enforcer in the host's cgroup namespace"
            )),
            Err(NoMatch::Writable(_)) | Ok(_) => None,
        }
    }

    /// What does not exist on this host yet, and matches nobody until it does: users, and cgroups.
    #[must_use]
    pub(crate) fn absent(&self) -> Vec<String> {
        let missing = self.cgroups.iter().filter_map(|named| {
            let why = self.why_missing(&named.what)?;
            Some(named.with(why).to_string())
        });
        self.absent.iter().cloned().chain(missing).collect()
    }
}

/// Whether a file that is not there is a mistake, and not the wish for the defaults, which the policy comes from: it
/// named targets that were active last (B1).
pub(crate) fn is_gone(policy: &Policy, good: Option<&LastGood>) -> bool {
    let named_still = |target: &Target| {
        let now = policy.target(&target.name);
        now.is_some_and(|now| target.name == BUS || target.endpoints.is_subset(&now.endpoints))
    };
    good.is_some_and(|good| !good.policy.targets.iter().all(named_still))
}

/// The cgroup to attach to, if something needs or has one, and where paths of cgroups start.
fn mounted(settings: &Settings, policy: &Policy) -> Result<(Option<PathBuf>, PathBuf), InputError> {
    let mount = host::cgroup2_mount().map_err(|error| InputError::Io {
        action: "read /proc/self/mountinfo",
        error,
    })?;
    let cgroup = settings.cgroup.clone().or_else(|| mount.clone());
    let needs_one = match settings.backend {
        Backend::Ebpf | Backend::Both => true,
        Backend::Nftables | Backend::Auto => !policy.cgroups().is_empty(),
    };
    if cgroup.is_none() && needs_one {
        return Err(InputError::NoCgroup2);
    }
    let mount = mount.or_else(|| cgroup.clone()).unwrap_or_else(|| USUAL_MOUNT.into());
    Ok((cgroup, mount))
}
