//! Attributes of netlink messages as the kernel nests them, read without unsafe code.
//!
//! Not by the types of netlink-packet-netfilter: it has none for half of our expressions, and formats a whole list as
//! text for each element of it (`VecListAttribute::parse` in 0.4.0), which is minutes for 100,000.

use std::ffi::CStr;

use netlink_packet_core::{NLA_HEADER_SIZE, NlaBuffer, NlasIterator};

/// Attributes, one behind the other. What is absent or too short reads as nothing or zero; whoever must tell them apart
/// asks `has`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Attributes<'a> {
    /// The values of those with a number, in order.
    fn all(self, number: u16) -> impl Iterator<Item = &'a [u8]> {
        let all = NlasIterator::new(self.0).map_while(Result::ok);
        all.filter(move |attribute| attribute.kind() == number).map(value)
    }

    fn find(self, number: u16) -> Option<&'a [u8]> {
        self.all(number).next()
    }

    pub(crate) fn has(self, number: u16) -> bool {
        self.find(number).is_some()
    }

    pub(crate) fn bytes(self, number: u16) -> &'a [u8] {
        self.find(number).unwrap_or_default()
    }

    /// The attributes within one.
    pub(crate) fn inside(self, number: u16) -> Self {
        Self(self.bytes(number))
    }

    /// The attributes within each of a list's elements.
    pub(crate) fn list(self, number: u16) -> impl Iterator<Item = Self> {
        self.inside(number).all(nfta::LIST_ELEM).map(Self)
    }

    pub(crate) fn fixed<const LENGTH: usize>(self, number: u16) -> [u8; LENGTH] {
        self.bytes(number).first_chunk().copied().unwrap_or([0; LENGTH])
    }

    pub(crate) fn number(self, number: u16) -> u32 {
        u32::from_be_bytes(self.fixed(number))
    }

    /// Up to the zero that ends it.
    pub(crate) fn text(self, number: u16) -> String {
        let bytes = self.bytes(number);
        let text = CStr::from_bytes_until_nul(bytes).map_or(bytes, CStr::to_bytes);
        String::from_utf8_lossy(text).into_owned()
    }

    /// The bytes that a register is to hold or be compared with.
    pub(crate) fn data(self, number: u16) -> Vec<u8> {
        self.inside(number).bytes(nfta::DATA_VALUE).to_vec()
    }
}

fn value(attribute: NlaBuffer<&[u8]>) -> &[u8] {
    let end = attribute.length().into();
    attribute.into_inner().get(NLA_HEADER_SIZE..end).unwrap_or_default()
}

