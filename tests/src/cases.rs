//! The cases, by what they are about.

/// A case that has its function's name.
macro_rules! case {
    ($function:ident) => {
        $crate::cases::case(stringify!($function), $function)
    };
}

mod absent;
mod boot;
mod bosh;
mod bpm;
mod callers;
mod commands;
mod containers;
mod damage;
mod decision;
mod delegated;
mod detours;
mod dials;
mod doctor;
mod endurance;
mod escapes;
mod failover;
mod faults;
mod flood;
mod fragments;
mod grants;
mod hardship;
mod history;
mod impostors;
mod input;
mod jobs;
mod jobs_chain;
mod kernel;
mod kernel_sockets;
mod later;
mod lies;
mod limits;
mod many;
mod migration;
mod missing;
mod monit;
mod names;
mod neighbours;
mod nftables;
mod parity;
mod past_hooks;
mod places;
mod programs;
mod retention;
mod routes;
mod schemas;
mod squatting;
mod states;
mod subjects;
mod surfaces;
mod sweep;
mod switching;
mod table;
mod takeover;
mod translated;
mod units;
mod verify;
mod visibility;
mod whole_host;
mod writers;

use std::thread;

use anyhow::{Result, anyhow, ensure};

use crate::{
    backend::{ALIKE, Backend},
    kernel::{Feature, lacks},
};

/// A case: what it is about, on which backends, and what it does.
pub struct Case {
    /// Cites the guarantee.
    pub name: String,
    /// Runs of the suite that it is part of.
    pub on: &'static [Backend],
    /// What it cannot do without. What is so where the kernel lacks it is a case of its own.
    pub needs: &'static [Feature],
    /// Whether it takes so long that it should begin first: one that begins last keeps only one processor busy.
    pub long: bool,
    /// Fails with what is not as it should be.
    pub run: Box<dyn FnOnce() -> Result<()> + Send>,
}

impl Case {
    /// Of other runs of the suite than [`ALIKE`].
    fn on(self, on: &'static [Backend]) -> Self {
        Self { on, ..self }
    }

    /// Only where the kernel has all of these.
    fn needs(self, needs: &'static [Feature]) -> Self {
        Self { needs, ..self }
    }

    /// One that takes long.
    fn long(self) -> Self {
        Self { long: true, ..self }
    }

    /// What it needs and this kernel lacks; eBPF tells a task's cgroup without nftables' help.
    #[must_use]
    pub fn lacking(&self, run: Backend) -> Vec<Feature> {
        let counts = |feature: &Feature| run != Backend::Ebpf || *feature != Feature::SocketCgroup;
        let needs = self.needs.iter().copied().filter(counts);
        needs.filter(|feature| lacks(*feature)).collect()
    }

    /// Whether it is part of a run. Where there is no BPF, the run on what `auto` takes then has all that is about
    /// nftables.
    #[must_use]
    pub fn is_on(&self, run: Backend) -> bool {
        let instead = run == Backend::AutoWithoutBpf && lacks(Feature::Bpf);
        self.on.contains(&run) || instead && self.on.contains(&Backend::Nftables)
    }
}

/// Makes `all()`, but no `mod` items: rustfmt finds no files by those of a macro. Of a file that is not listed the
/// compiler says that nothing uses its cases.
macro_rules! files {
    ($($file:ident),*) => {
        /// All of them.
        #[must_use]
        pub fn all() -> Vec<Case> {
            [$($file::cases()),*].into_iter().flatten().collect()
        }
    };
}

files! {
    absent, boot, bosh, bpm, callers, commands, containers, damage, decision, delegated, detours, dials, doctor,
    endurance, escapes, failover, faults, flood, fragments, grants, hardship, history, impostors, input, jobs,
    jobs_chain, kernel, kernel_sockets, later, lies, limits, many, migration, missing, monit, names, neighbours,
    nftables, parity, past_hooks, places, programs, retention, routes, schemas, squatting, states, subjects, surfaces,
    sweep, switching, table, takeover, translated, units, verify, visibility, whole_host, writers
}

/// Of all cases those that some pattern names, the long ones first: a name, or the beginning of one and `*`. A pattern
/// that names none is an error.
pub fn chosen(patterns: &str) -> Result<Vec<Case>> {
    let patterns: Vec<&str> = patterns.split(',').filter(|pattern| !pattern.is_empty()).collect();
    let names = |pattern: &str, name: &str| match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == pattern,
    };
    let all = all();
    for pattern in &patterns {
        ensure!(
            all.iter().any(|case| names(pattern, &case.name)),
            "no case is named {pattern}"
        );
    }
    let is_chosen = |name: &str| patterns.is_empty() || patterns.iter().any(|pattern| names(pattern, name));
    let mut chosen: Vec<Case> = all.into_iter().filter(|case| is_chosen(&case.name)).collect();
    chosen.sort_by_key(|case| !case.long);
    Ok(chosen)
}

/// The same with each of several, at once: most of what it does must be to wait.
fn with_each<T, F>(several: impl IntoIterator<Item = T>, act: F) -> Result<()>
where
    T: Send,
    F: Fn(T) -> Result<()> + Sync,
{
    let act = &act;
    thread::scope(|scope| {
        let started: Vec<_> = several.into_iter().map(|one| scope.spawn(move || act(one))).collect();
        for one in started {
            one.join().map_err(|_| anyhow!("a part of the case panicked"))??;
        }
        Ok(())
    })
}

/// A case that holds whatever enforces. Where the two differ (§5) it asserts the outcome of each.
fn case(name: &str, run: impl FnOnce() -> Result<()> + Send + 'static) -> Case {
    Case {
        name: name.to_owned(),
        on: ALIKE,
        needs: &[],
        long: false,
        run: Box::new(run),
    }
}
