//! Places around an address or a prefix, found fast: many connections and endpoints are asked about. Pure.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{Place, RuleSet, as_judged};
use crate::policy::{Protocol, canonical};

/// The owners of a destination that is not unspecified, a bit for each target. As [`explain`] finds them, but fast:
/// many connections are asked about.
#[must_use]
pub fn owners(rules: &RuleSet, protocol: Protocol, address: IpAddr, port: u16) -> u64 {
    let places = of_port(rules, protocol, port);
    if places.is_empty() {
        return 0;
    }
    let owners_of = |address: IpAddr| around(places, address.into()).fold(0, |owners, bits| owners | bits);
    as_judged(rules, canonical(address), owners_of) // D4
}

/// Whether a place contains all of a canonical prefix, or of an address.
#[must_use]
pub(crate) fn covers(rules: &RuleSet, protocol: Protocol, net: IpNet, port: u16) -> bool {
    around(of_port(rules, protocol, port), net).next().is_some()
}

/// The places of a port.
fn of_port(rules: &RuleSet, protocol: Protocol, port: u16) -> &[(Place, u64)] {
    let compared = |place: &Place| (place.protocol, place.port).cmp(&(protocol, port));
    let start = rules.places.partition_point(|(place, _)| compared(place).is_lt());
    let places = rules.places.get(start..).unwrap_or_default();
    let end = places.partition_point(|(place, _)| compared(place).is_eq());
    places.get(..end).unwrap_or_default()
}

/// The owners of each place of a port that contains a prefix.
fn around(places: &[(Place, u64)], net: IpNet) -> impl Iterator<Item = u64> {
    prefixes(net).filter_map(|net| {
        let found = places.binary_search_by(|(place, _)| place.net.cmp(&net)).ok()?;
        places.get(found).map(|(_, bits)| *bits)
    })
}

/// Whether some of many prefixes contains a canonical address.
#[must_use]
pub fn contains(nets: &BTreeSet<IpNet>, address: IpAddr) -> bool {
    prefixes(address.into()).any(|net| nets.contains(&net))
}

/// Every prefix that contains this one, or an address.
fn prefixes(net: IpNet) -> impl Iterator<Item = IpNet> {
    (0..=net.prefix_len()).filter_map(move |length| Some(IpNet::new(net.addr(), length).ok()?.trunc()))
}
