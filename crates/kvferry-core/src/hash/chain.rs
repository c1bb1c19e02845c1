//! A chain of hashes over token ids: each link covers the hash before it, a fixed number of tokens
//! and, for engine blocks, extra keys.

use sha2::block_api::compress256;
use xxhash_rust::xxh3::xxh3_128;

use super::extra::{Key, Lookahead};
use super::tokens::{Buffer, Encoding, Tokens};
use super::{cbor, pickle};
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Digest {
    Blake3,
    Sha256,
    /// XXH3-128, seed 0, most significant byte first.
    Xxh3,
}

impl Digest {
    /// Bytes.
    pub(super) const fn size(self) -> usize {
        match self {
            Self::Blake3 | Self::Sha256 => 32,
            Self::Xxh3 => 16,
        }
    }

    /// The digest, in the first [`Digest::size`] bytes.
    #[inline]
    fn of(self, message: &mut Buffer) -> [u8; 32] {
        match self {
            Self::Blake3 => *blake3::hash(message.written()).as_bytes(),
            Self::Sha256 => sha256(message),
            Self::Xxh3 => {
                let mut digest = [0; 32];
                digest[..16].copy_from_slice(&xxh3_128(message.written()).to_be_bytes());
                digest
            }
        }
    }
}

/// SHA-256 (FIPS 180-4), padded in place: a message of two blocks is hashed a quarter faster than by
/// copying it through a hasher's own buffer.
#[inline]
fn sha256(message: &mut Buffer) -> [u8; 32] {
    let mut state = [
        0x6a09_e667,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];
    let bits = message.len as u64 * 8;
    // A one bit, zeros to the end of a block, and in its last eight bytes the message's length.
    let padding = 64 - (message.len + 8) % 64 + 8;
    let room = message.room(padding);
    room[0] = 0x80;
    room[1..padding - 8].fill(0);
    room[padding - 8..padding].copy_from_slice(&bits.to_be_bytes());
    message.len += padding;
    compress256(&mut state, message.written().as_chunks().0);

    let mut digest = [0; 32];
    for (bytes, word) in digest.as_chunks_mut().0.iter_mut().zip(state) {
        *bytes = word.to_be_bytes();
    }
    digest
}

/// The state between two links. Tokens are encoded as they come, so a link may be given in parts.
#[derive(Debug, Clone)]
pub(super) struct Chain {
    encoding: Encoding,
    digest: Digest,
    /// Tokens of a link.
    size: usize,
    /// What follows the tokens: of the first link, and of the others.
    tails: [Vec<u8>; 2],
    /// The link's bytes so far: a head of `head` bytes with the parent's hash, then tokens.
    message: Buffer,
    head: usize,
    /// Tokens of the link so far.
    pending: usize,
    /// No link is done yet.
    first: bool,
}

impl Chain {
    /// A chain whose tuples end with `extra`: of the first link, and of the others.
    pub(super) fn new(
        encoding: Encoding,
        digest: Digest,
        size: usize,
        seed: &str,
        extra: [&[Key<'_>]; 2],
    ) -> Self {
        let mut message = Buffer::default();
        match encoding {
            Encoding::BigEndian => message.put(&[0; 12]), // i64 0, u32 0
            Encoding::Cbor => cbor::put_text(seed, &mut message),
            Encoding::Pickle => pickle::put_seed(seed, &mut message),
        }
        let none_hash = digest.of(&mut message);
        let parent = &none_hash[..digest.size()];

        message.len = 0;
        match encoding {
            Encoding::BigEndian => message.put(parent),
            Encoding::Cbor => cbor::put_head(parent, size, &mut message),
            Encoding::Pickle => pickle::put_head(parent, size, &mut message),
        }
        let tails = extra.map(|keys| {
            let mut tail = Buffer::default();
            encoding.put_tail(size, keys, Lookahead::default(), &mut tail);
            tail.written().to_vec()
        });
        let head = message.len;
        Self { encoding, digest, size, tails, message, head, pending: 0, first: true }
    }

    /// How tokens are encoded.
    pub(super) fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Whether no link is done yet.
    pub(super) fn is_first(&self) -> bool {
        self.first
    }

    /// Tokens of a link.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Bytes of a hash.
    pub(super) fn hash_bytes(&self) -> usize {
        self.digest.size()
    }

    /// Links that `tokens` more tokens complete.
    pub(super) fn completes(&self, tokens: usize) -> usize {
        self.pending.saturating_add(tokens) / self.size
    }

    /// An error when `hash` has not the length of this chain's hashes.
    pub(super) fn check_hash(&self, hash: &[u8]) -> Result<()> {
        if hash.len() == self.hash_bytes() {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "a parent hash of {} bytes: hashes of this algorithm have {}",
            hash.len(),
            self.hash_bytes()
        )))
    }

