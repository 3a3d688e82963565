//! `enforcer grant`, `revoke`, `grants`, and the name by which BOSH jobs ask for monit.

use std::{ffi::OsString, path::Path, time::Duration};

use anyhow::{Result, bail};
use clap::Args;

use super::{Answer, Json, as_line, place, print, print_one, runtime};
use crate::{
    control::{self, GrantRequest, GrantStatus, GrantsReport, Reply, Request, RevokeRequest, Selector},
    text::{self, Page},
};

/// How long the daemon may take: it answers when the kernel and the disk hold it.
const PATIENCE: Duration = Duration::from_secs(10);
/// The target of jobs that ask for monit.
const MONIT: &str = "monit";
/// Names that ask for monit when the binary is called by them.
const MONIT_NAMES: [&str; 2] = ["enable-monit-access", "bosh-enable-monit-access"];

/// Who is meant; without any of these whoever is in the cgroup of the caller.
#[derive(Debug, Default, Args)]
pub(super) struct Who {
    /// A cgroup, from the root of the cgroup v2 hierarchy, with everything below it
    #[arg(long, value_name = "PATH", conflicts_with = "pid")]
    cgroup: Option<String>,
    /// The cgroup that this process is in
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// A user, by name or UID: anywhere, or within --cgroup or the cgroup of --pid if one is given
    #[arg(long, value_name = "USER")]
    user: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct Grant {
    /// Target, one with `grants = true`
    target: String,
    #[command(flatten)]
    who: Who,
    /// How long, such as 30s, 5m or 2h; until it is revoked if left out
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
    /// Everything that is granted of the target
    #[arg(long, conflicts_with_all = ["cgroup", "pid", "user"])]
    all: bool,
    #[command(flatten)]
    json: Json,
}

#[derive(Debug, Args)]
pub(super) struct MonitAccess {
    /// A user instead of the caller's cgroup
    user: Option<String>,
}

pub(super) fn grant(config: &Path, grant: &Grant) -> Result<Answer> {
    let request = Request::Grant(GrantRequest {
        target: grant.target.clone(),
        to: grant.who.selector(),
        // Part of a second is none: the daemon says what is allowed.
        seconds: grant.time.map(|time| time.as_secs()),
    });
    let Reply::Grant(event) = ask(config, &request)? else {
        return unexpected();
    };
    print_one(&*event, &grant.json, as_line)
}

pub(super) fn revoke(config: &Path, revoke: &Revoke) -> Result<Answer> {
    let request = Request::Revoke(RevokeRequest {
        target: revoke.target.clone(),
        to: revoke.who.selector(),
        all: revoke.all,
    });
    let Reply::Revoked(events) = ask(config, &request)? else {
        return unexpected();
    };
    for event in &events {
        print_one(event, &revoke.json, as_line)?;
    }
    if events.is_empty() {
        if !revoke.json.json {
            print("nothing was granted to them; enforcer grants lists what is\n")?;
        }
        return Ok(Answer::No);
    }
    Ok(Answer::Yes)
}

pub(super) fn list(config: &Path, json: &Json) -> Result<Answer> {
    let Reply::Grants(report) = ask(config, &Request::Grants)? else {
        return unexpected();
    };
    print_one(&report, json, render)
}

pub(super) fn enable_monit_access(config: &Path, access: &MonitAccess) -> Result<Answer> {
    let who = Who {
        user: access.user.clone(),
        ..Who::default()
    };
    let monit = Grant {
        target: MONIT.to_owned(),
        who,
        time: None,
        json: Json { json: false },
    };
    grant(config, &monit)
}

/// The arguments, with the command that the binary's name stands for, where it is called by another name than its own.
pub(super) fn as_called(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name);
    if name.is_some_and(|name| MONIT_NAMES.iter().any(|monit| name == *monit)) {
        arguments.insert(1, "enable-monit-access".into());
    }
    arguments
}

fn ask(config: &Path, request: &Request) -> Result<Reply> {
    let socket = place(config)?.socket;
    Ok(runtime()?.block_on(control::ask(&socket, request, PATIENCE))?)
}

fn unexpected() -> Result<Answer> {
    bail!("the daemon answered something else; is it another version?")
}

pub(crate) fn render(report: &GrantsReport) -> String {
    if report.grants.is_empty() {
        return "nothing is granted\n".to_owned();
    }
    let mut page = Page::default();
    let rows = report.grants.iter().map(|grant| {
        [
            grant.target.clone(),
            whom(grant),
            grant.since.clone(),
            grant.expires.clone().unwrap_or_else(|| "never".to_owned()),
            format!("{}[{}] uid {}", text::name(&grant.comm), grant.pid, grant.uid),
            note(grant),
        ]
    });
    page.table(["target", "to", "since", "expires", "asked by", ""], rows);
    page.into_text()
}

fn whom(grant: &GrantStatus) -> String {
    match (grant.user, &grant.cgroup) {
        (Some(user), None) => format!("user {user}"),
        (Some(user), Some(cgroup)) => format!("user {user} in {cgroup}"),
        (None, cgroup) => format!("anybody in {}", cgroup.as_deref().unwrap_or_default()),
    }
}

/// Why it lets nobody in now, if it does not.
fn note(grant: &GrantStatus) -> String {
    if !grant.active {
        "inactive: the target is not configured with grants = true".to_owned()
    } else if grant.cgroup_exists == Some(false) {
        "the cgroup does not exist now".to_owned()
    } else if let Some(by) = &grant.cgroup_writable {
        format!("lets nobody in: {by}")
    } else {
        String::new()
    }
}

impl Who {
    fn selector(&self) -> Selector {
        Selector {
            user: self.user.clone(),
            cgroup: self.cgroup.clone(),
            pid: self.pid,
        }
    }
}
