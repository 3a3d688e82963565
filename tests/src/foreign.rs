//! Programs that are not ours, attached to a cgroup by `BPF_PROG_ATTACH`, their running times, and links and maps of
//! ours in other hands.

#![allow(unsafe_code, reason = "bpf(2) has no safe form; structures are those of linux/bpf.h")]

pub mod map;

use std::{
    fs::File,
    io,
    net::Ipv4Addr,
    ops::RangeInclusive,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

/// Detached when dropped.
#[derive(Debug)]
pub struct ForeignProgram {
    program: OwnedFd,
    cgroup: File,
}

/// How a program shares its cgroup (`BPF_F_ALLOW_OVERRIDE`, `BPF_F_ALLOW_MULTI` in linux/bpf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// With nobody.
    None,
    /// One below takes its place.
    Override,
    /// All run.
    Multi,
}

const CONNECT4: u32 = 10;
/// `r0 = 0`, `r0 = 1` and `exit`.
const REFUSE: u64 = 0x0000_0000_0000_00b7;
const PASS: u64 = 0x0000_0001_0000_00b7;
const EXIT: u64 = 0x0000_0000_0000_0095;

impl ForeignProgram {
    /// Lets everything pass at `connect4`.
    pub fn passing(cgroup: &Path, sharing: Sharing) -> io::Result<Self> {
        Self::attach(cgroup, sharing, &[PASS, EXIT])
    }

    /// Lets everything pass at `connect4` after so many additions, in four independent chains, and calls of a helper
    /// that only reads two words (`bpf_get_current_pid_tgid`).
    pub fn working(cgroup: &Path, additions: usize, calls: usize) -> io::Result<Self> {
        // r2 to r5 = 0, and += 1.
        let registers = [0x0200, 0x0300, 0x0400, 0x0500];
        let zeros = registers.map(|register| 0xb7 | register);
        let adds = registers.map(|register| 0x0000_0001_0000_0007 | register);
        let adds = adds.iter().cycle().take(additions).copied();
        let calls = std::iter::repeat_n(0x0000_000e_0000_0085, calls);
        let all = zeros.into_iter().chain(adds).chain(calls).chain([PASS, EXIT]);
        Self::attach(cgroup, Sharing::None, &all.collect::<Vec<u64>>())
    }

    /// Refuses everything at `connect4`.
    pub fn refusing(cgroup: &Path, sharing: Sharing) -> io::Result<Self> {
        Self::attach(cgroup, sharing, &[REFUSE, EXIT])
    }

    /// Sends every `connect4` to another address.
    pub fn rewriting(cgroup: &Path, sharing: Sharing, to: Ipv4Addr) -> io::Result<Self> {
        // w2 = to; *(u32 *)(r1 + 4) = w2, which is `user_ip4`.
        let load = 0x02b4 | u64::from(u32::from_ne_bytes(to.octets())) << 32;
        Self::attach(cgroup, sharing, &[load, 0x0004_2163, PASS, EXIT])
    }

    fn attach(cgroup: &Path, sharing: Sharing, instructions: &[u64]) -> io::Result<Self> {
        let program = load(instructions)?;
        let cgroup = File::open(cgroup)?;
        let flags = match sharing {
            Sharing::None => 0,
            Sharing::Override => 1,
            Sharing::Multi => 2,
        };
        bpf(8, &[fd_of(&cgroup), fd_of(&program), CONNECT4, flags])?;
        Ok(Self { program, cgroup })
    }
}

/// Makes a pinned `connect4` link run a program that lets everything pass.
pub fn take_link(pin: &Path) -> io::Result<()> {
    let (link, program) = (open_link(pin)?, load(&[PASS, EXIT])?);
    bpf(29, &[fd_of(&link), fd_of(&program), 0, 0]).map(drop)
}

/// Detaches a pinned link, which stays pinned.
pub fn detach_link(pin: &Path) -> io::Result<()> {
    bpf(34, &[fd_of(&open_link(pin)?)]).map(drop)
}

