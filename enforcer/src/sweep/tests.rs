//! Who is found, and in doubt.

#![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

use std::{collections::BTreeSet, net::SocketAddr};

use proptest::prelude::*;

use super::{Cgroups, Connection, Doubt, Listener, judge, mark_accepted};
use crate::{
    policy::{CgroupPath, Mode, Protocol, Uid},
    ruleset::{Attempt, Cgroup, Place, RulePrincipal, RuleSet, RuleTarget, Subject, explain, owners},
    wire::SocketState,
};

fn user(uid: u32) -> RulePrincipal {
    RulePrincipal::User {
        uid: Uid(uid),
        cgroup: None,
    }
}

fn within(uid: u32, id: u64) -> RulePrincipal {
    RulePrincipal::User {
        uid: Uid(uid),
        cgroup: CgroupPath::parse("/a").ok().map(|path| (path, Cgroup { id, level: 1 })),
    }
}

fn rules(principals: Vec<RulePrincipal>) -> RuleSet {
    let place = |net: &str| Place {
        protocol: Protocol::Tcp,
        port: 4222,
        net: net.parse().unwrap_or_default(),
    };
    let mut places = vec![(place("10.0.0.5/32"), 1), (place("2001:db8::/64"), 1)];
    places.sort_unstable();
    RuleSet {
        mode: Mode::Enforce,
        targets: vec![RuleTarget {
            name: "main".to_owned(),
            principals,
        }],
        places,
        nat64: Vec::new(),
        named_ports: BTreeSet::new(),
    }
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| SocketAddr::from(([0; 4], 0)))
}

fn connection(uid: u32, remote: &str) -> Connection {
    Connection {
        protocol: Protocol::Tcp,
        state: SocketState::Established,
        local: at("10.0.0.1:40000"),
        remote: at(remote),
        interface: 0,
        uid: Uid(uid),
        held: true,
        cgroup: Some(7),
        cookie: [1; 8],
    }
}

/// Cgroup 1 is the root, 5 below it, 7 below that; 8 beside it.
fn tree(judged: Option<u64>) -> Cgroups {
    Cgroups {
        judged,
        parents: [(1, 1), (5, 1), (7, 5), (8, 1)].into(),
    }
}

fn check(who: &str, principals: Vec<RulePrincipal>, cgroups: &Cgroups, connection: &Connection, expected: &str) {
    let found = judge(&rules(principals), cgroups, connection).map(|found| (found.user, found.doubt));
    let said = match found {
        None => "allowed",
        Some((None, None)) => "the kernel's",
        Some((Some(_), None)) => "a user's",
        Some((_, Some(Doubt::Cgroup))) => "in doubt",
        Some((_, Some(Doubt::Accepted))) => "accepted",
    };
    assert_eq!(said, expected, "{who}");
}

#[test]
fn those_that_the_rules_refuse_are_found() {
    let all = Cgroups::default();
    let one = |uid, remote| connection(uid, remote);
    let roots = || vec![user(0)];
    check("root", roots(), &all, &one(0, "10.0.0.5:4222"), "allowed");
    check("another user", roots(), &all, &one(9, "10.0.0.5:4222"), "a user's");
    check("mapped", roots(), &all, &one(9, "[::ffff:10.0.0.5]:4222"), "a user's");
    check("prefix", roots(), &all, &one(9, "[2001:db8::9]:4222"), "a user's");
    check("another port", roots(), &all, &one(9, "10.0.0.5:4223"), "allowed");
    check("another address", roots(), &all, &one(9, "10.0.0.6:4222"), "allowed");
    let udp = Connection {
        protocol: Protocol::Udp,
        ..one(9, "10.0.0.5:4222")
    };
    check("another protocol", roots(), &all, &udp, "allowed");
}

#[test]
fn what_may_be_the_kernels_is_not_refused_where_the_kernel_may() {
    let all = Cgroups::default();
    let kernel = || vec![RulePrincipal::Kernel];
    let root = connection(0, "10.0.0.5:4222");
    check("root's or the kernel's", kernel(), &all, &root, "allowed");
    check("a user's", kernel(), &all, &connection(9, "10.0.0.5:4222"), "a user's");
    check("root's, refused", vec![user(9)], &all, &root, "a user's");
    for state in [SocketState::Established, SocketState::SynSent, SocketState::CloseWait] {
        let unheld = Connection {
            held: false,
            state,
            ..root.clone()
        };
        check("held by nobody", kernel(), &all, &unheld, "allowed");
        check("held by nobody", vec![user(0)], &all, &unheld, "the kernel's");
    }
    for state in [
        SocketState::FinWait1,
        SocketState::FinWait2,
        SocketState::LastAck,
        SocketState::Closing,
    ] {
        let closed = Connection {
            held: false,
            state,
            ..root.clone()
        };
        check(
            "closed, perhaps by an allowed user",
            vec![user(9)],
            &all,
            &closed,
            "allowed",
        );
        let ninth = Connection { uid: Uid(9), ..closed };
        check("closed by a user who may not", vec![user(0)], &all, &ninth, "a user's");
    }
    let half = Connection {
        held: false,
        state: SocketState::SynReceived,
        ..root
    };
    check("called from elsewhere", vec![user(9)], &all, &half, "allowed");
}

