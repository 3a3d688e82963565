//! All that the loop waits for: descriptors, signals, timers, calls, and what its own tasks bring. Each becomes a
//! [`Wakeup`].

use std::{
    io,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use enforcer_ebpf::{DialRecord, EventRecord};
use futures_util::FutureExt as _;
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task,
    time::{sleep, sleep_until},
};

use super::{About, Daemon, DaemonError, TICK, links::LinkLooks, save::SaveResult, ticks::Ticks, users::UserAnswers};
use crate::{
    backend::{LinkLook, LinksSeen, NflogListener, NftChanges, Ring},
    bosh::Watch,
    control::Call,
    host::LocalChanges,
    resolve::PartialAnswer,
    sweep::{self, SweepReport},
};

/// How long word of local routes is left to gather once some was taken: they may come by thousands.
const GATHER: Duration = Duration::from_millis(100);
/// How long changes of `nf_tables` are left to gather once one was looked at.
const CALM: Duration = Duration::from_millis(20);
/// The rest between two helpings of denials, so that a flood does not keep the loop from its work.
const EVENT_REST: Duration = Duration::from_millis(50);

/// What the loop is woken by.
pub(super) enum Wakeup {
    /// SIGHUP.
    Reload,
    /// SIGTERM or SIGINT.
    Stop,
    /// A lookup has ended.
    Answer(Result<(task::Id, PartialAnswer), task::JoinError>),
    /// Users have been looked up.
    Users(UserAnswers),
    /// Links have been looked at.
    Links(LinksSeen),
    /// A lookup is, or the end of an address, or of the rest after a dial.
    Due,
    /// Local routes have changed.
    Routes,
    /// `nf_tables` has changed.
    Tables,
    /// The kernel programs have denied something.
    Denials,
    /// nftables has.
    Logged,
    /// An open gate has told of a dial.
    Dials,
    /// The BOSH agent's settings may have changed.
    Settings,
    /// What is active is to be kept.
    Save,
    /// What was active has been kept, or could not be.
    Saved(SaveResult),
    /// A grant ends.
    Expiry,
    /// A sweep has ended.
    Swept(SweepReport),
    /// Once a second.
    Tick,
    /// Somebody asks for something.
    Call(Call),
}

/// What the loop waits for, but for its own tasks.
pub(super) struct Sources {
    hangup: Signal,
    ends: [Signal; 2],
    routes: Source<LocalChanges>,
    gather: Pause,
    tables: Source<NftChanges>,
    calm: Pause,
    denials: Source<Ring<EventRecord>>,
    logged: Source<NflogListener>,
    /// From denials of either backend.
    rest: Pause,
    dials: Source<Ring<DialRecord>>,
    settings: Option<Watch>,
    calls: mpsc::Receiver<Call>,
    swept: mpsc::Receiver<SweepReport>,
    ticks: Source<Ticks>,
    links: LinkLooks,
    /// Some could not be opened.
    misses_some: bool,
}

impl Sources {
    /// Opens all of them but for the calls, and has sweeps made.
    pub(super) fn open(daemon: &mut Daemon, calls: mpsc::Receiver<Call>) -> Result<Self, DaemonError> {
        let failed = |action| move |error| DaemonError::Io { action, error };
        let hangup = waited("SIGHUP", SignalKind::hangup())?;
        let ends = [
            waited("SIGTERM", SignalKind::terminate())?,
            waited("SIGINT", SignalKind::interrupt())?,
        ];
        let routes = LocalChanges::subscribe().and_then(Source::of);
        let routes = routes.map_err(failed("watch local routes"))?;
        // Some may have changed before.
        daemon.look_at_routes();
        let (report, swept) = mpsc::channel(1);
        let ticks = Ticks::every(TICK).and_then(Source::of);
        let sources = Self {
            hangup,
            ends,
            routes,
            gather: Pause::default(),
            denials: Source::some(daemon.denials()?)?,
            dials: Source::some(daemon.dials()?)?,
            logged: Source::some(daemon.logged())?,
            rest: Pause::default(),
            tables: NftChanges::subscribe().and_then(Source::of).unwrap_or(Source(None)),
            calm: Pause::default(),
            settings: daemon.watch(None),
            calls,
            swept,
            ticks: ticks.map_err(failed("start a timer"))?,
            links: LinkLooks::default(),
            misses_some: false,
        };
        tokio::spawn(sweep::run(daemon.sweeps.clone(), report));
        Ok(sources)
    }

