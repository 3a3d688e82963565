//! `enforcer events`: what happened, line by line or added up.

use std::{
    fmt::Display,
    io::{self, Write as _},
    path::Path,
    str::FromStr,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use clap::Args;
use jiff::Timestamp;
use nix::unistd::User;

use super::{ExitStatus, Json, as_line, asked_status, complain, is_nobody, place, print, runtime};
use crate::{
    config::Settings,
    control::{self, AskError},
    events::{Filter, kept},
    policy::{HostUsers, Uid},
    status::from_outside,
    text::{self, Page, user},
    wire::{DenialSum, EventFilter, Reply, Request, SumOf, rfc3339},
};

#[derive(Debug, Args)]
pub(super) struct Events {
    /// Keep printing new events, like tail -f
    #[arg(long, short)]
    follow: bool,
    /// Add denials up by target, user, program and cgroup: of up to 35 days, restarts included
    ///
    /// Without it only the last 1,024 events since the daemon started are printed.
    #[arg(long, conflicts_with = "follow")]
    summary: bool,
    /// Only those since then: a duration such as 90m or 7d, or a time such as 2026-11-20T08:00:00Z; --summary counts by
    /// the hour, and by the day what is older than two
    #[arg(long, value_name = "TIME")]
    since: Option<Since>,
    /// Only the last N; with --summary the N most frequent
    #[arg(long, short = 'n', value_name = "N")]
    lines: Option<usize>,
    /// Only those of a target
    #[arg(long, value_name = "NAME")]
    target: Option<String>,
    /// Only those of a user
    #[arg(long, value_name = "USER|UID")]
    user: Option<String>,
    #[command(flatten)]
    json: Json,
}

/// A time, or how long ago it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Since {
    Ago(Duration),
    At(Timestamp),
}

impl FromStr for Since {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(ago) = humantime::parse_duration(text) {
            return Ok(Self::Ago(ago));
        }
        let midnight = format!("{text}T00:00:00Z");
        let at = text.parse().or_else(|_| midnight.parse());
        at.map(Self::At).map_err(|_: jiff::Error| {
            "neither a duration such as 90m or 7d nor a time such as 2026-11-20T08:00:00Z or 2026-11-20".to_owned()
        })
    }
}

impl Since {
    fn shown(self) -> String {
        match self {
            Self::Ago(ago) => rfc3339(SystemTime::now().checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH)),
            Self::At(at) => rfc3339(at.into()),
        }
    }
}

pub(super) fn run(config: &Path, events: &Events) -> Result<ExitStatus> {
    let user = events
        .user
        .as_ref()
        .map(|user| Uid::parse(user, &HostUsers))
        .transpose()?;
    let filter = EventFilter {
        since: events.since.map(Since::shown),
        target: events.target.clone(),
        user: user.map(|user| user.0),
        last: events.lines,
    };
    if events.summary {
        return summary(config, filter, &events.json);
    }
    let settings = place(config)?;
    warn_of_unknown(&settings, &filter);
    let request = Request::Events {
        follow: events.follow,
        filter,
    };
    runtime()?.block_on(control::ask_many(&settings.socket, &request, |reply| {
        let Reply::Event(line) = reply else { return Ok(()) };
        let line = if events.json.json {
            text::json(&line)? + "\n"
        } else {
            as_line(&line)
        };
        let mut out = io::stdout().lock();
        out.write_all(line.as_bytes())?;
        out.flush()
    }))?;
    Ok(ExitStatus::Yes)
}

/// Nothing of what does not exist may be mistaken for nothing that happened.
fn warn_of_unknown(settings: &Settings, filter: &EventFilter) {
    let recorded = |filter| sums(settings, filter).is_ok_and(|(sums, _)| !sums.is_empty());
    if let Some(target) = &filter.target
        && let Some(status) = asked_status(settings).or_else(|| from_outside(settings, None).ok())
        && !status.targets.iter().any(|known| known.name == *target)
        && !recorded(EventFilter {
            target: Some(target.clone()),
            ..EventFilter::default()
        })
    {
        let known: Vec<&str> = status.targets.iter().map(|known| known.name.as_str()).collect();
        let known = if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        };
        complain(
            "warning",
            &format!("there is no target {target}, and no denial of one is recorded; active targets: {known}"),
        );
    }
    if let Some(uid) = filter.user
        && matches!(User::from_uid(uid.into()), Ok(None))
        && !recorded(EventFilter {
            user: Some(uid),
            ..EventFilter::default()
        })
    {
        complain(
            "warning",
            &format!("no user of this host has uid {uid}, and no denial of one is recorded"),
        );
    }
}

/// As the daemon has them; without one, as they were kept last, and why nobody answered.
fn sums(settings: &Settings, filter: EventFilter) -> Result<(Vec<DenialSum>, Option<AskError>)> {
    let request = Request::Summary { filter: filter.clone() };
    let mut sums = Vec::new();
    let asked = runtime()?.block_on(control::ask_many(&settings.socket, &request, |reply| {
        if let Reply::Sum(sum) = reply {
            sums.push(*sum);
        }
        Ok(())
    }));
    match asked {
        Ok(()) => Ok((sums, None)),
        Err(error) if is_nobody(&error) => {
            let now = Timestamp::now();
            let kept = kept::load(&settings.state_dir, now)?.sums(&Filter::new(filter)?, now);
            Ok((kept, Some(error)))
        }
        Err(error) => Err(error.into()),
    }
}

