//! B4: grants made, ended, kept over restarts, by whom they may be made, and what they let in.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use enforcer::{
    grants::{self, Asker, Grantee, Grants, Key, MAX_GRANTS, Term},
    policy::Uid,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Case, case};
use crate::backend::EBPF;
use crate::world::{Attack, Listener, NOBODY, Ran, World, ask_raw, at_this_load, binary, cgroup_mount, ran, until};

/// Another user who may nothing.
const OTHER: u32 = 33;

pub(super) fn cases() -> Vec<Case> {
    let mut all: Vec<Case> = Vec::new();
    for backend in ["ebpf", "nftables", "both"] {
        all.push(case(
            &format!("b4_a_grant_lets_the_callers_cgroup_in_{backend}"),
            move || callers_cgroup(backend),
        ));
        all.push(case(
            &format!("b4_a_cgroup_made_again_keeps_its_grant_{backend}"),
            move || made_again(backend),
        ));
    }
    all.extend([
        case!(b4_grants_survive_restarts_and_kills),
        case!(b4_grants_end_in_time),
        case!(b4_a_user_is_let_in_only_by_name),
        case!(b4_what_would_let_everybody_in_is_refused),
        case!(b4_callers_in_namespaces_are_found),
        case!(b4_callers_whom_proc_hides_are_found),
        case!(b4_grants_that_cannot_be_trusted_let_nobody_in),
        case!(b4_grants_wait_for_their_target),
        case!(b4_only_root_grants_and_nothing_confuses_it),
        case!(b4_grants_are_told),
        case!(b4_d9_a_revoked_grant_is_cut),
        case!(f7_more_grants_than_the_maximum),
    ]);
    // They say themselves what enforces: one run has them all.
    all.into_iter().map(|case| case.on(EBPF)).collect()
}

/// A world whose endpoint is root's alone and may be granted, and a job's cgroup in it.
struct Job {
    world: World,
    _listener: Listener,
    cgroup: PathBuf,
    reset: bool,
}

impl Job {
    fn new(backend: &str, more: &str) -> Result<Self> {
        let world = World::new()?;
        let listener = world.listen()?;
        let cgroup = world.cgroup.join("child");
        fs::create_dir(&cgroup)?;
        let job = Self {
            world,
            _listener: listener,
            cgroup,
            reset: backend == "nftables",
        };
        job.inside(NOBODY).reaches()?;
        job.outside(NOBODY).reaches()?;
        job.configure(&format!("backend = \"{backend}\"\n{more}"), "grants = true")?;
        Ok(job)
    }

    fn configure(&self, top: &str, of_target: &str) -> Result<()> {
        let here = self.world.here();
        self.world.configure(&format!(
            "{top}\n[target.main]\nendpoints = [\"tcp://{here}\"]\nallow = [\"root\"]\n{of_target}\n"
        ))
    }

    fn inside(&self, user: u32) -> Attack {
        self.world.attack(user).in_cgroup(&self.cgroup)
    }

    fn outside(&self, user: u32) -> Attack {
        self.world.attack(user)
    }

    fn is_refused(&self, attack: &Attack) -> Result<()> {
        if self.reset {
            attack.is_reset()
        } else {
            attack.is_refused()
        }
    }

    /// The job's own path as the hierarchy has it.
    fn path(&self) -> Result<String> {
        path_of(&self.cgroup)
    }

    /// Runs the binary as the job would.
    fn enforcer(&self, arguments: &[&str]) -> Result<Ran> {
        self.through(&[], arguments)
    }

    /// As `enforcer`, started by other commands.
    fn through(&self, prefix: &[&str], arguments: &[&str]) -> Result<Ran> {
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$1/cgroup.procs\" && shift && exec \"$@\"", "sh"])
            .arg(&self.cgroup)
            .args(prefix)
            .arg(binary("enforcer")?)
            .arg("--config")
            .arg(self.world.path("enforcer.toml"));
        ran(command.args(arguments))
    }

    fn grants(&self) -> Result<Vec<Value>> {
        let text = self.world.enforcer(&["grants", "--json"])?.demand(0)?.stdout;
        let report: Value = serde_json::from_str(&text)?;
        ensure!(report["schema"] == "enforcer/grants/1", "{report}");
        Ok(report["grants"].as_array().cloned().unwrap_or_default())
    }

    fn state(&self, name: &str) -> PathBuf {
        self.world.path("state").join(name)
    }
}

