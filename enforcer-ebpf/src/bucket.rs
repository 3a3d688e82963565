//! Buckets: what an array tells of exact endpoints, so that few attempts need the hash that holds them.

#[cfg(not(target_arch = "bpf"))]
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{Address, EndpointKey, Owners};

/// Buckets of one slot: enough that a hundred thousand endpoints leave five in six misses to them.
pub const BUCKETS: u32 = 8192;

/// Where the exact endpoints of a protocol, a port and an address lie among the buckets, and their bit there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot {
    /// The bucket, below [`BUCKETS`].
    pub bucket: u32,
    /// The bit of [`Bucket::filter`].
    pub bit: u64,
}

impl Spot {
    /// Two multiplications: what varies among a host's endpoints, the last bytes of an address, is to reach the upper
    /// bits. Whoever chooses addresses can make them meet in one bucket, which costs time and changes no verdict.
    #[inline(always)]
    #[must_use]
    pub const fn of(protocol: u8, port: u16, address: Address) -> Self {
        const FIRST: u64 = 0x9e37_79b9_7f4a_7c15;
        const SECOND: u64 = 0xd6e8_feb8_6659_fd93;
        let [a, b, c, d] = address;
        let head = (a as u64) << 32 | b as u64;
        let mixed = (head ^ ((port as u64) << 8 | protocol as u64)).wrapping_mul(FIRST);
        let tail = (c as u64) << 32 | u32::from_be(d) as u64;
        let mixed = (mixed ^ mixed >> 32 ^ tail).wrapping_mul(SECOND);
        Self {
            bucket: (mixed >> 51) as u32 & (BUCKETS - 1),
            bit: 1 << (mixed >> 40 & 63),
        }
    }
}

/// What a slot's exact endpoints of one bucket come to, so that most attempts need no look at the hash, which stays
/// the whole truth. Those for unspecified destinations are in no bucket.
#[repr(C)]
#[cfg_attr(not(target_arch = "bpf"), derive(FromBytes, IntoBytes, Immutable))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// The bits of all of them: an address without its bit here is no exact endpoint.
    pub filter: u64,
    /// Owners of the first of them.
    pub owners: Owners,
    /// The first of them.
    pub key: EndpointKey,
    /// Always 0.
    pub zero: u32,
}

impl EndpointKey {
    /// Equality, word by word: the derived one is a call of `memcmp` to some compilers, which the kernel has not.
    #[inline(always)]
    #[must_use]
    pub const fn is(&self, other: &Self) -> bool {
        let [first, second, third, last] = self.address;
        let [its_first, its_second, its_third, its_last] = other.address;
        last == its_last
            && third == its_third
            && second == its_second
            && first == its_first
            && self.port == other.port
            && self.protocol == other.protocol
            && self.scope == other.scope
    }
}

const _: () = assert!(size_of::<Bucket>() == 40 && BUCKETS.is_power_of_two() && BUCKETS <= 1 << 13);
