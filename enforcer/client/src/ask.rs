//! The way of a request to the daemon and back: who is asked, how long it may take, and what can go wrong.

use std::{
    io::{self, BufRead as _, BufReader, Read, Write},
    os::{fd::AsRawFd as _, unix::net::UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde::{Deserialize, de::DeserializeOwned};

use crate::{trust, wire::Request};

/// The user whose daemon is asked.
const ROOT: u32 = 0;
/// Between two tries to reach a daemon that is behind.
const RETRY: Duration = Duration::from_millis(50);

/// What to do where no daemon runs.
pub const START: &str = "start the daemon (systemctl start enforcer, or sv start enforcer)";

/// What to do about an error of the operating system, to end its message with.
#[must_use]
pub fn remedy(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied {
        "; run as root"
    } else {
        ""
    }
}

/// Why the daemon gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The operating system says no.
    #[error("{action} {}: {error}{}", path.display(), remedy(error))]
    Io {
        /// What was tried.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// No daemon answers.
    #[error("no daemon answers on {}: {error}; {START}", path.display())]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// It is not root's, and was sent nothing (F6).
    #[error(
        "{} belongs to user {uid}, not root: whatever listens there is not enforcer and was sent nothing; {START}, \
         which takes its place",
        path.display()
    )]
    Impostor {
        /// The socket.
        path: PathBuf,
        /// The user who has its directory, or who listens.
        uid: u32,
    },
    /// The daemon took too long.
    #[error(
        "the daemon on {} did not answer within {}; {}",
        path.display(),
        humantime::format_duration(*patience),
        match **request {
            Request::Refresh => "it may still be looking up names: allow more time with --timeout",
            Request::Status
            | Request::Events { .. }
            | Request::Summary { .. }
            | Request::Grant(_)
            | Request::Revoke(_)
            | Request::Grants
            | Request::Verify
            | Request::Reload { .. } => "its log may say why: restart it if this persists",
            Request::Unload => "stop it (systemctl stop enforcer, or sv force-stop enforcer), then run this again",
        }
    )]
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        patience: Duration,
        /// What was asked.
        request: Box<Request>,
    },
    /// The daemon ended before it answered.
    #[error("the daemon on {} hung up; its log may say why", path.display())]
    HungUp {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon said something else than an answer.
    #[error("the daemon on {} gave an unexpected answer; is it another version?", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon refused or failed.
    #[error("{0}")]
    Refused(Box<str>),
}

/// Whether a daemon of root's has the socket, be it too busy to accept.
#[must_use]
pub fn is_served(socket: &Path) -> bool {
    Ask::new(socket, &Request::Status, Duration::ZERO).connect().is_ok()
}

/// The process that listens on a socket of root's, where that can be told.
#[must_use]
pub fn listener(socket: &Path) -> Option<u32> {
    let stream = Ask::new(socket, &Request::Status, Duration::ZERO).connect().ok()??;
    trust::listener(&stream)
}

/// A request to the daemon on a socket. Answers are lines of JSON, an `R` each.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    socket: &'a Path,
    request: &'a Request,
    patience: Duration,
    /// Root, but in tests.
    pub(crate) trusted: u32,
}

impl<'a> Ask<'a> {
    /// All of it, from connecting on, may take as long as `patience`.
    #[must_use]
    pub const fn new(socket: &'a Path, request: &'a Request, patience: Duration) -> Self {
        Self {
            socket,
            request,
            patience,
            trusted: ROOT,
        }
    }

    /// Returns the one answer; blocks the thread.
    pub fn answer_blocking<R: DeserializeOwned>(self) -> Result<R, AskError> {
        let deadline = Deadline(Instant::now().checked_add(self.patience));
        let stream = loop {
            if let Some(stream) = self.connect()? {
                break stream;
            }
            let left = deadline.left().map_err(|error| self.failed(error))?;
            thread::sleep(left.map_or(RETRY, |left| left.min(RETRY)));
        };
        stream.set_nonblocking(false).map_err(|error| self.failed(error))?;
        let mut stream = Bounded { stream, deadline };
        stream.write_all(&self.line()?).map_err(|error| self.failed(error))?;
        let mut line = Vec::new();
        match BufReader::new(stream).read_until(b'\n', &mut line) {
            Err(error) if is_late(&error) => Err(self.timed_out()),
            read => self
                .read(&read.map(|_| line).unwrap_or_default())?
                .ok_or_else(|| self.hung_up()),
        }
    }

