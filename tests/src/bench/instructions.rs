//! How many instructions each path through the programs takes: exact, and the same on every machine, where a time is
//! neither. The compiled object runs in rbpf over emulated maps and helpers.
//!
//! The counts stand in `instructions/counts.txt`. One that rises fails a test; one that falls asks to be written.

mod kernel;
mod program;

use std::{fmt::Write as _, net::IpAddr, path::Path as File};

use anyhow::{Context as _, Result, ensure};
use enforcer::{
    config::Config,
    policy::{CgroupPath, Policy},
    programs::{Entry, entries, object, open_gate},
    ruleset::{Cgroup, Host, Resolved, compile},
};
use serde::{Deserialize, Serialize};

use self::{
    kernel::{Tally, Task},
    program::{Context, run},
};

/// The cookie of the network namespace that the rules are made in.
const HERE: u64 = 7;
/// The ids of the cgroups of whoever connects, the root's first.
const CGROUPS: [u64; 3] = [1, 20, 300];

/// The rules of most paths: an endpoint each of IPv4 and IPv6, few users.
const FEW: &str = r#"
[target.bus]
endpoints = ["tcp://10.0.0.5:4222", "tcp://[2001:db8::5]:4222", "udp://10.0.0.5:4222", "tcp://127.0.0.1:4222"]
allow = [0, 1000]
"#;
/// More users than a rule set has at hand.
const MANY: &str = r#"
[target.bus]
endpoints = ["tcp://10.0.0.5:4222"]
allow = [0, 1, 2, 3, 4, 5, 6, 7, 1000]
"#;
const PREFIX: &str = r#"
[target.bus]
endpoints = ["tcp://10.0.0.0/8:4222", "tcp://10.1.0.0/16:4222"]
allow = [0, 1000]
"#;
const CGROUP: &str = r#"
[target.bus]
endpoints = ["tcp://10.0.0.5:4222"]
allow = [0, { user = 1000, cgroup = "/system.slice/agent.service" }]
"#;
const TWO_OWNERS: &str = r#"
[target.bus]
endpoints = ["tcp://10.0.0.5:4222"]
allow = [0, 1000]
[target.all]
endpoints = ["tcp://10.0.0.0/8:4222"]
allow = [0, 1000]
"#;
const THREE_OWNERS: &str = r#"
[target.bus]
endpoints = ["tcp://10.0.0.5:4222"]
allow = [0, 1000]
[target.net]
endpoints = ["tcp://10.0.0.0/16:4222"]
allow = [0, 1000]
[target.all]
endpoints = ["tcp://10.0.0.0/8:4222"]
allow = [0, 1000]
"#;
const NAME: &str = r#"
[target.bus]
endpoints = ["tcp://10.0.0.5:4222", "tcp://bus.test:4222"]
allow = [0, 1000]
"#;
const AUDIT: &str = r#"
mode = "audit"
[target.bus]
endpoints = ["tcp://10.0.0.5:4222"]
allow = [0]
"#;

