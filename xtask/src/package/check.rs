//! What the package must be: installed into a scratch root, looked at, used, upgraded, removed and purged there.

use std::{collections::BTreeSet, path::Path, process::Command};

use anyhow::{Context as _, Result, bail, ensure};

use super::scratch::Scratch;
use crate::run::read;

/// Shared libraries that every stemcell has: the C library's, and the compiler's.
const LIBRARIES: [&str; 3] = ["libc.so.6", "libgcc_s.so.1", "libm.so.6"];
/// The C library of the oldest stemcell line that is supported (Ubuntu jammy).
const GLIBC: (u32, u32) = (2, 35);
/// Most that `systemd-analyze security` may say of the daemon, times ten. It counts mounts that the unit might have of
/// its own, with which the daemon would not see those of the host; that Landlock confines its writing the tool does not
/// know.
const EXPOSURE: &str = "37";
/// Files and modes, the commands' man pages apart. Directories are not listed.
const FILES: [(&str, &str); 25] = [
    ("755", "/etc/sv/enforcer/check"),
    ("755", "/etc/sv/enforcer/finish"),
    ("755", "/etc/sv/enforcer/log/run"),
    ("755", "/etc/sv/enforcer/run"),
    ("777", "/etc/systemd/system/multi-user.target.wants/enforcer.service"),
    ("777", "/etc/systemd/system/sysinit.target.wants/enforcer-early.service"),
    ("644", "/usr/lib/systemd/system/enforcer-early.service"),
    ("644", "/usr/lib/systemd/system/enforcer.service"),
    ("755", "/usr/sbin/bosh-enable-monit-access"),
    ("755", "/usr/sbin/enforcer"),
    ("644", "/usr/share/bash-completion/completions/enforcer"),
    ("644", "/usr/share/doc/enforcer/README.md"),
    ("644", "/usr/share/doc/enforcer/agent.md"),
    ("644", "/usr/share/doc/enforcer/architecture.md"),
    ("644", "/usr/share/doc/enforcer/copyright"),
    ("644", "/usr/share/doc/enforcer/examples/enforcer.toml"),
    ("644", "/usr/share/doc/enforcer/guarantees.md"),
    ("644", "/usr/share/doc/enforcer/schemas.md"),
    ("644", "/usr/share/doc/enforcer/stemcell.md"),
    ("644", "/usr/share/doc/enforcer/troubleshooting.md"),
    ("644", "/usr/share/enforcer/monit-access-helper.sh"),
    ("644", "/usr/share/fish/vendor_completions.d/enforcer.fish"),
    ("644", "/usr/share/lintian/overrides/enforcer"),
    ("644", "/usr/share/man/man5/enforcer.toml.5.gz"),
    ("644", "/usr/share/zsh/vendor-completions/_enforcer"),
];
/// Every file but those that any package changes, with its mode, owner and path.
const LIST: &str = r"find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /var/cache \
    -o -path /var/lib/dpkg -o -path /var/lib/systemd/deb-systemd-helper-enabled -o -name dpkg.log \) -prune \
    -o ! -type d -printf '%m %U:%G %p\n'";
const LIFE: &str = include_str!("life.sh");

/// Runs every check and says what each found; the first that fails is the result.
pub(super) fn run(package: &Path, next: &Path) -> Result<()> {
    let scratch = Scratch::new()?;
    let inside = scratch.bring(package)?;
    let before = list(&scratch)?;
    scratch.read(&format!("dpkg -i {inside}"))?;
    let installed = list(&scratch)?;
    files(&installed.difference(&before).cloned().collect())?;
    libraries(&scratch.path("/usr/sbin/enforcer"))?;
    units(&scratch)?;
    image(&scratch)?;
    manual(&scratch)?;
    completions(&scratch)?;
    configuration(&scratch)?;
    scratch.read("dpkg --purge enforcer")?;
    let next = scratch.bring(next)?;
    life(&scratch, &inside, &next)?;
    left(&before, &list(&scratch)?)
}