    /// Continues after the link with this hash, which has at least [`Chain::hash_bytes`] bytes.
    pub(super) fn resume(&mut self, parent: &[u8]) {
        let at = self.parent_at();
        let size = self.digest.size();
        self.message.written_mut()[at..at + size].copy_from_slice(&parent[..size]);
        self.message.len = self.head;
        self.pending = 0;
        self.first = false;
    }

    /// Adds tokens and calls `emit` with the hash of each link that they complete, in its first
    /// [`Chain::hash_bytes`] bytes.
    #[inline]
    pub(super) fn append(&mut self, mut tokens: Tokens<'_>, mut emit: impl FnMut(&[u8; 32])) {
        while !tokens.is_empty() {
            let part = tokens.take(self.size - self.pending);
            self.pending += part.len();
            part.encode(self.encoding, &mut self.message);
            if self.pending == self.size {
                emit(&self.close());
            }
        }
    }

    /// [`Chain::append`] into `hashes`, one after the other; how many. On an error nothing has changed.
    pub(super) fn append_into(&mut self, tokens: Tokens<'_>, hashes: &mut [u8]) -> Result<usize> {
        if self.encoding == Encoding::BigEndian {
            tokens.check_u32()?;
        }
        let size = self.hash_bytes();
        let count = self.completes(tokens.len());
        self.check_room(count, hashes)?;
        let mut slots = hashes.chunks_exact_mut(size);
        self.append(tokens, |hash| {
            if let Some(slot) = slots.next() {
                slot.copy_from_slice(&hash[..size]);
            }
        });
        Ok(count)
    }

    /// An error when `count` hashes do not fit into `hashes`.
    pub(super) fn check_room(&self, count: usize, hashes: &[u8]) -> Result<()> {
        let (size, available) = (self.hash_bytes(), hashes.len());
        if available / size >= count {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{count} hashes need {} bytes, but there are {available}",
            count * size
        )))
    }

    /// The hash of the next link, whose tokens are encoded already and whose tail is its own. Not
    /// inlined, so that [`Chain::append`] is.
    #[inline(never)]
    pub(super) fn link(
        &mut self,
        tokens: &[u8],
        keys: &[Key<'_>],
        lookahead: Lookahead<'_>,
    ) -> [u8; 32] {
        self.message.put(tokens);
        self.encoding.put_tail(self.size, keys, lookahead, &mut self.message);
        self.digest_message()
    }

    #[inline]
    fn close(&mut self) -> [u8; 32] {
        let tail = &self.tails[usize::from(!self.first)];
        self.message.put(tail);
        self.digest_message()
    }

    #[inline(always)]
    fn digest_message(&mut self) -> [u8; 32] {
        if self.encoding == Encoding::Pickle {
            pickle::close(&mut self.message);
        }
        let hash = self.digest.of(&mut self.message);
        self.resume(&hash);
        hash
    }

    const fn parent_at(&self) -> usize {
        match self.encoding {
            Encoding::BigEndian => 0,
            Encoding::Cbor => cbor::parent_at(self.digest.size()),
            Encoding::Pickle => pickle::PARENT_AT,
        }
    }
}

impl Encoding {
    /// What follows the tokens of a link.
    fn put_tail(self, size: usize, keys: &[Key<'_>], lookahead: Lookahead<'_>, out: &mut Buffer) {
        match self {
            Self::BigEndian => {}
            Self::Cbor => cbor::put_tail(keys, lookahead, out),
            Self::Pickle => pickle::put_tail(size, keys, lookahead, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::*;

    #[test]
    fn sha256_pads_messages_of_every_length() {
        let bytes: Vec<u8> = (0..=200).collect();
        let mut message = Buffer::default();
        message.put(&[0xff; 300]); // what an earlier message left
        for len in 0..bytes.len() {
            message.len = 0;
            message.put(&bytes[..len]);
            assert_eq!(sha256(&mut message)[..], Sha256::digest(&bytes[..len])[..], "{len} bytes");
        }
    }
}
