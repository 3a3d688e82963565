//! The commands as an operator uses them: with a daemon, without one, and with something broken.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use clap::Parser as _;
use nix::{
    sys::signal::{Signal, raise},
    unistd::{dup, dup2_stdout},
};
use serde_json::Value;

use super::{Cli, ExitStatus, run};
use crate::testing::{Test, on_a_host_of_its_own};

/// How long something may take that takes moments.
const PATIENCE: Duration = Duration::from_secs(20);
/// A place that root may connect to, and one that it may not.
const OPEN: &str = "127.0.0.9:4222";
const CLOSED: &str = "127.0.0.9:4333";

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// Who sits at the terminal.
struct Operator {
    config: PathBuf,
}

/// What a command said, and how it ended.
#[derive(Debug)]
struct Answer {
    end: ExitStatus,
    text: String,
}

impl Answer {
    #[track_caller]
    fn expect(self, end: ExitStatus, parts: &[&str]) -> Self {
        assert_eq!(self.end, end, "{}", self.text);
        for part in parts {
            assert!(self.text.contains(part), "no {part:?} in:\n{}", self.text);
        }
        self
    }

    /// A value of its JSON, by its JSON pointer (RFC 6901).
    fn value(&self, pointer: &str) -> Fallible<Value> {
        let found: Value = serde_json::from_str(self.text.lines().next().ok_or("no line")?)?;
        Ok(found
            .pointer(pointer)
            .ok_or_else(|| format!("no {pointer} in {found}"))?
            .clone())
    }
}

fn configuration(targets: &str) -> String {
    format!(
        "backend = \"nftables\"\nstate_dir = \"/run/state\"\nsocket = \"/run/enforcer/control.sock\"\n\
         pin_dir = \"/run/pins\"\n{targets}"
    )
}

fn two_targets() -> String {
    configuration(&format!(
        "[target.open]\nendpoints = [\"tcp://{OPEN}\", \"tcp://bus.test:4244\"]\nallow = [\"root\"]\ngrants = true\n\
         [target.closed]\nendpoints = [\"tcp://{CLOSED}\"]\nallow = [\"daemon\"]\n"
    ))
}

impl Operator {
    fn new(text: &str) -> Fallible<Self> {
        let operator = Self {
            config: "/run/enforcer.toml".into(),
        };
        operator.configure(text)?;
        Ok(operator)
    }

    fn configure(&self, text: &str) -> io::Result<()> {
        fs::write(&self.config, text)
    }

    /// Runs a command as the program does, after its arguments are read.
    fn try_run(&self, arguments: &[&str]) -> anyhow::Result<Answer> {
        let config = self.config.display().to_string();
        let words = ["enforcer", "--config", &config].into_iter();
        let cli = Cli::try_parse_from(words.chain(arguments.iter().copied()))?;
        io::stdout().flush()?;
        let (terminal, mut page) = (dup(io::stdout())?, tempfile::tempfile_in("/run")?);
        dup2_stdout(&page)?;
        let end = run(&cli);
        dup2_stdout(&terminal)?;
        let mut text = String::new();
        page.rewind()?;
        page.read_to_string(&mut text)?;
        Ok(Answer { end: end?, text })
    }

    #[track_caller]
    fn run(&self, arguments: &[&str]) -> Answer {
        match self.try_run(arguments) {
            Ok(answer) => answer,
            Err(error) => panic!("{arguments:?}: {error:#}"),
        }
    }

    /// The error that a command ends with.
    #[track_caller]
    fn fails(&self, arguments: &[&str]) -> String {
        match self.try_run(arguments) {
            Ok(answer) => panic!("{arguments:?}: {answer:?}"),
            Err(error) => format!("{error:#}"),
        }
    }

