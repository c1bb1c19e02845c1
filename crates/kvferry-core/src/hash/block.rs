//! Block hashes, bit-equal to vLLM's `get_request_block_hasher`: only full blocks have one.

use super::chain::{Chain, Digest};
use super::chunk::DEFAULT_SEED;
use super::tokens::{Encoding, Tokens};
use crate::{Error, Result};

/// Bytes of a seed, salt, LoRA name or path at most; above, Python would pickle them out of band.
const TEXT_BYTES_MAX: usize = 4096;

/// How blocks are hashed; vLLM's `--prefix-caching-hash-algo`. Hashes the tuple (hash before, tokens,
/// extra keys), serialized by pickle unless the name says CBOR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BlockAlgorithm {
    /// SHA-256 over pickle: vLLM's default. See [`BlockHasherOptions::lora`] for what pickle implies.
    #[default]
    Sha256,
    /// SHA-256 over CBOR.
    Sha256Cbor,
    /// XXH3-128 over pickle. Fast, but collisions can be made on purpose: not across tenants.
    Xxhash,
    /// XXH3-128 over CBOR. Fast, but collisions can be made on purpose: not across tenants.
    XxhashCbor,
}

impl BlockAlgorithm {
    /// The algorithm that vLLM calls `name`.
    pub fn from_name(name: &str) -> Result<Self> {
        Ok(match name {
            "sha256" => Self::Sha256,
            "sha256_cbor" => Self::Sha256Cbor,
            "xxhash" => Self::Xxhash,
            "xxhash_cbor" => Self::XxhashCbor,
            _ => {
                return Err(Error::invalid(format!(
                    "block hash algorithm {name:?}: use sha256, sha256_cbor, xxhash or xxhash_cbor"
                )));
            }
        })
    }

    const fn parts(self) -> (Encoding, Digest) {
        match self {
            Self::Sha256 => (Encoding::Pickle, Digest::Sha256),
            Self::Sha256Cbor => (Encoding::Cbor, Digest::Sha256),
            Self::Xxhash => (Encoding::Pickle, Digest::Xxh3),
            Self::XxhashCbor => (Encoding::Cbor, Digest::Xxh3),
        }
    }
}

/// A LoRA adapter as vLLM knows it: both are part of every block's hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lora {
    /// `lora_name`.
    pub name: String,
    /// `lora_path`.
    pub path: String,
}

/// What a request's block hashes depend on besides its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockHasherOptions {
    /// Tokens of a block, at least 1.
    pub block_size: u32,
    /// The digest and what is put into it.
    pub algorithm: BlockAlgorithm,
    /// `PYTHONHASHSEED` of the engine, as text. Unset stands for "vllm-none-hash" with the SHA-256
    /// algorithms and is an error with the others, where vLLM draws another one in each process.
    pub seed: Option<String>,
    /// The tenant, part of the first block's hash and so of all; empty means none.
    pub cache_salt: Option<String>,
    /// The adapter. With the pickle algorithms vLLM's hashes depend on whether name and path are one
    /// Python object: here they are two, unless both are the same single Latin-1 character.
    pub lora: Option<Lora>,
}

/// The block hashes of one growing request: tokens come in parts of any length, each is hashed once.
#[derive(Debug, Clone)]
pub struct BlockHasher {
    chain: Chain,
}

impl BlockHasher {
    /// Starts at the request's first token. Errors on a block size of 0, a missing seed (see
    /// [`BlockHasherOptions::seed`]) and on texts of more than 4096 bytes.
    pub fn new(options: &BlockHasherOptions) -> Result<Self> {
        let BlockHasherOptions { block_size, algorithm, seed, cache_salt, lora } = options;
        if *block_size == 0 {
            return Err(Error::invalid("block size 0: a block has at least 1 token, 16 usually"));
        }
        let (encoding, digest) = algorithm.parts();
        let seed = match (seed, digest) {
            (Some(seed), _) => seed,
            (None, Digest::Sha256 | Digest::Blake3) => DEFAULT_SEED,
            (None, Digest::Xxh3) => {
                return Err(Error::invalid(
                    "xxhash algorithms need a seed: vLLM draws one in each process unless \
                     PYTHONHASHSEED is set; set it there and pass the same text here",
                ));
            }
        };
        let salt = cache_salt.as_deref().unwrap_or_default();
        let (name, path) = lora.as_ref().map_or(("", ""), |lora| (&lora.name, &lora.path));
        for (what, text) in
            [("seed", seed), ("salt", salt), ("LoRA name", name), ("LoRA path", path)]
        {
            if text.len() > TEXT_BYTES_MAX {
                return Err(Error::invalid(format!(
                    "a {what} has at most {TEXT_BYTES_MAX} bytes, this one has {}",
                    text.len()
                )));
            }
        }

        let mut every = Vec::new();
        if lora.is_some() {
            every.push(vec!["lora", name, path]);
        }
        let mut first = every.clone();
        if !salt.is_empty() {
            first.push(vec!["cache_salt", salt]);
        }
        let size = *block_size as usize;
        Ok(Self { chain: Chain::new(encoding, digest, size, seed, [&first, &every]) })
    }

    /// Bytes of a hash: 32, or 16 for the xxhash algorithms.
    pub fn hash_bytes(&self) -> usize {
        self.chain.hash_bytes()
    }

    /// Continues after the block whose hash is `parent`, with no token of the next one. Errors, and
    /// changes nothing, when `parent` is no hash of this algorithm by its length.
    pub fn resume(&mut self, parent: &[u8]) -> Result<()> {
        self.chain.check_hash(parent)?;
        self.chain.resume(parent);
        Ok(())
    }

    /// How many blocks `tokens` more tokens complete.
    pub fn completes(&self, tokens: usize) -> usize {
        self.chain.completes(tokens)
    }

    /// Adds tokens and writes the hash of each block that they complete to `hashes`, one after the
    /// other; returns how many. Errors, and changes nothing, when `hashes` is too short.
    pub fn append<'a>(
        &mut self,
        tokens: impl Into<Tokens<'a>>,
        hashes: &mut [u8],
    ) -> Result<usize> {
        self.chain.append_into(tokens.into(), hashes)
    }
}
