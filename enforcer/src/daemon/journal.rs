//! What the log says of denials: the first of each kind at once, then at most a line a minute with a count. Each user
//! has a budget of kinds, so that none crowds another out of the log. Pure.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    time::{Duration, Instant},
};

use crate::{
    text,
    wire::{ActiveBackend, Denial, Protocol, Verdict},
};

/// Between two lines of one kind.
const PERIOD: Duration = Duration::from_mins(1);
/// Kinds told apart of one user at once: a caller chooses from where, and of a prefix where to, so that there may be
/// any number.
const KINDS: usize = 16;
/// Users told apart at once, and of those with a UID from [`MAPPED`] on.
const USERS: usize = 128;
const MAPPED_USERS: usize = 32;
/// Whoever holds a range of subordinate UIDs (man 5 subuid) may call as tens of thousands of users; they have a budget
/// of their own.
const MAPPED: u32 = 1 << 16;

/// Whose budget a denial is counted on: that of the user who connects, or with nftables of the one who made the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Caller {
    User(u32),
    KernelThread,
    /// Forwarded, or a socket of the kernel's.
    Nobody,
}

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

#[derive(Debug)]
struct KindCount {
    since: Instant,
    /// Not told yet.
    count: u64,
    /// The task that came first; its name is its own choice.
    comm: Option<String>,
    others: bool,
}

/// So many that are told apart no further, and since when.
#[derive(Debug)]
struct Beyond {
    count: u64,
    since: Instant,
}

/// One user's kinds.
#[derive(Debug, Default)]
struct Budget {
    kinds: BTreeMap<Kind, KindCount>,
    /// Of kinds beyond the limit.
    beyond: Option<Beyond>,
}

/// What was told and what is still to be told.
#[derive(Debug, Default)]
pub(super) struct Journal {
    users: BTreeMap<Caller, Budget>,
    /// Of users beyond the limit.
    beyond: Option<Beyond>,
}

impl Journal {
    /// Takes a denial; a line, if it is the first of its kind.
    pub(super) fn take(&mut self, event: &Denial, now: Instant) -> Option<String> {
        let caller = Caller::of(event);
        if !self.users.contains_key(&caller) && !self.has_room(caller) {
            add(&mut self.beyond, now);
            return None;
        }
        let budget = self.users.entry(caller).or_default();
        let kind = Kind::of(event);
        if let Some(seen) = budget.kinds.get_mut(&kind) {
            seen.count += 1;
            seen.others |= seen.comm != event.comm;
            return None;
        }
        if budget.kinds.len() >= KINDS {
            add(&mut budget.beyond, now);
            return None;
        }
        let seen = KindCount {
            since: now,
            count: 0,
            comm: event.comm.clone(),
            others: false,
        };
        let line = kind.line(caller, 1, &seen);
        budget.kinds.insert(kind, seen);
        Some(line)
    }

    fn has_room(&self, caller: Caller) -> bool {
        let (limit, mapped) = if caller.is_mapped() {
            (MAPPED_USERS, true)
        } else {
            (USERS, false)
        };
        self.users.keys().filter(|user| user.is_mapped() == mapped).count() < limit
    }

    /// What is due; a kind of which nothing came for a period is forgotten.
    pub(super) fn due(&mut self, now: Instant) -> Vec<String> {
        let is_due = |since: Instant| now.saturating_duration_since(since) >= PERIOD;
        self.lines(is_due, now)
    }

    /// Everything that is not told yet, at the end.
    pub(super) fn rest(&mut self, now: Instant) -> Vec<String> {
        let lines = self.lines(|_| true, now);
        *self = Self::default();
        lines
    }

    fn lines(&mut self, is_due: impl Fn(Instant) -> bool, now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        self.users.retain(|caller, budget| {
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
                lines.push(format!(
                    "{} more denials for {} not listed individually (too many distinct kinds); see `enforcer events`",
                    beyond.count,
                    caller.words()
                ));
            }
            !budget.kinds.is_empty() || budget.beyond.is_some()
        });
        if let Some(beyond) = self.beyond.take_if(|beyond| is_due(beyond.since)) {
            lines.push(format!(
                "{} more denials by other users, not listed individually; see `enforcer events`",
                beyond.count
            ));
        }
        lines
    }
}

fn add(beyond: &mut Option<Beyond>, now: Instant) {
    beyond.get_or_insert(Beyond { count: 0, since: now }).count += 1;
}

impl Caller {
    pub(super) fn of(event: &Denial) -> Self {
        if event.kernel_thread {
            return Self::KernelThread;
        }
        Self::of_socket(event.task_uid.or(event.socket_uid))
    }

    /// The owner of a socket; none is the kernel.
    pub(super) fn of_socket(owner: Option<u32>) -> Self {
        owner.map_or(Self::Nobody, Self::User)
    }

