//! A world for one case: scratch directory, cgroup, pins, network namespaces, listeners, the daemon. All gone when
//! dropped.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::{fs::FileExt as _, net::UnixDatagram},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    attack::{GREETING, Way, Who},
    backend::{Backend, without_bpf},
    kernel::{Feature, lacks},
    machine,
};

/// A user who may nothing.
pub const NOBODY: u32 = 65534;
/// How long anything may take on a machine before a case fails.
const PATIENCE: Duration = Duration::from_mins(1);
/// Where it is said how many times slower than a machine this may be.
pub const SLOWNESS: &str = "ENFORCER_TEST_SLOWNESS";
/// Between two looks at something that is awaited.
const PAUSE: Duration = Duration::from_millis(20);
/// Begins the name of everything that a test makes.
const MARK: &str = "enforcertest";

static COUNT: AtomicU32 = AtomicU32::new(0);

/// What one case needs; its address and port are nobody else's.
#[derive(Debug)]
pub struct World {
    name: String,
    number: u32,
    dir: tempfile::TempDir,
    /// Its cgroup, empty of processes at first.
    pub cgroup: PathBuf,
    /// A port that listeners of this world have.
    pub port: u16,
}

impl World {
    /// Makes a world.
    pub fn new() -> Result<Self> {
        was_shared();
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{MARK}_{}_{number}", machine::number());
        let dir = tempfile::Builder::new().prefix(&name).tempdir()?;
        // Where none can be there is none: attacks then stay in the cgroup that they are started in.
        let cgroup = if lacks(Feature::Cgroup2) {
            dir.path().join("no-cgroup")
        } else {
            let cgroup = cgroup_mount()?.join(&name);
            fs::create_dir(&cgroup).with_context(|| format!("make {}", cgroup.display()))?;
            cgroup
        };
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let port = free_port(number)?;
        Ok(Self {
            name,
            number,
            dir,
            cgroup,
            port,
        })
    }

