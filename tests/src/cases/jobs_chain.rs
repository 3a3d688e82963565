//! B5: the chain that BOSH jobs and the agent know, the rules that they put there, and what was granted written beside
//! them.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Case, case};
use crate::backend::EBPF;
use crate::kernel::CGROUP_NEEDS;
use crate::world::{Attack, Daemon, Listener, NOBODY, Netns, World, at_this_load, binary, cgroup_mount, until};

/// Another user who may nothing.
const OTHER: u32 = 33;
pub(super) const CHAIN: &str = "inet bosh_agent monit_access_jobs";
const BACKENDS: [&str; 3] = ["ebpf", "nftables", "both"];

pub(super) fn cases() -> Vec<Case> {
    let mut all: Vec<Case> = Vec::new();
    for backend in BACKENDS {
        all.extend([
            case(&format!("b5_rules_of_jobs_let_in_{backend}"), move || let_in(backend)).needs(CGROUP_NEEDS),
            case(&format!("b5_a_grant_passes_the_agents_rules_{backend}"), move || {
                beside_the_agent(backend)
            })
            .needs(CGROUP_NEEDS),
        ]);
    }
    all.extend([
        case!(b5_rules_of_other_shapes_let_nobody_in).needs(CGROUP_NEEDS),
        case!(b5_rules_of_jobs_open_nothing_else),
        case!(b5_the_agents_own_rules_are_left_alone),
        case!(b5_the_chain_is_there_only_where_monit_may_be_granted),
        case!(b5_f2_rules_and_grants_change_under_fire),
        case!(b5_f5_a_chain_taken_away_comes_back),
        case!(b5_a_rule_ends_with_its_cgroup).needs(CGROUP_NEEDS),
        case!(b5_f4_thousands_of_rules_cost_only_themselves),
        case!(b5_f4_a_bad_configuration_at_boot_keeps_rules_of_jobs),
        case!(b5_a_start_with_another_table_takes_its_grants_along),
        case!(b5_two_instances_follow_one_chain),
    ]);
    // Each says itself what enforces: one run has them all.
    all.into_iter().map(|case| case.on(EBPF)).collect()
}

/// `monit` at 127.0.0.1 and another target at 127.0.0.2, in a network namespace, for root alone.
struct Host {
    world: World,
    netns: Netns,
    _listener: Listener,
    backend: &'static str,
}

impl Host {
    fn new(backend: &'static str) -> Result<Self> {
        let world = World::new()?;
        let netns = Netns::new(&world, "home")?;
        let listener = Listener::start(Some(&netns.file()), world.port, &[])?;
        let host = Self {
            world,
            netns,
            _listener: listener,
            backend,
        };
        give_up_soon(&host.netns)?;
        host.monit(NOBODY)?.reaches()?;
        host.other(NOBODY)?.reaches()?;
        host.configure(true, "")?;
        Ok(host)
    }

    fn configure(&self, grants: bool, more: &str) -> Result<()> {
        let (backend, port) = (self.backend, self.world.port);
        self.world.configure(&format!(
            "backend = \"{backend}\"\n\
             [target.monit]\nendpoints = [\"tcp://127.0.0.1:{port}\", \"tcp://[::1]:{port}\"]\nallow = [\"root\"]\n\
             grants = {grants}\n\
             [target.other]\nendpoints = [\"tcp://127.0.0.2:{port}\"{more}]\nallow = [\"root\"]\n"
        ))
    }

    fn daemon(&self) -> Result<Daemon> {
        self.world.daemon_with(&mut self.netns.command(&binary("enforcer")?))
    }

    fn enforcer(&self, arguments: &[&str]) -> Result<String> {
        Ok(self.netns.enforcer(&self.world, arguments)?.demand(0)?.stdout)
    }

    fn at(&self, user: u32, address: [u8; 4]) -> Result<Attack> {
        let attack = self.world.attack(user).to((address, self.world.port).into());
        attack.in_netns(&self.netns)
    }

    fn monit(&self, user: u32) -> Result<Attack> {
        self.at(user, [127, 0, 0, 1])
    }

