//! Measures against the budgets: scenarios in turn, many rounds, medians and ratios. Needs root; nothing else should
//! run. An argument, `connects`, `established`, `forwarded`, `nftables`, `programs`, `starts` or `updates`, chooses one
//! part.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns};
use tests::{
    attack::Way,
    foreign::{ForeignProgram, Runs, Sharing, runs_of_link},
    machine,
    world::{Attack, Listener, NOBODY, Netns, World, binary, cgroup_mount, ran},
};

type Part = fn() -> Result<()>;

const ROUNDS: usize = 21;
const CONNECTS: usize = 1000;

fn main() -> ExitCode {
    machine::inside(|| match measure() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmarks did not end: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn measure() -> Result<()> {
    let only = std::env::args().nth(1);
    let parts: [(&str, Part); 7] = [
        ("connects", connects),
        ("established", established),
        ("forwarded", forwarded),
        ("nftables", nftables),
        ("programs", programs),
        ("starts", starts),
        ("updates", updates),
    ];
    for (_, part) in parts
        .iter()
        .filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name))
    {
        part()?;
    }
    Ok(())
}

fn median<T: Ord + Copy>(mut values: Vec<T>) -> Option<T> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

fn rules(world: &World, count: u32) -> Result<()> {
    let mut endpoints: Vec<String> = (0..count)
        .map(|host| format!("tcp://{}:{}", Ipv4Addr::from(0x0a00_0000 + host), world.port))
        .collect();
    endpoints.push(format!("tcp://{}", world.here()));
    world.configure_one(&endpoints, r#"["root"]"#)
}

/// P1, P5: connect as the caller sees it.
fn connects() -> Result<()> {
    println!("connect, median of {CONNECTS} calls, median of {ROUNDS} rounds in turn");
    println!(
        "{:>10}  {:>12}  {:>12}  {:>12}  {:>12}",
        "endpoints", "no program", "unprotected", "allowed", "denied"
    );
    for count in [1, 1_000, 100_000] {
        let (bare, world) = (World::new()?, World::new()?);
        let (_first, _second) = (bare.listen()?, world.listen()?);
        rules(&world, count)?;
        world.apply()?;
        let elsewhere = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), bare.port);
        let attacks: [Attack; 4] = [
            bare.attack(0).to(elsewhere),
            world.attack(0).to(elsewhere),
            world.attack(0),
            world.attack(NOBODY),
        ];
        let mut times: [Vec<u128>; 4] = Default::default();
        for _ in 0..ROUNDS {
            for (attack, times) in attacks.iter().zip(&mut times) {
                times.push(attack.measure(CONNECTS)?);
            }
        }
        let medians = times.map(|times| median(times).unwrap_or(0));
        let [bare, ..] = medians;
        #[allow(clippy::cast_precision_loss, reason = "a ratio of small numbers")]
        let cell = |time: u128| format!("{:.2} µs {:.3}", time as f64 / 1000.0, time as f64 / bare as f64);
        println!(
            "{count:>10}  {}",
            medians.map(|time| format!("{:>12}", cell(time))).join("  ")
        );
    }
    Ok(())
}

/// Ratios of pairs of slices, one with rules and one without, each pair as close in time as can be.
struct Ratios(Vec<f64>);

impl Ratios {
    /// Which of a pair comes first changes by turns.
    fn of(pairs: usize, without: &mut Slice<'_>, with: &mut Slice<'_>) -> Result<Self> {
        let mut ratios = Vec::with_capacity(pairs);
        for number in 0..pairs {
            let (before, after) = if number % 2 == 0 {
                let before = without()?;
                (before, with()?)
            } else {
                let after = with()?;
                (without()?, after)
            };
            ratios.push(after.as_secs_f64() / before.as_secs_f64());
        }
        ratios.sort_unstable_by(f64::total_cmp);
        Ok(Self(ratios))
    }

    fn at(&self, percent: usize) -> f64 {
        let last = self.0.len().saturating_sub(1);
        self.0.get(last * percent / 100).copied().unwrap_or(f64::NAN)
    }
}

/// Median, with the 95 % interval of the median (order statistics) and the quartiles of the pairs.
impl std::fmt::Display for Ratios {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = self.0.len();
        let reach = count.isqrt();
        let rank = |rank: usize| self.0.get(rank.min(count - 1)).copied().unwrap_or(f64::NAN);
        let (low, high) = (rank((count / 2).saturating_sub(reach)), rank(count / 2 + reach));
        write!(
            f,
            "{:.3} [{low:.3}, {high:.3}], pairs {:.3} to {:.3}",
            self.at(50),
            self.at(25),
            self.at(75)
        )
    }
}

