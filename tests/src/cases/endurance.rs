//! F1, F2: crash, restart, reload, another program, all under fire; and sizes.

use std::{fs, path::Path, process::Command, thread, time::Duration};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::Case;
use crate::{
    backend::{Backend, EBPF},
    world::{Blows, NOBODY, World, binary, maps_name},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f1_f2_no_wrong_verdict_in_100000_while_all_changes)
            .on(EBPF)
            .long(),
        case!(f1_enforcement_outlives_the_daemon),
        case!(f1_only_unload_removes_and_only_its_own),
        case!(f2_random_rule_sets_change_nothing_else),
        case!(p8_100000_endpoints_check_as_written).on(EBPF),
        case!(f7_more_endpoints_than_the_maximum),
    ]
}

fn rules(world: &World, others: u16) -> Result<()> {
    let mut endpoints = vec![format!("tcp://{}", world.here())];
    endpoints.extend((0..others).map(|other| format!("tcp://10.1.{}.{}:{}", other >> 8, other & 255, world.port)));
    world.configure_one(&endpoints, r#"["root"]"#)
}

fn f1_f2_no_wrong_verdict_in_100000_while_all_changes() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.attack(NOBODY).reaches()?;
    rules(&world, 10)?;
    let mut daemon = world.daemon()?;
    let fire = world.path("fire");
    fs::write(&fire, "")?;
    let denied = (0..4)
        .map(|_| world.attack(NOBODY).hammer(&fire))
        .collect::<Result<Vec<_>>>()?;
    let allowed = world.attack(0).hammer(&fire)?;
    for round in 0..12_u16 {
        rules(&world, 10 + round * 17)?;
        daemon.reload()?;
        world.attack(NOBODY).is_refused()?;
        match round % 3 {
            0 => daemon.kill()?,
            1 => {
                daemon.signal(Signal::SIGTERM)?;
                ensure!(daemon.wait()? == 0, "{}", daemon.log());
            }
            _ => {
                // A version that lays out its maps differently takes over: as if these were another one's.
                drop(daemon);
                fs::rename(world.pins().join(maps_name()), world.pins().join("maps_v0"))?;
            }
        }
        thread::sleep(Duration::from_millis(100));
        daemon = world.daemon()?;
    }
    thread::sleep(Duration::from_secs(2));
    fs::remove_file(&fire)?;
    let mut sum = Blows::default();
    for hammer in denied {
        sum += hammer.finish()?;
    }
    let good = allowed.finish()?;
    println!("    denied user: {sum:?}; allowed user: {good:?}");
    ensure!(sum.connected + sum.reset + sum.other == 0, "the denied user: {sum:?}");
    ensure!(
        good.refused + good.reset + good.other == 0,
        "the allowed user: {good:?}"
    );
    ensure!(
        sum.refused + good.connected >= 100_000,
        "only {} attempts",
        sum.refused + good.connected
    );
    ensure!(
        !world.pins().join("maps_v0").exists(),
        "the old version's maps were left"
    );
    drop(daemon);
    Ok(())
}

fn f1_enforcement_outlives_the_daemon() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.attack(NOBODY).reaches()?;
    rules(&world, 0)?;
    let mut daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    daemon.signal(Signal::SIGTERM)?;
    ensure!(daemon.wait()? == 0, "{}", daemon.log());
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()?;
    let status = world.status()?;
    ensure!(
        status["state"] == "degraded" && status["daemon"]["running"] == false,
        "{status}"
    );
    let daemon = world.daemon()?;
    daemon.kill()?;
    world.attack(NOBODY).is_refused()?;
    world.enforcer(&["unload"])?.demand(0)?;
    world.attack(NOBODY).reaches()?;
    ensure!(!world.pins().exists(), "unload left {}", world.pins().display());
    let again = world.enforcer(&["unload"])?.demand(0)?;
    ensure!(again.stdout.contains("nothing was active"), "{}", again.stdout);
    let off = world.enforcer(&["status"])?.demand(1)?;
    ensure!(off.stdout.contains("off"), "{}", off.stdout);
    Ok(())
}

fn f1_only_unload_removes_and_only_its_own() -> Result<()> {
    let (one, two) = (World::new()?, World::new()?);
    let (_first, _second) = (one.listen()?, two.listen()?);
    rules(&one, 0)?;
    rules(&two, 0)?;
    let mut daemon = one.daemon()?;
    let mut other = two.daemon()?;
    one.attack(NOBODY).is_refused()?;
    two.attack(NOBODY).is_refused()?;
    // Neither judges for the other's cgroup; a table holds for all of them.
    let apart = !Backend::current().is_nftables();
    one.attack(NOBODY).to(two.here()).succeeds(apart)?;
    two.attack(NOBODY).to(one.here()).succeeds(apart)?;
    one.enforcer(&["unload"])?.demand(0)?;
    // What supervises it does not start it again.
    let code = daemon.wait()?;
    ensure!(code == 3, "{code}: {}", daemon.log());
    one.attack(NOBODY).reaches()?;
    two.attack(NOBODY).is_refused()?;
    let status = two.status()?;
    ensure!(
        status["state"] == "enforcing" && status["targets"][0]["denied"].as_u64() >= Some(1),
        "{status}"
    );
    other.signal(Signal::SIGTERM)?;
    let code = other.wait()?;
    ensure!(code == 0, "{code}: {}", other.log());
    two.attack(NOBODY).is_refused()
}

