//! Text → `Endpoint`, `Name`, `CgroupPath`. Pure.
//!
//! Endpoints are not parsed by the `url` crate: it has no prefixes, reads `127.1` and `0x7f.1` as addresses,
//! and cuts a password at its first `/`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU16,
};

use ipnet::IpNet;

use self::fault::{MAX_PORTS, PORT};
use super::{CgroupPath, Destination, Endpoint, Name, Protocol};

mod fault;
mod servers;
mod shown;
#[cfg(test)]
mod tests;

pub use fault::{CgroupPathError, EndpointError, EndpointFault, NameError};
pub(crate) use servers::{Server, servers};
pub use shown::shown;

/// The longest cgroup path, in bytes: what `PATH_MAX` leaves of 4096 for the terminating zero.
pub const MAX_CGROUP_PATH: usize = 4095;

impl Endpoint {
    /// Reads `[SCHEME://]ADDR:PORT`, SCHEME one of `tcp` (the default), `udp`, `nats` and `tls` (both TCP, credentials
    /// permitted and ignored), ADDR an IPv4 address, `[IPv6]`, a prefix of either, `local` or a DNS name.
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        endpoint(text).map_err(|fault| EndpointError {
            shown: shown(text),
            fault,
        })
    }

    /// As [`Endpoint::parse`], of each port where PORT is a range or a list of ports and ranges, such as
    /// `2379-2380,2382`, and of each server where a message-bus URL has several, with commas between them (B2).
    pub fn parse_all(text: &str) -> Result<Vec<Self>, EndpointError> {
        if text.contains(',') && is_bus_url(text) {
            return servers(text).map(|server| server?.configured()).collect();
        }
        endpoints(text).map_err(|fault| EndpointError {
            shown: shown(text),
            fault,
        })
    }
}

impl Name {
    /// Reads a DNS name; letters become lower case, a trailing dot goes.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let name = text.strip_suffix('.').unwrap_or(text);
        if name.len() > 253 {
            return Err(NameError::Length);
        }
        for label in name.split('.') {
            if !(1..=63).contains(&label.len()) {
                return Err(NameError::Label);
            }
            let plain = label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
            if !plain || label.starts_with('-') || label.ends_with('-') {
                return Err(NameError::Character);
            }
        }
        let name = name.to_ascii_lowercase();
        // The WHATWG URL standard's test for what some resolver will take for an IPv4 address.
        let last = name.rsplit('.').next().unwrap_or_default();
        let hexadecimal = last
            .strip_prefix("0x")
            .is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if hexadecimal || last.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(NameError::Numeric);
        }
        if name == "local" {
            return Err(NameError::Local);
        }
        Ok(Self(name))
    }
}

impl CgroupPath {
    /// Reads an absolute path; a trailing slash goes.
    pub fn parse(text: &str) -> Result<Self, CgroupPathError> {
        let Some(parts) = text.strip_prefix('/') else {
            return Err(CgroupPathError::Relative);
        };
        let parts = parts.strip_suffix('/').unwrap_or(parts);
        if text.len() > MAX_CGROUP_PATH {
            return Err(CgroupPathError::Length);
        }
        if text.chars().any(char::is_control) {
            return Err(CgroupPathError::Control);
        }
        if !parts.is_empty() && parts.split('/').any(|part| matches!(part, "" | "." | "..")) || text == "//" {
            return Err(CgroupPathError::Part);
        }
        Ok(Self(format!("/{parts}")))
    }
}

/// Whether a text is a URL of a message bus.
pub(crate) fn is_bus_url(text: &str) -> bool {
    text.split_once("://")
        .is_some_and(|(scheme, _)| servers::is_bus(scheme))
}

fn endpoint(text: &str) -> Result<Endpoint, EndpointFault> {
    let (protocol, destination, port) = parts(text)?;
    if port.contains(',') {
        return Err(EndpointFault::Several);
    }
    Ok(Endpoint {
        protocol,
        destination,
        port: number(port).ok_or(EndpointFault::Port)?,
    })
}

/// One endpoint for each port.
fn endpoints(text: &str) -> Result<Vec<Endpoint>, EndpointFault> {
    if is_bus_url(text) {
        return Ok(vec![endpoint(text)?]);
    }
    let (protocol, destination, ports) = parts(text)?;
    let mut all = Vec::new();
    for range in ports.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = number(first).zip(number(last)).ok_or(EndpointFault::Ports)?;
        let ports = first.get()..=last.get();
        if ports.is_empty() {
            return Err(EndpointFault::Ports);
        }
        if all.len() + ports.len() > MAX_PORTS {
            return Err(EndpointFault::TooManyPorts);
        }
        all.extend(ports.filter_map(NonZeroU16::new).map(|port| Endpoint {
            protocol,
            destination: destination.clone(),
            port,
        }));
    }
    Ok(all)
}

