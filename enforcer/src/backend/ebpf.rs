//! The eBPF backend: programs and maps loaded with aya, pinned, and taken over by whoever comes next (F1).
//!
//! A rule set is written to the slot that no program reads, read back, and put in force by flipping one byte (F2, F3).

pub mod btf;
pub mod image;
pub mod maps;
pub mod pins;
pub mod sys;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{MapData, RingBuf},
    programs::CgroupSockAddr,
};
use enforcer_ebpf::{
    ABI, Counters, EventRecord, TargetName, Verdict,
    decide::{self, Destination, SocketUser, Subject},
    flag,
};

use self::{
    btf::Offsets,
    image::{Image, Loader, Names},
    maps::{Maps, Outside},
    pins::{Lock, Pins},
};
use crate::{
    policy::Protocol,
    ruleset::{Attempt, RuleSet},
};

/// Why the kernel does not hold what was asked for. What was in force before still is (F4).
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A file operation.
    #[error("{action} {}: {error}", object.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        object: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Somebody else could write where our pins lie (F6).
    #[error("{} is owned by uid {uid} with mode {mode:04o}; it must be a directory of root's with mode 0700: remove it, or name another pin_dir", path.display())]
    Untrusted {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// Pins can lie on a bpffs only.
    #[error("pin_dir {} is not on a bpffs; mount one there (mount -t bpf bpf DIRECTORY), or name a pin_dir directly below /sys/fs/bpf", path.display())]
    NotBpffs {
        /// The directory.
        path: PathBuf,
    },
    /// Another process writes these pins.
    #[error("{} is in use by another enforcer; reload that one (SIGHUP), or stop it first", path.display())]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// A pin is not the map that its name says.
    #[error("{} is not a map of this version of enforcer; run enforcer unload, then start again", path.display())]
    Foreign {
        /// The pin.
        path: PathBuf,
    },
    /// A map operation.
    #[error("{action} map {map}: {error}")]
    Map {
        /// What was tried.
        action: &'static str,
        /// On which map.
        map: &'static str,
        /// Why not.
        error: io::Error,
    },
    /// The kernel holds something else than was written (F3).
    #[error("map {map} does not hold what was written to it; the rule set before stays in force")]
    ReadBack {
        /// Which map.
        map: &'static str,
    },
    /// The cgroup to attach to.
    #[error("open cgroup {}: {error}; name a directory of the cgroup v2 hierarchy with `cgroup`", path.display())]
    Cgroup {
        /// Its path.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The programs do not load.
    #[error(
        "load {program}: {source}; enforcer needs Linux 5.8 with BPF, and root (CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN)"
    )]
    Load {
        /// Which one.
        program: &'static str,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A program does not attach.
    #[error("attach {hook} to {}: {error}{}", cgroup.display(), attach_hint(error))]
    Attach {
        /// Which hook.
        hook: &'static str,
        /// To what.
        cgroup: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The nftables half or backend.
    #[error(transparent)]
    Nftables(#[from] super::nftables::NftablesError),
    /// One half of two.
    #[error("the {name} half of backend = \"both\": {error}; the rule set before stays in force on both")]
    Half {
        /// Which one.
        name: &'static str,
        /// Why not.
        error: Box<BackendError>,
    },
    /// No backend works here.
    #[error("no backend works here; ebpf: {ebpf}; nftables: {nftables}")]
    Neither {
        /// Why ebpf does not.
        ebpf: Box<str>,
        /// Why nftables does not.
        nftables: Box<BackendError>,
    },
}

impl BackendError {
    /// Whether this kernel, or what we may do with it, is the cause, and not something of ours that needs mending.
    #[must_use]
    pub fn is_inability(&self) -> bool {
        match self {
            Self::Load { .. } | Self::Attach { .. } => true,
            // Without BPF there is no bpffs either; with it, a wrong place is the configuration's fault.
            Self::Io { .. } | Self::NotBpffs { .. } => sys::wait_for_programs().is_err(),
            Self::Map { error, .. } => error.raw_os_error() == Some(libc::EPERM),
            Self::Untrusted { .. }
            | Self::Busy { .. }
            | Self::Foreign { .. }
            | Self::ReadBack { .. }
            | Self::Cgroup { .. }
            | Self::Nftables(_)
            | Self::Half { .. }
            | Self::Neither { .. } => false,
        }
    }

    /// The message up to its advice.
    #[must_use]
    pub fn without_hint(&self) -> Box<str> {
        let text = self.to_string();
        text.split("; ").next().unwrap_or_default().into()
    }
}

fn attach_hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied {
        " (another program there or above forbids sharing the cgroup: list them with `bpftool cgroup show`, and have its owner attach with BPF_F_ALLOW_MULTI; or CAP_NET_ADMIN is missing)"
    } else {
        ""
    }
}

/// The hooks, by pin name, which is the program's name too, and `enum bpf_attach_type`.
const HOOKS: [Hook; 4] = [
    Hook {
        name: "connect4",
        attach_type: 10,
        udp_only: false,
    },
    Hook {
        name: "connect6",
        attach_type: 11,
        udp_only: false,
    },
    Hook {
        name: "sendmsg4",
        attach_type: 14,
        udp_only: true,
    },
    Hook {
        name: "sendmsg6",
        attach_type: 15,
        udp_only: true,
    },
];

struct Hook {
    name: &'static str,
    attach_type: u32,
    /// Attached only while some target asks for UDP.
    udp_only: bool,
}

/// What we hold in the kernel, for the process that writes it.
#[derive(Debug)]
pub struct Kernel {
    programs: Ebpf,
    maps: Maps,
    pins: Pins,
    _lock: Lock,
    cgroup: PathBuf,
    cgroup_fd: File,
    cgroup_id: u64,
    loader: Loader,
    /// Whether the rule set in force has UDP endpoints.
    udp: bool,
    /// What each slot holds; none where that is not known.
    slots: [Option<Image>; 2],
    /// Whether a program may still be reading the slot that is not in force.
    flipped: bool,
    /// Links made so far: more of them than at first means that some were taken away (F5).
    links_made: u64,
}

/// The programs as built for the BPF target.
static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/enforcer-programs"));

impl Kernel {
    /// Takes over what is pinned, or makes it. Nothing is judged differently before the first [`Kernel::apply`].
    pub fn take_over(pin_dir: &Path, cgroup: &Path, daemon: bool, log_level: u8) -> Result<Self, BackendError> {
        let cgroup_failed = |error| BackendError::Cgroup {
            path: cgroup.into(),
            error,
        };
        let cgroup_fd = File::open(cgroup).map_err(cgroup_failed)?;
        let cgroup_id = cgroup_fd.metadata().map_err(cgroup_failed)?.ino();
        if !nix::sys::statfs::fstatfs(&cgroup_fd)
            .is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
        {
            return Err(cgroup_failed(io::Error::other("not a cgroup v2 directory")));
        }
        let pins = Pins::create(pin_dir)?;
        let lock = pins.lock()?;
        let maps_dir = pins.subdir(&maps_name())?;
        // Each pin is the map it should be, or there is none: aya may reuse what it finds.
        let fresh = Maps::open(&maps_dir)?.is_none();
        let offsets = btf::offsets().map_err(|error| BackendError::Io {
            action: "read",
            object: "/sys/kernel/btf/vmlinux".into(),
            error,
        })?;
        let programs = load(&maps_dir, offsets, log_level)?;
        let maps = Maps::open(&maps_dir)?.ok_or(BackendError::Foreign { path: maps_dir })?;
        Ok(Self {
            programs,
            maps,
            pins,
            _lock: lock,
            cgroup: cgroup.into(),
            cgroup_fd,
            cgroup_id,
            loader: Loader {
                netns: sys::netns_cookie().unwrap_or(0),
                daemon,
                socket_user: offsets.is_some(),
            },
            udp: false,
            slots: if fresh {
                [Some(Image::empty()), Some(Image::empty())]
            } else {
                [None, None]
            },
            flipped: !fresh,
            links_made: 0,
        })
    }

    /// Puts a rule set in force, whole or not at all (F2). Returns its generation number.
    pub fn apply(&mut self, rules: &RuleSet) -> Result<u64, BackendError> {
        let active = self.maps.active_slot()?;
        let previous = match active {
            Some(slot) => self.maps.names(slot)?,
            None => Image::empty().names,
        };
        let image = image::lower(rules, &previous, self.loader);
        let number = match active {
            Some(slot) => self.maps.generation_of(slot)?.number,
            None => 0,
        };
        if let Some(slot) = active
            && *self.held(slot)? == image
        {
            self.attach(image.has_udp())?;
            return Ok(number);
        }
        let slot = active.map_or(0, |slot| 1 - slot);
        if std::mem::take(&mut self.flipped) {
            // Verdicts in flight may still read the slot that was in force before this one (F2).
            sys::wait_for_programs().map_err(|error| BackendError::Map {
                action: "wait for readers of",
                map: "endpoints",
                error,
            })?;
        }
        self.held(slot)?;
        // Not known again until it is written whole.
        let have = self
            .slots
            .get_mut(usize::from(slot))
            .and_then(Option::take)
            .unwrap_or_else(Image::empty);
        self.maps.write_slot(slot, &have, &image, number + 1)?;
        self.clear_reused_counters(&previous, &image.names)?;
        self.attach_missing(image.has_udp())?;
        self.maps.activate(slot)?;
        self.flipped = true;
        self.attach(image.has_udp())?;
        if let Some(held) = self.slots.get_mut(usize::from(slot)) {
            *held = Some(image);
        }
        Ok(number + 1)
    }

    /// Makes sure that a generation is in force and every link in place; false if another rule set is, or none (F5).
    pub fn keep(&mut self, number: u64) -> Result<bool, BackendError> {
        let Some(slot) = self.maps.active_slot()? else {
            return Ok(false);
        };
        if self.maps.generation_of(slot)?.number != number {
            return Ok(false);
        }
        self.attach(self.udp)?;
        Ok(true)
    }

    /// Links made so far.
    #[must_use]
    pub fn links_made(&self) -> u64 {
        self.links_made
    }

    /// Finds out whether a program loads and attaches here; what it attaches is gone at once, and judges nothing.
    pub fn try_out(&mut self) -> Result<(), BackendError> {
        let [hook, ..] = &HOOKS;
        if !self.pins.path(hook.name).exists() {
            self.create_link(hook)?;
            self.links_made = 0;
        }
        Ok(())
    }

    /// What the kernel holds now, read from it.
    pub fn observe(&self) -> Result<Observed, BackendError> {
        observe(&self.maps, &self.pins, Some(self.cgroup_id))
    }

    /// Denials that the ring buffer had no room for.
    pub fn lost(&self) -> Result<u64, BackendError> {
        self.maps.lost()
    }

    /// The denials as they come. Each call opens another consumer of the same buffer: keep one.
    pub fn events(&self) -> Result<Events, BackendError> {
        let path = self.pins.path(&maps_name()).join("events");
        let failed = |error: aya::maps::MapError| BackendError::Io {
            action: "open",
            object: path.clone(),
            error: io::Error::other(error),
        };
        let map = MapData::from_pin(&path).map_err(failed)?;
        let ring = RingBuf::try_from(aya::maps::Map::RingBuf(map)).map_err(failed)?;
        Ok(Events { ring })
    }

    /// Gives back what loading has left behind.
    pub fn trim_memory(&self) {
        sys::trim_memory();
    }

    /// The programs, for aya-log.
    pub fn programs(&mut self) -> &mut Ebpf {
        &mut self.programs
    }

    /// Removes all of ours from the kernel: links first, so that no program reads maps that are going.
    pub fn unload(self) -> Result<(), BackendError> {
        remove_all(self.pins)
    }

    /// What a slot holds, read from the kernel where it is not known.
    fn held(&mut self, slot: u8) -> Result<&Image, BackendError> {
        let maps = &self.maps;
        let held = self.slots.get_mut(usize::from(slot & 1));
        let held = held.ok_or(BackendError::ReadBack { map: "active" })?;
        match held {
            Some(image) => Ok(image),
            None => Ok(held.insert(maps.read_slot(slot)?)),
        }
    }

    /// Bits that change hands start to count from zero.
    fn clear_reused_counters(&self, previous: &Names, names: &Names) -> Result<(), BackendError> {
        for (bit, (before, now)) in (0..).zip(previous.iter().zip(names)) {
            if before != now && *now != TargetName::NONE {
                self.maps.clear_counters(bit)?;
            }
        }
        Ok(())
    }

    /// Attaches the hooks that have no link yet. Before the flip: they judge by what is in force.
    fn attach_missing(&mut self, udp: bool) -> Result<(), BackendError> {
        for hook in HOOKS.iter().filter(|hook| udp || !hook.udp_only) {
            if !self.pins.path(hook.name).exists() {
                let link = self.create_link(hook)?;
                self.pin_link(hook, link.as_fd(), hook.name)?;
            }
        }
        Ok(())
    }

    /// Makes every wanted link run this program on this cgroup, and removes the others. After the flip: a link that
    /// runs a program with maps of another ABI goes on with those until ours are in force.
    fn attach(&mut self, udp: bool) -> Result<(), BackendError> {
        self.udp = udp;
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
            let wanted = self.program_id(hook)?;
            let info = sys::link_info(link.as_fd()).map_err(failed)?;
            if info.cgroup != self.cgroup_id || info.attach_type != hook.attach_type {
                // Another cgroup, or detached: a new link first, then its pin over the old one, so that none is missing.
                let new = self.create_link(hook)?;
                let aside = format!("new_{}", hook.name);
                self.pins.remove(&aside)?;
                self.pin_link(hook, new.as_fd(), &aside)?;
                std::fs::rename(self.pins.path(&aside), &path).map_err(|error| BackendError::Io {
                    action: "rename link to",
                    object: path.clone(),
                    error,
                })?;
            } else if info.program != wanted {
                let program = self.program_fd(hook)?;
                sys::link_update(link.as_fd(), program.as_fd()).map_err(|error| self.attach_error(hook, error))?;
                if sys::link_info(link.as_fd()).map_err(failed)?.program != wanted {
                    return Err(self.attach_error(hook, io::Error::other("the link kept its old program"))); // F3
                }
            }
        }
        self.remove_old_maps()
    }

    fn create_link(&mut self, hook: &Hook) -> Result<OwnedFd, BackendError> {
        let program = self.program_fd(hook)?;
        self.links_made += 1;
        sys::link_create(program.as_fd(), self.cgroup_fd.as_fd(), hook.attach_type)
            .map_err(|error| self.attach_error(hook, error))
    }

    fn pin_link(&self, hook: &Hook, link: std::os::fd::BorrowedFd<'_>, name: &str) -> Result<(), BackendError> {
        let _ = hook;
        let path = self.pins.path(name);
        sys::pin(link, &path).map_err(|error| BackendError::Io {
            action: "pin link",
            object: path,
            error,
        })
    }

    /// The program of a hook, loaded when first asked for.
    fn program(&mut self, hook: &Hook) -> Result<&mut CgroupSockAddr, BackendError> {
        let failed = |source| BackendError::Load {
            program: hook.name,
            source,
        };
        let program = self
            .programs
            .program_mut(hook.name)
            .ok_or_else(|| failed("not in the object".into()))?;
        let program: &mut CgroupSockAddr = program.try_into().map_err(|error| failed(Box::from(error)))?;
        if program.fd().is_err() {
            program.load().map_err(|error| failed(Box::from(short(&error))))?;
        }
        Ok(program)
    }

    fn program_fd(&mut self, hook: &Hook) -> Result<OwnedFd, BackendError> {
        let program = self.program(hook)?;
        let fd = program.fd().and_then(|fd| Ok(fd.as_fd().try_clone_to_owned()?));
        fd.map_err(|error| BackendError::Load {
            program: hook.name,
            source: Box::from(error),
        })
    }

    fn program_id(&mut self, hook: &Hook) -> Result<u32, BackendError> {
        let info = self.program(hook)?.info();
        Ok(info
            .map_err(|error| BackendError::Load {
                program: hook.name,
                source: Box::from(error),
            })?
            .id())
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
            if name.starts_with("maps_v") && name != maps_name() {
                self.pins.remove(&name)?;
            }
        }
        Ok(())
    }
}

