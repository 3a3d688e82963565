//! Compares all that is pinned, attached and active with what a rule set asks for. Changes nothing.

use std::{fmt, fs, io, os::unix::fs::MetadataExt as _};

use aya::maps::MapInfo;
use enforcer_ebpf::{Bucket, Generation, Owners, TargetName, flag, port};

use super::{
    BackendError, EbpfBackend,
    image::{self, Image, Loader},
    links::{self, HOOKS, Hook, LinkState},
    maps::Maps,
    maps_name,
    observe::{self, Pinned},
    pins::Pins,
    sys,
};
use crate::{ruleset::RuleSet, verify::Comparison, wire::Object};

impl EbpfBackend {
    /// Compares with a rule set; the number is that of the rule set found active.
    pub(crate) fn verify(&self, rules: &RuleSet, comparison: &mut Comparison) -> Result<u64, BackendError> {
        // What the target names should be is known by heart: the kernel's own may have been changed.
        let held = self.made_active.and_then(|(slot, number)| {
            let image = self.slots.get(usize::from(slot))?.as_ref()?;
            Some((image.names, number))
        });
        let wanted = match held {
            Some((names, number)) => Wanted {
                image: image::lower(rules, &names, self.loader),
                number: Some(number),
            },
            None => Wanted {
                image: image::lower(rules, &Image::empty().names, self.loader),
                number: None,
            },
        };
        let ours = |hook: &Hook, program: u32| Ok(self.programs.loaded(hook).is_some_and(|ours| ours.id == program));
        pinned_maps(&self.pins, &self.maps, comparison);
        compare(&self.maps, &self.pins, &wanted, self.cgroup_id, ours, comparison)
    }
}

impl Pinned {
    /// As [`EbpfBackend::verify`], by who only reads; the cgroup is the id of the one to be judged.
    pub(crate) fn verify(
        &self,
        rules: &RuleSet,
        cgroup: u64,
        comparison: &mut Comparison,
    ) -> Result<u64, BackendError> {
        let (maps, pins) = self.parts();
        let (names, found) = match maps.active_slot()? {
            Some(slot) => (maps.names(slot)?, maps.generation_of(slot)?),
            None => (Image::empty().names, Generation::default()),
        };
        let loader = Loader {
            netns: sys::netns_cookie().unwrap_or(0),
            // Whoever made it active may stay or not.
            daemon: found.flags & flag::DAEMON != 0,
            sees: super::load::Sight::here()?.sees(),
        };
        let wanted = Wanted {
            image: image::lower(rules, &names, loader),
            number: None,
        };
        let ids = maps.ids();
        let ours = |_: &Hook, program: u32| {
            let used = sys::program_maps(program)?;
            Ok(ids.iter().all(|map| used.contains(map)))
        };
        compare(maps, pins, &wanted, cgroup, ours, comparison)
    }
}

struct Wanted {
    image: Image,
    /// None where any will do.
    number: Option<u64>,
}

fn compare(
    maps: &Maps,
    pins: &Pins,
    wanted: &Wanted,
    cgroup: u64,
    ours: impl Fn(&Hook, u32) -> io::Result<bool>,
    comparison: &mut Comparison,
) -> Result<u64, BackendError> {
    let slot = maps.active_slot()?;
    let (found, number) = match slot {
        Some(slot) => (maps.read_slot(slot)?, maps.generation_of(slot)?.number),
        None => (Image::empty(), 0),
    };
    let on = if slot.is_some() {
        "a rule set is active"
    } else {
        "none is"
    };
    comparison.words(&Object::ActiveMap, "rule set", "a rule set is active", on);
    if let Some(wanted) = wanted.number {
        comparison.words(
            &Object::GenerationsMap,
            "number",
            &wanted.to_string(),
            &number.to_string(),
        );
    }
    let want = &wanted.image;
    if found == *want {
        comparison.same(want.ports.len() + want.endpoints.len() + want.prefixes.len() + want.principals.len());
    } else {
        entries(want, &found, comparison);
    }
    for (hook, state) in links::states(pins, want.has_udp(), Some(cgroup), ours) {
        let ours = LinkState::Ours.to_string();
        comparison.words(&Object::Link, hook.name, &ours, &state.to_string());
    }
    modes(pins, want.has_udp(), comparison)?;
    Ok(number)
}

