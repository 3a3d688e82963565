//! The nftables backend, alone and as the other half of eBPF: ways in, forwarding, drift, choice, sizes.

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use super::Case;
use crate::{
    backend::{ALL, BOTH, Backend, NFTABLES},
    kernel::{Feature, lacks},
    world::{Attack, Blows, Daemon, Listener, NOBODY, Netns, World, at_this_load, binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(s5_nftables_kernel_is_no_user).on(NFTABLES),
        case!(s5_nftables_cgroup_of_the_socket).on(NFTABLES),
        case!(s5_auto_takes_nftables_without_bpf).on(BOTH),
        case!(s5_auto_never_evades_a_mistake).on(BOTH),
        case!(s5_both_is_refused_by_each).on(BOTH),
        case!(s5_nftables_denials_are_told).on(NFTABLES),
        case!(f2_no_wrong_verdict_in_1000_rule_sets).on(ALL),
        case!(f1_f2_backends_change_without_a_gap).on(BOTH),
        case!(f3_f7_nftables_100000_endpoints).on(NFTABLES),
        case!(f4_both_fails_as_one).on(BOTH),
        case!(f5_nftables_table_of_others).on(NFTABLES),
        case!(f5_nftables_drift_is_mended).on(NFTABLES),
        case!(p3_nftables_does_not_switch_conntrack_on).on(NFTABLES),
    ]
}

/// A network namespace of its own with a listener, in which the binary and its victims run.
pub(super) struct Guarded {
    pub(super) world: World,
    pub(super) netns: Netns,
    _listener: Listener,
}

impl Guarded {
    pub(super) fn new() -> Result<Self> {
        let world = World::new()?;
        let netns = Netns::new(&world, "g")?;
        let listener = Listener::start(Some(&netns.file()), world.port, &[world.address(), "::1".parse()?])?;
        Ok(Self {
            world,
            netns,
            _listener: listener,
        })
    }

    pub(super) fn configure(&self, backend: &str, endpoints: &[String], allow: &str) -> Result<()> {
        self.world.configure(&format!(
            "backend = {backend:?}\n[target.main]\nendpoints = {endpoints:?}\nallow = {allow}\n"
        ))
    }

    /// One endpoint, root alone.
    pub(super) fn guard(&self, backend: &str) -> Result<()> {
        self.configure(backend, &[format!("tcp://{}", self.world.here())], r#"["root"]"#)?;
        self.apply()
    }

    pub(super) fn apply(&self) -> Result<()> {
        self.netns.enforcer(&self.world, &["apply"])?.demand(0).map(drop)
    }

    pub(super) fn attack(&self, uid: u32) -> Result<Attack> {
        self.world.attack(uid).in_netns(&self.netns)
    }

    pub(super) fn daemon(&self) -> Result<Daemon> {
        self.world.daemon_with(&mut self.netns.command(&binary("enforcer")?))
    }

    pub(super) fn status(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(
            &self.netns.enforcer(&self.world, &["status", "--json"])?.stdout,
        )?)
    }
}

fn s5_nftables_kernel_is_no_user() -> Result<()> {
    let guarded = Guarded::new()?;
    let endpoint = format!("tcp://{}", guarded.world.here());
    guarded.configure("nftables", &[endpoint], "[{ kernel = true }]")?;
    guarded.apply()?;
    guarded.attack(0)?.is_reset()?;
    guarded.attack(NOBODY)?.is_reset()
}

fn s5_nftables_cgroup_of_the_socket() -> Result<()> {
    let guarded = Guarded::new()?;
    let child = guarded.world.cgroup.join("child");
    fs::create_dir(&child)?;
    let path = format!("/{}/child", guarded.world.name());
    let allow = format!("[{{ user = {NOBODY}, cgroup = {path:?} }}]");
    guarded.configure("nftables", &[format!("tcp://{}", guarded.world.here())], &allow)?;
    if lacks(Feature::SocketCgroup) {
        // A principal with a cgroup matches nobody, and that is told.
        let applied = guarded.netns.enforcer(&guarded.world, &["apply"])?.demand(1)?;
        ensure!(applied.stdout.contains("match nobody"), "{applied:?}");
        guarded.attack(NOBODY)?.in_cgroup(&child).is_reset()?;
    } else {
        guarded.apply()?;
        guarded.attack(NOBODY)?.in_cgroup(&child).reaches()?;
    }
    guarded.attack(NOBODY)?.is_reset()?;
    guarded.attack(0)?.in_cgroup(&child).is_reset()
}

