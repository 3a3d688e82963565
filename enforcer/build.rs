//! Builds the kernel programs with whichever toolchain has the standard library's sources, or says how to get one.

#![allow(unsafe_code, reason = "one environment variable, set before any thread starts")]

#[cfg(unix)]
use std::os::unix::fs::symlink;
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, exit},
};

use anyhow::Context as _;
use aya_build::{Package, Toolchain, build_ebpf};
use object::build::elf;

/// The distribution's compiler under the name that `cargo xtask setup` gives it.
const DISTRIBUTION: &str = "debian";

fn main() {
    let target = |key: &str| env::var(format!("CARGO_CFG_TARGET_{key}")).unwrap_or_default();
    if target("OS") != "linux" || target("ARCH") != "x86_64" {
        eprintln!(
            "enforcer guards x86-64 Linux hosts only, by BPF or nf_tables; it cannot be built for {} on {}",
            target("OS"),
            target("ARCH")
        );
        exit(1)
    }
    let Some(toolchain) = toolchain() else {
        fail("no toolchain here has the sources of core for the kernel programs")
    };
    if !has_linker() {
        fail("bpf-linker is missing");
    }
    if let Err(error) = share_target_dir() {
        fail(&format!("share the kernel programs' build directory: {error}"));
    }
    // SAFETY: no other thread runs. `-Z build-std` on a stable compiler needs the first; the second keeps the inner
    // cargo's progress, which would appear as warnings, to itself.
    unsafe {
        env::set_var("RUSTC_BOOTSTRAP", "1");
        env::set_var("CARGO_TERM_QUIET", "true");
    }
    // It has the profile that the programs are built by.
    println!(
        "cargo:rerun-if-changed={}",
        concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml")
    );
    let programs = Package {
        name: "enforcer-ebpf",
        root_dir: concat!(env!("CARGO_MANIFEST_DIR"), "/../enforcer-ebpf"),
        no_default_features: false,
        features: &["kernel"],
    };
    if let Err(error) = build_ebpf([programs], Toolchain::Custom(&toolchain)) {
        fail(&format!("{error:#}"));
    }
    let programs = out_dir().join("enforcer-programs");
    if let Err(error) = strip(&programs) {
        fail(&format!("strip {}: {error:#}", programs.display()));
    }
}

/// Removes the debug information from the copy that goes into `enforcer`: most of the file, and each start would parse
/// its relocations. The compiler's name stays, where compilers put it.
fn strip(programs: &Path) -> anyhow::Result<()> {
    const COMPILER: &[u8] = b"rustc version ";
    let data = fs::read(programs)?;
    let named = data.windows(COMPILER.len()).position(|window| window == COMPILER);
    // With the zero that ends it.
    let compiler = named.and_then(|at| data.get(at..)?.split_inclusive(|byte| *byte == 0).next());
    let compiler = compiler.context("they do not name their compiler")?;
    let mut object = elf::Builder::read(data.as_slice())?;
    for section in &mut object.sections {
        let name = section.name.as_slice();
        let name = name.strip_prefix(b".rel").unwrap_or(name);
        section.delete = name.starts_with(b".debug") || name.starts_with(b".BTF");
        // LLVM has one table for the names of symbols and of sections.
        if section.name.as_slice() == b".strtab" {
            section.data = elf::SectionData::String;
        }
    }
    let names = object.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.data = elf::SectionData::SectionString;
    let comment = object.sections.add();
    comment.name = ".comment".into();
    comment.sh_type = object::elf::SHT_PROGBITS;
    comment.data = elf::SectionData::Data(compiler.into());
    object.delete_orphans();
    let mut stripped = Vec::new();
    object.write(&mut stripped)?;
    Ok(fs::write(programs, stripped)?)
}

/// One line, and what to do.
fn fail(what: &str) -> ! {
    eprintln!(
        "build the kernel programs: {}; run `cargo xtask setup`",
        what.replace('\n', " ")
    );
    exit(1)
}

/// The toolchain in use if it has rust-src, else the distribution's.
fn toolchain() -> Option<String> {
    let current = env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".to_owned());
    [current.as_str(), DISTRIBUTION]
        .into_iter()
        .find(|name| has_sources(name))
        .map(str::to_owned)
}

fn has_sources(toolchain: &str) -> bool {
    let output = Command::new("rustup")
        .args(["run", toolchain, "rustc", "--print", "sysroot"])
        .output();
    let Ok(output) = output else { return false };
    let sysroot = String::from_utf8_lossy(&output.stdout);
    output.status.success()
        && Path::new(sysroot.trim())
            .join("lib/rustlib/src/rust/library/core")
            .exists()
}

fn has_linker() -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join("bpf-linker").exists())
}

/// Where cargo has this script write.
fn out_dir() -> PathBuf {
    PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default())
}

/// Lets every profile, clippy and editors use one build: aya-build's own place is below `OUT_DIR`, one for each of
/// them.
fn share_target_dir() -> std::io::Result<()> {
    let out_dir = out_dir();
    // target/PROFILE/build/enforcer-HASH/out
    let shared = out_dir.ancestors().nth(4).unwrap_or(&out_dir).join("ebpf");
    fs::create_dir_all(&shared)?;
    let link = out_dir.join("aya-build");
    match fs::read_link(&link) {
        Ok(there) if there == shared => return Ok(()),
        Ok(_) => fs::remove_file(&link)?,
        Err(_) if link.exists() => fs::remove_dir_all(&link)?,
        Err(_) => {}
    }
    symlink(shared, link)
}

/// Never called: nothing is built where there are no such links.
#[cfg(not(unix))]
fn symlink(_: PathBuf, _: PathBuf) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}