    fn other(&self, user: u32) -> Result<Attack> {
        self.at(user, [127, 0, 0, 2])
    }

    fn is_refused(&self, attack: &Attack) -> Result<()> {
        if self.backend == "nftables" {
            attack.is_reset()
        } else {
            attack.is_forbidden()
        }
    }

    /// A rule as jobs write it.
    fn rule(&self, matches: &str) -> Result<()> {
        let port = self.world.port;
        let rule = format!("add rule {CHAIN} {matches} ip daddr 127.0.0.1 tcp dport {port} accept");
        self.netns.nft(&rule).map(drop)
    }

    fn goes_out(&self, what: &str, attack: &Attack) -> Result<()> {
        // With both backends the packet is refused first.
        let refusal = if self.backend == "nftables" {
            libc::ECONNREFUSED
        } else {
            libc::EPERM
        };
        until(what, || Ok(attack.run()?.errno == Some(refusal)))?;
        self.is_refused(attack)
    }

    /// Beside the agent's rules, which drop a packet before ours see it.
    fn is_refused_or_dropped(&self, attack: &Attack) -> Result<()> {
        if self.backend == "nftables" {
            attack.fails_by(libc::ETIMEDOUT)
        } else {
            attack.is_forbidden()
        }
    }

    fn chain(&self) -> Result<String> {
        self.netns.nft(&format!("list chain {CHAIN}"))
    }

    fn flush(&self) -> Result<()> {
        self.netns.nft(&format!("flush chain {CHAIN}")).map(drop)
    }

    fn tables(&self) -> Result<String> {
        self.netns.nft("list tables")
    }

    /// What `enforcer grants` says of the rules of jobs.
    fn job_rules(&self) -> Result<Vec<Value>> {
        let report: Value = serde_json::from_str(&self.enforcer(&["grants", "--json"])?)?;
        Ok(report["job_rules"].as_array().cloned().unwrap_or_default())
    }

    fn agent_starts(&self) -> Result<()> {
        agent_starts(&self.netns, self.world.port)
    }

    /// A job's cgroup, and how rules name it.
    fn job(&self, name: &str) -> Result<(std::path::PathBuf, String)> {
        let dir = self.world.cgroup.join(name);
        fs::create_dir(&dir)?;
        let matches = sockets_of(&dir)?;
        Ok((dir, matches))
    }
}

/// Waits until an attempt gets through; how long that took.
pub(super) fn comes_in(what: &str, attack: &Attack) -> Result<Duration> {
    let started = Instant::now();
    until(what, || Ok(attack.run()?.errno.is_none()))?;
    Ok(started.elapsed())
}

/// Where the agent's rules drop a packet: 3 s until it is given up.
pub(super) fn give_up_soon(netns: &Netns) -> Result<()> {
    netns.set("ipv4/tcp_syn_retries", "1")?;
    if Path::new("/proc/sys/net/ipv4/tcp_syn_linear_timeouts").exists() {
        netns.set("ipv4/tcp_syn_linear_timeouts", "0")?;
    }
    Ok(())
}

/// The table as the BOSH agent writes it.
pub(super) fn agent_starts(netns: &Netns, port: u16) -> Result<()> {
    for command in [
        "add table inet bosh_agent".to_owned(),
        format!("add chain {CHAIN}"),
        "add chain inet bosh_agent monit_access { type filter hook output priority -1; policy accept; }".to_owned(),
        "flush chain inet bosh_agent monit_access".to_owned(),
        "add rule inet bosh_agent monit_access ct state established,related accept".to_owned(),
        "add rule inet bosh_agent monit_access jump monit_access_jobs".to_owned(),
        format!("add rule inet bosh_agent monit_access meta skuid 0 ip daddr 127.0.0.1 tcp dport {port} accept"),
        format!("add rule inet bosh_agent monit_access ip daddr 127.0.0.1 tcp dport {port} drop"),
        "add chain inet bosh_agent nats_access { type filter hook output priority -1; policy accept; }".to_owned(),
    ] {
        netns.nft(&command)?;
    }
    Ok(())
}

