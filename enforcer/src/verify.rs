//! `enforcer verify`: what the kernel holds against what is wanted, entry by entry. Pure; the backends read and name
//! their parts.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::{
    host::START,
    text::Page,
    wire::{ActiveBackend, Against, Difference, DifferenceKind, Object, Schema, Verification},
};

/// Most differences that are listed; all are counted.
const MAX_LISTED: usize = 256;

/// Differences as they are found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Comparison {
    compared: u64,
    counts: BTreeMap<Object, u64>,
    differences: Vec<Difference>,
}

impl Comparison {
    /// Compares two sets of entries of an object.
    pub(crate) fn entries<K: Ord + fmt::Debug, V: PartialEq + fmt::Debug>(
        &mut self,
        object: &Object,
        wanted: impl IntoIterator<Item = (K, V)>,
        found: impl IntoIterator<Item = (K, V)>,
    ) {
        let wanted: BTreeMap<K, V> = wanted.into_iter().collect();
        let mut found: BTreeMap<K, V> = found.into_iter().collect();
        for (key, value) in &wanted {
            let there = found.remove(key);
            self.one(object, || format!("{key:?}"), Some(value), there.as_ref());
        }
        for (key, value) in &found {
            self.one(object, || format!("{key:?}"), None, Some(value));
        }
    }

    /// Counts entries that are known to be as wanted.
    pub(crate) fn same(&mut self, entries: usize) {
        self.compared += u64::try_from(entries).unwrap_or(u64::MAX);
    }

    /// Compares one entry.
    pub(crate) fn one<V: PartialEq + fmt::Debug>(
        &mut self,
        object: &Object,
        entry: impl FnOnce() -> String,
        wanted: Option<&V>,
        found: Option<&V>,
    ) {
        self.compared += 1;
        let kind = match (wanted, found) {
            (Some(wanted), Some(found)) if wanted == found => return,
            (None, None) => return,
            (Some(_), Some(_)) => DifferenceKind::Changed,
            (Some(_), None) => DifferenceKind::Missing,
            (None, Some(_)) => DifferenceKind::Extra,
        };
        let shown = |value: Option<&V>| value.map(|value| format!("{value:?}"));
        *self.counts.entry(object.clone()).or_default() += 1;
        if self.differences.len() < MAX_LISTED {
            self.differences.push(Difference {
                object: object.clone(),
                kind,
                entry: entry(),
                wanted: shown(wanted),
                found: shown(found),
            });
        }
    }

    /// Compares what is told in words.
    pub(crate) fn words(&mut self, object: &Object, entry: &str, wanted: &str, found: &str) {
        self.one(object, || entry.to_owned(), Some(&Words(wanted)), Some(&Words(found)));
    }

    /// Counts an entry that is not there.
    pub(crate) fn missing(&mut self, object: &Object, entry: &str, wanted: &str) {
        self.one(object, || entry.to_owned(), Some(&Words(wanted)), None);
    }

    /// What names are there against those that should be.
    pub(crate) fn names<'a>(
        &mut self,
        object: &Object,
        wanted: impl IntoIterator<Item = &'a str>,
        found: impl IntoIterator<Item = &'a str>,
    ) {
        let (wanted, found): (BTreeSet<_>, BTreeSet<_>) = (wanted.into_iter().collect(), found.into_iter().collect());
        for name in wanted.union(&found) {
            let there = Words(name);
            self.one(
                object,
                || (*name).to_owned(),
                wanted.contains(name).then_some(&there),
                found.contains(name).then_some(&there),
            );
        }
    }

    /// Some object that differs; none where all that was compared is the same.
    pub(crate) fn first(self) -> Option<Object> {
        self.counts.into_keys().next()
    }

    /// The whole answer.
    #[must_use]
    pub(crate) fn finish(self, against: Against, backend: ActiveBackend, generation: u64) -> Verification {
        Verification {
            schema: Schema::Verify,
            identical: self.counts.is_empty(),
            against,
            backend,
            generation,
            compared: self.compared,
            counts: self.counts,
            differences: self.differences,
            expired_grants: Vec::new(),
        }
    }
}

/// Shown without quotes.
#[derive(PartialEq)]
struct Words<'a>(&'a str);

