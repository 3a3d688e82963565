//! What a new user has: a minimal system of this host's distribution, with git, certificates, curl and rustup's
//! toolchains, and a clean clone of HEAD; the README's commands, or others, run there. The kernel is this host's.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    root::{Recipe, Root},
    run::{cache_dir, digest_of, has, is_root, quiet, read, root},
    setup::packages::PRISTINE,
};

/// What of a root's archive is too old.
const AGE: Duration = Duration::from_hours(7 * 24);
const DAY: Duration = Duration::from_hours(24);
/// What a new user's commands may find besides `HOME` and `PATH`.
const ENVIRONMENT: [&str; 11] = [
    "ENFORCER_DEBIAN_MIRROR",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "RUSTUP_AUTO_INSTALL",
    "RUSTUP_DIST_SERVER",
    "RUSTUP_UPDATE_ROOT",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "CI",
];
/// What rustup puts beside itself.
const PROXIES: [&str; 7] = [
    "cargo",
    "cargo-clippy",
    "cargo-fmt",
    "clippy-driver",
    "rustc",
    "rustdoc",
    "rustfmt",
];
/// Runs before the root is entered. No bpffs; the cgroups as they are mounted here; rustup's toolchains below a layer
/// that ends with the run.
const MOUNTS: &str = include_str!("pristine/mounts.sh");
/// Runs inside, with the commands as arguments.
const RUN: &str = include_str!("pristine/run.sh");

