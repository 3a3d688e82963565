//! `enforcer doctor`: each thing that weakens protection, made really, is found, and is not found before.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
};

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::{Case, failover::nats_server, names::Named};
use crate::{
    backend::WITH_BPF,
    dns::Zone,
    foreign::{ForeignProgram, Sharing, attached},
    kernel::{EBPF_NEEDS, Feature, hides_owners, lacks, lacks_ebpf},
    world::{NOBODY, Netns, World, binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    let cases = [
        case!(doctor_finds_what_this_kernel_can_do_and_leaves_nothing),
        case!(doctor_needs_root_and_an_image_that_is_there),
        case!(doctor_finds_source_routes_and_segment_routing),
        case!(doctor_finds_a_listener_beyond_its_endpoint),
        case!(b6_doctor_finds_rules_of_earlier_stemcells),
        case!(doctor_finds_servers_of_a_bus_that_are_no_endpoints),
        case!(doctor_finds_names_that_do_not_resolve),
        case!(doctor_finds_a_bus_of_the_settings_that_does_not_resolve),
        case!(doctor_finds_a_bad_configuration_and_nothing_active),
        case!(doctor_evaluates_an_image),
    ];
    let of_programs = [
        case!(doctor_chooses_as_a_start_does),
        case!(doctor_finds_translation_onto_an_endpoint),
        case!(doctor_finds_third_party_programs_by_their_order),
        case!(doctor_finds_an_open_bpffs_and_open_pins),
    ];
    let all = cases
        .into_iter()
        .chain(of_programs.into_iter().map(|case| case.needs(EBPF_NEEDS)));
    all.map(|case| case.on(WITH_BPF)).collect()
}

/// A network namespace of its own in which the binary looks around.
struct Ward {
    world: World,
    netns: Netns,
}

impl Ward {
    fn new(targets: &str) -> Result<Self> {
        let world = World::new()?;
        let netns = Netns::new(&world, "d")?;
        world.configure(targets)?;
        Ok(Self { world, netns })
    }

    /// One endpoint on this world's address, by what `auto` takes.
    fn guarded() -> Result<Self> {
        let ward = Self::new("")?;
        ward.guard("auto", &[format!("tcp://{}", ward.world.here())])?;
        Ok(ward)
    }

    fn guard(&self, backend: &str, endpoints: &[String]) -> Result<()> {
        self.world.configure(&format!(
            "backend = {backend:?}\n[target.main]\nendpoints = {endpoints:?}\nallow = [\"root\"]\n"
        ))?;
        self.netns.enforcer(&self.world, &["apply"])?.demand(0).map(drop)
    }

    fn report(&self) -> Result<Value> {
        let ran = self.netns.enforcer(&self.world, &["doctor", "--json"])?;
        // On any machine something is found: no daemon runs here.
        ran.demand(1).and_then(|ran| Ok(serde_json::from_str(&ran.stdout)?))
    }

    fn finds(&self, id: &str) -> Result<Value> {
        let report = self.report()?;
        found(&report, id)
            .cloned()
            .ok_or_else(|| anyhow::anyhow!("{id} is not in {report}"))
    }

    fn misses(&self, id: &str) -> Result<()> {
        let report = self.report()?;
        ensure!(found(&report, id).is_none(), "{id} is in {report}");
        Ok(())
    }
}

fn found<'a>(report: &'a Value, id: &str) -> Option<&'a Value> {
    report["findings"]
        .as_array()?
        .iter()
        .find(|finding| finding["id"] == id)
}

