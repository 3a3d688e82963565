//! Writes what a package holds besides the program, from the program's own words: man pages, completions, the example
//! configuration.

mod commands;
mod configuration;

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;
use clap_complete::aot::{Shell, generate_to};
use enforcer::cli::Cli;

fn main() -> Result<()> {
    let out = env::args_os()
        .nth(1)
        .map(PathBuf::from)
        .context("usage: pages DIRECTORY")?;
    let command = Cli::command().disable_help_subcommand(true);
    let man = made(&out.join("man"))?;
    commands::write_pages(&man, &command)?;
    write(&man.join("enforcer.toml.5"), &configuration::page()?)?;
    write(&out.join("enforcer.toml"), &configuration::example()?)?;
    let completions = made(&out.join("completions"))?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        generate_to(shell, &mut command.clone(), "enforcer", &completions)
            .with_context(|| format!("write the completions of {shell}"))?;
    }
    Ok(())
}

fn made(dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    Ok(dir.into())
}

fn write(path: &Path, text: &[u8]) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// A section of terms and what they mean.
fn list<'a>(page: &mut Vec<u8>, title: &str, entries: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<()> {
    writeln!(page, ".SH \"{title}\"")?;
    for (term, meaning) in entries {
        writeln!(page, ".TP\n\\fB{}\\fR\n{}", roff(term), roff(meaning))?;
    }
    Ok(())
}

/// A line of text as roff has it; what is between backticks in bold.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
    let parts = text.split('`').enumerate();
    let line: String = parts
        .map(|(number, part)| match number % 2 {
            0 => part.to_owned(),
            _ => format!("\\fB{part}\\fR"),
        })
        .collect();
    // A line that begins with a full stop is a request.
    if line.starts_with('.') {
        format!("\\&{line}")
    } else {
        line
    }
}
