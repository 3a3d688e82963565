//! D1–D8: who reaches what by which way. Every attack succeeds without us first.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
};

use anyhow::{Result, ensure};

use super::{Case, case};
use crate::{
    attack::{Way, Who},
    backend::{ALL, Backend, EBPF},
    kernel::{CGROUP_NEEDS, Feature, cannot, hides_owners, lacks},
    world::{Attack, Listener, NOBODY, Netns, World, binary, cgroup_mount, copy_binary},
};

/// Ways to the world's own loopback address.
const TCP_WAYS: [Way; 18] = [
    Way::Plain,
    Way::Nonblocking,
    Way::Thread,
    Way::Mapped,
    Way::Unspecified,
    Way::UnspecifiedMapped,
    Way::UnspecifiedUnbound,
    Way::Unspecified6,
    Way::Unspecified6Mapped,
    Way::FastOpenSendto,
    Way::FastOpenConnect,
    Way::FastOpenMapped,
    Way::Mptcp,
    Way::MptcpMapped,
    Way::IoUring,
    Way::IoUringSqpoll,
    Way::IoUringAsync,
    Way::Reconnect,
];
const UDP_WAYS: [Way; 10] = [
    Way::UdpConnect,
    Way::UdpSendto,
    Way::UdpSendmsg,
    Way::UdpSendmmsg,
    Way::UdpMapped,
    Way::UdpElsewhere,
    Way::UdpUnspecified,
    Way::UdpUnspecifiedMapped,
    Way::UdpUnspecified6,
    Way::UdpIoUring,
];
/// Mixtures of users, of which rules for root alone admit none: and whether nftables does, which sees the filesystem
/// UID that made the socket and no other (§5).
const MIXTURES: [(Who, bool); 11] = [
    (Who::SocketOfRoot, true),
    (Who::Handed, true),
    (Who::HandedToRoot, false),
    (Who::SavedRoot, false),
    (Who::SocketForRoot, false),
    (Who::Chowned, true),
    (Who::EffectiveRoot, true),
    (Who::EffectiveUser, false),
    (Who::FilesystemRoot, true),
    (Who::UserNamespace, false),
    (Who::CgroupNamespace, false),
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for way in TCP_WAYS.into_iter().chain(UDP_WAYS) {
        cases.push(case(&format!("d2_d4_d5_way_{way:?}"), move || one_way(way, false)).on(ALL));
        let at_root = case(&format!("d2_d4_d5_root_cgroup_way_{way:?}"), move || one_way(way, true));
        cases.push(at_root.on(EBPF));
    }
    for (who, nftables) in MIXTURES {
        cases.push(case(&format!("d3_who_{who:?}"), move || one_mixture(who, nftables)));
    }
    cases.push(case!(d2_d4_d5_every_way_of_one_rule_set).on(ALL));
    cases.push(case!(d3_everybody_of_one_rule_set));
    cases.push(case!(d3_both_users_may_be_allowed_by_different_principals));
    cases.push(case!(d3_setuid_root_binary));
    cases.push(case!(d3_root_polls_another_users_socket));
    cases.push(case!(d1_nothing_else_is_touched));
    cases.push(case!(d2_deny_wins_among_targets));
    cases.push(case!(d2_prefix_owners_join_exact_owners));
    cases.push(case!(d4_d5_ipv6_ways));
    cases.push(case!(d5_bind_to_device));
    cases.push(case!(d1_datagrams_to_many_are_judged_by_that_address_alone));
    cases.push(case!(d6_containers_loopback_is_their_own_routable_is_not));
    cases.push(case!(d7_local_follows_addresses));
    cases.push(case!(principal_within_cgroup).needs(CGROUP_NEEDS));
    cases.push(case!(principal_kernel_admits_no_user));
    cases.push(case!(audit_refuses_nothing));
    cases
}

fn endpoint(way: Way, world: &World) -> String {
    format!("{}://{}", if way.is_udp() { "udp" } else { "tcp" }, world.here())
}

