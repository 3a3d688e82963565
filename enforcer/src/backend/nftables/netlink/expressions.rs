//! `Expression` ⇄ what libnftnl makes of it.

use std::{ffi::CStr, ptr::NonNull};

use nftnl::{Rule as NlRule, expr::Expression as NlExpression, nftnl_sys as sys};

use super::{
    NFT_OBJECT_COUNTER,
    dumps::{copied, owned},
    length_of, text,
};
use crate::backend::nftables::expression::{Expression, REGISTER, Verdict};

/// `NFT_REJECT_TCP_RST` and `NFT_REJECT_ICMPX_UNREACH`.
const TCP_RESET: u32 = 1;
const ICMPX_UNREACHABLE: u32 = 2;
/// `NFT_SOCKET_CGROUPV2`.
const SOCKET_CGROUP2: u32 = 3;
/// `NFT_REJECT_ICMPX_PORT_UNREACH` and `NFT_REJECT_ICMPX_ADMIN_PROHIBITED`.
const ICMPX_PORT: u8 = 1;
const ICMPX_PROHIBITED: u8 = 3;

/// An attribute of an expression, as libnftnl takes it.
pub(super) enum Attribute {
    U8(u8),
    U16(u16),
    U32(u32),
    U64(u64),
    Bytes(Vec<u8>),
    Text(String),
}

/// An expression of ours as libnftnl's.
pub(in crate::backend::nftables) struct Raw<'a>(pub(in crate::backend::nftables) &'a Expression);

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
pub(super) fn attributes(expression: &Expression) -> (&'static CStr, Vec<(u32, Attribute)>) {
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
                (sys::NFTNL_EXPR_SOCKET_KEY, U32(SOCKET_CGROUP2)),
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
            let (kind, code) = if *reset {
                (TCP_RESET, 0)
            } else {
                (ICMPX_UNREACHABLE, ICMPX_PORT)
            };
            (
                c"reject",
                vec![
                    (sys::NFTNL_EXPR_REJECT_TYPE, U32(kind)),
                    (sys::NFTNL_EXPR_REJECT_CODE, U8(code)),
                ],
            )
        }
        Expression::Prohibit => (
            c"reject",
            vec![
                (sys::NFTNL_EXPR_REJECT_TYPE, U32(ICMPX_UNREACHABLE)),
                (sys::NFTNL_EXPR_REJECT_CODE, U8(ICMPX_PROHIBITED)),
            ],
        ),
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
pub(super) unsafe fn expressions(rule: *mut sys::nftnl_rule) -> Vec<Expression> {
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
pub(super) unsafe fn expression_of(expression: *mut sys::nftnl_expr) -> Expression {
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
    // Ours work on the first register alone; what works on another means something else.
    let in_place = |attribute: u32| number(attribute) == REGISTER;
    let name = word(sys::NFTNL_EXPR_NAME);
    let found = match name.as_str() {
        "meta" if has(sys::NFTNL_EXPR_META_DREG) => Some(Expression::Meta {
            key: number(sys::NFTNL_EXPR_META_KEY),
            register: number(sys::NFTNL_EXPR_META_DREG),
        }),
        "payload" if has(sys::NFTNL_EXPR_PAYLOAD_DREG) => Some(Expression::Payload {
            base: number(sys::NFTNL_EXPR_PAYLOAD_BASE),
            offset: number(sys::NFTNL_EXPR_PAYLOAD_OFFSET),
            length: number(sys::NFTNL_EXPR_PAYLOAD_LEN),
            register: number(sys::NFTNL_EXPR_PAYLOAD_DREG),
        }),
        "bitwise"
            if in_place(sys::NFTNL_EXPR_BITWISE_SREG)
                && in_place(sys::NFTNL_EXPR_BITWISE_DREG)
                && number(sys::NFTNL_EXPR_BITWISE_OP) == 0
                && bytes(sys::NFTNL_EXPR_BITWISE_XOR).iter().all(|byte| *byte == 0) =>
        {
            Some(Expression::Mask(bytes(sys::NFTNL_EXPR_BITWISE_MASK)))
        }
        "cmp" if in_place(sys::NFTNL_EXPR_CMP_SREG) && number(sys::NFTNL_EXPR_CMP_OP) <= 1 => {
            Some(Expression::Compare {
                equal: number(sys::NFTNL_EXPR_CMP_OP) == 0,
                value: bytes(sys::NFTNL_EXPR_CMP_DATA),
            })
        }
        "lookup"
            if in_place(sys::NFTNL_EXPR_LOOKUP_SREG)
                && !(has(sys::NFTNL_EXPR_LOOKUP_FLAGS) && number(sys::NFTNL_EXPR_LOOKUP_FLAGS) != 0) =>
        {
            Some(Expression::Lookup {
                set: word(sys::NFTNL_EXPR_LOOKUP_SET),
                value: has(sys::NFTNL_EXPR_LOOKUP_DREG).then(|| number(sys::NFTNL_EXPR_LOOKUP_DREG)),
            })
        }
        "socket" if number(sys::NFTNL_EXPR_SOCKET_KEY) == SOCKET_CGROUP2 && in_place(sys::NFTNL_EXPR_SOCKET_DREG) => {
            Some(Expression::Cgroup {
                level: number(sys::NFTNL_EXPR_SOCKET_LEVEL),
            })
        }
        // A limit or a quota narrows a rule, and may be named so, too.
        "objref"
            if has(sys::NFTNL_EXPR_OBJREF_IMM_TYPE)
                && number(sys::NFTNL_EXPR_OBJREF_IMM_TYPE) == NFT_OBJECT_COUNTER =>
        {
            Some(Expression::Count(word(sys::NFTNL_EXPR_OBJREF_IMM_NAME)))
        }
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
        "reject" => {
            // SAFETY: as above.
            let code = unsafe { sys::nftnl_expr_get_u8(expression, sys::NFTNL_EXPR_REJECT_CODE as u16) };
            match (number(sys::NFTNL_EXPR_REJECT_TYPE), code) {
                (TCP_RESET, _) => Some(Expression::Reject { reset: true }),
                (ICMPX_UNREACHABLE, ICMPX_PORT) => Some(Expression::Reject { reset: false }),
                (ICMPX_UNREACHABLE, ICMPX_PROHIBITED) => Some(Expression::Prohibit),
                (..) => None,
            }
        }
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
