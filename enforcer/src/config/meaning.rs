//! `Config` → `Policy`: endpoints parsed, users looked up, limits kept. The first fault ends it (F4), but for users who
//! do not exist yet (F8).

use std::{collections::BTreeSet, net::Ipv4Addr, path::PathBuf};

use thiserror::Error;

use super::{Allow, Config, Located, NameOrId, contradictions::contradiction};
use crate::policy::{
    AcceptedAnswers, Account, BUS, CgroupPath, CgroupPathError, Destination, Endpoint, EndpointError, Listed,
    MAX_ENDPOINTS, MAX_TARGET_PRINCIPALS, MAX_TARGETS, MONIT, MONIT_PORT, Policy, Principal, Protocol, Target, Uid,
    UserError, Users,
};

#[cfg(test)]
mod tests;

/// What is to be said of a target.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{}:{line}: target {target}: {what}", path.display())]
pub struct Remark<T> {
    /// The configuration file.
    pub path: PathBuf,
    /// Its line, from 1.
    pub line: usize,
    /// The target.
    pub target: String,
    /// What there is.
    pub what: T,
}

/// A configuration that is well formed and means nothing we can do.
pub type PolicyError = Remark<PolicyFault>;

/// A principal whose user does not exist, so that it matches nobody until he does (F8).
pub type Absent = Remark<Nobody>;

/// Something permitted that is hardly meant.
pub type Warning = Remark<WarningKind>;

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
    #[error("this is one principal more than the limit of {MAX_TARGET_PRINCIPALS}; allow fewer")]
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

/// Why nobody is meant.
#[derive(Debug, Error)]
#[error("{error}{}; this principal matches nobody until it exists", unquoted(error))]
pub struct Nobody {
    /// Why.
    error: UserError,
}

/// What is odd about a target.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WarningKind {
    /// It allows nobody.
    #[error("allow is empty: nobody may connect")]
    Nobody,
    /// It has no endpoints.
    #[error("endpoints is empty: nothing is protected")]
    Nothing,
    /// Another target has the same endpoint, and nobody passes both.
    #[error(
        "nobody may connect to {endpoint}: target {other} has it too, and allows nobody whom this target allows; allow \
         the same user in both"
    )]
    Contradiction {
        /// What both have.
        endpoint: Endpoint,
        /// The other target.
        other: String,
    },
}

impl Policy {
    /// What `config` asks for, its users looked up in `users`. Without one who does not exist; a lookup that fails is
    /// a fault.
    pub fn from_config(config: &Config, users: &dyn Users) -> Result<Understood, PolicyError> {
        let (mut warnings, mut absent, mut listed) = (Vec::new(), Vec::new(), Vec::new());
        let mut targets = Vec::with_capacity(config.targets.len());
        let mut room = MAX_ENDPOINTS;
        // By line, so that the one named is the one to look at.
        let mut by_line: Vec<_> = config.targets.iter().collect();
        by_line.sort_by_key(|(_, target)| target.line);
        for (index, (name, source)) in by_line.into_iter().enumerate() {
            if index == MAX_TARGETS {
                let count = config.targets.len();
                return Err(remark(config, name, source.line, PolicyFault::Targets { count }));
            }
            let refused = |fault: Fault| remark(config, name, fault.line, fault.value);
            let endpoints = endpoints(source, room).map_err(refused)?;
            room = room.saturating_sub(endpoints.len());
            let meant = principals(name, source, users).map_err(refused)?;
            listed.extend(meant.listed);
            let missing = meant.absent.into_iter();
            absent.extend(missing.map(|missing| remark(config, name, missing.line, Nobody { error: missing.value })));
            let odd = [
                (source.allow.is_empty(), WarningKind::Nobody),
                (endpoints.is_empty(), WarningKind::Nothing),
            ];
            let odd = odd.into_iter().filter(|(is, _)| *is);
            warnings.extend(odd.map(|(_, kind)| remark(config, name, source.line, kind)));
            targets.push(Target {
                name: name.clone(),
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
        warnings.extend(contradictions(config, &targets));
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

/// For each pair of targets that nobody passes together, at the later of the two.
fn contradictions(config: &Config, targets: &[Target]) -> Vec<Warning> {
    let pairs = targets.iter().enumerate().flat_map(|(index, later)| {
        let earlier = targets.get(..index).unwrap_or_default();
        earlier.iter().map(move |earlier| (earlier, later))
    });
    pairs
        .filter_map(|(earlier, later)| {
            let kind = WarningKind::Contradiction {
                endpoint: contradiction(earlier, later)?,
                other: earlier.name.clone(),
            };
            let line = config.targets.get(&later.name)?.line;
            Some(remark(config, &later.name, line, kind))
        })
        .collect()
}

fn remark<T>(config: &Config, target: &str, line: usize, what: T) -> Remark<T> {
    Remark {
        path: config.path.clone(),
        line,
        target: target.to_owned(),
        what,
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
            answers: AcceptedAnswers::Routable,
        },
        Target {
            name: BUS.to_owned(),
            endpoints: BTreeSet::new(),
            principals: root(),
            grants: false,
            answers: AcceptedAnswers::Routable,
        },
    ]
}

type Fault = Located<PolicyFault>;

fn endpoints(source: &super::TargetSection, room: usize) -> Result<BTreeSet<Endpoint>, Fault> {
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
    absent: Vec<Located<UserError>>,
}

fn principals(target: &str, source: &super::TargetSection, users: &dyn Users) -> Result<Meant, Fault> {
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
        if all.principals.len() > MAX_TARGET_PRINCIPALS {
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
type AccountUids = (Option<Account>, BTreeSet<Uid>);

fn members(group: &NameOrId, users: &dyn Users) -> Result<AccountUids, UserError> {
    let group = match group {
        NameOrId::Name(name) => Account::Group(name.clone()),
        NameOrId::Number(gid) => Account::Gid(u32::try_from(*gid).map_err(|_| UserError::GroupNumber { gid: *gid })?),
    };
    Ok((Some(group.clone()), Uid::of_group(group, users)?))
}

fn user(user: &NameOrId, users: &dyn Users) -> Result<AccountUids, UserError> {
    Ok(match user {
        NameOrId::Number(uid) => (None, BTreeSet::from([Uid::from_number(*uid)?])),
        NameOrId::Name(name) => (
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
