//! The commands: arguments become a request, the request an effect, the effect text or JSON and an exit code.

mod check;
mod configuration;
mod doctor;
mod events;
pub(crate) mod grants;
mod monit_access;
mod place;
mod reload;
mod unload;
mod verify;

use std::{
    fmt::Display,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::{
    Args, Parser, Subcommand, ValueEnum,
    error::{ContextKind, ContextValue},
};
use serde::Serialize;
use tracing_subscriber::{filter::LevelFilter, fmt::format, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::{
    config::{self, ConfigError, Mistakes},
    control::{self, AskError},
    daemon::{self, DaemonError},
    inputs::InputError,
    status::from_outside,
    text::{self, Journal, Log},
    wire::{Reply, Request, Severity, State, Status},
};

use place::{asked_status, elsewhere, named_place, place, with_place};

/// Options that every command has.
const COMMON: &str = "Common options";

/// Allows only chosen local users to connect to this host's sensitive endpoints.
///
/// Exit codes: 0 success; 1 negative answer (denied, degraded, drifted, not active, weaknesses found); 2 error; 3
/// (`run` only) stopped by `enforcer unload`: do not restart.
#[derive(Debug, Parser)]
#[command(name = "enforcer", version, propagate_version = true)]
pub struct Cli {
    /// Configuration file [default: /etc/enforcer/enforcer.toml; without that file, BOSH's monit and message bus are
    /// protected]
    #[arg(long, global = true, value_name = "PATH", help_heading = COMMON, display_order = 900)]
    config: Option<PathBuf>,
    /// Log format
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    #[arg(help_heading = COMMON, display_order = 901)]
    log_format: LogFormat,
    /// Minimum level to log: error, warn, info, debug, trace
    #[arg(long, global = true, value_name = "LEVEL", default_value = "info")]
    #[arg(help_heading = COMMON, display_order = 902)]
    log_level: tracing::Level,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// Lines, on stderr
    Text,
    /// Lines of JSON with fields, on stderr
    Json,
    /// Entries of systemd's journal with fields; as text where there is none
    Journal,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon in the foreground: enforce, follow names, addresses and cgroups, answer the other commands
    ///
    /// Notifies the service manager once the kernel enforces. SIGHUP reloads the configuration; SIGTERM stops the
    /// daemon and leaves the rules active.
    Run,
    /// Apply the configuration once and exit; the rules stay active
    Apply(Apply),
    /// Show the active rules and whether they match the configuration; exit code 1 if degraded or off
    Status(StatusArgs),
    /// Show whether USER may connect to DESTINATION, and why, evaluated against the rules in the kernel
    Check(check::Check),
    /// Take the configuration file as it is now, and print what changes; return when it is enforced
    ///
    /// An endpoint that is no longer in the file is no longer protected. See what would change with --dry-run first.
    /// Exit codes: 0 enforced; 1 taken, but degraded; 2 rejected: the previous rules stay active.
    Reload(reload::Reload),
    /// Show denials and other events, or what they add up to
    Events(events::Events),
    /// Look up all names now; return when the kernel holds the result
    Refresh(Refresh),
    /// Allow a cgroup or user to connect to TARGET until revoked or expired; survives restarts
    Grant(grants::Grant),
    /// Revoke a grant; exit code 1 if there is no such grant
    Revoke(grants::Revoke),
    /// List grants
    Grants(Json),
    /// Allow the calling BOSH job to connect to monit where possible; never fails its caller
    #[command(alias = "bosh-enable-monit-access")]
    EnableMonitAccess(monit_access::MonitAccess),
    /// Stop the daemon and remove all enforcement from the kernel; nothing is protected afterwards
    ///
    /// On a terminal it asks first.
    Unload(unload::Unload),
    /// Diagnose this host: kernel features, the backend that would be used, weaknesses and how to fix them
    ///
    /// Exit codes: 0 no weaknesses; 1 weaknesses; 2 none found, but something could not be checked.
    Doctor(doctor::Doctor),
    /// Compare everything the kernel holds, entry by entry, with what is desired; changes nothing
    ///
    /// With a daemon, against what it desires now; without one, against the configuration and the last known addresses.
    /// Exit codes: 0 identical; 1 differences; 2 error.
    Verify(Json),
    /// Check or show the configuration
    #[command(subcommand)]
    Config(configuration::ConfigCommand),
}

impl Command {
    /// Whether it does or says what the file has, and so nothing without one; others need no more of it than where the
    /// instance is.
    fn takes_the_file(&self) -> bool {
        match self {
            Self::Run | Self::Apply(Apply { last_good: false }) | Self::Doctor(_) | Self::Config(_) => true,
            Self::Apply(Apply { last_good: true })
            | Self::Status(_)
            | Self::Check(_)
            | Self::Reload(_)
            | Self::Events(_)
            | Self::Refresh(_)
            | Self::Grant(_)
            | Self::Revoke(_)
            | Self::Grants(_)
            | Self::EnableMonitAccess(_)
            | Self::Unload(_)
            | Self::Verify(_) => false,
        }
    }
}

#[derive(Debug, Args)]
struct Json {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// Exit with 1 only if a condition is at least as severe as this, for monitoring [default: if degraded or off]
    #[arg(long, value_enum, value_name = "SEVERITY")]
    exit_on: Option<ExitOn>,
    #[command(flatten)]
    json: Json,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ExitOn {
    /// Something that the rules rest on fails
    Warning,
    /// Something is not protected, or may soon not be
    Critical,
}

#[derive(Debug, Args)]
struct Apply {
    /// Apply the last known good rules instead of the configuration, without DNS lookups (for early boot)
    ///
    /// Does nothing if rules are already active or none are saved.
    #[arg(long)]
    last_good: bool,
}

#[derive(Debug, Args)]
struct Refresh {
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "10s")]
    timeout: humantime::Duration,
    #[command(flatten)]
    json: Json,
}

/// How a command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExitStatus {
    Yes,
    No,
    /// The answer itself says that it is not whole.
    Unknown,
    /// Of a daemon: it was told to unload, and is not to be started again by whatever supervises it.
    Unloaded,
}

