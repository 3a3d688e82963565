//! Rule set → the table as it should stand: chains, rules, sets, counters. Pure.
//!
//! Protocol and port of a destination are looked up first, in a map that leads to the chain of the service, or of the
//! first one that has the same addresses: most are no endpoint's. That looks the address up in the sets of the service,
//! one for each class, a class being a distinct set of owning targets, and goes to the chain of the class, which jumps
//! to the chain of each of its targets; that returns if it admits the user and ends in a refusal if not (D2).
//!
//! Names of all but the base chains, the chain `about` and the counters end in the slot of their generation, so that a
//! rule set is built beside the active one: a packet that is under way finds every set and chain that it began with
//! (F2).

use std::collections::{BTreeMap, BTreeSet};

use super::{
    endpoints::{AddressSet, Endpoints},
    expression::{self as is, Expression, IPV4, IPV6, NftVerdict, TCP, UDP, goto},
    foreign::Foreign,
    slot::{Side, Slot},
};
use crate::{
    config::Forward,
    policy::{Mode, Protocol},
    ruleset::{RulePrincipal, RuleSet, RuleTarget},
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
    /// Protocol and port to the chain of a service.
    Services,
    /// Port to the chain that logs its dials.
    Ports,
    /// Users.
    Users,
    /// Cgroups, by id.
    Cgroups,
    /// Addresses.
    Addresses {
        /// `IPV4` or `IPV6`.
        family: u8,
        /// Ranges of addresses instead of single ones.
        ranges: bool,
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
    /// Goes to a chain, and comes back from its end.
    Jump(String),
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
    let masks = endpoints.masks();
    let numbers: BTreeMap<u64, u32> = masks.iter().copied().zip(1..).collect();
    let number = |mask| numbers.get(&mask).copied().unwrap_or_default();
    let set = |set: &AddressSet| slot.set(set, number(set.class));
    let class = |mask| slot.class(number(mask));
    endpoints.add_to(&mut image, set);
    endpoints.add_services(&mut image, (slot, Side::Local), &rules.nat64, &set, class);
    // What has no socket here has no user either: the first target refuses, as every other would.
    let refusal = |mask| {
        owners(rules, mask)
            .next()
            .map_or_else(String::new, |first| slot.refusal(&first.name))
    };
    // With `forward = "allow"` too, for what arrives at a loopback address.
    endpoints.add_services(&mut image, (slot, Side::Forwarded), &rules.nat64, &set, refusal);

    add_dials(&mut image, rules, header);
    image.chains.insert(chain::ABOUT.to_owned(), about(header));
    let has_udp = rules.places.iter().any(|(place, _)| place.protocol == Protocol::Udp);
    let judge = |side| {
        let services = slot.services(side);
        let services = image.sets.contains_key(&services).then(|| is::service_in(&services));
        let dials = image.sets.contains_key(&slot.ports()).then(|| is::port(&slot.ports()));
        chain_of(None, services.into_iter().chain(dials).collect())
    };
    let (judge_local, judge_forwarded) = (judge(Side::Local), judge(Side::Forwarded));
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
    let foreign = Foreign::of(&endpoints, &rules.nat64, slot, has_udp);
    // The hook alone costs every packet that arrives (P3).
    if endpoints.has_loopback() {
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
    foreign.add_to(&mut image, audit, set);

    for mask in &masks {
        let owners: Vec<&RuleTarget> = owners(rules, *mask).collect();
        let jump = |target: &&RuleTarget| vec![Expression::Verdict(NftVerdict::Jump(slot.target(&target.name)))];
        let mut steps: Vec<_> = owners.iter().map(jump).collect();
        steps.push(vec![Expression::Verdict(NftVerdict::Accept)]);
        image.chains.insert(class(*mask), chain_of(None, steps));
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
pub(super) fn output(slot: Slot, has_udp: bool) -> Chain {
    let tcp = [&is::transport(TCP)[..], &is::opens_connection(), &[goto(&slot.judge())]].concat();
    let udp = [is::transport(UDP), vec![goto(&slot.judge())]].concat();
    let rules = if has_udp { vec![tcp, udp] } else { vec![tcp] };
    base(OUTPUT_HOOK, rules)
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
