//! The nftables backend: one table of family inet, replaced in three transactions (lay out, switch, remove; F2), read
//! back and compared (F3).
//!
//! Of TCP only packets that open a connection are looked at, of UDP every packet. No rule asks conntrack for anything:
//! an established TCP connection is not touched.

pub(crate) mod check;
mod endpoints;
mod error;
pub(crate) mod expression;
mod foreign;
mod found;
pub(crate) mod image;
mod in_place;
pub(crate) mod jobs;
pub(crate) mod netlink;
pub(crate) mod nflog;
mod observe;
pub(crate) mod others;
mod reading;
mod slot;
#[cfg(test)]
mod tests;
mod verify;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use tracing::warn;

use self::{
    image::{Image, Loader},
    in_place::{amendment, next_in_place},
    netlink::{Dump, Netlink, TableUpdate, TransactionError},
    observe::observe,
    slot::next_generation,
    verify::difference,
};
use super::{Observed, ObservedTarget, SocketUsers};
use crate::{
    config::Forward,
    policy::Protocol,
    ruleset::{Place, RuleSet, RuleTarget},
    wire::ConditionId,
};

pub(crate) use error::NftablesError;
pub(crate) use netlink::NftChanges;
pub(crate) use nflog::{Logged, LoggedDenial, NflogListener};
pub(crate) use reading::{Reading, open, unload};

/// The table, for the process that writes it.
#[derive(Debug)]
pub(crate) struct NftablesBackend {
    netlink: Netlink,
    table: String,
    loader: Loader,
    /// What the table holds, and the generation of all of `nf_tables` at which that was last checked.
    held: Option<(Image, u32)>,
    /// What it was made from.
    rules: Option<RuleSet>,
    /// Until the loop takes it.
    denials: Option<NflogListener>,
    /// Why denials are only counted, for a daemon that would report them.
    unlogged: Option<String>,
    /// The generation that was active at the start.
    found: u64,
}

impl NftablesBackend {
    /// Finds out what the kernel can do. Nothing is judged differently before the first [`NftablesBackend::apply`].
    pub(crate) fn take_over(table: &str, forward: Forward, daemon: bool) -> Result<Self, NftablesError> {
        let mut netlink = Netlink::open().map_err(|error| failed(table, "open a netlink socket", error))?;
        // Only a daemon listens.
        let bound = daemon.then(|| NflogListener::bind(table)).transpose();
        let mut unlogged = bound
            .as_ref()
            .err()
            .map(|error| format!("nflog is unavailable: {error}"));
        let denials = bound.ok().flatten();
        let group = denials.as_ref().map(|denials| denials.group);
        let trial = format!("enforcer_trial_{}", std::process::id());
        // `socket cgroupv2` came with Linux 5.13, nflog may be left out of a kernel; all else is needed.
        let mut result = Err(TransactionError {
            step: String::new(),
            error: io::ErrorKind::Unsupported.into(),
        });
        let mut loader = Loader {
            daemon,
            forward,
            log: None,
            cgroups: true,
        };
        for (log, cgroups) in [(group, true), (group, false), (None, true), (None, false)] {
            loader = Loader { log, cgroups, ..loader };
            result = netlink.attempt(&trial, &image::lower(&sample(), 0, loader));
            match &result {
                Err(failed) if failed.error.raw_os_error() != Some(libc::EPERM) => {}
                Ok(()) | Err(_) => break,
            }
        }
        result.map_err(|TransactionError { step, error }| {
            failed(table, &["try what is needed", &step].map(str::trim).join(" "), error)
        })?;
        if loader.log.is_none() && group.is_some() {
            unlogged = Some("this kernel's nftables cannot log".to_owned());
        }
        let unlogged = unlogged.map(|why| format!("nftables denials are counted, but not reported one by one: {why}"));
        if let Some(why) = &unlogged {
            warn!("{why}");
        }
        let mut this = Self {
            netlink,
            table: table.to_owned(),
            loader,
            held: None,
            rules: None,
            denials: denials.filter(|_| loader.log.is_some()),
            unlogged,
            found: 0,
        };
        let found = this.netlink.read_without_elements(table);
        let found = this.ours(found.map_err(|error| failed(table, "read the table", error))?)?;
        this.found = number_of(found.as_ref()).unwrap_or_default();
        Ok(this)
    }

