//! What carries a rule set in the kernel: eBPF, nftables, or both as one. Taken over at the start; then applied, kept,
//! observed, verified; unloaded.

mod active_rules;
mod ebpf;
mod nftables;
pub(crate) mod probe;
mod store;
pub(crate) mod third_party;
mod writer;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use enforcer_ebpf::{DialRecord, EventRecord};
use tracing::warn;

use crate::{
    config::{Backend, Settings},
    ruleset::RuleSet,
    verify::Comparison,
    wire::{ActiveBackend, Against, ConditionId, Verification},
};

pub use ebpf::image::programs;

pub(crate) use active_rules::ActiveRules;
pub(crate) use ebpf::{
    BackendError, Checked, EbpfBackend, Lacking, LinkLook, LinksSeen, Observed, ObservedTarget, Ring, SocketUsers,
    Trace, look_ahead,
};
pub(crate) use nftables::{Logged, LoggedDenial, NflogListener, NftChanges, NftablesBackend, NftablesError, jobs};

pub(crate) use store::Store;

#[cfg(test)]
pub(crate) use nftables::unload as remove_table;

use nftables::image::counters_of;
use probe::{Fact, Usability};
use writer::Writer;

/// The highest number of a generation: one beyond it was not given by us, and must not end the counting.
const HIGHEST_GENERATION: u64 = u64::MAX / 2;

/// What is active in the kernel, for the process that writes it.
#[derive(Debug)]
pub(crate) struct Enforcement {
    ebpf: Option<EbpfBackend>,
    nftables: Option<NftablesBackend>,
    /// Why `auto` took what it took, if that is not the first choice.
    reason: Option<String>,
    /// How often a change that another process made to our rules was repaired (F5).
    restored: u64,
    /// The highest number of the rules of any backend so far: numbers grow when backends change, too.
    highest: u64,
    /// That nobody else writes (F11).
    _writer: Option<Writer>,
}

/// A dial of a port of names, at an address that is no endpoint (N8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dial {
    /// Destination; of what nftables logged, after NAT.
    pub to: SocketAddr,
    /// The user; none for what is forwarded, and for the kernel's own sockets.
    pub user: Option<u32>,
}

impl From<DialRecord> for Dial {
    fn from(record: DialRecord) -> Self {
        let octets = record.address.map(u32::to_ne_bytes).concat();
        let octets: [u8; 16] = octets.try_into().unwrap_or_default();
        Self {
            to: SocketAddr::new(IpAddr::from(octets).to_canonical(), u16::from_be(record.port)),
            user: Some(record.task_uid),
        }
    }
}

/// Where a backend attaches, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start<'a> {
    /// What the configuration says.
    pub settings: &'a Settings,
    /// The cgroup to attach to; none where no cgroup v2 is mounted.
    pub cgroup: Option<&'a Path>,
    /// Whether the process stays.
    pub daemon: bool,
    /// How much the kernel programs tell.
    pub log_level: u8,
}

impl Start<'_> {
    fn ebpf(&self) -> Result<EbpfBackend, BackendError> {
        let cgroup = self.cgroup.ok_or(BackendError::NoCgroup2)?;
        EbpfBackend::take_over(&self.settings.pin_dir, cgroup, self.daemon, self.log_level)
    }

    fn nftables(&self) -> Result<NftablesBackend, BackendError> {
        let Settings { nft_table, forward, .. } = self.settings;
        Ok(NftablesBackend::take_over(nft_table, *forward, self.daemon)?)
    }
}

impl Enforcement {
    /// Takes over what is there, or makes it. Nothing is judged differently before the first [`Store::apply`].
    pub(crate) fn take_over(start: Start<'_>) -> Result<Box<dyn Store>, BackendError> {
        let mut this = Self {
            ebpf: None,
            nftables: None,
            reason: None,
            restored: 0,
            highest: 0,
            _writer: Writer::of(&start.settings.state_dir, true)?,
        };
        this.extend(start)?;
        Ok(Box::new(this))
    }

