//! A message bus that fails over: servers and name servers come and go, clients come back, nobody else gets in.

use std::{
    fs,
    io::{self, BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use hickory_proto::op::ResponseCode;

use super::{
    Case,
    names::{Named, addresses},
    with_each,
};
use crate::{
    backend::EBPF,
    dns::{DnsServer, Zone},
    world::{NOBODY, Netns, World, at_this_load, binary, until},
};

const NAME: &str = "bus.test";
const PORT: u16 = 4222;
/// How often the name moves.
const MOVES: usize = 20;

pub(super) fn cases() -> Vec<Case> {
    vec![
        // Counts what is refused as eBPF refuses it.
        case!(n3_n4_a_bus_that_moves_twenty_times_under_fire).on(EBPF),
        case!(n3_a_name_that_fails_for_good_outlasts_retain).long(),
        case!(n1_n3_name_servers_die_and_take_over),
        case!(b3_a_refresh_takes_little_more_than_the_look_up),
    ]
}

/// A process that ends with the case.
pub(super) struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A real NATS server.
pub(super) fn nats_server(netns: &Netns, address: SocketAddr, more: &[&str]) -> Result<Process> {
    let program = ["/usr/sbin/nats-server", "/usr/bin/nats-server"];
    let program = program.iter().map(Path::new).find(|path| path.exists());
    let program = program.context("nats-server is not installed; run cargo xtask setup")?;
    let (ip, port) = (address.ip().to_string(), address.port().to_string());
    let mut command = netns.command(program);
    command.args(["--addr", &ip, "--port", &port, "--name", &ip]).args(more);
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    Ok(Process(child))
}

/// One of three NATS servers.
struct Server {
    address: SocketAddr,
    running: Option<Process>,
}

impl Server {
    fn start(&mut self, netns: &Netns) -> Result<()> {
        self.running = Some(nats_server(netns, self.address, &[])?);
        Ok(())
    }
}

/// The lines that the client has said.
struct Client {
    _process: Process,
    said: Arc<Mutex<Vec<String>>>,
}

impl Client {
    fn start(world: &World, netns: &Netns) -> Result<Self> {
        let mut command = world.with_resolver_in(netns, &binary("busclient")?);
        command
            .arg("--cgroup")
            .arg(&world.cgroup)
            .arg("--socket")
            .arg(world.path("run/control.sock"))
            .arg(format!("{NAME}:{PORT}"));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("no stdout")?;
        let said = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&said);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(io::Result::ok) {
                if let Ok(mut said) = sink.lock() {
                    said.push(line);
                }
            }
        });
        Ok(Self {
            _process: Process(child),
            said,
        })
    }

    fn said(&self) -> Vec<String> {
        self.said.lock().map(|said| said.clone()).unwrap_or_default()
    }

    /// Waits until messages come back by a server, and by no other since.
    fn is_at(&self, server: &Server) -> Result<()> {
        let wanted = format!("connected {}", server.address.ip());
        until(&format!("the client is {wanted}"), || {
            let said = self.said();
            Ok(said.iter().rfind(|line| line.starts_with("connected")) == Some(&wanted))
        })
        .map_err(|error| error.context(self.said().join("; ")))
    }
}

