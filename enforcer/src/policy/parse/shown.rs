//! What may be printed of an endpoint or a message-bus URL: never its credentials (B2), whatever is wrong with it.

use std::net::IpAddr;

use super::{Server, servers};

/// In place of what might be credentials.
pub(super) const HIDDEN: &str = "…";

/// Most servers that are shown of one string.
const MAX_SERVERS: usize = 256;

/// Scheme, host and port of a URL or endpoint, without credentials, path and query, in one line; of each server where
/// commas separate several. A part that does not look like a scheme, host or port might be credentials and is shown as
/// `…`.
#[must_use]
pub fn shown(text: &str) -> String {
    // Ports may be several there, and nothing else than an endpoint can be in it.
    if !super::is_bus_url(text) && super::endpoints(text).is_ok() {
        return text.to_owned();
    }
    if !text.contains(',') {
        return single(text);
    }
    let each = servers(text).map(|server| server.map_or_else(|error| error.shown, Server::shown));
    let mut each: Vec<String> = each.take(MAX_SERVERS + 1).collect();
    if each.len() > MAX_SERVERS {
        each.truncate(MAX_SERVERS);
        each.push(HIDDEN.to_owned());
    }
    each.join(",")
}

/// As [`shown`], of one server.
pub(super) fn single(text: &str) -> String {
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) if is_scheme(scheme) => (Some(scheme), rest),
        Some(_) | None => (None, text),
    };
    // The last `@`, written out or encoded: a password may hold others, a host none.
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    let rest = rest.rsplit_once("%40").map_or(rest, |(_, rest)| rest);
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') && !is_host(rest) => (host, Some(port)),
        Some(_) | None => (rest, None),
    };
    let host = if is_host(host) { host } else { HIDDEN };
    let scheme = scheme.map(|scheme| format!("{scheme}://")).unwrap_or_default();
    match port {
        None => format!("{scheme}{host}"),
        Some(port) if port.len() <= 10 && port.bytes().all(|byte| byte.is_ascii_digit()) => {
            format!("{scheme}{host}:{port}")
        }
        Some(_) => format!("{scheme}{host}:{HIDDEN}"),
    }
}

fn is_scheme(text: &str) -> bool {
    (1..=16).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// A name, an address or a prefix, valid or nearly so.
fn is_host(text: &str) -> bool {
    let (inner, bracketed, after) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((inner, after)) => (inner, true, after),
        None => (text, false, ""),
    };
    let inner = match (inner.split_once('/'), after.strip_prefix('/')) {
        (None, None) if after.is_empty() => inner,
        (None, Some(length)) if is_length(length) => inner,
        (Some((address, length)), None) if after.is_empty() && is_length(length) => address,
        (None | Some(_), None | Some(_)) => return false,
    };
    let zoneless = match inner.split_once('%') {
        Some((address, zone)) if zone.len() <= 15 && zone.bytes().all(|byte| byte.is_ascii_alphanumeric()) => address,
        Some(_) => return false,
        None => inner,
    };
    let name = |text: &str| {
        text.chars().count() <= 253
            && text
                .chars()
                .all(|c| c.is_alphanumeric() || matches!(c, '.' | '-' | '_'))
    };
    zoneless.parse::<IpAddr>().is_ok() || (!bracketed && zoneless == inner && name(inner))
}

fn is_length(text: &str) -> bool {
    (1..=3).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}
