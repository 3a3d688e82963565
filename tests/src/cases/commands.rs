//! What commands say where the daemon is away, hangs, or runs by another file than the one that lies there now.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use hickory_proto::op::ResponseCode;
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{
    Case,
    names::{Named, addresses},
};
use crate::{
    backend::EBPF,
    dns::Zone,
    world::{Listener, NOBODY, World, binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(commands_find_a_daemon_whose_file_was_edited),
        case!(what_is_wrong_with_a_file_is_said_once),
        case!(events_of_what_does_not_exist_say_so),
        case!(who_is_told_to_start_it_is_told_what_that_needs).on(EBPF),
        case!(status_of_a_daemon_that_hangs_is_the_kernels),
        case!(a_daemon_that_cannot_be_reached_is_not_said_to_be_away),
        case!(why_a_start_went_on_with_the_last_rules_stays_to_be_read).on(EBPF),
        case!(following_events_ends_with_the_daemon_and_says_so),
        case!(grants_are_listed_without_a_daemon),
        case!(f1_grants_that_were_deleted_are_written_again),
        case!(f6_a_second_run_takes_no_state_away),
        case!(what_ends_a_run_is_json_in_a_json_log),
        case!(config_check_lists_names_without_an_address),
    ]
}

/// A target that may be granted, to which root alone may connect.
fn grantable() -> Result<(World, Listener)> {
    let world = World::new()?;
    let listener = world.listen()?;
    world.configure(&format!(
        "[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\ngrants = true\n",
        world.here()
    ))?;
    Ok((world, listener))
}

fn edit(world: &World, from: &str, to: &str) -> Result<()> {
    let file = world.path("enforcer.toml");
    let text = fs::read_to_string(&file)?;
    ensure!(text.contains(from), "no {from} in {text}");
    Ok(fs::write(file, text.replace(from, to))?)
}

/// The places of an instance change with a restart; until then whoever asks is answered by the one that runs.
fn commands_find_a_daemon_whose_file_was_edited() -> Result<()> {
    let (world, _listener) = grantable()?;
    let daemon = world.daemon()?;
    until("the rules are saved", || {
        Ok(world.path("state/last-good.json").exists())
    })?;
    // By its socket it is found as before; `check` reads what is in the kernel where that is.
    let table = format!("nft_table = \"{}", world.name());
    let pins = format!("pin_dir = \"{}", world.pins().display());
    edit(&world, &table, "nft_table = \"y")?;
    edit(&world, &pins, &format!("{pins}y"))?;
    let moved = world
        .enforcer(&["check", "nobody", &world.here().to_string()])?
        .demand(1)?;
    ensure!(
        moved.stdout.contains("denied by main") && moved.stderr.contains("once the daemon is restarted"),
        "{moved:?}"
    );
    edit(&world, "nft_table = \"y", &table)?;
    edit(&world, &format!("{pins}y"), &pins)?;
    for (from, to) in [
        ("control.sock", "other.sock"),
        (&*format!("nft_table = \"{}", world.name()), "nft_table = \"x"),
    ] {
        edit(&world, from, to)?;
        let status = world.enforcer(&["status", "--json"])?.demand(0)?;
        let read: Value = serde_json::from_str(&status.stdout)?;
        ensure!(read["daemon"]["pid"] == daemon.pid(), "{status:?}");
        ensure!(status.stderr.contains("once the daemon is restarted"), "{status:?}");
        world.enforcer(&["verify"])?.demand(0)?;
        let here = world.here().to_string();
        world.enforcer(&["check", "nobody", &here])?.demand(1)?;
        world.enforcer(&["grants"])?.demand(0)?;
    }
    let reload = world.enforcer(&["reload"])?.demand(2)?;
    let keys = "socket, nft_table cannot change while enforcer runs";
    ensure!(reload.stderr.contains(keys), "{reload:?}");
    // What would open all is not sent to an instance that the file does not name.
    let unload = world.enforcer(&["unload", "--yes"])?.demand(2)?;
    ensure!(unload.stderr.contains("is in use by another enforcer"), "{unload:?}");
    world.attack(NOBODY).is_refused()?;
    daemon.kill()?;
    // What it leaves is shown, and goes, wherever it is.
    let left = world.enforcer(&["status"])?.demand(1)?;
    ensure!(left.stdout.contains("not running"), "{left:?}");
    world.enforcer(&["unload", "--yes"])?.demand(0)?;
    world.attack(NOBODY).reaches()?;
    let _daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    world.enforcer(&["unload", "--yes"])?.demand(0)?;
    world.attack(NOBODY).reaches()
}

