//! The main job, shown: a NATS server behind a DNS name, root lets through, everybody else refused, whatever way they
//! take.

use std::{
    env, fs,
    io::Write as _,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use futures_util::StreamExt as _;
use nix::mount::{MsFlags, mount};
use tests::{
    attack::{Way, Who},
    dns::{DnsServer, Zone},
    machine,
    world::{Attack, Daemon, Listener, NOBODY, Netns, Outcome, World, binary, leftovers, ran, until},
};

const NAME: &str = "nats.enforcer.demo";
const PORT: u16 = 4222;
const SERVER4: &str = "10.79.0.2";
const SERVER6: &str = "fd79::2";

/// The main job of enforcer, shown.
#[derive(Parser)]
struct Cli {
    /// What enforces
    #[arg(long, default_value = "auto", value_parser = ["auto", "ebpf", "nftables", "both"])]
    backend: String,
    /// Be the client of the message bus
    #[arg(long, hide = true)]
    client: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.client {
        return finish(client());
    }
    machine::inside(|| shown(&cli.backend))
}

fn shown(backend: &str) -> ExitCode {
    let started = Instant::now();
    let shown = show(backend);
    let left = leftovers().unwrap_or_default();
    let result = match shown {
        Ok(()) if left.is_empty() => {
            println!(
                "\n✓ everything is removed again; {:.1} s in all",
                started.elapsed().as_secs_f32()
            );
            Ok(())
        }
        Ok(()) => Err(anyhow::anyhow!("left behind: {}", left.join(", "))),
        Err(error) => Err(error),
    };
    finish(result)
}

fn finish(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\n✗ not as it should be: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The parts of the stage; dropped, and so removed, in this order.
struct Stage {
    nats: Process,
    _dns: DnsServer,
    _monit: Listener,
    host: Netns,
    _network: Netns,
    world: World,
}

/// Ended when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn show(backend: &str) -> Result<()> {
    step("A host and a network, each a network namespace; in the network a NATS server and a DNS server");
    let stage = Stage::set(backend)?;
    done(&format!(
        "{NAME} is {SERVER4} and {SERVER6}, port {PORT}; nats-server has pid {}",
        stage.nats.0.id()
    ));

    step("Without enforcer: any user reaches the message bus and a monit-like API on 127.0.0.1");
    for (what, attack) in stage.attacks(true)? {
        attack.reaches().with_context(|| format!("{what}, without enforcer"))?;
        done(&format!("uid {NOBODY} connects by {what}"));
    }

    step("enforcer run");
    println!("{}", indent(&fs::read_to_string(stage.world.path("enforcer.toml"))?));
    let started = Instant::now();
    let daemon = stage.daemon()?;
    done(&format!(
        "ready after {} ms, the name's first lookup included",
        started.elapsed().as_millis()
    ));

    step("root: a real client, by the name, publishes and receives");
    let message = stage.client()?.demand(0)?;
    done(message.stdout.trim());

    let status = stage.enforcer(&["status", "--json"])?.demand(0)?.stdout;
    let status: serde_json::Value = serde_json::from_str(&status)?;
    let taken = status.get("backend").and_then(serde_json::Value::as_str);
    let taken = taken.unwrap_or_default();
    let sees_tasks = taken != "nftables";
    step(&format!("Everybody else: refused at once, by {taken}"));
    stage.refused(sees_tasks)?;

    step("enforcer events");
    let denials = stage.attacks(sees_tasks)?.len();
    until("the denials are seen", || {
        Ok(stage.enforcer(&["events"])?.stdout.lines().count() >= denials)
    })?;
    println!("{}", indent(&stage.enforcer(&["events"])?.demand(0)?.stdout));
    step("enforcer status");
    println!("{}", indent(&stage.enforcer(&["status"])?.demand(0)?.stdout));
    let bus = format!("tcp://{SERVER4}:{PORT}");
    for (user, code) in [("root", 0), ("nobody", 1)] {
        step(&format!("enforcer check {user} {bus}"));
        println!(
            "{}",
            indent(&stage.enforcer(&["check", user, &bus])?.demand(code)?.stdout)
        );
    }

    step("kill -9 of the daemon: the verdicts live in the kernel");
    daemon.kill()?;
    stage.refused(sees_tasks)?;
    stage.client()?.demand(0)?;
    done("root still publishes and receives");

    step("enforcer unload");
    println!("{}", indent(&stage.enforcer(&["unload"])?.demand(0)?.stdout));
    for (what, attack) in stage.attacks(true)? {
        attack.reaches().with_context(|| format!("{what}, after unload"))?;
    }
    done("nothing is guarded any more");
    Ok(())
}

impl Stage {
    fn set(backend: &str) -> Result<Self> {
        let world = World::new()?;
        let (host, network) = (Netns::new(&world, "host")?, Netns::new(&world, "net")?);
        host.join(
            &["10.79.0.1/24", "fd79::1/64"],
            &network,
            &[&format!("{SERVER4}/24"), &format!("{SERVER6}/64")],
        )?;
        let dns = DnsServer::start(Some(&network.file()), SERVER4.parse()?)?;
        dns.set(NAME, Zone::Addresses(vec![SERVER4.parse()?, SERVER6.parse()?]));
        resolve_by(&world, SERVER4)?;
        let mut nats = network.command(&nats_server()?);
        nats.args(["--addr", "::", "--port", &PORT.to_string(), "--log"])
            .arg(world.path("nats.log"));
        let nats = Process(
            nats.stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?,
        );
        let monit = Listener::start(Some(&host.file()), world.port, &[])?;
        world.configure(&format!(
            "backend = {backend:?}\n\n[target.nats]\nendpoints = [\"nats://{NAME}:{PORT}\"]\nallow = [\"root\"]\n\
             \n[target.monit]\nendpoints = [\"tcp://127.0.0.1:{}\"]\nallow = [\"root\"]\n",
            world.port
        ))?;
        let stage = Self {
            nats,
            _dns: dns,
            _monit: monit,
            host,
            _network: network,
            world,
        };
        let bus = stage.to_bus(Way::Plain, SERVER4)?;
        until("nats-server answers", || Ok(bus.run()?.errno.is_none()))?;
        Ok(stage)
    }

    fn daemon(&self) -> Result<Daemon> {
        self.world.daemon_with(&mut self.host.command(&binary("enforcer")?))
    }

    /// The binary on the host.
    fn enforcer(&self, arguments: &[&str]) -> Result<tests::world::Ran> {
        self.host.enforcer(&self.world, arguments)
    }

    fn to_bus(&self, way: Way, address: &str) -> Result<Attack> {
        Ok(self
            .on_host(way, SocketAddr::new(address.parse()?, PORT))
            .flag("--no-greeting"))
    }

    fn to_monit(&self, way: Way) -> Attack {
        self.on_host(way, SocketAddr::new(IpAddr::from([127, 0, 0, 1]), self.world.port))
    }

    fn on_host(&self, way: Way, to: SocketAddr) -> Attack {
        self.world
            .attack(NOBODY)
            .way(way)
            .to(to)
            .option("--netns", &self.host.file().display().to_string())
    }

    /// Ways past a judge that looks at `connect` to an IPv4 address only. nftables sees who opened a socket, not who
    /// connects it.
    fn attacks(&self, sees_tasks: bool) -> Result<Vec<(String, Attack)>> {
        let handed = (
            format!("a socket that root made, {SERVER4}"),
            self.to_bus(Way::Plain, SERVER4)?.who(Who::SocketOfRoot),
        );
        let mut all = vec![
            (format!("IPv4, {SERVER4}"), self.to_bus(Way::Plain, SERVER4)?),
            (
                format!("IPv4-mapped IPv6, ::ffff:{SERVER4}"),
                self.to_bus(Way::Mapped, SERVER4)?,
            ),
            (format!("IPv6, {SERVER6}"), self.to_bus(Way::Plain, SERVER6)?),
            (format!("io_uring, {SERVER6}"), self.to_bus(Way::IoUring, SERVER6)?),
            ("127.0.0.1".to_owned(), self.to_monit(Way::Plain)),
            (
                "0.0.0.0, which lands on 127.0.0.1".to_owned(),
                self.to_monit(Way::UnspecifiedUnbound),
            ),
        ];
        all.extend(sees_tasks.then_some(handed));
        Ok(all)
    }

    fn refused(&self, sees_tasks: bool) -> Result<()> {
        let (error, name) = if sees_tasks {
            (libc::EPERM, "EPERM")
        } else {
            (libc::ECONNREFUSED, "ECONNREFUSED")
        };
        for (what, attack) in self.attacks(sees_tasks)? {
            let Outcome { errno, time } = attack.run()?;
            ensure!(
                errno == Some(error),
                "uid {NOBODY} by {what}: {errno:?} instead of {name}"
            );
            ensure!(
                time < Duration::from_millis(500),
                "uid {NOBODY} by {what} was refused only after {time:?}"
            );
            done(&format!("uid {NOBODY} by {what}: {name} after {} µs", time.as_micros()));
        }
        Ok(())
    }

    /// This program again as the client, on the host, in the judged cgroup.
    fn client(&self) -> Result<tests::world::Ran> {
        ran(self
            .host
            .command(&env::current_exe()?)
            .arg("--client")
            .env("DEMO_CGROUP", &self.world.cgroup))
    }
}

/// Makes it the one name server of the machine: of daemon, client and commands alike.
fn resolve_by(world: &World, server: &str) -> Result<()> {
    let (file, place) = (world.path("resolv.conf"), "/etc/resolv.conf");
    fs::write(&file, format!("nameserver {server}\n"))?;
    mount(Some(&file), place, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("mount {} at {place}", file.display()))
}

/// Connects by name, subscribes, publishes, receives.
fn client() -> Result<()> {
    let cgroup = env::var_os("DEMO_CGROUP").context("no cgroup")?;
    fs::write(Path::new(&cgroup).join("cgroup.procs"), std::process::id().to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let round_trip = async {
        let client = async_nats::connect(format!("nats://{NAME}:{PORT}")).await?;
        let mut inbox = client.subscribe("demo").await?;
        let started = Instant::now();
        client.publish("demo", "hello".into()).await?;
        client.flush().await?;
        let message = inbox.next().await.context("the subscription ended")?;
        ensure!(message.payload.as_ref() == b"hello", "received {:?}", message.payload);
        let server = client.server_info().version;
        println!(
            "{NAME}:{PORT}, server {server}: \"hello\" came back after {} µs",
            started.elapsed().as_micros()
        );
        Ok(())
    };
    match runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), round_trip).await }) {
        Ok(result) => result,
        Err(_) => bail!("no round trip within 10 s"),
    }
}

fn nats_server() -> Result<PathBuf> {
    ["/usr/sbin/nats-server", "/usr/bin/nats-server"]
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .with_context(|| {
            format!(
                "nats-server is not installed; run cargo xtask setup (beside {:?})",
                binary("enforcer")
            )
        })
}

fn step(text: &str) {
    println!("\n\u{25b8} {text}");
    let _ = std::io::stdout().flush();
}

fn done(text: &str) {
    println!("  ✓ {text}");
}

fn indent(text: &str) -> String {
    text.lines()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}
