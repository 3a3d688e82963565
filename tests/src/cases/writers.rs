//! F11: one writer at a time, whatever enforces; the next one waits, or says who has the place.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};

use super::Case;
use crate::{
    attack::as_user,
    backend::ALL,
    world::{NOBODY, World, at_this_load, binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f11_two_that_apply_at_once_take_turns).on(ALL),
        case!(f11_who_comes_too_late_hears_who_is_there).on(ALL),
        case!(f11_f6_the_lock_is_nobody_elses).on(ALL),
    ]
}

/// Configurations of one instance, of so many endpoints each.
fn configurations(world: &World, sizes: [u8; 2]) -> Result<[PathBuf; 2]> {
    let mut paths = [world.path("one.toml"), world.path("other.toml")];
    for (path, size) in paths.iter_mut().zip(sizes) {
        let endpoints: Vec<_> = (0..size).map(|last| format!("tcp://10.0.{size}.{last}:1")).collect();
        world.configure_one(&endpoints, r#"["root"]"#)?;
        fs::rename(world.path("enforcer.toml"), path)?;
    }
    Ok(paths)
}

fn enforcer(config: &Path, command: &str) -> Result<Command> {
    let mut enforcer = Command::new(binary("enforcer")?);
    enforcer.arg("--config").arg(config).arg(command);
    Ok(enforcer)
}

fn f11_two_that_apply_at_once_take_turns() -> Result<()> {
    const PAIRS: u8 = 25;
    let world = World::new()?;
    for pair in 0..PAIRS {
        // Never what is active already.
        let configs = configurations(&world, [1 + 2 * pair, 2 + 2 * pair])?;
        let mut started = Vec::new();
        for config in &configs {
            let mut command = enforcer(config, "apply")?;
            let quiet = command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            started.push(quiet.spawn()?);
        }
        for child in started {
            let ended = child.wait_with_output()?;
            ensure!(
                ended.status.success(),
                "pair {pair}: {}",
                String::from_utf8_lossy(&ended.stderr)
            );
        }
        let whole = configs
            .iter()
            .map(|config| Ok(ran(&mut enforcer(config, "verify")?)?.code));
        let whole = whole.collect::<Result<Vec<_>>>()?;
        ensure!(
            matches!(whole[..], [0, 1] | [1, 0]),
            "pair {pair}: the kernel holds neither whole: {whole:?}"
        );
    }
    let [one, _] = configurations(&world, [1, 2])?;
    ran(&mut enforcer(&one, "unload")?)?.demand(0).map(drop)
}

/// Too late is who has waited for some seconds.
fn f11_who_comes_too_late_hears_who_is_there() -> Result<()> {
    let world = World::new()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    let daemon = world.daemon()?;
    // Who finds its socket need not wait: it stays.
    let refused = world.enforcer(&["apply"])?.demand(2)?.stderr;
    ensure!(refused.contains("in use by another enforcer"), "{refused}");
    // It makes that again.
    let socket = world.path("run/control.sock");
    fs::remove_file(&socket)?;
    until(
        "the socket is made again",
        || Ok(world.enforcer(&["events"])?.code == 0),
    )?;
    // Not while it hangs.
    daemon.signal(Signal::SIGSTOP)?;
    fs::remove_file(&socket)?;
    // Nothing is taken from under a daemon that cannot be asked.
    for command in [&["apply"][..], &["apply", "--last-good"], &["unload"]] {
        let started = Instant::now();
        let refused = world.enforcer(command)?.demand(2)?.stderr;
        let waited = started.elapsed();
        let named = refused.contains(&format!("process {} (", daemon.pid())) && refused.contains("enforcer.toml run");
        ensure!(named && refused.lines().count() == 1, "{command:?}: {refused}");
        ensure!(
            waited > Duration::from_secs(3),
            "{command:?} waited for {waited:?} only"
        );
    }
    // A lock ends with its holder.
    daemon.kill()?;
    world.apply()?;
    world.enforcer(&["unload"])?.demand(0).map(drop)
}

fn f11_f6_the_lock_is_nobody_elses() -> Result<()> {
    let world = World::new()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    world.apply()?;
    let lock = world.path("state/lock");
    let meta = fs::metadata(&lock)?;
    ensure!(
        meta.uid() == 0 && meta.mode() & 0o7777 == 0o600,
        "uid {} mode {:o}",
        meta.uid(),
        meta.mode()
    );
    // Not even where the directory was opened by mistake.
    fs::set_permissions(world.path("state"), fs::Permissions::from_mode(0o755))?;
    let opened = as_user(NOBODY, || File::open(&lock).map(drop).map_err(|error| error.kind()))?;
    ensure!(opened == Err(ErrorKind::PermissionDenied), "{opened:?}");
    world.apply()?;
    // One that another user made first, and holds, keeps nobody out.
    fs::remove_file(&lock)?;
    fs::set_permissions(world.path("state"), fs::Permissions::from_mode(0o777))?;
    let theirs = as_user(NOBODY, || {
        let file = File::create(&lock)?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| io::Error::from(error))
    })??;
    let started = Instant::now();
    let applied = world.enforcer(&["apply"])?;
    ensure!(
        applied.code != 2 && applied.stderr.contains("not trusted") && !applied.stderr.contains("in use"),
        "{applied:?}"
    );
    ensure!(
        started.elapsed() < at_this_load(Duration::from_secs(4))?,
        "it waited for them"
    );
    drop(theirs);
    world.enforcer(&["unload"])?.demand(0).map(drop)
}
