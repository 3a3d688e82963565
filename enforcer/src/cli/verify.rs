//! `enforcer verify`: whether the kernel holds exactly what is wanted.

use std::{path::Path, time::Instant};

use anyhow::{Result, bail};

use super::{ExitStatus, Json, PATIENCE_FOR_WORK, is_nobody, place, print_one, runtime};
use crate::{
    backend::ActiveRules,
    control,
    inputs::{HostConfig, Inputs},
    verify::Comparison,
    wire::{ActiveBackend, Against, Object, Reply, Request, Verification},
};

pub(super) fn run(config: &Path, json: &Json) -> Result<ExitStatus> {
    let socket = place(config)?.socket;
    let verification = match runtime()?.block_on(control::ask(&socket, &Request::Verify, PATIENCE_FOR_WORK)) {
        Ok(Reply::Verification(verification)) => *verification,
        Ok(_) => bail!("the daemon gave an unexpected answer; is it another version?"),
        Err(error) if is_nobody(&error) => from_outside(config)?,
        Err(error) => return Err(error.into()),
    };
    print_one(&verification, json, Verification::render)?;
    Ok(if verification.identical {
        ExitStatus::Yes
    } else {
        ExitStatus::No
    })
}

/// Against the configuration and the addresses known last.
fn from_outside(config: &Path) -> Result<Verification> {
    let inputs = Inputs::from_disk(HostConfig::load(config)?)?;
    let rules = inputs.desired(Instant::now())?.rules;
    let cgroup = inputs.config.cgroup_id()?;
    let settings = inputs.settings();
    if let Some(in_force) = ActiveRules::open(settings)? {
        return Ok(in_force.verify(&rules, settings, cgroup)?);
    }
    let mut comparison = Comparison::default();
    let what = format!(
        "{} targets, backend = {:?}",
        inputs.policy().targets.len(),
        settings.backend.to_string()
    );
    comparison.words(&Object::Backend, "in force", &what, "nothing");
    Ok(comparison.finish(Against::Configuration, ActiveBackend::None, 0))
}
