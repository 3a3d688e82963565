//! Third-party rules of nftables and iptables, and where they redirect connections to.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    process::Command,
};

use super::{
    findings::{Findings, Gaps},
    instance::Instance,
};
use crate::{
    backend::third_party::{self, ForeignRule, Nat, To},
    policy::Protocol,
    ruleset::{RuleSet, owners},
    wire::{
        ActiveBackend,
        doctor::Weight::{High, Low},
    },
};

/// What was seen of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Firewall {
    pub(super) rules: Vec<ForeignRule>,
    /// Family, table and name of each chain.
    pub(super) chains: Vec<(String, String, String)>,
    /// Rules of iptables-legacy as its tool prints them, the table first.
    pub(super) legacy: Vec<String>,
}

impl Firewall {
    pub(super) fn collect(gaps: &mut Gaps) -> Self {
        // Without nf_tables there are none; that it is missing is said already.
        let (rules, chains) = third_party::tables()
            .map(|tables| (tables.rules, tables.chains))
            .unzip();
        let rules = rules.and_then(|rules| gaps.saw("third-party nftables rules", rules));
        let chains = chains.and_then(|chains| gaps.saw("third-party nftables chains", chains));
        Self {
            rules: rules.unwrap_or_default(),
            chains: chains.unwrap_or_default(),
            legacy: gaps.saw("rules of iptables", legacy()).unwrap_or_default(),
        }
    }

    /// To eBPF, which is asked before any translation, a connection is one to the address that was dialled.
    pub(super) fn findings(&self, instance: &Instance, enforces: ActiveBackend, findings: &mut Findings) {
        let (Some(rules), ActiveBackend::Ebpf) = (&instance.rules, enforces) else {
            return;
        };
        let nft = self.rules.iter().filter_map(|rule| {
            let nat = rule.nat.clone()?;
            let place = format!("nft: {} {} {}: {}", rule.family, rule.table, rule.chain, shown(&nat));
            Some((nat, place))
        });
        let legacy = self.legacy.iter();
        let legacy = legacy.filter_map(|rule| Some((legacy_nat(rule)?, format!("iptables-legacy {rule}"))));
        let (unknown, known): (Vec<_>, Vec<_>) = nft.chain(legacy).partition(|(nat, _)| nat.to == To::Unknown);
        let here = instance.addresses();
        let onto = known.into_iter().filter(|(nat, _)| leads_onto(rules, nat, &here));
        findings.each(
            "nat-onto-endpoint",
            High,
            "NAT rules redirect connections to an endpoint: ebpf evaluates only the original destination, so any user \
             who connects to that reaches the endpoint",
            onto.map(|(_, place)| place),
            "set backend = \"both\", which evaluates after NAT; or remove the rules, or add their original destination \
             to the endpoints",
        );
        findings.each(
            "nat-unknown",
            Low,
            "NAT rules redirect connections to addresses of a map or range: ebpf does not see it if an endpoint is \
             among them",
            unknown.into_iter().map(|(_, place)| place),
            "check whether an endpoint is among them; backend = \"both\" evaluates after NAT",
        );
    }
}

/// Every rule of iptables-legacy, of both families. Only its own tool can list them: the kernel tells no more than
/// which tables are in use.
fn legacy() -> Result<Vec<String>, String> {
    let mut all = Vec::new();
    for (family, tool) in [("ip", "iptables"), ("ip6", "ip6tables")] {
        let tables = fs::read_to_string(format!("/proc/net/{family}_tables_names")).unwrap_or_default();
        if tables.trim().is_empty() {
            continue;
        }
        let listed = [format!("{tool}-legacy-save"), format!("{tool}-save")]
            .iter()
            .filter_map(|program| Command::new(program).output().ok())
            .find(|output| output.status.success())
            .ok_or_else(|| format!("{family}_tables is in use, and {tool}-legacy-save cannot be run"))?;
        all.extend(parse(&String::from_utf8_lossy(&listed.stdout)));
    }
    Ok(all)
}

/// Reads what `iptables-save` prints.
pub(super) fn parse(text: &str) -> Vec<String> {
    let mut table = "";
    let rules = text.lines().filter_map(|line| {
        if let Some(name) = line.strip_prefix('*') {
            table = name.trim();
        }
        line.starts_with("-A ").then(|| format!("-t {table} {line}"))
    });
    rules.collect()
}

/// Where a rule of iptables-legacy redirects to, if it does.
fn legacy_nat(rule: &str) -> Option<Nat> {
    let after = |option: &str| rule.split_whitespace().skip_while(|word| *word != option).nth(1);
    match after("-j")? {
        "REDIRECT" => Some(Nat {
            to: To::Here,
            port: after("--to-ports").and_then(|ports| ports.split('-').next()?.parse().ok()),
        }),
        "DNAT" => {
            let text = after("--to-destination")?;
            let both = text.parse::<SocketAddr>().ok();
            let address = both.map(|both| both.ip());
            let address = address.or_else(|| text.trim_matches(['[', ']']).parse().ok());
            Some(Nat {
                to: address.map_or(To::Unknown, To::Address),
                port: both.map(|both| both.port()),
            })
        }
        _ => None,
    }
}

fn shown(nat: &Nat) -> String {
    let to = match nat.to {
        To::Address(address) => address.to_string(),
        To::Here => "this host".to_owned(),
        To::Unknown => "addresses of a map or range".to_owned(),
    };
    let port = nat
        .port
        .map_or_else(|| "same port".to_owned(), |port| format!("port {port}"));
    format!("to {to}, {port}")
}

/// Whether the destination has an endpoint at its port, or at any where the port stays as it was.
fn leads_onto(rules: &RuleSet, nat: &Nat, here: &BTreeSet<IpAddr>) -> bool {
    let has_endpoint = |address: &IpAddr| match nat.port {
        Some(port) => [Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .any(|protocol| owners(rules, protocol, *address, port) != 0),
        None => rules.places.iter().any(|(place, _)| place.net.contains(address)),
    };
    match nat.to {
        To::Address(address) => has_endpoint(&address),
        To::Here => here.iter().any(has_endpoint),
        To::Unknown => false,
    }
}
