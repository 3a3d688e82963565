//! What is active and whether it is as wanted: observed state and the daemon's own become `Status`. Pure, but for
//! `outside.rs`.

mod outside;

pub(crate) use outside::{Elsewhere, from_outside, saved_names};

use std::time::Instant;

use crate::{
    backend::{Observed, ObservedTarget, SocketUsers},
    host::{Identities, START},
    resolve::MAX_ADDRESSES,
    text::{self, Page, counted},
    wire::{
        ActiveBackend, Condition, ConditionId, DaemonStatus, DialStatus, Existing, ExistingStatus, Mode,
        NameProtection, NameStatus, PrincipalStatus, Schema, Severity, State, Status, SubjectKind, TargetStatus,
        Verdict,
    },
};

/// What only the one who asks knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Context {
    /// Process id of the daemon, if there is one.
    pub daemon: Option<u32>,
    pub cgroup: String,
    pub pin_dir: String,
    pub nft_table: String,
    pub state_dir: String,
    /// Where a daemon was asked that does not answer.
    pub socket: String,
    /// What enforces.
    pub backend: ActiveBackend,
    /// Why it and no other.
    pub backend_reason: Option<String>,
    /// How often something was put back.
    pub restored: u64,
    pub names: Vec<NameStatus>,
    pub dials: Vec<DialStatus>,
    /// What else is not as asked for.
    pub conditions: Vec<Condition>,
    /// Denials that were lost on their way to the daemon, besides those that the kernel programs count.
    pub lost: u64,
    pub existing: Option<ExistingStatus>,
    /// Whether something is active that cannot be read; a cause says what.
    pub unread: bool,
}

/// Puts both together.
#[must_use]
pub(crate) fn status(observed: Option<&Observed>, context: Context) -> Status {
    let mut conditions = context.conditions;
    let is_silent = conditions.iter().any(|one| one.id == ConditionId::DaemonNotAnswering);
    for name in context.names.iter().filter(|name| name.stale) {
        let why = name.cause.as_deref().unwrap_or("the last lookup failed");
        let text = name.protects.fault(&name.name, why);
        conditions.push(match name.protects {
            NameProtection::Addresses => ConditionId::NameStale.because(text),
            NameProtection::Nothing => ConditionId::NameUnresolved.because(text),
            NameProtection::Port => ConditionId::NameUnresolved.because(text).with(Severity::Warning),
        });
    }
    for name in context.names.iter().filter(|name| name.cut > 0) {
        conditions.push(ConditionId::NameTruncated.because(format!(
            "name {} has more addresses than the maximum of {MAX_ADDRESSES}: {} are not protected; name their prefix \
             as an endpoint, or find out which server answers falsely",
            name.name, name.cut
        )));
    }
    if let Some(observed) = observed {
        conditions.extend(observed.faults.iter().cloned());
        if observed.by_daemon && context.daemon.is_none() && !is_silent {
            conditions.push(not_running(observed, &context.socket));
        }
    }
    let is_degraded = conditions.iter().any(|one| one.severity > Severity::Info);
    let on = observed.filter(|observed| observed.generation != 0);
    let state = match on {
        None if context.unread => State::Degraded,
        None => State::Off,
        Some(_) if is_degraded => State::Degraded,
        Some(observed) if observed.audit => State::Audit,
        Some(_) => State::Enforcing,
    };
    if state == State::Off {
        // Where was looked: a file that names other places than the running instance has finds nothing there.
        let asked = match context.daemon {
            Some(_) => String::new(),
            None => format!(", and no daemon answers on {}", context.socket),
        };
        let text = format!(
            "nothing is active in {} nor in nftables table inet {}{asked}; {START}, or run enforcer apply",
            context.pin_dir, context.nft_table
        );
        conditions.push(ConditionId::NothingActive.because(text));
    }
    let causes = conditions.iter().filter(|one| one.severity > Severity::Info);
    let causes = causes.map(|one| one.text.clone()).collect();
    // Told apart from the causes, as nothing is wrong with it.
    let fallback = context
        .backend_reason
        .clone()
        .map(|why| ConditionId::BackendFallback.because(why));
    conditions.extend(fallback);
    let targets = on
        .map(|observed| observed.targets.iter().map(target).collect())
        .unwrap_or_default();
    Status {
        schema: Schema::Status,
        state,
        causes,
        conditions,
        subject: match observed {
            _ if context.backend == ActiveBackend::Nftables => SubjectKind::File,
            Some(observed) => match observed.socket_users {
                SocketUsers::None => SubjectKind::Task,
                SocketUsers::Tcp => SubjectKind::TaskAndTcpSocket,
                SocketUsers::All => SubjectKind::TaskAndSocket,
            },
            None => SubjectKind::TaskAndSocket,
        },
        mode: if on.is_some_and(|observed| observed.audit) {
            Mode::Audit
        } else {
            Mode::Enforce
        },
        generation: on.map_or(0, |observed| observed.generation),
        daemon: DaemonStatus {
            running: context.daemon.is_some() || is_silent,
            pid: context.daemon,
        },
        backend: if on.is_none() && !context.unread {
            ActiveBackend::None
        } else {
            context.backend
        },
        backend_reason: context.backend_reason,
        cgroup: context.cgroup,
        pin_dir: context.pin_dir,
        nft_table: context.nft_table,
        state_dir: context.state_dir,
        restored: context.restored,
        endpoints: on.map_or(0, |observed| observed.endpoints),
        targets,
        names: context.names,
        dials: context.dials,
        events_lost: context.lost + observed.map_or(0, |observed| observed.lost),
        existing: context.existing,
    }
}

