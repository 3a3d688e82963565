//! A map as bytes: whatever is asked of it, keys and values have its sizes, or nothing is done.

use std::{
    io,
    ops::Range,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    ptr::NonNull,
};

use aya::maps::{MapData, MapType};
use aya_obj::generated::{
    bpf_attr,
    bpf_cmd::{
        BPF_MAP_DELETE_BATCH, BPF_MAP_DELETE_ELEM, BPF_MAP_GET_NEXT_KEY, BPF_MAP_LOOKUP_BATCH, BPF_MAP_LOOKUP_ELEM,
        BPF_MAP_UPDATE_BATCH, BPF_MAP_UPDATE_ELEM,
    },
};
use nix::sys::mman::{MapFlags, ProtFlags};

use super::{bpf, cause, found, mapped::Mapped, open_pin, pin, raw};

/// What a map is: its type, bytes of a key, bytes of a value, and most entries.
pub(crate) type Shape = (MapType, u32, u32, u32);

/// A map, and how much memory the kernel takes a key and a value of it to be.
#[derive(Debug)]
pub(crate) struct Map {
    data: MapData,
    shape: Shape,
    id: u32,
    key: usize,
    /// One a CPU for maps of that kind, each of them filled up to eight bytes (`bpf_map_value_size` in
    /// kernel/bpf/syscall.c).
    value: usize,
}

/// Bytes to which the kernel fills up the values of an array.
const WORD: usize = 8;

/// Bytes of a page on the kernels that have the largest: mappings begin at a multiple of it.
const LARGEST_PAGE: usize = 1 << 16;

/// What is done with one element.
pub(crate) enum ElementOp<'a> {
    Get(&'a [u8], &'a mut [u8]),
    Put(&'a [u8], &'a [u8]),
    Delete(&'a [u8]),
    /// The key after one, or the first.
    Next(Option<&'a [u8]>, &'a mut [u8]),
}

/// Where a reading of all goes on: 4 bytes for a hash and a key for other maps.
type Cursor = [u8; 32];

