//! F8, N9: users and cgroups that do not exist yet, that come, change and go. The suite's machine has an `/etc` of its
//! own.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, ensure};

use super::Case;
use crate::{
    backend::Backend,
    kernel::{Feature, lacks},
    world::{Attack, Listener, NOBODY, World, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f8_what_exists_is_enforced_at_a_first_start),
        case!(n9_a_user_who_has_another_number_is_let_in_by_that_alone),
        case!(n9_a_group_is_its_members),
        case!(n9_after_a_boot_names_mean_whom_the_host_names_now),
        case!(f8_what_does_not_exist_is_named_by_config_check),
    ]
}

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
/// Cases run beside each other, and each writes the file whole.
static WRITING: Mutex<()> = Mutex::new(());

/// Makes a user, gives him another number, or with none removes him.
fn set_user(name: &str, uid: Option<u32>) -> Result<()> {
    set_line(PASSWD, name, uid.map(|uid| format!("x:{uid}:65534::/:bin/false")))
}

/// Makes a group with these members, or with nothing removes it.
fn set_group(name: &str, gid_and_members: Option<(u32, &[&str])>) -> Result<()> {
    let rest = gid_and_members.map(|(gid, members)| format!("x:{gid}:{}", members.join(",")));
    set_line(GROUP, name, rest)
}

fn set_line(file: &str, name: &str, rest: Option<String>) -> Result<()> {
    let _one = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let begin = format!("{name}:");
    let before = fs::read_to_string(file)?;
    let others = before.lines().filter(|line| !line.starts_with(&begin));
    let mut text = others.collect::<Vec<_>>().join("\n") + "\n";
    if let Some(rest) = rest {
        text += &format!("{begin}{rest}\n");
    }
    // As vipw does it: readers find the one or the other.
    let new = Path::new(file).with_extension("new");
    fs::write(&new, text)?;
    Ok(fs::rename(&new, file)?)
}

/// A user of this world's own, who is removed with it.
struct User(String);

impl User {
    fn new(world: &World) -> Self {
        Self(world.name().replace("enforcertest", "et"))
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = set_user(&self.0, None);
    }
}

fn denied(attack: &Attack) -> Result<()> {
    ensure!(attack.run()?.errno.is_some(), "{attack:?} is let through");
    Ok(())
}

fn lets_in(what: &str, attack: &Attack) -> Result<()> {
    until(what, || Ok(attack.run()?.errno.is_none()))
}

fn causes(world: &World) -> Result<String> {
    Ok(world.status()?["causes"].to_string())
}

/// A user, and where a backend can tell a cgroup's sockets a cgroup.
fn f8_what_exists_is_enforced_at_a_first_start() -> Result<()> {
    let world = World::new()?;
    let listener = world.listen()?;
    let second = Listener::start(None, world.port + 1, &[])?;
    let (user, job) = (User::new(&world), world.cgroup.join("job"));
    let mount = crate::world::cgroup_mount()?;
    let path = format!("/{}", job.strip_prefix(&mount)?.display());
    let other = format!("tcp://{}:{}", world.address(), world.port + 1);
    world.configure(&format!(
        "[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [{:?}, {{ user = {NOBODY}, cgroup = {path:?} }}]\n\
         [target.other]\nendpoints = [{other:?}]\nallow = [\"root\"]\n",
        world.here(),
        user.0
    ))?;
    let at_other = |uid| world.attack(uid).to(SocketAddr::new(world.address(), world.port + 1));
    for uid in [0, 61_001] {
        world.attack(uid).reaches()?;
    }
    at_other(NOBODY).reaches()?;
    let daemon = world.daemon()?;
    // Root is nobody who is allowed at main; the rest is as configured.
    for uid in [0, 61_001, NOBODY] {
        denied(&world.attack(uid))?;
    }
    denied(&at_other(NOBODY))?;
    at_other(0).reaches()?;
    let status = world.status()?;
    let said = causes(&world)?;
    ensure!(
        status["state"] == "degraded" && said.contains(&user.0) && said.contains(&path),
        "{status}"
    );
    set_user(&user.0, Some(61_001))?;
    lets_in("the user who exists now is let in", &world.attack(61_001))?;
    denied(&world.attack(0))?;
    ensure!(!causes(&world)?.contains(&user.0), "{}", causes(&world)?);
    ensure!(
        daemon.log().contains(&format!("user {:?} is now uid 61001", user.0)),
        "{}",
        daemon.log()
    );
    if Backend::current().is_nftables() && lacks(Feature::SocketCgroup) {
        return Ok(());
    }
    fs::create_dir(&job)?;
    lets_in(
        "the cgroup that exists now is let in",
        &world.attack(NOBODY).in_cgroup(&job),
    )?;
    denied(&world.attack(NOBODY))?;
    until("all is as configured", || Ok(world.status()?["state"] == "enforcing"))?;
    drop((listener, second));
    Ok(())
}