    /// Whether the kernel tells a socket's cgroup; where not, principals with one match nobody.
    #[must_use]
    pub(crate) fn knows_cgroups(&self) -> bool {
        self.loader.cgroups
    }

    /// Why denials are only counted, where they are.
    pub(crate) fn unlogged(&self) -> Option<&str> {
        self.unlogged.as_deref()
    }

    /// The source of denials. Returned once: the first caller keeps it.
    pub(crate) fn denials(&mut self) -> Option<NflogListener> {
        self.denials.take()
    }

    /// What becomes of forwarded connections from the next rule set on.
    pub(crate) fn set_forward(&mut self, forward: Forward) {
        self.loader.forward = forward;
    }

    /// Makes a rule set active, whole or not at all (F2). Returns its number: that of the active one if it is the same,
    /// else one greater than `above`.
    pub(crate) fn apply(&mut self, rules: &RuleSet, above: u64) -> Result<u64, NftablesError> {
        let before = self.known()?;
        if self.is_already(rules, before.as_ref()) {
            self.rules = Some(rules.clone());
            return Ok(self.generation());
        }
        self.held = None;
        let changed = match self.amend(rules, above, before.as_ref()) {
            InPlace::Done => None,
            InPlace::Failed => Some(self.read()?),
            InPlace::Unsuitable => Some(None),
        };
        if let Some(changed) = changed {
            let found = changed.as_ref().or(before.as_ref());
            let active = found.map(|dump| number_of(Some(dump)).unwrap_or_default());
            let image = self.lower(rules, next_generation(active, above));
            let result = self.put(image, found);
            if matches!(result, Err(NftablesError::ReadBack { .. })) {
                self.restore(before)?;
            }
            result?;
        }
        self.rules = Some(rules.clone());
        Ok(self.generation())
    }

    /// Whether the table is what a rule set asks for; if so, that is held.
    fn is_already(&mut self, rules: &RuleSet, found: Option<&Dump>) -> bool {
        let image = self.lower(rules, number_of(found).unwrap_or_default());
        let same = found.filter(|dump| difference(&image, dump).is_none());
        if let Some(dump) = same {
            self.held = Some((image, dump.genid));
        }
        same.is_some()
    }

    /// Makes a rule set active by a small change in place, if that is all it takes.
    fn amend(&mut self, rules: &RuleSet, above: u64, found: Option<&Dump>) -> InPlace {
        let number = next_in_place(number_of(found).unwrap_or_default(), above);
        let (Some(found), Some(number)) = (found.filter(|dump| !dump.dormant), number) else {
            return InPlace::Unsuitable;
        };
        let image = self.lower(rules, number);
        let Some(amendment) = amendment(&found.image, &image, &rules.nat64) else {
            return InPlace::Unsuitable;
        };
        let sent = self.netlink.amend(&self.table, &image, &amendment, found.genid);
        if sent.is_err() {
            return InPlace::Failed;
        }
        // F3: what was written is read back, and nothing else has changed since all was.
        let seen = self.netlink.is_amended(&self.table, &image, &amendment);
        let genid = found.genid.wrapping_add(1);
        let is_done = seen.is_ok_and(|seen| seen == (true, genid));
        self.held = is_done.then_some((image, genid));
        if is_done { InPlace::Done } else { InPlace::Failed }
    }

    /// Gives the active rules a number of at least this: beside eBPF it was eBPF's that counted.
    pub(crate) fn number_above(&mut self, least: u64) -> Result<(), NftablesError> {
        let Some(rules) = self.rules.clone().filter(|_| self.generation() < least) else {
            return Ok(());
        };
        let before = self.read()?;
        let number = next_generation(number_of(before.as_ref()), least.saturating_sub(1));
        let image = self.lower(&rules, number);
        self.put(image, before.as_ref())
    }

    /// What the table holds, to be given to [`NftablesBackend::put_back`].
    pub(crate) fn save(&mut self) -> Result<TableBackup, NftablesError> {
        Ok(TableBackup {
            before: self.known()?,
            rules: self.rules.clone(),
        })
    }

