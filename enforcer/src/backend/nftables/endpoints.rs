//! Places → the addresses of each service and class, and what looks them up. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use ipnet::IpNet;

use super::{
    expression::{self as is, Expression, IPV4, IPV6, goto},
    image::{Element, Image, SetKind, Value, chain_of, number_of_protocol, sorted},
    slot::{Side, Slot},
};
use crate::{
    policy::{Nat64, Protocol},
    ruleset::{RuleSet, is_single},
};

/// Where connections are opened to, apart from the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Service {
    pub(super) protocol: Protocol,
    pub(super) port: u16,
}

/// A set of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct AddressSet {
    /// The first of the services whose addresses are these: a range of ports has one set.
    pub(super) service: Service,
    /// `IPV4` or `IPV6`.
    pub(super) family: u8,
    /// Ranges of addresses. Single ones are looked up first: they are of the classes of ranges that cover them, too.
    pub(super) ranges: bool,
    /// The owners.
    pub(super) class: u64,
}

/// The places of a rule set, each with all its owners.
pub(super) struct Endpoints {
    /// First and last of each range, and twice the same for a single address.
    sets: BTreeMap<AddressSet, Vec<(IpAddr, IpAddr)>>,
    /// By each service the one that its sets are named for.
    services: BTreeMap<Service, Service>,
}

/// Addresses by family, whether they are ranges, and class.
type Content = BTreeMap<(u8, bool, u64), Vec<(IpAddr, IpAddr)>>;

impl Endpoints {
    pub(super) fn of(rules: &RuleSet) -> Self {
        let service = |protocol, port| Service { protocol, port };
        let mut prefixes: BTreeMap<(Service, u8), Vec<(IpNet, u64)>> = BTreeMap::new();
        for (place, owners) in rules.places.iter().filter(|(place, _)| !is_single(&place.net)) {
            let group = (service(place.protocol, place.port), family_of(place.net.addr()));
            prefixes.entry(group).or_default().push((place.net, *owners));
        }
        let groups: BTreeMap<_, Vec<Range>> = prefixes
            .into_iter()
            .map(|(group, all)| (group, disjoint(&all)))
            .collect();
        let mut contents: BTreeMap<Service, Content> = BTreeMap::new();
        let mut add = |service, family, ranges, class, bounds| {
            let content = contents.entry(service).or_default();
            content.entry((family, ranges, class)).or_default().push(bounds);
        };
        for (place, owners) in rules.places.iter().filter(|(place, _)| is_single(&place.net)) {
            let address = place.net.addr();
            let (service, family) = (service(place.protocol, place.port), family_of(address));
            let ranges = groups.get(&(service, family));
            let class = owners | ranges.map_or(0, |ranges| covering(ranges, address));
            add(service, family, false, class, (address, address));
        }
        for ((service, family), range) in groups
            .iter()
            .flat_map(|(group, all)| all.iter().map(move |one| (group, one)))
        {
            let bound = |number| address(number, *family == IPV4);
            let bounds = (bound(range.first), bound(range.last));
            add(*service, *family, true, range.owners, bounds);
        }
        let mut first: BTreeMap<Content, Service> = BTreeMap::new();
        let named = |(service, content)| (service, *first.entry(content).or_insert(service));
        let services = contents.into_iter().map(named).collect();
        let sets = first.into_iter().flat_map(|(content, service)| {
            content.into_iter().map(move |((family, ranges, class), addresses)| {
                let set = AddressSet {
                    service,
                    family,
                    ranges,
                    class,
                };
                (set, addresses)
            })
        });
        Self {
            sets: sets.collect(),
            services,
        }
    }

    /// The owners of all classes.
    pub(super) fn masks(&self) -> BTreeSet<u64> {
        self.sets.keys().map(|set| set.class).collect()
    }

    /// All sets of addresses.
    pub(super) fn sets(&self) -> impl Iterator<Item = &AddressSet> {
        self.sets.keys()
    }

