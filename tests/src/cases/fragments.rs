//! §5: packets that a container cuts or dresses so that a rule finds nothing to judge by, and those that are merely
//! large.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum as _;

use super::{Case, nftables::Guarded};
use crate::{
    attack::{Cut, Way},
    backend::{Backend, PACKETS},
    world::{Attack, Listener, NOBODY, Netns, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(s5_pieces_of_a_connection_do_not_pass).on(PACKETS),
        case!(s5_pieces_do_not_reach_loopback).on(PACKETS),
        case!(s5_what_is_merely_large_passes).on(PACKETS),
    ]
}

pub(super) const SERVER: &str = "10.53.0.2";
const SERVER6: &str = "fd53::2";
/// Another server, which is no endpoint.
pub(super) const OTHER: &str = "10.53.0.3";
const OTHER6: &str = "fd53::3";

/// A container and a server, and this host between them, which forwards and translates nothing: where a host tracks
/// connections, its kernel puts packets together before any rule sees them.
pub(super) struct Routed {
    pub(super) guarded: Guarded,
    pub(super) container: Netns,
    server: Netns,
    _listeners: [Listener; 2],
}

impl Routed {
    pub(super) fn new() -> Result<Self> {
        let guarded = Guarded::new()?;
        let (world, host) = (&guarded.world, &guarded.netns);
        let (container, server) = (Netns::new(world, "c")?, Netns::new(world, "s")?);
        container.join(&["10.52.0.2/24", "fd52::2/64"], host, &["10.52.0.1/24", "fd52::1/64"])?;
        host.ip(&["link", "set", "veth0", "down"])?;
        host.ip(&["link", "set", "veth0", "name", "inside"])?;
        host.ip(&["link", "set", "inside", "up"])?;
        host.ip(&["address", "add", "fd52::1/64", "dev", "inside", "nodad"])?;
        let addresses = ["10.53.0.2/24", "10.53.0.3/24", "fd53::2/64", "fd53::3/64"];
        server.join(&addresses, host, &["10.53.0.1/24", "fd53::1/64"])?;
        for (netns, via) in [
            (&container, ["10.52.0.1", "fd52::1"]),
            (&server, ["10.53.0.1", "fd53::1"]),
        ] {
            for via in via {
                netns.ip(&["route", "add", "default", "via", via])?;
            }
        }
        // The container's root may send its own loopback's addresses elsewhere.
        container.ip(&["address", "flush", "dev", "lo"])?;
        let here = world.address().to_string();
        let via = ["via", "10.52.0.1", "dev", "veth0", "src", "10.52.0.2"];
        container.ip(&[&["route", "add", &here][..], &via].concat())?;
        for netns in [host, &container] {
            for setting in [
                "ipv4/ip_forward",
                "ipv6/conf/all/forwarding",
                "ipv4/conf/all/route_localnet",
            ] {
                let script = format!("echo 1 > /proc/sys/net/{setting}");
                ran(netns.command(Path::new("sh")).args(["-c", &script]))?
                    .demand(0)
                    .context(setting.to_owned())?;
            }
        }
        for netns in [host, &server] {
            watch(netns)?;
        }
        let udp = [SERVER, SERVER6, OTHER, OTHER6].map(str::parse::<IpAddr>);
        let udp = udp.into_iter().collect::<Result<Vec<_>, _>>()?;
        let listen = |port| Listener::start(Some(&server.file()), port, &udp);
        let listeners = [listen(world.port)?, listen(world.port + 1)?];
        let routed = Self {
            guarded,
            container,
            server,
            _listeners: listeners,
        };
        // Neighbours find each other first: packets made by hand wait for nobody. A busy kernel may give one up before
        // it answers.
        for address in [SERVER, SERVER6, OTHER, OTHER6] {
            let attack = routed.attack(address, 0)?;
            until("neighbours find each other", || Ok(attack.run()?.errno.is_none()))?;
            attack.reaches()?;
        }
        Ok(routed)
    }

    fn attack(&self, address: &str, more: u16) -> Result<Attack> {
        let world = &self.guarded.world;
        let to = SocketAddr::new(address.parse()?, world.port + more);
        world.attack(0).anywhere().to(to).in_netns(&self.container)
    }

    fn cut(&self, address: &str, cut: Cut) -> Result<Attack> {
        let name = cut.to_possible_value().context("every cut has a name")?;
        Ok(self
            .attack(address, 0)?
            .way(Way::RawSyn)
            .option("--cut", name.get_name()))
    }

