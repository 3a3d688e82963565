//! Names of users and groups → UIDs: the one thing a policy asks of the host, passed in.
//!
//! A group stands for its members, as the name service tells them: a process that has only taken the group is not one
//! of them.

use std::{
    collections::{BTreeSet, HashMap},
    fmt, fs, io,
    path::Path,
};

use nix::{
    errno::Errno,
    unistd::{Gid, Group, User},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Uid;

/// The UID that the kernel keeps for "no user" (`(uid_t) -1`).
const NOBODY_AT_ALL: u32 = u32::MAX;

/// What a name service knows UIDs of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Account {
    /// A user, by name.
    User(String),
    /// The members of a group, by name.
    Group(String),
    /// The members of a group, by number.
    Gid(u32),
}

/// Why something is no user.
#[derive(Debug, Error)]
pub enum UserError {
    /// A name without a user.
    #[error("no user {name:?} on this host; {}or give a UID from 0 to 4294967294", instead(name))]
    Unknown {
        /// As given.
        name: String,
    },
    /// A name or number without a group.
    #[error("no {group} on this host; create it, or correct the name")]
    UnknownGroup {
        /// As given.
        group: Account,
    },
    /// The name service failed.
    #[error("look up {account}: {cause}; fix the name service, or give the UID")]
    Lookup {
        /// As given.
        account: Account,
        /// What it answered.
        cause: io::Error,
    },
    /// A number that is no user.
    #[error("{uid} is not a UID; a UID is a number from 0 to 4294967294")]
    Number {
        /// As given or looked up.
        uid: i64,
    },
    /// A number that is no group.
    #[error("{gid} is not a GID; a GID is a number from 0 to 4294967295")]
    GroupNumber {
        /// As given.
        gid: i64,
    },
}

/// What to do about a user who is none; `@wheel` and `%wheel` are how others write a group.
fn instead(name: &str) -> String {
    match name.strip_prefix(['@', '%']) {
        Some(group) if !group.is_empty() => {
            format!("for the members of a group write {{ group = {group:?} }} in the configuration; correct the name, ")
        }
        Some(_) | None => "create it, correct the name, ".to_owned(),
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(name) => write!(f, "user {name:?}"),
            Self::Group(name) => write!(f, "group {name:?}"),
            Self::Gid(gid) => write!(f, "group {gid}"),
        }
    }
}

impl Uid {
    /// A user as given to a command: a UID, or else a name.
    pub fn parse(text: &str, users: &dyn Users) -> Result<Self, UserError> {
        match text.parse() {
            Ok(number) => Self::from_number(number),
            Err(_) => Self::of_name(text, users),
        }
    }

    /// Not every number may be one.
    pub fn from_number(uid: i64) -> Result<Self, UserError> {
        let found = u32::try_from(uid).ok().filter(|uid| *uid != NOBODY_AT_ALL);
        found.map(Self).ok_or(UserError::Number { uid })
    }

    /// The user of a name.
    pub fn of_name(name: &str, users: &dyn Users) -> Result<Self, UserError> {
        let found = known(Account::User(name.to_owned()), users)?;
        let uid = found.into_iter().next();
        uid.ok_or_else(|| UserError::Unknown { name: name.to_owned() })
    }

    /// The members of a group.
    pub fn of_group(group: Account, users: &dyn Users) -> Result<BTreeSet<Self>, UserError> {
        known(group, users)
    }
}

fn known(account: Account, users: &dyn Users) -> Result<BTreeSet<Uid>, UserError> {
    match (users.uids(&account), account) {
        (Ok(Some(uids)), _) => {
            let checked = uids.into_iter().map(|uid| Uid::from_number(uid.0.into()));
            checked.collect()
        }
        (Ok(None), Account::User(name)) => Err(UserError::Unknown { name }),
        (Ok(None), group) => Err(UserError::UnknownGroup { group }),
        (Err(cause), account) => Err(UserError::Lookup { account, cause }),
    }
}

/// A source of users and groups.
pub trait Users {
    /// The UID of a user, or those of a group's members; `None` where there is no such user or group.
    fn uids(&self, account: &Account) -> io::Result<Option<BTreeSet<Uid>>>;
}

/// The users and groups of this host, by its name service switch.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostUsers;

impl Users for HostUsers {
    fn uids(&self, account: &Account) -> io::Result<Option<BTreeSet<Uid>>> {
        let group = match account {
            Account::User(name) => {
                return Ok(found(User::from_name(name))?.map(|user| BTreeSet::from([Uid(user.uid.as_raw())])));
            }
            Account::Group(name) => found(Group::from_name(name))?,
            Account::Gid(gid) => found(Group::from_gid(Gid::from_raw(*gid)))?,
        };
        group.map(|group| members(&group)).transpose()
    }
}

/// getpwnam(3): some name services answer "not found" this way.
fn found<T>(asked: nix::Result<Option<T>>) -> io::Result<Option<T>> {
    match asked {
        Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
        asked => Ok(asked?),
    }
}

/// Those whom the group lists, as far as they exist, and those of `/etc/passwd` whose primary group it is. A directory
/// server's users are not enumerated: there may be many.
fn members(group: &Group) -> io::Result<BTreeSet<Uid>> {
    let passwd = fs::read("/etc/passwd").unwrap_or_default();
    let mut uids = of_primary_group(&String::from_utf8_lossy(&passwd), group.gid.as_raw());
    for name in &group.mem {
        uids.extend(found(User::from_name(name))?.map(|user| Uid(user.uid.as_raw())));
    }
    Ok(uids)
}

