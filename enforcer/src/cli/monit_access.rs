//! `enforcer enable-monit-access`, which jobs of BOSH releases call by several names: from pre-starts, start scripts
//! and wrappers, most of them under `set -e` (B4). It lets the job in where it can, says why where it cannot, and never
//! fails its caller.

use std::{
    ffi::OsString,
    fs,
    net::Ipv4Addr,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use nix::unistd::{Pid, geteuid, getppid};

use super::{ExitStatus, complain, grants::ask, is_nobody, place, runtime, unexpected};
use crate::{
    backend::jobs::{Accept, CHAIN, JobsChain, RuleDestination, RuleSubject, TABLE},
    config::Settings,
    control, grants,
    host::{self, hierarchy::Hierarchy},
    inputs::HostConfig,
    jobs,
    policy::{HostUsers, MONIT, MONIT_PORT, Uid},
    ruleset::Cgroup,
    status::from_outside,
    wire::{GrantRequest, Reply, Request, Selector, Status},
};

/// Names that ask for monit when the binary is called by them.
const NAMES: [&str; 2] = ["enable-monit-access", "bosh-enable-monit-access"];
/// How long a daemon that is being started again is waited for.
const RESTART: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);
/// How long a daemon may take to say what is active.
const PATIENCE: Duration = Duration::from_secs(5);
/// The cgroup of whoever has called `permit_monit_access`, below the one that it was in.
const OWN: &str = "monit-api-access";
/// Scripts of stemcells that become monit or the agent, or ask monit as root: root needs no grant, and what they become
/// starts everything else.
const WRAPPERS: [&str; 4] = [
    "/var/vcap/bosh/bin/monit",
    "/etc/sv/agent/run",
    "/etc/sv/monit/run",
    "/etc/service/agent/run",
];
/// Where the jobs lie.
const JOBS: &str = "/var/vcap/jobs";
/// How far up processes are looked at for a job's name: a script, its shell, and what supervises them.
const ANCESTORS: usize = 16;
#[derive(Debug, Args)]
pub(super) struct MonitAccess {
    /// User name or UID to allow instead of the caller's cgroup
    user: Option<String>,
    /// First move the calling process into a cgroup of its own
    #[arg(long)]
    own_cgroup: bool,
}

/// The arguments, with the command that the binary's name stands for, where it is called by another name than its own.
pub(super) fn as_called(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name);
    if name.is_some_and(|name| NAMES.iter().any(|monit| name == *monit)) {
        arguments.insert(1, "enable-monit-access".into());
    }
    arguments
}

/// Whoever calls goes on: a job that is not let in is told by monit, and one that needs nothing must not be kept from
/// starting.
pub(super) fn run(config: &Path, access: &MonitAccess) -> ExitStatus {
    if let Err(error) = enable(config, access) {
        complain("warning", &format!("{error:#}; this job may not connect to monit"));
    }
    ExitStatus::Yes
}

fn enable(config: &Path, access: &MonitAccess) -> Result<()> {
    // Now: by the time that a daemon answers the caller may have ended, and this process have another parent.
    let parent = getppid();
    let caller = ancestors(parent);
    if geteuid().is_root() && access.user.is_none() && caller.first().is_some_and(Process::is_wrapper) {
        return Ok(());
    }
    let settings = place(config)?;
    match reached(&settings)? {
        Reached::Daemon => {}
        Reached::Nothing => return Ok(()),
        Reached::Container => return write_to_chain(config, &settings, access),
    }
    if access.own_cgroup {
        move_caller(parent)?;
    }
    let request = Request::Grant(GrantRequest {
        target: MONIT.to_owned(),
        to: Selector {
            user: access.user.clone(),
            ..Selector::default()
        },
        otherwise: caller.iter().find_map(Process::job_in_a_container),
        seconds: None,
    });
    let Reply::Grant(_) = ask(&settings.socket, &request)? else {
        bail!("the daemon gave an unexpected answer; is it another version?")
    };
    Ok(())
}

/// Who can be asked to let somebody in.
enum Reached {
    /// The daemon.
    Daemon,
    /// Nobody, as nothing protects monit.
    Nothing,
    /// Nobody from within this container, which sees neither the daemon's socket nor its pins.
    Container,
}

/// Finds who can be asked. A daemon that is being started again is waited for.
fn reached(settings: &Settings) -> Result<Reached> {
    let (runtime, deadline) = (runtime()?, Instant::now() + RESTART);
    loop {
        let asked = runtime.block_on(control::ask(&settings.socket, &Request::Status, PATIENCE));
        let error = match asked {
            Ok(Reply::Status(status)) if has_monit(&status) => return Ok(Reached::Daemon),
            Ok(Reply::Status(_)) => return Ok(Reached::Nothing),
            Ok(_) => return unexpected(),
            Err(error) if is_nobody(&error) => error,
            Err(error) => return Err(error.into()),
        };
        if is_contained() {
            return Ok(Reached::Container);
        }
        if !has_monit(&from_outside(settings, None)?) {
            return Ok(Reached::Nothing);
        }
        if Instant::now() >= deadline {
            return Err(error.into());
        }
        thread::sleep(PAUSE);
    }
}

