//! The instance that a configuration describes: what is asked for, what is active, and the daemon.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    buses::{self, Member},
    findings::{Findings, Gaps},
};
use crate::{
    backend::{
        ActiveRules,
        jobs::{self, ChainDump},
    },
    bosh,
    config::{Config, ConfigError, Settings},
    control::{self, AskError},
    grants::{self, Moment},
    host::{self, START, hierarchy::Hierarchy},
    inputs::complete,
    jobs::JobRules,
    policy::{Endpoint, HostUsers, MONIT, Mode, Name, Policy, Unresolved, Users},
    resolve::{Known, LOOKUP_TIMEOUT, lookup},
    ruleset::{Host, Resolved, RuleSet, compile},
    state::{self, LastGood},
    wire::{
        ActiveBackend, Reply, Request, Status,
        doctor::Weight::{High, Medium},
    },
};

/// The configuration, and what it is about.
#[derive(Clone, Debug, Default)]
pub(super) struct Instance {
    pub(super) config: PathBuf,
    pub(super) settings: Settings,
    /// Why the configuration is invalid.
    pub(super) fault: Option<String>,
    /// Principals whose users do not exist.
    pub(super) absent: Vec<String>,
    /// The mount of cgroup v2.
    pub(super) hierarchy: Option<Hierarchy>,
    /// The cgroup that eBPF is attached to.
    pub(super) cgroup: Option<PathBuf>,
    pub(super) host: Host,
    pub(super) rules: Option<RuleSet>,
    /// The endpoints of target monit.
    pub(super) monit: BTreeSet<Endpoint>,
    /// Whether somebody was granted monit, there now or not.
    pub(super) grants_monit: bool,
    /// The chain that rules of jobs are in (B5).
    pub(super) jobs: ChainDump,
    /// Whether the port of a name that never resolved is protected on every address.
    pub(super) closes: bool,
    /// Names that do not resolve, and why.
    pub(super) unresolved: Vec<(String, String)>,
    pub(super) members: Vec<Member>,
    pub(super) daemon: Option<Status>,
    pub(super) active: Option<ActiveBackend>,
}

/// A configuration file, and what it says.
pub(super) struct Read {
    pub(super) settings: Settings,
    pub(super) absent: Vec<String>,
    pub(super) policy: Result<(Config, Policy), String>,
}

impl Read {
    pub(super) fn of(config: Result<Config, ConfigError>, users: &dyn Users) -> Self {
        let mut this = Self {
            settings: Settings::default(),
            absent: Vec::new(),
            policy: Err(String::new()),
        };
        let read = config.map_err(|error| error.to_string());
        this.policy = read.and_then(|config| {
            this.settings = config.settings.clone();
            let read = Policy::from_config(&config, users).map_err(|error| error.to_string())?;
            this.absent = read.absent.iter().map(ToString::to_string).collect();
            Ok((config, read.policy))
        });
        this
    }
}

impl Instance {
    pub(super) async fn collect(path: &Path, gaps: &mut Gaps) -> Self {
        let Read {
            settings,
            absent,
            policy,
        } = Read::of(Config::load(path), &HostUsers);
        let hierarchy = gaps.saw("cgroup v2 mounts", Hierarchy::find()).flatten();
        let mount = hierarchy.as_ref().map(|found| found.mount.clone());
        let mut this = Self {
            config: path.into(),
            cgroup: settings.cgroup.clone().or_else(|| mount.clone()),
            daemon: ask_daemon(&settings, gaps).await,
            active: active(&settings, gaps),
            fault: policy.as_ref().err().cloned(),
            settings,
            absent,
            hierarchy,
            ..Self::default()
        };
        let read = policy.ok().map(|(config, policy)| this.complete(&config, policy, gaps));
        let cgroups = read.as_ref().map(|(policy, ..)| policy.cgroups()).unwrap_or_default();
        let host = host::snapshot(mount.as_deref(), &cgroups);
        this.host = gaps.saw("addresses of this host", host).unwrap_or_default();
        if let Some((policy, known, buses)) = read {
            let (names, unresolved) = look_up(policy.names(), &known).await;
            this.unresolved = unresolved;
            this.rules = gaps.saw("the rules", compile(&policy, &names, &this.host));
            if let Some(rules) = &this.rules {
                this.members = buses::members(&buses, &names, rules).await;
            }
        }
        this
    }

    /// The policy with the message bus and with what was granted; what is known of names, and which endpoints are
    /// message buses.
    fn complete(&mut self, config: &Config, policy: Policy, gaps: &mut Gaps) -> (Policy, Known, BTreeSet<Endpoint>) {
        let saved = gaps.saw("the last known good rules", state::load(&self.settings.state_dir));
        let saved = saved.flatten().map(|(good, _)| good);
        let bus = read_bus(config.bus_dir(), saved.as_ref().and_then(LastGood::bus), gaps);
        let grants = gaps.saw("the grants", grants::load(&self.settings.state_dir));
        let mut grants = grants.unwrap_or_default();
        grants.expire(Moment::now());
        self.closes = policy.dns.unresolved == Unresolved::Closed;
        self.grants_monit = grants.iter().any(|(key, _)| key.target == MONIT);
        let chain = jobs::read(&self.settings);
        self.jobs = gaps.saw("rules of jobs", chain).unwrap_or_default();
        let mut jobs = JobRules::default();
        if let Some(found) = &self.hierarchy {
            jobs.take(self.jobs.clone(), &found.mount);
        }
        let policy = complete(config, policy, bus.as_ref(), &grants, &jobs);
        self.monit = policy
            .target(MONIT)
            .map(|monit| monit.endpoints.clone())
            .unwrap_or_default();
        let buses = buses::endpoints(config, &policy);
        (policy, saved.map(|good| good.names).unwrap_or_default(), buses)
    }

