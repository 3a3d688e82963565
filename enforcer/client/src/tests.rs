//! Daemons of all kinds, asked both ways. Run by root they are root's; else they are this user's, who is trusted here
//! alone.

#![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::{
        fd::AsFd as _,
        unix::{
            fs::MetadataExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{Backlog, listen};
use tempfile::TempDir;

use super::*;

/// Long enough for any host.
const PATIENCE: Duration = Duration::from_secs(20);
/// For what never comes.
const SHORT: Duration = Duration::from_millis(200);

struct Daemon {
    socket: PathBuf,
    listener: UnixListener,
    _dir: TempDir,
}

impl Daemon {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("control.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        Self {
            socket,
            listener,
            _dir: dir,
        }
    }

    /// Answers each caller, and hangs up.
    fn answering(answer: fn(UnixStream)) -> Self {
        let daemon = Self::new();
        let listener = daemon.listener.try_clone().expect("the same listener");
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut request = String::new();
                let read = BufReader::new(&stream).read_line(&mut request);
                assert_eq!((read.ok(), request.as_str()), (Some(22), "{\"request\":\"refresh\"}\n"));
                answer(stream);
            }
        });
        daemon
    }

    /// What comes of it, by either way.
    fn refresh(&self, patience: Duration) -> Vec<Result<Status, AskError>> {
        asked(&self.socket, patience, own_uid())
    }
}

fn asked(socket: &Path, patience: Duration, trusted: u32) -> Vec<Result<Status, AskError>> {
    let mut ask = Ask::new(socket, &Request::Refresh, patience);
    ask.trusted = trusted;
    vec![
        ask.answer_blocking().map(|Refreshed { status }| status),
        #[cfg(feature = "tokio")]
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(ask.answer())
            .map(|Refreshed { status }| status),
    ]
}

fn own_uid() -> u32 {
    fs::metadata("/proc/self").expect("this process").uid()
}

fn fails(results: Vec<Result<Status, AskError>>, is_it: fn(&AskError) -> bool, text: &str) {
    for result in results {
        let error = result.expect_err("it cannot have worked");
        assert!(is_it(&error) && error.to_string().contains(text), "{error:?}: {error}");
    }
}

#[test]
fn b3_an_answer_of_another_version_is_read() {
    let daemon = Daemon::answering(|mut stream| {
        let answer = r#"{"status":{"schema":"enforcer/status/9","state":"degraded","causes":["a"],"generation":3,"new":{"k":[1]}}}"#;
        let _ = stream.write_all(answer.as_bytes());
    });
    for status in daemon.refresh(PATIENCE) {
        let status = status.expect("a status");
        let expected = Status {
            state: State::Degraded,
            causes: vec!["a".to_owned()],
            generation: 3,
        };
        assert_eq!(status, expected);
    }
    // With patience beyond every clock.
    assert!(daemon.refresh(Duration::MAX).iter().all(Result::is_ok));
}

#[test]
fn b3_a_daemon_that_hangs_up_or_answers_garbage_is_no_success() {
    let daemon = Daemon::answering(drop);
    fails(
        daemon.refresh(PATIENCE),
        |error| matches!(error, AskError::HungUp { .. }),
        "its log may say why",
    );
    let is_protocol = |error: &AskError| matches!(error, AskError::Protocol { .. });
    let daemon = Daemon::answering(|mut stream| drop(stream.write_all(b"\xff garbage\n")));
    fails(daemon.refresh(PATIENCE), is_protocol, "another version");
    let daemon = Daemon::answering(|mut stream| drop(stream.write_all(b"\"done\"\n")));
    fails(daemon.refresh(PATIENCE), is_protocol, "another version");
    let daemon = Daemon::answering(|mut stream| drop(stream.write_all(b"{\"status\":{\"state\":")));
    fails(daemon.refresh(PATIENCE), is_protocol, "another version");
}

#[test]
fn b3_what_the_daemon_refuses_is_told_in_its_words() {
    let daemon = Daemon::answering(|mut stream| drop(stream.write_all(b"{\"error\":\"no room\"}\n")));
    fails(
        daemon.refresh(PATIENCE),
        |error| matches!(error, AskError::Refused(_)),
        "no room",
    );
}

#[test]
fn b3_an_answer_too_late_is_none_however_it_is_late() {
    let is_late = |error: &AskError| matches!(error, AskError::TimedOut { .. });
    let dripping = Daemon::answering(|mut stream| {
        while stream.write_all(b" ").is_ok() {
            thread::sleep(SHORT / 20);
        }
    });
    let silent = Daemon::new();
    // One whose queue is full: nobody can even connect.
    let full = Daemon::new();
    listen(&full.listener.as_fd(), Backlog::new(0).expect("none")).expect("a shorter queue");
    let _first = UnixStream::connect(&full.socket).expect("the only place");
    for daemon in [dripping, silent, full] {
        let began = Instant::now();
        fails(
            daemon.refresh(SHORT),
            is_late,
            "within 200ms; it may still be looking up names",
        );
        assert!(began.elapsed() < PATIENCE);
    }
}

#[test]
fn b3_where_no_daemon_listens_it_is_said_how_to_start_it() {
    let Daemon { socket, listener, _dir } = Daemon::new();
    drop(listener);
    let is_none = |error: &AskError| matches!(error, AskError::NoDaemon { .. });
    fails(asked(&socket, PATIENCE, own_uid()), is_none, "systemctl start enforcer");
    fails(
        asked(&socket.with_extension("other"), PATIENCE, own_uid()),
        is_none,
        "sv start enforcer",
    );
    let long = socket.with_file_name("x".repeat(200));
    fails(
        asked(&long, PATIENCE, own_uid()),
        |error| matches!(error, AskError::Io { .. }),
        "connect to",
    );
}

#[test]
fn f6_another_users_directory_or_daemon_is_asked_nothing() {
    let daemon = Daemon::new();
    daemon.listener.set_nonblocking(true).expect("no waiting");
    let is_impostor = |error: &AskError| matches!(error, AskError::Impostor { .. });
    let other = own_uid() + 1;
    fails(asked(&daemon.socket, PATIENCE, other), is_impostor, "was sent nothing");
    assert!(daemon.listener.accept().is_err(), "it was connected to");
    let stream = UnixStream::connect(&daemon.socket).expect("a connection");
    assert_eq!(trust::foreign_listener(&stream, other).ok(), Some(Some(own_uid())));
    assert_eq!(trust::foreign_listener(&stream, own_uid()).ok(), Some(None));
    // In a directory of root's, as far as this can be tried without another user's process.
    if own_uid() != 0 {
        fails(
            vec![refresh_blocking(&daemon.socket, PATIENCE)],
            is_impostor,
            "not root:",
        );
        assert!(!ask::is_served(&daemon.socket));
    } else {
        assert!(ask::is_served(&daemon.socket));
        std::os::unix::fs::chown(daemon.socket.parent().expect("it has one"), Some(1), None).expect("given away");
        fails(
            vec![refresh_blocking(&daemon.socket, PATIENCE)],
            is_impostor,
            "belongs to user 1, not root:",
        );
    }
}
