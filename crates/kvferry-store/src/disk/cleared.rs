//! Up to where the directory was cleared: one small file that is on the disk before the first cleared one goes, so
//! that a clear is whole whatever stops in between.

use std::io;

use super::buffer::Buffer;
use super::files::{Files, Handle};
use super::format::{self, CLEARED, CLEARED_BYTES, CLEARED_UNFINISHED};

/// Tells later starts that files up to this sequence number were cleared.
pub(crate) fn write(files: &dyn Files, sequence: u64) -> io::Result<()> {
    let mut buffer = Buffer::new(CLEARED_BYTES);
    let page = buffer.first(CLEARED_BYTES);
    format::encode_cleared(sequence, page);
    let mut handle = create(files)?;
    let written = handle.write_at(0, page).and_then(|()| handle.sync());
    drop(handle);
    let renamed = written.and_then(|()| files.rename(CLEARED_UNFINISHED, CLEARED));
    if renamed.is_err() {
        let _ = files.remove(CLEARED_UNFINISHED); // the next one does it, or the next start
    }
    renamed.and_then(|()| files.sync())
}

fn create(files: &dyn Files) -> io::Result<Box<dyn Handle>> {
    match files.create(CLEARED_UNFINISHED) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            files.remove(CLEARED_UNFINISHED)?;
            files.create(CLEARED_UNFINISHED)
        }
        created => created,
    }
}

/// The same number. What is not whole, or of another version, is removed, and says 0: a later start that could read it
/// would take what is saved from now on for cleared.
pub(crate) fn read(files: &dyn Files) -> io::Result<u64> {
    let mut buffer = Buffer::new(CLEARED_BYTES);
    let page = buffer.first(CLEARED_BYTES);
    match files.open(CLEARED).and_then(|mut handle| handle.read_at(0, page)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
        _ => {}
    }
    match format::decode_cleared(page) {
        Some(sequence) => Ok(sequence),
        None => files.remove(CLEARED).and_then(|()| files.sync()).map(|()| 0),
    }
}
