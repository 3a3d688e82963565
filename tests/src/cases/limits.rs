//! F2, F7: rule sets at their largest, one beyond, and endpoints that change hands under fire.

use std::{fmt::Write as _, fs, net::Ipv4Addr, thread, time::Duration};

use anyhow::{Result, ensure};

use super::Case;
use crate::world::{NOBODY, World};

/// Limits as documented (F7).
const TARGETS: u32 = 64;
const PRINCIPALS_OF_A_TARGET: u32 = 1024;
const PREFIXES: u32 = 16_384;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f7_as_many_targets_as_there_may_be),
        case!(f7_as_many_principals_as_there_may_be),
        case!(f7_as_many_prefixes_as_there_may_be),
        case!(f2_an_endpoint_that_changes_hands_is_never_open).long(),
    ]
}

/// A target that admits root alone.
fn target(name: &str, endpoints: &[String]) -> String {
    format!("[target.{name}]\nendpoints = {endpoints:?}\nallow = [\"root\"]\n")
}

/// Demands an error of one line that says this of the limit, and that `world` is guarded as before.
fn refused(world: &World, says: &str) -> Result<()> {
    let error = world.enforcer(&["apply"])?.demand(2)?.stderr;
    // `auto` may warn of what it took.
    let errors = error.lines().filter(|line| !line.contains(" WARN ")).count();
    ensure!(errors == 1 && error.contains(says), "{error}");
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()
}

fn f7_as_many_targets_as_there_may_be() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.attack(NOBODY).reaches()?;
    let many = |count: u32| {
        (0..count).fold(String::new(), |mut text, number| {
            let other = format!("tcp://10.2.0.{number}:{}", world.port);
            text.push_str(&target(&format!("t{number}"), &[other]));
            text
        })
    };
    let last = target("zz", &[format!("tcp://{}", world.here())]);
    world.configure(&format!("{}{last}", many(TARGETS - 1)))?;
    world.apply()?;
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()?;
    world.configure(&format!("{}{last}", many(TARGETS)))?;
    refused(
        &world,
        &format!("there are {} targets and the limit is {TARGETS};", TARGETS + 1),
    )
}

fn f7_as_many_principals_as_there_may_be() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let endpoints = [format!("tcp://{}", world.here())];
    let users = |count: u32| format!("{:?}", (0..count).collect::<Vec<_>>());
    world.configure_one(&endpoints, &users(PRINCIPALS_OF_A_TARGET))?;
    world.apply()?;
    world.attack(NOBODY).is_refused()?;
    world.attack(PRINCIPALS_OF_A_TARGET - 1).reaches()?;
    world.attack(PRINCIPALS_OF_A_TARGET).is_refused()?;
    world.configure_one(&endpoints, &users(PRINCIPALS_OF_A_TARGET + 1))?;
    refused(
        &world,
        &format!("one principal more than the limit of {PRINCIPALS_OF_A_TARGET};"),
    )
}

fn f7_as_many_prefixes_as_there_may_be() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let port = world.port;
    let many = |count: u32| {
        let mut endpoints: Vec<String> = (0..count)
            .map(|number| format!("tcp://{}/31:{port}", Ipv4Addr::from(0x0a00_0000 + 2 * number)))
            .collect();
        endpoints.push(format!("tcp://127.64.0.0/10:{port}"));
        endpoints
    };
    world.configure_one(&many(PREFIXES - 1), r#"["root"]"#)?;
    world.apply()?;
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()?;
    let last = Ipv4Addr::from(0x0a00_0000 + 2 * (PREFIXES - 2) + 1);
    let beyond = Ipv4Addr::from(u32::from(last) + 1);
    // The file is long to read: `check` takes a short one that names the same pins.
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    for (address, code) in [(last, 1), (beyond, 0)] {
        world
            .enforcer(&["check", "nobody", &format!("{address}:{port}")])?
            .demand(code)?;
    }
    world.configure_one(&many(PREFIXES), r#"["root"]"#)?;
    refused(
        &world,
        &format!(
            "{} prefix endpoints are more than the maximum of {PREFIXES};",
            PREFIXES + 1
        ),
    )
}

fn f2_an_endpoint_that_changes_hands_is_never_open() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.attack(NOBODY).reaches()?;
    let (port, exact) = (world.port, format!("tcp://{}", world.here()));
    let prefix = format!("tcp://127.0.0.0/8:{port}");
    let nested = [format!("tcp://127.64.0.0/10:{port}"), prefix.clone()];
    let crowd = (0..5000).map(|host| format!("tcp://10.3.{}.{}:{port}", host >> 8, host & 255));
    let crowd: Vec<String> = crowd.chain([exact.clone()]).collect();
    let mut many = String::new();
    for number in 0..40 {
        write!(
            many,
            "{}",
            target(&format!("a{number}"), &[format!("tcp://10.4.0.{number}:{port}")])
        )?;
    }
    let forms = [
        target("one", std::slice::from_ref(&exact)),
        target("two", std::slice::from_ref(&prefix)),
        target("one", &[format!("tcp://local:{port}")]),
        format!("{many}{}", target("one", &nested)),
        target("two", &crowd),
        format!("{}{}", target("one", &[exact]), target("two", &[prefix])),
    ];
    let fire = world.path("fire");
    world.configure(&forms[0])?;
    world.apply()?;
    fs::write(&fire, "")?;
    let denied = [world.attack(NOBODY).hammer(&fire)?, world.attack(NOBODY).hammer(&fire)?];
    let allowed = world.attack(0).hammer(&fire)?;
    // By processes that take over from each other, and, much faster, by one that stays.
    let change = |rounds: usize, act: &dyn Fn() -> Result<()>| -> Result<()> {
        for form in (0..rounds).filter_map(|round| forms.get(round * 5 % forms.len())) {
            world.configure(form)?;
            act()?;
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    change(18, &|| world.apply())?;
    let daemon = world.daemon()?;
    change(120, &|| daemon.reload())?;
    fs::remove_file(&fire)?;
    ensure!(!daemon.log().contains("reload: "), "{}", daemon.log());
    for hammer in denied {
        let blows = hammer.finish()?;
        println!("    denied user: {blows:?}");
        ensure!(
            blows.connected + blows.other == 0 && blows.refused + blows.reset > 1000,
            "the denied user: {blows:?}"
        );
    }
    let blows = allowed.finish()?;
    ensure!(
        blows.refused + blows.reset + blows.other == 0 && blows.connected > 1000,
        "the allowed user: {blows:?}"
    );
    Ok(())
}
