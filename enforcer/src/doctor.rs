//! `enforcer doctor`: what this host, or an unpacked image of one, can do, what would enforce here, and what weakens it.
//!
//! Collect → judge → render: only `collect` and `image` look at anything, `judge` is pure.

use std::path::Path;

use crate::wire::doctor::Report;

mod buses;
mod collect;
mod image;
mod judge;
mod legacy;
mod links;
mod order;
mod render;
#[cfg(test)]
mod tests;

/// Looks at this host.
pub(crate) async fn host(config: &Path) -> Report {
    judge::host(&collect::host(config).await)
}

/// Looks at an unpacked image, of which nothing is run.
pub(crate) fn image(root: &Path, config: &Path) -> std::io::Result<Report> {
    Ok(judge::image(&image::collect(root, config)?))
}

impl Report {
    /// As the exit code: 0 nothing weakens, 1 something does, 2 something could not be looked at.
    #[must_use]
    pub fn code(&self) -> u8 {
        match (self.findings.is_empty(), self.unseen.is_empty()) {
            (false, _) => 1,
            (true, false) => 2,
            (true, true) => 0,
        }
    }
}
