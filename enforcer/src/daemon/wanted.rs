//! A configuration read, understood, and found possible on this host.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::DaemonError;
use crate::{
    config::{Bosh, Config},
    host,
    policy::{HostUsers, Policy},
    state::LastGood,
};

/// A configuration that was read, understood and found possible on this host.
#[derive(Debug)]
pub struct Wanted {
    pub(super) path: PathBuf,
    pub(super) config: Config,
    pub(super) policy: Policy,
    /// The cgroup to attach to.
    pub(super) cgroup: PathBuf,
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
        let cgroup = config
            .settings
            .cgroup
            .clone()
            .or_else(|| mount.clone())
            .ok_or(DaemonError::NoCgroup2)?;
        let mount = mount.unwrap_or_else(|| cgroup.clone());
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

    /// What was in force last, with nothing of it looked up again.
    pub(super) fn of(path: &Path, good: &LastGood) -> Result<Self, DaemonError> {
        let mount = host::cgroup2_mount().map_err(|error| DaemonError::Io {
            action: "read /proc/self/mountinfo",
            error,
        })?;
        let cgroup = (good.settings.cgroup.clone().or_else(|| mount.clone())).ok_or(DaemonError::NoCgroup2)?;
        Ok(Self {
            path: path.into(),
            config: Config {
                path: path.into(),
                mode: good.policy.mode,
                settings: good.settings.clone(),
                dns: good.policy.dns,
                bosh: good.bosh.clone().map(|dir| Bosh { dir }),
                targets: BTreeMap::new(),
            },
            policy: good.policy.clone(),
            mount: mount.unwrap_or_else(|| cgroup.clone()),
            cgroup,
            warnings: Vec::new(),
        })
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
