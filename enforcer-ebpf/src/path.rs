//! The path of a task's program, for its denial's record: read from the kernel's structures by typed loads.

use aya_ebpf::{Global, cty::c_void, helpers::generated::bpf_probe_read_kernel};
use enforcer_ebpf::{COMPONENT_BYTES, EventRecord, MAX_COMPONENTS, eight_passes};

use crate::structures::{READS_KERNEL, Running, member};

/// Bytes that names in a `struct dentry` itself have room for, on every kernel; one of them ends the name
/// (`DNAME_INLINE_LEN`).
const INLINE_NAME: u32 = 32;

/// Offset of `mm` in `struct task_struct`, from the kernel's BTF; 0 where the way from there to the program's path is
/// not known or cannot be gone.
#[unsafe(no_mangle)]
static TASK_MM_OFFSET: Global<u32> = Global::new(0);
/// Offset of `exe_file` in `struct mm_struct`.
#[unsafe(no_mangle)]
static MM_EXE_OFFSET: Global<u32> = Global::new(0);
/// Offset of `f_path.dentry` in `struct file`.
#[unsafe(no_mangle)]
static FILE_DENTRY_OFFSET: Global<u32> = Global::new(0);
/// Offset of `d_parent` in `struct dentry`.
#[unsafe(no_mangle)]
static DENTRY_PARENT_OFFSET: Global<u32> = Global::new(0);
/// Offset of `d_name.len` in `struct dentry`.
#[unsafe(no_mangle)]
static DENTRY_LENGTH_OFFSET: Global<u32> = Global::new(0);
/// Offset of `d_name.name` in `struct dentry`.
#[unsafe(no_mangle)]
static DENTRY_NAME_OFFSET: Global<u32> = Global::new(0);
/// Offset in `struct dentry` of the bytes in which short names lie, [`INLINE_NAME`] at least.
#[unsafe(no_mangle)]
static DENTRY_INLINE_OFFSET: Global<u32> = Global::new(0);

const _: () = assert!(MAX_COMPONENTS == 8, "a pass for each component");

/// Writes the path of the task's program within its file system, from its last component on. Names change under it at
/// any time: what is read is what was there, and each load of kernel memory is checked.
///
/// # Safety
///
/// `record` is the memory of a record in the ring buffer.
#[inline(always)]
pub(crate) unsafe fn write(record: *mut EventRecord, task: Running) {
    let mm = TASK_MM_OFFSET.load();
    if mm == 0 {
        return;
    }
    // SAFETY: the verifier knows the types of all that is loaded here, and a load from what is gone reads zeros; each
    // pointer is checked before it is followed.
    unsafe {
        let Some(task) = task.typed() else { return };
        let Some(mm) = follow(task, mm) else {
            return;
        };
        let Some(file) = follow(mm, MM_EXE_OFFSET.load()) else {
            return;
        };
        let Some(mut dentry) = follow(file, FILE_DENTRY_OFFSET.load()) else {
            return;
        };
        let lengths = (&raw mut (*record).lengths).cast::<u8>();
        let path = (&raw mut (*record).path).cast::<[u8; COMPONENT_BYTES]>();
        eight_passes! { number => {
            let Some(parent) = follow(dentry, DENTRY_PARENT_OFFSET.load()) else {
                return;
            };
            // The root is its own parent, and so is a file without a directory.
            if parent == dentry && number > 0 {
                (*record).rooted = 1;
                return;
            }
            write_component(dentry, path.add(number as usize).cast(), lengths.add(number as usize));
            (*record).components = number as u8 + 1;
            dentry = parent;
        }}
        if follow(dentry, DENTRY_PARENT_OFFSET.load()) == Some(dentry) {
            (*record).rooted = 1;
        }
    }
}

/// Writes one component of a path, and its length.
///
/// # Safety
///
/// `dentry` is one, and there is room.
#[inline(always)]
unsafe fn write_component(dentry: *const u8, name: *mut u64, length_at: *mut u8) {
    // SAFETY: as in [`write`].
    unsafe {
        let length = member::<u32>(dentry, DENTRY_LENGTH_OFFSET.load());
        // As far as a byte has room for it.
        #[allow(clippy::cast_possible_truncation, reason = "capped")]
        length_at.write(length.min(255) as u8);
        if length < INLINE_NAME {
            let from = dentry.add(DENTRY_INLINE_OFFSET.load() as usize).cast::<u64>();
            name.write(from.read_volatile());
            name.add(1).write(from.add(1).read_volatile());
            name.add(2).write(from.add(2).read_volatile());
            name.add(3).write(from.add(3).read_volatile());
            return;
        }
        // A byte that no name has, where nothing can be read.
        name.cast::<u8>().write(0);
        if READS_KERNEL.load() != 0 {
            let from = member::<*const c_void>(dentry, DENTRY_NAME_OFFSET.load());
            #[allow(clippy::cast_possible_truncation, reason = "40")]
            bpf_probe_read_kernel(name.cast(), COMPONENT_BYTES as u32, from);
        }
    }
}

/// What a pointer within a kernel structure points to, unless to nothing.
///
/// # Safety
///
/// There is a pointer at the offset.
#[inline(always)]
unsafe fn follow(structure: *const u8, offset: u32) -> Option<*const u8> {
    // SAFETY: as in [`write`].
    let found = unsafe { member::<*const u8>(structure, offset) };
    (!found.is_null()).then_some(found)
}
