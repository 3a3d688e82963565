//! Denials of the table's rules, as the kernel sends them to a netlink group (nflog): the packet and its socket's user.

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
    nflog::{ConfigCmd, ConfigMode, PacketNla, Timeout, ULogMessage, config_request},
};
use nix::sys::socket::{MsgFlags, recv};

use super::image::LOG_PREFIX;
use crate::policy::Protocol;

/// First of the groups that are tried; administrators count theirs from 0.
const FIRST_GROUP: u16 = 40_000;
/// How many: each instance on a host needs one.
const GROUPS: u16 = 64;
/// Most time that the kernel keeps a denial to send it with others.
const DELAY: Duration = Duration::from_millis(20);

/// The listener to one group.
#[derive(Debug)]
pub struct Denials {
    socket: Socket,
    /// The group.
    pub group: u16,
    waiting: Vec<Denial>,
}

/// A denial that a rule has logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
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

impl Denials {
    /// Listens to the first group that nobody else listens to; names make instances begin at different ones.
    pub fn bind(table: &str) -> io::Result<Self> {
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
                    });
                }
                Err(error) => last = error,
            }
            if last.raw_os_error() != Some(libc::EBUSY) {
                break;
            }
        }
        Err(last)
    }

    /// The next denial, if one is there.
    pub fn take(&mut self) -> Option<Denial> {
        let mut buffer = vec![0; 128 << 10];
        while self.waiting.is_empty() {
            match recv(self.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(read) => {
                    self.waiting = messages(buffer.get(..read).unwrap_or_default())
                        .iter()
                        .filter_map(denial)
                        .collect();
                    self.waiting.reverse();
                }
                // What came faster than it was read is in the counters.
                Err(nix::Error::ENOBUFS | nix::Error::EINTR) => {}
                Err(_) => return None,
            }
        }
        self.waiting.pop()
    }
}

impl AsRawFd for Denials {
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

fn denial(message: &NetlinkMessage<NetfilterMessage>) -> Option<Denial> {
    let NetlinkPayload::InnerMessage(message) = &message.payload else {
        return None;
    };
    let NetfilterMessageInner::ULog(ULogMessage::Packet(parts)) = &message.inner else {
        return None;
    };
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
    let mut words = prefix?.strip_prefix(LOG_PREFIX)?.splitn(3, ' ');
    let (verdict, generation, target) = (words.next()?, words.next()?, words.next()?);
    let (protocol, from, to) = ends(packet?)?;
    Some(Denial {
        denied: verdict == "deny",
        generation: generation.parse().ok()?,
        target: target.to_owned(),
        protocol,
        to,
        from,
        user,
    })
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
