//! More endpoints than lie in one map with few: another map is made when they come, and found by the programs.

use std::{fs, net::SocketAddr, ops::Range, path::PathBuf, thread, time::Duration};

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
        case!(f1_a_start_with_many_endpoints_killed_half_way_is_no_obstacle).on(EBPF),
    ]
}

/// Each has more than `endpoints` has room for, so that some share a bucket; and more than some in common.
const MANY: Range<u32> = 0..6_000;
const OTHERS: Range<u32> = 1_000..7_000;
const FEW: Range<u32> = 0..0;

/// Addresses of loopback, on all of which the world listens.
fn endpoint(world: &World, number: u32) -> Result<SocketAddr> {
    let [_, _, high, low] = (number + 1).to_be_bytes();
    Ok(format!("127.77.{high}.{low}:{}", world.port).parse()?)
}

fn configure(world: &World, more: Range<u32>) -> Result<()> {
    let mut endpoints = vec![format!("tcp://{}", world.here())];
    for number in more {
        endpoints.push(format!("tcp://{}", endpoint(world, number)?));
    }
    world.configure_one(&endpoints, r#"["root"]"#)
}

/// Demands that these refuse nobody's attempts, others do not, and none refuses root's.
fn refuse(world: &World, these: &Range<u32>) -> Result<()> {
    for number in [0, 1, 999, 1_000, 3_000, 5_999, 6_000, 6_999] {
        let to = endpoint(world, number)?;
        world.attack(0).to(to).reaches()?;
        let nobody = world.attack(NOBODY).to(to);
        if these.contains(&number) {
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

fn reload(world: &World, these: Range<u32>) -> Result<()> {
    configure(world, these.clone())?;
    world.enforcer(&["reload"])?.demand(0)?;
    refuse(world, &these)?;
    verify(world)
}

fn d1_many_endpoints_come_and_go() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    configure(&world, FEW)?;
    let _daemon = world.daemon()?;
    refuse(&world, &FEW)?;
    ensure!(!has_another(&world), "a map for many is there before there are many");
    // To either slot, and back.
    for these in [MANY, FEW, OTHERS, MANY, OTHERS, FEW, FEW, MANY] {
        reload(&world, these)?;
    }
    ensure!(has_another(&world), "the map for many is gone");
    ensure!(world.status()?["restored"] == 0, "{}", world.status()?);
    Ok(())
}

/// Both slots have many, of which not all are the same.
fn guarded() -> Result<(World, Listener, Daemon)> {
    let world = World::new()?;
    let listener = world.listen()?;
    configure(&world, MANY)?;
    let daemon = world.daemon()?;
    refuse(&world, &MANY)?;
    reload(&world, OTHERS)?;
    Ok((world, listener, daemon))
}

fn hide(world: &World) -> Result<()> {
    Ok(PinnedMap::open(&pin(world, "many"))?.delete(&[0; 4])?)
}

fn f5_many_endpoints_taken_from_the_programs_come_back() -> Result<()> {
    type Harm = fn(&World) -> Result<()>;
    let harms: [Harm; 3] = [
        hide,
        // Some are left, fewer than many.
        |world| {
            let map = PinnedMap::open(&pin(world, "many_endpoints"))?;
            for (key, _) in map.entries()?.into_iter().skip(1_000) {
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
        refuse(&world, &OTHERS)?;
        verify(&world)?;
        // Once is enough.
        let restored = world.status()?["restored"].clone();
        thread::sleep(Duration::from_millis(2500));
        ensure!(world.status()?["restored"] == restored, "{}", world.status()?);
        // What was restored is told for a while, as degraded.
        configure(&world, MANY)?;
        world.enforcer(&["reload"])?;
        refuse(&world, &MANY)?;
        verify(&world)?;
    }
    Ok(())
}

fn f1_many_endpoints_are_taken_over() -> Result<()> {
    for (hidden, next) in [(false, OTHERS), (true, OTHERS), (true, MANY), (true, FEW)] {
        let (world, _listener, daemon) = guarded()?;
        daemon.kill()?;
        if hidden {
            hide(&world)?;
            // The first of each bucket is refused all the same.
            let mut open = OTHERS.map(|number| {
                Ok(world
                    .attack(NOBODY)
                    .to(endpoint(&world, number)?)
                    .run()?
                    .errno
                    .is_none())
            });
            ensure!(open.any(|one: Result<bool>| one.unwrap_or(false)), "nothing is open");
            world.enforcer(&["verify"])?.demand(1)?;
        }
        configure(&world, next.clone())?;
        let daemon = world.daemon()?;
        refuse(&world, &next)?;
        verify(&world)?;
        drop(daemon);
        world.enforcer(&["unload"])?.demand(0)?;
        ensure!(!world.pins().exists(), "pins are left");
    }
    Ok(())
}

fn f1_a_start_with_many_endpoints_killed_half_way_is_no_obstacle() -> Result<()> {
    let (world, _listener, daemon) = guarded()?;
    daemon.kill()?;
    // As such a start leaves it: entries are written, nothing is active, and programs find none of it.
    hide(&world)?;
    for link in ["connect4", "connect6"] {
        fs::remove_file(world.pins().join(link))?;
    }
    let active = PinnedMap::open(&pin(&world, "active"))?;
    active.write(&[0; 4], &[0])?;
    until("the links are gone", || Ok(world.attack(NOBODY).run()?.errno.is_none()))?;
    for these in [1_500..6_500, FEW, MANY] {
        configure(&world, these.clone())?;
        world.apply()?;
        refuse(&world, &these)?;
        verify(&world)?;
    }
    Ok(())
}
