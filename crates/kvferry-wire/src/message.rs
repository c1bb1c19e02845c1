//! LMCache's messages. A request is `[uid, operation, parameters…]`, a reply `[uid, operation]` and one
//! more frame unless the result is none; every frame is one MessagePack value.
//!
//! A server decodes in two steps, [`Header::decode`] then [`Request::decode`], so that it can answer
//! an operation whose parameters are malformed (an unanswered `prepare_store` ends a vLLM engine), and
//! sends [`Header::reply`]. A client sends [`Request::encode`], finds its request by [`Header::uid`],
//! and decodes with [`Reply::decode`].
//!
//! Only the grammar is checked here: types and integer ranges. What values mean (salts, model names,
//! ranges of tokens, alignment) is for the store to judge.

use bytes::Bytes;
use kvferry_core::cache::Slot;
use kvferry_core::key::{Dtype, Key, Layout};

use crate::messagepack::{
    Kind, Malformed, Problem, Reader, Result, Writer, frame, once, required, within,
};
pub use crate::operation::EXTENSION;
use crate::operation::Operation;

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
            Self::UnknownOperation(_) => "unknown_operation",
            Self::FrameCount(..) => "frame_count",
            Self::Parameter { malformed, .. } => malformed.problem.label(),
            Self::Pickle(_) => "pickle",
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
        let [uid, operation_frame, payload @ ..] = frames else {
            return Err(MessageError::TooFewFrames(frames.len()));
        };
        frame(uid, Reader::integer::<i128>).map_err(MessageError::Uid)?;
        let operation = decode_operation(operation_frame)?;
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