fn say(what: &str) {
    eprintln!("package: ok: {what}");
}

fn list(scratch: &Scratch) -> Result<BTreeSet<String>> {
    Ok(scratch.read(LIST)?.lines().map(str::to_owned).collect())
}

fn files(found: &BTreeSet<String>) -> Result<()> {
    let mut pages = 0;
    let mut wanted: BTreeSet<String> = FILES.iter().map(|(mode, path)| format!("{mode} 0:0 {path}")).collect();
    for line in found {
        let page = line.starts_with("644 0:0 /usr/share/man/man8/enforcer") && line.ends_with(".8.gz");
        pages += usize::from(page);
        ensure!(
            wanted.remove(line) || page,
            "the package brings {line}, which is not in the list"
        );
    }
    ensure!(wanted.is_empty(), "the package lacks {wanted:?}");
    ensure!(pages > 10, "only {pages} man pages");
    say(&format!(
        "{} files and {pages} man pages, each root's and with its mode",
        FILES.len()
    ));
    Ok(())
}

/// The program starts wherever the C library is new enough.
fn libraries(program: &Path) -> Result<()> {
    let program = program.to_string_lossy();
    let dynamic = read("readelf", &["--dynamic", "--wide", &program]).context("readelf --dynamic failed")?;
    let needed: Vec<&str> = dynamic
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| line.split(['[', ']']).nth(1))
        .collect();
    ensure!(!needed.is_empty(), "readelf shows no library at all");
    for library in &needed {
        let loader = library.starts_with("ld-linux");
        ensure!(loader || LIBRARIES.contains(library), "the program needs {library}");
    }
    let versions = read("readelf", &["--version-info", "--wide", &program]).context("readelf --version-info failed")?;
    let newest = versions
        .split("GLIBC_")
        .skip(1)
        .filter_map(|rest| {
            let number = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
            let mut parts = number.split('.').map_while(|part| part.parse::<u32>().ok());
            Some((parts.next()?, parts.next().unwrap_or(0)))
        })
        .max()
        .context("readelf shows no version of the C library")?;
    ensure!(newest <= GLIBC, "the program needs glibc {}.{}", newest.0, newest.1);
    say(&format!(
        "the program needs only {}, glibc {}.{}",
        needed.join(", "),
        newest.0,
        newest.1
    ));
    Ok(())
}

fn units(scratch: &Scratch) -> Result<()> {
    for unit in ["enforcer-early.service", "enforcer.service"] {
        let output = scratch.run(&format!(
            "SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=yes --recursive-errors=yes \
             /lib/systemd/system/{unit}"
        ))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success() && said.trim().is_empty(),
            "systemd-analyze verify {unit} ({}):\n{said}",
            output.status
        );
    }
    say("systemd-analyze verify has nothing to say about the units");
    let exposure = scratch.read(&format!(
        "systemd-analyze security --no-pager --offline=yes --threshold={EXPOSURE} enforcer.service"
    ))?;
    let figure = exposure.lines().last().unwrap_or_default();
    ensure!(
        figure.contains("exposure level"),
        "systemd-analyze security says {figure:?}"
    );
    say(figure.trim_start_matches(|c: char| !c.is_ascii_alphabetic()));
    Ok(())
}

/// What the program demands of an image is what the package brings.
fn image(scratch: &Scratch) -> Result<()> {
    let said = scratch.read("enforcer doctor --root / --json || true")?;
    ensure!(said.contains("\"findings\""), "enforcer doctor --root / says {said:?}");
    for finding in ["files-missing", "files-writable"] {
        ensure!(!said.contains(finding), "of the package's own files: {said}");
    }
    say("enforcer doctor --root misses none of the package's files");
    Ok(())
}