/// A way through the programs.
#[derive(Clone, Copy)]
struct Way {
    what: &'static str,
    program: &'static str,
    rules: &'static str,
    /// Address and port.
    to: (&'static str, u16),
    /// The real UID of the task, and the owner of the socket.
    users: (u32, u32),
    /// Whether the kernel has casts (Linux 6.2).
    casts: bool,
    /// Whether the next dial of the port is reported.
    open_gate: bool,
    /// What the program must return, and the records that it must send.
    expect: (u64, u64),
}

/// Most ways differ from this one in a thing or two: root connects by TCP over IPv4 to an endpoint.
const ALLOWED: Way = Way {
    what: "allowed, both users are one",
    program: "connect4",
    rules: FEW,
    to: ("10.0.0.5", 4222),
    users: (0, 0),
    casts: true,
    open_gate: false,
    expect: (1, 0),
};

const WAYS: [Way; 17] = [
    Way {
        what: "port of no target",
        to: ("10.0.0.5", 80),
        ..ALLOWED
    },
    Way {
        what: "port of no target, IPv6",
        program: "connect6",
        to: ("2001:db8::5", 80),
        ..ALLOWED
    },
    Way {
        what: "address that is no endpoint",
        to: ("10.0.0.6", 4222),
        ..ALLOWED
    },
    Way {
        what: "address that is no endpoint, IPv6",
        program: "connect6",
        to: ("2001:db8::6", 4222),
        ..ALLOWED
    },
    Way {
        what: "address in no prefix",
        rules: PREFIX,
        to: ("11.0.0.6", 4222),
        ..ALLOWED
    },
    Way {
        what: "address that is no endpoint, reported",
        to: ("10.0.0.6", 4222),
        rules: NAME,
        open_gate: true,
        expect: (1, 1),
        ..ALLOWED
    },
    ALLOWED,
    Way {
        what: "allowed, two users",
        users: (0, 1000),
        ..ALLOWED
    },
    Way {
        what: "allowed, IPv6",
        program: "connect6",
        to: ("2001:db8::5", 4222),
        ..ALLOWED
    },
    Way {
        what: "allowed, loopback",
        to: ("127.0.0.1", 4222),
        ..ALLOWED
    },
    Way {
        what: "allowed, UDP, sendmsg",
        program: "sendmsg4",
        ..ALLOWED
    },
    Way {
        what: "allowed, one of many users",
        rules: MANY,
        users: (1000, 1000),
        ..ALLOWED
    },
    Way {
        what: "allowed in a cgroup",
        rules: CGROUP,
        users: (1000, 1000),
        ..ALLOWED
    },
    Way {
        what: "allowed by a prefix",
        rules: PREFIX,
        to: ("10.1.0.6", 4222),
        ..ALLOWED
    },
    Way {
        what: "allowed by two targets",
        rules: TWO_OWNERS,
        ..ALLOWED
    },
    Way {
        what: "allowed by three targets",
        rules: THREE_OWNERS,
        ..ALLOWED
    },
    Way {
        what: "denied",
        users: (65534, 65534),
        expect: (0, 1),
        ..ALLOWED
    },
];

/// What a way costs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Which.
    pub path: String,
    /// Instructions executed; a call of a helper is one.
    pub instructions: u64,
    /// Of them calls that look a map up.
    pub map_lookups: u64,
    /// Of them calls of other helpers.
    pub other_helpers: u64,
}

/// Runs each way, and fails where one does not end as it should.
pub fn counts() -> Result<Vec<Count>> {
    let more = [
        Way {
            what: "denied, IPv6",
            program: "connect6",
            to: ("2001:db8::5", 4222),
            users: (65534, 65534),
            expect: (0, 1),
            ..ALLOWED
        },
        Way {
            what: "allowed, before Linux 6.2",
            casts: false,
            ..ALLOWED
        },
        Way {
            what: "allowed, UDP, sendmsg, before Linux 6.2",
            program: "sendmsg4",
            casts: false,
            ..ALLOWED
        },
        Way {
            what: "denied, before Linux 6.2",
            users: (65534, 65534),
            casts: false,
            expect: (0, 1),
            ..ALLOWED
        },
        Way {
            what: "denied in audit mode",
            rules: AUDIT,
            users: (65534, 65534),
            expect: (1, 1),
            ..ALLOWED
        },
    ];
    WAYS.iter().chain(&more).map(count).collect()
}

fn count(way: &Way) -> Result<Count> {
    let (returned, tally) = walk(way).with_context(|| way.what.to_owned())?;
    ensure!(
        (returned, tally.records) == way.expect,
        "{}: the program returned {returned} and sent {} records, not {:?}",
        way.what,
        tally.records,
        way.expect
    );
    Ok(Count {
        path: way.what.to_owned(),
        instructions: tally.instructions,
        map_lookups: tally.lookups,
        other_helpers: tally.calls,
    })
}

fn walk(way: &Way) -> Result<(u64, Tally)> {
    let config = Config::parse(way.rules, File::new("rules"))?;
    let policy = config.without_users()?.policy;
    let rules = compile(&policy, &Resolved::new(), &host(&policy)?)?;
    let mut maps = entries(&rules, HERE);
    if way.open_gate {
        maps.retain(|entry| entry.map != open_gate(way.to.1).map || entry.key != open_gate(way.to.1).key);
        maps.push(open_gate(way.to.1));
    }
    let maps: Vec<_> = maps
        .iter()
        .map(|Entry { map, key, value }| (*map, &**key, &**value))
        .collect();
    let udp = way.program.starts_with("sendmsg");
    let who = Task {
        uid: way.users.0,
        owner: way.users.1,
        cgroups: &CGROUPS,
        netns: HERE,
        tcp: !udp,
        casts: way.casts,
    };
    let (family, address) = match way.to.0.parse()? {
        IpAddr::V4(v4) => (2, (u32::from_ne_bytes(v4.octets()), [0; 16])),
        IpAddr::V6(v6) => (10, (0, v6.octets())),
    };
    let call = Context {
        family,
        address,
        port: way.to.1,
        protocol: if udp { 17 } else { 6 },
    };
    run(object(), way.program, &maps, who, call)
}

