//! What goes out: written by whoever asks while the socket takes it, and by the connection's task where it does not.

use std::collections::VecDeque;
use std::io::{ErrorKind, Result};
use std::sync::{Mutex, Weak};

use bytes::{Buf, Bytes};
use kvferry_wire::Output;
use kvferry_wire::zmtp::Limits;
use tokio::sync::Notify;

use crate::link::Stream;
use crate::session::lock;

/// What a message may have.
pub(crate) const LIMITS: Limits = Limits::DEFAULT;
/// Bytes of requests that may wait to be sent; twice as many with those for which nobody waits.
pub(crate) const QUEUED_BYTES_MAX: usize = 64 << 20;
/// Bytes that may wait for the socket before no more messages are made ready for it.
const WRITE: usize = 256 << 10;
/// Bytes of answers to the peer's commands that may wait for the socket: thousands of them. Who asks that often and takes
/// none gets no more.
const REPLIES_MAX: usize = 64 << 10;
/// Bytes that whoever asks writes at most, which may be JavaScript's thread: a system call of some microseconds.
const AT_ONCE: usize = 16 << 10;

/// A request on its way to the socket.
pub(crate) struct Outgoing {
    pub(crate) frames: Vec<Bytes>,
    pub(crate) awaited: bool,
}

impl Outgoing {
    fn bytes(&self) -> usize {
        self.frames.iter().map(Bytes::len).sum()
    }
}

/// Why a request was not taken.
pub(crate) enum Refused {
    TooMany,
    /// The connection has ended.
    Ended,
}

pub(crate) struct Outbox {
    /// It closes when the connection's task lets go of it.
    stream: Weak<Stream>,
    sending: Mutex<Sending>,
    /// Something is left for the task to write.
    left: Notify,
}

#[derive(Default)]
struct Sending {
    queue: VecDeque<Outgoing>,
    queued_bytes: usize,
    /// What the socket gets next: whole messages, and the rest of one.
    output: Output,
    /// Bytes of answers to commands that were put there since it was last empty.
    replies: usize,
    /// Nothing more is sent: what was would go on in the middle of a message.
    ended: bool,
}

impl Outbox {
    pub(crate) fn new(stream: Weak<Stream>) -> Self {
        Self { stream, sending: Mutex::default(), left: Notify::new() }
    }

    /// Puts a request behind the others, which [`LIMITS`] lets pass.
    pub(crate) fn push(&self, request: Outgoing) -> std::result::Result<(), Refused> {
        let bytes = request.bytes();
        let mut sending = lock(&self.sending);
        if sending.ended || self.stream.strong_count() == 0 {
            return Err(Refused::Ended);
        }
        // What ends something has room of its own: nothing else would end it.
        let most = if request.awaited { QUEUED_BYTES_MAX } else { 2 * QUEUED_BYTES_MAX };
        if sending.queued_bytes + bytes > most {
            return Err(Refused::TooMany);
        }
        sending.queued_bytes += bytes;
        sending.queue.push_back(request);
        Ok(())
    }

    /// Puts what answers the peer's commands behind what was made ready, unless too much of that waits.
    pub(crate) fn reply(&self, bytes: &[u8]) {
        let mut sending = lock(&self.sending);
        if !sending.ended && sending.replies + bytes.len() <= REPLIES_MAX {
            sending.replies += bytes.len();
            sending.output.tail().extend_from_slice(bytes);
        }
    }

    /// Writes what waits, as far as that is little and the socket takes it now; the task does the rest. What is not
    /// `wanted` any more does not go.
    pub(crate) fn flush(&self, wanted: impl Fn(&Outgoing) -> bool) {
        let little = {
            let sending = lock(&self.sending);
            sending.queued_bytes + sending.output.remaining() <= AT_ONCE
        };
        if !little || !matches!(self.write(wanted), Ok(true)) {
            self.nudge();
        }
    }

    /// Forgets what waits, and takes no more.
    pub(crate) fn end(&self) {
        let ended = Sending { ended: true, ..Sending::default() };
        let forgotten = std::mem::replace(&mut *lock(&self.sending), ended);
        drop(forgotten); // outside of the lock
    }

    /// Lets the task write what waits, together with what comes until then.
    pub(crate) fn nudge(&self) {
        self.left.notify_one();
    }

    /// Writes what waits, now and later. It only ends when the socket fails, and may be dropped and called again.
    pub(crate) async fn drain(
        &self,
        stream: &Stream,
        wanted: impl Fn(&Outgoing) -> bool,
    ) -> std::io::Error {
        loop {
            match self.write(&wanted) {
                Ok(true) => self.left.notified().await,
                Ok(false) => {
                    if let Err(error) = stream.writable().await {
                        return error;
                    }
                }
                Err(error) => return error,
            }
        }
    }

    /// Writes what the socket takes now; whether that was all.
    fn write(&self, wanted: impl Fn(&Outgoing) -> bool) -> Result<bool> {
        let Some(stream) = self.stream.upgrade() else { return Ok(true) };
        let mut sending = lock(&self.sending);
        let Sending { queue, queued_bytes, output, replies, .. } = &mut *sending;
        loop {
            while output.remaining() < WRITE
                && let Some(request) = queue.pop_front()
            {
                *queued_bytes -= request.bytes();
                if wanted(&request) {
                    LIMITS.put(&request.frames, output).map_err(std::io::Error::other)?;
                }
            }
            if !output.has_remaining() {
                *replies = 0;
                return Ok(true);
            }
            match stream.try_write(output) {
                Ok(written) => output.advance(written),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_a_peer_does_not_take_are_bounded() {
        let outbox = Outbox::new(Weak::new());
        for _ in 0..10_000 {
            outbox.reply(&[0; 23]); // a PONG with a context
        }
        let remaining = lock(&outbox.sending).output.remaining();
        assert!((REPLIES_MAX - 23..=REPLIES_MAX).contains(&remaining), "{remaining}");
    }
}
