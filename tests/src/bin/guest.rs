//! The first process of a virtual machine.

fn main() -> std::process::ExitCode {
    tests::guest::main()
}
