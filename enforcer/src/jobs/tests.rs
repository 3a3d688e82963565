//! Rules of jobs, and what becomes of each.

#![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

use std::{collections::BTreeSet, fs, net::Ipv4Addr, path::Path};

use super::{Ignored, JobRules, rules_of};
use crate::{
    backend::jobs::{Accept, ChainDump, JobRule, RuleDestination, RuleOrigin, RuleSubject, Unknown},
    grants::{Asker, Grantee, Grants, Key, MAX_GRANTS, Term},
    host,
    policy::{CgroupPath, Dns, Endpoint, MONIT, Mode, Policy, Target, Uid},
    ruleset::Cgroup,
};

fn path(text: &str) -> CgroupPath {
    CgroupPath::parse(text).expect("a path")
}

fn policy(endpoints: &[&str], grants: bool) -> Policy {
    let endpoints = endpoints
        .iter()
        .flat_map(|text| Endpoint::parse_all(text).expect("an endpoint"));
    let target = |name: &str, endpoints| Target {
        name: name.to_owned(),
        endpoints,
        principals: BTreeSet::new(),
        grants,
        answers: crate::policy::AcceptedAnswers::Routable,
    };
    Policy {
        mode: Mode::Enforce,
        dns: Dns::default(),
        nat64: Vec::new(),
        targets: vec![target("other", BTreeSet::new()), target(MONIT, endpoints.collect())],
    }
}

fn monit() -> Policy {
    policy(&["tcp://127.0.0.1:2822"], true)
}

fn accept(user: Option<u32>, cgroup: Option<Cgroup>) -> Accept {
    Accept {
        subject: RuleSubject { user, cgroup },
        to: RuleDestination {
            address: Some(Ipv4Addr::LOCALHOST.into()),
            port: Some(2822),
        },
    }
}

fn rules(accepts: impl IntoIterator<Item = Result<Accept, Unknown>>) -> ChainDump {
    let rule = |(handle, accepts)| JobRule {
        handle,
        accepts,
        writer: RuleOrigin::Other,
    };
    ChainDump {
        exists: true,
        agents: true,
        is_alone: false,
        genid: 1,
        rules: (1..).zip(accepts).map(rule).collect(),
    }
}

/// What becomes of the rules of a chain, the cgroups of which lie below a directory.
fn effects(mount: &Path, jobs: ChainDump, policy: &Policy) -> Vec<Result<Grantee, Ignored>> {
    let mut rules = JobRules::default();
    rules.take(jobs, mount);
    rules.effects(policy).into_iter().map(|(_, effect)| effect).collect()
}

fn id(mount: &Path, path: &str, level: u32) -> Cgroup {
    let id = host::directory_id(&mount.join(path)).expect("a directory");
    Cgroup { id, level }
}

#[test]
fn b5_a_cgroup_is_found_by_id_and_level() {
    let mount = tempfile::tempdir().expect("a directory");
    let mount = mount.path();
    fs::create_dir_all(mount.join("system.slice/runc-bpm-a.scope/deep")).expect("directories");
    let job = "system.slice/runc-bpm-a.scope";
    let cases = [
        (id(mount, job, 2), Ok(Grantee::Cgroup(path(&format!("/{job}"))))),
        (
            id(mount, &format!("{job}/deep"), 3),
            Ok(Grantee::Cgroup(path(&format!("/{job}/deep")))),
        ),
        (id(mount, job, 1), Err(Ignored::Gone)),
        (id(mount, job, 3), Err(Ignored::Gone)),
        (id(mount, "", 0), Err(Ignored::Everybody)),
        (Cgroup { id: 1, level: 2 }, Err(Ignored::Gone)),
    ];
    for (cgroup, expected) in cases {
        let found = effects(mount, rules([Ok(accept(None, Some(cgroup)))]), &monit());
        assert_eq!(found, [expected], "{cgroup:?}");
    }
    let nobody = effects(mount, rules([Ok(accept(Some(u32::MAX), None))]), &monit());
    assert_eq!(nobody, [Err(Ignored::Nobody)]);
    let within = effects(mount, rules([Ok(accept(Some(7), Some(id(mount, job, 2))))]), &monit());
    assert_eq!(within, [Ok(Grantee::UserWithin(Uid(7), path(&format!("/{job}"))))]);
}

#[test]
fn b5_a_cgroup_made_again_is_another_one() {
    let mount = tempfile::tempdir().expect("a directory");
    let mount = mount.path();
    let job = mount.join("job");
    fs::create_dir(&job).expect("a directory");
    let mut found = JobRules::default();
    found.take(rules([Ok(accept(None, Some(id(mount, "job", 1))))]), mount);
    let admitted = |rules: &JobRules| {
        let policy = rules.add_to(monit());
        policy.target(MONIT).is_some_and(|monit| !monit.principals.is_empty())
    };
    assert!(admitted(&found));
    fs::rename(&job, mount.join("old")).expect("rename");
    fs::create_dir(&job).expect("a directory");
    found.look(mount);
    assert!(!admitted(&found));
    fs::remove_dir(&job).expect("remove");
    fs::rename(mount.join("old"), &job).expect("rename");
    found.look(mount);
    assert!(admitted(&found));
}

