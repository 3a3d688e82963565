//! The state machine of names, time passed in.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::{Answer, Known, KnownName, MAX_ADDRESSES, MAX_RETRY, Names, Note, Outcome, RETRY};
use crate::policy::{Dns, Name, Unresolved};

const SECOND: Duration = Duration::from_secs(1);

fn dns() -> Dns {
    Dns {
        min_refresh: SECOND * 5,
        max_refresh: SECOND * 60,
        retain: SECOND * 3600,
        unresolved: Unresolved::Open,
    }
}

fn name(text: &str) -> Name {
    Name(text.to_owned())
}

fn names(start: Instant) -> Names {
    let mut names = Names::new(dns());
    names.random = || 0.5;
    names.set([name("bus"), name("other")].into(), start);
    names
}

fn ips(list: &[&str]) -> BTreeSet<IpAddr> {
    list.iter().filter_map(|text| text.parse().ok()).collect()
}

fn found(list: &[&str], ttl: u32) -> Outcome {
    Outcome::Found {
        addresses: ips(list),
        ttl: SECOND * ttl,
    }
}

fn answer(names: &mut Names, now: Instant, to: &str, a: Outcome, aaaa: Outcome) {
    names.begin(&name(to));
    names.answered(now, &name(to), Answer::Dns { a, aaaa });
}

fn known(names: &Names, now: Instant, of: &str) -> BTreeSet<IpAddr> {
    names.resolved(now).get(&name(of)).cloned().unwrap_or_default()
}

fn before(current: &[&str], left: &[&str]) -> Known {
    let known = KnownName {
        current: ips(current),
        left: ips(left),
    };
    [(name("bus"), known)].into()
}

fn failure() -> Outcome {
    Outcome::Failed("SERVFAIL".to_owned())
}

#[test]
fn only_a_positive_answer_changes_anything() {
    for bad in [failure(), Outcome::Empty] {
        let start = Instant::now();
        let mut names = names(start);
        answer(
            &mut names,
            start,
            "bus",
            found(&["10.0.0.1"], 30),
            found(&["2001:db8::1"], 30),
        );
        answer(&mut names, start + SECOND * 30, "bus", bad.clone(), bad.clone());
        assert_eq!(
            known(&names, start + SECOND * 30, "bus"),
            ips(&["10.0.0.1", "2001:db8::1"]),
            "{bad:?}"
        );
        assert!(
            names.report().iter().any(|report| report.name == "bus" && report.stale),
            "{bad:?}"
        );
        assert_eq!(
            known(&names, start + SECOND * 7200, "bus"),
            ips(&["10.0.0.1", "2001:db8::1"]),
            "current never expires"
        );
    }
}

#[test]
fn an_address_that_left_stays_for_retain() {
    let start = Instant::now();
    let mut names = names(start);
    answer(&mut names, start, "bus", found(&["10.0.0.1"], 30), Outcome::Empty);
    let moved = start + SECOND * 30;
    answer(&mut names, moved, "bus", found(&["10.0.0.2"], 30), Outcome::Empty);
    assert_eq!(
        known(&names, moved + SECOND * 3599, "bus"),
        ips(&["10.0.0.1", "10.0.0.2"])
    );
    assert_eq!(known(&names, moved + SECOND * 3600, "bus"), ips(&["10.0.0.2"]));
}

#[test]
fn one_family_never_answered_is_no_fault() {
    let start = Instant::now();
    let mut names = names(start);
    answer(&mut names, start, "bus", found(&["10.0.0.1"], 30), Outcome::Empty);
    assert!(names.report().iter().all(|report| !report.stale));
}

