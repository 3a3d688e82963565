//! bpf(2) where aya has nothing: links by descriptor, elements of maps one by one and in batches, trials, programs of
//! others. Besides it grace periods and a network namespace's cookie. All unsafe code of the eBPF
//! backend lies here and below.
//!
//! Links are made here too: aya chooses the way to attach by what the kernel calls itself, and hides a link's
//! descriptor.

#![allow(
    unsafe_code,
    reason = "bpf(2) has no safe form; every structure here is the kernel's own, from linux/bpf.h"
)]

mod map;
mod mapped;
mod programs;
mod trial;

use std::{
    cell::Cell,
    error::Error,
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya_obj::{
    EbpfSectionKind,
    generated::{
        BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_attr,
        bpf_cmd::{
            self, BPF_LINK_CREATE, BPF_LINK_DETACH, BPF_LINK_UPDATE, BPF_MAP_CREATE, BPF_MAP_FREEZE, BPF_OBJ_GET,
            BPF_OBJ_GET_INFO_BY_FD, BPF_OBJ_PIN, BPF_PROG_GET_FD_BY_ID, BPF_PROG_LOAD,
        },
        bpf_insn, bpf_link_info,
        bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_ARRAY_OF_MAPS, BPF_MAP_TYPE_HASH},
        bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
    },
};
use nix::{
    errno::Errno,
    getsockopt_impl, sockopt_impl,
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
    sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket, sockopt::GetStruct},
};

pub(crate) use self::{
    map::{Batch, Bytes, ElementOp, Map},
    mapped::with_constant_file,
    programs::{Attached, attached, load_program, program_id, program_maps},
    trial::{CONNECT4, MapKind, insert_casts, load_passing, try_batch, try_cast, try_map},
};

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    /// Id of its program.
    pub(crate) program: u32,
    /// Id of its cgroup; 0 where it was detached or the cgroup is gone.
    pub(crate) cgroup: u64,
    /// `BPF_CGROUP_…` number.
    pub(crate) attach_type: u32,
}

/// Opens what is pinned at a path (Linux 4.4).
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    make(Make::Pinned(&c_path(path)?))
}

/// Pins a map, program or link (Linux 4.4); the pin's mode is 0600 less the umask.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    change(ObjectOp::Pin(object, &c_path(path)?))
}

/// Attaches a program to a cgroup by a link (Linux 5.7). The link behaves as `BPF_F_ALLOW_MULTI`.
pub(crate) fn link_create(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    make(Make::Link(program, cgroup, attach_type))
}

/// Replaces a link's program at once (Linux 5.7).
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    change(ObjectOp::Program(link, program))
}

/// Detaches a link at once, whoever else holds it (Linux 5.9).
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    change(ObjectOp::Detach(link))
}

/// Asks what a link is attached to.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    // SAFETY: zeros are such a structure, and name no memory. The kernel writes it up to its length, and it holds
    // numbers only.
    unsafe {
        let mut info: bpf_link_info = std::mem::zeroed();
        bpf(ask(link, &raw mut info)).0?;
        let cgroup = info.__bindgen_anon_1.cgroup;
        Ok(LinkInfo {
            program: info.prog_id,
            cgroup: cgroup.cgroup_id,
            attach_type: cgroup.attach_type,
        })
    }
}

/// Makes a hash, of keys and values of so many bytes, whose elements are made as they are needed (Linux 4.6).
pub(crate) fn create_hash(name: &str, key: u32, value: u32, entries: u32) -> io::Result<OwnedFd> {
    make(Make::Map(&NewMap {
        flags: BPF_F_NO_PREALLOC,
        name,
        ..NewMap::of(BPF_MAP_TYPE_HASH as u32, [key, value, entries])
    }))
}

/// Makes a map of the object, with the values that it has there (names since Linux 4.15, constants since 5.2). One of
/// maps holds such as `like`, with more entries or less (Linux 5.10).
pub(crate) fn create_map(name: &str, map: &aya_obj::Map, like: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let is_bss = map.section_kind() == EbpfSectionKind::Bss;
    let made = make(Make::Map(&NewMap {
        flags: map.map_flags() | if is_bss { BPF_F_MMAPABLE } else { 0 },
        name,
        holds: like,
        ..NewMap::of(map.map_type(), [map.key_size(), map.value_size(), map.max_entries()])
    }))?;
    if !matches!(map.section_kind(), EbpfSectionKind::Maps | EbpfSectionKind::Bss) {
        Map::new(made.try_clone()?)?.element(ElementOp::Put(&[0; 4], map.data()))?;
    }
    if map.section_kind() == EbpfSectionKind::Rodata {
        change(ObjectOp::Freeze(made.as_fd()))?;
    }
    Ok(made)
}

