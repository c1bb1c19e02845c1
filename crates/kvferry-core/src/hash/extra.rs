//! What a block's hash covers besides the block's tokens: vLLM's extra keys.

use sha2::{Digest as _, Sha256};

use crate::{Error, Result};

/// A LoRA adapter as vLLM knows it: both are part of every block's hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lora {
    /// `lora_name`.
    pub name: String,
    /// `lora_path`.
    pub path: String,
}

/// A multimodal item as vLLM knows it (`MultiModalFeatureSpec`): part of the hash of each block that
/// its placeholder tokens reach into, with its offset from that block's first token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MmFeature {
    /// `identifier`: the hash of the item's content, behind the adapter's name if that changes it.
    pub identifier: String,
    /// `mm_position.offset`: the first placeholder, counted from the first token that is hashed;
    /// negative when the item began earlier.
    pub offset: i64,
    /// `mm_position.length`: placeholders.
    pub length: u32,
}

impl MmFeature {
    fn end(&self) -> i128 {
        i128::from(self.offset) + i128::from(self.length)
    }
}

/// Embeddings that take the place of a prompt's token ids, vLLM's `prompt_embeds`: a tensor of a row
/// for each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptEmbeds<'a> {
    /// The rows in order, from that of the first token that is hashed on; elements little endian.
    pub data: &'a [u8],
    /// Bytes of a row, at least 1: hidden size times bytes of an element.
    pub bytes_per_token: u32,
}

impl PromptEmbeds<'_> {
    /// Of each block of `size` tokens that has a row: the digest of its rows and of those of the
    /// `lookahead` tokens after it, as far as there are any.
    pub(super) fn digests(&self, size: usize, lookahead: usize) -> Result<Vec<[u8; 32]>> {
        let Self { data, bytes_per_token } = *self;
        let row = bytes_per_token as usize;
        if row == 0 {
            return Err(Error::invalid(
                "prompt embeds of 0 bytes per token: it is the hidden size times the bytes of an \
                 element",
            ));
        }
        if !data.len().is_multiple_of(row) {
            return Err(Error::invalid(format!(
                "prompt embeds of {} bytes are no whole number of rows of {row} bytes: pass the \
                 rows of all prompt tokens",
                data.len()
            )));
        }
        let block = size.saturating_mul(row);
        let covered = size.saturating_add(lookahead).saturating_mul(row);
        let starts = (0..data.len()).step_by(block);
        Ok(starts
            .map(|at| Sha256::digest(&data[at..data.len().min(at.saturating_add(covered))]).into())
            .collect())
    }
}

/// The digest of a block that embeddings do not reach into.
pub(super) fn no_rows() -> [u8; 32] {
    Sha256::digest([]).into()
}

/// One of a block's extra keys: a tuple that begins with its tag.
#[derive(Debug, Clone, Copy)]
pub(super) enum Key<'a> {
    Lora(&'a Lora),
    /// The identifier, and the item's offset from the block's first token.
    Mm(&'a str, i128),
    CacheSalt(&'a str),
    PromptEmbeds(&'a [u8; 32]),
}

/// An element of a [`Key`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Item<'a> {
    /// A literal of vLLM's source: the same Python object wherever it occurs.
    Tag(&'static str),
    /// A text of the request: a Python object of its own.
    Text(&'a str),
    Integer(i128),
    Bytes(&'a [u8]),
}

impl<'a> Key<'a> {
    /// Calls `write` with the tuple's elements.
    pub(super) fn with_items(self, write: impl FnOnce(&[Item<'a>])) {
        use Item::{Bytes, Integer, Tag, Text};
        match self {
            Self::Lora(Lora { name, path }) => write(&[Tag("lora"), Text(name), Text(path)]),
            Self::Mm(identifier, offset) => write(&[Tag("mm"), Text(identifier), Integer(offset)]),
            Self::CacheSalt(salt) => write(&[Tag("cache_salt"), Text(salt)]),
            Self::PromptEmbeds(digest) => write(&[Tag("prompt_embeds"), Bytes(digest)]),
        }
    }
}

/// The tokens after a block that its hash covers, encoded.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lookahead<'a> {
    pub(super) count: usize,
    pub(super) bytes: &'a [u8],
}

/// Adds the keys of the items in the tokens `start..end`, of which those before `at` need not be
/// looked at, and returns the item to go on with at `end`.
///
/// This is `_gen_mm_extra_hash_keys`, step by step: vLLM takes items in any order and place, although
/// it expects them sorted and apart, and what it makes of others follows from these steps only.
pub(super) fn mm_keys<'a>(
    features: &'a [MmFeature],
    start: i128,
    end: i128,
    mut at: usize,
    keys: &mut Vec<Key<'a>>,
) -> usize {
    if features.last().is_none_or(|last| last.end() <= start) {
        return at;
    }
    while let Some(feature) = features.get(at) {
        let offset = i128::from(feature.offset);
        if offset >= end {
            break;
        }
        if feature.end() > start {
            keys.push(Key::Mm(&feature.identifier, offset - start));
            if feature.end() > end {
                break;
            }
        }
        at += 1;
    }
    at
}

/// The item to begin with when hashing goes on at `start`, after a block: the `lo` of vLLM's
/// `get_mm_features_in_window`, a bisection that items in any order must get the same result of.
pub(super) fn mm_resume(features: &[MmFeature], start: i128) -> usize {
    if features.last().is_none_or(|last| last.end() <= start) {
        return 0;
    }
    let (mut low, mut high) = (0, features.len());
    while low < high {
        let middle = low.midpoint(high);
        if features[middle].end() <= start {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// The item to go on with after a block that ends at `end`, when its lookahead went on to `at`:
/// vLLM's `generate_lookahead_block_hash_extra_keys`.
pub(super) fn mm_rewind(features: &[MmFeature], end: i128, mut at: usize) -> usize {
    while at > 0 && features[at - 1].end() > end {
        at -= 1;
    }
    at
}
