//! The programs loaded, as this kernel lets them see.

use std::path::Path;

use aya::{
    Ebpf, EbpfLoader,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};

use super::{
    BackendError,
    btf::{self, Offsets, ProgramOffsets},
    image::KernelVisibility,
};

/// The programs as built for the BPF target.
pub(super) static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/enforcer-programs"));

/// What this kernel lets the programs see. What it withholds costs only itself (D3).
#[derive(Debug)]
pub(super) struct Sight {
    /// `program` is none where a task can only be read with [`Sight::reads`].
    offsets: Offsets,
    /// Whether `bpf_get_current_task_btf` is to be had.
    typed: bool,
    /// Whether `bpf_probe_read_kernel` is to be had: not under `lockdown=confidentiality`.
    reads: bool,
}

impl Sight {
    pub(super) fn here() -> Result<Self, BackendError> {
        let mut offsets = btf::offsets().map_err(|error| BackendError::Io {
            action: "read",
            object: "/sys/kernel/btf/vmlinux".into(),
            error,
        })?;
        let has = |helper| is_helper_supported(ProgramType::CgroupSockAddr, helper);
        // Where the kernel cannot tell whether it has the helper, the slower way does.
        let typed = has(BpfHelper::BPF_FUNC_get_current_task_btf).unwrap_or(false);
        if !typed {
            offsets.program = None;
        }
        Ok(Self {
            offsets,
            typed,
            reads: reads_kernel().unwrap_or(true),
        })
    }

    /// Has the programs not read the paths of tasks' programs; false where they do not anyway.
    pub(super) fn forget_paths(&mut self) -> bool {
        self.offsets.program.take().is_some()
    }

    pub(super) fn sees(&self) -> KernelVisibility {
        let Offsets { sk_uid, task_flags, .. } = self.offsets;
        KernelVisibility {
            tcp_owner: sk_uid.is_some(),
            other_owner: sk_uid.is_some() && self.reads,
            threads: task_flags.is_some() && (self.typed || self.reads),
        }
    }
}

/// Whether programs may read the kernel's memory. Old kernels hand out the helper under `lockdown=confidentiality` too,
/// and have each call fail.
pub(crate) fn reads_kernel() -> Result<bool, aya::programs::ProgramError> {
    let locked =
        std::fs::read_to_string("/sys/kernel/security/lockdown").is_ok_and(|text| text.contains("[confidentiality]"));
    let has = is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_probe_read_kernel);
    has.map(|has| has && !locked)
}

pub(super) fn load(maps_dir: &Path, sight: &Sight, log_level: u8) -> Result<Ebpf, BackendError> {
    let Offsets {
        sk_uid,
        task_flags,
        program,
    } = sight.offsets;
    // No structure begins with what is looked for.
    let [sk_uid, task_flags] = [sk_uid, task_flags].map(Option::unwrap_or_default);
    let ProgramOffsets {
        task_mm,
        mm_exe,
        file_dentry,
        dentry_parent,
        dentry_length,
        dentry_name,
        dentry_inline,
    } = program.unwrap_or_default();
    let [typed, reads] = [sight.typed, sight.reads].map(u32::from);
    let mut loader = EbpfLoader::new();
    loader.btf(None).default_map_pin_directory(maps_dir);
    for (name, value) in [
        ("SK_UID_OFFSET", &sk_uid),
        ("TASK_FLAGS_OFFSET", &task_flags),
        ("TYPED_TASK", &typed),
        ("TASK_MM_OFFSET", &task_mm),
        ("MM_EXE_OFFSET", &mm_exe),
        ("FILE_DENTRY_OFFSET", &file_dentry),
        ("DENTRY_PARENT_OFFSET", &dentry_parent),
        ("DENTRY_LENGTH_OFFSET", &dentry_length),
        ("DENTRY_NAME_OFFSET", &dentry_name),
        ("DENTRY_INLINE_OFFSET", &dentry_inline),
        ("READS_KERNEL", &reads),
    ] {
        loader.override_global(name, value, true);
    }
    loader
        .override_global(aya_log::LEVEL, &log_level, true)
        .load(PROGRAMS)
        .map_err(|error| BackendError::Load {
            program: "the programs",
            source: Box::from(short(&error)),
        })
}

/// An error and its causes on one line, without the verifier's log.
pub(super) fn short(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text.lines().next().unwrap_or_default().to_owned()
}
