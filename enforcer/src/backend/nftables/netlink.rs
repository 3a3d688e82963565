//! `Image` ⇄ kernel, over netlink with nftnl and mnl: one transaction out, dumps back. The fenced unsafe of this backend.
//!
//! A netlink request is answered before the call that sends it returns, so every answer is there to be read without waiting.

#![allow(
    unsafe_code,
    reason = "nftnl wraps chains, rules and batches; sets, objects and dumps only exist in libnftnl itself"
)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "libnftnl and libc number attributes and messages in wider types than their own functions take"
)]

mod dumps;
mod expressions;
mod messages;

use std::{
    collections::BTreeMap,
    ffi::CString,
    io::{self, IoSlice},
    os::fd::AsRawFd as _,
};

use nftnl::{FinalizedBatch, MsgType, ProtoFamily, Rule as NlRule, Table, nftnl_sys as sys, set::Set as NlSet};

use self::messages::{AnyKey, Counter, build, make_chains, make_rules, make_sets};
use super::image::{Chain, Image, chain::ABOUT};

pub(super) use self::{
    dumps::{Found, copied, owned},
    expressions::Raw,
    messages::{IfEmpty, Steps, chain_message},
};

/// `linux/netfilter/nf_tables.h`.
const NFT_OBJECT_COUNTER: u32 = 1;
const INET: u16 = libc::NFPROTO_INET as u16;

/// A socket to `nf_tables` in the network namespace that it was made in.
pub(crate) struct Netlink {
    socket: mnl::Socket,
    sequence: u32,
}

/// What a transaction failed at.
#[derive(Debug)]
pub(crate) struct Failed {
    /// The step, as words; empty if it was not one of them.
    pub step: String,
    /// Why.
    pub error: io::Error,
}

impl std::fmt::Debug for Netlink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Netlink")
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
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
    pub generation: u32,
}

