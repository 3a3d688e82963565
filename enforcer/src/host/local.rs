//! What the kernel delivers on this host: its routes of type local and anycast, in this network namespace (D7), and
//! word of their changes. Not the list of interface addresses: a prefix on `lo`, or `ip route add local`, makes more
//! local than that.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::sys::socket::{
    AddressFamily as Family, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use socket2::{SockFilter, SockRef};

/// Most local prefixes of a host (F7): as many as half of all endpoints.
pub const MAX_LOCAL: usize = 65_536;
/// The kernel fills at most so much at once (`max_recvmsg_len` in `net/netlink/af_netlink.c`).
const CHUNK: usize = 32 << 10;
/// Messages begin at multiples of so many bytes (man 3 netlink).
const ALIGN: usize = 4;
/// How often a list is read again during which routes changed.
const TRIES: usize = 3;
/// Tables that every packet without a mark is looked up in (ip-rule(8)): local, main, default.
const USUAL_TABLES: [u32; 3] = [255, 254, 253];

/// Every prefix that is delivered here, canonical; an error names the limit.
pub fn local() -> io::Result<BTreeSet<IpNet>> {
    let mut all = BTreeSet::new();
    // IPv4 delivers nothing for being anycast (`ip_route_output_key_hash_rcu`: RTN_LOCAL alone).
    for (family, kind) in [
        (AddressFamily::Inet, RouteType::Local),
        (AddressFamily::Inet6, RouteType::Local),
        (AddressFamily::Inet6, RouteType::Anycast),
    ] {
        for _ in 0..TRIES {
            if list(family, kind, &mut all)? {
                break;
            }
        }
    }
    Ok(all)
}

/// Adds the routes of a type; false if some changed meanwhile, so that one may be missing.
fn list(family: AddressFamily, kind: RouteType, all: &mut BTreeSet<IpNet>) -> io::Result<bool> {
    let socket = ask(family, kind)?;
    let mut consistent = true;
    let mut chunk = Vec::with_capacity(CHUNK);
    loop {
        chunk.clear();
        socket.recv(&mut chunk, 0)?;
        let mut rest = chunk.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
            consistent &= message.header.flags & NLM_F_DUMP_INTR == 0;
            let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
            rest = rest.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => {
                    if (route.header.address_family, route.header.kind) == (family, kind) {
                        all.extend(prefix(&route));
                    }
                    if all.len() > MAX_LOCAL {
                        return Err(too_many());
                    }
                }
                NetlinkPayload::Error(error) => {
                    let error = error.to_io();
                    // A host without IPv6 has none of its routes.
                    let without = [libc::EOPNOTSUPP, libc::EAFNOSUPPORT]
                        .map(Some)
                        .contains(&error.raw_os_error());
                    return if without && family == AddressFamily::Inet6 {
                        Ok(true)
                    } else {
                        Err(error)
                    };
                }
                NetlinkPayload::Done(done) if done.code < 0 => return Err(io::Error::from_raw_os_error(-done.code)),
                NetlinkPayload::Done(_) => return Ok(consistent),
                NetlinkPayload::InnerMessage(_) | NetlinkPayload::Noop => {}
                // Routes are missing from the list, or the protocol has grown.
                NetlinkPayload::Overrun(_) => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
                _ => return Err(io::Error::other("an answer of an unknown kind")),
            }
        }
    }
}

/// A socket to which the kernel lists routes of a type.
fn ask(family: AddressFamily, kind: RouteType) -> io::Result<Socket> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    // Since Linux 4.20 the kernel then leaves out other types itself: a full table of another routing table is not
    // sent.
    let _ = socket.set_netlink_get_strict_chk(true);
    let mut route = RouteMessage::default();
    route.header.address_family = family;
    route.header.kind = kind;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut request = NetlinkMessage::new(header, RouteNetlinkMessage::GetRoute(route).into());
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    Ok(socket)
}

fn too_many() -> io::Error {
    io::Error::other(format!(
        "this host has more than {MAX_LOCAL} local routes, the maximum; name prefixes as endpoints instead of local"
    ))
}

/// What a route delivers here. None of the whole address space in a table that only rules lead to: that is how a
/// transparent proxy takes the packets it has marked, and all others go where they are addressed.
fn prefix(route: &RouteMessage) -> Option<IpNet> {
    let mut table = u32::from(route.header.table);
    let mut address = if route.header.address_family == AddressFamily::Inet {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    };
    for attribute in &route.attributes {
        if let RouteAttribute::Destination(RouteAddress::Inet(v4)) = attribute {
            address = IpAddr::V4(*v4);
        } else if let RouteAttribute::Destination(RouteAddress::Inet6(v6)) = attribute {
            address = IpAddr::V6(*v6);
        } else if let RouteAttribute::Table(number) = attribute {
            table = *number;
        }
    }
    let length = route.header.destination_prefix_length;
    if length == 0 && !USUAL_TABLES.contains(&table) {
        return None;
    }
    let net = IpNet::new(address, length).ok()?.trunc();
    let canonical = crate::policy::canonical(address);
    let single = length == net.max_prefix_len();
    Some(if single { canonical.into() } else { net }) // D4
}

