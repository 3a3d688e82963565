//! The one resolver call: hosts file, then DNS as this host is set up for it.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use hickory_resolver::{
    Hosts, TokioResolver,
    config::ResolveHosts,
    net::{DnsError, NetError, NoRecords},
    proto::{
        op::{Query, ResponseCode},
        rr::{Name as DnsName, RecordType},
    },
};

use super::{Answer, Outcome};
use crate::policy::Name;

/// How long a look-up may take, all servers and tries together.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// Looks a name up. `/etc/resolv.conf` and `/etc/hosts` are read anew each time, so that changes of them count at once.
pub async fn lookup(name: &Name, patience: Duration) -> Answer {
    if let Some(addresses) = in_hosts_file(name) {
        return Answer::Hosts(addresses);
    }
    match resolver() {
        Ok(resolver) => ask(&resolver, name, patience).await,
        Err(error) => both(&Outcome::Failed(format!("read /etc/resolv.conf: {error}"))),
    }
}

/// What the hosts file says; nothing where it does not name it.
fn in_hosts_file(name: &Name) -> Option<BTreeSet<IpAddr>> {
    let hosts = Hosts::from_system().ok()?;
    let dns_name = DnsName::from_utf8(name.as_str()).ok()?;
    let found = |kind| hosts.lookup_static_host(&Query::query(dns_name.clone(), kind));
    let lookups = [RecordType::A, RecordType::AAAA].into_iter().filter_map(found);
    let addresses: BTreeSet<IpAddr> = lookups
        .flat_map(|lookup| {
            lookup
                .answers()
                .iter()
                .filter_map(|record| record.data.ip_addr())
                .collect::<Vec<_>>()
        })
        .collect();
    (!addresses.is_empty()).then_some(addresses)
}

fn resolver() -> Result<TokioResolver, NetError> {
    let mut builder = TokioResolver::builder_tokio()?;
    let options = builder.options_mut();
    options.cache_size = 0; // The times of look-ups are ours to choose (N2).
    options.use_hosts_file = ResolveHosts::Never; // It was asked before, for what DNS may not name (N6).
    options.try_tcp_on_error = true;
    builder.build()
}

/// A and AAAA at once, each on its own (N1).
async fn ask(resolver: &TokioResolver, name: &Name, patience: Duration) -> Answer {
    let Ok(dns_name) = DnsName::from_utf8(name.as_str()) else {
        return both(&Outcome::Failed("not a DNS name".to_owned()));
    };
    let one = async |kind| match tokio::time::timeout(patience, resolver.lookup(dns_name.clone(), kind)).await {
        Err(_) => Outcome::Failed(format!("no answer within {} s", patience.as_secs())),
        Ok(Err(error)) => failed(&error),
        Ok(Ok(lookup)) => {
            // CNAMEs on the way are among the answers; their TTL counts as well as the addresses'.
            let answers = lookup.answers();
            let addresses: BTreeSet<IpAddr> = answers.iter().filter_map(|record| record.data.ip_addr()).collect();
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
    let (a, aaaa) = tokio::join!(one(RecordType::A), one(RecordType::AAAA));
    Answer::Dns { a, aaaa }
}

#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "every other code is a failure that names itself"
)]
fn failed(error: &NetError) -> Outcome {
    if let NetError::Dns(DnsError::NoRecordsFound(NoRecords { response_code, .. })) = error {
        return match *response_code {
            ResponseCode::NoError => Outcome::Empty,
            ResponseCode::NXDomain => Outcome::Failed("the name does not exist (NXDOMAIN)".to_owned()),
            code => Outcome::Failed(format!("the server answers {code}")),
        };
    }
    Outcome::Failed(error.to_string())
}

fn both(outcome: &Outcome) -> Answer {
    Answer::Dns {
        a: outcome.clone(),
        aaaa: outcome.clone(),
    }
}
