//! What files hold as text: read by a parser of its own, written as it is shown.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, Visitor},
};

use super::{CgroupPath, Endpoint, Name, Nat64};

/// Takes a text that is to be parsed.
pub(crate) struct Text<'p, T, E> {
    /// What it should be, for messages.
    pub(crate) expected: &'static str,
    /// Its error quotes no credentials (B2).
    pub(crate) parse: &'p dyn Fn(&str) -> Result<T, E>,
}

impl<T, E: fmt::Display> Visitor<'_> for Text<'_, T, E> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<F: Error>(self, text: &str) -> Result<T, F> {
        (self.parse)(text).map_err(F::custom)
    }
}

macro_rules! written_as_shown {
    ($($type:ty, $expected:literal, $parse:expr;)+) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let expected = $expected;
                from.deserialize_str(Text { expected, parse: &$parse })
            }
        }
    )+};
}

written_as_shown! {
    CgroupPath, "the path of a cgroup", CgroupPath::parse;
    Endpoint, "an endpoint", Endpoint::parse;
    Name, "a DNS name", Name::parse;
    Nat64, "a NAT64 prefix such as \"2001:db8:64::/96\"", str::parse;
}
