//! What enforces in this run of the suite: every world is configured for it and every refusal expected in its form.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use anyhow::{Result, ensure};
use clap::ValueEnum;

/// What a run of the suite is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// `backend = "ebpf"`.
    Ebpf,
    /// `backend = "nftables"`.
    Nftables,
    /// `backend = "both"`.
    Both,
    /// `backend = "auto"`, and every bpf(2) of the binary fails: nftables is what it has to take.
    AutoWithoutBpf,
}

/// Runs of the suite that cases which hold whatever enforces are part of.
pub const ALIKE: &[Backend] = &[Backend::Ebpf, Backend::Nftables, Backend::AutoWithoutBpf];
/// As [`ALIKE`], and part of the selection that is run with both.
pub const ALL: &[Backend] = &[Backend::Ebpf, Backend::Nftables, Backend::Both, Backend::AutoWithoutBpf];
/// About what BPF tells too: not where every bpf(2) fails.
pub const WITH_BPF: &[Backend] = &[Backend::Ebpf, Backend::Nftables];
/// About pins, links, maps, cgroups or tasks: there is none of it in nftables.
pub const EBPF: &[Backend] = &[Backend::Ebpf];
/// About the table and its packets.
pub const NFTABLES: &[Backend] = &[Backend::Nftables];
/// About packets that nftables sees, alone or beside eBPF.
pub const PACKETS: &[Backend] = &[Backend::Nftables, Backend::Both];
/// About the two together, or about the change from one to the other.
pub const BOTH: &[Backend] = &[Backend::Both];

static CURRENT: OnceLock<Backend> = OnceLock::new();

impl Backend {
    /// What this run is about; eBPF unless [`Backend::choose`] said something else before.
    #[must_use]
    pub fn current() -> Self {
        *CURRENT.get_or_init(|| Self::Ebpf)
    }

    /// Makes this run be about it, once.
    pub fn choose(self) -> Result<()> {
        ensure!(*CURRENT.get_or_init(|| self) == self, "another backend was chosen");
        Ok(())
    }

    /// As the configuration names it.
    #[must_use]
    pub fn configured(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Both => "both",
            Self::AutoWithoutBpf => "auto",
        }
    }

    /// As `status` names it.
    #[must_use]
    pub fn active(self) -> &'static str {
        match self {
            Self::AutoWithoutBpf => Self::Nftables.configured(),
            Self::Ebpf | Self::Nftables | Self::Both => self.configured(),
        }
    }

    /// Whether nftables alone judges: packets, not calls.
    #[must_use]
    pub fn is_nftables(self) -> bool {
        match self {
            Self::Nftables | Self::AutoWithoutBpf => true,
            Self::Ebpf | Self::Both => false,
        }
    }

    /// What a refused `connect` over TCP fails with (D8).
    #[must_use]
    pub fn errno(self) -> i32 {
        if self.is_nftables() {
            libc::ECONNREFUSED
        } else {
            libc::EPERM
        }
    }
}

static SCRIPT: OnceLock<PathBuf> = OnceLock::new();

/// A script that takes bpf(2) away and starts the binary.
pub(crate) fn without_bpf(binary: &Path, confined: &Path) -> Result<PathBuf> {
    if let Some(script) = SCRIPT.get() {
        return Ok(script.clone());
    }
    let file = tempfile::Builder::new().prefix("enforcertest_without_bpf").tempfile()?;
    let text = format!(
        "#!/bin/sh\nexec '{}' --no-bpf eperm -- '{}' \"$@\"\n",
        confined.display(),
        binary.display()
    );
    fs::write(file.path(), text)?;
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o755))?;
    // Open for writing, it could not be executed.
    let (_, path) = file.keep()?;
    let kept = SCRIPT.get_or_init(|| path.clone());
    if *kept != path {
        fs::remove_file(path)?;
    }
    Ok(kept.clone())
}

/// Removes what a run made for all worlds together.
pub fn clean_up() {
    if let Some(path) = SCRIPT.get() {
        let _ = fs::remove_file(path);
    }
}
