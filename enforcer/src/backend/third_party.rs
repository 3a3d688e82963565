//! What other processes have in the kernel beside ours: programs on a cgroup, other instances of enforcer among them,
//! rules and chains of nftables. Only read, for `doctor`.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::maps::MapInfo;

use super::{
    ebpf::{
        links::{HOOKS, Hook},
        sys,
    },
    nftables::{netlink::Netlink, others},
    writer,
};
use crate::host::mounts::Mounts;

pub(crate) use super::{
    ebpf::sys::Attached,
    nftables::others::{ForeignRule, Nat, To},
    writer::Holder,
};

/// Every rule of every nftables table, and every chain: family, table, name.
pub(crate) struct Tables {
    pub(crate) rules: io::Result<Vec<ForeignRule>>,
    pub(crate) chains: io::Result<Vec<(String, String, String)>>,
}

/// The hooks that our programs are on.
pub(crate) fn hooks() -> &'static [Hook] {
    &HOOKS
}

/// The id of the program that the pinned link of a hook runs, if there is one.
#[must_use]
pub(crate) fn our_program(pin_dir: &Path, hook: &Hook) -> Option<u32> {
    let link = sys::open_pin(&pin_dir.join(hook.name)).ok()?;
    sys::link_info(link.as_fd()).ok().map(|info| info.program)
}

/// The programs on a cgroup itself at a hook, ours among them, in the order in which they run; none where the kernel
/// has no BPF.
pub(crate) fn programs(cgroup: &Path, hook: &Hook) -> io::Result<Vec<Attached>> {
    match File::open(cgroup).and_then(|cgroup| sys::attached(cgroup.as_fd(), hook.attach_type)) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(Vec::new()),
        found => found,
    }
}

/// Most directories of bpffs that are looked into for pins.
const MAX_DIRS: usize = 4096;

/// Where another instance of enforcer has its pins.
#[derive(Debug)]
pub(crate) struct PinDir {
    pub(crate) path: PathBuf,
    /// Ids of the programs that its links run.
    pub(crate) programs: BTreeSet<u32>,
    /// The process that follows its rules, if one does.
    pub(crate) daemon: Option<Holder>,
}

/// Whether a program is enforcer's, of any version: by the maps that it uses.
pub(crate) fn is_enforcers(program: u32) -> bool {
    let name = |id: u32| Some(MapInfo::from_id(id).ok()?.name_as_str()?.to_owned());
    let maps: BTreeSet<String> = sys::program_maps(program)
        .unwrap_or_default()
        .into_iter()
        .filter_map(name)
        .collect();
    ["active", "endpoints", "generations", "principals"]
        .into_iter()
        .all(|map| maps.contains(map))
}

/// The directories with pinned links of the hooks, on every bpffs that is mounted here.
pub(crate) fn pin_dirs() -> io::Result<Vec<PinDir>> {
    let mounts = Mounts::own()?;
    let visible = mounts.of_kind("bpf").filter(|mount| mounts.is_visible(mount));
    let mut dirs: Vec<PathBuf> = visible.map(|mount| mount.point.clone()).collect();
    let mut at = 0;
    while let Some(dir) = dirs.get(at) {
        at += 1;
        // What is gone is no fault; links are not followed.
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let below: Vec<PathBuf> = below
            .map(|entry| entry.path())
            .take(MAX_DIRS.saturating_sub(dirs.len()))
            .collect();
        dirs.extend(below);
    }
    let pins = dirs.into_iter().filter_map(|path| {
        let programs: BTreeSet<u32> = HOOKS.iter().filter_map(|hook| our_program(&path, hook)).collect();
        if programs.is_empty() {
            return None;
        }
        let daemon = File::open(&path).ok().and_then(|dir| writer::holder_of(&dir));
        Some(PinDir { path, programs, daemon })
    });
    Ok(pins.collect())
}

/// The tables of this network namespace; none where the kernel has no `nf_tables`.
pub(crate) fn tables() -> Option<Tables> {
    let mut netlink = match Netlink::open() {
        Ok(netlink) => netlink,
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return None,
        Err(error) => {
            return Some(Tables {
                rules: Err(error),
                chains: Ok(Vec::new()),
            });
        }
    };
    let rules = others::rules(&mut netlink);
    let chains = others::chains(&mut netlink);
    let is_missing = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL));
    (!rules.as_ref().is_err_and(is_missing)).then_some(Tables { rules, chains })
}
