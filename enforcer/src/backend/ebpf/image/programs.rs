//! The kernel programs as compiled, and what their maps hold for a rule set, both as bytes: for those who run the
//! programs outside the kernel.

use enforcer_ebpf::gate;
use zerocopy::{Immutable, IntoBytes};

use super::{super::load::PROGRAMS, Image, KernelVisibility, Loader, lower};
use crate::ruleset::RuleSet;

/// An entry of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The map, by its name in the object.
    pub map: &'static str,
    /// Its key.
    pub key: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
}

impl Entry {
    fn new<K: IntoBytes + Immutable, V: IntoBytes + Immutable>(map: &'static str, key: &K, value: &V) -> Self {
        Self {
            map,
            key: key.as_bytes().to_vec(),
            value: value.as_bytes().to_vec(),
        }
    }
}

/// The object, for the BPF target.
#[must_use]
pub fn object() -> &'static [u8] {
    PROGRAMS
}

/// All entries of a rule set that is active in slot 0, as the loader writes them where the kernel lets the programs see
/// everything; `netns` is the cookie of the loader's network namespace.
#[must_use]
pub fn entries(rules: &RuleSet, netns: u64) -> Vec<Entry> {
    let sees = KernelVisibility {
        tcp_owner: true,
        other_owner: true,
        threads: true,
    };
    let loader = Loader {
        netns,
        daemon: true,
        sees,
    };
    let empty = Image::empty();
    let image = lower(rules, &empty.names, loader);
    let mut entries = vec![
        Entry::new("active", &0_u32, &1_u8),
        Entry::new("generations", &0_u32, &image.generation(1)),
    ];
    let ports = image.ports.iter();
    entries.extend(ports.map(|(port, listed)| Entry::new("ports", &u32::from(*port), listed)));
    let buckets = image.buckets.iter();
    entries.extend(buckets.map(|(number, bucket)| Entry::new("buckets", number, bucket)));
    let endpoints = image.endpoints.iter();
    entries.extend(endpoints.map(|(key, owners)| Entry::new("endpoints", key, owners)));
    let prefixes = image.prefixes.iter();
    entries.extend(prefixes.map(|(key, owners)| Entry::new("prefixes", key, owners)));
    let principals = image.principals.iter();
    entries.extend(principals.map(|(key, owners)| Entry::new("principals", key, owners)));
    let names = (0_u32..).zip(&image.names);
    entries.extend(names.map(|(bit, name)| Entry::new("targets", &bit, name)));
    let nat64 = (0_u32..).zip(&image.nat64);
    entries.extend(nat64.map(|(number, prefix)| Entry::new("nat64", &number, prefix)));
    entries
}

/// The entry by which the next dial of a port is reported, at an address that is no endpoint (N8).
#[must_use]
pub fn open_gate(port: u16) -> Entry {
    Entry::new("gates", &u32::from(port.to_be()), &gate::OPEN)
}
