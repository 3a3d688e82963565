//! B4: what jobs and stemcells call for access to monit, as they call it: under `set -e`, from wrappers, pre-starts and
//! subshells, with and without a daemon. Nobody is kept from starting, and nobody but the job is let in.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::PoisonError,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{Case, case, grants::path_of};
use crate::{
    backend::EBPF,
    net_cls,
    world::{Attack, Daemon, Listener, NOBODY, Netns, Ran, World, at_this_load, binary, cgroup_mount, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    let mut all: Vec<Case> = Vec::new();
    for backend in ["ebpf", "nftables", "both"] {
        all.push(case(
            &format!("b4_helpers_never_fail_their_callers_{backend}"),
            move || never_fail(backend),
        ));
    }
    all.extend([
        case!(b4_permit_moves_the_shell_that_calls_and_no_other),
        case!(f6_the_monit_helper_enters_no_users_cgroup),
        case!(b4_permit_passes_rules_of_earlier_stemcells_too),
        case!(b4_what_holds_a_supervisor_is_not_granted),
        case!(b4_a_pre_start_is_granted_its_jobs_container),
        case!(b4_a_jobs_container_is_granted_before_it_runs),
        case!(b4_wrappers_of_stemcells_need_no_grant),
        case!(b4_grants_of_cgroups_long_gone_are_dropped),
    ]);
    // Each says itself what enforces: one run has them all.
    all.into_iter().map(|case| case.on(EBPF)).collect()
}

pub(super) const HELPER: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../enforcer/packaging/monit-access-helper.sh"
);

/// A host with monit, in a network namespace of its own, and a job's cgroup; its jobs find `enforcer` on their path,
/// and the helpers beside it.
pub(super) struct Host {
    pub(super) world: World,
    pub(super) netns: Netns,
    _listener: Listener,
    pub(super) cgroup: PathBuf,
    /// Where eBPF is attached.
    judged: PathBuf,
    backend: &'static str,
}

impl Host {
    fn new(backend: &'static str, more: &str) -> Result<Self> {
        let world = World::new()?;
        let judged = world.cgroup.clone();
        Self::of(world, judged, backend, more)
    }

    /// A host whose jobs may be elsewhere than below the world's cgroup.
    pub(super) fn of(world: World, judged: PathBuf, backend: &'static str, more: &str) -> Result<Self> {
        let netns = Netns::new(&world, "home")?;
        let listener = Listener::start(Some(&netns.file()), world.port, &[])?;
        let cgroup = world.cgroup.join("child");
        fs::create_dir(&cgroup)?;
        let host = Self {
            world,
            netns,
            _listener: listener,
            cgroup,
            judged,
            backend,
        };
        host.inside(NOBODY)?.reaches()?;
        host.outside(NOBODY)?.reaches()?;
        host.configure(more, "grants = true")?;
        let bin = host.bin();
        fs::create_dir(&bin)?;
        let script = format!(
            "#!/bin/sh\nexec {} --config {} \"$@\"\n",
            binary("enforcer")?.display(),
            host.world.path("enforcer.toml").display()
        );
        write_script(&bin.join("enforcer"), &script)?;
        fs::copy(HELPER, bin.join("helper.sh"))?;
        symlink(binary("enforcer")?, bin.join("bosh-enable-monit-access"))?;
        Ok(host)
    }

    fn configure(&self, more: &str, of_target: &str) -> Result<()> {
        let (backend, port) = (self.backend, self.world.port);
        let text = format!(
            "backend = \"{backend}\"\n{more}\n[target.monit]\nendpoints = [\"tcp://127.0.0.1:{port}\"]\n\
             allow = [\"root\"]\n{of_target}\n"
        );
        self.world.configure_on(&self.judged, &text)
    }

    pub(super) fn daemon(&self) -> Result<Daemon> {
        self.world.daemon_with(&mut self.netns.command(&binary("enforcer")?))
    }

    pub(super) fn enforcer(&self, arguments: &[&str]) -> Result<Ran> {
        self.netns.enforcer(&self.world, arguments)
    }

    pub(super) fn outside(&self, user: u32) -> Result<Attack> {
        let attack = self.world.attack(user).to(([127, 0, 0, 1], self.world.port).into());
        attack.in_netns(&self.netns)
    }

