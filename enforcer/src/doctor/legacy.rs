//! Rules of iptables-legacy, which only its own tool can list, and what earlier stemcells leave behind.

use std::{ffi::OsStr, fs, path::Path, process::Command};

use crate::{
    backend::third_party::{Nat, To},
    host,
};

/// Chains of the BOSH agent's and of earlier stemcells' own: table and chain, of family inet. Not `monit_access_jobs`: we make it
/// ourselves (B5), and by itself it guards nothing.
pub(super) const AGENT_CHAINS: [(&str, &str); 3] = [
    ("bosh_agent", "monit_access"),
    ("bosh_agent", "nats_access"),
    ("filter", "monit_output"),
];

/// Files of an image that put such rules in force, or that jobs use to get past them.
pub(super) const AGENT_FILES: [(&str, &str); 6] = [
    (
        "etc/network/if-up.d/restrict-monit-api-access",
        "iptables rules on net_cls cgroups for monit",
    ),
    (
        "etc/network/if-up.d/01-restrict-monit-api-access",
        "iptables rules on net_cls cgroups for monit",
    ),
    ("etc/nftables/monit.nft", "the chain inet filter monit_output"),
    (
        "var/vcap/bosh/etc/monit-access-helper.sh",
        "the function permit_monit_access, which jobs call to get past such rules",
    ),
    (
        "var/vcap/bosh/etc/bosh-enable-monit-access",
        "adds rules to the chain inet bosh_agent monit_access_jobs for jobs",
    ),
    (
        "var/vcap/bosh/bin/restrict-monit-api-access",
        "iptables rules on net_cls cgroups for monit",
    ),
];

/// Whether what lies there is a tool of ours under the name of the agent's: jobs go on calling that.
pub(super) fn is_ours(path: &Path) -> bool {
    let ours = |name: &OsStr| name == "enforcer";
    if let Ok(to) = fs::read_link(path) {
        return to.file_name().is_some_and(ours);
    }
    let text = host::read_lossy(path).unwrap_or_default();
    let code = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    code.flat_map(str::split_whitespace)
        .any(|word| Path::new(word).file_name().is_some_and(ours))
}

/// A rule of iptables-legacy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LegacyRule {
    pub(super) table: String,
    pub(super) text: String,
}

/// Every rule of iptables-legacy, of both families; an error names what could not be listed.
pub(super) fn rules() -> Result<Vec<LegacyRule>, String> {
    let mut all = Vec::new();
    for (names, programs) in [
        ("/proc/net/ip_tables_names", ["iptables-legacy-save", "iptables-save"]),
        (
            "/proc/net/ip6_tables_names",
            ["ip6tables-legacy-save", "ip6tables-save"],
        ),
    ] {
        let tables = fs::read_to_string(names).unwrap_or_default();
        if tables.trim().is_empty() {
            continue;
        }
        let listed = programs.iter().find_map(|program| {
            let output = Command::new(program).output().ok()?;
            output
                .status
                .success()
                .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
        });
        let in_use = tables.split_whitespace().collect::<Vec<_>>().join(", ");
        let text = listed.ok_or_else(|| {
            format!(
                "tables {in_use} of iptables-legacy are in use, and {} cannot be run",
                programs[0]
            )
        })?;
        all.extend(parse(&text));
    }
    Ok(all)
}

/// Reads what `iptables-save` prints.
pub(super) fn parse(text: &str) -> Vec<LegacyRule> {
    let mut table = String::new();
    let mut all = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            name.trim().clone_into(&mut table);
        } else if line.starts_with("-A ") {
            all.push(LegacyRule {
                table: table.clone(),
                text: line.to_owned(),
            });
        }
    }
    all
}

impl LegacyRule {
    /// Where it sends packets, if it does.
    pub(super) fn nat(&self) -> Option<Nat> {
        let words: Vec<&str> = self.text.split_whitespace().collect();
        let after = |option: &str| {
            let at = words.iter().position(|word| *word == option)?;
            words.get(at + 1).copied()
        };
        match after("-j")? {
            "REDIRECT" => Some(Nat {
                to: To::Here,
                port: after("--to-ports").and_then(|port| port.split('-').next()?.parse().ok()),
            }),
            "DNAT" => {
                let text = after("--to-destination")?;
                if let Ok(both) = text.parse::<std::net::SocketAddr>() {
                    return Some(Nat {
                        to: To::Address(both.ip()),
                        port: Some(both.port()),
                    });
                }
                let address = text.trim_matches(['[', ']']).parse().map_or(To::Unknown, To::Address);
                Some(Nat {
                    to: address,
                    port: None,
                })
            }
            _ => None,
        }
    }

    /// Whether it is a rule of an earlier stemcell's: by a cgroup class of BOSH's, 0xb0540001 for monit, 0xb0540002 for NATS.
    pub(super) fn is_stemcells(&self) -> bool {
        self.text.contains("--cgroup 2958295041") || self.text.contains("--cgroup 2958295042")
    }
}
