//! The state machine of names, time passed in.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::{Known, KnownName, LookupAnswer, MAX_ADDRESSES, MAX_RETRY, Names, Note, Outcome, RETRY};
use crate::policy::{AcceptedAnswers, Dns, Name, Unresolved};

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

fn asked(names: impl IntoIterator<Item = Name>) -> BTreeMap<Name, AcceptedAnswers> {
    names
        .into_iter()
        .map(|name| (name, AcceptedAnswers::Routable))
        .collect()
}

fn names(start: Instant) -> Names {
    let mut names = Names::new(dns());
    names.random = || 0.5;
    names.set(asked([name("bus"), name("other")]), start);
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
    names.answered(now, &name(to), LookupAnswer::Dns { a, aaaa });
}

fn known(names: &Names, now: Instant, of: &str) -> BTreeSet<IpAddr> {
    names.resolved(now).get(&name(of)).cloned().unwrap_or_default()
}

fn before(current: &[&str], left: &[&str]) -> Known {
    let known = KnownName {
        current: ips(current),
        left: ips(left),
        ..KnownName::default()
    };
    [(name("bus"), known)].into()
}

/// What is known, without for how long.
fn untimed(mut known: Known) -> Known {
    for known in known.values_mut() {
        known.answered.clear();
    }
    known
}

