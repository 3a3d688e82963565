//! More endpoints than lie in one map with few: another map is made when they come, and found by the programs.

use std::{fs, net::SocketAddr, path::PathBuf, thread, time::Duration};

use anyhow::{Result, ensure};

use super::Case;
use crate::{
    backend::EBPF,
    foreign::map::PinnedMap,
    world::{Daemon, Listener, NOBODY, World, maps_name, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(d1_many_endpoints_come_and_go).on(EBPF),
        case!(f5_many_endpoints_taken_from_the_programs_come_back).on(EBPF),
        case!(f1_many_endpoints_are_taken_over).on(EBPF),
    ]
}

/// More than `endpoints` has room for, so that some share a bucket; and some of them.
const MANY: u32 = 6_000;
const TRIED: [u32; 5] = [0, 1, 2_999, 5_000, MANY - 1];

/// Addresses of loopback, on all of which the world listens.
fn endpoint(world: &World, number: u32) -> Result<SocketAddr> {
    let [_, _, high, low] = (number + 1).to_be_bytes();
    Ok(format!("127.77.{high}.{low}:{}", world.port).parse()?)
}

fn configure(world: &World, many: bool) -> Result<()> {
    let more = if many { MANY } else { 0 };
    let mut endpoints = vec![format!("tcp://{}", world.here())];
    for number in 0..more {
        endpoints.push(format!("tcp://{}", endpoint(world, number)?));
    }
    world.configure_one(&endpoints, r#"["root"]"#)
}

/// Demands that each that is tried refuses nobody's attempts or none, and never root's.
fn refuse(world: &World, refuse: bool) -> Result<()> {
    for number in TRIED {
        let to = endpoint(world, number)?;
        world.attack(0).to(to).reaches()?;
        let nobody = world.attack(NOBODY).to(to);
        if refuse {
            nobody.is_refused()?;
        } else {
            nobody.reaches()?;
        }
    }
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()
}

fn verify(world: &World) -> Result<()> {
    world.enforcer(&["verify"])?.demand(0).map(drop)
}

/// A map's pin.
fn pin(world: &World, name: &str) -> PathBuf {
    world.pins().join(maps_name()).join(name)
}

fn has_another(world: &World) -> bool {
    pin(world, "many_endpoints").exists()
}

fn reload(world: &World, many: bool) -> Result<()> {
    configure(world, many)?;
    world.enforcer(&["reload"])?.demand(0)?;
    refuse(world, many)?;
    verify(world)
}

fn d1_many_endpoints_come_and_go() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    configure(&world, false)?;
    let _daemon = world.daemon()?;
    refuse(&world, false)?;
    ensure!(!has_another(&world), "a map for many is there before there are many");
    // To either slot, and back.
    for many in [true, false, true, true, false, false] {
        reload(&world, many)?;
    }
    ensure!(has_another(&world), "the map for many is gone");
    ensure!(world.status()?["restored"] == 0, "{}", world.status()?);
    Ok(())
}

fn guarded() -> Result<(World, Listener, Daemon)> {
    let world = World::new()?;
    let listener = world.listen()?;
    configure(&world, true)?;
    let daemon = world.daemon()?;
    refuse(&world, true)?;
    Ok((world, listener, daemon))
}

fn f5_many_endpoints_taken_from_the_programs_come_back() -> Result<()> {
    type Harm = fn(&World) -> Result<()>;
    let harms: [Harm; 3] = [
        |world| Ok(PinnedMap::open(&pin(world, "many"))?.delete(&[0; 4])?),
        |world| {
            let map = PinnedMap::open(&pin(world, "many_endpoints"))?;
            for (key, _) in map.entries()? {
                map.delete(&key)?;
            }
            Ok(())
        },
        // What the programs find stays as it is: only the next start would not.
        |world| Ok(fs::remove_file(pin(world, "many_endpoints"))?),
    ];
    for harm in harms {
        let (world, _listener, _daemon) = guarded()?;
        harm(&world)?;
        until("it is counted as restored", || {
            Ok(world.status()?["restored"].as_u64() > Some(0))
        })?;
        refuse(&world, true)?;
        verify(&world)?;
        // Once is enough.
        let restored = world.status()?["restored"].clone();
        thread::sleep(Duration::from_millis(2500));
        ensure!(world.status()?["restored"] == restored, "{}", world.status()?);
    }
    Ok(())
}

fn f1_many_endpoints_are_taken_over() -> Result<()> {
    for taken in [false, true] {
        let (world, _listener, daemon) = guarded()?;
        daemon.kill()?;
        if taken {
            PinnedMap::open(&pin(&world, "many"))?.delete(&[0; 4])?;
            world.enforcer(&["verify"])?.demand(1)?;
        }
        let daemon = world.daemon()?;
        refuse(&world, true)?;
        verify(&world)?;
        drop(daemon);
        world.enforcer(&["unload"])?.demand(0)?;
        ensure!(!world.pins().exists(), "pins are left");
    }
    Ok(())
}