/// By lines of passwd(5).
fn of_primary_group(passwd: &str, gid: u32) -> BTreeSet<Uid> {
    let number = |field: Option<&str>| field?.parse::<u32>().ok();
    let of = |line: &str| {
        let mut fields = line.split(':').skip(2);
        let (uid, primary) = (number(fields.next())?, number(fields.next())?);
        (primary == gid).then_some(Uid(uid))
    };
    passwd.lines().filter_map(of).collect()
}

/// The users and groups of a root's passwd(5) and group(5): no name service is asked.
#[derive(Clone, Debug, Default)]
pub struct FileUsers {
    pub(crate) passwd: String,
    pub(crate) group: String,
}

impl FileUsers {
    /// Those below a directory, an error if there is no passwd(5). Users choose bytes of these files: what is no text
    /// hides nothing.
    pub fn below(root: &Path) -> io::Result<Self> {
        let read = |file| fs::read(root.join(file)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok(Self {
            passwd: read("etc/passwd")?,
            group: read("etc/group").unwrap_or_default(),
        })
    }

    /// Whether a group lists somebody who is not among the users here, and may be a name service's.
    pub(super) fn lists_strangers(&self, account: &Account) -> bool {
        let mut names = self
            .group_line(account)
            .into_iter()
            .flat_map(|(_, members)| members.split(','));
        names.any(|name| !name.is_empty() && self.user(name).is_none())
    }

    /// The number and the members of a group, as written.
    fn group_line(&self, account: &Account) -> Option<(&str, &str)> {
        let is_it = |name: &str, gid: &str| match account {
            Account::User(_) => false,
            Account::Group(wanted) => name == wanted,
            Account::Gid(wanted) => gid == wanted.to_string(),
        };
        self.group.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (name, _, gid, members) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            is_it(name, gid).then_some((gid, members))
        })
    }

    /// The users of a number.
    pub(super) fn names<'a>(&'a self, uid: Uid) -> impl Iterator<Item = &'a str> {
        let named = move |line: &'a str| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(uid.0)).then_some(name)
        };
        self.passwd.lines().filter_map(named)
    }

    /// The name of each user, the first that is listed.
    pub(crate) fn by_uid(&self) -> HashMap<Uid, String> {
        let mut users = HashMap::new();
        for line in self.passwd.lines() {
            let mut fields = line.split(':');
            let (name, uid) = (fields.next(), fields.nth(1).and_then(|uid| uid.parse().ok()));
            if let (Some(name), Some(uid)) = (name, uid) {
                users.entry(Uid(uid)).or_insert_with(|| name.to_owned());
            }
        }
        users
    }

    fn user(&self, name: &str) -> Option<Uid> {
        let line = self.passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        Some(Uid(line.split(':').nth(2)?.parse().ok()?))
    }
}

impl Users for FileUsers {
    fn uids(&self, account: &Account) -> io::Result<Option<BTreeSet<Uid>>> {
        if let Account::User(name) = account {
            return Ok(self.user(name).map(|uid| BTreeSet::from([uid])));
        }
        Ok(self.group_line(account).map(|(gid, members)| {
            let listed = members.split(',').filter_map(|name| self.user(name));
            let primary = gid.parse().map(|gid| of_primary_group(&self.passwd, gid));
            listed.chain(primary.unwrap_or_default()).collect()
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_a_number_or_a_name() {
        let parsed = |text| Uid::parse(text, &HostUsers);
        assert!(matches!(parsed("0"), Ok(Uid(0))));
        assert!(matches!(parsed("root"), Ok(Uid(0))));
        assert!(matches!(parsed("4294967294"), Ok(Uid(4_294_967_294))));
        for none in ["4294967295", "4294967296", "-1"] {
            assert!(matches!(parsed(none), Err(UserError::Number { .. })), "{none}");
        }
        for unknown in ["", "enforcer-no-such-user", "18446744073709551616"] {
            assert!(matches!(parsed(unknown), Err(UserError::Unknown { .. })), "{unknown}");
        }
    }

    #[test]
    fn who_writes_a_group_as_others_do_is_told_how() {
        let told = |text| Uid::parse(text, &HostUsers).err().map(|error| error.to_string());
        for (text, part) in [
            ("@wheel", "write { group = \"wheel\" }"),
            ("%no-such", "write { group = \"no-such\" }"),
            ("enforcer-no-such-user", "create it, correct the name, or give a UID"),
            ("@", "create it, correct the name, or give a UID"),
        ] {
            assert!(told(text).is_some_and(|told| told.contains(part)), "{:?}", told(text));
        }
    }

    #[test]
    fn root_is_zero_and_strangers_are_none() {
        let uids = |account: Account| HostUsers.uids(&account).ok().flatten();
        assert_eq!(uids(Account::User("root".to_owned())), Some(BTreeSet::from([Uid(0)])));
        for name in ["enforcer-no-such-user", "", "ro\0ot"] {
            for account in [Account::User(name.to_owned()), Account::Group(name.to_owned())] {
                assert!(matches!(HostUsers.uids(&account), Ok(None)), "{name:?}");
            }
        }
        // By its primary group.
        for root in [Account::Group("root".to_owned()), Account::Gid(0)] {
            let found = uids(root).unwrap_or_default();
            assert!(found.contains(&Uid(0)), "{found:?}");
        }
        assert!(matches!(HostUsers.uids(&Account::Gid(3_999_999_999)), Ok(None)));
    }
}
