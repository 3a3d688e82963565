//! The chain `inet bosh_agent monit_access_jobs` (B5): where BOSH jobs, the BOSH agent and enforcer say who may reach
//! monit.
//!
//! The agent's own chain `monit_access` jumps there first, so that an `accept` there lets through it. We read what it
//! accepts, and write what was granted as long as the agent's chain is there. Rules of others are never changed, nor is
//! the chain ever flushed.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::ffi::OsStrExt as _,
};

use nftnl::{MsgType, Rule as NlRule};

use super::{
    NftablesError,
    expression::{self as is, Expression, IPV4, IPV6, NftVerdict, REGISTER, TCP, base, meta},
    failed,
    netlink::{DumpedRule, Netlink, Steps, TransactionError, chain_message, inet, rule_message},
    reading::reach,
};
use crate::{config::Settings, ruleset::Cgroup};

/// The table that BOSH's agent and releases know.
pub(crate) const TABLE: &str = "bosh_agent";
/// The chain that rules of jobs are added to.
pub(crate) const CHAIN: &str = "monit_access_jobs";
/// The agent's own chain, which drops whom the jobs' chain does not accept.
pub(crate) const AGENTS: &str = "monit_access";
/// Comment of a rule that a job's container had us write, while it could not reach the daemon.
const OF_CONTAINER: &str = "enforcer: a job's container";

/// Whom a rule accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RuleSubject {
    /// The user to whom the socket belongs.
    pub user: Option<u32>,
    /// The cgroup below which the socket was made.
    pub cgroup: Option<Cgroup>,
}

/// Where a rule lets through to; what is absent may be anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RuleDestination {
    /// The address.
    pub address: Option<IpAddr>,
    /// The TCP port.
    pub port: Option<u16>,
}

/// A rule of one of the known shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Accept {
    /// Whom.
    pub subject: RuleSubject,
    /// Where to.
    pub to: RuleDestination,
}

/// Why a rule is none of the known shapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unknown {
    /// It has something that is not understood, by its name in nft's own debug output.
    Expression(String),
    /// It compares otherwise than for equality, or with a value of another length.
    Comparison,
    /// It does not end with accept.
    Verdict,
    /// It is for another transport than TCP.
    Transport,
    /// It names the same thing twice.
    Twice,
    /// It names neither a user nor a cgroup.
    Nobody,
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expression(name) => write!(f, "it has the expression {name}, which enforcer does not evaluate here"),
            Self::Comparison => f.write_str("it compares by something else than equality"),
            Self::Verdict => f.write_str("it does not end with accept"),
            Self::Transport => f.write_str("it is for another protocol than TCP"),
            Self::Twice => f.write_str("it compares the same thing twice"),
            Self::Nobody => f.write_str("it names neither a user nor a cgroup"),
        }
    }
}

/// A rule of the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JobRule {
    /// What the kernel calls it, as `nft -a` shows.
    pub handle: u64,
    /// What it accepts, or why that is not known.
    pub accepts: Result<Accept, Unknown>,
    /// Whose it is.
    pub writer: RuleOrigin,
}

/// Who wrote a rule, by its comment: only root writes any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RuleOrigin {
    /// This instance, for a grant.
    Grants,
    /// A job's container, with our help.
    Container,
    /// A job, the agent, or another instance.
    Other,
}

/// The chain as read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ChainDump {
    /// Whether it is there.
    pub exists: bool,
    /// Whether the agent's own chain is there.
    pub agents: bool,
    /// Whether no other chain is in the table.
    pub is_alone: bool,
    /// In the chain's order.
    pub rules: Vec<JobRule>,
    /// The generation of all of `nf_tables` at which it was read.
    pub genid: u32,
}

/// The way to the chain.
#[derive(Debug)]
pub(crate) struct JobsChain {
    netlink: Netlink,
    /// The comment of our rules.
    comment: String,
}

