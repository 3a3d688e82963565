//! Lookups against DNS servers of our own on loopback addresses.

#![allow(clippy::expect_used, reason = "a test's set-up fails loudly")]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "of the record types only two are asked for"
)]

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    sync::{Arc, Mutex},
    thread,
};

use hickory_resolver::{
    config::NameServerConfig,
    proto::{
        op::{Message, OpCode},
        rr::{RData, Record, rdata::CNAME},
    },
};

use super::*;

const PATIENCE: Duration = Duration::from_millis(1500);
const A: RecordType = RecordType::A;

enum Reply {
    Addresses(&'static [&'static str]),
    Alias(&'static str),
    Code(ResponseCode),
    Truncated(&'static [&'static str]),
    Silence,
}

const EMPTY: Reply = Reply::Addresses(&[]);
const NXDOMAIN: Reply = Reply::Code(ResponseCode::NXDomain);

/// A server for the rest of the test, over UDP and TCP; its threads end with the process.
struct Server {
    address: SocketAddr,
    /// Where questions over UDP came from.
    asked: Arc<Mutex<Vec<SocketAddr>>>,
}

impl Server {
    fn start(ip: &str, reply: impl Fn(&str, RecordType) -> Reply + Send + Sync + 'static) -> Self {
        let ip: IpAddr = ip.parse().expect("an address");
        // A query under way may hold the same UDP port.
        let both = || {
            let tcp = TcpListener::bind((ip, 0)).ok()?;
            let address = tcp.local_addr().ok()?;
            Some((address, tcp, UdpSocket::bind(address).ok()?))
        };
        let (address, tcp, udp) = (0..16).find_map(|_| both()).expect("a port free for UDP and TCP");
        let (reply, asked) = (Arc::new(reply), Arc::<Mutex<Vec<_>>>::default());
        let (over_tcp, count) = (Arc::clone(&reply), Arc::clone(&asked));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok((read, from)) = udp.recv_from(&mut buffer) {
                count.lock().expect("the list").push(from);
                if let Some(bytes) = answer(buffer.get(..read).unwrap_or_default(), &*reply, true) {
                    let _ = udp.send_to(&bytes, from);
                }
            }
        });
        thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                let mut length = [0; 2];
                while stream.read_exact(&mut length).is_ok() {
                    let mut request = vec![0; u16::from_be_bytes(length).into()];
                    let _ = stream.read_exact(&mut request);
                    if let Some(bytes) = answer(&request, &*over_tcp, false) {
                        let length = u16::try_from(bytes.len()).expect("a short answer");
                        let _ = stream.write_all(&[&length.to_be_bytes()[..], &bytes].concat());
                    }
                }
            }
        });
        Self { address, asked }
    }

    /// One that knows `bus.test` by IPv4 only and denies every other name.
    fn of_bus(ip: &str) -> Self {
        Self::start(ip, |name, kind| match (name, kind) {
            ("bus.test.", A) => Reply::Addresses(&["10.0.0.1"]),
            ("bus.test.", _) => EMPTY,
            _ => NXDOMAIN,
        })
    }

    fn asked(&self) -> Vec<SocketAddr> {
        self.asked.lock().expect("the list").clone()
    }

    fn config(&self) -> NameServerConfig {
        let mut config = NameServerConfig::udp_and_tcp(self.address.ip());
        for connection in &mut config.connections {
            connection.port = self.address.port();
        }
        config
    }
}

fn answer(request: &[u8], reply: &dyn Fn(&str, RecordType) -> Reply, udp: bool) -> Option<Vec<u8>> {
    let request = Message::from_vec(request).ok()?;
    let query = request.queries.first()?.clone();
    let mut response = Message::response(request.metadata.id, OpCode::Query);
    response.metadata.recursion_available = true;
    response.add_query(query.clone());
    let mut add = |list: &[&str]| {
        for text in list {
            let address: IpAddr = text.parse().expect("an address");
            response.add_answer(Record::from_rdata(query.name().clone(), 30, RData::from(address)));
        }
    };
    match reply(&query.name().to_ascii(), query.query_type()) {
        Reply::Truncated(_) if udp => response.metadata.truncation = true,
        Reply::Addresses(list) | Reply::Truncated(list) => add(list),
        Reply::Alias(to) => {
            let to = DnsName::from_ascii(to).expect("a name");
            response.add_answer(Record::from_rdata(query.name().clone(), 7, RData::CNAME(CNAME(to))));
        }
        Reply::Code(code) => response.metadata.response_code = code,
        Reply::Silence => return None,
    }
    response.to_vec().ok()
}