    /// Whether some endpoint is a loopback address.
    pub(super) fn has_loopback(&self) -> bool {
        let loopback = |address: IpAddr| match address {
            IpAddr::V4(_) => (0x7f00_0000, 0x7fff_ffff),
            IpAddr::V6(_) => (1, 1),
        };
        self.sets.values().flatten().any(|(first, last)| {
            let (low, high) = loopback(*first);
            number(*first) <= high && number(*last) >= low
        })
    }

    /// Adds the sets, the names of which depend on the class.
    pub(super) fn add_to(&self, image: &mut Image, name: impl Fn(&AddressSet) -> String) {
        for (set, addresses) in &self.sets {
            let elements = addresses.iter().map(|(first, last)| Element {
                key: octets(*first),
                last: if set.ranges { octets(*last) } else { Vec::new() },
                value: Value::None,
            });
            let kind = SetKind::Addresses {
                family: set.family,
                ranges: set.ranges,
            };
            image.sets.insert(name(set), sorted(kind, elements.collect()));
        }
    }

    /// Adds the chains that lead from the sets of a service to a chain that depends on the owners, and the map that
    /// leads to these chains.
    pub(super) fn add_services(
        &self,
        image: &mut Image,
        (slot, side): (Slot, Side),
        nat64: &[Nat64],
        name: &impl Fn(&AddressSet) -> String,
        chain: impl Fn(u64) -> String,
    ) {
        let sets: Vec<&AddressSet> = self.sets.keys().collect();
        for sets in sets.chunk_by(|one, next| one.service == next.service) {
            let Some(AddressSet { service, .. }) = sets.first() else {
                continue;
            };
            let of = |family| sets.iter().filter(move |set| set.family == family);
            let rule = |set: &AddressSet, mut there: Vec<Expression>| {
                there.push(goto(&chain(set.class)));
                there
            };
            let as_is = |family| -> Vec<_> {
                of(family)
                    .map(|set| rule(set, is::address_in(family, &name(set))))
                    .collect()
            };
            // The IPv4 address in one of IPv6 before that itself, as the one decides if it is an endpoint (D4).
            let translated = |prefix: &Nat64| -> Vec<_> {
                of(IPV4)
                    .map(|set| rule(set, is::translated_in(prefix.bytes(), &name(set))))
                    .collect()
            };
            let rules = [as_is(IPV4), nat64.iter().flat_map(translated).collect(), as_is(IPV6)].concat();
            image.chains.insert(slot.service(side, *service), chain_of(None, rules));
        }
        let services = self.services.iter().map(|(service, named)| Element {
            key: service_key(*service),
            last: Vec::new(),
            value: Value::Jump(slot.service(side, *named)),
        });
        if !self.services.is_empty() {
            let set = sorted(SetKind::Services, services.collect());
            image.sets.insert(slot.services(side), set);
        }
    }
}

pub(super) fn family_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { IPV4 } else { IPV6 }
}

/// An address as it lies in a packet.
#[must_use]
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// What the map of services is keyed by. As the registers hold it: each part begins at a multiple of 4 bytes.
#[must_use]
pub(super) fn service_key(service: Service) -> Vec<u8> {
    let [high, low] = service.port.to_be_bytes();
    vec![number_of_protocol(service.protocol), 0, 0, 0, high, low, 0, 0]
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn address(number: u128, v4: bool) -> IpAddr {
    match u32::try_from(number) {
        Ok(number) if v4 => IpAddr::V4(number.into()),
        Ok(_) | Err(_) => IpAddr::V6(Ipv6Addr::from_bits(number)),
    }
}

/// Addresses as numbers, first and last included, and the targets that own all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: u128,
    last: u128,
    owners: u64,
}

