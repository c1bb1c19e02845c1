//! What the loading threads do.

use std::io;
use std::time::SystemTime;

use crc_fast::{CrcAlgorithm, Digest};
use kvferry_core::{Error, Result};

use super::ahead::Ahead;
use super::buffer::Buffer;
use super::format::{self, Header};
use super::index::{Object, Victim};
use super::shared::{LoadTask, Shared, closed};
use super::{Loaded, PART, STEP, Saved};
use crate::probe::is_probe;

pub(crate) fn run(shared: &Shared) {
    std::thread::scope(|scope| {
        let ahead = Ahead::start(scope).ok(); // without, one thread does both
        let mut loader = Loader { shared, ahead, buffer: Buffer::new(PART) };
        while let Some((mut task, open)) = next(shared) {
            let result = if open { loader.load(&task) } else { Err(closed()) };
            let mut state = shared.lock();
            if let Some(object) = &task.object {
                state.index.unpin(&object.named);
            }
            state.loading -= 1;
            drop(state);
            shared.changed.notify_all();
            if let Some(done) = task.done.take() {
                done.call(result);
            }
        }
    });
}

/// The next load, and whether it is to be done; `None` when there is none any more.
fn next(shared: &Shared) -> Option<(LoadTask, bool)> {
    let mut state = shared.lock();
    loop {
        if let Some(task) = state.loads.pop_front() {
            state.loading += 1;
            return Some((task, !state.closing));
        }
        if state.closing {
            return None;
        }
        state = shared.wait(&shared.for_loaders, state, None);
    }
}

/// Why an object was not loaded.
enum Unloaded {
    /// The file is not what was written, or gone.
    Damaged,
    /// The caller's memory is the reason.
    Memory(Error),
    /// The file could not be opened: it may be whole.
    Open(io::Error),
    /// The file could not be read.
    Read(io::Error),
}

impl From<io::Error> for Unloaded {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Damaged,
            _ => Self::Read(error),
        }
    }
}

struct Loader<'a> {
    shared: &'a Shared,
    ahead: Option<Ahead>,
    buffer: Buffer,
}

impl Loader<'_> {
    fn load(&mut self, task: &LoadTask) -> Result<Option<Loaded>> {
        let shared = self.shared;
        let Some(object) = &task.object else { return Ok(None) };
        if object.named.length != task.length {
            return Err(Error::invalid(format!(
                "an object of {} bytes was asked for with {}",
                object.named.length, task.length
            )));
        }
        let (unloaded, forget) = match self.read(task, object) {
            Ok(loaded) => {
                let mut state = shared.lock();
                if !state.has(object) {
                    return Ok(None); // it was removed or cleared meanwhile
                }
                if !is_probe(&task.id) {
                    state.status.loads += 1;
                    state.status.read_bytes += object.bytes;
                }
                return Ok(Some(loaded));
            }
            Err(Unloaded::Memory(error)) => return Err(error),
            Err(Unloaded::Damaged) => (Ok(None), true),
            Err(Unloaded::Open(error)) => (Err(shared.failure("open a file", &error)), false),
            Err(Unloaded::Read(error)) => {
                // The next load would fail as this one did. But where the way of reading is refused, the file is whole.
                let forget = error.kind() != io::ErrorKind::InvalidInput;
                (Err(shared.failure("read a file", &error)), forget)
            }
        };
        let mut state = shared.lock();
        let counted = u64::from(!is_probe(&task.id));
        // What was removed meanwhile may be gone, and is not damaged.
        let is_there = state.has(object);
        match &unloaded {
            Ok(_) => state.status.damaged += counted * u64::from(is_there),
            Err(_) => state.status.load_failures += counted,
        }
        if forget
            && is_there
            && let Some(object) = state.index.remove(&task.id)
        {
            state.leave(Victim::Object(object));
            shared.for_savers.notify_one();
        }
        unloaded
    }

    fn read(&mut self, task: &LoadTask, object: &Object) -> Result<Loaded, Unloaded> {
        let files = &self.shared.files;
        let mut handle = files.open(&object.named.name()).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Unloaded::Damaged,
            _ => Unloaded::Open(error),
        })?;
        if handle.bytes().map_err(Unloaded::Open)? != object.bytes {
            return Err(Unloaded::Damaged);
        }
        let bytes = usize::try_from(object.bytes).unwrap_or(usize::MAX);
        let part = self.buffer.first(bytes);
        handle.read_at(0, part)?;
        let header = format::decode(part).filter(|header| is_expected(header, task, object));
        let header = header.ok_or(Unloaded::Damaged)?;
        let mut arriving = Arriving { task, digest: Digest::new(CrcAlgorithm::Crc64Nvme), at: 0 };
        arriving.take(&part[header.bytes..])?;
        let rest = (part.len() as u64, object.bytes);
        if let Some(ahead) = self.ahead.as_ref().filter(|_| rest.0 < rest.1) {
            handle = ahead.read(handle, rest, |part| arriving.take(part))?;
        } else {
            let mut from = rest.0;
            while from < object.bytes {
                let left = usize::try_from(object.bytes - from).unwrap_or(usize::MAX);
                let part = self.buffer.first(left);
                handle.read_at(from, part)?;
                from += part.len() as u64;
                arriving.take(part)?;
            }
        }
        let checksum = arriving.digest.finalize();
        if checksum != header.checksum || arriving.at != task.length {
            return Err(Unloaded::Damaged);
        }
        let now = SystemTime::now();
        let age = now.duration_since(object.stamped).unwrap_or_default();
        if age > self.shared.times.stamp && handle.set_modified(now).is_ok() {
            self.shared.lock().index.stamp(&object.named, now);
        }
        Ok(Loaded { checksum, parent: header.saved.parent })
    }
}

/// Whether the header is that of the object which is to be loaded.
fn is_expected(header: &Header, task: &LoadTask, object: &Object) -> bool {
    let padded = format::padded(header.length);
    let bytes = padded.and_then(|bytes| bytes.checked_add(header.bytes as u64));
    let saved = &header.saved;
    bytes == Some(object.bytes)
        && header.length == task.length
        && saved.id() == task.id
        && saved.space == Saved::space_of(&saved.layout, &saved.cache_salt)
}

/// The object's bytes, as they come.
struct Arriving<'a> {
    task: &'a LoadTask,
    digest: Digest,
    at: u64,
}

impl Arriving<'_> {
    /// The next ones, or what fills the file up.
    fn take(&mut self, part: &[u8]) -> Result<(), Unloaded> {
        let left = usize::try_from(self.task.length - self.at).unwrap_or(usize::MAX);
        for step in part[..part.len().min(left)].chunks(STEP) {
            self.digest.update(step);
            let to = self.task.offset.saturating_add(self.at); // out of bounds: the memory says so
            self.task.memory.write(to, step).map_err(Unloaded::Memory)?;
            self.at += step.len() as u64;
        }
        Ok(())
    }
}
