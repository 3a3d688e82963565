//! A program that is not ours, attached so that nobody may share its cgroup (`BPF_PROG_ATTACH` without flags).

#![allow(unsafe_code, reason = "bpf(2) has no safe form; structures are those of linux/bpf.h")]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

/// Detached when dropped.
#[derive(Debug)]
pub struct ExclusiveProgram {
    program: OwnedFd,
    cgroup: File,
}

const CONNECT4: u32 = 10;

impl ExclusiveProgram {
    /// Attaches `return 1` to a cgroup's `connect4`.
    pub fn attach(cgroup: &Path) -> io::Result<Self> {
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
        // r0 = 1; exit
        let instructions: [u64; 2] = [0x0000_0001_0000_00b7, 0x0000_0000_0000_0095];
        let load = Load {
            kind: SOCK_ADDR,
            count: 2,
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
        let program = unsafe { OwnedFd::from_raw_fd(fd) };
        let cgroup = File::open(cgroup)?;
        bpf(8, &[fd_of(&cgroup), fd_of(&program), CONNECT4, 0])?;
        Ok(Self { program, cgroup })
    }
}

/// How often a program ran and how long in all, while `kernel.bpf_stats_enabled` is 1 (Linux 5.1).
#[derive(Clone, Copy, Debug)]
pub struct Runs {
    /// Nanoseconds.
    pub time: u64,
    /// Times.
    pub count: u64,
}

impl ExclusiveProgram {
    /// Its runs so far.
    pub fn runs(&self) -> io::Result<Runs> {
        runs(&self.program)
    }
}

/// The runs of the program behind a pinned link.
pub fn runs_of_link(pin: &Path) -> io::Result<Runs> {
    let path = std::ffi::CString::new(pin.as_os_str().as_encoded_bytes())?;
    // SAFETY: the kernel has just made each descriptor for us.
    let link = unsafe { OwnedFd::from_raw_fd(bpf(7, &[path.as_ptr() as u64, 0])?) };
    let info = [0_u32; 8];
    let attr = (fd_of(&link), 32_u32, info.as_ptr() as u64);
    bpf(15, &attr)?;
    // SAFETY: the kernel wrote to `info` behind the compiler's back.
    let program = unsafe { info.as_ptr().add(2).read_volatile() };
    // SAFETY: as above.
    runs(&unsafe { OwnedFd::from_raw_fd(bpf(13, &[program, 0, 0])?) })
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

impl Drop for ExclusiveProgram {
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