    /// A loopback address that nobody else uses.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        let [.., machine] = machine::number().to_be_bytes();
        let [.., high, low] = (self.number + 1).to_be_bytes();
        IpAddr::from([127, 64 | machine & 63, high, low])
    }

    /// Where the world's own listener is dialled.
    #[must_use]
    pub fn here(&self) -> SocketAddr {
        SocketAddr::new(self.address(), self.port)
    }

    /// A path in the scratch directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The pin directory.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.name)
    }

    /// Name for things that the world makes elsewhere.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Writes the configuration: this world's places, then `targets`.
    pub fn configure(&self, targets: &str) -> Result<()> {
        self.configure_on(&self.cgroup, targets)
    }

    /// As `configure`, for another cgroup.
    pub fn configure_on(&self, cgroup: &Path, targets: &str) -> Result<()> {
        // Unless a case asks for another one.
        let backend = if targets.contains("backend = ") {
            String::new()
        } else {
            format!("backend = {:?}\n", Backend::current().configured())
        };
        let place = if lacks(Feature::Cgroup2) {
            String::new()
        } else {
            format!("cgroup = {:?}\n", cgroup.display().to_string())
        };
        let text = format!(
            "{backend}{place}nft_table = {:?}\npin_dir = {:?}\nstate_dir = {:?}\nsocket = {:?}\n{targets}",
            self.name,
            self.pins().display().to_string(),
            self.path("state").display().to_string(),
            self.path("run/control.sock").display().to_string(),
        );
        fs::write(self.path("enforcer.toml"), text)?;
        Ok(())
    }

    /// A configuration with one target `main` that owns `endpoints` and admits `allow`, both as in TOML lists.
    pub fn configure_one(&self, endpoints: &[String], allow: &str) -> Result<()> {
        self.configure(&format!("[target.main]\nendpoints = {endpoints:?}\nallow = {allow}\n"))
    }

    /// Runs the binary with this world's configuration.
    pub fn enforcer<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Ran> {
        let mut command = Command::new(binary("enforcer")?);
        command.arg("--config").arg(self.path("enforcer.toml")).args(arguments);
        ran(&mut command)
    }

    /// The binary with this world's configuration, as another user.
    pub fn enforcer_as(&self, uid: u32) -> Result<Command> {
        // The build's directory may be closed to others.
        let copy = self.path("enforcer");
        copy_binary("enforcer", &copy)?;
        let user = uid.to_string();
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", &user, "--regid", &user, "--clear-groups"])
            .arg(copy);
        command.arg("--config").arg(self.path("enforcer.toml"));
        Ok(command)
    }

    /// Makes the configuration active, and demands success.
    pub fn apply(&self) -> Result<()> {
        self.enforcer(&["apply"])?.demand(0).map(drop)
    }

    /// Starts the daemon and waits until it says that the kernel enforces.
    pub fn daemon(&self) -> Result<Daemon> {
        self.daemon_with(&mut Command::new(binary("enforcer")?))
    }

    /// As `daemon`, by a command that ends in the binary: inside namespaces.
    pub fn daemon_with(&self, command: &mut Command) -> Result<Daemon> {
        let (mut daemon, socket) = self.start(command)?;
        let child = &mut daemon.child;
        until("the daemon says READY", || {
            if let Some(status) = child.try_wait()? {
                bail!("the daemon ended ({status})");
            }
            let mut message = [0; 256];
            let read = socket.recv(&mut message).unwrap_or(0);
            Ok(String::from_utf8_lossy(message.get(..read).unwrap_or_default()).contains("READY=1"))
        })
        .map_err(|error| anyhow!("{error}; it said: {}", daemon.log()))?;
        Ok(daemon)
    }

    /// As `daemon_with`, without waiting: the daemon, and the socket on which it will say that it is ready.
    pub fn start(&self, command: &mut Command) -> Result<(Daemon, UnixDatagram)> {
        let notify = self.path("notify");
        let _ = fs::remove_file(&notify);
        let socket = UnixDatagram::bind(&notify)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        command
            .arg("--config")
            .arg(self.path("enforcer.toml"))
            .arg("run")
            .env("NOTIFY_SOCKET", &notify);
        let log = File::from(memfd_create("log", MFdFlags::MFD_CLOEXEC)?);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.try_clone()?)
            .spawn()?;
        Ok((Daemon { child, log }, socket))
    }

    /// The binary, to be started where `resolv.conf` in the scratch directory is the host's, and `hosts` and
    /// `nsswitch.conf` if they are there.
    pub fn with_resolver(&self) -> Result<Command> {
        Ok(self.resolving(Command::new("unshare"), &binary("enforcer")?))
    }

    /// As `with_resolver`, with no more capabilities than systemd's unit leaves the daemon at its start.
    pub fn with_resolver_confined(&self) -> Result<Command> {
        let mut command = self.resolving(Command::new("unshare"), Path::new("setpriv"));
        command
            .arg("--bounding-set=-all,+bpf,+perfmon,+net_admin")
            .arg(binary("enforcer")?);
        Ok(command)
    }

    /// As `with_resolver`, for any program, in a network namespace.
    #[must_use]
    pub fn with_resolver_in(&self, netns: &Netns, program: &Path) -> Command {
        self.resolving(netns.command(Path::new("unshare")), program)
    }

    fn resolving(&self, mut unshare: Command, program: &Path) -> Command {
        let script = "mount --bind \"$1/resolv.conf\" /etc/resolv.conf || exit\n\
            [ ! -e \"$1/hosts\" ] || mount --bind \"$1/hosts\" /etc/hosts || exit\n\
            [ ! -e \"$1/nsswitch.conf\" ] || mount --bind \"$1/nsswitch.conf\" /etc/nsswitch.conf || exit\n\
            shift && exec \"$@\"";
        unshare
            .args(["--mount", "sh", "-c", script, "sh"])
            .arg(self.dir.path())
            .arg(program);
        unshare
    }

    /// Listens on every address of this host, this world's port, TCP and UDP, until the world ends.
    pub fn listen(&self) -> Result<Listener> {
        Listener::start(None, self.port, &[self.address(), Ipv6Addr::LOCALHOST.into()])
    }

    /// An attack as `uid` from this world's cgroup on this world's listener.
    #[must_use]
    pub fn attack(&self, uid: u32) -> Attack {
        Attack {
            cgroup: (!lacks(Feature::Cgroup2)).then(|| self.cgroup.clone()),
            arguments: Vec::new(),
            way: Way::Plain,
            uid,
            to: self.here(),
            program: None,
            prefix: Vec::new(),
        }
    }

    /// The status, whatever its exit code.
    pub fn status(&self) -> Result<Value> {
        let ran = self.enforcer(&["status", "--json"])?;
        serde_json::from_str(&ran.stdout).with_context(|| format!("{ran:?}"))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.pins());
        let _ = ran(Command::new("nft").args(["delete", "table", "inet", &self.name]));
        // Of a case that did not unload, or failed before it did. A daemon that needs it makes it again.
        let shared = shared_table();
        let is_bare = shared.split_whitespace().collect::<String>() == "tableinetbosh_agent{chainmonit_access_jobs{}}";
        if !was_shared() && (is_bare || shared.contains(&format!("of {} (", self.name))) {
            let _ = ran(Command::new("nft").args(["delete", "table", "inet", SHARED_TABLE]));
        }
        // A case that fails leaves what it made below.
        let mut cgroups = vec![self.cgroup.clone()];
        let mut at = 0;
        while let Some(cgroup) = cgroups.get(at) {
            let below = fs::read_dir(cgroup).into_iter().flatten().flatten();
            let below: Vec<PathBuf> = below.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
            cgroups.extend(below);
            at += 1;
        }
        for cgroup in cgroups.into_iter().rev() {
            let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
            for pid in processes.lines().filter_map(|line| line.parse().ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            for _ in 0..100 {
                if fs::remove_dir(&cgroup).is_ok() || !cgroup.exists() {
                    break;
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// A port that nobody has, below those that the kernel gives out (`ip_local_port_range`).
fn free_port(number: u32) -> Result<u16> {
    let first = machine::number().wrapping_mul(211).wrapping_add(number.wrapping_mul(3));
    (0..20_000)
        .filter_map(|offset| u16::try_from(10_000 + first.wrapping_add(offset) % 20_000).ok())
        .find(|port| TcpListener::bind((Ipv6Addr::UNSPECIFIED, *port)).is_ok())
        .context("no port is free")
}

/// What is left of tests in the kernel: names of pins, cgroups, namespaces.
pub fn leftovers() -> Result<Vec<String>> {
    let mark = format!("{MARK}_{}_", machine::number());
    let mut left = Vec::new();
    for dir in [
        PathBuf::from("/sys/fs/bpf"),
        cgroup_mount().unwrap_or_default(),
        "/run/netns".into(),
        std::env::temp_dir(),
        "/sys/class/net".into(),
    ] {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&mark) {
                left.push(entry.path().display().to_string());
            }
        }
    }
    // Hierarchies of version 1 outlive their mounts as long as a group in them does.
    let hierarchies = fs::read_to_string("/proc/self/cgroup")?;
    let ours = hierarchies
        .lines()
        .filter(|line| line.contains(&mark) && !line.starts_with("0::"));
    left.extend(ours.map(str::to_owned));
    let tables = ran(Command::new("nft").args(["list", "tables"]))?.stdout;
    let ours = tables.lines().filter(|table| table.contains(&mark));
    left.extend(ours.map(str::to_owned));
    if shared_table().contains(&mark) || !was_shared() && !shared_table().is_empty() {
        left.push(format!("table inet {SHARED_TABLE}"));
    }
    Ok(left)
}

/// The table that the BOSH agent and enforcer have in common (B5), and what is in it; nothing where it is not there.
const SHARED_TABLE: &str = "bosh_agent";

/// Whether this host's own network namespace had it before the first world.
fn was_shared() -> bool {
    static BEFORE: OnceLock<bool> = OnceLock::new();
    *BEFORE.get_or_init(|| !shared_table().is_empty())
}

fn shared_table() -> String {
    ran(Command::new("nft").args(["list", "table", "inet", SHARED_TABLE]))
        .map_or_else(|_| String::new(), |ran| ran.stdout)
}

/// The directory of maps below a pin directory, of this build's layout.
#[must_use]
pub fn maps_name() -> String {
    format!("maps_v{}", enforcer_ebpf::ABI)
}

/// Where cgroup v2 is mounted.
pub fn cgroup_mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let mount = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    mount.context("no cgroup v2 is mounted")
}

/// A binary of this build: `enforcer` by `ENFORCER_BIN` if that is set, the others beside this one. What this run of
/// the suite takes from `enforcer` has been taken from it.
pub fn binary(name: &str) -> Result<PathBuf> {
    let path = whole_binary(name)?;
    if name == "enforcer" && Backend::current() == Backend::AutoWithoutBpf && !lacks(Feature::Bpf) {
        return without_bpf(&path, &whole_binary("confined")?);
    }
    Ok(path)
}

/// As [`binary`], with nothing taken from it.
pub fn whole_binary(name: &str) -> Result<PathBuf> {
    if name == "enforcer"
        && let Some(path) = std::env::var_os("ENFORCER_BIN")
    {
        return Ok(path.into());
    }
    let path = std::env::current_exe()?.with_file_name(name);
    ensure!(path.exists(), "{} is not built; run cargo xtask test", path.display());
    Ok(path)
}

/// Copies a binary of this build. In a process of its own: one that another case forks meanwhile would hold the copy
/// open for writing, and nothing that is may be executed (execve(2), `ETXTBSY`).
pub fn copy_binary(name: &str, to: &Path) -> Result<()> {
    ran(Command::new("cp").arg(binary(name)?).arg(to))?.demand(0).map(drop)
}

/// How long anything may take here before a case fails.
#[must_use]
pub fn patience() -> Duration {
    PATIENCE * slowness().min(20)
}

/// Waits until `done` says so.
pub fn until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let patience = patience();
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if done()? {
            return Ok(());
        }
        thread::sleep(PAUSE);
    }
    bail!("waited {} s in vain until {what}", patience.as_secs())
}

