//! Builds the kernel programs.
#![allow(unsafe_code, reason = "setting a variable before any thread starts")]
fn main() {
    // SAFETY: single-threaded
    unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../enforcer-ebpf");
    aya_build::build_ebpf([aya_build::Package{name:"enforcer-ebpf", root_dir: root, no_default_features:false, features:&["kernel"]}], aya_build::Toolchain::Custom("debian")).unwrap();
}
