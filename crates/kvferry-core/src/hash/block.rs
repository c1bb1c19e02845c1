//! Block hashes, bit-equal to vLLM's `get_request_block_hasher`: only full blocks have one.

use super::chain::{Chain, Digest};
use super::chunk::DEFAULT_SEED;
use super::extra::{
    Key, Lookahead, Lora, MmFeature, PromptEmbeds, mm_keys, mm_resume, mm_rewind, no_rows,
};
use super::tokens::{Encoded, Encoding, Tokens};
use crate::{Error, Result};

/// Bytes of a seed, salt, LoRA name, path or identifier at most; above, Python would pickle them out of band.
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

/// What a request's block hashes depend on besides its tokens. The default is vLLM's: blocks of 16
/// tokens and no extra keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockHasherOptions<'a> {
    /// Tokens of a block, at least 1.
    pub block_size: u32,
    /// The digest and what is put into it.
    pub algorithm: BlockAlgorithm,
    /// `PYTHONHASHSEED` of the engine, as text. Unset stands for "vllm-none-hash" with the SHA-256
    /// algorithms and is an error with the others, where vLLM draws another one in each process.
    pub seed: Option<String>,
    /// The tenant, part of the first block's hash and so of all; empty means none.
    pub cache_salt: Option<String>,
    /// The adapter. With the pickle algorithms vLLM's hashes depend on which texts are one Python
    /// object: here each of them is another one, unless two are the same single Latin-1 character.
    pub lora: Option<Lora>,
    /// The multimodal items, sorted by offset and apart. vLLM takes others too, but what it makes of
    /// them depends on how the tokens come in; here as well.
    pub mm_features: Vec<MmFeature>,
    /// Embeddings of the prompt. Where they take a token's place, vLLM hashes 0 as its id. Tokens
    /// beyond them were generated.
    pub prompt_embeds: Option<PromptEmbeds<'a>>,
    /// Tokens after a block that its hash covers, which a drafter reads ahead: a block has a hash once
    /// they are there. vLLM sets it for EAGLE, and 0 in any case with a KV connector.
    pub num_hash_lookahead_tokens: u32,
}

impl Default for BlockHasherOptions<'_> {
    fn default() -> Self {
        Self {
            block_size: 16,
            algorithm: BlockAlgorithm::default(),
            seed: None,
            cache_salt: None,
            lora: None,
            mm_features: Vec::new(),
            prompt_embeds: None,
            num_hash_lookahead_tokens: 0,
        }
    }
}

/// The block hashes of one growing request: tokens come in parts of any length, each is hashed once.
#[derive(Debug, Clone)]
pub struct BlockHasher {
    chain: Chain,
    /// For a request whose keys differ from block to block.
    keys: Option<Box<BlockKeys>>,
}

impl BlockHasher {
    /// Starts at the request's first token. Errors on a block size of 0, a missing seed (see
    /// [`BlockHasherOptions::seed`]), embeddings that are no whole rows, and texts of more than 4096
    /// bytes.
    pub fn new(options: &BlockHasherOptions<'_>) -> Result<Self> {
        let BlockHasherOptions { block_size, algorithm, seed, .. } = options;
        if *block_size == 0 {
            return Err(Error::invalid("block size 0: a block has at least 1 token, 16 usually"));
        }
        let size = *block_size as usize;
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
        check_text("seed", seed)?;
        let keys = BlockKeys::new(options)?;
        let every: Vec<Key<'_>> = keys.lora_key().collect();
        let first: Vec<Key<'_>> = keys.lora_key().chain(keys.salt_key()).collect();
        let chain = Chain::new(encoding, digest, size, seed, [&first, &every]);
        Ok(Self { chain, keys: keys.differ().then(|| Box::new(keys)) })
    }

    /// Bytes of a hash: 32, or 16 for the xxhash algorithms.
    pub fn hash_bytes(&self) -> usize {
        self.chain.hash_bytes()
    }

    /// Continues after the block whose hash is `parent`, with no token of the next one: offsets and
    /// rows count from there. Errors, and changes nothing, when `parent` is no hash of this algorithm
    /// by its length.
    pub fn resume(&mut self, parent: &[u8]) -> Result<()> {
        self.chain.check_hash(parent)?;
        self.chain.resume(parent);
        if let Some(keys) = &mut self.keys {
            keys.restart();
        }
        Ok(())
    }

    /// How many blocks `tokens` more tokens complete.
    pub fn completes(&self, tokens: usize) -> usize {
        match &self.keys {
            None => self.chain.completes(tokens),
            Some(keys) => keys.completes(self.chain.size(), tokens),
        }
    }

    /// Adds tokens and writes the hash of each block that they complete to `hashes`, one after the
    /// other; returns how many. Errors, and changes nothing, when `hashes` is too short.
    pub fn append<'a>(
        &mut self,
        tokens: impl Into<Tokens<'a>>,
        hashes: &mut [u8],
    ) -> Result<usize> {
        let tokens = tokens.into();
        let Some(keys) = &mut self.keys else {
            return self.chain.append_into(tokens, hashes);
        };
        let count = keys.completes(self.chain.size(), tokens.len());
        self.chain.check_room(count, hashes)?;
        keys.append(&mut self.chain, tokens, hashes);
        Ok(count)
    }
}

