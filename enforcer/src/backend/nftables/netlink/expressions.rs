//! `Expression` ⇄ what the kernel makes of it.

#![allow(
    unsafe_code,
    reason = "of our expressions, the nftnl crate knows some, and none with the registers that we use"
)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "libnftnl numbers attributes in a wider type than its own functions take"
)]

use std::{ffi::CStr, ptr::NonNull};

use nftnl::{Rule as NlRule, expr::Expression as NlExpression, nftnl_sys as sys};

use super::{
    NFT_OBJECT_COUNTER,
    attributes::{Attributes, nfta},
    length_of,
    owned::Owned,
    text, within_registers,
};
use crate::backend::nftables::expression::{Expression, NftVerdict, REGISTER};

/// `NFT_REJECT_TCP_RST` and `NFT_REJECT_ICMPX_UNREACH`.
const TCP_RESET: u32 = 1;
const ICMPX_UNREACHABLE: u32 = 2;
/// `NFT_SOCKET_CGROUPV2`.
const SOCKET_CGROUP2: u32 = 3;
/// `NFT_REJECT_ICMPX_PORT_UNREACH` and `NFT_REJECT_ICMPX_ADMIN_PROHIBITED`.
const ICMPX_PORT: u8 = 1;
const ICMPX_PROHIBITED: u8 = 3;

/// An expression of ours as libnftnl's.
pub(super) struct Raw<'a>(pub(super) &'a Expression);

impl NlExpression for Raw<'_> {
    fn to_expr(&self, _: &NlRule<'_>) -> NonNull<sys::nftnl_expr> {
        let (name, attributes) = attributes(self.0);
        // SAFETY: each value is of the type that libnftnl reads there, or no longer than its room for bytes; it copies
        // them. The rule that asks for the expression takes it over.
        unsafe {
            let expression = Owned::new(sys::nftnl_expr_alloc(name.as_ptr()), |it| sys::nftnl_expr_free(it));
            for (number, value) in attributes {
                sys::nftnl_expr_set(
                    expression.as_ptr(),
                    number as u16,
                    value.as_ptr().cast(),
                    length_of(&value),
                );
            }
            expression.into_raw()
        }
    }
}

