//! The table against the oracle: for every attempt that both can see, the same verdict.

#![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

use std::{collections::BTreeSet, net::IpAddr};

use proptest::prelude::*;

use super::{
    check::decide,
    image::{Loader, Rule, lower},
    netlink::Dump,
    verify::difference,
};
use crate::{
    config::Forward,
    policy::{CgroupPath, Mode, Nat64, Protocol, Uid},
    ruleset::{Attempt, Cgroup, Place, RulePrincipal, RuleSet, RuleTarget, Subject, explain},
};

pub(super) const LOADER: Loader = Loader {
    daemon: true,
    forward: Forward::Refuse,
    log: None,
    cgroups: true,
};

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0..8_u8).prop_map(|low| IpAddr::from([10, 0, 0, low])),
        (0..8_u8).prop_map(|low| IpAddr::from([127, 0, 0, low])),
        (0..8_u16).prop_map(|low| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, low])),
    ]
}

/// What is dialled by a NAT64, too.
fn dialled() -> impl Strategy<Value = IpAddr> {
    let translated = [0x0a00, 0x7f00].map(Just);
    prop_oneof![
        3 => address(),
        1 => (prop::strategy::Union::new(translated), 0..8_u16)
            .prop_map(|(high, low)| IpAddr::from([0x64, 0xff9b, 0, 0, 0, 0, high, low])),
    ]
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)]
}

fn principal() -> impl Strategy<Value = RulePrincipal> {
    let cgroup = (0..3_u32).prop_map(|level| {
        (
            CgroupPath(format!("/{level}")),
            Cgroup {
                id: 100 + u64::from(level),
                level,
            },
        )
    });
    prop_oneof![
        1 => cgroup.clone().prop_map(|cgroup| RulePrincipal::Anybody { cgroup }),
        4 => (0..4_u32, proptest::option::weighted(0.3, cgroup))
            .prop_map(|(uid, cgroup)| RulePrincipal::User { uid: Uid(uid), cgroup }),
        1 => Just(RulePrincipal::Kernel),
    ]
}

prop_compose! {
    fn place()(address in address(), short in 0..4_u8, protocol in protocol(), port in 1..3_u16) -> Place {
        let full = if address.is_ipv4() { 32 } else { 128 };
        let length = if short == 0 { full } else { full - short };
        let net = ipnet::IpNet::new(address, length).expect("a prefix length in range").trunc();
        Place { protocol, port, net }
    }
}

prop_compose! {
    pub(super) fn rules()(
        targets in prop::collection::vec(prop::collection::vec(principal(), 0..4), 1..5),
        places in prop::collection::btree_map(place(), 1..16_u64, 0..12),
        audit in any::<bool>(),
    ) -> RuleSet {
        let mask = (1_u64 << targets.len()) - 1;
        RuleSet {
            mode: if audit { Mode::Audit } else { Mode::Enforce },
            targets: targets
                .into_iter()
                .enumerate()
                .map(|(index, principals)| RuleTarget { name: format!("t{index}"), principals })
                .collect(),
            places: places.into_iter().map(|(place, owners)| (place, owners & mask)).filter(|(_, owners)| *owners != 0).collect(),
            nat64: vec![Nat64::WELL_KNOWN],
            named_ports: BTreeSet::new(),
        }
    }
}

