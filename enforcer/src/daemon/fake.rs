//! A machine that is made up: what enforces there remembers what it was asked, outlives the daemon as the kernel does,
//! and fails when it is told to.

use std::{
    cell::{RefCell, RefMut},
    collections::{BTreeMap, BTreeSet},
    io,
    rc::Rc,
};

use super::machine::Machine;
use crate::{
    backend::{BackendError, LinkLook, LinksSeen, NflogListener, Observed, ObservedTarget, Ring, Start, Store, Trace},
    config::Settings,
    policy::Mode,
    ruleset::RuleSet,
    verify::Comparison,
    wire::{ActiveBackend, Against, Object, Verification},
};
use enforcer_ebpf::{Counters, DialRecord, EventRecord};

/// What is in the kernel.
#[derive(Default)]
pub(super) struct Kernel {
    pub(super) generation: u64,
    pub(super) applied: Vec<RuleSet>,
    pub(super) kept: Vec<u64>,
    /// Nothing can be made active or read.
    pub(super) refuses: bool,
    /// What others do to it before it is looked at next.
    pub(super) drift: Option<Drifted>,
    pub(super) restored: u64,
    /// Targets of which it holds an endpoint.
    pub(super) guards: &'static [&'static str],
    /// Ports whose next dial is to be told, or is not.
    pub(super) gates: BTreeMap<u16, bool>,
    /// Ports that others have dialled since.
    pub(super) knocks: BTreeSet<u16>,
    /// Denials counted so far.
    pub(super) denied: BTreeMap<String, u64>,
}

/// What others have done.
pub(super) enum Drifted {
    /// They have removed a part, which can be put back.
    Part,
    /// They have made another generation active.
    Replaced,
}

/// A machine with one kernel. A clone is the same machine.
#[derive(Clone, Default)]
pub(super) struct Fake(Rc<RefCell<Kernel>>);

impl Fake {
    /// One in which an earlier process made generation 5 active, for these targets.
    pub(super) fn guarding(guards: &'static [&'static str]) -> Self {
        let fake = Self::default();
        fake.kernel().generation = 5;
        fake.kernel().guards = guards;
        fake
    }

    pub(super) fn kernel(&self) -> RefMut<'_, Kernel> {
        self.0.borrow_mut()
    }

    /// The rules that are active.
    pub(super) fn active(&self) -> Option<RuleSet> {
        self.kernel().applied.last().cloned()
    }

    fn ready(&self) -> Result<RefMut<'_, Kernel>, BackendError> {
        let kernel = self.kernel();
        if kernel.refuses {
            return Err(BackendError::Io {
                action: "apply",
                object: "fake".into(),
                error: io::ErrorKind::OutOfMemory.into(),
            });
        }
        Ok(kernel)
    }
}

impl Machine for Fake {
    fn take_over(&self, _: Start<'_>) -> Result<Box<dyn Store>, BackendError> {
        Ok(Box::new(self.clone()))
    }
}

impl Store for Fake {
    fn extend(&mut self, _: Start<'_>) -> Result<(), BackendError> {
        Ok(())
    }

    fn retire(&mut self, _: &Settings) {}

    fn apply(&mut self, rules: &RuleSet) -> Result<u64, BackendError> {
        let mut kernel = self.ready()?;
        kernel.applied.push(rules.clone());
        kernel.generation += 1;
        Ok(kernel.generation)
    }

    fn ensure_active(&mut self, number: u64) -> Result<Option<u64>, BackendError> {
        let drift = {
            let mut kernel = self.kernel();
            kernel.kept.push(number);
            kernel.drift.take()
        };
        match drift {
            None => Ok(Some(number)),
            Some(Drifted::Replaced) => Ok(None),
            Some(Drifted::Part) => {
                self.kernel().restored += 1;
                let mut kernel = self.ready()?;
                kernel.generation += 1;
                Ok(Some(kernel.generation))
            }
        }
    }

    fn link_look(&self) -> Option<LinkLook> {
        None
    }

    fn links_seen(&mut self, _: LinksSeen) -> bool {
        false
    }

    fn begin_to_wait_for_readers(&mut self) {}

    fn verify(&mut self, rules: &RuleSet) -> Result<Verification, BackendError> {
        let generation = self.ready()?.generation;
        let mut comparison = Comparison::default();
        comparison.one(
            &Object::Backend,
            || "rules".to_owned(),
            Some(rules),
            self.active().as_ref(),
        );
        Ok(comparison.finish(Against::Daemon, self.backend(), generation))
    }

    fn observe(&mut self) -> Result<Observed, BackendError> {
        let kernel = self.ready()?;
        let rules = kernel.applied.last();
        let targets = rules.into_iter().flat_map(|rules| &rules.targets);
        Ok(Observed {
            generation: kernel.generation,
            audit: rules.is_some_and(|rules| rules.mode == Mode::Audit),
            by_daemon: true,
            netns: true,
            endpoints: rules.map_or(0, |rules| rules.places.len() as u64),
            targets: targets
                .map(|target| ObservedTarget {
                    name: target.name.clone(),
                    endpoints: 1,
                    allow: Vec::new(),
                    counters: Counters {
                        denied: kernel.denied.get(&target.name).copied().unwrap_or_default(),
                        ..Counters::default()
                    },
                })
                .collect(),
            ..Observed::default()
        })
    }

    fn observe_quickly(&mut self) -> Result<Observed, BackendError> {
        self.observe()
    }

    fn denial_counts(&mut self, targets: Vec<String>) -> Result<BTreeMap<String, u64>, BackendError> {
        let kernel = self.ready()?;
        let count = |target: String| {
            let denied = kernel.denied.get(&target).copied().unwrap_or_default();
            (target, denied)
        };
        Ok(targets.into_iter().map(count).collect())
    }

    fn backend(&self) -> ActiveBackend {
        ActiveBackend::of(false, true)
    }

    fn reason(&self) -> Option<&str> {
        None
    }

    fn ignores_cgroups(&self) -> bool {
        false
    }

    fn restored(&self) -> u64 {
        self.kernel().restored
    }

    fn events(&self) -> Result<Option<Ring<EventRecord>>, BackendError> {
        Ok(None)
    }

    fn lost(&self) -> Result<u64, BackendError> {
        Ok(0)
    }

    fn logged(&mut self) -> Option<NflogListener> {
        None
    }

    fn unlogged(&self) -> Option<&str> {
        None
    }

    fn dials(&self) -> Result<Option<Ring<DialRecord>>, BackendError> {
        Ok(None)
    }

    fn set_gate(&self, port: u16, open: bool) -> Result<(), BackendError> {
        self.ready()?.gates.insert(port, open);
        Ok(())
    }

    fn take_knock(&self, port: u16) -> Result<bool, BackendError> {
        Ok(self.ready()?.knocks.remove(&port))
    }

    fn trace(&mut self) -> Option<Trace> {
        None
    }

    fn unload(self: Box<Self>) -> Result<(), BackendError> {
        let mut kernel = self.ready()?;
        *kernel = Kernel::default();
        Ok(())
    }

    fn is_active(&self, _: &Settings) -> Result<bool, BackendError> {
        Ok(self.ready()?.generation != 0)
    }

    fn may_guard(&self, _: &Settings, targets: &[&str]) -> Result<bool, BackendError> {
        Ok(self.kernel().guards.iter().any(|guarded| targets.contains(guarded)))
    }

    fn holds(&self, rules: &RuleSet, _: &Settings, _: u64) -> Result<bool, BackendError> {
        Ok(self.kernel().applied.last() == Some(rules))
    }
}
