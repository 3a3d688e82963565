//! What the kernel counted against what was told one by one: of a flood only a part reaches the log. Pure.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

/// Between two comparisons.
const PERIOD: Duration = Duration::from_mins(1);

/// Denials of each target, would-be ones among them.
pub(super) type Counts = BTreeMap<String, u64>;

/// Since the last line about a target.
#[derive(Debug, Default, Clone, Copy)]
struct Since {
    counted: u64,
    told: u64,
}

/// A target of which more was denied than was told.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unreported {
    pub target: String,
    counted: u64,
    told: u64,
}

impl Unreported {
    /// How many were not told.
    pub(super) fn count(&self) -> u64 {
        self.counted - self.told
    }
}

impl fmt::Display for Unreported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "kernel counted {} denials for target {}; only {} were reported individually, the rest came too fast",
            self.counted, self.target, self.told
        )
    }
}

/// The comparison. The kernel counts before it tells: what it counted is compared a little later, when that has been
/// told.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// What the kernel had counted when it was compared last.
    before: Option<Counts>,
    /// Told since.
    told: Counts,
    since: BTreeMap<String, Since>,
    /// Counted, and not compared yet.
    counted: Option<Counts>,
    /// When the first was told since.
    first: Option<Instant>,
}

impl Tally {
    /// Counts from here on, unless it does already.
    pub(super) fn start(&mut self, counts: Counts) {
        self.before.get_or_insert(counts);
    }

    pub(super) fn told(&mut self, target: &str, now: Instant) {
        self.first.get_or_insert(now);
        match self.told.get_mut(target) {
            Some(told) => *told += 1,
            None => drop(self.told.insert(target.to_owned(), 1)),
        }
    }

    /// Whether the kernel's counts are to be taken.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.first
            .is_some_and(|first| now.saturating_duration_since(first) >= PERIOD)
    }

    /// Takes what the kernel has counted, to be compared at the next call.
    pub(super) fn take(&mut self, counts: Counts) {
        self.first = None;
        self.counted = Some(counts);
    }

    /// Each target of which more was counted than told.
    pub(super) fn compare(&mut self) -> Vec<Unreported> {
        let Some(counted) = self.counted.take() else {
            return Vec::new();
        };
        let before = self.before.replace(counted.clone()).unwrap_or_default();
        let told = std::mem::take(&mut self.told);
        let mut lines = Vec::new();
        for (target, count) in counted {
            let since = self.since.entry(target.clone()).or_default();
            // A counter that began again says nothing of before.
            since.counted += count.saturating_sub(before.get(&target).copied().unwrap_or_default());
            since.told += told.get(&target).copied().unwrap_or_default();
            if since.counted > since.told {
                lines.push(Unreported {
                    target,
                    counted: since.counted,
                    told: since.told,
                });
                *since = Since::default();
            } else {
                // What was told after it was counted belongs to the next comparison.
                *since = Since {
                    counted: 0,
                    told: since.told - since.counted,
                };
            }
        }
        self.since.retain(|_, since| since.told > 0);
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(main: u64) -> Counts {
        BTreeMap::from([("main".to_owned(), main)])
    }

    #[test]
    fn what_was_counted_and_not_told_is_said() {
        let (mut tally, start) = (Tally::default(), Instant::now());
        tally.start(counts(100));
        assert!(!tally.is_due(start + PERIOD) && tally.compare().is_empty());
        for _ in 0..5 {
            tally.told("main", start);
        }
        assert!(!tally.is_due(start) && tally.is_due(start + PERIOD));
        // Two more came, and were told before they were compared.
        tally.take(counts(105));
        tally.told("main", start);
        tally.told("main", start);
        assert_eq!(tally.compare(), []);
        tally.take(counts(1107));
        tally.told("main", start);
        let told: Vec<String> = tally.compare().iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            ["kernel counted 1002 denials for target main; only 3 were reported individually, the rest came too fast"]
        );
        assert!(tally.compare().is_empty());
        // A target made anew counts from nothing.
        tally.take(counts(3));
        assert_eq!(tally.compare(), []);
    }
}
