//! D4: an IPv4 endpoint as a NAT64 reaches it. A listener has the translated addresses itself, here where the network
//! would translate them: what is judged is the address that is dialled.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Result, ensure};

use super::Case;
use crate::{
    attack::Way,
    backend::{ALL, Backend},
    world::{Attack, Listener, NOBODY, Netns, World, binary, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(d4_a_nat64_is_no_way_around).on(ALL),
        case!(d4_an_endpoint_within_a_nat64_prefix_is_its_ipv4_address).on(ALL),
        case!(d4_prefixes_of_nat64_that_make_no_sense_are_refused).on(ALL),
    ]
}

const WELL_KNOWN: Ipv6Addr = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0);
const OWN: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x64, 0, 0, 0, 0, 0);
const SINGLE: Ipv4Addr = Ipv4Addr::new(10, 79, 9, 1);
const IN_A_RANGE: Ipv4Addr = Ipv4Addr::new(10, 79, 10, 7);
const NO_ENDPOINT: Ipv4Addr = Ipv4Addr::new(10, 79, 9, 2);

fn by(prefix: Ipv6Addr, address: Ipv4Addr) -> IpAddr {
    Ipv6Addr::from_bits(prefix.to_bits() | u128::from(address.to_bits())).into()
}

/// A network namespace in which all of it is local.
struct Translating {
    world: World,
    netns: Netns,
    _listener: Listener,
}

impl Translating {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let netns = Netns::new(&world, "nat64")?;
        for net in ["64:ff9b::/96", "2001:db8:64::/96", "10.79.0.0/16"] {
            let family = if net.contains(':') { "-6" } else { "-4" };
            netns.ip(&[family, "route", "add", "local", net, "dev", "lo"])?;
        }
        let mut all = Vec::new();
        for address in [SINGLE, IN_A_RANGE, NO_ENDPOINT] {
            all.extend([address.into(), by(WELL_KNOWN, address), by(OWN, address)]);
            // An address to send from: the kernel takes none from a local route.
            for prefix in [WELL_KNOWN, OWN] {
                let address = format!("{}/128", by(prefix, address));
                netns.ip(&["-6", "address", "add", &address, "dev", "lo", "nodad"])?;
            }
        }
        let listener = Listener::start(Some(&netns.file()), world.port, &all)?;
        Ok(Self {
            world,
            netns,
            _listener: listener,
        })
    }

    fn configure(&self, nat64: &str, endpoints: &[String]) -> Result<()> {
        self.world.configure(&format!(
            "backend = {:?}\nnat64 = {nat64}\n[target.main]\nendpoints = {endpoints:?}\nallow = [\"root\"]\n",
            Backend::current().configured()
        ))
    }

    fn apply(&self) -> Result<()> {
        self.netns.enforcer(&self.world, &["apply"])?.demand(0).map(drop)
    }

    fn attack(&self, uid: u32, to: IpAddr, way: Way) -> Result<Attack> {
        let to = SocketAddr::new(to, self.world.port);
        self.world.attack(uid).to(to).way(way).in_netns(&self.netns)
    }

    fn is_reached(&self, to: IpAddr) -> Result<()> {
        let ways = [Way::Plain, Way::UdpConnect, Way::UdpSendmsg];
        ways.into_iter()
            .try_for_each(|way| self.attack(NOBODY, to, way)?.reaches())
    }

    /// What `check` says must be what the kernel does.
    fn is_denied(&self, to: IpAddr, denied: bool) -> Result<()> {
        for way in [Way::Plain, Way::UdpConnect, Way::UdpSendmsg] {
            self.attack(0, to, way)?.reaches()?;
            let attack = self.attack(NOBODY, to, way)?;
            if denied {
                attack.is_refused()?;
            } else {
                attack.reaches()?;
            }
        }
        let there = SocketAddr::new(to, self.world.port).to_string();
        let checked = self.netns.enforcer(&self.world, &["check", "nobody", &there])?;
        ensure!(checked.code == i32::from(denied), "{to}: {checked:?}");
        Ok(())
    }

    /// TCP and UDP, a single address and a prefix.
    fn endpoints(&self) -> Vec<String> {
        let port = self.world.port;
        let of = |protocol| {
            [
                format!("{protocol}://{SINGLE}:{port}"),
                format!("{protocol}://10.79.10.0/24:{port}"),
            ]
        };
        ["tcp", "udp"].map(of).concat()
    }
}

