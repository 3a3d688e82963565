//! N1–N7 against a real DNS server that moves, fails, lies and falls silent.

use std::{
    fs,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use hickory_proto::op::ResponseCode;
use serde_json::{Value, json};

use super::{Case, with_each};
use crate::{
    dns::{DnsServer, Zone},
    world::{Daemon, NOBODY, Netns, World, at_this_load, binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(n1_a_aaaa_and_cname),
        case!(n1_check_looks_names_up_as_the_daemon_does),
        case!(n1_odd_lines_of_resolv_conf_cost_only_themselves),
        case!(n1_a_silent_udp_path_is_tried_over_tcp),
        case!(n1_a_file_that_turns_odd_freezes_no_name),
        case!(n3_a_family_that_never_was_and_fails_is_a_note),
        case!(n1_n3_a_family_that_is_silent_keeps_nobody_waiting),
        case!(n3_n4_failures_keep_what_is_known),
        case!(n3_one_name_never_touches_another),
        case!(n6_answers_that_name_this_host_are_refused),
        case!(n6_link_local_answers_where_a_target_takes_them),
        case!(n1_a_link_local_name_server_is_asked_on_its_interface),
        case!(n5_unresolved_closed),
        case!(n7_f1_a_restart_without_dns_keeps_the_names),
        case!(b3_refresh_returns_when_the_kernel_holds_it),
    ]
}

/// A world with a DNS server, and a target for each of some names.
pub(super) struct Named {
    pub(super) world: World,
    pub(super) dns: DnsServer,
    _listener: crate::world::Listener,
}

impl Named {
    pub(super) fn new(names: &[&str], more: &str) -> Result<Self> {
        let world = World::new()?;
        let dns = DnsServer::start(None, world.address())?;
        fs::write(
            world.path("resolv.conf"),
            format!("nameserver {}\noptions timeout:1 attempts:1\n", world.address()),
        )?;
        let mut text = format!("{more}\n[dns]\nmin_refresh = \"1s\"\nmax_refresh = \"2s\"\n");
        for name in names {
            let target = name.replace('.', "-");
            text.push_str(&format!(
                "[target.{target}]\nendpoints = [\"tcp://{name}:{}\"]\nallow = [\"root\"]\n",
                world.port
            ));
        }
        world.configure(&text)?;
        let listener = world.listen()?;
        Ok(Self {
            world,
            dns,
            _listener: listener,
        })
    }

    pub(super) fn daemon(&self) -> Result<Daemon> {
        self.world.daemon_with(&mut self.world.with_resolver()?)
    }

    /// Which of some hosts an ordinary user cannot reach: asked of the kernel's maps.
    pub(super) fn denied(&self, address: &str) -> Result<bool> {
        let to = SocketAddr::new(address.parse()?, self.world.port);
        Ok(self.world.enforcer(&["check", "nobody", &to.to_string()])?.code == 1)
    }

    pub(super) fn name(&self, name: &str) -> Result<Value> {
        let status = self.world.status()?;
        let found = status["names"]
            .as_array()
            .and_then(|names| names.iter().find(|one| one["name"] == name))
            .cloned();
        Ok(found.unwrap_or_default())
    }
}

pub(super) fn addresses(list: &[&str]) -> Zone {
    Zone::Addresses(list.iter().filter_map(|text| text.parse::<IpAddr>().ok()).collect())
}

fn n1_a_aaaa_and_cname() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", Zone::Alias("real.test".to_owned()));
    named
        .dns
        .set("real.test", addresses(&["10.9.0.1", "10.9.0.2", "2001:db8::9"]));
    let _daemon = named.daemon()?;
    for address in ["10.9.0.1", "10.9.0.2", "2001:db8::9", "::ffff:10.9.0.1"] {
        ensure!(named.denied(address)?, "{address} is open");
    }
    ensure!(!named.denied("10.9.0.3")?, "another address is judged");
    ensure!(named.name("bus.test")?["stale"] == false, "{}", named.name("bus.test")?);
    // It moves; what it had stays protected.
    named.dns.set("real.test", addresses(&["10.9.0.7"]));
    until("the move is followed", || named.denied("10.9.0.7"))?;
    ensure!(
        named.denied("10.9.0.1")? && named.denied("2001:db8::9")?,
        "an address that left was let go (N4)"
    );
    Ok(())
}

