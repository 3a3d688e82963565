//! The expressions that rules of ours are made of, and the forms in which they are put together. Pure.
//!
//! Numbers are those of `linux/netfilter/nf_tables.h`. Registers are named as the kernel dumps them: 1 and 2 are the
//! first two of 16 bytes, 8 + n the nth of 4 bytes, so that what was written and what is read back are equal.

use std::net::{Ipv4Addr, Ipv6Addr};

/// One step of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expression {
    /// Loads a property of the packet or its socket.
    Meta {
        /// Which one.
        key: u32,
        /// Into which register.
        register: u32,
    },
    /// Loads bytes of the packet.
    Payload {
        /// Header to count from.
        base: u32,
        /// First byte.
        offset: u32,
        /// How many.
        length: u32,
        /// Into which register.
        register: u32,
    },
    /// Keeps some bits of register 1.
    Mask(Vec<u8>),
    /// Goes on only if register 1 is, or is not, this.
    Compare {
        /// Whether it must be.
        equal: bool,
        /// This.
        value: Vec<u8>,
    },
    /// Goes on only if a set holds register 1; a map's value goes to a register, 0 being the verdict.
    Lookup {
        /// The set's name.
        set: String,
        /// Where a map's value goes.
        value: Option<u32>,
    },
    /// Loads the id of the ancestor, at a depth, of the cgroup that the socket was made in.
    Cgroup {
        /// The depth below the root.
        level: u32,
    },
    /// Adds one to a counter.
    Count(String),
    /// Goes on only so often.
    Limit {
        /// Times a second.
        rate: u64,
        /// Times at once.
        burst: u32,
    },
    /// Sends the packet's beginning to whoever listens to the group.
    Log {
        /// nflog's group.
        group: u16,
        /// Text that goes with it.
        prefix: String,
    },
    /// Answers the sender and drops the packet.
    Reject {
        /// TCP reset, or ICMP port unreachable.
        reset: bool,
    },
    /// Answers the sender by ICMP that an administrator forbids it, where the kernel answers such a packet, and drops
    /// the packet.
    Prohibit,
    /// Ends the rule.
    Verdict(NftVerdict),
    /// None of ours.
    Other(String),
}

/// Where evaluation goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NftVerdict {
    /// The packet passes this hook.
    Accept,
    /// Back to where this chain was jumped from.
    Return,
    /// To another chain, and back at its end.
    Jump(String),
    /// To another chain, for good.
    Goto(String),
    /// None of ours: its number.
    Other(i32),
}

/// `NFT_META_*`.
pub(crate) mod meta {
    /// Number of the device that it came in on; loopback is 1 in every network namespace.
    pub(crate) const IIF: u32 = 4;
    /// UID by which the socket's file was opened (its fsuid then); none without a file.
    pub(crate) const SKUID: u32 = 10;
    /// Address family.
    pub(crate) const NFPROTO: u32 = 15;
    /// Transport protocol.
    pub(crate) const L4PROTO: u32 = 16;
}

/// `NFT_PAYLOAD_*`.
pub(crate) mod base {
    /// IP header.
    pub(crate) const NETWORK: u32 = 1;
    /// TCP or UDP header.
    pub(crate) const TRANSPORT: u32 = 2;
}

/// `NFPROTO_*`.
pub(crate) const IPV4: u8 = 2;
/// `NFPROTO_*`.
pub(crate) const IPV6: u8 = 10;
/// `IPPROTO_*`.
pub(crate) const TCP: u8 = 6;
/// `IPPROTO_*`.
pub(crate) const UDP: u8 = 17;

/// Register for verdicts.
pub(crate) const VERDICT: u32 = 0;
/// First register.
pub(crate) const REGISTER: u32 = 1;
/// The register behind the first four bytes of that.
const BEHIND: u32 = 9;

/// Only packets of a transport protocol.
#[must_use]
pub(crate) fn transport(protocol: u8) -> Vec<Expression> {
    equal(meta::L4PROTO, vec![protocol])
}

/// Bits of TCP's flags, and those of them that ask for a connection: SYN without ACK, RST and FIN.
const ASKED: u8 = 0x17;
const ASKS: u8 = 0x02;

