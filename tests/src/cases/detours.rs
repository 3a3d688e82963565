//! Ways round by other people's help: threads of another cgroup, addresses of another's, an endpoint that dials by
//! itself, and routers that say that the way is another.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use etherparse::{
    Icmpv4Header, Icmpv4Type, IpNumber, Ipv4Header,
    icmpv4::{DestUnreachableHeader, RedirectCode, RedirectHeader},
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{
    Case,
    fragments::{OTHER, Routed, SERVER},
    nftables::Guarded,
};
use crate::{
    attack::{GREETING, Way, as_user},
    backend::{ALL, Backend, PACKETS},
    kernel::CGROUP_NEEDS,
    world::{Attack, Listener, NOBODY, Netns, World, cgroup_mount, patience, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(d3_each_thread_is_in_its_own_cgroup).on(ALL).needs(CGROUP_NEEDS),
        case!(s5_an_address_of_another_as_source_opens_nothing).on(ALL),
        case!(s5_a_forwarded_address_of_another_opens_nothing).on(PACKETS),
        case!(d1_both_sides_may_dial_at_once).on(ALL),
        case!(d1_a_redirected_way_leads_to_the_same_endpoint).on(ALL),
    ]
}

/// A threaded cgroup below another, each with an endpoint of its own, and one of another tree.
struct Threaded {
    world: World,
    _listener: Listener,
    whole: PathBuf,
    part: PathBuf,
    other: PathBuf,
}

impl Threaded {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let listener = world.listen()?;
        let whole = world.cgroup.join("whole");
        let (part, sibling, other) = (whole.join("part"), whole.join("sibling"), world.cgroup.join("other"));
        for cgroup in [&whole, &part, &sibling, &other] {
            fs::create_dir(cgroup)?;
        }
        for cgroup in [&part, &sibling] {
            fs::write(cgroup.join("cgroup.type"), "threaded")?;
        }
        Ok(Self {
            world,
            _listener: listener,
            whole,
            part,
            other,
        })
    }

    /// Lets one user in below a cgroup.
    fn allow(&self, cgroup: &Path) -> Result<()> {
        let path = format!("/{}", cgroup.strip_prefix(cgroup_mount()?)?.display());
        self.world.configure_one(
            &[format!("tcp://{}", self.world.here())],
            &format!("[{{ user = {NOBODY}, cgroup = {path:?} }}]"),
        )?;
        self.world.apply()
    }

    /// A process in one cgroup, of which one thread goes to another, makes the socket and dials.
    fn thread(&self, process: &Path, thread: &Path) -> Attack {
        let attack = self.world.attack(NOBODY).in_cgroup(process);
        attack.option("--thread-cgroup", &thread.display().to_string())
    }
}

/// A thread has the cgroup that it is in, whatever its process's other threads have; no thread gets into another tree.
fn d3_each_thread_is_in_its_own_cgroup() -> Result<()> {
    let threaded = Threaded::new()?;
    let Threaded {
        world,
        whole,
        part,
        other,
        ..
    } = &threaded;
    let sibling = whole.join("sibling");
    let ways = [
        (whole, part),
        (part, whole),
        (whole, &sibling),
        (&sibling, part),
        (part, &sibling),
    ];
    for (process, thread) in ways {
        threaded.thread(process, thread).reaches()?;
    }
    threaded.allow(part)?;
    for (process, thread) in ways {
        threaded.thread(process, thread).succeeds(thread == part)?;
    }
    for (process, reaches) in [(part, true), (whole, false), (&sibling, false), (other, false)] {
        world.attack(NOBODY).in_cgroup(process).succeeds(reaches)?;
    }
    // The whole holds its threaded parts.
    threaded.allow(whole)?;
    for (process, thread) in ways {
        threaded.thread(process, thread).reaches()?;
    }
    world.attack(NOBODY).in_cgroup(other).is_refused()?;
    // Of a process outside no thread comes in, not even by root's hand, and of one inside none goes out.
    for (process, thread) in [(other, part), (other, whole), (part, other)] {
        let outcome = threaded.thread(process, thread).run()?;
        ensure!(
            matches!(outcome.errno, Some(libc::EOPNOTSUPP | libc::EINVAL)),
            "a thread of {} got into {}: {outcome:?}",
            process.display(),
            thread.display()
        );
    }
    Ok(())
}