    /// Asks until the answer has something in it.
    #[track_caller]
    fn until(&self, arguments: &[&str], part: &str) -> Answer {
        let end = Instant::now() + PATIENCE;
        loop {
            let answer = self.try_run(arguments);
            match answer {
                Ok(answer) if answer.text.contains(part) => return answer,
                answer => assert!(Instant::now() < end, "no {part:?} in {answer:?}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// A daemon, in a thread that has its own rights.
    fn start(&self) -> JoinHandle<Result<ExitStatus, String>> {
        let config = self.config.display().to_string();
        let words = ["enforcer".to_owned(), "--config".to_owned(), config, "run".to_owned()];
        thread::spawn(move || {
            let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
            run(&cli).map_err(|error| format!("{error:#}"))
        })
    }
}

fn ended(daemon: JoinHandle<Result<ExitStatus, String>>) -> Fallible<ExitStatus> {
    let end = Instant::now() + PATIENCE;
    while !daemon.is_finished() {
        assert!(Instant::now() < end, "the daemon runs on");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(daemon.join().map_err(|_| "the daemon panicked")??)
}

fn dial(to: &str) -> io::Result<()> {
    let to: SocketAddr = to.parse().map_err(io::Error::other)?;
    TcpStream::connect_timeout(&to, Duration::from_secs(5)).map(drop)
}

#[test]
fn a_day_with_the_daemon() -> Test {
    on_a_host_of_its_own(|| {
        let operator = Operator::new(&two_targets())?;
        let listeners = [TcpListener::bind(OPEN)?, TcpListener::bind(CLOSED)?];
        dial(CLOSED)?;
        operator.run(&["status"]).expect(ExitStatus::No, &["off"]);
        let daemon = operator.start();
        operator.until(&["status"], "enforcing");
        dial(OPEN)?;
        let denied = dial(CLOSED).map_err(|error| error.kind());
        assert!(denied.is_err(), "root is not the user daemon");
        let events = operator.until(&["events", "--json"], "4333");
        assert_eq!(events.value("/schema")?, "enforcer/event/1");
        assert_eq!(events.value("/target")?, "closed");
        operator.run(&["events"]).expect(ExitStatus::Yes, &[CLOSED]);

        operator
            .run(&["check", "root", OPEN])
            .expect(ExitStatus::Yes, &["allow"]);
        operator
            .run(&["check", "root", CLOSED])
            .expect(ExitStatus::No, &["deny", "closed"]);
        operator
            .run(&["check", "65534", "127.0.0.9:22"])
            .expect(ExitStatus::Yes, &[]);
        let check = operator
            .run(&["check", "--json", "daemon", OPEN])
            .expect(ExitStatus::No, &[]);
        assert_eq!(check.value("/verdict")?, "deny");
        operator.run(&["verify"]).expect(ExitStatus::Yes, &["identical"]);
        operator.run(&["refresh"]).expect(ExitStatus::Yes, &["bus.test"]);

        operator.run(&["grants"]).expect(ExitStatus::Yes, &[]);
        operator
            .run(&["grant", "open", "--user", "daemon", "--for", "1h"])
            .expect(ExitStatus::Yes, &["open"]);
        operator.run(&["check", "daemon", OPEN]).expect(ExitStatus::Yes, &[]);
        let grants = operator.run(&["grants", "--json"]).expect(ExitStatus::Yes, &[]);
        assert_eq!(grants.value("/grants/0/user")?, 1);
        operator.run(&["grants"]).expect(ExitStatus::Yes, &["open"]);
        operator
            .run(&["revoke", "open", "--user", "daemon"])
            .expect(ExitStatus::Yes, &[]);
        operator
            .run(&["revoke", "open", "--user", "daemon"])
            .expect(ExitStatus::No, &[]);
        operator.run(&["check", "daemon", OPEN]).expect(ExitStatus::No, &[]);
        for (arguments, part) in [
            (["grant", "closed", "--user", "daemon"], "grants = true"),
            (
                ["grant", "elsewhere", "--user", "daemon"],
                "there is no target elsewhere",
            ),
            (
                ["grant", "open", "--user", "nobody-of-that-name"],
                "nobody-of-that-name",
            ),
            (["grant", "open", "--cgroup", "not/there"], "begin it with /"),
            (
                ["revoke", "elsewhere", "--user", "daemon"],
                "there is no target elsewhere",
            ),
        ] {
            let error = operator.fails(&arguments);
            assert!(error.contains(part), "{error}");
        }
        operator.run(&["doctor", "--json"]).value("/findings")?;
        operator.run(&["unload"]).expect(ExitStatus::Yes, &["unloaded"]);
        assert_eq!(ended(daemon)?, ExitStatus::Unloaded);
        dial(CLOSED)?;
        drop(listeners);
        Ok(())
    })
}

#[test]
fn what_is_broken_while_the_daemon_runs() -> Test {
    on_a_host_of_its_own(|| {
        let operator = Operator::new(&two_targets())?;
        let daemon = operator.start();
        operator.until(&["status"], "enforcing");
        // A configuration that is wrong changes nothing, and one that is right again is taken.
        operator.configure(&configuration(
            "[target.closed]\nendpoints = [\"tcp://nowhere\"]\nallow = [\"root\"]\n",
        ))?;
        raise(Signal::SIGHUP)?;
        operator
            .until(&["status"], "degraded")
            .expect(ExitStatus::No, &["nowhere", "closed"]);
        operator.run(&["check", "root", CLOSED]).expect(ExitStatus::No, &[]);
        let other = two_targets().replace(CLOSED, "127.0.0.9:4444");
        operator.configure(&other)?;
        raise(Signal::SIGHUP)?;
        operator.until(&["status"], "enforcing");
        operator
            .run(&["check", "root", "127.0.0.9:4444"])
            .expect(ExitStatus::No, &[]);
        operator.run(&["check", "root", CLOSED]).expect(ExitStatus::Yes, &[]);
        // What another process removes comes back.
        assert!(crate::backend::remove_table("enforcer")?);
        operator.until(&["status"], "another process");
        operator
            .run(&["check", "root", "127.0.0.9:4444"])
            .expect(ExitStatus::No, &[]);
        operator.run(&["verify"]).expect(ExitStatus::Yes, &["identical"]);
        // What is kept is kept again; the daemon's own end leaves all as it is.
        fs::remove_file("/run/state/last-good.json")?;
        let end = Instant::now() + PATIENCE;
        while !Path::new("/run/state/last-good.json").exists() {
            assert!(Instant::now() < end, "nothing is saved");
            thread::sleep(Duration::from_millis(20));
        }
        raise(Signal::SIGTERM)?;
        assert_eq!(ended(daemon)?, ExitStatus::Yes);
        operator.run(&["status"]).expect(ExitStatus::No, &["degraded"]);
        operator
            .run(&["check", "root", "127.0.0.9:4444"])
            .expect(ExitStatus::No, &[]);
        // A start with a damaged configuration goes on with what was good.
        operator.configure("backend = \"nftables")?;
        let error = operator.fails(&["config", "check"]);
        assert!(error.contains("enforcer.toml:1"), "{error}");
        operator.configure(&other)?;
        let daemon = operator.start();
        operator.until(&["status"], "enforcing");
        operator.run(&["unload"]).expect(ExitStatus::Yes, &[]);
        assert_eq!(ended(daemon)?, ExitStatus::Unloaded);
        Ok(())
    })
}

#[test]
fn without_a_daemon() -> Test {
    on_a_host_of_its_own(|| {
        let operator = Operator::new(&two_targets())?;
        operator
            .run(&["apply", "--last-good"])
            .expect(ExitStatus::Yes, &["no rules are saved"]);
        operator.run(&["apply"]).expect(ExitStatus::Yes, &["enforcing"]);
        operator
            .run(&["status"])
            .expect(ExitStatus::Yes, &["enforcing", "not running"]);
        operator
            .run(&["check", "root", CLOSED])
            .expect(ExitStatus::No, &["deny"]);
        operator.run(&["verify"]).expect(ExitStatus::Yes, &["identical"]);
        // Names as they were saved, for those who ask when nobody answers.
        fs::write("/run/hosts", "")?;
        let unknown = operator.fails(&["check", "root", "never.test:4244"]);
        assert!(unknown.contains("look up never.test"), "{unknown}");
        operator
            .run(&["check", "daemon", "bus.test:4244"])
            .expect(ExitStatus::No, &["127.0.0.8:4244", "denied by open"]);
        let error = operator.fails(&["grant", "open", "--user", "daemon"]);
        assert!(error.contains("enforcer.service") || error.contains("start"), "{error}");
        // The next boot begins with what was active.
        assert!(crate::backend::remove_table("enforcer")?);
        let error = operator.fails(&["check", "root", CLOSED]);
        assert!(error.contains("nothing is active"), "{error}");
        operator.run(&["apply", "--last-good"]);
        operator.run(&["check", "root", CLOSED]).expect(ExitStatus::No, &[]);
        operator
            .run(&["config", "check"])
            .expect(ExitStatus::Yes, &["valid; 2 targets"]);
        assert_eq!(operator.run(&["config", "check", "--json"]).value("/targets")?, 2);
        operator
            .run(&["config", "show"])
            .expect(ExitStatus::Yes, &["[target.closed]", CLOSED]);
        operator
            .run(&["config", "show", "--json"])
            .value("/target/open/grants")?;
        operator.run(&["doctor"]);
        operator.run(&["unload"]).expect(ExitStatus::Yes, &["unloaded"]);
        let never = configuration("[target.open]\nendpoints = [\"tcp://never.test:1\"]\nallow = [\"root\"]\n");
        for (top, told) in [
            ("", "critical: name never.test is unresolved"),
            (
                "[dns]\nunresolved = \"closed\"\n",
                "its port is protected on every address",
            ),
        ] {
            operator.configure(&format!("{never}{top}"))?;
            operator.run(&["apply"]).expect(ExitStatus::No, &["degraded", told]);
            // The next who asks is told the same.
            operator.run(&["status"]).expect(ExitStatus::No, &["degraded", told]);
        }
        operator
            .run(&["check", "daemon", "192.0.2.9:1"])
            .expect(ExitStatus::No, &[]);
        operator.run(&["unload"]).expect(ExitStatus::Yes, &["unloaded"]);
        // Whoever names other places than those of the running instance reads where was looked.
        let places = [
            "active in /run/pins nor in nftables table inet enforcer",
            "no daemon answers on /run/enforcer/control.sock",
        ];
        operator
            .run(&["unload"])
            .expect(ExitStatus::Yes, &["nothing was active"])
            .expect(ExitStatus::Yes, &places);
        operator
            .run(&["status"])
            .expect(ExitStatus::No, &["off"])
            .expect(ExitStatus::No, &places);
        assert!(File::open("/run/state/last-good.json").is_ok());
        operator.configure(&configuration(""))?;
        operator.run(&["config", "check"]).expect(
            ExitStatus::Yes,
            &["valid; no target in the file: those of a BOSH VM are protected (monit, nats)"],
        );
        let checked = operator.run(&["config", "check", "--json"]);
        assert_eq!(checked.value("/defaults")?, true);
        // Only the file says where its instance is.
        fs::remove_file(&operator.config)?;
        for command in ["status", "reload", "verify", "unload"] {
            let error = operator.fails(&[command]);
            assert!(
                error.contains("no such file") && error.contains("name one with the same socket"),
                "{error}"
            );
        }
        Ok(())
    })
}

#[test]
fn a_grant_that_ended_without_a_daemon_is_told_in_words() -> Test {
    on_a_host_of_its_own(|| {
        let operator = Operator::new(&two_targets())?;
        let daemon = operator.start();
        operator.until(&["status"], "enforcing");
        operator
            .run(&["grant", "open", "--user", "daemon", "--for", "2s"])
            .expect(ExitStatus::Yes, &["open"]);
        raise(Signal::SIGTERM)?;
        assert_eq!(ended(daemon)?, ExitStatus::Yes);
        let told = operator.until(&["verify"], "drifted").expect(
            ExitStatus::No,
            &[
                "the grant of open to user 1 ended at 20",
                "but is still active: no daemon was there to end it",
                "nft set users_open_",
                "extra   ",
                ": user 1\n",
                "or run enforcer apply, which ends them",
            ],
        );
        assert!(!told.text.contains("None") && !told.text.contains('['), "{}", told.text);
        let json = operator.run(&["verify", "--json"]).expect(ExitStatus::No, &[]);
        assert_eq!(json.value("/expired_grants/0/target")?, "open");
        operator.run(&["check", "daemon", OPEN]).expect(ExitStatus::Yes, &[]);
        operator.run(&["apply"]).expect(ExitStatus::Yes, &[]);
        operator.run(&["check", "daemon", OPEN]).expect(ExitStatus::No, &[]);
        operator.run(&["verify"]).expect(ExitStatus::Yes, &["identical"]);
        operator.run(&["unload"]).expect(ExitStatus::Yes, &["unloaded"]);
        Ok(())
    })
}

#[test]
fn a_reload_names_the_grants_that_it_makes_active_or_not() -> Test {
    on_a_host_of_its_own(|| {
        let operator = Operator::new(&two_targets())?;
        let daemon = operator.start();
        operator.until(&["status"], "enforcing");
        operator
            .run(&["grant", "open", "--user", "daemon"])
            .expect(ExitStatus::Yes, &["open"]);
        operator.configure(&two_targets().replace("grants = true\n", ""))?;
        let gone = ["- grant of open to user 1: no longer active"];
        operator.run(&["config", "diff"]).expect(ExitStatus::No, &gone);
        let json = operator.run(&["reload", "--dry-run", "--json"]);
        assert_eq!(json.value("/grants/0/active")?, false);
        operator.run(&["reload"]).expect(ExitStatus::Yes, &gone);
        operator.run(&["check", "daemon", OPEN]).expect(ExitStatus::No, &[]);
        operator.configure(&two_targets())?;
        operator
            .run(&["reload"])
            .expect(ExitStatus::Yes, &["+ grant of open to user 1: becomes active"]);
        operator.run(&["check", "daemon", OPEN]).expect(ExitStatus::Yes, &[]);
        operator.run(&["unload", "--yes"]).expect(ExitStatus::Yes, &[]);
        assert_eq!(ended(daemon)?, ExitStatus::Unloaded);
        Ok(())
    })
}

#[test]
fn a_reload_says_what_it_changes() -> Test {
    on_a_host_of_its_own(|| {
        let operator = Operator::new(&two_targets())?;
        let daemon = operator.start();
        operator.until(&["status"], "enforcing");
        operator.run(&["config", "diff"]).expect(
            ExitStatus::Yes,
            &["/run/enforcer.toml: valid; a reload changes nothing"],
        );
        let other = format!("mode = \"audit\"\n{}", two_targets().replace(CLOSED, "127.0.0.9:4444"));
        operator.configure(&other)?;
        let changes = [
            "- mode = \"enforce\"",
            "+ mode = \"audit\"",
            "- [target.closed] endpoints = \"tcp://127.0.0.9:4333\"",
            "+ [target.closed] endpoints = \"tcp://127.0.0.9:4444\"",
        ];
        let would = "warning: tcp://127.0.0.9:4333 of target closed would no longer be protected";
        operator.run(&["config", "diff"]).expect(ExitStatus::No, &changes);
        operator.run(&["reload", "--dry-run"]).expect(ExitStatus::Yes, &changes);
        operator.run(&["config", "diff"]).expect(ExitStatus::No, &[would]);
        operator.run(&["check", "root", CLOSED]).expect(ExitStatus::No, &[]);
        let reloaded = operator.run(&["reload"]).expect(ExitStatus::Yes, &changes);
        reloaded.expect(
            ExitStatus::Yes,
            &[
                "/run/enforcer.toml: reloaded\n",
                "warning: tcp://127.0.0.9:4333 of target closed is no longer protected",
                "audit, generation ",
            ],
        );
        operator.run(&["check", "root", CLOSED]).expect(ExitStatus::Yes, &[]);
        let again = operator.run(&["reload", "--json"]).expect(ExitStatus::Yes, &[]);
        assert_eq!(again.value("/schema")?, "enforcer/reload/1");
        assert_eq!(again.value("/changes/0").ok(), None, "nothing changes");
        // What a prefix or the loopback of this host still covers is no loss.
        let list =
            |endpoints: &str| configuration(&format!("[target.t]\nendpoints = [{endpoints}]\nallow = [\"root\"]\n"));
        operator.configure(&list(
            r#""10.0.0.5:80", "10.0.0.0/8:80", "127.0.0.1:99", "10.0.0.7:81""#,
        ))?;
        operator.run(&["reload"]).expect(ExitStatus::Yes, &[]);
        operator.configure(&list(r#""10.0.0.0/8:80", "local:99""#))?;
        let diff = operator.run(&["config", "diff"]);
        assert_eq!(diff.text.matches("no longer be protected").count(), 1, "{}", diff.text);
        diff.expect(
            ExitStatus::No,
            &["warning: tcp://10.0.0.7:81 of target t would no longer"],
        );
        // A file that the daemon does not read is compared with nothing.
        let other = Operator {
            config: "/run/new.toml".into(),
        };
        other.configure(&two_targets())?;
        for arguments in [&["config", "diff"][..], &["reload", "--dry-run"], &["reload"]] {
            let error = other.fails(arguments);
            assert!(
                error.contains("the daemon reads /run/enforcer.toml, not /run/new.toml"),
                "{error}"
            );
        }
        // 20,000 endpoints are compared in no time.
        let many: Vec<String> = (0..20_000_u32)
            .map(|host| format!("\"10.{}.{}.1:90\"", host >> 8, host & 255))
            .collect();
        operator.configure(&list(&many.join(",")))?;
        operator
            .run(&["reload"])
            .expect(ExitStatus::Yes, &["warning: tcp://10.0.0.0/8:80"]);
        operator
            .run(&["config", "diff"])
            .expect(ExitStatus::Yes, &["changes nothing"]);
        operator.configure(&two_targets())?;
        operator.run(&["reload"]).expect(ExitStatus::Yes, &[]);
        // A target less, and a name that does not exist.
        operator.configure(&configuration(
            "[target.open]\nendpoints = [\"tcp://never.test:1\"]\nallow = [\"root\"]\n",
        ))?;
        operator.run(&["reload"]).expect(
            ExitStatus::No,
            &[
                "- [target.open] grants = true",
                "- [target.closed] allow = \"daemon\"",
                "degraded, generation",
                "never.test",
            ],
        );
        operator.configure("mode = \"of\"\n")?;
        for arguments in [&["reload"][..], &["reload", "--dry-run"], &["config", "diff"]] {
            let error = operator.fails(arguments);
            assert!(error.contains("enforcer.toml:1") && error.contains("mode"), "{error}");
        }
        operator
            .run(&["status"])
            .expect(ExitStatus::No, &["the previous rules stay active"]);
        operator
            .run(&["unload", "--yes"])
            .expect(ExitStatus::Yes, &["unloaded"]);
        assert_eq!(ended(daemon)?, ExitStatus::Unloaded);
        let error = operator.fails(&["config", "diff"]);
        assert!(error.contains("no daemon answers"), "{error}");
        Ok(())
    })
}

#[test]
fn a_configuration_is_checked_whole_and_without_its_host() -> Test {
    on_a_host_of_its_own(|| {
        let wrong = "[target.a]\nendpoints = [\"tcp://nowhere\", \"10.0.0.1:1\"]\nallow = [-1, \"nobody-there\"]\n\
             grants = \"yes\"\n";
        let operator = Operator::new(wrong)?;
        let daemonless = [
            &["apply"][..],
            &["run"],
            &["config", "check"],
            &["config", "check", "--offline"],
        ];
        for arguments in daemonless {
            let error = match operator.try_run(arguments) {
                Ok(answer) => panic!("{arguments:?}: {answer:?}"),
                Err(error) => super::lines_of(&error),
            };
            let places: Vec<&str> = error.iter().filter_map(|line| line.split(": ").next()).collect();
            let expected = ["/run/enforcer.toml:2", "/run/enforcer.toml:3", "/run/enforcer.toml:4"];
            assert_eq!(places, expected, "{arguments:?}: {error:?}");
        }
        // What does not exist here may exist there.
        let missing = configuration(
            "[target.a]\nendpoints = [\"10.0.0.1:1\", \"never.test:2\"]\n\
             allow = [7, \"nobody-of-that-name\", { user = 0, cgroup = \"/no/such/cgroup\" }]\n\
             [target.b]\nendpoints = [\"10.0.0.1:1\"]\nallow = [8, { group = \"no-group\" }]\n",
        );
        operator.configure(&missing)?;
        let check = operator.run(&["config", "check"]);
        for place in [
            "/run/enforcer.toml:7: target a: no user \"nobody-of-that-name\"",
            "/run/enforcer.toml:7: target a: cgroup /no/such/cgroup does not exist",
            "/run/enforcer.toml:10: target b: no group \"no-group\"",
        ] {
            assert!(check.text.contains(place), "{place}: {}", check.text);
        }
        assert!(!check.text.contains("nobody may connect"), "{}", check.text);
        check.expect(ExitStatus::No, &["valid, with the exceptions above; 2 targets"]);
        let offline = operator.run(&["config", "check", "--offline"]);
        assert!(!offline.text.contains("warning"), "{}", offline.text);
        offline.expect(
            ExitStatus::Yes,
            &["/run/enforcer.toml: valid; 2 targets\nnot checked: who can write"],
        );
        let json = operator.run(&["config", "check", "--offline", "--json"]);
        assert_eq!(json.value("/not_checked/0")?, "owners");
        assert_eq!(json.value("/targets")?, 2);
        assert_eq!(
            json.expect(ExitStatus::Yes, &[]).value("/errors")?,
            Value::Array(Vec::new())
        );
        Ok(())
    })
}

#[test]
fn targets_in_files_of_their_own() -> Test {
    on_a_host_of_its_own(|| {
        let operator = Operator::new(&two_targets())?;
        let file = "/run/conf.d/third.toml";
        fs::create_dir("/run/conf.d")?;
        let third = "[target.third]\nendpoints = [\"tcp://127.0.0.9:4555\"]\nallow = [\"daemon\"]\n";
        fs::write(file, third)?;
        let daemon = operator.start();
        operator
            .until(&["status"], "enforcing")
            .expect(ExitStatus::Yes, &["third"]);
        operator
            .run(&["check", "root", "127.0.0.9:4555"])
            .expect(ExitStatus::No, &["denied by third"]);
        operator
            .run(&["config", "show"])
            .expect(ExitStatus::Yes, &["[target.closed]", "[target.third]"]);
        // One that is wrong refuses all, and nothing changes.
        fs::write(
            file,
            third
                .replace("4555", "4666")
                .replace("daemon\"]", "daemon\", -1]\nmode = 5"),
        )?;
        operator.configure(&two_targets().replace(CLOSED, "127.0.0.9:4444"))?;
        let places = |error: &anyhow::Error| {
            let lines = super::lines_of(error);
            lines
                .iter()
                .filter_map(|line| line.split(": ").next())
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        for arguments in [
            &["reload"][..],
            &["reload", "--dry-run"],
            &["config", "diff"],
            &["config", "check"],
        ] {
            match operator.try_run(arguments) {
                Ok(answer) => panic!("{arguments:?}: {answer:?}"),
                Err(error) => {
                    let places = places(&error);
                    let [first, second, ..] = places.as_slice() else {
                        panic!("{arguments:?}: {error:#}")
                    };
                    assert_eq!(
                        [first, second],
                        ["/run/conf.d/third.toml:3", "/run/conf.d/third.toml:4"]
                    );
                }
            }
        }
        operator.run(&["status"]).expect(
            ExitStatus::No,
            &[
                "/run/conf.d/third.toml:3",
                "(and 1 more: enforcer config check",
                "the previous rules stay active",
            ],
        );
        for closed in [CLOSED, "127.0.0.9:4555"] {
            operator.run(&["check", "root", closed]).expect(ExitStatus::No, &[]);
        }
        // One that has gone takes its target with it, and says so.
        fs::remove_file(file)?;
        operator.configure(&two_targets())?;
        operator.run(&["reload"]).expect(
            ExitStatus::Yes,
            &[
                "- [target.third] allow = \"daemon\"",
                "warning: tcp://127.0.0.9:4555 of target third is no longer protected",
            ],
        );
        operator
            .run(&["unload", "--yes"])
            .expect(ExitStatus::Yes, &["unloaded"]);
        assert_eq!(ended(daemon)?, ExitStatus::Unloaded);
        Ok(())
    })
}

#[test]
fn no_tip_leads_to_the_end_of_protection() {
    for typed in ["reloads", "load", "unblock", "unlod", "un"] {
        let error = match Cli::try_parse_from(["enforcer", typed]) {
            Ok(cli) => panic!("{cli:?}"),
            Err(error) => super::without_unload(error).render().to_string(),
        };
        assert!(error.contains(typed) && !error.contains("'unload'"), "{error}");
    }
}

/// The README's section on the roll-out.
fn roll_out() -> Fallible<&'static str> {
    let readme = include_str!("../../../README.md");
    let section = readme.split("\n## ").find(|section| section.starts_with("Roll it out"));
    Ok(section.ok_or("the README has no such section")?)
}

/// What the README's block of a language holds.
fn block(language: &str) -> Fallible<&'static str> {
    let start = format!("```{language}\n");
    let block = roll_out()?
        .split(start.as_str())
        .nth(1)
        .and_then(|rest| rest.split("```").next());
    Ok(block.ok_or("the section has no such block")?)
}

#[test]
fn the_roll_out_of_the_readme() -> Test {
    on_a_host_of_its_own(|| {
        let rules = block("toml")?;
        let operator = Operator::new(&two_targets())?;
        let daemon = operator.start();
        operator.until(&["status"], "enforcing");
        // A user who is not allowed: here it is root who is not the etcd's.
        let (before, after) = (
            rules.replace("\"root\", \"daemon\"", "\"daemon\""),
            OPEN.replace("4222", "2379"),
        );
        let listener = TcpListener::bind(&after)?;
        let top = configuration("");
        operator.configure(&before.replace("mode = \"audit\"", &format!("mode = \"audit\"\n{top}")))?;
        let mut commands = Vec::new();
        for line in block("sh")?.lines() {
            let words: Vec<&str> = line
                .split('#')
                .next()
                .unwrap_or_default()
                .split_whitespace()
                .skip(1)
                .collect();
            let answer = operator.run(&words);
            match *words.as_slice() {
                ["config", "check"] => answer.expect(ExitStatus::Yes, &["valid; 3 targets"]),
                ["config", "diff"] => answer.expect(ExitStatus::No, &["+ mode = \"audit\"", "no longer be protected"]),
                ["reload"] => {
                    dial(&after)?;
                    operator.until(&["events"], "would-deny");
                    answer.expect(ExitStatus::Yes, &["+ [target.etcd] endpoints", "audit, generation"])
                }
                ["status"] => answer.expect(ExitStatus::Yes, &["audit", "etcd", "metadata"]),
                ["events", "--summary"] => answer.expect(ExitStatus::Yes, &["would-deny", "etcd", ":2379"]),
                _ => return Err(format!("{line}: not tried here").into()),
            };
            commands.push(words);
        }
        assert_eq!(commands.len(), 5);
        // Whoever is needed is allowed, and the rest denied.
        operator.configure(&(top.clone() + &rules.replace("mode = \"audit\"", "")))?;
        operator
            .run(&["reload"])
            .expect(ExitStatus::Yes, &["+ mode = \"enforce\"", "enforcing, generation"]);
        dial(&after)?;
        operator.configure(&(top + &before.replace("mode = \"audit\"", "")))?;
        operator
            .run(&["reload"])
            .expect(ExitStatus::Yes, &["- [target.etcd] allow = \"root\""]);
        let refused = dial(&after).map_err(|error| error.kind());
        assert_eq!(
            refused,
            Err(io::ErrorKind::ConnectionRefused),
            "as the README says of nftables"
        );
        operator
            .run(&["status", "--exit-on", "critical"])
            .expect(ExitStatus::Yes, &[]);
        operator.run(&["unload", "--yes"]).expect(ExitStatus::Yes, &[]);
        assert_eq!(ended(daemon)?, ExitStatus::Unloaded);
        drop(listener);
        Ok(())
    })
}
