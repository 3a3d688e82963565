//! Denials added up by target, user, program's name and cgroup, for days: what a roll-out in audit mode is evaluated
//! by. Bounded, and fair between users. Pure.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{Budget, Budgets, Caller, Filter, Place, other_owner};
use crate::wire::{ActiveBackend, Denial, DenialSum, Protocol, Schema, SumOf, Verdict, rfc3339};

/// Kinds told apart of one user: a caller chooses its name, and may choose its cgroup.
const KINDS: usize = 32;
/// A user of whom nothing came for so long makes room for another.
const QUIET: SignedDuration = SignedDuration::from_hours(DAY);
/// How long counts are kept, and how long by the hour; then they are by the day.
const KEPT_HOURS: i64 = 35 * DAY;
const FINE_HOURS: i64 = 2 * DAY;
const DAY: i64 = 24;
const HOUR: i64 = 3600;

/// What is told apart of one user.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kind {
    verdict: Verdict,
    target: String,
    protocol: Protocol,
    /// The socket's owner, where that is another user than the task's.
    owner: Option<u32>,
    comm: Option<String>,
    /// Not in files that earlier versions wrote.
    #[serde(default)]
    exe: Option<String>,
    cgroup: Option<String>,
}

/// What is known of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Known {
    user: Option<String>,
    owner: Option<String>,
    /// The endpoint of the last.
    endpoint: String,
    /// Not every denial is reported one by one (nftables).
    at_least: bool,
    pub(super) sum: Sum,
}

/// How many, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sum {
    first: Timestamp,
    last: Timestamp,
    /// By the hour since 1970, or by the first hour of the day; the newest last.
    counts: Vec<(i64, u64)>,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Summary {
    pub(super) kinds: Budgets<Kind, Known, Sum>,
    /// Of each target, those that came too fast to be reported one by one.
    pub(super) unreported: BTreeMap<String, Sum>,
    /// Whether it is other than what was last taken to be saved.
    changed: bool,
}

impl Default for Summary {
    fn default() -> Self {
        Self {
            kinds: Budgets::new(KINDS),
            unreported: BTreeMap::new(),
            changed: false,
        }
    }
}

impl Summary {
    /// Adds a denial.
    pub(crate) fn add(&mut self, event: &Denial, now: Timestamp) {
        self.changed = true;
        let kind = Kind {
            verdict: event.verdict,
            target: event.target.clone(),
            protocol: event.protocol,
            owner: other_owner(event),
            comm: event.comm.clone(),
            exe: event.exe.clone(),
            cgroup: event.cgroup.clone(),
        };
        let new = || Known {
            user: None,
            owner: None,
            endpoint: String::new(),
            at_least: false,
            sum: Sum::new(now),
        };
        let caller = Caller::of(event);
        self.make_room(caller, &kind, now);
        match self.kinds.place(caller, kind, new) {
            Place::Kind(known) => {
                known.sum.add(1, now);
                known.at_least |= event.backend == ActiveBackend::Nftables;
                event.judged.clone_into(&mut known.endpoint);
                known.user = event.task_user.clone().or_else(|| event.socket_user.clone());
                known.owner.clone_from(&event.socket_user);
            }
            Place::Beyond(beyond) => beyond.get_or_insert_with(|| Sum::new(now)).add(1, now),
        }
    }

    /// What came last longest ago makes room for what is new: names of tasks and cgroups come and go.
    fn make_room(&mut self, caller: Caller, kind: &Kind, now: Timestamp) {
        if let Some(budget) = self.kinds.callers.get(&caller) {
            if !budget.kinds.contains_key(kind) && self.kinds.is_full(caller) {
                let budget = self.kinds.of(caller);
                let oldest = budget.kinds.iter().min_by_key(|(_, known)| known.sum.last);
                let oldest = oldest.map(|(kind, _)| kind.clone());
                if let Some(known) = oldest.and_then(|kind| budget.kinds.remove(&kind)) {
                    add_to(&mut budget.beyond, known.sum);
                }
            }
        } else if !self.kinds.has_room(caller) {
            let last = |budget: &Budget<Kind, Known, Sum>| budget.kinds.values().map(|known| known.sum.last).max();
            let like = self
                .kinds
                .callers
                .iter()
                .filter(|(other, _)| other.is_mapped() == caller.is_mapped());
            let quietest = like.map(|(other, budget)| (last(budget), *other)).min();
            let quiet = quietest.filter(|(last, _)| last.is_none_or(|last| now.duration_since(last) > QUIET));
            if let Some(budget) = quiet.and_then(|(_, other)| self.kinds.callers.remove(&other)) {
                let sums = budget.kinds.into_values().map(|known| known.sum).chain(budget.beyond);
                sums.for_each(|sum| add_to(&mut self.kinds.beyond, sum));
            }
        }
    }

