//! Text → `Config`; and where something is wrong with it, everything that is.

use std::{collections::BTreeMap, path::Path};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Config, ConfigFault, Mistake, Mistakes, TargetSection,
    error::TOP_KEYS,
    tree::{Entry, Fault, KnownKeys, Lines, Step, bare, sorted},
};
use crate::policy::MAX_NAT64;

/// Keys of a section `[target.NAME]`, in the order in which a person writes them.
pub(super) const TARGET_KEYS: [&str; 4] = ["endpoints", "allow", "grants", "answers"];
/// Those that each target has.
const REQUIRED: [&str; 2] = ["endpoints", "allow"];
const TARGET: &str = "target";
/// How deep arrays may lie: `target`, its name, its key.
const DEPTH: usize = 3;

/// The configuration file.
pub(super) fn config(text: &str, path: &Path) -> Result<Config, Mistakes> {
    file(text, path, None)
}

/// A file that adds targets to those of the configuration file `main`.
pub(super) fn targets(text: &str, path: &Path, main: &Path) -> Result<BTreeMap<String, TargetSection>, Mistakes> {
    Ok(file(text, path, Some(main))?.targets)
}

/// B1: by the targets of all files.
pub(super) fn with_defaults(mut config: Config) -> Config {
    if config.targets.is_empty() {
        config.bosh.get_or_insert_default();
    }
    config
}

fn file(text: &str, path: &Path, main: Option<&Path>) -> Result<Config, Mistakes> {
    let lines = Lines::new(text);
    let root = match DeTable::parse(text) {
        Ok(root) => root,
        Err(error) => return Err(Mistakes::of(syntax(text, &lines, &earliest(text, error)).of(path))),
    };
    let file = File {
        root: root.get_ref(),
        lines,
        path,
    };
    let (way, mut between_keys) = match main {
        None => (Vec::new(), file.between_keys()),
        Some(main) => (vec![Step::Key(TARGET)], file.no_targets(main)),
    };
    between_keys.extend(file.missing());
    match file.part(&way) {
        Ok(config) if between_keys.is_empty() => Ok(config),
        Ok(_) | Err(_) => Err(Search::new(&file, way).all(between_keys)),
    }
}

impl Fault {
    fn of(self, path: &Path) -> Mistake {
        Mistake::Form {
            path: path.into(),
            line: self.line.unwrap_or(1),
            keys: self.path,
            fault: self.what,
        }
    }
}

/// A file that is TOML.
struct File<'a, 't> {
    root: &'a DeTable<'t>,
    lines: Lines,
    path: &'a Path,
}

impl File<'_, '_> {
    /// All of it, or what lies at the end of a way alone; the first fault of that ends it.
    fn part(&self, only: &[Step<'_>]) -> Result<Config, Fault> {
        let known = KnownKeys::default();
        let mut config: Config = known.take(self.root, &self.lines, only)?;
        config.path = self.path.into();
        config.settings = known.take(self.root, &self.lines, only)?;
        known.end(self.root, &self.lines, only)?;
        for target in config.targets.values_mut() {
            target.path = self.path.into();
        }
        Ok(config)
    }

    /// What is wrong with keys that are right by themselves.
    fn between_keys(&self) -> Vec<Fault> {
        self.refresh_order()
            .into_iter()
            .chain(self.too_many_prefixes())
            .collect()
    }

    /// What is no target, for a file that adds some.
    fn no_targets(&self, main: &Path) -> Vec<Fault> {
        let others = sorted(self.root).filter(|(key, _)| key.get_ref() != TARGET);
        let fault = |(key, _): Entry<'_, '_>| {
            let line = Some(self.lines.of(key.span().start));
            let key = bare(key.get_ref()).to_owned();
            let is_of_main = ["dns", "bosh"].iter().chain(&TOP_KEYS).any(|known| *known == key);
            let what = if is_of_main {
                ConfigFault::NoTarget { key, main: main.into() }
            } else {
                let known = vec![TARGET];
                ConfigFault::UnknownKey { key, known }
            };
            Fault { line, ..what.into() }
        };
        others.map(fault).collect()
    }

    /// Keys that a target must have.
    fn missing(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        let targets = self.root.get(TARGET).and_then(|targets| targets.get_ref().as_table());
        for (name, target) in targets.into_iter().flat_map(sorted) {
            let Some(target) = target.get_ref().as_table() else {
                continue;
            };
            // A key that is unknown may be the one that is missed.
            if target.keys().any(|key| !TARGET_KEYS.contains(&key.get_ref().as_ref())) {
                continue;
            }
            let missing = REQUIRED.into_iter().filter(|key| !target.contains_key(*key));
            faults.extend(missing.map(|key| Fault {
                line: Some(self.lines.of(name.span().start)),
                path: vec![TARGET.to_owned(), bare(name.get_ref()).to_owned()],
                what: ConfigFault::MissingKey { key },
            }));
        }
        faults
    }

    fn refresh_order(&self) -> Option<Fault> {
        let read = |key| self.part(&[Step::Key("dns"), Step::Key(key)]).ok();
        let (min, max) = (
            read("min_refresh")?.dns.min_refresh,
            read("max_refresh")?.dns.max_refresh,
        );
        (min > max).then(|| {
            let dns = self.root.get("dns").and_then(|dns| dns.get_ref().as_table());
            let key = dns.and_then(|dns| dns.get("min_refresh").or_else(|| dns.get("max_refresh")));
            self.at(key, ConfigFault::RefreshOrder { min, max })
        })
    }

    fn too_many_prefixes(&self) -> Option<Fault> {
        let found = self.part(&[Step::Key("nat64")]).ok()?.nat64.len();
        (found > MAX_NAT64).then(|| self.at(self.root.get("nat64"), ConfigFault::Nat64Prefixes { found }))
    }

    fn at(&self, value: Option<&Spanned<DeValue<'_>>>, what: ConfigFault) -> Fault {
        let line = value.map(|value| self.lines.of(value.span().start));
        Fault { line, ..what.into() }
    }
}

/// The search for everything that is wrong with a file of which something is: each part is read without its
/// neighbours, as far down as one is refused.
struct Search<'a, 't> {
    file: &'a File<'a, 't>,
    /// The way to the part that is looked at.
    way: Vec<Step<'a>>,
    /// Parts of a part that is refused as a whole are refused alike.
    last: Option<Fault>,
    mistakes: Mistakes,
}

impl<'a, 't> Search<'a, 't> {
    fn new(file: &'a File<'a, 't>, way: Vec<Step<'a>>) -> Self {
        Self {
            file,
            way,
            last: None,
            mistakes: Mistakes::default(),
        }
    }

