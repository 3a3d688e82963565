//! What an operator should read once about a name.

use std::{collections::BTreeSet, fmt, net::IpAddr};

use super::MAX_ADDRESSES;
use crate::{policy::Name, wire::NameProtection};

/// Something an operator should read once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Note {
    /// The name went stale, or its cause changed.
    Stale(Name, String, NameProtection),
    /// The name is answered again.
    Fresh(Name),
    /// Addresses that no DNS answer may hold (N6).
    Refused(Name, BTreeSet<IpAddr>),
    /// So many more than [`MAX_ADDRESSES`] in the last answers, which are not protected.
    TooMany(Name, usize),
    /// The addresses changed.
    Changed(Name, BTreeSet<IpAddr>),
}

impl Note {
    /// Whether something is wrong.
    #[must_use]
    pub(crate) fn is_fault(&self) -> bool {
        match self {
            Self::Stale(..) | Self::Refused(..) | Self::TooMany(..) => true,
            Self::Fresh(_) | Self::Changed(..) => false,
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list =
            |addresses: &BTreeSet<IpAddr>| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Self::Stale(name, cause, protects) => f.write_str(&protects.fault(name.as_str(), cause)),
            Self::Fresh(name) => write!(f, "name {name} resolves again"),
            Self::Refused(name, addresses) => {
                write!(
                    f,
                    "name {name}: rejected {} (a DNS answer may not name loopback, multicast or unspecified addresses, \
                     and link-local ones only for a target with answers = \"link-local\")",
                    list(addresses)
                )
            }
            Self::TooMany(name, over) => write!(
                f,
                "name {name}: {over} addresses beyond {MAX_ADDRESSES} are not protected; the longest-known addresses \
                 are protected"
            ),
            Self::Changed(name, addresses) => write!(f, "name {name} now resolves to {}", list(addresses)),
        }
    }
}
