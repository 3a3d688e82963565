//! The programs loaded, as this kernel lets them see.

use std::{
    collections::BTreeMap,
    error::Error,
    ffi::CString,
    fmt, io, mem,
    os::fd::{AsFd as _, AsRawFd, OwnedFd, RawFd},
    panic::resume_unwind,
    path::Path,
    sync::Arc,
    thread::{self, JoinHandle},
};

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use aya_log::EbpfLogger;
use aya_obj::{
    Object,
    generated::{bpf_insn, bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS},
    maps::PinningType,
};
use tracing::warn;

use super::{
    BackendError,
    btf::{self, Casts, Offsets, ProgramOffsets, TaskOffsets},
    image::KernelVisibility,
    links::{HOOKS, Hook, load_error},
    maps, sys,
};

/// The programs as built for the BPF target.
pub(super) static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/enforcer-programs"));

/// What this kernel lets the programs see. What it withholds costs only itself (D3).
#[derive(Debug)]
pub(super) struct Sight {
    /// `program` is none where a task can only be read with [`Sight::reads`], `casts` where the verifier does not take
    /// them, and `task` where there are none.
    offsets: Offsets,
    /// Whether `bpf_get_current_task_btf` is to be had.
    typed: bool,
    /// Whether `bpf_probe_read_kernel` is to be had: not under `lockdown=confidentiality`.
    reads: bool,
}

impl Sight {
    pub(super) fn here() -> Result<Self, BackendError> {
        let mut offsets = btf::offsets().map_err(|error| BackendError::Io {
            action: "read",
            object: "/sys/kernel/btf/vmlinux".into(),
            error,
        })?;
        let has = |helper| is_helper_supported(ProgramType::CgroupSockAddr, helper);
        // Where the kernel cannot tell whether it has the helper, the slower way does.
        let typed = has(BpfHelper::BPF_FUNC_get_current_task_btf).unwrap_or(false);
        offsets.casts = casts(&offsets);
        if offsets.casts.is_none() {
            offsets.task = None;
        }
        if !typed && offsets.casts.is_none() {
            offsets.program = None;
        }
        Ok(Self {
            offsets,
            typed,
            reads: reads_kernel().unwrap_or(true),
        })
    }

    /// Has the programs read less of tasks for denials: not the paths of their programs, and the rest by helpers; false
    /// where they do so anyway.
    pub(super) fn forget_tasks(&mut self) -> bool {
        let paths = self.offsets.program.take().is_some();
        self.offsets.task.take().is_some() || paths
    }

    pub(super) fn sees(&self) -> KernelVisibility {
        let Offsets {
            sk_uid,
            task_flags,
            casts,
            ..
        } = self.offsets;
        KernelVisibility {
            tcp_owner: sk_uid.is_some(),
            other_owner: sk_uid.is_some() && (casts.is_some() || self.reads),
            threads: task_flags.is_some() && (casts.is_some() || self.typed || self.reads),
        }
    }

    /// What the programs are told of it, by the names of their constants.
    fn globals(&self, log_level: u8) -> Vec<(&'static str, Vec<u8>)> {
        let Offsets {
            sk_uid,
            task_flags,
            program,
            casts,
            task,
        } = self.offsets;
        // No structure begins with what is looked for.
        let [sk_uid, task_flags] = [sk_uid, task_flags].map(Option::unwrap_or_default);
        let ProgramOffsets {
            task_mm,
            mm_exe,
            file_dentry,
            dentry_parent,
            dentry_length,
            dentry_name,
            dentry_inline,
        } = program.unwrap_or_default();
        let casts = casts.unwrap_or_default();
        let [typed, reads] = [self.typed, self.reads].map(u32::from);
        let word = |value: u32| value.to_ne_bytes().to_vec();
        let of_task = TaskOffsets::CONSTANTS
            .into_iter()
            .zip(task.unwrap_or_default().0.map(word));
        let others = [
            ("SK_UID_OFFSET", word(sk_uid)),
            ("TASK_FLAGS_OFFSET", word(task_flags)),
            ("TYPED_TASK", word(typed)),
            ("TASK_MM_OFFSET", word(task_mm)),
            ("MM_EXE_OFFSET", word(mm_exe)),
            ("FILE_DENTRY_OFFSET", word(file_dentry)),
            ("DENTRY_PARENT_OFFSET", word(dentry_parent)),
            ("DENTRY_LENGTH_OFFSET", word(dentry_length)),
            ("DENTRY_NAME_OFFSET", word(dentry_name)),
            ("DENTRY_INLINE_OFFSET", word(dentry_inline)),
            ("READS_KERNEL", word(reads)),
            ("SOCK_TYPE", word(casts.sock)),
            ("TASK_TYPE", word(casts.task)),
            ("TASK_CRED_OFFSET", word(casts.task_cred)),
            ("CRED_UID_OFFSET", word(casts.cred_uid)),
            (aya_log::LEVEL, vec![log_level]),
        ];
        others.into_iter().chain(of_task).collect()
    }
}

