//! The JSON of every shape, byte for byte: `golden.json` is what users and other versions read.

use std::net::SocketAddr;

use enforcer_ebpf::{EventRecord, NO_UID, TCP, TargetName, UDP};
use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};

use super::{
    check::{CheckReport, CheckTarget, ConfigCheck, ConfigMistake},
    doctor::{ChoiceReport, FeatureReport, FeatureState, Finding, HostReport, Report, Side, Unseen, Weight},
    *,
};
use crate::{
    backend::{LoggedDenial, Observed, ObservedTarget, SocketUsers},
    events::{self, Filter, Summary},
    grants::{Asker, Grantee, Key},
    policy::{CgroupPath, Uid},
    status::{Context, status},
    verify::Comparison,
};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What was made, a line each.
#[derive(Default)]
struct Made(String);

impl Made {
    fn written(&mut self, value: &impl Serialize) -> Result {
        self.0 += &serde_json::to_string(value)?;
        self.0.push('\n');
        Ok(())
    }

    /// What the daemon sends, the command line reads.
    fn sent<T: Serialize + DeserializeOwned>(&mut self, value: &T) -> Result {
        let text = serde_json::to_string(value)?;
        let back: T = serde_json::from_str(&text)?;
        assert_eq!(serde_json::to_string(&back)?, text);
        self.written(value)
    }
}

#[test]
fn every_shape_is_as_it_was() -> Result {
    let mut made = Made::default();
    denials(&mut made)?;
    grants(&mut made)?;
    statuses(&mut made)?;
    verifications(&mut made)?;
    doctor(&mut made)?;
    let golden = include_str!("golden.json");
    for (made, golden) in made.0.lines().zip(golden.lines()) {
        assert_eq!(made, golden);
    }
    assert_eq!(made.0.lines().count(), golden.lines().count());
    Ok(())
}

fn denials(made: &mut Made) -> Result {
    let boot = Timestamp::from_second(1_000_000)?.into();
    let v4 = |bits: u32| [0, 0, 0xffff_u32.to_be(), bits.to_be()];
    let mut target = TargetName::NONE;
    target.0.iter_mut().zip(b"monit").for_each(|(to, from)| *to = *from);
    let mut record = EventRecord {
        time: 1_500_000_000,
        generation: 3,
        cgroup: 4,
        netns: 5,
        target,
        dialled: [0x7f00_0001_u32.to_be(), 0, 0, 0],
        judged: v4(0x7f00_0001),
        pid: 6,
        tid: 7,
        task_uid: 1000,
        socket_uid: 1001,
        task: *b"a\x1bsh\0\0\0\0\0\0\0\0\0\0\0\0",
        port: 2822_u16.to_be(),
        protocol: TCP,
        verdict: enforcer_ebpf::Verdict::Deny as u8,
        family: 4,
        kernel_thread: 0,
        components: 2,
        rooted: 1,
        lengths: [3, 3, 0, 0, 0, 0, 0, 0],
        path: [[0; 40]; 8],
    };
    let [file, directory, ..] = &mut record.path;
    for (component, name) in [(file, b"c\x1bd"), (directory, b"bin")] {
        component.iter_mut().zip(name).for_each(|(to, from)| *to = *from);
    }
    made.sent(&Event::Denial(events::read(&record, boot)))?;
    let record = EventRecord {
        dialled: [0x2001_0db8_u32.to_be(), 0, 0, 1_u32.to_be()],
        judged: [0x2001_0db8_u32.to_be(), 0, 0, 1_u32.to_be()],
        socket_uid: NO_UID,
        protocol: UDP,
        verdict: enforcer_ebpf::Verdict::WouldDeny as u8,
        family: 6,
        kernel_thread: 1,
        components: 0,
        ..record
    };
    made.sent(&Reply::Event(Event::Denial(events::read(&record, boot))))?;
    let denial = LoggedDenial {
        denied: true,
        generation: 3,
        target: "monit".to_owned(),
        protocol: Protocol::Tcp,
        to: SocketAddr::from(([127, 0, 0, 1], 2822)),
        from: SocketAddr::from(([127, 0, 0, 1], 40_000)),
        user: Some(1000),
    };
    made.sent(&Event::Denial(events::read_logged(&denial, boot)))?;
    let denial = LoggedDenial {
        denied: false,
        protocol: Protocol::Udp,
        user: None,
        ..denial
    };
    made.sent(&Event::Denial(events::read_logged(&denial, boot)))?;
    made.sent(&Event::Lost(Lost::new(9)))?;
    let (mut summary, now) = (Summary::default(), Timestamp::from_second(1_000_000)?);
    summary.add(&events::read(&record, boot), now);
    summary.add_unreported("monit", 7, now);
    let sums = summary.sums(&Filter::default(), now);
    sums.into_iter()
        .try_for_each(|sum| made.sent(&Reply::Sum(Box::new(sum))))
}

