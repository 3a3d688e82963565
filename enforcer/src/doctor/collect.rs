//! What `doctor` looks at on this host: facts only, nothing is judged and nothing is changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::stream::TryStreamExt as _;

use super::{
    buses::{self, Member},
    legacy::{self, LegacyRule},
    links,
    order::{self, Cycle},
};
use crate::{
    backend::{
        InForce,
        jobs::{self, Jobs},
        probe::{Facts, Place, probe},
        third_party::{self, Attached, ForeignRule},
    },
    bosh,
    config::{Backend, Config, Settings},
    control::{self, AskError},
    grants,
    host::{
        self,
        hierarchy::{self, Hierarchy},
    },
    inputs::complete,
    jobs::JobRules,
    policy::{Endpoint, HostUsers, MONIT, Name, Policy, Protocol},
    resolve::{Known, LOOKUP_TIMEOUT, lookup},
    ruleset::{Host, Resolved, RuleSet, compile},
    state::{self, LastGood},
    sweep::{self, Listener},
    text,
    visibility::Visibility,
    wire::{ActiveBackend, Reply, Request, Status, doctor::Unseen},
};

/// What was seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) kernel: String,
    pub(super) config: PathBuf,
    /// Why the configuration means nothing.
    pub(super) fault: Option<String>,
    /// Principals whose users do not exist.
    pub(super) absent: Vec<String>,
    pub(super) settings: Settings,
    pub(super) cgroup: Option<PathBuf>,
    pub(super) facts: Facts,
    pub(super) rules: Option<RuleSet>,
    pub(super) host: Host,
    pub(super) daemon: Option<Status>,
    pub(super) in_force: Option<ActiveBackend>,
    /// Names that could not be resolved, and why.
    pub(super) unresolved: Vec<(String, String)>,
    /// Servers of a message bus that are no endpoints, as those say that are.
    pub(super) members: Vec<Member>,
    /// A process of each other network namespace, the number of its namespace first.
    pub(super) namespaces: BTreeMap<u64, String>,
    /// Devices whose packets never come to the IP hooks of this namespace.
    pub(super) passing: Vec<String>,
    pub(super) foreign: Vec<ForeignRule>,
    pub(super) chains: Vec<(String, String, String)>,
    pub(super) legacy: Vec<LegacyRule>,
    /// Interfaces that accept source routes.
    pub(super) source_route: Vec<String>,
    /// Interfaces by which packets for loopback addresses may come.
    pub(super) route_localnet: Vec<String>,
    /// Interfaces that accept segment routing headers.
    pub(super) segment_routing: Vec<String>,
    /// Addresses of a peer that MPTCP takes up.
    pub(super) mptcp: u32,
    pub(super) programs: Vec<Program>,
    pub(super) places: Vec<PlaceMode>,
    pub(super) listeners: Vec<Listener>,
    pub(super) capable: Vec<Capable>,
    pub(super) visibility: Visibility,
    /// Processes that are not covered where only a part of the host is (F9).
    pub(super) outside: Vec<String>,
    /// Whether somebody was granted monit, there now or not.
    pub(super) grants_monit: bool,
    /// The chain that rules of jobs are in (B5).
    pub(super) jobs: Jobs,
    /// Ordering cycles of units through ours.
    pub(super) cycles: Vec<Cycle>,
    pub(super) unseen: Vec<Unseen>,
}

/// A program of whoever, on the cgroup or one above it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) hook: &'static str,
    pub(super) cgroup: PathBuf,
    pub(super) above: bool,
    /// Whether it runs when ours has decided.
    pub(super) after: bool,
    pub(super) attached: Attached,
}

/// Whose a file of ours is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlaceMode {
    pub(super) kind: PlaceKind,
    pub(super) path: PathBuf,
    pub(super) uid: u32,
    pub(super) mode: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PlaceKind {
    /// Where the pin directory lies.
    Bpffs,
    /// The pin directory, or a directory in it.
    PinDir,
    Pin,
    StateDir,
    SocketDir,
    Socket,
}

/// A process that may do what we cannot stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Capable {
    pub(super) pid: u32,
    pub(super) uid: u32,
    pub(super) name: String,
    pub(super) capabilities: Vec<&'static str>,
}

