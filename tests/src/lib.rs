//! The privileged suites: a `World` that cleans up after itself, attacks, and the cases run in it.

#![allow(
    clippy::indexing_slicing,
    reason = "a JSON value indexed by a key it lacks is null, not a panic"
)]

pub mod attack;
pub mod backend;
pub mod bench;
pub mod cases;
pub mod dns;
pub mod foreign;
pub mod guest;
pub mod kernel;
pub mod machine;
pub mod net_cls;
pub mod record;
pub mod world;
