//! P9: what a daemon takes that has nothing to do.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};

use super::Bench;
use crate::{
    dns::{DnsServer, Zone},
    world::World,
};

/// How long the daemon has after its start before it counts as idle.
const SETTLE: Duration = Duration::from_secs(5);
/// Names of the busiest configuration.
const NAMES: u32 = 200;

/// What a daemon did so far.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    /// Seconds on a processor.
    processor: f64,
    /// Times that a thread of it was woken.
    woken: f64,
    /// System calls of bpf(2), where they are counted.
    calls: Option<f64>,
}

/// Writes a configuration, and serves what it names.
type Configure = fn(&World) -> Result<Option<DnsServer>>;

pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    let kinds: [(&str, Configure); 4] = [
        ("BOSH defaults", bosh),
        ("64 targets", targets),
        ("100,000 endpoints", endpoints),
        ("200 names of TTL 5", names),
    ];
    for (done, (what, configure)) in kinds.iter().enumerate() {
        bench.done(done, kinds.len());
        bench.say(&format!("idle: {what}"));
        let world = World::new()?;
        let measured = configure(&world).and_then(|server| idle(bench, &world, what, server.is_some()));
        if let Err(error) = measured {
            bench.miss(&format!("idle, {what}"), &format!("{error:#}"));
        }
    }
    Ok(())
}

/// Monit, and the bus that an agent's settings name.
fn bosh(world: &World) -> Result<Option<DnsServer>> {
    let dir = world.path("bosh");
    fs::create_dir(&dir)?;
    let bus = format!("nats://10.0.0.5:{}", world.port);
    fs::write(
        dir.join("settings.json"),
        format!("{{\"agent_id\":\"x\",\"mbus\":{bus:?}}}"),
    )?;
    world.configure(&format!("[bosh]\ndir = {:?}\n", dir.display().to_string()))?;
    Ok(None)
}

fn targets(world: &World) -> Result<Option<DnsServer>> {
    let target = |number: u32| {
        let place = format!("tcp://{}:{}", Ipv4Addr::from(0x0a00_0000 + number), world.port);
        format!("[target.t{number}]\nendpoints = [{place:?}]\nallow = [\"root\"]\n")
    };
    world.configure(&(1..=64).map(target).collect::<String>())?;
    Ok(None)
}

