//! F1, F5: starts and ends over whatever is pinned: halves, other versions, links that were tampered with.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::Case;
use crate::{
    backend::EBPF,
    foreign::take_link,
    world::{Listener, NOBODY, World, binary, maps_name, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f1_a_start_killed_half_way_is_no_obstacle).on(EBPF),
        case!(f1_damaged_pins_are_taken_over_without_a_gap).on(EBPF),
        case!(f1_unload_removes_whatever_is_left).on(EBPF),
        case!(f1_unload_ends_another_version_at_once).on(EBPF),
        case!(f5_another_version_is_told_from_off).on(EBPF),
        case!(f5_a_link_that_runs_another_program_is_told).on(EBPF),
        case!(f5_a_judged_cgroup_made_again_is_judged_again).on(EBPF),
        case!(f5_a_link_on_another_cgroup_is_told).on(EBPF),
        case!(d3_without_btf_the_task_decides_alone).on(EBPF),
    ]
}

/// A world whose endpoint only root may dial.
fn guarded() -> Result<(World, Listener)> {
    let world = World::new()?;
    let listener = world.listen()?;
    world.attack(NOBODY).reaches()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    Ok((world, listener))
}

fn unpin(world: &World, names: &[&str]) -> Result<()> {
    names
        .iter()
        .try_for_each(|name| Ok(fs::remove_file(world.pins().join(name))?))
}

/// Demands a status of this state, with a cause that says this, from the kernel alone.
fn told(world: &World, state: &str, cause: &str) -> Result<()> {
    let status = world.status()?;
    ensure!(
        status["state"] == state && status["causes"].to_string().contains(cause),
        "{status}"
    );
    Ok(())
}

fn f1_a_start_killed_half_way_is_no_obstacle() -> Result<()> {
    for missing in ["active", "events", "endpoints", "lost"] {
        let (world, _listener) = guarded()?;
        world.apply()?;
        unpin(&world, &["connect4", "connect6", &format!("{}/{missing}", maps_name())])?;
        until("the links are gone", || Ok(world.attack(NOBODY).run()?.errno.is_none()))?;
        told(&world, "off", "nothing is active")?;
        world.apply()?;
        world.attack(NOBODY).is_refused()?;
        world.attack(0).reaches()?;
        ensure!(
            !world.pins().join(format!("{}_damaged", maps_name())).exists(),
            "the damaged maps were left"
        );
        world.enforcer(&["unload"])?.demand(0)?;
    }
    Ok(())
}

fn f1_damaged_pins_are_taken_over_without_a_gap() -> Result<()> {
    let (world, _listener) = guarded()?;
    world.apply()?;
    let fire = world.path("fire");
    fs::write(&fire, "")?;
    let (denied, allowed) = (world.attack(NOBODY).hammer(&fire)?, world.attack(0).hammer(&fire)?);
    for missing in ["active", "endpoints", "events"].map(|map| format!("{}/{map}", maps_name())) {
        unpin(&world, &[&missing])?;
        told(&world, "degraded", &missing)?;
        let check = world
            .enforcer(&["check", "nobody", &world.here().to_string()])?
            .demand(2)?;
        ensure!(check.stderr.contains("restart the daemon"), "{check:?}");
        world.attack(NOBODY).is_refused()?;
        let daemon = world.daemon()?;
        ensure!(world.status()?["state"] == "enforcing", "{}", world.status()?);
        daemon.kill()?;
    }
    fs::remove_file(&fire)?;
    let (denied, allowed) = (denied.finish()?, allowed.finish()?);
    ensure!(
        denied.connected == 0 && denied.refused > 0,
        "the denied user: {denied:?}"
    );
    ensure!(
        allowed.refused == 0 && allowed.connected > 0,
        "the allowed user: {allowed:?}"
    );
    Ok(())
}

fn f1_unload_removes_whatever_is_left() -> Result<()> {
    type Harm = fn(&Path) -> std::io::Result<()>;
    let harms: [Harm; 5] = [
        // One map is another one, and one is gone.
        |maps| fs::rename(maps.join("principals"), maps.join("endpoints")),
        |maps| fs::rename(maps.join("endpoints"), maps.join("ports")),
        |maps| fs::remove_file(maps.join("active")),
        |maps| fs::remove_dir_all(maps),
        |maps| fs::rename(maps.join("lost"), maps.join("active")),
    ];
    for harm in harms {
        let (world, _listener) = guarded()?;
        world.apply()?;
        harm(&world.pins().join(maps_name()))?;
        world.attack(NOBODY).is_refused()?;
        world.enforcer(&["unload"])?.demand(0)?;
        world.attack(NOBODY).reaches()?;
        ensure!(!world.pins().exists(), "unload left {}", world.pins().display());
    }
    Ok(())
}