/// Two interfaces, and behind each a name server with the same link-local address.
fn n1_a_link_local_name_server_is_asked_on_its_interface() -> Result<()> {
    let world = World::new()?;
    let home = Netns::new(&world, "home")?;
    let mut servers = Vec::new();
    for (number, answer) in ["10.9.0.1", "10.9.0.2"].into_iter().enumerate() {
        let peer = Netns::new(&world, &format!("peer{number}"))?;
        let device = format!("dns{number}");
        let pair = ["type", "veth", "peer", "name", "veth0", "netns", peer.name()];
        home.ip(&[&["link", "add", device.as_str()], &pair[..]].concat())?;
        for (netns, address, device) in [(&home, "fe80::1/64", device.as_str()), (&peer, "fe80::53/64", "veth0")] {
            netns.ip(&["address", "add", address, "dev", device, "nodad"])?;
            netns.ip(&["link", "set", device, "up"])?;
        }
        let dns = DnsServer::start(Some(&peer.file()), Ipv6Addr::UNSPECIFIED.into())?;
        dns.set("bus.test", addresses(&[answer]));
        servers.push((peer, dns, device, answer));
    }
    let shown = ran(home
        .command(Path::new("ip"))
        .args(["-o", "link", "show", "dev", "dns1"]))?;
    let number = shown.stdout.split(':').next().context("no index")?.to_owned();
    world.configure(&format!(
        "[target.bus]\nendpoints = [\"tcp://bus.test:{}\"]\nallow = [\"root\"]\n",
        world.port
    ))?;
    let found = |zone: &str, options: &str| -> Result<Value> {
        let conf = format!("nameserver fe80::53%{zone}\noptions timeout:2 attempts:1 {options}\n");
        fs::write(world.path("resolv.conf"), conf)?;
        let mut daemon = world.with_resolver_in(&home, &binary("enforcer")?);
        let _daemon = world.daemon_with(&mut daemon)?;
        let status = world.status()?;
        world.enforcer(&["unload"])?.demand(0)?;
        // What is known from before is none of the next answer.
        fs::remove_dir_all(world.path("state"))?;
        Ok(status["names"][0]["addresses"].clone())
    };
    for options in ["", "use-vc"] {
        for (_, dns, device, answer) in &servers {
            let said = found(device, options)?;
            ensure!(said == json!([answer]), "{device} {options}: {said}");
            ensure!(options.is_empty() || dns.over_tcp(), "{device}: not over TCP");
        }
    }
    let said = found(&number, "")?;
    ensure!(said == json!(["10.9.0.2"]), "zone {number}: {said}");
    Ok(())
}

/// Where the C library's name service would not ask DNS at all.
fn n1_check_looks_names_up_as_the_daemon_does() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", addresses(&["10.9.0.1", "2001:db8::9"]));
    fs::write(named.world.path("nsswitch.conf"), "hosts: files\npasswd: files\n")?;
    let _daemon = named.daemon()?;
    let check = |name: &str| {
        let mut command = named.world.with_resolver()?;
        command.arg("--config").arg(named.world.path("enforcer.toml"));
        ran(command.args(["check", "nobody", &format!("tcp://{name}:{}", named.world.port)]))
    };
    let found = check("bus.test")?.demand(1)?;
    ensure!(
        found.stdout.matches("deny  ").count() == 2 && found.stdout.contains("[2001:db8::9]"),
        "{found:?}"
    );
    let missing = check("nosuch.test")?.demand(2)?;
    ensure!(
        missing.stderr.contains("look up nosuch.test: it does not exist"),
        "{missing:?}"
    );
    Ok(())
}

/// What glibc and Go skip, in front of a line that is good.
const ODD: [&str; 8] = [
    "search (none)\n",
    "search a..b\n",
    "search -x.example\n",
    "search xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx.example\n",
    "nameserver ns.example\n",
    "options timeout:x ndots:-1 use-vc\n",
    "sortlist 130.155.160.0/255.255.240.0\nlookup file bind\nfamily inet4\n",
    "\u{fffd}\u{7f}\n",
];

fn n1_odd_lines_of_resolv_conf_cost_only_themselves() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    let good = fs::read_to_string(named.world.path("resolv.conf"))?;
    named.daemon()?.kill()?;
    for odd in ODD {
        fs::write(named.world.path("resolv.conf"), format!("{odd}{good}"))?;
        let mut command = named.world.with_resolver()?;
        command.arg("--config").arg(named.world.path("enforcer.toml"));
        let checked = ran(command.args(["check", "nobody", &format!("tcp://bus.test:{}", named.world.port)]))?;
        ensure!(checked.demand(1)?.stdout.contains("10.9.0.1"), "{odd:?}");
    }
    Ok(())
}

/// As a renewed lease of DHCP brings it, while a name moves.
fn n1_a_file_that_turns_odd_freezes_no_name() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    let _daemon = named.daemon()?;
    ensure!(named.denied("10.9.0.1")?, "not protected at first");
    let file = named.world.path("resolv.conf");
    let good = fs::read_to_string(&file)?;
    for (number, odd) in (2..).zip(ODD) {
        // In place: the daemon's is mounted there.
        fs::write(&file, format!("{odd}{good}"))?;
        let moved = format!("10.9.0.{number}");
        named.dns.set("bus.test", addresses(&[&moved]));
        until(&format!("the move is followed after {odd:?}"), || named.denied(&moved))?;
    }
    Ok(())
}