fn decode_operation(bytes: &[u8]) -> Result<Operation, MessageError> {
    // What is quoted of an unknown name, in characters.
    const QUOTED: usize = 64;
    let by_id = |id: i128| {
        u64::try_from(id)
            .ok()
            .and_then(Operation::from_id)
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

fn encode_operation(operation: Operation) -> Bytes {
    one(|w| match operation.id() {
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

/// Which fields a server knows. All of them ignore fields that they do not know, as far as read from
/// their sources; [`Dialect::Lmcache054`] is for those that turn out to be stricter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// LMCache 0.5.5 and later: 10 fields in a key, 9 in a registration.
    #[default]
    Current,
    /// LMCache before 0.5.5: no `request_configs`, `num_kv_readers`, `num_physical_slots`.
    Lmcache054,
}

/// A key with what LMCache sends beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestKey {
    /// The key.
    pub key: Key,
    /// LMCache's `request_configs`: opaque MessagePack (a map), not part of any identity. `None` is
    /// nil.
    pub configs: Option<Bytes>,
}

impl From<Key> for RequestKey {
    fn from(key: Key) -> Self {
        Self { key, configs: None }
    }
}

impl RequestKey {
    fn decode(bytes: &Bytes) -> Result<Self> {
        frame(bytes, |r| {
            let mut model_name = None;
            let mut world_size = None;
            let mut worker_id = None;
            let mut token_ids = None;
            let mut start = None;
            let mut end = None;
            let mut request_id = None;
            let mut cache_salt = None;
            let mut configs = None;
            let mut num_kv_readers = None;
            for _ in 0..r.map_len()? {
                match r.str()? {
                    "model_name" => once(&mut model_name, "model_name", r.string()),
                    "world_size" => once(&mut world_size, "world_size", r.integer()),
                    "worker_id" => once(&mut worker_id, "worker_id", r.integer_or_nil()),
                    "token_ids" => once(&mut token_ids, "token_ids", r.token_ids()),
                    "start" => once(&mut start, "start", r.integer()),
                    "end" => once(&mut end, "end", r.integer()),
                    "request_id" => once(&mut request_id, "request_id", r.string()),
                    "cache_salt" => once(&mut cache_salt, "cache_salt", r.string()),
                    "request_configs" => {
                        once(&mut configs, "request_configs", r.opaque_map_or_nil())
                    }
                    "num_kv_readers" => once(&mut num_kv_readers, "num_kv_readers", r.integer()),
                    _ => r.skip().map(drop),
                }?;
            }
            Ok(Self {
                key: Key {
                    model_name: required(model_name, "model_name")?,
                    world_size: required(world_size, "world_size")?,
                    worker_id: required(worker_id, "worker_id")?,
                    token_ids: required(token_ids, "token_ids")?,
                    start: required(start, "start")?,
                    end: required(end, "end")?,
                    request_id: required(request_id, "request_id")?,
                    cache_salt: cache_salt.unwrap_or_default(),
                    num_kv_readers: num_kv_readers.unwrap_or_default(),
                },
                configs: configs.flatten().map(|map| bytes.slice_ref(map)),
            })
        })
    }

    fn encode(&self, dialect: Dialect) -> Bytes {
        let Key { model_name, world_size, worker_id, token_ids, start, end, .. } = &self.key;
        one(|w| {
            w.map(if dialect == Dialect::Current { 10 } else { 8 });
            w.str("model_name");
            w.str(model_name);
            w.str("world_size");
            w.uint(*world_size);
            w.str("worker_id");
            w.uint_or_nil(*worker_id);
            w.str("token_ids");
            w.uints(token_ids);
            w.str("start");
            w.uint(*start);
            w.str("end");
            w.uint(*end);
            w.str("request_id");
            w.str(&self.key.request_id);
            w.str("cache_salt");
            w.str(&self.key.cache_salt);
            if dialect == Dialect::Current {
                w.str("request_configs");
                match &self.configs {
                    Some(map) => w.raw(map),
                    None => w.nil(),
                }
                w.str("num_kv_readers");
                w.uint(self.key.num_kv_readers);
            }
        })
    }
}

/// One request's newly allocated blocks, as vLLM's scheduler reports them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockAllocation {
    /// The engine's request.
    pub request_id: String,
    /// The engine's block ids.
    pub new_block_ids: Vec<u64>,
    /// The tokens that the blocks hold.
    pub new_token_ids: Vec<u32>,
}

/// A request: the operation with its parameters. Field names are LMCache's.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of the operation; see `Key` and `Layout`")]
pub enum Request {
    /// Answer: [`Reply::None`], as soon as the lookup has begun. `key.num_kv_readers` of 0 was not
    /// sent: it counts as max(1, `tp_size`).
    Lookup { key: RequestKey, tp_size: u64 },
    /// Answer: [`Reply::Integer`], the leading chunks that every rank has; [`Reply::None`] while the
    /// lookup runs. A count is given once, then and for unknown requests it is 0.
    QueryPrefetchStatus { request_id: String },
    /// As [`Request::QueryPrefetchStatus`], after at most `timeout_s` seconds.
    WaitPrefetchStatus { request_id: String, timeout_s: f64 },
    /// Answer: [`Reply::None`].
    FreeLookupLocks { key: RequestKey, tp_size: u64 },
    /// Answer: [`Reply::None`].
    EndSession { request_id: String },
    /// Answer: [`Reply::Registered`].
    Register { instance_id: u64, layout: Layout },
    /// Answer: [`Reply::None`].
    Unregister { instance_id: u64 },
    /// Answer: [`Reply::StoreSlots`], always.
    PrepareStore { key: RequestKey, instance_id: u64 },
    /// Answer: [`Reply::Boolean`].
    CommitStore { key: RequestKey, instance_id: u64 },
    /// Answer: [`Reply::RetrieveSlots`].
    PrepareRetrieve { key: RequestKey, instance_id: u64 },
    /// Answer: [`Reply::Boolean`].
    CommitRetrieve { key: RequestKey, instance_id: u64 },
    /// Answer: [`Reply::None`].
    Clear { force: bool },
    /// Answer: [`Reply::Integer`].
    GetChunkSize,
    /// Answer: [`Reply::Boolean`]. Schedulers have no instance.
    Ping { instance_id: Option<u64> },
    /// Answer: [`Reply::None`].
    ReportBlockAllocation { instance_id: u64, model_name: String, records: Vec<BlockAllocation> },
    /// Answer: [`Reply::Text`], "OK".
    Noop,
    /// Answer: [`Reply::Names`]; [`EXTENSION`] among them announces the operations below.
    GetExperimental,
    /// Answer: [`Reply::Hello`].
    Hello,
    /// Answer: [`Reply::None`].
    AbandonStore { key: RequestKey, instance_id: u64 },
    /// Answer: [`Reply::Boolean`], whether each slot still holds its generation. The lists have the
    /// same length.
    Confirm { instance_id: u64, offsets: Vec<u64>, generations: Vec<u64> },
    /// Answer: [`Reply::Status`].
    Status,
}

impl Request {
    /// The operation.
    pub const fn operation(&self) -> Operation {
        match self {
            Self::Lookup { .. } => Operation::Lookup,
            Self::QueryPrefetchStatus { .. } => Operation::QueryPrefetchStatus,
            Self::WaitPrefetchStatus { .. } => Operation::WaitPrefetchStatus,
            Self::FreeLookupLocks { .. } => Operation::FreeLookupLocks,
            Self::EndSession { .. } => Operation::EndSession,
            Self::Register { .. } => Operation::Register,
            Self::Unregister { .. } => Operation::Unregister,
            Self::PrepareStore { .. } => Operation::PrepareStore,
            Self::CommitStore { .. } => Operation::CommitStore,
            Self::PrepareRetrieve { .. } => Operation::PrepareRetrieve,
            Self::CommitRetrieve { .. } => Operation::CommitRetrieve,
            Self::Clear { .. } => Operation::Clear,
            Self::GetChunkSize => Operation::GetChunkSize,
            Self::Ping { .. } => Operation::Ping,
            Self::ReportBlockAllocation { .. } => Operation::ReportBlockAllocation,
            Self::Noop => Operation::Noop,
            Self::GetExperimental => Operation::GetExperimental,
            Self::Hello => Operation::Hello,
            Self::AbandonStore { .. } => Operation::AbandonStore,
            Self::Confirm { .. } => Operation::Confirm,
            Self::Status => Operation::Status,
        }
    }

    /// Decodes the frames after a request's header. Whatever does not follow the grammar to the last
    /// byte is an error that names the parameter.
    pub fn decode(operation: Operation, payload: &[Bytes]) -> Result<Self, MessageError> {
        let mut p = Payload { operation, frames: payload, taken: 0 };
        let request = match operation {
            Operation::Lookup => Self::Lookup { key: p.key()?, tp_size: p.uint("tp_size")? },
            Operation::QueryPrefetchStatus => {
                Self::QueryPrefetchStatus { request_id: p.next("request_id", Reader::string)? }
            }
            Operation::WaitPrefetchStatus => Self::WaitPrefetchStatus {
                request_id: p.next("request_id", Reader::string)?,
                timeout_s: p.next("timeout", Reader::float)?,
            },
            Operation::FreeLookupLocks => {
                Self::FreeLookupLocks { key: p.key()?, tp_size: p.uint("tp_size")? }
            }
            Operation::EndSession => {
                Self::EndSession { request_id: p.next("request_id", Reader::string)? }
            }
            Operation::Register => {
                let (instance_id, layout) = p.next("payload", decode_registration)?;
                Self::Register { instance_id, layout }
            }
            Operation::Unregister => Self::Unregister { instance_id: p.uint("instance_id")? },
            Operation::PrepareStore => {
                Self::PrepareStore { key: p.key()?, instance_id: p.uint("instance_id")? }
            }
            Operation::CommitStore => {
                let request =
                    Self::CommitStore { key: p.key()?, instance_id: p.uint("instance_id")? };
                p.no_data()?;
                request
            }
            Operation::PrepareRetrieve => {
                Self::PrepareRetrieve { key: p.key()?, instance_id: p.uint("instance_id")? }
            }
            Operation::CommitRetrieve => {
                Self::CommitRetrieve { key: p.key()?, instance_id: p.uint("instance_id")? }
            }
            Operation::Clear => Self::Clear { force: p.next("force", Reader::coerced_bool)? },
            Operation::GetChunkSize => Self::GetChunkSize,
            Operation::Ping => {
                Self::Ping { instance_id: p.next("instance_id", Reader::integer_or_nil)? }
            }
            Operation::ReportBlockAllocation => Self::ReportBlockAllocation {
                instance_id: p.uint("instance_id")?,
                model_name: p.next("model_name", Reader::string)?,
                records: p.next("records", |r| {
                    r.list(BLOCK_ALLOCATION_BYTES_MIN, BlockAllocation::decode)
                })?,
            },
            Operation::Noop => Self::Noop,
            Operation::GetExperimental => Self::GetExperimental,
            Operation::Hello => Self::Hello,
            Operation::AbandonStore => {
                Self::AbandonStore { key: p.key()?, instance_id: p.uint("instance_id")? }
            }
            Operation::Confirm => {
                let instance_id = p.uint("instance_id")?;
                let offsets: Vec<u64> = p.next("offsets", Reader::integers)?;
                let generations = p.next("generations", |r| {
                    let generations: Vec<u64> = r.integers()?;
                    if generations.len() == offsets.len() {
                        Ok(generations)
                    } else {
                        Err(Problem::Inconsistent("each offset has one generation").into())
                    }
                })?;
                Self::Confirm { instance_id, offsets, generations }
            }
            Operation::Status => Self::Status,
        };
        p.end()?;
        Ok(request)
    }

    /// The message, with `uid` as its first frame. Operations of LMCache go by id, ours by name.
    pub fn encode(&self, uid: u64, dialect: Dialect) -> Vec<Bytes> {
        let mut frames = vec![one(|w| w.uint(uid)), encode_operation(self.operation())];
        match self {
            Self::Lookup { key, tp_size: number }
            | Self::FreeLookupLocks { key, tp_size: number } => {
                frames.extend([key.encode(dialect), one(|w| w.uint(*number))]);
            }
            Self::PrepareStore { key, instance_id }
            | Self::PrepareRetrieve { key, instance_id }
            | Self::CommitRetrieve { key, instance_id }
            | Self::AbandonStore { key, instance_id } => {
                frames.extend([key.encode(dialect), one(|w| w.uint(*instance_id))]);
            }
            Self::CommitStore { key, instance_id } => frames.extend([
                key.encode(dialect),
                one(|w| w.uint(*instance_id)),
                one(|w| w.bytes(&[])),
            ]),
            Self::QueryPrefetchStatus { request_id } | Self::EndSession { request_id } => {
                frames.push(one(|w| w.str(request_id)));
            }
            Self::WaitPrefetchStatus { request_id, timeout_s } => {
                frames.extend([one(|w| w.str(request_id)), one(|w| w.float(*timeout_s))]);
            }
            Self::Register { instance_id, layout } => {
                frames.push(encode_registration(*instance_id, layout, dialect));
            }
            Self::Unregister { instance_id } => frames.push(one(|w| w.uint(*instance_id))),
            Self::Clear { force } => frames.push(one(|w| w.boolean(*force))),
            Self::Ping { instance_id } => frames.push(one(|w| w.uint_or_nil(*instance_id))),
            Self::ReportBlockAllocation { instance_id, model_name, records } => frames.extend([
                one(|w| w.uint(*instance_id)),
                one(|w| w.str(model_name)),
                one(|w| {
                    w.array(records.len());
                    records.iter().for_each(|record| record.encode(w));
                }),
            ]),
            Self::Confirm { instance_id, offsets, generations } => frames.extend([
                one(|w| w.uint(*instance_id)),
                one(|w| w.uints(offsets)),
                one(|w| w.uints(generations)),
            ]),
            Self::GetChunkSize
            | Self::Noop
            | Self::GetExperimental
            | Self::Hello
            | Self::Status => {}
        }
        frames
    }
}

/// A record of three entries with the shortest values; bounds what a list of them reserves.
const BLOCK_ALLOCATION_BYTES_MIN: usize = 41;

impl BlockAllocation {
    fn decode(r: &mut Reader<'_>) -> Result<Self> {
        let mut request_id = None;
        let mut new_block_ids = None;
        let mut new_token_ids = None;
        for _ in 0..r.map_len()? {
            match r.str()? {
                "req_id" => once(&mut request_id, "req_id", r.string()),
                "new_block_ids" => once(&mut new_block_ids, "new_block_ids", r.integers()),
                "new_token_ids" => once(&mut new_token_ids, "new_token_ids", r.integers()),
                _ => r.skip().map(drop),
            }?;
        }
        Ok(Self {
            request_id: required(request_id, "req_id")?,
            new_block_ids: required(new_block_ids, "new_block_ids")?,
            new_token_ids: required(new_token_ids, "new_token_ids")?,
        })
    }

    fn encode(&self, w: &mut Writer) {
        w.map(3);
        w.str("req_id");
        w.str(&self.request_id);
        w.str("new_block_ids");
        w.uints(&self.new_block_ids);
        w.str("new_token_ids");
        w.uints(&self.new_token_ids);
    }
}

fn decode_registration(r: &mut Reader<'_>) -> Result<(u64, Layout)> {
    let mut instance_id = None;
    let mut model_name = None;
    let mut world_size = None;
    let mut block_size = None;
    let mut num_layers = None;
    let mut hidden_dim_size = None;
    let mut dtype = None;
    let mut single_plane = None;
    let mut num_physical_slots = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "instance_id" => once(&mut instance_id, "instance_id", r.integer()),
            "model_name" => once(&mut model_name, "model_name", r.string()),
            "world_size" => once(&mut world_size, "world_size", r.integer()),
            "block_size" => once(&mut block_size, "block_size", r.integer()),
            "num_layers" => once(&mut num_layers, "num_layers", r.integer()),
            "hidden_dim_size" => once(&mut hidden_dim_size, "hidden_dim_size", r.integer()),
            "dtype_str" => once(&mut dtype, "dtype_str", decode_dtype(r)),
            "use_mla" => once(&mut single_plane, "use_mla", r.boolean()),
            "num_physical_slots" => {
                once(&mut num_physical_slots, "num_physical_slots", r.integer_or_nil())
            }
            _ => r.skip().map(drop),
        }?;
    }
    let layout = Layout {
        model_name: required(model_name, "model_name")?,
        world_size: required(world_size, "world_size")?,
        block_size: required(block_size, "block_size")?,
        num_layers: required(num_layers, "num_layers")?,
        hidden_dim_size: required(hidden_dim_size, "hidden_dim_size")?,
        dtype: required(dtype, "dtype_str")?,
        single_plane: required(single_plane, "use_mla")?,
        num_physical_slots: num_physical_slots.flatten(),
    };
    Ok((required(instance_id, "instance_id")?, layout))
}