impl JobsChain {
    /// Opens the way for the instance with these settings; none where the kernel has no `nf_tables`.
    pub(crate) fn open(settings: &Settings) -> Result<Option<Self>, NftablesError> {
        let comment = comment(settings);
        Ok(reach(TABLE)?.map(|netlink| Self { netlink, comment }))
    }

    /// The generation of all of `nf_tables`: while it is the same, so is the chain.
    pub(crate) fn genid(&mut self) -> Result<u32, NftablesError> {
        self.netlink
            .genid()
            .map_err(|error| failed(TABLE, "read the generation", error))
    }

    /// What is there now.
    pub(crate) fn read(&mut self) -> Result<ChainDump, NftablesError> {
        let found = self.netlink.at_one_generation(|netlink| {
            let chains = netlink.chains(TABLE)?;
            let rules = if chains.contains_key(CHAIN) {
                netlink.rules(TABLE, Some(CHAIN))?
            } else {
                Vec::new()
            };
            Ok((chains, rules))
        });
        let ((chains, rules), genid) = found.map_err(|error| failed(TABLE, &format!("read chain {CHAIN}"), error))?;
        let rule = |found: DumpedRule| JobRule {
            handle: found.handle,
            accepts: decode(&found.rule.expressions),
            writer: match found.rule.comment.as_str() {
                OF_CONTAINER => RuleOrigin::Container,
                comment if comment == self.comment => RuleOrigin::Grants,
                _ => RuleOrigin::Other,
            },
        };
        Ok(ChainDump {
            exists: chains.contains_key(CHAIN),
            agents: chains.contains_key(AGENTS),
            is_alone: chains.keys().all(|name| name == CHAIN),
            rules: rules.into_iter().map(rule).collect(),
            genid,
        })
    }

    /// Makes the chain if it is missing, removes rules and adds others, in one transaction.
    pub(crate) fn change(&mut self, remove: &[u64], add: &[Accept]) -> Result<(), NftablesError> {
        let comment = self.comment.clone();
        self.commit(remove, add, &comment)
    }

    /// Adds rules for a container that cannot reach the daemon, but for those that are there. False where there is no
    /// chain.
    pub(crate) fn add_container(&mut self, accepts: &[Accept]) -> Result<bool, NftablesError> {
        let found = self.read()?;
        let is_there = |accept: &Accept| found.rules.iter().any(|rule| rule.accepts.as_ref() == Ok(accept));
        let missing: Vec<Accept> = accepts.iter().filter(|accept| !is_there(accept)).copied().collect();
        if found.exists && !missing.is_empty() {
            self.commit(&[], &missing, OF_CONTAINER)?;
        }
        Ok(found.exists)
    }

    fn commit(&mut self, remove: &[u64], add: &[Accept], comment: &str) -> Result<(), NftablesError> {
        let found = self.netlink.table(TABLE);
        let found = found.map_err(|error| failed(TABLE, "look for it", error))?;
        let table = inet(TABLE);
        let chain = chain_message(&table, CHAIN, None);
        let mut batch = Steps::new();
        // Made again, one that somebody has made dormant would be woken.
        if found.is_none() {
            batch.add("make the table", &table, MsgType::Add);
        }
        batch.add(&format!("make chain {CHAIN}"), &chain, MsgType::Add);
        for handle in remove {
            let mut rule = NlRule::new(&chain);
            rule.set_handle(*handle);
            batch.add(&format!("remove rule {handle} of chain {CHAIN}"), &rule, MsgType::Del);
        }
        for accept in add {
            let rule = rule_message(&chain, comment, &encode(accept));
            batch.add(&format!("add a rule to chain {CHAIN}"), &rule, MsgType::Add);
        }
        let sent = self.netlink.commit(batch);
        sent.map_err(|TransactionError { step, error }| failed(TABLE, &step, error))
    }

    /// Removes our rules, and says what else is there.
    pub(crate) fn remove_rules(&mut self) -> Result<ChainDump, NftablesError> {
        let mut found = self.read()?;
        let ours = found.rules.extract_if(.., |rule| rule.writer == RuleOrigin::Grants);
        let ours: Vec<u64> = ours.map(|rule| rule.handle).collect();
        if !ours.is_empty() {
            self.change(&ours, &[])?;
        }
        Ok(found)
    }

