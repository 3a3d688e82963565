//! Lets only chosen local users open connections to a host's sensitive endpoints.
//!
//! Ground floor first: a module imports only from those before it. Public is what the program, the suites and the
//! package's pages use.

mod text;
pub mod wire;

pub mod policy;
pub mod ruleset;

pub mod config;

pub mod bosh;
pub mod host;
mod resolve;

mod state;
mod visibility;

pub mod grants;
mod verify;

mod backend;
pub use backend::programs;
mod jobs;

mod inputs;

mod events;
mod status;
mod sweep;

mod control;
mod daemon;
mod doctor;

pub mod cli;

#[cfg(test)]
mod testing;
