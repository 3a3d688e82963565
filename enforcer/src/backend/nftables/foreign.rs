//! What becomes of packets that no socket of this network namespace sends: forwarded ones, and those that arrive. Pure.
//!
//! Whoever makes packets by hand can cut them so that a rule finds no port, no flags or no transport protocol where it
//! looks for them. Such a rule does not match, the receiver puts the pieces together, and what has not been judged
//! would have arrived. So the layout is by what a packet shows: what shows that it opens nothing leaves first, by one
//! rule (P3); what shows where it goes is judged; of the rest, whatever goes to an endpoint's address and could carry
//! what decides is refused.

use std::net::Ipv4Addr;

use ipnet::IpNet;

use super::{
    expression::{self as is, Expression, FAR_OFFSET4, FRAGMENT4, IPV4, IPV6, NftVerdict, OFFSET4, TCP, UDP, goto},
    image::{Element, Image, SetKind, UNREADABLE, Value, address, chain_of, number, sorted},
    slot::Slot,
};
use crate::{policy::Nat64, ruleset::RuleSet};

/// Next headers behind which a receiver could go on, and the kernel's rules do not: mobility, HIP, shim6 and two for
/// experiments (IANA's list of IPv6 extension headers; `ipv6_ext_hdr` has the others).
const NOT_WALKED: [u8; 5] = [135, 139, 140, 253, 254];

/// The layout for one rule set.
pub(super) struct Foreign {
    slot: Slot,
    has_udp: bool,
    /// First and last address of each range, by family.
    addresses: Vec<(u8, Vec<(u128, u128)>)>,
}

impl Foreign {
    pub(super) fn of(rules: &RuleSet, slot: Slot, has_udp: bool) -> Self {
        let ranges = |family| (family, ranges(rules, family));
        let mut addresses = vec![ranges(IPV4), ranges(IPV6)];
        addresses.retain(|(_, ranges)| !ranges.is_empty());
        Self {
            slot,
            has_udp,
            addresses,
        }
    }

    /// Whether some endpoint is a loopback address, so that what arrives from elsewhere is to be judged.
    pub(super) fn has_loopback(&self) -> bool {
        self.addresses.iter().any(|(family, ranges)| {
            let (low, high) = if *family == IPV4 {
                (0x7f00_0000, 0x7fff_ffff)
            } else {
                (1, 1)
            };
            ranges.iter().any(|(first, last)| *first <= high && *last >= low)
        })
    }

    /// What is forwarded; `judge` looks the destination up.
    pub(super) fn forwarded(&self, judge: &str) -> Vec<Vec<Expression>> {
        self.entries(judge, |_| Vec::new())
    }

    /// What arrives from elsewhere: `judge` picks what goes to this host's loopback (D6).
    pub(super) fn arrived(&self, judge: &str) -> Vec<Vec<Expression>> {
        // Nearly every packet that arrives leaves here (P3).
        let beyond = |family| [is::beyond_loopback(family), vec![accept()]].concat();
        let mut rules = [IPV4, IPV6].map(beyond).to_vec();
        rules.extend(self.entries(judge, is::to_loopback));
        rules
    }

    fn entries(&self, judge: &str, only: impl Fn(u8) -> Vec<Expression>) -> Vec<Vec<Expression>> {
        let tcp = |flags: Vec<Expression>, then| [is::transport(TCP), flags, vec![then]].concat();
        let mut rules = vec![
            [is::opens_nothing(IPV4), vec![accept()]].concat(),
            [is::opens_nothing(IPV6), vec![accept()]].concat(),
            tcp(is::shows_opening(false), accept()),
            tcp(is::shows_opening(true), goto(judge)),
            if self.has_udp {
                [is::transport(UDP), is::shows_port(), vec![goto(judge)]].concat()
            } else {
                [is::transport(UDP), vec![accept()]].concat()
            },
        ];
        for (family, _) in &self.addresses {
            let pieces = if *family == IPV4 {
                is::fragment4(FRAGMENT4, true)
            } else {
                Vec::new()
            };
            let there = is::address_in(*family, &self.slot.addresses(*family));
            let find = goto(&self.slot.unreadable_of(*family));
            rules.push([pieces, only(*family), there, vec![find]].concat());
        }
        rules
    }

    /// The sets of addresses, and the chains that what is left comes to.
    pub(super) fn add_to(&self, image: &mut Image, audit: bool) {
        for (family, ranges) in &self.addresses {
            let bytes = |number| match address(number, *family == IPV4) {
                std::net::IpAddr::V4(address) => address.octets().to_vec(),
                std::net::IpAddr::V6(address) => address.octets().to_vec(),
            };
            let elements = ranges.iter().map(|(first, last)| Element {
                key: bytes(*first),
                last: bytes(*last),
                value: Value::None,
            });
            let set = sorted(SetKind::Addresses { family: *family }, elements.collect());
            image.sets.insert(self.slot.addresses(*family), set);
            let rules = if *family == IPV4 {
                self.pieces4()
            } else {
                self.pieces6()
            };
            image
                .chains
                .insert(self.slot.unreadable_of(*family), chain_of(None, rules));
        }
        if self.addresses.is_empty() {
            return;
        }
        let count = Expression::Count(UNREADABLE.to_owned());
        let rule = if audit {
            vec![count]
        } else {
            vec![count, Expression::Prohibit]
        };
        image.chains.insert(self.slot.unreadable(), chain_of(None, vec![rule]));
        image.counters.insert(UNREADABLE.to_owned());
    }

