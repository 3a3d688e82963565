//! B2: what agents have written for ten years, and how: several servers in a string, several places, bytes of other
//! encodings, files that a group can write, and files that are made first and written then.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use enforcer::bosh::PATIENCE;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{Agent, SECRET};
use crate::{
    cases::Case,
    world::{Daemon, NOBODY, at_this_load, until},
};

/// Without grants no part of the table that all agents of a network namespace share is ours: so these run on nftables
/// too (B5).
const MONIT: &str = "[target.monit]\nendpoints = [\"tcp://127.200.0.99:1\"]\nallow = [\"root\"]\n";
/// The group of root's that may nothing here, as `vcap` is one.
const GROUP: u32 = NOBODY;
/// Within which a bus is protected once its file is whole (B2).
const WHOLE: Duration = Duration::from_millis(300);

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(b2_several_servers_in_one_string),
        case!(b2_several_servers_in_one_endpoint_of_the_configuration),
        case!(b2_what_makes_no_sense_costs_only_itself),
        case!(b2_a_file_that_a_group_can_write_opens_nothing),
        case!(b2_a_file_that_is_made_first_and_written_then),
        case!(b2_settings_on_a_later_mount_are_seen_at_once),
    ]
}

fn agent() -> Result<Agent> {
    Agent::new(MONIT)
}

impl Agent {
    fn attacks(&self, buses: &[u8], reach: bool) -> Result<()> {
        for last in buses {
            let attack = self.world.attack(NOBODY).to(self.bus(*last));
            if reach {
                attack.reaches()?;
            } else {
                attack.is_refused()?;
                self.world.attack(0).to(self.bus(*last)).reaches()?;
            }
        }
        Ok(())
    }

    fn is_well(&self, daemon: &Daemon) -> Result<()> {
        let (status, log) = (self.world.status()?, daemon.log());
        ensure!(status["state"] == "enforcing", "{} {log}", self.causes()?);
        ensure!(!log.contains("ERROR") && !log.contains(SECRET), "{log}");
        Ok(())
    }

    /// Waits until a bus is protected, which takes no longer than it may once a file is whole.
    fn at_once(&self, last: u8, what: &str) -> Result<()> {
        let attack = self.world.attack(NOBODY).to(self.bus(last));
        let started = Instant::now();
        until(what, || Ok(attack.run()?.errno.is_some()))?;
        let took = started.elapsed();
        println!("    {what}: protected after {took:?}");
        let asked = Instant::now();
        attack.run()?;
        ensure!(
            took < at_this_load(WHOLE)? + asked.elapsed() * 2,
            "{what}: only after {took:?}"
        );
        Ok(())
    }
}

fn b2_several_servers_in_one_string() -> Result<()> {
    let agent = agent()?;
    let (first, second) = (agent.url(1), agent.url(2));
    let (bare, third) = (agent.bus(4), agent.url(3));
    let third = third.trim_start_matches("nats://");
    let update = format!("{{\"mbus\":{{\"urls\":[\"{},{bare}\"]}}}}", agent.url(5));
    agent.attacks(&[1, 2, 3, 4, 5], true)?;
    agent.put("update_settings.json", &update)?;
    agent.put("settings.json", format!("{{\"mbus\":\"{first}, {second},{third}\"}}"))?;
    let daemon = agent.daemon()?;
    agent.attacks(&[1, 2, 3, 4, 5], false)?;
    agent.is_well(&daemon)
}

fn b2_several_servers_in_one_endpoint_of_the_configuration() -> Result<()> {
    let agent = agent()?;
    let (first, second) = (agent.url(1), agent.url(2));
    let second = second.trim_start_matches("nats://");
    let configure = |endpoint: &str| {
        let target = format!("[target.bus]\nendpoints = [{endpoint:?}]\nallow = [\"root\"]\n");
        agent.world.configure(&target)
    };
    agent.attacks(&[1, 2], true)?;
    configure(&format!("tcp://{},{}", agent.bus(1), agent.bus(2)))?;
    let refused = agent.world.enforcer(&["config", "check"])?;
    ensure!(
        refused.code == 2 && refused.stderr.contains("write each by itself"),
        "{refused:?}"
    );
    configure(&format!("{first},{second}"))?;
    let daemon = agent.daemon()?;
    agent.attacks(&[1, 2], false)?;
    agent.is_well(&daemon)?;
    let shown = agent.world.enforcer(&["config", "show"])?.demand(0)?.stdout;
    let both = format!("nats://{},{}", agent.bus(1), agent.bus(2));
    ensure!(shown.contains(&both) && !shown.contains(SECRET), "{shown}");
    let asked = agent
        .world
        .enforcer(&["check", "nobody", &format!("{first},{second}")])?;
    ensure!(
        asked.code == 2 && asked.stderr.contains("a comma separates servers") && !asked.stderr.contains(SECRET),
        "{asked:?}"
    );
    Ok(())
}