    /// Waits until something happens.
    pub(super) async fn next(&mut self, daemon: &mut Daemon) -> Wakeup {
        let due = daemon.next_due();
        let until_expiry = daemon.until_expiry();
        let keep = daemon.kept.due();
        let [terminate, interrupt] = &mut self.ends;
        loop {
            tokio::select! {
                _ = self.hangup.recv() => return Wakeup::Reload,
                _ = terminate.recv() => return Wakeup::Stop,
                _ = interrupt.recv() => return Wakeup::Stop,
                Some(joined) = daemon.lookups.join_next_with_id() => return Wakeup::Answer(joined),
                Some(Ok(found)) = daemon.user_lookups.under_way.join_next() => return Wakeup::Users(found),
                seen = self.links.next() => return Wakeup::Links(seen),
                () = until(due) => return Wakeup::Due,
                () = self.gather.over() => {}
                () = self.routes.ready(), if !self.gather.is_on() => {
                    self.routes.take_all(|routes| routes.drain());
                    return Wakeup::Routes;
                }
                () = self.calm.over() => {}
                () = self.tables.ready(), if !self.calm.is_on() => {
                    self.tables.take_all(|tables| tables.drain());
                    return Wakeup::Tables;
                }
                () = self.rest.over() => {}
                () = self.denials.ready(), if !self.rest.is_on() => return Wakeup::Denials,
                () = self.logged.ready(), if !self.rest.is_on() => return Wakeup::Logged,
                () = self.dials.ready() => return Wakeup::Dials,
                () = changed(self.settings.as_mut()) => return Wakeup::Settings,
                () = until(keep) => return Wakeup::Save,
                saved = daemon.kept.saved() => return Wakeup::Saved(saved),
                () = sleep(until_expiry) => return Wakeup::Expiry,
                Some(report) = self.swept.recv() => return Wakeup::Swept(report),
                () = self.ticks.ready() => {
                    self.ticks.take_all(Ticks::take);
                    return Wakeup::Tick;
                }
                Some(call) = self.calls.recv() => return Wakeup::Call(call),
            }
        }
    }

    /// Leaves word of local routes to gather, once what came was looked at.
    pub(super) fn gather_routes(&mut self) {
        self.gather.begin(GATHER);
    }

    /// As [`Sources::gather_routes`], changes of `nf_tables`.
    pub(super) fn gather_tables(&mut self) {
        self.calm.begin(CALM);
    }

    /// Has denials of the kernel programs taken, a helping of them: `take` tells whether it was all there were.
    pub(super) fn take_denials(&mut self, take: impl FnOnce(&mut Ring<EventRecord>) -> bool) {
        if !self.denials.take(take) {
            self.rest.begin(EVENT_REST);
        }
    }

    /// As [`Sources::take_denials`], of what nftables has logged.
    pub(super) fn take_logged(&mut self, take: impl FnOnce(&mut NflogListener) -> bool) {
        if !self.logged.take(take) {
            self.rest.begin(EVENT_REST);
        }
    }

    /// Has all dials taken.
    pub(super) fn take_dials(&mut self, take: impl FnOnce(&mut Ring<DialRecord>)) {
        self.dials.take_all(take);
    }

    /// Has a look at the links taken, unless one still is.
    pub(super) fn look_at_links(&mut self, look: LinkLook) {
        self.links.begin(look);
    }

