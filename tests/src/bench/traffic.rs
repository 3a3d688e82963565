//! P1, P3, P4, P5 and what installing and updating takes: us and the others, at 1 to 100,000 endpoints.

use std::time::Duration;

use anyhow::Result;

use super::{
    Bench, Contender,
    rivals::{Installed, RIVALS, Rival},
};

/// So many endpoints each time.
const COUNTS: [u32; 5] = [1, 100, 1_000, 10_000, 100_000];
/// Those of a trial.
const QUICK: [u32; 3] = [1, 100, 10_000];

pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    let counts = match (bench.endpoints.is_empty(), bench.quick) {
        (false, _) => bench.endpoints.clone(),
        (true, true) => QUICK.to_vec(),
        (true, false) => COUNTS.to_vec(),
    };
    for (done, count) in counts.iter().enumerate() {
        bench.done(done, counts.len());
        at(bench, *count)?;
    }
    Ok(())
}

fn at(bench: &mut Bench, count: u32) -> Result<()> {
    let mut all: Vec<Installed> = Vec::new();
    for rival in RIVALS {
        bench.say(&format!("traffic, {count} endpoints: install {}", rival.name()));
        match install(bench, rival, count) {
            Ok(installed) => all.push(installed),
            Err(error) if rival == Rival::Nobody => return Err(error),
            Err(error) => bench.miss(&format!("{}, {count} endpoints", rival.name()), &format!("{error:#}")),
        }
    }
    bench.say(&format!("traffic, {count} endpoints: connect, denial, established"));
    connects(bench, &mut all, count)?;
    denials(bench, &mut all, count);
    bench.say(&format!("traffic, {count} endpoints: update"));
    for installed in all.iter_mut().filter(|installed| installed.rival.protects()) {
        let who = installed.rival.name();
        let rounds = if bench.quick { 3 } else { 9 };
        let times: Result<Vec<Duration>> = (0..rounds).map(|_| installed.update()).collect();
        match times {
            Ok(times) => bench.figure(
                "P8",
                "one endpoint more, by its command",
                (who, Some(count)),
                "ms",
                millis(&times),
            ),
            Err(error) => bench.miss(&format!("update, {who}, {count} endpoints"), &format!("{error:#}")),
        }
    }
    Ok(())
}

/// Installs it, and says how long that took: several times, of which the last one stays.
fn install(bench: &mut Bench, rival: Rival, count: u32) -> Result<Installed> {
    let again = match (bench.quick || !rival.protects(), count) {
        (true, _) => 0,
        (false, ..10_000) => 8,
        (false, ..100_000) => 4,
        (false, _) => 2,
    };
    let mut times = Vec::new();
    for _ in 0..again {
        times.push(rival.install(count)?.took);
    }
    let installed = rival.install(count)?;
    times.push(installed.took);
    if rival.protects() {
        bench.figure(
            "P8",
            "installed, by its command",
            (rival.name(), Some(count)),
            "ms",
            millis(&times),
        );
    }
    Ok(installed)
}

fn millis(times: &[Duration]) -> Vec<f64> {
    times.iter().map(|time| time.as_secs_f64() * 1000.0).collect()
}

/// A slice of one that is installed.
type Slice = fn(&mut Installed) -> Result<f64>;

/// P1 and P4, P3.
fn connects(bench: &mut Bench, all: &mut [Installed], count: u32) -> Result<()> {
    const ROUNDS: usize = 801;
    let kinds: [(&str, &str, Slice); 4] = [
        ("P1 P4", "TCP connect, another port", |one| {
            one.root.connect(one.elsewhere())
        }),
        ("P1 P4", "TCP connect, an address that is no endpoint", |one| {
            one.root.connect(one.beside())
        }),
        ("P1 P4", "TCP connect, allowed", |one| one.root.connect(one.endpoint())),
        ("P3", "established, a byte there and back", |one| {
            one.root.trips(one.endpoint())
        }),
    ];
    for (budget, what, slice) in kinds {
        let mut contenders = contenders(all, count, slice);
        let rounds = bench.rounds(ROUNDS);
        bench.compare(budget, what, rounds, &mut contenders)?;
    }
    Ok(())
}

fn contenders(all: &mut [Installed], count: u32, slice: Slice) -> Vec<Contender<'_>> {
    let mut contenders: Vec<Contender<'_>> = Vec::new();
    for one in all {
        contenders.push(Contender {
            who: one.rival.name().to_owned(),
            endpoints: Some(count),
            slice: Box::new(move || slice(one)),
        });
    }
    contenders
}

/// P5.
fn denials(bench: &mut Bench, all: &mut [Installed], count: u32) {
    const ROUNDS: usize = 401;
    const WHAT: &str = "denial, as its caller sees it";
    for one in all.iter().filter(|one| one.rival.protects() && one.nobody.is_none()) {
        let why = "its rules drop the packet: the caller hangs for two minutes";
        bench.miss(&format!("{WHAT}, {}", one.rival.name()), why);
    }
    let slice: Slice = |one| {
        let to = one.endpoint();
        if let Some(events) = &mut one.events {
            events.drain();
        }
        let nobody = one.nobody.as_mut();
        nobody.map_or(Ok(f64::NAN), |nobody| nobody.refused(to))
    };
    let mut contenders = contenders(all, count, slice);
    contenders.retain(|one| RIVALS.iter().any(|rival| rival.name() == one.who && rival.protects()));
    let times = bench.in_turn(WHAT, bench.rounds(ROUNDS), &mut contenders);
    for (one, times) in contenders.iter().zip(times) {
        if !times.is_empty() && times.iter().all(|time| time.is_finite()) {
            let micros = times.iter().map(|time| time / 1000.0).collect();
            bench.figure("P5", WHAT, (&one.who, one.endpoints), "µs", micros);
        }
    }
}
