//! `Config` → `Policy`: endpoints parsed, users looked up, limits kept. The first fault ends it (F4), but for users who do not exist yet (F8).

use std::{collections::BTreeSet, fmt, net::Ipv4Addr, num::NonZeroU16, path::PathBuf};

use thiserror::Error;

use super::{
    Account, Answers, CgroupPath, CgroupPathError, Destination, Endpoint, EndpointError, Listed, Policy, Principal,
    Protocol, Target, Uid, UserError, Users,
};
use crate::config::{self, Allow, Config, Line, User};

/// Most targets of one policy (F7): a rule set has one bit for each.
pub const MAX_TARGETS: usize = enforcer_ebpf::MAX_TARGETS as usize;

/// Most endpoints of one policy, those that several targets own counted for each (F7).
pub const MAX_ENDPOINTS: usize = enforcer_ebpf::MAX_ENDPOINTS as usize;

/// Most principals of one target (F7).
pub const MAX_PRINCIPALS: usize = 1024;

/// The target that a BOSH agent's message bus is (B1).
pub const BUS: &str = "nats";
/// The target that monit's API is (B1).
pub const MONIT: &str = "monit";

/// Where monit listens for its API (B1).
pub const MONIT_PORT: NonZeroU16 = match NonZeroU16::new(2822) {
    Some(port) => port,
    None => NonZeroU16::MIN,
};

/// A configuration that is well formed and means nothing we can do.
#[derive(Debug, Error)]
#[error("{}:{line}: target {target}: {fault}", path.display())]
pub struct PolicyError {
    /// The configuration file.
    pub path: PathBuf,
    /// Its line, from 1.
    pub line: usize,
    /// The target at fault.
    pub target: String,
    /// What is wrong.
    pub fault: PolicyFault,
}

/// What is wrong with a target.
#[derive(Debug, Error)]
pub enum PolicyFault {
    /// F7.
    #[error("there are {count} targets and the limit is {MAX_TARGETS}; merge those that allow the same users")]
    Targets {
        /// How many there are.
        count: usize,
    },
    /// F7.
    #[error("this is one endpoint more than the limit of {MAX_ENDPOINTS}; use prefixes")]
    Endpoints,
    /// F7.
    #[error("this is one principal more than the limit of {MAX_PRINCIPALS}; allow fewer")]
    Principals,
    /// An endpoint that is none.
    #[error(transparent)]
    Endpoint(EndpointError),
    /// A user that is none.
    #[error("{error}{}", unquoted(error))]
    User {
        /// Why not.
        #[from]
        error: UserError,
    },
    /// A cgroup path that is none.
    #[error("cgroup {path:?}: {fault}")]
    Cgroup {
        /// As configured.
        path: String,
        /// What is wrong with it.
        fault: CgroupPathError,
    },
}

/// What a configuration means on this host.
#[derive(Debug)]
pub struct Understood {
    /// What it asks for, as far as its users exist.
    pub policy: Policy,
    /// What is hardly meant.
    pub warnings: Vec<Warning>,
    /// Who is missing in it.
    pub absent: Vec<Absent>,
    /// The users and groups that its targets list.
    pub listed: Vec<Listed>,
}

/// A principal whose user does not exist, so that it matches nobody until he does (F8).
#[derive(Debug)]
pub struct Absent {
    /// The configuration file.
    pub path: PathBuf,
    /// Its line, from 1.
    pub line: usize,
    /// The target.
    pub target: String,
    /// Why nobody is meant.
    pub error: UserError,
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            path,
            line,
            target,
            error,
        } = self;
        let quotes = unquoted(error);
        write!(
            f,
            "{}:{line}: target {target}: {error}{quotes}; this principal matches nobody until then",
            path.display()
        )
    }
}

/// Something permitted that is hardly meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The configuration file.
    pub path: PathBuf,
    /// Its line, from 1.
    pub line: usize,
    /// The target.
    pub target: String,
    /// What is odd.
    pub kind: WarningKind,
}

/// What is odd about a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarningKind {
    /// It allows nobody.
    Nobody,
    /// It has no endpoints.
    Nothing,
}

impl Policy {
    /// What `config` asks for, its users looked up in `users`. Without one who does not exist; a look-up that fails is a fault.
    pub fn from_config(config: &Config, users: &dyn Users) -> Result<Understood, PolicyError> {
        let (mut warnings, mut absent, mut listed) = (Vec::new(), Vec::new(), Vec::new());
        let mut targets = Vec::with_capacity(config.targets.len());
        let mut room = MAX_ENDPOINTS;
        // By line, so that the one named is the one to look at.
        let mut by_line: Vec<_> = config.targets.iter().collect();
        by_line.sort_by_key(|(_, target)| target.line);
        for (index, (name, source)) in by_line.iter().enumerate() {
            let at = |line: usize, fault| PolicyError {
                path: config.path.clone(),
                line,
                target: (*name).clone(),
                fault,
            };
            if index == MAX_TARGETS {
                return Err(at(
                    source.line,
                    PolicyFault::Targets {
                        count: config.targets.len(),
                    },
                ));
            }
            let endpoints = endpoints(source, room).map_err(|fault| at(fault.line, fault.value))?;
            room = room.saturating_sub(endpoints.len());
            let meant = principals(name, source, users).map_err(|fault| at(fault.line, fault.value))?;
            listed.extend(meant.listed);
            absent.extend(meant.absent.into_iter().map(|Line { line, value }| Absent {
                path: config.path.clone(),
                line,
                target: (*name).clone(),
                error: value,
            }));
            let odd = [
                (source.allow.is_empty(), WarningKind::Nobody),
                (endpoints.is_empty(), WarningKind::Nothing),
            ];
            warnings.extend(odd.into_iter().filter(|(is, _)| *is).map(|(_, kind)| Warning {
                path: config.path.clone(),
                line: source.line,
                target: (*name).clone(),
                kind,
            }));
            targets.push(Target {
                name: (*name).clone(),
                endpoints,
                principals: meant.principals,
                grants: source.grants,
                answers: source.answers,
            });
        }
        if config.bosh.is_some() {
            targets.extend(
                bosh()
                    .into_iter()
                    .filter(|ours| !config.targets.contains_key(&ours.name)),
            );
        }
        targets.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Understood {
            policy: Self {
                mode: config.mode,
                dns: config.dns,
                nat64: config.nat64.clone(),
                targets,
            },
            warnings,
            absent,
            listed,
        })
    }
}

