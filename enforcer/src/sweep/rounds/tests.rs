//! When it is swept again, and how much of what was found is told.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf, time::Duration};

use enforcer_ebpf::Verdict;

use super::{Fate, Rounds, SweepJob, event, until_next};
use crate::{
    config::Existing,
    policy::{Mode, Protocol, Uid},
    ruleset::RuleSet,
    sweep::{Connection, OffendingConnection},
    wire::SocketState,
};

#[test]
fn a_second_sweep_follows_and_then_one_a_minute_while_something_is_found() {
    let seconds = |more, rechecked, clean| until_next(more, rechecked, clean).as_ref().map(Duration::as_secs);
    for clean in [false, true] {
        assert_eq!(seconds(false, false, clean), Some(1), "the second one, clean: {clean}");
    }
    assert_eq!(seconds(false, true, false), Some(60));
    assert_eq!(seconds(false, true, true), None);
    for rechecked in [false, true] {
        assert_eq!(seconds(true, rechecked, false), Some(0), "more than one sweep cuts");
    }
}

fn job() -> SweepJob {
    SweepJob {
        generation: 3,
        rules: RuleSet {
            mode: Mode::Enforce,
            targets: Vec::new(),
            places: Vec::new(),
            nat64: Vec::new(),
            named_ports: BTreeSet::new(),
        },
        action: Existing::Report,
        cgroup: None,
        mount: PathBuf::new(),
        local: BTreeSet::new(),
    }
}

fn found(number: u64) -> OffendingConnection {
    OffendingConnection {
        connection: Connection {
            protocol: Protocol::Tcp,
            state: SocketState::Established,
            local: SocketAddr::from(([10, 0, 0, 1], 40_000)),
            remote: SocketAddr::from(([10, 0, 0, 5], 4222)),
            interface: 0,
            uid: Uid(7),
            held: true,
            cgroup: None,
            cookie: number.to_ne_bytes(),
        },
        user: Some(Uid(7)),
        verdict: Verdict::Deny,
        target: 0,
        doubt: None,
    }
}

#[test]
fn of_one_sweep_1024_are_told_and_256_listed_each_once() {
    let job = job();
    let mut rounds = Rounds::default();
    let first: Vec<_> = (0..1030).map(|number| (found(number), Fate::Stays)).collect();
    let report = rounds.report(&job, &first, 5, None);
    assert_eq!((report.news.len(), report.lost), (1024, 6));
    assert_eq!((report.existing.found, report.existing.connections.len()), (1035, 256));
    let second: Vec<_> = (1029..1032).map(|number| (found(number), Fate::Stays)).collect();
    let report = rounds.report(&job, &second, 0, None);
    assert_eq!((report.news.len(), report.lost, report.existing.found), (2, 0, 3));
    let cut = rounds.report(&job, &[(found(1030), Fate::Cut)], 0, None);
    assert_eq!((cut.news.len(), cut.existing.found), (1, 0), "a cut is told, too");
}

#[test]
fn what_is_told_of_each_is_as_it_was() -> serde_json::Result<()> {
    let one = |state, fate, change: fn(&mut OffendingConnection)| {
        let mut found = OffendingConnection {
            connection: Connection {
                state,
                ..found(1).connection
            },
            ..found(1)
        };
        change(&mut found);
        serde_json::to_string(&event(&job(), &found, &fate, "T"))
    };
    let nothing = |_: &mut OffendingConnection| {};
    assert_eq!(
        one(SocketState::SynReceived, Fate::Stays, |found| {
            found.connection.protocol = Protocol::Udp;
            found.connection.cgroup = Some(9);
            found.verdict = Verdict::WouldDeny;
            found.user = None;
        })?,
        r#"{"schema":"enforcer/existing/1","time":"T","verdict":"would-deny","action":"reported","reason":null,"protocol":"udp","state":"syn-received","local":"10.0.0.1:40000","remote":"10.0.0.5:4222","uid":null,"user":null,"cgroup_id":9,"cgroup":null,"target":"","generation":3}"#
    );
    for (state, fate, word, action, reason) in [
        (SocketState::Established, Fate::Stays, "established", "reported", "null"),
        (SocketState::SynSent, Fate::Cut, "syn-sent", "cut", "null"),
        (
            SocketState::FinWait1,
            Fate::Kept("R".to_owned()),
            "fin-wait-1",
            "kept",
            "\"R\"",
        ),
        (SocketState::FinWait2, Fate::Stays, "fin-wait-2", "reported", "null"),
        (SocketState::CloseWait, Fate::Stays, "close-wait", "reported", "null"),
        (SocketState::LastAck, Fate::Stays, "last-ack", "reported", "null"),
        (SocketState::Closing, Fate::Stays, "closing", "reported", "null"),
    ] {
        assert_eq!(
            one(state, fate, nothing)?,
            format!(
                r#"{{"schema":"enforcer/existing/1","time":"T","verdict":"deny","action":"{action}","reason":{reason},"protocol":"tcp","state":"{word}","local":"10.0.0.1:40000","remote":"10.0.0.5:4222","uid":7,"user":null,"cgroup_id":null,"cgroup":null,"target":"","generation":3}}"#
            )
        );
    }
    Ok(())
}
