//! B1, B2: a BOSH agent's settings come late, are replaced, damaged and taken away; what they name is protected all the
//! while.

mod forms;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use super::{Case, with_each};
use crate::backend::EBPF;
use crate::world::{Daemon, Listener, NOBODY, Netns, World, binary, cgroup_mount, ran, until};

const SECRET: &str = "hunter2secret";
/// Within which a change of the settings is active.
const SOON: Duration = Duration::from_secs(1);

pub(super) fn cases() -> Vec<Case> {
    // With nftables all instances of a network namespace share one table with the agent (B5): `cases/monit.rs` and
    // `cases/dropin.rs` have that.
    let cases = [
        case!(b1_without_any_configuration_monit_and_the_bus_are_protected),
        case!(b1_a_configured_target_replaces_ours),
        case!(b2_settings_that_come_late_and_are_replaced),
        case!(b2_bad_settings_leave_active_what_is),
        case!(b2_create_env_has_no_bus),
        case!(b2_n7_the_last_bus_known_is_protected_after_a_reboot),
        case!(b2_credentials_appear_nowhere),
    ];
    let cases = cases.into_iter().map(|case| case.on(EBPF));
    cases.chain(forms::cases()).collect()
}

/// A world with settings to come in a directory of its own.
struct Agent {
    world: World,
    _listener: Listener,
}

impl Agent {
    fn new(more: &str) -> Result<Self> {
        let world = World::new()?;
        let listener = world.listen()?;
        let dir = world.path("vcap/bosh");
        world.configure(&format!("{more}[bosh]\ndir = {:?}\n", dir.display().to_string()))?;
        Ok(Self {
            world,
            _listener: listener,
        })
    }

    fn dir(&self) -> PathBuf {
        self.world.path("vcap/bosh")
    }

    fn url(&self, last: u8) -> String {
        format!("nats://me:{SECRET}@{}", self.bus(last))
    }

    /// One of several addresses of this world.
    fn bus(&self, last: u8) -> SocketAddr {
        SocketAddr::new(Ipv4Addr::new(127, 200, 0, last).into(), self.world.port)
    }

    fn mbus(&self, last: u8) -> String {
        format!("{{\"agent_id\":\"x\",\"mbus\":{:?}}}", self.url(last))
    }

    /// Puts a file in place as the agent does, by rename.
    fn put(&self, file: &str, text: impl AsRef<[u8]>) -> Result<()> {
        let path = self.dir().join(file);
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
        let aside = self.world.path("aside");
        fs::write(&aside, text)?;
        Ok(fs::rename(aside, path)?)
    }

    fn denied(&self, last: u8) -> Result<bool> {
        let checked = self.world.enforcer(&["check", "nobody", &self.bus(last).to_string()])?;
        Ok(checked.code == 1)
    }

    /// Waits until an address is protected, and demands that it took no longer than a change may. The time includes
    /// that of the question.
    fn soon(&self, last: u8, what: &str) -> Result<()> {
        let started = Instant::now();
        until(what, || self.denied(last))?;
        let took = started.elapsed();
        println!("    {what}: active after {took:?}");
        let asked = Instant::now();
        self.denied(last)?;
        ensure!(took < SOON + asked.elapsed() * 3, "{what}: only after {took:?}");
        Ok(())
    }

    fn causes(&self) -> Result<String> {
        let status = self.world.status()?;
        Ok(format!("{} {}", status["state"], status["causes"]))
    }

    fn daemon(&self) -> Result<Daemon> {
        self.world.daemon()
    }

    /// The first of its buses is known, and protected.
    fn daemon_with_a_bus(&self) -> Result<Daemon> {
        self.put("settings.json", self.mbus(1))?;
        let daemon = self.daemon()?;
        self.world.attack(NOBODY).to(self.bus(1)).is_refused()?;
        Ok(daemon)
    }

    /// Waits for a cause that says this of settings made bad, and demands that it is logged once and the first bus
    /// protected still.
    fn logs_once(&self, daemon: &Daemon, what: &str, says: &str) -> Result<()> {
        until(what, || Ok(self.causes()?.contains(says))).map_err(|error| error.context(daemon.log()))?;
        thread::sleep(Duration::from_millis(1200));
        let log = daemon.log();
        ensure!(self.causes()?.contains("degraded"), "{what}: {}", self.causes()?);
        ensure!(
            log.matches(says).count() == 1,
            "{what} was logged another number of times: {log}"
        );
        self.world.attack(NOBODY).to(self.bus(1)).is_refused()?;
        self.world.attack(0).to(self.bus(1)).reaches()
    }
}

