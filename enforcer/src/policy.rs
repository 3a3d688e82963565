//! What a configuration means: endpoints parsed, users resolved. Every value here is proof that it was parsed; nothing
//! is checked again later. Pure, but for `users.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU16,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

mod listed;
mod nat64;
mod parse;
mod text;
mod users;

use crate::wire::words;
pub use crate::wire::{Mode, Protocol};
pub use listed::Listed;
pub use nat64::{MAX_NAT64, Nat64, Nat64Error, translated};
pub use parse::{CgroupPathError, EndpointError, EndpointFault, MAX_CGROUP_PATH, NameError, shown};
pub(crate) use parse::{Server, is_bus_url, servers};
pub(crate) use text::Text;
pub use users::{Account, FileUsers, HostUsers, UserError, Users};

/// Most targets of one policy (F7): a rule set has one bit for each.
pub const MAX_TARGETS: usize = enforcer_ebpf::MAX_TARGETS as usize;

/// Most endpoints of one policy, those that several targets own counted for each (F7).
pub const MAX_ENDPOINTS: usize = enforcer_ebpf::MAX_ENDPOINTS as usize;

/// Most principals of one target (F7).
pub const MAX_TARGET_PRINCIPALS: usize = 1024;

/// The target that a BOSH agent's message bus is (B1).
pub const BUS: &str = "nats";
/// The target that monit's API is (B1).
pub const MONIT: &str = "monit";

/// Where monit listens for its API (B1).
pub const MONIT_PORT: NonZeroU16 = match NonZeroU16::new(2822) {
    Some(port) => port,
    None => NonZeroU16::MIN,
};

/// A user of the initial user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Uid(pub u32);

/// A DNS name, lower case, without a trailing dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(pub(crate) String);

/// Where an endpoint lies, addresses canonical (D4).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Destination {
    /// One address, never unspecified.
    Address(IpAddr),
    /// A prefix shorter than an address; an IPv6 prefix holds no IPv4 address (D4).
    Prefix(IpNet),
    /// Every address of this host (D7).
    Local,
    /// Whatever the name resolves to.
    Name(Name),
}

/// Protocol, place and port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// Transport.
    pub protocol: Protocol,
    /// Address, prefix, this host, or a name.
    pub destination: Destination,
    /// Port, never 0.
    pub port: NonZeroU16,
}

/// A cgroup as named in the configuration: absolute from the root of the cgroup v2 hierarchy, `/` alone or without a
/// trailing slash.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CgroupPath(pub(crate) String);

/// Who may connect.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub enum Principal {
    /// A user, anywhere or below a cgroup.
    User {
        /// The user.
        uid: Uid,
        /// Where the connecting task must be, if anywhere in particular.
        cgroup: Option<CgroupPath>,
    },
    /// Every user, but only below a cgroup: what a grant without a user is (B4). No configuration can say it.
    Anybody {
        /// Where the connecting task must be.
        cgroup: CgroupPath,
    },
    /// Kernel threads (D3).
    Kernel,
}

/// A named set of endpoints and the principals that may connect to them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// 1 to 48 of `[a-zA-Z0-9_-]`; in the saved state it is the key.
    #[serde(skip)]
    pub name: String,
    /// What is protected.
    pub endpoints: BTreeSet<Endpoint>,
    /// Empty means nobody.
    #[serde(rename = "allow")]
    pub principals: BTreeSet<Principal>,
    /// Whether others may be let in while it is active (B4).
    pub grants: bool,
    /// What DNS may answer for its names (N6).
    #[serde(default, with = "SavedAnswers")]
    pub answers: AcceptedAnswers,
}

words! {
    /// What DNS may answer for the names of a target (N6).
    #[derive(Default)]
    AcceptedAnswers {
        /// Neither link-local addresses nor any of those that nobody may.
        #[default]
        Routable = "routable",
        /// Link-local addresses too.
        LinkLocal = "link-local",
    }
}

/// As the saved state has always spelt them.
#[derive(Serialize, Deserialize)]
#[serde(remote = "AcceptedAnswers", rename_all = "lowercase")]
enum SavedAnswers {
    Routable,
    LinkLocal,
}

words! {
    /// What protects a name that never resolved (N5).
    Unresolved {
        /// Nothing.
        Open = "open",
        /// Its port on any address.
        Closed = "closed",
    }
}

/// How names are kept (N2, N4, N5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dns {
    /// Shortest time between two lookups of a name.
    pub min_refresh: Duration,
    /// Longest time between two lookups of a name.
    pub max_refresh: Duration,
    /// How long an address stays protected after it has left the answer.
    pub retain: Duration,
    /// Before a name has ever resolved.
    pub unresolved: Unresolved,
}

/// Everything asked for, users looked up, addresses canonical.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Enforce or audit.
    pub mode: Mode,
    /// How names are kept.
    pub dns: Dns,
    /// NAT64 prefixes besides the well-known one.
    pub nat64: Vec<Nat64>,
    /// Sorted by name, names unique.
    pub targets: Vec<Target>,
}