/// Asks as a host with this `resolv.conf`, whose name servers are ours.
async fn ask(servers: &[&Server], more: &str, name: &str) -> (Outcome, Outcome) {
    let conf = ResolvConf::parse(&format!("nameserver 192.0.2.1\n{more}\n"), "");
    let servers = servers.iter().map(|server| (server.config(), None)).collect();
    let stub = Stub::new(conf, servers, PATIENCE).expect("a resolver");
    let name = DnsName::from_ascii(name).expect("a name");
    match Arc::new(stub).ask(&name, PATIENCE).await.whole().await {
        LookupAnswer::Dns { a, aaaa } => (a, aaaa),
        LookupAnswer::Hosts(addresses) => panic!("nobody read a hosts file: {addresses:?}"),
    }
}

fn found(list: &[&str], ttl: u64) -> Outcome {
    Outcome::Found {
        addresses: list.iter().map(|text| text.parse().expect("an address")).collect(),
        ttl: Duration::from_secs(ttl),
    }
}

fn failed_with(outcome: &Outcome, cause: &str) -> bool {
    matches!(outcome, Outcome::Failed(text) if text.contains(cause))
}

#[tokio::test]
async fn each_family_on_its_own() {
    let server = Server::start("127.0.0.1", |_, kind| match kind {
        A => Reply::Addresses(&["10.0.0.1", "10.0.0.2"]),
        _ => Reply::Code(ResponseCode::ServFail),
    });
    let (a, aaaa) = ask(&[&server], "", "bus.test").await;
    assert_eq!(a, found(&["10.0.0.1", "10.0.0.2"], 30));
    assert!(failed_with(&aaaa, "127.0.0.1"), "{aaaa:?}");
}

#[tokio::test]
async fn an_alias_is_followed_and_its_ttl_counts() {
    let server = Server::start("127.0.0.1", |name, kind| match (name, kind) {
        ("bus.test.", _) => Reply::Alias("real.test."),
        ("real.test.", A) => Reply::Addresses(&["10.0.0.1"]),
        ("real.test.", _) => Reply::Addresses(&["2001:db8::1"]),
        _ => NXDOMAIN,
    });
    let (a, aaaa) = ask(&[&server], "", "bus.test").await;
    assert_eq!((a, aaaa), (found(&["10.0.0.1"], 7), found(&["2001:db8::1"], 7)));
}

#[tokio::test]
async fn what_is_not_there_is_told_apart() {
    for (reply, expected) in [
        (ResponseCode::NoError, Outcome::Empty),
        (ResponseCode::NXDomain, Outcome::Missing),
    ] {
        let server = Server::start("127.0.0.1", move |_, _| Reply::Code(reply));
        let answer = ask(&[&server], "", "bus.test").await;
        assert_eq!(answer, (expected.clone(), expected), "{reply}");
    }
    for code in [ResponseCode::ServFail, ResponseCode::Refused, ResponseCode::NotImp] {
        let server = Server::start("127.0.0.1", move |_, _| Reply::Code(code));
        let (a, aaaa) = ask(&[&server], "", "bus.test").await;
        assert!(failed_with(&a, "") && failed_with(&aaaa, ""), "{code}: {a:?} {aaaa:?}");
    }
}

#[tokio::test]
async fn a_truncated_answer_is_fetched_over_tcp() {
    let server = Server::start("127.0.0.1", |_, kind| match kind {
        A => Reply::Truncated(&["10.0.0.1"]),
        _ => EMPTY,
    });
    assert_eq!(ask(&[&server], "", "bus.test").await.0, found(&["10.0.0.1"], 30));
}

#[tokio::test]
async fn silence_ends_in_time() {
    let server = Server::start("127.0.0.1", |_, _| Reply::Silence);
    let begun = Instant::now();
    let (a, aaaa) = ask(&[&server], "search a.example b.example", "bus.test").await;
    assert!(
        failed_with(&a, "in time") && failed_with(&aaaa, "in time"),
        "{a:?} {aaaa:?}"
    );
    assert!(begun.elapsed() < PATIENCE * 2);
}

/// Neither family's search goes on once the other has found the name, as getaddrinfo(3) has it.
#[tokio::test]
async fn a_name_with_ipv4_only_does_not_end_in_the_search_list() {
    let server = Server::of_bus("127.0.0.1");
    let answer = ask(&[&server], "search corp.example", "bus.test").await;
    assert_eq!(answer, (found(&["10.0.0.1"], 30), Outcome::Empty));
}

