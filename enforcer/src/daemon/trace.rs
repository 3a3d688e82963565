//! The programs' own log, shown at log level trace; at any other level they are loaded without that code.

use aya_log::EbpfLogger;
use tracing::warn;

use super::sources::readable;

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

/// Shows what the programs log, of which this is one, if they were loaded to.
pub(super) fn start(program: u32) {
    if level() == 0 {
        return;
    }
    let logger = EbpfLogger::init_from_id(program).map_err(|error| error.to_string());
    match logger.and_then(|logger| readable(logger).map_err(|error| error.to_string())) {
        Ok(mut logger) => drop(tokio::spawn(async move {
            while let Ok(mut guard) = logger.readable_mut().await {
                guard.get_inner_mut().flush();
                guard.clear_ready();
            }
        })),
        Err(error) => warn!("the programs' trace cannot be shown: {error}"),
    }
}
