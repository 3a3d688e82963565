//! A connection that no `connect` opens: a SYN made by hand, whole or in pieces, as `CAP_NET_RAW` in a container's
//! network namespace allows.

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use clap::ValueEnum;
use etherparse::{IpFragOffset, IpNumber, Ipv4Header, Ipv6Header, TcpHeader, TcpHeaderSlice};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// How a SYN is cut, and what stands before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cut {
    /// One packet.
    Whole,
    /// Fragments of 8 bytes: the ports are in the first, the flags in the second.
    Eights,
    /// Fragments of 16 bytes: ports and flags are in the first.
    Sixteens,
    /// A first fragment that opens nothing, and one that begins at byte 8 and lays flags over its own (RFC 3128): what
    /// it has where flags would be, were it a first one, opens nothing either. IPv4.
    Overlap,
    /// Hop-by-hop and destination options before the segment, all in one packet. IPv6.
    Options,
    /// The first fragment ends between two headers of options. IPv6.
    BetweenOptions,
    /// The same, behind hop-by-hop options. IPv6.
    BehindHopByHop,
    /// The first fragment ends behind the options, where the segment begins. IPv6.
    BeforeSegment,
}

/// Sends it and waits for what comes back: a SYN-ACK is success, a reset `ECONNREFUSED`, silence `ETIMEDOUT`.
pub(super) fn syn(to: SocketAddr, cut: Cut) -> io::Result<()> {
    const PATIENCE: Duration = Duration::from_millis(700);
    let any: IpAddr = if to.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let probe = UdpSocket::bind((any, 0))?;
    probe.connect(to)?;
    let from = probe.local_addr()?;
    let packets = packets(from, to, cut)?;
    let domain = Domain::for_address(to);
    let mut answers = Socket::new(domain, Type::RAW, Some(Protocol::TCP))?;
    answers.set_read_timeout(Some(PATIENCE))?;
    // The packet's header is ours to write (man 7 raw, ipv6).
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    for packet in packets {
        socket.send_to(&packet, &SockAddr::from(SocketAddr::new(to.ip(), 0)))?;
    }
    let until = Instant::now() + PATIENCE;
    let mut packet = [0; 256];
    while Instant::now() < until {
        let Ok(read) = answers.read(&mut packet) else { break };
        // A raw socket hands over the header of IPv4, and not that of IPv6.
        let header = if to.is_ipv4() {
            packet.first().map_or(0, |first| usize::from(first & 15) * 4)
        } else {
            0
        };
        let Some(Ok(tcp)) = packet.get(header..read).map(TcpHeaderSlice::from_slice) else {
            continue;
        };
        if tcp.source_port() == to.port() && tcp.destination_port() == from.port() {
            if tcp.rst() {
                return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED));
            }
            if tcp.syn() && tcp.ack() {
                return Ok(());
            }
        }
    }
    Err(io::Error::from_raw_os_error(libc::ETIMEDOUT))
}

