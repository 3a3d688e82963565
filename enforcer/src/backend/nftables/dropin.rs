//! Two tables as one (B5): our own, and where `monit` may be granted a part of `inet bosh_agent`, whose chain
//! `monit_access_jobs` belongs to BOSH releases.
//!
//! An `accept` ends the judgement of its own table only. So what the target `monit` says is judged in `inet bosh_agent`, by
//! chains of ours that ask the jobs' chain first, and what all other targets say in our own table: a packet passes if both let it (D2).

use std::collections::BTreeSet;

use enforcer_ebpf::Verdict as Outcome;
use tracing::warn;

use super::{
    Denials, Nftables, NftablesError, Plan, Reading, Saved, Whose, check, dump,
    expression::{Expression, Verdict},
    failed,
    image::{self, Image, Rule, chain::ABOUT},
    netlink::{Change, Dump, Failed, Netlink},
};
use crate::{
    backend::{Checked, Observed, merged_tables},
    config::{Forward, Settings},
    ruleset::{Attempt, RuleSet},
    verify::Comparison,
};

/// The target whose judgement asks the jobs' chain.
pub const TARGET: &str = "monit";
/// The table that BOSH's agent and releases know.
pub const TABLE: &str = "bosh_agent";
/// The chain that releases add their rules to. Never flushed.
pub const JOBS: &str = "monit_access_jobs";

/// Both tables, for the process that writes them.
#[derive(Debug)]
pub struct Tables {
    own: Nftables,
    /// The part of the shared table, once it is in force.
    shared: Option<Nftables>,
    /// The own table of the instance that this one goes on for.
    before: Option<String>,
    honour: bool,
    /// Why the jobs' chain is not honoured, though it should be.
    fault: Option<String>,
}

/// What both tables held.
#[derive(Debug)]
pub struct SavedTables {
    own: Option<Saved>,
    shared: Option<Saved>,
}

impl Tables {
    /// As [`Nftables::take_over`]; `before` is the table that this instance had until now, if it is another one: its part of
    /// the shared table is taken along, so that it is judged by at every moment and the jobs' chain honoured.
    pub fn take_over(table: &str, before: Option<&str>, forward: Forward, daemon: bool) -> Result<Self, NftablesError> {
        let mut this = Self {
            own: Nftables::take_over(table, forward, daemon)?,
            shared: None,
            before: before.filter(|before| *before != table).map(str::to_owned),
            honour: false,
            fault: None,
        };
        for of in [Some(table), this.before.clone().as_deref()].into_iter().flatten() {
            if this.shared.is_none() && found_of(&mut this.own.netlink, of)?.is_some() {
                this.shared = Some(this.part()?);
            }
        }
        Ok(this)
    }

    /// Our part of the shared table, of which nothing is known yet.
    fn part(&self) -> Result<Nftables, NftablesError> {
        Ok(Nftables {
            netlink: Netlink::open().map_err(|error| failed(TABLE, "open a netlink socket", error))?,
            table: TABLE.to_owned(),
            loader: self.own.loader,
            held: None,
            rules: None,
            denials: None,
            shared: Some(Whose {
                of: self.own.table.clone(),
                before: self.before.clone(),
            }),
        })
    }

    /// Whether the jobs' chain is to be asked from the next rule set on.
    pub fn honour_jobs(&mut self, honour: bool) {
        self.honour = honour;
    }

    /// As [`Nftables::knows_cgroups`].
    #[must_use]
    pub fn knows_cgroups(&self) -> bool {
        self.own.knows_cgroups()
    }

    /// As [`Nftables::denials`]: both tables log to one group.
    pub fn denials(&mut self) -> Option<Denials> {
        self.own.denials()
    }

    /// What the counters of both tables have counted, and nothing else of them.
    pub fn counters(&mut self) -> Result<Vec<(String, u64)>, NftablesError> {
        let shared = self.shared.as_mut().map(Nftables::counters).transpose()?;
        Ok(self
            .own
            .counters()?
            .into_iter()
            .chain(shared.unwrap_or_default())
            .collect())
    }