fn doctor_finds_what_this_kernel_can_do_and_leaves_nothing() -> Result<()> {
    let ward = Ward::guarded()?;
    let programs = || -> Result<_> {
        if lacks_ebpf() {
            return Ok(Vec::new());
        }
        let attached = attached(&ward.world.cgroup)?;
        let some = attached.iter().any(|(_, programs)| !programs.is_empty());
        ensure!(some, "what guards is not attached: {attached:?}");
        Ok(attached)
    };
    let before = programs()?;
    let report = ward.report()?;
    let features = report["features"].as_array().cloned().unwrap_or_default();
    ensure!(features.len() == 26, "{report}");
    for feature in &features {
        let id = feature["id"].as_str().unwrap_or_default();
        ensure!((feature["state"] == "supported") != is_lacking(id), "{feature}");
    }
    ensure!(report["schema"] == "enforcer/doctor/1", "{report}");
    let chosen = if lacks_ebpf() { "nftables" } else { "ebpf" };
    ensure!(report["choice"]["backend"] == chosen, "not {chosen}: {report}");
    ensure!(found(&report, "no-daemon").is_some(), "{report}");
    ensure!(report["unseen"].as_array().is_some_and(Vec::is_empty), "{report}");
    let after = programs()?;
    ensure!(before == after, "{before:?} became {after:?}");
    let tables = ward.netns.nft("list tables")?;
    ensure!(!tables.contains("probe"), "{tables}");
    ensure!(!Path::new("/sys/fs/bpf/enforcer_probe").exists());
    // The text says the same, and what to do about each.
    let text = ward.netns.enforcer(&ward.world, &["doctor"])?.demand(1)?.stdout;
    for finding in report["findings"].as_array().into_iter().flatten() {
        ensure!(
            text.contains(finding["id"].as_str().unwrap_or("?")),
            "{finding} is not in {text}"
        );
    }
    ensure!(text.matches("do: ").count() >= 2, "{text}");
    Ok(())
}

/// Whether this kernel is said to lack what a feature of the report is about.
fn is_lacking(id: &str) -> bool {
    match id {
        "bpf-syscall" | "ring-buffer" | "batch-operations" | "bpffs" | "programs" | "cgroup-sock-addr" => {
            lacks(Feature::Bpf)
        }
        "attach" | "cgroup-link" => lacks_ebpf(),
        "socket-owner" => lacks(Feature::Bpf) || lacks(Feature::Btf),
        "other-owners" => lacks(Feature::Bpf) || hides_owners(),
        "netns-cookie" => lacks(Feature::NetnsCookie),
        "nft-socket-cgroup" => lacks(Feature::SocketCgroup),
        _ => false,
    }
}

fn doctor_needs_root_and_an_image_that_is_there() -> Result<()> {
    let ward = Ward::guarded()?;
    let other = ran(ward.world.enforcer_as(NOBODY)?.arg("doctor"))?.demand(2)?;
    ensure!(other.stderr.contains("run as root"), "{other:?}");
    let gone = ward
        .world
        .enforcer(&["doctor", "--root", "/no/such/image"])?
        .demand(2)?;
    ensure!(gone.stderr.contains("/no/such/image"), "{gone:?}");
    Ok(())
}

fn doctor_finds_translation_onto_an_endpoint() -> Result<()> {
    let ward = Ward::guarded()?;
    ward.misses("nat-onto-endpoint")?;
    ward.netns.nft("add table ip theirs")?;
    ward.netns
        .nft("add chain ip theirs out { type nat hook output priority -100 ; }")?;
    let elsewhere = "10.9.9.9";
    let rule = |to: &str| format!("add rule ip theirs out ip daddr {elsewhere} tcp dport 80 dnat to {to}");
    ward.netns.nft(&rule("10.1.1.1:80"))?;
    ward.misses("nat-onto-endpoint")?;
    ward.netns.nft(&rule(&ward.world.here().to_string()))?;
    let finding = ward.finds("nat-onto-endpoint")?;
    ensure!(
        finding["weight"] == "high" && finding["do"].to_string().contains("both"),
        "{finding}"
    );
    // nftables evaluates after it.
    ward.guard("both", &[format!("tcp://{}", ward.world.here())])?;
    ward.misses("nat-onto-endpoint")?;
    ward.guard("ebpf", &["tcp://127.0.0.1:2822".to_owned()])?;
    ward.misses("nat-onto-endpoint")?;
    ward.netns
        .nft("add rule ip theirs out tcp dport 81 redirect to :2822")?;
    ward.finds("nat-onto-endpoint")?;
    Ok(())
}

