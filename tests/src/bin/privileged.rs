//! Runs the privileged suite. Names given as arguments choose cases; `--list` lists them.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Conclusion, Failed, Trial};
use nix::unistd::geteuid;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if !geteuid().is_root() && !arguments.list {
        eprintln!("the privileged suite did not run: it needs root; run it through `cargo xtask test`");
        return ExitCode::from(2);
    }
    let trials = tests::cases::all()
        .into_iter()
        .map(|(name, run)| Trial::test(name, move || run().map_err(|error| Failed::from(format!("{error:?}")))));
    let conclusion: Conclusion = libtest_mimic::run(&arguments, trials.collect());
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
