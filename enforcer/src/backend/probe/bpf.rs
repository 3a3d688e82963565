//! What BPF can do here: small maps and programs that vanish with their descriptors, then our own in a mount namespace
//! that nobody else sees.

use std::{
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::{Fact, Facts, Feature, TrialSite};
use crate::backend::{
    BackendError,
    ebpf::{self, btf, pins::Pins, sys},
};

pub(super) fn probe(place: TrialSite<'_>, facts: &mut Facts) {
    facts.set(Feature::BpfSyscall, Fact::from_errno(sys::try_map(sys::MapKind::Array)));
    facts.set(
        Feature::RingBuffer,
        Fact::from_errno(sys::try_map(sys::MapKind::RingBuffer)),
    );
    facts.set(Feature::BatchOperations, Fact::from_errno(sys::try_batch()));
    facts.set(Feature::CgroupSockAddr, Fact::from_errno(sys::load_passing().map(drop)));
    facts.set(Feature::SocketOwner, socket_owner());
    facts.set(Feature::OtherOwners, other_owners());
    facts.set(
        Feature::NetnsCookie,
        match sys::netns_cookie() {
            Some(_) => Fact::Supported,
            None => Fact::Missing {
                why: "SO_NETNS_COOKIE is not known".to_owned(),
            },
        },
    );
    facts.set(Feature::CgroupLink, link(place.cgroup));
    own_programs(place, facts);
}

fn socket_owner() -> Fact {
    match btf::offsets() {
        Ok(offsets) if offsets.sk_uid.is_some() => Fact::Supported,
        Ok(_) => Fact::Missing {
            why: "/sys/kernel/btf/vmlinux is missing, or does not list sk_uid".to_owned(),
        },
        Err(error) => Fact::Inconclusive(format!("read /sys/kernel/btf/vmlinux: {error}")),
    }
}

fn other_owners() -> Fact {
    match ebpf::sees_other_owners() {
        Ok(true) => Fact::Supported,
        Ok(false) => Fact::Missing {
            why: "the kernel does not let programs read its memory (/sys/kernel/security/lockdown)".to_owned(),
        },
        Err(error) => Fact::Inconclusive(error.to_string()),
    }
}

/// A program that lets everything pass is attached for the length of this call.
fn link(cgroup: Option<&Path>) -> Fact {
    let Some(cgroup) = cgroup else {
        return Fact::Missing {
            why: "no cgroup v2 hierarchy is mounted".to_owned(),
        };
    };
    let cgroup = match ebpf::open_cgroup(cgroup) {
        Ok((cgroup, _)) => cgroup,
        // A wrong place says nothing of the kernel.
        Err(error) => return Fact::from_backend(&error),
    };
    let tried = sys::load_passing()
        .and_then(|program| sys::link_create(program.as_fd(), cgroup.as_fd(), sys::CONNECT4).map(drop));
    Fact::from_errno(tried)
}

/// Loads and attaches what a start would, with its pins on a bpffs that only this thread sees: whatever happens, the
/// kernel takes all of it back. Its maps makes nothing active, so that it judges nothing.
fn own_programs(place: TrialSite<'_>, facts: &mut Facts) {
    // The private bpffs would hide that a start has none there.
    if let Err(error) = Pins::check_usable(place.pin_dir) {
        facts.set(Feature::Bpffs, Fact::from_backend(&error));
        for feature in [Feature::Programs, Feature::Attach] {
            facts.set(feature, untried());
        }
        return;
    }
    let cgroup = place.cgroup.map(Path::to_path_buf);
    let parent = place.pin_dir.parent().unwrap_or(Path::new("/")).to_path_buf();
    let tried = std::thread::spawn(move || in_private(&parent, cgroup.as_deref())).join();
    let (bpffs, programs, attach) = tried.unwrap_or_else(|_| {
        let unknown = || Fact::Inconclusive("the trial ended by itself".to_owned());
        (unknown(), unknown(), unknown())
    });
    facts.set(Feature::Bpffs, bpffs);
    facts.set(Feature::Programs, programs);
    facts.set(Feature::Attach, attach);
}

fn in_private(parent: &Path, cgroup: Option<&Path>) -> (Fact, Fact, Fact) {
    if let Err(error) = private_bpffs(parent) {
        return (error, untried(), untried());
    }
    let pins: PathBuf = parent.join("enforcer_probe");
    let Some(cgroup) = cgroup else {
        return (Fact::Supported, untried(), untried());
    };
    let tried = ebpf::EbpfBackend::take_over(&pins, cgroup, false, 0).and_then(|mut kernel| kernel.try_out());
    let (programs, attach) = match tried {
        Ok(()) => (Fact::Supported, Fact::Supported),
        Err(error @ BackendError::Attach { .. }) => (Fact::Supported, Fact::from_backend(&error)),
        Err(error) => (Fact::from_backend(&error), untried()),
    };
    (Fact::Supported, programs, attach)
}

fn untried() -> Fact {
    Fact::Inconclusive("not tried, as what it needs is missing".to_owned())
}

fn private_bpffs(parent: &Path) -> Result<(), Fact> {
    let unknown = |action: &str| {
        let action = action.to_owned();
        move |error: nix::Error| Fact::Inconclusive(format!("{action}: {error}"))
    };
    unshare(CloneFlags::CLONE_NEWNS).map_err(unknown("make a mount namespace"))?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(unknown("keep mounts to ourselves"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), parent, Some("bpf"), flags, Some("mode=0700")).map_err(|error| {
        let action = format!("mount a bpffs on {}", parent.display());
        Fact::from_errno(Err(io::Error::from(error))).named(&action)
    })
}

impl Fact {
    /// With what was tried.
    fn named(self, action: &str) -> Self {
        match self {
            Self::Supported => Self::Supported,
            Self::Missing { why } => Self::Missing {
                why: format!("{action}: {why}"),
            },
            Self::Inconclusive(why) => Self::Inconclusive(format!("{action}: {why}")),
        }
    }
}
