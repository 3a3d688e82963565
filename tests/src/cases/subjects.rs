//! D3: tasks and sockets that change places: moved between cgroups, in namespaces of their own, the kernel's own
//! threads.

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MsFlags, mount, umount},
    sched::{CloneFlags, setns},
};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

use super::Case;
use crate::{
    attack::{GREETING, Way},
    backend::{Backend, EBPF},
    kernel::{CGROUP_NEEDS, Feature, cannot},
    world::{Listener, NOBODY, Netns, World, binary, cgroup_mount, copy_binary, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(d3_the_sockets_cgroup_decides_who_is_judged),
        case!(d3_the_tasks_cgroup_decides_whom_a_principal_is).needs(CGROUP_NEEDS),
        case!(d3_cgroup_v1_is_no_way_out),
        case!(d3_root_of_a_user_and_network_namespace),
        case!(d3_a_kernel_thread_is_no_user).on(EBPF).needs(&[Feature::Mptcp]),
        case!(d7_link_local_addresses),
    ]
}

fn here(world: &World) -> [String; 1] {
    [format!("tcp://{}", world.here())]
}

fn child(world: &World) -> Result<PathBuf> {
    let child = world.cgroup.join("child");
    fs::create_dir(&child)?;
    Ok(child)
}

fn d3_the_sockets_cgroup_decides_who_is_judged() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let child = child(&world)?;
    let away = cgroup_mount()?.display().to_string();
    let attacks = [
        world.attack(NOBODY).option("--then-cgroup", &away),
        world.attack(NOBODY).in_cgroup(&child),
        world.attack(NOBODY).in_cgroup(&child).option("--then-cgroup", &away),
    ];
    for attack in &attacks {
        attack.reaches()?;
    }
    world.configure_one(&here(&world), r#"["root"]"#)?;
    world.apply()?;
    for attack in &attacks {
        attack.is_refused()?;
    }
    Ok(())
}

fn d3_the_tasks_cgroup_decides_whom_a_principal_is() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let child = child(&world)?;
    let path = Path::new("/").join(child.strip_prefix(cgroup_mount()?)?);
    let (outside, inside) = (world.cgroup.display().to_string(), child.display().to_string());
    let moves_in = world.attack(NOBODY).option("--then-cgroup", &inside);
    let moves_out = world.attack(NOBODY).in_cgroup(&child).option("--then-cgroup", &outside);
    moves_in.reaches()?;
    moves_out.reaches()?;
    let allow = format!("[{{ user = {NOBODY}, cgroup = {:?} }}]", path.display().to_string());
    world.configure_one(&here(&world), &allow)?;
    world.apply()?;
    // §5: nftables goes by the cgroup that the socket was made in.
    let by_socket = Backend::current().is_nftables();
    moves_in.succeeds(!by_socket)?;
    moves_out.succeeds(by_socket)?;
    // Neither task nor socket is inside.
    world.attack(NOBODY).is_refused()?;
    world.attack(0).in_cgroup(&child).is_refused()
}

/// A version 1 hierarchy without controllers, gone when dropped.
struct Hierarchy {
    mount: PathBuf,
    name: String,
}

impl Hierarchy {
    fn new(world: &World) -> Result<Self> {
        let mount_point = world.path("v1");
        fs::create_dir(&mount_point)?;
        let this = Self {
            mount: mount_point,
            name: format!("name={}", world.name()),
        };
        this.mount()?;
        Ok(this)
    }

    fn mount(&self) -> Result<()> {
        let options = format!("none,{}", self.name);
        Ok(mount(
            Some("cgroup"),
            &self.mount,
            Some("cgroup"),
            MsFlags::empty(),
            Some(options.as_str()),
        )?)
    }
}

impl Drop for Hierarchy {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.mount.join("group"));
        // It stays, without a mount, if the group is still being released then; otherwise it goes a moment later.
        for _ in 0..10 {
            let _ = umount(&self.mount);
            for _ in 0..50 {
                if !fs::read_to_string("/proc/self/cgroup").is_ok_and(|all| all.contains(&self.name)) {
                    return;
                }
                thread::sleep(Duration::from_millis(10));
            }
            let _ = self.mount();
        }
    }
}

