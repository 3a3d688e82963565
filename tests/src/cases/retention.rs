//! N4, N6, N7: what is kept of names, for how long, how many, and over restarts; and answers too large for UDP.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr},
};

use anyhow::{Result, ensure};

use super::{
    Case,
    names::{Named, addresses},
};
use crate::{dns::Zone, world::until};

/// Most addresses of a name (N4).
const ADDRESSES: usize = 256;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(n4_an_address_is_let_go_after_retain),
        case!(n4_at_most_256_addresses),
        case!(n1_an_answer_too_large_for_udp),
        case!(n6_the_hosts_file_may_name_this_host),
        case!(n7_f4_names_are_protected_at_boot_without_dns),
        case!(n7_f6_a_state_that_others_could_write_is_not_believed),
        case!(n7_a_damaged_state_stops_nobody),
    ]
}

fn many(count: u32) -> Vec<IpAddr> {
    (0..count)
        .map(|host| Ipv4Addr::from(0x0a09_0000 + host).into())
        .collect()
}

fn n4_an_address_is_let_go_after_retain() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    let toml = named.world.path("enforcer.toml");
    let text = fs::read_to_string(&toml)?;
    fs::write(&toml, text.replace("[dns]", "[dns]\nretain = \"3s\""))?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    let _daemon = named.daemon()?;
    named.dns.set("bus.test", addresses(&["10.9.0.2"]));
    named.world.enforcer(&["refresh"])?.demand(0)?;
    ensure!(named.denied("10.9.0.1")? && named.denied("10.9.0.2")?, "not retained");
    until("the old address is let go", || Ok(!named.denied("10.9.0.1")?))?;
    ensure!(named.denied("10.9.0.2")?, "the present address was let go");
    // A failing name keeps what it has for ever (N3).
    named.dns.set("bus.test", Zone::Silence);
    std::thread::sleep(std::time::Duration::from_secs(5));
    ensure!(named.denied("10.9.0.2")?, "a failing name lost its address");
    Ok(())
}

fn n4_at_most_256_addresses() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", Zone::Addresses(many(300)));
    let daemon = named.daemon()?;
    let name = named.name("bus.test")?;
    let kept = name["addresses"].as_array().map_or(0, Vec::len);
    ensure!(kept == ADDRESSES, "{kept} addresses");
    ensure!(
        daemon.log().contains("WARN") && daemon.log().contains(&ADDRESSES.to_string()),
        "{}",
        daemon.log()
    );
    Ok(())
}

fn n1_an_answer_too_large_for_udp() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", Zone::Addresses(many(200)));
    let _daemon = named.daemon()?;
    ensure!(
        named.denied("10.9.0.0")? && named.denied("10.9.0.199")?,
        "{}",
        named.name("bus.test")?
    );
    ensure!(
        named.dns.over_tcp(),
        "the whole answer came over UDP: this proves nothing"
    );
    Ok(())
}

fn n6_the_hosts_file_may_name_this_host() -> Result<()> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    let here = named.world.address();
    fs::write(
        named.world.path("hosts"),
        format!("{here} bus.test\n169.254.169.254 bus.test\n::1 bus.test\n"),
    )?;
    named.world.attack(crate::world::NOBODY).reaches()?;
    let _daemon = named.daemon()?;
    named.world.attack(crate::world::NOBODY).is_refused()?;
    for address in ["169.254.169.254", "::1"] {
        ensure!(named.denied(address)?, "{address} is open");
    }
    // As the C library does, the file is believed and DNS not asked.
    ensure!(!named.denied("10.9.0.1")?, "DNS was asked too");
    let mut text = String::new();
    for address in many(300) {
        writeln!(text, "{address} bus.test")?;
    }
    fs::write(named.world.path("hosts"), text)?;
    // N4: what is cut is no secret.
    let cut = named.world.enforcer(&["refresh"])?.demand(1)?.stdout;
    ensure!(
        cut.contains("more addresses than the maximum of 256: 44 are not protected"),
        "{cut}"
    );
    let kept = named.name("bus.test")?["addresses"].as_array().map_or(0, Vec::len);
    // Besides these, the three before are retained.
    // With ::1 the file names 127.0.0.1 too, as glibc reads it.
    ensure!(kept == ADDRESSES + 4, "{kept} addresses");
    Ok(())
}

/// A daemon has known an address, then everything of ours left the kernel, as by a reboot.
fn rebooted() -> Result<Named> {
    let named = Named::new(&["bus.test"], "")?;
    named.dns.set("bus.test", addresses(&["10.9.0.1"]));
    let daemon = named.daemon()?;
    named.world.enforcer(&["unload"])?.demand(0)?;
    drop(daemon);
    ensure!(named.world.enforcer(&["status"])?.code == 1, "unload left something");
    named.dns.set("bus.test", Zone::Silence);
    Ok(named)
}

fn n7_f4_names_are_protected_at_boot_without_dns() -> Result<()> {
    let named = rebooted()?;
    let _daemon = named.daemon()?;
    ensure!(named.denied("10.9.0.1")?, "the address is open until DNS answers");
    let name = named.name("bus.test")?;
    ensure!(name["stale"] == true, "{name}");
    Ok(())
}

fn n7_f6_a_state_that_others_could_write_is_not_believed() -> Result<()> {
    let named = rebooted()?;
    let state = named.world.path("state");
    fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let daemon = named.daemon()?;
    ensure!(
        !named.denied("10.9.0.1")?,
        "a state that anybody could write was believed"
    );
    ensure!(
        daemon.log().contains(&state.display().to_string()),
        "nothing of it was said: {}",
        daemon.log()
    );
    Ok(())
}

fn n7_a_damaged_state_stops_nobody() -> Result<()> {
    let named = rebooted()?;
    for entry in fs::read_dir(named.world.path("state"))? {
        let path = entry?.path();
        let text = fs::read(&path)?;
        fs::write(&path, text.get(..text.len() / 2).unwrap_or_default())?;
    }
    named.dns.set("bus.test", addresses(&["10.9.0.2"]));
    let daemon = named.daemon()?;
    ensure!(named.denied("10.9.0.2")?, "the address is open");
    ensure!(daemon.log().contains("damaged"), "{}", daemon.log());
    Ok(())
}