impl Policy {
    /// The names to resolve.
    #[must_use]
    pub fn names(&self) -> BTreeSet<Name> {
        self.targets
            .iter()
            .flat_map(|target| &target.endpoints)
            .filter_map(|endpoint| match &endpoint.destination {
                Destination::Name(name) => Some(name.clone()),
                Destination::Address(_) | Destination::Prefix(_) | Destination::Local => None,
            })
            .collect()
    }

    /// The names to resolve, and what DNS may answer for each: what some target of it lets it.
    #[must_use]
    pub fn asked(&self) -> BTreeMap<Name, AcceptedAnswers> {
        let mut asked = BTreeMap::new();
        for target in &self.targets {
            for endpoint in &target.endpoints {
                if let Destination::Name(name) = &endpoint.destination {
                    let most: &mut AcceptedAnswers = asked.entry(name.clone()).or_default();
                    *most = target.answers.max(*most);
                }
            }
        }
        asked
    }

    /// The names to resolve, by the ports of the endpoints that they are in.
    #[must_use]
    pub fn names_by_port(&self) -> BTreeMap<u16, BTreeSet<Name>> {
        let mut names: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for endpoint in self.targets.iter().flat_map(|target| &target.endpoints) {
            if let Destination::Name(name) = &endpoint.destination {
                names.entry(endpoint.port.get()).or_default().insert(name.clone());
            }
        }
        names
    }

    /// Whether some endpoint is this host, whatever its addresses (D7).
    #[must_use]
    pub fn has_local_endpoint(&self) -> bool {
        let mut endpoints = self.targets.iter().flat_map(|target| &target.endpoints);
        endpoints.any(|endpoint| endpoint.destination == Destination::Local)
    }

    /// The endpoints of the target that a BOSH agent's message bus is.
    #[must_use]
    pub fn bus(&self) -> Option<&BTreeSet<Endpoint>> {
        let bus = self.targets.iter().find(|target| target.name == BUS);
        bus.map(|bus| &bus.endpoints)
    }

    /// Replaces the endpoints of a BOSH agent's message bus (B1). True if that changes anything.
    pub fn set_bus(&mut self, endpoints: &BTreeSet<Endpoint>) -> bool {
        let bus = self.targets.iter_mut().find(|target| target.name == BUS);
        bus.is_some_and(|bus| {
            let changed = bus.endpoints != *endpoints;
            if changed {
                bus.endpoints.clone_from(endpoints);
            }
            changed
        })
    }

    /// The target of this name.
    #[must_use]
    pub fn target(&self, name: &str) -> Option<&Target> {
        self.targets.iter().find(|target| target.name == name)
    }

    /// How deep the cgroups lie that principals name, whether they exist now or not.
    #[must_use]
    pub fn depths(&self) -> BTreeSet<usize> {
        self.cgroups().iter().map(CgroupPath::depth).collect()
    }

    /// The cgroups that principals name.
    #[must_use]
    pub fn cgroups(&self) -> BTreeSet<CgroupPath> {
        self.targets
            .iter()
            .flat_map(|target| &target.principals)
            .filter_map(|principal| match principal {
                Principal::User { cgroup, .. } => cgroup.clone(),
                Principal::Anybody { cgroup } => Some(cgroup.clone()),
                Principal::Kernel => None,
            })
            .collect()
    }
}

/// The address an attempt is judged by (D4): IPv4-mapped IPv6 is IPv4, anything unspecified is `::`.
#[must_use]
pub fn canonical(address: IpAddr) -> IpAddr {
    let address = address.to_canonical();
    if address.is_unspecified() {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        address
    }
}

impl Default for Dns {
    /// N2, N4, N5.
    fn default() -> Self {
        Self {
            min_refresh: Duration::from_secs(5),
            max_refresh: Duration::from_mins(1),
            retain: Duration::from_hours(1),
            unresolved: Unresolved::Open,
        }
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
            Self::Prefix(IpNet::V4(net)) => net.fmt(f),
            Self::Prefix(IpNet::V6(net)) => write!(f, "[{net}]"),
            Self::Local => f.write_str("local"),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}:{}", self.protocol, self.destination, self.port)
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User { uid, cgroup: None } => write!(f, "user {uid}"),
            Self::User {
                uid,
                cgroup: Some(cgroup),
            } => write!(f, "user {uid} in {cgroup}"),
            Self::Anybody { cgroup } => write!(f, "anybody in {cgroup}"),
            Self::Kernel => f.write_str("kernel"),
        }
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Name {
    /// The name as looked up.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl CgroupPath {
    /// The path from the root of the hierarchy.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// How many cgroups lie between it and the root of the hierarchy, itself counted.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.0.split('/').filter(|part| !part.is_empty()).count()
    }
}
