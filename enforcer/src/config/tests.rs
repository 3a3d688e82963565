//! The file as read: defaults, lines, what is shown.

use std::path::Path;

use super::Config;

const PATH: &str = "/etc/enforcer/enforcer.toml";

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new(PATH)).map_err(|error| error.to_string())
}

const WHOLE: &str = r#"
mode = "audit"
backend = "ebpf"
existing = "cut"
cgroup = "/sys/fs/cgroup/x"
pin_dir = "/sys/fs/bpf/x"
state_dir = "/var/lib/x"
socket = "/run/x/s"
[dns]
min_refresh = "2s"
max_refresh = "3m"
retain = "2h"
unresolved = "closed"
[target.bus]
endpoints = ["nats://nats.example:4222", "tcp://[2001:db8::5]:4222"]
allow = ["root", 999, { user = "agent", cgroup = "/a" }, { group = "bus" }, { group = 7, cgroup = "/a" }, { kernel = true }]
[target.monit]
endpoints = ["tcp://127.0.0.1:2822"]
allow = []
grants = true
"#;

#[test]
fn shown_is_read_back() {
    for text in [
        WHOLE,
        "",
        "[bosh]",
        "[bosh]\ndir = \"/x/y\"\n[target.nats]\nendpoints = []\nallow = []\n",
        "[target.a]\nendpoints = []\nallow = []\n",
    ] {
        let config = parse(text);
        assert!(config.is_ok(), "{config:?}");
        let shown = config.map(|config| config.show()).unwrap_or_default();
        let again = parse(&shown).map(|config| config.show());
        assert_eq!(again, Ok(shown));
    }
}

#[test]
fn mistakes_name_file_line_and_key_on_one_line() {
    for (text, line, says) in [
        ("moed = \"audit\"", 1, "moed"),
        ("\nmode = \"strict\"", 2, "strict"),
        ("pin_dir = \"relative\"", 1, "pin_dir"),
        ("pin_dir = \"/sys/fs/bpf/a.b\"", 1, "dot"),
        ("socket = 5", 1, "socket"),
        ("[dns]\nretain = \"yesterday\"", 2, "retain"),
        ("[dns]\nmin_refresh = \"2m\"", 2, "min_refresh"),
        ("[dns]\nnegative = \"1s\"", 2, "negative"),
        ("forward = \"drop\"", 1, "forward"),
        ("nft_table = \"a-b\"", 1, "nft_table"),
        ("existing = \"drop\"", 1, "existing"),
        ("[bosh]\ndri = \"/x\"", 2, "dri"),
        ("[bosh]\ndir = \"x\"", 2, "absolute"),
        ("bosh = true", 1, "[bosh]"),
        ("backend = \"iptables\"", 1, "nftables"),
        ("[target.x]\nendpoints = []\nallow = []\ngrants = \"yes\"", 4, "grants"),
        ("[target.x]\nendpoints = [5]\nallow = []", 2, "endpoint"),
        ("[target.x]\nendpoints = []\nallow = [{ cgroup = \"/a\" }]", 3, "user"),
        ("[target.x]\nendpoints = []\nallow = [{ kernel = false }]", 3, "kernel"),
        ("[target.x]\nallow = []", 1, "endpoints"),
        ("[target.\"a b\"]\nendpoints = []\nallow = []", 1, "target name"),
        ("a = [", 1, "toml"),
    ] {
        match parse(text) {
            Ok(config) => panic!("{text:?} was taken for {config:?}"),
            Err(error) => {
                assert!(error.contains(&format!("{PATH}:{line}")), "{text:?}: {error}");
                assert!(error.contains(says) || says == "toml", "{text:?}: {error}");
                assert!(!error.contains('\n'), "{text:?}: {error}");
            }
        }
    }
}

#[test]
fn passwords_are_never_shown() {
    let config = parse("[target.bus]\nendpoints = [\"nats://me:secret@nats.example:4222\"]\nallow = []\n");
    assert!(config.is_ok(), "{config:?}");
    let shown = config.as_ref().map(Config::show).unwrap_or_default();
    let json = config
        .as_ref()
        .ok()
        .and_then(|config| serde_json::to_string(config).ok())
        .unwrap_or_default();
    for text in [shown, json, format!("{config:?}")] {
        assert!(text.contains("nats.example") && !text.contains("secret"), "{text}");
    }
}

#[test]
fn b1_without_targets_bosh_is_there() {
    let dir = |text: &str| parse(text).map(|config| config.bosh.map(|bosh| bosh.dir.display().to_string()));
    let default = || Ok(Some("/var/vcap/bosh".to_owned()));
    assert_eq!(dir(""), default());
    assert_eq!(dir("mode = \"audit\""), default());
    assert_eq!(dir("[target]"), default());
    assert_eq!(dir("[bosh]\ndir = \"/x\""), Ok(Some("/x".to_owned())));
    let target = "[target.a]\nendpoints = []\nallow = []\n";
    assert_eq!(dir(target), Ok(None));
    assert_eq!(dir(&format!("[bosh]\n{target}")), default());
}

#[test]
fn the_state_directory_is_found_in_a_bad_file() -> std::io::Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    let default = "/var/lib/enforcer";
    for (text, expected) in [
        ("", Some(default)),
        ("state_dir = \"/x\"", Some("/x")),
        ("\"state_dir\" = '/x'\nmode = 5", Some("/x")),
        ("'state_dir' = \"\"\"\n/x\"\"\"\n[dns]", Some("/x")),
        (
            "mode = 5\nnonsense = [\n state_dir = \"/x/./y\" # so\n[[[",
            Some("/x/y"),
        ),
        ("mode =\n \"state_dir\" = \"/x\"", Some("/x")),
        // Another instance's is none of this one's.
        ("state_dir = \"relative\"", None),
        ("\"state_dir\" = 5\nmode =", None),
        ("[dns]\nstate_dir = \"/x\"", Some(default)),
    ] {
        std::fs::write(file.path(), text)?;
        assert_eq!(
            super::state_dir(file.path()).as_deref(),
            expected.map(Path::new),
            "{text}"
        );
    }
    let none = super::state_dir(Path::new("/no/such/file"));
    assert_eq!(none.as_deref(), Some(Path::new(default)));
    Ok(())
}

#[test]
fn an_instance_is_found_by_its_own_lines() -> std::io::Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    let found = |text: &str, lenient| {
        std::fs::write(file.path(), text)?;
        let place = super::place(file.path(), lenient);
        std::io::Result::Ok(place.map(|place| (place.socket, place.nft_table, place.pin_dir)))
    };
    let default = super::Settings::default();
    let all = |socket: &str, table: &str| Some((socket.into(), table.to_owned(), default.pin_dir.clone()));
    let socket = default.socket.display().to_string();
    assert_eq!(
        found("mode = 5\nsocket = \"/x\"\nnft_table = \"t\"\n[[[", false)?,
        all("/x", "t")
    );
    assert_eq!(
        found("socket_of = 5\n[dns]\nsocket = \"/x\"", false)?,
        all(&socket, "enforcer")
    );
    // A line that names another place is not taken for none.
    for wrong in [
        "socket = 5",
        "pin_dir = \"/a.b\"",
        "nft_table = \"a-b\"",
        "cgroup = \"x\"",
    ] {
        assert_eq!(found(wrong, false)?, None, "{wrong}");
        assert_eq!(found(wrong, true)?, all(&socket, "enforcer"), "{wrong}");
    }
    assert!(super::place(Path::new("/no/such/file"), true).is_none());
    Ok(())
}