pub(super) fn path_of(cgroup: &Path) -> Result<String> {
    Ok(format!("/{}", cgroup.strip_prefix(cgroup_mount()?)?.display()))
}

fn callers_cgroup(backend: &str) -> Result<()> {
    let job = Job::new(backend, "")?;
    let _daemon = job.world.daemon()?;
    for attack in [job.inside(NOBODY), job.outside(NOBODY)] {
        job.is_refused(&attack)?;
    }
    let said = job.enforcer(&["grant", "main"])?.demand(0)?.stdout;
    ensure!(said.contains("granted main to anybody in"), "{said}");
    job.inside(NOBODY).reaches()?;
    job.inside(OTHER).reaches()?;
    job.inside(0).reaches()?;
    job.outside(0).reaches()?;
    job.is_refused(&job.outside(NOBODY))?;
    let id = fs::metadata(&job.cgroup)?.ino();
    let status = job.world.status()?;
    ensure!(
        status["state"] == "enforcing"
            && status["targets"][0]["allow"]
                .to_string()
                .contains(&format!("anybody in cgroup id {id}")),
        "{status}"
    );
    let here = job.world.here().to_string();
    let path = job.path()?;
    let check = |cgroup: &str, code| {
        job.world
            .enforcer(&["check", "nobody", &here, "--cgroup", cgroup])?
            .demand(code)
    };
    check(&path, 0)?;
    check("/", 1)?;
    let said = job.enforcer(&["revoke", "main"])?.demand(0)?.stdout;
    ensure!(said.contains("revoked main"), "{said}");
    job.is_refused(&job.inside(NOBODY))?;
    job.enforcer(&["revoke", "main"])?.demand(1)?;
    ensure!(job.grants()?.is_empty(), "{:?}", job.grants()?);
    // Another process's, and below it.
    let below = job.cgroup.join("below");
    fs::create_dir(&below)?;
    let mut process = Command::new("sleep").arg("60").spawn()?;
    fs::write(job.cgroup.join("cgroup.procs"), process.id().to_string())?;
    let granted = job
        .world
        .enforcer(&["grant", "main", "--pid", &process.id().to_string()]);
    process.kill()?;
    process.wait()?;
    granted?.demand(0)?;
    job.inside(NOBODY).in_cgroup(&below).reaches()?;
    job.world.enforcer(&["revoke", "main", "--all"])?.demand(0)?;
    job.is_refused(&job.inside(NOBODY).in_cgroup(&below))?;
    fs::remove_dir(&below)?;
    Ok(())
}

fn made_again(backend: &str) -> Result<()> {
    let job = Job::new(backend, "")?;
    let _daemon = job.world.daemon()?;
    job.enforcer(&["grant", "main"])?.demand(0)?;
    job.inside(NOBODY).reaches()?;
    let mut ids = vec![fs::metadata(&job.cgroup)?.ino()];
    for _ in 0..3 {
        fs::remove_dir(&job.cgroup)?;
        until("the grant waits for its cgroup", || {
            Ok(job.grants()?.first().context("no grant")?["cgroup_exists"] == false)
        })?;
        // Others come meanwhile, one of them perhaps with an id that was in use.
        for number in 0..50 {
            let other = job.world.cgroup.join(format!("other{number}"));
            fs::create_dir(&other)?;
            ids.push(fs::metadata(&other)?.ino());
            if number == 0 {
                job.is_refused(&job.world.attack(NOBODY).in_cgroup(&other))?;
            }
            fs::remove_dir(&other)?;
        }
        fs::create_dir(&job.cgroup)?;
        ids.push(fs::metadata(&job.cgroup)?.ino());
        let made = Instant::now();
        until("the cgroup made again is let in", || {
            Ok(job.inside(NOBODY).run()?.errno.is_none())
        })?;
        ensure!(
            made.elapsed() < at_this_load(Duration::from_secs(4))?,
            "after {:?}",
            made.elapsed()
        );
        job.is_refused(&job.outside(NOBODY))?;
    }
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    ensure!(
        ids.len() == count,
        "the kernel gave an id twice: a rule may be some other cgroup's"
    );
    ensure!(job.world.status()?["state"] == "enforcing", "{}", job.world.status()?);
    Ok(())
}

