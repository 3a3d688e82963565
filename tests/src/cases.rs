//! The cases, by what they are about.

pub mod decision;
pub mod endurance;
pub mod faults;
pub mod input;
pub mod kernel;
pub mod limits;
pub mod names;
pub mod neighbours;
pub mod nftables;
pub mod parity;
pub mod retention;
pub mod subjects;
pub mod surfaces;
pub mod sweep;
pub mod takeover;

use anyhow::{Result, ensure};

/// A case: a name that cites the guarantee, and what it does.
pub type Case = (String, Box<dyn FnOnce() -> Result<()> + Send>);

/// All of them.
#[must_use]
pub fn all() -> Vec<Case> {
    [
        decision::cases(),
        endurance::cases(),
        faults::cases(),
        input::cases(),
        kernel::cases(),
        limits::cases(),
        names::cases(),
        neighbours::cases(),
        nftables::cases(),
        parity::cases(),
        retention::cases(),
        subjects::cases(),
        surfaces::cases(),
        sweep::cases(),
        takeover::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Of all cases those that some pattern names: a name, or the beginning of one and `*`. A pattern that names none is an error.
pub fn chosen(patterns: &str) -> Result<Vec<Case>> {
    let patterns: Vec<&str> = patterns.split(',').filter(|pattern| !pattern.is_empty()).collect();
    let names = |pattern: &str, name: &str| match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == pattern,
    };
    let all = all();
    for pattern in &patterns {
        ensure!(
            all.iter().any(|(name, _)| names(pattern, name)),
            "no case is named {pattern}"
        );
    }
    let is_chosen = |name: &str| patterns.is_empty() || patterns.iter().any(|pattern| names(pattern, name));
    Ok(all.into_iter().filter(|(name, _)| is_chosen(name)).collect())
}

fn case(name: &str, run: impl FnOnce() -> Result<()> + Send + 'static) -> Case {
    (name.to_owned(), Box::new(run))
}
