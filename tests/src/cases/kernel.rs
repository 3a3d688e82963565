//! §5: what the kernel has, what `auto` makes of it, and that what it lacks is told.

use anyhow::{Result, ensure};
use clap::ValueEnum as _;
use enforcer::host::cgroup2_mount;

use super::Case;
use crate::{
    attack::Way,
    backend::WITH_BPF,
    kernel::{Feature, has, hides_owners, lacking, lacks, lacks_ebpf},
    world::{NOBODY, World},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(kernel_has_what_it_should),
        case!(s5_auto_takes_what_the_kernel_has).on(WITH_BPF),
        case!(s5_a_backend_that_cannot_be_is_refused).on(WITH_BPF),
    ]
}

fn kernel_has_what_it_should() -> Result<()> {
    let lacking = lacking()?;
    let mut wrong = Vec::new();
    for feature in Feature::value_variants() {
        let (has, should) = (has(*feature)?, !lacking.contains(feature));
        if has != should {
            wrong.push(format!("{feature:?}: there: {has}, should be: {should}"));
        }
    }
    ensure!(wrong.is_empty(), "the kernel is not as said: {}", wrong.join("; "));
    Ok(())
}

/// eBPF wherever it can be, else nftables by itself, with the reason in `status`.
fn s5_auto_takes_what_the_kernel_has() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let attack = world.attack(NOBODY);
    attack.reaches()?;
    let here = world.here();
    world.configure(&format!(
        "backend = \"auto\"\n[target.main]\nendpoints = [\"tcp://{here}\"]\nallow = [\"root\"]\n"
    ))?;
    let daemon = world.daemon()?;
    let status = world.status()?;
    if lacks_ebpf() {
        ensure!(status["backend"] == "nftables", "{status}");
        ensure!(daemon.log().contains("auto chose nftables"), "{}", daemon.log());
        ensure!(status.to_string().contains("auto chose nftables"), "{status}");
        for way in [Way::Plain, Way::Mapped, Way::FastOpenSendto] {
            attack.clone().way(way).fails_by(libc::ECONNREFUSED)?;
            world.attack(0).way(way).reaches()?;
        }
    } else {
        ensure!(status["backend"] == "ebpf", "{status}");
        let subject = match () {
            () if lacks(Feature::Btf) => "task",
            () if hides_owners() => "task+tcp-socket",
            () => "task+socket",
        };
        ensure!(status["subject"] == subject, "not {subject}: {status}");
        for way in [Way::Plain, Way::Mapped, Way::FastOpenSendto] {
            attack.clone().way(way).fails_by(libc::EPERM)?;
            world.attack(0).way(way).reaches()?;
        }
    }
    world.enforcer(&["check", "root", &here.to_string()])?.demand(0)?;
    world.enforcer(&["check", "nobody", &here.to_string()])?.demand(1)?;
    drop(daemon);
    world.enforcer(&["unload"])?.demand(0)?;
    attack.reaches()
}

/// Asked for by name, a backend that the kernel cannot have is an error in one line, and nothing is half active.
fn s5_a_backend_that_cannot_be_is_refused() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    for backend in ["ebpf", "both"] {
        world.configure(&format!(
            "backend = {backend:?}\n[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\n",
            world.here()
        ))?;
        let applied = world.enforcer(&["apply"])?;
        if lacks_ebpf() {
            let applied = applied.demand(2)?;
            ensure!(applied.stderr.lines().count() == 1, "{}", applied.stderr);
            let missing = if cgroup2_mount()?.is_none() { "cgroup v2" } else { "bpf" };
            ensure!(
                applied.stderr.to_lowercase().contains(missing),
                "{missing}: {}",
                applied.stderr
            );
            world.attack(NOBODY).reaches()?;
        } else {
            applied.demand(0)?;
            world.attack(NOBODY).fails_by(libc::EPERM)?;
            world.enforcer(&["unload"])?.demand(0)?;
        }
    }
    Ok(())
}