    /// Adds denials of a target that were only counted.
    pub(crate) fn add_unreported(&mut self, target: &str, count: u64, now: Timestamp) {
        self.changed = true;
        let sum = self
            .unreported
            .entry(target.to_owned())
            .or_insert_with(|| Sum::new(now));
        sum.add(count, now);
    }

    /// Whether it has changed since this was asked; what is too old is forgotten.
    pub(crate) fn take_changed(&mut self, now: Timestamp) -> bool {
        let kept = |sum: &Sum| sum.is_kept(now);
        self.kinds.callers.retain(|_, budget| {
            budget.kinds.retain(|_, known| kept(&known.sum));
            budget.beyond.take_if(|sum| !kept(sum));
            !budget.kinds.is_empty() || budget.beyond.is_some()
        });
        self.kinds.beyond.take_if(|sum| !kept(sum));
        self.unreported.retain(|_, sum| kept(sum));
        std::mem::take(&mut self.changed)
    }

    /// What a filter lets through, the most first.
    pub(crate) fn sums(&self, filter: &Filter, now: Timestamp) -> Vec<DenialSum> {
        let mut sums = Vec::new();
        for (caller, budget) in &self.kinds.callers {
            for (kind, known) in &budget.kinds {
                sums.push(known.shown(*caller, kind));
            }
            let beyond = budget.beyond.iter();
            sums.extend(beyond.map(|sum| (sum, sum.shown(SumOf::MoreKinds).by(*caller))));
        }
        let beyond = self.kinds.beyond.iter();
        sums.extend(beyond.map(|sum| (sum, sum.shown(SumOf::MoreUsers))));
        for (target, sum) in &self.unreported {
            let shown = DenialSum {
                target: Some(target.clone()),
                ..sum.shown(SumOf::Unreported)
            };
            sums.push((sum, shown));
        }
        let from = filter.since.map(|since| first_hour(since, now));
        let counted = sums.into_iter().filter_map(|(sum, shown)| {
            let count = sum.since(from);
            (count > 0 && filter.lets_sum(&shown)).then_some(DenialSum { count, ..shown })
        });
        let mut counted: Vec<DenialSum> = counted.collect();
        counted.sort_by_key(|sum| std::cmp::Reverse(sum.count));
        counted.truncate(filter.last.unwrap_or(usize::MAX));
        counted
    }
}

/// Adds what is told apart no longer.
pub(super) fn add_to(beyond: &mut Option<Sum>, sum: Sum) {
    match beyond {
        Some(all) => all.merge(sum),
        None => *beyond = Some(sum),
    }
}

impl Known {
    fn shown(&self, caller: Caller, kind: &Kind) -> (&Sum, DenialSum) {
        let shown = DenialSum {
            verdict: Some(kind.verdict),
            target: Some(kind.target.clone()),
            protocol: Some(kind.protocol),
            endpoint: Some(self.endpoint.clone()),
            user: self.user.clone(),
            socket_uid: kind.owner,
            socket_user: self.owner.clone().filter(|_| kind.owner.is_some()),
            comm: kind.comm.clone(),
            exe: kind.exe.clone(),
            cgroup: kind.cgroup.clone(),
            at_least: self.at_least,
            ..self.sum.shown(SumOf::Kind).by(caller)
        };
        (&self.sum, shown)
    }
}

impl DenialSum {
    fn by(self, caller: Caller) -> Self {
        let (uid, kernel_thread) = match caller {
            Caller::User(uid) => (Some(uid), false),
            Caller::KernelThread => (None, true),
            Caller::Nobody => (None, false),
        };
        Self {
            uid,
            kernel_thread,
            ..self
        }
    }
}

