//! F6: what others chose (the names of tasks and cgroups, addresses of a bus) on the screen, in the log and in JSON.

use std::{
    ffi::OsString,
    fs,
    os::unix::{ffi::OsStringExt as _, fs::symlink},
    path::{Path, PathBuf},
    process::{Child, Command},
};

use anyhow::{Result, ensure};
use serde_json::Value;
use unicode_general_category::{GeneralCategory, get_general_category};

use super::Case;
use crate::{
    backend::Backend,
    world::{NOBODY, Ran, World, binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f6_names_of_tasks_steer_no_terminal),
        case!(f6_a_task_that_asks_steers_no_terminal),
        case!(f6_a_name_that_is_no_text_hides_no_task),
        case!(f6_a_configuration_steers_no_terminal),
    ]
}

/// Steers a terminal, hides text, turns its direction, or begins a line.
fn steers(c: char) -> bool {
    use GeneralCategory::{Control, Format, LineSeparator, ParagraphSeparator};
    matches!(
        get_general_category(c),
        Control | Format | LineSeparator | ParagraphSeparator
    )
}

/// All of them but two that no name may hold; the slash is none of them.
fn steering() -> impl Iterator<Item = char> {
    (1..=u32::from(char::MAX))
        .filter_map(char::from_u32)
        .filter(|c| steers(*c))
}

/// Names that a task may have, 15 bytes at most, with all of them.
fn names() -> Vec<String> {
    let mut names = Vec::new();
    let mut name = "x".to_owned();
    for c in steering() {
        if name.len() + c.len_utf8() > 14 {
            names.push(std::mem::replace(&mut name, "x".to_owned()));
        }
        name.push(c);
    }
    names.push(name);
    names.into_iter().map(|name| name + "y").collect()
}

/// Fails if a text holds one of them; lines of ours end.
fn is_clean(what: &str, text: &str) -> Result<()> {
    let left: String = text.chars().filter(|c| *c != '\n' && steers(*c)).collect();
    ensure!(left.is_empty(), "{what}: {left:?} in {text:?}");
    Ok(())
}

fn both_are_clean(what: &str, ran: &Ran) -> Result<()> {
    is_clean(what, &ran.stdout)?;
    is_clean(what, &ran.stderr)
}

fn guarded() -> Result<(World, crate::world::Listener)> {
    let world = World::new()?;
    let listener = world.listen()?;
    let text = format!(
        "[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\ngrants = true\n",
        world.here()
    );
    world.configure(&text)?;
    Ok((world, listener))
}

/// A program that is called so: its task has the name of its file. One of this project, or of every system.
fn called(world: &World, program: &Path, name: impl Into<OsString>) -> Result<PathBuf> {
    let dir = world.path("called").join(program.file_name().unwrap_or_default());
    fs::create_dir_all(&dir)?;
    let path = dir.join(name.into());
    if !path.is_symlink() {
        symlink(program, &path)?;
    }
    Ok(path)
}

/// Denied, logged and listed under every name.
fn f6_names_of_tasks_steer_no_terminal() -> Result<()> {
    let (world, _listener) = guarded()?;
    let daemon = world.daemon()?;
    let names = names();
    ensure!(names.len() > 40, "{} names", names.len());
    let attack = binary("attack")?;
    for (uid, name) in (2000..).zip(&names) {
        // Each another user, so that each has a line in the log.
        let attack = world.attack(uid).program(&[], called(&world, &attack, name)?);
        ensure!(attack.run()?.errno.is_some(), "{name:?} is let through");
    }
    until("all are told", || {
        let told = world.enforcer(&["events"])?.demand(0)?.stdout.lines().count();
        Ok(told >= names.len())
    })?;
    for words in [
        &["events"][..],
        &["events", "--json"],
        &["status"],
        &["status", "--json"],
        &["verify"],
    ] {
        both_are_clean(&format!("{words:?}"), &world.enforcer(words)?.demand(0)?)?;
    }
    let json = world.enforcer(&["events", "--json"])?.demand(0)?;
    ensure!(
        json.stdout.lines().count() == names.len(),
        "{} names: {json:?}",
        names.len()
    );
    for (line, name) in json.stdout.lines().zip(&names) {
        let event: Value = serde_json::from_str(line)?;
        // What is read back is the name itself; nftables sees no task.
        let sees = !Backend::current().is_nftables();
        ensure!(!sees || event["comm"] == **name, "{event} is not of {name:?}");
    }
    until("all are logged", || {
        Ok(daemon.log().matches("denied 1 attempt").count() == names.len())
    })?;
    is_clean("the log", &daemon.log())?;
    // Nobody's name can be taken for what follows it.
    if !Backend::current().is_nftables() {
        let text = world.enforcer(&["events"])?.demand(0)?.stdout;
        ensure!(text.contains("\\u{202e}") && text.contains("\\u{1b}"), "{text}");
    }
    Ok(())
}

