//! Replies: the results of operations.

use bytes::Bytes;
use kvferry_core::cache::Slot;
use kvferry_core::events::{Events, KvEventBatch};
use kvferry_core::explain::Explanation;

use super::{MessageError, Payload, Piece, events, explain, kv_events, one, refuse_data};
use crate::messagepack::{Kind, Problem, Reader, Result, Writer, frame, once, required, within};
use crate::operation::Operation;

/// A result. Which one answers which operation, [`Request`](super::Request) says.
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
        /// The segment's name without a leading slash; empty when the server offers no shared
        /// memory.
        shm_name: String,
        /// Bytes.
        pool_size: u64,
    },
    /// What `prepare_store` grants. `None`: the server wants pickles, so kvferry cannot store.
    StoreSlots(Option<StoreSlots>),
    /// What `prepare_retrieve` grants. `None`: not all chunks are there and leased.
    RetrieveSlots(Option<Slots>),
    /// Whether the server has copied. The handle is of an event that the engine waits for: empty where nothing was done.
    Copied {
        /// LMCache's IPC event handle.
        event: Bytes,
        /// Whether all of it.
        done: bool,
    },
    /// Who the server is.
    Hello(Hello),
    /// Bytes of a slot, or none.
    Piece(Option<Piece>),
    /// Counters and settings, by name.
    Status(Vec<(String, Value)>),
    /// What became visible and what went.
    Events(Events),
    /// The same of one model, as LMCache tells it.
    KvEvents(KvEventBatch),
    /// Why a prompt is no hit.
    Explanation(Explanation),
}

/// Slots of one layout.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Slots {
    /// Where they lie. The generations are sent when every slot has one, the checksums when any has
    /// one; both are only for connections that said [`Request::Hello`](super::Request::Hello), see
    /// [`Reply::plain`].
    pub slots: Vec<Slot>,
    /// The shape of each object, [`Layout::shape`](kvferry_core::key::Layout::shape); empty without
    /// slots.
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
    /// [`Request::Hello`](super::Request::Hello).
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
    /// Which file of which kernel its pool is: another server's pool, elsewhere, may have the same name. `None` when
    /// it is not shared, and from servers that do not say so.
    pub segment: Option<String>,
    /// Whether this connection may do what concerns everybody: clear, and ask for figures, events and explanations.
    /// Servers that do not say so let everybody.
    pub admin: bool,
    /// For how many milliseconds no slot is used anew that was granted for reading, from its grant on, whatever happens
    /// to the reader's connection and registration; unless the reader commits before. 0 from servers that do not say so.
    pub read_hold_ms: u32,
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
    /// The same without generations, checksums and refusals: what a connection gets that has not said hello.
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
        for slot in &mut slots.slots {
            slot.generation = None;
            slot.checksum = None;
        }
        self
    }

    /// The frame after the header; `None` when there is none.
    pub fn encode(&self) -> Option<Bytes> {
        if let Self::Piece(Some(piece)) = self {
            return Some(piece.encode());
        }
        if *self == Self::None {
            return None;
        }
        Some(one(|w| match self {
            Self::None => {}
            Self::Piece(_) => w.uint_or_nil(None::<u64>),
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
                        let checksums = slots.slots.iter().any(|slot| slot.checksum.is_some());
                        w.map(1 + usize::from(generations.is_some()) + usize::from(checksums));
                        slots.encode(w);
                        encode_generations(generations.as_deref(), w);
                        if checksums {
                            w.str("checksums");
                            w.array(slots.slots.len());
                            slots.slots.iter().for_each(|slot| w.uint_or_nil(slot.checksum));
                        }
                    }
                }
            }
            Self::Copied { event, done } => {
                w.array(2);
                w.bytes(event);
                w.boolean(*done);
            }
            Self::Hello(hello) => {
                w.map(6);
                w.str("boot_token");
                w.bytes(&hello.boot_token);
                w.str("version");
                w.str(&hello.version);
                w.str("pid");
                w.uint(hello.pid);
                w.str("read_hold_ms");
                w.uint(hello.read_hold_ms);
                w.str("admin");
                w.boolean(hello.admin);
                w.str("segment");
                match &hello.segment {
                    Some(segment) => w.str(segment),
                    None => w.uint_or_nil(None::<u64>),
                }
            }
            Self::Events(events) => events::encode(events, w),
            Self::KvEvents(batch) => kv_events::encode(batch, w),
            Self::Explanation(explanation) => explain::encode(explanation, w),
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
            | Operation::RegisterKvCache
            | Operation::UnregisterKvCache
            | Operation::Clear
            | Operation::ReportBlockAllocation
            | Operation::Frames
            | Operation::AbandonStore => Self::None,
            Operation::QueryPrefetchStatus
            | Operation::WaitPrefetchStatus
            | Operation::SubscribeKvEvents
                if payload.is_empty() =>
            {
                Self::None
            }
            Operation::QueryPrefetchStatus
            | Operation::WaitPrefetchStatus
            | Operation::GetChunkSize
            | Operation::Discard
            | Operation::Checksums => Self::Integer(p.uint("result")?),
            Operation::CommitStore
            | Operation::CommitRetrieve
            | Operation::Ping
            | Operation::Write
            | Operation::Confirm => Self::Boolean(p.next("result", Reader::coerced_bool)?),
            Operation::Noop => Self::Text(p.next("result", Reader::string)?),
            Operation::GetExperimental => {
                Self::Names(p.next("result", |r| r.short_list(Reader::string))?)
            }
            Operation::Register => p.next("result", decode_registered)?,
            Operation::PrepareStore => Self::StoreSlots(p.next("result", StoreSlots::decode)?),
            Operation::PrepareRetrieve => Self::RetrieveSlots(p.retrieve_slots()?),
            Operation::Store | Operation::Retrieve => p.next("result", decode_copied)?,
            Operation::Hello => Self::Hello(p.next("result", Hello::decode)?),
            Operation::Read => Self::Piece(p.piece_or_none()?),
            Operation::Status => Self::Status(p.next("result", decode_status)?),
            Operation::SubscribeKvEvents => Self::KvEvents(p.next("result", kv_events::decode)?),
            Operation::Events => Self::Events(p.next("result", events::decode)?),
            Operation::Explain => Self::Explanation(p.next("result", explain::decode)?),
        };
        p.end()?;
        Ok(reply)
    }
}

