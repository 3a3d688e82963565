//! What the log says of denials: the first of each kind at once, then at most a line a minute with a count. Pure.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    time::{Duration, Instant},
};

use crate::{events::Event, text};

/// Between two lines of one kind.
const PERIOD: Duration = Duration::from_mins(1);
/// Kinds told apart at once: a caller chooses from where, and of a prefix where to, so that there may be any number of them.
const KINDS: usize = 256;

/// Who was refused what.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    verdict: String,
    target: String,
    protocol: String,
    endpoint: String,
    who: Who,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    /// A task's user, and the socket's owner where that is another; nftables sees the owner alone.
    User {
        uid: u32,
        owner: Option<u32>,
    },
    KernelThread,
    /// Forwarded, or a socket of the kernel's.
    Nobody,
}

#[derive(Debug)]
struct Seen {
    since: Instant,
    /// Not told yet.
    count: u64,
    /// The task that came first; its name is its own choice.
    comm: Option<String>,
    others: bool,
}

/// What was told and what is still to be told.
#[derive(Debug, Default)]
pub(super) struct Journal {
    kinds: BTreeMap<Kind, Seen>,
    /// Of kinds beyond the limit, and since when.
    beyond: Option<(u64, Instant)>,
}

impl Journal {
    /// Takes a denial; a line, if it is the first of its kind.
    pub(super) fn take(&mut self, event: &Event, now: Instant) -> Option<String> {
        let kind = Kind::of(event);
        if let Some(seen) = self.kinds.get_mut(&kind) {
            seen.count += 1;
            seen.others |= seen.comm != event.comm;
            return None;
        }
        if self.kinds.len() >= KINDS {
            self.beyond.get_or_insert((0, now)).0 += 1;
            return None;
        }
        let seen = Seen {
            since: now,
            count: 0,
            comm: event.comm.clone(),
            others: false,
        };
        let line = kind.line(1, &seen);
        self.kinds.insert(kind, seen);
        Some(line)
    }

    /// What is due; a kind of which nothing came for a period is forgotten.
    pub(super) fn due(&mut self, now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        self.kinds.retain(|kind, seen| {
            if now.saturating_duration_since(seen.since) < PERIOD {
                return true;
            }
            if seen.count == 0 {
                return false;
            }
            lines.push(kind.line(seen.count, seen));
            (seen.since, seen.count) = (now, 0);
            true
        });
        let is_due = |(_, since): &mut (u64, Instant)| now.saturating_duration_since(*since) >= PERIOD;
        lines.extend(self.beyond.take_if(is_due).map(others));
        lines
    }

    /// Everything that is not told yet, at the end.
    pub(super) fn rest(&mut self) -> Vec<String> {
        let kinds = std::mem::take(&mut self.kinds);
        let untold = kinds.iter().filter(|(_, seen)| seen.count > 0);
        let mut lines: Vec<String> = untold.map(|(kind, seen)| kind.line(seen.count, seen)).collect();
        lines.extend(self.beyond.take().map(others));
        lines
    }
}

fn others((count, _): (u64, Instant)) -> String {
    format!("{count} more denials, of more kinds than are told apart here (see enforcer events)")
}

impl Kind {
    fn of(event: &Event) -> Self {
        let who = match (event.kernel_thread, event.task_uid, event.socket_uid) {
            (true, ..) => Who::KernelThread,
            (false, Some(uid), owner) => Who::User {
                uid,
                owner: owner.filter(|owner| *owner != uid),
            },
            (false, None, Some(uid)) => Who::User { uid, owner: None },
            (false, None, None) => Who::Nobody,
        };
        Self {
            verdict: event.verdict.clone(),
            target: event.target.clone(),
            protocol: event.protocol.clone(),
            endpoint: event.judged.clone(),
            who,
        }
    }

