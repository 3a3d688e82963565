//! What becomes of packets that no socket of this network namespace sends: forwarded ones, and those that arrive. Pure.
//!
//! Whoever makes packets by hand can cut them so that a rule finds no port, no flags or no transport protocol where it
//! looks for them. Such a rule does not match, the receiver puts the pieces together, and what has not been judged
//! would have arrived. So the layout is by what a packet shows: what shows that it opens nothing leaves first, by one
//! rule (P3); what shows where it goes is judged; of the rest, whatever goes to an endpoint's address and could carry
//! what decides is refused.

use super::{
    endpoints::{AddressSet, Endpoints},
    expression::{self as is, Expression, FAR_OFFSET4, FRAGMENT4, IPV4, IPV6, NftVerdict, OFFSET4, TCP, UDP, goto},
    image::{Image, UNREADABLE, chain_of},
    slot::Slot,
};
use crate::policy::Nat64;

/// Next headers behind which a receiver could go on, and the kernel's rules do not: mobility, HIP, shim6 and two for
/// experiments (IANA's list of IPv6 extension headers; `ipv6_ext_hdr` has the others).
const NOT_WALKED: [u8; 5] = [135, 139, 140, 253, 254];

/// The layout for one rule set.
pub(super) struct Foreign<'e> {
    endpoints: &'e Endpoints,
    nat64: &'e [Nat64],
    slot: Slot,
    has_udp: bool,
}

impl<'e> Foreign<'e> {
    pub(super) fn of(endpoints: &'e Endpoints, nat64: &'e [Nat64], slot: Slot, has_udp: bool) -> Self {
        Self {
            endpoints,
            nat64,
            slot,
            has_udp,
        }
    }

    /// The families with addresses that are endpoints', by a NAT64 too (D4).
    fn families(&self) -> impl Iterator<Item = u8> {
        let has = |family| self.endpoints.sets().any(|set| set.family == family);
        let (v4, v6) = (has(IPV4), has(IPV6));
        let translated = v4 && !self.nat64.is_empty();
        let families = [v4.then_some(IPV4), (v6 || translated).then_some(IPV6)];
        families.into_iter().flatten()
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
        for family in self.families() {
            let pieces = if family == IPV4 {
                is::fragment4(FRAGMENT4, true)
            } else {
                Vec::new()
            };
            let find = goto(&self.slot.addresses(family));
            rules.push([is::of_family(family), pieces, only(family), vec![find]].concat());
        }
        rules
    }

    /// The chains that what is left comes to; the names of the sets of addresses depend on the class.
    pub(super) fn add_to(&self, image: &mut Image, audit: bool, name: impl Fn(&AddressSet) -> String) {
        for family in self.families() {
            let find = |mut there: Vec<Expression>| {
                there.push(goto(&self.slot.unreadable_of(family)));
                there
            };
            let of = |family| self.endpoints.sets().filter(move |set| set.family == family);
            let as_is = of(family).map(|set| find(is::address_in(family, &name(set))));
            let prefixes = self.nat64.iter().filter(|_| family == IPV6);
            let translated =
                prefixes.flat_map(|prefix| of(IPV4).map(|set| find(is::translated_in(prefix.bytes(), &name(set)))));
            let rules = as_is.chain(translated).collect();
            image.chains.insert(self.slot.addresses(family), chain_of(None, rules));
            let rules = if family == IPV4 { self.pieces4() } else { self.pieces6() };
            image
                .chains
                .insert(self.slot.unreadable_of(family), chain_of(None, rules));
        }
        if self.families().next().is_none() {
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
