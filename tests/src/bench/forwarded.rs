//! P3 and P4 of what a host forwards, where the rules against what hides its ports stand in the way of every packet.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use anyhow::Result;

use super::{
    Bench, Contender,
    worker::{Worker, trips},
};
use crate::world::{Listener, Netns, World};

const ROUNDS: usize = 401;

/// A container, the host that forwards what it sends, and a server behind that; rules for so many endpoints on the
/// host, or none.
struct Passage {
    who: &'static str,
    count: Option<u32>,
    worker: Worker,
    /// Both ends of a connection to what is no endpoint.
    ends: (TcpStream, TcpStream),
    _listener: Listener,
    _netns: [Netns; 3],
    world: World,
}

impl Passage {
    /// The server's address that is an endpoint where there are rules, at a port of its own, and one that is none.
    const ENDPOINT: Ipv4Addr = Ipv4Addr::new(10, 53, 0, 2);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 53, 0, 3);

    fn new(who: &'static str, rules: Option<u32>) -> Result<Self> {
        let world = World::new()?;
        let [container, host, server] = ["c", "h", "s"].map(|name| Netns::new(&world, name));
        let (container, host, server) = (container?, host?, server?);
        container.join(&["10.52.0.2/24"], &host, &["10.52.0.1/24"])?;
        for words in [
            &["link", "set", "veth0", "down"][..],
            &["link", "set", "veth0", "name", "inside"],
            &["link", "set", "inside", "up"],
        ] {
            host.ip(words)?;
        }
        server.join(&["10.53.0.2/24", "10.53.0.3/24"], &host, &["10.53.0.1/24"])?;
        container.ip(&["route", "add", "default", "via", "10.52.0.1"])?;
        server.ip(&["route", "add", "default", "via", "10.53.0.1"])?;
        host.set("ipv4/ip_forward", "1")?;
        let listener = Listener::start(Some(&server.file()), world.port + 1, &[])?;
        if let Some(count) = rules {
            let mut endpoints: Vec<String> = (1..count)
                .map(|host| format!("tcp://{}:{}", Ipv4Addr::from(0x0b00_0000 + host), world.port))
                .collect();
            endpoints.push(format!("tcp://{}:{}", Self::ENDPOINT, world.port));
            world.configure(&format!(
                "backend = \"nftables\"\n[target.main]\nendpoints = {endpoints:?}\nallow = [\"root\"]\n"
            ))?;
            host.enforcer(&world, &["apply"])?.demand(0)?;
        }
        Ok(Self {
            who,
            count: rules,
            ends: ends(&container, &server, (Self::OTHER, world.port + 2).into())?,
            worker: Worker::start(&container, &world, world.port, 0)?,
            _listener: listener,
            _netns: [container, host, server],
            world,
        })
    }

    fn place(&self, address: Ipv4Addr) -> SocketAddr {
        SocketAddr::from((address, self.world.port + 1))
    }
}

/// A connection from one network namespace to an address of another.
fn ends(from: &Netns, to: &Netns, place: SocketAddr) -> Result<(TcpStream, TcpStream)> {
    let listener = to.within(|| Ok(TcpListener::bind(place)?))?;
    let near = from.within(|| Ok(TcpStream::connect(place)?))?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    Ok((near, far))
}

type Slice = fn(&mut Passage) -> Result<f64>;

pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    let mut all = [
        Passage::new("no rules", None)?,
        Passage::new("no rules, again", None)?,
        Passage::new("enforcer, nftables", Some(1))?,
        Passage::new("enforcer, nftables", Some(10_000))?,
    ];
    let kinds: [(&str, &str, Slice); 3] = [
        ("P4", "forwarded connect, another address", |one| {
            one.worker.connect(one.place(Passage::OTHER))
        }),
        ("P4", "forwarded connect, an endpoint's address, another port", |one| {
            one.worker.connect(one.place(Passage::ENDPOINT))
        }),
        ("P3", "forwarded and established, a byte there and back", |one| {
            let (near, far) = &mut one.ends;
            trips(near, far)
        }),
    ];
    for (done, (budget, what, slice)) in kinds.iter().enumerate() {
        bench.done(done, kinds.len());
        let mut contenders: Vec<Contender<'_>> = Vec::new();
        for passage in &mut all {
            contenders.push(Contender {
                who: passage.who.to_owned(),
                endpoints: passage.count,
                slice: Box::new(move || slice(passage)),
            });
        }
        let rounds = bench.rounds(ROUNDS);
        bench.compare(budget, what, rounds, &mut contenders)?;
    }
    Ok(())
}
