//! The log as entries of systemd's journal, with fields (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL>). Of our own, as
//! the crate for it hands messages on as they are, and what others chose is to be escaped here too (F6).

use std::{
    fmt::{Debug, Write as _},
    io::{self, Write as _},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context};

use super::line;

/// Where journald listens.
const SOCKET: &str = "/run/systemd/journal/socket";
/// Before the names of our own fields.
const PREFIX: &str = "ENFORCER_";

/// Sends each event.
#[derive(Debug)]
pub(crate) struct Journal {
    socket: UnixDatagram,
    to: PathBuf,
}

impl Journal {
    /// An error where no journald listens.
    pub(crate) fn open() -> io::Result<Self> {
        Self::to(Path::new(SOCKET))
    }

    fn to(path: &Path) -> io::Result<Self> {
        let journal = Self {
            socket: UnixDatagram::unbound()?,
            to: path.into(),
        };
        journal.socket.set_nonblocking(true)?;
        // It ignores what is empty.
        journal.socket.send_to(&[], &journal.to)?;
        Ok(journal)
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        // syslog(3)
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        let mut entry = Entry(format!("PRIORITY={priority}\nSYSLOG_IDENTIFIER=enforcer\n"));
        event.record(&mut entry);
        // By path, so that another journald is found. All processes of the host have one queue there: where that is
        // full, and for what is too long for it, there is stderr.
        if self.socket.send_to(entry.0.as_bytes(), &self.to).is_err() {
            let message = entry.0.lines().find_map(|line| line.strip_prefix("MESSAGE="));
            let _ = writeln!(io::stderr(), "{}", message.unwrap_or_default());
        }
    }
}

/// `NAME=value`, a line each.
struct Entry(String);

impl Entry {
    fn put(&mut self, field: &Field, value: &str) {
        let value = line(value);
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => writeln!(self.0, "MESSAGE={value}"),
            // What `tracing-log` adds.
            name if name.starts_with("log.") => Ok(()),
            name => writeln!(self.0, "{PREFIX}{}={value}", name.to_ascii_uppercase()),
        };
    }
}

impl Visit for Entry {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }
}

#[cfg(test)]
mod tests {
    use tracing::{info, subscriber::with_default, warn};
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn f6_an_entry_has_a_line_for_each_field() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("socket");
        assert!(Journal::to(&path).is_err());
        let journald = UnixDatagram::bind(&path)?;
        let log = tracing_subscriber::registry().with(Journal::to(&path)?);
        let read = || -> io::Result<String> {
            let mut bytes = [0; 4096];
            let length = journald.recv(&mut bytes)?;
            Ok(String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).into_owned())
        };
        assert_eq!(read()?, "");
        let name = "a\nMESSAGE=b\u{1b}[2J";
        with_default(log, || {
            info!(
                uid = Some(7),
                user = None::<&str>,
                comm = name,
                "denied {}",
                super::super::name(name)
            );
            warn!("two\nlines");
        });
        assert_eq!(
            read()?,
            "PRIORITY=6\nSYSLOG_IDENTIFIER=enforcer\nMESSAGE=denied \"a\\nMESSAGE=b\\u{1b}[2J\"\nENFORCER_UID=7\n\
             ENFORCER_COMM=a\\nMESSAGE=b\\u{1b}[2J\n"
        );
        assert_eq!(read()?, "PRIORITY=4\nSYSLOG_IDENTIFIER=enforcer\nMESSAGE=two\\nlines\n");
        Ok(())
    }
}