    /// Takes what `auto` chooses, by the two facts that this start finds: the second is looked for only where it
    /// matters.
    fn choose(&mut self, start: Start<'_>) -> Result<(), BackendError> {
        let tried = start.ebpf().and_then(|mut kernel| kernel.try_out().map(|()| kernel));
        let mut works = Usability {
            ebpf: tried.as_ref().map_or_else(Fact::from_backend, |_| Fact::Supported),
            nftables: Fact::Inconclusive("not tried".to_owned()),
        };
        if let Fact::Missing { why } = &works.ebpf {
            if self.nftables.is_none() {
                self.nftables = Some(start.nftables().map_err(|nftables| BackendError::Neither {
                    ebpf: why.as_str().into(),
                    nftables: Box::new(nftables),
                })?);
            }
            works.nftables = Fact::Supported;
        }
        let choice = probe::choose(&works, Backend::Auto);
        let ebpf = match (choice.backend, tried) {
            (Some(_), tried) => tried.ok(),
            (None, Ok(_)) => None,
            (None, Err(error)) => return Err(error),
        };
        self.ebpf = ebpf;
        if choice.backend == Some(Backend::Nftables) {
            warn!("{}", choice.reason);
            self.reason = Some(choice.reason);
        }
        Ok(())
    }

    /// As `highest`, of what the backends hold now, too.
    fn highest(&mut self) -> Result<u64, BackendError> {
        let ebpf = self.ebpf.as_ref().map_or(Ok(0), EbpfBackend::generation)?;
        let nftables = self.nftables.as_ref().map_or(0, NftablesBackend::generation);
        self.highest = self.highest.max(nftables.max(ebpf).min(HIGHEST_GENERATION));
        Ok(self.highest)
    }

    fn observed(&mut self, quick: bool) -> Result<Observed, BackendError> {
        let ebpf = self.ebpf.as_ref().map(|kernel| kernel.observe(quick)).transpose()?;
        let nftables = self.nftables.as_mut().map(NftablesBackend::observe).transpose()?;
        Ok(merged(ebpf, nftables).unwrap_or_default())
    }
}

impl Store for Enforcement {
    fn extend(&mut self, start: Start<'_>) -> Result<(), BackendError> {
        self.highest()?;
        let half = |name| {
            move |error| BackendError::Half {
                name,
                error: Box::new(error),
            }
        };
        match start.settings.backend {
            Backend::Ebpf => {
                if self.ebpf.is_none() {
                    self.ebpf = Some(start.ebpf()?);
                }
            }
            Backend::Nftables => {
                if self.nftables.is_none() {
                    self.nftables = Some(start.nftables()?);
                }
            }
            Backend::Both => {
                if self.nftables.is_none() {
                    self.nftables = Some(start.nftables().map_err(half("nftables"))?);
                }
                if self.ebpf.is_none() {
                    self.ebpf = Some(start.ebpf().map_err(half("ebpf"))?);
                }
            }
            Backend::Auto if self.ebpf.is_some() => {}
            Backend::Auto => self.choose(start)?,
        }
        if let Some(nftables) = &mut self.nftables {
            nftables.set_forward(start.settings.forward);
        }
        Ok(())
    }

    fn retire(&mut self, settings: &Settings) {
        let (ebpf, nftables) = match settings.backend {
            Backend::Ebpf => (true, false),
            Backend::Nftables => (false, true),
            Backend::Both => (true, true),
            Backend::Auto => (self.reason.is_none(), self.reason.is_some()),
        };
        if !ebpf {
            let removed = match self.ebpf.take() {
                Some(kernel) => kernel.unload(),
                None => ebpf::unload(&settings.pin_dir).map(drop),
            };
            if let Err(error) = removed {
                warn!("remove what the ebpf backend left: {error}");
            }
        }
        if !nftables {
            let removed = match self.nftables.take() {
                Some(nftables) => nftables.unload(),
                None => nftables::unload(&settings.nft_table).map(drop),
            };
            if let Err(error) = removed {
                warn!("remove what the nftables backend left: {error}");
            }
        }
        if ebpf {
            self.reason = None;
        } else if let Some(nftables) = &mut self.nftables
            && let Err(error) = nftables.number_above(self.highest)
        {
            warn!("{error}; the rules have a lower generation number than before");
        }
    }

    fn apply(&mut self, rules: &RuleSet) -> Result<u64, BackendError> {
        let both = self.ebpf.is_some() && self.nftables.is_some();
        let half = |name, error: BackendError| {
            if both {
                BackendError::Half {
                    name,
                    error: Box::new(error),
                }
            } else {
                error
            }
        };
        let above = self.highest()?;
        let mut number = 0;
        let mut saved = None;
        if let Some(nftables) = &mut self.nftables {
            if both {
                saved = Some(nftables.save()?);
            }
            number = nftables
                .apply(rules, above)
                .map_err(|error| half("nftables", error.into()))?;
        }
        if let Some(kernel) = &mut self.ebpf {
            match kernel.apply(rules, above) {
                Ok(applied) => number = applied,
                Err(error) => {
                    if let (Some(nftables), Some(saved)) = (&mut self.nftables, saved) {
                        nftables.put_back(saved)?;
                    }
                    return Err(half("ebpf", error));
                }
            }
        }
        Ok(number)
    }

