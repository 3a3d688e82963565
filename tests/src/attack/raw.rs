//! A connection that no `connect` opens: a SYN made by hand, as `CAP_NET_RAW` in a container's network namespace allows.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use etherparse::{SlicedPacket, TcpHeader, TransportSlice};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Sends it and waits for what comes back: a SYN-ACK is success, a reset `ECONNREFUSED`, silence `ETIMEDOUT`.
pub(super) fn syn(to: SocketAddr) -> io::Result<()> {
    const PATIENCE: Duration = Duration::from_millis(700);
    let probe = UdpSocket::bind("0.0.0.0:0")?;
    probe.connect(to)?;
    let from = probe.local_addr()?;
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (from.ip(), to.ip()) else {
        return Err(io::ErrorKind::Unsupported.into());
    };
    let mut header = TcpHeader::new(from.port(), to.port(), 1, 64_240);
    header.syn = true;
    header.checksum = header
        .calc_checksum_ipv4_raw(source.octets(), destination.octets(), &[])
        .map_err(io::Error::other)?;
    let mut socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(&header.to_bytes(), &SockAddr::from(SocketAddr::new(to.ip(), 0)))?;
    let until = Instant::now() + PATIENCE;
    let mut packet = [0; 256];
    while Instant::now() < until {
        let Ok(read) = io::Read::read(&mut socket, &mut packet) else {
            break;
        };
        let packet = packet.get(..read).unwrap_or_default();
        let Ok(Some(TransportSlice::Tcp(tcp))) = SlicedPacket::from_ip(packet).map(|packet| packet.transport) else {
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