fn decode_dtype(r: &mut Reader<'_>) -> Result<Dtype> {
    // No name of an element type is longer; what is refused is quoted in the error.
    const LENGTH_MAX: usize = 32;
    Some(r.str()?)
        .filter(|name| name.len() <= LENGTH_MAX)
        .and_then(|name| Dtype::new(name).ok())
        .ok_or(Problem::Dtype.into())
}

fn encode_registration(instance_id: u64, layout: &Layout, dialect: Dialect) -> Bytes {
    one(|w| {
        w.map(if dialect == Dialect::Current { 9 } else { 8 });
        w.str("instance_id");
        w.uint(instance_id);
        w.str("model_name");
        w.str(&layout.model_name);
        w.str("world_size");
        w.uint(layout.world_size);
        w.str("block_size");
        w.uint(layout.block_size);
        w.str("num_layers");
        w.uint(layout.num_layers);
        w.str("hidden_dim_size");
        w.uint(layout.hidden_dim_size);
        w.str("dtype_str");
        w.str(layout.dtype.name());
        w.str("use_mla");
        w.boolean(layout.single_plane);
        if dialect == Dialect::Current {
            w.str("num_physical_slots");
            w.uint_or_nil(layout.num_physical_slots);
        }
    })
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

    fn key(&mut self) -> Result<RequestKey, MessageError> {
        let key = RequestKey::decode(self.frame()?);
        self.within("key", key)
    }

    fn no_data(&mut self) -> Result<(), MessageError> {
        let data = self.next("data", Reader::bytes)?;
        refuse_data(self.operation, data)
    }
}

