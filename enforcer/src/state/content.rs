//! A rule set known good as JSON: canonical, without credentials, with nothing left to look up.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    config::{Backend, Existing, Forward, Settings},
    policy::{
        Account, Answers, CgroupPath, Dns, Endpoint, Listed, Mode, Name, Policy, Principal, Target, Uid, Unresolved,
    },
    resolve::{Known, KnownName},
};

/// All that is needed to put a rule set in force again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LastGood {
    /// How and where it was enforced.
    pub settings: Settings,
    /// What was asked for.
    pub policy: Policy,
    /// The users and groups that its targets list.
    pub listed: Vec<Listed>,
    /// What names resolved to.
    pub names: Known,
    /// Where the settings lie that named the message bus, if any did (B2).
    pub bosh: Option<PathBuf>,
}

impl LastGood {
    /// The message bus, where an agent's settings named one.
    #[must_use]
    pub(crate) fn bus(&self) -> Option<&BTreeSet<Endpoint>> {
        self.bosh.as_ref().and(self.policy.bus()).filter(|bus| !bus.is_empty())
    }
}

/// As [`LastGood`], of somebody else's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LastGoodRef<'a> {
    /// How and where it is enforced.
    pub settings: &'a Settings,
    /// What is asked for.
    pub policy: &'a Policy,
    /// The users and groups that its targets list.
    pub listed: &'a [Listed],
    /// What names resolve to.
    pub names: &'a Known,
    /// Where the settings lie that name the message bus, if any do.
    pub bosh: Option<&'a Path>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Content {
    #[serde(with = "ModeContent")]
    mode: Mode,
    #[serde(with = "SettingsContent")]
    settings: Settings,
    #[serde(with = "DnsContent")]
    dns: Dns,
    /// Earlier versions did not know them.
    #[serde(default)]
    nat64: Vec<String>,
    bosh: Option<PathBuf>,
    targets: BTreeMap<String, TargetContent>,
    /// Earlier versions did not know them.
    #[serde(default)]
    listed: Vec<ListedContent>,
    names: BTreeMap<String, NameContent>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetContent {
    endpoints: Vec<String>,
    allow: Vec<PrincipalContent>,
    grants: bool,
    /// Earlier versions did not know it.
    #[serde(default, with = "AnswersContent")]
    answers: Answers,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Answers", rename_all = "lowercase")]
enum AnswersContent {
    Routable,
    LinkLocal,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
enum PrincipalContent {
    User { uid: u32, cgroup: Option<String> },
    Anybody { cgroup: String },
    Kernel,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListedContent {
    target: String,
    account: Option<AccountContent>,
    cgroup: Option<String>,
    uids: BTreeSet<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum AccountContent {
    User(String),
    Group(String),
    Gid(u32),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NameContent {
    current: BTreeSet<IpAddr>,
    left: BTreeSet<IpAddr>,
    /// Seconds; earlier versions did not know them.
    #[serde(default)]
    answered: BTreeMap<IpAddr, u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Mode", rename_all = "lowercase")]
enum ModeContent {
    Enforce,
    Audit,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Settings", deny_unknown_fields)]
struct SettingsContent {
    #[serde(with = "BackendContent")]
    backend: Backend,
    #[serde(with = "ExistingContent")]
    existing: Existing,
    cgroup: Option<PathBuf>,
    #[serde(with = "ForwardContent")]
    forward: Forward,
    pin_dir: PathBuf,
    state_dir: PathBuf,
    socket: PathBuf,
    nft_table: String,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Backend", rename_all = "lowercase")]
enum BackendContent {
    Auto,
    Ebpf,
    Nftables,
    Both,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Existing", rename_all = "lowercase")]
enum ExistingContent {
    Report,
    Cut,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Forward", rename_all = "lowercase")]
enum ForwardContent {
    Refuse,
    Allow,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Dns", deny_unknown_fields)]
struct DnsContent {
    min_refresh: Duration,
    max_refresh: Duration,
    retain: Duration,
    #[serde(with = "UnresolvedContent")]
    unresolved: Unresolved,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Unresolved", rename_all = "lowercase")]
enum UnresolvedContent {
    Open,
    Closed,
}

impl From<&LastGoodRef<'_>> for Content {
    fn from(good: &LastGoodRef<'_>) -> Self {
        let Policy {
            mode,
            dns,
            nat64,
            targets,
        } = good.policy;
        let target = |target: &Target| {
            let endpoints = target.endpoints.iter().map(ToString::to_string).collect();
            let allow = target.principals.iter().map(PrincipalContent::from).collect();
            let (grants, answers) = (target.grants, target.answers);
            let content = TargetContent {
                endpoints,
                allow,
                grants,
                answers,
            };
            (target.name.clone(), content)
        };
        let name = |(name, known): (&Name, &KnownName)| {
            let KnownName {
                current,
                left,
                answered,
            } = known.clone();
            let seconds = answered.into_iter().map(|(address, time)| (address, time.as_secs()));
            let content = NameContent {
                current,
                left,
                answered: seconds.collect(),
            };
            (name.to_string(), content)
        };
        Self {
            mode: *mode,
            settings: good.settings.clone(),
            dns: *dns,
            nat64: nat64.iter().map(ToString::to_string).collect(),
            bosh: good.bosh.map(Path::to_path_buf),
            targets: targets.iter().map(target).collect(),
            listed: good.listed.iter().map(ListedContent::from).collect(),
            names: good.names.iter().map(name).collect(),
        }
    }
}

impl From<&Listed> for ListedContent {
    fn from(listed: &Listed) -> Self {
        let account = |account: &Account| match account {
            Account::User(name) => AccountContent::User(name.clone()),
            Account::Group(name) => AccountContent::Group(name.clone()),
            Account::Gid(gid) => AccountContent::Gid(*gid),
        };
        Self {
            target: listed.target.clone(),
            account: listed.account.as_ref().map(account),
            cgroup: listed.cgroup.as_ref().map(ToString::to_string),
            uids: listed.uids.iter().map(|uid| uid.0).collect(),
        }
    }
}

impl From<&Principal> for PrincipalContent {
    fn from(principal: &Principal) -> Self {
        match principal {
            Principal::User { uid, cgroup } => Self::User {
                uid: uid.0,
                cgroup: cgroup.as_ref().map(ToString::to_string),
            },
            Principal::Anybody { cgroup } => Self::Anybody {
                cgroup: cgroup.to_string(),
            },
            Principal::Kernel => Self::Kernel,
        }
    }
}

impl TryFrom<Content> for LastGood {
    type Error = String;

    fn try_from(content: Content) -> Result<Self, String> {
        let names = content.names.into_iter().map(|(name, known)| {
            let seconds = known.answered.into_iter();
            let answered = seconds.map(|(address, seconds)| (address, Duration::from_secs(seconds)));
            let known = KnownName {
                current: known.current,
                left: known.left,
                answered: answered.collect(),
            };
            Ok((parsed(&name, Name::parse)?, known))
        });
        let names = names.collect::<Result<_, String>>()?;
        let targets = content.targets.into_iter().map(|(name, target)| {
            let endpoints = target.endpoints.iter().map(|text| parsed(text, Endpoint::parse));
            Ok(Target {
                endpoints: endpoints.collect::<Result<_, String>>()?,
                principals: target.allow.iter().map(principal).collect::<Result<_, String>>()?,
                grants: target.grants,
                answers: target.answers,
                name,
            })
        });
        Ok(Self {
            settings: content.settings,
            policy: Policy {
                mode: content.mode,
                dns: content.dns,
                nat64: content
                    .nat64
                    .iter()
                    .map(|text| parsed(text, str::parse))
                    .collect::<Result<_, String>>()?,
                targets: targets.collect::<Result<_, String>>()?,
            },
            listed: content.listed.into_iter().map(listed).collect::<Result<_, String>>()?,
            names,
            bosh: content.bosh,
        })
    }
}

fn principal(content: &PrincipalContent) -> Result<Principal, String> {
    Ok(match content {
        PrincipalContent::User { uid, cgroup } => Principal::User {
            uid: Uid(*uid),
            cgroup: within(cgroup.as_deref())?,
        },
        PrincipalContent::Anybody { cgroup } => Principal::Anybody {
            cgroup: parsed(cgroup, CgroupPath::parse)?,
        },
        PrincipalContent::Kernel => Principal::Kernel,
    })
}

fn listed(content: ListedContent) -> Result<Listed, String> {
    let account = |account| match account {
        AccountContent::User(name) => Account::User(name),
        AccountContent::Group(name) => Account::Group(name),
        AccountContent::Gid(gid) => Account::Gid(gid),
    };
    Ok(Listed {
        target: content.target,
        account: content.account.map(account),
        cgroup: within(content.cgroup.as_deref())?,
        uids: content.uids.into_iter().map(Uid).collect(),
    })
}

fn within(cgroup: Option<&str>) -> Result<Option<CgroupPath>, String> {
    cgroup.map(|path| parsed(path, CgroupPath::parse)).transpose()
}

fn parsed<T, E: ToString>(text: &str, parse: impl FnOnce(&str) -> Result<T, E>) -> Result<T, String> {
    parse(text).map_err(|error| error.to_string())
}