fn b4_grants_survive_restarts_and_kills() -> Result<()> {
    let job = Job::new("ebpf", "")?;
    let daemon = job.world.daemon()?;
    job.enforcer(&["grant", "main"])?.demand(0)?;
    let meta = fs::metadata(job.state("grants.json"))?;
    ensure!(
        meta.uid() == 0 && meta.mode() & 0o7777 == 0o600,
        "mode {:o}",
        meta.mode()
    );
    daemon.kill()?;
    job.inside(NOBODY).reaches()?;
    // While nobody runs the rules stay as they are: a cgroup made again is another one.
    fs::remove_dir(&job.cgroup)?;
    fs::create_dir(&job.cgroup)?;
    job.inside(NOBODY).is_refused()?;
    let mut daemon = job.world.daemon()?;
    job.inside(NOBODY).reaches()?;
    job.outside(NOBODY).is_refused()?;
    daemon.signal(Signal::SIGTERM)?;
    ensure!(daemon.wait()? == 0, "{}", daemon.log());
    job.inside(NOBODY).reaches()?;
    // Without a daemon too.
    job.world.apply()?;
    job.inside(NOBODY).reaches()?;
    job.world.enforcer(&["unload"])?.demand(0)?;
    job.world.apply()?;
    job.inside(NOBODY).reaches()?;
    let none = job.enforcer(&["grant", "main"])?.demand(2)?;
    ensure!(none.stderr.contains("start the daemon"), "{none:?}");
    let daemon = job.world.daemon()?;
    job.enforcer(&["revoke", "main"])?.demand(0)?;
    daemon.kill()?;
    let daemon = job.world.daemon()?;
    job.inside(NOBODY).is_refused()?;
    daemon.kill()?;
    // Killed at any moment, what was answered holds after the next start, and half a file is never read.
    for round in 0..8_u64 {
        let daemon = job.world.daemon()?;
        let killer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(round * 3));
            daemon.kill()
        });
        let (mut granted, mut ended) = (None, false);
        while !ended {
            for (action, now) in [("grant", true), ("revoke", false)] {
                let code = job.enforcer(&[action, "main"])?.code;
                if code == 2 {
                    ended = true;
                    granted = None; // Either is right.
                    break;
                }
                granted = Some(now);
            }
        }
        killer.join().map_err(|_| anyhow::anyhow!("the killer panicked"))??;
        let _daemon = job.world.daemon()?;
        let status = job.world.status()?;
        ensure!(status["state"] == "enforcing", "{status}");
        let reached = job.inside(NOBODY).run()?.errno.is_none();
        ensure!(
            granted.is_none_or(|granted| granted == reached),
            "{granted:?}, but {reached}"
        );
        ensure!(job.grants()?.len() == usize::from(reached), "{:?}", job.grants()?);
        job.outside(NOBODY).is_refused()?;
    }
    Ok(())
}

fn b4_grants_end_in_time() -> Result<()> {
    let job = Job::new("ebpf", "")?;
    let daemon = job.world.daemon()?;
    let said = job
        .enforcer(&["grant", "main", "--for", "2s", "--json"])?
        .demand(0)?
        .stdout;
    let event: Value = serde_json::from_str(&said)?;
    ensure!(
        event["schema"] == "enforcer/grant/1" && event["action"] == "granted",
        "{event}"
    );
    ensure!(
        event["expires"].is_string() && event["expires_before"].is_null(),
        "{event}"
    );
    let granted = Instant::now();
    job.inside(NOBODY).reaches()?;
    until("the grant has ended", || {
        Ok(job.inside(NOBODY).run()?.errno == Some(libc::EPERM))
    })?;
    let lasted = granted.elapsed();
    ensure!((1500..4000).contains(&lasted.as_millis()), "it lasted {lasted:?}");
    ensure!(daemon.log().contains("the grant of main to"), "{}", daemon.log());
    ensure!(job.grants()?.is_empty(), "{:?}", job.grants()?);
    // A second grant gives it another end, and says so.
    job.enforcer(&["grant", "main", "--for", "2s"])?.demand(0)?;
    let said = job.enforcer(&["grant", "main"])?.demand(0)?.stdout;
    ensure!(
        said.contains("renewed main") && said.contains("until it is revoked (before: until 20"),
        "{said}"
    );
    thread::sleep(Duration::from_millis(2500));
    job.inside(NOBODY).reaches()?;
    let said = job.enforcer(&["grant", "main", "--for", "1s"])?.demand(0)?.stdout;
    ensure!(said.contains("before: until it is revoked"), "{said}");
    // Its time passes while nobody runs: the next start ends it before anything else.
    daemon.kill()?;
    thread::sleep(Duration::from_millis(1200));
    job.inside(NOBODY).reaches()?;
    let daemon = job.world.daemon()?;
    job.inside(NOBODY).is_refused()?;
    // What has an end is not made active where nobody stays to end it.
    job.enforcer(&["grant", "main", "--for", "1h"])?.demand(0)?;
    daemon.kill()?;
    let applied = job.world.enforcer(&["apply"])?.demand(0)?;
    ensure!(applied.stderr.contains("left out main"), "{applied:?}");
    job.inside(NOBODY).is_refused()?;
    let _daemon = job.world.daemon()?;
    job.inside(NOBODY).reaches()
}

