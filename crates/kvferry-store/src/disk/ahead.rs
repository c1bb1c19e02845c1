//! Reading ahead: while one part of an object is summed and copied, the next comes from the disk.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;

use super::PART;
use super::buffer::Buffer;
use super::files::Handle;

/// Parts that are read before the first of them is used up.
const BUFFERS: usize = 2;

/// A thread that reads files, for one other thread. It ends when this is dropped.
pub(crate) struct Ahead {
    jobs: Sender<Job>,
    empty: Sender<Buffer>,
    parts: Receiver<Part>,
}

struct Job {
    handle: Box<dyn Handle>,
    from: u64,
    to: u64,
}

enum Part {
    /// Of a buffer, so many bytes.
    Read(Buffer, io::Result<usize>),
    End(Box<dyn Handle>),
}

impl Ahead {
    /// # Errors
    /// There can be no more threads.
    pub(crate) fn start<'scope>(scope: &'scope Scope<'scope, '_>) -> io::Result<Self> {
        let ((jobs, next_job), (empty, next_empty), (part, parts)) =
            (channel::<Job>(), channel(), channel());
        let work = move || {
            for Job { mut handle, from, to } in next_job {
                let mut at = from;
                while at < to {
                    let Ok(mut buffer): Result<Buffer, _> = next_empty.recv() else { return };
                    let bytes = usize::try_from(to - at).unwrap_or(usize::MAX).min(PART);
                    let read = handle.read_at(at, buffer.first(bytes)).map(|()| bytes);
                    at = if read.is_ok() { at + bytes as u64 } else { to };
                    if part.send(Part::Read(buffer, read)).is_err() {
                        return;
                    }
                }
                if part.send(Part::End(handle)).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("kvferry-ahead".into()).spawn_scoped(scope, work)?;
        for _ in 0..BUFFERS {
            let _ = empty.send(Buffer::new(PART)); // the thread is there
        }
        Ok(Self { jobs, empty, parts })
    }

    /// Reads the file from `from` to `to` and gives it part by part; the file comes back. After an error nothing more
    /// is given.
    pub(crate) fn read<E: From<io::Error>>(
        &self,
        handle: Box<dyn Handle>,
        (from, to): (u64, u64),
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<Box<dyn Handle>, E> {
        let gone = || io::Error::other("the thread that reads ahead is gone");
        self.jobs.send(Job { handle, from, to }).map_err(|_| gone())?;
        let mut result = Ok(());
        loop {
            match self.parts.recv().map_err(|_| gone())? {
                Part::Read(mut buffer, read) => {
                    let read = read.map_err(E::from);
                    result = result.and(read).and_then(|bytes| take(buffer.first(bytes)));
                    let _ = self.empty.send(buffer);
                }
                Part::End(handle) => return result.map(|()| handle),
            }
        }
    }
}