/// Its name, and its attributes as libnftnl copies them: numbers of its own types in host byte order, texts with the
/// zero behind them.
#[allow(clippy::too_many_lines, reason = "one arm an expression")]
fn attributes(expression: &Expression) -> (&'static CStr, Vec<(u32, Vec<u8>)>) {
    let number = |value: u32| value.to_ne_bytes().to_vec();
    let name = |value: &str| text(value).into_bytes_with_nul();
    match expression {
        Expression::Meta { key, register } => (
            c"meta",
            vec![
                (sys::NFTNL_EXPR_META_KEY, number(*key)),
                (sys::NFTNL_EXPR_META_DREG, number(*register)),
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
                (sys::NFTNL_EXPR_PAYLOAD_BASE, number(*base)),
                (sys::NFTNL_EXPR_PAYLOAD_OFFSET, number(*offset)),
                (sys::NFTNL_EXPR_PAYLOAD_LEN, number(*length)),
                (sys::NFTNL_EXPR_PAYLOAD_DREG, number(*register)),
            ],
        ),
        Expression::Mask(mask) => (
            c"bitwise",
            vec![
                (sys::NFTNL_EXPR_BITWISE_SREG, number(1)),
                (sys::NFTNL_EXPR_BITWISE_DREG, number(1)),
                (sys::NFTNL_EXPR_BITWISE_LEN, number(length_of(mask))),
                (sys::NFTNL_EXPR_BITWISE_MASK, within_registers(mask).to_vec()),
                (sys::NFTNL_EXPR_BITWISE_XOR, vec![0; within_registers(mask).len()]),
            ],
        ),
        Expression::Compare { equal, value } => (
            c"cmp",
            vec![
                (sys::NFTNL_EXPR_CMP_SREG, number(1)),
                (sys::NFTNL_EXPR_CMP_OP, number(u32::from(!equal))),
                (sys::NFTNL_EXPR_CMP_DATA, within_registers(value).to_vec()),
            ],
        ),
        Expression::Lookup { set, value } => {
            let mut all = vec![
                (sys::NFTNL_EXPR_LOOKUP_SREG, number(1)),
                (sys::NFTNL_EXPR_LOOKUP_SET, name(set)),
            ];
            all.extend(value.map(|register| (sys::NFTNL_EXPR_LOOKUP_DREG, number(register))));
            (c"lookup", all)
        }
        Expression::Cgroup { level } => (
            c"socket",
            vec![
                (sys::NFTNL_EXPR_SOCKET_KEY, number(SOCKET_CGROUP2)),
                (sys::NFTNL_EXPR_SOCKET_DREG, number(1)),
                (sys::NFTNL_EXPR_SOCKET_LEVEL, number(*level)),
            ],
        ),
        Expression::Count(counter) => (
            c"objref",
            vec![
                (sys::NFTNL_EXPR_OBJREF_IMM_TYPE, number(NFT_OBJECT_COUNTER)),
                (sys::NFTNL_EXPR_OBJREF_IMM_NAME, name(counter)),
            ],
        ),
        Expression::Limit { rate, burst } => (
            c"limit",
            vec![
                (sys::NFTNL_EXPR_LIMIT_RATE, rate.to_ne_bytes().to_vec()),
                (sys::NFTNL_EXPR_LIMIT_UNIT, 1_u64.to_ne_bytes().to_vec()),
                (sys::NFTNL_EXPR_LIMIT_BURST, number(*burst)),
                (sys::NFTNL_EXPR_LIMIT_TYPE, number(0)),
                (sys::NFTNL_EXPR_LIMIT_FLAGS, number(0)),
            ],
        ),
        Expression::Log { group, prefix } => (
            c"log",
            vec![
                (sys::NFTNL_EXPR_LOG_GROUP, group.to_ne_bytes().to_vec()),
                (sys::NFTNL_EXPR_LOG_PREFIX, name(prefix)),
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
                    (sys::NFTNL_EXPR_REJECT_TYPE, number(kind)),
                    (sys::NFTNL_EXPR_REJECT_CODE, vec![code]),
                ],
            )
        }
        Expression::Prohibit => (
            c"reject",
            vec![
                (sys::NFTNL_EXPR_REJECT_TYPE, number(ICMPX_UNREACHABLE)),
                (sys::NFTNL_EXPR_REJECT_CODE, vec![ICMPX_PROHIBITED]),
            ],
        ),
        Expression::Verdict(verdict) => {
            let (code, chain) = match verdict {
                NftVerdict::Accept => (libc::NF_ACCEPT, None),
                NftVerdict::Return => (libc::NFT_RETURN, None),
                NftVerdict::Jump(chain) => (libc::NFT_JUMP, Some(chain)),
                NftVerdict::Goto(chain) => (libc::NFT_GOTO, Some(chain)),
                NftVerdict::Other(code) => (*code, None),
            };
            let mut all = vec![
                (sys::NFTNL_EXPR_IMM_DREG, number(0)),
                (sys::NFTNL_EXPR_IMM_VERDICT, number(code.cast_unsigned())),
            ];
            all.extend(chain.map(|chain| (sys::NFTNL_EXPR_IMM_CHAIN, name(chain))));
            (c"immediate", all)
        }
        // Never wanted, only found.
        Expression::Other(_) => (c"notrack", Vec::new()),
    }
}

/// The name and the attributes of each of a rule's expressions.
pub(crate) fn each_expression(rule: Attributes<'_>) -> impl Iterator<Item = (String, Attributes<'_>)> {
    let all = rule.list(nfta::RULE_EXPRESSIONS);
    all.map(|one| (one.text(nfta::EXPR_NAME), one.inside(nfta::EXPR_DATA)))
}

pub(super) fn expressions(rule: Attributes<'_>) -> Vec<Expression> {
    each_expression(rule).map(|(name, of)| expression(name, of)).collect()
}

