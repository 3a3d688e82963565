//! The users and groups that targets list: those given by name may have other numbers by the next boot (N9).

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Account, CgroupPath, FileUsers, Policy, Principal, Uid, Users as _};

/// What one entry of a target's list stood for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listed {
    /// The target's name.
    pub target: String,
    /// The user or group, where it is given by name; a group by number has members all the same.
    pub account: Option<Account>,
    /// The cgroup that its principals are confined to.
    pub cgroup: Option<CgroupPath>,
    /// Who that was.
    pub uids: BTreeSet<Uid>,
}

impl Listed {
    /// Who it is by the host's files. A name that is not in them, a group's member too, may be a name service's, which
    /// cannot be asked yet: such keep their numbers, but for those that somebody else has by the files.
    fn now(&self, files: &FileUsers) -> BTreeSet<Uid> {
        let Some(account) = &self.account else {
            return self.uids.clone();
        };
        let found = files.uids(account).ok().flatten();
        let is_complete = found.is_some() && !files.lists_strangers(account);
        let is_free = |uid: &Uid| files.names(*uid).next().is_none();
        let kept = self.uids.iter().filter(|uid| !is_complete && is_free(uid));
        let kept: BTreeSet<Uid> = kept.copied().collect();
        found.unwrap_or_default().into_iter().chain(kept).collect()
    }

    pub(crate) fn principals(&self, uids: &BTreeSet<Uid>) -> impl Iterator<Item = Principal> {
        uids.iter().map(|uid| Principal::User {
            uid: *uid,
            cgroup: self.cgroup.clone(),
        })
    }
}

impl Policy {
    /// Takes names for what they mean by the host's files, and returns those that mean somebody else now.
    pub fn name_again(&mut self, listed: &mut [Listed], files: &FileUsers) -> Vec<Account> {
        let mut changed = Vec::new();
        for target in &mut self.targets {
            let mut entries: Vec<&mut Listed> = listed.iter_mut().filter(|entry| entry.target == target.name).collect();
            let before = changed.len();
            for entry in &mut entries {
                let now = entry.now(files);
                if now != entry.uids {
                    entry.uids = now;
                    changed.extend(entry.account.clone());
                }
            }
            if changed.len() > before {
                target
                    .principals
                    .retain(|principal| !matches!(principal, Principal::User { .. }));
                for entry in entries {
                    target.principals.extend(entry.principals(&entry.uids));
                }
            }
        }
        changed
    }
}
