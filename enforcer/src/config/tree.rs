//! TOML's tree as serde takes it. Not by TOML's own deserializer: its messages quote the value that they refuse, and
//! `endpoints = "nats://user:password@…"`, a forgotten bracket, would print a password (B2). A [`Fault`] has no place
//! for a value; it has the line and the key.

use std::{cell::RefCell, fmt};

use serde::{
    Deserialize,
    de::{
        self, Deserializer, Expected, IntoDeserializer, Unexpected, Visitor,
        value::{MapDeserializer, SeqDeserializer, StrDeserializer},
    },
    forward_to_deserialize_any,
};
use thiserror::Error;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::error::ConfigFault;

/// What is wrong and where.
#[derive(Clone, Debug, PartialEq, Error)]
#[error("{what}")]
pub(super) struct Fault {
    /// The line; none until the value at fault is known.
    pub(super) line: Option<usize>,
    /// The keys that lead there, empty for an element of an array.
    pub(super) path: Vec<String>,
    /// What is wrong.
    pub(super) what: ConfigFault,
}

impl From<ConfigFault> for Fault {
    fn from(what: ConfigFault) -> Self {
        Self {
            line: None,
            path: Vec::new(),
            what,
        }
    }
}

/// Every way in which serde would quote a value leaves it out here.
impl de::Error for Fault {
    /// The words of our own parsers, which quote nothing.
    fn custom<T: fmt::Display>(message: T) -> Self {
        let message = message.to_string();
        ConfigFault::Value { message }.into()
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let expected = expected.to_string();
        ConfigFault::Kind { found: "", expected }.into()
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn unknown_variant(_: &str, words: &'static [&'static str]) -> Self {
        ConfigFault::Word {
            choices: choices(words),
        }
        .into()
    }

    fn unknown_field(key: &str, known: &'static [&'static str]) -> Self {
        let (key, known) = (bare(key).to_owned(), known.to_vec());
        ConfigFault::UnknownKey { key, known }.into()
    }
}

/// `"a", "b" or "c"`.
fn choices(words: &[&str]) -> String {
    let quoted: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
    match quoted.split_last() {
        Some((last, before @ [_, ..])) => format!("{} or {last}", before.join(", ")),
        Some(_) | None => quoted.concat(),
    }
}

/// Where lines begin: 100,000 endpoints ask for theirs.
pub(super) struct Lines(Vec<usize>);

impl Lines {
    pub(super) fn new(text: &str) -> Self {
        let newlines = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        Self(newlines.map(|(offset, _)| offset).collect())
    }

    pub(super) fn of(&self, offset: usize) -> usize {
        1 + self.0.partition_point(|newline| *newline < offset)
    }
}

/// The keys of a table that structs have taken.
#[derive(Default)]
pub(super) struct KnownKeys(RefCell<Vec<&'static str>>);

impl KnownKeys {
    /// What a struct has of a table that others share: its own keys, or the one part of them at the end of `only`.
    pub(super) fn take<'de, T: Deserialize<'de>>(
        &self,
        table: &DeTable<'_>,
        lines: &Lines,
        only: &[Step<'_>],
    ) -> Result<T, Fault> {
        T::deserialize(Node {
            lines,
            offset: 0,
            key: None,
            shape: Shape::Shared(table, self),
            only,
        })
    }

    /// Refuses a key that nobody has taken.
    pub(super) fn end(self, table: &DeTable<'_>, lines: &Lines, only: &[Step<'_>]) -> Result<(), Fault> {
        let known = self.0.into_inner();
        let mut entries = entries(table, only);
        let unknown = entries.find(|(key, _)| !known.contains(&key.get_ref().as_ref()));
        unknown.map_or(Ok(()), |(key, _)| {
            let line = Some(lines.of(key.span().start));
            let key = bare(key.get_ref()).to_owned();
            let fault = Fault::from(ConfigFault::UnknownKey { key, known });
            Err(Fault { line, ..fault })
        })
    }
}

pub(super) type Entry<'a, 't> = (&'a Spanned<toml::de::DeString<'t>>, &'a Spanned<DeValue<'t>>);

/// A step into the tree.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step<'a> {
    /// To the value of a key.
    Key(&'a str),
    /// To an element of an array.
    Element(usize),
}

/// In the order of the file, so that the first fault is the one told.
pub(super) fn sorted<'a, 't>(table: &'a DeTable<'t>) -> impl Iterator<Item = Entry<'a, 't>> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries.into_iter()
}

/// As [`sorted()`], or what the first step leads to.
fn entries<'a, 't>(table: &'a DeTable<'t>, only: &[Step<'_>]) -> impl Iterator<Item = Entry<'a, 't>> {
    let (one, all) = match only.first() {
        Some(Step::Key(key)) => (table.get_key_value(*key), None),
        Some(Step::Element(_)) | None => (None, Some(sorted(table))),
    };
    one.into_iter().chain(all.into_iter().flatten())
}

/// A part of the tree.
#[derive(Clone, Copy)]
struct Node<'a, 't> {
    lines: &'a Lines,
    /// Where it begins, or the key before it.
    offset: usize,
    /// The key before it, empty for an element of an array.
    key: Option<&'a str>,
    shape: Shape<'a, 't>,
    /// The way to what is read of it alone; all of it where there is none.
    only: &'a [Step<'a>],
}

