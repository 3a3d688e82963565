//! A configuration read, understood, and found possible on this host.

use std::path::{Path, PathBuf};

use super::DaemonError;
use crate::{
    config::{Backend, Config},
    host,
    policy::{HostUsers, Policy},
};

/// Where cgroups are looked for when none is mounted: there are none.
const USUAL_MOUNT: &str = "/sys/fs/cgroup";

/// A configuration that was read, understood and found possible on this host.
#[derive(Debug)]
pub struct Wanted {
    pub(super) path: PathBuf,
    pub(super) config: Config,
    pub(super) policy: Policy,
    /// The cgroup to attach to; none where no cgroup v2 is mounted and nothing needs one.
    pub(super) cgroup: Option<PathBuf>,
    /// Where cgroup paths of principals start.
    pub(super) mount: PathBuf,
    pub(super) warnings: Vec<String>,
}

impl Wanted {
    /// Reads a configuration file.
    pub fn load(path: &Path) -> Result<Self, DaemonError> {
        let config = Config::load(path)?;
        let (policy, warnings) = Policy::from_config(&config, &HostUsers)?;
        let mount = host::cgroup2_mount().map_err(|error| DaemonError::Io {
            action: "read /proc/self/mountinfo",
            error,
        })?;
        let cgroup = config.settings.cgroup.clone().or_else(|| mount.clone());
        let needs_one = match config.settings.backend {
            Backend::Ebpf | Backend::Both => true,
            Backend::Nftables | Backend::Auto => !policy.cgroups().is_empty(),
        };
        if cgroup.is_none() && needs_one {
            return Err(DaemonError::NoCgroup2);
        }
        let mount = mount.or_else(|| cgroup.clone()).unwrap_or_else(|| USUAL_MOUNT.into());
        for path_of in policy.cgroups() {
            if host::cgroup(&mount, &path_of).is_none() {
                return Err(DaemonError::NoCgroup {
                    path: path.into(),
                    cgroup: path_of.to_string(),
                    mount,
                });
            }
        }
        let warnings = warnings.iter().map(ToString::to_string).collect();
        Ok(Self {
            path: path.into(),
            config,
            policy,
            cgroup,
            mount,
            warnings,
        })
    }

    /// The cgroup to attach to, to be shown.
    pub(super) fn cgroup_shown(&self) -> String {
        let shown = self.cgroup.as_ref().map(|cgroup| cgroup.display().to_string());
        shown.unwrap_or_else(|| "no cgroup".to_owned())
    }

    /// What it means.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// What is allowed, but probably not meant.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}