fn b4_a_user_is_let_in_only_by_name() -> Result<()> {
    let job = Job::new("ebpf", "")?;
    let _daemon = job.world.daemon()?;
    job.enforcer(&["grant", "main", "--user", "nobody"])?.demand(0)?;
    job.outside(NOBODY).reaches()?;
    job.inside(NOBODY).reaches()?;
    job.inside(OTHER).is_refused()?;
    job.enforcer(&["revoke", "main", "--user", "65534"])?.demand(0)?;
    job.inside(NOBODY).is_refused()?;
    let path = job.path()?;
    let within = ["--user", "nobody", "--cgroup", &path];
    job.world
        .enforcer(&[&["grant", "main"][..], &within].concat())?
        .demand(0)?;
    job.inside(NOBODY).reaches()?;
    job.outside(NOBODY).is_refused()?;
    job.inside(OTHER).is_refused()?;
    // Each selector names its own grant.
    job.world.enforcer(&["revoke", "main", "--cgroup", &path])?.demand(1)?;
    job.world.enforcer(&["revoke", "main", "--user", "nobody"])?.demand(1)?;
    job.world
        .enforcer(&[&["revoke", "main"][..], &within].concat())?
        .demand(0)?;
    job.inside(NOBODY).is_refused()
}

fn b4_what_would_let_everybody_in_is_refused() -> Result<()> {
    let job = Job::new("ebpf", "")?;
    let here = job.world.here();
    job.world.configure(&format!(
        "[target.main]\nendpoints = [\"tcp://{here}\"]\nallow = [\"root\"]\ngrants = true\n\
         [target.closed]\nendpoints = [\"tcp://{here}\"]\nallow = [\"root\"]\n"
    ))?;
    let _daemon = job.world.daemon()?;
    let generation = job.world.status()?["generation"].clone();
    let judged = path_of(&job.world.cgroup)?;
    let path = job.path()?;
    let deep = format!("/{}", vec!["x"; 3000].join("/"));
    let long = format!("/{}", "x".repeat(4095));
    // In no cgroup of its own.
    let root = cgroup_mount()?;
    let mut process = Command::new("sleep").arg("60").spawn()?;
    let outside = process.id().to_string();
    fs::write(root.join("cgroup.procs"), &outside)?;
    for (arguments, says) in [
        (
            &["main", "--cgroup", "/"][..],
            "allow everybody; run this from the job's own cgroup",
        ),
        (&["main", "--cgroup", &judged], "allow everybody"),
        (&["main", "--pid", &outside], "allow everybody"),
        (
            &["main", "--cgroup", "/no/such/cgroup"],
            "/no/such/cgroup does not exist below",
        ),
        (&["main", "--cgroup", "child"], "begin it with /"),
        (&["main", "--cgroup", "/a/../b"], "`..`"),
        (&["main", "--cgroup", &deep], "at most 4095 bytes"),
        (&["main", "--cgroup", &long], "at most 4095 bytes"),
        (&["main", "--pid", "4194305"], "4194305 does not exist"),
        (&["main", "--pid", "1", "--cgroup", &path], "cannot be used with"),
        (&["main", "--user", "nosuchuser"], "nosuchuser"),
        (&["main", "--user", "4294967295"], "4294967295"),
        (&["main", "--user", ""], "no user"),
        (&["main", "--for", "0s"], "from 1 s to"),
        (&["main", "--for", "11years"], "from 1 s to"),
        (&["main", "--for", "soon"], "soon"),
        (
            &["nosuch"],
            "there is no target nosuch; the configuration has closed, main",
        ),
        (&["closed"], "write grants = true in its section [target.closed]"),
    ] {
        let words = [&["grant"], arguments].concat();
        let ran = job.enforcer(&words)?.demand(2)?;
        ensure!(ran.stderr.contains(says), "{arguments:?}: {ran:?}");
    }
    process.kill()?;
    process.wait()?;
    // A caller in the same.
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ > \"$1/cgroup.procs\" && shift && exec \"$@\"", "sh"]);
    command.arg(root).arg(binary("enforcer")?).arg("--config");
    let ran = ran(command.arg(job.world.path("enforcer.toml")).args(["grant", "main"]))?.demand(2)?;
    ensure!(ran.stderr.contains("allow everybody"), "{ran:?}");
    job.world.enforcer(&["revoke", "nosuch"])?.demand(2)?;
    ensure!(job.grants()?.is_empty(), "{:?}", job.grants()?);
    ensure!(
        job.world.status()?["generation"] == generation,
        "{}",
        job.world.status()?
    );
    job.inside(NOBODY).is_refused()
}

