//! Evaluation as data: what was seen, and what is found.

use std::{collections::BTreeSet, net::IpAddr, slice};

use super::{
    Observations,
    buses::Member,
    cycles::Cycle,
    files::{Kind, Owned},
    firewall,
    image::{self, Image},
    instance::{Instance, StartWithout, Unknown},
    old_rules,
    programs::{Owner, Program},
};
use crate::{
    backend::{
        jobs::{Accept, JobRule, RuleDestination, RuleOrigin, RuleSubject},
        probe::{Fact, Facts, Feature},
        third_party::{Attached, ForeignRule, Nat, To},
    },
    config::Backend,
    policy::{Endpoint, Mode, Protocol, Uid},
    ruleset::{Place, RulePrincipal, RuleSet, RuleTarget},
    status::{Context, status},
    sweep::Listener,
    wire::{ActiveBackend, ConditionId, NameProtection, NameStatus, Severity, State, Status, doctor::Weight},
};

/// A host where all is well: ebpf is active, a daemon, monit on 127.0.0.1:2822.
fn well() -> Observations {
    let mut features = Facts::default();
    for feature in Feature::ALL {
        features.set(feature, Fact::Supported);
    }
    let place = Place {
        protocol: Protocol::Tcp,
        port: 2822,
        net: IpAddr::from([127, 0, 0, 1]).into(),
    };
    let instance = Instance {
        rules: Some(RuleSet {
            mode: Mode::Enforce,
            targets: Vec::new(),
            places: vec![(place, 1)],
            nat64: Vec::new(),
            named_ports: BTreeSet::new(),
        }),
        monit: Endpoint::parse_all("tcp://127.0.0.1:2822")
            .into_iter()
            .flatten()
            .collect(),
        active: Some(ActiveBackend::Ebpf),
        status: Some(well_by_status()),
        ..Instance::default()
    };
    Observations {
        instance,
        features,
        ..Observations::default()
    }
}

/// What `status` says there.
fn well_by_status() -> Status {
    let context = Context {
        daemon: Some(1),
        backend: ActiveBackend::Ebpf,
        unread: true,
        ..Context::default()
    };
    status(None, context)
}

fn ids(seen: Observations) -> Vec<&'static str> {
    seen.report().findings.iter().map(|finding| finding.id).collect()
}

fn check(change: impl FnOnce(&mut Observations), found: &[&str]) {
    let mut seen = well();
    change(&mut seen);
    assert_eq!(ids(seen.clone()), found, "{seen:#?}");
}

/// The same where a backend is active.
fn check_with(backend: ActiveBackend, change: impl FnOnce(&mut Observations), found: &[&str]) {
    check(
        |seen| {
            change(seen);
            seen.instance.active = Some(backend);
        },
        found,
    );
}

fn rule(table: &str, nat: Option<Nat>, matches: &[&str]) -> ForeignRule {
    ForeignRule {
        family: "ip".to_owned(),
        table: table.to_owned(),
        chain: "output".to_owned(),
        nat,
        matches: matches.iter().map(|name| (*name).to_owned()).collect(),
    }
}

fn listener(at: &str) -> Listener {
    Listener {
        protocol: Protocol::Tcp,
        at: at.parse().unwrap_or_else(|_| ([0, 0, 0, 0], 0).into()),
    }
}

fn program(after: bool) -> Program {
    Program {
        hook: "connect4",
        cgroup: "/sys/fs/cgroup".into(),
        after,
        attached: Attached {
            id: 7,
            preorder: false,
            name: "theirs".to_owned(),
        },
        owner: Owner::ThirdParty,
    }
}

#[test]
fn nothing_is_found_where_all_is_well() {
    check(|_| {}, &[]);
    assert_eq!(well().report().code(), 0);
}

