//! A process that connects, in the network namespace, cgroup and as the user of one contender, and says how long that
//! took. It is told what to do a line at a time, so that slices of several can follow each other at once.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::{Pid, Uid, setresuid},
};

use crate::world::{Netns, World};

/// The first argument of a worker.
pub const MARK: &str = "--worker";
/// How long a slice goes on at most.
const SLICE: Duration = Duration::from_millis(20);
/// Connects of a slice.
const CONNECTS: usize = 20;
/// Bytes there and back of a slice.
const TRIPS: u32 = 100;

/// A worker, ended when dropped.
#[derive(Debug)]
pub(super) struct Worker {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts one, in a network namespace and the cgroup of a world; it listens on a port and the next, unless it is to
    /// be refused.
    pub(super) fn start(netns: &Netns, world: &World, port: u16, uid: u32) -> Result<Self> {
        let mut child = netns
            .command(&std::env::current_exe()?)
            .args([MARK, &port.to_string(), &uid.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let cgroup = world.cgroup.join("cgroup.procs");
        if cgroup.exists() {
            std::fs::write(&cgroup, child.id().to_string())?;
        }
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let (to, from) = (to.context("no stdin")?, BufReader::new(from.context("no stdout")?));
        let mut worker = Self { child, to, from };
        worker.request("ready")?;
        Ok(worker)
    }

    /// What a connect takes, in nanoseconds: the median of a slice.
    pub(super) fn connect(&mut self, to: SocketAddr) -> Result<f64> {
        self.request(&format!("connect {to}"))
    }

    /// What a connect takes that is refused.
    pub(super) fn refused(&mut self, to: SocketAddr) -> Result<f64> {
        self.request(&format!("refused {to}"))
    }

    /// What a byte there and back takes, on a connection that is made the first time.
    pub(super) fn trips(&mut self, to: SocketAddr) -> Result<f64> {
        self.request(&format!("trips {to}"))
    }

    fn request(&mut self, what: &str) -> Result<f64> {
        writeln!(self.to, "{what}")?;
        let mut answer = String::new();
        self.from.read_line(&mut answer)?;
        let answer = answer.trim();
        answer
            .parse()
            .ok()
            .with_context(|| format!("{what}: the worker said {answer:?}"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Does what a worker does, until nobody asks any more.
pub fn serve(arguments: &[String]) -> Result<()> {
    let [port, uid] = arguments else { bail!("{arguments:?}") };
    let (port, uid): (u16, u32) = (port.parse()?, uid.parse()?);
    // The last processor is the workers': the bench itself and what it starts may use the others.
    let last = std::thread::available_parallelism()?.get() - 1;
    if last > 0 {
        let mut set = CpuSet::new();
        set.set(last)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
    }
    let mut listeners = Vec::new();
    if uid == 0 {
        for port in [port, port + 1] {
            let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
            socket.set_only_v6(false)?;
            socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
            socket.listen(4096)?;
            socket.set_nonblocking(true)?;
            listeners.push(TcpListener::from(socket));
        }
    } else {
        let uid = Uid::from_raw(uid);
        setresuid(uid, uid, uid)?;
    }
    let mut ends = BTreeMap::new();
    for line in io::stdin().lines() {
        let line = line?;
        let answer = match line.split_once(' ') {
            None => Ok(0.0),
            Some((what, to)) => answer(what, to.parse()?, &listeners, &mut ends),
        };
        // Not in anybody's time.
        for listener in &listeners {
            while listener.accept().is_ok() {}
        }
        match answer {
            Ok(time) => println!("{time}"),
            Err(error) => println!("{}", format!("{error:#}").replace('\n', " ")),
        }
    }
    Ok(())
}

/// Both ends of a connection, by where it leads.
type Ends = BTreeMap<SocketAddr, (TcpStream, TcpStream)>;

fn answer(what: &str, to: SocketAddr, listeners: &[TcpListener], ends: &mut Ends) -> Result<f64> {
    match what {
        "connect" => connects(to, false),
        "refused" => connects(to, true),
        "trips" => {
            let (near, far) = match ends.entry(to) {
                Entry::Occupied(made) => made.into_mut(),
                Entry::Vacant(none) => none.insert(connected(to, listeners)?),
            };
            trips(near, far)
        }
        other => bail!("what is {other:?}"),
    }
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^52 nanoseconds")]
fn nanoseconds(time: Duration) -> f64 {
    time.as_nanos() as f64
}

fn connects(to: SocketAddr, refused: bool) -> Result<f64> {
    let mut times = Vec::with_capacity(CONNECTS);
    let began = Instant::now();
    while times.len() < CONNECTS && (times.is_empty() || began.elapsed() < SLICE) {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_linger(Some(Duration::ZERO))?;
        let started = Instant::now();
        let result = socket.connect(&to.into());
        times.push(started.elapsed());
        match result {
            Ok(()) => ensure!(!refused, "{to} does not refuse"),
            Err(error) => ensure!(refused, "{to} refuses: {error}"),
        }
    }
    times.sort_unstable();
    times
        .get(times.len() / 2)
        .copied()
        .map(nanoseconds)
        .context("no connect")
}

fn connected(to: SocketAddr, listeners: &[TcpListener]) -> Result<(TcpStream, TcpStream)> {
    let near = TcpStream::connect(to)?;
    for _ in 0..1000 {
        for listener in listeners {
            if let Ok((far, _)) = listener.accept() {
                far.set_nonblocking(false)?;
                near.set_nodelay(true)?;
                far.set_nodelay(true)?;
                return Ok((near, far));
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    bail!("nobody accepts at {to}")
}

/// What a byte there and back takes, in nanoseconds.
pub(super) fn trips(near: &mut TcpStream, far: &mut TcpStream) -> Result<f64> {
    let mut byte = [0];
    let mut count = 0;
    let started = Instant::now();
    while count < TRIPS && (count == 0 || started.elapsed() < SLICE) {
        near.write_all(&byte)?;
        far.read_exact(&mut byte)?;
        far.write_all(&byte)?;
        near.read_exact(&mut byte)?;
        count += 1;
    }
    Ok(nanoseconds(started.elapsed()) / f64::from(count))
}
