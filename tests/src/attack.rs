//! Every way to open a connection that could get round a judge at `connect`, as data and as code. Run by the binary
//! `attack` in a process of its own, which becomes the user, enters the cgroup and the namespaces, and reports one line.

#![allow(unsafe_code, reason = "socket calls in forms that safe wrappers do not offer")]

use std::{
    io::{self, Read as _},
    mem::size_of,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use nix::sched::{CloneFlags, setns, unshare};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// First bytes that the listeners send: proof that they were reached.
pub const GREETING: &[u8] = b"reached";

/// One way to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Way {
    Plain,
    Nonblocking,
    Thread,
    /// `::ffff:a.b.c.d` on an IPv6 socket.
    Mapped,
    /// `0.0.0.0` after `bind` to the destination's address, so that it lands there.
    Unspecified,
    UnspecifiedMapped,
    Unspecified6,
    /// `0.0.0.0` without `bind`.
    UnspecifiedUnbound,
    BindToDevice,
    FastOpenSendto,
    FastOpenConnect,
    Mptcp,
    IoUring,
    IoUringSqpoll,
    /// Connected elsewhere first, dissolved with `AF_UNSPEC`.
    Reconnect,
    UdpConnect,
    UdpSendto,
    UdpSendmsg,
    UdpMapped,
    UdpIoUring,
}

impl Way {
    /// Whether it is UDP.
    #[must_use]
    pub fn is_udp(self) -> bool {
        matches!(
            self,
            Self::UdpConnect | Self::UdpSendto | Self::UdpSendmsg | Self::UdpMapped | Self::UdpIoUring
        )
    }
}

/// Whose task and whose socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Who {
    /// Task and socket are the user's.
    User,
    /// Root makes the socket, the user connects it.
    SocketOfRoot,
    /// The user makes the socket, root connects it.
    SocketForRoot,
    /// Root's socket, given to the user with `fchown`, connected by root.
    Chowned,
    /// Real UID the user's, effective and saved root's, as in a setuid-root program.
    EffectiveRoot,
    /// Real UID root's, effective the user's.
    EffectiveUser,
    /// Filesystem UID root's only.
    FilesystemRoot,
    /// Root in a user namespace of the user's own.
    UserNamespace,
    /// A cgroup namespace of its own.
    CgroupNamespace,
}

/// One attempt.
#[derive(Clone, Debug, Parser)]
pub struct Attempt {
    /// Way to connect
    #[arg(long, value_enum, default_value = "plain")]
    pub way: Way,
    /// Whose task and socket
    #[arg(long, value_enum, default_value = "user")]
    pub who: Who,
    /// The user
    #[arg(long, default_value_t = 0)]
    pub uid: u32,
    /// cgroup to enter first
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// cgroup to enter after the socket was made
    #[arg(long)]
    pub then_cgroup: Option<PathBuf>,
    /// Network namespace to enter, by its file
    #[arg(long)]
    pub netns: Option<PathBuf>,
    /// Tries; the fastest counts
    #[arg(long, default_value_t = 1)]
    pub tries: u32,
    /// Already the user, by a setuid bit: change nothing
    #[arg(long)]
    pub as_is: bool,
    /// Connect again and again until this file is gone; print how often it `connected`, was `refused`, and met an `other` error
    #[arg(long)]
    pub hammer_while: Option<PathBuf>,
    /// Connect so often and print the median of the calls in nanoseconds, whatever comes of them
    #[arg(long)]
    pub rounds: Option<usize>,
    /// The listener is another server, which does not send the greeting
    #[arg(long)]
    pub no_greeting: bool,
    /// Destination
    pub destination: SocketAddr,
}

/// Makes an attempt as often as asked and prints `connected MICROSECONDS` or `errno NUMBER MICROSECONDS`.
pub fn main(attempt: &Attempt) -> io::Result<()> {
    if let Some(cgroup) = &attempt.cgroup {
        enter(cgroup)?;
    }
    if let Some(netns) = &attempt.netns {
        setns(std::fs::File::open(netns)?, CloneFlags::CLONE_NEWNET)?;
    }
    if let Some(rounds) = attempt.rounds {
        become_user(attempt.uid, attempt.uid, attempt.uid)?;
        return measure(attempt, rounds);
    }
    if let Some(file) = &attempt.hammer_while {
        become_user(attempt.uid, attempt.uid, attempt.uid)?;
        return hammer(attempt, file);
    }
    let mut best: Option<(Result<(), i32>, Duration)> = None;
    for _ in 0..attempt.tries {
        // SAFETY: the child does nothing but its attempt, then exits.
        let result = in_child(|| once(attempt))?;
        if best.is_none_or(|(outcome, time)| outcome != result.0 || result.1 < time) {
            best = Some(result);
        }
    }
    match best {
        Some((Ok(()), time)) => println!("connected {}", time.as_micros()),
        Some((Err(errno), time)) => println!("errno {errno} {}", time.as_micros()),
        None => {}
    }
    Ok(())
}

