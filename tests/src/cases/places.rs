//! Where an instance is: places that a configuration gives up, that are none, or that another one has.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;

use super::Case;
use crate::{
    backend::EBPF,
    world::{NOBODY, World, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(doctor_finds_rules_that_earlier_places_have_kept).on(EBPF),
        case!(f6_a_users_file_system_for_our_state_is_named_with_a_remedy).on(EBPF),
        case!(check_says_which_datagrams_are_not_evaluated).on(EBPF),
        case!(config_check_tries_the_places_that_a_start_would_use).on(EBPF),
    ]
}

/// A pin directory besides the world's own; gone with it.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn finding(world: &World, id: &str) -> Result<Option<Value>> {
    let report: Value = serde_json::from_str(&world.enforcer(&["doctor", "--json"])?.stdout)?;
    let mut findings = report["findings"].as_array().context("no findings")?.iter();
    Ok(findings.find(|finding| finding["id"] == id).cloned())
}

fn edit(world: &World, from: &str, to: &str) -> Result<()> {
    let file = world.path("enforcer.toml");
    let text = fs::read_to_string(&file)?;
    ensure!(text.contains(from), "no {from} in {text}");
    Ok(fs::write(&file, text.replace(from, to))?)
}

fn doctor_finds_rules_that_earlier_places_have_kept() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    let misses = |ids: &[&str]| {
        ids.iter().try_for_each(|id| {
            let found = finding(&world, id)?;
            ensure!(found.is_none(), "{found:?}");
            Ok(())
        })
    };
    let daemon = world.daemon()?;
    misses(&["other-instance"])?;
    daemon.kill()?;
    // Nothing at the new places says where the old ones are, whose rules go on to deny.
    let old = world.pins().display().to_string();
    let new = Pins(format!("{old}_new").into());
    edit(
        &world,
        &format!("{old:?}"),
        &format!("{:?}", new.0.display().to_string()),
    )?;
    edit(&world, "/state\"", "/new_state\"")?;
    edit(&world, r#"["root"]"#, r#"["root", "nobody"]"#)?;
    let daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    misses(&["program-before", "program-after", "restart-needed"])?;
    let found = finding(&world, "other-instance")?.context("it finds nothing")?;
    let remedy = format!("rm -r {old}");
    ensure!(
        found["items"].to_string().contains(&format!("pins in {old}: connect4"))
            && found["do"].to_string().contains(&remedy),
        "{found}"
    );
    // Beside it, with a daemon of its own, another instance is nothing to be removed.
    let other = World::new()?;
    other.configure_on(
        &world.cgroup,
        &format!(
            "[target.other]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\n",
            other.here()
        ),
    )?;
    let others = other.daemon()?;
    let found = finding(&world, "other-instance")?.context("it finds nothing")?;
    let pins = other.pins().display().to_string();
    ensure!(!found.to_string().contains(&pins), "{found}");
    others.kill()?;
    let found = finding(&world, "other-instance")?.context("it finds nothing")?;
    ensure!(found.to_string().contains(&pins), "{found}");
    other.enforcer(&["unload"])?.demand(0)?;
    // As it says.
    fs::remove_dir_all(&old)?;
    world.attack(NOBODY).reaches()?;
    misses(&["other-instance"])?;
    daemon.kill()
}