fn doctor_finds_source_routes_and_segment_routing() -> Result<()> {
    let ward = Ward::guarded()?;
    ward.netns.set("ipv4/conf/all/accept_source_route", "0")?;
    for id in ["source-route", "segment-routing"] {
        ward.misses(id)?;
    }
    for setting in [
        "ipv4/conf/all/accept_source_route",
        "ipv4/conf/lo/accept_source_route",
        "ipv6/conf/all/seg6_enabled",
        "ipv6/conf/lo/seg6_enabled",
    ] {
        ward.netns.set(setting, "1")?;
    }
    for id in ["source-route", "segment-routing"] {
        let finding = ward.finds(id)?;
        ensure!(finding["items"].to_string().contains("\"lo\""), "{finding}");
    }
    Ok(())
}

fn doctor_finds_a_listener_beyond_its_endpoint() -> Result<()> {
    let ward = Ward::new("")?;
    let here = |address: &str| format!("tcp://{address}:{}", ward.world.port);
    ward.guard("auto", &[here("127.0.0.1")])?;
    ward.misses("listener-beyond-endpoint")?;
    let _listener = crate::world::Listener::start(Some(&ward.netns.file()), ward.world.port, &[])?;
    let finding = ward.finds("listener-beyond-endpoint")?;
    ensure!(finding["items"].to_string().contains("::1"), "{finding}");
    // As it says.
    ward.guard("auto", &[here("local")])?;
    ward.misses("listener-beyond-endpoint")
}

/// Two servers of one cluster, of which the settings name one.
fn doctor_finds_servers_of_a_bus_that_are_no_endpoints() -> Result<()> {
    let ward = Ward::new("")?;
    let servers = [1, 2].map(|last| SocketAddr::from(([10, 79, 8, last], 4222)));
    let [one, other] = servers;
    for server in servers {
        let address = format!("{}/32", server.ip());
        ward.netns.ip(&["address", "add", &address, "dev", "lo"])?;
    }
    let routes = servers.map(|server| format!("nats://{}:6222", server.ip()));
    let [of_one, of_other] = &routes;
    let attack = |uid, to| {
        anyhow::Ok(
            ward.world
                .attack(uid)
                .to(to)
                .in_netns(&ward.netns)?
                .flag("--no-greeting"),
        )
    };
    let answers = |server| {
        let open = attack(NOBODY, server)?;
        until("the server answers", || Ok(open.run()?.errno.is_none()))
    };
    let _one = nats_server(&ward.netns, one, &["--cluster", of_one, "--cluster_name", "c"])?;
    answers(one)?;
    ward.guard("auto", &[format!("nats://{one}")])?;
    ward.misses("bus-members")?;
    let _other = nats_server(
        &ward.netns,
        other,
        &["--cluster", of_other, "--cluster_name", "c", "--routes", of_one],
    )?;
    // What it is about: this one is open.
    answers(other)?;
    until("the servers know each other", || Ok(ward.finds("bus-members").is_ok()))?;
    let finding = ward.finds("bus-members")?.to_string();
    let said = format!("{other}, announced by {one}");
    ensure!(
        finding.contains(&said) && !finding.contains(&format!("\"{one},")),
        "{finding}"
    );
    // Who may not connect as root is not asked: that would be denied, and reported.
    let allow = format!("[target.main]\nendpoints = [\"nats://{one}\"]\nallow = [{NOBODY}]\n");
    ward.world.configure(&allow)?;
    ward.netns.enforcer(&ward.world, &["apply"])?.demand(0)?;
    ward.misses("bus-members")?;
    let status = ward.netns.enforcer(&ward.world, &["status", "--json"])?;
    let status: Value = serde_json::from_str(&status.stdout)?;
    ensure!(status["targets"][0]["denied"] == 0, "{status}");
    // An address of another target, a prefix and a service of another kind are all well.
    for endpoints in [
        vec![format!("nats://{one}"), format!("tcp://{other}")],
        vec![format!("nats://{one}"), format!("tcp://10.79.8.0/24:{}", other.port())],
        vec![format!("tcp://{one}")],
    ] {
        ward.guard("auto", &endpoints)?;
        ward.misses("bus-members")?;
    }
    // It was not that nobody answered.
    ward.guard("auto", &[format!("nats://{one}")])?;
    ward.finds("bus-members").map(drop)
}

