//! Denials and dials, as the table's rules send them to a netlink group (nflog): the packet and its socket's user.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, RawFd},
    time::Duration,
};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::{
    NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nflog::{ConfigCmd, ConfigFlags, ConfigMode, PacketNla, Timeout, ULogMessage, config_request},
};
use nix::sys::socket::{MsgFlags, recv};

use super::image::{DIAL, LOG_PREFIX};
use crate::{backend::Dial, policy::Protocol};

/// First of the groups that are tried; administrators count theirs from 0.
const FIRST_GROUP: u16 = 40_000;
/// How many: each instance on a host needs one.
const GROUPS: u16 = 64;
/// Longest message: that of the kernel's own limit (`NFULNL_NLBUFSIZ_DEFAULT` to 131,072).
const LONGEST: usize = 128 << 10;
/// Most time that the kernel keeps a denial to send it with others.
const DELAY: Duration = Duration::from_millis(20);

/// The listener to one group.
#[derive(Debug)]
pub(crate) struct NflogListener {
    socket: Socket,
    /// The group.
    pub group: u16,
    waiting: Vec<Logged>,
    /// What messages are read into: as long as the longest.
    buffer: Vec<u8>,
    /// The number that the kernel gives to what it logs next.
    next: u32,
    lost: u64,
}

/// What a rule has logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Logged {
    /// Somebody was refused, or would have been.
    Denial(LoggedDenial),
    /// Somebody dials a port of names, and no endpoint (N8).
    Dial(Dial),
}

/// A denial that a rule has logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LoggedDenial {
    /// Refused, or in audit mode let through.
    pub denied: bool,
    /// Generation that decided.
    pub generation: u64,
    /// The target that refused.
    pub target: String,
    /// Transport.
    pub protocol: Protocol,
    /// Destination, after NAT.
    pub to: SocketAddr,
    /// Source.
    pub from: SocketAddr,
    /// The user who opened the socket; none for what is forwarded, and for the kernel's own sockets.
    pub user: Option<u32>,
}

struct Socket(mnl::Socket);

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Socket").field(&self.0.as_raw_fd()).finish()
    }
}

impl NflogListener {
    /// Listens to the first group that nobody else listens to; names make instances begin at different ones.
    pub(crate) fn bind(table: &str) -> io::Result<Self> {
        let sum = table
            .bytes()
            .fold(0_u16, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for offset in 0..GROUPS {
            let group = FIRST_GROUP + sum.wrapping_add(offset) % GROUPS;
            let socket = mnl::Socket::new(mnl::Bus::Netfilter)?;
            let commands = vec![
                ConfigCmd::Bind.into(),
                ConfigMode::PACKET_MAX.into(),
                ConfigFlags::SEQ.into(),
                Timeout::from(DELAY).into(),
            ];
            let message = config_request(NetfilterProtoFamily::Unspec, group, commands);
            let mut bytes = vec![0; message.buffer_len()];
            message.serialize(&mut bytes);
            socket.send(&bytes)?;
            match answer(&socket) {
                Ok(()) => {
                    return Ok(Self {
                        socket: Socket(socket),
                        group,
                        waiting: Vec::new(),
                        buffer: vec![0; LONGEST],
                        next: 0,
                        lost: 0,
                    });
                }
                Err(error) => last = error,
            }
            // A group of another socket's: `EBUSY`, and `EPERM` of another process's.
            if !matches!(last.raw_os_error(), Some(libc::EBUSY | libc::EPERM)) {
                break;
            }
        }
        Err(last)
    }

    /// The next of what was logged, if something is there.
    pub(crate) fn take(&mut self) -> Option<Logged> {
        while self.waiting.is_empty() {
            match recv(self.socket.0.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(read) => {
                    for message in messages(self.buffer.get(..read).unwrap_or_default()) {
                        let Some(parts) = packet(&message) else { continue };
                        let missing = missing_before(parts, &mut self.next);
                        self.lost += u64::from(missing);
                        self.waiting.extend(logged(parts));
                    }
                    self.waiting.reverse();
                }
                // The number of what comes next says how much it was.
                Err(nix::Error::ENOBUFS | nix::Error::EINTR) => {}
                Err(_) => return None,
            }
        }
        self.waiting.pop()
    }

    /// How many the kernel has logged and could not hand over, as they came faster than they were taken; counted once.
    pub(crate) fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }
}

