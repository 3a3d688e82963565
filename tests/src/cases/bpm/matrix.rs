//! All who ask for monit, each in every way: with and without the BOSH agent's own rules, with the daemon and without
//! it.

use std::{
    fmt::{self, Display},
    fs,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::{
    super::{
        jobs::{Host, Supervisor, with_vcap, write_script},
        jobs_chain::{CHAIN, agent_starts, sockets_of},
    },
    Bosh, Container, ETC, MONIT, NET_ADMIN, comes_in, scope,
};
use crate::world::{Attack, NOBODY, Ran, ran, until};

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    /// A container, as root with `CAP_NET_ADMIN`.
    Container,
    /// A pre-start of a job in a container, which the agent runs beside itself.
    PreStart,
    /// A start script of a job without a container, which monit runs beside itself.
    Start,
    /// jammy's wrapper of monit, which becomes monit.
    Wrapper,
    /// root.
    Shell,
}

/// By which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The agent's own helper: a rule for the container, else for the user of all jobs.
    Agents,
    /// Ours, by the name of the agent's.
    Name,
    /// Ours, as jammy's.
    Permit,
    /// No helper: the command itself.
    Grant,
}

const CALLERS: [Caller; 5] = [
    Caller::Container,
    Caller::PreStart,
    Caller::Start,
    Caller::Wrapper,
    Caller::Shell,
];

/// Whether the job is let in once somebody has asked in some way, and the exit code.
fn expected(caller: Caller, way: Way, daemon: bool) -> (bool, i32) {
    let (may, code) = match (caller, way) {
        // They reach no daemon, or hold what supervises others.
        (Caller::Container | Caller::PreStart | Caller::Start, Way::Grant) => (false, 2),
        // All jobs are beside the one, which has no container that could be named; the other is root's, who needs
        // nothing.
        (Caller::Start, Way::Name) | (Caller::Wrapper, Way::Name | Way::Permit) => (false, 0),
        (_, Way::Agents | Way::Name | Way::Permit | Way::Grant) => (true, 0),
    };
    if daemon {
        return (may, code);
    }
    // A command fails, a helper never does.
    (false, if way == Way::Grant { 2 } else { 0 })
}

/// All who ask.
struct Scene<'a> {
    bosh: &'a Bosh,
    container: Container<'a>,
    /// The job of the pre-start.
    job: String,
    /// What is in `/var/vcap`.
    vcap: PathBuf,
    _supervisors: [Supervisor; 2],
}

/// What has come of a call.
struct Cell {
    caller: Caller,
    way: Way,
    asked: Ran,
}

impl<'a> Scene<'a> {
    fn new(bosh: &'a Bosh) -> Result<Self> {
        let (host, job) = (&bosh.host, bosh.job("prestart"));
        for caller in &CALLERS[1..] {
            fs::create_dir_all(own_cgroup(host, *caller).join("monit-api-access"))?;
        }
        let vcap = host.world.path("vcap");
        for (script, config) in [
            (format!("jobs/{job}/bin/pre-start"), Some("bpm.yml")),
            ("jobs/plain/bin/ctl".to_owned(), None),
            ("bosh/bin/monit".to_owned(), None),
        ] {
            let bin = vcap.join(&script);
            let bin = bin.parent().context("no directory")?;
            fs::create_dir_all(bin)?;
            write_script(&vcap.join(&script), "#!/bin/bash\nset -e\neval \"$1\"\necho went on\n")?;
            if let Some(config) = config {
                let dir = bin.with_file_name("config");
                fs::create_dir(&dir)?;
                fs::write(dir.join(config), "")?;
            }
        }
        let supervisors = [
            Supervisor::start(host, "bosh-agent", &own_cgroup(host, Caller::PreStart))?,
            Supervisor::start(host, "monit", &own_cgroup(host, Caller::Start))?,
        ];
        let container = Container::start(bosh, "matrix", 0, NET_ADMIN)?;
        // The other job's container runs already, as at an update.
        fs::create_dir(scope(&job)?)?;
        Ok(Self {
            bosh,
            container,
            job,
            vcap,
            _supervisors: supervisors,
        })
    }

