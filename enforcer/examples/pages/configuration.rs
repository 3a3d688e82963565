//! `enforcer.toml(5)` and the example file, both from what `enforcer config show` prints.

use std::{io::Write as _, path::Path};

use anyhow::{Result, ensure};
use enforcer::config::Config;
use toml::{Table, Value};

use super::{list, roff};

/// What the commented file shows besides the defaults: targets, as an example.
const EXAMPLE: &str = r#"
[target.bus]
endpoints = ["nats://nats.example.internal:4222", "tcp://10.0.0.5:4222", "tcp://[2001:db8::5]:4222"]
allow = ["root", { user = "agent", cgroup = "/system.slice/agent.service" }]

[target.monit]
endpoints = ["tcp://127.0.0.1:2822", "tcp://[::1]:2822"]
allow = ["root"]
"#;

/// The examples of the page are those in here.
const README: &str = include_str!("../../../README.md");

const DESCRIPTION: [&str; 4] = [
    "The configuration of enforcer(8), in TOML: keys at the top of the file, then sections. Each key may be left out \
     but for `endpoints` and `allow` of a target.",
    "Without the file, or if it has neither a target nor the section [bosh], enforcer acts as if [bosh] were there. \
     The packaged service does not start without the file where there is no BOSH agent (`/var/vcap/bosh`).",
    "A connection is allowed only if every target that lists its endpoint allows the user. What is an endpoint of no \
     target is left alone.",
    "`enforcer config check` reports what is wrong with the file, `enforcer config diff` what a reload would change, \
     and `enforcer config show` prints it with all defaults and the explanations below. A change takes effect by \
     `enforcer reload`; a file that is wrong is rejected, and the previous rules stay active.",
];

const FILES: [(&str, &str); 3] = [
    (
        "/etc/enforcer/enforcer.toml",
        "Where it is read from, unless --config names another file.",
    ),
    (
        "/usr/share/doc/enforcer/examples/enforcer.toml",
        "Every key with its default, all commented.",
    ),
    (
        "/var/lib/enforcer/last-good.json",
        "The last known good rules, which stay active while the file is wrong.",
    ),
];

const SEE_ALSO: &str =
    "enforcer(8), enforcer-config-check(8), enforcer-config-diff(8), enforcer-config-show(8), enforcer-reload(8)";

/// A section of the file, or its top: its keys, and what is said of it as a whole.
#[derive(Default)]
struct Section {
    name: String,
    about: Vec<String>,
    keys: Vec<(String, String)>,
}

/// The page.
pub(super) fn page() -> Result<Vec<u8>> {
    let path = Path::new("the defaults");
    let defaults = Config::parse("", path)?;
    let shown = defaults.show();
    let sections: Vec<Section> = shown.split("\n\n").map(Section::read).collect();
    let known = keys(&defaults.tree()).into_iter();
    for key in known.chain(keys(&Config::parse(EXAMPLE, path)?.tree())) {
        let mut all = sections.iter().flat_map(|section| &section.keys);
        ensure!(
            all.any(|(known, _)| *known == key),
            "config show does not explain {key}"
        );
    }
    let mut page = Vec::new();
    writeln!(
        page,
        ".TH enforcer.toml 5 \"\" \"enforcer {}\" enforcer",
        env!("CARGO_PKG_VERSION")
    )?;
    writeln!(page, ".SH NAME\nenforcer.toml \\- configuration of enforcer")?;
    writeln!(page, ".SH DESCRIPTION\n{}", DESCRIPTION.map(roff).join("\n.PP\n"))?;
    for section in &sections {
        section.write(&mut page)?;
    }
    list(&mut page, "FILES", FILES)?;
    writeln!(page, ".SH EXAMPLES")?;
    let examples = examples();
    ensure!(examples.len() > 1, "README has no examples of configurations");
    for (targets, text) in examples {
        let lines: Vec<String> = text.lines().map(roff).collect();
        writeln!(
            page,
            ".PP\nTargets {}:\n.PP\n.RS 4\n.nf\n{}\n.fi\n.RE",
            roff(&targets),
            lines.join("\n")
        )?;
    }
    writeln!(page, ".SH \"SEE ALSO\"\n{}", roff(SEE_ALSO))?;
    Ok(page)
}

