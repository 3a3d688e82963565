//! Text → `Config`. TOML's own parser gives a tree with positions; here each key is taken from it by name.
//!
//! Not derived: serde's messages quote the value they refuse, and `endpoints = "nats://user:password@…"`, a forgotten
//! bracket, would print a password (B2).

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue},
};

use super::{
    Allow, Backend, Bosh, Config, ConfigError, ConfigFault, EndpointText, Existing, Forward, Line, MAX_REFRESH,
    MAX_RETAIN, MAX_SOCKET_PATH, MAX_TABLE_NAME, MAX_TARGET_NAME, MIN_DURATION, Settings, Target, User,
};
use crate::policy::{Answers, Dns, MAX_NAT64, Mode, Nat64, Unresolved};

/// The keys of a section.
struct Keys {
    known: &'static [&'static str],
}

const TOP: Keys = Keys {
    known: &[
        "mode",
        "backend",
        "existing",
        "cgroup",
        "pin_dir",
        "state_dir",
        "socket",
        "forward",
        "nft_table",
        "nat64",
        "dns",
        "bosh",
        "target",
    ],
};
const BOSH: Keys = Keys { known: &["dir"] };
const DNS: Keys = Keys {
    known: &["min_refresh", "max_refresh", "retain", "unresolved"],
};
const TARGET: Keys = Keys {
    known: &["endpoints", "allow", "grants", "answers"],
};
const PRINCIPAL: Keys = Keys {
    known: &["user", "group", "cgroup", "kernel"],
};

const AN_ENDPOINT: &str = "an endpoint such as \"tcp://10.0.0.5:4222\"";
const A_PRINCIPAL: &str =
    "\"NAME\", UID, { user = …, cgroup = \"/path\" }, { group = …, cgroup = \"/path\" } or { kernel = true }";

type Value<'t> = Spanned<DeValue<'t>>;

pub(super) fn config(text: &str, path: &Path) -> Result<Config, ConfigError> {
    let lines = Lines::new(text);
    let at = |fault: Fault| ConfigError::At {
        path: path.into(),
        line: lines.of(fault.offset),
        fault: fault.fault,
    };
    let root = DeTable::parse(text).map_err(|error| at(syntax(text, &error)))?;
    let top = Section::open(String::new(), root.get_ref(), &TOP).map_err(at)?;
    let targets = targets(&top, &lines).map_err(at)?;
    let bosh = bosh(&top).map_err(at)?;
    Ok(Config {
        path: path.into(),
        mode: mode(&top).map_err(at)?,
        settings: settings(&top).map_err(at)?,
        dns: dns(&top).map_err(at)?,
        nat64: nat64(&top).map_err(at)?,
        bosh: bosh.or_else(|| targets.is_empty().then(Bosh::default)), // B1
        targets,
    })
}

/// What the lines of `text` that begin with `key`, in quotes or not, say, each read by itself; the last that can be read counts. An error where there
/// are such lines and none can be read.
fn line_of<T>(
    text: &str,
    key: &str,
    take: impl Fn(&Section<'_, '_>) -> Result<Option<T>, Fault>,
) -> Result<Option<T>, Unread> {
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
        let read = DeTable::parse(line).ok().and_then(|root| {
            let top = Section {
                name: String::new(),
                table: root.get_ref(),
            };
            take(&top).ok().flatten()
        });
        match (read, &found) {
            (Some(value), _) => found = Ok(Some(value)),
            (None, Ok(None)) => found = Err(Unread),
            (None, _) => {}
        }
    }
    found
}

/// A line that is there and says nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unread;

/// The path that the lines before the first section give as `state_dir`: as TOML has them, and where something is wrong there the
/// line of its own. An error where it is named and cannot be read.
pub(super) fn state_dir(text: &str) -> Result<Option<PathBuf>, Unread> {
    let take = |top: &Section<'_, '_>| path(top, "state_dir", |_| None);
    match DeTable::parse(text) {
        Ok(root) => {
            let name = String::new();
            let table = root.get_ref();
            take(&Section { name, table }).map_err(|_| Unread)
        }
        Err(_) => line_of(text, "state_dir", take),
    }
}

/// Where an instance is to be found, each key from its own line.
pub(super) fn place(text: &str, lenient: bool) -> Option<Settings> {
    place_of(text, lenient).ok()
}

