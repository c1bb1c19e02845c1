//! LMCache's messages. A request is `[uid, operation, parameters…]`, a reply `[uid, operation]` and
//! one more frame unless the result is none; every frame is one MessagePack value.
//!
//! A server decodes in two steps, [`Header::decode`] then [`Request::decode`], so that it can
//! answer an operation whose parameters are malformed (an unanswered `prepare_store` ends a vLLM
//! engine), and sends [`Header::reply`]. A client sends [`Request::encode`], finds its request by
//! [`Header::uid`], and decodes with [`Reply::decode`].
//!
//! One answer is a stream: `subscribe_kv_events` is answered as often as its sender asks for by a [`Control`], which is the
//! one message of another form, `[uid, "", word]`.
//!
//! Only the grammar is checked here: types and integer ranges. What values mean (salts, model
//! names, ranges of tokens, alignment) is for the store to judge.

mod events;
mod explain;
mod kv_events;
mod lmcache_driven;
mod piece;
mod reply;
mod request;

use bytes::Bytes;

use crate::messagepack::{Malformed, Problem, Reader, Result, Writer, frame, within};
use crate::operation::{Dialect, Operation};
pub use crate::operation::{EXTENSION, KV_EVENT_STREAM};
pub use piece::{PIECE_MAX, Piece};
pub use reply::{Hello, Reply, Slots, StoreSlots, Value};
pub use request::{BlockAllocation, Request, RequestKey};

/// Why a message is refused. [`MessageError::label`] is the name to count it under.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// Neither request nor reply: both begin with a uid and an operation.
    #[error("a message has at least 2 frames, this one has {0}")]
    TooFewFrames(usize),
    /// The first frame is not an integer.
    #[error("request uid: {0}")]
    Uid(Malformed),
    /// The second frame is neither an integer nor a string.
    #[error("operation: {0}")]
    OperationFrame(Malformed),
    /// A control message that is neither of [`Control`]'s words.
    #[error("a stream's control message is [uid, \"\", \"ack\" or \"cancel\"]")]
    Control,
    /// An operation that kvferry does not have.
    #[error("unknown operation {0}")]
    UnknownOperation(String),
    /// Too few or too many parameters.
    #[error("{0} does not go with {1} frames after it")]
    FrameCount(Operation, usize),
    /// A parameter or result against the grammar.
    #[error("{operation}: {malformed}")]
    Parameter {
        /// The operation.
        operation: Operation,
        /// Which value, and what is wrong.
        malformed: Malformed,
    },
    /// Data that is a Python pickle, which would be run as code.
    #[error(
        "{0} carries a Python pickle, which kvferry never loads; use shared memory \
         (LMCache: --no-l1-use-lazy --shm-name NAME --supported-transfer-mode engine_driven)"
    )]
    Pickle(Operation),
    /// Memory that is neither a segment of the host nor an allocation of CUDA's.
    #[error(
        "{0} describes memory of type {1:?}; kvferry copies that of types cpu_shm, cuda and cuda_raw: start the engine \
         with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False, or else with LMCACHE_MP_TRANSFER_MODE=engine_driven"
    )]
    MemoryType(Operation, String),
    /// Data in the message instead of in shared memory.
    #[error("{0} carries {1} bytes of data; kvferry moves data through shared memory only")]
    Data(Operation, usize),
}

impl MessageError {
    /// A name for counters; a malformed parameter counts under its problem.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::TooFewFrames(_) => "too_few_frames",
            Self::Uid(_) => "bad_uid",
            Self::OperationFrame(_) => "bad_operation",
            Self::Control => "bad_control",
            Self::UnknownOperation(_) => "unknown_operation",
            Self::FrameCount(..) => "frame_count",
            Self::Parameter { malformed, .. } => malformed.problem.label(),
            Self::Pickle(_) => "pickle",
            Self::MemoryType(..) => "memory_type",
            Self::Data(..) => "data",
        }
    }
}

impl From<MessageError> for kvferry_core::Error {
    fn from(error: MessageError) -> Self {
        Self::new(kvferry_core::ErrorCode::Protocol, error.to_string())
    }
}

/// The first two frames of a request or a reply, as they came: a reply repeats them byte for byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The frame that names the request among its sender's: a MessagePack integer.
    pub uid: Bytes,
    /// The frame that names the operation, by id or by name.
    pub operation_frame: Bytes,
    /// The operation.
    pub operation: Operation,
}

impl Header {
    /// Splits a message into its header and the frames after it.
    pub fn decode(frames: &[Bytes]) -> Result<(Self, &[Bytes]), MessageError> {
        Self::decode_in(Dialect::Current, frames)
    }