/// A socket that commands cannot reach, and a daemon that is there.
fn a_daemon_that_cannot_be_reached_is_not_said_to_be_away() -> Result<()> {
    let (world, _listener) = grantable()?;
    let daemon = world.daemon()?;
    let run = world.path("run");
    fs::set_permissions(&run, fs::Permissions::from_mode(0o777))?;
    fs::remove_file(run.join("control.sock"))?;
    let text = world.enforcer(&["status"])?.demand(1)?.stdout;
    let told = format!("holds {}, and does not answer", world.path("state").display());
    ensure!(text.contains(&told) && !text.contains("not running"), "{text}");
    world.attack(NOBODY).is_refused()?;
    fs::set_permissions(&run, fs::Permissions::from_mode(0o700))?;
    until("it makes its socket again", || {
        Ok(world.enforcer(&["status"])?.code == 0)
    })?;
    drop(daemon);
    Ok(())
}

/// What keeps a configuration from being taken is not hidden by what comes of it.
fn why_a_start_went_on_with_the_last_rules_stays_to_be_read() -> Result<()> {
    let (world, _listener) = grantable()?;
    let daemon = world.daemon()?;
    until("the rules are saved", || {
        Ok(world.path("state/last-good.json").exists())
    })?;
    edit(&world, "cgroup = \"", "cgroup = \"/nowhere")?;
    daemon.kill()?;
    let _daemon = world.daemon()?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    let status = world.status()?;
    ensure!(status["causes"].to_string().contains("/nowhere"), "{status}");
    world.attack(NOBODY).is_refused()
}

fn following_events_ends_with_the_daemon_and_says_so() -> Result<()> {
    let (world, _listener) = grantable()?;
    let daemon = world.daemon()?;
    let mut follow = Command::new(binary("enforcer")?);
    follow
        .arg("--config")
        .arg(world.path("enforcer.toml"))
        .args(["events", "--follow"]);
    let mut child = follow.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // Its first line shows that it follows.
    world.attack(NOBODY).is_refused()?;
    let (mut line, mut lines) = (String::new(), BufReader::new(child.stdout.take().context("no stdout")?));
    lines.read_line(&mut line)?;
    ensure!(line.contains("deny"), "{line}");
    daemon.kill()?;
    // A reader that goes ends it, too, and is no fault of anybody's.
    let ended = child.wait_with_output()?;
    drop(lines);
    let said = String::from_utf8_lossy(&ended.stderr);
    ensure!(ended.status.code() == Some(2) && said.contains("hung up"), "{ended:?}");
    Ok(())
}

fn events_of_what_does_not_exist_say_so() -> Result<()> {
    let (world, _listener) = grantable()?;
    let daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    let says = |words: &[&str], part: Option<&str>| {
        let said = world.enforcer(words)?.demand(0)?.stderr;
        let is_right = part.map_or(said.is_empty(), |part| said.contains(part));
        ensure!(is_right, "{words:?}: {said}, not {part:?}");
        Ok(())
    };
    until("the denial is recorded", || {
        Ok(world.enforcer(&["events", "--summary"])?.stdout.contains("main"))
    })?;
    for more in [&[][..], &["--summary"]] {
        let says = |words: &[&str], part| says(&[&["events"], more, words].concat(), part);
        says(&["--target", "nope"], Some("there is no target nope"))?;
        says(&["--target", "nope"], Some("active targets: main"))?;
        says(&["--target", "main"], None)?;
        says(
            &["--user", "3999999999"],
            Some("no user of this host has uid 3999999999"),
        )?;
        says(&["--user", "nobody"], None)?;
        // Nothing was denied to it, and it exists.
        says(&["--user", "daemon"], None)?;
    }
    // What was one is in the record.
    edit(&world, "[target.main]", "[target.other]")?;
    world.enforcer(&["reload"])?.demand(0)?;
    says(&["events", "--target", "main"], None)?;
    daemon.kill()?;
    let alone = world
        .enforcer(&["events", "--summary", "--target", "nope"])?
        .demand(0)?
        .stderr;
    ensure!(alone.contains("there is no target nope"), "{alone}");
    Ok(())
}

/// On a host without anything that the packaged service waits for.
fn who_is_told_to_start_it_is_told_what_that_needs() -> Result<()> {
    let run = |preparation: &str, words: &str| {
        let script = format!(
            "mount -t tmpfs none /var && if [ -d /etc/enforcer ]; then mount -t tmpfs none /etc/enforcer; fi && \
             {preparation} exec \"$0\" {words}"
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]).arg(binary("enforcer")?);
        ran(&mut command)
    };
    let waits = "the packaged service does not start on this host yet";
    for words in ["status", "verify", "events"] {
        let said = run("", words)?;
        ensure!(said.stderr.contains(waits) && said.code != 0, "{words}: {said:?}");
    }
    let doctor = run("", "doctor")?.stdout;
    ensure!(doctor.contains("do: write /etc/enforcer/enforcer.toml"), "{doctor}");
    for there in [
        "mkdir -p /var/vcap/bosh &&",
        "mkdir -p /var/lib/enforcer && echo >/var/lib/enforcer/last-good.json &&",
    ] {
        let said = run(there, "status")?;
        ensure!(!said.stderr.contains(waits), "{there}: {said:?}");
        let doctor = run(there, "doctor")?.stdout;
        ensure!(!doctor.contains("do: write"), "{there}: {doctor}");
    }
    Ok(())
}

