//! `enforcer config`: all that is wrong with the configuration, and what it is with all defaults.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use clap::{Args, Subcommand};
use serde::Serialize;
use tokio::task::JoinSet;

use super::{ExitStatus, Json, print_one, reload, runtime};
use crate::{
    backend,
    config::{self, Config, Mistake, Mistakes, Settings, Understood},
    control,
    inputs::{HostConfig, InputError},
    policy::{AcceptedAnswers, BUS, MONIT, Name, Policy, Unresolved},
    resolve::{LookupAnswer, Names, lookup},
    state,
    text::{self, Page, counted},
    wire::{
        Schema,
        check::{ConfigCheck, ConfigMistake},
    },
};

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Report everything that is wrong with the configuration
    ///
    /// Exit codes: 0 valid; 1 valid, but users, groups or cgroups do not exist, names will not be protected, or a
    /// start could not use the places that it names; 2 invalid.
    Check(Check),
    /// Print what a reload would change, compared with what the daemon has; exit code 1 if anything
    ///
    /// As reload --dry-run, with the exit codes of diff(1): 0 nothing would change; 1 something would; 2 error. Whether
    /// another backend works here, or the rules fit into it, shows only when they are applied: see enforcer doctor.
    Diff(Json),
    /// Print the full configuration, with defaults and an explanation of each key
    Show(Json),
}

#[derive(Debug, Args)]
pub(super) struct Check {
    /// Check the text alone, and look nothing up: for hosts without the users, groups, cgroups and DNS of the one that
    /// it is for, such as those of a build
    #[arg(long)]
    offline: bool,
    #[command(flatten)]
    json: Json,
}

pub(super) fn run(path: &Path, command: &ConfigCommand) -> Result<ExitStatus> {
    match command {
        ConfigCommand::Check(arguments) => check(path, arguments),
        ConfigCommand::Diff(json) => reload::diff(path, json),
        ConfigCommand::Show(json) => show(path, json),
    }
}

fn show(path: &Path, json: &Json) -> Result<ExitStatus> {
    let config = Config::load_to_check(path)?;
    let shown = Shown {
        schema: Schema::Config,
        config: config.tree(),
    };
    print_one(&shown, json, |_| text::toml_text(&config.show()).into_owned())
}

/// `enforcer config show --json`.
#[derive(Serialize)]
struct Shown {
    schema: Schema,
    #[serde(flatten)]
    config: toml::Table,
}

/// How long `config check` waits for DNS: where that is away, it says nothing of names.
const PATIENCE_FOR_NAMES: Duration = Duration::from_secs(2);

const NOT_ACCEPTED: &str = "resolves to link-local addresses only, which are not accepted from DNS: it will never be \
                            protected; set answers = \"link-local\" in its target, or use the address";
const REJECTED: &str = "resolves only to loopback, multicast, unspecified or other addresses that are not accepted \
                        from DNS: it will never be protected; use the address, or name it in /etc/hosts";
const NO_ADDRESS: &str = "has no address, says this host's resolver: nothing of it is protected until it has; correct \
                          the name, unless its address is yet to come";
const CLOSED: &str = "has no address, says this host's resolver: until it has, its port is closed at every address; \
                      correct the name, unless its address is yet to come";

/// What DNS says of names that is worth a word.
#[derive(Default)]
struct NameRemarks {
    /// Nothing of them will be protected.
    unprotected: Vec<String>,
    /// They have no address, and their port is closed until they have.
    absent: Vec<String>,
    /// Nothing is known of them.
    unknown: Vec<String>,
}

