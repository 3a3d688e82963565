//! Rule set → the table as it should stand: chains, rules, sets, counters. Pure.
//!
//! A destination is looked up in a map from endpoint to the chain of its class, a class being a distinct set of owning
//! targets; a class's chain jumps to the chain of each of its targets, which returns if it admits the user and ends in
//! a refusal if not (D2).
//!
//! Names of all but the base chains, the chain `about` and the counters end in the slot of their generation, so that a
//! rule set is built beside the active one: a packet that is under way finds every set and chain that it began with
//! (F2).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv6Addr},
};

use ipnet::IpNet;

use super::{
    expression::{self as is, Expression, IPV4, IPV6, NftVerdict, TCP, UDP, goto},
    foreign::Foreign,
    slot::Slot,
};
use crate::{
    config::Forward,
    policy::{Mode, Protocol},
    ruleset::{RulePrincipal, RuleSet, RuleTarget, is_single},
};

/// A table's contents, as wanted or as read from the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Image {
    /// By name.
    pub chains: BTreeMap<String, Chain>,
    /// By name.
    pub sets: BTreeMap<String, Set>,
    /// Names.
    pub counters: BTreeSet<String>,
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Where packets come in, for a base chain.
    pub base: Option<Base>,
    /// In order.
    pub rules: Vec<Rule>,
}

/// A base chain's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    /// `NF_INET_*`.
    pub hook: u32,
    /// Greater is later.
    pub priority: i32,
    /// Whether its policy is to accept, as ours always is.
    pub accepts: bool,
}

/// A rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Empty for none.
    pub comment: String,
    /// In order.
    pub expressions: Vec<Expression>,
}

/// A set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Set {
    /// The types of its keys and values.
    pub kind: SetKind,
    /// Sorted.
    pub elements: Vec<Element>,
}

/// The keys of a set, and of a map its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SetKind {
    /// Address, protocol and port to the chain of a class.
    Endpoints {
        /// `IPV4` or `IPV6`.
        family: u8,
        /// Ranges of addresses instead of single ones.
        ranges: bool,
    },
    /// Port to the chain that logs its dials.
    Ports,
    /// Users.
    Users,
    /// Cgroups, by id.
    Cgroups,
    /// Ranges of addresses.
    Addresses {
        /// `IPV4` or `IPV6`.
        family: u8,
    },
}

/// An element of a set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Element {
    /// The key, or the first of a range.
    pub key: Vec<u8>,
    /// The last of a range, empty otherwise.
    pub last: Vec<u8>,
    /// A map's value.
    pub value: Value,
}

/// A map's value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Value {
    /// No map.
    None,
    /// Goes to a chain.
    Goto(String),
}

/// What the table tells of itself, in a comment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Number of the rule set.
    pub generation: u64,
    /// Refuses nothing.
    pub audit: bool,
    /// A daemon made it active.
    pub daemon: bool,
    /// nflog's group for denials, if the kernel has nflog.
    pub log: Option<u16>,
}

/// What a lowering depends on besides the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loader {
    /// A daemon makes it active.
    pub daemon: bool,
    /// What becomes of forwarded connections to an endpoint.
    pub forward: Forward,
    /// nflog's group for denials, if the kernel has nflog.
    pub log: Option<u16>,
    /// Whether the kernel tells a socket's cgroup; where not, principals with one match nobody.
    pub cgroups: bool,
}

/// Chains whose names nobody chooses.
pub(crate) mod chain {
    /// Says whose table it is; no packet comes here.
    pub(crate) const ABOUT: &str = "about";
    /// Packets of this network namespace, after local NAT.
    pub(crate) const OUTPUT: &str = "output";
    /// Packets of other network namespaces and hosts.
    pub(crate) const FORWARD: &str = "forward";
    /// Packets that arrive, after NAT.
    pub(crate) const PREROUTING: &str = "prerouting";
}

/// After NAT at each hook (dstnat is -100 and srcnat 100), and after other filters.
const PRIORITY: i32 = 300;
/// `NF_INET_PRE_ROUTING` and so on.
const PREROUTING_HOOK: u32 = 0;
const FORWARD_HOOK: u32 = 2;
const OUTPUT_HOOK: u32 = 3;

