//! The capabilities that the daemon keeps once its first rule set is active; all others are given up for good, as far
//! as can be.

use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use tracing::warn;

use super::DaemonError;

/// What loading and attaching again needs.
const NEEDED: [Capability; 3] = [Capability::CAP_BPF, Capability::CAP_PERFMON, Capability::CAP_NET_ADMIN];

/// What is kept and what is given up.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    keep: CapsHashSet,
    /// To be dropped for whatever we might ever run, too.
    bounding: CapsHashSet,
    /// What cannot be given up, and why.
    left: Option<String>,
}

/// Keeps what loading and attaching again needs, and nothing else, for us and for whatever we might ever run.
pub(super) fn reduce() -> Result<(), DaemonError> {
    let failed = |error: caps::errors::CapsError| DaemonError::Io {
        action: "drop capabilities",
        error: io::Error::other(error),
    };
    let supported = caps::runtime::procfs_all_supported(None).map_err(failed)?;
    let held = caps::read(None, CapSet::Permitted).map_err(failed)?;
    let bounding = caps::read(None, CapSet::Bounding).map_err(failed)?;
    let plan = plan(&supported, &held, &bounding);
    if let Some(left) = &plan.left {
        warn!("capabilities: {left}");
    }
    for capability in plan.bounding {
        caps::drop(None, CapSet::Bounding, capability).map_err(failed)?;
    }
    caps::clear(None, CapSet::Ambient).map_err(failed)?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new()).map_err(failed)?;
    caps::set(None, CapSet::Effective, &plan.keep).map_err(failed)?;
    caps::set(None, CapSet::Permitted, &plan.keep).map_err(failed)?;
    nix::sys::prctl::set_no_new_privs().map_err(|error| failed(caps::errors::CapsError::from(error.to_string())))
}

fn plan(supported: &CapsHashSet, held: &CapsHashSet, bounding: &CapsHashSet) -> Plan {
    // Linux before 5.8 knows neither CAP_BPF nor CAP_PERFMON. eBPF needs 5.8 (ring buffer), so it is nftables that
    // enforces there, with CAP_NET_ADMIN alone; the sets of such a kernel are left as they are.
    if !NEEDED.iter().all(|needed| supported.contains(needed)) {
        return Plan {
            keep: held.clone(),
            bounding: CapsHashSet::new(),
            left: Some("this kernel has no CAP_BPF (Linux 5.8 has it), so all capabilities are kept".to_owned()),
        };
    }
    let keep: CapsHashSet = NEEDED.into_iter().filter(|needed| held.contains(needed)).collect();
    let beyond: CapsHashSet = bounding.difference(&keep).copied().collect();
    if beyond.is_empty() || held.contains(&Capability::CAP_SETPCAP) {
        return Plan {
            keep,
            bounding: beyond,
            left: None,
        };
    }
    Plan {
        keep,
        bounding: CapsHashSet::new(),
        left: Some(format!(
            "the bounding set stays as it is, {} beyond what is kept, because CAP_SETPCAP is missing; grant it at \
             start, or set CapabilityBoundingSet= in the unit",
            beyond.len()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(list: &[Capability]) -> CapsHashSet {
        list.iter().copied().collect()
    }

    #[test]
    fn what_cannot_be_given_up_is_told() {
        let all = caps::all();
        let needed = set(&NEEDED);
        let others: CapsHashSet = all.difference(&needed).copied().collect();
        let full = plan(&all, &all, &all);
        assert_eq!((&full.keep, &full.bounding, &full.left), (&needed, &others, &None));
        let confined = plan(&all, &needed, &needed);
        assert_eq!(
            (&confined.keep, &confined.bounding, &confined.left),
            (&needed, &set(&[]), &None)
        );
        let bound = plan(&all, &needed, &all);
        assert_eq!((&bound.keep, &bound.bounding), (&needed, &set(&[])));
        assert!(bound.left.is_some_and(|left| left.contains("CAP_SETPCAP")));
        let old: CapsHashSet = all.difference(&set(&[Capability::CAP_BPF])).copied().collect();
        let old_kernel = plan(&old, &old, &old);
        assert_eq!((&old_kernel.keep, &old_kernel.bounding), (&old, &set(&[])));
        assert!(old_kernel.left.is_some_and(|left| left.contains("5.8")));
    }
}
