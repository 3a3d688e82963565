//! The last known good rules as JSON: canonical, without credentials, with the addresses of names and the UIDs of
//! users. Only users are looked up again when it is read (N9).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    config::Settings,
    policy::{Dns, Endpoint, Listed, Mode, Name, Nat64, Policy, Target},
    resolve::{Known, KnownName},
};

/// All that is needed to make a rule set active again.
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
    mode: Mode,
    settings: Settings,
    dns: Dns,
    /// Earlier versions did not know them.
    #[serde(default)]
    nat64: Vec<Nat64>,
    bosh: Option<PathBuf>,
    targets: BTreeMap<String, Target>,
    /// Earlier versions did not know them.
    #[serde(default)]
    listed: Vec<Listed>,
    names: BTreeMap<Name, NameContent>,
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

impl From<&LastGoodRef<'_>> for Content {
    fn from(good: &LastGoodRef<'_>) -> Self {
        let Policy {
            mode,
            dns,
            nat64,
            targets,
        } = good.policy.clone();
        let names = good.names.clone().into_iter();
        Self {
            mode,
            settings: good.settings.clone(),
            dns,
            nat64,
            bosh: good.bosh.map(Path::to_path_buf),
            targets: targets
                .into_iter()
                .map(|target| (target.name.clone(), target))
                .collect(),
            listed: good.listed.to_vec(),
            names: names.map(|(name, known)| (name, known.into())).collect(),
        }
    }
}

impl From<Content> for LastGood {
    fn from(content: Content) -> Self {
        let targets = content.targets.into_iter();
        let names = content.names.into_iter();
        Self {
            settings: content.settings,
            policy: Policy {
                mode: content.mode,
                dns: content.dns,
                nat64: content.nat64,
                targets: targets.map(|(name, target)| Target { name, ..target }).collect(),
            },
            listed: content.listed,
            names: names.map(|(name, known)| (name, known.into())).collect(),
            bosh: content.bosh,
        }
    }
}

impl From<KnownName> for NameContent {
    fn from(known: KnownName) -> Self {
        let answered = known.answered.into_iter();
        Self {
            current: known.current,
            left: known.left,
            answered: answered.map(|(address, time)| (address, time.as_secs())).collect(),
        }
    }
}

impl From<NameContent> for KnownName {
    fn from(known: NameContent) -> Self {
        let answered = known.answered.into_iter();
        let times = answered.map(|(address, seconds)| (address, Duration::from_secs(seconds)));
        Self {
            current: known.current,
            left: known.left,
            answered: times.collect(),
        }
    }
}