/// Denials told to the log a second, and at once.
const LOG_RATE: u64 = 200;
const LOG_BURST: u32 = 1000;
/// Dials of a port told to the log a second, and at once: each has names looked up (N8), and more would bring no more.
const DIAL_RATE: u64 = 4;
const DIAL_BURST: u32 = 4;
/// Names the counter of what is refused as it cannot be read, and begins the names of the chains that find it.
pub(crate) const UNREADABLE: &str = "unreadable";
/// Begins the text that goes with a logged packet.
pub(crate) const LOG_PREFIX: &str = "enforcer ";
/// Follows it where the packet is a dial, not a denial.
pub(crate) const DIAL: &str = "dial";

/// The table that a rule set asks for.
#[must_use]
pub(crate) fn lower(rules: &RuleSet, generation: u64, loader: Loader) -> Image {
    let audit = rules.mode == Mode::Audit;
    let header = Header {
        generation,
        audit,
        daemon: loader.daemon,
        log: loader.log,
    };
    let slot = Slot::of(generation);
    let mut image = Image::default();
    let endpoints = Endpoints::of(rules);
    let numbers: BTreeMap<u64, u32> = endpoints.masks.iter().copied().zip(1..).collect();
    let class = |mask| slot.class(numbers.get(&mask).copied().unwrap_or_default());
    endpoints.add_to(&mut image, |family| slot.endpoints(family), class);
    // What has no socket here has no user either: the first target refuses, as every other would.
    let refusal = |mask| {
        owners(rules, mask)
            .next()
            .map_or_else(String::new, |first| slot.refusal(&first.name))
    };
    // With `forward = "allow"` too: a range that begins elsewhere may hold loopback addresses.
    endpoints.add_to(&mut image, |family| slot.forwarded(family), refusal);

    add_dials(&mut image, rules, header);
    image.chains.insert(chain::ABOUT.to_owned(), about(header));
    let has_udp = rules.places.iter().any(|(place, _)| place.protocol == Protocol::Udp);
    let judge = |names: fn(Slot, u8) -> [String; 2]| {
        let maps = [IPV4, IPV6].map(|family| names(slot, family).map(|name| (family, name)));
        let there = maps.iter().flatten().filter(|(_, name)| image.sets.contains_key(name));
        // The IPv4 address in one of IPv6 before that itself, as the one decides if it is an endpoint (D4).
        let (v4, v6): (Vec<_>, Vec<_>) = there.partition(|(family, _)| *family == IPV4);
        let translated = rules.nat64.iter().flat_map(|prefix| {
            let name = |(_, name): &&(u8, String)| is::translated_destination(prefix.bytes(), name);
            v4.iter().map(name).collect::<Vec<_>>()
        });
        let as_is = |(family, name): &&(u8, String)| is::destination(*family, name);
        let endpoints = v4.iter().map(as_is).chain(translated).chain(v6.iter().map(as_is));
        let dials = image.sets.contains_key(&slot.ports()).then(|| is::port(&slot.ports()));
        chain_of(None, endpoints.chain(dials).collect())
    };
    let (judge_local, judge_forwarded) = (judge(Slot::endpoints), judge(Slot::forwarded));
    let mut add = |name: &str, chain| image.chains.insert(name.to_owned(), chain);
    add(&slot.judge(), judge_local);
    add(&slot.judge_forwarded(), judge_forwarded);
    let strays = [IPV4, IPV6].map(|family| {
        let mut rule = is::to_loopback(family);
        rule.push(goto(&slot.judge_forwarded()));
        rule
    });
    add(&slot.strays(), chain_of(None, strays.to_vec()));
    add(chain::OUTPUT, output(slot, has_udp));
    let foreign = Foreign::of(rules, slot, has_udp);
    // The hook alone costs every packet that arrives (P3).
    if foreign.has_loopback() {
        add(
            chain::PREROUTING,
            base(
                PREROUTING_HOOK,
                vec![[is::from_elsewhere(), vec![goto(&slot.arrived())]].concat()],
            ),
        );
        add(&slot.arrived(), chain_of(None, foreign.arrived(&slot.strays())));
    }
    if loader.forward == Forward::Refuse {
        add(
            chain::FORWARD,
            base(FORWARD_HOOK, foreign.forwarded(&slot.judge_forwarded())),
        );
    }
    foreign.add_to(&mut image, audit);

    for (number, mask) in (1..).zip(&endpoints.masks) {
        let owners: Vec<&RuleTarget> = owners(rules, *mask).collect();
        let jump = |target: &&RuleTarget| vec![Expression::Verdict(NftVerdict::Jump(slot.target(&target.name)))];
        let mut steps: Vec<_> = owners.iter().map(jump).collect();
        steps.push(vec![Expression::Verdict(NftVerdict::Accept)]);
        image.chains.insert(slot.class(number), chain_of(None, steps));
    }
    for target in &rules.targets {
        add_target(&mut image, target, header, loader.cgroups);
    }
    image
}