    /// The watched settings of a BOSH agent.
    pub(super) fn settings(&mut self) -> Option<&mut Watch> {
        self.settings.as_mut()
    }

    /// Whether [`Sources::follow`] is to be tried again.
    pub(super) fn misses_some(&self) -> bool {
        self.misses_some
    }

    /// Opens anew what depends on the configuration, as another one may have brought another backend or other settings.
    /// What cannot be opened is tried again; what was open stays so (F4).
    pub(super) fn follow(&mut self, daemon: &mut Daemon) {
        let opened = self.follow_denials(daemon);
        self.misses_some = opened.is_err();
        let fault = |error| format!("{error}; denials may be counted and not reported until this works");
        daemon.faults.set(About::Denials, opened.err().map(fault));
        self.settings = daemon.watch(self.settings.take());
    }

    fn follow_denials(&mut self, daemon: &mut Daemon) -> Result<(), DaemonError> {
        self.denials = Source::some(daemon.denials()?)?;
        self.dials = Source::some(daemon.dials()?)?;
        // Handed out once. A listener of a table that has gone would keep its group from the next one.
        if let Some(logged) = daemon.logged() {
            self.logged = Source::some(Some(logged))?;
        } else if !daemon.enforcement.backend().has_nftables() {
            self.logged = Source(None);
        }
        Ok(())
    }
}

/// A descriptor that may have something to read, if there is one.
struct Source<T: AsRawFd>(Option<AsyncFd<T>>);

impl<T: AsRawFd> Source<T> {
    fn of(owner: T) -> io::Result<Self> {
        readable(owner).map(|fd| Self(Some(fd)))
    }

    fn some(owner: Option<T>) -> Result<Self, DaemonError> {
        let source = owner.map_or(Ok(Self(None)), Self::of);
        source.map_err(|error| DaemonError::Io {
            action: "watch for denials",
            error,
        })
    }

    /// Waits until there is something; for ever where there is no descriptor. It counts as read once it was taken.
    async fn ready(&mut self) {
        if let Some(fd) = &mut self.0
            && fd.readable_mut().await.is_ok()
        {
            return;
        }
        std::future::pending::<()>().await;
    }

    /// Has taken what is there: `take` tells whether that was all, as this does then.
    fn take(&mut self, take: impl FnOnce(&mut T) -> bool) -> bool {
        let Some(Some(Ok(mut ready))) = self.0.as_mut().map(|fd| fd.readable_mut().now_or_never()) else {
            return true;
        };
        let all = take(ready.get_inner_mut());
        if all {
            ready.clear_ready();
        }
        all
    }

    fn take_all(&mut self, take: impl FnOnce(&mut T)) {
        self.take(|source| {
            take(source);
            true
        });
    }
}

/// Lets the loop wait for a descriptor. Its owner moves into the result, so that it cannot be closed meanwhile.
#[allow(
    deprecated,
    reason = "the successor is the same call, marked unsafe for owners that change their descriptor"
)]
pub(super) fn readable<T: AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(owner, Interest::READABLE)
}

/// For a while a source is not asked.
#[derive(Default)]
struct Pause(Option<Instant>);

impl Pause {
    fn begin(&mut self, length: Duration) {
        self.0 = Some(Instant::now() + length);
    }

    fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Waits until it is over; for ever where there is none.
    async fn over(&mut self) {
        until(self.0).await;
        self.0 = None;
    }
}

fn waited(name: &str, kind: SignalKind) -> Result<Signal, DaemonError> {
    signal(kind).map_err(|error| DaemonError::Io {
        action: "wait for signals",
        error: io::Error::new(error.kind(), format!("{name}: {error}")),
    })
}

/// Waits until then; for ever where that is never.
async fn until(then: Option<Instant>) {
    match then {
        Some(then) => sleep_until(then.into()).await,
        None => std::future::pending().await,
    }
}

/// Waits until settings may have changed; for ever where none are watched.
async fn changed(watch: Option<&mut Watch>) {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}
