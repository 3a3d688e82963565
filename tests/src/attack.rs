//! Every way to open a connection that could get round a judge at `connect`, as data and as code. Run by the binary
//! `attack` in a process of its own, which becomes the user, enters the cgroup and the namespaces, and reports one
//! line.

#![allow(unsafe_code, reason = "socket calls in forms that safe wrappers do not offer")]

mod dial;
mod hold;
mod raw;
mod subject;

use std::{
    io::{self, Read as _},
    mem::MaybeUninit,
    net::SocketAddr,
    os::fd::AsRawFd as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, SockAddr, Socket, Type};

use self::{
    dial::mapped,
    subject::{become_user, enter, on_thread},
};
pub use self::{raw::Cut, subject::as_user};

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
    /// `::` after `bind` to the IPv4-mapped destination, which turns into IPv4's loopback.
    Unspecified6Mapped,
    /// `0.0.0.0` without `bind`.
    UnspecifiedUnbound,
    BindToDevice,
    /// A SYN by a raw socket, cut as said, and no connection.
    RawSyn,
    FastOpenSendto,
    FastOpenConnect,
    /// Fast open of an IPv4-mapped address.
    FastOpenMapped,
    Mptcp,
    MptcpMapped,
    IoUring,
    IoUringSqpoll,
    /// By a worker thread of the ring.
    IoUringAsync,
    /// On a transparent socket, which may be bound to an address of somebody else's (ip(7), `IP_TRANSPARENT`).
    Transparent,
    /// Connected elsewhere first, dissolved with `AF_UNSPEC`.
    Reconnect,
    UdpConnect,
    UdpSendto,
    UdpSendmsg,
    UdpSendmmsg,
    /// More than fits into one packet.
    UdpLarge,
    UdpMapped,
    /// `sendto` on a socket that is connected elsewhere.
    UdpElsewhere,
    /// `sendto` to `0.0.0.0` after `bind` to the destination's address.
    UdpUnspecified,
    UdpUnspecifiedMapped,
    UdpUnspecified6,
    UdpIoUring,
    /// `sendto` to an address where nobody is, with an IPv6 routing header (RFC 8754) of no segments left that holds
    /// the destination.
    UdpSpentHeader,
}