/// Removed and made again, as a package does: the old number is somebody else's then.
fn n9_a_user_who_has_another_number_is_let_in_by_that_alone() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let user = User::new(&world);
    set_user(&user.0, Some(61_101))?;
    world.configure_one(
        &[format!("tcp://{}", world.here())],
        &format!("[{:?}, \"root\"]", user.0),
    )?;
    let daemon = world.daemon()?;
    world.attack(61_101).reaches()?;
    denied(&world.attack(61_102))?;
    set_user(&user.0, Some(61_102))?;
    lets_in("the new number is let in", &world.attack(61_102))?;
    denied(&world.attack(61_101))?;
    world.attack(0).reaches()?;
    set_user(&user.0, None)?;
    until("nobody is let in by the name", || {
        Ok(world.attack(61_102).run()?.errno.is_some())
    })?;
    world.attack(0).reaches()?;
    until("that is a cause", || Ok(causes(&world)?.contains(&user.0)))?;
    // While no daemon ran.
    daemon.kill()?;
    set_user(&user.0, Some(61_103))?;
    let _daemon = world.daemon()?;
    world.attack(61_103).reaches()?;
    denied(&world.attack(61_102))
}

/// What a boot loads first was kept by number: the numbers may be others by then. With no configuration to look at.
fn n9_after_a_boot_names_mean_whom_the_host_names_now() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let [moved, gone, member] = ["m", "g", "x"].map(|name| User(format!("{}{name}", User::new(&world).0)));
    let group = Group(moved.0.clone() + "s");
    let all = [(&moved, 61_301), (&gone, 61_302), (&member, 61_303)];
    for (user, uid) in all {
        set_user(&user.0, Some(uid))?;
    }
    set_group(&group.0, Some((61_300, &[&member.0])))?;
    let allow = format!(
        "[{:?}, {:?}, {{ group = {:?} }}, 61304, \"root\"]",
        moved.0, gone.0, group.0
    );
    world.configure_one(&[format!("tcp://{}", world.here())], &allow)?;
    let daemon = world.daemon()?;
    for uid in [0, 61_301, 61_302, 61_303, 61_304] {
        world.attack(uid).reaches()?;
    }
    denied(&world.attack(61_311))?;
    world.enforcer(&["unload"])?.demand(0)?;
    drop(daemon);
    world.attack(61_311).reaches()?;
    let path = world.path("enforcer.toml");
    let config = fs::read_to_string(&path)?;
    let state = world.path("state/last-good.json");
    let kept = fs::read(&state)?;
    for by_apply in [true, false] {
        fs::write(&state, &kept)?;
        // The first is made again with another number; another user gets the second's; the group has another member.
        set_user(&moved.0, Some(61_311))?;
        set_user(&gone.0, None)?;
        let heir = User(gone.0.clone() + "h");
        set_user(&heir.0, Some(61_302))?;
        set_group(&group.0, Some((61_300, &[&moved.0])))?;
        let (daemon, log) = if by_apply {
            let said = world.enforcer(&["apply", "--last-good"])?.demand(0)?.stderr;
            (None, said)
        } else {
            // The last good rules stay, as the configuration means nothing.
            fs::write(&path, format!("{config}bogus = 1\n"))?;
            let daemon = world.daemon()?;
            let log = daemon.log();
            (Some(daemon), log)
        };
        for uid in [0, 61_311, 61_304] {
            world.attack(uid).reaches()?;
        }
        for uid in [61_301, 61_302, 61_303, NOBODY] {
            denied(&world.attack(uid))?;
        }
        let words = format!("user {:?} has a different UID than", moved.0);
        ensure!(log.contains(&words), "{log}");
        if by_apply {
            // The daemon that follows takes over what that boot has loaded, though it can take no configuration.
            fs::write(&path, format!("{config}bogus = 1\n"))?;
            let daemon = world.daemon()?;
            let said = crate::world::ask_raw(&world.path("run/control.sock"), b"{\"request\":\"status\"}\n")?;
            ensure!(
                said.contains("the last known good rules are active instead"),
                "{said} {}",
                daemon.log()
            );
            world.attack(61_311).reaches()?;
            denied(&world.attack(61_301))?;
        }
        fs::write(&path, &config)?;
        drop(daemon);
        world.enforcer(&["unload"])?.demand(0)?;
        drop(heir);
    }
    Ok(())
}