/// Protocol, destination, and what follows the colon.
fn parts(text: &str) -> Result<(Protocol, Destination, &str), EndpointFault> {
    if text.trim() != text {
        return Err(EndpointFault::Blank);
    }
    let (protocol, bus, rest) = match text.split_once("://") {
        None => match without_slashes(text) {
            Some(scheme) => return Err(EndpointFault::NoSlashes(scheme)),
            None => (Protocol::Tcp, false, text),
        },
        Some((scheme, rest)) => match scheme.to_ascii_lowercase().as_str() {
            "tcp" => (Protocol::Tcp, false, rest),
            "udp" => (Protocol::Udp, false, rest),
            "nats" | "tls" => (Protocol::Tcp, true, rest),
            _ => return Err(EndpointFault::Scheme),
        },
    };
    // Of a bus no part but credentials could hold one, and those of a first server would hide it.
    if bus && text.contains(',') {
        return Err(EndpointFault::Several);
    }
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let authority = authority(rest, bus)?;
    if authority.contains(char::is_whitespace) {
        return Err(EndpointFault::Blank);
    }
    let (host, port) = split(authority)?;
    if matches!(host, Host::Plain(host) if host.contains(',')) {
        return Err(EndpointFault::Several);
    }
    let destination = destination(host, protocol).map_err(|fault| fault.with_port(port))?;
    match port.find(['/', '?', '#']) {
        Some(end) if number(port.get(..end).unwrap_or_default()).is_some() => Err(EndpointFault::Path),
        Some(_) | None => Ok((protocol, destination, port)),
    }
}

/// The scheme that a text begins with, if more follows than the port of a host of that name.
fn without_slashes(text: &str) -> Option<&'static str> {
    let (scheme, rest) = text.split_once(':')?;
    let known = ["tcp", "udp", "nats", "tls"];
    let scheme = known.into_iter().find(|known| scheme.eq_ignore_ascii_case(known))?;
    (rest.starts_with('/') || rest.contains(':')).then_some(scheme)
}

/// A prefix as endpoints have it.
fn written(net: IpNet) -> String {
    match net {
        IpNet::V4(net) => net.to_string(),
        IpNet::V6(net) => format!("[{net}]"),
    }
}

/// An IPv6 prefix as it is to be written, from one without brackets.
fn bracketed(address: Ipv6Addr, length: &str) -> Result<String, EndpointFault> {
    let digits = length.bytes().all(|byte| byte.is_ascii_digit());
    let length = length.parse().ok().filter(|_| digits);
    let net = length.and_then(|length| IpNet::new(address.into(), length).ok());
    net.map(|net| written(net.trunc()))
        .ok_or(EndpointFault::PrefixLength { max: 128 })
}

/// What follows the credentials.
fn authority(rest: &str, bus: bool) -> Result<&str, EndpointFault> {
    match rest.rsplit_once('@') {
        // An encoded one: what stands before it may be credentials.
        _ if rest
            .rsplit('@')
            .next()
            .is_some_and(|authority| authority.contains("%40")) =>
        {
            Err(EndpointFault::EncodedAt)
        }
        None => Ok(rest),
        Some(_) if !bus => Err(EndpointFault::Credentials),
        Some((credentials, _)) if credentials.contains(['/', '?', '#']) => Err(EndpointFault::AmbiguousCredentials),
        Some((_, authority)) => Ok(authority),
    }
}

/// A host as written.
#[derive(Clone, Copy)]
enum Host<'a> {
    /// `[ADDRESS]`, `[ADDRESS/LENGTH]` or `[ADDRESS]/LENGTH`.
    Bracketed(&'a str, Option<&'a str>),
    /// Anything else.
    Plain(&'a str),
}

/// Host and port, the port not empty.
fn split(authority: &str) -> Result<(Host<'_>, &str), EndpointFault> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (inner, after) = rest.split_once(']').ok_or(EndpointFault::Brackets)?;
        let (before, port) = match after.split_once(':') {
            Some((before, port)) => (before, port),
            None => (after, ""),
        };
        let outer = match before {
            "" => None,
            before => Some(before.strip_prefix('/').ok_or(EndpointFault::Brackets)?),
        };
        let host = match (inner.split_once('/'), outer) {
            (None, length) => Host::Bracketed(inner, length),
            (Some((address, length)), None) => Host::Bracketed(address, Some(length)),
            (Some(_), Some(_)) => return Err(EndpointFault::Brackets),
        };
        (host, port)
    } else {
        if let Ok(whole) = authority.parse::<Ipv6Addr>() {
            // `::1:80` is an address, and so is `::1`.
            let last = authority.rsplit_once(':');
            let last = last.and_then(|(host, port)| host.parse().ok().zip(number(port)));
            return Err(match last {
                Some((host, port)) => EndpointFault::PortOrPart {
                    host,
                    port: port.get(),
                    whole,
                },
                None => EndpointFault::Unbracketed(format!("[{whole}]:{PORT}")),
            });
        }
        if let Some((address, length)) = authority.split_once('/')
            && let Ok(address) = address.parse()
            && !length.contains(':')
        {
            return Err(EndpointFault::Unbracketed(bracketed(address, length)? + ":" + PORT));
        }
        match authority.rsplit_once(':') {
            None => (Host::Plain(authority), ""),
            Some((host, port)) => (Host::Plain(host), port),
        }
    };
    match (host, port) {
        (Host::Plain(""), _) => Err(EndpointFault::NoHost),
        (_, "") => Err(EndpointFault::NoPort),
        (host, port) => Ok((host, port)),
    }
}

