//! A BOSH agent's settings files → the endpoints of its message bus (B2). What a file holds is shown nowhere but for scheme,
//! host and port of a URL: the rest may be credentials.

mod fault;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde_json::Value;

pub use self::{
    fault::{BoshError, BoshFault},
    watch::Watch,
};
use crate::policy::{Destination, Endpoint, shown};

/// Most bytes of a settings file (F7).
pub const MAX_BYTES: usize = 8 << 20;

/// The user whose files are trusted.
const ROOT: u32 = 0;

/// Most message-bus URLs (F7).
pub const MAX_URLS: usize = 256;

/// What an operator's update left for the agent; says more recent things than the other.
const UPDATE: &str = "update_settings.json";
/// What the director gave the agent.
const SETTINGS: &str = "settings.json";

/// What the settings say now.
#[derive(Debug)]
pub struct Settings {
    /// The message bus, where a file names one.
    pub bus: Option<Bus>,
    /// What is wrong, or not there yet. Beside a bus: the file that would have been asked before is damaged, or some of its URLs are.
    pub fault: Option<BoshError>,
}

impl Settings {
    /// The bus that counts: of two files one of which is damaged, the other only where nothing better is known.
    #[must_use]
    pub fn usable(&self, known: Option<&BTreeSet<Endpoint>>) -> Option<&Bus> {
        self.bus.as_ref().filter(|_| self.fault.is_none() || known.is_none())
    }
}

/// A message bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bus {
    /// Where it answers; none where all URLs were skipped.
    pub endpoints: BTreeSet<Endpoint>,
    /// The file that says so.
    pub file: PathBuf,
}

/// Reads what is in `dir`, or in `settings` below it, which on some stemcells is a tmpfs and counts first.
#[must_use]
pub fn read(dir: &Path) -> Settings {
    read_of(ROOT, dir)
}

/// As [`read`], from files of `owner`'s.
fn read_of(owner: u32, dir: &Path) -> Settings {
    let update = file(owner, dir, UPDATE, |settings| {
        Ok(list(settings, &["mbus", "urls"])?.unwrap_or_default())
    });
    let main = || {
        file(owner, dir, SETTINGS, |settings| {
            let several = list(settings, &["env", "bosh", "mbus", "urls"])?.filter(|urls| any(urls));
            match several {
                Some(urls) => Ok(urls),
                None => Ok(one(settings, &["mbus"])?.into_iter().collect()),
            }
        })
    };
    let (bus, fault) = match update {
        Ok(Some((bus, fault))) => (Some(bus), fault),
        Ok(None) => split(main()),
        Err(error) if error.is_missing() => split(main()),
        Err(error) => (main().ok().flatten().map(|(bus, _)| bus), Some(error)),
    };
    // The one that was read.
    let silent = || {
        let (first, second) = places(dir, SETTINGS);
        let path = if first.symlink_metadata().is_ok() {
            first
        } else {
            second
        };
        BoshError {
            path,
            fault: BoshFault::NoUrl,
        }
    };
    Settings {
        fault: fault.or_else(|| bus.is_none().then(silent)),
        bus,
    }
}

/// Endpoints, and what is wrong with some of the URLs beside theirs.
type Parsed = (BTreeSet<Endpoint>, Option<BoshFault>);

/// A bus, and what is wrong with some of its URLs.
type Named = (Bus, Option<BoshError>);

fn split(read: Result<Option<Named>, BoshError>) -> (Option<Bus>, Option<BoshError>) {
    match read {
        Ok(Some((bus, fault))) => (Some(bus), fault),
        Ok(None) => (None, None),
        Err(error) => (None, Some(error)),
    }
}

/// The two places of a file, the one to prefer first.
fn places(dir: &Path, file: &str) -> (PathBuf, PathBuf) {
    (dir.join("settings").join(file), dir.join(file))
}

/// The message bus that a file names; none where it names none.
fn file(
    owner: u32,
    dir: &Path,
    name: &str,
    urls: impl FnOnce(&Value) -> Result<Vec<&str>, BoshFault>,
) -> Result<Option<Named>, BoshError> {
    let (first, second) = places(dir, name);
    let (path, opened) = match open(&first) {
        Err(BoshFault::Missing) => {
            let opened = open(&second);
            (second, opened)
        }
        opened => (first, opened),
    };
    let result = opened.and_then(|file| contents(owner, file)).and_then(|bytes| {
        let settings: Value = serde_json::from_slice(&bytes).map_err(BoshFault::Json)?;
        endpoints(&urls(&settings)?)
    });
    match result {
        Ok(named) => Ok(named.map(|(endpoints, fault)| {
            let fault = fault.map(|fault| BoshError {
                path: path.clone(),
                fault,
            });
            (Bus { endpoints, file: path }, fault)
        })),
        Err(fault) => Err(BoshError { path, fault }),
    }
}

/// Neither follows a link nor waits for a FIFO's other end.
fn open(path: &Path) -> Result<File, BoshFault> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => BoshFault::Missing,
        Some(libc::ELOOP) => BoshFault::Link,
        Some(_) | None => BoshFault::Read(error),
    })
}