impl Sum {
    fn new(now: Timestamp) -> Self {
        Self {
            first: now,
            last: now,
            counts: Vec::new(),
        }
    }

    fn add(&mut self, count: u64, now: Timestamp) {
        self.last = now;
        let this = hour(now);
        match self.counts.last_mut() {
            // A clock that was set back counts on the newest hour.
            Some((newest, counted)) if *newest >= this => *counted += count,
            Some(_) | None => {
                self.counts.push((this, count));
                self.coarsen(this);
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.first = self.first.min(other.first);
        self.last = self.last.max(other.last);
        self.counts.extend(other.counts);
        self.counts.sort_unstable();
        self.coarsen(hour(self.last));
    }

    /// By the day what is older than two, and nothing that is too old.
    fn coarsen(&mut self, now: i64) {
        let mut coarse: Vec<(i64, u64)> = Vec::new();
        for &(hour, count) in self.counts.iter().filter(|(hour, _)| hour + KEPT_HOURS > now) {
            let start = if hour + FINE_HOURS > now {
                hour
            } else {
                hour - hour % DAY
            };
            match coarse.last_mut() {
                Some((last, counted)) if *last == start => *counted += count,
                Some(_) | None => coarse.push((start, count)),
            }
        }
        self.counts = coarse;
    }

    fn is_kept(&self, now: Timestamp) -> bool {
        let newest = self.counts.last();
        newest.is_some_and(|(newest, _)| newest + KEPT_HOURS > hour(now))
    }

    fn since(&self, from: Option<i64>) -> u64 {
        let counts = self
            .counts
            .iter()
            .filter(|(hour, _)| from.is_none_or(|from| *hour >= from));
        counts.map(|(_, count)| count).sum()
    }

    fn shown(&self, of: SumOf) -> DenialSum {
        DenialSum {
            schema: Schema::Summary,
            of,
            verdict: None,
            target: None,
            protocol: None,
            endpoint: None,
            uid: None,
            user: None,
            kernel_thread: false,
            socket_uid: None,
            socket_user: None,
            comm: None,
            exe: None,
            cgroup: None,
            count: 0,
            at_least: false,
            first: rfc3339(self.first.into()),
            last: rfc3339(self.last.into()),
        }
    }
}

fn hour(time: Timestamp) -> i64 {
    time.as_second().div_euclid(HOUR)
}

/// The first hour that counts from a time on: that of the day where counts may be by the day.
fn first_hour(since: Timestamp, now: Timestamp) -> i64 {
    let hour_of = hour(since);
    if hour_of + FINE_HOURS > hour(now) {
        hour_of
    } else {
        hour_of - hour_of.rem_euclid(DAY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::tests::denial;

    fn at(hours: i64) -> Timestamp {
        // A day's first hour.
        Timestamp::from_second(20_000 * DAY * HOUR + hours * HOUR + 5).unwrap_or_default()
    }

    fn all(summary: &Summary, since: Option<Timestamp>, now: Timestamp) -> Vec<(Option<u32>, SumOf, u64)> {
        let filter = Filter {
            since,
            ..Filter::default()
        };
        let sums = summary.sums(&filter, now);
        sums.iter().map(|sum| (sum.uid, sum.of, sum.count)).collect()
    }

    #[test]
    fn kinds_are_added_up_by_user_target_program_and_cgroup() {
        let mut summary = Summary::default();
        let curl = denial(1000, "monit", "curl");
        for hours in [0, 0, 1] {
            summary.add(&curl, at(hours));
        }
        let wget = Denial {
            cgroup: Some("/b".to_owned()),
            task_user: Some("vcap".to_owned()),
            ..denial(1000, "monit", "wget")
        };
        summary.add(&wget, at(2));
        summary.add(&denial(1001, "monit", "curl"), at(2));
        summary.add_unreported("monit", 7, at(3));
        let user = |uid, count| (Some(uid), SumOf::Kind, count);
        assert_eq!(
            all(&summary, None, at(3)),
            [
                (None, SumOf::Unreported, 7),
                user(1000, 3),
                user(1000, 1),
                user(1001, 1)
            ]
        );
        assert_eq!(
            all(&summary, Some(at(1)), at(3)),
            [
                (None, SumOf::Unreported, 7),
                user(1000, 1),
                user(1000, 1),
                user(1001, 1)
            ]
        );
        let filter = Filter {
            user: Some(1000),
            last: Some(2),
            ..Filter::default()
        };
        let sums = summary.sums(&filter, at(3));
        // Whose those are that were only counted nobody knows.
        assert_eq!(sums.first().map(|sum| sum.of), Some(SumOf::Unreported));
        let curl = sums.get(1).map(|sum| (sum.comm.as_deref(), sum.first.clone()));
        assert_eq!(curl, Some((Some("curl"), rfc3339(at(0).into()))));
        assert_eq!(sums.len(), 2);
    }

    #[test]
    fn counts_are_by_the_hour_then_by_the_day_then_forgotten() {
        let mut summary = Summary::default();
        let curl = denial(1000, "monit", "curl");
        for hours in 0..40 * DAY {
            summary.add(&curl, at(hours));
        }
        let now = at(40 * DAY - 1);
        let counted = |since: i64| {
            all(&summary, Some(at(since)), now)
                .iter()
                .map(|(_, _, count)| *count)
                .sum::<u64>()
        };
        // 35 days, of which the oldest may have begun.
        assert_eq!(counted(0), (35 * DAY).unsigned_abs());
        assert_eq!(counted(39 * DAY + 20), 4);
        // A whole day.
        assert_eq!(counted(20 * DAY + 13), (20 * DAY).unsigned_abs());
        let longest = summary.kinds.callers.values().flat_map(|budget| budget.kinds.values());
        assert!(
            longest
                .map(|known| known.sum.counts.len())
                .all(|length| length <= 48 + 34)
        );
        assert!(summary.take_changed(at(74 * DAY)));
        assert_eq!(all(&summary, None, at(74 * DAY)).len(), 1);
        assert!(!summary.take_changed(at(75 * DAY)));
        assert_eq!(all(&summary, None, at(75 * DAY)), []);
    }

    #[test]
    fn a_clock_that_is_set_back_loses_nothing() {
        let mut summary = Summary::default();
        for hours in [10, 2, 10] {
            summary.add(&denial(1000, "monit", "curl"), at(hours));
        }
        assert_eq!(all(&summary, None, at(2)), [(Some(1000), SumOf::Kind, 3)]);
    }

    #[test]
    fn f10_nobody_crowds_another_out() {
        let mut summary = Summary::default();
        for name in 0..1000 {
            summary.add(&denial(1000, "monit", &name.to_string()), at(0));
        }
        for uid in 0..500 {
            summary.add(&denial(100_000 + uid, "monit", "a"), at(0));
        }
        summary.add(&denial(1001, "monit", "curl"), at(0));
        let sums = all(&summary, None, at(0));
        assert!(sums.contains(&(Some(1001), SumOf::Kind, 1)));
        assert!(sums.contains(&(Some(1000), SumOf::MoreKinds, 1000 - 32)));
        assert!(sums.contains(&(None, SumOf::MoreUsers, 500 - 32)));
        assert_eq!(sums.iter().map(|(_, _, count)| count).sum::<u64>(), 1501);
        // What is new is told apart, and whoever was quiet for long makes room.
        summary.add(&denial(1000, "bus", "new"), at(1));
        summary.add(&denial(200_000, "monit", "a"), at(1));
        summary.add(&denial(200_001, "monit", "a"), at(26));
        let of = |target: &str, user| {
            let filter = Filter {
                target: Some(target.to_owned()),
                user,
                ..Filter::default()
            };
            let sums = summary.sums(&filter, at(26));
            sums.iter().map(|sum| (sum.uid, sum.of, sum.count)).collect::<Vec<_>>()
        };
        // Of others nobody knows to which target they were.
        assert_eq!(
            of("bus", Some(1000)),
            [
                (Some(1000), SumOf::MoreKinds, 1000 - 31),
                (None, SumOf::MoreUsers, 500 - 32 + 1 + 1),
                (Some(1000), SumOf::Kind, 1)
            ]
        );
        assert!(!of("monit", None).contains(&(Some(200_000), SumOf::Kind, 1)));
        assert!(of("monit", None).contains(&(Some(200_001), SumOf::Kind, 1)));
    }
}