fn b4_callers_in_namespaces_are_found() -> Result<()> {
    let job = Job::new("ebpf", "")?;
    let _daemon = job.world.daemon()?;
    let namespaces = [
        "unshare",
        "--cgroup",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "--",
    ];
    // Inside, its own cgroup is called `/`.
    let shows = ["unshare", "--cgroup", "sh", "-c", "cat /proc/self/cgroup"];
    let inside = job.through(&shows, &[])?.demand(0)?;
    ensure!(inside.stdout.contains("0::/\n"), "{inside:?}");
    job.through(&namespaces, &["grant", "main"])?.demand(0)?;
    let granted = job.grants()?;
    ensure!(
        granted.first().context("no grant")?["cgroup"] == job.path()?,
        "{granted:?}"
    );
    job.inside(NOBODY).reaches()?;
    job.outside(NOBODY).is_refused()?;
    // Its process 1 is not ours.
    let ran = job.through(&namespaces, &["grant", "main", "--pid", "1"])?.demand(2)?;
    ensure!(ran.stderr.contains("PID namespace of its own"), "{ran:?}");
    job.through(&namespaces, &["revoke", "main"])?.demand(0)?;
    job.inside(NOBODY).is_refused()
}

/// `/proc` with `hidepid=`, which shows a daemon without `CAP_SYS_PTRACE` nobody but itself.
fn b4_callers_whom_proc_hides_are_found() -> Result<()> {
    for hidepid in ["noaccess,gid=1", "invisible,gid=1", "ptraceable"] {
        let job = Job::new("ebpf", "")?;
        let mount = format!("mount --types proc --options hidepid={hidepid} proc /proc && exec \"$@\"");
        let mut daemon = Command::new("unshare");
        daemon
            .args(["--mount", "sh", "-c", &mount, "sh"])
            .arg(binary("enforcer")?);
        let _daemon = job.world.daemon_with(&mut daemon)?;
        job.inside(NOBODY).is_refused()?;
        job.enforcer(&["grant", "main"])?.demand(0)?;
        let granted = job.grants()?;
        let found = &granted.first().context("no grant")?["cgroup"];
        ensure!(*found == job.path()?, "{hidepid}: {granted:?}");
        job.inside(NOBODY).reaches()?;
        job.outside(NOBODY).is_refused()?;
        job.enforcer(&["revoke", "main"])?.demand(0)?;
        job.inside(NOBODY).is_refused()?;
        // Whether a number means the same process to caller and daemon is not to be seen; the cgroup itself can be
        // named.
        let ran = job.enforcer(&["grant", "main", "--pid", "1"])?.demand(2)?;
        ensure!(
            ran.stderr.contains("hidepid=") && ran.stderr.contains("--cgroup"),
            "{ran:?}"
        );
        job.enforcer(&["grant", "main", "--cgroup", &job.path()?])?.demand(0)?;
        job.inside(NOBODY).reaches()?;
        job.enforcer(&["revoke", "main"])?.demand(0)?;
        // In a threaded cgroup, whose processes are listed in the one above only.
        let whole = job.cgroup.clone();
        let part = Job {
            cgroup: whole.join("part"),
            ..job
        };
        fs::create_dir(&part.cgroup)?;
        fs::write(part.cgroup.join("cgroup.type"), "threaded")?;
        part.enforcer(&["grant", "main"])?.demand(0)?;
        let granted = part.grants()?;
        let found = &granted.first().context("no grant")?["cgroup"];
        ensure!(*found == part.path()?, "{hidepid}, threaded: {granted:?}");
        part.inside(NOBODY).reaches()?;
        part.world.attack(NOBODY).in_cgroup(&whole).is_refused()?;
    }
    Ok(())
}

