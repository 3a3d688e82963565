//! F10: an unprivileged user who connects as fast as the host lets him, or keeps the disk busy, keeps nobody from the
//! daemon.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    fcntl::AT_FDCWD,
    sys::{
        fanotify::{EventFFlags, Fanotify, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response},
        signal::Signal,
    },
};
use serde_json::Value;

use super::{Case, nftables::Guarded};
use crate::{
    backend::{ALL, Backend, EBPF},
    world::{Blows, NOBODY, World, at_this_load, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f10_denials_at_full_speed_keep_nobody_waiting).on(ALL),
        case!(f10_no_user_crowds_another_out_of_the_log).on(ALL),
        case!(f10_what_came_too_fast_to_be_told_is_counted).on(ALL),
        case!(f10_a_disk_that_does_not_answer_keeps_nobody_waiting).on(EBPF),
    ]
}

/// How long an answer may take where no more than two tasks a processor are busy, attackers included.
const LIMIT: Duration = Duration::from_secs(2);
/// What is asked of the daemon, so often.
const ROUNDS: u32 = 10;
/// Between two rounds.
const REST: Duration = Duration::from_millis(300);
/// Memory by which the daemon may grow, in KiB: the events that it keeps, and what a rule set takes while it is
/// written.
const GROWTH: u64 = 16 << 10;

/// The daemon's use of the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Use {
    pub(super) processor: Duration,
    /// Resident, in KiB.
    pub(super) memory: u64,
}

impl Use {
    /// From `/proc` (man 5 proc).
    pub(super) fn of(pid: u32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let memory = memory.and_then(|memory| memory.trim().strip_suffix(" kB"));
        Ok(Self {
            processor: processor_time(pid)?,
            memory: memory.context("no VmRSS")?.trim().parse()?,
        })
    }
}

/// Processor time that a process has had, by the kernel's hundredths of a second.
pub(super) fn processor_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    // utime and stime (man 5 proc).
    let ticks = fields.skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(Duration::from_millis(ticks * 10))
}

/// Two targets, so that a grant changes the second without opening what is attacked.
fn configure(guarded: &Guarded, round: u32) -> Result<()> {
    let (here, port) = (guarded.world.here(), guarded.world.port);
    guarded.world.configure(&format!(
        "backend = {:?}\n[target.main]\nendpoints = [\"tcp://{here}\", \"tcp://10.0.0.{round}:{port}\"]\n\
         allow = [\"root\"]\n\
         [target.other]\nendpoints = [\"tcp://10.1.0.1:{port}\"]\nallow = [\"root\"]\ngrants = true\n",
        Backend::current().configured()
    ))
}

/// One user dials a prefix up and down, then one address as fast as he can; another is denied once.
fn f10_no_user_crowds_another_out_of_the_log() -> Result<()> {
    let guarded = Guarded::new()?;
    let world = &guarded.world;
    let (here, port) = (world.here(), world.port);
    world.configure(&format!(
        "backend = {:?}\n[target.main]\nendpoints = [\"tcp://{here}\", \"tcp://127.0.0.0/16:{port}\"]\n\
         allow = [\"root\"]\n",
        Backend::current().configured()
    ))?;
    let daemon = guarded.daemon()?;
    for at in 1_u16..=300 {
        let [high, low] = at.to_be_bytes();
        let to = SocketAddr::from((Ipv4Addr::new(127, 0, high, low), port));
        let outcome = guarded.attack(NOBODY)?.to(to).run()?;
        ensure!(outcome.errno.is_some(), "{to} is reached");
    }
    let told = |user: u32| daemon.log().matches(&format!("by uid {user}")).count();
    until("the first user's denials are logged", || Ok(told(NOBODY) > 0))?;
    // nftables logs so many a second: again until one is among them.
    until("the other user's denial is logged", || {
        ensure!(guarded.attack(1)?.run()?.errno.is_some(), "uid 1 is let through");
        Ok(told(1) > 0)
    })?;
    ensure!(told(NOBODY) <= 16, "{} lines of one user", told(NOBODY));
    let events = || -> Result<Vec<Value>> {
        let text = guarded.netns.enforcer(world, &["events", "--json"])?.demand(0)?.stdout;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    };
    let of = |events: &[Value], user: u32| events.iter().filter(|event| event["socket_uid"] == user).count();
    ensure!(of(&events()?, 1) > 0, "the other user's denial is not kept");
    let fire = world.path("fire");
    fs::write(&fire, "")?;
    let hammer = guarded.attack(NOBODY)?.hammer(&fire)?;
    until("a flood fills what is kept", || Ok(events()?.len() >= 1024))?;
    thread::sleep(Duration::from_secs(1));
    fs::remove_file(&fire)?;
    hammer.finish()?;
    let events = events()?;
    ensure!(of(&events, 1) > 0, "the flood has pushed out what another user did");
    ensure!(of(&events, NOBODY) > 1000, "{} of the flood", of(&events, NOBODY));
    Ok(())
}