    /// The same, of a message between a server of `dialect` and its client.
    pub fn decode_in(dialect: Dialect, frames: &[Bytes]) -> Result<(Self, &[Bytes]), MessageError> {
        let [uid, operation_frame, payload @ ..] = frames else {
            return Err(MessageError::TooFewFrames(frames.len()));
        };
        frame(uid, Reader::integer::<i128>).map_err(MessageError::Uid)?;
        let operation = decode_operation(operation_frame, dialect)?;
        let header = Self { uid: uid.clone(), operation_frame: operation_frame.clone(), operation };
        Ok((header, payload))
    }

    /// The message that answers the request of this header.
    pub fn reply(&self, reply: &Reply) -> Vec<Bytes> {
        let mut frames = vec![self.uid.clone(), self.operation_frame.clone()];
        frames.extend(reply.encode());
        frames
    }
}

/// What the receiver of a stream tells its sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// It takes one more batch.
    Ack,
    /// The stream is to end.
    Cancel,
}

impl Control {
    /// The uid frame of the stream's request, and what is wanted; `None` for any other message.
    pub fn decode(frames: &[Bytes]) -> Option<Result<(&Bytes, Self), MessageError>> {
        let [uid, operation, payload @ ..] = frames else { return None };
        operation.is_empty().then(|| match payload {
            [word] if &word[..] == b"ack" => Ok((uid, Self::Ack)),
            [word] if &word[..] == b"cancel" => Ok((uid, Self::Cancel)),
            _ => Err(MessageError::Control),
        })
    }

    /// The message about the stream of `uid`, its request's first frame.
    pub fn encode(self, uid: &Bytes) -> Vec<Bytes> {
        let word: &[u8] = match self {
            Self::Ack => b"ack",
            Self::Cancel => b"cancel",
        };
        vec![uid.clone(), Bytes::new(), Bytes::from_static(word)]
    }
}

fn decode_operation(bytes: &[u8], dialect: Dialect) -> Result<Operation, MessageError> {
    // What is quoted of an unknown name, in characters.
    const QUOTED: usize = 64;
    let by_id = |id: i128| {
        u64::try_from(id)
            .ok()
            .and_then(|id| Operation::from_id(id, dialect))
            .ok_or_else(|| MessageError::UnknownOperation(id.to_string()))
    };
    let by_name = |name: &str| {
        Operation::from_name(name).ok_or_else(|| {
            MessageError::UnknownOperation(name.chars().take(QUOTED).collect::<String>())
        })
    };
    match frame(bytes, Reader::str) {
        Ok(name) => by_name(name),
        Err(Malformed { problem: Problem::Type { .. }, .. }) => {
            by_id(frame(bytes, Reader::integer).map_err(MessageError::OperationFrame)?)
        }
        Err(malformed) => Err(MessageError::OperationFrame(malformed)),
    }
}

fn encode_operation(operation: Operation, dialect: Dialect) -> Bytes {
    one(|w| match operation.id(dialect) {
        Some(id) => w.uint(id),
        None => w.str(operation.name()),
    })
}

/// A frame of one value.
fn one(write: impl FnOnce(&mut Writer)) -> Bytes {
    let mut writer = Writer::default();
    write(&mut writer);
    writer.finish()
}

/// The frames after a header, taken one by one.
struct Payload<'a> {
    operation: Operation,
    frames: &'a [Bytes],
    taken: usize,
}

impl<'a> Payload<'a> {
    fn frame(&mut self) -> Result<&'a Bytes, MessageError> {
        let frame = self.frames.get(self.taken).ok_or_else(|| self.miscount())?;
        self.taken += 1;
        Ok(frame)
    }

    fn end(&self) -> Result<(), MessageError> {
        if self.taken == self.frames.len() { Ok(()) } else { Err(self.miscount()) }
    }

    fn miscount(&self) -> MessageError {
        MessageError::FrameCount(self.operation, self.frames.len())
    }

    fn within<T>(&self, name: &'static str, value: Result<T>) -> Result<T, MessageError> {
        within(name, value)
            .map_err(|malformed| MessageError::Parameter { operation: self.operation, malformed })
    }

    fn next<T>(
        &mut self,
        name: &'static str,
        decode: impl FnOnce(&mut Reader<'a>) -> Result<T>,
    ) -> Result<T, MessageError> {
        let value = frame(self.frame()?, decode);
        self.within(name, value)
    }

    fn uint(&mut self, name: &'static str) -> Result<u64, MessageError> {
        self.next(name, Reader::coerced_integer)
    }
}

/// Data inside a message is a pickle in LMCache (`0x80`, then the pickle protocol's number).
/// Nothing of the kind is accepted; shared memory carries the data.
fn refuse_data(operation: Operation, data: &[u8]) -> Result<(), MessageError> {
    match data {
        [] => Ok(()),
        [0x80, 2..=5, ..] => Err(MessageError::Pickle(operation)),
        _ => Err(MessageError::Data(operation, data.len())),
    }
}