impl Way {
    /// Whether it is UDP.
    #[must_use]
    pub fn is_udp(self) -> bool {
        matches!(
            self,
            Self::UdpConnect
                | Self::UdpSendto
                | Self::UdpSendmsg
                | Self::UdpSendmmsg
                | Self::UdpLarge
                | Self::UdpMapped
                | Self::UdpElsewhere
                | Self::UdpUnspecified
                | Self::UdpUnspecifiedMapped
                | Self::UdpUnspecified6
                | Self::UdpIoUring
                | Self::UdpSpentHeader
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
    /// Root makes the socket and sends it over a Unix socket to a process of the user, which connects it.
    Handed,
    /// The user makes the socket and sends it to a process of root, which connects it.
    HandedToRoot,
    /// The user makes the socket, root connects it.
    SocketForRoot,
    /// Root's socket, given to the user with `fchown`, connected by root.
    Chowned,
    /// Real UID the user's, effective and saved root's, as in a setuid-root program.
    EffectiveRoot,
    /// Real and effective UID the user's, only the saved one root's.
    SavedRoot,
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
    /// How a SYN by a raw socket is cut
    #[arg(long, value_enum, default_value = "whole")]
    pub cut: Cut,
    /// The user
    #[arg(long, default_value_t = 0)]
    pub uid: u32,
    /// cgroup to enter first
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// cgroup to enter after the socket was made
    #[arg(long)]
    pub then_cgroup: Option<PathBuf>,
    /// Threaded cgroup that a thread enters by itself, which then does all
    #[arg(long)]
    pub thread_cgroup: Option<PathBuf>,
    /// Own address and port, to be bound first
    #[arg(long)]
    pub from: Option<SocketAddr>,
    /// Network namespace to enter, by its file
    #[arg(long)]
    pub netns: Option<PathBuf>,
    /// Tries; the one that got furthest counts, of equals the fastest
    #[arg(long, default_value_t = 1)]
    pub tries: u32,
    /// Already the user, by a setuid bit: change nothing
    #[arg(long)]
    pub as_is: bool,
    /// Connect again and again until this file is gone; print how often it `connected`, was `refused`, and met an
    /// `other` error
    #[arg(long)]
    pub hammer_while: Option<PathBuf>,
    /// Milliseconds between two calls of `--hammer-while`
    #[arg(long, default_value_t = 0)]
    pub pause: u64,
    /// Connect so often and print the median of the calls in nanoseconds, whatever comes of them
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Connect again and again until refused, and print how many microseconds after the first call that was; with
    /// `--as-root-first` the first call is root's
    #[arg(long)]
    pub until_refused: bool,
    /// See `--until-refused`
    #[arg(long, requires = "until_refused")]
    pub as_root_first: bool,
    /// The listener is another server, which does not send the greeting
    #[arg(long)]
    pub no_greeting: bool,
    /// Begin to connect, say `held`, hold the socket, and print `errno NUMBER` once it fails
    #[arg(long)]
    pub hold: bool,
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
    if attempt.hold {
        become_user(attempt.uid, attempt.uid, attempt.uid)?;
        return hold::hold(attempt);
    }
    if let Some(rounds) = attempt.rounds {
        become_user(attempt.uid, attempt.uid, attempt.uid)?;
        return measure(attempt, rounds);
    }
    if attempt.until_refused {
        return until_refused(attempt);
    }
    if let Some(file) = &attempt.hammer_while {
        become_user(attempt.uid, attempt.uid, attempt.uid)?;
        return hammer(attempt, file);
    }
    let mut best: Option<(Result<(), i32>, Duration)> = None;
    for _ in 0..attempt.tries {
        let result = in_child(|| on_thread(attempt))?;
        best = Some(best.map_or(result, |best| worse(best, result)));
    }
    match best {
        Some((Ok(()), time)) => println!("connected {}", time.as_micros()),
        Some((Err(errno), time)) => println!("errno {errno} {}", time.as_micros()),
        None => {}
    }
    Ok(())
}

/// Of two tries the one that got further, so that no refusal hides what came through; of equals the faster.
fn worse(one: (Result<(), i32>, Duration), other: (Result<(), i32>, Duration)) -> (Result<(), i32>, Duration) {
    let further = |(outcome, _): &(Result<(), i32>, Duration)| match *outcome {
        Ok(()) => 2,
        Err(libc::EPERM) => 0,
        Err(_) => 1,
    };
    if (further(&other), one.1) > (further(&one), other.1) {
        other
    } else {
        one
    }
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

/// Connects over IPv4 and IPv4-mapped IPv6 in turn. Connections end by a reset, so that no port stays taken. Told apart
/// are those whose first packet was dropped: it is sent again after a second, and may get through then.
fn hammer(attempt: &Attempt, file: &std::path::Path) -> io::Result<()> {
    let (mut connected, mut refused, mut reset, mut other) = (0_u64, 0_u64, 0_u64, 0_u64);
    let mut late = 0_u64;
    let forms = [attempt.destination, mapped(attempt.destination)];
    while file.exists() {
        for to in forms.iter().cycle().take(64) {
            let socket = Socket::new(Domain::for_address(*to), Type::STREAM, None)?;
            socket.set_linger(Some(Duration::ZERO))?;
            std::thread::sleep(Duration::from_millis(attempt.pause));
            match socket.connect(&SockAddr::from(*to)) {
                Ok(()) => {
                    connected += 1;
                    late += u64::from(was_sent_again(&socket)?);
                }
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => refused += 1,
                Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => reset += 1,
                Err(_) => {
                    other += 1;
                    // Perhaps after seconds without an answer.
                    break;
                }
            }
        }
    }
    println!("connected {connected} refused {refused} reset {reset} other {other} late {late}");
    Ok(())
}

/// Whether anything that a TCP socket sent had to be sent again.
fn was_sent_again(socket: &Socket) -> io::Result<bool> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).map_err(io::Error::other)?;
    // SAFETY: both places are valid for the call, which writes no more than `length`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeros is a value of it, and so is what the kernel writes over them.
    let info = unsafe { info.assume_init() };
    Ok(info.tcpi_total_retrans > 0)
}

/// Times how long a destination is open, from the first call on.
fn until_refused(attempt: &Attempt) -> io::Result<()> {
    let dial = || {
        let socket = Socket::new(Domain::for_address(attempt.destination), Type::STREAM, None)?;
        socket.set_linger(Some(Duration::ZERO))?;
        socket.connect(&SockAddr::from(attempt.destination))
    };
    if !attempt.as_root_first {
        become_user(attempt.uid, attempt.uid, attempt.uid)?;
    }
    let begun = Instant::now();
    if attempt.as_root_first {
        dial()?;
        become_user(attempt.uid, attempt.uid, attempt.uid)?;
    }
    while begun.elapsed() < Duration::from_mins(1) {
        match dial().map_err(|error| error.raw_os_error()) {
            Ok(()) => {}
            Err(Some(libc::EPERM | libc::ECONNREFUSED)) => {
                println!("{}", begun.elapsed().as_micros());
                return Ok(());
            }
            Err(errno) => return Err(io::Error::from_raw_os_error(errno.unwrap_or_default())),
        }
    }
    Err(io::Error::other("it stays open"))
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

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
