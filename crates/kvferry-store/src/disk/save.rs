//! What the saving threads do.
//!
//! Each takes a few saves at once, writes their files, syncs them all, renames them all and syncs the directory:
//! small objects share what a sync costs.

use std::io;
use std::time::{Duration, Instant, SystemTime};

use crc_fast::{CrcAlgorithm, Digest};
use kvferry_core::{Error, ErrorCode, Result};

use super::buffer::Buffer;
use super::files::Handle;
use super::format::{self, HEADER_MAX, Named};
use super::index::Victim;
use super::shared::{NoRoom, SaveTask, Shared, State, closed};
use super::{PART, STEP, Saved};
use crate::probe::is_probe;

/// Objects that one thread writes before it syncs.
const BATCH: usize = 64;
/// Bytes after which no further object is added to them.
const BATCH_BYTES: u64 = 32 << 20;

/// How often a file is tried where the file system is full, each time with less on it.
const FULL_TRIES: u32 = 3;

/// A save and what became of it.
type Ended = (SaveTask, Result<bool>);

enum Work {
    End(Vec<Ended>),
    /// Up to this number.
    MarkCleared(u64),
    Remove(Vec<Victim>),
    Save {
        batch: Vec<SaveTask>,
        ended: Vec<Ended>,
    },
}

pub(crate) fn run(shared: &Shared) {
    let mut saver = Saver { shared, buffer: Buffer::new(PART), header: Buffer::new(HEADER_MAX) };
    while let Some(work) = next(shared) {
        match work {
            Work::End(ended) => end(shared, ended),
            Work::MarkCleared(sequence) => shared.mark_cleared(sequence),
            Work::Remove(removals) => shared.unlink_removals(removals),
            Work::Save { batch, ended } => {
                end(shared, ended);
                saver.save(batch);
            }
        }
    }
}

/// `None` when there is nothing left to do, ever.
fn next(shared: &Shared) -> Option<Work> {
    let mut guard = shared.lock();
    loop {
        let state = &mut *guard;
        if !state.overtaken.is_empty() {
            let overtaken = std::mem::take(&mut state.overtaken).into_iter();
            return Some(Work::End(overtaken.map(|task| (task, Err(overtaken_by()))).collect()));
        }
        if state.closing && !state.saves.is_empty() {
            let saves = std::mem::take(&mut state.saves).into_iter();
            return Some(Work::End(saves.map(|task| (task, Err(closed()))).collect()));
        }
        if let Some(sequence) = state.cleared.take() {
            return Some(Work::MarkCleared(sequence));
        }
        let removals = state.take_removals(&shared.times);
        if !removals.is_empty() {
            return Some(Work::Remove(removals));
        }
        if state.closing && !state.cleared.is_pending() {
            return None;
        }
        let (batch, ended) = take_batch(state);
        if !batch.is_empty() || !ended.is_empty() {
            return Some(Work::Save { batch, ended });
        }
        // What is owed waits for a marker that is being written, whose end wakes all.
        let retry_at = state.owed.retry_at().filter(|_| !state.cleared.is_pending());
        guard = shared.wait(&shared.for_savers, guard, retry_at);
    }
}

/// What is to be written now, and what ends without.
fn take_batch(state: &mut State) -> (Vec<SaveTask>, Vec<Ended>) {
    let (mut batch, mut ended) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    while batch.len() < BATCH
        && bytes < BATCH_BYTES
        && let Some(task) = state.saves.pop_front()
    {
        let id = task.saved.id();
        if state.index.get(&id).is_some() {
            state.index.touch(&id, Instant::now());
            ended.push((task, Ok(true)));
        } else if let Some(writing) = state.writing.get_mut(&id) {
            if writing.removed {
                // A new object of the same identity: its turn comes when that one is gone.
                writing.successors.push(task);
            } else {
                writing.waiters.push(task);
            }
        } else if let Some(reason) = state.health.reason().filter(|_| !task.trial) {
            let error = Error::new(ErrorCode::System, reason);
            state.status.save_failures += 1;
            ended.push((task, Err(error)));
        } else {
            bytes += task.length;
            state.writing.insert(id, super::shared::Writing::default());
            batch.push(task);
        }
    }
    (batch, ended)
}

fn overtaken_by() -> Error {
    Error::new(ErrorCode::Aborted, "the object was removed before it was on the disk")
}

/// Tells the callbacks, then those who wait for all that was accepted.
fn end(shared: &Shared, ended: Vec<Ended>) {
    if ended.is_empty() {
        return;
    }
    let mut told = Vec::with_capacity(ended.len());
    for (mut task, result) in ended {
        if let Some(done) = task.done.take() {
            done.call(result);
        }
        told.push((task.ticket, task.length));
        drop(task); // its memory may be unmapped: not under the lock
    }
    let mut state = shared.lock();
    for (ticket, length) in told {
        state.end(ticket, length);
    }
    shared.changed.notify_all();
}