/// The first addresses of 10.0.`third`.0/24 and what follows.
fn block(third: u8, count: u32) -> Outcome {
    let first = u32::from(Ipv4Addr::new(10, 0, third, 0));
    Outcome::Found {
        addresses: (first..first + count)
            .map(|address| Ipv4Addr::from(address).into())
            .collect(),
        ttl: SECOND * 30,
    }
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
    names.answered(start, &name("bus"), LookupAnswer::Hosts(ips(&["127.0.0.1", "::1"])));
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
fn n4_one_lie_of_256_opens_nothing() {
    let start = Instant::now();
    let mut names = names(start);
    let truth = || found(&["10.9.9.9"], 30);
    answer(&mut names, start, "bus", truth(), Outcome::Empty);
    let mut now = start + SECOND * 60;
    answer(&mut names, now, "bus", truth(), Outcome::Empty);
    // As large as they come, for nearly as long as the truth is retained, and each for a shorter time than the truth
    // was one.
    for round in 0..118_u8 {
        now += SECOND * 30;
        names.due(now);
        answer(&mut names, now, "bus", block(round, 256), Outcome::Empty);
        let protected = known(&names, now, "bus");
        assert!(protected.is_superset(&ips(&["10.9.9.9"])), "round {round}");
        assert!(protected.len() <= 2 * MAX_ADDRESSES);
    }
    assert_eq!(known(&names, now, "bus").len(), 2 * MAX_ADDRESSES);
    names.due(start + SECOND * 60 + SECOND * 30 + SECOND * 3600);
    assert!(!known(&names, now + SECOND * 90, "bus").is_superset(&ips(&["10.9.9.9"])));
}

#[test]
fn n4_of_what_left_what_was_an_answer_for_the_shortest_time_goes_first() {
    let start = Instant::now();
    let mut names = names(start);
    let mut now = start;
    // 200 for 50 s, 100 for 10 s, 100 for 30 s, then another.
    for (third, seconds) in [(1, 50), (2, 10), (3, 30)] {
        answer(
            &mut names,
            now,
            "bus",
            block(third, if third == 1 { 200 } else { 100 }),
            Outcome::Empty,
        );
        now += SECOND * seconds;
    }
    answer(&mut names, now, "bus", found(&["10.0.4.1"], 30), Outcome::Empty);
    let protected = known(&names, now, "bus");
    let of = |third: u8| {
        let of = |address: &&IpAddr| matches!(address, IpAddr::V4(v4) if v4.octets()[2] == third);
        protected.iter().filter(of).count()
    };
    assert_eq!((of(1), of(2), of(3), of(4)), (200, 0, 56, 1));
}

#[test]
fn n4_silence_does_not_make_one_answer_last() {
    let start = Instant::now();
    let mut names = names(start);
    answer(&mut names, start, "bus", found(&["10.0.0.1"], 30), Outcome::Empty);
    answer(
        &mut names,
        start + SECOND * 61,
        "bus",
        found(&["10.0.0.2"], 30),
        Outcome::Empty,
    );
    let mut now = start + SECOND * 70;
    answer(&mut names, now, "bus", failure(), failure());
    now += SECOND * 3000;
    answer(&mut names, now, "bus", found(&["10.0.0.3"], 30), Outcome::Empty);
    let known = names.known(now);
    let answered = |address: &str| {
        let known = known.get(&name("bus"))?;
        known.answered.get(&address.parse().ok()?).copied()
    };
    assert_eq!(answered("10.0.0.1"), Some(SECOND * 60));
    assert_eq!(
        answered("10.0.0.2"),
        Some(SECOND * 60),
        "one answer counted for the silence after it"
    );
    assert_eq!(answered("10.0.0.3"), Some(Duration::ZERO));
}

#[test]
fn n4_what_is_known_finds_room_in_an_answer_too_large() {
    let start = Instant::now();
    let mut names = names(start);
    // The greatest of all, so that no order of numbers favours it.
    let truth = "10.200.0.1";
    answer(&mut names, start, "bus", found(&[truth], 30), Outcome::Empty);
    let Outcome::Found { mut addresses, ttl } = block(0, 300) else {
        return;
    };
    addresses.extend(ips(&[truth]));
    let large = Outcome::Found { addresses, ttl };
    answer(&mut names, start + SECOND * 5, "bus", large, Outcome::Empty);
    // Whatever it is, it is still current, and stays so without any further answer.
    let later = known(&names, start + SECOND * 7200, "bus");
    assert!(later.is_superset(&ips(&[truth])) && later.len() == MAX_ADDRESSES);
    let report = names.report();
    assert!(
        report.iter().any(|report| report.name == "bus" && report.cut == 45),
        "{report:?}"
    );
    answer(
        &mut names,
        start + SECOND * 10,
        "bus",
        found(&[truth], 30),
        Outcome::Empty,
    );
    assert!(names.report().iter().all(|report| report.cut == 0));
}

#[test]
fn n4_a_lie_in_one_family_leaves_room_for_the_other() {
    let start = Instant::now();
    let mut names = names(start);
    let mut now = start;
    answer(&mut names, now, "bus", found(&["10.9.9.1"], 30), as_v6(block(0, 256)));
    // That family falls silent, and the service moves.
    for host in 2..100_u8 {
        now += SECOND * 30;
        let address = format!("10.9.9.{host}");
        answer(&mut names, now, "bus", found(&[&address], 30), failure());
        assert!(known(&names, now, "bus").is_superset(&ips(&[&address])), "{address}");
        let kept = known(&names, now, "bus")
            .iter()
            .filter(|address| address.is_ipv6())
            .count();
        assert!(kept >= 255, "{kept} are left of the other family");
    }
    // Both new at once: each has some of it.
    answer(&mut names, now, "other", block(0, 256), as_v6(block(0, 256)));
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = known(&names, now, "other").into_iter().partition(IpAddr::is_ipv4);
    assert_eq!((v4.len(), v6.len()), (128, 128));
}

#[test]
fn n4_of_a_file_without_times_addresses_count_as_retained_ones() {
    let start = Instant::now();
    let mut names = names(start);
    names.restore(&before(&["10.9.9.9"], &[]), start);
    let mut now = start;
    for round in 0..100_u8 {
        answer(&mut names, now, "bus", block(round, 256), Outcome::Empty);
        now += SECOND * 30;
        names.due(now);
    }
    assert!(known(&names, now, "bus").is_superset(&ips(&["10.9.9.9"])));
}

#[test]
fn n4_what_is_saved_changes_seldom_by_time_alone() {
    let start = Instant::now();
    let mut names = names(start);
    let mut saved = BTreeSet::new();
    for minute in 0..60 * 24 * 30 {
        let now = start + SECOND * 60 * minute;
        answer(&mut names, now, "bus", found(&["10.0.0.1"], 60), Outcome::Empty);
        saved.insert(format!("{:?}", names.known(now)));
    }
    assert!((10..130).contains(&saved.len()), "{}", saved.len());
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
    assert_eq!(
        untimed(names.known(now)),
        before(&["10.0.0.1", "2001:db8::1"], &["10.0.0.7"])
    );
    answer(&mut names, now, "bus", found(&["10.0.0.7"], 30), Outcome::Missing);
    assert_eq!(
        untimed(names.known(now)),
        before(&["10.0.0.7", "2001:db8::1"], &["10.0.0.1"])
    );
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
        LookupAnswer::Hosts(ips(&["10.0.0.1", "0.0.0.0", "ff02::1"])),
    );
    assert_eq!(known(&names, start, "bus"), ips(&["10.0.0.1"]));
    let notes = names.answered(
        start,
        &name("bus"),
        LookupAnswer::Hosts(ips(&["::", "::ffff:224.0.0.1"])),
    );
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
            .is_some_and(|state| state.addresses.departures().next().is_none())
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
        let dns = LookupAnswer::Dns {
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

/// What a liar says: a few that come again, blocks of any size, failures.
fn lie() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        2 => (0_u8..4, 1_u32..6).prop_map(|(third, count)| block(third, count)),
        2 => (0_u8..12, 1_u32..300).prop_map(|(third, count)| block(third, count)),
        2 => (0_u8..12).prop_map(|third| block(third, 256)),
        1 => Just(failure()),
        1 => Just(Outcome::Empty),
    ]
}

