//! What is known of one name's addresses: those of the last answers, and those that have left them. Each has a budget
//! of its own (N4), so that an answer can push out nothing but what was an answer for less time. Pure; the clock is
//! passed in.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use super::{KnownName, MAX_ADDRESSES};
use crate::policy::canonical;

/// A set of addresses for each family: IPv4, IPv6.
pub(super) type Families<T> = [T; 2];

/// The addresses of a name, each with the time for which it was an answer so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Addresses {
    /// Of the last positive answers; the hosts file's too. At most [`MAX_ADDRESSES`] together.
    current: Families<BTreeMap<IpAddr, Duration>>,
    /// When this process took the last positive answer.
    answered: Families<Option<Instant>>,
    /// What has left the answers and is retained; at most [`MAX_ADDRESSES`].
    left: BTreeMap<IpAddr, Left>,
    /// How many addresses of the last positive answer found no room, and are retained at most.
    cut: Families<usize>,
}

/// Which addresses are current where not all can be: those of the least rank, then of each family in turn. Neither
/// family is kept waiting for the other: a lie in one, after which it is answered no more, must not leave new addresses
/// of the other unprotected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// Answered now and known before; for how long it was an answer.
    Known(Reverse<Duration>),
    /// Of a family that was not answered now: half of all that may be current.
    Kept(Reverse<Duration>),
    /// Answered now and not known before; its place among those of its family.
    New(usize),
    /// Of a family that was not answered now, the rest.
    KeptBesides(Reverse<Duration>),
}

#[derive(Clone, Copy, Debug)]
struct Left {
    at: Instant,
    /// For how long it was an answer.
    answered: Duration,
}

impl Addresses {
    pub(super) fn is_empty(&self) -> bool {
        self.left.is_empty() && !self.has_current()
    }

    /// Whether some family has ever been answered.
    pub(super) fn has_current(&self) -> bool {
        !self.current.iter().all(BTreeMap::is_empty)
    }

    /// Whether a family, by its index, has ever been answered.
    pub(super) fn knows(&self, family: usize) -> bool {
        self.current.get(family).is_some_and(|current| !current.is_empty())
    }

    /// Current and retained.
    pub(super) fn all(&self) -> BTreeSet<IpAddr> {
        self.current().chain(self.left.keys().copied()).collect()
    }

    /// Current and retained, at a time.
    pub(super) fn all_at(&self, now: Instant, retain: Duration) -> BTreeSet<IpAddr> {
        self.current().chain(self.retained(now, retain)).collect()
    }

    /// How many addresses of the last answers are not current for want of room.
    pub(super) fn cut(&self) -> usize {
        self.cut.iter().sum()
    }

    /// When each of the retained ones left.
    pub(super) fn departures(&self) -> impl Iterator<Item = Instant> {
        self.left.values().map(|left| left.at)
    }

    /// Lets go what was retained long enough (N4).
    pub(super) fn expire(&mut self, now: Instant, retain: Duration) {
        self.left.retain(|_, left| now < left.at + retain);
    }

    /// What another process can take over (N7). Times are rounded down to four binary digits, lest every answer be
    /// another file.
    pub(super) fn known(&self, now: Instant, retain: Duration) -> KnownName {
        let left = self.left.iter().filter(|(_, left)| now < left.at + retain);
        let left = left.map(|(address, left)| (*address, left.answered));
        let current = self.current.iter().flatten();
        let current = current.map(|(address, answered)| (*address, *answered));
        KnownName {
            current: self.current().collect(),
            left: self.retained(now, retain).collect(),
            answered: left
                .chain(current)
                .map(|(address, answered)| (address, rounded(answered)))
                .collect(),
        }
    }

    /// Takes over what another process knew: what was current is until a newer positive answer (N3), what had left is
    /// retained from now on, as nobody knows how long ago that was. Where it is not known for how long an address was
    /// an answer, it counts as `retain`: a lie would have to last that long to count as much.
    pub(super) fn restore(&mut self, known: &KnownName, now: Instant, retain: Duration) {
        let answered = |address: &IpAddr| known.answered.get(address).copied().unwrap_or(retain);
        let left = |address: &IpAddr| {
            let answered = answered(address);
            (canonical(*address), Left { at: now, answered })
        };
        *self = Self::default();
        self.left = known.current.iter().chain(&known.left).map(left).collect();
        let (v4, v6) = known.current.iter().copied().map(canonical).partition(IpAddr::is_ipv4);
        self.take([Some(v4), Some(v6)], now, Duration::ZERO);
        // That was no answer.
        self.answered = Families::default();
        self.cut = Families::default();
    }

