//! `enforcer reload` and `enforcer config diff`: what another configuration changes, or would.

use std::path::Path;

use anyhow::{Result, bail};
use clap::Args;

use super::{
    ExitStatus, Json, PATIENCE_FOR_WORK, Rejected, answer_of, print_one, refreshed, runtime, unexpected, with_place,
};
use crate::{
    config,
    control::{self, AskError},
    wire::{ReloadReport, Reply, Request},
};

#[derive(Debug, Args)]
pub(super) struct Reload {
    /// Print what would change, and change nothing; exit code 0 whether or not anything would
    ///
    /// The file is read and compared, and its users are looked up. Whether another backend works here, or the rules fit
    /// into it, shows only when they are applied: see enforcer doctor.
    #[arg(long)]
    dry_run: bool,
    /// How long to wait for the first lookup of new names
    #[arg(long, value_name = "DURATION", default_value = "10s")]
    timeout: humantime::Duration,
    #[command(flatten)]
    json: Json,
}

pub(super) fn run(config: &Path, reload: &Reload) -> Result<ExitStatus> {
    with_place(config, |settings| run_at(&settings.socket, config, reload))
}

fn run_at(socket: &Path, config: &Path, reload: &Reload) -> Result<ExitStatus> {
    let is_named = config != Path::new(config::DEFAULT_PATH);
    if reload.dry_run {
        let report = ask(socket, true)?;
        if is_named {
            ensure_same_file(&report, config)?;
        }
        return print_one(&report, &reload.json, ReloadReport::render);
    }
    // Which file it takes is known before it does; one that is wrong it names itself.
    if is_named && let Ok(report) = ask(socket, true) {
        ensure_same_file(&report, config)?;
    }
    let mut report = ask(socket, false)?;
    // What names mean is part of what was asked for. Whatever comes of that, the configuration was taken.
    let answer = match refreshed(socket, reload.timeout.into()) {
        Ok(status) => {
            report.generation = status.generation;
            report.state = Some(status.state);
            let answer = answer_of(&status);
            report.causes = status.causes;
            answer
        }
        Err(error) => {
            report.causes.push(format!(
                "whether all is enforced is not known: {error:#}; see enforcer status"
            ));
            ExitStatus::No
        }
    };
    print_one(&report, &reload.json, ReloadReport::render)?;
    Ok(answer)
}

/// As `diff`: whether a reload would change anything.
pub(super) fn diff(config: &Path, json: &Json) -> Result<ExitStatus> {
    let report = with_place(config, |settings| {
        let report = ask(&settings.socket, true)?;
        ensure_same_file(&report, config)?;
        Ok(report)
    })?;
    print_one(&report, json, ReloadReport::render)?;
    Ok(if report.is_same() {
        ExitStatus::Yes
    } else {
        ExitStatus::No
    })
}

fn ask(socket: &Path, dry_run: bool) -> Result<ReloadReport> {
    match runtime()?.block_on(control::ask(socket, &Request::Reload { dry_run }, PATIENCE_FOR_WORK)) {
        Ok(Reply::Reload(report)) => Ok(*report),
        Ok(_) => unexpected(),
        // It has escaped what is within a line.
        Err(AskError::Refused(lines)) => Err(Rejected(lines.lines().map(str::to_owned).collect()).into()),
        Err(error) => Err(error.into()),
    }
}

/// The daemon reads its own file, whichever one was named to find it.
fn ensure_same_file(report: &ReloadReport, named: &Path) -> Result<()> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    if real(Path::new(&report.path)) == real(named) {
        return Ok(());
    }
    bail!(
        "the daemon reads {}, not {}: check the latter with enforcer config check, and put it in the former's place",
        report.path,
        named.display()
    )
}