/// How many times slower than a machine this may be: 1, but where whoever starts the suite says otherwise, as of an
/// emulated one.
#[must_use]
pub fn slowness() -> u32 {
    let said = std::env::var(SLOWNESS).ok();
    said.and_then(|said| said.parse().ok()).unwrap_or(1).max(1)
}

/// How long may take now what takes at most so long where no more than two tasks a processor are busy: where others
/// compete for the processors, the daemon and whoever asks it wait as much longer for their turns.
pub fn at_this_load(limit: Duration) -> Result<Duration> {
    // The average of a minute, and the tasks that could run now (man 5 proc).
    let load = fs::read_to_string("/proc/loadavg")?;
    let words: Vec<&str> = load.split([' ', '/']).collect();
    let number = |index: usize| {
        let word = words.get(index).context("no load")?;
        word.parse::<f64>().map_err(anyhow::Error::from)
    };
    let busy = number(0)?.max(number(3)?);
    let processors = f64::from(u32::try_from(thread::available_parallelism()?.get())?);
    Ok(limit.mul_f64((busy / (2.0 * processors)).max(1.0)) * slowness())
}

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Its exit code, -1 for a signal.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl Ran {
    /// Fails unless the exit code is this.
    pub fn demand(self, code: i32) -> Result<Self> {
        ensure!(
            self.code == code,
            "exit code {} instead of {code}; stdout: {} stderr: {}",
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }
}

/// Runs a command to its end.
pub fn ran(command: &mut Command) -> Result<Ran> {
    let Output { status, stdout, stderr } = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {command:?}"))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Ran {
        code: status.code().unwrap_or(-1),
        stdout: text(stdout),
        stderr: text(stderr),
    })
}

