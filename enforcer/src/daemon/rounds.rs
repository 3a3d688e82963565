//! Whose lookups count, and who waits for them (B3): only lookups begun after a refresh was asked for answer it. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::policy::Name;

/// Lookups numbered by the refresh that they follow, and replies `R` that wait for them.
#[derive(Debug)]
pub(super) struct Rounds<R> {
    /// Counts requests.
    round: u64,
    /// The newest round of each name that was answered.
    answered: BTreeMap<Name, u64>,
    waiting: Vec<Waiting<R>>,
    /// Names whose first answer readiness waits for.
    first: BTreeSet<Name>,
}

#[derive(Debug)]
struct Waiting<R> {
    round: u64,
    names: BTreeSet<Name>,
    reply: R,
}

impl<R> Rounds<R> {
    pub(super) fn new(first: BTreeSet<Name>) -> Self {
        Self {
            round: 0,
            answered: BTreeMap::new(),
            waiting: Vec::new(),
            first,
        }
    }

    /// The round of lookups begun now.
    pub(super) fn now(&self) -> u64 {
        self.round
    }

    /// Begins another round: earlier lookups answer none of its requests.
    pub(super) fn next(&mut self) -> u64 {
        self.round += 1;
        self.round
    }

    /// Has a reply wait until each of these names is answered in this round or a later one.
    pub(super) fn wait(&mut self, names: BTreeSet<Name>, reply: R) {
        self.waiting.push(Waiting {
            round: self.round,
            names,
            reply,
        });
    }

    /// Takes note of an answer to a lookup of this round. False if a later one was answered before it.
    pub(super) fn answered(&mut self, name: &Name, round: u64) -> bool {
        self.first.remove(name);
        let newest = self.answered.entry(name.clone()).or_default();
        if round < *newest {
            return false;
        }
        *newest = round;
        for waiting in self.waiting.iter_mut().filter(|waiting| waiting.round <= round) {
            waiting.names.remove(name);
        }
        true
    }

    /// Has readiness wait for the first answer of each of these names.
    pub(super) fn await_first(&mut self, names: BTreeSet<Name>) {
        self.first = names;
    }

    /// Whether each name was answered once.
    pub(super) fn has_first_answers(&self) -> bool {
        self.first.is_empty()
    }

    /// What is not one of these names is no longer waited for.
    pub(super) fn retain(&mut self, names: &BTreeSet<Name>) {
        self.first.retain(|name| names.contains(name));
        for waiting in &mut self.waiting {
            waiting.names.retain(|name| names.contains(name));
        }
    }

    /// Replies that wait no longer.
    pub(super) fn done(&mut self) -> Vec<R> {
        let done = self.waiting.extract_if(.., |waiting| waiting.names.is_empty());
        done.map(|waiting| waiting.reply).collect()
    }
}

#[cfg(test)]
#[allow(clippy::expect_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).expect("a name")
    }

    fn names(texts: &[&str]) -> BTreeSet<Name> {
        texts.iter().map(|text| name(text)).collect()
    }

    #[test]
    fn only_lookups_begun_after_a_request_answer_it() {
        let mut rounds = Rounds::new(names(&["a"]));
        let before = rounds.now();
        let after = rounds.next();
        rounds.wait(names(&["a", "b"]), "reply");
        assert!(rounds.answered(&name("a"), before));
        assert!(rounds.has_first_answers() && rounds.done().is_empty());
        assert!(rounds.answered(&name("b"), after) && rounds.done().is_empty());
        assert!(rounds.answered(&name("a"), after));
        assert_eq!(rounds.done(), ["reply"]);
        assert!(rounds.done().is_empty(), "once");
    }

    #[test]
    fn a_late_answer_of_an_earlier_round_counts_for_nothing() {
        let mut rounds = Rounds::<()>::new(BTreeSet::new());
        let before = rounds.now();
        let after = rounds.next();
        assert!(rounds.answered(&name("a"), after));
        assert!(!rounds.answered(&name("a"), before));
        assert!(rounds.answered(&name("a"), after), "its other family");
    }

    #[test]
    fn a_later_round_answers_earlier_requests_too() {
        let mut rounds = Rounds::new(BTreeSet::new());
        for number in 1..=3 {
            rounds.next();
            rounds.wait(names(&["a"]), number);
        }
        assert!(rounds.answered(&name("a"), 2));
        assert_eq!(rounds.done(), [1, 2]);
        assert!(rounds.answered(&name("a"), rounds.now()));
        assert_eq!(rounds.done(), [3]);
    }

    #[test]
    fn nobody_waits_for_what_is_no_longer_a_name() {
        let mut rounds = Rounds::new(names(&["a", "b"]));
        rounds.wait(names(&["a"]), "one");
        rounds.wait(names(&["a", "b"]), "two");
        rounds.wait(BTreeSet::new(), "none");
        assert_eq!(rounds.done(), ["none"]);
        rounds.retain(&names(&["b"]));
        assert_eq!(rounds.done(), ["one"]);
        assert!(!rounds.has_first_answers());
        assert!(rounds.answered(&name("b"), 0) && rounds.has_first_answers());
        assert_eq!(rounds.done(), ["two"]);
    }
}
