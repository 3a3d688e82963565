//! D9: connections that are older than the rules. Each is made, and stays, before there are any.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Case, case};
use crate::{
    attack::Way,
    backend::{BOTH, Backend, EBPF},
    kernel::CGROUP_NEEDS,
    world::{Held, NOBODY, Netns, World, binary, until},
};

/// Ways that leave a socket of another kind behind.
const WAYS: [Way; 7] = [
    Way::Plain,
    Way::Mapped,
    Way::Mptcp,
    Way::MptcpMapped,
    Way::FastOpenConnect,
    Way::UdpConnect,
    Way::UdpMapped,
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        case!(d9_with_nftables_every_cgroup_is_swept).on(BOTH),
        case!(d9_older_connections_are_reported_and_stay),
        case!(d9_audit_never_cuts),
        case!(d9_apply_sweeps_too),
        case!(d9_half_open_and_deferred_are_cut),
        case!(d9_a_principals_cgroup_counts).needs(CGROUP_NEEDS),
        case!(d9_other_cgroups_and_accepted_ends_stay).on(EBPF),
        case!(d9_reload_begins_to_cut),
        case!(d9_many_are_found_and_cut),
    ];
    for way in WAYS {
        cases.push(case(&format!("d9_cut_way_{way:?}"), move || cut(way, false)));
    }
    cases.push(case("d9_cut_ipv6", || cut(Way::Plain, true)));
    cases.push(case("d9_cut_ipv6_udp", || cut(Way::UdpConnect, true)));
    cases
}

/// A listener that answers calls and does nothing more, and datagrams not at all.
fn quiet(at: SocketAddr) -> Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(at), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(8192)?;
    Ok(socket.into())
}

fn configure(world: &World, to: SocketAddr, top: &str, allow: &str) -> Result<()> {
    let endpoints = [format!("tcp://{to}"), format!("udp://{to}")];
    world.configure(&format!(
        "{top}\n[target.main]\nendpoints = {endpoints:?}\nallow = {allow}\n"
    ))
}

/// Waits until a sweep by the active generation has found so many.
fn found(world: &World, count: u64) -> Result<Value> {
    let mut existing = Value::Null;
    until(&format!("{count} connections are found"), || {
        let status = world.status()?;
        existing = status["existing"].clone();
        Ok(existing["generation"] == status["generation"] && existing["found"] == count)
    })?;
    Ok(existing)
}

fn events(world: &World) -> Result<Vec<Value>> {
    let ran = world.enforcer(&["events", "--json"])?.demand(0)?;
    let all = ran.stdout.lines().map(serde_json::from_str::<Value>);
    let all = all.collect::<Result<Vec<_>, _>>()?;
    Ok(all
        .into_iter()
        .filter(|event| event["schema"] == "enforcer/existing/1")
        .collect())
}

fn d9_with_nftables_every_cgroup_is_swept() -> Result<()> {
    let world = World::new()?;
    let _listener = quiet(world.here())?;
    let mut nobody = world.attack(NOBODY).anywhere().hold()?;
    let mut root = world.attack(0).anywhere().hold()?;
    let rules = |backend: &str| {
        world.configure(&format!(
            "backend = {backend:?}\nexisting = \"cut\"\n[target.main]\nendpoints = [\"tcp://{}\"]\n\
             allow = [\"root\"]\n",
            world.here()
        ))
    };
    rules("ebpf")?;
    world.apply()?;
    // Not below the judged cgroup.
    nobody.stays()?;
    rules("nftables")?;
    world.apply()?;
    nobody.is_cut()?;
    root.stays()?;
    world.enforcer(&["unload"])?.demand(0).map(drop)
}