/// Names of all keys; those of targets are once for all.
fn keys(tree: &Table) -> Vec<String> {
    let mut all = Vec::new();
    for (key, value) in tree {
        match (key.as_str(), value) {
            ("target", Value::Table(targets)) => {
                all.extend(targets.values().filter_map(Value::as_table).flat_map(keys));
            }
            (_, Value::Table(section)) => all.extend(keys(section)),
            (key, _) => all.push(key.to_owned()),
        }
    }
    all
}

/// README's configurations, with the names of their targets.
fn examples() -> Vec<(String, &'static str)> {
    let blocks = README.split("```toml\n").skip(1);
    let blocks = blocks.filter_map(|rest| Some(rest.split_once("```")?.0));
    let named = blocks.filter_map(|text| {
        let tree = Config::parse(text, Path::new("README")).ok()?.tree();
        let targets: Vec<String> = tree.get("target")?.as_table()?.keys().cloned().collect();
        Some((targets.join(", "), text))
    });
    named.collect()
}

impl Section {
    /// Lines up to an empty one: a key's comment stands above it, or begins with its name.
    fn read(lines: &str) -> Self {
        let mut this = Self::default();
        let mut above = Vec::new();
        for line in lines.lines() {
            let text = line.trim_start_matches("# ");
            if let Some(name) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                name.clone_into(&mut this.name);
                this.about.append(&mut above);
            } else if let Some((key, _)) = text.split_once(" = ").filter(|(key, _)| is_key(key)) {
                let about = above.join(" ");
                above.clear();
                if !this.keys.iter().any(|(known, _)| known == key) {
                    this.keys.push((key.to_owned(), about));
                }
            } else if let Some((key, about)) = explained(text) {
                this.about.append(&mut above);
                this.keys.push((key.to_owned(), about));
            } else {
                above.push(text.to_owned());
            }
        }
        this.about.append(&mut above);
        this
    }

    fn write(&self, page: &mut Vec<u8>) -> Result<()> {
        let title = match self.name.as_str() {
            "" if self.about.is_empty() => "TOP OF THE FILE".to_owned(),
            "" => "SECTION [target.NAME]".to_owned(),
            name => format!("SECTION [{name}]"),
        };
        writeln!(page, ".SH \"{}\"", roff(&title))?;
        if !self.about.is_empty() {
            writeln!(page, "{}", roff(&self.about.join(" ")))?;
        }
        for (key, about) in &self.keys {
            let (about, default) = about.rsplit_once(" Default: ").unwrap_or((about, ""));
            writeln!(page, ".TP\n\\fB{}\\fR\n{}", roff(key), roff(about))?;
            if !default.is_empty() {
                writeln!(page, ".br\nDefault: {}", roff(default))?;
            }
        }
        Ok(())
    }
}

/// `key: …` or `key (remark): …`: the key, and what is said of it, the remark first.
fn explained(text: &str) -> Option<(&str, String)> {
    let (before, about) = text.split_once(": ")?;
    let (key, remark) = before.split_once(' ').unwrap_or((before, ""));
    let is_remark = remark.is_empty() || (remark.starts_with('(') && remark.ends_with(')'));
    let about = format!("{remark} {about}").trim_start().to_owned();
    (is_key(key) && is_remark).then_some((key, about))
}

fn is_key(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

/// Every key with its meaning and default, as `config show` prints them, each line commented.
pub(super) fn example() -> Result<Vec<u8>> {
    let shown = Config::parse(EXAMPLE, Path::new("the example"))?.show();
    let mut out = Vec::new();
    writeln!(
        out,
        "# Configuration of enforcer: copy it to /etc/enforcer/enforcer.toml. Lines that begin with # and no blank are \
         defaults or examples: remove the # to use them.\n\
         # enforcer config check reports what is wrong with it, enforcer reload takes it and prints what changes. See \
         enforcer.toml(5).\n"
    )?;
    for line in shown.lines() {
        let mark = if line.is_empty() || line.starts_with('#') {
            ""
        } else {
            "#"
        };
        writeln!(out, "{mark}{line}")?;
    }
    Ok(out)
}
