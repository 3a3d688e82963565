//! The ring buffers: records of one kind, in the order in which the programs wrote them.

use std::{
    marker::PhantomData,
    os::fd::{AsRawFd, RawFd},
    path::PathBuf,
};

use aya::maps::{MapData, RingBuf};
use zerocopy::FromBytes;

use super::{BackendError, sys};

/// The consumer of a ring buffer of records of one kind.
pub(crate) struct Ring<R> {
    ring: RingBuf<MapData>,
    records: PhantomData<R>,
}

impl<R> Ring<R> {
    /// Opens a pinned one.
    pub(super) fn open(path: PathBuf) -> Result<Self, BackendError> {
        let opened = MapData::from_pin(&path).and_then(|map| RingBuf::try_from(aya::maps::Map::RingBuf(map)));
        match opened {
            Ok(ring) => Ok(Self {
                ring,
                records: PhantomData,
            }),
            Err(error) => Err(BackendError::Io {
                action: "open",
                object: path,
                error: sys::cause(error),
            }),
        }
    }
}

impl<R: FromBytes> Ring<R> {
    /// The next record, if one is there.
    pub(crate) fn take(&mut self) -> Option<R> {
        self.ring.next().and_then(|bytes| R::read_from_bytes(&bytes).ok())
    }
}

impl<R> AsRawFd for Ring<R> {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}