    /// Puts back what was saved.
    pub(crate) fn put_back(&mut self, saved: TableBackup) -> Result<(), NftablesError> {
        // What was rejected is not what a repair is to bring back.
        self.rules = saved.rules;
        self.restore(saved.before)
    }

    fn restore(&mut self, before: Option<Dump>) -> Result<(), NftablesError> {
        self.held = None;
        match before {
            Some(dump) => self.put(dump.image.clone(), Some(&dump)),
            None => self.remove(),
        }
    }

    fn put(&mut self, image: Image, before: Option<&Dump>) -> Result<(), NftablesError> {
        let change = TableUpdate {
            table: &self.table,
            image: &image,
            found: before,
        };
        let sent = self.netlink.replace(change);
        sent.map_err(|TransactionError { step, error }| failed(&self.table, &step, error))?;
        self.confirm(image)
    }

    /// Reads back what was sent (F3).
    fn confirm(&mut self, image: Image) -> Result<(), NftablesError> {
        let found = self.read()?.unwrap_or_default();
        if let Some(what) = difference(&image, &found) {
            return Err(NftablesError::ReadBack {
                table: self.table.clone(),
                what,
            });
        }
        self.held = Some((image, found.genid));
        Ok(())
    }

    /// Whether the table still is as it was put; a look at one number, unless somebody changed some table (F5).
    pub(crate) fn is_whole(&mut self) -> Result<bool, NftablesError> {
        if self.is_untouched()? {
            return Ok(true);
        }
        let Some((image, seen)) = &mut self.held else {
            return Ok(false);
        };
        let found = dump(&mut self.netlink, &self.table)?.unwrap_or_default();
        let is_whole = difference(image, &found).is_none();
        if is_whole {
            *seen = found.genid;
        }
        Ok(is_whole)
    }

    /// Whether nobody has changed any table since this one was last checked: the kernel numbers its transactions.
    fn is_untouched(&mut self) -> Result<bool, NftablesError> {
        let genid = self.netlink.genid();
        let genid = genid.map_err(|error| failed(&self.table, "read the generation", error))?;
        Ok(self.held.as_ref().is_some_and(|(_, seen)| *seen == genid))
    }

    /// Makes back what was active, whatever has become of the table, as a new generation: its number.
    pub(crate) fn repair(&mut self) -> Result<u64, NftablesError> {
        let rules = self.rules.clone().unwrap_or_else(|| RuleSet {
            mode: crate::policy::Mode::Enforce,
            targets: Vec::new(),
            places: Vec::new(),
            nat64: Vec::new(),
            named_ports: BTreeSet::new(),
        });
        // Where the table is gone or tells nothing, the number goes on from what was held.
        let found = self.dump()?;
        let held = self.held.as_ref().and_then(|(image, _)| image.header());
        let number = next_generation(number_of(found.as_ref()), held.map_or(0, |header| header.generation));
        let image = self.lower(&rules, number);
        self.put(image, found.as_ref())?;
        Ok(number)
    }

    /// The generation that was made active, or found so at the start; 0 for none.
    pub(super) fn generation(&self) -> u64 {
        let header = self.held.as_ref().and_then(|(image, _)| image.header());
        header.map_or(self.found, |header| header.generation)
    }

    /// What the kernel holds now, read from it.
    pub(crate) fn observe(&mut self) -> Result<Observed, NftablesError> {
        let found = self.known()?.unwrap_or_default();
        let mut observed = observe(&found);
        let changed = self.held.as_ref().and_then(|(image, _)| difference(image, &found));
        if let Some(what) = changed {
            let table = &self.table;
            observed.faults.push(ConditionId::Table.because(format!(
                "another process changed nftables table inet {table}: {what} differs"
            )));
        }
        Ok(observed)
    }

    /// What the counters have counted.
    pub(crate) fn counters(&mut self) -> Result<BTreeMap<String, u64>, NftablesError> {
        self.counters_at().map(|(counts, _)| counts)
    }

    /// With the generation of all of `nf_tables` at which they were read.
    fn counters_at(&mut self) -> Result<(BTreeMap<String, u64>, u32), NftablesError> {
        let table = &self.table;
        let found = self.netlink.at_one_generation(|netlink| netlink.counters(table));
        found.map_err(|error| failed(table, "read the counters", error))
    }