/// Prefixes that may cover each other → ranges that do not, each with the owners of all that cover it.
fn disjoint(prefixes: &[(IpNet, u64)]) -> Vec<Range> {
    let mut edges: BTreeMap<u128, (Vec<u64>, Vec<u64>)> = BTreeMap::new();
    let mut end = None;
    for (net, owners) in prefixes {
        let (first, last) = (number(net.network()), number(net.broadcast()));
        edges.entry(first).or_default().0.push(*owners);
        match last.checked_add(1) {
            Some(after) => edges.entry(after).or_default().1.push(*owners),
            None => end = Some(last),
        }
    }
    let mut open = [0_u32; 64];
    let mut ranges: Vec<Range> = Vec::new();
    let mut waiting: Option<(u128, u64)> = None;
    let close = |ranges: &mut Vec<Range>, (first, owners): (u128, u64), last: u128| match ranges.last_mut() {
        Some(before) if before.owners == owners && before.last.checked_add(1) == Some(first) => before.last = last,
        Some(_) | None => ranges.push(Range { first, last, owners }),
    };
    for (at, (opening, closing)) in edges {
        if let Some(before) = waiting.take() {
            close(&mut ranges, before, at - 1);
        }
        for (list, opens) in [(opening, true), (closing, false)] {
            for (bit, count) in (0..64).zip(&mut open) {
                let hits = list.iter().filter(|owners| *owners >> bit & 1 == 1).count();
                let hits = u32::try_from(hits).unwrap_or(u32::MAX);
                *count = if opens { *count + hits } else { *count - hits };
            }
        }
        let owners = (0..64)
            .zip(&open)
            .fold(0, |mask, (bit, count)| mask | u64::from(*count > 0) << bit);
        if owners != 0 {
            waiting = Some((at, owners));
        }
    }
    if let (Some(before), Some(last)) = (waiting, end) {
        close(&mut ranges, before, last);
    }
    ranges
}

/// The owners of the range that holds an address.
fn covering(ranges: &[Range], address: IpAddr) -> u64 {
    let at = number(address);
    let after = ranges.partition_point(|range| range.first <= at);
    let before = after.checked_sub(1).and_then(|index| ranges.get(index));
    before.filter(|range| at <= range.last).map_or(0, |range| range.owners)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use super::*;
    use crate::{policy::Mode, ruleset::Place};

    #[test]
    fn ports_with_the_same_addresses_share_their_sets() {
        let place = |port, net: &str| {
            let net = net.parse().expect("a prefix");
            let protocol = Protocol::Tcp;
            (Place { protocol, port, net }, 1)
        };
        let mut places: Vec<_> = (1..=1000).map(|port| place(port, "10.0.0.1/32")).collect();
        places.extend([place(7, "10.0.0.2/32"), place(9, "10.1.0.0/16")]);
        places.sort_unstable();
        let endpoints = Endpoints::of(&RuleSet {
            mode: Mode::Enforce,
            targets: Vec::new(),
            places,
            nat64: Vec::new(),
            named_ports: BTreeSet::new(),
        });
        let ports = |of: u16| {
            let named = endpoints.services.iter().filter(move |(_, named)| named.port == of);
            named.count()
        };
        assert_eq!([ports(1), ports(7), ports(9)], [998, 1, 1]);
        let sets: Vec<_> = endpoints.sets().map(|set| (set.service.port, set.ranges)).collect();
        assert_eq!(sets, [(1, false), (7, false), (9, false), (9, true)]);
    }

    #[test]
    fn loopback_is_found_in_ranges_too() {
        let has = |net: &str| {
            let place = Place {
                protocol: Protocol::Tcp,
                port: 1,
                net: net.parse().expect("a prefix"),
            };
            let rules = RuleSet {
                mode: Mode::Enforce,
                targets: Vec::new(),
                places: vec![(place, 1)],
                nat64: Vec::new(),
                named_ports: BTreeSet::new(),
            };
            Endpoints::of(&rules).has_loopback()
        };
        for (net, expected) in [
            ("127.0.0.1/32", true),
            ("127.255.0.0/16", true),
            ("0.0.0.0/0", true),
            ("126.255.255.255/32", false),
            ("128.0.0.0/1", false),
            ("::1/128", true),
            ("::/0", true),
            ("::2/128", false),
        ] {
            assert_eq!(has(net), expected, "{net}");
        }
    }
}
