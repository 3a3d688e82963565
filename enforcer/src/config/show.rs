//! `Config` → TOML, with a comment for each key, and → JSON. Both from one tree, without credentials (B2).

use humantime::format_duration;
use serde::{Serialize, Serializer};
use toml::{Table, Value};

use super::{Allow, Backend, Bosh, Config, Existing, Settings, Target, User};
use crate::policy::{Dns, Mode, Nat64, Unresolved};

/// A key of the file: its section, its name, its comment.
struct Key(&'static str, &'static str, &'static str);

const KEYS: [Key; 14] = [
    Key(
        "",
        "mode",
        "\"enforce\", or \"audit\": judge, count and report, refuse nothing.",
    ),
    Key(
        "",
        "backend",
        "\"auto\": ebpf where it works, else nftables; \"ebpf\", \"nftables\", or \"both\" together: that or nothing.",
    ),
    Key(
        "",
        "existing",
        "Connections older than the rules that would refuse them: \"report\" them, or \"cut\" them too.",
    ),
    Key(
        "",
        "cgroup",
        "Processes below this cgroup are judged; a reload cannot change it. Default: the root of the cgroup v2 mount found.",
    ),
    Key(
        "",
        "pin_dir",
        "Where links and maps are pinned, below a bpffs; no dot in the last part; a reload cannot change it.",
    ),
    Key(
        "",
        "state_dir",
        "Where the last rule set known good (last-good.json) and the grants (grants.json) are kept, so that a restart protects at once; a reload cannot change it.",
    ),
    Key("", "socket", "The control socket; a reload cannot change it."),
    Key(
        "",
        "forward",
        "With nftables, connections to an endpoint that this host forwards: \"refuse\" or \"allow\"; whose they are cannot be told.",
    ),
    Key(
        "",
        "nft_table",
        "The nftables table of family inet; letters, digits and _; a reload cannot change it.",
    ),
    Key(
        "",
        "nat64",
        "Prefixes of 96 bits, besides 64:ff9b::/96, by which this host's networks reach IPv4 from IPv6 (NAT64): such an address is judged as its IPv4 address.",
    ),
    Key("dns", "min_refresh", "Shortest time between two look-ups of a name."),
    Key("dns", "max_refresh", "Longest time between two look-ups of a name."),
    Key(
        "dns",
        "retain",
        "How long an address stays protected after it has left the answer.",
    ),
    Key(
        "dns",
        "unresolved",
        "Before a name has ever resolved: \"open\" protects nothing for it, \"closed\" its port on any address.",
    ),
];

const TARGET_COMMENT: &str = "\
# A target: endpoints, and who alone may connect to them.
# endpoints (no default): [tcp://|udp://|nats://|tls://]ADDR:PORT, ADDR an IPv4 address, [IPv6], a prefix, `local` or a DNS name.
# allow (no default): \"NAME\", UID, { user = NAME or UID, cgroup = \"/path\" }, { group = NAME or GID, cgroup = \"/path\" } (its members, as the name service tells them) or { kernel = true }; empty allows nobody. Who does not exist yet matches nobody until then.
# grants: whether `enforcer grant` may let others in. Default: false.
# answers: what DNS may answer for its names: \"routable\" addresses, or \"link-local\" ones too (metadata services). Default: \"routable\".
";

const BOSH_COMMENT: &str = "\
# The host of a BOSH agent: protects `monit` (tcp://127.0.0.1:2822, with grants) and `nats` (the message bus in the agent's settings), both for root only.
# A [target.monit] or [target.nats] in this file replaces ours of that name. Default: there where no target is configured.
# dir: where the agent keeps settings.json and update_settings.json, itself or in `settings` below it. Default: \"/var/vcap/bosh\".
";

impl Config {
    /// The effective configuration as TOML, each key with a comment and its default. Reads back as an equal `Config`.
    #[must_use]
    pub fn show(&self) -> String {
        let defaults = root(Mode::Enforce, &Settings::default(), Dns::default(), &[]);
        let tree = root(self.mode, &self.settings, self.dns, &self.nat64);
        let mut out = String::new();
        let mut current = "";
        for Key(section, key, comment) in KEYS {
            if section != current {
                current = section;
                out.push_str(&format!("\n[{section}]\n"));
            }
            let default = lookup(&defaults, section, key)
                .map(|value| format!(" Default: {value}."))
                .unwrap_or_default();
            let line = match lookup(&tree, section, key) {
                Some(value) => format!("{key} = {value}"),
                None => format!("# {key} = \"…\""),
            };
            out.push_str(&format!("# {comment}{default}\n{line}\n"));
        }
        out.push('\n');
        out.push_str(BOSH_COMMENT);
        out.push_str(&match &self.bosh {
            Some(Bosh { dir }) => format!("[bosh]\ndir = {}\n", Value::String(dir.display().to_string())),
            None => "# [bosh]\n# dir = \"/var/vcap/bosh\"\n".to_owned(),
        });
        out.push('\n');
        out.push_str(TARGET_COMMENT);
        for (name, target) in &self.targets {
            out.push_str(&format!("[target.{name}]\n"));
            for (key, value) in target.table() {
                out.push_str(&list(&key, &value));
            }
            out.push('\n');
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
        out
    }
}

impl Serialize for Config {
    /// The shape of the file; an absent `cgroup` is the default.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut tree = root(self.mode, &self.settings, self.dns, &self.nat64);
        let targets = self
            .targets
            .iter()
            .map(|(name, target)| (name.clone(), Value::Table(target.table())));
        if let Some(Bosh { dir }) = &self.bosh {
            let dir = ("dir".to_owned(), Value::String(dir.display().to_string()));
            tree.insert("bosh".to_owned(), Value::Table(Table::from_iter([dir])));
        }
        tree.insert("target".to_owned(), Value::Table(targets.collect()));
        tree.serialize(serializer)
    }
}

/// Everything but the targets. No `..`: a new field must find its place here.
fn root(mode: Mode, settings: &Settings, dns: Dns, nat64: &[Nat64]) -> Table {
    let Settings {
        backend,
        existing,
        cgroup,
        pin_dir,
        state_dir,
        socket,
        forward,
        nft_table,
    } = settings;
    let Dns {
        min_refresh,
        max_refresh,
        retain,
        unresolved,
    } = dns;
    let text = |key: &str, value: String| (key.to_owned(), Value::String(value));
    let dns = Table::from_iter([
        text("min_refresh", format_duration(min_refresh).to_string()),
        text("max_refresh", format_duration(max_refresh).to_string()),
        text("retain", format_duration(retain).to_string()),
        text("unresolved", Unresolved::to_string(&unresolved)),
    ]);
    let mut tree = Table::from_iter([
        text("mode", mode.to_string()),
        text("backend", Backend::to_string(backend)),
        text("existing", Existing::to_string(existing)),
        text("pin_dir", pin_dir.display().to_string()),
        text("state_dir", state_dir.display().to_string()),
        text("socket", socket.display().to_string()),
        text("forward", forward.to_string()),
        text("nft_table", nft_table.clone()),
        (
            "nat64".to_owned(),
            Value::Array(nat64.iter().map(|prefix| Value::String(prefix.to_string())).collect()),
        ),
        ("dns".to_owned(), Value::Table(dns)),
    ]);
    tree.extend(cgroup.iter().map(|path| text("cgroup", path.display().to_string())));
    tree
}

fn lookup<'a>(tree: &'a Table, section: &str, key: &str) -> Option<&'a Value> {
    match section {
        "" => tree.get(key),
        section => tree.get(section)?.get(key),
    }
}

