//! Users that the configuration names, looked up again: when the files of users change, and each minute for other name services (N9).

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tracing::{error, info};

use super::{About, Daemon};
use crate::policy::{HostUsers, Uid, Users};

/// Between two lookups where no file has changed.
const PERIOD: Duration = Duration::from_mins(1);
/// Where name services keep users themselves.
const FILES: [&str; 2] = ["/etc/passwd", "/etc/group"];

/// What was looked up.
pub(super) type Found = BTreeMap<String, io::Result<Option<Uid>>>;

impl Users for Found {
    fn uid(&self, name: &str) -> io::Result<Option<Uid>> {
        match self.get(name) {
            Some(Ok(uid)) => Ok(*uid),
            // As it was known before.
            Some(Err(_)) | None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// The files as they were when users were looked up last.
type Seen = [Option<(u64, i64, i64, u64)>; 2];

/// When to look users up, and the lookup under way: on a thread of its own, as a name service may take its time.
#[derive(Debug)]
pub(super) struct UserLookups {
    seen: Seen,
    last: Instant,
    pub(super) under_way: JoinSet<Found>,
}

impl UserLookups {
    pub(super) fn new() -> Self {
        Self {
            seen: seen(),
            last: Instant::now(),
            under_way: JoinSet::new(),
        }
    }
}

fn seen() -> Seen {
    FILES.map(|file| {
        let meta = fs::metadata(file).ok()?;
        Some((meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len()))
    })
}

impl Daemon {
    /// Begins to look users up, if it is time.
    pub(super) fn look_at_users(&mut self) {
        let names: Vec<String> = self.wanted.users.keys().cloned().collect();
        if names.is_empty() || !self.user_lookups.under_way.is_empty() {
            return;
        }
        let seen = seen();
        if seen == self.user_lookups.seen && self.user_lookups.last.elapsed() < PERIOD {
            return;
        }
        (self.user_lookups.seen, self.user_lookups.last) = (seen, Instant::now());
        self.user_lookups.under_way.spawn_blocking(|| {
            let found = |name: String| {
                let uid = HostUsers.uid(&name);
                (name, uid)
            };
            names.into_iter().map(found).collect()
        });
    }

    /// A name that means another number now is a change of rules.
    pub(super) fn users_found(&mut self, found: &Found) {
        let mut wanted = match self.wanted.with_users(found) {
            Ok(wanted) => wanted,
            Err(error) => return error!("look up the configuration's users again: {error}"),
        };
        wanted.take_bus(self.bus.as_ref());
        if wanted.users == self.wanted.users {
            return;
        }
        let words = |uid: Option<&Option<Uid>>| {
            let uid = uid.copied().flatten();
            uid.map_or_else(|| "nobody".to_owned(), |uid| format!("uid {uid}"))
        };
        for (name, uid) in &wanted.users {
            let before = self.wanted.users.get(name);
            if before != Some(uid) {
                info!("user {name} is {} now, and was {}", words(Some(uid)), words(before));
            }
        }
        if let Err(error) = self.change_to(wanted) {
            let fault = format!("{error}; the rule set before stays in force");
            self.faults.set(About::RuleSet, Some(fault));
        }
    }
}