impl AsRawFd for NflogListener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.0.as_raw_fd()
    }
}

fn answer(socket: &mnl::Socket) -> io::Result<()> {
    let mut buffer = vec![0; 8192];
    let read = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
    for message in messages(buffer.get(..read).unwrap_or_default()) {
        if let NetlinkPayload::Error(error) = message.payload
            && error.code.is_some()
        {
            return Err(error.to_io());
        }
    }
    Ok(())
}

fn messages(mut bytes: &[u8]) -> Vec<NetlinkMessage<NetfilterMessage>> {
    let mut found = Vec::new();
    while let Ok(message) = NetlinkMessage::deserialize(bytes) {
        let length = (message.header.length as usize + 3) & !3;
        found.push(message);
        match bytes.get(length..) {
            Some(rest) if length > 0 => bytes = rest,
            Some(_) | None => break,
        }
    }
    found
}

fn packet(message: &NetlinkMessage<NetfilterMessage>) -> Option<&[PacketNla]> {
    let NetlinkPayload::InnerMessage(message) = &message.payload else {
        return None;
    };
    let NetfilterMessageInner::ULog(ULogMessage::Packet(parts)) = &message.inner else {
        return None;
    };
    Some(parts)
}

/// How many the kernel has numbered between the one taken before and this one (`NFULA_SEQ`).
fn missing_before(parts: &[PacketNla], next: &mut u32) -> u32 {
    let number = parts.iter().find_map(|part| {
        if let PacketNla::Seq(number) = part {
            Some(*number)
        } else {
            None
        }
    });
    number.map_or(0, |number| {
        let missing = number.wrapping_sub(*next);
        *next = number.wrapping_add(1);
        missing
    })
}

fn logged(parts: &[PacketNla]) -> Option<Logged> {
    let (mut prefix, mut packet, mut user) = (None, None, None);
    for part in parts {
        if let PacketNla::Prefix(text) = part {
            prefix = text.to_str().ok();
        } else if let PacketNla::Payload(bytes) = part {
            packet = Some(bytes);
        } else if let PacketNla::Uid(uid) = part {
            user = Some(*uid);
        }
    }
    let text = prefix?.strip_prefix(LOG_PREFIX)?;
    let (protocol, from, to) = ends(packet?)?;
    if text == DIAL {
        return Some(Logged::Dial(Dial { to, user }));
    }
    let mut words = text.splitn(3, ' ');
    let (verdict, generation, target) = (words.next()?, words.next()?, words.next()?);
    Some(Logged::Denial(LoggedDenial {
        denied: verdict == "deny",
        generation: generation.parse().ok()?,
        target: target.to_owned(),
        protocol,
        to,
        from,
        user,
    }))
}

fn ends(packet: &[u8]) -> Option<(Protocol, SocketAddr, SocketAddr)> {
    let sliced = SlicedPacket::from_ip(packet).ok()?;
    let (from, to): (IpAddr, IpAddr) = match sliced.net? {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Arp(_) => return None,
    };
    let (protocol, source, destination) = match sliced.transport? {
        TransportSlice::Tcp(tcp) => (Protocol::Tcp, tcp.source_port(), tcp.destination_port()),
        TransportSlice::Udp(udp) => (Protocol::Udp, udp.source_port(), udp.destination_port()),
        TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_) | TransportSlice::Igmp(_) => return None,
    };
    Some((
        protocol,
        SocketAddr::new(from, source),
        SocketAddr::new(to, destination),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_tell_what_was_lost() {
        let mut next = 0;
        let mut missing = |number| missing_before(&[PacketNla::Uid(0), PacketNla::Seq(number)], &mut next);
        assert_eq!([0, 1, 2, 10, 11].map(&mut missing), [0, 0, 0, 7, 0]);
        assert_eq!(missing(u32::MAX), u32::MAX - 12);
        assert_eq!([0, 3].map(&mut missing), [0, 2]);
        assert_eq!(missing_before(&[PacketNla::Uid(0)], &mut 5), 0);
    }
}
