//! Grants as a book, and what is read back of them.

#![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;

use super::{
    Asker, GrantOutcome, Grantee, Grants, Key, LimitError, MAX_GRANTS, Moment, Term, check_depths,
    file::{Fault, parse, text},
};
use crate::policy::{CgroupPath, Dns, Mode, Policy, Principal, Target, Uid};

fn path(text: &str) -> CgroupPath {
    CgroupPath::parse(text).expect("a cgroup path")
}

fn key(target: &str, cgroup: &str) -> Key {
    Key {
        target: target.to_owned(),
        to: Grantee::Cgroup(path(cgroup)),
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::UNIX_EPOCH + SignedDuration::from_secs(second)
}

fn term(since: i64, expires: Option<i64>) -> Term {
    Term {
        since: at(since),
        expires: expires.map(at),
        by: Asker {
            pid: 1,
            uid: 0,
            comm: "job \"\u{1b}[".to_owned(),
            ..Asker::default()
        },
        own: since % 2 == 0,
    }
}

/// A process of its own, with the clock that only goes on.
struct Clocks(Instant);

impl Clocks {
    fn new() -> Self {
        Self(Instant::now())
    }

    /// What the wall clock shows so many seconds after this process began.
    fn at(&self, wall: i64, after: u64) -> Moment {
        Moment {
            wall: at(wall),
            monotonic: self.0 + Duration::from_secs(after),
        }
    }
}

fn policy() -> Policy {
    let target = |name: &str, grants| Target {
        name: name.to_owned(),
        endpoints: BTreeSet::new(),
        principals: BTreeSet::new(),
        grants,
        answers: crate::policy::AcceptedAnswers::Routable,
    };
    Policy {
        mode: Mode::Enforce,
        dns: Dns::default(),
        nat64: Vec::new(),
        targets: vec![target("closed", false), target("open", true)],
    }
}

#[test]
fn only_targets_that_may_be_granted_are_changed() {
    let mut grants = Grants::default();
    for target in ["open", "closed", "gone"] {
        assert_eq!(grants.grant(key(target, "/a"), term(1, None)), Ok(GrantOutcome::New));
    }
    let granted = grants.add_to(&policy());
    let principals: Vec<_> = granted.targets.iter().map(|target| &target.principals).collect();
    let anybody = BTreeSet::from([Principal::Anybody { cgroup: path("/a") }]);
    assert_eq!(principals, [&BTreeSet::new(), &anybody]);
}

#[test]
fn a_second_grant_changes_the_end_and_keeps_the_beginning() {
    let mut grants = Grants::default();
    assert_eq!(grants.grant(key("t", "/a"), term(1, Some(10))), Ok(GrantOutcome::New));
    let revision = grants.revision();
    let renewed = grants.grant(key("t", "/a"), term(5, None));
    assert_eq!(renewed, Ok(GrantOutcome::Renewed { expired: Some(at(10)) }));
    assert_eq!(grants.iter().next(), Some((&key("t", "/a"), &term(1, None))));
    assert_eq!(grants.revision(), revision, "whom they let in is the same");
    assert_eq!(grants.until_expiry(Clocks::new().at(5, 0)), None);
}

#[test]
fn what_has_an_end_ends() {
    let mut grants = Grants::default();
    for (cgroup, end) in [("/a", Some(10)), ("/b", Some(20)), ("/c", None)] {
        assert_eq!(grants.grant(key("t", cgroup), term(1, end)), Ok(GrantOutcome::New));
    }
    let clocks = Clocks::new();
    assert_eq!(grants.until_expiry(clocks.at(7, 7)), Some(Duration::from_secs(3)));
    assert_eq!(grants.expire(clocks.at(9, 9)), []);
    assert_eq!(grants.expire(clocks.at(10, 10)), [(key("t", "/a"), term(1, Some(10)))]);
    assert_eq!(grants.without_end(), [(key("t", "/b"), term(1, Some(20)))]);
    assert_eq!(grants.revoke("other", None), []);
    assert_eq!(grants.revoke("t", Some(&Grantee::Cgroup(path("/x")))), []);
    assert_eq!(grants.revoke("t", None), [(key("t", "/c"), term(1, None))]);
}

/// A year, in seconds.
const YEAR: i64 = 365 * 24 * 3600;

/// Granted for ten seconds by a clock that shows a year's end.
fn ten_seconds() -> Grants {
    let mut grants = Grants::default();
    let granted = grants.grant(key("t", "/a"), term(YEAR, Some(YEAR + 10)));
    assert_eq!(granted, Ok(GrantOutcome::New));
    grants
}

#[test]
fn a_wall_clock_set_back_lengthens_no_grant() {
    let (mut grants, clocks) = (ten_seconds(), Clocks::new());
    assert_eq!(grants.expire(clocks.at(YEAR, 0)), []);
    assert_eq!(grants.expire(clocks.at(1, 1)), []);
    assert_eq!(grants.until_expiry(clocks.at(4, 4)), Some(Duration::from_secs(6)));
    assert_eq!(grants.expire(clocks.at(9, 9)), []);
    assert_eq!(grants.expire(clocks.at(10, 10)).len(), 1);
}

#[test]
fn a_wall_clock_set_ahead_ends_what_is_over_by_it() {
    let (mut grants, clocks) = (ten_seconds(), Clocks::new());
    assert_eq!(grants.expire(clocks.at(YEAR, 0)), []);
    assert_eq!(grants.expire(clocks.at(2 * YEAR, 1)).len(), 1);
}

/// A start after the clock was set back, or before a host without a clock of its own has heard the time.
#[test]
fn what_begins_in_the_future_lasts_as_long_as_it_was_granted_for() {
    let text = text(&ten_seconds()).expect("it is written");
    for wall in [0, 1, YEAR - 1] {
        let (mut grants, clocks) = (parse(&text).expect("it is read"), Clocks::new());
        assert_eq!(grants.expire(clocks.at(wall, 0)), []);
        assert_eq!(grants.until_expiry(clocks.at(wall, 0)), Some(Duration::from_secs(10)));
        assert_eq!(grants.expire(clocks.at(wall + 9, 9)), []);
        assert_eq!(grants.expire(clocks.at(wall + 10, 10)).len(), 1, "{wall}");
    }
    // The time is heard, and it is over.
    let (mut grants, clocks) = (parse(&text).expect("it is read"), Clocks::new());
    assert_eq!(grants.expire(clocks.at(0, 0)), []);
    assert_eq!(grants.expire(clocks.at(2 * YEAR, 1)).len(), 1);
}

#[test]
fn a_renewal_counts_from_itself_whatever_the_clock_was() {
    let (mut grants, clocks) = (ten_seconds(), Clocks::new());
    assert_eq!(grants.expire(clocks.at(YEAR, 0)), []);
    // Renewed for twenty seconds, the clock having been set back a year.
    let renewed = grants.grant(key("t", "/a"), term(5, Some(25)));
    assert_eq!(
        renewed,
        Ok(GrantOutcome::Renewed {
            expired: Some(at(YEAR + 10))
        })
    );
    assert_eq!(grants.expire(clocks.at(5, 5)), []);
    assert_eq!(grants.expire(clocks.at(24, 24)), []);
    assert_eq!(grants.expire(clocks.at(25, 25)), [(key("t", "/a"), term(5, Some(25)))]);
}

#[test]
fn what_never_ends_stays_whatever_the_clock() {
    let (mut grants, clocks) = (Grants::default(), Clocks::new());
    assert_eq!(grants.grant(key("t", "/a"), term(YEAR, None)), Ok(GrantOutcome::New));
    for wall in [0, YEAR, 3 * YEAR] {
        assert_eq!(grants.expire(clocks.at(wall, 0)), []);
        assert_eq!(grants.until_expiry(clocks.at(wall, 0)), None);
    }
}

#[test]
fn limits_name_themselves() {
    let mut grants = Grants::default();
    for number in 0..MAX_GRANTS {
        let granted = grants.grant(key("t", &format!("/{number}")), term(1, None));
        assert_eq!(granted, Ok(GrantOutcome::New));
    }
    let full = grants.clone();
    let refused = grants.grant(key("t", "/more"), term(1, None));
    assert_eq!(refused, Err(LimitError::Grants));
    assert!(LimitError::Grants.to_string().contains("1024"));
    assert_eq!(grants, full);
    assert!(matches!(
        grants.grant(key("t", "/0"), term(2, None)),
        Ok(GrantOutcome::Renewed { .. })
    ));

    let mut deep = policy();
    let cgroups = |depths: std::ops::Range<usize>| depths.map(|depth| path(&"/x".repeat(depth)));
    let open = deep.targets.last_mut().expect("a target");
    open.principals = cgroups(1..9).map(|cgroup| Principal::Anybody { cgroup }).collect();
    assert_eq!(check_depths(&deep.depths()), Ok(()));
    let open = deep.targets.last_mut().expect("a target");
    open.principals.insert(Principal::Anybody {
        cgroup: path(&"/x".repeat(9)),
    });
    assert_eq!(check_depths(&deep.depths()), Err(LimitError::Depths { found: 9 }));
    let open = deep.targets.last_mut().expect("a target");
    open.principals.insert(Principal::Anybody {
        cgroup: path(&"/x".repeat(255)),
    });
    assert_eq!(check_depths(&deep.depths()), Err(LimitError::Depth { found: 255 }));
}

#[test]
fn another_version_is_told_from_damage() {
    let text = text(&Grants::default()).expect("it is written");
    let text = String::from_utf8(text).expect("it is text");
    let newer = text
        .replace("grants-file/1", "grants-file/2")
        .replace('}', ", \"new\": 1}");
    assert_eq!(
        parse(newer.as_bytes()),
        Err(Fault::Version("enforcer/grants-file/2".to_owned()))
    );
    let more = text.replace('}', ", \"new\": 1}");
    assert!(matches!(parse(more.as_bytes()), Err(Fault::Damaged(_))));
}

/// Only a hand can write it, with the right sum even: it is no grant.
#[test]
fn everybody_everywhere_is_no_grant() {
    for cgroup in ["null", "\"/\"", "\"//\"", "\"/a/..\"", "\"a\""] {
        let grants = format!(
            r#"[{{"target":"t","user":null,"cgroup":{cgroup},"since":"2026-01-01T00:00:00Z","expires":null,"pid":1,"uid":0,"comm":""}}]"#
        );
        let sum = crc32fast::hash(grants.as_bytes());
        let text = format!(r#"{{"schema":"enforcer/grants-file/1","crc32":{sum},"grants":{grants}}}"#);
        assert_eq!(
            parse(text.as_bytes()),
            Err(Fault::Damaged("an entry is no grant".to_owned())),
            "{cgroup}"
        );
    }
}

fn grantee() -> impl Strategy<Value = Grantee> {
    let cgroup = || proptest::sample::select(vec!["/a", "/a/b", "/é ü\"\\", "/system.slice/x.scope"]).prop_map(path);
    prop_oneof![
        cgroup().prop_map(Grantee::Cgroup),
        any::<u32>().prop_map(|uid| Grantee::User(Uid(uid))),
        (any::<u32>(), cgroup()).prop_map(|(uid, cgroup)| Grantee::UserWithin(Uid(uid), cgroup)),
    ]
}

fn book() -> impl Strategy<Value = Grants> {
    let one = (
        "[a-z_-]{1,8}",
        grantee(),
        0..4_000_000_000_i64,
        proptest::option::of(0..4_000_000_000_i64),
    );
    proptest::collection::vec(one, 0..12).prop_map(|all| {
        let mut grants = Grants::default();
        for (target, to, since, expires) in all {
            grants
                .grant(Key { target, to }, term(since, expires))
                .expect("fewer than the limit");
        }
        grants
    })
}

proptest! {
    #[test]
    fn what_was_written_is_read_back(grants in book()) {
        let read = parse(&text(&grants).expect("it is written"));
        let (read, grants) = (read.expect("it is read"), grants);
        prop_assert!(read.iter().eq(grants.iter()));
    }

    /// No flipped bit and no cut end gives anything but an error, or the same grants.
    #[test]
    fn damage_gives_no_grant(grants in book(), place in any::<prop::sample::Index>(), bit in 0..8_u32, cut in any::<bool>()) {
        let mut text = text(&grants).expect("it is written");
        let place = place.index(text.len());
        if cut {
            text.truncate(place);
        } else if let Some(byte) = text.get_mut(place) {
            *byte ^= 1 << bit;
        }
        if let Ok(read) = parse(&text) {
            prop_assert!(read.iter().eq(grants.iter()));
        }
    }
}

#[test]
fn what_was_granted_to_askers_cgroups_long_gone_is_dropped() {
    let clocks = Clocks::new();
    let retain = Duration::from_hours(1);
    let mut grants = Grants::default();
    let user = Key {
        target: "monit".to_owned(),
        to: Grantee::User(Uid(7)),
    };
    let named = key("monit", "/backup.service");
    for (key, own) in [
        (key("monit", "/session"), true),
        (key("monit", "/job"), true),
        (named.clone(), false),
        (user.clone(), false),
    ] {
        let term = Term { own, ..term(0, None) };
        grants.grant(key, term).expect("a grant");
    }
    // Its own job renews what was named.
    let renewed = Term {
        own: true,
        ..term(1, None)
    };
    grants.grant(named.clone(), renewed).expect("a grant");
    let mut at = |minute: u64, gone: &[&str]| {
        let now = clocks.at(0, minute * 60).monotonic;
        let is_gone = |key: &Key| key.to.cgroup().is_some_and(|cgroup| gone.contains(&cgroup.as_str()));
        let dropped = grants.forget(is_gone, now, retain);
        dropped.into_iter().map(|(key, _)| key).collect::<Vec<_>>()
    };
    assert_eq!(at(0, &["/session", "/job", "/backup.service"]), []);
    assert_eq!(at(59, &["/session", "/job", "/backup.service"]), []);
    // One is there again, and gone again: it counts anew.
    assert_eq!(at(59, &["/session", "/backup.service"]), []);
    assert_eq!(
        at(60, &["/session", "/job", "/backup.service"]),
        [key("monit", "/session")]
    );
    assert_eq!(at(119, &["/session", "/job", "/backup.service"]), []);
    assert_eq!(
        at(120, &["/session", "/job", "/backup.service"]),
        [key("monit", "/job")]
    );
    // What was named may come yet, and a user is nowhere.
    assert_eq!(at(9999, &["/backup.service"]), []);
    let left: Vec<&Key> = grants.iter().map(|(key, _)| key).collect();
    assert_eq!(left, [&named, &user]);
}
