//! The guest's whole file system: the installed binary, the suite, the programs that it runs, all their libraries, the
//! kernel's modules.

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::kernel::Kernel;
use crate::run::read;

/// Programs that the suite runs, and a shell's for whoever looks around, with the package that has each.
const PROGRAMS: [(&str, &str); 14] = [
    ("busybox", "busybox-static"),
    ("cat", "coreutils"),
    ("ip", "iproute2"),
    ("mount", "mount"),
    ("nft", "nftables"),
    ("nsenter", "util-linux"),
    ("prlimit", "util-linux"),
    ("setpriv", "util-linux"),
    ("sh", "dash"),
    ("sleep", "coreutils"),
    ("stat", "coreutils"),
    ("umount", "mount"),
    ("uname", "coreutils"),
    ("unshare", "util-linux"),
];
/// Modules that the rules and the suite use; of names with `|` between them the first that the kernel has, as some were
/// renamed.
pub(super) const MODULES: [&str; 27] = [
    "nf_tables",
    "nft_objref|nf_tables",
    "nft_ct",
    "nft_counter|nf_tables",
    "nft_log",
    "nf_log_syslog|nf_log_ipv4",
    "nfnetlink_log",
    "nft_limit",
    "nft_reject",
    "nft_reject_inet",
    "nft_reject_ipv4|nft_reject",
    "nft_reject_ipv6|nft_reject",
    "nft_socket",
    "nft_fib_inet",
    "nft_nat",
    "nft_chain_nat",
    "nft_masq",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "mptcp_diag|tcp_diag",
    "unix_diag",
    "veth",
    "bridge",
    "macvlan",
    "dummy",
    "tun",
];
const USERS: &str = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\n\
    nobody:x:65534:65534:nobody:/:/bin/sh\n";
const GROUPS: &str = "root:x:0:\ndaemon:x:1:\nwww-data:x:33:\nnogroup:x:65534:\n";

/// Writes the archive (newc, not compressed: the guest would take longer to unpack it than we to write it).
#[derive(Clone, Debug)]
pub(super) struct Initramfs {
    bytes: Vec<u8>,
    /// What has been added.
    names: BTreeSet<String>,
}

impl Initramfs {
    /// What every guest has.
    pub(super) fn new(binaries: &Path, enforcer: &Path) -> Result<Self> {
        let mut this = Self {
            bytes: Vec::new(),
            names: BTreeSet::new(),
        };
        for dir in ["dev", "proc", "sys", "run", "tmp", "root", "etc", "var/lib", "modules"] {
            this.directory(dir)?;
        }
        this.text("etc/passwd", USERS)?;
        this.text("etc/group", GROUPS)?;
        this.text("etc/hosts", "127.0.0.1 localhost guest\n::1 localhost\n")?;
        this.text("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")?;
        this.text("etc/resolv.conf", "nameserver 127.0.0.1\n")?;
        for (from, to) in [
            (binaries.join("guest"), "init"),
            (enforcer.to_path_buf(), "bin/enforcer"),
            (binaries.join("privileged"), "bin/privileged"),
            (binaries.join("attack"), "bin/attack"),
            (binaries.join("confined"), "bin/confined"),
        ] {
            this.program(&from, to, true)?;
        }
        for (name, package) in PROGRAMS {
            let path = find(name).with_context(|| format!("the guest needs {name}; install {package}"))?;
            this.program(&path, &format!("bin/{name}"), false)?;
        }
        for applet in busybox_applets()? {
            let name = format!("bin/{applet}");
            if !this.names.contains(&name) {
                this.link(&name, "/bin/busybox")?;
            }
        }
        Ok(this)
    }

    /// Adds a kernel's modules. Their places in the guest, each after those that it needs.
    pub(super) fn modules(&mut self, kernel: &Kernel, wanted: &[&str]) -> Result<Vec<String>> {
        let Some((base, release)) = &kernel.modules else {
            return Ok(Vec::new());
        };
        let mut places = Vec::new();
        for names in wanted {
            let list = names.split('|').find_map(|name| insertions(base, release, name));
            let list = list.with_context(|| format!("{release} has no module {names}"))?;
            for file in list {
                let stem = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let plain = stem.trim_end_matches(".xz").trim_end_matches(".zst").to_owned();
                let place = format!("modules/{plain}");
                if !self.names.contains(&place) {
                    let bytes = plain_bytes(&file)?;
                    self.file(&place, 0o644, &bytes)?;
                    places.push(format!("/{place}"));
                }
            }
        }
        Ok(places)
    }

