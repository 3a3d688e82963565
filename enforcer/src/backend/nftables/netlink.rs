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

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString, c_void},
    io::{self, IoSlice},
    os::fd::AsRawFd as _,
    ptr::NonNull,
};

use nftnl::{
    Batch, FinalizedBatch, MsgType, NlMsg, ProtoFamily, Rule as NlRule, Table,
    expr::Expression as NlExpression,
    nftnl_sys as sys,
    set::{Set as NlSet, SetKey},
};

use super::{
    expression::{Expression, IPV4, IPV6, Verdict},
    image::{Base, Chain, Element, Image, Rule, Set, SetKind, Value, chain::ABOUT},
};

/// `linux/netfilter/nf_tables.h`.
const NFT_OBJECT_COUNTER: u32 = 1;
const INET: u16 = libc::NFPROTO_INET as u16;

/// A socket to `nf_tables` in the network namespace that it was made in.
pub struct Netlink {
    socket: mnl::Socket,
    sequence: u32,
}

/// What a transaction failed at.
#[derive(Debug)]
pub struct Failed {
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
pub struct Dump {
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
    pub fn open() -> io::Result<Self> {
        let socket = mnl::Socket::new(mnl::Bus::Netfilter)?;
        // An error names the message by its number; the message itself need not come back.
        set_option(&socket, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes the table an image, whole or not at all, given what it holds. What the image does not name goes afterwards, when
    /// no packet can be under way that began with it; counters that stay go on counting.
    ///
    /// `guest` names a chain of others' in a table that is not ours alone: it is made if it is missing, and the table is never emptied.
    pub fn replace(
        &mut self,
        table: &str,
        image: &Image,
        found: Option<&Dump>,
        guest: Option<&str>,
    ) -> Result<(), Failed> {
        let empty = Dump::default();
        let before = found.unwrap_or(&empty);
        let stays = |name: &str| image.chains.get(name).is_some_and(|chain| chain.base.is_some()) || name == ABOUT;
        let parts = |wanted: fn(bool) -> bool| Parts {
            chains: keys(&before.image.chains, |name| {
                !stays(name) && wanted(image.chains.contains_key(name))
            }),
            sets: keys(&before.image.sets, |name| wanted(image.sets.contains_key(name))),
            counters: before.image.counters.difference(&image.counters).cloned().collect(),
        };
        let mut stale = parts(|wanted| wanted);
        stale.counters.clear();
        let done = self
            .remove_parts(table, &stale)
            .and_then(|()| self.lay_out(table, image, before, guest))
            .and_then(|()| self.switch(table, image, before));
        let done = done.and_then(|()| {
            let old = parts(|wanted| !wanted);
            if !old.is_empty() {
                wait_for_packets();
            }
            self.remove_parts(table, &old)
        });
        match done {
            // Somebody has bent the table so that it cannot be changed piece by piece.
            Err(failed) if guest.is_none() && found.is_some() && failed.is_about_contents() => {
                self.make_anew(table, image, &before.counts)
            }
            done => done,
        }
    }

    /// Builds an image beside what is in force. A transaction of its own: the kernel fills sets with ranges only after it has switched
    /// rules (`nft_set_commit_update`), so that in one with the switch packets would find them empty for a moment.
    fn lay_out(&mut self, table: &str, image: &Image, before: &Dump, guest: Option<&str>) -> Result<(), Failed> {
        let name = text(table);
        let table = Table::new(&name, ProtoFamily::Inet);
        let mut batch = Steps::new();
        batch.add("make the table", &table, MsgType::Add);
        if let Some(guest) = guest {
            let chain = chain_message(&table, guest, None);
            batch.add(&format!("make sure of chain {guest}"), &chain, MsgType::Add);
        }
        make_chains(&mut batch, &table, image, |chain| chain.base.is_none());
        make_sets(&mut batch, &table, image, &before.counts);
        make_rules(&mut batch, &table, image, |name, chain| {
            chain.base.is_none() && name != ABOUT
        });
        self.commit(batch)
    }

    /// Lets the base chains lead to what was laid out, in one transaction.
    fn switch(&mut self, table: &str, image: &Image, before: &Dump) -> Result<(), Failed> {
        let name = text(table);
        let table = Table::new(&name, ProtoFamily::Inet);
        let mut batch = Steps::new();
        let front = |name: &str, chain: &Chain| chain.base.is_some() || name == ABOUT;
        for (name, _) in image
            .chains
            .iter()
            .filter(|(name, chain)| front(name, chain) && before.image.chains.contains_key(*name))
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
    pub fn remove(&mut self, table: &str) -> Result<(), Failed> {
        let name = text(table);
        let table = Table::new(&name, ProtoFamily::Inet);
        let mut batch = Steps::new();
        batch.add("make the table", &table, MsgType::Add);
        batch.add("remove the table", &table, MsgType::Del);
        self.commit(batch)
    }

    /// Removes everything that a dump names, and with `last`, the names of chains without rules, the table too.
    pub fn remove_contents(&mut self, table: &str, found: &Dump, last: Option<&[String]>) -> Result<(), Failed> {
        let mut parts = Parts {
            chains: found.image.chains.keys().cloned().collect(),
            sets: found.image.sets.keys().cloned().collect(),
            counters: found.image.counters.iter().cloned().collect(),
        };
        self.remove_parts(table, &parts)?;
        let Some(last) = last else { return Ok(()) };
        // A chain that somebody fills meanwhile is not removed, and the table stays with it.
        parts = Parts {
            chains: last.to_vec(),
            sets: Vec::new(),
            counters: Vec::new(),
        };
        let name = text(table);
        let message = Table::new(&name, ProtoFamily::Inet);
        let mut batch = Steps::new();
        for name in &parts.chains {
            let chain = chain_message(&message, name, None);
            batch.add(&format!("remove chain {name}"), &chain, MsgType::Del);
        }
        self.commit(batch)?;
        self.remove(table)
    }

    /// Finds out whether the kernel takes an image: it is built and taken back in one transaction, so that it never is in force.
    pub fn attempt(&mut self, table: &str, image: &Image) -> Result<(), Failed> {
        let name = text(table);
        let table = Table::new(&name, ProtoFamily::Inet);
        let mut batch = Steps::new();
        batch.add("make a table", &table, MsgType::Add);
        build(&mut batch, &table, image, &BTreeMap::new());
        batch.add("take it back", &table, MsgType::Del);
        self.commit(batch)
    }

    fn commit(&mut self, steps: Steps) -> Result<(), Failed> {
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

    /// The generation of all of `nf_tables`.
    pub fn generation(&mut self) -> io::Result<u32> {
        let mut found = None;
        self.ask(
            libc::NFT_MSG_GETGEN,
            0,
            |_| {},
            |header| {
                // SAFETY: allocated, given a whole message, freed.
                unsafe {
                    let generation = sys::nftnl_gen_alloc();
                    if sys::nftnl_gen_nlmsg_parse(header, generation) >= 0 {
                        found = Some(sys::nftnl_gen_get_u32(generation, sys::NFTNL_GEN_ID as u16));
                    }
                    sys::nftnl_gen_free(generation);
                }
            },
        )?;
        found.ok_or_else(|| io::Error::other("nf_tables did not tell its generation"))
    }

    /// Reads a table back; none if there is none. Read at one generation, or again.
    pub fn read(&mut self, table: &str) -> io::Result<Option<Dump>> {
        for _ in 0..100 {
            let before = self.generation()?;
            match self.read_once(table) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Gone between two requests: look again.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) && self.generation()? != before => {}
                found => {
                    let mut found = found?;
                    if self.generation()? == before {
                        if let Some(dump) = &mut found {
                            dump.generation = before;
                        }
                        return Ok(found);
                    }
                }
            }
        }
        Err(io::Error::other(
            "nf_tables changed again and again while the table was read",
        ))
    }

    fn read_once(&mut self, table: &str) -> io::Result<Option<Dump>> {
        let Some(dormant) = self.table(table)? else {
            return Ok(None);
        };
        let mut dump = Dump {
            dormant,
            ..Dump::default()
        };
        dump.image.chains = self.chains(table)?;
        for (chain, rule) in self.rules(table)? {
            dump.image.chains.entry(chain).or_default().rules.push(rule);
        }
        for (name, kind) in self.sets(table)? {
            let mut elements = self.elements(table, &name, kind)?;
            elements.sort_unstable();
            dump.image.sets.insert(name, Set { kind, elements });
        }
        dump.counts = self.counters(table)?;
        dump.image.counters = dump.counts.keys().cloned().collect();
        Ok(Some(dump))
    }

    fn table(&mut self, table: &str) -> io::Result<Option<bool>> {
        let mut found = None;
        self.ask(
            libc::NFT_MSG_GETTABLE,
            libc::NLM_F_DUMP,
            |_| {},
            |header| {
                // SAFETY: allocated, given a whole message, freed.
                unsafe {
                    let object = sys::nftnl_table_alloc();
                    if sys::nftnl_table_nlmsg_parse(header, object) >= 0
                        && sys::nftnl_table_get_u32(object, sys::NFTNL_TABLE_FAMILY as u16) == u32::from(INET)
                        && owned(sys::nftnl_table_get_str(object, sys::NFTNL_TABLE_NAME as u16)) == table
                    {
                        let flags = sys::nftnl_table_get_u32(object, sys::NFTNL_TABLE_FLAGS as u16);
                        found = Some(flags & 1 != 0);
                    }
                    sys::nftnl_table_free(object);
                }
            },
        )?;
        Ok(found)
    }

    fn chains(&mut self, table: &str) -> io::Result<BTreeMap<String, Chain>> {
        let mut found = BTreeMap::new();
        self.ask(
            libc::NFT_MSG_GETCHAIN,
            libc::NLM_F_DUMP,
            |_| {},
            |header| {
                // SAFETY: allocated, given a whole message, freed.
                unsafe {
                    let object = sys::nftnl_chain_alloc();
                    if sys::nftnl_chain_nlmsg_parse(header, object) >= 0
                        && sys::nftnl_chain_get_u32(object, sys::NFTNL_CHAIN_FAMILY as u16) == u32::from(INET)
                        && owned(sys::nftnl_chain_get_str(object, sys::NFTNL_CHAIN_TABLE as u16)) == table
                    {
                        let base = sys::nftnl_chain_is_set(object, sys::NFTNL_CHAIN_HOOKNUM as u16).then(|| Base {
                            hook: sys::nftnl_chain_get_u32(object, sys::NFTNL_CHAIN_HOOKNUM as u16),
                            priority: sys::nftnl_chain_get_s32(object, sys::NFTNL_CHAIN_PRIO as u16),
                            accepts: sys::nftnl_chain_get_u32(object, sys::NFTNL_CHAIN_POLICY as u16)
                                == libc::NF_ACCEPT.unsigned_abs(),
                        });
                        let name = owned(sys::nftnl_chain_get_str(object, sys::NFTNL_CHAIN_NAME as u16));
                        let rules = Vec::new();
                        found.insert(name, Chain { base, rules });
                    }
                    sys::nftnl_chain_free(object);
                }
            },
        )?;
        Ok(found)
    }

    fn rules(&mut self, table: &str) -> io::Result<Vec<(String, Rule)>> {
        let mut found = Vec::new();
        let name = text(table);
        let fill = |header| {
            // SAFETY: allocated, filled, written to a message of the largest size, freed.
            unsafe {
                let object = sys::nftnl_rule_alloc();
                sys::nftnl_rule_set_str(object, sys::NFTNL_RULE_TABLE as u16, name.as_ptr());
                sys::nftnl_rule_nlmsg_build_payload(header, object);
                sys::nftnl_rule_free(object);
            }
        };
        self.ask(libc::NFT_MSG_GETRULE, libc::NLM_F_DUMP, fill, |header| {
            // SAFETY: allocated, given a whole message, freed.
            unsafe {
                let object = sys::nftnl_rule_alloc();
                if sys::nftnl_rule_nlmsg_parse(header, object) >= 0
                    && owned(sys::nftnl_rule_get_str(object, sys::NFTNL_RULE_TABLE as u16)) == table
                {
                    let chain = owned(sys::nftnl_rule_get_str(object, sys::NFTNL_RULE_CHAIN as u16));
                    let rule = Rule {
                        comment: comment(object),
                        expressions: expressions(object),
                    };
                    found.push((chain, rule));
                }
                sys::nftnl_rule_free(object);
            }
        })?;
        Ok(found)
    }

    fn sets(&mut self, table: &str) -> io::Result<Vec<(String, SetKind)>> {
        let mut found = Vec::new();
        let name = text(table);
        let fill = |header| {
            // SAFETY: as for rules.
            unsafe {
                let object = sys::nftnl_set_alloc();
                sys::nftnl_set_set_str(object, sys::NFTNL_SET_TABLE as u16, name.as_ptr());
                sys::nftnl_set_nlmsg_build_payload(header, object);
                sys::nftnl_set_free(object);
            }
        };
        self.ask(libc::NFT_MSG_GETSET, libc::NLM_F_DUMP, fill, |header| {
            // SAFETY: allocated, given a whole message, freed.
            unsafe {
                let object = sys::nftnl_set_alloc();
                if sys::nftnl_set_nlmsg_parse(header, object) >= 0
                    && owned(sys::nftnl_set_get_str(object, sys::NFTNL_SET_TABLE as u16)) == table
                {
                    let number = |attribute: u32| sys::nftnl_set_get_u32(object, attribute as u16);
                    let flags = number(sys::NFTNL_SET_FLAGS);
                    let kind = match number(sys::NFTNL_SET_KEY_LEN) {
                        4 => SetKind::Users,
                        8 => SetKind::Cgroups,
                        length => SetKind::Endpoints {
                            family: if length == 12 { IPV4 } else { IPV6 },
                            ranges: flags & libc::NFT_SET_INTERVAL as u32 != 0,
                        },
                    };
                    found.push((owned(sys::nftnl_set_get_str(object, sys::NFTNL_SET_NAME as u16)), kind));
                }
                sys::nftnl_set_free(object);
            }
        })?;
        Ok(found)
    }

    fn elements(&mut self, table: &str, set: &str, kind: SetKind) -> io::Result<Vec<Element>> {
        let mut found = Vec::new();
        let (table, set) = (text(table), text(set));
        let fill = |header| {
            // SAFETY: as for rules.
            unsafe {
                let object = sys::nftnl_set_alloc();
                sys::nftnl_set_set_str(object, sys::NFTNL_SET_TABLE as u16, table.as_ptr());
                sys::nftnl_set_set_str(object, sys::NFTNL_SET_NAME as u16, set.as_ptr());
                sys::nftnl_set_elems_nlmsg_build_payload(header, object);
                sys::nftnl_set_free(object);
            }
        };
        self.ask(libc::NFT_MSG_GETSETELEM, libc::NLM_F_DUMP, fill, |header| {
            // SAFETY: allocated, given a whole message, freed; the iterator lives shorter than the set.
            unsafe {
                let object = sys::nftnl_set_alloc();
                if sys::nftnl_set_elems_nlmsg_parse(header, object) >= 0 {
                    let all = sys::nftnl_set_elems_iter_create(object);
                    loop {
                        let element = sys::nftnl_set_elems_iter_next(all);
                        if element.is_null() {
                            break;
                        }
                        found.push(element_of(element, kind));
                    }
                    sys::nftnl_set_elems_iter_destroy(all);
                }
                sys::nftnl_set_free(object);
            }
        })?;
        Ok(found)
    }

    fn counters(&mut self, table: &str) -> io::Result<BTreeMap<String, u64>> {
        let mut found = BTreeMap::new();
        let name = text(table);
        let fill = |header| {
            // SAFETY: as for rules.
            unsafe {
                let object = sys::nftnl_obj_alloc();
                sys::nftnl_obj_set_str(object, sys::NFTNL_OBJ_TABLE as u16, name.as_ptr());
                sys::nftnl_obj_set_u32(object, sys::NFTNL_OBJ_TYPE as u16, NFT_OBJECT_COUNTER);
                sys::nftnl_obj_nlmsg_build_payload(header, object);
                sys::nftnl_obj_free(object);
            }
        };
        self.ask(libc::NFT_MSG_GETOBJ, libc::NLM_F_DUMP, fill, |header| {
            // SAFETY: allocated, given a whole message, freed.
            unsafe {
                let object = sys::nftnl_obj_alloc();
                if sys::nftnl_obj_nlmsg_parse(header, object) >= 0
                    && owned(sys::nftnl_obj_get_str(object, sys::NFTNL_OBJ_TABLE as u16)) == table
                {
                    let name = owned(sys::nftnl_obj_get_str(object, sys::NFTNL_OBJ_NAME as u16));
                    found.insert(name, sys::nftnl_obj_get_u64(object, sys::NFTNL_OBJ_CTR_PKTS as u16));
                }
                sys::nftnl_obj_free(object);
            }
        })?;
        Ok(found)
    }
}

/// Becomes readable when any `nf_tables` transaction of this network namespace is committed.
pub struct Changes(mnl::Socket);

impl Changes {
    /// Subscribes (`NFNLGRP_NFTABLES`).
    pub fn subscribe() -> io::Result<Self> {
        const NFNLGRP_NFTABLES: u32 = 7;
        let socket = mnl::Socket::open(mnl::Bus::Netfilter)?;
        socket.bind(1 << (NFNLGRP_NFTABLES - 1), 0)?;
        Ok(Self(socket))
    }

    /// Takes all that has come. An overflow is a change too: what matters is to look again.
    pub fn drain(&self) {
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

/// A batch whose steps have names, for messages.
struct Steps {
    batch: Batch,
    names: BTreeMap<u32, String>,
}

impl Steps {
    fn new() -> Self {
        Self {
            batch: Batch::new(),
            names: BTreeMap::new(),
        }
    }

    fn add<T: NlMsg>(&mut self, name: &str, message: &T, kind: MsgType) {
        /// Tells the number that the batch gives a message.
        struct Numbered<'a, T> {
            message: &'a T,
            number: std::cell::Cell<u32>,
        }
        // SAFETY: hands on to the message's own implementation.
        unsafe impl<T: NlMsg> NlMsg for Numbered<'_, T> {
            unsafe fn write(&self, buffer: *mut c_void, sequence: u32, kind: MsgType) {
                self.number.set(sequence);
                // SAFETY: as promised by our caller.
                unsafe { self.message.write(buffer, sequence, kind) };
            }
        }
        let numbered = Numbered {
            message,
            number: std::cell::Cell::new(0),
        };
        self.batch.add(&numbered, kind);
        self.names.insert(numbered.number.get(), name.to_owned());
    }
}

/// Everything inside the table, in an order in which each thing knows what it refers to.
fn build(batch: &mut Steps, table: &Table, image: &Image, counts: &BTreeMap<String, u64>) {
    make_chains(batch, table, image, |_| true);
    make_sets(batch, table, image, counts);
    make_rules(batch, table, image, |_, _| true);
}

fn make_chains(batch: &mut Steps, table: &Table, image: &Image, wanted: impl Fn(&Chain) -> bool) {
    for (name, chain) in image.chains.iter().filter(|(_, chain)| wanted(chain)) {
        let message = chain_message(table, name, chain.base);
        batch.add(&format!("make chain {name}"), &message, MsgType::Add);
    }
}

/// Counters and sets, with their elements.
fn make_sets(batch: &mut Steps, table: &Table, image: &Image, counts: &BTreeMap<String, u64>) {
    for name in &image.counters {
        let counter = Counter {
            table,
            name: text(name),
            packets: counts.get(name).copied().unwrap_or_default(),
        };
        batch.add(&format!("make counter {name}"), &counter, MsgType::Add);
    }
    for (id, (name, set)) in (1..).zip(&image.sets) {
        let message = set_message(table, name, id, set);
        batch.add(&format!("make set {name}"), &message, MsgType::Add);
        if !set.elements.is_empty() {
            for elements in message.elems_iter() {
                batch.add(&format!("fill set {name}"), &elements, MsgType::Add);
            }
        }
    }
}

fn make_rules(batch: &mut Steps, table: &Table, image: &Image, wanted: impl Fn(&str, &Chain) -> bool) {
    for (name, chain) in image.chains.iter().filter(|(name, chain)| wanted(name, chain)) {
        let message = chain_message(table, name, chain.base);
        for (number, rule) in (1..).zip(&chain.rules) {
            let mut built = NlRule::new(&message);
            if !rule.comment.is_empty() {
                // Ours are shorter than libnftnl's limit.
                let _ = built.set_comment(text(&rule.comment));
            }
            for expression in &rule.expressions {
                built.add_expr(&Raw(expression));
            }
            batch.add(&format!("make rule {number} of chain {name}"), &built, MsgType::Add);
        }
    }
}

fn chain_message<'t>(table: &'t Table, name: &str, base: Option<Base>) -> nftnl::Chain<'t> {
    let mut chain = nftnl::Chain::new(text(name), table);
    if let Some(Base {
        hook,
        priority,
        accepts,
    }) = base
    {
        let hook = match i32::try_from(hook) {
            Ok(libc::NF_INET_PRE_ROUTING) => nftnl::Hook::PreRouting,
            Ok(libc::NF_INET_FORWARD) => nftnl::Hook::Forward,
            Ok(_) | Err(_) => nftnl::Hook::Out,
        };
        chain.set_hook(hook, priority);
        chain.set_type(nftnl::ChainType::Filter);
        chain.set_policy(if accepts {
            nftnl::Policy::Accept
        } else {
            nftnl::Policy::Drop
        });
    }
    chain
}

/// The types of sets' keys are for `nft list` only: numbers of its datatypes, six bits a part.
struct AnyKey;

impl SetKey for AnyKey {
    const TYPE: u32 = 0;
    const LEN: u32 = 4;

