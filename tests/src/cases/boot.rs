//! F4, N7: a start makes the last known good rule set active first, whatever has become of configuration, DNS and the
//! file.

use std::fs;

use anyhow::{Result, ensure};

use super::{
    Case,
    names::{Named, addresses},
};
use crate::{
    backend::{Backend, EBPF},
    dns::Zone,
    kernel::CGROUP_NEEDS,
    world::{Daemon, Listener, NOBODY, World, ran, until},
};

pub(super) const FILE: &str = "last-good.json";

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f4_a_bad_configuration_at_boot_leaves_the_last_good),
        case!(f4_without_a_last_good_a_bad_configuration_is_the_end),
        case!(f4_a_cgroup_missing_at_boot_keeps_nobody_from_starting).needs(CGROUP_NEEDS),
        // In another network namespace, where a table would not guard ours.
        case!(f4_n7_apply_last_good_needs_nothing_else).on(EBPF),
        case!(f4_a_power_cut_of_any_length_is_told),
        case!(f4_a_start_at_other_places_leaves_nothing_at_the_old),
        case!(f4_a_last_good_of_another_version_is_kept_and_told),
        case!(f1_f4_a_newer_rule_set_is_not_replaced_by_the_last_good),
        case!(f2_what_enforced_at_other_places_goes),
        case!(f1_a_restart_without_the_last_good_forgets_no_address),
        case!(f4_names_are_followed_after_a_restart_with_a_bad_configuration),
        case!(f4_a_state_directory_in_quotes_is_found),
        case!(f4_a_last_good_that_is_removed_comes_back),
        case!(b1_f4_a_default_file_that_has_gone_is_not_the_defaults).on(EBPF),
    ]
}

/// A world whose rules a daemon has had active, then everything of ours left the kernel, as by a reboot.
fn rebooted(allow: &str) -> Result<(World, Listener)> {
    let world = World::new()?;
    let listener = world.listen()?;
    world.configure_one(&[format!("tcp://{}", world.here())], allow)?;
    let daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    unload(&world, daemon)?;
    world.attack(NOBODY).reaches()?;
    Ok((world, listener))
}

fn unload(world: &World, daemon: Daemon) -> Result<()> {
    world.enforcer(&["unload"])?.demand(0)?;
    drop(daemon);
    Ok(())
}

pub(super) fn guarded(world: &World) -> Result<()> {
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()
}

/// Demands a cause in the status.
fn told(world: &World, says: &str) -> Result<()> {
    let status = asked(world)?;
    ensure!(
        status.contains("degraded") && status.contains(says),
        "{says:?}: {status}"
    );
    Ok(())
}

/// Asked of the daemon itself: the configuration that tells the command where it is may be broken.
pub(super) fn asked(world: &World) -> Result<String> {
    crate::world::ask_raw(&world.path("run/control.sock"), b"{\"request\":\"status\"}\n")
}

fn f4_a_bad_configuration_at_boot_leaves_the_last_good() -> Result<()> {
    for by_signal in [false, true] {
        let (world, _listener) = rebooted(r#"["root"]"#)?;
        let toml = world.path("enforcer.toml");
        let good = fs::read_to_string(&toml)?;
        for bad in [
            "bogus = 1\n",
            "[target.x\n",
            "[target.x]\nendpoints = []\nallow = [-1]\n",
        ] {
            fs::write(&toml, format!("{good}{bad}"))?;
            let daemon = world.daemon()?;
            guarded(&world)?;
            told(&world, "the last known good rules are active instead")?;
            unload_raw(&world, daemon)?;
            world.attack(NOBODY).reaches()?;
        }
        fs::remove_file(&toml)?;
        fs::write(&toml, format!("{good}bogus = 1\n"))?;
        let daemon = world.daemon()?;
        guarded(&world)?;
        fs::write(&toml, &good)?;
        if by_signal {
            daemon.signal(nix::sys::signal::Signal::SIGHUP)?;
        }
        until("the configuration is taken", || {
            Ok(asked(&world)?.contains("\"enforcing\""))
        })?;
        guarded(&world)?;
        ensure!(daemon.log().matches("bogus").count() == 1, "{}", daemon.log());
    }
    Ok(())
}

/// By the socket alone.
fn unload_raw(world: &World, daemon: Daemon) -> Result<()> {
    let answer = crate::world::ask_raw(&world.path("run/control.sock"), b"{\"request\":\"unload\"}\n")?;
    ensure!(answer.contains("done"), "{answer}");
    drop(daemon);
    Ok(())
}

fn f4_without_a_last_good_a_bad_configuration_is_the_end() -> Result<()> {
    let world = World::new()?;
    world.configure("bogus = 1\n")?;
    let ended = world.enforcer(&["run"])?.demand(2)?;
    ensure!(
        ended.stderr.contains("bogus") && ended.stderr.trim_end().lines().count() == 1,
        "{ended:?}"
    );
    Ok(())
}

fn f4_a_cgroup_missing_at_boot_keeps_nobody_from_starting() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let child = world.cgroup.join("child");
    fs::create_dir(&child)?;
    let path = format!("/{}/child", world.name());
    world.configure_one(
        &[format!("tcp://{}", world.here())],
        &format!("[\"root\", {{ user = {NOBODY}, cgroup = {path:?} }}]"),
    )?;
    let within = || world.attack(NOBODY).in_cgroup(&child);
    let daemon = world.daemon()?;
    within().reaches()?;
    guarded(&world)?;
    unload(&world, daemon)?;
    fs::remove_dir(&child)?;
    let daemon = world.daemon()?;
    guarded(&world)?;
    told(&world, &path)?;
    fs::create_dir(&child)?;
    until("the configuration is taken", || {
        Ok(asked(&world)?.contains("\"enforcing\""))
    })
    .map_err(|error| error.context(daemon.log()))?;
    within().reaches()?;
    guarded(&world)
}

