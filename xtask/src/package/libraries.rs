//! The static libraries that the packaged program is linked with, so that it starts where neither libnftnl nor libmnl
//! is installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    debian,
    run::{quiet, read, target_dir},
};

/// Debian has the static libmnl in its development package from trixie on; older releases, and Ubuntu's up to noble,
/// have not.
const LIBMNL: &str = "pool/main/libm/libmnl/libmnl-dev_1.0.5-3";
/// Its SHA-256 for each architecture, as Debian's signed package lists have it.
const LIBMNL_SUMS: [(&str, &str); 2] = [
    (
        "amd64",
        "7f9a7c3f470ec400171981816df189ec86b11083c3f8d391d0800ed09a87bfc3",
    ),
    (
        "arm64",
        "046ecea98bfb827fffdc9a19c3efd75b9862995e3532987a9272787e70a3a9b6",
    ),
];

/// A directory that holds the static libraries and no shared ones: the linker, told to look there, has no choice.
pub(crate) fn ensure() -> Result<PathBuf> {
    let dir = target_dir().join("static");
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let nftnl = installed("libnftnl.a").context("libnftnl-dev has brought no libnftnl.a; reinstall it")?;
    put(&nftnl, &dir)?;
    if dir.join("libmnl.a").exists() {
        return Ok(dir);
    }
    let mnl = match installed("libmnl.a") {
        Some(path) => path,
        None => fetch()?,
    };
    put(&mnl, &dir)?;
    Ok(dir)
}

/// Where the C compiler finds a library.
fn installed(name: &str) -> Option<PathBuf> {
    let found = read("cc", &[&format!("-print-file-name={name}")])?;
    // Not found, it is the bare name.
    Path::new(&found).is_absolute().then(|| found.into())
}

fn fetch() -> Result<PathBuf> {
    let arch = read("dpkg", &["--print-architecture"]).context("dpkg --print-architecture failed")?;
    let Some((_, sum)) = LIBMNL_SUMS.iter().find(|(known, _)| *known == arch) else {
        bail!(
            "no checksum of libmnl-dev for {arch} is known; install a libmnl.a, or add one to \
             xtask/src/package/libraries.rs"
        );
    };
    let dir = target_dir().join("static/libmnl-dev");
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let package = dir.join("package.deb");
    // apt's own downloader: it knows the host's proxies and verifies the sum.
    let mut download = Command::new("/usr/lib/apt/apt-helper");
    download.args(["download-file", &format!("{}/{LIBMNL}_{arch}.deb", debian::mirror()?)]);
    download.arg(&package).arg(format!("SHA256:{sum}"));
    quiet(
        "package: fetch Debian's libmnl-dev 1.0.5-3 for its static library, which the one installed here lacks",
        &mut download,
    )?;
    quiet(
        "package: unpack libmnl.a",
        Command::new("dpkg-deb").arg("-x").arg(&package).arg(&dir),
    )?;
    let triplet = read("cc", &["-print-multiarch"]).unwrap_or_default();
    Ok(dir.join("usr/lib").join(triplet).join("libmnl.a"))
}

fn put(library: &Path, dir: &Path) -> Result<()> {
    let to = dir.join(library.file_name().unwrap_or_default());
    fs::copy(library, &to)
        .map(drop)
        .with_context(|| format!("copy {} to {}", library.display(), to.display()))
}