fn b2_what_makes_no_sense_costs_only_itself() -> Result<()> {
    let agent = agent()?;
    agent.attacks(&[1, 2, 3], true)?;
    agent.put("settings.json", format!("{{\"mbus\":{:?},\"env\":\"\"}}", agent.url(1)))?;
    let daemon = agent.daemon()?;
    agent.attacks(&[1], false)?;
    let reported = |what: &str| until(what, || Ok(agent.causes()?.contains(what)));
    reported("env is a string instead of an object")?;
    let url = agent.url(2);
    let urls = format!("[\"amqp://me:{SECRET}@h:1\",\"nats://me:{SECRET}@h:x\",\"{SECRET}\",{url:?}]");
    let text = format!("{{\"mbus\":[5],\"env\":{{\"bosh\":{{\"mbus\":{{\"urls\":{urls}}}}}}}}}");
    agent.put("settings.json", &text)?;
    agent.at_once(2, "one URL beside three bad ones")?;
    reported("urls[0]: message-bus URL amqp://h:1")?;
    // Any of the bad ones may be the one that was known.
    agent.attacks(&[1], false)?;
    // A name in Latin-1, as of a stemcell's operator.
    let mut text = format!("{{\"vm\":{{\"name\":\"M?ller\"}},\"mbus\":{:?}}}", agent.url(3)).into_bytes();
    text.iter_mut()
        .filter(|byte| **byte == b'?')
        .for_each(|byte| *byte = 0xfc);
    agent.put("settings.json", &text)?;
    agent.at_once(3, "a file with a byte that is no UTF-8")?;
    agent.attacks(&[1, 2], true)?;
    let (status, log) = (agent.world.status()?, daemon.log());
    ensure!(status["state"] == "enforcing", "{} {log}", agent.causes()?);
    ensure!(!log.contains(SECRET), "{log}");
    Ok(())
}

/// Makes a file `root:GROUP 0660`, and puts it in place.
fn lend(agent: &Agent, text: &str) -> Result<()> {
    let (aside, path) = (agent.world.path("aside"), agent.dir().join("settings.json"));
    fs::create_dir_all(agent.dir())?;
    fs::write(&aside, text)?;
    chown(&aside, Some(0), Some(GROUP))?;
    fs::set_permissions(&aside, fs::Permissions::from_mode(0o660))?;
    Ok(fs::rename(aside, path)?)
}

fn b2_a_file_that_a_group_can_write_opens_nothing() -> Result<()> {
    let agent = agent()?;
    let lets = format!("mode 0660 lets group {GROUP} write it");
    agent.attacks(&[1, 2], true)?;
    // Nothing is known: what it names is better than nothing.
    lend(&agent, &agent.mbus(1))?;
    let daemon = agent.daemon()?;
    agent.attacks(&[1], false)?;
    until("it is reported", || Ok(agent.causes()?.contains(&lets)))?;
    let checked = agent.world.enforcer(&["doctor", "--json"])?;
    ensure!(checked.stdout.contains(&lets), "{checked:?}");
    // Members of the group write another bus, and nothing: neither opens what is known nor closes what is not.
    for text in [agent.mbus(2).as_str(), "{}", ""] {
        fs::write(agent.dir().join("settings.json"), text)?;
        thread::sleep(Duration::from_millis(700));
        agent.attacks(&[1], false)?;
        agent.attacks(&[2], true)?;
        ensure!(agent.causes()?.contains("degraded"), "{text}: {}", agent.causes()?);
    }
    let log = daemon.log();
    ensure!(log.matches(&lets).count() == 1, "not logged once: {log}");
    agent.put("settings.json", agent.mbus(2))?;
    agent.at_once(2, "a file of root's alone")?;
    agent.attacks(&[1], true)?;
    ensure!(agent.world.status()?["state"] == "enforcing", "{}", agent.causes()?);
    Ok(())
}

