//! When to repair what others take away: at once, but not for ever (F5). Pure: time is passed in.

use std::time::{Duration, Instant};

/// How often others took our rules away lately: who fights us is not fought without pause (F5).
#[derive(Debug, Default)]
pub(super) struct Drift {
    /// In a row, each soon after the one before.
    repeats: u32,
    last: Option<Instant>,
}

impl Drift {
    /// Two that are further apart have nothing to do with each other; as long is `status` degraded.
    pub(super) const MEMORY: Duration = Duration::from_secs(30);
    /// So many in a row are repaired at once.
    const AT_ONCE: u32 = 5;

    pub(super) fn happened(&mut self, now: Instant) {
        self.repeats = if self.is_recent(now) { self.repeats + 1 } else { 1 };
        self.last = Some(now);
    }

    pub(super) fn is_recent(&self, now: Instant) -> bool {
        self.last.is_some_and(|last| now.duration_since(last) < Self::MEMORY)
    }

    /// Whether to leave things as they are for now: 1, 2, 4, 8, at most 16 s after the last time.
    pub(super) fn is_paused(&self, now: Instant) -> bool {
        let Some((last, over)) = self.last.zip(self.repeats.checked_sub(Self::AT_ONCE)) else {
            return false;
        };
        now.duration_since(last) < Duration::from_secs(1 << over.min(4))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_are_mended_at_once_and_then_each_waits_longer() {
        let mut drift = Drift::default();
        let mut now = Instant::now();
        for _ in 0..4 {
            drift.happened(now);
            assert!(!drift.is_paused(now));
        }
        let mut last = now;
        for wait in [1, 2, 4, 8, 16, 16] {
            drift.happened(now);
            last = now;
            assert!(drift.is_paused(now));
            assert!(drift.is_paused(now + Duration::from_millis(wait * 1000 - 1)));
            now += Duration::from_secs(wait);
            assert!(!drift.is_paused(now));
        }
        // `status` is degraded for 30 s.
        assert!(drift.is_recent(last + Duration::from_millis(29_999)));
        now = last + Duration::from_secs(30);
        assert!(!drift.is_recent(now));
        drift.happened(now);
        assert!(!drift.is_paused(now));
    }
}
