//! Lowers a rule set to the map entries of one slot. Pure.

pub mod programs;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use enforcer_ebpf::{
    Bucket, EndpointKey, Few, Generation, KEY_BITS, MAX_NAT64, MAX_TARGET_NAME, MAX_TARGETS, Nat64, Owners, PrefixKey,
    PrincipalKey, Spot, TCP, TargetName, UDP, canonical4, canonical6, flag, is_unspecified, kind, port, scope,
};
use ipnet::IpNet;

use crate::{
    policy::{self, Mode, Protocol},
    ruleset::{Place, RulePrincipal, RuleSet, is_loopback, is_single},
};

/// Names by bit of [`Owners`].
pub(crate) type TargetNames = [TargetName; MAX_TARGETS as usize];

/// What one slot of the maps holds; keys are those of slot 0, each list sorted by key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    /// Bits of [`flag`].
    pub flags: u64,
    /// Depths of the cgroups that principals name, as [`enforcer_ebpf::Generation`] has them.
    pub levels: u64,
    /// Cookie of the network namespace of loopback endpoints.
    pub netns: u64,
    /// The first users that are admitted anywhere.
    pub few: Few,
    /// NAT64 prefixes besides the well-known one.
    pub nat64: [Nat64; MAX_NAT64 as usize],
    /// What there is on each port, in network byte order: bits of [`port`].
    pub ports: BTreeMap<u16, u8>,
    /// What the exact endpoints come to, by bucket.
    pub buckets: Vec<(u32, Bucket)>,
    /// Exact endpoints.
    pub endpoints: Vec<(EndpointKey, Owners)>,
    /// Prefixes.
    pub prefixes: Vec<(PrefixKey, Owners)>,
    /// Principals.
    pub principals: Vec<(PrincipalKey, Owners)>,
    /// Names of the targets.
    pub names: TargetNames,
}

/// No NAT64 prefix.
const NO_NAT64: [Nat64; MAX_NAT64 as usize] = [[0; 3]; MAX_NAT64 as usize];

impl Image {
    /// A slot with nothing in it.
    #[must_use]
    pub(crate) fn empty() -> Self {
        Self {
            flags: 0,
            levels: 0,
            netns: 0,
            few: Few::default(),
            nat64: NO_NAT64,
            ports: BTreeMap::new(),
            buckets: Vec::new(),
            endpoints: Vec::new(),
            prefixes: Vec::new(),
            principals: Vec::new(),
            names: [TargetName::NONE; MAX_TARGETS as usize],
        }
    }

    /// What holds for all of it, under a number.
    #[must_use]
    pub(crate) fn generation(&self, number: u64) -> Generation {
        Generation {
            number,
            netns: self.netns,
            levels: self.levels,
            flags: self.flags,
            few: self.few,
        }
    }

    /// Whether some endpoint is UDP, so that `sendmsg` must be judged.
    #[must_use]
    pub(crate) fn has_udp(&self) -> bool {
        self.endpoints.iter().any(|(key, _)| key.protocol == UDP)
            || self.prefixes.iter().any(|(key, _)| key.key.protocol == UDP)
    }
}

/// What the loader knows and the programs or `status` need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loader {
    /// Cookie of its network namespace, 0 where the kernel does not tell.
    pub netns: u64,
    /// Whether it stays.
    pub daemon: bool,
    /// What its programs see.
    pub sees: KernelVisibility,
}

/// What the kernel lets the programs see (D3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct KernelVisibility {
    /// The owner of a TCP socket.
    pub tcp_owner: bool,
    /// The owner of any other.
    pub other_owner: bool,
    /// Which tasks are threads of the kernel.
    pub threads: bool,
}

