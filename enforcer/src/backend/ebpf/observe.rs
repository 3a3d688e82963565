//! What the kernel holds, read from it; and `check`, the kernel's own decision over the kernel's own maps.

use std::{borrow::Cow, path::Path};

use enforcer_ebpf::{
    Counters, Generation, TargetName, Verdict,
    decide::{self, Destination, SocketUser, Subject, Task},
    flag,
};

use super::{
    BackendError, MAPS,
    image::{self, Image},
    links::{self, Hook},
    maps::{Maps, Outside},
    maps_name,
    pins::Pins,
    sys,
};
use crate::{
    policy::{Protocol, Uid},
    ruleset::Attempt,
    wire::{Condition, PrincipalStatus},
};

/// What the kernel holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    /// Number of the active rule set; 0 for none.
    pub generation: u64,
    /// Whether it refuses nothing.
    pub audit: bool,
    /// Whether a daemon made it active.
    pub by_daemon: bool,
    /// Of which sockets the owner is checked, besides the task's user (D3).
    pub socket_users: SocketUsers,
    /// Whether loopback is told apart by network namespace (D6).
    pub netns: bool,
    /// Active endpoints, those for unspecified destinations not counted.
    pub endpoints: u64,
    /// What the targets did.
    pub targets: Vec<ObservedTarget>,
    /// Denials that the ring buffer had no room for.
    pub lost: u64,
    /// What is not as it should be.
    pub faults: Vec<Condition>,
}

/// Sockets of which the owner is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SocketUsers {
    /// None: the kernel has no BTF.
    #[default]
    None,
    /// Those of TCP (`lockdown=confidentiality` before Linux 6.2).
    Tcp,
    /// All.
    All,
}

impl SocketUsers {
    fn of(flags: u64) -> Self {
        match (flags & flag::SOCKET_USER, flags & flag::TCP_SOCKET_USER_ALONE) {
            (0, _) => Self::None,
            (_, 0) => Self::All,
            _ => Self::Tcp,
        }
    }
}

/// A target as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ObservedTarget {
    /// Its name.
    pub name: String,
    /// Its endpoints, those that cover or are covered included.
    pub endpoints: u64,
    /// Its principals as the kernel has them: UID, cgroup id, or kernel.
    pub allow: Vec<PrincipalStatus>,
    /// What it did.
    pub counters: Counters,
}

/// The kernel's state for those who only read it.
#[derive(Debug)]
pub(crate) struct Pinned {
    maps: Maps,
    pins: Pins,
}

/// A verdict that the kernel's own maps give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Checked {
    /// What becomes of the attempt.
    pub verdict: Verdict,
    /// Generation that decided; 0 where none was asked.
    pub generation: u64,
    /// Each target that owns the endpoint, and whether it admits the subject.
    pub owners: Vec<(String, bool)>,
    /// Who asks, as far as the active programs can tell.
    pub subject: crate::ruleset::Subject,
    /// What would have to be asked and is not, so that nothing is.
    pub without: Option<Lacking>,
}