/// Returns when every program that was running at the call has ended.
///
/// An update of a map of maps waits for just that (`maybe_wait_bpf_programs` in kernel/bpf/syscall.c, since Linux
/// 4.18); `membarrier` would too, but not on kernels booted with `nohz_full`.
pub(crate) fn wait_for_programs() -> io::Result<()> {
    let inner = make(Make::Map(&NewMap::of(BPF_MAP_TYPE_ARRAY as u32, [4, 4, 1])))?;
    let outer = make(Make::Map(&NewMap {
        holds: Some(inner.as_fd()),
        ..NewMap::of(BPF_MAP_TYPE_ARRAY_OF_MAPS as u32, [4, 4, 1])
    }))?;
    let outer = Map::new(outer)?;
    outer.element(ElementOp::Put(&[0; 4], &inner.as_raw_fd().to_ne_bytes()))
}

sockopt_impl!(
    /// The cookie of a socket's network namespace (Linux 5.14).
    NetnsCookie,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_NETNS_COOKIE,
    u64,
    GetStruct<u64>
);

/// Cookie of the network namespace that this process is in; none on older kernels.
pub(crate) fn netns_cookie() -> Option<u64> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
    getsockopt(&socket.ok()?, NetnsCookie).ok()
}

/// The system's error behind one of aya's, whose own text is but the call's name.
pub(crate) fn cause(error: impl Error + Send + Sync + 'static) -> io::Error {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(at) = cause {
        if let Some(code) = at.downcast_ref().and_then(io::Error::raw_os_error) {
            return io::Error::from_raw_os_error(code);
        }
        cause = at.source();
    }
    io::Error::other(error)
}

/// A map to be made.
#[derive(Clone, Copy)]
struct NewMap<'a> {
    /// `enum bpf_map_type`.
    map_type: u32,
    /// How large its keys and values are, and how many it has room for.
    sizes: [u32; 3],
    /// `BPF_F_…`.
    flags: u32,
    name: &'a str,
    /// What a map of maps is to hold.
    holds: Option<BorrowedFd<'a>>,
}

impl NewMap<'_> {
    /// One that nobody is to find.
    fn of(map_type: u32, sizes: [u32; 3]) -> Self {
        Self {
            map_type,
            sizes,
            flags: 0,
            name: "",
            holds: None,
        }
    }
}

/// A program to be verified.
#[derive(Clone, Copy)]
struct NewProgram<'a> {
    name: &'a str,
    /// `enum bpf_attach_type`.
    attach_type: u32,
    instructions: &'a [bpf_insn],
    license: &'a CStr,
    /// Where the verifier says what it looks at, which takes it longer; empty for nowhere.
    log: &'a [Cell<u8>],
}

/// What the kernel hands out a descriptor of.
#[derive(Clone, Copy)]
enum Make<'a> {
    Map(&'a NewMap<'a>),
    /// A program for addresses of sockets.
    Load(&'a NewProgram<'a>),
    /// A link of a program to a cgroup, for a type of attachment.
    Link(BorrowedFd<'a>, BorrowedFd<'a>, u32),
    /// What a path names.
    Pinned(&'a CStr),
    /// The program of an id (Linux 4.13, which asks for `CAP_SYS_ADMIN`).
    Program(u32),
}

/// Before Linux 5.11 the memory of maps and programs counts as locked, of which few processes may have much.
fn make(what: Make<'_>) -> io::Result<OwnedFd> {
    match make_once(what) {
        Err(error)
            if error.raw_os_error() == Some(libc::EPERM)
                && setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_ok() =>
        {
            make_once(what)
        }
        made => made,
    }
}

