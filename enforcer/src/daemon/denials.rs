//! Denials on their way from the kernel to those who asked for them.

use std::{
    collections::HashMap,
    time::{Duration, Instant, SystemTime},
};

use enforcer_ebpf::{DialRecord, EventRecord};
use tokio::sync::{broadcast, mpsc};
use tracing::warn;

use super::{About, Daemon, DaemonError, recent::Origin, tally::Counts};
use crate::{
    backend::{Logged, NflogListener, Ring},
    events::{self, Filter},
    sweep::SweepReport,
    wire::{DenialSum, Event, Lost, Reply},
};

/// Denials read at once, and how long they are read for: what comes faster is counted as lost. With the rest that
/// follows, a flood takes no more than a tenth of one processor, however slow that is (F10).
const EVENTS_AT_ONCE: usize = 1024;
const EVENT_TIME: Duration = Duration::from_millis(5);
/// Connections of one user that a sweep logs one by one.
const LOGGED_OF_SWEEP: usize = 16;

impl Daemon {
    /// The ring buffer of the kernel programs, where they are active.
    pub(super) fn denials(&mut self) -> Result<Option<Ring<EventRecord>>, DaemonError> {
        self.begin_to_count();
        let Some(source) = self.enforcement.events()? else {
            return Ok(None);
        };
        // Pinned, it counts on from what was told before this process.
        let lost = self.enforcement.lost()?;
        self.feed.lost = Some(self.feed.lost.map_or(lost, |told| told.min(lost)));
        Ok(Some(source))
    }

    /// The dials that the kernel programs tell of, where they are active (N8).
    pub(super) fn dials(&mut self) -> Result<Option<Ring<DialRecord>>, DaemonError> {
        Ok(self.enforcement.dials()?)
    }

    /// The denials of nftables, where it has just begun to log them.
    pub(super) fn logged(&mut self) -> Option<NflogListener> {
        self.enforcement.logged()
    }

    /// As [`Daemon::take_events`], of what nftables has logged: so many a second of each target, of which there may be
    /// many.
    pub(super) fn take_logged(&mut self, source: &mut NflogListener) -> bool {
        let now = Instant::now();
        let all = take_batch(|| {
            match source.take()? {
                Logged::Denial(denial) => {
                    let mut event = events::read_logged(&denial, SystemTime::now());
                    events::identify(&mut event, &mut self.identities, now);
                    self.feed.record(event, now);
                }
                Logged::Dial(dial) => self.dialled(dial),
            }
            Some(())
        });
        let lost = source.take_lost();
        if lost > 0 {
            self.feed.lost_logged += lost;
            self.feed.publish(Event::Lost(Lost::new(lost)));
        }
        all
    }

    /// Takes what has come, up to a limit: a flood of denials must not keep the loop from its work. True if all was
    /// taken.
    pub(super) fn take_events(&mut self, source: &mut Ring<EventRecord>) -> bool {
        let Ok(boot) = events::boot_time() else { return true };
        let now = Instant::now();
        let all = take_batch(|| {
            let record = source.take()?;
            let mut event = events::read(&record, boot);
            events::identify(&mut event, &mut self.identities, now);
            self.feed.record(event, now);
            Some(())
        });
        if self.feed.may_tell_lost(all, Instant::now())
            && let Ok(lost) = self.enforcement.lost()
        {
            self.feed.tell_lost(lost);
        }
        all
    }

    /// What was counted before this process is not its to tell.
    fn begin_to_count(&mut self) {
        if let Some(counts) = self.counted() {
            self.feed.tally.start(counts);
        }
    }

    /// Logs what is due: denials of kinds that went on, and of which targets more was denied than was told.
    pub(super) fn tell_denials(&mut self) {
        let now = Instant::now();
        self.feed.log_due(now);
        if self.feed.tally.is_due(now)
            && let Some(counts) = self.counted()
        {
            self.feed.tally.take(counts);
        }
    }

