//! P2: what a program adds to an empty one, by the kernel's own statistics.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};

use super::{Bench, Contender, events::Events};
use crate::{
    attack::Way,
    foreign::{ForeignProgram, Runs, Sharing, runs_of_link},
    world::{Attack, NOBODY, World},
};

/// Where statistics are switched on (Linux 5.1).
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";
const ROUNDS: usize = 81;
/// Connects of a slice.
const CALLS: usize = 5_000;
/// Denied ones: no more than the ring buffer has room for, as a denial without an event costs less.
const DENIED_CALLS: usize = 2_000;
/// What all times are compared with.
const EMPTY: &str = "empty program";
/// Attempts that our program allows and another one refuses: they do not go on to connect, so the caches keep what a
/// connect would evict.
const HOT: &str = "allowed, with warm caches";
/// What those are compared with: they are refused too.
const HOT_EMPTY: &str = "empty program, with warm caches";
/// Programs that show what of a time is the machine's: by additions, about as many as an allowed attempt has
/// instructions, and by calls.
const FLOORS: [(&str, usize, usize); 3] = [
    ("280 additions", 280, 0),
    ("one call of a helper", 0, 1),
    ("ten calls of a helper", 0, 10),
];

pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    let before = fs::read_to_string(STATS).context("this kernel counts no program's time")?;
    fs::write(STATS, "1").with_context(|| format!("write {STATS}"))?;
    let result = with_statistics(bench);
    fs::write(STATS, before)?;
    result
}

/// Nanoseconds a run, over those that an attack makes.
fn per_run(runs: &dyn Fn() -> Result<Runs>, attack: &Attack, calls: usize) -> Result<f64> {
    let before = runs()?;
    attack.clone().way(Way::UdpConnect).measure(calls)?;
    let after = runs()?;
    ensure!(after.count > before.count, "the program did not run");
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    Ok((after.time - before.time) as f64 / (after.count - before.count) as f64)
}

/// A world that root alone may reach, among a thousand endpoints.
fn guarded() -> Result<World> {
    let world = World::new()?;
    let mut endpoints: Vec<String> = (0..1_000)
        .map(|host| format!("udp://{}:{}", Ipv4Addr::from(0x0a00_0000 + host), world.port))
        .collect();
    endpoints.push(format!("udp://{}", world.here()));
    world.configure(&format!(
        "backend = \"ebpf\"\n[target.main]\nendpoints = {endpoints:?}\nallow = [\"root\"]\n"
    ))?;
    world.apply()?;
    Ok(world)
}

fn contender<'a>(who: &str, runs: &'a dyn Fn() -> Result<Runs>, attack: Attack) -> Contender<'a> {
    Contender {
        who: who.to_owned(),
        endpoints: Some(1_001),
        slice: Box::new(move || per_run(runs, &attack, CALLS)),
    }
}

/// Each slice finds the ring buffer empty, and leaves the events of all its attempts there.
fn denied<'a>(runs: &'a dyn Fn() -> Result<Runs>, world: &World) -> Result<Contender<'a>> {
    let (attack, mut ring) = (world.attack(NOBODY), Events::open(world)?);
    Ok(Contender {
        who: "denied, with its event".to_owned(),
        endpoints: Some(1_001),
        slice: Box::new(move || {
            ring.drain();
            let time = per_run(runs, &attack, DENIED_CALLS)?;
            let events = ring.drain();
            ensure!(events >= DENIED_CALLS, "{events} events of {DENIED_CALLS} denials");
            Ok(time)
        }),
    })
}

fn with_statistics(bench: &mut Bench) -> Result<()> {
    let (empty, world, hot_empty, hot) = (World::new()?, guarded()?, World::new()?, guarded()?);
    let listeners = [&empty, &world, &hot_empty, &hot].map(World::listen);
    let _listeners: Vec<_> = listeners.into_iter().collect::<Result<_>>()?;
    let program = ForeignProgram::passing(&empty.cgroup, Sharing::None)?;
    let hot_program = ForeignProgram::passing(&hot_empty.cgroup, Sharing::Multi)?;
    let _refusing = [
        ForeignProgram::refusing(&hot_empty.cgroup, Sharing::Multi)?,
        ForeignProgram::refusing(&hot.cgroup, Sharing::Multi)?,
    ];
    let mut floors = Vec::new();
    for (who, additions, calls) in FLOORS {
        let world = World::new()?;
        let listener = world.listen()?;
        let program = ForeignProgram::working(&world.cgroup, additions, calls)?;
        floors.push((who, world, program, listener));
    }
    let [pin, hot_pin] = [&world, &hot].map(|world| world.pins().join("connect4"));
    let other_port = SocketAddr::new(IpAddr::from(Ipv4Addr::LOCALHOST), empty.port);
    let other_address = SocketAddr::new(IpAddr::from(Ipv4Addr::LOCALHOST), world.port);
    let (of_empty, of_hot_empty) = (|| Ok(program.runs()?), || Ok(hot_program.runs()?));
    let (of_ours, of_hot) = (|| Ok(runs_of_link(&pin)?), || Ok(runs_of_link(&hot_pin)?));
    let of_floors: Vec<_> = floors
        .iter()
        .map(|(_, _, program, _)| move || Ok(program.runs()?))
        .collect();
    let mut all = vec![
        contender(EMPTY, &of_empty, empty.attack(0)),
        contender("empty program, again", &of_empty, empty.attack(0)),
        contender("port of no target", &of_ours, world.attack(0).to(other_port)),
        contender(
            "address that is no endpoint",
            &of_ours,
            world.attack(0).to(other_address),
        ),
        contender("allowed, both users checked", &of_ours, world.attack(0)),
        denied(&of_ours, &world)?,
        contender(HOT_EMPTY, &of_hot_empty, hot_empty.attack(0)),
        contender(HOT, &of_hot, hot.attack(0)),
    ];
    let floors = floors.iter().zip(&of_floors);
    all.extend(floors.map(|((who, world, ..), runs)| contender(who, runs, world.attack(0))));
    let what = "program time above an empty one";
    let times = bench.in_turn(what, bench.rounds(ROUNDS), &mut all);
    let whos: Vec<String> = all.iter().map(|one| one.who.clone()).collect();
    drop(all);
    let of = |who: &str| {
        let at = whos.iter().position(|one| one == who);
        let times = at.and_then(|at| times.get(at)).filter(|times| !times.is_empty());
        times.with_context(|| format!("{who}: there is nothing to compare with"))
    };
    let alone = "an empty program, statistics and all";
    bench.figure("", alone, (EMPTY, None), "ns", of(EMPTY)?.clone());
    let machine = "what of that any program takes, above an empty one";
    for (who, times) in whos.iter().zip(&times) {
        let (id, what, endpoints, control) = match who.as_str() {
            EMPTY | HOT_EMPTY => continue,
            HOT => ("", machine, Some(1_001), of(HOT_EMPTY)?),
            who if FLOORS.iter().any(|(floor, ..)| *floor == who) => ("", machine, None, of(EMPTY)?),
            _ => ("P2", what, Some(1_001), of(EMPTY)?),
        };
        let above = times.iter().zip(control).map(|(time, control)| time - control);
        bench.figure(id, what, (who, endpoints), "ns", above.collect());
    }
    Ok(())
}
