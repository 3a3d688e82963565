//! What `status`, `check`, `verify` and `doctor` say of a state, and what the kernel does in it: a row for each state,
//! in which they agree.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use hickory_proto::op::ResponseCode;
use serde_json::Value;

use super::{Case, names::Named, with_each};
use crate::{
    backend::{ALL, BOTH, Backend, EBPF},
    dns::Zone,
    world::{Daemon, NOBODY, Ran, maps_name, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![case!(all_agree_on_every_state).on(ALL).long()]
}

/// Where nftables enforces, alone or not.
const TABLE: &[Backend] = &[Backend::Nftables, Backend::Both, Backend::AutoWithoutBpf];
/// Where it does alone.
const TABLE_ALONE: &[Backend] = &[Backend::Nftables, Backend::AutoWithoutBpf];

/// A state: its name and where it can be; what brings it about; `status` with its conditions; `check` of nobody and of
/// root; `verify`; what `doctor` finds of it; who reaches the endpoint.
type State = (
    &'static str,
    &'static [Backend],
    Act,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
);
type Act = fn(&mut Scene) -> Result<()>;

const OFF: &str = "off: critical nothing-active";
const DEAD: &str = "degraded: warning daemon-not-running";
const CHANGED: &str = "degraded: critical changed-by-others";
const NO_RULES: &str = "high nothing-active, medium no-daemon";
const DENIES: &str = "deny allow";
const LETS_PASS: &str = "allow allow";
const CANNOT_TELL: &str = "error error";

#[rustfmt::skip]
const STATES: &[State] = &[
    ("enforcing", ALL, Scene::start, "enforcing", DENIES, "identical", "", "root"),
    ("audit", ALL, audit, "audit", "would-deny allow", "identical", "medium audit-mode", "both"),
    ("a target that nobody passes", ALL, contradict, "enforcing", "deny deny", "identical", "", "neither"),
    ("applied without a daemon", ALL, Scene::apply, "enforcing", DENIES, "identical", "medium no-daemon", "root"),
    ("nothing yet", ALL, |_| Ok(()), OFF, CANNOT_TELL, "nothing", NO_RULES, "both"),
    ("unloaded", ALL, unload, OFF, CANNOT_TELL, "nothing", NO_RULES, "both"),
    ("daemon killed", ALL, die, DEAD, DENIES, "identical", "medium no-daemon", "root"),
    ("a grant has ended, daemon killed", ALL, die_with_a_grant, DEAD, LETS_PASS, "drifted", "medium no-daemon", "both"),
    ("a grant that ends, applied", ALL, apply_with_a_grant, "enforcing", DENIES, "identical", "medium no-daemon",
        "root"),
    // Names.
    ("never resolved, open", ALL, never_resolves, "degraded: critical name-unresolved", LETS_PASS, "identical",
        "high name-unresolved", "both"),
    ("never resolved, open, daemon killed", ALL, |scene| then(scene, never_resolves, Scene::kill),
        "degraded: critical name-unresolved, warning daemon-not-running", LETS_PASS, "identical",
        "high name-unresolved, medium no-daemon", "both"),
    ("never resolved, closed", ALL, never_resolves_closed, "degraded: warning name-unresolved", DENIES, "identical",
        "medium name-unresolved", "root"),
    ("never resolved, closed, daemon killed", ALL, |scene| then(scene, never_resolves_closed, Scene::kill),
        "degraded: warning daemon-not-running, warning name-unresolved", DENIES, "identical",
        "medium name-unresolved, medium no-daemon", "root"),
    ("a name is stale", ALL, go_stale, "degraded: warning name-stale", DENIES, "identical", "medium name-unresolved",
        "root"),
    // What is removed: a daemon restores it, and says so for a while.
    ("socket gone", ALL, |scene| then(scene, Scene::start, lose_socket), "enforcing", DENIES, "identical", "", "root"),
    ("map pin gone", EBPF, |scene| then(scene, Scene::start, lose_map), CHANGED, DENIES, "identical", "high degraded",
        "root"),
    ("map pin gone, daemon killed", EBPF, |scene| then(scene, die, lose_map), "degraded: critical unreadable",
        CANNOT_TELL, "error", "high degraded, medium no-daemon", "root"),
    ("link pin gone", EBPF, |scene| then(scene, Scene::start, lose_link), CHANGED, DENIES, "identical",
        "high degraded", "root"),
    ("link pin gone, daemon killed", EBPF, |scene| then(scene, die, lose_link),
        "degraded: critical link, warning daemon-not-running", LETS_PASS, "drifted",
        "high degraded, medium no-daemon", "both"),
    ("all pins gone", EBPF, |scene| then(scene, Scene::start, lose_pins), CHANGED, DENIES, "identical",
        "high degraded", "root"),
    ("all map pins gone, daemon killed", EBPF, |scene| then(scene, die, lose_maps), "degraded: critical unreadable",
        CANNOT_TELL, "error", "high degraded, medium no-daemon", "root"),
    ("chain output empty", TABLE, |scene| then(scene, Scene::start, empty_output), CHANGED, DENIES, "identical",
        "high degraded", "root"),
    ("chain output empty, daemon killed", TABLE_ALONE, |scene| then(scene, die, empty_output),
        "degraded: critical table, warning daemon-not-running", LETS_PASS, "drifted",
        "high degraded, medium no-daemon", "both"),
    ("chain output passed by, applied", TABLE_ALONE, |scene| then(scene, Scene::apply, pass_by_output),
        "degraded: critical table", LETS_PASS, "drifted", "high degraded, medium no-daemon", "both"),
    ("table gone", TABLE, |scene| then(scene, Scene::start, lose_table), CHANGED, DENIES, "identical",
        "high degraded", "root"),
    ("table gone, daemon killed", TABLE_ALONE, |scene| then(scene, die, lose_table), OFF, CANNOT_TELL, "nothing",
        NO_RULES, "both"),
    ("table dormant, daemon killed", TABLE_ALONE, |scene| then(scene, die, make_dormant),
        "off: critical nothing-active, critical table, warning daemon-not-running", CANNOT_TELL, "drifted",
        "high degraded, high nothing-active, medium no-daemon", "both"),
    ("table gone, applied", BOTH, |scene| then(scene, Scene::apply, lose_table), "degraded: critical table", DENIES,
        "drifted", "high degraded, medium no-daemon", "root"),
    ("link pin gone, applied", BOTH, |scene| then(scene, Scene::apply, lose_link), "degraded: critical link", DENIES,
        "drifted", "high degraded, medium no-daemon", "root"),
    ("all pins gone, applied", BOTH, |scene| then(scene, Scene::apply, lose_pins), "degraded: critical link", DENIES,
        "drifted", "high degraded, medium no-daemon", "root"),
    // The file. Whoever asks the daemon needs it only to find it.
    ("file broken", ALL, |scene| then(scene, Scene::start, break_file), "enforcing", DENIES, "identical",
        "medium configuration", "root"),
    ("file broken, and taken", ALL, |scene| then(scene, Scene::start, reload_broken),
        "degraded: warning configuration-rejected", DENIES, "identical", "medium configuration, medium degraded",
        "root"),
    ("file broken, daemon killed", ALL, |scene| then(scene, die, break_file), DEAD, DENIES, "error",
        "medium configuration, medium no-daemon", "root"),
    ("file broken, daemon started again", ALL, restart_broken, "degraded: warning configuration-rejected", DENIES,
        "identical", "medium configuration, medium degraded", "root"),
    ("file gone", ALL, |scene| then(scene, Scene::start, lose_file), "error", CANNOT_TELL, "error",
        "high configuration", "root"),
    ("file gone, daemon killed", ALL, |scene| then(scene, die, lose_file), "error", CANNOT_TELL, "error",
        "high configuration", "root"),
    ("file names another socket", ALL, |scene| then(scene, Scene::start, name_another_socket), "enforcing", DENIES,
        "identical", "medium restart-needed", "root"),
    ("file names places where nothing is", ALL, |scene| then(scene, Scene::start, name_new_places), "enforcing", DENIES,
        "identical", "medium restart-needed", "root"),
    ("file names other places, daemon killed", ALL, |scene| then(scene, die, name_other_places), DEAD, DENIES,
        "nothing", "medium no-daemon, medium restart-needed", "root"),
];

/// What `doctor` finds of an instance's state, and not of the host.
const OF_THE_STATE: [&str; 8] = [
    "audit-mode",
    "configuration",
    "degraded",
    "hidden-from-host",
    "name-unresolved",
    "no-daemon",
    "nothing-active",
    "restart-needed",
];

fn all_agree_on_every_state() -> Result<()> {
    // As many at once as two processors serve in time.
    const AT_ONCE: usize = 4;
    let here = |(_, on, ..): &&State| on.contains(&Backend::current());
    let states: Vec<&State> = STATES.iter().filter(here).collect();
    for some in states.chunks(AT_ONCE) {
        with_each(some.iter().copied(), agree)?;
    }
    Ok(())
}

fn agree((name, _, act, status, check, verify, doctor, reaches): &State) -> Result<()> {
    let mut scene = Scene::new()?;
    act(&mut scene).with_context(|| format!("{name}: it cannot be brought about"))?;
    let expected = [*status, check, verify, doctor, reaches].map(str::to_owned).to_vec();
    let mut found = Vec::new();
    // What a daemon does about it, or time, comes within seconds; the others are asked once `status` has it.
    let settled = until("all agree", || {
        found = vec![scene.status()?];
        if found.first() == expected.first() {
            found.extend([scene.check()?, scene.verify()?, scene.doctor()?, scene.reaches()?]);
        }
        Ok(found == expected)
    });
    settled.with_context(|| format!("{name}: {found:?} in place of {expected:?}"))?;
    println!("    {name}: {}", expected.join(" | "));
    Ok(())
}

/// One endpoint that root alone may connect to, by address or by name.
struct Scene {
    /// Gone before what it would restore is removed.
    daemon: Option<Daemon>,
    named: Named,
}

impl Scene {
    fn new() -> Result<Self> {
        let named = Named::new(&[], "")?;
        named.dns.set("bus.test", Zone::Code(ResponseCode::NXDomain));
        let scene = Self { daemon: None, named };
        scene.write_hosts(true)?;
        scene.configure("", r#"allow = ["root"]"#)?;
        Ok(scene)
    }

    fn configure(&self, top: &str, allow: &str) -> Result<()> {
        let world = &self.named.world;
        world.configure(&format!(
            "{top}\n[target.main]\nendpoints = [\"tcp://{}\"]\n{allow}\n",
            world.here()
        ))
    }

    /// The same endpoint by a name.
    fn configure_name(&self, unresolved: &str) -> Result<()> {
        let world = &self.named.world;
        world.configure(&format!(
            "[dns]\nmin_refresh = \"1s\"\nmax_refresh = \"2s\"\nunresolved = {unresolved:?}\n\
             [target.main]\nendpoints = [\"tcp://bus.test:{}\"]\nallow = [\"root\"]\n",
            world.port
        ))
    }

    /// The hosts file, which alone may name a loopback address.
    fn write_hosts(&self, resolves: bool) -> Result<()> {
        let world = &self.named.world;
        let line = format!("{} bus.test\n", world.address());
        Ok(fs::write(world.path("hosts"), if resolves { &line } else { "" })?)
    }

    fn file(&self, change: impl FnOnce(String) -> String) -> Result<()> {
        let file = self.named.world.path("enforcer.toml");
        Ok(fs::write(&file, change(fs::read_to_string(&file)?))?)
    }

    fn run(&self, words: &[&str]) -> Result<Ran> {
        let mut command = self.named.world.with_resolver()?;
        command.arg("--config").arg(self.named.world.path("enforcer.toml"));
        ran(command.args(words))
    }

    fn start(&mut self) -> Result<()> {
        self.daemon = Some(self.named.daemon()?);
        Ok(())
    }

    fn apply(&mut self) -> Result<()> {
        self.run(&["apply"])?.demand(0).map(drop)
    }

    fn kill(&mut self) -> Result<()> {
        self.daemon.take().context("no daemon")?.kill()
    }

    /// The answer of a read, and nothing where it is an error; fails where the exit code is another than `code` says.
    fn read(&self, words: &[&str], code: impl FnOnce(&Value) -> i32) -> Result<Option<Value>> {
        let ran = self.run(words)?;
        if ran.stdout.is_empty() {
            ensure!(!ran.stderr.is_empty(), "{words:?} says nothing: {ran:?}");
            return ran.demand(2).map(|_| None);
        }
        let answer: Value = serde_json::from_str(&ran.stdout).with_context(|| format!("{words:?}: {ran:?}"))?;
        let code = code(&answer);
        ran.demand(code).with_context(|| format!("{words:?}"))?;
        Ok(Some(answer))
    }

    fn status(&self) -> Result<String> {
        let code = |answer: &Value| i32::from(answer["state"] == "degraded" || answer["state"] == "off");
        let Some(answer) = self.read(&["status", "--json"], code)? else {
            return Ok("error".to_owned());
        };
        let state = answer["state"].as_str().context("no state")?;
        let conditions = answer["conditions"].as_array().into_iter().flatten();
        let conditions = conditions.filter(|one| one["severity"] != "info");
        let conditions = list(conditions, "severity");
        Ok(if conditions.is_empty() {
            state.to_owned()
        } else {
            format!("{state}: {conditions}")
        })
    }

    fn check(&self) -> Result<String> {
        let here = self.named.world.here().to_string();
        let code = |answer: &Value| i32::from(answer["verdict"] != "allow");
        let verdict = |user| {
            let answer = self.read(&["check", user, &here, "--json"], code)?;
            let verdict = answer.as_ref().map(|answer| answer["verdict"].as_str());
            Ok(verdict.map_or("error", Option::unwrap_or_default).to_owned())
        };
        let [nobody, root]: [Result<String>; 2] = ["nobody", "root"].map(verdict);
        Ok(format!("{} {}", nobody?, root?))
    }

    fn verify(&self) -> Result<String> {
        let code = |answer: &Value| i32::from(answer["identical"] != true);
        let word = match self.read(&["verify", "--json"], code)? {
            None => "error",
            Some(answer) if answer["identical"] == true => "identical",
            Some(answer) if answer["backend"] == "none" => "nothing",
            Some(_) => "drifted",
        };
        Ok(word.to_owned())
    }

    fn doctor(&self) -> Result<String> {
        let is_empty = |answer: &Value, key: &str| answer[key].as_array().is_some_and(Vec::is_empty);
        let code = |answer: &Value| match (is_empty(answer, "findings"), is_empty(answer, "unseen")) {
            (false, _) => 1,
            (true, false) => 2,
            (true, true) => 0,
        };
        let answer = self.read(&["doctor", "--json"], code)?.context("doctor fails")?;
        let findings = answer["findings"].as_array().into_iter().flatten();
        let ours = |finding: &&Value| finding["id"].as_str().is_some_and(|id| OF_THE_STATE.contains(&id));
        Ok(list(findings.filter(ours), "weight"))
    }

    /// Who reaches the endpoint; whoever does not is refused at once.
    fn reaches(&self) -> Result<String> {
        let reaches = |uid| {
            let outcome = self.named.world.attack(uid).run()?;
            ensure!(
                matches!(outcome.errno, None | Some(libc::EPERM | libc::ECONNREFUSED)),
                "{outcome:?}"
            );
            Ok(outcome.errno.is_none())
        };
        let who = match (reaches(NOBODY)?, reaches(0)?) {
            (true, true) => "both",
            (false, true) => "root",
            (false, false) => "neither",
            (true, false) => bail!("root is refused, and nobody is not"),
        };
        Ok(who.to_owned())
    }
}

/// How much each matters and what it is, sorted.
fn list<'a>(all: impl Iterator<Item = &'a Value>, weight: &str) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut all: Vec<String> = all
        .map(|one| format!("{} {}", text(&one[weight]), text(&one["id"])))
        .collect();
    all.sort();
    all.join(", ")
}

