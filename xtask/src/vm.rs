//! The privileged suite on other kernels, in virtual machines: fetch, boot, collect, report.

mod archive;
mod initramfs;
mod kernel;
mod machine;
mod plan;
mod report;
mod system;
mod table;

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args as Arguments;

use self::{
    initramfs::Initramfs,
    machine::{Outcome, Settings},
    report::Row,
    table::{Entry, Table},
};
use crate::{
    run::{has, target_dir},
    setup, suites,
};

/// How many times slower emulation may be, on a host that does other things besides.
const EMULATION: u32 = 50;
/// What the system with systemd runs on, unless told otherwise.
const SYSTEMD_KERNEL: &str = "6.1";

/// Arguments of `cargo xtask vm`.
#[derive(Debug, Arguments)]
pub(crate) struct Options {
    /// A kernel by its name in xtask/kernels.toml; may be given again [default: all]
    #[arg(long, value_name = "NAME")]
    kernel: Vec<String>,
    /// Only the parts of the suite in which this enforces; may be given again
    #[arg(long, value_parser = ["auto", "ebpf", "nftables", "both"])]
    backend: Vec<String>,
    /// The whole suite instead of a part that takes under a minute a guest
    #[arg(long)]
    full: bool,
    /// Give a shell in the guest on this terminal when the cases have run; needs --kernel
    #[arg(long)]
    keep: bool,
    /// Show the guests' consoles
    #[arg(long)]
    log: bool,
    /// Where the table's packages are gone from the archive, take its newest, by the archive's signature alone
    #[arg(long)]
    newest_if_gone: bool,
    /// Say what the archive has now, in the table's form, and run nothing
    #[arg(long)]
    list: bool,
    /// Write the table of what each kernel can do into README.md; without this, a run of all kernels compares it
    #[arg(long, conflicts_with = "systemd")]
    update_readme: bool,
    /// Where kernels are kept between runs [default: ~/.cache/enforcer-vm]
    #[arg(long, value_name = "DIRECTORY")]
    cache: Option<PathBuf>,
    /// Boot a system with systemd and live the package's life in it: install, restart, crash, upgrade, reboot, power cut, purge; on the
    /// named kernel, or 6.1
    #[arg(long)]
    systemd: bool,
    /// A package for --systemd, and given again the one to upgrade to [default: those of `cargo xtask package`, built first; with --debug
    /// those that are there]
    #[arg(long, value_name = "FILE", requires = "systemd")]
    deb: Vec<PathBuf>,
    /// Memory of a guest in MiB
    #[arg(long, default_value_t = 1024)]
    memory: u32,
    /// Seconds of silence after which a guest hangs
    #[arg(long, default_value_t = 120)]
    patience: u64,
    /// Boot with KVM, where it works, instead of emulation
    #[arg(long)]
    kvm: bool,
    /// Boot what `cargo build` made instead of the release build
    #[arg(long)]
    debug: bool,
    /// Run only cases whose name contains this, of the whole suite
    #[arg(last = true)]
    filter: Option<String>,
}

/// Runs what was asked for; an error if anything is not green.
pub(crate) fn run(options: &Options) -> Result<()> {
    let table = Table::read()?;
    let names = if options.systemd && options.kernel.is_empty() {
        vec![SYSTEMD_KERNEL.to_owned()]
    } else {
        options.kernel.clone()
    };
    let entries = table.chosen(&names)?;
    ensure!(
        !options.keep || entries.len() == 1,
        "--keep gives one shell: name one kernel with --kernel"
    );
    let cache = options.cache.clone().map_or_else(default_cache, Ok)?;
    fs::create_dir_all(&cache).with_context(|| format!("make {}; name another place with --cache", cache.display()))?;
    setup::vm(options.systemd)?;
    if options.list {
        return list(&table, &entries, &cache);
    }
    let started = Instant::now();
    if !options.debug {
        suites::build()?;
    }
    let packages = options
        .systemd
        .then(|| system::Packages::find(&options.deb, options.debug))
        .transpose()?;
    let binaries = target_dir().join(if options.debug { "debug" } else { "release" });
    let mut dir = target_dir().join("vm");
    if options.systemd {
        dir.push("systemd");
    }
    fs::create_dir_all(&dir)?;
    let mut rows = Vec::new();
    for entry in &entries {
        let outcome = guest(&table, entry, packages.as_ref(), &cache, &binaries, &dir, options);
        let outcome = outcome.map_err(|error| format!("{error:#}"));
        if let Err(why) = &outcome {
            eprintln!("vm: {}: {why}", entry.name);
        }
        rows.push(Row {
            entry: entry.clone(),
            outcome,
        });
    }
    report::write(&rows, &dir, started.elapsed())?;
    println!(
        "vm: {} kernels in {:.0} s; {} and junit.xml beside it",
        rows.len(),
        started.elapsed().as_secs_f64(),
        dir.join("matrix.md").display()
    );
    let red: Vec<&str> = rows
        .iter()
        .filter(|row| !row.is_green())
        .map(|row| row.entry.name.as_str())
        .collect();
    ensure!(red.is_empty(), "not green: {}", red.join(", "));
    let cases: usize = rows.iter().filter_map(|row| row.outcome.as_ref().ok()).map(cases).sum();
    ensure!(cases > 0, "no case was run: none has {:?} in its name", options.filter);
    let whole = names.is_empty() && options.backend.is_empty() && options.filter.is_none();
    if whole || options.update_readme {
        report::readme(&rows, options.update_readme)?;
    }
    Ok(())
}

