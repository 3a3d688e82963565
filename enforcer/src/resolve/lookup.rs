//! One lookup of a name: hosts file, then DNS as this host is set up for it, in the C library's order.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures_util::future::{Either, select};

use hickory_resolver::{
    Hosts, Resolver,
    config::{NameServerConfig, ProtocolConfig, ResolveHosts, ResolverConfig},
    lookup::Lookup,
    net::{DnsError, NetError, NoRecords},
    proto::{
        op::{Query, ResponseCode},
        rr::{Name as DnsName, RecordType},
    },
};
use tokio::time::{Instant, timeout};

use super::{
    LookupAnswer, Outcome,
    resolv_conf::ResolvConf,
    runtime::{Interface, Runtime},
};
use crate::policy::Name;

/// How long a lookup may take, all servers and search domains together.
pub(crate) const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";
const LATE: &str = "no answer in time";

/// How long the answer of one family waits for the other's.
const GRACE: Duration = Duration::from_millis(300);

/// What a lookup has brought, and what it may bring yet.
pub(crate) struct PartialAnswer {
    /// Where one family was answered and the other was not in a short time, that one, and [`Outcome::Awaited`].
    pub answer: LookupAnswer,
    /// Brings the whole answer then.
    pub rest: Option<Pin<Box<dyn Future<Output = LookupAnswer> + Send>>>,
}

impl PartialAnswer {
    /// Waits for the whole answer.
    pub(crate) async fn whole(self) -> LookupAnswer {
        match self.rest {
            Some(rest) => rest.await,
            None => self.answer,
        }
    }
}

impl From<LookupAnswer> for PartialAnswer {
    fn from(answer: LookupAnswer) -> Self {
        Self { answer, rest: None }
    }
}

/// Looks a name up. `/etc/resolv.conf` and `/etc/hosts` are read anew each time, so that changes of them count at once.
pub(crate) async fn lookup(name: &Name, patience: Duration) -> LookupAnswer {
    lookup_early(name, patience).await.whole().await
}

/// As [`lookup`], with the first word as soon as that means something.
pub(crate) async fn lookup_early(name: &Name, patience: Duration) -> PartialAnswer {
    let Ok(dns_name) = DnsName::from_ascii(name.as_str()) else {
        return both(&Outcome::Failed("not a DNS name".to_owned())).into();
    };
    // Without a readable file DNS is asked, as the C library does.
    if let Some(addresses) = fs::read(HOSTS).ok().and_then(|text| in_hosts_file(&text, &dns_name)) {
        return LookupAnswer::Hosts(addresses).into();
    }
    let text = match fs::read(RESOLV_CONF) {
        // As an empty one.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return both(&Outcome::Failed(format!("read {RESOLV_CONF}: {error}"))).into(),
        Ok(text) => text,
    };
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let conf = ResolvConf::parse(&String::from_utf8_lossy(&text), host.trim_end());
    let servers = conf.servers.iter().map(|server| {
        // Without such an interface the kernel chooses one, as for glibc.
        let interface = server.zone.as_deref().and_then(Interface::of_zone);
        (NameServerConfig::udp_and_tcp(server.address), interface)
    });
    let servers = servers.collect();
    match Stub::new(conf, servers, patience) {
        Ok(stub) => Arc::new(stub).ask(&dns_name, patience).await,
        Err(error) => both(&Outcome::Failed(error.to_string())).into(),
    }
}

/// What a hosts file says; nothing where it does not name it.
fn in_hosts_file(text: &[u8], name: &DnsName) -> Option<BTreeSet<IpAddr>> {
    let mut hosts = Hosts::default();
    // Lossy: one odd byte in a comment would otherwise hide the whole file.
    hosts.read_hosts_conf(String::from_utf8_lossy(text).as_bytes()).ok()?;
    let found = |kind| hosts.lookup_static_host(&Query::query(name.clone(), kind));
    let lookups = [RecordType::A, RecordType::AAAA].into_iter().filter_map(found);
    let mut addresses: BTreeSet<IpAddr> = lookups
        .flat_map(|lookup| {
            let addresses = lookup.answers().iter().filter_map(|record| record.data.ip_addr());
            addresses.collect::<Vec<_>>()
        })
        .collect();
    // glibc answers a question for IPv4 with it too (nss_files).
    if addresses.contains(&Ipv6Addr::LOCALHOST.into()) {
        addresses.insert(Ipv4Addr::LOCALHOST.into());
    }
    (!addresses.is_empty()).then_some(addresses)
}

