//! Requests: operations with their parameters.

use bytes::Bytes;
use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_core::kv_descriptors::KvRegistration;

use super::{MessageError, Payload, Piece, encode_operation, lmcache_driven, one, refuse_data};
use crate::messagepack::{Problem, Reader, Result, Writer, frame, once, required};
use crate::operation::{Dialect, Operation};

/// A key with what LMCache sends beside it.
#[derive(Debug, Clone)]
pub struct RequestKey {
    /// The key.
    pub key: Key,
    /// LMCache's `request_configs`: opaque MessagePack (a map), not part of any identity. `None` is
    /// nil.
    pub configs: Option<Bytes>,
    /// As it is sent, if it was made here: requests of the same key share it.
    frame: Option<Bytes>,
}

impl PartialEq for RequestKey {
    fn eq(&self, other: &Self) -> bool {
        (&self.key, &self.configs) == (&other.key, &other.configs)
    }
}

impl Eq for RequestKey {}

impl From<Key> for RequestKey {
    fn from(key: Key) -> Self {
        let mut this = Self { key, configs: None, frame: None };
        this.frame = Some(this.encode());
        this
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
                frame: None,
            })
        })
    }

    fn encode(&self) -> Bytes {
        if let Some(frame) = &self.frame {
            return frame.clone();
        }
        let Key { model_name, world_size, worker_id, token_ids, start, end, .. } = &self.key;
        one(|w| {
            w.map(10);
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
            w.str("request_configs");
            match &self.configs {
                Some(map) => w.raw(map),
                None => w.nil(),
            }
            w.str("num_kv_readers");
            w.uint(self.key.num_kv_readers);
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

/// A request: the operation with its parameters. Field names are LMCache's; answers are variants of
/// [`Reply`](super::Reply).
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of the operation; see `Key` and `Layout`")]
pub enum Request {
    /// Answer: `Reply::None`, as soon as the lookup has begun. `key.num_kv_readers` of 0 was not
    /// sent: it counts as max(1, `tp_size`).
    Lookup { key: RequestKey, tp_size: u64 },
    /// Answer: `Reply::Integer`, the leading chunks that every rank has; `Reply::None` while the
    /// lookup runs. A count is given once, then and for unknown requests it is 0.
    QueryPrefetchStatus { request_id: String },
    /// As [`Request::QueryPrefetchStatus`], after at most `timeout_s` seconds.
    WaitPrefetchStatus { request_id: String, timeout_s: f64 },
    /// Answer: `Reply::None`.
    FreeLookupLocks { key: RequestKey, tp_size: u64 },
    /// Answer: `Reply::None`.
    EndSession { request_id: String },
    /// Answer: `Reply::Registered`.
    Register { instance_id: u64, layout: Layout },
    /// Answer: `Reply::None`.
    Unregister { instance_id: u64 },
    /// Answer: `Reply::StoreSlots`, always.
    PrepareStore { key: RequestKey, instance_id: u64 },
    /// Answer: `Reply::Boolean`.
    CommitStore { key: RequestKey, instance_id: u64 },
    /// Answer: `Reply::RetrieveSlots`.
    PrepareRetrieve { key: RequestKey, instance_id: u64 },
    /// Answer: `Reply::Boolean`.
    CommitRetrieve { key: RequestKey, instance_id: u64 },
    /// Answer: `Reply::None`.
    Clear { force: bool },
    /// Answer: `Reply::Integer`.
    GetChunkSize,
    /// Answer: `Reply::Boolean`. Schedulers have no instance.
    Ping { instance_id: Option<u64> },
    /// Answer: `Reply::None`.
    RegisterKvCache { instance_id: u64, registration: KvRegistration },
    /// Answer: `Reply::None`.
    UnregisterKvCache { instance_id: u64 },
    /// Answer: `Reply::Copied`, always. The blocks of each group of layers, and LMCache's handle of an event that the
    /// server waits for before it reads them.
    Store { key: RequestKey, instance_id: u64, block_ids: Vec<Vec<u32>>, event: Box<[u8]> },
    /// Answer: `Reply::Copied`, always. As [`Request::Store`].
    Retrieve {
        key: RequestKey,
        instance_id: u64,
        block_ids: Vec<Vec<u32>>,
        event: Box<[u8]>,
        skip_first_n_tokens: u64,
    },
    /// Answer: `Reply::None`.
    ReportBlockAllocation { instance_id: u64, model_name: String, records: Vec<BlockAllocation> },
    /// Answer: `Reply::Text`, "OK".
    Noop,
    /// Answer: `Reply::Names`; [`EXTENSION`](super::EXTENSION) among them announces the operations
    /// below.
    GetExperimental,
    /// Answers: a `Reply::KvEvents` at once, and one more for each [`Control::Ack`](super::Control::Ack) when there is
    /// something new; `Reply::None` ends the stream. Events of the sequences after `cursor`, at most `max_events` at once.
    SubscribeKvEvents { instance_id: u64, model_name: String, cursor: u64, max_events: u64 },
    /// Answer: `Reply::Hello`.
    Hello,
    /// Answer: `Reply::None`.
    AbandonStore { key: RequestKey, instance_id: u64 },
    /// Answer: `Reply::Boolean`, whether each slot still holds its generation. The lists have the
    /// same length.
    Confirm { instance_id: u64, offsets: Vec<u64>, generations: Vec<u64> },
    /// Answer: `Reply::Integer`, how many objects were dropped: those whose slots still hold their
    /// generation. The lists have the same length.
    Discard { instance_id: u64, offsets: Vec<u64>, generations: Vec<u64> },
    /// Answer: `Reply::Integer`, how many checksums (CRC-64/NVME) are kept: those of slots that the
    /// instance has reserved, in the use that the generation counts, and has not committed. The lists
    /// have the same length.
    Checksums { instance_id: u64, offsets: Vec<u64>, generations: Vec<u64>, checksums: Vec<u64> },
    /// Answer: `Reply::None`.
    Frames,
    /// Answer: `Reply::Boolean`, whether the bytes are in the slot, from its byte `at` on: the instance has reserved it,
    /// in the use that the generation counts, and has not committed it.
    Write { instance_id: u64, offset: u64, generation: u64, at: u64, piece: Piece },
    /// Answer: `Reply::Piece`, of the slot's bytes from `at` on; none when it does not hold the generation any more, or was
    /// not granted to this connection.
    Read { instance_id: u64, offset: u64, generation: u64, at: u64, bytes: u64 },
    /// Answer: `Reply::Status`.
    Status,
    /// Answer: `Reply::Events`, at most `max` from the one of sequence `cursor` on; 0 is the oldest.
    Events { cursor: u64, max: u32 },
    /// Answer: `Reply::Explanation`, for all ranks.
    Explain { key: RequestKey },
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
            Self::RegisterKvCache { .. } => Operation::RegisterKvCache,
            Self::UnregisterKvCache { .. } => Operation::UnregisterKvCache,
            Self::Store { .. } => Operation::Store,
            Self::Retrieve { .. } => Operation::Retrieve,
            Self::ReportBlockAllocation { .. } => Operation::ReportBlockAllocation,
            Self::Noop => Operation::Noop,
            Self::GetExperimental => Operation::GetExperimental,
            Self::SubscribeKvEvents { .. } => Operation::SubscribeKvEvents,
            Self::Hello => Operation::Hello,
            Self::AbandonStore { .. } => Operation::AbandonStore,
            Self::Confirm { .. } => Operation::Confirm,
            Self::Discard { .. } => Operation::Discard,
            Self::Checksums { .. } => Operation::Checksums,
            Self::Frames => Operation::Frames,
            Self::Write { .. } => Operation::Write,
            Self::Read { .. } => Operation::Read,
            Self::Status => Operation::Status,
            Self::Events { .. } => Operation::Events,
            Self::Explain { .. } => Operation::Explain,
        }
    }

    /// Decodes the frames after a request's header. Whatever does not follow the grammar to the
    /// last byte is an error that names the parameter.
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
            Operation::Unregister => Self::Unregister { instance_id: p.instance_id()? },
            Operation::PrepareStore => {
                Self::PrepareStore { key: p.key()?, instance_id: p.instance_id()? }
            }
            Operation::CommitStore => {
                let request = Self::CommitStore { key: p.key()?, instance_id: p.instance_id()? };
                p.no_data()?;
                request
            }
            Operation::PrepareRetrieve => {
                Self::PrepareRetrieve { key: p.key()?, instance_id: p.instance_id()? }
            }
            Operation::CommitRetrieve => {
                Self::CommitRetrieve { key: p.key()?, instance_id: p.instance_id()? }
            }
            Operation::Clear => Self::Clear { force: p.next("force", Reader::coerced_bool)? },
            Operation::GetChunkSize => Self::GetChunkSize,
            Operation::Ping => {
                Self::Ping { instance_id: p.next("instance_id", Reader::integer_or_nil)? }
            }
            Operation::RegisterKvCache => Self::RegisterKvCache {
                instance_id: p.instance_id()?,
                registration: lmcache_driven::registration(&mut p)?,
            },
            Operation::UnregisterKvCache => {
                Self::UnregisterKvCache { instance_id: p.instance_id()? }
            }
            Operation::Store => Self::Store {
                key: p.key()?,
                instance_id: p.instance_id()?,
                block_ids: p.next("block_ids", lmcache_driven::block_ids)?,
                event: lmcache_driven::event(&mut p)?,
            },
            Operation::Retrieve => Self::Retrieve {
                key: p.key()?,
                instance_id: p.instance_id()?,
                block_ids: p.next("block_ids", lmcache_driven::block_ids)?,
                event: lmcache_driven::event(&mut p)?,
                skip_first_n_tokens: p.uint("skip_first_n_tokens")?,
            },
            Operation::ReportBlockAllocation => Self::ReportBlockAllocation {
                instance_id: p.instance_id()?,
                model_name: p.next("model_name", Reader::string)?,
                records: p.next("records", |r| {
                    r.list(BLOCK_ALLOCATION_BYTES_MIN, BlockAllocation::decode)
                })?,
            },
            Operation::Noop => Self::Noop,
            Operation::GetExperimental => Self::GetExperimental,
            Operation::SubscribeKvEvents => Self::SubscribeKvEvents {
                instance_id: p.instance_id()?,
                model_name: p.next("model_name", Reader::string)?,
                cursor: p.uint("cursor")?,
                max_events: p.uint("max_events")?,
            },
            Operation::Hello => Self::Hello,
            Operation::AbandonStore => {
                Self::AbandonStore { key: p.key()?, instance_id: p.instance_id()? }
            }
            operation @ (Operation::Confirm | Operation::Discard) => {
                let instance_id = p.instance_id()?;
                let offsets: Vec<u64> = p.next("offsets", Reader::integers)?;
                let generations = p.one_each("generations", &offsets)?;
                match operation {
                    Operation::Confirm => Self::Confirm { instance_id, offsets, generations },
                    _ => Self::Discard { instance_id, offsets, generations },
                }
            }
            Operation::Checksums => {
                let instance_id = p.instance_id()?;
                let offsets: Vec<u64> = p.next("offsets", Reader::integers)?;
                let generations = p.one_each("generations", &offsets)?;
                let checksums = p.one_each("checksums", &offsets)?;
                Self::Checksums { instance_id, offsets, generations, checksums }
            }
            Operation::Frames => Self::Frames,
            Operation::Write => Self::Write {
                instance_id: p.instance_id()?,
                offset: p.uint("offset")?,
                generation: p.uint("generation")?,
                at: p.uint("at")?,
                piece: p.piece()?,
            },
            Operation::Read => Self::Read {
                instance_id: p.instance_id()?,
                offset: p.uint("offset")?,
                generation: p.uint("generation")?,
                at: p.uint("at")?,
                bytes: p.uint("bytes")?,
            },
            Operation::Status => Self::Status,
            Operation::Events => {
                Self::Events { cursor: p.uint("cursor")?, max: p.next("max", Reader::integer)? }
            }
            Operation::Explain => Self::Explain { key: p.key()? },
        };
        p.end()?;
        Ok(request)
    }

    /// The message, with `uid` as its first frame. Operations of LMCache go by their id in `dialect`,
    /// ours by name. The fields are those of the newest release: older servers ignore what they do
    /// not know.
    pub fn encode(&self, uid: u64, dialect: Dialect) -> Vec<Bytes> {
        let mut frames = vec![one(|w| w.uint(uid)), encode_operation(self.operation(), dialect)];
        match self {
            Self::Lookup { key, tp_size: number }
            | Self::FreeLookupLocks { key, tp_size: number } => {
                frames.extend([key.encode(), one(|w| w.uint(*number))]);
            }
            Self::PrepareStore { key, instance_id }
            | Self::PrepareRetrieve { key, instance_id }
            | Self::CommitRetrieve { key, instance_id }
            | Self::AbandonStore { key, instance_id } => {
                frames.extend([key.encode(), one(|w| w.uint(*instance_id))]);
            }
            Self::CommitStore { key, instance_id } => {
                frames.extend([key.encode(), one(|w| w.uint(*instance_id)), one(|w| w.bytes(&[]))]);
            }
            Self::QueryPrefetchStatus { request_id } | Self::EndSession { request_id } => {
                frames.push(one(|w| w.str(request_id)));
            }
            Self::WaitPrefetchStatus { request_id, timeout_s } => {
                frames.extend([one(|w| w.str(request_id)), one(|w| w.float(*timeout_s))]);
            }
            Self::Register { instance_id, layout } => {
                frames.push(encode_registration(*instance_id, layout));
            }
            Self::Unregister { instance_id } | Self::UnregisterKvCache { instance_id } => {
                frames.push(one(|w| w.uint(*instance_id)));
            }
            Self::RegisterKvCache { instance_id, registration } => {
                frames.push(one(|w| w.uint(*instance_id)));
                frames.extend(lmcache_driven::encode_registration(registration));
            }
            Self::Store { key, instance_id, block_ids, event } => {
                frames.extend([key.encode(), one(|w| w.uint(*instance_id))]);
                frames.extend(lmcache_driven::encode_blocks(block_ids, event));
            }
            Self::Retrieve { key, instance_id, block_ids, event, skip_first_n_tokens } => {
                frames.extend([key.encode(), one(|w| w.uint(*instance_id))]);
                frames.extend(lmcache_driven::encode_blocks(block_ids, event));
                frames.push(one(|w| w.uint(*skip_first_n_tokens)));
            }
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
            Self::SubscribeKvEvents { instance_id, model_name, cursor, max_events } => frames
                .extend([
                    one(|w| w.uint(*instance_id)),
                    one(|w| w.str(model_name)),
                    one(|w| w.uint(*cursor)),
                    one(|w| w.uint(*max_events)),
                ]),
            Self::Confirm { instance_id, offsets, generations }
            | Self::Discard { instance_id, offsets, generations } => frames.extend([
                one(|w| w.uint(*instance_id)),
                one(|w| w.uints(offsets)),
                one(|w| w.uints(generations)),
            ]),
            Self::Checksums { instance_id, offsets, generations, checksums } => frames.extend([
                one(|w| w.uint(*instance_id)),
                one(|w| w.uints(offsets)),
                one(|w| w.uints(generations)),
                one(|w| w.uints(checksums)),
            ]),
            Self::Write { instance_id, offset, generation, at, piece } => {
                frames.extend([instance_id, offset, generation, at].map(|n| one(|w| w.uint(*n))));
                frames.push(piece.encode());
            }
            Self::Read { instance_id, offset, generation, at, bytes } => {
                frames.extend(
                    [instance_id, offset, generation, at, bytes].map(|n| one(|w| w.uint(*n))),
                );
            }
            Self::Events { cursor, max } => {
                frames.extend([one(|w| w.uint(*cursor)), one(|w| w.uint(*max))]);
            }
            Self::Explain { key } => frames.push(key.encode()),
            Self::GetChunkSize
            | Self::Noop
            | Self::GetExperimental
            | Self::Hello
            | Self::Frames
            | Self::Status => {}
        }
        frames
    }
}

