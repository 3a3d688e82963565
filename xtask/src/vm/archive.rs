//! Packages of a Debian suite, whatever this host runs: an apt of its own, with sources, lists and cache of its own, in
//! the cache directory.

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use super::table::{Package, Table};
use crate::{
    debian,
    run::{hex, quiet},
};

/// One suite of the archive.
#[derive(Debug)]
pub(super) struct Archive {
    suite: String,
    root: PathBuf,
    debs: PathBuf,
    sources: String,
}

impl Archive {
    /// Nothing is fetched before something is asked for.
    pub(super) fn new(table: &Table, suite: &str, cache: &Path) -> Result<Self> {
        let address = debian::mirror()?;
        ensure!(
            table.keyring.exists(),
            "{} is missing; install debian-archive-keyring",
            table.keyring.display()
        );
        Ok(Self {
            suite: suite.to_owned(),
            root: cache.join("apt").join(suite),
            debs: cache.join("debs"),
            sources: format!(
                "deb [arch=amd64 lang=none target=Packages signed-by={}] {address} {suite} main\n",
                table.keyring.display()
            ),
        })
    }

    /// The file of a package, from the cache or the archive; its digest has been compared either way.
    pub(super) fn package(&self, package: &Package) -> Result<PathBuf> {
        let path = self.file(package);
        if path.exists() {
            if digest(&path)? == package.sha256 {
                return Ok(path);
            }
            eprintln!("vm: {} is damaged; it is fetched again", path.display());
            fs::remove_file(&path)?;
        }
        self.update()?;
        fs::create_dir_all(&self.debs).with_context(|| format!("make {}", self.debs.display()))?;
        let dir = tempfile::Builder::new().prefix("fetch").tempdir_in(&self.debs)?;
        let wanted = format!("{}={}", package.name, package.version);
        let mut command = self.apt("apt-get");
        command.current_dir(dir.path()).args(["--quiet", "download", &wanted]);
        if !self.has(package)? {
            bail!(
                "{wanted} is gone from {}: put what `cargo xtask vm --list` shows into xtask/kernels.toml, or run with \
                 --newest-if-gone",
                self.suite
            );
        }
        quiet(&format!("vm: fetch {wanted} from {}", self.suite), &mut command)?;
        let fetched = fs::read_dir(dir.path())?
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get left no file of {wanted}"))?;
        let found = digest(&fetched)?;
        ensure!(
            found == package.sha256,
            "{wanted} has digest {found}, not {} as xtask/kernels.toml says: see what changed before you change the \
             table",
            package.sha256
        );
        fs::rename(&fetched, &path)?;
        Ok(path)
    }

    /// What the archive has now in the place of these packages: the same up to the version in their names.
    pub(super) fn newest(&self, packages: &[Package]) -> Result<Vec<Package>> {
        self.update()?;
        let mut newest = Vec::new();
        // The metapackage names the image of the day; its modules come by its dependencies.
        let mut names = Vec::new();
        let mut waiting: Vec<String> = packages
            .iter()
            .filter(|package| package.name.starts_with("linux-source-"))
            .map(|package| package.name.clone())
            .collect();
        if waiting.is_empty() {
            waiting.push("linux-image-cloud-amd64".to_owned());
        }
        while let Some(name) = waiting.pop() {
            if names.contains(&name) {
                continue;
            }
            let depends = self.answer("apt-cache", &["depends", "--important", &name])?;
            let wanted = ["linux-image-", "linux-binary-", "linux-modules-"];
            let further = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
            waiting.extend(
                further
                    .filter(|name| wanted.iter().any(|start| name.starts_with(start)))
                    .map(str::to_owned),
            );
            names.push(name);
        }
        let has_binary = names.iter().any(|name| name.starts_with("linux-binary-"));
        for name in names {
            // Metapackages hold nothing.
            if name == "linux-image-cloud-amd64" || (has_binary && name.starts_with("linux-image-")) {
                continue;
            }
            let shown = self.answer("apt-cache", &["show", "--no-all-versions", &name])?;
            let field = |key: &str| {
                let found = shown.lines().find_map(|line| line.strip_prefix(key));
                found.with_context(|| format!("apt-cache shows no {key} of {name}"))
            };
            newest.push(Package {
                version: field("Version: ")?.to_owned(),
                sha256: field("SHA256: ")?.to_owned(),
                name,
            });
        }
        newest.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(newest)
    }

    /// Whether some of these are neither in the cache nor in the archive any more.
    pub(super) fn lacks(&self, packages: &[Package]) -> Result<bool> {
        for package in packages {
            if !self.file(package).exists() {
                self.update()?;
                if !self.has(package)? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    fn file(&self, package: &Package) -> PathBuf {
        self.debs.join(format!("{}.deb", package.sha256))
    }

    fn has(&self, package: &Package) -> Result<bool> {
        let versions = self.answer("apt-cache", &["madison", &package.name])?;
        Ok(versions
            .lines()
            .any(|line| line.split('|').nth(1).map(str::trim) == Some(package.version.as_str())))
    }

    /// Fetches the lists, whose signature apt checks, once a day.
    fn update(&self) -> Result<()> {
        let stamp = self.root.join("updated");
        let age = fs::metadata(&stamp).and_then(|meta| meta.modified()).ok();
        if age
            .and_then(|age| age.elapsed().ok())
            .is_some_and(|age| age.as_secs() < 86_400)
        {
            return Ok(());
        }
        for dir in ["lists/partial", "cache/archives/partial", "state"] {
            let dir = self.root.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        }
        fs::write(self.root.join("sources.list"), &self.sources)?;
        fs::write(self.root.join("status"), "")?;
        let mut command = self.apt("apt-get");
        // A list that cannot be had, or whose signature does not hold, is an error and no warning.
        command.args(["--quiet", "--error-on=any", "update"]);
        quiet(&format!("vm: fetch the lists of {}", self.suite), &mut command)?;
        fs::write(stamp, "")?;
        Ok(())
    }

    fn answer(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.apt(program);
        let output = command.args(arguments).stdin(Stdio::null()).output()?;
        ensure!(
            output.status.success(),
            "{program} {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn apt(&self, program: &str) -> Command {
        let at = |name: &str| self.root.join(name).display().to_string();
        let mut command = Command::new(program);
        for (key, value) in [
            ("Dir::Etc::sourcelist", at("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".to_owned()),
            ("Dir::Etc::preferences", "/dev/null".to_owned()),
            ("Dir::Etc::preferencesparts", "/dev/null".to_owned()),
            ("Dir::State", at("state")),
            ("Dir::State::lists", at("lists")),
            ("Dir::State::status", at("status")),
            ("Dir::Cache", at("cache")),
            ("APT::Architecture", "amd64".to_owned()),
            ("APT::Architectures", "amd64".to_owned()),
            // The cache directory may be closed to apt's own user.
            ("APT::Sandbox::User", "root".to_owned()),
        ] {
            command.arg("-o").arg(format!("{key}={value}"));
        }
        command
    }
}

/// A file's SHA-256.
pub(super) fn digest(path: &Path) -> Result<String> {
    let mut file = fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = file.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else {
            return Ok(hex(&hasher.finalize()));
        };
        hasher.update(bytes);
    }
}