fn f4_n7_apply_last_good_needs_nothing_else() -> Result<()> {
    let fresh = World::new()?;
    fresh.configure("")?;
    let none = fresh.enforcer(&["apply", "--last-good"])?.demand(0)?;
    ensure!(none.stdout.contains("no rules are saved"), "{none:?}");

    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    let daemon = named.daemon()?;
    let world = &named.world;
    ensure!(named.denied("10.9.0.1")?, "the address is open");
    unload(world, daemon)?;
    named.dns.set("bus.test", Zone::Silence);
    let toml = world.path("enforcer.toml");
    let good = fs::read_to_string(&toml)?;
    fs::write(&toml, format!("{good}\n[[[ bogus"))?;
    // No network either.
    let mut command = std::process::Command::new("unshare");
    command.arg("--net").arg(crate::world::binary("enforcer")?);
    command.arg("--config").arg(&toml);
    let applied = ran(command.args(["apply", "--last-good"]))?.demand(0)?;
    ensure!(applied.stdout.contains("enforcing"), "{applied:?}");
    fs::write(&toml, &good)?;
    ensure!(named.denied("10.9.0.1")?, "the address is open");
    // What is active stays.
    let again = world.enforcer(&["apply", "--last-good"])?.demand(0)?;
    ensure!(again.stdout.contains("generation 1,"), "{again:?}");
    world.enforcer(&["unload"])?.demand(0)?;
    let path = world.path("state").join(FILE);
    let text = fs::read_to_string(&path)?;
    fs::write(&path, text.replace("10.9.0.1", "10.9.0.2"))?;
    let damaged = world.enforcer(&["apply", "--last-good"])?.demand(2)?;
    ensure!(
        damaged.stderr.contains("damaged") && damaged.stderr.contains(FILE),
        "{damaged:?}"
    );
    ensure!(!named.denied("10.9.0.2")?, "a damaged file was believed");
    Ok(())
}

