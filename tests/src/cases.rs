//! The cases, by what they are about.

pub mod decision;
pub mod dropin;
pub mod endurance;
pub mod faults;
pub mod grants;
pub mod input;
pub mod limits;
pub mod monit;
pub mod names;
pub mod neighbours;
pub mod nftables;
pub mod parity;
pub mod retention;
pub mod subjects;
pub mod surfaces;
pub mod sweep;
pub mod takeover;

use anyhow::Result;

/// A case: a name that cites the guarantee, and what it does.
pub type Case = (String, Box<dyn FnOnce() -> Result<()> + Send>);

/// All of them.
#[must_use]
pub fn all() -> Vec<Case> {
    [
        decision::cases(),
        dropin::cases(),
        endurance::cases(),
        faults::cases(),
        grants::cases(),
        input::cases(),
        limits::cases(),
        monit::cases(),
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

fn case(name: &str, run: impl FnOnce() -> Result<()> + Send + 'static) -> Case {
    (name.to_owned(), Box::new(run))
}
