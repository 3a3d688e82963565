//! What a configuration means once the users of the host have changed.

use std::path::Path;

use crate::{
    config::Config,
    policy::{FileUsers, Policy, Principal},
};

const CONFIG: &str = r#"
[target.bus]
endpoints = ["tcp://10.0.0.1:4222"]
allow = ["agent", "ops", 7, { group = "bus" }, { user = "agent", cgroup = "/x" }]
[target.other]
endpoints = ["tcp://10.0.0.2:4222"]
allow = [1001]
"#;
const PASSWD: &str = "agent:x:1001:1:::\nops:x:7:1:::\nalice:x:1005:1:::\n";
const GROUP: &str = "bus:x:50:alice,agent\n";

fn files(passwd: &str, group: &str) -> FileUsers {
    FileUsers {
        passwd: passwd.to_owned(),
        group: group.to_owned(),
    }
}

/// At `bus`, who may connect anywhere and who within the cgroup; how many names have changed. `other` lists a number,
/// which stays.
fn again(passwd: &str, group: &str) -> Result<String, Box<dyn std::error::Error>> {
    let config = Config::parse(CONFIG, Path::new("x.toml"))?;
    let read = Policy::from_config(&config, &files(PASSWD, GROUP))?;
    let (mut policy, mut listed) = (read.policy, read.listed);
    let changed = policy.name_again(&mut listed, &files(passwd, group)).len();
    // Once more there is nothing to be done.
    assert_eq!(policy.name_again(&mut listed, &files(passwd, group)), []);
    let of = |target: &str, within: bool| -> Result<String, String> {
        let target = policy.target(target).ok_or("no target")?;
        let uids = target.principals.iter().filter_map(|principal| match principal {
            Principal::User { uid, cgroup } => (cgroup.is_some() == within).then_some(uid.to_string()),
            Principal::Anybody { .. } | Principal::Kernel => None,
        });
        Ok(uids.collect::<Vec<_>>().join(" "))
    };
    assert_eq!(of("other", false)?, "1001");
    Ok(format!("{} | {} | {changed}", of("bus", false)?, of("bus", true)?))
}

#[test]
fn n9_names_mean_whom_the_files_name_at_boot() -> Result<(), Box<dyn std::error::Error>> {
    let (agent, ops, alice) = ("agent:x:1001:1:::\n", "ops:x:7:1:::\n", "alice:x:1005:1:::\n");
    let cases = [
        ([agent, ops, alice], GROUP, "7 1001 1005 | 1001 | 0"),
        // Made again with another number: as himself, within the cgroup, as a member.
        (["agent:x:1002:1:::\n", ops, alice], GROUP, "7 1002 1005 | 1002 | 3"),
        // What the list has by number stays, whoever that is now.
        ([agent, "ops:x:8:1:::\n", alice], GROUP, "7 8 1001 1005 | 1001 | 1"),
        // Numbers change hands.
        (
            ["agent:x:1005:1:::\n", ops, "alice:x:1001:1:::\n"],
            "bus:x:50:\n",
            "7 1005 | 1005 | 3",
        ),
        // Gone, as far as the files tell: a name service may have him, and nobody else has the number.
        (["", ops, alice], "bus:x:50:alice\n", "7 1001 1005 | 1001 | 1"),
        // Gone, and the number is another user's.
        (["", ops, "mallory:x:1001:1:::\n"], "bus:x:50:\n", "7 |  | 3"),
        // Nobody is left in them.
        ([""; 3], "", "7 1001 1005 | 1001 | 0"),
        // A member whom only a name service knows keeps what nobody else has.
        (["", ops, alice], "bus:x:50:alice,agent\n", "7 1001 1005 | 1001 | 0"),
        (
            ["", ops, "mallory:x:1005:1:::\n"],
            "bus:x:50:alice,agent\n",
            "7 1001 | 1001 | 1",
        ),
        // So does a group of its own.
        ([agent, ops, "mallory:x:1005:1:::\n"], "", "7 1001 | 1001 | 1"),
    ];
    for (passwd, group, expected) in cases {
        assert_eq!(again(&passwd.concat(), group)?, expected, "{passwd:?} {group}");
    }
    Ok(())
}