/// Runs the command line and says how the process should end.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(monit_access::as_called(std::env::args_os())) {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => {
            // An argument may be a path or a name that others chose.
            let error = without_unload(error).render().to_string();
            let _ = write!(io::stderr(), "{}", text::lines(&error));
            return ExitCode::from(2);
        }
    };
    start_log(cli.log_format, cli.log_level);
    match run(&cli) {
        Ok(ExitStatus::Yes) => ExitCode::SUCCESS,
        Ok(ExitStatus::No) => ExitCode::from(1),
        Ok(ExitStatus::Unknown) => ExitCode::from(2),
        Ok(ExitStatus::Unloaded) => ExitCode::from(3),
        Err(error) => {
            for line in lines_of(&error) {
                match (cli.log_format, &cli.command) {
                    (LogFormat::Json, _) | (LogFormat::Journal, Command::Run) => tracing::error!("{line}"),
                    (LogFormat::Text | LogFormat::Journal, _) => complain("error", &line),
                }
            }
            ExitCode::from(2)
        }
    }
}

/// An error as it is printed: of a configuration, each mistake on a line of its own.
fn lines_of(error: &anyhow::Error) -> Vec<String> {
    if let Some(Rejected(lines)) = error.downcast_ref() {
        return lines.clone();
    }
    let mistakes = error
        .downcast_ref::<DaemonError>()
        .and_then(DaemonError::mistakes)
        .or_else(|| error.downcast_ref::<InputError>().and_then(InputError::mistakes))
        .or_else(|| error.downcast_ref::<ConfigError>().and_then(ConfigError::mistakes));
    mistakes.map_or_else(|| vec![format!("{error:#}")], Mistakes::lines)
}

