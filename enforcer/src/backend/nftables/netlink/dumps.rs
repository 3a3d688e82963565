//! Kernel → `Dump`: a table read back, at one generation of all of `nf_tables`.

use std::{collections::BTreeMap, io};

use netlink_packet_core::NLM_F_DUMP;

use super::{
    Dump, INET, NFT_OBJECT_COUNTER, Netlink,
    attributes::{Attributes, nfta},
    expressions::expressions,
    messages::{INTERVAL_END, IPV4_ADDR},
};
use crate::backend::nftables::{
    expression::{IPV4, IPV6},
    image::{Base, Chain, Element, Rule, Set, SetKind, Value},
};

/// A rule as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DumpedRule {
    /// The chain that it is in.
    pub(crate) chain: String,
    /// What the kernel calls it, for as long as it is there.
    pub(crate) handle: u64,
    /// What it says.
    pub(crate) rule: Rule,
}

impl Netlink {
    /// The generation of all of `nf_tables`.
    pub(crate) fn genid(&mut self) -> io::Result<u32> {
        let mut found = None;
        self.ask(INET, libc::NFT_MSG_GETGEN, 0, &[], |_, genid| {
            found = Some(genid.number(nfta::GEN_ID));
        })?;
        found.ok_or_else(|| io::Error::other("nf_tables did not report its generation"))
    }

    /// Reads a table back; none if there is none.
    pub(crate) fn read(&mut self, table: &str) -> io::Result<Option<Dump>> {
        self.read_with(table, true)
    }

    /// As [`Netlink::read`], but for elements of sets: reading large ones takes long.
    pub(crate) fn read_without_elements(&mut self, table: &str) -> io::Result<Option<Dump>> {
        self.read_with(table, false)
    }

    fn read_with(&mut self, table: &str, elements: bool) -> io::Result<Option<Dump>> {
        let (mut found, genid) = self.at_one_generation(|netlink| netlink.read_once(table, elements))?;
        if let Some(dump) = &mut found {
            dump.genid = genid;
        }
        Ok(found)
    }

