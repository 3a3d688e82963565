//! Text → `Endpoint`, `Name`, `CgroupPath`. Pure.
//!
//! Endpoints are not parsed by the `url` crate: it has no prefixes, reads `127.1` and `0x7f.1` as addresses,
//! and cuts a password at its first `/`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU16,
};

use ipnet::IpNet;
use thiserror::Error;

use super::{CgroupPath, Destination, Endpoint, Name, Protocol};

mod servers;
mod shown;
#[cfg(test)]
mod tests;

pub(crate) use servers::{Server, servers};
pub use shown::shown;

/// The longest cgroup path, in bytes: what `PATH_MAX` leaves of 4096 for the terminating zero.
pub const MAX_CGROUP_PATH: usize = 4095;

/// An endpoint that cannot be protected as written.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("endpoint {shown}: {fault}")]
pub struct EndpointError {
    /// The endpoint as written, without credentials (B2).
    pub shown: String,
    /// What is wrong with it.
    pub fault: EndpointFault,
}

/// What is wrong with an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EndpointFault {
    /// A scheme that names no protocol we judge.
    #[error("unknown scheme; use tcp://, udp://, nats:// or tls://")]
    Scheme,
    /// Credentials outside a message-bus URL.
    #[error("only nats:// and tls:// URLs may carry credentials; remove them")]
    Credentials,
    /// Credentials that leave open where the host begins.
    #[error("/, ? and # in credentials are ambiguous; percent-encode them")]
    AmbiguousCredentials,
    /// Several servers, or credentials with a comma, where one server belongs.
    #[error("a comma separates servers, of nats:// and tls:// URLs in a configuration only; write each by itself")]
    Several,
    /// Credentials that leave open how many servers there are.
    #[error("a comma separates servers; write one in credentials as %2C")]
    Comma,
    /// A server without scheme, credentials and port: it may be anything.
    #[error("no scheme; begin it with nats://")]
    NoScheme,
    /// Nothing before the port.
    #[error("no host; write ADDRESS:PORT, [IPV6]:PORT, NAME:PORT or local:PORT")]
    NoHost,
    /// Nothing after the host (B2).
    #[error("no port; end it with :PORT")]
    NoPort,
    /// A port that none can listen on.
    #[error("the port is not a number from 1 to 65535; correct it")]
    Port,
    /// An IPv6 address among colons.
    #[error("an IPv6 address needs brackets; write [{0}]:PORT")]
    Unbracketed(Ipv6Addr),
    /// Brackets around something else.
    #[error("brackets hold an IPv6 address or prefix and nothing else; write [IPV6]:PORT")]
    Brackets,
    /// `fe80::1%eth0`.
    #[error("an address with a zone cannot be evaluated; remove the zone")]
    Zone,
    /// `name/8`.
    #[error("a prefix is ADDRESS/LENGTH; correct the part before the port")]
    Prefix,
    /// `10.0.0.0/33`.
    #[error("the prefix length is not a number from 0 to {max}; correct it")]
    PrefixLength {
        /// The longest of the family.
        max: u8,
    },
    /// `10.8.0.1/16`.
    #[error("the prefix has bits set beyond its length; write {0}")]
    HostBits(IpNet),
    /// `0.0.0.0` or `::` (D5).
    #[error(
        "an unspecified address is not an endpoint; use local:PORT for every address of this host, 0.0.0.0/0:PORT and \
         [::/0]:PORT for every address there is"
    )]
    Unspecified,
    /// TCP to many.
    #[error("TCP has no multicast or broadcast; name the address of a host")]
    Multicast,
    /// Neither an address nor a name.
    #[error(transparent)]
    Name(#[from] NameError),
}

