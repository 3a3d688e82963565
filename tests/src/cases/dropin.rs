//! B5: the table and chain that BOSH releases know, and the rules that they put there.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use super::{Case, case};
use crate::backend::EBPF;
use crate::world::{Attack, Daemon, Listener, NOBODY, Netns, World, binary, until};

/// Another user who may nothing.
const OTHER: u32 = 33;
const CHAIN: &str = "inet bosh_agent monit_access_jobs";

/// All cases of this file.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut all: Vec<Case> = Vec::new();
    for backend in ["nftables", "both"] {
        all.push(case(&format!("b5_rules_of_jobs_are_honoured_{backend}"), move || {
            honoured(backend)
        }));
    }
    all.extend([
        case("b5_rules_of_jobs_open_nothing_else", nothing_else),
        case("b5_the_agents_own_rules_are_left_alone", agents_table),
        case("b5_only_where_monit_may_be_granted", not_wanted),
        case("b5_f1_changes_under_fire", under_fire),
        case("b5_f2_an_endpoint_that_leaves_monit_is_never_open", changes_hands),
        case("b5_f1_killed_before_the_first_part_was_in_force", killed_early),
        case("b5_f2_a_start_with_another_table_takes_its_part_along", another_table),
        case("b5_f4_a_bad_configuration_at_boot_freezes_nothing", bad_configuration),
        case("b5_f5_a_table_taken_away_comes_back", taken_away),
        case("b5_another_instances_part_is_not_touched", two_instances),
    ]);
    // Each says itself what enforces: one run has them all.
    all.into_iter().map(|case| case.on(EBPF)).collect()
}

/// `monit` at 127.0.0.1 and another target at 127.0.0.2, in a network namespace, for root alone.
struct Host {
    world: World,
    netns: Netns,
    _listener: Listener,
}

impl Host {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let netns = Netns::new(&world, "home")?;
        let listener = Listener::start(Some(&netns.file()), world.port, &[])?;
        let host = Self {
            world,
            netns,
            _listener: listener,
        };
        host.monit(NOBODY)?.reaches()?;
        host.other(NOBODY)?.reaches()?;
        Ok(host)
    }

    fn configure(&self, backend: &str, grants: bool, more: &str) -> Result<()> {
        let port = self.world.port;
        self.world.configure(&format!(
            "backend = \"{backend}\"\n\
             [target.monit]\nendpoints = [\"tcp://127.0.0.1:{port}\"]\nallow = [\"root\"]\ngrants = {grants}\n\
             [target.other]\nendpoints = [\"tcp://127.0.0.2:{port}\"{more}]\nallow = [\"root\"]\n"
        ))
    }

    fn daemon(&self) -> Result<Daemon> {
        self.world.daemon_with(&mut self.netns.command(&binary("enforcer")?))
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

    /// As releases do it.
    fn rule(&self, matches: &str) -> Result<()> {
        let port = self.world.port;
        let rule = format!("add rule {CHAIN} {matches} ip daddr 127.0.0.1 tcp dport {port} accept");
        self.netns.nft(&rule).map(drop)
    }

    fn rules(&self) -> Result<String> {
        self.netns.nft(&format!("list chain {CHAIN}"))
    }

    fn tables(&self) -> Result<String> {
        self.netns.nft("list tables")
    }
}

