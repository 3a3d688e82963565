//! B6: the way from the rules of agent and stemcell to enforcer and back, by the commands of
//! `enforcer/docs/stemcell.md` themselves, in their order, while root and jobs connect to monit without a pause, and
//! others try to.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    Case, case,
    grants::path_of,
    jobs::{HELPER, write_script},
};
use crate::{
    backend::EBPF,
    net_cls::{CLASSID, NetCls},
    world::{Attack, Blows, Daemon, Hammer, Listener, NOBODY, Netns, Ran, World, binary, cgroup_mount, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    let all = vec![
        case("b6_the_way_over_and_back_on_noble_ebpf", || noble("ebpf")),
        case("b6_the_way_over_and_back_on_noble_nftables", || noble("nftables")),
        case!(b6_the_way_over_and_back_on_jammy_ebpf),
    ];
    // Each says itself what enforces: one run has them all.
    all.into_iter().map(|case| case.on(EBPF)).collect()
}

const PAGE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../enforcer/docs/stemcell.md"));

const AGENT_JSON: &str = "var/vcap/bosh/agent.json";

/// The commands below a heading of the page, by block: each line of a fence marked `sh` is one.
fn blocks(heading: &str) -> Result<Vec<Vec<&'static str>>> {
    let heading = format!("\n### {heading}\n");
    let (_, part) = PAGE.split_once(&heading).with_context(|| format!("no {heading:?}"))?;
    let part = part.split("\n### ").next().unwrap_or_default();
    let blocks = part.split("\n```sh\n").skip(1);
    let blocks = blocks.map(|rest| rest.split("\n```").next().unwrap_or_default().lines().collect());
    Ok(blocks.collect())
}

/// A host with monit, in a network namespace, whose files lie below a directory of the world's.
struct Host {
    /// Ends before the directory that it is mounted on.
    net_cls: Option<NetCls>,
    world: World,
    netns: Netns,
    _listener: Listener,
    daemon: Option<Daemon>,
    /// A job that has access from the start.
    old: PathBuf,
    /// One that is granted access on the way.
    new: PathBuf,
    /// Whom enforcer does not know to have access.
    unknown: Vec<PathBuf>,
}

impl Host {
    fn new(backend: &str) -> Result<Self> {
        let world = World::new()?;
        let netns = Netns::new(&world, "home")?;
        let listener = Listener::start(Some(&netns.file()), world.port, &[])?;
        // Where old rules drop a packet: 3 s until it is given up.
        netns.set("ipv4/tcp_syn_retries", "1")?;
        if Path::new("/proc/sys/net/ipv4/tcp_syn_linear_timeouts").exists() {
            netns.set("ipv4/tcp_syn_linear_timeouts", "0")?;
        }
        // In one line, so that what the page appends is no part of it.
        world.configure(&format!(
            "backend = \"{backend}\"\n\
             target.monit = {{ endpoints = [\"tcp://127.0.0.1:{}\"], allow = [\"root\"], grants = true }}\n",
            world.port
        ))?;
        let (old, new) = (world.cgroup.join("old"), world.cgroup.join("new"));
        fs::create_dir(&old)?;
        fs::create_dir(&new)?;
        fs::create_dir(world.path("bin"))?;
        let script = format!(
            "#!/bin/sh\nexec {} --config {} \"$@\"\n",
            binary("enforcer")?.display(),
            world.path("enforcer.toml").display()
        );
        write_script(&world.path("bin/enforcer"), &script)?;
        for dir in ["root", "var/vcap/bosh/etc", "etc/network/if-up.d", "etc/systemd/system"] {
            fs::create_dir_all(world.path("host").join(dir))?;
        }
        let host = Self {
            world,
            netns,
            _listener: listener,
            daemon: None,
            unknown: vec![new.clone()],
            old,
            new,
            net_cls: None,
        };
        host.attacker()?.reaches()?;
        Ok(host)
    }

    /// A file of the host's.
    fn file(&self, path: &str) -> PathBuf {
        self.world.path("host").join(path)
    }

    /// Not so fast that the listener cannot follow, which looks like a packet dropped.
    fn attacker(&self) -> Result<Attack> {
        let attack = self
            .world
            .attack(NOBODY)
            .option("--pause", "1")
            .to(([127, 0, 0, 1], self.world.port).into());
        attack.in_netns(&self.netns)
    }

