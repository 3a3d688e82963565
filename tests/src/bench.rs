//! Figures that a reader can check: every budget and what a user would pick instead, in one run, in turn.
//!
//! A [`Scenario`] is a line of a list; it hands contenders to one runner ([`Bench::compare`]), which takes a slice of
//! each by turns, the one without any rules first, and the same without rules a second time: how far those two differ
//! is what such a comparison can tell here. What cannot be measured is a line of the report, and the rest goes on.

mod conditions;
mod events;
mod forwarded;
mod idle;
pub mod instructions;
mod life;
mod plot;
mod programs;
mod report;
mod rivals;
mod statistics;
mod traffic;
pub mod worker;

use std::{
    fs,
    io::{self, IsTerminal as _},
    os::unix::fs::{MetadataExt as _, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use self::{
    conditions::{Conditions, Machine},
    report::{Figure, Missing, Report, SCHEMA},
    statistics::Estimate,
};

/// Measures against the budgets, beside what else would do.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench")]
pub struct Options {
    /// Only these parts: instructions, programs, traffic, forwarded, start, last-good, reload, update, idle
    part: Vec<String>,
    /// Few rounds, to try it out
    #[arg(long)]
    quick: bool,
    /// Numbers of endpoints at which traffic is measured, instead of 1 to 100,000
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    endpoints: Vec<u32>,
    /// Write the figures to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the plots to this directory
    #[arg(long)]
    plots: Option<PathBuf>,
    /// Print beside each figure the one of an earlier run
    #[arg(long, value_name = "OLD.json")]
    compare: Option<PathBuf>,
    /// Measure nothing: print and plot what an earlier run found
    #[arg(long, value_name = "OLD.json")]
    from: Option<PathBuf>,
}

/// A part of the run.
struct Scenario {
    name: &'static str,
    /// What of the whole time it takes.
    share: u64,
    run: fn(&mut Bench) -> Result<()>,
}

/// All parts, in this order.
const SCENARIOS: [Scenario; 9] = [
    Scenario {
        name: "instructions",
        share: 1,
        run: instructions,
    },
    Scenario {
        name: "programs",
        share: 5,
        run: programs::measure,
    },
    Scenario {
        name: "traffic",
        share: 60,
        run: traffic::measure,
    },
    Scenario {
        name: "forwarded",
        share: 10,
        run: forwarded::measure,
    },
    Scenario {
        name: "start",
        share: 3,
        run: life::starts,
    },
    Scenario {
        name: "last-good",
        share: 3,
        run: life::last_good,
    },
    Scenario {
        name: "reload",
        share: 2,
        run: life::reloads,
    },
    Scenario {
        name: "update",
        share: 3,
        run: life::updates,
    },
    Scenario {
        name: "idle",
        share: 14,
        run: idle::measure,
    },
];
/// Ticks of the progress bar for a share.
const TICKS: u64 = 1000;

/// A run as it goes.
struct Bench {
    quick: bool,
    /// Numbers of endpoints that were asked for; none for the usual ones.
    endpoints: Vec<u32>,
    bar: ProgressBar,
    /// Ticks of the bar when the part began, and those that it has.
    part: (u64, u64),
    figures: Vec<Figure>,
    missing: Vec<Missing>,
    instructions: Vec<instructions::Count>,
}

/// One of those that are compared.
struct Contender<'a> {
    who: String,
    endpoints: Option<u32>,
    /// Does a slice of work, and says how long a piece of it took, in nanoseconds.
    slice: Box<dyn FnMut() -> Result<f64> + 'a>,
}

/// Measures, prints, writes.
pub fn run(options: &Options) -> Result<()> {
    let report = match &options.from {
        Some(from) => read(from)?,
        None => measure(options)?,
    };
    let old = options.compare.as_deref().map(read).transpose()?;
    println!("{}", report::table(&report, old.as_ref()));
    if let Some(path) = &options.json {
        write(path, &(serde_json::to_string_pretty(&report)? + "\n"))?;
    }
    if let Some(dir) = &options.plots {
        for (name, svg) in plot::all(&report)? {
            write(&dir.join(name), &svg)?;
        }
    }
    Ok(())
}

fn measure(options: &Options) -> Result<Report> {
    let known = |part: &&String| SCENARIOS.iter().any(|scenario| scenario.name == part.as_str());
    let unknown: Vec<&String> = options.part.iter().filter(|part| !known(part)).collect();
    ensure!(unknown.is_empty(), "there is no part {unknown:?}; --help lists them");
    let chosen: Vec<&Scenario> = SCENARIOS
        .iter()
        .filter(|scenario| options.part.is_empty() || options.part.iter().any(|part| part == scenario.name))
        .collect();

    let machine = Machine::here()?;
    let before = Conditions::now()?;
    let mut warnings = machine.warnings();
    warnings.extend(before.warning("before"));
    for warning in &warnings {
        eprintln!("warning: {warning}");
    }
    let mut bench = Bench::new(options.quick, chosen.iter().map(|scenario| scenario.share).sum());
    bench.endpoints.clone_from(&options.endpoints);
    for scenario in chosen {
        bench.begin(scenario);
        // What fails costs only itself.
        if let Err(error) = (scenario.run)(&mut bench) {
            bench.miss(scenario.name, &format!("{error:#}"));
        }
    }
    bench.bar.finish_and_clear();
    let after = Conditions::now()?;
    warnings.extend(after.warning("after"));
    Ok(Report {
        schema: SCHEMA,
        machine,
        quick: options.quick,
        before,
        after,
        warnings,
        figures: bench.figures,
        missing: bench.missing,
        instructions: bench.instructions,
    })
}

impl Bench {
    fn new(quick: bool, shares: u64) -> Self {
        let bar = if io::stderr().is_terminal() {
            ProgressBar::new(shares * TICKS)
        } else {
            ProgressBar::hidden()
        };
        if let Ok(style) = ProgressStyle::with_template("  {bar:30} {percent:>3} % {msg}, {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_secs(1));
        Self {
            quick,
            endpoints: Vec::new(),
            bar,
            part: (0, 0),
            figures: Vec::new(),
            missing: Vec::new(),
            instructions: Vec::new(),
        }
    }

    fn begin(&mut self, scenario: &Scenario) {
        let (began, ticks) = self.part;
        self.part = (began + ticks, scenario.share * TICKS);
        self.bar.set_position(self.part.0);
        self.say(scenario.name);
    }

    /// What is done now.
    fn say(&self, what: &str) {
        if self.bar.is_hidden() {
            eprintln!("bench: {what}");
        }
        self.bar.set_message(what.to_owned());
    }

    /// How much of the part is done.
    fn done(&self, of: usize, all: usize) {
        let (began, ticks) = self.part;
        self.bar.set_position(began + ticks * of as u64 / all.max(1) as u64);
    }

    /// So many rounds, or few of them.
    fn rounds(&self, full: usize) -> usize {
        if self.quick { (full / 40).max(3) } else { full }
    }

    fn miss(&mut self, what: &str, why: &str) {
        let why = why.lines().next().unwrap_or_default().to_owned();
        if self.missing.iter().any(|one| one.what == what && one.why == why) {
            return;
        }
        self.bar.suspend(|| eprintln!("not measured: {what}: {why}"));
        self.missing.push(Missing {
            what: what.to_owned(),
            why,
        });
    }

    fn figure(&mut self, budget: &str, what: &str, who: (&str, Option<u32>), unit: &str, samples: Vec<f64>) {
        let Some(estimate) = Estimate::of(samples) else {
            return self.miss(what, &format!("{}: no samples", who.0));
        };
        self.figures.push(Figure {
            budget: budget.to_owned(),
            what: what.to_owned(),
            who: who.0.to_owned(),
            endpoints: who.1,
            unit: unit.to_owned(),
            estimate,
        });
    }

    /// Takes a slice of each by turns, round by round, each round beginning with another one; of each the ratio to the
    /// first in the same round, and of the first how long its slices took.
    fn compare(&mut self, budget: &str, what: &str, rounds: usize, contenders: &mut [Contender<'_>]) -> Result<()> {
        let times = self.in_turn(what, rounds, contenders);
        let Some((control, others)) = times.split_first().filter(|(control, _)| !control.is_empty()) else {
            bail!("{what}: there is nothing to compare with");
        };
        let micros = control.iter().map(|time| time / 1000.0).collect();
        let name = format!("{what}, without rules");
        let of = |contender: &Contender<'_>| (contender.who.clone(), contender.endpoints);
        let whos: Vec<_> = contenders.iter().map(of).collect();
        if let Some((who, endpoints)) = whos.first() {
            self.figure("", &name, (who, *endpoints), "µs", micros);
        }
        for ((who, endpoints), times) in whos.iter().skip(1).zip(others).filter(|(_, times)| !times.is_empty()) {
            let ratios = times
                .iter()
                .zip(control)
                .map(|(time, control)| time / control)
                .collect();
            self.figure(budget, what, (who, *endpoints), "ratio", ratios);
        }
        Ok(())
    }

    /// Times by contender and round. One that fails costs only itself, and has none then.
    fn in_turn(&mut self, what: &str, rounds: usize, contenders: &mut [Contender<'_>]) -> Vec<Vec<f64>> {
        let count = contenders.len();
        let mut times = vec![Some(Vec::with_capacity(rounds)); count];
        for round in 0..rounds {
            for turn in 0..count {
                let at = (round + turn) % count;
                let (Some(contender), Some(place)) = (contenders.get_mut(at), times.get_mut(at)) else {
                    continue;
                };
                let Some(times) = place else { continue };
                match (contender.slice)() {
                    Ok(time) => times.push(time),
                    Err(error) => {
                        self.miss(&format!("{what}, {}", contender.who), &format!("{error:#}"));
                        *place = None;
                    }
                }
            }
        }
        times.into_iter().map(Option::unwrap_or_default).collect()
    }
}

fn instructions(bench: &mut Bench) -> Result<()> {
    bench.instructions = instructions::counts()?;
    Ok(())
}

fn read(path: &Path) -> Result<Report> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let report: Report = serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))?;
    ensure!(
        report.schema == SCHEMA,
        "{} is of version {}; this reads {SCHEMA}",
        path.display(),
        report.schema
    );
    Ok(report)
}

/// Writes a file that belongs to whom its directory does: the bench runs as root, in somebody's working copy.
fn write(path: &Path, text: &str) -> Result<()> {
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    let owner = fs::metadata(dir)?;
    chown(path, Some(owner.uid()), Some(owner.gid()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_turn_and_is_compared_in_its_round() -> Result<()> {
        let order = std::cell::RefCell::new(String::new());
        let contender = |who: char, time: f64, fails: bool| Contender {
            who: who.to_string(),
            endpoints: None,
            slice: Box::new({
                let order = &order;
                let mut time = time;
                move || {
                    order.borrow_mut().push(who);
                    time *= 2.0;
                    ensure!(!fails, "no");
                    Ok(time)
                }
            }),
        };
        let mut bench = Bench::new(true, 1);
        let mut all = [
            contender('a', 1000.0, false),
            contender('b', 1500.0, false),
            contender('c', 1.0, true),
        ];
        bench.compare("P1", "connect", 3, &mut all)?;
        drop(all);
        assert_eq!(order.into_inner(), "abcbaab");
        assert_eq!(
            bench.missing.iter().map(|one| one.what.as_str()).collect::<Vec<_>>(),
            ["connect, c"]
        );
        let [control, ratio] = bench.figures.as_slice() else {
            anyhow::bail!("{} figures", bench.figures.len());
        };
        assert_eq!((control.unit.as_str(), control.estimate.median.round()), ("µs", 4.0));
        assert_eq!(
            (ratio.unit.as_str(), ratio.estimate.median, ratio.estimate.high),
            ("ratio", 1.5, 1.5)
        );
        Ok(())
    }
}