/// An address that nobody has; the host's way to it leads into the container.
const NOBODYS: &str = "10.60.0.9";

/// A container whose root takes packets to that address for its own sockets, as a transparent proxy does.
fn proxied() -> Result<Routed> {
    let routed = Routed::new()?;
    let (host, container) = (&routed.guarded.netns, &routed.container);
    host.ip(&["route", "add", "10.60.0.0/24", "via", "10.52.0.2"])?;
    container.nft("add table ip proxy")?;
    container.nft("add chain ip proxy early { type filter hook prerouting priority -150; }")?;
    container.nft("add rule ip proxy early meta l4proto tcp socket transparent 1 meta mark set 1 accept")?;
    container.ip(&["rule", "add", "fwmark", "1", "lookup", "100"])?;
    container.ip(&["route", "add", "local", "default", "dev", "lo", "table", "100"])?;
    Ok(routed)
}

fn from_nobodys(routed: &Routed, to: SocketAddr) -> Result<Attack> {
    let attack = routed.guarded.world.attack(0).to(to).in_netns(&routed.container)?;
    Ok(attack.way(Way::Transparent).option("--from", &format!("{NOBODYS}:0")))
}

fn at(address: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(address.parse::<IpAddr>()?, port))
}

/// For user 1 alone: who is root in the container is none of it.
fn guard(routed: &Routed) -> Result<()> {
    let world = &routed.guarded.world;
    let endpoints = [
        format!("tcp://{SERVER}:{}", world.port),
        format!("tcp://{}", world.here()),
    ];
    let backend = Backend::current().configured();
    routed.guarded.configure(backend, &endpoints, "[1]")?;
    routed.guarded.apply()
}

/// With a `connect` that eBPF sees.
fn s5_an_address_of_another_as_source_opens_nothing() -> Result<()> {
    let routed = proxied()?;
    let world = &routed.guarded.world;
    let endpoint = from_nobodys(&routed, at(SERVER, world.port)?)?;
    let loopback = from_nobodys(&routed, world.here())?;
    let other = from_nobodys(&routed, at(OTHER, world.port)?)?;
    for attack in [&endpoint, &loopback, &other] {
        attack.reaches()?;
    }
    guard(&routed)?;
    endpoint.is_refused()?;
    other.reaches()?;
    // By eBPF a container's loopback is its own (D6), wherever its root routes it.
    let backend = Backend::current();
    if backend == Backend::Ebpf {
        loopback.reaches()?;
    } else {
        loopback.is_reset()?;
    }
    let doctor = routed.guarded.netns.enforcer(world, &["doctor", "--json"])?.stdout;
    let found = doctor.contains("\"route-localnet\"");
    ensure!(found == (backend == Backend::Ebpf), "{doctor}");
    Ok(())
}

/// From a cgroup that eBPF does not judge.
fn s5_a_forwarded_address_of_another_opens_nothing() -> Result<()> {
    let routed = proxied()?;
    let world = &routed.guarded.world;
    for to in [at(SERVER, world.port)?, world.here()] {
        from_nobodys(&routed, to)?.anywhere().reaches()?;
    }
    guard(&routed)?;
    for to in [at(SERVER, world.port)?, world.here()] {
        from_nobodys(&routed, to)?.anywhere().is_reset()?;
    }
    Ok(())
}

/// A service that dials from its endpoint, under way when returned.
fn dials(netns: &Netns, from: SocketAddr, to: SocketAddr) -> Result<Socket> {
    netns.within(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SockAddr::from(from))?;
        socket.set_nonblocking(true)?;
        match socket.connect(&SockAddr::from(to)) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error.into()),
            Ok(()) | Err(_) => Ok(socket),
        }
    })
}

