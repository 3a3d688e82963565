//! What a settings file names, in every form that agents have accepted. Whatever makes no sense costs only itself (F8).
//! Pure.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{BoshFault, MAX_URLS, fault::UrlFault};
use crate::policy::{Destination, Endpoint, EndpointError, Server, servers};

/// What a file names.
#[derive(Default)]
pub(super) struct Named {
    /// Endpoints; none at all where there is no URL that can be used or skipped.
    pub(super) endpoints: Option<BTreeSet<Endpoint>>,
    /// What is wrong with the rest.
    pub(super) faults: Vec<BoshFault>,
    seen: usize,
}

/// Reads the values at some paths of keys.
pub(super) fn read(bytes: &[u8], places: &[&[&'static str]]) -> Result<Named, BoshFault> {
    // As Go's encoding/json: a byte that is no UTF-8 is a character like another.
    let settings: Value = serde_json::from_str(&String::from_utf8_lossy(bytes)).map_err(BoshFault::Json)?;
    if !settings.is_object() {
        return Err(kind("", &settings, "an object"));
    }
    let mut named = Named::default();
    for keys in places {
        match at(&settings, keys) {
            Ok(Some(value)) => named.take(&keys.join("."), value),
            Ok(None) => {}
            Err(fault) => named.faults.push(fault),
        }
    }
    Ok(named)
}

impl Named {
    fn take(&mut self, key: &str, value: &Value) {
        match value {
            Value::String(text) => self.take_servers(key, text),
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    let key = format!("{key}[{index}]");
                    match item {
                        Value::String(text) => self.take_servers(&key, text),
                        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
                            if !self.is_full() {
                                self.faults.push(kind(&key, item, "a string"));
                            }
                        }
                    }
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
                self.faults.push(kind(key, value, "a string or a list of strings"));
            }
        }
    }

    fn take_servers(&mut self, key: &str, text: &str) {
        for server in servers(text) {
            if self.is_full() {
                return;
            }
            match endpoint(key, server) {
                Ok(endpoint) => self.endpoints.get_or_insert_default().extend(endpoint),
                Err(fault) => self.faults.push(fault),
            }
        }
    }

    /// Counts one more. True, and a fault, where there are too many.
    fn is_full(&mut self) -> bool {
        self.seen += 1;
        if self.seen == MAX_URLS + 1 {
            self.faults.push(BoshFault::TooMany);
        }
        self.seen > MAX_URLS
    }
}

/// The endpoint of a server; none where it is to be skipped, as a new director's own (create-env).
fn endpoint(key: &str, server: Result<Server<'_>, EndpointError>) -> Result<Option<Endpoint>, BoshFault> {
    let bad = |url, fault| BoshFault::Url {
        key: key.to_owned(),
        url,
        fault,
    };
    let broken = |error: EndpointError| bad(error.shown, UrlFault::Endpoint(error.fault));
    let server = server.map_err(broken)?;
    match server.scheme.map(str::to_ascii_lowercase).as_deref() {
        Some("https") => return Ok(None),
        Some("nats" | "tls" | "tcp") | None => {}
        Some(_) => return Err(bad(server.shown(), UrlFault::Scheme)),
    }
    let endpoint = server.endpoint().map_err(broken)?;
    match endpoint.destination {
        Destination::Address(_) | Destination::Name(_) => Ok(Some(endpoint)),
        Destination::Prefix(_) | Destination::Local => Err(bad(server.shown(), UrlFault::Host)),
    }
}

/// The value at a path of keys; none where one of them is absent or null.
fn at<'v>(mut value: &'v Value, keys: &[&'static str]) -> Result<Option<&'v Value>, BoshFault> {
    let mut walked = Vec::new();
    for key in keys {
        let Value::Object(object) = value else {
            return Err(kind(&walked.join("."), value, "an object"));
        };
        walked.push(*key);
        match object.get(*key) {
            None | Some(Value::Null) => return Ok(None),
            Some(inner) => value = inner,
        }
    }
    Ok(Some(value))
}

fn kind(key: &str, value: &Value, expected: &'static str) -> BoshFault {
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    BoshFault::Kind {
        key: key.to_owned(),
        found,
        expected,
    }
}
