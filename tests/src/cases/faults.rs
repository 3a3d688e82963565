//! F4: what goes wrong around the rule set is told once, stays in `status` until it is fixed, and holds nobody up.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};

use super::{
    Case,
    names::{Named, addresses},
};
use crate::{
    dns::Zone,
    world::{Daemon, NOBODY, Netns, World, at_this_load, binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f4_addresses_that_cannot_be_listed_are_told_once),
        case!(f4_a_state_file_that_cannot_be_read_is_told),
        case!(f4_n7_a_state_that_could_not_be_saved_is_saved_later),
        case!(f4_a_reload_names_the_keys_that_cannot_change),
        case!(f4_a_daemon_that_does_not_answer_is_told_from_another_version),
        case!(f4_a_daemon_that_does_not_accept_holds_nobody_up),
        case!(f4_permission_errors_say_what_to_do),
        case!(b3_a_refresh_does_not_wait_for_a_name_that_is_gone),
        case!(n5_ready_waits_for_first_answers_only),
    ]
}

fn guarded() -> Result<World> {
    let world = World::new()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    Ok(world)
}

pub(super) fn limit_files(daemon: &Daemon, most: u32) -> Result<()> {
    let pid = daemon.pid().to_string();
    ran(Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={most}:")]))?
        .demand(0)
        .map(drop)
}

fn f4_addresses_that_cannot_be_listed_are_told_once() -> Result<()> {
    const TOLD: &str = "list what is local to this host";
    let world = World::new()?;
    let netns = Netns::new(&world, "host")?;
    world.configure_one(&[format!("tcp://local:{}", world.port)], r#"["root"]"#)?;
    let daemon = world.daemon_with(&mut netns.command(&binary("enforcer")?))?;
    // After the second sweep, which would be tried again only within a minute.
    thread::sleep(Duration::from_millis(1800));
    // Connected before the daemon can open nothing more, so that it can be asked meanwhile.
    let mut stream = UnixStream::connect(world.path("run/control.sock"))?;
    thread::sleep(Duration::from_millis(200));
    limit_files(&daemon, 3)?;
    netns.ip(&["address", "add", "10.9.9.1/32", "dev", "lo"])?;
    thread::sleep(Duration::from_millis(2500));
    stream.write_all(b"{\"request\":\"status\"}\n")?;
    let mut status = String::new();
    BufReader::new(&stream).read_line(&mut status)?;
    limit_files(&daemon, 1024)?;
    ensure!(status.contains("degraded") && status.contains(TOLD), "{status}");
    netns.ip(&["address", "add", "10.9.9.2/32", "dev", "lo"])?;
    let mut status = String::new();
    until("all is well again", || {
        status = world.status()?.to_string();
        Ok(status.contains(r#""state":"enforcing""#))
    })
    .map_err(|error| anyhow!("{error}: {status}"))?;
    until("the log says so", || Ok(daemon.log().contains("followed again")))?;
    ensure!(daemon.log().matches(TOLD).count() == 1, "{}", daemon.log());
    Ok(())
}

fn f4_a_state_file_that_cannot_be_read_is_told() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    let state = named.world.path("state");
    fs::create_dir(&state)?;
    fs::set_permissions(&state, fs::Permissions::from_mode(0o700))?;
    fs::write(state.join("last-good.json"), "not JSON")?;
    named.dns.set("bus.test", Zone::Silence);
    let _daemon = named.daemon()?;
    let status = named.world.status()?;
    ensure!(
        status["state"] == "degraded" && status["causes"].to_string().contains("last-good.json"),
        "{status}"
    );
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    named.world.enforcer(&["refresh"])?;
    until("it is kept", || {
        Ok(fs::read_to_string(state.join("last-good.json"))?.contains("10.9.0.1"))
    })?;
    until(
        "all is well again",
        || Ok(named.world.status()?["state"] == "enforcing"),
    )
}

fn f4_n7_a_state_that_could_not_be_saved_is_saved_later() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    let daemon = named.daemon()?;
    let state = named.world.path("state");
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777))?;
    named.dns.set("bus.test", addresses(&["10.9.0.2"]));
    until("it is told", || {
        Ok(named.world.status()?["causes"].to_string().contains("0777"))
    })?;
    thread::sleep(Duration::from_secs(2));
    fs::set_permissions(&state, fs::Permissions::from_mode(0o700))?;
    until("the addresses are saved", || {
        Ok(fs::read_to_string(state.join("last-good.json"))?.contains("10.9.0.2"))
    })?;
    until(
        "all is well again",
        || Ok(named.world.status()?["state"] == "enforcing"),
    )?;
    ensure!(daemon.log().matches("0777").count() == 1, "{}", daemon.log());
    Ok(())
}