/// Looks names up: some may have no address, and DNS may answer to some what no target of theirs takes (N6).
async fn remarks(path: &Path, policy: &Policy) -> NameRemarks {
    let mut lookups = JoinSet::new();
    for (name, accepted) in policy.asked() {
        lookups.spawn(async move {
            let answer = lookup(&name, PATIENCE_FOR_NAMES).await;
            (name, (accepted, answer))
        });
    }
    let answers: BTreeMap<Name, (AcceptedAnswers, LookupAnswer)> = lookups.join_all().await.into_iter().collect();
    let mut remarks = NameRemarks::default();
    for (name, (accepted, answer)) in answers {
        let line = |why: &str| format!("{}: name {name} {why}", path.display());
        if Names::needs_link_local(accepted, &answer) {
            remarks.unprotected.push(line(NOT_ACCEPTED));
        } else if Names::is_rejected(accepted, &answer) {
            remarks.unprotected.push(line(REJECTED));
        } else if answer.is_without_addresses() {
            match policy.dns.unresolved {
                Unresolved::Open => remarks.unprotected.push(line(NO_ADDRESS)),
                Unresolved::Closed => remarks.absent.push(line(CLOSED)),
            }
        } else if let (addresses, why) = answer.into_addresses()
            && addresses.is_empty()
        {
            let line = line(&format!(
                "cannot be looked up now ({why}): whether it will be protected is not known"
            ));
            remarks.unknown.push(line);
        }
    }
    remarks
}

/// What lies in `conf.d` and looks as if it should be read, but is not.
fn not_read(path: &Path) -> Vec<String> {
    let name = |file: &PathBuf| format!("{} is not read: its name does not end in .toml", file.display());
    config::unread_beside(path).iter().map(name).collect()
}

/// What depends on the host and its surroundings, by its ids in JSON.
const NOT_CHECKED: [&str; 7] = ["owners", "users", "groups", "cgroups", "names", "bosh", "places"];
/// What root alone can tell.
const PLACES: [&str; 1] = ["places"];

/// What a start could not use of where the instance is to be.
fn unusable(path: &Path, settings: &Settings) -> Vec<String> {
    let mut faults = backend::unusable_places(settings);
    let mut found: Vec<(&str, String)> = faults.drain(..).map(|(key, fault)| (key, fault.to_string())).collect();
    let state = state::check_usable(&settings.state_dir).err();
    found.extend(state.map(|fault| ("state_dir", fault.to_string())));
    let socket = control::check_usable(&settings.socket).err();
    found.extend(socket.map(|fault| ("socket", fault.to_string())));
    let line = |(key, fault): (&str, String)| {
        let line = config::key_line(path, key)
            .map(|line| format!(":{line}"))
            .unwrap_or_default();
        format!("{}{line}: {key} cannot be used: {fault}", path.display())
    };
    found.into_iter().map(line).collect()
}

fn check(path: &Path, Check { offline, json }: &Check) -> Result<ExitStatus> {
    let checked = if *offline { by_text(path) } else { on_this_host(path) };
    let checked = match checked {
        Ok(checked) => checked,
        Err(error) => {
            // Which a person reads on stderr.
            if let (true, Some(error)) = (json.json, error.downcast_ref()) {
                print_one(&ConfigCheck::invalid(path, error), json, ConfigCheck::render)?;
            }
            return Err(error);
        }
    };
    let whole = checked.exceptions().next().is_none();
    print_one(&checked, json, ConfigCheck::render)?;
    Ok(if whole { ExitStatus::Yes } else { ExitStatus::No })
}

fn on_this_host(path: &Path) -> Result<ConfigCheck> {
    let wanted = HostConfig::load_to_check(path)?;
    // As a start sees it, where what is saved can be read.
    let saved = state::load(&wanted.settings().state_dir).ok().flatten();
    wanted.ensure_present(saved.as_ref().map(|(good, _)| good))?;
    let names = runtime()?.block_on(remarks(path, wanted.policy()));
    let is_root = nix::unistd::geteuid().is_root();
    Ok(ConfigCheck {
        exists: wanted.from_file,
        untrusted: config::untrusted(path).map(|fault| fault.to_string()),
        targets: wanted.policy().targets.len(),
        defaults: wanted.config.targets.is_empty(),
        warnings: [wanted.warnings(), &names.unknown, &not_read(path)].concat(),
        absent: wanted.absent().into_iter().chain(names.absent).collect(),
        unprotected: names.unprotected,
        places: if is_root {
            unusable(path, wanted.settings())
        } else {
            Vec::new()
        },
        not_checked: if is_root { Vec::new() } else { PLACES.to_vec() },
        ..ConfigCheck::of(path)
    })
}

