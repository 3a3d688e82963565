//! §5: random rule sets and attempts, each judged by the oracle, by eBPF and by nftables with real sockets: all the
//! same.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use enforcer::{
    config::Config,
    grants::{Grantee, Grants, Key},
    host,
    policy::{CgroupPath, HostUsers, Policy, Protocol, Uid},
    ruleset::{self, RuleSet, Subject, compile, explain},
};
use enforcer_ebpf::Verdict;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{Case, grants::lasting};
use crate::{
    backend::{ALL, BOTH, Backend},
    world::{Listener, NOBODY, Netns, World, cgroup_mount},
};

/// Rule sets, and attempts on each by each backend.
const RULE_SETS: usize = 40;
const ATTEMPTS: usize = 30;
const USERS: [u32; 4] = [0, 33, 1001, NOBODY];

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(s5_the_oracle_ebpf_and_nftables_agree).on(BOTH),
        case!(s5_who_counts_a_refusal).on(ALL),
    ]
}

fn s5_the_oracle_ebpf_and_nftables_agree() -> Result<()> {
    let seed = rand::random();
    println!("    seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let world = World::new()?;
    let netns = Netns::new(&world, "parity")?;
    let routable = Ipv4Addr::new(10, 44, 0, 1);
    netns.ip(&["address", "add", "10.44.0.1/24", "dev", "lo"])?;
    netns.ip(&["address", "add", "2001:db8:44::1/64", "dev", "lo", "nodad"])?;
    let _listener = Listener::start(Some(&netns.file()), world.port, &[])?;
    let child = world.cgroup.join("child");
    fs::create_dir(&child)?;
    let addresses: Vec<IpAddr> = (1..6)
        .map(|low| Ipv4Addr::new(127, 44, 0, low).into())
        .chain([routable.into(), Ipv6Addr::LOCALHOST.into()])
        .chain(["2001:db8:44::1".parse()?])
        .collect();
    let mut judged = [0; 2];
    for _ in 0..RULE_SETS {
        let targets = random_targets(&mut random, &world, &addresses)?;
        let grants = random_grants(&mut random, &world)?;
        enforcer::grants::save(&world.path("state"), &grants)?;
        let attempts: Vec<_> = (0..ATTEMPTS)
            .map(|_| {
                let address = addresses.get(random.random_range(0..addresses.len())).copied();
                let user = USERS.get(random.random_range(0..USERS.len())).copied();
                (address, user, random.random_bool(0.5))
            })
            .collect();
        for backend in ["ebpf", "nftables"] {
            world.configure(&format!("backend = \"{backend}\"\n{targets}"))?;
            netns.enforcer(&world, &["apply"])?.demand(0)?;
            let rules = rules(&world, &grants)?;
            for (address, user, in_child) in &attempts {
                let (Some(address), Some(user)) = (*address, *user) else {
                    continue;
                };
                let cgroup = if *in_child { &child } else { &world.cgroup };
                let to = SocketAddr::new(address, world.port);
                let attack = world.attack(user).in_cgroup(cgroup).to(to).in_netns(&netns)?;
                let outcome = attack.run()?.errno;
                let verdict = explain(&rules, &attempt(to, user, cgroup)?).verdict;
                let errno = if backend == "ebpf" {
                    libc::EPERM
                } else {
                    libc::ECONNREFUSED
                };
                let expected = match verdict {
                    Verdict::Allow | Verdict::Unjudged | Verdict::WouldDeny => None,
                    Verdict::Deny => Some(errno),
                };
                if let Some(count) = judged.get_mut(usize::from(expected.is_some())) {
                    *count += 1;
                }
                ensure!(
                    outcome == expected,
                    "{backend}: user {user} in {} to {to}: {outcome:?} instead of {expected:?} ({verdict:?}), under\n\
                     {targets}",
                    cgroup.display()
                );
            }
        }
    }
    netns.enforcer(&world, &["unload"])?.demand(0)?;
    fs::remove_dir(&child)?;
    let [passed, refused] = judged;
    println!("    {passed} attempts to pass and {refused} to be refused, all as the oracle says");
    ensure!(
        passed > 100 && refused > 100,
        "too few of one kind: {passed} and {refused}"
    );
    Ok(())
}

/// §5: the first target that refuses counts; what each half refuses adds up.
fn s5_who_counts_a_refusal() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let here = world.here();
    let target = |name: &str| format!("[target.{name}]\nendpoints = [\"tcp://{here}\"]\nallow = [\"root\"]\n");
    world.attack(NOBODY).reaches()?;
    world.configure(&(target("one") + &target("two")))?;
    world.apply()?;
    let refused = |attack: &crate::world::Attack| -> Result<()> {
        ensure!(attack.run()?.errno.is_some(), "not refused");
        Ok(())
    };
    refused(&world.attack(NOBODY))?;
    let mut expected = [1, 0];
    if Backend::current() == Backend::Both {
        // Out of eBPF's cgroup nftables refuses.
        refused(&world.attack(NOBODY).anywhere())?;
        expected = [2, 0];
    }
    let status = world.status()?;
    let denied = [0, 1].map(|number| status["targets"][number]["denied"].as_u64());
    ensure!(
        denied == expected.map(Some),
        "{denied:?} instead of {expected:?}: {status}"
    );
    Ok(())
}

