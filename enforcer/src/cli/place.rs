//! Where the instance is that a command is about: by the file, or by what is active where the file no longer names it.

use std::path::Path;

use anyhow::{Result, bail};

use super::{PATIENCE, complain, lines_of, runtime};
use crate::{
    config::{self, Config, ConfigError, Mistakes, Settings},
    control,
    host::service_starts,
    status::Elsewhere,
    wire::{Reply, Request, Status},
};

/// Where the instance is: of a file that is wrong somewhere, by the lines that say it alone, and a warning. To be
/// asked, a daemon needs no good configuration, and who is called at three in the morning may have just a bad one (F4).
pub(super) fn place(path: &Path) -> Result<Settings> {
    with_place(path, Ok)
}

/// As [`place`], for what reads the file itself, or has the daemon read it: where that fails by what the warning says,
/// it is said once.
pub(super) fn with_place<T>(path: &Path, work: impl FnOnce(Settings) -> Result<T>) -> Result<T> {
    let is_default = path == Path::new(config::DEFAULT_PATH);
    let (settings, warning) = located(path, is_default)?;
    if is_default && !service_starts() && !control::is_served(&settings.socket) {
        complain("warning", SERVICE_WAITS);
    }
    let done = work(where_it_runs(settings));
    let is_said = |warning: &ConfigError| {
        let mistakes = warning.mistakes().map(Mistakes::lines).unwrap_or_default();
        let first = mistakes.into_iter().next().unwrap_or_else(|| warning.to_string());
        done.as_ref()
            .is_err_and(|error| lines_of(error).iter().any(|line| line.contains(&first)))
    };
    if let Some(warning) = warning.filter(|warning| !is_said(warning)) {
        complain("warning", &warning.to_string());
    }
    done
}

/// For whoever is told to start it, and would see nothing happen.
const SERVICE_WAITS: &str = "the packaged service does not start on this host yet: there is no configuration, and \
     this is no BOSH VM; write /etc/enforcer/enforcer.toml first (enforcer config show prints every key)";

/// Where the file alone says that the instance is.
pub(super) fn named_place(path: &Path) -> Result<Settings> {
    let (settings, warning) = located(path, false)?;
    if let Some(warning) = warning {
        complain("warning", &warning.to_string());
    }
    Ok(settings)
}

/// The places of what is active, which the file may no longer name.
fn where_it_runs(settings: Settings) -> Settings {
    // Who is answered reads nothing: the disk may hang (F10).
    if control::is_served(&settings.socket) {
        return settings;
    }
    elsewhere(Elsewhere::find(&settings)).unwrap_or(settings)
}

/// Other places than the file names, with a warning.
pub(super) fn elsewhere(found: Option<Elsewhere>) -> Option<Settings> {
    let found = found?;
    complain("warning", &found.to_string());
    Some(found.settings)
}

/// What the daemon knows, if one answers.
pub(super) fn asked_status(settings: &Settings) -> Option<Status> {
    match runtime()
        .ok()?
        .block_on(control::ask(&settings.socket, &Request::Status, PATIENCE))
    {
        Ok(Reply::Status(status)) => Some(*status),
        Ok(_) | Err(_) => None,
    }
}

/// What the file says, and what is wrong with the rest of it.
fn located(path: &Path, lenient: bool) -> Result<(Settings, Option<ConfigError>)> {
    let error = match Config::load(path) {
        Ok(config) => return Ok((config.settings, None)),
        Err(error) => error,
    };
    let settings = match &error {
        ConfigError::Missing { .. } | ConfigError::Gone { .. } => None,
        // It may be a file beside it that is wrong, and none itself.
        ConfigError::File(_) | ConfigError::Invalid(_) => {
            config::place(path, lenient).or_else(|| lenient.then(Settings::default))
        }
    };
    match (settings, &error) {
        (Some(settings), _) => Ok((settings, Some(error))),
        (None, ConfigError::Missing { .. }) => bail!(
            "{error}; only the file says where its instance is: restore it, or name one with the same socket, \
             pin_dir, state_dir and nft_table"
        ),
        (None, ConfigError::Gone { .. } | ConfigError::File(_) | ConfigError::Invalid(_)) => Err(error.into()),
    }
}