impl Payload<'_> {
    fn key(&mut self) -> Result<RequestKey, MessageError> {
        let key = RequestKey::decode(self.frame()?);
        self.within("key", key)
    }

    /// An instance that a peer may name: LMCache's are below 2^63, those above are a server's own.
    fn instance_id(&mut self) -> Result<u64, MessageError> {
        self.next("instance_id", |r| own_instance(r.coerced_integer()?))
    }

    /// A list as long as that of the slots' offsets.
    fn one_each(&mut self, name: &'static str, offsets: &[u64]) -> Result<Vec<u64>, MessageError> {
        self.next(name, |r| {
            let list: Vec<u64> = r.integers()?;
            if list.len() == offsets.len() {
                Ok(list)
            } else {
                Err(Problem::Inconsistent("each offset has one").into())
            }
        })
    }

    fn piece(&mut self) -> Result<Piece, MessageError> {
        let piece = Piece::decode(self.frame()?);
        self.within("piece", piece)
    }

    fn no_data(&mut self) -> Result<(), MessageError> {
        let data = self.next("data", Reader::bytes)?;
        refuse_data(self.operation, data)
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

fn own_instance(id: u64) -> Result<u64> {
    if id < 1 << 63 { Ok(id) } else { Err(Problem::Range(id.into()).into()) }
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
            "instance_id" => {
                once(&mut instance_id, "instance_id", r.integer().and_then(own_instance))
            }
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

pub(super) fn decode_dtype(r: &mut Reader<'_>) -> Result<Dtype> {
    // No name of an element type is longer; what is refused is quoted in the error.
    const LENGTH_MAX: usize = 32;
    Some(r.str()?)
        .filter(|name| name.len() <= LENGTH_MAX)
        .and_then(|name| Dtype::new(name).ok())
        .ok_or(Problem::Dtype.into())
}

fn encode_registration(instance_id: u64, layout: &Layout) -> Bytes {
    one(|w| {
        w.map(9);
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
        w.str("num_physical_slots");
        w.uint_or_nil(layout.num_physical_slots);
    })
}