fn number(port: &str) -> Option<NonZeroU16> {
    // `parse` would take `+80`.
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    port.parse().ok().filter(|_| digits)
}

fn destination(host: Host<'_>, protocol: Protocol) -> Result<Destination, EndpointFault> {
    match host {
        Host::Bracketed(inner, _) if inner.contains('%') => Err(EndpointFault::Zone),
        Host::Bracketed(inner, length) => {
            let address = IpAddr::V6(inner.parse().map_err(|_| EndpointFault::Brackets)?);
            match length {
                None => single(address, protocol),
                Some(length) => prefix(address, length, protocol),
            }
        }
        Host::Plain(host) => plain(host, protocol),
    }
}

fn plain(host: &str, protocol: Protocol) -> Result<Destination, EndpointFault> {
    if host.eq_ignore_ascii_case("local") {
        return Ok(Destination::Local); // D7
    }
    if let Some((address, length)) = host.split_once('/') {
        return match address.parse() {
            Ok(IpAddr::V4(address)) => prefix(address.into(), length, protocol),
            Ok(IpAddr::V6(address)) => Err(EndpointFault::Unbracketed(bracketed(address, length)?)),
            Err(_) => Err(EndpointFault::Prefix),
        };
    }
    if host == "*" {
        return Err(EndpointFault::Unspecified);
    }
    let is_v4 = |text: &str| text.parse::<Ipv4Addr>().is_ok();
    if host
        .split_once('-')
        .is_some_and(|(first, last)| is_v4(first) && is_v4(last))
    {
        return Err(EndpointFault::AddressRange);
    }
    if host.contains(':') && host.contains('%') {
        return Err(EndpointFault::Zone);
    }
    match host.parse() {
        Ok(IpAddr::V4(address)) => single(address.into(), protocol),
        Ok(IpAddr::V6(address)) => Err(EndpointFault::Unbracketed(format!("[{address}]"))),
        Err(_) => Ok(Destination::Name(Name::parse(host)?)),
    }
}

fn single(address: IpAddr, protocol: Protocol) -> Result<Destination, EndpointFault> {
    let address = address.to_canonical(); // D4
    if address.is_unspecified() {
        return Err(EndpointFault::Unspecified); // D5
    }
    let many = address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST);
    if protocol == Protocol::Tcp && many {
        return Err(EndpointFault::Multicast);
    }
    Ok(Destination::Address(address))
}

fn prefix(address: IpAddr, length: &str, protocol: Protocol) -> Result<Destination, EndpointFault> {
    let max = if address.is_ipv4() { 32 } else { 128 };
    let digits = length.bytes().all(|byte| byte.is_ascii_digit());
    let length = length
        .parse::<u8>()
        .ok()
        .filter(|_| digits)
        .ok_or(EndpointFault::PrefixLength { max })?;
    let net = IpNet::new(address, length).map_err(|_| EndpointFault::PrefixLength { max })?;
    let net = match (address.to_canonical(), length.checked_sub(96)) {
        // D4. A shorter prefix around the mapped addresses holds IPv6 only: they never reach a lookup as IPv6.
        (IpAddr::V4(mapped), Some(length)) if address.is_ipv6() => {
            IpNet::new(mapped.into(), length).map_err(|_| EndpointFault::PrefixLength { max })?
        }
        (IpAddr::V4(_) | IpAddr::V6(_), _) => net,
    };
    if net.trunc() != net {
        return Err(EndpointFault::HostBits(written(net.trunc())));
    }
    if net.prefix_len() == net.max_prefix_len() {
        return single(net.addr(), protocol);
    }
    // No unicast prefix begins inside the multicast ones.
    if protocol == Protocol::Tcp && net.addr().is_multicast() {
        return Err(EndpointFault::Multicast);
    }
    Ok(Destination::Prefix(net))
}
