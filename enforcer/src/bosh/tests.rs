//! Settings as agents write them, and as they must not be: the message bus found, every fault named, no credential
//! shown.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::Path,
};

use super::{AgentSettings, MAX_BYTES, Watch, read_of};
use crate::policy::Endpoint;

type Test = Result<(), Box<dyn std::error::Error>>;

/// Who runs this, in root's place: what it makes is its own.
fn me() -> u32 {
    nix::unistd::geteuid().as_raw()
}

fn read(dir: &Path) -> AgentSettings {
    read_of(me(), dir)
}

fn dir() -> Result<tempfile::TempDir, std::io::Error> {
    tempfile::tempdir()
}

fn endpoints(settings: &AgentSettings) -> Option<Vec<String>> {
    let bus = settings.bus.as_ref()?;
    Some(bus.endpoints.iter().map(ToString::to_string).collect())
}

fn fault(settings: &AgentSettings) -> String {
    settings.fault().unwrap_or_default()
}

/// What is found with these two files, `-` for none.
fn found(update: &str, main: &str) -> Result<AgentSettings, std::io::Error> {
    let dir = dir()?;
    for (name, text) in [("update_settings.json", update), ("settings.json", main)] {
        if text != "-" {
            fs::write(dir.path().join(name), text)?;
        }
    }
    Ok(read(dir.path()))
}

/// Checks the endpoints that settings name, with what is said of a fault, or nothing.
fn check(update: &str, main: &str, expected: &str, says: &str) -> Test {
    let settings = found(update, main)?;
    let endpoints = endpoints(&settings).map(|endpoints| endpoints.join(" "));
    assert_eq!(endpoints.as_deref().unwrap_or("-"), expected, "{update} {main}");
    let fault = fault(&settings);
    assert_eq!(fault.is_empty(), says.is_empty(), "{main}: {fault}");
    assert!(fault.contains(says), "{says}: {fault}");
    assert!(
        !fault.contains("hunter2") && !format!("{settings:?}").contains("hunter2"),
        "{fault}"
    );
    Ok(())
}

