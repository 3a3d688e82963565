//! What leaves the process as text or JSON: nothing that others chose (task names, paths, device names, DNS, URLs) can
//! steer a terminal, hide what follows it or begin a line (F6).
//!
//! Two barriers. A [`Page`] is made line by line, so that a line feed within a value is seen for what it is; and every
//! writer to stdout and stderr (`cli::print`, [`Log`]) lets through printable characters alone, whoever made the text.

mod journal;

use std::{
    borrow::Cow,
    fmt::{Display, Write as _},
    io::{self, Write},
};

use comfy_table::{Table, presets};
use serde::Serialize;
use tracing_subscriber::fmt::MakeWriter;

pub(crate) use self::journal::Journal;

/// In one line: control and format characters, separators other than the blank, combining and unassigned characters as
/// Rust writes them (`\u{1b}`, `\n`).
#[must_use]
pub(crate) fn line(text: &str) -> Cow<'_, str> {
    replace(text, |c, out| {
        let _ = write!(out, "{}", c.escape_debug());
    })
}

/// As [`line()`], but that lines end.
pub(crate) fn lines(text: &str) -> Cow<'_, str> {
    replace(text, |c, out| match c {
        '\n' => out.push(c),
        c => {
            let _ = write!(out, "{}", c.escape_debug());
        }
    })
}

/// A number of things of a kind, in words: `1 endpoint`, `2 endpoints`.
pub(crate) fn counted(number: impl TryInto<u64>, kind: &str) -> String {
    let number = number.try_into().unwrap_or(u64::MAX);
    let s = if number == 1 { "" } else { "s" };
    format!("{number} {kind}{s}")
}

/// JSON, in which such characters stand within strings alone, and as `\u001b`.
pub(crate) fn json_text(json: &str) -> Cow<'_, str> {
    replace(json, |c, out| {
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(out, "\\u{unit:04x}");
        }
    })
}

/// TOML, likewise; lines end.
pub(crate) fn toml_text(toml: &str) -> Cow<'_, str> {
    replace(toml, |c, out| match u32::from(c) {
        0x0a => out.push(c),
        code @ ..=0xffff => out.push_str(&format!("\\u{code:04x}")),
        code => out.push_str(&format!("\\U{code:08x}")),
    })
}

/// A value in one line of JSON.
pub(crate) fn json(value: &impl Serialize) -> serde_json::Result<String> {
    Ok(json_text(&serde_json::to_string(value)?).into_owned())
}

/// A name that a task chose for itself, in quotes unless it is a plain word: it can close no bracket and begin no
/// clause of ours.
#[must_use]
pub(crate) fn name(name: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:/+@#".contains(c);
    if !name.is_empty() && name.chars().all(is_plain) {
        Cow::Borrowed(name)
    } else {
        Cow::Owned(format!("{name:?}"))
    }
}

/// A user, with the name if there is one: `uid 1000 (vcap)`.
#[must_use]
pub(crate) fn user(uid: u32, name: Option<&str>) -> String {
    format!("uid {}", with_name(uid, name))
}

/// `1000 (vcap)`.
#[must_use]
pub(crate) fn with_name(uid: u32, user: Option<&str>) -> String {
    let named = user.map(|user| format!(" ({})", name(user)));
    format!("{uid}{}", named.unwrap_or_default())
}

fn replace(text: &str, with: impl Fn(char, &mut String)) -> Cow<'_, str> {
    if text.chars().all(is_printable) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_printable(c) {
            out.push(c);
        } else {
            with(c, &mut out);
        }
    }
    Cow::Owned(out)
}

/// Of ASCII what has a glyph, and the blank; of the rest what the standard library takes for printable.
fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return c == ' ' || c.is_ascii_graphic();
    }
    c.escape_debug().len() == 1
}

/// A text for people, made line by line.
#[derive(Debug, Default)]
pub(crate) struct Page(String);

impl Page {
    /// Adds a line, whatever is in it.
    pub(crate) fn line(&mut self, text: impl Display) {
        self.0.push_str(&line(&text.to_string()));
        self.0.push('\n');
    }

    /// Adds a table without borders, each row a line.
    pub(crate) fn table<const N: usize>(&mut self, header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header(header);
        for row in rows {
            table.add_row(row.map(|cell| line(&cell).into_owned()));
        }
        for row in table.lines() {
            self.line(row.trim_end());
        }
    }

    pub(crate) fn into_text(self) -> String {
        self.0
    }
}

/// Writes the log to stderr: each event, however many lines it would be, as one.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Log {
    Text,
    Json,
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }
}

impl Write for Log {
    /// One event: what formats it hands it over whole.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let text = match self {
            Self::Text => line(text),
            Self::Json => json_text(text),
        };
        io::stderr().lock().write_all(format!("{text}\n").as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests;