    /// As [`Nftables::set_forward`].
    pub fn set_forward(&mut self, forward: Forward) {
        self.own.set_forward(forward);
    }

    /// Puts a rule set in force. What moves from one table to the other is judged by both in between, or moves at one instant:
    /// nothing is let through that either rule set refuses.
    pub fn apply(&mut self, rules: &RuleSet) -> Result<u64, NftablesError> {
        let fault = self.fault.take();
        let mut before = None;
        let mut split = self.honour.then(|| split(rules)).flatten();
        if let Some((own, shared)) = &split
            && self.apply_together(own, shared)?
        {
            return Ok(self.own.generation());
        }
        if let Some((_, shared)) = &split {
            match self.apply_shared(shared) {
                Ok(saved) => before = saved,
                Err(error) => {
                    // Judged as every other target, by our own table: narrower, never wider.
                    split = None;
                    let now = format!("{error}; rules of jobs in chain {JOBS} are not honoured");
                    if fault.as_ref() != Some(&now) {
                        warn!("{now}");
                    }
                    self.fault = Some(now);
                }
            }
        }
        let split = split.map(|(own, _)| own);
        let number = match self.own.apply(split.as_ref().unwrap_or(rules)) {
            Ok(number) => number,
            Err(error) => {
                if split.is_some() {
                    self.put_back_shared(before)?;
                }
                return Err(error);
            }
        };
        if split.is_none() {
            self.shared = None;
            let mut netlink = Netlink::open().map_err(|error| failed(TABLE, "open a netlink socket", error))?;
            if found_of(&mut netlink, &self.own.table)?.is_some() {
                leave(&mut netlink, TABLE)?;
            }
        }
        Ok(number)
    }

    /// Puts both parts in force at one instant, where both change: an endpoint that goes from `monit` to another target is not judged
    /// by the new own table before it has left the shared one, nor the other way round (F2). False where there is no need, or no way.
    fn apply_together(&mut self, own: &RuleSet, rules: &RuleSet) -> Result<bool, NftablesError> {
        // What is wrong with the shared table is told by who changes it alone.
        let Ok(mut shared) = self.open_shared() else {
            return Ok(false);
        };
        let planned = shared.plan(rules).ok().flatten();
        let Some(theirs) = planned.filter(|plan| plan.before.is_some()) else {
            self.shared = Some(shared);
            return Ok(false);
        };
        let result = self.own.plan(own).and_then(|plan| match plan {
            Some(mine) => put_both((&mut shared, rules, theirs), (&mut self.own, own, mine)),
            None => Ok(false),
        });
        self.shared = Some(shared);
        result
    }

    fn open_shared(&mut self) -> Result<Nftables, NftablesError> {
        let mut shared = match self.shared.take() {
            Some(shared) => shared,
            None => self.part()?,
        };
        shared.loader = self.own.loader;
        Ok(shared)
    }

    fn apply_shared(&mut self, rules: &RuleSet) -> Result<Option<Saved>, NftablesError> {
        let mut shared = self.open_shared()?;
        let saved = shared.save()?;
        shared.apply(rules)?;
        self.shared = Some(shared);
        Ok(saved)
    }

    /// As [`Nftables::save`].
    pub fn save(&mut self) -> Result<Option<SavedTables>, NftablesError> {
        let own = self.own.save()?;
        let shared = self.shared.as_mut().map(Nftables::save).transpose()?.flatten();
        Ok(Some(SavedTables { own, shared }))
    }

    /// As [`Nftables::put_back`].
    pub fn put_back(&mut self, saved: Option<SavedTables>) -> Result<(), NftablesError> {
        let (own, before) = saved.map_or((None, None), |saved| (saved.own, saved.shared));
        // First what was judged by our own table alone.
        self.own.put_back(own)?;
        self.put_back_shared(before)
    }

    fn put_back_shared(&mut self, before: Option<Saved>) -> Result<(), NftablesError> {
        match (self.shared.take(), before) {
            (Some(mut shared), Some(before)) => {
                shared.put_back(Some(before))?;
                self.shared = Some(shared);
                Ok(())
            }
            // It was not there before.
            (Some(shared), None) => shared.unload(),
            (None, _) => Ok(()),
        }
    }