/// What a cgroup's sockets match: nft looks for its path below /sys/fs/cgroup.
pub(super) fn sockets_of(dir: &Path) -> Result<String> {
    let level = dir.strip_prefix(cgroup_mount()?)?.components().count();
    let shown = dir.strip_prefix("/sys/fs/cgroup")?.display().to_string();
    Ok(format!("socket cgroupv2 level {level} \"{shown}\""))
}

fn let_in(backend: &'static str) -> Result<()> {
    let host = Host::new(backend)?;
    let daemon = host.daemon()?;
    ensure!(host.chain()?.contains("monit_access_jobs"), "{}", host.chain()?);
    let (nobody, other) = (host.monit(NOBODY)?, host.monit(OTHER)?);
    host.is_refused(&nobody)?;
    host.is_refused(&host.other(NOBODY)?)?;
    host.rule(&format!("meta skuid {NOBODY}"))?;
    let took = comes_in("a user's rule counts", &nobody)?;
    println!("    {backend}: a rule counts after {took:?}, an attempt included");
    let limit = at_this_load(Duration::from_secs(1))?;
    ensure!(took <= limit, "{took:?}, more than {limit:?}");
    host.monit(0)?.reaches()?;
    host.is_refused(&other)?;
    host.is_refused(&host.other(NOBODY)?)?;
    // By the cgroup, with what goes before the verdict in real releases.
    let (dir, matches) = host.job("child")?;
    let port = host.world.port;
    host.netns.nft(&format!(
        "add rule {CHAIN} {matches} ip daddr 127.0.0.1 tcp dport {port} log prefix \"job: \" counter accept"
    ))?;
    let inside = host.monit(OTHER)?.in_cgroup(&dir);
    comes_in("a cgroup's rule counts", &inside)?;
    host.is_refused(&other)?;
    let rules = host.job_rules()?;
    let path = format!("/{}", dir.strip_prefix(cgroup_mount()?)?.display());
    ensure!(rules.len() == 2, "{rules:?}");
    ensure!(rules[0]["user"] == NOBODY && rules[0]["cgroup"].is_null(), "{rules:?}");
    ensure!(
        rules[1]["cgroup"] == path.as_str() && rules[1]["ignored"].is_null(),
        "{rules:?}"
    );
    let shown = host.enforcer(&["grants"])?;
    ensure!(shown.contains(&format!("anybody in {path}")), "{shown}");
    let checked = host.enforcer(&["check", &NOBODY.to_string(), &format!("tcp://127.0.0.1:{port}")])?;
    ensure!(checked.contains("allow"), "{checked}");
    host.enforcer(&["verify"])?;
    // A grant, and a job's rule, side by side.
    host.enforcer(&["grant", "monit", "--user", &OTHER.to_string()])?;
    other.reaches()?;
    host.enforcer(&["revoke", "monit", "--all"])?;
    host.is_refused(&other)?;
    inside.reaches()?;
    let before = host.chain()?;
    daemon.reload()?;
    nobody.reaches()?;
    daemon.kill()?;
    nobody.reaches()?;
    host.enforcer(&["verify"])?;
    // Before a start is ready, whoever had a rule is let in still.
    let fire = host.world.path("fire");
    fs::write(&fire, "")?;
    let allowed = host.monit(NOBODY)?.hammer(&fire)?;
    let daemon = host.daemon()?;
    fs::remove_file(&fire)?;
    let blows = allowed.finish()?;
    ensure!(blows.reset == 0 && blows.connected > 10, "{blows:?}");
    inside.reaches()?;
    ensure!(host.chain()? == before, "{before} became {}", host.chain()?);
    host.flush()?;
    host.goes_out("a rule that has gone counts no more", &nobody)?;
    host.goes_out("nor does the other", &inside)?;
    // What others put there stays; without it the table goes.
    host.rule(&format!("meta skuid {NOBODY}"))?;
    let said = host.enforcer(&["unload"])?;
    ensure!(said.contains("inet bosh_agent stays"), "{said}");
    drop(daemon);
    let left = host.netns.nft("list table inet bosh_agent")?;
    ensure!(left.contains("skuid") && left.matches("chain").count() == 1, "{left}");
    other.reaches()?;
    host.flush()?;
    let _daemon = host.daemon()?;
    host.enforcer(&["unload"])?;
    ensure!(host.tables()?.is_empty(), "{}", host.tables()?);
    Ok(())
}

