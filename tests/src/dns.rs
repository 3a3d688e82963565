//! A small DNS server whose answers can be changed, and withheld, while it runs.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use hickory_proto::{
    op::{Message, MessageType, OpCode, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME},
    },
};
use nix::sched::{CloneFlags, setns};

/// What a name answers.
#[derive(Clone, Debug)]
pub enum Zone {
    /// Addresses of both families; a family without any is answered empty.
    Addresses(Vec<IpAddr>),
    /// Another name.
    Alias(String),
    /// A response code.
    Code(ResponseCode),
    /// Nothing at all.
    Silence,
    /// Addresses of IPv4, and where IPv6 is asked for this code, or nothing at all.
    Ipv4Alone(Vec<IpAddr>, Option<ResponseCode>),
    /// Addresses over TCP, and nothing at all over UDP.
    TcpAlone(Vec<IpAddr>),
}

/// The server; it ends when dropped.
#[derive(Debug)]
pub struct DnsServer {
    zones: Arc<Mutex<BTreeMap<String, Zone>>>,
    stop: Arc<AtomicBool>,
    over_tcp: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl DnsServer {
    /// Serves on port 53 of an address, UDP and TCP, in a namespace given by its file or in ours.
    pub fn start(netns: Option<&Path>, address: IpAddr) -> Result<Self> {
        let netns = netns.map(Path::to_path_buf);
        let bound = thread::spawn(move || -> Result<(UdpSocket, TcpListener)> {
            if let Some(netns) = netns {
                setns(fs::File::open(netns)?, CloneFlags::CLONE_NEWNET)?;
            }
            let place = SocketAddr::new(address, 53);
            let udp = UdpSocket::bind(place).with_context(|| format!("serve DNS at {place} over UDP"))?;
            let tcp = TcpListener::bind(place).with_context(|| format!("serve DNS at {place} over TCP"))?;
            Ok((udp, tcp))
        });
        let (socket, listener) = bound
            .join()
            .map_err(|_| anyhow!("the DNS server's thread panicked"))??;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        listener.set_nonblocking(true)?;
        let mut server = Self {
            zones: Arc::default(),
            stop: Arc::default(),
            over_tcp: Arc::default(),
            asked: Arc::default(),
            threads: Vec::new(),
        };
        let (zones, stop) = (Arc::clone(&server.zones), Arc::clone(&server.stop));
        let asked = Arc::clone(&server.asked);
        let by_udp = thread::spawn(move || serve(&socket, &zones, &stop, &asked));
        let (zones, stop) = (Arc::clone(&server.zones), Arc::clone(&server.stop));
        let asked = Arc::clone(&server.over_tcp);
        let by_tcp = thread::spawn(move || serve_tcp(&listener, &zones, &stop, &asked));
        server.threads.extend([by_udp, by_tcp]);
        Ok(server)
    }

    /// Whether it was ever asked over TCP.
    #[must_use]
    pub fn over_tcp(&self) -> bool {
        self.over_tcp.load(Ordering::Relaxed)
    }

    /// How often it was asked over UDP.
    #[must_use]
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Changes what a name answers.
    pub fn set(&self, name: &str, zone: Zone) {
        if let Ok(mut zones) = self.zones.lock() {
            zones.insert(name.to_owned(), zone);
        }
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, zones: &Mutex<BTreeMap<String, Zone>>, stop: &AtomicBool, asked: &AtomicU64) {
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        let Ok((read, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        asked.fetch_add(1, Ordering::Relaxed);
        let request = buffer.get(..read).unwrap_or_default();
        let Some((bytes, payload)) = respond(request, zones, false) else {
            continue;
        };
        let bytes = if bytes.len() > payload {
            truncate(&bytes)
        } else {
            Some(bytes)
        };
        if let Some(bytes) = bytes {
            let _ = socket.send_to(&bytes, from);
        }
    }
}

/// One request a connection, each message behind its length (RFC 1035, 4.2.2).
fn serve_tcp(listener: &TcpListener, zones: &Mutex<BTreeMap<String, Zone>>, stop: &AtomicBool, asked: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                asked.store(true, Ordering::Relaxed);
                let _ = converse(stream, zones);
            }
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn converse(mut stream: TcpStream, zones: &Mutex<BTreeMap<String, Zone>>) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut request = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut request)?;
    let Some((bytes, _)) = respond(&request, zones, true) else {
        return Ok(());
    };
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&[length.to_be_bytes().as_slice(), &bytes].concat())
}

/// The response, and how large a datagram the asker takes (RFC 6891).
fn respond(request: &[u8], zones: &Mutex<BTreeMap<String, Zone>>, over_tcp: bool) -> Option<(Vec<u8>, usize)> {
    let request = Message::from_vec(request).ok()?;
    let zones = zones.lock().map(|zones| zones.clone()).unwrap_or_default();
    let payload = request.edns.as_ref().map_or(512, |edns| edns.max_payload().into());
    Some((answer(&request, &zones, over_tcp)?.to_vec().ok()?, payload))
}

fn truncate(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut response = Message::from_vec(bytes).ok()?;
    response.answers.clear();
    response.metadata.truncation = true;
    response.to_vec().ok()
}

fn answer(request: &Message, zones: &BTreeMap<String, Zone>, over_tcp: bool) -> Option<Message> {
    const TTL: u32 = 1;
    let query = request.queries.first()?.clone();
    let mut response = Message::new(request.metadata.id, MessageType::Response, OpCode::Query);
    response.metadata.recursion_desired = request.metadata.recursion_desired;
    response.metadata.recursion_available = true;
    response.metadata.authoritative = true;
    let kind = query.query_type();
    let mut name = query.name().clone();
    response.add_query(query);
    for _ in 0..8 {
        let key = name.to_utf8().trim_end_matches('.').to_owned();
        match zones.get(&key) {
            None => {
                response.metadata.response_code = ResponseCode::NXDomain;
                break;
            }
            Some(Zone::Silence) => return None,
            Some(Zone::TcpAlone(_)) if !over_tcp => return None,
            Some(Zone::Ipv4Alone(_, code)) if kind == RecordType::AAAA => {
                response.metadata.response_code = (*code)?;
                break;
            }
            Some(Zone::Code(code)) => {
                response.metadata.response_code = *code;
                break;
            }
            Some(Zone::Alias(to)) => {
                let to = Name::from_utf8(format!("{to}.")).ok()?;
                response.add_answer(Record::from_rdata(name, TTL, RData::CNAME(CNAME(to.clone()))));
                name = to;
            }
            Some(Zone::Addresses(addresses) | Zone::TcpAlone(addresses) | Zone::Ipv4Alone(addresses, _)) => {
                for address in addresses {
                    match (address, kind) {
                        (IpAddr::V4(v4), RecordType::A) => {
                            response.add_answer(Record::from_rdata(name.clone(), TTL, RData::A(A(*v4))));
                        }
                        (IpAddr::V6(v6), RecordType::AAAA) => {
                            response.add_answer(Record::from_rdata(name.clone(), TTL, RData::AAAA(AAAA(*v6))));
                        }
                        _ => {}
                    }
                }
                break;
            }
        }
    }
    Some(response)
}
