//! The eBPF backend: programs and maps loaded with aya, pinned, and taken over by whoever comes next (F1).
//!
//! A rule set is written to the slot that no program reads, read back, and made active by flipping one byte (F2, F3).

pub(crate) mod btf;
mod error;
pub(crate) mod image;
pub(super) mod links;
mod load;
#[cfg(test)]
mod loops;
pub(crate) mod maps;
mod observe;
pub(crate) mod pins;
mod ring;
pub(crate) mod sys;
#[cfg(test)]
mod tests;
mod verify;

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use enforcer_ebpf::{ABI, DialRecord, EventRecord, TargetName};
use tracing::warn;

pub(crate) use self::{
    btf::look_ahead,
    error::BackendError,
    links::{LinkLook, LinksSeen},
    load::{Trace, sees_other_owners},
    observe::{Checked, Lacking, Observed, ObservedTarget, Pinned, SocketUsers},
    ring::Ring,
};
use self::{
    image::{Image, Loader, TargetNames},
    links::Astray,
    load::{Programs, Sight},
    maps::{Look, Maps},
    observe::observe,
    pins::{Lock, Pins},
};
use crate::{backend::HIGHEST_GENERATION, ruleset::RuleSet};

/// What we hold in the kernel, for the process that writes it.
#[derive(Debug)]
pub(crate) struct EbpfBackend {
    programs: Programs,
    maps: Maps,
    pins: Pins,
    lock: Lock,
    cgroup: PathBuf,
    cgroup_fd: File,
    cgroup_id: u64,
    loader: Loader,
    /// What the programs were loaded with, and the level of their log.
    sight: Sight,
    log_level: u8,
    /// Whether the active rule set has UDP endpoints.
    udp: bool,
    /// The links that are not as they were attached, by the last look at them; none before they were.
    astray: Option<Astray>,
    /// What each slot holds; none where that is not known.
    slots: [Option<Image>; 2],
    /// Whether a program may still be reading the slot that is not active.
    flipped: bool,
    /// The wait until none is, in a thread of its own.
    settling: Option<JoinHandle<io::Result<()>>>,
    /// The slot and number of the rule set that was made active.
    made_active: Option<(u8, u64)>,
    /// When the maps are looked at again, to see whether others have changed them.
    look_again: [(Look, Instant); 2],
    /// Links made, programs of links put back, and rule sets written anew so far: more of them than at first means that
    /// others took or changed what is ours (F5).
    repaired: u64,
}

/// What the maps are known to hold is read again at the first tick that comes no sooner than this after the time
/// before, and so much later that it takes a hundredth of one processor at most. Half a tick less than the wanted time,
/// as ticks are answered late on a busy host.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// The same of all that lies in them.
const LOOK_AT_ALL_AGAIN: Duration = Duration::from_millis(1500);
const SHARE: u32 = 100;

impl EbpfBackend {
    /// Takes over what is pinned, or makes it. Nothing is judged differently before the first [`EbpfBackend::apply`].
    pub(crate) fn take_over(pin_dir: &Path, cgroup: &Path, daemon: bool, log_level: u8) -> Result<Self, BackendError> {
        let (cgroup_fd, cgroup_id) = open_cgroup(cgroup)?;
        let pins = Pins::create(pin_dir)?;
        let lock = pins.lock()?;
        let maps_dir = pins.subdir(&maps_name())?;
        // Each pin is the map it should be, or there is none: what is found is used.
        let fresh = match Maps::open(&maps_dir) {
            Ok(maps) => maps.is_none(),
            // Left by a start that was killed, or damaged since. Programs active may read these maps, so they are
            // set aside as another version's are: ours come into force first, and only then do those go (F1).
            Err(error @ BackendError::Damaged { .. }) => {
                warn!("{error}; its maps are replaced once rules are active");
                pins.rename(&maps_name(), &format!("{}_damaged", maps_name()))?;
                pins.subdir(&maps_name())?;
                true
            }
            Err(error) => return Err(error),
        };
        let (mut programs, sight) = Programs::here(&maps_dir, log_level)?;
        programs.begin_to_load(|hook| !hook.udp_only);
        let maps = Maps::open(&maps_dir)?.ok_or(BackendError::Damaged { path: maps_dir })?;
        Ok(Self {
            programs,
            maps,
            pins,
            lock,
            cgroup: cgroup.into(),
            cgroup_fd,
            cgroup_id,
            loader: Loader {
                netns: sys::netns_cookie().unwrap_or(0),
                daemon,
                sees: sight.sees(),
            },
            sight,
            log_level,
            udp: false,
            astray: None,
            slots: if fresh {
                [Some(Image::empty()), Some(Image::empty())]
            } else {
                [None, None]
            },
            flipped: !fresh,
            settling: None,
            made_active: None,
            look_again: [Look::Known, Look::Whole].map(|look| (look, Instant::now())),
            repaired: 0,
        })
    }