fn d4_a_nat64_is_no_way_around() -> Result<()> {
    let here = Translating::new()?;
    for prefix in [WELL_KNOWN, OWN] {
        for address in [SINGLE, IN_A_RANGE, NO_ENDPOINT] {
            here.is_reached(by(prefix, address))?;
        }
    }
    here.configure("[]", &here.endpoints())?;
    here.apply()?;
    for address in [SINGLE, IN_A_RANGE] {
        here.is_denied(address.into(), true)?;
        here.is_denied(by(WELL_KNOWN, address), true)?;
        // Nobody has said that it translates.
        here.is_denied(by(OWN, address), false)?;
    }
    here.configure("[\"2001:db8:64::/96\"]", &here.endpoints())?;
    here.apply()?;
    for prefix in [WELL_KNOWN, OWN] {
        for address in [SINGLE, IN_A_RANGE] {
            here.is_denied(by(prefix, address), true)?;
        }
        here.is_denied(by(prefix, NO_ENDPOINT), false)?;
    }
    here.netns.enforcer(&here.world, &["verify"])?.demand(0)?;
    // Of an event the address as dialled and as judged.
    let mut command = here.netns.command(&binary("enforcer")?);
    let daemon = here.world.daemon_with(&mut command)?;
    here.attack(NOBODY, by(OWN, SINGLE), Way::Plain)?.is_refused()?;
    if Backend::current() != Backend::Nftables {
        // The daemon takes the kernel's records when it comes to them.
        until("both addresses are told", || {
            let events = here.netns.enforcer(&here.world, &["events"])?.demand(0)?.stdout;
            Ok(events.contains("2001:db8:64::a4f:901") && events.contains(&format!("= {SINGLE}")))
        })?;
    }
    here.configure("[]", &here.endpoints())?;
    daemon.reload()?;
    here.is_denied(by(OWN, SINGLE), false)?;
    here.is_denied(by(WELL_KNOWN, SINGLE), true)
}

fn d4_an_endpoint_within_a_nat64_prefix_is_its_ipv4_address() -> Result<()> {
    let here = Translating::new()?;
    let port = here.world.port;
    let of = |protocol| {
        [
            format!("{protocol}://[{}]:{port}", by(WELL_KNOWN, SINGLE)),
            format!("{protocol}://[2001:db8:64::a4f:a00]/120:{port}"),
        ]
    };
    here.configure("[\"2001:db8:64::/96\"]", &["tcp", "udp"].map(of).concat())?;
    here.apply()?;
    for address in [SINGLE, IN_A_RANGE] {
        here.is_denied(address.into(), true)?;
        here.is_denied(by(WELL_KNOWN, address), true)?;
        here.is_denied(by(OWN, address), true)?;
    }
    here.is_denied(NO_ENDPOINT.into(), false)
}

fn d4_prefixes_of_nat64_that_make_no_sense_are_refused() -> Result<()> {
    let here = Translating::new()?;
    let four = "[\"2001:db8:1::/96\", \"2001:db8:2::/96\", \"2001:db8:3::/96\", \"2001:db8:4::/96\"]";
    for (nat64, says) in [
        ("[\"64:ff9b::/64\"]", "an IPv6 prefix of 96 bits"),
        ("[\"10.0.0.0/8\"]", "an IPv6 prefix of 96 bits"),
        ("[\"::ffff:0:0/96\"]", "an IPv6 prefix of 96 bits"),
        ("[\"2001:db8::1/96\"]", "an IPv6 prefix of 96 bits"),
        ("[64]", "nat64"),
        ("\"64:ff9b::/96\"", "an array"),
        (four, "the limit is 3"),
    ] {
        here.configure(nat64, &here.endpoints())?;
        let refused = here.netns.enforcer(&here.world, &["apply"])?.demand(2)?.stderr;
        let text = fs::read_to_string(here.world.path("enforcer.toml"))?;
        let before = text.lines().take_while(|line| !line.starts_with("nat64"));
        let place = format!("enforcer.toml:{}: ", before.count() + 1);
        ensure!(refused.contains(says) && refused.contains(&place), "{nat64}: {refused}");
    }
    Ok(())
}
