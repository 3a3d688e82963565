//! `enforcer verify`: whether the kernel holds exactly what is desired.

use std::{path::Path, time::Instant};

use anyhow::Result;

use super::{ExitStatus, Json, PATIENCE_FOR_WORK, heard_nobody, print_one, runtime, unexpected, with_place};
use crate::{
    backend::ActiveRules,
    control,
    grants::{Key, Moment, Term},
    inputs::{HostConfig, Inputs},
    text::counted,
    verify::Comparison,
    wire::{ActiveBackend, Against, GrantAction, Object, Reply, Request, Verification},
};

pub(super) fn run(config: &Path, json: &Json) -> Result<ExitStatus> {
    let verification = with_place(config, |settings| {
        match runtime()?.block_on(control::ask(&settings.socket, &Request::Verify, PATIENCE_FOR_WORK)) {
            Ok(Reply::Verification(verification)) => Ok(*verification),
            Ok(_) => unexpected(),
            Err(error) if heard_nobody(&error) => from_outside(config),
            Err(error) => Err(error.into()),
        }
    })?;
    print_one(&verification, json, Verification::render)?;
    Ok(if verification.identical {
        ExitStatus::Yes
    } else {
        ExitStatus::No
    })
}

/// Against the configuration and the addresses known last.
fn from_outside(config: &Path) -> Result<Verification> {
    let mut inputs = Inputs::from_disk(HostConfig::load(config)?)?;
    let settings = inputs.settings().clone();
    let Some(active) = ActiveRules::open(&settings)? else {
        let mut comparison = Comparison::default();
        let what = format!(
            "{}, backend = {:?}",
            counted(inputs.policy().targets.len(), "target"),
            settings.backend.to_string()
        );
        comparison.words(&Object::Backend, "active", &what, "nothing");
        return Ok(comparison.finish(Against::Configuration, ActiveBackend::None, 0));
    };
    let cgroup = inputs.config.cgroup_id()?;
    let compared = |inputs: &Inputs| -> Result<Verification> {
        let rules = inputs.desired(Instant::now())?.rules;
        Ok(active.verify(&rules, &settings, cgroup)?)
    };
    let now = Moment::now();
    if !active.observe(Some(cgroup))?.by_daemon {
        // What `apply` made active has no grant that ends: nobody stays to end it.
        inputs.grants.without_end();
        inputs.settle(now.monotonic);
    }
    let mut verification = compared(&inputs)?;
    let (with_ended, ended) = inputs.with_ended_grants(now)?;
    // Who finds fewer differences with grants that have ended has found those still there.
    if !ended.is_empty() && compared(&with_ended)?.total() < verification.total() {
        let event = |(key, term): (Key, Term)| key.event(GrantAction::Expired, now.wall, term.expires, None);
        verification.expired_grants = ended.into_iter().map(event).collect();
    }
    Ok(verification)
}
