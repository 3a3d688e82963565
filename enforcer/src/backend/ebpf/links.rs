//! The links: each hook's program attached to the cgroup, pinned, kept so, and replaced in place.

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use tracing::warn;

use super::{
    BackendError, EbpfBackend, MAPS,
    load::{LoadedProgram, Unbound},
    maps_name, open_cgroup,
    pins::Pins,
    sys::{self, LinkInfo},
};
use crate::{
    host::directory_id,
    wire::{Condition, ConditionId},
};

/// The hooks, by pin name, which is the program's name too, and `enum bpf_attach_type`.
pub(in crate::backend) static HOOKS: [Hook; 4] = [
    Hook {
        name: "connect4",
        attach_type: 10,
        ipv6: false,
        udp_only: false,
    },
    Hook {
        name: "connect6",
        attach_type: 11,
        ipv6: true,
        udp_only: false,
    },
    Hook {
        name: "sendmsg4",
        attach_type: 14,
        ipv6: false,
        udp_only: true,
    },
    Hook {
        name: "sendmsg6",
        attach_type: 15,
        ipv6: true,
        udp_only: true,
    },
];

/// Where a program runs.
#[derive(Debug)]
pub(crate) struct Hook {
    pub(crate) name: &'static str,
    pub(in crate::backend) attach_type: u32,
    /// Whether it sees calls with IPv6 addresses, or those with IPv4 ones.
    pub(super) ipv6: bool,
    /// Attached only while some target asks for UDP.
    pub(super) udp_only: bool,
}

/// What a hook's pinned link is attached to, if it is one.
fn look_at(pins: &Pins, hook: &Hook) -> io::Result<LinkInfo> {
    sys::link_info(sys::open_pin(&pins.path(hook.name))?.as_fd())
}

/// Whether a link does what it is there for.
#[derive(Debug)]
pub(super) enum LinkState {
    /// It is attached to the cgroup to be evaluated, and runs our program.
    Ours,
    Detached,
    /// Attached to this `enum bpf_attach_type`.
    OtherHook(u32),
    /// Attached to the cgroup of this id.
    OtherCgroup(u64),
    /// Runs this program.
    OtherProgram(u32),
    /// There is none, or nothing can be told of it.
    Unknown(io::Error),
}

impl LinkState {
    fn of(info: &LinkInfo, hook: &Hook, cgroup: Option<u64>, runs: impl FnOnce(u32) -> io::Result<bool>) -> Self {
        if info.cgroup == 0 {
            Self::Detached
        } else if info.attach_type != hook.attach_type {
            Self::OtherHook(info.attach_type)
        } else if cgroup.is_some_and(|cgroup| cgroup != info.cgroup) {
            Self::OtherCgroup(info.cgroup)
        } else {
            match runs(info.program) {
                Ok(true) => Self::Ours,
                Ok(false) => Self::OtherProgram(info.program),
                Err(error) => Self::Unknown(error),
            }
        }
    }
}

impl fmt::Display for LinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours => f.write_str("is attached and runs our program"),
            Self::Detached => f.write_str("is not attached to any cgroup"),
            Self::OtherHook(number) => write!(f, "is attached to another hook ({number})"),
            Self::OtherCgroup(id) => write!(f, "is attached to another cgroup (id {id}) than the one configured"),
            Self::OtherProgram(id) => write!(f, "runs a program that is not ours (id {id})"),
            Self::Unknown(error) => write!(f, "cannot be examined: {error}"),
        }
    }
}

/// What all hooks' pinned links do; `cgroup` is the id of the one to be evaluated, where that is known, and `runs`
/// whether a hook's program is ours, by its id.
pub(super) fn states(
    pins: &Pins,
    udp: bool,
    cgroup: Option<u64>,
    runs: impl Fn(&Hook, u32) -> io::Result<bool>,
) -> impl Iterator<Item = (&'static Hook, LinkState)> {
    let hooks = HOOKS.iter().filter(move |hook| udp || !hook.udp_only);
    hooks.map(move |hook| {
        let state = look_at(pins, hook).map(|info| LinkState::of(&info, hook, cgroup, |program| runs(hook, program)));
        (hook, state.unwrap_or_else(LinkState::Unknown))
    })
}

