//! The file: what is kept comes back; whatever a power cut, a bad block or somebody else leaves is told and not used.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
};

use proptest::prelude::*;

use super::{FILE, LastGood, LastGoodRef, Record, StateError, load_of, parse, save_as};
use crate::{
    config::{Config, Settings, Understood},
    policy::{HostUsers, Policy},
    resolve::{Known, KnownName},
};

type Test = Result<(), Box<dyn std::error::Error>>;

/// Who runs this, in root's place: what it makes is its own.
fn me() -> u32 {
    nix::unistd::geteuid().as_raw()
}

const TOML: &str = r#"
mode = "audit"
backend = "both"
cgroup = "/sys/fs/cgroup/x"
[dns]
retain = "90s"
unresolved = "closed"
[target.bus]
endpoints = ["nats://me:secret@nats.example:4222", "tcp://[2001:db8::5]:4222", "tcp://local:1", "udp://10.0.0.0/8:53", "tcp://[::/0]:9"]
allow = ["root", 999, { group = "root" }, { group = 0 }, { user = 7, cgroup = "/a b/\u00e9" }, { kernel = true }]
[target.empty]
endpoints = []
allow = []
"#;

fn good() -> Result<LastGood, Box<dyn std::error::Error>> {
    let config = Config::parse(TOML, Path::new("x.toml"))?;
    let Understood { policy, listed, .. } = Policy::from_config(&config, &HostUsers)?;
    let known = KnownName {
        current: ["10.9.0.1".parse()?, "2001:db8::9".parse()?].into(),
        left: ["10.9.0.2".parse()?].into(),
        answered: [("10.9.0.1".parse()?, std::time::Duration::from_mins(64))].into(),
    };
    Ok(LastGood {
        settings: config.settings,
        names: policy.names().into_iter().map(|name| (name, known.clone())).collect(),
        policy,
        listed,
        bosh: Some("/var/vcap/bosh".into()),
    })
}

fn record(good: &LastGood) -> Result<Record, std::io::Error> {
    Record::new(&LastGoodRef {
        settings: &good.settings,
        policy: &good.policy,
        listed: &good.listed,
        names: &good.names,
        bosh: good.bosh.as_deref(),
    })
}

/// A state directory with a file, and the file's bytes.
fn kept() -> Result<(tempfile::TempDir, LastGood, Vec<u8>), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let good = good()?;
    save_as(me(), dir.path(), &record(&good)?)?;
    let bytes = fs::read(dir.path().join(FILE))?;
    Ok((dir, good, bytes))
}

#[test]
fn n7_f4_what_is_kept_comes_back() -> Test {
    let (dir, good, bytes) = kept()?;
    let (again, mark) = load_of(me(), dir.path())?.ok_or("nothing")?;
    assert_eq!(again, good);
    assert_eq!(mark, record(&good)?.mark);
    assert!(!String::from_utf8(bytes)?.contains("secret"), "B2");
    assert_eq!(
        fs::metadata(dir.path().join(FILE))?.permissions().mode() & 0o7777,
        0o600
    );
    assert_eq!(fs::read_dir(dir.path())?.count(), 1, "something was left aside");
    let other = LastGood {
        names: Known::new(),
        settings: Settings::default(),
        bosh: None,
        ..good
    };
    save_as(me(), dir.path(), &record(&other)?)?;
    assert_eq!(load_of(me(), dir.path())?.map(|(good, _)| good), Some(other));
    Ok(())
}

#[test]
fn f4_a_file_written_before_is_read_and_written_again_the_same() -> Test {
    // By the version before its shapes were derived, with every word that it knew.
    let mut read = Vec::new();
    for line in include_str!("before.jsonl").lines() {
        let (good, mark) = parse(line.as_bytes(), Path::new(FILE))?;
        let record = record(&good)?;
        assert_eq!(record.mark, mark);
        assert!(
            line.ends_with(&format!("\"content\":{}}}", record.text)),
            "{line}\n{}",
            record.text
        );
        read.push(good);
    }
    let backends: Vec<_> = read.iter().map(|good| good.settings.backend.to_string()).collect();
    assert_eq!(backends, ["both", "auto", "ebpf", "nftables"]);
    let good = read.first().ok_or("nothing")?;
    let words = [
        good.policy.mode.to_string(),
        good.settings.existing.to_string(),
        good.settings.forward.to_string(),
        good.policy.dns.unresolved.to_string(),
        good.policy.dns.min_refresh.as_millis().to_string(),
    ];
    assert_eq!(words, ["audit", "cut", "allow", "closed", "1500"]);
    let bus = good.policy.target("bus").ok_or("no bus")?;
    assert_eq!(bus.answers.to_string(), "link-local");
    let principals: Vec<_> = bus.principals.iter().map(ToString::to_string).collect();
    assert_eq!(
        principals,
        ["user 0", "user 7 in /a b/é", "user 999", "anybody in /g", "kernel"]
    );
    assert_eq!((good.listed.len(), good.names.len()), (5, 1));
    Ok(())
}