fn manual(scratch: &Scratch) -> Result<()> {
    // As lintian asks man: every warning of groff's, for each page.
    let output = scratch.run(
        "for page in /usr/share/man/man[58]/enforcer*; do
             MANROFFSEQ= MANWIDTH=100 man --warnings -E UTF-8 -l -Tutf8 -Z \"$page\" >/dev/null
             lexgrog \"$page\" >/dev/null
         done
         man enforcer-check | grep -q -- '\\[--cgroup PATH\\]'
         man enforcer.toml | grep -q 'Default: \"enforce\"'",
    )?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && said.trim().is_empty(),
        "the man pages ({}):\n{said}",
        output.status
    );
    say("man pages render without a warning, name the values of options, and have names that apropos finds");
    Ok(())
}

fn completions(scratch: &Scratch) -> Result<()> {
    let tried = [
        (
            "bash",
            "bash -c '. /usr/share/bash-completion/bash_completion; _completion_loader enforcer;
                COMP_WORDS=(enforcer stat); COMP_CWORD=1; COMP_LINE=\"enforcer stat\"; COMP_POINT=13;
                _enforcer enforcer stat enforcer; echo ${COMPREPLY[@]}'",
            "status",
        ),
        (
            "zsh",
            "zsh -c 'autoload -Uz compinit; compinit -D -u; print $_comps[enforcer]'",
            "_enforcer",
        ),
        (
            "fish",
            "fish -c 'complete --do-complete \"enforcer stat\"' | cut -f1",
            "status",
        ),
    ];
    for (shell, commands, wanted) in tried {
        let said = scratch.read(commands)?;
        ensure!(said.trim() == wanted, "{shell} completes to {said:?}, not {wanted}");
    }
    say("completions of bash, fish and zsh load");
    Ok(())
}

/// The example is what it says: uncommented, it is a good configuration, and all its values are the defaults.
fn configuration(scratch: &Scratch) -> Result<()> {
    scratch.read(
        "file=/usr/share/doc/enforcer/examples/enforcer.toml
         ! grep -E '^[^#]' $file
         # The example's user and cgroup are not here.
         sed -E 's/^#([^ ])/\\1/; s/^#(    )/\\1/; s/cgroup = .*, user = .agent./kernel = true/' \
             $file >/tmp/uncommented.toml
         enforcer --config /tmp/uncommented.toml config check
         enforcer --config /tmp/uncommented.toml config show | grep -v '^#' >/tmp/shown
         grep -v '^#' /tmp/uncommented.toml | diff -B - /tmp/shown",
    )?;
    say("the example configuration is all comments, and good without them");
    Ok(())
}

fn life(scratch: &Scratch, package: &str, next: &str) -> Result<()> {
    let output = scratch.run(&format!("PACKAGE={package} NEXT={next}\n{LIFE}"))?;
    // The cgroup outlives the namespaces.
    remove_cgroup()?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        match line.strip_prefix("life: ") {
            Some(what) if output.status.success() => say(what),
            Some(_) | None => {}
        }
    }
    if !output.status.success() {
        bail!(
            "the package's life ({}):\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Removes what life.sh made, wherever cgroup v2 is mounted here.
fn remove_cgroup() -> Result<()> {
    let mounts = read("findmnt", &["--noheadings", "--output", "TARGET", "--types", "cgroup2"]).unwrap_or_default();
    for mount in mounts.lines() {
        let made = Path::new(mount).join("enforcer-package-check");
        if made.exists() {
            let status = Command::new("rmdir").arg(&made).status().context("run rmdir")?;
            ensure!(status.success(), "{} is still in use", made.display());
        }
    }
    Ok(())
}

fn left(before: &BTreeSet<String>, after: &BTreeSet<String>) -> Result<()> {
    // Other packages' logs say that something was installed.
    let left: Vec<&String> = after
        .difference(before)
        .filter(|line| line.contains("enforcer") || !line.contains(" /var/log/"))
        .collect();
    ensure!(left.is_empty(), "purge leaves {left:?}");
    say("purge leaves no file");
    Ok(())
}