/// Data inside a message is a pickle in LMCache (`0x80`, then the pickle protocol's number). Nothing of
/// the kind is accepted; shared memory carries the data.
fn refuse_data(operation: Operation, data: &[u8]) -> Result<(), MessageError> {
    match data {
        [] => Ok(()),
        [0x80, 2..=5, ..] => Err(MessageError::Pickle(operation)),
        _ => Err(MessageError::Data(operation, data.len())),
    }
}

/// A result. Which one answers which operation, [`Request`] says.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// No result: the message has two frames.
    None,
    /// A count.
    Integer(u64),
    /// Yes or no.
    Boolean(bool),
    /// A word.
    Text(String),
    /// A list of words.
    Names(Vec<String>),
    /// The pool to map.
    Registered {
        /// The segment's name without a leading slash; empty when the server offers no shared memory.
        shm_name: String,
        /// Bytes.
        pool_size: u64,
    },
    /// What `prepare_store` grants. `None`: the server wants pickles, so kvferry cannot store.
    StoreSlots(Option<StoreSlots>),
    /// What `prepare_retrieve` grants. `None`: not all chunks are there and leased.
    RetrieveSlots(Option<Slots>),
    /// Who the server is.
    Hello(Hello),
    /// Counters and settings, by name.
    Status(Vec<(String, Value)>),
}

