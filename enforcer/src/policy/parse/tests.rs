//! Every form of an endpoint, accepted and refused.

use proptest::prelude::*;

use super::super::{CgroupPath, Endpoint, Name, shown};

#[test]
fn accepted_endpoints_are_shown_canonically() {
    for (text, shown) in [
        ("tcp://10.0.0.5:4222", "tcp://10.0.0.5:4222"),
        ("10.0.0.5:4222", "tcp://10.0.0.5:4222"),
        ("nats://10.0.0.5:4222", "tcp://10.0.0.5:4222"),
        ("udp://10.0.0.9:53", "udp://10.0.0.9:53"),
        ("tcp://[2001:DB8::5]:4222", "tcp://[2001:db8::5]:4222"),
        ("tcp://[::ffff:10.0.0.5]:4222", "tcp://10.0.0.5:4222"),
        ("tcp://10.8.0.0/16:6443", "tcp://10.8.0.0/16:6443"),
        ("tcp://10.8.0.1/32:6443", "tcp://10.8.0.1:6443"),
        ("tcp://0.0.0.0/0:6443", "tcp://0.0.0.0/0:6443"),
        ("tcp://local:10250", "tcp://local:10250"),
        ("nats://user:pass@NATS.Example.:4222", "tcp://nats.example:4222"),
    ] {
        let parsed = Endpoint::parse(text);
        assert!(parsed.is_ok(), "{text}: {parsed:?}");
        assert_eq!(
            parsed.map(|endpoint| endpoint.to_string()).unwrap_or_default(),
            shown,
            "{text}"
        );
    }
}

#[test]
fn refused_endpoints_name_what_is_wrong_and_no_password() {
    for text in [
        "",
        "tcp://",
        "tcp://10.0.0.5",
        "tcp://10.0.0.5:0",
        "tcp://10.0.0.5:65536",
        "tcp://10.0.0.5:-1",
        "tcp://10.0.0.5:port",
        "tcp://10.0.0.1/8:1",
        "tcp://10.0.0.0/33:1",
        "tcp://[2001:db8::]/129:1",
        "tcp://0.0.0.0:1",
        "tcp://[::]:1",
        "tcp://[::ffff:0.0.0.0]:1",
        "tcp://127.1:1",
        "tcp://010.0.0.1:1",
        "tcp://0x7f000001:1",
        "tcp://2130706433:1",
        "tcp://[fe80::1%eth0]:1",
        "tcp://bad_.-name..x:1",
        "http://10.0.0.5:1",
        "nats://user:secret@10.0.0.5",
        "nats://user:secret@:4222",
        "tcp://2001:db8::5:4222",
    ] {
        match Endpoint::parse(text) {
            Ok(endpoint) => panic!("{text} was taken for {endpoint}"),
            Err(error) => {
                let error = error.to_string();
                assert!(!error.contains("secret"), "{text}: {error}");
                assert!(!error.contains('\n'), "{text}: {error}");
            }
        }
    }
}

#[test]
fn b2_a_url_of_several_servers_protects_all_or_is_refused() {
    for (text, expected) in [
        (
            "nats://u:secret@10.0.0.11:4222,u:secret@10.0.0.12:4222",
            "tcp://10.0.0.11:4222 tcp://10.0.0.12:4222",
        ),
        ("tls://a:1, nats://b:2", "tcp://a:1 tcp://b:2"),
        ("nats://u:sec%2Cret@a:1", "tcp://a:1"),
        ("nats://u:secret@a:1,b", "b: no port"),
        ("nats://u:secret,secret@a:1", "…: a comma separates servers"),
        ("tcp://a:1,b:2", "a comma separates servers"),
        ("nats://a:1,udp://b:2", "udp://b:2: a comma separates servers"),
    ] {
        let all = Endpoint::parse_all(text).map(|all| {
            let all: Vec<String> = all.iter().map(ToString::to_string).collect();
            all.join(" ")
        });
        let found = all.unwrap_or_else(|error| error.to_string());
        assert!(found.contains(expected) && !found.contains("secret"), "{text}: {found}");
        // Where one is expected, none is taken for it.
        assert_eq!(Endpoint::parse(text).is_ok(), !text.contains(','), "{text}");
    }
    assert_eq!(
        super::shown("nats://u:secret@10.0.0.11:4222,u:secret@b:2,tls://c:3"),
        "nats://10.0.0.11:4222,b:2,tls://c:3"
    );
}

#[test]
fn cgroup_paths_are_absolute_and_plain() {
    for (text, good) in [
        ("/", true),
        ("/system.slice/agent.service", true),
        ("system.slice", false),
        ("", false),
        ("/a/../b", false),
    ] {
        assert_eq!(CgroupPath::parse(text).is_ok(), good, "{text}");
    }
}

