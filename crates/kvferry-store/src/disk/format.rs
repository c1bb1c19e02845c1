//! A file of the disk: its name, and the header before its bytes.
//!
//! All numbers are little-endian. A header is one page, or two where the texts need them, filled up with zeroes:
//!
//! | at | bytes | |
//! | --- | --- | --- |
//! | 0 | 8 | `KVFERRY` and a zero |
//! | 8 | 4 | version of the format |
//! | 12 | 4 | bytes of the header |
//! | 16 | 8 | CRC-64/NVME of the header without these eight bytes |
//! | 24 | 8 + 8 | length and CRC-64/NVME of the object |
//! | 40 | 32 + 32 + 4 | identity: chunk, space, rank |
//! | 108 | 1 + 32 | whether there is a parent, and its chunk |
//! | 141 | 4 × 4 | world size, block size, layers, hidden size |
//! | 157 | 1 + 1 + 4 | single plane, whether there is a number of physical slots, and that |
//! | 163 | 3 × (2 + n) | element type, model, salt: length and UTF-8 |
//!
//! The object follows, filled up with zeroes to a whole page.

use std::fmt::Write as _;

use crc_fast::{CrcAlgorithm, Digest};
use kvferry_core::key::{Dtype, Layout};
use kvferry_core::{Error, Result};

use super::Saved;
use crate::index::ObjectId;

/// Transfers around the page cache are of whole pages.
pub(crate) const PAGE: u64 = 4096;
/// Bytes of a header at most.
pub(crate) const HEADER_MAX: usize = 8192;
/// What this version writes, and all that it reads.
pub(crate) const VERSION: u32 = 1;

/// Says up to which sequence number files were cleared.
pub(crate) const CLEARED: &str = "cleared";
pub(crate) const CLEARED_UNFINISHED: &str = "cleared.tmp";
pub(crate) const CLEARED_BYTES: usize = 4096;

const MAGIC: [u8; 8] = *b"KVFERRY\0";
const CLEARED_MAGIC: [u8; 8] = *b"KVCLEAR\0";
const SUM: std::ops::Range<usize> = 16..24;
const TEXTS: usize = 163;
const SUFFIX: &str = ".kv1";
/// Ends the name of a file that is not whole yet.
const UNFINISHED: &str = ".tmp";

/// What a file's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) id: ObjectId,
    /// Of the object.
    pub(crate) length: u64,
    /// Larger for one that was written later: no two files of a directory ever have the same name, so that
    /// removing one never hits its successor.
    pub(crate) sequence: u64,
}

/// Whose a file is, by its name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Object(Named),
    /// A former run did not end it; its sequence number, if it has one.
    Unfinished(u64),
    /// [`CLEARED`].
    Cleared,
    /// Of another version of the format.
    OtherVersion,
    /// Not ours.
    Foreign,
}

impl Named {
    /// Hexadecimal only, whatever the identity was made of.
    pub(crate) fn name(&self) -> String {
        let ObjectId { chunk, space, rank } = &self.id;
        let mut name = String::with_capacity(176);
        for hash in [chunk, space] {
            for byte in hash {
                let _ = write!(name, "{byte:02x}"); // writing into a String cannot fail
            }
            name.push('-');
        }
        let _ = write!(name, "{rank:08x}-{:016x}-{:016x}{SUFFIX}", self.length, self.sequence);
        name
    }

    /// The name while it is written.
    pub(crate) fn unfinished(&self) -> String {
        self.name() + UNFINISHED
    }

    fn parse(name: &str) -> Option<Self> {
        let name = name.strip_suffix(SUFFIX)?;
        let mut parts = name.split('-');
        let mut next = |digits: usize| {
            parts.next().filter(|part| {
                part.len() == digits && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            })
        };
        let id = ObjectId {
            chunk: hash(next(64)?)?,
            space: hash(next(64)?)?,
            rank: u32::from_str_radix(next(8)?, 16).ok()?,
        };
        let length = u64::from_str_radix(next(16)?, 16).ok()?;
        let sequence = u64::from_str_radix(next(16)?, 16).ok()?;
        parts.next().is_none().then_some(Self { id, length, sequence })
    }
}

fn hash(digits: &str) -> Option<[u8; 32]> {
    let mut hash = [0; 32];
    for (byte, at) in hash.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(digits.get(at..at + 2)?, 16).ok()?;
    }
    Some(hash)
}

