//! The verdict that a table as read from the kernel gives on an attempt. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use enforcer_ebpf::Verdict as Outcome;

use super::{
    Reading,
    expression::{Expression, IPV4, IPV6, meta, prefix_of},
    image::{Image, Value, chain, endpoint_key},
};
use crate::{
    backend::{Checked, Lacking},
    policy::{Nat64, translated},
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
    let judge = image.chains.get(&image.slot().judge());
    let rules = judge.map_or(&[][..], |judge| &judge.rules);
    let prefixes: Vec<Nat64> = rules
        .iter()
        .filter_map(|rule| prefix_of(&rule.expressions))
        .map(Nat64::from_bytes)
        .collect();
    let translated = translated(&prefixes, address).and_then(|v4| class_at(image, attempt, v4.into()));
    translated.or_else(|| class_at(image, attempt, address)) // D4
}

fn class_at<'i>(image: &'i Image, attempt: &Attempt, address: IpAddr) -> Option<&'i str> {
    let key = endpoint_key(address, attempt.protocol, attempt.port);
    let [single, ranges] = image.slot().endpoints(if address.is_ipv4() { IPV4 } else { IPV6 });
    let elements = |name: &String| image.sets.get(name).map_or(&[][..], |set| &set.elements);
    let found = elements(&single)
        .binary_search_by(|element| element.key.cmp(&key))
        .ok()
        .and_then(|index| elements(&single).get(index));
    let length = key.len() - 8;
    let within = |element: &&super::image::Element| {
        let (Some((first, rest)), Some((last, _)), Some((at, of))) = (
            element.key.split_at_checked(length),
            element.last.split_at_checked(length),
            key.split_at_checked(length),
        ) else {
            return false;
        };
        rest == of && (first..=last).contains(&at)
    };
    match &found.or_else(|| elements(&ranges).iter().find(within))?.value {
        Value::Goto(class) => Some(class),
        Value::None => None,
    }
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
