//! F6 and the surfaces: who may read and ask, and what is answered.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{fs::MetadataExt as _, net::UnixStream},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Case, names::Named};
use crate::{
    attack::Way,
    backend::{Backend, EBPF},
    dns::Zone,
    world::{Daemon, NOBODY, World, ask_raw, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f6_nothing_of_ours_is_open_to_others).on(EBPF),
        case!(control_socket_full_is_told_and_unload_frees_the_place).on(EBPF),
        case!(control_socket_bears_anything),
        case!(events_tell_who_and_where).on(EBPF),
        case!(denials_are_logged_and_added_up),
        case!(events_lost_are_told_once),
        case!(events_follow),
        case!(status_counts_and_names_the_generation),
        case!(check_explains).on(EBPF),
        case!(f4_a_bad_file_keeps_nobody_from_asking),
        case!(f5_a_link_taken_away_comes_back).on(EBPF),
        case!(capabilities_are_dropped),
        case!(the_programs_can_be_traced).on(EBPF),
    ]
}

fn guarded() -> Result<(World, crate::world::Listener)> {
    let world = World::new()?;
    let listener = world.listen()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    Ok((world, listener))
}

fn f6_nothing_of_ours_is_open_to_others() -> Result<()> {
    let (world, _listener) = guarded()?;
    let _daemon = world.daemon()?;
    let mut waiting = vec![world.pins(), world.path("run")];
    let mut seen = 0;
    while let Some(path) = waiting.pop() {
        let meta = fs::symlink_metadata(&path)?;
        let wanted = if meta.is_dir() { 0o700 } else { 0o600 };
        ensure!(
            meta.uid() == 0 && meta.mode() & 0o7777 == wanted,
            "{} has mode {:o}",
            path.display(),
            meta.mode()
        );
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                waiting.push(entry?.path());
            }
        }
        seen += 1;
    }
    ensure!(seen >= 14, "only {seen} paths were looked at");
    let other = ran(world.enforcer_as(NOBODY)?.arg("status"))?.demand(2)?;
    ensure!(
        other.stderr.contains("ermission denied"),
        "another user was not kept out: {other:?}"
    );
    Ok(())
}

fn control_socket_bears_anything() -> Result<()> {
    let (world, _listener) = guarded()?;
    let _daemon = world.daemon()?;
    let socket = world.path("run/control.sock");
    // Longer than a request may be, and than what a socket takes at once.
    let (long, longer) = (vec![b'x'; 40_000], vec![b'x'; 1 << 20]);
    let deep = [b"[".repeat(4000).as_slice(), b"\n"].concat();
    for request in [
        b"\n".as_slice(),
        b"{}\n",
        b"\xff\xfe\n",
        b"{\"request\":\"format-disk\"}\n",
        b"null\n",
        &deep,
        b"{\"request\":\"status\"",
        &long,
        &longer,
    ] {
        let answer = ask_raw(&socket, request)?;
        ensure!(
            answer.starts_with("{\"error\":") && answer.contains("of at most 32768 bytes"),
            "{answer}"
        );
    }
    ensure!(
        ask_raw(&socket, b"{\"request\":\"status\"}\n")?.contains("enforcer/status/1"),
        "it no longer answers"
    );
    world.attack(NOBODY).is_refused()
}

