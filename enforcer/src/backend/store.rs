//! What the daemon asks of that which enforces. [`Enforcement`](super::Enforcement) answers from the kernel; the
//! daemon's tests have one that needs no rights.

use std::collections::BTreeMap;

use enforcer_ebpf::{DialRecord, EventRecord};

use super::{BackendError, LinkLook, LinksSeen, NflogListener, Observed, Ring, Start, Trace};
use crate::{
    config::Settings,
    ruleset::RuleSet,
    wire::{ActiveBackend, Verification},
};

/// What holds a rule set, and enforces it.
pub(crate) trait Store {
    /// Adds what another choice of backend needs; what it no longer needs stays until [`Store::retire`].
    fn extend(&mut self, start: Start<'_>) -> Result<(), BackendError>;
    /// Removes what the choice no longer needs, once the rest is active: no gap. Also what an earlier process left.
    fn retire(&mut self, settings: &Settings);
    /// Makes a rule set active on all halves or on none (F2). Returns its generation number.
    fn apply(&mut self, rules: &RuleSet) -> Result<u64, BackendError>;
    /// Sees to it that the generation made active last, of this number, is so whole, putting back what others took or
    /// changed (F5): the active number then, another one where rules or entries were written anew; with both backends
    /// eBPF's. None if another generation was made active last.
    fn ensure_active(&mut self, number: u64) -> Result<Option<u64>, BackendError>;
    /// A look at what others may have detached, to be taken in a thread of its own.
    fn link_look(&self) -> Option<LinkLook>;
    /// Takes what was found. True if [`Store::ensure_active`] has something to repair.
    fn links_seen(&mut self, seen: LinksSeen) -> bool;
    /// Begins to wait for what the next [`Store::apply`] would have to wait for.
    fn begin_to_wait_for_readers(&mut self);
    /// Compares all that the kernel holds with what a rule set asks for. Changes nothing.
    fn verify(&mut self, rules: &RuleSet) -> Result<Verification, BackendError>;
    /// What the kernel holds now, read from it.
    fn observe(&mut self) -> Result<Observed, BackendError>;
    /// As [`Store::observe`], but for entries of large maps: those as read back when they were written.
    fn observe_quickly(&mut self) -> Result<Observed, BackendError>;
    /// What the kernel has counted as denied, or as to be denied in audit mode, of each of these targets, and nothing
    /// else: reading large sets takes long.
    fn denial_counts(&mut self, targets: Vec<String>) -> Result<BTreeMap<String, u64>, BackendError>;
    /// What enforces.
    fn backend(&self) -> ActiveBackend;
    /// Why `auto` took nftables, if it did.
    fn reason(&self) -> Option<&str>;
    /// Whether principals with a cgroup match nobody, as this kernel's nftables cannot tell a socket's cgroup.
    fn ignores_cgroups(&self) -> bool;
    /// How often a change that another process made to our rules was repaired (F5).
    fn restored(&self) -> u64;
    /// The source of denials of the kernel programs, where these are in use. Each call opens another consumer of the
    /// same buffer, and each record goes to one consumer only: keep one.
    fn events(&self) -> Result<Option<Ring<EventRecord>>, BackendError>;
    /// Denials that the ring buffer of the kernel programs had no room for.
    fn lost(&self) -> Result<u64, BackendError>;
    /// The source of denials and dials that nftables logs. Returned once: the first caller keeps it.
    fn logged(&mut self) -> Option<NflogListener>;
    /// Why denials of nftables are counted, and not logged one by one, where that is so.
    fn unlogged(&self) -> Option<&str>;
    /// The dials that open gates tell of (N8). As [`Store::events`].
    fn dials(&self) -> Result<Option<Ring<DialRecord>>, BackendError>;
    /// Has the next dial of a port told, at an address that is no endpoint, or none (N8).
    fn set_gate(&self, port: u16, open: bool) -> Result<(), BackendError>;
    /// Whether others dialled a port after the one that was told.
    fn take_knock(&self, port: u16) -> Result<bool, BackendError>;
    /// What the kernel programs log, where they were loaded to. Returned once.
    fn trace(&mut self) -> Option<Trace>;
    /// Removes all of ours from the kernel.
    fn unload(self: Box<Self>) -> Result<(), BackendError>;
    /// Whether rules are active on some backend, by any process.
    fn is_active(&self, settings: &Settings) -> Result<bool, BackendError>;
    /// Whether such rules may hold endpoints of one of these targets: they do, or they cannot be read.
    fn may_guard(&self, settings: &Settings, targets: &[&str]) -> Result<bool, BackendError>;
    /// Whether such rules come from this rule set; the cgroup is the id of the one to be evaluated.
    fn holds(&self, rules: &RuleSet, settings: &Settings, cgroup: u64) -> Result<bool, BackendError>;
}