/// Slots of one layout.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Slots {
    /// Where they lie. The generations are sent when every slot has one; they are only for
    /// connections that said [`Request::Hello`], see [`Reply::plain`].
    pub slots: Vec<Slot>,
    /// The shape of each object, [`Layout::shape`]; empty without slots.
    pub shape: Vec<u64>,
    /// The element type's name; empty without slots.
    pub dtype: String,
}

/// Slots to write.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoreSlots {
    /// One for each chunk to write; none means that there is nothing to do, and nothing to commit.
    pub slots: Slots,
    /// The chunk of each slot, counted from the range's start.
    pub chunk_indices: Vec<u32>,
    /// Chunks at the range's end that did not fit; only for connections that said
    /// [`Request::Hello`].
    pub refused: Option<u32>,
}

/// Who a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Random at each start of the server.
    pub boot_token: [u8; 16],
    /// kvferry's version.
    pub version: String,
    /// The server's process.
    pub pid: u32,
}

/// A value of [`Reply::Status`].
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A count.
    Integer(i64),
    /// A measure.
    Float(f64),
    /// A word.
    Text(String),
}

impl Reply {
    /// The same without generations and refusals: what a connection gets that has not said hello.
    #[must_use]
    pub fn plain(mut self) -> Self {
        let slots = match &mut self {
            Self::StoreSlots(Some(store)) => {
                store.refused = None;
                &mut store.slots
            }
            Self::RetrieveSlots(Some(slots)) => slots,
            _ => return self,
        };
        slots.slots.iter_mut().for_each(|slot| slot.generation = None);
        self
    }