type Slice<'a> = dyn FnMut() -> Result<Duration> + 'a;

/// Both ends of a connection.
struct Ends {
    near: TcpStream,
    far: TcpStream,
}

impl Ends {
    /// Over the loopback of a network namespace, made in a cgroup.
    fn new(netns: &Netns, world: &World) -> Result<Self> {
        let place = SocketAddr::from((Ipv4Addr::LOCALHOST, world.port));
        let ours = fs::read_to_string("/proc/self/cgroup")?;
        let ours = ours
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .unwrap_or_default();
        let pid = std::process::id().to_string();
        fs::write(world.cgroup.join("cgroup.procs"), &pid)?;
        let made = Self::between(netns, netns, place);
        fs::write(cgroup_mount()?.join(ours).join("cgroup.procs"), &pid)?;
        made
    }

    /// From one network namespace to an address of another.
    fn between(from: &Netns, to: &Netns, place: SocketAddr) -> Result<Self> {
        let listener = to.within(|| Ok(TcpListener::bind(place)?))?;
        let near = from.within(|| Ok(TcpStream::connect(place)?))?;
        let (far, _) = listener.accept()?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        Ok(Self { near, far })
    }

    /// A byte there and back, so often.
    fn trips(&mut self, count: u32) -> Result<Duration> {
        let mut byte = [0];
        let started = Instant::now();
        for _ in 0..count {
            self.near.write_all(&byte)?;
            self.far.read_exact(&mut byte)?;
            self.far.write_all(&byte)?;
            self.near.read_exact(&mut byte)?;
        }
        Ok(started.elapsed())
    }
}

/// Connects of this thread, in a network namespace that it enters first.
fn connects_in(netns: &fs::File, to: SocketAddr) -> Result<Duration> {
    const SLICE: usize = 20;
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    let mut time = Duration::ZERO;
    for _ in 0..SLICE {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_linger(Some(Duration::ZERO))?;
        let started = Instant::now();
        let _ = socket.connect(&to.into());
        time += started.elapsed();
    }
    Ok(time)
}

/// A network namespace with rules of this backend for so many endpoints, or with none.
fn ruled(backend: Option<&str>, count: u32) -> Result<(World, Netns, Listener, Duration)> {
    let world = World::new()?;
    let netns = Netns::new(&world, "b")?;
    let listener = Listener::start(Some(&netns.file()), world.port + 1, &[])?;
    let mut took = Duration::ZERO;
    if let Some(backend) = backend {
        let mut endpoints: Vec<String> = (0..count)
            .map(|host| format!("tcp://{}:{}", Ipv4Addr::from(0x0a00_0000 + host), world.port + 1))
            .collect();
        endpoints.push(format!("tcp://{}:{}", world.address(), world.port + 1));
        world.configure(&format!(
            "backend = {backend:?}\n[target.main]\nendpoints = {endpoints:?}\nallow = [\"root\"]\n"
        ))?;
        let started = Instant::now();
        netns.enforcer(&world, &["apply"])?.demand(0)?;
        took = started.elapsed();
    }
    Ok((world, netns, listener, took))
}

/// P3: request and response on an established connection, to the same without rules in another namespace; that without
/// rules to another without rules, for what such a comparison can tell here.
fn established() -> Result<()> {
    const PAIRS: usize = 2001;
    const TRIPS: u32 = 100;
    println!(
        "\nestablished, {TRIPS} bytes there and back a slice, {PAIRS} pairs of slices: median ratio to no rules [its \
         95 % interval], quartiles"
    );
    let kinds = [
        (None, 0),
        (Some("ebpf"), 1),
        (Some("ebpf"), 100_000),
        (Some("nftables"), 1),
        (Some("nftables"), 10_000),
        (Some("nftables"), 100_000),
    ];
    for (backend, count) in kinds {
        let (bare, without, _first, _) = ruled(None, 0)?;
        let (world, with, _second, _) = ruled(backend, count)?;
        let (mut before, mut after) = (Ends::new(&without, &bare)?, Ends::new(&with, &world)?);
        let ratios = Ratios::of(PAIRS, &mut || before.trips(TRIPS), &mut || after.trips(TRIPS))?;
        println!("{:>10} {count:>7}  {ratios}", backend.unwrap_or("no rules"));
    }
    Ok(())
}

/// A container, the host that forwards what it sends, and a server behind that; rules for so many endpoints on the
/// host, or none.
struct Passage {
    _world: World,
    container: Netns,
    _host: Netns,
    server: Netns,
    _listener: Listener,
    port: u16,
}