#[test]
fn b2_what_makes_no_sense_costs_only_itself() -> Test {
    let beside = |env: &str| format!(r#"{{"mbus":"nats://u:hunter2@a:1","env":{env}}}"#);
    let urls = |urls: &str| beside(&format!(r#"{{"bosh":{{"mbus":{{"urls":{urls}}}}}}}"#));
    for (main, expected, says) in [
        (
            beside(r#""hunter2""#),
            "tcp://a:1",
            "env is a string instead of an object",
        ),
        (
            beside(r#"{"bosh":{"mbus":"hunter2"}}"#),
            "tcp://a:1",
            "env.bosh.mbus is a string instead of an object",
        ),
        (urls(r#""nats://u:hunter2@b:2""#), "tcp://a:1 tcp://b:2", ""),
        (urls("7"), "tcp://a:1", "env.bosh.mbus.urls is a number instead of"),
        (
            urls(r#"["nats://b:2",7]"#),
            "tcp://a:1 tcp://b:2",
            "env.bosh.mbus.urls[1] is a number",
        ),
        (
            urls(r#"["amqp://u:hunter2@c:3","nats://b:2"]"#),
            "tcp://a:1 tcp://b:2",
            "env.bosh.mbus.urls[0]: message-bus URL amqp://c:3: the scheme",
        ),
        (
            urls(r#"["hunter2","nats://b:2"]"#),
            "tcp://a:1 tcp://b:2",
            "urls[0]: message-bus URL …: no scheme",
        ),
        (
            r#"{"mbus":{"urls":["nats://a:1"]},"env":{"bosh":{"mbus":{"urls":["nats://b:2"]}}}}"#.to_owned(),
            "tcp://b:2",
            "mbus is an object",
        ),
    ] {
        check("-", &main, expected, says)?;
    }
    Ok(())
}

#[test]
fn b2_several_servers_in_one_string() -> Test {
    for (url, expected, says) in [
        (
            "nats://nats:hunter2@10.0.0.11:4222,nats:hunter2@10.0.0.12:4222",
            "tcp://10.0.0.11:4222 tcp://10.0.0.12:4222",
            "",
        ),
        (
            "nats://10.0.0.11:4222, tls://u:hunter2@10.0.0.12,[2001:db8::5]:1,u:hunter2@c,",
            "tcp://10.0.0.11:4222 tcp://10.0.0.12:4222 tcp://[2001:db8::5]:1 tcp://c:4222",
            "",
        ),
        ("u:hunter2@a:1,b:2", "tcp://a:1 tcp://b:2", ""),
        ("nats://a,b", "tcp://a:4222 tcp://b:4222", ""),
        ("nats://a:1,https://u:hunter2@b:2", "tcp://a:1", ""),
        ("nats://a:1,b:99999,c:3", "tcp://a:1 tcp://c:3", "b:99999"),
        // A comma in credentials: the server behind them counts, what stands before it is shown nowhere.
        (
            "nats://u:hunter2,hunter2@a:1",
            "tcp://a:1",
            "…: a comma separates servers",
        ),
        ("nats://hunter2,hunter2,x@a:1", "tcp://a:1", "%2C"),
    ] {
        let main = serde_json::json!({ "mbus": url }).to_string();
        check("-", &main, expected, says)?;
    }
    Ok(())
}

#[test]
fn b2_the_bus_is_the_union_of_all_places() -> Test {
    let update = r#"{"mbus":{"urls":["nats://a:1"],"cert":{}}}"#;
    let main = r#"{"agent_id":"x","mbus":"nats://c:3","env":{"bosh":{"mbus":{"urls":["nats://b:2","nats://b:22"]}}}}"#;
    let old = r#"{"mbus":"nats://c:3","env":{"bosh":{}}}"#;
    for (update, main, expected, says) in [
        (update, main, "tcp://a:1 tcp://b:2 tcp://b:22 tcp://c:3", ""),
        ("{}", main, "tcp://b:2 tcp://b:22 tcp://c:3", ""),
        (r#"{"mbus":{"urls":["", " "]}}"#, old, "tcp://c:3", ""),
        (r#"{"mbus":null}"#, old, "tcp://c:3", ""),
        (update, "-", "tcp://a:1", "settings.json: no such file"),
        (
            update,
            "broken",
            "tcp://a:1",
            "settings.json: invalid or incomplete JSON",
        ),
        (
            "broken",
            old,
            "tcp://c:3",
            "update_settings.json: invalid or incomplete JSON",
        ),
        ("-", r#"{"mbus":"HTTPS://me:hunter2@0.0.0.0:6868"}"#, "", ""),
        ("-", r#"{"mbus":""}"#, "-", "names a message bus"),
        ("-", "-", "-", "no such file"),
    ] {
        check(update, main, expected, says)?;
    }
    Ok(())
}

#[test]
fn b2_a_byte_that_is_no_utf8_costs_at_most_its_url() -> Test {
    let dir = dir()?;
    for (text, expected) in [
        (
            &b"{\"vm\":{\"name\":\"M\xfcller\"},\"mbus\":\"nats://a:1\"}"[..],
            "tcp://a:1",
        ),
        (b"{\"mbus\":\"nats://u:\xe9@a:1\"}", "tcp://a:1"),
        (b"{\"mbus\":[\"nats://\xe9:1\",\"nats://a:1\"]}", "tcp://a:1"),
    ] {
        fs::write(dir.path().join("settings.json"), text)?;
        let settings = read(dir.path());
        assert_eq!(endpoints(&settings), Some(vec![expected.to_owned()]));
        assert_eq!(
            settings.faults.is_empty(),
            !text.contains(&b'['),
            "{}",
            fault(&settings)
        );
    }
    Ok(())
}

#[test]
fn b2_what_a_fault_leaves_of_a_known_bus() -> Test {
    let known = ["nats://known:1"]
        .map(Endpoint::parse)
        .into_iter()
        .collect::<Result<BTreeSet<_>, _>>()?;
    let after = |main: &str| -> Result<String, std::io::Error> {
        let bus = found("-", main)?.after(Some(&known)).unwrap_or_default();
        let shown: Vec<String> = bus.endpoints.iter().map(ToString::to_string).collect();
        Ok(shown.join(" "))
    };
    assert_eq!(after(r#"{"mbus":"nats://a:1"}"#)?, "tcp://a:1");
    assert_eq!(after(r#"{"mbus":["nats://a:1",7]}"#)?, "tcp://a:1 tcp://known:1");
    assert_eq!(after("{}")?, "tcp://known:1");
    assert_eq!(after("")?, "tcp://known:1");
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
        ("nats://me:secret@nats.example", "tcp://nats.example:4222"),
        ("tls://[2001:db8::5]/", "tcp://[2001:db8::5]:4222"),
        ("me:secret@nats.example:4222", "tcp://nats.example:4222"),
        ("10.0.0.5", "tcp://10.0.0.5:4222"),
    ] {
        let settings = found("-", &serde_json::json!({ "mbus": url }).to_string())?;
        assert_eq!(
            endpoints(&settings),
            Some(vec![expected.to_owned()]),
            "{url} {}",
            fault(&settings)
        );
        assert!(settings.faults.is_empty(), "{url} {}", fault(&settings));
    }
    let twice = found(
        "-",
        r#"{"env":{"bosh":{"mbus":{"urls":["nats://a:1","tls://A.:1","https://b"]}}}}"#,
    )?;
    assert_eq!(endpoints(&twice), Some(vec!["tcp://a:1".to_owned()]));
    for (url, says) in [
        ("nats://me:secret@nats.example:0", "port"),
        ("nats://me:secret@nats.example:99999", "99999"),
        ("amqp://me:secret@nats.example:4222", "amqp://nats.example:4222"),
        ("http://me:secret@nats.example:4222", "scheme"),
        ("secret", "no scheme"),
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
            "{\"mbus\":{\"secret\":\"nats://me:secret@a:1\"}}",
            "mbus is an object instead of a string or a list of strings",
        ),
        ("{\"mbus\":5}", "mbus is a number"),
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
    let many = found(&many, "{}")?;
    assert!(fault(&many).contains("256"));
    assert_eq!(endpoints(&many).map(|endpoints| endpoints.len()), Some(256));
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
            .faults
            .pop()
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
    assert_eq!(read(dir.path()).after(None), None);
    // Root's group may write; what another may counts only as long as nothing is known.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o620))?;
    assert_eq!(now().is_empty(), path.metadata()?.gid() == 0, "{}", now());
    std::os::unix::fs::chown(&path, None, Some(other_group()?))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o620))?;
    let doubtful = read(dir.path());
    assert!(fault(&doubtful).contains("0620 lets group"), "{}", fault(&doubtful));
    let first = doubtful.after(None).ok_or("not protected at first")?;
    assert_eq!(
        first.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["tcp://a:1"]
    );
    let known = BTreeSet::from([Endpoint::parse("nats://known:1")?]);
    let later = doubtful.after(Some(&known)).ok_or("what was known is open")?;
    assert_eq!(later.endpoints, known);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    let anothers = fault(&read_of(me() + 1, dir.path()));
    assert!(anothers.contains(&format!("uid {}", me())), "{anothers}");
    Ok(())
}

/// One that this may give a file to, and not root's.
fn other_group() -> Result<u32, Box<dyn std::error::Error>> {
    if me() == 0 {
        return Ok(1);
    }
    let mut groups = nix::unistd::getgroups()?.into_iter().map(nix::unistd::Gid::as_raw);
    Ok(groups
        .find(|group| *group != 0)
        .unwrap_or(nix::unistd::getegid().as_raw()))
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
    assert_eq!(endpoints(&settings), Some(vec!["tcp://old:1".to_owned()]));
    assert!(settings.is_unfinished() && fault(&settings).contains("settings/settings.json"));
    Ok(())
}

/// Waits for word of it, without a look now and then.
async fn told(watch: &mut Watch, what: &str) {
    let told = tokio::time::timeout(std::time::Duration::from_secs(5), watch.changed()).await;
    assert!(told.is_ok(), "{what} was not told");
    watch.poll_changed();
}

#[tokio::test]
async fn what_comes_late_and_by_rename_is_told() -> Test {
    let dir = dir()?;
    let agent = dir.path().join("var/vcap/bosh");
    let (mut watch, errors) = Watch::start(&agent);
    assert!(errors.is_empty(), "{errors:?}");
    assert!(watch.poll_changed() && !watch.poll_changed());
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
        assert!(watch.poll_changed(), "another file of the same name");
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