    /// Removes our rules; the chain and the table too, where nothing else is in them.
    pub(crate) fn remove_all_ours(&mut self) -> Result<(), NftablesError> {
        let left = self.remove_rules()?;
        if !left.exists || !left.rules.is_empty() || !left.is_alone {
            return Ok(());
        }
        let table = inet(TABLE);
        let chain = chain_message(&table, CHAIN, None);
        let mut batch = Steps::new();
        // Whoever puts something there meanwhile keeps all of it.
        batch.remove_if_empty(&format!("remove chain {CHAIN}"), &chain);
        batch.remove_if_empty("remove the table", &table);
        match self.netlink.commit(batch) {
            // It is in use now, or has gone.
            Err(TransactionError { error, .. }) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOENT)) => {
                Ok(())
            }
            done => done.map_err(|TransactionError { step, error }| failed(TABLE, &step, error)),
        }
    }
}

/// The comment of an instance's rules. No two that run have one state directory (F11).
#[must_use]
pub(crate) fn comment(settings: &Settings) -> String {
    let place = crc32fast::hash(settings.state_dir.as_os_str().as_bytes());
    format!("enforcer: a grant of {} ({place:08x})", settings.nft_table)
}

/// Removes what is ours, for an instance that does not run.
pub(crate) fn remove_all_ours(settings: &Settings) -> Result<(), NftablesError> {
    JobsChain::open(settings)?.map_or(Ok(()), |mut chain| chain.remove_all_ours())
}

/// Removes the rules of an instance that goes on under another name.
pub(crate) fn remove_rules(settings: &Settings) -> Result<(), NftablesError> {
    JobsChain::open(settings)?.map_or(Ok(()), |mut chain| chain.remove_rules().map(drop))
}

/// What is in the chain, for those who only read; nothing where the kernel has no `nf_tables`.
pub(crate) fn read(settings: &Settings) -> Result<ChainDump, NftablesError> {
    JobsChain::open(settings)?.map_or_else(|| Ok(ChainDump::default()), |mut chain| chain.read())
}

/// What a rule accepts. Whatever narrows it and is not understood makes it unknown: it would let in more than it says.
fn decode(expressions: &[Expression]) -> Result<Accept, Unknown> {
    let Some((Expression::Verdict(NftVerdict::Accept), conditions)) = expressions.split_last() else {
        return Err(Unknown::Verdict);
    };
    let (mut user, mut cgroup, mut address, mut port) = (None, None, None, None);
    let (mut family, mut transport) = (None, None);
    let mut rest = conditions.iter().filter(|expression| !is_harmless(expression));
    while let Some(load) = rest.next() {
        let unknown = |expression| Unknown::Expression(name(expression));
        let field = Field::of(load).ok_or_else(|| unknown(load))?;
        let value = match rest.next() {
            Some(Expression::Compare { equal: true, value }) => value.as_slice(),
            Some(Expression::Compare { equal: false, .. }) => return Err(Unknown::Comparison),
            other => return Err(unknown(other.unwrap_or(load))),
        };
        match field {
            Field::User => once(&mut user, fixed(value).map(u32::from_ne_bytes))?,
            Field::Cgroup { level } => {
                let id = fixed(value).map(u64::from_ne_bytes);
                once(&mut cgroup, id.map(|id| Cgroup { id, level }))?;
            }
            Field::Family => once(&mut family, fixed(value).map(|[family]| family))?,
            Field::Transport => once(&mut transport, fixed(value).map(|[protocol]| protocol))?,
            Field::Address4 => once(
                &mut address,
                fixed(value).map(|octets| Ipv4Addr::from_octets(octets).into()),
            )?,
            Field::Address6 => once(
                &mut address,
                fixed(value).map(|octets| Ipv6Addr::from_octets(octets).into()),
            )?,
            Field::Port => once(&mut port, fixed(value).map(u16::from_be_bytes))?,
        }
    }
    if transport.is_some_and(|protocol| protocol != TCP) {
        return Err(Unknown::Transport);
    }
    let is_v4 = |address: &IpAddr| if address.is_ipv4() { IPV4 } else { IPV6 };
    if let (Some(family), Some(address)) = (family, &address)
        && family != is_v4(address)
    {
        return Err(Unknown::Comparison);
    }
    if (user, cgroup) == (None, None) {
        return Err(Unknown::Nobody);
    }
    Ok(Accept {
        subject: RuleSubject { user, cgroup },
        to: RuleDestination { address, port },
    })
}