/// Where the agent's own chain drops whomever the jobs' chain does not accept, a grant is written there.
fn beside_the_agent(backend: &'static str) -> Result<()> {
    let host = Host::new(backend)?;
    host.agent_starts()?;
    let (dir, _) = host.job("child")?;
    let (nobody, inside) = (host.monit(NOBODY)?, host.monit(NOBODY)?.in_cgroup(&dir));
    nobody.fails_by(libc::ETIMEDOUT)?;
    host.monit(0)?.reaches()?;
    let daemon = host.daemon()?;
    host.is_refused_or_dropped(&nobody)?;
    host.monit(0)?.reaches()?;
    let path = format!("/{}", dir.strip_prefix(cgroup_mount()?)?.display());
    host.enforcer(&["grant", "monit", "--cgroup", &path])?;
    inside.reaches()?;
    host.is_refused_or_dropped(&nobody)?;
    let chain = host.chain()?;
    ensure!(
        chain.contains("cgroupv2") && chain.contains("comment \"enforcer: a grant"),
        "{chain}"
    );
    ensure!(host.job_rules()?.is_empty(), "our own rule is told as a job's");
    host.enforcer(&["grant", "monit", "--user", &NOBODY.to_string()])?;
    nobody.reaches()?;
    // It comes back with the agent, and with its cgroup.
    host.netns.nft("delete table inet bosh_agent")?;
    host.agent_starts()?;
    until("the grant is written again", || Ok(nobody.run()?.errno.is_none()))?;
    host.enforcer(&["revoke", "monit", "--user", &NOBODY.to_string()])?;
    host.is_refused_or_dropped(&nobody)?;
    fs::remove_dir(&dir)?;
    until("its rule goes with the cgroup", || {
        Ok(!host.chain()?.contains("cgroupv2"))
    })?;
    fs::create_dir(&dir)?;
    until("the job is let in again", || Ok(inside.run()?.errno.is_none()))?;
    // Over a restart, and once.
    daemon.kill()?;
    inside.reaches()?;
    let daemon = host.daemon()?;
    inside.reaches()?;
    ensure!(
        host.chain()?.matches("comment").count() == 2,
        "a rule an endpoint: {}",
        host.chain()?
    );
    // Without the agent's chain nothing needs it there.
    host.netns.nft("delete chain inet bosh_agent monit_access")?;
    until("our rule is removed", || Ok(!host.chain()?.contains("comment")))?;
    inside.reaches()?;
    host.agent_starts()?;
    until("it is written again", || Ok(host.chain()?.contains("comment")))?;
    host.enforcer(&["unload"])?;
    drop(daemon);
    let left = host.netns.nft("list table inet bosh_agent")?;
    ensure!(
        !left.contains("comment") && left.matches("chain ").count() == 3,
        "{left}"
    );
    Ok(())
}

