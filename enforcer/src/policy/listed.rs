//! The users and groups that targets list: those given by name may have other numbers by the next boot (N9).

use std::collections::BTreeSet;

use super::{Account, CgroupPath, FileUsers, Policy, Principal, Uid, Users as _};

/// What one entry of a target's list stood for.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Who it is by the host's files. A name that is not in them may be a name service's, which cannot be asked yet: it keeps its
    /// numbers, but for those that are another user's now.
    fn now(&self, files: &FileUsers) -> BTreeSet<Uid> {
        let Some(account) = &self.account else {
            return self.uids.clone();
        };
        if let Ok(Some(found)) = files.uids(account) {
            return found;
        }
        let is_anothers = |uid: &Uid| match account {
            Account::User(name) => files.names(*uid).any(|owner| owner != name),
            Account::Group(_) | Account::Gid(_) => false,
        };
        self.uids.iter().filter(|uid| !is_anothers(uid)).copied().collect()
    }

    pub(super) fn principals(&self, uids: &BTreeSet<Uid>) -> impl Iterator<Item = Principal> {
        uids.iter().map(|uid| Principal::User {
            uid: *uid,
            cgroup: self.cgroup.clone(),
        })
    }
}

impl Policy {
    /// Takes names for what they mean by the host's files, and returns what means somebody else now.
    pub fn name_again<'a>(&mut self, listed: &'a [Listed], files: &FileUsers) -> Vec<&'a Listed> {
        let mut changed = Vec::new();
        for target in &mut self.targets {
            let entries = listed.iter().filter(|entry| entry.target == target.name);
            let entries: Vec<_> = entries.map(|entry| (entry, entry.now(files))).collect();
            let before = changed.len();
            changed.extend(
                entries
                    .iter()
                    .filter(|(entry, now)| entry.uids != *now)
                    .map(|(entry, _)| *entry),
            );
            if changed.len() > before {
                target
                    .principals
                    .retain(|principal| !matches!(principal, Principal::User { .. }));
                for (entry, now) in entries {
                    target.principals.extend(entry.principals(&now));
                }
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    const CONFIG: &str = r#"
[target.bus]
endpoints = ["tcp://10.0.0.1:4222"]
allow = ["agent", "ops", 7, { group = "bus" }, { user = "agent", cgroup = "/x" }]
[target.other]
endpoints = ["tcp://10.0.0.2:4222"]
allow = [1001]
"#;
    const PASSWD: &str = "agent:x:1001:1:::\nops:x:7:1:::\nalice:x:1005:1:::\n";
    const GROUP: &str = "bus:x:50:alice,agent\n";

    fn files(passwd: &str, group: &str) -> FileUsers {
        FileUsers {
            passwd: passwd.to_owned(),
            group: group.to_owned(),
        }
    }

    /// At `bus`, who may connect anywhere and who within the cgroup; how many names have changed. `other` lists a number, which stays.
    fn again(passwd: &str, group: &str) -> Result<String, Box<dyn std::error::Error>> {
        let config = Config::parse(CONFIG, Path::new("x.toml"))?;
        let read = Policy::from_config(&config, &files(PASSWD, GROUP))?;
        let mut policy = read.policy;
        let changed = policy.name_again(&read.listed, &files(passwd, group)).len();
        let of = |target: &str, within: bool| -> Result<String, String> {
            let target = policy.target(target).ok_or("no target")?;
            let uids = target.principals.iter().filter_map(|principal| match principal {
                Principal::User { uid, cgroup } => (cgroup.is_some() == within).then_some(uid.to_string()),
                Principal::Anybody { .. } | Principal::Kernel => None,
            });
            Ok(uids.collect::<Vec<_>>().join(" "))
        };
        assert_eq!(of("other", false)?, "1001");
        Ok(format!("{} | {} | {changed}", of("bus", false)?, of("bus", true)?))
    }

    #[test]
    fn n9_names_mean_whom_the_files_name_at_boot() -> Result<(), Box<dyn std::error::Error>> {
        let (agent, ops, alice) = ("agent:x:1001:1:::\n", "ops:x:7:1:::\n", "alice:x:1005:1:::\n");
        let cases = [
            ([agent, ops, alice], GROUP, "7 1001 1005 | 1001 | 0"),
            // Made again with another number: as himself, within the cgroup, as a member.
            (["agent:x:1002:1:::\n", ops, alice], GROUP, "7 1002 1005 | 1002 | 3"),
            // What the list has by number stays, whoever that is now.
            ([agent, "ops:x:8:1:::\n", alice], GROUP, "7 8 1001 1005 | 1001 | 1"),
            // Numbers change hands.
            (
                ["agent:x:1005:1:::\n", ops, "alice:x:1001:1:::\n"],
                "bus:x:50:\n",
                "7 1005 | 1005 | 3",
            ),
            // Gone, as far as the files tell: a name service may have him, and nobody else has the number.
            (["", ops, alice], "bus:x:50:alice\n", "7 1001 1005 | 1001 | 1"),
            // Gone, and the number is another user's.
            (["", ops, "mallory:x:1001:1:::\n"], "bus:x:50:\n", "7 |  | 3"),
            // The files cannot be read.
            ([""; 3], "", "7 1001 1005 | 1001 | 0"),
        ];
        for (passwd, group, expected) in cases {
            assert_eq!(again(&passwd.concat(), group)?, expected, "{passwd:?} {group}");
        }
        Ok(())
    }
}