fn f4_a_reload_names_the_keys_that_cannot_change() -> Result<()> {
    let world = guarded()?;
    let daemon = world.daemon()?;
    let toml = world.path("enforcer.toml");
    let before = fs::read_to_string(&toml)?;
    let after = before
        .replace("/state\"", "/other\"")
        .replace("control.sock", "other.sock");
    fs::write(&toml, after)?;
    daemon.reload()?;
    fs::write(&toml, before)?;
    let says = "state_dir, socket cannot change while enforcer runs; restart it";
    let status = world.status()?;
    ensure!(
        status["state"] == "degraded" && status["causes"].to_string().contains(says),
        "{status}"
    );
    let log = daemon.log();
    ensure!(log.contains(says) && log.matches("reload: ").count() == 1, "{log}");
    daemon.reload()?;
    ensure!(world.status()?["state"] == "enforcing", "{}", world.status()?);
    Ok(())
}

/// A socket where the daemon's should be, that takes so many callers and answers none.
fn mute(world: &World, callers: i32) -> Result<socket2::Socket> {
    fs::create_dir(world.path("run"))?;
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
    socket.bind(&socket2::SockAddr::unix(world.path("run/control.sock"))?)?;
    socket.listen(callers)?;
    Ok(socket)
}

fn f4_a_daemon_that_does_not_answer_is_told_from_another_version() -> Result<()> {
    let world = guarded()?;
    let _mute = mute(&world, 16)?;
    let refresh = world.enforcer(&["refresh", "--timeout", "300ms"])?.demand(2)?;
    ensure!(
        refresh.stderr.contains("within 300ms")
            && refresh.stderr.contains("--timeout")
            && !refresh.stderr.contains("version"),
        "{refresh:?}"
    );
    let status = world.enforcer(&["status"])?.demand(1)?;
    ensure!(status.stdout.contains("did not answer within 5s"), "{status:?}");
    Ok(())
}

fn f4_a_daemon_that_does_not_accept_holds_nobody_up() -> Result<()> {
    let world = guarded()?;
    let _mute = mute(&world, 0)?;
    let _first = UnixStream::connect(world.path("run/control.sock"))?;
    for command in [&["refresh", "--timeout", "1s"][..], &["events"]] {
        let started = Instant::now();
        let refused = world.enforcer(command)?.demand(2)?;
        ensure!(refused.stderr.contains("did not answer within"), "{refused:?}");
        ensure!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    }
    Ok(())
}

fn f4_permission_errors_say_what_to_do() -> Result<()> {
    let world = guarded()?;
    world.apply()?;
    for command in ["status", "unload", "apply"] {
        let other = ran(world.enforcer_as(NOBODY)?.arg(command))?.demand(2)?;
        ensure!(other.stderr.contains("run as root"), "{command}: {other:?}");
    }
    let _daemon = world.daemon()?;
    for command in ["status", "events", "refresh", "unload"] {
        let other = ran(world.enforcer_as(NOBODY)?.arg(command))?.demand(2)?;
        ensure!(other.stderr.contains("run as root"), "{command}: {other:?}");
    }
    Ok(())
}

/// Lookups of silent names take the five seconds that they may.
fn patient(named: &Named) -> Result<()> {
    let text = format!("nameserver {}\noptions timeout:5 attempts:1\n", named.world.address());
    Ok(fs::write(named.world.path("resolv.conf"), text)?)
}

fn b3_a_refresh_does_not_wait_for_a_name_that_is_gone() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    patient(&named)?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    let daemon = named.daemon()?;
    named.dns.set("bus.test", Zone::Silence);
    thread::scope(|scope| {
        let refresh = scope.spawn(|| named.world.enforcer(&["refresh"]));
        thread::sleep(Duration::from_millis(500));
        named
            .world
            .configure_one(&[format!("tcp://{}", named.world.here())], r#"["root"]"#)?;
        daemon.reload()?;
        let reloaded = Instant::now();
        refresh
            .join()
            .map_err(|_| anyhow!("the refresh panicked"))??
            .demand(0)?;
        ensure!(
            reloaded.elapsed() < at_this_load(Duration::from_secs(2))?,
            "{:?}",
            reloaded.elapsed()
        );
        Ok(())
    })
}

fn n5_ready_waits_for_first_answers_only() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    patient(&named)?;
    named.dns.set("bus.test", Zone::Silence);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        // Some lookup is under way at any time.
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let _ = named.world.enforcer(&["refresh", "--timeout", "10ms"]);
                thread::sleep(Duration::from_millis(500));
            }
        });
        let daemon = named.daemon();
        done.store(true, Ordering::Relaxed);
        daemon.map(drop)
    })
}
