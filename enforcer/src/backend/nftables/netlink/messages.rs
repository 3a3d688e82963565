//! `Image` → the messages of one transaction, each with a name.

#![allow(
    unsafe_code,
    reason = "counters, and sets other than of plain keys, only exist in libnftnl itself"
)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "libnftnl and libc number attributes and messages in wider types than libnftnl's own functions take"
)]

use std::{
    cell::Cell,
    collections::BTreeMap,
    ffi::{CStr, CString, c_void},
};

use nftnl::{
    Batch, MsgType, NlMsg, ProtoFamily, Rule as NlRule, Table, nftnl_sys as sys,
    set::{Set as NlSet, SetKey},
};

use super::{INET, NFT_OBJECT_COUNTER, expressions::Raw, length_of, owned::Owned, text, within_registers};
use crate::backend::nftables::{
    expression::{Expression, IPV4},
    image::{Base, Chain, Image, Set, SetKind, Value},
};

/// `NFT_SET_ELEM_INTERVAL_END`.
pub(super) const INTERVAL_END: u32 = 1;

/// Numbers of nft's datatypes.
pub(super) const IPV4_ADDR: u32 = 7;
const IPV6_ADDR: u32 = 8;
/// Addresses for which a set of single ones has room, beside an eighth of those that it is made with: with its size
/// given, the kernel takes its fastest hash, which does not grow.
const TO_COME: usize = 64;

/// A batch whose steps have names, for messages.
pub(crate) struct Steps {
    pub(super) batch: Batch,
    pub(super) names: BTreeMap<u32, String>,
}

impl Steps {
    pub(crate) fn new() -> Self {
        Self {
            batch: Batch::new(),
            names: BTreeMap::new(),
        }
    }

    pub(crate) fn add<T: NlMsg>(&mut self, name: &str, message: &T, kind: MsgType) {
        self.add_flagged(name, message, kind, 0);
    }

    /// Removes a thing only where nothing is in it and nothing refers to it: without `NLM_F_NONREC` the kernel removes
    /// what is in it, too.
    pub(crate) fn remove_if_empty<T: NlMsg>(&mut self, name: &str, message: &T) {
        self.add_flagged(name, message, MsgType::Del, libc::NLM_F_NONREC as u16);
    }

    fn add_flagged<T: NlMsg>(&mut self, name: &str, message: &T, kind: MsgType, flags: u16) {
        /// Tells the number that the batch gives a message, and adds flags to its own.
        struct Step<'a, T> {
            message: &'a T,
            flags: u16,
            number: Cell<u32>,
        }
        // SAFETY: hands on to the message's own implementation.
        unsafe impl<T: NlMsg> NlMsg for Step<'_, T> {
            unsafe fn write(&self, buffer: *mut c_void, sequence: u32, kind: MsgType) {
                self.number.set(sequence);
                // SAFETY: as promised by our caller; a netlink header is at the buffer's start then, which is aligned
                // for it.
                unsafe {
                    self.message.write(buffer, sequence, kind);
                    (*buffer.cast::<libc::nlmsghdr>()).nlmsg_flags |= self.flags;
                }
            }
        }
        let number = Cell::new(0);
        let step = Step { message, flags, number };
        self.batch.add(&step, kind);
        self.names.insert(step.number.get(), name.to_owned());
    }
}

/// Everything inside the table, in an order in which each thing knows what it refers to.
pub(super) fn build(batch: &mut Steps, table: &Table, image: &Image, counts: &BTreeMap<String, u64>) {
    make_chains(batch, table, image, |_| true);
    make_sets(batch, table, image, counts);
    make_rules(batch, table, image, |_, _| true);
}

pub(super) fn make_chains(batch: &mut Steps, table: &Table, image: &Image, wanted: impl Fn(&Chain) -> bool) {
    for (name, chain) in image.chains.iter().filter(|(_, chain)| wanted(chain)) {
        let message = chain_message(table, name, chain.base);
        batch.add(&format!("make chain {name}"), &message, MsgType::Add);
    }
}