/// More denials than the kernel has room for: the ring buffer's MiB, of 160 bytes each.
const ROOM: u64 = (1 << 20) / 160;

/// What the log says at the end is what the kernel has counted, and that is what was refused.
fn f10_what_came_too_fast_to_be_told_is_counted() -> Result<()> {
    let guarded = Guarded::new()?;
    let world = &guarded.world;
    // The other owns the endpoint too; an event names the first that refuses, and so do the counters.
    world.configure(&format!(
        "backend = {:?}\n[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\n[target.other]\n\
         endpoints = [\"tcp://127.0.0.0/8:{}\"]\nallow = [\"root\"]\n",
        Backend::current().configured(),
        world.here(),
        world.port
    ))?;
    let mut daemon = guarded.daemon()?;
    let fire = world.path("fire");
    // Asleep it takes none: what there is no room for is lost.
    daemon.signal(Signal::SIGSTOP)?;
    let mut refused = 0;
    until("more is denied than there is room for", || {
        fs::write(&fire, "")?;
        let hammer = guarded.attack(NOBODY)?.hammer(&fire)?;
        thread::sleep(Duration::from_secs(1));
        fs::remove_file(&fire)?;
        let blows = hammer.finish()?;
        ensure!(blows.connected + blows.other == 0, "{blows:?}");
        refused += blows.refused + blows.reset;
        Ok(refused > ROOM)
    })?;
    daemon.signal(Signal::SIGCONT)?;
    let denied = guarded.status()?["targets"][0]["denied"].clone();
    ensure!(denied == refused, "{denied} of {refused}");
    daemon.signal(Signal::SIGTERM)?;
    ensure!(daemon.wait()? == 0, "{}", daemon.log());
    let line = format!("kernel counted {denied} denials for target main; only ");
    ensure!(daemon.log().contains(&line), "{denied}: {}", daemon.log());
    ensure!(!daemon.log().contains("denials for target other"), "{}", daemon.log());
    if Backend::current().is_nftables() {
        ensure!(daemon.log().contains("denied at least "), "{}", daemon.log());
    }
    Ok(())
}

