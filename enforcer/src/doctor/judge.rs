//! What was seen → what weakens protection, and what to do about each. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use super::{
    collect::{PlaceKind, PlaceMode, Seen},
    image::{ImageSeen, judge_image},
    legacy::AGENT_CHAINS,
    order::Cycle,
};
use crate::{
    backend::{
        jobs::{Destination, Subject},
        probe::{Choice, Fact, Facts, Feature, Need, choose},
        third_party::{Nat, To},
    },
    host::START,
    policy::{MONIT, Mode, Protocol, Uid},
    ruleset::{self, RulePrincipal, RuleSet, is_single, owners},
    text,
    visibility::{Kept, Visibility},
    wire::{
        ActiveBackend, Backend, Schema,
        doctor::{ChoiceReport, FeatureReport, Finding, HostReport, Report, Side, Unseen, Weight},
    },
};

/// Most places that a finding lists.
const MAX_ITEMS: usize = 16;

/// The report on a host.
pub(super) fn host(seen: &Seen) -> Report {
    let choice = choose(&seen.facts.works(), seen.settings.backend);
    let enforces = Enforces::of(seen, &choice);
    let mut findings = Vec::new();
    own_state(seen, &choice, &mut findings);
    features(&seen.facts, enforces, &mut findings);
    ways_around(seen, enforces, &mut findings);
    network(seen, &mut findings);
    programs(seen, enforces, &mut findings);
    modes(&seen.places, &mut findings);
    findings.extend(part_of_host(seen));
    findings.extend(visibility(&seen.visibility));
    findings.extend(writable_cgroups(seen));
    findings.extend(listeners(seen));
    findings.extend(members(seen));
    findings.extend(cycles(seen));
    findings.extend(old_rules(seen));
    if !seen.capable.is_empty() {
        findings.push(finding(
            "capable-processes",
            Weight::Low,
            "users other than root run processes with capabilities that get past any rule",
            seen.capable.iter().map(|one| {
                format!("{} (pid {}, user {}): {}", text::name(&one.name), one.pid, one.uid, one.capabilities.join(", "))
            }),
            "take the capabilities away unless they are meant (CapabilityBoundingSet= in the unit); who holds them is as good as root here",
        ));
    }
    report(
        HostReport {
            root: None,
            kernel: seen.kernel.clone(),
            config: seen.config.display().to_string(),
            cgroup: seen.cgroup.as_ref().map(|path| path.display().to_string()),
            daemon: seen.daemon.as_ref().and_then(|status| status.daemon.pid),
            in_force: seen.in_force,
        },
        &seen.facts,
        seen.settings.backend,
        choice,
        findings,
        seen.unseen.clone(),
    )
}

/// The report on an image.
pub(super) fn image(seen: &ImageSeen) -> Report {
    let (facts, findings) = judge_image(seen);
    let choice = choose(&facts.works(), seen.settings.backend);
    let mut findings = findings;
    findings.extend(principal_absent(&seen.absent));
    if choice.backend.is_none() {
        findings.push(no_backend(&choice));
    }
    report(
        HostReport {
            root: Some(seen.root.display().to_string()),
            kernel: seen.release.clone().unwrap_or_else(|| "none found".to_owned()),
            config: seen.config.display().to_string(),
            ..HostReport::default()
        },
        &facts,
        seen.settings.backend,
        choice,
        findings,
        seen.unseen.clone(),
    )
}

fn report(
    host: HostReport,
    facts: &Facts,
    wanted: Backend,
    choice: Choice,
    mut findings: Vec<Finding>,
    unseen: Vec<Unseen>,
) -> Report {
    findings.sort_by_key(|finding| (finding.weight, finding.id));
    let features = facts.iter().map(|(feature, fact)| {
        let about = feature.about();
        let consequence = match about.need {
            Need::Must => None,
            Need::May(consequence) => Some(consequence),
        };
        let why = fact.obstacle().map(|why| match consequence {
            Some(consequence) => format!("{why}; {consequence}"),
            None => why.to_owned(),
        });
        FeatureReport {
            id: id_of(feature),
            title: about.title.to_owned(),
            of: about.side,
            required: about.need == Need::Must,
            state: fact.state(),
            why,
            since: about.since.to_owned(),
        }
    });
    Report {
        schema: Schema::Doctor,
        host,
        features: features.collect(),
        choice: ChoiceReport {
            wanted,
            backend: choice.backend,
            why: choice.reason,
        },
        findings,
        unseen,
    }
}

