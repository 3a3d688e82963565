//! The summary of denials on disk: in the state directory, replaced whole, read only if its owner alone can have
//! written it (F6).

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    Budgets, Caller, Place, Summary,
    summary::{Kind, Known, Sum, add_to},
};
use crate::state::{self, ROOT, StateError};

/// The file, in `state_dir`.
const FILE: &str = "denials.json";
const SCHEMA: &str = "enforcer/denials-file/1";

/// Why denials of before cannot be read, or those of now not be kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeptError {
    /// The file, or its directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// Not what we write.
    #[error("{} is damaged ({fault}) and ignored; it is replaced after the next denial", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
}

/// The file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kept {
    schema: String,
    kinds: Vec<(Caller, Kind, Known)>,
    more_kinds: Vec<(Caller, Sum)>,
    more_users: Option<Sum>,
    unreported: BTreeMap<String, Sum>,
}

impl Kept {
    pub(crate) fn of(summary: &Summary) -> Self {
        let callers = || summary.kinds.callers.iter();
        let kinds = callers().flat_map(|(caller, budget)| {
            let kinds = budget.kinds.iter();
            kinds.map(|(kind, known)| (*caller, kind.clone(), known.clone()))
        });
        let more = callers().filter_map(|(caller, budget)| Some((*caller, budget.beyond.clone()?)));
        Self {
            schema: SCHEMA.to_owned(),
            kinds: kinds.collect(),
            more_kinds: more.collect(),
            more_users: summary.kinds.beyond.clone(),
            unreported: summary.unreported.clone(),
        }
    }

    /// Within today's limits; what is too old is forgotten.
    fn summary(self, now: Timestamp) -> Summary {
        let mut summary = Summary::default();
        let kinds: &mut Budgets<Kind, Known, Sum> = &mut summary.kinds;
        for (caller, kind, known) in self.kinds {
            let sum = known.sum.clone();
            if let Place::Beyond(beyond) = kinds.place(caller, kind, || known) {
                add_to(beyond, sum);
            }
        }
        for (caller, sum) in self.more_kinds {
            add_to(&mut kinds.of(caller).beyond, sum);
        }
        if let Some(sum) = self.more_users {
            add_to(&mut kinds.beyond, sum);
        }
        summary.unreported = self.unreported;
        summary.take_changed(now);
        summary
    }

    /// Writes it.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), StateError> {
        state::make(dir)?;
        self.save_as(ROOT, dir)
    }

    fn save_as(&self, owner: u32, dir: &Path) -> Result<(), StateError> {
        let text = serde_json::to_vec(self).map_err(|error| StateError::Io {
            action: "write",
            path: dir.join(FILE),
            error: io::Error::from(error),
        })?;
        state::write(owner, dir, FILE, &text)
    }
}

/// Denials of before; none where there is no file.
pub(crate) fn load(dir: &Path, now: Timestamp) -> Result<Summary, KeptError> {
    load_of(ROOT, dir, now)
}

fn load_of(owner: u32, dir: &Path, now: Timestamp) -> Result<Summary, KeptError> {
    let path = dir.join(FILE);
    let Some(bytes) = state::read(owner, dir, &path)? else {
        return Ok(Summary::default());
    };
    let damaged = |fault: String| KeptError::Damaged {
        path: path.clone(),
        fault,
    };
    let kept: Kept = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if kept.schema != SCHEMA {
        return Err(damaged(format!("of another version, not {SCHEMA}")));
    }
    Ok(kept.summary(now))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::events::{Filter, tests::denial};

    type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

    #[test]
    fn what_is_kept_is_what_it_was() -> Result {
        let (dir, now, me) = (tempfile::tempdir()?, Timestamp::now(), nix::unistd::geteuid().as_raw());
        let all = |summary: &Summary| summary.sums(&Filter::default(), now);
        assert!(all(&load_of(me, dir.path(), now)?).is_empty());
        let mut summary = Summary::default();
        for name in 0..70 {
            summary.add(&denial(1000, "monit", &name.to_string()), now);
        }
        for uid in 0..200 {
            summary.add(&denial(uid, "a\nb", "curl"), now);
        }
        summary.add_unreported("monit", 7, now);
        Kept::of(&summary).save_as(me, dir.path())?;
        let loaded = load_of(me, dir.path(), now)?;
        assert_eq!(all(&loaded), all(&summary));
        assert!(all(&loaded).len() > 100);
        Ok(())
    }

    #[test]
    fn f6_what_is_damaged_or_anothers_is_not_read() -> Result {
        let (dir, now, me) = (tempfile::tempdir()?, Timestamp::now(), nix::unistd::geteuid().as_raw());
        Kept::of(&Summary::default()).save_as(me, dir.path())?;
        assert!(matches!(load_of(me + 1, dir.path(), now), Err(KeptError::State(_))));
        let path = dir.path().join(FILE);
        let text = fs::read_to_string(&path)?;
        for (wrong, fault) in [
            (text.replace("file/1", "file/2"), "of another version"),
            (text.replace("unreported", "x"), "unknown field"),
            (String::new(), "EOF"),
        ] {
            fs::write(&path, wrong)?;
            let error = load_of(me, dir.path(), now)
                .map(drop)
                .map_err(|error| error.to_string());
            assert!(error.as_ref().is_err_and(|error| error.contains(fault)), "{error:?}");
        }
        Ok(())
    }
}
