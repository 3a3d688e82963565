//! The first process of a virtual machine: makes a system of an initramfs, runs the privileged suite as `/plan.json`
//! says, and tells on the second serial line, a line of JSON for everything that happens.

mod hierarchy;
mod system;

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::Write as _,
    path::Path,
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    kernel::LACKS,
    machine::MACHINE,
    record::RECORD,
    world::{SLOWNESS, ran},
};

/// Where results go.
const RESULTS: &str = "/dev/ttyS1";

/// What is to be done, from the initramfs.
#[derive(Debug, Deserialize)]
struct Plan {
    /// Module files, each after those that it needs.
    modules: Vec<String>,
    /// A device with a system of its own to go on with; nothing else is done then.
    #[serde(default)]
    root: Option<String>,
    /// What the kernel cannot have.
    lacks: Vec<String>,
    hierarchies: Vec<Phase>,
    /// Arguments of the suite's binary, the same each time.
    arguments: Vec<String>,
    /// How many times slower than a machine this may be.
    slowness: u32,
    /// A shell before the end.
    shell: bool,
}

/// The suites run with cgroup hierarchies laid out in one way.
#[derive(Debug, Deserialize)]
struct Phase {
    name: hierarchy::Layout,
    /// What is lacking with it, besides.
    lacks: Vec<String>,
    suites: Vec<Suite>,
}

#[derive(Debug, Deserialize)]
struct Suite {
    name: String,
    environment: BTreeMap<String, String>,
    /// Arguments that only this one has.
    arguments: Vec<String>,
}

/// Runs until the machine is switched off.
#[must_use]
pub fn main() -> ExitCode {
    let result = system::mount_all().and_then(|()| work());
    if let Err(error) = &result {
        eprintln!("guest: {error:#}");
        let told = File::options()
            .append(true)
            .open(RESULTS)
            .map_err(anyhow::Error::from)
            .and_then(|mut results| say(&mut results, &json!({ "failed": format!("{error:#}") })));
        if let Err(error) = told {
            eprintln!("guest: tell that: {error:#}");
        }
    }
    system::end()
}

fn work() -> Result<()> {
    let mut results = OpenOptions::new()
        .append(true)
        .open(RESULTS)
        .with_context(|| format!("open {RESULTS}"))?;
    let plan: Plan = serde_json::from_str(&fs::read_to_string("/plan.json")?).context("read /plan.json")?;
    for module in &plan.modules {
        system::load_module(Path::new(module))?;
    }
    if let Some(device) = &plan.root {
        return system::go_on_with(Path::new(device));
    }
    system::prepare()?;
    let release = ran(Command::new("uname").arg("-r"))?.demand(0)?.stdout;
    let uptime = fs::read_to_string("/proc/uptime")?;
    let up: f64 = uptime.split(' ').next().unwrap_or_default().parse()?;
    say(&mut results, &json!({ "booted": release.trim(), "seconds": up }))?;
    for phase in &plan.hierarchies {
        hierarchy::lay_out(phase.name)?;
        let lacks = [plan.lacks.as_slice(), phase.lacks.as_slice()].concat().join(",");
        say(
            &mut results,
            &json!({ "hierarchy": phase.name.name(), "auto": what_auto_takes(phase)? }),
        )?;
        for suite in &phase.suites {
            say(&mut results, &json!({ "suite": suite.name }))?;
            let started = Instant::now();
            let status = Command::new("/bin/privileged")
                .args(&plan.arguments)
                .args(&suite.arguments)
                .envs(&suite.environment)
                .env(LACKS, &lacks)
                .env(MACHINE, "")
                .env(RECORD, RESULTS)
                .env(SLOWNESS, plan.slowness.to_string())
                .env("ENFORCER_BIN", "/bin/enforcer")
                .status()
                .context("run /bin/privileged")?;
            let ended =
                json!({ "suite_ended": suite.name, "code": status.code(), "seconds": started.elapsed().as_secs_f64() });
            say(&mut results, &ended)?;
        }
    }
    if plan.shell {
        say(&mut results, &json!({ "shell": true }))?;
        let lacks = plan.hierarchies.last().map_or(&[][..], |phase| &phase.lacks);
        let lacks = [plan.lacks.as_slice(), lacks].concat().join(",");
        // As the suite has had it, with the hierarchies as they are now.
        system::shell(&[(LACKS, &lacks), (MACHINE, ""), (SLOWNESS, &plan.slowness.to_string())])?;
    }
    say(&mut results, &json!({ "done": true }))
}

/// The status of a configuration that leaves the choice of backend to enforcer.
fn what_auto_takes(phase: &Phase) -> Result<Value> {
    let dir = tempfile::Builder::new().prefix("auto").tempdir()?;
    let config = dir.path().join("enforcer.toml");
    let place = |name: &str| dir.path().join(name).display().to_string();
    let text = format!(
        "pin_dir = \"/sys/fs/bpf/auto\"\nnft_table = \"auto\"\nstate_dir = {:?}\nsocket = {:?}\n[target.monit]\n\
         endpoints = [\"tcp://127.0.0.1:2822\"]\nallow = [\"root\"]\n",
        place("state"),
        place("control.sock"),
    );
    fs::write(&config, text)?;
    let enforcer = |arguments: &[&str]| {
        ran(Command::new("/bin/enforcer")
            .arg("--config")
            .arg(&config)
            .args(arguments))
    };
    let applied = enforcer(&["apply"])?;
    if applied.code != 0 {
        return Ok(json!({ "error": applied.stderr.trim() }));
    }
    let status = enforcer(&["status", "--json"])?;
    enforcer(&["unload"])?.demand(0)?;
    let mut status: Value = serde_json::from_str(&status.stdout)
        .with_context(|| format!("status with {}: {status:?}", phase.name.name()))?;
    let said: Vec<&str> = applied
        .stderr
        .lines()
        .filter(|line| line.contains("auto chose"))
        .collect();
    status["said"] = said.join(" ").into();
    Ok(status)
}

fn say(results: &mut File, line: &Value) -> Result<()> {
    let text = format!("{line}\n");
    let written = results.write(text.as_bytes()).context("write to the serial line")?;
    ensure!(
        written == text.len(),
        "the serial line took {written} of {} bytes",
        text.len()
    );
    Ok(())
}
