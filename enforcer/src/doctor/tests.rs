//! Evaluation as data: what was seen, and what is found.

use std::{collections::BTreeSet, net::IpAddr, slice};

use super::{
    Seen, Weight,
    buses::Member,
    cycles::Cycle,
    files::{Kind, Owned},
    firewall,
    image::{self, Image},
    instance::Instance,
    old_rules,
    programs::Program,
};
use crate::{
    backend::{
        ebpf::sys::Attached,
        nftables::{
            jobs::{Accept, Destination, JobRule, Subject, Writer},
            others::{ForeignRule, Nat, To},
        },
        probe::{Fact, Facts, Feature},
    },
    config::Backend,
    policy::{Endpoint, Mode, Protocol, Uid},
    ruleset::{Place, RulePrincipal, RuleSet, RuleTarget},
    status::{Context, status},
    sweep::Listener,
};

/// A host where all is well: ebpf is active, a daemon, monit on 127.0.0.1:2822.
fn well() -> Seen {
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
        active: Some(Backend::Ebpf),
        daemon: Some(status(
            None,
            Context {
                daemon: Some(1),
                unread: true,
                ..Context::default()
            },
        )),
        ..Instance::default()
    };
    Seen {
        features,
        instance,
        ..Seen::default()
    }
}

fn ids(seen: Seen) -> Vec<&'static str> {
    seen.report().findings.iter().map(|finding| finding.id).collect()
}

fn check(change: impl FnOnce(&mut Seen), found: &[&str]) {
    let mut seen = well();
    change(&mut seen);
    assert_eq!(ids(seen.clone()), found, "{seen:#?}");
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

fn program(after: bool) -> Program {
    Program {
        hook: "connect4",
        cgroup: "/sys/fs/cgroup".into(),
        after,
        attached: Attached {
            id: 7,
            preorder: false,
            name: "theirs".to_owned(),
            rewrites: false,
        },
    }
}

#[test]
fn nothing_is_found_where_all_is_well() {
    check(|_| {}, &[]);
    assert_eq!(well().report().code(), 0);
}

#[test]
fn translation_is_found_where_it_leads_onto_an_endpoint_and_ebpf_is_alone() {
    let monit = To::Address(IpAddr::from([127, 0, 0, 1]));
    let elsewhere = To::Address(IpAddr::from([10, 0, 0, 1]));
    check(
        |seen| seen.firewall.rules.push(nat(monit, Some(2822))),
        &["nat-onto-endpoint"],
    );
    check(
        |seen| seen.firewall.rules.push(nat(monit, None)),
        &["nat-onto-endpoint"],
    );
    check(
        |seen| seen.firewall.rules.push(nat(To::Here, Some(2822))),
        &["nat-onto-endpoint"],
    );
    check(|seen| seen.firewall.rules.push(nat(monit, Some(80))), &[]);
    check(|seen| seen.firewall.rules.push(nat(elsewhere, Some(2822))), &[]);
    check(
        |seen| seen.firewall.rules.push(nat(To::Unknown, None)),
        &["nat-unknown"],
    );
    let both = |seen: &mut Seen| {
        seen.firewall.rules.push(nat(monit, Some(2822)));
        seen.instance.active = Some(Backend::Both);
    };
    check(both, &[]);
    let text =
        "*nat\n:OUTPUT ACCEPT\n-A OUTPUT -d 10.0.0.9/32 -p tcp -j DNAT --to-destination 127.0.0.1:2822\nCOMMIT\n";
    check(
        |seen| seen.firewall.legacy = firewall::parse(text),
        &["nat-onto-endpoint"],
    );
}

#[test]
fn servers_that_are_no_endpoints_are_named() {
    let by = ([10, 0, 0, 11], 4222).into();
    let mut seen = well();
    seen.instance.members = [Ok([10, 0, 0, 12].into()), Err("bus-1".to_owned())]
        .map(|host| Member { by, host, port: 4222 })
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
    let seen = Seen {
        cycles: vec![cycle(&[]), cycle(&["/etc/systemd/system/enforcer.service.d/x.conf"])],
        ..well()
    };
    assert_eq!(ids(seen.clone()), ["ordering-cycle"]);
    let items = seen.report().findings.pop().map(|finding| finding.items);
    let expected = [
        "enforcer.service after network-online.target after enforcer.service",
        "enforcer.service after network-online.target after enforcer.service (see /etc/systemd/system/enforcer.service.d/x.conf)",
    ];
    assert_eq!(items, Some(expected.map(str::to_owned).into()));
}

#[test]
fn a_listener_is_found_where_it_is_reached_beside_the_endpoint() {
    check(|seen| seen.network.listeners.push(listener("127.0.0.1:2822")), &[]);
    check(
        |seen| seen.network.listeners.push(listener("[::]:2822")),
        &["listener-beyond-endpoint"],
    );
    check(
        |seen| seen.network.listeners.push(listener("[::1]:2822")),
        &["listener-beyond-endpoint"],
    );
    check(|seen| seen.network.listeners.push(listener("0.0.0.0:2822")), &[]);
    check(|seen| seen.network.listeners.push(listener("[::]:80")), &[]);
    let routable = |seen: &mut Seen| {
        seen.instance.host.local.insert(IpAddr::from([10, 0, 0, 5]).into());
        seen.network.listeners.push(listener("0.0.0.0:2822"));
    };
    check(routable, &["listener-beyond-endpoint"]);
}

#[test]
fn programs_are_weighed_by_their_order() {
    check(|seen| seen.programs.push(program(true)), &["program-after"]);
    check(|seen| seen.programs.push(program(false)), &["program-before"]);
    let nft = |seen: &mut Seen| {
        seen.programs.push(program(true));
        seen.instance.active = Some(Backend::Nftables);
    };
    check(nft, &[]);
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
    check(
        |seen| seen.instance.fault = Some("line 3".to_owned()),
        &["configuration"],
    );
    check(|seen| seen.instance.active = None, &["nothing-in-force"]);
    check(|seen| seen.instance.daemon = None, &["no-daemon"]);
    check(
        |seen| seen.network.source_route.push("eth0".to_owned()),
        &["source-route"],
    );
    check(
        |seen| seen.network.segment_routing.push("eth0".to_owned()),
        &["segment-routing"],
    );
    let passing = |backend: Backend| {
        move |seen: &mut Seen| {
            seen.namespaces.passing.push("macvlan eth0 of runc (pid 7)".to_owned());
            seen.instance.active = Some(backend);
        }
    };
    check(passing(Backend::Nftables), &["past-ip-hooks"]);
    check(passing(Backend::Both), &[]);
    check(passing(Backend::Ebpf), &[]);
    let endpoint = |protocol, net: &'static str, backend: Backend| {
        move |seen: &mut Seen| {
            let net = net.parse().map(|net| Place {
                protocol,
                port: 53,
                net,
            });
            let places = seen.instance.rules.iter_mut().map(|rules| &mut rules.places);
            places.for_each(|places| places.extend(net.iter().map(|place| (*place, 1))));
            seen.instance.active = Some(backend);
        }
    };
    check(
        endpoint(Protocol::Udp, "2001:db8::5/128", Backend::Ebpf),
        &["udp-routing-header"],
    );
    check(endpoint(Protocol::Udp, "2001:db8::5/128", Backend::Both), &[]);
    check(endpoint(Protocol::Udp, "10.0.0.5/32", Backend::Ebpf), &[]);
    check(endpoint(Protocol::Tcp, "2001:db8::5/128", Backend::Ebpf), &[]);
    let localnet = |net: &'static str, backend: Backend| {
        move |seen: &mut Seen| {
            seen.network.route_localnet.push("eth0".to_owned());
            endpoint(Protocol::Tcp, net, backend)(seen);
        }
    };
    check(localnet("127.0.0.1/32", Backend::Ebpf), &["route-localnet"]);
    check(localnet("0.0.0.0/0", Backend::Ebpf), &["route-localnet"]);
    check(localnet("127.0.0.1/32", Backend::Both), &[]);
    check(localnet("127.0.0.1/32", Backend::Nftables), &[]);
    let namespaces = |seen: &mut Seen| seen.namespaces.others.push("runc".to_owned());
    check(namespaces, &["other-network-namespaces"]);
    check(
        |seen| {
            namespaces(seen);
            seen.instance.active = Some(Backend::Both);
        },
        &[],
    );
    check(
        |seen| {
            seen.instance
                .unresolved
                .push(("bus.test".to_owned(), "no answer".to_owned()))
        },
        &["name-unresolved"],
    );
    check(
        |seen| {
            seen.features.set(
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
            seen.features
                .set(Feature::RingBuffer, Fact::Missing { why: "old".to_owned() });
        },
        &[],
    );
    let none = |seen: &mut Seen| {
        seen.instance.settings.backend = Backend::Ebpf;
        seen.features
            .set(Feature::RingBuffer, Fact::Missing { why: "old".to_owned() });
    };
    check(none, &["no-backend"]);
}