fn f10_denials_at_full_speed_keep_nobody_waiting() -> Result<()> {
    let guarded = Guarded::new()?;
    let world = &guarded.world;
    guarded.attack(NOBODY)?.reaches()?;
    configure(&guarded, 0)?;
    guarded.apply()?;
    let daemon = guarded.daemon()?;
    let fire = world.path("fire");
    fs::write(&fire, "")?;
    let cores = thread::available_parallelism()?.get();
    let hammers = (0..cores)
        .map(|_| guarded.attack(NOBODY)?.hammer(&fire))
        .collect::<Result<Vec<_>>>()?;
    // What floods make is there: buffers are full, events kept.
    thread::sleep(Duration::from_secs(1));
    let (before, started, log) = (Use::of(daemon.pid())?, Instant::now(), daemon.log().len());
    let mut slowest: Vec<(&str, Duration)> = Vec::new();
    let mut answered = |what, work: &dyn Fn() -> Result<()>| {
        let (limit, asked) = (at_this_load(LIMIT)?, Instant::now());
        work().with_context(|| what)?;
        let took = asked.elapsed();
        match slowest.iter_mut().find(|(other, _)| *other == what) {
            Some((_, slowest)) => *slowest = took.max(*slowest),
            None => slowest.push((what, took)),
        }
        ensure!(
            took < limit,
            "{what} was answered only after {took:?}, of {limit:?} that it may take here"
        );
        anyhow::Ok(())
    };
    for round in 1..=ROUNDS {
        let ask = |arguments: &[&str]| guarded.netns.enforcer(world, arguments)?.demand(0).map(drop);
        configure(&guarded, round)?;
        answered("a reload", &|| daemon.reload())?;
        answered("a refresh", &|| ask(&["refresh"]))?;
        answered("a grant", &|| {
            ask(&["grant", "other", "--user", &(2000 + round).to_string()])
        })?;
        answered("the status", &|| {
            let status = guarded.status()?;
            ensure!(status["state"] == "enforcing", "{status}");
            Ok(())
        })?;
        thread::sleep(REST);
    }
    let (after, lasted) = (Use::of(daemon.pid())?, started.elapsed());
    fs::remove_file(&fire)?;
    let mut sum = Blows::default();
    for hammer in hammers {
        let blows = hammer.finish()?;
        ensure!(
            blows.connected + blows.other == 0,
            "an attempt was not refused: {blows:?}"
        );
        sum.refused += blows.refused;
        sum.reset += blows.reset;
    }
    let spent = after.processor.saturating_sub(before.processor);
    let said = daemon.log().len() - log;
    println!(
        "    {} denials by {cores} processes in {lasted:?}; slowest answers {slowest:?}; the daemon took {spent:?}, \
         grew from {} to {} KiB \
         and logged {said} bytes",
        sum.refused + sum.reset,
        before.memory,
        after.memory
    );
    ensure!(
        sum.refused + sum.reset > 1000 * u64::from(ROUNDS),
        "hardly anybody attacked: {sum:?}"
    );
    ensure!(spent < lasted / 5, "the daemon took {spent:?} of {lasted:?}");
    ensure!(
        after.memory < before.memory + GROWTH,
        "the daemon grew from {} to {} KiB",
        before.memory,
        after.memory
    );
    // A line for each reload and grant, and one now and then for the denials of each kind.
    ensure!(
        said < 1024 * ROUNDS as usize,
        "it logged {said} bytes: {}",
        daemon.log()
    );
    let told: Value = guarded.status()?;
    ensure!(told["targets"][0]["denied"].as_u64() >= Some(1), "{told}");
    Ok(())
}

/// The file that the daemon writes is not opened before this case allows it (fanotify(7), `FAN_OPEN_PERM`).
fn f10_a_disk_that_does_not_answer_keeps_nobody_waiting() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let here = format!("tcp://{}", world.here());
    world.configure_one(std::slice::from_ref(&here), r#"["root"]"#)?;
    let daemon = world.daemon()?;
    let before = world.status()?["generation"].as_u64();
    let disk = Fanotify::init(
        InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK,
        EventFFlags::O_RDONLY,
    )?;
    disk.mark(
        MarkFlags::FAN_MARK_ADD,
        MaskFlags::FAN_OPEN_PERM | MaskFlags::FAN_EVENT_ON_CHILD,
        AT_FDCWD,
        Some(&world.path("state")),
    )?;
    world.configure_one(&[here, format!("tcp://10.0.0.1:{}", world.port)], r#"["root"]"#)?;
    daemon.signal(Signal::SIGHUP)?;
    let mut held = Vec::new();
    until("the daemon waits for the disk", || {
        held.extend(disk.read_events().unwrap_or_default());
        Ok(!held.is_empty())
    })?;
    let (limit, asked) = (at_this_load(LIMIT)?, Instant::now());
    let status = world.status()?;
    ensure!(
        status["state"] == "enforcing" && status["generation"].as_u64() > before,
        "{status}"
    );
    world.enforcer(&["refresh"])?.demand(0)?;
    world.attack(NOBODY).is_refused()?;
    let took = asked.elapsed();
    ensure!(took < limit, "answered only after {took:?}, of {limit:?}");
    let log = daemon.log();
    ensure!(
        !log.contains("reloaded "),
        "a reload is reported before it is kept: {log}"
    );
    for event in &held {
        let opened = event.fd().context("an event was lost")?;
        disk.write_response(FanotifyResponse::new(opened, Response::FAN_ALLOW))?;
    }
    // Closed, it lets everything through.
    drop((held, disk));
    until("the reload is reported", || Ok(daemon.log().contains("reloaded ")))
}
