//! What is active, for those who only read it: `status`, `check` and `verify` without a daemon, `doctor`, a start.

use enforcer_ebpf::Verdict;

use super::{
    ebpf::{BackendError, Checked, Observed, Pinned},
    merged, nftables,
};
use crate::{
    config::{Backend, Settings},
    ruleset::{Attempt, RuleSet},
    verify::Comparison,
    wire::{ActiveBackend, Against, Object, Verification},
};

/// What is active, for those who only read it.
#[derive(Debug)]
pub(crate) struct ActiveRules {
    ebpf: Option<Pinned>,
    nftables: Option<nftables::Reading>,
}

impl ActiveRules {
    /// Reads what is active; none where nothing is.
    pub(crate) fn open(settings: &Settings) -> Result<Option<Self>, BackendError> {
        match Self::open_as_far_as_possible(settings)? {
            (_, Some(unread)) => Err(unread),
            (active, None) => Ok(active),
        }
    }

    /// Reads what is active, and tells why part of it cannot be read: another version's, or damaged.
    pub(crate) fn open_as_far_as_possible(
        settings: &Settings,
    ) -> Result<(Option<Self>, Option<BackendError>), BackendError> {
        let (ebpf, unread) = match Pinned::open(&settings.pin_dir) {
            Ok(ebpf) => (ebpf, None),
            Err(error @ (BackendError::OtherVersion { .. } | BackendError::Damaged { .. })) => (None, Some(error)),
            Err(error) => return Err(error),
        };
        let nftables = nftables::open(&settings.nft_table)?;
        let active = (ebpf.is_some() || nftables.is_some()).then_some(Self { ebpf, nftables });
        Ok((active, unread))
    }

    /// Whether rules are active on some backend.
    pub(crate) fn are_there(settings: &Settings) -> Result<bool, BackendError> {
        let (found, _) = Self::open_as_far_as_possible(settings)?;
        Ok(found.is_some_and(|found| found.enforces()))
    }

    /// Whether rules are active on some backend, or what is there cannot be read.
    pub(crate) fn may_be_there(settings: &Settings) -> Result<bool, BackendError> {
        let (found, unread) = Self::open_as_far_as_possible(settings)?;
        Ok(unread.is_some() || found.is_some_and(|found| found.enforces()))
    }

    fn enforces(&self) -> bool {
        let on_nftables = || {
            let reading = self.nftables.as_ref();
            reading.is_some_and(|reading| reading.observe().generation != 0 && reading.image().is_reached())
        };
        self.ebpf.as_ref().is_some_and(Pinned::is_attached) || on_nftables()
    }

    /// Whether some backend may hold endpoints of one of these targets: it does, or what it holds cannot be read.
    pub(crate) fn may_guard(settings: &Settings, targets: &[&str]) -> Result<bool, BackendError> {
        let (found, unread) = Self::open_as_far_as_possible(settings)?;
        let Some(Self { ebpf, nftables }) = found else {
            return Ok(unread.is_some());
        };
        let ebpf = ebpf.map(|pinned| pinned.observe(None)).transpose()?;
        let nftables = nftables.map(|reading| reading.observe());
        let guards = |observed: Observed| {
            let mut guarded = observed.targets.into_iter().filter(|target| target.endpoints > 0);
            observed.generation != 0 && guarded.any(|target| targets.contains(&target.name.as_str()))
        };
        Ok(unread.is_some() || [ebpf, nftables].into_iter().flatten().any(guards))
    }

    /// Whether what is active comes from a rule set, whoever made it so, on one backend or more: whoever asks is about
    /// to make it active on all. So no matter which links and pins are there, or a table that is dormant beside it; nor
    /// what a process that was killed between a switch and its cleaning up left of the rules before.
    pub(crate) fn holds(rules: &RuleSet, settings: &Settings, cgroup: u64) -> Result<bool, BackendError> {
        let Some(Self { ebpf, nftables }) = Self::open(settings)? else {
            return Ok(false);
        };
        let mut nftables = nftables.filter(|reading| ebpf.is_none() || !reading.is_dormant());
        if let Some(reading) = &mut nftables {
            reading.forget_the_other_slot();
        }
        let found = Self { ebpf, nftables }.verify(rules, settings, cgroup)?;
        Ok(found.counts.keys().all(|object| {
            matches!(
                object,
                Object::Backend | Object::Link | Object::PinDirectory | Object::Counters
            )
        }))
    }

    /// What the kernel holds now; `cgroup` is the id of the one to be judged, where that is known.
    pub(crate) fn observe(&self, cgroup: Option<u64>) -> Result<Observed, BackendError> {
        let ebpf = self.ebpf.as_ref().map(|pinned| pinned.observe(cgroup)).transpose()?;
        let nftables = self.nftables.as_ref().map(nftables::Reading::observe);
        Ok(merged(ebpf, nftables).unwrap_or_default())
    }

    /// Compares all that the kernel holds with what a rule set asks for; the cgroup is the id of the one to be judged.
    pub(crate) fn verify(
        &self,
        rules: &RuleSet,
        settings: &Settings,
        cgroup: u64,
    ) -> Result<Verification, BackendError> {
        let mut comparison = Comparison::default();
        let wanted = match settings.backend {
            Backend::Auto => self.backend().to_string(),
            Backend::Ebpf | Backend::Nftables | Backend::Both => settings.backend.to_string(),
        };
        comparison.words(&Object::Backend, "active", &wanted, &self.backend().to_string());
        let mut number = 0;
        if let Some(reading) = &self.nftables {
            number = reading.verify(rules, settings.forward, &mut comparison);
        }
        if let Some(pinned) = &self.ebpf {
            number = pinned.verify(rules, cgroup, &mut comparison)?;
        }
        Ok(comparison.finish(Against::Configuration, self.backend(), number))
    }

    /// What enforces.
    #[must_use]
    pub(crate) fn backend(&self) -> ActiveBackend {
        ActiveBackend::of(self.ebpf.is_some(), self.nftables.is_some())
    }

    /// The table, if packets meet it.
    fn table(&self) -> Option<&nftables::Reading> {
        self.nftables.as_ref().filter(|reading| !reading.is_dormant())
    }

    /// Whether there is something that [`ActiveRules::check`] can ask.
    pub(crate) fn decide(&self) -> bool {
        self.ebpf.is_some() || self.table().is_some()
    }

    /// The verdict of what is active: a denial of either half is one. The cgroup is the id of the one to be judged,
    /// where that is known.
    pub(crate) fn check(&self, attempt: &Attempt, cgroup: Option<u64>) -> Result<Checked, BackendError> {
        let ebpf = self.ebpf.as_ref().map(|pinned| pinned.check(attempt, cgroup));
        let ebpf = ebpf.transpose()?;
        let nftables = self.table().map(|reading| nftables::check::check(reading, attempt));
        let (Some(ebpf), Some(nftables)) = (&ebpf, &nftables) else {
            return ebpf.or(nftables).ok_or(BackendError::ReadBack { map: "active" });
        };
        let denies = |checked: &Checked| matches!(checked.verdict, Verdict::Deny | Verdict::WouldDeny);
        Ok(if ebpf.without.is_some() || denies(nftables) && !denies(ebpf) {
            nftables
        } else {
            ebpf
        }
        .clone())
    }
}
