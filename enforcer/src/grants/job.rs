//! The cgroup of a job's BPM container, by the job's name (B4).

use std::fmt::Write as _;

use crate::policy::{CgroupPath, CgroupPathError};

/// What the name of such a scope begins with: runc's own, as BPM left it before 1.4.33, and since then the service from
/// which BPM was called.
const BEGINNINGS: [&str; 5] = [
    "runc",
    "monit-service-bpm",
    "runit-service-bpm",
    "agent-service-bpm",
    "bosh-agent-service-bpm",
];

/// The scopes that systemd makes for it, of which there is one at a time, or none yet. In names of containers BPM
/// writes whatever is no letter, digit, `_` or `-` as a full stop and two hexadecimal digits; a process of another name
/// than its job's is `JOB.PROCESS`.
pub fn scopes(job: &str) -> Result<Vec<CgroupPath>, CgroupPathError> {
    let mut name = String::new();
    for byte in job.bytes() {
        if byte.is_ascii_alphanumeric() || b"_-".contains(&byte) {
            name.push(char::from(byte));
        } else {
            let _ = write!(name, ".{byte:02x}");
        }
    }
    let scope = |begin: &&str| CgroupPath::parse(&format!("/system.slice/{begin}-bpm-{name}.scope"));
    BEGINNINGS.iter().map(scope).collect()
}

/// Whether a cgroup is such a scope.
pub(super) fn is_scope(cgroup: &CgroupPath) -> bool {
    let name = cgroup.as_str().strip_prefix("/system.slice/");
    name.is_some_and(|name| !name.contains('/') && names_scope(name))
}

/// Whether the last part of a cgroup's path is that of a container of BPM's: a scope, or where systemd does not make
/// it, what runc calls it.
#[must_use]
pub fn is_container(name: &str) -> bool {
    names_scope(name) || name.starts_with("bpm-") || name.starts_with("runc-bpm-")
}

fn names_scope(name: &str) -> bool {
    let begins = |name: &str, begin: &str| name.strip_prefix(begin).is_some_and(|rest| rest.starts_with("-bpm-"));
    let name = name.strip_suffix(".scope");
    name.is_some_and(|name| BEGINNINGS.iter().any(|begin| begins(name, begin)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jobs_scopes_are_named_as_bpm_names_them() -> Result<(), CgroupPathError> {
        let cases = [
            ("galera-agent", "galera-agent"),
            ("a_b", "a_b"),
            ("web.worker", "web.2eworker"),
            ("a/../b", "a.2f.2e.2e.2fb"),
            ("a b\n", "a.20b.0a"),
            ("\u{e9}", ".c3.a9"),
        ];
        for (job, expected) in cases {
            let found = scopes(job)?;
            for begin in ["runc", "monit-service-bpm", "runit-service-bpm"] {
                let scope = CgroupPath::parse(&format!("/system.slice/{begin}-bpm-{expected}.scope"))?;
                assert!(found.contains(&scope) && is_scope(&scope), "{job:?}: {scope}");
            }
        }
        for other in [
            "/system.slice/job.service",
            "/runc-bpm-a.scope",
            "/system.slice/runc-bpm-a.scope/b",
            "/system.slice/bpm-a.scope",
        ] {
            assert!(!is_scope(&CgroupPath::parse(other)?), "{other}");
        }
        Ok(())
    }
}
