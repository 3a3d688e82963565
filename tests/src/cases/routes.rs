//! D7: `local` is what the kernel delivers here, be it an interface's address or not: prefixes on `lo`, local routes,
//! anycast.

use std::{net::SocketAddr, path::Path};

use anyhow::{Result, ensure};

use super::{Case, case};
use crate::{
    attack::Way,
    backend::{ALL, EBPF},
    world::{Attack, Listener, NOBODY, Netns, World, binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = KINDS
        .iter()
        .map(|kind| case(&format!("d7_local_{}", kind.name), move || one(kind)).on(ALL))
        .collect();
    cases.push(case!(d7_local_routes_of_other_tables).on(ALL));
    cases.push(case!(d7_a_route_to_elsewhere_is_not_local).on(ALL));
    cases.push(case!(d7_a_transparent_proxys_table_is_not_local));
    cases.push(case!(d7_a_full_table_of_another_routing_table_wakes_nobody));
    // What is listed is the same whatever enforces.
    cases.push(case!(f7_more_local_routes_than_the_maximum).on(EBPF));
    cases
}

/// A way of making an address local.
struct Kind {
    name: &'static str,
    /// Arguments of `ip` that make it so, and undo it.
    add: &'static [&'static str],
    delete: &'static [&'static str],
    /// Delivered here then, but no interface's.
    address: &'static str,
    way: Way,
}

const KINDS: [Kind; 4] = [
    Kind {
        name: "prefix_on_lo",
        add: &["address", "add", "10.201.1.1/24", "dev", "lo"],
        delete: &["address", "delete", "10.201.1.1/24", "dev", "lo"],
        address: "10.201.1.77",
        way: Way::Plain,
    },
    Kind {
        name: "route",
        add: &["route", "add", "local", "10.202.0.0/16", "dev", "lo"],
        delete: &["route", "delete", "local", "10.202.0.0/16", "dev", "lo"],
        address: "10.202.3.4",
        way: Way::Plain,
    },
    Kind {
        name: "ipv6_route",
        add: &["-6", "route", "add", "local", "fd79::/64", "dev", "lo"],
        delete: &["-6", "route", "delete", "local", "fd79::/64", "dev", "lo"],
        address: "fd79::77",
        way: Way::Plain,
    },
    Kind {
        name: "anycast",
        // Of a router, which answers by its subnets' first addresses (RFC 4291, 2.6.1).
        add: &["-6", "address", "add", "fd80::1/64", "dev", "elsewhere", "nodad"],
        delete: &["-6", "address", "delete", "fd80::1/64", "dev", "elsewhere"],
        address: "fd80::",
        // The kernel takes no TCP by an anycast address.
        way: Way::UdpSendto,
    },
];

/// A namespace in which a daemon is to run, with a service on every address.
struct Home {
    world: World,
    netns: Netns,
    _listener: Listener,
}

impl Home {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let netns = Netns::new(&world, "home")?;
        // Whatever is asked of table 77 is asked of every packet.
        netns.ip(&["rule", "add", "priority", "100", "table", "77"])?;
        netns.ip(&["link", "add", "elsewhere", "type", "veth", "peer", "name", "beyond"])?;
        netns.ip(&["address", "add", "10.79.0.1/24", "dev", "elsewhere"])?;
        netns.ip(&["link", "set", "elsewhere", "up"])?;
        netns.ip(&["link", "set", "beyond", "up"])?;
        for name in ["conf/all/forwarding", "ip_nonlocal_bind"] {
            let set = format!("echo 1 > /proc/sys/net/ipv6/{name}");
            ran(netns.command(Path::new("sh")).args(["-c", &set]))?.demand(0)?;
        }
        let udp: Vec<_> = KINDS.iter().filter(|kind| kind.way.is_udp()).collect();
        for kind in &udp {
            netns.ip(kind.add)?;
        }
        let at = udp
            .iter()
            .map(|kind| kind.address.parse())
            .collect::<Result<Vec<_>, _>>()?;
        let listener = Listener::start(Some(&netns.file()), world.port, &at)?;
        for kind in &udp {
            netns.ip(kind.delete)?;
        }
        let protocols = ["tcp", "udp"].map(|protocol| format!("{protocol}://local:{}", world.port));
        world.configure_one(&protocols, r#"["root"]"#)?;
        Ok(Self {
            _listener: listener,
            world,
            netns,
        })
    }

    fn attack(&self, uid: u32, way: Way, address: &str) -> Result<Attack> {
        let to = SocketAddr::new(address.parse()?, self.world.port);
        let netns = self.netns.file().display().to_string();
        Ok(self.world.attack(uid).way(way).to(to).option("--netns", &netns))
    }

    fn daemon(&self) -> Result<crate::world::Daemon> {
        self.world.daemon_with(&mut self.netns.command(&binary("enforcer")?))
    }

    fn check(&self, address: &str) -> Result<i32> {
        let to = SocketAddr::new(address.parse()?, self.world.port).to_string();
        Ok(self.netns.enforcer(&self.world, &["check", "nobody", &to])?.code)
    }
}

/// There before the daemon, and removed and added while it runs.
fn one(kind: &'static Kind) -> Result<()> {
    let home = Home::new()?;
    home.netns.ip(kind.add)?;
    let attack = home.attack(NOBODY, kind.way, kind.address)?;
    // The kernel joins an anycast address a moment after the address that it belongs to.
    until("it is local", || Ok(attack.run()?.errno.is_none()))?;
    let _daemon = home.daemon()?;
    attack.is_refused()?;
    home.attack(0, kind.way, kind.address)?.reaches()?;
    home.netns.ip(kind.delete)?;
    until("what is local no longer is let go", || {
        Ok(home.check(kind.address)? == 0)
    })?;
    home.netns.ip(kind.add)?;
    until("what is local again is protected", || Ok(attack.run()?.errno.is_some()))?;
    home.netns.enforcer(&home.world, &["verify"])?.demand(0).map(drop)
}