#[test]
fn b5_a_rule_counts_where_it_leads_to_monit() {
    let at = |address: Option<&str>, port| RuleDestination {
        address: address.map(|text| text.parse().expect("an address")),
        port,
    };
    let cases = [
        ("tcp://127.0.0.1:2822", at(Some("127.0.0.1"), Some(2822)), true),
        ("tcp://127.0.0.1:2822", at(None, Some(2822)), true),
        ("tcp://127.0.0.1:2822", at(None, None), true),
        ("tcp://127.0.0.1:2822", at(Some("127.0.0.1"), None), true),
        ("tcp://127.0.0.1:2822", at(Some("127.0.0.2"), Some(2822)), false),
        ("tcp://127.0.0.1:2822", at(Some("127.0.0.1"), Some(2823)), false),
        ("tcp://local:2822", at(Some("127.0.0.1"), Some(2822)), true),
        ("tcp://127.0.0.0/8:2822", at(Some("127.9.0.1"), Some(2822)), true),
        ("tcp://[::1]:2822", at(Some("127.0.0.1"), Some(2822)), false),
        ("udp://127.0.0.1:2822", at(Some("127.0.0.1"), Some(2822)), false),
    ];
    for (endpoint, to, counts) in cases {
        let subject = accept(Some(1000), None).subject;
        let found = effects(
            Path::new("/"),
            rules([Ok(Accept { subject, to })]),
            &policy(&[endpoint], true),
        );
        let expected = if counts {
            Ok(Grantee::User(Uid(1000)))
        } else {
            Err(Ignored::Elsewhere)
        };
        assert_eq!(found, [expected], "{endpoint} {to:?}");
    }
}

#[test]
fn b5_f4_too_many_rules_cost_only_themselves() {
    let mount = tempfile::tempdir().expect("a directory");
    let mount = mount.path();
    let users = (0..2000).map(|user| Ok(accept(Some(user), None)));
    let found = effects(mount, rules(users), &monit());
    assert_eq!(found.iter().filter(|effect| effect.is_ok()).count(), MAX_GRANTS);
    assert_eq!(found.last(), Some(&Err(Ignored::TooMany)));
    // The same one again and again is one.
    let same = (0..2000).map(|_| Ok(accept(Some(1), None)));
    assert!(effects(mount, rules(same), &monit()).iter().all(Result::is_ok));
    let deep: String = (1..=9).map(|_| "/a").collect();
    fs::create_dir_all(mount.join(&deep[1..])).expect("directories");
    let cgroups = (1..=9).map(|level| {
        let path = deep.get(1..level * 2).expect("a part");
        Ok(accept(None, Some(id(mount, path, u32::try_from(level).expect("few")))))
    });
    let found = effects(mount, rules(cgroups), &monit());
    assert!(found.iter().take(8).all(Result::is_ok), "{found:?}");
    assert!(matches!(found.last(), Some(Err(Ignored::Depth(_)))), "{found:?}");
}

#[test]
fn b5_only_where_monit_may_be_granted() {
    let mount = Path::new("/");
    let jobs = rules([Ok(accept(Some(1), None)), Err(Unknown::Nobody)]);
    assert_eq!(
        effects(mount, jobs.clone(), &policy(&["tcp://127.0.0.1:2822"], false)),
        []
    );
    let found = effects(mount, jobs, &monit());
    assert_eq!(
        found,
        [Ok(Grantee::User(Uid(1))), Err(Ignored::Unknown(Unknown::Nobody))]
    );
}

#[test]
fn b5_what_was_granted_is_written_once_and_removed_with_its_grant() {
    let mut grants = Grants::default();
    for (target, to) in [
        (MONIT, Grantee::User(Uid(1000))),
        (MONIT, Grantee::Cgroup(path("/there"))),
        (MONIT, Grantee::Cgroup(path("/gone"))),
        ("other", Grantee::User(Uid(1))),
    ] {
        let key = Key {
            target: target.to_owned(),
            to,
        };
        let term = Term {
            since: jiff::Timestamp::UNIX_EPOCH,
            expires: None,
            by: Asker {
                pid: 1,
                uid: 0,
                comm: String::new(),
                ..Asker::default()
            },
            own: false,
        };
        grants.grant(key, term).expect("room");
    }
    let mut host = crate::ruleset::Host::default();
    host.cgroups.insert(path("/there"), Cgroup { id: 9, level: 1 });
    let wanted = rules_of(&grants, &monit(), &host);
    let there = Cgroup { id: 9, level: 1 };
    let [user, cgroup] = [accept(Some(1000), None), accept(None, Some(there))];
    assert_eq!(wanted, BTreeSet::from([user, cgroup]));
    assert!(rules_of(&grants, &policy(&["tcp://127.0.0.1:2822"], false), &host).is_empty());
    // By handle: one of a job, which stays; ours, twice; one whose grant has ended; one of a container that has gone.
    let mut chain = rules([user, user, user, accept(Some(7), None), accept(None, Some(there))].map(Ok));
    for (rule, writer) in chain.rules.iter_mut().zip([
        RuleOrigin::Other,
        RuleOrigin::Grants,
        RuleOrigin::Grants,
        RuleOrigin::Grants,
        RuleOrigin::Container,
    ]) {
        rule.writer = writer;
    }
    let mount = tempfile::tempdir().expect("a directory");
    let mut rules = JobRules::default();
    rules.take(chain, mount.path());
    assert_eq!(
        rules.changes(&wanted),
        (vec![3, 4], vec![cgroup]),
        "no hierarchy is seen"
    );
    fs::write(mount.path().join("cgroup.procs"), "").expect("a file");
    rules.look(mount.path());
    assert_eq!(rules.changes(&wanted), (vec![3, 4, 5], vec![cgroup]));
}
