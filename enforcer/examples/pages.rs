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

/// Examples of a command: what is typed, and what for.
const EXAMPLES: [(&str, &[(&str, &str)]); 9] = [
    (
        "enforcer",
        &[
            ("enforcer status", "Is everything enforced, and what is protected?"),
            ("enforcer check nobody 10.0.0.5:4222", "May this user connect there?"),
            ("enforcer events --follow", "Who is being denied?"),
            ("enforcer doctor", "What weakens protection on this host?"),
        ],
    ),
    (
        "enforcer-status",
        &[(
            "enforcer status --exit-on critical",
            "For monitoring: exit code 1 only if something is not protected.",
        )],
    ),
    (
        "enforcer-check",
        &[
            ("enforcer check nobody 10.0.0.5:4222", "TCP, by name of the user."),
            ("enforcer check 999 udp://10.0.0.9:53", "UDP, by UID."),
        ],
    ),
    (
        "enforcer-events",
        &[(
            "enforcer events --json | jq -r .target | sort | uniq -c",
            "How many denials of each target are kept?",
        )],
    ),
    (
        "enforcer-reload",
        &[
            ("enforcer reload --dry-run", "What would change? Nothing does."),
            ("enforcer reload", "Take the configuration file as it is now."),
        ],
    ),
    (
        "enforcer-grant",
        &[
            (
                "enforcer grant monit --for 10m",
                "Allow the caller's cgroup to connect to monit for ten minutes.",
            ),
            (
                "enforcer grant monit --user operator",
                "Allow a user until it is revoked.",
            ),
        ],
    ),
    (
        "enforcer-revoke",
        &[("enforcer revoke monit --all", "Revoke all grants of monit.")],
    ),
    (
        "enforcer-apply",
        &[(
            "enforcer apply --last-good",
            "What enforcer-early.service runs at boot, before there is any network.",
        )],
    ),
    (
        "enforcer-config-diff",
        &[(
            "enforcer config check && enforcer config diff",
            "Before a reload: is it valid, and what would change?",
        )],
    ),
];

/// Files, and what they are for.
const FILES: [(&str, &str); 4] = [
    (
        "/etc/enforcer/enforcer.toml",
        "The configuration; enforcer config show explains each key.",
    ),
    (
        "/run/enforcer/control.sock",
        "The control socket, by which commands ask the daemon.",
    ),
    ("/var/lib/enforcer", "The last known good rules, and grants."),
    (
        "/sys/fs/bpf/enforcer",
        "Pinned eBPF links and maps; they keep the rules active without the daemon.",
    ),
];

/// What exit codes mean; commands that differ say so themselves.
const EXIT_STATUS: [(&str, &str); 4] = [
    ("0", "Success, or a positive answer."),
    (
        "1",
        "A negative answer: denied, degraded, drifted, not active, weaknesses found.",
    ),
    ("2", "An error."),
    (
        "3",
        "Of enforcer run alone: stopped by enforcer unload; do not restart.",
    ),
];

/// `enforcer.8`, and a page for each command below.
fn man_pages(dir: &Path, command: &Command) -> Result<()> {
    let mut command = command.clone();
    command.build();
    let source = format!("enforcer {}", command.get_version().unwrap_or_default());
    let mut waiting = vec![command];
    while let Some(command) = waiting.pop() {
        waiting.extend(command.get_subcommands().filter(|below| !below.is_hide_set()).cloned());
        let man = Man::new(command.clone())
            .section(SECTION)
            .manual("enforcer")
            .source(source.clone());
        let path = dir.join(man.get_filename());
        fs::write(&path, page(&man, &command)?).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// A page: what clap knows, and what it does not.
fn page(man: &Man, command: &Command) -> Result<Vec<u8>> {
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    list(&mut page, "EXIT STATUS", EXIT_STATUS)?;
    list(&mut page, "FILES", FILES)?;
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    if let Some((_, examples)) = EXAMPLES.iter().find(|(command, _)| *command == name) {
        list(&mut page, "EXAMPLES", examples.iter().copied())?;
    }
    let also = if name == "enforcer" {
        "enforcer-status(8), enforcer-check(8), enforcer-reload(8), enforcer-doctor(8)"
    } else {
        "enforcer(8)"
    };
    writeln!(page, ".SH \"SEE ALSO\"\n{}", roff(also))?;
    Ok(page)
}

/// A section of terms and what they mean.
fn list<'a>(page: &mut Vec<u8>, title: &str, entries: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<()> {
    writeln!(page, ".SH \"{title}\"")?;
    for (term, meaning) in entries {
        writeln!(page, ".TP\n\\fB{}\\fR\n{}", roff(term), roff(meaning))?;
    }
    Ok(())
}

/// A line of text as roff has it.
fn roff(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq")
}

/// Every key with its meaning and default, as `config show` prints them, each line commented.
fn default_configuration() -> Result<String> {
    let shown = Config::parse(EXAMPLE, Path::new("the example"))?.show();
    let mut out = Vec::new();
    writeln!(
        out,
        "# Configuration of enforcer. Lines that begin with # and no blank are defaults or examples: remove the # to \
         use them.\n\
         # enforcer config check reports what is wrong with it, enforcer reload takes it and prints what changes.\n"
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