/// The programs attached to a cgroup, by their numbers, with each type of attachment that the kernel has.
pub fn attached(cgroup: &Path) -> io::Result<Vec<(u32, Vec<u32>)>> {
    /// Those of a cgroup, which begin with `BPF_CGROUP_` in linux/bpf.h; for others a descriptor is no cgroup's, but a
    /// device's number, say.
    const TYPES: [RangeInclusive<u32>; 8] = [0..=3, 6..=6, 8..=15, 18..=22, 29..=32, 34..=34, 43..=43, 49..=53];
    /// More programs than a cgroup takes (`BPF_CGROUP_MAX_PROGS`).
    const MOST: u32 = 128;
    #[repr(C)]
    struct Query {
        cgroup: u32,
        attach_type: u32,
        flags: [u32; 2],
        programs: u64,
        count: u32,
        padding: u32,
    }
    let cgroup = File::open(cgroup)?;
    let mut all = Vec::new();
    for attach_type in TYPES.into_iter().flatten() {
        let mut programs = vec![0_u32; MOST as usize];
        let query = Query {
            cgroup: fd_of(&cgroup),
            attach_type,
            flags: [0; 2],
            programs: programs.as_mut_ptr() as u64,
            count: MOST,
            padding: 0,
        };
        // Older kernels refuse types that they do not have; of no program the number is 0.
        if bpf(16, &query).is_ok() {
            programs.retain(|program| *program != 0);
            all.push((attach_type, programs));
        }
    }
    Ok(all)
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u32; 2],
        log_buffer: u64,
        kernel: u32,
        flags: u32,
        name: [u8; 16],
        device: u32,
        attach_type: u32,
    }
    const SOCK_ADDR: u32 = 18;
    let load = Load {
        kind: SOCK_ADDR,
        count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log: [0; 2],
        log_buffer: 0,
        kernel: 0,
        flags: 0,
        name: [0; 16],
        device: 0,
        attach_type: CONNECT4,
    };
    let fd = bpf(5, &load)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How often a program ran and how long in all, while `kernel.bpf_stats_enabled` is 1 (Linux 5.1).
#[derive(Clone, Copy, Debug)]
pub struct Runs {
    /// Nanoseconds.
    pub time: u64,
    /// Times.
    pub count: u64,
}

impl ForeignProgram {
    /// Its runs so far.
    pub fn runs(&self) -> io::Result<Runs> {
        runs(&self.program)
    }
}

/// The runs of the program behind a pinned link.
pub fn runs_of_link(pin: &Path) -> io::Result<Runs> {
    let link = open_link(pin)?;
    let info = [0_u32; 8];
    let attr = (fd_of(&link), 32_u32, info.as_ptr() as u64);
    bpf(15, &attr)?;
    // SAFETY: the kernel wrote to `info` behind the compiler's back.
    let program = unsafe { info.as_ptr().add(2).read_volatile() };
    // SAFETY: as above.
    runs(&unsafe { OwnedFd::from_raw_fd(bpf(13, &[program, 0, 0])?) })
}

fn open_link(pin: &Path) -> io::Result<OwnedFd> {
    let path = std::ffi::CString::new(pin.as_os_str().as_encoded_bytes())?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(bpf(7, &[path.as_ptr() as u64, 0])?) })
}

fn runs(program: &OwnedFd) -> io::Result<Runs> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd()))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|value| value.trim_start_matches(':').trim().parse().ok())
            .unwrap_or(0)
    };
    Ok(Runs {
        time: field("run_time_ns"),
        count: field("run_cnt"),
    })
}

impl Drop for ForeignProgram {
    fn drop(&mut self) {
        let _ = bpf(9, &[fd_of(&self.cgroup), fd_of(&self.program), CONNECT4, 0]);
    }
}

fn fd_of(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn bpf<T>(command: i32, attr: &T) -> io::Result<i32> {
    // SAFETY: the kernel reads the structure of this command and what it points to, all alive.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        i32::try_from(result).map_err(io::Error::other)
    }
}
