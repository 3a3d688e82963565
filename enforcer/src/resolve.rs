//! Names to addresses: when to look up, what to keep, what to refuse, as a pure state machine. The clock is passed in.

mod addresses;
pub(crate) mod lookup;
mod note;
mod resolv_conf;
mod runtime;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher, Hasher},
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use self::addresses::Addresses;
pub(crate) use self::{
    lookup::{LOOKUP_TIMEOUT, PartialAnswer, lookup, lookup_early},
    note::Note,
};
use crate::{
    policy::{AcceptedAnswers, Dns, Name, Unresolved, canonical},
    ruleset::Resolved,
    wire::{NameProtection, NameStatus},
};

/// Most current addresses of a name, and most retained ones (N4).
pub(crate) const MAX_ADDRESSES: usize = 256;
/// First wait after a failure, and how often it is used before it doubles (N2).
const RETRY: Duration = Duration::from_secs(5);
const QUICK_RETRIES: u32 = 10;
/// Longest wait after a failure (N2).
const MAX_RETRY: Duration = Duration::from_mins(2);

/// What a lookup brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LookupAnswer {
    /// The hosts file names it; DNS was not asked.
    Hosts(BTreeSet<IpAddr>),
    /// DNS was asked, each family on its own (N1).
    Dns {
        /// IPv4.
        a: Outcome,
        /// IPv6.
        aaaa: Outcome,
    },
}

impl LookupAnswer {
    /// Whether DNS says that there is no address.
    #[must_use]
    pub(crate) fn is_without_addresses(&self) -> bool {
        match self {
            Self::Hosts(_) => false,
            Self::Dns { a, aaaa } => [a, aaaa]
                .into_iter()
                .all(|outcome| matches!(outcome, Outcome::Empty | Outcome::Missing)),
        }
    }

    /// All addresses, and why there is none where that is so.
    #[must_use]
    pub(crate) fn into_addresses(self) -> (BTreeSet<IpAddr>, String) {
        let (a, aaaa) = match self {
            Self::Hosts(addresses) => return (addresses, String::new()),
            Self::Dns { a, aaaa } => (a, aaaa),
        };
        let mut why = Vec::new();
        let mut all = BTreeSet::new();
        for outcome in [a, aaaa] {
            match outcome {
                Outcome::Found { addresses, .. } => all.extend(addresses),
                Outcome::Empty | Outcome::Awaited => {}
                Outcome::Missing => why.push("it does not exist".to_owned()),
                Outcome::Failed(error) => why.push(error),
            }
        }
        why.dedup();
        if why.is_empty() {
            why.push("it has no address".to_owned());
        }
        (all, why.join(", "))
    }
}

/// What DNS says of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Addresses, and how long they may be kept.
    Found {
        /// At least one.
        addresses: BTreeSet<IpAddr>,
        /// The least of the records' TTLs.
        ttl: Duration,
    },
    /// The name exists, and has no address of this family.
    Empty,
    /// The name does not exist (NXDOMAIN).
    Missing,
    /// No answer that means anything.
    Failed(String),
    /// No answer yet, beside one of the other family.
    Awaited,
}

/// What is known of each name, without times: what a restart can take over (N7).
pub(crate) type Known = BTreeMap<Name, KnownName>;

/// What is known of a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KnownName {
    /// The last positive answers.
    pub current: BTreeSet<IpAddr>,
    /// Addresses that have left the answers and are still protected (N4).
    pub left: BTreeSet<IpAddr>,
    /// For how long each was an answer, where that is known.
    pub answered: BTreeMap<IpAddr, Duration>,
}

impl KnownName {
    /// All of them.
    pub(crate) fn addresses(&self) -> BTreeSet<IpAddr> {
        self.current.union(&self.left).copied().collect()
    }
}

/// What is protected for a name that has addresses, or none (N5).
pub(crate) fn protection(has_addresses: bool, unresolved: Unresolved) -> NameProtection {
    match unresolved {
        _ if has_addresses => NameProtection::Addresses,
        Unresolved::Open => NameProtection::Nothing,
        Unresolved::Closed => NameProtection::Port,
    }
}

/// All names and what is known of them.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    dns: Dns,
    states: BTreeMap<Name, State>,
    /// A number in 0..1.
    random: fn() -> f64,
}

#[derive(Clone, Debug)]
struct State {
    addresses: Addresses,
    /// Failures in a row.
    failures: u32,
    /// Why the last lookup failed (N3).
    stale: Option<String>,
    /// What of it failed without consequence.
    note: Option<String>,
    refused: BTreeSet<IpAddr>,
    /// What DNS may answer (N6).
    accepted: AcceptedAnswers,
    due: Instant,
    in_flight: bool,
}

