//! The values of single keys: parsed by serde, by rules of our own. What refuses one never quotes it (B2).

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fmt,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use humantime::format_duration;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::{
    Allow, EndpointText, Located, MAX_REFRESH, MAX_RETAIN, MAX_SOCKET_PATH, MAX_TABLE_NAME, MAX_TARGET_NAME,
    MIN_DURATION, NameOrId, TargetSection,
    error::{PRINCIPALS, ValueFault},
    tree::{bare, is_bare},
};
use crate::policy::{Dns, Nat64, Text, Unresolved};

/// The section `[dns]`: durations as text.
#[derive(Serialize, Deserialize)]
#[serde(
    remote = "Dns",
    default = "Dns::default",
    deny_unknown_fields,
    expecting = "a section [dns]"
)]
pub(super) struct DnsSection {
    #[serde(deserialize_with = "refresh", serialize_with = "duration_text")]
    min_refresh: Duration,
    #[serde(deserialize_with = "refresh", serialize_with = "duration_text")]
    max_refresh: Duration,
    #[serde(deserialize_with = "retain", serialize_with = "duration_text")]
    retain: Duration,
    unresolved: Unresolved,
}

fn refresh<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    duration(from, MAX_REFRESH)
}

fn retain<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    duration(from, MAX_RETAIN)
}

fn duration<'de, D: Deserializer<'de>>(from: D, max: Duration) -> Result<Duration, D::Error> {
    from.deserialize_str(Text {
        expected: "a duration such as \"5s\", \"2m\" or \"1h\"",
        parse: &|text| {
            let found = humantime::parse_duration(text).map_err(|_| ValueFault::Duration)?;
            let fits = (MIN_DURATION..=max).contains(&found);
            fits.then_some(found).ok_or(ValueFault::DurationRange { found, max })
        },
    })
}

fn duration_text<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_duration(*duration))
}

pub(super) fn path<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    path_but(from, |_| None)
}

pub(super) fn perhaps_path<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Absolute(#[serde(deserialize_with = "path")] PathBuf);
    Ok(Option::<Absolute>::deserialize(from)?.map(|path| path.0))
}

/// bpffs refuses every name with a dot in it (`bpf_lookup` in kernel/bpf/inode.c).
pub(super) fn pin_dir<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    path_but(from, |path| {
        let name = path.file_name();
        let plain = name.is_some_and(|name| !name.as_encoded_bytes().contains(&b'.'));
        (!plain).then_some(ValueFault::PinDir)
    })
}

pub(super) fn socket<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    path_but(from, |path| {
        if path.as_os_str().len() > MAX_SOCKET_PATH {
            Some(ValueFault::SocketTooLong)
        } else {
            path.file_name().is_none().then_some(ValueFault::SocketRoot)
        }
    })
}

/// An absolute path, without doubled slashes and `.`, that `refuse` has nothing against.
fn path_but<'de, D: Deserializer<'de>>(from: D, refuse: fn(&Path) -> Option<ValueFault>) -> Result<PathBuf, D::Error> {
    from.deserialize_str(Text {
        expected: "an absolute path",
        parse: &|text| {
            let path: PathBuf = Path::new(text).components().collect();
            let refusal = if !path.is_absolute() {
                Some(ValueFault::RelativePath)
            } else if text.chars().any(char::is_control) || path.components().any(|part| part == Component::ParentDir) {
                Some(ValueFault::OddPath)
            } else {
                refuse(&path)
            };
            refusal.map_or(Ok(path), Err)
        },
    })
}

/// A name that `nft` can be given without quotes.
pub(super) fn table_name<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    from.deserialize_str(Text {
        expected: "the name of a table",
        parse: &|text| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
            let fits = text.len() <= MAX_TABLE_NAME
                && text.starts_with(|first: char| first.is_ascii_alphabetic())
                && text.bytes().all(plain);
            fits.then(|| text.to_owned()).ok_or(ValueFault::TableName)
        },
    })
}

/// Each once, without the well-known one.
pub(super) fn nat64<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Nat64>, D::Error> {
    let mut prefixes = Vec::new();
    for prefix in Vec::<Nat64>::deserialize(from)? {
        if prefix != Nat64::WELL_KNOWN && !prefixes.contains(&prefix) {
            prefixes.push(prefix);
        }
    }
    Ok(prefixes)
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct TargetName(String);

impl<'de> Deserialize<'de> for TargetName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_str(Text {
            expected: "the name of a target",
            parse: &|text| {
                let fits = text.len() <= MAX_TARGET_NAME && is_bare(text);
                let name = bare(text).to_owned();
                fits.then(|| Self(text.to_owned()))
                    .ok_or(ValueFault::TargetName { name })
            },
        })
    }
}

/// By name, each with the line of its name.
pub(super) fn targets<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, TargetSection>, D::Error> {
    let named = BTreeMap::<TargetName, Located<TargetSection>>::deserialize(from)?.into_iter();
    let lined = named.map(|(name, Located { value, line })| (name.0, TargetSection { line, ..value }));
    Ok(lined.collect())
}

impl<'de> Deserialize<'de> for EndpointText {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_str(Text {
            expected: "an endpoint such as \"tcp://10.0.0.5:4222\"",
            parse: &|text| Ok::<_, Infallible>(Self(text.to_owned())),
        })
    }
}

impl Serialize for EndpointText {
    /// Without credentials (B2).
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<T: Serialize> Serialize for Located<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.value.serialize(to)
    }
}

/// A principal as a table.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    user: Option<NameOrId>,
    group: Option<NameOrId>,
    cgroup: Option<String>,
    kernel: Option<bool>,
}

impl<'de> Deserialize<'de> for Allow {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct AllowVisitor;

        impl<'de> Visitor<'de> for AllowVisitor {
            type Value = Allow;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(PRINCIPALS)
            }

            fn visit_str<E>(self, name: &str) -> Result<Allow, E> {
                Ok(Allow::User(NameOrId::Name(name.to_owned())))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Allow, E> {
                Ok(Allow::User(NameOrId::Number(number)))
            }

            fn visit_map<A: MapAccess<'de>>(self, parts: A) -> Result<Allow, A::Error> {
                let parts = Parts::deserialize(MapAccessDeserializer::new(parts))?;
                match (parts.user, parts.group, parts.cgroup, parts.kernel) {
                    (Some(user), None, None, None) => Ok(Allow::User(user)),
                    (Some(user), None, Some(cgroup), None) => Ok(Allow::Within { user, cgroup }),
                    (None, Some(group), cgroup, None) => Ok(Allow::Group { group, cgroup }),
                    (None, None, None, Some(true)) => Ok(Allow::Kernel),
                    (None, None, Some(_), None) => Err(de::Error::custom(ValueFault::CgroupAlone)),
                    (Some(_) | None, Some(_) | None, Some(_) | None, Some(_) | None) => {
                        Err(de::Error::custom(ValueFault::Principal))
                    }
                }
            }
        }

        from.deserialize_any(AllowVisitor)
    }
}

/// `{ kernel = true }`.
pub(super) fn kernel<S: Serializer>(to: S) -> Result<S::Ok, S::Error> {
    BTreeMap::from([("kernel", true)]).serialize(to)
}