#[derive(Clone, Copy)]
enum Shape<'a, 't> {
    Shared(&'a DeTable<'t>, &'a KnownKeys),
    Key(&'a str),
    Value(&'a DeValue<'t>),
    /// The line that the part begins in.
    Line,
}

impl<'a, 't> Node<'a, 't> {
    /// A key and its value.
    fn entry(self, (key, value): Entry<'a, 't>) -> (Self, Self) {
        let offset = key.span().start;
        let only = self.only.get(1..).unwrap_or_default();
        let part = |key, shape| Self {
            offset,
            key,
            shape,
            only,
            ..self
        };
        let name = key.get_ref().as_ref();
        (
            part(None, Shape::Key(name)),
            part(Some(name), Shape::Value(value.get_ref())),
        )
    }

    fn element(self, element: &'a Spanned<DeValue<'t>>) -> Self {
        Self {
            offset: element.span().start,
            key: Some(""),
            shape: Shape::Value(element.get_ref()),
            only: self.only.get(1..).unwrap_or_default(),
            ..self
        }
    }

    /// `expected` where serde has other words for it than TOML.
    fn read<'de, V: Visitor<'de>>(self, visitor: V, expected: Option<&str>) -> Result<V::Value, Fault> {
        let read = match self.shape {
            Shape::Key(text) => visitor.visit_str(text),
            Shape::Line => visitor.visit_u64(self.lines.of(self.offset) as u64),
            Shape::Value(DeValue::String(text)) => visitor.visit_str(text),
            Shape::Value(DeValue::Boolean(is)) => visitor.visit_bool(*is),
            Shape::Value(DeValue::Integer(number)) => match i64::from_str_radix(number.as_str(), number.radix()) {
                Ok(number) => visitor.visit_i64(number),
                Err(_) => Err(ConfigFault::Number.into()),
            },
            // No key takes one.
            Shape::Value(DeValue::Float(_) | DeValue::Datetime(_)) => visitor.visit_unit(),
            Shape::Value(DeValue::Array(elements)) => {
                let (first, most) = match self.only.first() {
                    Some(Step::Element(index)) => (*index, 1),
                    Some(Step::Key(_)) | None => (0, usize::MAX),
                };
                let elements = elements.iter().skip(first).take(most);
                visitor.visit_seq(SeqDeserializer::new(elements.map(|element| self.element(element))))
            }
            Shape::Value(DeValue::Table(table)) | Shape::Shared(table, _) => {
                let entries = entries(table, self.only);
                visitor.visit_map(MapDeserializer::new(entries.map(|entry| self.entry(entry))))
            }
        };
        read.map_err(|fault| self.blame(fault, expected))
    }

    /// Adds to a fault where it is: the innermost part its line, each the key before it.
    fn blame(self, mut fault: Fault, wanted: Option<&str>) -> Fault {
        if fault.line.is_none() {
            fault.line = Some(self.lines.of(self.offset));
            if let (ConfigFault::Kind { found, expected }, Shape::Value(value)) = (&mut fault.what, self.shape) {
                *found = value.type_str();
                if let Some(wanted) = wanted {
                    wanted.clone_into(expected);
                }
            }
        }
        if let Some(key) = self.key {
            let shown = if key.is_empty() { key } else { bare(key) };
            fault.path.insert(0, shown.to_owned());
        }
        fault
    }
}

impl<'de> Deserializer<'de> for Node<'_, '_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.read(visitor, None)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.read(visitor, Some("true or false"))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.read(visitor, Some("an array: [ … ]"))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.read(visitor, Some("sections [target.NAME]"))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        words: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let read = if let Shape::Value(DeValue::String(word)) = self.shape {
            visitor.visit_enum(StrDeserializer::new(word))
        } else {
            Err(de::Error::invalid_type(Unexpected::Unit, &choices(words).as_str()))
        };
        read.map_err(|fault: Fault| self.blame(fault, None))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        keys: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        // The name of the type `config::Located`: serde has no other way to ask for a line.
        if name == crate::config::LOCATED {
            let shape = Shape::Line;
            let parts = [("value", self), ("line", Self { shape, ..self })];
            return visitor.visit_map(MapDeserializer::new(parts.into_iter()));
        }
        match self.shape {
            Shape::Shared(table, known) => {
                known.0.borrow_mut().extend(keys);
                let ours = entries(table, self.only).filter(|(key, _)| keys.contains(&key.get_ref().as_ref()));
                visitor.visit_map(MapDeserializer::new(ours.map(|entry| self.entry(entry))))
            }
            Shape::Value(DeValue::Table(_)) => self.read(visitor, None),
            // Serde would take an array for the values of the keys.
            Shape::Key(_) | Shape::Line | Shape::Value(_) => {
                let refused: Fault = de::Error::invalid_type(Unexpected::Unit, &visitor);
                Err(self.blame(refused, None))
            }
        }
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct
        tuple tuple_struct identifier ignored_any
    }
}

impl IntoDeserializer<'_, Fault> for Node<'_, '_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// The text if it looks like a key or a name; anything else might be an endpoint with its credentials (B2).
pub(super) fn bare(text: &str) -> &str {
    if text.len() <= 64 && is_bare(text) { text } else { "…" }
}

pub(super) fn is_bare(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    !text.is_empty() && text.bytes().all(plain)
}