    fn ensure_active(&mut self, number: u64) -> Result<Option<u64>, BackendError> {
        let mut kept = number;
        if let Some(nftables) = &mut self.nftables
            && !nftables.is_whole()?
        {
            kept = nftables.repair()?;
            self.restored += 1;
        }
        match &mut self.ebpf {
            Some(kernel) => {
                let before = kernel.repaired();
                let kept = kernel.ensure_active(number);
                self.restored += u64::from(kernel.repaired() != before);
                kept
            }
            // Alone it may have been numbered anew.
            None => Ok(Some(self.nftables.as_ref().map_or(kept, NftablesBackend::generation))),
        }
    }

    fn link_look(&self) -> Option<LinkLook> {
        self.ebpf.as_ref().and_then(EbpfBackend::link_look)
    }

    fn links_seen(&mut self, seen: LinksSeen) -> bool {
        self.ebpf.as_mut().is_some_and(|kernel| kernel.links_seen(seen))
    }

    fn begin_to_wait_for_readers(&mut self) {
        if let Some(kernel) = &mut self.ebpf {
            kernel.begin_to_wait_for_readers();
        }
    }

    fn verify(&mut self, rules: &RuleSet) -> Result<Verification, BackendError> {
        let mut comparison = Comparison::default();
        let mut number = 0;
        if let Some(nftables) = &mut self.nftables {
            number = nftables.verify(rules, &mut comparison)?;
        }
        if let Some(kernel) = &self.ebpf {
            number = kernel.verify(rules, &mut comparison)?;
        }
        Ok(comparison.finish(Against::Daemon, self.backend(), number))
    }

    fn observe(&mut self) -> Result<Observed, BackendError> {
        self.observed(false)
    }

    fn observe_quickly(&mut self) -> Result<Observed, BackendError> {
        self.observed(true)
    }

    fn denial_counts(&mut self, targets: Vec<String>) -> Result<BTreeMap<String, u64>, BackendError> {
        let ebpf = self.ebpf.as_ref().map(|kernel| kernel.observe(true)).transpose()?;
        let mut counts: BTreeMap<String, u64> = targets.into_iter().map(|target| (target, 0)).collect();
        for target in ebpf.into_iter().flat_map(|observed| observed.targets) {
            if let Some(sum) = counts.get_mut(&target.name) {
                *sum += target.counters.denied + target.counters.would_deny;
            }
        }
        if let Some(nftables) = &mut self.nftables {
            let found = nftables.counters()?;
            for (target, sum) in &mut counts {
                let [_, denied, would_deny] = counters_of(target);
                *sum += [denied, would_deny]
                    .iter()
                    .filter_map(|name| found.get(name))
                    .sum::<u64>();
            }
        }
        Ok(counts)
    }

    fn backend(&self) -> ActiveBackend {
        ActiveBackend::of(self.ebpf.is_some(), self.nftables.is_some())
    }

    fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    fn ignores_cgroups(&self) -> bool {
        self.nftables.as_ref().is_some_and(|nftables| !nftables.knows_cgroups())
    }

    fn restored(&self) -> u64 {
        self.restored
    }

    fn events(&self) -> Result<Option<Ring<EventRecord>>, BackendError> {
        self.ebpf.as_ref().map(EbpfBackend::events).transpose()
    }

    fn lost(&self) -> Result<u64, BackendError> {
        self.ebpf.as_ref().map_or(Ok(0), EbpfBackend::lost)
    }

    fn logged(&mut self) -> Option<NflogListener> {
        self.nftables.as_mut().and_then(NftablesBackend::denials)
    }

    fn unlogged(&self) -> Option<&str> {
        self.nftables.as_ref().and_then(NftablesBackend::unlogged)
    }

    fn dials(&self) -> Result<Option<Ring<DialRecord>>, BackendError> {
        self.ebpf.as_ref().map(EbpfBackend::dials).transpose()
    }

    fn set_gate(&self, port: u16, open: bool) -> Result<(), BackendError> {
        self.ebpf.as_ref().map_or(Ok(()), |kernel| kernel.set_gate(port, open))
    }

    fn take_knock(&self, port: u16) -> Result<bool, BackendError> {
        self.ebpf.as_ref().map_or(Ok(false), |kernel| kernel.take_knock(port))
    }