    /// Takes positive answers, of one family or both. Those before them count as answers until now, for `most` at most:
    /// one answer before a long silence is not an answer for as long.
    pub(super) fn take(&mut self, fresh: Families<Option<BTreeSet<IpAddr>>>, now: Instant, most: Duration) {
        for (family, fresh) in fresh.iter().enumerate() {
            if fresh.is_some() {
                self.retire(family, now, most);
            }
        }
        let ranked = self.ranked(fresh);
        let (taken, rest) = ranked.split_at(ranked.len().min(MAX_ADDRESSES));
        for &(_, family, address) in taken {
            let answered = self.left.get(&address).map(|left| left.answered);
            if let Some(current) = self.current.get_mut(family) {
                // What is kept is there already.
                current.entry(address).or_insert(answered.unwrap_or_default());
            }
        }
        for &(rank, family, address) in rest {
            // What is known of it is retained from now on: it was an answer, or was kept as one, until now.
            let kept = self
                .current
                .get_mut(family)
                .and_then(|current| current.remove(&address));
            let before = self.left.get(&address).map(|left| left.answered);
            if let Some(answered) = kept.or(before) {
                self.left.insert(address, Left { at: now, answered });
            }
            let known_only = matches!(rank, Rank::Known(_));
            if let Some(cut) = self.cut.get_mut(family).filter(|_| !known_only) {
                *cut += 1;
            }
        }
        self.forget_returned();
        self.drop_least();
    }

    /// Lets go of a family's last answer, for one that takes its place.
    fn retire(&mut self, family: usize, now: Instant, most: Duration) {
        let (Some(current), Some(answered), Some(cut)) = (
            self.current.get_mut(family),
            self.answered.get_mut(family),
            self.cut.get_mut(family),
        ) else {
            return;
        };
        *cut = 0;
        let since = answered.replace(now);
        let more = since.map_or(Duration::ZERO, |since| now.duration_since(since).min(most));
        for (address, answered) in std::mem::take(current) {
            let answered = answered.saturating_add(more);
            self.left.insert(address, Left { at: now, answered });
        }
    }

    /// What is to be current, with its family, those first that are to be kept if not all can be.
    fn ranked(&self, fresh: Families<Option<BTreeSet<IpAddr>>>) -> Vec<(Rank, usize, IpAddr)> {
        let mut all = Vec::new();
        for (family, (fresh, current)) in fresh.into_iter().zip(&self.current).enumerate() {
            let mut kept: Vec<_> = current
                .iter()
                .map(|(address, answered)| (Reverse(*answered), *address))
                .collect();
            kept.sort_unstable();
            for (index, (answered, address)) in kept.into_iter().enumerate() {
                let rank = if index < MAX_ADDRESSES / 2 {
                    Rank::Kept(answered)
                } else {
                    Rank::KeptBesides(answered)
                };
                all.push((rank, family, address));
            }
            let mut unknown = 0_usize;
            for address in fresh.into_iter().flatten() {
                let rank = if let Some(left) = self.left.get(&address) {
                    Rank::Known(Reverse(left.answered))
                } else {
                    unknown += 1;
                    Rank::New(unknown)
                };
                all.push((rank, family, address));
            }
        }
        all.sort_unstable();
        all
    }

    /// What is current has not left. AAAA may hold a mapped address that A names as well (D4), so both families count.
    fn forget_returned(&mut self) {
        let current = &mut self.current;
        self.left.retain(|address, left| {
            let mut returned = false;
            for answered in current.iter_mut().filter_map(|family| family.get_mut(address)) {
                *answered = left.answered.max(*answered);
                returned = true;
            }
            !returned
        });
    }

    /// N4: those that were answers for the shortest time go first; of equal ones what left last, so that of a lie and
    /// what it displaced the lie goes.
    fn drop_least(&mut self) {
        while self.left.len() > MAX_ADDRESSES {
            let least = self
                .left
                .iter()
                .min_by_key(|(address, left)| (left.answered, Reverse(left.at), Reverse(**address)));
            let Some(address) = least.map(|(address, _)| *address) else {
                return;
            };
            self.left.remove(&address);
        }
    }

    fn current(&self) -> impl Iterator<Item = IpAddr> {
        self.current.iter().flat_map(BTreeMap::keys).copied()
    }

    fn retained(&self, now: Instant, retain: Duration) -> impl Iterator<Item = IpAddr> {
        let left = self.left.iter().filter(move |(_, left)| now < left.at + retain);
        left.map(|(address, _)| *address)
    }
}

/// Whole seconds, of which the four highest binary digits count.
fn rounded(time: Duration) -> Duration {
    let seconds = time.as_secs();
    let shift = (u64::BITS - seconds.leading_zeros()).saturating_sub(4);
    Duration::from_secs(seconds >> shift << shift)
}