    fn asks(&self, caller: Caller, way: Way) -> Result<Ran> {
        let host = &self.bosh.host;
        let (bin, config) = (host.bin(), host.world.path("enforcer.toml"));
        let text = match (caller, way) {
            (Caller::Container, Way::Name) => format!("{ETC}/bosh-enable-monit-access"),
            (_, Way::Name) => format!(
                "{}/bosh-enable-monit-access --config {}",
                bin.display(),
                config.display()
            ),
            (Caller::Container, Way::Permit) => format!("source {ETC}/monit-access-helper.sh; permit_monit_access"),
            (_, Way::Permit) => format!("source {}/helper.sh; permit_monit_access", bin.display()),
            (_, Way::Grant) => "enforcer grant monit >/dev/null".to_owned(),
            (_, Way::Agents) => {
                let whom = match caller {
                    Caller::Container => sockets_of(&scope(&self.container.job)?)?,
                    Caller::PreStart | Caller::Start | Caller::Wrapper | Caller::Shell => {
                        format!("meta skuid {NOBODY}")
                    }
                };
                let rule = format!("insert rule {CHAIN} {whom} ip daddr 127.0.0.1 tcp dport {MONIT} accept");
                return ran(host.netns.command(Path::new("nft")).arg(rule));
            }
        };
        let script = match caller {
            Caller::Container => return self.container.script(&format!("set -e; {text}; echo went on")),
            Caller::Shell => return host.script(&own_cgroup(host, caller), &format!("set -e; {text}; echo went on")),
            Caller::PreStart => format!("jobs/{}/bin/pre-start", self.job),
            Caller::Start => "jobs/plain/bin/ctl".to_owned(),
            Caller::Wrapper => "bosh/bin/monit".to_owned(),
        };
        let text = format!("/var/vcap/{script} \"{text}\"");
        with_vcap(host, &self.vcap, &own_cgroup(host, caller), &text)
    }

    /// An attempt of the job for which somebody has asked, by a user who may nothing.
    fn attack(&self, caller: Caller, way: Way) -> Result<Attack> {
        let host = &self.bosh.host;
        let own = own_cgroup(host, caller);
        let cgroup = match (caller, way) {
            (Caller::Container, _) => return self.container.attack(),
            (Caller::PreStart, Way::Name) => scope(&self.job)?,
            // Who has called is there.
            (Caller::PreStart | Caller::Start | Caller::Shell, Way::Permit) => own.join("monit-api-access"),
            (_, Way::Agents | Way::Name | Way::Permit | Way::Grant) => own,
        };
        Ok(host.outside(NOBODY)?.in_cgroup(&cgroup))
    }

    /// Has all of some ask at once, in these ways, and looks who is let in then.
    fn walk(&self, when: When, callers: &[Caller], ways: &[Way]) -> Result<()> {
        let Self { bosh, .. } = self;
        let cells = ways.iter().flat_map(|way| callers.iter().map(|caller| (*caller, *way)));
        let cells = at_once(cells, |(caller, way)| {
            let asked = self.asks(caller, way)?;
            Ok(Cell { caller, way, asked })
        })?;
        let expected = |cell: &Cell| expected(cell.caller, cell.way, when.daemon);
        let may = |cell: &Cell| expected(cell).0;
        for cell in cells.iter().filter(|cell| may(cell)) {
            comes_in(&self.attack(cell.caller, cell.way)?)
                .with_context(|| format!("{when} {:?} {:?}: {:?}", cell.caller, cell.way, cell.asked))?;
        }
        // By then whatever could let in somebody else has done so.
        let mut attacks = vec![bosh.host.outside(NOBODY)?];
        for cell in &cells {
            attacks.push(self.attack(cell.caller, cell.way)?);
        }
        let mut met = at_once(&attacks, Met::by)?.into_iter();
        let outside = met.next().context("nobody was outside")?;
        for (cell, inside) in cells.iter().zip(met) {
            let Cell { caller, way, asked } = cell;
            let told = if asked.stderr.is_empty() { "silent" } else { "told" };
            let (caller_name, way_name) = (format!("{caller:?}"), format!("{way:?}"));
            println!(
                "    {when} {caller_name:<9} {way_name:<6}: {} {told:<6} inside {inside:<8} outside {outside}",
                asked.code
            );
            let context = || format!("{when} {caller:?} {way:?}: {asked:?}, inside {inside}, outside {outside}");
            when.allows(inside, may(cell), bosh).with_context(context)?;
            // A user who is named is let in wherever he is.
            let names_user = when.daemon && *way == Way::Agents && *caller != Caller::Container;
            when.allows(outside, names_user, bosh).with_context(context)?;
            ensure!(asked.code == expected(cell).1, "{}", context());
            let needs_nothing = *caller == Caller::Wrapper;
            // Whoever is not let in is told, and who is told is not let in.
            if when.daemon && !needs_nothing {
                ensure!(asked.stderr.is_empty() == may(cell), "{}", context());
            }
        }
        Ok(())
    }

