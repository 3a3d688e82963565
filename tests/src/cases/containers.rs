//! §5: what comes out of a container by veth and NAT, whoever sends it and however it is made: packets that no
//! `connect` of ours precedes.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};

use super::{Case, names::addresses, nftables::Guarded};
use crate::{
    attack::Way,
    backend::{Backend, PACKETS},
    dns::DnsServer,
    world::{Attack, Listener, NOBODY, Netns, binary, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(s5_forwarded_connections_are_refused).on(PACKETS),
        case!(s5_forwarded_connections_may_be_allowed).on(PACKETS),
        case!(n8_a_container_that_dials_is_a_trigger_too).on(PACKETS),
    ]
}

/// Addresses of the host on the container's side, of the container, of the server beyond, and one of nobody that the
/// container translates.
const HOST: &str = "10.50.0.1";
const CONTAINER: &str = "10.50.0.2";
const SERVER: &str = "10.51.0.2";
const SERVER6: &str = "fd51::2";
const NOBODYS: &str = "10.99.0.1";

/// A container and a server with this host between them, which translates what leaves the container.
struct Contained {
    guarded: Guarded,
    container: Netns,
    _server: Netns,
    _listener: Listener,
}

impl Contained {
    fn new() -> Result<Self> {
        let guarded = Guarded::new()?;
        let (world, host) = (&guarded.world, &guarded.netns);
        let (container, server) = (Netns::new(world, "c")?, Netns::new(world, "s")?);
        let endpoint = world.here();
        container.join(&["10.50.0.2/24", "fd50::2/64"], host, &["10.50.0.1/24", "fd50::1/64"])?;
        host.ip(&["link", "set", "veth0", "down"])?;
        host.ip(&["link", "set", "veth0", "name", "inside"])?;
        host.ip(&["link", "set", "inside", "up"])?;
        host.ip(&["address", "add", "fd50::1/64", "dev", "inside", "nodad"])?;
        server.join(&["10.51.0.2/24", "fd51::2/64"], host, &["10.51.0.1/24", "fd51::1/64"])?;
        for (netns, via) in [(&container, [HOST, "fd50::1"]), (&server, ["10.51.0.1", "fd51::1"])] {
            for via in via {
                netns.ip(&["route", "add", "default", "via", via])?;
            }
        }
        // The container's root may send its own loopback's addresses elsewhere.
        container.ip(&["address", "flush", "dev", "lo"])?;
        let via = ["via", HOST, "dev", "veth0", "src", CONTAINER];
        container.ip(&[&["route", "add", &endpoint.ip().to_string()][..], &via].concat())?;
        for (netns, device) in [(host, "inside"), (&container, "veth0")] {
            for setting in [
                "ipv4/ip_forward",
                "ipv6/conf/all/forwarding",
                "ipv4/conf/all/route_localnet",
                &format!("ipv4/conf/{device}/route_localnet"),
            ] {
                netns.set(setting, "1")?;
            }
        }
        let routable = SocketAddr::new(SERVER.parse()?, world.port);
        for (netns, hook, at) in [(host, "prerouting", HOST), (&container, "output", NOBODYS)] {
            netns.nft("add table ip nat")?;
            netns.nft(&format!(
                "add chain ip nat in {{ type nat hook {hook} priority -100; }}"
            ))?;
            for (port, to) in [(1001, routable), (1002, endpoint)] {
                netns.nft(&format!(
                    "add rule ip nat in ip daddr {at} tcp dport {port} dnat to {to}"
                ))?;
            }
        }
        host.nft("add chain ip nat out { type nat hook postrouting priority 100; }")?;
        host.nft(&format!(
            "add rule ip nat out ip saddr {CONTAINER} oifname veth0 masquerade"
        ))?;
        let listener = Listener::start(Some(&server.file()), world.port, &[])?;
        Ok(Self {
            guarded,
            container,
            _server: server,
            _listener: listener,
        })
    }

    /// By its address, by the host's translation and by the container's own.
    fn ways_in(&self) -> Result<Vec<SocketAddr>> {
        let world = &self.guarded.world;
        let at = |address: &str, port| -> Result<_> { Ok(SocketAddr::new(address.parse::<IpAddr>()?, port)) };
        Ok(vec![
            at(SERVER, world.port)?,
            world.here(),
            at(HOST, 1001)?,
            at(HOST, 1002)?,
            at(NOBODYS, 1001)?,
            at(NOBODYS, 1002)?,
        ])
    }

