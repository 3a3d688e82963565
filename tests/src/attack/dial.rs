//! The calls that open a connection, each way as a program would make them, and proof of whom they reached.

use std::{
    io::{self, Read as _},
    mem::size_of,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{Attempt, GREETING, Way, check};

#[allow(clippy::wildcard_enum_match_arm, reason = "all other ways are plain TCP")]
pub(super) fn make(attempt: &Attempt) -> io::Result<Socket> {
    let v6 = attempt.destination.is_ipv6()
        || matches!(
            attempt.way,
            Way::Mapped
                | Way::UnspecifiedMapped
                | Way::Unspecified6
                | Way::Unspecified6Mapped
                | Way::FastOpenMapped
                | Way::MptcpMapped
                | Way::UdpMapped
                | Way::UdpUnspecifiedMapped
                | Way::UdpUnspecified6
        );
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let (kind, protocol) = match attempt.way {
        Way::Mptcp | Way::MptcpMapped => (Type::STREAM, Some(Protocol::MPTCP)),
        way if way.is_udp() => (Type::DGRAM, None),
        _ => (Type::STREAM, None),
    };
    let socket = Socket::new(domain, kind, protocol)?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    Ok(socket)
}

/// The call itself on the clock, then proof that it reached the listener. An error ends with the microseconds.
pub(super) fn timed(attempt: &Attempt, socket: &Socket) -> io::Result<Duration> {
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
    if attempt.no_greeting || attempt.way == Way::RawSyn {
        return Ok(time);
    }
    let mut greeting = [0; 7];
    // SAFETY: a duplicate of a live descriptor, owned by the stream.
    let fd = unsafe { OwnedFd::from_raw_fd(libc::dup(socket.as_raw_fd())) };
    let read = if attempt.way.is_udp() {
        greeted(&std::net::UdpSocket::from(fd), &mut greeting)?
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

/// Waits on when it is interrupted: what an `io_uring` leaves to do when it is closed does that, and a wait with a
/// timeout is not resumed by the kernel (signal(7)).
fn greeted(socket: &std::net::UdpSocket, greeting: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.recv(greeting) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// `started` is set anew where there is something to set up first.
fn dial(attempt: &Attempt, socket: &Socket, started: &mut Instant) -> io::Result<Duration> {
    let to = attempt.destination;
    let port = to.port();
    let plain = |address: SocketAddr| socket.connect(&SockAddr::from(address));
    if let Some(from) = attempt.from {
        if attempt.way == Way::Transparent {
            set(socket, libc::IPPROTO_IP, libc::IP_TRANSPARENT)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&SockAddr::from(from))?;
        *started = Instant::now();
    }
    match attempt.way {
        Way::Plain | Way::Mptcp | Way::Transparent => plain(to)?,
        Way::Mapped | Way::MptcpMapped => plain(mapped(to))?,
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
        Way::Unspecified6Mapped => {
            socket.bind(&SockAddr::from(mapped(SocketAddr::new(to.ip(), 0))))?;
            plain((Ipv6Addr::UNSPECIFIED, port).into())?;
        }
        Way::UnspecifiedUnbound => plain((Ipv4Addr::UNSPECIFIED, port).into())?,
        Way::BindToDevice => {
            socket.bind_device(Some(b"lo"))?;
            plain((Ipv4Addr::UNSPECIFIED, port).into())?;
        }
        Way::RawSyn => super::raw::syn(to, attempt.cut)?,
        Way::FastOpenSendto => {
            socket.send_to_with_flags(b"x", &SockAddr::from(to), libc::MSG_FASTOPEN)?;
        }
        Way::FastOpenMapped => {
            socket.send_to_with_flags(b"x", &SockAddr::from(mapped(to)), libc::MSG_FASTOPEN)?;
        }
        Way::FastOpenConnect => {
            defer(socket)?;
            plain(to)?;
            socket.send(b"x")?;
        }
        Way::IoUring | Way::IoUringSqpoll | Way::IoUringAsync => {
            let mut builder = io_uring::IoUring::builder();
            if attempt.way == Way::IoUringSqpoll {
                builder.setup_sqpoll(1000);
            }
            let ring = builder.build(4)?;
            *started = Instant::now();
            ring_connect(socket, to, ring, attempt.way == Way::IoUringAsync)?;
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
            *started = Instant::now();
            plain(to)?;
        }
        Way::UdpConnect
        | Way::UdpSendto
        | Way::UdpSendmsg
        | Way::UdpSendmmsg
        | Way::UdpLarge
        | Way::UdpMapped
        | Way::UdpElsewhere
        | Way::UdpUnspecified
        | Way::UdpUnspecifiedMapped
        | Way::UdpUnspecified6
        | Way::UdpIoUring
        | Way::UdpSpentHeader => dial_udp(attempt, socket)?,
    }
    Ok(started.elapsed())
}

/// Lets `connect` wait for the first data (man 7 tcp, `TCP_FASTOPEN_CONNECT`).
pub(super) fn defer(socket: &Socket) -> io::Result<()> {
    const TCP_FASTOPEN_CONNECT: i32 = 30;
    set(socket, libc::IPPROTO_TCP, TCP_FASTOPEN_CONNECT)
}

/// Switches an option on that is an int.
fn set(socket: &Socket, level: i32, option: i32) -> io::Result<()> {
    let on = 1_i32;
    // SAFETY: an int option of the size given.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, std::ptr::from_ref(&on).cast(), 4) })
}

pub(super) fn mapped(address: SocketAddr) -> SocketAddr {
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

#[allow(clippy::wildcard_enum_match_arm, reason = "all other ways are TCP")]
fn dial_udp(attempt: &Attempt, socket: &Socket) -> io::Result<()> {
    let to = attempt.destination;
    let port = to.port();
    let plain = |address: SocketAddr| socket.connect(&SockAddr::from(address));
    match attempt.way {
        Way::UdpConnect => {
            plain(to)?;
            socket.send(b"x")?;
        }
        Way::UdpSendto => drop(socket.send_to(b"x", &SockAddr::from(to))?),
        Way::UdpLarge => drop(socket.send_to(&[b'x'; 4000], &SockAddr::from(to))?),
        Way::UdpMapped => drop(socket.send_to(b"x", &SockAddr::from(mapped(to)))?),
        Way::UdpElsewhere => {
            let elsewhere = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            plain(elsewhere.local_addr()?)?;
            socket.send_to(b"x", &SockAddr::from(to))?;
            // The answer comes from where this socket is not connected to.
            plain(to)?;
            socket.send(b"x")?;
        }
        Way::UdpUnspecified => {
            socket.bind(&SockAddr::from(SocketAddr::new(to.ip(), 0)))?;
            socket.send_to(b"x", &SockAddr::from(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))))?;
        }
        Way::UdpUnspecifiedMapped => {
            socket.bind(&SockAddr::from(mapped(SocketAddr::new(to.ip(), 0))))?;
            socket.send_to(b"x", &SockAddr::from(mapped((Ipv4Addr::UNSPECIFIED, port).into())))?;
        }
        Way::UdpUnspecified6 => {
            socket.send_to(b"x", &SockAddr::from(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))))?;
        }
        Way::UdpSendmmsg => send_several(socket, to)?,
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
        Way::UdpSpentHeader => {
            let (nowhere, by) = spent_header(to)?;
            // SAFETY: a header of the length given (man 7 ipv6, IPV6_RTHDR).
            check(unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::IPPROTO_IPV6,
                    libc::IPV6_RTHDR,
                    by.as_ptr().cast(),
                    24,
                )
            })?;
            socket.send_to(b"x", &SockAddr::from(SocketAddr::from((nowhere, port))))?;
        }
        _ => {}
    }
    Ok(())
}

