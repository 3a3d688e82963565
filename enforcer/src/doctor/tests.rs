//! Judging as data: what was seen, and what is found.

use std::{collections::BTreeSet, net::IpAddr, slice};

use super::{
    buses::Member,
    collect::{Capable, PlaceKind, PlaceMode, Program, Seen, powers},
    image::{self, ImageSeen, judge_image},
    judge, legacy,
    order::Cycle,
};
use crate::{
    backend::{
        jobs::{Accept, Destination, JobRule, Subject, Writer},
        probe::{Fact, Facts, Feature},
        third_party::{Attached, ForeignRule, Nat, To},
    },
    config::Backend,
    policy::{Mode, Protocol, Uid},
    ruleset::{Place, RulePrincipal, RuleSet, RuleTarget},
    status::{Context, status},
    sweep::Listener,
    wire::{ActiveBackend, doctor::Weight},
};

/// A host where all is well: ebpf in force, a daemon, monit on 127.0.0.1:2822.
fn well() -> Seen {
    let mut facts = Facts::default();
    for feature in Feature::ALL {
        facts.set(feature, Fact::Supported);
    }
    let place = Place {
        protocol: Protocol::Tcp,
        port: 2822,
        net: IpAddr::from([127, 0, 0, 1]).into(),
    };
    Seen {
        facts,
        rules: Some(RuleSet {
            mode: Mode::Enforce,
            targets: Vec::new(),
            places: vec![(place, 1)],
            nat64: Vec::new(),
            named_ports: BTreeSet::new(),
        }),
        in_force: Some(ActiveBackend::Ebpf),
        daemon: Some(status(
            None,
            Context {
                daemon: Some(1),
                unread: true,
                ..Context::default()
            },
        )),
        ..Seen::default()
    }
}

fn ids(seen: &Seen) -> Vec<&'static str> {
    judge::host(seen).findings.iter().map(|finding| finding.id).collect()
}

fn check(change: impl FnOnce(&mut Seen), found: &[&str]) {
    let mut seen = well();
    change(&mut seen);
    assert_eq!(ids(&seen), found, "{seen:#?}");
}

fn nat(to: To, port: Option<u16>) -> ForeignRule {
    ForeignRule {
        family: "ip".to_owned(),
        table: "nat".to_owned(),
        chain: "output".to_owned(),
        nat: Some(Nat { to, port }),
        matches: Vec::new(),
    }
}

fn listener(at: &str) -> Listener {
    Listener {
        protocol: Protocol::Tcp,
        at: at.parse().unwrap_or_else(|_| ([0, 0, 0, 0], 0).into()),
    }
}

fn program(above: bool, after: bool, rewrites: bool) -> Program {
    Program {
        hook: "connect4",
        cgroup: "/sys/fs/cgroup".into(),
        above,
        after,
        attached: Attached {
            id: 7,
            preorder: false,
            name: "theirs".to_owned(),
            rewrites,
        },
    }
}

#[test]
fn nothing_is_found_where_all_is_well() {
    check(|_| {}, &[]);
    assert_eq!(judge::host(&well()).code(), 0);
}

#[test]
fn translation_is_found_where_it_leads_onto_an_endpoint_and_ebpf_is_alone() {
    let monit = To::Address(IpAddr::from([127, 0, 0, 1]));
    let elsewhere = To::Address(IpAddr::from([10, 0, 0, 1]));
    check(|seen| seen.foreign.push(nat(monit, Some(2822))), &["nat-onto-endpoint"]);
    check(|seen| seen.foreign.push(nat(monit, None)), &["nat-onto-endpoint"]);
    check(
        |seen| seen.foreign.push(nat(To::Here, Some(2822))),
        &["nat-onto-endpoint"],
    );
    check(|seen| seen.foreign.push(nat(monit, Some(80))), &[]);
    check(|seen| seen.foreign.push(nat(elsewhere, Some(2822))), &[]);
    check(|seen| seen.foreign.push(nat(To::Unknown, None)), &["nat-unknown"]);
    let both = |seen: &mut Seen| {
        seen.foreign.push(nat(monit, Some(2822)));
        seen.in_force = Some(ActiveBackend::Both);
    };
    check(both, &[]);
    let text =
        "*nat\n:OUTPUT ACCEPT\n-A OUTPUT -d 10.0.0.9/32 -p tcp -j DNAT --to-destination 127.0.0.1:2822\nCOMMIT\n";
    check(|seen| seen.legacy = legacy::parse(text), &["nat-onto-endpoint"]);
}