    fn data(&self) -> Box<[u8]> {
        Box::default()
    }
}

fn set_message<'t>(table: &'t Table, name: &str, id: u32, set: &Set) -> NlSet<'t, AnyKey> {
    const IPV4_ADDR: u32 = 7;
    const IPV6_ADDR: u32 = 8;
    const PROTOCOL: u32 = 12;
    const SERVICE: u32 = 13;
    const UID: u32 = 24;
    const CGROUP: u32 = 46;
    let message = NlSet::<AnyKey>::new_named(&text(name), id, table, ProtoFamily::Inet);
    let object = message.as_ptr().as_ptr();
    let concatenation = |address: u32| address << 12 | PROTOCOL << 6 | SERVICE;
    let (mut flags, mut key, mut length) = (0, UID, 4);
    let mut data = None;
    match set.kind {
        SetKind::Endpoints { family, ranges } => {
            (key, length) = if family == IPV4 {
                (concatenation(IPV4_ADDR), 12)
            } else {
                (concatenation(IPV6_ADDR), 24)
            };
            flags |= libc::NFT_SET_MAP;
            if ranges {
                // NFT_SET_CONCAT
                flags |= libc::NFT_SET_INTERVAL | 0x80;
            }
            data = Some((libc::NFT_DATA_VERDICT, 16));
        }
        SetKind::Users => {}
        SetKind::Cgroups => (key, length) = (CGROUP, 8),
    }
    // SAFETY: the object is the message's own; pointers are to live values of the length given.
    unsafe {
        let number = |attribute: u32, value: u32| sys::nftnl_set_set_u32(object, attribute as u16, value);
        number(sys::NFTNL_SET_FLAGS, flags as u32);
        number(sys::NFTNL_SET_KEY_TYPE, key);
        number(sys::NFTNL_SET_KEY_LEN, length);
        number(
            sys::NFTNL_SET_DESC_SIZE,
            u32::try_from(set.elements.len().max(16)).unwrap_or(u32::MAX),
        );
        if let Some((kind, length)) = data {
            number(sys::NFTNL_SET_DATA_TYPE, kind);
            number(sys::NFTNL_SET_DATA_LEN, length);
        }
        if let SetKind::Endpoints { family, ranges: true } = set.kind {
            let parts: [u8; 3] = [if family == IPV4 { 4 } else { 16 }, 1, 2];
            sys::nftnl_set_set_data(object, sys::NFTNL_SET_DESC_CONCAT as u16, parts.as_ptr().cast(), 3);
        }
        if !matches!(set.kind, SetKind::Endpoints { .. }) {
            // Keys in host byte order, so that `nft list` prints them right (NFTNL_UDATA_SET_KEYBYTEORDER).
            let mut order = vec![0_u8, 4];
            order.extend(1_u32.to_ne_bytes());
            sys::nftnl_set_set_data(object, sys::NFTNL_SET_USERDATA as u16, order.as_ptr().cast(), 6);
        }
        for element in &set.elements {
            sys::nftnl_set_elem_add(object, element_message(element));
        }
    }
    message
}