fn summary(config: &Path, filter: EventFilter, json: &Json) -> Result<ExitStatus> {
    let settings = place(config)?;
    warn_of_unknown(&settings, &filter);
    let (sums, unheard) = sums(&settings, filter)?;
    if let Some(error) = unheard {
        complain("warning", &format!("{error}; these are the denials that it saved last"));
    }
    if json.json {
        let lines: serde_json::Result<Vec<String>> = sums.iter().map(text::json).collect();
        return print(&lines?.into_iter().map(|line| line + "\n").collect::<String>());
    }
    print(&render(&sums))
}

fn render(sums: &[DenialSum]) -> String {
    let mut page = Page::default();
    if sums.is_empty() {
        page.line("no denials");
        return page.into_text();
    }
    let header = [
        "count",
        "verdict",
        "target",
        "user",
        "program",
        "cgroup",
        "last endpoint",
        "first",
        "last",
    ];
    page.table(header, sums.iter().map(row));
    page.into_text()
}

fn row(sum: &DenialSum) -> [String; 9] {
    let at_least = if sum.at_least && sum.count > 1 { "at least " } else { "" };
    let socket = |owner| format!(", socket of {}", user(owner, sum.socket_user.as_deref()));
    let who = match (sum.of, sum.uid) {
        (SumOf::MoreUsers, _) => "other users".to_owned(),
        (SumOf::Unreported, _) => "not reported one by one".to_owned(),
        (SumOf::Kind | SumOf::MoreKinds, Some(uid)) => user(uid, sum.user.as_deref()),
        (SumOf::Kind | SumOf::MoreKinds, None) if sum.kernel_thread => "kernel thread".to_owned(),
        (SumOf::Kind | SumOf::MoreKinds, None) => "unknown (forwarded or kernel socket)".to_owned(),
    };
    let name = |text: &Option<String>| {
        text.as_deref()
            .map(|text| text::name(text).into_owned())
            .unwrap_or_default()
    };
    let program = match sum.of {
        SumOf::MoreKinds => "others".to_owned(),
        SumOf::Kind | SumOf::MoreUsers | SumOf::Unreported => program(sum.comm.as_deref(), sum.exe.as_deref()),
    };
    let endpoint = |endpoint| Some(format!("{} {endpoint}", sum.protocol?));
    [
        format!("{at_least}{}", sum.count),
        shown(sum.verdict.as_ref()),
        shown(sum.target.as_ref()),
        who + &sum.socket_uid.map(socket).unwrap_or_default(),
        program,
        name(&sum.cgroup),
        sum.endpoint.as_ref().and_then(endpoint).unwrap_or_default(),
        seconds(&sum.first),
        seconds(&sum.last),
    ]
}

/// A program by its path, and the task's name where that is another.
fn program(comm: Option<&str>, exe: Option<&str>) -> String {
    /// What the kernel keeps of a task's name (`TASK_COMM_LEN`, less the zero).
    const NAME: usize = 15;
    let name = |text: &str| text::name(text).into_owned();
    match (comm, exe) {
        (None, None) => String::new(),
        (Some(one), None) | (None, Some(one)) => name(one),
        (Some(comm), Some(exe)) => {
            let file = exe.rsplit('/').next().unwrap_or_default();
            if file.get(..file.floor_char_boundary(NAME)) == Some(comm) {
                name(exe)
            } else {
                format!("{} ({})", name(comm), name(exe))
            }
        }
    }
}

fn shown(value: Option<&impl Display>) -> String {
    value.map(ToString::to_string).unwrap_or_default()
}

/// A time without what is less than a second.
fn seconds(time: &str) -> String {
    time.split_once('.')
        .map_or_else(|| time.to_owned(), |(seconds, _)| format!("{seconds}Z"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        events::{Summary, tests::denial},
        wire::{ActiveBackend, Denial},
    };

    #[test]
    fn a_time_is_a_duration_or_a_point() {
        let parsed = |text: &str| text.parse::<Since>();
        assert_eq!(parsed("7d"), Ok(Since::Ago(Duration::from_hours(7 * 24))));
        let at = |text: &str| {
            text.parse()
                .map(Since::At)
                .map_err(|error: jiff::Error| error.to_string())
        };
        assert_eq!(parsed("2026-11-20"), at("2026-11-20T00:00:00Z"));
        assert_eq!(parsed("2026-11-20T10:00:00+02:00"), at("2026-11-20T08:00:00Z"));
        for wrong in ["", "yesterday", "7", "2026-13-01"] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_summary_is_a_table() {
        let now = Timestamp::UNIX_EPOCH;
        let mut summary = Summary::default();
        let vcap = Denial {
            task_user: Some("vcap".to_owned()),
            socket_uid: Some(0),
            socket_user: Some("root".to_owned()),
            cgroup: Some("/a\nb".to_owned()),
            ..denial(1000, "monit", "curl")
        };
        let logged = Denial {
            backend: ActiveBackend::Nftables,
            task_uid: None,
            socket_uid: None,
            comm: None,
            ..denial(0, "bus", "")
        };
        for event in [&vcap, &logged, &logged] {
            summary.add(event, now);
        }
        summary.add_unreported("bus", 3, now);
        let page = render(&summary.sums(&Filter::default(), now));
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let lines: Vec<String> = page.lines().map(words).collect();
        let time = "1970-01-01T00:00:00Z 1970-01-01T00:00:00Z";
        assert_eq!(
            lines,
            [
                "count verdict target user program cgroup last endpoint first last".to_owned(),
                format!("3 bus not reported one by one {time}"),
                format!("at least 2 deny bus unknown (forwarded or kernel socket) tcp 127.0.0.1:2822 {time}"),
                format!(
                    "1 deny monit uid 1000 (vcap), socket of uid 0 (root) curl \"/a\\nb\" tcp 127.0.0.1:2822 {time}"
                ),
            ]
        );
        assert_eq!(render(&[]), "no denials\n");
    }
}