    /// An attempt by whoever the old rules of jammy let through.
    fn within_net_cls(&self, attack: Attack) -> Result<Attack> {
        let Some(net_cls) = &self.net_cls else {
            return Ok(attack);
        };
        let enter = "echo $$ > \"$1/monit-api-access/tasks\"; shift; exec \"$@\"";
        let place = net_cls.place.display().to_string();
        let net = format!("--net={}", self.netns.file().display());
        let mount = format!("--mount=/proc/{}/ns/mnt", net_cls.holder());
        let words = ["nsenter", &net, &mount, "--", "sh", "-c", enter, "sh", &place];
        Ok(attack.program(&words, binary("attack")?))
    }

    /// Root, who is let in all the time.
    fn root(&self) -> Result<Attack> {
        let attack = self
            .world
            .attack(0)
            .option("--pause", "1")
            .to(([127, 0, 0, 1], self.world.port).into());
        self.within_net_cls(attack.in_netns(&self.netns)?)
    }

    fn old_job(&self) -> Result<Attack> {
        self.within_net_cls(self.attacker()?.in_cgroup(&self.old))
    }

    fn new_job(&self) -> Result<Attack> {
        Ok(self.attacker()?.in_cgroup(&self.new))
    }

    /// A command of the page's, with what differs here.
    fn here(&self, line: &str) -> String {
        let mut text = line.replace("2822", &self.world.port.to_string());
        let net_cls = self.net_cls.as_ref().map(|net_cls| net_cls.place.clone());
        let places = [
            ("/etc/enforcer/enforcer.toml", self.world.path("enforcer.toml")),
            ("/etc/enforcer", self.world.path("etc-enforcer")),
            ("/usr/share/enforcer/monit-access-helper.sh", HELPER.into()),
            (
                "/sys/fs/cgroup/unified/system.slice/runc-bpm-JOB.scope",
                self.new.clone(),
            ),
            ("/sys/fs/cgroup/net_cls,net_prio", net_cls.unwrap_or_default()),
            ("/root/", self.file("root/")),
            ("/var/vcap/", self.file("var/vcap/")),
            ("/etc/network/", self.file("etc/network/")),
            ("/etc/systemd/", self.file("etc/systemd/")),
        ];
        // By way of marks: what stands for one place may lie below another one, as this checkout below /root.
        let mark = |number: usize| format!("\u{1}{number}\u{1}");
        for (number, (theirs, _)) in places.iter().enumerate() {
            text = text.replace(theirs, &mark(number));
        }
        for (number, (_, ours)) in places.iter().enumerate() {
            text = text.replace(&mark(number), &ours.display().to_string());
        }
        text
    }

    fn bash(&self, text: &str) -> Result<Ran> {
        let mut command = self.netns.command(Path::new("bash"));
        if let Some(net_cls) = &self.net_cls {
            command = Command::new("nsenter");
            command.arg(format!("--net={}", self.netns.file().display()));
            command.arg(format!("--mount=/proc/{}/ns/mnt", net_cls.holder()));
            command.args(["--", "bash"]);
        }
        let path = std::env::var("PATH").unwrap_or_default();
        command.args(["-c", &format!("set -euo pipefail; {text}")]);
        ran(command.env("PATH", format!("{}:{path}", self.world.path("bin").display())))
    }

    /// Does what a line of the page says, and holds it to what the page says of it.
    fn does(&mut self, line: &str) -> Result<()> {
        match line.split(' ').collect::<Vec<_>>().as_slice() {
            ["apt-get", "install", ..] => {
                let mut command = self.netns.command(&binary("enforcer")?);
                self.daemon = Some(self.world.daemon_with(&mut command)?);
            }
            ["apt-get", "purge", ..] => {
                // It has been unloaded, upon which systemd does not start it again.
                let code = self.daemon.take().context("no daemon")?.wait()?;
                ensure!(code == 3, "the daemon ended with {code}");
            }
            ["systemctl", "reload", "enforcer"] => self.daemon.as_ref().context("no daemon")?.reload()?,
            ["systemctl", "daemon-reload"] => {}
            ["enforcer", "grant", "monit", "--job", "JOB"] => {
                for job in &self.unknown {
                    self.bash(&format!("enforcer grant monit --cgroup {}", path_of(job)?))?
                        .demand(0)?;
                }
            }
            _ => {
                let ran = self.bash(&self.here(line))?;
                let (code, says) = match line {
                    "enforcer check nobody 127.0.0.1:2822" => (1, "deny"),
                    "enforcer status" => (0, "enforcing"),
                    "enforcer doctor" => (ran.code.min(1), ""),
                    _ => (0, ""),
                };
                let ran = ran.demand(code)?;
                ensure!(ran.stdout.contains(says), "{ran:?}");
            }
        }
        Ok(())
    }

