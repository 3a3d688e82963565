//! F3, F4, §5: what a kernel or a container does not give: BPF, `nf_tables`, rights, room, one half of two. An error
//! that names it, and what was active still is.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};

use super::{Case, case, nftables::Guarded};
use crate::{
    backend::{BOTH, NFTABLES},
    foreign::{ForeignProgram, Sharing},
    kernel::Feature,
    world::{NOBODY, Ran, ran, whole_binary},
};

/// Takes system calls away.
const SECCOMP: &[Feature] = &[Feature::Seccomp];

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("s5_auto_without_bpf_eperm", || auto("eperm", "not permitted"))
            .on(NFTABLES)
            .needs(SECCOMP),
        case("s5_auto_without_bpf_enosys", || auto("enosys", "not implemented"))
            .on(NFTABLES)
            .needs(SECCOMP),
        case!(s5_auto_with_neither_says_both_causes).on(NFTABLES).needs(SECCOMP),
        case!(f4_nftables_missing).on(NFTABLES).needs(SECCOMP),
        case!(f4_nftables_forbidden).on(NFTABLES),
        case!(f3_f4_nftables_answers_that_do_not_fit)
            .on(NFTABLES)
            .needs(SECCOMP),
        case("f4_both_without_nftables", || {
            one_half(&["--no-netfilter"], "nftables", "not supported")
        })
        .on(BOTH),
        case("f4_both_without_bpf", || {
            one_half(&["--no-bpf", "eperm"], "ebpf", "not permitted")
        })
        .on(BOTH),
        case!(f4_both_its_ebpf_half_cannot_attach).on(BOTH),
        case!(f4_both_beyond_a_limit).on(BOTH),
    ]
}

/// `apply` by a process from which some system calls were taken.
fn confined(guarded: &Guarded, without: &[&str]) -> Result<Ran> {
    let mut command = guarded.netns.command(&whole_binary("confined")?);
    command.args(without).arg("--").arg(whole_binary("enforcer")?);
    command.arg("--config").arg(guarded.world.path("enforcer.toml"));
    ran(command.arg("apply"))
}

/// One error of one line that says all of this.
fn says(failed: &Ran, words: &[&str]) -> Result<()> {
    let errors: Vec<&str> = failed.stderr.lines().filter(|line| !line.contains(" WARN ")).collect();
    ensure!(
        failed.code == 2 && errors.len() == 1 && words.iter().all(|word| failed.stderr.contains(word)),
        "not {words:?}: {failed:?}"
    );
    Ok(())
}

fn here(guarded: &Guarded) -> [String; 1] {
    [format!("tcp://{}", guarded.world.here())]
}

/// Asks for rules that would let anybody in, if they came into force.
fn ask_to_open(guarded: &Guarded, backend: &str) -> Result<()> {
    guarded.configure(backend, &here(guarded), &format!("[\"root\", {NOBODY}]"))
}

fn auto(errno: &str, cause: &str) -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.attack(NOBODY)?.reaches()?;
    guarded.configure("auto", &here(&guarded), r#"["root"]"#)?;
    let applied = confined(&guarded, &["--no-bpf", errno])?.demand(0)?;
    ensure!(
        applied.stderr.contains("auto chose nftables") && applied.stderr.contains(cause),
        "{applied:?}"
    );
    let status = guarded.status()?;
    ensure!(status["backend"] == "nftables", "{status}");
    guarded.attack(NOBODY)?.is_reset()?;
    guarded.attack(0)?.reaches()
}

fn s5_auto_with_neither_says_both_causes() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.configure("auto", &here(&guarded), r#"["root"]"#)?;
    let failed = confined(&guarded, &["--no-bpf", "eperm", "--no-netfilter"])?;
    says(&failed, &["ebpf: ", "nftables: ", "not permitted", "not supported"])?;
    guarded.attack(NOBODY)?.reaches()
}

fn f4_nftables_missing() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("nftables")?;
    ask_to_open(&guarded, "nftables")?;
    let failed = confined(&guarded, &["--no-netfilter"])?;
    says(
        &failed,
        &[
            guarded.world.name(),
            "open a netlink socket",
            "not supported",
            "load its module",
            "ebpf",
        ],
    )?;
    guarded.attack(NOBODY)?.is_reset()?;
    guarded.attack(0)?.reaches()
}

fn f4_nftables_forbidden() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("nftables")?;
    ask_to_open(&guarded, "nftables")?;
    let mut command = guarded.netns.command("setpriv".as_ref());
    command
        .args(["--bounding-set=-net_admin", "--"])
        .arg(whole_binary("enforcer")?);
    command.arg("--config").arg(guarded.world.path("enforcer.toml"));
    says(
        &ran(command.arg("apply"))?,
        &[guarded.world.name(), "not permitted", "CAP_NET_ADMIN"],
    )?;
    guarded.attack(NOBODY)?.is_reset()?;
    guarded.attack(0)?.reaches()
}