fn b2_settings_that_come_late_and_are_replaced() -> Result<()> {
    let agent = Agent::new("")?;
    let attack = |last| agent.world.attack(NOBODY).to(agent.bus(last));
    attack(1).reaches()?;
    let daemon = agent.daemon()?;
    let causes = agent.causes()?;
    ensure!(
        causes.contains("degraded") && causes.contains("message bus not known yet"),
        "{causes}"
    );
    attack(1).reaches()?;
    agent.put("settings.json", agent.mbus(1))?;
    agent.soon(1, "settings that come late")?;
    attack(1).is_refused()?;
    agent.world.attack(0).to(agent.bus(1)).reaches()?;
    ensure!(agent.world.status()?["state"] == "enforcing", "{}", agent.causes()?);
    agent.put("settings.json", agent.mbus(2))?;
    agent.soon(2, "settings that are replaced")?;
    ensure!(!agent.denied(1)?, "the bus before is protected still");
    agent.put("settings/settings.json", agent.mbus(3))?;
    agent.soon(3, "settings in the directory below")?;
    let env = format!(
        "{{\"mbus\":{:?},\"env\":{{\"bosh\":{{\"mbus\":{{\"urls\":[{:?},{:?}]}}}}}}}}",
        agent.url(1),
        agent.url(4),
        agent.url(5)
    );
    agent.put("settings/settings.json", &env)?;
    agent.soon(5, "URLs of the environment")?;
    ensure!(
        agent.denied(4)? && agent.denied(1)? && !agent.denied(3)?,
        "not the union of a file's own"
    );
    let update = format!("{{\"mbus\":{{\"urls\":[{:?}]}}}}", agent.url(6));
    agent.put("update_settings.json", &update)?;
    agent.soon(6, "an update's settings")?;
    ensure!(agent.denied(4)? && agent.denied(1)?, "not the union of both files");
    // The whole directory goes at once, as a tmpfs does, and comes again.
    let gone = agent.world.path("gone");
    fs::rename(agent.world.path("vcap"), &gone)?;
    fs::remove_dir_all(gone)?;
    until("it is told", || Ok(agent.causes()?.contains("not known yet")))?;
    for last in [1, 4, 6] {
        attack(last).is_refused()?;
    }
    // One of them alone takes nothing away: the other may come yet.
    agent.put("update_settings.json", &update)?;
    thread::sleep(Duration::from_millis(300));
    attack(4).is_refused()?;
    fs::remove_file(agent.dir().join("update_settings.json"))?;
    agent.put("settings/settings.json", agent.mbus(7))?;
    agent.soon(7, "a directory that is made again")?;
    attack(7).is_refused()?;
    attack(4).reaches()?;
    ensure!(agent.world.status()?["state"] == "enforcing", "{}", daemon.log());
    Ok(())
}

/// Each in a world of its own, in place of good settings; then several in turn.
fn b2_bad_settings_leave_active_what_is() -> Result<()> {
    let agent = Agent::new("")?;
    let whole = agent.mbus(2);
    let half = whole.get(..whole.len() / 2).unwrap_or_default();
    let huge = format!("{{\"x\":\"{}\"}}", "x".repeat(9 << 20));
    let no_port = format!("{{\"mbus\":\"nats://me:{SECRET}@127.200.0.2:x\"}}");
    let texts = [
        ("a file cut short", half, "settings.json: invalid or incomplete JSON"),
        ("no JSON", "never mind", "settings.json: invalid or incomplete JSON"),
        ("nothing", "", "settings.json: invalid or incomplete JSON"),
        ("another kind", "{\"mbus\":[1]}", "mbus[0] is a number"),
        ("no port", &no_port, "the port is not a number"),
        ("too much", &huge, "8 MiB"),
        ("no bus", "{}", "names a message bus"),
    ];
    with_each(texts, |(what, text, says)| {
        let agent = Agent::new("")?;
        let daemon = agent.daemon_with_a_bus()?;
        agent.put("settings.json", text)?;
        agent.logs_once(&daemon, what, says)
    })?;
    let daemon = agent.daemon_with_a_bus()?;
    let told = |what: &str, says: &str| agent.logs_once(&daemon, what, says);
    let path = agent.dir().join("settings.json");
    fs::remove_file(&path)?;
    ran(Command::new("mkfifo").arg(&path))?.demand(0)?;
    told("a FIFO", "settings.json: not a regular file")?;
    fs::remove_file(&path)?;
    symlink(agent.world.path("elsewhere"), &path)?;
    told("a link", "symbolic link")?;
    let aside = agent.world.path("aside");
    fs::write(&aside, &whole)?;
    fs::set_permissions(&aside, fs::Permissions::from_mode(0o666))?;
    fs::rename(&aside, &path)?;
    told("a file that anybody can write", "mode 0666")?;
    ensure!(!agent.denied(2)?, "a file that anybody can write is believed");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    agent.soon(2, "good settings again")?;
    until("good settings clear the fault", || {
        Ok(agent.world.status()?["state"] == "enforcing")
    })?;
    // Written in place, piece by piece: never less protected than before.
    for length in [1, 20, whole.len() - 2] {
        fs::write(&path, whole.get(..length).unwrap_or_default())?;
        thread::sleep(Duration::from_millis(150));
        agent.world.attack(NOBODY).to(agent.bus(2)).is_refused()?;
    }
    fs::write(&path, &whole)?;
    until("all is well", || Ok(agent.world.status()?["state"] == "enforcing"))
}