fn s5_auto_takes_nftables_without_bpf() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("auto")?;
    ensure!(guarded.status()?["backend"] == "ebpf", "{}", guarded.status()?);
    guarded.attack(NOBODY)?.is_forbidden()?;
    guarded.netns.enforcer(&guarded.world, &["unload"])?.demand(0)?;
    let enforcer = guarded.world.path("enforcer.toml");
    let mut command = guarded.netns.command(Path::new("setpriv"));
    command
        .args(["--bounding-set=-sys_admin,-bpf", "--"])
        .arg(binary("enforcer")?);
    let ran = ran(command.arg("--config").arg(enforcer).arg("apply"))?.demand(0)?;
    ensure!(
        ran.stderr.contains("auto chose nftables") && ran.stderr.contains("not permitted"),
        "{}",
        ran.stderr
    );
    let status = guarded.status()?;
    ensure!(status["backend"] == "nftables", "{status}");
    guarded.attack(NOBODY)?.is_reset()?;
    guarded.attack(0)?.reaches()?;
    // With BPF again, eBPF takes over and the table goes.
    guarded.apply()?;
    ensure!(guarded.status()?["backend"] == "ebpf", "{}", guarded.status()?);
    guarded.attack(NOBODY)?.is_forbidden()?;
    ensure!(
        !guarded.netns.nft("list tables")?.contains(guarded.world.name()),
        "the table was left"
    );
    Ok(())
}

/// What is repaired in the configuration is no reason to take nftables, which would do in each of these cases.
fn s5_auto_never_evades_a_mistake() -> Result<()> {
    let guarded = Guarded::new()?;
    let world = &guarded.world;
    let main = format!(
        "[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\n",
        world.here()
    );
    world.configure(&format!("backend = \"auto\"\n{main}"))?;
    let file = world.path("enforcer.toml");
    let good = fs::read_to_string(&file)?;
    let pins = world.pins().display().to_string();
    let cgroup = world.cgroup.display().to_string();
    for (what, with, says) in [
        (&pins, world.path("pins").display().to_string(), "bpffs"),
        (&pins, format!("{pins}.dot"), "dot"),
        (&cgroup, format!("{cgroup}/no-such-group"), "no-such-group"),
        (&cgroup, world.path("").display().to_string(), "cgroup v2"),
    ] {
        fs::write(&file, good.replace(what.as_str(), &with))?;
        let refused = guarded.netns.enforcer(world, &["apply"])?.demand(2)?;
        ensure!(refused.stderr.contains(says), "{with}: {refused:?}");
        ensure!(
            !guarded.netns.nft("list tables")?.contains(world.name()),
            "{with}: nftables was taken: {refused:?}"
        );
        guarded.attack(NOBODY)?.reaches()?;
    }
    // Pins that others could have made.
    fs::write(&file, &good)?;
    fs::create_dir(world.pins())?;
    fs::set_permissions(world.pins(), fs::Permissions::from_mode(0o777))?;
    let refused = guarded.netns.enforcer(world, &["apply"])?.demand(2)?;
    ensure!(refused.stderr.contains("0700"), "{refused:?}");
    fs::remove_dir(world.pins())?;
    ensure!(
        !guarded.netns.nft("list tables")?.contains(world.name()),
        "nftables was taken"
    );
    guarded.apply()?;
    ensure!(guarded.status()?["backend"] == "ebpf", "{}", guarded.status()?);
    // With the same mistakes nftables does.
    fs::write(
        &file,
        good.replace(&pins, &world.path("pins").display().to_string())
            .replace("\"auto\"", "\"nftables\""),
    )?;
    guarded.netns.enforcer(world, &["apply"])?.demand(0)?;
    guarded.attack(NOBODY)?.anywhere().is_reset()?;
    fs::write(&file, &good)?;
    guarded.netns.enforcer(world, &["unload"])?.demand(0).map(drop)
}

