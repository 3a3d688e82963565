//! Other network namespaces, and devices whose packets never come to the IP hooks of this one.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{
    devices,
    findings::{Findings, Gaps},
};
use crate::{
    host, text,
    wire::{ActiveBackend, doctor::Weight::Medium},
};

/// What was seen of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Namespaces {
    /// A process of each, or its name.
    pub(super) others: Vec<String>,
    /// Devices whose packets never come to the IP hooks of this namespace.
    pub(super) passing: Vec<String>,
}

impl Namespaces {
    pub(super) fn collect(gaps: &mut Gaps) -> Self {
        let here = devices::here(devices::bridges_are_shown());
        let mut this = Self {
            others: Vec::new(),
            passing: gaps.saw("devices of this host", here).unwrap_or_default(),
        };
        let others = gaps.saw("network namespaces", others()).unwrap_or_default();
        for (whose, file) in others.into_values() {
            match devices::in_namespace(file) {
                Ok(found) => this
                    .passing
                    .extend(found.into_iter().map(|device| format!("{device} of {whose}"))),
                // Its last process has ended meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => gaps.add(&format!("devices of {whose}"), error),
            }
            this.others.push(whose);
        }
        this
    }

    pub(super) fn findings(&self, enforces: ActiveBackend, findings: &mut Findings) {
        match enforces {
            ActiveBackend::Ebpf => findings.each(
                "other-network-namespaces",
                Medium,
                "other network namespaces exist, of containers perhaps: ebpf does not evaluate what they forward or \
                 send through raw sockets",
                self.others.iter().cloned(),
                "set backend = \"both\"",
            ),
            ActiveBackend::Nftables => findings.each(
                "past-ip-hooks",
                Medium,
                "packets of containers or virtual machines on these devices bypass the IP hooks at which nftables \
                 evaluates: what they send to an endpoint is not seen",
                self.passing.iter().cloned(),
                "set backend = \"both\", so that ebpf evaluates their connections; for bridges, sysctl -w \
                 net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1 (module br_netfilter) also \
                 helps",
            ),
            ActiveBackend::Both | ActiveBackend::None => {}
        }
    }
}

/// Whose each other network namespace is, by a process of it or a name that `ip netns` gave it, and the file by which
/// it is entered.
fn others() -> io::Result<BTreeMap<u64, (String, PathBuf)>> {
    let id = |file: &Path| fs::metadata(file).map(|meta| meta.ino());
    let own = id(Path::new("/proc/self/ns/net"))?;
    let mut found = BTreeMap::new();
    let mut add = |file: PathBuf, whose: &dyn Fn() -> String| {
        if let Ok(other) = id(&file)
            && other != own
        {
            found.entry(other).or_insert_with(|| (whose(), file));
        }
    };
    let entries = |dir| fs::read_dir(dir).into_iter().flatten().flatten();
    let processes = entries("/proc").filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in processes {
        add(format!("/proc/{pid}/ns/net").into(), &|| {
            format!("{} (pid {pid})", text::name(&host::task_name(pid)))
        });
    }
    // Namespaces that have a name and perhaps no process.
    for entry in entries("/run/netns") {
        add(entry.path(), &|| {
            format!("named {}", entry.file_name().to_string_lossy())
        });
    }
    Ok(found)
}