fn has_monit(status: &Status) -> bool {
    status.targets.iter().any(|target| target.name == MONIT)
}

/// Whether this process runs in a container of BPM's, where neither socket nor pins of the host's are to be seen; told
/// by its cgroups.
fn is_contained() -> bool {
    let cgroups = host::read_lossy("/proc/self/cgroup").unwrap_or_default();
    let mut last = cgroups.lines().filter_map(|line| line.rsplit('/').next());
    last.any(grants::is_container)
}

/// Adds a rule to the chain that the daemon and the BOSH agent read (B5), as the agent's own helper does: `nf_tables`
/// is reached without any file of the host's. For the container, or the user named.
fn write_to_chain(config: &Path, settings: &Settings, access: &MonitAccess) -> Result<()> {
    let on_host = "on the host run enforcer grant monit --job JOB, or call this from the job's pre-start";
    let user = access
        .user
        .as_deref()
        .map(|user| Uid::parse(user, &HostUsers))
        .transpose()?;
    let cgroup = if user.is_some() { None } else { Some(own_cgroup()?) };
    let subject = RuleSubject {
        user: user.map(|uid| uid.0),
        cgroup,
    };
    // The configuration may be hidden from here, too.
    let configured = HostConfig::load(config).ok();
    let monit = configured.as_ref().and_then(|wanted| wanted.policy().target(MONIT));
    let usual = RuleDestination {
        address: Some(Ipv4Addr::LOCALHOST.into()),
        port: Some(MONIT_PORT.get()),
    };
    let to = monit.map_or_else(|| vec![usual], jobs::destinations);
    let accepts: Vec<Accept> = to.into_iter().map(|to| Accept { subject, to }).collect();
    let chain = JobsChain::open(settings)
        .with_context(|| format!("ask nf_tables from within this container, which takes CAP_NET_ADMIN; {on_host}"))?;
    let added = chain.map(|mut chain| chain.add_container(&accepts)).transpose();
    let added = added.with_context(|| format!("add a rule to chain {CHAIN}; {on_host}"))?;
    ensure!(
        added == Some(true),
        "enforcer cannot be reached from within this container, and there is no nftables chain inet {TABLE} {CHAIN}; \
         {on_host}"
    );
    Ok(())
}

/// The cgroup that this process is in, as rules name it.
fn own_cgroup() -> Result<Cgroup> {
    let (found, below) = own_place()?;
    let dir = found.mount.join(&below);
    let id = host::directory_id(&dir).with_context(|| format!("look at {}", dir.display()))?;
    let depth = found
        .depth
        .context("the depth of this cgroup is not known from within its namespace")?;
    let level = depth + u32::try_from(below.components().count())?;
    Ok(Cgroup { id, level })
}

/// The cgroup v2 hierarchy, and where below its mount this process is.
fn own_place() -> Result<(Hierarchy, PathBuf)> {
    let found = Hierarchy::find().context("find the cgroup v2 hierarchy")?;
    let found = found
        .context("cgroup v2 is not mounted here, so only a user can be allowed: enforcer grant monit --user USER")?;
    let text = fs::read("/proc/self/cgroup").context("read /proc/self/cgroup")?;
    let own = host::cgroup2_of(&text).context("this process is in no cgroup v2")?;
    let own = Path::new(std::ffi::OsStr::from_bytes(own));
    let below = own.strip_prefix(&found.shown).with_context(|| {
        format!(
            "cgroup {} is not below what is mounted on {}",
            own.display(),
            found.mount.display()
        )
    })?;
    let below = below.to_path_buf();
    Ok((found, below))
}

/// Moves whoever has called, and this process, into a cgroup of their own: what else is in theirs is not let in.
fn move_caller(caller: Pid) -> Result<()> {
    ensure!(
        caller.as_raw() > 1 && getppid() == caller,
        "the caller has ended, or is the init of this system"
    );
    let (found, below) = own_place()?;
    let [callers, own] = [caller.to_string(), "self".to_owned()].map(|pid| fs::read(format!("/proc/{pid}/cgroup")));
    let callers = callers.context("read the caller's cgroup")?;
    ensure!(
        callers == own.context("read /proc/self/cgroup")?,
        "the caller is in another cgroup than this process"
    );
    // Called twice, or below one that has called it: it is there already.
    if below.components().any(|part| part.as_os_str() == OWN) {
        return Ok(());
    }
    let dir = found.mount.join(below).join(OWN);
    match fs::create_dir(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("make {}", dir.display()));
        }
        Ok(()) | Err(_) => {}
    }
    // One that is there already may be a user's, who could freeze, kill or join what runs there (F6).
    let meta = fs::symlink_metadata(&dir).with_context(|| format!("look at {}", dir.display()))?;
    ensure!(
        meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o022 == 0,
        "{} is writable by users other than root",
        dir.display()
    );
    let members = dir.join("cgroup.procs");
    for pid in [caller.to_string(), std::process::id().to_string()] {
        fs::write(&members, &pid).with_context(|| format!("move process {pid} to {}", dir.display()))?;
    }
    Ok(())
}

