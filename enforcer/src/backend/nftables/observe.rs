//! What a table as read is for `status`: targets, endpoints, counters.

use std::collections::BTreeMap;

use enforcer_ebpf::Counters;

use super::{
    Observed, ObservedTarget, SocketUsers, check,
    image::{self, Header},
    netlink::Dump,
    slot::Side,
};
use crate::wire::ConditionId;

/// What is active by a table.
pub(super) fn observe(dump: &Dump) -> Observed {
    let image = &dump.image;
    let header = image.header().unwrap_or(Header {
        generation: 0,
        audit: false,
        daemon: false,
        log: None,
    });
    let mut per_class: BTreeMap<&str, u64> = BTreeMap::new();
    let services = image.elements(&image.slot().services(Side::Local));
    let lookups = services.iter().flat_map(|service| image.lookups(service));
    // Sets of IPv4 addresses are looked up once more for each NAT64.
    for lookup in lookups.filter(|lookup| lookup.prefix.is_none()) {
        *per_class.entry(lookup.class).or_default() += lookup.addresses.len() as u64;
    }
    let count = |name: &String| dump.counts.get(name).copied().unwrap_or_default();
    let targets = image.targets().into_iter().map(|target| {
        let [allowed, denied, would_deny] = image::counters_of(target);
        let owned = per_class
            .iter()
            .filter(|(class, _)| image.owners_of(class).contains(&target));
        ObservedTarget {
            name: target.to_owned(),
            endpoints: owned.map(|(_, count)| count).sum(),
            allow: check::principals(image, target)
                .iter()
                .map(check::Admitted::shown)
                .collect(),
            counters: Counters {
                allowed: count(&allowed),
                denied: count(&denied),
                would_deny: count(&would_deny),
            },
        }
    });
    Observed {
        // No packet meets a dormant table.
        generation: if dump.dormant { 0 } else { header.generation },
        audit: header.audit,
        by_daemon: header.daemon,
        socket_users: SocketUsers::All,
        netns: true,
        endpoints: per_class.values().sum(),
        targets: targets.collect(),
        lost: 0,
        faults: if dump.dormant {
            vec![ConditionId::Table.because("the nftables table is dormant: none of its rules are active")]
        } else if header.generation != 0 && !image.is_reached() {
            vec![ConditionId::Table.because(
                "another process changed the chains of the nftables table that lead to its rules: connections may pass \
                 without being evaluated; a running daemon restores them, or run enforcer apply",
            )]
        } else {
            Vec::new()
        },
    }
}
