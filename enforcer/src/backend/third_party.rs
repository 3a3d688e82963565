//! What other processes have in the kernel beside ours: programs on a cgroup, rules and chains of nftables. Only read,
//! for `doctor`.

use std::{fs::File, io, os::fd::AsFd as _, path::Path};

use super::{
    ebpf::{
        links::{HOOKS, Hook},
        sys,
    },
    nftables::{netlink::Netlink, others},
};

pub(crate) use super::{
    ebpf::sys::Attached,
    nftables::others::{ForeignRule, Nat, To},
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