#[test]
fn a_dns_answer_may_not_name_this_host() {
    let start = Instant::now();
    let mut names = names(start);
    let bad = [
        "127.0.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
    ];
    let bad6 = ["::1", "fe80::1", "ff02::1", "::", "::ffff:127.0.0.1"];
    answer(&mut names, start, "bus", found(&bad, 30), found(&bad6, 30));
    assert_eq!(known(&names, start, "bus"), ips(&[]));
    names.answered(start, &name("bus"), Answer::Hosts(ips(&["127.0.0.1", "::1"])));
    assert_eq!(
        known(&names, start, "bus"),
        ips(&["127.0.0.1", "::1"]),
        "the hosts file may (N6)"
    );
}

#[test]
fn ttl_is_clamped_and_failures_back_off() {
    let start = Instant::now();
    let mut names = names(start);
    for (ttl, wait) in [(0, 5), (20, 20), (86_400, 60)] {
        answer(&mut names, start, "bus", found(&["10.0.0.1"], ttl), Outcome::Empty);
        answer(&mut names, start, "other", found(&["10.0.0.9"], 86_400), Outcome::Empty);
        assert_eq!(
            names.states.get(&name("bus")).map(|state| state.due),
            Some(start + SECOND * wait),
            "ttl {ttl}"
        );
    }
    let waits: Vec<u64> = (0..20)
        .map(|_| {
            answer(&mut names, start, "bus", failure(), failure());
            names
                .states
                .get(&name("bus"))
                .map_or(0, |state| (state.due - start).as_secs())
        })
        .collect();
    assert_eq!(
        waits,
        [
            5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 10, 20, 40, 80, 120, 120, 120, 120, 120, 120
        ]
    );
}

#[test]
fn too_many_addresses_drop_the_oldest_left() {
    let start = Instant::now();
    let mut names = names(start);
    let block = |third: u8, count: u16| -> Outcome {
        let addresses =
            (0..count).map(|last| IpAddr::V4(Ipv4Addr::new(10, 0, third, u8::try_from(last).unwrap_or(255))));
        Outcome::Found {
            addresses: addresses.collect(),
            ttl: SECOND * 30,
        }
    };
    answer(&mut names, start, "bus", block(1, 100), Outcome::Empty);
    answer(&mut names, start + SECOND, "bus", block(2, 100), Outcome::Empty);
    answer(&mut names, start + SECOND * 2, "bus", block(3, 100), Outcome::Empty);
    let now = known(&names, start + SECOND * 2, "bus");
    assert_eq!(now.len(), MAX_ADDRESSES);
    let of = |third: u8| {
        now.iter()
            .filter(|address| matches!(address, IpAddr::V4(v4) if v4.octets()[2] == third))
            .count()
    };
    assert_eq!((of(3), of(2), of(1)), (100, 100, 56));
}

#[test]
fn known_before_is_protected_before_any_answer() {
    let start = Instant::now();
    let mut names = names(start);
    names.restore(&before(&["10.0.0.1"], &[]), start);
    answer(&mut names, start, "bus", failure(), failure());
    assert_eq!(known(&names, start + SECOND * 3599, "bus"), ips(&["10.0.0.1"]));
}

#[test]
fn known_before_outlasts_retain_while_dns_is_away() {
    let start = Instant::now();
    let mut names = names(start);
    names.restore(&before(&["10.0.0.1", "2001:db8::1"], &[]), start);
    let mut now = start;
    for _ in 0..100 {
        now += SECOND * 120;
        names.due(now);
        answer(&mut names, now, "bus", failure(), Outcome::Missing);
    }
    assert_eq!(known(&names, now, "bus"), ips(&["10.0.0.1", "2001:db8::1"]), "N3, N7");
    answer(&mut names, now, "bus", found(&["10.0.0.2"], 30), failure());
    assert_eq!(
        known(&names, now + SECOND * 3600, "bus"),
        ips(&["10.0.0.2", "2001:db8::1"]),
        "only the family that was answered moves on"
    );
}