    /// The number of the active rules, by any process; 0 for none.
    pub(crate) fn generation(&self) -> Result<u64, BackendError> {
        self.number_of(self.maps.active_slot()?)
    }

    fn number_of(&self, active: Option<u8>) -> Result<u64, BackendError> {
        match active {
            Some(slot) => Ok(self.maps.generation_of(slot)?.number),
            None => Ok(0),
        }
    }

    /// Makes a rule set active, whole or not at all (F2). Returns its number: that of the active one if it is the same,
    /// else one greater than `above`, as it is where the active one's is less.
    pub(crate) fn apply(&mut self, rules: &RuleSet, above: u64) -> Result<u64, BackendError> {
        let active = self.maps.active_slot()?;
        let previous = match active {
            Some(slot) => self.maps.names(slot)?,
            None => Image::empty().names,
        };
        let image = image::lower(rules, &previous, self.loader);
        let number = self.number_of(active)?;
        if let Some(slot) = active
            && number >= above
            && *self.held(slot)? == image
        {
            self.attach_again(image.has_udp())?;
            self.made_active = Some((slot, number));
            return Ok(number);
        }
        self.put(image, active, &previous, number.min(HIGHEST_GENERATION).max(above) + 1)
    }

    /// Writes an image to the slot that is not active, and makes it active under a number.
    fn put(
        &mut self,
        image: Image,
        active: Option<u8>,
        previous: &TargetNames,
        number: u64,
    ) -> Result<u64, BackendError> {
        let slot = active.map_or(0, |slot| 1 - slot);
        self.wait_for_readers()?;
        // A map may have to be made and pinned.
        self.restore_directory()?;
        self.pins.subdir(&maps_name())?;
        // Not known again until it is written whole.
        let have = self.slots.get_mut(usize::from(slot)).and_then(Option::take);
        self.maps.write_slot(slot, have.as_ref(), &image, number)?;
        self.clear_reused_counters(previous, &image.names)?;
        self.attach_missing(image.has_udp())?;
        self.maps.activate(slot)?;
        self.made_active = Some((slot, number));
        self.flipped = true;
        self.attach_again(image.has_udp())?;
        if let Some(held) = self.slots.get_mut(usize::from(slot)) {
            *held = Some(image);
        }
        Ok(number)
    }

    /// Begins to wait as [`EbpfBackend::wait_for_readers`] does, so that the next change finds it done. The kernel's
    /// own threads end a grace period, and wait for a processor as all others do: tens of milliseconds, and seconds
    /// where some user keeps the host busy, for which nobody else is to wait (F10).
    pub(crate) fn begin_to_wait_for_readers(&mut self) {
        if self.flipped && self.settling.is_none() {
            // Without a thread the next change waits.
            self.settling = thread::Builder::new().spawn(sys::wait_for_programs).ok();
        }
    }