    /// Reads with several requests until all of them were answered at one generation, which is returned too.
    pub(crate) fn at_one_generation<T>(&mut self, read: impl Fn(&mut Self) -> io::Result<T>) -> io::Result<(T, u32)> {
        for _ in 0..100 {
            let before = self.genid()?;
            match read(self) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Gone between two requests: look again.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) && self.genid()? != before => {}
                found => {
                    let found = found?;
                    if self.genid()? == before {
                        return Ok((found, before));
                    }
                }
            }
        }
        Err(io::Error::other("nf_tables changed again and again while it was read"))
    }

    fn read_once(&mut self, table: &str, with_elements: bool) -> io::Result<Option<Dump>> {
        let Some(dormant) = self.table(table)? else {
            return Ok(None);
        };
        let mut dump = Dump {
            dormant,
            ..Dump::default()
        };
        dump.image.chains = self.chains(table)?;
        for DumpedRule { chain, rule, .. } in self.rules(table, None)? {
            dump.image.chains.entry(chain).or_default().rules.push(rule);
        }
        for (name, kind) in self.sets(table)? {
            let mut elements = Vec::new();
            if with_elements {
                elements = self.elements(table, &name, kind)?;
                elements.sort_unstable();
            }
            dump.image.sets.insert(name, Set { kind, elements });
        }
        dump.counts = self.counters(table)?;
        dump.image.counters = dump.counts.keys().cloned().collect();
        Ok(Some(dump))
    }

    /// Whether a table is there, and if so, whether it is dormant. Asked by its name: a list of all is interrupted by
    /// whoever makes another one.
    pub(crate) fn table(&mut self, table: &str) -> io::Result<Option<bool>> {
        let (name, mut found) = ([(nfta::TABLE_NAME, table)], None);
        let asked = self.ask(INET, libc::NFT_MSG_GETTABLE, 0, &name, |_, object| {
            found = Some(object.number(nfta::TABLE_FLAGS) & 1 != 0);
        });
        match asked {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            asked => asked.map(|()| found),
        }
    }

    pub(crate) fn chains(&mut self, table: &str) -> io::Result<BTreeMap<String, Chain>> {
        let mut found = BTreeMap::new();
        self.dump(libc::NFT_MSG_GETCHAIN, &[], |chain| {
            if chain.text(nfta::CHAIN_TABLE) == table {
                let hook = chain.inside(nfta::CHAIN_HOOK);
                let base = hook.has(nfta::HOOK_HOOKNUM).then(|| Base {
                    hook: hook.number(nfta::HOOK_HOOKNUM),
                    priority: hook.number(nfta::HOOK_PRIORITY).cast_signed(),
                    accepts: chain.number(nfta::CHAIN_POLICY) == libc::NF_ACCEPT.unsigned_abs(),
                });
                let rules = Vec::new();
                found.insert(chain.text(nfta::CHAIN_NAME), Chain { base, rules });
            }
        })?;
        Ok(found)
    }

    /// The rules of a table, or of one chain of it.
    pub(crate) fn rules(&mut self, table: &str, chain: Option<&str>) -> io::Result<Vec<DumpedRule>> {
        let mut found = Vec::new();
        let within = [
            Some((nfta::RULE_TABLE, table)),
            chain.map(|chain| (nfta::RULE_CHAIN, chain)),
        ];
        let within: Vec<_> = within.into_iter().flatten().collect();
        self.dump(libc::NFT_MSG_GETRULE, &within, |rule| {
            let name = rule.text(nfta::RULE_CHAIN);
            if rule.text(nfta::RULE_TABLE) == table && chain.is_none_or(|chain| chain == name) {
                found.push(DumpedRule {
                    chain: name,
                    handle: u64::from_be_bytes(rule.fixed(nfta::RULE_HANDLE)),
                    rule: Rule {
                        comment: comment(rule.bytes(nfta::RULE_USERDATA)),
                        expressions: expressions(rule),
                    },
                });
            }
        })?;
        Ok(found)
    }

    fn sets(&mut self, table: &str) -> io::Result<Vec<(String, SetKind)>> {
        let mut found = Vec::new();
        self.dump(libc::NFT_MSG_GETSET, &[(nfta::SET_TABLE, table)], |set| {
            if set.text(nfta::SET_TABLE) == table {
                let ranges = set.number(nfta::SET_FLAGS) & libc::NFT_SET_INTERVAL.unsigned_abs() != 0;
                let is_map = set.number(nfta::SET_FLAGS) & libc::NFT_SET_MAP.unsigned_abs() != 0;
                let kind = match (set.number(nfta::SET_KEY_LEN), set.number(nfta::SET_KEY_TYPE)) {
                    (2, _) => SetKind::Ports,
                    (4, IPV4_ADDR) => SetKind::Addresses { family: IPV4, ranges },
                    (4, _) => SetKind::Users,
                    (8, _) if is_map => SetKind::Services,
                    (8, _) => SetKind::Cgroups,
                    (..) => SetKind::Addresses { family: IPV6, ranges },
                };
                found.push((set.text(nfta::SET_NAME), kind));
            }
        })?;
        Ok(found)
    }

    fn elements(&mut self, table: &str, set: &str, kind: SetKind) -> io::Result<Vec<Element>> {
        let (mut found, mut bounds) = (Vec::new(), Vec::new());
        let within = [(nfta::SET_ELEM_LIST_TABLE, table), (nfta::SET_ELEM_LIST_SET, set)];
        self.dump(libc::NFT_MSG_GETSETELEM, &within, |message| {
            for object in message.list(nfta::SET_ELEM_LIST_ELEMENTS) {
                if let SetKind::Addresses { ranges: true, .. } = kind {
                    let ends = object.number(nfta::SET_ELEM_FLAGS) & INTERVAL_END != 0;
                    bounds.push((object.data(nfta::SET_ELEM_KEY), ends));
                } else {
                    found.push(element(object, kind));
                }
            }
        })?;
        found.extend(ranges_of(bounds));
        Ok(found)
    }

    /// Packets of each counter of a table.
    pub(crate) fn counters(&mut self, table: &str) -> io::Result<BTreeMap<String, u64>> {
        let mut found = BTreeMap::new();
        self.dump(libc::NFT_MSG_GETOBJ, &[(nfta::OBJ_TABLE, table)], |object| {
            if object.text(nfta::OBJ_TABLE) == table && object.number(nfta::OBJ_TYPE) == NFT_OBJECT_COUNTER {
                let packets = object.inside(nfta::OBJ_DATA).fixed(nfta::COUNTER_PACKETS);
                found.insert(object.text(nfta::OBJ_NAME), u64::from_be_bytes(packets));
            }
        })?;
        Ok(found)
    }

    /// Asks for everything of a kind in tables of family inet, or in what is named, and hands it on.
    fn dump(&mut self, kind: i32, within: &[(u16, &str)], mut each: impl FnMut(Attributes<'_>)) -> io::Result<()> {
        self.ask(INET, kind, NLM_F_DUMP, within, |_, object| each(object))
    }
}

pub(super) fn element(object: Attributes<'_>, kind: SetKind) -> Element {
    let value = match kind {
        SetKind::Addresses { .. } | SetKind::Users | SetKind::Cgroups => Value::None,
        SetKind::Services | SetKind::Ports => {
            let verdict = object.inside(nfta::SET_ELEM_DATA).inside(nfta::DATA_VERDICT);
            let chain = verdict.text(nfta::VERDICT_CHAIN);
            // Any other verdict is none of ours.
            match verdict.number(nfta::VERDICT_CODE).cast_signed() {
                libc::NFT_GOTO => Value::Goto(chain),
                libc::NFT_JUMP => Value::Jump(chain),
                code => Value::Goto(format!("verdict {code} {chain}")),
            }
        }
    };
    Element {
        key: object.data(nfta::SET_ELEM_KEY),
        last: Vec::new(),
        value,
    }
}

/// Ranges by their bounds: first keys, and keys behind the last ones, which are marked. One without a first key is none
/// of ours.
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

/// Of what nft keeps beside a rule: type, length, text, zero (`NFTNL_UDATA_RULE_COMMENT` is 0).
fn comment(data: &[u8]) -> String {
    match data {
        [0, length, rest @ ..] => {
            let text = rest.get(..usize::from(*length)).unwrap_or_default();
            String::from_utf8_lossy(text.strip_suffix(&[0]).unwrap_or(text)).into_owned()
        }
        _ => String::new(),
    }
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
