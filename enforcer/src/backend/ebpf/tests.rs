//! The kernel's decision over lowered rule sets, against the oracle.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use enforcer_ebpf::{
    BUCKETS, Bucket, EndpointKey, Generation, KEY_BITS, Owners, PrefixKey, PrincipalKey, Spot, TargetName, Verdict,
    decide::{self, Destination as Dialled, Tables},
    is_v4, scope,
};
use ipnet::IpNet;
use proptest::prelude::*;

use super::{
    image::{Image, KernelVisibility, Loader, canonical_words, lower},
    observe::SimulatedSubject,
};
use crate::{
    policy::{CgroupPath, Destination, Dns, Endpoint, Mode, Policy, Principal, Protocol, Target, Uid, Unresolved},
    ruleset::{Attempt, Cgroup, Host, RuleSet, Subject, compile, explain},
};

/// The maps of one slot as plain tables.
struct Plain<'a>(&'a Image);

impl Tables for Plain<'_> {
    fn port(&self, port: u16) -> impl Fn() -> u8 {
        move || self.0.ports.get(&port).copied().unwrap_or(0)
    }

    fn active(&self) -> Option<u8> {
        Some(0)
    }

    fn generation(&self, _: u8) -> Option<impl Borrow<Generation>> {
        Some(self.0.generation(1))
    }

    fn bucket(&self, _: u8, bucket: u32) -> Option<impl Borrow<Bucket>> {
        let at = self.0.buckets.binary_search_by_key(&bucket, |(index, _)| *index);
        let found = at.ok().and_then(|at| self.0.buckets.get(at));
        Some(found.map_or_else(Bucket::default, |(_, bucket)| *bucket))
    }

    fn nat64(&self, _: u8, number: u32) -> [u32; 3] {
        self.0.nat64.get(number as usize).copied().unwrap_or_default()
    }

    fn exact(&self, key: &EndpointKey) -> Option<Owners> {
        self.0
            .endpoints
            .iter()
            .find(|(entry, _)| entry == key)
            .map(|(_, owners)| *owners)
    }

    /// As the kernel's trie: the longest entry whose first bits are the key's.
    fn prefix(&self, key: &EndpointKey) -> Option<Owners> {
        let matches = |entry: &PrefixKey| {
            let bits = |key: &EndpointKey| {
                key.address
                    .iter()
                    .fold(0_u128, |bits, word| bits << 32 | u128::from(u32::from_be(*word)))
            };
            let shift = 128 + KEY_BITS - entry.bits;
            let head = |key: &EndpointKey| (key.scope, key.protocol, key.port);
            head(&entry.key) == head(key) && bits(&entry.key).checked_shr(shift) == bits(key).checked_shr(shift)
        };
        let longest = self
            .0
            .prefixes
            .iter()
            .filter(|(entry, _)| matches(entry))
            .max_by_key(|(entry, _)| entry.bits);
        longest.map(|(_, owners)| *owners)
    }

    fn principal(&self, key: &PrincipalKey) -> Option<Owners> {
        self.0
            .principals
            .iter()
            .find(|(entry, _)| entry == key)
            .map(|(_, owners)| *owners)
    }
}

const NETNS: u64 = 7;
const LOADER: Loader = Loader {
    netns: NETNS,
    daemon: true,
    sees: KernelVisibility {
        tcp_owner: true,
        other_owner: true,
        threads: true,
    },
};

fn verdict(image: &Image, attempt: &Attempt) -> (Verdict, BTreeMap<String, bool>) {
    let dialled = Dialled {
        protocol: match attempt.protocol {
            Protocol::Tcp => enforcer_ebpf::TCP,
            Protocol::Udp => enforcer_ebpf::UDP,
        },
        port: attempt.port.to_be(),
        address: canonical_words(attempt.address),
    };
    let decision = decide::decide(
        &Plain(image),
        &SimulatedSubject::new(attempt, &image.generation(1)),
        &dialled,
    );
    let owners = (0..)
        .zip(&image.names)
        .filter(|(bit, _)| decision.owners >> bit & 1 == 1)
        .map(|(bit, name)| (name.as_str().to_owned(), decision.refused >> bit & 1 == 0));
    (decision.verdict(), owners.collect())
}

fn address() -> impl Strategy<Value = IpAddr> {
    // Few, so that endpoints and attempts meet; with every special form.
    let pool = [
        "10.0.0.1",
        "10.0.0.2",
        "10.0.1.1",
        "10.1.0.1",
        "127.0.0.1",
        "127.0.0.2",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "2001:db8::1",
        "2001:db8::2",
        "2001:db8:1::1",
        "fe80::1",
        "192.168.0.1",
        "126.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::127.0.0.1",
        "64:ff9b::",
        "2001:db8:64::10.0.0.2",
        "2001:db8:64::10.1.0.1",
    ];
    proptest::sample::select(
        pool.iter()
            .filter_map(|text| text.parse().ok())
            .collect::<Vec<IpAddr>>(),
    )
}