/// Links that do not do what they are there for.
pub(super) type Astray = Vec<(&'static Hook, LinkState)>;

/// Those of [`states`].
pub(super) fn astray(
    pins: &Pins,
    udp: bool,
    cgroup: Option<u64>,
    runs: impl Fn(&Hook, u32) -> io::Result<bool>,
) -> Astray {
    let states = states(pins, udp, cgroup, runs);
    states.filter(|(_, state)| !matches!(state, LinkState::Ours)).collect()
}

/// As `status` reports them.
pub(super) fn faults(astray: &Astray) -> Vec<Condition> {
    let fault = |(hook, state): &(&Hook, LinkState)| {
        let text = format!("the link of {} {state}; a running daemon restores it", hook.name);
        ConditionId::Link.because(text)
    };
    astray.iter().map(fault).collect()
}

/// A look at the links, to be taken in a thread of its own: the kernel tells of a link under the lock of all cgroups
/// (`bpf_cgroup_link_fill_link_info`). Whoever moves processes between cgroups holds that for a grace period each time,
/// and the loop would wait for seconds where many do on a busy host, as any user with a cgroup of his own can (F10).
#[derive(Debug)]
pub(crate) struct LinkLook {
    pins: Pins,
    udp: bool,
    cgroup: PathBuf,
    /// By hook.
    programs: Vec<(&'static str, u32)>,
}

/// What a look at the links has found.
#[derive(Debug)]
pub(crate) struct LinksSeen {
    astray: Astray,
    udp: bool,
}

impl LinkLook {
    /// Takes it.
    pub(crate) fn take(self) -> LinksSeen {
        let Self {
            pins,
            udp,
            cgroup,
            programs,
        } = self;
        let ours = |hook: &Hook, program| Ok(programs.contains(&(hook.name, program)));
        LinksSeen {
            astray: astray(&pins, udp, directory_id(&cgroup), ours),
            udp,
        }
    }
}

/// Whether some program of ours, of whatever version, is attached.
pub(super) fn any_attached(pins: &Pins) -> bool {
    HOOKS
        .iter()
        .any(|hook| look_at(pins, hook).is_ok_and(|info| info.cgroup != 0))
}

/// Detaches all at once, whoever else holds them; what cannot be detached ends with its pin.
pub(super) fn detach_all(pins: &Pins) {
    for hook in &HOOKS {
        let _ = sys::open_pin(&pins.path(hook.name)).and_then(|link| sys::link_detach(link.as_fd()));
    }
}

impl EbpfBackend {
    /// What [`EbpfBackend::links_seen`] wants to know; none where the links are to be attached anyway.
    pub(crate) fn link_look(&self) -> Option<LinkLook> {
        self.astray.as_ref()?;
        let programs = HOOKS.iter().filter_map(|hook| {
            let program = self.programs.loaded(hook)?;
            Some((hook.name, program.id))
        });
        Some(LinkLook {
            pins: self.pins.clone(),
            udp: self.udp,
            cgroup: self.cgroup.clone(),
            programs: programs.collect(),
        })
    }

    /// Takes what a look has found, unless the links have been attached anew since. True if some do not do what they
    /// are there for.
    pub(crate) fn links_seen(&mut self, seen: LinksSeen) -> bool {
        let LinksSeen { astray, udp } = seen;
        let counts = self.astray.is_some() && udp == self.udp;
        if counts {
            self.astray = Some(astray);
        }
        counts && !self.are_attached()
    }

    fn are_attached(&self) -> bool {
        self.astray.as_ref().is_some_and(Vec::is_empty)
    }

    /// As [`EbpfBackend::attach`], where that is not known to be so: since it was done a look has found nothing else.
    pub(super) fn attach_again(&mut self, udp: bool) -> Result<(), BackendError> {
        self.attach_missing(udp)?;
        if udp == self.udp && self.are_attached() {
            return Ok(());
        }
        self.astray = None;
        self.attach(udp)?;
        self.astray = Some(Vec::new());
        Ok(())
    }

    /// Finds out whether a program loads and attaches here; what it attaches is gone at once, and judges nothing.
    pub(crate) fn try_out(&mut self) -> Result<(), BackendError> {
        let [hook, ..] = &HOOKS;
        // Those that are wanted in any case.
        self.load_programs(|hook| !hook.udp_only)?;
        if !self.pins.path(hook.name).exists() {
            self.create_link(hook)?;
            self.repaired = 0;
        }
        Ok(())
    }

    /// Attaches the hooks that have no link yet. Before the flip: they judge by what is active.
    pub(super) fn attach_missing(&mut self, udp: bool) -> Result<(), BackendError> {
        self.restore_directory()?;
        // All at once: verifying is most of a start.
        self.load_programs(|hook| udp || !hook.udp_only)?;
        for hook in HOOKS.iter().filter(|hook| udp || !hook.udp_only) {
            if !self.pins.path(hook.name).exists() {
                let link = self.create_link(hook)?;
                self.pin_link(link.as_fd(), hook.name)?;
            }
        }
        Ok(())
    }

    /// Makes every wanted link run this program on this cgroup, and removes the others. After the flip: a link that
    /// runs a program with maps of another ABI goes on with those until ours are active.
    fn attach(&mut self, udp: bool) -> Result<(), BackendError> {
        self.udp = udp;
        self.follow_cgroup()?;
        self.attach_missing(udp)?;
        for hook in &HOOKS {
            if hook.udp_only && !udp {
                self.pins.remove(hook.name)?;
                continue;
            }
            let path = self.pins.path(hook.name);
            let failed = |error| BackendError::Io {
                action: "open link",
                object: path.clone(),
                error,
            };
            let link = sys::open_pin(&path).map_err(failed)?;
            let wanted = self.program(hook)?.id;
            let info = sys::link_info(link.as_fd()).map_err(failed)?;
            match LinkState::of(&info, hook, Some(self.cgroup_id), |program| Ok(program == wanted)) {
                LinkState::Ours => {}
                // A new link first, then its pin over the old one, so that none is missing.
                LinkState::Detached | LinkState::OtherHook(_) | LinkState::OtherCgroup(_) | LinkState::Unknown(_) => {
                    let new = self.create_link(hook)?;
                    let aside = format!("new_{}", hook.name);
                    self.pins.remove(&aside)?;
                    self.pin_link(new.as_fd(), &aside)?;
                    std::fs::rename(self.pins.path(&aside), &path).map_err(|error| BackendError::Io {
                        action: "rename link to",
                        object: path.clone(),
                        error,
                    })?;
                }
                LinkState::OtherProgram(_) => {
                    let updated = sys::link_update(link.as_fd(), self.program(hook)?.fd.as_fd());
                    updated.map_err(|error| self.attach_error(hook, error))?;
                    if sys::link_info(link.as_fd()).map_err(failed)?.program != wanted {
                        return Err(self.attach_error(hook, io::Error::other("the link kept its old program"))); // F3
                    }
                    self.repaired += 1;
                }
            }
        }
        self.remove_old_maps()
    }

    /// A cgroup that was removed and made again is another one under the same path.
    fn follow_cgroup(&mut self) -> Result<(), BackendError> {
        if directory_id(&self.cgroup).is_some_and(|id| id != self.cgroup_id) {
            (self.cgroup_fd, self.cgroup_id) = open_cgroup(&self.cgroup)?;
        }
        Ok(())
    }

    fn create_link(&mut self, hook: &Hook) -> Result<OwnedFd, BackendError> {
        self.repaired += 1;
        let program = self.program(hook)?.fd.as_fd();
        sys::link_create(program, self.cgroup_fd.as_fd(), hook.attach_type)
            .map_err(|error| self.attach_error(hook, error))
    }

    fn pin_link(&self, link: BorrowedFd<'_>, name: &str) -> Result<(), BackendError> {
        let path = self.pins.path(name);
        sys::pin(link, &path).map_err(|error| BackendError::Io {
            action: "pin link",
            object: path,
            error,
        })
    }

    /// Loads the programs of some hooks, as far as they are not.
    fn load_programs(&mut self, hooks: impl Fn(&Hook) -> bool) -> Result<(), BackendError> {
        let Err(error) = self.programs.load(&hooks) else {
            return Ok(());
        };
        // A kernel whose verifier does not take what denials tell of tasks loses that alone (D3).
        if !self.sight.forget_tasks() {
            return Err(error);
        }
        warn!("{error}; loading it with less of tasks for denials to show, which then lack the paths of programs");
        let unbound = Unbound::open(&self.pins.path(&maps_name()))?;
        self.programs = unbound.bind(&self.sight, self.log_level)?;
        self.programs.load(hooks)
    }

    /// A hook's program, which is to be loaded before it is attached.
    fn program(&self, hook: &Hook) -> Result<&LoadedProgram, BackendError> {
        self.programs
            .loaded(hook)
            .ok_or_else(|| load_error(hook, "it is not in the object".into()))
    }

    fn attach_error(&self, hook: &Hook, error: io::Error) -> BackendError {
        BackendError::Attach {
            hook: hook.name,
            cgroup: self.cgroup.clone(),
            error,
        }
    }

    /// Maps of another ABI are of no use once every link runs a program of this one.
    fn remove_old_maps(&self) -> Result<(), BackendError> {
        for name in self.pins.list()? {
            if name.starts_with(MAPS) && name != maps_name() {
                self.pins.remove(&name)?;
            }
        }
        Ok(())
    }
}

pub(super) fn load_error(hook: &Hook, source: Box<dyn std::error::Error + Send + Sync>) -> BackendError {
    BackendError::Load {
        program: hook.name,
        source,
    }
}
