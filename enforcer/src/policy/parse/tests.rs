//! Every form of an endpoint, accepted and refused.

use proptest::prelude::*;

use super::super::{CgroupPath, Endpoint, Name};

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