/// Times `connect` alone, by the monotonic clock.
fn measure(attempt: &Attempt, rounds: usize) -> io::Result<()> {
    let to = SockAddr::from(attempt.destination);
    let mut times = Vec::with_capacity(rounds);
    if attempt.way.is_udp() {
        // The same socket again and again: little else happens, so that the program's own time shows.
        let socket = Socket::new(Domain::for_address(attempt.destination), Type::DGRAM, None)?;
        for _ in 0..rounds {
            let _ = socket.connect(&to);
        }
        println!("0");
        return Ok(());
    }
    for _ in 0..rounds {
        let socket = Socket::new(Domain::for_address(attempt.destination), Type::STREAM, None)?;
        socket.set_linger(Some(Duration::ZERO))?;
        let started = Instant::now();
        let _ = socket.connect(&to);
        times.push(started.elapsed());
    }
    times.sort_unstable();
    println!("{}", times.get(rounds / 2).map_or(0, Duration::as_nanos));
    Ok(())
}

/// Connects over IPv4 and IPv4-mapped IPv6 in turn. Connections end by a reset, so that no port stays taken.
fn hammer(attempt: &Attempt, file: &std::path::Path) -> io::Result<()> {
    let (mut connected, mut refused, mut other) = (0_u64, 0_u64, 0_u64);
    let forms = [attempt.destination, mapped(attempt.destination)];
    while file.exists() {
        for to in forms.iter().cycle().take(64) {
            let socket = Socket::new(Domain::for_address(*to), Type::STREAM, None)?;
            socket.set_linger(Some(Duration::ZERO))?;
            match socket.connect(&SockAddr::from(*to)) {
                Ok(()) => connected += 1,
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => refused += 1,
                Err(_) => other += 1,
            }
        }
    }
    println!("connected {connected} refused {refused} other {other}");
    Ok(())
}

fn enter(cgroup: &std::path::Path) -> io::Result<()> {
    std::fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
}

/// Runs in a forked child, so that each try starts with the credentials that we have.
fn in_child(work: impl FnOnce() -> io::Result<Duration>) -> io::Result<(Result<(), i32>, Duration)> {
    let (mut reader, writer) = io::pipe()?;
    // SAFETY: this process has one thread.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let (errno, micros) = match work() {
            Ok(time) => (0, time.as_micros()),
            Err(error) => {
                let text = error.to_string();
                let time = text.rsplit(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0);
                (
                    error
                        .raw_os_error()
                        .or_else(|| text.split(' ').next()?.parse().ok())
                        .unwrap_or(-1),
                    time,
                )
            }
        };
        let _ = io::Write::write_all(&mut &writer, format!("{errno} {micros}").as_bytes());
        std::process::exit(0);
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    // SAFETY: our own child.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    let mut words = text.split(' ').map(|word| word.parse::<i64>().unwrap_or(-1));
    let (errno, micros) = (words.next().unwrap_or(-1), words.next().unwrap_or(0));
    let time = Duration::from_micros(u64::try_from(micros).unwrap_or(0));
    let outcome = if errno == 0 {
        Ok(())
    } else {
        Err(i32::try_from(errno).unwrap_or(-1))
    };
    Ok((outcome, time))
}

