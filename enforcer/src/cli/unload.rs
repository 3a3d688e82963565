//! `enforcer unload`: the end of all enforcement.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use clap::Args;

use super::{ExitStatus, PATIENCE_FOR_WORK, heard_nobody, named_place, print, runtime};
use crate::{
    backend::{self, jobs},
    config::Settings,
    control, state,
    wire::Request,
};

#[derive(Debug, Args)]
pub(super) struct Unload {
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

/// Whether the operator at the terminal says so.
fn is_meant() -> Result<bool> {
    let mut terminal = io::stderr().lock();
    terminal
        .write_all(b"Remove all enforcement? Every local user can reach every endpoint afterwards. [y/N] ")
        .and_then(|()| terminal.flush())
        .context("write to stderr")?;
    let mut line = String::new();
    io::stdin().read_line(&mut line).context("read the answer")?;
    Ok(matches!(line.trim(), "y" | "Y" | "yes"))
}

pub(super) fn run(config: &Path, unload: &Unload) -> Result<ExitStatus> {
    // Nothing may be said to be gone that lies elsewhere.
    let settings = &named_place(config)?;
    if !unload.yes && io::stdin().is_terminal() && !is_meant()? {
        print("nothing was changed\n")?;
        return Ok(ExitStatus::No);
    }
    match runtime()?.block_on(control::ask(&settings.socket, &Request::Unload, PATIENCE_FOR_WORK)) {
        Ok(_) => {
            print("unloaded: nothing is active any more; the daemon has ended\n")?;
            tell_what_stays(settings)
        }
        Err(error) if heard_nobody(&error) => {
            // Rules that were made by an earlier configuration go with those of this one.
            let earlier = state::settings(&settings.state_dir).ok().flatten();
            let earlier = earlier.filter(|earlier| !earlier.is_at_same_place(settings));
            let removed = earlier.as_ref().map(backend::unload).transpose()?.unwrap_or(false);
            if backend::unload(settings)? || removed {
                print("unloaded: nothing is active any more\n")?;
            } else {
                // A file that names other places than the running instance has would find nothing there.
                print(&format!(
                    "nothing was active in {} nor in nftables table inet {}, and no daemon answers on {}\n",
                    settings.pin_dir.display(),
                    settings.nft_table,
                    settings.socket.display()
                ))?;
            }
            tell_what_stays(settings)
        }
        Err(error) => Err(error.into()),
    }
}

/// B5: the rules that jobs and the BOSH agent have in their table are theirs.
fn tell_what_stays(settings: &Settings) -> Result<ExitStatus> {
    let chain = jobs::read(settings).unwrap_or_default();
    let ours = chain
        .rules
        .iter()
        .filter(|rule| rule.writer == jobs::RuleOrigin::Grants)
        .count();
    match (chain.exists, ours) {
        (false, _) => Ok(ExitStatus::Yes),
        (true, 0) => print(&format!(
            "nftables table inet {} stays, with third-party rules in it; enforcer's are removed\n",
            jobs::TABLE
        )),
        (true, ours) => {
            print(&format!(
                "nftables table inet {} stays, and {ours} of enforcer's rules in its chain {} could not be removed: \
                 they still allow what was granted; run this again, or remove them with nft\n",
                jobs::TABLE,
                jobs::CHAIN
            ))?;
            Ok(ExitStatus::No)
        }
    }
}
