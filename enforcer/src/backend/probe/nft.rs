//! What `nf_tables` can do here: each form of ours in a table of its own, in a transaction that takes it back before it
//! counts.

use super::{Fact, Facts, Feature};
use crate::backend::nftables::{
    expression::{self as is, Expression, IPV4, NftVerdict, TCP},
    image::{Base, Chain, Element, Image, Rule, Set, SetKind, Value},
    netlink::{Netlink, TransactionError},
};

pub(super) fn probe(facts: &mut Facts) {
    let mut netlink = match Netlink::open() {
        Ok(netlink) => netlink,
        Err(error) => {
            facts.set(Feature::NfTables, Fact::from_errno(Err(error)));
            return;
        }
    };
    let table = format!("enforcer_probe_{}", std::process::id());
    for (feature, image) in trials() {
        // Nothing that the kernel lacks is looked for twice.
        let fact = match netlink.attempt(&table, &image) {
            Ok(()) => Fact::Supported,
            Err(TransactionError { step, error }) => match Fact::from_errno(Err(error)) {
                Fact::Supported => Fact::Supported,
                Fact::Missing { why } => Fact::Missing {
                    why: format!("{step}: {why}"),
                },
                Fact::Inconclusive(why) => Fact::Inconclusive(format!("{step}: {why}")),
            },
        };
        facts.set(feature, fact);
    }
}

/// One table for each feature, with no more in it than that takes.
fn trials() -> Vec<(Feature, Image)> {
    let transport = || is::transport(TCP);
    let accept = || vec![Expression::Verdict(NftVerdict::Accept)];
    let count = "probe".to_owned();
    vec![
        (
            Feature::NfTables,
            table(
                &[],
                vec![transport(), [is::opens_connection(), accept()].concat()],
                &[OUTPUT],
            ),
        ),
        (Feature::NftMaps, map(false)),
        (Feature::NftRanges, map(true)),
        (Feature::NftSocketUser, table(&[], vec![is::has_user()], &[])),
        (
            Feature::NftReject,
            table(
                &[],
                vec![
                    [transport(), vec![Expression::Reject { reset: true }]].concat(),
                    vec![Expression::Reject { reset: false }],
                ],
                &[],
            ),
        ),
        (
            Feature::NftCounter,
            table(&["probe"], vec![vec![Expression::Count(count)]], &[]),
        ),
        (
            Feature::NftLimit,
            table(&[], vec![vec![Expression::Limit { rate: 1, burst: 1 }]], &[]),
        ),
        (Feature::NftForward, table(&[], Vec::new(), &[0, 2])),
        (
            Feature::NftLog,
            table(
                &[],
                vec![vec![Expression::Log {
                    group: u16::MAX,
                    prefix: "probe".to_owned(),
                }]],
                &[],
            ),
        ),
        (Feature::NftSocketCgroup, table(&[], vec![is::user_below(0, 1, 1)], &[])),
    ]
}

/// `NF_INET_LOCAL_OUT`.
const OUTPUT: u32 = 3;
const CHAIN: &str = "probe";

/// A table with rules in a chain, and empty chains at hooks.
fn table(counters: &[&str], rules: Vec<Vec<Expression>>, hooks: &[u32]) -> Image {
    let rules = rules.into_iter().map(|expressions| Rule {
        comment: String::new(),
        expressions,
    });
    let mut image = Image::default();
    image.counters.extend(counters.iter().map(ToString::to_string));
    let chain = Chain {
        base: None,
        rules: rules.collect(),
    };
    image.chains.insert(CHAIN.to_owned(), chain);
    for hook in hooks {
        let base = Base {
            hook: *hook,
            priority: 300,
            accepts: true,
        };
        let chain = Chain {
            base: Some(base),
            rules: Vec::new(),
        };
        image.chains.insert(format!("hook_{hook}"), chain);
    }
    image
}

/// A map of services or a set of ranges of addresses, and a rule that looks a destination up in it.
fn map(ranges: bool) -> Image {
    const SET: &str = "endpoints";
    const CLASS: &str = "class";
    let (kind, rule, element) = if ranges {
        let kind = SetKind::Addresses { family: IPV4, ranges };
        let range = ([192, 0, 2, 1], [192, 0, 2, 9]);
        let element = (range.0.to_vec(), range.1.to_vec(), Value::None);
        (kind, is::address_in(IPV4, SET), element)
    } else {
        // Protocol and port, each filled up to four bytes.
        let element = (
            vec![TCP, 0, 0, 0, 0, 1, 0, 0],
            Vec::new(),
            Value::Jump(CLASS.to_owned()),
        );
        (SetKind::Services, is::service_in(SET), element)
    };
    let mut image = table(&[], vec![rule], &[]);
    image.chains.insert(CLASS.to_owned(), Chain::default());
    let (key, last, value) = element;
    let elements = vec![Element { key, last, value }];
    image.sets.insert(SET.to_owned(), Set { kind, elements });
    image
}