fn b5_rules_of_other_shapes_let_nobody_in() -> Result<()> {
    let host = Host::new("ebpf")?;
    let daemon = host.daemon()?;
    let port = host.world.port;
    let nobody = host.monit(NOBODY)?;
    let to = format!("ip daddr 127.0.0.1 tcp dport {port}");
    let user = format!("meta skuid {NOBODY}");
    let (dir, _) = host.job("child")?;
    let shown = dir.strip_prefix("/sys/fs/cgroup")?.display().to_string();
    let level = dir.strip_prefix(cgroup_mount()?)?.components().count();
    let rules = [
        ("accept".to_owned(), "neither a user nor a cgroup"),
        (format!("{to} accept"), "neither a user nor a cgroup"),
        (format!("{user} {to} drop"), "does not end with accept"),
        (format!("{user} {to} return"), "does not end with accept"),
        (format!("{user} {to}"), "does not end with accept"),
        (
            format!("{user} ip daddr 127.0.0.2 tcp dport {port} accept"),
            "not for an endpoint",
        ),
        (
            format!("{user} ip daddr 127.0.0.1 tcp dport 1 accept"),
            "not for an endpoint",
        ),
        (format!("meta skuid != 0 {to} accept"), "something else than equality"),
        (format!("meta skuid {{ 1, {NOBODY} }} {to} accept"), "expression lookup"),
        (format!("meta skuid 1-70000 {to} accept"), "expression"),
        (format!("{user} meta skgid 1 {to} accept"), "expression meta"),
        (format!("{user} {to} limit rate 1/second accept"), "expression limit"),
        (format!("{user} {to} limit name \"slow\" accept"), "expression objref"),
        (format!("{user} {to} quota name \"little\" accept"), "expression objref"),
        (format!("{user} {to} ct state new accept"), "expression ct"),
        (format!("{user} ip saddr 127.0.0.9 {to} accept"), "expression payload"),
        (
            format!("{user} ip daddr 127.0.0.0/8 tcp dport {port} accept"),
            "expression",
        ),
        (
            format!("{user} ip daddr 127.0.0.1 udp dport {port} accept"),
            "another protocol",
        ),
        (format!("meta skuid 1 {user} {to} accept"), "same thing twice"),
        (
            format!("socket cgroupv2 level {} \"{shown}\" {to} accept", level + 1),
            "has gone",
        ),
        (
            format!("socket cgroupv2 level {} \"{shown}\" {to} accept", level - 1),
            "has gone",
        ),
    ];
    host.netns.nft("add limit inet bosh_agent slow { rate 1/hour }")?;
    host.netns.nft("add quota inet bosh_agent little { over 1 bytes }")?;
    for (number, (rule, _)) in rules.iter().enumerate() {
        host.netns.nft(&format!("add rule {CHAIN} {rule}"))?;
        until("it is told", || Ok(host.job_rules()?.len() == number + 1))?;
        host.is_refused(&nobody).with_context(|| rule.clone())?;
        host.is_refused(&host.monit(NOBODY)?.in_cgroup(&dir))
            .with_context(|| rule.clone())?;
    }
    let shown = host.enforcer(&["grants"])?;
    for ((rule, expected), found) in rules.iter().zip(host.job_rules()?) {
        let why = found["ignored"].as_str().unwrap_or_default();
        ensure!(why.contains(expected), "{rule}: {why:?} instead of {expected:?}");
        ensure!(shown.contains(why), "{why} is not in {shown}");
    }
    let log = daemon.log();
    ensure!(log.matches("allows nobody to connect").count() == rules.len(), "{log}");
    // Beside them one of the known shape counts.
    host.rule(&user)?;
    comes_in("a rule of the known shape", &nobody)?;
    host.enforcer(&["status"]).map(drop)
}

fn b5_rules_of_jobs_open_nothing_else() -> Result<()> {
    for backend in ["ebpf", "nftables"] {
        let host = Host::new(backend)?;
        let port = host.world.port;
        // One endpoint is both targets': a job's rule speaks for monit alone (D2).
        host.configure(true, &format!(", \"tcp://127.0.0.3:{port}\""))?;
        let text = fs::read_to_string(host.world.path("enforcer.toml"))?;
        let both = text.replacen("127.0.0.1:", &format!("127.0.0.3:{port}\", \"tcp://127.0.0.1:"), 1);
        fs::write(host.world.path("enforcer.toml"), both)?;
        let _daemon = host.daemon()?;
        for address in [[127, 0, 0, 1], [127, 0, 0, 2], [127, 0, 0, 3]] {
            host.is_refused(&host.at(NOBODY, address)?)?;
        }
        host.netns
            .nft(&format!("add rule {CHAIN} meta skuid {NOBODY} accept"))?;
        comes_in("a rule for all destinations", &host.monit(NOBODY)?)?;
        for address in [[127, 0, 0, 2], [127, 0, 0, 3]] {
            host.is_refused(&host.at(NOBODY, address)?)?;
            host.at(0, address)?.reaches()?;
        }
    }
    Ok(())
}