#[test]
fn rules_of_earlier_stemcells_are_named() {
    for (table, chain) in old_rules::CHAINS {
        check(
            |seen| {
                seen.firewall
                    .chains
                    .push(("inet".to_owned(), table.to_owned(), chain.to_owned()));
            },
            &["old-stemcell-rules"],
        );
    }
    check(
        |seen| {
            seen.firewall
                .chains
                .push(("inet".to_owned(), "filter".to_owned(), "output".to_owned()));
        },
        &[],
    );
    let text = "*mangle\n-A POSTROUTING -d 127.0.0.1/32 -p tcp -m tcp --dport 2822 -m cgroup ! --cgroup 2958295041 -j DROP\nCOMMIT\n";
    check(
        |seen| seen.firewall.legacy = firewall::parse(text),
        &["old-stemcell-rules"],
    );
    let by_cgroup = ForeignRule {
        family: "ip".to_owned(),
        table: "mangle".to_owned(),
        chain: "POSTROUTING".to_owned(),
        nat: None,
        matches: vec!["cgroup".to_owned()],
    };
    check(|seen| seen.firewall.rules.push(by_cgroup), &["old-stemcell-rules"]);
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
        seen.instance.jobs.rules.extend(accepted.map(|user| JobRule {
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
    // Of who is granted nobody need be there now: the agent's chain lets through whoever is written to the jobs' chain then.
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
    let whole = Image {
        release: Some("6.1.0".to_owned()),
        options: image::options(&text),
        modules: image::modules(dep).collect(),
        ..Image::default()
    };
    let report = whole.clone().report();
    assert_eq!(report.findings, []);
    assert_eq!(report.choice.backend.as_deref(), Some("ebpf"));

    let mut without = whole.clone();
    without.options.remove("CGROUP_BPF");
    assert_eq!(without.clone().report().choice.backend.as_deref(), Some("nftables"));
    without.modules.remove("nft_reject_inet");
    let report = without.report();
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

    assert_eq!(Image::default().report().choice.backend, None);
}

/// What `doctor --root` demands is what the package brings: the list that cargo-deb reads, and the units with their targets.
#[test]
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