/// Who asks for a grant.
fn f6_a_task_that_asks_steers_no_terminal() -> Result<()> {
    let (world, _listener) = guarded()?;
    let daemon = world.daemon()?;
    let enforcer = binary("enforcer")?;
    let names = names();
    for (uid, name) in (2000..).zip(&names) {
        let mut command = Command::new(called(&world, &enforcer, name)?);
        command.arg("--config").arg(world.path("enforcer.toml"));
        let ran = ran(command.args(["grant", "main", "--user", &format!("{uid}")]))?.demand(0)?;
        both_are_clean("grant", &ran)?;
        ensure!(ran.stdout.lines().count() == 1, "{ran:?}");
    }
    // Format characters, which a cgroup's name may hold, and the path of a principal too.
    let odd: String = steering().filter(|c| !c.is_control()).take(60).collect();
    let cgroup = world.cgroup.join(&odd);
    fs::create_dir(&cgroup)?;
    let mount = crate::world::cgroup_mount()?;
    let path = format!("/{}", cgroup.strip_prefix(&mount)?.display());
    let grant = world.enforcer(&["grant", "main", "--cgroup", &path])?.demand(0)?;
    both_are_clean("grant --cgroup", &grant)?;
    let here = format!("tcp://{}", world.here());
    for words in [
        &["grants"][..],
        &["grants", "--json"],
        &["status"],
        &["check", "root", &here, "--cgroup", &path],
        &["check", "root", &here, "--cgroup", &path, "--json"],
        &["events"],
        &["revoke", "main", "--cgroup", &path],
        &["revoke", "main", "--all"],
    ] {
        both_are_clean(&format!("{words:?}"), &world.enforcer(words)?.demand(0)?)?;
    }
    fs::remove_dir(&cgroup)?;
    is_clean("the log", &daemon.log())?;
    // An argument that is no good is said in the error, and what is not known in the daemon's.
    let all: String = steering().collect();
    for words in [
        &["check", &all, &here][..],
        &["check", "root", &all],
        &["grant", &all],
        &["grant", "main", "--for", &all],
        &["grant", "main", "--cgroup", &all],
        &["revoke", &all, "--all"],
        &["refresh", "--timeout", &all],
        &[&all],
        &["doctor", "--root", &all],
    ] {
        both_are_clean(&format!("{:?} …", words[0]), &world.enforcer(words)?.demand(2)?)?;
    }
    let elsewhere = ran(Command::new(&enforcer).args(["--config", &all, "status"]))?;
    both_are_clean("--config", &elsewhere.demand(2)?)?;
    Ok(())
}

/// Bytes that are no UTF-8, in the name of who asks and of whom it asks for: the grant is their own.
fn f6_a_name_that_is_no_text_hides_no_task() -> Result<()> {
    let (world, _listener) = guarded()?;
    let _daemon = world.daemon()?;
    let name = OsString::from_vec(b"\xff\x9b2J".to_vec());
    let sleeper = Sleeper(
        Command::new(called(&world, Path::new("/bin/sleep"), name)?)
            .arg("1000")
            .spawn()?,
    );
    let enforcer = called(&world, &binary("enforcer")?, OsString::from_vec(b"\xff".to_vec()))?;
    let mut command = Command::new(enforcer);
    command.arg("--config").arg(world.path("enforcer.toml"));
    // Below the cgroup that is judged: granting that one would let everybody in.
    let job = world.cgroup.join("job");
    fs::create_dir(&job)?;
    let pid = sleeper.0.id().to_string();
    fs::write(job.join("cgroup.procs"), &pid)?;
    let ran = ran(command.args(["grant", "main", "--pid", &pid]))?.demand(0)?;
    both_are_clean("grant", &ran)
}

struct Sleeper(Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is wrong with a file, in one line each, whatever is in it.
fn f6_a_configuration_steers_no_terminal() -> Result<()> {
    let (world, _listener) = guarded()?;
    let file = world.path("enforcer.toml");
    let good = fs::read_to_string(&file)?;
    let all: String = steering().collect();
    // As TOML may hold them: raw where it lets them be, else escaped.
    let quoted: String = steering()
        .map(|c| {
            if c.is_control() {
                format!("\\u{:04x}", u32::from(c))
            } else {
                c.to_string()
            }
        })
        .collect();
    let here = format!("tcp://{}", world.here());
    for (what, bad) in [
        ("a key", good.clone() + &format!("\"{quoted}\" = 1\n")),
        ("a raw key", good.clone() + &all),
        ("a target", good.replace("target.main", &format!("target.\"{quoted}\""))),
        ("an endpoint", good.replace(&here, &quoted)),
        ("a host", good.replace(&here, &format!("tcp://{quoted}:1"))),
        ("a user", good.replace("\"root\"", &format!("\"{quoted}\""))),
        (
            "a cgroup",
            good.replace("\"root\"", &format!("{{ cgroup = \"/{quoted}\" }}")),
        ),
        ("a mode", good.clone() + &format!("mode = \"{quoted}\"\n")),
    ] {
        fs::write(&file, bad)?;
        for words in [
            &["config", "check"][..],
            &["config", "check", "--json"],
            &["config", "show"],
            &["apply"],
            &["status"],
            &["doctor"],
        ] {
            let ran = world.enforcer(words)?;
            both_are_clean(&format!("{what}, {words:?}"), &ran)?;
        }
    }
    fs::write(&file, &good)?;
    let _daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()
}