pub(super) async fn host(config: &Path) -> Seen {
    let mut seen = Seen {
        config: config.into(),
        kernel: nix::sys::utsname::uname().map_or_else(
            |_| "unknown".to_owned(),
            |name| name.release().to_string_lossy().into_owned(),
        ),
        ..Seen::default()
    };
    let (policy, rest) = seen.read_config().unzip();
    let (known, buses) = rest.unwrap_or_default();
    let mount = seen.saw("cgroup v2 mounts", host::cgroup2_mount()).flatten();
    seen.cgroup = seen.settings.cgroup.clone().or_else(|| mount.clone());
    let cgroups = policy.as_ref().map(Policy::cgroups).unwrap_or_default();
    seen.host = seen
        .saw("addresses of this host", host::snapshot(mount.as_deref(), &cgroups))
        .unwrap_or_default();
    seen.ask_daemon().await;
    if let Some(policy) = &policy {
        let names = seen.look_up(policy.names(), &known).await;
        seen.rules = seen.saw("the rules", compile(policy, &names, &seen.host));
        if let Some(rules) = &seen.rules {
            seen.members = buses::members(&buses, &names, rules).await;
        }
    }
    seen.look_at_pins();
    seen.visibility = Visibility::of(&seen.settings, seen.ebpf_on(), true);
    if seen.visibility.part.is_some() {
        seen.outside = outside();
    }
    let place = Place {
        cgroup: seen.cgroup.as_deref(),
        pin_dir: &seen.settings.pin_dir,
    };
    seen.facts = probe(place).await;
    seen.look_at_network().await;
    seen.look_at_programs();
    seen.look_at_processes();
    seen.cycles = seen
        .saw("the order of systemd's units", order::cycles())
        .unwrap_or_default();
    seen
}

impl Seen {
    /// What a look brought, or that it brought nothing and why.
    fn saw<T, E: std::fmt::Display>(&mut self, what: &str, result: Result<T, E>) -> Option<T> {
        result
            .map_err(|error| {
                self.unseen.push(Unseen {
                    what: what.to_owned(),
                    why: error.to_string(),
                });
            })
            .ok()
    }

    /// What the configuration means, with the message bus and with what was granted; what is known of names, and which endpoints are
    /// message buses.
    fn read_config(&mut self) -> Option<(Policy, (Known, BTreeSet<Endpoint>))> {
        let read = Config::load(&self.config).map_err(|error| error.to_string());
        let read = read.and_then(|config| {
            self.settings = config.settings.clone();
            let read = Policy::from_config(&config, &HostUsers).map_err(|error| error.to_string())?;
            self.absent = read.absent.iter().map(ToString::to_string).collect();
            Ok((config, read.policy))
        });
        let (config, policy) = match read {
            Ok(read) => read,
            Err(fault) => {
                self.fault = Some(fault);
                return None;
            }
        };
        let left = self.saw("what was in force last", state::load(&self.settings.state_dir));
        let left = left.flatten().map(|(good, _)| good);
        let bus = self.read_bus(config.bus_dir(), left.as_ref().and_then(LastGood::bus));
        let mut grants = self
            .saw("the grants", grants::load(&self.settings.state_dir))
            .unwrap_or_default();
        grants.expire(crate::grants::Moment::now());
        self.grants_monit = grants.iter().any(|(key, _)| key.target == MONIT);
        let chain = jobs::read(&self.settings);
        self.jobs = self.saw("rules of jobs", chain).unwrap_or_default();
        let mut jobs = JobRules::default();
        if let Ok(Some(mount)) = host::cgroup2_mount() {
            jobs.take(self.jobs.clone(), &mount);
        }
        let policy = complete(&config, policy, bus.as_ref(), &grants, &jobs);
        let buses = buses::endpoints(&config, &policy);
        Some((policy, (left.map(|good| good.names).unwrap_or_default(), buses)))
    }

