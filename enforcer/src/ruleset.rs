//! Turns a policy, resolved names and this host's facts into the rule set, and explains verdicts from it. Pure: the
//! oracle of all tests.

mod places;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use enforcer_ebpf::{
    MAX_CGROUP_DEPTH, MAX_CGROUP_LEVELS, MAX_ENDPOINTS, MAX_PREFIXES, MAX_PRINCIPALS, MAX_TARGETS, Verdict,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::policy::{
    CgroupPath, Destination, Mode, Name, Nat64, Policy, Principal, Protocol, Uid, Unresolved, canonical, translated,
};

pub(crate) use self::places::covers;
pub use self::places::{contains, owners};

/// The addresses of each name; a name without any has never resolved.
pub type Resolved = BTreeMap<Name, BTreeSet<IpAddr>>;

/// What a rule set depends on besides policy and names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// What the kernel delivers here (D7).
    pub local: BTreeSet<IpNet>,
    /// The cgroups that exist now and are root's.
    pub cgroups: BTreeMap<CgroupPath, Cgroup>,
    /// The cgroups that exist now and are not root's alone, which match nobody (F6).
    pub writable: BTreeMap<CgroupPath, Writable>,
}

/// What other users than root can write of a cgroup or of an ancestor (F6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Writable {
    /// A cgroup, or a file in one, below the root of the hierarchy.
    pub at: PathBuf,
    /// Its owner.
    pub uid: u32,
    /// Its mode.
    pub mode: u32,
}

/// A cgroup as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cgroup {
    /// Its id: the inode number of its directory.
    pub id: u64,
    /// Its depth below the root, which has depth 0.
    pub level: u32,
}

/// An endpoint whose names are resolved. A single address is a prefix of full length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Transport.
    pub protocol: Protocol,
    /// Port in host byte order.
    pub port: u16,
    /// Canonical address or prefix.
    pub net: IpNet,
}

/// A principal whose users and cgroups are resolved.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RulePrincipal {
    /// A user, anywhere or below a cgroup.
    User {
        /// The user.
        uid: Uid,
        /// The cgroup below which the connecting task must be.
        cgroup: Option<(CgroupPath, Cgroup)>,
    },
    /// Every user below a cgroup.
    Anybody {
        /// The cgroup below which the connecting task must be.
        cgroup: (CgroupPath, Cgroup),
    },
    /// Kernel threads.
    Kernel,
}

/// A target's name and principals; its endpoints are in [`RuleSet::places`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleTarget {
    /// Its name.
    pub name: String,
    /// Whom it admits.
    pub principals: Vec<RulePrincipal>,
}

/// The complete compiled policy. A place's owners are a bit for each index of `targets`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSet {
    /// Enforce or audit.
    pub mode: Mode,
    /// At most [`MAX_TARGETS`].
    pub targets: Vec<RuleTarget>,
    /// Sorted; each place once, with the targets that name it. What covers it from elsewhere is not in its owners.
    pub places: Vec<(Place, u64)>,
    /// NAT64 prefixes, the well-known one first (D4).
    pub nat64: Vec<Nat64>,
    /// Ports of endpoints that are given by a name: a dial of one, elsewhere, has the name looked up (N8).
    pub named_ports: BTreeSet<u16>,
}

