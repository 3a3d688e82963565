//! Text → `Config`.

use std::path::Path;

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Config, ConfigError, ConfigFault,
    tree::{Fault, KnownKeys, Lines, bare},
};
use crate::policy::MAX_NAT64;

pub(super) fn config(text: &str, path: &Path) -> Result<Config, ConfigError> {
    read(text, path).map_err(|fault| ConfigError::At {
        path: path.into(),
        line: fault.line.unwrap_or(1),
        thing: fault.thing(),
        fault: fault.what,
    })
}

fn read(text: &str, path: &Path) -> Result<Config, Fault> {
    let lines = Lines::new(text);
    let root = DeTable::parse(text).map_err(|error| syntax(text, &lines, &error))?;
    let (root, known) = (root.get_ref(), KnownKeys::default());
    let mut config: Config = known.take(root, &lines)?;
    config.path = path.into();
    config.settings = known.take(root, &lines)?;
    known.end(root, &lines)?;
    let (min, max) = (config.dns.min_refresh, config.dns.max_refresh);
    let found = config.nat64.len();
    let (key, fault) = if min > max {
        (refresh(root), ConfigFault::RefreshOrder { min, max })
    } else if found > MAX_NAT64 {
        (root.get("nat64"), ConfigFault::Nat64Prefixes { found })
    } else {
        if config.targets.is_empty() {
            config.bosh.get_or_insert_default(); // B1
        }
        return Ok(config);
    };
    let line = key.map(|value| lines.of(value.span().start));
    Err(Fault { line, ..fault.into() })
}

/// The first of the two that are the wrong way round.
fn refresh<'a, 't>(root: &'a DeTable<'t>) -> Option<&'a Spanned<DeValue<'t>>> {
    let dns = root.get("dns")?.get_ref().as_table()?;
    dns.get("min_refresh").or_else(|| dns.get("max_refresh"))
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
