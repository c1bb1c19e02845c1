//! Token ids: `u32` on the hot path, integers of any size and sign beside it.

use num_bigint::BigInt;

use super::{cbor, pickle};
use crate::{Error, ErrorCode, Result};

/// Token ids as the caller has them; `&[u32]` and `&[BigInt]` convert into it.
#[derive(Debug, Clone, Copy)]
pub enum Tokens<'a> {
    /// The fast path.
    U32(&'a [u32]),
    /// What Python engines accept beyond it: any size, any sign.
    Integers(&'a [BigInt]),
}

impl<'a> From<&'a [u32]> for Tokens<'a> {
    fn from(ids: &'a [u32]) -> Self {
        Self::U32(ids)
    }
}

impl<'a> From<&'a [BigInt]> for Tokens<'a> {
    fn from(ids: &'a [BigInt]) -> Self {
        Self::Integers(ids)
    }
}

impl Tokens<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::U32(ids) => ids.len(),
            Self::Integers(ids) => ids.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An error that names the first token outside of `u32`.
    pub(super) fn check_u32(&self) -> Result<()> {
        let Self::Integers(ids) = self else { return Ok(()) };
        let Some(position) = ids.iter().position(|id| u32::try_from(id).is_err()) else {
            return Ok(());
        };
        let id = &ids[position];
        let id = match id.bits() {
            0..=128 => id.to_string(),
            bits => format!("an integer of {bits} bits"), // may be far too long to print
        };
        Err(Error::new(
            ErrorCode::InvalidToken,
            format!(
                "the token at position {position} is {id}, but blake3 hashes take 0..={}; use \
                 sha256_cbor for other integers",
                u32::MAX
            ),
        ))
    }

    /// Takes the first `count` (at most all) off the front.
    #[inline]
    pub(super) fn take(&mut self, count: usize) -> Self {
        match self {
            Self::U32(ids) => {
                let (head, rest) = ids.split_at(count.min(ids.len()));
                *ids = rest;
                Self::U32(head)
            }
            Self::Integers(ids) => {
                let (head, rest) = ids.split_at(count.min(ids.len()));
                *ids = rest;
                Self::Integers(head)
            }
        }
    }

    #[inline(always)]
    pub(super) fn encode(self, encoding: Encoding, out: &mut Buffer) {
        match self {
            Self::U32(ids) => {
                // Encoders store eight bytes for each token and advance by what it needs.
                let room = out.room((ids.len() + 1) * size_of::<u64>());
                out.len += match encoding {
                    Encoding::BigEndian => put_big_endian(ids, room),
                    Encoding::Cbor => cbor::put_u32s(ids, room),
                    Encoding::Pickle => pickle::put_u32s(ids, room),
                };
            }
            Self::Integers(ids) => {
                for id in ids {
                    match encoding {
                        // The one digit of what `check_u32` let through.
                        Encoding::BigEndian => {
                            out.put(&id.iter_u32_digits().next().unwrap_or(0).to_be_bytes());
                        }
                        Encoding::Cbor => cbor::put_integer(id, out),
                        Encoding::Pickle => pickle::put_integer(id, out),
                    }
                }
            }
        }
    }
}

/// How the tokens of a chain become bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// Four bytes each, most significant first.
    BigEndian,
    /// RFC 8949, preferred serialization.
    Cbor,
    /// Python's pickle, protocol 5.
    Pickle,
}

/// Encoded tokens, from whose front whole ones can be taken away.
#[derive(Debug, Clone, Default)]
pub(super) struct Encoded {
    bytes: Buffer,
    /// Where each token ends.
    ends: Vec<usize>,
}

impl Encoded {
    /// How many tokens there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Adds tokens at the end.
    pub(super) fn push(&mut self, mut tokens: Tokens<'_>, encoding: Encoding) {
        while !tokens.is_empty() {
            tokens.take(1).encode(encoding, &mut self.bytes);
            self.ends.push(self.bytes.len);
        }
    }

    /// The bytes of the first `count` tokens, at most all, and those of the others.
    pub(super) fn split(&self, count: usize) -> (&[u8], &[u8]) {
        self.bytes.written().split_at(self.end_of(count))
    }

    /// Takes the first `count` tokens, at most all, away.
    pub(super) fn drop_front(&mut self, count: usize) {
        let cut = self.end_of(count);
        self.bytes.drop_front(cut);
        self.ends.drain(..count);
        for end in &mut self.ends {
            *end -= cut;
        }
    }

    /// Where the first `count` tokens end.
    fn end_of(&self, count: usize) -> usize {
        count.checked_sub(1).map_or(0, |last| self.ends[last])
    }
}

/// Bytes that are written at `len`, with room ahead so that encoders can store whole words.
#[derive(Debug, Clone, Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    pub(super) len: usize,
}

impl Buffer {
    /// The bytes after `len`, at least `least` of them.
    #[inline]
    pub(super) fn room(&mut self, least: usize) -> &mut [u8] {
        let end = self.len + least;
        if self.bytes.len() < end {
            self.bytes.resize(end.next_power_of_two(), 0);
        }
        &mut self.bytes[self.len..]
    }

    #[inline]
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    /// Takes the first `count` bytes away.
    pub(super) fn drop_front(&mut self, count: usize) {
        self.bytes.copy_within(count..self.len, 0);
        self.len -= count;
    }

    #[inline]
    pub(super) fn written(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    #[inline]
    pub(super) fn written_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

#[inline]
fn put_big_endian(ids: &[u32], out: &mut [u8]) -> usize {
    for (word, id) in out.as_chunks_mut::<4>().0.iter_mut().zip(ids) {
        *word = id.to_be_bytes();
    }
    ids.len() * 4
}
