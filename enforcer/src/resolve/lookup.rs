//! One look-up of a name: hosts file, then DNS as this host is set up for it, in the C library's order.

use std::{collections::BTreeSet, fs, net::IpAddr, time::Duration};

use hickory_resolver::{
    Hosts, TokioResolver,
    config::{ResolveHosts, ResolverConfig, ResolverOpts},
    net::{DnsError, NetError, NoRecords, runtime::TokioRuntimeProvider},
    proto::{
        op::{Query, ResponseCode},
        rr::{Name as DnsName, RecordType},
    },
    system_conf::read_system_conf,
};
use tokio::time::{Instant, timeout};

use super::{Answer, Outcome};
use crate::policy::Name;

/// How long a look-up may take, all servers and search domains together.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

const HOSTS: &str = "/etc/hosts";
/// Most servers asked (resolv.conf(5), `MAXNS`).
const MAX_SERVERS: usize = 3;
const LATE: &str = "no answer in time";

/// Looks a name up. `/etc/resolv.conf` and `/etc/hosts` are read anew each time, so that changes of them count at once.
pub async fn lookup(name: &Name, patience: Duration) -> Answer {
    let Ok(dns_name) = DnsName::from_ascii(name.as_str()) else {
        return both(&Outcome::Failed("not a DNS name".to_owned()));
    };
    // Without a readable file DNS is asked, as the C library does.
    if let Some(addresses) = fs::read(HOSTS).ok().and_then(|text| in_hosts_file(&text, &dns_name)) {
        return Answer::Hosts(addresses);
    }
    let stub = read_system_conf().and_then(|(config, options)| Stub::new(config, &options, patience));
    match stub {
        Ok(stub) => stub.ask(&dns_name, patience).await,
        Err(error) => both(&Outcome::Failed(format!("read /etc/resolv.conf: {error}"))),
    }
}

/// What a hosts file says; nothing where it does not name it.
fn in_hosts_file(text: &[u8], name: &DnsName) -> Option<BTreeSet<IpAddr>> {
    let mut hosts = Hosts::default();
    // Lossy: one odd byte in a comment would otherwise hide the whole file.
    hosts.read_hosts_conf(String::from_utf8_lossy(text).as_bytes()).ok()?;
    let found = |kind| hosts.lookup_static_host(&Query::query(name.clone(), kind));
    let lookups = [RecordType::A, RecordType::AAAA].into_iter().filter_map(found);
    let addresses: BTreeSet<IpAddr> = lookups
        .flat_map(|lookup| {
            let addresses = lookup.answers().iter().filter_map(|record| record.data.ip_addr());
            addresses.collect::<Vec<_>>()
        })
        .collect();
    (!addresses.is_empty()).then_some(addresses)
}

/// A stub resolver in the C library's order. hickory's own pool asks two servers at once and takes the first word, which
/// beside a private resolver is the public one's NXDOMAIN; and it walks the search list for each family alone, so that a
/// name with A only ends in the NXDOMAIN of the last search domain.
struct Stub {
    /// One resolver for each server, in the file's order.
    servers: Vec<(IpAddr, TokioResolver)>,
    search: Vec<DnsName>,
    ndots: usize,
    /// Most time for one server: all its tries together (resolv.conf(5), `timeout` and `attempts`).
    per_server: Duration,
}

impl Stub {
    fn new(config: ResolverConfig, options: &ResolverOpts, patience: Duration) -> Result<Self, NetError> {
        let (domain, search, servers) = config.into_parts();
        let tries = u32::try_from(options.attempts).unwrap_or(u32::MAX).max(1);
        let per_server = options.timeout.max(Duration::from_secs(1)).saturating_mul(tries);
        let mut options = options.clone();
        options.cache_size = 0; // The times of look-ups are ours to choose (N2).
        options.use_hosts_file = ResolveHosts::Never; // It was asked before, for what DNS may not name (N6).
        options.attempts = 0; // Lost packets are sent again all the same; other failures go to the next server.
        options.timeout = patience;
        let servers = servers.into_iter().take(MAX_SERVERS).map(|server| {
            let address = server.ip;
            let config = ResolverConfig::from_name_servers(vec![server]);
            let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
            *builder.options_mut() = options.clone();
            Ok((address, builder.build()?))
        });
        Ok(Self {
            servers: servers.collect::<Result<_, NetError>>()?,
            // The host's own domain counts only where resolv.conf(5) names none.
            search: if search.is_empty() {
                domain.into_iter().collect()
            } else {
                search
            },
            ndots: options.ndots,
            per_server,
        })
    }

    /// A and AAAA at once, each on its own (N1). The first candidate with an address of either family ends the search.
    async fn ask(&self, name: &DnsName, patience: Duration) -> Answer {
        let deadline = Instant::now() + patience;
        let mut negative: Option<(Outcome, Outcome)> = None;
        for candidate in self.candidates(name) {
            let (a, aaaa) = tokio::join!(
                self.one(&candidate, RecordType::A, deadline),
                self.one(&candidate, RecordType::AAAA, deadline)
            );
            let found = |outcome: &Outcome| matches!(outcome, Outcome::Found { .. });
            if found(&a) || found(&aaaa) {
                return Answer::Dns { a, aaaa };
            }
            negative = Some(match negative {
                None => (a, aaaa),
                Some((a_before, aaaa_before)) => (weightier(a_before, a), weightier(aaaa_before, aaaa)),
            });
        }
        let nothing = || Outcome::Failed("too long for a DNS name".to_owned());
        let (a, aaaa) = negative.unwrap_or_else(|| (nothing(), nothing()));
        Answer::Dns { a, aaaa }
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
        for (position, (server, resolver)) in self.servers.iter().enumerate() {
            let left = u32::try_from(self.servers.len() - position).unwrap_or(u32::MAX);
            let share = deadline.saturating_duration_since(Instant::now()) / left;
            let outcome = match timeout(share.min(self.per_server), resolver.lookup(name.clone(), kind)).await {
                Err(_) => Outcome::Failed(LATE.to_owned()),
                Ok(Err(error)) => negative(&error),
                Ok(Ok(lookup)) => {
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
                Outcome::Failed(cause) => failure = Outcome::Failed(format!("{server}: {cause}")),
                Outcome::Found { .. } | Outcome::Empty | Outcome::Missing => return outcome,
            }
        }
        failure
    }
}

/// Of two candidates without an address, the word that says most: a failure leaves open what the other would deny.
fn weightier(before: Outcome, now: Outcome) -> Outcome {
    let weight = |outcome: &Outcome| match outcome {
        Outcome::Missing => 0,
        Outcome::Empty => 1,
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

fn both(outcome: &Outcome) -> Answer {
    Answer::Dns {
        a: outcome.clone(),
        aaaa: outcome.clone(),
    }
}

#[cfg(test)]
mod tests;
