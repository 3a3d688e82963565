//! The capabilities that the daemon keeps once it enforces; all others are given up for good.

use std::io;

use super::DaemonError;

/// Keeps what loading and attaching again needs, and nothing else, for us and for whatever we might ever run.
pub(super) fn reduce() -> Result<(), DaemonError> {
    use caps::{CapSet, Capability};
    let failed = |error: caps::errors::CapsError| DaemonError::Io {
        action: "drop capabilities",
        error: io::Error::other(error),
    };
    // Kernels before 5.8 know neither CAP_BPF nor CAP_PERFMON: CAP_SYS_ADMIN is what they ask for.
    let supported = caps::runtime::procfs_all_supported(None).map_err(failed)?;
    let wanted = [Capability::CAP_BPF, Capability::CAP_PERFMON, Capability::CAP_NET_ADMIN];
    if !wanted.iter().all(|capability| supported.contains(capability)) {
        return Ok(());
    }
    let held = caps::read(None, CapSet::Permitted).map_err(failed)?;
    let keep: caps::CapsHashSet = wanted
        .into_iter()
        .filter(|capability| held.contains(capability))
        .collect();
    if held.contains(&Capability::CAP_SETPCAP) {
        for capability in supported.difference(&keep) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(failed)?;
        }
    }
    caps::clear(None, CapSet::Ambient).map_err(failed)?;
    caps::set(None, CapSet::Inheritable, &caps::CapsHashSet::new()).map_err(failed)?;
    caps::set(None, CapSet::Effective, &keep).map_err(failed)?;
    caps::set(None, CapSet::Permitted, &keep).map_err(failed)?;
    nix::sys::prctl::set_no_new_privs().map_err(|error| failed(caps::errors::CapsError::from(error.to_string())))
}