fn honoured(backend: &str) -> Result<()> {
    let host = Host::new()?;
    host.configure(backend, true, "")?;
    let daemon = host.daemon()?;
    ensure!(host.rules()?.contains("monit_access_jobs"), "{}", host.rules()?);
    let refused = |attack: Attack| {
        if backend == "both" {
            attack.is_refused()
        } else {
            attack.is_reset()
        }
    };
    refused(host.monit(NOBODY)?)?;
    refused(host.other(NOBODY)?)?;
    host.rule(&format!("meta skuid {NOBODY}"))?;
    if backend == "both" {
        // What eBPF refuses never becomes a packet: there `enforcer grant` is the way.
        refused(host.monit(NOBODY)?)?;
        host.netns
            .enforcer(&host.world, &["grant", "monit", "--user", "nobody"])?
            .demand(0)?;
    }
    host.monit(NOBODY)?.reaches()?;
    host.monit(0)?.reaches()?;
    refused(host.monit(OTHER)?)?;
    refused(host.other(NOBODY)?)?;
    let status = host.netns.enforcer(&host.world, &["status"])?.demand(0)?.stdout;
    ensure!(status.contains("monit") && status.contains("other"), "{status}");
    if backend == "nftables" {
        // By the cgroup, with what goes before the verdict in real releases. nft looks for its path below /sys/fs/cgroup.
        let child = host.world.cgroup.join("child");
        fs::create_dir(&child)?;
        let path = child.strip_prefix("/sys/fs/cgroup")?.display().to_string();
        let matches = format!("socket cgroupv2 level 2 \"{path}\"");
        let port = host.world.port;
        host.netns.nft(&format!(
            "add rule {CHAIN} {matches} ip daddr 127.0.0.1 tcp dport {port} log prefix \"job: \" accept"
        ))?;
        host.monit(OTHER)?.in_cgroup(&child).reaches()?;
        refused(host.monit(OTHER)?)?;
        // A grant, and a job's rule, side by side.
        host.netns
            .enforcer(&host.world, &["grant", "monit", "--user", "33"])?
            .demand(0)?;
        host.monit(OTHER)?.reaches()?;
        host.netns
            .enforcer(&host.world, &["revoke", "monit", "--all"])?
            .demand(0)?;
        refused(host.monit(OTHER)?)?;
    }
    let before = host.rules()?;
    daemon.reload()?;
    daemon.kill()?;
    host.monit(NOBODY)?.reaches()?;
    let daemon = host.daemon()?;
    host.monit(NOBODY)?.reaches()?;
    ensure!(host.rules()? == before, "{before} became {}", host.rules()?);
    // What others put there stays; without it the table goes.
    let said = host.netns.enforcer(&host.world, &["unload"])?.demand(0)?.stdout;
    ensure!(said.contains("inet bosh_agent stays"), "{said}");
    drop(daemon);
    let left = host.netns.nft("list table inet bosh_agent")?;
    ensure!(left.contains("skuid") && left.matches("chain").count() == 1, "{left}");
    host.monit(OTHER)?.reaches()?;
    host.netns.nft(&format!("flush chain {CHAIN}"))?;
    let _daemon = host.daemon()?;
    host.netns.enforcer(&host.world, &["unload"])?.demand(0)?;
    ensure!(host.tables()?.is_empty(), "{}", host.tables()?);
    Ok(())
}

fn nothing_else() -> Result<()> {
    let host = Host::new()?;
    let port = host.world.port;
    // One endpoint is both targets': a job's rule speaks for monit alone (D2).
    host.configure("nftables", true, &format!(", \"tcp://127.0.0.3:{port}\""))?;
    let text = fs::read_to_string(host.world.path("enforcer.toml"))?;
    let both = text.replacen("127.0.0.1:", &format!("127.0.0.3:{port}\", \"tcp://127.0.0.1:"), 1);
    fs::write(host.world.path("enforcer.toml"), both)?;
    let _daemon = host.daemon()?;
    for address in [[127, 0, 0, 1], [127, 0, 0, 2], [127, 0, 0, 3]] {
        host.at(NOBODY, address)?.is_reset()?;
    }
    host.netns.nft(&format!("add rule {CHAIN} accept"))?;
    host.monit(NOBODY)?.reaches()?;
    for address in [[127, 0, 0, 2], [127, 0, 0, 3]] {
        host.at(NOBODY, address)?.is_reset()?;
        host.at(0, address)?.reaches()?;
    }
    host.netns.enforcer(&host.world, &["unload"])?.demand(0).map(drop)
}