    fn line(&self, count: u64, seen: &Seen) -> String {
        let refused = if self.verdict == "deny" { "denied" } else { "would deny" };
        let attempts = if count == 1 { "attempt" } else { "attempts" };
        let mut line = format!(
            "{refused} {count} {attempts} on {} ({} {}) by ",
            self.target, self.protocol, self.endpoint
        );
        // Writing to a string cannot fail.
        let _ = match self.who {
            Who::User { uid, owner: None } => write!(line, "uid {uid}"),
            Who::User {
                uid,
                owner: Some(owner),
            } => write!(line, "uid {uid} with a socket of uid {owner}"),
            Who::KernelThread => write!(line, "a kernel thread"),
            Who::Nobody => write!(line, "no user of this host"),
        };
        if let Some(comm) = &seen.comm {
            let others = if seen.others { " and others" } else { "" };
            let _ = write!(line, " ({}{others})", text::name(comm));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(uid: Option<u32>, port: u16, comm: Option<&str>) -> Event {
        Event {
            schema: String::new(),
            time: String::new(),
            verdict: "deny".to_owned(),
            backend: String::new(),
            pid: None,
            tid: None,
            comm: comm.map(str::to_owned),
            kernel_thread: false,
            task_uid: uid.filter(|_| comm.is_some()),
            socket_uid: uid,
            cgroup_id: None,
            netns_cookie: None,
            source: None,
            protocol: "tcp".to_owned(),
            dialled: String::new(),
            judged: format!("127.0.0.1:{port}"),
            target: "monit".to_owned(),
            generation: 1,
        }
    }

    #[test]
    fn the_first_at_once_then_a_line_a_minute() {
        let (mut journal, start) = (Journal::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let curl = event(Some(1000), 2822, Some("curl"));
        let first = "denied 1 attempt on monit (tcp 127.0.0.1:2822) by uid 1000 (curl)";
        assert_eq!(journal.take(&curl, at(0)).as_deref(), Some(first));
        for _ in 0..11 {
            assert_eq!(journal.take(&curl, at(1)), None);
        }
        assert_eq!(journal.due(at(59)), Vec::<String>::new());
        let wget = event(Some(1000), 2822, Some("w\nget"));
        assert_eq!(journal.take(&wget, at(59)), None);
        assert_eq!(
            journal.due(at(60)),
            ["denied 12 attempts on monit (tcp 127.0.0.1:2822) by uid 1000 (curl and others)"]
        );
        // Quiet for a minute: told anew at once.
        assert_eq!(journal.due(at(120)), Vec::<String>::new());
        assert_eq!(journal.take(&curl, at(121)).as_deref(), Some(first));
        assert_eq!(journal.take(&curl, at(122)), None);
        assert_eq!(journal.rest(), [first]);
        assert_eq!(journal.rest(), Vec::<String>::new());
    }

    #[test]
    fn who_it_was_in_words() {
        let told = |event: &Event| Journal::default().take(event, Instant::now()).unwrap_or_default();
        let odd = event(Some(7), 1, Some("a\x1b[2J\n"));
        assert!(told(&odd).ends_with("by uid 7 (\"a\\u{1b}[2J\\n\")"), "{}", told(&odd));
        assert!(told(&event(Some(7), 1, None)).ends_with("by uid 7"));
        assert!(told(&event(None, 1, None)).ends_with("by no user of this host"));
        let other = Event {
            socket_uid: Some(8),
            ..event(Some(7), 1, Some("a"))
        };
        assert!(told(&other).ends_with("by uid 7 with a socket of uid 8 (a)"));
        let audit = Event {
            verdict: "would-deny".to_owned(),
            kernel_thread: true,
            ..event(Some(0), 1, Some("kworker"))
        };
        assert_eq!(
            told(&audit),
            "would deny 1 attempt on monit (tcp 127.0.0.1:1) by a kernel thread (kworker)"
        );
    }

    #[test]
    fn no_more_is_kept_than_the_limit() {
        let (mut journal, start) = (Journal::default(), Instant::now());
        let mut told = 0;
        for port in 0..1000 {
            told += usize::from(journal.take(&event(Some(1), port, None), start).is_some());
        }
        assert_eq!((told, journal.kinds.len()), (KINDS, KINDS));
        assert_eq!(journal.due(start + Duration::from_secs(1)), Vec::<String>::new());
        let lines = journal.due(start + PERIOD);
        assert_eq!(
            lines,
            ["744 more denials, of more kinds than are told apart here (see enforcer events)"]
        );
        assert!(journal.kinds.is_empty());
    }
}