/// What is done with many elements at once (Linux 5.6), keys and values one after another.
pub(crate) enum Batch<'a> {
    /// The slices must have room for a whole bucket, or the kernel answers `ENOSPC`.
    Get(&'a mut Option<Cursor>, &'a mut [u8], &'a mut [u8]),
    Put(&'a [u8], &'a [u8]),
    Delete(&'a [u8]),
}

/// Values as memory, byte by byte. Others read and write it meanwhile.
pub(crate) struct Bytes {
    mapped: Mapped,
    range: Range<usize>,
}

impl Bytes {
    /// Reads from a place on: nothing where there is less.
    pub(crate) fn read(&self, from: usize, into: &mut [u8]) {
        let Some(mut place) = self.place(from, into.len()) else {
            return;
        };
        let words = if from.is_multiple_of(WORD) {
            into.len() / WORD
        } else {
            0
        };
        let (whole, rest) = into.split_at_mut(words * WORD);
        for word in whole.chunks_exact_mut(WORD) {
            // SAFETY: within what is mapped, which begins with a page; volatile, as others write it.
            let read = unsafe { place.cast::<u64>().read_volatile() };
            word.copy_from_slice(&read.to_ne_bytes());
            // SAFETY: as above.
            place = unsafe { place.add(WORD) };
        }
        for byte in rest {
            // SAFETY: within what is mapped; volatile, as others write it.
            unsafe {
                *byte = place.read_volatile();
                place = place.add(1);
            }
        }
    }

    /// Writes from a place on: nothing where there is less.
    pub(crate) fn write(&self, from: usize, bytes: &[u8]) {
        let Some(mut place) = self.place(from, bytes.len()) else {
            return;
        };
        for byte in bytes {
            // SAFETY: within what is mapped to be written.
            unsafe {
                place.write_volatile(*byte);
                place = place.add(1);
            }
        }
    }

    fn place(&self, from: usize, length: usize) -> Option<NonNull<u8>> {
        let at = from.checked_sub(self.range.start)?;
        let within = from.checked_add(length)? <= self.range.end;
        // SAFETY: as above.
        within.then(|| unsafe { self.mapped.start().cast().add(at) })
    }
}

impl Map {
    /// Its descriptor.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.data.fd().as_fd()
    }

    /// Pins it.
    pub(crate) fn pin(&self, path: &Path) -> io::Result<()> {
        pin(self.as_fd(), path)
    }

    /// Opens a pin.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::new(open_pin(path)?)
    }

    /// Asks what the map is. `InvalidData` where it is of a type that we make none of: there are some whose values hold
    /// pointers.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let data = MapData::from_fd(fd).map_err(cause)?;
        let info = data.info().map_err(cause)?;
        let (key_size, value_size) = (info.key_size(), info.value_size());
        let (key, value) = (key_size as usize, value_size as usize);
        let (map_type, value) = match info.map_type() {
            Ok(of @ MapType::PerCpuArray) => (of, value.next_multiple_of(WORD) * cpus()?),
            Ok(of @ (MapType::Array | MapType::ArrayOfMaps | MapType::Hash | MapType::LpmTrie | MapType::RingBuf)) => {
                (of, value)
            }
            Ok(_) | Err(_) => return Err(io::ErrorKind::InvalidData.into()),
        };
        Ok(Self {
            data,
            shape: (map_type, key_size, value_size, info.max_entries()),
            id: info.id(),
            key,
            value,
        })
    }

    /// What it is.
    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// Its id.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Bytes of a value, of all CPUs together.
    pub(crate) fn value_bytes(&self) -> usize {
        self.value
    }

    /// A range of the values of an array that lets itself be mapped (Linux 5.5), each filled up to whole words.
    pub(crate) fn bytes(&self, range: Range<usize>) -> io::Result<Bytes> {
        let (MapType::Array, _, _, entries) = self.shape else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if range.end > self.value.next_multiple_of(WORD) * entries as usize {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let first = range.start - range.start % LARGEST_PAGE;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        Ok(Bytes {
            mapped: Mapped::of(self.as_fd(), first..range.end, access, MapFlags::MAP_SHARED)?,
            range: first..range.end,
        })
    }

    /// Reads, writes, removes or looks for one element. `ENOENT` where there is none.
    pub(crate) fn element(&self, what: ElementOp<'_>) -> io::Result<()> {
        let (command, key, other, size) = match what {
            ElementOp::Get(key, value) => (BPF_MAP_LOOKUP_ELEM, read(key), write(value), self.value),
            ElementOp::Put(key, value) => (BPF_MAP_UPDATE_ELEM, read(key), read(value), self.value),
            ElementOp::Delete(key) => (BPF_MAP_DELETE_ELEM, read(key), (0, 0), 0),
            ElementOp::Next(key, next) => {
                let key = key.map_or((0, self.key), read);
                (BPF_MAP_GET_NEXT_KEY, key, write(next), self.key)
            }
        };
        if (key.1, other.1) != (self.key, size) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let set = |attr: &mut bpf_attr| {
            attr.__bindgen_anon_2.map_fd = raw(self.data.fd().as_fd());
            attr.__bindgen_anon_2.key = key.0;
            attr.__bindgen_anon_2.__bindgen_anon_1.value = other.0;
            command
        };
        // SAFETY: the kernel reads and writes a key and a value of this map's sizes, which is what the slices have.
        unsafe { bpf(set).0.map(drop) }
    }

    /// Reads, writes or removes many: how many, and whether more are there to be read. What is written or removed in
    /// part only has failed (F3).
    pub(crate) fn batch(&self, what: Batch<'_>) -> io::Result<(usize, bool)> {
        let (command, keys, values, cursor) = match what {
            Batch::Get(cursor, keys, values) => (BPF_MAP_LOOKUP_BATCH, write(keys), Some(write(values)), Some(cursor)),
            Batch::Put(keys, values) => (BPF_MAP_UPDATE_BATCH, read(keys), Some(read(values)), None),
            Batch::Delete(keys) => (BPF_MAP_DELETE_BATCH, read(keys), None, None),
        };
        let asked = keys.1.checked_div(self.key).unwrap_or(0);
        if asked * self.key != keys.1
            || values.is_some_and(|values| values.1 != asked * self.value)
            || self.key > size_of::<Cursor>()
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if asked == 0 {
            return Ok((0, false));
        }
        let count = u32::try_from(asked).map_err(io::Error::other)?;
        let mut next: Cursor = [0; 32];
        let set = |attr: &mut bpf_attr| {
            attr.batch.map_fd = raw(self.data.fd().as_fd());
            attr.batch.count = count;
            attr.batch.keys = keys.0;
            attr.batch.values = values.map_or(0, |values| values.0);
            if let Some(cursor) = &cursor {
                attr.batch.in_batch = cursor.as_ref().map_or(0, |cursor| cursor.as_ptr() as u64);
                attr.batch.out_batch = next.as_mut_ptr() as u64;
            }
            command
        };
        // SAFETY: the kernel reads and writes at most `count` keys and values of this map's sizes, for which the slices
        // have room, and a cursor of at most 32 bytes.
        let (result, done) = unsafe {
            let (result, attr) = bpf(set);
            (result.map(drop), attr.batch.count)
        };
        if let Some(cursor) = cursor {
            let more = found(result)?;
            *cursor = Some(next);
            return Ok((done as usize, more));
        }
        result?;
        if done != count {
            return Err(io::Error::other(format!("the kernel took {done} of {count} entries")));
        }
        Ok((asked, false))
    }
}

/// How many values a map of one a CPU has.
fn cpus() -> io::Result<usize> {
    aya::util::nr_cpus().map_err(|(file, error)| io::Error::new(error.kind(), format!("read {file}: {error}")))
}

/// Where bytes are, and how many.
fn read(bytes: &[u8]) -> (u64, usize) {
    (bytes.as_ptr() as u64, bytes.len())
}

/// As [`read`], for the kernel to write.
fn write(bytes: &mut [u8]) -> (u64, usize) {
    (bytes.as_mut_ptr() as u64, bytes.len())
}