fn agents_table() -> Result<()> {
    let host = Host::new()?;
    let port = host.world.port;
    for command in [
        "add table inet bosh_agent",
        &format!("add chain {CHAIN}"),
        "add chain inet bosh_agent monit_access { type filter hook output priority -1; policy accept; }",
        "add rule inet bosh_agent monit_access jump monit_access_jobs",
        &format!("add rule inet bosh_agent monit_access meta skuid 0 ip daddr 127.0.0.1 tcp dport {port} accept"),
        &format!("add rule inet bosh_agent monit_access ip daddr 127.0.0.1 tcp dport {port} drop"),
        "add chain inet bosh_agent nats_access { type filter hook output priority -1; policy accept; }",
        &format!(
            "add rule inet bosh_agent monit_access_jobs meta skuid {NOBODY} ip daddr 127.0.0.1 tcp dport {port} accept"
        ),
    ] {
        host.netns.nft(command)?;
    }
    let before = host.netns.nft("list table inet bosh_agent")?;
    host.configure("nftables", true, "")?;
    let daemon = host.daemon()?;
    host.monit(NOBODY)?.reaches()?;
    host.monit(0)?.reaches()?;
    host.other(NOBODY)?.is_reset()?;
    for chain in ["monit_access", "monit_access_jobs", "nats_access"] {
        let shown = host.netns.nft(&format!("list chain inet bosh_agent {chain}"))?;
        let body = shown
            .split_once("chain")
            .context("no chain")?
            .1
            .trim_end()
            .trim_end_matches('}')
            .trim_end();
        ensure!(
            before.contains(body),
            "{chain} was changed: {shown} instead of {before}"
        );
    }
    daemon.kill()?;
    let _daemon = host.daemon()?;
    host.monit(NOBODY)?.reaches()?;
    host.netns.enforcer(&host.world, &["unload"])?.demand(0)?;
    let after = host.netns.nft("list table inet bosh_agent")?;
    ensure!(after == before, "{before} became {after}");
    Ok(())
}

fn not_wanted() -> Result<()> {
    let host = Host::new()?;
    host.configure("nftables", false, "")?;
    let daemon = host.daemon()?;
    ensure!(!host.tables()?.contains("bosh_agent"), "{}", host.tables()?);
    host.monit(NOBODY)?.is_reset()?;
    host.configure("nftables", true, "")?;
    daemon.reload()?;
    host.monit(NOBODY)?.is_reset()?;
    host.rule("meta skuid 65534")?;
    host.monit(NOBODY)?.reaches()?;
    host.configure("nftables", false, "")?;
    daemon.reload()?;
    host.monit(NOBODY)?.is_reset()?;
    host.monit(0)?.reaches()?;
    ensure!(host.rules()?.contains("65534"), "{}", host.rules()?);
    host.netns.enforcer(&host.world, &["unload"])?.demand(0).map(drop)
}

/// The judgement of monit moves from table to table, and its rules change, while everybody knocks.
fn under_fire() -> Result<()> {
    let host = Host::new()?;
    host.configure("nftables", true, "")?;
    let daemon = host.daemon()?;
    let fire = host.world.path("fire");
    fs::write(&fire, "")?;
    let denied = host.monit(NOBODY)?.hammer(&fire)?;
    let allowed = host.monit(0)?.hammer(&fire)?;
    for round in 0..12 {
        host.configure("nftables", round % 2 == 1, "")?;
        daemon.reload()?;
        if round % 2 == 1 {
            host.netns
                .enforcer(&host.world, &["grant", "monit", "--user", &round.to_string()])?
                .demand(0)?;
        }
    }
    fs::remove_file(&fire)?;
    let (denied, allowed) = (denied.finish()?, allowed.finish()?);
    ensure!(denied.connected == 0 && denied.reset > 100, "{denied:?}");
    ensure!(allowed.reset == 0 && allowed.connected > 100, "{allowed:?}");
    host.netns.enforcer(&host.world, &["unload"])?.demand(0).map(drop)
}