/// Numbers of attributes, without `NFTA_` (`linux/netfilter/nf_tables.h` and `nf_tables_compat.h`).
pub(crate) mod nfta {
    pub(crate) const LIST_ELEM: u16 = 1;
    pub(crate) const GEN_ID: u16 = 1;
    pub(crate) const TABLE_NAME: u16 = 1;
    pub(crate) const TABLE_FLAGS: u16 = 2;
    pub(crate) const CHAIN_TABLE: u16 = 1;
    pub(crate) const CHAIN_NAME: u16 = 3;
    pub(crate) const CHAIN_HOOK: u16 = 4;
    pub(crate) const CHAIN_POLICY: u16 = 5;
    pub(crate) const HOOK_HOOKNUM: u16 = 1;
    pub(crate) const HOOK_PRIORITY: u16 = 2;
    pub(crate) const RULE_TABLE: u16 = 1;
    pub(crate) const RULE_CHAIN: u16 = 2;
    pub(crate) const RULE_HANDLE: u16 = 3;
    pub(crate) const RULE_EXPRESSIONS: u16 = 4;
    pub(crate) const RULE_USERDATA: u16 = 7;
    pub(crate) const SET_TABLE: u16 = 1;
    pub(crate) const SET_NAME: u16 = 2;
    pub(crate) const SET_FLAGS: u16 = 3;
    pub(crate) const SET_KEY_TYPE: u16 = 4;
    pub(crate) const SET_KEY_LEN: u16 = 5;
    pub(crate) const SET_ELEM_LIST_TABLE: u16 = 1;
    pub(crate) const SET_ELEM_LIST_SET: u16 = 2;
    pub(crate) const SET_ELEM_LIST_ELEMENTS: u16 = 3;
    pub(crate) const SET_ELEM_KEY: u16 = 1;
    pub(crate) const SET_ELEM_DATA: u16 = 2;
    pub(crate) const SET_ELEM_FLAGS: u16 = 3;
    pub(crate) const OBJ_TABLE: u16 = 1;
    pub(crate) const OBJ_NAME: u16 = 2;
    pub(crate) const OBJ_TYPE: u16 = 3;
    pub(crate) const OBJ_DATA: u16 = 4;
    pub(crate) const COUNTER_PACKETS: u16 = 2;
    pub(crate) const DATA_VALUE: u16 = 1;
    pub(crate) const DATA_VERDICT: u16 = 2;
    pub(crate) const VERDICT_CODE: u16 = 1;
    pub(crate) const VERDICT_CHAIN: u16 = 2;
    pub(crate) const EXPR_NAME: u16 = 1;
    pub(crate) const EXPR_DATA: u16 = 2;
    pub(crate) const META_DREG: u16 = 1;
    pub(crate) const META_KEY: u16 = 2;
    pub(crate) const PAYLOAD_DREG: u16 = 1;
    pub(crate) const PAYLOAD_BASE: u16 = 2;
    pub(crate) const PAYLOAD_OFFSET: u16 = 3;
    pub(crate) const PAYLOAD_LEN: u16 = 4;
    pub(crate) const BITWISE_SREG: u16 = 1;
    pub(crate) const BITWISE_DREG: u16 = 2;
    pub(crate) const BITWISE_MASK: u16 = 4;
    pub(crate) const BITWISE_XOR: u16 = 5;
    pub(crate) const BITWISE_OP: u16 = 6;
    pub(crate) const CMP_SREG: u16 = 1;
    pub(crate) const CMP_OP: u16 = 2;
    pub(crate) const CMP_DATA: u16 = 3;
    pub(crate) const LOOKUP_SET: u16 = 1;
    pub(crate) const LOOKUP_SREG: u16 = 2;
    pub(crate) const LOOKUP_DREG: u16 = 3;
    pub(crate) const LOOKUP_FLAGS: u16 = 5;
    pub(crate) const SOCKET_KEY: u16 = 1;
    pub(crate) const SOCKET_DREG: u16 = 2;
    pub(crate) const SOCKET_LEVEL: u16 = 3;
    pub(crate) const OBJREF_IMM_TYPE: u16 = 1;
    pub(crate) const OBJREF_IMM_NAME: u16 = 2;
    pub(crate) const LIMIT_RATE: u16 = 1;
    pub(crate) const LIMIT_BURST: u16 = 3;
    pub(crate) const LOG_GROUP: u16 = 1;
    pub(crate) const LOG_PREFIX: u16 = 2;
    pub(crate) const REJECT_TYPE: u16 = 1;
    pub(crate) const REJECT_ICMP_CODE: u16 = 2;
    pub(crate) const IMMEDIATE_DREG: u16 = 1;
    pub(crate) const IMMEDIATE_DATA: u16 = 2;
    pub(crate) const NAT_TYPE: u16 = 1;
    pub(crate) const NAT_REG_ADDR_MIN: u16 = 3;
    pub(crate) const NAT_REG_PROTO_MIN: u16 = 5;
    pub(crate) const REDIR_REG_PROTO_MIN: u16 = 1;
    pub(crate) const MATCH_NAME: u16 = 1;
    pub(crate) const TARGET_NAME: u16 = 1;
    pub(crate) const TARGET_REV: u16 = 2;
    pub(crate) const TARGET_INFO: u16 = 3;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_absent_or_cut_short_reads_as_nothing() {
        // Number 1: two bytes and padding; 2 (nested): number 1, four bytes; 3: a text; then one that claims more than
        // is there.
        let mut bytes = vec![6, 0, 1, 0, 0xab, 0xcd, 0, 0, 12, 0, 2, 0x80, 8, 0, 1, 0, 0, 0, 1, 2];
        bytes.extend([7, 0, 3, 0, b'a', 0, b'b', 0, 200, 0, 4, 0, 1, 2, 3, 4]);
        for length in 0..=bytes.len() {
            let all = Attributes(bytes.get(..length).unwrap_or_default());
            assert_eq!(all.bytes(1), if length < 6 { &[][..] } else { &[0xab, 0xcd] });
            assert_eq!(all.number(1), 0, "too short for a number");
            assert_eq!(all.inside(2).number(1), if length < 20 { 0 } else { 0x0102 });
            assert_eq!(all.list(2).count(), usize::from(length >= 20));
            assert_eq!(all.text(3), if length < 27 { "" } else { "a" });
            assert!(!all.has(4) && !all.has(5));
        }
    }
}
