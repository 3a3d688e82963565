//! What the log says of denials: the first of each kind at once, then at most a line a minute with a count. Each user
//! has a budget of kinds, so that none crowds another out of the log. Pure.

use std::time::{Duration, Instant};

use crate::{
    events::{Budgets, Caller, Place, other_owner},
    text::{self, counted, user},
    wire::{ActiveBackend, Denial, Protocol, Verdict},
};

/// Between two lines of one kind.
const PERIOD: Duration = Duration::from_mins(1);
/// Kinds told apart of one user at once: a caller chooses from where, and of a prefix where to, so that there may be
/// any number.
const KINDS: usize = 16;
/// What one caller was refused.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    verdict: Verdict,
    target: String,
    protocol: Protocol,
    endpoint: String,
    /// The socket's owner, where that is another user than the task's.
    owner: Option<u32>,
    /// Not every denial is logged (nftables): a count is the least that there were.
    at_least: bool,
}

/// Denials of a kind.
#[derive(Debug)]
struct KindCount {
    since: Instant,
    /// Whether the first of them is logged.
    begun: bool,
    /// Not told yet.
    count: u64,
    user: Option<String>,
    owner: Option<String>,
    /// A task's name is its own choice.
    task: Seen,
    program: Seen,
    cgroup: Seen,
}

/// What came first, and whether something else did later.
#[derive(Debug, Default)]
struct Seen {
    first: Option<String>,
    others: bool,
}

impl Seen {
    fn of(first: Option<String>) -> Self {
        Self { first, others: false }
    }

    fn note(&mut self, found: Option<&String>) {
        self.others |= self.first.as_ref() != found;
    }

    /// `, task curl and others`, or nothing where nothing is known.
    fn words(&self, what: &str) -> String {
        let others = if self.others { " and others" } else { "" };
        let words = |first: &String| format!(", {what} {}{others}", text::name(first));
        self.first.as_ref().map(words).unwrap_or_default()
    }
}

/// A line of the log, and what it is made of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Line {
    pub text: String,
    pub fields: Fields,
}

/// Of one line; what does not apply is absent.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Fields {
    pub verdict: Option<Verdict>,
    pub target: Option<String>,
    pub protocol: Option<Protocol>,
    pub endpoint: Option<String>,
    pub uid: Option<u32>,
    pub user: Option<String>,
    pub socket_uid: Option<u32>,
    /// Those that came first, if there are several.
    pub comm: Option<String>,
    pub exe: Option<String>,
    pub cgroup: Option<String>,
    pub count: Option<u64>,
}

/// So many that are told apart no further, and since when.
#[derive(Debug)]
struct Beyond {
    count: u64,
    since: Instant,
}

/// What was told and what is still to be told.
#[derive(Debug)]
pub(super) struct Journal(Budgets<Kind, KindCount, Beyond>);

impl Default for Journal {
    fn default() -> Self {
        Self(Budgets::new(KINDS))
    }
}

impl Journal {
    /// Takes a denial; a line, if it is the first of its kind.
    pub(super) fn take(&mut self, event: &Denial, now: Instant) -> Option<Line> {
        let caller = Caller::of(event);
        let new = || KindCount {
            since: now,
            begun: false,
            count: 0,
            user: event.task_user.clone().or_else(|| event.socket_user.clone()),
            owner: event.socket_user.clone(),
            task: Seen::of(event.comm.clone()),
            program: Seen::of(event.exe.clone()),
            cgroup: Seen::of(event.cgroup.clone()),
        };
        match self.0.place(caller, Kind::of(event), new) {
            Place::Kind(seen) if seen.begun => {
                seen.count += 1;
                seen.task.note(event.comm.as_ref());
                seen.program.note(event.exe.as_ref());
                seen.cgroup.note(event.cgroup.as_ref());
                None
            }
            Place::Kind(seen) => {
                seen.begun = true;
                Some(Kind::of(event).line(caller, 1, seen))
            }
            Place::Beyond(beyond) => {
                beyond.get_or_insert(Beyond { count: 0, since: now }).count += 1;
                None
            }
        }
    }