/// That rules of a daemon are not followed, as it does not run.
fn not_running(observed: &Observed, socket: &str) -> Condition {
    // Nothing is said to stay that another process has changed.
    let stay = if observed.faults.is_empty() {
        "its rules stay active, but "
    } else {
        ""
    };
    ConditionId::DaemonNotRunning.because(format!(
        "the daemon is not running (none answers on {socket}); {stay}names, addresses and cgroups are not followed, \
         grants do not end, and what is removed is not repaired: {START}"
    ))
}

impl Status {
    /// As a person reads it.
    #[must_use]
    pub fn render(&self) -> String {
        let mut page = Page::default();
        let state = match self.state {
            State::Enforcing => "enforcing",
            State::Audit => "audit: evaluating and counting, denying nothing",
            State::Degraded => "degraded",
            State::Off => "off",
        };
        let mut line = |key: &str, value: &str| page.line(format_args!("{key:<12}{value}"));
        line("state", state);
        for condition in self.conditions_shown() {
            line("", &condition);
        }
        if self.state == State::Degraded && self.mode == Mode::Audit {
            line("mode", "audit: nothing is denied");
        }
        if self.generation != 0 {
            line(
                "rule set",
                &format!(
                    "generation {}, {}",
                    self.generation,
                    counted(self.endpoints, "endpoint")
                ),
            );
        }
        let subject = match self.subject {
            SubjectKind::Task => "the connecting task's user only (this kernel has no BTF)",
            SubjectKind::File => "the user who opened the socket",
            SubjectKind::TaskAndSocket | SubjectKind::TaskAndTcpSocket => {
                "the connecting task's user and the socket's owner"
            }
        };
        if self.backend != ActiveBackend::None {
            line("backend", &format!("{}, checks {subject}", self.backend));
        }
        if let Some(reason) = &self.backend_reason {
            line("", reason);
        }
        if self.backend != ActiveBackend::Nftables {
            line("cgroup", &self.cgroup);
            line("pins", &self.pin_dir);
        }
        if self.backend != ActiveBackend::Ebpf {
            line("table", &format!("inet {}", self.nft_table));
        }
        if self.backend == ActiveBackend::Nftables {
            line(
                "covers",
                "this network namespace and what it forwards; not connections made in other namespaces",
            );
        }
        if self.restored > 0 {
            line(
                "restored",
                &format!(
                    "{}, after another process removed or changed enforcer's rules",
                    counted(self.restored, "time")
                ),
            );
        }
        line(
            "daemon",
            &match (self.daemon.pid, self.daemon.running) {
                (Some(pid), _) => format!("running, pid {pid}"),
                (None, true) => "running".to_owned(),
                (None, false) => "not running".to_owned(),
            },
        );
        if self.events_lost > 0 {
            line(
                "events",
                &format!(
                    "{} lost (they came faster than they were read)",
                    counted(self.events_lost, "denial")
                ),
            );
        }
        if let Some(existing) = &self.existing {
            line("existing", &existing.sum());
        }
        if !self.targets.is_empty() {
            let header = ["target", "endpoints", "allow", "allowed", "denied", "would deny"];
            page.line("");
            page.table(header, self.targets.iter().map(TargetStatus::row));
        }
        if !self.names.is_empty() {
            page.line("");
            page.table(["name", "addresses", ""], self.names.iter().map(NameStatus::row));
        }
        if !self.dials.is_empty() {
            page.line("");
            let header = ["dialled elsewhere", "lookups", "last at", "user", "time"];
            page.table(header, self.dials.iter().map(DialStatus::row));
        }
        if let Some(existing) = self.existing.as_ref().filter(|existing| existing.found > 0) {
            page.line("");
            existing.table(&mut page);
        }
        page.into_text()
    }
}