#[test]
fn translation_is_found_where_it_leads_onto_an_endpoint_and_ebpf_is_alone() {
    let nat =
        |to, port| move |seen: &mut Observations| seen.firewall.rules.push(rule("nat", Some(Nat { to, port }), &[]));
    let monit = To::Address(IpAddr::from([127, 0, 0, 1]));
    let elsewhere = To::Address(IpAddr::from([10, 0, 0, 1]));
    check(nat(monit, Some(2822)), &["nat-onto-endpoint"]);
    check(nat(monit, None), &["nat-onto-endpoint"]);
    check(nat(To::Here, Some(2822)), &["nat-onto-endpoint"]);
    check(nat(monit, Some(80)), &[]);
    check(nat(elsewhere, Some(2822)), &[]);
    check(nat(To::Unknown, None), &["nat-unknown"]);
    check_with(ActiveBackend::Both, nat(monit, Some(2822)), &[]);
    for (legacy, found) in [
        ("DNAT --to-destination 127.0.0.1:2822", &["nat-onto-endpoint"][..]),
        ("DNAT --to-destination 127.0.0.1", &["nat-onto-endpoint"]),
        ("DNAT --to-destination 127.0.0.1:80", &[]),
        ("DNAT --to-destination 10.0.0.1-10.0.0.9", &["nat-unknown"]),
        ("REDIRECT --to-ports 2822", &["nat-onto-endpoint"]),
        ("ACCEPT", &[]),
    ] {
        let text = format!("*nat\n:OUTPUT ACCEPT\n-A OUTPUT -d 10.0.0.9/32 -p tcp -j {legacy}\nCOMMIT\n");
        check(|seen| seen.firewall.legacy = firewall::parse(&text), found);
    }
}

#[test]
fn servers_that_are_no_endpoints_are_named() {
    let by = ([10, 0, 0, 11], 4222).into();
    let mut seen = well();
    seen.instance.members = ["10.0.0.12", "bus-1"]
        .map(|host| Member {
            by,
            host: host.to_owned(),
            port: 4222,
        })
        .into();
    assert_eq!(ids(seen.clone()), ["bus-members"]);
    let items = seen.report().findings.pop().map(|finding| finding.items);
    let expected = [
        "10.0.0.12:4222, announced by 10.0.0.11:4222",
        "bus-1:4222, announced by 10.0.0.11:4222",
    ];
    assert_eq!(items, Some(expected.map(str::to_owned).into()));
}

#[test]
fn ordering_cycles_are_named_with_what_was_added() {
    let cycle = |drop_ins: &[&str]| Cycle {
        units: ["enforcer.service", "network-online.target"].map(str::to_owned).into(),
        drop_ins: drop_ins.iter().map(|path| (*path).to_owned()).collect(),
    };
    let seen = Observations {
        cycles: vec![cycle(&[]), cycle(&["/etc/systemd/system/enforcer.service.d/x.conf"])],
        ..well()
    };
    assert_eq!(ids(seen.clone()), ["ordering-cycle"]);
    let items = seen.report().findings.pop().map(|finding| finding.items);
    let expected = [
        "enforcer.service after network-online.target after enforcer.service",
        "enforcer.service after network-online.target after enforcer.service (see \
         /etc/systemd/system/enforcer.service.d/x.conf)",
    ];
    assert_eq!(items, Some(expected.map(str::to_owned).into()));
}

#[test]
fn a_listener_is_found_where_it_is_reached_beside_the_endpoint() {
    let listens = |at| move |seen: &mut Observations| seen.network.listeners.push(listener(at));
    check(listens("127.0.0.1:2822"), &[]);
    check(listens("[::]:2822"), &["listener-beyond-endpoint"]);
    check(listens("[::1]:2822"), &["listener-beyond-endpoint"]);
    check(listens("0.0.0.0:2822"), &[]);
    check(listens("[::]:80"), &[]);
    let routable = |seen: &mut Observations| {
        seen.instance.host.local.insert(IpAddr::from([10, 0, 0, 5]).into());
        seen.network.listeners.push(listener("0.0.0.0:2822"));
    };
    check(routable, &["listener-beyond-endpoint"]);
}

