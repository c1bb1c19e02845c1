//! Memory of this process alone, for a store that is embedded and shared with nobody.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::{self, NonNull};

use kvferry_core::cache::Memory;
use kvferry_core::{Error, ErrorCode, Result};

use crate::range_of;

/// A zeroed region, aligned to 4096 bytes. The system gives pages on first touch.
#[derive(Debug)]
pub struct PrivateRegion {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory that any thread may use; freed once, on drop.
unsafe impl Send for PrivateRegion {}
// SAFETY: `read` and `write` only copy. The store grants a slot to one writer, and to readers only
// after commit, so copies of the same bytes do not overlap in time.
unsafe impl Sync for PrivateRegion {}

impl PrivateRegion {
    /// Allocates `bytes` (> 0).
    pub fn new(bytes: u64) -> Result<Self> {
        let too_large = || {
            Error::new(
                ErrorCode::PoolTooLarge,
                format!("this process cannot have {bytes} bytes of memory; give the pool fewer"),
            )
        };
        let size = usize::try_from(bytes).ok().filter(|size| *size > 0).ok_or_else(too_large)?;
        let layout = Layout::from_size_align(size, 4096).map_err(|_| too_large())?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(too_large)?;
        Ok(Self { start, layout })
    }
}

impl Memory for PrivateRegion {
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let range = range_of(offset, into.len(), self.layout.size())?;
        // SAFETY: the source is inside the allocation; the slice is other memory of the same length.
        unsafe {
            ptr::copy_nonoverlapping(
                self.start.as_ptr().wrapping_add(range.start),
                into.as_mut_ptr(),
                into.len(),
            );
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let range = range_of(offset, from.len(), self.layout.size())?;
        // SAFETY: the destination is inside the allocation; the slice is other memory.
        unsafe {
            ptr::copy_nonoverlapping(
                from.as_ptr(),
                self.start.as_ptr().wrapping_add(range.start),
                from.len(),
            );
        }
        Ok(())
    }
}

impl Drop for PrivateRegion {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_nothing_outside() {
        let region = PrivateRegion::new(8192).unwrap();
        region.write(4096, b"kv").unwrap();
        let mut two = [0; 2];
        region.read(4096, &mut two).unwrap();
        assert_eq!(&two, b"kv");
        assert!(region.read(8191, &mut two).is_err());
        assert!(region.write(u64::MAX, &two).is_err());
        assert!(PrivateRegion::new(0).is_err());
    }
}