fn contents(owner: u32, file: File) -> Result<Vec<u8>, BoshFault> {
    let meta = file.metadata().map_err(BoshFault::Read)?;
    if !meta.is_file() {
        return Err(BoshFault::NotAFile);
    }
    // Who can write it says what is protected.
    let (uid, mode) = (meta.uid(), meta.mode() & 0o7777);
    if uid != owner || mode & 0o002 != 0 || (mode & 0o020 != 0 && meta.gid() != 0) {
        return Err(BoshFault::Untrusted { uid, mode });
    }
    let mut bytes = Vec::new();
    let limit = MAX_BYTES as u64 + 1;
    file.take(limit).read_to_end(&mut bytes).map_err(BoshFault::Read)?;
    if bytes.len() > MAX_BYTES {
        return Err(BoshFault::TooLong);
    }
    Ok(bytes)
}

/// The value at a path of keys; none where one of them is absent or null.
fn at<'v>(mut value: &'v Value, keys: &[&'static str]) -> Result<Option<&'v Value>, BoshFault> {
    let mut walked = Vec::new();
    for key in keys {
        let Value::Object(object) = value else {
            return Err(kind(&walked, value, "an object"));
        };
        walked.push(*key);
        match object.get(*key) {
            None | Some(Value::Null) => return Ok(None),
            Some(inner) => value = inner,
        }
    }
    Ok(Some(value))
}

fn list<'v>(settings: &'v Value, keys: &[&'static str]) -> Result<Option<Vec<&'v str>>, BoshFault> {
    let Some(value) = at(settings, keys)? else {
        return Ok(None);
    };
    let urls = value.as_array().ok_or_else(|| kind(keys, value, "a list of strings"))?;
    let text = |url: &'v Value| url.as_str().ok_or_else(|| kind(keys, url, "strings only"));
    let urls: Vec<&str> = urls.iter().map(text).collect::<Result<_, _>>()?;
    Ok(Some(urls))
}

fn one<'v>(settings: &'v Value, keys: &[&'static str]) -> Result<Option<&'v str>, BoshFault> {
    let Some(value) = at(settings, keys)? else {
        return Ok(None);
    };
    value.as_str().map(Some).ok_or_else(|| kind(keys, value, "a string"))
}

fn any(urls: &[&str]) -> bool {
    urls.iter().any(|url| !url.trim().is_empty())
}

fn kind(keys: &[&'static str], value: &Value, expected: &'static str) -> BoshFault {
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    BoshFault::Kind {
        key: keys.join("."),
        found,
        expected,
    }
}

/// The endpoints of some URLs, and what is wrong with the first that has none; none where there is no URL at all. Those of
/// `https://` are a new director's own (create-env).
fn endpoints(urls: &[&str]) -> Result<Option<Parsed>, BoshFault> {
    if !any(urls) {
        return Ok(None);
    }
    if urls.len() > MAX_URLS {
        return Err(BoshFault::TooMany { found: urls.len() });
    }
    let meant = urls.iter().map(|url| url.trim()).filter(|url| !url.is_empty());
    let (mut found, mut fault) = (BTreeSet::new(), None);
    for parsed in meant.filter_map(|url| endpoint(url).transpose()) {
        match parsed {
            Ok(endpoint) => drop(found.insert(endpoint)),
            Err(error) => fault = fault.or(Some(error)),
        }
    }
    match fault {
        Some(fault) if found.is_empty() => Err(fault),
        fault => Ok(Some((found, fault))),
    }
}

/// The endpoint of a URL; none where it is to be skipped.
fn endpoint(url: &str) -> Result<Option<Endpoint>, BoshFault> {
    let no = |problem| BoshFault::Url {
        url: shown(url),
        problem,
    };
    let Some((scheme, rest)) = url.split_once("://") else {
        // Anything may stand here: it is shown only if it is a host and a port.
        let url = if Endpoint::parse(url).is_ok() { url } else { "…" };
        return Err(BoshFault::Url {
            url: url.to_owned(),
            problem: "no scheme".to_owned(),
        });
    };
    match scheme.to_ascii_lowercase().as_str() {
        "https" => return Ok(None),
        "nats" | "tls" | "tcp" => {}
        _ => return Err(no("the scheme is none of a message bus".to_owned())),
    }
    // As a message bus's URL, which may hold credentials, whatever the scheme.
    let endpoint = Endpoint::parse(&format!("nats://{rest}")).map_err(|error| no(error.fault.to_string()))?;
    match endpoint.destination {
        Destination::Address(_) | Destination::Name(_) => Ok(Some(endpoint)),
        Destination::Prefix(_) | Destination::Local => Err(no("the host is neither an address nor a name".to_owned())),
    }
}

/// What changes when a settings file does, or when another takes its place.
fn fingerprint(dir: &Path) -> Vec<Option<[i128; 7]>> {
    let (update, main) = (places(dir, UPDATE), places(dir, SETTINGS));
    [update.0, update.1, main.0, main.1]
        .iter()
        .map(|path| {
            let meta = path.symlink_metadata().ok()?;
            let time = |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
            Some([
                meta.dev().into(),
                meta.ino().into(),
                meta.size().into(),
                meta.mode().into(),
                meta.uid().into(),
                time(meta.mtime(), meta.mtime_nsec()),
                time(meta.ctime(), meta.ctime_nsec()),
            ])
        })
        .collect()
}

/// The nearest directory that exists.
fn nearest(path: &Path) -> io::Result<&Path> {
    path.ancestors()
        .find(|ancestor| ancestor.is_dir())
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}
