//! Hashes that name KV cache: of an engine's blocks, bit-equal to vLLM's, and of the cache's chunks,
//! bit-equal to LMCache's. Both are chains: a hash covers its own tokens and the hash before it, so
//! equal hashes mean equal prefixes.

mod block;
mod cbor;
mod chain;
mod chunk;
mod extra;
mod pickle;
mod tokens;

pub use block::{BlockAlgorithm, BlockHasher, BlockHasherOptions};
pub use chunk::{ChunkAlgorithm, ChunkHasher, ChunkStream};
pub use extra::{Lora, MmFeature, PromptEmbeds};
pub use tokens::Tokens;