#[tokio::test]
async fn the_search_list_follows_ndots() {
    let server = Server::start("127.0.0.1", |name, kind| match (name, kind) {
        ("bus.", A) => Reply::Addresses(&["10.0.0.1"]),
        ("bus.b.example.", A) => Reply::Addresses(&["10.0.0.2"]),
        ("bus.test.", A) => Reply::Addresses(&["10.0.0.3"]),
        ("bus.test.a.example.", A) => Reply::Addresses(&["10.0.0.4"]),
        _ => NXDOMAIN,
    });
    for (more, name, expected) in [
        ("", "bus", "10.0.0.1"),
        ("search a.example b.example", "bus", "10.0.0.2"),
        ("search c.example", "bus", "10.0.0.1"),
        ("search a.example", "bus.test", "10.0.0.3"),
        ("search a.example\noptions ndots:2", "bus.test", "10.0.0.4"),
    ] {
        let answer = ask(&[&server], more, name).await;
        assert_eq!(answer.0, found(&[expected], 30), "{name} with {more:?}");
    }
}

#[tokio::test]
async fn servers_are_asked_in_order() {
    let private = Server::start("127.0.0.1", |_, kind| {
        thread::sleep(Duration::from_millis(100));
        if kind == A {
            Reply::Addresses(&["10.0.0.1"])
        } else {
            EMPTY
        }
    });
    let public = Server::start("127.0.0.2", |_, _| NXDOMAIN);
    let answer = ask(&[&private, &public], "", "bus.test").await;
    assert_eq!(
        answer,
        (found(&["10.0.0.1"], 30), Outcome::Empty),
        "the quicker one won"
    );
    assert_eq!(public.asked(), []);
}

#[tokio::test]
async fn resolv_conf_may_give_up_sooner() {
    let server = Server::start("127.0.0.1", |_, _| Reply::Silence);
    let begun = Instant::now();
    let (a, _) = ask(&[&server], "options timeout:1 attempts:1", "bus.test").await;
    assert!(failed_with(&a, "in time") && begun.elapsed() < PATIENCE, "{a:?}");
}

#[tokio::test]
async fn a_server_that_fails_is_passed_over() {
    let good = Server::of_bus("127.0.0.3");
    for bad in [
        || Reply::Code(ResponseCode::Refused),
        || Reply::Code(ResponseCode::ServFail),
        || Reply::Silence,
    ] {
        let first = Server::start("127.0.0.1", move |_, _| bad());
        let second = Server::start("127.0.0.2", move |_, _| bad());
        let answer = ask(&[&first, &second, &good], "", "bus.test").await;
        assert_eq!(answer, (found(&["10.0.0.1"], 30), Outcome::Empty));
    }
}

#[tokio::test]
async fn a_closed_port_is_passed_over() {
    let closed = Server {
        address: UdpSocket::bind("127.0.0.9:0")
            .and_then(|socket| socket.local_addr())
            .expect("a free port"),
        asked: Arc::default(),
    };
    let answer = ask(&[&closed, &Server::of_bus("127.0.0.3")], "", "bus.test").await;
    assert_eq!(answer.0, found(&["10.0.0.1"], 30));
}

/// Any other port may be one that a job is about to listen on.
#[tokio::test]
async fn questions_leave_from_ports_that_the_kernel_gives_out() {
    let server = Server::of_bus("127.0.0.1");
    for _ in 0..16 {
        ask(&[&server], "", "bus.test").await;
    }
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").expect("the kernel's range");
    let mut range = range.split_whitespace().filter_map(|port| port.parse::<u16>().ok());
    let range = range.next().expect("the first port")..=range.next().expect("the last port");
    let asked = server.asked();
    assert!(asked.len() >= 32, "{asked:?}");
    assert!(
        asked.iter().all(|from| range.contains(&from.port())),
        "{asked:?} are not all within {range:?}"
    );
}

#[tokio::test]
async fn an_underscore_is_no_obstacle() {
    let server = Server::start("127.0.0.1", |_, _| Reply::Addresses(&["10.0.0.1"]));
    assert_eq!(
        ask(&[&server], "", "nats_server.test").await.0,
        found(&["10.0.0.1"], 30)
    );
}

#[tokio::test]
async fn no_server_is_a_failure() {
    let (a, _) = ask(&[], "", "bus.test").await;
    assert!(failed_with(&a, "no name server"), "{a:?}");
}

#[test]
fn the_hosts_file_is_read_as_the_c_library_reads_it() {
    let text =
        b"# caf\xe9\n127.0.0.1 localhost\n10.0.0.1\tBus.Test bus # old\n10.0.0.2 bus.test\n::1 bus.test\nx bus.test\n";
    let look = |name: &str| in_hosts_file(text, &DnsName::from_ascii(name).expect("a name"));
    let expected = ["10.0.0.1", "10.0.0.2", "127.0.0.1", "::1"].map(|text| text.parse().expect("an address"));
    assert_eq!(look("bus.test"), Some(expected.into()));
    assert_eq!(look("other.test"), None);
}