#[test]
fn servers_that_are_no_endpoints_are_named() {
    let by = ([10, 0, 0, 11], 4222).into();
    let seen = Seen {
        members: [Ok([10, 0, 0, 12].into()), Err("bus-1".to_owned())]
            .map(|host| Member { by, host, port: 4222 })
            .into(),
        ..well()
    };
    assert_eq!(ids(&seen), ["bus-members"]);
    let said = judge::host(&seen).findings.pop().map(|finding| finding.items);
    let expected = [
        "10.0.0.12:4222, as 10.0.0.11:4222 says",
        "bus-1:4222, as 10.0.0.11:4222 says",
    ];
    assert_eq!(said, Some(expected.map(str::to_owned).into()));
}

#[test]
fn ordering_cycles_are_named_with_what_was_added() {
    let cycle = |drop_ins: &[&str]| Cycle {
        units: ["enforcer.service", "network-online.target"].map(str::to_owned).into(),
        drop_ins: drop_ins.iter().map(|path| (*path).to_owned()).collect(),
    };
    let seen = Seen {
        cycles: vec![cycle(&[]), cycle(&["/etc/systemd/system/enforcer.service.d/x.conf"])],
        ..well()
    };
    assert_eq!(ids(&seen), ["ordering-cycle"]);
    let said = judge::host(&seen).findings.pop().map(|finding| finding.items);
    let expected = [
        "enforcer.service after network-online.target after enforcer.service",
        "enforcer.service after network-online.target after enforcer.service (see /etc/systemd/system/enforcer.service.d/x.conf)",
    ];
    assert_eq!(said, Some(expected.map(str::to_owned).into()));
}

#[test]
fn a_listener_is_found_where_it_is_reached_beside_the_endpoint() {
    check(|seen| seen.listeners.push(listener("127.0.0.1:2822")), &[]);
    check(
        |seen| seen.listeners.push(listener("[::]:2822")),
        &["listener-beyond-endpoint"],
    );
    check(
        |seen| seen.listeners.push(listener("[::1]:2822")),
        &["listener-beyond-endpoint"],
    );
    check(|seen| seen.listeners.push(listener("0.0.0.0:2822")), &[]);
    check(|seen| seen.listeners.push(listener("[::]:80")), &[]);
    let routable = |seen: &mut Seen| {
        seen.host.local.insert(IpAddr::from([10, 0, 0, 5]).into());
        seen.listeners.push(listener("0.0.0.0:2822"));
    };
    check(routable, &["listener-beyond-endpoint"]);
}

#[test]
fn programs_are_weighed_by_their_order() {
    check(
        |seen| seen.programs.push(program(false, true, true)),
        &["program-rewrites-after"],
    );
    check(
        |seen| seen.programs.push(program(true, true, false)),
        &["program-after"],
    );
    check(
        |seen| seen.programs.push(program(false, false, true)),
        &["program-rewrites-before"],
    );
    check(
        |seen| seen.programs.push(program(false, false, false)),
        &["program-before"],
    );
    let nft = |seen: &mut Seen| {
        seen.programs.push(program(false, true, true));
        seen.in_force = Some(ActiveBackend::Nftables);
    };
    check(nft, &[]);
}

