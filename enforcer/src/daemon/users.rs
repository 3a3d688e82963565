//! Users and groups that the configuration names, looked up again: when the files of users change, and each minute for
//! other name services (N9).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tracing::{error, info};

use super::{About, Daemon};
use crate::policy::{Account, HostUsers, Uid, Users};

/// Between two lookups where no file has changed.
const PERIOD: Duration = Duration::from_mins(1);
/// Where name services keep users themselves.
const FILES: [&str; 2] = ["/etc/passwd", "/etc/group"];

/// What was looked up.
pub(super) type UserAnswers = BTreeMap<Account, io::Result<Option<BTreeSet<Uid>>>>;

impl Users for UserAnswers {
    fn uids(&self, account: &Account) -> io::Result<Option<BTreeSet<Uid>>> {
        match self.get(account) {
            Some(Ok(uids)) => Ok(uids.clone()),
            // As it was known before.
            Some(Err(_)) | None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// The files as they were when users were looked up last.
type Fingerprint = [Option<(u64, i64, i64, u64)>; 2];

/// When to look users up, and the lookup under way: on a thread of its own, as a name service may take its time.
#[derive(Debug)]
pub(super) struct UserLookups {
    seen: Fingerprint,
    last: Instant,
    pub(super) under_way: JoinSet<UserAnswers>,
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

fn seen() -> Fingerprint {
    FILES.map(|file| {
        let meta = fs::metadata(file).ok()?;
        Some((meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len()))
    })
}

impl Daemon {
    /// Begins to look users up, if it is time.
    pub(super) fn look_at_users(&mut self) {
        let names: Vec<Account> = self.inputs.config.users.keys().cloned().collect();
        if names.is_empty() || !self.user_lookups.under_way.is_empty() {
            return;
        }
        let seen = seen();
        if seen == self.user_lookups.seen && self.user_lookups.last.elapsed() < PERIOD {
            return;
        }
        (self.user_lookups.seen, self.user_lookups.last) = (seen, Instant::now());
        self.user_lookups.under_way.spawn_blocking(|| {
            let found = |name: Account| {
                let uids = HostUsers.uids(&name);
                (name, uids)
            };
            names.into_iter().map(found).collect()
        });
    }

    /// A name that means another number now is a change of rules. True if another configuration was taken by it.
    pub(super) fn users_found(&mut self, found: &UserAnswers) -> bool {
        let wanted = match self.inputs.config.with_users(found) {
            Ok(wanted) => wanted,
            Err(error) => {
                error!("look up the configuration's users again: {error}");
                return false;
            }
        };
        if wanted.users == self.inputs.config.users {
            return false;
        }
        let words = |uids: Option<&Option<BTreeSet<Uid>>>| {
            let uids = uids.and_then(Option::as_ref).filter(|uids| !uids.is_empty());
            let list = |uids: &BTreeSet<Uid>| uids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            uids.map_or_else(|| "nobody".to_owned(), |uids| format!("uid {}", list(uids)))
        };
        for (account, uids) in &wanted.users {
            let before = self.inputs.config.users.get(account);
            if before != Some(uids) {
                info!("{account} is now {} (was {})", words(Some(uids)), words(before));
            }
        }
        let changed = self.change_to(wanted);
        let fault = |error| format!("{error}; the previous rules stay active");
        let (taken, fault) = (changed.is_ok(), changed.err().map(fault));
        if fault.is_some() {
            self.faults.set(About::RuleSet, fault);
        }
        taken
    }
}