/// The casts that the verifier takes here.
fn casts(offsets: &Offsets) -> Option<Casts> {
    offsets.casts.filter(|casts| sys::try_cast(casts).is_ok())
}

/// Whether programs see the owners of sockets that are not TCP's, where they see any.
pub(crate) fn sees_other_owners() -> Result<bool, aya::programs::ProgramError> {
    Ok(reads_kernel()? || btf::offsets().is_ok_and(|offsets| casts(&offsets).is_some()))
}

/// Whether programs may read the kernel's memory. Old kernels hand out the helper under `lockdown=confidentiality` too,
/// and have each call fail.
fn reads_kernel() -> Result<bool, aya::programs::ProgramError> {
    let locked =
        std::fs::read_to_string("/sys/kernel/security/lockdown").is_ok_and(|text| text.contains("[confidentiality]"));
    let has = is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_probe_read_kernel);
    has.map(|has| has && !locked)
}

/// The programs, bound to the maps.
#[derive(Debug)]
pub(super) struct Programs {
    bound: Arc<Bound>,
    /// Those that the kernel is verifying.
    loading: Vec<(&'static Hook, JoinHandle<io::Result<LoadedProgram>>)>,
    loaded: BTreeMap<&'static str, LoadedProgram>,
    /// Whether they are to log, and nobody has looked for that yet.
    logs: bool,
    /// What they log, until it is taken: found by the id of one of them, which a confined daemon may not do.
    pub(super) trace: Option<Trace>,
}

/// What the programs log, to be flushed whenever it is readable.
pub(crate) struct Trace(EbpfLogger<&'static dyn log::Log>);

impl Trace {
    /// Hands on what has been logged.
    pub(crate) fn flush(&mut self) {
        self.0.flush();
    }
}

impl AsRawFd for Trace {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Trace").field(&self.as_raw_fd()).finish()
    }
}

/// What is given to the kernel.
#[derive(Debug)]
struct Bound {
    /// By the names of hooks.
    instructions: BTreeMap<String, Vec<bpf_insn>>,
    license: CString,
    /// The instructions name their descriptors.
    _maps: Vec<OwnedFd>,
}

/// A program in the kernel.
#[derive(Debug)]
pub(super) struct LoadedProgram {
    pub(super) fd: OwnedFd,
    pub(super) id: u32,
}

/// The programs as built, and the maps that are pinned for them.
pub(super) struct Unbound {
    object: Object,
    maps: Vec<(String, OwnedFd, aya_obj::Map)>,
}

impl Unbound {
    /// Makes the maps that are not pinned in a directory yet.
    ///
    /// aya's own loader would do, but it parses all types of the kernel first, which takes longer than all else
    /// (P7).
    pub(super) fn open(maps_dir: &Path) -> Result<Self, BackendError> {
        let object = Object::parse(PROGRAMS).map_err(|error| broken(&error))?;
        let pinned = object
            .maps
            .iter()
            .filter_map(|(name, map)| Some((pin_name(name, map)?, map)));
        let maps = pinned.map(|(name, map)| Ok((name.to_owned(), pinned_map(maps_dir, name, map)?, map.clone())));
        let maps = maps.collect::<Result<_, BackendError>>()?;
        Ok(Self { object, maps })
    }

    /// Writes into the programs where each map is and what this kernel lets them see. What no other process is to find
    /// is not pinned: constants and the programs' log.
    pub(super) fn bind(self, sight: &Sight, log_level: u8) -> Result<Programs, BackendError> {
        let Self { mut object, mut maps } = self;
        let globals = sight.globals(log_level);
        let globals = globals.iter().map(|(name, value)| (*name, (value.as_slice(), true)));
        object
            .patch_map_data(globals.collect())
            .map_err(|error| broken(&error))?;
        for (name, map) in object.maps.iter().filter(|(name, map)| pin_name(name, map).is_none()) {
            maps.push((name.clone(), made_map(name, map)?, map.clone()));
        }
        let sections = object.functions.keys().map(|(section, _)| *section).collect();
        let places = maps.iter().map(|(name, fd, map)| (name.as_str(), fd.as_raw_fd(), map));
        object
            .relocate_maps(places, &sections)
            .map_err(|error| broken(&error))?;
        object.relocate_calls(&sections).map_err(|error| broken(&error))?;
        let programs = object.programs.iter().filter_map(|(name, program)| {
            let function = object.functions.get(&program.function_key())?;
            let mut instructions = function.instructions.clone();
            if let Some(casts) = sight.offsets.casts {
                sys::insert_casts(&mut instructions, casts.function);
            }
            Some((name.clone(), instructions))
        });
        let bound = Bound {
            instructions: programs.collect(),
            license: object.license,
            _maps: maps.into_iter().map(|(_, fd, _)| fd).collect(),
        };
        Ok(Programs {
            bound: Arc::new(bound),
            loading: Vec::new(),
            loaded: BTreeMap::new(),
            logs: log_level > 0,
            trace: None,
        })
    }
}

fn broken(error: &dyn Error) -> BackendError {
    BackendError::Load {
        program: "the programs",
        source: short(error).into(),
    }
}

impl Programs {
    /// The maps, and beside them what this kernel lets the programs see: both take their time (P7). Where the latter
    /// fails, the next start finds the maps, which nothing uses.
    pub(super) fn here(maps_dir: &Path, log_level: u8) -> Result<(Self, Sight), BackendError> {
        let (sight, unbound) = side_by_side(Sight::here, || Unbound::open(maps_dir));
        let sight = sight?;
        Ok((unbound?.bind(&sight, log_level)?, sight))
    }

