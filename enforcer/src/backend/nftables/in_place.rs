//! Small changes of a table that are made in the active slot, by one transaction: which these are, and what they take.
//! Pure.
//!
//! A transaction is whole for the kernel, but not for a packet: that reads which generation is active at each of its
//! lookups, and a lookup under way may miss an element that is being replaced. So only this is changed (F2):
//!
//! - Single addresses come into sets, or go from them, and none from one to another. A packet to a service and an
//!   address then meets one lookup that decides between two generations; all else that it meets is the same in both.
//! - An IPv6 address of a NAT64 prefix, which is looked up in sets of both families, is not among these.
//! - Only the number of the generation, which comment and log name, is written anew: the kernel replaces the rules of a
//!   chain at once.
//!
//! All else goes the way of two slots.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use super::{
    image::{Element, Header, Image, Set, SetKind, chain},
    slot::Slot,
};
use crate::{
    backend::HIGHEST_GENERATION,
    policy::{Nat64, translated},
};

/// More is no small change.
const MAX_CHANGES: usize = 1024;

/// What of an image is to be written where another one is active.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Amendment {
    /// Addresses that go from a set, and that come, by its name.
    pub(super) elements: BTreeMap<String, [Vec<Element>; 2]>,
    /// Chains whose rules are written anew.
    pub(super) renewed: BTreeSet<String>,
}

/// The number of a generation that takes the slot of the active one over: greater than that, and than `above`. None
/// where there is no greater one.
pub(super) fn next_in_place(active: u64, above: u64) -> Option<u64> {
    let next = active.max(above).checked_add(1)?;
    let next = if Slot::of(next) == Slot::of(active) {
        next
    } else {
        next.checked_add(1)?
    };
    (next <= HIGHEST_GENERATION).then_some(next)
}

/// What leads from an image to another of the same slot; none where that may not be done in place.
pub(super) fn amendment(old: &Image, new: &Image, nat64: &[Nat64]) -> Option<Amendment> {
    let unnumbered = |image: &Image| {
        let generation = 0;
        image.header().map(|header| Header { generation, ..header })
    };
    let is_like = unnumbered(old) == unnumbered(new)
        && old.slot() == new.slot()
        && old.counters == new.counters
        && old.chains.keys().eq(new.chains.keys())
        && old.sets.keys().eq(new.sets.keys());
    let slot = is_like.then(|| new.slot())?;
    let targets = new.targets().into_iter().map(|target| slot.refusal(target));
    let numbered: BTreeSet<String> = targets.chain([chain::ABOUT.to_owned()]).collect();
    let mut amendment = Amendment::default();
    for ((name, found), wanted) in old.chains.iter().zip(new.chains.values()) {
        if found != wanted {
            amendment.renewed.insert(numbered.get(name)?.clone());
        }
    }
    for ((name, found), wanted) in old.sets.iter().zip(new.sets.values()) {
        if found != wanted {
            amendment.elements.insert(name.clone(), changes(found, wanted)?);
        }
    }
    let keys = |of: fn(&[Vec<Element>; 2]) -> &Vec<Element>| -> BTreeSet<&[u8]> {
        let all = amendment.elements.values().flat_map(of);
        all.map(|element| element.key.as_slice()).collect()
    };
    let (gone, come) = (keys(|[gone, _]| gone), keys(|[_, come]| come));
    let may_be = gone.is_disjoint(&come) && !gone.union(&come).any(|address| is_translated(address, nat64));
    may_be.then_some(amendment)
}

/// Whether an address is looked up by the IPv4 address in it, too (D4).
fn is_translated(address: &[u8], nat64: &[Nat64]) -> bool {
    let octets = <[u8; 16]>::try_from(address);
    octets.is_ok_and(|octets| translated(nat64, IpAddr::V6(Ipv6Addr::from_octets(octets))).is_some())
}

