//! Memory that the start leaves behind.

#![allow(unsafe_code, reason = "a function of the allocator's own")]

/// Gives freed memory back to the system: loading leaves megabytes behind that are never wanted again.
#[cfg(target_env = "gnu")]
pub(super) fn trim() {
    unsafe extern "C" {
        // It takes any number (man 3 malloc_trim).
        safe fn malloc_trim(pad: usize) -> std::ffi::c_int;
    }
    malloc_trim(0);
}

/// Other allocators see to it themselves.
#[cfg(not(target_env = "gnu"))]
pub(super) fn trim() {}