fn f4_a_power_cut_of_any_length_is_told() -> Result<()> {
    let (world, _listener) = rebooted(r#"["root"]"#)?;
    let path = world.path("state").join(FILE);
    let whole = fs::read(&path)?;
    // Every length is tried by the unit tests; here what a real start makes of some.
    let lengths = (0..whole.len()).step_by(whole.len() / 12).chain([whole.len() - 1]);
    let mut starts = 0;
    for length in lengths {
        fs::write(&path, whole.get(..length).unwrap_or_default())?;
        let refused = world.enforcer(&["apply", "--last-good"])?.demand(2)?;
        ensure!(refused.stderr.contains("damaged"), "{length}: {refused:?}");
        let daemon = world.daemon()?;
        guarded(&world)?;
        ensure!(daemon.log().contains("damaged"), "{length}: {}", daemon.log());
        // Something good is active: it has replaced what was damaged.
        until("it is kept again", || Ok(fs::read(&path)? == whole))?;
        until("all is well", || Ok(asked(&world)?.contains("\"enforcing\"")))?;
        unload(&world, daemon)?;
        starts += 1;
    }
    println!("    {starts} starts with a file of {} bytes cut short", whole.len());
    // With the configuration gone as well there is nothing: that is said, and the file is left as it is.
    let cut = whole.get(..whole.len() / 2).unwrap_or_default();
    fs::write(&path, cut)?;
    let toml = fs::read_to_string(world.path("enforcer.toml"))?;
    fs::write(world.path("enforcer.toml"), format!("{toml}bogus = 1\n"))?;
    world.enforcer(&["run"])?.demand(2)?;
    ensure!(fs::read(&path)? == cut, "a damaged file was replaced by nothing");
    // A file that was being written when the power went is none.
    fs::write(&path, &whole)?;
    fs::write(world.path("state").join(format!("{FILE}.new")), cut)?;
    let _daemon = world.daemon()?;
    guarded(&world)
}

/// The configuration with both places, pins and table, named after something else.
fn placed(world: &World, toml: &str, name: &str) -> String {
    let (pins, table) = (world.pins().display().to_string(), world.name());
    let elsewhere = world.pins().with_file_name(name).display().to_string();
    toml.replace(&format!("pin_dir = {pins:?}"), &format!("pin_dir = {elsewhere:?}"))
        .replace(&format!("nft_table = {table:?}"), &format!("nft_table = {name:?}"))
}

fn nothing_at(world: &World, name: &str) -> Result<()> {
    let pins = world.pins().with_file_name(name);
    let tables = ran(std::process::Command::new("nft").args(["list", "tables"]))?.demand(0)?;
    let table = format!("table inet {name}");
    ensure!(
        !pins.exists() && !tables.stdout.lines().any(|line| line == table),
        "rules were left at {name}: {}",
        tables.stdout
    );
    Ok(())
}

fn f4_a_start_at_other_places_leaves_nothing_at_the_old() -> Result<()> {
    let (world, _listener) = rebooted(r#"["root"]"#)?;
    let toml = fs::read_to_string(world.path("enforcer.toml"))?;
    let other = format!("{}_b", world.name());
    fs::write(world.path("enforcer.toml"), placed(&world, &toml, &other))?;
    let daemon = world.daemon()?;
    guarded(&world)?;
    nothing_at(&world, world.name())?;
    unload(&world, daemon)?;
    // A place that cannot be: the last good stays.
    let (bad, says) = if Backend::current().is_nftables() {
        ran(std::process::Command::new("nft").args(["add", "table", "inet", world.name()]))?.demand(0)?;
        (toml, "was not made by enforcer")
    } else {
        let pins = |path: std::path::PathBuf| format!("pin_dir = {:?}", path.display().to_string());
        (toml.replace(&pins(world.pins()), &pins(world.path("pins"))), "bpffs")
    };
    fs::write(world.path("enforcer.toml"), bad)?;
    let daemon = world.daemon()?;
    guarded(&world)?;
    told(&world, says)?;
    unload_raw(&world, daemon)
}

/// What is active was never kept: the disk was full, or the end came in between.
fn f1_f4_a_newer_rule_set_is_not_replaced_by_the_last_good() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let elsewhere = std::net::SocketAddr::new([127, 201, 0, 1].into(), world.port);
    let elsewhere_guarded = || world.attack(NOBODY).to(elsewhere).is_refused();
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    let daemon = world.daemon()?;
    world.attack(NOBODY).to(elsewhere).reaches()?;
    let kept = world.path("state").join(FILE);
    let older = fs::read(&kept)?;
    let both = [format!("tcp://{}", world.here()), format!("tcp://{elsewhere}")];
    world.configure_one(&both, r#"["root"]"#)?;
    daemon.reload()?;
    ensure!(fs::read(&kept)? != older, "a reload is told before it is kept");
    elsewhere_guarded()?;
    daemon.kill()?;
    fs::write(&kept, &older)?;
    let toml = world.path("enforcer.toml");
    let good = fs::read_to_string(&toml)?;
    fs::write(&toml, format!("{good}\nbroken = ["))?;
    let daemon = world.daemon()?;
    guarded(&world)?;
    elsewhere_guarded()?;
    told(&world, "the rules that were active before the start stay")?;
    // Nothing makes the older one active later.
    std::thread::sleep(std::time::Duration::from_millis(2500));
    elsewhere_guarded()?;
    fs::write(&toml, &good)?;
    daemon.reload()?;
    elsewhere_guarded()?;
    let status = world.status()?;
    ensure!(status["state"] == "enforcing", "{status}");
    Ok(())
}

fn f2_what_enforced_at_other_places_goes() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let mut old = world.name().to_owned();
    for by_apply in [false, true] {
        world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
        let toml = fs::read_to_string(world.path("enforcer.toml"))?;
        fs::write(world.path("enforcer.toml"), placed(&world, &toml, &old))?;
        world.daemon()?.kill()?;
        world.attack(NOBODY).is_refused()?;
        let new = format!("{}_{by_apply}", world.name());
        let allowing = placed(&world, &toml, &new).replace(r#"["root"]"#, &format!(r#"["root", {NOBODY}]"#));
        fs::write(world.path("enforcer.toml"), allowing)?;
        if by_apply {
            world.apply()?;
        } else {
            world.daemon()?.kill()?;
        }
        nothing_at(&world, &old)?;
        world.attack(NOBODY).reaches()?;
        old = new;
    }
    world.enforcer(&["unload"])?.demand(0).map(drop)
}

fn f4_a_last_good_of_another_version_is_kept_and_told() -> Result<()> {
    let (world, _listener) = rebooted(r#"["root"]"#)?;
    let path = world.path("state").join(FILE);
    let newer = fs::read_to_string(&path)?.replace("last-good/1", "last-good/7");
    fs::write(&path, &newer)?;
    let refused = world.enforcer(&["apply", "--last-good"])?.demand(2)?;
    ensure!(refused.stderr.contains("enforcer/last-good/7"), "{refused:?}");
    world.attack(NOBODY).reaches()?;
    ensure!(fs::read_to_string(&path)? == newer, "it was replaced by nothing");
    let daemon = world.daemon()?;
    guarded(&world)?;
    ensure!(daemon.log().contains("last-good/7"), "{}", daemon.log());
    Ok(())
}

/// The kernel guards an address that nothing on disk and no lookup knows any more.
fn f1_a_restart_without_the_last_good_forgets_no_address() -> Result<()> {
    let harms: [fn(&str) -> Option<String>; 2] = [|_| None, |text| Some(text.replace("10.9.0.1", "10.9.0.3"))];
    for harm in harms {
        let named = Named::new(&["bus.test"], "")?;
        let world = &named.world;
        ensure!(!named.denied("10.9.0.1")?, "it is guarded before there is anything");
        named.dns.set("bus.test", addresses(&["10.9.0.1"]));
        let daemon = named.daemon()?;
        ensure!(named.denied("10.9.0.1")?, "the address is open");
        daemon.kill()?;
        let path = world.path("state").join(FILE);
        match harm(&fs::read_to_string(&path)?) {
            Some(text) => fs::write(&path, text)?,
            None => fs::remove_file(&path)?,
        }
        named.dns.set("bus.test", Zone::Silence);
        let _daemon = named.daemon()?;
        ensure!(named.denied("10.9.0.1")?, "a restart opened the address");
        told(world, "the active rules stay")?;
        named.dns.set("bus.test", addresses(&["10.9.0.2"]));
        world.enforcer(&["refresh"])?;
        until("the answer is active", || named.denied("10.9.0.2"))?;
        until("all is well", || Ok(asked(world)?.contains("\"enforcing\"")))?;
        until("it is kept", || Ok(path.exists()))?;
    }
    Ok(())
}

/// The active rule set is the last one known good: it goes on from there.
fn f4_names_are_followed_after_a_restart_with_a_bad_configuration() -> Result<()> {
    for by_early_unit in [false, true] {
        followed_after(by_early_unit)?;
    }
    Ok(())
}

/// What is active at the start is the last daemon's, or what a boot has loaded.
fn followed_after(by_early_unit: bool) -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    let world = &named.world;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    named.daemon()?.kill()?;
    if by_early_unit {
        world.enforcer(&["unload"])?.demand(0)?;
        world.enforcer(&["apply", "--last-good"])?.demand(0)?;
    }
    let toml = world.path("enforcer.toml");
    let good = fs::read_to_string(&toml)?;
    fs::write(&toml, format!("{good}bogus = 1\n"))?;
    let readable = world.path("good.toml");
    fs::write(&readable, &good)?;
    let denied = |address: &str| -> Result<bool> {
        let mut check = std::process::Command::new(crate::world::binary("enforcer")?);
        check.arg("--config").arg(&readable).args(["check", "nobody"]);
        Ok(ran(check.arg(format!("{address}:{}", world.port)))?.code == 1)
    };
    named.dns.set("bus.test", addresses(&["10.9.0.2"]));
    ensure!(
        denied("10.9.0.1")? && !denied("10.9.0.2")?,
        "what is active is not what it was"
    );
    let _daemon = if by_early_unit {
        world.daemon_with(&mut world.with_resolver_confined()?)?
    } else {
        named.daemon()?
    };
    told(world, "the last known good rules are active instead")?;
    until("the name is followed", || denied("10.9.0.2"))?;
    ensure!(denied("10.9.0.1")?, "the address before is open");
    Ok(())
}

/// TOML lets a key stand in quotes; the state is this instance's all the same.
fn f4_a_state_directory_in_quotes_is_found() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    let toml = world.path("enforcer.toml");
    let text = fs::read_to_string(&toml)?.replace("state_dir =", "\"state_dir\" =");
    fs::write(&toml, &text)?;
    world.enforcer(&["config", "check"])?.demand(0)?;
    let daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    unload(&world, daemon)?;
    world.attack(NOBODY).reaches()?;
    fs::write(&toml, format!("{text}bogus = 1\n"))?;
    let daemon = world.daemon()?;
    guarded(&world)?;
    told(&world, "the last known good rules are active instead")?;
    unload_raw(&world, daemon)
}

fn f4_a_last_good_that_is_removed_comes_back() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    let daemon = world.daemon()?;
    let path = world.path("state").join(FILE);
    fs::remove_file(&path)?;
    until("it is back", || Ok(path.exists()))?;
    unload(&world, daemon)?;
    world.attack(NOBODY).reaches()?;
    world.enforcer(&["apply", "--last-good"])?.demand(0)?;
    guarded(&world)
}

