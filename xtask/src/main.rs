//! `cargo xtask`, which is built on any system to say where its tasks run.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    xtask::run()
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!(
        "xtask: error: enforcer guards Linux hosts only, by BPF or nf_tables; this is {}: use a Linux host or a \
         virtual machine",
        std::env::consts::OS
    );
    ExitCode::from(2)
}
