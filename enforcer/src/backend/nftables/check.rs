//! The verdict that a table as read from the kernel gives on an attempt. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use enforcer_ebpf::Verdict as Outcome;

use super::{
    Reading,
    endpoints::{Service, family_of, octets, service_key},
    expression::{Expression, meta},
    image::{Element, Image, chain},
    slot::Side,
};
use crate::{
    backend::{Checked, Lacking},
    policy::translated,
    ruleset::{Attempt, Subject},
    wire::PrincipalStatus,
};

/// Whom a target's chain returns for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Admitted {
    /// A user.
    User(u32),
    /// A user whose socket was made below a cgroup.
    Below(u32, u32, u64),
    /// Every user.
    Anybody,
    /// Every user whose socket was made below a cgroup.
    AnybodyBelow(u32, u64),
    /// Sockets without a file.
    Kernel,
}

impl Admitted {
    pub(super) fn shown(&self) -> PrincipalStatus {
        let (kernel, uid, cgroup_id) = match *self {
            Self::User(uid) => (false, Some(uid), None),
            Self::Below(uid, _, cgroup) => (false, Some(uid), Some(cgroup)),
            Self::Anybody => (false, None, None),
            Self::AnybodyBelow(_, cgroup) => (false, None, Some(cgroup)),
            Self::Kernel => (true, None, None),
        };
        PrincipalStatus {
            kernel,
            uid,
            cgroup_id,
            ..PrincipalStatus::default()
        }
    }
}

/// Runs the table's decision.
#[must_use]
pub(crate) fn check(reading: &Reading, attempt: &Attempt) -> Checked {
    decide(reading.image(), attempt)
}

pub(super) fn decide(image: &Image, attempt: &Attempt) -> Checked {
    let header = image.header();
    let class = class_of(image, attempt);
    let owners: Vec<(String, bool)> = class
        .map(|class| image.owners_of(class))
        .unwrap_or_default()
        .into_iter()
        .map(|target| {
            // No user can be told of what is forwarded.
            let admits = !attempt.foreign_netns && admits(&principals(image, target), &attempt.subject);
            (target.to_owned(), admits)
        })
        .collect();
    let owners_are_none = owners.is_empty();
    let is_reached = image.is_reached();
    let verdict = if owners.is_empty() || !is_reached {
        Outcome::Unjudged // D1
    } else if owners.iter().all(|(_, admits)| *admits) {
        Outcome::Allow // D2
    } else if header.is_some_and(|header| header.audit) {
        Outcome::WouldDeny
    } else {
        Outcome::Deny
    };
    Checked {
        verdict,
        generation: header.map_or(0, |header| header.generation),
        owners,
        subject: attempt.subject.clone(),
        without: (!is_reached && !owners_are_none).then_some(Lacking::Chain(chain::OUTPUT)),
    }
}

/// The chain of the class that the endpoint maps give a destination. An unspecified one has become loopback when its
/// packet leaves.
fn class_of<'i>(image: &'i Image, attempt: &Attempt) -> Option<&'i str> {
    let address = match attempt.address.to_canonical() {
        address if !address.is_unspecified() => address,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    if attempt.foreign_netns && (address.is_loopback() || !image.chains.contains_key(chain::FORWARD)) {
        return None; // D6, and forward = "allow"
    }
    let key = service_key(Service {
        protocol: attempt.protocol,
        port: attempt.port,
    });
    let services = image.elements(&image.slot().services(Side::Local));
    let service = services.iter().find(|service| service.key == key)?;
    let mut lookups = image.lookups(service);
    let hit = lookups.find(|lookup| {
        let address = match lookup.prefix {
            Some(prefix) => translated(&[prefix], address).map(IpAddr::V4), // D4
            None => Some(address).filter(|address| family_of(*address) == lookup.family),
        };
        address.is_some_and(|address| holds(lookup.addresses, &octets(address)))
    });
    Some(hit?.class)
}

/// Whether sorted addresses, single ones or ranges, hold one.
fn holds(addresses: &[Element], address: &[u8]) -> bool {
    let after = addresses.partition_point(|element| element.key.as_slice() <= address);
    let before = after.checked_sub(1).and_then(|index| addresses.get(index));
    before.is_some_and(|element| element.key == address || element.last.as_slice() >= address)
}

/// Whom a target's chain returns for, as its rules say.
pub(super) fn principals(image: &Image, target: &str) -> Vec<Admitted> {
    let mut found = Vec::new();
    let number = |bytes: &[u8]| bytes.first_chunk().map_or(u32::MAX, |bytes| u32::from_ne_bytes(*bytes));
    let rules = image
        .chains
        .get(&image.slot().target(target))
        .map_or(&[][..], |chain| &chain.rules);
    for rule in rules {
        match rule.expressions.as_slice() {
            [
                Expression::Meta { key: meta::SKUID, .. },
                Expression::Lookup { set, .. },
                Expression::Count(_),
                ..,
            ] if *set == image.slot().users(target) => {
                let users = image.sets.get(set).map_or(&[][..], |set| &set.elements);
                found.extend(users.iter().map(|element| Admitted::User(number(&element.key))));
            }
            [
                Expression::Meta { key: meta::SKUID, .. },
                Expression::Compare {
                    equal: true,
                    value: uid,
                },
                Expression::Cgroup { level },
                Expression::Compare { equal: true, value: id },
                Expression::Count(_),
                ..,
            ] => {
                let id = id.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
                found.push(Admitted::Below(number(uid), *level, id));
            }
            [
                Expression::Meta { key: meta::SKUID, .. },
                Expression::Cgroup { level },
                Expression::Lookup { set, .. },
                Expression::Count(_),
                ..,
            ] if *set == image.slot().cgroups(target, *level) => {
                let cgroups = image.sets.get(set).map_or(&[][..], |set| &set.elements);
                let id = |key: &[u8]| key.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
                found.extend(
                    cgroups
                        .iter()
                        .map(|element| Admitted::AnybodyBelow(*level, id(&element.key))),
                );
            }
            [Expression::Meta { key: meta::SKUID, .. }, Expression::Count(_), ..] => found.push(Admitted::Anybody),
            [Expression::Count(_), ..] => found.push(Admitted::Kernel),
            // A jump, or nothing of ours.
            _ => {}
        }
    }
    found
}

/// The socket's user decides, and the task's where the socket's is not told.
fn admits(principals: &[Admitted], subject: &Subject) -> bool {
    if subject.kernel_thread {
        return principals.contains(&Admitted::Kernel);
    }
    let user = subject.socket.unwrap_or(subject.task).0;
    let below = |level: u32, id| {
        let at = usize::try_from(level).ok().and_then(|level| subject.cgroups.get(level));
        at == Some(id)
    };
    principals.iter().any(|principal| match principal {
        Admitted::User(uid) => *uid == user,
        Admitted::Below(uid, level, id) => *uid == user && below(*level, id),
        Admitted::Anybody => true,
        Admitted::AnybodyBelow(level, id) => below(*level, id),
        Admitted::Kernel => false,
    })
}
