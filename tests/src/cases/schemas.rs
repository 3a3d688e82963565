//! What people and programs read: every command has help, `config show` leaves nothing out, every read has `--json`,
//! and no version of a schema loses a key.

use std::{collections::BTreeSet, fs, net::SocketAddr};

use anyhow::{Context as _, Result, ensure};
use clap::CommandFactory as _;
use enforcer::{cli::Cli, wire::Lost};
use serde_json::Value;

use super::{
    Case,
    names::{Named, addresses},
};
use crate::{
    kernel::CGROUP_NEEDS,
    world::{NOBODY, World, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(help_names_every_command),
        case!(config_show_is_read_back).needs(CGROUP_NEEDS),
        case!(every_read_has_json_of_the_documented_keys).needs(CGROUP_NEEDS),
    ]
}

/// The keys of each schema besides `schema`, those of objects inside by their path. What is here never goes while its
/// schema has that version; what is new is entered here, and in `schemas.md`.
const SCHEMAS: [(&str, &str); 13] = [
    (
        "enforcer/status/1",
        "state causes conditions conditions.id conditions.severity conditions.text backend subject \
         mode generation daemon daemon.running daemon.pid cgroup pin_dir nft_table state_dir \
         backend_reason restored endpoints targets targets.name targets.endpoints targets.allow targets.allowed \
         targets.denied targets.would_deny targets.principals targets.principals.kernel \
         targets.principals.uid targets.principals.user targets.principals.cgroup_id targets.principals.cgroup \
         names names.name names.addresses names.stale names.cause names.protects \
         names.cut dials \
         dials.port dials.lookups dials.last dials.uid dials.user dials.time events_lost \
         existing existing.action existing.time existing.generation existing.found existing.cut existing.connections \
         existing.connections.schema existing.connections.time existing.connections.verdict \
         existing.connections.action \
         existing.connections.reason existing.connections.protocol existing.connections.state \
         existing.connections.local existing.connections.remote existing.connections.uid \
         existing.connections.user existing.connections.cgroup_id existing.connections.cgroup \
         existing.connections.target existing.connections.generation",
    ),
    (
        "enforcer/check/1",
        "verdict judged destination generation targets targets.name targets.admits targets.reason reason",
    ),
    (
        "enforcer/event/1",
        "time verdict backend source pid tid comm exe kernel_thread task_uid task_user socket_uid socket_user \
         cgroup_id cgroup netns_cookie protocol dialled judged target generation",
    ),
    (
        "enforcer/existing/1",
        "time verdict action reason protocol state local remote uid user cgroup_id cgroup target generation",
    ),
    (
        "enforcer/grant/1",
        "time action target user cgroup expires expires_before pid uid comm parent_pid parent_comm login_uid",
    ),
    ("enforcer/lost/1", "lost"),
    (
        "enforcer/summary/1",
        "of verdict target protocol endpoint uid user kernel_thread socket_uid socket_user comm exe cgroup \
         count at_least first last",
    ),
    (
        "enforcer/verify/1",
        "identical against backend generation compared counts differences differences.object differences.kind \
         differences.entry differences.wanted differences.found expired_grants",
    ),
    (
        "enforcer/doctor/1",
        "host host.root host.kernel host.config host.cgroup host.daemon host.active features features.id \
         features.title features.of features.required features.state features.why features.since choice choice.wanted \
         choice.backend choice.why findings findings.id findings.weight findings.what findings.items findings.do \
         unseen \
         unseen.what unseen.why",
    ),
    (
        "enforcer/grants/1",
        "limit grants grants.target grants.user grants.user_name grants.cgroup grants.cgroup_exists \
         grants.cgroup_writable \
         grants.active grants.since \
         grants.expires grants.pid grants.uid grants.asker_name grants.comm job_rules",
    ),
    (
        "enforcer/config/1",
        "mode backend existing forward cgroup pin_dir state_dir socket nft_table nat64 dns dns.min_refresh \
         dns.max_refresh \
         dns.retain dns.unresolved bosh bosh.dir target target.main target.main.endpoints target.main.allow \
         target.main.grants target.main.answers",
    ),
    (
        "enforcer/reload/1",
        "path applied generation changes changes.section changes.key changes.removed changes.added unprotected \
         unprotected.endpoint unprotected.target grants grants.target grants.user grants.cgroup grants.active \
         warnings state causes",
    ),
    (
        "enforcer/config-check/1",
        "absent defaults errors errors.path errors.line errors.target errors.key errors.message exists more_errors \
         not_checked path places targets unprotected untrusted warnings",
    ),
];

