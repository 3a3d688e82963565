//! Lets only chosen local users open connections to a host's sensitive endpoints.
//!
//! In reading order: what is asked for, what it means, what it resolves to, the rules, the kernel, what is seen, the loop.

mod text;
pub mod wire;

pub mod bosh;
pub mod config;
pub mod policy;

pub mod host;
pub mod resolve;
pub mod state;
pub mod visibility;

pub mod ruleset;

pub mod backend;

pub mod events;
pub mod status;
pub mod sweep;
pub mod verify;

pub mod grants;
pub mod jobs;

pub mod inputs;

pub mod control;
pub mod daemon;

pub mod doctor;

pub mod cli;
