//! What aya does not offer: batches, links by descriptor, pins, grace periods, a network namespace's cookie, memory given back. All unsafe
//! code of the eBPF backend.

#![allow(
    unsafe_code,
    reason = "bpf(2) has no safe form; every structure here is the kernel's own, from linux/bpf.h"
)]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use enforcer_ebpf::{
    AllCounters, DialRecord, EndpointKey, EventRecord, Generation, Nat64, PrefixKey, PrincipalKey, TargetName,
};

/// A type whose bytes the kernel may read and write.
///
/// # Safety
///
/// No padding, and every bit pattern is a value.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: integers and structures of integers; `enforcer_ebpf` asserts their sizes.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for EndpointKey {}
// SAFETY: as above.
unsafe impl Plain for PrefixKey {}
// SAFETY: as above.
unsafe impl Plain for PrincipalKey {}
// SAFETY: as above.
unsafe impl Plain for Generation {}
// SAFETY: as above.
unsafe impl Plain for TargetName {}
// SAFETY: as above.
unsafe impl Plain for AllCounters {}
// SAFETY: as above.
unsafe impl Plain for EventRecord {}
// SAFETY: as above.
unsafe impl Plain for DialRecord {}
// SAFETY: as above.
unsafe impl Plain for Nat64 {}

/// A value of zeros.
#[must_use]
pub(crate) fn zeroed<T: Plain>() -> T {
    // SAFETY: every bit pattern is a value of a plain type.
    unsafe { std::mem::zeroed() }
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    /// Id of its program.
    pub program: u32,
    /// Id of its cgroup; 0 where it was detached or the cgroup is gone.
    pub cgroup: u64,
    /// `BPF_CGROUP_…` number.
    pub attach_type: u32,
}

/// Most programs of one hook of a cgroup (`BPF_CGROUP_MAX_PROGS`).
const MAX_ATTACHED: usize = 64;

/// Most maps of a program that are asked for: ours have ten.
const MAX_MAPS: usize = 64;

/// What a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapInfo {
    /// `BPF_MAP_TYPE_…` number.
    pub map_type: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Most entries.
    pub max_entries: u32,
}

/// Opens what is pinned at a path (`BPF_OBJ_GET`, Linux 4.4).
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjAttr {
        pathname: path.as_ptr() as u64,
        ..ObjAttr::default()
    };
    Ok(owned(bpf(BPF_OBJ_GET, &mut attr)?))
}

/// Pins a map, program or link (`BPF_OBJ_PIN`, Linux 4.4); the pin's mode is 0600 less the umask.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjAttr {
        pathname: path.as_ptr() as u64,
        fd: raw(object),
        ..ObjAttr::default()
    };
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Attaches a program to a cgroup by a link (`BPF_LINK_CREATE`, Linux 5.7). The link behaves as `BPF_F_ALLOW_MULTI`.
pub(crate) fn link_create(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        program: raw(program),
        target: raw(cgroup),
        attach_type,
        flags: 0,
    };
    Ok(owned(bpf(BPF_LINK_CREATE, &mut attr)?))
}

/// Replaces a link's program at once (`BPF_LINK_UPDATE`, Linux 5.7).
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr {
        link: raw(link),
        new_program: raw(program),
        flags: 0,
        old_program: 0,
    };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Asks what a link is attached to.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let info: RawLinkInfo = object_info(link)?;
    Ok(LinkInfo {
        program: info.program,
        cgroup: info.cgroup,
        attach_type: info.attach_type,
    })
}

/// Detaches a link at once, whoever else holds it (`BPF_LINK_DETACH`, Linux 5.9).
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &mut raw(link)).map(drop)
}

/// Ids of the maps that a program uses (`BPF_PROG_GET_FD_BY_ID`, Linux 4.13, which asks for `CAP_SYS_ADMIN`).
pub(crate) fn program_maps(program: u32) -> io::Result<Vec<u32>> {
    let mut id = [program, 0, 0];
    let program = owned(bpf(BPF_PROG_GET_FD_BY_ID, &mut id)?);
    let mut maps = [0_u32; MAX_MAPS];
    let mut info = RawProgramInfo {
        map_count: u32::try_from(MAX_MAPS).map_err(io::Error::other)?,
        maps: maps.as_mut_ptr() as u64,
        ..RawProgramInfo::default()
    };
    read_info(std::os::fd::AsFd::as_fd(&program), &mut info)?;
    Ok(maps.into_iter().take(info.map_count as usize).collect())
}

/// A program on a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attached {
    /// Its id.
    pub id: u32,
    /// `BPF_F_PREORDER` (Linux 6.15): it runs before those below.
    pub preorder: bool,
    /// Its name, which is its owner's choice.
    pub name: String,
    /// Whether it writes the address or port of what it is asked about, as far as its code tells.
    pub rewrites: bool,
}

