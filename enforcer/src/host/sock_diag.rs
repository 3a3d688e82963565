//! Connections as the kernel lists them, and their end: `NETLINK_SOCK_DIAG` (man 7 `sock_diag`), in this network
//! namespace only.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_sock_diag::{
    SockDiagDestroy, SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
};
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, TokioSocket, protocols::NETLINK_SOCK_DIAG};

use crate::{
    policy::{Protocol, Uid},
    wire::SocketState,
};

/// The kernel fills at most so much at once (`max_recvmsg_len` in `net/netlink/af_netlink.c`), some hundred sockets.
const CHUNK: usize = 32 << 10;

/// The socket's cgroup v2 id, 8 bytes; since Linux 5.9 (`include/uapi/linux/inet_diag.h`).
const INET_DIAG_CGROUP_ID: u16 = 21;

/// A socket with a remote end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Connection {
    pub protocol: Protocol,
    pub state: SocketState,
    /// Our end, as the kernel has it: IPv4-mapped for such sockets.
    pub local: SocketAddr,
    /// The other end, likewise.
    pub remote: SocketAddr,
    /// Index of the device that the socket is bound to, or 0.
    pub interface: u32,
    /// Owner of the socket; 0 may also be a socket of the kernel's, or before Linux 6.17 one that nobody holds.
    pub uid: Uid,
    /// Whether a file or the kernel holds it. Not held: closed with something left to do, or not yet accepted.
    pub held: bool,
    /// cgroup v2 id of where the socket was made; since Linux 5.9.
    pub cgroup: Option<u64>,
    /// Number of the socket, never given to another.
    pub cookie: [u8; 8],
}

/// A socket that waits for others: listening, or bound UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listener {
    pub protocol: Protocol,
    /// Its address, perhaps unspecified, and port.
    pub at: SocketAddr,
}

/// Hands every connected socket of a protocol and address family to `each`, some hundred between two turns of the loop.
pub(crate) async fn connections(protocol: Protocol, v6: bool, mut each: impl FnMut(Connection)) -> io::Result<()> {
    // TIME-WAIT belongs to nobody, LISTEN has no remote end, CLOSE is no connection.
    let states = match protocol {
        Protocol::Tcp => StateFlags::all() - StateFlags::TIME_WAIT - StateFlags::LISTEN - StateFlags::CLOSE,
        Protocol::Udp => StateFlags::ESTABLISHED,
    };
    let each = |response| {
        if let Some(connection) = connection(protocol, response) {
            each(connection);
        }
    };
    dump(protocol, v6, states, each).await
}

/// Hands every socket that waits for others to `each`: listening, for UDP bound and not connected.
pub(crate) async fn listeners(protocol: Protocol, v6: bool, mut each: impl FnMut(Listener)) -> io::Result<()> {
    let states = match protocol {
        Protocol::Tcp => StateFlags::LISTEN,
        Protocol::Udp => StateFlags::CLOSE,
    };
    let each = |response: InetResponse| {
        let id = &response.header.socket_id;
        each(Listener {
            protocol,
            at: SocketAddr::new(id.source_address, id.source_port),
        });
    };
    dump(protocol, v6, states, each).await
}

/// Destroys a connection; false if it had ended by itself. The cookie sees to it that it is this one.
pub(crate) async fn destroy(connection: &Connection) -> io::Result<bool> {
    let Connection {
        protocol,
        local,
        remote,
        ..
    } = *connection;
    let request = InetRequest {
        family: family(local.is_ipv6()),
        protocol: number(protocol),
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: SocketId {
            source_port: local.port(),
            destination_port: remote.port(),
            source_address: local.ip(),
            destination_address: remote.ip(),
            interface_id: connection.interface,
            cookie: connection.cookie,
        },
    };
    let destroy = SockDiagDestroy::new(SockDiagMessage::InetRequest(request));
    match ask(destroy, NLM_F_REQUEST | NLM_F_ACK, |_| {}).await {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the kernel destroys sockets. What is asked to be destroyed is none: nobody has its number.
pub(crate) async fn try_to_destroy() -> io::Result<()> {
    let nowhere = SocketAddr::from(([192, 0, 2, 1], 1));
    let none = Connection {
        protocol: Protocol::Tcp,
        state: SocketState::Established,
        local: nowhere,
        remote: nowhere,
        interface: 0,
        uid: Uid(0),
        held: true,
        cgroup: None,
        cookie: [0xee; 8],
    };
    destroy(&none).await.map(drop)
}

fn family(v6: bool) -> u8 {
    if v6 { AF_INET6 } else { AF_INET }
}

fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => IPPROTO_TCP,
        Protocol::Udp => IPPROTO_UDP,
    }
}

