//! What a service manager sees of the daemon.

use std::{
    fs,
    os::unix::net::UnixDatagram,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::Case;
use crate::world::{World, binary, ran, until};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(watchdog_is_fed_where_asked_and_not_by_a_hung_loop),
        case!(runits_check_waits_for_rules_not_for_perfection),
    ]
}

fn watchdog_is_fed_where_asked_and_not_by_a_hung_loop() -> Result<()> {
    let world = World::new()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    let mut command = Command::new(binary("enforcer")?);
    let daemon = world.daemon_with(command.env("WATCHDOG_USEC", "3000000"))?;
    let manager = manager(&world)?;
    until("the daemon says WATCHDOG", || Ok(fed(&manager, Duration::ZERO)))?;
    until("it says so again", || Ok(fed(&manager, Duration::ZERO)))?;
    daemon.signal(Signal::SIGSTOP)?;
    // What it said before it was stopped.
    while manager.recv(&mut [0; 256]).is_ok() {}
    ensure!(!fed(&manager, Duration::from_secs(3)), "a stopped daemon says WATCHDOG");
    daemon.signal(Signal::SIGCONT)?;
    until("it goes on", || Ok(fed(&manager, Duration::ZERO)))?;
    daemon.kill()?;
    drop(manager);

    let mut command = Command::new(binary("enforcer")?);
    let _daemon = world.daemon_with(command.env_remove("WATCHDOG_USEC"))?;
    let manager = self::manager(&world)?;
    ensure!(
        !fed(&manager, Duration::from_secs(3)),
        "WATCHDOG is said where nobody asks for it"
    );
    Ok(())
}

/// The script that is packaged, of this world.
fn runits_check_waits_for_rules_not_for_perfection() -> Result<()> {
    let world = World::new()?;
    let command = format!(
        "'{}' --config '{}'",
        binary("enforcer")?.display(),
        world.path("enforcer.toml").display()
    );
    let packaged = include_str!("../../../enforcer/packaging/runit/check");
    ensure!(packaged.contains("/usr/sbin/enforcer status"), "{packaged}");
    let script = packaged.replace("/usr/sbin/enforcer", &command);
    let check = || ran(Command::new("sh").args(["-c", &script]));
    // As at a first boot: the message bus is not known.
    let bosh = format!("[bosh]\ndir = {:?}\n", world.path("bosh").display().to_string());
    let monit = "[target.monit]\nendpoints = [\"tcp://127.0.0.77:2822\"]\nallow = [\"root\"]\n";
    world.configure(&format!("{bosh}{monit}"))?;
    check()?.demand(1)?;
    let daemon = world.daemon()?;
    ensure!(world.status()?["state"] == "degraded", "{}", world.status()?);
    world.enforcer(&["status"])?.demand(1)?;
    check()?.demand(0)?;
    daemon.kill()?;
    check()?.demand(0)?;
    world.enforcer(&["unload"])?.demand(0)?;
    check()?.demand(1).map(drop)
}

/// Takes the place of the socket that the daemon was started with.
fn manager(world: &World) -> Result<UnixDatagram> {
    let notify = world.path("notify");
    fs::remove_file(&notify)?;
    let socket = UnixDatagram::bind(&notify)?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    Ok(socket)
}

/// Whether the watchdog is fed within so long, or within one read.
fn fed(manager: &UnixDatagram, patience: Duration) -> bool {
    let end = Instant::now() + patience;
    loop {
        let mut message = [0; 256];
        let read = manager.recv(&mut message).unwrap_or(0);
        if message.get(..read) == Some(b"WATCHDOG=1\n") {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
    }
}
