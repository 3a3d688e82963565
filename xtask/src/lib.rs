//! Every developer task; `cargo xtask --help` lists them. Empty where there is no Linux, so that `main` is built
//! anywhere and says so.

#![cfg(target_os = "linux")]

mod ci;
mod debian;
mod package;
mod pristine;
mod progress;
mod root;
mod run;
mod setup;
mod stock;
mod suites;
mod tidy;
mod vm;

use std::{env, path::PathBuf, process::ExitCode};

use anyhow::{Result, anyhow};
use clap::{Parser, Subcommand};

/// Developer tasks of enforcer.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Find or install all that building and testing need; does nothing when nothing is missing
    Setup {
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Show the main job on a real NATS server, then clean up
    Demo {
        /// What enforces: auto, ebpf, nftables or both
        #[arg(long, default_value = "auto", value_parser = ["auto", "ebpf", "nftables", "both"])]
        backend: String,
    },
    /// Run all tests: unit, property, and the privileged suite on each backend (as root, or through sudo)
    Test {
        /// Run only the privileged suite, on this backend: with `auto-without-bpf` every bpf(2) of enforcer fails
        #[arg(long, value_parser = suites::BACKENDS)]
        backend: Option<String>,
        /// Run only privileged cases whose name contains this
        filter: Option<String>,
    },
    /// Measure against the budgets, and what a user would pick instead, in one interleaved run (as root, or through
    /// sudo)
    ///
    /// Takes about half an hour on a machine that must be quiet; `--quick` takes minutes, and shows whether all can be
    /// measured. Options are those of the bench: parts by name (instructions, programs, traffic, forwarded, start,
    /// last-good, reload, update, idle), --quick, --json FILE, --plots DIR, --compare OLD.json, --from OLD.json.
    Bench {
        /// Options of the bench; `--help` after `--` explains them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Run the privileged suite on other kernels, in virtual machines
    ///
    /// Fetches kernels from Debian's archive (xtask/kernels.toml; 150 MB, kept in ~/.cache/enforcer-vm) and builds one
    /// without BPF, boots each under QEMU with the binary and the suite in an initramfs, and tells what passed where,
    /// in target/vm/matrix.md and junit.xml too. `cargo xtask vm --kernel 6.1 -- d3_who` runs one kernel's cases of
    /// that name; `--keep` then gives a shell there.
    Vm(vm::Options),
    /// Check format, lints, that the client library needs nothing but Rust, and what `tidy` checks, as CI does before
    /// the tests
    Ci,
    /// Check what no compiler does: rooms, guarantees, widths, lengths, crates, and that setup installs every program
    /// that is run
    Tidy {
        /// Print what xtask/tidy.toml would have to allow now
        #[arg(long)]
        ceilings: bool,
    },
    /// Run commands as a new user would: in a minimal system, in a clean clone of HEAD (as root)
    ///
    /// The system has this host's distribution and kernel, git, curl, certificates and rustup's toolchains without
    /// rust-src; crates and the virtual machines' kernels are shared with this host. Several commands share one system.
    Pristine {
        /// Shell commands; `@demo` and `@test` are those that the README shows [default: @demo @test]
        command: Vec<String>,
    },
    /// Build the Debian package, install it into a scratch root (as root, or through sudo) and check it there
    Package {
        /// Only build it
        #[arg(long)]
        build_only: bool,
    },
    /// The second half of `package`
    #[command(hide = true)]
    PackageCheck { package: PathBuf, next: PathBuf },
}

/// Runs the task that the command line names.
#[must_use]
pub fn run() -> ExitCode {
    if env::consts::ARCH != "x86_64" {
        return finish(Err(anyhow!("only x86-64 is supported; this is {}", env::consts::ARCH)));
    }
    let result = match Cli::parse().task {
        Task::Setup { dry_run } => setup::run(dry_run),
        Task::Demo { backend } => suites::demo(&backend),
        Task::Test { backend, filter } => suites::test(backend.as_deref(), filter.as_deref()),
        Task::Bench { options } => suites::bench(&options),
        Task::Vm(options) => vm::run(&options),
        Task::Ci => ci::run(),
        Task::Tidy { ceilings: true } => tidy::ceilings(),
        Task::Tidy { ceilings: false } => tidy::run(),
        Task::Pristine { command } => pristine::run(&command),
        Task::Package { build_only } => package::run(build_only),
        Task::PackageCheck { package, next } => package::check(&package, &next),
    };
    finish(result)
}

fn finish(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::from(2)
        }
    }
}
