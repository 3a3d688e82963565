//! Measures against the budgets: scenarios in turn, many rounds, medians and ratios. Needs root; nothing else should run.
//! An argument, `connects`, `nftables`, `programs`, `starts` or `updates`, chooses one part.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns};
use tests::{
    attack::Way,
    foreign::{ForeignProgram, Runs, Sharing, runs_of_link},
    world::{Attack, Listener, NOBODY, Netns, World, binary, ran},
};

type Part = fn() -> Result<()>;

const ROUNDS: usize = 21;
const CONNECTS: usize = 1000;

fn main() -> Result<()> {
    let only = std::env::args().nth(1);
    let parts: [(&str, Part); 5] = [
        ("connects", connects),
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

/// P3, P4, P5 with nftables: two network namespaces in turn, one without any rule.
fn nftables() -> Result<()> {
    println!(
        "\nnftables: connect, and a byte there and back on an established connection; medians of {ROUNDS} rounds in turn"
    );
    println!(
        "{:>10}  {:>12}  {:>12}  {:>12}  {:>12}  {:>10}",
        "endpoints", "no rules", "unprotected", "allowed", "denied", "established"
    );
    for count in [1, 1_000, 10_000, 100_000] {
        let (bare, world) = (World::new()?, World::new()?);
        let (without, with) = (Netns::new(&bare, "b")?, Netns::new(&world, "b")?);
        let _first = Listener::start(Some(&without.file()), bare.port, &[])?;
        let _second = Listener::start(Some(&with.file()), world.port, &[])?;
        rules(&world, count)?;
        let text = fs::read_to_string(world.path("enforcer.toml"))?.replace("\"ebpf\"", "\"nftables\"");
        fs::write(world.path("enforcer.toml"), text)?;
        let started = Instant::now();
        with.enforcer(&world, &["apply"])?.demand(0)?;
        let installed = started.elapsed();
        let elsewhere = |world: &World| SocketAddr::new(IpAddr::from([127, 0, 0, 1]), world.port);
        let attacks: [Attack; 4] = [
            bare.attack(0).to(elsewhere(&bare)).in_netns(&without)?,
            world.attack(0).to(elsewhere(&world)).in_netns(&with)?,
            world.attack(0).in_netns(&with)?,
            world.attack(NOBODY).in_netns(&with)?,
        ];
        let mut times: [Vec<u128>; 4] = Default::default();
        let mut trips: [Vec<u128>; 2] = Default::default();
        for _ in 0..ROUNDS {
            for (attack, times) in attacks.iter().zip(&mut times) {
                times.push(attack.measure(CONNECTS)?);
            }
            for (netns, trips) in [&without, &with].into_iter().zip(&mut trips) {
                trips.push(round_trips(&netns.file())?);
            }
        }
        let medians = times.map(|times| median(times).unwrap_or(0));
        let [before, after] = trips.map(|trips| median(trips).unwrap_or(1));
        let [first, ..] = medians;
        #[allow(clippy::cast_precision_loss, reason = "a ratio of small numbers")]
        let ratio = |time: u128, to: u128| time as f64 / to as f64;
        #[allow(clippy::cast_precision_loss, reason = "a few microseconds")]
        let cell = |time: u128| format!("{:.2} µs {:.3}", time as f64 / 1000.0, ratio(time, first));
        println!(
            "{count:>10}  {}  {:>10.3}   installed and read back in {} ms",
            medians.map(|time| format!("{:>12}", cell(time))).join("  "),
            ratio(after, before),
            installed.as_millis()
        );
    }
    Ok(())
}

/// Nanoseconds for a byte there and back, mean of many, over loopback of a network namespace.
fn round_trips(netns: &std::path::Path) -> Result<u128> {
    const TRIPS: u32 = 5000;
    let netns = netns.to_path_buf();
    let work = move || -> Result<u128> {
        setns(fs::File::open(netns)?, CloneFlags::CLONE_NEWNET)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut near = TcpStream::connect(listener.local_addr()?)?;
        let (mut far, _) = listener.accept()?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let mut byte = [0];
        let started = Instant::now();
        for _ in 0..TRIPS {
            near.write_all(&byte)?;
            far.read_exact(&mut byte)?;
            far.write_all(&byte)?;
            near.read_exact(&mut byte)?;
        }
        Ok(started.elapsed().as_nanos() / u128::from(TRIPS))
    };
    let done = std::thread::spawn(work).join();
    done.map_err(|_| anyhow::anyhow!("the round trips' thread panicked"))?
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