/// Why a policy does not compile; every message names the limit (F7).
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CompileError {
    /// More than [`MAX_TARGETS`].
    #[error("{found} targets are more than the maximum of {MAX_TARGETS}; merge targets that have the same allow list")]
    Targets {
        /// How many.
        found: usize,
    },
    /// More than [`MAX_ENDPOINTS`] single addresses, with what their ports need.
    #[error(
        "{found} endpoints and {ports} entries for their ports are more than the maximum of {MAX_ENDPOINTS}; name \
         prefixes instead of single addresses"
    )]
    Endpoints {
        /// How many single addresses.
        found: usize,
        /// How many entries for unspecified destinations.
        ports: usize,
    },
    /// More than [`MAX_PREFIXES`].
    #[error("{found} prefix endpoints are more than the maximum of {MAX_PREFIXES}; name wider prefixes")]
    Prefixes {
        /// How many.
        found: usize,
    },
    /// More than [`MAX_PRINCIPALS`].
    #[error("{found} principals are more than the maximum of {MAX_PRINCIPALS}; name fewer users or cgroups")]
    Principals {
        /// How many.
        found: usize,
    },
    /// A cgroup too deep.
    #[error(
        "cgroup {cgroup} lies {level} levels deep, more than the maximum of {MAX_CGROUP_DEPTH}; name an ancestor of it"
    )]
    Depth {
        /// Its path.
        cgroup: CgroupPath,
        /// Its depth.
        level: u32,
    },
    /// Cgroups of too many depths.
    #[error(
        "the cgroups that principals name lie at {found} different depths, more than the maximum of \
         {MAX_CGROUP_LEVELS}; name ancestors at fewer depths"
    )]
    Levels {
        /// How many.
        found: usize,
    },
}

/// Compiles a policy. A principal whose cgroup does not exist now, or is not root's alone, matches nobody.
pub fn compile(policy: &Policy, resolved: &Resolved, host: &Host) -> Result<RuleSet, CompileError> {
    if policy.targets.len() > MAX_TARGETS as usize {
        return Err(CompileError::Targets {
            found: policy.targets.len(),
        });
    }
    let mut nat64 = vec![Nat64::WELL_KNOWN];
    nat64.extend(&policy.nat64);
    let mut places = Vec::new();
    let mut targets = Vec::with_capacity(policy.targets.len());
    for (index, target) in policy.targets.iter().enumerate() {
        for endpoint in &target.endpoints {
            let named = matches!(endpoint.destination, Destination::Name(_));
            expand(&endpoint.destination, policy.dns.unresolved, resolved, host, |net| {
                let net = as_ipv4(&nat64, net, named);
                places.push((
                    Place {
                        protocol: endpoint.protocol,
                        port: endpoint.port.get(),
                        net,
                    },
                    1_u64 << index,
                ));
            });
        }
        let principals = target
            .principals
            .iter()
            .filter_map(|principal| principal_now(principal, host))
            .collect::<Vec<_>>();
        targets.push(RuleTarget {
            name: target.name.clone(),
            principals,
        });
    }
    places.sort_unstable();
    places.dedup_by(|later, kept| {
        let same = later.0 == kept.0;
        if same {
            kept.1 |= later.1;
        }
        same
    });
    let rules = RuleSet {
        mode: policy.mode,
        targets,
        places,
        nat64,
        named_ports: policy.names_by_port().into_keys().collect(),
    };
    check_limits(&rules)?;
    Ok(rules)
}

/// An attempt to open a connection, as a caller makes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Transport.
    pub protocol: Protocol,
    /// Destination as dialled.
    pub address: IpAddr,
    /// Port in host byte order.
    pub port: u16,
    /// Made in a network namespace other than the enforcer's.
    pub foreign_netns: bool,
    /// Who asks.
    pub subject: Subject,
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Real UID of the task.
    pub task: Uid,
    /// Owner of the socket, where the kernel can tell.
    pub socket: Option<Uid>,
    /// Whether the task is a kernel thread.
    pub kernel_thread: bool,
    /// Ids of the task's cgroup and all its ancestors, the root's first.
    pub cgroups: Vec<u64>,
}

/// A verdict with its reasons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What becomes of the attempt.
    pub verdict: Verdict,
    /// Each target that owns the endpoint, by index, and whether it admits the subject.
    pub owners: Vec<(usize, bool)>,
}