impl fmt::Debug for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Verification {
    /// As a person reads it.
    #[must_use]
    pub fn render(&self) -> String {
        let mut page = Page::default();
        let against = match self.against {
            Against::Daemon => "what the daemon desires now",
            Against::Configuration => "the configuration and the last known addresses; no daemon answers",
        };
        let total = self.total();
        if self.backend == ActiveBackend::None {
            let wanted = self.differences.first().and_then(|one| one.wanted.as_deref());
            page.line(format_args!(
                "nothing is active; desired: {}",
                wanted.unwrap_or_default()
            ));
            page.line(format_args!("do: {START}, or run enforcer apply"));
            return page.into_text();
        }
        if self.identical {
            page.line(format_args!(
                "identical: {} entries of {}, generation {}",
                self.compared, self.backend, self.generation
            ));
        } else {
            page.line(format_args!(
                "drifted: {total} of {} entries differ, generation {}",
                self.compared, self.generation
            ));
        }
        page.line(format_args!("compared with {against}"));
        for difference in &self.differences {
            let Difference {
                kind, object, entry, ..
            } = difference;
            if *object == Object::PinDirectory {
                page.line(format_args!("  {kind:<8}{entry}, in the pin directory"));
            } else {
                page.line(format_args!("  {kind:<8}{object}: {entry}"));
            }
            match (&difference.wanted, &difference.found) {
                (Some(wanted), Some(found)) => {
                    page.line(format_args!("          desired {wanted}"));
                    page.line(format_args!("          found   {found}"));
                }
                (Some(value), None) | (None, Some(value)) if *value != difference.entry => {
                    page.line(format_args!("          {value}"));
                }
                (Some(_) | None, None) | (None, Some(_)) => {}
            }
        }
        let listed = u64::try_from(self.differences.len()).unwrap_or(u64::MAX);
        if total > listed {
            page.line(format_args!("  … and {} more", total - listed));
        }
        for grant in &self.expired_grants {
            page.line(format_args!(
                "{grant} at {}, but is still active: no daemon was there to end it",
                grant.expires.as_deref().unwrap_or_default()
            ));
        }
        for remedy in self.remedies() {
            page.line(format_args!("do: {remedy}"));
        }
        page.into_text()
    }
}

impl Verification {
    /// How many differences there are.
    pub(crate) fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// What to do about what differs; nothing where it is identical.
    fn remedies(&self) -> BTreeSet<String> {
        let end = !self.expired_grants.is_empty();
        let remedy = |one: &Difference| match (&one.object, one.kind, self.against) {
            (Object::Pin, _, _) => "give pins their owner and mode again (chown root, chmod)".to_owned(),
            (Object::PinDirectory, DifferenceKind::Extra, _) => {
                "remove what is not enforcer's from the pin directory".to_owned()
            }
            (Object::PinnedMap, DifferenceKind::Changed, Against::Daemon) => {
                "restart the daemon, which leaves a pin alone that another process has put there".to_owned()
            }
            (_, _, Against::Daemon) => "the daemon restores what differs within seconds, or status says why not; find \
                                        out who changed it (nft monitor, bpftool, the audit log)"
                .to_owned(),
            (_, _, Against::Configuration) if end => {
                format!("{START}, or run enforcer apply, which ends them")
            }
            (_, _, Against::Configuration) => {
                format!("{START}, or run enforcer apply, to make the desired rules active; find out who changed it")
            }
        };
        self.differences.iter().map(remedy).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_is_counted_and_the_first_are_listed() {
        let mut comparison = Comparison::default();
        comparison.entries(
            &Object::PortsMap,
            [(1, 'a'), (2, 'b'), (3, 'c')],
            [(2, 'b'), (3, 'x'), (4, 'd')],
        );
        let found = comparison.clone().finish(Against::Daemon, ActiveBackend::Ebpf, 7);
        assert!(!found.identical);
        assert_eq!(found.compared, 4);
        let kinds: Vec<_> = found
            .differences
            .iter()
            .map(|one| (one.kind, one.entry.as_str()))
            .collect();
        assert_eq!(
            kinds,
            [
                (DifferenceKind::Missing, "1"),
                (DifferenceKind::Changed, "3"),
                (DifferenceKind::Extra, "4")
            ]
        );
        comparison.entries(&Object::Counters, (0..1000).map(|key| (key, ())), []);
        let found = comparison.finish(Against::Configuration, ActiveBackend::Ebpf, 7);
        assert_eq!(found.counts.get(&Object::Counters), Some(&1000));
        assert_eq!(found.differences.len(), MAX_LISTED);
        let text = found.render();
        assert!(text.contains("and 747 more") && text.contains("do: "), "{text}");

        let mut same = Comparison::default();
        same.entries(&Object::PortsMap, [(1, 'a')], [(1, 'a')]);
        same.words(&Object::Link, "connect4", "attached", "attached");
        same.names(&Object::PinDirectory, ["a"], ["a"]);
        let same = same.finish(Against::Daemon, ActiveBackend::Both, 3);
        assert!(same.identical && same.compared == 3, "{same:?}");
        assert!(same.render().starts_with("identical: 3 entries"));
    }
}
