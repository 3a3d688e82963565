//! The file as read: defaults, lines, what is shown.

use std::path::Path;

use super::{Config, Mistake};

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
        ("moed = \"audit\"", 1, "known keys are mode, "),
        ("[dns]\nmoed = 1", 2, "known keys are min_refresh, "),
        ("[bosh]\nmoed = 1", 2, "known keys are dir"),
        ("[target.x]\nmoed = 1", 2, "known keys are endpoints, "),
        ("[target.x]\nallow = [\n{ moed = 1 }]", 3, "known keys are user, "),
        ("\nmode = \"strict\"", 2, "mode has an unknown value"),
        ("mode = 5", 1, "\"enforce\" or \"audit\""),
        ("socket = 99999999999999999999", 1, "64 bits"),
        ("nat64 = [\n\"::/96\"]", 2, "nat64"),
        (
            "mode = \"audit\"\nnat64 = [\"2001:db8:1::/96\", \"2001:db8:2::/96\", \"2001:db8:3::/96\", \
             \"2001:db8:4::/96\"]",
            2,
            "nat64 names 4",
        ),
        ("dns = []", 1, "a section [dns]"),
        ("dns = [\"5s\", \"1m\", \"1h\", \"open\"]", 1, "a section [dns]"),
        ("bosh = [\"/x\"]", 1, "a section [bosh]"),
        ("[target]\nx = [[], []]", 2, "a section [target.NAME]"),
        ("[[target]]", 1, "sections [target.NAME]"),
        ("mode = \"audit\"\nmode = \"audit\"", 2, "mode appears twice"),
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
        ("[target.\"a b\"]\nendpoints = []\nallow = []", 1, "target has a name"),
        ("a = [", 1, "toml"),
    ] {
        let mistakes = match Config::parse(text, Path::new(PATH)) {
            Ok(config) => panic!("{text:?} was taken for {config:?}"),
            Err(error) => error.mistakes().map(super::Mistakes::lines).unwrap_or_default(),
        };
        let place = format!("{PATH}:{line}: ");
        let is_it = |mistake: &&String| mistake.starts_with(&place) && (mistake.contains(says) || says == "toml");
        let it = mistakes.iter().find(is_it);
        assert!(it.is_some_and(|it| !it.contains('\n')), "{text:?}: {mistakes:?}");
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
        .and_then(|config| serde_json::to_string(&config.tree()).ok())
        .unwrap_or_default();
    for text in [shown, json, format!("{config:?}")] {
        assert!(text.contains("nats.example") && !text.contains("secret"), "{text}");
    }
}

/// Kinds of value, each with a password in it.
const SECRETS: [&str; 18] = [
    "\"hunter2\"",
    "\"nats://me:hunter2@h:1\"",
    "\"\"\"\n/hunter2`\"', expected hunter2\"\"\"",
    "'`hunter2`, expected one of `hunter2`'",
    "[\"hunter2\"]",
    "[[\"nats://me:hunter2@h:1\"]]",
    "[5, \"hunter2\"]",
    "{ a = \"hunter2\" }",
    "{ \"nats://me:hunter2@h:1\" = 5 }",
    "{ user = [\"hunter2\"] }",
    "[{ user = { a = \"hunter2\" } }]",
    "[{ \"nats://me:hunter2@h:1\" = 5 }]",
    "{ endpoints = \"nats://me:hunter2@h:1\" }",
    "73917391",
    "73917391739173917391739173917391",
    "7391.7391",
    "7391-07-31T07:39:17Z",
    "{ a = 73917391 }",
];

#[test]
fn no_message_quotes_a_refused_value() {
    let mut texts = Vec::new();
    for secret in SECRETS {
        let top =
            "mode backend existing cgroup pin_dir state_dir socket forward nft_table nat64 dns bosh target target.x";
        let sections = "dns.min_refresh dns.max_refresh dns.retain dns.unresolved bosh.dir unknown dns.unknown \
            bosh.unknown \
            target.x.endpoints target.x.allow target.x.grants target.x.answers target.x.unknown \
            \"nats://me:hunter2@h:1\" dns.\"nats://me:hunter2@h:1\" target.\"nats://me:hunter2@h:1\" \
            target.x.\"nats://me:hunter2@h:1\"";
        for key in top.split_whitespace().chain(sections.split_whitespace()) {
            texts.push(format!("{key} = {secret}"));
            texts.push(format!("{key} = [\n{secret}]"));
        }
        let lists = "[target.x]\nendpoints = []\nallow = []";
        for key in ["endpoints", "allow"] {
            let list = format!("{key} = [");
            texts.push(lists.replace(&list, &format!("{list} {secret} ")));
            texts.push(lists.replace(&list, &format!("{list} [{secret}] ")));
        }
        let parts = "user group cgroup kernel unknown \"nats://me:hunter2@h:1\"";
        for key in parts.split_whitespace() {
            for more in ["", ", user = \"a\"", ", cgroup = \"/a\"", ", kernel = true"] {
                texts.push(lists.replace("allow = [", &format!("allow = [ {{ {key} = {secret}{more} }} ")));
            }
        }
        // What is no TOML.
        for wrong in ["a = \"\\q", "a = [", "a = 5", "a ", "a = 0x", "\"a\" = 5\n\"a\" = "] {
            texts.push(format!("{wrong}{secret}"));
            let inner = secret.trim_matches(['"', '[', ']', '{', '}', ' ']);
            texts.push(format!("{wrong}{inner}"));
        }
    }
    // A key that looks like one is shown; what else stands in a key's place is not.
    for key in ["\"nats://me:hunter2@h:1\"", "'hunter2 '", "\"hunter2\\u0000\""] {
        texts.push(format!("{key} = 5\n{key} = 5"));
        texts.push(format!("[{key}]\n[{key}]"));
        texts.push(format!("[target.{key}]\n[target.{key}]"));
        texts.push(format!("[[{key}]]\n[{key}]"));
    }
    let mut refused = 0;
    for text in &texts {
        let Err(error) = Config::parse(text, Path::new(PATH)) else {
            continue;
        };
        refused += 1;
        for mistake in error.mistakes().into_iter().flat_map(super::Mistakes::iter) {
            let said = mistake.to_string();
            // Endpoints, and paths of cgroups, are shown as written, but for credentials.
            let secrets: &[&str] = match mistake {
                Mistake::Form { .. } => &["hunter2", "7391"],
                Mistake::Target(_) | Mistake::File(_) => &["me:hunter2"],
            };
            assert!(!secrets.iter().any(|secret| said.contains(secret)), "{text:?}: {said}");
            assert!(
                !said.contains('\n') && said.starts_with(&format!("{PATH}:")),
                "{text:?}: {said}"
            );
        }
    }
    assert!(refused > texts.len() / 2, "{refused} of {}", texts.len());
}

#[test]
fn the_commented_default_is_the_default() {
    let default = parse("").map(|config| config.show());
    assert_eq!(default.as_deref(), Ok(super::show::DEFAULT));
    let written = parse(super::show::DEFAULT).map(|config| config.settings);
    assert_eq!(written, Ok(super::Settings::default()));
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
