//! N8: whoever dials a port of names, at an address that is no endpoint, has the names looked up. Names are looked up
//! once a minute here, so that nothing else follows a move.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use hickory_proto::op::ResponseCode;
use serde_json::Value;

use super::{Case, flood::Use};
use crate::{
    backend::{ALL, Backend},
    dns::{DnsServer, Zone},
    world::{Attack, Daemon, Listener, NOBODY, Netns, World, at_this_load, binary, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(n8_a_dial_after_a_move_has_it_followed_at_once).on(ALL),
        case!(n8_whoever_dials_first_is_cut_once_the_address_is_known).on(ALL),
        case!(n8_a_name_without_an_address_is_looked_up_at_a_dial).on(ALL),
        case!(n8_a_dial_in_the_rest_is_not_forgotten).on(ALL),
        case!(n8_what_a_reload_brings_is_waited_for).on(ALL),
        case!(n8_a_restart_goes_on_waiting).on(ALL),
        case!(n8_ports_without_names_ask_nothing).on(ALL),
        case!(n8_f10_a_flood_of_dials_keeps_nobody_waiting).on(ALL),
    ]
}

const NAME: &str = "bus.test";
const PORT: u16 = 4222;
/// How often the bus moves, each time to an address that it never had.
const MOVES: u8 = 10;
/// A dial is followed in the time of one lookup. This is a good deal longer than that, and less than anything else
/// takes to look a name up again here.
const SOON: Duration = Duration::from_secs(3);

/// A bus that moves, in a network namespace with its name server.
struct Bus {
    world: World,
    netns: Netns,
    dns: DnsServer,
    _listener: Listener,
}

fn server(number: u8) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(10, 79, 8, number), PORT))
}

impl Bus {
    fn new(more: &str) -> Result<Self> {
        let world = World::new()?;
        let netns = Netns::new(&world, "dial")?;
        netns.ip(&["route", "add", "local", "10.79.8.0/24", "dev", "lo"])?;
        let all: Vec<IpAddr> = (0..=MOVES + 2).map(|number| server(number).ip()).collect();
        let listener = Listener::start(Some(&netns.file()), PORT, &all)?;
        let dns = DnsServer::start(Some(&netns.file()), IpAddr::from([127, 0, 0, 1]))?;
        fs::write(
            world.path("resolv.conf"),
            "nameserver 127.0.0.1\noptions timeout:1 attempts:2\n",
        )?;
        let bus = Self {
            world,
            netns,
            dns,
            _listener: listener,
        };
        bus.configure(more)?;
        Ok(bus)
    }

    fn configure(&self, more: &str) -> Result<()> {
        self.world.configure(&format!(
            "backend = {:?}\n{more}\n[dns]\nmin_refresh = \"1m\"\nmax_refresh = \"1m\"\n[target.bus]\n\
             endpoints = [\"nats://{NAME}:{PORT}\"]\n\
             allow = [\"root\"]\n",
            Backend::current().configured()
        ))
    }

    fn is_at(&self, number: u8) {
        self.dns.set(NAME, Zone::Addresses(vec![server(number).ip()]));
    }

    fn daemon(&self) -> Result<Daemon> {
        let mut command = self.world.with_resolver_in(&self.netns, &binary("enforcer")?);
        self.world.daemon_with(&mut command)
    }

    fn attack(&self, uid: u32, number: u8) -> Result<Attack> {
        self.world.attack(uid).to(server(number)).in_netns(&self.netns)
    }

    fn status(&self) -> Result<Value> {
        let ran = self.netns.enforcer(&self.world, &["status", "--json"])?;
        Ok(serde_json::from_str(&ran.stdout)?)
    }

    /// How often dials had names looked up.
    fn lookups(&self) -> Result<u64> {
        let status = self.status()?;
        Ok(status["dials"][0]["lookups"].as_u64().unwrap_or(0))
    }

    /// Waits until a server is protected, and says how long that took.
    fn is_protected_soon(&self, number: u8) -> Result<Duration> {
        let begun = Instant::now();
        let limit = at_this_load(SOON)?;
        let attack = self.attack(NOBODY, number)?;
        // With both backends one comes into force before the other.
        while attack.run()?.errno.is_none() {
            ensure!(
                begun.elapsed() < limit,
                "server {number} is open after {:?}: {}",
                begun.elapsed(),
                self.status()?
            );
        }
        let took = begun.elapsed();
        self.attack(0, number)?.reaches()?;
        until("it is refused as it should be", || Ok(attack.is_refused().is_ok()))?;
        Ok(took)
    }
}

/// Waits until the next dial has the names looked up at once: after something new there is a rest of 250 ms, and of 500
/// ms more if somebody dialled during the lookup.
fn wait_for_the_rest() {
    thread::sleep(Duration::from_millis(900));
}

fn median(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    let worst = times.last().copied().unwrap_or_default();
    (times.get(times.len() / 2).copied().unwrap_or_default(), worst)
}