/// Only TCP segments that ask for a connection, of packets that are whole, as all that sockets of this network
/// namespace send.
#[must_use]
pub(crate) fn opens_connection() -> Vec<Expression> {
    vec![
        Expression::Payload {
            base: base::TRANSPORT,
            offset: 13,
            length: 1,
            register: REGISTER,
        },
        Expression::Mask(vec![ASKED]),
        Expression::Compare {
            equal: true,
            value: vec![ASKS],
        },
    ]
}

/// Only TCP segments whose flags show that they ask for a connection, or with `false`, that they do not. Neither
/// matches where a fragment ends before the flags, or begins behind them.
///
/// Loads of 1, 2 and 4 aligned bytes take a short cut in the kernel (`nft_payload_fast_eval`) that reads a later
/// fragment's data, and of IPv6 even the IP header, as if a transport header were there. Two bytes at an odd offset go
/// the long way, which looks.
#[must_use]
pub(crate) fn shows_opening(opens: bool) -> Vec<Expression> {
    vec![
        Expression::Payload {
            base: base::TRANSPORT,
            offset: 13,
            length: 2,
            register: REGISTER,
        },
        Expression::Mask(vec![ASKED, 0]),
        Expression::Compare {
            equal: opens,
            value: vec![ASKS, 0],
        },
    ]
}

/// Only TCP segments of a family that show, by their flags, that they ask for no connection: as [`shows_opening`], but
/// only where the header of TCP follows that of IP and is in the first fragment, as nearly always. Every load takes the
/// kernel's short cut.
#[must_use]
pub(crate) fn opens_nothing(family: u8) -> Vec<Expression> {
    let bits = |base, offset, mask: &[u8], equal, value: &[u8]| {
        let load = Expression::Payload {
            base,
            offset,
            length: u32::try_from(mask.len()).unwrap_or_default(),
            register: REGISTER,
        };
        let value = value.to_vec();
        [
            load,
            Expression::Mask(mask.to_vec()),
            Expression::Compare { equal, value },
        ]
    };
    let version = |number: u8| bits(base::NETWORK, 0, &[0xf0], true, &[number << 4]);
    let protocol = |offset| bits(base::NETWORK, offset, &[0xff], true, &[TCP]);
    let flags = bits(base::TRANSPORT, 13, &[ASKED], false, &[ASKS]);
    if family == IPV4 {
        let first = bits(base::NETWORK, 6, &OFFSET4.to_be_bytes(), true, &[0, 0]);
        [version(4), first, protocol(9), flags].concat()
    } else {
        [version(6), protocol(6), flags].concat()
    }
}

/// Only packets that show their destination port: no later fragment does. Of three bytes, for the reason of
/// [`shows_opening`].
#[must_use]
pub(crate) fn shows_port() -> Vec<Expression> {
    vec![Expression::Payload {
        base: base::TRANSPORT,
        offset: 2,
        length: 3,
        register: REGISTER,
    }]
}

/// Only packets whose transport protocol can be told.
#[must_use]
pub(crate) fn has_transport() -> Vec<Expression> {
    vec![Expression::Meta {
        key: meta::L4PROTO,
        register: REGISTER,
    }]
}

/// Bits of the third word of an IPv4 header (RFC 791): more fragments follow, or this one begins behind the first byte.
pub(crate) const FRAGMENT4: u16 = 0x3fff;
/// Offsets of IPv4 fragments, in units of 8 bytes.
pub(crate) const OFFSET4: u16 = 0x1fff;
/// Offsets of 16 bytes and more: behind ports and flags of TCP.
pub(crate) const FAR_OFFSET4: u16 = 0x1ffe;
/// Offsets of IPv6 fragments, in bytes (RFC 8200).
const OFFSET6: u16 = 0xfff8;

/// Only packets of IPv4 that have some, or none, of these bits in the word for fragments.
#[must_use]
pub(crate) fn fragment4(bits: u16, some: bool) -> Vec<Expression> {
    [equal(meta::NFPROTO, vec![IPV4]), network_bits(6, bits, some)].concat()
}

