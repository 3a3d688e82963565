//! Denials on their way from the kernel to those who asked for them.

use std::{
    os::fd::AsRawFd,
    time::{Duration, Instant, SystemTime},
};

use enforcer_ebpf::{DialRecord, EventRecord};
use tokio::{
    io::unix::{AsyncFd, AsyncFdReadyMutGuard},
    sync::{broadcast, mpsc},
};

use tracing::info;

use super::{About, Daemon, DaemonError, sources::readable, tally::Counts};
use crate::{
    backend::{Denials, Logged, Ring},
    events,
    wire::{Event, Line, Lost, Reply},
};

/// Denials read at once, and how long they are read for: what comes faster is counted as lost. With the rest that
/// follows, a flood takes no more than a tenth of one processor, however slow that is (F10).
const EVENTS_AT_ONCE: usize = 1024;
const EVENT_TIME: Duration = Duration::from_millis(5);
/// The rest between two helpings of denials, so that a flood does not keep the loop from its work.
const EVENT_REST: Duration = Duration::from_millis(50);
/// How long a flood may go on before what is lost by it is told.
const LONG_FLOOD: Duration = Duration::from_secs(2);

impl Daemon {
    /// The ring buffer of the kernel programs, where they are active.
    pub(super) fn denials(&mut self) -> Result<Option<AsyncFd<Ring<EventRecord>>>, DaemonError> {
        self.begin_to_count();
        let Some(source) = self.enforcement.events()? else {
            return Ok(None);
        };
        let source = watched(source)?;
        // Pinned, it counts on from what was told before this process.
        let lost = self.enforcement.lost()?;
        self.lost = Some(self.lost.map_or(lost, |told| told.min(lost)));
        Ok(Some(source))
    }

    /// The dials that the kernel programs tell of, where they are active (N8).
    pub(super) fn dials(&mut self) -> Result<Option<AsyncFd<Ring<DialRecord>>>, DaemonError> {
        self.enforcement.dials()?.map(watched).transpose()
    }

    /// The denials of nftables, where it has just begun to log them.
    pub(super) fn logged(&mut self) -> Result<Option<AsyncFd<Denials>>, DaemonError> {
        self.enforcement.logged().map(watched).transpose()
    }

    /// Opens anew where denials come from, as another configuration may have brought another backend. False where that
    /// has to be tried again; what was open stays so (F4).
    pub(super) fn follow_denials(
        &mut self,
        denials: &mut Option<AsyncFd<Ring<EventRecord>>>,
        dials: &mut Option<AsyncFd<Ring<DialRecord>>>,
        logged: &mut Option<AsyncFd<Denials>>,
    ) -> bool {
        let opened = self.denials().and_then(|fresh| {
            *denials = fresh;
            *dials = self.dials()?;
            if let Some(fresh) = self.logged()? {
                *logged = Some(fresh);
            }
            Ok(())
        });
        let fault = |error| format!("{error}; denials may be counted and not reported until this works");
        let (followed, fault) = (opened.is_ok(), opened.err().map(fault));
        self.faults.set(About::Denials, fault);
        followed
    }

    /// As [`Daemon::take_events`], of what nftables has logged: so many a second of each target, of which there may be
    /// many.
    pub(super) fn take_logged(&mut self, source: &mut Denials) -> bool {
        let all = helping(|| {
            match source.take()? {
                Logged::Denial(denial) => self.denied(events::read_logged(&denial, SystemTime::now())),
                Logged::Dial(dial) => self.dialled(dial),
            }
            Some(())
        });
        let lost = source.take_lost();
        if lost > 0 {
            self.lost_logged += lost;
            self.publish(Line::Lost(Lost::new(lost)));
        }
        all
    }

