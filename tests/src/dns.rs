//! A small DNS server whose answers can be changed, and withheld, while it runs.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Result, anyhow};
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
}

/// The server; it ends when dropped.
#[derive(Debug)]
pub struct DnsServer {
    zones: Arc<Mutex<BTreeMap<String, Zone>>>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl DnsServer {
    /// Serves on port 53 of an address, in a namespace given by its file or in ours.
    pub fn start(netns: Option<&Path>, address: IpAddr) -> Result<Self> {
        let netns = netns.map(Path::to_path_buf);
        let bound = thread::spawn(move || -> Result<UdpSocket> {
            if let Some(netns) = netns {
                setns(fs::File::open(netns)?, CloneFlags::CLONE_NEWNET)?;
            }
            Ok(UdpSocket::bind(SocketAddr::new(address, 53))?)
        });
        let socket = bound
            .join()
            .map_err(|_| anyhow!("the DNS server's thread panicked"))??;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let (zones, stop) = (Arc::new(Mutex::new(BTreeMap::new())), Arc::new(AtomicBool::new(false)));
        let (served, stopped) = (Arc::clone(&zones), Arc::clone(&stop));
        let thread = thread::spawn(move || serve(&socket, &served, &stopped));
        Ok(Self {
            zones,
            stop,
            thread: Some(thread),
        })
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
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, zones: &Mutex<BTreeMap<String, Zone>>, stop: &AtomicBool) {
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        let Ok((read, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let Ok(request) = Message::from_vec(buffer.get(..read).unwrap_or_default()) else {
            continue;
        };
        let zones = zones.lock().map(|zones| zones.clone()).unwrap_or_default();
        if let Some(bytes) = answer(&request, &zones).and_then(|response| response.to_vec().ok()) {
            let _ = socket.send_to(&bytes, from);
        }
    }
}

fn answer(request: &Message, zones: &BTreeMap<String, Zone>) -> Option<Message> {
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
            Some(Zone::Code(code)) => {
                response.metadata.response_code = *code;
                break;
            }
            Some(Zone::Alias(to)) => {
                let to = Name::from_utf8(format!("{to}.")).ok()?;
                response.add_answer(Record::from_rdata(name, TTL, RData::CNAME(CNAME(to.clone()))));
                name = to;
            }
            Some(Zone::Addresses(addresses)) => {
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
