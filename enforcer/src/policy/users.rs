//! Names of users → UIDs: the one thing a policy asks of the host, passed in.

use std::io;

use nix::{errno::Errno, unistd::User};
use thiserror::Error;

use super::Uid;

/// The UID that the kernel keeps for "no user" (`(uid_t) -1`).
const NOBODY_AT_ALL: u32 = u32::MAX;

/// Why something is no user.
#[derive(Debug, Error)]
pub enum UserError {
    /// A name without a user.
    #[error("no user {name:?} on this host; create it, correct the name, or give a UID from 0 to 4294967294")]
    Unknown {
        /// As given.
        name: String,
    },
    /// The name service failed.
    #[error("look up user {name:?}: {cause}; repair the name service, or give the UID")]
    Lookup {
        /// As given.
        name: String,
        /// What it answered.
        cause: io::Error,
    },
    /// A number that is no user.
    #[error("{uid} is no user; a UID is a number from 0 to 4294967294")]
    Number {
        /// As given or looked up.
        uid: i64,
    },
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
        match users.uid(name) {
            Ok(Some(uid)) => Self::from_number(uid.0.into()),
            Ok(None) => Err(UserError::Unknown { name: name.to_owned() }),
            Err(cause) => Err(UserError::Lookup {
                name: name.to_owned(),
                cause,
            }),
        }
    }
}

/// A source of users.
pub trait Users {
    /// The UID of the user of this name; `None` where there is none.
    fn uid(&self, name: &str) -> io::Result<Option<Uid>>;
}

/// The users of this host, by its name service switch.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostUsers;

impl Users for HostUsers {
    fn uid(&self, name: &str) -> io::Result<Option<Uid>> {
        match User::from_name(name) {
            Ok(user) => Ok(user.map(|user| Uid(user.uid.as_raw()))),
            // getpwnam(3): some name services answer "not found" this way.
            Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
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
    fn root_is_zero_and_strangers_are_none() {
        assert!(matches!(HostUsers.uid("root"), Ok(Some(Uid(0)))));
        for name in ["enforcer-no-such-user", "", "ro\0ot"] {
            assert!(matches!(HostUsers.uid(name), Ok(None)), "{name:?}");
        }
    }
}
