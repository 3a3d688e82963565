//! Runs the privileged suite for one backend. A part of a name given as argument chooses cases, and so does
//! `ENFORCER_TEST_CASES`, a list of names or beginnings of names (`d3_*`) with commas between; `--list` lists them with
//! the backends that each is run on.

use std::{env, process::ExitCode, sync::Arc};

use anyhow::Result;
use clap::{Parser, ValueEnum as _};
use libtest_mimic::{Arguments, Conclusion, Failed, Trial};
use nix::unistd::geteuid;
use tests::{
    backend::{self, Backend},
    cases::{self, Case},
    machine,
    record::Record,
};

/// The privileged suite.
#[derive(Parser)]
struct Cli {
    /// What enforces; `ebpf` if not given, and all that cases are run on with `--list`
    #[arg(long, value_enum)]
    backend: Option<Backend>,
    #[command(flatten)]
    arguments: Arguments,
}

fn main() -> ExitCode {
    let Cli { backend, arguments } = Cli::parse();
    if !geteuid().is_root() && !arguments.list {
        eprintln!("the privileged suite did not run: it needs root; run it through `cargo xtask test`");
        return ExitCode::from(2);
    }
    if arguments.list {
        return run(backend, &arguments);
    }
    machine::inside(|| run(backend, &arguments))
}

fn run(backend: Option<Backend>, arguments: &Arguments) -> ExitCode {
    let trials = match trials(backend, arguments) {
        Ok(trials) => trials,
        Err(error) => {
            eprintln!("the privileged suite did not run: {error:#}");
            return ExitCode::from(2);
        }
    };
    let conclusion: Conclusion = libtest_mimic::run(arguments, trials);
    backend::clean_up();
    match tests::world::leftovers() {
        Ok(left) if left.is_empty() => conclusion.exit_code(),
        Ok(left) => {
            eprintln!("left behind: {}", left.join(", "));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("look for what was left behind: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The cases chosen, for the backend chosen.
fn trials(backend: Option<Backend>, arguments: &Arguments) -> Result<Vec<Trial>> {
    backend.map_or(Ok(()), Backend::choose)?;
    let chosen = backend.or_else(|| (!arguments.list).then(Backend::current));
    let record = Arc::new(Record::open()?);
    let cases = cases::chosen(&env::var("ENFORCER_TEST_CASES").unwrap_or_default())?;
    let run = cases
        .into_iter()
        .filter(|case| chosen.is_none_or(|backend| case.is_on(backend)));
    let (mut trials, mut left_out) = (Vec::new(), Vec::new());
    for case in run {
        let lacking = chosen.map_or_else(Vec::new, |backend| case.lacking(backend));
        if lacking.is_empty() {
            trials.push(trial(case, chosen, Arc::clone(&record)));
        } else {
            left_out.push(format!("{} ({lacking:?})", case.name));
        }
    }
    if !left_out.is_empty() {
        eprintln!(
            "{} cases are not for this kernel, by what it lacks: {}",
            left_out.len(),
            left_out.join(", ")
        );
    }
    Ok(trials)
}

/// Its kind is the backend that it is run on, or all of them.
fn trial(case: Case, chosen: Option<Backend>, record: Arc<Record>) -> Trial {
    let Case { name, on, run, .. } = case;
    let all = chosen.as_ref().map_or(on, std::slice::from_ref);
    let names = all.iter().filter_map(Backend::to_possible_value);
    let kind: Vec<String> = names.map(|value| value.get_name().to_owned()).collect();
    let recorded = name.clone();
    let test = move || {
        let result = record.case(&recorded, run);
        result.map_err(|error| Failed::from(format!("{error:?}")))
    };
    Trial::test(name, test).with_kind(kind.join(" "))
}
