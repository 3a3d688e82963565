//! Devices by which packets of containers and virtual machines leave this host past its IP hooks, where nftables has
//! its chains.
//!
//! A device that was moved to another network namespace is seen from there alone: the kernel takes the links between it
//! and the device below it out of this namespace's sysfs. So each namespace is entered, by a thread that ends, and
//! asked for its own devices.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    thread,
};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::sched::{CloneFlags, setns};

/// A device, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    index: u32,
    name: String,
    kind: Option<InfoKind>,
    /// Index of the bridge that it is a port of.
    bridge: Option<u32>,
    /// Whether the device below it is in another namespace.
    above_another: bool,
}

/// Devices of the namespace that we are in: what taps the device below for a virtual machine, and bridges that join two
/// ports or more, unless the kernel is told to show bridged packets to the IP hooks.
pub(super) fn here(bridges_are_shown: bool) -> io::Result<Vec<String>> {
    Ok(passing_here(&devices(None)?, bridges_are_shown))
}

/// Devices of another namespace, given by its file, that stand on one outside it.
pub(super) fn in_namespace(file: PathBuf) -> io::Result<Vec<String>> {
    Ok(passing_from_there(&devices(Some(file))?))
}

/// Whether bridged packets of both families come to the IP hooks (`br_netfilter`).
pub(super) fn bridges_are_shown() -> bool {
    ["iptables", "ip6tables"].into_iter().all(|family| {
        let setting = format!("/proc/sys/net/bridge/bridge-nf-call-{family}");
        std::fs::read_to_string(setting).is_ok_and(|value| value.trim() == "1")
    })
}

fn passing_here(devices: &[Device], bridges_are_shown: bool) -> Vec<String> {
    let joins = |bridge: &Device| devices.iter().filter(|port| port.bridge == Some(bridge.index)).count() >= 2;
    let passes = |device: &&Device| match &device.kind {
        Some(InfoKind::MacVtap | InfoKind::IpVtap) => true,
        Some(InfoKind::Bridge) => !bridges_are_shown && joins(device),
        Some(_) | None => false,
    };
    devices.iter().filter(passes).map(shown).collect()
}

fn passing_from_there(devices: &[Device]) -> Vec<String> {
    let passes = |device: &&Device| {
        let kinds = [InfoKind::MacVlan, InfoKind::MacVtap, InfoKind::IpVlan, InfoKind::IpVtap];
        device.above_another && device.kind.as_ref().is_some_and(|kind| kinds.contains(kind))
    };
    devices.iter().filter(passes).map(shown).collect()
}

fn shown(device: &Device) -> String {
    let kind = device.kind.as_ref().map_or_else(String::new, ToString::to_string);
    format!("{kind} {}", device.name)
}

/// All devices of a namespace, of our own by none.
fn devices(namespace: Option<PathBuf>) -> io::Result<Vec<Device>> {
    let Some(file) = namespace else { return dump() };
    let entered = move || {
        enter(&file)?;
        dump()
    };
    let done = thread::spawn(entered).join();
    done.map_err(|_| io::Error::other("the thread that looked panicked"))?
}

/// Changes the namespace of this thread alone.
fn enter(file: &Path) -> io::Result<()> {
    Ok(setns(File::open(file)?, CloneFlags::CLONE_NEWNET)?)
}

fn dump() -> io::Result<Vec<Device>> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut found = Vec::new();
    loop {
        let (chunk, _) = socket.recv_from_full()?;
        if read(&chunk, &mut found)? {
            return Ok(found);
        }
    }
}

/// Reads a chunk; true if it ends the answer.
fn read(mut chunk: &[u8], found: &mut Vec<Device>) -> io::Result<bool> {
    /// Messages begin at multiples of so many bytes (man 3 netlink).
    const ALIGN: usize = 4;
    while !chunk.is_empty() {
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(chunk).map_err(io::Error::other)?;
        match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => found.push(device(link)),
            NetlinkPayload::Error(error) => return error.code.map_or(Ok(true), |_| Err(error.to_io())),
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Overrun(_) => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
            NetlinkPayload::InnerMessage(_) | NetlinkPayload::Noop => {}
            _ => return Err(io::Error::other("an answer of an unknown kind")),
        }
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
        chunk = chunk.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
    }
    Ok(false)
}

#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "a link has some sixty attributes, and the kernel makes more"
)]
fn device(link: LinkMessage) -> Device {
    let mut device = Device {
        index: link.header.index,
        name: String::new(),
        kind: None,
        bridge: None,
        above_another: false,
    };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name,
            LinkAttribute::Controller(bridge) => device.bridge = Some(bridge),
            LinkAttribute::LinkNetNsId(_) => device.above_another = true,
            LinkAttribute::LinkInfo(infos) => {
                device.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    device
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(index: u32, kind: Option<InfoKind>, bridge: Option<u32>, above_another: bool) -> Device {
        Device {
            index,
            name: format!("dev{index}"),
            kind,
            bridge,
            above_another,
        }
    }

    #[test]
    fn a_bridge_joins_two_ports_unless_it_is_shown() {
        let mut devices = vec![
            device(1, None, None, false),
            device(2, Some(InfoKind::Bridge), None, false),
            device(3, Some(InfoKind::Veth), Some(2), true),
        ];
        assert_eq!(passing_here(&devices, false), [""; 0]);
        devices.push(device(4, None, Some(2), false));
        assert_eq!(passing_here(&devices, false), ["bridge dev2"]);
        assert_eq!(passing_here(&devices, true), [""; 0]);
    }

    #[test]
    fn what_stands_on_a_device_outside_passes() {
        let devices = [
            device(1, Some(InfoKind::MacVlan), None, true),
            device(2, Some(InfoKind::MacVlan), None, false),
            device(3, Some(InfoKind::Veth), None, true),
            device(4, Some(InfoKind::IpVlan), None, true),
            device(5, Some(InfoKind::MacVtap), None, false),
        ];
        assert_eq!(passing_from_there(&devices), ["macvlan dev1", "ipvlan dev4"]);
        assert_eq!(passing_here(&devices, false), ["macvtap dev5"]);
    }
}