#[test]
fn a_lie_lets_nothing_go_that_was_known_before() {
    let start = Instant::now();
    let mut names = names(start);
    names.restore(&before(&["10.0.0.1", "2001:db8::1"], &["10.0.0.7"]), start);
    for bad in [found(&["127.0.0.1"], 30), Outcome::Empty, Outcome::Missing] {
        answer(&mut names, start, "bus", bad.clone(), bad.clone());
        let later = known(&names, start + SECOND * 7200, "bus");
        assert_eq!(later, ips(&["10.0.0.1", "2001:db8::1"]), "{bad:?} (N3, N6)");
    }
    assert_eq!(
        known(&names, start + SECOND * 3599, "bus"),
        ips(&["10.0.0.1", "10.0.0.7", "2001:db8::1"]),
        "what had left is retained anew"
    );
    let now = start + SECOND * 10;
    assert_eq!(names.known(now), before(&["10.0.0.1", "2001:db8::1"], &["10.0.0.7"]));
    answer(&mut names, now, "bus", found(&["10.0.0.7"], 30), Outcome::Missing);
    assert_eq!(names.known(now), before(&["10.0.0.7", "2001:db8::1"], &["10.0.0.1"]));
}

#[test]
fn a_failing_family_does_not_slow_down_the_other() {
    let start = Instant::now();
    let mut names = names(start);
    for _ in 0..30 {
        answer(&mut names, start, "bus", found(&["10.0.0.1"], 20), failure());
    }
    let due = names.states.get(&name("bus")).map(|state| state.due);
    assert_eq!(due, Some(start + SECOND * 20));
}

#[test]
fn a_name_denied_for_want_of_one_family_is_no_fault() {
    let start = Instant::now();
    let mut names = names(start);
    answer(&mut names, start, "bus", found(&["10.0.0.1"], 30), Outcome::Missing);
    assert!(names.report().iter().all(|report| !report.stale));
    answer(&mut names, start, "other", Outcome::Missing, Outcome::Missing);
    let cause = names.report().into_iter().find_map(|report| report.cause);
    assert_eq!(cause.as_deref(), Some("the name does not exist (NXDOMAIN)"));
}

#[test]
fn the_hosts_file_may_not_name_everything() {
    let start = Instant::now();
    let mut names = names(start);
    names.answered(
        start,
        &name("bus"),
        Answer::Hosts(ips(&["10.0.0.1", "0.0.0.0", "ff02::1"])),
    );
    assert_eq!(known(&names, start, "bus"), ips(&["10.0.0.1"]));
    let notes = names.answered(start, &name("bus"), Answer::Hosts(ips(&["::", "::ffff:224.0.0.1"])));
    assert_eq!(known(&names, start, "bus"), ips(&["10.0.0.1"]), "N3");
    assert!(notes.iter().any(|note| matches!(note, Note::Stale(..))), "{notes:?}");
}

#[test]
fn an_address_in_both_families_is_one() {
    let start = Instant::now();
    let mut names = names(start);
    let (mapped, both) = (found(&["::ffff:10.0.0.1"], 30), ips(&["10.0.0.1"]));
    answer(&mut names, start, "bus", found(&["10.0.0.1"], 30), mapped);
    answer(
        &mut names,
        start,
        "bus",
        found(&["10.0.0.1"], 30),
        found(&["2001:db8::1"], 30),
    );
    assert!(
        names
            .states
            .get(&name("bus"))
            .is_some_and(|state| state.left.is_empty())
    );
    assert!(known(&names, start, "bus").is_superset(&both));
}

#[test]
fn an_answer_too_large_by_itself_is_cut_and_reported_once() {
    let start = Instant::now();
    let mut names = names(start);
    let many: BTreeSet<IpAddr> = (0..300_u32).map(|i| Ipv4Addr::from(0x0a00_0000 + i).into()).collect();
    let all = || Outcome::Found {
        addresses: many.clone(),
        ttl: SECOND * 30,
    };
    let first = many.iter().copied().take(MAX_ADDRESSES).collect();
    for reports in [1, 0] {
        let dns = Answer::Dns {
            a: all(),
            aaaa: Outcome::Empty,
        };
        let notes = names.answered(start, &name("bus"), dns);
        assert_eq!(known(&names, start, "bus"), first);
        let told = notes
            .iter()
            .filter(|note| **note == Note::TooMany(name("bus"), 44))
            .count();
        assert_eq!(told, reports, "{notes:?}");
    }
}