/// A stub resolver in the C library's order. hickory's own pool asks two servers at once and takes the first word,
/// which beside a private resolver is the public one's NXDOMAIN; and it walks the search list for each family alone, so
/// that a name with A only ends in the NXDOMAIN of the last search domain.
struct Stub {
    /// In the order in which they are asked.
    servers: Vec<Server>,
    search: Vec<DnsName>,
    ndots: usize,
    /// Most time for one server: all its tries together (resolv.conf(5), `timeout` and `attempts`).
    per_server: Duration,
}

/// A server, and the two ways to it: the second where the first one is silent.
struct Server {
    address: IpAddr,
    ways: Vec<Resolver<Runtime>>,
}

impl Server {
    fn new(
        server: NameServerConfig,
        interface: Option<&Interface>,
        tcp_alone: bool,
        patience: Duration,
    ) -> Result<Self, NetError> {
        let address = server.ip;
        let mut over_tcp = server.clone();
        over_tcp
            .connections
            .retain(|way| matches!(way.protocol, ProtocolConfig::Tcp));
        let ways = if tcp_alone {
            vec![over_tcp]
        } else {
            vec![server, over_tcp]
        };
        let ways = ways.into_iter().map(|way| {
            let config = ResolverConfig::from_name_servers(vec![way]);
            let mut builder = Resolver::builder_with_config(config, Runtime::by(interface.cloned()));
            let options = builder.options_mut();
            options.cache_size = 0; // The times of lookups are ours to choose (N2).
            options.use_hosts_file = ResolveHosts::Never; // It was asked before, for what DNS may not name (N6).
            options.attempts = 0; // Lost packets are sent again all the same; other failures go to the next server.
            options.timeout = patience;
            // hickory's own choice, any port from 1024 on, may be a port that a job is about to listen on: the kernel
            // keeps to ip_local_port_range and ip_local_reserved_ports, and chooses at random too.
            options.os_port_selection = true;
            builder.build()
        });
        Ok(Self {
            address,
            ways: ways.collect::<Result<_, NetError>>()?,
        })
    }

    /// Asks within a time: the first way for most of it, and where nothing comes the other for the rest.
    async fn ask(&self, name: &DnsName, kind: RecordType, time: Duration) -> Option<Result<Lookup, NetError>> {
        let until = Instant::now() + time;
        let mut answer = None;
        for (position, way) in self.ways.iter().enumerate() {
            let left = until.saturating_duration_since(Instant::now());
            let is_last = position + 1 == self.ways.len();
            let share = if is_last { left } else { left.mul_f64(0.6) };
            answer = timeout(share, way.lookup(name.clone(), kind)).await.ok();
            if !matches!(answer, None | Some(Err(NetError::Timeout))) {
                break;
            }
        }
        answer
    }
}

impl Stub {
    fn new(
        conf: ResolvConf,
        servers: Vec<(NameServerConfig, Option<Interface>)>,
        patience: Duration,
    ) -> Result<Self, NetError> {
        let servers = servers
            .into_iter()
            .map(|(server, interface)| Server::new(server, interface.as_ref(), conf.tcp, patience));
        let mut servers = servers.collect::<Result<Vec<_>, NetError>>()?;
        if conf.rotate && !servers.is_empty() {
            let first = usize::try_from(super::random_bits()).unwrap_or_default() % servers.len();
            servers.rotate_left(first);
        }
        Ok(Self {
            servers,
            search: conf.search,
            ndots: conf.ndots,
            per_server: conf.timeout.saturating_mul(conf.attempts),
        })
    }

    /// A and AAAA at once, each on its own (N1). The first candidate with an address of either family ends the search.
    async fn ask(self: Arc<Self>, name: &DnsName, patience: Duration) -> PartialAnswer {
        let deadline = Instant::now() + patience;
        let mut negative: Option<(Outcome, Outcome)> = None;
        for candidate in self.candidates(name) {
            let (stub, asked) = (Arc::clone(&self), candidate.clone());
            let a = Box::pin(async move { stub.one(&asked, RecordType::A, deadline).await });
            let (stub, asked) = (Arc::clone(&self), candidate);
            let aaaa = Box::pin(async move { stub.one(&asked, RecordType::AAAA, deadline).await });
            let found = |outcome: &Outcome| matches!(outcome, Outcome::Found { .. });
            let (a, aaaa) = match select(a, aaaa).await {
                Either::Left((a, rest)) if found(&a) => match within_grace(rest).await {
                    Ok(aaaa) => (a, aaaa),
                    Err(rest) => return early(a, rest, |a, aaaa| LookupAnswer::Dns { a, aaaa }),
                },
                Either::Right((aaaa, rest)) if found(&aaaa) => match within_grace(rest).await {
                    Ok(a) => (a, aaaa),
                    Err(rest) => return early(aaaa, rest, |aaaa, a| LookupAnswer::Dns { a, aaaa }),
                },
                Either::Left((a, rest)) => (a, rest.await),
                Either::Right((aaaa, rest)) => (rest.await, aaaa),
            };
            if found(&a) || found(&aaaa) {
                return LookupAnswer::Dns { a, aaaa }.into();
            }
            negative = Some(match negative {
                None => (a, aaaa),
                Some((a_before, aaaa_before)) => (weightier(a_before, a), weightier(aaaa_before, aaaa)),
            });
        }
        let nothing = || Outcome::Failed("too long for a DNS name".to_owned());
        let (a, aaaa) = negative.unwrap_or_else(|| (nothing(), nothing()));
        LookupAnswer::Dns { a, aaaa }.into()
    }

