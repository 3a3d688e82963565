//! The cases, by what they are about.

pub mod decision;
pub mod doctor;
pub mod endurance;
pub mod faults;
pub mod input;
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
pub mod verify;

use anyhow::Result;

/// A case: a name that cites the guarantee, and what it does.
pub type Case = (String, Box<dyn FnOnce() -> Result<()> + Send>);

/// All of them.
#[must_use]
pub fn all() -> Vec<Case> {
    [
        decision::cases(),
        doctor::cases(),
        endurance::cases(),
        faults::cases(),
        input::cases(),
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
        verify::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn case(name: &str, run: impl FnOnce() -> Result<()> + Send + 'static) -> Case {
    (name.to_owned(), Box::new(run))
}