/// The consumer of the ring buffer.
pub struct Events {
    ring: RingBuf<MapData>,
}

impl Events {
    /// The next denial, if one is there.
    pub fn take(&mut self) -> Option<EventRecord> {
        self.ring.next().and_then(|bytes| sys::read_record(&bytes))
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

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

/// Removes all of ours from the kernel; false where there was nothing. Fails while another process writes it.
pub fn unload(pin_dir: &Path) -> Result<bool, BackendError> {
    let Some(pins) = Pins::open(pin_dir)? else {
        return Ok(false);
    };
    let _lock = pins.lock()?;
    remove_all(pins)?;
    Ok(true)
}

/// An attempt described from outside, as the decision's subject.
struct Asker<'a> {
    attempt: &'a Attempt,
    home: u64,
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

fn maps_name() -> String {
    format!("maps_v{ABI}")
}

fn load(maps_dir: &Path, offsets: Option<Offsets>, log_level: u8) -> Result<Ebpf, BackendError> {
    let Offsets { sk_uid, task_flags } = offsets.unwrap_or(Offsets {
        sk_uid: 0,
        task_flags: 0,
    });
    EbpfLoader::new()
        .btf(None)
        .default_map_pin_directory(maps_dir)
        .override_global("SK_UID_OFFSET", &sk_uid, true)
        .override_global("TASK_FLAGS_OFFSET", &task_flags, true)
        .override_global(aya_log::LEVEL, &log_level, true)
        .load(PROGRAMS)
        .map_err(|error| BackendError::Load {
            program: "the programs",
            source: Box::from(short(&error)),
        })
}

/// An error and its causes on one line, without the verifier's log.
fn short(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text.lines().next().unwrap_or_default().to_owned()
}

fn remove_all(pins: Pins) -> Result<(), BackendError> {
    // The kernel ends links some time after their last pin has gone; this ends their judging at once, and for all hooks.
    // Damaged pins must not keep the rest: without it, judging ends with the links.
    let ended = Maps::open(&pins.path(&maps_name())).and_then(|maps| maps.map_or(Ok(()), |maps| maps.deactivate()));
    if let Err(error) = ended {
        tracing::warn!("{error}; removing all the same");
    }
    let names = pins.list()?;
    let (maps, links): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| name.starts_with("maps_v"));
    for name in links.iter().chain(&maps) {
        pins.remove(name)?;
    }
    pins.remove_dir()
}

fn observe(maps: &Maps, pins: &Pins, cgroup: Option<u64>) -> Result<Observed, BackendError> {
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
