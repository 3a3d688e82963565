//! The nftables backend, alone and as the other half of eBPF: ways in, forwarding, drift, choice, sizes.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use super::{
    Case, case,
    decision::{TCP_WAYS, UDP_WAYS},
};
use crate::{
    attack::{Way, Who},
    kernel::{Feature, cannot, lacks},
    world::{Attack, Blows, Daemon, Listener, NOBODY, Netns, World, binary, ran, until},
};

/// All cases of this file.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        case("s5_nftables_sees_whoever_opened_the_socket", users),
        case("s5_nftables_every_way_of_one_rule_set", every_way),
        case("s5_nftables_kernel_is_no_user", kernel_is_no_user),
        case("s5_nftables_cgroup_of_the_socket", cgroup),
        case("s5_forwarded_connections_are_refused", forwarded),
        case("s5_auto_takes_nftables_without_bpf", auto),
        case("s5_both_is_refused_by_each", both),
        case("s5_nftables_denials_are_told", told),
        case("f2_nftables_no_wrong_verdict_in_200_rule_sets", under_fire),
        case("f1_f2_backends_change_without_a_gap", changing_backends),
        case("f3_f7_nftables_100000_endpoints", many),
        case("f4_both_fails_as_one", fails_as_one),
        case("f5_nftables_table_of_others", foreign),
        case("f5_nftables_drift_is_mended", drift),
        case("p3_nftables_does_not_switch_conntrack_on", no_conntrack),
    ];
    for way in TCP_WAYS.into_iter().chain(UDP_WAYS) {
        cases.push(case(&format!("s5_nftables_way_{way:?}"), move || one_way(way)));
    }
    cases
}

/// A network namespace of its own with a listener, in which the binary and its victims run.
struct Guarded {
    world: World,
    netns: Netns,
    _listener: Listener,
}

impl Guarded {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let netns = Netns::new(&world, "g")?;
        let listener = Listener::start(Some(&netns.file()), world.port, &[world.address(), "::1".parse()?])?;
        Ok(Self {
            world,
            netns,
            _listener: listener,
        })
    }

    fn configure(&self, backend: &str, endpoints: &[String], allow: &str) -> Result<()> {
        self.world.configure(&format!(
            "backend = {backend:?}\n[target.main]\nendpoints = {endpoints:?}\nallow = {allow}\n"
        ))
    }

    /// One endpoint, root alone.
    fn guard(&self, backend: &str) -> Result<()> {
        self.configure(backend, &[format!("tcp://{}", self.world.here())], r#"["root"]"#)?;
        self.apply()
    }

    fn apply(&self) -> Result<()> {
        self.netns.enforcer(&self.world, &["apply"])?.demand(0).map(drop)
    }

    fn attack(&self, uid: u32) -> Result<Attack> {
        self.world.attack(uid).in_netns(&self.netns)
    }

    fn daemon(&self) -> Result<Daemon> {
        self.world.daemon_with(&mut self.netns.command(&binary("enforcer")?))
    }

    fn status(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(
            &self.netns.enforcer(&self.world, &["status", "--json"])?.stdout,
        )?)
    }
}

