//! Memory of this process alone, for a store that is embedded and shared with nobody.

use std::alloc::{Layout, alloc_zeroed, dealloc};
#[cfg(unix)]
use std::io;
#[cfg(unix)]
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use kvferry_core::cache::Memory;
use kvferry_core::{Error, ErrorCode, Result};

use crate::cuda::Pins;
use crate::range_of;

const PAGE: usize = 4096;

/// A zeroed region, aligned to 4096 bytes. The system gives pages on first touch.
#[derive(Debug)]
pub struct PrivateRegion {
    start: NonNull<u8>,
    bytes: usize,
    /// What was allocated: a page more than the region, which begins at a page within it.
    allocated: NonNull<u8>,
    layout: Layout,
    pins: Arc<Pins>,
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
        let bytes = usize::try_from(bytes).ok().filter(|bytes| *bytes > 0).ok_or_else(too_large)?;
        // Asked for a larger alignment, the system's allocator would zero, and so touch, every page.
        let size = bytes.checked_add(PAGE).ok_or_else(too_large)?;
        let layout = Layout::from_size_align(size, 1).map_err(|_| too_large())?;
        // SAFETY: the layout's size is not zero.
        let allocated = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(too_large)?;
        // SAFETY: the next page begins less than PAGE bytes on, and PAGE bytes more were allocated.
        let start = unsafe { allocated.add(allocated.align_offset(PAGE)) };
        Ok(Self { start, bytes, allocated, layout, pins: Arc::default() })
    }

    /// Where `bytes` at `offset` lie, while this region lives.
    pub(crate) fn place(&self, offset: u64, bytes: usize) -> Result<*mut u8> {
        let range = range_of(offset, bytes, self.bytes)?;
        Ok(self.start.as_ptr().wrapping_add(range.start))
    }

    /// Receives up to `bytes` from a socket to `offset`, without a copy in between, and says how many there were: 0 at
    /// the stream's end. Never waits.
    ///
    /// # Errors
    /// The range lies outside; what the system says, which is `WouldBlock` when nothing has arrived.
    #[cfg(unix)]
    pub fn receive(&self, socket: BorrowedFd<'_>, offset: u64, bytes: usize) -> io::Result<usize> {
        let start = self.place(offset, bytes).map_err(io::Error::other)?;
        // SAFETY: the bytes are inside the allocation, which lives as long as `self`; like a copy by `write`, the system's
        // does not overlap another in time.
        let received =
            unsafe { libc::recv(socket.as_raw_fd(), start.cast(), bytes, libc::MSG_DONTWAIT) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    pub(crate) fn pins(&self) -> &Arc<Pins> {
        &self.pins
    }
}

impl Memory for PrivateRegion {
    fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let range = range_of(offset, into.len(), self.bytes)?;
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
        let range = range_of(offset, from.len(), self.bytes)?;
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
        self.pins.release(); // while the pages are there
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.allocated.as_ptr(), self.layout) };
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
        assert_eq!(region.start.align_offset(PAGE), 0);
    }

    #[test]
    #[cfg(unix)]
    fn a_socket_s_bytes_come_to_their_place_and_nowhere_else() {
        use std::io::Write;
        use std::os::fd::AsFd;
        use std::os::unix::net::UnixStream;

        let region = PrivateRegion::new(4).unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        let receive = |at, bytes| region.receive(near.as_fd(), at, bytes).map_err(|e| e.kind());
        assert_eq!(receive(0, 4), Err(io::ErrorKind::WouldBlock), "it does not wait");
        far.write_all(b"kv cache").unwrap();
        assert_eq!(receive(1, 4), Err(io::ErrorKind::Other), "outside");
        assert_eq!(receive(1, 2), Ok(2));
        let mut four = [0; 4];
        region.read(0, &mut four).unwrap();
        assert_eq!(&four, b"\0kv\0");
        drop(far);
        assert_eq!((receive(0, 4), receive(0, 4), receive(0, 4)), (Ok(4), Ok(2), Ok(0)));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pages_that_were_not_touched_take_no_memory() {
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap() * PAGE
        };
        let before = resident();
        let region = PrivateRegion::new(1 << 28).unwrap();
        region.write(1 << 27, b"kv").unwrap();
        assert!(resident() < before + (1 << 26), "a quarter of the region at most");
    }
}