/// What the file of this name is.
pub(crate) fn kind(name: &str) -> Kind {
    if let Some(named) = Named::parse(name) {
        return Kind::Object(named);
    }
    if name == CLEARED {
        return Kind::Cleared;
    }
    let (stem, unfinished) = match name.strip_suffix(UNFINISHED) {
        Some(stem) => (stem, true),
        None => (name, false),
    };
    let sequence = match Named::parse(stem) {
        Some(named) => Some(named.sequence),
        None => matches!(name, "probe.tmp" | CLEARED_UNFINISHED).then_some(0),
    };
    if let Some(sequence) = sequence.filter(|_| unfinished) {
        return Kind::Unfinished(sequence);
    }
    let version = stem.rsplit_once(".kv").map(|(_, version)| version);
    match version.and_then(|version| version.parse::<u32>().ok()) {
        Some(version) if version != VERSION => Kind::OtherVersion,
        _ => Kind::Foreign,
    }
}

/// Bytes that the object takes after its header, whole pages; `None` when there is no such number.
pub(crate) fn padded(length: u64) -> Option<u64> {
    length.checked_next_multiple_of(PAGE)
}

/// Bytes of the object's header, whole pages.
pub(crate) fn header_bytes(saved: &Saved) -> Result<usize> {
    header_bytes_of(&saved.layout, &saved.cache_salt)
}

/// The same of all objects with this layout and salt.
pub(crate) fn header_bytes_of(layout: &Layout, cache_salt: &str) -> Result<usize> {
    let texts = texts(layout, cache_salt).map(|text| 2 + text.len()).iter().sum::<usize>();
    let bytes = (TEXTS + texts).next_multiple_of(4096);
    if bytes > HEADER_MAX {
        return Err(Error::invalid(format!(
            "the names of an object's model and salt have {texts} bytes, more than a header holds"
        )));
    }
    Ok(bytes)
}

fn texts<'a>(layout: &'a Layout, cache_salt: &'a str) -> [&'a str; 3] {
    [layout.dtype.name(), &layout.model_name, cache_salt]
}

/// Writes the header of an object with these bytes and checksum; `header` has [`header_bytes`].
pub(crate) fn encode(saved: &Saved, length: u64, checksum: u64, header: &mut [u8]) {
    let Saved { chunk, space, rank, parent, layout, .. } = saved;
    let bytes = u32::try_from(header.len()).unwrap_or(u32::MAX);
    header.fill(0);
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        header[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&MAGIC);
    put(&VERSION.to_le_bytes());
    put(&bytes.to_le_bytes());
    put(&[0; 8]); // the sum
    put(&length.to_le_bytes());
    put(&checksum.to_le_bytes());
    put(chunk);
    put(space);
    put(&rank.to_le_bytes());
    put(&[u8::from(parent.is_some())]);
    put(&parent.unwrap_or_default());
    for number in [layout.world_size, layout.block_size, layout.num_layers, layout.hidden_dim_size]
    {
        put(&number.to_le_bytes());
    }
    put(&[u8::from(layout.single_plane), u8::from(layout.num_physical_slots.is_some())]);
    put(&layout.num_physical_slots.unwrap_or_default().to_le_bytes());
    for text in texts(layout, &saved.cache_salt) {
        put(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes());
        put(text.as_bytes());
    }
    let sum = sum(header).to_le_bytes();
    header[SUM].copy_from_slice(&sum);
}

fn sum(header: &[u8]) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(&header[..SUM.start]);
    digest.update(&header[SUM.end..]);
    digest.finalize()
}

/// Writes the page of [`CLEARED`]: a magic, the version and a sum where a header has them, and the number.
pub(crate) fn encode_cleared(sequence: u64, page: &mut [u8]) {
    page.fill(0);
    page[..8].copy_from_slice(&CLEARED_MAGIC);
    page[8..12].copy_from_slice(&VERSION.to_le_bytes());
    page[24..32].copy_from_slice(&sequence.to_le_bytes());
    let sum = sum(page).to_le_bytes();
    page[SUM].copy_from_slice(&sum);
}

/// The number; `None` unless the page is whole and of this version.
pub(crate) fn decode_cleared(page: &[u8]) -> Option<u64> {
    let mut fields = Fields(page);
    if fields.take(8)? != CLEARED_MAGIC || fields.u32()? != VERSION {
        return None;
    }
    fields.u32()?;
    let is_whole = fields.u64()? == sum(page);
    fields.u64().filter(|_| is_whole)
}

/// What a header says.
#[derive(Debug, PartialEq)]
pub(crate) struct Header {
    pub(crate) saved: Saved,
    /// Of the header itself.
    pub(crate) bytes: usize,
    pub(crate) length: u64,
    pub(crate) checksum: u64,
}