fn once(attempt: &Attempt) -> io::Result<Duration> {
    let user = attempt.uid;
    if attempt.as_is {
        let socket = make(attempt)?;
        return timed(attempt, &socket);
    }
    match attempt.who {
        Who::User => {
            become_user(user, user, user)?;
            let socket = make(attempt)?;
            move_on(attempt)?;
            timed(attempt, &socket)
        }
        Who::SocketOfRoot => {
            let socket = make(attempt)?;
            become_user(user, user, user)?;
            timed(attempt, &socket)
        }
        Who::SocketForRoot => {
            become_user(0, user, 0)?;
            let socket = make(attempt)?;
            become_user(0, 0, 0)?;
            timed(attempt, &socket)
        }
        Who::Chowned => {
            let socket = make(attempt)?;
            // SAFETY: a plain call on our own descriptor.
            check(unsafe { libc::fchown(socket.as_raw_fd(), user, u32::MAX) })?;
            timed(attempt, &socket)
        }
        Who::EffectiveRoot => {
            become_user(user, 0, 0)?;
            let socket = make(attempt)?;
            timed(attempt, &socket)
        }
        Who::EffectiveUser => {
            become_user(0, user, 0)?;
            let socket = make(attempt)?;
            timed(attempt, &socket)
        }
        Who::FilesystemRoot => {
            become_user(user, user, 0)?;
            // SAFETY: changes this process's filesystem UID only; allowed, as the saved UID is root's.
            unsafe { libc::setfsuid(0) };
            let socket = make(attempt)?;
            timed(attempt, &socket)
        }
        Who::UserNamespace => {
            become_user(user, user, user)?;
            unshare(CloneFlags::CLONE_NEWUSER)?;
            std::fs::write("/proc/self/setgroups", "deny")?;
            std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
            become_user(0, 0, 0)?;
            let socket = make(attempt)?;
            timed(attempt, &socket)
        }
        Who::CgroupNamespace => {
            unshare(CloneFlags::CLONE_NEWCGROUP)?;
            become_user(user, user, user)?;
            let socket = make(attempt)?;
            timed(attempt, &socket)
        }
    }
}

fn move_on(attempt: &Attempt) -> io::Result<()> {
    attempt.then_cgroup.as_deref().map_or(Ok(()), enter)
}

fn become_user(real: u32, effective: u32, saved: u32) -> io::Result<()> {
    // SAFETY: changes this process's credentials only.
    check(unsafe { libc::setresuid(real, effective, saved) })?;
    // A change of credentials makes /proc/self root's, where a user namespace's maps are written.
    // SAFETY: as above.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) })
}

#[allow(clippy::wildcard_enum_match_arm, reason = "all other ways are plain TCP")]
fn make(attempt: &Attempt) -> io::Result<Socket> {
    let v6 = attempt.destination.is_ipv6()
        || matches!(
            attempt.way,
            Way::Mapped | Way::UnspecifiedMapped | Way::UdpMapped | Way::Unspecified6
        );
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let (kind, protocol) = match attempt.way {
        Way::Mptcp => (Type::STREAM, Some(Protocol::MPTCP)),
        way if way.is_udp() => (Type::DGRAM, None),
        _ => (Type::STREAM, None),
    };
    let socket = Socket::new(domain, kind, protocol)?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    Ok(socket)
}

/// The call itself on the clock, then proof that it reached the listener. An error ends with the microseconds.
fn timed(attempt: &Attempt, socket: &Socket) -> io::Result<Duration> {
    let mut started = Instant::now();
    let result = dial(attempt, socket, &mut started);
    let (result, time) = match result {
        Ok(time) => (Ok(()), time),
        Err(error) => (Err(error), started.elapsed()),
    };
    if let Err(error) = result {
        return Err(io::Error::other(format!(
            "{} {}",
            error.raw_os_error().unwrap_or(-1),
            time.as_micros()
        )));
    }
    if attempt.no_greeting {
        return Ok(time);
    }
    let mut greeting = [0; 7];
    // SAFETY: a duplicate of a live descriptor, owned by the stream.
    let fd = unsafe { OwnedFd::from_raw_fd(libc::dup(socket.as_raw_fd())) };
    let read = if attempt.way.is_udp() {
        std::net::UdpSocket::from(fd).recv(&mut greeting)?
    } else {
        let mut stream = TcpStream::from(fd);
        stream.set_nonblocking(false)?;
        stream.read_exact(&mut greeting).map(|()| greeting.len())?
    };
    if greeting.get(..read) == Some(GREETING) {
        Ok(time)
    } else {
        Err(io::Error::other("reached another listener"))
    }
}

