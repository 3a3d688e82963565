//! `enforcer doctor`: what this host or an image can do, and what weakens protection there.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use super::{Answer, Json, print_one, runtime};
use crate::{doctor, wire::doctor::Report};

#[derive(Debug, Args)]
pub(super) struct Doctor {
    /// Look at an unpacked image, a stemcell say, instead of this host; nothing of it is run
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
}

pub(super) fn run(config: &Path, arguments: &Doctor) -> Result<Answer> {
    let report = if let Some(root) = &arguments.root {
        doctor::image(root, config).with_context(|| format!("look at the image {}", root.display()))?
    } else {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "only root can see what is in force and try what the kernel can do; run as root"
        );
        runtime()?.block_on(doctor::host(config))
    };
    print_one(&report, &arguments.json, Report::render)?;
    Ok(match report.code() {
        0 => Answer::Yes,
        1 => Answer::No,
        _ => Answer::Unknown,
    })
}