/// Where they are told of.
const DOCUMENT: &str = include_str!("../../../enforcer/docs/schemas.md");
/// What parts words there.
const WORD: [char; 6] = [' ', ',', '{', '}', '"', ':'];
/// Keys under which others of somebody's choice lie: a principal's, the counted objects'.
const OPEN: [&str; 2] = ["target.main.allow", "counts"];

fn help_names_every_command() -> Result<()> {
    let world = World::new()?;
    let readme = include_str!("../../../README.md");
    let mut waiting = vec![(Cli::command(), Vec::<String>::new())];
    let mut seen = 0;
    while let Some((command, words)) = waiting.pop() {
        let mut asked = words.clone();
        asked.push("--help".to_owned());
        let help = world.enforcer(&asked)?.demand(0)?.stdout;
        for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
            let name = below.get_name();
            let told = |line: &str| {
                let said = line.strip_prefix("  ").and_then(|line| line.strip_prefix(name));
                said.is_some_and(|said| said.starts_with(' ') && !said.trim().is_empty())
            };
            ensure!(help.lines().any(told), "{name} is not told in: {help}");
            let mut words = words.clone();
            words.push(name.to_owned());
            ensure!(
                words.len() > 1 || readme.contains(&format!("`enforcer {name}")),
                "the README does not name {name}"
            );
            waiting.push((below.clone(), words));
            seen += 1;
        }
    }
    ensure!(seen > 13, "only {seen} commands were found");
    Ok(())
}

fn config_show_is_read_back() -> Result<()> {
    let world = World::new()?;
    // Nothing that the defaults have: a key that is left out, or shown as its default, is missed.
    let keys = [
        "mode = \"audit\"",
        "existing = \"cut\"",
        "forward = \"allow\"",
        "nat64 = [\"2001:db8:64::/96\"]",
        "min_refresh = \"7s\"",
        "max_refresh = \"49s\"",
        "retain = \"2h\"",
        "unresolved = \"closed\"",
        "dir = \"/srv/agent\"",
        "grants = true",
    ];
    let principals = [
        "\"root\"",
        "999",
        "user = \"nobody\"",
        "cgroup = \"/\"",
        "kernel = true",
    ];
    let endpoints = [
        "tcp://10.8.0.0/16:6443",
        "udp://[2001:db8::9]:53",
        "tcp://local:10250",
        "tcp://nats.example:4222",
    ];
    world.configure(&format!(
        "{}\n{}\n{}\n{}\n[dns]\n{}\n{}\n{}\n{}\n[bosh]\n{}\n[target.main]\n{}\nendpoints = {endpoints:?}\n\
        allow = [{}, {}, {{ {}, {} }}, {{ {} }}]\n",
        keys[0],
        keys[1],
        keys[2],
        keys[3],
        keys[4],
        keys[5],
        keys[6],
        keys[7],
        keys[8],
        keys[9],
        principals[0],
        principals[1],
        principals[2],
        principals[3],
        principals[4],
    ))?;
    let file = world.path("enforcer.toml");
    let written = fs::read_to_string(&file)?;
    let places = written.lines().take_while(|line| !line.starts_with("mode"));
    let shown = world.enforcer(&["config", "show"])?.demand(0)?.stdout;
    let values: Vec<&str> = shown.lines().filter(|line| !line.starts_with('#')).collect();
    for line in places.chain(keys) {
        ensure!(values.contains(&line), "{line} is not in {shown}");
    }
    for part in principals.iter().chain(&endpoints) {
        ensure!(
            values.iter().any(|line| line.contains(part)),
            "{part} is not in {shown}"
        );
    }
    ensure!(shown.contains('#'), "no comment: {shown}");
    fs::write(&file, &shown)?;
    let again = world.enforcer(&["config", "show"])?.demand(0)?.stdout;
    ensure!(shown == again, "{shown}\n---\n{again}");
    for (words, schema) in [
        (&["config", "show", "--json"][..], "enforcer/config/1"),
        (&["config", "check", "--offline", "--json"], "enforcer/config-check/1"),
    ] {
        let text = world.enforcer(words)?.demand(0)?.stdout;
        let json: Value = serde_json::from_str(&text)?;
        ensure!(
            json["schema"] == schema && text.ends_with('\n') && text.lines().count() == 1,
            "{words:?}: {text}"
        );
    }
    world.enforcer(&["config", "check", "--offline"])?.demand(0).map(drop)
}

