//! Ordering cycles of systemd's units through ours. Where all units of one are started together, systemd drops the
//! start of one of them, and that may be ours (man 5 `systemd.unit`, `Before=`). `systemd-analyze verify` finds those
//! alone whose units pull each other in.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::Path,
    process::Command,
};

use super::findings::Findings;
use crate::wire::doctor::Weight;

/// The package's units.
const OURS: [&str; 2] = ["enforcer-early.service", "enforcer.service"];
/// Where systemd runs (man 3 `sd_booted`).
const BOOTED: &str = "/run/systemd/system";

/// Units that each come after the next, and the last after the first, which is ours.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cycle {
    pub(super) units: Vec<String>,
    /// What administrators have added to them.
    pub(super) drop_ins: Vec<String>,
}

/// A unit that systemd has loaded.
#[derive(Debug, Default)]
struct Unit {
    after: Vec<String>,
    drop_ins: Vec<String>,
}

/// The shortest through each of our units; none where systemd does not run.
pub(super) fn collect() -> Result<Vec<Cycle>, String> {
    if !Path::new(BOOTED).is_dir() {
        return Ok(Vec::new());
    }
    let mut show = Command::new("systemctl");
    // Without --all what is not active is left out.
    show.args([
        "show",
        "--all",
        "--no-pager",
        "--property=Id,LoadState,After,DropInPaths",
        "*",
    ]);
    let output = show.output().map_err(|error| format!("run systemctl show: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("systemctl show ({}): {}", output.status, said.trim()));
    }
    Ok(find(&parse(&String::from_utf8_lossy(&output.stdout))))
}

pub(super) fn findings(cycles: &[Cycle], findings: &mut Findings) {
    let shown = |cycle: &Cycle| {
        let units: Vec<&str> = cycle
            .units
            .iter()
            .chain(cycle.units.first())
            .map(String::as_str)
            .collect();
        let drop_ins = cycle.drop_ins.join(", ");
        let see = if drop_ins.is_empty() {
            String::new()
        } else {
            format!(" (see {drop_ins})")
        };
        format!("{}{see}", units.join(" after "))
    };
    findings.each(
        "ordering-cycle",
        Weight::High,
        "systemd units form an ordering cycle with enforcer's: at boot systemd breaks it by not starting one of them, \
         which may be enforcer",
        cycles.iter().map(shown),
        "remove one of these After= or Before=; enforcer.service is to start before network-online.target and what \
         needs that",
    );
}

/// Reads blocks of properties, one a unit.
fn parse(text: &str) -> BTreeMap<String, Unit> {
    let mut units = BTreeMap::new();
    for block in text.split("\n\n") {
        let properties: BTreeMap<&str, &str> = block.lines().filter_map(|line| line.split_once('=')).collect();
        let list = |name| {
            let words = properties.get(name).copied().unwrap_or_default().split_whitespace();
            words.map(str::to_owned).collect()
        };
        if let Some(id) = properties.get("Id")
            && properties.get("LoadState") == Some(&"loaded")
        {
            let unit = Unit {
                after: list("After"),
                drop_ins: list("DropInPaths"),
            };
            units.insert((*id).to_owned(), unit);
        }
    }
    units
}

fn find(units: &BTreeMap<String, Unit>) -> Vec<Cycle> {
    let mut seen = BTreeSet::new();
    let mut cycles = Vec::new();
    for ours in OURS {
        let Some(found) = shortest(units, ours) else { continue };
        // The same one goes through both.
        if seen.insert(found.iter().cloned().collect::<BTreeSet<_>>()) {
            let drop_ins = found.iter().filter_map(|unit| units.get(unit));
            cycles.push(Cycle {
                drop_ins: drop_ins.flat_map(|unit| unit.drop_ins.iter().cloned()).collect(),
                units: found,
            });
        }
    }
    cycles
}

/// From a unit on to what it comes after, until it meets itself.
fn shortest(units: &BTreeMap<String, Unit>, start: &str) -> Option<Vec<String>> {
    let mut from: BTreeMap<&str, &str> = BTreeMap::new();
    let mut next = VecDeque::from([start]);
    while let Some(at) = next.pop_front() {
        for after in units.get(at).into_iter().flat_map(|unit| &unit.after) {
            if after == start {
                let mut back = vec![at.to_owned()];
                let mut at = at;
                while let Some(before) = from.get(at) {
                    back.push((*before).to_owned());
                    at = before;
                }
                back.reverse();
                return Some(back);
            }
            if units.contains_key(after) && !from.contains_key(after.as_str()) {
                from.insert(after, at);
                next.push_back(after);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONLINE: &str = "network-online.target: enforcer.service network.target";

    /// Units with what they come after, as drop-ins may have changed it; and the cycles that are found.
    fn check(early: &str, daemon: &str, others: &[&str], expected: &[&str]) {
        let early = format!("enforcer-early.service: {early}");
        let daemon = format!("enforcer.service: enforcer-early.service network.target {daemon}");
        let units = [early.as_str(), &daemon, "network.target: network-pre.target"];
        let shown = |unit: &str| {
            let (id, after) = unit.split_once(": ").unwrap_or_default();
            format!("Id={id}\nAfter={after}\nLoadState=loaded\nDropInPaths=\n\n")
        };
        let mut text: String = units.iter().chain(others).map(|unit| shown(unit)).collect();
        // What is not there is not started.
        text.push_str("Id=agent.service\nAfter=enforcer.service\nLoadState=not-found\n\n");
        let cycles = find(&parse(&text)).into_iter().map(|cycle| cycle.units.join(" "));
        assert_eq!(cycles.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_cycle_is_found_however_long_it_is() {
        check("-.mount", "", &[ONLINE], &[]);
        let direct = "enforcer.service network-online.target";
        check("", "network-online.target", &[ONLINE], &[direct]);
        // Users by a name service that waits for the network.
        let others = [
            ONLINE,
            "nss-user-lookup.target: winbind.service",
            "winbind.service: network-online.target",
        ];
        let by_users = "enforcer.service nss-user-lookup.target winbind.service network-online.target";
        check("", "nss-user-lookup.target", &others, &[by_users]);
        // The state on a network mount, which both wait for.
        let state = "var-lib-enforcer.mount";
        let by_mount = [
            "enforcer-early.service var-lib-enforcer.mount network-online.target enforcer.service",
            "enforcer.service var-lib-enforcer.mount network-online.target",
        ];
        let mount = "var-lib-enforcer.mount: network-online.target";
        check(state, state, &[ONLINE, mount], &by_mount);
        // A cycle of others is theirs.
        let others = ["a.service: b.service", "b.service: a.service"];
        check("", "agent.service a.service", &others, &[]);
    }

    #[test]
    fn drop_ins_are_named() {
        let text =
            "Id=enforcer.service\nAfter=enforcer.service\nLoadState=loaded\nDropInPaths=/etc/x.conf /etc/y.conf\n";
        let drop_ins: Vec<_> = find(&parse(text))
            .into_iter()
            .flat_map(|cycle| cycle.drop_ins)
            .collect();
        assert_eq!(drop_ins, ["/etc/x.conf", "/etc/y.conf"]);
    }
}