fn b6_doctor_finds_rules_of_earlier_stemcells() -> Result<()> {
    let ward = Ward::guarded()?;
    ward.misses("old-stemcell-rules")?;
    // As the agent makes them.
    for command in [
        "add table inet bosh_agent",
        "add chain inet bosh_agent monit_access_jobs",
        "add chain inet bosh_agent monit_access { type filter hook output priority -1 ; policy accept ; }",
        "add rule inet bosh_agent monit_access jump monit_access_jobs",
        "add rule inet bosh_agent monit_access meta skuid 0 ip daddr 127.0.0.1 tcp dport 2822 accept",
        "add rule inet bosh_agent monit_access ip daddr 127.0.0.1 tcp dport 2822 drop",
    ] {
        ward.netns.nft(command)?;
    }
    let finding = ward.finds("old-stemcell-rules")?;
    ensure!(
        finding["items"].to_string().contains("bosh_agent monit_access"),
        "{finding}"
    );
    // For root alone, as ours.
    ensure!(finding["weight"] == "low", "{finding}");
    // As it says.
    ensure!(
        finding["do"]
            .to_string()
            .contains("nft delete chain inet bosh_agent monit_access"),
        "{finding}"
    );
    ward.netns.nft("delete chain inet bosh_agent monit_access")?;
    ward.misses("old-stemcell-rules")?;
    ward.netns.nft("delete table inet bosh_agent")?;
    // What enforcer makes itself (B5) is no finding.
    ward.world.configure(&format!(
        "backend = \"nftables\"\n[target.monit]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\ngrants = true\n",
        ward.world.here()
    ))?;
    let _daemon = ward.world.daemon_with(&mut ward.netns.command(&binary("enforcer")?))?;
    let tables = ward.netns.nft("list table inet bosh_agent")?;
    ensure!(tables.contains("chain monit_access_jobs"), "{tables}");
    let looked = ward.netns.enforcer(&ward.world, &["doctor", "--json"])?;
    let report: Value = serde_json::from_str(&looked.stdout)?;
    ensure!(found(&report, "old-stemcell-rules").is_none(), "{report}");
    Ok(())
}

fn doctor_finds_third_party_programs_by_their_order() -> Result<()> {
    let ward = Ward::guarded()?;
    let cgroup = ward.world.cgroup.clone();
    let misses = |ids: [&str; 2]| ids.into_iter().try_for_each(|id| ward.misses(id));
    misses(["program-before", "program-after"])?;
    let theirs = ForeignProgram::rewriting(&cgroup, Sharing::Multi, Ipv4Addr::new(127, 9, 9, 9))?;
    let finding = ward.finds("program-after")?;
    ensure!(finding["weight"] == "high", "{finding}");
    ward.misses("program-before")?;
    ward.netns.enforcer(&ward.world, &["unload"])?.demand(0)?;
    ward.guard("ebpf", &[format!("tcp://{}", ward.world.here())])?;
    ward.misses("program-after")?;
    let finding = ward.finds("program-before")?;
    ensure!(finding["weight"] == "medium", "{finding}");
    drop(theirs);
    misses(["program-before", "program-after"])
}