    /// A file with this content.
    pub(super) fn text(&mut self, name: &str, content: &str) -> Result<()> {
        self.file(name, 0o644, content.as_bytes())
    }

    /// Ends the archive and writes it.
    pub(super) fn write(self, path: &Path) -> Result<()> {
        let bytes = cpio::newc::trailer(self.bytes)?;
        fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
    }

    /// A program and the libraries that it is linked with.
    fn program(&mut self, from: &Path, name: &str, strip: bool) -> Result<()> {
        ensure!(from.exists(), "{} is not there", from.display());
        let bytes = if strip { stripped(from)? } else { read_file(from)? };
        self.file(name, 0o755, &bytes)?;
        for library in libraries(from) {
            let name = library.display().to_string();
            let name = name.trim_start_matches('/');
            if !self.names.contains(name) {
                self.file(name, 0o755, &read_file(&library)?)?;
            }
        }
        Ok(())
    }

    fn directory(&mut self, name: &str) -> Result<()> {
        let mut at = PathBuf::new();
        for part in Path::new(name).components() {
            at.push(part);
            let name = at.display().to_string();
            if !self.names.contains(&name) {
                self.entry(&name, 0o040_755, &[])?;
            }
        }
        Ok(())
    }

    fn link(&mut self, name: &str, to: &str) -> Result<()> {
        self.entry(name, 0o120_777, to.as_bytes())
    }

    fn file(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        if let Some(parent) = Path::new(name).parent() {
            self.directory(&parent.display().to_string())?;
        }
        self.entry(name, 0o100_000 | mode, bytes)
    }

    /// The mode has the kind of file in it (man 7 inode).
    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let number = u32::try_from(self.names.len() + 1)?;
        let builder = cpio::newc::Builder::new(name).ino(number).mode(mode).nlink(1);
        let mut writer = builder.write(std::mem::take(&mut self.bytes), u32::try_from(bytes.len())?);
        writer.write_all(bytes)?;
        self.bytes = writer.finish()?;
        self.names.insert(name.to_owned());
        Ok(())
    }
}

/// The files to insert for a module, in order; none where it is built in, `None` where the kernel has no such module.
fn insertions(base: &Path, release: &str, name: &str) -> Option<Vec<PathBuf>> {
    let base = base.display().to_string();
    let list = read(
        "/sbin/modprobe",
        // Without this host's options for modules.
        &[
            "--config",
            "/dev/null",
            "--dirname",
            &base,
            "--set-version",
            release,
            "--show-depends",
            name,
        ],
    )?;
    let files = list.lines().filter_map(|line| line.strip_prefix("insmod "));
    Some(files.map(|file| PathBuf::from(file.trim())).collect())
}

/// A module's content, unpacked here rather than in the slower guest.
fn plain_bytes(file: &Path) -> Result<Vec<u8>> {
    let program = match file
        .extension()
        .map(|extension| extension.to_string_lossy().into_owned())
    {
        Some(kind) if kind == "xz" => "xz",
        Some(kind) if kind == "zst" => "zstd",
        _ => return read_file(file),
    };
    output(Command::new(program).args(["--decompress", "--stdout"]).arg(file))
}

fn stripped(file: &Path) -> Result<Vec<u8>> {
    let out = tempfile::NamedTempFile::new()?;
    output(
        Command::new("strip")
            .arg("--strip-debug")
            .arg("-o")
            .arg(out.path())
            .arg(file),
    )?;
    read_file(out.path())
}

/// What the dynamic loader would load, by its own word.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let list = read("ldd", &[&program.display().to_string()]).unwrap_or_default();
    let words = list
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    words.map(PathBuf::from).collect()
}

fn busybox_applets() -> Result<Vec<String>> {
    let list = read("busybox", &["--list"]).context("busybox does not run; install busybox-static")?;
    Ok(list.lines().map(str::to_owned).collect())
}

fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(usual)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}