fn existing(verdict: &str, action: &str, state: &str) -> Result<ExistingEvent> {
    // Made by sweeps, whose own test holds what they write.
    let text = format!(
        r#"{{"schema":"enforcer/existing/1","time":"T","verdict":"{verdict}","action":"{action}","reason":null,"protocol":"tcp",
        "state":"{state}","local":"10.0.0.1:40000","remote":"10.0.0.5:4222","uid":7,"cgroup_id":null,"target":"main","generation":3}}"#
    );
    Ok(serde_json::from_str(&text)?)
}

fn grants(made: &mut Made) -> Result {
    let by = Asker {
        pid: 1,
        uid: 2,
        comm: "sh".to_owned(),
        ..Asker::default()
    };
    let key = |to| Key {
        target: "monit".to_owned(),
        to,
    };
    let cgroup = CgroupPath::parse("/a")?;
    let (now, end) = (Timestamp::from_second(1_000_000)?, Timestamp::from_second(1_000_060)?);
    let event = |to: Grantee, action, by| key(to).event(action, now, Some(end), by);
    let granted = event(Grantee::User(Uid(7)), GrantAction::Granted, Some(&by));
    let renewed = GrantEvent {
        expires_before: Some("never".to_owned()),
        ..event(Grantee::Cgroup(cgroup.clone()), GrantAction::Renewed, Some(&by))
    };
    let within = Grantee::UserWithin(Uid(7), cgroup);
    let revoked = event(within.clone(), GrantAction::Revoked, Some(&by));
    made.sent(&Reply::Grant(Box::new(granted)))?;
    made.sent(&Reply::Revoked(vec![revoked]))?;
    made.sent(&Event::Grant(renewed))?;
    made.sent(&Event::Grant(event(within.clone(), GrantAction::Expired, None)))?;
    made.sent(&Event::Grant(event(within, GrantAction::Dropped, None)))?;
    made.sent(&Reply::Grants(GrantsReport {
        schema: Schema::Grants,
        limit: 1024,
        grants: vec![GrantStatus {
            target: "monit".to_owned(),
            user: None,
            user_name: None,
            cgroup: Some("/a".to_owned()),
            cgroup_exists: Some(true),
            cgroup_writable: Some("W".to_owned()),
            active: true,
            since: "S".to_owned(),
            expires: None,
            pid: 1,
            uid: 2,
            asker_name: Some("N".to_owned()),
            comm: "sh".to_owned(),
        }],
        job_rules: vec![JobRuleStatus {
            handle: 4,
            user: Some(5),
            user_name: Some("N".to_owned()),
            cgroup: None,
            ignored: Some("I".to_owned()),
        }],
    }))
}

