//! B4, B5: jobs in containers as BPM has a real runc make them: what they see of the host, and how they are let in to
//! monit.

mod matrix;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};

use super::{
    Case, case,
    jobs::{HELPER, Host},
    jobs_chain::{self, CHAIN, agent_starts, give_up_soon},
    with_each,
};
use crate::{
    backend::EBPF,
    world::{Attack, NOBODY, Netns, Ran, World, at_this_load, cgroup_mount, copy_binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    let mut all: Vec<Case> = Vec::new();
    for backend in ["ebpf", "nftables", "both"] {
        all.extend([
            case(&format!("b4_bpm_a_container_lets_itself_in_{backend}"), move || {
                lets_itself_in(backend)
            }),
            case(&format!("b4_bpm_matrix_{backend}"), move || matrix::matrix(backend)).long(),
        ]);
    }
    all.extend([
        case!(b4_bpm_a_container_without_rights_is_told),
        case!(b4_bpm_two_containers_at_once),
    ]);
    // Each says itself what enforces: one run has them all.
    all.into_iter().map(|case| case.on(EBPF)).collect()
}

/// Where monit is, which containers know without a configuration.
const MONIT: u16 = 2822;
/// What BPM gives a container where a job's `bpm.yml` asks for it.
const NET_ADMIN: &[&str] = &["CAP_NET_ADMIN"];
/// runc with version 2 of cgroups alone, at its place, as stemcells have it: where a host has it beside version 1, runc
/// would make groups of that, and containers would see the whole of both.
const RUNC: &str = "mount --bind \"$1\" /sys/fs/cgroup && shift && exec runc \"$@\"";
/// The programs that containers see.
const ATTACK: &str = "/var/vcap/packages/attack/attack";
const ETC: &str = "/var/vcap/bosh/etc";

/// A host with monit at its own port, and the cgroups of its services where systemd has them.
struct Bosh {
    host: Host,
    backend: &'static str,
    _slice: Slice,
}

/// The cgroup that containers of BPM's are in, which cases share.
struct Slice(PathBuf);

impl Drop for Slice {
    fn drop(&mut self) {
        // Stays where it has others in it.
        let _ = fs::remove_dir(&self.0);
    }
}

impl Bosh {
    fn new(backend: &'static str) -> Result<Self> {
        let slice = Slice(cgroup_mount()?.join("system.slice"));
        let mut world = World::new()?;
        fs::remove_dir(&world.cgroup)?;
        world.cgroup = slice.0.join(world.name());
        // Another case may be about to remove the slice.
        until("a cgroup is made", || Ok(fs::create_dir_all(&world.cgroup).is_ok()))?;
        world.port = MONIT;
        let host = Host::of(world, slice.0.clone(), backend, "")?;
        give_up_soon(&host.netns)?;
        let etc = host.world.path("etc");
        fs::create_dir(&etc)?;
        copy_binary("enforcer", &etc.join("bosh-enable-monit-access"))?;
        fs::hard_link(etc.join("bosh-enable-monit-access"), etc.join("enforcer"))?;
        fs::copy(HELPER, etc.join("monit-access-helper.sh"))?;
        fs::copy(host.world.path("enforcer.toml"), etc.join("enforcer.toml"))?;
        let attack = host.world.path("attack");
        fs::create_dir(&attack)?;
        copy_binary("attack", &attack.join("attack"))?;
        Ok(Self {
            host,
            backend,
            _slice: slice,
        })
    }

    /// The name of a job that no other case has.
    fn job(&self, name: &str) -> String {
        format!("{}_{name}", self.host.world.name())
    }

    /// What runc is given first: the hierarchy to see, and where it keeps what it knows.
    fn places(&self) -> Result<[String; 3]> {
        let root = self.host.world.path("runc").display().to_string();
        Ok([cgroup_mount()?.display().to_string(), "--root".to_owned(), root])
    }

    fn chain(&self) -> Result<String> {
        self.host.netns.nft(&format!("list chain {CHAIN}"))
    }

    fn rules(&self) -> Result<usize> {
        Ok(self.chain()?.matches("accept").count())
    }
}

/// The cgroup of a job's container.
fn scope(job: &str) -> Result<PathBuf> {
    Ok(cgroup_mount()?.join(format!("system.slice/runc-bpm-{job}.scope")))
}

/// A container as BPM makes it; removed when dropped.
struct Container<'a> {
    bosh: &'a Bosh,
    name: String,
    job: String,
}