impl Payload<'_> {
    fn piece_or_none(&mut self) -> Result<Option<Piece>, MessageError> {
        const NIL: &[u8] = &[0xc0];
        let frame = self.frame()?;
        if *frame == NIL {
            return Ok(None);
        }
        let piece = Piece::decode(frame);
        self.within("result", piece).map(Some)
    }

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

fn decode_copied(r: &mut Reader<'_>) -> Result<Reply> {
    if r.array_len()? != 2 {
        return Err(Problem::Inconsistent("a result has a handle and a boolean").into());
    }
    let event = within("event", r.bytes())?;
    Ok(Reply::Copied { event: Bytes::copy_from_slice(event), done: within("done", r.boolean())? })
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
        let mut checksums = None;
        let mut refused = None;
        for _ in 0..r.map_len()? {
            match r.str()? {
                "slots" => once(&mut slots, "slots", Slots::decode(r)),
                "chunk_indices" => once(&mut chunk_indices, "chunk_indices", r.integers()),
                "generations" => once(&mut generations, "generations", r.integers()),
                // As it came, until it is known for how many slots it must be.
                "checksums" => once(&mut checksums, "checksums", r.skip()),
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
        if let Some(checksums) = checksums {
            let slots = slots.iter_mut().flat_map(|slots| &mut slots.slots);
            within("checksums", frame(checksums, |r| decode_checksums(r, count, slots)))?;
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
        checksum: None,
    };
    Ok((slot, required(shape, "shape")?, required(dtype, "dtype")?))
}

fn decode_checksums<'a>(
    r: &mut Reader<'_>,
    count: usize,
    slots: impl Iterator<Item = &'a mut Slot>,
) -> Result<()> {
    if r.array_len()? != count {
        return Err(Problem::Inconsistent("each slot has one checksum or nil").into());
    }
    for slot in slots {
        slot.checksum = r.integer_or_nil()?;
    }
    Ok(())
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
        let mut admin = None;
        let mut segment = None;
        let mut read_hold_ms = None;
        for _ in 0..r.map_len()? {
            match r.str()? {
                "boot_token" => once(&mut boot_token, "boot_token", r.fixed_bytes()),
                "version" => once(&mut version, "version", r.string()),
                "pid" => once(&mut pid, "pid", r.integer()),
                "admin" => once(&mut admin, "admin", r.boolean()),
                "read_hold_ms" => once(&mut read_hold_ms, "read_hold_ms", r.integer()),
                "segment" => once(
                    &mut segment,
                    "segment",
                    if r.nil() { Ok(None) } else { r.string().map(Some) },
                ),
                _ => r.skip().map(drop),
            }?;
        }
        Ok(Self {
            boot_token: required(boot_token, "boot_token")?,
            version: required(version, "version")?,
            pid: required(pid, "pid")?,
            admin: admin.unwrap_or(true),
            read_hold_ms: read_hold_ms.unwrap_or(0),
            segment: segment.flatten(),
        })
    }
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