fn element_message(element: &Element) -> *mut sys::nftnl_set_elem {
    // SAFETY: pointers are to live values of the length given; the caller's set frees the element.
    unsafe {
        let object = sys::nftnl_set_elem_alloc();
        let bytes = |attribute: u32, value: &[u8]| {
            sys::nftnl_set_elem_set(object, attribute as u16, value.as_ptr().cast(), length_of(value));
        };
        bytes(sys::NFTNL_SET_ELEM_KEY, &element.key);
        if !element.last.is_empty() {
            bytes(sys::NFTNL_SET_ELEM_KEY_END, &element.last);
        }
        match &element.value {
            Value::None => {}
            Value::Goto(chain) => {
                let verdict = libc::NFT_GOTO.cast_unsigned();
                sys::nftnl_set_elem_set_u32(object, sys::NFTNL_SET_ELEM_VERDICT as u16, verdict);
                sys::nftnl_set_elem_set_str(object, sys::NFTNL_SET_ELEM_CHAIN as u16, text(chain).as_ptr());
            }
        }
        object
    }
}

/// SAFETY: `element` must be live.
unsafe fn element_of(element: *mut sys::nftnl_set_elem, kind: SetKind) -> Element {
    let bytes = |attribute: u32| {
        let mut length = 0;
        // SAFETY: libnftnl gives a pointer to so many bytes, or null.
        unsafe {
            let found = sys::nftnl_set_elem_get(element, attribute as u16, &raw mut length);
            copied(found, length)
        }
    };
    let value = match kind {
        SetKind::Users | SetKind::Cgroups => Value::None,
        SetKind::Endpoints { .. } => {
            // SAFETY: the element is live; the text is copied.
            Value::Goto(unsafe { owned(sys::nftnl_set_elem_get_str(element, sys::NFTNL_SET_ELEM_CHAIN as u16)) })
        }
    };
    // SAFETY: the element is live.
    let ranged = unsafe { sys::nftnl_set_elem_is_set(element, sys::NFTNL_SET_ELEM_KEY_END as u16) };
    Element {
        key: bytes(sys::NFTNL_SET_ELEM_KEY),
        last: if ranged {
            bytes(sys::NFTNL_SET_ELEM_KEY_END)
        } else {
            Vec::new()
        },
        value,
    }
}