fn f1_unload_ends_another_version_at_once() -> Result<()> {
    let (world, _listener) = guarded()?;
    for _ in 0..5 {
        world.apply()?;
        fs::rename(world.pins().join(maps_name()), world.pins().join("maps_v0"))?;
        world.attack(NOBODY).is_refused()?;
        world.enforcer(&["unload"])?.demand(0)?;
        world.attack(NOBODY).reaches()?;
    }
    Ok(())
}

fn f5_another_version_is_told_from_off() -> Result<()> {
    let (world, _listener) = guarded()?;
    world.apply()?;
    fs::rename(world.pins().join(maps_name()), world.pins().join("maps_v0"))?;
    let says = "another version of enforcer (map layout 0) enforces";
    told(&world, "degraded", says)?;
    let check = world
        .enforcer(&["check", "nobody", &world.here().to_string()])?
        .demand(2)?;
    ensure!(check.stderr.contains(says), "{check:?}");
    let _daemon = world.daemon()?;
    ensure!(world.status()?["state"] == "enforcing", "{}", world.status()?);
    world.attack(NOBODY).is_refused()
}

fn f5_a_link_that_runs_another_program_is_told() -> Result<()> {
    let (world, _listener) = guarded()?;
    world.apply()?;
    take_link(&world.pins().join("connect4"))?;
    world.attack(NOBODY).reaches()?;
    told(
        &world,
        "degraded",
        "the link of connect4 runs a program that is not ours",
    )?;
    let daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    daemon.signal(Signal::SIGSTOP)?;
    take_link(&world.pins().join("connect4"))?;
    world.attack(NOBODY).reaches()?;
    daemon.signal(Signal::SIGCONT)?;
    until("the program is back", || {
        Ok(world.attack(NOBODY).run()?.errno == Some(libc::EPERM))
    })?;
    let status = world.status()?;
    ensure!(status["restored"] == 1 && status["state"] == "degraded", "{status}");
    Ok(())
}

/// A cgroup below the world's, which the configuration then names instead.
fn configured_on_child(world: &World) -> Result<PathBuf> {
    let child = world.cgroup.join("child");
    fs::create_dir(&child)?;
    let target = format!(
        "[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\n",
        world.here()
    );
    world.configure_on(&child, &target)?;
    Ok(child)
}

fn f5_a_judged_cgroup_made_again_is_judged_again() -> Result<()> {
    let (world, _listener) = guarded()?;
    let child = configured_on_child(&world)?;
    let _daemon = world.daemon()?;
    let attack = world.attack(NOBODY).in_cgroup(&child);
    attack.is_refused()?;
    fs::remove_dir(&child)?;
    fs::create_dir(&child)?;
    until("it is judged again", || Ok(attack.run()?.errno == Some(libc::EPERM)))?;
    world.attack(0).in_cgroup(&child).reaches()
}

fn f5_a_link_on_another_cgroup_is_told() -> Result<()> {
    let (world, _listener) = guarded()?;
    world.apply()?;
    configured_on_child(&world)?;
    told(&world, "degraded", "attached to another cgroup")
}

/// D3 without BTF: the world's kernel hides it in a mount namespace of the loader's.
fn d3_without_btf_the_task_decides_alone() -> Result<()> {
    let (world, _listener) = guarded()?;
    world.configure_one(&[format!("tcp://{}", world.here())], "[\"root\"]")?;
    let script = "mount -t tmpfs none /sys/kernel/btf && exec \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(binary("enforcer")?);
    ran(command.arg("--config").arg(world.path("enforcer.toml")).arg("apply"))?.demand(0)?;
    ensure!(world.status()?["subject"] == "task", "{}", world.status()?);
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()?;
    let here = world.here().to_string();
    let check = |arguments: &[&str], code| {
        world
            .enforcer(&[&["check"], arguments].concat())?
            .demand(code)
            .map(drop)
    };
    // The socket of another user, handed to root: only the task counts, and `check` knows.
    world.attack(NOBODY).who(crate::attack::Who::HandedToRoot).reaches()?;
    check(&["root", &here, "--socket-user", "nobody"], 0)?;
    world
        .attack(NOBODY)
        .who(crate::attack::Who::SocketOfRoot)
        .is_refused()?;
    check(&["nobody", &here, "--socket-user", "root"], 1)?;
    check(&["--kernel", &here], 0)?;
    world.apply()?;
    check(&["--kernel", &here], 1)?;
    check(&["root", &here, "--socket-user", "nobody"], 1)
}