    /// Waits until no verdict in flight reads the slot that was active before (F2).
    fn wait_for_readers(&mut self) -> Result<(), BackendError> {
        if self.flipped {
            let waited = match self.settling.take() {
                Some(thread) => thread
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("the thread panicked"))),
                None => sys::wait_for_programs(),
            };
            waited.map_err(|error| BackendError::Map {
                action: "wait for readers of",
                map: "endpoints",
                error,
            })?;
            self.flipped = false;
        }
        Ok(())
    }

    /// Makes sure that the rule set of a number is active whole and every link in place (F5): its number, another one
    /// where it had to be written anew. None if it is not the one that was made active last.
    pub(crate) fn ensure_active(&mut self, number: u64) -> Result<Option<u64>, BackendError> {
        if self.made_active.is_none_or(|(_, put)| put != number) {
            return Ok(None);
        }
        let kept = if self.is_whole()? { number } else { self.repair()? };
        self.attach_again(self.udp)?;
        self.pin_missing_maps()?;
        Ok(Some(kept))
    }

    /// Makes the pin directory again where another process has removed or replaced it, and takes its lock.
    fn restore_directory(&mut self) -> Result<(), BackendError> {
        if self.lock.is_of(&self.pins) {
            return Ok(());
        }
        let pins = Pins::create(self.pins.dir())?;
        self.lock = pins.lock_at_once()?;
        self.pins = pins;
        Ok(())
    }

    /// Pins maps again whose pins another process has removed: the next start takes over what is pinned (F1).
    fn pin_missing_maps(&mut self) -> Result<(), BackendError> {
        for (name, map) in self.maps.all() {
            let path = self.pins.path(&maps_name()).join(name);
            if path.exists() {
                continue;
            }
            self.pins.subdir(&maps_name())?;
            map.pin(&path).map_err(|error| BackendError::Io {
                action: "pin map",
                object: path,
                error,
            })?;
            self.repaired += 1;
        }
        Ok(())
    }

    /// Whether the maps hold what was made active: a look at two entries, and now and then at all of them.
    fn is_whole(&mut self) -> Result<bool, BackendError> {
        let Some((slot, number)) = self.made_active else {
            return Ok(true);
        };
        if self.maps.active_slot()? != Some(slot) || self.maps.generation_of(slot)?.number != number {
            return Ok(false);
        }
        let Some(Some(held)) = self.slots.get(usize::from(slot)) else {
            return Ok(true);
        };
        for (look, due) in &mut self.look_again {
            let started = Instant::now();
            if started < *due {
                continue;
            }
            let whole = self.maps.holds(slot, held, *look)?;
            let pause = match look {
                Look::Known => LOOK_AGAIN,
                Look::Whole => LOOK_AT_ALL_AGAIN,
            };
            *due = started + pause.max(started.elapsed() * SHARE);
            if !whole {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Restores what was active, whatever has become of the maps: in the other slot, under a new number.
    fn repair(&mut self) -> Result<u64, BackendError> {
        let (slot, number) = self.made_active.ok_or(BackendError::ReadBack { map: "active" })?;
        let held = self.slots.get(usize::from(slot)).and_then(Clone::clone);
        let image = held.ok_or(BackendError::ReadBack { map: "endpoints" })?;
        let active = self.maps.active_slot()?;
        let told = self.number_of(active)?;
        // Whoever changed one slot may have changed the other: both are read before they are written.
        self.slots = [None, None];
        self.flipped = true;
        // A wait that has begun may have begun before.
        self.settling = None;
        let names = image.names;
        let put = self.put(
            image.clone(),
            active.or(Some(slot)),
            &names,
            number.max(told.min(HIGHEST_GENERATION)) + 1,
        );
        if put.is_err() {
            // To be tried again: what is wanted must not be forgotten.
            self.made_active = Some((slot, number));
            if let Some(held) = self.slots.get_mut(usize::from(slot)) {
                *held = Some(image);
            }
        }
        self.repaired += u64::from(put.is_ok());
        put
    }

    /// Links and rule sets that had to be put back so far.
    #[must_use]
    pub(crate) fn repaired(&self) -> u64 {
        self.repaired
    }

    /// What the kernel holds now, read from it; `quick` takes the entries of maps from what was read back when they
    /// were written, as reading large maps takes tens of milliseconds.
    pub(crate) fn observe(&self, quick: bool) -> Result<Observed, BackendError> {
        let held = |slot: u8| {
            self.slots
                .get(usize::from(slot))
                .and_then(Option::as_ref)
                .filter(|_| quick)
        };
        let faults = |udp| match &self.astray {
            Some(astray) => links::faults(astray),
            // Before this process has attached any: those of another one, whose programs are its own.
            None => links::faults(&links::astray(&self.pins, udp, Some(self.cgroup_id), |_, _| Ok(true))),
        };
        observe(&self.maps, faults, held)
    }

    /// Denials that the ring buffer had no room for.
    pub(crate) fn lost(&self) -> Result<u64, BackendError> {
        self.maps.lost()
    }

    /// The denials as they come. Each call opens another consumer of the same buffer: keep one.
    pub(crate) fn events(&self) -> Result<Ring<EventRecord>, BackendError> {
        self.ring("events")
    }

    /// The dials that open gates tell of (N8). As [`EbpfBackend::events`].
    pub(crate) fn dials(&self) -> Result<Ring<DialRecord>, BackendError> {
        self.ring("dials")
    }

    /// Has the next dial of a port told, at an address that is no endpoint, or none (N8).
    pub(crate) fn set_gate(&self, port: u16, open: bool) -> Result<(), BackendError> {
        self.maps.set_gate(port, open)
    }

    /// Whether others dialled a port after the one that was told.
    pub(crate) fn take_knock(&self, port: u16) -> Result<bool, BackendError> {
        self.maps.take_knock(port)
    }

    fn ring<R>(&self, name: &str) -> Result<Ring<R>, BackendError> {
        Ring::open(self.pins.path(&maps_name()).join(name))
    }

    /// What the programs log. Returned once.
    pub(crate) fn trace(&mut self) -> Option<Trace> {
        self.programs.trace.take()
    }

    /// Removes all of ours from the kernel: links first, so that no program reads maps that are going.
    pub(crate) fn unload(self) -> Result<(), BackendError> {
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
    fn clear_reused_counters(&self, previous: &TargetNames, names: &TargetNames) -> Result<(), BackendError> {
        let reused = (0..)
            .zip(previous.iter().zip(names))
            .filter(|(_, (before, now))| before != now && **now != TargetName::NONE)
            .fold(0, |bits, (bit, _)| bits | 1 << bit);
        if reused == 0 {
            return Ok(());
        }
        self.maps.clear_counters(reused)
    }
}

/// Whether this kernel has BPF, and lets us use it.
pub(super) fn has_bpf() -> bool {
    sys::wait_for_programs().is_ok()
}

/// Removes all of ours from the kernel; false where there was nothing. Fails while another process writes it.
pub(crate) fn unload(pin_dir: &Path) -> Result<bool, BackendError> {
    let Some(pins) = Pins::open(pin_dir)? else {
        return Ok(false);
    };
    let _lock = pins.lock()?;
    remove_all(pins)?;
    Ok(true)
}

/// A cgroup's directory, held open, and its id.
pub(super) fn open_cgroup(cgroup: &Path) -> Result<(File, u64), BackendError> {
    let failed = |error| BackendError::Cgroup {
        path: cgroup.into(),
        error,
    };
    let file = File::open(cgroup).map_err(failed)?;
    let id = file.metadata().map_err(failed)?.ino();
    if !nix::sys::statfs::fstatfs(&file)
        .is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
    {
        return Err(failed(io::Error::other("not a cgroup v2 directory")));
    }
    Ok((file, id))
}

/// Begins the name of every directory of maps; the layout's version follows.
const MAPS: &str = "maps_v";

fn maps_name() -> String {
    format!("{MAPS}{ABI}")
}

/// Removes all that is pinned, whatever made it and however much of it is left; the first failure is told at the end.
fn remove_all(pins: Pins) -> Result<(), BackendError> {
    let names = pins.list()?;
    let (maps, links): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| name.starts_with(MAPS));
    // The kernel ends links some time after their last pin has gone; this ends their judging at once, and for all
    // hooks. Where it cannot be done, as with maps of a layout yet unknown, the links are detached one by one.
    for name in &maps {
        let _ = maps::deactivate(&pins.path(name));
    }
    links::detach_all(&pins);
    let removed = links.iter().chain(&maps).map(|name| pins.remove(name));
    removed.fold(Ok(()), Result::and)?;
    pins.remove_dir()
}
