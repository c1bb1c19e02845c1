//! Chunk hashes, bit-equal to LMCache's `TokenHasher`: only complete chunks have one. Neither salt nor
//! model nor rank is hashed; they are fields of the object's key.

use super::chain::{Chain, Digest};
use super::tokens::{Encoding, Tokens};
use crate::{Error, Result};

/// What an unset `PYTHONHASHSEED` stands for.
pub(super) const DEFAULT_SEED: &str = "vllm-none-hash";

/// How chunks are hashed; LMCache's `--hash-algorithm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ChunkAlgorithm {
    /// BLAKE3 over the hash before and the tokens as big-endian `u32`. Takes no other tokens.
    #[default]
    Blake3,
    /// SHA-256 over the CBOR of `(hash before, tokens, None)`, as vLLM hashes blocks.
    Sha256Cbor,
}

impl ChunkAlgorithm {
    /// The algorithm that LMCache calls `name`.
    pub fn from_name(name: &str) -> Result<Self> {
        Ok(match name {
            "blake3" => Self::Blake3,
            "sha256_cbor" => Self::Sha256Cbor,
            _ => {
                return Err(Error::invalid(format!(
                    "chunk hash algorithm {name:?}: use blake3 or sha256_cbor"
                )));
            }
        })
    }
}

/// Hashes the chunks of prompts: 32 bytes each.
#[derive(Debug, Clone)]
pub struct ChunkHasher {
    start: Chain,
}

impl ChunkHasher {
    /// Chunks of `chunk_size` tokens, at least 1.
    pub fn new(algorithm: ChunkAlgorithm, chunk_size: u32) -> Result<Self> {
        if chunk_size == 0 {
            return Err(Error::invalid("chunk size 0: a chunk has at least 1 token, 256 usually"));
        }
        let (encoding, digest) = match algorithm {
            ChunkAlgorithm::Blake3 => (Encoding::BigEndian, Digest::Blake3),
            ChunkAlgorithm::Sha256Cbor => (Encoding::Cbor, Digest::Sha256),
        };
        let start = Chain::new(encoding, digest, chunk_size as usize, DEFAULT_SEED, [&[], &[]]);
        Ok(Self { start })
    }

    /// Appends the hash of each complete chunk of `tokens`, the whole prompt, that `hashes` does not
    /// have yet: `hashes` holds those of the leading chunks, as an earlier call left them.
    pub fn extend(&self, hashes: &mut Vec<[u8; 32]>, tokens: &[u32]) {
        let complete = tokens.len() / self.start.size();
        if complete <= hashes.len() {
            return;
        }
        let mut chain = self.start.clone();
        if let Some(last) = hashes.last() {
            chain.resume(last);
        }
        let new = &tokens[hashes.len() * self.start.size()..complete * self.start.size()];
        hashes.reserve(complete - hashes.len());
        chain.append(new.into(), |hash| hashes.push(*hash));
    }
}

/// The chunk hashes of one growing prompt: tokens come in parts of any length, each is hashed once.
#[derive(Debug, Clone)]
pub struct ChunkStream {
    chain: Chain,
}

impl ChunkStream {
    /// Starts at the prompt's first token.
    pub fn new(hasher: &ChunkHasher) -> Self {
        Self { chain: hasher.start.clone() }
    }

    /// Continues after the chunk whose hash is `parent`, with no token of the next one. Errors, and
    /// changes nothing, when `parent` has not 32 bytes.
    pub fn resume(&mut self, parent: &[u8]) -> Result<()> {
        self.chain.check_hash(parent)?;
        self.chain.resume(parent);
        Ok(())
    }

    /// How many chunks `tokens` more tokens complete.
    pub fn completes(&self, tokens: usize) -> usize {
        self.chain.completes(tokens)
    }

    /// Adds tokens and writes the hash of each chunk that they complete to `hashes`, one after the
    /// other; returns how many. Errors, and changes nothing, when `hashes` is too short or when a token
    /// is not a `u32` under [`ChunkAlgorithm::Blake3`].
    pub fn append<'a>(
        &mut self,
        tokens: impl Into<Tokens<'a>>,
        hashes: &mut [u8],
    ) -> Result<usize> {
        self.chain.append_into(tokens.into(), hashes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_growing_prompt_hashes_only_its_new_chunks() {
        for algorithm in [ChunkAlgorithm::Blake3, ChunkAlgorithm::Sha256Cbor] {
            let hasher = ChunkHasher::new(algorithm, 4).unwrap();
            let tokens: Vec<u32> = (0..30).map(|i| i * 70_001).collect();
            let mut whole = Vec::new();
            hasher.extend(&mut whole, &tokens);
            assert_eq!(whole.len(), 7, "two tokens are no chunk");

            let mut grown = Vec::new();
            for end in [0, 3, 4, 5, 17, 30] {
                hasher.extend(&mut grown, &tokens[..end]);
                assert_eq!(grown, whole[..end / 4]);
            }
            // What is there is trusted, not computed again.
            let mut marked = vec![[7; 32]];
            hasher.extend(&mut marked, &tokens[..8]);
            assert_eq!(marked[0], [7; 32]);
            assert_ne!(marked[1], whole[1]);
            hasher.extend(&mut marked, &tokens[..4]);
            assert_eq!(marked.len(), 2, "a shorter prompt takes nothing away");
        }
    }

    #[test]
    fn a_chunk_of_no_tokens_is_refused() {
        assert!(ChunkHasher::new(ChunkAlgorithm::Blake3, 0).is_err());
    }
}
