//! One attempt in a process of its own.

use std::{io, process::ExitCode};

use clap::Parser as _;

fn main() -> io::Result<ExitCode> {
    tests::attack::main(&tests::attack::Attempt::parse())?;
    Ok(ExitCode::SUCCESS)
}