/// The programs attached to a cgroup itself at a hook, in the order in which they run (`BPF_PROG_QUERY`, Linux 4.15).
pub(crate) fn attached(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<Attached>> {
    const PREORDER: u32 = 1 << 6;
    let (mut ids, mut flags) = ([0_u32; MAX_ATTACHED], [0_u32; MAX_ATTACHED]);
    let mut query = |with_flags: bool| {
        let mut attr = QueryAttr {
            target: raw(cgroup),
            attach_type,
            ids: ids.as_mut_ptr() as u64,
            count: u32::try_from(MAX_ATTACHED).map_err(io::Error::other)?,
            program_flags: if with_flags { flags.as_mut_ptr() as u64 } else { 0 },
            ..QueryAttr::default()
        };
        bpf(BPF_PROG_QUERY, &mut attr).map(|_| attr.count as usize)
    };
    // Kernels before 6.0 do not know of the flags.
    let count = query(true).or_else(|_| query(false))?;
    let found = ids.into_iter().zip(flags).take(count);
    found
        .map(|(id, flags)| {
            let (name, code) = program_code(id)?;
            Ok(Attached {
                id,
                preorder: flags & PREORDER != 0,
                name,
                rewrites: rewrites(&code),
            })
        })
        .collect()
}

/// A program's name and its code as the kernel runs it.
fn program_code(id: u32) -> io::Result<(String, Vec<u64>)> {
    let program = owned(bpf(BPF_PROG_GET_FD_BY_ID, &mut [id, 0, 0])?);
    let fd = std::os::fd::AsFd::as_fd(&program);
    let info: RawProgramInfo = object_info(fd)?;
    let [_, bytes] = info.code_lengths;
    let mut code = vec![0_u64; bytes as usize / 8];
    let mut again = RawProgramInfo {
        code_lengths: [0, bytes],
        code: [0, code.as_mut_ptr() as u64],
        ..RawProgramInfo::default()
    };
    read_info(fd, &mut again)?;
    let name: Vec<u8> = info.name.into_iter().take_while(|byte| *byte != 0).collect();
    Ok((String::from_utf8_lossy(&name).into_owned(), code))
}

/// Whether code stores to an address or port of `struct bpf_sock_addr`. The kernel makes of it: keep a register at offset 16 of the
/// context, load the pointer at offset 8 of it (`SOCK_ADDR_STORE_NESTED_FIELD_OFF` in `net/core/filter.c`, Linux 4.17 to 6.18).
fn rewrites(code: &[u64]) -> bool {
    const KEEP: u64 = 0x7b;
    const LOAD: u64 = 0x79;
    let part = |word: u64| (word & 0xff, word >> 8 & 0xf, word >> 12 & 0xf, word >> 16 & 0xffff);
    code.windows(2).any(|pair| match pair {
        [first, second] => {
            let (keep, context, _, keep_at) = part(*first);
            let (load, _, from, load_at) = part(*second);
            keep == KEEP && keep_at == 16 && load == LOAD && load_at == 8 && from == context && context != 10
        }
        _ => false,
    })
}

/// Asks for a map's id.
pub(crate) fn map_id(map: BorrowedFd<'_>) -> io::Result<u32> {
    let info: RawMapInfo = object_info(map)?;
    Ok(info.id)
}

/// Asks what a map is.
pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let info: RawMapInfo = object_info(map)?;
    Ok(MapInfo {
        map_type: info.map_type,
        key_size: info.key_size,
        value_size: info.value_size,
        max_entries: info.max_entries,
    })
}

/// Reads an element; nothing where there is none.
pub(crate) fn lookup<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &mut [V]) -> io::Result<bool> {
    let mut attr = ElemAttr {
        map: raw(map),
        key: std::ptr::from_ref(key) as u64,
        value: value.as_mut_ptr() as u64,
        ..ElemAttr::default()
    };
    found(bpf(BPF_MAP_LOOKUP_ELEM, &mut attr))
}

/// Writes an element; `value` has one entry, or one a CPU for maps of that kind.
pub(crate) fn update<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &[V]) -> io::Result<()> {
    let mut attr = ElemAttr {
        map: raw(map),
        key: std::ptr::from_ref(key) as u64,
        value: value.as_ptr() as u64,
        ..ElemAttr::default()
    };
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Removes an element; false where there was none.
pub(crate) fn delete<K: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = ElemAttr {
        map: raw(map),
        key: std::ptr::from_ref(key) as u64,
        ..ElemAttr::default()
    };
    found(bpf(BPF_MAP_DELETE_ELEM, &mut attr))
}