    /// All that the page says, under fire; `old_rules` says what is active of the old rules.
    fn goes_over_and_back(&mut self, heading: &str, old_rules: impl Fn(&Self) -> Result<String>) -> Result<()> {
        let fire = self.world.path("fire");
        fs::write(&fire, "")?;
        let before = old_rules(self)?;
        // Several, so that not all wait for an answer that was dropped when it matters.
        let denied: Vec<Hammer> = (0..4).map(|_| self.attacker()?.hammer(&fire)).collect::<Result<_>>()?;
        let mut allowed = vec![
            ("root", self.root()?.hammer(&fire)?),
            ("the job that had access", self.old_job()?.hammer(&fire)?),
        ];
        let mut steps = 0;
        for block in blocks(heading)? {
            for line in &block {
                self.does(line).with_context(|| format!("{heading}: {line}"))?;
                // Whatever it opened would be found.
                thread::sleep(Duration::from_millis(200));
                steps += 1;
            }
            if block.contains(&"enforcer verify") {
                ensure!(old_rules(self)?.is_empty(), "{} is left", old_rules(self)?);
                let agent_json: Value = serde_json::from_str(&fs::read_to_string(self.file(AGENT_JSON))?)?;
                let key = &agent_json["Platform"]["Linux"]["UseMonitIptablesFirewall"];
                ensure!(key == true, "{agent_json}");
                self.new_job()?.reaches()?;
                allowed.push(("the job that was granted", self.new_job()?.hammer(&fire)?));
                let processes = self.new.join("cgroup.procs");
                until("it runs", || Ok(!fs::read_to_string(&processes)?.is_empty()))?;
            }
        }
        let after = old_rules(self)?;
        thread::sleep(Duration::from_millis(500));
        fs::remove_file(&fire)?;
        let mut sum = Blows::default();
        for hammer in denied {
            sum += hammer.finish()?;
        }
        println!("    {steps} commands; whoever may not: {sum:?}");
        let refused = sum.refused + sum.reset;
        ensure!(sum.connected == 0 && sum.other > 0 && refused > 100, "{sum:?}");
        ensure!(allowed.len() == 3, "the page takes nothing away");
        for (who, hammer) in allowed {
            let blows = hammer.finish()?;
            println!("    {who}: {blows:?}");
            let failed = blows.refused + blows.reset + blows.other + blows.late;
            ensure!(failed == 0 && blows.connected > 100, "{who}: {blows:?}");
        }
        // As it was, with what was granted besides.
        for line in before.lines() {
            ensure!(after.contains(line), "{line} is not in {after}");
        }
        self.attacker()?.fails_by(libc::ETIMEDOUT)?;
        self.root()?.reaches()?;
        self.old_job()?.reaches()
    }
}

/// As the agent and the stemcell write them; a job's rules as the agent's helper and as older releases do, and one of a
/// job that has ended.
const NOBLE: &str = r#"
table inet bosh_agent {
    chain monit_access_jobs {
        socket cgroupv2 level LEVEL "PATH/old" MONIT log prefix "bosh-monit-access: cgroup match: " accept comment "bosh-monit-access:old"
    }
    chain monit_access {
        type filter hook output priority -1; policy accept;
        ct state established,related accept
        jump monit_access_jobs
        meta skuid 0 MONIT accept
        MONIT drop
    }
    chain nats_access {
        type filter hook output priority -1; policy accept;
        meta skuid 0 ip daddr 10.79.0.1 tcp dport 4222 accept
        ip daddr 10.79.0.1 tcp dport 4222 drop
    }
}
table inet filter {
    chain monit_output {
        type filter hook output priority 0; policy accept;
        ct state established,related accept
        socket cgroupv2 level LEVEL "PATH/ended" MONIT accept
        socket cgroupv2 level LEVEL "PATH/old" MONIT log prefix "Matched cgroup monit access rule: " accept
        skuid 0 MONIT log prefix "Matched skuid monit rule:" accept
        MONIT log prefix "dropped monit rule:" drop
    }
}
"#;