    /// As [`Nftables::is_whole`].
    pub fn is_whole(&mut self) -> Result<bool, NftablesError> {
        Ok(self.own.is_whole()? && self.shared.as_mut().map_or(Ok(true), Nftables::is_whole)?)
    }

    /// As [`Nftables::repair`].
    pub fn repair(&mut self) -> Result<u64, NftablesError> {
        if let Some(shared) = &mut self.shared
            && !shared.is_whole()?
        {
            shared.repair()?;
        }
        if self.own.is_whole()? {
            return Ok(self.own.generation());
        }
        self.own.repair()
    }

    /// As [`Nftables::observe`].
    pub fn observe(&mut self) -> Result<Observed, NftablesError> {
        let mut observed = self.own.observe()?;
        if let Some(shared) = &mut self.shared {
            observed = merged_tables(observed, shared.observe()?);
        }
        observed.faults.extend(self.fault.clone());
        Ok(observed)
    }

    /// As [`Nftables::verify`]: each table against what it is to judge.
    pub fn verify(&mut self, rules: &RuleSet, comparison: &mut Comparison) -> Result<u64, NftablesError> {
        let split = self.shared.as_ref().and_then(|_| split(rules));
        if let (Some(shared), Some((_, rules))) = (&mut self.shared, &split) {
            shared.verify(rules, comparison)?;
        }
        self.own
            .verify(split.as_ref().map_or(rules, |(own, _)| own), comparison)
    }

    /// Removes what is ours of both.
    pub fn unload(self) -> Result<(), NftablesError> {
        if let Some(shared) = self.shared {
            shared.unload()?;
        }
        self.own.unload()
    }
}

/// A table, the rule set that it is to judge by, and what that makes of it.
type Part<'a> = (&'a mut Nftables, &'a RuleSet, Plan);

/// Puts two tables in force at one instant. False where one is bent, so that they can only be changed one after the other.
fn put_both((shared, theirs, plan): Part<'_>, (own, mine, own_plan): Part<'_>) -> Result<bool, NftablesError> {
    (shared.held, own.held) = (None, None);
    let changes = [(&*shared, &plan), (&*own, &own_plan)].map(|(table, plan)| Change {
        table: &table.table,
        image: &plan.image,
        found: plan.before.as_ref(),
        guest: table.guest(),
    });
    let mut netlink = Netlink::open().map_err(|error| failed(&own.table, "open a netlink socket", error))?;
    match netlink.replace_all(&changes) {
        Ok(()) => {}
        Err(found) if found.is_about_contents() => return Ok(false),
        Err(Failed { step, error }) => return Err(failed(&own.table, &step, error)),
    }
    let confirmed = shared.confirm(plan.image).and_then(|()| own.confirm(own_plan.image));
    if matches!(confirmed, Err(NftablesError::ReadBack { .. })) {
        own.restore(own_plan.before)?;
        shared.restore(plan.before)?;
    }
    confirmed?;
    (shared.rules, own.rules) = (Some(theirs.clone()), Some(mine.clone()));
    Ok(true)
}

/// Both tables for those who only read them.
#[derive(Debug)]
pub struct Readings {
    own: Reading,
    shared: Option<Reading>,
}

/// The tables for those who only read them; none where nothing of ours is there.
pub fn open(table: &str) -> Result<Option<Readings>, NftablesError> {
    let Some(mut netlink) = super::reach(table)? else {
        return Ok(None);
    };
    let Some(own) = super::open(&mut netlink, table)? else {
        return Ok(None);
    };
    let shared = found_of(&mut netlink, table)?.map(Reading);
    Ok(Some(Readings { own, shared }))
}

impl Readings {
    /// What is in force.
    #[must_use]
    pub fn observe(&self) -> Observed {
        let own = self.own.observe();
        match &self.shared {
            Some(shared) => merged_tables(own, shared.observe()),
            None => own,
        }
    }