fn b5_the_agents_own_rules_are_left_alone() -> Result<()> {
    let host = Host::new("nftables")?;
    host.agent_starts()?;
    host.rule(&format!("meta skuid {NOBODY}"))?;
    let before = host.netns.nft("list table inet bosh_agent")?;
    let daemon = host.daemon()?;
    host.monit(NOBODY)?.reaches()?;
    host.monit(0)?.reaches()?;
    host.is_refused(&host.other(NOBODY)?)?;
    host.is_refused_or_dropped(&host.monit(OTHER)?)?;
    let now = || host.netns.nft("list table inet bosh_agent");
    ensure!(now()? == before, "{before} became {}", now()?);
    host.enforcer(&["grant", "monit", "--user", &OTHER.to_string()])?;
    host.monit(OTHER)?.reaches()?;
    host.enforcer(&["revoke", "monit", "--all"])?;
    until("what we wrote is gone", || Ok(now()? == before))?;
    daemon.kill()?;
    let _daemon = host.daemon()?;
    host.monit(NOBODY)?.reaches()?;
    // One that is switched off stays so.
    host.netns.nft("add table inet bosh_agent { flags dormant; }")?;
    host.enforcer(&["grant", "monit", "--user", &OTHER.to_string()])?;
    host.monit(OTHER)?.reaches()?;
    ensure!(
        now()?.contains("flags dormant") && now()?.contains("comment"),
        "{}",
        now()?
    );
    host.enforcer(&["revoke", "monit", "--all"])?;
    host.is_refused(&host.monit(OTHER)?)?;
    host.enforcer(&["unload"])?;
    host.netns.nft("add table inet bosh_agent")?;
    ensure!(now()? == before, "{before} became {}", now()?);
    Ok(())
}

fn b5_the_chain_is_there_only_where_monit_may_be_granted() -> Result<()> {
    let host = Host::new("ebpf")?;
    host.configure(false, "")?;
    let daemon = host.daemon()?;
    ensure!(!host.tables()?.contains("bosh_agent"), "{}", host.tables()?);
    let nobody = host.monit(NOBODY)?;
    host.is_refused(&nobody)?;
    host.configure(true, "")?;
    daemon.reload()?;
    host.is_refused(&nobody)?;
    host.rule(&format!("meta skuid {NOBODY}"))?;
    comes_in("a job's rule", &nobody)?;
    host.configure(false, "")?;
    daemon.reload()?;
    host.is_refused(&nobody)?;
    host.monit(0)?.reaches()?;
    ensure!(host.chain()?.contains("65534"), "{}", host.chain()?);
    ensure!(host.job_rules()?.is_empty(), "{:?}", host.job_rules()?);
    // It counts again with the reload.
    host.configure(true, "")?;
    daemon.reload()?;
    nobody.reaches()?;
    host.flush()?;
    host.configure(false, "")?;
    daemon.reload()?;
    ensure!(!host.tables()?.contains("bosh_agent"), "{}", host.tables()?);
    // What others have in that table keeps it there.
    host.configure(true, "")?;
    daemon.reload()?;
    host.netns
        .nft("add set inet bosh_agent theirs { type ipv4_addr; elements = { 192.0.2.1 }; }")?;
    host.configure(false, "")?;
    daemon.reload()?;
    let left = host.netns.nft("list table inet bosh_agent")?;
    ensure!(left.contains("192.0.2.1"), "{left}");
    Ok(())
}

