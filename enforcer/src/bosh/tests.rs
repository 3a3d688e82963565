//! Settings as agents write them, and as they must not be: the message bus found, every fault named, no credential shown.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::Path,
};

use super::{MAX_BYTES, Settings, Watch, read_of};

type Test = Result<(), Box<dyn std::error::Error>>;

/// Who runs this, in root's place: what it makes is its own.
fn me() -> u32 {
    nix::unistd::geteuid().as_raw()
}

fn read(dir: &Path) -> Settings {
    read_of(me(), dir)
}

fn dir() -> Result<tempfile::TempDir, std::io::Error> {
    tempfile::tempdir()
}

fn endpoints(settings: &Settings) -> Option<Vec<String>> {
    let bus = settings.bus.as_ref()?;
    Some(bus.endpoints.iter().map(ToString::to_string).collect())
}

fn fault(settings: &Settings) -> String {
    settings.fault.as_ref().map(ToString::to_string).unwrap_or_default()
}

/// What is found with these two files, `-` for none.
fn found(update: &str, main: &str) -> Result<Settings, std::io::Error> {
    let dir = dir()?;
    for (name, text) in [("update_settings.json", update), ("settings.json", main)] {
        if text != "-" {
            fs::write(dir.path().join(name), text)?;
        }
    }
    Ok(read(dir.path()))
}

#[test]
fn b2_a_bad_url_leaves_the_others() -> Test {
    let settings = found(
        "-",
        r#"{"env":{"bosh":{"mbus":{"urls":["nats://u:hunter2@a:1","nats://u:hunter2@b"]}}}}"#,
    )?;
    assert_eq!(endpoints(&settings), Some(vec!["tcp://a:1".to_owned()]));
    let fault = fault(&settings);
    assert!(
        fault.contains('b') && fault.contains("port") && !fault.contains("hunter2"),
        "{fault}"
    );
    Ok(())
}