    /// Takes what has come, up to a limit: a flood of denials must not keep the loop from its work. True if all was
    /// taken.
    pub(super) fn take_events(&mut self, source: &mut Ring<EventRecord>) -> bool {
        let Ok(boot) = events::boot_time() else { return true };
        let all = helping(|| {
            let record = source.take()?;
            self.denied(events::read(&record, boot));
            Some(())
        });
        // What was lost is younger than what was still to be read. In a flood without an end it is told all the same.
        let since = *self.flood.get_or_insert_with(Instant::now);
        if all || since.elapsed() > LONG_FLOOD {
            self.flood = None;
            self.tell_lost();
        }
        all
    }

    fn tell_lost(&mut self) {
        if let (Ok(lost), Some(told)) = (self.enforcement.lost(), self.lost)
            && lost > told
        {
            self.publish(Line::Lost(Lost::new(lost - told)));
            self.lost = Some(lost);
        }
    }

    fn denied(&mut self, event: Event) {
        let now = Instant::now();
        self.tally.told(&event.target, now);
        if let Some(line) = self.journal.take(&event, now) {
            info!("{line}");
        }
        self.publish(Line::Event(event));
    }

    /// What was counted before this process is not its to tell.
    fn begin_to_count(&mut self) {
        if let Some(counts) = self.counted() {
            self.tally.start(counts);
        }
    }

    /// Logs what is due: denials of kinds that went on, and of which targets more was denied than was told.
    pub(super) fn tell_denials(&mut self) {
        let now = Instant::now();
        let lines = [self.journal.due(now), self.tally.compare()];
        lines.iter().flatten().for_each(|line| info!("{line}"));
        if self.tally.is_due(now)
            && let Some(counts) = self.counted()
        {
            self.tally.take(counts);
        }
    }

    /// Logs what is not told yet, at the end.
    pub(super) fn tell_rest_of_denials(&mut self) {
        if let Some(counts) = self.counted() {
            self.tally.take(counts);
        }
        let lines = [self.journal.rest(Instant::now()), self.tally.compare()];
        lines.iter().flatten().for_each(|line| info!("{line}"));
    }

    /// What the kernel has counted of each target; none where it cannot be read, which others report.
    fn counted(&mut self) -> Option<Counts> {
        let targets = self.inputs.policy().targets.iter().map(|target| target.name.clone());
        self.enforcement.denied(targets.collect()).ok()
    }

    pub(super) fn publish(&mut self, line: Line) {
        self.recent.push(line.clone());
        let _ = self.followers.send(line);
    }
}

/// Takes so many as may be taken at once; true if no more are there.
fn helping(mut take: impl FnMut() -> Option<()>) -> bool {
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

/// A source of denials or dials that tells when there is something to read.
fn watched<T: AsRawFd>(source: T) -> Result<AsyncFd<T>, DaemonError> {
    readable(source).map_err(|error| DaemonError::Io {
        action: "watch for denials",
        error,
    })
}

/// Until when to take no more: where not all was taken, there is more at once.
pub(super) fn rest_after<T: AsRawFd>(all: bool, mut guard: AsyncFdReadyMutGuard<'_, T>) -> Option<Instant> {
    if all {
        guard.clear_ready();
        return None;
    }
    Some(Instant::now() + EVENT_REST)
}

pub(super) async fn send_events(
    kept: Vec<Line>,
    live: Option<broadcast::Receiver<Line>>,
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
            Err(broadcast::error::RecvError::Lagged(lost)) => Line::Lost(Lost::new(lost)),
            Err(broadcast::error::RecvError::Closed) => return,
        };
        if replies.send(Reply::Event(line)).await.is_err() {
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
        assert!(helping(&mut take));
        assert_eq!(taken, 11);
        let mut taken = 0;
        let more = |taken: &mut usize, wait| {
            *taken += 1;
            std::thread::sleep(wait);
            Some(())
        };
        assert!(!helping(|| more(&mut taken, EVENT_TIME)));
        assert!(taken <= 2, "{taken}");
        let mut taken = 0;
        assert!(!helping(|| more(&mut taken, Duration::ZERO)));
        assert!(taken <= EVENTS_AT_ONCE);
    }
}
