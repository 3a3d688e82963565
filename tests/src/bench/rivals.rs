//! What a user would pick instead, each in a network namespace of its own, beside ours.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use super::{events::Events, worker::Worker};
use crate::{
    foreign::{ForeignProgram, Sharing},
    world::{NOBODY, Netns, Ran, World, ran},
};

/// How long an installation may take, in seconds.
const LIMIT: &str = "120";

/// Who protects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rival {
    /// Nobody.
    Nobody,
    /// Nobody, again.
    NobodyAgain,
    /// A program that returns 1.
    EmptyProgram,
    /// Ours.
    Ebpf,
    /// Ours.
    Nftables,
    /// A set, and one rule that sees what begins a connection.
    NftSet,
    /// Two rules an address behind `ct state`, as the Go agent's.
    NftLinear,
    /// A rule an address.
    Iptables,
}

/// All, the control first.
pub(super) const RIVALS: [Rival; 8] = [
    Rival::Nobody,
    Rival::NobodyAgain,
    Rival::EmptyProgram,
    Rival::Ebpf,
    Rival::Nftables,
    Rival::NftSet,
    Rival::NftLinear,
    Rival::Iptables,
];

/// One that is installed, and who connects there.
pub(super) struct Installed {
    pub(super) rival: Rival,
    pub(super) root: Worker,
    /// Where a denial is immediate.
    pub(super) nobody: Option<Worker>,
    /// Where a denial has an event.
    pub(super) events: Option<Events>,
    pub(super) took: Duration,
    count: u32,
    updates: u32,
    netns: Netns,
    world: World,
    _program: Option<ForeignProgram>,
}

impl Rival {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Nobody => "no rules",
            Self::NobodyAgain => "no rules, again",
            Self::EmptyProgram => "empty eBPF program",
            Self::Ebpf => "enforcer, ebpf",
            Self::Nftables => "enforcer, nftables",
            Self::NftSet => "nft: a set by hand",
            Self::NftLinear => "nft: rules as the Go agent's",
            Self::Iptables => "iptables -m owner",
        }
    }

    /// Whether it protects anything.
    pub(super) const fn protects(self) -> bool {
        !matches!(self, Self::Nobody | Self::NobodyAgain | Self::EmptyProgram)
    }

    /// Installs it for so many endpoints; the last is the one that is connected to.
    pub(super) fn install(self, count: u32) -> Result<Installed> {
        let world = World::new()?;
        let netns = Netns::new(&world, "b")?;
        let started = Instant::now();
        let mut program = None;
        match self {
            Self::Nobody | Self::NobodyAgain => {}
            Self::EmptyProgram => program = Some(ForeignProgram::passing(&world.cgroup, Sharing::None)?),
            Self::Ebpf | Self::Nftables => {
                self.configure(&world, count, 0)?;
                done(&netns.enforcer(&world, &["apply"])?)?;
            }
            Self::NftSet | Self::NftLinear => {
                write(&world, &nft(self, &world, count))?;
                feed(&netns, &world, "nft", &["-f"])?;
            }
            Self::Iptables => {
                write(&world, &iptables(&world, count))?;
                feed(&netns, &world, "iptables-restore", &[])?;
            }
        }
        let took = started.elapsed();
        // The agent's rules drop: whoever is denied waits for two minutes.
        let refuses = self.protects() && self != Self::NftLinear;
        let events = (self == Self::Ebpf).then(|| Events::open(&world)).transpose()?;
        Ok(Installed {
            rival: self,
            events,
            root: Worker::start(&netns, &world, world.port, 0)?,
            nobody: refuses
                .then(|| Worker::start(&netns, &world, world.port, NOBODY))
                .transpose()?,
            took,
            count,
            updates: 0,
            netns,
            world,
            _program: program,
        })
    }

    /// Writes our configuration; another one for each `change`.
    fn configure(self, world: &World, count: u32, change: u32) -> Result<()> {
        let mut all: Vec<String> = addresses(world, count)
            .map(|address| format!("tcp://{address}:{}", world.port))
            .collect();
        if change > 0 {
            all.insert(0, format!("tcp://{}:{}", added(change), world.port));
        }
        let backend = if self == Self::Ebpf { "ebpf" } else { "nftables" };
        world.configure(&format!(
            "backend = {backend:?}\n[target.main]\nendpoints = {all:?}\nallow = [\"root\"]\n"
        ))
    }
}

