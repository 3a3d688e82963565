//! Runs the privileged suite for one backend. Names given as arguments choose cases; `--list` lists them with the backends that each
//! is run on.

use std::process::ExitCode;

use clap::{Parser, ValueEnum as _};
use libtest_mimic::{Arguments, Conclusion, Failed, Trial};
use nix::unistd::geteuid;
use tests::{
    backend::{self, Backend},
    cases::Case,
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
    if let Err(error) = backend.map_or(Ok(()), Backend::choose) {
        eprintln!("{error:#}");
        return ExitCode::from(2);
    }
    let chosen = backend.or_else(|| (!arguments.list).then(Backend::current));
    let trials = tests::cases::all()
        .into_iter()
        .filter(|case| chosen.is_none_or(|backend| case.on.contains(&backend)))
        .map(|case| trial(case, chosen));
    let conclusion: Conclusion = libtest_mimic::run(&arguments, trials.collect());
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

/// Its kind is the backend that it is run on, or all of them.
fn trial(case: Case, chosen: Option<Backend>) -> Trial {
    let Case { name, on, run } = case;
    let all = chosen.as_ref().map_or(on, std::slice::from_ref);
    let names = all.iter().filter_map(Backend::to_possible_value);
    let kind: Vec<String> = names.map(|value| value.get_name().to_owned()).collect();
    Trial::test(name, move || run().map_err(|error| Failed::from(format!("{error:?}")))).with_kind(kind.join(" "))
}