fn n1_a_silent_udp_path_is_tried_over_tcp() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", Zone::TcpAlone(vec!["10.9.0.1".parse()?]));
    let _daemon = named.daemon()?;
    until("it is known over TCP", || named.denied("10.9.0.1"))
}

fn n3_a_family_that_never_was_and_fails_is_a_note() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    let answer = |code| Zone::Ipv4Alone(vec![IpAddr::from([10, 9, 0, 1])], Some(code));
    named.dns.set("bus.test", answer(ResponseCode::ServFail));
    let _daemon = named.daemon()?;
    ensure!(named.denied("10.9.0.1")?, "the good family is not protected");
    let status = named.world.status()?;
    let name = named.name("bus.test")?;
    ensure!(
        status["state"] == "enforcing" && name["stale"] == false && name["cause"].to_string().contains("AAAA"),
        "{status}"
    );
    // Once it was known its failure is a fault.
    named.dns.set("bus.test", addresses(&["10.9.0.1", "2001:db8::9"]));
    until("both families are known", || named.denied("2001:db8::9"))?;
    named.dns.set("bus.test", answer(ResponseCode::ServFail));
    until(
        "the failure is a fault",
        || Ok(named.name("bus.test")?["stale"] == true),
    )?;
    ensure!(named.denied("2001:db8::9")?, "what was known is let go");
    Ok(())
}

/// Five seconds, for which a lookup may wait, are not waited where the other family is answered.
fn n1_n3_a_family_that_is_silent_keeps_nobody_waiting() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    let file = named.world.path("resolv.conf");
    fs::write(
        &file,
        format!("nameserver {}\noptions timeout:9\n", named.world.address()),
    )?;
    let answer = |last| Zone::Ipv4Alone(vec![IpAddr::from([10, 9, 0, last])], None);
    named.dns.set("bus.test", answer(1));
    let limit = at_this_load(Duration::from_secs(3))?;
    let begun = Instant::now();
    let _daemon = named.daemon()?;
    let took = begun.elapsed();
    ensure!(took < limit, "ready after {took:?}");
    ensure!(named.denied("10.9.0.1")?, "the good family is not protected");
    named.dns.set("bus.test", answer(2));
    let begun = Instant::now();
    named.world.enforcer(&["refresh"])?.demand(0)?;
    let took = begun.elapsed();
    ensure!(took < limit, "refreshed after {took:?}");
    ensure!(
        named.denied("10.9.0.2")? && named.denied("10.9.0.1")?,
        "the move is not followed"
    );
    // In the end it is known what failed; the state is none the worse.
    until("the failure is noted", || {
        Ok(named.name("bus.test")?["cause"].to_string().contains("AAAA"))
    })?;
    let status = named.world.status()?;
    ensure!(status["state"] == "enforcing", "{status}");
    // A family that was known, and is silent now, is a fault, and what it was stays.
    named.dns.set("bus.test", addresses(&["10.9.0.2", "2001:db8::9"]));
    named.world.enforcer(&["refresh"])?.demand(0)?;
    ensure!(named.denied("2001:db8::9")?, "the other family is not followed");
    named.dns.set("bus.test", answer(3));
    until("the move is followed", || named.denied("10.9.0.3"))?;
    until(
        "the silence is a fault",
        || Ok(named.name("bus.test")?["stale"] == true),
    )?;
    ensure!(named.denied("2001:db8::9")?, "what was known is let go");
    Ok(())
}

fn n3_n4_failures_keep_what_is_known() -> Result<()> {
    let bad = [
        Zone::Code(ResponseCode::ServFail),
        Zone::Code(ResponseCode::NXDomain),
        Zone::Code(ResponseCode::Refused),
        Zone::Silence,
        addresses(&[]),
    ];
    with_each(&bad, fails)
}

fn fails(bad: &Zone) -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    let _daemon = named.daemon()?;
    named.dns.set("bus.test", bad.clone());
    until("the name is stale", || Ok(named.name("bus.test")?["stale"] == true))?;
    ensure!(named.denied("10.9.0.1")?, "{bad:?} opened the address");
    let status = named.world.status()?;
    ensure!(
        status["state"] == "degraded" && status["causes"].to_string().contains("bus.test"),
        "{status}"
    );
    named.dns.set("bus.test", addresses(&["10.9.0.2"]));
    named.world.enforcer(&["refresh"])?.demand(0)?;
    ensure!(
        named.denied("10.9.0.2")? && named.world.status()?["state"] == "enforcing",
        "no recovery from {bad:?}"
    );
    Ok(())
}