/// A running daemon; killed when dropped, so that enforcement stays as after a crash.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// In memory and without a name, so that no mount hides it. Not a pipe: what was written before an answer is read
    /// after it.
    log: File,
}

impl Daemon {
    /// All it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.log_since(0)
    }

    /// What it has logged after that many bytes.
    fn log_since(&self, begin: usize) -> String {
        let size = self.log.metadata().map_or(0, |log| log.len());
        let mut new = vec![0; usize::try_from(size).unwrap_or(0).saturating_sub(begin)];
        match self.log.read_exact_at(&mut new, begin as u64) {
            Ok(()) => String::from_utf8_lossy(&new).into_owned(),
            Err(error) => format!("(its log cannot be read: {error})"),
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().try_into()?), signal)?)
    }

    /// Sends SIGHUP and waits for the line that answers it.
    pub fn reload(&self) -> Result<()> {
        let before = self.log().len();
        let answered = || {
            let new = self.log_since(before);
            new.contains("reloaded ") || new.contains("reload: ")
        };
        self.signal(Signal::SIGHUP)?;
        let deadline = Instant::now() + patience();
        // A thousand in a row wait no longer than they must.
        while !answered() {
            ensure!(
                Instant::now() < deadline,
                "the daemon does not reload; it waits in {:?}, and said: {}",
                fs::read_to_string(format!("/proc/{}/wchan", self.pid())),
                self.log()
            );
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self) -> Result<i32> {
        let mut code = None;
        until("the daemon ends", || {
            code = self.child.try_wait()?;
            Ok(code.is_some())
        })?;
        Ok(code.and_then(|code| code.code()).unwrap_or(-1))
    }

    /// As `kill -9`.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An attempt to be made in a process of its own.
#[derive(Clone, Debug)]
pub struct Attack {
    cgroup: Option<PathBuf>,
    arguments: Vec<String>,
    way: Way,
    uid: u32,
    to: SocketAddr,
    program: Option<PathBuf>,
    prefix: Vec<String>,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// `None` if the listener was reached.
    pub errno: Option<i32>,
    /// Length of the call.
    pub time: Duration,
}

impl Attack {
    /// By another way.
    #[must_use]
    pub fn way(self, way: Way) -> Self {
        Self { way, ..self }
    }

    /// With other users.
    #[must_use]
    pub fn who(self, who: Who) -> Self {
        self.option("--who", &value(&who))
    }

    /// To another destination.
    #[must_use]
    pub fn to(self, to: SocketAddr) -> Self {
        Self { to, ..self }
    }

    /// From another cgroup.
    #[must_use]
    pub fn in_cgroup(self, cgroup: &Path) -> Self {
        Self {
            cgroup: Some(cgroup.into()),
            ..self
        }
    }

    /// From the cgroup that the tests themselves run in.
    #[must_use]
    pub fn anywhere(self) -> Self {
        Self { cgroup: None, ..self }
    }

    /// With a switch of the attack binary.
    #[must_use]
    pub fn flag(mut self, name: &str) -> Self {
        self.arguments.push(name.to_owned());
        self
    }

    /// With another option of the attack binary.
    #[must_use]
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.arguments.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// With a copy of the attack binary, started by other means.
    #[must_use]
    pub fn program(mut self, prefix: &[&str], program: PathBuf) -> Self {
        self.prefix = prefix.iter().map(ToString::to_string).collect();
        Self {
            program: Some(program),
            ..self
        }
    }

    /// From a network namespace.
    pub fn in_netns(self, netns: &Netns) -> Result<Self> {
        let net = format!("--net={}", netns.file().display());
        Ok(self.program(&["nsenter", &net, "--"], binary("attack")?))
    }

    /// All but the destination.
    fn command(&self) -> Result<Command> {
        let program = self.program.clone().map_or_else(|| binary("attack"), Ok)?;
        let mut words = self.prefix.iter().map(Into::into).chain([program.into_os_string()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).args(&self.arguments);
        command.args(["--way", &value(&self.way)]);
        if let Some(cgroup) = &self.cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        command.args(["--uid", &self.uid.to_string()]);
        Ok(command)
    }

    /// Makes it.
    pub fn run(&self) -> Result<Outcome> {
        let ran = ran(self.command()?.arg(self.to.to_string()))?.demand(0)?;
        let words: Vec<&str> = ran.stdout.split_whitespace().collect();
        let micros = |text: &str| text.parse().map(Duration::from_micros);
        match words.as_slice() {
            ["connected", time] => Ok(Outcome {
                errno: None,
                time: micros(time)?,
            }),
            ["errno", errno, time] => Ok(Outcome {
                errno: Some(errno.parse()?),
                time: micros(time)?,
            }),
            _ => bail!("the attack said {:?} {:?}", ran.stdout, ran.stderr),
        }
    }

    /// Median length of `connect` in nanoseconds, over so many calls.
    pub fn measure(&self, calls: usize) -> Result<u128> {
        let mut command = self.command()?;
        command.args(["--rounds", &calls.to_string()]);
        Ok(ran(command.arg(self.to.to_string()))?
            .demand(0)?
            .stdout
            .trim()
            .parse()?)
    }

    /// Connects again and again, the first time perhaps as root, and says how long after its first call it was refused.
    pub fn until_refused(&self, as_root_first: bool) -> Result<Duration> {
        let mut command = self.command()?;
        command.arg("--until-refused");
        if as_root_first {
            command.arg("--as-root-first");
        }
        let took = ran(command.arg(self.to.to_string()))?.demand(0)?.stdout;
        Ok(Duration::from_micros(took.trim().parse()?))
    }

    /// Starts a process that connects again and again while `file` exists.
    pub fn hammer(&self, file: &Path) -> Result<Hammer> {
        let mut command = self.command()?;
        command.arg("--hammer-while").arg(file);
        let child = command.arg(self.to.to_string()).stdout(Stdio::piped()).spawn()?;
        Ok(Hammer { child })
    }

    /// Opens the connection, or begins to, in a process that holds it.
    pub fn hold(&self) -> Result<Held> {
        let mut command = self.command()?;
        command.arg("--hold");
        let mut child = command.arg(self.to.to_string()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("no stdout")?;
        let (sender, lines) = std::sync::mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(io::Result::ok) {
                let _ = sender.send(line);
            }
        });
        let held = Held { child, lines };
        let first = held.lines.recv_timeout(patience());
        ensure!(first.as_deref() == Ok("held"), "{self:?} holds nothing: {first:?}");
        Ok(held)
    }

    /// Fails unless the listener is reached.
    pub fn reaches(&self) -> Result<()> {
        let outcome = self.run()?;
        ensure!(
            outcome.errno.is_none(),
            "{self:?} should reach the listener, but: {}",
            said(outcome)
        );
        Ok(())
    }

    /// Fails unless the call fails by this, as the kernel does not have the way.
    pub fn fails_by(&self, errno: i32) -> Result<()> {
        let outcome = self.run()?;
        ensure!(
            outcome.errno == Some(errno),
            "{self:?} should fail with {}, but: {}",
            io::Error::from_raw_os_error(errno),
            said(outcome)
        );
        Ok(())
    }

    /// Fails unless every call is refused as what enforces here refuses (D8), and the fastest of a few at once, not
    /// after the second or more that a packet without an answer takes.
    pub fn is_refused(&self) -> Result<()> {
        if Backend::current().is_nftables() {
            self.is_reset()
        } else {
            self.is_forbidden()
        }
    }

    /// As `is_refused`, by eBPF.
    pub fn is_forbidden(&self) -> Result<()> {
        self.fails_at_once(libc::EPERM)
    }

    /// As `is_refused`, by nftables: a reset; a datagram does not leave.
    pub fn is_reset(&self) -> Result<()> {
        self.fails_at_once(if self.way.is_udp() {
            libc::EPERM
        } else {
            libc::ECONNREFUSED
        })
    }

    /// Fails unless the listener is reached, or else the attempt refused.
    pub fn succeeds(&self, reaches: bool) -> Result<()> {
        if reaches { self.reaches() } else { self.is_refused() }
    }

    fn fails_at_once(&self, errno: i32) -> Result<()> {
        const ROUNDS: u32 = 4;
        let five = self.clone().option("--tries", "5");
        let limit = Duration::from_millis(200) * slowness().min(4);
        let mut fastest = Duration::MAX;
        for _ in 0..ROUNDS {
            let outcome = five.run()?;
            ensure!(
                outcome.errno == Some(errno),
                "{self:?} should fail with {}, but: {}",
                io::Error::from_raw_os_error(errno),
                said(outcome)
            );
            fastest = fastest.min(outcome.time);
            if fastest < limit {
                return Ok(());
            }
        }
        bail!("{self:?} was refused only after {fastest:?}")
    }
}

/// A process that connects again and again.
#[derive(Debug)]
pub struct Hammer {
    child: Child,
}

/// A process that holds a connection; ended when dropped.
#[derive(Debug)]
pub struct Held {
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Held {
    /// Waits until the connection fails, and says how.
    pub fn fails(&self) -> Result<i32> {
        let line = self
            .lines
            .recv_timeout(patience())
            .context("the connection stays, or its process ended")?;
        let errno = line.strip_prefix("errno ").with_context(|| line.clone())?;
        Ok(errno.parse()?)
    }

    /// Fails unless it was cut.
    pub fn is_cut(&self) -> Result<()> {
        let errno = self.fails()?;
        ensure!(
            errno == libc::ECONNABORTED || errno == libc::ECONNRESET,
            "it failed, but by {}",
            io::Error::from_raw_os_error(errno)
        );
        Ok(())
    }

    /// Fails if it has failed.
    pub fn stays(&mut self) -> Result<()> {
        let line = self.lines.try_recv();
        ensure!(
            line.is_err() && self.child.try_wait()?.is_none(),
            "the connection did not stay: {line:?}"
        );
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a hammer met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Blows {
    /// Reached the listener.
    pub connected: u64,
    /// EPERM.
    pub refused: u64,
    /// ECONNREFUSED.
    pub reset: u64,
    /// Any other error.
    pub other: u64,
    /// Of those that reached the listener: only after their first packet had been dropped.
    pub late: u64,
}

impl std::ops::AddAssign for Blows {
    fn add_assign(&mut self, other: Self) {
        self.connected += other.connected;
        self.refused += other.refused;
        self.reset += other.reset;
        self.other += other.other;
        self.late += other.late;
    }
}

impl Hammer {
    /// Waits for its end, once the file is gone.
    pub fn finish(mut self) -> Result<Blows> {
        let mut text = String::new();
        self.child
            .stdout
            .take()
            .context("no stdout")?
            .read_to_string(&mut text)?;
        self.child.wait()?;
        let words: Vec<&str> = text.split_whitespace().collect();
        match words.as_slice() {
            [
                "connected",
                connected,
                "refused",
                refused,
                "reset",
                reset,
                "other",
                other,
                "late",
                late,
            ] => Ok(Blows {
                connected: connected.parse()?,
                refused: refused.parse()?,
                reset: reset.parse()?,
                other: other.parse()?,
                late: late.parse()?,
            }),
            _ => bail!("the hammer said {text:?}"),
        }
    }
}

impl Drop for Hammer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn said(outcome: Outcome) -> String {
    outcome.errno.map_or_else(
        || "it reached it".to_owned(),
        |errno| io::Error::from_raw_os_error(errno).to_string(),
    )
}

/// A clap value as written on a command line.
fn value<T: clap::ValueEnum>(value: &T) -> String {
    value
        .to_possible_value()
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default()
}

/// A listener on every address of a network namespace, TCP and UDP, that greets whoever reaches it.
#[derive(Debug)]
pub struct Listener {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Listener {
    /// Listens, in a namespace given by its file or in ours; UDP on single addresses, so that answers come from them.
    pub fn start(netns: Option<&Path>, port: u16, udp: &[IpAddr]) -> Result<Self> {
        let netns = netns.map(Path::to_path_buf);
        let udp = udp.to_vec();
        let bound = thread::spawn(move || -> Result<_> {
            if let Some(netns) = netns {
                setns(fs::File::open(netns)?, CloneFlags::CLONE_NEWNET)?;
            }
            let tcp = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
            tcp.set_only_v6(false)?;
            tcp.set_reuse_address(true)?;
            // A process being started elsewhere may still hold the socket that tried this port, until it executes.
            let place = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into();
            let bound = (0..50).any(|_| {
                let bound = tcp.bind(&place).is_ok();
                if !bound {
                    thread::sleep(PAUSE);
                }
                bound
            });
            ensure!(bound, "port {port} is taken");
            tcp.listen(4096).with_context(|| format!("listen on port {port}"))?;
            let bind = |address| UdpSocket::bind((address, port)).with_context(|| format!("bind UDP {address}:{port}"));
            let udp = udp.into_iter().map(bind).collect::<Result<Vec<_>>>()?;
            Ok((TcpListener::from(tcp), udp))
        });
        let (tcp, udp) = bound.join().map_err(|_| anyhow!("the listener's thread panicked"))??;
        tcp.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stop_tcp = Arc::clone(&stop);
        let greet_tcp = move || {
            let mut greeted = Vec::new();
            while !stop_tcp.load(Ordering::Relaxed) {
                let accepted = tcp.accept();
                let nobody_waits = accepted.is_err();
                greeted.extend(accepted.ok().and_then(|(stream, _)| greet(stream)));
                if nobody_waits || greeted.len() > MOST_GREETED {
                    greeted.retain_mut(is_open);
                }
                if nobody_waits {
                    thread::sleep(Duration::from_micros(200));
                }
            }
        };
        let mut threads = vec![thread::spawn(greet_tcp)];
        for socket in udp {
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
            let stop = Arc::clone(&stop);
            threads.push(thread::spawn(move || greet_udp(&socket, &stop)));
        }
        Ok(Self { stop, threads })
    }
}

/// Connections that a listener keeps before it looks which of them have ended, though others wait.
const MOST_GREETED: usize = 256;

/// Greets, and keeps the connection until the caller ends it: data that comes to a closed one, as of a fast open, is
/// answered with a reset (RFC 1122, 4.2.2.13), which may overtake the greeting where another processor brings that.
fn greet(mut stream: TcpStream) -> Option<TcpStream> {
    let greeted = stream
        .write_all(GREETING)
        .and_then(|()| stream.shutdown(std::net::Shutdown::Write))
        .and_then(|()| stream.set_nonblocking(true));
    greeted.is_ok().then_some(stream)
}

/// Whether the caller has not yet ended the connection; what he sent is read.
fn is_open(stream: &mut TcpStream) -> bool {
    let mut sent = [0; 64];
    loop {
        match stream.read(&mut sent) {
            Ok(1..) => {}
            Ok(0) => return false,
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

fn greet_udp(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = [0; 16];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(GREETING, from);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A network namespace by name.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes one, its loopback up.
    pub fn new(world: &World, what: &str) -> Result<Self> {
        let netns = Self {
            name: format!("{}_{what}", world.name()),
        };
        ip(&["netns", "add", &netns.name])?;
        ip(&["-n", &netns.name, "link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// Joins two by a pair of devices with an address each, given with its prefix length.
    pub fn join(&self, addresses: &[&str], other: &Self, others: &[&str]) -> Result<()> {
        ip(&[
            "link",
            "add",
            "veth0",
            "netns",
            &self.name,
            "type",
            "veth",
            "peer",
            "name",
            "veth0",
            "netns",
            &other.name,
        ])?;
        for (netns, addresses) in [(self, addresses), (other, others)] {
            for address in addresses {
                let nodad: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
                ip(&[
                    &["-n", netns.name.as_str(), "address", "add", address, "dev", "veth0"],
                    nodad,
                ]
                .concat())?;
            }
            ip(&["-n", &netns.name, "link", "set", "veth0", "up"])?;
        }
        Ok(())
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// A command run in it; the other namespaces stay ours, so that cgroups and bpffs stay in view.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.file().display()))
            .arg("--")
            .arg(program);
        command
    }

    /// The binary with a world's configuration, run in it.
    pub fn enforcer(&self, world: &World, arguments: &[&str]) -> Result<Ran> {
        let mut command = self.command(&binary("enforcer")?);
        ran(command.arg("--config").arg(world.path("enforcer.toml")).args(arguments))
    }

    /// Runs `nft` in it, and demands success.
    pub fn nft(&self, command: &str) -> Result<String> {
        let ran = ran(self.command(Path::new("nft")).arg(command))?.demand(0);
        Ok(ran.with_context(|| format!("nft {command}"))?.stdout)
    }

    /// Does something in it, on a thread of its own.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(fs::File::open(self.file())?, CloneFlags::CLONE_NEWNET)?;
                work()
            });
            inside.join().map_err(|_| anyhow!("the thread in it panicked"))?
        })
    }

    /// Writes a setting below `/proc/sys/net`, where each sees those of its own namespace.
    pub fn set(&self, setting: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys/net").join(setting);
        self.within(|| Ok(fs::write(&path, value)?))
            .with_context(|| format!("write {value} to {}", path.display()))
    }

    /// Runs `ip` in it.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", self.name.as_str()], arguments].concat())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    ran(Command::new("ip").args(arguments))?
        .demand(0)
        .with_context(|| format!("ip {}", arguments.join(" ")))
        .map(drop)
}

/// Asks over a control socket as whoever we are.
pub fn ask_raw(socket: &Path, request: &[u8]) -> Result<String> {
    let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(patience()))?;
    let sent = stream
        .write_all(request)
        .and_then(|()| stream.shutdown(std::net::Shutdown::Write));
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    // Whoever answers before it has heard all hangs up on the rest: an error, but behind the answer.
    if answer.is_empty() {
        sent?;
        read?;
    }
    Ok(String::from_utf8(answer)?)
}