    /// Endpoints in these words, for root only.
    fn guard(&self, top: &str, endpoints: &[String]) -> Result<()> {
        let backend = Backend::current().configured();
        self.guarded.world.configure(&format!(
            "{top}\nbackend = {backend:?}\n[target.main]\nendpoints = {endpoints:?}\nallow = [\"root\"]\n"
        ))?;
        self.guarded.apply()
    }

    fn endpoints(&self, protocol: &str) -> Vec<String> {
        let port = self.guarded.world.port;
        vec![
            format!("{protocol}://{SERVER}:{port}"),
            format!("{protocol}://[{SERVER6}]:{port}"),
            format!("{protocol}://{}:{port}", self.guarded.world.address()),
        ]
    }

    fn unload(&self) -> Result<()> {
        self.guarded
            .netns
            .enforcer(&self.guarded.world, &["unload"])?
            .demand(0)
            .map(drop)
    }

    /// What the table has refused as it could not be read.
    fn refused(&self) -> Result<u64> {
        let table = self.guarded.world.name();
        counted(&self.guarded.netns, &format!("inet {table} unreadable"))
    }
}

/// Counts pieces that could carry what decides, before anything else in a namespace sees them.
fn watch(netns: &Netns) -> Result<()> {
    netns.nft("add table inet watch")?;
    netns.nft("add counter inet watch pieces")?;
    netns.nft("add chain inet watch early { type filter hook prerouting priority -500; }")?;
    for pieces in [
        "ip saddr 10.52.0.2 ip frag-off & 0x3fff != 0 ip frag-off & 0x1ffe == 0",
        "ip6 saddr fd52::2 exthdr frag exists",
    ] {
        netns.nft(&format!("add rule inet watch early {pieces} counter name pieces"))?;
    }
    Ok(())
}

fn counted(netns: &Netns, counter: &str) -> Result<u64> {
    let listed = netns.nft(&format!("list counter {counter}"))?;
    let mut words = listed.split_whitespace().skip_while(|word| *word != "packets");
    let number = words.nth(1).with_context(|| listed.clone())?;
    Ok(number.parse()?)
}

/// What is sent where, and whether this kernel, as the receiver, puts it together: others do.
const CUTS: [(&str, Cut, bool); 10] = [
    (SERVER, Cut::Eights, true),
    (SERVER, Cut::Sixteens, true),
    (SERVER, Cut::Overlap, false),
    (SERVER6, Cut::Eights, false),
    (SERVER6, Cut::Sixteens, false),
    (SERVER6, Cut::BetweenOptions, true),
    (SERVER6, Cut::BehindHopByHop, true),
    (SERVER6, Cut::BeforeSegment, false),
    (SERVER6, Cut::Options, true),
    (SERVER, Cut::Whole, true),
];

fn s5_pieces_of_a_connection_do_not_pass() -> Result<()> {
    let routed = Routed::new()?;
    let arrived = || counted(&routed.server, "inet watch pieces");
    let is_cut = |cut| !matches!(cut, Cut::Options | Cut::Whole);
    let all_pass = || -> Result<()> {
        for (address, cut, together) in CUTS {
            let before = arrived()?;
            let outcome = routed.cut(address, cut)?.run()?;
            ensure!(outcome.errno.is_none() == together, "{cut:?} to {address}: {outcome:?}");
            ensure!(
                arrived()? > before || !is_cut(cut),
                "{cut:?} to {address} does not arrive"
            );
        }
        Ok(())
    };
    all_pass()?;
    routed.guard("", &routed.endpoints("tcp"))?;
    for (address, cut, _) in CUTS {
        let (before, refused) = (arrived()?, routed.refused()?);
        let outcome = routed.cut(address, cut)?.run()?;
        ensure!(outcome.errno.is_some(), "{cut:?} to {address} opens a connection");
        if !is_cut(cut) {
            ensure!(outcome.errno == Some(libc::ECONNREFUSED), "{cut:?}: {outcome:?}");
        } else if (address, cut) != (SERVER, Cut::Sixteens) {
            // All but those whose first piece shows what decides: they are refused as whole ones are.
            ensure!(routed.refused()? > refused, "{cut:?} to {address} is not counted");
        }
        // The first piece of an overlap shows that it opens nothing; the one that would lie over it is missing.
        let harmless = u64::from(cut == Cut::Overlap);
        ensure!(arrived()? == before + harmless, "pieces of {cut:?} to {address} arrive");
    }
    // Pieces for the other server are none of ours.
    for (address, cut) in [(OTHER, Cut::Eights), (OTHER6, Cut::BetweenOptions)] {
        routed.cut(address, cut)?.reaches()?;
    }
    routed.guard("mode = \"audit\"", &routed.endpoints("tcp"))?;
    let refused = routed.refused()?;
    all_pass()?;
    ensure!(routed.refused()? > refused, "what would be refused is not counted");
    routed.guard("forward = \"allow\"", &routed.endpoints("tcp"))?;
    all_pass()?;
    routed.unload()
}