fn n3_one_name_never_touches_another() -> Result<()> {
    let named = Named::new(&["bus.test", "other.test"], "")?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    named.dns.set("other.test", addresses(&["10.9.1.1"]));
    let _daemon = named.daemon()?;
    named.dns.set("bus.test", Zone::Silence);
    named.dns.set("other.test", addresses(&["10.9.1.2"]));
    until("the other name is followed", || named.denied("10.9.1.2"))?;
    ensure!(named.denied("10.9.0.1")?, "the silent name's address is open");
    ensure!(named.name("other.test")?["stale"] == false, "{}", named.world.status()?);
    Ok(())
}

fn n6_answers_that_name_this_host_are_refused() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set(
        "bus.test",
        addresses(&[
            "127.0.0.1",
            "169.254.169.254",
            "224.0.0.1",
            "10.9.0.1",
            "::1",
            "fe80::1",
        ]),
    );
    let daemon = named.daemon()?;
    ensure!(named.denied("10.9.0.1")?, "the good address is open");
    for address in ["127.0.0.1", "169.254.169.254", "::1", "fe80::1"] {
        ensure!(!named.denied(address)?, "{address} was taken from DNS");
    }
    ensure!(
        daemon.log().contains("rejected") && daemon.log().contains("169.254.169.254"),
        "{}",
        daemon.log()
    );
    Ok(())
}

/// As a cloud's metadata service is named.
fn n6_link_local_answers_where_a_target_takes_them() -> Result<()> {
    let named = Named::new(&["meta.test"], "")?;
    named
        .dns
        .set("meta.test", addresses(&["169.254.169.254", "fe80::a9fe"]));
    let check = |code: i32| {
        let mut command = named.world.with_resolver()?;
        command.arg("--config").arg(named.world.path("enforcer.toml"));
        ran(command.args(["config", "check"]))?.demand(code)
    };
    let said = check(1)?.stdout;
    ensure!(
        said.contains("meta.test") && said.contains("answers = \"link-local\""),
        "{said}"
    );
    let daemon = named.daemon()?;
    ensure!(!named.denied("169.254.169.254")?, "a lie was believed");
    ensure!(daemon.log().contains("answers = \"link-local\""), "{}", daemon.log());
    // What the message says protects it.
    let file = named.world.path("enforcer.toml");
    let text = fs::read_to_string(&file)?;
    fs::write(&file, text + "answers = \"link-local\"\n")?;
    check(0)?;
    daemon.reload()?;
    until("the name is protected", || named.denied("169.254.169.254"))?;
    ensure!(named.denied("fe80::a9fe")?, "{}", named.world.status()?);
    ensure!(
        named.world.status()?["state"] == "enforcing",
        "{}",
        named.world.status()?
    );
    // What no target takes stays refused.
    named
        .dns
        .set("meta.test", addresses(&["127.0.0.1", "224.0.0.1", "255.255.255.255"]));
    named.world.enforcer(&["refresh"])?;
    for address in ["127.0.0.1", "224.0.0.1", "255.255.255.255"] {
        ensure!(!named.denied(address)?, "{address} was believed");
    }
    Ok(())
}

fn n5_unresolved_closed() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", Zone::Code(ResponseCode::ServFail));
    let toml = named.world.path("enforcer.toml");
    let text = fs::read_to_string(&toml)?;
    let daemon = named.daemon()?;
    named.world.attack(NOBODY).reaches()?;
    fs::write(&toml, text.replace("[dns]", "[dns]\nunresolved = \"closed\""))?;
    daemon.reload()?;
    named.world.attack(NOBODY).is_refused()?;
    named.world.attack(0).reaches()?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    named.world.enforcer(&["refresh"])?.demand(0)?;
    named.world.attack(NOBODY).reaches()?;
    ensure!(named.denied("10.9.0.1")?, "the address is open");
    Ok(())
}

fn n7_f1_a_restart_without_dns_keeps_the_names() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    named.daemon()?.kill()?;
    ensure!(named.denied("10.9.0.1")?, "a crash opened the address");
    named.dns.set("bus.test", Zone::Silence);
    let _daemon = named.daemon()?;
    ensure!(named.denied("10.9.0.1")?, "a restart without DNS opened the address");
    ensure!(named.name("bus.test")?["stale"] == true, "{}", named.world.status()?);
    Ok(())
}

fn b3_refresh_returns_when_the_kernel_holds_it() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    let _daemon = named.daemon()?;
    for host in 2..30_u8 {
        let address = format!("10.9.0.{host}");
        named.dns.set("bus.test", addresses(&[&address]));
        named.world.enforcer(&["refresh"])?.demand(0)?;
        ensure!(named.denied(&address)?, "{address} is open after refresh");
    }
    named.dns.set("bus.test", Zone::Silence);
    let late = named.world.enforcer(&["refresh"])?;
    ensure!(late.code == 1, "a refresh without an answer: {late:?}");
    Ok(())
}