/// Rules of jobs, grants and the configuration change, while everybody knocks.
fn b5_f2_rules_and_grants_change_under_fire() -> Result<()> {
    let host = Host::new("nftables")?;
    let daemon = host.daemon()?;
    host.rule("meta skuid 1")?;
    comes_in("a job's rule", &host.monit(1)?)?;
    let fire = host.world.path("fire");
    fs::write(&fire, "")?;
    let denied = host.monit(NOBODY)?.hammer(&fire)?;
    let by_job = host.monit(1)?.hammer(&fire)?;
    let allowed = host.monit(0)?.hammer(&fire)?;
    for round in 2..12 {
        host.rule(&format!("meta skuid {round}"))?;
        host.enforcer(&["grant", "monit", "--user", &(100 + round).to_string()])?;
        daemon.reload()?;
    }
    fs::remove_file(&fire)?;
    let (denied, by_job, allowed) = (denied.finish()?, by_job.finish()?, allowed.finish()?);
    ensure!(denied.connected == 0 && denied.reset > 100, "{denied:?}");
    ensure!(allowed.reset == 0 && allowed.connected > 100, "{allowed:?}");
    ensure!(by_job.reset == 0 && by_job.connected > 100, "{by_job:?}");
    Ok(())
}

fn b5_f5_a_chain_taken_away_comes_back() -> Result<()> {
    let host = Host::new("both")?;
    let _daemon = host.daemon()?;
    let nobody = host.monit(NOBODY)?;
    for harm in ["delete table inet bosh_agent", "flush table inet bosh_agent"] {
        host.is_refused(&nobody)?;
        host.rule(&format!("meta skuid {NOBODY}"))?;
        comes_in("a job's rule", &nobody)?;
        host.netns.nft(harm)?;
        host.goes_out("it went with the chain", &nobody)?;
        until("the chain is back", || Ok(host.tables()?.contains("bosh_agent")))?;
        host.is_refused(&host.other(NOBODY)?)?;
    }
    Ok(())
}

fn b5_a_rule_ends_with_its_cgroup() -> Result<()> {
    let host = Host::new("ebpf")?;
    let _daemon = host.daemon()?;
    let (dir, matches) = host.job("child")?;
    host.rule(&matches)?;
    let inside = host.monit(NOBODY)?.in_cgroup(&dir);
    comes_in("a cgroup's rule", &inside)?;
    // Made again it is another cgroup, for which the agent's chain has no rule either.
    fs::remove_dir(&dir)?;
    fs::create_dir(&dir)?;
    host.goes_out("the rule ended with its cgroup", &inside)?;
    until("it is told", || {
        let rules = host.job_rules()?;
        Ok(rules[0]["ignored"].as_str().is_some_and(|why| why.contains("has gone")))
    })?;
    // A user's own cgroup is nobody's to name (F6).
    let users = host.world.cgroup.join("users");
    fs::create_dir(&users)?;
    let (sub, matches) = host.job("users/sub")?;
    std::os::unix::fs::chown(&users, Some(NOBODY), Some(NOBODY))?;
    host.rule(&matches)?;
    until("it is told", || {
        let rules = host.job_rules()?;
        let why = rules.get(1).and_then(|rule| rule["ignored"].as_str());
        Ok(why.is_some_and(|why| why.contains("is user 65534's")))
    })?;
    host.is_refused(&host.monit(NOBODY)?.in_cgroup(&sub))
}

fn b5_f4_thousands_of_rules_cost_only_themselves() -> Result<()> {
    let host = Host::new("ebpf")?;
    let daemon = host.daemon()?;
    let port = host.world.port;
    let file = host.world.path("rules.nft");
    let rule = |user: u32| format!("add rule {CHAIN} meta skuid {user} ip daddr 127.0.0.1 tcp dport {port} accept\n");
    let text: String = (100_000..104_000).map(rule).collect();
    fs::write(&file, text)?;
    host.netns.nft(&format!("include \"{}\"", file.display()))?;
    comes_in("the first of thousands", &host.monit(100_000)?)?;
    host.monit(101_023)?.reaches()?;
    host.is_refused(&host.monit(101_024)?)?;
    host.is_refused(&host.monit(NOBODY)?)?;
    let rules = host.job_rules()?;
    ensure!(rules.len() == 4000, "{}", rules.len());
    let ignored = rules.iter().filter(|rule| !rule["ignored"].is_null()).count();
    ensure!(ignored == 4000 - 1024, "{ignored}");
    let log = daemon.log();
    ensure!(log.matches("of chain monit_access_jobs").count() < 64, "{log}");
    // What was granted has its own place.
    host.enforcer(&["grant", "monit", "--user", &NOBODY.to_string()])?;
    host.monit(NOBODY)?.reaches()?;
    host.flush()?;
    host.goes_out("all are gone", &host.monit(100_000)?)
}