/// In a mount namespace of its own, so that nobody else meets the open bpffs.
fn doctor_finds_an_open_bpffs_and_open_pins() -> Result<()> {
    let ward = Ward::guarded()?;
    ward.misses("bpffs-open")?;
    ward.misses("pins-open")?;
    let look = |preparation: &str| -> Result<Value> {
        let script = format!("{preparation} && shift && exec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh"]);
        command.arg(ward.world.path("")).arg(binary("enforcer")?);
        command.arg("--config").arg(ward.world.path("enforcer.toml"));
        let ran = ran(command.args(["doctor", "--json"]))?.demand(1)?;
        Ok(serde_json::from_str(&ran.stdout)?)
    };
    for (mode, id) in [("0777", "bpffs-open"), ("1777", "bpffs-shared")] {
        let report = look(&format!("mount -t bpf bpf /sys/fs/bpf && chmod {mode} /sys/fs/bpf"))?;
        ensure!(found(&report, id).is_some(), "{id} is not in {report}");
    }
    let pin = ward.world.pins().join("connect4");
    fs::set_permissions(&pin, fs::Permissions::from_mode(0o666))?;
    let finding = ward.finds("pins-open")?;
    ensure!(finding["items"].to_string().contains("connect4"), "{finding}");
    fs::set_permissions(&pin, fs::Permissions::from_mode(0o600))?;
    let state = ward.world.path("state");
    fs::create_dir_all(&state)?;
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777))?;
    ward.finds("state-open")?;
    let run = ward.world.path("run");
    fs::create_dir_all(&run)?;
    fs::set_permissions(&run, fs::Permissions::from_mode(0o777))?;
    ward.finds("socket-open")?;
    Ok(())
}

fn doctor_finds_names_that_do_not_resolve() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    let look = || -> Result<Value> {
        let mut command = named.world.with_resolver()?;
        command.arg("--config").arg(named.world.path("enforcer.toml"));
        Ok(serde_json::from_str(
            &ran(command.args(["doctor", "--json"]))?.demand(1)?.stdout,
        )?)
    };
    named.dns.set("bus.test", super::names::addresses(&["10.9.0.1"]));
    let report = look()?;
    ensure!(found(&report, "name-unresolved").is_none(), "{report}");
    named
        .dns
        .set("bus.test", Zone::Code(hickory_proto::op::ResponseCode::NXDomain));
    let report = look()?;
    let Some(finding) = found(&report, "name-unresolved") else {
        bail!("{report}");
    };
    ensure!(finding["items"].to_string().contains("bus.test"), "{finding}");
    Ok(())
}

/// The message bus that an agent's settings name counts as one that is configured, also when only the last run knew of
/// it.
fn doctor_finds_a_bus_of_the_settings_that_does_not_resolve() -> Result<()> {
    let named = Named::new(&[], "")?;
    let dir = named.world.path("bosh");
    fs::create_dir(&dir)?;
    let settings = dir.join("settings.json");
    let url = format!("nats://me:secret@bus.test:{}", named.world.port);
    fs::write(&settings, format!("{{\"mbus\":{url:?}}}"))?;
    named
        .world
        .configure(&format!("[bosh]\ndir = {:?}\n", dir.display().to_string()))?;
    let look = |code| -> Result<Value> {
        let mut command = named.world.with_resolver()?;
        command.arg("--config").arg(named.world.path("enforcer.toml"));
        Ok(serde_json::from_str(
            &ran(command.args(["doctor", "--json"]))?.demand(code)?.stdout,
        )?)
    };
    named.dns.set("bus.test", super::names::addresses(&["10.9.0.1"]));
    let report = look(1)?;
    ensure!(found(&report, "name-unresolved").is_none(), "{report}");
    let gone = Zone::Code(hickory_proto::op::ResponseCode::NXDomain);
    named.dns.set("bus.test", gone.clone());
    let unresolved = |report: &Value| {
        let finding = found(report, "name-unresolved");
        let items = finding.map(|finding| finding["items"].to_string());
        ensure!(items.is_some_and(|items| items.contains("bus.test")), "{report}");
        Ok(())
    };
    unresolved(&look(1)?)?;
    named.dns.set("bus.test", super::names::addresses(&["10.9.0.1"]));
    named.daemon()?.kill()?;
    named.dns.set("bus.test", gone);
    fs::remove_file(&settings)?;
    let report = look(1)?;
    unresolved(&report)?;
    ensure!(!report.to_string().contains("secret"), "{report}");
    named.world.enforcer(&["unload"])?.demand(0).map(drop)
}

