//! What happened last, for those who ask later. One user's flood pushes out that user's own events, not what others
//! did. Pure.

use std::collections::{HashMap, VecDeque};

use crate::{events::Caller, wire::Event};

/// How many are kept.
pub(super) const KEPT_EVENTS: usize = 1024;

/// Whose event it is: a caller's, any of those with a mapped UID, or the daemon's own account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Origin {
    Caller(Caller),
    Mapped,
    Daemon,
}

/// The events, oldest first.
#[derive(Debug, Default)]
pub(super) struct Recent {
    lines: VecDeque<Event>,
    counts: HashMap<Origin, usize>,
}

impl Recent {
    /// Adds an event. When it is full the oldest of whoever has most goes.
    pub(super) fn push(&mut self, line: Event) {
        if self.lines.len() >= KEPT_EVENTS {
            self.drop_one();
        }
        *self.counts.entry(Origin::from_line(&line)).or_default() += 1;
        self.lines.push_back(line);
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Event> {
        self.lines.iter()
    }

    fn drop_one(&mut self) {
        let most = self.counts.iter().max_by_key(|(_, count)| **count);
        let Some(most) = most.map(|(of, _)| *of) else { return };
        let oldest = self.lines.iter().position(|line| Origin::from_line(line) == most);
        if oldest.and_then(|oldest| self.lines.remove(oldest)).is_some()
            && let Some(count) = self.counts.get_mut(&most)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&most);
            }
        }
    }
}

impl Origin {
    pub(super) fn from_line(line: &Event) -> Self {
        match line {
            Event::Denial(event) => Self::from_caller(Caller::of(event)),
            // A user opens as many connections as there is room for, and a sweep finds them all.
            Event::Existing(existing) => Self::from_caller(Caller::of_socket(existing.uid)),
            Event::Grant(_) | Event::Lost(_) => Self::Daemon,
        }
    }

    fn from_caller(caller: Caller) -> Self {
        if caller.is_mapped() {
            Self::Mapped
        } else {
            Self::Caller(caller)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Lost;

    fn event(uid: u32, port: usize) -> Event {
        let text = format!(
            r#"{{"schema":"enforcer/event/1","time":"","verdict":"deny","backend":"ebpf","pid":1,"tid":1,"comm":"a","kernel_thread":false,
            "task_uid":{uid},"socket_uid":{uid},"cgroup_id":1,"netns_cookie":1,"source":null,"protocol":"tcp","dialled":"{port}",
            "judged":"","target":"","generation":1}}"#
        );
        serde_json::from_str(&text).unwrap_or(Event::Lost(Lost::new(0)))
    }

    fn existing(uid: u32, port: usize) -> Event {
        let text = format!(
            r#"{{"schema":"enforcer/existing/1","time":"","verdict":"deny","action":"reported","reason":null,"protocol":"tcp","state":"established","local":"{port}",
            "remote":"","uid":{uid},"cgroup_id":null,"target":"","generation":1}}"#
        );
        serde_json::from_str(&text).unwrap_or(Event::Lost(Lost::new(0)))
    }

    #[test]
    fn a_flood_pushes_out_its_own() {
        let mut recent = Recent::default();
        let others = [event(7, 0), Event::Lost(Lost::new(3)), event(8, 0), existing(7, 0)];
        for line in &others {
            recent.push(line.clone());
        }
        (0..3000).for_each(|port| recent.push(existing(1000, port)));
        (0..3000).for_each(|port| recent.push(event(1000, port)));
        (0..3000).for_each(|uid| recent.push(event(100_000 + uid, 1)));
        let kept: Vec<&Event> = recent.all().collect();
        assert_eq!(kept.len(), KEPT_EVENTS);
        assert!(others.iter().all(|line| kept.contains(&line)));
        // The newest of the flood, in order.
        let of = |uid: u32| {
            kept.iter()
                .filter(|line| Origin::from_line(line) == Origin::Caller(Caller::User(uid)))
                .count()
        };
        assert!(of(1000) >= KEPT_EVENTS / 2 - 3, "{}", of(1000));
        assert!(kept.contains(&&event(1000, 2999)) && !kept.contains(&&event(1000, 0)));
    }
}