    /// The frame after the header; `None` when there is none.
    pub fn encode(&self) -> Option<Bytes> {
        if *self == Self::None {
            return None;
        }
        Some(one(|w| match self {
            Self::None => {}
            Self::Integer(value) => w.uint(*value),
            Self::Boolean(value) => w.boolean(*value),
            Self::Text(value) => w.str(value),
            Self::Names(names) => {
                w.array(names.len());
                names.iter().for_each(|name| w.str(name));
            }
            Self::Registered { shm_name, pool_size } => {
                w.map(2);
                w.str("shm_name");
                w.str(shm_name);
                w.str("pool_size");
                w.uint(*pool_size);
            }
            Self::StoreSlots(store) => {
                w.map(1);
                w.str("context");
                match store {
                    None => w.map(0),
                    Some(store) => store.encode(w),
                }
            }
            Self::RetrieveSlots(slots) => {
                w.map(3);
                w.str("success");
                w.boolean(slots.is_some());
                w.str("data");
                w.bytes(&[]);
                w.str("context");
                match slots {
                    None => w.map(0),
                    Some(slots) => {
                        let generations = slots.generations();
                        w.map(1 + usize::from(generations.is_some()));
                        slots.encode(w);
                        encode_generations(generations.as_deref(), w);
                    }
                }
            }
            Self::Hello(hello) => {
                w.map(3);
                w.str("boot_token");
                w.bytes(&hello.boot_token);
                w.str("version");
                w.str(&hello.version);
                w.str("pid");
                w.uint(hello.pid);
            }
            Self::Status(entries) => {
                w.map(entries.len());
                for (name, value) in entries {
                    w.str(name);
                    match value {
                        Value::Integer(value) => w.int(*value),
                        Value::Float(value) => w.float(*value),
                        Value::Text(value) => w.str(value),
                    }
                }
            }
        }))
    }

