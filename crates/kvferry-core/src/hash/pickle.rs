//! The bytes that CPython's `pickle.dumps(…, protocol=5)` gives for vLLM's hash inputs: tuples of
//! bytes, integers, text and None. Only written, never read.
//!
//! Pickle refers back to an object that it has written before, so the bytes depend on the identity
//! of objects: two equal strings give other bytes when they are one object. Here every string is an
//! object of its own, except the empty one and single Latin-1 characters, which CPython shares, and
//! the tags of vLLM's keys, each of which is one literal.

use num_bigint::BigInt;

use super::extra::{Item, Key, Lookahead};
use super::tokens::Buffer;

const BINBYTES_SHORT: u8 = 0x43;
const BINBYTES: u8 = 0x42;
const BINGET: u8 = 0x68;
const BININT: u8 = 0x4a;
const BININT1: u8 = 0x4b;
const BININT2: u8 = 0x4d;
const FRAME: u8 = 0x95;
const LONG1: u8 = 0x8a;
const LONG4: u8 = 0x8b;
const LONG_BINGET: u8 = 0x6a;
const MARK: u8 = 0x28;
const MEMOIZE: u8 = 0x94;
const NONE: u8 = 0x4e;
const PROTO: u8 = 0x80;
const STOP: u8 = 0x2e;
const TEXT: u8 = 0x58;
const TEXT_SHORT: u8 = 0x8c;
const TUPLE: u8 = 0x74;
const TUPLE1: u8 = 0x85;
const TUPLE2: u8 = 0x86;
const TUPLE3: u8 = 0x87;

/// Protocol, then a frame whose length is patched in by [`close`].
const HEAD: [u8; 11] = [PROTO, 5, FRAME, 0, 0, 0, 0, 0, 0, 0, 0];
/// Bytes after which CPython begins a new frame, at the next object.
const FRAME_BYTES: usize = 64 * 1024;

/// Everything up to the tokens: `(parent, (`.
pub(super) fn put_head(parent: &[u8], tokens: usize, out: &mut Buffer) {
    out.put(&HEAD);
    put_sized(BINBYTES_SHORT, BINBYTES, parent, out);
    out.put(&[MEMOIZE]);
    put_tuple_start(tokens, out);
}

/// Where the parent's bytes begin in what [`put_head`] writes.
pub(super) const PARENT_AT: usize = HEAD.len() + 2;