fn outcome() -> impl Strategy<Value = Outcome> {
    let address = (0_u8..6).prop_map(|last| IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)));
    prop_oneof![
        (proptest::collection::btree_set(address, 1..4), 0_u32..200).prop_map(|(addresses, ttl)| Outcome::Found {
            addresses,
            ttl: SECOND * ttl
        }),
        Just(Outcome::Empty),
        Just(Outcome::Missing),
        Just(failure()),
    ]
}

/// As `outcome`, with lies, both families, and answers too large.
fn any_outcome() -> impl Strategy<Value = Outcome> {
    let v4 = |last: u8| IpAddr::V4(Ipv4Addr::new(10, 0, 0, last));
    let found = |addresses| Outcome::Found { addresses, ttl: SECOND };
    prop_oneof![
        4 => proptest::collection::btree_set((0_u8..12).prop_map(v4), 1..6).prop_map(found),
        1 => Just(found(ips(&["127.0.0.1", "::1"]))),
        1 => Just(found(ips(&["127.0.0.1", "10.0.0.3"]))),
        1 => (0_u8..4, 100_u16..300).prop_map(move |(third, count)| {
            let hosts = (0..count).map(|host| {
                let [high, low] = host.to_be_bytes();
                IpAddr::V4(Ipv4Addr::new(10, 1 + third, high, low))
            });
            found(hosts.collect())
        }),
        3 => outcome(),
    ]
}

/// The same of the other family.
fn as_v6(outcome: Outcome) -> Outcome {
    let v6 = |address: IpAddr| match address {
        IpAddr::V4(v4) if v4.is_loopback() => std::net::Ipv6Addr::LOCALHOST.into(),
        IpAddr::V4(v4) => std::net::Ipv6Addr::from((0x2001_0db8 << 96) | u128::from(v4.to_bits())).into(),
        v6 @ IpAddr::V6(_) => v6,
    };
    match outcome {
        Outcome::Found { addresses, ttl } => Outcome::Found {
            addresses: addresses.into_iter().map(v6).collect(),
            ttl,
        },
        Outcome::Empty | Outcome::Missing | Outcome::Failed(_) => outcome,
    }
}

