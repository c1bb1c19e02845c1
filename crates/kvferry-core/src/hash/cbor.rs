//! CBOR (RFC 8949, preferred serialization) as Python's cbor2 writes it for vLLM: no tags but
//! bignums, no maps, definite lengths.

use num_bigint::{BigInt, Sign};

use super::extra::{Item, Key, Lookahead};
use super::tokens::Buffer;

const UNSIGNED: u8 = 0;
const NEGATIVE: u8 = 1;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const TAG: u8 = 6;
/// Python's None.
const NULL: u8 = 0xf6;

/// Everything up to the tokens: `(parent, (`.
pub(super) fn put_head(parent: &[u8], tokens: usize, out: &mut Buffer) {
    put_item(ARRAY, 3, out);
    put_bytes(parent, out);
    put_item(ARRAY, tokens as u64, out);
}

/// Where the parent's bytes begin in what [`put_head`] writes.
pub(super) const fn parent_at(parent_bytes: usize) -> usize {
    if parent_bytes < 24 { 2 } else { 3 }
}

/// Everything after the tokens: an array of the keys' arrays or, if there is none, None. A lookahead
/// makes that the first item of an array which its tokens follow.
pub(super) fn put_tail(keys: &[Key<'_>], lookahead: Lookahead<'_>, out: &mut Buffer) {
    if lookahead.count > 0 {
        put_item(ARRAY, 1 + lookahead.count as u64, out);
    }
    if keys.is_empty() {
        out.put(&[NULL]);
    } else {
        put_item(ARRAY, keys.len() as u64, out);
    }
    for key in keys {
        key.with_items(|items| {
            put_item(ARRAY, items.len() as u64, out);
            for item in items {
                match *item {
                    Item::Tag(text) | Item::Text(text) => put_text(text, out),
                    Item::Integer(value) => put_integer(&value.into(), out),
                    Item::Bytes(bytes) => put_bytes(bytes, out),
                }
            }
        });
    }
    out.put(lookahead.bytes);
}

/// The head of an item: major type and argument, in the shortest form.
fn put_item(major: u8, argument: u64, out: &mut Buffer) {
    let major = major << 5;
    let bytes = argument.to_be_bytes();
    let (info, skip) = match argument {
        0..24 => {
            out.put(&[major | bytes[7]]);
            return;
        }
        24..=0xff => (24, 7),
        0x100..=0xffff => (25, 6),
        0x1_0000..=0xffff_ffff => (26, 4),
        _ => (27, 0),
    };
    out.put(&[major | info]);
    out.put(&bytes[skip..]);
}

fn put_bytes(bytes: &[u8], out: &mut Buffer) {
    put_item(BYTES, bytes.len() as u64, out);
    out.put(bytes);
}

pub(super) fn put_text(text: &str, out: &mut Buffer) {
    put_item(TEXT, text.len() as u64, out);
    out.put(text.as_bytes());
}

pub(super) fn put_integer(value: &BigInt, out: &mut Buffer) {
    // A negative integer n is written as its distance from -1.
    let (major, argument) = match value.sign() {
        Sign::Minus => (NEGATIVE, (-(value + 1u32)).into_parts().1),
        _ => (UNSIGNED, value.magnitude().clone()),
    };
    match u64::try_from(&argument) {
        Ok(small) => put_item(major, small, out),
        Err(_) => {
            put_item(TAG, 2 + u64::from(major), out);
            put_bytes(&argument.to_bytes_be(), out);
        }
    }
}

/// Writes the integers of an array and returns their length. `out` has 8 bytes for each and 8 more.
///
/// Free of branches: each token is stored as a word of eight bytes, of which the next overwrites
/// what its length does not cover. Lengths of real tokens are too random for a branch predictor.
#[inline]
pub(super) fn put_u32s(ids: &[u32], out: &mut [u8]) -> usize {
    // By class of length: the head and the value's place, moved to the top of the word, and the bytes.
    const HEAD: [u64; 4] = [0, 0x18 << 56, 0x19 << 56, 0x1a << 56];
    const SHIFT: [u8; 4] = [56, 48, 40, 24];
    const BYTES: [u8; 4] = [1, 2, 3, 5];
    let mut at = 0;
    for &id in ids {
        let class = usize::from(id >= 24) + usize::from(id > 0xff) + usize::from(id > 0xffff);
        let word = HEAD[class] | u64::from(id) << SHIFT[class];
        out[at..at + 8].copy_from_slice(&word.to_be_bytes());
        at += usize::from(BYTES[class]);
    }
    at
}
