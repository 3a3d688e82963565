//! `enforcer check`: the verdict on an attempt, by the rule set in the kernel, with its reasons.

use std::{collections::BTreeMap, net::IpAddr, path::Path};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use enforcer_ebpf::Verdict;

use super::{ExitStatus, Json, asked_status, complain, elsewhere, place, print_one, runtime};
use crate::{
    backend::{ActiveRules, BackendError, Lacking},
    config::Settings,
    host::{self, Identities, START},
    policy::{CgroupPath, Destination, Endpoint, HostUsers, Name, Protocol, Uid, shown},
    resolve::{LOOKUP_TIMEOUT, lookup},
    ruleset::{Attempt, Subject},
    status::{Elsewhere, saved_names},
    text::{self, Page},
    wire::{
        self, Schema,
        check::{CheckReport, CheckTarget},
    },
};

#[derive(Debug, Args)]
#[command(allow_missing_positional = true)]
pub(super) struct Check {
    /// User name or UID; optional with --kernel
    #[arg(required_unless_present = "kernel")]
    user: Option<String>,
    /// [tcp://|udp://]ADDRESS:PORT, IPv6 in brackets; a name is looked up and each address checked
    destination: String,
    /// Owner of the socket [default: USER]
    #[arg(long, value_name = "USER")]
    socket_user: Option<String>,
    /// The connecting task's cgroup, from the root of the cgroup v2 hierarchy
    #[arg(long, value_name = "PATH", default_value = "/")]
    cgroup: String,
    /// Evaluate as a kernel thread; USER is ignored, and the socket is root's unless --socket-user is given
    #[arg(long)]
    kernel: bool,
    /// Evaluate as if from another network namespace
    #[arg(long)]
    foreign_netns: bool,
    #[command(flatten)]
    json: Json,
}

pub(super) fn run(config: &Path, check: &Check) -> Result<ExitStatus> {
    let mut settings = place(config)?;
    let open = |settings: &Settings| Ok::<_, BackendError>(ActiveRules::open(settings)?.filter(ActiveRules::decide));
    let mut active = open(&settings)?;
    let by_daemon = || Elsewhere::of_daemon(&settings, &asked_status(&settings)?);
    if active.is_none()
        && let Some(places) = elsewhere(Elsewhere::find(&settings).or_else(by_daemon))
    {
        settings = places;
        active = open(&settings)?;
    }
    let settings = &settings;
    let active = active.ok_or_else(|| {
        anyhow!(
            "nothing is active in {} nor in nftables table inet {}; {START}, or run enforcer apply",
            settings.pin_dir.display(),
            settings.nft_table
        )
    })?;
    // A kernel thread's UID is root's; it counts only where the programs cannot tell that it is one (D3).
    let task = match &check.user {
        Some(name) if !check.kernel => Uid::parse(name, &HostUsers)?,
        Some(_) | None => Uid(0),
    };
    let mount = host::cgroup2_mount()?;
    let covered = settings
        .cgroup
        .as_deref()
        .or(mount.as_deref())
        .and_then(host::directory_id);
    let cgroup = CgroupPath::parse(&check.cgroup).map_err(|error| anyhow!("cgroup {}: {error}", check.cgroup))?;
    let cgroups = host::ancestors(mount.as_deref(), &cgroup).with_context(|| match &mount {
        Some(mount) => format!("cgroup {cgroup} below {}", mount.display()),
        None => format!("cgroup {cgroup}"),
    })?;
    let owner = check.socket_user.as_deref().map(|name| Uid::parse(name, &HostUsers));
    let subject = Subject {
        task,
        socket: Some(owner.transpose()?.unwrap_or(task)),
        kernel_thread: check.kernel,
        cgroups,
    };
    let (protocol, addresses, port) = destination(&check.destination, settings)?;
    let mut answer = ExitStatus::Yes;
    for address in addresses {
        let attempt = Attempt {
            protocol,
            address,
            port,
            foreign_netns: check.foreign_netns,
            subject: subject.clone(),
        };
        let report = judge(&active, &attempt, covered)?;
        if report.verdict != wire::Verdict::Allow {
            answer = ExitStatus::No;
        }
        print_one(&report, &check.json, CheckReport::render)?;
    }
    Ok(answer)
}

impl CheckReport {
    fn render(&self) -> String {
        let mut page = Page::default();
        page.line(format_args!("{}  {}: {}", self.verdict, self.destination, self.reason));
        for target in &self.targets {
            page.line(format_args!("      target {}: {}", target.name, target.reason));
        }
        page.into_text()
    }
}

