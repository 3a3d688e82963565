//! §5: what nftables alone does not see, as its packets never come to the host's IP hooks; that `doctor` names it, and
//! `both` refuses it.

use std::{net::SocketAddr, path::Path};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{Case, nftables::Guarded};
use crate::{
    attack::Way,
    backend::{ALL, BOTH, Backend, PACKETS},
    world::{Listener, NOBODY, Netns, ran},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(s5_devices_past_the_ip_hooks_are_named).on(PACKETS),
        case!(s5_udp_by_a_spent_routing_header_is_seen_by_its_packet_alone).on(ALL),
        case!(s5_both_refuses_what_passes_the_ip_hooks).on(BOTH),
    ]
}

/// A host with a server behind its device, and a container whose macvlan stands on that device.
struct Neighbours {
    guarded: Guarded,
    container: Netns,
    _server: Netns,
    _listener: Listener,
}

const SERVER: &str = "10.54.0.2";

impl Neighbours {
    fn new() -> Result<Self> {
        let guarded = Guarded::new()?;
        let (world, host) = (&guarded.world, &guarded.netns);
        let (container, server) = (Netns::new(world, "c")?, Netns::new(world, "s")?);
        host.join(&["10.54.0.1/24"], &server, &["10.54.0.2/24"])?;
        host.ip(&[
            "link", "add", "mv0", "link", "veth0", "type", "macvlan", "mode", "bridge",
        ])?;
        host.ip(&["link", "set", "mv0", "netns", container.name()])?;
        container.ip(&["address", "add", "10.54.0.3/24", "dev", "mv0"])?;
        container.ip(&["link", "set", "mv0", "up"])?;
        let listener = Listener::start(Some(&server.file()), world.port, &[])?;
        Ok(Self {
            guarded,
            container,
            _server: server,
            _listener: listener,
        })
    }

    fn guard(&self, backend: &str) -> Result<()> {
        let endpoint = format!("tcp://{SERVER}:{}", self.guarded.world.port);
        self.guarded.configure(backend, &[endpoint], r#"["root"]"#)?;
        self.guarded.apply()
    }

    /// What `doctor` lists of it.
    fn named(&self) -> Result<Vec<String>> {
        let ran = self
            .guarded
            .netns
            .enforcer(&self.guarded.world, &["doctor", "--json"])?;
        let report: Value = serde_json::from_str(&ran.stdout)?;
        let findings = report["findings"].as_array().cloned().unwrap_or_default();
        let items = findings.into_iter().filter(|finding| finding["id"] == "past-ip-hooks");
        let items = items.flat_map(|finding| finding["items"].as_array().cloned().unwrap_or_default());
        Ok(items.filter_map(|item| item.as_str().map(str::to_owned)).collect())
    }
}

fn s5_devices_past_the_ip_hooks_are_named() -> Result<()> {
    let neighbours = Neighbours::new()?;
    let host = &neighbours.guarded.netns;
    let backend = Backend::current().configured();
    neighbours.guard(backend)?;
    host.ip(&["link", "add", "br0", "type", "bridge"])?;
    show_bridges(host, false)?;
    for port in ["one", "two"] {
        let named = neighbours.named()?;
        ensure!(!named.iter().any(|item| item.contains("bridge")), "{port}: {named:?}");
        host.ip(&[
            "link",
            "add",
            port,
            "type",
            "veth",
            "peer",
            "name",
            &format!("{port}end"),
        ])?;
        host.ip(&["link", "set", port, "master", "br0"])?;
    }
    let named = neighbours.named()?;
    let container = neighbours.container.name();
    let macvlan = named
        .iter()
        .any(|item| item.starts_with("macvlan mv0 of ") && item.contains(container));
    if Backend::current() == Backend::Both {
        ensure!(named.is_empty(), "{named:?}");
    } else {
        ensure!(macvlan && named.contains(&"bridge br0".to_owned()), "{named:?}");
    }
    if show_bridges(host, true)? {
        let named = neighbours.named()?;
        ensure!(!named.iter().any(|item| item.contains("bridge")), "{named:?}");
    }
    Ok(())
}

/// Whether bridged packets come to the IP hooks; false where the kernel cannot have them come.
fn show_bridges(netns: &Netns, shown: bool) -> Result<bool> {
    let script = format!(
        "for family in iptables ip6tables; do file=/proc/sys/net/bridge/bridge-nf-call-$family; \
         [ -e $file ] || exit 3; echo {} > $file || exit; done",
        u8::from(shown)
    );
    let code = ran(netns.command(Path::new("sh")).args(["-c", &script]))?.code;
    ensure!(code == 0 || code == 3, "bridge-nf-call is not to be set: {code}");
    Ok(code == 0)
}

/// As the documents say, both ways.
fn s5_both_refuses_what_passes_the_ip_hooks() -> Result<()> {
    let neighbours = Neighbours::new()?;
    let to = SocketAddr::new(SERVER.parse()?, neighbours.guarded.world.port);
    let attack = neighbours.guarded.world.attack(NOBODY).to(to);
    let attack = attack.in_netns(&neighbours.container)?;
    attack.reaches()?;
    neighbours.guard("nftables")?;
    attack.reaches()?;
    neighbours.guard("both")?;
    attack.is_forbidden()?;
    let unload = neighbours
        .guarded
        .netns
        .enforcer(&neighbours.guarded.world, &["unload"])?;
    unload.demand(0).map(drop)
}

/// eBPF is asked for the address that the call names; the packet goes to the one that its header names.
fn s5_udp_by_a_spent_routing_header_is_seen_by_its_packet_alone() -> Result<()> {
    let guarded = Guarded::new()?;
    let (world, backend) = (&guarded.world, Backend::current());
    for device in ["all", "lo"] {
        guarded.netns.set(&format!("ipv6/conf/{device}/seg6_enabled"), "1")?;
    }
    let here = SocketAddr::new("::1".parse()?, world.port);
    let attack = || Ok::<_, anyhow::Error>(guarded.attack(NOBODY)?.to(here));
    attack()?.way(Way::UdpSpentHeader).reaches()?;
    guarded.configure(backend.configured(), &[format!("udp://{here}")], r#"["root"]"#)?;
    guarded.apply()?;
    let plain = attack()?.way(Way::UdpSendto).run()?;
    ensure!(plain.errno.is_some(), "it is not refused at all");
    guarded.attack(0)?.to(here).way(Way::UdpSpentHeader).reaches()?;
    let report = guarded.netns.enforcer(world, &["doctor", "--json"])?;
    let report: Value = serde_json::from_str(&report.stdout)?;
    let mut findings = report["findings"].as_array().into_iter().flatten();
    let finding = findings.find(|finding| finding["id"] == "udp-routing-header");
    if backend == Backend::Ebpf {
        attack()?.way(Way::UdpSpentHeader).reaches()?;
        let finding = finding.ok_or_else(|| anyhow::anyhow!("doctor does not say so: {report}"))?;
        ensure!(
            finding["weight"] == "high" && finding["items"].to_string().contains("[::1]"),
            "{finding}"
        );
    } else {
        attack()?.way(Way::UdpSpentHeader).is_reset()?;
        ensure!(finding.is_none(), "{report}");
    }
    Ok(())
}