fn base(hook: u32, rules: Vec<Vec<Expression>>) -> Chain {
    let place = Base {
        hook,
        priority: PRIORITY,
        accepts: true,
    };
    chain_of(Some(place), rules)
}

/// What leads the packets of this host's sockets to the rules of a slot. One rule a protocol, as every packet of what
/// is established passes them (P3).
fn output(slot: Slot, has_udp: bool) -> Chain {
    let tcp = [&is::transport(TCP)[..], &is::opens_connection(), &[goto(&slot.judge())]].concat();
    let udp = [is::transport(UDP), vec![goto(&slot.judge())]].concat();
    let rules = if has_udp { vec![tcp, udp] } else { vec![tcp] };
    base(OUTPUT_HOOK, rules)
}

/// The masks of all classes, and the class of each place.
struct Endpoints {
    masks: BTreeSet<u64>,
    single: Vec<(Key, u64)>,
    ranges: Vec<(Key, IpAddr, u64)>,
}

/// Protocol, port and address: what an endpoint map is keyed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    protocol: Protocol,
    port: u16,
    address: IpAddr,
}

impl Endpoints {
    fn of(rules: &RuleSet) -> Self {
        let mut prefixes: BTreeMap<(Protocol, u16, bool), Vec<(IpNet, u64)>> = BTreeMap::new();
        for (place, owners) in rules.places.iter().filter(|(place, _)| !is_single(&place.net)) {
            let group = (place.protocol, place.port, place.net.addr().is_ipv4());
            prefixes.entry(group).or_default().push((place.net, *owners));
        }
        let groups: BTreeMap<_, Vec<Range>> = prefixes
            .into_iter()
            .map(|(group, all)| (group, disjoint(&all)))
            .collect();
        let mut masks = BTreeSet::new();
        let mut single = Vec::new();
        for (place, owners) in rules.places.iter().filter(|(place, _)| is_single(&place.net)) {
            let address = place.net.addr();
            let group = groups.get(&(place.protocol, place.port, address.is_ipv4()));
            let mask = owners | group.map_or(0, |ranges| covering(ranges, address));
            masks.insert(mask);
            let key = Key {
                protocol: place.protocol,
                port: place.port,
                address,
            };
            single.push((key, mask));
        }
        let mut ranges = Vec::new();
        for ((protocol, port, v4), group) in &groups {
            for range in group {
                masks.insert(range.owners);
                let key = Key {
                    protocol: *protocol,
                    port: *port,
                    address: address(range.first, *v4),
                };
                ranges.push((key, address(range.last, *v4), range.owners));
            }
        }
        Self { masks, single, ranges }
    }

    /// Adds the maps of both families, from the endpoints to a chain that depends on their owners.
    fn add_to(&self, image: &mut Image, names: impl Fn(u8) -> [String; 2], chain: impl Fn(u64) -> String) {
        for family in [IPV4, IPV6] {
            let here = |key: &Key| key.address.is_ipv4() == (family == IPV4);
            let single = self
                .single
                .iter()
                .filter(|(key, _)| here(key))
                .map(|(key, mask)| Element {
                    key: key.bytes(key.address),
                    last: Vec::new(),
                    value: Value::Goto(chain(*mask)),
                });
            let ranges = self.ranges.iter().filter(|(key, ..)| here(key));
            let ranges = ranges.map(|(key, last, mask)| Element {
                key: key.bytes(key.address),
                last: key.bytes(*last),
                value: Value::Goto(chain(*mask)),
            });
            let all = [(false, single.collect::<Vec<_>>()), (true, ranges.collect())];
            for (name, (ranges, elements)) in names(family).into_iter().zip(all) {
                if !elements.is_empty() {
                    image
                        .sets
                        .insert(name, sorted(SetKind::Endpoints { family, ranges }, elements));
                }
            }
        }
    }
}

