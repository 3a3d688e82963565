//! Writes what a package holds besides the program, from the program's own words: man pages, completions, the default
//! configuration.

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::{Command, CommandFactory as _};
use clap_complete::aot::{Shell, generate_to};
use clap_mangen::Man;
use enforcer::{cli::Cli, config::Config};

/// Administration tools and daemons (man 7 man-pages).
const SECTION: &str = "8";

/// What the commented file shows besides the defaults: targets, as an example.
const EXAMPLE: &str = r#"
[target.bus]
endpoints = ["nats://nats.example.internal:4222", "tcp://10.0.0.5:4222", "tcp://[2001:db8::5]:4222"]
allow = ["root", { user = "agent", cgroup = "/system.slice/agent.service" }]

[target.monit]
endpoints = ["tcp://127.0.0.1:2822", "tcp://[::1]:2822"]
allow = ["root"]
"#;

fn main() -> Result<()> {
    let out = env::args_os()
        .nth(1)
        .map(PathBuf::from)
        .context("usage: pages DIRECTORY")?;
    let command = Cli::command().disable_help_subcommand(true);
    man_pages(&made(&out.join("man"))?, &command)?;
    let completions = made(&out.join("completions"))?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        generate_to(shell, &mut command.clone(), "enforcer", &completions)
            .with_context(|| format!("write the completions of {shell}"))?;
    }
    let path = out.join("enforcer.toml");
    fs::write(&path, default_configuration()?).with_context(|| format!("write {}", path.display()))
}

fn made(dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    Ok(dir.into())
}

/// `enforcer.8`, and a page for each command below.
fn man_pages(dir: &Path, command: &Command) -> Result<()> {
    let mut command = command.clone();
    command.build();
    let mut waiting = vec![command];
    while let Some(command) = waiting.pop() {
        waiting.extend(command.get_subcommands().filter(|below| !below.is_hide_set()).cloned());
        let man = Man::new(command).section(SECTION).manual("enforcer");
        man.generate_to(dir)
            .with_context(|| format!("write {} below {}", man.get_filename(), dir.display()))?;
    }
    Ok(())
}

/// Every key with its meaning and default, as `config show` prints them, each line commented.
fn default_configuration() -> Result<String> {
    let shown = Config::parse(EXAMPLE, Path::new("the example"))?.show();
    let mut out = Vec::new();
    writeln!(
        out,
        "# Configuration of enforcer. Every line that begins with # and no blank is a default, or an example of a \
         target.\n\
         # systemctl reload enforcer reads it again; enforcer config check says what is wrong with it.\n"
    )?;
    for line in shown.lines() {
        let mark = if line.is_empty() || line.starts_with('#') {
            ""
        } else {
            "#"
        };
        writeln!(out, "{mark}{line}")?;
    }
    Ok(String::from_utf8(out)?)
}