    /// The message bus that an agent's settings name, else the last one known.
    fn read_bus(&mut self, dir: Option<&Path>, before: Option<&BTreeSet<Endpoint>>) -> Option<BTreeSet<Endpoint>> {
        let read = bosh::read_whole(dir?);
        let now = read.after(before).map(|bus| bus.endpoints);
        // Where there are none yet, nothing was kept from being looked at.
        for fault in read.faults.into_iter().filter(|fault| !fault.is_missing()) {
            self.saw::<(), _>("the message bus", Err(fault));
        }
        now.or_else(|| before.cloned())
    }

    async fn ask_daemon(&mut self) {
        match control::ask(&self.settings.socket, &Request::Status, Duration::from_secs(5)).await {
            Ok(Reply::Status(status)) => self.daemon = Some(*status),
            Err(AskError::NoDaemon { .. }) => {}
            Ok(_) => drop(self.saw::<(), _>("the daemon", Err("it answered something else than its status"))),
            Err(error) => drop(self.saw::<(), _>("the daemon", Err(error))),
        }
        let in_force = match InForce::open_as_far_as_possible(&self.settings) {
            Ok((in_force, unread)) => {
                if let Some(unread) = unread {
                    self.saw::<(), _>("what is in force", Err(unread));
                }
                in_force.map(|in_force| in_force.backend())
            }
            Err(error) => self.saw("what is in force", Err(error)),
        };
        self.in_force = in_force;
    }

    /// Looks every name up now, and falls back to what is known of it.
    async fn look_up(&mut self, names: BTreeSet<Name>, known: &Known) -> Resolved {
        let tasks: Vec<_> = names
            .into_iter()
            .map(|name| {
                let asked = name.clone();
                (name, tokio::spawn(async move { lookup(&asked, LOOKUP_TIMEOUT).await }))
            })
            .collect();
        let mut resolved = Resolved::new();
        for (name, task) in tasks {
            let (mut addresses, why) = match task.await {
                Ok(answer) => answer.into_addresses(),
                Err(error) => (BTreeSet::new(), error.to_string()),
            };
            if addresses.is_empty() {
                self.unresolved.push((name.to_string(), why));
            }
            addresses.extend(
                known
                    .get(&name)
                    .into_iter()
                    .flat_map(|known| known.current.union(&known.left)),
            );
            resolved.insert(name, addresses);
        }
        resolved
    }

    /// The cgroup, where eBPF enforces or is to.
    fn ebpf_on(&self) -> Option<&Path> {
        let enforces = match self.in_force {
            Some(backend) => backend.has_ebpf(),
            None => self.settings.backend != Backend::Nftables,
        };
        // Pins that do not exist yet, where no bpffs does, are the feature's matter.
        self.cgroup
            .as_deref()
            .filter(|_| enforces && self.settings.pin_dir.exists())
    }