    /// From a cgroup that is not ours, so that eBPF sees none of it: by root and another user, and a SYN made by hand.
    fn attacks(&self) -> Result<Vec<Attack>> {
        let attack = |uid, to| {
            let attack = self.guarded.world.attack(uid).anywhere().to(to);
            attack.in_netns(&self.container)
        };
        let mut attacks = Vec::new();
        for to in self.ways_in()? {
            attacks.extend([attack(0, to)?, attack(NOBODY, to)?, attack(0, to)?.way(Way::RawSyn)]);
        }
        let server6 = SocketAddr::new(SERVER6.parse()?, self.guarded.world.port);
        attacks.extend([attack(0, server6)?, attack(NOBODY, server6)?]);
        Ok(attacks)
    }

    /// Rules for the server and for these addresses of this host.
    fn guard(&self, forward: &str, here: &str) -> Result<()> {
        let world = &self.guarded.world;
        let endpoints = [
            format!("tcp://{SERVER}:{}", world.port),
            format!("tcp://[{SERVER6}]:{}", world.port),
            format!("tcp://{here}:{}", world.port),
        ];
        let backend = Backend::current().configured();
        self.guarded.configure(backend, &endpoints, r#"["root"]"#)?;
        let text = fs::read_to_string(world.path("enforcer.toml"))?;
        fs::write(world.path("enforcer.toml"), format!("forward = {forward:?}\n{text}"))?;
        self.guarded.apply()
    }
}

fn s5_forwarded_connections_are_refused() -> Result<()> {
    let contained = Contained::new()?;
    let attacks = contained.attacks()?;
    attacks.iter().try_for_each(Attack::reaches)?;
    let here = contained.guarded.world.address().to_string();
    contained.guard("refuse", &here)?;
    attacks.iter().try_for_each(Attack::is_reset)?;
    // The host's own root is none of it.
    let guarded = &contained.guarded;
    for to in [SERVER, SERVER6] {
        let to = SocketAddr::new(to.parse()?, guarded.world.port);
        guarded.attack(0)?.to(to).reaches()?;
    }
    guarded.attack(0)?.reaches()?;
    let denied = &guarded.status()?["targets"][0]["denied"];
    ensure!(denied.as_u64() >= Some(attacks.len() as u64), "counted: {denied}");
    guarded.netns.enforcer(&guarded.world, &["unload"])?.demand(0)?;
    attacks.iter().try_for_each(Attack::reaches)
}

/// What is forwarded has no socket here, and its SYN has names looked up all the same.
fn n8_a_container_that_dials_is_a_trigger_too() -> Result<()> {
    const NAME: &str = "bus.test";
    let contained = Contained::new()?;
    let Guarded { world, netns, .. } = &contained.guarded;
    let dns = DnsServer::start(Some(&netns.file()), IpAddr::from([127, 0, 0, 1]))?;
    fs::write(world.path("resolv.conf"), "nameserver 127.0.0.1\n")?;
    dns.set(NAME, addresses(&[NOBODYS]));
    world.configure(&format!(
        "backend = {:?}\n[dns]\nmin_refresh = \"1m\"\nmax_refresh = \"1m\"\n[target.bus]\n\
         endpoints = [\"tcp://{NAME}:{}\"]\n\
         allow = [\"root\"]\n",
        Backend::current().configured(),
        world.port
    ))?;
    let _daemon = world.daemon_with(&mut world.with_resolver_in(netns, &binary("enforcer")?))?;
    let to = SocketAddr::new(SERVER.parse()?, world.port);
    let attack = world.attack(NOBODY).anywhere().to(to).in_netns(&contained.container)?;
    dns.set(NAME, addresses(&[SERVER]));
    attack.reaches()?;
    until("the dial is followed", || Ok(attack.run()?.errno.is_some()))?;
    attack.is_reset()
}

/// With `forward = "allow"` what is forwarded is not judged; what would end at this host's loopback still is.
fn s5_forwarded_connections_may_be_allowed() -> Result<()> {
    let contained = Contained::new()?;
    let world = &contained.guarded.world;
    let here = world.address().to_string();
    // The last one begins before the loopback addresses that it holds.
    for here in [here.as_str(), "127.0.0.0/8", "126.0.0.0/7"] {
        contained.guard("allow", here)?;
        for (number, to) in contained.ways_in()?.into_iter().enumerate() {
            let attack = world.attack(0).anywhere().to(to).in_netns(&contained.container)?;
            if number % 2 == 0 {
                attack.reaches()?;
            } else {
                attack.is_reset().with_context(|| here.to_owned())?;
            }
        }
    }
    Ok(())
}
