//! Hashing: `ts/hash.ts` checks what JavaScript passes and allocates what is written here.

use kvferry_core::hash::{self, BlockAlgorithm, ChunkAlgorithm, ChunkStream, Tokens};
use kvferry_core::key;
use napi::bindgen_prelude::{BigInt, Result, Uint8ArraySlice};
use napi_derive::napi;
use num_bigint::Sign;

use crate::error::to_napi;

/// The chunk hashes of one growing prompt.
#[napi]
pub struct ChunkHasher {
    stream: ChunkStream,
}

#[napi]
impl ChunkHasher {
    /// Starts at the prompt's first token, or after the chunk whose hash is `parent`.
    #[napi(constructor, catch_unwind)]
    pub fn new(algorithm: String, chunk_size: u32, parent: Option<&[u8]>) -> Result<Self> {
        let algorithm = ChunkAlgorithm::from_name(&algorithm).map_err(to_napi)?;
        let hasher = hash::ChunkHasher::new(algorithm, chunk_size).map_err(to_napi)?;
        let mut stream = ChunkStream::new(&hasher);
        if let Some(parent) = parent {
            stream.resume(parent).map_err(to_napi)?;
        }
        Ok(Self { stream })
    }

    /// Adds tokens and writes the hashes that they complete to `hashes`.
    #[napi(catch_unwind)]
    pub fn append(&mut self, tokens: &[u32], mut hashes: Uint8ArraySlice<'_>) -> Result<()> {
        // SAFETY: the call is synchronous and ts/hash.ts lets no other argument share this buffer.
        let hashes = unsafe { hashes.as_mut() };
        self.stream.append(tokens, hashes).map(drop).map_err(to_napi)
    }

    /// The same for integers of any size and sign.
    #[napi(catch_unwind)]
    pub fn append_integers(
        &mut self,
        tokens: Vec<BigInt>,
        mut hashes: Uint8ArraySlice<'_>,
    ) -> Result<()> {
        // SAFETY: the call is synchronous and ts/hash.ts lets no other argument share this buffer.
        let hashes = unsafe { hashes.as_mut() };
        self.stream.append(Tokens::Integers(&integers(tokens)), hashes).map(drop).map_err(to_napi)
    }
}

/// A LoRA adapter by vLLM's names for it.
#[napi(object)]
pub struct Lora {
    /// `lora_name`.
    pub name: String,
    /// `lora_path`.
    pub path: String,
}

/// A multimodal item by vLLM's names for it.
#[napi(object)]
pub struct MmFeature {
    /// `identifier`.
    pub identifier: String,
    /// `mm_position.offset`.
    pub offset: i64,
    /// `mm_position.length`.
    pub length: u32,
}

/// The embeddings of a prompt.
#[napi(object, object_to_js = false)]
pub struct PromptEmbeds<'a> {
    /// A row for each token.
    pub data: Uint8ArraySlice<'a>,
    /// Bytes of a row.
    pub bytes_per_token: u32,
}

/// What block hashes depend on in any case.
#[napi(object, object_to_js = false)]
pub struct BlockHasherOptions {
    /// Tokens of a block.
    pub block_size: u32,
    /// By vLLM's name for it.
    pub algorithm: String,
    /// The tenant; empty for none.
    pub cache_salt: String,
    /// The multimodal items.
    pub mm_features: Vec<MmFeature>,
    /// Tokens after a block that its hash covers.
    pub num_hash_lookahead_tokens: u32,
}

/// The block hashes of one growing request.
#[napi]
pub struct BlockHasher {
    hasher: hash::BlockHasher,
}

#[napi]
impl BlockHasher {
    /// Starts at the request's first token, or after the block whose hash is `parent`.
    #[napi(constructor, catch_unwind)]
    pub fn new(
        options: BlockHasherOptions,
        parent: Option<&[u8]>,
        seed: Option<String>,
        lora: Option<Lora>,
        prompt_embeds: Option<PromptEmbeds<'_>>,
    ) -> Result<Self> {
        let options = hash::BlockHasherOptions {
            block_size: options.block_size,
            algorithm: BlockAlgorithm::from_name(&options.algorithm).map_err(to_napi)?,
            seed,
            cache_salt: Some(options.cache_salt),
            lora: lora.map(|lora| hash::Lora { name: lora.name, path: lora.path }),
            mm_features: (options.mm_features.into_iter())
                .map(|MmFeature { identifier, offset, length }| hash::MmFeature {
                    identifier,
                    offset,
                    length,
                })
                .collect(),
            prompt_embeds: prompt_embeds.as_ref().map(|embeds| hash::PromptEmbeds {
                data: &embeds.data,
                bytes_per_token: embeds.bytes_per_token,
            }),
            num_hash_lookahead_tokens: options.num_hash_lookahead_tokens,
        };
        let mut hasher = hash::BlockHasher::new(&options).map_err(to_napi)?;
        if let Some(parent) = parent {
            hasher.resume(parent).map_err(to_napi)?;
        }
        Ok(Self { hasher })
    }

    /// Adds tokens and writes the hashes that they complete to `hashes`.
    #[napi(catch_unwind)]
    pub fn append(&mut self, tokens: &[u32], mut hashes: Uint8ArraySlice<'_>) -> Result<()> {
        // SAFETY: the call is synchronous and ts/hash.ts lets no other argument share this buffer.
        let hashes = unsafe { hashes.as_mut() };
        self.hasher.append(tokens, hashes).map(drop).map_err(to_napi)
    }

    /// The same for integers of any size and sign.
    #[napi(catch_unwind)]
    pub fn append_integers(
        &mut self,
        tokens: Vec<BigInt>,
        mut hashes: Uint8ArraySlice<'_>,
    ) -> Result<()> {
        // SAFETY: the call is synchronous and ts/hash.ts lets no other argument share this buffer.
        let hashes = unsafe { hashes.as_mut() };
        self.hasher.append(Tokens::Integers(&integers(tokens)), hashes).map(drop).map_err(to_napi)
    }
}

/// LMCache's text form of an object's key.
#[napi(catch_unwind)]
pub fn object_key(
    model_name: String,
    world_size: u32,
    rank: u32,
    group: u32,
    chunk_hash: &[u8],
    cache_salt: String,
) -> Result<String> {
    key::check_model_name(&model_name).map_err(to_napi)?;
    key::check_salt(&cache_salt).map_err(to_napi)?;
    let kv_rank = key::kv_rank(world_size, rank);
    Ok(key::object_key(&model_name, kv_rank, group, chunk_hash, &cache_salt))
}

/// Refuses a model's name that no key can hold.
#[napi(catch_unwind)]
pub fn check_model_name(model_name: String) -> Result<()> {
    key::check_model_name(&model_name).map_err(to_napi)
}

fn integers(tokens: Vec<BigInt>) -> Vec<num_bigint::BigInt> {
    tokens
        .into_iter()
        .map(|token| {
            let sign = if token.sign_bit { Sign::Minus } else { Sign::Plus };
            let bytes: Vec<u8> = token.words.iter().flat_map(|word| word.to_le_bytes()).collect();
            num_bigint::BigInt::from_bytes_le(sign, &bytes)
        })
        .collect()
}
