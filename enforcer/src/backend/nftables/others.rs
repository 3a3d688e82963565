//! Rules of other people, of every family and table, as far as `enforcer doctor` asks: where packets are sent elsewhere, and which
//! matches of xtables are in use.

#![allow(unsafe_code, reason = "dumps only exist in libnftnl itself")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "libnftnl numbers attributes in wider types than its own functions take"
)]

use std::{collections::BTreeMap, io, net::IpAddr};

use nftnl::nftnl_sys as sys;

use super::netlink::{Netlink, copied, owned};

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
    // NFPROTO_UNSPEC: of all families.
    netlink.ask_of(
        0,
        libc::NFT_MSG_GETRULE,
        libc::NLM_F_DUMP,
        |_| {},
        |header| {
            // SAFETY: allocated, given a whole message, freed.
            unsafe {
                let rule = sys::nftnl_rule_alloc();
                if sys::nftnl_rule_nlmsg_parse(header, rule) >= 0 {
                    found.push(read(rule));
                }
                sys::nftnl_rule_free(rule);
            }
        },
    )?;
    Ok(found)
}

fn chains_once(netlink: &mut Netlink) -> io::Result<Vec<(String, String, String)>> {
    let mut found = Vec::new();
    netlink.ask_of(
        0,
        libc::NFT_MSG_GETCHAIN,
        libc::NLM_F_DUMP,
        |_| {},
        |header| {
            // SAFETY: as above.
            unsafe {
                let chain = sys::nftnl_chain_alloc();
                if sys::nftnl_chain_nlmsg_parse(header, chain) >= 0 {
                    found.push((
                        family(sys::nftnl_chain_get_u32(chain, sys::NFTNL_CHAIN_FAMILY as u16)),
                        owned(sys::nftnl_chain_get_str(chain, sys::NFTNL_CHAIN_TABLE as u16)),
                        owned(sys::nftnl_chain_get_str(chain, sys::NFTNL_CHAIN_NAME as u16)),
                    ));
                }
                sys::nftnl_chain_free(chain);
            }
        },
    )?;
    Ok(found)
}

fn family(number: u32) -> String {
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

/// SAFETY: `rule` must be live.
unsafe fn read(rule: *mut sys::nftnl_rule) -> ForeignRule {
    let mut found = ForeignRule::default();
    // What constants the registers hold, by their first; those of 4 bytes are named from 8 on.
    let mut registers: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    // SAFETY: the rule outlives the iterator, the expressions are its own, and what is read of them is copied.
    unsafe {
        found.family = family(sys::nftnl_rule_get_u32(rule, sys::NFTNL_RULE_FAMILY as u16));
        found.table = owned(sys::nftnl_rule_get_str(rule, sys::NFTNL_RULE_TABLE as u16));
        found.chain = owned(sys::nftnl_rule_get_str(rule, sys::NFTNL_RULE_CHAIN as u16));
        let all = sys::nftnl_expr_iter_create(rule);
        loop {
            let expression = sys::nftnl_expr_iter_next(all);
            if expression.is_null() {
                break;
            }
            let number = |attribute: u32| sys::nftnl_expr_get_u32(expression, attribute as u16);
            let has = |attribute: u32| sys::nftnl_expr_is_set(expression, attribute as u16);
            let bytes = |attribute: u32| {
                let mut length = 0;
                let data = sys::nftnl_expr_get(expression, attribute as u16, &raw mut length);
                copied(data, length)
            };
            let word = |attribute: u32| owned(sys::nftnl_expr_get_str(expression, attribute as u16));
            let port = |registers: &BTreeMap<u32, Vec<u8>>, register: u32| {
                let bytes = registers.get(&register)?.first_chunk()?;
                Some(u16::from_be_bytes(*bytes))
            };
            match word(sys::NFTNL_EXPR_NAME).as_str() {
                "immediate" if has(sys::NFTNL_EXPR_IMM_DATA) => {
                    registers.insert(number(sys::NFTNL_EXPR_IMM_DREG), bytes(sys::NFTNL_EXPR_IMM_DATA));
                }
                // NFT_NAT_DNAT
                "nat" if number(sys::NFTNL_EXPR_NAT_TYPE) == 1 => {
                    let to = has(sys::NFTNL_EXPR_NAT_REG_ADDR_MIN)
                        .then(|| registers.get(&number(sys::NFTNL_EXPR_NAT_REG_ADDR_MIN)))
                        .flatten()
                        .and_then(|bytes| address(bytes));
                    let changes_port = has(sys::NFTNL_EXPR_NAT_REG_PROTO_MIN);
                    found.nat = Some(Nat {
                        to: to.map_or(To::Unknown, To::Address),
                        port: changes_port
                            .then(|| port(&registers, number(sys::NFTNL_EXPR_NAT_REG_PROTO_MIN)))
                            .flatten(),
                    });
                }
                "redir" => {
                    let changes_port = has(sys::NFTNL_EXPR_REDIR_REG_PROTO_MIN);
                    found.nat = Some(Nat {
                        to: To::Here,
                        port: changes_port
                            .then(|| port(&registers, number(sys::NFTNL_EXPR_REDIR_REG_PROTO_MIN)))
                            .flatten(),
                    });
                }
                "match" => found.matches.push(word(sys::NFTNL_EXPR_MT_NAME)),
                "target" => {
                    let info = bytes(sys::NFTNL_EXPR_TG_INFO);
                    let name = word(sys::NFTNL_EXPR_TG_NAME);
                    if let Some(nat) = xt_nat(&name, number(sys::NFTNL_EXPR_TG_REV), &info, &found.family) {
                        found.nat = Some(nat);
                    }
                }
                _ => {}
            }
        }
        sys::nftnl_expr_iter_destroy(all);
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