#[test]
fn programs_are_weighed_by_their_order() {
    check(|seen| seen.programs.push(program(true)), &["program-after"]);
    check(|seen| seen.programs.push(program(false)), &["program-before"]);
    check_with(ActiveBackend::Nftables, |seen| seen.programs.push(program(true)), &[]);
    // Of enforcer itself: of a place that was given up, or of an instance beside this one.
    let ours = |owner: Owner| move |seen: &mut Observations| seen.programs.push(Program { owner, ..program(true) });
    for backend in [ActiveBackend::Ebpf, ActiveBackend::Nftables] {
        check_with(
            backend,
            ours(Owner::Left(Some("/sys/fs/bpf/old".into()))),
            &["other-instance"],
        );
        check_with(backend, ours(Owner::Left(None)), &["other-instance"]);
        check_with(backend, ours(Owner::Instance), &[]);
    }
}

#[test]
fn modes_that_let_others_in_are_found() {
    let place = |kind, uid, mode| Owned {
        kind,
        path: "/somewhere".into(),
        uid,
        mode,
    };
    for (kind, uid, mode, found) in [
        (Kind::Bpffs, 0, 0o700, None),
        (Kind::Bpffs, 0, 0o1777, Some("bpffs-shared")),
        (Kind::Bpffs, 0, 0o777, Some("bpffs-open")),
        (Kind::Pins, 0, 0o700, None),
        (Kind::Pins, 0, 0o755, Some("pins-open")),
        (Kind::Pins, 0, 0o600, None),
        (Kind::Pins, 0, 0o666, Some("pins-open")),
        (Kind::Pins, 1000, 0o600, Some("pins-open")),
        (Kind::State, 0, 0o755, None),
        (Kind::State, 0, 0o777, Some("state-open")),
        (Kind::SocketDir, 0, 0o755, None),
        (Kind::SocketDir, 7, 0o755, Some("socket-open")),
        (Kind::Socket, 0, 0o600, None),
        (Kind::Socket, 0, 0o666, Some("socket-open")),
    ] {
        check(|seen| seen.files.owned.push(place(kind, uid, mode)), found.as_slice());
    }
}

#[test]
fn each_other_fact_is_found() {
    let fault = Some("line 3".to_owned());
    check(|seen| seen.instance.fault = fault, &["configuration"]);
    let by_status = |change: &dyn Fn(&mut Status), found: &[&str]| {
        let mut status = well_by_status();
        change(&mut status);
        check(|seen| seen.instance.status = Some(status), found);
    };
    by_status(&|status| status.state = State::Off, &["nothing-active"]);
    by_status(&|status| status.daemon.running = false, &["no-daemon"]);
    by_status(
        &|status| status.conditions = vec![ConditionId::ChangedByOthers.because("T")],
        &["degraded"],
    );
    by_status(
        &|status| status.conditions = vec![ConditionId::BackendFallback.because("T")],
        &[],
    );
    // What is not known is not found either.
    check(|seen| seen.instance.status = None, &[]);
    let lacks = |feature| {
        let why = "old".to_owned();
        move |seen: &mut Observations| seen.features.set(feature, Fact::Missing { why })
    };
    check(lacks(Feature::SocketOwner), &["feature-missing"]);
    check(lacks(Feature::RingBuffer), &[]);
    let none = |seen: &mut Observations| {
        seen.instance.settings.backend = Backend::Ebpf;
        lacks(Feature::RingBuffer)(seen);
    };
    check(none, &["no-backend"]);
}