/// A named counter.
struct Counter<'t> {
    table: &'t Table,
    name: CString,
    packets: u64,
}

// SAFETY: writes one message of libnftnl's, no larger than its largest.
unsafe impl NlMsg for Counter<'_> {
    unsafe fn write(&self, buffer: *mut c_void, sequence: u32, kind: MsgType) {
        let (message, flags) = match kind {
            MsgType::Add => (libc::NFT_MSG_NEWOBJ, libc::NLM_F_CREATE | libc::NLM_F_ACK),
            MsgType::Del => (libc::NFT_MSG_DELOBJ, libc::NLM_F_ACK),
        };
        // SAFETY: the caller gives room for the largest message; the object is allocated, filled and freed here.
        unsafe {
            let header = sys::nftnl_nlmsg_build_hdr(buffer.cast(), message as u16, INET, flags as u16, sequence);
            let object = sys::nftnl_obj_alloc();
            sys::nftnl_obj_set_str(object, sys::NFTNL_OBJ_TABLE as u16, self.table.get_name().as_ptr());
            sys::nftnl_obj_set_str(object, sys::NFTNL_OBJ_NAME as u16, self.name.as_ptr());
            sys::nftnl_obj_set_u32(object, sys::NFTNL_OBJ_TYPE as u16, NFT_OBJECT_COUNTER);
            sys::nftnl_obj_set_u64(object, sys::NFTNL_OBJ_CTR_PKTS as u16, self.packets);
            sys::nftnl_obj_set_u64(object, sys::NFTNL_OBJ_CTR_BYTES as u16, 0);
            sys::nftnl_obj_nlmsg_build_payload(header, object);
            sys::nftnl_obj_free(object);
        }
    }
}

