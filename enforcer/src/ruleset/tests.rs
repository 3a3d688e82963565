//! F7: each limit of a rule set is an error that names it, and what is just within it compiles. D4: what an endpoint is
//! at last.

#![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

use super::*;

/// Compiles so many principals in each of so many targets, each in a cgroup whose depth `level` tells, if any.
fn principals(targets: u32, each: u32, level: impl Fn(u32) -> Option<u32>) -> Result<RuleSet, CompileError> {
    let mut host = Host::default();
    let mut principal = |uid: u32| {
        let cgroup = level(uid).map(|level| {
            let path = CgroupPath(format!("/depth{level}"));
            let id = u64::from(level) + 100;
            host.cgroups.insert(path.clone(), Cgroup { id, level });
            path
        });
        Principal::User { uid: Uid(uid), cgroup }
    };
    let targets = (0..targets).map(|target| crate::policy::Target {
        name: format!("t{target}"),
        endpoints: BTreeSet::new(),
        principals: (0..each).map(|number| principal(target * each + number)).collect(),
        grants: false,
        answers: crate::policy::AcceptedAnswers::Routable,
    });
    let policy = Policy {
        mode: Mode::Enforce,
        dns: crate::policy::Dns::default(),
        nat64: Vec::new(),
        targets: targets.collect(),
    };
    compile(&policy, &Resolved::new(), &host)
}

fn check(compiled: &Result<RuleSet, CompileError>, error: Option<(&CompileError, &str)>) {
    let said = compiled.as_ref().err().map(ToString::to_string).unwrap_or_default();
    assert_eq!(compiled.as_ref().err(), error.as_ref().map(|(error, _)| *error));
    assert!(error.is_none_or(|(_, limit)| said.contains(limit)), "{said}");
}

#[test]
fn limits_of_principals_and_cgroups() {
    check(&principals(16, 1024, |_| None), None);
    let found = 17 * 1024;
    check(
        &principals(17, 1024, |_| None),
        Some((&CompileError::Principals { found }, "16384")),
    );
    check(&principals(1, 8, Some), None);
    check(
        &principals(1, 9, Some),
        Some((&CompileError::Levels { found: 9 }, "maximum of 8")),
    );
    check(&principals(1, 1, |_| Some(254)), None);
    let cgroup = CgroupPath("/depth255".to_owned());
    check(
        &principals(1, 1, |_| Some(255)),
        Some((&CompileError::Depth { cgroup, level: 255 }, "maximum of 254")),
    );
}

/// The places of a target with a literal and a name.
fn places(literal: &str, answer: &str) -> BTreeSet<String> {
    let name = Name("bus.test".to_owned());
    let port = std::num::NonZeroU16::new(4222).expect("a port");
    let endpoint = |destination| crate::policy::Endpoint {
        protocol: Protocol::Tcp,
        destination,
        port,
    };
    let literal = Destination::Address(literal.parse().expect("an address"));
    let policy = Policy {
        mode: Mode::Enforce,
        dns: crate::policy::Dns::default(),
        nat64: vec!["2001:db8:64::/96".parse().expect("a prefix")],
        targets: vec![crate::policy::Target {
            name: "bus".to_owned(),
            endpoints: [literal, Destination::Name(name.clone())].map(endpoint).into(),
            principals: BTreeSet::new(),
            grants: false,
            answers: crate::policy::AcceptedAnswers::Routable,
        }],
    };
    let resolved = Resolved::from([(name, BTreeSet::from([answer.parse().expect("an address")]))]);
    let rules = compile(&policy, &resolved, &Host::default()).expect("rules");
    rules
        .places
        .iter()
        .map(|(place, _)| place.net.addr().to_string())
        .collect()
}

#[test]
fn d4_an_endpoint_within_a_nat64_prefix_is_the_ipv4_address_in_it() {
    let set = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(
        places("64:ff9b::10.0.0.1", "64:ff9b::10.0.0.2"),
        set(&["10.0.0.1", "10.0.0.2"])
    );
    assert_eq!(
        places("2001:db8:64::a00:1", "2001:db8:65::1"),
        set(&["10.0.0.1", "2001:db8:65::1"])
    );
    assert_eq!(
        places("64:ff9b::127.0.0.1", "10.0.0.2"),
        set(&["10.0.0.2", "64:ff9b::7f00:1"])
    );
    // An administrator may mean the metadata service; what no name may bring stays what the name brought (N6).
    assert_eq!(
        places("64:ff9b::169.254.169.254", "64:ff9b::169.254.169.253"),
        set(&["169.254.169.254", "64:ff9b::a9fe:a9fd"])
    );
}