    /// Addresses of this host, the two loopback ones included; of a prefix that is local, the first.
    pub(super) fn addresses(&self) -> BTreeSet<IpAddr> {
        let local = self.host.local.iter().map(|net| net.addr().to_canonical());
        local
            .chain([Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()])
            .collect()
    }

    pub(super) fn findings(&self, findings: &mut Findings) {
        of_configuration(self.fault.as_deref(), &self.absent, findings);
        if self.active.is_none() {
            findings.one(
                "nothing-in-force",
                High,
                "no rules are active: every user can connect to every endpoint",
                &format!("{START}, or run enforcer apply"),
            );
        }
        if self.daemon.is_none() {
            findings.one(
                "no-daemon",
                Medium,
                "the daemon is not running: active rules stay, but they do not follow changes of names, addresses and \
                 cgroups, and what another process removes is not repaired",
                START,
            );
        }
        findings.each(
            "degraded",
            Medium,
            "the daemon is degraded",
            self.daemon.iter().flat_map(|status| status.causes.clone()),
            "fix each cause as it says",
        );
        let audits = self.rules.as_ref().is_some_and(|rules| rules.mode == Mode::Audit);
        if audits || self.daemon.as_ref().is_some_and(|status| status.mode == Mode::Audit) {
            findings.one(
                "audit-mode",
                Medium,
                "mode = \"audit\": connections that the rules deny are counted, not denied",
                "set mode = \"enforce\" once enforcer events shows no denial of a user who needs access",
            );
        }
        let (what, hint) = if self.closes {
            (", or every address on the port of a name that never resolved", "")
        } else {
            let hint =
                "; unresolved = \"closed\" in [dns] protects the port of a name that never resolved on every address";
            ("", hint)
        };
        findings.each(
            "name-unresolved",
            Medium,
            &format!("names do not resolve: only addresses known from earlier lookups are protected{what}"),
            self.unresolved.iter().map(|(name, why)| format!("{name}: {why}")),
            &format!("fix /etc/resolv.conf, the DNS server or the name{hint}"),
        );
        buses::findings(&self.members, findings);
    }
}

/// What is wrong with a configuration, of this host or of an image.
pub(super) fn of_configuration(fault: Option<&str>, absent: &[String], findings: &mut Findings) {
    findings.each(
        "configuration",
        High,
        "the configuration is invalid: enforcer does not start with it",
        fault.map(str::to_owned),
        "fix the file; enforcer config check shows what is wrong with it",
    );
    // They match nobody (F8).
    findings.each(
        "principal-absent",
        Medium,
        "users that the configuration allows do not exist: they are denied until they do",
        absent.iter().cloned(),
        "create them, or correct the names; the daemon notices within a minute",
    );
}

/// The message bus that an agent's settings name, else the last one known.
fn read_bus(dir: Option<&Path>, before: Option<&BTreeSet<Endpoint>>, gaps: &mut Gaps) -> Option<BTreeSet<Endpoint>> {
    let read = bosh::read_whole(dir?);
    let now = read.after(before).map(|bus| bus.endpoints);
    // Where there are none yet, nothing was kept from being looked at.
    for fault in read.faults.into_iter().filter(|fault| !fault.is_missing()) {
        gaps.add("the message bus", fault);
    }
    now.or_else(|| before.cloned())
}

async fn ask_daemon(settings: &Settings, gaps: &mut Gaps) -> Option<Status> {
    match control::ask(&settings.socket, &Request::Status, Duration::from_secs(5)).await {
        Ok(Reply::Status(status)) => return Some(*status),
        Err(AskError::NoDaemon { .. }) => {}
        Ok(_) => gaps.add("the daemon", "its answer is not a status"),
        Err(error) => gaps.add("the daemon", error),
    }
    None
}

fn active(settings: &Settings, gaps: &mut Gaps) -> Option<ActiveBackend> {
    let opened = ActiveRules::open_as_far_as_possible(settings);
    let (active, unread) = gaps.saw("what is active", opened)?;
    if let Some(unread) = unread {
        gaps.add("what is active", unread);
    }
    active.map(|active| active.backend())
}

/// Looks every name up now, and falls back to what is known of it; and which do not resolve, with the reason.
async fn look_up(names: BTreeSet<Name>, known: &Known) -> (Resolved, Vec<(String, String)>) {
    let ask = |name: Name| tokio::spawn(async move { lookup(&name, LOOKUP_TIMEOUT).await });
    let tasks: BTreeMap<Name, _> = names.into_iter().map(|name| (name.clone(), ask(name))).collect();
    let (mut resolved, mut unresolved) = (Resolved::new(), Vec::new());
    for (name, task) in tasks {
        let (mut addresses, why) = match task.await {
            Ok(answer) => answer.into_addresses(),
            Err(error) => (BTreeSet::new(), error.to_string()),
        };
        if addresses.is_empty() {
            unresolved.push((name.to_string(), why));
        }
        let before = known.get(&name).into_iter();
        addresses.extend(before.flat_map(|known| known.current.union(&known.left)));
        resolved.insert(name, addresses);
    }
    (resolved, unresolved)
}