/// The kernel's acknowledgements of a rule set are more than a socket of the usual size holds, and it may not be made
/// larger.
fn f3_f4_nftables_answers_that_do_not_fit() -> Result<()> {
    // So many that the answers do not fit, and so few that the messages do.
    const TARGETS: u32 = 40;
    let guarded = Guarded::new()?;
    guarded.guard("nftables")?;
    let generation = guarded.status()?["generation"].clone();
    let many = |targets: u32| -> Result<()> {
        let mut text = format!(
            "backend = \"nftables\"\n[target.main]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\", {NOBODY}]\n",
            guarded.world.here()
        );
        for target in 1..targets {
            text.push_str(&format!(
                "[target.t{target}]\nendpoints = [\"tcp://10.7.0.{target}:1\"]\nallow = [\"root\"]\n"
            ));
        }
        guarded.world.configure(&text)
    };
    many(TARGETS)?;
    let failed = confined(&guarded, &["--small-buffers"])?;
    says(&failed, &[guarded.world.name(), "buffer"])?;
    guarded.attack(NOBODY)?.is_reset()?;
    guarded.attack(0)?.reaches()?;
    ensure!(guarded.status()?["generation"] == generation, "{}", guarded.status()?);
    // With buffers as large as it asks for, the same rule set comes into force whole.
    guarded.apply()?;
    guarded.attack(NOBODY)?.reaches()?;
    let status = guarded.status()?;
    ensure!(
        status["endpoints"] == TARGETS && status["causes"] == serde_json::json!([]),
        "{status}"
    );
    Ok(())
}

/// Both halves active, then a rule set asked for by a process that can have but one of them.
fn one_half(without: &[&str], half: &str, cause: &str) -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("both")?;
    let generation = guarded.status()?["generation"].clone();
    ask_to_open(&guarded, "both")?;
    let failed = confined(&guarded, without)?;
    says(&failed, &[&format!("the {half} half"), cause])?;
    stays_as_it_was(&guarded, &generation)
}

fn stays_as_it_was(guarded: &Guarded, generation: &serde_json::Value) -> Result<()> {
    // eBPF's, and out of its cgroup nftables'.
    guarded.attack(NOBODY)?.is_forbidden()?;
    guarded.attack(NOBODY)?.anywhere().is_reset()?;
    guarded.attack(0)?.reaches()?;
    let status = guarded.status()?;
    ensure!(status["generation"] == *generation, "{status}");
    Ok(())
}

/// nftables takes the rule set first; when eBPF then cannot, it is taken back.
fn f4_both_its_ebpf_half_cannot_attach() -> Result<()> {
    let guarded = Guarded::new()?;
    let _theirs = ForeignProgram::passing(&guarded.world.cgroup, Sharing::None).context("attach another program")?;
    guarded.configure("both", &here(&guarded), "[]")?;
    let failed = guarded.netns.enforcer(&guarded.world, &["apply"])?;
    says(&failed, &["the ebpf half", "connect4", "sharing"])?;
    guarded.attack(0)?.reaches()?;
    guarded.attack(0)?.anywhere().reaches()?;
    let tables = guarded.netns.nft("list tables")?;
    ensure!(!tables.contains(guarded.world.name()), "a table was left: {tables}");
    // Where there was a rule set before, it is that one again.
    guarded.configure("nftables", &here(&guarded), r#"["root"]"#)?;
    guarded.apply()?;
    ask_to_open(&guarded, "both")?;
    let failed = guarded.netns.enforcer(&guarded.world, &["apply"])?;
    says(&failed, &["the ebpf half", "connect4"])?;
    guarded.attack(NOBODY)?.is_reset()?;
    guarded.attack(0)?.reaches()
}

fn f4_both_beyond_a_limit() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.guard("both")?;
    let generation = guarded.status()?["generation"].clone();
    let port = guarded.world.port;
    let mut endpoints: Vec<String> = (0..16_385)
        .map(|number: u32| format!("tcp://{}/31:{port}", std::net::Ipv4Addr::from(0x0a00_0000 + 2 * number)))
        .collect();
    endpoints.extend(here(&guarded));
    guarded.configure("both", &endpoints, &format!("[\"root\", {NOBODY}]"))?;
    let failed = guarded.netns.enforcer(&guarded.world, &["apply"])?;
    says(&failed, &["16384", "prefixes"])?;
    stays_as_it_was(&guarded, &generation)?;
    fs::write(
        guarded.world.path("enforcer.toml"),
        "backend = \"both\"\n[target.main\n",
    )?;
    let mut command = Command::new(whole_binary("enforcer")?);
    command.arg("--config").arg(guarded.world.path("enforcer.toml"));
    says(&ran(command.arg("apply"))?, &["toml:2"])?;
    guarded.guard("both")
}
