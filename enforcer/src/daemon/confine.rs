//! Where the daemon may write once its first rule set is active: around its own files, and nowhere else (Landlock, man
//! 7 `landlock`).
//!
//! The service manager could do that with mounts, and would hide from the daemon what the host mounts later: the
//! settings of a BOSH agent lie on such a mount. Under runit there is nothing else that does it.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, AccessFs, BitFlags, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus,
    path_beneath_rules,
};
use tracing::{info, warn};

use crate::config::Settings;

/// The newest rights that are known of; an older kernel denies those that it has (Linux 5.13 has the first).
const ABI: ABI = ABI::V3;

/// Gives up writing elsewhere than next to the files of an instance, for this thread and those that it starts. Without
/// Landlock all goes on as before.
pub(super) fn to(settings: &Settings) {
    let places = places(settings);
    match beneath(&places) {
        Ok(RulesetStatus::NotEnforced) => {
            info!(
                "writing is not confined by Landlock: this kernel lacks it (Linux 5.13 has it), or a system call \
                 filter denies it"
            );
        }
        Ok(RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced) => {
            let shown: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
            info!("writing is confined by Landlock to {}", shown.join(", "));
        }
        Err(error) => warn!("writing is not confined by Landlock: {error}"),
    }
}

fn beneath(places: &BTreeSet<PathBuf>) -> Result<RulesetStatus, RulesetError> {
    let write: BitFlags<AccessFs> = AccessFs::from_write(ABI);
    let rules = Ruleset::default().handle_access(write)?.create()?;
    let confined = rules.add_rules(path_beneath_rules(places, write))?.restrict_self()?;
    Ok(confined.ruleset)
}

/// The directories that hold those of the instance, as these may be removed, and are made again; where one is a link,
/// what holds its destination too.
fn places(settings: &Settings) -> BTreeSet<PathBuf> {
    let socket_dir = settings.socket.parent().unwrap_or(Path::new("/"));
    let dirs = [&settings.state_dir, socket_dir, &settings.pin_dir];
    dirs.into_iter().flat_map(holders).collect()
}

fn holders(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let by_links = dir.canonicalize().ok();
    let by_links = by_links.as_deref().and_then(Path::parent).map(Path::to_path_buf);
    dir.parent().map(Path::to_path_buf).into_iter().chain(by_links)
}

#[cfg(test)]
mod tests {
    use std::{fs, io, thread};

    use super::*;

    /// Of an instance below a directory.
    fn settings(root: &Path) -> Settings {
        Settings {
            state_dir: root.join("lib/state"),
            socket: root.join("run/own/control.sock"),
            pin_dir: root.join("bpf/pins"),
            ..Settings::default()
        }
    }

    #[test]
    fn what_links_lead_to_is_written_too() -> io::Result<()> {
        let root = tempfile::tempdir()?;
        let at = |path: &str| root.path().join(path);
        for dir in ["store/state", "lib", "run/own", "bpf/pins"] {
            fs::create_dir_all(at(dir))?;
        }
        std::os::unix::fs::symlink(at("store/state"), at("lib/state"))?;
        let expected = ["store", "lib", "run", "bpf"].map(at);
        assert_eq!(places(&settings(root.path())), expected.into());
        Ok(())
    }

    #[test]
    fn f6_what_is_confined_writes_around_its_own_files_alone() -> io::Result<()> {
        let root = tempfile::tempdir()?;
        let at = |path: &str| root.path().join(path);
        for dir in ["lib/state", "run/own", "bpf", "etc"] {
            fs::create_dir_all(at(dir))?;
        }
        fs::write(at("etc/shadow"), "as it was")?;
        let places = places(&settings(root.path()));
        assert_eq!(places, ["lib", "run", "bpf"].map(at).into());
        // Confined for good, so in a thread of its own.
        let run = move |root: PathBuf| -> io::Result<bool> {
            let at = |path: &str| root.join(path);
            match beneath(&places) {
                Ok(RulesetStatus::NotEnforced) => return Ok(false),
                Ok(_) => {}
                Err(error) => return Err(io::Error::other(error)),
            }
            fs::write(at("lib/state/last-good.json"), "{}")?;
            fs::remove_dir_all(at("run/own"))?;
            fs::create_dir(at("run/own"))?;
            drop(std::os::unix::net::UnixListener::bind(at("run/own/control.sock"))?);
            fs::create_dir(at("bpf/pins"))?;
            fs::rename(at("lib/state/last-good.json"), at("lib/state/other"))?;
            let refused = [
                fs::write(at("etc/shadow"), "other"),
                fs::write(at("etc/new"), "new"),
                fs::create_dir(at("etc/dir")),
                fs::remove_file(at("etc/shadow")),
                fs::rename(at("etc/shadow"), at("etc/other")),
                fs::write("/proc/self/comm", "other"),
            ];
            for result in refused {
                let kind = result.map_err(|error| error.kind());
                assert_eq!(kind, Err(io::ErrorKind::PermissionDenied));
            }
            assert_eq!(fs::read_to_string(at("etc/shadow"))?, "as it was");
            Ok(true)
        };
        let path = root.path().to_path_buf();
        let confined = thread::spawn(move || run(path)).join();
        let confined = confined.map_err(|_| io::Error::other("see above"))??;
        if !confined {
            println!("this kernel has no Landlock: nothing was tried");
        }
        Ok(())
    }
}