/// Greets whoever it gets connected with; false if nobody for so long.
fn greets(socket: &Socket, long: Duration) -> bool {
    let until = Instant::now() + long;
    while Instant::now() < until {
        if socket.peer_addr().is_ok() && socket.send(GREETING).is_ok() {
            return true;
        }
        thread::sleep(Duration::from_millis(20));
    }
    false
}

/// RFC 9293, 3.5: two SYNs that cross are one connection.
fn d1_both_sides_may_dial_at_once() -> Result<()> {
    let guarded = Guarded::new()?;
    let (world, netns) = (&guarded.world, &guarded.netns);
    let endpoint = SocketAddr::new(world.address(), world.port + 1);
    let users = SocketAddr::from((Ipv4Addr::LOCALHOST, world.port + 2));
    // So that the service goes on dialling while nobody is there yet.
    netns.nft("add table inet patient")?;
    netns.nft("add chain inet patient out { type filter hook output priority -10; }")?;
    netns.nft(&format!(
        "add rule inet patient out tcp sport {} tcp flags & rst == rst drop",
        users.port()
    ))?;
    let bound = |from: SocketAddr| -> Result<Attack> {
        Ok(guarded.attack(NOBODY)?.to(endpoint).option("--from", &from.to_string()))
    };
    let to_itself = bound(endpoint)?.flag("--no-greeting");
    let crossing = bound(users)?;
    to_itself.reaches()?;
    let service = dials(netns, endpoint, users)?;
    thread::scope(|scope| {
        let greeted = scope.spawn(|| greets(&service, patience()));
        crossing.reaches()?;
        ensure!(
            greeted.join().is_ok_and(|greeted| greeted),
            "the service did not get through"
        );
        Ok(())
    })?;
    drop(service);

    guarded.configure(
        Backend::current().configured(),
        &[format!("tcp://{endpoint}")],
        r#"["root"]"#,
    )?;
    guarded.apply()?;
    to_itself.is_refused()?;
    let service = dials(netns, endpoint, users)?;
    crossing.is_refused()?;
    ensure!(
        !greets(&service, Duration::from_millis(1500)),
        "the service got through"
    );
    drop(service);
    // An accept is no attempt to open: whom the service dials it may talk with.
    let listener = netns.within(|| Ok(as_user(NOBODY, || TcpListener::bind(users))??))?;
    let service = dials(netns, endpoint, users)?;
    let (mut accepted, from) = listener.accept()?;
    ensure!(from == endpoint, "{from} got through");
    ensure!(greets(&service, patience()), "the service did not get through");
    let mut greeting = [0; GREETING.len()];
    accepted.read_exact(&mut greeting)?;
    accepted.write_all(GREETING)?;
    service.set_nonblocking(false)?;
    TcpStream::from(service).read_exact(&mut greeting)?;
    ensure!(greeting == GREETING, "{greeting:?}");
    guarded.attack(NOBODY)?.to(endpoint).is_refused()
}

const HOST: [u8; 4] = [10, 54, 0, 1];
/// The router on the way to both, whose root forges.
const ROUTER: [u8; 4] = [10, 54, 0, 2];
/// Another one, by which the way is said to be shorter.
const SHORTER: [u8; 4] = [10, 54, 0, 3];
const ENDPOINT: [u8; 4] = [10, 99, 0, 8];
const ELSEWHERE: [u8; 4] = [10, 99, 0, 9];

struct Forger {
    guarded: Guarded,
    router: Netns,
    _listener: Listener,
}

