//! A kernel ready to boot: its image, and its modules if it has any; unpacked or built once, then taken from the cache.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread::available_parallelism,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    archive::Archive,
    table::{Entry, Table},
};
use crate::run::{check_space, digest_of, quiet, root};

/// What building one takes on disk, in MiB, and unpacking one.
const BUILD_SPACE: u64 = 3072;
const UNPACK_SPACE: u64 = 400;

/// A kernel to boot.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) image: PathBuf,
    /// The directory that has `lib/modules`, and the release below it.
    pub(super) modules: Option<(PathBuf, String)>,
}

/// How to come by one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ways {
    /// Where the table's packages are gone, the archive's newest.
    pub(super) newest: bool,
    /// One that is not in the cache may be built.
    pub(super) build: bool,
}

/// Finds it in the cache, or fetches, unpacks and builds it; none if that is not wanted.
pub(super) fn obtain(table: &Table, entry: &Entry, cache: &Path, ways: Ways) -> Result<Option<Kernel>> {
    let archive = Archive::new(table, &entry.suite, cache)?;
    let mut entry = entry.clone();
    if ways.newest && archive.lacks(&entry.packages)? {
        entry.packages = archive.newest(&entry.packages)?;
        let versions: Vec<&str> = entry.packages.iter().map(|package| package.version.as_str()).collect();
        eprintln!(
            "vm: {}: what xtask/kernels.toml has is gone from {}; {} instead, by the archive's signature alone",
            entry.name,
            entry.suite,
            versions.join(", ")
        );
    }
    let config = entry.config.as_ref().map(|name| root().join("xtask").join(name));
    let config = config
        .map(|path| fs::read_to_string(&path).with_context(|| format!("read {}", path.display())))
        .transpose()?;
    let digests: Vec<&str> = entry.packages.iter().map(|package| package.sha256.as_str()).collect();
    let key = digest_of(&format!("{digests:?}{config:?}"));
    let home = cache
        .join("kernels")
        .join(format!("{}-{}", entry.name, key.get(..12).unwrap_or(&key)));
    if !home.exists() {
        if config.is_some() && !ways.build {
            return Ok(None);
        }
        make(&archive, &entry, config.as_deref(), cache, &home)?;
    }
    let image = home.join("vmlinuz");
    ensure!(
        image.exists(),
        "{} has no kernel; remove it, and try again",
        home.display()
    );
    let modules = release(&home)?.map(|release| (home.clone(), release));
    Ok(Some(Kernel { image, modules }))
}

/// Makes a directory that appears only when it is whole.
fn make(archive: &Archive, entry: &Entry, config: Option<&str>, cache: &Path, home: &Path) -> Result<()> {
    let parent = home.parent().context("no parent")?;
    fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    check_space(cache, if config.is_some() { BUILD_SPACE } else { UNPACK_SPACE })?;
    let work = tempfile::Builder::new().prefix("make").tempdir_in(parent)?;
    let debs = entry
        .packages
        .iter()
        .map(|package| archive.package(package))
        .collect::<Result<Vec<_>>>()?;
    for deb in &debs {
        let mut command = Command::new("dpkg-deb");
        command.arg("--extract").arg(deb).arg(work.path());
        quiet(&format!("vm: unpack {}", entry.name), &mut command)?;
    }
    let out = tempfile::Builder::new().prefix("whole").tempdir_in(parent)?;
    if let Some(config) = config {
        build(&entry.name, config, work.path(), out.path())?;
    } else {
        arrange(work.path(), out.path())?;
    }
    let whole = out.keep();
    fs::rename(&whole, home).with_context(|| format!("make {}", home.display()))
}

/// Image and modules of a distribution's kernel, wherever that puts them.
fn arrange(from: &Path, to: &Path) -> Result<()> {
    let modules = [from.join("usr/lib/modules"), from.join("lib/modules")];
    let modules = modules
        .iter()
        .find(|dir| dir.is_dir())
        .context("the package has no modules")?;
    let image = fs::read_dir(from.join("boot"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
        });
    fs::create_dir(to.join("lib"))?;
    fs::rename(modules, to.join("lib/modules"))?;
    let release = release(to)?.context("the package has no modules")?;
    let image = image.unwrap_or_else(|| to.join("lib/modules").join(&release).join("vmlinuz"));
    fs::copy(&image, to.join("vmlinuz")).with_context(|| format!("copy {}", image.display()))?;
    let mut depmod = Command::new("/sbin/depmod");
    depmod.arg("--basedir").arg(to).arg(&release);
    quiet("vm: list the modules", &mut depmod)
}

fn release(home: &Path) -> Result<Option<String>> {
    let dir = home.join("lib/modules");
    if !dir.exists() {
        return Ok(None);
    }
    let first = fs::read_dir(&dir)?.next().transpose()?;
    Ok(first.map(|entry| entry.file_name().to_string_lossy().into_owned()))
}

/// Configures and builds a kernel from the distribution's source.
fn build(name: &str, fragment: &str, work: &Path, out: &Path) -> Result<()> {
    let sources = work.join("usr/src");
    let tar = fs::read_dir(&sources)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().ends_with(".tar.xz"))
        .with_context(|| format!("{} has no archive of sources", sources.display()))?;
    let mut command = Command::new("tar");
    command
        .arg("--extract")
        .arg("--file")
        .arg(&tar)
        .arg("--directory")
        .arg(work);
    quiet(&format!("vm: unpack the sources of {name}"), &mut command)?;
    let source = work.join(
        tar.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .trim_end_matches(".tar.xz"),
    );
    let given = work.join("fragment");
    fs::write(&given, fragment)?;
    let script = "make tinyconfig && scripts/kconfig/merge_config.sh -m .config \"$1\" && make olddefconfig";
    let mut command = Command::new("sh");
    command.current_dir(&source).args(["-c", script, "sh"]).arg(&given);
    quiet(&format!("vm: configure {name}"), &mut command)?;
    let config = fs::read_to_string(source.join(".config"))?;
    let missing = lost(fragment, &config);
    if !missing.is_empty() {
        bail!(
            "the configuration of {name} does not come out as asked: {}",
            missing.join(", ")
        );
    }
    let jobs = available_parallelism().map_or(2, usize::from);
    let mut command = Command::new("nice");
    command
        .current_dir(&source)
        .args(["make", "--silent", &format!("--jobs={jobs}"), "bzImage"]);
    quiet(
        &format!("vm: build {name} from source (six minutes on two cores, once)"),
        &mut command,
    )?;
    fs::copy(source.join("arch/x86/boot/bzImage"), out.join("vmlinuz")).context("copy the kernel built")?;
    Ok(())
}

/// Lines of a fragment that the configuration does not have.
fn lost<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let set = |line: &str| config.lines().any(|of| of == line);
    fragment
        .lines()
        .filter(|line| match line.strip_suffix(" is not set") {
            // What depends on something that is off is not even mentioned.
            Some(off) => {
                let name = off.trim_start_matches("# ");
                config.lines().any(|line| line.starts_with(&format!("{name}=")))
            }
            None => line.starts_with("CONFIG_") && !set(line),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_configuration_lost_is_named() {
        let fragment = "# why\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n# CONFIG_D is not set\n";
        assert_eq!(
            lost(fragment, "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\n"),
            ["CONFIG_B=y", "# CONFIG_C is not set"]
        );
        assert!(lost(fragment, "CONFIG_A=y\nCONFIG_B=y\n").is_empty());
    }
}