fn s5_both_is_refused_by_each() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("both")?;
    guarded.attack(NOBODY)?.is_forbidden()?;
    // Out of eBPF's cgroup, nftables refuses.
    guarded.attack(NOBODY)?.anywhere().is_reset()?;
    guarded.attack(0)?.reaches()?;
    guarded.attack(0)?.anywhere().reaches()?;
    let status = guarded.status()?;
    ensure!(status["backend"] == "both", "{status}");
    guarded.netns.enforcer(&guarded.world, &["unload"])?.demand(0)?;
    guarded.attack(NOBODY)?.reaches()?;
    ensure!(
        !guarded.netns.nft("list tables")?.contains(guarded.world.name()),
        "the table was left"
    );
    ensure!(!guarded.world.pins().exists(), "the pins were left");
    Ok(())
}

fn s5_nftables_denials_are_told() -> Result<()> {
    for mode in ["enforce", "audit"] {
        let guarded = Guarded::new()?;
        guarded.world.configure(&format!(
            "mode = {mode:?}\nbackend = \"nftables\"\n[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\n",
            guarded.world.here()
        ))?;
        let _daemon = guarded.daemon()?;
        let before = guarded
            .netns
            .enforcer(&guarded.world, &["events", "--json"])?
            .demand(0)?
            .stdout;
        ensure!(before.is_empty(), "{before}");
        let (attack, verdict) = (
            guarded.attack(NOBODY)?,
            if mode == "audit" { "would-deny" } else { "deny" },
        );
        if mode == "audit" {
            attack.reaches()?;
        } else {
            ensure!(attack.run()?.errno == Some(libc::ECONNREFUSED), "not refused");
        }
        guarded.attack(0)?.reaches()?;
        let mut said = String::new();
        until("the denial is told", || {
            said = guarded
                .netns
                .enforcer(&guarded.world, &["events", "--json"])?
                .demand(0)?
                .stdout;
            Ok(!said.is_empty())
        })?;
        let event: serde_json::Value = serde_json::from_str(&said)?;
        ensure!(
            event["schema"] == "enforcer/event/1"
                && event["backend"] == "nftables"
                && event["verdict"] == verdict
                && event["task_uid"].is_null()
                && event["socket_uid"] == NOBODY
                && event["target"] == "main"
                && event["judged"] == guarded.world.here().to_string()
                && event["generation"] == 1,
            "{said}"
        );
        let text = guarded.netns.enforcer(&guarded.world, &["events"])?.demand(0)?.stdout;
        ensure!(text.contains(&format!("{verdict} uid {NOBODY} (")), "{text}");
    }
    Ok(())
}

/// Hammers while `work` goes on, more often than `attempts` each; nobody gets in, root is never refused.
pub(super) fn hammered(guarded: &Guarded, attempts: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let fire = guarded.world.path("fire");
    fs::write(&fire, "")?;
    let denied = guarded.attack(NOBODY)?.hammer(&fire)?;
    let allowed = guarded.attack(0)?.hammer(&fire)?;
    let done = work();
    fs::remove_file(&fire)?;
    let (bad, good): (Blows, Blows) = (denied.finish()?, allowed.finish()?);
    println!("    denied user: {bad:?}; allowed user: {good:?}");
    done?;
    ensure!(
        bad.connected + bad.other == 0 && bad.reset + bad.refused > attempts,
        "{bad:?}"
    );
    ensure!(
        good.refused + good.reset + good.other == 0 && good.connected > attempts,
        "{good:?}"
    );
    Ok(())
}

