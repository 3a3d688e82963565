//! Names asked about: when, whose answer counts, and who waits for it (B3).

use std::time::Instant;

use tokio::task;
use tracing::{error, info, warn};

use super::{About, Daemon, guard::Hold};
use crate::{
    policy::Name,
    resolve::{LOOKUP_TIMEOUT, LookupAnswer, Note, Outcome, PartialAnswer, lookup_early},
    wire::Reply,
};

impl Daemon {
    pub(super) fn look_up_all(&mut self) {
        for name in self.inputs.config.policy.names() {
            self.look_up(name);
        }
    }

    /// When a name is to be looked up next, or a dial may have that done again.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.inputs
            .names
            .next_due()
            .into_iter()
            .chain(self.dials.next_due())
            .min()
    }

    pub(super) fn look_up_due(&mut self, now: Instant) {
        self.wake_dials(now);
        for name in self.inputs.names.due(now) {
            self.look_up(name);
        }
        self.apply_or_keep(); // Retained addresses expire (N4).
    }

    pub(super) fn look_up(&mut self, name: Name) {
        self.inputs.names.begin(&name);
        let asked = name.clone();
        let task = self
            .lookups
            .spawn(async move { lookup_early(&asked, LOOKUP_TIMEOUT).await });
        self.under_way.insert(task.id(), (name, self.rounds.now()));
    }

    /// Takes the answer to a lookup, unless a later one was answered before it.
    pub(super) fn answered(&mut self, joined: Result<(task::Id, PartialAnswer), task::JoinError>) {
        let (id, PartialAnswer { answer, rest }) = match joined {
            Ok((id, answer)) => (id, answer),
            Err(error) => {
                let failed = Outcome::Failed("the lookup ended by itself".to_owned());
                error!("a lookup ended by itself: {error}");
                (
                    error.id(),
                    PartialAnswer::from(LookupAnswer::Dns {
                        a: failed.clone(),
                        aaaa: failed,
                    }),
                )
            }
        };
        let Some((name, round)) = self.under_way.remove(&id) else {
            return;
        };
        let whole = rest.is_none();
        if let Some(rest) = rest {
            let task = self.lookups.spawn(async move { rest.await.into() });
            self.under_way.insert(task.id(), (name.clone(), round));
            // What the kernel guards, and nobody else remembers, may be of the family that is awaited (F1).
            if self.guard.hold == Hold::UntilResolved {
                return;
            }
        }
        if !self.rounds.answered(&name, round) {
            return;
        }
        self.kept.changed();
        let now = Instant::now();
        let notes = if whole {
            self.inputs.names.answered(now, &name, answer)
        } else {
            self.inputs.names.answered_in_part(now, &name, &answer)
        };
        let news = notes.iter().any(|note| matches!(note, Note::Changed(..)));
        self.dial_answered(&name, round, news);
        for note in notes {
            if note.is_fault() {
                warn!("{note}");
            } else {
                info!("{note}");
            }
        }
    }

    pub(super) fn answer_waiting(&mut self) {
        let done = self.rounds.done();
        if !done.is_empty() {
            let reply = self.applied_reply();
            for replies in done {
                let _ = replies.try_send(reply.clone());
            }
        }
    }

    pub(super) fn applied_reply(&mut self) -> Reply {
        match self.faults.of(About::RuleSet) {
            Some(fault) => Reply::Error(fault.to_owned()),
            None => Reply::Status(Box::new(self.quick_status())),
        }
    }
}
