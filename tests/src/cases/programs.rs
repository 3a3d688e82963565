//! The path of a denied task's program, as events show it: by the kernel's own record, whatever the task calls itself.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Case;
use crate::{
    backend::EBPF,
    kernel::{Feature, lacks},
    world::{NOBODY, World, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![case!(events_show_the_path_of_the_program).on(EBPF)]
}

/// Runs a copy of the attack binary at a place below a file system of its own, which only the attack sees.
fn attack_from(world: &World, place: &Path) -> Result<()> {
    let mount = world.path("elsewhere");
    fs::create_dir_all(&mount)?;
    let path = mount.join(place);
    let script = format!(
        "mount -t tmpfs tmpfs '{}' && mkdir -p '{}' && cp \"$0\" '{2}' && exec -a curl '{2}' \"$@\"",
        mount.display(),
        path.parent().unwrap_or(&mount).display(),
        path.display(),
    );
    let program = crate::world::binary("attack")?;
    let attack = world
        .attack(NOBODY)
        .program(&["unshare", "--mount", "bash", "-c", &script], program);
    ensure!(attack.run()?.errno.is_some(), "{} is let through", place.display());
    Ok(())
}

/// Whether this kernel lets a program of this type look at the task by its type (Linux 5.15).
fn shows_tasks() -> Result<bool> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    let (major, minor) = (numbers.next().context("major")??, numbers.next().context("minor")??);
    Ok((major, minor) >= (5, 15) && !lacks(Feature::Btf))
}

/// Short and long names, deep and shallow places, and characters that steer a terminal.
fn events_show_the_path_of_the_program() -> Result<()> {
    let world = World::new()?;
    let _listener = world.listen()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    let _daemon = world.daemon()?;
    let (n31, n32, n40, n41) = ("a".repeat(31), "b".repeat(32), "c".repeat(40), "d".repeat(41));
    // What does not lie in the directory's entry itself, with room for 31 bytes at least, is read if that is allowed.
    let read = |name: &str| match name.get(..40) {
        _ if lacks(Feature::KernelReads) => "…".to_owned(),
        Some(start) if start != name => format!("{start}…"),
        Some(_) | None => name.to_owned(),
    };
    let cases = [
        ("top".to_owned(), "/top".to_owned()),
        (format!("bin/{n31}"), format!("/bin/{n31}")),
        (format!("bin/{n32}"), format!("/bin/{}", read(&n32))),
        (format!("{n40}/x"), format!("/{}/x", read(&n40))),
        (format!("{n41}/x"), format!("/{}/x", read(&n41))),
        ("1/2/3/4/5/6/7/8".to_owned(), "/1/2/3/4/5/6/7/8".to_owned()),
        ("1/2/3/4/5/6/7/8/9".to_owned(), "…/2/3/4/5/6/7/8/9".to_owned()),
        ("a b/\u{1b}[2J".to_owned(), "/a b/\u{1b}[2J".to_owned()),
    ];
    for (place, _) in &cases {
        attack_from(&world, Path::new(place))?;
    }
    let events = || -> Result<Vec<Value>> {
        let ran = world.enforcer(&["events", "--json"])?.demand(0)?;
        ran.stdout.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    };
    until("all are told", || Ok(events()?.len() == cases.len()))?;
    let shows = shows_tasks()?;
    for (event, (place, path)) in events()?.iter().zip(&cases) {
        let want = if shows { Value::from(path.as_str()) } else { Value::Null };
        ensure!(event["exe"] == want, "{place}: {event}");
    }
    // A name of its own choice does not hide the program, on any surface, and steers no terminal.
    if shows {
        for words in [&["events"][..], &["events", "--summary"]] {
            let text = world.enforcer(words)?.demand(0)?.stdout;
            ensure!(text.contains("/1/2/3/4/5/6/7/8"), "{words:?}: {text}");
            ensure!(
                text.contains("\\u{1b}[2J") && !text.contains('\u{1b}'),
                "{words:?}: {text}"
            );
        }
    }
    Ok(())
}