    fn all(mut self, between_keys: Vec<Fault>) -> Mistakes {
        let start = self.way.last().and_then(|_| self.file.root.get(TARGET));
        self.part(start.map(Spanned::get_ref));
        for fault in between_keys {
            self.add(fault);
        }
        self.mistakes
    }

    /// Adds what is wrong with the value that the way leads to, none for the file itself. True if its form is.
    fn part(&mut self, value: Option<&'a DeValue<'t>>) -> bool {
        let fault = match self.file.part(&self.way) {
            Ok(config) => {
                self.mistakes.append(config.mistakes());
                return false;
            }
            Err(fault) => fault,
        };
        let mut is_below = false;
        for (step, value) in self.parts(value) {
            self.way.push(step);
            is_below |= self.part(Some(value));
            self.way.pop();
        }
        if !is_below {
            self.add(fault);
        }
        true
    }

    /// What can be read by itself: keys of sections and elements of arrays. An element is one thing: a principal's keys
    /// mean something together.
    fn parts(&self, value: Option<&'a DeValue<'t>>) -> Vec<(Step<'a>, &'a DeValue<'t>)> {
        if self.way.len() > DEPTH || matches!(self.way.last(), Some(Step::Element(_))) {
            return Vec::new();
        }
        let section = |table: &'a DeTable<'t>| -> Vec<_> {
            let entries = sorted(table).map(|(key, value)| (Step::Key(key.get_ref()), value.get_ref()));
            entries.collect()
        };
        match value {
            None => section(self.file.root),
            Some(DeValue::Table(table)) => section(table),
            Some(DeValue::Array(elements)) => {
                let elements = elements.iter().enumerate();
                let elements = elements.map(|(index, element)| (Step::Element(index), element.get_ref()));
                elements.collect()
            }
            Some(
                DeValue::String(_)
                | DeValue::Integer(_)
                | DeValue::Float(_)
                | DeValue::Boolean(_)
                | DeValue::Datetime(_),
            ) => Vec::new(),
        }
    }

    fn add(&mut self, fault: Fault) {
        if self.last.as_ref() != Some(&fault) {
            self.last = Some(fault.clone());
            self.mistakes.add(fault.of(self.file.path));
        }
    }
}

/// A string without its end is noticed after the lines that it swallows, and then explains them.
fn earliest(text: &str, first: toml::de::Error) -> toml::de::Error {
    /// Each error takes memory, and what is no TOML at all has one for each byte.
    const MOST: usize = 1 << 20;
    if text.len() > MOST {
        return first;
    }
    let (_, all) = DeTable::parse_recoverable(text);
    let start = |error: &toml::de::Error| error.span().map_or(usize::MAX, |span| span.start);
    all.into_iter().min_by_key(start).unwrap_or(first)
}

fn syntax(text: &str, lines: &Lines, error: &toml::de::Error) -> Fault {
    let span = error.span().unwrap_or(text.len()..text.len());
    // At the end of the text there is nothing left to correct: the line before is meant.
    let line = Some(lines.of(span.start.min(text.trim_end().len())));
    let (path, what) = if error.message() == "duplicate key" {
        let key = text.get(span).unwrap_or_default();
        (vec![bare(key).to_owned()], ConfigFault::Twice)
    } else {
        let message = error.message().replace('\n', ", ");
        (Vec::new(), ConfigFault::Syntax { message })
    };
    Fault { line, path, what }
}
