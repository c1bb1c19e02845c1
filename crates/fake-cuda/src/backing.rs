//! The bytes of an allocation: a memory file, so that another process can open the same ones. Its last page
//! says who has opened it, and whether it was freed.

use crate::abi::{bytes_of, size_of};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const PAGE: usize = 4096;
const OPENERS: usize = 64;

/// Filled in by the process that allocated, shared by all that opened.
#[repr(C)]
struct Notes {
    token: AtomicU64,
    freed: AtomicU32,
    openers: [AtomicU32; OPENERS],
}

pub(crate) struct Backing {
    file: File,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping belongs to the Backing alone; the notes in it are atomics.
unsafe impl Send for Backing {}
// SAFETY: as above; who writes elsewhere in it does so by a pointer of its own.
unsafe impl Sync for Backing {}

impl Backing {
    /// Fresh memory, filled so that it is not taken for zeroes. `token` names it.
    pub(crate) fn new(bytes: usize, token: u64) -> io::Result<Self> {
        // SAFETY: the name is a text that ends with NUL.
        let fd = unsafe { libc::memfd_create(c"fake-cuda".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(bytes_of(mapped(bytes)))?;
        let backing = Self::map(file, bytes)?;
        backing.fill();
        backing.notes().token.store(token, Ordering::SeqCst);
        Ok(backing)
    }

    fn fill(&self) {
        // SAFETY: the mapping is `bytes` long and nobody else has it yet.
        unsafe { std::ptr::write_bytes(self.start, 0xCD, self.bytes) };
    }

    /// What process `pid` has under descriptor `fd`, if it is the memory that `token` names.
    pub(crate) fn open(pid: u32, fd: u32, bytes: usize, token: u64) -> io::Result<Self> {
        let path = format!("/proc/{pid}/fd/{fd}");
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        if file.metadata()?.len() != bytes_of(mapped(bytes)) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let backing = Self::map(file, bytes)?;
        if backing.notes().token.load(Ordering::SeqCst) != token || backing.is_freed() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(backing)
    }

    fn map(file: File, bytes: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (length, fd) = (mapped(bytes), file.as_raw_fd());
        let null = std::ptr::null_mut();
        // SAFETY: the kernel chooses an address at which nothing is mapped.
        let start = unsafe { libc::mmap(null, length, protection, libc::MAP_SHARED, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { file, start: start.cast(), bytes })
    }

    fn notes(&self) -> &Notes {
        // SAFETY: the mapping has a page behind its data, which is longer than the notes.
        let at = unsafe { self.start.add(mapped(self.bytes) - PAGE) };
        // SAFETY: a page's start fits any alignment, and all of its bytes are valid atomics.
        unsafe { &*at.cast::<Notes>() }
    }

    pub(crate) fn fd(&self) -> u32 {
        u32::try_from(self.file.as_raw_fd()).unwrap_or_default()
    }

    /// The address of byte `offset`, which the caller has found to lie inside.
    pub(crate) fn at(&self, offset: u64) -> *mut u8 {
        self.start.wrapping_add(size_of(offset))
    }

    pub(crate) fn is_freed(&self) -> bool {
        self.notes().freed.load(Ordering::SeqCst) != 0
    }

    pub(crate) fn note_freed(&self) {
        self.notes().freed.store(1, Ordering::SeqCst);
    }

    pub(crate) fn note_opened(&self) {
        self.replace_opener(0, std::process::id());
    }

    pub(crate) fn note_closed(&self) {
        self.replace_opener(std::process::id(), 0);
    }

    fn replace_opener(&self, from: u32, to: u32) {
        let order = Ordering::SeqCst;
        self.notes()
            .openers
            .iter()
            .any(|slot| slot.compare_exchange(from, to, order, order).is_ok());
    }

    /// A process that has it open and lives.
    pub(crate) fn opener(&self) -> Option<u32> {
        let openers = self.notes().openers.iter();
        openers
            .map(|slot| slot.load(Ordering::SeqCst))
            .find(|&pid| pid != 0 && Process::open(pid).is_ok_and(|process| !process.has_ended()))
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // SAFETY: the mapping is this Backing's own, and nothing points into it any more.
        unsafe { libc::munmap(self.start.cast(), mapped(self.bytes)) };
    }
}

/// The data in whole pages, and the page of the notes.
fn mapped(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE) + PAGE
}

/// Another process, by a descriptor that tells its end even before its parent has waited for it.
pub(crate) struct Process {
    pub(crate) id: u32,
    descriptor: OwnedFd,
}

impl Process {
    pub(crate) fn open(id: u32) -> io::Result<Self> {
        // SAFETY: takes two numbers; it fails where there is no such process.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(id), 0) };
        let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0);
        let fd = fd.ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the descriptor is new and belongs to nobody else.
        let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { id, descriptor })
    }

    pub(crate) fn has_ended(&self) -> bool {
        let fd = self.descriptor.as_raw_fd();
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, which poll fills in.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        ready > 0
    }
}