    fn look_at_pins(&mut self) {
        let Settings {
            pin_dir,
            state_dir,
            socket,
            ..
        } = self.settings.clone();
        let parent = |path: &Path| path.parent().map(Path::to_path_buf);
        if let Some(bpffs) = parent(&pin_dir) {
            self.look_at_mode(PlaceKind::Bpffs, &bpffs);
        }
        self.look_at_mode(PlaceKind::StateDir, &state_dir);
        if let Some(dir) = parent(&socket) {
            self.look_at_mode(PlaceKind::SocketDir, &dir);
        }
        self.look_at_mode(PlaceKind::Socket, &socket);
        let mut dirs = vec![pin_dir];
        while let Some(dir) = dirs.pop() {
            self.look_at_mode(PlaceKind::PinDir, &dir);
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    dirs.push(entry.path());
                } else {
                    self.look_at_mode(PlaceKind::Pin, &entry.path());
                }
            }
        }
    }

    fn look_at_mode(&mut self, kind: PlaceKind, path: &Path) {
        match fs::symlink_metadata(path) {
            Ok(meta) => self.places.push(PlaceMode {
                kind,
                path: path.into(),
                uid: meta.uid(),
                mode: meta.mode() & 0o7777,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => drop(self.saw::<(), _>(&path.display().to_string(), Err(error))),
        }
    }

    async fn look_at_network(&mut self) {
        // Without nf_tables there are none; that it is missing is told already.
        if let Some((rules, chains)) = third_party::tables() {
            self.foreign = self.saw("nftables rules of others", rules).unwrap_or_default();
            self.chains = self.saw("nftables chains of others", chains).unwrap_or_default();
        }
        self.legacy = self.saw("rules of iptables", legacy::rules()).unwrap_or_default();
        self.source_route = interfaces("/proc/sys/net/ipv4/conf", "accept_source_route", By::Both);
        self.route_localnet = interfaces("/proc/sys/net/ipv4/conf", "route_localnet", By::Either);
        self.route_localnet.retain(|name| name != "lo");
        self.segment_routing = interfaces("/proc/sys/net/ipv6/conf", "seg6_enabled", By::Both);
        let mptcp = fs::read_to_string("/proc/sys/net/mptcp/enabled").unwrap_or_default();
        if mptcp.trim() == "1" {
            self.mptcp = self.saw("limits of MPTCP", mptcp_limit().await).unwrap_or_default();
        }
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let found = sweep::listening(protocol).await;
            let found = self.saw(&format!("{protocol} listeners"), found);
            self.listeners.extend(found.unwrap_or_default());
        }
    }

    /// Programs on the judged cgroup, and on those above it, whose programs run later.
    fn look_at_programs(&mut self) {
        let Some(judged) = self.cgroup.clone() else { return };
        let mut ancestors: Vec<PathBuf> = Vec::new();
        let is_cgroup = |path: &Path| {
            nix::sys::statfs::statfs(path)
                .is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
        };
        let mut at = Some(judged.as_path());
        while let Some(path) = at.filter(|path| is_cgroup(path)) {
            ancestors.push(path.into());
            at = path.parent();
        }
        for hook in third_party::hooks() {
            let ours = third_party::our_program(&self.settings.pin_dir, hook);
            for (depth, path) in ancestors.iter().enumerate() {
                let what = format!("programs of {hook} on {}", path.display());
                let Some(found) = self.saw(&what, third_party::programs(path, hook)) else {
                    continue;
                };
                let position = found.iter().position(|one| Some(one.id) == ours);
                for (index, attached) in found.into_iter().enumerate() {
                    if Some(attached.id) == ours && depth == 0 {
                        continue;
                    }
                    self.programs.push(Program {
                        hook,
                        cgroup: path.clone(),
                        above: depth > 0,
                        // Before ours are all that were attached earlier, and those that ask for it (`BPF_F_PREORDER`).
                        after: !attached.preorder && (depth > 0 || position.is_some_and(|ours| index > ours)),
                        attached,
                    });
                }
            }
        }
    }

    fn look_at_processes(&mut self) {
        let namespace = |path: &str, kind: &str| fs::metadata(format!("{path}/ns/{kind}")).map(|meta| meta.ino());
        let (Ok(net), Ok(user)) = (namespace("/proc/self", "net"), namespace("/proc/self", "user")) else {
            self.saw::<(), _>("namespaces", Err("/proc is not mounted"));
            return;
        };
        let mut ways = BTreeMap::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let path = format!("/proc/{pid}");
            let name = host::task_name(pid);
            if let Ok(other) = namespace(&path, "net")
                && other != net
            {
                self.namespaces
                    .entry(other)
                    .or_insert_with(|| format!("{} (pid {pid})", text::name(&name)));
                ways.entry(other)
                    .or_insert_with(|| PathBuf::from(format!("{path}/ns/net")));
            }
            if namespace(&path, "user").is_ok_and(|other| other == user) {
                let status = host::read_lossy(format!("{path}/status")).unwrap_or_default();
                if let Some((uid, capabilities)) = powers(&status) {
                    self.capable.push(Capable {
                        pid,
                        uid,
                        name,
                        capabilities,
                    });
                }
            }
        }
        // Namespaces that have a name and perhaps no process.
        for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            if let Ok(meta) = fs::metadata(entry.path())
                && meta.ino() != net
            {
                let name = format!("named {}", entry.file_name().to_string_lossy());
                self.namespaces.entry(meta.ino()).or_insert(name);
                ways.entry(meta.ino()).or_insert_with(|| entry.path());
            }
        }
        self.look_at_links(ways);
    }

    /// Devices that carry packets past our hooks, here and in the namespaces that these files enter.
    fn look_at_links(&mut self, ways: BTreeMap<u64, PathBuf>) {
        let here = links::here(links::bridges_are_shown());
        self.passing = self.saw("devices of this host", here).unwrap_or_default();
        for (namespace, file) in ways {
            let whose = self.namespaces.get(&namespace).cloned().unwrap_or_default();
            match links::in_namespace(file) {
                Ok(found) => {
                    let found = found.into_iter().map(|device| format!("{device} of {whose}"));
                    self.passing.extend(found);
                }
                // Its last process has ended meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => drop(self.saw::<(), _>(&format!("devices of {whose}"), Err(error))),
            }
        }
    }
}