fn f2_random_rule_sets_change_nothing_else() -> Result<()> {
    let seed = rand::random();
    println!("    seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let world = World::new()?;
    let _listener = world.listen()?;
    let here = world.here();
    for _ in 0..10 {
        let mut lists = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..random.random_range(0..200) {
            let (a, b, length) = (
                random.random::<u8>(),
                random.random::<u8>(),
                random.random_range(8..=32),
            );
            let network = u32::from_be_bytes([10, a & 3, b & 3, random.random()]) & (u32::MAX << (32 - length));
            let endpoint = format!(
                "tcp://{}/{length}:{}",
                std::net::Ipv4Addr::from(network),
                random.random_range(1..5)
            );
            if let Some(list) = lists.get_mut(random.random_range(0..3)) {
                list.push(endpoint);
            }
        }
        let guarded = random.random_bool(0.5);
        if guarded {
            lists
                .first_mut()
                .into_iter()
                .for_each(|list| list.push(format!("tcp://{here}")));
        }
        let [one, two, three] = &lists;
        world.configure(&format!(
            "[target.one]\nendpoints = {one:?}\nallow = [\"root\"]\n[target.two]\nendpoints = {two:?}\n\
             allow = [\"root\", {NOBODY}]\n[target.three]\nendpoints = {three:?}\nallow = []\n",
        ))?;
        world.apply()?;
        world.attack(0).reaches()?;
        if guarded {
            world.attack(NOBODY).is_refused()?;
        } else {
            world.attack(NOBODY).reaches()?;
        }
        // What `check` finds in the kernel's maps is what the lists say.
        for _ in 0..20 {
            let address = std::net::Ipv4Addr::new(
                10,
                random.random_range(0..4),
                random.random_range(0..4),
                random.random(),
            );
            let port = random.random_range(1..5_u16);
            let owns = |list: &[String]| list.iter().any(|endpoint| covers(endpoint, address, port));
            let denied = owns(one) || owns(three);
            world
                .enforcer(&["check", "nobody", &format!("{address}:{port}")])?
                .demand(i32::from(denied))?;
        }
    }
    Ok(())
}

/// Whether an endpoint `tcp://PREFIX/LENGTH:PORT` owns an address and port: written anew, to be independent.
fn covers(endpoint: &str, address: std::net::Ipv4Addr, port: u16) -> bool {
    let parts: Vec<&str> = endpoint.trim_start_matches("tcp://").split(['/', ':']).collect();
    let [network, length, of] = parts.as_slice() else {
        return false;
    };
    let (Ok(network), Ok(length)) = (network.parse::<std::net::Ipv4Addr>(), length.parse::<u32>()) else {
        return false;
    };
    let shift = 32 - length;
    *of == port.to_string() && u64::from(network.to_bits()) >> shift == u64::from(address.to_bits()) >> shift
}

fn block(count: u32, port: u16) -> Vec<String> {
    (0..count)
        .map(|host| format!("tcp://{}:{port}", std::net::Ipv4Addr::from(0x0a00_0000 + host)))
        .collect()
}

fn p8_100000_endpoints_check_as_written() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let mut endpoints = block(99_999, world.port);
    endpoints.push(format!("tcp://{}", world.here()));
    world.configure_one(&endpoints, r#"["root"]"#)?;
    let started = std::time::Instant::now();
    world.apply()?;
    println!(
        "    100,000 endpoints read, compiled, loaded and read back in {:?}",
        started.elapsed()
    );
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()?;
    let mut random = StdRng::seed_from_u64(1);
    let expected = |host: u32| i32::from(host < 99_999);
    let binary = binary("enforcer")?;
    let config = world.path("enforcer.toml");
    // The file is long to read: `check` takes a short one that names the same pins.
    rules(&world, 0)?;
    for _ in 0..1000 {
        let host = random.random_range(0..200_000_u32);
        let to = format!("{}:{}", std::net::Ipv4Addr::from(0x0a00_0000 + host), world.port);
        let ran = crate::world::ran(
            Command::new(&binary)
                .arg("--config")
                .arg(&config)
                .args(["check", "nobody", &to]),
        )?;
        ran.demand(expected(host))?;
    }
    Ok(())
}

fn f7_more_endpoints_than_the_maximum() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    rules(&world, 0)?;
    world.apply()?;
    world.configure_one(&block(131_073, world.port), r#"["root"]"#)?;
    let ran = world.enforcer(&["apply"])?.demand(2)?;
    ensure!(
        ran.stderr.contains("131072") && ran.stderr.lines().count() == 1,
        "{}",
        ran.stderr
    );
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()?;
    ensure!(
        Backend::current().is_nftables() || Path::new(&world.pins()).exists(),
        "the pins are gone"
    );
    Ok(())
}