fn b5_f4_a_bad_configuration_at_boot_keeps_rules_of_jobs() -> Result<()> {
    for backend in BACKENDS {
        let host = Host::new(backend)?;
        let daemon = host.daemon()?;
        host.rule(&format!("meta skuid {NOBODY}"))?;
        let nobody = host.monit(NOBODY)?;
        comes_in("a job's rule", &nobody)?;
        until("what is active is kept, and what was before removed", || {
            let is_kept = host.world.path("state/last-good.json").exists();
            Ok(is_kept && host.netns.enforcer(&host.world, &["verify"])?.code == 0)
        })?;
        daemon.kill()?;
        let toml = host.world.path("enforcer.toml");
        let good = fs::read_to_string(&toml)?;
        fs::write(&toml, format!("{good}bogus = 1\n"))?;
        let daemon = host.daemon()?;
        nobody.reaches()?;
        host.is_refused(&host.monit(OTHER)?)?;
        // Followed all the same.
        host.flush()?;
        host.goes_out("its rule is gone", &nobody)
            .with_context(|| format!("{backend}: {}", daemon.log()))?;
        host.rule(&format!("meta skuid {OTHER}"))?;
        comes_in("another rule", &host.monit(OTHER)?)?;
    }
    Ok(())
}

/// `nft_table` is another one at the next start, or for `apply`: rules that were written under the old name are removed
/// with it.
fn b5_a_start_with_another_table_takes_its_grants_along() -> Result<()> {
    let host = Host::new("nftables")?;
    host.agent_starts()?;
    let toml = fs::read_to_string(host.world.path("enforcer.toml"))?;
    let named = |table: &str| toml.replace(&format!("{:?}", host.world.name()), &format!("{table:?}"));
    let daemon = host.daemon()?;
    host.enforcer(&["grant", "monit", "--user", "1"])?;
    host.monit(1)?.reaches()?;
    daemon.kill()?;
    for by_apply in [false, true] {
        let new = format!("{}_{by_apply}", host.world.name());
        fs::write(host.world.path("enforcer.toml"), named(&new))?;
        if by_apply {
            host.enforcer(&["apply"])?;
        } else {
            host.daemon()?.kill()?;
        }
        let chain = host.chain()?;
        ensure!(
            chain.matches("comment").count() == 2 && chain.contains(&format!("{new} (")),
            "{chain}"
        );
        host.monit(1)?.reaches()?;
        host.is_refused_or_dropped(&host.monit(NOBODY)?)?;
    }
    host.enforcer(&["unload"]).map(drop)
}

fn b5_two_instances_follow_one_chain() -> Result<()> {
    let (host, second) = (Host::new("nftables")?, World::new()?);
    let daemon = host.daemon()?;
    let port = host.world.port;
    second.configure(&format!(
        "backend = \"nftables\"\n[target.monit]\nendpoints = [\"tcp://127.0.0.1:{port}\"]\nallow = [\"root\"]\n\
         grants = true\n"
    ))?;
    let _other = second.daemon_with(&mut host.netns.command(&binary("enforcer")?))?;
    let nobody = host.monit(NOBODY)?;
    host.is_refused(&nobody)?;
    host.rule(&format!("meta skuid {NOBODY}"))?;
    comes_in("both follow a job's rule", &nobody)?;
    // Each has its own grants, and what one writes the other reads.
    host.agent_starts()?;
    host.enforcer(&["grant", "monit", "--user", &OTHER.to_string()])?;
    comes_in("one's grant is a rule for the other", &host.monit(OTHER)?)?;
    host.netns.enforcer(&second, &["unload"])?.demand(0)?;
    host.monit(OTHER)?.reaches()?;
    nobody.reaches()?;
    daemon.kill()
}