fn d3_cgroup_v1_is_no_way_out() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    let hierarchy = Hierarchy::new(&world)?;
    let group = hierarchy.mount.join("group");
    fs::create_dir(&group)?;
    let attack = world.attack(NOBODY).in_cgroup(&group);
    attack.reaches()?;
    let target = format!("[target.main]\nendpoints = {:?}\nallow = [\"root\"]\n", here(&world));
    world.configure_on(&cgroup_mount()?, &target)?;
    world.apply()?;
    attack.is_refused()?;
    world.attack(0).in_cgroup(&group).reaches()?;
    world.enforcer(&["unload"])?.demand(0).map(drop)
}

/// A process that holds namespaces open.
struct Holder(Child);

impl Holder {
    fn namespace(&self, kind: &str) -> PathBuf {
        Path::new("/proc").join(self.0.id().to_string()).join("ns").join(kind)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn d3_root_of_a_user_and_network_namespace() -> Result<()> {
    let world = World::new()?;
    let home = Netns::new(&world, "home")?;
    let user = NOBODY.to_string();
    let holder = Command::new("setpriv")
        .args(["--reuid", &user, "--regid", &user, "--clear-groups"])
        .args(["unshare", "--user", "--map-root-user", "--net", "sleep", "60"])
        .spawn()?;
    let holder = Holder(holder);
    let ours = fs::read_link("/proc/self/ns/net")?;
    until("the namespaces are there", || {
        Ok(fs::read_link(holder.namespace("net")).is_ok_and(|theirs| theirs != ours))
    })?;
    let pid = holder.0.id().to_string();
    home.ip(&[
        "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", &pid,
    ])?;
    home.ip(&["address", "add", "10.80.0.1/24", "dev", "veth0"])?;
    home.ip(&["link", "set", "veth0", "up"])?;
    let net = format!("--net={}", holder.namespace("net").display());
    let script = "ip address add 10.80.0.2/24 dev veth0 && ip link set veth0 up && ip link set lo up";
    ran(Command::new("nsenter").args([net.as_str(), "sh", "-c", script]))?.demand(0)?;
    let _listener = Listener::start(Some(&home.file()), world.port, &[])?;

    let copy = world.path("attack");
    copy_binary("attack", &copy)?;
    let enter = format!(
        "echo $$ > {}/cgroup.procs && exec nsenter --target {pid} --user --net -- \"$@\"",
        world.cgroup.display()
    );
    let to = SocketAddr::new("10.80.0.1".parse()?, world.port);
    let attack = world.attack(NOBODY).anywhere().to(to);
    let attack = attack.program(&["sh", "-c", &enter, "sh"], copy).flag("--as-is");
    attack.reaches()?;
    match cannot(Way::Mptcp) {
        Some(errno) => attack.clone().way(Way::Mptcp).fails_by(errno)?,
        None => attack.clone().way(Way::Mptcp).reaches()?,
    }
    world.configure_one(&[format!("tcp://{to}")], r#"["root"]"#)?;
    let _daemon = world.daemon_with(&mut home.command(&binary("enforcer")?))?;
    // §5: what arrives here from another namespace is no call below our cgroup, and no packet that leaves or is
    // forwarded.
    let nftables = Backend::current().is_nftables();
    for way in [Way::Plain, Way::Mapped, Way::Mptcp]
        .into_iter()
        .filter(|way| cannot(*way).is_none())
    {
        attack.clone().way(way).succeeds(nftables)?;
    }
    let events = world.enforcer(&["events", "--json"])?.demand(0)?.stdout;
    for line in events.lines() {
        let event: Value = serde_json::from_str(line)?;
        ensure!(event["task_uid"] == NOBODY && event["socket_uid"] == NOBODY, "{event}");
    }
    Ok(())
}

/// Serves MPTCP and keeps a connection for a while, so that a further address is announced and dialled.
pub(super) fn serve_mptcp(netns: &Netns, port: u16) -> Result<thread::JoinHandle<()>> {
    let file = fs::File::open(netns.file())?;
    let bound = thread::spawn(move || -> Result<TcpListener> {
        setns(file, CloneFlags::CLONE_NEWNET)?;
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP))?;
        // The first round's connection may not have faded yet.
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from(([0, 0, 0, 0], port)).into())?;
        socket.listen(8)?;
        Ok(socket.into())
    });
    let listener = bound
        .join()
        .map_err(|_| anyhow::anyhow!("the server's thread panicked"))??;
    Ok(thread::spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else {
            return;
        };
        let (first, rest) = GREETING.split_at(1);
        let _ = stream.write_all(first);
        thread::sleep(Duration::from_millis(500));
        let _ = stream.write_all(rest);
    }))
}

