//! Programs loaded, programs by their ids, and those that others have attached.

use std::{
    cell::Cell,
    ffi::CStr,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use aya_obj::generated::{bpf_cmd::BPF_PROG_QUERY, bpf_insn, bpf_prog_info};

use super::{Make, NewProgram, ask, bpf, make, raw};

/// Most programs of one hook of a cgroup (`BPF_CGROUP_MAX_PROGS`).
const MAX_ATTACHED: u32 = 64;

/// Most maps of a program that are asked for: ours have fewer than twenty.
const MAX_MAPS: u32 = 64;

/// How often a program is given to the verifier, which gives up where a signal comes meanwhile.
const ATTEMPTS: usize = 5;

/// Room for what the verifier says of all paths through a program.
const LOG: usize = 8 << 20;

/// A program on a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attached {
    /// Its id.
    pub(crate) id: u32,
    /// `BPF_F_PREORDER` (Linux 6.15): it runs before those below.
    pub(crate) preorder: bool,
    /// Its name, which is its owner's choice.
    pub(crate) name: String,
}

/// The programs attached to a cgroup itself at a hook, in the order in which they run (`BPF_PROG_QUERY`, Linux 4.15).
pub(crate) fn attached(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<Attached>> {
    const PREORDER: u32 = 1 << 6;
    let (mut ids, mut flags) = ([0_u32; MAX_ATTACHED as usize], [0_u32; MAX_ATTACHED as usize]);
    let mut query = |with_flags: bool| {
        // SAFETY: the kernel writes at most as many ids and flags as it is told that there is room for.
        let (result, count) = unsafe {
            let (result, attr) = bpf(|attr| {
                attr.query.__bindgen_anon_1.target_fd = raw(cgroup);
                attr.query.attach_type = attach_type;
                attr.query.prog_ids = ids.as_mut_ptr() as u64;
                attr.query.__bindgen_anon_2.prog_cnt = MAX_ATTACHED;
                attr.query.prog_attach_flags = if with_flags { flags.as_mut_ptr() as u64 } else { 0 };
                BPF_PROG_QUERY
            });
            (result, attr.query.__bindgen_anon_2.prog_cnt)
        };
        result.map(|_| count as usize)
    };
    // Kernels before 6.0 do not know of the flags.
    let count = query(true).or_else(|_| query(false))?;
    let found = ids.into_iter().zip(flags).take(count);
    found
        .map(|(id, flags)| {
            let (info, _) = program(id)?;
            let name: Vec<u8> = info
                .name
                .map(i8::cast_unsigned)
                .into_iter()
                .take_while(|byte| *byte != 0)
                .collect();
            Ok(Attached {
                id,
                preorder: flags & PREORDER != 0,
                name: String::from_utf8_lossy(&name).into_owned(),
            })
        })
        .collect()
}

/// Has the kernel verify a program for a hook, and keeps it. The error ends with what the verifier minds.
pub(crate) fn load_program(
    name: &str,
    attach_type: u32,
    instructions: &[bpf_insn],
    license: &CStr,
) -> io::Result<OwnedFd> {
    let program = NewProgram {
        name,
        attach_type,
        instructions,
        license,
        log: &[],
    };
    for _ in 0..ATTEMPTS {
        match make(Make::Load(&program)) {
            Ok(loaded) => return Ok(loaded),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(error) => return Err(explained(error, &program)),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

/// With what the verifier minds, where it was that: its last words, before those on its work.
fn explained(error: io::Error, program: &NewProgram<'_>) -> io::Error {
    let mut log = vec![0; LOG];
    let again = make(Make::Load(&NewProgram {
        log: Cell::from_mut(log.as_mut_slice()).as_slice_of_cells(),
        ..*program
    }));
    let end = log.iter().position(|byte| *byte == 0).unwrap_or(LOG);
    let text = String::from_utf8_lossy(log.get(..end).unwrap_or_default());
    let words = text
        .lines()
        .rfind(|line| !line.is_empty() && !line.starts_with("processed "));
    match words.filter(|_| again.is_err()) {
        Some(words) => io::Error::new(error.kind(), format!("{error}: {words}")),
        None => error,
    }
}

/// A program's id.
pub(crate) fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: zeros are such a structure, and name no memory. The kernel writes it up to its length.
    unsafe {
        let mut info: bpf_prog_info = std::mem::zeroed();
        bpf(ask(program, &raw mut info)).0?;
        Ok(info.id)
    }
}

/// Ids of the maps that a program uses.
pub(crate) fn program_maps(id: u32) -> io::Result<Vec<u32>> {
    program(id).map(|(_, maps)| maps)
}

/// What a program is, and the ids of its maps.
fn program(id: u32) -> io::Result<(bpf_prog_info, Vec<u32>)> {
    let program = make(Make::Program(id))?;
    let mut maps = vec![0_u32; MAX_MAPS as usize];
    // SAFETY: zeros are such a structure. The kernel writes it up to its length, and to the memory that it names at
    // most what it says there is room for.
    let info = unsafe {
        let mut info: bpf_prog_info = std::mem::zeroed();
        info.nr_map_ids = MAX_MAPS;
        info.map_ids = maps.as_mut_ptr() as u64;
        bpf(ask(program.as_fd(), &raw mut info)).0?;
        info
    };
    maps.truncate(info.nr_map_ids as usize);
    Ok((info, maps))
}