impl Netlink {
    /// Opens a socket.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = mnl::Socket::new(mnl::Bus::Netfilter)?;
        // An error names the message by its number; the message itself need not come back.
        set_option(&socket, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes the table an image, whole or not at all, given what it holds. What the image does not name goes afterwards, when
    /// no packet can be under way that began with it; counters that stay go on counting.
    pub(crate) fn replace(&mut self, change: Change<'_>) -> Result<(), Failed> {
        match self.replace_in_steps(change) {
            // Somebody has bent the table so that it cannot be changed piece by piece.
            Err(failed) if failed.is_about_contents() => match change.found {
                Some(found) => self.make_anew(change.table, change.image, &found.counts),
                None => Err(failed),
            },
            done => done,
        }
    }

    fn replace_in_steps(&mut self, change: Change<'_>) -> Result<(), Failed> {
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

    /// Builds an image beside what is in force. A transaction of its own: the kernel fills sets with ranges only after it has switched
    /// rules (`nft_set_commit_update`), so that in one with the switch packets would find them empty for a moment.
    fn lay_out(&mut self, change: Change<'_>) -> Result<(), Failed> {
        let Change { table, image, found } = change;
        let none = BTreeMap::new();
        let counts = found.map_or(&none, |found| &found.counts);
        let name = text(table);
        let table = Table::new(&name, ProtoFamily::Inet);
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
    fn switch(&mut self, change: Change<'_>) -> Result<(), Failed> {
        let Change { table, image, found } = change;
        let name = text(table);
        let table = Table::new(&name, ProtoFamily::Inet);
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

    fn remove_parts(&mut self, table: &str, parts: &Parts) -> Result<(), Failed> {
        if parts.is_empty() {
            return Ok(());
        }
        let name = text(table);
        let table = Table::new(&name, ProtoFamily::Inet);
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

    /// Replaces the table in one transaction. A packet under way may find the old one's sets emptied: only for a bent table.
    fn make_anew(&mut self, table: &str, image: &Image, counts: &BTreeMap<String, u64>) -> Result<(), Failed> {
        let name = text(table);
        let table = Table::new(&name, ProtoFamily::Inet);
        let mut batch = Steps::new();
        batch.add("make the table", &table, MsgType::Add);
        batch.add("empty the table", &table, MsgType::Del);
        batch.add("make the table", &table, MsgType::Add);
        build(&mut batch, &table, image, counts);
        self.commit(batch)
    }

    /// Removes the table.
    pub(crate) fn remove(&mut self, table: &str) -> Result<(), Failed> {
        let name = text(table);
        let table = Table::new(&name, ProtoFamily::Inet);
        let mut batch = Steps::new();
        batch.add("make the table", &table, MsgType::Add);
        batch.add("remove the table", &table, MsgType::Del);
        self.commit(batch)
    }

    /// Finds out whether the kernel takes an image: it is built and taken back in one transaction, so that it never is in force.
    pub(crate) fn attempt(&mut self, table: &str, image: &Image) -> Result<(), Failed> {
        let name = text(table);
        let table = Table::new(&name, ProtoFamily::Inet);
        let mut batch = Steps::new();
        batch.add("make a table", &table, MsgType::Add);
        build(&mut batch, &table, image, &BTreeMap::new());
        batch.add("take it back", &table, MsgType::Del);
        self.commit(batch)
    }

    /// Sends a batch, which the kernel carries out whole or not at all.
    pub(super) fn commit(&mut self, steps: Steps) -> Result<(), Failed> {
        let failed = |error| Failed {
            step: String::new(),
            error,
        };
        let Steps { batch, names } = steps;
        let batch: FinalizedBatch = batch.finalize();
        let pages: Vec<IoSlice<'_>> = batch.iter().map(IoSlice::new).collect();
        let length: usize = pages.iter().map(|page| page.len()).sum();
        let room = |bytes: usize| i32::try_from(bytes).unwrap_or(i32::MAX / 2);
        set_option(
            &self.socket,
            libc::SOL_SOCKET,
            libc::SO_SNDBUFFORCE,
            room(length * 2 + 65_536),
        )
        .map_err(failed)?;
        let answers = (names.len() + 2) * 2048 + 65_536;
        set_option(&self.socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, room(answers)).map_err(failed)?;
        let sent = nix::sys::socket::sendmsg::<nix::sys::socket::NetlinkAddr>(
            self.socket.as_raw_fd(),
            &pages,
            &[],
            nix::sys::socket::MsgFlags::empty(),
            Some(&nix::sys::socket::NetlinkAddr::new(0, 0)),
        )
        .map_err(|error| failed(error.into()))?;
        if sent != length {
            return Err(failed(io::Error::other(format!("sent {sent} of {length} bytes"))));
        }
        self.acknowledged(&batch, &names)
    }

    /// Reads every acknowledgement: all must be there, none an error (F3).
    fn acknowledged(&mut self, batch: &FinalizedBatch, names: &BTreeMap<u32, String>) -> Result<(), Failed> {
        let mut missing: std::collections::BTreeSet<u32> = batch.sequence_numbers().collect();
        let mut first: Option<Failed> = None;
        self.receive(|header, body| {
            if header.nlmsg_type == libc::NLMSG_ERROR as u16 {
                missing.remove(&header.nlmsg_seq);
                let code = body
                    .first_chunk()
                    .map_or(-libc::EIO, |bytes| i32::from_ne_bytes(*bytes));
                if code != 0 {
                    let step = names.get(&header.nlmsg_seq).cloned().unwrap_or_default();
                    first.get_or_insert(Failed {
                        step,
                        error: io::Error::from_raw_os_error(-code),
                    });
                }
            }
            true
        })
        .map_err(|error| Failed {
            step: "read the acknowledgements".to_owned(),
            error,
        })?;
        match first {
            Some(failed) => Err(failed),
            None if missing.is_empty() => Ok(()),
            None => Err(Failed {
                step: String::new(),
                error: io::Error::other(format!("{} steps were not acknowledged", missing.len())),
            }),
        }
    }

    /// Hands on what has come, until nothing is left or `each` has enough.
    fn receive(&mut self, mut each: impl FnMut(&libc::nlmsghdr, &[u8]) -> bool) -> io::Result<()> {
        let mut buffer = vec![0_u64; 32 << 10];
        loop {
            // SAFETY: the buffer is as long as said, and u64 may hold any bytes.
            let read = unsafe {
                libc::recv(
                    self.socket.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len() * 8,
                    libc::MSG_DONTWAIT,
                )
            };
            let Ok(read) = usize::try_from(read) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return if error.kind() == io::ErrorKind::WouldBlock {
                    Ok(())
                } else {
                    Err(error)
                };
            };
            // SAFETY: the kernel has written so many bytes.
            let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), read) };
            let mut at = 0;
            while let Some(message) = bytes.get(at..).filter(|rest| rest.len() >= size_of::<libc::nlmsghdr>()) {
                // SAFETY: long enough, and messages begin at multiples of 4 bytes in a buffer aligned to 8.
                #[allow(clippy::cast_ptr_alignment, reason = "see SAFETY")]
                let header = unsafe { &*message.as_ptr().cast::<libc::nlmsghdr>() };
                let length = header.nlmsg_len as usize;
                let Some(body) = message.get(size_of::<libc::nlmsghdr>()..length) else {
                    return Err(io::Error::other("a netlink message is cut short"));
                };
                if !each(header, body) {
                    return Ok(());
                }
                at += (length + 3) & !3;
            }
        }
    }

    /// Sends one request and hands on its answers until they end.
    fn ask(
        &mut self,
        kind: i32,
        flags: i32,
        fill: impl FnOnce(*mut libc::nlmsghdr),
        each: impl FnMut(&libc::nlmsghdr),
    ) -> io::Result<()> {
        self.ask_of(INET, kind, flags, fill, each)
    }

    /// As [`Netlink::ask`], of another family, or of all by 0.
    pub(super) fn ask_of(
        &mut self,
        family: u16,
        kind: i32,
        flags: i32,
        fill: impl FnOnce(*mut libc::nlmsghdr),
        mut each: impl FnMut(&libc::nlmsghdr),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let mut buffer = vec![0_u64; nftnl::nft_nlmsg_maxsize() as usize / 8 + 1];
        // SAFETY: the buffer is as long as libnftnl's largest message.
        let header = unsafe {
            sys::nftnl_nlmsg_build_hdr(
                buffer.as_mut_ptr().cast(),
                u16::try_from(kind).unwrap_or_default(),
                family,
                u16::try_from(flags).unwrap_or_default(),
                sequence,
            )
        };
        fill(header);
        // SAFETY: libnftnl has just written it at the buffer's start.
        let length = unsafe { (*header).nlmsg_len } as usize;
        // SAFETY: within the buffer.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length) };
        self.socket.send(bytes)?;
        let (mut done, mut changed, mut result) = (false, false, Ok(()));
        while !done {
            let mut any = false;
            self.receive(|header, body| {
                any = true;
                if header.nlmsg_seq != sequence {
                    return true;
                }
                changed |= i32::from(header.nlmsg_flags) & libc::NLM_F_DUMP_INTR != 0;
                match i32::from(header.nlmsg_type) {
                    libc::NLMSG_ERROR => {
                        let code = body
                            .first_chunk()
                            .map_or(-libc::EIO, |bytes| i32::from_ne_bytes(*bytes));
                        if code != 0 {
                            result = Err(io::Error::from_raw_os_error(-code));
                        }
                        done = true;
                    }
                    libc::NLMSG_DONE => {
                        let code = body.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                        if code < 0 {
                            result = Err(io::Error::from_raw_os_error(-code));
                        }
                        done = true;
                    }
                    _ => {
                        each(header);
                        done |= flags & libc::NLM_F_DUMP != libc::NLM_F_DUMP;
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

/// Becomes readable when any `nf_tables` transaction of this network namespace is committed.
pub(crate) struct Changes(mnl::Socket);

impl Changes {
    /// Subscribes (`NFNLGRP_NFTABLES`).
    pub(crate) fn subscribe() -> io::Result<Self> {
        const NFNLGRP_NFTABLES: u32 = 7;
        let socket = mnl::Socket::open(mnl::Bus::Netfilter)?;
        socket.bind(1 << (NFNLGRP_NFTABLES - 1), 0)?;
        Ok(Self(socket))
    }

    /// Takes all that has come. An overflow is a change too: what matters is to look again.
    pub(crate) fn drain(&self) {
        let mut buffer = [0; 16_384];
        let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
        while let Ok(1..) | Err(nix::Error::ENOBUFS | nix::Error::EINTR) =
            nix::sys::socket::recv(self.0.as_raw_fd(), &mut buffer, flags)
        {}
    }
}

impl std::os::fd::AsRawFd for Changes {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// A table on its way to be an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change<'a> {
    /// Its name.
    pub table: &'a str,
    /// What it is to hold.
    pub image: &'a Image,
    /// What it holds; none where it is not there.
    pub found: Option<&'a Dump>,
}

impl Change<'_> {
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

impl Failed {
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

fn set_option(socket: &mnl::Socket, level: i32, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: an int, as these options take.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<i32>() as u32,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