#[test]
fn cgroups_decide_where_they_are_known() {
    let all = tree(None);
    let root = connection(0, "10.0.0.5:4222");
    check("below", vec![within(0, 5)], &all, &root, "allowed");
    check("beside", vec![within(0, 8)], &all, &root, "a user's");
    let anybody = |id| {
        let path = CgroupPath::parse("/a").expect("a path");
        vec![RulePrincipal::Anybody {
            cgroup: (path, Cgroup { id, level: 1 }),
        }]
    };
    let ninth = connection(9, "10.0.0.5:4222");
    check("anybody below", anybody(5), &all, &ninth, "allowed");
    check("anybody beside", anybody(8), &all, &ninth, "a user's");
    let unknown = Connection { cgroup: None, ..ninth };
    check("anybody, unknown where", anybody(5), &all, &unknown, "in doubt");
    check("another user below", vec![within(9, 5)], &all, &root, "a user's");
    for cgroup in [None, Some(99)] {
        let unknown = Connection { cgroup, ..root.clone() };
        check("unknown", vec![within(0, 5)], &all, &unknown, "in doubt");
        check("unknown, and no matter", vec![within(9, 5)], &all, &unknown, "a user's");
        check(
            "perhaps not judged",
            vec![user(9)],
            &tree(Some(5)),
            &unknown,
            "in doubt",
        );
    }
    check("judged", vec![user(9)], &tree(Some(5)), &root, "a user's");
    check("not judged", vec![user(9)], &tree(Some(8)), &root, "allowed");
}

#[test]
fn what_may_have_been_accepted_is_in_doubt() {
    let local: BTreeSet<_> = ["10.0.0.0/31", "10.0.0.5/32"]
        .into_iter()
        .filter_map(|net| net.parse().ok())
        .collect();
    let doubt = |listeners: &[&str], local: &BTreeSet<_>, held| {
        let listeners: Vec<Listener> = listeners
            .iter()
            .map(|text| Listener {
                protocol: Protocol::Tcp,
                at: at(text),
            })
            .collect();
        let connection = Connection {
            held,
            ..connection(9, "10.0.0.5:4222")
        };
        let found = judge(&rules(vec![user(0)]), &Cgroups::default(), &connection);
        let kept = mark_accepted(found.into_iter().collect(), &listeners, local);
        kept.first().map(|found| found.doubt)
    };
    assert_eq!(doubt(&[], &local, true), Some(None));
    assert_eq!(doubt(&["0.0.0.0:40000"], &local, true), Some(Some(Doubt::Accepted)));
    assert_eq!(doubt(&["[::]:40000"], &local, true), Some(Some(Doubt::Accepted)));
    assert_eq!(doubt(&["10.0.0.9:40000"], &local, true), Some(None));
    // The endpoint's own listener is here: it was dialled.
    assert_eq!(doubt(&["[::]:40000", "[::]:4222"], &local, true), Some(None));
    // A listener on every address of this host is not on another's.
    assert_eq!(
        doubt(&["[::]:40000", "[::]:4222"], &BTreeSet::new(), true),
        Some(Some(Doubt::Accepted))
    );
    assert_eq!(doubt(&["[::]:40000"], &local, false), None);
}

#[test]
fn remedies_are_named() {
    let text = |error: super::SweepError| error.to_string();
    let refused = super::SweepError::Cut {
        protocol: Protocol::Tcp,
        remote: at("10.0.0.5:4222"),
        error: std::io::Error::from_raw_os_error(libc::EOPNOTSUPP),
    };
    assert!(text(refused).contains("CONFIG_INET_DIAG_DESTROY"));
    let unlisted = super::SweepError::List {
        protocol: Protocol::Udp,
        v6: true,
        error: std::io::Error::from_raw_os_error(libc::ENOENT),
    };
    assert!(text(unlisted).contains("CONFIG_INET_UDP_DIAG"));
}

proptest! {
    /// The fast lookup finds the owners that the oracle finds.
    #[test]
    fn owners_are_as_explained(
        nets in prop::collection::vec((0_u8..4, 0_u8..=32, any::<bool>(), 0_u16..2, 0_u64..4), 0..20),
        (last, v6, port) in (0_u8..4, any::<bool>(), 0_u16..2),
    ) {
        let address = |last: u8, v6: bool| if v6 {
            std::net::IpAddr::from([0x2001, 0, 0, 0, 0, 0, 0, u16::from(last)])
        } else {
            std::net::IpAddr::from([10, 0, 0, last])
        };
        let mut rules = rules(Vec::new());
        rules.targets.extend(rules.targets.clone());
        rules.places = nets
            .into_iter()
            .filter_map(|(last, length, v6, port, bits)| {
                let length = if v6 { length + 96 } else { length };
                let net = ipnet::IpNet::new(address(last, v6), length).ok()?.trunc();
                Some((Place { protocol: Protocol::Tcp, port, net }, bits))
            })
            .collect();
        rules.places.sort_unstable();
        rules.places.dedup_by_key(|(place, _)| *place);
        let attempt = Attempt {
            protocol: Protocol::Tcp,
            address: address(last, v6),
            port,
            foreign_netns: false,
            subject: Subject { task: Uid(0), socket: None, kernel_thread: false, cgroups: Vec::new() },
        };
        let explained = explain(&rules, &attempt).owners.iter().fold(0, |bits, (index, _)| bits | 1_u64 << index);
        prop_assert_eq!(owners(&rules, Protocol::Tcp, attempt.address, port) & 3, explained);
    }
}