fn b2_create_env_has_no_bus() -> Result<()> {
    let agent = Agent::new("")?;
    agent.put(
        "settings.json",
        format!("{{\"mbus\":\"https://me:{SECRET}@0.0.0.0:6868\"}}"),
    )?;
    let daemon = agent.daemon()?;
    ensure!(agent.world.status()?["state"] == "enforcing", "{}", agent.causes()?);
    ensure!(!daemon.log().contains(SECRET), "{}", daemon.log());
    Ok(())
}

fn b1_a_configured_target_replaces_ours() -> Result<()> {
    let agent = Agent::new("")?;
    agent.put("settings.json", agent.mbus(1))?;
    let toml = agent.world.path("enforcer.toml");
    let text = fs::read_to_string(&toml)?;
    fs::write(
        &toml,
        format!(
            "{text}[target.nats]\nendpoints = [\"tcp://{}\"]\nallow = [{NOBODY}]\n",
            agent.bus(9)
        ),
    )?;
    let _daemon = agent.daemon()?;
    ensure!(agent.world.status()?["state"] == "enforcing", "{}", agent.causes()?);
    agent.world.attack(0).to(agent.bus(9)).is_refused()?;
    agent.world.attack(NOBODY).to(agent.bus(9)).reaches()?;
    agent.world.attack(NOBODY).to(agent.bus(1)).reaches()?;
    let monit = agent.world.enforcer(&["check", "nobody", "127.0.0.1:2822"])?;
    ensure!(monit.code == 1, "monit is open: {monit:?}");
    Ok(())
}

fn b2_n7_the_last_bus_known_is_protected_after_a_reboot() -> Result<()> {
    let agent = Agent::new("")?;
    agent.put("settings/settings.json", agent.mbus(1))?;
    let daemon = agent.daemon()?;
    agent.world.attack(NOBODY).to(agent.bus(1)).is_refused()?;
    agent.world.enforcer(&["unload"])?.demand(0)?;
    drop(daemon);
    fs::remove_dir_all(agent.world.path("vcap"))?;
    agent.world.attack(NOBODY).to(agent.bus(1)).reaches()?;
    let _daemon = agent.daemon()?;
    agent.world.attack(NOBODY).to(agent.bus(1)).is_refused()?;
    agent.world.attack(0).to(agent.bus(1)).reaches()?;
    let causes = agent.causes()?;
    ensure!(
        causes.contains("not known yet") && causes.contains("the last known one stays protected"),
        "{causes}"
    );
    agent.put("settings/settings.json", agent.mbus(2))?;
    agent.soon(2, "settings after the reboot")?;
    ensure!(agent.world.status()?["state"] == "enforcing", "{}", agent.causes()?);
    Ok(())
}

fn b2_credentials_appear_nowhere() -> Result<()> {
    let agent = Agent::new("")?;
    let mut command = Command::new(binary("enforcer")?);
    let daemon = agent
        .world
        .daemon_with(command.args(["--log-level", "trace", "--log-format", "json"]))?;
    let mut outputs = String::new();
    let mut collect = |name: &str| -> Result<()> {
        let to = agent.bus(1).to_string();
        let commands: [&[&str]; 10] = [
            &["status"],
            &["status", "--json"],
            &["config", "show"],
            &["config", "show", "--json"],
            &["config", "check"],
            &["refresh", "--json"],
            &["events", "--json"],
            &["check", "nobody", &to, "--json"],
            &["apply"],
            &["--log-level", "trace", "apply", "--last-good"],
        ];
        for command in commands {
            let ran = agent.world.enforcer(command)?;
            outputs.push_str(&format!("{name} {command:?}: {} {}\n", ran.stdout, ran.stderr));
        }
        Ok(())
    };
    agent.put("settings.json", agent.mbus(1))?;
    agent.soon(1, "the bus")?;
    agent.world.attack(NOBODY).to(agent.bus(1)).is_refused()?;
    collect("good")?;
    for url in [
        format!("amqp://me:{SECRET}@h:1"),
        format!("nats://me:{SECRET}@h"),
        format!("nats://{SECRET}@h"),
        format!("nats://me:{SECRET}/x@h:1"),
        format!("nats://h:{SECRET}"),
        SECRET.to_owned(),
    ] {
        agent.put("settings.json", format!("{{\"mbus\":{url:?}}}"))?;
        thread::sleep(Duration::from_millis(300));
        collect(&url.replace(SECRET, "S"))?;
    }
    agent.put("settings.json", format!("{{\"mbus\":{{\"{SECRET}\":\"{SECRET}\"}}}}"))?;
    thread::sleep(Duration::from_millis(300));
    collect("kind")?;
    agent.put("settings.json", format!("{{\"mbus\":\"nats://me:{SECRET}"))?;
    thread::sleep(Duration::from_millis(300));
    collect("half")?;
    ensure!(outputs.contains("message bus"), "nothing was told: {outputs}");
    outputs.push_str(&daemon.log());
    for entry in fs::read_dir(agent.world.path("state"))? {
        outputs.push_str(&String::from_utf8_lossy(&fs::read(entry?.path())?));
    }
    ensure!(
        outputs.contains(&agent.bus(1).ip().to_string()),
        "the bus is in nothing: {outputs}"
    );
    let found = outputs.lines().find(|line| line.contains(SECRET));
    ensure!(found.is_none(), "the password is in: {found:?}");
    Ok(())
}