/// Packets that come by such a route are delivered here, though the kernel sends none from its addresses but for
/// transparent sockets and VRFs: the kernel's own word is the control.
fn d7_local_routes_of_other_tables() -> Result<()> {
    let home = Home::new()?;
    let _daemon = home.daemon()?;
    for (table, net, address) in [
        ("main", "10.203.0.0/16", "10.203.3.4"),
        ("77", "10.204.0.0/16", "10.204.3.4"),
    ] {
        let route = |verb| {
            home.netns
                .ip(&["route", verb, "local", net, "dev", "lo", "table", table])
        };
        ensure!(home.check(address)? == 0, "{address} is taken for local");
        route("add")?;
        let mut ip = home.netns.command(Path::new("ip"));
        let told = ran(ip.args(["route", "get", address]))?.demand(0)?.stdout;
        ensure!(
            told.starts_with("local "),
            "{address} is not local, this proves nothing: {told}"
        );
        until("the route is followed", || Ok(home.check(address)? == 1))?;
        route("delete")?;
        until("what is local no longer is let go", || Ok(home.check(address)? == 0))?;
    }
    Ok(())
}

/// A prefix of an interface is not local, nor is a route that leads away.
fn d7_a_route_to_elsewhere_is_not_local() -> Result<()> {
    let home = Home::new()?;
    home.netns.ip(&["route", "add", "10.205.0.0/16", "dev", "elsewhere"])?;
    home.netns
        .ip(&["-6", "address", "add", "fd81::1/64", "dev", "lo", "nodad"])?;
    let _daemon = home.daemon()?;
    for address in ["10.79.0.77", "10.205.0.1", "10.79.0.255", "fd81::2"] {
        ensure!(home.check(address)? == 0, "{address} is taken for local");
    }
    for address in ["10.79.0.1", "127.9.9.9", "::1", "fd81::1"] {
        ensure!(home.check(address)? == 1, "{address} is not");
    }
    Ok(())
}

/// The whole address space is local to what a rule with a mark leads there, which takes a capability.
fn d7_a_transparent_proxys_table_is_not_local() -> Result<()> {
    let home = Home::new()?;
    home.netns.ip(&["rule", "add", "fwmark", "1", "table", "100"])?;
    home.netns
        .ip(&["route", "add", "local", "0.0.0.0/0", "dev", "lo", "table", "100"])?;
    let _daemon = home.daemon()?;
    ensure!(home.check("192.0.2.1")? == 0, "every address is taken for local");
    ensure!(home.check("10.79.0.1")? == 1, "what is local is not");
    Ok(())
}

/// Many routes in a short time, by one process.
fn batch(home: &Home, routes: impl Iterator<Item = String>) -> Result<()> {
    let file = home.world.path("batch");
    std::fs::write(&file, routes.collect::<Vec<_>>().join("\n"))?;
    let mut ip = home.netns.command(Path::new("ip"));
    ran(ip.arg("-batch").arg(&file))?.demand(0).map(drop)
}

/// Processor time that a process has used, in ticks (proc(5), stat fields 14 and 15).
fn ticks(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(')').unwrap_or_default();
    let fields = rest.split_whitespace().skip(11).take(2);
    Ok(fields.filter_map(|field| field.parse::<u64>().ok()).sum())
}

fn d7_a_full_table_of_another_routing_table_wakes_nobody() -> Result<()> {
    let home = Home::new()?;
    let daemon = home.daemon()?;
    let routes = |verb| {
        let nets = (0..20_000_u32).map(|net| std::net::Ipv4Addr::from(0x1400_0000 + (net << 8)));
        nets.map(move |net| format!("route {verb} {net}/24 dev elsewhere table 88"))
    };
    let before = ticks(daemon.pid())?;
    for verb in ["add", "delete", "add"] {
        batch(&home, routes(verb))?;
    }
    let spent = ticks(daemon.pid())? - before;
    // 60,000 changes; a list of all for each hundred of them would take some seconds.
    ensure!(spent < 50, "{spent} hundredths of a second of processor time");
    home.netns
        .ip(&["route", "add", "local", "10.202.0.0/16", "dev", "lo"])?;
    until(
        "a local route among them is seen",
        || Ok(home.check("10.202.3.4")? == 1),
    )
}

fn f7_more_local_routes_than_the_maximum() -> Result<()> {
    let home = Home::new()?;
    let _daemon = home.daemon()?;
    let routes = |count: u32, verb| {
        let nets = (0..count).map(|net| std::net::Ipv4Addr::from(0x1400_0000 + net));
        nets.map(move |net| format!("route {verb} local {net}/32 dev lo"))
    };
    batch(&home, routes(65_600, "add"))?;
    let state = || -> Result<String> { Ok(home.netns.enforcer(&home.world, &["status", "--json"])?.stdout) };
    until("the limit is named", || {
        let status = state()?;
        Ok(status.contains("\"degraded\"") && status.contains("65536 local routes"))
    })?;
    ensure!(home.check("127.0.0.1")? == 1, "what was active is not");
    // What was known stays, and all is well again once there are fewer.
    batch(&home, routes(65_600, "delete"))?;
    until("fewer are followed again", || Ok(state()?.contains("\"enforcing\"")))
}
