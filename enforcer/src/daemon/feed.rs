//! What happened, on its way to the log and to those who follow: kept for a while, added up, and what was lost of it
//! counted. Time is passed in; only the log is written.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::broadcast;
use tracing::info;

use super::{
    journal::{Journal, Line},
    recent::{KEPT_EVENTS, Recent},
    tally::{Counts, Tally},
};
use crate::{
    events::{Filter, Summary},
    wire::{Denial, DenialSum, Event, Lost},
};

/// How long a flood may go on before what is lost by it is told.
const LONG_FLOOD: Duration = Duration::from_secs(2);

/// What happened.
#[derive(Debug)]
pub(super) struct Feed {
    recent: Recent,
    followers: broadcast::Sender<Event>,
    journal: Journal,
    pub(super) tally: Tally,
    pub(super) summary: Summary,
    /// Those that the kernel programs could not hand over, as far as they were told.
    pub(super) lost: Option<u64>,
    /// Since when there was more to be taken than was taken at once.
    flood: Option<Instant>,
    /// Denials that nftables has logged and this process was too slow to take.
    pub(super) lost_logged: u64,
}

impl Default for Feed {
    fn default() -> Self {
        Self {
            recent: Recent::default(),
            followers: broadcast::channel(KEPT_EVENTS).0,
            journal: Journal::default(),
            tally: Tally::default(),
            summary: Summary::default(),
            lost: None,
            flood: None,
            lost_logged: 0,
        }
    }
}

impl Feed {
    /// A denial: added up, published, and logged where it is not one of too many.
    pub(super) fn record(&mut self, event: Denial, now: Instant) {
        self.tally.told(&event.target, now);
        self.summary.add(&event, Timestamp::now());
        if let Some(line) = self.journal.take(&event, now) {
            log(&line);
        }
        self.publish(Event::Denial(event));
    }

    /// What denials come to.
    pub(super) fn sums(&self, filter: &Filter) -> Vec<DenialSum> {
        self.summary.sums(filter, Timestamp::now())
    }

    pub(super) fn publish(&mut self, line: Event) {
        self.recent.push(line.clone());
        let _ = self.followers.send(line);
    }

    /// What happened last, and what happens from now on if that is asked for.
    pub(super) fn follow(&self, filter: &Filter, live: bool) -> (Vec<Event>, Option<broadcast::Receiver<Event>>) {
        let kept = filter.last_of(self.recent.all());
        (kept, live.then(|| self.followers.subscribe()))
    }

    /// Whether to tell what was lost: it is younger than what is still to be read, but in a flood without an end it is
    /// told all the same. `all` is whether all was taken just now.
    pub(super) fn may_tell_lost(&mut self, all: bool, now: Instant) -> bool {
        let since = *self.flood.get_or_insert(now);
        let may = all || now.duration_since(since) > LONG_FLOOD;
        if may {
            self.flood = None;
        }
        may
    }

    /// Tells how many the kernel programs could not hand over, of so many in all.
    pub(super) fn tell_lost(&mut self, lost: u64) {
        if let Some(told) = self.lost.filter(|told| lost > *told) {
            self.publish(Event::Lost(Lost::new(lost - told)));
            self.lost = Some(lost);
        }
    }

    /// Logs what is due: denials of kinds that went on, and of which targets more was denied than was told.
    pub(super) fn log_due(&mut self, now: Instant) {
        let due = self.journal.due(now);
        self.log_all(&due);
    }

    /// Logs what is not logged yet, at the end.
    pub(super) fn log_rest(&mut self, counts: Option<Counts>, now: Instant) {
        if let Some(counts) = counts {
            self.tally.take(counts);
        }
        let rest = self.journal.rest(now);
        self.log_all(&rest);
    }

    /// Logs these, and of which targets more was denied than was told.
    fn log_all(&mut self, lines: &[Line]) {
        lines.iter().for_each(log);
        for unreported in self.tally.compare() {
            self.summary
                .add_unreported(&unreported.target, unreported.count(), Timestamp::now());
            info!(target = unreported.target, count = unreported.count(), "{unreported}");
        }
    }
}

/// With fields, for whom JSON is logged.
fn log(Line { text, fields }: &Line) {
    info!(
        verdict = fields.verdict.map(|verdict| verdict.to_string()),
        target = fields.target,
        protocol = fields.protocol.map(|protocol| protocol.to_string()),
        endpoint = fields.endpoint,
        uid = fields.uid,
        user = fields.user,
        socket_uid = fields.socket_uid,
        comm = fields.comm,
        exe = fields.exe,
        cgroup = fields.cgroup,
        count = fields.count,
        "{text}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_told_once_what_was_kept_is_read_or_after_a_long_flood() {
        let (mut feed, now) = (Feed::default(), Instant::now());
        assert!(feed.may_tell_lost(true, now));
        assert!(!feed.may_tell_lost(false, now));
        assert!(!feed.may_tell_lost(false, now + LONG_FLOOD));
        assert!(feed.may_tell_lost(false, now + LONG_FLOOD * 2));
        // It goes on: another while.
        assert!(!feed.may_tell_lost(false, now + LONG_FLOOD * 2));
        assert!(feed.may_tell_lost(true, now + LONG_FLOOD * 2));
    }

    #[test]
    fn each_loss_is_told_once_and_what_was_lost_before_is_not() {
        let mut feed = Feed::default();
        feed.tell_lost(7);
        assert_eq!(feed.follow(&Filter::default(), false).0.len(), 0, "nobody counted yet");
        feed.lost = Some(7);
        for (lost, told) in [(7, 0), (9, 1), (9, 1), (10, 2)] {
            feed.tell_lost(lost);
            assert_eq!(feed.follow(&Filter::default(), false).0.len(), told);
        }
    }

    #[test]
    fn a_follower_hears_what_comes_after_what_was_kept() {
        let mut feed = Feed::default();
        feed.publish(Event::Lost(Lost::new(1)));
        let (kept, live) = feed.follow(&Filter::default(), true);
        feed.publish(Event::Lost(Lost::new(2)));
        assert_eq!(kept.len(), 1);
        assert!(live.is_some_and(|mut live| live.try_recv().is_ok() && live.try_recv().is_err()));
        assert_eq!(feed.follow(&Filter::default(), false).0.len(), 2);
    }
}
