//! The cgroup of a job's BPM container, by the job's name (B4).

use std::fmt::Write as _;

use crate::policy::{CgroupPath, CgroupPathError};

/// The scope that systemd makes for it, whether it runs now or not: runc's for a container that BPM has named. In names of containers
/// BPM writes whatever is no letter, digit, `_` or `-` as a full stop and two hexadecimal digits; a process of another name than its
/// job's is `JOB.PROCESS`.
pub fn scope(job: &str) -> Result<CgroupPath, CgroupPathError> {
    let mut name = String::new();
    for byte in job.bytes() {
        if byte.is_ascii_alphanumeric() || b"_-".contains(&byte) {
            name.push(char::from(byte));
        } else {
            let _ = write!(name, ".{byte:02x}");
        }
    }
    CgroupPath::parse(&format!("/system.slice/runc-bpm-{name}.scope"))
}

/// Whether a cgroup is such a scope.
pub(super) fn is_scope(cgroup: &CgroupPath) -> bool {
    let last = cgroup.as_str().rsplit('/').next().unwrap_or_default();
    last.strip_suffix(".scope")
        .is_some_and(|name| name.starts_with("runc-bpm-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jobs_scope_is_named_as_bpm_names_it() -> Result<(), CgroupPathError> {
        let cases = [
            ("galera-agent", "galera-agent"),
            ("a_b", "a_b"),
            ("web.worker", "web.2eworker"),
            ("a/../b", "a.2f.2e.2e.2fb"),
            ("a b\n", "a.20b.0a"),
            ("\u{e9}", ".c3.a9"),
        ];
        for (job, expected) in cases {
            let found = scope(job)?.to_string();
            assert_eq!(found, format!("/system.slice/runc-bpm-{expected}.scope"), "{job:?}");
        }
        Ok(())
    }
}
