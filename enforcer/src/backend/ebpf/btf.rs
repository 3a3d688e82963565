//! Finds where a member lies in a kernel structure, from the kernel's own BTF (Documentation/bpf/btf.rst).
//!
//! A walk over the type section only: whole parsers hold every type in memory, which costs more than all else at start.

use std::{
    io,
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
};

use super::sys;

/// Where the kernel shows its BTF (Linux 5.4, `CONFIG_DEBUG_INFO_BTF`).
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Offsets in bytes that the programs need, as far as the kernel tells them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offsets {
    /// `sk_uid` in `struct sock`.
    pub sk_uid: Option<u32>,
    /// `flags` in `struct task_struct`.
    pub task_flags: Option<u32>,
    /// The way from a task to the path of its program, if the whole of it is known.
    pub program: Option<ProgramOffsets>,
    /// What a cast needs, where the kernel has the function.
    pub casts: Option<Casts>,
    /// What the record of a denial has of the task, if all of it is known. Read where pointers can be cast.
    pub task: Option<TaskOffsets>,
}

/// Offsets in bytes of what the record of a denial has of a task, in the order of [`TaskOffsets::CONSTANTS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TaskOffsets(pub [u32; 7]);

impl TaskOffsets {
    /// The programs' constants for them, in the order of [`WANTED`].
    pub(crate) const CONSTANTS: [&str; 7] = [
        "TASK_PID_OFFSET",
        "TASK_TGID_OFFSET",
        "TASK_NAME_OFFSET",
        "TASK_CGROUPS_OFFSET",
        "CGROUPS_DEFAULT_OFFSET",
        "CGROUP_NODE_OFFSET",
        "NODE_ID_OFFSET",
    ];
}

/// What programs need to have pointers taken for what they are: `bpf_rdonly_cast` (Linux 6.2), and numbers of types.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Casts {
    /// The function.
    pub function: u32,
    /// `struct sock`.
    pub sock: u32,
    /// `struct task_struct`.
    pub task: u32,
    /// Offset in bytes of `cred` in `struct task_struct`.
    pub task_cred: u32,
    /// Offset in bytes of `uid` in `struct cred`.
    pub cred_uid: u32,
}

/// Offsets in bytes on the way from a task to the path of its program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ProgramOffsets {
    /// `mm` in `struct task_struct`.
    pub task_mm: u32,
    /// `exe_file` in `struct mm_struct`.
    pub mm_exe: u32,
    /// `f_path.dentry` in `struct file`.
    pub file_dentry: u32,
    /// `d_parent` in `struct dentry`.
    pub dentry_parent: u32,
    /// `d_name.len` in `struct dentry`.
    pub dentry_length: u32,
    /// `d_name.name` in `struct dentry`.
    pub dentry_name: u32,
    /// Where short names lie in `struct dentry`.
    pub dentry_inline: u32,
}

/// The offsets of the running kernel, which stay what they are; none where it has no BTF.
pub(crate) fn offsets() -> io::Result<Offsets> {
    static FOUND: Mutex<Option<Offsets>> = Mutex::new(None);
    // Who comes meanwhile waits.
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    match *found {
        Some(offsets) => Ok(offsets),
        None => Ok(*found.insert(read()?)),
    }
}

/// Looks for the offsets in a thread of its own, so that who needs them has them sooner.
pub(crate) fn look_ahead() {
    // Without a thread they are looked for when they are needed.
    let _thread = thread::Builder::new().spawn(|| drop(offsets()));
}

fn read() -> io::Result<Offsets> {
    match sys::with_constant_file(Path::new(VMLINUX), find) {
        Ok(found) => Ok(found.unwrap_or_default()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Offsets::default()),
        Err(error) => Err(error),
    }
}

/// Structures that are looked into, and the names that the member has on one kernel or another.
const WANTED: [(&[u8], &[&[u8]]); 20] = [
    (b"sock", &[b"sk_uid"]),
    (b"task_struct", &[b"flags"]),
    (b"task_struct", &[b"cred"]),
    (b"cred", &[b"uid"]),
    (b"task_struct", &[b"mm"]),
    (b"mm_struct", &[b"exe_file"]),
    (b"file", &[b"f_path"]),
    (b"path", &[b"dentry"]),
    (b"dentry", &[b"d_parent"]),
    (b"dentry", &[b"d_name"]),
    (b"qstr", &[b"len"]),
    (b"qstr", &[b"name"]),
    // The latter from Linux 6.14 on.
    (b"dentry", &[b"d_iname", b"d_shortname"]),
    (b"task_struct", &[b"pid"]),
    (b"task_struct", &[b"tgid"]),
    (b"task_struct", &[b"comm"]),
    (b"task_struct", &[b"cgroups"]),
    (b"css_set", &[b"dfl_cgrp"]),
    (b"cgroup", &[b"kn"]),
    (b"kernfs_node", &[b"id"]),
];

