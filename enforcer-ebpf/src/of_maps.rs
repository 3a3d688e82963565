//! Arrays of maps, which aya's programs have not.

use core::{cell::UnsafeCell, ffi::c_void, ptr::NonNull};

use aya_ebpf::{
    bindings::{bpf_map_def, bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS},
    helpers::generated::bpf_map_lookup_elem,
};

/// `LIBBPF_PIN_BY_NAME`.
const PIN_BY_NAME: u32 = 1;

/// An array whose elements are maps. The loader says what they are like.
#[repr(transparent)]
pub(crate) struct ArrayOfMaps(UnsafeCell<bpf_map_def>);

// SAFETY: the kernel takes care of it.
unsafe impl Sync for ArrayOfMaps {}

/// One of them.
#[derive(Clone, Copy)]
pub(crate) struct Inner(NonNull<c_void>);

impl ArrayOfMaps {
    pub(crate) const fn pinned(max_entries: u32) -> Self {
        Self(UnsafeCell::new(bpf_map_def {
            type_: BPF_MAP_TYPE_ARRAY_OF_MAPS,
            key_size: 4,
            value_size: 4,
            max_entries,
            map_flags: 0,
            id: 0,
            pinning: PIN_BY_NAME,
        }))
    }

    #[inline(always)]
    pub(crate) fn get(&self, index: u32) -> Option<Inner> {
        // SAFETY: the helper takes a map and one of its keys.
        NonNull::new(unsafe { bpf_map_lookup_elem(self.0.get().cast(), (&raw const index).cast()) }).map(Inner)
    }
}

impl Inner {
    /// An element.
    ///
    /// # Safety
    ///
    /// The map has such keys and values.
    #[inline(always)]
    pub(crate) unsafe fn get<'a, K, V>(self, key: &K) -> Option<&'a V> {
        // SAFETY: as the caller says.
        unsafe {
            bpf_map_lookup_elem(self.0.as_ptr(), (&raw const *key).cast())
                .cast::<V>()
                .as_ref()
        }
    }
}