fn b4_grants_that_cannot_be_trusted_let_nobody_in() -> Result<()> {
    type Harm = fn(&Path) -> Result<()>;
    let harms: [(&str, Harm); 8] = [
        ("damaged", |path| Ok(fs::write(path, "")?)),
        ("damaged", |path| {
            let text = fs::read(path)?;
            Ok(fs::write(path, text.get(..text.len() / 2).unwrap_or_default())?)
        }),
        ("damaged", |path| {
            let text = fs::read_to_string(path)?;
            Ok(fs::write(path, text.replacen("main", "mail", 1))?)
        }),
        ("another version", |path| {
            let text = fs::read_to_string(path)?;
            Ok(fs::write(path, text.replacen("file/1", "file/9", 1))?)
        }),
        ("no grant in it is trusted", |path| {
            Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o644))?)
        }),
        ("no grant in it is trusted", |path| {
            Ok(std::os::unix::fs::chown(path, Some(NOBODY), None)?)
        }),
        ("read", |path| {
            let aside = path.with_extension("aside");
            fs::rename(path, &aside)?;
            Ok(symlink(&aside, path)?)
        }),
        ("no grant in it is trusted", |path| {
            fs::remove_file(path)?;
            Ok(fs::create_dir(path)?)
        }),
    ];
    for (says, harm) in harms {
        let job = Job::new("ebpf", "")?;
        let daemon = job.world.daemon()?;
        job.enforcer(&["grant", "main"])?.demand(0)?;
        daemon.kill()?;
        let file = job.state("grants.json");
        harm(&file)?;
        let before = fs::read(&file).ok();
        let daemon = job.world.daemon()?;
        job.inside(NOBODY).is_refused()?;
        let status = job.world.status()?;
        let causes = status["causes"].to_string();
        ensure!(
            status["state"] == "degraded" && causes.contains("grants.json") && causes.contains(says),
            "{says}: {status}"
        );
        ensure!(
            job.grants()?.is_empty() && fs::read(&file).ok() == before,
            "the file was touched"
        );
        if file.is_dir() {
            // It cannot be replaced either: nothing is granted, and the next look finds it repaired.
            let ran = job.enforcer(&["grant", "main"])?.demand(2)?;
            ensure!(ran.stderr.contains("nothing was granted"), "{ran:?}");
            job.inside(NOBODY).is_refused()?;
            ensure!(job.grants()?.is_empty(), "{:?}", job.grants()?);
            fs::remove_dir(&file)?;
        }
        job.enforcer(&["grant", "main"])?.demand(0)?;
        job.inside(NOBODY).reaches()?;
        ensure!(job.world.status()?["state"] == "enforcing", "{}", job.world.status()?);
        daemon.kill()?;
        let _daemon = job.world.daemon()?;
        job.inside(NOBODY).reaches()?;
    }
    Ok(())
}

