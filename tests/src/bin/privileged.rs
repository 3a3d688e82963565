//! Runs the privileged suite. A part of a name given as argument chooses cases, and so does `ENFORCER_TEST_CASES`, a list of names or
//! beginnings of names (`d3_*`) with commas between; `--list` lists them.

use std::{env, process::ExitCode, sync::Arc};

use libtest_mimic::{Arguments, Conclusion, Failed, Trial};
use nix::unistd::geteuid;
use tests::{cases, record::Record};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if !geteuid().is_root() && !arguments.list {
        eprintln!("the privileged suite did not run: it needs root; run it through `cargo xtask test`");
        return ExitCode::from(2);
    }
    let ready = cases::chosen(&env::var("ENFORCER_TEST_CASES").unwrap_or_default())
        .and_then(|cases| Ok((cases, Arc::new(Record::open()?))));
    let (cases, record) = match ready {
        Ok(ready) => ready,
        Err(error) => {
            eprintln!("the privileged suite did not run: {error:#}");
            return ExitCode::from(2);
        }
    };
    let trials = cases.into_iter().map(|(name, run)| {
        let record = Arc::clone(&record);
        Trial::test(name.clone(), move || {
            let result = record.case(&name, run);
            result.map_err(|error| Failed::from(format!("{error:?}")))
        })
    });
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