/// A segment routing header of one segment, none left: the kernel sends the packet to that segment, wherever the call
/// wanted it to go. With it an address to be named by the call: the kernel makes the checksum for that, so that it has
/// the same words in another order.
fn spent_header(to: SocketAddr) -> io::Result<(Ipv6Addr, [u8; 24])> {
    const SEGMENT_ROUTING: u8 = 4;
    let IpAddr::V6(segment) = to.ip() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut header = [0; 24];
    // Its length beyond the first 8 bytes in units of 8; segments left and the last segment's number are 0.
    header[1..3].copy_from_slice(&[2, SEGMENT_ROUTING]);
    header[8..].copy_from_slice(&segment.octets());
    let mut words = segment.segments();
    words.rotate_left(1);
    Ok((Ipv6Addr::from(words), header))
}

fn ring_connect(socket: &Socket, to: SocketAddr, ring: io_uring::IoUring, by_worker: bool) -> io::Result<()> {
    let address = SockAddr::from(to);
    let fd = io_uring::types::Fd(socket.as_raw_fd());
    let entry = io_uring::opcode::Connect::new(fd, address.as_ptr().cast(), address.len()).build();
    let flags = if by_worker {
        io_uring::squeue::Flags::ASYNC
    } else {
        io_uring::squeue::Flags::empty()
    };
    submit(ring, &entry.flags(flags))
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

fn send_several(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    let address = SockAddr::from(to);
    let mut data = libc::iovec {
        iov_base: b"x".as_ptr().cast_mut().cast(),
        iov_len: 1,
    };
    // SAFETY: a structure of integers and pointers, for which zeros are values.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_name = address.as_ptr().cast_mut().cast();
    message.msg_hdr.msg_namelen = address.len();
    message.msg_hdr.msg_iov = &raw mut data;
    message.msg_hdr.msg_iovlen = 1;
    let mut messages = [message, message];
    // SAFETY: two messages, as said; what they point to is alive.
    check(unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), 2, 0) })
}

fn submit(mut ring: io_uring::IoUring, entry: &io_uring::squeue::Entry) -> io::Result<()> {
    // SAFETY: what the entry points to outlives the wait for its completion below.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    // A wait that is interrupted is no attempt that failed: the entry has been submitted.
    while let Err(error) = ring.submit_and_wait(1) {
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
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

const _: () = assert!(size_of::<libc::sockaddr>() == 16);