/// A host whose cgroups are those of whoever connects.
fn host(policy: &Policy) -> Result<Host> {
    let mut host = Host::default();
    let agent = CgroupPath::parse("/system.slice/agent.service")?;
    ensure!(policy.cgroups().iter().all(|path| *path == agent), "another cgroup");
    let [.., id] = CGROUPS;
    host.cgroups.insert(agent, Cgroup { id, level: 2 });
    Ok(host)
}

/// The counts as the file has them.
#[must_use]
pub fn table(counts: &[Count]) -> String {
    let mut text = format!("# {}\n", compiler());
    let _ = writeln!(
        text,
        "# {:<40} {:>12} {:>12} {:>14}",
        "path", "instructions", "map lookups", "other helpers"
    );
    for count in counts {
        let Count {
            path,
            instructions,
            map_lookups,
            other_helpers,
        } = count;
        let _ = writeln!(
            text,
            "{path:<42} {instructions:>12} {map_lookups:>12} {other_helpers:>14}"
        );
    }
    text
}

/// The compiler that built the programs, as the object names it; another one's counts are others.
fn compiler() -> String {
    const BEFORE: &[u8] = b"rustc version ";
    let object = object();
    let at = object.windows(BEFORE.len()).position(|window| window == BEFORE);
    let named = at.and_then(|at| object.get(at..)?.split(|byte| b"()\0".contains(byte)).next());
    String::from_utf8_lossy(named.unwrap_or(b"an unknown compiler"))
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has the counts written in place of those that the file has.
    const WRITE: &str = "ENFORCER_WRITE_COUNTS";

    /// A path of the file, and its numbers.
    fn read(line: &str) -> Option<(&str, [u64; 3])> {
        let (path, _) = line.split_once("  ")?;
        let mut numbers = line.strip_prefix(path)?.split_whitespace().map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some((path, [next()?, next()?, next()?]))
    }

    /// What is to be said of a file that does not have these counts.
    fn changes(before: &str, now: &str) -> Vec<String> {
        let old: Vec<_> = before.lines().filter_map(read).collect();
        let mut changes = Vec::new();
        for (path, new) in now.lines().filter_map(read) {
            match old.iter().find(|(one, _)| *one == path) {
                None => changes.push(format!("{path}: {new:?} is new; write it to the file")),
                Some((_, old)) if old.iter().zip(&new).any(|(old, new)| new > old) => changes.push(format!(
                    "{path}: {old:?} rises to {new:?}; avoid it, or say in the commit what it is good for"
                )),
                Some((_, old)) if *old != new => {
                    changes.push(format!("{path}: {old:?} falls to {new:?}; write it to the file"));
                }
                Some(_) => {}
            }
        }
        if changes.is_empty() && before != now {
            changes.push("the file has other lines".to_owned());
        }
        changes
    }

    #[test]
    fn no_path_takes_more_instructions_than_before() -> Result<()> {
        let file = File::new(env!("CARGO_MANIFEST_DIR")).join("src/bench/instructions/counts.txt");
        let now = table(&counts()?);
        if std::env::var_os(WRITE).is_some() {
            return Ok(std::fs::write(file, now)?);
        }
        let before = std::fs::read_to_string(&file)?;
        let by = |text: &str| text.lines().next().unwrap_or_default().to_owned();
        if by(&now) != by(&before) {
            eprintln!("built by {}, counted with {}: not compared", by(&now), by(&before));
            return Ok(());
        }
        let changes = changes(&before, &now);
        ensure!(
            changes.is_empty(),
            "[instructions, map lookups, other helpers] of a path:\n{}\nto write the file: {WRITE}=1 cargo test -p \
             tests --lib no_path",
            changes.join("\n")
        );
        Ok(())
    }

    #[test]
    fn a_count_that_rises_is_told_from_one_that_falls() {
        let before = "# rustc\na path  29  1  0\nanother  30  2  0\n";
        assert_eq!(changes(before, before), Vec::<String>::new());
        let now = "# rustc\na path  30  1  0\nanother  30  1  0\na third  1  1  1\n";
        let said = changes(before, now);
        let words = ["rises", "falls", "is new"];
        assert!(said.iter().zip(words).all(|(one, word)| one.contains(word)), "{said:?}");
        assert_eq!(said.len(), 3);
    }
}
