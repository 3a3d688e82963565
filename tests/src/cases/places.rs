//! Where an instance is: places that a configuration gives up, that are none, or that another one has.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Case;
use crate::{
    backend::EBPF,
    world::{NOBODY, World},
};

pub(super) fn cases() -> Vec<Case> {
    vec![case!(doctor_finds_rules_that_earlier_places_have_kept).on(EBPF)]
}

/// A pin directory besides the world's own; gone with it.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn finding(world: &World, id: &str) -> Result<Option<Value>> {
    let report: Value = serde_json::from_str(&world.enforcer(&["doctor", "--json"])?.stdout)?;
    let mut findings = report["findings"].as_array().context("no findings")?.iter();
    Ok(findings.find(|finding| finding["id"] == id).cloned())
}

fn edit(world: &World, from: &str, to: &str) -> Result<()> {
    let file = world.path("enforcer.toml");
    let text = fs::read_to_string(&file)?;
    ensure!(text.contains(from), "no {from} in {text}");
    Ok(fs::write(&file, text.replace(from, to))?)
}

fn doctor_finds_rules_that_earlier_places_have_kept() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    let misses = |ids: &[&str]| {
        ids.iter().try_for_each(|id| {
            let found = finding(&world, id)?;
            ensure!(found.is_none(), "{found:?}");
            Ok(())
        })
    };
    let daemon = world.daemon()?;
    misses(&["other-instance"])?;
    daemon.kill()?;
    // Nothing at the new places says where the old ones are, whose rules go on to deny.
    let old = world.pins().display().to_string();
    let new = Pins(format!("{old}_new").into());
    edit(
        &world,
        &format!("{old:?}"),
        &format!("{:?}", new.0.display().to_string()),
    )?;
    edit(&world, "/state\"", "/new_state\"")?;
    edit(&world, r#"["root"]"#, r#"["root", "nobody"]"#)?;
    let daemon = world.daemon()?;
    world.attack(NOBODY).is_refused()?;
    misses(&["program-before", "program-after", "restart-needed"])?;
    let found = finding(&world, "other-instance")?.context("it finds nothing")?;
    let remedy = format!("rm -r {old}");
    ensure!(
        found["items"].to_string().contains(&format!("pins in {old}: connect4"))
            && found["do"].to_string().contains(&remedy),
        "{found}"
    );
    // Beside it, with a daemon of its own, another instance is nothing to be removed.
    let other = World::new()?;
    other.configure_on(
        &world.cgroup,
        &format!(
            "[target.other]\nendpoints = [\"tcp://{}\"]\nallow = [\"root\"]\n",
            other.here()
        ),
    )?;
    let others = other.daemon()?;
    let found = finding(&world, "other-instance")?.context("it finds nothing")?;
    let pins = other.pins().display().to_string();
    ensure!(!found.to_string().contains(&pins), "{found}");
    others.kill()?;
    let found = finding(&world, "other-instance")?.context("it finds nothing")?;
    ensure!(found.to_string().contains(&pins), "{found}");
    other.enforcer(&["unload"])?.demand(0)?;
    // As it says.
    fs::remove_dir_all(&old)?;
    world.attack(NOBODY).reaches()?;
    misses(&["other-instance"])?;
    daemon.kill()
}
