//! Every developer task; `cargo xtask --help` lists them.
fn main() {}
