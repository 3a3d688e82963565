//! Rules of other people, of every family and table, as far as `enforcer doctor` asks: where packets are sent
//! elsewhere, and which matches of xtables are in use.

use std::{collections::BTreeMap, io, net::IpAddr};

use netlink_packet_core::NLM_F_DUMP;

use super::netlink::{Attributes, Netlink, each_expression, nfta};

/// `NFPROTO_UNSPEC`: of all families.
const EVERY: u8 = 0;

/// A rule of whoever.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ForeignRule {
    /// `ip`, `ip6`, `inet`, …
    pub family: String,
    /// Its table.
    pub table: String,
    /// Its chain.
    pub chain: String,
    /// Where it sends packets, if it does (destination NAT).
    pub nat: Option<Nat>,
    /// Names of the xtables matches in it (iptables-nft).
    pub matches: Vec<String>,
}

/// Destination NAT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nat {
    /// To which address.
    pub to: To,
    /// To which port; none where it stays as it was, or a map tells.
    pub port: Option<u16>,
}

/// Where destination NAT leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum To {
    /// To this address.
    Address(IpAddr),
    /// To this host.
    Here,
    /// A map or a range tells.
    Unknown,
}

/// Every rule of every table of this network namespace.
pub(crate) fn rules(netlink: &mut Netlink) -> io::Result<Vec<ForeignRule>> {
    netlink.at_one_generation(rules_once).map(|(rules, _)| rules)
}

/// Every chain of every table: family, table, chain.
pub(crate) fn chains(netlink: &mut Netlink) -> io::Result<Vec<(String, String, String)>> {
    netlink.at_one_generation(chains_once).map(|(chains, _)| chains)
}

fn rules_once(netlink: &mut Netlink) -> io::Result<Vec<ForeignRule>> {
    let mut found = Vec::new();
    netlink.ask(EVERY, libc::NFT_MSG_GETRULE, NLM_F_DUMP, &[], |family, rule| {
        found.push(read(family, rule));
    })?;
    Ok(found)
}

fn chains_once(netlink: &mut Netlink) -> io::Result<Vec<(String, String, String)>> {
    let mut found = Vec::new();
    netlink.ask(EVERY, libc::NFT_MSG_GETCHAIN, NLM_F_DUMP, &[], |number, chain| {
        let (table, name) = (chain.text(nfta::CHAIN_TABLE), chain.text(nfta::CHAIN_NAME));
        found.push((family(number), table, name));
    })?;
    Ok(found)
}

fn family(number: u8) -> String {
    match number {
        1 => "inet".to_owned(),
        2 => "ip".to_owned(),
        3 => "arp".to_owned(),
        5 => "netdev".to_owned(),
        7 => "bridge".to_owned(),
        10 => "ip6".to_owned(),
        other => format!("family {other}"),
    }
}

fn read(number: u8, rule: Attributes<'_>) -> ForeignRule {
    let mut found = ForeignRule {
        family: family(number),
        table: rule.text(nfta::RULE_TABLE),
        chain: rule.text(nfta::RULE_CHAIN),
        ..ForeignRule::default()
    };
    // What constants the registers hold, by their first; those of 4 bytes are named from 8 on.
    let mut registers: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    for (name, of) in each_expression(rule) {
        // What an attribute that names a register leads to.
        let held = |register| of.has(register).then(|| registers.get(&of.number(register))).flatten();
        let port = |register| {
            let bytes = held(register)?.first_chunk()?;
            Some(u16::from_be_bytes(*bytes))
        };
        match name.as_str() {
            "immediate" if of.inside(nfta::IMMEDIATE_DATA).has(nfta::DATA_VALUE) => {
                registers.insert(of.number(nfta::IMMEDIATE_DREG), of.data(nfta::IMMEDIATE_DATA));
            }
            // NFT_NAT_DNAT
            "nat" if of.number(nfta::NAT_TYPE) == 1 => {
                let to = held(nfta::NAT_REG_ADDR_MIN).and_then(|bytes| address(bytes));
                found.nat = Some(Nat {
                    to: to.map_or(To::Unknown, To::Address),
                    port: port(nfta::NAT_REG_PROTO_MIN),
                });
            }
            "redir" => {
                found.nat = Some(Nat {
                    to: To::Here,
                    port: port(nfta::REDIR_REG_PROTO_MIN),
                });
            }
            "match" => found.matches.push(of.text(nfta::MATCH_NAME)),
            "target" => {
                let (target, revision) = (of.text(nfta::TARGET_NAME), of.number(nfta::TARGET_REV));
                let nat = xt_nat(&target, revision, of.bytes(nfta::TARGET_INFO), &found.family);
                found.nat = nat.or(found.nat);
            }
            _ => {}
        }
    }
    found
}

/// `struct nf_nat_range2` of iptables-nft's DNAT from revision 1 on: flags, least and greatest address, least port; and
/// `struct nf_nat_ipv4_multi_range_compat` of revision 0: count, flags, least and greatest address, least port.
fn xt_nat(name: &str, revision: u32, info: &[u8], family: &str) -> Option<Nat> {
    let to = match name {
        "REDIRECT" => To::Here,
        "DNAT" => {
            let v4 = family == "ip" || revision == 0;
            let at = if revision == 0 { 8 } else { 4 };
            let bytes = info.get(at..at + if v4 { 4 } else { 16 })?;
            address(bytes).map_or(To::Unknown, To::Address)
        }
        _ => return None,
    };
    let at = if revision == 0 { 16 } else { 36 };
    let port = info.get(at..).and_then(|rest| rest.first_chunk());
    Some(Nat {
        to,
        port: port.map(|bytes| u16::from_be_bytes(*bytes)).filter(|port| *port != 0),
    })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let found = match bytes.len() {
        4 => bytes.first_chunk().map(|bytes: &[u8; 4]| IpAddr::from(*bytes)),
        16 => bytes.first_chunk().map(|bytes: &[u8; 16]| IpAddr::from(*bytes)),
        _ => None,
    };
    found.filter(|address| !address.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iptables_nft_tells_where_it_leads() {
        // nf_nat_range2: flags, 16 + 16 bytes of addresses, ports; as iptables-nft 1.8 writes DNAT revision 2.
        let mut info = vec![3, 0, 0, 0];
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&[127, 0, 0, 1]);
        info.extend(bytes);
        info.extend(bytes);
        info.extend(2822_u16.to_be_bytes());
        info.extend(2822_u16.to_be_bytes());
        let nat = xt_nat("DNAT", 2, &info, "ip");
        let here = IpAddr::from([127, 0, 0, 1]);
        assert_eq!(
            nat,
            Some(Nat {
                to: To::Address(here),
                port: Some(2822)
            })
        );
        assert_eq!(xt_nat("MASQUERADE", 0, &info, "ip"), None);
        assert_eq!(xt_nat("DNAT", 2, &[1, 2], "ip"), None);
        assert!(xt_nat("REDIRECT", 0, &info, "ip").is_some_and(|nat| nat.to == To::Here));
    }
}
