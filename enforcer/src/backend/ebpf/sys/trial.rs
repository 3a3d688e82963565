//! What this kernel has, by trying: maps and programs that vanish with their descriptors.

use std::{io, os::fd::OwnedFd};

use aya_obj::generated::{
    bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_RINGBUF},
};

use super::{Batch, Make, Map, make};

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
        MapKind::Array => Make::Map(BPF_MAP_TYPE_ARRAY, [4, 4, 1], None),
        // A page of any size that a kernel has.
        MapKind::RingBuffer => Make::Map(BPF_MAP_TYPE_RINGBUF, [0, 0, 1 << 16], None),
    };
    make(map).map(drop)
}

/// Writes to a hash in a batch.
pub(crate) fn try_batch() -> io::Result<()> {
    let map = make(Make::Map(BPF_MAP_TYPE_HASH, [4, 4, 1], None))?;
    Map::new(map)?.batch(Batch::Put(&[0; 4], &[0; 4])).map(drop)
}

/// The hook that [`load_passing`] is for.
pub(crate) const CONNECT4: u32 = BPF_CGROUP_INET4_CONNECT as u32;

/// Loads a program that lets everything pass.
pub(crate) fn load_passing() -> io::Result<OwnedFd> {
    make(Make::Passing)
}