#[test]
fn what_status_says_weighs_the_same() {
    let first = |seen: Observations| {
        seen.report()
            .findings
            .first()
            .map(|finding| (finding.id, finding.weight))
    };
    for (severity, weight) in [(Severity::Warning, Weight::Medium), (Severity::Critical, Weight::High)] {
        let mut status = well_by_status();
        status.conditions = vec![
            ConditionId::SavedRules.because("T"),
            ConditionId::Grants.because("T").with(severity),
        ];
        let mut seen = well();
        seen.instance.status = Some(status);
        assert_eq!(first(seen), Some(("degraded", weight)));
    }
    for (protects, weight) in [
        (NameProtection::Nothing, Weight::High),
        (NameProtection::Port, Weight::Medium),
        (NameProtection::Addresses, Weight::Medium),
    ] {
        // By the daemon's lookups, and by our own.
        let mut status = well_by_status();
        status.names.push(NameStatus {
            name: "bus.test".to_owned(),
            addresses: Vec::new(),
            stale: true,
            cause: None,
            protects,
            cut: 0,
        });
        let mut seen = well();
        seen.instance.status = Some(status);
        assert_eq!(first(seen), Some(("name-unresolved", weight)));
        let mut seen = well();
        seen.instance.unresolved.push(Unknown {
            name: "bus.test".to_owned(),
            why: "W".to_owned(),
            protects,
        });
        assert_eq!(first(seen), Some(("name-unresolved", weight)));
    }
    for (start, weight) in [
        (StartWithout::GoesOn, Weight::Medium),
        (StartWithout::NothingSaved, Weight::High),
        (StartWithout::NoPlace, Weight::High),
    ] {
        let mut seen = well();
        seen.instance.fault = Some("line 3".to_owned());
        seen.instance.start = start;
        assert_eq!(first(seen), Some(("configuration", weight)));
    }
}

#[test]
fn ways_past_one_backend_are_found_where_it_is_alone() {
    let eth0 = || "eth0".to_owned();
    check(|seen| seen.network.source_route.push(eth0()), &["source-route"]);
    check(|seen| seen.network.segment_routing.push(eth0()), &["segment-routing"]);
    let passing = |seen: &mut Observations| seen.namespaces.passing.push("macvlan eth0 of runc (pid 7)".to_owned());
    check_with(ActiveBackend::Nftables, passing, &["past-ip-hooks"]);
    check_with(ActiveBackend::Both, passing, &[]);
    check_with(ActiveBackend::Ebpf, passing, &[]);
    let namespaces = |seen: &mut Observations| seen.namespaces.others.push("runc".to_owned());
    check_with(ActiveBackend::Ebpf, namespaces, &["other-network-namespaces"]);
    check_with(ActiveBackend::Both, namespaces, &[]);
    let endpoint = |protocol, net: &'static str| {
        move |seen: &mut Observations| {
            let net = net.parse().map(|net| (protocol, 53, net));
            let place = net.map(|(protocol, port, net)| Place { protocol, port, net });
            let rules = seen.instance.rules.iter_mut();
            rules.for_each(|rules| rules.places.extend(place.iter().map(|place| (*place, 1))));
        }
    };
    let udp6 = || endpoint(Protocol::Udp, "2001:db8::5/128");
    check_with(ActiveBackend::Ebpf, udp6(), &["udp-routing-header"]);
    check_with(ActiveBackend::Both, udp6(), &[]);
    check_with(ActiveBackend::Ebpf, endpoint(Protocol::Udp, "10.0.0.5/32"), &[]);
    check_with(ActiveBackend::Ebpf, endpoint(Protocol::Tcp, "2001:db8::5/128"), &[]);
    let localnet = |net| {
        move |seen: &mut Observations| {
            seen.network.route_localnet.push("eth0".to_owned());
            endpoint(Protocol::Tcp, net)(seen);
        }
    };
    check_with(ActiveBackend::Ebpf, localnet("127.0.0.1/32"), &["route-localnet"]);
    check_with(ActiveBackend::Ebpf, localnet("0.0.0.0/0"), &["route-localnet"]);
    check_with(ActiveBackend::Both, localnet("127.0.0.1/32"), &[]);
    check_with(ActiveBackend::Nftables, localnet("127.0.0.1/32"), &[]);
}

fn chain(table: &str, chain: &str) -> (String, String, String) {
    ("inet".to_owned(), table.to_owned(), chain.to_owned())
}