/// Lowers a rule set. A target that `previous` names keeps its bit, so that its counters go on.
#[must_use]
pub(crate) fn lower(rules: &RuleSet, previous: &TargetNames, loader: Loader) -> Image {
    let names = assign_bits(rules, previous);
    let bits: Vec<Owners> = rules
        .targets
        .iter()
        .map(|target| {
            names
                .iter()
                .position(|name| name.as_str() == target.name)
                .map_or(0, |bit| 1 << bit)
        })
        .collect();
    let covers = Covers::of(rules);
    let mut image = Image {
        netns: loader.netns,
        names,
        ..Image::empty()
    };
    for (place, own) in &rules.places {
        let owners = permute(own | covers.above(place), &bits);
        let key = endpoint_key(place);
        let listed = image.ports.entry(key.port).or_default();
        *listed |= port::LISTED;
        if is_single(&place.net) {
            image.endpoints.push((key, owners));
        } else {
            *listed |= port::WIDE;
            let length = u32::from(place.net.prefix_len()) + if place.net.addr().is_ipv4() { 96 } else { 0 };
            image.prefixes.push((
                PrefixKey {
                    bits: KEY_BITS + length,
                    key,
                },
                owners,
            ));
        }
    }
    let others = rules
        .nat64
        .iter()
        .filter(|prefix| **prefix != policy::Nat64::WELL_KNOWN);
    for (kept, prefix) in image.nat64.iter_mut().zip(others) {
        let [a, b, c, _] = words(prefix.embed(Ipv4Addr::UNSPECIFIED));
        *kept = [a, b, c];
    }
    // A name that has no address yet has no place (N8).
    for named in &rules.named_ports {
        *image.ports.entry(named.to_be()).or_default() |= port::LISTED | port::NAMED;
    }
    push_unspecified(rules, &bits, &mut image.endpoints);
    (image.principals, image.levels) = principals(rules, &bits);
    image.endpoints.sort_unstable();
    image.buckets = buckets(&image.endpoints);
    image.prefixes.sort_unstable();
    let mut anywhere = image
        .principals
        .iter()
        .filter(|(key, _)| key.kind == kind::USER && key.cgroup == 0);
    let Few { users, admitting } = &mut image.few;
    for ((user, admitting), (key, owners)) in users.iter_mut().zip(admitting).zip(&mut anywhere) {
        (*user, *admitting) = (key.uid, *owners);
    }
    let few = anywhere.next().is_none();
    image.flags = [
        (rules.mode == Mode::Audit, flag::AUDIT),
        (loader.daemon, flag::DAEMON),
        (loader.sees.tcp_owner, flag::SOCKET_USER),
        (!loader.sees.other_owner, flag::TCP_SOCKET_USER_ALONE),
        (!loader.sees.threads, flag::NO_THREADS),
        (few, flag::FEW),
        (image.nat64 != NO_NAT64, flag::NAT64),
        (
            image.principals.iter().any(|(key, _)| key.kind == kind::ANYBODY),
            flag::ANYBODY,
        ),
    ]
    .into_iter()
    .filter_map(|(set, bit)| set.then_some(bit))
    .fold(0, |flags, bit| flags | bit);
    image
}

/// A target's name as the kernel keeps it.
#[must_use]
pub(crate) fn target_name(name: &str) -> TargetName {
    let mut bytes = [0; MAX_TARGET_NAME];
    bytes.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    TargetName(bytes)
}

/// The key of a place in slot 0.
#[must_use]
pub(crate) fn endpoint_key(place: &Place) -> EndpointKey {
    key(place.protocol, place.port, place.net.addr())
}

/// The key of a protocol, a port and a canonical address in slot 0.
fn key(protocol: Protocol, port: u16, address: IpAddr) -> EndpointKey {
    EndpointKey {
        scope: if address.is_ipv4() { 0 } else { scope::V6 },
        protocol: match protocol {
            Protocol::Tcp => TCP,
            Protocol::Udp => UDP,
        },
        port: port.to_be(),
        // Not through `canonical4`: the prefix 0.0.0.0/0 starts at an address that is unspecified by itself.
        address: match address {
            IpAddr::V4(v4) => words(v4.to_ipv6_mapped()),
            IpAddr::V6(v6) => words(v6),
        },
    }
}

/// The address of an attempt as it is dialled, made canonical (D4).
#[must_use]
pub(crate) fn canonical_words(address: IpAddr) -> enforcer_ebpf::Address {
    match address {
        IpAddr::V4(v4) => canonical4(u32::from_ne_bytes(v4.octets())),
        IpAddr::V6(v6) => canonical6(words(v6)),
    }
}

/// Four words in network byte order.
fn words(address: Ipv6Addr) -> enforcer_ebpf::Address {
    let bits = u128::from(address);
    [96, 64, 32, 0].map(|shift| {
        #[allow(clippy::cast_possible_truncation, reason = "one word of four")]
        let word = (bits >> shift) as u32;
        word.to_be()
    })
}

/// Bits for the targets: those of targets that go on first, then the lowest that were free, then the rest.
fn assign_bits(rules: &RuleSet, previous: &TargetNames) -> TargetNames {
    let wanted: Vec<TargetName> = rules.targets.iter().map(|target| target_name(&target.name)).collect();
    let mut names = previous.map(|name| if wanted.contains(&name) { name } else { TargetName::NONE });
    for name in wanted {
        if names.contains(&name) {
            continue;
        }
        let free = |names: &TargetNames, fresh: bool| {
            names
                .iter()
                .zip(previous)
                .position(|(now, before)| *now == TargetName::NONE && (!fresh || *before == TargetName::NONE))
        };
        let bit = free(&names, true).or_else(|| free(&names, false));
        if let Some(slot) = bit.and_then(|bit| names.get_mut(bit)) {
            *slot = name;
        }
    }
    names
}

/// Owners by index of target as owners by bit.
fn permute(owners: u64, bits: &[Owners]) -> Owners {
    bits.iter()
        .enumerate()
        .filter(|(index, _)| owners >> index & 1 == 1)
        .fold(0, |all, (_, bit)| all | bit)
}