impl Installed {
    /// The endpoint that is connected to.
    pub(super) fn endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.world.address(), self.world.port)
    }

    /// The same port of another address.
    pub(super) fn beside(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.world.port))
    }

    /// Another port.
    pub(super) fn elsewhere(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.world.port + 1))
    }

    /// Protects one endpoint more, as a user of it would, and says how long that took.
    pub(super) fn update(&mut self) -> Result<Duration> {
        self.updates += 1;
        let (address, port) = (added(self.updates), self.world.port);
        let port_text = port.to_string();
        if matches!(self.rival, Rival::Ebpf | Rival::Nftables) {
            self.rival.configure(&self.world, self.count, self.updates)?;
        }
        let started = Instant::now();
        match self.rival {
            Rival::Nobody | Rival::NobodyAgain | Rival::EmptyProgram => {}
            Rival::Ebpf | Rival::Nftables => done(&self.netns.enforcer(&self.world, &["apply"])?)?,
            Rival::NftSet => {
                let command = format!("add element inet rival guarded {{ {address} . {port} }}");
                self.netns.nft(&command)?;
            }
            Rival::NftLinear => {
                let rule =
                    |verdict: &str| format!("add rule inet rival out ip daddr {address} tcp dport {port} {verdict}");
                self.netns
                    .nft(&format!("{}; {}", rule("meta skuid 0 accept"), rule("drop")))?;
            }
            Rival::Iptables => {
                let to = address.to_string();
                let words = ["-A", "OUTPUT", "-p", "tcp", "-d", &to, "--dport", &port_text];
                let who = ["-m", "owner", "!", "--uid-owner", "0"];
                let how = ["-j", "REJECT", "--reject-with", "tcp-reset"];
                let mut command = self.netns.command(Path::new("iptables"));
                done(&ran(command.args(words).args(who).args(how))?)?;
            }
        }
        Ok(started.elapsed())
    }
}

/// All but the last, where nobody is.
fn addresses(world: &World, count: u32) -> impl Iterator<Item = IpAddr> {
    let others = (1..count).map(|host| IpAddr::from(Ipv4Addr::from(0x0a00_0000 + host)));
    others.chain([world.address()])
}

/// One that comes later.
fn added(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0b00_0000 + number)
}

fn nft(rival: Rival, world: &World, count: u32) -> String {
    let port = world.port;
    let chain = "chain out {\ntype filter hook output priority 0;\n";
    let mut text = "table inet rival {\n".to_owned();
    if rival == Rival::NftSet {
        text += "set guarded {\ntype ipv4_addr . inet_service;\nelements = {\n";
        for address in addresses(world, count) {
            let _ = writeln!(text, "{address} . {port},");
        }
        let _ = writeln!(
            text,
            "}}\n}}\n{chain}tcp flags & (syn | ack) == syn ip daddr . tcp dport @guarded meta skuid != 0 reject with \
             tcp reset"
        );
    } else {
        let _ = writeln!(text, "{chain}ct state established,related accept");
        for address in addresses(world, count) {
            let _ = writeln!(text, "ip daddr {address} tcp dport {port} meta skuid 0 accept");
            let _ = writeln!(text, "ip daddr {address} tcp dport {port} drop");
        }
    }
    text + "}\n}\n"
}

fn iptables(world: &World, count: u32) -> String {
    let port = world.port;
    let mut text = "*filter\n".to_owned();
    for address in addresses(world, count) {
        let _ = writeln!(
            text,
            "-A OUTPUT -p tcp -d {address} --dport {port} -m owner ! --uid-owner 0 -j REJECT --reject-with tcp-reset"
        );
    }
    text + "COMMIT\n"
}

fn write(world: &World, text: &str) -> Result<()> {
    Ok(fs::write(world.path("rules"), text)?)
}

/// Runs a program that reads the rules from their file, for as long as is allowed.
fn feed(netns: &Netns, world: &World, program: &str, words: &[&str]) -> Result<()> {
    if !has(program) {
        bail!("{program} is not here");
    }
    let mut command = netns.command(Path::new("timeout"));
    done(&ran(command
        .args([LIMIT, program])
        .args(words)
        .arg(world.path("rules")))?)
}

fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).exists())
}

fn done(ran: &Ran) -> Result<()> {
    match ran.code {
        0 => Ok(()),
        124 => bail!("it was not done after {LIMIT} s"),
        code => {
            let said = ran.stderr.lines().next().unwrap_or_default();
            bail!("it fails with exit code {code}: {said}")
        }
    }
}
