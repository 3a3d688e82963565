//! Prefixes by which a network reaches IPv4 services from IPv6 (RFC 6052, those of 96 bits): such an address is judged
//! as its IPv4 address (D4).

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::Ipv6Net;
use thiserror::Error;

/// A prefix of 96 bits; the IPv4 address is what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nat64(Ipv6Net);

/// Most that a configuration may name, besides the well-known one (F7).
pub const MAX_NAT64: usize = enforcer_ebpf::MAX_NAT64 as usize;

/// Why a text is no such prefix.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("is not a NAT64 prefix; write an IPv6 prefix of 96 bits such as \"2001:db8:64::/96\"")]
pub struct Nat64Error;

impl Nat64 {
    /// `64:ff9b::/96`, by which every network may do it.
    pub const WELL_KNOWN: Self = Self(Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96));

    /// The IPv4 address in an address of this prefix.
    #[must_use]
    pub fn embedded(self, address: Ipv6Addr) -> Option<Ipv4Addr> {
        #[allow(clippy::cast_possible_truncation, reason = "the last 32 bits of 128")]
        let last = address.to_bits() as u32;
        (self.0.contains(&address) && last != 0).then(|| Ipv4Addr::from_bits(last))
    }

    /// The address by which a network reaches an IPv4 address.
    #[must_use]
    pub fn embed(self, address: Ipv4Addr) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.0.network().to_bits() | u128::from(address.to_bits()))
    }

    /// The prefix's bytes.
    #[must_use]
    pub fn bytes(self) -> [u8; 12] {
        let octets = self.0.network().octets();
        *octets.first_chunk().unwrap_or(&[0; 12])
    }

    /// The prefix of these bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 12]) -> Self {
        let mut octets = [0; 16];
        octets.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        Self(Ipv6Net::new_assert(Ipv6Addr::from(octets), 96))
    }
}

/// The IPv4 address that one of these prefixes makes of an address.
#[must_use]
pub fn translated(prefixes: &[Nat64], address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(address) => prefixes.iter().find_map(|prefix| prefix.embedded(address)),
    }
}

impl FromStr for Nat64 {
    type Err = Nat64Error;

    fn from_str(text: &str) -> Result<Self, Nat64Error> {
        let net: Ipv6Net = text.parse().map_err(|_| Nat64Error)?;
        // The mapped addresses are IPv4 in any case, and the compatible ones are nobody's.
        let first = net.network().to_bits() >> 32;
        let fits = net.prefix_len() == 96 && net.trunc() == net && first != 0 && first != 0xffff;
        fits.then_some(Self(net)).ok_or(Nat64Error)
    }
}

impl fmt::Display for Nat64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_found_in_its_prefix_and_no_other() {
        let own: Nat64 = "2001:db8:64::/96".parse().unwrap_or(Nat64::WELL_KNOWN);
        let both = [Nat64::WELL_KNOWN, own];
        for (address, inside) in [
            ("64:ff9b::10.0.0.5", Some("10.0.0.5")),
            ("2001:db8:64::a00:5", Some("10.0.0.5")),
            ("64:ff9b::7f00:1", Some("127.0.0.1")),
            ("64:ff9b::", None),
            ("64:ff9b:1::10.0.0.5", None),
            ("64:ff9b:0:0:0:1:a00:5", None),
            ("2001:db8:64:0:0:1:a00:5", None),
            ("10.0.0.5", None),
        ] {
            let found = address.parse().ok().and_then(|address| translated(&both, address));
            assert_eq!(found.map(|found| found.to_string()).as_deref(), inside, "{address}");
        }
        assert_eq!(own.embed(Ipv4Addr::new(10, 0, 0, 5)).to_string(), "2001:db8:64::a00:5");
        assert_eq!(Nat64::from_bytes(own.bytes()), own);
    }

    #[test]
    fn other_prefixes_are_refused() {
        for text in [
            "64:ff9b::/64",
            "::/96",
            "::ffff:0:0/96",
            "2001:db8::1/96",
            "10.0.0.0/8",
            "2001:db8::",
            "",
        ] {
            assert_eq!(text.parse::<Nat64>(), Err(Nat64Error), "{text}");
        }
    }
}