fn n8_a_dial_after_a_move_has_it_followed_at_once() -> Result<()> {
    let bus = Bus::new("")?;
    bus.is_at(0);
    // Open without us.
    for number in 0..=MOVES {
        bus.attack(NOBODY, number)?.reaches()?;
    }
    let daemon = bus.daemon()?;
    bus.attack(NOBODY, 0)?.is_refused()?;
    ensure!(bus.lookups()? == 0, "{}", bus.status()?);
    let (mut by_root, mut by_attacker) = (Vec::new(), Vec::new());
    for number in 1..=MOVES {
        wait_for_the_rest();
        bus.is_at(number);
        let limit = at_this_load(SOON)?;
        // By turns the agent, which has looked the name up by itself, and somebody else.
        let root_first = number % 2 == 0;
        let took = bus.attack(NOBODY, number)?.until_refused(root_first)?;
        ensure!(took < limit, "{number} was open for {took:?}: {}", bus.status()?);
        if root_first { &mut by_root } else { &mut by_attacker }.push(took);
        // What it had stays protected (N4).
        bus.attack(NOBODY, number - 1)?.is_refused()?;
    }
    println!(
        "    from the first dial to protection: root dials {:?}, an attacker dials {:?} (median, worst)",
        median(by_root),
        median(by_attacker)
    );
    let status = bus.status()?;
    let dials = &status["dials"][0];
    ensure!(
        status["state"] == "enforcing"
            && dials["port"] == PORT
            && dials["lookups"].as_u64() >= Some(MOVES.into())
            && dials["last"].as_str().is_some_and(|last| last.starts_with("10.79.8.")),
        "{status}"
    );
    let text = bus.netns.enforcer(&bus.world, &["status"])?.demand(0)?.stdout;
    ensure!(
        text.contains("dialled elsewhere") && text.contains("port 4222"),
        "{text}"
    );
    drop(daemon);
    Ok(())
}

fn n8_whoever_dials_first_is_cut_once_the_address_is_known() -> Result<()> {
    let bus = Bus::new("existing = \"cut\"")?;
    bus.is_at(0);
    let _daemon = bus.daemon()?;
    bus.is_at(1);
    let held = bus.attack(NOBODY, 1)?.hold()?;
    let mut mine = bus.attack(0, 1)?.hold()?;
    held.is_cut()?;
    bus.is_protected_soon(1)?;
    mine.stays()
}

fn n8_a_name_without_an_address_is_looked_up_at_a_dial() -> Result<()> {
    let bus = Bus::new("")?;
    bus.dns.set(NAME, Zone::Code(ResponseCode::NXDomain));
    let _daemon = bus.daemon()?;
    // A failure is retried after 5 s: nothing of that kind is near.
    bus.attack(NOBODY, 1)?.reaches()?;
    wait_for_the_rest();
    bus.is_at(1);
    let took = bus.is_protected_soon(1)?;
    println!("    protected {took:?} after the first dial");
    ensure!(bus.lookups()? >= 1, "{}", bus.status()?);
    Ok(())
}

/// Nothing new twice: the rest grows to half a second, and who dials in it is heard at its end.
fn n8_a_dial_in_the_rest_is_not_forgotten() -> Result<()> {
    let bus = Bus::new("")?;
    bus.is_at(0);
    let _daemon = bus.daemon()?;
    bus.attack(NOBODY, 9)?.reaches()?;
    until("the names are looked up", || Ok(bus.lookups()? == 1))?;
    bus.attack(NOBODY, 9)?.reaches()?;
    bus.attack(NOBODY, 9)?.reaches()?;
    until("they are looked up again", || Ok(bus.lookups()? >= 2))?;
    bus.is_at(1);
    // One dial, and no other.
    bus.attack(0, 1)?.reaches()?;
    let to = server(1).to_string();
    until("the move is followed", || {
        Ok(bus.netns.enforcer(&bus.world, &["check", "nobody", &to])?.code == 1)
    })
}

fn n8_what_a_reload_brings_is_waited_for() -> Result<()> {
    let bus = Bus::new("")?;
    bus.is_at(0);
    let literal = format!(
        "backend = {:?}\n[target.bus]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\n",
        Backend::current().configured(),
        server(0)
    );
    bus.world.configure(&literal)?;
    let daemon = bus.daemon()?;
    bus.is_at(1);
    bus.attack(NOBODY, 1)?.reaches()?;
    bus.configure("")?;
    daemon.reload()?;
    until("the name is known", || {
        Ok(bus.attack(NOBODY, 1)?.run()?.errno.is_some())
    })?;
    wait_for_the_rest();
    bus.is_at(2);
    bus.is_protected_soon(2)?;
    // No name any more, and then one again.
    bus.world.configure(&literal)?;
    daemon.reload()?;
    bus.attack(NOBODY, 3)?.reaches()?;
    ensure!(bus.status()?["dials"] == Value::Array(Vec::new()), "{}", bus.status()?);
    bus.configure("")?;
    daemon.reload()?;
    wait_for_the_rest();
    bus.is_at(3);
    bus.is_protected_soon(3).map(drop)
}