/// `key = [ … ]`, one element a line where there is more than one.
fn list(key: &str, value: &Value) -> String {
    match value.as_array().map(Vec::as_slice) {
        Some(elements @ [_, _, ..]) => {
            let mut out = format!("{key} = [\n");
            for element in elements {
                out.push_str(&format!("    {element},\n"));
            }
            out.push_str("]\n");
            out
        }
        Some([] | [_]) | None => format!("{key} = {value}\n"),
    }
}

impl Target {
    fn table(&self) -> Table {
        let endpoints = self.endpoints.iter().map(|line| Value::String(line.value.to_string()));
        let allow = self.allow.iter().map(|line| line.value.tree());
        Table::from_iter([
            ("endpoints".to_owned(), Value::Array(endpoints.collect())),
            ("allow".to_owned(), Value::Array(allow.collect())),
            ("grants".to_owned(), Value::Boolean(self.grants)),
            ("answers".to_owned(), Value::String(self.answers.to_string())),
        ])
    }
}

impl Allow {
    fn tree(&self) -> Value {
        let table = |pairs: &[(&str, Value)]| {
            Value::Table(
                pairs
                    .iter()
                    .map(|(key, value)| ((*key).to_owned(), value.clone()))
                    .collect(),
            )
        };
        match self {
            Self::User(user) => user.tree(),
            Self::Group { group, cgroup } => {
                let mut pairs = vec![("group", group.tree())];
                pairs.extend(cgroup.iter().map(|path| ("cgroup", Value::String(path.clone()))));
                table(&pairs)
            }
            Self::Within { user, cgroup } => table(&[("user", user.tree()), ("cgroup", Value::String(cgroup.clone()))]),
            Self::Kernel => table(&[("kernel", Value::Boolean(true))]),
        }
    }
}

impl User {
    fn tree(&self) -> Value {
        match self {
            Self::Name(name) => Value::String(name.clone()),
            Self::Number(number) => Value::Integer(*number),
        }
    }
}