/// A positive answer without what it may not hold.
struct Usable {
    addresses: BTreeSet<IpAddr>,
    ttl: Duration,
}

impl Names {
    /// No names yet.
    #[must_use]
    pub(crate) fn new(dns: Dns) -> Self {
        Self {
            dns,
            states: BTreeMap::new(),
            random: || f64::from(random_bits()) / f64::from(u32::MAX),
        }
    }

    /// Takes other settings; what is known stays.
    pub(crate) fn configure(&mut self, dns: Dns) {
        self.dns = dns;
    }

    /// Takes another set of names; those that stay keep what is known of them, new ones are due at once.
    pub(crate) fn set(&mut self, names: BTreeMap<Name, AcceptedAnswers>, now: Instant) {
        self.states.retain(|name, _| names.contains_key(name));
        for (name, accepted) in names {
            let state = self.states.entry(name).or_insert_with(|| State {
                accepted,
                addresses: Addresses::default(),
                failures: 0,
                stale: None,
                note: None,
                refused: BTreeSet::new(),
                due: now,
                in_flight: false,
            });
            if state.accepted != accepted {
                // What was refused is asked for again.
                state.accepted = accepted;
                state.due = now;
            }
        }
    }

    /// Takes what was known before this process (N7) of names of which nothing is known yet: what was current is until
    /// a newer positive answer (N3), however long DNS is away; what had left is retained from now on, as nobody knows
    /// how long ago that was (N4).
    pub(crate) fn restore(&mut self, known: &Known, now: Instant) {
        for (name, known) in known {
            if let Some(state) = self.states.get_mut(name).filter(|state| state.addresses.is_empty()) {
                state.addresses.restore(known, now, self.dns.retain);
            }
        }
    }

    /// Whether DNS has answered nothing but addresses that no name may stand for (N6).
    #[must_use]
    pub(crate) fn is_rejected(accepted: AcceptedAnswers, answer: &LookupAnswer) -> bool {
        let (LookupAnswer::Dns { .. }, (all, _)) = (answer, answer.clone().into_addresses()) else {
            return false;
        };
        !all.is_empty() && sift(all, accepted).0.is_empty()
    }

    /// Whether DNS has answered nothing but link-local addresses, which its targets do not take (N6).
    #[must_use]
    pub(crate) fn needs_link_local(accepted: AcceptedAnswers, answer: &LookupAnswer) -> bool {
        let LookupAnswer::Dns { a, aaaa } = answer else {
            return false;
        };
        let found = [a, aaaa].into_iter().filter_map(|outcome| match outcome {
            Outcome::Found { addresses, .. } => Some(addresses),
            Outcome::Empty | Outcome::Missing | Outcome::Failed(_) | Outcome::Awaited => None,
        });
        let (good, refused) = sift(found.flatten().copied(), accepted);
        good.is_empty() && !sift(refused, AcceptedAnswers::LinkLocal).0.is_empty()
    }

    /// What is known now, for [`Names::restore`].
    #[must_use]
    pub(crate) fn known(&self, now: Instant) -> Known {
        let known = |state: &State| state.addresses.known(now, self.dns.retain);
        let all = self.states.iter().map(|(name, state)| (name.clone(), known(state)));
        all.filter(|(_, known)| !(known.current.is_empty() && known.left.is_empty()))
            .collect()
    }