fn one_way(way: Way, at_root: bool) -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let mut nobody = world.attack(NOBODY).way(way);
    if let Some(errno) = cannot(way) {
        return nobody.fails_by(errno);
    }
    nobody.reaches()?;
    let targets = format!(
        "[target.main]\nendpoints = [{:?}]\nallow = [\"root\"]\n",
        endpoint(way, &world)
    );
    if at_root {
        world.configure_on(&cgroup_mount()?, &targets)?;
        nobody = nobody.anywhere();
    } else {
        world.configure(&targets)?;
    }
    world.apply()?;
    let elsewhere = Backend::current().is_nftables() && !becomes_here(way);
    nobody.succeeds(elsewhere)?;
    if elsewhere {
        // By the time its packet leaves it goes to an address of this host that is no endpoint, unless we say so.
        let scheme = if way.is_udp() { "udp" } else { "tcp" };
        let local = ["127.0.0.1", "[::1]"].map(|address| format!("{scheme}://{address}:{}", world.port));
        world.configure_one(&local, r#"["root"]"#)?;
        world.apply()?;
        nobody.is_refused()?;
    }
    world.attack(0).way(way).reaches()?;
    let denied = &world.status()?["targets"][0]["denied"];
    ensure!(denied.as_u64() > Some(0), "nothing was counted: {denied}");
    world.enforcer(&["unload"])?.demand(0)?;
    nobody.reaches()
}

/// All ways on one rule set: where to load one is dear, under emulation.
fn d2_d4_d5_every_way_of_one_rule_set() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let mut ways = Vec::new();
    for way in TCP_WAYS.into_iter().chain(UDP_WAYS) {
        let nobody = world.attack(NOBODY).way(way);
        if let Some(errno) = cannot(way) {
            nobody.fails_by(errno)?;
            continue;
        }
        nobody.reaches()?;
        ways.push(way);
    }
    let mut places = vec![world.here().to_string()];
    if Backend::current().is_nftables() {
        // What an unspecified destination has become by the time its packet leaves.
        places.extend(["127.0.0.1", "[::1]"].map(|address| format!("{address}:{}", world.port)));
    }
    let endpoints: Vec<String> = ["tcp", "udp"]
        .iter()
        .flat_map(|scheme| places.iter().map(move |place| format!("{scheme}://{place}")))
        .collect();
    world.configure_one(&endpoints, r#"["root"]"#)?;
    world.apply()?;
    for way in ways {
        world.attack(NOBODY).way(way).is_refused()?;
        world.attack(0).way(way).reaches()?;
    }
    Ok(())
}

/// All mixtures of users on one rule set.
fn d3_everybody_of_one_rule_set() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let ways = [Way::Plain, Way::IoUringSqpoll, Way::UdpSendto];
    for (who, _) in MIXTURES {
        for way in ways {
            world.attack(NOBODY).who(who).way(way).reaches()?;
        }
    }
    let endpoints = ["tcp", "udp"].map(|scheme| format!("{scheme}://{}", world.here()));
    world.configure_one(&endpoints, r#"["root"]"#)?;
    world.apply()?;
    for (who, nftables) in MIXTURES {
        for way in ways {
            let attack = world.attack(NOBODY).who(who).way(way);
            attack.succeeds(passes(who, way, nftables))?;
        }
    }
    world.attack(0).reaches()
}

/// Whether a mixture passes where root alone is allowed; `nftables` is what that makes of it, as it knows the socket's
/// user alone.
fn passes(who: Who, way: Way, nftables: bool) -> bool {
    if Backend::current().is_nftables() {
        return nftables;
    }
    // The kernel tells no owner there (D3); of MPTCP it lets the subflow's socket, which is TCP's, come to the hook.
    let unseen = way.is_udp() && hides_owners();
    let by_nftables = nftables || Backend::current() != Backend::Both;
    unseen
        && by_nftables
        && matches!(
            who,
            Who::HandedToRoot | Who::SocketForRoot | Who::Chowned | Who::EffectiveUser
        )
}

/// Whether a packet to the unspecified address ends up at the world's own.
fn becomes_here(way: Way) -> bool {
    !matches!(
        way,
        Way::UnspecifiedUnbound
            | Way::Unspecified6
            | Way::Unspecified6Mapped
            | Way::UdpUnspecified6
            | Way::BindToDevice
    )
}

fn one_mixture(who: Who, nftables: bool) -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    for way in [
        Way::Plain,
        Way::Mptcp,
        Way::IoUringSqpoll,
        Way::IoUringAsync,
        Way::UdpConnect,
        Way::UdpSendto,
        Way::UdpIoUring,
    ] {
        let attack = world.attack(NOBODY).who(who).way(way);
        if let Some(errno) = cannot(way) {
            attack.fails_by(errno)?;
            continue;
        }
        attack.reaches()?;
        world.configure_one(&[endpoint(way, &world)], r#"["root"]"#)?;
        world.apply()?;
        attack.succeeds(passes(who, way, nftables))?;
        world.attack(0).way(way).reaches()?;
        world.enforcer(&["unload"])?.demand(0)?;
    }
    Ok(())
}

