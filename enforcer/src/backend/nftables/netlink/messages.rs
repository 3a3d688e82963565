//! `Image` → the messages of one transaction, each with a name.

use std::{
    collections::BTreeMap,
    ffi::{CString, c_void},
};

use nftnl::{
    Batch, MsgType, NlMsg, ProtoFamily, Rule as NlRule, Table, nftnl_sys as sys,
    set::{Set as NlSet, SetKey},
};

use super::{INET, NFT_OBJECT_COUNTER, expressions::Raw, length_of, text};
use crate::backend::nftables::{
    expression::IPV4,
    image::{Base, Chain, Element, Image, Set, SetKind, Value},
};

/// `NFT_SET_ELEM_INTERVAL_END`.
pub(super) const INTERVAL_END: u32 = 1;

/// A batch whose steps have names, for messages.
pub(in crate::backend::nftables) struct Steps {
    pub(super) batch: Batch,
    pub(super) names: BTreeMap<u32, String>,
}

impl Steps {
    pub(in crate::backend::nftables) fn new() -> Self {
        Self {
            batch: Batch::new(),
            names: BTreeMap::new(),
        }
    }

    pub(in crate::backend::nftables) fn add<T: NlMsg>(&mut self, name: &str, message: &T, kind: MsgType) {
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

/// Removes a thing only where nothing is in it and nothing refers to it: without `NLM_F_NONREC` the kernel removes what is in it, too.
pub(in crate::backend::nftables) struct IfEmpty<'a, T>(pub(in crate::backend::nftables) &'a T);

// SAFETY: hands on to the message's own implementation, which writes a netlink header first.
unsafe impl<T: NlMsg> NlMsg for IfEmpty<'_, T> {
    unsafe fn write(&self, buffer: *mut c_void, sequence: u32, kind: MsgType) {
        // SAFETY: as promised by our caller; the header is at the buffer's start, which is aligned for it.
        unsafe {
            self.0.write(buffer, sequence, kind);
            (*buffer.cast::<libc::nlmsghdr>()).nlmsg_flags |= libc::NLM_F_NONREC as u16;
        }
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

pub(in crate::backend::nftables) fn chain_message<'t>(
    table: &'t Table,
    name: &str,
    base: Option<Base>,
) -> nftnl::Chain<'t> {
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
        SetKind::Addresses { family } => {
            (key, length) = if family == IPV4 {
                (IPV4_ADDR, 4)
            } else {
                (IPV6_ADDR, 16)
            };
            flags |= libc::NFT_SET_INTERVAL;
        }
        SetKind::Ports => {
            (key, length) = (SERVICE, 2);
            flags |= libc::NFT_SET_MAP;
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
        // A range of addresses is two elements to the kernel.
        let elements = match set.kind {
            SetKind::Addresses { .. } => set.elements.len() * 2,
            SetKind::Endpoints { .. } | SetKind::Ports | SetKind::Users | SetKind::Cgroups => set.elements.len(),
        };
        let size = u32::try_from(elements.max(16)).unwrap_or(u32::MAX);
        number(sys::NFTNL_SET_DESC_SIZE, size);
        if let Some((kind, length)) = data {
            number(sys::NFTNL_SET_DATA_TYPE, kind);
            number(sys::NFTNL_SET_DATA_LEN, length);
        }
        if let SetKind::Endpoints { family, ranges: true } = set.kind {
            let parts: [u8; 3] = [if family == IPV4 { 4 } else { 16 }, 1, 2];
            sys::nftnl_set_set_data(object, sys::NFTNL_SET_DESC_CONCAT as u16, parts.as_ptr().cast(), 3);
        }
        if matches!(set.kind, SetKind::Users | SetKind::Cgroups) {
            // Keys in host byte order, so that `nft list` prints them right (NFTNL_UDATA_SET_KEYBYTEORDER).
            let mut order = vec![0_u8, 4];
            order.extend(1_u32.to_ne_bytes());
            sys::nftnl_set_set_data(object, sys::NFTNL_SET_USERDATA as u16, order.as_ptr().cast(), 6);
        }
        for element in &set.elements {
            if let SetKind::Addresses { .. } = set.kind {
                for bound in bounds(element) {
                    sys::nftnl_set_elem_add(object, bound);
                }
            } else {
                sys::nftnl_set_elem_add(object, element_message(element));
            }
        }
    }
    message
}

pub(super) fn element_message(element: &Element) -> *mut sys::nftnl_set_elem {
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

/// A range as sets without a concatenation take it: its first key, and where there is one, the key behind its last.
fn bounds(range: &Element) -> Vec<*mut sys::nftnl_set_elem> {
    let first = Element {
        key: range.key.clone(),
        last: Vec::new(),
        value: Value::None,
    };
    let behind = key_behind(&range.last).map(|key| Element { key, ..first.clone() });
    let mut all = vec![element_message(&first)];
    all.extend(behind.map(|behind| {
        let object = element_message(&behind);
        // SAFETY: the element has just been made.
        unsafe { sys::nftnl_set_elem_set_u32(object, sys::NFTNL_SET_ELEM_FLAGS as u16, INTERVAL_END) };
        object
    }));
    all
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
