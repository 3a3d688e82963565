//! The daemon over a kernel that is made up, for what a real one does only now and then: refuse, lose a part, hold
//! another process's rules. Files, sockets and lookups are real.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};

use super::{
    fake::{Drifted, Fake},
    *,
};
use crate::{
    backend::Dial,
    control::{self, Call, Peer},
    sweep::{self, SweepReport},
    testing::{Test, in_a_runtime_of_its_own},
    wire::{GrantRequest, Request, RevokeRequest, Selector, State},
};

const PATIENCE: Duration = Duration::from_secs(20);
const FIRST: &str = "[target.t]\nendpoints = [\"tcp://192.0.2.1:4222\"]\nallow = [\"root\"]\ngrants = true\n";
const SECOND: &str = "[target.t]\nendpoints = [\"tcp://192.0.2.2:4222\"]\nallow = [\"root\"]\ngrants = true\n";
const NAMED: &str = "[target.t]\nendpoints = [\"tcp://bus.test:4222\"]\nallow = [\"root\"]\n";
const BROKEN: &str = "[target.t]\nendpoints = [\"tcp://192.0.2.1\"]\nallow = [\"root\"]\n";

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// A machine on which daemons run one after the other.
struct Host {
    machine: Fake,
    config: PathBuf,
}

impl Host {
    fn new(machine: Fake, targets: &str) -> Fallible<Self> {
        let host = Self {
            machine,
            config: "/run/enforcer.toml".into(),
        };
        host.configure(targets)?;
        Ok(host)
    }

    fn configure(&self, targets: &str) -> Fallible<()> {
        let top = "backend = \"nftables\"\nstate_dir = \"/run/state\"\nsocket = \"/run/enforcer/control.sock\"\n\
                   pin_dir = \"/run/pins\"\n";
        Ok(fs::write(&self.config, format!("{top}{targets}"))?)
    }

    /// A start, up to what waits for nobody.
    fn start(&self) -> Result<Daemon, DaemonError> {
        boot::enforce(&self.machine, &self.config).map(|(daemon, _)| daemon)
    }

    /// The endpoints that are active.
    fn active(&self) -> Vec<String> {
        let rules = self.machine.active();
        let places = rules.into_iter().flat_map(|rules| rules.places);
        places.map(|(place, _)| place.net.to_string()).collect()
    }
}

/// Somebody at the control socket, who is this process.
fn peer() -> Fallible<Peer> {
    let (stream, _other) = UnixStream::pair()?;
    Ok(Peer::of(&stream)?)
}

impl Daemon {
    /// The first reply to a request.
    async fn asked(&mut self, request: Request) -> Fallible<Reply> {
        let (replies, mut reply) = mpsc::channel(4);
        let peer = peer()?;
        let end = self.answer(Call { request, peer, replies });
        assert!(
            !matches!(end, Step::Unload(_) | Step::Stop),
            "this request ends the loop"
        );
        while reply.is_empty() && !reply.is_closed() {
            let joined = self.lookups.join_next_with_id().await.ok_or("nothing is looked up")?;
            self.answered(joined);
            self.apply_or_keep();
            self.answer_waiting();
        }
        Ok(timeout(PATIENCE, reply.recv()).await?.ok_or("no reply")?)
    }

    fn causes(&mut self) -> String {
        self.status().causes.join("\n")
    }
}

fn to_user(user: &str) -> Selector {
    Selector {
        user: Some(user.to_owned()),
        ..Selector::default()
    }
}

fn grant(user: &str, seconds: Option<u64>) -> Request {
    Request::Grant(GrantRequest {
        target: "t".to_owned(),
        to: to_user(user),
        otherwise: None,
        seconds,
    })
}

fn revoke(user: &str) -> Request {
    Request::Revoke(RevokeRequest {
        target: "t".to_owned(),
        to: to_user(user),
        all: false,
    })
}

#[track_caller]
fn refused(reply: &Reply, part: &str) {
    assert!(
        matches!(&reply, Reply::Error(error) if error.contains(part)),
        "no {part:?} in {reply:?}"
    );
}