    pub(super) fn inside(&self, user: u32) -> Result<Attack> {
        Ok(self.outside(user)?.in_cgroup(&self.cgroup))
    }

    pub(super) fn is_refused(&self, attack: &Attack) -> Result<()> {
        if self.backend == "nftables" {
            attack.is_reset()
        } else {
            attack.is_forbidden()
        }
    }

    pub(super) fn grants(&self) -> Result<Vec<Value>> {
        let text = self.enforcer(&["grants", "--json"])?.demand(0)?.stdout;
        let report: Value = serde_json::from_str(&text)?;
        Ok(report["grants"].as_array().cloned().unwrap_or_default())
    }

    pub(super) fn bin(&self) -> PathBuf {
        self.world.path("bin")
    }

    /// Runs a script of bash in a cgroup.
    pub(super) fn script(&self, cgroup: &Path, text: &str) -> Result<Ran> {
        ran(&mut self.bash(cgroup, text))
    }

    fn bash(&self, cgroup: &Path, text: &str) -> Command {
        let mut command = self.netns.command(Path::new("bash"));
        command
            .args(["-c", "echo $$ > \"$1/cgroup.procs\"; shift; exec \"$@\"", "bash"])
            .arg(cgroup)
            .args(["bash", "-c", text])
            .env(
                "PATH",
                format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.bin().display()),
            );
        command
    }

    /// The ways in which jobs and stemcells ask, each as the start of a script.
    fn ways(&self) -> [(&'static str, String); 4] {
        let (bin, config) = (self.bin(), self.world.path("enforcer.toml"));
        let helper = bin.join("helper.sh").display().to_string();
        [
            ("command", "set -eu; enforcer enable-monit-access".to_owned()),
            (
                "agent's name",
                format!(
                    "set -eu; {} --config {}",
                    bin.join("bosh-enable-monit-access").display(),
                    config.display()
                ),
            ),
            (
                "source",
                format!("set -euo pipefail; source {helper}; permit_monit_access"),
            ),
            (
                "sh",
                format!("exec sh -c 'set -eu; . {helper}; permit_monit_access; permit_monit_access; echo went on'"),
            ),
        ]
    }

    /// Calls in a way, and goes on.
    fn calls(&self, way: &str) -> Result<Ran> {
        let called = self.script(&self.cgroup, &format!("{way}; echo went on"))?.demand(0)?;
        ensure!(called.stdout.contains("went on"), "{called:?}");
        Ok(called)
    }

    pub(super) fn revoke_all(&self) -> Result<()> {
        self.enforcer(&["revoke", "monit", "--all"]).map(drop)
    }

    /// Where whoever calls in a way is then.
    fn granted(&self, way: &str) -> PathBuf {
        match way {
            "source" | "sh" => self.cgroup.join("monit-api-access"),
            _ => self.cgroup.clone(),
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.cgroup.join("monit-api-access"));
    }
}

pub(super) fn write_script(path: &Path, text: &str) -> Result<()> {
    // Aside and renamed: what is open for writing cannot be run.
    let aside = path.with_extension("new");
    fs::write(&aside, text)?;
    fs::set_permissions(&aside, fs::Permissions::from_mode(0o755))?;
    Ok(fs::rename(aside, path)?)
}