fn d3_both_users_may_be_allowed_by_different_principals() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.configure_one(&[endpoint(Way::Plain, &world)], &format!("[\"root\", {NOBODY}]"))?;
    world.apply()?;
    for who in [Who::User, Who::SocketOfRoot, Who::SocketForRoot, Who::EffectiveRoot] {
        world.attack(NOBODY).who(who).reaches()?;
    }
    world.attack(1).is_refused()
}

fn d3_setuid_root_binary() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let copy = world.path("setuid");
    copy_binary("attack", &copy)?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o4755))?;
    let user = NOBODY.to_string();
    let prefix = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"];
    let as_is = world.attack(NOBODY).program(&prefix, copy).flag("--as-is");
    as_is.reaches()?;
    world.configure_one(&[endpoint(Way::Plain, &world)], r#"["root"]"#)?;
    world.apply()?;
    // §5: root made its socket, as the filesystem UID says.
    as_is.succeeds(Backend::current().is_nftables())?;
    world.attack(NOBODY).is_refused()
}

fn d3_root_polls_another_users_socket() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let attack = world.attack(NOBODY).who(Who::SocketForRoot).way(Way::IoUringSqpoll);
    attack.reaches()?;
    world.configure_one(&[endpoint(Way::Plain, &world)], r#"["root"]"#)?;
    world.apply()?;
    attack.is_refused()
}

fn d1_nothing_else_is_touched() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let other = IpAddr::V4(Ipv4Addr::new(127, 1, 2, 3));
    let endpoints = [
        format!("tcp://{other}:{}", world.port),
        format!("tcp://{}:{}", world.address(), world.port ^ 1),
        format!("udp://{}", world.here()),
        format!("tcp://10.0.0.0/8:{}", world.port),
        format!("tcp://[2001:db8::/32]:{}", world.port),
    ];
    world.configure_one(&endpoints, "[]")?;
    world.apply()?;
    world.attack(NOBODY).reaches()?;
    world.attack(NOBODY).way(Way::Mapped).reaches()?;
    world.attack(0).to(SocketAddr::new(other, world.port)).is_refused()?;
    world.attack(NOBODY).way(Way::UdpSendto).is_refused()
}

fn d2_deny_wins_among_targets() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let (port, here) = (world.port, world.here());
    let [a, b, ..] = match world.address() {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(_) => [0; 4],
    };
    world.configure(&format!(
        "[target.one]\nendpoints = [\"tcp://{here}\"]\nallow = [\"root\", {NOBODY}]\n\
         [target.two]\nendpoints = [\"tcp://{a}.{b}.0.0/16:{port}\"]\nallow = [\"root\"]\n",
    ))?;
    world.apply()?;
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()?;
    let checked = world
        .enforcer(&["check", "--json", "nobody", &here.to_string()])?
        .demand(1)?;
    ensure!(
        checked.stdout.contains(r#""name":"one","admits":true"#),
        "{}",
        checked.stdout
    );
    ensure!(
        checked.stdout.contains(r#""name":"two","admits":false"#),
        "{}",
        checked.stdout
    );
    Ok(())
}

fn d2_prefix_owners_join_exact_owners() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let port = world.port;
    world.configure(&format!(
        "[target.all]\nendpoints = [\"tcp://127.0.0.0/8:{port}\"]\nallow = [\"root\", {NOBODY}]\n\
         [target.some]\nendpoints = [\"tcp://127.64.0.0/10:{port}\"]\nallow = [\"root\"]\n",
    ))?;
    world.apply()?;
    world
        .attack(NOBODY)
        .to(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port))
        .reaches()?;
    world.attack(NOBODY).is_refused()?;
    world.attack(NOBODY).way(Way::Mapped).is_refused()?;
    world.attack(0).reaches()
}

fn d4_d5_ipv6_ways() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let to = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), world.port);
    let ways = [
        Way::Plain,
        Way::Nonblocking,
        Way::FastOpenSendto,
        Way::FastOpenConnect,
        Way::Mptcp,
        Way::IoUring,
        Way::Unspecified6,
    ];
    let can = |way: &Way| cannot(*way).is_none();
    for way in ways.into_iter().filter(can) {
        world.attack(NOBODY).to(to).way(way).reaches()?;
    }
    for way in [Way::UdpConnect, Way::UdpSendto, Way::UdpSendmsg, Way::UdpIoUring] {
        world.attack(NOBODY).to(to).way(way).reaches()?;
    }
    world.configure_one(&[format!("tcp://{to}"), format!("udp://{to}")], r#"["root"]"#)?;
    world.apply()?;
    for way in ways
        .into_iter()
        .chain([Way::UdpConnect, Way::UdpSendto, Way::UdpSendmsg, Way::UdpIoUring])
        .filter(can)
    {
        world.attack(NOBODY).to(to).way(way).is_refused()?;
        world.attack(0).to(to).way(way).reaches()?;
    }
    Ok(())
}