    /// Decodes the frames after a reply's header.
    pub fn decode(operation: Operation, payload: &[Bytes]) -> Result<Self, MessageError> {
        let mut p = Payload { operation, frames: payload, taken: 0 };
        let reply = match operation {
            Operation::Lookup
            | Operation::FreeLookupLocks
            | Operation::EndSession
            | Operation::Unregister
            | Operation::Clear
            | Operation::ReportBlockAllocation
            | Operation::AbandonStore => Self::None,
            Operation::QueryPrefetchStatus | Operation::WaitPrefetchStatus
                if payload.is_empty() =>
            {
                Self::None
            }
            Operation::QueryPrefetchStatus
            | Operation::WaitPrefetchStatus
            | Operation::GetChunkSize => Self::Integer(p.uint("result")?),
            Operation::CommitStore
            | Operation::CommitRetrieve
            | Operation::Ping
            | Operation::Confirm => Self::Boolean(p.next("result", Reader::coerced_bool)?),
            Operation::Noop => Self::Text(p.next("result", Reader::string)?),
            Operation::GetExperimental => {
                Self::Names(p.next("result", |r| r.short_list(Reader::string))?)
            }
            Operation::Register => p.next("result", decode_registered)?,
            Operation::PrepareStore => Self::StoreSlots(p.next("result", StoreSlots::decode)?),
            Operation::PrepareRetrieve => Self::RetrieveSlots(p.retrieve_slots()?),
            Operation::Hello => Self::Hello(p.next("result", Hello::decode)?),
            Operation::Status => Self::Status(p.next("result", decode_status)?),
        };
        p.end()?;
        Ok(reply)
    }
}

impl Payload<'_> {
    fn retrieve_slots(&mut self) -> Result<Option<Slots>, MessageError> {
        let (success, data, context) = self.next("result", |r| {
            let mut success = None;
            let mut data = None;
            let mut context = None;
            for _ in 0..r.map_len()? {
                match r.str()? {
                    "success" => once(&mut success, "success", r.boolean()),
                    "data" => once(&mut data, "data", r.bytes()),
                    "context" => once(&mut context, "context", Context::decode(r)),
                    _ => r.skip().map(drop),
                }?;
            }
            Ok((
                required(success, "success")?,
                data.unwrap_or_default(),
                context.unwrap_or_default(),
            ))
        })?;
        refuse_data(self.operation, data)?;
        match success {
            false => Ok(None),
            true => self.within("context", required(context.slots, "slots")).map(Some),
        }
    }
}

fn decode_registered(r: &mut Reader<'_>) -> Result<Reply> {
    let mut shm_name = None;
    let mut pool_size = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "shm_name" => once(&mut shm_name, "shm_name", r.string()),
            "pool_size" => once(&mut pool_size, "pool_size", r.integer()),
            _ => r.skip().map(drop),
        }?;
    }
    Ok(Reply::Registered {
        shm_name: shm_name.unwrap_or_default(),
        pool_size: pool_size.unwrap_or_default(),
    })
}

/// The `context` of a prepare reply.
#[derive(Default)]
struct Context {
    slots: Option<Slots>,
    chunk_indices: Option<Vec<u32>>,
    refused: Option<u32>,
}

impl Context {
    fn decode(r: &mut Reader<'_>) -> Result<Self> {
        let mut slots: Option<Slots> = None;
        let mut chunk_indices: Option<Vec<u32>> = None;
        let mut generations: Option<Vec<u64>> = None;
        let mut refused = None;
        for _ in 0..r.map_len()? {
            match r.str()? {
                "slots" => once(&mut slots, "slots", Slots::decode(r)),
                "chunk_indices" => once(&mut chunk_indices, "chunk_indices", r.integers()),
                "generations" => once(&mut generations, "generations", r.integers()),
                "refused" => once(&mut refused, "refused", r.integer()),
                _ => r.skip().map(drop),
            }?;
        }
        let count = slots.as_ref().map_or(0, |slots| slots.slots.len());
        if chunk_indices.as_ref().is_some_and(|indices| indices.len() != count) {
            return Err(Problem::Inconsistent("each slot has one chunk index").into());
        }
        if let Some(generations) = generations {
            if generations.len() != count {
                return Err(Problem::Inconsistent("each slot has one generation").into());
            }
            let slots = slots.iter_mut().flat_map(|slots| &mut slots.slots);
            slots
                .zip(generations)
                .for_each(|(slot, generation)| slot.generation = Some(generation));
        }
        Ok(Self { slots, chunk_indices, refused })
    }
}

/// A slot of four entries with the shortest values; bounds what a list of them reserves.
const SLOT_BYTES_MIN: usize = 31;

