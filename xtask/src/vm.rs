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
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread::{self, available_parallelism},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args as Arguments;
use indicatif::MultiProgress;

use self::{
    initramfs::Initramfs,
    kernel::Kernel,
    machine::{Outcome, Settings},
    report::Row,
    table::{Entry, Table},
};
use crate::{
    run::{cache_dir, target_dir},
    setup::{
        self,
        packages::{self, Package},
    },
    suites,
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
    /// Leave out, and say so, a kernel that would have to be built and is not in the cache: that takes six minutes
    #[arg(long)]
    no_build: bool,
    /// Say what the archive has now, in the table's form, and run nothing
    #[arg(long)]
    list: bool,
    /// Write the table of what each kernel can do into README.md; without this, a run of all kernels compares it
    #[arg(long, conflicts_with = "systemd")]
    update_readme: bool,
    /// Where kernels are kept between runs [default: ~/.cache/enforcer-vm]
    #[arg(long, value_name = "DIRECTORY")]
    cache: Option<PathBuf>,
    /// Boot a system with systemd and live the package's life in it: install, restart, crash, upgrade, reboot, power
    /// cut, soft reboot, purge; on the named kernel, or 6.1
    #[arg(long)]
    systemd: bool,
    /// A package for --systemd, and given again the one to upgrade to [default: those of `cargo xtask package`, built
    /// first; with --debug those that are there]
    #[arg(long, value_name = "FILE", requires = "systemd")]
    deb: Vec<PathBuf>,
    /// Guests that run at once [default: one for every processor, with --kvm for every two; one with --log, --keep or
    /// --systemd]
    #[arg(long, short, value_name = "NUMBER")]
    jobs: Option<usize>,
    /// Memory of a guest in MiB [default: 1024, and 3072 with --full]
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// Seconds of silence after which a guest hangs [default: 300, and 900 with --full, which has long cases]
    #[arg(long, value_name = "SECONDS")]
    patience: Option<u64>,
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
    let cache = options
        .cache
        .clone()
        .map_or_else(|| cache_dir("enforcer-vm").context("name a place with --cache"), Ok)?;
    fs::create_dir_all(&cache).with_context(|| format!("make {}; name another place with --cache", cache.display()))?;
    let disk: &[&[Package]] = if options.systemd { &[packages::DISK] } else { &[] };
    setup::also(&[&[packages::VM], disk].concat())?;
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
    let settings = Settings {
        kvm: options.kvm,
        memory: options.memory.unwrap_or(if options.full { 3072 } else { 1024 }),
        log: options.log,
        shell: options.keep,
        parameters: String::new(),
        disk: None,
        patience: Duration::from_secs(options.patience.unwrap_or(if options.full { 900 } else { 300 })),
        progress: MultiProgress::new(),
    };
    // One after the other: they share an archive, and building one takes all processors.
    let ways = kernel::Ways {
        newest: options.newest_if_gone,
        build: !options.no_build,
    };
    let (mut kernels, mut left_out) = (Vec::new(), Vec::new());
    for entry in entries {
        match kernel::obtain(&table, &entry, &cache, ways).transpose() {
            Some(kernel) => kernels.push((entry, kernel)),
            None => left_out.push(entry.name),
        }
    }
    if !left_out.is_empty() {
        eprintln!(
            "vm: LEFT OUT, not tested: {}, which would have to be built (--no-build)",
            left_out.join(", ")
        );
    }
    let ground = Ground {
        table: &table,
        cache: &cache,
        binaries: &binaries,
        dir: &dir,
        packages: packages.as_ref(),
        settings: &settings,
    };
    let rows = at_once(options.jobs(), kernels, |(entry, kernel)| {
        let outcome = kernel.and_then(|kernel| guest(&ground, &entry, &kernel, options));
        let outcome = outcome.map_err(|error| format!("{error:#}"));
        if let Err(why) = &outcome {
            settings.progress.suspend(|| eprintln!("vm: {}: {why}", entry.name));
        }
        Row { entry, outcome }
    });
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
    let whole = names.is_empty() && left_out.is_empty() && options.backend.is_empty() && options.filter.is_none();
    if whole || options.update_readme {
        report::readme(&rows, options.update_readme)?;
    }
    Ok(())
}

impl Options {
    /// How many guests run at once: one where its console is shown or the terminal is its own.
    fn jobs(&self) -> usize {
        if self.log || self.keep || self.systemd {
            return 1;
        }
        let processors = available_parallelism().map_or(1, usize::from);
        self.jobs.unwrap_or(if self.kvm { processors / 2 } else { processors })
    }
}

/// Does something with each, so many at a time. What comes of it in their order.
fn at_once<T: Send, R: Send>(jobs: usize, all: Vec<T>, act: impl Fn(T) -> R + Sync) -> Vec<R> {
    let done = Mutex::new(Vec::new());
    let waiting = Mutex::new(all.into_iter().enumerate());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some((place, one)) = next() {
                    let result = act(one);
                    done.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((place, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}

fn cases(outcome: &Outcome) -> usize {
    outcome.cells.iter().map(|cell| cell.cases.len()).sum()
}

/// What all guests of a run have in common.
struct Ground<'a> {
    table: &'a Table,
    cache: &'a Path,
    binaries: &'a Path,
    dir: &'a Path,
    packages: Option<&'a system::Packages>,
    settings: &'a Settings,
}

/// One kernel's guest.
fn guest(ground: &Ground<'_>, entry: &Entry, kernel: &Kernel, options: &Options) -> Result<Outcome> {
    let &Ground {
        table,
        cache,
        binaries,
        settings,
        ..
    } = ground;
    let dir = ground.dir.join(&entry.name);
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    if let Some(packages) = ground.packages {
        return system::run(table, kernel, packages, cache, binaries, &dir, settings);
    }
    let suites: &[plan::Suite] = if options.full || options.filter.is_some() {
        &plan::WHOLE
    } else {
        &plan::SUITES
    };
    let mut plan = plan::plan(entry, suites, &options.backend, options.filter.as_deref(), options.keep);
    let mut initramfs = Initramfs::new(binaries, &binaries.join("enforcer"))?;
    plan.modules = initramfs.modules(kernel, &initramfs::MODULES)?;
    plan.slowness = if options.kvm { 2 } else { EMULATION };
    let mut settings = settings.clone();
    settings.parameters.clone_from(&entry.parameters);
    let mut all = Outcome::default();
    for (layout, plan) in plan.apart() {
        let dir = dir.join(layout);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let mut initramfs = initramfs.clone();
        initramfs.text("plan.json", &serde_json::to_string_pretty(&plan)?)?;
        let file = dir.join("initramfs.cpio");
        initramfs.write(&file)?;
        let say = |text: &str| settings.progress.suspend(|| eprintln!("vm: {}: {text}", entry.name));
        say(&format!("boot, {layout}"));
        let mut outcome = machine::run(&entry.name, &kernel.image, &file, &dir, &settings);
        if settings.kvm && outcome.as_ref().is_ok_and(|outcome| outcome.booted.is_none()) {
            say("KVM does not work here; boot under emulation");
            settings.kvm = false;
            outcome = machine::run(&entry.name, &kernel.image, &file, &dir, &settings);
        }
        let _ = fs::remove_file(&file);
        all.add(outcome?);
    }
    Ok(all)
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