fn b4_grants_wait_for_their_target() -> Result<()> {
    let job = Job::new("ebpf", "")?;
    let daemon = job.world.daemon()?;
    job.enforcer(&["grant", "main"])?.demand(0)?;
    for (of_target, active) in [("grants = false", false), ("grants = true", true), ("", false)] {
        job.configure("", of_target)?;
        daemon.reload()?;
        ensure!(
            job.grants()?.first().context("no grant")?["active"] == active,
            "{:?}",
            job.grants()?
        );
        ensure!(job.inside(NOBODY).run()?.errno.is_none() == active, "{of_target}");
        ensure!(job.world.status()?["state"] == "enforcing", "{}", job.world.status()?);
    }
    // A reload that fails changes nothing, and a target that is gone can have its grants revoked.
    let here = job.world.here();
    job.world.configure(&format!(
        "[target.other]\nendpoints = [\"tcp://{here}\"]\nallow = [\"root\"]\n"
    ))?;
    daemon.reload()?;
    let listed = job.world.enforcer(&["grants"])?.demand(0)?.stdout;
    ensure!(listed.contains("main") && listed.contains("inactive"), "{listed}");
    job.configure("", "grants = true")?;
    daemon.reload()?;
    job.inside(NOBODY).reaches()?;
    fs::write(job.world.path("enforcer.toml"), "nonsense")?;
    daemon.reload()?;
    job.inside(NOBODY).reaches()?;
    job.world.configure(&format!(
        "[target.other]\nendpoints = [\"tcp://{here}\"]\nallow = [\"root\"]\n"
    ))?;
    daemon.reload()?;
    job.inside(NOBODY).is_refused()?;
    job.world.enforcer(&["revoke", "main", "--all"])?.demand(0)?;
    ensure!(job.grants()?.is_empty(), "{:?}", job.grants()?);
    Ok(())
}

fn b4_only_root_grants_and_nothing_confuses_it() -> Result<()> {
    let job = Job::new("ebpf", "")?;
    let _daemon = job.world.daemon()?;
    let socket = job.world.path("run/control.sock");
    // What jobs call never fails its caller.
    for (action, code) in [
        (&["grant", "main"][..], 2),
        (&["revoke", "main"], 2),
        (&["grants"], 2),
        (&["enable-monit-access"], 0),
    ] {
        let ran = ran(job.world.enforcer_as(NOBODY)?.args(action))?.demand(code)?;
        ensure!(ran.stderr.contains("ermission denied"), "{ran:?}");
    }
    let long = format!("{{\"request\":\"grant\",\"target\":\"{}\"}}\n", "x".repeat(100_000));
    for request in [
        "{\"request\":\"grant\"}\n",
        "{\"request\":\"grant\",\"target\":7}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"to\":{\"uid\":0}}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"all\":true}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"seconds\":-1}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"seconds\":18446744073709551615}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"to\":{\"pid\":4294967295}}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"to\":{\"pid\":0}}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"to\":{\"cgroup\":\"/\\u0000\"}}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"to\":{\"cgroup\":\"/x\",\"pid\":1}}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"to\":{\"user\":\"\\u0000\"}}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"to\":{\"job\":\"x\",\"pid\":1}}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"to\":{\"job\":\"x\",\"cgroup\":\"/x\"}}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"to\":{\"job\":7}}\n",
        "{\"request\":\"grant\",\"target\":\"main\",\"to\":null}\n",
        "{\"request\":\"grant\",\"target\":\"\\u001b[2J\"}\n",
        "{\"request\":\"revoke\",\"target\":\"main\",\"all\":1}\n",
        "{\"request\":\"grant\",\"target\":\"main\"",
        &long,
    ] {
        let answer = ask_raw(&socket, request.as_bytes()).unwrap_or_else(|_| "{\"error\":\"hung up\"}".to_owned());
        ensure!(
            answer.contains("\"error\"") && !answer.contains('\u{1b}'),
            "{request:?}: {answer}"
        );
    }
    ensure!(job.grants()?.is_empty(), "{:?}", job.grants()?);
    job.inside(NOBODY).is_refused()?;
    job.enforcer(&["grant", "main"])?.demand(0)?;
    job.inside(NOBODY).reaches()
}

