//! What this kernel has, by trying: maps and programs that vanish with their descriptors.

use std::{io, os::fd::OwnedFd};

use aya_obj::generated::{
    bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    bpf_insn,
    bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_RINGBUF},
};

use super::{Batch, Make, Map, NewMap, NewProgram, make};

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
    let instruction = |code, imm| bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(0, 0),
        off: 0,
        imm,
    };
    make(Make::Load(&NewProgram {
        name: "",
        attach_type: CONNECT4,
        instructions: &[instruction(0xb7, 1), instruction(0x95, 0)],
        license: c"GPL",
        log: &[],
    }))
}