/// Runs commands there; `@demo` and `@test` are the README's, which are also the default.
pub(crate) fn run(commands: &[String]) -> Result<()> {
    ensure!(
        is_root(),
        "a root can be made and entered by root only; run this as root"
    );
    ensure!(
        has("git") && has("rustup"),
        "git and rustup are what a new user has; install both first"
    );
    let readme = fs::read_to_string(root().join("README.md")).context("read README.md")?;
    let default = ["@demo".to_owned(), "@test".to_owned()];
    let commands = if commands.is_empty() { &default[..] } else { commands };
    let commands = commands
        .iter()
        .map(|command| match command.strip_prefix('@') {
            Some(task) => {
                of_readme(&readme, task).with_context(|| format!("README.md shows no command that ends in `{task}`"))
            }
            None => Ok(command.clone()),
        })
        .collect::<Result<Vec<_>>>()?;
    let cache = cache_dir("enforcer-pristine")?;
    fs::create_dir_all(&cache).with_context(|| format!("make {}", cache.display()))?;
    let archive = archive(&cache)?;
    clear(&cache)?;
    let place = tempfile::Builder::new().prefix("run").tempdir_in(&cache)?;
    let system = Root::unpack("pristine: unpack it", &archive, place.path().join("root"))?;
    furnish(&system)?;
    let kernels = cache_dir("enforcer-vm")?;
    let cargo = home("CARGO_HOME", ".cargo")?;
    for dir in [&kernels, &cargo.join("registry")] {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    let mut inside: Vec<String> = ["env", "-i", "HOME=/root", "LANG=C.UTF-8", "TERM=dumb"]
        .map(str::to_owned)
        .into();
    inside.push("PATH=/root/.cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    for name in ENVIRONMENT {
        if let Ok(value) = env::var(name) {
            inside.push(format!("{name}={value}"));
        }
    }
    inside.extend(["bash", "-c", RUN, "run"].map(str::to_owned));
    inside.extend(commands);
    let inside: Vec<&str> = inside.iter().map(String::as_str).collect();
    let status = system
        .enter(false, MOUNTS, &inside)
        .env("rustup", home("RUSTUP_HOME", ".rustup")?)
        .env("registry", cargo.join("registry"))
        .env("kernels", kernels)
        .stdin(std::process::Stdio::null())
        .status()
        .context("run unshare")?;
    if !status.success() {
        bail!("a new user's run failed ({status})");
    }
    Ok(())
}

/// Removes what a run that was killed has left; none lasts a day.
fn clear(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache)?.filter_map(Result::ok) {
        let age = entry.metadata().and_then(|meta| meta.modified()).ok();
        let old = age.and_then(|age| age.elapsed().ok()).is_some_and(|age| age > DAY);
        if old && entry.file_name().to_string_lossy().starts_with("run") {
            fs::remove_dir_all(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// The README's command for a task: the first line of a block of code that ends in it.
fn of_readme(readme: &str, task: &str) -> Option<String> {
    let mut inside = false;
    for line in readme.lines() {
        if line.starts_with("```") {
            inside = !inside;
        }
        let command = line.split('#').next().unwrap_or_default().trim_end();
        let begins = ["sh ", "cargo ", "./"].iter().any(|begin| command.starts_with(begin));
        if inside && begins && command.ends_with(&format!(" {task}")) {
            return Some(command.to_owned());
        }
    }
    None
}

/// The archive of the minimal system, made again when it is old or was made otherwise.
fn archive(cache: &Path) -> Result<PathBuf> {
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let field = |key: &str| {
        let value = release.lines().find_map(|line| line.strip_prefix(key));
        let value = value.map(|value| value.trim_matches('"'));
        value.with_context(|| format!("/etc/os-release has no {key}; this works on Debian and Ubuntu"))
    };
    let suite = field("VERSION_CODENAME=")?;
    let keyring = PathBuf::from(format!("/usr/share/keyrings/{}-archive-keyring.gpg", field("ID=")?));
    ensure!(
        keyring.exists(),
        "{} is missing; this works on Debian and Ubuntu",
        keyring.display()
    );
    let format = "$(REPO_URI) $(RELEASE) $(COMPONENT)";
    let targets = read("apt-get", &["indextargets", "--format", format, "Created-By: Packages"]).unwrap_or_default();
    let sources = sources(&targets, suite);
    ensure!(
        !sources.is_empty(),
        "apt has no source of {suite} here; add one, then run this again"
    );
    let recipe = Recipe {
        suite,
        packages: PRISTINE,
        sources: &sources,
        keyring: Some(&keyring),
    };
    let key = digest_of(&format!("{recipe:?}"));
    let archive = cache.join(format!("{suite}-{}.tar", key.get(..12).unwrap_or(&key)));
    let age = fs::metadata(&archive).and_then(|meta| meta.modified()).ok();
    if age.and_then(|age| age.elapsed().ok()).is_none_or(|age| age > AGE) {
        let what = format!("pristine: make a minimal {suite} (a minute or two, once a week)");
        recipe.make(&what, &archive)?;
    }
    Ok(archive)
}

/// This distribution's own sources of those that apt has, as lines of a sources.list: what is of no suite of this
/// release is another's.
fn sources(targets: &str, suite: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for target in targets.lines() {
        let words: Vec<&str> = target.split_whitespace().collect();
        let [address, release, component] = words.as_slice() else {
            continue;
        };
        let of_suite = release
            .strip_prefix(suite)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
        let own = ["/debian", "/debian-security", "/ubuntu"]
            .iter()
            .any(|end| address.trim_end_matches('/').ends_with(end));
        if of_suite && own {
            let line = format!("deb {address} {release} {component}");
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
    }
    lines
}

/// Puts in what a new user has: names and certificates as here, rustup, a clone.
fn furnish(system: &Root) -> Result<()> {
    for file in ["/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"] {
        let _ = fs::remove_file(system.path(file));
        if Path::new(file).exists() {
            fs::copy(file, system.path(file)).with_context(|| format!("copy {file}"))?;
        }
    }
    let proxy = read(
        "apt-config",
        &["dump", "--format", "%f \"%v\";%n", "Acquire::http::Proxy"],
    )
    .unwrap_or_default();
    fs::write(system.path("/etc/apt/apt.conf.d/90proxy"), proxy).context("write apt's configuration")?;
    let bin = system.path("/root/.cargo/bin");
    for dir in [
        &bin,
        &system.path("/root/.cargo/registry"),
        &system.path("/root/.rustup"),
        &system.path("/root/.cache/enforcer-vm"),
    ] {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let rustup = env::split_paths(&path)
        .map(|dir| dir.join("rustup"))
        .find(|file| file.is_file())
        .context("rustup is not on the path")?;
    fs::copy(&rustup, bin.join("rustup")).with_context(|| format!("copy {}", rustup.display()))?;
    for proxy in PROXIES {
        symlink("rustup", bin.join(proxy)).with_context(|| format!("link {proxy}"))?;
    }
    let config = home("CARGO_HOME", ".cargo")?.join("config.toml");
    if config.exists() {
        fs::copy(&config, system.path("/root/.cargo/config.toml")).context("copy cargo's configuration")?;
    }
    let mut clone = Command::new("git");
    clone
        .args(["clone", "--quiet"])
        .arg(root())
        .arg(system.path("/root/enforcer"));
    quiet("pristine: clone HEAD", &mut clone)
}

/// A directory of rustup's or cargo's.
fn home(variable: &str, default: &str) -> Result<PathBuf> {
    match env::var_os(variable) {
        Some(dir) => Ok(dir.into()),
        None => Ok(PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(default)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readmes_commands_are_found_in_its_blocks_of_code() {
        let readme = "sh no demo\n```sh\nsh x demo   # a demo\ncargo xtask demo\ncargo x test --all\n./x test\n```\n";
        assert_eq!(of_readme(readme, "demo").as_deref(), Some("sh x demo"));
        assert_eq!(of_readme(readme, "test").as_deref(), Some("./x test"));
        assert_eq!(of_readme(readme, "bench"), None);
    }

    #[test]
    fn only_the_distributions_own_sources_are_taken() {
        let targets = "http://a/debian/ trixie main\nhttp://a/debian/ trixie main\n\
            http://a/debian-security/ trixie-security main\nhttp://b/apt/ trixie main\nhttp://a/debian/ sid main\n";
        assert_eq!(
            sources(targets, "trixie"),
            [
                "deb http://a/debian/ trixie main",
                "deb http://a/debian-security/ trixie-security main"
            ]
        );
    }
}