fn packets(from: SocketAddr, to: SocketAddr, cut: Cut) -> io::Result<Vec<Vec<u8>>> {
    let mut header = TcpHeader::new(from.port(), to.port(), 1, 64_240);
    header.syn = true;
    let mut other = header.clone();
    (other.syn, other.ack) = (false, true);
    // The flag of an acknowledgement, all over.
    let data = [0x10; 20];
    let data = if cut == Cut::Overlap { &data[..] } else { &[] };
    match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let (source, destination) = (source.octets(), destination.octets());
            for header in [&mut header, &mut other] {
                let sum = header.calc_checksum_ipv4_raw(source, destination, data);
                header.checksum = sum.map_err(io::Error::other)?;
            }
            let (segment, other) = ([&header.to_bytes()[..], data].concat(), other.to_bytes());
            let pieces = match cut {
                Cut::Whole => vec![(0, &segment[..])],
                Cut::Eights => pieces(&segment, 8),
                Cut::Sixteens => pieces(&segment, 16),
                Cut::Overlap => {
                    let (first, over) = (other.get(..16), segment.get(8..));
                    vec![(0, first.unwrap_or_default()), (8, over.unwrap_or_default())]
                }
                Cut::Options | Cut::BetweenOptions | Cut::BehindHopByHop | Cut::BeforeSegment => {
                    return Err(io::ErrorKind::Unsupported.into());
                }
            };
            pieces
                .iter()
                .map(|piece| packet4(source, destination, *piece, segment.len()))
                .collect()
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let (source, destination) = (source.octets(), destination.octets());
            let sum = header.calc_checksum_ipv6_raw(source, destination, &[]);
            header.checksum = sum.map_err(io::Error::other)?;
            packets6(source, destination, &header.to_bytes(), cut)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn pieces(bytes: &[u8], length: usize) -> Vec<(usize, &[u8])> {
    (0..).step_by(length).zip(bytes.chunks(length)).collect()
}

/// One that reaches to the `end` is the last.
fn packet4(source: [u8; 4], destination: [u8; 4], (at, bytes): (usize, &[u8]), end: usize) -> io::Result<Vec<u8>> {
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut header = Ipv4Header::new(length, 64, IpNumber::TCP, source, destination).map_err(io::Error::other)?;
    header.dont_fragment = false;
    header.identification = identification();
    header.more_fragments = at + bytes.len() < end;
    let offset = u16::try_from(at / 8).map_err(io::Error::other)?;
    header.fragment_offset = IpFragOffset::try_new(offset).map_err(io::Error::other)?;
    header.header_checksum = header.calc_header_checksum();
    Ok([&header.to_bytes()[..], bytes].concat())
}

/// The same in all pieces of one packet: each process sends one.
fn identification() -> u16 {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    u16::from_be_bytes([high, low]).max(1)
}

/// Next headers.
const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
const FRAGMENT: u8 = 44;
const OPTIONS: u8 = 60;

/// Options that say nothing, and what comes next.
fn options(next: u8) -> [u8; 8] {
    const PAD: u8 = 1;
    [next, 0, PAD, 4, 0, 0, 0, 0]
}

fn packets6(source: [u8; 16], destination: [u8; 16], segment: &[u8], cut: Cut) -> io::Result<Vec<Vec<u8>>> {
    let packet = |first: u8, payload: &[u8]| -> io::Result<Vec<u8>> {
        let header = Ipv6Header {
            payload_length: u16::try_from(payload.len()).map_err(io::Error::other)?,
            next_header: IpNumber(first),
            hop_limit: 64,
            source,
            destination,
            ..Ipv6Header::default()
        };
        Ok([&header.to_bytes()[..], payload].concat())
    };
    let two_options = [&options(OPTIONS)[..], &options(TCP), segment].concat();
    let one_options = [&options(TCP)[..], segment].concat();
    // What stands before the fragment header, what is cut, its first header, and how long pieces are.
    let (before, whole, next, length) = match cut {
        Cut::Whole => return Ok(vec![packet(TCP, segment)?]),
        Cut::Options => {
            let payload = [&options(OPTIONS)[..], &two_options].concat();
            return Ok(vec![packet(HOP_BY_HOP, &payload)?]);
        }
        Cut::Eights => (None, segment, TCP, 8),
        Cut::Sixteens => (None, segment, TCP, 16),
        Cut::BetweenOptions => (None, &two_options[..], OPTIONS, 8),
        Cut::BehindHopByHop => (Some(options(FRAGMENT)), &two_options[..], OPTIONS, 8),
        Cut::BeforeSegment => (None, &one_options[..], OPTIONS, 8),
        Cut::Overlap => return Err(io::ErrorKind::Unsupported.into()),
    };
    let (first, rest) = whole.split_at(length.min(whole.len()));
    // All that follows the first is one.
    let all = [(0, first), (length, rest)].into_iter().map(|(at, bytes)| {
        let more = u16::from(at == 0);
        let [high, low] = (u16::try_from(at).map_err(io::Error::other)? | more).to_be_bytes();
        let [upper, lower] = identification().to_be_bytes();
        let fragment = [next, 0, high, low, 0, 0, upper, lower];
        match &before {
            Some(before) => packet(HOP_BY_HOP, &[&before[..], &fragment, bytes].concat()),
            None => packet(FRAGMENT, &[&fragment[..], bytes].concat()),
        }
    });
    all.collect()
}