impl<'a> Container<'a> {
    fn start(bosh: &'a Bosh, name: &str, user: u32, capabilities: &[&str]) -> Result<Self> {
        let job = bosh.job(name);
        let this = Self {
            bosh,
            name: format!("bpm-{job}"),
            job,
        };
        let bundle = bosh.host.world.path(&this.name);
        fs::create_dir_all(bundle.join("rootfs"))?;
        let spec = this.spec(user, capabilities)?;
        fs::write(bundle.join("config.json"), spec.to_string())?;
        let log = bundle.join("log");
        let mut run = this.runc()?;
        run.args(["run", "--detach", "--bundle"]).arg(&bundle).arg(&this.name);
        let files = [File::create(&log)?, File::options().append(true).open(&log)?];
        let [out, err] = files.map(Stdio::from);
        // Not by a pipe, which the container would hold open.
        let status = run.stdin(Stdio::null()).stdout(out).stderr(err).status()?;
        ensure!(status.success(), "runc: {}", fs::read_to_string(&log)?);
        Ok(this)
    }

    /// As the adapter of BPM 1.4 writes it, without its filter of system calls; and what stemcells add, so that jobs
    /// may call the agent's helper. Its network and cgroup namespaces are the host's.
    fn spec(&self, user: u32, capabilities: &[&str]) -> Result<Value> {
        let bind = |from: &str, to: &str, bind: &str| {
            let options = [bind, "nosuid", "nodev", "ro"];
            json!({ "destination": to, "source": from, "type": "bind", "options": options })
        };
        let mut mounts = vec![
            json!({ "destination": "/proc", "type": "proc", "source": "proc" }),
            json!({
                "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "noexec", "mode=755", "size=65536k"],
            }),
            json!({
                "destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"],
            }),
        ];
        let own = ["/bin", "/etc", "/lib", "/lib64", "/sbin", "/usr"];
        let own = own.into_iter().filter(|dir| Path::new(dir).exists());
        mounts.extend(own.map(|dir| bind(dir, dir, "bind")));
        mounts.push(bind("/sys/fs/cgroup", "/sys/fs/cgroup", "rbind"));
        let world = &self.bosh.host.world;
        let attack = Path::new(ATTACK)
            .parent()
            .context("no directory")?
            .display()
            .to_string();
        mounts.push(bind(&world.path("etc").display().to_string(), ETC, "bind"));
        mounts.push(bind(&world.path("attack").display().to_string(), &attack, "bind"));
        let namespaces = ["ipc", "mount", "uts", "pid"].map(|kind| json!({ "type": kind }));
        Ok(json!({
            "ociVersion": "1.0.2",
            "root": { "path": "rootfs" },
            "process": {
                "user": { "uid": user, "gid": user },
                "args": ["/bin/sleep", "600"],
                "env": [format!("PATH={ETC}:/usr/bin:/usr/sbin:/bin:/sbin")],
                "cwd": "/",
                "noNewPrivileges": true,
                // The effective ones follow from these.
                "capabilities": {
                    "ambient": capabilities, "bounding": capabilities,
                    "inheritable": capabilities, "permitted": capabilities,
                },
            },
            "mounts": mounts,
            "linux": {
                "cgroupsPath": format!("/system.slice/runc-bpm-{}.scope", self.job),
                "namespaces": namespaces,
                "rootfsPropagation": "private",
                "maskedPaths": ["/etc/sv", "/proc/kcore", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        }))
    }

    fn runc(&self) -> Result<Command> {
        let mut command = self.bosh.host.netns.command(Path::new("unshare"));
        command
            .args(["--mount", "sh", "-c", RUNC, "sh"])
            .args(self.bosh.places()?);
        Ok(command)
    }

    /// Runs a script in it, as its own user.
    fn script(&self, text: &str) -> Result<Ran> {
        ran(self.runc()?.arg("exec").arg(&self.name).args(["bash", "-c", text]))
    }

    /// Asks for monit, as the agent's helper is asked.
    fn asks(&self) -> Result<Ran> {
        self.script(&format!("set -e; {ETC}/bosh-enable-monit-access; echo went on"))
    }

    /// Asks, is not held up, and hears nothing.
    fn asks_in_silence(&self) -> Result<()> {
        let asked = self.asks()?.demand(0)?;
        ensure!(asked.stdout == "went on\n" && asked.stderr.is_empty(), "{asked:?}");
        Ok(())
    }

    /// An attempt from within by a user who may nothing.
    fn attack(&self) -> Result<Attack> {
        let net = format!("--net={}", self.bosh.host.netns.file().display());
        let user = format!("{NOBODY}:{NOBODY}");
        let [mount, option, root] = self.bosh.places()?;
        let words = [
            "nsenter", &net, "--", "unshare", "--mount", "sh", "-c", RUNC, "sh", &mount, &option, &root, "exec",
            "--user", &user, &self.name,
        ];
        let attack = self.bosh.host.outside(NOBODY)?.anywhere().flag("--as-is");
        Ok(attack.program(&words, ATTACK.into()))
    }

    /// Ends it, and its cgroup with it.
    fn end(&self) -> Result<()> {
        let ended = ran(self.runc()?.args(["delete", "--force", &self.name]))?;
        ended.demand(0)?;
        let scope = scope(&self.job)?;
        ensure!(!scope.exists(), "{} is left", scope.display());
        Ok(())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn comes_in(attack: &Attack) -> Result<()> {
    let took = jobs_chain::comes_in("it is let in", attack)?;
    // 100 ms until the daemon has read the rule, and what starting an attempt takes.
    let limit = at_this_load(Duration::from_secs(1))?;
    ensure!(took <= limit, "{attack:?}: let in after {took:?}, more than {limit:?}");
    Ok(())
}

fn lets_itself_in(backend: &'static str) -> Result<()> {
    let bosh = Bosh::new(backend)?;
    let host = &bosh.host;
    let outside = host.outside(NOBODY)?;
    let other = Container::start(&bosh, "other", 0, NET_ADMIN)?;
    // As root, and as BPM runs nearly every job: as a user with the capability that its `bpm.yml` names.
    let mut containers = vec![Container::start(&bosh, "root", 0, NET_ADMIN)?];
    containers.push(Container::start(&bosh, "user", NOBODY, NET_ADMIN)?);
    for container in containers.iter().chain([&other]) {
        container.attack()?.reaches()?;
        // It sees neither the daemon nor what it pins.
        let seen = container.script("ls /run /sys/fs/bpf/*; cat /proc/self/cgroup")?;
        let own = format!("0::/system.slice/runc-bpm-{}.scope\n", container.job);
        ensure!(
            seen.stdout.ends_with(&own) && seen.stdout.lines().all(|line| line.contains(':')),
            "{seen:?}"
        );
    }
    let _daemon = host.daemon()?;
    for container in containers {
        let inside = container.attack()?;
        host.is_refused(&inside)?;
        host.is_refused(&outside)?;
        ensure!(bosh.rules()? == 0, "{}", bosh.chain()?);
        container.asks_in_silence()?;
        comes_in(&inside)?;
        for refused in [&outside, &other.attack()?] {
            host.is_refused(refused)?;
        }
        // Again: the same rule.
        container.asks_in_silence()?;
        for way in [
            format!("source {ETC}/monit-access-helper.sh; permit_monit_access"),
            // Where it sees the configuration.
            format!("{ETC}/bosh-enable-monit-access --config {ETC}/enforcer.toml"),
        ] {
            let asked = container.script(&format!("set -e; {way}"))?.demand(0)?;
            ensure!(asked.stderr.is_empty(), "{asked:?}");
        }
        ensure!(bosh.rules()? == 1, "{}", bosh.chain()?);
        inside.reaches()?;
        ensure!(host.grants()?.is_empty(), "{:?}", host.grants()?);
        host.enforcer(&["verify"])?.demand(0)?;
        // The next container of the job has another cgroup by the same name.
        container.end()?;
        until("its rule goes with it", || Ok(bosh.rules()? == 0))?;
        let (name, user) = if container.job.ends_with("user") {
            ("user", NOBODY)
        } else {
            ("root", 0)
        };
        let next = Container::start(&bosh, name, user, NET_ADMIN)?;
        host.is_refused(&next.attack()?)?;
        next.asks_in_silence()?;
        comes_in(&next.attack()?)?;
        drop(next);
        until("its rule goes with it", || Ok(bosh.rules()? == 0))?;
    }
    host.is_refused(&outside)
}

fn b4_bpm_a_container_without_rights_is_told() -> Result<()> {
    for backend in ["ebpf", "nftables"] {
        let bosh = Bosh::new(backend)?;
        let host = &bosh.host;
        let container = Container::start(&bosh, "user", NOBODY, &[])?;
        container.attack()?.reaches()?;
        let _daemon = host.daemon()?;
        let asked = container.asks()?.demand(0)?;
        ensure!(asked.stdout == "went on\n", "{asked:?}");
        for word in [
            "CAP_NET_ADMIN",
            "on the host run enforcer grant monit --job JOB",
            "may not connect to monit",
        ] {
            ensure!(asked.stderr.contains(word), "{word}: {asked:?}");
        }
        ensure!(bosh.rules()? == 0, "{}", bosh.chain()?);
        host.is_refused(&container.attack()?)?;
        host.is_refused(&host.outside(NOBODY)?)?;
        // What it was told helps, now and for the next one.
        host.enforcer(&["grant", "monit", "--job", &container.job])?.demand(0)?;
        container.attack()?.reaches()?;
        host.is_refused(&host.outside(NOBODY)?)?;
        drop(container);
        let next = Container::start(&bosh, "user", NOBODY, &[])?;
        comes_in(&next.attack()?)?;
        host.is_refused(&host.outside(NOBODY)?)?;
        // And beside the agent's rules, which were there first or come later.
        drop(next);
        agent_starts(&host.netns, MONIT)?;
        let next = Container::start(&bosh, "user", NOBODY, &[])?;
        let inside = next.attack()?;
        until("it passes both", || Ok(inside.run()?.errno.is_none()))?;
        let outside = host.outside(NOBODY)?.run()?;
        ensure!(outside.errno.is_some(), "the agent's rules have let somebody in");
    }
    Ok(())
}

fn b4_bpm_two_containers_at_once() -> Result<()> {
    let bosh = Bosh::new("both")?;
    let host = &bosh.host;
    let start = |name: &str| Container::start(&bosh, name, 0, NET_ADMIN);
    let (one, two, other) = (start("one")?, start("two")?, start("other")?);
    let daemon = host.daemon()?;
    // Nor does it matter what else changes nftables meanwhile.
    for _ in 0..8 {
        host.netns.nft(&format!("flush chain {CHAIN}"))?;
        while_others_write(&host.netns, || with_each([&one, &two], Container::asks_in_silence))?;
        ensure!(bosh.rules()? == 2, "{}", bosh.chain()?);
    }
    for container in [&one, &two] {
        comes_in(&container.attack()?)?;
    }
    with_each([&one, &two], Container::asks_in_silence)?;
    ensure!(bosh.rules()? == 2, "{}", bosh.chain()?);
    host.is_refused(&other.attack()?)?;
    host.is_refused(&host.outside(NOBODY)?)?;
    // One ends, and the other goes on.
    drop(one);
    until("its rule goes with it", || Ok(bosh.rules()? == 1))?;
    two.attack()?.reaches()?;
    host.is_refused(&other.attack()?)?;
    host.is_refused(&host.outside(NOBODY)?)?;
    // One ends while there is no daemon, and comes back before there is one.
    daemon.kill()?;
    drop(two);
    let two = start("two")?;
    let _daemon = host.daemon()?;
    host.is_refused(&two.attack()?)?;
    until("its rule goes with it", || Ok(bosh.rules()? == 0))
}

/// Does something while other tables come and go.
fn while_others_write(netns: &Netns, act: impl FnOnce() -> Result<()>) -> Result<()> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let write = || -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                netns.nft("add table inet other; delete table inet other")?;
            }
            Ok(())
        };
        let others = scope.spawn(write);
        let acted = act();
        done.store(true, Ordering::Relaxed);
        others.join().map_err(|_| anyhow!("a part of the case panicked"))??;
        acted
    })
}