/// A process above this one.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    directory: PathBuf,
    arguments: Vec<PathBuf>,
}

/// The calling process first.
fn ancestors(parent: Pid) -> Vec<Process> {
    let mut pid = Some(parent.as_raw());
    let mut all = Vec::new();
    while let Some(at) = pid.filter(|pid| *pid > 1 && all.len() < ANCESTORS) {
        let arguments = fs::read(format!("/proc/{at}/cmdline")).unwrap_or_default();
        let arguments = arguments
            .split(|byte| *byte == 0)
            .filter(|argument| !argument.is_empty());
        all.push(Process {
            directory: fs::read_link(format!("/proc/{at}/cwd")).unwrap_or_default(),
            arguments: arguments
                .map(|argument| Path::new(std::ffi::OsStr::from_bytes(argument)).into())
                .collect(),
        });
        let status = host::read_lossy(format!("/proc/{at}/status")).unwrap_or_default();
        pid = host::status_field(&status, "PPid").and_then(|parent| parent.parse().ok());
    }
    all
}

impl Process {
    /// Whether it is one of [`WRAPPERS`]: the script, or a shell that runs it.
    fn is_wrapper(&self) -> bool {
        let first = self.arguments.iter().take(2);
        let paths = first.map(|argument| self.directory.join(argument.strip_prefix("./").unwrap_or(argument)));
        let mut paths = paths.filter(|path| path.is_absolute());
        paths.any(|path| WRAPPERS.iter().any(|wrapper| path == Path::new(wrapper)))
    }

    /// The job whose script it is, where that job runs in a BPM container.
    fn job_in_a_container(&self) -> Option<String> {
        self.job(Path::new(JOBS))
    }

    fn job(&self, jobs: &Path) -> Option<String> {
        let below = self
            .arguments
            .iter()
            .find_map(|argument| argument.strip_prefix(jobs).ok())?;
        let name = below.iter().next()?.to_str()?;
        let bpm = jobs.join(name).join("config/bpm.yml");
        bpm.is_file().then(|| name.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn process(directory: &str, arguments: &[&str]) -> Process {
        Process {
            directory: directory.into(),
            arguments: arguments.iter().map(PathBuf::from).collect(),
        }
    }

    #[test]
    fn stemcells_wrappers_are_told_from_jobs() {
        for (directory, arguments) in [
            ("/", &["/bin/bash", "/var/vcap/bosh/bin/monit", "summary"][..]),
            ("/etc/sv/agent", &["/bin/bash", "./run"]),
            ("/etc/sv/agent", &["bash", "run"]),
            ("/root", &["/etc/sv/monit/run"]),
        ] {
            assert!(process(directory, arguments).is_wrapper(), "{arguments:?}");
        }
        for (directory, arguments) in [
            (
                "/",
                &["/bin/bash", "/var/vcap/jobs/a/bin/ctl", "/var/vcap/bosh/bin/monit"][..],
            ),
            ("/etc/sv/other", &["/bin/bash", "./run"]),
            ("/", &["/bin/bash", "-c", "/etc/sv/agent/run"]),
            ("", &["run"]),
            ("/", &[]),
        ] {
            assert!(!process(directory, arguments).is_wrapper(), "{arguments:?}");
        }
    }

    #[test]
    fn a_script_tells_its_job_where_that_has_a_container() -> io::Result<()> {
        let jobs = tempfile::tempdir()?;
        for (job, file) in [("web", "bpm.yml"), ("plain", "other.yml")] {
            let config = jobs.path().join(job).join("config");
            fs::create_dir_all(&config)?;
            fs::write(config.join(file), "")?;
        }
        let of = |argument: &str| {
            let script = jobs.path().join(argument).display().to_string();
            process("/", &["bash", "-e", &script]).job(jobs.path())
        };
        assert_eq!(of("web/bin/pre-start"), Some("web".to_owned()));
        for none in ["plain/bin/pre-start", "other/bin/pre-start", ""] {
            assert_eq!(of(none), None, "{none}");
        }
        Ok(())
    }

    #[test]
    fn the_name_that_it_is_called_by_is_a_command() {
        let called = |words: &[&str]| as_called(words.iter().map(OsString::from));
        for name in NAMES {
            let path = format!("/var/vcap/bosh/etc/{name}");
            assert_eq!(called(&[&path, "vcap"]), [&path, "enable-monit-access", "vcap"]);
        }
        assert_eq!(
            called(&["/usr/sbin/enforcer", "status"]),
            ["/usr/sbin/enforcer", "status"]
        );
    }
}