fn noble(backend: &str) -> Result<()> {
    let mut host = Host::new(backend)?;
    let agent_json =
        "{\n  \"Platform\": {\n    \"Linux\": {\n      \"DevicePathResolutionType\": \"virtio\"\n    }\n  }\n}\n";
    fs::write(host.file(AGENT_JSON), agent_json)?;
    let cgroup = &host.world.cgroup;
    let level = cgroup.strip_prefix(cgroup_mount()?)?.components().count() + 1;
    let path = cgroup.strip_prefix("/sys/fs/cgroup")?.display().to_string();
    let monit = format!("ip daddr 127.0.0.1 tcp dport {}", host.world.port);
    let rules = NOBLE.replace("MONIT", &monit).replace("PATH", &path);
    let file = host.world.path("noble.nft");
    fs::write(&file, rules.replace("LEVEL", &level.to_string()))?;
    let ended = cgroup.join("ended");
    fs::create_dir(&ended)?;
    host.netns.nft(&format!("include \"{}\"", file.display()))?;
    fs::remove_dir(ended)?;
    host.attacker()?.fails_by(libc::ETIMEDOUT)?;
    let old_rules = |host: &Host| -> Result<String> {
        let all = host.netns.nft("list ruleset")?;
        ensure!(all.contains("chain nats_access"), "{all}");
        let is_old = |chain: &&str| chain.contains("chain monit_access {") || chain.contains("chain monit_output {");
        let rules = all.split_inclusive("\n\t}\n").filter(is_old).flat_map(str::lines);
        let rules = rules.filter(|rule| rule.contains(" accept") || rule.contains(" drop"));
        // What names a cgroup that has gone is left out on the way back.
        let rules = rules.filter(|rule| !rule.contains("cgroupv2") || rule.contains('"'));
        Ok(rules.flat_map(|rule| [rule, "\n"]).collect())
    };
    host.goes_over_and_back("Ubuntu noble", old_rules)?;
    // Beyond enforcer's end, as its rules were copied.
    host.new_job()?.reaches()?;
    let text = fs::read_to_string(host.file(AGENT_JSON))?;
    ensure!(text == agent_json, "{text}");
    host.netns.nft("flush ruleset")?;
    host.attacker()?.reaches()
}

fn b6_the_way_over_and_back_on_jammy_ebpf() -> Result<()> {
    let mut host = Host::new("ebpf")?;
    host.net_cls = NetCls::new(&host.world)?;
    host.unknown.push(host.old.clone());
    let iptables = |host: &Host, words: &str| {
        let mut command = host.netns.command(Path::new("iptables"));
        ran(command.args(["-t", "mangle"]).args(words.split(' ')))
    };
    let rule = format!("-I POSTROUTING -d 127.0.0.1 -p tcp --dport {} -m", host.world.port);
    let drops = iptables(&host, &format!("{rule} cgroup ! --cgroup {CLASSID} -j DROP"))?;
    if host.net_cls.is_none() || drops.code != 0 {
        println!("    no rules of jammy's on this kernel, by net_cls: {}", drops.stderr);
        return Ok(());
    }
    let passes = format!("{rule} state --state ESTABLISHED,RELATED -j ACCEPT");
    iptables(&host, &passes)?.demand(0)?;
    let agent_json = r#"{"Platform": {"Linux": {"UseMonitIptablesFirewall": true}}}"#;
    fs::write(host.file(AGENT_JSON), agent_json)?;
    let script = host.file("etc/network/if-up.d/restrict-monit-api-access");
    let helper = host.file("var/vcap/bosh/etc/monit-access-helper.sh");
    fs::write(&script, "the script")?;
    fs::write(&helper, "theirs")?;
    host.attacker()?.fails_by(libc::ETIMEDOUT)?;
    host.goes_over_and_back("Ubuntu jammy", |host| {
        let all = iptables(host, "-S POSTROUTING")?.demand(0)?;
        Ok(all.stdout.replace("-P POSTROUTING ACCEPT\n", ""))
    })?;
    ensure!(script.exists(), "the script is not back");
    ensure!(fs::read_to_string(helper)? == "theirs", "the helper is not back");
    iptables(&host, "-F")?.demand(0)?;
    host.attacker()?.reaches()
}

/// Each line begins with a program that there is where it is run, so that no prose is taken for a command, nor the
/// other way round.
#[test]
fn the_pages_commands_are_commands() -> Result<()> {
    let known = [
        "apt-get",
        "cat",
        "cp",
        "echo",
        "enforcer",
        "for",
        "iptables",
        "mkdir",
        "mv",
        "nft",
        "printf",
        "rm",
        "sed",
        "sleep",
        "systemctl",
    ];
    for heading in ["Ubuntu noble", "Ubuntu jammy"] {
        let blocks = blocks(heading)?;
        assert!(blocks.len() >= 6, "{heading} has {} steps", blocks.len());
        for line in blocks.concat() {
            let program = line.split(' ').next().unwrap_or_default();
            assert!(
                known.contains(&program),
                "{heading}: {line:?} begins with no known program"
            );
        }
    }
    // Whatever the page has of them is in one of these parts.
    let fences = PAGE.matches("\n```sh\n").count();
    assert_eq!(fences, blocks("Ubuntu noble")?.len() + blocks("Ubuntu jammy")?.len());
    assert_eq!(PAGE.matches("\n```").count(), 2 * fences, "a fence of another kind");
    Ok(())
}
