//! What can be wrong with an endpoint, a name or the path of a cgroup, each with a remedy that protects no less than
//! what was meant.

use std::net::Ipv6Addr;

use thiserror::Error;

use super::MAX_CGROUP_PATH;

/// Most ports of one endpoint as written (F7).
pub(super) const MAX_PORTS: usize = 1024;

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
    #[error(
        "unknown scheme; use tcp://, udp://, nats:// or tls:// (only host and port matter: https://HOST is \
         tcp://HOST:443)"
    )]
    Scheme,
    /// `tcp:10.0.0.1:80`, or one slash.
    #[error("a scheme is followed by ://; write {0}://ADDRESS:PORT")]
    NoSlashes(&'static str),
    /// A blank, which quotes hide well.
    #[error("an endpoint has no blanks; remove them")]
    Blank,
    /// Credentials outside a message-bus URL.
    #[error("only nats:// and tls:// URLs may carry credentials; remove them")]
    Credentials,
    /// Credentials that leave open where the host begins.
    #[error("/, ? and # in credentials are ambiguous; percent-encode them")]
    AmbiguousCredentials,
    /// `%40` in the host.
    #[error("an encoded @ (%40) leaves open where the host begins; write @ before the host, and no @ in it")]
    EncodedAt,
    /// Several servers, or credentials with a comma, where one server belongs.
    #[error(
        "a comma separates servers of nats:// and tls:// URLs, and ports after a colon, in a configuration only; write \
         each by itself"
    )]
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
    #[error("the port is not a number from 1 to 65535; service names and * are no ports")]
    Port,
    /// As [`EndpointFault::Port`], where several are allowed.
    #[error(
        "the port is not a number from 1 to 65535, nor a range such as 2379-2380 or a list such as 80,443; service \
         names and * are no ports"
    )]
    Ports,
    /// More ports than an endpoint may have.
    #[error("an endpoint has at most {MAX_PORTS} ports; narrow the range, or divide it into several endpoints")]
    TooManyPorts,
    /// `:80/path`.
    #[error("nothing may follow the port; remove what begins with / or ?")]
    Path,
    /// `10.0.0.1-10.0.0.9`.
    #[error("a range of addresses is no endpoint; write the prefixes that it consists of, each as an endpoint")]
    AddressRange,
    /// An IPv6 address or prefix among colons: as it is to be written.
    #[error("an IPv6 address needs brackets; write {0}")]
    Unbracketed(String),
    /// One whose last part may be a port.
    #[error(
        "an IPv6 address needs brackets; write [{host}]:{port}, or [{whole}]:PORT if {port} is part of the address"
    )]
    PortOrPart {
        /// Without the last part.
        host: Ipv6Addr,
        /// The last part.
        port: u16,
        /// With it.
        whole: Ipv6Addr,
    },
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
    /// `10.8.0.1/16`: as it is to be written.
    #[error("the prefix has bits set beyond its length; write {0}")]
    HostBits(String),
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

/// Stands for a port in texts that are to be corrected.
pub(super) const PORT: &str = "PORT";

impl EndpointFault {
    /// Has a remedy end with the port as written, where it is one.
    pub(super) fn with_port(mut self, port: &str) -> Self {
        if let Self::Unbracketed(written) | Self::HostBits(written) = &mut self {
            let port = if super::number(port).is_some() { port } else { PORT };
            *written = format!("{written}:{port}");
        }
        self
    }
}