/// What a daemon has answered to a configuration with mistakes, a line each.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
struct Rejected(Vec<String>);

/// Nobody who mistypes is led to the command that ends all protection.
fn without_unload(mut error: clap::Error) -> clap::Error {
    if let Some(ContextValue::Strings(mut similar)) = error.remove(ContextKind::SuggestedSubcommand) {
        similar.retain(|command| command != "unload");
        if !similar.is_empty() {
            error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(similar));
        }
    }
    error
}

fn start_log(format: LogFormat, level: tracing::Level) {
    // Without colours: no escape sequence is let through.
    let builder = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(level)
        .with_target(false);
    // For people the message is enough: it has what the fields have.
    let message = format::debug_fn(|line, field, value| match field.name() {
        "message" => write!(line, "{value:?}"),
        _ => Ok(()),
    });
    match format {
        LogFormat::Text => builder.fmt_fields(message).with_writer(Log::Text).init(),
        LogFormat::Json => builder.json().with_writer(Log::Json).init(),
        LogFormat::Journal => match Journal::open() {
            Ok(journal) => tracing_subscriber::registry()
                .with(LevelFilter::from_level(level))
                .with(journal)
                .init(),
            Err(error) => {
                start_log(LogFormat::Text, level);
                tracing::warn!("no journal: {error}; the log goes to stderr");
            }
        },
    }
}