    /// Connects, unless another user could answer there (F6). None where the daemon is behind with accepting, and
    /// another try may do.
    fn connect(&self) -> Result<Option<UnixStream>, AskError> {
        let impostor = |uid| AskError::Impostor {
            path: self.socket.into(),
            uid,
        };
        if let Some(uid) = trust::foreign_directory(self.socket, self.trusted) {
            return Err(impostor(uid));
        }
        // Without waiting, which only this way has an end (connect(2), `EAGAIN`).
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let address = UnixAddr::new(self.socket).map_err(|error| self.failed(error.into()))?;
        let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map(UnixStream::from)
            .map_err(|error| self.failed(error.into()))?;
        match connect(stream.as_raw_fd(), &address).map_err(io::Error::from) {
            Err(error) if is_late(&error) => return Ok(None),
            connected => connected.map_err(|error| self.failed(error))?,
        }
        match trust::foreign_listener(&stream, self.trusted) {
            Ok(None) => Ok(Some(stream)),
            Ok(Some(uid)) => Err(impostor(uid)),
            Err(error) => Err(AskError::Io {
                action: "ask who listens on",
                path: self.socket.into(),
                error,
            }),
        }
    }

    /// What is sent.
    fn line(&self) -> Result<Vec<u8>, AskError> {
        let mut line = serde_json::to_vec(self.request).map_err(|error| self.failed(error.into()))?;
        line.push(b'\n');
        Ok(line)
    }

    /// What a line says; none where the daemon has ended without one.
    fn read<R: DeserializeOwned>(&self, line: &[u8]) -> Result<Option<R>, AskError> {
        #[derive(Deserialize)]
        struct Refusal {
            error: Box<str>,
        }
        if line.is_empty() {
            return Ok(None);
        }
        if let Ok(Refusal { error }) = serde_json::from_slice(line) {
            return Err(AskError::Refused(error));
        }
        serde_json::from_slice(line).map(Some).map_err(|_| AskError::Protocol {
            path: self.socket.into(),
        })
    }

    #[allow(clippy::wildcard_enum_match_arm, reason = "any other cause is reported as it is")]
    fn failed(&self, error: io::Error) -> AskError {
        let path = self.socket.into();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::BrokenPipe => {
                AskError::NoDaemon { path, error }
            }
            _ if is_late(&error) => self.timed_out(),
            _ => AskError::Io {
                action: "connect to",
                path,
                error,
            },
        }
    }

    fn timed_out(&self) -> AskError {
        AskError::TimedOut {
            path: self.socket.into(),
            patience: self.patience,
            request: Box::new(self.request.clone()),
        }
    }

    fn hung_up(&self) -> AskError {
        AskError::HungUp {
            path: self.socket.into(),
        }
    }
}

/// Whether it would have to be waited longer: so says a socket that does not wait, and one whose time is over
/// (socket(7), `SO_RCVTIMEO`).
fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// When all has to be done; never, where it is too far off for the clock.
struct Deadline(Option<Instant>);

impl Deadline {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.0.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left)
    }
}

/// A stream whose reads and writes all end by one deadline.
struct Bounded {
    stream: UnixStream,
    deadline: Deadline,
}

impl Read for Bounded {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.deadline.left()?)?;
        self.stream.read(into)
    }
}

impl Write for Bounded {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.deadline.left()?)?;
        self.stream.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(feature = "tokio")]
mod with_tokio {
    //! The same with tokio's reads, writes and waits.

    use tokio::{
        io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
        net::UnixStream,
        time::{sleep, timeout},
    };

    use super::{Ask, AskError, DeserializeOwned, RETRY};

    /// What the daemon answers, one after the other.
    #[derive(Debug)]
    pub struct Answers<'a> {
        asked: Ask<'a>,
        lines: BufReader<UnixStream>,
    }

    impl<'a> Ask<'a> {
        /// Returns the one answer.
        pub async fn answer<R: DeserializeOwned>(self) -> Result<R, AskError> {
            let answer = async { self.begin().await?.next().await?.ok_or_else(|| self.hung_up()) };
            timeout(self.patience, answer)
                .await
                .unwrap_or_else(|_| Err(self.timed_out()))
        }

        /// Sends the request, for which alone `patience` counts: answers may come for ever.
        pub async fn answers(self) -> Result<Answers<'a>, AskError> {
            timeout(self.patience, self.begin())
                .await
                .unwrap_or_else(|_| Err(self.timed_out()))
        }

        async fn begin(self) -> Result<Answers<'a>, AskError> {
            let stream = loop {
                if let Some(stream) = self.connect()? {
                    break stream;
                }
                sleep(RETRY).await;
            };
            let mut stream = UnixStream::from_std(stream).map_err(|error| self.failed(error))?;
            stream
                .write_all(&self.line()?)
                .await
                .map_err(|error| self.failed(error))?;
            Ok(Answers {
                asked: self,
                lines: BufReader::new(stream),
            })
        }
    }

    impl Answers<'_> {
        /// The next one; none when the daemon has ended.
        pub async fn next<R: DeserializeOwned>(&mut self) -> Result<Option<R>, AskError> {
            let mut line = Vec::new();
            let read = self.lines.read_until(b'\n', &mut line).await;
            self.asked.read(&read.map(|_| line).unwrap_or_default())
        }
    }
}

#[cfg(feature = "tokio")]
pub use with_tokio::Answers;
