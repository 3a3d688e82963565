//! `Config` → `Policy`: endpoints parsed, users looked up, limits kept. Any fault refuses it (F4), but for users who do
//! not exist yet (F8).

use std::{collections::BTreeSet, fmt, net::Ipv4Addr, path::PathBuf};

use thiserror::Error;

use super::{Allow, Config, Mistakes, NameOrId, TargetSection, contradictions::contradiction, mistakes::order};
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

impl<T> Remark<T> {
    /// Something else to be said of the same line.
    pub(crate) fn with<U>(&self, what: U) -> Remark<U> {
        Remark {
            path: self.path.clone(),
            line: self.line,
            target: self.target.clone(),
            what,
        }
    }
}

impl<T: fmt::Display> Remark<T> {
    /// Without the place.
    #[must_use]
    pub(crate) fn message(&self) -> String {
        format!("target {}: {}", self.target, self.what)
    }
}

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

impl PolicyFault {
    /// The key of the target's section that it is about.
    pub(super) fn key(&self) -> Option<&'static str> {
        match self {
            Self::Targets { .. } => None,
            Self::Endpoints | Self::Endpoint(_) => Some("endpoints"),
            Self::Principals | Self::User { .. } | Self::Cgroup { .. } => Some("allow"),
        }
    }
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
    /// Where it names cgroups.
    pub cgroups: Vec<Remark<CgroupPath>>,
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
        "nobody whom the targets allow may connect to {endpoint}: target {other} has it too, and allows nobody whom \
         this target allows; allow the same user in both"
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
    /// a mistake.
    pub fn from_config(config: &Config, users: &dyn Users) -> Result<Understood, Mistakes> {
        understand(config, Some(users))
    }
}

impl Config {
    /// What it means by its text alone: nobody is looked up, and whoever has a name is left out.
    pub fn without_users(&self) -> Result<Understood, Mistakes> {
        understand(self, None)
    }

    /// Whatever is wrong with the text of its targets.
    pub(super) fn mistakes(&self) -> Mistakes {
        self.without_users().err().unwrap_or_default()
    }
}

fn understand(config: &Config, users: Option<&dyn Users>) -> Result<Understood, Mistakes> {
    let mut meaning = Meaning {
        users,
        room: Some(MAX_ENDPOINTS),
        mistakes: Mistakes::default(),
        warnings: Vec::new(),
        absent: Vec::new(),
        cgroups: Vec::new(),
        listed: Vec::new(),
        unknown: BTreeSet::new(),
    };
    // By line, so that the one named is the one to look at.
    let mut by_line: Vec<_> = config.targets.iter().collect();
    by_line.sort_by_key(|(_, target)| order(&target.path, target.line));
    let mut targets = Vec::with_capacity(by_line.len());
    for (index, (name, source)) in by_line.into_iter().enumerate() {
        if index == MAX_TARGETS {
            let count = config.targets.len();
            meaning.refuse(name, source, source.line, PolicyFault::Targets { count });
        }
        targets.push(meaning.target(name, source));
    }
    if config.bosh.is_some() {
        targets.extend(
            bosh()
                .into_iter()
                .filter(|ours| !config.targets.contains_key(&ours.name)),
        );
    }
    let Meaning {
        mistakes,
        mut warnings,
        absent,
        cgroups,
        listed,
        unknown,
        ..
    } = meaning;
    if !mistakes.is_empty() {
        return Err(mistakes);
    }
    // Whoever is not known may be the one who passes.
    let known: Vec<&Target> = targets
        .iter()
        .filter(|target| !unknown.contains(&target.name))
        .collect();
    warnings.extend(contradictions(config, &known));
    targets.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Understood {
        policy: Policy {
            mode: config.mode,
            dns: config.dns,
            nat64: config.nat64.clone(),
            targets,
        },
        warnings,
        absent,
        cgroups,
        listed,
    })
}

/// What is found while targets are read.
struct Meaning<'a> {
    /// Where users are looked up; none where the text alone decides.
    users: Option<&'a dyn Users>,
    /// How many more endpoints there may be; none once there are too many.
    room: Option<usize>,
    mistakes: Mistakes,
    warnings: Vec<Warning>,
    absent: Vec<Absent>,
    cgroups: Vec<Remark<CgroupPath>>,
    listed: Vec<Listed>,
    /// Targets that allow somebody who is not known here.
    unknown: BTreeSet<String>,
}

