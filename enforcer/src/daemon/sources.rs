//! Descriptors that the loop waits for.

use std::{io, os::fd::AsRawFd};

use tokio::io::{
    Interest,
    unix::{AsyncFd, AsyncFdReadyGuard, AsyncFdReadyMutGuard},
};

use crate::bosh::Watch;

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
