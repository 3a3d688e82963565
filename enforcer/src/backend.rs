//! What carries a rule set in the kernel. One so far: eBPF.

pub mod ebpf;

pub use ebpf::{BackendError, Kernel, Observed, ObservedTarget, Pinned};