impl Meaning<'_> {
    /// Nobody is looked up for what is refused: where a name service hangs, each lookup takes its time.
    fn refuse(&mut self, target: &str, source: &TargetSection, line: usize, fault: PolicyFault) {
        self.mistakes.add(remark(target, source, line, fault));
        self.users = None;
    }

    fn target(&mut self, name: &str, source: &TargetSection) -> Target {
        let endpoints = self.endpoints(name, source);
        let principals = self.principals(name, source);
        let odd = [
            (source.allow.is_empty(), WarningKind::Nobody),
            (endpoints.is_empty(), WarningKind::Nothing),
        ];
        let odd = odd.into_iter().filter(|(is, _)| *is);
        self.warnings
            .extend(odd.map(|(_, kind)| remark(name, source, source.line, kind)));
        Target {
            name: name.to_owned(),
            endpoints,
            principals,
            grants: source.grants,
            answers: source.answers,
        }
    }

    fn endpoints(&mut self, target: &str, source: &TargetSection) -> BTreeSet<Endpoint> {
        let mut endpoints = BTreeSet::new();
        for text in &source.endpoints {
            let Some(room) = self.room else { break };
            match Endpoint::parse_all(text.value.expose()) {
                Ok(parsed) => endpoints.extend(parsed),
                Err(error) => self.refuse(target, source, text.line, PolicyFault::Endpoint(error)),
            }
            if endpoints.len() > room {
                self.refuse(target, source, text.line, PolicyFault::Endpoints);
                self.room = None;
            }
        }
        self.room = self.room.map(|room| room.saturating_sub(endpoints.len()));
        endpoints
    }

    fn principals(&mut self, target: &str, source: &TargetSection) -> BTreeSet<Principal> {
        let mut principals = BTreeSet::new();
        for allow in &source.allow {
            match principal(target, &allow.value, self.users) {
                Ok(None) => principals.extend([Principal::Kernel]),
                Ok(Some(listed)) => {
                    principals.extend(listed.principals(&listed.uids));
                    if self.users.is_none() && listed.account.is_some() {
                        self.unknown.insert(target.to_owned());
                    }
                    if let Some(cgroup) = &listed.cgroup {
                        self.cgroups.push(remark(target, source, allow.line, cgroup.clone()));
                    }
                    self.listed.push(listed);
                }
                Err(PolicyFault::User {
                    error: error @ (UserError::Unknown { .. } | UserError::UnknownGroup { .. }),
                }) => {
                    self.absent.push(remark(target, source, allow.line, Nobody { error }));
                    self.unknown.insert(target.to_owned());
                }
                Err(fault) => self.refuse(target, source, allow.line, fault),
            }
            if principals.len() > MAX_TARGET_PRINCIPALS {
                self.refuse(target, source, allow.line, PolicyFault::Principals);
                break;
            }
        }
        principals
    }
}

/// For each pair of targets that nobody passes together, at the later of the two.
fn contradictions(config: &Config, targets: &[&Target]) -> Vec<Warning> {
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
            let source = config.targets.get(&later.name)?;
            Some(remark(&later.name, source, source.line, kind))
        })
        .collect()
}

fn remark<T>(target: &str, source: &TargetSection, line: usize, what: T) -> Remark<T> {
    Remark {
        path: source.path.clone(),
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

/// None for the kernel.
fn principal(target: &str, allow: &Allow, users: Option<&dyn Users>) -> Result<Option<Listed>, PolicyFault> {
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

fn members(group: &NameOrId, users: Option<&dyn Users>) -> Result<AccountUids, UserError> {
    let group = match group {
        NameOrId::Name(name) => Account::Group(name.clone()),
        NameOrId::Number(gid) => Account::Gid(u32::try_from(*gid).map_err(|_| UserError::GroupNumber { gid: *gid })?),
    };
    let uids = match users {
        Some(users) => Uid::of_group(group.clone(), users)?,
        None => BTreeSet::new(),
    };
    Ok((Some(group), uids))
}

fn user(user: &NameOrId, users: Option<&dyn Users>) -> Result<AccountUids, UserError> {
    Ok(match user {
        NameOrId::Number(uid) => (None, BTreeSet::from([Uid::from_number(*uid)?])),
        NameOrId::Name(name) => {
            let found = users.map(|users| Uid::of_name(name, users)).transpose()?;
            (Some(Account::User(name.clone())), found.into_iter().collect())
        }
    })
}

/// How a UID is written here.
fn unquoted(error: &UserError) -> &'static str {
    match error {
        UserError::Unknown { .. } | UserError::Lookup { .. } => " (a number without quotes)",
        UserError::Number { .. } | UserError::UnknownGroup { .. } | UserError::GroupNumber { .. } => "",
    }
}
