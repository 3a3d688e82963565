//! B4: a real monit, whose API root may use, and a job once it was granted.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::{OpenOptionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Case, case};
use crate::backend::EBPF;
use crate::world::{NOBODY, Netns, Ran, World, binary, ran, until};

/// Where a BOSH agent has its monit.
const BOSH: &str = "127.0.0.1:2822";

pub(super) fn cases() -> Vec<Case> {
    ["ebpf", "nftables"]
        .into_iter()
        .flat_map(|backend| {
            [
                case(&format!("b4_monit_answers_whom_it_was_granted_{backend}"), move || {
                    monit(backend, false)
                }),
                case(&format!("b4_monit_where_bosh_has_it_{backend}"), move || {
                    monit(backend, true)
                }),
            ]
        })
        // Each says itself what enforces: one run has them all.
        .map(|case| case.on(EBPF))
        .collect()
}

/// A monit of the world's; ended when dropped.
struct Monit {
    child: Child,
    world: World,
    netns: Netns,
    job: PathBuf,
}

impl Drop for Monit {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir(self.job.join("monit-api-access"));
    }
}

impl Monit {
    fn new(bosh: bool) -> Result<Self> {
        ensure!(
            Path::new("/usr/bin/monit").exists(),
            "monit is not installed; run cargo xtask setup"
        );
        let world = World::new()?;
        // The chain that BOSH jobs know is made (B5): of this world's namespace.
        let netns = Netns::new(&world, "monit")?;
        let at = Self::at(&world, bosh)?;
        for (name, user) in [("monitrc", 0), ("monitrc.user", NOBODY)] {
            let text = format!(
                "set daemon 60\nset pidfile {dir}/pid\nset statefile {dir}/state.monit\nset idfile {dir}/id\n\
                 set httpd port {} and use address {}\n  allow admin:letmein\n\
                 check process job with pidfile {dir}/job.pid\n  mode passive\n  start program = \"/bin/bash \
                 {dir}/start\"\n",
                at.port(),
                at.ip(),
                dir = world.path("").display(),
            );
            // Monit reads no file that is another user's, or open to others.
            let mut options = fs::OpenOptions::new();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(world.path(name))?;
            file.write_all(text.as_bytes())?;
            chown(world.path(name), Some(user), Some(user))?;
        }
        let job = world.cgroup.join("child");
        fs::create_dir(&job)?;
        // In a cgroup of its own, below which what it starts makes more.
        let own = world.cgroup.join("monit");
        fs::create_dir(&own)?;
        let mut command = netns.command(Path::new("sh"));
        command.args(["-c", "echo $$ > \"$1/cgroup.procs\" && shift && exec \"$@\"", "sh"]);
        command.arg(own).args(["monit", "-I", "-c"]).arg(world.path("monitrc"));
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let monit = Self {
            child,
            world,
            netns,
            job,
        };
        until("monit answers", || Ok(monit.summary(0, &monit.job)?.code == 0))?;
        Ok(monit)
    }

    fn at(world: &World, bosh: bool) -> Result<SocketAddr> {
        Ok(if bosh { BOSH.parse()? } else { world.here() })
    }

    fn command(&self, program: &str) -> Command {
        self.netns.command(Path::new(program))
    }

    /// Runs a command in a cgroup.
    fn inside(&self, cgroup: &Path, words: &[&str]) -> Result<Ran> {
        let mut command = self.command("sh");
        command
            .args(["-c", "echo $$ > \"$1/cgroup.procs\" && shift && exec \"$@\"", "sh"])
            .arg(cgroup)
            .args(words);
        ran(&mut command)
    }

    /// What monit's own client says to a user.
    fn summary(&self, user: u32, cgroup: &Path) -> Result<Ran> {
        let file = if user == 0 { "monitrc" } else { "monitrc.user" };
        let file = self.world.path(file).display().to_string();
        let user = user.to_string();
        self.inside(
            cgroup,
            &[
                "setpriv",
                "--reuid",
                &user,
                "--regid",
                &user,
                "--clear-groups",
                "monit",
                "-c",
                &file,
                "summary",
            ],
        )
    }

    fn answers(&self, user: u32, cgroup: &Path) -> Result<()> {
        let ran = self.summary(user, cgroup)?.demand(0)?;
        ensure!(ran.stdout.contains("uptime"), "{ran:?}");
        Ok(())
    }