    /// When the next lookup is due, or the next address has been retained long enough.
    #[must_use]
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let lookups = self
            .states
            .values()
            .filter(|state| !state.in_flight)
            .map(|state| state.due);
        let expiries = self
            .states
            .values()
            .flat_map(|state| state.addresses.departures())
            .map(|left| left + self.dns.retain);
        lookups.chain(expiries).min()
    }

    /// The names to look up now. Addresses that were retained long enough are let go (N4).
    pub(crate) fn due(&mut self, now: Instant) -> Vec<Name> {
        for state in self.states.values_mut() {
            state.addresses.expire(now, self.dns.retain);
        }
        let due = self
            .states
            .iter()
            .filter(|(_, state)| !state.in_flight && state.due <= now);
        due.map(|(name, _)| name.clone()).collect()
    }

    /// Takes note that a lookup has begun; false if one is under way already.
    pub(crate) fn begin(&mut self, name: &Name) -> bool {
        self.states
            .get_mut(name)
            .is_some_and(|state| !std::mem::replace(&mut state.in_flight, true))
    }

    /// Takes what one family says while the other is awaited: what is wrong is said of the whole answer, as are the
    /// times.
    pub(crate) fn answered_in_part(&mut self, now: Instant, name: &Name, answer: &LookupAnswer) -> Vec<Note> {
        let most = self.dns.max_refresh;
        let (Some(state), LookupAnswer::Dns { a, aaaa }) = (self.states.get_mut(name), answer) else {
            return Vec::new();
        };
        let (before, accepted) = (state.addresses.all(), state.accepted);
        let good = |outcome: &Outcome| match outcome {
            Outcome::Found { addresses, .. } => {
                let (good, _) = sift(addresses.iter().copied(), accepted);
                (!good.is_empty()).then_some(good)
            }
            Outcome::Empty | Outcome::Missing | Outcome::Failed(_) | Outcome::Awaited => None,
        };
        state.addresses.take([good(a), good(aaaa)], now, most);
        let after = state.addresses.all();
        let changed = (after != before).then(|| Note::Changed(name.clone(), after));
        changed.into_iter().collect()
    }

    /// Takes an answer: only a newer positive one changes anything (N3).
    pub(crate) fn answered(&mut self, now: Instant, name: &Name, answer: LookupAnswer) -> Vec<Note> {
        let Some(state) = self.states.get_mut(name) else {
            return Vec::new();
        };
        state.in_flight = false;
        let before = state.addresses.all();
        let (stale_before, refused_before, cut_before) =
            (state.stale.clone(), state.refused.clone(), state.addresses.cut());
        // An answer counts until the next one is due at the latest: what kept that one away may be a liar's doing.
        let most = self.dns.max_refresh;
        let ttl = match answer {
            LookupAnswer::Hosts(addresses) => state.take_hosts(addresses, now, most).then_some(self.dns.max_refresh),
            LookupAnswer::Dns { a, aaaa } => state.take_dns(a, aaaa, now, most),
        };
        let jitter = 0.9 + 0.2 * (self.random)();
        let refresh = ttl.map(|ttl| {
            let wait = ttl.clamp(self.dns.min_refresh, self.dns.max_refresh).mul_f64(jitter);
            wait.clamp(self.dns.min_refresh, self.dns.max_refresh)
        });
        let retry = state.stale.is_some().then(|| {
            state.failures = state.failures.saturating_add(1);
            let doublings = state.failures.saturating_sub(QUICK_RETRIES).min(10);
            (RETRY * 2_u32.pow(doublings)).mul_f64(jitter).min(MAX_RETRY)
        });
        if retry.is_none() {
            state.failures = 0;
        }
        // N1: one family's failures must not slow down the other's refresh.
        state.due = now + refresh.into_iter().chain(retry).min().unwrap_or(self.dns.max_refresh);
        let mut notes = Vec::new();
        let after = state.addresses.all();
        if after != before {
            notes.push(Note::Changed(name.clone(), after));
        }
        if state.stale != stale_before {
            notes.push(match &state.stale {
                Some(cause) => Note::Stale(name.clone(), cause.clone(), state.protects(self.dns.unresolved)),
                None => Note::Fresh(name.clone()),
            });
        }
        if state.refused != refused_before && !state.refused.is_empty() {
            notes.push(Note::Refused(name.clone(), state.refused.clone()));
        }
        let cut = state.addresses.cut();
        if cut > cut_before {
            notes.push(Note::TooMany(name.clone(), cut));
        }
        notes
    }

    /// The addresses to protect now.
    #[must_use]
    pub(crate) fn resolved(&self, now: Instant) -> Resolved {
        let kept = |state: &State| state.addresses.all_at(now, self.dns.retain);
        let all = self.states.iter().map(|(name, state)| (name.clone(), kept(state)));
        all.filter(|(_, addresses)| !addresses.is_empty()).collect()
    }

    /// What is known of each name.
    #[must_use]
    pub(crate) fn report(&self) -> Vec<NameStatus> {
        let report = |(name, state): (&Name, &State)| NameStatus {
            name: name.to_string(),
            addresses: state.addresses.all().iter().map(ToString::to_string).collect(),
            cut: state.addresses.cut(),
            stale: state.stale.is_some(),
            cause: state.stale.as_ref().or(state.note.as_ref()).cloned(),
            protects: state.protects(self.dns.unresolved),
        };
        self.states.iter().map(report).collect()
    }
}

impl State {
    fn protects(&self, unresolved: Unresolved) -> NameProtection {
        protection(!self.addresses.all().is_empty(), unresolved)
    }