#[test]
fn rules_of_earlier_stemcells_are_named() {
    let found = &["old-stemcell-rules"];
    for (table, name) in old_rules::CHAINS {
        check(|seen| seen.firewall.chains.push(chain(table, name)), found);
    }
    check(|seen| seen.firewall.chains.push(chain("filter", "output")), &[]);
    let text = "*mangle\n-A POSTROUTING -d 127.0.0.1/32 -p tcp -m tcp --dport 2822 -m cgroup ! --cgroup 2958295041 -j \
        DROP\nCOMMIT\n";
    check(|seen| seen.firewall.legacy = firewall::parse(text), found);
    check(
        |seen| seen.firewall.rules.push(rule("mangle", None, &["cgroup"])),
        found,
    );
    check(|seen| seen.firewall.rules.push(rule("mangle", None, &["tcp"])), &[]);
}

#[test]
fn rules_of_the_agent_weigh_by_whom_they_drop() {
    let [root, job] = [0, 1000].map(|uid| RulePrincipal::User {
        uid: Uid(uid),
        cgroup: None,
    });
    let weight = |chains: &[(String, String, String)], principals: &[&RulePrincipal], accepted: Option<u32>| {
        let mut seen = well();
        seen.instance.jobs.rules.extend(accepted.map(|user| JobRule {
            handle: 1,
            accepts: Ok(Accept {
                subject: RuleSubject {
                    user: Some(user),
                    cgroup: None,
                },
                to: RuleDestination::default(),
            }),
            writer: RuleOrigin::Grants,
        }));
        seen.firewall.chains = chains.to_vec();
        if let Some(rules) = &mut seen.instance.rules {
            rules.targets.push(RuleTarget {
                name: "monit".to_owned(),
                principals: principals.iter().map(|principal| (*principal).clone()).collect(),
            });
        }
        seen.report().findings.first().map(|finding| finding.weight)
    };
    let [monit, nats] = ["monit_access", "nats_access"].map(|name| chain("bosh_agent", name));
    let stemcells = chain("filter", "monit_output");
    // Of who is granted nobody need be there now: the agent's chain accepts whom the jobs' chain accepts then.
    for (chain, expected) in [(&monit, Weight::Low), (&stemcells, Weight::High)] {
        let mut seen = well();
        seen.instance.grants_monit = true;
        seen.firewall.chains = vec![chain.clone()];
        let found = seen.report().findings;
        assert_eq!(found.first().map(|finding| finding.weight), Some(expected));
    }
    for (chains, principals, accepted, expected) in [
        (&[monit.clone(), nats.clone()][..], &[&root][..], None, Weight::Low),
        (&[nats], &[&root, &job], None, Weight::Low),
        (slice::from_ref(&monit), &[&root, &job], None, Weight::High),
        (slice::from_ref(&monit), &[&root, &job], Some(1001), Weight::High),
        (slice::from_ref(&monit), &[&root, &job], Some(1000), Weight::Low),
        (slice::from_ref(&stemcells), &[&root], None, Weight::Medium),
        (slice::from_ref(&stemcells), &[&job], Some(1000), Weight::High),
    ] {
        let found = weight(chains, principals, accepted);
        assert_eq!(found, Some(expected), "{chains:?} {principals:?} {accepted:?}");
    }
}