/// The verdict on an attempt, straight from the guarantees, without any of the kernel's short cuts.
#[must_use]
pub fn explain(rules: &RuleSet, attempt: &Attempt) -> Explanation {
    let address = canonical(attempt.address); // D4
    let owners_of = |address: IpAddr| {
        let there = |(place, _): &&(Place, u64)| {
            let owned = if address.is_unspecified() {
                !(attempt.foreign_netns && is_loopback(&place.net)) // D5
            } else {
                place.net.contains(&address) && !(attempt.foreign_netns && address.is_loopback()) // D6
            };
            owned && (place.protocol, place.port) == (attempt.protocol, attempt.port)
        };
        rules
            .places
            .iter()
            .filter(there)
            .fold(0, |owners, (_, bits)| owners | bits)
    };
    let owners = as_judged(rules, address, owners_of);
    weigh(rules, owners, &attempt.subject)
}

/// The owners of an address: of the IPv4 address that a NAT64 makes of it, and if that has none its own (D4).
fn as_judged(rules: &RuleSet, address: IpAddr, owners_of: impl Fn(IpAddr) -> u64) -> u64 {
    let translated = translated(&rules.nat64, address).map(|v4| owners_of(v4.into()));
    translated
        .filter(|owners| *owners != 0)
        .unwrap_or_else(|| owners_of(address))
}

/// An endpoint within a NAT64 prefix is one of IPv4 (D4). But for loopback, which no gateway translates to and which is
/// each network namespace's own (D6); and of a name but for what no name may bring (N6).
fn as_ipv4(prefixes: &[Nat64], net: IpNet, named: bool) -> IpNet {
    let refused = |v4: &Ipv4Addr| v4.is_link_local() || v4.is_multicast() || v4.is_broadcast();
    let embedded = translated(prefixes, net.addr())
        .filter(|v4| net.prefix_len() >= 96 && !v4.is_loopback() && !(named && refused(v4)));
    let v4 = embedded.and_then(|v4| Ipv4Net::new(v4, net.prefix_len() - 96).ok());
    v4.map_or(net, IpNet::V4)
}

/// The verdict where the owners of the destination are known, a bit for each target.
#[must_use]
pub fn weigh(rules: &RuleSet, owners: u64, subject: &Subject) -> Explanation {
    let owners: Vec<(usize, bool)> = rules
        .targets
        .iter()
        .enumerate()
        .filter(|(index, _)| owners >> index & 1 == 1)
        .map(|(index, target)| (index, target_admits(target, subject)))
        .collect();
    let verdict = match () {
        () if owners.is_empty() => Verdict::Unjudged,                     // D1
        () if owners.iter().all(|(_, admits)| *admits) => Verdict::Allow, // D2
        () if rules.mode == Mode::Audit => Verdict::WouldDeny,
        () => Verdict::Deny,
    };
    Explanation { verdict, owners }
}

/// Whether a prefix holds loopback addresses only (D6).
#[must_use]
pub fn is_loopback(net: &IpNet) -> bool {
    match net {
        IpNet::V4(net) => LOOPBACK4.contains(net),
        IpNet::V6(net) => net.prefix_len() == 128 && net.addr() == Ipv6Addr::LOCALHOST,
    }
}

/// D3: the kernel thread that it is, or both of its users. A kernel thread with a user's UID makes that user's call;
/// one with a user's socket makes a call of that user's too, which it may not make as the kernel.
fn target_admits(target: &RuleTarget, subject: &Subject) -> bool {
    if subject.kernel_thread && subject.task == Uid(0) {
        let root = subject.socket.is_none_or(|owner| owner == Uid(0));
        return root && target.principals.contains(&RulePrincipal::Kernel);
    }
    let admits = |user: Uid| {
        target.principals.iter().any(|principal| match principal {
            RulePrincipal::User { uid, cgroup: None } => *uid == user,
            RulePrincipal::User {
                uid,
                cgroup: Some((_, cgroup)),
            } => *uid == user && subject.cgroups.contains(&cgroup.id),
            RulePrincipal::Anybody { cgroup: (_, cgroup) } => subject.cgroups.contains(&cgroup.id),
            RulePrincipal::Kernel => false,
        })
    };
    admits(subject.task) && subject.socket.is_none_or(admits)
}

const LOOPBACK4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8);
const ALL4: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0));
const ALL6: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0));

