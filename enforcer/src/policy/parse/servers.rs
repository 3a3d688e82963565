//! The servers of a message-bus URL: NATS clients take several in one string, with commas between them (B2).

use std::net::IpAddr;

use super::{
    Endpoint, EndpointError, EndpointFault,
    shown::{HIDDEN, single},
};

/// Where a NATS server listens that is named without a port.
const DEFAULT_PORT: u16 = 4222;

/// Whether URLs of this scheme list servers.
pub(crate) fn is_bus(scheme: &str) -> bool {
    ["nats", "tls"].iter().any(|bus| scheme.eq_ignore_ascii_case(bus))
}

/// One server as written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Server<'a> {
    /// `nats` of `nats://…`.
    pub(crate) scheme: Option<&'a str>,
    /// What follows it: credentials, host, port.
    rest: &'a str,
}

/// Each server of a string, or why a part of it is none. A part that might belong to credentials is shown as `…`.
pub(crate) fn servers(text: &str) -> impl Iterator<Item = Result<Server<'_>, EndpointError>> {
    let parts = || {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(Server::split).enumerate()
    };
    // Those after which what stands before them can be told: one pass, however long the string is.
    let mut marks = parts().filter(|(_, server)| server.is_marked()).peekable();
    let mut schemed = false;
    parts().map(move |(index, server)| {
        schemed |= server.scheme.is_some();
        if server.has_credentials() || server.is_plain() {
            return Ok(server);
        }
        while marks.next_if(|(mark, _)| *mark <= index).is_some() {}
        // Where credentials come before the next scheme, the comma may stand in them.
        let fault = match marks.peek() {
            Some((_, next)) if next.scheme.is_none() => EndpointFault::Comma,
            Some(_) | None if schemed => return Ok(server),
            Some(_) | None => EndpointFault::NoScheme,
        };
        Err(EndpointError {
            shown: HIDDEN.to_owned(),
            fault,
        })
    })
}

impl<'a> Server<'a> {
    fn split(text: &'a str) -> Self {
        match text.split_once("://") {
            Some((scheme, rest)) => Self {
                scheme: Some(scheme),
                rest,
            },
            None => Self {
                scheme: None,
                rest: text,
            },
        }
    }

    fn has_credentials(self) -> bool {
        self.rest.contains('@')
    }

    fn is_marked(&self) -> bool {
        self.scheme.is_some() || self.has_credentials()
    }

    /// Whether this cannot be anything else than an address, or a host with a port.
    fn is_plain(self) -> bool {
        self.parse(None).is_ok() || (self.parse(Some(DEFAULT_PORT)).is_ok() && self.is_address())
    }

    fn is_address(self) -> bool {
        self.rest.starts_with('[') || self.rest.trim_end_matches('/').parse::<IpAddr>().is_ok()
    }

    /// The endpoint that a NATS client dials.
    pub(crate) fn endpoint(self) -> Result<Endpoint, EndpointError> {
        match self.parse(None) {
            Err(EndpointFault::NoPort) => self.parse(Some(DEFAULT_PORT)),
            parsed => parsed,
        }
        .map_err(|fault| self.error(fault))
    }

    /// Its endpoint as a configuration has it: of a message bus, and with a port.
    pub(crate) fn configured(self) -> Result<Endpoint, EndpointError> {
        match self.scheme {
            Some(scheme) if !is_bus(scheme) => Err(EndpointFault::Several),
            Some(_) | None => self.parse(None),
        }
        .map_err(|fault| self.error(fault))
    }

    fn error(self, fault: EndpointFault) -> EndpointError {
        let shown = self.shown();
        EndpointError { shown, fault }
    }

    fn parse(self, port: Option<u16>) -> Result<Endpoint, EndpointFault> {
        let rest = match port {
            None => self.rest.to_owned(),
            Some(port) => format!("{}:{port}", self.rest.trim_end_matches('/')),
        };
        super::endpoint(&format!("nats://{rest}"))
    }

    /// It, without credentials.
    pub(crate) fn shown(self) -> String {
        match self.scheme {
            Some(scheme) => single(&format!("{scheme}://{}", self.rest)),
            None => single(self.rest),
        }
    }
}