/// The offsets that a blob tells; nothing where it is none.
fn find(btf: &[u8]) -> Option<Offsets> {
    let sections = Sections::of(btf)?;
    let mut named: [Option<(u32, &[u8])>; WANTED.len()] = [None; WANTED.len()];
    // Sorted by number, as they come.
    let mut unnamed: Vec<(u32, &[u8])> = Vec::new();
    let mut function = None;
    sections.each(|number, kind, name, members| {
        if kind == KIND_FUNC {
            if sections.is(name, CAST) {
                function = Some(number);
            }
            return;
        }
        if name == 0 {
            unnamed.push((number, members));
        }
        for ((wanted, _), found) in WANTED.iter().zip(&mut named) {
            if found.is_none() && sections.is(name, wanted) {
                *found = Some((number, members));
            }
        }
    })?;
    let [sock, task, ..] = named.map(|found| found.map(|(number, _)| number));
    let mut found = WANTED.iter().zip(named).map(|((_, names), found)| {
        let (_, members) = found?;
        let at = sections.member(members, names);
        at.or_else(|| sections.member_within(members, names, &unnamed, DEPTH))
    });
    let mut next = || found.next().flatten();
    let mut offsets = Offsets {
        sk_uid: next(),
        task_flags: next(),
        ..Offsets::default()
    };
    let users = whole(&mut next);
    if let (Some(function), Some(sock), Some(task), Some([task_cred, cred_uid])) = (function, sock, task, users) {
        offsets.casts = Some(Casts {
            function,
            sock,
            task,
            task_cred,
            cred_uid,
        });
    }
    offsets.program = whole(&mut next).map(
        |[
            task_mm,
            mm_exe,
            file,
            path,
            dentry_parent,
            name,
            length,
            text,
            dentry_inline,
        ]| ProgramOffsets {
            task_mm,
            mm_exe,
            file_dentry: file + path,
            dentry_parent,
            dentry_length: name + length,
            dentry_name: name + text,
            dentry_inline,
        },
    );
    offsets.task = whole(&mut next).map(TaskOffsets);
    Some(offsets)
}

/// The next offsets, unless one of them is missing; those after it are taken all the same.
fn whole<const N: usize>(mut next: impl FnMut() -> Option<u32>) -> Option<[u32; N]> {
    let mut found = [None; N];
    found.fill_with(&mut next);
    found
        .iter()
        .all(Option::is_some)
        .then(|| found.map(Option::unwrap_or_default))
}

/// The two sections of a BTF blob.
struct Sections<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_FUNC: u32 = 12;
/// Bytes that follow the twelve of every type, by kind: so many, and so many for each member or the like. None for a
/// kind that is not known.
const EXTRA: [Option<(usize, usize)>; 20] = [
    None,
    Some((4, 0)),  // INT
    Some((0, 0)),  // PTR
    Some((12, 0)), // ARRAY
    Some((0, 12)), // STRUCT
    Some((0, 12)), // UNION
    Some((0, 8)),  // ENUM
    Some((0, 0)),  // FWD
    Some((0, 0)),  // TYPEDEF
    Some((0, 0)),  // VOLATILE
    Some((0, 0)),  // CONST
    Some((0, 0)),  // RESTRICT
    Some((0, 0)),  // FUNC
    Some((0, 8)),  // FUNC_PROTO
    Some((4, 0)),  // VAR
    Some((0, 12)), // DATASEC
    Some((0, 0)),  // FLOAT
    Some((4, 0)),  // DECL_TAG
    Some((0, 0)),  // TYPE_TAG
    Some((0, 12)), // ENUM64
];
/// The function that only tells the verifier of what type a pointer is.
const CAST: &[u8] = b"bpf_rdonly_cast";
/// How deep structures without a name are looked into.
const DEPTH: usize = 4;

impl<'a> Sections<'a> {
    fn of(btf: &'a [u8]) -> Option<Self> {
        let magic = u16::from_ne_bytes(btf.get(..2)?.try_into().ok()?);
        let word = |at: usize| usize::try_from(u32_at(btf, at)?).ok();
        let (header, type_off, type_len, str_off, str_len) = (word(4)?, word(8)?, word(12)?, word(16)?, word(20)?);
        let section = |offset: usize, length: usize| btf.get(header + offset..)?.get(..length);
        (magic == MAGIC).then_some(Self {
            types: section(type_off, type_len)?,
            strings: section(str_off, str_len)?,
        })
    }