/// An attribute of an expression, as libnftnl takes it.
enum Attribute {
    U8(u8),
    U16(u16),
    U32(u32),
    U64(u64),
    Bytes(Vec<u8>),
    Text(String),
}

/// An expression of ours as libnftnl's.
struct Raw<'a>(&'a Expression);

impl NlExpression for Raw<'_> {
    fn to_expr(&self, _: &NlRule<'_>) -> NonNull<sys::nftnl_expr> {
        let (name, attributes) = attributes(self.0);
        // SAFETY: allocated; attributes are copied by libnftnl; the rule that takes the result frees it.
        unsafe {
            let expression = sys::nftnl_expr_alloc(name.as_ptr());
            for (number, attribute) in attributes {
                let number = number as u16;
                match attribute {
                    Attribute::U8(value) => sys::nftnl_expr_set_u8(expression, number, value),
                    Attribute::U16(value) => sys::nftnl_expr_set_u16(expression, number, value),
                    Attribute::U32(value) => sys::nftnl_expr_set_u32(expression, number, value),
                    Attribute::U64(value) => sys::nftnl_expr_set_u64(expression, number, value),
                    Attribute::Bytes(value) => {
                        sys::nftnl_expr_set(expression, number, value.as_ptr().cast(), length_of(&value));
                    }
                    Attribute::Text(value) => {
                        sys::nftnl_expr_set_str(expression, number, text(&value).as_ptr());
                    }
                }
            }
            // As the nftnl crate does: nothing can be done without memory for a few bytes.
            NonNull::new(expression).unwrap_or_else(|| std::process::abort())
        }
    }
}

