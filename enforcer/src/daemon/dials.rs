//! The dial is the trigger (N8): an attempt on a port of names, at an address that is no endpoint, has these names
//! looked up at once. When it may do so again is decided here. The clock is passed in.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant, SystemTime},
};

use enforcer_ebpf::DialRecord;
use tracing::debug;

use super::{About, Daemon, DaemonError};
use crate::{
    backend::{Dial, Ring},
    host::Identities,
    policy::Name,
    wire::{DialStatus, rfc3339},
};

/// Rest after the first lookup; doubled while lookups bring nothing new and dials go on.
const FIRST_REST: Duration = Duration::from_millis(250);

/// What dials of each port of names do.
#[derive(Debug, Default)]
pub(super) struct Dials(BTreeMap<u16, Port>);

#[derive(Debug)]
struct Port {
    names: BTreeSet<Name>,
    phase: Phase,
    /// The rest after the next lookup that brings nothing new.
    rest: Duration,
    /// Somebody dialled since the lookup began.
    again: bool,
    /// Times that dials had the names looked up.
    lookups: u64,
    last: Option<(Dial, SystemTime)>,
}

#[derive(Debug)]
enum Phase {
    /// The next dial has the names looked up.
    Open {
        /// Since when it could.
        since: Instant,
    },
    /// They are being looked up.
    Asking {
        /// The round that these lookups are of.
        round: u64,
        /// Those not answered yet.
        left: BTreeSet<Name>,
        /// An answer brought something new.
        news: bool,
    },
    /// Until then none are.
    Resting {
        /// The end.
        until: Instant,
    },
}

impl Dials {
    /// Takes the ports of the active rules and their names.
    fn set(&mut self, names: BTreeMap<u16, BTreeSet<Name>>, now: Instant) {
        let mut before = std::mem::take(&mut self.0);
        for (port, names) in names {
            let known = before.remove(&port).map(|mut known| {
                if let Phase::Asking { left, .. } = &mut known.phase {
                    // What is no longer a name is not answered any more.
                    left.retain(|name| names.contains(name));
                    if left.is_empty() {
                        known.phase = Phase::Resting { until: now };
                    }
                }
                known.names.clone_from(&names);
                known
            });
            let new = || Port {
                names,
                phase: Phase::Open { since: now },
                rest: FIRST_REST,
                again: false,
                lookups: 0,
                last: None,
            };
            self.0.insert(port, known.unwrap_or_else(new));
        }
    }

    /// The ports that wait for a dial.
    fn open(&self) -> impl Iterator<Item = u16> {
        let open = |port: &Port| matches!(port.phase, Phase::Open { .. });
        self.0.iter().filter(move |(_, port)| open(port)).map(|(port, _)| *port)
    }

    /// Takes note of a dial: the names to look up now, as lookups of a round. `longest` is the longest rest.
    fn dialled(&mut self, dial: Dial, round: u64, now: Instant, longest: Duration) -> Option<BTreeSet<Name>> {
        let port = self.0.get_mut(&dial.to.port())?;
        port.last = Some((dial, SystemTime::now()));
        match port.phase {
            Phase::Open { since } => {
                if now.saturating_duration_since(since) >= longest {
                    port.rest = FIRST_REST;
                }
                Some(port.ask(round))
            }
            Phase::Asking { .. } | Phase::Resting { .. } => {
                port.again = true;
                None
            }
        }
    }

    /// Takes note that a lookup of a round is answered.
    fn answered(&mut self, name: &Name, round: u64, news: bool, now: Instant, longest: Duration) {
        for port in self.0.values_mut() {
            let Phase::Asking {
                round: asked,
                left,
                news: any,
            } = &mut port.phase
            else {
                continue;
            };
            if *asked > round || !left.remove(name) {
                continue;
            }
            *any |= news;
            if !left.is_empty() {
                continue;
            }
            if *any {
                port.rest = FIRST_REST;
            }
            let rest = port.rest.min(longest);
            port.phase = Phase::Resting { until: now + rest };
            port.rest = (rest * 2).min(longest);
        }
    }