/// Names every entry in which two images differ.
fn entries(want: &Image, found: &Image, comparison: &mut Comparison) {
    for (entry, wanted, found) in [
        ("flags", want.flags, found.flags),
        ("levels", want.levels, found.levels),
        ("netns", want.netns, found.netns),
    ] {
        comparison.words(
            &Object::GenerationsMap,
            entry,
            &format!("{wanted:#x}"),
            &format!("{found:#x}"),
        );
    }
    let ports = |image: &Image| -> Vec<(u16, Listed)> {
        let all = image.ports.iter();
        all.map(|(port, bits)| (u16::from_be(*port), Listed(*bits))).collect()
    };
    comparison.entries(&Object::PortsMap, ports(want), ports(found));
    comparison.words(
        &Object::Nat64Map,
        "prefixes",
        &format!("{:x?}", want.nat64),
        &format!("{:x?}", found.nat64),
    );
    let targets = |owners: Owners, image: &Image| -> Owning {
        let named = (0..).zip(&image.names).filter(|(bit, _)| owners >> bit & 1 == 1);
        let name = |(bit, name): (u32, &TargetName)| match name.as_str() {
            "" => format!("number {bit}"),
            name => name.to_owned(),
        };
        Owning(named.map(name).collect())
    };
    let buckets = |image: &Image| -> Vec<(u32, Held)> {
        let all = image.buckets.iter();
        all.map(|(number, bucket)| (*number, Held(*bucket, targets(bucket.owners, want))))
            .collect()
    };
    comparison.entries(&Object::BucketsMap, buckets(want), buckets(found));
    let endpoints = |image: &Image| -> Vec<(Endpoint, Owning)> {
        let exact = image
            .endpoints
            .iter()
            .map(|(key, owners)| (Endpoint::of(key, None), *owners));
        let prefixes = image
            .prefixes
            .iter()
            .map(|(key, owners)| (Endpoint::of(&key.key, Some(key.bits)), *owners));
        exact
            .chain(prefixes)
            .map(|(key, owners)| (key, targets(owners, want)))
            .collect()
    };
    comparison.entries(&Object::EndpointMaps, endpoints(want), endpoints(found));
    let principals = |image: &Image| -> Vec<_> {
        let all = image.principals.iter();
        all.map(|(key, owners)| (Allowed(key.kind, key.uid, key.cgroup, key.zero), targets(*owners, want)))
            .collect()
    };
    comparison.entries(&Object::PrincipalsMap, principals(want), principals(found));
    let at_hand = |image: &Image| -> Vec<_> {
        let few = image.few.users.iter().zip(image.few.admitting);
        (0_u32..)
            .zip(few.map(|(user, admitting)| InlineUser(*user, targets(admitting, want))))
            .collect()
    };
    comparison.entries(&Object::InlineUsers, at_hand(want), at_hand(found));
    let names = |image: &Image| -> Vec<(u32, String)> {
        (0..)
            .zip(image.names.iter().map(|name| name.as_str().to_owned()))
            .collect()
    };
    comparison.entries(&Object::TargetsMap, names(want), names(found));
}

/// Names, owners and modes of all that is pinned (F6).
fn modes(pins: &Pins, udp: bool, comparison: &mut Comparison) -> Result<(), BackendError> {
    let maps = maps_name();
    let mut wanted = vec![maps.as_str()];
    wanted.extend(HOOKS.iter().filter(|hook| udp || !hook.udp_only).map(|hook| hook.name));
    let names = pins.list()?;
    comparison.names(&Object::PinDirectory, wanted, names.iter().map(String::as_str));
    let below = |dir: &str| -> Vec<String> {
        let entries = fs::read_dir(pins.path(dir)).into_iter().flatten().flatten();
        entries
            .map(|entry| format!("{dir}/{}", entry.file_name().to_string_lossy()))
            .collect()
    };
    let mut all = vec![String::new()];
    all.extend(names.iter().cloned());
    all.extend(below(&maps));
    for name in all {
        let path = pins.path(&name);
        // What has gone meanwhile is missing by name.
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        let mode = if meta.is_dir() { "0700" } else { "0600" };
        comparison.words(
            &Object::Pin,
            &path.display().to_string(),
            &format!("user 0, mode {mode}"),
            &format!("user {}, mode {:04o}", meta.uid(), meta.mode() & 0o7777),
        );
    }
    Ok(())
}