/// What a rule of the known shapes compares.
enum Field {
    User,
    Cgroup { level: u32 },
    Family,
    Transport,
    Address4,
    Address6,
    Port,
}

impl Field {
    /// What is loaded for a comparison; none where no rule of the known shapes has that.
    fn of(load: &Expression) -> Option<Self> {
        if let Expression::Cgroup { level } = load {
            return Some(Self::Cgroup { level: *level });
        }
        if let Expression::Meta {
            key,
            register: REGISTER,
        } = load
        {
            return match *key {
                meta::SKUID => Some(Self::User),
                meta::NFPROTO => Some(Self::Family),
                meta::L4PROTO => Some(Self::Transport),
                _ => None,
            };
        }
        let Expression::Payload {
            base,
            offset,
            length,
            register: REGISTER,
        } = load
        else {
            return None;
        };
        match (*base, *offset, *length) {
            (base::NETWORK, 9, 1) => Some(Self::Transport),
            (base::NETWORK, 16, 4) => Some(Self::Address4),
            (base::NETWORK, 24, 16) => Some(Self::Address6),
            (base::TRANSPORT, 2, 2) => Some(Self::Port),
            _ => None,
        }
    }
}

/// Takes what is compared, once.
fn once<T>(place: &mut Option<T>, value: Option<T>) -> Result<(), Unknown> {
    let value = value.ok_or(Unknown::Comparison)?;
    if place.replace(value).is_some() {
        return Err(Unknown::Twice);
    }
    Ok(())
}

fn fixed<const LENGTH: usize>(value: &[u8]) -> Option<[u8; LENGTH]> {
    value.try_into().ok()
}

/// Whether it narrows nothing.
fn is_harmless(expression: &Expression) -> bool {
    match expression {
        Expression::Log { .. } | Expression::Count(_) => true,
        Expression::Other(name) => name == "counter",
        Expression::Meta { .. }
        | Expression::Payload { .. }
        | Expression::Mask(_)
        | Expression::Compare { .. }
        | Expression::Lookup { .. }
        | Expression::Cgroup { .. }
        | Expression::Limit { .. }
        | Expression::Reject { .. }
        | Expression::Prohibit
        | Expression::Verdict(_) => false,
    }
}

/// As nft's debug output names it.
fn name(expression: &Expression) -> String {
    let name = match expression {
        Expression::Meta { .. } => "meta",
        Expression::Payload { .. } => "payload",
        Expression::Mask(_) => "bitwise",
        Expression::Compare { .. } => "cmp",
        Expression::Lookup { .. } => "lookup",
        Expression::Cgroup { .. } => "socket",
        Expression::Count(_) => "objref",
        Expression::Limit { .. } => "limit",
        Expression::Log { .. } => "log",
        Expression::Reject { .. } | Expression::Prohibit => "reject",
        Expression::Verdict(_) => "immediate",
        Expression::Other(name) => name,
    };
    name.to_owned()
}

