//! A pinned map, read and changed as whoever is root can.

use std::{
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use super::{bpf, fd_of};

/// A key or a value.
pub type Bytes = Vec<u8>;

/// Opened, of any type whose values are not one for each processor.
#[derive(Debug)]
pub struct PinnedMap {
    map: OwnedFd,
    key: usize,
    value: usize,
}

/// What `BPF_MAP_*_ELEM` take: map, key, and a value or the next key.
#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    other: u64,
    flags: u64,
}

impl PinnedMap {
    /// Opens it, and asks how large its keys and values are.
    #[allow(unsafe_code, reason = "a descriptor made by bpf(2)")]
    pub fn open(pin: &Path) -> io::Result<Self> {
        let path = std::ffi::CString::new(pin.as_os_str().as_encoded_bytes())?;
        // SAFETY: the kernel has just made it for us.
        let map = unsafe { OwnedFd::from_raw_fd(bpf(7, &[path.as_ptr() as u64, 0])?) };
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd()))?;
        let size = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|size| size.trim().parse().ok())
                .ok_or_else(|| io::Error::other(format!("{} has no {name}", pin.display())))
        };
        let (key, value) = (size("key_size:")?, size("value_size:")?);
        Ok(Self { map, key, value })
    }

    /// All entries.
    pub fn entries(&self) -> io::Result<Vec<(Bytes, Bytes)>> {
        let mut entries = Vec::new();
        let mut key = self.next(None)?;
        while let Some(this) = key {
            key = self.next(Some(&this))?;
            let mut value = vec![0; self.value];
            self.call(1, this.as_ptr() as u64, value.as_mut_ptr() as u64)?;
            entries.push((this, value));
        }
        Ok(entries)
    }

    /// Changes or adds an entry.
    pub fn write(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        if key.len() != self.key || value.len() != self.value {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        self.call(2, key.as_ptr() as u64, value.as_ptr() as u64)
    }

    /// Takes an entry away.
    pub fn delete(&self, key: &[u8]) -> io::Result<()> {
        if key.len() != self.key {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        self.call(3, key.as_ptr() as u64, 0)
    }

    fn next(&self, key: Option<&Bytes>) -> io::Result<Option<Bytes>> {
        let mut next = vec![0; self.key];
        let key = key.map_or(0, |key| key.as_ptr() as u64);
        match self.call(4, key, next.as_mut_ptr() as u64) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            result => result.map(|()| Some(next)),
        }
    }

    fn call(&self, command: i32, key: u64, other: u64) -> io::Result<()> {
        let element = Element {
            map: fd_of(&self.map),
            padding: 0,
            key,
            other,
            flags: 0,
        };
        bpf(command, &element).map(drop)
    }
}
