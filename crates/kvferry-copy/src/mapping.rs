//! A shared mapping of a file, and copies into and out of it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use kvferry_core::Result;

use crate::range_of;

/// `bytes` of `file` from its start, readable, writable and shared with whoever maps it too.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping is plain memory that any thread may use; it is unmapped once, on drop.
unsafe impl Send for Mapping {}
// SAFETY: `read` and `write` only copy; that copies of several threads (or processes) may overlap is
// part of what a shared pool is, see `copy`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the file's first `bytes` (> 0), which may lie beyond its end: those must not be touched.
    pub(crate) fn new(file: &File, bytes: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh shared mapping of an open file at an address that the kernel chooses
        // touches no memory of ours.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, bytes })
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// `madvise` of a part; `false` when the kernel does not know the advice.
    pub(crate) fn advise(&self, offset: u64, bytes: usize, advice: i32) -> io::Result<bool> {
        let range = range_of(offset, bytes, self.bytes).map_err(io::Error::other)?;
        // SAFETY: the range lies within the mapping, and none of the advice used here (populate,
        // huge pages) changes what the memory holds.
        let code = unsafe {
            libc::madvise(self.as_ptr().wrapping_add(range.start).cast(), range.len(), advice)
        };
        match io::Error::last_os_error() {
            _ if code == 0 => Ok(true),
            error if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            error => Err(error),
        }
    }

    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let range = range_of(offset, into.len(), self.bytes)?;
        // SAFETY: the source is inside the mapping and the destination is a slice of the same length,
        // which cannot overlap memory that only this type hands out by copy. Another process may
        // write meanwhile: the bytes are then any mixture, which the layers above allow for (leases,
        // generations, checksums); they have no invalid values.
        unsafe {
            ptr::copy_nonoverlapping(
                self.as_ptr().wrapping_add(range.start),
                into.as_mut_ptr(),
                into.len(),
            );
        }
        Ok(())
    }

    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let range = range_of(offset, from.len(), self.bytes)?;
        // SAFETY: as for `read`, in the other direction.
        unsafe {
            ptr::copy_nonoverlapping(
                from.as_ptr(),
                self.as_ptr().wrapping_add(range.start),
                from.len(),
            );
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `bytes` are what mmap returned, and no reference into it outlives self.
        unsafe { libc::munmap(self.as_ptr().cast(), self.bytes) };
    }
}