fn never_fail(backend: &'static str) -> Result<()> {
    let host = Host::new(backend, "")?;
    let ways = host.ways();
    // Nothing protects monit: nothing to do, and nobody is waited for.
    for (name, way) in &ways {
        let called = host.calls(way)?;
        ensure!(called.stderr.is_empty(), "{name}: {called:?}");
    }
    // In a container it is not known: that is said.
    let contained = host.cgroup.join("runc-bpm-job.scope");
    fs::create_dir(&contained)?;
    let asked = host.script(&contained, "set -e; enforcer enable-monit-access");
    fs::remove_dir(&contained)?;
    let asked = asked?.demand(0)?;
    ensure!(asked.stderr.contains("from within this container"), "{asked:?}");
    let daemon = host.daemon()?;
    for (name, way) in &ways {
        let inside = host.inside(NOBODY)?;
        let there = host.outside(NOBODY)?.in_cgroup(&host.granted(name));
        fs::create_dir_all(host.granted(name))?;
        host.is_refused(&there)?;
        let called = host.calls(way)?;
        ensure!(called.stderr.is_empty(), "{name}: {called:?}");
        there.reaches()?;
        if host.granted(name) != host.cgroup {
            host.is_refused(&inside)?;
        }
        host.is_refused(&host.outside(NOBODY)?)?;
        // Again: the same grant.
        host.calls(way)?;
        ensure!(host.grants()?.len() == 1, "{name}: {:?}", host.grants()?);
        host.revoke_all()?;
    }
    // Who is not root may not ask.
    let asked = ran(host.world.enforcer_as(NOBODY)?.arg("enable-monit-access"))?.demand(0)?;
    ensure!(asked.stderr.contains("may not connect to monit"), "{asked:?}");
    host.is_refused(&host.inside(NOBODY)?)?;
    // The daemon is away, and the rules stay: it is waited for, and the caller goes on.
    daemon.kill()?;
    let started = Instant::now();
    let (_, command) = &ways[0];
    let called = host.calls(command)?;
    let took = started.elapsed();
    ensure!(called.stderr.contains("no daemon answers"), "{called:?}");
    ensure!(
        took > Duration::from_secs(4) && took < at_this_load(Duration::from_secs(10))?,
        "after {took:?}"
    );
    host.is_refused(&host.inside(NOBODY)?)?;
    // It comes back while it is waited for, on a machine that starts it within the time that callers wait.
    let mut daemon = None;
    until("a caller has waited for it", || {
        drop(daemon.take());
        let waiting = host.bash(&host.cgroup, command).stderr(Stdio::piped()).spawn()?;
        thread::sleep(Duration::from_millis(500));
        daemon = Some(host.daemon()?);
        let waited = waiting.wait_with_output()?;
        ensure!(waited.status.success(), "{waited:?}");
        Ok(waited.stderr.is_empty())
    })?;
    let daemon = daemon.context("no daemon")?;
    host.inside(NOBODY)?.reaches()?;
    host.is_refused(&host.outside(NOBODY)?)?;
    // What may not be granted is no reason to fail either.
    host.revoke_all()?;
    host.configure("", "")?;
    daemon.reload()?;
    let called = host.calls(command)?;
    ensure!(called.stderr.contains("may not be granted"), "{called:?}");
    host.is_refused(&host.inside(NOBODY)?)
}

fn b4_permit_moves_the_shell_that_calls_and_no_other() -> Result<()> {
    let host = Host::new("ebpf", "")?;
    let _daemon = host.daemon()?;
    let helper = host.bin().join("helper.sh").display().to_string();
    let text = format!("set -e; source {helper}; (permit_monit_access; cat /proc/self/cgroup); cat /proc/self/cgroup");
    let said = host.script(&host.cgroup, &text)?.demand(0)?.stdout;
    let cgroups: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("0::")).collect();
    let [inner, outer] = cgroups[..] else {
        anyhow::bail!("{said}")
    };
    ensure!(
        inner.ends_with("/child/monit-api-access") && outer.ends_with("/child"),
        "{said}"
    );
    // It and what it becomes are let in, called twice or not; who only runs beside it is not.
    let text = format!("set -e; source {helper}; permit_monit_access; permit_monit_access; exec cat /proc/self/cgroup");
    let said = host.script(&host.cgroup, &text)?.demand(0)?.stdout;
    ensure!(said.matches("monit-api-access").count() == 1, "{said}");
    let own = host.cgroup.join("monit-api-access");
    host.outside(NOBODY)?.in_cgroup(&own).reaches()?;
    host.is_refused(&host.inside(NOBODY)?)?;
    host.revoke_all()?;
    // A hierarchy that is covered is none: nothing is written elsewhere, and nothing wider is granted.
    let mount = cgroup_mount()?;
    let text = format!(
        "exec unshare --mount bash -c 'set -e; mount -t tmpfs tmpfs {0}; source {helper}; permit_monit_access; \
         echo went on; find {0} -mindepth 1'",
        mount.display()
    );
    let called = host.script(&host.cgroup, &text)?.demand(0)?;
    ensure!(called.stdout.trim() == "went on", "{called:?}");
    ensure!(called.stderr.contains("cgroup v2 is not mounted"), "{called:?}");
    ensure!(host.grants()?.is_empty(), "{:?}", host.grants()?);
    Ok(())
}