#[test]
fn modes_that_let_others_in_are_found() {
    let place = |kind, uid, mode| PlaceMode {
        kind,
        path: "/somewhere".into(),
        uid,
        mode,
    };
    for (kind, uid, mode, found) in [
        (PlaceKind::Bpffs, 0, 0o700, None),
        (PlaceKind::Bpffs, 0, 0o1777, Some("bpffs-shared")),
        (PlaceKind::Bpffs, 0, 0o777, Some("bpffs-open")),
        (PlaceKind::PinDir, 0, 0o700, None),
        (PlaceKind::PinDir, 0, 0o755, Some("pins-open")),
        (PlaceKind::Pin, 0, 0o600, None),
        (PlaceKind::Pin, 0, 0o666, Some("pins-open")),
        (PlaceKind::Pin, 1000, 0o600, Some("pins-open")),
        (PlaceKind::StateDir, 0, 0o755, None),
        (PlaceKind::StateDir, 0, 0o777, Some("state-open")),
        (PlaceKind::SocketDir, 0, 0o755, None),
        (PlaceKind::SocketDir, 7, 0o755, Some("socket-open")),
        (PlaceKind::Socket, 0, 0o600, None),
        (PlaceKind::Socket, 0, 0o666, Some("socket-open")),
    ] {
        check(|seen| seen.places.push(place(kind, uid, mode)), found.as_slice());
    }
}

#[test]
fn each_other_fact_is_found() {
    check(|seen| seen.fault = Some("line 3".to_owned()), &["configuration"]);
    check(|seen| seen.in_force = None, &["nothing-in-force"]);
    check(|seen| seen.daemon = None, &["no-daemon"]);
    check(|seen| seen.mptcp = 1, &["mptcp-add-addr"]);
    check(|seen| seen.source_route.push("eth0".to_owned()), &["source-route"]);
    check(
        |seen| seen.segment_routing.push("eth0".to_owned()),
        &["segment-routing"],
    );
    let passing = |backend| {
        move |seen: &mut Seen| {
            seen.passing.push("macvlan eth0 of runc (pid 7)".to_owned());
            seen.in_force = Some(backend);
        }
    };
    check(passing(ActiveBackend::Nftables), &["past-ip-hooks"]);
    check(passing(ActiveBackend::Both), &[]);
    check(passing(ActiveBackend::Ebpf), &[]);
    let endpoint = |protocol, net: &'static str, backend| {
        move |seen: &mut Seen| {
            let net = net.parse().map(|net| Place {
                protocol,
                port: 53,
                net,
            });
            let places = seen.rules.iter_mut().map(|rules| &mut rules.places);
            places.for_each(|places| places.extend(net.iter().map(|place| (*place, 1))));
            seen.in_force = Some(backend);
        }
    };
    check(
        endpoint(Protocol::Udp, "2001:db8::5/128", ActiveBackend::Ebpf),
        &["udp-routing-header"],
    );
    check(endpoint(Protocol::Udp, "2001:db8::5/128", ActiveBackend::Both), &[]);
    check(endpoint(Protocol::Udp, "10.0.0.5/32", ActiveBackend::Ebpf), &[]);
    check(endpoint(Protocol::Tcp, "2001:db8::5/128", ActiveBackend::Ebpf), &[]);
    let localnet = |net: &'static str, backend| {
        move |seen: &mut Seen| {
            seen.route_localnet.push("eth0".to_owned());
            endpoint(Protocol::Tcp, net, backend)(seen);
        }
    };
    check(localnet("127.0.0.1/32", ActiveBackend::Ebpf), &["route-localnet"]);
    check(localnet("0.0.0.0/0", ActiveBackend::Ebpf), &["route-localnet"]);
    check(localnet("127.0.0.1/32", ActiveBackend::Both), &[]);
    check(localnet("127.0.0.1/32", ActiveBackend::Nftables), &[]);
    let namespaces = |seen: &mut Seen| drop(seen.namespaces.insert(1, "runc".to_owned()));
    check(namespaces, &["other-network-namespaces"]);
    check(
        |seen| {
            namespaces(seen);
            seen.in_force = Some(ActiveBackend::Both);
        },
        &[],
    );
    check(
        |seen| seen.unresolved.push(("bus.test".to_owned(), "no answer".to_owned())),
        &["name-unresolved"],
    );
    check(
        |seen| {
            seen.facts.set(
                Feature::SocketOwner,
                Fact::Missing {
                    why: "no BTF".to_owned(),
                },
            );
        },
        &["feature-missing"],
    );
    check(
        |seen| {
            seen.facts
                .set(Feature::RingBuffer, Fact::Missing { why: "old".to_owned() });
        },
        &[],
    );
    let none = |seen: &mut Seen| {
        seen.settings.backend = Backend::Ebpf;
        seen.facts
            .set(Feature::RingBuffer, Fact::Missing { why: "old".to_owned() });
    };
    check(none, &["no-backend"]);
    check(
        |seen| {
            seen.capable.push(Capable {
                pid: 9,
                uid: 33,
                name: "ping".to_owned(),
                capabilities: vec!["CAP_NET_RAW"],
            });
        },
        &["capable-processes"],
    );
}