    /// What is due; a kind of which nothing came for a period is forgotten.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Line> {
        let is_due = |since: Instant| now.saturating_duration_since(since) >= PERIOD;
        self.lines(is_due, now)
    }

    /// Everything that is not told yet, at the end.
    pub(super) fn rest(&mut self, now: Instant) -> Vec<Line> {
        let lines = self.lines(|_| true, now);
        *self = Self::default();
        lines
    }

    fn lines(&mut self, is_due: impl Fn(Instant) -> bool, now: Instant) -> Vec<Line> {
        let mut lines = Vec::new();
        self.0.callers.retain(|caller, budget| {
            budget.kinds.retain(|kind, seen| {
                if !is_due(seen.since) {
                    return true;
                }
                if seen.count == 0 {
                    return false;
                }
                lines.push(kind.line(*caller, seen.count, seen));
                (seen.since, seen.count) = (now, 0);
                true
            });
            if let Some(beyond) = budget.beyond.take_if(|beyond| is_due(beyond.since)) {
                let text = format!(
                    "{} more denials for {} not listed individually (too many distinct kinds); see `enforcer events`",
                    beyond.count,
                    words(*caller, None)
                );
                lines.push(Line::of_many(text, beyond.count));
            }
            !budget.kinds.is_empty() || budget.beyond.is_some()
        });
        if let Some(beyond) = self.0.beyond.take_if(|beyond| is_due(beyond.since)) {
            let text = format!(
                "{} more denials by other users, not listed individually; see `enforcer events`",
                beyond.count
            );
            lines.push(Line::of_many(text, beyond.count));
        }
        lines
    }
}

impl Line {
    /// Of several kinds.
    pub(super) fn of_many(text: String, count: u64) -> Self {
        let fields = Fields {
            count: Some(count),
            ..Fields::default()
        };
        Self { text, fields }
    }
}

fn words(caller: Caller, name: Option<&String>) -> String {
    match caller {
        Caller::User(uid) => user(uid, name.map(String::as_str)),
        Caller::KernelThread => "a kernel thread".to_owned(),
        Caller::Nobody => "an unknown user (forwarded or kernel socket)".to_owned(),
    }
}

impl Kind {
    fn of(event: &Denial) -> Self {
        Self {
            verdict: event.verdict,
            target: event.target.clone(),
            protocol: event.protocol,
            endpoint: event.judged.clone(),
            owner: other_owner(event),
            at_least: event.backend == ActiveBackend::Nftables,
        }
    }

