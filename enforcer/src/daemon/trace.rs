//! The programs' own log, shown at log level trace; at any other level they are loaded without that code.

use tracing::warn;

use super::sources::readable;
use crate::backend::Trace;

/// aya-log's number for the level trace.
const TRACE_IN_KERNEL: u8 = 5;

/// The level to load the programs with.
pub(super) fn level() -> u8 {
    if tracing::enabled!(tracing::Level::TRACE) {
        TRACE_IN_KERNEL
    } else {
        0
    }
}

/// Shows what the programs log.
pub(super) fn follow(trace: Trace) {
    match readable(trace) {
        Ok(mut trace) => drop(tokio::spawn(async move {
            while let Ok(mut guard) = trace.readable_mut().await {
                guard.get_inner_mut().flush();
                guard.clear_ready();
            }
        })),
        Err(error) => warn!("the programs' trace cannot be shown: {error}"),
    }
}