    /// Calls `each` with the type's number, kind, the place of its name and the members of every structure, union and
    /// function; nothing where the blob is not well formed.
    fn each(&self, mut each: impl FnMut(u32, u32, u32, &'a [u8])) -> Option<()> {
        let mut rest = self.types;
        let mut number = 0;
        while !rest.is_empty() {
            let (name, info) = (u32_at(rest, 0)?, u32_at(rest, 4)?);
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let (fixed, each_one) = (*EXTRA.get(kind as usize)?)?;
            let extra = fixed + each_one * count;
            let members = rest.get(12..12 + extra)?;
            // The first is number 1, as 0 is void.
            number += 1;
            if matches!(kind, KIND_STRUCT | KIND_UNION | KIND_FUNC) {
                each(number, kind, name, members);
            }
            rest = rest.get(12 + extra..)?;
        }
        Some(())
    }

    /// Offset in bytes of the member that has one of the names.
    fn member(&self, members: &[u8], names: &[&[u8]]) -> Option<u32> {
        members.chunks_exact(12).find_map(|member| {
            // The upper byte is the size of a bit field where the structure has any, and 0 for plain members.
            let (name, bits) = (u32_at(member, 0)?, u32_at(member, 8)? & 0x00ff_ffff);
            names.contains(&self.string(name)?).then_some(bits / 8)
        })
    }

    /// The same of a member in structures without a name inside, as the kernel's own layout randomization (RANDSTRUCT)
    /// makes them, and others.
    fn member_within(&self, members: &[u8], names: &[&[u8]], unnamed: &[(u32, &[u8])], depth: usize) -> Option<u32> {
        let depth = depth.checked_sub(1)?;
        members.chunks_exact(12).find_map(|member| {
            let (name, kind, bits) = (u32_at(member, 0)?, u32_at(member, 4)?, u32_at(member, 8)? & 0x00ff_ffff);
            if !self.string(name)?.is_empty() {
                return None;
            }
            let at = unnamed.binary_search_by_key(&kind, |(kind, _)| *kind).ok()?;
            let (_, members) = unnamed.get(at)?;
            let within = self.member(members, names);
            let within = within.or_else(|| self.member_within(members, names, unnamed, depth))?;
            Some(bits / 8 + within)
        })
    }

    /// Whether that is the string at an offset.
    fn is(&self, offset: u32, string: &[u8]) -> bool {
        let from = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.strings.get(offset..));
        // Most differ in the first byte, and all of the kernel's functions are asked.
        from.is_some_and(|from| {
            from.first() == string.first() && from.strip_prefix(string).is_some_and(|rest| rest.first() == Some(&0))
        })
    }

    fn string(&self, offset: u32) -> Option<&'a [u8]> {
        let from = self.strings.get(usize::try_from(offset).ok()?..)?;
        from.split(|byte| *byte == 0).next()
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn finds_members_of_the_running_kernel() {
        let found = offsets().unwrap_or_default();
        if Path::new(VMLINUX).exists() {
            assert!(
                found
                    .sk_uid
                    .is_some_and(|at| at > 100 && at < 2000 && at.is_multiple_of(4)),
                "{found:?}"
            );
            assert!(found.task_flags.is_some_and(|at| at > 0 && at < 4000), "{found:?}");
            assert!(found.program.is_some() && found.task.is_some(), "{found:?}");
            // Linux 6.2.
            let has_cast = fs::read_to_string("/proc/kallsyms").is_ok_and(|all| all.contains(" bpf_rdonly_cast\n"));
            assert_eq!(found.casts.is_some(), has_cast, "{found:?}");
        } else {
            assert_eq!(found, Offsets::default());
        }
    }