    fn line(&self, caller: Caller, count: u64, seen: &KindCount) -> Line {
        let refused = match self.verdict {
            Verdict::Deny => "denied",
            Verdict::Allow | Verdict::WouldDeny => "would deny",
        };
        let at_least = if self.at_least && count > 1 { "at least " } else { "" };
        let owner = |owner| format!(" with a socket of {}", user(owner, seen.owner.as_deref()));
        let text = format!(
            "{refused} {at_least}{} on {} ({} {}) by {}{}{}{}{}",
            counted(count, "attempt"),
            self.target,
            self.protocol,
            self.endpoint,
            words(caller, seen.user.as_ref()),
            self.owner.map(owner).unwrap_or_default(),
            seen.task.words("task"),
            seen.program.words("program"),
            seen.cgroup.words("cgroup"),
        );
        let fields = Fields {
            verdict: Some(self.verdict),
            target: Some(self.target.clone()),
            protocol: Some(self.protocol),
            endpoint: Some(self.endpoint.clone()),
            uid: match caller {
                Caller::User(uid) => Some(uid),
                Caller::KernelThread | Caller::Nobody => None,
            },
            user: seen.user.clone(),
            socket_uid: self.owner,
            comm: seen.task.first.clone(),
            exe: seen.program.first.clone(),
            cgroup: seen.cgroup.first.clone(),
            count: Some(count),
        };
        Line { text, fields }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{MAPPED_USERS, USERS, tests::denial};

    fn event(uid: Option<u32>, port: u16, comm: Option<&str>) -> Denial {
        Denial {
            comm: comm.map(str::to_owned),
            task_uid: uid.filter(|_| comm.is_some()),
            socket_uid: uid,
            judged: format!("127.0.0.1:{port}"),
            ..denial(0, "monit", "")
        }
    }

    fn texts(lines: Vec<Line>) -> Vec<String> {
        lines.into_iter().map(|line| line.text).collect()
    }

    fn text(line: Option<Line>) -> Option<String> {
        line.map(|line| line.text)
    }

    #[test]
    fn the_first_at_once_then_a_line_a_minute() {
        let (mut journal, start) = (Journal::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let curl = event(Some(1000), 2822, Some("curl"));
        let first = "denied 1 attempt on monit (tcp 127.0.0.1:2822) by uid 1000, task curl";
        assert_eq!(text(journal.take(&curl, at(0))).as_deref(), Some(first));
        for _ in 0..11 {
            assert_eq!(journal.take(&curl, at(1)), None);
        }
        assert_eq!(journal.due(at(59)), []);
        let wget = event(Some(1000), 2822, Some("w\nget"));
        assert_eq!(journal.take(&wget, at(59)), None);
        assert_eq!(
            texts(journal.due(at(60))),
            ["denied 12 attempts on monit (tcp 127.0.0.1:2822) by uid 1000, task curl and others"]
        );
        // Quiet for a minute: told anew at once.
        assert_eq!(journal.due(at(120)), []);
        assert_eq!(text(journal.take(&curl, at(121))).as_deref(), Some(first));
        assert_eq!(journal.take(&curl, at(122)), None);
        assert_eq!(texts(journal.rest(at(123))), [first]);
        assert_eq!(journal.rest(at(123)), []);
    }

    #[test]
    fn who_it_was_in_words() {
        let told = |event: &Denial| text(Journal::default().take(event, Instant::now())).unwrap_or_default();
        let odd = event(Some(7), 1, Some("a\x1b[2J\n"));
        assert!(
            told(&odd).ends_with("by uid 7, task \"a\\u{1b}[2J\\n\""),
            "{}",
            told(&odd)
        );
        assert!(told(&event(Some(7), 1, None)).ends_with("by uid 7"));
        assert!(told(&event(None, 1, None)).ends_with("by an unknown user (forwarded or kernel socket)"));
        let other = Denial {
            socket_uid: Some(8),
            ..event(Some(7), 1, Some("a"))
        };
        let named = Denial {
            task_user: Some("vcap".to_owned()),
            socket_user: Some("a b".to_owned()),
            cgroup: Some("/system.slice/x.service".to_owned()),
            ..other.clone()
        };
        assert!(
            told(&named)
                .ends_with("by uid 7 (vcap) with a socket of uid 8 (\"a b\"), task a, cgroup /system.slice/x.service")
        );
        assert!(told(&other).ends_with("by uid 7 with a socket of uid 8, task a"));
        let audit = Denial {
            verdict: Verdict::WouldDeny,
            kernel_thread: true,
            ..event(Some(0), 1, Some("kworker"))
        };
        assert_eq!(
            told(&audit),
            "would deny 1 attempt on monit (tcp 127.0.0.1:1) by a kernel thread, task kworker"
        );
    }

    #[test]
    fn a_user_has_a_budget_and_crowds_nobody_out() {
        let (mut journal, start) = (Journal::default(), Instant::now());
        let mut told = |uid, port| usize::from(journal.take(&event(Some(uid), port, Some("a")), start).is_some());
        assert_eq!((0..1000).map(|port| told(1, port)).sum::<usize>(), KINDS);
        // Another user's is told, one of many users of one range is not.
        assert_eq!(told(2, 1), 1);
        assert_eq!((0..1000).map(|uid| told(100_000 + uid, 1)).sum::<usize>(), MAPPED_USERS);
        assert_eq!(told(3, 1), 1);
        assert_eq!((4..1000).map(|uid| told(uid, 1)).sum::<usize>(), USERS - 3);
        assert_eq!(journal.due(start + Duration::from_secs(1)), []);
        let lines = texts(journal.due(start + PERIOD));
        let beyond = 1000 - MAPPED_USERS + 996 - (USERS - 3);
        assert_eq!(
            lines,
            [
                "984 more denials for uid 1 not listed individually (too many distinct kinds); see `enforcer events`"
                    .to_owned(),
                format!("{beyond} more denials by other users, not listed individually; see `enforcer events`")
            ]
        );
        assert!(journal.0.callers.is_empty());
    }

    #[test]
    fn what_is_logged_in_part_is_the_least_there_was() {
        let (mut journal, start) = (Journal::default(), Instant::now());
        let logged = Denial {
            backend: ActiveBackend::Nftables,
            ..event(Some(7), 1, None)
        };
        let first = "denied 1 attempt on monit (tcp 127.0.0.1:1) by uid 7";
        assert_eq!(text(journal.take(&logged, start)).as_deref(), Some(first));
        assert_eq!(journal.take(&logged, start), None);
        assert_eq!(journal.take(&logged, start), None);
        assert_eq!(
            texts(journal.due(start + PERIOD)),
            ["denied at least 2 attempts on monit (tcp 127.0.0.1:1) by uid 7"]
        );
    }
}