fn place_of(text: &str, lenient: bool) -> Result<Settings, Unread> {
    let default = Settings::default();
    let at = |key, refuse: fn(&Path) -> Option<ConfigFault>| {
        or_none(line_of(text, key, |top| path(top, key, refuse)), lenient)
    };
    Ok(Settings {
        socket: at("socket", socket)?.unwrap_or(default.socket),
        pin_dir: at("pin_dir", pin_dir)?.unwrap_or(default.pin_dir),
        state_dir: at("state_dir", |_| None)?.unwrap_or(default.state_dir),
        cgroup: at("cgroup", |_| None)?,
        nft_table: or_none(line_of(text, "nft_table", table_name), lenient)?.unwrap_or(default.nft_table),
        backend: default.backend,
        existing: default.existing,
        forward: default.forward,
    })
}

/// A line that cannot be read is as none if that will do.
fn or_none<T>(read: Result<Option<T>, Unread>, lenient: bool) -> Result<Option<T>, Unread> {
    read.or(if lenient { Ok(None) } else { Err(Unread) })
}

/// What is wrong and where, in bytes.
struct Fault {
    offset: usize,
    fault: ConfigFault,
}

fn fault<T>(at: &Spanned<T>, fault: ConfigFault) -> Fault {
    Fault {
        offset: at.span().start,
        fault,
    }
}

/// Where lines begin: 100,000 endpoints ask for theirs.
struct Lines(Vec<usize>);

impl Lines {
    fn new(text: &str) -> Self {
        Self(
            text.bytes()
                .enumerate()
                .filter(|(_, byte)| *byte == b'\n')
                .map(|(offset, _)| offset)
                .collect(),
        )
    }

    fn of(&self, offset: usize) -> usize {
        1 + self.0.partition_point(|newline| *newline < offset)
    }

    fn at<T, U>(&self, spanned: &Spanned<T>, value: U) -> Line<U> {
        Line {
            value,
            line: self.of(spanned.span().start),
        }
    }
}

fn syntax(text: &str, error: &toml::de::Error) -> Fault {
    let span = error.span().unwrap_or(text.len()..text.len());
    let fault = if error.message() == "duplicate key" {
        let key = text.get(span.clone()).unwrap_or_default();
        let before = text.get(..span.start).unwrap_or_default();
        let line = before.rsplit('\n').next().unwrap_or_default();
        let header = line
            .trim_start()
            .strip_prefix('[')
            .map(|parents| parents.replace([' ', '\t', '['], ""));
        ConfigFault::Twice {
            what: match header {
                Some(parents) if parents.split('.').all(|part| part.is_empty() || is_bare(part)) => {
                    format!("[{parents}{}]", bare(key))
                }
                Some(_) | None => bare(key).to_owned(),
            },
        }
    } else {
        ConfigFault::Syntax {
            message: error.message().replace('\n', ", "),
        }
    };
    // At the end of the text there is nothing left to correct: the line before is meant.
    let end = text.trim_end().len();
    Fault {
        offset: span.start.min(end),
        fault,
    }
}

/// A section with nothing unknown in it.
struct Section<'a, 't> {
    /// `[dns]`, empty for the top.
    name: String,
    table: &'a DeTable<'t>,
}

impl<'a, 't> Section<'a, 't> {
    fn open(name: String, table: &'a DeTable<'t>, keys: &Keys) -> Result<Self, Fault> {
        let mut present: Vec<_> = table.keys().collect();
        present.sort_by_key(|key| key.span().start);
        for key in present {
            let text = key.get_ref().as_ref();
            if !keys.known.contains(&text) {
                let key_shown = bare(text).to_owned();
                return Err(fault(
                    key,
                    ConfigFault::UnknownKey {
                        key: key_shown,
                        section: name,
                        known: keys.known,
                    },
                ));
            }
        }
        Ok(Self { name, table })
    }

    fn kind(&self, key: &str, value: &Value<'_>, expected: &'static str) -> Fault {
        let found = value.get_ref().type_str();
        fault(
            value,
            ConfigFault::Kind {
                key: key.to_owned(),
                section: self.name.clone(),
                found,
                expected,
            },
        )
    }

    fn table(&self, key: &str, value: &'a Value<'t>, expected: &'static str) -> Result<&'a DeTable<'t>, Fault> {
        value
            .get_ref()
            .as_table()
            .ok_or_else(|| self.kind(key, value, expected))
    }