    /// Whether it may be one of many that are all the same user.
    pub(super) fn is_mapped(self) -> bool {
        matches!(self, Self::User(MAPPED..))
    }

    fn words(self) -> String {
        match self {
            Self::User(uid) => format!("uid {uid}"),
            Self::KernelThread => "a kernel thread".to_owned(),
            Self::Nobody => "an unknown user (forwarded or kernel socket)".to_owned(),
        }
    }
}

impl Kind {
    fn of(event: &Denial) -> Self {
        let owner = event
            .socket_uid
            .filter(|owner| event.task_uid.is_some_and(|uid| uid != *owner));
        Self {
            verdict: event.verdict,
            target: event.target.clone(),
            protocol: event.protocol,
            endpoint: event.judged.clone(),
            owner: owner.filter(|_| !event.kernel_thread),
            at_least: event.backend == ActiveBackend::Nftables,
        }
    }

    fn line(&self, caller: Caller, count: u64, seen: &KindCount) -> String {
        let refused = match self.verdict {
            Verdict::Deny => "denied",
            Verdict::Allow | Verdict::WouldDeny => "would deny",
        };
        let at_least = if self.at_least && count > 1 { "at least " } else { "" };
        let attempts = if count == 1 { "attempt" } else { "attempts" };
        let mut line = format!(
            "{refused} {at_least}{count} {attempts} on {} ({} {}) by {}",
            self.target,
            self.protocol,
            self.endpoint,
            caller.words()
        );
        // Writing to a string cannot fail.
        if let Some(owner) = self.owner {
            let _ = write!(line, " with a socket of uid {owner}");
        }
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
    use crate::wire::Schema;

    fn event(uid: Option<u32>, port: u16, comm: Option<&str>) -> Denial {
        Denial {
            schema: Schema::Event,
            time: String::new(),
            verdict: Verdict::Deny,
            backend: ActiveBackend::Ebpf,
            pid: None,
            tid: None,
            comm: comm.map(str::to_owned),
            kernel_thread: false,
            task_uid: uid.filter(|_| comm.is_some()),
            socket_uid: uid,
            cgroup_id: None,
            netns_cookie: None,
            source: None,
            protocol: Protocol::Tcp,
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
        assert_eq!(journal.rest(at(123)), [first]);
        assert_eq!(journal.rest(at(123)), Vec::<String>::new());
    }

    #[test]
    fn who_it_was_in_words() {
        let told = |event: &Denial| Journal::default().take(event, Instant::now()).unwrap_or_default();
        let odd = event(Some(7), 1, Some("a\x1b[2J\n"));
        assert!(told(&odd).ends_with("by uid 7 (\"a\\u{1b}[2J\\n\")"), "{}", told(&odd));
        assert!(told(&event(Some(7), 1, None)).ends_with("by uid 7"));
        assert!(told(&event(None, 1, None)).ends_with("by an unknown user (forwarded or kernel socket)"));
        let other = Denial {
            socket_uid: Some(8),
            ..event(Some(7), 1, Some("a"))
        };
        assert!(told(&other).ends_with("by uid 7 with a socket of uid 8 (a)"));
        let audit = Denial {
            verdict: Verdict::WouldDeny,
            kernel_thread: true,
            ..event(Some(0), 1, Some("kworker"))
        };
        assert_eq!(
            told(&audit),
            "would deny 1 attempt on monit (tcp 127.0.0.1:1) by a kernel thread (kworker)"
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
        assert_eq!(journal.due(start + Duration::from_secs(1)), Vec::<String>::new());
        let lines = journal.due(start + PERIOD);
        let beyond = 1000 - MAPPED_USERS + 996 - (USERS - 3);
        assert_eq!(
            lines,
            [
                "984 more denials for uid 1 not listed individually (too many distinct kinds); see `enforcer events`"
                    .to_owned(),
                format!("{beyond} more denials by other users, not listed individually; see `enforcer events`")
            ]
        );
        assert!(journal.users.is_empty());
    }

    #[test]
    fn what_is_logged_in_part_is_the_least_there_was() {
        let (mut journal, start) = (Journal::default(), Instant::now());
        let logged = Denial {
            backend: ActiveBackend::Nftables,
            ..event(Some(7), 1, None)
        };
        let first = "denied 1 attempt on monit (tcp 127.0.0.1:1) by uid 7";
        assert_eq!(journal.take(&logged, start).as_deref(), Some(first));
        assert_eq!(journal.take(&logged, start), None);
        assert_eq!(journal.take(&logged, start), None);
        assert_eq!(
            journal.due(start + PERIOD),
            ["denied at least 2 attempts on monit (tcp 127.0.0.1:1) by uid 7"]
        );
    }
}