/// The targets of a BOSH agent's host, for root only (B1); [`Policy::set_bus`] completes `nats`.
fn bosh() -> [Target; 2] {
    let root = || {
        BTreeSet::from([Principal::User {
            uid: Uid(0),
            cgroup: None,
        }])
    };
    let monit = Endpoint {
        protocol: Protocol::Tcp,
        destination: Destination::Address(Ipv4Addr::LOCALHOST.into()),
        port: MONIT_PORT,
    };
    [
        Target {
            name: MONIT.to_owned(),
            endpoints: [monit].into(),
            principals: root(),
            grants: true,
            answers: Answers::Routable,
        },
        Target {
            name: BUS.to_owned(),
            endpoints: BTreeSet::new(),
            principals: root(),
            grants: false,
            answers: Answers::Routable,
        },
    ]
}

type Fault = Line<PolicyFault>;

fn endpoints(source: &config::Target, room: usize) -> Result<BTreeSet<Endpoint>, Fault> {
    let mut endpoints = BTreeSet::new();
    for text in &source.endpoints {
        let parsed =
            Endpoint::parse_all(text.value.expose()).map_err(|error| text.with(PolicyFault::Endpoint(error)))?;
        endpoints.extend(parsed);
        if endpoints.len() > room {
            return Err(text.with(PolicyFault::Endpoints));
        }
    }
    Ok(endpoints)
}

/// Whom a target lists.
#[derive(Default)]
struct Meant {
    principals: BTreeSet<Principal>,
    listed: Vec<Listed>,
    absent: Vec<Line<UserError>>,
}

fn principals(target: &str, source: &config::Target, users: &dyn Users) -> Result<Meant, Fault> {
    let mut all = Meant::default();
    for allow in &source.allow {
        match principal(target, &allow.value, users) {
            Ok(None) => all.principals.extend([Principal::Kernel]),
            Ok(Some(listed)) => {
                all.principals.extend(listed.principals(&listed.uids));
                all.listed.push(listed);
            }
            Err(PolicyFault::User {
                error: error @ (UserError::Unknown { .. } | UserError::UnknownGroup { .. }),
            }) => all.absent.push(allow.with(error)),
            Err(fault) => return Err(allow.with(fault)),
        }
        if all.principals.len() > MAX_PRINCIPALS {
            return Err(allow.with(PolicyFault::Principals));
        }
    }
    Ok(all)
}

/// None for the kernel.
fn principal(target: &str, allow: &Allow, users: &dyn Users) -> Result<Option<Listed>, PolicyFault> {
    let ((account, uids), cgroup) = match allow {
        Allow::User(name) => (user(name, users)?, None),
        Allow::Within { user: name, cgroup } => (user(name, users)?, Some(cgroup)),
        Allow::Group { group, cgroup } => (members(group, users)?, cgroup.as_ref()),
        Allow::Kernel => return Ok(None),
    };
    let parsed = |path: &String| {
        CgroupPath::parse(path).map_err(|fault| PolicyFault::Cgroup {
            path: path.clone(),
            fault,
        })
    };
    Ok(Some(Listed {
        target: target.to_owned(),
        account,
        cgroup: cgroup.map(parsed).transpose()?,
        uids,
    }))
}

/// What is to be looked up again, and who it is.
type Found = (Option<Account>, BTreeSet<Uid>);

fn members(group: &User, users: &dyn Users) -> Result<Found, UserError> {
    let group = match group {
        User::Name(name) => Account::Group(name.clone()),
        User::Number(gid) => Account::Gid(u32::try_from(*gid).map_err(|_| UserError::GroupNumber { gid: *gid })?),
    };
    Ok((Some(group.clone()), Uid::of_group(group, users)?))
}

fn user(user: &User, users: &dyn Users) -> Result<Found, UserError> {
    Ok(match user {
        User::Number(uid) => (None, BTreeSet::from([Uid::from_number(*uid)?])),
        User::Name(name) => (
            Some(Account::User(name.clone())),
            BTreeSet::from([Uid::of_name(name, users)?]),
        ),
    })
}

/// How a UID is written here.
fn unquoted(error: &UserError) -> &'static str {
    match error {
        UserError::Unknown { .. } | UserError::Lookup { .. } => " (a number without quotes)",
        UserError::Number { .. } | UserError::UnknownGroup { .. } | UserError::GroupNumber { .. } => "",
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: target {}: ", self.path.display(), self.line, self.target)?;
        f.write_str(match self.kind {
            WarningKind::Nobody => "allow is empty: nobody may connect",
            WarningKind::Nothing => "endpoints is empty: nothing is protected",
        })
    }
}
