//! Bad input: one line that names thing, place and remedy, exit code 2, and what was active still is (F4).

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::PathBuf,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Case, case};
use crate::{
    backend::{Backend, EBPF},
    foreign::{ForeignProgram, Sharing},
    world::{NOBODY, World, binary, ran, until},
};

/// Name, what takes the place of the target's section, and what the message must say.
const TEXTS: [(&str, &str, &[&str]); 13] = [
    (
        "unknown_key",
        "allwo = []\n[target.main]\nendpoints = [\"tcp://10.0.0.1:1\"]\nallow = []\n",
        &["allwo", "toml:7"],
    ),
    (
        "unknown_key_in_target",
        "[target.main]\nendpoint = []\nallow = []\n",
        &["endpoint", "toml:8"],
    ),
    (
        "bad_port",
        "[target.main]\nendpoints = [\"tcp://10.0.0.1:99999\"]\nallow = []\n",
        &["99999", "toml:8"],
    ),
    (
        "bad_prefix",
        "[target.main]\nendpoints = [\"tcp://10.0.0.0/33:1\"]\nallow = []\n",
        &["10.0.0.0/33", "toml:8"],
    ),
    (
        "host_bits",
        "[target.main]\nendpoints = [\"tcp://10.0.0.1/8:1\"]\nallow = []\n",
        &["10.0.0.0/8", "toml:8"],
    ),
    (
        "no_port",
        "[target.main]\nendpoints = [\"tcp://nats.example\"]\nallow = []\n",
        &["nats.example", "port"],
    ),
    (
        "no_port_no_password",
        "[target.main]\nendpoints = [\"nats://me:secret@nats.example\"]\nallow = []\n",
        &["nats.example", "port"],
    ),
    (
        "duplicate_target",
        "[target.main]\nendpoints = []\nallow = []\n[target.main]\nallow = []\n",
        &["main", "toml:10"],
    ),
    (
        "odd_ipv4",
        "[target.main]\nendpoints = [\"tcp://127.1:1\"]\nallow = []\n",
        &["127.1"],
    ),
    (
        "unspecified",
        "[target.main]\nendpoints = [\"tcp://0.0.0.0:1\"]\nallow = []\n",
        &["0.0.0.0", "local"],
    ),
    (
        "unknown_key_in_bosh",
        "[bosh]
dri = \"/x\"
[target.main]
endpoints = []
allow = []
",
        &["dri", "toml:8"],
    ),
    (
        "no_backend",
        "backend = \"iptables\"\n[target.main]\nendpoints = []\nallow = []\n",
        &["nftables", "toml:6"],
    ),
    ("not_toml", "[target.main\n", &["toml:7"]),
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = TEXTS
        .into_iter()
        .map(|(name, text, says)| case(&format!("f4_{name}"), move || refused(text, says)))
        .collect();
    cases.push(case!(f4_empty_allow_list_warns));
    cases.push(case!(f4_file_missing_or_unreadable));
    cases.push(case!(f4_reload_with_a_bad_file_degrades));
    cases.push(case!(f4_targets_in_files_of_their_own_are_taken_whole_or_not_at_all));
    cases.push(case!(f8_at_a_first_start_a_mistake_in_one_file_costs_that_file));
    cases.push(case!(f6_a_configuration_that_others_can_write_is_rejected));
    cases.push(case!(f4_attach_cgroup_missing).on(EBPF));
    cases.push(case!(f4_pin_dir_not_on_a_bpffs).on(EBPF));
    cases.push(case!(f4_no_permission));
    cases.push(case!(f5_another_program_forbids_sharing).on(EBPF));
    cases.push(case!(f6_pin_dir_of_somebody_else).on(EBPF));
    cases.push(case!(f4_pins_in_use));
    cases
}

/// Runs `apply` with what should be refused, while other rules are active.
fn expect(world: &World, says: &[&str]) -> Result<()> {
    let ran = world.enforcer(&["apply"])?.demand(2)?;
    let text = &ran.stderr;
    ensure!(
        text.trim_end().lines().count() == 1 && text.starts_with("enforcer: error: "),
        "not one line: {text}"
    );
    for say in says {
        ensure!(text.contains(say), "{say:?} is not in: {text}");
    }
    ensure!(!text.contains("secret"), "a password is in: {text}");
    Ok(())
}

/// A world with rules active and its listener.
fn guarded() -> Result<(World, crate::world::Listener)> {
    let world = World::new()?;
    let listener = world.listen()?;
    world.attack(NOBODY).reaches()?;
    good(&world)?;
    world.apply()?;
    Ok((world, listener))
}

