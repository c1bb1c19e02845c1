//! Explanations, for `ts/cli/doctor.ts`.

use kvferry_core::explain;
use napi_derive::napi;

use crate::events::{hex, number};

/// What there is of a prompt.
#[napi(object)]
pub struct Explanation {
    /// Whole chunks of the prompt.
    pub chunks: f64,
    /// Leading ones that all KV ranks have.
    pub hit_chunks: f64,
    /// Whether an engine is registered for the model and world size.
    pub registered: bool,
    /// The first chunk that is no hit.
    pub missing: Option<MissingChunk>,
}

/// What is known of a chunk that is no hit.
#[napi(object)]
pub struct MissingChunk {
    /// In hexadecimal.
    pub chunk_hash: String,
    /// KV ranks that lack it although another one has it.
    pub missing_ranks: Vec<u32>,
    /// KV ranks that are writing it.
    pub writing_ranks: Vec<u32>,
    /// Under how many other salts it is stored.
    pub other_salts: f64,
    /// For which other models.
    pub other_models: Vec<String>,
    /// In which other world sizes.
    pub other_world_sizes: Vec<u32>,
    /// In which other layouts.
    pub other_layouts: Vec<ObjectLayout>,
    /// How it went.
    pub removed: Option<Removal>,
    /// Since when the log is complete, in milliseconds since 1970.
    pub log_since_ms: f64,
}

/// The shape of an object.
#[napi(object)]
pub struct ObjectLayout {
    /// Outermost first.
    pub shape: Vec<f64>,
    /// The element type.
    pub dtype: String,
}

/// How a chunk went.
#[napi(object)]
pub struct Removal {
    /// Why.
    #[napi(ts_type = "'evicted' | 'cleared' | 'damaged'")]
    pub cause: String,
    /// Milliseconds since 1970.
    pub at_ms: f64,
    /// For whose chunk it made room, where that is known.
    pub by: Option<Evictor>,
}

/// The tenant that stored something for which a chunk had to go.
#[napi(object)]
pub struct Evictor {
    /// What figures call it.
    pub tenant: String,
    /// It is the one that asks.
    pub own: bool,
}

impl From<explain::Explanation> for Explanation {
    fn from(explanation: explain::Explanation) -> Self {
        Self {
            chunks: number(explanation.chunks),
            hit_chunks: number(explanation.hit_chunks),
            registered: explanation.registered,
            missing: explanation.missing.map(Into::into),
        }
    }
}

impl From<explain::MissingChunk> for MissingChunk {
    fn from(missing: explain::MissingChunk) -> Self {
        let layouts = missing.other_layouts.into_iter().map(|layout| ObjectLayout {
            shape: layout.shape.into_iter().map(number).collect(),
            dtype: layout.dtype,
        });
        Self {
            chunk_hash: hex(&missing.chunk),
            missing_ranks: missing.missing_ranks,
            writing_ranks: missing.writing_ranks,
            other_salts: number(missing.other_salts),
            other_models: missing.other_models,
            other_world_sizes: missing.other_world_sizes,
            other_layouts: layouts.collect(),
            removed: missing.removed.map(|removal| Removal {
                cause: removal.cause.as_str().to_owned(),
                at_ms: number(removal.at_ms),
                by: removal.by.map(|by| Evictor { tenant: by.tenant, own: by.own }),
            }),
            log_since_ms: number(missing.log_since_ms),
        }
    }
}