    fn text(&self, key: &str, value: &'a Value<'t>, expected: &'static str) -> Result<&'a str, Fault> {
        value.get_ref().as_str().ok_or_else(|| self.kind(key, value, expected))
    }

    fn required(
        &self,
        key: &'static str,
        example: &'static str,
        at: &Spanned<impl Sized>,
    ) -> Result<&'a DeArray<'t>, Fault> {
        let Some(value) = self.table.get(key) else {
            return Err(fault(
                at,
                ConfigFault::MissingKey {
                    key,
                    section: self.name.clone(),
                    example,
                },
            ));
        };
        value
            .get_ref()
            .as_array()
            .ok_or_else(|| self.kind(key, value, "an array: [ … ]"))
    }

    /// One of a few words; `None` where the key is absent.
    fn choice<T: Copy>(
        &self,
        key: &'static str,
        words: &[(&str, T)],
        choices: &'static str,
    ) -> Result<Option<T>, Fault> {
        let Some(value) = self.table.get(key) else {
            return Ok(None);
        };
        let text = self.text(key, value, choices)?;
        if let Some((_, meant)) = words.iter().find(|(word, _)| *word == text) {
            Ok(Some(*meant))
        } else {
            let found = format!("\"{}\"", bare(text));
            Err(fault(
                value,
                ConfigFault::Choice {
                    key,
                    section: self.name.clone(),
                    found,
                    choices,
                },
            ))
        }
    }
}

fn mode(top: &Section<'_, '_>) -> Result<Mode, Fault> {
    let words = [("enforce", Mode::Enforce), ("audit", Mode::Audit)];
    Ok(top
        .choice("mode", &words, "\"enforce\" or \"audit\"")?
        .unwrap_or(Mode::Enforce))
}

fn nat64(top: &Section<'_, '_>) -> Result<Vec<Nat64>, Fault> {
    const KEY: &str = "nat64";
    let Some(value) = top.table.get(KEY) else {
        return Ok(Vec::new());
    };
    let mut prefixes = Vec::new();
    let list = value.get_ref().as_array();
    for element in list.ok_or_else(|| top.kind(KEY, value, "an array: [ … ]"))? {
        let text = top.text(KEY, element, "a NAT64 prefix such as \"2001:db8:64::/96\"")?;
        let prefix = text
            .parse()
            .map_err(|error| fault(element, ConfigFault::Nat64 { error }))?;
        if prefix != Nat64::WELL_KNOWN && !prefixes.contains(&prefix) {
            prefixes.push(prefix);
        }
    }
    if prefixes.len() > MAX_NAT64 {
        return Err(fault(value, ConfigFault::Nat64Prefixes { found: prefixes.len() }));
    }
    Ok(prefixes)
}

fn settings(top: &Section<'_, '_>) -> Result<Settings, Fault> {
    let default = Settings::default();
    let words = [
        ("auto", Backend::Auto),
        ("ebpf", Backend::Ebpf),
        ("nftables", Backend::Nftables),
        ("both", Backend::Both),
    ];
    let choices = "\"auto\", \"ebpf\", \"nftables\" or \"both\"";
    let backend = top.choice("backend", &words, choices)?.unwrap_or(default.backend);
    let words = [("refuse", Forward::Refuse), ("allow", Forward::Allow)];
    let forward = top
        .choice("forward", &words, "\"refuse\" or \"allow\"")?
        .unwrap_or(default.forward);
    let existing = [("report", Existing::Report), ("cut", Existing::Cut)];
    Ok(Settings {
        backend,
        existing: top
            .choice("existing", &existing, "\"report\" or \"cut\"")?
            .unwrap_or(default.existing),
        forward,
        cgroup: path(top, "cgroup", |_| None)?,
        pin_dir: path(top, "pin_dir", pin_dir)?.unwrap_or(default.pin_dir),
        state_dir: path(top, "state_dir", |_| None)?.unwrap_or(default.state_dir),
        socket: path(top, "socket", socket)?.unwrap_or(default.socket),
        nft_table: table_name(top)?.unwrap_or(default.nft_table),
    })
}

/// A name that `nft` can be given without quotes.
fn table_name(top: &Section<'_, '_>) -> Result<Option<String>, Fault> {
    let Some(value) = top.table.get("nft_table") else {
        return Ok(None);
    };
    let text = top.text("nft_table", value, "the name of a table")?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if text.len() > MAX_TABLE_NAME
        || !text.starts_with(|first: char| first.is_ascii_alphabetic())
        || !text.bytes().all(plain)
    {
        return Err(fault(value, ConfigFault::TableName));
    }
    Ok(Some(text.to_owned()))
}

/// An absolute path, without doubled slashes and `.`, that `refuse` has nothing against.
fn path(
    top: &Section<'_, '_>,
    key: &'static str,
    refuse: fn(&Path) -> Option<ConfigFault>,
) -> Result<Option<PathBuf>, Fault> {
    let Some(value) = top.table.get(key) else {
        return Ok(None);
    };
    let text = top.text(key, value, "an absolute path")?;
    let path: PathBuf = Path::new(text).components().collect();
    let refusal = if !path.is_absolute() {
        Some(ConfigFault::RelativePath { key })
    } else if text.chars().any(char::is_control) || path.components().any(|part| part == Component::ParentDir) {
        Some(ConfigFault::OddPath { key })
    } else {
        refuse(&path)
    };
    match refusal {
        Some(refusal) => Err(fault(value, refusal)),
        None => Ok(Some(path)),
    }
}

/// bpffs refuses every name with a dot in it (`bpf_lookup` in kernel/bpf/inode.c).
fn pin_dir(path: &Path) -> Option<ConfigFault> {
    let plain = path
        .file_name()
        .is_some_and(|name| !name.as_encoded_bytes().contains(&b'.'));
    (!plain).then_some(ConfigFault::PinDir)
}

fn socket(path: &Path) -> Option<ConfigFault> {
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        Some(ConfigFault::SocketTooLong)
    } else if path.file_name().is_none() {
        Some(ConfigFault::SocketRoot)
    } else {
        None
    }
}