    /// A structure, and its members: name, type and offset in bytes.
    type Structure = (&'static str, &'static [(&'static str, u32, u32)]);

    fn blob(structures: &[Structure]) -> Vec<u8> {
        let (mut types, mut strings) = (Vec::new(), vec![0_u8]);
        let mut put = |types: &mut Vec<u8>, name: &str, words: [u32; 2]| {
            let at = if name.is_empty() { 0 } else { strings.len() };
            if at > 0 {
                strings.extend(name.bytes().chain([0]));
            }
            for word in [u32::try_from(at).unwrap_or_default(), words[0], words[1]] {
                types.extend(word.to_ne_bytes());
            }
        };
        for (name, members) in structures {
            let count = u32::try_from(members.len()).unwrap_or_default();
            put(&mut types, name, [KIND_STRUCT << 24 | count, 0]);
            for (name, kind, offset) in *members {
                put(&mut types, name, [*kind, offset * 8]);
            }
        }
        let length = |part: &[u8]| u32::try_from(part.len()).unwrap_or_default();
        let mut blob = [&MAGIC.to_ne_bytes()[..], &[1, 0]].concat();
        for word in [24, 0, length(&types), length(&types), length(&strings)] {
            blob.extend(word.to_ne_bytes());
        }
        [blob, types, strings].concat()
    }

    #[test]
    fn d3_each_member_is_found_or_missing_on_its_own() {
        const NONE: u32 = u32::MAX;
        const SOCK: Structure = ("sock", &[("sk_other", 9, 0), ("sk_uid", 9, 100)]);
        const TASK: Structure = ("task_struct", &[("flags", 9, 8), ("cred", 9, 16)]);
        let check = |structures: &[Structure], [sk_uid, task_flags]: [u32; 2]| {
            let [sk_uid, task_flags] = [sk_uid, task_flags].map(|at| (at != NONE).then_some(at));
            let expected = Offsets {
                sk_uid,
                task_flags,
                ..Offsets::default()
            };
            assert_eq!(find(&blob(structures)), Some(expected), "{structures:?}");
        };
        check(&[SOCK, TASK], [100, 8]);
        check(&[TASK, SOCK], [100, 8]);
        check(&[SOCK], [100, NONE]);
        check(&[TASK, ("sock", &[])], [NONE, 8]);
        check(&[TASK, ("sock", &[("sk_uid", 9, 0)])], [0, 8]);
        // RANDSTRUCT puts members into a structure without a name, here the second type, and one within it, the fourth.
        let random: [Structure; 5] = [
            ("task_struct", &[("thread_info", 9, 0), ("", 2, 24), ("stack", 9, 900)]),
            ("", &[("cred", 9, 40), ("", 4, 64)]),
            SOCK,
            ("", &[("other", 9, 0), ("flags", 9, 12)]),
            ("cred", &[("", 4, 8), ("uid", 9, 48)]),
        ];
        check(&random, [100, 24 + 64 + 12]);
        // One that contains itself, as no compiler makes, ends.
        check(&[("task_struct", &[("", 1, 4)]), SOCK], [100, NONE]);
        // A number that no type has.
        check(&[("task_struct", &[("", 77, 4)]), SOCK], [100, NONE]);
    }

    #[test]
    fn the_way_to_a_programs_path_is_known_whole_or_not_at_all() {
        // Names as from Linux 6.14 on; some members lie in structures and unions without a name.
        let structures: [Structure; 9] = [
            ("task_struct", &[("flags", 9, 8), ("mm", 9, 24)]),
            ("mm_struct", &[("", 3, 0)]),
            ("", &[("mm_users", 9, 0), ("exe_file", 9, 320)]),
            ("file", &[("f_mode", 9, 0), ("f_path", 5, 64)]),
            ("path", &[("mnt", 9, 0), ("dentry", 9, 8)]),
            ("dentry", &[("d_parent", 9, 16), ("", 7, 32), ("d_shortname", 9, 56)]),
            ("", &[("d_name", 8, 0)]),
            ("qstr", &[("", 9, 0), ("name", 9, 8)]),
            ("", &[("hash", 9, 0), ("len", 9, 4)]),
        ];
        let program = |structures: &[Structure]| find(&blob(structures)).and_then(|found| found.program);
        let whole = ProgramOffsets {
            task_mm: 24,
            mm_exe: 320,
            file_dentry: 72,
            dentry_parent: 16,
            dentry_length: 36,
            dentry_name: 40,
            dentry_inline: 56,
        };
        assert_eq!(program(&structures), Some(whole));
        for left_out in 0..structures.len() {
            let mut fewer = structures;
            if let Some(structure) = fewer.get_mut(left_out) {
                structure.1 = &[];
            }
            assert_eq!(program(&fewer), None, "without structure {left_out}");
        }
    }

    #[test]
    fn truncated_or_foreign_bytes_are_no_offsets() {
        for bytes in [
            &b""[..],
            &[0x9f, 0xeb],
            &[0; 64],
            &[0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 0, 0, 0, 0, 255, 255, 0, 0],
        ] {
            assert_eq!(find(bytes), None);
        }
    }
}