fn b2_a_file_that_is_made_first_and_written_then() -> Result<()> {
    let agent = agent()?;
    let path = agent.dir().join("settings.json");
    agent.attacks(&[1, 2, 3], true)?;
    fs::create_dir_all(agent.dir())?;
    // Empty when the daemon starts, and whole a moment later.
    fs::write(&path, "")?;
    let daemon = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(200));
            fs::write(&path, agent.mbus(1))
        });
        agent.daemon()
    })?;
    agent.attacks(&[1], false)?;
    agent.is_well(&daemon)?;
    // Emptied while its bus is known, and written piece by piece without being closed, within the time that a writer is
    // given.
    let text = agent.mbus(2);
    let (half, rest) = text.as_bytes().split_at(text.len() / 2);
    let begun = Instant::now();
    // A machine that kept this process from writing for longer has made it a file without an end.
    let is_well_in_time = || {
        let well = agent.is_well(&daemon);
        if begun.elapsed() > PATIENCE { Ok(()) } else { well }
    };
    let mut file = fs::File::create(&path)?;
    thread::sleep(Duration::from_millis(100));
    is_well_in_time()?;
    file.write_all(half)?;
    thread::sleep(Duration::from_millis(100));
    agent.attacks(&[1], false)?;
    is_well_in_time()?;
    file.write_all(rest)?;
    let took = begun.elapsed();
    agent.at_once(2, "a file that is whole, and open still")?;
    drop(file);
    if took <= PATIENCE {
        agent.is_well(&daemon)?;
    }
    let reported = daemon.log().matches("invalid or incomplete JSON").count();
    // What stays without an end is reported, and opens nothing.
    fs::write(&path, half)?;
    let started = Instant::now();
    until("a file without an end is reported", || {
        Ok(agent.causes()?.contains("settings.json: invalid or incomplete JSON"))
    })?;
    println!("    a file without an end: reported after {:?}", started.elapsed());
    agent.attacks(&[2], false)?;
    fs::write(&path, agent.mbus(3))?;
    agent.at_once(3, "a file that is whole at last")?;
    let log = daemon.log();
    ensure!(
        log.matches("invalid or incomplete JSON").count() == reported + 1,
        "not reported once: {log}"
    );
    Ok(())
}

/// A mount, taken away at the end.
struct Mounted(PathBuf);

impl Mounted {
    /// Of a directory, as it is, on another.
    fn bind(from: &Path, on: PathBuf) -> Result<Self> {
        mount(Some(from), &on, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(Self(on))
    }

    fn tmpfs(on: PathBuf) -> Result<Self> {
        mount(Some("tmpfs"), &on, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))?;
        Ok(Self(on))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A mount over a directory is no event in it: what it holds already is seen by the mount alone.
fn b2_settings_on_a_later_mount_are_seen_at_once() -> Result<()> {
    let agent = agent()?;
    agent.attacks(&[1, 2, 3, 4, 5, 6, 7], true)?;
    fs::create_dir_all(agent.dir().join("settings"))?;
    let _daemon = agent.daemon()?;
    let made = |name: &str, below: &str, last: u8| -> Result<PathBuf> {
        let dir = agent.world.path(name);
        fs::create_dir_all(dir.join(below))?;
        fs::write(dir.join(below).join("settings.json"), agent.mbus(last))?;
        Ok(dir)
    };
    let places = [
        ("on the settings", agent.dir().join("settings"), ""),
        ("on the directory", agent.dir(), "settings"),
        ("above it", agent.world.path("vcap"), "bosh"),
    ];
    let mut mounts = Vec::new();
    for (last, (what, on, below)) in (1..).zip(places.clone()) {
        mounts.push(Mounted::bind(&made(&format!("made-{last}"), below, last)?, on)?);
        agent.at_once(last, what)?;
        agent.attacks(&[last], false)?;
    }
    // Each is seen again where the one above it goes.
    for last in [2, 1] {
        drop(mounts.pop());
        agent.at_once(last, "what a mount has hidden")?;
        agent.attacks(&[last + 1], true)?;
    }
    drop(mounts.pop());
    agent.attacks(&[1], false)?;
    for (last, (what, on, below)) in (5..).zip(places) {
        mounts.push(Mounted::tmpfs(on.clone())?);
        let dir = on.join(below);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("settings.json"), agent.mbus(last))?;
        agent.at_once(last, &format!("a tmpfs {what}"))?;
        agent.attacks(&[last], false)?;
    }
    for last in [6, 5] {
        drop(mounts.pop());
        agent.at_once(last, "what a tmpfs has hidden")?;
    }
    drop(mounts.pop());
    agent.attacks(&[5], false)?;
    until("it is missed", || Ok(agent.causes()?.contains("not known yet")))
}
