//! Kernel → `Dump`: a table read back, at one generation of all of `nf_tables`.

use std::{
    collections::BTreeMap,
    ffi::{CStr, c_void},
    io,
};

use nftnl::nftnl_sys as sys;

use super::{Dump, INET, NFT_OBJECT_COUNTER, Netlink, expressions::expressions, messages::INTERVAL_END, text};
use crate::backend::nftables::{
    expression::{IPV4, IPV6},
    image::{Base, Chain, Element, Rule, Set, SetKind, Value},
};

/// A rule as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::backend::nftables) struct Found {
    /// The chain that it is in.
    pub(in crate::backend::nftables) chain: String,
    /// What the kernel calls it, for as long as it is there.
    pub(in crate::backend::nftables) handle: u64,
    /// What it says.
    pub(in crate::backend::nftables) rule: Rule,
}

impl Netlink {
    /// The generation of all of `nf_tables`.
    pub(crate) fn generation(&mut self) -> io::Result<u32> {
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

    /// Reads a table back; none if there is none.
    pub(crate) fn read(&mut self, table: &str) -> io::Result<Option<Dump>> {
        let (mut found, generation) = self.at_one_generation(|netlink| netlink.read_once(table))?;
        if let Some(dump) = &mut found {
            dump.generation = generation;
        }
        Ok(found)
    }

    /// Reads with several requests until all of them were answered at one generation, which is returned too.
    pub(in crate::backend::nftables) fn at_one_generation<T>(
        &mut self,
        read: impl Fn(&mut Self) -> io::Result<T>,
    ) -> io::Result<(T, u32)> {
        for _ in 0..100 {
            let before = self.generation()?;
            match read(self) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Gone between two requests: look again.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) && self.generation()? != before => {}
                found => {
                    let found = found?;
                    if self.generation()? == before {
                        return Ok((found, before));
                    }
                }
            }
        }
        Err(io::Error::other("nf_tables changed again and again while it was read"))
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
        for Found { chain, rule, .. } in self.rules(table, None)? {
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

    /// Whether a table is there, and if so, whether it is dormant.
    pub(in crate::backend::nftables) fn table(&mut self, table: &str) -> io::Result<Option<bool>> {
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

    pub(in crate::backend::nftables) fn chains(&mut self, table: &str) -> io::Result<BTreeMap<String, Chain>> {
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

    /// The rules of a table, or of one chain of it.
    pub(in crate::backend::nftables) fn rules(&mut self, table: &str, chain: Option<&str>) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        let (name, only) = (text(table), chain.map(text));
        let fill = |header| {
            // SAFETY: allocated, filled, written to a message of the largest size, freed.
            unsafe {
                let object = sys::nftnl_rule_alloc();
                sys::nftnl_rule_set_str(object, sys::NFTNL_RULE_TABLE as u16, name.as_ptr());
                if let Some(only) = &only {
                    sys::nftnl_rule_set_str(object, sys::NFTNL_RULE_CHAIN as u16, only.as_ptr());
                }
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
                    let name = owned(sys::nftnl_rule_get_str(object, sys::NFTNL_RULE_CHAIN as u16));
                    if chain.is_none_or(|chain| chain == name) {
                        found.push(Found {
                            chain: name,
                            handle: sys::nftnl_rule_get_u64(object, sys::NFTNL_RULE_HANDLE as u16),
                            rule: Rule {
                                comment: comment(object),
                                expressions: expressions(object),
                            },
                        });
                    }
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
                    let ranges = number(sys::NFTNL_SET_FLAGS) & libc::NFT_SET_INTERVAL as u32 != 0;
                    let kind = match (number(sys::NFTNL_SET_KEY_LEN), ranges) {
                        (4, true) => SetKind::Addresses { family: IPV4 },
                        (16, true) => SetKind::Addresses { family: IPV6 },
                        (2, _) => SetKind::Ports,
                        (4, false) => SetKind::Users,
                        (8, _) => SetKind::Cgroups,
                        (length, ranges) => SetKind::Endpoints {
                            family: if length == 12 { IPV4 } else { IPV6 },
                            ranges,
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
        let (mut found, mut bounds) = (Vec::new(), Vec::new());
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
                        if let SetKind::Addresses { .. } = kind {
                            bounds.push((element_of(element, kind).key, ends_range(element)));
                        } else {
                            found.push(element_of(element, kind));
                        }
                    }
                    sys::nftnl_set_elems_iter_destroy(all);
                }
                sys::nftnl_set_free(object);
            }
        })?;
        found.extend(ranges_of(bounds));
        Ok(found)
    }

    /// Packets of each counter of a table.
    pub(crate) fn counters(&mut self, table: &str) -> io::Result<BTreeMap<String, u64>> {
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

/// SAFETY: `element` must be live.
unsafe fn ends_range(element: *mut sys::nftnl_set_elem) -> bool {
    const FLAGS: u16 = sys::NFTNL_SET_ELEM_FLAGS as u16;
    // SAFETY: the element is live; libnftnl reads flags that are there only.
    unsafe {
        sys::nftnl_set_elem_is_set(element, FLAGS) && sys::nftnl_set_elem_get_u32(element, FLAGS) & INTERVAL_END != 0
    }
}

/// Ranges by their bounds: first keys, and keys behind the last ones, which are marked. One without a first key is none of ours.
fn ranges_of(mut bounds: Vec<(Vec<u8>, bool)>) -> Vec<Element> {
    // Where two ranges touch, one ends before the other begins.
    bounds.sort_unstable_by(|a, b| (&a.0, !a.1).cmp(&(&b.0, !b.1)));
    let mut found: Vec<Element> = Vec::new();
    for (key, ends) in bounds {
        match found.last_mut().filter(|last| ends && last.last.is_empty()) {
            Some(open) => open.last = key_before(&key),
            None => found.push(Element {
                key,
                last: if ends { vec![0] } else { Vec::new() },
                value: Value::None,
            }),
        }
    }
    // Nothing marks the end of what reaches to the greatest key.
    if let Some(open) = found.last_mut().filter(|last| last.last.is_empty()) {
        open.last = vec![u8::MAX; open.key.len()];
    }
    found
}

/// The next smaller key of the same length.
fn key_before(key: &[u8]) -> Vec<u8> {
    let mut before = key.to_vec();
    for byte in before.iter_mut().rev() {
        let (difference, overflows) = byte.overflowing_sub(1);
        *byte = difference;
        if !overflows {
            break;
        }
    }
    before
}

/// SAFETY: `element` must be live.
pub(super) unsafe fn element_of(element: *mut sys::nftnl_set_elem, kind: SetKind) -> Element {
    let bytes = |attribute: u32| {
        let mut length = 0;
        // SAFETY: libnftnl gives a pointer to so many bytes, or null.
        unsafe {
            let found = sys::nftnl_set_elem_get(element, attribute as u16, &raw mut length);
            copied(found, length)
        }
    };
    let value = match kind {
        SetKind::Addresses { .. } | SetKind::Users | SetKind::Cgroups => Value::None,
        SetKind::Endpoints { .. } | SetKind::Ports => {
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

/// SAFETY: `rule` must be live.
pub(super) unsafe fn comment(rule: *mut sys::nftnl_rule) -> String {
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
pub(in crate::backend::nftables) unsafe fn copied(data: *const c_void, length: u32) -> Vec<u8> {
    if data.is_null() {
        return Vec::new();
    }
    // SAFETY: as promised by the caller.
    unsafe { std::slice::from_raw_parts(data.cast::<u8>(), length as usize) }.to_vec()
}

/// SAFETY: `text` must be null or a C string.
pub(in crate::backend::nftables) unsafe fn owned(text: *const std::os::raw::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as promised by the caller.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::{super::messages::key_behind, *};

    #[test]
    fn ranges_survive_their_bounds() {
        let range = |first: [u8; 2], last: [u8; 2]| Element {
            key: first.to_vec(),
            last: last.to_vec(),
            value: Value::None,
        };
        let ranges = vec![
            range([0, 0], [0, 0]),
            range([0, 9], [1, 255]),
            range([3, 4], [3, 4]),
            range([7, 0], [255, 255]),
        ];
        let mut bounds = Vec::new();
        for range in &ranges {
            bounds.push((range.key.clone(), false));
            bounds.extend(key_behind(&range.last).map(|key| (key, true)));
        }
        assert_eq!(bounds.len(), 7, "nothing lies behind the last");
        bounds.reverse();
        assert_eq!(ranges_of(bounds), ranges);
        let strange = ranges_of(vec![
            (vec![0, 1], true),
            (vec![0, 2], false),
            (vec![0, 3], false),
            (vec![0, 4], true),
        ]);
        assert_eq!(strange.len(), 3, "what is no range of ours is none of ours");
        assert!(!strange.contains(&range([0, 2], [0, 3])));
    }
}
