//! Denials with the names of who was denied, added up over restarts, by `enforcer events --summary` and in the log.

use std::{fs, net::SocketAddr, process::Command};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::Case;
use crate::{
    backend::Backend,
    world::{NOBODY, World, binary, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(denials_are_added_up_over_restarts),
        case!(every_target_that_allows_counts),
        case!(events_are_filtered),
        case!(f6_a_summary_of_others_is_not_read),
        case!(the_log_in_json_has_fields),
        case!(status_has_names),
    ]
}

const OTHER: u32 = 1;

/// Two targets, to both of which root alone may connect.
fn guarded(mode: &str) -> Result<(World, crate::world::Listener)> {
    let world = World::new()?;
    let listener = world.listen()?;
    world.configure(&format!(
        "mode = {mode:?}\nbackend = {:?}\n[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\n\
         [target.other]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\", \"daemon\"]\n",
        Backend::current().configured(),
        world.here(),
        elsewhere(&world),
    ))?;
    Ok((world, listener))
}

fn elsewhere(world: &World) -> SocketAddr {
    SocketAddr::from(([127, 99, 0, 1], world.port))
}

fn read(world: &World, words: &[&str]) -> Result<Vec<Value>> {
    let ran = world.enforcer(&[&["events", "--json"], words].concat())?.demand(0)?;
    ran.stdout.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Users, targets and numbers of a summary, the most first.
fn sums(world: &World, words: &[&str]) -> Result<Vec<(u64, String, u64)>> {
    let of = |sum: &Value| -> Result<_> {
        ensure!(sum["schema"] == "enforcer/summary/1" && sum["of"] == "kind", "{sum}");
        let number = |key: &str| sum[key].as_u64().with_context(|| format!("no {key} in {sum}"));
        let target = sum["target"].as_str().unwrap_or_default().to_owned();
        Ok((number("uid")?, target, number("count")?))
    };
    read(world, &[&["--summary"], words].concat())?.iter().map(of).collect()
}

/// What an audit of a night comes to: who connects to what, from which cgroup, how often; after a restart and a crash,
/// with and without a daemon.
fn denials_are_added_up_over_restarts() -> Result<()> {
    let (world, _listener) = guarded("audit")?;
    let mut daemon = world.daemon()?;
    ensure!(
        world.enforcer(&["events", "--summary"])?.demand(0)?.stdout == "no denials\n",
        "there are some"
    );
    world.attack(0).reaches()?;
    for _ in 0..3 {
        world.attack(NOBODY).reaches()?;
    }
    world.attack(OTHER).reaches()?;
    world.attack(NOBODY).to(elsewhere(&world)).run()?;
    let uid = u64::from(NOBODY);
    let main = |count| (uid, "main".to_owned(), count);
    let rest = [(u64::from(OTHER), "main".to_owned(), 1), (uid, "other".to_owned(), 1)];
    let are = |count| -> Result<bool> {
        let found = sums(&world, &[])?;
        Ok(found.first() == Some(&main(count)) && found.len() == 3 && rest.iter().all(|sum| found.contains(sum)))
    };
    until("all are added up", || are(3))?;
    let first = read(&world, &["--summary", "-n", "1"])?.pop().context("nothing")?;
    ensure!(
        first["verdict"] == "would-deny" && first["user"] == "nobody" && first["endpoint"] == world.here().to_string(),
        "{first}"
    );
    if !Backend::current().is_nftables() {
        let cgroup = format!("/{}", world.name());
        ensure!(first["comm"] == "attack" && first["cgroup"] == cgroup, "{first}");
        let table = world.enforcer(&["events", "--summary"])?.demand(0)?.stdout;
        ensure!(
            table.contains("uid 65534 (nobody)") && table.contains(&cgroup),
            "{table}"
        );
    }
    // A stop saves it, and whoever asks reads what was saved.
    daemon.signal(Signal::SIGTERM)?;
    ensure!(daemon.wait()? == 0, "{}", daemon.log());
    ensure!(are(3)?, "{:?}", sums(&world, &[])?);
    let offline = world.enforcer(&["events", "--summary"])?.demand(0)?;
    ensure!(offline.stderr.contains("saved last"), "{offline:?}");
    let daemon = world.daemon()?;
    ensure!(are(3)?, "{:?}", sums(&world, &[])?);
    world.attack(NOBODY).reaches()?;
    until("it goes on", || are(4))?;
    // A crash loses no more than the last minute.
    daemon.kill()?;
    ensure!(are(3)?, "{:?}", sums(&world, &[])?);
    let _daemon = world.daemon()?;
    ensure!(are(3)?, "{:?}", sums(&world, &[])?);
    Ok(())
}

fn events_are_filtered() -> Result<()> {
    let (world, _listener) = guarded("enforce")?;
    let _daemon = world.daemon()?;
    for attack in [
        world.attack(NOBODY),
        world.attack(OTHER),
        world.attack(NOBODY).to(elsewhere(&world)),
    ] {
        ensure!(attack.run()?.errno.is_some(), "not refused");
    }
    let users = |words: &[&str]| -> Result<Vec<u64>> {
        let events = read(&world, words)?;
        Ok(events.iter().filter_map(|event| event["socket_uid"].as_u64()).collect())
    };
    let (nobody, other) = (u64::from(NOBODY), u64::from(OTHER));
    until("all are there", || Ok(users(&[])?.len() == 3))?;
    for (words, found) in [
        (&["--user", "nobody"] as &[&str], vec![nobody, nobody]),
        (&["--user", "1"], vec![other]),
        (&["--target", "other"], vec![nobody]),
        (&["-n", "2"], vec![other, nobody]),
        (&["-n", "1", "--target", "main"], vec![other]),
        (&["--since", "1h"], vec![nobody, other, nobody]),
        (
            &[
                "--since",
                "2000-01-01T00:00:00Z",
                "--user",
                "nobody",
                "--target",
                "main",
            ],
            vec![nobody],
        ),
        (&["--since", "2100-01-01"], vec![]),
        (&["--target", "none"], vec![]),
    ] {
        ensure!(users(words)? == found, "{words:?}: {:?}", users(words)?);
    }
    ensure!(
        sums(&world, &["--user", "1"])? == [(other, "main".to_owned(), 1)],
        "{:?}",
        sums(&world, &[])?
    );
    ensure!(
        sums(&world, &["--since", "1h", "--target", "other"])? == [(nobody, "other".to_owned(), 1)],
        "{:?}",
        sums(&world, &[])?
    );
    ensure!(sums(&world, &["--since", "2100-01-01"])?.is_empty(), "of the future");
    for (words, says) in [
        (["--since", "yesterday"], "such as 90m or 7d"),
        (["--user", "no-such-user"], "no user \"no-such-user\""),
        (["--summary", "--follow"], "cannot be used with"),
    ] {
        let error = world.enforcer(&[&["events"], &words[..]].concat())?.demand(2)?.stderr;
        ensure!(error.contains(says), "{words:?}: {error}");
    }
    Ok(())
}

/// Another user's file is neither read nor written to; it costs the summary, and nothing else.
fn f6_a_summary_of_others_is_not_read() -> Result<()> {
    let (world, _listener) = guarded("enforce")?;
    let file = world.path("state/denials.json");
    let daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    until("it is added up", || Ok(!sums(&world, &[])?.is_empty()))?;
    daemon.signal(Signal::SIGTERM)?;
    until("it is saved", || Ok(file.exists()))?;
    drop(daemon);
    std::os::unix::fs::chown(&file, Some(NOBODY), None)?;
    let error = world.enforcer(&["events", "--summary"])?.demand(2)?.stderr;
    ensure!(error.contains("is owned by uid 65534"), "{error}");
    let daemon = world.daemon()?;
    ensure!(daemon.log().contains("is owned by uid 65534"), "{}", daemon.log());
    ensure!(sums(&world, &[])?.is_empty(), "it is read");
    world.attack(NOBODY).is_refused()?;
    fs::write(&file, "{")?;
    std::os::unix::fs::chown(&file, Some(0), None)?;
    let error = world.enforcer(&["events", "--summary"])?.demand(0)?;
    drop((error, daemon));
    let error = world.enforcer(&["events", "--summary"])?.demand(2)?.stderr;
    ensure!(error.contains("is damaged"), "{error}");
    Ok(())
}

/// For whatever collects logs; a person reads the message alone.
fn the_log_in_json_has_fields() -> Result<()> {
    let (world, _listener) = guarded("enforce")?;
    let mut command = Command::new(binary("enforcer")?);
    let daemon = world.daemon_with(command.args(["--log-format", "json"]))?;
    world.attack(NOBODY).is_refused()?;
    let denial = || -> Option<Value> {
        let log = daemon.log();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines
            .map(|line| line["fields"].clone())
            .find(|fields| fields["verdict"] == "deny")
    };
    until("it is logged", || Ok(denial().is_some()))?;
    let fields = denial().context("it has gone")?;
    let message = fields["message"].as_str().unwrap_or_default();
    ensure!(message.starts_with("denied 1 attempt on main"), "{fields}");
    ensure!(
        fields["target"] == "main"
            && fields["uid"] == NOBODY
            && fields["user"] == "nobody"
            && fields["endpoint"] == world.here().to_string()
            && fields["count"] == 1,
        "{fields}"
    );
    if Backend::current().is_nftables() {
        ensure!(fields["comm"].is_null(), "{fields}");
    } else {
        let cgroup = format!("/{}", world.name());
        ensure!(fields["comm"] == "attack" && fields["cgroup"] == cgroup, "{fields}");
    }
    daemon.kill()?;
    let daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    until("it is logged", || Ok(daemon.log().contains("denied 1 attempt")))?;
    ensure!(!daemon.log().contains("verdict="), "{}", daemon.log());
    Ok(())
}

/// Users and cgroups as the configuration has them, with a daemon and without one.
fn status_has_names() -> Result<()> {
    let world = World::new()?;
    world.configure(&format!(
        "backend = {:?}\n[target.main]\nendpoints = [\"tcp://127.0.0.1:{}\"]\n\
         allow = [\"root\", \"nobody\", 4000000000]\n",
        Backend::current().configured(),
        world.port,
    ))?;
    let daemon = world.daemon()?;
    let has_names = || -> Result<()> {
        let text = world.enforcer(&["status"])?.stdout;
        ensure!(
            ["user 0 (root)", "user 65534 (nobody)", "user 4000000000"]
                .iter()
                .all(|user| text.contains(user)),
            "{text}"
        );
        let target = world.status()?["targets"][0].clone();
        let names = target["principals"].as_array().into_iter().flatten();
        let mut names: Vec<&str> = names.filter_map(|one| one["user"].as_str()).collect();
        names.sort_unstable();
        ensure!(names == ["nobody", "root"], "{target}");
        ensure!(target["allow"].to_string().contains("\"user 65534\""), "{target}");
        Ok(())
    };
    has_names()?;
    daemon.kill()?;
    has_names()
}

/// An attempt that several targets allow counts for each of them, one that several deny for the first.
fn every_target_that_allows_counts() -> Result<()> {
    let (world, _listener) = guarded("enforce")?;
    let _daemon = world.daemon()?;
    for targets in 1..=4 {
        let names = ["a", "b", "c", "d"].into_iter().take(targets);
        let target = |name: &str| {
            let place = world.here();
            format!("[target.{name}{targets}]\nendpoints = [\"tcp://{place}\"]\nallow = [\"root\"]\n")
        };
        world.configure(&names.map(target).collect::<String>())?;
        world.enforcer(&["reload"])?.demand(0)?;
        world.attack(0).reaches()?;
        world.attack(0).reaches()?;
        world.attack(NOBODY).run()?;
        let status = world.status()?;
        let all = status["targets"].as_array().context("no targets")?;
        ensure!(all.len() == targets, "{status}");
        let sum = |what: &str| all.iter().filter_map(|target| target[what].as_u64()).sum::<u64>();
        ensure!(all.iter().all(|target| target["allowed"] == 2), "{status}");
        ensure!(sum("denied") == 1, "{status}");
    }
    Ok(())
}
