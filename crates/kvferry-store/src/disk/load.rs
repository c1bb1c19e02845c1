//! What the loading threads do.

use std::io;
use std::time::SystemTime;

use crc_fast::{CrcAlgorithm, Digest};
use kvferry_core::{Error, Result};

use super::buffer::Buffer;
use super::format;
use super::index::{Object, Victim};
use super::shared::{LoadTask, Shared, closed};
use super::{Loaded, PART, STEP, Saved};

pub(crate) fn run(shared: &Shared) {
    let mut buffer = Buffer::new(PART);
    while let Some((mut task, open)) = next(shared) {
        let result = if open { load(shared, &task, &mut buffer) } else { Err(closed()) };
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

fn load(shared: &Shared, task: &LoadTask, buffer: &mut Buffer) -> Result<Option<Loaded>> {
    let Some(object) = &task.object else { return Ok(None) };
    if object.named.length != task.length {
        return Err(Error::invalid(format!(
            "an object of {} bytes was asked for with {}",
            object.named.length, task.length
        )));
    }
    let (unloaded, forget) = match read(shared, task, object, buffer) {
        Ok(loaded) => {
            let mut state = shared.lock();
            state.status.loads += 1;
            state.status.read_bytes += object.bytes;
            return Ok(Some(loaded));
        }
        Err(Unloaded::Memory(error)) => return Err(error),
        Err(Unloaded::Damaged) => (Ok(None), true),
        Err(Unloaded::Open(error)) => (Err(shared.failure("open a file", &error)), false),
        // The next load would fail as this one did.
        Err(Unloaded::Read(error)) => (Err(shared.failure("read a file", &error)), true),
    };
    let mut state = shared.lock();
    match &unloaded {
        Ok(_) => state.status.damaged += 1,
        Err(_) => state.status.load_failures += 1,
    }
    if forget
        && state.index.get(&task.id).is_some_and(|now| now.named == object.named)
        && let Some(object) = state.index.remove(&task.id)
    {
        state.leave(Victim::Object(object));
        shared.for_savers.notify_one();
    }
    unloaded
}

fn read(
    shared: &Shared,
    task: &LoadTask,
    object: &Object,
    buffer: &mut Buffer,
) -> Result<Loaded, Unloaded> {
    let of_read = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Unloaded::Damaged,
        _ => Unloaded::Read(error),
    };
    let mut handle =
        shared.files.open(&object.named.name()).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Unloaded::Damaged,
            _ => Unloaded::Open(error),
        })?;
    if handle.bytes().map_err(Unloaded::Open)? != object.bytes {
        return Err(Unloaded::Damaged);
    }
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    let (mut at, mut file_at) = (0, 0);
    let mut header = None;
    while file_at < object.bytes {
        let bytes = usize::try_from(object.bytes - file_at).unwrap_or(usize::MAX).min(PART);
        let part = buffer.first(bytes);
        handle.read_at(file_at, part).map_err(of_read)?;
        file_at += part.len() as u64;
        let start = if header.is_some() {
            0
        } else {
            let read = format::decode(part).ok_or(Unloaded::Damaged)?;
            let bytes =
                format::padded(read.length).and_then(|it| it.checked_add(read.bytes as u64));
            let saved = &read.saved;
            let expected = bytes == Some(object.bytes)
                && read.length == task.length
                && saved.id() == task.id
                && saved.space == Saved::space_of(&saved.layout, &saved.cache_salt);
            if !expected {
                return Err(Unloaded::Damaged);
            }
            let start = read.bytes;
            header = Some(read);
            start
        };
        let left = usize::try_from(task.length - at).unwrap_or(usize::MAX);
        let end = part.len().min(start.saturating_add(left));
        for step in part[start..end].chunks(STEP) {
            digest.update(step);
            let to = task.offset.saturating_add(at); // out of bounds: the memory says so
            task.memory.write(to, step).map_err(Unloaded::Memory)?;
            at += step.len() as u64;
        }
    }
    let header = header.ok_or(Unloaded::Damaged)?;
    let checksum = digest.finalize();
    if checksum != header.checksum || at != task.length {
        return Err(Unloaded::Damaged);
    }
    let now = SystemTime::now();
    let age = now.duration_since(object.stamped).unwrap_or_default();
    if age > shared.times.stamp && handle.set_modified(now).is_ok() {
        shared.lock().index.stamp(&object.named, now);
    }
    Ok(Loaded { checksum, parent: header.saved.parent })
}