    /// When the next rest ends.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let ends = self.0.values().filter_map(|port| match port.phase {
            Phase::Resting { until } => Some(until),
            Phase::Open { .. } | Phase::Asking { .. } => None,
        });
        ends.min()
    }

    /// The ports whose rest has ended.
    fn rested(&self, now: Instant) -> Vec<u16> {
        let over = |port: &Port| matches!(port.phase, Phase::Resting { until } if until <= now);
        let over = self.0.iter().filter(|(_, port)| over(port));
        over.map(|(port, _)| *port).collect()
    }

    /// Ends a port's rest: the names to look up, as lookups of a round, if somebody dialled meanwhile.
    fn wake(&mut self, port: u16, knocked: bool, round: u64, now: Instant) -> Option<BTreeSet<Name>> {
        let port = self.0.get_mut(&port)?;
        if std::mem::take(&mut port.again) || knocked {
            return Some(port.ask(round));
        }
        port.phase = Phase::Open { since: now };
        None
    }

    /// For `status`.
    pub(super) fn report(&self, identities: &Identities) -> Vec<DialStatus> {
        let told = self
            .0
            .iter()
            .filter_map(|(number, port)| port.last.map(|last| (number, port, last)));
        told.map(|(number, port, (dial, time))| DialStatus {
            port: *number,
            lookups: port.lookups,
            last: dial.to.ip().to_string(),
            uid: dial.user,
            user: identities.name_of(dial.user),
            time: rfc3339(time),
        })
        .collect()
    }
}

impl Port {
    fn ask(&mut self, round: u64) -> BTreeSet<Name> {
        self.again = false;
        self.lookups += 1;
        self.phase = Phase::Asking {
            round,
            left: self.names.clone(),
            news: false,
        };
        self.names.clone()
    }
}

impl Daemon {
    /// Takes the ports of the active names, and has the kernel tell the next dial of each that waits for one.
    pub(super) fn follow_dials(&mut self) {
        self.dials.set(self.inputs.policy().names_by_port(), Instant::now());
        let open: Vec<u16> = self.dials.open().collect();
        let opened = open.into_iter().try_for_each(|port| self.set_gate(port, true));
        self.gates_set(opened);
    }

    /// Takes what open gates have told: no more than there are such gates.
    pub(super) fn take_dials(&mut self, told: &mut Ring<DialRecord>) {
        while let Some(record) = told.take() {
            self.dialled(record.into());
        }
    }

    pub(super) fn dialled(&mut self, dial: Dial) {
        let longest = self.inputs.config.policy.dns.min_refresh;
        let names = self.dials.dialled(dial, self.rounds.now() + 1, Instant::now(), longest);
        match names {
            Some(names) => self.look_up_dialled(names, dial.to.port()),
            // Told by a gate that nobody waits at: of a port that is one of names no longer, or that nftables told
            // before.
            None if !self.dials.0.contains_key(&dial.to.port()) => {
                let closed = self.set_gate(dial.to.port(), false);
                self.gates_set(closed);
            }
            None => {}
        }
    }

    /// Ends the rests that are over.
    pub(super) fn wake_dials(&mut self, now: Instant) {
        for port in self.dials.rested(now) {
            let knocked = self.enforcement.take_knock(port);
            let names = self
                .dials
                .wake(port, *knocked.as_ref().unwrap_or(&false), self.rounds.now() + 1, now);
            let set = knocked.map_err(DaemonError::from).and_then(|_| match names {
                Some(names) => {
                    self.look_up_dialled(names, port);
                    Ok(())
                }
                None => self.set_gate(port, true),
            });
            self.gates_set(set);
        }
    }

    pub(super) fn dial_answered(&mut self, name: &Name, round: u64, news: bool) {
        let longest = self.inputs.config.policy.dns.min_refresh;
        self.dials.answered(name, round, news, Instant::now(), longest);
    }

    fn look_up_dialled(&mut self, names: BTreeSet<Name>, port: u16) {
        debug!("port {port} was dialled at an address that is no endpoint: looking up its names");
        self.rounds.next();
        for name in names {
            self.look_up(name);
        }
    }

    fn set_gate(&mut self, port: u16, open: bool) -> Result<(), DaemonError> {
        Ok(self.enforcement.set_gate(port, open)?)
    }