/// Who has made it first could freeze, kill or join what runs there.
fn f6_the_monit_helper_enters_no_users_cgroup() -> Result<()> {
    let host = Host::new("ebpf", "")?;
    let _daemon = host.daemon()?;
    let helper = host.bin().join("helper.sh").display().to_string();
    let trap = host.cgroup.join("monit-api-access");
    fs::create_dir(&trap)?;
    chown(&trap, Some(NOBODY), None)?;
    let text = format!("set -e; source {helper}; permit_monit_access; cat /proc/self/cgroup");
    let called = host.script(&host.cgroup, &text)?.demand(0)?;
    ensure!(called.stderr.contains("users other than root"), "{called:?}");
    ensure!(!called.stdout.contains("monit-api-access"), "{called:?}");
    ensure!(host.grants()?.is_empty(), "{:?}", host.grants()?);
    host.is_refused(&host.outside(NOBODY)?.in_cgroup(&trap))
}

/// Rules of jammy's let through by cgroup v1: a helper that replaces theirs must do what theirs did, or who asks is cut
/// off while both guard.
fn b4_permit_passes_rules_of_earlier_stemcells_too() -> Result<()> {
    let host = Host::new("ebpf", "")?;
    if !fs::read_to_string("/proc/cgroups")?.contains("\nnet_cls\t") {
        println!("    this kernel has no net_cls: no stemcell's rules can match by it");
        return Ok(());
    }
    let _alone = net_cls::ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mounted = net_cls::mounted()?;
    let _daemon = host.daemon()?;
    let helper = host.bin().join("helper.sh").display().to_string();
    let own = host.world.path("net_cls");
    let (place, mount) = match &mounted {
        Some(place) => (place, String::new()),
        None => (&own, format!("mount -t cgroup -o net_cls none {};", own.display())),
    };
    fs::create_dir(&own)?;
    let text = format!(
        "exec unshare --mount bash -c 'set -eu; cd /; {mount} source {helper}; echo $monit_isolation_classid; \
         permit_monit_access; \
         cat /proc/self/cgroup {0}/monit-api-access/net_cls.classid; \
         echo $$ > {0}/cgroup.procs; rmdir {0}/monit-api-access'",
        place.display()
    );
    let called = host.script(&host.cgroup, &text);
    if mounted.is_none() {
        net_cls::end(&own)?;
    }
    let called = called?.demand(0)?;
    ensure!(called.stderr.is_empty(), "{called:?}");
    let said = &called.stdout;
    ensure!(said.matches("2958295041").count() == 2, "{said}");
    let at = |hierarchy: &str| {
        let line = said.lines().find(|line| line.contains(hierarchy));
        line.is_some_and(|line| line.ends_with("/monit-api-access"))
    };
    ensure!(at("net_cls") && at("0::"), "{said}");
    let there = host.cgroup.join("monit-api-access");
    host.outside(NOBODY)?.in_cgroup(&there).reaches()?;
    host.is_refused(&host.inside(NOBODY)?)
}

/// A process by the name of one that supervises others, started by init.
pub(super) struct Supervisor(Pid);

impl Supervisor {
    pub(super) fn start(host: &Host, name: &str, cgroup: &Path) -> Result<Self> {
        let program = host.world.path(name);
        if !program.exists() {
            symlink("/bin/sleep", &program)?;
        }
        // Its parent ends.
        let text = format!("{} 600 </dev/null >/dev/null 2>&1 & echo $!", program.display());
        let started = host.script(cgroup, &text)?.demand(0)?;
        let this = Self(Pid::from_raw(started.stdout.trim().parse()?));
        let comm = format!("/proc/{}/comm", this.0);
        until("it runs", || Ok(fs::read_to_string(&comm)?.trim() == name))?;
        Ok(this)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let gone = || Ok(kill(self.0, None) == Err(Errno::ESRCH));
        let _ = until("it has ended", gone);
    }
}