fn every_read_has_json_of_the_documented_keys() -> Result<()> {
    let named = Named::new(&[], "")?;
    let world = &named.world;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    let here = world.here();
    world.configure(&format!(
        "[target.main]\nendpoints = [\"tcp://{here}\", \"tcp://bus.test:{}\"]\n\
        allow = [\"root\", {{ user = \"root\", cgroup = \"/\" }}, {{ kernel = true }}]\ngrants = true\n[bosh]\n\
        dir = {:?}\n",
        world.port,
        world.path("vcap").display().to_string()
    ))?;
    let mut older = world.attack(NOBODY).hold()?;
    let _daemon = named.daemon()?;
    world.attack(NOBODY).run()?;
    let read = |words: &[&str]| -> Result<Vec<Value>> {
        let ran = world.enforcer(&[words, &["--json"]].concat())?;
        ensure!(ran.code < 2, "{words:?}: {ran:?}");
        ran.stdout.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    };
    until("the older connection is found", || {
        Ok(read(&["status"])?.iter().any(|status| status["existing"]["found"] == 1))
    })?;
    // A dial of the name's port, elsewhere.
    let elsewhere = SocketAddr::from(([127, 0, 0, 1], world.port));
    world.attack(NOBODY).to(elsewhere).run()?;
    until("the dial is told", || {
        Ok(read(&["status"])?
            .iter()
            .any(|status| status["dials"][0]["lookups"].as_u64() >= Some(1)))
    })?;
    let at = here.to_string();
    let mut seen = BTreeSet::new();
    check(&serde_json::to_value(Lost::new(1))?, &mut seen)?;
    for words in [
        &["grant", "main", "--user", "nobody", "--for", "1h"] as &[&str],
        &["status"],
        &["refresh"],
        &["grants"],
        &["check", "nobody", &at],
        &["verify"],
        &["doctor"],
        &["config", "show"],
        &["config", "check"],
        &["revoke", "main", "--all"],
        &["events"],
        &["events", "--summary"],
    ] {
        let answers = read(words)?;
        ensure!(!answers.is_empty(), "{words:?} answers nothing");
        for answer in answers {
            check(&answer, &mut seen).with_context(|| format!("{words:?}"))?;
        }
    }
    world.configure("[target.other]\nendpoints = [\"tcp://10.9.0.2:4222\"]\nallow = [\"root\"]\n")?;
    for answer in read(&["config", "diff"])?.into_iter().chain(read(&["reload"])?) {
        let gone = answer["unprotected"].as_array().map_or(0, Vec::len);
        ensure!(gone > 1, "main is gone: {answer}");
        check(&answer, &mut seen)?;
    }
    let all: BTreeSet<&str> = SCHEMAS.iter().map(|(schema, _)| *schema).collect();
    ensure!(seen == all, "of {all:?} only {seen:?} were seen");
    for key in SCHEMAS.iter().flat_map(|(_, keys)| keys.split_whitespace()) {
        let name = key.rsplit('.').next().unwrap_or(key);
        let told = |mark| {
            DOCUMENT
                .split(mark)
                .skip(1)
                .step_by(2)
                .any(|code| code.split(WORD).any(|word| word == name))
        };
        ensure!(name == "main" || told('`'), "schemas.md does not tell of {key}");
    }
    older.stays()
}

/// Demands all keys of a schema, and no other.
fn check(answer: &Value, seen: &mut BTreeSet<&'static str>) -> Result<()> {
    let schema = answer["schema"].as_str().context("an answer without a schema")?;
    let known = SCHEMAS.iter().find(|(name, _)| *name == schema);
    let (name, keys) = known.with_context(|| format!("{schema} is not known"))?;
    let keys: BTreeSet<&str> = keys.split_whitespace().chain(["schema"]).collect();
    for key in &keys {
        let path: Vec<&str> = key.split('.').collect();
        ensure!(has(answer, &path), "{schema} has lost {key}: {answer}");
    }
    let mut found = BTreeSet::new();
    collect(answer, "", &mut found);
    let new: Vec<_> = found.iter().filter(|key| !keys.contains(key.as_str())).collect();
    ensure!(new.is_empty(), "{schema} has keys that are not entered here: {new:?}");
    seen.insert(name);
    Ok(())
}

/// Whether there is a key wherever it can be: in every element of a list, and where there is an object at all.
fn has(value: &Value, path: &[&str]) -> bool {
    let Some((key, rest)) = path.split_first() else {
        return true;
    };
    match value {
        Value::Object(object) => object.get(*key).is_some_and(|value| has(value, rest)),
        Value::Array(list) => list.iter().all(|value| has(value, path)),
        Value::Null => true,
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

/// The paths of all keys.
fn collect(value: &Value, at: &str, keys: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) if !OPEN.contains(&at) => {
            for (key, value) in object {
                let path = if at.is_empty() {
                    key.clone()
                } else {
                    format!("{at}.{key}")
                };
                collect(value, &path, keys);
                keys.insert(path);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| collect(value, at, keys)),
        Value::Object(_) | Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