/// A server announces an address to an MPTCP client, whose kernel dials it from a thread of its own.
fn d3_a_kernel_thread_is_no_user() -> Result<()> {
    let world = World::new()?;
    let (home, server) = (Netns::new(&world, "home")?, Netns::new(&world, "server")?);
    home.join(&["10.81.0.1/24"], &server, &["10.81.0.2/24", "10.81.0.3/24"])?;
    for netns in [&home, &server] {
        let limits = ["limits", "set", "subflows", "4", "add_addr_accepted", "4"];
        ran(netns.command(Path::new("ip")).arg("mptcp").args(limits))?.demand(0)?;
    }
    let announce = ["endpoint", "add", "10.81.0.3", "dev", "veth0", "signal"];
    ran(server.command(Path::new("ip")).arg("mptcp").args(announce))?.demand(0)?;
    let dialled = SocketAddr::new("10.81.0.2".parse()?, world.port);
    let announced = format!("10.81.0.3:{}", world.port);
    let attack = world.attack(NOBODY).way(Way::Mptcp).to(dialled);
    let attack = attack.option("--netns", &home.file().display().to_string());
    for (allow, counter) in [("[{ kernel = true }]", "allowed"), (r#"["root"]"#, "denied")] {
        world.configure_one(&[format!("tcp://{announced}")], allow)?;
        let _daemon = world.daemon_with(&mut home.command(&binary("enforcer")?))?;
        let served = serve_mptcp(&server, world.port)?;
        attack.reaches()?;
        let status = world.status()?;
        ensure!(
            status["targets"][0][counter].as_u64() >= Some(1),
            "{counter} by {allow}: {status}"
        );
        served.join().map_err(|_| anyhow::anyhow!("the server panicked"))?;
        if counter == "denied" {
            let events = world.enforcer(&["events", "--json"])?.demand(0)?.stdout;
            let event: Value = serde_json::from_str(events.lines().last().context("no event")?)?;
            ensure!(
                event["kernel_thread"] == true && event["judged"] == announced,
                "{event}"
            );
        }
        world.enforcer(&["unload"])?.demand(0)?;
    }
    Ok(())
}

fn d7_link_local_addresses() -> Result<()> {
    let world = World::new()?;
    let (home, peer) = (Netns::new(&world, "home")?, Netns::new(&world, "peer")?);
    home.join(&["fe80::77/64"], &peer, &["fe80::78/64"])?;
    let _listener = Listener::start(Some(&home.file()), world.port, &[])?;
    let from = |netns: &Netns| -> Result<_> {
        let shown = ran(netns
            .command(Path::new("ip"))
            .args(["-o", "link", "show", "dev", "veth0"])
            .stderr(Stdio::null()))?;
        let index = shown.stdout.split(':').next().context("no index")?.to_owned();
        let to: SocketAddr = format!("[fe80::77%{index}]:{}", world.port).parse()?;
        Ok(world
            .attack(NOBODY)
            .to(to)
            .option("--netns", &netns.file().display().to_string()))
    };
    for netns in [&home, &peer] {
        from(netns)?.reaches()?;
    }
    world.configure_one(&[format!("tcp://local:{}", world.port)], r#"["root"]"#)?;
    let _daemon = world.daemon_with(&mut home.command(&binary("enforcer")?))?;
    from(&home)?.is_refused()?;
    from(&peer)?.succeeds(Backend::current().is_nftables())
}