fn expression(name: String, of: Attributes<'_>) -> Expression {
    // Ours work on the first register alone; what works on another means something else.
    let in_place = |register| of.number(register) == REGISTER;
    let found = match name.as_str() {
        "meta" if of.has(nfta::META_DREG) => Some(Expression::Meta {
            key: of.number(nfta::META_KEY),
            register: of.number(nfta::META_DREG),
        }),
        "payload" if of.has(nfta::PAYLOAD_DREG) => Some(Expression::Payload {
            base: of.number(nfta::PAYLOAD_BASE),
            offset: of.number(nfta::PAYLOAD_OFFSET),
            length: of.number(nfta::PAYLOAD_LEN),
            register: of.number(nfta::PAYLOAD_DREG),
        }),
        "bitwise"
            if in_place(nfta::BITWISE_SREG)
                && in_place(nfta::BITWISE_DREG)
                && of.number(nfta::BITWISE_OP) == 0
                && of.data(nfta::BITWISE_XOR).iter().all(|byte| *byte == 0) =>
        {
            Some(Expression::Mask(of.data(nfta::BITWISE_MASK)))
        }
        "cmp" if in_place(nfta::CMP_SREG) && of.number(nfta::CMP_OP) <= 1 => Some(Expression::Compare {
            equal: of.number(nfta::CMP_OP) == 0,
            value: of.data(nfta::CMP_DATA),
        }),
        "lookup" if in_place(nfta::LOOKUP_SREG) && of.number(nfta::LOOKUP_FLAGS) == 0 => Some(Expression::Lookup {
            set: of.text(nfta::LOOKUP_SET),
            value: of.has(nfta::LOOKUP_DREG).then(|| of.number(nfta::LOOKUP_DREG)),
        }),
        "socket" if of.number(nfta::SOCKET_KEY) == SOCKET_CGROUP2 && in_place(nfta::SOCKET_DREG) => {
            let level = of.number(nfta::SOCKET_LEVEL);
            Some(Expression::Cgroup { level })
        }
        // A limit or a quota narrows a rule, and may be named so, too.
        "objref" if of.number(nfta::OBJREF_IMM_TYPE) == NFT_OBJECT_COUNTER => {
            Some(Expression::Count(of.text(nfta::OBJREF_IMM_NAME)))
        }
        "limit" => Some(Expression::Limit {
            rate: u64::from_be_bytes(of.fixed(nfta::LIMIT_RATE)),
            burst: of.number(nfta::LIMIT_BURST),
        }),
        "log" => Some(Expression::Log {
            group: u16::from_be_bytes(of.fixed(nfta::LOG_GROUP)),
            prefix: of.text(nfta::LOG_PREFIX),
        }),
        "reject" => match (of.number(nfta::REJECT_TYPE), of.fixed(nfta::REJECT_ICMP_CODE)) {
            (TCP_RESET, _) => Some(Expression::Reject { reset: true }),
            (ICMPX_UNREACHABLE, [ICMPX_PORT]) => Some(Expression::Reject { reset: false }),
            (ICMPX_UNREACHABLE, [ICMPX_PROHIBITED]) => Some(Expression::Prohibit),
            (..) => None,
        },
        "immediate" if of.inside(nfta::IMMEDIATE_DATA).has(nfta::DATA_VERDICT) => {
            let verdict = of.inside(nfta::IMMEDIATE_DATA).inside(nfta::DATA_VERDICT);
            let chain = || verdict.text(nfta::VERDICT_CHAIN);
            Some(Expression::Verdict(
                match verdict.number(nfta::VERDICT_CODE).cast_signed() {
                    libc::NF_ACCEPT => NftVerdict::Accept,
                    libc::NFT_RETURN => NftVerdict::Return,
                    libc::NFT_JUMP => NftVerdict::Jump(chain()),
                    libc::NFT_GOTO => NftVerdict::Goto(chain()),
                    code => NftVerdict::Other(code),
                },
            ))
        }
        _ => None,
    };
    found.unwrap_or(Expression::Other(name))
}
