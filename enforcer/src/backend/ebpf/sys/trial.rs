//! What this kernel has, by trying: maps and programs that vanish with their descriptors.

use std::{io, os::fd::OwnedFd};

use aya_obj::generated::{
    bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    bpf_insn,
    bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_RINGBUF},
};

use enforcer_ebpf::CAST;

use super::{Batch, Make, Map, NewMap, NewProgram, make};
use crate::backend::ebpf::btf::Casts;

/// A kind of map to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapKind {
    /// Every kernel with bpf(2) has it.
    Array,
    /// Linux 5.8.
    RingBuffer,
}

/// Makes a map.
pub(crate) fn try_map(kind: MapKind) -> io::Result<()> {
    let map = match kind {
        MapKind::Array => NewMap::of(BPF_MAP_TYPE_ARRAY as u32, [4, 4, 1]),
        // A page of any size that a kernel has.
        MapKind::RingBuffer => NewMap::of(BPF_MAP_TYPE_RINGBUF as u32, [0, 0, 1 << 16]),
    };
    make(Make::Map(&map)).map(drop)
}

/// Writes to a hash in a batch.
pub(crate) fn try_batch() -> io::Result<()> {
    let map = make(Make::Map(&NewMap::of(BPF_MAP_TYPE_HASH as u32, [4, 4, 1])))?;
    Map::new(map)?.batch(Batch::Put(&[0; 4], &[0; 4])).map(drop)
}

/// The hook that [`load_passing`] is for.
pub(crate) const CONNECT4: u32 = BPF_CGROUP_INET4_CONNECT as u32;

/// Loads a program for it that lets everything pass: `r0 = 1; exit`.
pub(crate) fn load_passing() -> io::Result<OwnedFd> {
    load(&[instruction(0xb7, (0, 0), 0, 1), instruction(0x95, (0, 0), 0, 0)])
}

/// Has the verifier take a cast, and a load through it, as the programs do: it does not on kernels that interpret them.
pub(crate) fn try_cast(casts: &Casts) -> io::Result<()> {
    /// Offset of `sk` in `struct bpf_sock_addr`.
    const SOCKET: i16 = 64;
    let mut instructions = [
        instruction(0x79, (1, 1), SOCKET, 0),
        instruction(0xb7, (2, 0), 0, casts.sock.cast_signed()),
        instruction(CALL, (0, 0), 0, CAST.cast_signed()),
        instruction(0x61, (0, 0), 0, 0),
        instruction(0xb7, (0, 0), 0, 1),
        instruction(0x95, (0, 0), 0, 0),
    ];
    insert_casts(&mut instructions, casts.function);
    load(&instructions).map(drop)
}

/// Makes each call of the helper [`CAST`] one of a function of the kernel's own, by its number in the kernel's BTF.
pub(crate) fn insert_casts(instructions: &mut [bpf_insn], function: u32) {
    let wanted = |one: &&mut bpf_insn| one.code == CALL && one.src_reg() == 0 && one.imm == CAST.cast_signed();
    for call in instructions.iter_mut().filter(wanted) {
        call.set_src_reg(KERNEL_FUNCTION);
        call.imm = function.cast_signed();
    }
}

/// `BPF_JMP | BPF_CALL`, and what makes it a call of a function of the kernel's own (`BPF_PSEUDO_KFUNC_CALL`).
const CALL: u8 = 0x85;
const KERNEL_FUNCTION: u8 = 2;

/// An instruction of the registers to write and to read (Documentation/bpf/standardization/instruction-set.rst).
fn instruction(code: u8, (to, from): (u8, u8), off: i16, imm: i32) -> bpf_insn {
    bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(to, from),
        off,
        imm,
    }
}

fn load(instructions: &[bpf_insn]) -> io::Result<OwnedFd> {
    make(Make::Load(&NewProgram {
        name: "",
        attach_type: CONNECT4,
        instructions,
        license: c"GPL",
        log: &[],
    }))
}
