//! What an earlier run left on disk of what rules are made from.

use std::{collections::BTreeSet, path::Path};

use tracing::warn;

use crate::{
    policy::Endpoint,
    resolve::Known,
    state::{self, LastGood, Mark, StateError},
};

/// What an earlier run left on disk.
pub(crate) struct SavedRun {
    /// Names, to be protected before any lookup (N7).
    pub(crate) names: Known,
    /// The message bus (B2).
    pub(crate) bus: Option<BTreeSet<Endpoint>>,
    /// What the file holds; none where there is none, or none that can be used.
    pub(crate) mark: Option<Mark>,
    /// Why it cannot be used.
    pub(crate) fault: Option<StateError>,
}

impl SavedRun {
    pub(crate) fn nothing() -> Self {
        Self {
            names: Known::default(),
            bus: None,
            mark: None,
            fault: None,
        }
    }

    /// As [`SavedRun::load`], for the process that is going to write there: what another user has put in its place is
    /// removed first.
    pub(crate) fn claim(dir: &Path) -> (Self, Option<LastGood>) {
        if let Err(error) = state::reclaim(dir) {
            warn!("{error}");
        }
        Self::load(dir)
    }

    /// What is in a state directory, and the rule set itself.
    pub(crate) fn load(dir: &Path) -> (Self, Option<LastGood>) {
        let (good, fault) = match state::load(dir) {
            Ok(good) => (good, None),
            Err(error) => (None, Some(error)),
        };
        let Some((good, mark)) = good else {
            let left = Self {
                fault,
                ..Self::nothing()
            };
            return (left, None);
        };
        (Self::of(&good, Some(mark)), Some(good))
    }

    pub(crate) fn of(good: &LastGood, mark: Option<Mark>) -> Self {
        Self {
            names: good.names.clone(),
            bus: good.bus().cloned(),
            mark,
            fault: None,
        }
    }
}