#[test]
fn the_worst_comes_first_and_the_text_says_what_to_do() {
    let mut seen = well();
    seen.network.listeners.push(listener("[::]:2822"));
    seen.network.source_route.push("eth0".to_owned());
    seen.programs.push(program(false));
    let report = seen.report();
    let weights: Vec<_> = report.findings.iter().map(|finding| finding.weight).collect();
    assert_eq!(weights, [Weight::High, Weight::Medium, Weight::Medium]);
    assert_eq!(report.code(), 1);
    let text = report.render();
    assert_eq!(text.matches("do: ").count(), 3, "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 110), "{text}");
    for heading in ["HOST", "BACKENDS", "CHOICE", "FINDINGS (3"] {
        assert!(text.contains(heading), "{text}");
    }
}

#[test]
fn f6_a_name_in_a_finding_steers_no_terminal() {
    let mut seen = well();
    seen.namespaces.others.push("\u{1b}[2J\u{202e}\nx (pid 7)".to_owned());
    let text = seen.report().render();
    assert!(text.contains("x (pid 7)"), "{text}");
    assert!(!text.contains(['\u{1b}', '\u{202e}']), "{text}");
    assert!(!text.lines().any(|line| line.starts_with('x')), "{text}");
}

#[test]
fn an_image_is_evaluated_by_its_options_and_modules() {
    let mut text = String::from("# CONFIG_SOMETHING is not set\n");
    let mut dep = String::from("kernel/a/other.ko.xz: kernel/b.ko\n");
    for (_, option, module) in image::OPTIONS {
        let value = if module.is_empty() { 'y' } else { 'm' };
        text.push_str(&format!("CONFIG_{option}={value}\n"));
        dep.push_str(&format!("kernel/{module}.ko.zst:\n"));
    }
    let whole = Image {
        release: Some("6.1.0".to_owned()),
        options: image::options(&text),
        modules: image::modules(&dep).collect(),
        ..Image::default()
    };
    let report = whole.clone().report();
    assert_eq!(report.findings, []);
    assert_eq!(report.choice.backend, Some(Backend::Ebpf));

    let mut without = whole.clone();
    without.options.remove("CGROUP_BPF");
    assert_eq!(without.clone().report().choice.backend, Some(Backend::Nftables));
    without.modules.remove("nft_reject_inet");
    let report = without.report();
    assert_eq!(report.choice.backend, None);
    let ids: Vec<_> = report.findings.iter().map(|finding| finding.id).collect();
    assert_eq!(ids, ["no-backend", "kernel-options"]);
    let items = report.findings.into_iter().flat_map(|finding| finding.items);
    let expected = [
        "CONFIG_CGROUP_BPF is not set: programs at connect",
        "module nft_reject_inet (CONFIG_NFT_REJECT_INET) is not there: nft reject",
    ];
    assert_eq!(items.collect::<Vec<_>>(), expected);
    assert_eq!(Image::default().report().choice.backend, None);
}

/// What `doctor --root` demands is what the package brings: the list that cargo-deb reads, and the units with their
/// targets.
#[test]
#[allow(clippy::indexing_slicing, reason = "a manifest of another shape fails the test")]
fn an_image_needs_what_the_package_brings() {
    let manifest: toml::Table = include_str!("../../Cargo.toml").parse().unwrap_or_default();
    let deb = &manifest["package"]["metadata"]["deb"];
    let list = |value: &toml::Value, key: &str| value[key].as_array().cloned().unwrap_or_default();
    let text = |value: &toml::Value| value.as_str().unwrap_or_default().to_owned();
    let (mut files, mut links) = (Vec::new(), Vec::new());
    for asset in list(deb, "assets") {
        let (source, target) = (text(&asset[0]), text(&asset[1]));
        let name = source.rsplit('/').next().filter(|_| target.ends_with('/'));
        files.push(target.clone() + name.unwrap_or_default());
    }
    let units = [
        include_str!("../../packaging/systemd/enforcer-early.service"),
        include_str!("../../packaging/systemd/enforcer.service"),
    ];
    for (unit, content) in list(deb, "systemd-units").iter().zip(units) {
        let name = text(&unit["unit-name"]);
        files.push(format!("usr/lib/systemd/system/{name}.service"));
        let target = content.lines().find_map(|line| line.strip_prefix("WantedBy="));
        links.push(format!(
            "etc/systemd/system/{}.wants/{name}.service",
            target.unwrap_or_default()
        ));
    }
    assert_eq!(links, image::LINKS);
    for file in image::FILES {
        assert!(
            files.iter().any(|packaged| packaged == file),
            "{file} is not in {files:?}"
        );
    }
}
