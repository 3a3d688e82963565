//! The shape of the nftables table: what `nft` shows of it, and changes of few addresses, which are made in place.

use anyhow::{Context as _, Result, ensure};

use super::{
    Case,
    nftables::{Guarded, hammered},
};
use crate::{
    backend::NFTABLES,
    world::{NOBODY, World},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(nft_lists_all_of_the_table).on(NFTABLES),
        case!(p8_few_addresses_change_in_place).on(NFTABLES),
        case!(f2_no_wrong_verdict_while_addresses_change_in_place).on(NFTABLES),
    ]
}

fn list(guarded: &Guarded, world: &World) -> Result<String> {
    guarded.netns.nft(&format!("list table inet {}", world.name()))
}

/// Some of everything that a rule set may have: old nft ends where it is to list what it does not expect.
fn nft_lists_all_of_the_table() -> Result<()> {
    let guarded = Guarded::new()?;
    let world = &guarded.world;
    world.configure(
        r#"
backend = "nftables"
nat64 = ["2001:db8:64::/96"]
[target.a]
endpoints = ["tcp://10.0.0.5:4222", "tcp://10.0.0.6:4222", "udp://10.0.0.6:53", "tcp://[2001:db8::5]:4222",
    "tcp://127.0.0.1:2822"]
allow = ["root"]
[target.b]
endpoints = ["tcp://10.8.0.0/16:6443", "tcp://10.0.0.5:4222", "udp://[2001:db8:1::/48]:443", "tcp://10.8.1.1:6443"]
allow = ["root", 999, { kernel = true }]
"#,
    )?;
    guarded.apply()?;
    let text = list(&guarded, world)?;
    for line in [
        "meta l4proto . th dport vmap @services_",
        "tcp . 4222 : jump service_tcp_4222_",
        "elements = { 10.0.0.6 }",
        "elements = { 10.8.0.0/16 }",
        "elements = { 2001:db8:1::/48 }",
        "ip daddr @hosts4_tcp_4222_",
        "ip6 daddr @hosts6_tcp_4222_",
        "goto refuse_b_",
    ] {
        ensure!(text.contains(line), "no {line:?} in {text}");
    }
    Ok(())
}

/// The slot, which stays, and the comment with the generation, which does not.
fn state(text: &str) -> Result<(char, String)> {
    let slot = if text.contains("chain judge_a") { 'a' } else { 'b' };
    let comment = text.lines().find(|line| line.contains("enforcer table 1 generation"));
    Ok((slot, comment.context("no comment")?.to_owned()))
}

fn p8_few_addresses_change_in_place() -> Result<()> {
    let guarded = Guarded::new()?;
    let world = &guarded.world;
    let (here, port) = (format!("tcp://{}", world.here()), world.port);
    let other = |last: u8| format!("tcp://10.9.0.{last}:{port}");
    let change = |endpoints: &[String]| -> Result<(char, String)> {
        guarded.configure("nftables", endpoints, r#"["root"]"#)?;
        guarded.apply()?;
        guarded.netns.enforcer(world, &["verify"])?.demand(0)?;
        state(&list(&guarded, world)?)
    };
    let (slot, first) = change(&[other(1), other(2)])?;
    guarded.attack(NOBODY)?.reaches()?;
    let (same, second) = change(&[other(1), other(2), other(3)])?;
    ensure!(same == slot && first != second, "{first} {second}");
    let text = list(&guarded, world)?;
    ensure!(text.contains("10.9.0.3"), "{text}");
    let (same, _) = change(&[other(2)])?;
    ensure!(same == slot, "not in place");
    let text = list(&guarded, world)?;
    ensure!(!text.contains("10.9.0.1") && !text.contains("10.9.0.3"), "{text}");
    // A loopback address changes where packets enter; from then on others come beside it.
    let (moved, _) = change(&[other(2), here.clone()])?;
    ensure!(moved != slot, "in place");
    guarded.attack(NOBODY)?.is_reset()?;
    guarded.attack(0)?.reaches()?;
    let (same, _) = change(&[other(2), other(4), here])?;
    ensure!(same == moved, "not in place");
    guarded.attack(NOBODY)?.is_reset()?;
    let (same, _) = change(&[other(2), other(4)])?;
    ensure!(same != moved, "in place");
    guarded.attack(NOBODY)?.reaches()
}

fn f2_no_wrong_verdict_while_addresses_change_in_place() -> Result<()> {
    const RULE_SETS: u16 = 500;
    const ATTEMPTS: u64 = 10 * RULE_SETS as u64;
    let guarded = Guarded::new()?;
    let (here, port) = (format!("tcp://{}", guarded.world.here()), guarded.world.port);
    let configure = |round: u16| {
        let others = (0..round % 7).map(|last| format!("tcp://10.{}.0.{last}:{port}", round & 127));
        let endpoints: Vec<String> = others.chain([here.clone()]).collect();
        guarded.configure("nftables", &endpoints, r#"["root"]"#)
    };
    configure(0)?;
    guarded.apply()?;
    let daemon = guarded.daemon()?;
    let (slot, _) = state(&list(&guarded, &guarded.world)?)?;
    hammered(&guarded, ATTEMPTS, || {
        for round in 1..=RULE_SETS {
            configure(round)?;
            daemon.reload()?;
        }
        Ok(())
    })?;
    let (same, comment) = state(&list(&guarded, &guarded.world)?)?;
    ensure!(same == slot, "not in place: {comment}");
    Ok(())
}
