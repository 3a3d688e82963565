//! What a guest runs: named parts of the privileged suite, each with a backend, for each layout of the cgroup
//! hierarchies.

use std::collections::BTreeMap;

use serde::Serialize;

use super::table::Entry;

/// What the guest reads.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Plan {
    pub(super) modules: Vec<String>,
    /// A device with a system of its own to go on with.
    pub(super) root: Option<String>,
    pub(super) lacks: Vec<String>,
    pub(super) hierarchies: Vec<Phase>,
    pub(super) arguments: Vec<String>,
    /// How many times slower than a machine it may be.
    pub(super) slowness: u32,
    pub(super) shell: bool,
}

impl Plan {
    /// A guest for each layout, with its name; one for all where somebody is to look around in it.
    pub(super) fn apart(self) -> Vec<(&'static str, Self)> {
        if self.shell {
            return vec![("all", self)];
        }
        let one = |phase: &Phase| {
            let hierarchies = vec![phase.clone()];
            (
                phase.name,
                Self {
                    hierarchies,
                    ..self.clone()
                },
            )
        };
        self.hierarchies.iter().map(one).collect()
    }
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Phase {
    pub(super) name: &'static str,
    pub(super) lacks: Vec<String>,
    pub(super) suites: Vec<Part>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Part {
    /// Name and backend.
    pub(super) name: String,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) arguments: Vec<String>,
}

/// A part of the suite.
#[derive(Debug)]
pub(super) struct Suite {
    pub(super) name: &'static str,
    /// What enforces, as the column says; cases that say so themselves use others besides.
    pub(super) backend: &'static str,
    /// Names of cases, and beginnings of names.
    cases: &'static [&'static str],
    /// Where all of them run, and where only some.
    layouts: &'static [&'static str],
    /// Without these it cannot run, or with `!` before it, where it is there: what is expected then is a case of suite
    /// `kernel`.
    needs: &'static [&'static str],
}

const ALL: &[&str] = &["unified", "hybrid", "none"];
const BPF: &[&str] = &["bpf", "cgroup2"];

/// The layouts, and what is lacking with each.
pub(super) const LAYOUTS: [(&str, &[&str]); 3] = [("unified", &[]), ("hybrid", &[]), ("none", &["cgroup2"])];
/// The layout that systemd makes, in a guest that has one.
pub(super) const SYSTEMD: &str = "systemd";

/// What every run has: well under a minute a guest, under emulation, where loading the programs takes seconds. So every
/// way in and every mixture of users is tried on one rule set; `--full` loads one for each.
pub(super) const SUITES: [Suite; 7] = [
    Suite {
        name: "kernel",
        backend: "auto",
        cases: &[
            "kernel_*",
            "s5_auto_takes_what_the_kernel_has",
            "s5_a_backend_that_cannot_be_is_refused",
        ],
        layouts: ALL,
        needs: &[],
    },
    Suite {
        name: "ways",
        backend: "ebpf",
        cases: &["d2_d4_d5_every_way_of_one_rule_set"],
        layouts: &["unified"],
        needs: BPF,
    },
    Suite {
        name: "users",
        backend: "ebpf",
        cases: &[
            "d3_everybody_of_one_rule_set",
            "principal_within_cgroup",
            "b5_rules_of_jobs_open_nothing_else",
        ],
        layouts: &["unified"],
        needs: BPF,
    },
    Suite {
        name: "places",
        backend: "ebpf",
        cases: &["d2_d4_d5_root_cgroup_way_Mapped", "d3_cgroup_v1_is_no_way_out", "d6_*"],
        layouts: &["hybrid"],
        needs: BPF,
    },
    Suite {
        name: "restart",
        backend: "ebpf",
        cases: &["f1_enforcement_outlives_the_daemon", "f5_a_link_taken_away_comes_back"],
        layouts: &["unified"],
        needs: BPF,
    },
    Suite {
        name: "ways, drift",
        backend: "nftables",
        cases: &["d2_d4_d5_every_way_of_one_rule_set", "f5_nftables_drift_is_mended"],
        layouts: &["unified", "none"],
        needs: &[],
    },
    Suite {
        name: "both",
        backend: "both",
        cases: &["s5_both_is_refused_by_each"],
        layouts: &["unified"],
        needs: BPF,
    },
];

/// The whole suite, with `--full`: what the layouts of hierarchies make of it is told by the parts above.
pub(super) const WHOLE: [Suite; 3] = [
    Suite {
        name: "all",
        backend: "ebpf",
        cases: &[],
        layouts: &["unified"],
        needs: BPF,
    },
    Suite {
        name: "all",
        backend: "nftables",
        cases: &[],
        layouts: &["unified"],
        needs: BPF,
    },
    Suite {
        name: "all",
        backend: "auto",
        cases: &[],
        layouts: &["unified"],
        needs: &["!bpf"],
    },
];

impl Suite {
    /// The column's name.
    pub(super) fn title(&self) -> String {
        format!("{} {}", self.name, self.backend)
    }

    /// The run of the suite that its cases are taken from; those about the choice alone say themselves what they ask
    /// for.
    fn run(&self) -> &'static str {
        match self.backend {
            "auto" if self.cases.is_empty() => "auto-without-bpf",
            "auto" => "nftables",
            backend => backend,
        }
    }

    /// Whether it has a cell in this row.
    fn runs(&self, layout: &str, lacks: &[String]) -> bool {
        let has = |thing: &str| !lacks.iter().any(|lack| lack == thing);
        let met = |need: &&str| need.strip_prefix('!').map_or_else(|| has(need), |absent| !has(absent));
        self.layouts.contains(&layout) && self.needs.iter().all(met)
    }
}

/// What one kernel's guest is to do.
pub(super) fn plan(entry: &Entry, suites: &[Suite], backends: &[String], filter: Option<&str>, shell: bool) -> Plan {
    let layouts = LAYOUTS
        .iter()
        .filter(|(layout, _)| entry.layouts.is_empty() || entry.layouts.iter().any(|wanted| wanted == layout));
    let phases = layouts.map(|&(layout, missing)| {
        let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
        let lacks = [entry.lacks.clone(), missing.clone()].concat();
        let wanted = suites
            .iter()
            .filter(|suite| suite.runs(layout, &lacks))
            .filter(|suite| backends.is_empty() || backends.iter().any(|backend| backend == suite.backend));
        let part = |suite: &Suite| Part {
            name: suite.title(),
            environment: BTreeMap::from([("ENFORCER_TEST_CASES".to_owned(), suite.cases.join(","))]),
            arguments: vec!["--backend".to_owned(), suite.run().to_owned()],
        };
        Phase {
            name: layout,
            lacks: missing,
            suites: wanted.map(part).collect(),
        }
    });
    Plan {
        modules: Vec::new(),
        root: None,
        lacks: entry.lacks.clone(),
        hierarchies: phases.filter(|phase| !phase.suites.is_empty()).collect(),
        arguments: filter.map(str::to_owned).into_iter().collect(),
        slowness: 1,
        shell,
    }
}
