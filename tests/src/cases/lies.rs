//! N4 against a resolver that lies: what was true for long stays protected for `retain`, whatever is answered instead.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::Case;
use crate::{
    dns::{DnsServer, Zone},
    world::{Attack, Daemon, Listener, NOBODY, Netns, World, binary, until},
};

/// Where the service is in truth: no address of loopback, which no DNS answer may name.
const TRUTH: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
const NAME: &str = "bus.test";

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(n4_one_lie_of_256_addresses_opens_nothing),
        case!(n4_eight_lies_of_40_addresses_open_nothing),
        case!(n4_n7_lies_after_a_restart_open_nothing),
        case!(n4_an_answer_too_large_keeps_what_is_known_and_degrades),
        case!(n4_a_shorter_retain_ends_what_a_lie_locks_out),
    ]
}

/// A service in a network namespace, and the name server that is asked for it.
struct Named {
    world: World,
    netns: Netns,
    dns: DnsServer,
    _listener: Listener,
}

impl Named {
    /// A service whose name has told the truth for some answers; what is refused now could be reached before.
    fn known_for_a_while() -> Result<(Self, Daemon)> {
        let world = World::new()?;
        let netns = Netns::new(&world, "home")?;
        netns.ip(&["address", "add", &format!("{TRUTH}/32"), "dev", "lo"])?;
        let dns = DnsServer::start(Some(&netns.file()), TRUTH.into())?;
        fs::write(
            world.path("resolv.conf"),
            format!("nameserver {TRUTH}\noptions timeout:1 attempts:1\n"),
        )?;
        world.configure(&format!(
            "[dns]\nmin_refresh = \"1s\"\nmax_refresh = \"2s\"\n\
             [target.bus]\nendpoints = [\"tcp://{NAME}:{}\"]\nallow = [\"root\"]\n",
            world.port
        ))?;
        let named = Self {
            _listener: Listener::start(Some(&netns.file()), world.port, &[])?,
            world,
            netns,
            dns,
        };
        named.answer(vec![TRUTH.into()]);
        named.attack(NOBODY).reaches()?;
        let daemon = named.daemon()?;
        named.attack(NOBODY).is_refused()?;
        // Longer than any lie is answered.
        thread::sleep(Duration::from_secs(6));
        Ok((named, daemon))
    }

    fn daemon(&self) -> Result<Daemon> {
        self.world
            .daemon_with(&mut self.world.with_resolver_in(&self.netns, &binary("enforcer")?))
    }

    fn attack(&self, uid: u32) -> Attack {
        let netns = self.netns.file().display().to_string();
        let to = SocketAddr::new(TRUTH.into(), self.world.port);
        self.world.attack(uid).to(to).option("--netns", &netns)
    }

    fn answer(&self, addresses: Vec<IpAddr>) {
        self.dns.set(NAME, Zone::Addresses(addresses));
    }

    /// Answers with so many addresses from 10.`second`.0.0 on, and sees to it that the daemon has taken them.
    fn lie(&self, second: u8, count: u32) -> Result<()> {
        let first = u32::from(Ipv4Addr::new(10, second, 0, 0));
        let lies = first..first + count;
        self.answer(lies.map(|address| Ipv4Addr::from(address).into()).collect());
        self.netns.enforcer(&self.world, &["refresh"])?;
        ensure!(self.check(second)? == 1, "the lie was not taken: this proves nothing");
        Ok(())
    }

    /// What becomes of an attempt on the first address of a lie.
    fn check(&self, second: u8) -> Result<i32> {
        self.check_of("nobody", second, self.world.port)
    }

    fn check_of(&self, user: &str, second: u8, port: u16) -> Result<i32> {
        let to = format!("10.{second}.0.0:{port}");
        Ok(self.netns.enforcer(&self.world, &["check", user, &to])?.code)
    }

    fn status(&self) -> Result<Value> {
        let status = self.netns.enforcer(&self.world, &["status", "--json"])?;
        Ok(serde_json::from_str(&status.stdout)?)
    }
}

fn n4_one_lie_of_256_addresses_opens_nothing() -> Result<()> {
    let (named, _daemon) = Named::known_for_a_while()?;
    // Each pushes the one before among the retained ones.
    for second in [20, 21, 22] {
        named.lie(second, 256)?;
        named.attack(NOBODY).is_refused()?;
    }
    named.attack(0).reaches()
}

fn n4_eight_lies_of_40_addresses_open_nothing() -> Result<()> {
    let (named, _daemon) = Named::known_for_a_while()?;
    for second in 20..36 {
        named.lie(second, 40)?;
    }
    named.attack(NOBODY).is_refused()
}

fn n4_n7_lies_after_a_restart_open_nothing() -> Result<()> {
    let (named, daemon) = Named::known_for_a_while()?;
    named.lie(20, 256)?;
    daemon.kill()?;
    let _daemon = named.daemon()?;
    for second in [21, 22, 23] {
        named.lie(second, 256)?;
    }
    named.attack(NOBODY).is_refused()
}

/// The address of another service, which a lie has named.
fn n4_a_shorter_retain_ends_what_a_lie_locks_out() -> Result<()> {
    let (named, daemon) = Named::known_for_a_while()?;
    named.lie(20, 1)?;
    // On the target's port alone, and not for those who are allowed there.
    ensure!(named.check(20)? == 1, "the lie is no endpoint");
    ensure!(named.check_of("nobody", 20, named.world.port + 1)? == 0, "another port");
    ensure!(named.check_of("root", 20, named.world.port)? == 0, "an allowed user");
    named.answer(vec![TRUTH.into()]);
    named.netns.enforcer(&named.world, &["refresh"])?;
    ensure!(named.check(20)? == 1, "not retained");
    let toml = named.world.path("enforcer.toml");
    let text = fs::read_to_string(&toml)?;
    fs::write(&toml, text.replace("[dns]", "[dns]\nretain = \"1s\""))?;
    daemon.reload()?;
    until("the lie is let go", || Ok(named.check(20)? == 0))?;
    named.attack(NOBODY).is_refused()
}

fn n4_an_answer_too_large_keeps_what_is_known_and_degrades() -> Result<()> {
    let (named, _daemon) = Named::known_for_a_while()?;
    // Before the truth by any order of addresses.
    let first = u32::from(Ipv4Addr::new(1, 0, 0, 0));
    let lies = first..first + 300;
    let lies = lies.map(|address| IpAddr::V4(Ipv4Addr::from(address)));
    named.answer(lies.chain([TRUTH.into()]).collect());
    named.netns.enforcer(&named.world, &["refresh"])?;
    named.attack(NOBODY).is_refused()?;
    let status = named.status()?;
    ensure!(
        status["state"] == "degraded"
            && status["names"][0]["cut"] == 45
            && status["causes"].to_string().contains("maximum of 256"),
        "{status}"
    );
    named.answer(vec![TRUTH.into()]);
    named.netns.enforcer(&named.world, &["refresh"])?;
    until("the cut is over", || Ok(named.status()?["state"] == "enforcing"))?;
    named.attack(NOBODY).is_refused()
}