    /// As [`Reading::verify`]: each table against what it is to judge.
    pub fn verify(&self, rules: &RuleSet, settings: &Settings, comparison: &mut Comparison) -> u64 {
        let split = self.shared.as_ref().and_then(|_| split(rules));
        if let (Some(shared), Some((_, rules))) = (&self.shared, &split) {
            shared.verify(rules, settings.forward, Some(&settings.nft_table), comparison);
        }
        let own = split.as_ref().map_or(rules, |(own, _)| own);
        self.own.verify(own, settings.forward, None, comparison)
    }

    /// The verdict of both; rules of jobs are not looked at.
    #[must_use]
    pub fn check(&self, attempt: &Attempt) -> Checked {
        let mut checked = check::check(&self.own, attempt);
        if let Some(shared) = &self.shared {
            let other = check::check(shared, attempt);
            let weight = |verdict| match verdict {
                Outcome::Unjudged => 0,
                Outcome::Allow => 1,
                Outcome::WouldDeny => 2,
                Outcome::Deny => 3,
            };
            if weight(other.verdict) > weight(checked.verdict) {
                checked.verdict = other.verdict;
            }
            checked.owners.extend(other.owners);
        }
        checked
    }
}

/// Whether the shared table is there though nothing in it is ours: with what others put there.
#[must_use]
pub fn others_stay() -> bool {
    let found = Netlink::open()
        .ok()
        .and_then(|mut netlink| dump(&mut netlink, TABLE).ok());
    found.flatten().is_some_and(|found| own(found).is_none())
}

/// Removes what is ours of both tables; false where there was nothing.
pub fn unload(table: &str) -> Result<bool, NftablesError> {
    let Some(mut netlink) = super::reach(table)? else {
        return Ok(false);
    };
    if found_of(&mut netlink, table)?.is_some() {
        leave(&mut netlink, TABLE)?;
    }
    super::remove(&mut netlink, table)
}

/// What of the shared table is that of the instance with this table.
fn found_of(netlink: &mut Netlink, of: &str) -> Result<Option<Dump>, NftablesError> {
    Ok(dump(netlink, TABLE)?.and_then(own).filter(|found| is_of(found, of)))
}

/// Removes what is ours of the shared table; the table too, if nothing of others' is in it.
pub(super) fn leave(netlink: &mut Netlink, table: &str) -> Result<(), NftablesError> {
    let Some(whole) = dump(netlink, table)? else {
        return Ok(());
    };
    let others: Vec<String> = (whole.image.chains.keys())
        .filter(|name| !is_own(name))
        .cloned()
        .collect();
    let only_jobs = others.iter().all(|name| name == JOBS)
        && whole.image.chains.get(JOBS).is_none_or(|chain| chain.rules.is_empty())
        && whole
            .image
            .sets
            .keys()
            .chain(&whole.image.counters)
            .all(|name| is_own(name));
    if !only_jobs {
        warn!("nftables table inet {table} stays, as others have rules in it; ours are removed");
    }
    let found = own(whole).unwrap_or_default();
    let removed = netlink.remove_contents(table, &found, only_jobs.then_some(&others));
    removed.map_err(|Failed { step, error }| failed(table, &step, error))
}

/// Asks the jobs' chain before anything else that the target says, and says whose part it is.
pub(super) fn honour(image: &mut Image, of: &str) {
    let target = image.slot().target(TARGET);
    let rule = |comment: String, expressions| Rule { comment, expressions };
    if let Some(chain) = image.chains.get_mut(&target) {
        let jump = Expression::Verdict(Verdict::Jump(JOBS.to_owned()));
        chain.rules.insert(0, rule(String::new(), vec![jump]));
    }
    if let Some(about) = image.chains.get_mut(ABOUT) {
        about.rules.push(rule(whose(of), Vec::new()));
    }
}

/// What of a dump of the shared table is ours; none if nothing is.
pub(super) fn own(mut found: Dump) -> Option<Dump> {
    found.image.chains.retain(|name, _| is_own(name));
    found.image.sets.retain(|name, _| is_own(name));
    found.image.counters.retain(|name| is_own(name));
    found.counts.retain(|name, _| is_own(name));
    (!found.image.chains.is_empty()).then_some(found)
}

