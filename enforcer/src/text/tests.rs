//! Every character that could steer a terminal, in every string of every report.

use std::sync::LazyLock;

use unicode_general_category::{GeneralCategory, get_general_category};

use super::*;
use crate::wire::{Denial, Event, Status, Verification};

/// Control, format and separator characters, by Unicode's table and not by ours.
fn steers(c: char) -> bool {
    use GeneralCategory::{Control, Format, LineSeparator, ParagraphSeparator};
    matches!(
        get_general_category(c),
        Control | Format | LineSeparator | ParagraphSeparator
    )
}

/// All of them, each between two letters.
static POISON: LazyLock<String> = LazyLock::new(|| {
    let all = (0..=u32::from(char::MAX))
        .filter_map(char::from_u32)
        .filter(|c| steers(*c));
    all.flat_map(|c| ['x', c]).collect::<String>() + "x"
});

#[test]
fn what_steers_is_escaped_and_the_rest_stays() {
    for made in [
        line(&POISON),
        lines(&POISON),
        json_text(&POISON),
        toml_text(&POISON),
        name(&POISON),
    ] {
        let left: Vec<char> = made.chars().filter(|c| steers(*c) && *c != '\n').collect();
        assert!(left.is_empty(), "{left:?}");
    }
    assert!(!line(&POISON).contains('\n') && !json_text(&POISON).contains('\n') && !name(&POISON).contains('\n'));
    assert!(matches!(line("/system.slice/a\\x2db «é» 漢"), Cow::Borrowed(_)));
    assert_eq!(line("a\u{1b}[2J\nb\u{202e}"), "a\\u{1b}[2J\\nb\\u{202e}");
    assert_eq!(lines("a\n\tb"), "a\n\\tb");
    assert_eq!(
        (name("kworker/u8:3"), name("a) uid 0 (")),
        ("kworker/u8:3".into(), "\"a) uid 0 (\"".into())
    );
}

#[test]
fn json_and_toml_mean_the_same_as_before() -> Result<(), Box<dyn std::error::Error>> {
    let back: String = serde_json::from_str(&json(&*POISON)?)?;
    assert_eq!(back, *POISON);
    let mut table = toml::Table::new();
    table.insert("key".to_owned(), toml::Value::String(POISON.clone()));
    let back: toml::Table = toml::from_str(&toml_text(&table.to_string()))?;
    assert_eq!(back, table);
    Ok(())
}

/// Whatever string of a report others chose: it stays within its line.
fn check<T: Serialize + serde::de::DeserializeOwned>(
    sample: &str,
    render: impl Fn(&T) -> String,
) -> Result<(), Box<dyn std::error::Error>> {
    let clean: serde_json::Value = serde_json::from_str(sample)?;
    let written = render(&serde_json::from_value(clean.clone())?);
    let mut tried = 0;
    for index in 0.. {
        let (mut value, mut left) = (clean.clone(), index);
        let Some(leaf) = leaf(&mut value, &mut left) else { break };
        *leaf = serde_json::Value::String(POISON.clone());
        // An enumeration takes none.
        let Ok(poisoned) = serde_json::from_value::<T>(value) else {
            continue;
        };
        tried += 1;
        let text = render(&poisoned);
        assert!(!text.chars().any(|c| steers(c) && c != '\n'), "{text:?}");
        assert!(text.lines().count() <= written.lines().count() + 2, "{text}");
        assert!(!json(&poisoned)?.chars().any(steers));
    }
    assert!(tried > 3, "{tried} strings");
    Ok(())
}

/// The so-manyeth string of a value.
fn leaf<'a>(value: &'a mut serde_json::Value, left: &mut usize) -> Option<&'a mut serde_json::Value> {
    use serde_json::Value;
    match value {
        Value::String(_) if *left == 0 => Some(value),
        Value::String(_) => {
            *left -= 1;
            None
        }
        Value::Array(all) => all.iter_mut().find_map(|one| leaf(one, left)),
        Value::Object(all) => all.values_mut().find_map(|one| leaf(one, left)),
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

#[test]
fn every_string_of_a_report_stays_within_its_line() -> Result<(), Box<dyn std::error::Error>> {
    check(STATUS, Status::render)?;
    check(VERIFICATION, Verification::render)?;
    check(GRANTS, crate::cli::grants::render)?;
    check::<Denial>(EVENT, |event| {
        line(&Event::Denial(event.clone()).to_string()).into_owned()
    })
}

const STATUS: &str = r#"{"schema":"enforcer/status/1","state":"degraded","causes":["C"],"backend":"both","backend_reason":"R","subject":"task+socket","mode":"enforce",
"generation":3,"daemon":{"running":true,"pid":7},"cgroup":"/c","pin_dir":"/p","nft_table":"t","restored":1,"endpoints":2,
"targets":[{"name":"bus","endpoints":2,"allow":["root","user 7 in /x"],"allowed":1,"denied":2,"would_deny":0}],
"names":[{"name":"nats.example","addresses":["10.0.0.1"],"stale":true,"cause":"no answer"}],"events_lost":3,
"existing":{"action":"report","time":"T","generation":3,"found":2,"cut":0,"connections":[{"schema":"enforcer/existing/1","time":"T","verdict":"deny",
"action":"reported","reason":"R","protocol":"tcp","state":"established","local":"L","remote":"R","uid":7,"cgroup_id":1,"target":"bus","generation":3}]}}"#;

const VERIFICATION: &str = r#"{"schema":"enforcer/verify/1","identical":false,"against":"daemon","backend":"both","generation":3,"compared":9,"counts":{"map ports":2},
"differences":[{"object":"nft set s","kind":"changed","entry":"e","wanted":"w","found":"f"},{"object":"link","kind":"extra","entry":"e","wanted":null,"found":"f"}]}"#;

const GRANTS: &str = r#"{"schema":"enforcer/grants/1","limit":9,"grants":[{"target":"monit","user":null,"cgroup":"/a","cgroup_exists":true,"cgroup_writable":"/a is of user 7",
"active":true,"since":"T","expires":"T","pid":7,"uid":0,"comm":"sh"}],"job_rules":[{"handle":7,"user":7,"cgroup":"/a","ignored":"/a is of user 7"}]}"#;

const EVENT: &str = r#"{"schema":"enforcer/event/1","time":"T","verdict":"deny","backend":"ebpf","pid":7,"tid":7,"comm":"sh","kernel_thread":false,"task_uid":7,"socket_uid":8,
"cgroup_id":1,"netns_cookie":1,"source":null,"protocol":"tcp","dialled":"10.0.0.1:1","judged":"10.0.0.1:2","target":"bus","generation":3}"#;