impl Key {
    /// As the registers hold it: each part begins at a multiple of 4 bytes.
    fn bytes(&self, address: IpAddr) -> Vec<u8> {
        endpoint_key(address, self.protocol, self.port)
    }
}

/// The key of an endpoint map.
#[must_use]
pub(crate) fn endpoint_key(address: IpAddr, protocol: Protocol, port: u16) -> Vec<u8> {
    let mut bytes = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let [high, low] = port.to_be_bytes();
    bytes.extend([number_of_protocol(protocol), 0, 0, 0, high, low, 0, 0]);
    bytes
}

/// `IPPROTO_*`.
#[must_use]
pub(crate) fn number_of_protocol(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
    }
}

/// The counters of a target: allowed, denied, would deny.
#[must_use]
pub(crate) fn counters_of(target: &str) -> [String; 3] {
    ["allowed", "denied", "would_deny"].map(|what| format!("{what}_{target}"))
}

/// N8: what opens a connection to a port of names, and to no endpoint, is told to the log.
fn add_dials(image: &mut Image, rules: &RuleSet, header: Header) {
    let Some(group) = header.log.filter(|_| !rules.named_ports.is_empty()) else {
        return;
    };
    let slot = Slot::of(header.generation);
    let elements = rules.named_ports.iter().map(|port| Element {
        key: port.to_be_bytes().to_vec(),
        last: Vec::new(),
        value: Value::Goto(slot.dials(*port)),
    });
    image
        .sets
        .insert(slot.ports(), sorted(SetKind::Ports, elements.collect()));
    for port in &rules.named_ports {
        let told = vec![
            Expression::Limit {
                rate: DIAL_RATE,
                burst: DIAL_BURST,
            },
            Expression::Log {
                group,
                prefix: format!("{LOG_PREFIX}{DIAL}"),
            },
        ];
        image.chains.insert(slot.dials(*port), chain_of(None, vec![told]));
    }
}

fn add_target(image: &mut Image, target: &RuleTarget, header: Header, cgroups: bool) {
    let [allowed, denied, would_deny] = counters_of(&target.name);
    let slot = Slot::of(header.generation);
    let refusal = slot.refusal(&target.name);
    let admit = |mut when: Vec<Expression>| {
        when.extend([
            Expression::Count(allowed.clone()),
            Expression::Verdict(NftVerdict::Return),
        ]);
        when
    };
    let (mut users, mut below, mut kernel) = (Vec::new(), Vec::new(), false);
    let mut anybody: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    for principal in &target.principals {
        match principal {
            RulePrincipal::User { uid, cgroup: None } => users.push(uid.0),
            // Every task lies below the root.
            RulePrincipal::User {
                uid,
                cgroup: Some((_, cgroup)),
            } if cgroup.level == 0 => users.push(uid.0),
            RulePrincipal::User {
                uid,
                cgroup: Some((_, cgroup)),
            } => below.push((uid.0, cgroup.level, cgroup.id)),
            RulePrincipal::Anybody { cgroup: (_, cgroup) } => {
                anybody.entry(cgroup.level).or_default().push(cgroup.id);
            }
            RulePrincipal::Kernel => kernel = true,
        }
    }
    let mut rules = Vec::new();
    if !users.is_empty() {
        let set = slot.users(&target.name);
        rules.push(admit(is::user_in(&set)));
        users.sort_unstable();
        users.dedup();
        let elements = users.iter().map(|uid| Element {
            key: uid.to_ne_bytes().to_vec(),
            last: Vec::new(),
            value: Value::None,
        });
        image.sets.insert(set, sorted(SetKind::Users, elements.collect()));
    }
    // Without the expression the principal matches nobody: never widened.
    for (uid, level, id) in below.into_iter().filter(|_| cgroups) {
        rules.push(admit(is::user_below(uid, level, id)));
    }
    for (level, mut ids) in anybody.into_iter().filter(|_| cgroups) {
        if level == 0 {
            rules.push(admit(is::has_user())); // Every task lies below the root.
            continue;
        }
        let set = slot.cgroups(&target.name, level);
        rules.push(admit(is::anybody_below(level, &set)));
        ids.sort_unstable();
        ids.dedup();
        let elements = ids.iter().map(|id| Element {
            key: id.to_ne_bytes().to_vec(),
            last: Vec::new(),
            value: Value::None,
        });
        image.sets.insert(set, sorted(SetKind::Cgroups, elements.collect()));
    }
    if kernel && cgroups {
        rules.push([is::has_user(), vec![goto(&refusal)]].concat());
        // D3: of sockets without a file the kernel makes some for a user, whose cgroup they have: SMC's inner ones,
        // MPTCP's further ones. Its own have the root's, as its threads have.
        rules.push([is::below_the_root(), vec![goto(&refusal)]].concat());
        rules.push(admit(Vec::new()));
    } else {
        rules.push(vec![goto(&refusal)]);
    }
    image.chains.insert(slot.target(&target.name), chain_of(None, rules));

    let mut rules = Vec::new();
    if let Some(group) = header.log {
        let verdict = if header.audit { "would-deny" } else { "deny" };
        rules.push(vec![
            Expression::Limit {
                rate: LOG_RATE,
                burst: LOG_BURST,
            },
            Expression::Log {
                group,
                prefix: format!("{LOG_PREFIX}{verdict} {} {}", header.generation, target.name),
            },
        ]);
    }
    if header.audit {
        rules.push(vec![Expression::Count(would_deny.clone())]);
    } else {
        let reset = [Expression::Count(denied.clone()), Expression::Reject { reset: true }];
        rules.push([is::transport(TCP), reset.to_vec()].concat()); // D8
        rules.push(vec![
            Expression::Count(denied.clone()),
            Expression::Reject { reset: false },
        ]);
    }
    image.chains.insert(refusal, chain_of(None, rules));
    image.counters.extend([allowed, denied, would_deny]);
}