fn b4_grants_are_told() -> Result<()> {
    let job = Job::new("ebpf", "")?;
    let daemon = job.world.daemon()?;
    job.enforcer(&["grant", "main"])?.demand(0)?;
    job.enforcer(&["grant", "main", "--for", "1h"])?.demand(0)?;
    job.enforcer(&["revoke", "main"])?.demand(0)?;
    job.enforcer(&["grant", "main", "--for", "1s"])?.demand(0)?;
    until("the grant has ended", || Ok(job.grants()?.is_empty()))?;
    let text = job.world.enforcer(&["events", "--json"])?.demand(0)?.stdout;
    let events: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let actions: Vec<_> = events.iter().filter_map(|event| event["action"].as_str()).collect();
    ensure!(
        actions == ["granted", "renewed", "revoked", "granted", "expired"],
        "{text}"
    );
    let first = events.first().context("no event")?;
    ensure!(
        first["schema"] == "enforcer/grant/1"
            && first["uid"] == 0
            && first["comm"] == "enforcer"
            && first["pid"].as_u64() > Some(1),
        "{first}"
    );
    ensure!(first["cgroup"] == job.path()? && first["user"].is_null(), "{first}");
    let log = daemon.log();
    for line in [
        "granted main to anybody in",
        "renewed main",
        "revoked main",
        "the grant of main to anybody in",
        "asked by enforcer[",
    ] {
        ensure!(log.contains(line), "{line} is not in: {log}");
    }
    let shown = job.world.enforcer(&["events"])?.demand(0)?.stdout;
    ensure!(shown.contains("revoked main for anybody in"), "{shown}");
    Ok(())
}

fn b4_d9_a_revoked_grant_is_cut() -> Result<()> {
    let job = Job::new("ebpf", "existing = \"cut\"\n")?;
    let _daemon = job.world.daemon()?;
    job.enforcer(&["grant", "main"])?.demand(0)?;
    let mut held = job.inside(NOBODY).hold()?;
    thread::sleep(Duration::from_millis(1500));
    held.stays()?;
    job.enforcer(&["revoke", "main"])?.demand(0)?;
    held.is_cut()
}

fn f7_more_grants_than_the_maximum() -> Result<()> {
    let job = Job::new("ebpf", "")?;
    let mut grants = Grants::default();
    for uid in 100_001..100_000 + u32::try_from(MAX_GRANTS)? {
        let target = "main".to_owned();
        let to = Grantee::User(Uid(uid));
        grants.grant(Key { target, to }, lasting())?;
    }
    grants::save(&job.world.path("state"), &grants)?;
    let daemon = job.world.daemon()?;
    job.outside(100_001).reaches()?;
    job.world.enforcer(&["grant", "main", "--user", "100000"])?.demand(0)?;
    let ran = job.world.enforcer(&["grant", "main", "--user", "200000"])?.demand(2)?;
    ensure!(ran.stderr.contains("1024 grants, the maximum"), "{ran:?}");
    ensure!(job.grants()?.len() == 1024, "{}", job.grants()?.len());
    job.outside(100_000).reaches()?;
    job.outside(200_000).is_refused()?;
    daemon.kill()?;
    let _daemon = job.world.daemon()?;
    job.outside(100_000).reaches()?;
    job.world.enforcer(&["revoke", "main", "--all"])?.demand(0)?;
    job.outside(100_000).is_refused()?;
    // Cgroups at nine depths.
    let mut cgroup = job.cgroup.clone();
    let mut made = Vec::new();
    let depth = path_of(&cgroup)?.matches('/').count();
    let granted = (0..9).try_for_each(|level| -> Result<()> {
        if level > 0 {
            cgroup.push("d");
            fs::create_dir(&cgroup)?;
            made.push(cgroup.clone());
        }
        let ran = job.world.enforcer(&["grant", "main", "--cgroup", &path_of(&cgroup)?])?;
        if level < 8 {
            ran.demand(0)?;
        } else {
            let ran = ran.demand(2)?;
            ensure!(ran.stderr.contains("9 different depths"), "{ran:?}");
        }
        Ok(())
    });
    job.inside(NOBODY).reaches()?;
    for cgroup in made.iter().rev() {
        fs::remove_dir(cgroup)?;
    }
    granted.with_context(|| format!("from depth {depth} on"))
}

/// For good, granted now by this process.
pub(super) fn lasting() -> Term {
    Term {
        since: std::time::SystemTime::now().try_into().unwrap_or_default(),
        expires: None,
        by: Asker {
            pid: std::process::id(),
            comm: "tests".to_owned(),
            ..Asker::default()
        },
        own: false,
    }
}
