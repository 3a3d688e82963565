//! Settings and services of the network by which packets reach an endpoint without a connection to its address.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr},
    ops::{BitAnd, BitOr},
};

use ipnet::IpNet;

use super::{
    findings::{Findings, Gaps},
    instance::Instance,
};
use crate::{
    policy::Protocol,
    ruleset::{self, RuleSet, is_single, owners},
    sweep::{self, Listener},
    wire::{
        ActiveBackend,
        doctor::Weight::{High, Medium},
    },
};

/// What was seen of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Network {
    /// Interfaces that accept source routes.
    pub(super) source_route: Vec<String>,
    /// Interfaces by which packets for loopback addresses may come.
    pub(super) route_localnet: Vec<String>,
    /// Interfaces that accept segment routing headers.
    pub(super) segment_routing: Vec<String>,
    pub(super) listeners: Vec<Listener>,
}

impl Network {
    pub(super) async fn collect(gaps: &mut Gaps) -> Self {
        let mut this = Self {
            source_route: interfaces("ipv4", "accept_source_route", BitAnd::bitand),
            route_localnet: interfaces("ipv4", "route_localnet", BitOr::bitor),
            segment_routing: interfaces("ipv6", "seg6_enabled", BitAnd::bitand),
            listeners: Vec::new(),
        };
        this.route_localnet.retain(|name| name != "lo");
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let found = sweep::listening(protocol).await;
            let found = gaps.saw(&format!("{protocol} listeners"), found);
            this.listeners.extend(found.unwrap_or_default());
        }
        this
    }

    pub(super) fn findings(&self, instance: &Instance, enforces: ActiveBackend, findings: &mut Findings) {
        findings.each(
            "source-route",
            Medium,
            "these interfaces accept source-routed packets: a packet's own header can redirect it from an unprotected \
             address to an endpoint",
            self.source_route.iter().cloned(),
            "sysctl -w net.ipv4.conf.all.accept_source_route=0, and persist it in /etc/sysctl.d",
        );
        findings.each(
            "segment-routing",
            Medium,
            "these interfaces accept IPv6 segment routing headers: a packet's own header can redirect it to an \
             endpoint",
            self.segment_routing.iter().cloned(),
            "sysctl -w net.ipv6.conf.all.seg6_enabled=0, and persist it in /etc/sysctl.d",
        );
        let Some(rules) = &instance.rules else { return };
        findings.each(
            "listener-beyond-endpoint",
            High,
            "a service on a protected port also listens on unprotected addresses: every user can reach it there",
            self.beyond(instance, rules),
            "make the endpoint tcp://local:PORT, or add the other addresses, or let the service listen on the \
             protected one only",
        );
        if enforces == ActiveBackend::Ebpf {
            self.past_ebpf(rules, findings);
        }
    }

    /// What eBPF alone evaluates by another destination than the packet's.
    fn past_ebpf(&self, rules: &RuleSet, findings: &mut Findings) {
        // eBPF is asked before the header is made, and where the socket is connected elsewhere it is not asked at all
        // (§5). What was asked for TCP gets no answer: that comes from another address than the one that was dialled.
        let places = rules.places.iter().map(|(place, _)| place);
        let udp6 = places.filter(|place| place.protocol == Protocol::Udp && matches!(place.net, IpNet::V6(_)));
        findings.each(
            "udp-routing-header",
            // Of the hosts where the others are nothing is known here.
            if self.segment_routing.is_empty() { Medium } else { High },
            "a UDP packet with a spent IPv6 routing header is delivered to an address that the call did not name, \
             where the host that has it accepts segment routing; ebpf evaluates the call",
            udp6.map(|place| format!("udp [{}]:{}", place.net.addr(), place.port)),
            "set backend = \"both\": nftables evaluates the packet; or make sure that net.ipv6.conf.*.seg6_enabled is \
             0 on the hosts of these endpoints",
        );
        // What a container's root sends to 127.0.0.0/8 by way of this host arrives here, and to eBPF was a connection
        // with the container itself (D6).
        let loopback = |net: &IpNet| match net {
            IpNet::V4(net) => net.addr().is_loopback() || net.contains(&Ipv4Addr::LOCALHOST),
            IpNet::V6(_) => false,
        };
        let is_met = rules.places.iter().any(|(place, _)| loopback(&place.net));
        findings.each(
            "route-localnet",
            Medium,
            "these interfaces accept packets for loopback addresses: root of a container can reach loopback endpoints \
             of this host; ebpf takes them for the container's own",
            self.route_localnet.iter().filter(|_| is_met).cloned(),
            "set backend = \"both\": nftables evaluates the packet; or sysctl -w net.ipv4.conf.all.route_localnet=0, \
             and the same of each interface",
        );
    }

    /// Services at the port of an endpoint of this host that can be reached by an address that is no endpoint.
    fn beyond(&self, instance: &Instance, rules: &RuleSet) -> Vec<String> {
        let (here, local) = (instance.addresses(), &instance.host.local);
        let is_here = |address| ruleset::contains(local, address);
        let is_guarded = |protocol, port| {
            rules.places.iter().any(|(place, _)| {
                let address = place.net.addr();
                (place.protocol, place.port) == (protocol, port)
                    && is_single(&place.net)
                    && (is_here(address) || address.is_loopback())
            })
        };
        let mut open: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for Listener { protocol, at } in &self.listeners {
            if !is_guarded(*protocol, at.port()) {
                continue;
            }
            // Of a prefix that is local an address that is no interface's may be listened on.
            let own = Some(at.ip().to_canonical()).filter(|own| is_here(*own));
            let reached = here.iter().chain(&own).filter(|address| match at.ip() {
                // An IPv6 socket takes IPv4 too, unless it was told not to: that it was cannot be seen from here.
                IpAddr::V6(own) if own.is_unspecified() => true,
                IpAddr::V4(own) if own.is_unspecified() => address.is_ipv4(),
                IpAddr::V4(_) | IpAddr::V6(_) => at.ip().to_canonical() == **address,
            });
            let through = reached.filter(|address| owners(rules, *protocol, **address, at.port()) == 0);
            let through = through.map(ToString::to_string);
            open.entry(format!("{protocol} {at}")).or_default().extend(through);
        }
        let open = open.into_iter().filter(|(_, through)| !through.is_empty());
        let shown = |through: BTreeSet<String>| through.into_iter().collect::<Vec<_>>().join(", ");
        open.map(|(listener, through)| format!("{listener} is open at {}", shown(through)))
            .collect()
    }
}

/// Interfaces for which a setting is on, by their own value and that of `all`, as the kernel joins them
/// (`IN_DEV_ANDCONF`, `IN_DEV_ORCONF` in linux/inetdevice.h).
fn interfaces(family: &str, setting: &str, join: fn(bool, bool) -> bool) -> Vec<String> {
    let dir = format!("/proc/sys/net/{family}/conf");
    let is_on = |name: &str| {
        let value = fs::read_to_string(format!("{dir}/{name}/{setting}")).unwrap_or_default();
        value.trim().parse::<i32>().is_ok_and(|value| value > 0)
    };
    let all = is_on("all");
    let names = fs::read_dir(&dir).into_iter().flatten().flatten();
    let mut found: Vec<String> = names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != "all" && name != "default" && join(all, is_on(name)))
        .collect();
    found.sort_unstable();
    found
}