/// Only later fragments of IPv6 packets, with the fragment header right behind that of IPv6, where all senders that
/// mean well put it.
#[must_use]
pub(crate) fn later_fragment6() -> Vec<Expression> {
    const FRAGMENT: u8 = 44;
    let next_header = [
        Expression::Payload {
            base: base::NETWORK,
            offset: 6,
            length: 1,
            register: REGISTER,
        },
        Expression::Compare {
            equal: true,
            value: vec![FRAGMENT],
        },
    ];
    [
        &equal(meta::NFPROTO, vec![IPV6]),
        &next_header[..],
        &network_bits(42, OFFSET6, true),
    ]
    .concat()
}

fn network_bits(offset: u32, bits: u16, some: bool) -> Vec<Expression> {
    vec![
        Expression::Payload {
            base: base::NETWORK,
            offset,
            length: 2,
            register: REGISTER,
        },
        Expression::Mask(bits.to_be_bytes().to_vec()),
        Expression::Compare {
            equal: !some,
            value: vec![0, 0],
        },
    ]
}

/// Only packets to an address in a set of a family's.
#[must_use]
pub(crate) fn address_in(family: u8, set: &str) -> Vec<Expression> {
    let (offset, length) = if family == IPV4 { (16, 4) } else { (24, 16) };
    let mut all = equal(meta::NFPROTO, vec![family]);
    all.extend([
        payload(base::NETWORK, offset, length, REGISTER),
        Expression::Lookup {
            set: set.to_owned(),
            value: None,
        },
    ]);
    all
}

/// Only packets to a NAT64 prefix and, in that, to an IPv4 address in a set (D4).
#[must_use]
pub(crate) fn translated_in(prefix: [u8; 12], set: &str) -> Vec<Expression> {
    let mut all = equal(meta::NFPROTO, vec![IPV6]);
    all.extend([
        payload(base::NETWORK, 24, 12, REGISTER),
        Expression::Compare {
            equal: true,
            value: prefix.to_vec(),
        },
        payload(base::NETWORK, 36, 4, REGISTER),
        Expression::Lookup {
            set: set.to_owned(),
            value: None,
        },
    ]);
    all
}

/// Looks protocol and port up in a map of services to verdicts.
#[must_use]
pub(crate) fn service_in(services: &str) -> Vec<Expression> {
    vec![
        Expression::Meta {
            key: meta::L4PROTO,
            register: REGISTER,
        },
        payload(base::TRANSPORT, 2, 2, BEHIND),
        to_verdict(services),
    ]
}

fn payload(base: u32, offset: u32, length: u32, register: u32) -> Expression {
    Expression::Payload {
        base,
        offset,
        length,
        register,
    }
}

fn to_verdict(map: &str) -> Expression {
    Expression::Lookup {
        set: map.to_owned(),
        value: Some(VERDICT),
    }
}

/// The set, the NAT64 prefix if there is one, and the chain of a rule that looks an address up.
#[must_use]
pub(crate) fn lookup_of(rule: &[Expression]) -> Option<(u8, Option<[u8; 12]>, &str, &str)> {
    let [
        ..,
        Expression::Lookup { set, value: None },
        Expression::Verdict(NftVerdict::Goto(chain)),
    ] = rule
    else {
        return None;
    };
    let prefix = rule.iter().find_map(|expression| {
        let Expression::Compare { value, .. } = expression else {
            return None;
        };
        value.as_slice().try_into().ok()
    });
    let is_made = |there: Vec<Expression>| rule.strip_suffix(&[goto(chain)]).is_some_and(|rule| rule == there);
    let family = match prefix {
        Some(prefix) => is_made(translated_in(prefix, set)).then_some(IPV6),
        None => [IPV4, IPV6]
            .into_iter()
            .find(|family| is_made(address_in(*family, set))),
    };
    Some((family?, prefix, set, chain))
}

/// Looks the destination's port up in a map of ports to verdicts.
#[must_use]
pub(crate) fn port(ports: &str) -> Vec<Expression> {
    vec![payload(base::TRANSPORT, 2, 2, REGISTER), to_verdict(ports)]
}

/// Only packets that did not come in on loopback, whose index is 1 in every network namespace.
#[must_use]
pub(crate) fn from_elsewhere() -> Vec<Expression> {
    compare(meta::IIF, false, 1_u32.to_ne_bytes().to_vec())
}