fn n3_n4_a_bus_that_moves_twenty_times_under_fire() -> Result<()> {
    let world = World::new()?;
    let netns = Netns::new(&world, "bus")?;
    let mut servers = Vec::new();
    for last in 1..=3 {
        let ip = Ipv4Addr::new(10, 79, 7, last);
        netns.ip(&["address", "add", &format!("{ip}/32"), "dev", "lo"])?;
        servers.push(Server {
            address: SocketAddr::from((ip, PORT)),
            running: None,
        });
    }
    let dns = DnsServer::start(Some(&netns.file()), IpAddr::from([127, 0, 0, 1]))?;
    fs::write(
        world.path("resolv.conf"),
        "nameserver 127.0.0.1\noptions timeout:1 attempts:2\n",
    )?;
    world.configure(&format!(
        "[dns]\nmin_refresh = \"1s\"\nmax_refresh = \"2s\"\n[target.bus]\nendpoints = [\"nats://{NAME}:{PORT}\"]\n\
         allow = [\"root\"]\n"
    ))?;
    let attack = |uid, server: &Server| {
        let attack = world.attack(uid).to(server.address).in_netns(&netns)?;
        anyhow::Ok(attack.flag("--no-greeting"))
    };
    // Each is open without us.
    for server in &mut servers {
        server.start(&netns)?;
        let open = attack(NOBODY, server)?;
        until("the server answers", || Ok(open.run()?.errno.is_none()))?;
        server.running = None;
    }
    let move_to = |servers: &mut Vec<Server>, from: Option<usize>, to: usize| -> Result<()> {
        let server = servers.get_mut(to).context("no such server")?;
        server.start(&netns)?;
        dns.set(NAME, Zone::Addresses(vec![server.address.ip()]));
        if let Some(from) = from.and_then(|from| servers.get_mut(from)) {
            from.running = None;
        }
        Ok(())
    };
    move_to(&mut servers, None, 0)?;
    let _daemon = world.daemon_with(&mut world.with_resolver_in(&netns, &binary("enforcer")?))?;
    let client = Client::start(&world, &netns)?;
    let fire = world.path("fire");
    fs::write(&fire, "")?;
    let mut hammers = Vec::new();
    let mut at = 0;
    client.is_at(servers.first().context("no server")?)?;
    hammers.push(attack(NOBODY, servers.first().context("no server")?)?.hammer(&fire)?);
    let started = Instant::now();
    for number in 0..MOVES {
        let to = (at + 1) % servers.len();
        move_to(&mut servers, Some(at), to)?;
        let server = servers.get(to).context("no server")?;
        client.is_at(server)?;
        attack(NOBODY, server)?.is_refused()?;
        // From the moment that the name is known to have had an address.
        if number < servers.len() - 1 {
            hammers.push(attack(NOBODY, server)?.hammer(&fire)?);
        }
        at = to;
    }
    println!("    {MOVES} moves in {:?}", started.elapsed());
    fs::remove_file(&fire)?;
    let mut refused = 0;
    for hammer in hammers {
        let blows = hammer.finish()?;
        refused += blows.refused;
        ensure!(
            blows.connected + blows.reset + blows.other == 0,
            "an attempt got past the judge: {blows:?}"
        );
    }
    let said = client.said();
    let count = |what: &str| said.iter().filter(|line| line.starts_with(what)).count();
    let (connected, refreshes, failed) = (count("connected"), count("refreshed"), count("failed"));
    println!(
        "    the client was at {connected} servers after {refreshes} refreshes, {failed} of them failed; {refused} \
         attempts of another user were refused"
    );
    ensure!(
        connected == MOVES + 1 && refreshes >= connected && failed == 0,
        "{said:?}"
    );
    ensure!(refused > 10_000, "only {refused} attempts");
    Ok(())
}

fn n3_a_name_that_fails_for_good_outlasts_retain() -> Result<()> {
    let bad = [
        Zone::Code(ResponseCode::NXDomain),
        Zone::Code(ResponseCode::ServFail),
        Zone::Silence,
        addresses(&[]),
        addresses(&["127.0.0.1"]),
    ];
    with_each(&bad, fails_for_good)
}

fn fails_for_good(bad: &Zone) -> Result<()> {
    let named = Named::new(&["one.test", "two.test"], "")?;
    let toml = named.world.path("enforcer.toml");
    let text = fs::read_to_string(&toml)?;
    fs::write(&toml, text.replace("[dns]", "[dns]\nretain = \"2s\""))?;
    named.dns.set("one.test", addresses(&["10.9.0.1", "2001:db8::1"]));
    named.dns.set("two.test", addresses(&["10.9.1.1"]));
    let daemon = named.daemon()?;
    named.dns.set("one.test", bad.clone());
    until("the name is stale", || Ok(named.name("one.test")?["stale"] == true))?;
    // Over a restart, too.
    daemon.kill()?;
    let daemon = named.daemon()?;
    thread::sleep(Duration::from_secs(4));
    ensure!(
        named.denied("10.9.0.1")? && named.denied("2001:db8::1")?,
        "{bad:?}: the last addresses were let go: {}",
        named.world.status()?
    );
    ensure!(!named.denied("127.0.0.1")?, "a lie was believed");
    named.dns.set("two.test", addresses(&["10.9.1.2"]));
    let refreshed = named.world.enforcer(&["refresh"])?;
    ensure!(
        named.denied("10.9.1.2")?,
        "{bad:?}: the other name is not followed by {refreshed:?}: {}",
        daemon.log()
    );
    until("the other name's old address is let go", || {
        Ok(!named.denied("10.9.1.1")?)
    })?;
    ensure!(named.denied("10.9.0.1")?, "{bad:?}: the last addresses were let go");
    ensure!(named.name("two.test")?["stale"] == false, "{}", daemon.log());
    Ok(())
}

