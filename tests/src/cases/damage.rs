//! F1, F4: starts at which several things are damaged at once, or something that looks active is not.

use std::{fs, process::Command};

use anyhow::{Result, ensure};

use super::{
    Case,
    boot::{FILE, asked, guarded},
    names::{Named, addresses},
};
use crate::{
    backend::{BOTH, EBPF, NFTABLES},
    dns::Zone,
    world::{Listener, NOBODY, World, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f4_a_dormant_table_is_not_active).on(NFTABLES),
        case!(f4_a_backend_without_rules_gets_them).on(BOTH),
        case!(f4_a_dormant_table_beside_ebpf_is_made_anew).on(BOTH),
        case!(f4_a_link_that_is_gone_is_made_again).on(EBPF),
        case!(f4_rules_without_a_link_are_not_active).on(EBPF),
        case!(f1_damaged_pins_and_state_open_no_name).on(EBPF),
        case!(f4_a_bad_configuration_and_damaged_state_are_both_reported),
    ]
}

/// The configuration as it was, and one that is refused in its place.
fn broken(world: &World) -> Result<String> {
    let toml = world.path("enforcer.toml");
    let good = fs::read_to_string(&toml)?;
    fs::write(&toml, format!("{good}bogus = 1\n"))?;
    Ok(good)
}

/// A world whose rules a daemon left active when it was killed.
fn left_active() -> Result<(World, Listener)> {
    let world = World::new()?;
    let listener = world.listen()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    world.daemon()?.kill()?;
    world.attack(NOBODY).is_refused()?;
    Ok((world, listener))
}

fn nft(arguments: &[&str]) -> Result<String> {
    Ok(ran(Command::new("nft").args(arguments))?.demand(0)?.stdout)
}

fn f4_a_dormant_table_is_not_active() -> Result<()> {
    let (world, _listener) = left_active()?;
    let dormant = format!("add table inet {} {{ flags dormant ; }}", world.name());
    nft(&[&dormant])?;
    world.attack(NOBODY).reaches()?;
    broken(&world)?;
    let _daemon = world.daemon()?;
    guarded(&world)?;
    let status = asked(&world)?;
    ensure!(
        status.contains("degraded") && status.contains("the last known good rules are active instead"),
        "{status}"
    );
    Ok(())
}

fn f4_a_backend_without_rules_gets_them() -> Result<()> {
    let (world, _listener) = left_active()?;
    nft(&["delete", "table", "inet", world.name()])?;
    let tables = || nft(&["list", "tables"]);
    ensure!(!tables()?.contains(world.name()), "the table is still there");
    broken(&world)?;
    let _daemon = world.daemon()?;
    ensure!(tables()?.contains(world.name()), "nftables has no rules");
    guarded(&world)?;
    let status = asked(&world)?;
    ensure!(
        status.contains("the last known good rules are active instead") && !status.contains("nothing is active"),
        "{status}"
    );
    Ok(())
}

fn f4_a_dormant_table_beside_ebpf_is_made_anew() -> Result<()> {
    let (world, _listener) = left_active()?;
    nft(&[&format!("add table inet {} {{ flags dormant ; }}", world.name())])?;
    let dormant = || -> Result<bool> { Ok(nft(&["list", "table", "inet", world.name()])?.contains("flags dormant")) };
    ensure!(dormant()?, "the table is not dormant");
    broken(&world)?;
    let _daemon = world.daemon()?;
    ensure!(!dormant()?, "the table is dormant still");
    guarded(&world)
}

/// The maps hold the last known good rules, and a link has gone with its pin.
fn f4_a_link_that_is_gone_is_made_again() -> Result<()> {
    let (world, _listener) = left_active()?;
    fs::remove_file(world.pins().join("connect4"))?;
    until("the link is gone", || Ok(world.attack(NOBODY).reaches().is_ok()))?;
    broken(&world)?;
    let _daemon = world.daemon()?;
    guarded(&world)
}

/// The maps hold rules that are not the last known good ones, and nothing runs by them.
fn f4_rules_without_a_link_are_not_active() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    let daemon = world.daemon()?;
    let file = world.path("state").join(FILE);
    let older = fs::read(&file)?;
    let both = [format!("tcp://{}", world.here()), "tcp://192.0.2.1:4222".to_owned()];
    world.configure_one(&both, r#"["root"]"#)?;
    daemon.reload()?;
    daemon.kill()?;
    fs::write(&file, older)?;
    for hook in ["connect4", "connect6"] {
        fs::remove_file(world.pins().join(hook))?;
    }
    until("the links are gone", || Ok(world.attack(NOBODY).reaches().is_ok()))?;
    broken(&world)?;
    let _daemon = world.daemon()?;
    guarded(&world)
}

/// The maps that tell what is guarded cannot be read, and the file that tells it too cannot either.
fn f1_damaged_pins_and_state_open_no_name() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    let world = &named.world;
    let refused = || world.attack(NOBODY).to(([10, 9, 0, 1], world.port).into()).is_refused();
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    named.daemon()?.kill()?;
    refused()?;
    let maps = world.pins().join(crate::world::maps_name());
    fs::remove_file(maps.join("principals"))?;
    fs::write(world.path("state").join(FILE), "{")?;
    named.dns.set("bus.test", Zone::Silence);
    let daemon = named.daemon()?;
    refused()?;
    ensure!(
        daemon.log().contains("damaged") && asked(world)?.contains("stay until they have been"),
        "{}",
        daemon.log()
    );
    named.dns.set("bus.test", addresses(&["10.9.0.2"]));
    world.enforcer(&["refresh"])?;
    until("the answer is active", || named.denied("10.9.0.2"))?;
    until("all is well", || Ok(asked(world)?.contains("\"enforcing\"")))
}

fn f4_a_bad_configuration_and_damaged_state_are_both_reported() -> Result<()> {
    let world = World::new()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    world.daemon()?.kill()?;
    fs::write(world.path("state").join(FILE), "{")?;
    let good = broken(&world)?;
    let ended = world.enforcer(&["run"])?.demand(2)?;
    ensure!(
        ended.stderr.contains("bogus") && ended.stderr.contains(FILE),
        "{ended:?}"
    );
    fs::write(world.path("enforcer.toml"), good)?;
    world.enforcer(&["unload"])?.demand(0)?;
    Ok(())
}
