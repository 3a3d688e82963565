//! Installs packages with apt-get: waits for another process that has apt locked, and reduces apt's page of errors to
//! the line that matters.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};

use super::sudo;
use crate::run::{captured, read};

/// How long another process may have apt locked.
const PATIENCE: Duration = Duration::from_mins(3);
/// Before it is tried again.
const PAUSE: Duration = Duration::from_secs(15);
/// What may be missing from this host's lists, and what brings it.
const REMEDY: &str = "enable the repository that has it (on Ubuntu: `universe`), then run this again";

/// Installs packages.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    let names = packages.join(", ");
    // A list that cannot be fetched may be one of another program's: what counts is whether the packages are there
    // afterwards.
    let (_, said) = attempt("setup: update the lists of packages with apt-get", &["update", "-q"])?;
    let stale = reason(&said);
    let absent: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| !is_available(package))
        .collect();
    match (absent.as_slice(), &stale) {
        ([], _) => {}
        (absent, Some(why)) => bail!(
            "apt-get finds no package {}, as its lists could not be updated ({why}); check the network or proxy, then \
             run this again",
            absent.join(", ")
        ),
        (absent, None) => bail!("{} has no package {}; {REMEDY}", distribution(), absent.join(", ")),
    }
    let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
    arguments.extend(packages);
    let (done, said) = attempt(&format!("setup: install {names} with apt-get (as root)"), &arguments)?;
    ensure!(
        done,
        "apt-get could not install {names}: {}; fix that, then run this again",
        reason(&said).unwrap_or(said)
    );
    Ok(())
}

/// Whether apt would install it.
pub(super) fn is_available(package: &str) -> bool {
    read("apt-cache", &["policy", package]).is_some_and(|policy| {
        policy
            .lines()
            .any(|line| line.trim().starts_with("Candidate: ") && !line.ends_with("(none)"))
    })
}

/// This host's, as it calls itself.
pub(super) fn distribution() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.map_or("this distribution", |name| name.trim_matches('"'))
        .to_owned()
}

/// Runs apt-get until it is not locked. Whether it succeeded, and its complaints.
fn attempt(what: &str, arguments: &[&str]) -> Result<(bool, String)> {
    let began = Instant::now();
    let mut what = what.to_owned();
    loop {
        let mut command = sudo("env");
        command.args(["DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "apt-get"]);
        command.args(arguments);
        let output = captured(&what, &mut command)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let Some(holder) = locked(&said) else {
            return Ok((output.status.success(), said));
        };
        ensure!(
            began.elapsed() < PATIENCE,
            "apt is locked by another process: {holder}; wait until that ends, then run this again"
        );
        what = format!("setup: wait for another process, which has apt locked ({holder})");
        thread::sleep(PAUSE);
    }
}

/// Who has apt locked, as apt says it.
fn locked(said: &str) -> Option<&str> {
    let line = said.lines().find(|line| line.starts_with("E: Could not get lock "))?;
    Some(line.trim_start_matches("E: Could not get lock ").trim())
}

/// The line of apt's complaints that says what is wrong: what could not be fetched, else the last error.
fn reason(said: &str) -> Option<String> {
    let mut lines = said.lines().map(str::trim);
    let fetch = lines.clone().find(|line| line.contains(": Failed to fetch "));
    let error = fetch.or_else(|| lines.rfind(|line| line.starts_with("E: ")))?;
    Some(error.trim_start_matches(['E', 'W']).trim_start_matches(": ").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_told_from_other_errors() {
        let said = "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 12 (apt-get)\n\
            E: Unable to acquire it\n";
        assert_eq!(
            locked(said),
            Some("/var/lib/dpkg/lock-frontend. It is held by process 12 (apt-get)")
        );
        assert_eq!(locked("E: Unable to locate package nosuch\n"), None);
    }

    #[test]
    fn one_line_says_what_is_wrong() {
        let refused =
            "W: Failed to fetch http://a.example/x  403  Forbidden\nW: Some index files failed to download.\n";
        assert_eq!(
            reason(refused).as_deref(),
            Some("Failed to fetch http://a.example/x  403  Forbidden")
        );
        let unknown = "W: something\nE: Unable to locate package nosuch\n";
        assert_eq!(reason(unknown).as_deref(), Some("Unable to locate package nosuch"));
        assert_eq!(reason("W: a warning\n"), None);
    }
}
