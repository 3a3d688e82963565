//! The privileged suites: a `World` that cleans up after itself, attacks, and the cases run in it.

pub mod attack;
pub mod cases;
pub mod dns;
pub mod foreign;
pub mod world;
