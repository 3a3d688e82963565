//! Measures against the budgets. Needs root; nothing else should run.

use std::process::ExitCode;

use clap::Parser as _;
use tests::{bench, machine};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let Some((bench::worker::MARK, rest)) = words.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return finish(bench::worker::serve(rest));
    }
    let options = bench::Options::parse();
    machine::inside(|| finish(bench::run(&options)))
}

fn finish(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: error: {error:#}");
            ExitCode::from(2)
        }
    }
}