    /// Logs what is not told yet, at the end.
    pub(super) fn tell_rest_of_denials(&mut self) {
        let counts = self.counted();
        self.feed.log_rest(counts, Instant::now());
    }

    /// What the kernel has counted of each target; none where it cannot be read, which others report.
    fn counted(&mut self) -> Option<Counts> {
        let targets = self.inputs.policy().targets.iter().map(|target| target.name.clone());
        self.enforcement.denial_counts(targets.collect()).ok()
    }

    /// Takes what a sweep found and did.
    pub(super) fn swept(&mut self, mut report: SweepReport) {
        let now = Instant::now();
        self.faults.set(About::Sweep, report.fault);
        let mut logged: HashMap<Origin, usize> = HashMap::new();
        let mut more = 0_u64;
        let connections = &mut report.existing.connections;
        for existing in report.news.iter_mut().chain(connections) {
            existing.user = self.identities.name_of(existing.uid);
            existing.cgroup = self.identities.path_of(existing.cgroup_id, None, now);
        }
        for existing in report.news {
            let text = existing.to_string();
            let line = Event::Existing(existing);
            let of_user = logged.entry(Origin::from_line(&line)).or_default();
            if *of_user < LOGGED_OF_SWEEP {
                *of_user += 1;
                warn!("{text}");
            } else {
                more += 1;
            }
            self.feed.publish(line);
        }
        if more > 0 {
            warn!("the rules would deny {more} more existing connections (see enforcer events)");
        }
        if report.lost > 0 {
            self.feed.publish(Event::Lost(Lost::new(report.lost)));
        }
        self.existing = Some(report.existing);
    }
}

/// Takes so many as may be taken at once; true if no more are there.
fn take_batch(mut take: impl FnMut() -> Option<()>) -> bool {
    let until = Instant::now() + EVENT_TIME;
    for _ in 0..EVENTS_AT_ONCE {
        if take().is_none() {
            return true;
        }
        if Instant::now() > until {
            break;
        }
    }
    false
}

pub(super) async fn send_events(
    kept: Vec<Event>,
    live: Option<broadcast::Receiver<Event>>,
    filter: Filter,
    replies: mpsc::Sender<Reply>,
) {
    for line in kept {
        if replies.send(Reply::Event(line)).await.is_err() {
            return;
        }
    }
    let Some(mut live) = live else { return };
    loop {
        let line = match live.recv().await {
            Ok(line) => line,
            Err(broadcast::error::RecvError::Lagged(lost)) => Event::Lost(Lost::new(lost)),
            Err(broadcast::error::RecvError::Closed) => return,
        };
        if !filter.lets(&line) {
            // A caller that has hung up hears nothing of it.
            if replies.is_closed() {
                return;
            }
            continue;
        }
        if replies.send(Reply::Event(line)).await.is_err() {
            return;
        }
    }
}

/// Sends what denials come to, a line each.
pub(super) async fn send_sums(sums: Vec<DenialSum>, replies: mpsc::Sender<Reply>) {
    for sum in sums {
        if replies.send(Reply::Sum(Box::new(sum))).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helping_ends_with_what_is_there_or_with_its_limits() {
        let mut left = 10;
        let mut taken = 0;
        let mut take = || {
            left -= 1;
            taken += 1;
            (left >= 0).then_some(())
        };
        assert!(take_batch(&mut take));
        assert_eq!(taken, 11);
        let mut taken = 0;
        let more = |taken: &mut usize, wait| {
            *taken += 1;
            std::thread::sleep(wait);
            Some(())
        };
        assert!(!take_batch(|| more(&mut taken, EVENT_TIME)));
        assert!(taken <= 2, "{taken}");
        let mut taken = 0;
        assert!(!take_batch(|| more(&mut taken, Duration::ZERO)));
        assert!(taken <= EVENTS_AT_ONCE);
    }
}