/// The key after `key`, or the first.
pub(crate) fn next_key<K: Plain>(map: BorrowedFd<'_>, key: Option<&K>, next: &mut K) -> io::Result<bool> {
    let mut attr = ElemAttr {
        map: raw(map),
        key: key.map_or(0, |key| std::ptr::from_ref(key) as u64),
        value: std::ptr::from_mut(next) as u64,
        ..ElemAttr::default()
    };
    found(bpf(BPF_MAP_GET_NEXT_KEY, &mut attr))
}

/// Writes many elements of a hash or array (`BPF_MAP_UPDATE_BATCH`, Linux 5.6). Fails if not all were written (F3).
pub(crate) fn update_batch<K: Plain, V: Plain>(map: BorrowedFd<'_>, keys: &[K], values: &[V]) -> io::Result<()> {
    debug_assert_eq!(keys.len(), values.len());
    whole(
        map,
        BPF_MAP_UPDATE_BATCH,
        keys.as_ptr() as u64,
        values.as_ptr() as u64,
        keys.len(),
    )
}

/// Removes many elements of a hash (`BPF_MAP_DELETE_BATCH`, Linux 5.6). Fails if not all were there.
pub(crate) fn delete_batch<K: Plain>(map: BorrowedFd<'_>, keys: &[K]) -> io::Result<()> {
    whole(map, BPF_MAP_DELETE_BATCH, keys.as_ptr() as u64, 0, keys.len())
}

/// Reads on from `cursor` (`BPF_MAP_LOOKUP_BATCH`, Linux 5.6): how many elements were read, and whether more remain.
/// The slices must have room for a whole bucket, or the kernel answers `ENOSPC`.
pub(crate) fn lookup_batch<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    cursor: &mut Option<[u8; 32]>,
    keys: &mut [K],
    values: &mut [V],
) -> io::Result<(usize, bool)> {
    // The kernel's cursor is 4 bytes for a hash and a key for other maps: 32 bytes hold either.
    let mut next = [0_u8; 32];
    let mut attr = BatchAttr {
        in_batch: cursor.as_ref().map_or(0, |cursor| cursor.as_ptr() as u64),
        out_batch: next.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: u32::try_from(keys.len().min(values.len())).map_err(io::Error::other)?,
        map: raw(map),
        ..BatchAttr::default()
    };
    let more = found(bpf(BPF_MAP_LOOKUP_BATCH, &mut attr))?;
    *cursor = Some(next);
    Ok((attr.count as usize, more))
}

/// Returns when every program that was running at the call has ended.
///
/// An update of a map of maps waits for just that (`maybe_wait_bpf_programs` in kernel/bpf/syscall.c, since Linux 4.18);
/// `membarrier` would too, but not on kernels booted with `nohz_full`.
pub(crate) fn wait_for_programs() -> io::Result<()> {
    const ARRAY: u32 = 2;
    const ARRAY_OF_MAPS: u32 = 12;
    let create = |map_type, inner: Option<&OwnedFd>| {
        let mut attr = CreateAttr {
            map_type,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            flags: 0,
            inner: inner.map_or(0, |fd| fd.as_raw_fd().cast_unsigned()),
        };
        io::Result::Ok(owned(bpf(BPF_MAP_CREATE, &mut attr)?))
    };
    let inner = create(ARRAY, None)?;
    let outer = create(ARRAY_OF_MAPS, Some(&inner))?;
    let outer = std::os::fd::AsFd::as_fd(&outer);
    update(outer, &0_u32, &[inner.as_raw_fd().cast_unsigned()])
}

/// A kind of map to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapKind {
    /// Every kernel with bpf(2) has it.
    Array,
    /// Linux 5.8.
    RingBuffer,
}

/// Makes a map that vanishes at once.
pub(crate) fn try_map(kind: MapKind) -> io::Result<()> {
    let mut attr = match kind {
        MapKind::Array => CreateAttr {
            map_type: 2,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            ..CreateAttr::default()
        },
        MapKind::RingBuffer => CreateAttr {
            map_type: 27,
            // A page of any size that a kernel has.
            max_entries: 1 << 16,
            ..CreateAttr::default()
        },
    };
    bpf(BPF_MAP_CREATE, &mut attr).map(|fd| drop(owned(fd)))
}

/// Writes to a hash that vanishes at once, in a batch.
pub(crate) fn try_batch() -> io::Result<()> {
    let mut attr = CreateAttr {
        map_type: 1,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
        ..CreateAttr::default()
    };
    let map = owned(bpf(BPF_MAP_CREATE, &mut attr)?);
    update_batch(std::os::fd::AsFd::as_fd(&map), &[0_u32], &[0_u32])
}

/// `BPF_CGROUP_INET4_CONNECT`.
pub(crate) const CONNECT4: u32 = 10;