fn one_way(way: Way) -> Result<()> {
    let guarded = Guarded::new()?;
    let nobody = guarded.attack(NOBODY)?.way(way);
    if let Some(errno) = cannot(way) {
        return nobody.fails_by(errno);
    }
    nobody.reaches()?;
    let scheme = if way.is_udp() { "udp" } else { "tcp" };
    let mut endpoints = vec![format!("{scheme}://{}", guarded.world.here())];
    // An unspecified destination is a real one by the time its packet leaves: this host's.
    for address in ["127.0.0.1", "[::1]"] {
        endpoints.push(format!("{scheme}://{address}:{}", guarded.world.port));
    }
    guarded.configure("nftables", &endpoints, r#"["root"]"#)?;
    guarded.apply()?;
    if way.is_udp() {
        // What sends without being connected is not told of the refusal: nothing comes back.
        ensure!(nobody.run()?.errno.is_some(), "{way:?} reached the listener");
    } else {
        nobody.is_reset()?;
    }
    guarded.attack(0)?.way(way).reaches()?;
    let denied = &guarded.status()?["targets"][0]["denied"];
    ensure!(denied.as_u64() > Some(0), "nothing was counted: {denied}");
    guarded.netns.enforcer(&guarded.world, &["unload"])?.demand(0)?;
    nobody.reaches()
}

/// All ways on one rule set.
fn every_way() -> Result<()> {
    let guarded = Guarded::new()?;
    let can: Vec<Way> = TCP_WAYS
        .into_iter()
        .chain(UDP_WAYS)
        .filter(|way| cannot(*way).is_none())
        .collect();
    for way in &can {
        guarded.attack(NOBODY)?.way(*way).reaches()?;
    }
    let mut endpoints = Vec::new();
    for scheme in ["tcp", "udp"] {
        endpoints.push(format!("{scheme}://{}", guarded.world.here()));
        for address in ["127.0.0.1", "[::1]"] {
            endpoints.push(format!("{scheme}://{address}:{}", guarded.world.port));
        }
    }
    guarded.configure("nftables", &endpoints, r#"["root"]"#)?;
    guarded.apply()?;
    for way in can {
        let nobody = guarded.attack(NOBODY)?.way(way);
        if way.is_udp() {
            ensure!(nobody.run()?.errno.is_some(), "{way:?} reached the listener");
        } else {
            nobody.is_reset()?;
        }
        guarded.attack(0)?.way(way).reaches()?;
    }
    Ok(())
}

/// §5: the differences from eBPF, both outcomes.
fn users() -> Result<()> {
    for (who, nftables) in [
        (Who::User, false),
        (Who::SocketOfRoot, true),
        (Who::SocketForRoot, false),
        (Who::UserNamespace, false),
    ] {
        let guarded = Guarded::new()?;
        let attack = guarded.attack(NOBODY)?.who(who);
        attack.reaches()?;
        guarded.guard("nftables")?;
        if nftables {
            attack.reaches()?;
        } else {
            attack.is_reset()?;
        }
        guarded.guard("ebpf")?;
        attack.is_refused()?;
    }
    Ok(())
}

fn kernel_is_no_user() -> Result<()> {
    let guarded = Guarded::new()?;
    let endpoint = format!("tcp://{}", guarded.world.here());
    guarded.configure("nftables", &[endpoint], "[{ kernel = true }]")?;
    guarded.apply()?;
    guarded.attack(0)?.is_reset()?;
    guarded.attack(NOBODY)?.is_reset()
}

fn cgroup() -> Result<()> {
    let guarded = Guarded::new()?;
    let child = guarded.world.cgroup.join("child");
    fs::create_dir(&child)?;
    let path = format!("/{}/child", guarded.world.name());
    let allow = format!("[{{ user = {NOBODY}, cgroup = {path:?} }}]");
    guarded.configure("nftables", &[format!("tcp://{}", guarded.world.here())], &allow)?;
    guarded.apply()?;
    if lacks(Feature::SocketCgroup) {
        // A principal with a cgroup matches nobody, and `status` says so.
        guarded.attack(NOBODY)?.in_cgroup(&child).is_reset()?;
    } else {
        guarded.attack(NOBODY)?.in_cgroup(&child).reaches()?;
    }
    guarded.attack(NOBODY)?.is_reset()?;
    guarded.attack(0)?.in_cgroup(&child).is_reset()
}

/// A client and a server with this host between them.
fn forwarded() -> Result<()> {
    for backend in ["nftables", "both"] {
        let guarded = Guarded::new()?;
        let (world, router) = (&guarded.world, &guarded.netns);
        let client = Netns::new(world, "c")?;
        let server = Netns::new(world, "s")?;
        client.join(&["10.50.0.2/24"], router, &["10.50.0.1/24"])?;
        router.ip(&["link", "set", "veth0", "down"])?;
        router.ip(&["link", "set", "veth0", "name", "inside"])?;
        router.ip(&["link", "set", "inside", "up"])?;
        server.join(&["10.51.0.2/24"], router, &["10.51.0.1/24"])?;
        client.ip(&["route", "add", "default", "via", "10.50.0.1"])?;
        server.ip(&["route", "add", "default", "via", "10.51.0.1"])?;
        for setting in ["ip_forward", "conf/all/route_localnet", "conf/inside/route_localnet"] {
            let script = format!("echo 1 > /proc/sys/net/ipv4/{setting}");
            ran(router.command(Path::new("sh")).args(["-c", &script]))?.demand(0)?;
        }
        let _server = Listener::start(Some(&server.file()), world.port, &[])?;
        let routable = SocketAddr::new(Ipv4Addr::new(10, 51, 0, 2).into(), world.port);
        // Two ports of the router lead to the server and to the router's loopback.
        router.nft("add table ip nat")?;
        router.nft("add chain ip nat pre { type nat hook prerouting priority -100; }")?;
        router.nft(&format!(
            "add rule ip nat pre ip daddr 10.50.0.1 tcp dport 1001 dnat to {routable}"
        ))?;
        router.nft(&format!(
            "add rule ip nat pre ip daddr 10.50.0.1 tcp dport 1002 dnat to {}",
            world.here()
        ))?;
        let by_nat = |port| SocketAddr::new(Ipv4Addr::new(10, 50, 0, 1).into(), port);
        let mut attacks = Vec::new();
        for uid in [0, NOBODY] {
            for to in [routable, by_nat(1001), by_nat(1002)] {
                // From a cgroup that is not ours, so that eBPF sees none of it.
                attacks.push(world.attack(uid).anywhere().to(to).in_netns(&client)?);
            }
        }
        attacks.iter().try_for_each(Attack::reaches)?;
        let endpoints = [format!("tcp://{routable}"), format!("tcp://{}", world.here())];
        guarded.configure(backend, &endpoints, r#"["root"]"#)?;
        guarded.apply()?;
        for attack in &attacks {
            let outcome = attack.run()?;
            ensure!(outcome.errno.is_some(), "{backend}: {attack:?} got through");
        }
        // A routable endpoint answers at once (D8).
        attacks.first().map_or(Ok(()), Attack::is_reset)?;
        guarded.attack(0)?.to(routable).reaches()?;
        let text = fs::read_to_string(world.path("enforcer.toml"))?;
        fs::write(world.path("enforcer.toml"), format!("forward = \"allow\"\n{text}"))?;
        guarded.apply()?;
        attacks.first().map_or(Ok(()), Attack::reaches)?;
        guarded.netns.enforcer(world, &["unload"])?.demand(0)?;
    }
    Ok(())
}

fn auto() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("auto")?;
    ensure!(guarded.status()?["backend"] == "ebpf", "{}", guarded.status()?);
    guarded.attack(NOBODY)?.is_refused()?;
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
    guarded.attack(NOBODY)?.is_refused()?;
    ensure!(
        !guarded.netns.nft("list tables")?.contains(guarded.world.name()),
        "the table was left"
    );
    Ok(())
}

fn both() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("both")?;
    guarded.attack(NOBODY)?.is_refused()?;
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

fn told() -> Result<()> {
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
        let event = event.get("Event").or_else(|| event.get("event")).unwrap_or(&event);
        ensure!(
            event["verdict"] == verdict
                && event["socket_uid"] == NOBODY
                && event["target"] == "main"
                && event["judged"] == guarded.world.here().to_string()
                && event["generation"] == 1,
            "{said}"
        );
        let text = guarded.netns.enforcer(&guarded.world, &["events"])?.demand(0)?.stdout;
        ensure!(text.contains(&format!("{verdict} uid {NOBODY} from ")), "{text}");
    }
    Ok(())
}

/// Hammers while `work` goes on; nobody gets in, root is never refused.
fn hammered(guarded: &Guarded, work: impl FnOnce() -> Result<()>) -> Result<()> {
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
        bad.connected + bad.other == 0 && bad.reset + bad.refused > 1000,
        "{bad:?}"
    );
    ensure!(
        good.refused + good.reset + good.other == 0 && good.connected > 1000,
        "{good:?}"
    );
    Ok(())
}