    /// Takes what the hosts file says; false if it says nothing usable.
    fn take_hosts(&mut self, addresses: BTreeSet<IpAddr>, now: Instant, most: Duration) -> bool {
        let (good, refused): (BTreeSet<IpAddr>, BTreeSet<IpAddr>) = addresses
            .into_iter()
            .map(canonical)
            .partition(|address| !address.is_unspecified() && !address.is_multicast()); // N6
        self.refused = refused;
        let nothing = || "every address in the hosts file is rejected".to_owned();
        self.stale = good.is_empty().then(nothing);
        self.note = None;
        if self.stale.is_some() {
            return false;
        }
        let (v4, v6) = good.into_iter().partition(IpAddr::is_ipv4);
        self.addresses.take([Some(v4), Some(v6)], now, most);
        true
    }

    /// Takes what DNS says of both families; the least TTL of the positive answers.
    fn take_dns(&mut self, a: Outcome, aaaa: Outcome, now: Instant, most: Duration) -> Option<Duration> {
        let found = |outcome: &Outcome| matches!(outcome, Outcome::Found { .. });
        if found(&a) || found(&aaaa) {
            self.refused.clear(); // An answer without addresses says nothing of those refused before.
        }
        let missing = (&a, &aaaa) == (&Outcome::Missing, &Outcome::Missing);
        let (a, aaaa) = (self.usable(0, a), self.usable(1, aaaa));
        let addresses = |usable: &Result<Option<Usable>, String>| {
            let usable = usable.as_ref().ok().and_then(Option::as_ref);
            usable.map(|usable| usable.addresses.clone())
        };
        self.addresses.take([addresses(&a), addresses(&aaaa)], now, most);
        let nothing = (!self.addresses.has_current()).then(|| {
            let cause = if missing {
                "the name does not exist (NXDOMAIN)"
            } else {
                "no address"
            };
            cause.to_owned()
        });
        // N3: beside a good answer a family that never had an address, and fails, is worth a note and no more.
        let good = |usable: &Result<Option<Usable>, String>| matches!(usable, Ok(Some(_)));
        let never = [0, 1].map(|family| !self.addresses.knows(family));
        let faults = [(&a, never[0] && good(&aaaa)), (&aaaa, never[1] && good(&a))];
        let fault = |noted| {
            faults
                .iter()
                .filter(|(_, note)| *note == noted)
                .find_map(|(usable, _)| usable.as_ref().err())
        };
        self.note = fault(true).cloned();
        self.stale = fault(false).cloned().or(nothing);
        a.into_iter().chain(aaaa).flatten().map(|usable| usable.ttl).min()
    }

    /// What of DNS's word on a family may be taken, or why there is nothing.
    fn usable(&mut self, family: usize, outcome: Outcome) -> Result<Option<Usable>, String> {
        let kind = if family == 0 { "A" } else { "AAAA" };
        let known = self.addresses.knows(family);
        match outcome {
            Outcome::Found { addresses, ttl } => {
                let (good, refused) = sift(addresses, self.accepted);
                self.refused.extend(refused);
                if good.is_empty() {
                    return Err(format!("{kind}: every address in the answer is rejected")); // N6
                }
                Ok(Some(Usable { addresses: good, ttl }))
            }
            Outcome::Empty if known => Err(format!("{kind}: no address any more")), // N3
            Outcome::Missing if known => Err(format!("{kind}: the name does not exist any more (NXDOMAIN)")), // N3
            // Of a family never known this is no fault; some servers deny a name's existence for want of AAAA (RFC
            // 4074).
            Outcome::Empty | Outcome::Missing | Outcome::Awaited => Ok(None),
            Outcome::Failed(cause) => Err(format!("{kind}: {cause}")),
        }
    }
}

/// The addresses of an answer that may be taken, and those that may not.
fn sift(
    addresses: impl IntoIterator<Item = IpAddr>,
    accepted: AcceptedAnswers,
) -> (BTreeSet<IpAddr>, BTreeSet<IpAddr>) {
    let all = addresses.into_iter().map(canonical);
    all.partition(|address| may_be_answered(*address, accepted))
}

/// N6: what no DNS answer may name, lest a resolver turn our own rules against this host.
fn may_be_answered(address: IpAddr, accepted: AcceptedAnswers) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    !(link_local && accepted == AcceptedAnswers::Routable
        || broadcast
        || address.is_loopback()
        || address.is_multicast()
        || address.is_unspecified())
}

fn random_bits() -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "any 32 bits will do")]
    let bits = std::hash::RandomState::new().build_hasher().finish() as u32;
    bits
}

#[cfg(test)]
mod tests;