fn by_text(path: &Path) -> Result<ConfigCheck> {
    let meant = Config::load_to_check(path).and_then(|config| Ok((config.targets.is_empty(), config.without_users()?)));
    let (defaults, Understood { policy, warnings, .. }) = meant.map_err(InputError::from)?;
    Ok(ConfigCheck {
        targets: policy.targets.len(),
        defaults,
        warnings: warnings.iter().map(ToString::to_string).collect(),
        not_checked: NOT_CHECKED.to_vec(),
        ..ConfigCheck::of(path)
    })
}

impl ConfigCheck {
    fn of(path: &Path) -> Self {
        Self {
            schema: Schema::ConfigCheck,
            path: path.display().to_string(),
            exists: path.exists(),
            untrusted: None,
            targets: 0,
            defaults: false,
            warnings: Vec::new(),
            absent: Vec::new(),
            places: Vec::new(),
            unprotected: Vec::new(),
            errors: Vec::new(),
            more_errors: 0,
            not_checked: Vec::new(),
        }
    }

    fn invalid(path: &Path, error: &InputError) -> Self {
        let of = |mistake: &Mistake| ConfigMistake {
            path: mistake.path().display().to_string(),
            line: mistake.line(),
            target: mistake.target().map(str::to_owned),
            key: mistake.key(),
            message: mistake.message(),
        };
        let alone = || ConfigMistake {
            path: path.display().to_string(),
            line: None,
            target: None,
            key: None,
            message: error.to_string(),
        };
        let mistakes = error.mistakes();
        Self {
            errors: mistakes.map_or_else(|| vec![alone()], |mistakes| mistakes.iter().map(of).collect()),
            more_errors: mistakes.map_or(0, Mistakes::more),
            ..Self::of(path)
        }
    }

    /// What keeps it from being enforced, or parts of it.
    fn exceptions(&self) -> impl Iterator<Item = String> {
        let untrusted = self.untrusted.as_ref();
        let untrusted = untrusted.map(|fault| format!("{fault}; until then the daemon rejects the configuration"));
        let parts = self.absent.iter().chain(&self.unprotected).chain(&self.places).cloned();
        untrusted.into_iter().chain(parts)
    }

    fn render(&self) -> String {
        let Self {
            path,
            targets,
            defaults,
            warnings,
            not_checked,
            ..
        } = self;
        let mut page = Page::default();
        for warning in warnings {
            page.line(format_args!("warning: {warning}"));
        }
        for line in self.exceptions() {
            page.line(line);
        }
        let targets = if *defaults {
            format!("no target in the file: those of a BOSH VM are protected ({MONIT}, {BUS})")
        } else {
            counted(*targets, "target")
        };
        if !self.exists {
            page.line(format_args!(
                "{path}: there is no such file: those of a BOSH VM would be protected ({MONIT}, {BUS}); the packaged \
                 service starts on a BOSH VM, or once there is a configuration"
            ));
        } else if self.exceptions().next().is_none() {
            page.line(format_args!("{path}: valid; {targets}"));
        } else {
            page.line(format_args!("{path}: valid, with the exceptions above; {targets}"));
        }
        match not_checked.as_slice() {
            [] => {}
            [_] => page.line(
                "not checked, as only root can tell: whether a start can use cgroup, pin_dir, state_dir and socket",
            ),
            [..] => page.line(
                "not checked: who can write the files, whether users, groups and cgroups exist, what names resolve \
                 to, the settings of a BOSH agent, and whether a start can use cgroup, pin_dir, state_dir and socket",
            ),
        }
        page.into_text()
    }
}
