//! Rules of earlier stemcells and of the BOSH agent's own firewall (B6), and the files of an image that bring them.

use std::{ffi::OsStr, fs, path::Path};

use super::{findings::Findings, firewall::Firewall, instance::Instance};
use crate::{
    host,
    jobs::leads_to,
    policy::{MONIT, Uid},
    ruleset::{Cgroup, RulePrincipal},
    wire::doctor::Weight::{High, Low, Medium},
};

/// Their chains: table and chain, of family inet. Not `monit_access_jobs`: we make it ourselves (B5), and by itself it
/// guards nothing.
pub(super) const CHAINS: [(&str, &str); 3] = [
    ("bosh_agent", "monit_access"),
    ("bosh_agent", "nats_access"),
    ("filter", "monit_output"),
];
/// How their iptables rules match: by a cgroup class of BOSH's, 0xb0540001 for monit, 0xb0540002 for NATS.
const CLASSES: [&str; 2] = ["--cgroup 2958295041", "--cgroup 2958295042"];
const NET_CLS: &str = "iptables rules on net_cls cgroups for monit";
/// Files of an image that bring such rules, or by which jobs get past them.
const FILES: [(&str, &str); 6] = [
    ("etc/network/if-up.d/restrict-monit-api-access", NET_CLS),
    ("etc/network/if-up.d/01-restrict-monit-api-access", NET_CLS),
    ("var/vcap/bosh/bin/restrict-monit-api-access", NET_CLS),
    ("etc/nftables/monit.nft", "the chain inet filter monit_output"),
    (
        "var/vcap/bosh/etc/monit-access-helper.sh",
        "the function permit_monit_access, which jobs call to get past such rules",
    ),
    (
        "var/vcap/bosh/etc/bosh-enable-monit-access",
        "adds rules to the chain inet bosh_agent monit_access_jobs for jobs",
    ),
];

/// Those of its files that an image has.
pub(super) fn files(root: &Path) -> Vec<String> {
    let there = FILES.into_iter().filter(|(path, _)| {
        let path = root.join(path);
        path.symlink_metadata().is_ok() && !is_ours(&path)
    });
    there.map(|(path, what)| format!("/{path}: {what}")).collect()
}

/// Whether what lies there is a tool of ours under the name of the agent's: jobs go on calling that.
fn is_ours(path: &Path) -> bool {
    let ours = |name: &OsStr| name == "enforcer";
    if let Ok(to) = fs::read_link(path) {
        return to.file_name().is_some_and(ours);
    }
    let text = host::read_lossy(path).unwrap_or_default();
    let code = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    code.flat_map(str::split_whitespace)
        .any(|word| Path::new(word).file_name().is_some_and(ours))
}

pub(super) fn findings(firewall: &Firewall, instance: &Instance, findings: &mut Findings) {
    let chains = firewall.chains.iter();
    let chains = chains.filter(|(family, table, chain)| family == "inet" && CHAINS.contains(&(table, chain)));
    let chains: Vec<(&str, &str)> = chains
        .map(|(_, table, chain)| (table.as_str(), chain.as_str()))
        .collect();
    let by_cgroup = firewall.rules.iter();
    let by_cgroup = by_cgroup.filter(|rule| rule.table == "mangle" && rule.matches.iter().any(|name| name == "cgroup"));
    let by_class = firewall.legacy.iter();
    let by_class = by_class.filter(|rule| CLASSES.iter().any(|class| rule.contains(class)));
    let mut items: Vec<String> = by_cgroup
        .map(|rule| format!("iptables -t mangle, chain {}: a match by cgroup", rule.chain))
        .chain(by_class.map(|rule| format!("iptables-legacy {rule}")))
        .collect();
    let agents_alone = items.is_empty() && chains.iter().all(|(table, _)| *table == "bosh_agent");
    items.extend(
        chains
            .iter()
            .map(|(table, chain)| format!("nft chain inet {table} {chain}")),
    );
    items.sort_unstable();
    items.dedup();
    // The agent's chain accepts what the jobs' chain accepts, and what was granted is written there; stemcells' drop
    // all but root.
    let dropped: Vec<String> = not_root(instance)
        .filter_map(|principal| dropped(instance, principal))
        .collect();
    let allows_others = instance.grants_monit || not_root(instance).next().is_some();
    let agents_drop = chains.contains(&("bosh_agent", "monit_access")) && !dropped.is_empty();
    if agents_drop {
        let rules = "no rule of inet bosh_agent monit_access_jobs accepts";
        items.extend(dropped.iter().map(|whom| format!("{rules} {whom}")));
    }
    let drops = agents_drop || chains.contains(&("filter", "monit_output")) && allows_others;
    let (weight, what) = match (drops, agents_alone) {
        (true, _) => (
            High,
            "rules of an earlier stemcell or of the BOSH agent's own firewall are also active, and drop users whom \
             target monit allows: a connection must pass both",
        ),
        (false, true) => (
            Low,
            "the BOSH agent's own firewall is also active: like enforcer it allows root, and it drops other users \
             silently",
        ),
        (false, false) => (
            Medium,
            "rules of an earlier stemcell are also active: they silently drop what enforcer allows, and are not \
             updated",
        ),
    };
    findings.each(
        "old-stemcell-rules",
        weight,
        what,
        items,
        "once enforcer guards the same endpoints: nft delete chain inet bosh_agent monit_access, and nats_access; \
         leave the table and monit_access_jobs, which jobs use; nft delete chain inet filter monit_output; iptables -t \
         mangle -D …; so that the agent does not make monit_access again: \"UseMonitIptablesFirewall\": true below \
         Platform.Linux in /var/vcap/bosh/agent.json",
    );
}

/// The principals of target `monit` besides root.
fn not_root(instance: &Instance) -> impl Iterator<Item = &RulePrincipal> {
    let root = RulePrincipal::User {
        uid: Uid(0),
        cgroup: None,
    };
    let targets = instance.rules.iter().flat_map(|rules| &rules.targets);
    let monit = targets.filter(|target| target.name == MONIT);
    let principals = monit.flat_map(|monit| &monit.principals);
    principals.filter(move |principal| **principal != root)
}

/// A principal that the agent's own chain drops, in words: no rule of the jobs' chain accepts it (B5).
fn dropped(instance: &Instance, principal: &RulePrincipal) -> Option<String> {
    let is_accepted = |user: Option<Uid>, cgroup: Option<Cgroup>| {
        let mut rules = instance.jobs.rules.iter().filter_map(|rule| rule.accepts.as_ref().ok());
        rules.any(|accept| {
            accept.subject.user.is_none_or(|own| user == Some(Uid(own)))
                && accept.subject.cgroup.is_none_or(|own| cgroup == Some(own))
                && instance.monit.iter().any(|endpoint| leads_to(&accept.to, endpoint))
        })
    };
    let (user, cgroup, name) = match principal {
        RulePrincipal::User { uid, cgroup: None } => (Some(*uid), None, format!("user {}", uid.0)),
        RulePrincipal::User {
            uid,
            cgroup: Some((path, cgroup)),
        } => (Some(*uid), Some(*cgroup), format!("user {} in {path}", uid.0)),
        RulePrincipal::Anybody { cgroup: (path, cgroup) } => (None, Some(*cgroup), format!("anybody in {path}")),
        // No rule can accept them: their sockets have no user.
        RulePrincipal::Kernel => return Some("the kernel's own sockets".to_owned()),
    };
    (!is_accepted(user, cgroup)).then_some(name)
}