fn config_check_tries_the_places_that_a_start_would_use() -> Result<()> {
    let world = World::new()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    world.enforcer(&["config", "check"])?.demand(0)?;
    let file = world.path("enforcer.toml");
    let good = fs::read_to_string(&file)?;
    let path = |name: &str| world.path(name).display().to_string();
    for (key, value, cause, remedy) in [
        (
            "cgroup",
            path("run"),
            "not a cgroup v2 directory",
            "name a directory of the cgroup v2 hierarchy",
        ),
        ("pin_dir", path("pins"), "is not on a bpffs", "mount one there"),
        (
            "socket",
            path("no/such/control.sock"),
            "No such file",
            "make the directory that it is to lie in",
        ),
        (
            "socket",
            path("enforcer.toml/control.sock"),
            "ot a directory",
            "or name another socket",
        ),
        (
            "state_dir",
            path("enforcer.toml/state"),
            "ot a directory",
            "set another state_dir",
        ),
    ] {
        fs::create_dir_all(world.path("run"))?;
        let wrong = |line: &str| line.starts_with(key);
        let number = 1 + good.lines().position(wrong).with_context(|| format!("no {key}"))?;
        let line = |line: &str| {
            if wrong(line) {
                format!("{key} = {value:?}\n")
            } else {
                format!("{line}\n")
            }
        };
        fs::write(&file, good.lines().map(line).collect::<String>())?;
        let said = world.enforcer(&["config", "check"])?.demand(1)?.stdout;
        let place = format!("enforcer.toml:{number}: {key} cannot be used: ");
        ensure!(
            [place.as_str(), cause, remedy].iter().all(|part| said.contains(part)),
            "{key}: {said}"
        );
        let offline = world.enforcer(&["config", "check", "--offline"])?.demand(0)?.stdout;
        ensure!(
            !offline.contains(&place) && offline.contains("whether a start can use cgroup"),
            "{offline}"
        );
        // As a start finds it; without saved rules it goes on.
        if key != "state_dir" {
            let start = world.enforcer(&["run"])?.demand(2)?;
            ensure!(start.stderr.contains(cause), "{key}: {start:?}");
        }
        if key == "pin_dir" {
            let text = fs::read_to_string(&file)?.replace("backend = \"ebpf\"", "backend = \"nftables\"");
            fs::write(&file, text)?;
            world.enforcer(&["config", "check"])?.demand(0)?;
        }
    }
    Ok(())
}

/// Unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn of(uid: u32, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let options = format!("uid={uid},size=1m");
        mount(
            Some("tmpfs"),
            dir,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )?;
        Ok(Self(dir.into()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// It cannot be moved aside as a directory can.
fn f6_a_users_file_system_for_our_state_is_named_with_a_remedy() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    let state = world.path("state");
    let _disk = Disk::of(NOBODY, &state)?;
    let named = format!("belongs to user {NOBODY}, and cannot be moved aside; give it to root (chown root ");
    let checked = world.enforcer(&["config", "check"])?.demand(1)?.stdout;
    ensure!(
        checked.contains("state_dir cannot be used") && checked.contains(&named),
        "{checked}"
    );
    // It enforces all the same, and says what is not kept.
    let daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    let status = world.status()?.to_string();
    ensure!(status.contains("saved-rules") && status.contains(&named), "{status}");
    // As it says.
    chown(&state, Some(0), Some(0))?;
    fs::set_permissions(&state, fs::Permissions::from_mode(0o700))?;
    world.enforcer(&["config", "check"])?.demand(0)?;
    until("the rules are saved", || Ok(state.join("last-good.json").exists()))?;
    daemon.kill()
}

/// With and without `connect`, on the way of each a program of its own.
fn check_says_which_datagrams_are_not_evaluated() -> Result<()> {
    let world = World::new()?;
    world.configure_one(&[format!("udp://{}", world.here())], r#"["root"]"#)?;
    world.apply()?;
    let to = format!("udp://{}", world.here());
    let said = || -> Result<String> { Ok(world.enforcer(&["check", "nobody", &to])?.stdout) };
    ensure!(said()?.starts_with("deny "), "{}", said()?);
    let number = if world.here().is_ipv4() { 4 } else { 6 };
    fs::remove_file(world.pins().join(format!("sendmsg{number}")))?;
    let part = format!("a datagram sent without connect is not evaluated, as eBPF program sendmsg{number}");
    ensure!(said()?.contains(&part), "{}", said()?);
    fs::remove_file(world.pins().join(format!("connect{number}")))?;
    let whole = format!("nothing is evaluated, as eBPF program connect{number}");
    ensure!(said()?.contains(&whole), "{}", said()?);
    Ok(())
}