fn lines(world: &World) -> Result<Vec<Value>> {
    let ran = world.enforcer(&["events", "--json"])?.demand(0)?;
    ran.stdout.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

fn events_tell_who_and_where() -> Result<()> {
    let (world, _listener) = guarded()?;
    let _daemon = world.daemon()?;
    world.attack(NOBODY).way(Way::Mapped).run()?;
    until("the event is there", || Ok(lines(&world)?.len() == 1))?;
    let all = lines(&world)?;
    let event = all.first().context("no event")?;
    let here = world.here().to_string();
    for (key, value) in [
        ("schema", Value::from("enforcer/event/1")),
        ("verdict", "deny".into()),
        ("task_uid", NOBODY.into()),
        ("socket_uid", NOBODY.into()),
        ("protocol", "tcp".into()),
        ("dialled", format!("[::ffff:{}]:{}", world.address(), world.port).into()),
        ("judged", here.into()),
        ("target", "main".into()),
        ("comm", "attack".into()),
        ("cgroup_id", fs::metadata(&world.cgroup)?.ino().into()),
    ] {
        ensure!(event[key] == value, "{key}: {event}");
    }
    ensure!(
        event["time"].as_str().is_some_and(|time| time.ends_with('Z')),
        "{event}"
    );
    ensure!(
        event["generation"].as_u64() == world.status()?["generation"].as_u64(),
        "{event}"
    );
    // A flood is counted where it cannot be told.
    let fire = world.path("fire");
    fs::write(&fire, "")?;
    let hammer = world.attack(NOBODY).hammer(&fire)?;
    thread::sleep(Duration::from_millis(500));
    fs::remove_file(&fire)?;
    let refused = hammer.finish()?.refused + 1;
    until("every denial is counted", || {
        Ok(world.status()?["targets"][0]["denied"].as_u64() == Some(refused))
    })
}

/// What somebody reads who has only the journal: the first denial at once, the others with their number.
fn denials_are_logged_and_added_up() -> Result<()> {
    use nix::sys::signal::Signal;
    let (world, _listener) = guarded()?;
    let mut daemon = world.daemon()?;
    world.attack(0).reaches()?;
    let line = |count: &str, user: u32| {
        let by = format!("on main (tcp {}) by uid {user}", world.here());
        format!("denied {count} {by}")
    };
    let first = line("1 attempt", NOBODY);
    ensure!(world.attack(NOBODY).run()?.errno.is_some(), "not refused");
    until("the denial is logged", || Ok(daemon.log().contains(&first)))?;
    for _ in 0..5 {
        ensure!(world.attack(NOBODY).run()?.errno.is_some(), "not refused");
    }
    ensure!(world.attack(1).run()?.errno.is_some(), "not refused");
    until("that of another user is logged", || {
        Ok(daemon.log().contains(&line("1 attempt", 1)))
    })?;
    until("all are told", || Ok(lines(&world)?.len() == 7))?;
    ensure!(daemon.log().matches("denied ").count() == 2, "{}", daemon.log());
    daemon.signal(Signal::SIGTERM)?;
    ensure!(daemon.wait()? == 0, "{}", daemon.log());
    let rest = if Backend::current().is_nftables() {
        line("at least 5 attempts", NOBODY)
    } else {
        line("5 attempts", NOBODY)
    };
    until("the rest is logged at the end", || Ok(daemon.log().contains(&rest)))?;
    ensure!(daemon.log().matches("denied ").count() == 3, "{}", daemon.log());
    let (log, who) = (daemon.log(), format!("{first} (nobody), task attack, "));
    let seen = |line: &str| line.contains(&who) && line.contains(", cgroup /");
    ensure!(Backend::current().is_nftables() || log.lines().any(seen), "{log}");
    Ok(())
}

/// A daemon that does not come to read: what did not fit is told as lost, once, and not again by the next one.
fn events_lost_are_told_once() -> Result<()> {
    use nix::sys::signal::Signal;
    let (world, _listener) = guarded()?;
    let daemon = world.daemon()?;
    ensure!(world.status()?["events_lost"] == 0, "{}", world.status()?);
    daemon.signal(Signal::SIGSTOP)?;
    let fire = world.path("fire");
    fs::write(&fire, "")?;
    let hammer = world.attack(NOBODY).hammer(&fire)?;
    // nftables logs 200 a second at most, which its socket holds for a second or so.
    std::thread::sleep(std::time::Duration::from_secs(5));
    fs::remove_file(&fire)?;
    let blows = hammer.finish()?;
    daemon.signal(Signal::SIGCONT)?;
    let told = |world: &World| -> Result<Vec<u64>> {
        let lines = lines(world)?;
        let lost = lines.iter().filter(|line| line["schema"] == "enforcer/lost/1");
        Ok(lost.filter_map(|line| line["lost"].as_u64()).collect())
    };
    // One more: the number of what comes next says what is missing.
    until("the losses are told", || {
        world.attack(NOBODY).is_refused()?;
        Ok(!told(&world)?.is_empty())
    })?;
    let (sum, status) = (told(&world)?.iter().sum::<u64>(), world.status()?);
    println!("    {sum} lost of {blows:?}");
    ensure!(status["events_lost"] == sum && sum > 0, "{sum}: {status}");
    daemon.kill()?;
    let _daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    until("a denial is told", || Ok(!lines(&world)?.is_empty()))?;
    ensure!(told(&world)?.is_empty(), "told again: {:?}", told(&world)?);
    // Pinned, the kernel's count goes on; that of nftables is the daemon's.
    let kept = if Backend::current().is_nftables() { 0 } else { sum };
    let status = world.status()?;
    ensure!(status["events_lost"] == kept, "not {kept}: {status}");
    Ok(())
}

fn events_follow() -> Result<()> {
    use std::io::{BufRead as _, BufReader};
    let (world, _listener) = guarded()?;
    let _daemon = world.daemon()?;
    let mut command = Command::new(crate::world::binary("enforcer")?);
    command
        .arg("--config")
        .arg(world.path("enforcer.toml"))
        .args(["events", "--follow", "--json"]);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn()?;
    let mut reader = BufReader::new(child.stdout.take().context("no stdout")?);
    let mut ports = Vec::new();
    for _ in 0..3 {
        world.attack(NOBODY).run()?;
        let mut line = String::new();
        reader.read_line(&mut line)?;
        ports.push(serde_json::from_str::<Value>(&line)?["judged"].clone());
    }
    child.kill()?;
    child.wait()?;
    ensure!(ports.iter().all(|port| *port == world.here().to_string()), "{ports:?}");
    Ok(())
}

fn status_counts_and_names_the_generation() -> Result<()> {
    let (world, _listener) = guarded()?;
    let daemon = world.daemon()?;
    let before = world.status()?;
    world.attack(0).reaches()?;
    world.attack(NOBODY).run()?;
    world.attack(NOBODY).run()?;
    let after = world.status()?;
    ensure!(
        after["schema"] == "enforcer/status/1" && after["state"] == "enforcing",
        "{after}"
    );
    ensure!(
        after["daemon"]["pid"] == daemon.pid() && after["backend"] == Backend::current().active(),
        "{after}"
    );
    let target = &after["targets"][0];
    ensure!(
        target["name"] == "main" && target["allowed"] == 1 && target["denied"] == 2,
        "{after}"
    );
    ensure!(target["endpoints"] == 1 && after["endpoints"] == 1, "{after}");
    daemon.reload()?;
    ensure!(
        world.status()?["generation"] == before["generation"],
        "an unchanged rule set got a new generation"
    );
    world.configure_one(
        &[format!("tcp://{}", world.here()), "tcp://10.0.0.1:1".to_owned()],
        r#"["root"]"#,
    )?;
    daemon.reload()?;
    let changed = world.status()?;
    ensure!(
        changed["generation"].as_u64() > before["generation"].as_u64(),
        "{changed}"
    );
    ensure!(
        changed["targets"][0]["denied"] == 2,
        "a target that stays lost its counters: {changed}"
    );
    let table = world.enforcer(&["status"])?.demand(0)?;
    ensure!(
        table.stdout.contains("main") && table.stdout.contains("enforcing"),
        "{}",
        table.stdout
    );
    Ok(())
}

fn check_explains() -> Result<()> {
    let (world, _listener) = guarded()?;
    let none = world.enforcer(&["check", "root", "127.0.0.1:1"])?.demand(2)?;
    ensure!(none.stderr.contains("nothing is active"), "{}", none.stderr);
    world.apply()?;
    let (here, port) = (world.here().to_string(), world.port);
    for (arguments, code, says) in [
        (vec!["root", &here], 0, "allows uid 0 (root)"),
        (vec!["0", &format!("tcp://{here}")], 0, "allows uid 0 (root)"),
        (vec!["nobody", &here], 1, "no principal that matches uid 65534 (nobody)"),
        (
            vec!["nobody", &format!("[::ffff:{}]:{port}", world.address())],
            1,
            "denied by main",
        ),
        (vec!["nobody", &format!("0.0.0.0:{port}")], 1, "denied by main"),
        (vec!["nobody", &format!("[::]:{port}")], 1, "denied by main"),
        (vec!["nobody", &here, "--foreign-netns"], 0, "not evaluated in another"),
        (vec!["nobody", &format!("udp://{here}")], 0, "not an endpoint"),
        (
            vec!["root", &here, "--socket-user", "nobody"],
            1,
            "socket of uid 65534 (nobody)",
        ),
        (vec!["root", &here, "--kernel"], 1, "kernel threads"),
        (vec!["nosuchuser", &here], 2, "nosuchuser"),
        (vec!["4294967294", &here], 1, "matches uid 4294967294"),
        (vec!["4294967295", &here], 2, "4294967295 is not a UID"),
        (
            vec!["root", &here, "--socket-user", "4294967295"],
            2,
            "4294967295 is not a UID",
        ),
        (vec!["root", "127.0.0.1"], 2, "127.0.0.1"),
        (vec!["root", &here, "--cgroup", "/no/such"], 2, "/no/such"),
    ] {
        let words: Vec<&str> = std::iter::once("check").chain(arguments).collect();
        let ran = world.enforcer(&words)?.demand(code)?;
        ensure!(
            format!("{}{}", ran.stdout, ran.stderr).contains(says),
            "{words:?}: {ran:?}"
        );
    }
    let json = world.enforcer(&["check", "nobody", &here, "--json"])?.demand(1)?;
    let report: Value = serde_json::from_str(&json.stdout)?;
    ensure!(
        report["schema"] == "enforcer/check/1" && report["verdict"] == "deny" && report["judged"] == true,
        "{report}"
    );
    Ok(())
}

/// Whoever is called at night because the file is bad asks with that file.
fn f4_a_bad_file_keeps_nobody_from_asking() -> Result<()> {
    let (world, _listener) = guarded()?;
    let file = world.path("enforcer.toml");
    let mut daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    let good = fs::read_to_string(&file)?;
    fs::write(&file, format!("{good}\nmode = \"no-such-mode\"\n[[["))?;
    for words in [&["events"] as &[&str], &["grants"], &["verify"]] {
        let asked = world.enforcer(words)?.demand(0)?;
        ensure!(asked.stderr.contains("enforcer: warning: "), "{words:?}: {asked:?}");
    }
    ensure!(
        world
            .enforcer(&["revoke", "main", "--all"])?
            .stdout
            .contains("no such grant"),
        "revoke did not ask the daemon"
    );
    daemon.reload()?;
    world.enforcer(&["refresh"])?.demand(1)?;
    let status = world.enforcer(&["status"])?.demand(1)?;
    ensure!(
        status.stdout.contains("degraded") && status.stdout.contains(&file.display().to_string()),
        "the cause is not told: {status:?}"
    );
    // Of a line that says where the instance is nothing is guessed: there may be another one at the default place.
    let elsewhere = good.replace("socket = ", "socket = no-string-");
    fs::write(&file, elsewhere)?;
    for words in [["status"], ["unload"]] {
        world.enforcer(&words)?.demand(2)?;
    }
    world.attack(NOBODY).is_refused()?;
    fs::write(&file, format!("{good}\n[[["))?;
    let unloaded = world.enforcer(&["unload"])?.demand(0)?;
    ensure!(unloaded.stdout.contains("the daemon has ended"), "{unloaded:?}");
    daemon.wait()?;
    world.attack(NOBODY).reaches()?;
    // Nor without a daemon.
    let off = world.enforcer(&["status"])?.demand(1)?;
    ensure!(
        off.stdout.contains("off") && off.stderr.contains("warning: "),
        "{off:?}"
    );
    fs::remove_file(&file)?;
    let missing = world.enforcer(&["status"])?.demand(2)?;
    ensure!(missing.stderr.contains("no such file"), "{missing:?}");
    Ok(())
}

fn f5_a_link_taken_away_comes_back() -> Result<()> {
    let (world, _listener) = guarded()?;
    let daemon = world.daemon()?;
    daemon.signal(Signal::SIGSTOP)?;
    for name in ["connect4", "connect6"] {
        fs::remove_file(world.pins().join(name))?;
    }
    until("the links are gone", || Ok(world.attack(NOBODY).run()?.errno.is_none()))?;
    daemon.signal(Signal::SIGCONT)?;
    until("the links are back", || {
        Ok(world.attack(NOBODY).run()?.errno == Some(libc::EPERM))
    })?;
    world.attack(NOBODY).way(Way::Mapped).is_refused()
}

fn capabilities_are_dropped() -> Result<()> {
    let named = Named::new(&["silent.test"], "")?;
    named.dns.set("silent.test", Zone::Silence);
    // No answer for as long as a lookup may take: readiness is far.
    fs::write(
        named.world.path("resolv.conf"),
        format!("nameserver {}\noptions timeout:5 attempts:1\n", named.world.address()),
    )?;
    // Started with some to hand on, which it must not.
    let resolving = named.world.with_resolver()?;
    let mut command = Command::new("setpriv");
    command.args(["--inh-caps=+chown,+net_raw", "--ambient-caps=+chown,+net_raw", "--"]);
    command.arg(resolving.get_program()).args(resolving.get_args());
    let (daemon, _ready) = named.world.start(&mut command)?;
    let mut excess = String::new();
    until("what is not needed is given up", || {
        excess = excess_capabilities(&daemon)?;
        Ok(excess.is_empty())
    })
    .map_err(|error| error.context(excess))?;
    thread::sleep(Duration::from_millis(200));
    ensure!(
        !daemon.log().contains("enforcing generation"),
        "given up only once ready: {}",
        daemon.log()
    );
    until("it is ready", || Ok(daemon.log().contains("enforcing generation")))?;
    let excess = excess_capabilities(&daemon)?;
    ensure!(excess.is_empty(), "{excess}");
    Ok(())
}

/// What a daemon's threads, whose own capabilities are, have other than they should.
fn excess_capabilities(daemon: &Daemon) -> Result<String> {
    // CAP_NET_ADMIN 12, CAP_PERFMON 38, CAP_BPF 39 (linux/capability.h).
    let three = format!("{:016x}", 1_u64 << 12 | 1_u64 << 38 | 1_u64 << 39);
    let none = format!("{:016x}", 0);
    for thread in fs::read_dir(Path::new("/proc").join(daemon.pid().to_string()).join("task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        for (set, wanted) in [
            ("CapPrm", three.as_str()),
            ("CapEff", &three),
            ("CapBnd", &three),
            ("CapInh", &none),
            ("CapAmb", &none),
            ("NoNewPrivs", "1"),
        ] {
            if !status.lines().any(|line| line == format!("{set}:\t{wanted}")) {
                return Ok(format!("{set} is not {wanted}: {status}"));
            }
        }
    }
    Ok(String::new())
}

fn the_programs_can_be_traced() -> Result<()> {
    let (world, _listener) = guarded()?;
    let mut command = Command::new(crate::world::binary("enforcer")?);
    let daemon = world.daemon_with(command.args(["--log-level", "trace"]))?;
    world.attack(0).reaches()?;
    until("the programs' trace is in the log", || {
        Ok(daemon.log().contains("owners 1 refused 0"))
    })?;
    world.attack(NOBODY).is_refused()
}

fn control_socket_full_is_told_and_unload_frees_the_place() -> Result<()> {
    let (world, _listener) = guarded()?;
    let daemon = world.daemon()?;
    let follow = || -> Result<UnixStream> {
        let mut stream = UnixStream::connect(world.path("run/control.sock"))?;
        stream.write_all(b"{\"request\":\"events\",\"follow\":true}\n")?;
        Ok(stream)
    };
    let mut followers = (0..40).map(|_| follow()).collect::<Result<Vec<_>>>()?;
    until("one follower too many is told", || {
        followers.push(follow()?);
        let stream = followers.last_mut().context("just pushed")?;
        stream.set_read_timeout(Some(Duration::from_millis(500)))?;
        let mut said = String::new();
        let _ = stream.read_to_string(&mut said);
        Ok(said.contains("which is the maximum"))
    })?;
    // Followers never keep others out.
    world.enforcer(&["status"])?.demand(0)?;
    world.attack(NOBODY).is_refused()?;
    world.enforcer(&["unload"])?.demand(0)?;
    // The place is free at once.
    world.apply()?;
    drop(daemon);
    world.attack(NOBODY).is_refused()
}