/// Whether it is the part of the instance with this table, or of one that was killed before it said whose: no packet comes there.
pub(super) fn is_of(found: &Dump, of: &str) -> bool {
    let about = found.image.chains.get(ABOUT);
    let unfinished = about.is_some_and(|about| about.rules.is_empty())
        && found.image.chains.values().all(|chain| chain.base.is_none());
    unfinished
        || found.image.header().is_some()
            && about
                .and_then(|about| about.rules.get(1))
                .is_some_and(|rule| rule.comment == whose(of))
}

fn whose(of: &str) -> String {
    format!("part of table inet {of}")
}

/// Names of ours: base chains, and what ends in a slot or begins as counters do. BOSH's agent has `monit_access`, `monit_access_jobs` and `nats_access`.
fn is_own(name: &str) -> bool {
    use image::chain::{FORWARD, OUTPUT, PREROUTING};
    let counter = name == image::UNREADABLE || image::counters_of(TARGET).iter().any(|counter| counter == name);
    let begins = [
        "judge_",
        "arrived_",
        "strays_",
        "class_",
        "target_",
        "refuse_",
        "users_",
        "cgroups_",
        "endpoints",
        "ranges",
        "forwarded_",
        "addresses",
        "unreadable",
    ];
    let slotted = (name.ends_with("_a") || name.ends_with("_b")) && begins.iter().any(|begin| name.starts_with(begin));
    [ABOUT, OUTPUT, FORWARD, PREROUTING].contains(&name) || counter || slotted
}

/// What our own table is to judge, and what the shared one; none without the target.
fn split(rules: &RuleSet) -> Option<(RuleSet, RuleSet)> {
    let index = rules.targets.iter().position(|target| target.name == TARGET)?;
    let mut own = rules.clone();
    let target = own.targets.remove(index);
    let without = |owners: u64| owners & ((1 << index) - 1) | (owners >> index >> 1) << index;
    own.places.retain_mut(|(_, owners)| {
        *owners = without(*owners);
        *owners != 0
    });
    let places = rules.places.iter().filter(|(_, owners)| owners >> index & 1 == 1);
    let shared = RuleSet {
        mode: rules.mode,
        targets: vec![target],
        places: places.map(|(place, _)| (*place, 1)).collect(),
        nat64: rules.nat64.clone(),
        named_ports: BTreeSet::new(), // Our own table tells of dials.
    };
    Some((own, shared))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

    use proptest::prelude::*;

    use super::{
        super::tests::{LOADER, attempt, rules},
        *,
    };
    use crate::ruleset::explain;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// D2: a packet that both tables let through is one that the oracle lets through, and no other.
        #[test]
        fn two_tables_decide_as_the_oracle(mut rules in rules(), which in any::<prop::sample::Index>(), attempts in prop::collection::vec(attempt(), 1..20)) {
            let index = which.index(rules.targets.len());
            rules.targets.get_mut(index).expect("a target").name = TARGET.to_owned();
            let (own, shared) = split(&rules).expect("the target is there");
            let own = image::lower(&own, 7, LOADER);
            let mut shared = image::lower(&shared, 4, LOADER);
            honour(&mut shared, "enforcer");
            let names = shared.chains.keys().chain(shared.sets.keys()).chain(&shared.counters);
            prop_assert!(names.clone().all(|name| is_own(name)), "{:?}", names.collect::<Vec<_>>());
            let image = |image| Reading(Dump { image, ..Dump::default() });
            let both = Readings { own: image(own), shared: Some(image(shared)) };
            for attempt in attempts {
                let expected = explain(&rules, &attempt);
                let found = both.check(&attempt);
                prop_assert_eq!(found.verdict, expected.verdict, "{:?}", &attempt);
                prop_assert_eq!(found.owners.len(), expected.owners.len());
            }
        }
    }

    #[test]
    fn what_others_have_is_not_ours() {
        for name in [
            "monit_access",
            "monit_access_jobs",
            "nats_access",
            "jobs_a",
            "class",
            "allowed_nats",
        ] {
            assert!(!is_own(name), "{name}");
        }
    }
}