#[allow(clippy::too_many_lines, reason = "one arm an expression")]
fn attributes(expression: &Expression) -> (&'static CStr, Vec<(u32, Attribute)>) {
    use Attribute::{Bytes, Text, U8, U16, U32, U64};
    match expression {
        Expression::Meta { key, register } => (
            c"meta",
            vec![
                (sys::NFTNL_EXPR_META_KEY, U32(*key)),
                (sys::NFTNL_EXPR_META_DREG, U32(*register)),
            ],
        ),
        Expression::Payload {
            base,
            offset,
            length,
            register,
        } => (
            c"payload",
            vec![
                (sys::NFTNL_EXPR_PAYLOAD_BASE, U32(*base)),
                (sys::NFTNL_EXPR_PAYLOAD_OFFSET, U32(*offset)),
                (sys::NFTNL_EXPR_PAYLOAD_LEN, U32(*length)),
                (sys::NFTNL_EXPR_PAYLOAD_DREG, U32(*register)),
            ],
        ),
        Expression::Mask(mask) => (
            c"bitwise",
            vec![
                (sys::NFTNL_EXPR_BITWISE_SREG, U32(1)),
                (sys::NFTNL_EXPR_BITWISE_DREG, U32(1)),
                (sys::NFTNL_EXPR_BITWISE_LEN, U32(length_of(mask))),
                (sys::NFTNL_EXPR_BITWISE_MASK, Bytes(mask.clone())),
                (sys::NFTNL_EXPR_BITWISE_XOR, Bytes(vec![0; mask.len()])),
            ],
        ),
        Expression::Compare { equal, value } => (
            c"cmp",
            vec![
                (sys::NFTNL_EXPR_CMP_SREG, U32(1)),
                (sys::NFTNL_EXPR_CMP_OP, U32(u32::from(!equal))),
                (sys::NFTNL_EXPR_CMP_DATA, Bytes(value.clone())),
            ],
        ),
        Expression::Lookup { set, value } => {
            let mut all = vec![
                (sys::NFTNL_EXPR_LOOKUP_SREG, U32(1)),
                (sys::NFTNL_EXPR_LOOKUP_SET, Text(set.clone())),
            ];
            all.extend(value.map(|register| (sys::NFTNL_EXPR_LOOKUP_DREG, U32(register))));
            (c"lookup", all)
        }
        Expression::Cgroup { level } => (
            c"socket",
            vec![
                // NFT_SOCKET_CGROUPV2
                (sys::NFTNL_EXPR_SOCKET_KEY, U32(3)),
                (sys::NFTNL_EXPR_SOCKET_DREG, U32(1)),
                (sys::NFTNL_EXPR_SOCKET_LEVEL, U32(*level)),
            ],
        ),
        Expression::Count(counter) => (
            c"objref",
            vec![
                (sys::NFTNL_EXPR_OBJREF_IMM_TYPE, U32(NFT_OBJECT_COUNTER)),
                (sys::NFTNL_EXPR_OBJREF_IMM_NAME, Text(counter.clone())),
            ],
        ),
        Expression::Limit { rate, burst } => (
            c"limit",
            vec![
                (sys::NFTNL_EXPR_LIMIT_RATE, U64(*rate)),
                (sys::NFTNL_EXPR_LIMIT_UNIT, U64(1)),
                (sys::NFTNL_EXPR_LIMIT_BURST, U32(*burst)),
                (sys::NFTNL_EXPR_LIMIT_TYPE, U32(0)),
                (sys::NFTNL_EXPR_LIMIT_FLAGS, U32(0)),
            ],
        ),
        Expression::Log { group, prefix } => (
            c"log",
            vec![
                (sys::NFTNL_EXPR_LOG_GROUP, U16(*group)),
                (sys::NFTNL_EXPR_LOG_PREFIX, Text(prefix.clone())),
            ],
        ),
        Expression::Reject { reset } => {
            // NFT_REJECT_TCP_RST, or NFT_REJECT_ICMPX_UNREACH with NFT_REJECT_ICMPX_PORT_UNREACH
            let (kind, code) = if *reset { (1, 0) } else { (2, 1) };
            (
                c"reject",
                vec![
                    (sys::NFTNL_EXPR_REJECT_TYPE, U32(kind)),
                    (sys::NFTNL_EXPR_REJECT_CODE, U8(code)),
                ],
            )
        }
        Expression::Verdict(verdict) => {
            let (code, chain) = match verdict {
                Verdict::Accept => (libc::NF_ACCEPT, None),
                Verdict::Return => (libc::NFT_RETURN, None),
                Verdict::Jump(chain) => (libc::NFT_JUMP, Some(chain)),
                Verdict::Goto(chain) => (libc::NFT_GOTO, Some(chain)),
                Verdict::Other(code) => (*code, None),
            };
            let mut all = vec![
                (sys::NFTNL_EXPR_IMM_DREG, U32(0)),
                (sys::NFTNL_EXPR_IMM_VERDICT, U32(code.cast_unsigned())),
            ];
            all.extend(chain.map(|chain| (sys::NFTNL_EXPR_IMM_CHAIN, Text(chain.clone()))));
            (c"immediate", all)
        }
        // Never wanted, only found.
        Expression::Other(_) => (c"notrack", Vec::new()),
    }
}