#[test]
fn a_restart_goes_on_and_a_refused_configuration_changes_nothing() -> Test {
    in_a_runtime_of_its_own(async || {
        let host = Host::new(Fake::default(), FIRST)?;
        let mut daemon = host.start()?;
        daemon.save_now().await;
        assert_eq!(host.active(), ["192.0.2.1/32"]);
        assert_eq!(daemon.status().state, State::Enforcing);
        drop(daemon);
        // Nothing to do but to go on.
        let mut daemon = host.start()?;
        daemon.save_now().await;
        assert_eq!(host.active(), ["192.0.2.1/32"]);
        drop(daemon);
        // What was active stays; it is what the last run kept.
        host.configure(BROKEN)?;
        let mut daemon = host.start()?;
        assert_eq!(host.active(), ["192.0.2.1/32"]);
        let causes = daemon.causes();
        assert!(
            causes.contains("192.0.2.1") && causes.contains("the last known good rules are active"),
            "{causes}"
        );
        assert!(!daemon.retry(), "it is the same file");
        host.configure(SECOND)?;
        fs::File::options()
            .write(true)
            .open(&host.config)?
            .set_modified(std::time::UNIX_EPOCH)?;
        assert!(daemon.retry());
        assert_eq!(
            (host.active(), daemon.causes().as_str()),
            (vec!["192.0.2.2/32".to_owned()], "")
        );
        daemon.save_now().await;
        drop(daemon);
        // After a reboot the kernel holds nothing.
        *host.machine.kernel() = fake::Kernel::default();
        host.configure(BROKEN)?;
        let daemon = host.start()?;
        assert_eq!(host.active(), ["192.0.2.2/32"]);
        drop(daemon);
        // A file that has gone names no defaults.
        fs::remove_file(&host.config)?;
        let error = host.start().err().ok_or("it starts")?;
        assert!(error.to_string().contains("/run/enforcer.toml"), "{error}");
        Ok(())
    })
}

#[test]
fn rules_that_nobody_knows_stay_until_they_are_known() -> Test {
    in_a_runtime_of_its_own(async || {
        // The kernel guards addresses of t, and nothing on disk says which.
        let host = Host::new(Fake::guarding(&["t"]), NAMED)?;
        let mut daemon = host.start()?;
        assert!(host.active().is_empty() && daemon.guard.is_held());
        let causes = daemon.causes();
        assert!(causes.contains("the saved rules are missing or damaged"), "{causes}");
        let Reply::Status(status) = daemon.asked(Request::Refresh).await? else {
            return Err("no status".into());
        };
        assert_eq!(status.state, State::Enforcing);
        assert_eq!(host.active(), ["127.0.0.8/32"]);
        assert!(!daemon.guard.is_held());
        Ok(())
    })
}

#[test]
fn a_reload_is_taken_whole_or_not_at_all() -> Test {
    in_a_runtime_of_its_own(async || {
        let host = Host::new(Fake::default(), FIRST)?;
        let mut daemon = host.start()?;
        let (_call, calls) = mpsc::channel(1);
        let mut sources = Sources::open(&mut daemon, calls)?;
        let mut reload = |daemon: &mut Daemon| {
            let step = daemon.step(Wakeup::Reload, &mut sources);
            assert!(matches!(step, Step::Follow));
            sources.follow(daemon);
        };
        host.configure(BROKEN)?;
        reload(&mut daemon);
        assert_eq!(host.active(), ["192.0.2.1/32"]);
        assert!(daemon.causes().contains("reload: "), "{}", daemon.causes());
        // One that this kernel refuses.
        host.configure(SECOND)?;
        host.machine.kernel().refuses = true;
        reload(&mut daemon);
        host.machine.kernel().refuses = false;
        assert_eq!(host.active(), ["192.0.2.1/32"]);
        assert!(
            daemon.causes().contains("the previous rules stay active"),
            "{}",
            daemon.causes()
        );
        // Keys that hold for the whole run.
        fs::write(&host.config, format!("socket = \"/run/other.sock\"\n{SECOND}"))?;
        reload(&mut daemon);
        assert!(daemon.causes().contains("socket"), "{}", daemon.causes());
        fs::remove_file(&host.config)?;
        reload(&mut daemon);
        assert!(!daemon.causes().is_empty());
        host.configure(SECOND)?;
        reload(&mut daemon);
        daemon.save_now().await;
        assert_eq!(
            (host.active(), daemon.causes().as_str()),
            (vec!["192.0.2.2/32".to_owned()], "")
        );
        Ok(())
    })
}

