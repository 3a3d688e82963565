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