/// What is wrong with a DNS name (RFC 1123, with the underscore that hosts files and service names use).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// More than 253 characters.
    #[error("a name has at most 253 characters; shorten it")]
    Length,
    /// An empty label, or one of more than 63 characters.
    #[error("between dots a name has 1 to 63 characters; correct it")]
    Label,
    /// Something else than a letter, digit, `-` or `_`.
    #[error("a name has letters, digits, - and _ only, none beginning or ending with -; write other names as xn--…")]
    Character,
    /// `127.1`, `010.0.0.1`, `0x7f.1`: some resolvers read these as addresses, each in its own way.
    #[error("neither a name nor an IPv4 address of four decimal numbers; write it as a.b.c.d without leading zeros")]
    Numeric,
    /// `local.`
    #[error("`local` means this host and is no name; write local:PORT or the name of the host")]
    Local,
}

/// What is wrong with the path of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CgroupPathError {
    /// No leading slash.
    #[error("a cgroup path starts at the root of the hierarchy; begin it with /")]
    Relative,
    /// `//`, `/./` or `/../`.
    #[error("a cgroup path has no empty, `.` or `..` part; remove it")]
    Part,
    /// A control character: the kernel allows none that we would have to print.
    #[error("a cgroup path has no control characters; remove them")]
    Control,
    /// Bytes that are no text: written as text they would be the path of another cgroup.
    #[error("a cgroup path is UTF-8; rename the cgroup")]
    Encoding,
    /// Longer than the kernel takes.
    #[error("a cgroup path has at most {MAX_CGROUP_PATH} bytes; shorten it")]
    Length,
}

impl Endpoint {
    /// Reads `[SCHEME://]ADDR:PORT`, SCHEME one of `tcp` (the default), `udp`, `nats` and `tls` (both TCP, credentials
    /// permitted and ignored), ADDR an IPv4 address, `[IPv6]`, a prefix of either, `local` or a DNS name.
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        endpoint(text).map_err(|fault| EndpointError {
            shown: shown(text),
            fault,
        })
    }

    /// As [`Endpoint::parse`], of each server where a message-bus URL has several, with commas between them (B2).
    pub fn parse_all(text: &str) -> Result<Vec<Self>, EndpointError> {
        if text.contains(',') && is_bus_url(text) {
            servers(text).map(|server| server?.configured()).collect()
        } else {
            Ok(vec![Self::parse(text)?])
        }
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
    // No part but credentials could hold one, and those of a first server would hide it.
    if text.contains(',') {
        return Err(EndpointFault::Several);
    }
    let (protocol, bus, rest) = match text.split_once("://") {
        None => (Protocol::Tcp, false, text),
        Some((scheme, rest)) => match scheme.to_ascii_lowercase().as_str() {
            "tcp" => (Protocol::Tcp, false, rest),
            "udp" => (Protocol::Udp, false, rest),
            "nats" | "tls" => (Protocol::Tcp, true, rest),
            _ => return Err(EndpointFault::Scheme),
        },
    };
    let rest = if bus {
        rest.strip_suffix('/').unwrap_or(rest)
    } else {
        rest
    };
    let (host, port) = split(authority(rest, bus)?)?;
    Ok(Endpoint {
        protocol,
        destination: destination(host, protocol)?,
        port: number(port)?,
    })
}

/// What follows the credentials.
fn authority(rest: &str, bus: bool) -> Result<&str, EndpointFault> {
    match rest.rsplit_once('@') {
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
        if let Ok(address) = authority.parse::<Ipv6Addr>() {
            return Err(EndpointFault::Unbracketed(address)); // `::1:80` is an address, and so is `::1`
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

fn number(port: &str) -> Result<NonZeroU16, EndpointFault> {
    // `parse` would take `+80`.
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    port.parse().ok().filter(|_| digits).ok_or(EndpointFault::Port)
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
            Ok(IpAddr::V6(address)) => Err(EndpointFault::Unbracketed(address)),
            Err(_) => Err(EndpointFault::Prefix),
        };
    }
    if host.contains(':') && host.contains('%') {
        return Err(EndpointFault::Zone);
    }
    match host.parse() {
        Ok(IpAddr::V4(address)) => single(address.into(), protocol),
        Ok(IpAddr::V6(address)) => Err(EndpointFault::Unbracketed(address)),
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
        return Err(EndpointFault::HostBits(net.trunc()));
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