/// Loads a program for `connect4` that lets everything pass: `r0 = 1; exit`.
pub(crate) fn load_passing() -> io::Result<OwnedFd> {
    const SOCK_ADDR: u32 = 18;
    let code = [0x0000_0001_0000_00b7_u64, 0x0000_0000_0000_0095];
    let mut attr = LoadAttr {
        kind: SOCK_ADDR,
        count: 2,
        code: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        attach_type: CONNECT4,
        ..LoadAttr::default()
    };
    Ok(owned(bpf(BPF_PROG_LOAD, &mut attr)?))
}

/// Gives freed memory back to the system: loading leaves tens of megabytes behind that are never wanted again.
#[cfg(target_env = "gnu")]
pub(crate) fn trim_memory() {
    // SAFETY: the allocator's own function (man 3 malloc_trim).
    unsafe { libc::malloc_trim(0) };
}

/// Other allocators see to it themselves.
#[cfg(not(target_env = "gnu"))]
pub fn trim_memory() {}

/// Cookie of the network namespace that this process is in (`SO_NETNS_COOKIE`, Linux 5.14); none on older kernels.
#[must_use]
pub(crate) fn netns_cookie() -> Option<u64> {
    const SO_NETNS_COOKIE: i32 = 71;
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )
    .ok()?;
    let mut cookie = 0_u64;
    let mut length = 8 as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    (result == 0 && length == 8).then_some(cookie)
}

/// Reads a record out of bytes of the ring buffer; none where they are not one of ours.
#[must_use]
pub(crate) fn read_record<R: Plain>(bytes: &[u8]) -> Option<R> {
    // SAFETY: as long, every bit pattern is a value, and no alignment is asked for.
    (bytes.len() == size_of::<R>()).then(|| unsafe { bytes.as_ptr().cast::<R>().read_unaligned() })
}

const BPF_MAP_CREATE: i32 = 0;
const BPF_MAP_LOOKUP_ELEM: i32 = 1;
const BPF_MAP_UPDATE_ELEM: i32 = 2;
const BPF_MAP_DELETE_ELEM: i32 = 3;
const BPF_MAP_GET_NEXT_KEY: i32 = 4;
const BPF_PROG_LOAD: i32 = 5;
const BPF_OBJ_PIN: i32 = 6;
const BPF_OBJ_GET: i32 = 7;
const BPF_PROG_GET_FD_BY_ID: i32 = 13;
const BPF_OBJ_GET_INFO_BY_FD: i32 = 15;
const BPF_PROG_QUERY: i32 = 16;
const BPF_MAP_LOOKUP_BATCH: i32 = 24;
const BPF_MAP_UPDATE_BATCH: i32 = 26;
const BPF_MAP_DELETE_BATCH: i32 = 27;
const BPF_LINK_CREATE: i32 = 28;
const BPF_LINK_UPDATE: i32 = 29;
const BPF_LINK_DETACH: i32 = 34;

#[repr(C)]
#[derive(Default)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner: u32,
}

#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    _pad: u32,
    program_flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    kind: u32,
    count: u32,
    code: u64,
    license: u64,
    log: [u32; 2],
    log_buffer: u64,
    kernel: u32,
    flags: u32,
    name: [u8; 16],
    device: u32,
    attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct ElemAttr {
    map: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ObjAttr {
    pathname: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdateAttr {
    link: u32,
    new_program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

/// Head of `struct bpf_link_info` for cgroup links.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawLinkInfo {
    link_type: u32,
    id: u32,
    program: u32,
    _pad: u32,
    cgroup: u64,
    attach_type: u32,
    _pad2: u32,
}

/// Head of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawProgramInfo {
    program_type: u32,
    id: u32,
    tag: u64,
    code_lengths: [u32; 2],
    code: [u64; 2],
    loaded: u64,
    user: u32,
    map_count: u32,
    maps: u64,
    name: [u8; 16],
}

/// Head of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawMapInfo {
    map_type: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

fn object_info<T: Default>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    read_info(object, &mut info)?;
    Ok(info)
}

/// Fills a structure in which pointers may say where else to write.
fn read_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = InfoAttr {
        fd: raw(object),
        length: u32::try_from(size_of::<T>()).map_err(io::Error::other)?,
        info: std::ptr::from_mut(info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

fn whole(map: BorrowedFd<'_>, command: i32, keys: u64, values: u64, count: usize) -> io::Result<()> {
    if count == 0 {
        return Ok(());
    }
    let asked = u32::try_from(count).map_err(io::Error::other)?;
    let mut attr = BatchAttr {
        keys,
        values,
        count: asked,
        map: raw(map),
        ..BatchAttr::default()
    };
    bpf(command, &mut attr)?;
    if attr.count == asked {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "the kernel took {} of {asked} entries",
            attr.count
        )))
    }
}

/// `ENOENT` as false.
fn found(result: io::Result<i32>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn bpf<T>(command: i32, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is the kernel's structure for this command, and its pointers live until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        i32::try_from(result).map_err(io::Error::other)
    }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}
