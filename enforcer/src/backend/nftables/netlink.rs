//! `Image` ⇄ kernel, over netlink: a table replaced in three transactions (lay out, switch, remove), by nftnl, and
//! dumped back.
//!
//! A netlink request is answered before the call that sends it returns, so every answer is there to be read without
//! waiting.

mod amendment;
mod attributes;
mod dumps;
mod expressions;
mod messages;
mod owned;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    io::{self, IoSlice},
    os::fd::AsRawFd as _,
};

use netlink_packet_core::{
    DefaultNla, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader,
    NetlinkMessage,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, nftables::NfTablesMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nftnl::{FinalizedBatch, MsgType, ProtoFamily, Rule as NlRule, set::Set as NlSet};
use nix::sys::socket::{MsgFlags, NetlinkAddr, recv, sendmsg, setsockopt, sockopt};

use self::{
    amendment::begin_at,
    messages::{AnyKey, Counter, build, make_chains, make_rules, make_sets},
};
use super::image::{Chain, Image, chain::ABOUT};

pub(super) use self::{
    attributes::{Attributes, nfta},
    dumps::DumpedRule,
    expressions::each_expression,
    messages::{Steps, chain_message, inet, rule_message},
};

/// `linux/netfilter/nf_tables.h`.
const NFT_OBJECT_COUNTER: u32 = 1;
/// `NFPROTO_INET`.
const INET: u8 = 1;

/// A socket to `nf_tables` in the network namespace that it was made in.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// What a transaction failed at.
#[derive(Debug)]
pub(crate) struct TransactionError {
    /// The step, as words; empty if it was not one of them.
    pub step: String,
    /// Why.
    pub error: io::Error,
}

/// A table as dumped.
#[derive(Debug, Default)]
pub(crate) struct Dump {
    /// What it holds.
    pub image: Image,
    /// Packets of each counter.
    pub counts: BTreeMap<String, u64>,
    /// Whether it is switched off (`NFT_TABLE_F_DORMANT`).
    pub dormant: bool,
    /// Generation of all of `nf_tables` at which it was read: any change of any table is another.
    pub genid: u32,
}

impl Netlink {
    /// Opens a socket.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        // An error names the message by its number; the message itself need not come back.
        socket.set_cap_ack(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes the table an image, whole or not at all, given what it holds. What the image does not name goes
    /// afterwards, when no packet can be under way that began with it; counters that stay go on counting.
    pub(crate) fn replace(&mut self, change: TableUpdate<'_>) -> Result<(), TransactionError> {
        match self.replace_in_steps(change) {
            // Somebody has bent the table so that it cannot be changed piece by piece.
            Err(failed) if failed.is_about_contents() => match change.found {
                Some(found) => self.make_anew(change.table, change.image, &found.counts),
                None => Err(failed),
            },
            done => done,
        }
    }

    fn replace_in_steps(&mut self, change: TableUpdate<'_>) -> Result<(), TransactionError> {
        let mut stale = change.parts(|wanted| wanted);
        stale.counters.clear();
        self.remove_parts(change.table, &stale)?;
        self.lay_out(change)?;
        self.switch(change)?;
        let old = change.parts(|wanted| !wanted);
        if !old.is_empty() {
            wait_for_packets();
        }
        self.remove_parts(change.table, &old)
    }

    /// Builds an image beside what is active. A transaction of its own: the kernel fills sets with ranges only after
    /// it has switched rules (`nft_set_commit_update`), so that in one with the switch packets would find them empty
    /// for a moment.
    fn lay_out(&mut self, change: TableUpdate<'_>) -> Result<(), TransactionError> {
        let TableUpdate { table, image, found } = change;
        let none = BTreeMap::new();
        let counts = found.map_or(&none, |found| &found.counts);
        let table = inet(table);
        let mut batch = Steps::new();
        batch.add("make the table", &table, MsgType::Add);
        make_chains(&mut batch, &table, image, |chain| chain.base.is_none());
        make_sets(&mut batch, &table, image, counts);
        make_rules(&mut batch, &table, image, |name, chain| {
            chain.base.is_none() && name != ABOUT
        });
        self.commit(batch)
    }

    /// Lets the base chains lead to what was laid out, in one transaction.
    fn switch(&mut self, change: TableUpdate<'_>) -> Result<(), TransactionError> {
        let TableUpdate { table, image, found } = change;
        let table = inet(table);
        let front = |name: &str, chain: &Chain| chain.base.is_some() || name == ABOUT;
        let there = |name: &str| found.is_some_and(|found| found.image.chains.contains_key(name));
        let mut batch = Steps::new();
        for (name, _) in image
            .chains
            .iter()
            .filter(|(name, chain)| front(name, chain) && there(name))
        {
            let chain = chain_message(&table, name, None);
            batch.add(&format!("empty chain {name}"), &NlRule::new(&chain), MsgType::Del);
        }
        make_chains(&mut batch, &table, image, |chain| chain.base.is_some());
        make_rules(&mut batch, &table, image, front);
        self.commit(batch)
    }

    fn remove_parts(&mut self, table: &str, parts: &Parts) -> Result<(), TransactionError> {
        if parts.is_empty() {
            return Ok(());
        }
        let table = inet(table);
        let chains: Vec<_> = parts
            .chains
            .iter()
            .map(|name| chain_message(&table, name, None))
            .collect();
        let mut batch = Steps::new();
        for (name, chain) in parts.chains.iter().zip(&chains) {
            batch.add(&format!("empty chain {name}"), &NlRule::new(chain), MsgType::Del);
        }
        for name in &parts.sets {
            let set = NlSet::<AnyKey>::new_named(&text(name), 0, &table, ProtoFamily::Inet);
            batch.add(&format!("remove set {name}"), &set, MsgType::Del);
        }
        for (name, chain) in parts.chains.iter().zip(&chains) {
            batch.add(&format!("remove chain {name}"), chain, MsgType::Del);
        }
        for name in &parts.counters {
            let counter = Counter {
                table: &table,
                name: text(name),
                packets: 0,
            };
            batch.add(&format!("remove counter {name}"), &counter, MsgType::Del);
        }
        self.commit(batch)
    }

    /// Replaces the table in one transaction. A packet under way may find the old one's sets emptied: only for a bent
    /// table.
    fn make_anew(
        &mut self,
        table: &str,
        image: &Image,
        counts: &BTreeMap<String, u64>,
    ) -> Result<(), TransactionError> {
        let table = inet(table);
        let mut batch = Steps::new();
        batch.add("make the table", &table, MsgType::Add);
        batch.add("empty the table", &table, MsgType::Del);
        batch.add("make the table", &table, MsgType::Add);
        build(&mut batch, &table, image, counts);
        self.commit(batch)
    }

    /// Removes the table.
    pub(crate) fn remove(&mut self, table: &str) -> Result<(), TransactionError> {
        let table = inet(table);
        let mut batch = Steps::new();
        batch.add("make the table", &table, MsgType::Add);
        batch.add("remove the table", &table, MsgType::Del);
        self.commit(batch)
    }

    /// Finds out whether the kernel takes an image: it is built and taken back in one transaction, so that it never is
    /// active.
    pub(crate) fn attempt(&mut self, table: &str, image: &Image) -> Result<(), TransactionError> {
        let table = inet(table);
        let mut batch = Steps::new();
        batch.add("make a table", &table, MsgType::Add);
        build(&mut batch, &table, image, &BTreeMap::new());
        batch.add("take it back", &table, MsgType::Del);
        self.commit(batch)
    }

    /// Sends a batch, which the kernel carries out whole or not at all.
    pub(super) fn commit(&mut self, steps: Steps) -> Result<(), TransactionError> {
        self.commit_at(steps, None)
    }

    /// As [`Netlink::commit`], only if no table has changed since a generation of all of `nf_tables`.
    fn commit_at(&mut self, steps: Steps, genid: Option<u32>) -> Result<(), TransactionError> {
        let failed = |error| TransactionError {
            step: String::new(),
            error,
        };
        let Steps { batch, names } = steps;
        let batch: FinalizedBatch = batch.finalize();
        let mut pages: Vec<&[u8]> = batch.iter().collect();
        let begin = genid.and_then(|genid| begin_at(pages.first()?, genid));
        if let (Some((begin, rest)), Some(first)) = (&begin, pages.first_mut()) {
            *first = rest;
            pages.insert(0, begin);
        }
        let pages: Vec<IoSlice<'_>> = pages.into_iter().map(IoSlice::new).collect();
        let length: usize = pages.iter().map(|page| page.len()).sum();
        let room = |bytes: usize| bytes.min(i32::MAX as usize / 2);
        // Beyond the host's limits (`net.core.wmem_max`) only for root of the host: root of a user namespace, such as a
        // container's, is left with what fits into these.
        let (sent, answers) = (room(length * 2 + 65_536), room((names.len() + 2) * 2048 + 65_536));
        setsockopt(&self.socket, sockopt::SndBufForce, &sent)
            .or_else(|_| setsockopt(&self.socket, sockopt::SndBuf, &sent))
            .and_then(|()| setsockopt(&self.socket, sockopt::RcvBufForce, &answers))
            .or_else(|_| setsockopt(&self.socket, sockopt::RcvBuf, &answers))
            .map_err(|error| failed(error.into()))?;
        let to = Some(&NetlinkAddr::new(0, 0));
        let sent = sendmsg(self.socket.as_raw_fd(), &pages, &[], MsgFlags::empty(), to);
        let sent = sent.map_err(|error| failed(error.into()))?;
        if sent != length {
            return Err(failed(io::Error::other(format!("sent {sent} of {length} bytes"))));
        }
        self.acknowledged(&batch, &names)
    }

    /// Reads every acknowledgement: all must be there, none an error (F3).
    fn acknowledged(&mut self, batch: &FinalizedBatch, names: &BTreeMap<u32, String>) -> Result<(), TransactionError> {
        let mut missing: BTreeSet<u32> = batch.sequence_numbers().collect();
        let mut first: Option<TransactionError> = None;
        self.receive(|message| {
            if message.message_type() == NLMSG_ERROR {
                let number = message.sequence_number();
                missing.remove(&number);
                if let Err(error) = outcome(&message) {
                    let step = names.get(&number).cloned().unwrap_or_default();
                    first.get_or_insert(TransactionError { step, error });
                }
            }
            true
        })
        .map_err(|error| TransactionError {
            step: "read the acknowledgements".to_owned(),
            error,
        })?;
        match first {
            Some(failed) => Err(failed),
            None if missing.is_empty() => Ok(()),
            None => Err(TransactionError {
                step: String::new(),
                error: io::Error::other(format!("{} steps were not acknowledged", missing.len())),
            }),
        }
    }

    /// Hands on what has come, until nothing is left or `each` has enough.
    fn receive(&mut self, mut each: impl FnMut(NetlinkBuffer<&[u8]>) -> bool) -> io::Result<()> {
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(read) => read,
                Err(nix::Error::EINTR) => continue,
                Err(nix::Error::EAGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let mut rest = buffer.get(..read).unwrap_or_default();
            while !rest.is_empty() {
                let message = NetlinkBuffer::new_checked(rest);
                let message = message.map_err(|_| io::Error::other("a netlink message is cut short"))?;
                let length = message.length() as usize;
                if !each(message) {
                    return Ok(());
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    /// Sends one request, of a family or of all by 0, within what is named, and hands on its answers and their families
    /// until they end.
    pub(super) fn ask(
        &mut self,
        family: u8,
        kind: i32,
        flags: u16,
        within: &[(u16, &str)],
        each: impl FnMut(u8, Attributes<'_>),
    ) -> io::Result<()> {
        let name = |(number, name): &(u16, &str)| DefaultNla::new(*number, text(name).into_bytes_with_nul());
        let attributes = within.iter().map(name).collect();
        self.ask_of(family, kind, flags, attributes, each)
    }

    /// As [`Netlink::ask`], within attributes of any kind.
    pub(super) fn ask_of(
        &mut self,
        family: u8,
        kind: i32,
        flags: u16,
        attributes: Vec<DefaultNla>,
        mut each: impl FnMut(u8, Attributes<'_>),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let request = NfTablesMessage::Other {
            message_type: u8::try_from(kind).unwrap_or_default(),
            attributes,
        };
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = sequence;
        let request = NetfilterMessage::new(NetfilterHeader::new(family.into(), 0, 0), request);
        let mut request = NetlinkMessage::new(header, request.into());
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let (mut done, mut changed, mut result) = (false, false, Ok(()));
        while !done {
            let mut any = false;
            self.receive(|message| {
                any = true;
                if message.sequence_number() != sequence {
                    return true;
                }
                changed |= message.flags() & NLM_F_DUMP_INTR != 0;
                match message.message_type() {
                    NLMSG_ERROR | NLMSG_DONE => {
                        result = outcome(&message);
                        done = true;
                    }
                    _ => {
                        if let [family, _, _, _, attributes @ ..] = message.payload() {
                            each(*family, Attributes(attributes));
                        }
                        done = flags & NLM_F_DUMP == 0;
                    }
                }
                !done
            })?;
            if !any && !done {
                return Err(io::Error::other("nf_tables did not answer"));
            }
        }
        if changed && result.is_ok() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        result
    }
}

/// What an acknowledgement, or the end of a dump, says.
fn outcome(message: &NetlinkBuffer<&[u8]>) -> io::Result<()> {
    let code = message.payload().first_chunk();
    match code.map_or(-libc::EIO, |bytes| i32::from_ne_bytes(*bytes)) {
        code if code < 0 => Err(io::Error::from_raw_os_error(-code)),
        _ => Ok(()),
    }
}

/// Becomes readable when any `nf_tables` transaction of this network namespace is committed.
pub(crate) struct NftChanges(Socket);

impl NftChanges {
    /// Subscribes (`NFNLGRP_NFTABLES`).
    pub(crate) fn subscribe() -> io::Result<Self> {
        const NFNLGRP_NFTABLES: u32 = 7;
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind(&SocketAddr::new(0, 1 << (NFNLGRP_NFTABLES - 1)))?;
        Ok(Self(socket))
    }

    /// Takes all that has come. An overflow is a change too: what matters is to look again.
    pub(crate) fn drain(&self) {
        let mut buffer = [0; 16_384];
        let mut take = || recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT);
        while let Ok(1..) | Err(nix::Error::ENOBUFS | nix::Error::EINTR) = take() {}
    }
}

impl std::os::fd::AsRawFd for NftChanges {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// A table on its way to be an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TableUpdate<'a> {
    /// Its name.
    pub table: &'a str,
    /// What it is to hold.
    pub image: &'a Image,
    /// What it holds; none where it is not there.
    pub found: Option<&'a Dump>,
}

impl TableUpdate<'_> {
    /// Parts that it holds, but for what leads packets to them, by whether the image names them.
    fn parts(&self, goes: fn(bool) -> bool) -> Parts {
        let empty = Dump::default();
        let (image, before) = (self.image, self.found.unwrap_or(&empty));
        let stays = |name: &str| image.chains.get(name).is_some_and(|chain| chain.base.is_some()) || name == ABOUT;
        Parts {
            chains: keys(&before.image.chains, |name| {
                !stays(name) && goes(image.chains.contains_key(name))
            }),
            sets: keys(&before.image.sets, |name| goes(image.sets.contains_key(name))),
            counters: before.image.counters.difference(&image.counters).cloned().collect(),
        }
    }
}

/// Names of parts of a table that are to go.
struct Parts {
    chains: Vec<String>,
    sets: Vec<String>,
    counters: Vec<String>,
}

impl Parts {
    fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.sets.is_empty() && self.counters.is_empty()
    }
}

impl TransactionError {
    /// Whether the table's contents stand in the way, and not the kernel or our rights.
    fn is_about_contents(&self) -> bool {
        let codes = [libc::EBUSY, libc::EEXIST, libc::ENOENT, libc::EOPNOTSUPP, libc::EINVAL];
        self.error.raw_os_error().is_some_and(|code| codes.contains(&code))
    }
}

fn keys<T>(all: &BTreeMap<String, T>, keep: impl Fn(&str) -> bool) -> Vec<String> {
    all.keys().filter(|name| keep(name)).cloned().collect()
}

/// Waits until every packet that a rule is judging now has been judged (an RCU grace period, man 2 membarrier).
#[allow(unsafe_code, reason = "libc has no function for membarrier")]
fn wait_for_packets() {
    const MEMBARRIER_CMD_GLOBAL: i32 = 1;
    // SAFETY: takes no pointers.
    let done = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if done != 0 {
        // Not to be had where CPUs run without ticks: no packet takes so long.
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Names are checked long before: none holds a zero.
pub(super) fn text(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

fn length_of(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

/// As much as registers hold (`NFT_DATA_VALUE_MAXLEN`), for which alone libnftnl has room. No value of ours or the
/// kernel's is longer; one that were would be found to differ when it is read back (F3).
fn within_registers(bytes: &[u8]) -> &[u8] {
    bytes.get(..64).unwrap_or(bytes)
}