fn statuses(made: &mut Made) -> Result {
    let context = |backend| Context {
        daemon: Some(8),
        cgroup: "/c".to_owned(),
        pin_dir: "/p".to_owned(),
        nft_table: "t".to_owned(),
        state_dir: "/s".to_owned(),
        backend,
        ..Context::default()
    };
    let observed = Observed {
        generation: 3,
        socket_users: SocketUsers::All,
        endpoints: 2,
        targets: vec![ObservedTarget {
            name: "main".to_owned(),
            endpoints: 2,
            allow: vec![
                PrincipalStatus {
                    uid: Some(0),
                    user: Some("root".to_owned()),
                    ..PrincipalStatus::default()
                },
                PrincipalStatus {
                    cgroup_id: Some(5),
                    cgroup: Some("/a".to_owned()),
                    ..PrincipalStatus::default()
                },
            ],
            counters: enforcer_ebpf::Counters {
                allowed: 1,
                denied: 2,
                would_deny: 3,
            },
        }],
        lost: 4,
        ..Observed::default()
    };
    made.sent(&status(None, context(ActiveBackend::Ebpf)))?;
    let full = Context {
        backend_reason: Some("R".to_owned()),
        restored: 1,
        names: vec![NameStatus {
            name: "bus.test".to_owned(),
            addresses: vec!["10.0.0.1".to_owned()],
            stale: true,
            cause: Some("C".to_owned()),
            protects: NameProtection::Addresses,
            cut: 1,
        }],
        dials: vec![DialStatus {
            port: 4222,
            lookups: 2,
            last: "10.0.0.2".to_owned(),
            uid: None,
            user: None,
            time: "T".to_owned(),
        }],
        lost: 5,
        existing: Some(ExistingStatus {
            action: Existing::Cut,
            time: "T".to_owned(),
            generation: 3,
            found: 8,
            cut: 1,
            connections: vec![
                existing("deny", "reported", "established")?,
                existing("would-deny", "kept", "syn-sent")?,
                existing("deny", "cut", "syn-received")?,
                existing("deny", "reported", "fin-wait-1")?,
                existing("deny", "reported", "fin-wait-2")?,
                existing("deny", "reported", "close-wait")?,
                existing("deny", "reported", "last-ack")?,
                existing("deny", "reported", "closing")?,
            ],
        }),
        ..context(ActiveBackend::Both)
    };
    made.sent(&Reply::Status(Box::new(status(Some(&observed), full))))?;
    for (backend, audit, socket_users) in [
        (ActiveBackend::Ebpf, false, SocketUsers::Tcp),
        (ActiveBackend::Ebpf, true, SocketUsers::None),
        (ActiveBackend::Nftables, false, SocketUsers::All),
    ] {
        let observed = Observed {
            audit,
            socket_users,
            ..observed.clone()
        };
        let context = Context {
            existing: None,
            ..context(backend)
        };
        let status: Status = status(Some(&observed), context);
        made.sent(&status)?;
    }
    Ok(())
}

fn verifications(made: &mut Made) -> Result {
    let mut comparison = Comparison::default();
    for object in [
        Object::PinnedMap,
        Object::Pin,
        Object::PinDirectory,
        Object::Table,
        Object::Sets,
        Object::Set("judge_a".to_owned()),
        Object::Counters,
        Object::Chains,
        Object::Chain("judge".to_owned()),
        Object::EndpointMaps,
        Object::TargetsMap,
        Object::PrincipalsMap,
        Object::PortsMap,
        Object::Nat64Map,
        Object::InlineUsers,
        Object::GenerationsMap,
        Object::BucketsMap,
        Object::ActiveMap,
        Object::Link,
        Object::Backend,
    ] {
        comparison.words(&object, "e", "w", "f");
    }
    comparison.names(&Object::PinDirectory, ["a"], ["b"]);
    let verification: Verification = comparison.finish(Against::Daemon, ActiveBackend::Both, 3);
    made.sent(&Reply::Verification(Box::new(verification)))?;
    made.sent(&Comparison::default().finish(Against::Configuration, ActiveBackend::None, 0))?;
    made.sent(&Comparison::default().finish(Against::Daemon, ActiveBackend::Ebpf, 0))?;
    made.sent(&Comparison::default().finish(Against::Daemon, ActiveBackend::Nftables, 0))?;
    made.sent(&Reply::Done)?;
    made.sent(&Reply::Error("E".to_owned()))
}