fn then(scene: &mut Scene, first: Act, second: Act) -> Result<()> {
    first(scene)?;
    second(scene)
}

fn audit(scene: &mut Scene) -> Result<()> {
    scene.configure("mode = \"audit\"", r#"allow = ["root"]"#)?;
    scene.start()
}

fn contradict(scene: &mut Scene) -> Result<()> {
    let here = scene.named.world.here();
    let other = format!("[target.other]\nendpoints = [\"tcp://{here}\"]\nallow = [\"daemon\"]");
    scene.configure(&other, r#"allow = ["root"]"#)?;
    scene.start()
}

fn unload(scene: &mut Scene) -> Result<()> {
    scene.start()?;
    scene.run(&["unload"])?.demand(0)?;
    scene.daemon.take().context("no daemon")?.wait().map(drop)
}

fn die(scene: &mut Scene) -> Result<()> {
    then(scene, Scene::start, Scene::kill)
}

fn grant(scene: &mut Scene, time: &str) -> Result<()> {
    scene.configure("", "allow = [\"root\"]\ngrants = true")?;
    scene.start()?;
    scene
        .run(&["grant", "main", "--user", "nobody", "--for", time])?
        .demand(0)?;
    scene.kill()
}

/// It ends later than a daemon that is busy could be killed.
fn die_with_a_grant(scene: &mut Scene) -> Result<()> {
    grant(scene, "20s")
}

/// It waits for a daemon that ends it.
fn apply_with_a_grant(scene: &mut Scene) -> Result<()> {
    grant(scene, "1h")?;
    scene.apply()
}

fn never_resolves(scene: &mut Scene) -> Result<()> {
    scene.write_hosts(false)?;
    scene.configure_name("open")?;
    scene.start()
}

fn never_resolves_closed(scene: &mut Scene) -> Result<()> {
    scene.write_hosts(false)?;
    scene.configure_name("closed")?;
    scene.start()
}

fn go_stale(scene: &mut Scene) -> Result<()> {
    scene.configure_name("open")?;
    scene.start()?;
    scene.write_hosts(false)
}

fn lose_socket(scene: &mut Scene) -> Result<()> {
    Ok(fs::remove_file(scene.named.world.path("run/control.sock"))?)
}

fn lose_map(scene: &mut Scene) -> Result<()> {
    Ok(fs::remove_file(
        scene.named.world.pins().join(maps_name()).join("endpoints"),
    )?)
}

fn lose_link(scene: &mut Scene) -> Result<()> {
    Ok(fs::remove_file(scene.named.world.pins().join("connect4"))?)
}

fn lose_pins(scene: &mut Scene) -> Result<()> {
    Ok(fs::remove_dir_all(scene.named.world.pins())?)
}

fn lose_maps(scene: &mut Scene) -> Result<()> {
    Ok(fs::remove_dir_all(scene.named.world.pins().join(maps_name()))?)
}

fn nft(scene: &Scene, words: &[&str]) -> Result<()> {
    let mut command = std::process::Command::new("nft");
    let words = words.iter().map(|word| word.replace("TABLE", scene.named.world.name()));
    ran(command.args(words))?.demand(0).map(drop)
}

fn lose_table(scene: &mut Scene) -> Result<()> {
    nft(scene, &["delete table inet TABLE"])
}

fn empty_output(scene: &mut Scene) -> Result<()> {
    nft(scene, &["flush chain inet TABLE output"])
}

fn pass_by_output(scene: &mut Scene) -> Result<()> {
    nft(scene, &["insert rule inet TABLE output accept"])
}

fn make_dormant(scene: &mut Scene) -> Result<()> {
    nft(scene, &["add table inet TABLE { flags dormant ; }"])
}

fn break_file(scene: &mut Scene) -> Result<()> {
    scene.file(|text| text + "\n[[[\n")
}

fn reload_broken(scene: &mut Scene) -> Result<()> {
    break_file(scene)?;
    scene.daemon.as_ref().context("no daemon")?.reload()
}

fn restart_broken(scene: &mut Scene) -> Result<()> {
    die(scene)?;
    break_file(scene)?;
    scene.start()
}

fn lose_file(scene: &mut Scene) -> Result<()> {
    Ok(fs::remove_file(scene.named.world.path("enforcer.toml"))?)
}

fn name_other_places(scene: &mut Scene) -> Result<()> {
    scene.file(|text| {
        text.replace("nft_table = \"", "nft_table = \"other_")
            .replace("pin_dir = \"/sys/fs/bpf/", "pin_dir = \"/sys/fs/bpf/other_")
    })
}

/// With nothing there that says where the daemon is.
fn name_new_places(scene: &mut Scene) -> Result<()> {
    name_other_places(scene)?;
    scene.file(|text| text.replace("/state\"", "/other_state\""))
}

fn name_another_socket(scene: &mut Scene) -> Result<()> {
    scene.file(|text| text.replace("control.sock", "other.sock"))
}
