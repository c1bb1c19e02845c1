//! What became visible in a cache and what went, in order, for whoever keeps an index of its own: a
//! router that sends a request where its prefix is, say.

use std::sync::Arc;

/// Events of one answer at most.
pub const EVENTS_MAX: u32 = 16_384;
/// Different [`EventSpace`]s in one answer at most: with [`EVENTS_MAX`] it keeps a reply of the wire
/// below 8 MiB, however long the names are.
pub const EVENT_SPACES_MAX: usize = 1_024;

/// What happened to an object (one chunk of one KV rank).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It was committed: lookups find it from now on.
    Stored,
    /// It was evicted, cleared or found damaged: lookups find it no more.
    Removed,
}

/// For which engine and tenant an object was stored.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EventSpace {
    /// The model's name, as it was registered.
    pub model_name: String,
    /// KV shards of the model.
    pub world_size: u32,
    /// The tenant; empty means none.
    pub cache_salt: String,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvEvent {
    /// What happened.
    pub kind: EventKind,
    /// The chained hash of the chunk.
    pub chunk: [u8; 32],
    /// That of the chunk before it; `None` for a prompt's first, and when that one went before this one.
    pub parent: Option<[u8; 32]>,
    /// The KV rank, below the world size.
    pub rank: u32,
    /// Whose it is.
    pub space: Arc<EventSpace>,
    /// Milliseconds since 1970 by the clock of the cache's machine. It may be set back: what tells
    /// the order is the sequence.
    pub at_ms: u64,
}

/// Some events of the log, without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Events {
    /// Random at each start of the cache: with another one, all that was heard before is void.
    pub incarnation: [u8; 16],
    /// The number of the first of [`Events::events`], counted from 1 since the cache started; each
    /// following one has the next number.
    pub first: u64,
    /// In their order.
    pub events: Vec<KvEvent>,
    /// Whether events between the cursor and `first` are gone, or the cursor was never given out.
    pub lost: bool,
}

impl Events {
    /// The cursor to read on from.
    pub fn next(&self) -> u64 {
        self.first.saturating_add(self.events.len() as u64)
    }
}

/// What LMCache's `subscribe_kv_events` tells at once of one model's chunks in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvEventBatch {
    /// `false`: nothing is told, and the stream ends.
    pub enabled: bool,
    /// Differs from start to start of the server.
    pub incarnation: u64,
    /// The sequence of the last event that was looked at, of whichever model: the cursor to read on from.
    pub next_cursor: u64,
    /// Whether events between the cursor and these are gone: what was announced before is void.
    pub lost: bool,
    /// In their order.
    pub events: Vec<KvEventRecord>,
}

/// One event of a [`KvEventBatch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvEventRecord {
    /// Counted from 1 since the server started.
    pub seq: u64,
    /// What happened.
    pub kind: EventKind,
    /// The model, as it was registered.
    pub model_name: String,
    /// The chained hashes of the chunks: of one, if it was stored.
    pub block_hashes: Vec<[u8; 32]>,
    /// That of the chunk before it; `None` for a prompt's first, and where chunks went.
    pub parent_block_hash: Option<[u8; 32]>,
    /// The chunk's tokens; empty where chunks went.
    pub token_ids: Arc<[u32]>,
}