    /// Every time, and the fastest of a few at once: a busy host is slow to start programs.
    fn is_kept_from(&self, user: u32, cgroup: &Path) -> Result<()> {
        let mut fastest = Duration::MAX;
        for _ in 0..4 {
            let started = Instant::now();
            let ran = self.summary(user, cgroup)?.demand(1)?;
            ensure!(!ran.stdout.contains("uptime"), "{ran:?}");
            fastest = fastest.min(started.elapsed());
            if fastest < Duration::from_secs(1) {
                return Ok(());
            }
        }
        bail!("{user} was kept from monit only after {fastest:?}")
    }

    /// `enforcer` as the job runs it before it starts.
    fn enforcer(&self, cgroup: &Path, words: &[&str]) -> Result<Ran> {
        let (program, config) = (binary("enforcer")?, self.world.path("enforcer.toml"));
        let (program, config) = (program.display().to_string(), config.display().to_string());
        self.inside(cgroup, &[&[program.as_str(), "--config", &config], words].concat())
    }
}

fn monit(backend: &str, bosh: bool) -> Result<()> {
    let monit = Monit::new(bosh)?;
    let (outside, job) = (monit.world.cgroup.clone(), monit.job.clone());
    monit.answers(NOBODY, &outside)?;
    monit.answers(NOBODY, &job)?;
    let at = Monit::at(&monit.world, bosh)?;
    monit.world.configure(&format!(
        "backend = \"{backend}\"\n[target.monit]\nendpoints = [\"tcp://{at}\"]\nallow = [\"root\"]\ngrants = true\n"
    ))?;
    let mut program = monit.command(&binary("enforcer")?.display().to_string());
    let _daemon = monit.world.daemon_with(&mut program)?;
    monit.answers(0, &outside)?;
    monit.is_kept_from(NOBODY, &outside)?;
    monit.is_kept_from(NOBODY, &job)?;
    monit.enforcer(&job, &["grant", "monit"])?.demand(0)?;
    monit.answers(NOBODY, &job)?;
    monit.answers(0, &job)?;
    monit.is_kept_from(NOBODY, &outside)?;
    // The job is restarted, in a cgroup made again.
    fs::remove_dir(&job)?;
    fs::create_dir(&job)?;
    until("the job is let in again", || Ok(monit.summary(NOBODY, &job)?.code == 0))?;
    monit.is_kept_from(NOBODY, &outside)?;
    monit.enforcer(&job, &["revoke", "monit"])?.demand(0)?;
    monit.is_kept_from(NOBODY, &job)?;
    // As jobs do it: the helper is sourced, and the job goes on as another user.
    let helper = Path::new(env!("CARGO_MANIFEST_DIR")).join("../enforcer/packaging/monit-access-helper.sh");
    let bin = monit.world.path("bin");
    fs::create_dir(&bin)?;
    let wrapper = format!(
        "#!/bin/sh\nexec {} --config {} \"$@\"\n",
        binary("enforcer")?.display(),
        monit.world.path("enforcer.toml").display()
    );
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o755);
    options.open(bin.join("enforcer.sh"))?.write_all(wrapper.as_bytes())?;
    symlink(bin.join("enforcer.sh"), bin.join("enforcer"))?;
    let script = format!(
        "set -eu; PATH={}:$PATH; . {}; permit_monit_access; permit_monit_access; \
         exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups monit -c {} summary",
        bin.display(),
        fs::canonicalize(helper)?.display(),
        monit.world.path("monitrc.user").display()
    );
    let ran = monit.inside(&job, &["bash", "-c", &script])?.demand(0)?;
    ensure!(ran.stdout.contains("uptime"), "{ran:?}");
    monit.is_kept_from(NOBODY, &job)?;
    // The same as a start script of monit's own.
    let said = monit.world.path("said");
    fs::write(
        monit.world.path("start"),
        format!("exec > {} 2>&1; {script}", said.display()),
    )?;
    let rc = monit.world.path("monitrc").display().to_string();
    monit
        .inside(&outside, &["monit", "-c", &rc, "start", "job"])?
        .demand(0)?;
    until("a job that monit starts is let in", || {
        Ok(fs::read_to_string(&said).unwrap_or_default().contains("uptime"))
    })?;
    monit.is_kept_from(NOBODY, &outside)?;
    monit.is_kept_from(NOBODY, &outside)?;
    let listed = monit.enforcer(&outside, &["grants"])?.demand(0)?.stdout;
    ensure!(listed.contains("/child/monit-api-access"), "{listed}");
    monit.enforcer(&outside, &["unload"])?.demand(0)?;
    monit.answers(NOBODY, &outside).context("after unload")
}