/// Counters and sets, with their elements.
pub(super) fn make_sets(batch: &mut Steps, table: &Table, image: &Image, counts: &BTreeMap<String, u64>) {
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

pub(super) fn make_rules(batch: &mut Steps, table: &Table, image: &Image, wanted: impl Fn(&str, &Chain) -> bool) {
    for (name, chain) in image.chains.iter().filter(|(name, chain)| wanted(name, chain)) {
        let message = chain_message(table, name, chain.base);
        for (number, rule) in (1..).zip(&chain.rules) {
            let rule = rule_message(&message, &rule.comment, &rule.expressions);
            batch.add(&format!("make rule {number} of chain {name}"), &rule, MsgType::Add);
        }
    }
}

pub(crate) fn inet(table: &str) -> Table {
    Table::new(text(table), ProtoFamily::Inet)
}

/// A rule with a comment, unless that is empty.
pub(crate) fn rule_message<'c>(chain: &'c nftnl::Chain<'_>, comment: &str, expressions: &[Expression]) -> NlRule<'c> {
    let mut rule = NlRule::new(chain);
    if !comment.is_empty() {
        // Ours are shorter than libnftnl's limit.
        let _ = rule.set_comment(text(comment));
    }
    for expression in expressions {
        rule.add_expr(&Raw(expression));
    }
    rule
}

pub(crate) fn chain_message<'t>(table: &'t Table, name: &str, base: Option<Base>) -> nftnl::Chain<'t> {
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
pub(super) struct AnyKey;

impl SetKey for AnyKey {
    const TYPE: u32 = 0;
    const LEN: u32 = 4;

    fn data(&self) -> Box<[u8]> {
        Box::default()
    }
}

pub(super) fn set_message<'t>(table: &'t Table, name: &str, id: u32, set: &Set) -> NlSet<'t, AnyKey> {
    const PROTOCOL: u32 = 12;
    const SERVICE: u32 = 13;
    const UID: u32 = 24;
    const CGROUP: u32 = 46;
    let mut message = NlSet::<AnyKey>::new_named(&text(name), id, table, ProtoFamily::Inet);
    let object = message.as_ptr().as_ptr();
    let (mut flags, mut key, mut length) = (0, UID, 4);
    match set.kind {
        SetKind::Services => {
            (key, length) = (PROTOCOL << 6 | SERVICE, 8);
            flags |= libc::NFT_SET_MAP;
        }
        SetKind::Addresses { family, ranges } => {
            (key, length) = if family == IPV4 {
                (IPV4_ADDR, 4)
            } else {
                (IPV6_ADDR, 16)
            };
            if ranges {
                flags |= libc::NFT_SET_INTERVAL;
            }
        }
        SetKind::Ports => {
            (key, length) = (SERVICE, 2);
            flags |= libc::NFT_SET_MAP;
        }
        SetKind::Users => {}
        SetKind::Cgroups => (key, length) = (CGROUP, 8),
    }
    let elements = match set.kind {
        // A range of addresses is two elements to the kernel.
        SetKind::Addresses { ranges: true, .. } => set.elements.len() * 2,
        SetKind::Addresses { ranges: false, .. } => set.elements.len() + set.elements.len() / 8 + TO_COME,
        SetKind::Services | SetKind::Ports | SetKind::Users | SetKind::Cgroups => set.elements.len(),
    };
    let size = u32::try_from(elements.max(16)).unwrap_or(u32::MAX);
    let number = |value: u32| value.to_ne_bytes().to_vec();
    let mut attributes = vec![
        (sys::NFTNL_SET_FLAGS, number(flags as u32)),
        (sys::NFTNL_SET_KEY_TYPE, number(key)),
        (sys::NFTNL_SET_KEY_LEN, number(length)),
        (sys::NFTNL_SET_DESC_SIZE, number(size)),
    ];
    if flags & libc::NFT_SET_MAP != 0 {
        attributes.push((sys::NFTNL_SET_DATA_TYPE, number(libc::NFT_DATA_VERDICT)));
        attributes.push((sys::NFTNL_SET_DATA_LEN, number(16)));
    }
    if matches!(set.kind, SetKind::Users | SetKind::Cgroups) {
        // Keys in host byte order, so that `nft list` prints them right (NFTNL_UDATA_SET_KEYBYTEORDER).
        let order = [&[0, 4][..], &1_u32.to_ne_bytes()].concat();
        attributes.push((sys::NFTNL_SET_USERDATA, order));
    }
    for (number, value) in attributes {
        // SAFETY: the set is live, each value is of the type that libnftnl reads there, and it copies them.
        unsafe {
            sys::nftnl_set_set_data(object, number as u16, value.as_ptr().cast(), length_of(&value));
        }
    }
    for element in &set.elements {
        if let SetKind::Addresses { ranges: true, .. } = set.kind {
            // As sets take a range: its first key, and where there is one, the key behind its last.
            add_element(&mut message, &element.key, &Value::None, false);
            if let Some(behind) = key_behind(&element.last) {
                add_element(&mut message, &behind, &Value::None, true);
            }
        } else {
            add_element(&mut message, &element.key, &element.value, false);
        }
    }
    message
}

