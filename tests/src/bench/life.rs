//! P6, P7 and P8: from the start of a process to protection, with what is cached and without, and what a change takes.

use std::{
    fs,
    net::Ipv4Addr,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::Bench;
use crate::world::{World, binary, patience};

/// Endpoints of most figures here.
const SOME: u32 = 1_000;
/// And of the largest rule set.
const MANY: u32 = 100_000;

/// A configuration of so many endpoints from an address on.
fn configure(world: &World, backend: &str, first: u32, count: u32) -> Result<()> {
    let endpoints: Vec<String> = (0..count)
        .map(|host| format!("tcp://{}:{}", Ipv4Addr::from(first + host), world.port))
        .collect();
    world.configure(&format!(
        "backend = {backend:?}\n[target.main]\nendpoints = {endpoints:?}\nallow = [\"root\"]\n"
    ))
}

const FIRST: u32 = 0x0a00_0001;

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn command(world: &World, words: &[&str]) -> Result<Command> {
    let mut command = Command::new(binary("enforcer")?);
    command.arg("--config").arg(world.path("enforcer.toml")).args(words);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command)
}

/// P7: from the start of the process to the first refusal, and the memory that it has and had.
pub(super) fn starts(bench: &mut Bench) -> Result<()> {
    let (mut times, mut resident, mut peak) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds(41) {
        let world = World::new()?;
        configure(&world, "ebpf", FIRST, SOME)?;
        let pin = world.pins().join("connect6");
        let mut command = command(&world, &["run"])?;
        let started = Instant::now();
        let mut child = command.spawn()?;
        while !pin.exists() && started.elapsed() < patience() {
            thread::sleep(Duration::from_micros(100));
        }
        times.push(millis(started.elapsed()));
        thread::sleep(Duration::from_millis(300));
        let status = fs::read_to_string(format!("/proc/{}/status", child.id()))?;
        child.kill()?;
        child.wait()?;
        ensure!(pin.exists(), "the daemon does not protect");
        resident.extend(kilobytes(&status, "VmRSS:"));
        peak.extend(kilobytes(&status, "VmHWM:"));
    }
    let who = ("enforcer, ebpf", Some(SOME));
    bench.figure("P7", "start of the daemon to protection", who, "ms", times);
    bench.figure("P7", "memory, resident", who, "KiB", resident);
    bench.figure("P7", "memory, at most", who, "KiB", peak);
    Ok(())
}

fn kilobytes(status: &str, field: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().split(' ').next()?.parse().ok()
}

/// What a boot does before all else: the last rules, from what is cached and, as after a boot, from the disk alone.
pub(super) fn last_good(bench: &mut Bench) -> Result<()> {
    let (mut warm, mut cold) = (Vec::new(), Vec::new());
    let (mut ours, mut other) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds(41) {
        for (times, cached) in [(&mut warm, true), (&mut cold, false)] {
            let world = World::new()?;
            configure(&world, "ebpf", FIRST, SOME)?;
            world.apply()?;
            world.enforcer(&["unload"])?.demand(0)?;
            if !cached {
                drop_caches()?;
            }
            let command = command(&world, &["apply", "--last-good"])?;
            times.push(whole(command)?);
        }
        // What reading a program takes that does nothing.
        for (times, program) in [(&mut ours, binary("enforcer")?), (&mut other, "nft".into())] {
            let mut command = Command::new(program);
            command.arg("--version").stdout(Stdio::null());
            drop_caches()?;
            times.push(whole(command)?);
        }
    }
    let what = "apply --last-good, whole process";
    bench.figure("P7", what, ("enforcer, ebpf, cached", Some(SOME)), "ms", warm);
    bench.figure(
        "P7",
        what,
        ("enforcer, ebpf, after drop_caches", Some(SOME)),
        "ms",
        cold,
    );
    let what = "--version, after drop_caches";
    bench.figure("P7", what, ("enforcer", None), "ms", ours);
    bench.figure("P7", what, ("nft", None), "ms", other);
    Ok(())
}

/// Has all that is read next come from the disk.
fn drop_caches() -> Result<()> {
    const DROP: &str = "/proc/sys/vm/drop_caches";
    nix::unistd::sync();
    fs::write(DROP, "3").with_context(|| format!("write {DROP}"))
}

/// How long a process takes that succeeds.
fn whole(mut command: Command) -> Result<f64> {
    let started = Instant::now();
    ensure!(command.status()?.success(), "{command:?} fails");
    Ok(millis(started.elapsed()))
}

/// P6, as far as it is seen from outside: what the kernel's maps take of it is not.
pub(super) fn reloads(bench: &mut Bench) -> Result<()> {
    for (what, step) in [("one endpoint is another", 1), ("1,000 endpoints are others", SOME)] {
        let world = World::new()?;
        configure(&world, "ebpf", FIRST, SOME)?;
        let daemon = world.daemon()?;
        let mut times = Vec::new();
        for round in 1..=u32::try_from(bench.rounds(81))? {
            configure(&world, "ebpf", FIRST + round * step, SOME)?;
            let mut command = command(&world, &["reload"])?;
            let started = Instant::now();
            let status = command.status()?;
            times.push(millis(started.elapsed()));
            ensure!(status.success(), "reload: {status}");
        }
        drop(daemon);
        let what = format!("reload, command and all: {what}");
        bench.figure("P6", &what, ("enforcer, ebpf", Some(SOME)), "ms", times);
    }
    let why = "what the maps alone take of an update is not seen from outside; the reload above has it in it";
    bench.miss("P6, maps alone", why);
    Ok(())
}

/// P8, by the command: read, compiled, loaded, read back.
pub(super) fn updates(bench: &mut Bench) -> Result<()> {
    for backend in ["ebpf", "nftables"] {
        let world = World::new()?;
        let mut times = Vec::new();
        for round in 0..u32::try_from(bench.rounds(9))? {
            configure(&world, backend, FIRST + round, MANY)?;
            let mut command = command(&world, &["apply"])?;
            let started = Instant::now();
            ensure!(command.status()?.success(), "apply fails");
            // The first one is no update.
            if round > 0 {
                times.push(millis(started.elapsed()));
            }
        }
        world.enforcer(&["unload"])?.demand(0)?;
        let who = format!("enforcer, {backend}");
        bench.figure(
            "P8",
            "apply, one endpoint is another, whole process",
            (&who, Some(MANY)),
            "ms",
            times,
        );
    }
    Ok(())
}
