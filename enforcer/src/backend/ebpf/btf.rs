//! Finds where a member lies in a kernel structure, from the kernel's own BTF (Documentation/bpf/btf.rst).
//!
//! A walk over the type section only: whole parsers hold every type in memory, which costs more than all else at start.

use std::{fs, io, path::Path};

/// Where the kernel shows its BTF (Linux 5.4, `CONFIG_DEBUG_INFO_BTF`).
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Offsets in bytes that the programs need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    /// `sk_uid` in `struct sock`.
    pub sk_uid: u32,
    /// `flags` in `struct task_struct`.
    pub task_flags: u32,
    /// `cred` in `struct task_struct`.
    pub task_cred: u32,
    /// `uid` in `struct cred`.
    pub cred_uid: u32,
}

/// Reads the offsets of the running kernel; none where it has no BTF or not these members.
pub fn offsets() -> io::Result<Option<Offsets>> {
    match fs::read(Path::new(VMLINUX)) {
        Ok(btf) => Ok(find(&btf)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn find(btf: &[u8]) -> Option<Offsets> {
    let sections = Sections::of(btf)?;
    let (mut sk_uid, mut task_flags, mut task_cred, mut cred_uid) = (None, None, None, None);
    sections.structures(|name, members| match name {
        b"sock" => sk_uid = sk_uid.or_else(|| sections.member(members, b"sk_uid")),
        b"task_struct" => {
            task_flags = task_flags.or_else(|| sections.member(members, b"flags"));
            task_cred = task_cred.or_else(|| sections.member(members, b"cred"));
        }
        b"cred" => cred_uid = cred_uid.or_else(|| sections.member(members, b"uid")),
        _ => {}
    })?;
    Some(Offsets {
        sk_uid: sk_uid?,
        task_flags: task_flags?,
        task_cred: task_cred?,
        cred_uid: cred_uid?,
    })
}

/// The two sections of a BTF blob.
struct Sections<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;

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

    /// Calls `each` with the name and members of every structure; nothing where the blob is not well formed.
    fn structures(&self, mut each: impl FnMut(&[u8], &[u8])) -> Option<()> {
        let mut rest = self.types;
        while !rest.is_empty() {
            let (name, info) = (u32_at(rest, 0)?, u32_at(rest, 4)?);
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            // Bytes that follow the twelve of every type, by kind: `struct btf_array` and its like.
            let extra = match kind {
                1 | 14 | 17 => 4,                        // INT, VAR, DECL_TAG
                3 => 12,                                 // ARRAY
                KIND_STRUCT | 5 | 15 | 19 => count * 12, // STRUCT, UNION, DATASEC, ENUM64
                6 | 13 => count * 8,                     // ENUM, FUNC_PROTO
                2 | 7..=12 | 16 | 18 => 0, // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
                _ => return None,
            };
            let members = rest.get(12..12 + extra)?;
            if kind == KIND_STRUCT {
                each(self.string(name)?, members);
            }
            rest = rest.get(12 + extra..)?;
        }
        Some(())
    }

    /// Offset in bytes of the named one of a structure's members.
    fn member(&self, members: &[u8], wanted: &[u8]) -> Option<u32> {
        members.chunks_exact(12).find_map(|member| {
            // The upper byte is the size of a bit field where the structure has any, and 0 for plain members.
            let (name, bits) = (u32_at(member, 0)?, u32_at(member, 8)? & 0x00ff_ffff);
            (self.string(name)? == wanted).then_some(bits / 8)
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
    use super::*;

    #[test]
    fn finds_members_of_the_running_kernel() {
        let found = offsets().ok().flatten();
        if Path::new(VMLINUX).exists() {
            let found = found.unwrap_or_default();
            assert!(
                found.sk_uid > 100 && found.sk_uid < 2000 && found.sk_uid.is_multiple_of(4),
                "{found:?}"
            );
            assert!(found.task_flags > 0 && found.task_flags < 4000, "{found:?}");
            assert!(found.task_cred > 0 && found.cred_uid > 0, "{found:?}");
        } else {
            assert_eq!(found, None);
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
