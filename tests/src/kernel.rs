//! What the kernel under test has: all that the suite asks for, but for what whoever starts the suite says that it
//! cannot have. Those who say so are held to it (`kernel_has_what_it_should`); a case for a lacking thing expects the
//! documented difference.

use std::{env, fs, io, path::Path, process::Command};

use anyhow::Result;
use clap::ValueEnum;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{attack::Way, world::ran};

/// Where it is said what the kernel lacks: names of [`Feature`]s, with commas between.
pub const LACKS: &str = "ENFORCER_TEST_LACKS";

/// What some kernels cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Feature {
    /// bpf(2).
    Bpf,
    /// Types of the kernel's structures; without them the task's user decides alone (D3).
    Btf,
    /// A cgroup v2 hierarchy, mounted.
    Cgroup2,
    /// Pointers that programs cast (Linux 6.2).
    Casts,
    /// Kernel memory read by programs, which `lockdown=confidentiality` forbids.
    KernelReads,
    /// Multipath TCP (Linux 5.6, where the distribution builds it).
    Mptcp,
    /// `SO_NETNS_COOKIE` (Linux 5.14), without which loopback is judged in every network namespace (D6).
    NetnsCookie,
    /// Filters of system calls (seccomp), by which cases take some from the binary.
    Seccomp,
    /// nftables' `socket cgroupv2` (Linux 5.13), without which principals with a cgroup match nobody there (§5).
    SocketCgroup,
}

/// What eBPF needs.
pub const EBPF_NEEDS: &[Feature] = &[Feature::Bpf, Feature::Cgroup2];
/// What a principal with a cgroup needs on any backend.
pub const CGROUP_NEEDS: &[Feature] = &[Feature::Cgroup2, Feature::SocketCgroup];

/// Whether eBPF cannot be had, by what is said that the kernel lacks.
#[must_use]
pub fn lacks_ebpf() -> bool {
    EBPF_NEEDS.iter().any(|feature| lacks(*feature))
}

/// Whether of UDP and MPTCP sockets the task's user decides alone (D3).
#[must_use]
pub fn hides_owners() -> bool {
    lacks(Feature::Casts) && lacks(Feature::KernelReads)
}

/// Whether it is said that the kernel lacks this.
#[must_use]
pub fn lacks(feature: Feature) -> bool {
    lacking().is_ok_and(|lacking| lacking.contains(&feature))
}

/// All that it is said to lack.
pub fn lacking() -> Result<Vec<Feature>> {
    let said = env::var(LACKS).unwrap_or_default();
    said.split(',')
        .filter(|name| !name.is_empty())
        .map(|name| {
            Feature::from_str(name, false)
                .map_err(|error| anyhow::anyhow!("{LACKS} names {name}, which is none: {error}"))
        })
        .collect()
}

/// By which error a way must fail here, whoever takes it, as the kernel cannot have it.
#[must_use]
pub fn cannot(way: Way) -> Option<i32> {
    (matches!(way, Way::Mptcp | Way::MptcpMapped) && lacks(Feature::Mptcp)).then_some(libc::EPROTONOSUPPORT)
}

/// Whether the kernel has it, by asking the kernel and not enforcer.
pub fn has(feature: Feature) -> Result<bool> {
    match feature {
        Feature::Bpf => Ok(bpf_answers()),
        Feature::Casts => {
            let symbols = fs::read_to_string("/proc/kallsyms").unwrap_or_default();
            Ok(symbols.contains(" bpf_rdonly_cast\n"))
        }
        Feature::KernelReads => {
            let parameters = fs::read_to_string("/proc/cmdline")?;
            Ok(!parameters
                .split_whitespace()
                .any(|word| word == "lockdown=confidentiality"))
        }
        Feature::Btf => Ok(Path::new("/sys/kernel/btf/vmlinux").exists()),
        Feature::Cgroup2 => Ok(crate::world::cgroup_mount().is_ok()),
        Feature::Mptcp => Ok(Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).is_ok()),
        Feature::NetnsCookie => netns_cookie(),
        Feature::Seccomp => Ok(seccomp_answers()),
        Feature::SocketCgroup => socket_cgroup(),
    }
}

/// Whether bpf(2) is there at all: with no attributes it is refused as such, or as unknown.
#[allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]
fn bpf_answers() -> bool {
    // SAFETY: no attributes are read, their size being 0.
    let result = unsafe { libc::syscall(libc::SYS_bpf, 0, std::ptr::null::<u8>(), 0) };
    result >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS)
}

/// Whether a process may ask for its mode (prctl(2)): where there is no seccomp, that is no known question.
#[allow(unsafe_code, reason = "a question that no safe wrapper has")]
fn seccomp_answers() -> bool {
    // SAFETY: takes no pointers.
    unsafe { libc::prctl(libc::PR_GET_SECCOMP, 0, 0, 0, 0) >= 0 }
}

#[allow(unsafe_code, reason = "a socket option that no safe wrapper has")]
fn netns_cookie() -> Result<bool> {
    use std::os::fd::AsRawFd as _;
    /// asm-generic/socket.h.
    const SO_NETNS_COOKIE: i32 = 71;
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // So that what follows fails for no other reason.
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    Ok(result == 0)
}

/// Asked by a dry run, which the kernel answers and forgets; by a set, as `nft` looks for named cgroups below
/// `/sys/fs/cgroup` alone.
fn socket_cgroup() -> Result<bool> {
    let rules = "table inet enforcertest_probe { set some { typeof socket cgroupv2 level 1; }; \
        chain out { type filter hook output priority 0; socket cgroupv2 level 1 @some accept; }; }";
    Ok(ran(Command::new("nft").args(["--check", rules]))?.code == 0)
}