/// An endpoint goes from monit to another target, which another table judges, and back, while everybody knocks.
fn changes_hands() -> Result<()> {
    let host = Host::new()?;
    let port = host.world.port;
    let configure = |monit: &str, other: &str| {
        host.world.configure(&format!(
            "backend = \"nftables\"\n\
             [target.monit]\nendpoints = [\"tcp://127.0.0.9:{port}\"{monit}]\nallow = [\"root\"]\ngrants = true\n\
             [target.other]\nendpoints = [\"tcp://127.0.0.2:{port}\"{other}]\nallow = [\"root\"]\n"
        ))
    };
    let changing = format!(", \"tcp://127.0.0.1:{port}\"");
    configure(&changing, "")?;
    let mut daemon = host.daemon()?;
    host.rule("meta skuid 65534")?;
    host.monit(NOBODY)?.reaches()?;
    host.netns.nft(&format!("flush chain {CHAIN}"))?;
    let fire = host.world.path("fire");
    fs::write(&fire, "")?;
    let denied = host.monit(NOBODY)?.hammer(&fire)?;
    let allowed = host.monit(0)?.hammer(&fire)?;
    for round in 0..8 {
        if round % 2 == 0 {
            configure("", &changing)?;
        } else {
            configure(&changing, "")?;
        }
        // The next process does not know what the last one held.
        if round % 4 == 2 {
            daemon.kill()?;
            daemon = host.daemon()?;
        } else {
            daemon.reload()?;
        }
    }
    fs::remove_file(&fire)?;
    let (denied, allowed) = (denied.finish()?, allowed.finish()?);
    ensure!(denied.connected == 0 && denied.reset > 100, "{denied:?}");
    ensure!(allowed.reset == 0 && allowed.connected > 100, "{allowed:?}");
    // It is monit's again, and a job's rule counts.
    host.rule("meta skuid 65534")?;
    host.monit(NOBODY)?.reaches()?;
    host.netns.enforcer(&host.world, &["verify"])?.demand(0)?;
    host.netns.enforcer(&host.world, &["unload"])?.demand(0).map(drop)
}

/// What a process leaves that is killed once its part is laid out, and before any packet is led there.
fn killed_early() -> Result<()> {
    let host = Host::new()?;
    host.configure("nftables", true, "")?;
    for command in [
        "add table inet bosh_agent",
        &format!("add chain {CHAIN}"),
        "add chain inet bosh_agent about",
        "add chain inet bosh_agent judge_b",
        "add counter inet bosh_agent allowed_monit",
    ] {
        host.netns.nft(command)?;
    }
    let daemon = host.daemon()?;
    host.netns.enforcer(&host.world, &["status"])?.demand(0)?;
    host.monit(NOBODY)?.is_reset()?;
    host.rule("meta skuid 65534")?;
    host.monit(NOBODY)?.reaches()?;
    host.other(NOBODY)?.is_reset()?;
    host.netns.nft(&format!("flush chain {CHAIN}"))?;
    host.netns.enforcer(&host.world, &["unload"])?.demand(0)?;
    drop(daemon);
    ensure!(host.tables()?.is_empty(), "{}", host.tables()?);
    Ok(())
}

/// `nft_table` is another one at the next start, or for `apply`: what the old one had of the shared table is the new one's, with
/// other rules, and is judged by at every moment, a job's rule with it.
fn another_table() -> Result<()> {
    let host = Host::new()?;
    host.configure("nftables", true, "")?;
    let toml = fs::read_to_string(host.world.path("enforcer.toml"))?;
    let named = |table: &str| toml.replace(&format!("{:?}", host.world.name()), &format!("{table:?}"));
    host.daemon()?.kill()?;
    host.monit(NOBODY)?.is_reset()?;
    host.rule("meta skuid 1")?;
    host.monit(1)?.reaches()?;
    let fire = host.world.path("fire");
    fs::write(&fire, "")?;
    let denied = host.monit(NOBODY)?.hammer(&fire)?;
    let by_job = host.monit(1)?.hammer(&fire)?;
    let allowed = host.monit(0)?.hammer(&fire)?;
    let mut old = host.world.name().to_owned();
    for by_apply in [false, true] {
        let new = format!("{}_{by_apply}", host.world.name());
        // Rules of the new one's own: those of the old are not judged by any more.
        let allow = if by_apply { "[\"root\"]" } else { "[\"root\", 33]" };
        fs::write(
            host.world.path("enforcer.toml"),
            named(&new).replacen("[\"root\"]", allow, 1),
        )?;
        let daemon = if by_apply {
            host.netns.enforcer(&host.world, &["apply"])?.demand(0)?;
            None
        } else {
            Some(host.daemon()?)
        };
        let tables = host.tables()?;
        ensure!(
            tables.lines().count() == 2 && tables.contains("bosh_agent") && tables.contains(&new),
            "{old} became {new}: {tables}"
        );
        if by_apply {
            host.monit(OTHER)?.is_reset()?;
        } else {
            host.monit(OTHER)?.reaches()?;
        }
        host.monit(1)?.reaches()?;
        host.other(1)?.is_reset()?;
        let status = host.netns.enforcer(&host.world, &["status", "--json"])?;
        ensure!(!status.stdout.contains("is used by another"), "{status:?}");
        if let Some(daemon) = daemon {
            ensure!(status.code == 0, "{status:?}");
            daemon.kill()?;
        }
        old = new;
    }
    fs::remove_file(&fire)?;
    let (denied, by_job, allowed) = (denied.finish()?, by_job.finish()?, allowed.finish()?);
    ensure!(denied.connected == 0 && denied.reset > 100, "{denied:?}");
    ensure!(
        by_job.reset == 0 && by_job.connected > 100,
        "by a job's rule: {by_job:?}"
    );
    ensure!(allowed.reset == 0 && allowed.connected > 100, "{allowed:?}");
    host.netns.nft(&format!("flush chain {CHAIN}"))?;
    host.netns.enforcer(&host.world, &["unload"])?.demand(0)?;
    ensure!(host.tables()?.is_empty(), "{}", host.tables()?);
    Ok(())
}