fn endpoints(world: &World) -> Result<Option<DnsServer>> {
    let all: Vec<String> = (1..=100_000)
        .map(|host| format!("tcp://{}:{}", Ipv4Addr::from(0x0a00_0000 + host), world.port))
        .collect();
    world.configure_one(&all, r#"["root"]"#)?;
    Ok(None)
}

fn names(world: &World) -> Result<Option<DnsServer>> {
    let server = world.address();
    fs::write(world.path("resolv.conf"), format!("nameserver {server}\n"))?;
    let dns = DnsServer::start(None, server)?;
    let name = |number: u32| format!("n{number}.bench.test");
    for number in 0..NAMES {
        let address = IpAddr::from(Ipv4Addr::from(0x0a00_0000 + number));
        dns.set(&name(number), Zone::Addresses(vec![address]));
    }
    let all: Vec<String> = (0..NAMES)
        .map(|number| format!("tcp://{}:{}", name(number), world.port))
        .collect();
    world.configure_one(&all, r#"["root"]"#)?;
    Ok(Some(dns))
}

fn idle(bench: &mut Bench, world: &World, what: &str, names: bool) -> Result<()> {
    let daemon = if names {
        world.daemon_with(&mut world.with_resolver()?)?
    } else {
        world.daemon()?
    };
    // Of what runs under `unshare` and `sh` it is the same process: each executes the next.
    let pid = daemon.pid();
    thread::sleep(SETTLE);
    let calls = Calls::of(pid);
    if let Err(error) = &calls {
        bench.miss(&format!("idle, {what}: calls of bpf(2)"), &format!("{error:#}"));
    }
    let calls = calls.ok();
    let (mut processor, mut woken, mut called) = (Vec::new(), Vec::new(), Vec::new());
    let each = Duration::from_secs(if bench.quick { 2 } else { 10 });
    let mut before = spent(pid, calls.as_ref())?;
    for _ in 0..bench.rounds(240).min(6) {
        let started = Instant::now();
        thread::sleep(each);
        let took = started.elapsed().as_secs_f64();
        let after = spent(pid, calls.as_ref())?;
        processor.push((after.processor - before.processor) / took * 100.0);
        woken.push((after.woken - before.woken) / took);
        called.extend(
            after
                .calls
                .zip(before.calls)
                .map(|(after, before)| (after - before) / took),
        );
        before = after;
    }
    drop(daemon);
    let who = (what, None);
    bench.figure("P9", "idle daemon, of one processor", who, "%", processor);
    bench.figure("P9", "idle daemon, wake-ups of its threads", who, "/s", woken);
    if calls.is_some() {
        bench.figure("", "idle daemon, calls of bpf(2)", who, "/s", called);
    }
    Ok(())
}

fn spent(pid: u32, calls: Option<&Calls>) -> Result<Spent> {
    let mut spent = Spent {
        calls: calls.map(Calls::so_far).transpose()?,
        ..Spent::default()
    };
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        // Nanoseconds on a processor, nanoseconds waited for one, slices (Documentation/scheduler/sched-stats.rst).
        let schedule = fs::read_to_string(thread.join("schedstat"))?;
        let on: f64 = schedule.split(' ').next().context("no schedstat")?.parse()?;
        spent.processor += on / 1e9;
        let status = fs::read_to_string(thread.join("status"))?;
        let waited = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        spent.woken += waited.context("no context switches")?.trim().parse::<f64>()?;
    }
    Ok(spent)
}

/// Counts the calls of bpf(2) that a process makes, and any other of its name, by an instance of the kernel's tracing.
struct Calls {
    instance: PathBuf,
}

impl Calls {
    fn of(pid: u32) -> Result<Self> {
        const TRACING: &str = "/sys/kernel/tracing";
        let tracing = Path::new(TRACING);
        if !tracing.join("instances").exists() {
            // In the bench's own mount namespace.
            mount(
                Some("tracefs"),
                tracing,
                Some("tracefs"),
                MsFlags::empty(),
                None::<&str>,
            )
            .with_context(|| format!("mount {TRACING}"))?;
        }
        let instance = tracing.join(format!("instances/enforcertest_{pid}"));
        fs::create_dir(&instance).with_context(|| format!("make {}", instance.display()))?;
        let calls = Self { instance };
        // By name: the numbers that the kernel filters by are not those of this process namespace.
        let mut names = BTreeSet::new();
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            names.insert(fs::read_to_string(thread?.path().join("comm"))?.trim().to_owned());
        }
        let names: Vec<String> = names.iter().map(|name| format!("comm == {name:?}")).collect();
        calls.put("events/syscalls/sys_enter_bpf/filter", &names.join(" || "))?;
        calls.put("events/syscalls/sys_enter_bpf/enable", "1")?;
        Ok(calls)
    }

    fn put(&self, file: &str, text: &str) -> Result<()> {
        let path = self.instance.join(file);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Those in the buffers, and those that the buffers have no room for any more.
    fn so_far(&self) -> Result<f64> {
        let mut sum = 0.0;
        for processor in fs::read_dir(self.instance.join("per_cpu"))? {
            let stats = fs::read_to_string(processor?.path().join("stats"))?;
            for (field, number) in stats.lines().filter_map(|line| line.split_once(": ")) {
                if ["entries", "overrun"].contains(&field) {
                    sum += number.trim().parse::<f64>()?;
                }
            }
        }
        Ok(sum)
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        let _ = self.put("events/syscalls/sys_enter_bpf/enable", "0");
        let _ = fs::remove_dir(&self.instance);
    }
}