/// Addresses that go, and that come; none where these are too many, or other than single ones.
fn changes(old: &Set, new: &Set) -> Option<[Vec<Element>; 2]> {
    let is_single = matches!(new.kind, SetKind::Addresses { ranges: false, .. });
    let [mut gone, mut come] = [Vec::new(), Vec::new()];
    let (mut before, mut after) = (old.elements.iter().peekable(), new.elements.iter().peekable());
    while is_single && old.kind == new.kind && gone.len() + come.len() <= MAX_CHANGES {
        match (before.peek(), after.peek()) {
            (None, None) => return Some([gone, come]),
            (Some(one), Some(other)) if one == other => {
                before.next();
                after.next();
            }
            (Some(one), other) if other.is_none_or(|other| one < other) => gone.extend(before.next().cloned()),
            (..) => come.extend(after.next().cloned()),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use proptest::prelude::*;

    use super::*;
    use crate::{
        backend::nftables::{
            image::lower,
            tests::{LOADER, rules},
        },
        policy::{Mode, Protocol},
        ruleset::{Place, RuleSet, RuleTarget},
    };

    fn place(net: &str, port: u16) -> (Place, u64) {
        let net = net.parse().expect("a prefix");
        let protocol = Protocol::Tcp;
        (Place { protocol, port, net }, 1)
    }

    fn of(mut places: Vec<(Place, u64)>) -> RuleSet {
        let target = |name: &str| RuleTarget {
            name: name.to_owned(),
            principals: Vec::new(),
        };
        places.sort_unstable();
        RuleSet {
            mode: Mode::Enforce,
            targets: vec![target("t"), target("u")],
            places,
            nat64: vec![Nat64::WELL_KNOWN],
            named_ports: BTreeSet::new(),
        }
    }

    /// The image after a change in place, if the rules may be made so.
    fn amended(old: &RuleSet, new: &RuleSet) -> Option<Image> {
        let (mut image, new) = (lower(old, 7, LOADER), lower(new, 9, LOADER));
        let Amendment { elements, renewed } = amendment(&image, &new, &old.nat64)?;
        for name in renewed {
            let chain = new.chains.get(&name).expect("a chain that stays").clone();
            image.chains.insert(name, chain);
        }
        for (name, [gone, come]) in elements {
            let set = &mut image.sets.get_mut(&name).expect("a set that stays").elements;
            set.retain(|element| !gone.contains(element));
            set.extend(come);
            set.sort_unstable();
        }
        Some(image)
    }

    #[test]
    fn addresses_come_and_go_in_place_and_all_else_does_not() {
        let before = vec![
            place("10.0.0.1/32", 1),
            place("10.0.0.2/32", 1),
            place("10.0.0.3/32", 1),
            place("10.0.0.3/32", 2),
            place("10.1.0.0/16", 1),
            place("2001:db8::1/128", 1),
        ];
        let with = |gone: &[(Place, u64)], come: &[(Place, u64)]| {
            let stays = before.iter().filter(|place| !gone.contains(place));
            of(stays.chain(come).copied().collect())
        };
        let old = of(before.clone());
        for (gone, come, in_place) in [
            (vec![place("10.0.0.1/32", 1)], vec![place("10.9.0.1/32", 1)], true),
            (vec![place("10.0.0.1/32", 1)], vec![], true),
            (vec![], vec![place("2001:db8::2/128", 1)], true),
            (vec![], vec![place("10.9.0.1/32", 1), place("10.9.0.1/32", 2)], true),
            (vec![], vec![place("10.0.0.1/32", 2)], true),
            (vec![], vec![place("10.1.0.1/32", 1)], true),
            // A service that no address has had, or none will have.
            (vec![], vec![place("10.9.0.1/32", 3)], false),
            (vec![place("10.0.0.3/32", 2)], vec![], false),
            (vec![place("2001:db8::1/128", 1)], vec![], false),
            // From one set to another.
            (vec![place("10.0.0.1/32", 1)], vec![place("10.0.0.1/32", 2)], false),
            // Looked up twice.
            (vec![], vec![place("64:ff9b::a09:1/128", 1)], false),
            // Where packets enter would change.
            (vec![], vec![place("127.0.0.1/32", 1)], false),
            (vec![place("10.1.0.0/16", 1)], vec![], false),
            (vec![], vec![place("10.2.0.0/16", 1)], false),
        ] {
            let new = with(&gone, &come);
            let found = amended(&old, &new);
            assert_eq!(found.is_some(), in_place, "{gone:?} {come:?}");
            assert!(found.is_none_or(|image| image == lower(&new, 9, LOADER)));
        }
        let mut other = with(&[], &[place("10.9.0.1/32", 1)]);
        other.mode = Mode::Audit;
        assert_eq!(amended(&old, &other), None);
        let mut other = old.clone();
        other.places.iter_mut().for_each(|(_, owners)| *owners = 2);
        assert_eq!(amended(&old, &other), None);
    }

    #[test]
    fn the_next_generation_in_place_has_the_slot_of_the_active_one() {
        for (active, above, next) in [(1, 0, 3), (1, 1, 3), (1, 2, 3), (1, 3, 5), (4, 0, 6), (4, 9, 10)] {
            assert_eq!(next_in_place(active, above), Some(next));
        }
        assert_eq!(next_in_place(HIGHEST_GENERATION, 0), None);
        assert_eq!(next_in_place(1, u64::MAX), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever may be done in place leads to the same table as if it were laid out anew.
        #[test]
        fn a_change_in_place_makes_the_same_table(
            old in rules(),
            gone in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
            like in prop::collection::vec((any::<prop::sample::Index>(), 0..4_u8), 0..3),
        ) {
            let mut new = old.clone();
            let nets: BTreeSet<_> = old.places.iter().map(|(place, _)| place.net).collect();
            let nets: Vec<_> = nets.into_iter().collect();
            prop_assume!(!nets.is_empty());
            for (index, low) in like {
                let net = *index.get(&nets);
                let another = ipnet::IpNet::from(IpAddr::from([10, 0, 1, low]));
                let copies: Vec<_> = old.places.iter().filter(|(place, _)| place.net == net).copied().collect();
                new.places.retain(|(place, _)| place.net != another);
                new.places.extend(copies.into_iter().map(|(place, owners)| (Place { net: another, ..place }, owners)));
            }
            for index in gone {
                let net = *index.get(&nets);
                new.places.retain(|(place, _)| place.net != net);
            }
            new.places.sort_unstable();
            if let Some(image) = amended(&old, &new) {
                prop_assert_eq!(image, lower(&new, 9, LOADER));
            }
        }
    }
}