/// For how long each address was an answer, and until when: kept apart from what is tested, by the words of N4.
#[derive(Default)]
struct Model(BTreeMap<IpAddr, Truth>);

#[derive(Debug)]
struct Truth {
    family: usize,
    current: bool,
    total: Duration,
    /// What restarts have left of it at least: each rounds it down by an eighth at most.
    least: Duration,
    /// From which answer on it counts.
    since: Option<Instant>,
    /// Until when it was an answer at least.
    until: Instant,
}

impl Model {
    fn answered(&mut self, now: Instant, family: usize, outcome: &Outcome) {
        let Outcome::Found { addresses, .. } = outcome else {
            for truth in self.0.values_mut().filter(|truth| truth.current) {
                truth.until = now;
            }
            return;
        };
        for (address, truth) in &mut self.0 {
            if !truth.current || truth.family != family {
                continue;
            }
            let since = truth.since.take();
            let more = since.map_or(Duration::ZERO, |since| (now - since).min(SECOND * 60));
            (truth.total, truth.least) = (truth.total + more, truth.least + more);
            truth.current = addresses.contains(address);
            truth.since = truth.current.then_some(now);
            truth.until = now;
        }
        for address in addresses {
            let truth = self.0.entry(*address).or_insert(Truth {
                family,
                current: true,
                total: Duration::ZERO,
                least: Duration::ZERO,
                since: Some(now),
                until: now,
            });
            (truth.current, truth.since, truth.until) = (true, Some(now), now);
        }
    }

    /// What found no room among the current ones is an answer no longer, and what is not protected is forgotten.
    fn keep(&mut self, protected: &BTreeSet<IpAddr>, current: &BTreeSet<IpAddr>) {
        self.0.retain(|address, truth| {
            truth.current &= current.contains(address);
            truth.since = truth.since.filter(|_| truth.current);
            protected.contains(address)
        });
    }

    /// What was retained long enough may be forgotten, also where the next answer has it again; a restart retains it
    /// from then on.
    fn expire(&mut self, now: Instant, protected: &BTreeSet<IpAddr>) {
        self.0
            .retain(|address, truth| truth.current || now < truth.until + SECOND * 3600 || protected.contains(address));
    }