/// Every prefix that a destination means now.
fn expand(
    destination: &Destination,
    unresolved: Unresolved,
    resolved: &Resolved,
    host: &Host,
    mut push: impl FnMut(IpNet),
) {
    match destination {
        Destination::Address(address) => push((*address).into()),
        Destination::Prefix(net) => push(*net),
        Destination::Local => {
            push(IpNet::V4(LOOPBACK4)); // D7
            push(IpAddr::V6(Ipv6Addr::LOCALHOST).into());
            host.local
                .iter()
                .filter(|net| !is_loopback(net))
                .for_each(|net| push(*net));
        }
        Destination::Name(name) => match resolved.get(name).filter(|addresses| !addresses.is_empty()) {
            Some(addresses) => addresses.iter().for_each(|address| push(canonical(*address).into())),
            None => match unresolved {
                Unresolved::Open => {} // N5
                Unresolved::Closed => {
                    push(ALL4);
                    push(ALL6);
                }
            },
        },
    }
}

/// A principal as it matches now; none where its cgroup does not exist or is not root's alone (F6).
fn principal_now(principal: &Principal, host: &Host) -> Option<RulePrincipal> {
    match principal {
        Principal::User { uid, cgroup: None } => Some(RulePrincipal::User {
            uid: *uid,
            cgroup: None,
        }),
        Principal::User {
            uid,
            cgroup: Some(path),
        } => {
            let cgroup = host.cgroups.get(path)?;
            Some(RulePrincipal::User {
                uid: *uid,
                cgroup: Some((path.clone(), *cgroup)),
            })
        }
        Principal::Anybody { cgroup: path } => {
            let cgroup = host.cgroups.get(path)?;
            Some(RulePrincipal::Anybody {
                cgroup: (path.clone(), *cgroup),
            })
        }
        Principal::Kernel => Some(RulePrincipal::Kernel),
    }
}

fn check_limits(rules: &RuleSet) -> Result<(), CompileError> {
    let singles = rules.places.iter().filter(|(place, _)| is_single(&place.net)).count();
    let prefixes = rules.places.len() - singles;
    // The kernel holds an entry of its own for every unspecified destination, as dialled here and from elsewhere (D5).
    let unspecified: BTreeSet<_> = rules
        .places
        .iter()
        .map(|(place, _)| (place.protocol, place.port, is_loopback(&place.net)))
        .collect();
    if singles + unspecified.len() > MAX_ENDPOINTS as usize {
        return Err(CompileError::Endpoints {
            found: singles,
            ports: unspecified.len(),
        });
    }
    if prefixes > MAX_PREFIXES as usize {
        return Err(CompileError::Prefixes { found: prefixes });
    }
    let principals: usize = rules.targets.iter().map(|target| target.principals.len()).sum();
    if principals > MAX_PRINCIPALS as usize {
        return Err(CompileError::Principals { found: principals });
    }
    let mut levels = BTreeSet::new();
    for principal in rules.targets.iter().flat_map(|target| &target.principals) {
        if let Some((path, Cgroup { level, .. })) = principal.cgroup() {
            if *level > MAX_CGROUP_DEPTH {
                return Err(CompileError::Depth {
                    cgroup: path.clone(),
                    level: *level,
                });
            }
            levels.insert(*level);
        }
    }
    if levels.len() > MAX_CGROUP_LEVELS as usize {
        return Err(CompileError::Levels { found: levels.len() });
    }
    Ok(())
}

impl fmt::Display for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, uid, mode } = self;
        write!(f, "{} is user {uid}'s with mode {mode:04o}", at.display())
    }
}

impl RulePrincipal {
    /// The cgroup below which the connecting task must be, if it must.
    #[must_use]
    pub fn cgroup(&self) -> Option<&(CgroupPath, Cgroup)> {
        match self {
            Self::User { cgroup, .. } => cgroup.as_ref(),
            Self::Anybody { cgroup } => Some(cgroup),
            Self::Kernel => None,
        }
    }
}

/// Whether a prefix is one address.
#[must_use]
pub fn is_single(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

#[cfg(test)]
mod tests;