/// Processes whose cgroup is not below what is mounted here.
fn outside() -> Vec<String> {
    let found = Hierarchy::find().ok().flatten();
    let pids = found.map(|found| hierarchy::outside(&found.shown)).unwrap_or_default();
    let name = |pid: u32| format!("not covered: process {pid} ({})", text::name(&host::task_name(pid)));
    pids.into_iter().map(name).collect()
}

/// How the kernel takes a setting of an interface together with that of `all` (`IN_DEV_ANDCONF`, `IN_DEV_ORCONF` in linux/inetdevice.h).
#[derive(Clone, Copy)]
enum By {
    Both,
    Either,
}

/// Interfaces for which a setting is on, by their own word and that of `all`.
fn interfaces(dir: &str, setting: &str, by: By) -> Vec<String> {
    let is_on = |name: &str| {
        let value = fs::read_to_string(format!("{dir}/{name}/{setting}")).unwrap_or_default();
        value.trim().parse::<i32>().is_ok_and(|value| value > 0)
    };
    let all = is_on("all");
    let counts = |name: &str| match by {
        By::Both => all && is_on(name),
        By::Either => all || is_on(name),
    };
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<String> = names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != "all" && name != "default" && counts(name))
        .collect();
    found.sort_unstable();
    found
}

/// How many addresses that a peer tells of are connected to (`MPTCP_PM_ATTR_RCV_ADD_ADDRS`).
async fn mptcp_limit() -> Result<u32, String> {
    use mptcp_pm::{MptcpPathManagerAttr, MptcpPathManagerLimitsAttr};
    let (connection, handle, _) = mptcp_pm::new_connection().map_err(|error| error.to_string())?;
    let connection = tokio::spawn(connection);
    let answers: Result<Vec<_>, _> = handle.limits().get().execute().await.try_collect().await;
    connection.abort();
    let answers = answers.map_err(|error| error.to_string())?;
    let attributes = answers.iter().flat_map(|answer| &answer.payload.nlas);
    let limit = attributes.into_iter().find_map(|attribute| match attribute {
        MptcpPathManagerAttr::Limits(MptcpPathManagerLimitsAttr::RcvAddAddrs(limit)) => Some(*limit),
        MptcpPathManagerAttr::Address(_) | MptcpPathManagerAttr::Limits(_) | MptcpPathManagerAttr::Other(_) => None,
    });
    limit.ok_or_else(|| "the kernel did not tell them".to_owned())
}

/// The user of a process and what it may do that we cannot stop, from `/proc/PID/status`; none for root and for the powerless.
pub(super) fn powers(status: &str) -> Option<(u32, Vec<&'static str>)> {
    const POWERS: [(u32, &str); 4] = [
        (12, "CAP_NET_ADMIN"),
        (13, "CAP_NET_RAW"),
        (21, "CAP_SYS_ADMIN"),
        (39, "CAP_BPF"),
    ];
    let uid = host::status_field(status, "Uid")?.split_whitespace().next()?;
    let uid = uid.parse().ok()?;
    let effective = u64::from_str_radix(host::status_field(status, "CapEff")?, 16).ok()?;
    let held: Vec<_> = POWERS
        .into_iter()
        .filter(|(bit, _)| effective >> bit & 1 == 1)
        .map(|(_, name)| name)
        .collect();
    (uid != 0 && !held.is_empty()).then_some((uid, held))
}