/// No file at all: in mount and network namespaces where nothing but this world's cgroup is to be seen.
fn b1_without_any_configuration_monit_and_the_bus_are_protected() -> Result<()> {
    let world = World::new()?;
    let netns = Netns::new(&world, "agent")?;
    let _monit = Listener::start(Some(&netns.file()), 2822, &[])?;
    let monit = SocketAddr::from((Ipv4Addr::LOCALHOST, 2822));
    let bus = SocketAddr::from((Ipv4Addr::LOCALHOST, 2822 + 1));
    let _bus = Listener::start(Some(&netns.file()), bus.port(), &[])?;
    let attack = |uid, to| world.attack(uid).to(to).in_netns(&netns);
    attack(NOBODY, monit)?.reaches()?;
    attack(NOBODY, bus)?.reaches()?;
    fs::create_dir_all(world.path("vcap/bosh"))?;
    fs::write(
        world.path("vcap/bosh/settings.json"),
        format!("{{\"mbus\":\"nats://me:{SECRET}@{bus}\"}}"),
    )?;
    let script = "set -e
        mount --bind \"$2\" \"$3\"
        mount -t bpf bpf /sys/fs/bpf
        mkdir -p \"$1/empty\" && [ ! -d /etc/enforcer ] || mount --bind \"$1/empty\" /etc/enforcer
        mount --bind \"$1\" /mnt
        mount -t tmpfs tmpfs /run
        mount -t tmpfs tmpfs /var
        mkdir -p /var/lib /var/vcap/bosh
        mount --bind /mnt/vcap/bosh /var/vcap/bosh
        if [ -n \"$5\" ]; then \"$4\" config show; fi
        \"$4\" --config /etc/enforcer/enforcer.toml config check 2>&1 || echo \"code $?\"
        # What is mounted is not the root of the host's cgroups (F9).
        \"$4\" apply || [ $? = 1 ]; \"$4\" check nobody 127.0.0.1:2822 || echo denied
        read _";
    let mut command = netns.command(Path::new("unshare"));
    // Its first process sees what it mounts, as on a host.
    command
        .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["sh", "-c", script, "sh"])
        .arg(world.path(""))
        .arg(&world.cgroup)
        .arg(cgroup_mount()?)
        .arg(binary("enforcer")?)
        .arg("show");
    let mut child = command
        .stdin(std::process::Stdio::piped())
        .stdout(fs::File::create(world.path("out"))?)
        .stderr(fs::File::create(world.path("err"))?)
        .spawn()?;
    let out = || fs::read_to_string(world.path("out"));
    let result = until("it is active", || Ok(out()?.contains("denied"))).and_then(|()| {
        attack(NOBODY, monit)?.is_refused()?;
        attack(NOBODY, bus)?.is_refused()?;
        attack(0, monit)?.reaches()?;
        attack(0, bus)?.reaches()
    });
    drop(child.stdin.take());
    child.wait()?;
    let said = format!("{} {}", out()?, fs::read_to_string(world.path("err"))?);
    result.map_err(|error| error.context(said.clone()))?;
    ensure!(
        said.contains("dir = \"/var/vcap/bosh\"") && said.contains("code 2") && !said.contains(SECRET),
        "{said}"
    );
    // The pins were that mount namespace's, and went with it.
    until("all is as before", || Ok(attack(NOBODY, monit)?.run()?.errno.is_none()))
}
