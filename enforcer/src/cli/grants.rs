//! `enforcer grant`, `revoke` and `grants`.

use std::{path::Path, time::Duration};

use anyhow::Result;
use clap::Args;

use super::{ExitStatus, Json, as_line, complain, is_nobody, place, print, print_one, runtime, unexpected, with_place};
use crate::{
    control, daemon,
    host::Identities,
    inputs::{HostConfig, Inputs},
    text::{self, Page},
    wire::{GrantRequest, GrantStatus, GrantsReport, Reply, Request, RevokeRequest, Selector},
};

/// How long the daemon may take: it answers when the kernel and the disk hold it.
const PATIENCE: Duration = Duration::from_secs(10);
/// Who is meant; without any of these whoever is in the cgroup of the caller.
#[derive(Debug, Default, Args)]
pub(super) struct Who {
    /// Cgroup and everything below it, by its path from the root of the cgroup v2 hierarchy
    #[arg(long, value_name = "PATH", conflicts_with = "pid")]
    cgroup: Option<String>,
    /// BPM container of a BOSH job, running or not; JOB.PROCESS if the process is not named like the job
    #[arg(long, value_name = "JOB", conflicts_with_all = ["cgroup", "pid"])]
    job: Option<String>,
    /// Use the cgroup of process PID
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// User name or UID: anywhere, or only within --cgroup or the cgroup of --pid if given
    #[arg(long, value_name = "USER")]
    user: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct Grant {
    /// Target with `grants = true`
    target: String,
    #[command(flatten)]
    who: Who,
    /// Duration, such as 30s, 5m or 2h [default: until revoked]
    #[arg(long = "for", value_name = "DURATION")]
    time: Option<humantime::Duration>,
    #[command(flatten)]
    json: Json,
}

#[derive(Debug, Args)]
pub(super) struct Revoke {
    /// Target
    target: String,
    #[command(flatten)]
    who: Who,
    /// Revoke all grants of TARGET
    #[arg(long, conflicts_with_all = ["cgroup", "job", "pid", "user"])]
    all: bool,
    #[command(flatten)]
    json: Json,
}

pub(super) fn grant(config: &Path, grant: &Grant) -> Result<ExitStatus> {
    let request = Request::Grant(GrantRequest {
        target: grant.target.clone(),
        to: grant.who.selector(),
        otherwise: None,
        // Part of a second is none: the daemon says what is allowed.
        seconds: grant.time.map(|time| time.as_secs()),
    });
    let Reply::Grant(event) = ask(&place(config)?.socket, &request)? else {
        return unexpected();
    };
    print_one(&*event, &grant.json, as_line)
}

pub(super) fn revoke(config: &Path, revoke: &Revoke) -> Result<ExitStatus> {
    let request = Request::Revoke(RevokeRequest {
        target: revoke.target.clone(),
        to: revoke.who.selector(),
        all: revoke.all,
    });
    let Reply::Revoked(events) = ask(&place(config)?.socket, &request)? else {
        return unexpected();
    };
    for event in &events {
        print_one(event, &revoke.json, as_line)?;
    }
    if events.is_empty() {
        if !revoke.json.json {
            print("no such grant; enforcer grants lists them\n")?;
        }
        return Ok(ExitStatus::No);
    }
    Ok(ExitStatus::Yes)
}

pub(super) fn list(config: &Path, json: &Json) -> Result<ExitStatus> {
    let report = with_place(config, |settings| {
        match runtime()?.block_on(control::ask(&settings.socket, &Request::Grants, PATIENCE)) {
            Ok(Reply::Grants(report)) => Ok(report),
            Ok(_) => unexpected(),
            Err(error) if is_nobody(&error) => {
                let inputs = Inputs::from_disk(HostConfig::load(config)?)?;
                complain(
                    "warning",
                    &format!("{error}; these are the grants that were saved last"),
                );
                let identities = Identities::new(&inputs.config.mount, &inputs.config.users);
                Ok(daemon::report_grants(&inputs, &identities))
            }
            Err(error) => Err(error.into()),
        }
    })?;
    print_one(&report, json, render)
}

pub(super) fn ask(socket: &Path, request: &Request) -> Result<Reply> {
    Ok(runtime()?.block_on(control::ask(socket, request, PATIENCE))?)
}

pub(crate) fn render(report: &GrantsReport) -> String {
    let mut page = Page::default();
    if report.grants.is_empty() {
        page.line("no grants");
    } else {
        granted(&mut page, report);
    }
    if !report.job_rules.is_empty() {
        page.line("");
        page.line("rules of jobs, in nftables chain inet bosh_agent monit_access_jobs (target monit)");
        let rows = report.job_rules.iter().map(|rule| {
            let to = if rule.user.is_none() && rule.cgroup.is_none() {
                "nobody".to_owned()
            } else {
                whom(rule.user, rule.user_name.as_deref(), rule.cgroup.as_deref())
            };
            let note = rule.ignored.as_ref().map(|why| format!("allows nobody: {why}"));
            [rule.handle.to_string(), to, note.unwrap_or_default()]
        });
        page.table(["handle", "to", ""], rows);
    }
    page.into_text()
}

fn granted(page: &mut Page, report: &GrantsReport) {
    let rows = report.grants.iter().map(|grant| {
        [
            grant.target.clone(),
            whom(grant.user, grant.user_name.as_deref(), grant.cgroup.as_deref()),
            grant.since.clone(),
            grant.expires.clone().unwrap_or_else(|| "never".to_owned()),
            format!(
                "{}[{}] {}",
                text::name(&grant.comm),
                grant.pid,
                text::user(grant.uid, grant.asker_name.as_deref())
            ),
            note(grant),
        ]
    });
    page.table(["target", "to", "since", "expires", "asked by", ""], rows);
}

fn whom(user: Option<u32>, name: Option<&str>, cgroup: Option<&str>) -> String {
    let user = user.map(|user| text::with_name(user, name));
    match (user, cgroup) {
        (Some(user), None) => format!("user {user}"),
        (Some(user), Some(cgroup)) => format!("user {user} in {cgroup}"),
        (None, cgroup) => format!("anybody in {}", cgroup.unwrap_or_default()),
    }
}

/// Why it lets nobody in now, if it does not.
fn note(grant: &GrantStatus) -> String {
    if !grant.active {
        "inactive: the target is not configured with grants = true".to_owned()
    } else if grant.cgroup_exists == Some(false) {
        "the cgroup does not exist".to_owned()
    } else if let Some(by) = &grant.cgroup_writable {
        format!("allows nobody: {by}")
    } else {
        String::new()
    }
}

impl Who {
    fn selector(&self) -> Selector {
        Selector {
            user: self.user.clone(),
            cgroup: self.cgroup.clone(),
            job: self.job.clone(),
            pid: self.pid,
        }
    }
}