fn owners(rules: &RuleSet, mask: u64) -> impl Iterator<Item = &RuleTarget> {
    let bits = 0_u32..;
    bits.zip(&rules.targets)
        .filter(move |(bit, _)| mask >> bit & 1 == 1)
        .map(|(_, target)| target)
}

pub(super) fn chain_of(base: Option<Base>, rules: Vec<Vec<Expression>>) -> Chain {
    let rules = rules.into_iter().map(|expressions| Rule {
        comment: String::new(),
        expressions,
    });
    Chain {
        base,
        rules: rules.collect(),
    }
}

fn about(header: Header) -> Chain {
    Chain {
        base: None,
        rules: vec![Rule {
            comment: header.to_string(),
            expressions: Vec::new(),
        }],
    }
}

pub(super) fn sorted(kind: SetKind, mut elements: Vec<Element>) -> Set {
    elements.sort_unstable();
    Set { kind, elements }
}

/// Addresses as numbers, first and last included, and the targets that own all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: u128,
    last: u128,
    owners: u64,
}

/// Prefixes that may cover each other → ranges that do not, each with the owners of all that cover it.
fn disjoint(prefixes: &[(IpNet, u64)]) -> Vec<Range> {
    let mut edges: BTreeMap<u128, (Vec<u64>, Vec<u64>)> = BTreeMap::new();
    let mut end = None;
    for (net, owners) in prefixes {
        let (first, last) = (number(net.network()), number(net.broadcast()));
        edges.entry(first).or_default().0.push(*owners);
        match last.checked_add(1) {
            Some(after) => edges.entry(after).or_default().1.push(*owners),
            None => end = Some(last),
        }
    }
    let mut open = [0_u32; 64];
    let mut ranges: Vec<Range> = Vec::new();
    let mut waiting: Option<(u128, u64)> = None;
    let close = |ranges: &mut Vec<Range>, (first, owners): (u128, u64), last: u128| match ranges.last_mut() {
        Some(before) if before.owners == owners && before.last.checked_add(1) == Some(first) => before.last = last,
        Some(_) | None => ranges.push(Range { first, last, owners }),
    };
    for (at, (opening, closing)) in edges {
        if let Some(before) = waiting.take() {
            close(&mut ranges, before, at - 1);
        }
        for (list, opens) in [(opening, true), (closing, false)] {
            for (bit, count) in (0..64).zip(&mut open) {
                let hits = list.iter().filter(|owners| *owners >> bit & 1 == 1).count();
                let hits = u32::try_from(hits).unwrap_or(u32::MAX);
                *count = if opens { *count + hits } else { *count - hits };
            }
        }
        let owners = (0..64)
            .zip(&open)
            .fold(0, |mask, (bit, count)| mask | u64::from(*count > 0) << bit);
        if owners != 0 {
            waiting = Some((at, owners));
        }
    }
    if let (Some(before), Some(last)) = (waiting, end) {
        close(&mut ranges, before, last);
    }
    ranges
}