    /// Removes the table.
    pub(crate) fn unload(mut self) -> Result<(), NftablesError> {
        self.remove()
    }

    fn remove(&mut self) -> Result<(), NftablesError> {
        let removed = self.netlink.remove(&self.table);
        removed.map_err(|TransactionError { step, error }| failed(&self.table, &step, error))
    }

    fn lower(&self, rules: &RuleSet, number: u64) -> Image {
        image::lower(rules, number, self.loader)
    }

    fn dump(&mut self) -> Result<Option<Dump>, NftablesError> {
        dump(&mut self.netlink, &self.table)
    }

    /// As [`NftablesBackend::read`], but what was read back and nobody can have changed since is not read again: that
    /// takes long for large sets, as for each message the kernel walks a set from its beginning.
    fn known(&mut self) -> Result<Option<Dump>, NftablesError> {
        if !self.is_untouched()? {
            return self.read();
        }
        let (counts, genid) = self.counters_at()?;
        match &self.held {
            Some((image, seen)) if *seen == genid => Ok(Some(Dump {
                image: image.clone(),
                counts,
                dormant: false,
                genid,
            })),
            Some(_) | None => self.read(),
        }
    }

    fn read(&mut self) -> Result<Option<Dump>, NftablesError> {
        let found = self.dump()?;
        self.ours(found)
    }

    /// What was found, unless that is another process's.
    fn ours(&self, found: Option<Dump>) -> Result<Option<Dump>, NftablesError> {
        if self.held.is_none() && found.as_ref().is_some_and(|dump| !is_ours(dump)) {
            return Err(NftablesError::Foreign {
                table: self.table.clone(),
            });
        }
        Ok(found)
    }
}

/// What became of a small change.
enum InPlace {
    Done,
    /// Whatever the table is now, it is to be replaced.
    Failed,
    /// It takes more than that, and nothing has been tried.
    Unsuitable,
}

/// What a table held, and what that was made from.
#[derive(Debug)]
pub(crate) struct TableBackup {
    before: Option<Dump>,
    rules: Option<RuleSet>,
}

/// By its own account, or by chains that nobody else names so.
fn is_ours(dump: &Dump) -> bool {
    let has = |chain| dump.image.chains.contains_key(chain);
    dump.image.header().is_some() || has(image::chain::ABOUT) && (has("judge_a") || has("judge_b"))
}

/// The generation that a table says it holds.
fn number_of(dump: Option<&Dump>) -> Option<u64> {
    Some(dump?.image.header()?.generation)
}

fn dump(netlink: &mut Netlink, table: &str) -> Result<Option<Dump>, NftablesError> {
    netlink
        .read(table)
        .map_err(|error| failed(table, "read the table", error))
}

fn failed(table: &str, step: &str, error: io::Error) -> NftablesError {
    NftablesError::Netlink {
        table: table.to_owned(),
        step: if step.is_empty() { "replace it" } else { step }.to_owned(),
        error,
    }
}

/// One of everything that the kernel must be able to do.
fn sample() -> RuleSet {
    use crate::{
        policy::{CgroupPath, Mode, Uid},
        ruleset::{Cgroup, RulePrincipal},
    };
    let nets = ["192.0.2.1/32", "198.51.100.0/24", "2001:db8::1/128", "2001:db8:1::/48"];
    let places = nets
        .iter()
        .filter_map(|net| net.parse().ok())
        .flat_map(|net| [Protocol::Tcp, Protocol::Udp].map(|protocol| (Place { protocol, port: 1, net }, 1)));
    let within = (CgroupPath("/a".to_owned()), Cgroup { id: 1, level: 1 });
    let user = |cgroup| RulePrincipal::User { uid: Uid(0), cgroup };
    let anybody = RulePrincipal::Anybody { cgroup: within.clone() };
    RuleSet {
        mode: Mode::Enforce,
        targets: vec![RuleTarget {
            name: "sample".to_owned(),
            principals: vec![user(None), user(Some(within.clone())), anybody, RulePrincipal::Kernel],
        }],
        places: places.collect(),
        nat64: Vec::new(),
        named_ports: BTreeSet::new(),
    }
}