proptest! {
    /// N3, N4: whatever was answered within `retain` is protected, whatever came since, and no name touches another.
    #[test]
    fn answered_within_retain_is_protected(answers in proptest::collection::vec((outcome(), 0_u32..900), 1..20)) {
        let mut now = Instant::now();
        let mut names = names(now);
        answer(&mut names, now, "other", found(&["10.9.9.9"], 30), Outcome::Empty);
        let mut seen: Vec<(IpAddr, Instant)> = Vec::new();
        for (outcome, pause) in answers {
            now += SECOND * pause;
            names.due(now);
            if let Outcome::Found { addresses, .. } = &outcome {
                seen.extend(addresses.iter().map(|address| (*address, now)));
            }
            answer(&mut names, now, "bus", outcome, Outcome::Empty);
            let protected = known(&names, now, "bus");
            for (address, at) in &seen {
                prop_assert!(now - *at >= SECOND * 3600 || protected.contains(address));
            }
            prop_assert_eq!(known(&names, now, "other"), ips(&["10.9.9.9"]));
        }
    }

    /// N3, N4: whatever comes of three names, over restarts too: nothing current is let go but for a newer positive answer of its
    /// family, nothing that left before `retain` is over, no name has more than 256 addresses or touches another, none is refused (N6).
    #[test]
    fn whatever_comes_invariants_hold(steps in proptest::collection::vec((0_usize..3, any_outcome(), any_outcome().prop_map(as_v6), 0_u32..2000, 0_u8..10), 1..40)) {
        let all = ["one", "two", "three"];
        let mut now = Instant::now();
        let fresh = |now| {
            let mut names = Names::new(dns());
            names.random = || 0.5;
            names.set(all.iter().map(|text| name(text)).collect(), now);
            names
        };
        let mut names = fresh(now);
        // For each name and family: the last usable answer; and when each address was last known to be in one.
        let mut current: BTreeMap<(usize, bool), BTreeSet<IpAddr>> = BTreeMap::new();
        let mut seen: BTreeMap<(usize, IpAddr), Instant> = BTreeMap::new();
        for (which, a, aaaa, pause, dice) in steps {
            now += SECOND * pause;
            for ((of, _), addresses) in &current {
                seen.extend(addresses.iter().map(|address| ((*of, *address), now)));
            }
            if dice == 0 {
                let before = names.known(now);
                names = fresh(now);
                names.restore(&before, now);
                prop_assert_eq!(names.known(now), before);
            }
            names.due(now);
            let others = |names: &Names| -> Vec<_> {
                all.iter().enumerate().filter(|(at, _)| *at != which).map(|(_, of)| known(names, now, of)).collect()
            };
            let before = others(&names);
            let small = [&a, &aaaa].iter().all(|outcome| !matches!(outcome, Outcome::Found { addresses, .. } if addresses.len() > 20));
            for (v4, outcome) in [(true, &a), (false, &aaaa)] {
                if let Outcome::Found { addresses, .. } = outcome {
                    let good: BTreeSet<IpAddr> = addresses.iter().copied().filter(|address| !address.is_loopback()).collect();
                    if !good.is_empty() {
                        seen.extend(good.iter().map(|address| ((which, *address), now)));
                        current.insert((which, v4), good);
                    }
                }
            }
            let Some(text) = all.get(which) else { continue };
            answer(&mut names, now, text, a, aaaa);
            prop_assert_eq!(others(&names), before, "one name touched another");
            let protected = known(&names, now, text);
            prop_assert!(protected.len() <= MAX_ADDRESSES);
            prop_assert!(protected.iter().all(|address| !address.is_loopback()));
            if !small || protected.len() == MAX_ADDRESSES {
                // The cap may have let addresses go: from here on the model knows no better.
                seen.retain(|(of, address), _| *of != which || protected.contains(address));
                for addresses in current.iter_mut().filter(|((of, _), _)| *of == which).map(|(_, addresses)| addresses) {
                    addresses.retain(|address| protected.contains(address));
                }
                continue;
            }
            let is_current = |address: &IpAddr| current.iter().any(|((of, _), addresses)| *of == which && addresses.contains(address));
            for ((of, address), at) in &seen {
                let must = *of == which && (is_current(address) || now - *at < SECOND * 3600);
                prop_assert!(!must || protected.contains(address), "{} was let go", address);
            }
        }
    }

    /// N2: every wait is within the bounds, whatever the dice say.
    #[test]
    fn waits_are_within_bounds(answers in proptest::collection::vec((outcome(), outcome()), 1..40), high in any::<bool>()) {
        let now = Instant::now();
        let mut names = names(now);
        names.random = if high { || 1.0 } else { || 0.0 };
        for (a, aaaa) in answers {
            answer(&mut names, now, "bus", a, aaaa);
            let Some(state) = names.states.get(&name("bus")) else { continue };
            let wait = state.due - now;
            prop_assert!(wait >= RETRY.mul_f64(0.9) && wait <= MAX_RETRY, "{wait:?}");
            prop_assert!(state.stale.is_some() || (wait >= SECOND * 5 && wait <= SECOND * 60), "{wait:?}");
        }
    }
}