impl Passage {
    /// The server's address that is an endpoint where there are rules, at a port of its own, and one that is none.
    const ENDPOINT: Ipv4Addr = Ipv4Addr::new(10, 53, 0, 2);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 53, 0, 3);

    fn new(rules: Option<u32>) -> Result<Self> {
        let world = World::new()?;
        let [container, host, server] = ["c", "h", "s"].map(|name| Netns::new(&world, name));
        let (container, host, server) = (container?, host?, server?);
        container.join(&["10.52.0.2/24"], &host, &["10.52.0.1/24"])?;
        for words in [
            &["link", "set", "veth0", "down"][..],
            &["link", "set", "veth0", "name", "inside"],
            &["link", "set", "inside", "up"],
        ] {
            host.ip(words)?;
        }
        server.join(&["10.53.0.2/24", "10.53.0.3/24"], &host, &["10.53.0.1/24"])?;
        container.ip(&["route", "add", "default", "via", "10.52.0.1"])?;
        server.ip(&["route", "add", "default", "via", "10.53.0.1"])?;
        host.set("ipv4/ip_forward", "1")?;
        let port = world.port + 1;
        let listener = Listener::start(Some(&server.file()), port, &[])?;
        if let Some(count) = rules {
            let mut endpoints: Vec<String> = (0..count)
                .map(|host| format!("tcp://{}:{}", Ipv4Addr::from(0x0b00_0000 + host), world.port))
                .collect();
            endpoints.push(format!("tcp://{}:{}", Self::ENDPOINT, world.port));
            world.configure(&format!(
                "backend = \"nftables\"\n[target.main]\nendpoints = {endpoints:?}\nallow = [\"root\"]\n"
            ))?;
            host.enforcer(&world, &["apply"])?.demand(0)?;
        }
        Ok(Self {
            _world: world,
            container,
            _host: host,
            server,
            _listener: listener,
            port,
        })
    }
}

/// P3 and P4 of what a host forwards, where the rules against what hides its ports stand in the way of every packet.
fn forwarded() -> Result<()> {
    const PAIRS: usize = 1001;
    const TRIPS: u32 = 50;
    println!(
        "\nforwarded, nftables, {PAIRS} pairs of slices, {TRIPS} bytes there and back or 20 connects: median ratio to \
         no rules [its 95 % interval], quartiles"
    );
    for rules in [None, Some(1), Some(10_000)] {
        let (bare, ruled) = (Passage::new(None)?, Passage::new(rules)?);
        let ends = |passage: &Passage| {
            let place = SocketAddr::from((Passage::OTHER, passage.port + 1));
            Ends::between(&passage.container, &passage.server, place)
        };
        let (mut before, mut after) = (ends(&bare)?, ends(&ruled)?);
        let established = Ratios::of(PAIRS, &mut || before.trips(TRIPS), &mut || after.trips(TRIPS))?;
        let (without, with) = (
            fs::File::open(bare.container.file())?,
            fs::File::open(ruled.container.file())?,
        );
        let of = |address: Ipv4Addr| {
            Ratios::of(
                PAIRS,
                &mut || connects_in(&without, (address, bare.port).into()),
                &mut || connects_in(&with, (address, ruled.port).into()),
            )
        };
        // A thread of its own, as it changes namespaces.
        let connects = std::thread::scope(|scope| {
            let work = scope.spawn(|| Ok::<_, anyhow::Error>((of(Passage::OTHER)?, of(Passage::ENDPOINT)?)));
            work.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
        });
        let (other, beside) = connects?;
        let count = rules.map_or_else(|| "no rules".to_owned(), |count| count.to_string());
        println!(
            "{count:>8}  established {established}\n          connect to another address {other}\n          connect to \
             an endpoint's address, another port {beside}"
        );
    }
    Ok(())
}

/// P4, P5: connect with nftables, to the same without rules; a denial as its caller sees it.
fn nftables() -> Result<()> {
    const PAIRS: usize = 1001;
    println!(
        "\nnftables, connect, {PAIRS} pairs of slices of 20: median ratio to no rules [its 95 % interval], quartiles; \
         a denial, median"
    );
    for count in [1, 1_000, 10_000, 100_000] {
        let (bare, without, _first, _) = ruled(None, 0)?;
        let (world, with, _second, installed) = ruled(Some("nftables"), count)?;
        let port = world.port + 1;
        let (without, inside) = (fs::File::open(without.file())?, fs::File::open(with.file())?);
        let (unprotected, allowed) = (
            SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            SocketAddr::new(world.address(), port),
        );
        // A thread of its own, as it changes namespaces.
        let measured = std::thread::scope(|scope| {
            let work = scope.spawn(|| -> Result<_> {
                let of = |to: SocketAddr| {
                    let there = SocketAddr::new(to.ip(), bare.port + 1);
                    Ratios::of(PAIRS, &mut || connects_in(&without, there), &mut || {
                        connects_in(&inside, to)
                    })
                };
                Ok((of(unprotected)?, of(allowed)?))
            });
            work.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
        });
        let (unprotected, protected) = measured?;
        let denied = world.attack(NOBODY).to(allowed).in_netns(&with)?;
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            times.push(denied.measure(CONNECTS)?);
        }
        times.sort_unstable();
        println!(
            "{count:>7}  unprotected {unprotected}\n         allowed     {protected}\n         denied      {} ns, \
             rounds {} to {}; installed and read back in {} ms",
            median(times.clone()).unwrap_or(0),
            times.first().copied().unwrap_or(0),
            times.last().copied().unwrap_or(0),
            installed.as_millis()
        );
    }
    Ok(())
}