/// Why an object was not written.
enum Failure {
    /// Its bytes, names or size are the reason.
    Caller(Error),
    /// Its bytes are not those that were stored.
    Damaged,
    /// It was removed meanwhile.
    Overtaken,
    /// The disk is.
    Disk(Error),
}

/// A file that is written, its bytes, and itself.
type Begun = (Named, u64, Box<dyn Handle>);

/// A file that is written and not visible yet.
struct Written {
    task: SaveTask,
    named: Named,
    bytes: u64,
}

struct Saver<'a> {
    shared: &'a Shared,
    buffer: Buffer,
    header: Buffer,
}

impl Saver<'_> {
    fn save(&mut self, batch: Vec<SaveTask>) {
        let shared = self.shared;
        let mut open: Vec<(Written, Box<dyn Handle>)> = Vec::with_capacity(batch.len());
        let mut ended = Vec::new();
        let mut held = 0;
        let mut batch = batch.into_iter();
        while let Some(task) = batch.next() {
            match self.begin(&task, held) {
                Ok(Some((named, bytes, handle))) => {
                    held += bytes;
                    open.push((Written { task, named, bytes }, handle));
                }
                Ok(None) => {
                    self.put_back(std::iter::once(task).chain(batch));
                    break;
                }
                Err(failure) => self.fail(task, failure, &mut ended),
            }
        }
        let mut renamed = Vec::with_capacity(open.len());
        for (written, mut handle) in open {
            let (from, to) = (written.named.unfinished(), written.named.name());
            let synced = handle.sync();
            drop(handle);
            // After a sync that failed nobody knows what is there: the file is never synced again, but removed.
            match synced.and_then(|()| shared.files.rename(&from, &to)) {
                Ok(()) => renamed.push(written),
                Err(error) => self.discard(written, &from, "write a file", &error, &mut ended),
            }
        }
        if !renamed.is_empty() {
            match shared.files.sync() {
                Ok(()) => self.commit(renamed, &mut ended),
                Err(error) => {
                    for written in renamed {
                        let name = written.named.name();
                        self.discard(written, &name, "sync", &error, &mut ended);
                    }
                }
            }
        }
        end(shared, ended);
    }

    /// Writes the object's file. `None`: there is no room before the files that are `held` have become objects.
    fn begin(&mut self, task: &SaveTask, held: u64) -> Result<Option<Begun>, Failure> {
        let shared = self.shared;
        let SaveTask { saved, length, .. } = task;
        let header = format::header_bytes(saved).map_err(Failure::Caller)?;
        if saved.space != Saved::space_of(&saved.layout, &saved.cache_salt) {
            let message = "the object's space is not that of its layout and salt";
            return Err(Failure::Caller(Error::new(ErrorCode::Internal, message)));
        }
        let bytes = format::padded(*length).unwrap_or(u64::MAX).saturating_add(header as u64);
        if task.trial {
            shared.files.prepare().map_err(Failure::Disk)?;
        } else if let Some(reason) = shared.lock().health.reason() {
            return Err(Failure::Disk(Error::new(ErrorCode::System, reason))); // since the batch was taken
        }
        let room = shared.make_room(bytes, held).map_err(|none| match none {
            NoRoom::Failed(error) => Failure::Disk(error),
            NoRoom::Small(error) => Failure::Caller(error),
        });
        if !room? {
            return Ok(None);
        }
        let mut state = shared.lock();
        if state.writing.get(&saved.id()).is_some_and(|writing| writing.removed) {
            // By a clear, say: a number from afterwards would be that of a file which was not cleared.
            state.reserved -= bytes;
            return Err(Failure::Overtaken);
        }
        state.sequence += 1;
        let named = Named { id: saved.id(), length: *length, sequence: state.sequence };
        drop(state);
        let name = named.unfinished();
        let mut tries = 1..FULL_TRIES;
        let failure = loop {
            let error = match shared.files.create(&name) {
                Err(error) => error, // there is no file to remove
                Ok(handle) => {
                    let unwritten = match self.write(handle, task, header) {
                        Ok(handle) => return Ok(Some((named, bytes, handle))),
                        Err(unwritten) => unwritten,
                    };
                    self.remove_or_count(&name, bytes);
                    match unwritten {
                        Unwritten::Memory(error) => break Failure::Caller(error),
                        Unwritten::Damaged => break Failure::Damaged,
                        Unwritten::File(error) => error,
                    }
                }
            };
            let full =
                matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
            if !full || tries.next().is_none() || !shared.shrink(bytes) {
                break Failure::Disk(shared.failure("write a file", &error));
            }
        };
        shared.lock().reserved -= bytes;
        Err(failure)
    }

    fn write(
        &mut self,
        mut handle: Box<dyn Handle>,
        task: &SaveTask,
        header_bytes: usize,
    ) -> Result<Box<dyn Handle>, Unwritten> {
        let length = task.length;
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        let (mut at, mut file_at) = (0, 0);
        // The header's place is written with the first part, so that the file is of one piece, and filled at last.
        let mut start = header_bytes;
        loop {
            self.shared.pause_for_loads();
            let left = usize::try_from(length - at).unwrap_or(usize::MAX);
            let bytes = left.min(PART - start);
            let end = start + bytes;
            let part = self.buffer.first(end.next_multiple_of(4096));
            part[..start].fill(0);
            part[end..].fill(0);
            for step in part[start..end].chunks_mut(STEP) {
                let from = task.offset.saturating_add(at); // out of bounds: the memory says so
                task.memory.read(from, step).map_err(Unwritten::Memory)?;
                digest.update(step);
                at += step.len() as u64;
            }
            let whole = start > 0 && at == length;
            if whole {
                format::encode(&task.saved, length, sum(&digest, task)?, &mut part[..start]);
            }
            handle.write_at(file_at, part)?;
            if whole {
                return Ok(handle);
            }
            file_at += part.len() as u64;
            start = 0;
            if at == length {
                break;
            }
        }
        let header = self.header.first(header_bytes);
        format::encode(&task.saved, length, sum(&digest, task)?, header);
        handle.write_at(0, header)?;
        Ok(handle)
    }

    /// These objects are on the disk: they can be found now.
    fn commit(&self, renamed: Vec<Written>, ended: &mut Vec<Ended>) {
        let now = SystemTime::now();
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        for Written { task, named, bytes } in renamed {
            state.reserved -= bytes;
            if !is_probe(&task.saved.id()) {
                state.status.saves += 1;
                state.status.written_bytes += bytes;
            }
            if task.trial {
                state.health.recover();
            }
            let writing = state.end_writing(&named.id);
            let result = if writing.removed {
                state.leave(Victim::Other(named.name(), bytes));
                Err(overtaken_by())
            } else {
                state.index.insert(named, bytes, now, Duration::ZERO);
                Ok(true)
            };
            let tasks = std::iter::once(task).chain(writing.waiters);
            ended.extend(tasks.map(|task| (task, result.clone())));
        }
        self.shared.for_savers.notify_all();
    }

    /// The file did not become an object.
    fn discard(
        &self,
        written: Written,
        name: &str,
        doing: &str,
        error: &io::Error,
        ended: &mut Vec<Ended>,
    ) {
        let Written { task, bytes, .. } = written;
        self.remove_or_count(name, bytes);
        self.shared.lock().reserved -= bytes;
        self.fail(task, Failure::Disk(self.shared.failure(doing, error)), ended);
    }

    /// A file that cannot be removed counts, and goes first; the next start removes it too.
    fn remove_or_count(&self, name: &str, bytes: u64) {
        let removed = self.shared.files.remove(name);
        if removed.is_err_and(|error| error.kind() != io::ErrorKind::NotFound) {
            self.shared.lock().index.insert_other(name.to_owned(), bytes);
        }
    }

    fn fail(&self, task: SaveTask, failure: Failure, ended: &mut Vec<Ended>) {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        let writing = state.end_writing(&task.saved.id());
        let result = match failure {
            Failure::Disk(error) => {
                let reason = error.message.clone();
                state.health.fail(reason, task.trial, Instant::now(), &self.shared.times);
                state.status.save_failures += 1 + writing.waiters.len() as u64;
                state.last_failure = Some(error.clone());
                ended.extend(writing.waiters.into_iter().map(|task| (task, Err(error.clone()))));
                Err(error)
            }
            // Others may have the object in other memory, and whole.
            Failure::Caller(error) => {
                state.save_again(writing);
                state.status.save_failures += 1;
                state.last_failure = Some(error.clone());
                Err(error)
            }
            Failure::Damaged => {
                state.save_again(writing);
                state.status.dropped_damaged += 1;
                Ok(false)
            }
            Failure::Overtaken => {
                state.save_again(writing);
                Err(overtaken_by())
            }
        };
        ended.push((task, result));
        self.shared.for_savers.notify_all();
    }

    /// Their turn comes again.
    fn put_back(&self, tasks: impl DoubleEndedIterator<Item = SaveTask>) {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        for task in tasks.rev() {
            let mut writing = state.end_writing(&task.saved.id());
            writing.waiters.insert(0, task);
            state.save_again(writing);
        }
        self.shared.for_savers.notify_all();
    }
}

/// The checksum of a task's bytes, unless it is not what it has to be.
fn sum(digest: &Digest, task: &SaveTask) -> Result<u64, Unwritten> {
    let sum = digest.finalize();
    match task.checksum {
        Some(expected) if expected != sum => Err(Unwritten::Damaged),
        _ => Ok(sum),
    }
}

/// Why a file was not written.
enum Unwritten {
    Memory(Error),
    Damaged,
    File(io::Error),
}

impl From<io::Error> for Unwritten {
    fn from(error: io::Error) -> Self {
        Self::File(error)
    }
}
