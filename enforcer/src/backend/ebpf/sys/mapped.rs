//! What the kernel shows as memory, instead of copying it piece by piece.

use std::{
    ffi::c_void,
    fs::File,
    io::{self, Read as _},
    num::NonZeroUsize,
    ops::Range,
    os::fd::AsFd,
    path::Path,
    ptr::NonNull,
    slice,
};

use nix::sys::{
    mman::{MapFlags, ProtFlags, mmap, munmap},
    statfs::{SYSFS_MAGIC, fstatfs},
};

/// Memory of the kernel's, until it is dropped.
pub(super) struct Mapped {
    start: NonNull<c_void>,
    length: NonZeroUsize,
}

impl Mapped {
    /// The bytes of an object from the beginning of a page on, with `MAP_SHARED` or `MAP_PRIVATE`: all of them or none.
    pub(super) fn of(object: impl AsFd, range: Range<usize>, access: ProtFlags, flags: MapFlags) -> io::Result<Self> {
        let length = NonZeroUsize::new(range.len()).ok_or(io::ErrorKind::InvalidInput)?;
        let first = range.start.try_into().map_err(io::Error::other)?;
        // SAFETY: at a place that the kernel chooses, so nothing else lies there.
        let start = unsafe { mmap(None, length, access, flags, object, first)? };
        Ok(Self { start, length })
    }

    /// Where it begins.
    pub(super) fn start(&self) -> NonNull<c_void> {
        self.start
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, and nothing that is borrowed from it is left.
        let _gone = unsafe { munmap(self.start, self.length.get()) };
    }
}

/// Shows `look` all bytes of a file that never changes, as the kernel's BTF does not: mapped where the kernel lets it
/// be (Linux 6.16), which spares a copy in a thousand pieces.
pub(crate) fn with_constant_file<R>(path: &Path, look: impl FnOnce(&[u8]) -> R) -> io::Result<R> {
    let mut file = File::open(path)?;
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    // Of another file system, mounted over it, nobody knows who writes.
    let is_kernels = fstatfs(&file).is_ok_and(|system| system.filesystem_type() == SYSFS_MAGIC);
    if is_kernels && let Ok(mapped) = Mapped::of(&file, 0..length, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE) {
        // SAFETY: as long as the file, which the kernel made when it booted and nobody can write.
        return Ok(look(unsafe {
            slice::from_raw_parts(mapped.start().cast().as_ptr(), length)
        }));
    }
    let mut bytes = Vec::with_capacity(length);
    file.read_to_end(&mut bytes)?;
    Ok(look(&bytes))
}