fn good(world: &World) -> Result<()> {
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)
}

fn still_guarded(world: &World) -> Result<()> {
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()
}

fn refused(text: &str, says: &[&str]) -> Result<()> {
    let (world, _listener) = guarded()?;
    world.configure(text)?;
    expect(&world, says)?;
    let checked = world.enforcer(&["config", "check"])?;
    ensure!(checked.code == 2, "config check: {checked:?}");
    still_guarded(&world)
}

fn f4_empty_allow_list_warns() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.configure_one(&[format!("tcp://{}", world.here())], "[]")?;
    let ran = world.enforcer(&["apply"])?.demand(0)?;
    ensure!(
        ran.stderr.contains("WARN") && ran.stderr.contains("main"),
        "{}",
        ran.stderr
    );
    world.attack(0).is_refused()
}

fn f4_file_missing_or_unreadable() -> Result<()> {
    let (world, _listener) = guarded()?;
    let config = world.path("enforcer.toml");
    fs::remove_file(&config)?;
    expect(&world, &["enforcer.toml"])?;
    fs::create_dir(&config)?;
    expect(&world, &["enforcer.toml"])?;
    fs::remove_dir(&config)?;
    good(&world)?;
    still_guarded(&world)
}

fn f4_reload_with_a_bad_file_degrades() -> Result<()> {
    let (world, _listener) = guarded()?;
    world.enforcer(&["unload"])?.demand(0)?;
    let daemon = world.daemon()?;
    let toml = fs::read_to_string(world.path("enforcer.toml"))?;
    fs::write(world.path("enforcer.toml"), format!("{toml}\nbogus = 1\n"))?;
    daemon.reload()?;
    still_guarded(&world)?;
    fs::write(world.path("enforcer.toml"), &toml)?;
    let status = world.status()?;
    ensure!(
        status["state"] == "degraded" && status["causes"].to_string().contains("bogus"),
        "{status}"
    );
    daemon.reload()?;
    let status = world.status()?;
    ensure!(status["state"] == "enforcing", "{status}");
    Ok(())
}

/// What has a file of its own is protected too, and a mistake there changes nothing, at a reload and at a start.
fn f4_targets_in_files_of_their_own_are_taken_whole_or_not_at_all() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let file = world.path("conf.d/more.toml");
    let target = |user: &str| {
        format!(
            "[target.more]\nendpoints = [\"tcp://{}\"]\nallow = [{user:?}]\n",
            world.here()
        )
    };
    world.configure_one(&["tcp://10.0.0.1:1".to_owned()], r#"["root"]"#)?;
    fs::create_dir(world.path("conf.d"))?;
    fs::write(&file, target("root"))?;
    let daemon = world.daemon()?;
    still_guarded(&world)?;
    let bad = target("nobody") + "[dns]\n";
    fs::write(&file, &bad)?;
    let refused = world.enforcer(&["reload"])?.demand(2)?.stderr;
    ensure!(
        refused.contains("conf.d/more.toml:4: ") && refused.contains("enforcer.toml"),
        "{refused}"
    );
    still_guarded(&world)?;
    daemon.kill()?;
    let daemon = world.daemon()?;
    still_guarded(&world)?;
    ensure!(daemon.log().contains("conf.d/more.toml:4: "), "{}", daemon.log());
    // It is tried again once that file is another one.
    fs::write(&file, target("nobody"))?;
    until("the corrected file is taken", || {
        Ok(world.attack(NOBODY).run()?.errno.is_none() && world.status()?["state"] == "enforcing")
    })?;
    world.attack(0).is_refused()?;
    fs::remove_file(&file)?;
    daemon.reload()?;
    world.attack(0).reaches()
}