/// SAFETY: `rule` must be live.
unsafe fn expressions(rule: *mut sys::nftnl_rule) -> Vec<Expression> {
    let mut found = Vec::new();
    // SAFETY: the rule outlives the iterator, and the expressions are its own.
    unsafe {
        let all = sys::nftnl_expr_iter_create(rule);
        loop {
            let expression = sys::nftnl_expr_iter_next(all);
            if expression.is_null() {
                break;
            }
            found.push(expression_of(expression));
        }
        sys::nftnl_expr_iter_destroy(all);
    }
    found
}

/// SAFETY: `expression` must be live.
unsafe fn expression_of(expression: *mut sys::nftnl_expr) -> Expression {
    // SAFETY: libnftnl copies numbers out, and gives pointers to bytes that live as long as the expression.
    let number = |attribute: u32| unsafe { sys::nftnl_expr_get_u32(expression, attribute as u16) };
    // SAFETY: as above.
    let word = |attribute: u32| unsafe { owned(sys::nftnl_expr_get_str(expression, attribute as u16)) };
    let bytes = |attribute: u32| {
        let mut length = 0;
        // SAFETY: as above.
        unsafe {
            copied(
                sys::nftnl_expr_get(expression, attribute as u16, &raw mut length),
                length,
            )
        }
    };
    // SAFETY: as above.
    let has = |attribute: u32| unsafe { sys::nftnl_expr_is_set(expression, attribute as u16) };
    let name = word(sys::NFTNL_EXPR_NAME);
    let found = match name.as_str() {
        "meta" => Some(Expression::Meta {
            key: number(sys::NFTNL_EXPR_META_KEY),
            register: number(sys::NFTNL_EXPR_META_DREG),
        }),
        "payload" => Some(Expression::Payload {
            base: number(sys::NFTNL_EXPR_PAYLOAD_BASE),
            offset: number(sys::NFTNL_EXPR_PAYLOAD_OFFSET),
            length: number(sys::NFTNL_EXPR_PAYLOAD_LEN),
            register: number(sys::NFTNL_EXPR_PAYLOAD_DREG),
        }),
        "bitwise" => Some(Expression::Mask(bytes(sys::NFTNL_EXPR_BITWISE_MASK))),
        "cmp" => Some(Expression::Compare {
            equal: number(sys::NFTNL_EXPR_CMP_OP) == 0,
            value: bytes(sys::NFTNL_EXPR_CMP_DATA),
        }),
        "lookup" => Some(Expression::Lookup {
            set: word(sys::NFTNL_EXPR_LOOKUP_SET),
            value: has(sys::NFTNL_EXPR_LOOKUP_DREG).then(|| number(sys::NFTNL_EXPR_LOOKUP_DREG)),
        }),
        "socket" => Some(Expression::Cgroup {
            level: number(sys::NFTNL_EXPR_SOCKET_LEVEL),
        }),
        "objref" => Some(Expression::Count(word(sys::NFTNL_EXPR_OBJREF_IMM_NAME))),
        "limit" => Some(Expression::Limit {
            // SAFETY: as above.
            rate: unsafe { sys::nftnl_expr_get_u64(expression, sys::NFTNL_EXPR_LIMIT_RATE as u16) },
            burst: number(sys::NFTNL_EXPR_LIMIT_BURST),
        }),
        "log" => Some(Expression::Log {
            // SAFETY: as above.
            group: unsafe { sys::nftnl_expr_get_u16(expression, sys::NFTNL_EXPR_LOG_GROUP as u16) },
            prefix: word(sys::NFTNL_EXPR_LOG_PREFIX),
        }),
        "reject" => Some(Expression::Reject {
            reset: number(sys::NFTNL_EXPR_REJECT_TYPE) == 1,
        }),
        "immediate" if has(sys::NFTNL_EXPR_IMM_VERDICT) => {
            let chain = || word(sys::NFTNL_EXPR_IMM_CHAIN);
            Some(Expression::Verdict(
                match number(sys::NFTNL_EXPR_IMM_VERDICT).cast_signed() {
                    libc::NF_ACCEPT => Verdict::Accept,
                    libc::NFT_RETURN => Verdict::Return,
                    libc::NFT_JUMP => Verdict::Jump(chain()),
                    libc::NFT_GOTO => Verdict::Goto(chain()),
                    code => Verdict::Other(code),
                },
            ))
        }
        _ => None,
    };
    found.unwrap_or(Expression::Other(name))
}

