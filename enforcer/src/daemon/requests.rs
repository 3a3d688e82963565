//! Requests of the control socket, answered.

use std::time::Instant;

use super::{
    Daemon, DaemonError, Step,
    denials::{send_events, send_sums},
    granted,
};
use crate::{
    control::Call,
    events::Filter,
    wire::{Reply, Request, Verification},
};

impl Daemon {
    /// Answers a request, but for `unload`, which is the end of the loop.
    pub(super) fn answer(&mut self, call: Call) -> Step {
        let Call { request, peer, replies } = call;
        match request {
            Request::Status => drop(replies.try_send(Reply::Status(Box::new(self.status())))),
            Request::Refresh => {
                let names = self.inputs.config.policy.names();
                self.rounds.next();
                self.look_up_all();
                self.rounds.wait(names, replies);
                self.answer_waiting();
            }
            Request::Events { follow, filter } => match Filter::new(filter) {
                Ok(filter) => {
                    let (kept, live) = self.feed.follow(&filter, follow);
                    tokio::spawn(send_events(kept, live, filter, replies));
                }
                Err(error) => drop(replies.try_send(no_time(&error))),
            },
            Request::Summary { filter } => match Filter::new(filter) {
                Ok(filter) => drop(tokio::spawn(send_sums(self.feed.sums(&filter), replies))),
                Err(error) => drop(replies.try_send(no_time(&error))),
            },
            Request::Grant(asked) => drop(replies.try_send(self.answer_grant(&asked, &peer))),
            Request::Revoke(asked) => drop(replies.try_send(self.answer_revoke(&asked, &peer))),
            Request::Grants => drop(replies.try_send(Reply::Grants(granted::report(&self.inputs, &self.identities)))),
            Request::Verify => {
                let reply = match self.verify() {
                    Ok(verification) => Reply::Verification(Box::new(verification)),
                    Err(error) => Reply::Error(error.to_string()),
                };
                drop(replies.try_send(reply));
            }
            Request::Reload { dry_run: true } => {
                let reply = match self.preview() {
                    Ok(report) => Reply::Reload(Box::new(report)),
                    Err(error) => Reply::Error(error.lines().join("\n")),
                };
                drop(replies.try_send(reply));
            }
            Request::Reload { dry_run: false } => {
                self.reload(Some(replies));
                return Step::Follow;
            }
            Request::Unload => return Step::Unload(replies),
        }
        Step::Wait
    }

    /// Compares all that the kernel holds with what is wanted now.
    fn verify(&mut self) -> Result<Verification, DaemonError> {
        let desired = self.inputs.desired(Instant::now())?;
        Ok(self.enforcement.verify(&desired.rules)?)
    }
}

fn no_time(error: &jiff::Error) -> Reply {
    Reply::Error(format!("the time that events are asked since is none: {error}"))
}