prop_compose! {
    pub(super) fn attempt()(
        address in dialled(),
        protocol in protocol(),
        port in 1..3_u16,
        user in 0..4_u32,
        kernel_thread in prop::bool::weighted(0.1),
        depth in 0..3_usize,
    ) -> Attempt {
        Attempt {
            protocol,
            address,
            port,
            foreign_netns: false,
            subject: Subject {
                // A socket that nftables takes for the kernel's has no file, and so no user but root (§5).
                task: Uid(if kernel_thread { 0 } else { user }),
                socket: Some(Uid(if kernel_thread { 0 } else { user })),
                kernel_thread,
                cgroups: [100, 101, 102].into_iter().take(depth + 1).collect(),
            },
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// §5: the same verdict and the same reasons, where one user stands for task and socket.
    #[test]
    fn the_table_decides_as_the_oracle(rules in rules(), attempts in prop::collection::vec(attempt(), 1..20)) {
        // At level 0 lies the root, below which every task is.
        let image = lower(&rules, 7, LOADER);
        for attempt in attempts {
            let expected = explain(&rules, &attempt);
            let found = decide(&image, &attempt);
            prop_assert_eq!(found.verdict, expected.verdict, "{:?}", &attempt);
            let owners: Vec<_> = expected.owners.iter().map(|(index, admits)| (format!("t{index}"), *admits)).collect();
            prop_assert_eq!(found.owners, owners);
        }
    }

    /// F5: the one comparison finds whatever is missing, changed or too much, and nothing where all is as it was sent.
    #[test]
    fn every_change_of_a_table_is_a_difference(rules in rules(), which in any::<prop::sample::Index>(), how in 0..4) {
        let wanted = lower(&rules, 7, LOADER);
        let mut found = Dump { image: wanted.clone(), ..Dump::default() };
        prop_assert_eq!(difference(&wanted, &found), None);
        let image = &mut found.image;
        let key = |length: usize| which.index(length);
        match how {
            0 => drop(image.chains.remove(&image.chains.keys().nth(key(image.chains.len())).expect("a chain").clone())),
            1 => {
                let chains = image.chains.len();
                let chain = image.chains.values_mut().nth(key(chains)).expect("a chain");
                chain.rules.push(Rule { comment: "another".to_owned(), expressions: Vec::new() });
            }
            2 if !image.sets.is_empty() => {
                let sets = image.sets.len();
                let set = image.sets.values_mut().nth(key(sets)).expect("a set");
                drop(set.elements.remove(key(set.elements.len())));
            }
            2 | 3 => found.dormant = true,
            _ => unreachable!("all are above"),
        }
        prop_assert!(difference(&wanted, &found).is_some());
    }

    /// A process that was killed between a switch and its cleaning up leaves the slot before.
    #[test]
    fn what_is_left_of_the_slot_before_is_told_apart(before in rules(), rules in rules()) {
        let wanted = lower(&rules, 8, LOADER);
        let mut found = Dump { image: wanted.clone(), ..Dump::default() };
        let left = lower(&before, 7, LOADER);
        found.image.sets.extend(left.sets);
        found.image.chains.extend(left.chains.into_iter().filter(|(name, _)| name.ends_with("_b")));
        prop_assert!(difference(&wanted, &found).is_some());
        found.image.forget_the_other_slot();
        prop_assert_eq!(difference(&wanted, &found), None);
    }
}

/// What is forwarded has no user: refused at a routable endpoint, not judged at a loopback one (§5, D6).
#[test]
fn forwarded_connections_have_no_user() {
    let net = |text: &str| text.parse().expect("a prefix");
    let place = |text: &str| Place {
        protocol: Protocol::Tcp,
        port: 1,
        net: net(text),
    };
    let rules = RuleSet {
        mode: Mode::Enforce,
        targets: vec![RuleTarget {
            name: "t".to_owned(),
            principals: vec![RulePrincipal::User {
                uid: Uid(0),
                cgroup: None,
            }],
        }],
        places: vec![(place("10.0.0.1/32"), 1), (place("127.0.0.1/32"), 1)],
        nat64: Vec::new(),
        named_ports: BTreeSet::new(),
    };
    let attempt = |address: &str| Attempt {
        protocol: Protocol::Tcp,
        address: address.parse().expect("an address"),
        port: 1,
        foreign_netns: true,
        subject: Subject {
            task: Uid(0),
            socket: Some(Uid(0)),
            kernel_thread: false,
            cgroups: vec![100],
        },
    };
    let refuse = lower(&rules, 1, LOADER);
    let allow = lower(
        &rules,
        1,
        Loader {
            forward: Forward::Allow,
            ..LOADER
        },
    );
    assert_eq!(
        decide(&refuse, &attempt("10.0.0.1")).verdict,
        enforcer_ebpf::Verdict::Deny
    );
    assert_eq!(
        decide(&refuse, &attempt("127.0.0.1")).verdict,
        enforcer_ebpf::Verdict::Unjudged
    );
    assert_eq!(
        decide(&allow, &attempt("10.0.0.1")).verdict,
        enforcer_ebpf::Verdict::Unjudged
    );
}