/// The header at the beginning of `file`; `None` unless it is whole and of this version.
pub(crate) fn decode(file: &[u8]) -> Option<Header> {
    let mut fields = Fields(file);
    if fields.take(8)? != MAGIC || fields.u32()? != VERSION {
        return None;
    }
    let bytes = usize::try_from(fields.u32()?).ok()?;
    if bytes == 0 || bytes > HEADER_MAX || !bytes.is_multiple_of(4096) {
        return None;
    }
    let header = file.get(..bytes)?;
    if fields.u64()? != sum(header) {
        return None;
    }
    let mut fields = Fields(&header[SUM.end..]);
    let (length, checksum) = (fields.u64()?, fields.u64()?);
    let (chunk, space, rank) = (fields.hash()?, fields.hash()?, fields.u32()?);
    let (has_parent, parent) = (fields.flag()?, fields.hash()?);
    let [world_size, block_size, num_layers, hidden_dim_size] =
        [fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?];
    let (single_plane, has_slots, slots) = (fields.flag()?, fields.flag()?, fields.u32()?);
    let dtype = Dtype::new(fields.text()?).ok()?;
    let model_name = fields.text()?.to_owned();
    let cache_salt = fields.text()?.to_owned();
    let num_physical_slots = has_slots.then_some(slots);
    let layout = Layout {
        model_name,
        world_size,
        block_size,
        num_layers,
        hidden_dim_size,
        dtype,
        single_plane,
        num_physical_slots,
    };
    let parent = has_parent.then_some(parent);
    let saved = Saved { chunk, space, rank, parent, layout, cache_salt };
    Some(Header { saved, bytes, length, checksum })
}

/// The rest of a header.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn hash(&mut self) -> Option<[u8; 32]> {
        self.take(32)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn flag(&mut self) -> Option<bool> {
        match self.take(1)? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    fn text(&mut self) -> Option<&'a str> {
        let bytes = u16::from_le_bytes(self.take(2)?.try_into().ok()?);
        std::str::from_utf8(self.take(bytes.into())?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::tests::saved;

    fn encoded(saved: &Saved) -> Vec<u8> {
        let mut header = vec![0xff; header_bytes(saved).unwrap()];
        encode(saved, 5000, 77, &mut header);
        header
    }

    #[test]
    fn a_header_says_what_was_saved() {
        let mut saved = saved(1, "tenant");
        for parent in [None, Some([9; 32])] {
            saved.parent = parent;
            let expected = Header { saved: saved.clone(), bytes: 4096, length: 5000, checksum: 77 };
            assert_eq!(decode(&encoded(&saved)), Some(expected));
        }
        saved.layout.model_name = "m".repeat(4096);
        saved.cache_salt = "é".repeat(128);
        saved.layout.num_physical_slots = Some(u32::MAX);
        let header = decode(&encoded(&saved)).unwrap();
        assert_eq!((header.bytes, &header.saved), (8192, &saved));
        saved.layout.model_name = "m".repeat(8192);
        assert!(header_bytes(&saved).is_err(), "rather than a text that is cut");
    }

    #[test]
    fn no_bit_of_a_header_can_change_unnoticed() {
        let header = encoded(&saved(1, "tenant"));
        for bit in 0..8 * header.len() {
            let mut damaged = header.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&damaged), None, "bit {bit}");
        }
        for length in 0..header.len() {
            assert_eq!(decode(&header[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn no_bit_of_what_says_that_files_were_cleared_can_change_unnoticed() {
        let mut page = [0xff; 4096];
        encode_cleared(77, &mut page);
        assert_eq!(decode_cleared(&page), Some(77));
        for bit in 0..8 * page.len() {
            let mut damaged = page;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_cleared(&damaged), None, "bit {bit}");
        }
        assert_eq!(decode_cleared(&[0; 4096]), None);
    }

    #[test]
    fn names_are_read_back_and_others_are_not_ours() {
        let named = Named {
            id: ObjectId { chunk: [0xab; 32], space: [1; 32], rank: 7 },
            length: u64::MAX,
            sequence: 3,
        };
        let name = named.name();
        assert!(name.len() < 250, "{} bytes: file systems take 255", name.len());
        assert_eq!(kind(&name), Kind::Object(named));
        assert_eq!(kind(&named.unfinished()), Kind::Unfinished(3));
        assert_eq!(kind("probe.tmp"), Kind::Unfinished(0));
        assert_eq!(kind(CLEARED), Kind::Cleared);
        assert_eq!(kind(CLEARED_UNFINISHED), Kind::Unfinished(0));
        assert_eq!(kind(&name.replace(".kv1", ".kv2")), Kind::OtherVersion);
        assert_eq!(kind("anything.kv2.tmp"), Kind::OtherVersion);
        let upper = name.to_uppercase().replace(".KV1", ".kv1");
        for foreign in ["", "a", "notes.tmp", ".kv1", "x.kv1", "x.kvx", "../a", &upper, &name[1..]]
        {
            assert_eq!(kind(foreign), Kind::Foreign, "{foreign:?}");
        }
        assert_eq!(kind(&name.replace("-0000", "-+000")), Kind::Foreign);
    }
}