/// As serde names it.
fn id_of(feature: Feature) -> String {
    let id = serde_json::to_value(feature).ok();
    id.and_then(|id| id.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Makes a finding, its list cut to what a person reads.
pub(super) fn finding(
    id: &'static str,
    weight: Weight,
    what: impl Into<String>,
    items: impl IntoIterator<Item = String>,
    remedy: impl Into<String>,
) -> Finding {
    let mut items: Vec<String> = items.into_iter().collect();
    let more = items.len().saturating_sub(MAX_ITEMS);
    if more > 0 {
        items.truncate(MAX_ITEMS);
        items.push(format!("… and {more} more"));
    }
    Finding {
        id,
        weight,
        what: what.into(),
        items,
        remedy: remedy.into(),
    }
}

/// What enforces here now, or would.
#[derive(Clone, Copy)]
struct Enforces {
    ebpf: bool,
    nftables: bool,
}

impl Enforces {
    fn of(seen: &Seen, choice: &Choice) -> Self {
        let would = match choice.backend {
            Some(Backend::Ebpf | Backend::Auto) => ActiveBackend::Ebpf,
            Some(Backend::Nftables) => ActiveBackend::Nftables,
            Some(Backend::Both) => ActiveBackend::Both,
            None => ActiveBackend::None,
        };
        let now = seen.in_force.unwrap_or(would);
        Self {
            ebpf: now.has_ebpf(),
            nftables: now.has_nftables(),
        }
    }
}

fn no_backend(choice: &Choice) -> Finding {
    finding(
        "no-backend",
        Weight::High,
        choice.reason.clone(),
        [],
        "mend what is missing, or name the other backend with `backend`; until then enforcer refuses to start and guards nothing",
    )
}

/// Principals that match nobody, as their users do not exist (F8).
pub(super) fn principal_absent(absent: &[String]) -> Option<Finding> {
    (!absent.is_empty()).then(|| {
        finding(
            "principal-absent",
            Weight::Medium,
            "users that the configuration allows do not exist: they are refused until they do",
            absent.iter().cloned(),
            "create them, or correct the names; the daemon sees to it within a minute",
        )
    })
}

fn own_state(seen: &Seen, choice: &Choice, findings: &mut Vec<Finding>) {
    if let Some(fault) = &seen.fault {
        findings.push(finding(
            "configuration",
            Weight::High,
            "the configuration cannot be put in force; the next start fails",
            [fault.clone()],
            "mend it; enforcer config check says when it is good",
        ));
    }
    findings.extend(principal_absent(&seen.absent));
    if choice.backend.is_none() {
        findings.push(no_backend(choice));
    }
    if seen.in_force.is_none() {
        findings.push(finding(
            "nothing-in-force",
            Weight::High,
            "nothing is in force: every user reaches every endpoint",
            [],
            format!("{START}, or run enforcer apply"),
        ));
    }
    match &seen.daemon {
        None => findings.push(finding(
            "no-daemon",
            Weight::Medium,
            "no daemon answers: what is in force stays, but names, addresses and cgroups are not followed, and what others remove is not restored",
            [],
            START,
        )),
        Some(status) if !status.causes.is_empty() => findings.push(finding(
            "degraded",
            Weight::Medium,
            "the daemon says that not all is as asked for",
            status.causes.clone(),
            "each cause says what to do",
        )),
        Some(_) => {}
    }
    let audits = seen.rules.as_ref().is_some_and(|rules| rules.mode == Mode::Audit);
    if audits || seen.daemon.as_ref().is_some_and(|status| status.mode == Mode::Audit) {
        findings.push(finding(
            "audit-mode",
            Weight::Medium,
            "mode = \"audit\": denials are counted, and nothing is refused",
            [],
            "set mode = \"enforce\" once enforcer events shows no denial of somebody who must be allowed",
        ));
    }
    if !seen.unresolved.is_empty() {
        findings.push(finding(
            "name-unresolved",
            Weight::Medium,
            "names cannot be resolved: only what is known of them from before is protected",
            seen.unresolved.iter().map(|(name, why)| format!("{name}: {why}")),
            "mend /etc/resolv.conf, the server or the name; unresolved = \"closed\" in [dns] guards the port of a name that never resolved on any address",
        ));
    }
}

fn features(facts: &Facts, enforces: Enforces, findings: &mut Vec<Finding>) {
    let missing = facts.iter().filter_map(|(feature, fact)| {
        let about = feature.about();
        let asked = match about.side {
            Side::Ebpf => enforces.ebpf,
            Side::Nftables => enforces.nftables,
            Side::Either => true,
        };
        match (about.need, fact) {
            (Need::May(consequence), Fact::Missing { why } | Fact::Inconclusive(why)) if asked => {
                Some(format!("{} ({}): {why}; {consequence}", about.title, about.since))
            }
            (Need::May(_) | Need::Must, _) => None,
        }
    });
    let missing: Vec<String> = missing.collect();
    if !missing.is_empty() {
        findings.push(finding(
            "feature-missing",
            Weight::Medium,
            "this kernel cannot do all that enforcer can use",
            missing,
            "take a kernel that has it, or load its module",
        ));
    }
}

/// Ways that lead to an endpoint without a `connect` to it.
fn ways_around(seen: &Seen, enforces: Enforces, findings: &mut Vec<Finding>) {
    if !seen.namespaces.is_empty() && enforces.ebpf && !enforces.nftables {
        findings.push(finding(
            "other-network-namespaces",
            Weight::Medium,
            "there are other network namespaces, containers perhaps: what they forward or send by raw sockets is not judged by ebpf alone",
            seen.namespaces.values().cloned(),
            "set backend = \"both\"",
        ));
    }
    if !seen.passing.is_empty() && enforces.nftables && !enforces.ebpf {
        findings.push(finding(
            "past-ip-hooks",
            Weight::Medium,
            "devices carry packets of containers or virtual machines past the hooks at which nftables evaluates: what they send to an endpoint is not seen",
            seen.passing.iter().cloned(),
            "set backend = \"both\", so that eBPF evaluates their connections; for bridges, sysctl -w net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1 (module br_netfilter) does too",
        ));
    }
    let Some(rules) = &seen.rules else { return };
    findings.extend(udp_routing_header(seen, rules, enforces));
    findings.extend(route_localnet(seen, rules, enforces));
    let local = |to: To| match to {
        To::Address(address) => vec![address],
        To::Here => here(seen).into_iter().collect(),
        To::Unknown => Vec::new(),
    };
    let (mut onto, mut unknown) = (Vec::new(), Vec::new());
    let mut weigh = |nat: Nat, place: String| match (nat.to, nat.port) {
        (To::Unknown, _) => unknown.push(place),
        (to, port) => {
            if local(to).into_iter().any(|address| leads_onto(rules, address, port)) {
                onto.push(place);
            }
        }
    };
    for rule in &seen.foreign {
        if let Some(nat) = &rule.nat {
            weigh(
                nat.clone(),
                format!("nft: {} {} {}: {}", rule.family, rule.table, rule.chain, shown(nat)),
            );
        }
    }
    for rule in &seen.legacy {
        if let Some(nat) = rule.nat() {
            weigh(nat, format!("iptables-legacy -t {} {}", rule.table, rule.text));
        }
    }
    if !onto.is_empty() && !enforces.nftables {
        findings.push(finding(
            "nat-onto-endpoint",
            Weight::High,
            "address translation leads onto an endpoint: whoever dials the address before it is not judged by ebpf, which sees only that",
            onto,
            "set backend = \"both\", which judges after translation; or remove the rules, or make what they translate an endpoint too",
        ));
    }
    if !unknown.is_empty() && !enforces.nftables {
        findings.push(finding(
            "nat-unknown",
            Weight::Low,
            "address translation leads where a map or range tells: perhaps onto an endpoint, which ebpf would not see",
            unknown,
            "look whether an endpoint is among them; backend = \"both\" judges after translation",
        ));
    }
}

fn shown(nat: &Nat) -> String {
    let to = match nat.to {
        To::Address(address) => address.to_string(),
        To::Here => "this host".to_owned(),
        To::Unknown => "somewhere".to_owned(),
    };
    nat.port.map_or_else(
        || format!("to {to}, the port as it was"),
        |port| format!("to {to}, port {port}"),
    )
}

/// Whether an address has an endpoint at a port, or at any where the port stays as it was.
fn leads_onto(rules: &RuleSet, address: IpAddr, port: Option<u16>) -> bool {
    let protocols = [Protocol::Tcp, Protocol::Udp];
    match port {
        Some(port) => protocols
            .into_iter()
            .any(|protocol| owners(rules, protocol, address, port) != 0),
        None => rules.places.iter().any(|(place, _)| place.net.contains(&address)),
    }
}

/// Addresses of this host, the two loopback ones included; of a prefix that is local, the first.
fn here(seen: &Seen) -> BTreeSet<IpAddr> {
    let mut all: BTreeSet<IpAddr> = seen.host.local.iter().map(|net| net.addr().to_canonical()).collect();
    all.extend([IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]);
    all
}

/// eBPF is asked before the header is made, and where the socket is connected elsewhere it is not asked at all (§5). What was asked for
/// TCP gets no answer: that comes from another address than the one that was dialled.
fn udp_routing_header(seen: &Seen, rules: &RuleSet, enforces: Enforces) -> Option<Finding> {
    let udp6 = |place: &ruleset::Place| place.protocol == Protocol::Udp && matches!(place.net, ipnet::IpNet::V6(_));
    let places = rules.places.iter().filter(|(place, _)| udp6(place));
    let items: Vec<String> = places
        .map(|(place, _)| format!("udp [{}]:{}", place.net.addr(), place.port))
        .collect();
    if items.is_empty() || !enforces.ebpf || enforces.nftables {
        return None;
    }
    // Of the hosts where the others are nothing is known here.
    let weight = if seen.segment_routing.is_empty() {
        Weight::Medium
    } else {
        Weight::High
    };
    Some(finding(
        "udp-routing-header",
        weight,
        "a UDP packet with a spent IPv6 routing header is delivered to an address that the call did not name, where the host that has it accepts segment routing; eBPF evaluates the call",
        items,
        "set backend = \"both\": nftables evaluates the packet; or see that net.ipv6.conf.*.seg6_enabled is 0 where these endpoints are",
    ))
}

/// What a container's root sends to 127.0.0.0/8 by way of this host arrives here, and to eBPF was a connection with the container itself
/// (D6).
fn route_localnet(seen: &Seen, rules: &RuleSet, enforces: Enforces) -> Option<Finding> {
    let loopback = |net: &ipnet::IpNet| match net {
        ipnet::IpNet::V4(net) => net.addr().is_loopback() || net.contains(&Ipv4Addr::LOCALHOST),
        ipnet::IpNet::V6(_) => false,
    };
    let is_met = rules.places.iter().any(|(place, _)| loopback(&place.net));
    if seen.route_localnet.is_empty() || !is_met || !enforces.ebpf || enforces.nftables {
        return None;
    }
    Some(finding(
        "route-localnet",
        Weight::Medium,
        "packets for loopback addresses may come by these interfaces: a container's root reaches loopback endpoints; to eBPF they are the container's own",
        seen.route_localnet.iter().cloned(),
        "set backend = \"both\": nftables evaluates the packet; or sysctl -w net.ipv4.conf.all.route_localnet=0, and the same of each interface",
    ))
}

fn network(seen: &Seen, findings: &mut Vec<Finding>) {
    if !seen.source_route.is_empty() {
        findings.push(finding(
            "source-route",
            Weight::Medium,
            "packets with a source route are accepted: a packet to an unguarded address may be led to an endpoint by its own header",
            seen.source_route.iter().cloned(),
            "sysctl -w net.ipv4.conf.all.accept_source_route=0, and in /etc/sysctl.d for good",
        ));
    }
    if !seen.segment_routing.is_empty() {
        findings.push(finding(
            "segment-routing",
            Weight::Medium,
            "IPv6 segment routing headers are accepted: a packet may be led to an endpoint by its own header",
            seen.segment_routing.iter().cloned(),
            "sysctl -w net.ipv6.conf.all.seg6_enabled=0, and in /etc/sysctl.d for good",
        ));
    }
    if seen.mptcp > 0 {
        findings.push(finding(
            "mptcp-add-addr",
            Weight::Medium,
            format!(
                "MPTCP takes up to {} addresses from a peer: any server can make the kernel, as root, connect to an endpoint",
                seen.mptcp
            ),
            [],
            "ip mptcp limits set add_addr_accepted 0, or sysctl -w net.mptcp.enabled=0",
        ));
    }
}

fn programs(seen: &Seen, enforces: Enforces, findings: &mut Vec<Finding>) {
    if !enforces.ebpf {
        return;
    }
    let shown = |one: &&super::collect::Program| {
        let name = if one.attached.name.is_empty() {
            "without a name"
        } else {
            &one.attached.name
        };
        let what = if one.attached.rewrites {
            ", which rewrites addresses"
        } else {
            ""
        };
        let order = if one.attached.preorder { " (BPF_F_PREORDER)" } else { "" };
        format!(
            "{} on {}: program {name}, id {}{order}{what}",
            one.hook,
            one.cgroup.display(),
            one.attached.id
        )
    };
    let (after, before): (Vec<_>, Vec<_>) = seen.programs.iter().partition(|one| one.after);
    let (rewriting, others): (Vec<_>, Vec<_>) = after.into_iter().partition(|one| one.attached.rewrites);
    let remedy = "find its owner (bpftool prog show id ID, bpftool cgroup show); have it attached before enforcer's, or to a cgroup below, or set backend = \"both\", which judges what comes of it";
    if !rewriting.is_empty() {
        findings.push(finding(
            "program-rewrites-after",
            Weight::High,
            "programs of others run after ours and rewrite addresses: they can lead an allowed connection to an endpoint",
            rewriting.iter().map(shown),
            remedy,
        ));
    }
    if !others.is_empty() {
        findings.push(finding(
            "program-after",
            Weight::Medium,
            "programs of others run after ours: they can undo a denial (bpf_set_retval)",
            others.iter().map(shown),
            remedy,
        ));
    }
    let (rewriting, before): (Vec<_>, Vec<_>) = before.into_iter().partition(|one| one.attached.rewrites);
    if !rewriting.is_empty() {
        let endpoints = seen.rules.iter().flat_map(|rules| &rules.places);
        let endpoint = |place: &ruleset::Place| {
            let at = if is_single(&place.net) {
                SocketAddr::new(place.net.addr(), place.port).to_string()
            } else {
                format!("{}, port {}", place.net, place.port)
            };
            format!("perhaps of the endpoint {} {at}", place.protocol)
        };
        let endpoints = endpoints.map(|(place, _)| endpoint(place));
        findings.push(finding(
            "program-rewrites-before",
            Weight::Medium,
            "programs of others run before ours and rewrite addresses: what they lead away from an endpoint is not judged as that endpoint, \
             and who may reach it by them is theirs to say",
            rewriting.iter().map(shown).chain(endpoints),
            "find out what it rewrites (bpftool prog dump xlated id ID): an endpoint that it leads elsewhere needs the address that it \
             leads to as an endpoint, too",
        ));
    }
    if !before.is_empty() {
        findings.push(finding(
            "program-before",
            Weight::Low,
            "programs of others run before ours: they can refuse what is allowed",
            before.iter().map(shown),
            "nothing, if they are meant to be there",
        ));
    }
}

fn modes(places: &[PlaceMode], findings: &mut Vec<Finding>) {
    let shown = |place: &&PlaceMode| {
        format!(
            "{} is owned by uid {} with mode {:04o}",
            place.path.display(),
            place.uid,
            place.mode
        )
    };
    let of = |kinds: &[PlaceKind], bad: fn(&PlaceMode) -> bool| -> Vec<String> {
        let found = places.iter().filter(|place| kinds.contains(&place.kind) && bad(place));
        found.map(|place| shown(&place)).collect()
    };
    let others_write = |place: &PlaceMode| place.uid != 0 || place.mode & 0o022 != 0;
    let open = of(&[PlaceKind::Bpffs], |place| {
        place.uid != 0 || (place.mode & 0o022 != 0 && place.mode & 0o1000 == 0)
    });
    if !open.is_empty() {
        findings.push(finding(
            "bpffs-open",
            Weight::High,
            "others can write where the pins lie, and put something else in their place",
            open,
            "mount -o remount,mode=0700 on that bpffs (or chmod 0700, chown root), then restart the daemon",
        ));
    }
    let sticky = of(&[PlaceKind::Bpffs], |place| {
        place.uid == 0 && place.mode & 0o022 != 0 && place.mode & 0o1000 != 0
    });
    if !sticky.is_empty() {
        findings.push(finding(
            "bpffs-shared",
            Weight::Low,
            "others can make files where the pin directory lies; its sticky bit keeps them from ours",
            sticky,
            "mount -o remount,mode=0700 on that bpffs, unless they are meant to",
        ));
    }
    let open = of(&[PlaceKind::PinDir, PlaceKind::Pin], |place| {
        place.uid != 0 || place.mode & 0o077 != 0
    });
    if !open.is_empty() {
        findings.push(finding(
            "pins-open",
            Weight::High,
            "others can open what is pinned: they can detach the links or change the rules",
            open,
            "chown root and chmod 0700 the directories, 0600 the pins; then look whether all is as it was: enforcer verify",
        ));
    }
    let open = of(&[PlaceKind::StateDir], others_write);
    if !open.is_empty() {
        findings.push(finding(
            "state-open",
            Weight::Medium,
            "others can write the addresses that are protected at the next start; they are not trusted until that is mended",
            open,
            "chown root and chmod 0700 it, and look at last-good.json and grants.json in it",
        ));
    }
    let mut open = of(&[PlaceKind::SocketDir], others_write);
    open.extend(of(&[PlaceKind::Socket], |place| {
        place.uid != 0 || place.mode & 0o077 != 0
    }));
    if !open.is_empty() {
        findings.push(finding(
            "socket-open",
            Weight::Medium,
            "others can reach or replace the control socket; it answers root alone, and enforcer asks root's alone, but other programs may take what they put there for it",
            open,
            "chown root and chmod 0700 the directory, 0600 the socket; restart the daemon",
        ));
    }
}

/// F9: a part of the host alone is covered.
fn part_of_host(seen: &Seen) -> Option<Finding> {
    let part = seen.visibility.part.as_ref()?;
    Some(finding(
        "part-of-host",
        Weight::High,
        "the root of the cgroup v2 hierarchy is not mounted here, and no cgroup is configured: processes outside of what is mounted reach every endpoint",
        std::iter::once(format!("covered: what is below {}", part.display())).chain(seen.outside.iter().cloned()),
        "run enforcer in the host's cgroup and mount namespace (docker run --cgroupns=host -v /sys/fs/cgroup:/sys/fs/cgroup), or mount the root there; set cgroup to that path if no more is meant",
    ))
}

/// F1: what must outlive the process, or be found by others, where the host does not see it.
fn visibility(found: &Visibility) -> Option<Finding> {
    if !found.hidden.is_empty() {
        let pins = found.hidden.iter().any(|hidden| hidden.kept == Kept::Pins);
        return Some(finding(
            "hidden-from-host",
            if pins { Weight::High } else { Weight::Medium },
            "enforcer keeps something in a mount namespace of its own, where it ends with that namespace and other processes do not find it",
            found.hidden.iter().map(ToString::to_string),
            "do what each line says; under systemd look at PrivateTmp=, ProtectSystem= and TemporaryFileSystem= of the unit",
        ));
    }
    let why = found.unknown.clone()?;
    Some(finding(
        "host-unknown",
        Weight::Low,
        "it is not known whether the host sees the pins, the state and the socket of enforcer",
        [why],
        "let root read /proc/1/mountinfo (mount /proc without hidepid=, or with gid=0); in a container, share the host's PID namespace or bind-mount /sys/fs/bpf, state_dir and the socket's directory from the host",
    ))
}

/// F6: cgroups that match nobody, as a user could make them anew or move into them.
fn writable_cgroups(seen: &Seen) -> Option<Finding> {
    let writable = &seen.host.writable;
    (!writable.is_empty()).then(|| {
        finding(
            "cgroup-writable",
            Weight::Medium,
            "cgroups that principals or grants name are not root's alone, so they match nobody",
            writable.iter().map(|(path, by)| format!("{path}: {by}")),
            "chown root and chmod go-w the cgroup, cgroup.procs and cgroup.threads in it and in each ancestor; or name a cgroup that is not delegated",
        )
    })
}

/// Units of systemd that wait for each other, ours among them.
fn cycles(seen: &Seen) -> Option<Finding> {
    let shown = |cycle: &Cycle| {
        let again = cycle.units.first().cloned();
        let units: Vec<String> = cycle.units.iter().cloned().chain(again).collect();
        let added = if cycle.drop_ins.is_empty() {
            String::new()
        } else {
            format!(" (see {})", cycle.drop_ins.join(", "))
        };
        format!("{}{added}", units.join(" after "))
    };
    (!seen.cycles.is_empty()).then(|| {
        finding(
            "ordering-cycle",
            Weight::High,
            "systemd units are ordered in a circle through ours; at boot systemd breaks it by not starting one of them, and that may be ours",
            seen.cycles.iter().map(shown),
            "remove one of these After= or Before=; enforcer.service is to start before network-online.target and what needs that",
        )
    })
}

/// Servers to which the clients of a message bus go when the one that is guarded is away.
fn members(seen: &Seen) -> Option<Finding> {
    (!seen.members.is_empty()).then(|| {
        finding(
            "bus-members",
            Weight::Medium,
            "a message bus names other servers of its cluster, and they are no endpoints: whoever is kept from the one reaches the others",
            seen.members.iter().map(|member| {
                let host = match &member.host {
                    Ok(address) => SocketAddr::new(*address, member.port).to_string(),
                    Err(name) => format!("{}:{}", text::name(name), member.port),
                };
                format!("{host}, as {} says", member.by)
            }),
            "add them to the endpoints, or a name or prefix that covers all servers; or set client_advertise and no_advertise in the servers to what clients are to use",
        )
    })
}

/// Services at the port of an endpoint of this host that can be reached by an address that is no endpoint.
fn listeners(seen: &Seen) -> Option<Finding> {
    let rules = seen.rules.as_ref()?;
    let here = here(seen);
    let guarded = |protocol, port| {
        rules.places.iter().any(|(place, _)| {
            (place.protocol, place.port) == (protocol, port)
                && is_single(&place.net)
                && (ruleset::contains(&seen.host.local, place.net.addr()) || place.net.addr().is_loopback())
        })
    };
    let mut open: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for listener in &seen.listeners {
        let (at, protocol) = (listener.at, listener.protocol);
        if !guarded(protocol, at.port()) {
            continue;
        }
        // Of a prefix that is local an address that is no interface's may be listened on.
        let own = Some(at.ip().to_canonical()).filter(|own| ruleset::contains(&seen.host.local, *own));
        let reached = here.iter().chain(&own).filter(|address| match at.ip() {
            // An IPv6 socket takes IPv4 too, unless it was told not to: that it was cannot be seen from here.
            IpAddr::V6(own) if own.is_unspecified() => true,
            IpAddr::V4(own) if own.is_unspecified() => address.is_ipv4(),
            IpAddr::V4(_) | IpAddr::V6(_) => at.ip().to_canonical() == **address,
        });
        let through = reached.filter(|address| owners(rules, protocol, **address, at.port()) == 0);
        let through: BTreeSet<String> = through.map(ToString::to_string).collect();
        if !through.is_empty() {
            open.entry(format!("{protocol} {at}")).or_default().extend(through);
        }
    }
    if open.is_empty() {
        return None;
    }
    Some(finding(
        "listener-beyond-endpoint",
        Weight::High,
        "a service at an endpoint's port listens on more addresses than are guarded: it is reached through the others",
        open.into_iter().map(|(listener, through)| {
            let through: Vec<String> = through.into_iter().collect();
            format!("{listener} is open at {}", through.join(", "))
        }),
        "make the endpoint tcp://local:PORT, or name the other addresses too, or have the service listen on the guarded one alone",
    ))
}

/// B6: rules of earlier stemcells and of the agent's own.
fn old_rules(seen: &Seen) -> Option<Finding> {
    let agents = seen
        .chains
        .iter()
        .filter(|(family, table, chain)| family == "inet" && AGENT_CHAINS.contains(&(table.as_str(), chain.as_str())));
    let agents_alone = agents.clone().all(|(_, table, _)| table == "bosh_agent");
    let has_chain = |name: &str| agents.clone().any(|(_, _, chain)| chain == name);
    let (agents_monit, stemcells_monit) = (has_chain("monit_access"), has_chain("monit_output"));
    let mut all: Vec<String> = agents
        .map(|(family, table, chain)| format!("nft chain {family} {table} {chain}"))
        .collect();
    let by_nft = all.len();
    let by_cgroup = seen
        .foreign
        .iter()
        .filter(|rule| rule.table == "mangle" && rule.matches.iter().any(|name| name == "cgroup"));
    all.extend(by_cgroup.map(|rule| format!("iptables -t mangle, chain {}: a match by cgroup", rule.chain)));
    let legacy = seen.legacy.iter().filter(|rule| rule.is_stemcells());
    all.extend(legacy.map(|rule| format!("iptables-legacy -t {} {}", rule.table, rule.text)));
    let by_iptables = all.len() > by_nft;
    all.sort_unstable();
    all.dedup();
    if all.is_empty() {
        return None;
    }
    // The agent's chain lets through what the jobs' chain accepts, so that what was granted is written there; stemcells' drop all but root.
    let dropped = dropped_by_agent(seen);
    let allows_others = seen.grants_monit || !not_root(seen).is_empty();
    let drops = agents_monit && !dropped.is_empty() || stemcells_monit && allows_others;
    all.extend(
        dropped
            .iter()
            .filter(|_| agents_monit)
            .map(|whom| format!("no rule of inet bosh_agent monit_access_jobs accepts {whom}")),
    );
    let (weight, what) = match (drops, agents_alone && !by_iptables) {
        (true, _) => (
            Weight::High,
            "rules of an earlier stemcell or of the BOSH agent's own firewall are in force besides ours and drop whom target monit allows besides root: a connection has to pass both",
        ),
        (false, true) => (
            Weight::Low,
            "the BOSH agent's own firewall is in force besides ours; it lets root through as ours do, and drops others in silence",
        ),
        (false, false) => (
            Weight::Medium,
            "rules of an earlier stemcell are in force besides ours: they drop in silence what ours allow, and go out of date",
        ),
    };
    Some(finding(
        "old-stemcell-rules",
        weight,
        what,
        all,
        "once enforcer guards the same endpoints: nft delete chain inet bosh_agent monit_access, and nats_access; leave the table and monit_access_jobs (B5); nft delete chain inet filter monit_output; iptables -t mangle -D …; so that the agent does not make monit_access again: \"UseMonitIptablesFirewall\": true below Platform.Linux in /var/vcap/bosh/agent.json",
    ))
}

/// The principals of target `monit` besides root.
fn not_root(seen: &Seen) -> Vec<&RulePrincipal> {
    let root = RulePrincipal::User {
        uid: Uid(0),
        cgroup: None,
    };
    let monit = seen
        .rules
        .iter()
        .flat_map(|rules| &rules.targets)
        .find(|target| target.name == MONIT);
    let principals = monit.into_iter().flat_map(|monit| &monit.principals);
    principals.filter(|principal| **principal != root).collect()
}

/// Whom the agent's own chain drops though target `monit` allows them: no rule of the jobs' chain accepts them (B5).
fn dropped_by_agent(seen: &Seen) -> Vec<String> {
    let leads_there = |to: &Destination| {
        let monit = |rules: &RuleSet| rules.targets.iter().position(|target| target.name == MONIT);
        let places = seen.rules.iter().flat_map(|rules| {
            let bit = monit(rules).map_or(0, |index| 1_u64 << index);
            rules.places.iter().filter(move |(_, owners)| owners & bit != 0)
        });
        places.into_iter().any(|(place, _)| {
            to.port.is_none_or(|port| port == place.port)
                && to.address.is_none_or(|address| place.net.contains(&address))
        })
    };
    let accepted = |subject: Subject| {
        let mut rules = seen.jobs.rules.iter().filter_map(|rule| rule.accepts.as_ref().ok());
        rules.any(|accept| accept.subject == subject && leads_there(&accept.to))
    };
    let dropped = not_root(seen).into_iter().filter_map(|principal| match principal {
        RulePrincipal::User { uid, cgroup } => {
            let user = Some(uid.0);
            let within = cgroup.as_ref().map(|(_, cgroup)| *cgroup);
            let by_rule = [(user, within), (user, None), (None, within)];
            let by_rule = by_rule
                .into_iter()
                .any(|(user, cgroup)| accepted(Subject { user, cgroup }));
            let place = cgroup.as_ref().map(|(path, _)| format!(" in {path}"));
            (!by_rule).then(|| format!("user {}{}", uid.0, place.unwrap_or_default()))
        }
        RulePrincipal::Anybody { cgroup: (path, cgroup) } => {
            let subject = Subject {
                user: None,
                cgroup: Some(*cgroup),
            };
            (!accepted(subject)).then(|| format!("anybody in {path}"))
        }
        // No rule can accept them: their sockets have no user.
        RulePrincipal::Kernel => Some("the kernel's own sockets".to_owned()),
    });
    dropped.collect()
}