/// D5: for every port an entry of its own for the unspecified address, here and as seen from other network namespaces.
fn push_unspecified(rules: &RuleSet, bits: &[Owners], endpoints: &mut Vec<(EndpointKey, Owners)>) {
    let mut ports: BTreeMap<(Protocol, u16), (u64, u64)> = BTreeMap::new();
    for (place, own) in &rules.places {
        let (here, foreign) = ports.entry((place.protocol, place.port)).or_default();
        *here |= own;
        if !is_loopback(&place.net) {
            *foreign |= own; // D6
        }
    }
    for ((protocol, port), (here, foreign)) in ports {
        let here_key = key(protocol, port, IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        endpoints.push((here_key, permute(here, bits)));
        if foreign != 0 {
            endpoints.push((
                EndpointKey {
                    scope: here_key.scope | scope::FOREIGN,
                    ..here_key
                },
                permute(foreign, bits),
            ));
        }
    }
}

/// The buckets of endpoints, sorted by key as these are.
fn buckets(endpoints: &[(EndpointKey, Owners)]) -> Vec<(u32, Bucket)> {
    let mut placed: Vec<(u32, u64, EndpointKey, Owners)> = endpoints
        .iter()
        .filter(|(key, _)| !is_unspecified(key.address))
        .map(|(key, owners)| {
            let Spot { bucket, bit } = Spot::of(key.protocol, key.port, key.address);
            (bucket, bit, *key, *owners)
        })
        .collect();
    // Stable, so that the first of a bucket is the first by key.
    placed.sort_by_key(|(bucket, ..)| *bucket);
    placed
        .chunk_by(|(one, ..), (other, ..)| one == other)
        .filter_map(|all| {
            let (bucket, _, key, owners) = *all.first()?;
            Some((
                bucket,
                Bucket {
                    filter: all.iter().fold(0, |filter, (_, bit, ..)| filter | bit),
                    owners,
                    key,
                    zero: 0,
                },
            ))
        })
        .collect()
}

/// The principals, and the depths of the cgroups among them as [`enforcer_ebpf::Generation::levels`] has them.
fn principals(rules: &RuleSet, bits: &[Owners]) -> (Vec<(PrincipalKey, Owners)>, u64) {
    let mut depths = BTreeSet::new();
    let mut admits: BTreeMap<PrincipalKey, Owners> = BTreeMap::new();
    for (target, bit) in rules.targets.iter().zip(bits) {
        for principal in &target.principals {
            let (cgroup, uid, kind) = match principal {
                RulePrincipal::User { uid, cgroup: None } => (0, uid.0, kind::USER),
                RulePrincipal::User {
                    uid,
                    cgroup: Some((_, cgroup)),
                } => {
                    depths.insert(cgroup.level);
                    (cgroup.id, uid.0, kind::USER)
                }
                RulePrincipal::Anybody { cgroup: (_, cgroup) } => {
                    depths.insert(cgroup.level);
                    (cgroup.id, 0, kind::ANYBODY)
                }
                RulePrincipal::Kernel => (0, 0, kind::KERNEL),
            };
            *admits
                .entry(PrincipalKey {
                    cgroup,
                    uid,
                    kind,
                    slot: 0,
                    zero: 0,
                })
                .or_default() |= bit;
        }
    }
    let levels = depths
        .into_iter()
        .rev()
        .fold(0, |levels, depth| levels << 8 | u64::from(depth + 1));
    (admits.into_iter().collect(), levels)
}

/// The prefixes of a rule set, to find those that cover a place.
struct Covers {
    /// By protocol and port.
    groups: HashMap<(Protocol, u16), Group>,
}

#[derive(Default)]
struct Group {
    owners: HashMap<IpNet, u64>,
    /// Lengths in use, IPv4 and IPv6.
    lengths: [BTreeSet<u8>; 2],
}

impl Covers {
    fn of(rules: &RuleSet) -> Self {
        let mut groups: HashMap<(Protocol, u16), Group> = HashMap::new();
        for (place, own) in rules.places.iter().filter(|(place, _)| !is_single(&place.net)) {
            let group = groups.entry((place.protocol, place.port)).or_default();
            *group.owners.entry(place.net).or_default() |= own;
            let [v4, v6] = &mut group.lengths;
            let lengths = if place.net.addr().is_ipv4() { v4 } else { v6 };
            lengths.insert(place.net.prefix_len());
        }
        Self { groups }
    }

    /// Owners of all prefixes that hold the place (D2: every target that owns an endpoint is asked).
    fn above(&self, place: &Place) -> u64 {
        let Some(group) = self.groups.get(&(place.protocol, place.port)) else {
            return 0;
        };
        let [v4, v6] = &group.lengths;
        let lengths = if place.net.addr().is_ipv4() { v4 } else { v6 };
        lengths
            .range(..place.net.prefix_len())
            .filter_map(|length| IpNet::new(place.net.addr(), *length).ok())
            .filter_map(|net| group.owners.get(&net.trunc()))
            .fold(0, |all, owners| all | owners)
    }
}