/// The owners of the range that holds an address.
fn covering(ranges: &[Range], address: IpAddr) -> u64 {
    let at = number(address);
    let after = ranges.partition_point(|range| range.first <= at);
    let before = after.checked_sub(1).and_then(|index| ranges.get(index));
    before.filter(|range| at <= range.last).map_or(0, |range| range.owners)
}

pub(super) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

pub(super) fn address(number: u128, v4: bool) -> IpAddr {
    match u32::try_from(number) {
        Ok(number) if v4 => IpAddr::V4(number.into()),
        Ok(_) | Err(_) => IpAddr::V6(Ipv6Addr::from_bits(number)),
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = if self.audit { "audit" } else { "enforce" };
        let by = if self.daemon { "daemon" } else { "apply" };
        write!(f, "enforcer table 1 generation {} {mode} by {by}", self.generation)?;
        if let Some(group) = self.log {
            write!(f, " log {group}")?;
        }
        Ok(())
    }
}

impl Header {
    /// Reads the comment back; none if it is not ours.
    #[must_use]
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("enforcer table 1 generation ")?;
        let words: Vec<&str> = rest.split(' ').collect();
        let [generation, mode, "by", by, log @ ..] = words.as_slice() else {
            return None;
        };
        Some(Self {
            generation: generation.parse().ok()?,
            audit: *mode == "audit",
            daemon: *by == "daemon",
            log: match log {
                ["log", group] => Some(group.parse().ok()?),
                _ => None,
            },
        })
    }
}

impl Image {
    /// What the table tells of itself; none if it is not ours.
    #[must_use]
    pub(crate) fn header(&self) -> Option<Header> {
        Header::parse(&self.chains.get(chain::ABOUT)?.rules.first()?.comment)
    }

    /// The active slot.
    #[must_use]
    pub(crate) fn slot(&self) -> Slot {
        Slot::of(self.header().map_or(0, |header| header.generation))
    }

    /// Whether packets of this host's sockets come to the rules: the chains that lead there are as they are made.
    pub(crate) fn is_reached(&self) -> bool {
        let slot = self.slot();
        let names = [IPV4, IPV6].map(|family| slot.endpoints(family).map(|name| (family, name)));
        let there = || names.iter().flatten().filter(|(_, name)| self.sets.contains_key(name));
        let is_udp = |element: &Element| element.key.iter().nth_back(7) == Some(&number_of_protocol(Protocol::Udp));
        let mut elements = there()
            .filter_map(|(_, name)| self.sets.get(name))
            .flat_map(|set| &set.elements);
        let has_udp = elements.any(is_udp);
        let judge = self.chains.get(&slot.judge()).map_or(&[][..], |judge| &judge.rules);
        let is_looked_up = |(family, name): &(u8, String)| {
            let wanted = is::destination(*family, name);
            judge.iter().any(|rule| rule.expressions == wanted)
        };
        let passes_by = |rule: &Rule| matches!(rule.expressions.as_slice(), [Expression::Verdict(_)]);
        self.chains.get(chain::OUTPUT) == Some(&output(slot, has_udp))
            && there().all(is_looked_up)
            && !judge.iter().any(passes_by)
    }

    /// Leaves out chains and sets of the slot that is not active.
    pub(crate) fn forget_the_other_slot(&mut self) {
        let other = format!("_{}", self.slot().other());
        self.chains.retain(|name, _| !name.ends_with(&other));
        self.sets.retain(|name, _| !name.ends_with(&other));
    }

    /// Names of the targets, sorted.
    #[must_use]
    pub(crate) fn targets(&self) -> Vec<&str> {
        let names = self.chains.keys();
        names.filter_map(|name| self.slot().target_of(name)).collect()
    }

    /// Targets that own the class with this chain.
    #[must_use]
    pub(crate) fn owners_of(&self, class: &str) -> Vec<&str> {
        let rules = self.chains.get(class);
        let rules = rules.map_or(&[][..], |chain| &chain.rules);
        rules
            .iter()
            .filter_map(|rule| match rule.expressions.as_slice() {
                [Expression::Verdict(NftVerdict::Jump(chain))] => self.slot().target_of(chain),
                _ => None,
            })
            .collect()
    }
}