/// What is not there that would evaluate an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lacking {
    /// An eBPF program is not attached.
    Program(&'static str),
    /// A chain of the nftables table is not as it was made.
    Chain(&'static str),
}

impl Pinned {
    /// Opens what is pinned; nothing where nothing is active. An error where something is that this version cannot
    /// read.
    pub(crate) fn open(pin_dir: &Path) -> Result<Option<Self>, BackendError> {
        let Some(pins) = Pins::open(pin_dir)? else {
            return Ok(None);
        };
        let maps = match Maps::open(&pins.path(&maps_name())) {
            Ok(Some(maps)) if maps.active_slot()?.is_some() => Ok(Some(maps)),
            maps => match (other_layout(&pins)?, maps) {
                (Some(layout), _) => Err(BackendError::OtherVersion { layout }),
                (None, Err(BackendError::Damaged { .. })) if !links::any_attached(&pins) => Ok(None),
                (None, Ok(None)) if links::any_attached(&pins) => Err(BackendError::Damaged {
                    path: pins.path(&maps_name()),
                }),
                (None, maps) => maps,
            },
        };
        Ok(maps?.map(|maps| Self { maps, pins }))
    }

    /// Whether any program rests on them.
    pub(crate) fn is_attached(&self) -> bool {
        links::any_attached(&self.pins)
    }

    /// The maps and the directory.
    pub(super) fn parts(&self) -> (&Maps, &Pins) {
        (&self.maps, &self.pins)
    }

    /// What the kernel holds now; `cgroup` is the id of the one to be judged, where that is known.
    pub(crate) fn observe(&self, cgroup: Option<u64>) -> Result<Observed, BackendError> {
        observe(&self.maps, |udp| links::faults(&self.astray(udp, cgroup)), |_| None)
    }

    /// Links that do not do what they are there for.
    fn astray(&self, udp: bool, cgroup: Option<u64>) -> links::Astray {
        let ours = self.maps.ids();
        let runs = |_: &Hook, program| {
            let used = sys::program_maps(program)?;
            Ok(ours.iter().all(|map| used.contains(map)))
        };
        links::astray(&self.pins, udp, cgroup, runs)
    }

    /// Runs the kernel's decision over the kernel's maps; `cgroup` is the id of the one to be judged, where that is
    /// known.
    pub(crate) fn check(&self, attempt: &Attempt, cgroup: Option<u64>) -> Result<Checked, BackendError> {
        let destination = Destination {
            protocol: match attempt.protocol {
                Protocol::Tcp => enforcer_ebpf::TCP,
                Protocol::Udp => enforcer_ebpf::UDP,
            },
            port: attempt.port.to_be(),
            address: image::canonical_words(attempt.address),
        };
        let generation = match self.maps.active_slot()? {
            Some(slot) => self.maps.generation_of(slot)?,
            None => Generation::default(),
        };
        let asker = SimulatedSubject::new(attempt, &generation);
        let tables = Outside::new(&self.maps);
        let decision = decide::decide(&tables, &asker, &destination);
        tables.finish()?;
        // Whatever the maps hold, where no program reads them the kernel lets everything pass.
        let astray = match decision.verdict() {
            Verdict::Unjudged => Vec::new(),
            Verdict::Allow | Verdict::Deny | Verdict::WouldDeny => {
                self.astray(attempt.protocol == Protocol::Udp, cgroup)
            }
        };
        if let Some((hook, _)) = astray.iter().find(|(hook, _)| hook.ipv6 == attempt.address.is_ipv6()) {
            return Ok(Checked {
                verdict: Verdict::Unjudged,
                generation: decision.generation,
                owners: Vec::new(),
                subject: asker.subject,
                without: Some(Lacking::Program(hook.name)),
            });
        }
        let names = self.maps.names(decision.slot)?;
        let owners = (0..)
            .zip(&names)
            .filter(|(bit, _)| decision.owners >> bit & 1 == 1)
            .map(|(bit, name)| (name.as_str().to_owned(), decision.refused >> bit & 1 == 0))
            .collect();
        Ok(Checked {
            verdict: decision.verdict(),
            generation: decision.generation,
            owners,
            subject: asker.subject,
            without: None,
        })
    }
}

/// The layout of another version's maps, if such are there and programs attached.
fn other_layout(pins: &Pins) -> Result<Option<String>, BackendError> {
    if !links::any_attached(pins) {
        return Ok(None);
    }
    let names = pins.list()?;
    let others = names.iter().filter(|name| **name != maps_name());
    Ok(others
        .filter_map(|name| name.strip_prefix(MAPS))
        .max()
        .map(ToOwned::to_owned))
}

/// An attempt described from outside, as the decision's subject.
pub(super) struct SimulatedSubject {
    foreign_netns: bool,
    subject: crate::ruleset::Subject,
    home: u64,
}

impl SimulatedSubject {
    /// The attempt as the programs that a generation was loaded with see it.
    pub(super) fn new(attempt: &Attempt, generation: &Generation) -> Self {
        let mut subject = attempt.subject.clone();
        let sees_owner = match attempt.protocol {
            Protocol::Tcp => generation.flags & flag::SOCKET_USER != 0,
            Protocol::Udp => SocketUsers::of(generation.flags) == SocketUsers::All,
        };
        subject.socket = subject.socket.filter(|_| sees_owner);
        // Not told from root's tasks, whose UID a kernel thread has (D3).
        if generation.flags & flag::NO_THREADS != 0 && std::mem::take(&mut subject.kernel_thread) {
            subject.task = Uid(0);
        }
        Self {
            foreign_netns: attempt.foreign_netns,
            subject,
            home: generation.netns,
        }
    }
}

impl Subject for SimulatedSubject {
    fn netns(&self) -> u64 {
        if self.foreign_netns { !self.home } else { self.home }
    }

    fn task(&self) -> Task {
        if self.subject.kernel_thread && self.subject.task == Uid(0) {
            Task::Kernel
        } else {
            Task::User(self.subject.task.0)
        }
    }

    fn socket_user(&self) -> SocketUser {
        self.subject
            .socket
            .map_or(SocketUser::Unsupported, |uid| SocketUser::Uid(uid.0))
    }

    fn cgroup(&self, level: u32) -> u64 {
        usize::try_from(level)
            .ok()
            .and_then(|level| self.subject.cgroups.get(level))
            .copied()
            .unwrap_or(0)
    }
}

/// Reads all of it, but for entries that `held` has: those that the caller wrote to a slot and read back. `faults` has
/// what is wrong with the links, given whether UDP is judged.
pub(super) fn observe<'i>(
    maps: &Maps,
    faults: impl FnOnce(bool) -> Vec<Condition>,
    held: impl Fn(u8) -> Option<&'i Image>,
) -> Result<Observed, BackendError> {
    let slot = maps.active_slot()?;
    let (image, generation) = match slot {
        Some(slot) => {
            let image = match held(slot) {
                Some(image) => Cow::Borrowed(image),
                None => Cow::Owned(maps.read_slot(slot)?),
            };
            (image, maps.generation_of(slot)?.number)
        }
        None => (Cow::Owned(Image::empty()), 0),
    };
    let faults = slot.map_or_else(Vec::new, |_| faults(image.has_udp()));
    let placed = |owners: u64, bit: u32| owners >> bit & 1 == 1;
    let real = || image.endpoints.iter().filter(|(key, _)| key.address != [0; 4]);
    let mut targets = Vec::new();
    let counters = maps.counters()?;
    for (bit, (name, counters)) in (0_u32..)
        .zip(image.names.iter().zip(counters))
        .filter(|(_, (name, _))| **name != TargetName::NONE)
    {
        let endpoints = real().filter(|(_, owners)| placed(*owners, bit)).count()
            + image.prefixes.iter().filter(|(_, owners)| placed(*owners, bit)).count();
        let allow = image
            .principals
            .iter()
            .filter(|(_, owners)| placed(*owners, bit))
            .map(|(key, _)| describe(key.kind, key.uid, key.cgroup));
        targets.push(ObservedTarget {
            name: name.as_str().to_owned(),
            endpoints: endpoints as u64,
            allow: allow.collect(),
            counters,
        });
    }
    Ok(Observed {
        generation,
        audit: image.flags & flag::AUDIT != 0,
        by_daemon: image.flags & flag::DAEMON != 0,
        socket_users: SocketUsers::of(image.flags),
        netns: image.netns != 0,
        endpoints: (real().count() + image.prefixes.len()) as u64,
        targets,
        lost: maps.lost()?,
        faults,
    })
}

/// A principal by its numbers.
pub(super) fn describe(kind: u8, uid: u32, cgroup: u64) -> PrincipalStatus {
    let (kernel, anybody) = match kind {
        enforcer_ebpf::kind::KERNEL => (true, true),
        enforcer_ebpf::kind::ANYBODY => (false, true),
        _ => (false, false),
    };
    PrincipalStatus {
        kernel,
        uid: (!anybody).then_some(uid),
        cgroup_id: (cgroup != 0).then_some(cgroup),
        ..PrincipalStatus::default()
    }
}