/// Everything after the tokens: `), extra)`, where `extra` is a tuple of the keys' tuples or, if there
/// is none, None. A lookahead makes that the first item of a tuple which its tokens follow.
pub(super) fn put_tail(
    tokens: usize,
    keys: &[Key<'_>],
    lookahead: Lookahead<'_>,
    out: &mut Buffer,
) {
    put_tuple_end(tokens, out);
    if lookahead.count > 0 {
        put_tuple_start(1 + lookahead.count, out);
    }
    if keys.is_empty() {
        out.put(&[NONE]);
    } else {
        // The parent and the tuple of tokens are objects 0 and 1.
        let mut memo = Memo { next: 2, shared: Vec::new() };
        put_tuple_start(keys.len(), out);
        for key in keys {
            key.with_items(|items| {
                put_tuple_start(items.len(), out);
                for item in items {
                    memo.put_item(*item, out);
                }
                put_tuple_end(items.len(), out);
            });
            memo.next += 1;
        }
        put_tuple_end(keys.len(), out);
    }
    if lookahead.count > 0 {
        out.put(lookahead.bytes);
        put_tuple_end(1 + lookahead.count, out);
    }
    put_tuple_end(3, out);
    out.put(&[STOP]);
}

/// The pickle of one text: the input of vLLM's NONE_HASH.
pub(super) fn put_seed(seed: &str, out: &mut Buffer) {
    out.put(&HEAD);
    Memo::default().put_item(Item::Text(seed), out);
    out.put(&[STOP]);
    close(out);
}

/// Sets the frame's length, or splits what is longer than a frame as CPython does.
#[inline]
pub(super) fn close(message: &mut Buffer) {
    let body = message.len - HEAD.len();
    if body >= FRAME_BYTES {
        *message = split_frames(&message.written()[HEAD.len()..]);
    } else {
        message.written_mut()[3..11].copy_from_slice(&(body as u64).to_le_bytes());
    }
}

/// The objects that a pickle can refer back to.
#[derive(Default)]
struct Memo<'a> {
    next: u32,
    /// Those that may come again, and whether each is a tag: an equal text is another object.
    shared: Vec<(bool, &'a str, u32)>,
}

impl<'a> Memo<'a> {
    fn put_item(&mut self, item: Item<'a>, out: &mut Buffer) {
        match item {
            Item::Tag(text) => self.put_text(true, text, out),
            Item::Text(text) => self.put_text(false, text, out),
            Item::Integer(value) => put_integer(&value.into(), out),
            Item::Bytes(bytes) => {
                put_sized(BINBYTES_SHORT, BINBYTES, bytes, out);
                out.put(&[MEMOIZE]);
                self.next += 1;
            }
        }
    }

    fn put_text(&mut self, tag: bool, text: &'a str, out: &mut Buffer) {
        let known = self.shared.iter().find(|known| (known.0, known.1) == (tag, text));
        if let Some(&(_, _, index)) = known {
            match u8::try_from(index) {
                Ok(index) => out.put(&[BINGET, index]),
                Err(_) => {
                    out.put(&[LONG_BINGET]);
                    out.put(&index.to_le_bytes());
                }
            }
            return;
        }
        put_sized(TEXT_SHORT, TEXT, text.as_bytes(), out);
        out.put(&[MEMOIZE]);
        let mut chars = text.chars();
        if tag || chars.next().is_none_or(|c| u32::from(c) <= 0xff && chars.next().is_none()) {
            self.shared.push((tag, text, self.next));
        }
        self.next += 1;
    }
}

fn put_sized(short: u8, long: u8, bytes: &[u8], out: &mut Buffer) {
    match u8::try_from(bytes.len()) {
        Ok(len) => out.put(&[short, len]),
        Err(_) => put_long(long, bytes.len(), out),
    }
    out.put(bytes);
}

/// An opcode and a length of four bytes.
fn put_long(opcode: u8, len: usize, out: &mut Buffer) {
    out.put(&[opcode]);
    out.put(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
}

fn put_tuple_start(items: usize, out: &mut Buffer) {
    if items > 3 {
        out.put(&[MARK]);
    }
}

fn put_tuple_end(items: usize, out: &mut Buffer) {
    match items {
        1 => out.put(&[TUPLE1]),
        2 => out.put(&[TUPLE2]),
        3 => out.put(&[TUPLE3]),
        _ => out.put(&[TUPLE]),
    }
    out.put(&[MEMOIZE]);
}

pub(super) fn put_integer(value: &BigInt, out: &mut Buffer) {
    if let Ok(small) = u8::try_from(value) {
        out.put(&[BININT1, small]);
    } else if let Ok(small) = u16::try_from(value) {
        out.put(&[BININT2]);
        out.put(&small.to_le_bytes());
    } else if let Ok(small) = i32::try_from(value) {
        out.put(&[BININT]);
        out.put(&small.to_le_bytes());
    } else {
        put_sized(LONG1, LONG4, &value.to_signed_bytes_le(), out);
    }
}

/// Writes the integers of a tuple and returns their length. `out` has 8 bytes for each and 8 more.
/// Free of branches for the reason that `cbor::put_u32s` gives.
#[inline]
pub(super) fn put_u32s(ids: &[u32], out: &mut [u8]) -> usize {
    // By class of length: the opcode, the value's place after it, and the bytes.
    const OPCODE: [u64; 4] = [BININT1 as u64, BININT2 as u64, BININT as u64, LONG1 as u64 | 5 << 8];
    const SHIFT: [u8; 4] = [8, 8, 8, 16];
    const BYTES: [u8; 4] = [2, 3, 5, 7];
    let mut at = 0;
    for &id in ids {
        let class = usize::from(id > 0xff) + usize::from(id > 0xffff) + usize::from(id >> 31 != 0);
        let word = OPCODE[class] | u64::from(id) << SHIFT[class];
        out[at..at + 8].copy_from_slice(&word.to_le_bytes());
        at += usize::from(BYTES[class]);
    }
    at
}

/// CPython ends a frame before the first object at which it holds [`FRAME_BYTES`]; a rest below four
/// bytes has no frame.
fn split_frames(body: &[u8]) -> Buffer {
    let mut out = Buffer::default();
    out.put(&HEAD[..2]);
    let mut put_frame = |frame: &[u8]| {
        if frame.len() >= 4 {
            out.put(&[FRAME]);
            out.put(&(frame.len() as u64).to_le_bytes());
        }
        out.put(frame);
    };
    let (mut start, mut at) = (0, 0);
    while let Some(&opcode) = body.get(at) {
        let is_object = !matches!(opcode, MEMOIZE | TUPLE | TUPLE1..=TUPLE3 | STOP);
        if is_object && at - start >= FRAME_BYTES {
            put_frame(&body[start..at]);
            start = at;
        }
        let byte_len = || usize::from(body.get(at + 1).copied().unwrap_or(0));
        let word_len = || {
            body.get(at + 1..at + 5).map_or(0, |len| {
                len.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
            })
        };
        at += match opcode {
            BININT1 | BINGET => 2,
            BININT2 => 3,
            BININT | LONG_BINGET => 5,
            LONG1 | TEXT_SHORT | BINBYTES_SHORT => 2 + byte_len(),
            LONG4 | TEXT => 5 + word_len(),
            _ => 1,
        };
    }
    put_frame(&body[start..]);
    out
}