/// Whether the pins are the maps that we hold: who starts next takes over what is pinned.
fn pinned_maps(pins: &Pins, maps: &Maps, comparison: &mut Comparison) {
    let dir = maps_name();
    for (name, map) in maps.all() {
        let id = map.id();
        let want = format!("map {id}");
        match MapInfo::from_pin(pins.path(&dir).join(name)).map_err(sys::cause) {
            Ok(info) => comparison.words(&Object::PinnedMap, name, &want, &format!("map {}", info.id())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                comparison.missing(&Object::PinnedMap, name, &want);
            }
            Err(error) => comparison.words(&Object::PinnedMap, name, &want, &error.to_string()),
        }
    }
}

/// Targets as a person reads them.
#[derive(PartialEq, Eq)]
struct Owning(Vec<String>);

impl fmt::Debug for Owning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [] => f.write_str("no target"),
            [one] => write!(f, "target {one}"),
            several => write!(f, "targets {}", several.join(", ")),
        }
    }
}

/// What there is on a port as a person reads it.
#[derive(PartialEq, Eq)]
struct Listed(u8);

impl fmt::Debug for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            (port::LISTED, "listed"),
            (port::WIDE, "prefixes"),
            (port::NAMED, "names"),
        ];
        let set = parts.iter().filter(|(bit, _)| self.0 & bit != 0);
        f.write_str(&set.map(|(_, name)| *name).collect::<Vec<_>>().join(", "))
    }
}

/// A bucket as a person reads it.
#[derive(PartialEq, Eq)]
struct Held(Bucket, Owning);

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(Bucket { filter, key, zero, .. }, owning) = self;
        write!(f, "filter {filter:#x}, {:?}, {owning:?}", Endpoint::of(key, None))?;
        match zero {
            0 => Ok(()),
            odd => write!(f, " (bytes {odd:#x} that are to be zero)"),
        }
    }
}

/// A principal as a person reads it: its kind, user and cgroup, and bytes that are zero.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Allowed(u8, u32, u64, u16);

impl fmt::Debug for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        observe::describe(self.0, self.1, self.2).fmt(f)?;
        match self.3 {
            0 => Ok(()),
            odd => write!(f, " (bytes {odd:#x} that are to be zero)"),
        }
    }
}

/// A user who lies in the generation itself.
#[derive(PartialEq, Eq)]
struct InlineUser(u32, Owning);

impl fmt::Debug for InlineUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "user {}, {:?}", self.0, self.1)
    }
}

/// A key as a person reads it.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Endpoint {
    key: enforcer_ebpf::EndpointKey,
    bits: Option<u32>,
}

impl Endpoint {
    fn of(key: &enforcer_ebpf::EndpointKey, bits: Option<u32>) -> Self {
        Self { key: *key, bits }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = &self.key;
        let protocol = match key.protocol {
            enforcer_ebpf::TCP => "tcp",
            enforcer_ebpf::UDP => "udp",
            _ => "unknown",
        };
        let bits = key
            .address
            .iter()
            .fold(0_u128, |bits, word| bits << 32 | u128::from(u32::from_be(*word)));
        let address = std::net::Ipv6Addr::from_bits(bits).to_canonical();
        write!(f, "{protocol} {address}")?;
        if let Some(bits) = self.bits {
            let length = bits.saturating_sub(enforcer_ebpf::KEY_BITS);
            write!(
                f,
                "/{}",
                if address.is_ipv4() {
                    length.saturating_sub(96)
                } else {
                    length
                }
            )?;
        }
        write!(f, " port {}", u16::from_be(key.port))?;
        if key.scope & enforcer_ebpf::scope::FOREIGN != 0 {
            f.write_str(" from other network namespaces")?;
        }
        Ok(())
    }
}
