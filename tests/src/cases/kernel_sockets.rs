//! D3 with nftables: sockets that the kernel makes. Neither its own nor those that it makes for a user have a file, by
//! which a packet would have a user.

use std::{net::SocketAddr, path::Path, thread, time::Duration};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{Case, subjects::serve_mptcp};
use crate::{
    attack::Way,
    backend::NFTABLES,
    kernel::Feature,
    world::{Attack, Daemon, NOBODY, Netns, World, binary, cgroup_mount, ran},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(d3_a_kernel_socket_made_for_a_user_is_not_the_kernels)
            .on(NFTABLES)
            .needs(&[Feature::Cgroup2, Feature::SocketCgroup, Feature::Mptcp]),
    ]
}

/// A server that announces an endpoint to an MPTCP client, whose kernel dials it by a socket without a file.
struct Announced {
    world: World,
    home: Netns,
    server: Netns,
}

impl Announced {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let (home, server) = (Netns::new(&world, "home")?, Netns::new(&world, "server")?);
        home.join(&["10.81.0.1/24"], &server, &["10.81.0.2/24", "10.81.0.3/24"])?;
        for netns in [&home, &server] {
            let limits = ["limits", "set", "subflows", "4", "add_addr_accepted", "4"];
            ran(netns.command(Path::new("ip")).arg("mptcp").args(limits))?.demand(0)?;
        }
        let announce = ["endpoint", "add", "10.81.0.3", "dev", "veth0", "signal"];
        ran(server.command(Path::new("ip")).arg("mptcp").args(announce))?.demand(0)?;
        Ok(Self { world, home, server })
    }

    fn daemon(&self, allow: &str) -> Result<Daemon> {
        let endpoint = format!("tcp://10.81.0.3:{}", self.world.port);
        self.world.configure_one(&[endpoint], allow)?;
        self.world.daemon_with(&mut self.home.command(&binary("enforcer")?))
    }

    fn attack(&self) -> Result<Attack> {
        let dialled = SocketAddr::new("10.81.0.2".parse()?, self.world.port);
        let attack = self.world.attack(NOBODY).way(Way::Mptcp).to(dialled);
        Ok(attack.option("--netns", &self.home.file().display().to_string()))
    }

    /// What became of the announced endpoint: how often it was allowed, and denied.
    fn dialled(&self, attack: &Attack) -> Result<(u64, u64)> {
        let served = serve_mptcp(&self.server, self.world.port)?;
        attack.reaches()?;
        served.join().map_err(|_| anyhow::anyhow!("the server panicked"))?;
        thread::sleep(Duration::from_millis(100));
        let shown = self.home.enforcer(&self.world, &["status", "--json"])?.stdout;
        let status: Value = serde_json::from_str(&shown)?;
        let count = |what: &str| status["targets"][0][what].as_u64().unwrap_or_default();
        Ok((count("allowed"), count("denied")))
    }
}

fn d3_a_kernel_socket_made_for_a_user_is_not_the_kernels() -> Result<()> {
    let announced = Announced::new()?;
    let below = announced.attack()?;
    let in_root = announced.attack()?.in_cgroup(&cgroup_mount()?);
    let daemon = announced.daemon("[{ kernel = true }]")?;
    let (allowed, denied) = announced.dialled(&below)?;
    ensure!(
        allowed == 0 && denied > 0,
        "made for a user: {allowed} allowed, {denied} denied"
    );
    // As the kernel's own: by the root cgroup. Whoever is in it cannot be told from the kernel.
    let (allowed, _) = announced.dialled(&in_root)?;
    ensure!(allowed > 0, "nothing is taken for the kernel's own");
    drop(daemon);
    let _daemon = announced.daemon(r#"["root"]"#)?;
    let (before, _) = (allowed, denied);
    let (allowed, _) = announced.dialled(&in_root)?;
    ensure!(allowed == before, "the kernel's own is taken for root's");
    announced
        .home
        .enforcer(&announced.world, &["unload"])?
        .demand(0)
        .map(drop)
}