/// The keys of a request, and its tokens since the last block.
#[derive(Debug, Clone)]
struct BlockKeys {
    lora: Option<Lora>,
    cache_salt: String,
    mm_features: Vec<MmFeature>,
    /// Of each block that has rows; the last one is that of any block without.
    embeds: Option<Vec<[u8; 32]>>,
    lookahead: usize,
    /// Blocks since the first token that is hashed.
    blocks: usize,
    /// From the next block's first token on.
    tokens: Encoded,
}

impl BlockKeys {
    fn new(options: &BlockHasherOptions<'_>) -> Result<Self> {
        let lookahead = options.num_hash_lookahead_tokens as usize;
        let embeds = options.prompt_embeds.map(|embeds| {
            let mut digests = embeds.digests(options.block_size as usize, lookahead)?;
            digests.push(no_rows());
            Ok(digests)
        });
        let keys = Self {
            lora: options.lora.clone(),
            cache_salt: options.cache_salt.clone().unwrap_or_default(),
            mm_features: options.mm_features.clone(),
            embeds: embeds.transpose()?,
            lookahead,
            blocks: 0,
            tokens: Encoded::default(),
        };
        check_text("salt", &keys.cache_salt)?;
        if let Some(Lora { name, path }) = &keys.lora {
            check_text("LoRA name", name)?;
            check_text("LoRA path", path)?;
        }
        for feature in &keys.mm_features {
            check_text("multimodal identifier", &feature.identifier)?;
        }
        Ok(keys)
    }

    /// Whether blocks after the first have other keys than [`BlockKeys::lora_key`].
    fn differ(&self) -> bool {
        !self.mm_features.is_empty() || self.embeds.is_some() || self.lookahead > 0
    }

    fn lora_key(&self) -> impl Iterator<Item = Key<'_>> {
        self.lora.iter().map(Key::Lora)
    }

    /// Of a request's first block only.
    fn salt_key(&self) -> impl Iterator<Item = Key<'_>> {
        Some(&*self.cache_salt).filter(|salt| !salt.is_empty()).map(Key::CacheSalt).into_iter()
    }

    fn restart(&mut self) {
        self.blocks = 0;
        self.tokens.drop_front(self.tokens.len());
    }

    fn completes(&self, size: usize, tokens: usize) -> usize {
        self.tokens.len().saturating_add(tokens).saturating_sub(self.lookahead) / size
    }

    /// `hashes` has room for what the tokens complete.
    fn append(&mut self, chain: &mut Chain, mut tokens: Tokens<'_>, hashes: &mut [u8]) {
        let size = chain.size();
        let needed = size.saturating_add(self.lookahead);
        let mut feature =
            if chain.is_first() { 0 } else { mm_resume(&self.mm_features, self.position(size)) };
        let mut slots = hashes.chunks_exact_mut(chain.hash_bytes());
        while !tokens.is_empty() {
            let part = tokens.take(needed - self.tokens.len());
            self.tokens.push(part, chain.encoding());
            if self.tokens.len() == needed {
                let hash = self.close(chain, &mut feature);
                if let Some(slot) = slots.next() {
                    slot.copy_from_slice(&hash[..slot.len()]);
                }
            }
        }
    }

    /// The hash of the next block, whose tokens and lookahead are there. `feature` is the item to begin
    /// with, then that of the block after it.
    fn close(&mut self, chain: &mut Chain, feature: &mut usize) -> [u8; 32] {
        let size = chain.size();
        let start = self.position(size);
        let end = start + size as i128;

        let mut keys: Vec<Key<'_>> = self.lora_key().collect();
        let covered = end + self.lookahead as i128;
        *feature = mm_keys(&self.mm_features, start, covered, *feature, &mut keys);
        if self.lookahead > 0 {
            *feature = mm_rewind(&self.mm_features, end, *feature);
        }
        if chain.is_first() {
            keys.extend(self.salt_key());
        }
        if let Some(digests) = &self.embeds {
            keys.extend(digests.get(self.blocks).or(digests.last()).map(Key::PromptEmbeds));
        }

        let (block, after) = self.tokens.split(size);
        let hash = chain.link(block, &keys, Lookahead { count: self.lookahead, bytes: after });
        self.tokens.drop_front(size);
        self.blocks += 1;
        hash
    }

    /// The next block's first token.
    fn position(&self, size: usize) -> i128 {
        self.blocks as i128 * size as i128
    }
}

fn check_text(what: &str, text: &str) -> Result<()> {
    if text.len() <= TEXT_BYTES_MAX {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "a {what} has at most {TEXT_BYTES_MAX} bytes, this one has {}",
        text.len()
    )))
}