/// Single addresses, prefixes and both by turns, so that the endpoint moves from one kind of map to the other.
fn f2_no_wrong_verdict_in_1000_rule_sets() -> Result<()> {
    const RULE_SETS: u16 = 1000;
    // So that each switch is met by some.
    const ATTEMPTS: u64 = 10 * RULE_SETS as u64;
    let guarded = Guarded::new()?;
    let (backend, port) = (Backend::current(), guarded.world.port);
    let here = format!("tcp://{}", guarded.world.here());
    guarded.attack(NOBODY)?.reaches()?;
    guarded.guard(backend.configured())?;
    let daemon = guarded.daemon()?;
    let started = Instant::now();
    hammered(&guarded, ATTEMPTS, || {
        for round in 0..RULE_SETS {
            let (high, low) = (round >> 8, round & 255);
            let mut endpoints: Vec<String> = (0..round % 30)
                .map(|other| format!("tcp://10.{high}.{low}.{other}:{port}"))
                .collect();
            if round % 3 != 0 {
                endpoints.push(here.clone());
            }
            if round % 3 != 1 {
                endpoints.push(format!("tcp://127.0.0.0/{}:{port}", 8 + round % 2));
            }
            guarded.configure(
                backend.configured(),
                &endpoints,
                &format!("[\"root\", {}]", 2000 + round),
            )?;
            daemon.reload()?;
            if round % 20 == 0 {
                guarded.netns.enforcer(&guarded.world, &["refresh"])?.demand(0)?;
            }
        }
        Ok(())
    })?;
    println!("    {RULE_SETS} rule sets in {:?}", started.elapsed());
    let status = guarded.status()?;
    ensure!(
        status["generation"].as_u64() >= Some(RULE_SETS.into()) && status["state"] == "enforcing",
        "{status}"
    );
    Ok(())
}

