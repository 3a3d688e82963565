//! Servers of a message bus that are not endpoints: a NATS server greets whoever connects with an INFO line that names
//! the other servers of its cluster, to which clients go when it is down (docs.nats.io, "Client Protocol":
//! `connect_urls`).

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

use super::findings::Findings;
use crate::{
    config::Config,
    policy::{BUS, Destination, Endpoint, Name, Policy, Protocol, Uid, is_bus_url},
    ruleset::{Resolved, RuleSet, Subject, owners, weigh},
    text,
    wire::doctor::Weight,
};

/// How long a server may take: it speaks first.
const PATIENCE: Duration = Duration::from_secs(1);
/// Most servers that are asked.
const MOST: usize = 256;
/// Longest INFO line that is read; of a cluster of hundreds of servers it is a few KiB.
const LONGEST: u64 = 64 << 10;

/// A server that another one announces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Member {
    /// Which one.
    pub(super) by: SocketAddr,
    /// Its address or name.
    pub(super) host: String,
    pub(super) port: u16,
}

/// What of an INFO line matters here.
#[derive(Debug, Deserialize)]
struct Info {
    #[serde(default)]
    connect_urls: Vec<String>,
}

/// The endpoints that are message buses: target `nats`, and those of other targets that are written as URLs of one.
pub(super) fn endpoints(config: &Config, policy: &Policy) -> BTreeSet<Endpoint> {
    let ours = policy.targets.iter().filter(|target| target.name == BUS);
    let written = config.targets.values().flat_map(|target| &target.endpoints);
    let written = written.map(|text| text.value.expose()).filter(|text| is_bus_url(text));
    let written = written.filter_map(|text| Endpoint::parse_all(text).ok());
    ours.flat_map(|target| target.endpoints.clone())
        .chain(written.flatten())
        .collect()
}

/// Asks each server that root may reach, so that nothing is denied for our sake, for the members that it names.
pub(super) async fn members(buses: &BTreeSet<Endpoint>, names: &Resolved, rules: &RuleSet) -> Vec<Member> {
    let over_tcp = buses.iter().filter(|endpoint| endpoint.protocol == Protocol::Tcp);
    let addresses = over_tcp.flat_map(|endpoint| {
        let found = match &endpoint.destination {
            Destination::Address(address) => vec![*address],
            Destination::Name(name) => names.get(name).into_iter().flatten().copied().collect(),
            Destination::Prefix(_) | Destination::Local => Vec::new(),
        };
        found
            .into_iter()
            .map(|address| SocketAddr::new(address, endpoint.port.get()))
    });
    let servers: BTreeSet<SocketAddr> = addresses.filter(|server| root_may(rules, *server)).collect();
    let mut asked = JoinSet::new();
    for server in servers.into_iter().take(MOST) {
        asked.spawn(async move { (server, timeout(PATIENCE, urls(server)).await) });
    }
    let mut found = BTreeSet::new();
    while let Some(answer) = asked.join_next().await {
        // One that is down announces nothing.
        let Ok((server, Ok(Some(urls)))) = answer else { continue };
        found.extend(urls.iter().filter_map(|url| member(server, url)));
    }
    let is_endpoint = |address: &IpAddr, port| owners(rules, Protocol::Tcp, *address, port) != 0;
    // Of a name that no endpoint has, nothing is known.
    let is_known = |Member { host, port, .. }: &Member| match host.parse::<IpAddr>() {
        Ok(address) => is_endpoint(&address, *port),
        Err(_) => Name::parse(host)
            .ok()
            .and_then(|name| names.get(&name))
            .is_some_and(|all| !all.is_empty() && all.iter().all(|address| is_endpoint(address, *port))),
    };
    found.into_iter().filter(|member| !is_known(member)).collect()
}

/// Whether root may connect to a server, whatever its cgroup.
fn root_may(rules: &RuleSet, server: SocketAddr) -> bool {
    let root = Subject {
        task: Uid(0),
        socket: Some(Uid(0)),
        kernel_thread: false,
        cgroups: Vec::new(),
    };
    let owners = owners(rules, Protocol::Tcp, server.ip(), server.port());
    weigh(rules, owners, &root).owners.iter().all(|(_, admits)| *admits)
}

pub(super) fn findings(members: &[Member], findings: &mut Findings) {
    let items = members.iter().map(|Member { by, host, port }| {
        let server = match host.parse() {
            Ok(address) => SocketAddr::new(address, *port).to_string(),
            Err(_) => format!("{}:{port}", text::name(host)),
        };
        format!("{server}, announced by {by}")
    });
    findings.each(
        "bus-members",
        Weight::Medium,
        "a message bus announces servers of its cluster that are not endpoints: a user who is denied at one can \
         connect to the others",
        items,
        "add them to the endpoints, or a name or prefix that covers all servers; or set client_advertise and \
         no_advertise in the servers to what clients are to use",
    );
}

async fn urls(server: SocketAddr) -> Option<Vec<String>> {
    let stream = TcpStream::connect(server).await.ok()?;
    let mut line = String::new();
    BufReader::new(stream.take(LONGEST)).read_line(&mut line).await.ok()?;
    read(&line)
}

fn read(line: &str) -> Option<Vec<String>> {
    let info: Info = serde_json::from_str(line.strip_prefix("INFO ")?).ok()?;
    Some(info.connect_urls)
}

/// Of `10.0.0.12:4222`, `[2001:db8::12]:4222` or `host:4222`.
fn member(by: SocketAddr, url: &str) -> Option<Member> {
    let (host, port) = url.rsplit_once(':')?;
    let host = host.trim_matches(['[', ']']);
    let address = host.parse::<IpAddr>().map(|address| address.to_canonical());
    Some(Member {
        by,
        host: address.map_or_else(|_| host.to_owned(), |address| address.to_string()),
        port: port.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_names_the_members_of_the_cluster() {
        let line = "INFO {\"server_id\":\"N\",\"port\":4222,\"connect_urls\":[\"10.0.0.12:4222\",\"[2001:db8::12]:4223\",\"bus-1:4222\",\"?\"]} \r\n";
        let by = SocketAddr::from(([10, 0, 0, 11], 4222));
        let members: Vec<Member> = read(line)
            .into_iter()
            .flatten()
            .filter_map(|url| member(by, &url))
            .collect();
        let found = members.iter().map(|member| (member.host.as_str(), member.port));
        let expected = [("10.0.0.12", 4222), ("2001:db8::12", 4223), ("bus-1", 4222)];
        assert_eq!(found.collect::<Vec<_>>(), expected);
        for other in [
            "",
            "INFO",
            "INFO [",
            "HTTP/1.1 400 Bad Request",
            "-ERR 'Authorization Violation'",
        ] {
            assert_eq!(read(other), None, "{other}");
        }
        assert_eq!(read("INFO {}"), Some(Vec::new()));
    }
}