fn n8_a_restart_goes_on_waiting() -> Result<()> {
    let bus = Bus::new("")?;
    bus.is_at(0);
    let daemon = bus.daemon()?;
    daemon.kill()?;
    // Told to nobody.
    bus.attack(NOBODY, 1)?.reaches()?;
    bus.attack(NOBODY, 1)?.reaches()?;
    let _daemon = bus.daemon()?;
    wait_for_the_rest();
    bus.is_at(1);
    bus.is_protected_soon(1).map(drop)
}

fn n8_ports_without_names_ask_nothing() -> Result<()> {
    let bus = Bus::new("")?;
    bus.is_at(0);
    bus.world.configure(&format!(
        "backend = {:?}\n[dns]\nmin_refresh = \"1m\"\nmax_refresh = \"1m\"\n[target.bus]\n\
         endpoints = [\"tcp://{NAME}:1\"]\nallow = [\"root\"]\n\
         [target.other]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\n",
        Backend::current().configured(),
        server(0)
    ))?;
    let _daemon = bus.daemon()?;
    let asked = bus.dns.asked();
    ensure!(asked > 0, "the name was never looked up");
    for number in 1..4 {
        bus.attack(NOBODY, number)?.reaches()?;
    }
    wait_for_the_rest();
    ensure!(bus.dns.asked() == asked, "{} then {asked}", bus.dns.asked());
    Ok(())
}

/// How long the flood of dials lasts.
const FLOOD: Duration = Duration::from_secs(5);

fn n8_f10_a_flood_of_dials_keeps_nobody_waiting() -> Result<()> {
    let bus = Bus::new("")?;
    bus.is_at(0);
    // The longest rest is what users have.
    let file = bus.world.path("enforcer.toml");
    let text = fs::read_to_string(&file)?;
    fs::write(&file, text.replace("min_refresh = \"1m\"", "min_refresh = \"5s\""))?;
    let daemon = bus.daemon()?;
    let fire = bus.world.path("fire");
    fs::write(&fire, "")?;
    let cores = thread::available_parallelism()?.get();
    let hammers = (0..cores)
        .map(|_| bus.attack(NOBODY, 1)?.flag("--no-greeting").hammer(&fire))
        .collect::<Result<Vec<_>>>()?;
    let (before, begun, log) = (Use::of(daemon.pid())?, Instant::now(), daemon.log().len());
    let (asked, mut slowest) = (bus.dns.asked(), Duration::ZERO);
    while begun.elapsed() < FLOOD {
        let (limit, at) = (at_this_load(Duration::from_secs(2))?, Instant::now());
        bus.netns.enforcer(&bus.world, &["refresh"])?.demand(0)?;
        daemon.reload()?;
        ensure!(bus.status()?["state"] == "enforcing", "{}", bus.status()?);
        let took = at.elapsed();
        slowest = slowest.max(took);
        ensure!(took < 4 * limit, "four answers took {took:?}, of {:?}", 4 * limit);
        thread::sleep(Duration::from_millis(300));
    }
    let (after, lasted, lookups) = (Use::of(daemon.pid())?, begun.elapsed(), bus.lookups()?);
    let (spent, said) = (
        after.processor.saturating_sub(before.processor),
        daemon.log().len() - log,
    );
    let asked = bus.dns.asked() - asked;
    // Amid all this a move is followed, after the longest rest at most.
    bus.is_at(1);
    let moved = Instant::now();
    let to = server(1).to_string();
    until("the move is followed", || {
        Ok(bus.netns.enforcer(&bus.world, &["check", "nobody", &to])?.code == 1)
    })?;
    let followed = moved.elapsed();
    fs::remove_file(&fire)?;
    let mut dials = 0;
    for hammer in hammers {
        let blows = hammer.finish()?;
        dials += blows.connected;
    }
    println!(
        "    {dials} dials by {cores} processes: {lookups} lookups by them in {lasted:?}, {asked} questions; a move \
         was followed after {followed:?}; \
         slowest refresh, reload and two states {slowest:?}; the daemon took {spent:?}, grew from {} to {} KiB and \
         logged {said} bytes",
        before.memory, after.memory
    );
    ensure!(dials > 1000, "hardly anybody dialled");
    // At once, and after 0.25, 0.5, 1, 2 and 4 s; twice that, as reloads and refreshes bring nothing new either.
    ensure!(lookups <= 12, "{lookups} lookups");
    ensure!(spent < lasted / 5, "the daemon took {spent:?} of {lasted:?}");
    ensure!(
        after.memory < before.memory + (16 << 10),
        "the daemon grew: {before:?}, {after:?}"
    );
    ensure!(said < 16 << 10, "it logged {said} bytes: {}", daemon.log());
    Ok(())
}