impl Forger {
    fn new() -> Result<Self> {
        let guarded = Guarded::new()?;
        let (world, host) = (&guarded.world, &guarded.netns);
        let router = Netns::new(world, "r")?;
        router.join(&["10.54.0.2/24", "10.54.0.3/24"], host, &["10.54.0.1/24"])?;
        for address in ["10.99.0.8/32", "10.99.0.9/32"] {
            router.ip(&["address", "add", address, "dev", "lo"])?;
        }
        host.ip(&["route", "add", "10.99.0.0/24", "via", "10.54.0.2"])?;
        for (setting, value) in [
            ("accept_redirects", "1"),
            ("secure_redirects", "0"),
            ("shared_media", "1"),
        ] {
            for device in ["all", "veth0"] {
                host.set(&format!("ipv4/conf/{device}/{setting}"), value)?;
            }
        }
        let udp = [ENDPOINT, ELSEWHERE].map(IpAddr::from);
        let listener = Listener::start(Some(&router.file()), world.port, &udp)?;
        let forger = Self {
            guarded,
            router,
            _listener: listener,
        };
        // Neighbours find each other first: a redirect to one unknown does nothing yet.
        for address in [SHORTER, ENDPOINT, ELSEWHERE] {
            forger.attack(NOBODY, address)?.reaches()?;
        }
        Ok(forger)
    }

    fn attack(&self, user: u32, to: [u8; 4]) -> Result<Attack> {
        Ok(self.guarded.attack(user)?.to((to, self.guarded.world.port).into()))
    }

    /// The router's word about an echo of the host's to a destination, which the kernel believes without any socket of
    /// that kind.
    fn says(&self, kind: Icmpv4Type, about: [u8; 4]) -> Result<()> {
        let mut quoted = Ipv4Header::new(8, 64, IpNumber::ICMP, HOST, about)?.to_bytes().to_vec();
        quoted.extend([0; 8]);
        let mut packet = Icmpv4Header::with_checksum(kind, &quoted).to_bytes().to_vec();
        packet.extend(quoted);
        self.router.within(|| {
            let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
            socket.bind(&SockAddr::from(SocketAddr::from((ROUTER, 0))))?;
            socket.send_to(&packet, &SockAddr::from(SocketAddr::from((HOST, 0))))?;
            Ok(())
        })
    }

    /// Says so until the host believes it.
    fn is_believed(&self, kind: &Icmpv4Type, about: [u8; 4], sign: &str) -> Result<()> {
        let address = Ipv4Addr::from(about).to_string();
        until(&format!("the host believes {kind:?} about {address}"), || {
            self.says(kind.clone(), about)?;
            let mut ip = self.guarded.netns.command(Path::new("ip"));
            Ok(ran(ip.args(["route", "get", &address]))?
                .demand(0)?
                .stdout
                .contains(sign))
        })
    }
}

fn d1_a_redirected_way_leads_to_the_same_endpoint() -> Result<()> {
    let forger = Forger::new()?;
    let redirect = |to| {
        Icmpv4Type::Redirect(RedirectHeader {
            code: RedirectCode::RedirectForHost,
            gateway_internet_address: to,
        })
    };
    let large = |user, to| Ok::<_, anyhow::Error>(forger.attack(user, to)?.way(Way::UdpLarge));
    large(NOBODY, ENDPOINT)?.reaches()?;
    let world = &forger.guarded.world;
    let endpoint = SocketAddr::from((ENDPOINT, world.port));
    forger.guarded.configure(
        Backend::current().configured(),
        &[format!("tcp://{endpoint}"), format!("udp://{endpoint}")],
        r#"["root"]"#,
    )?;
    forger.guarded.apply()?;
    let holds = || -> Result<()> {
        for attack in [forger.attack(NOBODY, ENDPOINT)?, large(NOBODY, ENDPOINT)?] {
            attack.is_refused()?;
        }
        forger.attack(0, ENDPOINT)?.reaches()?;
        large(0, ENDPOINT)?.reaches()?;
        // What is dialled is what is judged, by whatever router it goes.
        forger.attack(NOBODY, ELSEWHERE)?.reaches()
    };
    holds()?;
    forger.is_believed(&redirect(SHORTER), ENDPOINT, "via 10.54.0.3")?;
    holds()?;
    // The way to what is no endpoint now leads over the endpoint's own host.
    forger.is_believed(&redirect(SHORTER), ELSEWHERE, "via 10.54.0.3")?;
    holds()?;
    // Smaller packets: they are judged before they are cut.
    let narrow = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 576 };
    forger.is_believed(&Icmpv4Type::DestinationUnreachable(narrow), ENDPOINT, "mtu 576")?;
    holds()
}