#[test]
fn a_grant_is_in_the_kernel_and_on_disk_or_nowhere() -> Test {
    in_a_runtime_of_its_own(async || {
        let host = Host::new(Fake::default(), FIRST)?;
        let mut daemon = host.start()?;
        let before = host.machine.active();
        let granted = |reply: &Reply| matches!(reply, Reply::Grant(_));
        assert!(granted(&daemon.asked(grant("7", Some(60))).await?));
        let with_grant = host.machine.active();
        assert_ne!(with_grant, before);
        assert!(fs::read_to_string("/run/state/grants.json")?.contains("user"));
        daemon.save_now().await;
        drop(daemon);
        let mut daemon = host.start()?;
        assert_eq!(host.machine.active(), with_grant, "a restart keeps it");
        // The kernel refuses: nothing is kept.
        host.machine.kernel().refuses = true;
        refused(&daemon.asked(grant("8", None)).await?, "nothing was granted");
        host.machine.kernel().refuses = false;
        // The disk refuses: nothing is enforced.
        fs::rename("/run/state", "/run/aside")?;
        fs::write("/run/state", "")?;
        refused(&daemon.asked(grant("8", None)).await?, "nothing was granted");
        assert_eq!(host.machine.active(), with_grant);
        fs::remove_file("/run/state")?;
        fs::rename("/run/aside", "/run/state")?;
        for (request, part) in [
            (grant("8", Some(0)), "a grant lasts from 1 s"),
            (grant("8", Some(u64::MAX)), "a grant lasts from 1 s"),
            (grant("nobody-of-that-name", None), "nobody-of-that-name"),
        ] {
            refused(&daemon.asked(request).await?, part);
        }
        // A revocation that the kernel refuses is not brought back by a restart.
        host.machine.kernel().refuses = true;
        refused(
            &daemon.asked(revoke("7")).await?,
            "the grant is revoked, but the previous rules stay active",
        );
        assert!(!fs::read_to_string("/run/state/grants.json")?.contains("user"));
        host.machine.kernel().refuses = false;
        daemon.tick(None);
        assert_eq!(host.machine.active(), before);
        assert!(matches!(daemon.asked(revoke("7")).await?, Reply::Revoked(events) if events.is_empty()));
        assert!(matches!(daemon.asked(Request::Grants).await?, Reply::Grants(report) if report.grants.is_empty()));
        Ok(())
    })
}

#[test]
fn what_others_do_is_repaired_and_reported() -> Test {
    in_a_runtime_of_its_own(async || {
        let host = Host::new(Fake::default(), FIRST)?;
        let mut daemon = host.start()?;
        daemon.save_now().await;
        host.machine.kernel().drift = Some(Drifted::Part);
        daemon.tick(None);
        assert!(
            daemon.causes().contains("another process removed or changed"),
            "{}",
            daemon.causes()
        );
        assert_eq!(daemon.status().restored, 1);
        assert!(matches!(daemon.asked(Request::Verify).await?, Reply::Verification(found) if found.identical));
        host.machine.kernel().applied.clear();
        assert!(matches!(daemon.asked(Request::Verify).await?, Reply::Verification(found) if !found.identical));
        host.machine.kernel().refuses = true;
        refused(&daemon.asked(Request::Verify).await?, "fake");
        assert!(daemon.causes().contains("fake"), "what cannot be read is a cause");
        Ok(())
    })
}