/// SAFETY: `rule` must be live.
unsafe fn comment(rule: *mut sys::nftnl_rule) -> String {
    let mut length = 0;
    // SAFETY: libnftnl gives a pointer to so many bytes, or null.
    let data = unsafe {
        let found = sys::nftnl_rule_get_data(rule, sys::NFTNL_RULE_USERDATA as u16, &raw mut length);
        copied(found, length)
    };
    // Type, length, text, zero (NFTNL_UDATA_RULE_COMMENT is 0).
    match data.as_slice() {
        [0, length, rest @ ..] => {
            let text = rest.get(..usize::from(*length)).unwrap_or_default();
            String::from_utf8_lossy(text.strip_suffix(&[0]).unwrap_or(text)).into_owned()
        }
        _ => String::new(),
    }
}

/// SAFETY: `data` must be null or point to `length` bytes.
pub(super) unsafe fn copied(data: *const c_void, length: u32) -> Vec<u8> {
    if data.is_null() {
        return Vec::new();
    }
    // SAFETY: as promised by the caller.
    unsafe { std::slice::from_raw_parts(data.cast::<u8>(), length as usize) }.to_vec()
}

/// SAFETY: `text` must be null or a C string.
pub(super) unsafe fn owned(text: *const std::os::raw::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as promised by the caller.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Names are checked long before: none holds a zero.
fn text(text: &str) -> CString {
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
