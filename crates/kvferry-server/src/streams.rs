//! LMCache's `subscribe_kv_events`: one batch for each acknowledgement, beside a connection's other answers.

use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::Result;
use kvferry_core::events::KvEventBatch;
use kvferry_store::Store;
use kvferry_wire::message::Control;
use kvferry_wire::{Header, Reply};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Streams of one connection; one more is told that there is nothing to hear.
const STREAMS_MAX: usize = 16;
/// The same with those that are to end, or say only that there is nothing to hear. Beyond that a peer is told so and none is
/// kept: its end, which nobody waits for, is not sent.
const KEPT_MAX: usize = 2 * STREAMS_MAX;
/// Those of all connections: each is looked after at every event.
const ALL_STREAMS_MAX: usize = 256;

/// The streams that a connection's peer asked for. They go with the connection.
#[derive(Default)]
pub(crate) struct Streams(Vec<Stream>);

/// What a peer wants to hear.
pub(crate) struct Subscription {
    pub(crate) instance: u64,
    pub(crate) model_name: String,
    pub(crate) cursor: u64,
    pub(crate) max_events: u64,
}

struct Stream {
    header: Header,
    subscription: Subscription,
    state: State,
    /// One of those that all connections share; none for a stream that says nothing.
    place: Option<OwnedSemaphorePermit>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The first batch comes whether there is anything or not.
    Begins,
    /// The peer takes one more batch.
    Ready,
    /// A batch was sent.
    Sent,
    /// Only the end is left to send.
    Ends,
}

/// The places that all connections share.
pub(crate) fn places() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(ALL_STREAMS_MAX))
}

impl Streams {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Begins a stream, without `places` one that tells the peer that it hears nothing. An instance has one: the one before ends.
    /// What is to be answered at once where there are too many.
    pub(crate) fn begin(
        &mut self,
        store: &Store,
        places: Option<&Arc<Semaphore>>,
        header: &Header,
        subscription: Subscription,
    ) -> Result<Option<Vec<Bytes>>> {
        self.0.retain(|stream| stream.header.uid != header.uid); // its answers could not be told apart
        if self.0.len() >= KEPT_MAX {
            return Ok(Some(header.reply(&Reply::KvEvents(nothing()))));
        }
        let going_on = self.0.iter().filter(|stream| stream.place.is_some()).count();
        let places = places.filter(|_| going_on < STREAMS_MAX);
        let place = places.and_then(|places| Arc::clone(places).try_acquire_owned().ok());
        if place.is_some() {
            store.listen(&subscription.model_name, subscription.max_events)?;
        }
        let instance = subscription.instance;
        let same = |stream: &&mut Stream| stream.subscription.instance == instance;
        self.0.iter_mut().filter(same).for_each(Stream::end);
        let header = detached(header);
        let model_name = if place.is_some() { subscription.model_name } else { String::new() };
        let subscription = Subscription { model_name, ..subscription };
        self.0.push(Stream { header, subscription, state: State::Begins, place });
        Ok(None)
    }

    /// Does what the peer says of a stream of its own. It may have ended before the peer knew.
    pub(crate) fn control(&mut self, uid: &Bytes, control: Control) {
        if let Some(stream) = self.0.iter_mut().find(|stream| stream.header.uid == uid) {
            stream.control(control);
        }
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
    fn control(&mut self, control: Control) {
        match (control, self.state) {
            (Control::Cancel, _) => self.end(),
            // LMCache's client would miss the one batch if the end came with it.
            (Control::Ack, State::Sent) if self.place.is_none() => self.end(),
            (Control::Ack, State::Sent) => self.state = State::Ready,
            (Control::Ack, _) => {}
        }
    }

    fn end(&mut self) {
        self.state = State::Ends;
        self.place = None;
    }

    fn next(&mut self, store: &Store) -> Option<Vec<Bytes>> {
        let batch = match self.state {
            State::Sent | State::Ends => return None,
            State::Begins | State::Ready => self.batch(store),
        };
        let speaks = self.state == State::Begins || batch.lost || !batch.events.is_empty();
        speaks.then(|| {
            self.state = State::Sent;
            self.header.reply(&Reply::KvEvents(batch))
        })
    }

    fn batch(&mut self, store: &Store) -> KvEventBatch {
        let Subscription { model_name, cursor, max_events, .. } = &mut self.subscription;
        if self.place.is_none() {
            return nothing();
        }
        let batch = store.kv_events(model_name, *cursor, *max_events);
        *cursor = batch.next_cursor;
        batch
    }
}

/// There is nothing to hear.
fn nothing() -> KvEventBatch {
    let (enabled, incarnation, next_cursor, lost) = (false, 0, 0, false);
    KvEventBatch { enabled, incarnation, next_cursor, lost, events: Vec::new() }
}

/// The frames are parts of what was read, which would be kept for as long as these.
pub(crate) fn detached(header: &Header) -> Header {
    let copy = |frame: &Bytes| Bytes::copy_from_slice(frame);
    let (uid, operation_frame) = (copy(&header.uid), copy(&header.operation_frame));
    Header { uid, operation_frame, operation: header.operation }
}