/// In namespaces where the default places are this case's own, and the first process sees them too: the file that named
/// what is active is removed, and the daemon starts again.
fn b1_f4_a_default_file_that_has_gone_is_not_the_defaults() -> Result<()> {
    const SCRIPT: &str = r#"
        echo $$ > "$1/cgroup.procs"
        exec unshare --cgroup --mount --net --pid --fork --kill-child --mount-proc sh -euc '
            daemon=none; trap "kill -9 \$daemon 2>/dev/null || true" EXIT
            ip link set lo up
            cgroups=$1 etc=$2 enforcer=$3 attack=$4
            umount "$cgroups" && mount -t cgroup2 none "$cgroups" && mount -t bpf -o mode=0700 none /sys/fs/bpf
            mount -t tmpfs -o mode=0755 none /var/lib && mount -t tmpfs -o mode=0755 none /run
            mkdir -p "$etc/enforcer" && cp /etc/passwd /etc/group /etc/nsswitch.conf "$etc" && mount --bind "$etc" /etc
            knock() { "$attack" --uid 65534 127.0.0.1:4001 || true; }
            start() { "$enforcer" run & daemon=$!; for _ in $(seq 200); do
                "$enforcer" status --json 2>/dev/null | grep -q "\"pid\":$daemon" && return; sleep 0.1; done; }
            toml=/etc/enforcer/enforcer.toml
            printf "[target.own]\nendpoints = [\"tcp://127.0.0.1:4001\"]\nallow = [\"root\"]\n" > "$toml"
            echo before; knock
            start; echo with; knock
            kill -9 "$daemon"; wait "$daemon" || true
            cp "$toml" "$etc/kept"; rm "$toml"
            start; echo gone; knock; "$enforcer" status || true
            sleep 3; echo later; knock
            cp "$etc/kept" "$toml"
            for _ in $(seq 200); do "$enforcer" status | grep -q "known good rules are active instead" || break; sleep 0.1; done
            echo again; "$enforcer" status || true; knock
            "$enforcer" unload; wait "$daemon" || true
        ' sh "$2" "$3" "$4" "$5"
    "#;
    let world = World::new()?;
    // The build's directory may be closed to others.
    let attack = world.path("attack");
    crate::world::copy_binary("attack", &attack)?;
    let mut command = std::process::Command::new("sh");
    command.args(["-c", SCRIPT, "sh"]);
    command.args([&world.cgroup, &crate::world::cgroup_mount()?, &world.path("etc")]);
    let said = ran(command.arg(crate::world::binary("enforcer")?).arg(&attack))?
        .demand(0)?
        .stdout;
    let errno = |after: &str| {
        let rest = said.split_once(&format!("{after}\n")).map_or("", |(_, rest)| rest);
        let words: Vec<&str> = rest.split_whitespace().take(2).collect();
        words.join(" ")
    };
    let with = errno("with");
    ensure!(errno("before") == "errno 111" && with == "errno 1", "{said}");
    for after in ["gone", "later"] {
        ensure!(errno(after) == with, "{after}: {said}");
    }
    ensure!(
        said.contains("degraded") && said.contains("is gone, but rules from it"),
        "{said}"
    );
    let again = said.split_once("again\n").map_or("", |(_, rest)| rest);
    // A namespace's root is not the host's (F9); nothing else is wrong.
    ensure!(
        again.matches("! ").count() == 1 && again.contains("only processes below") && again.contains(&with),
        "{said}"
    );
    Ok(())
}