fn cases(outcome: &Outcome) -> usize {
    outcome.cells.iter().map(|cell| cell.cases.len()).sum()
}

/// One kernel's guest.
fn guest(
    table: &Table,
    entry: &Entry,
    packages: Option<&system::Packages>,
    cache: &Path,
    binaries: &Path,
    dir: &Path,
    options: &Options,
) -> Result<Outcome> {
    let kernel = kernel::obtain(table, entry, cache, options.newest_if_gone)?;
    let dir = dir.join(&entry.name);
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let mut settings = Settings {
        kvm: options.kvm,
        memory: options.memory,
        log: options.log,
        shell: options.keep,
        disk: None,
        patience: Duration::from_secs(options.patience),
    };
    if let Some(packages) = packages {
        return system::run(table, &kernel, packages, cache, binaries, &dir, &settings);
    }
    let suites: &[plan::Suite] = if options.full || options.filter.is_some() {
        &plan::WHOLE
    } else {
        &plan::SUITES
    };
    let mut plan = plan::plan(entry, suites, &options.backend, options.filter.as_deref(), options.keep);
    let mut initramfs = Initramfs::new(binaries, &binaries.join("enforcer"))?;
    plan.modules = initramfs.modules(&kernel, &initramfs::MODULES)?;
    plan.slowness = if options.kvm { 2 } else { EMULATION };
    initramfs.text("plan.json", &serde_json::to_string_pretty(&plan)?)?;
    let file = dir.join("initramfs.cpio");
    initramfs.write(&file)?;
    eprintln!("vm: {}: boot", entry.name);
    let mut outcome = machine::run(&entry.name, &kernel.image, &file, &dir, &settings);
    if settings.kvm && outcome.as_ref().is_ok_and(|outcome| outcome.booted.is_none()) {
        eprintln!("vm: {}: KVM does not work here; boot under emulation", entry.name);
        settings.kvm = false;
        outcome = machine::run(&entry.name, &kernel.image, &file, &dir, &settings);
    }
    let _ = fs::remove_file(&file);
    outcome
}

/// What the archive has in the place of the table's packages.
fn list(table: &Table, entries: &[Entry], cache: &Path) -> Result<()> {
    let mut failed = Vec::new();
    for entry in entries {
        let newest =
            archive::Archive::new(table, &entry.suite, cache).and_then(|archive| archive.newest(&entry.packages));
        match newest {
            Ok(newest) => {
                let same = if newest == entry.packages {
                    "as in the table"
                } else {
                    "not as in the table"
                };
                println!("# {} ({}), {same}", entry.name, entry.suite);
                for package in newest {
                    println!(
                        "[[kernel.package]]\nname = {:?}\nversion = {:?}\nsha256 = {:?}\n",
                        package.name, package.version, package.sha256
                    );
                }
            }
            Err(error) => {
                eprintln!("vm: {}: {error:#}", entry.name);
                failed.push(entry.name.as_str());
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    bail!("not found out: {}", failed.join(", "))
}

fn default_cache() -> Result<PathBuf> {
    ensure!(
        has("qemu-system-x86_64") || has("apt-get"),
        "no QEMU and no apt-get to install it with; install qemu-system-x86"
    );
    let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")));
    Ok(base
        .context("neither HOME nor XDG_CACHE_HOME is set; name a place with --cache")?
        .join("enforcer-vm"))
}