/// What two tables hold is known for the last rule set known good, so that it is followed on.
fn bad_configuration() -> Result<()> {
    let host = Host::new()?;
    host.configure("nftables", true, "")?;
    host.daemon()?.kill()?;
    let toml = host.world.path("enforcer.toml");
    let good = fs::read_to_string(&toml)?;
    fs::write(&toml, format!("{good}bogus = 1\n"))?;
    let _daemon = host.daemon()?;
    host.monit(NOBODY)?.is_reset()?;
    let status = host.netns.enforcer(&host.world, &["status"])?.stdout;
    ensure!(
        status.contains("the last rule set known good is in force instead"),
        "{status}"
    );
    fs::write(&toml, &good)?;
    host.netns.enforcer(&host.world, &["unload"])?.demand(0).map(drop)
}

fn taken_away() -> Result<()> {
    let host = Host::new()?;
    host.configure("nftables", true, "")?;
    let _daemon = host.daemon()?;
    for harm in ["delete table inet bosh_agent", "flush table inet bosh_agent"] {
        host.monit(NOBODY)?.is_reset()?;
        host.netns.nft(harm)?;
        until("the rules are back", || {
            Ok(host.monit(NOBODY)?.run()?.errno == Some(libc::ECONNREFUSED))
        })?;
        host.rule("meta skuid 65534")?;
        host.monit(NOBODY)?.reaches()?;
        host.netns.nft(&format!("flush chain {CHAIN}"))?;
        host.other(NOBODY)?.is_reset()?;
    }
    host.netns.enforcer(&host.world, &["unload"])?.demand(0).map(drop)
}

fn two_instances() -> Result<()> {
    let (host, second) = (Host::new()?, World::new()?);
    host.configure("nftables", true, "")?;
    let _daemon = host.daemon()?;
    // Counters count on.
    let table = || -> Result<String> {
        let shown = host.netns.nft("list table inet bosh_agent")?;
        Ok(shown
            .lines()
            .filter(|line| !line.contains("packets"))
            .collect::<Vec<_>>()
            .join("\n"))
    };
    let before = table()?;
    let port = host.world.port;
    second.configure(&format!(
        "backend = \"nftables\"\n[target.monit]\nendpoints = [\"tcp://127.0.0.9:{port}\"]\nallow = [\"root\"]\ngrants = true\n"
    ))?;
    let _other = second.daemon_with(&mut host.netns.command(&binary("enforcer")?))?;
    let status = host.netns.enforcer(&second, &["status", "--json"])?.demand(1)?.stdout;
    ensure!(status.contains("is used by another enforcer"), "{status}");
    // Judged all the same, by its own table.
    host.at(NOBODY, [127, 0, 0, 9])?.is_reset()?;
    host.monit(NOBODY)?.is_reset()?;
    ensure!(table()? == before, "it was changed");
    host.netns.enforcer(&second, &["unload"])?.demand(0)?;
    ensure!(table()? == before, "it was changed");
    host.netns.enforcer(&host.world, &["unload"])?.demand(0).map(drop)
}