/// Becomes readable when what is local may have changed (man 7 rtnetlink).
#[derive(Debug)]
pub struct LocalChanges(OwnedFd);

impl LocalChanges {
    /// Subscribes to changes of local routes, and of addresses and links: with a link go routes of which nothing is
    /// said.
    pub fn subscribe() -> io::Result<Self> {
        const GROUPS: i32 = libc::RTMGRP_LINK
            | libc::RTMGRP_IPV4_IFADDR
            | libc::RTMGRP_IPV4_ROUTE
            | libc::RTMGRP_IPV6_IFADDR
            | libc::RTMGRP_IPV6_ROUTE;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(Family::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        SockRef::from(&fd).attach_filter(&only_local())?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS.cast_unsigned()))?;
        Ok(Self(fd))
    }

    /// Takes all that has come. An overflow is a change too: what matters is to look again.
    pub fn drain(&self) {
        let mut buffer = [0; 8192];
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(1..) | Err(nix::Error::ENOBUFS | nix::Error::EINTR) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }
}

impl AsRawFd for LocalChanges {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Drops word of routes of other types, in the kernel: a routing daemon's full table changes many times a second.
fn only_local() -> [SockFilter; 8] {
    /// `nlmsg_type` in `struct nlmsghdr`, in this machine's byte order; the load is in the network's.
    const KIND: u32 = 4;
    /// `rtm_type` in `struct rtmsg`, behind that header.
    const TYPE: u32 = 16 + 7;
    // Of `linux/bpf_common.h`: BPF_LD | BPF_H | BPF_ABS, BPF_LD | BPF_B | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET |
    // BPF_K.
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let kind = |kind: u16| u32::from(kind.to_be());
    [
        SockFilter::new(LOAD_HALF, 0, 0, KIND),
        SockFilter::new(EQUAL, 1, 0, kind(libc::RTM_NEWROUTE)),
        SockFilter::new(EQUAL, 0, 3, kind(libc::RTM_DELROUTE)),
        SockFilter::new(LOAD_BYTE, 0, 0, TYPE),
        SockFilter::new(EQUAL, 1, 0, libc::RTN_LOCAL.into()),
        SockFilter::new(EQUAL, 0, 1, libc::RTN_ANYCAST.into()),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use netlink_packet_route::route::RouteHeader;

    use super::*;

    fn route(text: &str, table: u32) -> Option<String> {
        let net: IpNet = text.parse().expect("a prefix");
        let mut route = RouteMessage::default();
        let (family, address) = match net.addr() {
            IpAddr::V4(v4) => (AddressFamily::Inet, RouteAddress::Inet(v4)),
            IpAddr::V6(v6) => (AddressFamily::Inet6, RouteAddress::Inet6(v6)),
        };
        route.header = RouteHeader {
            address_family: family,
            destination_prefix_length: net.prefix_len(),
            ..RouteHeader::default()
        };
        route.attributes.push(RouteAttribute::Table(table));
        if net.prefix_len() > 0 {
            route.attributes.push(RouteAttribute::Destination(address));
        }
        prefix(&route).map(|net| net.to_string())
    }

    #[test]
    fn d7_what_a_route_makes_local() {
        for (text, table, expected) in [
            ("10.0.0.1/32", 255, Some("10.0.0.1/32")),
            ("10.201.1.0/24", 255, Some("10.201.1.0/24")),
            ("10.9.0.0/16", 100, Some("10.9.0.0/16")),
            ("fd78::/64", 254, Some("fd78::/64")),
            ("::ffff:10.0.0.1/128", 255, Some("10.0.0.1/32")),
            ("0.0.0.0/0", 255, Some("0.0.0.0/0")),
            ("::/0", 254, Some("::/0")),
            // A transparent proxy's.
            ("0.0.0.0/0", 100, None),
            ("::/0", 100, None),
        ] {
            assert_eq!(route(text, table).as_deref(), expected, "{text} in table {table}");
        }
    }

    #[test]
    fn d7_loopback_is_local_here() {
        let local = local().expect("routes");
        // Where lo is up, which is not so in every sandbox.
        let up = nix::ifaddrs::getifaddrs().expect("interfaces").any(|interface| {
            interface.interface_name == "lo" && interface.flags.contains(nix::net::if_::InterfaceFlags::IFF_RUNNING)
        });
        let loopback: IpNet = "127.0.0.0/8".parse().expect("a prefix");
        assert_eq!(local.contains(&loopback), up, "{local:?}");
    }
}