fn dialled() -> impl Strategy<Value = IpAddr> {
    let unspecified = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        IpAddr::V6(Ipv4Addr::UNSPECIFIED.to_ipv6_mapped()),
    ];
    prop_oneof![4 => address(), 1 => proptest::sample::select(unspecified.to_vec())]
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![3 => Just(Protocol::Tcp), 1 => Just(Protocol::Udp)]
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    let place = prop_oneof![
        4 => address().prop_map(|address| Destination::Address(address.to_canonical())),
        3 => (address(), 0_u8..=128).prop_filter_map("a prefix", |(address, length)| {
            let address = address.to_canonical();
            let most = if address.is_ipv4() { 31 } else { 127 };
            Some(Destination::Prefix(IpNet::new(address, length.min(most)).ok()?.trunc()))
        }),
        1 => Just(Destination::Local),
    ];
    (protocol(), place, 1_u16..4).prop_filter_map("a port", |(protocol, destination, port)| {
        Some(Endpoint {
            protocol,
            destination,
            port: port.try_into().ok()?,
        })
    })
}

fn principal() -> impl Strategy<Value = Principal> {
    let cgroup = |path: &str| Some(CgroupPath(path.to_owned()));
    // More users than a generation has at hand.
    prop_oneof![
        3 => (0_u32..8).prop_map(|uid| Principal::User { uid: Uid(uid), cgroup: None }),
        2 => (0_u32..8, proptest::sample::select(vec!["/a", "/a/b", "/c", "/gone"]))
            .prop_map(move |(uid, path)| Principal::User { uid: Uid(uid), cgroup: cgroup(path) }),
        1 => proptest::sample::select(vec!["/a", "/a/b", "/c", "/gone", "/"])
            .prop_map(|path| Principal::Anybody { cgroup: CgroupPath(path.to_owned()) }),
        1 => Just(Principal::Kernel),
    ]
}

fn policy() -> impl Strategy<Value = Policy> {
    let target = (
        proptest::collection::btree_set(endpoint(), 0..6),
        proptest::collection::btree_set(principal(), 0..6),
    );
    let made = (any::<bool>(), any::<bool>(), proptest::collection::vec(target, 1..5));
    made.prop_map(|(audit, translates, targets)| Policy {
        nat64: translates
            .then_some("2001:db8:64::/96")
            .into_iter()
            .filter_map(|text| text.parse().ok())
            .collect(),
        mode: if audit { Mode::Audit } else { Mode::Enforce },
        dns: Dns {
            min_refresh: Duration::from_secs(5),
            max_refresh: Duration::from_mins(1),
            retain: Duration::from_hours(1),
            unresolved: Unresolved::Open,
        },
        targets: (0..)
            .zip(targets)
            .map(|(number, (endpoints, principals))| Target {
                name: format!("t{number}"),
                endpoints,
                principals,
                grants: false,
                answers: crate::policy::AcceptedAnswers::Routable,
            })
            .collect(),
    })
}

fn attempt() -> impl Strategy<Value = Attempt> {
    // The root's id, then those of the cgroups above and below `/a`.
    let cgroups = proptest::sample::select(vec![
        vec![1],
        vec![1, 10],
        vec![1, 10, 11],
        vec![1, 12],
        vec![1, 10, 11, 99],
    ]);
    let subject = (
        0_u32..9,
        proptest::option::of(0_u32..9),
        proptest::bool::weighted(0.1),
        cgroups,
    )
        .prop_map(|(task, socket, kernel_thread, cgroups)| Subject {
            task: Uid(task),
            socket: socket.map(Uid),
            kernel_thread,
            cgroups,
        });
    (protocol(), dialled(), 1_u16..5, any::<bool>(), subject).prop_map(
        |(protocol, address, port, foreign_netns, subject)| Attempt {
            protocol,
            address,
            port,
            foreign_netns,
            subject,
        },
    )
}

fn host() -> Host {
    let cgroups = HashMap::from([("/a", (10, 1)), ("/a/b", (11, 2)), ("/c", (12, 1)), ("/", (1, 0))]);
    Host {
        writable: BTreeMap::new(),
        local: ["192.168.0.1/32", "192.168.7.0/24", "fe80::1/128", "127.0.0.0/8"]
            .iter()
            .filter_map(|text| text.parse().ok())
            .collect(),
        cgroups: cgroups
            .into_iter()
            .map(|(path, (id, level))| (CgroupPath(path.to_owned()), Cgroup { id, level }))
            .collect(),
    }
}

