//! Which events somebody asks for. Pure.

use jiff::Timestamp;

use crate::wire::{DenialSum, Event, EventFilter, SumOf};

/// What is let through; all of it where nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filter {
    pub since: Option<Timestamp>,
    pub target: Option<String>,
    pub user: Option<u32>,
    /// The last so many of those.
    pub last: Option<usize>,
}

impl Filter {
    /// As it was asked; an error is a time that is none.
    pub(crate) fn new(asked: EventFilter) -> Result<Self, jiff::Error> {
        Ok(Self {
            since: asked.since.map(|since| since.parse()).transpose()?,
            target: asked.target,
            user: asked.user,
            last: asked.last,
        })
    }

    pub(crate) fn lets(&self, event: &Event) -> bool {
        let (time, target, users) = match event {
            Event::Denial(event) => (&event.time, &event.target, [event.task_uid, event.socket_uid]),
            Event::Existing(event) => (&event.time, &event.target, [event.uid, None]),
            Event::Grant(event) => (&event.time, &event.target, [event.user, event.uid]),
            // Nobody knows whose they were.
            Event::Lost(_) => return true,
        };
        let is_new = |since: Timestamp| time.parse::<Timestamp>().is_ok_and(|time| time >= since);
        self.since.is_none_or(is_new)
            && self.target.as_ref().is_none_or(|wanted| wanted == target)
            && self.user.is_none_or(|wanted| users.contains(&Some(wanted)))
    }

    /// Whether a sum may be of the target and the user; its time is its own matter. Of some sums nobody knows whose
    /// they are: hidden, they would look like no denials.
    pub(super) fn lets_sum(&self, sum: &DenialSum) -> bool {
        let of_target = |wanted: &String| sum.target.as_ref().is_none_or(|target| target == wanted);
        let of_user = |wanted| match sum.of {
            SumOf::Kind | SumOf::MoreKinds => [sum.uid, sum.socket_uid].contains(&Some(wanted)),
            SumOf::MoreUsers | SumOf::Unreported => true,
        };
        self.target.as_ref().is_none_or(of_target) && self.user.is_none_or(of_user)
    }

    /// The last of those events that it lets through.
    pub(crate) fn last_of<'e>(&self, events: impl Iterator<Item = &'e Event>) -> Vec<Event> {
        let let_through: Vec<&Event> = events.filter(|event| self.lets(event)).collect();
        let skipped = let_through.len().saturating_sub(self.last.unwrap_or(usize::MAX));
        let_through.into_iter().skip(skipped).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        events::tests::denial,
        wire::{Denial, Lost},
    };

    #[test]
    fn what_is_asked_for_is_let_through() {
        let event = |uid, target, time: &str| {
            Event::Denial(Denial {
                time: time.to_owned(),
                ..denial(uid, target, "curl")
            })
        };
        let events = [
            event(1, "a", "2026-11-20T08:00:00.000000Z"),
            event(2, "a", "2026-11-20T09:00:00.000000Z"),
            event(2, "b", "2026-11-20T10:00:00.000000Z"),
            Event::Lost(Lost::new(1)),
        ];
        let let_through = |since: Option<&str>, target: Option<&str>, user, last| {
            let filter = Filter::new(EventFilter {
                since: since.map(str::to_owned),
                target: target.map(str::to_owned),
                user,
                last,
            });
            let found = filter.map(|filter| filter.last_of(events.iter())).unwrap_or_default();
            let at = |event| events.iter().position(|other| other == event);
            found.iter().filter_map(at).collect::<Vec<_>>()
        };
        assert_eq!(let_through(None, None, None, None), [0, 1, 2, 3]);
        assert_eq!(let_through(Some("2026-11-20T09:00:00Z"), None, None, None), [1, 2, 3]);
        assert_eq!(let_through(None, Some("a"), None, None), [0, 1, 3]);
        assert_eq!(let_through(None, Some("a"), Some(2), None), [1, 3]);
        assert_eq!(let_through(None, None, None, Some(2)), [2, 3]);
        assert_eq!(let_through(None, None, Some(7), Some(9)), [3]);
        assert!(let_through(Some("yesterday"), None, None, None).is_empty());
    }
}