proptest! {
    /// Nothing makes the parsers panic, and what is accepted is read back from what is shown.
    #[test]
    fn shown_is_read_back(text in "(tcp://|udp://|nats://|)[a-z0-9.:/\\[\\]@%_-]{0,40}") {
        if let Ok(endpoint) = Endpoint::parse(&text) {
            let shown = endpoint.to_string();
            prop_assert_eq!(Endpoint::parse(&shown).ok(), Some(endpoint), "{}", shown);
        }
        let _ = Name::parse(&text);
        let _ = CgroupPath::parse(&text);
    }
}

/// Texts that are wrong, what is said of them, and what they meant: an endpoint, or several, that the message names,
/// with a port of 80 in place of PORT. None where nobody can tell.
const WRONG: [(&str, &str, &[&str]); 35] = [
    (
        "tcp://fd99::/64:80",
        "an IPv6 address needs brackets; write [fd99::/64]:80",
        &["[fd99::/64]:80"],
    ),
    (
        "tcp://fd99::1/64:80",
        "an IPv6 address needs brackets; write [fd99::/64]:80",
        &["[fd99::/64]:80"],
    ),
    (
        "tcp://fd99::/64",
        "an IPv6 address needs brackets; write [fd99::/64]:PORT",
        &["[fd99::/64]:80"],
    ),
    (
        "fd99::7",
        "an IPv6 address needs brackets; write [fd99::7]:PORT",
        &["[fd99::7]:80"],
    ),
    (
        "2001:db8::5:5432",
        "an IPv6 address needs brackets; write [2001:db8::5]:5432, or [2001:db8::5:5432]:PORT if 5432 is part of the \
         address",
        &["[2001:db8::5]:5432", "[2001:db8::5:5432]:80"],
    ),
    (
        "::1:80",
        "an IPv6 address needs brackets; write [::1]:80, or [::1:80]:PORT if 80 is part of the address",
        &["[::1]:80", "[::1:80]:80"],
    ),
    (
        "tcp://[fd99::1/64]:80",
        "the prefix has bits set beyond its length; write [fd99::/64]:80",
        &["[fd99::/64]:80"],
    ),
    (
        "[fd99::1]/64:80",
        "the prefix has bits set beyond its length; write [fd99::/64]:80",
        &["[fd99::/64]:80"],
    ),
    (
        "[::ffff:10.0.0.1/112]:80",
        "the prefix has bits set beyond its length; write 10.0.0.0/16:80",
        &["10.0.0.0/16:80"],
    ),
    (
        "10.8.0.1/16:443",
        "the prefix has bits set beyond its length; write 10.8.0.0/16:443",
        &["10.8.0.0/16:443"],
    ),
    (
        "10.8.0.1/16:https",
        "the prefix has bits set beyond its length; write 10.8.0.0/16:PORT",
        &["10.8.0.0/16:80"],
    ),
    (
        "10.0.0.1-10.0.0.9:80",
        "a range of addresses is no endpoint; write the prefixes that it consists of, each as an endpoint",
        &[],
    ),
    (
        "tcp://*:80",
        "an unspecified address is not an endpoint; use local:PORT for every address of this host, 0.0.0.0/0:PORT and \
         [::/0]:PORT for every address there is",
        &["local:80", "0.0.0.0/0:80", "[::/0]:80"],
    ),
    (
        "https://api.example",
        "unknown scheme; use tcp://, udp://, nats:// or tls:// (only host and port matter: https://HOST is \
         tcp://HOST:443)",
        &[],
    ),
    (
        "tcp://fd99::/200:80",
        "the prefix length is not a number from 0 to 128; correct it",
        &[],
    ),
    (
        "tcp://fd99::/064x",
        "the prefix length is not a number from 0 to 128; correct it",
        &[],
    ),
    (
        "nats://bad::cafe/x%40host",
        "an encoded @ (%40) leaves open where the host begins; write @ before the host, and no @ in it",
        &[],
    ),
    ("tcp://10.0.0.1", "no port; end it with :PORT", &[]),
    (
        "tcp://10.0.0.1:80/metrics",
        "nothing may follow the port; remove what begins with / or ?",
        &[],
    ),
    (
        "tcp://10.0.0.1:80?x",
        "nothing may follow the port; remove what begins with / or ?",
        &[],
    ),
    (
        "tcp:10.0.0.1:80",
        "a scheme is followed by ://; write tcp://ADDRESS:PORT",
        &["tcp://ADDRESS:80"],
    ),
    (
        "UDP:/10.0.0.1:53",
        "a scheme is followed by ://; write udp://ADDRESS:PORT",
        &[],
    ),
    (
        "nats:u:secret@bus.example:4222",
        "a scheme is followed by ://; write nats://ADDRESS:PORT",
        &[],
    ),
    ("tcp://10.0.0.1:80 ", "an endpoint has no blanks; remove them", &[]),
    (" tcp://10.0.0.1:80", "an endpoint has no blanks; remove them", &[]),
    ("10.0.0.1: 80", "an endpoint has no blanks; remove them", &[]),
    ("10.0.0.1:80, 443", "an endpoint has no blanks; remove them", &[]),
    ("bus.example\t:80", "an endpoint has no blanks; remove them", &[]),
    ("10.0.0.1:0", PORTS, &[]),
    ("10.0.0.1:65536", PORTS, &[]),
    ("10.0.0.1:http", PORTS, &[]),
    ("10.0.0.1:*", PORTS, &[]),
    ("10.0.0.1:2380-2379", PORTS, &[]),
    ("10.0.0.1:80,", PORTS, &[]),
    (
        "10.0.0.1:1-65535",
        "an endpoint has at most 1024 ports; narrow the range, or divide it into several endpoints",
        &[],
    ),
];
const PORTS: &str = "the port is not a number from 1 to 65535, nor a range such as 2379-2380 or a list such as 80,443; \
                     service names and * are no ports";

