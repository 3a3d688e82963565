//! `enforcer(8)`, and a page for each command: what clap knows, and what it does not.

use std::{io::Write as _, path::Path};

use anyhow::Result;
use clap::{Arg, ArgAction, Command};
use clap_mangen::Man;

use super::{list, roff, write};

/// Administration tools and daemons (man 7 man-pages).
const SECTION: &str = "8";

/// Examples of a command: what is typed, and what for.
const EXAMPLES: [(&str, &[(&str, &str)]); 10] = [
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
        "enforcer-config-check",
        &[(
            "enforcer --config enforcer.toml config check --offline",
            "In a build or CI: is the text valid, whatever users, cgroups and names there are?",
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
const FILES: [(&str, &str); 6] = [
    (
        "/etc/enforcer/enforcer.toml",
        "The configuration, see enforcer.toml(5).",
    ),
    (
        "/etc/enforcer/conf.d/*.toml",
        "More targets, in the order of the files' names. No other key, and no target that another file has.",
    ),
    (
        "/run/enforcer/control.sock",
        "The control socket, by which commands ask the daemon.",
    ),
    (
        "/var/lib/enforcer",
        "The last known good rules, grants, and what denials add up to.",
    ),
    (
        "/sys/fs/bpf/enforcer",
        "Pinned eBPF links and maps; they keep the rules active without the daemon.",
    ),
    (
        "/usr/share/doc/enforcer/troubleshooting.md",
        "What to run and what to do, by symptom.",
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
pub(super) fn write_pages(dir: &Path, command: &Command) -> Result<()> {
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
        write(&path, &page(&man, &command)?)?;
    }
    Ok(())
}

/// A page: what clap knows, and what it does not.
fn page(man: &Man, command: &Command) -> Result<Vec<u8>> {
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    synopsis(&mut page, command)?;
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
        "enforcer.toml(5), enforcer-status(8), enforcer-check(8), enforcer-reload(8), enforcer-doctor(8)"
    } else {
        "enforcer(8), enforcer.toml(5)"
    };
    writeln!(page, ".SH \"SEE ALSO\"\n{}", roff(also))?;
    Ok(page)
}

/// What may be typed. Written here, as `clap_mangen` leaves out the values of options.
fn synopsis(page: &mut Vec<u8>, command: &Command) -> Result<()> {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    let mut words = vec![format!("\\fB{}\\fR", roff(name))];
    let shown = command.get_arguments().filter(|argument| !argument.is_hide_set());
    let (positional, mut options) = shown.partition::<Vec<&Arg>, _>(|argument| argument.is_positional());
    options.retain(|option| !is_of_clap(option));
    options.sort_by_key(|option| option.get_display_order());
    for argument in options.into_iter().chain(positional) {
        let text = typed(argument);
        let again = if matches!(argument.get_action(), ArgAction::Append) {
            "..."
        } else {
            ""
        };
        words.push(if argument.is_required_set() {
            text + again
        } else {
            format!("[{text}]{again}")
        });
    }
    if command.has_subcommands() {
        words.push("\\fICOMMAND\\fR".to_owned());
    }
    // Neither hyphens nor wide gaps: it is not prose.
    writeln!(page, ".SH SYNOPSIS\n.nh\n.ad l\n{}\n.ad b\n.hy", words.join(" "))?;
    Ok(())
}

/// `--help` and `--version`, which every command has.
fn is_of_clap(option: &Arg) -> bool {
    matches!(
        option.get_action(),
        ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
    )
}

/// An option as `-s|--long VALUE`, or the value of a positional argument; no line ends in it.
fn typed(argument: &Arg) -> String {
    let flags = [
        argument.get_short().map(|short| format!("-{short}")),
        argument.get_long().map(|long| format!("--{long}")),
    ];
    let flags = flags.iter().flatten().map(|flag| format!("\\fB{}\\fR", roff(flag)));
    let mut words = vec![flags.collect::<Vec<_>>().join("|")];
    if argument.get_num_args().is_some_and(|number| number.takes_values()) {
        let values = argument.get_value_names().unwrap_or_default();
        words.extend(values.iter().map(|value| format!("\\fI{}\\fR", roff(value))));
    }
    words.retain(|word| !word.is_empty());
    words.join("\\ ")
}
