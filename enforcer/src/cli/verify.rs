//! `enforcer verify`: whether the kernel holds exactly what is wanted.

use std::{path::Path, time::Duration};

use anyhow::{Result, bail};

use super::{Answer, Json, is_nobody, place, print_one, runtime};
use crate::{
    backend::InForce,
    control, daemon,
    verify::Comparison,
    wire::{ActiveBackend, Against, Object, Reply, Request, Verification},
};

/// Reading a hundred thousand entries takes the daemon a while.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn run(config: &Path, json: &Json) -> Result<Answer> {
    let socket = place(config)?.socket;
    let verification = match runtime()?.block_on(control::ask(&socket, &Request::Verify, PATIENCE)) {
        Ok(Reply::Verification(verification)) => *verification,
        Ok(_) => bail!("the daemon answered something else than a comparison; is it another version?"),
        Err(error) if is_nobody(&error) => from_outside(config)?,
        Err(error) => return Err(error.into()),
    };
    print_one(&verification, json, Verification::render)?;
    Ok(if verification.identical {
        Answer::Yes
    } else {
        Answer::No
    })
}

/// Against the configuration and the addresses known last.
fn from_outside(config: &Path) -> Result<Verification> {
    let wanted = daemon::Wanted::load(config)?;
    let (rules, cgroup) = wanted.rules_known_last()?;
    if let Some(in_force) = InForce::open(wanted.settings())? {
        return Ok(in_force.verify(&rules, wanted.settings(), cgroup)?);
    }
    let mut comparison = Comparison::default();
    let what = format!(
        "{} targets, backend = {:?}",
        wanted.policy().targets.len(),
        wanted.settings().backend.to_string()
    );
    comparison.words(&Object::Backend, "in force", &what, "nothing");
    Ok(comparison.finish(Against::Configuration, ActiveBackend::None, 0))
}