/// At a first start nothing is active that could stay: what is right is enforced (F8), until the rest is, too.
fn f8_at_a_first_start_a_mistake_in_one_file_costs_that_file() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let file = world.path("conf.d/more.toml");
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    fs::create_dir(world.path("conf.d"))?;
    let more = |allow: &str| format!("[target.more]\nendpoints = [\"tcp://10.0.0.1:1\"]\nallow = {allow}\n");
    fs::write(
        world.path("conf.d/right.toml"),
        more("[\"root\"]").replace("more", "right"),
    )?;
    fs::write(&file, more("5"))?;
    world.attack(NOBODY).reaches()?;
    // Whoever waits for the end is told no; whoever stays enforces what it can.
    world.enforcer(&["apply"])?.demand(2)?;
    world.attack(NOBODY).reaches()?;
    let daemon = world.daemon()?;
    still_guarded(&world)?;
    let targets = |status: &Value| status["targets"].as_array().map_or(0, Vec::len);
    let status = world.status()?;
    let cause = status["causes"][0].as_str().unwrap_or_default();
    ensure!(
        status["state"] == "degraded" && targets(&status) == 2 && cause.contains("conf.d/more.toml:3: "),
        "{status}"
    );
    // A monitor that asks for what is not protected hears of it.
    world.enforcer(&["status", "--exit-on", "critical"])?.demand(1)?;
    ensure!(
        cause.contains("only the files that were right at the start are enforced"),
        "{status}"
    );
    // So it is after a crash.
    daemon.kill()?;
    let daemon = world.daemon()?;
    still_guarded(&world)?;
    fs::write(&file, more("[\"root\"]"))?;
    until("the corrected file is taken", || {
        let status = world.status()?;
        Ok(status["state"] == "enforcing" && targets(&status) == 3)
    })?;
    drop(daemon);
    // The configuration file itself says where all is: without it nothing is begun.
    world.enforcer(&["unload", "--yes"])?.demand(0)?;
    fs::remove_dir_all(world.path("state"))?;
    let main = fs::read_to_string(world.path("enforcer.toml"))?;
    fs::write(world.path("enforcer.toml"), main + "alow = []\n")?;
    let ended = world.enforcer(&["run"])?.demand(2)?;
    ensure!(ended.stderr.contains("`alow`"), "{ended:?}");
    world.attack(NOBODY).reaches()
}

/// Who can write the file, or put another one in its place, would say who may connect.
fn f6_a_configuration_that_others_can_write_is_rejected() -> Result<()> {
    let (world, _listener) = guarded()?;
    let (file, daemon) = (world.path("enforcer.toml"), world.daemon()?);
    let right = fs::read_to_string(&file)?;
    let theirs = right.replace("[\"root\"]", "[\"root\", \"nobody\"]");
    ensure!(theirs != right, "{right}");
    let mode = |path: &std::path::Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    // Root's own word counts.
    fs::write(&file, &theirs)?;
    daemon.reload()?;
    world.attack(NOBODY).reaches()?;
    fs::write(&file, &right)?;
    daemon.reload()?;
    world.attack(NOBODY).is_refused()?;
    let dir = world.path("");
    for (path, owner, wrong, right_mode) in [
        (&file, 0, 0o666, 0o644),
        (&file, NOBODY, 0o644, 0o644),
        (&dir, 0, 0o777, 0o755),
    ] {
        chown(path, Some(owner), None)?;
        mode(path, wrong)?;
        let named = &format!("is owned by uid {owner} with mode {wrong:04o}");
        fs::write(&file, &theirs)?;
        let refused = world.enforcer(&["reload"])?.demand(2)?.stderr;
        ensure!(refused.contains(named) && refused.contains("chown root"), "{refused}");
        let checked = world.enforcer(&["config", "check"])?.demand(1)?.stdout;
        ensure!(checked.contains(named) && checked.contains("rejects"), "{checked}");
        let doctor = world.enforcer(&["doctor"])?.stdout;
        ensure!(doctor.contains("chown root"), "{doctor}");
        world.attack(NOBODY).is_refused()?;
        fs::write(&file, &right)?;
        chown(path, Some(0), None)?;
        mode(path, right_mode)?;
        world.enforcer(&["reload"])?.demand(0)?;
    }
    // Nor does a start believe it, the last known good rules known or not.
    mode(&file, 0o666)?;
    fs::write(&file, &theirs)?;
    daemon.kill()?;
    let daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    daemon.kill()?;
    // Nor is a directory moved aside on its word.
    let home = world.path("home");
    fs::create_dir(&home)?;
    fs::write(home.join("diary"), "")?;
    chown(&home, Some(NOBODY), None)?;
    fs::write(
        &file,
        theirs.replace(&world.path("state").display().to_string(), &home.display().to_string()),
    )?;
    for word in ["run", "apply"] {
        let ended = world.enforcer(&[word])?.demand(2)?;
        ensure!(ended.stderr.contains("with mode 0666"), "{ended:?}");
    }
    world.enforcer(&["apply", "--last-good"])?;
    ensure!(
        home.join("diary").exists(),
        "{:?}",
        fs::read_dir(world.path(""))?.collect::<Vec<_>>()
    );
    world.attack(NOBODY).is_refused()?;
    // At a first start nothing is known that could be enforced instead.
    fs::write(&file, &theirs)?;
    world.enforcer(&["unload", "--yes"])?.demand(0)?;
    fs::remove_dir_all(world.path("state"))?;
    let ended = world.enforcer(&["run"])?.demand(2)?;
    ensure!(ended.stderr.contains("with mode 0666"), "{ended:?}");
    world.enforcer(&["apply"])?.demand(2)?;
    // Named from where it lies it is the same file.
    let mut apply = Command::new(binary("enforcer")?);
    apply
        .current_dir(world.path(""))
        .args(["--config", "enforcer.toml", "apply"]);
    ran(&mut apply)?.demand(2)?;
    mode(&file, 0o644)?;
    fs::write(&file, &right)?;
    ran(&mut apply)?.demand(0)?;
    world.attack(NOBODY).is_refused()
}