    /// The full names to try: with enough dots as it is first, else last (resolv.conf(5), `ndots`).
    fn candidates(&self, name: &DnsName) -> Vec<DnsName> {
        let mut plain = name.clone();
        plain.set_fqdn(true);
        let searched = self
            .search
            .iter()
            .filter_map(|domain| name.clone().append_domain(domain).ok())
            .map(|mut candidate| {
                candidate.set_fqdn(true);
                candidate
            });
        let dots = usize::from(name.num_labels()).saturating_sub(1);
        if dots >= self.ndots {
            std::iter::once(plain).chain(searched).collect()
        } else {
            searched.chain(std::iter::once(plain)).collect()
        }
    }

    /// Asks the servers in order until one knows, as the C library does: a failure goes to the next, a "no" does not.
    async fn one(&self, name: &DnsName, kind: RecordType, deadline: Instant) -> Outcome {
        let mut failure = Outcome::Failed("no name server".to_owned());
        for (position, server) in self.servers.iter().enumerate() {
            let left = u32::try_from(self.servers.len() - position).unwrap_or(u32::MAX);
            let share = deadline.saturating_duration_since(Instant::now()) / left;
            let outcome = match server.ask(name, kind, share.min(self.per_server)).await {
                None => Outcome::Failed(LATE.to_owned()),
                Some(Err(error)) => negative(&error),
                Some(Ok(lookup)) => {
                    // CNAMEs on the way are among the answers; their TTL counts as well as the addresses'.
                    let answers = lookup.answers();
                    let addresses: BTreeSet<IpAddr> =
                        answers.iter().filter_map(|record| record.data.ip_addr()).collect();
                    let ttl = answers.iter().map(|record| record.ttl).min().unwrap_or(0);
                    if addresses.is_empty() {
                        Outcome::Empty
                    } else {
                        Outcome::Found {
                            addresses,
                            ttl: Duration::from_secs(ttl.into()),
                        }
                    }
                }
            };
            match outcome {
                Outcome::Failed(cause) => failure = Outcome::Failed(format!("{}: {cause}", server.address)),
                Outcome::Found { .. } | Outcome::Empty | Outcome::Missing | Outcome::Awaited => return outcome,
            }
        }
        failure
    }
}

/// The other family's outcome, or the wait for it where that is long.
async fn within_grace<F: Future<Output = Outcome> + Unpin>(mut rest: F) -> Result<Outcome, F> {
    timeout(GRACE, &mut rest).await.map_err(|_| rest)
}

/// One family now, and both once the other is known.
fn early(
    first: Outcome,
    rest: impl Future<Output = Outcome> + Send + 'static,
    answer: impl Fn(Outcome, Outcome) -> LookupAnswer + Send + 'static,
) -> PartialAnswer {
    PartialAnswer {
        answer: answer(first.clone(), Outcome::Awaited),
        rest: Some(Box::pin(async move {
            let rest = rest.await;
            answer(first, rest)
        })),
    }
}

/// Of two candidates without an address, the word that says most: a failure leaves open what the other would deny.
fn weightier(before: Outcome, now: Outcome) -> Outcome {
    let weight = |outcome: &Outcome| match outcome {
        Outcome::Missing => 0,
        Outcome::Awaited | Outcome::Empty => 1,
        Outcome::Failed(_) => 2,
        Outcome::Found { .. } => 3,
    };
    if weight(&now) > weight(&before) { now } else { before }
}

#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "every other code is a failure that names itself"
)]
fn negative(error: &NetError) -> Outcome {
    if let NetError::Dns(DnsError::NoRecordsFound(NoRecords { response_code, .. })) = error {
        return match *response_code {
            ResponseCode::NoError => Outcome::Empty,
            ResponseCode::NXDomain => Outcome::Missing,
            code => Outcome::Failed(format!("the server answers {code}")),
        };
    }
    Outcome::Failed(if matches!(error, NetError::Timeout) {
        LATE.to_owned()
    } else {
        error.to_string()
    })
}

fn both(outcome: &Outcome) -> LookupAnswer {
    LookupAnswer::Dns {
        a: outcome.clone(),
        aaaa: outcome.clone(),
    }
}

#[cfg(test)]
mod tests;
