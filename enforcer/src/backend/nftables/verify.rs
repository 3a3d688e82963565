//! Compares the whole table with what a rule set asks for. Changes nothing.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use super::{
    NftablesBackend, NftablesError, Reading,
    expression::TCP,
    failed,
    image::{self, Element, Image, Loader, SetKind, Value},
    netlink::{Dump, Netlink},
};
use crate::{config::Forward, ruleset::RuleSet, verify::Comparison, wire::Object};

impl NftablesBackend {
    /// Compares with a rule set; the number is that of the rule set found active.
    pub(crate) fn verify(&mut self, rules: &RuleSet, comparison: &mut Comparison) -> Result<u64, NftablesError> {
        let found = self.dump()?.unwrap_or_default();
        let told = found.image.header().map_or(0, |header| header.generation);
        let held = self.held.as_ref().and_then(|(image, _)| image.header());
        let number = held.map_or(told, |header| header.generation);
        compare(&self.lower(rules, number), &found, comparison);
        Ok(told)
    }
}

impl Reading {
    /// As [`NftablesBackend::verify`], by who only reads.
    pub(crate) fn verify(&self, rules: &RuleSet, forward: Forward, comparison: &mut Comparison) -> u64 {
        let header = self.0.image.header();
        let generation = header.map_or(0, |header| header.generation);
        // What the loader was is told by the table itself, but for the expression that a kernel may lack.
        let loader = |cgroups| Loader {
            daemon: header.is_some_and(|header| header.daemon),
            forward,
            log: header.and_then(|header| header.log),
            cgroups,
        };
        let lower = |cgroups| image::lower(rules, generation, loader(cgroups));
        let without = lower(false);
        let wanted = if without == self.0.image && !knows_cgroups() {
            without
        } else {
            lower(true)
        };
        compare(&wanted, &self.0, comparison);
        generation
    }
}

/// Whether this kernel tells a socket's cgroup.
fn knows_cgroups() -> bool {
    let table = format!("enforcer_trial_{}", std::process::id());
    let loader = Loader {
        daemon: false,
        forward: Forward::Refuse,
        log: None,
        cgroups: true,
    };
    let tried = Netlink::open().map_err(|error| failed(&table, "open a netlink socket", error));
    tried.is_ok_and(|mut netlink| {
        netlink
            .attempt(&table, &image::lower(&super::sample(), 0, loader))
            .is_ok()
    })
}

/// The first object of the table that is not as desired; none where it is desired whole.
pub(super) fn difference(wanted: &Image, found: &Dump) -> Option<Object> {
    let mut comparison = Comparison::default();
    compare(wanted, found, &mut comparison);
    comparison.first()
}

/// The one comparison: for what was just sent (F3), for what others may have changed (F5), and for `verify`.
fn compare(wanted: &Image, found: &Dump, comparison: &mut Comparison) {
    let state = if found.dormant { "dormant" } else { "active" };
    comparison.words(&Object::Table, "state", "active", state);
    let image = &found.image;
    comparison.names(
        &Object::Chains,
        wanted.chains.keys().map(String::as_str),
        image.chains.keys().map(String::as_str),
    );
    for (name, chain) in &wanted.chains {
        let Some(found) = image.chains.get(name) else { continue };
        let object = Object::Chain(name.clone());
        comparison.one(&object, || "hook".to_owned(), chain.base.as_ref(), found.base.as_ref());
        for index in 0..chain.rules.len().max(found.rules.len()) {
            comparison.one(
                &object,
                || format!("rule {}", index + 1),
                chain.rules.get(index),
                found.rules.get(index),
            );
        }
    }
    comparison.names(
        &Object::Sets,
        wanted.sets.keys().map(String::as_str),
        image.sets.keys().map(String::as_str),
    );
    for (name, set) in &wanted.sets {
        let Some(found) = image.sets.get(name) else { continue };
        let object = Object::Set(name.clone());
        comparison.one(&object, || "kind".to_owned(), Some(&set.kind), Some(&found.kind));
        if set.elements == found.elements {
            comparison.same(set.elements.len());
            continue;
        }
        comparison.entries(&object, entries(set), entries(found));
    }
    comparison.names(
        &Object::Counters,
        wanted.counters.iter().map(String::as_str),
        image.counters.iter().map(String::as_str),
    );
}

/// The elements of a set, by what they are.
fn entries(set: &image::Set) -> Vec<(Key<'_>, Entry<'_>)> {
    let key = |element| Key {
        element,
        kind: set.kind,
    };
    set.elements
        .iter()
        .map(|element| (key(element), Entry(key(element))))
        .collect()
}

/// The key of an element as a person reads it.
#[derive(Clone, Copy)]
struct Key<'a> {
    element: &'a Element,
    kind: SetKind,
}

impl Key<'_> {
    fn bytes(&self) -> (&[u8], &[u8]) {
        (&self.element.key, &self.element.last)
    }
}

impl PartialEq for Key<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for Key<'_> {}

impl PartialOrd for Key<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Key<'_> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.bytes().cmp(&other.bytes())
    }
}

impl fmt::Debug for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (key, last) = self.bytes();
        let range = |f: &mut fmt::Formatter<'_>| match (address(key), address(last)) {
            (first, None) => f.write_str(&first.unwrap_or_default()),
            (first, Some(last)) => write!(f, "{} to {last}", first.unwrap_or_default()),
        };
        match self.kind {
            SetKind::Users => write!(
                f,
                "user {}",
                key.first_chunk().map_or(0, |uid| u32::from_ne_bytes(*uid))
            ),
            SetKind::Cgroups => {
                let id = key.first_chunk().map_or(0, |id| u64::from_ne_bytes(*id));
                write!(f, "anybody in cgroup id {id}")
            }
            SetKind::Ports => write!(
                f,
                "port {}",
                key.first_chunk().map_or(0, |port| u16::from_be_bytes(*port))
            ),
            SetKind::Addresses { .. } => range(f),
            SetKind::Services => {
                let [protocol, _, _, _, high, low, _, _] = key.first_chunk().copied().unwrap_or_default();
                f.write_str(if protocol == TCP { "tcp" } else { "udp" })?;
                write!(f, " port {}", u16::from_be_bytes([high, low]))
            }
        }
    }
}

/// The address that a key is.
fn address(key: &[u8]) -> Option<String> {
    match key.len() {
        4 => key.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets).to_string()),
        16 => key
            .first_chunk::<16>()
            .map(|octets| Ipv6Addr::from(*octets).to_string()),
        _ => None,
    }
}

/// An element as a person reads it: where it leads, else what it is.
struct Entry<'a>(Key<'a>);

impl PartialEq for Entry<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.0.element == other.0.element
    }
}

impl fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.element.value {
            Value::Goto(chain) | Value::Jump(chain) => write!(f, "to chain {chain}"),
            Value::None => fmt::Debug::fmt(&self.0, f),
        }
    }
}