impl Slots {
    fn decode(r: &mut Reader<'_>) -> Result<Self> {
        let mut shape = Vec::new();
        let mut dtype = "";
        let mut first = true;
        let slots = r.list(SLOT_BYTES_MIN, |r| {
            let (slot, slot_shape, slot_dtype) = decode_slot(r)?;
            if std::mem::take(&mut first) {
                (shape, dtype) = (slot_shape, slot_dtype);
            } else if shape != slot_shape || dtype != slot_dtype {
                return Err(Problem::Inconsistent("the slots of a reply have one layout").into());
            }
            Ok(slot)
        })?;
        Ok(Self { slots, shape, dtype: dtype.to_owned() })
    }

    fn generations(&self) -> Option<Vec<u64>> {
        let generations: Option<Vec<u64>> = self.slots.iter().map(|slot| slot.generation).collect();
        generations.filter(|generations| !generations.is_empty())
    }

    fn encode(&self, w: &mut Writer) {
        w.str("slots");
        w.array(self.slots.len());
        for slot in &self.slots {
            w.map(4);
            w.str("offset");
            w.uint(slot.offset);
            w.str("length");
            w.uint(slot.length);
            w.str("shape");
            w.uints(&self.shape);
            w.str("dtype");
            w.str(&self.dtype);
        }
    }
}

fn decode_slot<'a>(r: &mut Reader<'a>) -> Result<(Slot, Vec<u64>, &'a str)> {
    let mut offset = None;
    let mut length = None;
    let mut shape = None;
    let mut dtype = None;
    for _ in 0..r.map_len()? {
        match r.str()? {
            "offset" => once(&mut offset, "offset", r.integer()),
            "length" => once(&mut length, "length", r.integer()),
            "shape" => once(&mut shape, "shape", r.integers()),
            "dtype" => once(&mut dtype, "dtype", r.str()),
            _ => r.skip().map(drop),
        }?;
    }
    let slot = Slot {
        offset: required(offset, "offset")?,
        length: required(length, "length")?,
        generation: None,
    };
    Ok((slot, required(shape, "shape")?, required(dtype, "dtype")?))
}

fn encode_generations(generations: Option<&[u64]>, w: &mut Writer) {
    if let Some(generations) = generations {
        w.str("generations");
        w.uints(generations);
    }
}

impl StoreSlots {
    fn decode(r: &mut Reader<'_>) -> Result<Option<Self>> {
        let mut context = None;
        for _ in 0..r.map_len()? {
            match r.str()? {
                "context" => once(&mut context, "context", Context::decode(r)),
                _ => r.skip().map(drop),
            }?;
        }
        let Context { slots, chunk_indices, refused } = context.unwrap_or_default();
        let Some(slots) = slots else { return Ok(None) };
        let chunk_indices = required(chunk_indices, "chunk_indices")?;
        Ok(Some(Self { slots, chunk_indices, refused }))
    }

    fn encode(&self, w: &mut Writer) {
        let generations = self.slots.generations();
        w.map(2 + usize::from(generations.is_some()) + usize::from(self.refused.is_some()));
        self.slots.encode(w);
        w.str("chunk_indices");
        w.uints(&self.chunk_indices);
        encode_generations(generations.as_deref(), w);
        if let Some(refused) = self.refused {
            w.str("refused");
            w.uint(refused);
        }
    }
}

impl Hello {
    fn decode(r: &mut Reader<'_>) -> Result<Self> {
        let mut boot_token = None;
        let mut version = None;
        let mut pid = None;
        for _ in 0..r.map_len()? {
            match r.str()? {
                "boot_token" => once(&mut boot_token, "boot_token", decode_boot_token(r)),
                "version" => once(&mut version, "version", r.string()),
                "pid" => once(&mut pid, "pid", r.integer()),
                _ => r.skip().map(drop),
            }?;
        }
        Ok(Self {
            boot_token: required(boot_token, "boot_token")?,
            version: required(version, "version")?,
            pid: required(pid, "pid")?,
        })
    }
}

fn decode_boot_token(r: &mut Reader<'_>) -> Result<[u8; 16]> {
    let token = r.bytes()?.try_into();
    token.map_err(|_| Problem::Inconsistent("a boot token has 16 bytes").into())
}

fn decode_status(r: &mut Reader<'_>) -> Result<Vec<(String, Value)>> {
    r.short_map(|r| {
        let name = r.string()?;
        let value = match r.kind() {
            Kind::String => Value::Text(r.string()?),
            Kind::Float => Value::Float(r.float()?),
            Kind::Other => Value::Integer(r.integer()?),
        };
        Ok((name, value))
    })
}
