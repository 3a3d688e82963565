//! `enforcer doctor`: diagnoses this host or an image.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use super::{ExitStatus, Json, print_one, runtime};
use crate::{doctor, wire::doctor::Report};

#[derive(Debug, Args)]
pub(super) struct Doctor {
    /// Check an unpacked image, such as a stemcell, instead of this host, without running anything of it
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
}

pub(super) fn run(config: &Path, arguments: &Doctor) -> Result<ExitStatus> {
    let report = if let Some(root) = &arguments.root {
        doctor::image(root, config).with_context(|| format!("check the image {}", root.display()))?
    } else {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "only root can see what is active and try what the kernel supports; run as root"
        );
        runtime()?.block_on(doctor::host(config))
    };
    print_one(&report, &arguments.json, Report::render)?;
    Ok(match report.code() {
        0 => ExitStatus::Yes,
        1 => ExitStatus::No,
        _ => ExitStatus::Unknown,
    })
}