/// `covered` is the id of the cgroup to be evaluated, where that is known.
fn judge(active: &ActiveRules, attempt: &Attempt, covered: Option<u64>) -> Result<CheckReport> {
    let checked = active.check(attempt, covered)?;
    let subject = &checked.subject;
    let identities = Identities::new(Path::new("/"), &BTreeMap::new());
    let user = |uid: Uid| text::user(uid.0, identities.name_of(Some(uid.0)).as_deref());
    let who = match (subject.kernel_thread, subject.socket) {
        (true, Some(socket)) if socket != Uid(0) => format!("kernel threads with a socket of {}", user(socket)),
        (true, _) => "kernel threads".to_owned(),
        (false, Some(socket)) if socket != subject.task => {
            format!("{} with a socket of {}", user(subject.task), user(socket))
        }
        (false, _) => user(subject.task),
    };
    let targets: Vec<CheckTarget> = checked
        .owners
        .iter()
        .map(|(name, admits)| CheckTarget {
            name: name.clone(),
            admits: *admits,
            reason: if *admits {
                format!("allows {who}")
            } else {
                format!("has no principal that matches {who}")
            },
        })
        .collect();
    let refusing: Vec<&str> = targets
        .iter()
        .filter(|target| !target.admits)
        .map(|target| target.name.as_str())
        .collect();
    let reason = match (checked.verdict, checked.without) {
        // What is connected has been evaluated by then.
        (Verdict::Unjudged, Some(Lacking::Program(hook @ ("sendmsg4" | "sendmsg6")))) => format!(
            "a datagram sent without connect is not evaluated, as eBPF program {hook} is not attached where it should \
             be, while connect is; {START}, or run enforcer apply"
        ),
        (Verdict::Unjudged, Some(Lacking::Program(hook))) => format!(
            "nothing is evaluated, as eBPF program {hook} is not attached where it should be; {START}, or run enforcer \
             apply"
        ),
        (Verdict::Unjudged, Some(Lacking::Chain(chain))) => format!(
            "nothing is certain, as another process changed what chain {chain} of the nftables table leads to; \
             {START}, or run enforcer apply"
        ),
        (Verdict::Unjudged, None) if is_only_local(active, attempt, covered)? => {
            "an endpoint here, but not evaluated in another network namespace".to_owned()
        }
        (Verdict::Unjudged, None) => "not an endpoint of any target".to_owned(),
        (Verdict::Allow, _) => format!("every target that contains the endpoint allows {who}"),
        (Verdict::Deny, _) => format!("denied by {}", refusing.join(", ")),
        (Verdict::WouldDeny, _) => format!("allowed in audit mode; {} would deny it", refusing.join(", ")),
    };
    let canonical = std::net::SocketAddr::new(attempt.address.to_canonical(), attempt.port);
    Ok(CheckReport {
        schema: Schema::Check,
        verdict: checked.verdict.into(),
        judged: checked.verdict != Verdict::Unjudged,
        destination: format!("{} {canonical}", attempt.protocol),
        generation: checked.generation,
        targets,
        reason,
    })
}

/// Whether it is an endpoint in our own network namespace (D6).
fn is_only_local(active: &ActiveRules, attempt: &Attempt, covered: Option<u64>) -> Result<bool> {
    let here = Attempt {
        foreign_netns: false,
        ..attempt.clone()
    };
    Ok(attempt.foreign_netns && active.check(&here, covered)?.verdict != Verdict::Unjudged)
}

/// A destination as it is dialled: unlike an endpoint it may be unspecified.
fn destination(text: &str, settings: &Settings) -> Result<(Protocol, Vec<IpAddr>, u16)> {
    let shown = shown(text);
    let (protocol, rest) = match text.split_once("://") {
        Some(("tcp" | "nats" | "tls", rest)) => (Protocol::Tcp, rest),
        Some(("udp", rest)) => (Protocol::Udp, rest),
        Some(_) => {
            bail!("destination {shown}: unknown protocol; use tcp://ADDRESS:PORT or udp://ADDRESS:PORT")
        }
        None => (Protocol::Tcp, text),
    };
    if let Ok(address) = rest.parse::<std::net::SocketAddr>() {
        return Ok((protocol, vec![address.ip()], address.port()));
    }
    let endpoint = Endpoint::parse(text).map_err(|error| anyhow!("destination {shown}: {error}"))?;
    let Destination::Name(name) = &endpoint.destination else {
        bail!("destination {shown}: give one address and port, such as tcp://10.0.0.5:4222");
    };
    let port = endpoint.port.get();
    // As the daemon does it (N1).
    let (addresses, why) = runtime()?.block_on(lookup(name, LOOKUP_TIMEOUT)).into_addresses();
    if !addresses.is_empty() {
        return Ok((protocol, addresses.into_iter().collect(), port));
    }
    let known = known(name, settings);
    if known.is_empty() {
        bail!("look up {name}: {why}");
    }
    complain(
        "warning",
        &format!("look up {name}: {why}; its last known addresses are checked"),
    );
    Ok((protocol, known, port))
}

/// The addresses that the daemon knows of a name, or without one those of the last known good rules.
fn known(name: &Name, settings: &Settings) -> Vec<IpAddr> {
    let names = asked_status(settings).map(|status| status.names);
    let names = names.or_else(|| saved_names(settings)).unwrap_or_default();
    let named = names.into_iter().find(|known| known.name == name.to_string());
    let addresses = named.map(|known| known.addresses).unwrap_or_default();
    addresses.iter().filter_map(|address| address.parse().ok()).collect()
}