async fn dump(protocol: Protocol, v6: bool, states: StateFlags, each: impl FnMut(InetResponse)) -> io::Result<()> {
    let request = SockDiagMessage::InetRequest(InetRequest {
        family: family(v6),
        protocol: number(protocol),
        extensions: ExtensionFlags::empty(),
        states,
        socket_id: if v6 { SocketId::new_v6() } else { SocketId::new_v4() },
    });
    ask(request, NLM_F_REQUEST | NLM_F_DUMP, each).await
}

/// Sends a request over a socket of its own and reads the answer to its end, giving way to others after every chunk.
async fn ask<T>(message: T, flags: u16, mut each: impl FnMut(InetResponse)) -> io::Result<()>
where
    T: NetlinkSerializable + Into<NetlinkPayload<T>>,
{
    let mut socket = TokioSocket::new(NETLINK_SOCK_DIAG)?;
    socket.socket_mut().connect(&netlink_sys::SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut request = NetlinkMessage::new(header, message.into());
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes).await?;
    let mut chunk = Vec::with_capacity(CHUNK);
    loop {
        chunk.clear();
        socket.recv(&mut chunk).await?;
        if read(&chunk, &mut each)? {
            return Ok(());
        }
        tokio::task::yield_now().await;
    }
}

/// Reads a chunk; true if it ends the answer.
fn read(mut chunk: &[u8], each: &mut impl FnMut(InetResponse)) -> io::Result<bool> {
    /// Messages begin at multiples of so many bytes (man 3 netlink).
    const ALIGN: usize = 4;
    while !chunk.is_empty() {
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(chunk).map_err(io::Error::other)?;
        match message.payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => each(*response),
            NetlinkPayload::Error(error) => return error.code.map_or(Ok(true), |_| Err(error.to_io())),
            NetlinkPayload::Done(done) if done.code < 0 => return Err(io::Error::from_raw_os_error(-done.code)),
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::InnerMessage(_) | NetlinkPayload::Noop => {}
            // Sockets are missing from the list, or the protocol has grown.
            NetlinkPayload::Overrun(_) => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
            _ => return Err(io::Error::other("an answer of an unknown kind")),
        }
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
        chunk = chunk.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
    }
    Ok(false)
}

fn connection(protocol: Protocol, response: InetResponse) -> Option<Connection> {
    let InetResponse { header, nlas } = response;
    let id = header.socket_id;
    let place = |address: IpAddr, port| SocketAddr::new(address, port);
    let cgroup = nlas.iter().find_map(|nla| match nla {
        Nla::Other(other) => {
            use netlink_packet_core::Nla as _;
            let mut value = [0; 8];
            (other.kind() == INET_DIAG_CGROUP_ID && other.value_len() == value.len()).then(|| {
                other.emit_value(&mut value);
                u64::from_ne_bytes(value)
            })
        }
        Nla::LegacyMemInfo(_)
        | Nla::TcpInfo(_)
        | Nla::Congestion(_)
        | Nla::Tos(_)
        | Nla::Tc(_)
        | Nla::MemInfo(_)
        | Nla::Shutdown(_)
        | Nla::Protocol(_)
        | Nla::SkV6Only(_)
        | Nla::Mark(_)
        | Nla::ClassId(_) => None,
    });
    Some(Connection {
        protocol,
        state: read_state(header.state)?,
        local: place(id.source_address, id.source_port),
        remote: place(id.destination_address, id.destination_port),
        interface: id.interface_id,
        uid: Uid(header.uid),
        held: header.inode != 0,
        cgroup,
        cookie: id.cookie,
    })
}

/// How far a connection is (`include/net/tcp_states.h`); none for what is none.
fn read_state(number: u8) -> Option<SocketState> {
    Some(match number {
        1 => SocketState::Established,
        2 => SocketState::SynSent,
        3 => SocketState::SynReceived,
        4 => SocketState::FinWait1,
        5 => SocketState::FinWait2,
        8 => SocketState::CloseWait,
        9 => SocketState::LastAck,
        11 => SocketState::Closing,
        _ => return None,
    })
}
