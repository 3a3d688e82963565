//! F1, F4, D3: hosts short of file descriptors, and threads of one process in several cgroups.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::{Case, case};
use crate::{
    backend::Backend,
    kernel::{Feature, lacks},
    world::{Attack, NOBODY, World, binary, until},
};

/// All cases of this file.
#[must_use]
pub fn cases() -> Vec<Case> {
    vec![
        case("f4_too_few_descriptors_are_told_and_open_nothing", descriptors),
        case("d3_threads_are_judged_by_their_own_cgroup", threads).needs(&[Feature::Cgroup2]),
    ]
}

/// With so few the daemon enforces or says why not; what was in force before stays either way.
fn descriptors() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.attack(NOBODY).reaches()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    world.apply()?;
    let mut told = 0;
    for limit in [4, 8, 12, 16, 20, 24, 32, 64] {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={limit}")).arg(binary("enforcer")?);
        command.arg("--config").arg(world.path("enforcer.toml")).arg("run");
        let log = world.path("said");
        let mut child = command.stdout(Stdio::null()).stderr(fs::File::create(&log)?).spawn()?;
        let says_why = || {
            let said = fs::read_to_string(&log).unwrap_or_default();
            said.contains("open files") || said.contains("error while loading shared libraries")
        };
        let waited = until("it answers or says why it cannot", || {
            // One that ends while it is asked answers nothing.
            let answers = world.enforcer(&["status"])?.stdout.contains("running, pid");
            Ok(answers || says_why())
        });
        let _ = child.kill();
        let _ = child.wait();
        waited.with_context(|| format!("with {limit}"))?;
        told += usize::from(says_why());
        world.attack(NOBODY).is_refused()?;
        world.attack(0).reaches()?;
    }
    println!("    {told} of 8 starts had too few");
    ensure!(told > 0, "every start had enough");
    let _daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    world.attack(0).reaches()
}

/// An attack by a process that is in a cgroup, its one thread in a threaded one below.
fn thread_in(world: &World, job: &Path, thread: &Path) -> Result<Attack> {
    let script = format!(
        "echo $$ > {}/cgroup.procs && echo $$ > {}/cgroup.threads && exec \"$@\"",
        job.display(),
        thread.display()
    );
    let attack = world.attack(NOBODY).anywhere();
    Ok(attack.program(&["sh", "-c", &script, "sh"], binary("attack")?))
}

fn threads() -> Result<()> {
    if Backend::current().is_nftables() && lacks(Feature::SocketCgroup) {
        return Ok(());
    }
    let world = World::new()?;
    let _listener = world.listen()?;
    let job = world.cgroup.join("job");
    let [one, other] = ["one", "other"].map(|name| job.join(name));
    for dir in [&job, &one, &other] {
        fs::create_dir(dir)?;
    }
    for threaded in [&one, &other] {
        fs::write(threaded.join("cgroup.type"), "threaded")?;
    }
    let mount = crate::world::cgroup_mount()?;
    let path = |cgroup: &Path| Ok::<_, anyhow::Error>(format!("/{}", cgroup.strip_prefix(&mount)?.display()));
    let allow =
        |cgroup: &Path| Ok::<_, anyhow::Error>(format!("[{{ user = {NOBODY}, cgroup = {:?} }}]", path(cgroup)?));
    let attacks = [thread_in(&world, &job, &one)?, thread_in(&world, &job, &other)?];
    for attack in &attacks {
        attack.reaches()?;
    }
    let here = [format!("tcp://{}", world.here())];
    // Of the cgroup of one thread the other is no part; of that of the process both are.
    world.configure_one(&here, &allow(&one)?)?;
    world.apply()?;
    attacks[0].reaches()?;
    attacks[1].is_refused()?;
    world.attack(NOBODY).in_cgroup(&world.cgroup).is_refused()?;
    world.configure_one(&here, &allow(&job)?)?;
    world.apply()?;
    for attack in &attacks {
        attack.reaches()?;
    }
    world.attack(NOBODY).in_cgroup(&world.cgroup).is_refused()
}