impl Status {
    /// What a refresh comes to: the state, and what names mean now.
    #[must_use]
    pub(crate) fn render_refreshed(&self) -> String {
        let mut page = Page::default();
        page.line(format_args!("{}, generation {}", self.state, self.generation));
        for condition in self.conditions_shown() {
            page.line(format_args!("  {condition}"));
        }
        if !self.names.is_empty() {
            page.table(["name", "addresses", ""], self.names.iter().map(NameStatus::row));
        }
        page.into_text()
    }

    /// A line for each; why `auto` took what it took is told with the backend.
    fn conditions_shown(&self) -> impl Iterator<Item = String> {
        let told = self
            .conditions
            .iter()
            .filter(|one| one.id != ConditionId::BackendFallback);
        told.map(|one| {
            let mark = if one.severity > Severity::Info { '!' } else { '-' };
            format!("{mark} {}: {}", one.severity, one.text)
        })
    }
}

impl TargetStatus {
    fn row(&self) -> [String; 6] {
        let named: Vec<String> = self.principals.iter().map(ToString::to_string).collect();
        // A daemon of an earlier version does not tell names.
        let allow = match (named.is_empty(), self.allow.is_empty()) {
            (false, _) => named.join(", "),
            (true, false) => self.allow.join(", "),
            (true, true) => "nobody".to_owned(),
        };
        [
            self.name.clone(),
            self.endpoints.to_string(),
            allow,
            self.allowed.to_string(),
            self.denied.to_string(),
            self.would_deny.to_string(),
        ]
    }
}

impl NameStatus {
    fn row(&self) -> [String; 3] {
        let note = match (self.stale, self.protects) {
            (false, _) => "",
            (true, NameProtection::Addresses) => "stale",
            (true, NameProtection::Nothing) => "unresolved: not protected",
            (true, NameProtection::Port) => "unresolved: its port is protected everywhere",
        };
        [self.name.clone(), self.addresses.join(", "), note.to_owned()]
    }
}

impl DialStatus {
    fn row(&self) -> [String; 5] {
        [
            format!("port {}", self.port),
            self.lookups.to_string(),
            self.last.clone(),
            self.uid.map_or_else(
                || "unknown".to_owned(),
                |uid| text::with_name(uid, self.user.as_deref()),
            ),
            self.time.clone(),
        ]
    }
}

impl ExistingStatus {
    fn sum(&self) -> String {
        let now = match self.found {
            0 => "the rules would deny no existing connection".to_owned(),
            1 => "the rules would deny 1 existing connection".to_owned(),
            found => format!("the rules would deny {found} existing connections"),
        };
        match (self.action, self.cut) {
            (Existing::Report, 0) => match self.cuttable() {
                0 => now,
                all if all == self.found => format!("{now}; existing = \"cut\" would terminate them"),
                some => format!("{now}; existing = \"cut\" would terminate {some} of those below"),
            },
            (Existing::Cut, 0) => now,
            (Existing::Report | Existing::Cut, cut) => format!("{now}; {cut} terminated since the daemon started"),
        }
    }

    /// Of those listed: in audit mode none is cut, and none that may be an allowed user's.
    fn cuttable(&self) -> u64 {
        let cuttable = self
            .connections
            .iter()
            .filter(|one| one.verdict == Verdict::Deny && one.reason.is_none());
        u64::try_from(cuttable.count()).unwrap_or(u64::MAX)
    }