#[test]
fn b2_the_first_non_empty_counts() -> Test {
    let update = r#"{"mbus":{"urls":["nats://a:1"],"cert":{}}}"#;
    let main = r#"{"agent_id":"x","mbus":"nats://c:3","env":{"bosh":{"mbus":{"urls":["nats://b:2","nats://b:22"]}}}}"#;
    let old = r#"{"mbus":"nats://c:3","env":{"bosh":{}}}"#;
    for (update, main, expected) in [
        (update, main, Some(vec!["tcp://a:1"])),
        ("-", main, Some(vec!["tcp://b:2", "tcp://b:22"])),
        ("{}", main, Some(vec!["tcp://b:2", "tcp://b:22"])),
        (r#"{"mbus":{"urls":[]}}"#, old, Some(vec!["tcp://c:3"])),
        (r#"{"mbus":{"urls":[""," "]}}"#, old, Some(vec!["tcp://c:3"])),
        (r#"{"mbus":null}"#, old, Some(vec!["tcp://c:3"])),
        (update, "-", Some(vec!["tcp://a:1"])),
        (update, "broken", Some(vec!["tcp://a:1"])),
        ("-", r#"{"mbus":"https://me:secret@0.0.0.0:6868"}"#, Some(vec![])),
        ("-", r#"{"mbus":"HTTPS://x"}"#, Some(vec![])),
        ("-", r#"{"mbus":""}"#, None),
        ("-", "{}", None),
        ("-", "-", None),
    ] {
        let settings = found(update, main)?;
        let expected = expected.map(|list| list.into_iter().map(str::to_owned).collect());
        assert_eq!(endpoints(&settings), expected, "{update} {main}");
        assert_eq!(settings.fault.is_some(), expected.is_none(), "{update} {main}");
    }
    let fallback = found("broken", old)?;
    assert_eq!(endpoints(&fallback), Some(vec!["tcp://c:3".to_owned()]));
    assert!(
        fault(&fallback).contains("update_settings.json"),
        "{}",
        fault(&fallback)
    );
    Ok(())
}

#[test]
fn b2_every_form_of_a_url() -> Test {
    for (url, expected) in [
        ("nats://me:secret@10.0.0.5:4222", "tcp://10.0.0.5:4222"),
        ("nats://me:s%2Fecret@nats.example:4222/", "tcp://nats.example:4222"),
        ("tls://[2001:db8::5]:4222", "tcp://[2001:db8::5]:4222"),
        ("nats://[::ffff:10.0.0.5]:4222", "tcp://10.0.0.5:4222"),
        ("tcp://me:secret@Nats.Example.:4222", "tcp://nats.example:4222"),
        ("NATS://127.0.0.1:4222", "tcp://127.0.0.1:4222"),
    ] {
        let settings = found("-", &serde_json::json!({ "mbus": url }).to_string())?;
        assert_eq!(
            endpoints(&settings),
            Some(vec![expected.to_owned()]),
            "{url} {}",
            fault(&settings)
        );
    }
    let twice = found(
        "-",
        r#"{"env":{"bosh":{"mbus":{"urls":["nats://a:1","tls://A.:1","https://b"]}}}}"#,
    )?;
    assert_eq!(endpoints(&twice), Some(vec!["tcp://a:1".to_owned()]));
    for (url, says) in [
        ("nats://me:secret@nats.example", "nats.example"),
        ("nats://me:secret@nats.example", "no port"),
        ("nats://me:secret@nats.example:0", "port"),
        ("nats://me:secret@nats.example:99999", "99999"),
        ("amqp://me:secret@nats.example:4222", "amqp://nats.example:4222"),
        ("http://me:secret@nats.example:4222", "scheme"),
        ("secret@nats.example:4222", "no scheme"),
        ("nats://me:se/cret@nats.example:4222", "percent-encode"),
        ("nats://10.0.0.0/8:4222", "neither an address nor a name"),
        ("nats://local:4222", "neither an address nor a name"),
        ("nats://0.0.0.0:4222", "unspecified"),
        ("nats://2001:db8::5:4222", "brackets"),
        ("nats://:4222", "no host"),
    ] {
        let settings = found("-", &serde_json::json!({ "mbus": url }).to_string())?;
        let fault = fault(&settings);
        assert_eq!(endpoints(&settings), None, "{url}");
        assert!(
            fault.contains(says) && fault.contains("settings.json: "),
            "{url}: {fault}"
        );
        assert!(
            !fault.contains("secret") && !format!("{settings:?}").contains("secret"),
            "{fault}"
        );
    }
    Ok(())
}

#[test]
fn b2_faults_name_file_and_place_and_no_value() -> Test {
    let long = format!("{{\"mbus\":\"{}\"}}", "x".repeat(MAX_BYTES));
    for (text, says) in [
        ("", "line 1 column 0"),
        ("{\"mbus\":\"nats://me:secret@", "line 1 column"),
        ("{\"mbus\":\"nats://me:secret@a:1\",\n}", "line 2"),
        ("\u{0}\u{1}", "line 1"),
        ("\"nats://me:secret@a:1\"", "the whole is a string instead of an object"),
        ("[]", "the whole is a list"),
        (
            "{\"mbus\":[\"nats://me:secret@a:1\"]}",
            "mbus is a list instead of a string",
        ),
        ("{\"mbus\":5}", "mbus is a number"),
        (
            "{\"env\":{\"bosh\":{\"mbus\":\"secret\"}}}",
            "env.bosh.mbus is a string instead of an object",
        ),
        (
            "{\"env\":{\"bosh\":{\"mbus\":{\"urls\":\"secret\"}}}}",
            "env.bosh.mbus.urls is a string",
        ),
        (
            "{\"env\":{\"bosh\":{\"mbus\":{\"urls\":[5]}}}}",
            "is a number instead of strings only",
        ),
        (&long, "8 MiB"),
    ] {
        let settings = found("-", text)?;
        let fault = fault(&settings);
        assert!(settings.bus.is_none() && fault.contains(says), "{says:?}: {fault}");
        assert!(!fault.contains("secret") && fault.contains("settings.json"), "{fault}");
        assert!(!fault.contains('\n'), "{fault}");
    }
    let nested = "[".repeat(1 << 16);
    assert!(fault(&found("-", &nested)?).contains("recursion"));
    let many: Vec<String> = (0..300).map(|number| format!("nats://a:{}", number + 1)).collect();
    let many = serde_json::json!({ "mbus": { "urls": many } }).to_string();
    assert!(fault(&found(&many, "-")?).contains("256"));
    Ok(())
}

#[test]
fn b2_the_file_that_was_read_is_named() -> Test {
    let dir = dir()?;
    let (inner, outer) = (
        dir.path().join("settings/settings.json"),
        dir.path().join("settings.json"),
    );
    fs::write(&outer, "{}")?;
    let silent = || {
        read(dir.path())
            .fault
            .map(|error| (error.path, error.fault.to_string()))
    };
    let said = silent().ok_or("no fault")?;
    assert!(said.0 == outer && said.1.contains("set mbus"), "{said:?}");
    fs::create_dir(dir.path().join("settings"))?;
    fs::write(&inner, "{}")?;
    assert_eq!(silent().map(|said| said.0), Some(inner));
    Ok(())
}

#[test]
fn b2_only_a_file_of_roots_own_counts() -> Test {
    let dir = dir()?;
    let path = dir.path().join("settings.json");
    let now = || fault(&read(dir.path()));
    assert!(now().contains("no such file"), "{}", now());
    fs::create_dir(&path)?;
    assert!(now().contains("not a regular file"), "{}", now());
    fs::remove_dir(&path)?;
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR)?;
    assert!(now().contains("not a regular file"), "{}", now());
    fs::remove_file(&path)?;
    let elsewhere = dir.path().join("elsewhere");
    fs::write(&elsewhere, r#"{"mbus":"nats://a:1"}"#)?;
    symlink(&elsewhere, &path)?;
    assert!(now().contains("symbolic link"), "{}", now());
    fs::remove_file(&path)?;
    fs::rename(&elsewhere, &path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    assert_eq!(now(), "");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o602))?;
    assert!(now().contains("0602") && now().contains("not trusted"), "{}", now());
    // Root's group may write, no other.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o620))?;
    assert_eq!(now().is_empty(), path.metadata()?.gid() == 0, "{}", now());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    let anothers = fault(&read_of(me() + 1, dir.path()));
    assert!(anothers.contains(&format!("uid {}", me())), "{anothers}");
    Ok(())
}

#[test]
fn b2_the_directory_below_counts_first() -> Test {
    let dir = dir()?;
    fs::write(dir.path().join("settings.json"), r#"{"mbus":"nats://old:1"}"#)?;
    let below = dir.path().join("settings");
    fs::create_dir(&below)?;
    assert_eq!(endpoints(&read(dir.path())), Some(vec!["tcp://old:1".to_owned()]));
    fs::write(below.join("settings.json"), r#"{"mbus":"nats://new:1"}"#)?;
    assert_eq!(endpoints(&read(dir.path())), Some(vec!["tcp://new:1".to_owned()]));
    fs::write(below.join("settings.json"), "{")?;
    let settings = read(dir.path());
    assert!(settings.bus.is_none() && fault(&settings).contains("settings/settings.json"));
    Ok(())
}

/// Waits for inotify alone.
async fn told(watch: &mut Watch, what: &str) {
    let told = tokio::time::timeout(std::time::Duration::from_secs(5), watch.changed()).await;
    assert!(told.is_ok(), "{what} was not told");
    watch.look();
}

#[tokio::test]
async fn what_comes_late_and_by_rename_is_told() -> Test {
    let dir = dir()?;
    let agent = dir.path().join("var/vcap/bosh");
    let (mut watch, error) = Watch::start(&agent);
    assert!(error.is_none(), "{error:?}");
    assert!(watch.look() && !watch.look());
    for part in ["var", "var/vcap", "var/vcap/bosh", "var/vcap/bosh/settings"] {
        fs::create_dir(dir.path().join(part))?;
        told(&mut watch, part).await;
    }
    for at in [agent.join("settings.json"), agent.join("settings/settings.json")] {
        let aside = dir.path().join("aside");
        fs::write(&aside, "{}")?;
        replace(&aside, &at)?;
        told(&mut watch, "a rename").await;
        fs::write(&aside, "{ }")?;
        replace(&aside, &at)?;
        assert!(watch.look(), "another file of the same name");
        fs::write(&at, "{}")?;
        told(&mut watch, "a write").await;
    }
    fs::remove_dir_all(&agent)?;
    told(&mut watch, "a removal").await;
    fs::create_dir(&agent)?;
    told(&mut watch, "the directory again").await;
    Ok(())
}

fn replace(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::rename(from, to)
}
