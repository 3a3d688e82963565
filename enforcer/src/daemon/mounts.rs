//! File systems that the host mounts after we were started, where the service manager gave us mounts of our own.
//!
//! Stemcells make `/` private, so that such mounts never reach a confined daemon: the BOSH agent's settings on a tmpfs would stay
//! unseen. The unit names the directory that matters; a new mount there is a reason to be started again, with the mounts of then.

use std::{
    collections::BTreeSet,
    env,
    path::{Path, PathBuf},
};

use crate::host::mounts;

/// What the unit sets.
const VARIABLE: &str = "ENFORCER_FOLLOW_MOUNTS";

/// The directory whose mounts are followed, if any.
#[derive(Debug)]
pub(super) struct Mounts(Option<PathBuf>);

impl Mounts {
    /// As the environment says.
    pub(super) fn from_environment() -> Self {
        Self(env::var_os(VARIABLE).map(PathBuf::from))
    }

    /// A mount of the host that we do not have.
    pub(super) fn unseen(&self) -> Option<PathBuf> {
        let dir = self.0.as_deref()?;
        unseen(dir, &mounts::Mounts::host().ok()?, &mounts::Mounts::own().ok()?)
    }
}

/// A mount point at or below a directory that only the first of two tables has. Pure.
fn unseen(dir: &Path, host: &mounts::Mounts, own: &mounts::Mounts) -> Option<PathBuf> {
    let own: BTreeSet<&Path> = own.below(dir).collect();
    let mut points = host.below(dir).filter(|point| !own.contains(point));
    points.next().map(Path::to_path_buf)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n";
    const SETTINGS: &str = "70 21 0:44 / /var/vcap/bosh/settings rw - tmpfs tmpfs rw\n";
    const DATA: &str = "71 21 8:2 / /var/vcap/data rw - ext4 /dev/sdb1 rw\n";

    #[test]
    fn only_what_the_host_alone_has_below_the_directory_is_unseen() {
        let dir = Path::new("/var/vcap/bosh");
        let table = |lines: &[&str]| mounts::Mounts::parse(lines.concat().as_bytes());
        let seen = |host: &[&str], own: &[&str]| unseen(dir, &table(host), &table(own));
        assert_eq!(
            seen(&[ROOT, SETTINGS, DATA], &[ROOT]),
            Some("/var/vcap/bosh/settings".into())
        );
        assert_eq!(seen(&[ROOT, SETTINGS, DATA], &[ROOT, SETTINGS]), None);
        assert_eq!(seen(&[ROOT, DATA], &[ROOT]), None);
        assert_eq!(seen(&[ROOT], &[ROOT, SETTINGS]), None);
    }
}
