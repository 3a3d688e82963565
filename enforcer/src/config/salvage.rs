//! Where the instance of a file is to be found, whatever is wrong with the rest of the file (F4): by single lines of
//! it.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};
use toml::de::DeTable;

use super::{
    DEFAULT_PATH, MAX_BYTES, Settings,
    files::open,
    tree::{KnownKeys, Lines},
    value,
};

/// The `state_dir` of the file at `path`, taken from its line alone: what the last known good rule set is to be found
/// by, whatever is wrong with the rest of the file (F4). The default where there is no such line; none where that line
/// itself is wrong in a file that is not the default one: what lies at the default place is another instance's.
#[must_use]
pub fn state_dir(path: &Path) -> Option<PathBuf> {
    match top_lines(path).map_or(Ok(None), |text| state_dir_of(&text)) {
        Ok(Some(dir)) => Some(dir),
        Err(Unread) if path != Path::new(DEFAULT_PATH) => None,
        Ok(None) | Err(Unread) => Some(Settings::default().state_dir),
    }
}

/// Where the instance of the file at `path` is to be found, each key taken from its line alone, whatever is wrong with
/// the rest of the file (F4): a mistake in it must not keep anybody from asking the daemon. Defaults where there is no
/// such line.
///
/// `None` where the file cannot be read; and where such a line itself is wrong, unless `lenient`: it named another
/// place than the default, and what is done there would be done to another instance.
#[must_use]
pub fn place(path: &Path, lenient: bool) -> Option<Settings> {
    let text = top_lines(path)?;
    let default = Settings::default();
    let line = |key| match line_of::<Settings>(&text, key) {
        Ok(found) => Some(found.unwrap_or_else(|| default.clone())),
        Err(Unread) => lenient.then(|| default.clone()),
    };
    Some(Settings {
        socket: line("socket")?.socket,
        pin_dir: line("pin_dir")?.pin_dir,
        state_dir: line("state_dir")?.state_dir,
        cgroup: line("cgroup")?.cgroup,
        nft_table: line("nft_table")?.nft_table,
        ..default.clone()
    })
}

/// The line of a key at the top of the file, from 1; none where it is not there.
pub(crate) fn key_line(path: &Path, key: &str) -> Option<usize> {
    let text = top_lines(path)?;
    let root = DeTable::parse(&text).ok()?;
    let (key, _) = root.get_ref().get_key_value(key)?;
    Some(Lines::new(&text).of(key.span().start))
}

/// The lines before the first section.
fn top_lines(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    let file = open(path).ok()?;
    file.take(MAX_BYTES as u64).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let top = text.lines().take_while(|line| !line.trim_start().starts_with('['));
    Some(top.fold(String::new(), |all, line| all + line + "\n"))
}

/// A line that is there and says nothing.
#[derive(Clone, Copy, Debug)]
struct Unread;

/// The path that the lines before the first section give as `state_dir`: as TOML has them, and where something is wrong
/// there the line of its own. An error where it is named and cannot be read.
fn state_dir_of(text: &str) -> Result<Option<PathBuf>, Unread> {
    #[derive(Deserialize)]
    struct StateDir {
        #[serde(deserialize_with = "value::path")]
        state_dir: PathBuf,
    }
    let found: Option<StateDir> = match DeTable::parse(text) {
        Ok(root) => with_key(root.get_ref(), "state_dir")?,
        Err(_) => line_of(text, "state_dir")?,
    };
    Ok(found.map(|found| found.state_dir))
}

/// What the lines of `text` that begin with `key`, in quotes or not, say, each read by itself; the last that can be
/// read counts. An error where there are such lines and none can be read.
fn line_of<T: DeserializeOwned>(text: &str, key: &str) -> Result<Option<T>, Unread> {
    let lines = text.lines().map(str::trim_start);
    let ours = lines.filter(|line| {
        // TOML lets a key stand in quotes.
        line.trim_start_matches(['"', '\''])
            .strip_prefix(key)
            .is_some_and(|rest| {
                !rest.starts_with(|next: char| next.is_ascii_alphanumeric() || matches!(next, '_' | '-'))
            })
    });
    let mut found = Ok(None);
    for line in ours {
        let root = DeTable::parse(line).ok();
        let read = root.and_then(|root| with_key(root.get_ref(), key).ok().flatten());
        match (read, &found) {
            (Some(value), _) => found = Ok(Some(value)),
            (None, Ok(None)) => found = Err(Unread),
            (None, _) => {}
        }
    }
    found
}

/// What the table says, if it has the key.
fn with_key<T: DeserializeOwned>(table: &DeTable<'_>, key: &str) -> Result<Option<T>, Unread> {
    let read = || {
        KnownKeys::default()
            .take(table, &Lines::new(""), &[])
            .map_err(|_| Unread)
    };
    table.contains_key(key).then(read).transpose()
}
