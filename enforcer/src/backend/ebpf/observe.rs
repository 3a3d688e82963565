//! What the kernel holds, read from it; and `check`, the kernel's own decision over the kernel's own maps.

use std::{os::fd::AsFd, path::Path};

use enforcer_ebpf::{
    Counters, TargetName, Verdict,
    decide::{self, Destination, SocketUser, Subject},
    flag,
};

use super::{
    BackendError,
    image::{self, Image},
    links::HOOKS,
    maps::{Maps, Outside},
    maps_name,
    pins::Pins,
    sys,
};
use crate::{policy::Protocol, ruleset::Attempt};

/// What the kernel holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Number of the rule set in force; 0 for none.
    pub generation: u64,
    /// Whether it refuses nothing.
    pub audit: bool,
    /// Whether a daemon put it in force.
    pub by_daemon: bool,
    /// Whether both users of an attempt are checked, not the task's alone (D3).
    pub socket_user: bool,
    /// Whether loopback is told apart by network namespace (D6).
    pub netns: bool,
    /// Endpoints in force, those for unspecified destinations not counted.
    pub endpoints: u64,
    /// What the targets did.
    pub targets: Vec<ObservedTarget>,
    /// Denials that the ring buffer had no room for.
    pub lost: u64,
    /// What is not as it should be.
    pub faults: Vec<String>,
}

/// A target as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedTarget {
    /// Its name.
    pub name: String,
    /// Its endpoints, those that cover or are covered included.
    pub endpoints: u64,
    /// Its principals as the kernel has them: UID, cgroup id, or kernel.
    pub allow: Vec<String>,
    /// What it did.
    pub counters: Counters,
}

/// The kernel's state for those who only read it.
#[derive(Debug)]
pub struct Pinned {
    maps: Maps,
    pins: Pins,
}

/// A verdict that the kernel's own maps give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// What becomes of the attempt.
    pub verdict: Verdict,
    /// Generation that decided; 0 where none was asked.
    pub generation: u64,
    /// Each target that owns the endpoint, and whether it admits the subject.
    pub owners: Vec<(String, bool)>,
}

impl Pinned {
    /// Opens what is pinned; nothing where nothing is in force.
    pub fn open(pin_dir: &Path) -> Result<Option<Self>, BackendError> {
        let Some(pins) = Pins::open(pin_dir)? else {
            return Ok(None);
        };
        let maps = Maps::open(&pins.path(&maps_name()))?;
        Ok(maps.map(|maps| Self { maps, pins }))
    }

    /// What the kernel holds now.
    pub fn observe(&self) -> Result<Observed, BackendError> {
        observe(&self.maps, &self.pins, None)
    }

    /// Runs the kernel's decision over the kernel's maps.
    pub fn check(&self, attempt: &Attempt) -> Result<Checked, BackendError> {
        let destination = Destination {
            protocol: match attempt.protocol {
                Protocol::Tcp => enforcer_ebpf::TCP,
                Protocol::Udp => enforcer_ebpf::UDP,
            },
            port: attempt.port.to_be(),
            address: image::canonical_words(attempt.address),
        };
        let home = match self.maps.active_slot()? {
            Some(slot) => self.maps.generation_of(slot)?.netns,
            None => 0,
        };
        let tables = Outside::new(&self.maps);
        let decision = decide::decide(&tables, &Asker { attempt, home }, &destination);
        tables.finish()?;
        let names = self.maps.names(decision.slot)?;
        let owners = (0..)
            .zip(&names)
            .filter(|(bit, _)| decision.owners >> bit & 1 == 1)
            .map(|(bit, name)| (name.as_str().to_owned(), decision.refused >> bit & 1 == 0))
            .collect();
        Ok(Checked {
            verdict: decision.verdict,
            generation: decision.generation,
            owners,
        })
    }
}

/// An attempt described from outside, as the decision's subject.
pub(super) struct Asker<'a> {
    pub(super) attempt: &'a Attempt,
    pub(super) home: u64,
}

impl Subject for Asker<'_> {
    fn netns(&self) -> u64 {
        if self.attempt.foreign_netns {
            !self.home
        } else {
            self.home
        }
    }

    fn task_user(&self) -> u32 {
        self.attempt.subject.task.0
    }

    fn socket_user(&self) -> SocketUser {
        self.attempt
            .subject
            .socket
            .map_or(SocketUser::Unsupported, |uid| SocketUser::Uid(uid.0))
    }

    fn is_kernel_thread(&self) -> bool {
        self.attempt.subject.kernel_thread
    }

    fn cgroup(&self, level: u32) -> u64 {
        usize::try_from(level)
            .ok()
            .and_then(|level| self.attempt.subject.cgroups.get(level))
            .copied()
            .unwrap_or(0)
    }
}

pub(super) fn observe(maps: &Maps, pins: &Pins, cgroup: Option<u64>) -> Result<Observed, BackendError> {
    let slot = maps.active_slot()?;
    let (image, generation) = match slot {
        Some(slot) => (maps.read_slot(slot)?, maps.generation_of(slot)?.number),
        None => (Image::empty(), 0),
    };
    let mut faults = Vec::new();
    for hook in HOOKS
        .iter()
        .filter(|hook| slot.is_some() && (image.has_udp() || !hook.udp_only))
    {
        let info = sys::open_pin(&pins.path(hook.name)).and_then(|link| sys::link_info(link.as_fd()));
        match info {
            Ok(info) if info.cgroup == 0 || cgroup.is_some_and(|wanted| wanted != info.cgroup) => {
                faults.push(format!("the link of {} is not attached; restart enforcer", hook.name));
            }
            Ok(_) => {}
            Err(error) => faults.push(format!(
                "the link of {} cannot be opened: {error}; restart enforcer",
                hook.name
            )),
        }
    }
    let placed = |owners: u64, bit: u32| owners >> bit & 1 == 1;
    let real = || image.endpoints.iter().filter(|(key, _)| key.address != [0; 4]);
    let mut targets = Vec::new();
    for (bit, name) in (0_u32..)
        .zip(&image.names)
        .filter(|(_, name)| **name != TargetName::NONE)
    {
        let endpoints = real().filter(|(_, owners)| placed(*owners, bit)).count()
            + image.prefixes.iter().filter(|(_, owners)| placed(*owners, bit)).count();
        let allow = image
            .principals
            .iter()
            .filter(|(_, owners)| placed(*owners, bit))
            .map(|(key, _)| describe(key));
        targets.push(ObservedTarget {
            name: name.as_str().to_owned(),
            endpoints: endpoints as u64,
            allow: allow.collect(),
            counters: maps.counters(bit)?,
        });
    }
    Ok(Observed {
        generation,
        audit: image.flags & flag::AUDIT != 0,
        by_daemon: image.flags & flag::DAEMON != 0,
        socket_user: image.flags & flag::SOCKET_USER != 0,
        netns: image.netns != 0,
        endpoints: (real().count() + image.prefixes.len()) as u64,
        targets,
        lost: maps.lost()?,
        faults,
    })
}

fn describe(key: &enforcer_ebpf::PrincipalKey) -> String {
    match (key.kind, key.cgroup) {
        (enforcer_ebpf::kind::KERNEL, _) => "kernel".to_owned(),
        (_, 0) => format!("user {}", key.uid),
        (_, cgroup) => format!("user {} in cgroup id {cgroup}", key.uid),
    }
}