fn b4_what_holds_a_supervisor_is_not_granted() -> Result<()> {
    let host = Host::new("ebpf", "")?;
    let _daemon = host.daemon()?;
    let path = path_of(&host.cgroup)?;
    let refused = |what: &str| -> Result<()> {
        for named in [vec![], vec!["--cgroup", path.as_str()]] {
            let asked = host.script(&host.cgroup, &format!("exec enforcer grant monit {}", named.join(" ")))?;
            let asked = asked.demand(2)?;
            ensure!(
                asked.stderr.contains(what) && asked.stderr.contains("--job JOB") && asked.stderr.contains("--user"),
                "{what}: {asked:?}"
            );
        }
        let asked = host.calls("set -e; enforcer enable-monit-access")?;
        ensure!(asked.stderr.contains(what), "{what}: {asked:?}");
        ensure!(host.grants()?.is_empty(), "{:?}", host.grants()?);
        host.is_refused(&host.inside(NOBODY)?)
    };
    let below = host.cgroup.join("below");
    fs::create_dir(&below)?;
    for (name, cgroup) in [("bosh-agent", &host.cgroup), ("monit", &below), ("runsv", &host.cgroup)] {
        let _supervisor = Supervisor::start(&host, name, cgroup)?;
        refused(&format!("{name} (pid"))?;
    }
    fs::remove_dir(&below)?;
    // Who only has such a name, as a client of monit's or a job of another user's, hides nothing.
    for user in [0, NOBODY] {
        let monit = host.world.path("monit").display().to_string();
        let text = format!("exec setpriv --reuid {user} --regid {user} --clear-groups {monit} 600");
        let mut client = host.bash(&host.cgroup, &text).spawn()?;
        let comm = format!("/proc/{}/comm", client.id());
        until("it runs", || Ok(fs::read_to_string(&comm)?.trim() == "monit"))?;
        let asked = host.script(&host.cgroup, "exec enforcer grant monit");
        client.kill()?;
        client.wait()?;
        asked?.demand(0)?;
        host.revoke_all()?;
    }
    // By the name of its unit, whatever runs there now.
    let unit = host.world.cgroup.join("monit.service");
    fs::create_dir(&unit)?;
    let asked = host.script(&unit, "exec enforcer grant monit");
    fs::remove_dir(&unit)?;
    let asked = asked?.demand(2)?;
    ensure!(
        asked.stderr.contains("everything that monit.service starts"),
        "{asked:?}"
    );
    // A user within it may be named.
    let _supervisor = Supervisor::start(&host, "monit", &host.cgroup)?;
    let named = format!("exec enforcer grant monit --user {NOBODY} --cgroup {path}");
    host.script(&host.cgroup, &named)?.demand(0)?;
    host.inside(NOBODY)?.reaches()?;
    host.is_refused(&host.outside(NOBODY)?)
}

/// Runs a script with files of BOSH's in a `/var/vcap` of its own, which holds a copy of a directory.
pub(super) fn with_vcap(host: &Host, vcap: &Path, cgroup: &Path, text: &str) -> Result<Ran> {
    let text = format!(
        "exec unshare --mount bash -c 'set -e; mount -t tmpfs tmpfs /mnt; mkdir /mnt/local; mount --rbind /var/local \
         /mnt/local; \
         cp -r {} /mnt/vcap; mount --move /mnt /var; {text}'",
        vcap.display()
    );
    host.script(cgroup, &text)
}