/// By whoever reads the file, the command or the daemon, with a mistake or several.
fn what_is_wrong_with_a_file_is_said_once() -> Result<()> {
    let (world, _listener) = grantable()?;
    let daemon = world.daemon()?;
    edit(&world, "grants = true", "grants = 5")?;
    let file = world.path("enforcer.toml").display().to_string();
    let once = |words: &[&str]| {
        let said = world.enforcer(words)?.demand(2)?.stderr;
        ensure!(
            said.matches(&file).count() == 1 && said.contains("error: "),
            "{words:?}: {said}"
        );
        Ok(())
    };
    once(&["reload"])?;
    once(&["reload", "--dry-run"])?;
    once(&["config", "diff"])?;
    // Who needs no more of it than the place is warned.
    let status = world.enforcer(&["status"])?.demand(1)?.stderr;
    ensure!(
        status.matches(&file).count() == 1 && status.contains("warning: "),
        "{status}"
    );
    daemon.kill()?;
    once(&["verify"])?;
    once(&["grants"])?;
    edit(&world, "grants = 5", "grants = 5\nalow = []")?;
    for words in [["verify"], ["grants"]] {
        let said = world.enforcer(&words)?.demand(2)?.stderr;
        ensure!(
            said.matches(&file).count() == 2 && !said.contains("warning: "),
            "{words:?}: {said}"
        );
    }
    Ok(())
}

fn status_of_a_daemon_that_hangs_is_the_kernels() -> Result<()> {
    let (world, _listener) = grantable()?;
    let daemon = world.daemon()?;
    let before = world.status()?;
    daemon.signal(Signal::SIGSTOP)?;
    let hung = world.enforcer(&["status", "--json"])?.demand(1)?;
    let status: Value = serde_json::from_str(&hung.stdout)?;
    ensure!(
        status["conditions"][0]["id"] == "daemon-not-answering" && status["state"] == "degraded",
        "{status}"
    );
    for same in ["generation", "backend", "endpoints", "targets", "daemon"] {
        ensure!(status[same] == before[same], "{same}: {status}, not {before}");
    }
    let text = world.enforcer(&["status"])?.demand(1)?.stdout;
    ensure!(
        text.contains("did not answer within 5s") && !text.contains("not running"),
        "{text}"
    );
    // Its end is for who may end it: a command that removes nothing says so, and what to do.
    daemon.signal(Signal::SIGCONT)?;
    until("it answers again", || Ok(world.status()?["state"] == "enforcing"))
}

fn grants_are_listed_without_a_daemon() -> Result<()> {
    let (world, _listener) = grantable()?;
    let mut daemon = world.daemon()?;
    world.enforcer(&["grant", "main", "--user", "nobody"])?.demand(0)?;
    let with = world.enforcer(&["grants", "--json"])?.demand(0)?.stdout;
    let table = world.enforcer(&["grants"])?.demand(0)?.stdout;
    ensure!(
        table.contains(&format!("user {NOBODY} (nobody)")) && table.contains("uid 0 (root)"),
        "{table}"
    );
    daemon.signal(Signal::SIGTERM)?;
    ensure!(daemon.wait()? == 0, "{}", daemon.log());
    let without = world.enforcer(&["grants", "--json"])?.demand(0)?;
    ensure!(without.stdout == with, "{without:?}, not {with}");
    ensure!(without.stderr.contains("saved last"), "{without:?}");
    // What cannot be read is not listed as if it were.
    let file = world.path("state/grants.json");
    let good = fs::read(&file)?;
    for bytes in [
        &b""[..],
        b"{}",
        &good[..good.len() / 2],
        br#"{"schema":"enforcer/grants-file/9"}"#,
    ] {
        fs::write(&file, bytes)?;
        let said = world.enforcer(&["grants"])?.demand(2)?;
        let parts = [
            &*file.display().to_string(),
            "what the kernel holds stays",
            "grant again",
        ];
        ensure!(parts.iter().all(|part| said.stderr.contains(part)), "{said:?}");
        ensure!(
            said.stdout.is_empty() && !said.stderr.contains("saved last"),
            "{said:?}"
        );
    }
    world.attack(NOBODY).reaches()?;
    // As it says.
    let _daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    world.enforcer(&["grant", "main", "--user", "nobody"])?.demand(0)?;
    let listed = world.enforcer(&["grants"])?.demand(0)?.stdout;
    ensure!(listed.contains("(nobody)"), "{listed}");
    world.attack(NOBODY).reaches()
}

