//! Objects that libnftnl allocates.

#![allow(unsafe_code, reason = "libnftnl has C's ways of giving memory back")]

use std::ptr::NonNull;

/// An object of libnftnl's: freed, unless another object of libnftnl's has taken it over.
pub(super) struct Owned<T> {
    object: NonNull<T>,
    free: unsafe fn(*mut T),
}

impl<T> Owned<T> {
    /// Takes what libnftnl has allocated.
    ///
    /// # Safety
    ///
    /// `object` must be null, or live, nobody else's, and what `free` takes.
    pub(super) unsafe fn new(object: *mut T, free: unsafe fn(*mut T)) -> Self {
        // As the nftnl crate does: nothing can be done without memory for a few bytes.
        let object = NonNull::new(object).unwrap_or_else(|| std::process::abort());
        Self { object, free }
    }

    pub(super) fn as_ptr(&self) -> *mut T {
        self.object.as_ptr()
    }

    /// For what takes it over.
    pub(super) fn into_raw(self) -> NonNull<T> {
        let object = self.object;
        std::mem::forget(self);
        object
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: as promised to `new`, and nothing has taken it over.
        unsafe { (self.free)(self.object.as_ptr()) };
    }
}