fn d5_bind_to_device() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let attack = world.attack(NOBODY).way(Way::BindToDevice);
    attack.reaches()?;
    world.configure_one(&[endpoint(Way::Plain, &world)], r#"["root"]"#)?;
    world.apply()?;
    // §5: from there it goes to 127.0.0.1, which is no endpoint here.
    attack.succeeds(Backend::current().is_nftables())?;
    world.attack(NOBODY).is_refused()?;
    world.attack(0).way(Way::BindToDevice).reaches()
}

/// Who hears a datagram to a group or to everybody is not known where it is judged.
fn d1_datagrams_to_many_are_judged_by_that_address_alone() -> Result<()> {
    let world = World::new()?;
    let home = Netns::new(&world, "home")?;
    home.ip(&["route", "add", "239.7.0.0/16", "dev", "lo"])?;
    let group = format!("239.7.7.7:{}", world.port);
    let sent = |to: &str| -> Result<Attack> {
        let attack = world.attack(NOBODY).way(Way::UdpSendto).to(to.parse()?);
        Ok(attack.in_netns(&home)?.flag("--no-greeting"))
    };
    let guard = |endpoint: &str| -> Result<()> {
        world.configure_one(&[endpoint.to_owned()], r#"["root"]"#)?;
        home.enforcer(&world, &["apply"])?.demand(0).map(drop)
    };
    sent(&group)?.reaches()?;
    // Every address of this host, which hears them if it has joined.
    guard(&format!("udp://local:{}", world.port))?;
    sent(&group)?.reaches()?;
    guard(&format!("udp://{group}"))?;
    sent(&group)?.is_refused()
}

fn d6_containers_loopback_is_their_own_routable_is_not() -> Result<()> {
    let world = World::new()?;
    let (home, container) = (Netns::new(&world, "home")?, Netns::new(&world, "ctr")?);
    home.join(
        &["10.77.0.1/24", "fd77::1/64"],
        &container,
        &["10.77.0.2/24", "fd77::2/64"],
    )?;
    let _here = Listener::start(Some(&home.file()), world.port, &[])?;
    let _there = Listener::start(Some(&container.file()), world.port, &[])?;
    let port = world.port;
    let to = |address: &str| -> Result<SocketAddr> { Ok(SocketAddr::new(address.parse()?, port)) };
    let from = |netns: &Netns, address: &str| -> Result<Attack> {
        Ok(world
            .attack(NOBODY)
            .to(to(address)?)
            .option("--netns", &netns.file().display().to_string()))
    };
    let routable = [
        (&container, "10.77.0.1"),
        (&container, "fd77::1"),
        (&home, "10.77.0.2"),
        (&home, "fd77::2"),
    ];
    for (netns, address) in routable {
        from(netns, address)?.reaches()?;
    }
    let endpoints = ["127.0.0.1", "[::1]", "10.77.0.1", "[fd77::1]", "10.77.0.2", "[fd77::2]"]
        .map(|host| format!("tcp://{host}:{port}"));
    world.configure_one(&endpoints, r#"["root"]"#)?;
    let nftables = Backend::current().is_nftables();
    // The daemon's namespace is the one that loopback endpoints belong to.
    let daemon = world.daemon_with(&mut home.command(&binary("enforcer")?))?;
    for (netns, address) in routable {
        // §5: what a container sends to this host itself is neither sent from here nor forwarded.
        let arrives = netns.file() == container.file();
        from(netns, address)?.succeeds(nftables && arrives)?;
    }
    for address in ["127.0.0.1", "::1"] {
        from(&home, address)?.is_refused()?;
        if lacks(Feature::NetnsCookie) {
            from(&container, address)?.is_refused()?;
        } else {
            from(&container, address)?.reaches()?;
        }
    }
    from(&home, "10.77.0.1")?.way(Way::Unspecified).is_refused()?;
    // There the unspecified address could be that of a routable endpoint.
    from(&container, "10.77.0.2")?
        .way(Way::Unspecified)
        .succeeds(nftables)?;
    // Without any routable endpoint it is the container's own affair.
    world.configure_one(&[format!("tcp://127.0.0.1:{port}")], r#"["root"]"#)?;
    daemon.reload()?;
    let unspecified = from(&container, "10.77.0.2")?.way(Way::Unspecified);
    if lacks(Feature::NetnsCookie) {
        unspecified.is_refused()?;
    } else {
        unspecified.reaches()?;
    }
    from(&home, "10.77.0.1")?.way(Way::Unspecified).succeeds(nftables)
}

fn d7_local_follows_addresses() -> Result<()> {
    let world = World::new()?;
    let (home, peer) = (Netns::new(&world, "home")?, Netns::new(&world, "peer")?);
    home.join(&["10.78.0.1/24", "fd78::1/64"], &peer, &["10.78.0.2/24", "fd78::2/64"])?;
    let _listener = Listener::start(Some(&home.file()), world.port, &[])?;
    world.configure_one(&[format!("tcp://local:{}", world.port)], r#"["root"]"#)?;
    let from = |netns: &Netns, address: &str| -> Result<Attack> {
        let to = SocketAddr::new(address.parse()?, world.port);
        Ok(world
            .attack(NOBODY)
            .to(to)
            .option("--netns", &netns.file().display().to_string()))
    };
    let addresses = ["127.0.0.1", "127.9.8.7", "::1", "10.78.0.1", "fd78::1"];
    for address in addresses {
        from(&home, address)?.reaches()?;
    }
    let _daemon = world.daemon_with(&mut home.command(&binary("enforcer")?))?;
    for address in addresses {
        from(&home, address)?.is_refused()?;
    }
    from(&peer, "10.78.0.1")?.succeeds(Backend::current().is_nftables())?;
    home.ip(&["address", "add", "10.78.0.99/24", "dev", "veth0"])?;
    crate::world::until("the new address is protected", || {
        Ok(from(&home, "10.78.0.99")?.run()?.errno == Some(Backend::current().errno()))
    })?;
    home.ip(&["address", "delete", "10.78.0.99/24", "dev", "veth0"])?;
    let gone = format!("10.78.0.99:{}", world.port);
    crate::world::until("the old address is let go", || {
        Ok(home.enforcer(&world, &["check", "nobody", &gone])?.code == 0)
    })
}

fn principal_within_cgroup() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let child = world.cgroup.join("child");
    fs::create_dir(&child)?;
    let path = PathBuf::from("/").join(child.strip_prefix(cgroup_mount()?)?);
    let allow = format!(
        "[\"root\", {{ user = {NOBODY}, cgroup = {:?} }}]",
        path.display().to_string()
    );
    world.configure_one(
        &[endpoint(Way::Plain, &world), endpoint(Way::UdpSendto, &world)],
        &allow,
    )?;
    let _daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    let inside = world.attack(NOBODY).in_cgroup(&child);
    inside.reaches()?;
    inside.clone().way(Way::UdpSendto).reaches()?;
    inside.clone().who(Who::SocketOfRoot).reaches()?;
    world.attack(1).in_cgroup(&child).is_refused()?;
    fs::remove_dir(&child)?;
    fs::create_dir(&child)?;
    crate::world::until("the cgroup made again is followed", || {
        Ok(inside.run()?.errno.is_none())
    })?;
    world.attack(NOBODY).is_refused()
}

fn principal_kernel_admits_no_user() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.configure_one(&[endpoint(Way::Plain, &world)], "[{ kernel = true }]")?;
    world.apply()?;
    world.attack(0).is_refused()?;
    world.attack(0).way(Way::IoUringSqpoll).is_refused()?;
    world
        .enforcer(&["check", "--kernel", "root", &world.here().to_string()])?
        .demand(0)?;
    // A thread of the kernel's that carries a user's call. nftables takes every socket without a file for the kernel's
    // (§5).
    let to = world.here().to_string();
    let carried = world.enforcer(&["check", "--kernel", "--socket-user", "nobody", &to])?;
    carried.demand(i32::from(!Backend::current().is_nftables()))?;
    world.enforcer(&["check", "root", &to])?.demand(1).map(drop)
}

fn audit_refuses_nothing() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let here = world.here();
    world.configure(&format!(
        "mode = \"audit\"\n[target.main]\nendpoints = [\"tcp://{here}\"]\nallow = [\"root\"]\n"
    ))?;
    let _daemon = world.daemon()?;
    world.attack(NOBODY).reaches()?;
    world.enforcer(&["check", "nobody", &here.to_string()])?.demand(1)?;
    crate::world::until("the event is there", || {
        Ok(world
            .enforcer(&["events", "--json"])?
            .demand(0)?
            .stdout
            .contains(r#""verdict":"would-deny""#))
    })?;
    let status = world.status()?;
    ensure!(
        status["state"] == "audit" && status["targets"][0]["would_deny"] == 1,
        "{status}"
    );
    Ok(())
}