#[test]
fn f4_a_power_cut_at_every_byte_is_told() -> Test {
    let (_dir, good, bytes) = kept()?;
    for length in 0..bytes.len() {
        let cut = bytes.get(..length).unwrap_or_default();
        let loaded = parse(cut, Path::new(FILE));
        assert!(
            matches!(loaded, Err(StateError::Damaged { .. })),
            "cut to {length} of {}: {loaded:?}",
            bytes.len()
        );
        // What a file system may leave behind a size that was written before the data.
        let mut zeros = cut.to_vec();
        zeros.resize(bytes.len(), 0);
        assert!(parse(&zeros, Path::new(FILE)).is_err(), "zeros from {length}");
    }
    assert_eq!(parse(&bytes, Path::new(FILE))?.0, good);
    Ok(())
}

#[test]
fn f4_every_single_bit_that_turns_is_told() -> Test {
    let (_dir, good, bytes) = kept()?;
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut turned = bytes.clone();
            if let Some(byte) = turned.get_mut(at) {
                *byte ^= 1 << bit;
            }
            if let Ok((loaded, _)) = parse(&turned, Path::new(FILE)) {
                assert_eq!(loaded, good, "bit {bit} of byte {at}");
            }
        }
    }
    Ok(())
}

#[test]
fn f6_what_others_could_have_written_is_not_used() -> Test {
    let (dir, _, bytes) = kept()?;
    let path = dir.path().join(FILE);
    let told_to = |owner| {
        load_of(owner, dir.path())
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    let told = || told_to(me());
    assert_eq!(told(), "");
    let other = me() + 1;
    assert!(
        told_to(other).contains(&format!("uid {}", me())),
        "another's is used: {}",
        told_to(other)
    );
    assert!(
        save_as(other, dir.path(), &record(&good()?)?).is_err(),
        "another's directory is used"
    );
    for mode in [0o620, 0o602] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        assert!(told().contains(&format!("{mode:04o}")), "{}", told());
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o770))?;
    assert!(told().contains("0770"), "{}", told());
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700))?;
    assert_eq!(told(), "");
    fs::rename(&path, dir.path().join("other"))?;
    symlink("other", &path)?;
    assert!(told().contains(FILE), "a link was followed");
    fs::remove_file(&path)?;
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR)?;
    assert!(told().contains("not a regular file"), "{}", told());
    fs::remove_file(&path)?;
    let newer = String::from_utf8(bytes)?.replace("last-good/1", "last-good/2");
    fs::write(&path, newer)?;
    assert!(told().contains("enforcer/last-good/2"), "{}", told());
    fs::write(&path, "{\"schema\":\"enforcer/last-good/2\",\"other\":[]}")?;
    assert!(told().contains("another version"), "{}", told());
    Ok(())
}

#[test]
fn n4_a_file_without_times_is_read_without_them() -> Test {
    let (_dir, good, bytes) = kept()?;
    let text = String::from_utf8(bytes)?;
    let (head, content) = text
        .split_once(r#""content":"#)
        .and_then(|(head, content)| Some((head, content.strip_suffix('}')?)))
        .ok_or("another shape")?;
    let before = content.replace(r#","answered":{"10.9.0.1":3840}"#, "");
    assert_ne!(before, content);
    let crc = |text: &str| format!("{:08x}", crc32fast::hash(text.as_bytes()));
    let head = head.replace(&crc(content), &crc(&before));
    let early = format!(r#"{head}"content":{before}}}"#);
    let (loaded, _) = parse(early.as_bytes(), Path::new(FILE))?;
    let mut expected = good;
    for known in expected.names.values_mut() {
        known.answered.clear();
    }
    assert_eq!(loaded, expected);
    Ok(())
}

proptest! {
    #[test]
    fn garbage_is_damage(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(parse(&bytes, Path::new(FILE)).is_err());
    }
}