    /// Until nobody is let in.
    fn forget(&self, when: When) -> Result<()> {
        let host = &self.bosh.host;
        host.netns.nft(&format!("flush chain {CHAIN}"))?;
        if !when.daemon {
            return Ok(());
        }
        host.revoke_all()?;
        until("nothing is granted", || {
            let text = host.enforcer(&["grants", "--json"])?.demand(0)?.stdout;
            let report: Value = serde_json::from_str(&text)?;
            Ok(report["grants"] == json!([]) && report["job_rules"] == json!([]))
        })?;
        // Where it takes no 3 s, it is tried, too.
        if !(when.agents && self.bosh.backend == "nftables") {
            for attack in [host.outside(NOBODY)?, self.container.attack()?] {
                until("nobody is let in", || Ok(attack.run()?.errno.is_some()))?;
            }
        }
        Ok(())
    }

    fn walk_all(&self, when: When) -> Result<()> {
        let (container, others) = CALLERS.split_at(1);
        let ours = [Way::Name, Way::Permit, Way::Grant];
        // Without a daemon nobody is let in, and all wait for it at once.
        let apart = if when.daemon { 1 } else { ours.len() };
        let agents = [(container, &[Way::Agents][..]), (others, &[Way::Agents])];
        let ours = ours.chunks(apart).map(|ways| (&CALLERS[..], ways));
        for (callers, ways) in agents.into_iter().chain(ours) {
            self.walk(when, callers, ways)?;
            self.forget(when)?;
        }
        Ok(())
    }
}

impl Drop for Scene<'_> {
    fn drop(&mut self) {
        if let Ok(scope) = scope(&self.job) {
            let _ = fs::remove_dir(scope);
        }
    }
}

fn own_cgroup(host: &Host, caller: Caller) -> PathBuf {
    host.world.cgroup.join(format!("{caller:?}"))
}

/// The same with each of several at once, with what comes of them in their order.
fn at_once<T: Send, R: Send>(
    several: impl IntoIterator<Item = T>,
    act: impl Fn(T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let act = &act;
    thread::scope(|scope| {
        let started: Vec<_> = several.into_iter().map(|one| scope.spawn(move || act(one))).collect();
        let ended = started
            .into_iter()
            .map(|one| one.join().map_err(|_| anyhow!("a part of the case panicked"))?);
        ended.collect()
    })
}

/// What an attempt met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Met {
    Monit,
    Eperm,
    Reset,
    Nothing,
}

impl Met {
    fn by(attack: &Attack) -> Result<Self> {
        Ok(match attack.run()?.errno {
            None => Self::Monit,
            Some(libc::EPERM) => Self::Eperm,
            Some(libc::ECONNREFUSED) => Self::Reset,
            Some(libc::ETIMEDOUT) => Self::Nothing,
            Some(other) => bail!("{attack:?} failed by {}", std::io::Error::from_raw_os_error(other)),
        })
    }
}

impl Display for Met {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Monit => "let in",
            Self::Eperm => "refused",
            Self::Reset => "reset",
            Self::Nothing => "dropped",
        })
    }
}

/// What there is when somebody asks.
#[derive(Clone, Copy, Debug)]
struct When {
    daemon: bool,
    agents: bool,
}

impl Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let daemon = if self.daemon { "daemon up,  " } else { "daemon down," };
        let agents = if self.agents {
            "agent's rules,"
        } else {
            "ours alone,   "
        };
        write!(f, "{daemon} {agents}")
    }
}

impl When {
    /// Fails unless an attempt met what it should.
    fn allows(self, met: Met, may: bool, bosh: &Bosh) -> Result<()> {
        let fits = match met {
            Met::Monit => may,
            Met::Eperm => !may && bosh.backend != "nftables",
            Met::Reset => !may && bosh.backend == "nftables",
            // The agent's rules come before those of ours.
            Met::Nothing => !may && bosh.backend == "nftables" && self.agents,
        };
        ensure!(fits, "it should be {}", if may { "let in" } else { "refused" });
        Ok(())
    }
}

/// Walks all of it.
pub(super) fn matrix(backend: &'static str) -> Result<()> {
    let bosh = Bosh::new(backend)?;
    let host = &bosh.host;
    let scene = Scene::new(&bosh)?;
    let daemon = host.daemon()?;
    let when = |daemon, agents| When { daemon, agents };
    scene.walk_all(when(true, false))?;
    agent_starts(&host.netns, MONIT)?;
    scene.walk_all(when(true, true))?;
    daemon.kill()?;
    scene.walk_all(when(false, true))?;
    host.netns.nft("delete chain inet bosh_agent monit_access")?;
    scene.walk_all(when(false, false))?;
    // A container's rule waits for the daemon.
    scene.container.asks_in_silence()?;
    host.is_refused(&scene.container.attack()?)?;
    let _daemon = host.daemon()?;
    scene.container.attack()?.reaches()?;
    host.is_refused(&host.outside(NOBODY)?)
}
