//! Why a prompt is not in a cache, as far as the cache knows.

use std::sync::Arc;
use std::time::Instant;

use crate::Result;
use crate::cache::Cache;
use crate::key::Key;

/// Names, world sizes and layouts that an explanation lists at most, of each.
pub const LISTED_MAX: usize = 8;

/// What there is of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// Whole chunks of the key's range.
    pub chunks: u64,
    /// Leading ones of them that every KV rank has.
    pub hit_chunks: u64,
    /// Whether an engine is registered for the model and world size. Without one, lookups find nothing;
    /// the other figures are then for the layout that is stored.
    pub registered: bool,
    /// What is known of the first chunk that is no hit; `None` when there is no such chunk.
    pub missing: Option<MissingChunk>,
}

/// What is known of a chunk that not every KV rank has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingChunk {
    /// Its chained hash.
    pub chunk: [u8; 32],
    /// KV ranks that lack it although another one has it; empty when none has it.
    pub missing_ranks: Vec<u32>,
    /// KV ranks that are writing it now.
    pub writing_ranks: Vec<u32>,
    /// Other salts under which it is stored for the same model. Never which ones.
    pub other_salts: u64,
    /// Other models for which it is stored under the same salt: [`LISTED_MAX`] at most, ascending.
    pub other_models: Vec<String>,
    /// Other world sizes in which it is stored for the same model and salt, likewise.
    pub other_world_sizes: Vec<u32>,
    /// Other layouts in which it is stored for the same model, world size and salt, likewise.
    pub other_layouts: Vec<ObjectLayout>,
    /// How it went, if the log of events still has that.
    pub removed: Option<Removal>,
    /// How far back the log reaches, in milliseconds since 1970: what went before that is not known.
    pub log_since_ms: u64,
}

/// The shape of one object, for a person to read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectLayout {
    /// Outermost first, see [`Layout::shape`](crate::key::Layout::shape).
    pub shape: Vec<u64>,
    /// torch's name of the element type.
    pub dtype: String,
}

/// The latest removal of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// Why.
    pub cause: RemovalCause,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// For whose chunk it made room, where that is known.
    pub by: Option<Evictor>,
}

/// The tenant that stored something for which something else had to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evictor {
    /// What figures call it: never its salt.
    pub tenant: String,
    /// It is the one that asks.
    pub own: bool,
}

/// Why an object went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemovalCause {
    /// Others needed the room, and it was used longest ago.
    Evicted,
    /// The whole cache was emptied.
    Cleared,
    /// A reader found other bytes than were stored.
    Damaged,
}

impl RemovalCause {
    /// The name in messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Evicted => "evicted",
            Self::Cleared => "cleared",
            Self::Damaged => "damaged",
        }
    }

    /// The cause of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Evicted, Self::Cleared, Self::Damaged].into_iter().find(|it| it.as_str() == name)
    }
}

/// The key of all whole chunks of `tokens`, for a question about them.
pub fn prompt_key(
    model_name: String,
    world_size: u32,
    tokens: Arc<[u32]>,
    cache_salt: String,
    request_id: String,
    chunk_size: u32,
) -> Key {
    let (all, chunk) = (tokens.len() as u64, u64::from(chunk_size.max(1)));
    Key {
        model_name,
        world_size,
        worker_id: None,
        token_ids: tokens,
        start: 0,
        end: all - all % chunk,
        request_id,
        cache_salt,
        num_kv_readers: 1,
    }
}

/// How many leading chunks of the key's range a lookup finds; its leases are given back. All that a
/// server without [`Cache::explain`] can be asked.
pub async fn count_hits(cache: &dyn Cache, key: &Key, deadline: Instant) -> Result<u64> {
    let hits = cache.lookup(key, deadline).await?;
    let end = key.start + hits * u64::from(cache.chunk_size());
    if hits > 0 {
        cache.release(&Key { end, ..key.clone() }, deadline).await?;
    }
    cache.end_session(&key.request_id, deadline).await?;
    Ok(hits)
}