    /// A hook's program, if it is loaded.
    pub(super) fn loaded(&self, hook: &Hook) -> Option<&LoadedProgram> {
        self.loaded.get(hook.name)
    }

    /// Has the kernel begin to verify those that are not loaded yet, side by side: it is most of a start (P7).
    pub(super) fn begin_to_load(&mut self, hooks: impl Fn(&Hook) -> bool) {
        for hook in HOOKS.iter().filter(|hook| hooks(hook)) {
            if self.loaded(hook).is_some() || self.loading.iter().any(|(loading, _)| loading.name == hook.name) {
                continue;
            }
            let bound = Arc::clone(&self.bound);
            // Without a thread it is loaded when it is waited for.
            if let Ok(thread) = thread::Builder::new().spawn(move || bound.load(hook)) {
                self.loading.push((hook, thread));
            }
        }
    }

    /// Loads those that are not loaded yet.
    pub(super) fn load(&mut self, hooks: impl Fn(&Hook) -> bool) -> Result<(), BackendError> {
        self.begin_to_load(&hooks);
        let ended = mem::take(&mut self.loading)
            .into_iter()
            .map(|(hook, thread)| (hook, thread.join().unwrap_or_else(|panic| resume_unwind(panic))));
        for (hook, program) in ended.collect::<Vec<_>>() {
            self.keep(hook, program)?;
        }
        for hook in HOOKS.iter().filter(|hook| hooks(hook)) {
            if self.loaded(hook).is_none() {
                self.keep(hook, self.bound.load(hook))?;
            }
        }
        Ok(())
    }

    fn keep(&mut self, hook: &'static Hook, program: io::Result<LoadedProgram>) -> Result<(), BackendError> {
        let program = program.map_err(|error| load_error(hook, error.into()))?;
        if mem::take(&mut self.logs) {
            let trace = EbpfLogger::init_from_id(program.id);
            self.trace = trace
                .inspect_err(|error| warn!("the programs' trace cannot be shown: {error}"))
                .ok()
                .map(Trace);
        }
        self.loaded.insert(hook.name, program);
        Ok(())
    }
}

impl Bound {
    /// Has the kernel verify a program, and keeps it.
    fn load(&self, hook: &Hook) -> io::Result<LoadedProgram> {
        let instructions = self.instructions.get(hook.name).ok_or(io::ErrorKind::NotFound)?;
        let fd = sys::load_program(hook.name, hook.attach_type, instructions, &self.license)?;
        let id = sys::program_id(fd.as_fd())?;
        Ok(LoadedProgram { fd, id })
    }
}

/// Does one thing in a thread of its own, and the other meanwhile; without a thread one after the other.
fn side_by_side<A: Send, B>(one: impl Fn() -> A + Sync, other: impl FnOnce() -> B) -> (A, B) {
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, &one);
        let other = other();
        let one = match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
            Err(_) => one(),
        };
        (one, other)
    })
}

/// The name of a map that is pinned: of its own, or of a section of zeros, which programs address without a lookup.
fn pin_name<'a>(name: &'a str, map: &aya_obj::Map) -> Option<&'a str> {
    match map.pinning() {
        PinningType::ByName => Some(name),
        PinningType::None => name.strip_prefix(".bss."),
    }
}

/// Opens a map's pin, or makes it.
fn pinned_map(dir: &Path, name: &str, map: &aya_obj::Map) -> Result<OwnedFd, BackendError> {
    let path = dir.join(name);
    match sys::open_pin(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        found => return found.map_err(|error| map_error("open", name, &error)),
    }
    let made = made_map(name, map)?;
    sys::pin(made.as_fd(), &path).map_err(|error| map_error("pin", name, &error))?;
    Ok(made)
}

fn made_map(name: &str, map: &aya_obj::Map) -> Result<OwnedFd, BackendError> {
    let made = if map.map_type() == BPF_MAP_TYPE_ARRAY_OF_MAPS as u32 {
        maps::one_of_many(1).and_then(|like| sys::create_map(name, map, Some(like.as_fd())))
    } else {
        sys::create_map(name, map, None)
    };
    made.map_err(|error| map_error("make", name, &error))
}

fn map_error(action: &str, name: &str, error: &io::Error) -> BackendError {
    BackendError::Load {
        program: "the programs",
        source: format!("{action} map {name}: {error}").into(),
    }
}

/// An error and its causes on one line, without the verifier's log.
pub(super) fn short(error: &dyn std::error::Error) -> String {
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