/// `started` is set anew where there is something to set up first.
fn dial(attempt: &Attempt, socket: &Socket, started: &mut Instant) -> io::Result<Duration> {
    let to = attempt.destination;
    let port = to.port();
    let plain = |address: SocketAddr| socket.connect(&SockAddr::from(address));
    match attempt.way {
        Way::Plain | Way::Mptcp => plain(to)?,
        Way::Mapped => plain(mapped(to))?,
        Way::Thread => {
            std::thread::scope(|scope| scope.spawn(|| plain(to)).join()).map_err(|_| io::Error::other("panic"))??;
        }
        Way::Nonblocking => {
            socket.set_nonblocking(true)?;
            match plain(to) {
                Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => wait_writable(socket)?,
                result => result?,
            }
        }
        Way::Unspecified => {
            socket.bind(&SockAddr::from(SocketAddr::new(to.ip(), 0)))?;
            plain((Ipv4Addr::UNSPECIFIED, port).into())?;
        }
        Way::UnspecifiedMapped => {
            socket.bind(&SockAddr::from(mapped(SocketAddr::new(to.ip(), 0))))?;
            plain(mapped((Ipv4Addr::UNSPECIFIED, port).into()))?;
        }
        Way::Unspecified6 => plain((Ipv6Addr::UNSPECIFIED, port).into())?,
        Way::UnspecifiedUnbound => plain((Ipv4Addr::UNSPECIFIED, port).into())?,
        Way::BindToDevice => {
            socket.bind_device(Some(b"lo"))?;
            plain((Ipv4Addr::UNSPECIFIED, port).into())?;
        }
        Way::FastOpenSendto => {
            socket.send_to_with_flags(b"x", &SockAddr::from(to), libc::MSG_FASTOPEN)?;
        }
        Way::FastOpenConnect => {
            const TCP_FASTOPEN_CONNECT: i32 = 30;
            let on = 1_i32;
            // SAFETY: an int option of the size given.
            check(unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::IPPROTO_TCP,
                    TCP_FASTOPEN_CONNECT,
                    std::ptr::from_ref(&on).cast(),
                    4,
                )
            })?;
            plain(to)?;
            socket.send(b"x")?;
        }
        Way::IoUring | Way::IoUringSqpoll => {
            let mut builder = io_uring::IoUring::builder();
            if attempt.way == Way::IoUringSqpoll {
                builder.setup_sqpoll(1000);
            }
            let ring = builder.build(4)?;
            *started = Instant::now();
            ring_connect(socket, to, ring)?;
        }
        Way::Reconnect => {
            let elsewhere = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            plain(elsewhere.local_addr()?)?;
            let nowhere = libc::sockaddr {
                sa_family: 0,
                sa_data: [0; 14],
            };
            // SAFETY: AF_UNSPEC dissolves the association (man 2 connect).
            check(unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, 16) })?;
            plain(to)?;
        }
        Way::UdpConnect => {
            plain(to)?;
            socket.send(b"x")?;
        }
        Way::UdpSendto => drop(socket.send_to(b"x", &SockAddr::from(to))?),
        Way::UdpMapped => drop(socket.send_to(b"x", &SockAddr::from(mapped(to)))?),
        Way::UdpSendmsg => {
            let data = [io::IoSlice::new(b"x")];
            socket.sendmsg(
                &socket2::MsgHdr::new()
                    .with_addr(&SockAddr::from(to))
                    .with_buffers(&data),
                0,
            )?;
        }
        Way::UdpIoUring => ring_sendmsg(socket, to)?,
    }
    Ok(started.elapsed())
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => SocketAddrV6::new(v4.to_ipv6_mapped(), address.port(), 0, 0).into(),
        IpAddr::V6(_) => address,
    }
}

fn wait_writable(socket: &Socket) -> io::Result<()> {
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one entry, as said.
    check(unsafe { libc::poll(&raw mut poll, 1, 3000) })?;
    socket.take_error()?.map_or(Ok(()), Err)
}

fn ring_connect(socket: &Socket, to: SocketAddr, ring: io_uring::IoUring) -> io::Result<()> {
    let address = SockAddr::from(to);
    let fd = io_uring::types::Fd(socket.as_raw_fd());
    let entry = io_uring::opcode::Connect::new(fd, address.as_ptr().cast(), address.len()).build();
    submit(ring, &entry)
}

fn ring_sendmsg(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    let address = SockAddr::from(to);
    let mut data = libc::iovec {
        iov_base: b"x".as_ptr().cast_mut().cast(),
        iov_len: 1,
    };
    // SAFETY: a structure of integers and pointers, for which zeros are values.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = address.as_ptr().cast_mut().cast();
    message.msg_namelen = address.len();
    message.msg_iov = &raw mut data;
    message.msg_iovlen = 1;
    let fd = io_uring::types::Fd(socket.as_raw_fd());
    let entry = io_uring::opcode::SendMsg::new(fd, &raw const message).build();
    submit(io_uring::IoUring::new(4)?, &entry)
}

fn submit(mut ring: io_uring::IoUring, entry: &io_uring::squeue::Entry) -> io::Result<()> {
    // SAFETY: what the entry points to outlives the wait for its completion below.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let result = ring
        .completion()
        .next()
        .map_or(-libc::EIO, |completion| completion.result());
    if result < 0 {
        Err(io::Error::from_raw_os_error(-result))
    } else {
        Ok(())
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

const _: () = assert!(size_of::<libc::sockaddr>() == 16);
