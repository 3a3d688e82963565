//! What survives a change of the backend by reload: denials are reported, and numbers of rule sets grow.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{Case, nftables::Guarded};
use crate::{
    backend::WITH_BPF,
    kernel::EBPF_NEEDS,
    world::{NOBODY, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f9_denials_are_reported_after_each_change_of_the_backend)
            .on(WITH_BPF)
            .needs(EBPF_NEEDS),
    ]
}

fn f9_denials_are_reported_after_each_change_of_the_backend() -> Result<()> {
    let guarded = Guarded::new()?;
    guarded.attack(NOBODY)?.reaches()?;
    guarded.guard("ebpf")?;
    let daemon = guarded.daemon()?;
    let mut last = 0;
    let (here, elsewhere) = (format!("tcp://{}", guarded.world.here()), "tcp://10.9.0.1:1".to_owned());
    let backends = [
        "nftables", "ebpf", "nftables", "both", "nftables", "both", "ebpf", "both",
    ];
    for (backend, count) in backends.into_iter().zip([1, 2].into_iter().cycle()) {
        // Other rules each time.
        let endpoints = [here.clone(), elsewhere.clone()].into_iter().take(count);
        guarded.configure(backend, &endpoints.collect::<Vec<_>>(), r#"["root"]"#)?;
        daemon.reload()?;
        let status = guarded.status()?;
        let generation = status["generation"].as_u64().unwrap_or_default();
        ensure!(
            status["backend"] == backend && status["state"] == "enforcing" && generation > last,
            "after generation {last}: {status}"
        );
        ensure!(status["conditions"].as_array().is_some_and(Vec::is_empty), "{status}");
        last = generation;
        let sees = if backend == "nftables" { "nftables" } else { "ebpf" };
        match backend {
            "nftables" => guarded.attack(NOBODY)?.is_reset()?,
            _ => guarded.attack(NOBODY)?.is_forbidden()?,
        }
        until(&format!("the denial on {backend} is reported"), || {
            let events = guarded
                .netns
                .enforcer(&guarded.world, &["events", "--json"])?
                .demand(0)?;
            let mut events = events.stdout.lines().map(serde_json::from_str::<Value>);
            let is_it = |event: &Value| event["generation"] == generation && event["backend"] == sees;
            Ok(events.any(|event| event.is_ok_and(|event| is_it(&event))))
        })?;
    }
    Ok(())
}
