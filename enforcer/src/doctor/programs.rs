//! BPF programs at the hooks of ours, on the same cgroup and on those above it: third-party ones, and those of another
//! instance of enforcer.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::findings::{Findings, Gaps};
use crate::{
    backend::third_party::{self, Attached, PinDir},
    wire::{
        ActiveBackend,
        doctor::Weight::{High, Medium},
    },
};

/// A program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) hook: &'static str,
    pub(super) cgroup: PathBuf,
    /// Whether it runs when ours has decided.
    pub(super) after: bool,
    pub(super) attached: Attached,
    pub(super) owner: Owner,
}

/// Whose a program is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    ThirdParty,
    /// Another instance of enforcer, where a process follows its rules.
    Instance,
    /// One that nobody follows: its pins, where they are found.
    Left(Option<PathBuf>),
}

impl Owner {
    fn of(program: u32, pin_dirs: &[PinDir]) -> Self {
        if !third_party::is_enforcers(program) {
            return Self::ThirdParty;
        }
        let mut of_it = pin_dirs.iter().filter(|dir| dir.programs.contains(&program));
        match of_it.next() {
            Some(dir) if dir.daemon.is_some() => Self::Instance,
            found => Self::Left(found.map(|dir| dir.path.clone())),
        }
    }
}

pub(super) fn collect(cgroup: Option<&Path>, pin_dir: &Path, gaps: &mut Gaps) -> Vec<Program> {
    let is_cgroup = |path: &&Path| statfs(*path).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC);
    let ancestors = cgroup.into_iter().flat_map(Path::ancestors).take_while(is_cgroup);
    let ancestors: Vec<&Path> = ancestors.collect();
    let pin_dirs = gaps
        .saw("pins of other instances", third_party::pin_dirs())
        .unwrap_or_default();
    let mut programs = Vec::new();
    for hook in third_party::hooks() {
        let ours = third_party::our_program(pin_dir, hook);
        for (depth, path) in ancestors.iter().enumerate() {
            let what = format!("programs of {} on {}", hook.name, path.display());
            let found = gaps.saw(&what, third_party::programs(path, hook)).unwrap_or_default();
            let position = found.iter().position(|one| Some(one.id) == ours);
            // Those of ancestors run later. Before ours are all that were attached earlier, and those that ask for it
            // (`BPF_F_PREORDER`).
            let runs_after = |index| depth > 0 || position.is_some_and(|ours| index > ours);
            let others = found.into_iter().enumerate();
            let others = others.filter(|(index, _)| depth > 0 || position != Some(*index));
            programs.extend(others.map(|(index, attached)| Program {
                hook: hook.name,
                cgroup: path.to_path_buf(),
                after: !attached.preorder && runs_after(index),
                owner: Owner::of(attached.id, &pin_dirs),
                attached,
            }));
        }
    }
    programs
}

/// What such a program does the kernel does not say. It may write the destination, or another verdict
/// (`bpf_set_retval`).
pub(super) fn findings(programs: &[Program], enforces: ActiveBackend, findings: &mut Findings) {
    left_behind(programs, findings);
    if !enforces.has_ebpf() {
        return;
    }
    let shown = |one: &Program| {
        let Attached { id, name, preorder, .. } = &one.attached;
        let name = if name.is_empty() { "without a name" } else { name };
        let order = if *preorder { " (BPF_F_PREORDER)" } else { "" };
        format!(
            "{} on {}: program {name}, id {id}{order}",
            one.hook,
            one.cgroup.display()
        )
    };
    let theirs = programs.iter().filter(|one| one.owner == Owner::ThirdParty);
    let of = |after| theirs.clone().filter(move |one| one.after == after).map(shown);
    findings.each(
        "program-after",
        High,
        "third-party BPF programs run after enforcer's: they can undo a denial, or redirect an allowed connection to a \
         protected endpoint",
        of(true),
        "find the owner (bpftool prog show id ID, bpftool cgroup show); attach it before enforcer or to a cgroup \
         below, or set backend = \"both\", which evaluates the packets that result",
    );
    findings.each(
        "program-before",
        Medium,
        "third-party BPF programs run before enforcer's: they can deny what is allowed, or redirect connections to an \
         endpoint so that enforcer evaluates another destination",
        of(false),
        "check what it does (bpftool prog dump xlated id ID): where it redirects an endpoint, add the address behind \
         it to the endpoints",
    );
}

/// Rules that an earlier place has kept, or another instance without a daemon.
fn left_behind(programs: &[Program], findings: &mut Findings) {
    let places: BTreeSet<(Option<&PathBuf>, String)> = programs
        .iter()
        .filter_map(|one| match &one.owner {
            Owner::ThirdParty | Owner::Instance => None,
            Owner::Left(dir) => Some((dir.as_ref(), format!("{} on {}", one.hook, one.cgroup.display()))),
        })
        .collect();
    let dirs: BTreeSet<Option<&PathBuf>> = places.iter().map(|(dir, _)| *dir).collect();
    let item = |dir: Option<&PathBuf>| {
        let hooks: Vec<&str> = places
            .iter()
            .filter(|(of, _)| *of == dir)
            .map(|(_, hook)| hook.as_str())
            .collect();
        let place = dir.map_or_else(
            || "pins on no bpffs that is mounted here".to_owned(),
            |dir| format!("pins in {}", dir.display()),
        );
        format!("{place}: {}", hooks.join(", "))
    };
    let removals: Vec<String> = dirs
        .iter()
        .copied()
        .flatten()
        .map(|dir| format!("rm -r {}", dir.display()))
        .collect();
    let remove = if removals.is_empty() {
        "look for them in other mount namespaces".to_owned()
    } else {
        removals.join("; ")
    };
    findings.each(
        "other-instance",
        Medium,
        "programs of another instance of enforcer are active, and no daemon follows its rules: they deny what these \
         rules no longer do",
        dirs.into_iter().map(item),
        &format!(
            "if they remain of an earlier pin_dir, remove the pins, which ends their rules and no others ({remove}); \
             else start the daemon of that instance"
        ),
    );
}
