//! F9: the whole host is covered, whatever mounts of cgroup v2 there are, or enforcer says what is not.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};

use super::Case;
use crate::{
    backend::EBPF,
    kernel::Feature,
    world::{Listener, NOBODY, Ran, World, binary, cgroup_mount, ran},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f9_a_bind_mount_that_comes_first_is_not_the_root).on(EBPF),
        case!(f9_a_hidden_mount_is_not_taken).on(EBPF),
        case!(f9_in_a_cgroup_namespace_it_says_what_is_not_covered).on(EBPF),
    ]
    .into_iter()
    .map(|case| case.needs(&[Feature::Cgroup2]))
    .collect()
}

/// Somebody who may connect from one cgroup.
const OTHER: u32 = 33;

/// A world whose configuration leaves it to enforcer where to attach, and a cgroup with one below.
struct Left {
    world: World,
    _listener: Listener,
    mount: PathBuf,
    jail: PathBuf,
    inner: PathBuf,
}

impl Left {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let listener = world.listen()?;
        let jail = world.cgroup.join("jail");
        let inner = jail.join("inner");
        fs::create_dir_all(&inner)?;
        world.attack(NOBODY).anywhere().reaches()?;
        world.configure(&format!(
            "[target.main]\nendpoints = [\"tcp://{}\"]\n\
             allow = [\"root\", {{ user = {OTHER}, cgroup = \"/inner\" }}]\n",
            world.here()
        ))?;
        let file = world.path("enforcer.toml");
        let text = fs::read_to_string(&file)?;
        let lines = text.lines().filter(|line| !line.starts_with("cgroup ="));
        fs::write(&file, lines.flat_map(|line| [line, "\n"]).collect::<String>())?;
        Ok(Self {
            world,
            _listener: listener,
            mount: cgroup_mount()?,
            jail,
            inner,
        })
    }

    /// The binary in a mount namespace, and by `unshare` in others, after a preparation: `$mount` is where cgroup v2 is
    /// mounted, `$jail` a cgroup, `$other` a directory.
    fn command(&self, unshare: &[&str], preparation: &str) -> Result<Command> {
        let other = self.world.path("other");
        fs::create_dir_all(&other)?;
        let mut command = Command::new("sh");
        // Those that enter a cgroup namespace make it where they are.
        command.args([
            "-ec",
            "[ -z \"$enter\" ] || echo $$ > \"$enter/cgroup.procs\"; exec \"$@\"",
            "sh",
        ]);
        command.args(["unshare", "--mount"]).args(unshare);
        let script = format!("{preparation}; exec \"$@\"");
        command.args(["sh", "-ec", &script, "sh"]).arg(binary("enforcer")?);
        let enter = if unshare.is_empty() { Path::new("") } else { &self.jail };
        command.env("enter", enter).env("mount", &self.mount);
        command.env("jail", &self.jail).env("other", other);
        Ok(command)
    }

    fn ask(&self, unshare: &[&str], preparation: &str, arguments: &[&str]) -> Result<Ran> {
        let mut command = self.command(unshare, preparation)?;
        ran(command
            .arg("--config")
            .arg(self.world.path("enforcer.toml"))
            .args(arguments))
    }

    /// Processes anywhere are covered.
    fn is_whole(&self, preparation: &str) -> Result<()> {
        let world = &self.world;
        let _daemon = world.daemon_with(&mut self.command(&[], preparation)?)?;
        world.attack(NOBODY).anywhere().is_refused()?;
        world.attack(NOBODY).in_cgroup(&self.inner).is_refused()?;
        world.attack(0).anywhere().reaches()?;
        let status = world.status()?;
        ensure!(!status["causes"].to_string().contains("covered"), "{status}");
        let found = self.ask(&[], preparation, &["doctor", "--json"])?;
        ensure!(!found.stdout.contains("part-of-host"), "{found:?}");
        world.enforcer(&["unload"])?.demand(0)?;
        world.attack(NOBODY).anywhere().reaches()
    }
}

fn f9_a_bind_mount_that_comes_first_is_not_the_root() -> Result<()> {
    Left::new()?.is_whole(
        "mount --bind \"$jail\" \"$other\"; umount --lazy \"$mount\"; mount -t cgroup2 cgroup2 \"$mount\"; \
         grep cgroup2 /proc/self/mountinfo | head -n 1 | grep -q jail",
    )
}

fn f9_a_hidden_mount_is_not_taken() -> Result<()> {
    Left::new()?.is_whole("mount -t cgroup2 cgroup2 \"$other\"; mount -t tmpfs tmpfs \"$mount\"")
}

fn f9_in_a_cgroup_namespace_it_says_what_is_not_covered() -> Result<()> {
    let left = Left::new()?;
    let world = &left.world;
    let unshare = ["--cgroup"];
    let own = "umount --lazy \"$mount\"; mount -t cgroup2 cgroup2 \"$mount\"; test -d \"$mount/inner\"";
    let daemon = world.daemon_with(&mut left.command(&unshare, own)?)?;
    world.attack(NOBODY).in_cgroup(&left.inner).is_refused()?;
    // The kernel does not know where the principal's cgroup lies, and check says the same.
    world.attack(OTHER).in_cgroup(&left.inner).is_refused()?;
    let here = world.here().to_string();
    let check = |user: &str| left.ask(&unshare, own, &["check", user, &here, "--cgroup", "/inner"]);
    check(&OTHER.to_string())?.demand(1)?;
    check("root")?.demand(0)?;
    // Not covered, and that is said.
    world.attack(NOBODY).anywhere().reaches()?;
    let status = world.status()?;
    let causes = status["causes"].to_string();
    ensure!(
        status["state"] == "degraded" && causes.contains("only processes below cgroup"),
        "{status}"
    );
    ensure!(causes.contains("the depth of cgroup /inner is not known"), "{status}");
    let found = left.ask(&unshare, own, &["doctor"])?.demand(1)?.stdout;

    ensure!(
        found.contains("part-of-host") && found.contains("not covered: process "),
        "{found}"
    );
    drop(daemon);
    // Asked for by its path it is no fault.
    let text = fs::read_to_string(world.path("enforcer.toml"))?;
    fs::write(
        world.path("enforcer.toml"),
        format!("cgroup = {:?}\n{text}", left.mount.display().to_string()),
    )?;
    let _daemon = world.daemon_with(&mut left.command(&unshare, own)?)?;
    let status = world.status()?;
    ensure!(!status["causes"].to_string().contains("only processes"), "{status}");
    left.ask(&unshare, own, &["unload"])?.demand(0).map(drop)
}
