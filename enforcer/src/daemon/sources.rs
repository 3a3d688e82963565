//! Descriptors that the loop waits for.

use std::{io, os::fd::AsRawFd};

use tokio::{
    io::{
        Interest,
        unix::{AsyncFd, AsyncFdReadyGuard, AsyncFdReadyMutGuard},
    },
    signal::unix::{Signal, SignalKind, signal},
};

use super::DaemonError;
use crate::bosh::Watch;

/// The signals that end the daemon: SIGTERM and SIGINT.
pub(super) struct Ends([Signal; 2]);

impl Ends {
    pub(super) fn new() -> Result<Self, DaemonError> {
        Ok(Self([
            waited("SIGTERM", SignalKind::terminate())?,
            waited("SIGINT", SignalKind::interrupt())?,
        ]))
    }

    /// Waits for one of them.
    pub(super) async fn recv(&mut self) {
        let Self([terminate, interrupt]) = self;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

/// The signal that asks for a reload.
pub(super) fn hangup() -> Result<Signal, DaemonError> {
    waited("SIGHUP", SignalKind::hangup())
}

fn waited(name: &str, kind: SignalKind) -> Result<Signal, DaemonError> {
    signal(kind).map_err(|error| DaemonError::Io {
        action: "wait for signals",
        error: io::Error::new(error.kind(), format!("{name}: {error}")),
    })
}

/// Waits until there is something to read; for ever where there is no source.
pub(super) async fn ready_to_read<T: AsRawFd>(
    source: Option<&AsyncFd<T>>,
) -> Option<io::Result<AsyncFdReadyGuard<'_, T>>> {
    match source {
        Some(source) => Some(source.readable().await),
        None => std::future::pending().await,
    }
}

/// As [`ready_to_read`], for a source that reading changes.
pub(super) async fn ready_to_take<T: AsRawFd>(
    source: Option<&mut AsyncFd<T>>,
) -> Option<io::Result<AsyncFdReadyMutGuard<'_, T>>> {
    match source {
        Some(source) => Some(source.readable_mut().await),
        None => std::future::pending().await,
    }
}

/// Waits until settings may have changed; for ever where none are watched.
pub(super) async fn changed(watch: Option<&mut Watch>) {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
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