fn n1_n3_name_servers_die_and_take_over() -> Result<()> {
    let mut named = Named::new(&[NAME], "")?;
    let (first, second) = (named.world.address(), second(&named.world));
    let other = DnsServer::start(None, second)?;
    fs::write(
        named.world.path("resolv.conf"),
        format!("nameserver {first}\nnameserver {second}\noptions timeout:1 attempts:1\n"),
    )?;
    named.dns.set(NAME, addresses(&["10.9.0.1"]));
    other.set(NAME, addresses(&["10.9.0.2"]));
    let _daemon = named.daemon()?;
    ensure!(
        named.denied("10.9.0.1")? && !named.denied("10.9.0.2")?,
        "not the first server's answer"
    );
    // Silent, failing, refusing: the next one is asked.
    for (number, bad) in [
        Zone::Silence,
        Zone::Code(ResponseCode::ServFail),
        Zone::Code(ResponseCode::Refused),
    ]
    .into_iter()
    .enumerate()
    {
        let address = format!("10.9.1.{number}");
        named.dns.set(NAME, bad);
        other.set(NAME, addresses(&[&address]));
        named.world.enforcer(&["refresh"])?.demand(0)?;
        ensure!(
            named.denied(&address)? && named.denied("10.9.0.1")?,
            "{address} is open"
        );
    }
    // Dead: its port is closed.
    named.dns = DnsServer::start(None, third(&named.world))?;
    other.set(NAME, addresses(&["10.9.2.1"]));
    named.world.enforcer(&["refresh"])?.demand(0)?;
    ensure!(named.denied("10.9.2.1")?, "10.9.2.1 is open");
    // All dead, and alive again.
    drop(other);
    let stale = named.world.enforcer(&["refresh"])?.demand(1)?;
    ensure!(stale.stdout.contains("stale") && named.denied("10.9.2.1")?, "{stale:?}");
    let again = DnsServer::start(None, second)?;
    again.set(NAME, addresses(&["10.9.3.1"]));
    named.world.enforcer(&["refresh"])?.demand(0)?;
    ensure!(
        named.denied("10.9.3.1")? && named.denied("10.9.0.1")?,
        "10.9.3.1 is open"
    );
    Ok(())
}

/// Other addresses of this world.
fn second(world: &World) -> IpAddr {
    other_than(world, 0x80)
}

fn third(world: &World) -> IpAddr {
    other_than(world, 0x40)
}

fn other_than(world: &World, bit: u8) -> IpAddr {
    match world.address() {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            Ipv4Addr::new(a, b, c ^ bit, d).into()
        }
        v6 @ IpAddr::V6(_) => v6,
    }
}

fn b3_a_refresh_takes_little_more_than_the_look_up() -> Result<()> {
    const LIMIT: Duration = Duration::from_millis(20);
    // The load is another one by the end.
    let before = at_this_load(LIMIT)?;
    let named = Named::new(&[NAME], "")?;
    named.dns.set(NAME, addresses(&["10.9.0.1"]));
    let _daemon = named.daemon()?;
    let socket: PathBuf = named.world.path("run/control.sock");
    let mut times = Vec::new();
    for host in 0..40_u8 {
        // As between two connections of a client: the daemon has done what it puts off until nobody waits.
        thread::sleep(Duration::from_millis(150));
        let address = format!("10.9.0.{host}");
        named.dns.set(NAME, addresses(&[&address]));
        let started = Instant::now();
        let status = enforcer_client::refresh_blocking(&socket, Duration::from_secs(10))?;
        times.push(started.elapsed());
        ensure!(named.denied(&address)?, "{address} is open after {status:?}");
    }
    times.sort();
    let (fastest, median) = (times.first().copied(), times.get(times.len() / 2).copied());
    let (fastest, median) = (fastest.context("no time")?, median.context("no time")?);
    println!("    a refresh, lookup and a new address made active included: median {median:?}, fastest {fastest:?}");
    let limit = before.max(at_this_load(LIMIT)?);
    ensure!(fastest < limit, "the fastest of {} took {fastest:?}", times.len());
    Ok(())
}
