//! The two slots of a table, and the names of what lies in them: each generation is built in the one that the
//! generation before it does not use. Pure.

use std::fmt;

use super::{
    endpoints::{AddressSet, Service},
    expression::IPV4,
    image::UNREADABLE,
};
use crate::{backend::HIGHEST_GENERATION, policy::Protocol};

/// The number of a generation that is built beside the active one, in the slot that this does not use: greater than its
/// number, and than `above`.
pub(super) fn next_generation(active: Option<u64>, above: u64) -> u64 {
    let next = active.unwrap_or(0).max(above).min(HIGHEST_GENERATION) + 1;
    match active {
        Some(active) if Slot::of(active) == Slot::of(next) => next + 1,
        Some(_) | None => next,
    }
}

/// Which of two places a generation is built in: each after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(char);

impl Slot {
    /// The slot of a generation.
    #[must_use]
    pub(crate) fn of(generation: u64) -> Self {
        Self(if generation.is_multiple_of(2) { 'a' } else { 'b' })
    }

    /// The slot of the generations before and after.
    pub(super) fn other(self) -> Self {
        Self(if self.0 == 'a' { 'b' } else { 'a' })
    }

    /// Looks a destination up.
    #[must_use]
    pub(crate) fn judge(self) -> String {
        format!("judge_{self}")
    }

    /// The chain of a class.
    #[must_use]
    pub(crate) fn class(self, number: u32) -> String {
        format!("class_{number}_{self}")
    }

    /// The chain that admits a user or goes to the refusal.
    #[must_use]
    pub(crate) fn target(self, target: &str) -> String {
        format!("target_{target}_{self}")
    }

    /// The target of such a chain.
    #[must_use]
    pub(crate) fn target_of(self, chain: &str) -> Option<&str> {
        chain.strip_prefix("target_")?.strip_suffix(self.0)?.strip_suffix('_')
    }

    /// The chain that refuses, or in audit mode only tells.
    #[must_use]
    pub(crate) fn refusal(self, target: &str) -> String {
        format!("refuse_{target}_{self}")
    }

    /// The set of a target's users.
    #[must_use]
    pub(crate) fn users(self, target: &str) -> String {
        format!("users_{target}_{self}")
    }

    /// The set of a target's cgroups of one depth that admit anybody.
    #[must_use]
    pub(crate) fn cgroups(self, target: &str, level: u32) -> String {
        format!("cgroups_{target}_{level}_{self}")
    }

    /// Looks a destination up, for packets that have no socket here.
    #[must_use]
    pub(crate) fn judge_forwarded(self) -> String {
        format!("judge_forwarded_{self}")
    }

    /// The map of the ports of names (N8).
    #[must_use]
    pub(crate) fn ports(self) -> String {
        format!("ports_{self}")
    }

    /// Tells of a dial of a port, at an address that is no endpoint.
    #[must_use]
    pub(crate) fn dials(self, port: u16) -> String {
        format!("dials_{port}_{self}")
    }

    /// What came in from elsewhere.
    #[must_use]
    pub(crate) fn arrived(self) -> String {
        format!("arrived_{self}")
    }

    /// Picks what of that is for a loopback address.
    #[must_use]
    pub(crate) fn strays(self) -> String {
        format!("strays_{self}")
    }

    /// Finds out whether a packet of a family goes to an endpoint's address.
    #[must_use]
    pub(crate) fn addresses(self, family: u8) -> String {
        format!("addresses{}_{self}", version(family))
    }

    /// Finds out whether a packet of a family, to an endpoint's address, hides what its verdict would rest on.
    #[must_use]
    pub(crate) fn unreadable_of(self, family: u8) -> String {
        format!("{UNREADABLE}{}_{self}", version(family))
    }

    /// Refuses what cannot be read.
    #[must_use]
    pub(crate) fn unreadable(self) -> String {
        format!("{UNREADABLE}_{self}")
    }

    /// The map of services to their chains.
    #[must_use]
    pub(crate) fn services(self, side: Side) -> String {
        format!("{side}services_{self}")
    }

    /// Looks the address up, of a packet for a service.
    #[must_use]
    pub(crate) fn service(self, side: Side, service: Service) -> String {
        format!("{side}service_{}_{self}", named(service))
    }

    /// A set of addresses of a class with a number.
    #[must_use]
    pub(crate) fn set(self, set: &AddressSet, class: u32) -> String {
        let what = if set.ranges { "ranges" } else { "hosts" };
        format!("{what}{}_{}_{class}_{self}", version(set.family), named(set.service))
    }
}

/// Which packets a chain is for. The kernel does not let a forwarded packet come near a rule that asks for a socket's
/// cgroup, so that its chains lead to refusals, and not to classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Those of sockets of this network namespace.
    Local,
    /// Those of others.
    Forwarded,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "",
            Self::Forwarded => "forwarded_",
        })
    }
}

fn named(service: Service) -> String {
    let protocol = match service.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!("{protocol}_{}", service.port)
}

fn version(family: u8) -> u8 {
    if family == IPV4 { 4 } else { 6 }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_generation_is_built_beside_the_active_one() {
        for active in [0, 1, 2, 7, HIGHEST_GENERATION - 1] {
            for above in [0, 1, 6, 7, 8, 1000, HIGHEST_GENERATION - 1] {
                let next = next_generation(Some(active), above);
                assert!(next > active && next > above && next <= active.max(above) + 2);
                assert_ne!(Slot::of(next), Slot::of(active), "{active} {above}");
            }
        }
        assert_eq!([next_generation(None, 0), next_generation(None, 7)], [1, 8]);
        // What another process has written ends nothing.
        assert!(next_generation(Some(u64::MAX), u64::MAX) > 1);
    }
}
