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
    backend::jobs::{self, ChainDump},
    bosh,
    config::{self, Config, ConfigError, Settings},
    control::{self, AskError},
    grants::{self, Moment},
    host::{self, START, hierarchy::Hierarchy},
    inputs::{complete, is_gone},
    jobs::JobRules,
    policy::{Endpoint, HostUsers, MONIT, Mode, Name, Policy, Unresolved, Users},
    resolve::{Known, KnownName, LOOKUP_TIMEOUT, lookup, protection},
    ruleset::{Host, Resolved, RuleSet, compile},
    state::{self, LastGood},
    status::{Elsewhere, from_outside},
    wire::{
        ActiveBackend, ConditionId, NameProtection, Reply, Request, Severity, State, Status,
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
    /// What a start does with an invalid one.
    pub(super) start: StartWithout,
    /// That what is active is at other places than the configuration names.
    pub(super) runs_elsewhere: Option<String>,
    /// That the packaged service would not start with it.
    pub(super) service_waits: bool,
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
    /// Names that do not resolve.
    pub(super) unresolved: Vec<Unknown>,
    pub(super) members: Vec<Member>,
    /// As `enforcer status` has it; none where that cannot be told.
    pub(super) status: Option<Status>,
    /// What enforces; none where nothing does, or that cannot be told.
    pub(super) active: Option<ActiveBackend>,
}

/// What a start does with a configuration that is invalid (F4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum StartWithout {
    /// It goes on with the last known good rules, which are saved.
    GoesOn,
    /// It ends: no rules are saved.
    #[default]
    NothingSaved,
    /// It ends: not even the file tells where they are.
    NoPlace,
}

/// A name that does not resolve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unknown {
    pub(super) name: String,
    pub(super) why: String,
    pub(super) protects: NameProtection,
}

/// A configuration file, and what it says.
pub(super) struct Read {
    /// None where it does not even say where the instance is.
    pub(super) settings: Option<Settings>,
    pub(super) absent: Vec<String>,
    pub(super) policy: Result<(Config, Policy), String>,
}