fn under_fire() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.attack(NOBODY)?.reaches()?;
    guarded.guard("nftables")?;
    let daemon = guarded.daemon()?;
    hammered(&guarded, || {
        for round in 0..200_u16 {
            let others = (0..round % 50).map(|other| format!("tcp://10.1.{round}.{other}:{}", guarded.world.port));
            let endpoints: Vec<String> = others.chain([format!("tcp://{}", guarded.world.here())]).collect();
            guarded.configure("nftables", &endpoints, &format!("[\"root\", {}]", 2000 + round))?;
            daemon.reload()?;
        }
        Ok(())
    })?;
    let status = guarded.status()?;
    ensure!(
        status["generation"].as_u64() >= Some(200) && status["state"] == "enforcing",
        "{status}"
    );
    Ok(())
}

fn changing_backends() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("ebpf")?;
    let daemon = guarded.daemon()?;
    hammered(&guarded, || {
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

fn many() -> Result<()> {
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

fn fails_as_one() -> Result<()> {
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
    guarded.attack(NOBODY)?.is_refused()
}

fn foreign() -> Result<()> {
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

fn drift() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("nftables")?;
    let _daemon = guarded.daemon()?;
    let table = guarded.world.name();
    let blows = [
        "flush ruleset".to_owned(),
        format!("delete table inet {table}"),
        format!("insert rule inet {table} output accept"),
        format!("flush chain inet {table} output"),
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
        ensure!(took < Duration::from_secs(2), "back only after {took:?}");
        guarded.attack(0)?.reaches()?;
        guarded.attack(NOBODY)?.is_reset()?;
        let status = guarded.status()?;
        ensure!(
            status["state"] == "degraded" && status["causes"].to_string().contains("removed or changed"),
            "{status}"
        );
    }
    // Others' tables are not ours to mend.
    guarded.netns.nft("add table inet theirs")?;
    thread::sleep(Duration::from_millis(300));
    ensure!(guarded.status()?["restored"] == blows.len(), "{}", guarded.status()?);
    ensure!(
        guarded.netns.nft("list tables")?.contains("theirs"),
        "their table is gone"
    );
    Ok(())
}

fn no_conntrack() -> Result<()> {
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