#[test]
fn rules_of_earlier_stemcells_are_named() {
    for (table, chain) in legacy::AGENT_CHAINS {
        check(
            |seen| {
                seen.chains
                    .push(("inet".to_owned(), table.to_owned(), chain.to_owned()));
            },
            &["old-stemcell-rules"],
        );
    }
    check(
        |seen| {
            seen.chains
                .push(("inet".to_owned(), "filter".to_owned(), "output".to_owned()));
        },
        &[],
    );
    let text = "*mangle\n-A POSTROUTING -d 127.0.0.1/32 -p tcp -m tcp --dport 2822 -m cgroup ! --cgroup 2958295041 -j DROP\nCOMMIT\n";
    check(|seen| seen.legacy = legacy::parse(text), &["old-stemcell-rules"]);
    let by_cgroup = ForeignRule {
        family: "ip".to_owned(),
        table: "mangle".to_owned(),
        chain: "POSTROUTING".to_owned(),
        nat: None,
        matches: vec!["cgroup".to_owned()],
    };
    check(|seen| seen.foreign.push(by_cgroup), &["old-stemcell-rules"]);
}

#[test]
fn rules_of_the_agent_weigh_by_whom_they_drop() {
    let chain = |table: &str, chain: &str| ("inet".to_owned(), table.to_owned(), chain.to_owned());
    let root = RulePrincipal::User {
        uid: Uid(0),
        cgroup: None,
    };
    let job = RulePrincipal::User {
        uid: Uid(1000),
        cgroup: None,
    };
    let weight = |chains: &[(String, String, String)], principals: &[&RulePrincipal], accepted: Option<u32>| {
        let mut seen = well();
        seen.jobs.rules.extend(accepted.map(|user| JobRule {
            handle: 1,
            accepts: Ok(Accept {
                subject: Subject {
                    user: Some(user),
                    cgroup: None,
                },
                to: Destination::default(),
            }),
            writer: Writer::Grants,
        }));
        seen.chains = chains.to_vec();
        if let Some(rules) = &mut seen.rules {
            rules.targets.push(RuleTarget {
                name: "monit".to_owned(),
                principals: principals.iter().map(|principal| (*principal).clone()).collect(),
            });
        }
        judge::host(&seen).findings.first().map(|finding| finding.weight)
    };
    let [monit, nats] = ["monit_access", "nats_access"].map(|name| chain("bosh_agent", name));
    let stemcells = chain("filter", "monit_output");
    // Of who is granted nobody need be there now: the agent's chain lets through whoever is written to the jobs' chain then.
    for (chain, expected) in [(&monit, Weight::Low), (&stemcells, Weight::High)] {
        let mut seen = well();
        seen.grants_monit = true;
        seen.chains = vec![chain.clone()];
        let found = judge::host(&seen).findings;
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
    seen.listeners.push(listener("[::]:2822"));
    seen.mptcp = 2;
    seen.programs.push(program(false, false, false));
    let report = judge::host(&seen);
    let weights: Vec<_> = report.findings.iter().map(|finding| finding.weight).collect();
    assert_eq!(weights, [Weight::High, Weight::Medium, Weight::Low]);
    assert_eq!(report.code(), 1);
    let text = report.render();
    assert_eq!(text.matches("do: ").count(), 3, "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 110), "{text}");
    for heading in ["HOST", "BACKENDS", "CHOICE", "FINDINGS (3"] {
        assert!(text.contains(heading), "{text}");
    }
}

#[test]
fn powers_are_those_of_users_who_are_not_root() {
    let status = |uid, capabilities| format!("Name:\tx\nUid:\t{uid}\t{uid}\nCapEff:\t{capabilities}\n");
    assert_eq!(powers(&status(33, "0000000000002000")), Some((33, vec!["CAP_NET_RAW"])));
    assert_eq!(powers(&status(33, "0000000000000001")), None);
    assert_eq!(powers(&status(0, "000001ffffffffff")), None);
    assert_eq!(powers("nonsense"), None);
}

#[test]
fn an_image_is_judged_by_its_options_and_modules() {
    let all = "BPF_SYSCALL CGROUPS CGROUP_BPF INET DEBUG_INFO_BTF NF_TABLES_INET NF_TABLES_IPV4 NF_TABLES_IPV6 INET_DIAG_DESTROY";
    let modules = "NF_TABLES NFT_REJECT NFT_REJECT_INET NFT_LIMIT NFT_LOG NETFILTER_NETLINK_LOG NFT_SOCKET INET_DIAG INET_TCP_DIAG";
    let mut text = String::from("# CONFIG_SOMETHING is not set\n");
    for (names, value) in [(all, 'y'), (modules, 'm')] {
        for name in names.split(' ') {
            text.push_str(&format!("CONFIG_{name}={value}\n"));
        }
    }
    let dep = "kernel/a/nf_tables.ko.xz: kernel/b.ko\nkernel/nft_reject.ko:\nkernel/nft_reject_inet.ko:\nkernel/nft_limit.ko.zst:\n\
        kernel/nft_log.ko:\nkernel/nfnetlink_log.ko:\nkernel/nft_socket.ko:\nkernel/inet_diag.ko:\nkernel/tcp_diag.ko:\n";
    let whole = ImageSeen {
        release: Some("6.1.0".to_owned()),
        options: image::options(&text),
        modules: image::modules(dep).collect(),
        ..ImageSeen::default()
    };
    let (facts, findings) = judge_image(&whole);
    assert!(findings.is_empty(), "{findings:?}");
    assert_eq!(judge::image(&whole).choice.backend, Some(Backend::Ebpf));
    assert_eq!(facts.works().nftables, Fact::Supported);

    let mut without = whole.clone();
    without.options.remove("CGROUP_BPF");
    assert_eq!(judge::image(&without).choice.backend, Some(Backend::Nftables));
    without.modules.remove("nft_reject_inet");
    let report = judge::image(&without);
    assert_eq!(report.choice.backend, None);
    let ids: Vec<_> = report.findings.iter().map(|finding| finding.id).collect();
    assert_eq!(ids, ["no-backend", "kernel-options"]);
    let items = report
        .findings
        .last()
        .map(|finding| finding.items.join("\n"))
        .unwrap_or_default();
    assert!(
        items.contains("CONFIG_CGROUP_BPF") && items.contains("CONFIG_NFT_REJECT_INET"),
        "{items}"
    );

    assert_eq!(judge::image(&ImageSeen::default()).choice.backend, None);
}