fn f1_f2_backends_change_without_a_gap() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("ebpf")?;
    let daemon = guarded.daemon()?;
    hammered(&guarded, 1000, || {
        for backend in ["nftables", "both", "ebpf", "both", "nftables", "ebpf", "nftables"] {
            guarded.configure(backend, &[format!("tcp://{}", guarded.world.here())], r#"["root"]"#)?;
            daemon.reload()?;
            let status = guarded.status()?;
            ensure!(
                status["backend"] == backend && status["state"] == "enforcing",
                "{status}\n{}",
                daemon.log()
            );
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    })
}

fn f3_f7_nftables_100000_endpoints() -> Result<()> {
    let guarded = Guarded::new()?;
    let port = guarded.world.port;
    let mut endpoints: Vec<String> = (0..99_999_u32)
        .map(|host| format!("tcp://{}:{port}", Ipv4Addr::from_bits(0x0a00_0000 + host)))
        .collect();
    endpoints.push(format!("tcp://{}", guarded.world.here()));
    guarded.configure("nftables", &endpoints, r#"["root"]"#)?;
    let started = Instant::now();
    guarded.apply()?;
    println!(
        "    100,000 endpoints read, compiled, sent and read back in {:?}",
        started.elapsed()
    );
    guarded.attack(NOBODY)?.is_reset()?;
    guarded.attack(0)?.reaches()?;
    let status = guarded.status()?;
    ensure!(status["endpoints"] == 100_000, "{}", status["endpoints"]);
    Ok(())
}

fn f4_both_fails_as_one() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("both")?;
    let generation = guarded.status()?["generation"].clone();
    // The table is somebody else's by the time of the next rule set.
    let table = guarded.world.name();
    guarded.netns.nft(&format!("delete table inet {table}"))?;
    guarded.netns.nft(&format!("add table inet {table}"))?;
    let endpoint = |port| format!("tcp://{}:{port}", guarded.world.address());
    guarded.configure(
        "both",
        &[endpoint(guarded.world.port), endpoint(1)],
        r#"["root", 65534]"#,
    )?;
    let failed = guarded.netns.enforcer(&guarded.world, &["apply"])?.demand(2)?.stderr;
    ensure!(
        failed.contains("the nftables half") && failed.contains("not made by enforcer") && failed.lines().count() == 1,
        "{failed}"
    );
    ensure!(guarded.status()?["generation"] == generation, "eBPF went on alone");
    guarded.attack(NOBODY)?.is_forbidden()
}

fn f5_nftables_table_of_others() -> Result<()> {
    let guarded = Guarded::new()?;
    let table = guarded.world.name();
    guarded
        .netns
        .nft(&format!("add table inet {table} {{ chain theirs {{ }}; }}"))?;
    guarded.configure("nftables", &[format!("tcp://{}", guarded.world.here())], r#"["root"]"#)?;
    let failed = guarded.netns.enforcer(&guarded.world, &["apply"])?.demand(2)?.stderr;
    ensure!(
        failed.contains("not made by enforcer") && failed.contains("nft_table"),
        "{failed}"
    );
    guarded.netns.enforcer(&guarded.world, &["unload"])?.demand(0)?;
    ensure!(
        guarded.netns.nft("list ruleset")?.contains("theirs"),
        "their table was touched"
    );
    // Without the right to change tables: the cause and the remedy.
    let mut command = guarded.netns.command(Path::new("setpriv"));
    command
        .args(["--bounding-set=-net_admin", "--"])
        .arg(binary("enforcer")?);
    command
        .arg("--config")
        .arg(guarded.world.path("enforcer.toml"))
        .arg("apply");
    let failed = ran(&mut command)?.demand(2)?.stderr;
    ensure!(failed.contains("CAP_NET_ADMIN"), "{failed}");
    Ok(())
}

fn f5_nftables_drift_is_mended() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("nftables")?;
    let _daemon = guarded.daemon()?;
    let table = guarded.world.name();
    let blows = [
        "flush ruleset".to_owned(),
        format!("delete table inet {table}"),
        format!("insert rule inet {table} output accept"),
        format!("flush chain inet {table} output"),
        format!("chain inet {table} output {{ policy drop ; }}"),
    ];
    for (number, blow) in (1..).zip(&blows) {
        guarded.netns.nft(blow)?;
        let started = Instant::now();
        until("the rules are back", || {
            let status = guarded.status()?;
            Ok(status["restored"] == number && guarded.attack(NOBODY)?.run()?.errno.is_some())
        })?;
        let took = started.elapsed();
        println!("    nft {blow}: back and reported after {took:?}");
        ensure!(took < at_this_load(Duration::from_secs(2))?, "back only after {took:?}");
        guarded.attack(0)?.reaches()?;
        guarded.attack(NOBODY)?.is_reset()?;
        let status = guarded.status()?;
        ensure!(
            status["state"] == "degraded" && status["causes"].to_string().contains("removed or changed"),
            "{status}"
        );
    }
    // Others' tables are not ours to repair.
    guarded.netns.nft("add table inet theirs")?;
    thread::sleep(Duration::from_millis(300));
    ensure!(guarded.status()?["restored"] == blows.len(), "{}", guarded.status()?);
    ensure!(
        guarded.netns.nft("list tables")?.contains("theirs"),
        "their table is gone"
    );
    Ok(())
}

fn p3_nftables_does_not_switch_conntrack_on() -> Result<()> {
    let guarded = Guarded::new()?;
    let count = || -> Result<u64> {
        let file = Command::new("nsenter")
            .arg(format!("--net={}", guarded.netns.file().display()))
            .args(["cat", "/proc/sys/net/netfilter/nf_conntrack_count"])
            .output()?;
        // Not there at all where the module is not loaded.
        Ok(String::from_utf8_lossy(&file.stdout).trim().parse().unwrap_or(0))
    };
    guarded.guard("nftables")?;
    for _ in 0..20 {
        guarded.attack(0)?.reaches()?;
    }
    ensure!(count()? == 0, "{} connections are tracked", count()?);
    // That the count can be other than 0: somebody's rule that asks for a state switches tracking on.
    guarded.netns.nft("add table inet theirs")?;
    guarded
        .netns
        .nft("add chain inet theirs out { type filter hook output priority 0; }")?;
    guarded
        .netns
        .nft("add rule inet theirs out ct state established accept")?;
    guarded.attack(0)?.reaches()?;
    ensure!(count()? > 0, "tracking cannot be seen here");
    Ok(())
}