fn run(cli: &Cli) -> Result<ExitStatus> {
    let config = cli.config.as_deref().unwrap_or(Path::new(config::DEFAULT_PATH));
    // Without --config no file at the default place is as good as an empty one (B1); a file that is named must be
    // there, but for those who ask what runs (F4).
    if cli.config.as_deref() == Some(Path::new(config::DEFAULT_PATH)) && !config.exists() {
        let error = ConfigError::Missing { path: config.into() };
        if cli.command.takes_the_file() {
            return Err(error.into());
        }
        complain("warning", &error.to_string());
    }
    match &cli.command {
        Command::Run => runtime()?
            .block_on(daemon::run(config))
            .map(|end| match end {
                daemon::End::Stopped => ExitStatus::Yes,
                daemon::End::Unloaded => ExitStatus::Unloaded,
            })
            .map_err(Into::into),
        Command::Apply(Apply { last_good: false }) => apply(config),
        Command::Apply(Apply { last_good: true }) => apply_last_good(config),
        Command::Status(status) => show_status(config, status),
        Command::Check(check) => check::run(config, check),
        Command::Reload(reload) => reload::run(config, reload),
        Command::Events(events) => events::run(config, events),
        Command::Refresh(refresh) => run_refresh(config, refresh),
        Command::Grant(grant) => grants::grant(config, grant),
        Command::Revoke(revoke) => grants::revoke(config, revoke),
        Command::Grants(json) => grants::list(config, json),
        Command::EnableMonitAccess(access) => Ok(monit_access::run(config, access)),
        Command::Unload(unload) => unload::run(config, unload),
        Command::Doctor(doctor) => doctor::run(config, doctor),
        Command::Verify(json) => verify::run(config, json),
        Command::Config(command) => configuration::run(config, command),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    /// What the runtime opens, and more.
    const FILES: usize = 12;
    // Where it gets no descriptors it panics (tokio, signal/unix.rs): asked for first, they end in a message.
    let files: io::Result<Vec<_>> = (0..FILES).map(|_| std::fs::File::open("/dev/null")).collect();
    drop(files.context("start: cannot open a dozen files; raise the limit (LimitNOFILE= of the unit, ulimit -n)")?);
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")
}

fn apply(config: &Path) -> Result<ExitStatus> {
    let status = runtime()?.block_on(daemon::apply_once(config))?;
    print(&status.render())?;
    Ok(answer_of(&status))
}

fn apply_last_good(config: &Path) -> Result<ExitStatus> {
    let runtime = runtime()?;
    let _entered = runtime.enter();
    match daemon::apply_last_good(config)? {
        Some(status) => print(&status.render()),
        None => print("no rules are saved; nothing was changed\n"),
    }
}

fn answer_of(status: &Status) -> ExitStatus {
    match status.state {
        State::Enforcing | State::Audit => ExitStatus::Yes,
        State::Degraded | State::Off => ExitStatus::No,
    }
}

fn show_status(config: &Path, StatusArgs { exit_on, json }: &StatusArgs) -> Result<ExitStatus> {
    let settings = &place(config)?;
    let asked = runtime()?.block_on(control::ask(&settings.socket, &Request::Status, PATIENCE));
    let status = match asked {
        Ok(Reply::Status(status)) => *status,
        Ok(_) => return unexpected(),
        Err(error) if heard_nobody(&error) => from_outside(settings, None)?,
        // The kernel has most of what it would say.
        Err(error @ AskError::TimedOut { .. }) => from_outside(settings, Some(&error))?,
        Err(error) => return Err(error.into()),
    };
    print_one(&status, json, Status::render)?;
    let Some(least) = exit_on else {
        return Ok(answer_of(&status));
    };
    let least = match least {
        ExitOn::Warning => Severity::Warning,
        ExitOn::Critical => Severity::Critical,
    };
    Ok(if status.conditions.iter().any(|one| one.severity >= least) {
        ExitStatus::No
    } else {
        ExitStatus::Yes
    })
}

/// An answer to something else than was asked.
fn unexpected<T>() -> Result<T> {
    bail!("the daemon gave an unexpected answer; is it another version?")
}

/// Whether no daemon was asked: then only the kernel can answer, or what was saved.
fn is_nobody(error: &AskError) -> bool {
    matches!(error, AskError::Impostor { .. } | AskError::NoDaemon { .. })
}

/// As [`is_nobody`], for whoever says no more of it: another user's socket is worth a warning.
fn heard_nobody(error: &AskError) -> bool {
    if matches!(error, AskError::Impostor { .. }) {
        complain("warning", &error.to_string());
    }
    is_nobody(error)
}

fn run_refresh(config: &Path, refresh: &Refresh) -> Result<ExitStatus> {
    let status = refreshed(&place(config)?.socket, refresh.timeout.into())?;
    print_one(&status, &refresh.json, Status::render_refreshed)?;
    Ok(answer_of(&status))
}

/// The status once all names were looked up.
fn refreshed(socket: &Path, timeout: Duration) -> Result<Status> {
    let Reply::Status(status) = runtime()?.block_on(control::ask(socket, &Request::Refresh, timeout))? else {
        return unexpected();
    };
    Ok(*status)
}

/// How long a daemon may take for what takes it a moment.
const PATIENCE: Duration = Duration::from_secs(5);

/// What reads or removes thousands of entries waits for the kernel, and on a busy host for the disk, too.
const PATIENCE_FOR_WORK: Duration = Duration::from_secs(30);

fn print_one<T: Serialize>(value: &T, json: &Json, render: impl Fn(&T) -> String) -> Result<ExitStatus> {
    if json.json {
        print(&(text::json(value)? + "\n"))
    } else {
        print(&render(value))
    }
}

/// A line of a text, whatever is in it.
fn as_line(value: &impl Display) -> String {
    text::line(&value.to_string()).into_owned() + "\n"
}

/// One line on stderr, whatever the cause holds.
fn complain(kind: &str, cause: &str) {
    let _ = write!(io::stderr(), "{}", as_line(&format_args!("enforcer: {kind}: {cause}")));
}

/// Writes to stdout; a reader that has gone is no error.
fn print(page: &str) -> Result<ExitStatus> {
    match io::stdout().lock().write_all(text::lines(page).as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("write to stdout"),
        Ok(()) | Err(_) => Ok(ExitStatus::Yes),
    }
}

#[cfg(test)]
mod tests;
