//! What the daemon tells of itself: `Status` from what it knows and what the kernel holds.

use std::time::Instant;

use tracing::warn;

use super::{About, Daemon, Drift, boot::Pending};
use crate::{
    backend::{BackendError, Observed},
    status::{Context, identify, status},
    text::counted,
    visibility::Visibility,
    wire::{Condition, ConditionId, Severity, Status},
};

impl Daemon {
    /// Looks whether what must outlive this process lies where the host sees it (F1).
    pub(super) fn look_at_visibility(&mut self) {
        let ebpf = self.enforcement.backend().has_ebpf();
        let ebpf_on = self.inputs.config.cgroup.as_deref().filter(|_| ebpf);
        let found = Visibility::of(self.inputs.settings(), ebpf_on, self.stays);
        self.faults.set(About::Visibility, found.fault());
        if self.visibility_unknown != found.unknown {
            if let Some(why) = &found.unknown {
                warn!("it is unknown whether the host sees pins, state and socket: {why}");
            }
            self.visibility_unknown = found.unknown;
        }
    }

    /// All of it read from the kernel.
    pub(super) fn status(&mut self) -> Status {
        self.look_at_visibility();
        let observed = self.enforcement.observe();
        self.status_of(observed)
    }

    /// For those who have just applied a rule set: entries that were read back or read then are not read again.
    pub(super) fn status_after_apply(&mut self) -> Status {
        self.look_at_visibility();
        self.quick_status()
    }

    /// For those who wait to connect (B3).
    pub(super) fn quick_status(&mut self) -> Status {
        let observed = self.enforcement.observe_quickly();
        self.status_of(observed)
    }

    fn status_of(&mut self, mut observed: Result<Observed, BackendError>) -> Status {
        if let Ok(observed) = &mut observed {
            identify(observed, &mut self.identities, Instant::now());
        }
        let mut conditions: Vec<Condition> = self.faults.all().collect();
        // A bus that was never known is open.
        for one in conditions.iter_mut().filter(|one| one.id == ConditionId::MessageBus) {
            if self.inputs.bus.is_none() {
                one.severity = Severity::Critical;
            }
        }
        // So are the targets of files that were left out at the start.
        for one in conditions
            .iter_mut()
            .filter(|one| one.id == ConditionId::ConfigurationRejected)
        {
            if self.pending.as_ref().is_some_and(Pending::is_partly) {
                one.severity = Severity::Critical;
            }
        }
        for (path, by) in &self.inputs.host.writable {
            conditions.push(ConditionId::CgroupWritable.because(format!(
                "cgroup {path} matches nobody: {by}, who could let in anyone; make root its owner and the only user \
                 who can write it, or use a cgroup where that is so"
            )));
        }
        for path in self.inputs.config.policy.cgroups() {
            if !self.inputs.host.cgroups.contains_key(&path) && !self.inputs.host.writable.contains_key(&path) {
                let just_made =
                    || format!("cgroup {path} is new; its principals match nobody until the rules include it");
                let why = self.inputs.config.why_nobody(&path).unwrap_or_else(just_made);
                conditions.push(ConditionId::CgroupMissing.because(why));
            }
        }
        if self.enforcement.ignores_cgroups() && !self.inputs.config.policy.cgroups().is_empty() {
            conditions.push(ConditionId::CgroupsIgnored.because(
                "this kernel's nftables cannot match a socket's cgroup (Linux 5.13 can); principals with a cgroup \
                 match nobody",
            ));
        }
        if self.guard.drift.is_recent(Instant::now()) {
            conditions.push(ConditionId::ChangedByOthers.because(format!(
                "another process removed or changed enforcer's rules ({}, last within {} s); find it with nft \
                 monitor or bpftool",
                counted(self.enforcement.restored(), "time"),
                Drift::MEMORY.as_secs()
            )));
        }
        if let Some(why) = self.enforcement.unlogged() {
            conditions.push(ConditionId::DenialsNotReported.because(why).with(Severity::Info));
        }
        if let Err(error) = &observed {
            conditions.push(ConditionId::Unreadable.because(error.to_string()));
        }
        let names = self.inputs.names.report();
        let settings = &self.inputs.settings();
        let context = Context {
            daemon: Some(std::process::id()),
            cgroup: self.inputs.config.cgroup_shown(),
            pin_dir: settings.pin_dir.display().to_string(),
            nft_table: settings.nft_table.clone(),
            state_dir: settings.state_dir.display().to_string(),
            socket: settings.socket.display().to_string(),
            backend: self.enforcement.backend(),
            backend_reason: self.enforcement.reason().map(str::to_owned),
            restored: self.enforcement.restored(),
            names,
            dials: self.dials.report(&self.identities),
            conditions,
            lost: self.feed.lost_logged,
            existing: self.existing.clone(),
            unread: observed.is_err(),
        };
        status(observed.as_ref().ok(), context)
    }
}