#[test]
fn what_is_wrong_is_told_with_a_remedy_that_protects_no_less() {
    for (text, told, meant) in WRONG {
        let error = Endpoint::parse_all(text).map_err(|error| error.fault.to_string());
        assert_eq!(error, Err(told.to_owned()), "{text}");
        let told = told.replace("PORT", "80");
        for meant in meant {
            assert!(
                told.contains(meant) && Endpoint::parse(meant).is_ok(),
                "{text}: {told}: {meant}"
            );
        }
    }
}

#[test]
fn a_host_may_be_named_as_a_scheme_is() {
    for (text, shown) in [
        ("tcp:80", "tcp://tcp:80"),
        ("nats:4222,4223", "tcp://nats:4222 tcp://nats:4223"),
    ] {
        let all = Endpoint::parse_all(text).map(|all| {
            let all: Vec<String> = all.iter().map(ToString::to_string).collect();
            all.join(" ")
        });
        assert_eq!(all.map_err(|error| error.to_string()), Ok(shown.to_owned()), "{text}");
    }
}

#[test]
fn ports_are_ranges_and_lists() {
    let all = |text: &str| -> Result<Vec<String>, String> {
        let endpoints = Endpoint::parse_all(text).map_err(|error| error.to_string())?;
        Ok(endpoints.iter().map(ToString::to_string).collect())
    };
    let ports = |expected: &[&str]| Ok(expected.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
    assert_eq!(
        all("10.0.0.1:2379-2380,2382"),
        ports(&["tcp://10.0.0.1:2379", "tcp://10.0.0.1:2380", "tcp://10.0.0.1:2382"])
    );
    assert_eq!(
        all("udp://[fd99::/64]:53,53"),
        ports(&["udp://[fd99::/64]:53", "udp://[fd99::/64]:53"])
    );
    assert_eq!(all("tcp://local:7-7"), ports(&["tcp://local:7"]));
    assert_eq!(all("etcd.example:1-1024").map(|all| all.len()), Ok(1024));
    // Where one is asked for.
    for text in ["10.0.0.1:1-2", "10.0.0.1:1,2"] {
        assert!(Endpoint::parse(text).is_err(), "{text}");
    }
    // What a configuration shows reads back as the same.
    for text in [
        "10.0.0.1:80,443",
        "tcp://10.0.0.1:2379-2380,2382",
        "[fd99::/64]:1-9",
        "local:1-1024",
    ] {
        assert_eq!(shown(text), text);
    }
    // A message bus has one port for each server, and what else stands there may be a password.
    for text in [
        "nats://nats:20240101-7731998",
        "nats://h:4222-4230",
        "nats://u:1-2,3@h:4222",
        "tcp://u:1-2@h:4222",
    ] {
        let error = all(text).err().unwrap_or_default();
        assert!(
            !error.is_empty() && !error.contains("1-2") && !error.contains("2024"),
            "{text}: {error}"
        );
        assert!(!shown(text).contains('-'), "{}", shown(text));
    }
    for text in [
        "nats://u:hunter2@h:4222-hunter3",
        "nats://bad::cafe/x%40host",
        "tcp://bad::cafe/x%40host:1",
    ] {
        let error = all(text).err().unwrap_or_default();
        assert!(
            !error.is_empty() && !error.contains("hunter") && !error.contains("cafe"),
            "{text}: {error}"
        );
    }
}