    /// What came between the last answer and the restart is not known any more.
    fn restarted(&mut self, now: Instant) {
        for truth in self.0.values_mut() {
            truth.since = None;
            truth.least = truth.least.mul_f64(0.875);
            truth.until = if truth.current { now } else { truth.until };
        }
    }
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
        Outcome::Empty | Outcome::Missing | Outcome::Failed(_) | Outcome::Awaited => outcome,
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

    /// N3, N4: whatever comes of three names, over restarts too: nothing current is let go but for a newer positive
    /// answer of its family, nothing that left before `retain` is over, no name has more than 256 and 256 addresses or
    /// touches another, none is refused (N6).
    #[test]
    fn whatever_comes_invariants_hold(steps in proptest::collection::vec((0_usize..3, any_outcome(), any_outcome().prop_map(as_v6), 0_u32..2000, 0_u8..10), 1..40)) {
        let all = ["one", "two", "three"];
        let mut now = Instant::now();
        let fresh = |now| {
            let mut names = Names::new(dns());
            names.random = || 0.5;
            names.set(asked(all.iter().map(|text| name(text))), now);
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
            prop_assert!(protected.len() <= 2 * MAX_ADDRESSES);
            prop_assert!(protected.iter().all(|address| !address.is_loopback()));
            if !small || protected.len() > MAX_ADDRESSES {
                // The cap may have let addresses go: from here on the model knows no better.
                seen.retain(|(of, address), _| *of != which || protected.contains(address));
                let saved = names.known(now).remove(&name(text)).unwrap_or_default();
                for addresses in current.iter_mut().filter(|((of, _), _)| *of == which).map(|(_, addresses)| addresses) {
                    addresses.retain(|address| saved.current.contains(address));
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

proptest! {
    // Hundreds of addresses an answer.
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// N4: a resolver that lies as it likes, over restarts too, lets go of nothing within `retain` while fewer than 256
    /// others that were answers for at least as long are retained. Each restart rounds times down by an eighth at most.
    #[test]
    fn n4_no_lie_opens_what_was_true_for_longer(steps in proptest::collection::vec((lie(), lie().prop_map(as_v6), 1_u32..240, 0_u8..12), 1..40)) {
        let mut now = Instant::now();
        let mut names = names(now);
        let mut model = Model::default();
        for (a, aaaa, pause, dice) in steps {
            now += SECOND * pause;
            if dice == 0 {
                let saved = names.known(now);
                names = self::names(now);
                names.restore(&saved, now);
                model.restarted(now);
            }
            names.due(now);
            model.expire(now, &known(&names, now, "bus"));
            model.answered(now, 0, &a);
            model.answered(now, 1, &aaaa);
            answer(&mut names, now, "bus", a, aaaa);
            let protected = known(&names, now, "bus");
            let saved = names.known(now).remove(&name("bus")).unwrap_or_default();
            prop_assert!(saved.current.len() <= MAX_ADDRESSES && saved.left.len() <= MAX_ADDRESSES);
            prop_assert_eq!(saved.current.len() + saved.left.len(), protected.len());
            let times = |addresses: &BTreeSet<IpAddr>| {
                let mut times: Vec<Duration> = addresses.iter().filter_map(|address| Some(model.0.get(address)?.total)).collect();
                times.sort_unstable();
                times
            };
            let (left, current) = (times(&saved.left), times(&saved.current));
            for (address, truth) in &model.0 {
                if protected.contains(address) || now >= truth.until + SECOND * 3600 {
                    continue;
                }
                let least = truth.least.saturating_sub(SECOND);
                let as_long = |times: &[Duration]| times.len() - times.partition_point(|time| *time < least);
                // What was not known before may have found no room in an answer too large.
                let cut = truth.total.is_zero() && as_long(&current) == MAX_ADDRESSES;
                prop_assert!(as_long(&left) == MAX_ADDRESSES || cut, "{} ({:?}) was let go beside \
                    {:?}", address, truth, left);
            }
            model.keep(&protected, &saved.current);
        }
    }
}