fn b4_a_pre_start_is_granted_its_jobs_container() -> Result<()> {
    let host = Host::new("ebpf", "[dns]\nretain = \"1s\"")?;
    let _daemon = host.daemon()?;
    let _agent = Supervisor::start(&host, "bosh-agent", &host.cgroup)?;
    let vcap = host.world.path("vcap");
    let name = host.world.name().to_owned();
    for (job, config) in [(name.as_str(), "bpm.yml"), ("plain", "other.yml")] {
        let dir = vcap.join("jobs").join(job);
        fs::create_dir_all(dir.join("config"))?;
        fs::create_dir_all(dir.join("bin"))?;
        fs::write(dir.join("config").join(config), "")?;
        write_script(
            &dir.join("bin/pre-start"),
            "#!/bin/bash\nset -e\nenforcer enable-monit-access\necho went on\n",
        )?;
    }
    let runs = |job: &str| {
        let ran = with_vcap(
            &host,
            &vcap,
            &host.cgroup,
            &format!("/var/vcap/jobs/{job}/bin/pre-start"),
        )?;
        let ran = ran.demand(0)?;
        ensure!(ran.stdout.contains("went on"), "{ran:?}");
        Ok(ran)
    };
    let plain = runs("plain")?;
    ensure!(
        plain.stderr.contains("bosh-agent") && plain.stderr.contains("--job"),
        "{plain:?}"
    );
    ensure!(host.grants()?.is_empty(), "{:?}", host.grants()?);
    for _ in 0..2 {
        let ran = runs(&name)?;
        ensure!(ran.stderr.is_empty(), "{ran:?}");
        // Both names that BPM has had for it, as it is started from monit.
        let grants = host.grants()?;
        for scope in ["runc-bpm", "monit-service-bpm-bpm"] {
            let expected = format!("/system.slice/{scope}-{name}.scope");
            ensure!(
                grants.iter().any(|grant| grant["cgroup"] == expected.as_str()),
                "{expected}: {grants:?}"
            );
        }
        ensure!(grants.len() == 5, "{grants:?}");
    }
    // It may run later than what its askers' own cgroups are kept for.
    thread::sleep(Duration::from_secs(4));
    ensure!(host.grants()?.len() == 5, "{:?}", host.grants()?);
    // Nobody who runs beside the agent.
    host.is_refused(&host.inside(NOBODY)?)
}

/// A cgroup at the root of the hierarchy, and what of its path was missing; removed at the end.
struct Made(Vec<PathBuf>);

impl Made {
    fn at(path: &str) -> Result<Self> {
        let mut at = cgroup_mount()?;
        let mut made = Self(Vec::new());
        for part in path.split('/').filter(|part| !part.is_empty()) {
            at.push(part);
            if !at.exists() {
                fs::create_dir(&at)?;
                made.0.push(at.clone());
            }
        }
        Ok(made)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        while let Some(dir) = self.0.pop() {
            let _ = fs::remove_dir(dir);
        }
    }
}

fn b4_a_jobs_container_is_granted_before_it_runs() -> Result<()> {
    // With nftables a cgroup anywhere in the hierarchy is evaluated, not only one below the world's.
    let host = Host::new("nftables", "")?;
    let daemon = host.daemon()?;
    let job = host.world.name();
    let scopes = ["runc-bpm", "monit-service-bpm-bpm"].map(|begin| format!("/system.slice/{begin}-{job}.scope"));
    let within = |scope: &str| -> Result<Attack> {
        let dir = cgroup_mount()?.join(scope.trim_start_matches('/'));
        Ok(host.outside(NOBODY)?.in_cgroup(&dir))
    };
    host.enforcer(&["grant", "monit", "--job", job])?.demand(0)?;
    let outside = host.outside(NOBODY)?;
    host.is_refused(&outside)?;
    for scope in [&scopes[0], &scopes[1], &scopes[0]] {
        let _made = Made::at(scope)?;
        let attack = within(scope)?;
        until("the job is let in once it runs", || Ok(attack.run()?.errno.is_none()))?;
        host.is_refused(&outside)?;
    }
    // It is kept over a restart, and ends with its own name.
    daemon.kill()?;
    let _daemon = host.daemon()?;
    let _made = Made::at(&scopes[1])?;
    let attack = within(&scopes[1])?;
    until("the job is let in again", || Ok(attack.run()?.errno.is_none()))?;
    host.enforcer(&["revoke", "monit", "--job", job])?.demand(0)?;
    host.is_refused(&attack)?;
    // A name is a name, whatever is in it.
    for odd in ["../..", "a/b", "", "é b\n"] {
        host.enforcer(&["grant", "monit", "--job", odd])?.demand(0)?;
        let grants = host.grants()?;
        let cgroup = grants[0]["cgroup"].as_str().context("no cgroup")?;
        ensure!(
            cgroup.starts_with("/system.slice/") && cgroup.contains("bpm-") && cgroup.matches('/').count() == 2,
            "{odd:?}: {cgroup}"
        );
        host.revoke_all()?;
    }
    for several in [["--job", "a", "--cgroup", "/b"], ["--job", "a", "--pid", "1"]] {
        host.enforcer(&[&["grant", "monit"], &several[..]].concat())?
            .demand(2)?;
    }
    Ok(())
}