fn dns(top: &Section<'_, '_>) -> Result<Dns, Fault> {
    let default = Dns::default();
    let Some(value) = top.table.get("dns") else {
        return Ok(default);
    };
    let section = Section::open("[dns]".to_owned(), top.table("dns", value, "a section [dns]")?, &DNS)?;
    let words = [("open", Unresolved::Open), ("closed", Unresolved::Closed)];
    let dns = Dns {
        min_refresh: duration(&section, "min_refresh", MAX_REFRESH)?.unwrap_or(default.min_refresh),
        max_refresh: duration(&section, "max_refresh", MAX_REFRESH)?.unwrap_or(default.max_refresh),
        retain: duration(&section, "retain", MAX_RETAIN)?.unwrap_or(default.retain),
        unresolved: section
            .choice("unresolved", &words, "\"open\" or \"closed\"")?
            .unwrap_or(default.unresolved),
    };
    if dns.min_refresh > dns.max_refresh {
        let order = ConfigFault::RefreshOrder {
            min: dns.min_refresh,
            max: dns.max_refresh,
        };
        let at = section
            .table
            .get("min_refresh")
            .or_else(|| section.table.get("max_refresh"))
            .unwrap_or(value);
        return Err(fault(at, order));
    }
    Ok(dns)
}

fn duration(section: &Section<'_, '_>, key: &'static str, max: Duration) -> Result<Option<Duration>, Fault> {
    let Some(value) = section.table.get(key) else {
        return Ok(None);
    };
    let text = section.text(key, value, "a duration such as \"5s\", \"2m\" or \"1h\"")?;
    let found = humantime::parse_duration(text).map_err(|_| fault(value, ConfigFault::Duration { key }))?;
    if !(MIN_DURATION..=max).contains(&found) {
        return Err(fault(
            value,
            ConfigFault::DurationRange {
                key,
                found,
                min: MIN_DURATION,
                max,
            },
        ));
    }
    Ok(Some(found))
}

fn bosh(top: &Section<'_, '_>) -> Result<Option<Bosh>, Fault> {
    let Some(value) = top.table.get("bosh") else {
        return Ok(None);
    };
    let section = Section::open(
        "[bosh]".to_owned(),
        top.table("bosh", value, "a section [bosh]")?,
        &BOSH,
    )?;
    let dir = path(&section, "dir", |_| None)?;
    Ok(Some(dir.map_or_else(Bosh::default, |dir| Bosh { dir })))
}

