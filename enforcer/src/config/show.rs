//! `Config` → TOML, with a comment for each key, and → a tree for JSON. Both without credentials (B2).

use toml::{Table, Value};

use super::{Config, read::TARGET_KEYS, tree::is_bare};

/// The default configuration, each key with its meaning: what is shown is this with other values.
pub(super) const DEFAULT: &str = include_str!("default.toml");

impl Config {
    /// The effective configuration as TOML, each key with a comment and its default. Reads back as an equal `Config`.
    #[must_use]
    pub fn show(&self) -> String {
        let tree = self.tree();
        let mut section = "";
        let mut out = String::new();
        for line in DEFAULT.lines() {
            let text = line.trim_start_matches("# ");
            let header = text.strip_prefix('[').and_then(|header| header.strip_suffix(']'));
            let key = text.split_once(" = ").map(|(key, _)| key).filter(|key| is_bare(key));
            let shown = match (header, key) {
                (Some(header), _) => {
                    section = header;
                    tree.contains_key(header).then(|| text.to_owned())
                }
                (None, Some(key)) => lookup(&tree, section, key).map(|value| format!("{key} = {value}")),
                (None, None) => Some(line.to_owned()),
            };
            out.push_str(&shown.unwrap_or_else(|| format!("# {text}")));
            out.push('\n');
        }
        let targets = tree.get("target").and_then(Value::as_table).into_iter().flatten();
        let targets: Vec<_> = targets.map(|(name, target)| section_of(name, target)).collect();
        out + &targets.join("\n")
    }

    /// The shape of the file; an absent `cgroup` is the default.
    #[must_use]
    pub fn tree(&self) -> Table {
        // It has neither a path that is no text nor a number beyond 64 bits: all came from such a tree.
        Table::try_from(self).unwrap_or_default()
    }
}

fn lookup<'a>(tree: &'a Table, section: &str, key: &str) -> Option<&'a Value> {
    match section {
        "" => tree.get(key),
        section => tree.get(section)?.get(key),
    }
}

fn section_of(name: &str, target: &Value) -> String {
    let lines = TARGET_KEYS.iter().filter_map(|key| Some(list(key, target.get(key)?)));
    format!("[target.{name}]\n{}", lines.collect::<String>())
}

/// `key = [ … ]`, one element a line where there is more than one.
fn list(key: &str, value: &Value) -> String {
    match value.as_array().map(Vec::as_slice) {
        Some(elements @ [_, _, ..]) => {
            let lines = elements.iter().map(|element| format!("    {element},\n"));
            format!("{key} = [\n{}]\n", lines.collect::<String>())
        }
        Some([] | [_]) | None => format!("{key} = {value}\n"),
    }
}