/// `auto` as configured here, with a place that cannot be, and in a program that may not use BPF: what `doctor` says is
/// what a start does.
fn doctor_chooses_as_a_start_does() -> Result<()> {
    let ward = Ward::guarded()?;
    ward.netns.enforcer(&ward.world, &["unload"])?.demand(0)?;
    let file = ward.world.path("enforcer.toml");
    let good = fs::read_to_string(&file)?;
    let quoted = |path: &Path| format!("{:?}", path.display().to_string());
    let no_place = quoted(&ward.world.path("place"));
    let elsewhere = good.replace(&quoted(&ward.world.pins()), &no_place);
    let no_cgroup = good.replace(&quoted(&ward.world.cgroup), &no_place);
    for (what, text, prefix, refused) in [
        ("as it should be", &good, &[][..], false),
        ("pin_dir not on a bpffs", &elsewhere, &[], true),
        ("cgroup that is none", &no_cgroup, &[], true),
        ("no BPF", &good, &["--no-bpf", "eperm", "--"], false),
        ("no BPF", &good, &["--no-bpf", "enosys", "--"], false),
    ] {
        // Without them it is no mistake, nor written there.
        let refused = refused && !lacks_ebpf();
        fs::write(&file, text)?;
        let asked = |words: &[&str]| {
            let mut command = ward.netns.command(&binary("confined")?);
            let prefix = if prefix.is_empty() { &["--"][..] } else { prefix };
            command.args(prefix).arg(binary("enforcer")?).arg("--config").arg(&file);
            ran(command.args(words))
        };
        let report = asked(&["doctor", "--json"])?.demand(1)?.stdout;
        let chosen = serde_json::from_str::<Value>(&report)?["choice"].clone();
        let applied = asked(&["apply"])?;
        println!("    {what}: {chosen}");
        if refused {
            ensure!(chosen["backend"].is_null(), "{what}: {chosen}");
            ensure!(
                applied.code == 2 && applied.stderr.contains("/place"),
                "{what}: {applied:?}"
            );
            ensure!(chosen["why"].to_string().contains("/place"), "{what}: {chosen}");
            continue;
        }
        let Some(backend) = chosen["backend"].as_str() else {
            bail!("{what}: {chosen}");
        };
        let status = applied.demand(0)?.stdout;
        ensure!(
            status.contains(&format!("backend     {backend}")),
            "{backend}: {status}"
        );
        ward.netns.enforcer(&ward.world, &["unload"])?.demand(0)?;
    }
    Ok(())
}

fn doctor_finds_a_bad_configuration_and_nothing_active() -> Result<()> {
    let ward = Ward::guarded()?;
    ward.misses("nothing-active")?;
    ward.misses("configuration")?;
    ward.netns.enforcer(&ward.world, &["unload"])?.demand(0)?;
    ward.finds("nothing-active")?;
    fs::write(ward.world.path("enforcer.toml"), "mode = \"perhaps\"\n")?;
    let finding = ward.finds("configuration")?;
    ensure!(finding["items"].to_string().contains("enforcer.toml:1"), "{finding}");
    Ok(())
}