fn targets(top: &Section<'_, '_>, lines: &Lines) -> Result<BTreeMap<String, Target>, Fault> {
    let Some(value) = top.table.get("target") else {
        return Ok(BTreeMap::new());
    };
    let mut sections: Vec<_> = top.table("target", value, "sections [target.NAME]")?.iter().collect();
    sections.sort_by_key(|(name, _)| name.span().start);
    let mut targets = BTreeMap::new();
    for (name, value) in sections {
        let text = name.get_ref().as_ref();
        if !(1..=MAX_TARGET_NAME).contains(&text.len()) || !is_bare(text) {
            return Err(fault(
                name,
                ConfigFault::TargetName {
                    name: bare(text).to_owned(),
                },
            ));
        }
        let table = top.table(&format!("target.{text}"), value, "a section [target.NAME]")?;
        let section = Section::open(format!("[target.{text}]"), table, &TARGET)?;
        targets.insert(text.to_owned(), target(&section, name, lines)?);
    }
    Ok(targets)
}

fn target(section: &Section<'_, '_>, name: &Spanned<impl Sized>, lines: &Lines) -> Result<Target, Fault> {
    let endpoints = section.required("endpoints", "endpoints = [\"tcp://ADDRESS:PORT\"]", name)?;
    let allow = section.required("allow", "allow = [\"root\"]", name)?;
    let grants = match section.table.get("grants") {
        Some(value) => {
            let said = value.get_ref().as_bool();
            said.ok_or_else(|| section.kind("grants", value, "true or false"))?
        }
        None => false,
    };
    let answers = [("routable", Answers::Routable), ("link-local", Answers::LinkLocal)];
    let answers = section.choice("answers", &answers, "\"routable\" or \"link-local\"")?;
    Ok(Target {
        grants,
        answers: answers.unwrap_or_default(),
        line: lines.of(name.span().start),
        endpoints: endpoints
            .iter()
            .map(|value| {
                let text = section.text("an element of endpoints", value, AN_ENDPOINT)?;
                Ok(lines.at(value, EndpointText(text.to_owned())))
            })
            .collect::<Result<_, Fault>>()?,
        allow: allow
            .iter()
            .map(|value| Ok(lines.at(value, principal(section, value)?)))
            .collect::<Result<_, Fault>>()?,
    })
}

fn principal(section: &Section<'_, '_>, value: &Value<'_>) -> Result<Allow, Fault> {
    let Some(table) = value.get_ref().as_table() else {
        return user(section, value).map(Allow::User);
    };
    let parts = Section::open(format!("a principal of {}", section.name), table, &PRINCIPAL)?;
    let cgroup = match table.get("cgroup") {
        Some(cgroup) => Some(parts.text("cgroup", cgroup, "the path of a cgroup")?.to_owned()),
        None => None,
    };
    match (table.get("user"), table.get("group"), cgroup, table.get("kernel")) {
        (Some(name), None, None, None) => user(section, name).map(Allow::User),
        (Some(name), None, Some(cgroup), None) => Ok(Allow::Within {
            user: user(section, name)?,
            cgroup,
        }),
        (None, Some(name), cgroup, None) => Ok(Allow::Group {
            group: user(section, name)?,
            cgroup,
        }),
        (None, None, None, Some(kernel)) if kernel.get_ref().as_bool() == Some(true) => Ok(Allow::Kernel),
        (Some(_) | None, Some(_) | None, Some(_) | None, Some(_) | None) => Err(fault(
            value,
            ConfigFault::Principal {
                section: section.name.clone(),
            },
        )),
    }
}

fn user(section: &Section<'_, '_>, value: &Value<'_>) -> Result<User, Fault> {
    if let Some(name) = value.get_ref().as_str() {
        return Ok(User::Name(name.to_owned()));
    }
    let Some(integer) = value.get_ref().as_integer() else {
        return Err(section.kind("an element of allow", value, A_PRINCIPAL));
    };
    i64::from_str_radix(integer.as_str(), integer.radix())
        .map(User::Number)
        .map_err(|_| {
            fault(
                value,
                ConfigFault::Number {
                    section: section.name.clone(),
                },
            )
        })
}

/// The text if it looks like a key, a name or a word; anything else might be an endpoint with its credentials (B2).
fn bare(text: &str) -> &str {
    if text.len() <= 64 && is_bare(text) { text } else { "…" }
}

fn is_bare(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}
