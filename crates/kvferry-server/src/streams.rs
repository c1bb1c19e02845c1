//! LMCache's `subscribe_kv_events`: one batch for each acknowledgement, beside a connection's other answers.

use bytes::Bytes;
use kvferry_core::Result;
use kvferry_core::events::KvEventBatch;
use kvferry_store::Store;
use kvferry_wire::message::Control;
use kvferry_wire::{Header, Reply};

/// Streams of one connection; one more is told that there is nothing to hear.
const STREAMS_MAX: usize = 16;

/// The streams that a connection's peer asked for. They go with the connection.
#[derive(Default)]
pub(crate) struct Streams(Vec<Stream>);

struct Stream {
    header: Header,
    instance: u64,
    model_name: String,
    cursor: u64,
    max_events: u64,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The first batch comes whether there is anything or not.
    Begins,
    /// The peer takes one more batch.
    Ready,
    /// A batch was sent.
    Sent,
    /// What it asked for, nobody tells it.
    Refused,
    /// Only the end is left to send.
    Ends,
}

impl Streams {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Begins a stream. An instance has one: the one before ends.
    pub(crate) fn begin(
        &mut self,
        store: &Store,
        allowed: bool,
        header: &Header,
        (instance, model_name, cursor, max_events): (u64, String, u64, u64),
    ) -> Result<()> {
        store.listen(&model_name, max_events)?;
        self.0.retain(|stream| stream.header.uid != header.uid); // its answers could not be told apart
        for stream in self.0.iter_mut().filter(|stream| stream.instance == instance) {
            stream.state = State::Ends;
        }
        let going_on = self.0.iter().filter(|stream| stream.state != State::Ends).count();
        let state = if allowed && going_on < STREAMS_MAX { State::Begins } else { State::Refused };
        // The frames are parts of what was read, which would be kept for as long as the stream.
        let copy = |frame: &Bytes| Bytes::copy_from_slice(frame);
        let (uid, operation_frame) = (copy(&header.uid), copy(&header.operation_frame));
        let header = Header { uid, operation_frame, operation: header.operation };
        self.0.push(Stream { header, instance, model_name, cursor, max_events, state });
        Ok(())
    }

    /// Does what the peer says of a stream of its own; `false` when there is none.
    pub(crate) fn control(&mut self, uid: &Bytes, control: Control) -> bool {
        let Some(stream) = self.0.iter_mut().find(|stream| stream.header.uid == uid) else {
            return false;
        };
        stream.state = match (control, stream.state) {
            (Control::Cancel, _) => State::Ends,
            (Control::Ack, State::Sent) => State::Ready,
            (Control::Ack, state) => state,
        };
        true
    }

    /// The next message of any stream; `None` when none has anything to say.
    pub(crate) fn next(&mut self, store: &Store) -> Option<Vec<Bytes>> {
        if let Some(ended) = self.0.iter().position(|stream| stream.state == State::Ends) {
            return Some(self.0.remove(ended).header.reply(&Reply::None));
        }
        self.0.iter_mut().find_map(|stream| stream.next(store))
    }
}

impl Stream {
    fn next(&mut self, store: &Store) -> Option<Vec<Bytes>> {
        let batch = match self.state {
            State::Sent | State::Ends => return None,
            State::Refused => KvEventBatch {
                enabled: false,
                incarnation: 0,
                next_cursor: 0,
                lost: false,
                events: Vec::new(),
            },
            State::Begins | State::Ready => {
                let batch = store.kv_events(&self.model_name, self.cursor, self.max_events);
                self.cursor = batch.next_cursor;
                batch
            }
        };
        let speaks = self.state != State::Ready || batch.lost || !batch.events.is_empty();
        speaks.then(|| {
            self.state = if batch.enabled { State::Sent } else { State::Ends };
            self.header.reply(&Reply::KvEvents(batch))
        })
    }
}