/// A directory that looks like a stemcell unpacked.
fn doctor_evaluates_an_image() -> Result<()> {
    let world = World::new()?;
    let root = world.path("image");
    let put = |path: &str, text: &str| -> Result<()> {
        let path = root.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(fs::write(path, text)?)
    };
    let look = |code| -> Result<Value> {
        let path = root.display().to_string();
        let ran = ran(Command::new(binary("enforcer")?).args(["doctor", "--json", "--root", &path]))?.demand(code)?;
        Ok(serde_json::from_str(&ran.stdout)?)
    };
    put(
        "etc/passwd",
        "root:x:0:0::/root:/bin/sh\nvcap:x:1000:1000::/home/vcap:/bin/sh\n",
    )?;
    let report = look(1)?;
    for (id, is_there) in [("files-missing", true), ("no-backend", true), ("configuration", false)] {
        ensure!(found(&report, id).is_some() == is_there, "{id}: {report}");
    }
    let built_in = "BPF_SYSCALL CGROUPS CGROUP_BPF INET DEBUG_INFO_BTF NF_TABLES_INET NF_TABLES_IPV4 NF_TABLES_IPV6 \
        INET_DIAG_DESTROY";
    let modules = [
        ("NF_TABLES", "nf_tables"),
        ("NFT_REJECT", "nft_reject"),
        ("NFT_REJECT_INET", "nft_reject_inet"),
        ("NFT_LIMIT", "nft_limit"),
        ("NFT_LOG", "nft_log"),
        ("NETFILTER_NETLINK_LOG", "nfnetlink_log"),
        ("NFT_SOCKET", "nft_socket"),
        ("INET_DIAG", "inet_diag"),
        ("INET_TCP_DIAG", "tcp_diag"),
    ];
    let mut options = String::new();
    for name in built_in.split(' ') {
        options.push_str(&format!("CONFIG_{name}=y\n"));
    }
    let mut dep = String::new();
    for (option, module) in modules {
        options.push_str(&format!("CONFIG_{option}=m\n"));
        dep.push_str(&format!("kernel/net/{module}.ko: \n"));
    }
    put("boot/config-6.8.0-9-generic", &options)?;
    put("boot/config-5.15.0-1-generic", "CONFIG_INET=y\n")?;
    put("lib/modules/6.8.0-9-generic/modules.dep", &dep)?;
    for file in [
        "usr/sbin/enforcer",
        "usr/lib/systemd/system/enforcer-early.service",
        "usr/lib/systemd/system/enforcer.service",
        "etc/systemd/system/sysinit.target.wants/enforcer-early.service",
        "etc/systemd/system/multi-user.target.wants/enforcer.service",
    ] {
        put(file, "")?;
    }
    let config =
        |user: &str| format!("[target.monit]\nendpoints = [\"tcp://127.0.0.1:2822\"]\nallow = [\"root\", {user:?}]\n");
    put("etc/enforcer/enforcer.toml", &config("nosuchuser"))?;
    let report = look(1)?;
    ensure!(found(&report, "principal-absent").is_some(), "{report}");
    put("etc/enforcer/enforcer.toml", "bogus = 1\n")?;
    let report = look(1)?;
    ensure!(found(&report, "configuration").is_some(), "{report}");
    put("etc/enforcer/enforcer.toml", &config("vcap"))?;
    let report = look(0)?;
    ensure!(
        report["host"]["kernel"] == "6.8.0-9-generic" && report["choice"]["backend"] == "ebpf",
        "{report}"
    );
    let without = options.replace("CONFIG_CGROUP_BPF=y", "# CONFIG_CGROUP_BPF is not set");
    put("boot/config-6.8.0-9-generic", &without)?;
    // Ours under the agent's names, as jobs call it.
    put(
        "var/vcap/bosh/etc/monit-access-helper.sh",
        include_str!("../../../enforcer/packaging/monit-access-helper.sh"),
    )?;
    let link = root.join("var/vcap/bosh/etc/bosh-enable-monit-access");
    std::os::unix::fs::symlink("/usr/sbin/enforcer", &link)?;
    ensure!(found(&look(1)?, "old-stemcell-rules").is_none(), "{report}");
    fs::remove_file(&link)?;
    put(
        "var/vcap/bosh/etc/bosh-enable-monit-access",
        "#!/bin/sh\nnft add rule …\n",
    )?;
    let finding = look(1)?;
    ensure!(found(&finding, "old-stemcell-rules").is_some(), "{finding}");
    fs::remove_file(&link)?;
    put("etc/nftables/monit.nft", "")?;
    let writable = root.join("usr/sbin/enforcer");
    fs::set_permissions(&writable, fs::Permissions::from_mode(0o777))?;
    let report = look(1)?;
    for id in ["kernel-options", "old-stemcell-rules", "files-writable"] {
        ensure!(found(&report, id).is_some(), "{id} is not in {report}");
    }
    ensure!(report["choice"]["backend"] == "nftables", "{report}");
    fs::remove_file(root.join("lib/modules/6.8.0-9-generic/modules.dep"))?;
    put("lib/modules/6.8.0-9-generic/modules.dep", "kernel/net/nf_tables.ko:\n")?;
    let report = look(1)?;
    ensure!(report["choice"]["backend"].is_null(), "{report}");
    Ok(())
}