fn make_once(what: Make<'_>) -> io::Result<OwnedFd> {
    let set = |attr: &mut bpf_attr| match what {
        Make::Map(map) => {
            let [key, value, entries] = map.sizes;
            attr.__bindgen_anon_1.map_type = map.map_type;
            attr.__bindgen_anon_1.key_size = key;
            attr.__bindgen_anon_1.value_size = value;
            attr.__bindgen_anon_1.max_entries = entries;
            attr.__bindgen_anon_1.map_flags = map.flags;
            attr.__bindgen_anon_1.map_name = object_name(map.name);
            attr.__bindgen_anon_1.inner_map_fd = map.holds.map_or(0, raw);
            BPF_MAP_CREATE
        }
        Make::Load(program) => {
            attr.__bindgen_anon_3.prog_type = BPF_PROG_TYPE_CGROUP_SOCK_ADDR as u32;
            attr.__bindgen_anon_3.insn_cnt = u32::try_from(program.instructions.len()).unwrap_or(u32::MAX);
            attr.__bindgen_anon_3.insns = program.instructions.as_ptr() as u64;
            attr.__bindgen_anon_3.license = program.license.as_ptr() as u64;
            attr.__bindgen_anon_3.prog_name = object_name(program.name);
            attr.__bindgen_anon_3.expected_attach_type = program.attach_type;
            if !program.log.is_empty() {
                attr.__bindgen_anon_3.log_level = 1;
                attr.__bindgen_anon_3.log_size = u32::try_from(program.log.len()).unwrap_or(u32::MAX);
                attr.__bindgen_anon_3.log_buf = program.log.as_ptr() as u64;
            }
            BPF_PROG_LOAD
        }
        Make::Link(program, cgroup, attach_type) => {
            attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
            attr.link_create.__bindgen_anon_2.target_fd = raw(cgroup);
            attr.link_create.attach_type = attach_type;
            BPF_LINK_CREATE
        }
        Make::Pinned(path) => {
            attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
            BPF_OBJ_GET
        }
        Make::Program(id) => {
            attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
            BPF_PROG_GET_FD_BY_ID
        }
    };
    // SAFETY: the kernel reads the path and the licence to their ends, and as many instructions as there are, and
    // writes as much of the log as there is room for. What each of these commands returns is a new descriptor.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(set).0?)) }
}

/// As much of a name as the kernel keeps, with the zero that ends it.
fn object_name(name: &str) -> [libc::c_char; 16] {
    let mut into = [0; 16];
    for (into, byte) in into.iter_mut().take(15).zip(name.bytes()) {
        *into = byte.cast_signed();
    }
    into
}

/// What is done with an object.
#[derive(Clone, Copy)]
enum ObjectOp<'a> {
    Pin(BorrowedFd<'a>, &'a CStr),
    /// Makes a link run a program.
    Program(BorrowedFd<'a>, BorrowedFd<'a>),
    Detach(BorrowedFd<'a>),
    /// Has nobody write a map by bpf(2) again, and the verifier take its values for constants.
    Freeze(BorrowedFd<'a>),
}

fn change(what: ObjectOp<'_>) -> io::Result<()> {
    let set = |attr: &mut bpf_attr| match what {
        ObjectOp::Pin(object, path) => {
            attr.__bindgen_anon_4.bpf_fd = raw(object);
            attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
            BPF_OBJ_PIN
        }
        ObjectOp::Program(link, program) => {
            attr.link_update.link_fd = raw(link);
            attr.link_update.__bindgen_anon_1.new_prog_fd = raw(program);
            BPF_LINK_UPDATE
        }
        ObjectOp::Freeze(map) => {
            attr.__bindgen_anon_2.map_fd = raw(map);
            BPF_MAP_FREEZE
        }
        ObjectOp::Detach(link) => {
            attr.link_detach.link_fd = raw(link);
            BPF_LINK_DETACH
        }
    };
    // SAFETY: the kernel reads the path to its end; the others name no memory.
    unsafe { bpf(set).0.map(drop) }
}

/// One call: its result, and the attribute, in which the kernel may answer too. `set` fills in the attribute, all zeros
/// before.
///
/// # Safety
///
/// What `set` names as memory is there until the call returns, and as large as the kernel takes it to be for that
/// command.
unsafe fn bpf(set: impl FnOnce(&mut bpf_attr) -> bpf_cmd) -> (io::Result<i32>, bpf_attr) {
    // SAFETY: zeros are an attribute of every command, and a kernel that knows shorter ones takes it. The rest is the
    // caller's promise.
    let (result, attr) = unsafe {
        let mut attr: bpf_attr = std::mem::zeroed();
        let command = set(&mut attr) as u32;
        let result = libc::syscall(libc::SYS_bpf, command, &raw mut attr, size_of::<bpf_attr>());
        (Errno::result(result), attr)
    };
    let result = result.map_err(io::Error::from);
    (
        result.and_then(|number| i32::try_from(number).map_err(io::Error::other)),
        attr,
    )
}

/// Asks what an object is: the kernel writes as much as it has to say, and there is room for.
fn ask<T>(object: BorrowedFd<'_>, info: *mut T) -> impl FnOnce(&mut bpf_attr) -> bpf_cmd {
    move |attr| {
        #[allow(clippy::cast_possible_truncation, reason = "the size of a small structure")]
        let length = size_of::<T>() as u32;
        attr.info.bpf_fd = raw(object);
        attr.info.info_len = length;
        attr.info.info = info as u64;
        BPF_OBJ_GET_INFO_BY_FD
    }
}

/// `ENOENT` as false.
pub(crate) fn found(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}
