//! Names of users → UIDs: the one thing a policy asks of the host, passed in.

use std::io;

use nix::{errno::Errno, unistd::User};

use super::Uid;

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
    fn root_is_zero_and_strangers_are_none() {
        assert!(matches!(HostUsers.uid("root"), Ok(Some(Uid(0)))));
        for name in ["enforcer-no-such-user", "", "ro\0ot"] {
            assert!(matches!(HostUsers.uid(name), Ok(None)), "{name:?}");
        }
    }
}