fn random_targets(random: &mut StdRng, world: &World, addresses: &[IpAddr]) -> Result<String> {
    let mount = cgroup_mount()?;
    let below = world.cgroup.strip_prefix(&mount)?.display().to_string();
    let mut text = String::new();
    for number in 0..random.random_range(1..4) {
        let mut endpoints = Vec::new();
        for _ in 0..random.random_range(1..5) {
            let address = addresses
                .get(random.random_range(0..addresses.len()))
                .context("no address")?;
            endpoints.push(match (address, random.random_range(0..4)) {
                (IpAddr::V4(address), 0) => {
                    let net = ipnet_text(*address, random.random_range(24..32));
                    format!("tcp://{net}:{}", world.port)
                }
                (IpAddr::V4(address), _) => format!("tcp://{address}:{}", world.port),
                (IpAddr::V6(address), _) => format!("tcp://[{address}]:{}", world.port),
            });
        }
        endpoints.dedup();
        let mut allow: Vec<String> = Vec::new();
        for user in USERS {
            match random.random_range(0..5) {
                0 | 1 => allow.push(user.to_string()),
                2 => allow.push(format!("{{ user = {user}, cgroup = \"/{below}/child\" }}")),
                _ => {}
            }
        }
        text.push_str(&format!(
            "[target.t{number}]\nendpoints = {endpoints:?}\nallow = [{}]\ngrants = {}\n",
            allow.join(", "),
            random.random_bool(0.8)
        ));
    }
    Ok(text)
}

/// What no configuration can say: anybody within a cgroup.
fn random_grants(random: &mut StdRng, world: &World) -> Result<Grants> {
    let below = world.cgroup.strip_prefix(cgroup_mount()?)?.display().to_string();
    let mut grants = Grants::default();
    for number in 0..3 {
        let path = match random.random_range(0..6) {
            0 => format!("/{below}"),
            1 | 2 => format!("/{below}/child"),
            3 => format!("/{below}/gone"),
            _ => continue,
        };
        let to = Grantee::Cgroup(CgroupPath::parse(&path)?);
        let target = format!("t{number}");
        grants.grant(Key { target, to }, lasting())?;
    }
    Ok(grants)
}

fn ipnet_text(address: Ipv4Addr, length: u32) -> String {
    let network = address.to_bits() & (u32::MAX << (32 - length));
    format!("{}/{length}", Ipv4Addr::from_bits(network))
}

/// The rule set that the world's configuration means.
fn rules(world: &World, grants: &Grants) -> Result<RuleSet> {
    let config = Config::load(&world.path("enforcer.toml"))?;
    let policy = Policy::from_config(&config, &HostUsers)?.policy;
    let policy = grants.add_to(&policy);
    let mount = cgroup_mount()?;
    let host = host::snapshot(Some(&mount), &policy.cgroups())?;
    Ok(compile(&policy, &ruleset::Resolved::new(), &host)?)
}

fn attempt(to: SocketAddr, user: u32, cgroup: &std::path::Path) -> Result<ruleset::Attempt> {
    let mount = cgroup_mount()?;
    let path = format!("/{}", cgroup.strip_prefix(&mount)?.display());
    let path = enforcer::policy::CgroupPath::parse(&path)?;
    Ok(ruleset::Attempt {
        protocol: Protocol::Tcp,
        address: to.ip(),
        port: to.port(),
        foreign_netns: false,
        subject: Subject {
            task: Uid(user),
            socket: Some(Uid(user)),
            kernel_thread: false,
            cgroups: host::ancestors(Some(&mount), &path)?,
        },
    })
}