/// Adds an element, or the end of a range.
fn add_element(set: &mut NlSet<'_, AnyKey>, key: &[u8], value: &Value, ends: bool) {
    let (chain, code) = match value {
        Value::None => (None, None),
        Value::Goto(chain) => (Some(text(chain)), Some(libc::NFT_GOTO.to_ne_bytes())),
        Value::Jump(chain) => (Some(text(chain)), Some(libc::NFT_JUMP.to_ne_bytes())),
    };
    let chain = chain.as_deref().map(CStr::to_bytes_with_nul);
    let flags = INTERVAL_END.to_ne_bytes();
    let attributes = [
        (sys::NFTNL_SET_ELEM_KEY, Some(within_registers(key))),
        (sys::NFTNL_SET_ELEM_FLAGS, ends.then_some(&flags[..])),
        (sys::NFTNL_SET_ELEM_VERDICT, code.as_ref().map(|code| &code[..])),
        (sys::NFTNL_SET_ELEM_CHAIN, chain),
    ];
    // SAFETY: each value is of the type that libnftnl reads there, or no longer than its room for bytes; it copies
    // them. The set, which is live, takes the element over.
    unsafe {
        let element = Owned::new(sys::nftnl_set_elem_alloc(), |it| sys::nftnl_set_elem_free(it));
        for (number, value) in attributes {
            if let Some(value) = value {
                sys::nftnl_set_elem_set(element.as_ptr(), number as u16, value.as_ptr().cast(), length_of(value));
            }
        }
        sys::nftnl_set_elem_add(set.as_ptr().as_ptr(), element.into_raw().as_ptr());
    }
}

/// The next greater key of the same length.
pub(super) fn key_behind(key: &[u8]) -> Option<Vec<u8>> {
    let mut next = key.to_vec();
    for byte in next.iter_mut().rev() {
        let (sum, overflows) = byte.overflowing_add(1);
        *byte = sum;
        if !overflows {
            return Some(next);
        }
    }
    None
}

/// A named counter.
pub(super) struct Counter<'t> {
    pub(super) table: &'t Table,
    pub(super) name: CString,
    pub(super) packets: u64,
}

// SAFETY: writes one message of libnftnl's, no larger than its largest.
unsafe impl NlMsg for Counter<'_> {
    unsafe fn write(&self, buffer: *mut c_void, sequence: u32, kind: MsgType) {
        let (message, flags) = match kind {
            MsgType::Add => (libc::NFT_MSG_NEWOBJ, libc::NLM_F_CREATE | libc::NLM_F_ACK),
            MsgType::Del => (libc::NFT_MSG_DELOBJ, libc::NLM_F_ACK),
        };
        // SAFETY: the caller gives room for the largest message; the object is live, and texts are copied.
        unsafe {
            let header = sys::nftnl_nlmsg_build_hdr(buffer.cast(), message as u16, INET.into(), flags as u16, sequence);
            let owned = Owned::new(sys::nftnl_obj_alloc(), |it| sys::nftnl_obj_free(it));
            let object = owned.as_ptr();
            sys::nftnl_obj_set_str(object, sys::NFTNL_OBJ_TABLE as u16, self.table.get_name().as_ptr());
            sys::nftnl_obj_set_str(object, sys::NFTNL_OBJ_NAME as u16, self.name.as_ptr());
            sys::nftnl_obj_set_u32(object, sys::NFTNL_OBJ_TYPE as u16, NFT_OBJECT_COUNTER);
            sys::nftnl_obj_set_u64(object, sys::NFTNL_OBJ_CTR_PKTS as u16, self.packets);
            sys::nftnl_obj_set_u64(object, sys::NFTNL_OBJ_CTR_BYTES as u16, 0);
            sys::nftnl_obj_nlmsg_build_payload(header, object);
        }
    }
}