    fn trace(&mut self) -> Option<Trace> {
        self.ebpf.as_mut().and_then(EbpfBackend::trace)
    }

    fn unload(self: Box<Self>) -> Result<(), BackendError> {
        if let Some(nftables) = self.nftables {
            nftables.unload()?;
        }
        self.ebpf.map_or(Ok(()), EbpfBackend::unload)
    }

    fn is_active(&self, settings: &Settings) -> Result<bool, BackendError> {
        ActiveRules::are_there(settings)
    }

    fn may_guard(&self, settings: &Settings, targets: &[&str]) -> Result<bool, BackendError> {
        ActiveRules::may_guard(settings, targets)
    }

    fn holds(&self, rules: &RuleSet, settings: &Settings, cgroup: u64) -> Result<bool, BackendError> {
        ActiveRules::holds(rules, settings, cgroup)
    }
}

/// Two halves seen as one. What ebpf refuses never becomes a packet, so refusals add up; what passes both counts once.
fn merged(ebpf: Option<Observed>, nftables: Option<Observed>) -> Option<Observed> {
    let (mut one, other) = match (ebpf, nftables) {
        (Some(ebpf), Some(mut nftables)) if ebpf.generation == 0 && nftables.generation != 0 => {
            nftables
                .faults
                .push(ConditionId::Link.because("nothing is active in eBPF; restart enforcer"));
            nftables.faults.extend(ebpf.faults);
            return Some(nftables);
        }
        (Some(ebpf), Some(nftables)) => (ebpf, nftables),
        (one, other) => return one.or(other),
    };
    for target in &mut one.targets {
        if let Some(same) = other.targets.iter().find(|same| same.name == target.name) {
            target.counters.denied += same.counters.denied;
            target.counters.would_deny = target.counters.would_deny.max(same.counters.would_deny);
        }
    }
    if other.generation == 0 && one.generation != 0 {
        one.faults
            .push(ConditionId::Table.because("nothing is active in nftables; restart enforcer"));
    }
    one.faults.extend(other.faults);
    Some(one)
}

/// The daemon that has the right to write at a state directory, if one has.
pub(crate) fn daemon_of(state_dir: &Path) -> Option<impl std::fmt::Display> {
    writer::daemon(state_dir)
}

/// The keys whose places a start could not use for eBPF, and why; nothing where it would do without. Changes nothing.
pub(crate) fn unusable_places(settings: &Settings) -> Vec<(&'static str, BackendError)> {
    if settings.backend == Backend::Nftables {
        return Vec::new();
    }
    let cgroup = settings
        .cgroup
        .as_deref()
        .map_or(Ok(()), |cgroup| ebpf::open_cgroup(cgroup).map(drop));
    let tried = [
        ("cgroup", cgroup),
        ("pin_dir", ebpf::pins::Pins::check_usable(&settings.pin_dir)),
    ];
    let failed = tried.into_iter().filter_map(|(key, tried)| Some((key, tried.err()?)));
    let evades = |error: &BackendError| settings.backend == Backend::Auto && error.is_inability(ebpf::has_bpf);
    failed.filter(|(_, error)| !evades(error)).collect()
}

/// Removes all of ours from the kernel; false where there was nothing.
pub(crate) fn unload(settings: &Settings) -> Result<bool, BackendError> {
    let _writer = Writer::of(&settings.state_dir, false)?; // F11
    // What one half meets keeps nothing of the active other.
    let nftables = nftables::unload(&settings.nft_table);
    let jobs = nftables::jobs::remove_all_ours(settings);
    let ebpf = ebpf::unload(&settings.pin_dir)?;
    jobs?;
    Ok(nftables? || ebpf)
}

/// Removes what is active at places that are old ones, once the rest is active at the new ones.
pub(crate) fn remove_old_places(old: &Settings, new: &Settings) {
    let pins = (old.pin_dir != new.pin_dir).then(|| ebpf::unload(&old.pin_dir).map(drop));
    let table = (old.nft_table != new.nft_table).then(|| nftables::unload(&old.nft_table).map(drop));
    let chain = (jobs::comment(old) != jobs::comment(new)).then(|| jobs::remove_rules(old));
    let of_nftables = [table, chain].into_iter().flatten();
    let removed = pins
        .into_iter()
        .chain(of_nftables.map(|removed| removed.map_err(BackendError::from)));
    for error in removed.filter_map(Result::err) {
        warn!("remove what was enforced at the places before: {error}");
    }
}