/// To this host's own loopback, where `route_localnet` lets it in.
fn s5_pieces_do_not_reach_loopback() -> Result<()> {
    let routed = Routed::new()?;
    let here = routed.guarded.world.address().to_string();
    let attacks = [Cut::Whole, Cut::Eights, Cut::Sixteens].map(|cut| routed.cut(&here, cut));
    let attacks = attacks.into_iter().collect::<Result<Vec<_>>>()?;
    attacks.iter().try_for_each(Attack::reaches)?;
    for forward in ["refuse", "allow"] {
        routed.guard(&format!("forward = {forward:?}"), &routed.endpoints("tcp"))?;
        for attack in &attacks {
            let outcome = attack.run()?;
            ensure!(outcome.errno.is_some(), "{attack:?} opens a connection");
        }
        ensure!(routed.refused()? > 0, "nothing is counted");
        routed.guarded.attack(0)?.reaches()?;
        routed
            .guarded
            .attack(NOBODY)?
            .run()?
            .errno
            .context("nobody is let in")?;
    }
    // Where no endpoint is a loopback address nothing looks at what arrives; where one is again, everything does.
    let table = format!("inet {}", routed.guarded.world.name());
    let looks = || {
        Ok::<_, anyhow::Error>(
            routed
                .guarded
                .netns
                .nft(&format!("list table {table}"))?
                .contains("hook prerouting"),
        )
    };
    ensure!(looks()?, "nothing looks at what arrives");
    let endpoints = routed.endpoints("tcp");
    let (elsewhere, here) = endpoints.split_at(2);
    routed.guard("", elsewhere)?;
    ensure!(!looks()?, "something looks at what arrives for nothing");
    attacks.iter().try_for_each(Attack::reaches)?;
    routed.guard("", here)?;
    ensure!(looks()?, "nothing looks at what arrives");
    for attack in &attacks {
        let outcome = attack.run()?;
        ensure!(outcome.errno.is_some(), "{attack:?} opens a connection");
    }
    routed.unload()?;
    attacks.iter().try_for_each(Attack::reaches)
}

/// Datagrams of several packets, and connections to other ports.
fn s5_what_is_merely_large_passes() -> Result<()> {
    let routed = Routed::new()?;
    let datagrams = |addresses: &[&str], more| -> Result<Vec<Attack>> {
        let attack = |address: &&str| Ok(routed.attack(address, more)?.way(Way::UdpLarge));
        addresses.iter().map(attack).collect()
    };
    let connections = [SERVER, SERVER6]
        .map(|address| routed.attack(address, 1))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let elsewhere = datagrams(&[OTHER, OTHER6], 0)?;
    let other_port = datagrams(&[SERVER, SERVER6], 1)?;
    let endpoint = datagrams(&[SERVER, SERVER6], 0)?;
    let pass = |attacks: &[Attack]| attacks.iter().try_for_each(Attack::reaches);
    let all = [&elsewhere, &other_port, &endpoint];
    all.into_iter().try_for_each(|attacks| pass(attacks))?;
    // With targets of TCP alone no datagram is anything to us.
    routed.guard("", &routed.endpoints("tcp"))?;
    all.into_iter().try_for_each(|attacks| pass(attacks))?;
    pass(&connections)?;
    routed.guard("", &routed.endpoints("udp"))?;
    pass(&elsewhere)?;
    pass(&other_port)?;
    pass(&connections)?;
    for attack in &endpoint {
        ensure!(attack.run()?.errno.is_some(), "{attack:?} reaches the endpoint");
    }
    ensure!(routed.refused()? == 0, "something was refused that can be read");
    routed.unload()?;
    pass(&endpoint)
}