fn f4_attach_cgroup_missing() -> Result<()> {
    let (world, _listener) = guarded()?;
    let main = "[target.main]\nendpoints = [\"tcp://10.0.0.1:1\"]\nallow = [\"root\"]\n";
    world.configure_on(&PathBuf::from("/sys/fs/cgroup/no-such-group"), main)?;
    expect(&world, &["/sys/fs/cgroup/no-such-group", "cgroup"])?;
    world.configure_on(&std::env::temp_dir(), main)?;
    expect(&world, &["cgroup v2"])?;
    good(&world)?;
    still_guarded(&world)
}

fn f4_pin_dir_not_on_a_bpffs() -> Result<()> {
    let (world, _listener) = guarded()?;
    let toml = fs::read_to_string(world.path("enforcer.toml"))?;
    let elsewhere = world.path("pins");
    fs::write(
        world.path("enforcer.toml"),
        toml.replace(&world.pins().display().to_string(), &elsewhere.display().to_string()),
    )?;
    expect(&world, &["bpffs", "pins"])?;
    good(&world)?;
    still_guarded(&world)
}

fn f4_no_permission() -> Result<()> {
    let (world, _listener) = guarded()?;
    for action in ["apply", "run", "unload", "status"] {
        let ran = ran(world.enforcer_as(NOBODY)?.arg(action))?.demand(2)?;
        ensure!(
            ran.stderr.trim_end().lines().count() == 1
                && (ran.stderr.contains("ermission denied") || ran.stderr.contains("run as root")),
            "{action}: {}",
            ran.stderr
        );
    }
    // Who may look at the pins, and not at nftables, is told so instead of that nothing is active.
    let unload = Backend::current().is_nftables().then_some("unload");
    for action in ["status", "verify"].into_iter().chain(unload) {
        let mut command = Command::new("setpriv");
        command.arg("--bounding-set=-net_admin").arg(binary("enforcer")?);
        command.arg("--config").arg(world.path("enforcer.toml"));
        let ran = ran(command.arg(action))?.demand(2)?;
        ensure!(ran.stderr.contains("run as root"), "{action}: {}", ran.stderr);
    }
    still_guarded(&world)
}

fn f5_another_program_forbids_sharing() -> Result<()> {
    let world = World::new()?;
    let _guard = ForeignProgram::passing(&world.cgroup, Sharing::None).context("attach another program")?;
    good(&world)?;
    let ran = world.enforcer(&["apply"])?.demand(2)?;
    ensure!(
        ran.stderr.contains("sharing") && ran.stderr.contains("connect4"),
        "{}",
        ran.stderr
    );
    ensure!(!world.pins().join("connect4").exists(), "a link was left");
    Ok(())
}

fn f6_pin_dir_of_somebody_else() -> Result<()> {
    let world = World::new()?;
    good(&world)?;
    world.apply()?;
    world.enforcer(&["unload"])?.demand(0)?;
    // Of another user's it is when root has changed its owner: what another user made is replaced.
    for (mode, owner) in [(0o777, None), (0o700, Some(NOBODY))] {
        fs::create_dir(world.pins())?;
        fs::create_dir(world.pins().join("maps"))?;
        fs::set_permissions(world.pins(), fs::Permissions::from_mode(mode))?;
        std::os::unix::fs::chown(world.pins(), owner, owner)?;
        expect(&world, &["0700", &world.pins().display().to_string()])?;
        fs::remove_dir_all(world.pins())?;
    }
    Ok(())
}

fn f4_pins_in_use() -> Result<()> {
    let (world, _listener) = guarded()?;
    let _daemon = world.daemon()?;
    expect(&world, &["in use"])?;
    let second = world.enforcer(&["run"])?.demand(2)?;
    ensure!(second.stderr.contains("in use"), "{}", second.stderr);
    still_guarded(&world)
}