    fn table(&self, page: &mut Page) {
        let rows = self.connections.iter().map(|one| {
            [
                format!("{} {}", one.protocol, one.local),
                one.remote.clone(),
                one.uid
                    .map_or_else(|| "kernel".to_owned(), |uid| text::with_name(uid, one.user.as_deref())),
                one.target.clone(),
                one.state.to_string(),
                one.reason.clone().unwrap_or_default(),
            ]
        });
        page.table(["existing", "to", "user", "target", "state", ""], rows);
        let listed = u64::try_from(self.connections.len()).unwrap_or(u64::MAX);
        match self.found.saturating_sub(listed) {
            0 => {}
            more => page.line(format_args!("… and {more} more")),
        }
    }
}

/// Names the principals, as users and cgroups are named now.
pub(crate) fn identify(observed: &mut Observed, identities: &mut Identities, now: Instant) {
    for principal in observed.targets.iter_mut().flat_map(|target| &mut target.allow) {
        principal.user = identities.name_of(principal.uid);
        principal.cgroup = identities.path_of(principal.cgroup_id, None, now);
    }
}

fn target(observed: &ObservedTarget) -> TargetStatus {
    TargetStatus {
        name: observed.name.clone(),
        endpoints: observed.endpoints,
        allow: observed.allow.iter().map(PrincipalStatus::numbers).collect(),
        principals: observed.allow.clone(),
        allowed: observed.counters.allowed,
        denied: observed.counters.denied,
        would_deny: observed.counters.would_deny,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{ExistingAction, ExistingEvent, Protocol, SocketState};

    #[test]
    fn the_text_says_no_more_than_is_so() {
        let context = Context {
            backend: ActiveBackend::Ebpf,
            ..Context::default()
        };
        let mut off = status(None, context);
        assert!(off.state == State::Off && off.backend == ActiveBackend::None, "{off:?}");
        let text = off.render();
        assert!(
            !text.contains("backend ") && text.contains("start the daemon"),
            "{text}"
        );
        off.state = State::Degraded;
        assert!(!off.render().contains("audit"), "{}", off.render());
        off.mode = Mode::Audit;
        assert!(
            off.render().contains("mode        audit: nothing is denied"),
            "{}",
            off.render()
        );
    }

    #[test]
    fn nftables_alone_says_what_it_covers() {
        let observed = Observed {
            generation: 1,
            audit: false,
            by_daemon: false,
            socket_users: SocketUsers::None,
            netns: true,
            endpoints: 0,
            targets: Vec::new(),
            lost: 0,
            faults: Vec::new(),
        };
        for (backend, says) in [
            (ActiveBackend::Nftables, true),
            (ActiveBackend::Ebpf, false),
            (ActiveBackend::Both, false),
        ] {
            let context = Context {
                backend,
                ..Context::default()
            };
            let text = status(Some(&observed), context).render();
            assert_eq!(text.contains("covers      this network namespace"), says, "{text}");
        }
    }

    #[test]
    fn no_more_is_promised_than_a_cut_would_do() {
        let one = |verdict, reason: Option<&str>| ExistingEvent {
            schema: Schema::Existing,
            time: String::new(),
            verdict,
            action: ExistingAction::Reported,
            reason: reason.map(str::to_owned),
            protocol: Protocol::Tcp,
            state: SocketState::Established,
            local: String::new(),
            remote: String::new(),
            uid: Some(1),
            user: None,
            cgroup_id: None,
            cgroup: None,
            target: String::new(),
            generation: 1,
        };
        let sum = |connections: Vec<ExistingEvent>| {
            let existing = ExistingStatus {
                action: Existing::Report,
                time: String::new(),
                generation: 1,
                found: connections.len() as u64,
                cut: 0,
                connections,
            };
            existing.sum()
        };
        assert!(sum(vec![one(Verdict::Deny, None), one(Verdict::Deny, None)]).ends_with("would terminate them"));
        assert!(
            sum(vec![
                one(Verdict::Deny, None),
                one(Verdict::Deny, Some("it may be accepted"))
            ])
            .ends_with("would terminate 1 of those below")
        );
        assert!(sum(vec![one(Verdict::Deny, Some("it may be accepted"))]).ends_with("1 existing connection"));
        assert!(sum(vec![one(Verdict::WouldDeny, None)]).ends_with("1 existing connection"));
    }
}