impl Read {
    pub(super) fn of(config: Result<Config, ConfigError>, path: &Path, users: &dyn Users) -> Self {
        let mut this = Self {
            settings: None,
            absent: Vec::new(),
            policy: Err(String::new()),
        };
        let read = config.map_err(|error| {
            this.settings = config::place(path, path == Path::new(config::DEFAULT_PATH));
            error.to_string()
        });
        this.policy = read.and_then(|config| {
            this.settings = Some(config.settings.clone());
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
        } = Read::of(Config::load(path), path, &HostUsers);
        let mut elsewhere = settings.as_ref().and_then(Elsewhere::find);
        // Where a start would look.
        let starts_at = settings.as_ref().map(|settings| settings.state_dir.clone());
        let mut settings = elsewhere.as_ref().map(|found| found.settings.clone()).or(settings);
        let hierarchy = gaps.saw("cgroup v2 mounts", Hierarchy::find()).flatten();
        let mount = hierarchy.as_ref().map(|found| found.mount.clone());
        let (status, saved) = if let Some(settings) = &mut settings {
            let status = ask_status(settings, gaps).await;
            if let Some(found) = status
                .as_ref()
                .and_then(|status| Elsewhere::of_daemon(settings, status))
            {
                settings.clone_from(&found.settings);
                elsewhere.get_or_insert(found);
            }
            (status, saved_in(&settings.state_dir, gaps))
        } else {
            gaps.add("what is active", "the configuration does not say where it would be");
            (None, None)
        };
        let gone = || policy.as_ref().is_ok_and(|(_, policy)| is_gone(policy, saved.as_ref()));
        let gone = (!path.exists() && gone()).then(|| ConfigError::Gone { path: path.into() }.to_string());
        let start = match (starts_at, &settings) {
            (None, _) | (_, None) => StartWithout::NoPlace,
            (Some(dir), Some(settings)) => {
                let is_same = dir == settings.state_dir;
                let goes_on = saved.is_some() && is_same || !is_same && saved_in(&dir, gaps).is_some();
                if goes_on {
                    StartWithout::GoesOn
                } else {
                    StartWithout::NothingSaved
                }
            }
        };
        let settings = settings.unwrap_or_default();
        let active = status.as_ref().map(|status| status.backend);
        let mut this = Self {
            config: path.into(),
            service_waits: path == Path::new(config::DEFAULT_PATH) && !host::service_starts(),
            cgroup: settings.cgroup.clone().or_else(|| mount.clone()),
            status,
            active: active.filter(|backend| *backend != ActiveBackend::None),
            fault: policy.as_ref().err().cloned().or(gone),
            start,
            settings,
            runs_elsewhere: elsewhere.as_ref().map(ToString::to_string),
            absent,
            hierarchy,
            ..Self::default()
        };
        let read = policy
            .ok()
            .map(|(config, policy)| this.complete(&config, policy, saved, gaps));
        let cgroups = read.as_ref().map(|(policy, ..)| policy.cgroups()).unwrap_or_default();
        let host = host::snapshot(mount.as_deref(), &cgroups);
        this.host = gaps.saw("addresses of this host", host).unwrap_or_default();
        if let Some((policy, known, buses)) = read {
            let (names, unresolved) = look_up(policy.names(), &known, policy.dns.unresolved).await;
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
    fn complete(
        &mut self,
        config: &Config,
        policy: Policy,
        saved: Option<LastGood>,
        gaps: &mut Gaps,
    ) -> (Policy, Known, BTreeSet<Endpoint>) {
        let bus = read_bus(config.bus_dir(), saved.as_ref().and_then(LastGood::bus), gaps);
        let grants = gaps.saw("the grants", grants::load(&self.settings.state_dir));
        let mut grants = grants.unwrap_or_default();
        grants.expire(Moment::now());
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
        of_configuration(self.fault.as_deref(), self.start, &self.absent, findings);
        if let Some(where_it_is) = &self.runs_elsewhere {
            let remedy = "restart the daemon (systemctl restart enforcer, or sv restart enforcer)";
            findings.one("restart-needed", Medium, where_it_is, remedy);
        }
        if let Some(status) = &self.status {
            of_status(status, self.service_waits, findings);
        }
        let is_audit = |status: &Status| status.generation != 0 && status.mode == Mode::Audit;
        let audits = self.rules.as_ref().is_some_and(|rules| rules.mode == Mode::Audit);
        if audits || self.status.as_ref().is_some_and(is_audit) {
            findings.one(
                "audit-mode",
                Medium,
                "mode = \"audit\": connections that the rules deny are counted, not denied",
                "set mode = \"enforce\" once enforcer events shows no denial of a user who needs access",
            );
        }
        self.of_names(findings);
        buses::findings(&self.members, findings);
    }

    /// Names that do not resolve, for the daemon or now, weighed as `status` weighs them.
    fn of_names(&self, findings: &mut Findings) {
        let stale = self.status.iter().flat_map(|status| &status.names);
        let stale = stale.filter(|name| name.stale).map(|name| Unknown {
            name: name.name.clone(),
            why: name
                .cause
                .clone()
                .unwrap_or_else(|| "the last lookup failed".to_owned()),
            protects: name.protects,
        });
        let mut unknown: BTreeMap<String, Unknown> = BTreeMap::new();
        for one in stale.chain(self.unresolved.iter().cloned()) {
            unknown.entry(one.name.clone()).or_insert(one);
        }
        let open = unknown.values().any(|one| one.protects == NameProtection::Nothing);
        let (weight, hint) = if open {
            let hint =
                "; unresolved = \"closed\" in [dns] protects the port of a name that never resolved on every address";
            (High, hint)
        } else {
            (Medium, "")
        };
        findings.each(
            "name-unresolved",
            weight,
            "names do not resolve: what is protected for them does not follow them",
            unknown.values().map(|one| one.protects.fault(&one.name, &one.why)),
            &format!("fix /etc/resolv.conf, the DNS server or the name{hint}"),
        );
    }
}

/// What is wrong by `status`, weighed as it weighs.
fn of_status(status: &Status, service_waits: bool, findings: &mut Findings) {
    let start = if service_waits {
        format!("write /etc/enforcer/enforcer.toml, without which the packaged service does not start; then {START}")
    } else {
        START.to_owned()
    };
    if status.state == State::Off {
        findings.one(
            "nothing-active",
            High,
            &format!(
                "no rules are active, neither in {} nor in nftables table inet {}: every user can connect to every \
                 endpoint",
                status.pin_dir, status.nft_table
            ),
            &format!("{start}, or run enforcer apply"),
        );
    }
    if !status.daemon.running {
        let stays = ": active rules stay, but they do not follow changes of names, addresses and cgroups, grants do \
                     not end, and what another process removes is not repaired";
        let what = if status.state == State::Off { "" } else { stays };
        findings.one("no-daemon", Medium, &format!("the daemon is not running{what}"), &start);
    }
    let wrong = status.conditions.iter().filter(|one| match one.id {
        // Each has its own finding.
        ConditionId::NothingActive
        | ConditionId::DaemonNotRunning
        | ConditionId::NameStale
        | ConditionId::NameUnresolved => false,
        ConditionId::BackendFallback
        | ConditionId::MessageBus
        | ConditionId::CgroupMissing
        | ConditionId::CgroupWritable
        | ConditionId::CgroupsIgnored
        | ConditionId::ChangedByOthers
        | ConditionId::ConfigurationRejected
        | ConditionId::ControlSocket
        | ConditionId::DaemonNotAnswering
        | ConditionId::DenialsNotReported
        | ConditionId::DialsNotFollowed
        | ConditionId::ExistingConnections
        | ConditionId::Grants
        | ConditionId::HiddenFromHost
        | ConditionId::JobRules
        | ConditionId::JobsChain
        | ConditionId::Link
        | ConditionId::LocalAddresses
        | ConditionId::NameTruncated
        | ConditionId::RulesNotApplied
        | ConditionId::SavedRules
        | ConditionId::Table
        | ConditionId::UnknownUsers
        | ConditionId::Unreadable => one.severity > Severity::Info,
    });
    let mut wrong: Vec<_> = wrong.collect();
    wrong.sort_by_key(|one| std::cmp::Reverse(one.severity));
    let worst = wrong.first().map(|one| one.severity);
    findings.each(
        "degraded",
        if worst == Some(Severity::Critical) {
            High
        } else {
            Medium
        },
        if status.daemon.running {
            "the daemon is degraded"
        } else {
            "what is active is degraded"
        },
        wrong.iter().map(|one| format!("{}: {}", one.severity, one.text)),
        "fix each cause as it says",
    );
}

/// What is wrong with a configuration, of this host or of an image.
pub(super) fn of_configuration(fault: Option<&str>, start: StartWithout, absent: &[String], findings: &mut Findings) {
    let (weight, what) = match start {
        StartWithout::GoesOn => (
            Medium,
            "the configuration is invalid: a reload rejects it, and a start goes on with the last known good rules",
        ),
        StartWithout::NothingSaved => (
            High,
            "the configuration is invalid, and no last known good rules are saved: enforcer does not start with it, or \
             only with those of its files that are right",
        ),
        StartWithout::NoPlace => (
            High,
            "the configuration does not say where its rules are: enforcer does not start with it",
        ),
    };
    findings.each(
        "configuration",
        weight,
        what,
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

/// The last known good rules.
fn saved_in(state_dir: &Path, gaps: &mut Gaps) -> Option<LastGood> {
    let saved = gaps.saw("the last known good rules", state::load(state_dir));
    saved.flatten().map(|(good, _)| good)
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

/// What `enforcer status` says.
async fn ask_status(settings: &Settings, gaps: &mut Gaps) -> Option<Status> {
    let silent = match control::ask(&settings.socket, &Request::Status, Duration::from_secs(5)).await {
        Ok(Reply::Status(status)) => return Some(*status),
        Err(AskError::NoDaemon { .. } | AskError::Impostor { .. }) => None,
        Err(error @ AskError::TimedOut { .. }) => Some(error),
        Ok(_) => {
            gaps.add("the daemon", "its answer is not a status");
            return None;
        }
        Err(error) => {
            gaps.add("the daemon", error);
            return None;
        }
    };
    gaps.saw("what is active", from_outside(settings, silent.as_ref()))
}

/// Looks every name up now, and falls back to what is known of it; and which do not resolve, with the reason.
async fn look_up(names: BTreeSet<Name>, known: &Known, unresolved: Unresolved) -> (Resolved, Vec<Unknown>) {
    let ask = |name: Name| tokio::spawn(async move { lookup(&name, LOOKUP_TIMEOUT).await });
    let tasks: BTreeMap<Name, _> = names.into_iter().map(|name| (name.clone(), ask(name))).collect();
    let (mut resolved, mut unknown) = (Resolved::new(), Vec::new());
    for (name, task) in tasks {
        let (mut addresses, why) = match task.await {
            Ok(answer) => answer.into_addresses(),
            Err(error) => (BTreeSet::new(), error.to_string()),
        };
        let before = known.get(&name);
        if addresses.is_empty() {
            let known = before.map(KnownName::addresses).unwrap_or_default();
            unknown.push(Unknown {
                name: name.to_string(),
                why,
                protects: protection(!known.is_empty(), unresolved),
            });
        }
        addresses.extend(before.into_iter().flat_map(|known| known.current.union(&known.left)));
        resolved.insert(name, addresses);
    }
    (resolved, unknown)
}