fn doctor(made: &mut Made) -> Result {
    let feature = |of, required, state| FeatureReport {
        id: "bpf-syscall".to_owned(),
        title: "bpf(2)".to_owned(),
        of,
        required,
        state,
        why: None,
        since: "S".to_owned(),
    };
    let finding = |weight| Finding {
        id: "audit-mode",
        weight,
        what: "W".to_owned(),
        items: vec!["I".to_owned()],
        remedy: "R".to_owned(),
    };
    let report = |backend, active| Report {
        schema: Schema::Doctor,
        host: HostReport {
            root: None,
            kernel: "6.8".to_owned(),
            config: "C".to_owned(),
            cgroup: Some("/c".to_owned()),
            daemon: Some(8),
            active,
        },
        features: vec![
            feature(Side::Ebpf, true, FeatureState::Supported),
            feature(Side::Nftables, false, FeatureState::Missing),
            feature(Side::Either, false, FeatureState::Inconclusive),
        ],
        choice: ChoiceReport {
            wanted: Backend::Auto,
            backend,
            why: "W".to_owned(),
        },
        findings: vec![finding(Weight::High), finding(Weight::Medium), finding(Weight::Low)],
        unseen: vec![Unseen {
            what: "A".to_owned(),
            why: "B".to_owned(),
        }],
    };
    for (backend, active) in [
        (None, None),
        (Some(Backend::Ebpf), Some(ActiveBackend::Both)),
        (Some(Backend::Nftables), Some(ActiveBackend::Ebpf)),
        (Some(Backend::Both), Some(ActiveBackend::Nftables)),
    ] {
        made.written(&report(backend, active))?;
    }
    Ok(())
}

#[test]
fn the_json_of_check_is_as_it_was() -> Result {
    for verdict in [Verdict::Allow, Verdict::Deny, Verdict::WouldDeny] {
        let report = CheckReport {
            schema: Schema::Check,
            verdict,
            judged: true,
            destination: "tcp 127.0.0.1:1".to_owned(),
            generation: 3,
            targets: vec![CheckTarget {
                name: "main".to_owned(),
                admits: false,
                reason: "R".to_owned(),
            }],
            reason: "S".to_owned(),
        };
        assert_eq!(
            serde_json::to_string(&report)?,
            format!(
                r#"{{"schema":"enforcer/check/1","verdict":"{verdict}","judged":true,"destination":"tcp 127.0.0.1:1","generation":3,"targets":[{{"name":"main","admits":false,"reason":"R"}}],"reason":"S"}}"#
            )
        );
    }
    let checked = ConfigCheck {
        exists: true,
        untrusted: Some("B".to_owned()),
        schema: Schema::ConfigCheck,
        path: "P".to_owned(),
        targets: 1,
        defaults: false,
        warnings: vec!["W".to_owned()],
        absent: vec!["A".to_owned()],
        places: vec!["L".to_owned()],
        unprotected: vec!["U".to_owned()],
        errors: vec![ConfigMistake {
            path: "P".to_owned(),
            line: Some(1),
            target: Some("T".to_owned()),
            key: None,
            message: "M".to_owned(),
        }],
        more_errors: 2,
        not_checked: vec!["users"],
    };
    assert_eq!(
        serde_json::to_string(&checked)?,
        r#"{"schema":"enforcer/config-check/1","path":"P","exists":true,"untrusted":"B","targets":1,"defaults":false,"warnings":["W"],"absent":["A"],"places":["L"],"unprotected":["U"],"errors":[{"path":"P","line":1,"target":"T","key":null,"message":"M"}],"more_errors":2,"not_checked":["users"]}"#
    );
    Ok(())
}

#[test]
fn objects_are_in_the_order_of_their_names_and_read_back() {
    let named = |object: &Object| Object::try_from(object.to_string());
    let mut all: Vec<Object> = Object::NAMES.into_iter().map(|(object, _)| object).collect();
    all.extend(["a", "z"].map(|name| Object::Chain(name.to_owned())));
    all.extend(["a", "z"].map(|name| Object::Set(name.to_owned())));
    all.sort_unstable();
    let names: Vec<String> = all.iter().map(ToString::to_string).collect();
    assert!(names.is_sorted(), "{names:?}");
    assert!(all.iter().all(|object| named(object).as_ref() == Ok(object)));
    assert!(Object::try_from("map".to_owned()).is_err());
}

#[test]
fn every_condition_is_documented() {
    let document = include_str!("../../docs/schemas.md");
    let remedies = include_str!("../../docs/troubleshooting.md");
    for id in ConditionId::ALL {
        assert!(remedies.contains(&format!("\n| `{id}` | ")), "{id}: what to do?");
        let row = document.lines().find(|line| line.starts_with(&format!("| `{id}` | ")));
        let severity = id.because("").severity.to_string();
        assert!(
            row.is_some_and(|row| row.contains(&severity)),
            "{id}: {severity}, {row:?}"
        );
    }
}
