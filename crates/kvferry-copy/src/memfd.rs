//! A file that lives in memory only: how state enters and leaves engines that know nothing but files.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::slice;

use kvferry_core::cache::FileBuffer;
use kvferry_core::{Error, Result};

use crate::mapping::Mapping;

/// An anonymous file in memory with a mapping of it; both are kept and reused, since making them anew
/// costs more than filling them.
#[derive(Debug)]
pub struct MemFd {
    file: File,
    mapping: Option<Mapping>,
}

impl MemFd {
    /// An empty file; `name` shows in /proc only.
    pub fn new(name: &CStr) -> Result<Self> {
        // SAFETY: `name` is a valid C string for the duration of the call.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(Error::system(
                "cannot create a file in memory",
                &io::Error::last_os_error(),
            ));
        }
        // SAFETY: the descriptor was just made, and nobody else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self { file, mapping: None })
    }

    /// A path that opens this file, within this process and while it lives.
    pub fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    /// What someone wrote through [`Self::path`]: the whole file as it is now.
    pub fn contents(&mut self) -> Result<&[u8]> {
        let bytes = self
            .file
            .metadata()
            .map_err(|error| Error::system("cannot size a file in memory", &error))?;
        let bytes = usize::try_from(bytes.len()).unwrap_or(usize::MAX);
        self.map(bytes)?;
        let Some(mapping) = &self.mapping else { return Ok(&[]) };
        // SAFETY: as for `resize`, for reading.
        Ok(unsafe { slice::from_raw_parts(mapping.as_ptr(), bytes) })
    }

    /// Maps at least `bytes`. A mapping may be longer than the file: only the file's part is touched.
    fn map(&mut self, bytes: usize) -> Result<()> {
        if bytes > self.mapping.as_ref().map_or(0, Mapping::len) {
            self.mapping = None;
            let mapping = Mapping::new(&self.file, bytes)
                .map_err(|error| Error::system(format!("cannot map {bytes} bytes"), &error))?;
            self.mapping = Some(mapping);
        }
        Ok(())
    }
}

impl FileBuffer for MemFd {
    fn resize(&mut self, bytes: u64) -> Result<&mut [u8]> {
        let cannot = |error: &io::Error| {
            Error::system(format!("cannot give {bytes} bytes to a file in memory"), error)
        };
        let length =
            usize::try_from(bytes).map_err(|_| cannot(&io::ErrorKind::OutOfMemory.into()))?;
        self.file.set_len(bytes).map_err(|error| cannot(&error))?;
        self.map(length)?;
        let Some(mapping) = &self.mapping else { return Ok(&mut []) };
        // SAFETY: the mapping covers at least `length`, and so does the file. Nothing else in this
        // process writes to it or truncates it while `self` is borrowed: its path is given only to
        // an engine's load and save, and those are awaited before the next call here.
        Ok(unsafe { slice::from_raw_parts_mut(mapping.as_ptr(), length) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_reads_what_we_wrote_and_we_read_what_it_wrote() {
        let mut file = MemFd::new(c"test").unwrap();
        assert!(file.contents().unwrap().is_empty());
        file.resize(5).unwrap().copy_from_slice(b"hello");
        assert_eq!(std::fs::read(file.path()).unwrap(), b"hello");
        std::fs::write(file.path(), b"a longer text than before").unwrap(); // truncates, as engines do
        assert_eq!(file.contents().unwrap(), b"a longer text than before");
        assert_eq!(file.resize(1).unwrap(), b"a");
        assert_eq!(std::fs::read(file.path()).unwrap(), b"a", "no trailing bytes from before");
    }
}