/// Only packets to a loopback address (D6).
#[must_use]
pub(crate) fn to_loopback(family: u8) -> Vec<Expression> {
    let begins = if family == IPV4 {
        vec![Ipv4Addr::LOCALHOST.octets()[0]]
    } else {
        Ipv6Addr::LOCALHOST.octets().to_vec()
    };
    address(family, true, begins)
}

/// Only packets of a family that certainly go to no loopback address: by a word of the address that the kernel compares
/// fastest.
#[must_use]
pub(crate) fn beyond_loopback(family: u8) -> Vec<Expression> {
    let begins = if family == IPV4 {
        vec![Ipv4Addr::LOCALHOST.octets()[0]]
    } else {
        vec![0; 4]
    };
    address(family, false, begins)
}

/// Only packets of a family whose destination begins with these bytes, or with others.
#[must_use]
pub(crate) fn address(family: u8, equal_to: bool, begins: Vec<u8>) -> Vec<Expression> {
    let mut all = equal(meta::NFPROTO, vec![family]);
    all.extend([
        Expression::Payload {
            base: base::NETWORK,
            offset: if family == IPV4 { 16 } else { 24 },
            length: u32::try_from(begins.len()).unwrap_or_default(),
            register: REGISTER,
        },
        Expression::Compare {
            equal: equal_to,
            value: begins,
        },
    ]);
    all
}

/// Only packets of sockets that have a file: the kernel's own have none.
#[must_use]
pub(crate) fn has_user() -> Vec<Expression> {
    vec![Expression::Meta {
        key: meta::SKUID,
        register: REGISTER,
    }]
}

/// Only packets of users in a set.
#[must_use]
pub(crate) fn user_in(set: &str) -> Vec<Expression> {
    let mut all = has_user();
    all.push(Expression::Lookup {
        set: set.to_owned(),
        value: None,
    });
    all
}

/// Only packets of one user whose socket was made below a cgroup.
#[must_use]
pub(crate) fn user_below(uid: u32, level: u32, cgroup: u64) -> Vec<Expression> {
    let mut all = equal(meta::SKUID, uid.to_ne_bytes().to_vec());
    all.extend(below(level, cgroup));
    all
}

/// Only packets of sockets that were made below a cgroup.
#[must_use]
pub(crate) fn below(level: u32, cgroup: u64) -> [Expression; 2] {
    let value = cgroup.to_ne_bytes().to_vec();
    [Expression::Cgroup { level }, Expression::Compare { equal: true, value }]
}

/// Only packets to a port.
#[must_use]
pub(crate) fn to_port(port: u16) -> [Expression; 2] {
    let value = port.to_be_bytes().to_vec();
    [
        payload(base::TRANSPORT, 2, 2, REGISTER),
        Expression::Compare { equal: true, value },
    ]
}

/// Only packets of sockets that have a file and were made below one of the cgroups, all of one depth, in a set.
#[must_use]
pub(crate) fn anybody_below(level: u32, set: &str) -> Vec<Expression> {
    // The kernel's own sockets may carry a cgroup, and match no user (D3).
    let mut all = has_user();
    all.extend([
        Expression::Cgroup { level },
        Expression::Lookup {
            set: set.to_owned(),
            value: None,
        },
    ]);
    all
}

/// Only packets of sockets that were made in a cgroup below the root: no other has an ancestor there.
#[must_use]
pub(crate) fn below_the_root() -> Vec<Expression> {
    vec![Expression::Cgroup { level: 1 }]
}

/// Goes to a chain for good.
#[must_use]
pub(crate) fn goto(chain: &str) -> Expression {
    Expression::Verdict(NftVerdict::Goto(chain.to_owned()))
}

/// Only packets of a family.
#[must_use]
pub(crate) fn of_family(family: u8) -> Vec<Expression> {
    equal(meta::NFPROTO, vec![family])
}

/// Only packets of which a property is this.
#[must_use]
pub(crate) fn equal(key: u32, value: Vec<u8>) -> Vec<Expression> {
    compare(key, true, value)
}

fn compare(key: u32, equal: bool, value: Vec<u8>) -> Vec<Expression> {
    vec![
        Expression::Meta {
            key,
            register: REGISTER,
        },
        Expression::Compare { equal, value },
    ]
}