fn f1_grants_that_were_deleted_are_written_again() -> Result<()> {
    let (world, _listener) = grantable()?;
    let daemon = world.daemon()?;
    let file = world.path("state/grants.json");
    world.attack(NOBODY).is_refused()?;
    world.enforcer(&["grant", "main", "--user", "nobody"])?.demand(0)?;
    let kept = fs::read(&file)?;
    fs::remove_file(&file)?;
    until("it is there again", || {
        Ok(fs::read(&file).is_ok_and(|again| again == kept))
    })?;
    ensure!(daemon.log().contains("removed the file of grants"), "{}", daemon.log());
    daemon.kill()?;
    let _daemon = world.daemon()?;
    world.attack(NOBODY).reaches()
}

/// A directory that came to belong to another user is replaced at a start; never while a daemon has it.
fn f6_a_second_run_takes_no_state_away() -> Result<()> {
    let (world, _listener) = grantable()?;
    let daemon = world.daemon()?;
    until("the rules are saved", || {
        Ok(world.path("state/last-good.json").exists())
    })?;
    let state = world.path("state");
    let inode = || Ok::<_, anyhow::Error>(fs::metadata(&state)?.ino());
    let before = inode()?;
    chown(&state, Some(NOBODY), None)?;
    let second = world.enforcer(&["run"])?.demand(2)?;
    ensure!(second.stderr.contains("is in use by another enforcer"), "{second:?}");
    world.enforcer(&["apply"])?.demand(2)?;
    world.enforcer(&["apply", "--last-good"])?.demand(2)?;
    ensure!(inode()? == before, "the directory is another one");
    daemon.kill()?;
    let daemon = world.daemon()?;
    ensure!(
        daemon.log().contains(&format!("belonged to user {NOBODY}, not root")),
        "{}",
        daemon.log()
    );
    ensure!(inode()? != before, "the directory is still theirs");
    world.attack(NOBODY).is_refused()
}

fn what_ends_a_run_is_json_in_a_json_log() -> Result<()> {
    let (world, _listener) = grantable()?;
    edit(&world, "grants = true", "grants = 5\nalow = []")?;
    let mut run = Command::new(binary("enforcer")?);
    run.arg("--config").arg(world.path("enforcer.toml"));
    let ended = ran(run.args(["run", "--log-format", "json"]))?.demand(2)?;
    let lines: Vec<Value> = ended
        .stderr
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let of = |key: &str| {
        let is_it = |line: &&Value| {
            let said = line["fields"]["message"].as_str().unwrap_or_default();
            line["level"] == "ERROR" && said.contains(key) && said.contains("enforcer.toml:")
        };
        lines.iter().filter(is_it).count()
    };
    ensure!(of("grants in") == 1 && of("`alow`") == 1, "{ended:?}");
    Ok(())
}

fn config_check_lists_names_without_an_address() -> Result<()> {
    let named = Named::new(&["here.test", "gone.test", "silent.test"], "")?;
    named.dns.set("here.test", addresses(&["10.9.0.1"]));
    named.dns.set("gone.test", Zone::Code(ResponseCode::NXDomain));
    named.dns.set("silent.test", Zone::Code(ResponseCode::ServFail));
    let check = |code: i32| {
        let mut command = named.world.with_resolver()?;
        command.arg("--config").arg(named.world.path("enforcer.toml"));
        Ok::<_, anyhow::Error>(ran(command.args(["config", "check"]))?.demand(code)?.stdout)
    };
    let said = check(1)?;
    ensure!(
        said.contains("gone.test has no address") && said.contains("nothing of it is protected"),
        "{said}"
    );
    ensure!(!said.contains("here.test"), "{said}");
    ensure!(
        said.contains("warning: ") && said.contains("silent.test cannot be looked up now"),
        "{said}"
    );
    let file = named.world.path("enforcer.toml");
    let text = fs::read_to_string(&file)?.replace("[dns]\n", "[dns]\nunresolved = \"closed\"\n");
    fs::write(&file, text)?;
    let closed = check(1)?;
    ensure!(closed.contains("its port is closed at every address"), "{closed}");
    named.dns.set("gone.test", addresses(&["127.0.0.1", "::1"]));
    let lies = check(1)?;
    ensure!(lies.contains("gone.test resolves only to loopback"), "{lies}");
    named.dns.set("gone.test", addresses(&["10.9.0.2"]));
    fs::create_dir(named.world.path("conf.d"))?;
    fs::write(named.world.path("conf.d/more.conf"), "")?;
    let odd = check(0)?;
    ensure!(odd.contains("conf.d/more.conf is not read"), "{odd}");
    Ok(())
}