    fn refuse(&self) -> Expression {
        goto(&self.slot.unreadable())
    }

    /// Fragments of IPv4. Only what lies within the first 16 bytes of TCP decides, and only a first fragment, or one
    /// that begins at byte 8 and overlaps it (RFC 1858, 3128), can carry that; of UDP, whose ports are within the first
    /// 8, only a first one.
    fn pieces4(&self) -> Vec<Vec<Expression>> {
        let near = |protocol, offsets| {
            [
                is::transport(protocol),
                is::fragment4(offsets, false),
                vec![self.refuse()],
            ]
            .concat()
        };
        let mut rules = vec![near(TCP, FAR_OFFSET4)];
        if self.has_udp {
            rules.push(near(UDP, OFFSET4));
        }
        rules
    }

    /// What is left of IPv6, whole packets that are neither TCP nor UDP among it. The first fragment of a packet is in
    /// any case either judged or refused; later ones of TCP are too, as a receiver that let them overlap it could find
    /// flags there.
    fn pieces6(&self) -> Vec<Vec<Expression>> {
        let mut rules = vec![[is::transport(TCP), vec![self.refuse()]].concat()];
        if self.has_udp {
            rules.push([is::transport(UDP), is::later_fragment6(), vec![accept()]].concat());
            rules.push([is::transport(UDP), vec![self.refuse()]].concat());
        }
        let strange = NOT_WALKED.map(|header| [is::transport(header), vec![self.refuse()]].concat());
        rules.extend(strange);
        rules.push([is::has_transport(), vec![accept()]].concat());
        rules.push(vec![self.refuse()]);
        rules
    }
}

fn accept() -> Expression {
    Expression::Verdict(NftVerdict::Accept)
}

/// Ranges of all endpoints' addresses of a family, of whatever protocol and port: no two of them touch.
fn ranges(rules: &RuleSet, family: u8) -> Vec<(u128, u128)> {
    let nets = rules.places.iter().map(|(place, _)| place.net);
    let range = |net: IpNet| (number(net.network()), number(net.broadcast()));
    let (v4, v6): (Vec<IpNet>, Vec<IpNet>) = nets.partition(|net| net.addr().is_ipv4());
    let own = if family == IPV4 { &v4 } else { &v6 };
    let mut all: Vec<_> = own.iter().copied().map(range).collect();
    if family == IPV6 {
        // By a NAT64, too (D4).
        for (first, last) in v4.into_iter().map(range) {
            let start = |prefix: &Nat64| number(prefix.embed(Ipv4Addr::UNSPECIFIED).into());
            let starts = rules.nat64.iter().map(start);
            all.extend(starts.map(|start| (start + first, start + last)));
        }
    }
    all.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::new();
    for (first, last) in all {
        match merged.last_mut().filter(|before| first <= before.1.saturating_add(1)) {
            Some(before) => before.1 = before.1.max(last),
            None => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        policy::{Mode, Protocol},
        ruleset::Place,
    };

    fn rules(nets: impl IntoIterator<Item = String>) -> RuleSet {
        let place = |net: String| Place {
            protocol: Protocol::Tcp,
            port: 1,
            net: net.parse().expect("a prefix"),
        };
        RuleSet {
            mode: Mode::Enforce,
            targets: Vec::new(),
            places: nets.into_iter().map(|net| (place(net), 1)).collect(),
            nat64: Vec::new(),
            named_ports: BTreeSet::new(),
        }
    }

    #[test]
    fn loopback_is_found_in_ranges_too() {
        let has = |net: &str| Foreign::of(&rules([net.to_owned()]), Slot::of(1), false).has_loopback();
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

    #[test]
    fn addresses_that_touch_are_one_range() {
        let many =
            rules((0..100_000_u32).map(|host| format!("{}/32", std::net::Ipv4Addr::from_bits(0x0a00_0000 + host))));
        assert_eq!(ranges(&many, IPV4), [(0x0a00_0000, 0x0a00_0000 + 99_999)]);
        assert_eq!(ranges(&many, IPV6), []);
        let nested = rules(
            [
                "10.0.0.0/8",
                "10.1.0.0/16",
                "11.0.0.0/32",
                "11.0.0.2/32",
                "::/0",
                "::1/128",
            ]
            .map(str::to_owned),
        );
        assert_eq!(
            ranges(&nested, IPV4),
            [(0x0a00_0000, 0x0b00_0000), (0x0b00_0002, 0x0b00_0002)]
        );
        assert_eq!(ranges(&nested, IPV6), [(0, u128::MAX)]);
    }
}
