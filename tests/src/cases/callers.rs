//! Callers of the control socket who give up before the daemon comes to them.

use std::{
    fs,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::Case;
use crate::{
    backend::Backend,
    world::{NOBODY, World, binary, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![case!(b4_nothing_is_opened_for_who_has_given_up)]
}

/// A daemon that hangs finds requests of those who wait, and of those who have gone.
fn b4_nothing_is_opened_for_who_has_given_up() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.configure(&format!(
        "backend = {:?}\n[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\ngrants = true\n",
        Backend::current().configured(),
        world.here()
    ))?;
    let daemon = world.daemon()?;
    let call = |words: &[&str]| -> Result<Child> {
        let mut command = Command::new(binary("enforcer")?);
        command.arg("--config").arg(world.path("enforcer.toml")).args(words);
        Ok(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
    };
    let granted = || -> Result<bool> { Ok(world.enforcer(&["grants"])?.stdout.contains("main")) };
    daemon.signal(Signal::SIGSTOP)?;
    let file = world.path("enforcer.toml");
    let text = fs::read_to_string(&file)?;
    fs::write(&file, text.replace("[\"root\"]", "[\"nobody\"]"))?;
    let mut gone = [
        call(&["grant", "main", "--user", "nobody"])?,
        call(&["unload", "--yes"])?,
        call(&["reload"])?,
    ];
    thread::sleep(Duration::from_secs(1));
    for caller in &mut gone {
        caller.kill()?;
        caller.wait()?;
    }
    daemon.signal(Signal::SIGCONT)?;
    until("the daemon answers", || Ok(world.status()?["state"] == "enforcing"))?;
    ensure!(!granted()?, "it was granted to somebody for whom nobody waits");
    world.attack(NOBODY).is_refused()?;
    fs::write(&file, text)?;
    // Whoever waits is served.
    daemon.signal(Signal::SIGSTOP)?;
    let mut waits = call(&["grant", "main", "--user", "nobody"])?;
    thread::sleep(Duration::from_secs(1));
    daemon.signal(Signal::SIGCONT)?;
    ensure!(waits.wait()?.success() && granted()?, "who waited was not served");
    world.attack(NOBODY).reaches()
}