#[test]
fn the_loop_answers_and_ends() -> Test {
    in_a_runtime_of_its_own(async || {
        let host = Host::new(Fake::default(), NAMED)?;
        let (daemon, socket) = boot::enforce(&host.machine, &host.config)?;
        let path = socket.path().to_path_buf();
        let running = tokio::task::spawn_local(turn(daemon, socket));
        let ask = async |request: Request| control::ask(&path, &request, PATIENCE).await;
        assert!(matches!(ask(Request::Refresh).await?, Reply::Status(_)));
        assert_eq!(host.active(), ["127.0.0.8/32"]);
        // Once it is ready, the rules are saved.
        while !Path::new("/run/state/last-good.json").exists() {
            sleep(Duration::from_millis(5)).await;
        }
        let Reply::Status(status) = ask(Request::Status).await? else {
            return Err("no status".into());
        };
        assert_eq!(
            (status.state, status.causes.as_slice()),
            (State::Enforcing, [].as_slice())
        );
        // Somebody removes the socket, and later puts something else there.
        fs::remove_file(&path)?;
        while ask(Request::Status).await.is_err() {
            sleep(Duration::from_millis(50)).await;
        }
        fs::remove_file(&path)?;
        fs::write(&path, "")?;
        while ask(Request::Status).await.is_err() {
            sleep(Duration::from_millis(50)).await;
        }
        assert!(matches!(ask(Request::Unload).await?, Reply::Done));
        assert_eq!(
            timeout(PATIENCE, running).await??.map_err(|error| error.to_string())?,
            End::Unloaded
        );
        assert_eq!(host.machine.kernel().generation, 0);
        assert!(!path.exists());
        Ok(())
    })
}

#[test]
fn a_start_that_fails_leaves_no_socket() -> Test {
    in_a_runtime_of_its_own(async || {
        let host = Host::new(Fake::default(), FIRST)?;
        host.machine.kernel().refuses = true;
        assert!(host.start().is_err());
        assert!(!Path::new("/run/enforcer/control.sock").exists());
        Ok(())
    })
}

#[test]
fn a_dial_of_an_unknown_address_looks_the_ports_names_up() -> Test {
    in_a_runtime_of_its_own(async || {
        let host = Host::new(Fake::default(), NAMED)?;
        let mut daemon = host.start()?;
        daemon.asked(Request::Refresh).await?;
        assert_eq!(host.machine.kernel().gates.get(&4222), Some(&true));
        let dial = |port| Dial {
            to: ([192, 0, 2, 9], port).into(),
            user: Some(7),
        };
        daemon.dialled(dial(4222));
        assert_eq!(daemon.lookups.len(), 1);
        // A port of no names: its gate is shut.
        daemon.dialled(dial(22));
        assert_eq!(host.machine.kernel().gates.get(&22), Some(&false));
        assert_eq!(daemon.lookups.len(), 1);
        while let Some(joined) = daemon.lookups.join_next_with_id().await {
            daemon.answered(joined);
        }
        assert_eq!(daemon.status().dials.len(), 1);
        let due = daemon.next_due().ok_or("no rest")?;
        host.machine.kernel().knocks.insert(4222);
        daemon.wake_dials(due);
        assert_eq!(daemon.lookups.len(), 1, "somebody has dialled it since");
        host.machine.kernel().refuses = true;
        daemon.dialled(dial(22));
        assert!(
            daemon.causes().contains("do not trigger lookups"),
            "{}",
            daemon.causes()
        );
        Ok(())
    })
}

#[test]
fn what_a_sweep_finds_is_in_the_status() -> Test {
    in_a_runtime_of_its_own(async || {
        let host = Host::new(Fake::default(), FIRST)?;
        let mut daemon = host.start()?;
        let report = sweep::once(&daemon.sweeps).await.ok_or("nothing to sweep by")?;
        let fault = Some("sock_diag does not answer".to_owned());
        daemon.swept(SweepReport { fault, ..report });
        assert!(daemon.causes().contains("sock_diag does not answer"));
        assert!(daemon.status().existing.is_some());
        Ok(())
    })
}