fn d9_older_connections_are_reported_and_stay() -> Result<()> {
    let world = World::new()?;
    let _listener = quiet(world.here())?;
    let (mut nobody, mut root) = (world.attack(NOBODY).hold()?, world.attack(0).hold()?);
    let mut mapped = world.attack(NOBODY).way(Way::Mapped).hold()?;
    configure(&world, world.here(), "", r#"["root"]"#)?;
    let _daemon = world.daemon()?;
    let existing = found(&world, 2)?;
    ensure!(existing["action"] == "report" && existing["cut"] == 0, "{existing}");
    let connections = existing["connections"].as_array().context("no list")?;
    ensure!(connections.len() == 2, "{existing}");
    for one in connections {
        for (key, value) in [
            ("verdict", Value::from("deny")),
            ("action", "reported".into()),
            ("reason", Value::Null),
            ("protocol", "tcp".into()),
            ("state", "established".into()),
            ("remote", world.here().to_string().into()),
            ("uid", NOBODY.into()),
            ("target", "main".into()),
        ] {
            ensure!(one[key] == value, "{key}: {one}");
        }
    }
    let status = world.status()?;
    ensure!(status["state"] == "enforcing", "{status}");
    let text = world.enforcer(&["status"])?.demand(0)?.stdout;
    ensure!(
        text.contains("deny 2 existing connections") && text.contains("65534"),
        "{text}"
    );
    ensure!(events(&world)?.len() == 2, "{:?}", events(&world)?);
    // It looks again shortly after, and says nothing twice.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    ensure!(events(&world)?.len() == 2, "{:?}", events(&world)?);
    for held in [&mut nobody, &mut root, &mut mapped] {
        held.stays()?;
    }
    world.attack(NOBODY).is_refused()
}

fn cut(way: Way, v6: bool) -> Result<()> {
    let world = World::new()?;
    let address = if v6 { "::1".parse()? } else { world.address() };
    let to = SocketAddr::new(address, world.port);
    let _listener = quiet(to)?;
    let attack = |uid| world.attack(uid).way(way).to(to);
    let (nobody, mut root) = (attack(NOBODY).hold()?, attack(0).hold()?);
    configure(&world, to, "existing = \"cut\"", r#"["root"]"#)?;
    let _daemon = world.daemon()?;
    nobody.is_cut()?;
    let existing = found(&world, 0)?;
    ensure!(existing["cut"] == 1, "{existing}");
    root.stays()?;
    let events = events(&world)?;
    ensure!(
        events.len() == 1
            && events
                .iter()
                .all(|event| event["action"] == "cut" && event["uid"] == NOBODY),
        "{events:?}"
    );
    ensure!(world.status()?["state"] == "enforcing", "{}", world.status()?);
    Ok(())
}

fn d9_audit_never_cuts() -> Result<()> {
    let world = World::new()?;
    let _listener = quiet(world.here())?;
    let mut nobody = world.attack(NOBODY).hold()?;
    configure(
        &world,
        world.here(),
        "mode = \"audit\"\nexisting = \"cut\"",
        r#"["root"]"#,
    )?;
    let _daemon = world.daemon()?;
    let existing = found(&world, 1)?;
    ensure!(existing["connections"][0]["verdict"] == "would-deny", "{existing}");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    nobody.stays()
}

fn d9_apply_sweeps_too() -> Result<()> {
    let world = World::new()?;
    let _listener = quiet(world.here())?;
    let (nobody, mut root) = (world.attack(NOBODY).hold()?, world.attack(0).hold()?);
    configure(&world, world.here(), "existing = \"cut\"", r#"["root"]"#)?;
    let said = world.enforcer(&["apply"])?.demand(0)?;
    ensure!(said.stdout.contains("1 terminated"), "{said:?}");
    nobody.is_cut()?;
    root.stays()
}

/// Nobody answers there: the SYN goes to a neighbour that does not exist.
fn d9_half_open_and_deferred_are_cut() -> Result<()> {
    let world = World::new()?;
    let (home, peer) = (Netns::new(&world, "home")?, Netns::new(&world, "peer")?);
    home.join(&["10.79.0.1/24", "fd79::1/64"], &peer, &["10.79.0.2/24", "fd79::2/64"])?;
    let addresses: [IpAddr; 2] = ["10.79.0.9".parse()?, "fd79::9".parse()?];
    for address in addresses {
        let address = address.to_string();
        home.ip(&[
            "neighbour",
            "add",
            &address,
            "lladdr",
            "02:00:00:00:00:09",
            "dev",
            "veth0",
        ])?;
    }
    // Fast open without a cookie, so that `connect` alone sends nothing (ip-sysctl).
    home.set("ipv4/tcp_fastopen", "5")?;
    let dial = |uid, address: IpAddr, way| -> Result<Held> {
        world
            .attack(uid)
            .to(SocketAddr::new(address, world.port))
            .way(way)
            .option("--netns", &home.file().display().to_string())
            .hold()
    };
    let mut denied = Vec::new();
    let mut allowed = Vec::new();
    for address in addresses {
        for way in [Way::Plain, Way::FastOpenConnect] {
            denied.push(dial(NOBODY, address, way)?);
            allowed.push(dial(0, address, way)?);
        }
    }
    denied.push(dial(NOBODY, addresses[0], Way::Mapped)?);
    let endpoints = addresses.map(|address| format!("tcp://{}", SocketAddr::new(address, world.port)));
    let configure = |top: &str| {
        world.configure(&format!(
            "{top}\n[target.main]\nendpoints = {endpoints:?}\nallow = [\"root\"]\n"
        ))
    };
    configure("")?;
    let daemon = world.daemon_with(&mut home.command(&binary("enforcer")?))?;
    // Each sends its SYN again after a second, which nftables refuses.
    if !Backend::current().is_nftables() {
        let existing = found(&world, 5)?;
        let states = existing["connections"].as_array().context("no list")?;
        ensure!(states.iter().all(|one| one["state"] == "syn-sent"), "{existing}");
    }
    configure("existing = \"cut\"")?;
    daemon.reload()?;
    for held in &denied {
        if Backend::current().is_nftables() {
            // Its next SYN may be refused before it is cut.
            held.fails()?;
        } else {
            held.is_cut()?;
        }
    }
    for held in &mut allowed {
        held.stays()?;
    }
    found(&world, 0).map(drop)
}

fn d9_a_principals_cgroup_counts() -> Result<()> {
    let world = World::new()?;
    let _listener = quiet(world.here())?;
    let child = world.cgroup.join("child");
    std::fs::create_dir(&child)?;
    let mut outside = world.attack(0).hold()?;
    let stranger = world.attack(NOBODY).hold()?;
    let mut inside = world.attack(0).in_cgroup(&child).hold()?;
    let path = format!("/{}/child", world.name());
    let allow = format!("[{{ user = \"root\", cgroup = {path:?} }}]");
    configure(&world, world.here(), "existing = \"cut\"", &allow)?;
    let _daemon = world.daemon()?;
    stranger.is_cut()?;
    if Backend::current().is_nftables() {
        outside.is_cut()?;
    } else {
        // Its socket was made elsewhere, but who dialled may have been in the cgroup.
        found(&world, 1)?;
        outside.stays()?;
    }
    inside.stays()
}

/// Not judged: other cgroups, what was accepted, other network namespaces.
fn d9_other_cgroups_and_accepted_ends_stay() -> Result<()> {
    let world = World::new()?;
    let listener = quiet(world.here())?;
    let mut elsewhere = world.attack(NOBODY).anywhere().hold()?;
    // A caller whose own port is the endpoint's: the end that accepted it has an endpoint as its remote end.
    let server = TcpListener::bind((world.address(), 0))?;
    let endpoint = SocketAddr::new(world.address(), world.port + 1);
    let caller = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    caller.bind(&endpoint.into())?;
    caller.connect(&server.local_addr()?.into())?;
    let (accepted, _) = server.accept()?;
    let netns = Netns::new(&world, "ctr")?;
    let mut foreign = foreign(&world, &netns)?;
    let endpoints = [world.here(), endpoint].map(|at| format!("tcp://{at}"));
    world.configure_on(
        &world.cgroup,
        &format!("existing = \"cut\"\n[target.main]\nendpoints = {endpoints:?}\nallow = []\n"),
    )?;
    let inside = world.attack(NOBODY).hold()?;
    let daemon = world.daemon()?;
    inside.is_cut()?;
    found(&world, 0)?;
    elsewhere.stays()?;
    foreign.0.stays()?;
    drop(daemon);
    // Judging all cgroups, only what may have been accepted stays.
    let mount = crate::world::cgroup_mount()?;
    world.configure_on(
        &mount,
        &format!("existing = \"cut\"\n[target.main]\nendpoints = {endpoints:?}\nallow = [99999]\n"),
    )?;
    world.enforcer(&["unload"])?.demand(0)?;
    let _daemon = world.daemon()?;
    ensure!(elsewhere.fails().is_ok(), "a connection of another cgroup stayed");
    let existing = found(&world, 1)?;
    let kept = &existing["connections"][0];
    ensure!(
        kept["action"] == "kept" && kept["remote"] == endpoint.to_string(),
        "{existing}"
    );
    ensure!(accepted.take_error()?.is_none(), "it was cut");
    foreign.0.stays()?;
    drop((listener, accepted, caller));
    Ok(())
}

/// A connection within another network namespace, to a listener there.
fn foreign(world: &World, netns: &Netns) -> Result<(Held, crate::world::Listener)> {
    let listener = crate::world::Listener::start(Some(&netns.file()), world.port, &[])?;
    let held = world
        .attack(NOBODY)
        .option("--netns", &netns.file().display().to_string())
        .hold()?;
    Ok((held, listener))
}

fn d9_reload_begins_to_cut() -> Result<()> {
    let world = World::new()?;
    // This one hangs up at once: the connections are half closed.
    let _listener = world.listen()?;
    configure(&world, world.here(), "", r#"["root", 65534]"#)?;
    let daemon = world.daemon()?;
    let (nobody, mut root) = (world.attack(NOBODY).hold()?, world.attack(0).hold()?);
    found(&world, 0)?;
    configure(&world, world.here(), "", r#"["root"]"#)?;
    daemon.reload()?;
    let existing = found(&world, 1)?;
    ensure!(existing["connections"][0]["state"] == "close-wait", "{existing}");
    configure(&world, world.here(), "existing = \"cut\"", r#"["root"]"#)?;
    daemon.reload()?;
    nobody.is_cut()?;
    found(&world, 0)?;
    root.stays()
}

/// More than one round keeps in memory.
fn d9_many_are_found_and_cut() -> Result<()> {
    const MANY: usize = 6000;
    let world = World::new()?;
    let listener = quiet(world.here())?;
    let (_, limit) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, limit, limit)?;
    let to = world.here();
    // A backlog is no longer than `net.core.somaxconn`.
    let accepting = std::thread::spawn(move || listener.incoming().take(MANY).collect::<std::io::Result<Vec<_>>>());
    let held = crate::attack::as_user(NOBODY, move || {
        (0..MANY)
            .map(|_| TcpStream::connect(to))
            .collect::<std::io::Result<Vec<_>>>()
    })??;
    let accepted = accepting
        .join()
        .map_err(|_| anyhow::anyhow!("the listener's thread panicked"))??;
    let mount = crate::world::cgroup_mount()?;
    let target = format!("[target.main]\nendpoints = [\"tcp://{to}\"]\nallow = [\"root\"]\n");
    world.configure_on(&mount, &target)?;
    let daemon = world.daemon()?;
    let existing = found(&world, MANY as u64)?;
    ensure!(
        existing["connections"].as_array().is_some_and(|list| list.len() == 256),
        "the list is as long as {:?}",
        existing["connections"].as_array().map(Vec::len)
    );
    world.configure_on(&mount, &format!("existing = \"cut\"\n{target}"))?;
    daemon.reload()?;
    let existing = found(&world, 0)?;
    ensure!(existing["cut"] == MANY as u64, "{existing}");
    for stream in &held {
        ensure!(stream.take_error()?.is_some(), "one stayed");
    }
    drop(accepted);
    Ok(())
}