    fn gates_set(&mut self, set: Result<(), DaemonError>) {
        let fault = |error| format!("{error}; dials of unknown addresses do not trigger lookups until this works");
        self.faults.set(About::Dials, set.err().map(fault));
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    const LONGEST: Duration = Duration::from_secs(5);

    fn name(text: &str) -> Name {
        Name(text.to_owned())
    }

    fn dial(port: u16) -> Dial {
        Dial {
            to: SocketAddr::from(([10, 0, 0, 9], port)),
            user: Some(0),
        }
    }

    fn dials(now: Instant) -> Dials {
        let mut dials = Dials::default();
        let names = [name("a.test"), name("b.test")];
        dials.set(
            BTreeMap::from([
                (4222, BTreeSet::from(names.clone())),
                (80, BTreeSet::from(names).into_iter().take(1).collect()),
            ]),
            now,
        );
        dials
    }

    fn answer(dials: &mut Dials, round: u64, news: bool, now: Instant) {
        for text in ["a.test", "b.test"] {
            dials.answered(&name(text), round, news, now, LONGEST);
        }
    }

    #[test]
    fn the_first_dial_asks_at_once_and_the_next_after_rests_that_grow() {
        let mut now = Instant::now();
        let mut dials = dials(now);
        assert_eq!(dials.open().collect::<Vec<_>>(), [80, 4222]);
        assert_eq!(dials.dialled(dial(22), 1, now, LONGEST), None);
        let names = dials.dialled(dial(4222), 1, now, LONGEST);
        assert_eq!(names.map(|names| names.len()), Some(2));
        let mut rests = Vec::new();
        for round in 1..8 {
            // While it asks, dials ask no more, and an answer of an earlier round says nothing.
            assert_eq!(dials.dialled(dial(4222), 9, now, LONGEST), None);
            answer(&mut dials, round - 1, false, now);
            assert_eq!(dials.next_due(), None, "{round}");
            answer(&mut dials, round, false, now);
            let due = dials.next_due().unwrap_or(now);
            rests.push((due - now).as_millis());
            assert!(dials.rested(now).is_empty());
            now = due;
            assert_eq!(dials.rested(now), [4222]);
            // Somebody has dialled meanwhile.
            assert!(dials.wake(4222, false, round + 1, now).is_some());
        }
        assert_eq!(rests, [250, 500, 1000, 2000, 4000, 5000, 5000]);
        // Something new: the next may come soon.
        answer(&mut dials, 8, true, now);
        assert_eq!(dials.next_due(), Some(now + FIRST_REST));
        now += FIRST_REST;
        assert_eq!(dials.wake(4222, false, 9, now), None);
        assert_eq!(dials.open().collect::<Vec<_>>(), [80, 4222]);
        let [of_4222] = &dials.report(&Identities::default())[..] else {
            panic!("{dials:?}")
        };
        assert_eq!(
            (of_4222.port, of_4222.lookups, of_4222.last.as_str()),
            (4222, 8, "10.0.0.9")
        );
    }

    #[test]
    fn a_knock_asks_and_quiet_ends_the_long_rests() {
        let mut now = Instant::now();
        let mut dials = dials(now);
        assert!(dials.dialled(dial(80), 1, now, LONGEST).is_some());
        answer(&mut dials, 1, false, now);
        now += FIRST_REST;
        // The kernel alone knows of it.
        assert!(dials.wake(80, true, 2, now).is_some());
        answer(&mut dials, 2, false, now);
        assert_eq!(dials.next_due(), Some(now + 2 * FIRST_REST));
        now += 2 * FIRST_REST;
        assert_eq!(dials.wake(80, false, 3, now), None);
        now += LONGEST;
        assert!(dials.dialled(dial(80), 3, now, LONGEST).is_some());
        answer(&mut dials, 3, false, now);
        assert_eq!(dials.next_due(), Some(now + FIRST_REST));
    }

    #[test]
    fn names_that_have_gone_are_not_waited_for() {
        let now = Instant::now();
        let mut dials = dials(now);
        assert!(dials.dialled(dial(4222), 1, now, LONGEST).is_some());
        dials.answered(&name("a.test"), 1, false, now, LONGEST);
        dials.set(BTreeMap::from([(4222, BTreeSet::from([name("a.test")]))]), now);
        assert_eq!(dials.rested(now), [4222]);
        assert_eq!(dials.wake(4222, false, 2, now), None);
        assert_eq!(dials.dialled(dial(80), 2, now, LONGEST), None);
    }

    #[test]
    fn a_record_is_a_dial() {
        let record = DialRecord {
            address: enforcer_ebpf::canonical4(u32::from_ne_bytes([10, 0, 0, 9])),
            task_uid: 0,
            port: 4222_u16.to_be(),
            protocol: enforcer_ebpf::TCP,
            zero: 0,
        };
        assert_eq!(Dial::from(record), dial(4222));
    }
}
