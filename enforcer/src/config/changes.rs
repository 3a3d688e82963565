//! What differs between two configurations, key by key. Pure.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};

use super::{Config, TargetSection};
use crate::wire::SettingChange;

/// Section and key.
type Place = (String, String);

impl Config {
    /// What is another value in `new`, with defaults filled in. A target that is new or has gone is shown by what its
    /// section says beyond defaults.
    #[must_use]
    pub(crate) fn changes(&self, new: &Self) -> Vec<SettingChange> {
        let (old, new) = (self.values(), new.values());
        let places: BTreeSet<&Place> = old.keys().chain(new.keys()).collect();
        let change = |place: &Place| {
            let values = |of: &BTreeMap<Place, Vec<String>>| of.get(place).cloned().unwrap_or_default();
            let (old, new) = (values(&old), values(&new));
            let without = |these: &[String], those: &[String]| {
                let those: BTreeSet<&String> = those.iter().collect();
                these.iter().filter(|value| !those.contains(value)).cloned().collect()
            };
            SettingChange {
                section: place.0.clone(),
                key: place.1.clone(),
                removed: without(&old, &new),
                added: without(&new, &old),
            }
        };
        let changes = places.into_iter().map(change);
        changes
            .filter(|change| !change.removed.is_empty() || !change.added.is_empty())
            .collect()
    }

    /// Each key's value, or the elements of its list.
    fn values(&self) -> BTreeMap<Place, Vec<String>> {
        let mut values = BTreeMap::new();
        for (name, value) in self.tree() {
            let Value::Table(section) = value else {
                take(&mut values, "", Table::from_iter([(name, value)]));
                continue;
            };
            if name != "target" {
                take(&mut values, &name, section);
                continue;
            }
            for (target, section) in section {
                let said = section.as_table().cloned().unwrap_or_default();
                take(&mut values, &format!("target.{target}"), without_defaults(said));
            }
        }
        values
    }
}

fn take(values: &mut BTreeMap<Place, Vec<String>>, section: &str, keys: Table) {
    for (key, value) in keys {
        let elements = match value.as_array() {
            Some(elements) => elements.iter().map(ToString::to_string).collect(),
            None => vec![value.to_string()],
        };
        values.insert((section.to_owned(), key), elements);
    }
}

fn without_defaults(section: Table) -> Table {
    let defaults = Table::try_from(TargetSection::default()).unwrap_or_default();
    let said = section.into_iter();
    said.filter(|(key, value)| defaults.get(key) != Some(value)).collect()
}