/// Listed in the group, or by primary group: whoever has only taken the group is none of them.
fn n9_a_group_is_its_members() -> Result<()> {
    const GID: u32 = 61_201;
    let world = World::new()?;
    let _listener = world.listen()?;
    let here = format!("tcp://{}", world.here());
    let [listed, primary] = ["a", "b"].map(|name| User(format!("{}{name}", User::new(&world).0)));
    let group = Group(listed.0.clone() + "g");
    set_user(&listed.0, Some(61_201))?;
    set_line(PASSWD, &primary.0, Some(format!("x:61202:{GID}::/:bin/false")))?;
    let allow = |principal: &str| world.configure_one(std::slice::from_ref(&here), &format!("[{principal}]"));
    allow(&format!("{{ group = {:?} }}", group.0))?;
    world.attack(61_201).reaches()?;
    let daemon = world.daemon()?;
    for uid in [0, 61_201, 61_202] {
        denied(&world.attack(uid))?;
    }
    ensure!(causes(&world)?.contains(&group.0), "{}", causes(&world)?);
    let checked = world.enforcer(&["config", "check"])?.demand(1)?.stdout;
    ensure!(checked.contains(&format!("no group \"{}\"", group.0)), "{checked}");
    set_group(&group.0, Some((GID, &[&listed.0, "nobody-of-that-name"])))?;
    for uid in [61_201, 61_202] {
        lets_in("a member is let in", &world.attack(uid))?;
    }
    for uid in [0, 61_203, NOBODY] {
        denied(&world.attack(uid))?;
    }
    ensure!(world.status()?["state"] == "enforcing", "{}", world.status()?);
    set_group(&group.0, Some((GID, &[])))?;
    until("who has left is refused", || {
        Ok(world.attack(61_201).run()?.errno.is_some())
    })?;
    world.attack(61_202).reaches()?;
    let line = format!("group {:?} is now uid 61202", group.0);
    ensure!(daemon.log().contains(&line), "{}", daemon.log());
    allow(&format!("{{ group = {GID} }}"))?;
    daemon.reload()?;
    world.attack(61_202).reaches()?;
    denied(&world.attack(61_201))?;
    set_group(&group.0, None)?;
    until("nobody is a member any more", || {
        Ok(world.attack(61_202).run()?.errno.is_some())
    })?;
    for bad in ["{ group = -1 }", "{ group = \"a\", user = \"b\" }", "{ group = [] }"] {
        allow(bad)?;
        let said = world.enforcer(&["config", "check"])?.demand(2)?.stderr;
        ensure!(said.contains("enforcer.toml:"), "{bad}: {said}");
    }
    Ok(())
}

/// A group of a world's own, which is removed with it.
struct Group(String);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = set_group(&self.0, None);
    }
}

fn f8_what_does_not_exist_is_named_by_config_check() -> Result<()> {
    let world = World::new()?;
    let user = User::new(&world);
    world.configure_one(
        &["tcp://10.0.0.1:1".to_owned()],
        &format!("[\"root\", {:?}, {{ user = 0, cgroup = \"/no/such/cgroup\" }}]", user.0),
    )?;
    let said = world.enforcer(&["config", "check"])?.demand(1)?.stdout;
    for words in [
        &format!("no user \"{}\"", user.0)[..],
        "/no/such/cgroup does not exist",
        "enforcer.toml:",
    ] {
        ensure!(said.contains(words), "{words} is not in {said}");
    }
    let json = world.enforcer(&["config", "check", "--json"])?.demand(1)?.stdout;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    ensure!(json["absent"].as_array().context("no list")?.len() == 2, "{json}");
    Ok(())
}
