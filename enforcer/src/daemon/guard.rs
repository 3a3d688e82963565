//! Has the kernel hold what is desired: makes it active, repairs it with pauses (F5), and leaves alone what it must not
//! replace (F1). Of what enforces it knows no more than [`Store`]; time is passed in.

use std::{sync::Arc, time::Instant};

use super::{DaemonError, Drift};
use crate::{
    backend::Store,
    inputs::{Desired, Inputs},
    policy::Policy,
    ruleset::{Host, Resolved, RuleSet},
};

/// Why what is active is left as it is: it is newer than all that this process knows (F1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Hold {
    /// It is not.
    #[default]
    No,
    /// Until names are looked up and the message bus is known: what the last run knew of them is lost.
    UntilResolved,
    /// Until a configuration is taken.
    UntilConfigured,
}

/// Knows what this process made active, and what it leaves alone.
#[derive(Debug, Default)]
pub(super) struct Guard {
    active: Option<Active>,
    pub(super) hold: Hold,
    pub(super) drift: Drift,
}

/// What is active, and what it was made from.
#[derive(Debug)]
struct Active {
    generation: u64,
    policy: Arc<Policy>,
    host: Host,
    resolved: Resolved,
}

/// Rules that have just been made active.
#[derive(Debug)]
pub(super) struct Applied {
    pub(super) generation: u64,
    pub(super) rules: RuleSet,
}

/// What [`Guard::reconcile`] came to.
#[derive(Debug)]
pub(super) struct Reconciled {
    /// The rules made active, where others were before.
    pub(super) applied: Result<Option<Applied>, DaemonError>,
    /// Whether others had removed or changed something.
    pub(super) drifted: bool,
}

impl Guard {
    /// Whether this process has made anything active.
    pub(super) fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// The number of the rules that this process made active; 0 before.
    pub(super) fn generation(&self) -> u64 {
        self.active.as_ref().map_or(0, |active| active.generation)
    }

    /// Whether what is active stays as it is.
    pub(super) fn is_held(&self) -> bool {
        self.hold != Hold::No
    }

    /// The first rules of a process that knows the last known good ones: what is active stays, and where nothing is,
    /// these become so (F4).
    pub(super) fn resume(
        &mut self,
        store: &mut dyn Store,
        last_good: &Inputs,
        now: Instant,
    ) -> Result<Option<Applied>, DaemonError> {
        if store.is_active(last_good.settings())? {
            return Ok(None);
        }
        self.apply(store, last_good, now).map(Some)
    }

    /// The first rules of a process that has a configuration. None yet where the kernel may guard addresses of which
    /// the last run left no record: those of names that are not looked up yet, and of a message bus that is not known.
    /// They would be open until then (F1).
    pub(super) fn begin(
        &mut self,
        store: &mut dyn Store,
        inputs: &Inputs,
        has_record: bool,
        now: Instant,
    ) -> Result<Option<Applied>, DaemonError> {
        let unknown: Vec<&str> = inputs.targets_unknown(now).collect();
        if !has_record && !unknown.is_empty() && store.may_guard(inputs.settings(), &unknown)? {
            self.hold = Hold::UntilResolved;
            return Ok(None);
        }
        self.apply(store, inputs, now).map(Some)
    }

    /// The first rules of a process whose configuration is refused, if it has made none active. The rules that another
    /// process made active are taken over if they are the last known good ones, and else left alone (F1). The cgroup is
    /// the id of the one to be evaluated.
    pub(super) fn fall_back(
        &mut self,
        store: &mut dyn Store,
        last_good: &Inputs,
        cgroup: u64,
        now: Instant,
    ) -> Result<Option<Applied>, DaemonError> {
        if self.is_active() {
            return Ok(None);
        }
        if store.holds(&last_good.desired(now)?.rules, last_good.settings(), cgroup)? {
            return self.apply(store, last_good, now).map(Some);
        }
        self.hold = Hold::UntilConfigured;
        Ok(None)
    }

    /// Makes active what inputs come to.
    pub(super) fn apply(
        &mut self,
        store: &mut dyn Store,
        inputs: &Inputs,
        now: Instant,
    ) -> Result<Applied, DaemonError> {
        if self.is_held() {
            return Err(DaemonError::Frozen);
        }
        let Desired { resolved, rules } = inputs.desired(now)?;
        let generation = store.apply(&rules)?;
        self.active = Some(Active {
            generation,
            policy: Arc::clone(inputs.policy()),
            host: inputs.host.clone(),
            resolved,
        });
        Ok(Applied { generation, rules })
    }

    /// Makes active what another configuration comes to, whatever is held: it is what was waited for.
    pub(super) fn apply_configured(
        &mut self,
        store: &mut dyn Store,
        inputs: &Inputs,
        now: Instant,
    ) -> Result<Applied, DaemonError> {
        let hold = std::mem::take(&mut self.hold);
        self.apply(store, inputs, now).inspect_err(|_| self.hold = hold)
    }

    /// Sees to it that what inputs come to is active; `again` where that failed last. Nothing is done while something
    /// is held or, after a fight with others, for a pause.
    pub(super) fn reconcile(
        &mut self,
        store: &mut dyn Store,
        inputs: &Inputs,
        again: bool,
        now: Instant,
    ) -> Option<Reconciled> {
        if self.hold == Hold::UntilResolved && inputs.targets_unknown(now).next().is_none() {
            self.hold = Hold::No;
        }
        if self.is_held() || self.drift.is_paused(now) {
            return None;
        }
        let restored = store.restored();
        let kept = match &mut self.active {
            Some(active) if !again && active.is_of(inputs, now) => store.ensure_active(active.generation).map(|kept| {
                active.generation = kept.unwrap_or(active.generation);
                kept.is_some()
            }),
            Some(_) | None => Ok(false),
        };
        let drifted = store.restored() != restored;
        if drifted {
            self.drift.happened(now);
        }
        let applied = match kept {
            Ok(true) => Ok(None),
            Ok(false) => self.apply(store, inputs, now).map(Some),
            Err(error) => Err(error.into()),
        };
        Some(Reconciled { applied, drifted })
    }
}

impl Active {
    fn is_of(&self, inputs: &Inputs, now: Instant) -> bool {
        Arc::ptr_eq(&self.policy, inputs.policy())
            && self.host == inputs.host
            && self.resolved == inputs.names.resolved(now)
    }
}

#[cfg(test)]
mod tests;