fn b4_wrappers_of_stemcells_need_no_grant() -> Result<()> {
    let host = Host::new("ebpf", "")?;
    let _daemon = host.daemon()?;
    let vcap = host.world.path("vcap");
    fs::create_dir_all(vcap.join("bosh/bin"))?;
    let helper = host.bin().join("helper.sh").display().to_string();
    // As on jammy: what it becomes starts every job.
    write_script(
        &vcap.join("bosh/bin/monit"),
        &format!("#!/bin/bash\nset -e\nsource {helper}\npermit_monit_access\nexec cat /proc/self/cgroup\n"),
    )?;
    let text = "for call in {1..20}; do /var/vcap/bosh/bin/monit summary; done";
    let called = with_vcap(&host, &vcap, &host.cgroup, text)?.demand(0)?;
    ensure!(called.stderr.is_empty(), "{called:?}");
    ensure!(
        called.stdout.matches("0::").count() == 20 && !called.stdout.contains("monit-api-access"),
        "{called:?}"
    );
    ensure!(host.grants()?.is_empty(), "{:?}", host.grants()?);
    host.is_refused(&host.inside(NOBODY)?)?;
    // The same text as a job's own script is let in, and no more than it.
    write_script(
        &vcap.join("bosh/bin/other"),
        &format!("#!/bin/bash\nset -e\nsource {helper}\npermit_monit_access\nexec cat /proc/self/cgroup\n"),
    )?;
    let called = with_vcap(&host, &vcap, &host.cgroup, "/var/vcap/bosh/bin/other")?.demand(0)?;
    ensure!(called.stdout.contains("monit-api-access"), "{called:?}");
    ensure!(host.grants()?.len() == 1, "{:?}", host.grants()?);
    host.is_refused(&host.inside(NOBODY)?)?;
    // By the name of a user, whoever calls.
    host.enforcer(&["enable-monit-access", &NOBODY.to_string()])?
        .demand(0)?;
    host.outside(NOBODY)?.reaches()
}

fn b4_grants_of_cgroups_long_gone_are_dropped() -> Result<()> {
    let host = Host::new("ebpf", "[dns]\nretain = \"5s\"")?;
    let daemon = host.daemon()?;
    let world = &host.world;
    let grant = |cgroup: &Path| -> Result<()> { host.script(cgroup, "exec enforcer grant monit")?.demand(0).map(drop) };
    let session = |number: usize| world.cgroup.join(format!("session-{number}"));
    let named = world.cgroup.join("nightly");
    fs::create_dir(&named)?;
    host.enforcer(&["grant", "monit", "--cgroup", &path_of(&named)?])?
        .demand(0)?;
    grant(&host.cgroup)?;
    for number in 0..8 {
        fs::create_dir(session(number))?;
        grant(&session(number))?;
    }
    ensure!(host.grants()?.len() == 10, "{:?}", host.grants()?);
    for number in 1..8 {
        fs::remove_dir(session(number))?;
    }
    fs::remove_dir(&named)?;
    until("what is gone is dropped", || Ok(host.grants()?.len() == 3))?;
    let log = daemon.log();
    ensure!(log.matches("is dropped").count() == 7, "{log}");
    // What is there keeps its grant, and what was named, whether it is there or not.
    fs::create_dir(&named)?;
    for kept in [session(0), host.cgroup.clone(), named] {
        let attack = host.outside(NOBODY)?.in_cgroup(&kept);
        until("it is let in", || Ok(attack.run()?.errno.is_none()))?;
    }
    // Made again after that, nobody is let in: it may be another's.
    fs::create_dir(session(7))?;
    host.is_refused(&host.outside(NOBODY)?.in_cgroup(&session(7)))
}
