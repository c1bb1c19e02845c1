//! Events, as `ts/events.ts` hands them on.

use std::fmt::Write as _;

use kvferry_core::events::{self, EventKind};
use napi::bindgen_prelude::Uint8Array;
use napi_derive::napi;

/// Some events.
#[napi(object)]
pub struct KvEvents {
    /// Random at each start of the cache, in hexadecimal.
    pub incarnation: String,
    /// Where to read on.
    pub next_cursor: f64,
    /// Whether events before these are gone.
    pub lost: bool,
    /// In their order.
    pub events: Vec<KvEvent>,
}

/// One of them.
#[napi(object)]
pub struct KvEvent {
    /// Its number, from 1.
    pub sequence: f64,
    /// What happened.
    #[napi(ts_type = "'stored' | 'removed'")]
    pub kind: String,
    /// 32 bytes.
    pub chunk_hash: Uint8Array,
    /// Those of the chunk before it.
    pub parent_chunk_hash: Option<Uint8Array>,
    /// The model.
    pub model_name: String,
    /// KV shards of the model.
    pub kv_world_size: u32,
    /// The KV rank.
    pub kv_worker_id: u32,
    /// The tenant, or "".
    pub cache_salt: String,
    /// Milliseconds since 1970.
    pub at_ms: f64,
}

impl From<events::Events> for KvEvents {
    fn from(events: events::Events) -> Self {
        let next_cursor = number(events.next());
        let numbered = (events.first..).zip(events.events);
        Self {
            incarnation: hex(&events.incarnation),
            next_cursor,
            lost: events.lost,
            events: numbered.map(|(sequence, event)| KvEvent::new(sequence, &event)).collect(),
        }
    }
}

impl KvEvent {
    fn new(sequence: u64, event: &events::KvEvent) -> Self {
        let kind = match event.kind {
            EventKind::Stored => "stored",
            EventKind::Removed => "removed",
        };
        Self {
            sequence: number(sequence),
            kind: kind.to_owned(),
            chunk_hash: event.chunk.to_vec().into(),
            parent_chunk_hash: event.parent.map(|parent| parent.to_vec().into()),
            model_name: event.space.model_name.clone(),
            kv_world_size: event.space.world_size,
            kv_worker_id: event.rank,
            cache_salt: event.space.cache_salt.clone(),
            at_ms: number(event.at_ms),
        }
    }
}

/// A count, as JavaScript has it.
#[expect(clippy::cast_precision_loss, reason = "JavaScript's numbers")]
pub(crate) fn number(count: u64) -> f64 {
    count as f64
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(text, "{byte:02x}"); // writing into a String cannot fail
    }
    text
}
