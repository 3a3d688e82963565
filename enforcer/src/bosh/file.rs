//! A settings file, and who may have written it.

use std::{
    fs::{File, OpenOptions},
    io::Read as _,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

use super::{BoshFault, MAX_BYTES};

/// Who can say by a file what is protected.
pub(super) enum Trust {
    /// Root alone.
    Root,
    /// Members of a group too; how that is.
    Group(BoshFault),
}

/// The content of a file. Neither follows a link nor waits for a FIFO's other end. One that anybody can write, or that
/// is another user's, is not read: in a directory like `/tmp` anybody makes one.
pub(super) fn read(owner: u32, path: &Path) -> Result<(Trust, Vec<u8>), BoshFault> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => BoshFault::Missing,
        Some(libc::ELOOP) => BoshFault::Link,
        Some(_) | None => BoshFault::Read(error),
    })?;
    let trust = trust(owner, &file)?;
    let mut bytes = Vec::new();
    let limit = MAX_BYTES as u64 + 1;
    file.take(limit).read_to_end(&mut bytes).map_err(BoshFault::Read)?;
    if bytes.len() > MAX_BYTES {
        return Err(BoshFault::TooLong);
    }
    Ok((trust, bytes))
}

fn trust(owner: u32, file: &File) -> Result<Trust, BoshFault> {
    let meta = file.metadata().map_err(BoshFault::Read)?;
    if !meta.is_file() {
        return Err(BoshFault::NotAFile);
    }
    let (uid, gid, mode) = (meta.uid(), meta.gid(), meta.mode() & 0o7777);
    if uid != owner || mode & 0o002 != 0 {
        return Err(BoshFault::Untrusted { uid, mode });
    }
    if mode & 0o020 != 0 && gid != 0 {
        return Ok(Trust::Group(BoshFault::GroupWritable { gid, mode }));
    }
    Ok(Trust::Root)
}
