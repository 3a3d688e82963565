//! What an image says, as desired or as read from the kernel. Pure.

use std::fmt;

use super::{
    expression::{self as is, Expression, NftVerdict},
    image::{Element, Header, Image, Rule, Value, chain, number_of_protocol, output},
    slot::{Side, Slot},
};
use crate::policy::{Nat64, Protocol};

/// A rule that looks an address up, as a table has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FoundLookup<'i> {
    /// `IPV4` or `IPV6`.
    pub(super) family: u8,
    /// The NAT64 prefix with which an address begins that is looked up by the IPv4 address in it.
    pub(super) prefix: Option<Nat64>,
    pub(super) addresses: &'i [Element],
    /// The chain of its class.
    pub(super) class: &'i str,
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = if self.audit { "audit" } else { "enforce" };
        let by = if self.daemon { "daemon" } else { "apply" };
        write!(f, "enforcer table 1 generation {} {mode} by {by}", self.generation)?;
        if let Some(group) = self.log {
            write!(f, " log {group}")?;
        }
        Ok(())
    }
}

impl Header {
    /// Reads the comment back; none if it is not ours.
    #[must_use]
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("enforcer table 1 generation ")?;
        let words: Vec<&str> = rest.split(' ').collect();
        let [generation, mode, "by", by, log @ ..] = words.as_slice() else {
            return None;
        };
        Some(Self {
            generation: generation.parse().ok()?,
            audit: *mode == "audit",
            daemon: *by == "daemon",
            log: match log {
                ["log", group] => Some(group.parse().ok()?),
                _ => None,
            },
        })
    }
}

impl Image {
    /// What the table tells of itself; none if it is not ours.
    #[must_use]
    pub(crate) fn header(&self) -> Option<Header> {
        Header::parse(&self.chains.get(chain::ABOUT)?.rules.first()?.comment)
    }

    /// The active slot.
    #[must_use]
    pub(crate) fn slot(&self) -> Slot {
        Slot::of(self.header().map_or(0, |header| header.generation))
    }

    /// Whether packets of this host's sockets come to the rules: the chains that lead there are as they are made.
    pub(crate) fn is_reached(&self) -> bool {
        let slot = self.slot();
        let services = slot.services(Side::Local);
        let udp = number_of_protocol(Protocol::Udp);
        let has_udp = self
            .elements(&services)
            .iter()
            .any(|service| service.key.first() == Some(&udp));
        let judge = self.chains.get(&slot.judge()).map_or(&[][..], |judge| &judge.rules);
        let is_looked_up = judge.iter().any(|rule| rule.expressions == is::service_in(&services));
        let passes_by = |rule: &Rule| matches!(rule.expressions.as_slice(), [Expression::Verdict(_)]);
        self.chains.get(chain::OUTPUT) == Some(&output(slot, has_udp))
            && (is_looked_up || !self.sets.contains_key(&services))
            && !judge.iter().any(passes_by)
    }

    /// The elements of a set; none where there is no such set.
    pub(super) fn elements(&self, set: &str) -> &[Element] {
        self.sets.get(set).map_or(&[], |set| &set.elements)
    }

    /// Where packets of this host's sockets for a service are looked up, in order, up to what is none of ours.
    pub(super) fn lookups(&self, service: &Element) -> impl Iterator<Item = FoundLookup<'_>> {
        let chain = match &service.value {
            Value::Jump(chain) => self.chains.get(chain),
            Value::None | Value::Goto(_) => None,
        };
        let rules = chain.map_or(&[][..], |chain| &chain.rules);
        rules.iter().map_while(|rule| {
            let (family, prefix, set, class) = is::lookup_of(&rule.expressions)?;
            Some(FoundLookup {
                family,
                prefix: prefix.map(Nat64::from_bytes),
                addresses: self.elements(set),
                class,
            })
        })
    }

    /// Leaves out chains and sets of the slot that is not active.
    pub(crate) fn forget_the_other_slot(&mut self) {
        let other = format!("_{}", self.slot().other());
        self.chains.retain(|name, _| !name.ends_with(&other));
        self.sets.retain(|name, _| !name.ends_with(&other));
    }

    /// Names of the targets, sorted.
    #[must_use]
    pub(crate) fn targets(&self) -> Vec<&str> {
        let names = self.chains.keys();
        names.filter_map(|name| self.slot().target_of(name)).collect()
    }

    /// Targets that own the class with this chain.
    #[must_use]
    pub(crate) fn owners_of(&self, class: &str) -> Vec<&str> {
        let rules = self.chains.get(class);
        let rules = rules.map_or(&[][..], |chain| &chain.rules);
        rules
            .iter()
            .filter_map(|rule| match rule.expressions.as_slice() {
                [Expression::Verdict(NftVerdict::Jump(chain))] => self.slot().target_of(chain),
                _ => None,
            })
            .collect()
    }
}