/// P2: what the program adds to an empty one, by the kernel's own statistics.
fn programs() -> Result<()> {
    const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";
    let before = fs::read_to_string(STATS)?;
    fs::write(STATS, "1")?;
    let result = program_times();
    fs::write(STATS, before)?;
    result
}

fn program_times() -> Result<()> {
    let (empty, world) = (World::new()?, World::new()?);
    let (_first, _second) = (empty.listen()?, world.listen()?);
    let program = ForeignProgram::passing(&empty.cgroup, Sharing::None)?;
    let mut endpoints: Vec<String> = (0..1_000)
        .map(|host| format!("udp://{}:{}", Ipv4Addr::from(0x0a00_0000 + host), world.port))
        .collect();
    endpoints.push(format!("udp://{}", world.here()));
    world.configure_one(&endpoints, r#"["root"]"#)?;
    world.apply()?;
    let pin = world.pins().join("connect4");
    let other_port = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), empty.port);
    let other_address = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), world.port);
    let per_run = |runs: &dyn Fn() -> Result<Runs>, attack: &Attack| -> Result<u64> {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let before = runs()?;
            attack.clone().way(Way::UdpConnect).measure(10 * CONNECTS)?;
            let after = runs()?;
            ensure!(after.count > before.count, "the program did not run");
            times.push((after.time - before.time) * 10 / (after.count - before.count));
        }
        median(times).context("no rounds")
    };
    let base = per_run(&|| Ok(program.runs()?), &empty.attack(0))?;
    println!(
        "\nprogram time above an empty program ({} ns with statistics on)",
        tenths(base)
    );
    for (what, attack) in [
        ("port of no target", world.attack(0).to(other_port)),
        ("address miss", world.attack(0).to(other_address)),
        ("allowed, both users checked", world.attack(0)),
        ("denied, with its event", world.attack(NOBODY)),
    ] {
        let time = per_run(&|| Ok(runs_of_link(&pin)?), &attack)?;
        println!("{what:>30}  {} ns", tenths(time.saturating_sub(base)));
    }
    Ok(())
}

fn tenths(value: u64) -> String {
    format!("{}.{}", value / 10, value % 10)
}

/// P7: from the start of the process to the first refusal, with 1,000 literal endpoints.
fn starts() -> Result<()> {
    let mut times = Vec::new();
    let mut resident = 0;
    for _ in 0..9 {
        let world = World::new()?;
        let _listener = world.listen()?;
        rules(&world, 999)?;
        let started = Instant::now();
        let mut command = Command::new(binary("enforcer")?);
        let mut child = command
            .arg("--config")
            .arg(world.path("enforcer.toml"))
            .arg("run")
            .stderr(Stdio::null())
            .spawn()?;
        let pins = world.pins().join("connect6");
        while !pins.exists() {
            std::thread::sleep(Duration::from_micros(200));
        }
        times.push(started.elapsed());
        std::thread::sleep(Duration::from_millis(300));
        let status = fs::read_to_string(format!("/proc/{}/status", child.id()))?;
        resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|text| text.trim().split(' ').next()?.parse().ok())
            .unwrap_or(0);
        child.kill()?;
        child.wait()?;
    }
    println!(
        "\nstart to protected, 1,000 endpoints: {:?} (median of 9); resident {resident} KiB",
        median(times).unwrap_or_default()
    );
    Ok(())
}

/// P8, by the command: 100,000 endpoints read, compiled, loaded, read back.
fn updates() -> Result<()> {
    let world = World::new()?;
    let mut times = Vec::new();
    for round in 0..5 {
        rules(&world, 100_000 - round)?;
        let started = Instant::now();
        world.apply()?;
        times.push(started.elapsed());
    }
    println!(
        "apply with 100,000 endpoints: {:?} (median of 5, process and file included)",
        median(times).unwrap_or_default()
    );
    let version = ran(Command::new("uname").arg("-rm"))?.stdout;
    println!("\non {}", version.trim());
    Ok(())
}