/// A rule in the agent's own shape.
fn encode(accept: &Accept) -> Vec<Expression> {
    let Accept { subject, to } = accept;
    let mut all = Vec::new();
    if let Some(Cgroup { id, level }) = subject.cgroup {
        all.extend(is::below(level, id));
    }
    if let Some(user) = subject.user {
        all.extend(is::equal(meta::SKUID, user.to_ne_bytes().to_vec()));
    }
    match to.address {
        Some(IpAddr::V4(address)) => all.extend(is::address(IPV4, true, address.octets().to_vec())),
        Some(IpAddr::V6(address)) => all.extend(is::address(IPV6, true, address.octets().to_vec())),
        None => {}
    }
    if let Some(port) = to.port {
        all.extend(is::transport(TCP));
        all.extend(is::to_port(port));
    }
    all.push(Expression::Verdict(NftVerdict::Accept));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_monit(user: Option<u32>, cgroup: Option<Cgroup>) -> Accept {
        Accept {
            subject: RuleSubject { user, cgroup },
            to: RuleDestination {
                address: Some(Ipv4Addr::LOCALHOST.into()),
                port: Some(2822),
            },
        }
    }

    #[test]
    fn b5_what_is_written_is_read() {
        let cgroup = Cgroup { id: 4711, level: 2 };
        for accept in [
            at_monit(Some(1000), None),
            at_monit(None, Some(cgroup)),
            at_monit(Some(0), Some(cgroup)),
            Accept {
                to: RuleDestination {
                    address: Some(Ipv6Addr::LOCALHOST.into()),
                    port: None,
                },
                ..at_monit(Some(1), None)
            },
            Accept {
                to: RuleDestination::default(),
                ..at_monit(Some(1), None)
            },
        ] {
            assert_eq!(decode(&encode(&accept)), Ok(accept));
        }
    }

    #[test]
    fn b5_what_narrows_a_rule_and_is_not_understood_makes_it_unknown() {
        let known = encode(&at_monit(Some(1000), None));
        let with = |index: usize, expressions: &[Expression]| {
            let mut rule = known.clone();
            rule.splice(index..index, expressions.iter().cloned());
            decode(&rule)
        };
        let log = Expression::Log {
            group: 0,
            prefix: "job: ".to_owned(),
        };
        let counter = Expression::Other("counter".to_owned());
        for index in 0..known.len() {
            assert_eq!(
                with(index, &[log.clone(), counter.clone()]),
                Ok(at_monit(Some(1000), None)),
                "{index}"
            );
            let limit = Expression::Limit { rate: 1, burst: 1 };
            assert!(with(index, &[limit]).is_err(), "{index}");
            assert!(with(index, &[Expression::Other("ct".to_owned())]).is_err(), "{index}");
        }
        assert_eq!(with(0, known.get(..2).unwrap_or_default()), Err(Unknown::Twice));
        let skgid = Expression::Meta {
            key: 11,
            register: REGISTER,
        };
        let equals = |value: &[u8]| Expression::Compare {
            equal: true,
            value: value.to_vec(),
        };
        assert_eq!(
            with(0, &[skgid, equals(&[0; 4])]),
            Err(Unknown::Expression("meta".to_owned()))
        );
        let change = |index: usize, expression| {
            let mut rule = known.clone();
            if let Some(place) = rule.get_mut(index) {
                *place = expression;
            }
            decode(&rule)
        };
        let differs = Expression::Compare {
            equal: false,
            value: 1000_u32.to_ne_bytes().to_vec(),
        };
        assert_eq!(change(1, differs), Err(Unknown::Comparison));
        assert_eq!(change(1, equals(&[1, 2])), Err(Unknown::Comparison));
        assert_eq!(change(3, equals(&[IPV6])), Err(Unknown::Comparison));
        assert_eq!(change(7, equals(&[17])), Err(Unknown::Transport));
        let last = known.len() - 1;
        assert_eq!(
            change(last, Expression::Verdict(NftVerdict::Return)),
            Err(Unknown::Verdict)
        );
        assert_eq!(decode(known.get(2..).unwrap_or_default()), Err(Unknown::Nobody));
        assert_eq!(decode(known.get(last..).unwrap_or_default()), Err(Unknown::Nobody));
        assert_eq!(decode(&[]), Err(Unknown::Verdict));
        let elsewhere = Expression::Meta {
            key: meta::SKUID,
            register: 2,
        };
        assert_eq!(change(0, elsewhere), Err(Unknown::Expression("meta".to_owned())));
    }
}
