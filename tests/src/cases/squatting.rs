//! Another user makes a path of ours first, in a directory that all may write (F6): it neither keeps enforcer from
//! starting, nor is trusted or followed.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Result, ensure};

use super::{
    Case,
    visibility::{Host, crash},
};
use crate::{
    backend::EBPF,
    world::{Daemon, NOBODY, binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f6_a_pin_directory_of_another_users_is_replaced).on(EBPF),
        case!(f6_a_pin_directory_that_is_made_again_and_again_is_replaced).on(EBPF),
        case!(f6_state_and_socket_directories_of_another_users_are_replaced).on(EBPF),
    ]
}

/// Things that another user can put at a path, by the words of a shell; `$1` is the path, `$2` a directory of root's.
const EVERYWHERE: [&str; 3] = [
    "mkdir \"$1\"",
    "mkdir \"$1\" && mkdir \"$1/maps\" && ln -s \"$2\" \"$1/connect4\"",
    "ln -s \"$2\" \"$1\"",
];
/// On a bpffs there are no files.
const ELSEWHERE: [&str; 2] = [
    "echo x > \"$1\"",
    "mkdir \"$1\" && echo x > \"$1/last-good.json\" && echo x > \"$1/control.sock\"",
];

/// A host of its own, with a bpffs of the mode that the kernel gives to one which is mounted without a mode.
struct Shared {
    host: Host,
    /// Of root's, and not to be touched.
    victim: PathBuf,
}

impl Shared {
    fn new() -> Result<Self> {
        let host = Host::new("private")?;
        let mut mount = host.command(Path::new("mount"));
        ran(mount.args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))?;
        let victim = host.world.path("victim");
        fs::create_dir(&victim)?;
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o700))?;
        Ok(Self { host, victim })
    }

    fn as_nobody(&self, script: &str, path: &Path) -> Command {
        let user = NOBODY.to_string();
        let mut command = self.host.command(Path::new("setpriv"));
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
        command.args(["sh", "-c", script, "sh"]).arg(path).arg(&self.victim);
        command
    }

    fn plant(&self, script: &str, path: &Path) -> Result<()> {
        ran(&mut self.as_nobody(script, path))?.demand(0)?;
        let owner = self.look("stat -c %u \"$1\"", path)?;
        ensure!(owner == NOBODY.to_string(), "it is user {owner}'s");
        Ok(())
    }

    /// What root's shell there prints of a path.
    fn look(&self, script: &str, path: &Path) -> Result<String> {
        let mut command = self.host.command(Path::new("sh"));
        let said = ran(command.args(["-c", script, "sh"]).arg(path))?.demand(0)?.stdout;
        Ok(said.trim().to_owned())
    }

    fn daemon(&self) -> Result<Daemon> {
        let mut command = self.host.command(&binary("enforcer")?);
        self.host.world.daemon_with(&mut command)
    }

    fn is_guarded(&self) -> Result<()> {
        self.host.world.attack(NOBODY).is_refused()?;
        self.host.world.attack(0).reaches()?;
        self.host.enforcer(&["status"])?.demand(0)?;
        ensure!(fs::read_dir(&self.victim)?.count() == 0, "a link was followed");
        Ok(())
    }

    /// Ours; what lies aside is not.
    fn is_ours(&self, path: &Path) -> Result<()> {
        let script = "stat -c '%F %u %a' \"$1\"; cd \"${1%/*}\"; stat -c %u enforcer_aside_* 2>/dev/null | sort -u";
        let found = self.look(script, path)?;
        let only_ours = "directory 0 700";
        ensure!(
            found == only_ours || found == format!("{only_ours}\n{NOBODY}"),
            "{} is {found}",
            path.display()
        );
        Ok(())
    }
}

fn f6_a_pin_directory_of_another_users_is_replaced() -> Result<()> {
    let shared = Shared::new()?;
    let (host, pins) = (&shared.host, shared.host.world.pins());
    for backend in ["ebpf", "auto"] {
        host.configure(backend)?;
        for script in EVERYWHERE {
            shared.plant(script, &pins)?;
            // Nothing of ours is there yet, and nothing of theirs is taken for it.
            host.enforcer(&["status"])?.demand(1)?;
            host.world.attack(NOBODY).reaches()?;
            let daemon = shared.daemon()?;
            shared.is_guarded()?;
            shared.is_ours(&pins)?;
            let status = host.enforcer(&["status", "--json"])?.stdout;
            ensure!(status.contains("\"backend\":\"ebpf\""), "{status}");
            crash(daemon)?;
            host.enforcer(&["unload"])?.demand(0)?;
        }
    }
    Ok(())
}

/// Ended when dropped.
struct Squatter(Child);

impl Drop for Squatter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn f6_a_pin_directory_that_is_made_again_and_again_is_replaced() -> Result<()> {
    let shared = Shared::new()?;
    let (host, pins) = (&shared.host, shared.host.world.pins());
    host.configure("ebpf")?;
    shared.plant(EVERYWHERE[0], &pins)?;
    let again = "while :; do mkdir \"$1\" \"$1/x\" 2>/dev/null; done";
    let _squatter = Squatter(shared.as_nobody(again, &pins).stdin(Stdio::null()).spawn()?);
    for _ in 0..20 {
        host.enforcer(&["apply"])?.demand(0)?;
        shared.is_guarded()?;
        shared.is_ours(&pins)?;
        host.enforcer(&["unload"])?.demand(0)?;
        until("the other user has made it again", || {
            Ok(shared.look("stat -c %u \"$1\" 2>/dev/null || true", &pins)? == NOBODY.to_string())
        })?;
    }
    Ok(())
}

fn f6_state_and_socket_directories_of_another_users_are_replaced() -> Result<()> {
    let shared = Shared::new()?;
    let world = &shared.host.world;
    let open = world.path("open");
    fs::create_dir(&open)?;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o1777))?;
    shared.host.configure("ebpf")?;
    let file = world.path("enforcer.toml");
    let toml = fs::read_to_string(&file)?;
    let (state, run) = (open.join("state"), open.join("run"));
    let text = |path: &Path| path.display().to_string();
    let toml = toml.replace(&text(&world.path("state")), &text(&state));
    fs::write(&file, toml.replace(&text(&world.path("run")), &text(&run)))?;
    for script in EVERYWHERE.iter().chain(&ELSEWHERE) {
        for path in [&state, &run] {
            shared.plant(script, path)?;
        }
        let daemon = shared.daemon()?;
        shared.is_guarded()?;
        for path in [&state, &run] {
            shared.is_ours(path)?;
        }
        ensure!(state.join("last-good.json").is_file(), "nothing was saved");
        crash(daemon)?;
        shared.host.enforcer(&["unload"])?.demand(0)?;
        for path in [&state, &run] {
            fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}