fn names(rules: &RuleSet) -> BTreeSet<String> {
    rules.targets.iter().map(|target| target.name.clone()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// D1–D7: the kernel's short cuts give the oracle's verdict, target by target.
    #[test]
    fn decision_is_as_explained(
        policy in policy(),
        before in policy(),
        attempts in proptest::collection::vec(attempt(), 1..20),
    ) {
        let (Ok(rules), Ok(before)) = (
            compile(&policy, &BTreeMap::new(), &host()),
            compile(&before, &BTreeMap::new(), &host()),
        ) else { return Err(TestCaseError::fail("the policy is within all limits")) };
        let previous = lower(&before, &Image::empty().names, LOADER);
        let image = lower(&rules, &previous.names, LOADER);
        for attempt in attempts {
            let explained = explain(&rules, &attempt);
            let owners: BTreeMap<String, bool> = explained
                .owners
                .iter()
                .filter_map(|(index, admits)| Some((rules.targets.get(*index)?.name.clone(), *admits)))
                .collect();
            prop_assert_eq!(verdict(&image, &attempt), (explained.verdict, owners), "{:?}", attempt);
        }
    }

    /// D3: what the programs cannot see decides nothing, and a kernel thread is root. Each fact is lost alone.
    #[test]
    fn what_the_kernel_withholds_costs_only_itself(
        policy in policy(),
        attempts in proptest::collection::vec(attempt(), 1..20),
        (tcp_owner, other_owner, threads) in proptest::prelude::any::<(bool, bool, bool)>(),
    ) {
        let Ok(rules) = compile(&policy, &BTreeMap::new(), &host()) else {
            return Err(TestCaseError::fail("the policy is within all limits"))
        };
        // No kernel shows these and hides TCP's.
        let other_owner = other_owner && tcp_owner;
        let sees = KernelVisibility { tcp_owner, other_owner, threads };
        let blind = Loader { sees, ..LOADER };
        let image = lower(&rules, &Image::empty().names, blind);
        for attempt in attempts {
            let mut seen = attempt.clone();
            let owner = if attempt.protocol == Protocol::Tcp { tcp_owner } else { other_owner };
            seen.subject.socket = seen.subject.socket.filter(|_| owner);
            if seen.subject.kernel_thread && !threads {
                (seen.subject.kernel_thread, seen.subject.task) = (false, Uid(0));
            }
            prop_assert_eq!(verdict(&image, &attempt).0, explain(&rules, &seen).verdict, "{:?}", attempt);
        }
    }

    /// A target that goes on keeps its bit, and no two share one.
    #[test]
    fn bits_are_kept_and_unique(before in policy(), after in policy()) {
        let (Ok(before), Ok(after)) = (
            compile(&before, &BTreeMap::new(), &host()),
            compile(&after, &BTreeMap::new(), &host()),
        ) else { return Err(TestCaseError::fail("the policy is within all limits")) };
        let first = lower(&before, &Image::empty().names, LOADER);
        let second = lower(&after, &first.names, LOADER);
        let used: Vec<&TargetName> = second.names.iter().filter(|name| **name != TargetName::NONE).collect();
        prop_assert_eq!(used.len(), after.targets.len());
        for name in names(&before).intersection(&names(&after)) {
            let bit = |image: &Image| image.names.iter().position(|slot| slot.as_str() == name);
            prop_assert_eq!(bit(&first), bit(&second));
        }
    }
}

/// A hundred thousand neighbours, as a rule set may have: few buckets hold many, and few addresses beside them pass.
#[test]
fn p2_buckets_rule_most_addresses_out() {
    let spot = |host: u32| {
        Spot::of(
            enforcer_ebpf::TCP,
            4222_u16.to_be(),
            canonical_words(Ipv4Addr::from(host).into()),
        )
    };
    let passes = |count: u32| {
        let mut filters = vec![0_u64; BUCKETS as usize];
        for host in 0x0a00_0000..0x0a00_0000 + count {
            let Spot { bucket, bit } = spot(host);
            if let Some(filter) = filters.get_mut(bucket as usize) {
                *filter |= bit;
            }
        }
        let misses = 0x0b00_0000..0x0b00_0000 + 10_000;
        misses
            .filter(|host| {
                let Spot { bucket, bit } = spot(*host);
                filters.get(bucket as usize).is_some_and(|filter| filter & bit != 0)
            })
            .count()
    };
    assert!(passes(10) < 20, "{}", passes(10));
    assert!(passes(1_000) < 60, "{}", passes(1_000));
    assert!(passes(100_000) < 2_000, "{}", passes(100_000));
}

#[test]
fn canonical_forms() {
    let cases = [
        ("10.0.0.1", "10.0.0.1", true),
        ("::ffff:10.0.0.1", "10.0.0.1", true),
        ("0.0.0.0", "::", false),
        ("::ffff:0.0.0.0", "::", false),
        ("::", "::", false),
        ("2001:db8::1", "2001:db8::1", false),
        ("::10.0.0.1", "::10.0.0.1", false),
    ];
    for (text, same, v4) in cases {
        let words = |text: &str| text.parse().map_or([9; 4], canonical_words);
        assert_eq!(words(text), words(same), "{text}");
        assert_eq!(is_v4(words(text)), v4, "{text}");
    }
    assert_eq!(
        scope::SLOT | scope::V6 | scope::FOREIGN,
        7,
        "the bits of a scope are distinct"
    );
}
