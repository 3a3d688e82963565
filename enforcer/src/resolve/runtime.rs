//! Sockets to name servers: tokio's, on the interface by which a link-local server is reached.

use std::{
    future::Future,
    io,
    net::{SocketAddr, SocketAddrV6},
    pin::Pin,
    time::Duration,
};

use hickory_resolver::net::runtime::{RuntimeProvider, TokioRuntimeProvider};
use nix::net::if_::{if_indextoname, if_nametoindex};
use socket2::SockRef;

/// An interface of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    name: String,
    index: u32,
}

impl Interface {
    /// By the zone of an address: its name, or its number (RFC 4007, section 11).
    pub(super) fn of_zone(zone: &str) -> Option<Self> {
        if let Ok(index) = if_nametoindex(zone) {
            let name = zone.to_owned();
            return Some(Self { name, index });
        }
        let index = zone.parse().ok()?;
        let name = if_indextoname(index).ok()?.into_string().ok()?;
        Some(Self { name, index })
    }
}

/// hickory knows addresses without a zone; this adds it.
#[derive(Clone)]
pub(super) struct Runtime {
    tokio: TokioRuntimeProvider,
    interface: Option<Interface>,
}

impl Runtime {
    pub(super) fn by(interface: Option<Interface>) -> Self {
        let tokio = TokioRuntimeProvider::default();
        Self { tokio, interface }
    }
}

impl RuntimeProvider for Runtime {
    type Handle = <TokioRuntimeProvider as RuntimeProvider>::Handle;
    type Timer = <TokioRuntimeProvider as RuntimeProvider>::Timer;
    type Udp = <TokioRuntimeProvider as RuntimeProvider>::Udp;
    type Tcp = <TokioRuntimeProvider as RuntimeProvider>::Tcp;

    fn create_handle(&self) -> Self::Handle {
        self.tokio.create_handle()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        bind: Option<SocketAddr>,
        timeout: Option<Duration>,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Tcp>>>> {
        let server = match (server, &self.interface) {
            (SocketAddr::V6(server), Some(interface)) => {
                SocketAddrV6::new(*server.ip(), server.port(), server.flowinfo(), interface.index).into()
            }
            (server, _) => server,
        };
        self.tokio.connect_tcp(server, bind, timeout)
    }

    fn bind_udp(
        &self,
        local: SocketAddr,
        server: SocketAddr,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Udp>>>> {
        let bound = self.tokio.bind_udp(local, server);
        let interface = self.interface.clone();
        Box::pin(async move {
            let socket = bound.await?;
            if let Some(interface) = interface {
                match SockRef::from(&socket).bind_device(Some(interface.name.as_bytes())) {
                    // Before Linux 5.7 that takes CAP_NET_RAW; then the kernel chooses among the interfaces with such
                    // addresses.
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                    bound => bound?,
                }
            }
            Ok(socket)
        })
    }
}
