//! `xtask/kernels.toml`: which kernels there are, where each comes from, and its digests.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::run::root;

/// The table.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    /// With which keys the archive signs.
    pub(super) keyring: PathBuf,
    #[serde(rename = "kernel")]
    pub(super) kernels: Vec<Entry>,
}

/// A kernel.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub(super) name: String,
    /// The suite of the archive.
    pub(super) suite: String,
    /// What it consists of.
    #[serde(rename = "package")]
    pub(super) packages: Vec<Package>,
    /// What it cannot have.
    #[serde(default)]
    pub(super) lacks: Vec<String>,
    /// What it is booted with besides the parameters of all.
    #[serde(default)]
    pub(super) parameters: String,
    /// The layouts of hierarchies that it is tried with; all, if empty.
    #[serde(default)]
    pub(super) layouts: Vec<String>,
    /// Where it is built here: the configuration, beside the table.
    pub(super) config: Option<PathBuf>,
}

/// A package of the archive, at one version.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) sha256: String,
}

impl Table {
    pub(super) fn read() -> Result<Self> {
        let path = root().join("xtask/kernels.toml");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("read {}", path.display()))
    }

    /// The named kernels, or all.
    pub(super) fn chosen(&self, names: &[String]) -> Result<Vec<Entry>> {
        if names.is_empty() {
            return Ok(self.kernels.clone());
        }
        names.iter().map(|name| self.one(name)).collect()
    }

    fn one(&self, name: &str) -> Result<Entry> {
        let Some(kernel) = self.kernels.iter().find(|kernel| kernel.name == name) else {
            let names: Vec<&str> = self.kernels.iter().map(|kernel| kernel.name.as_str()).collect();
            bail!("no kernel is named {name}; xtask/kernels.toml has {}", names.join(", "));
        };
        Ok(kernel.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_whole() -> Result<()> {
        let table = Table::read()?;
        for kernel in &table.kernels {
            assert!(!kernel.packages.is_empty(), "{}", kernel.name);
            let built = kernel
                .config
                .iter()
                .all(|config| root().join("xtask").join(config).exists());
            assert!(built, "{}", kernel.name);
            for package in &kernel.packages {
                assert_eq!(package.sha256.len(), 64, "{}", package.name);
            }
        }
        assert!(table.chosen(&["none such".to_owned()]).is_err());
        Ok(())
    }
}
