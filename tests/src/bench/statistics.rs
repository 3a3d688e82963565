//! A median with its 95 % interval.

use serde::{Deserialize, Serialize};

/// The median of samples, and between which of them the median of all that could be taken lies, 95 times of 100.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Estimate {
    /// The sample in the middle.
    pub median: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// The upper end.
    pub high: f64,
    /// How many samples.
    pub samples: usize,
}

impl Estimate {
    /// By order statistics: of n samples those that lie the root of n, two deviations, from the middle. It asks nothing
    /// of how the samples are distributed. Of no samples there is none.
    #[must_use]
    pub(super) fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.retain(|sample| sample.is_finite());
        samples.sort_unstable_by(f64::total_cmp);
        let count = samples.len();
        let (middle, reach) = (count / 2, count.isqrt());
        let at = |rank: usize| samples.get(rank.min(count.saturating_sub(1))).copied();
        let median = match (count % 2, at(middle), middle.checked_sub(1).and_then(at)) {
            (0, Some(upper), Some(lower)) => f64::midpoint(lower, upper),
            (_, upper, _) => upper?,
        };
        Some(Self {
            median,
            low: at(middle.saturating_sub(reach))?,
            high: at(middle + reach)?,
            samples: count,
        })
    }

    /// Whether both intervals have nothing in common.
    #[must_use]
    pub(super) fn differs(&self, other: &Self) -> bool {
        self.low > other.high || self.high < other.low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_and_its_interval() {
        let of = |count: u32| Estimate::of((1..=count).rev().map(f64::from).collect());
        let all = |low, median, high, samples| {
            Some(Estimate {
                median,
                low,
                high,
                samples,
            })
        };
        assert_eq!(of(0), None);
        assert_eq!(of(1), all(1.0, 1.0, 1.0, 1));
        assert_eq!(of(4), all(1.0, 2.5, 4.0, 4));
        assert_eq!(of(101), all(41.0, 51.0, 61.0, 101));
        assert_eq!(Estimate::of(vec![f64::NAN]), None);
    }

    #[test]
    fn intervals_that_overlap_do_not_differ() {
        let of = |low, high| Estimate {
            median: low,
            low,
            high,
            samples: 9,
        };
        assert!(of(1.0, 2.0).differs(&of(2.1, 3.0)));
        assert!(!of(1.0, 2.0).differs(&of(2.0, 3.0)));
    }
}
