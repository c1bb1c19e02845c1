//! Which chunks or blocks are known to be stored, by their hashes: a bounded set of keys of equal width that
//! forgets the least recently used.
//!
//! All calls take many keys as bytes, one after the other. A call counts as if it used its keys one by one
//! from the last to the first, so that a prompt's leading chunks are younger than those that follow them:
//! children go before their parents.

mod slots;
mod table;
#[cfg(test)]
mod tests;

use std::hash::{BuildHasher as _, RandomState};
use std::hint::black_box;

use self::slots::Slots;
use self::table::Table;
use crate::{Error, ErrorCode, Result};

/// Keys that are looked up at a time: enough to wait for many parts of memory at once, and few enough to find
/// all of them in the processor's nearest cache afterwards.
const PIECE: usize = 64;

/// A bounded set of chunk or block hashes, least recently used out first.
///
/// Memory: width + 24 bytes for each key of the capacity, 16 of them from the start and the others as keys
/// come, and 8 bytes for each key of the largest call so far. Nothing else grows.
pub struct PrefixIndex(Widths);

enum Widths {
    W8(Index<8>),
    W16(Index<16>),
    W32(Index<32>),
}

/// What an insertion did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inserted {
    /// Keys that were not there.
    pub inserted: usize,
    /// Keys that went for them.
    pub evicted: usize,
}

/// Runs a call on the index of whichever width.
macro_rules! each {
    ($self:expr, $index:ident => $call:expr) => {
        match $self {
            Widths::W8($index) => $call,
            Widths::W16($index) => $call,
            Widths::W32($index) => $call,
        }
    };
}

impl PrefixIndex {
    /// The largest capacity.
    pub const MAX_CAPACITY: usize = 1 << 28;

    /// An empty index of keys of `width` bytes: 8, 16 or 32. It holds `capacity` of them, 1 to
    /// [`Self::MAX_CAPACITY`].
    pub fn new(width: usize, capacity: usize) -> Result<Self> {
        if !(1..=Self::MAX_CAPACITY).contains(&capacity) {
            return Err(Error::invalid(format!(
                "a capacity of {capacity} keys is not in 1..={}",
                Self::MAX_CAPACITY
            )));
        }
        Ok(Self(match width {
            8 => Widths::W8(Index::new(capacity)?),
            16 => Widths::W16(Index::new(capacity)?),
            32 => Widths::W32(Index::new(capacity)?),
            _ => {
                return Err(Error::invalid(format!(
                    "keys of {width} bytes are not offered: hashes have 32 bytes, 16 or 8"
                )));
            }
        }))
    }

    /// Keys that are there.
    pub fn len(&self) -> usize {
        each!(&self.0, index => index.slots.len())
    }

    /// Whether no key is there.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds keys, or uses them if they are there. When the capacity is reached, each new key takes the place
    /// of the least recently used one, which is written to `evicted`, first gone first. Keys of the call never
    /// evict each other: of more keys than the capacity, the first ones are taken and the rest is left out.
    ///
    /// `evicted` has as many bytes as `keys`, or as many as can be evicted: those of
    /// `len() + keys − capacity` keys.
    pub fn insert(&mut self, keys: &[u8], evicted: &mut [u8]) -> Result<Inserted> {
        each!(&mut self.0, index => index.insert(whole(keys)?, evicted))
    }

    /// Removes keys; returns how many were there.
    pub fn remove(&mut self, keys: &[u8]) -> Result<usize> {
        each!(&mut self.0, index => Ok(index.remove(whole(keys)?)))
    }

    /// Writes 1 for each key that is there and 0 for each that is not, without using it; returns how many are
    /// there. `found` has an element for each key.
    pub fn contains(&self, keys: &[u8], found: &mut [u8]) -> Result<usize> {
        each!(&self.0, index => index.contains(whole(keys)?, found))
    }

    /// Counts the leading keys of each request that are there, up to its first one that is not, and uses
    /// them. Request i has the keys `offsets[i]..offsets[i + 1]`: offsets ascend from 0 to the number of keys.
    /// `counts` has an element for each request. Requests are used one after the other.
    pub fn match_prefixes(
        &mut self,
        keys: &[u8],
        offsets: &[u32],
        counts: &mut [u32],
    ) -> Result<()> {
        each!(&mut self.0, index => index.match_prefixes(whole(keys)?, offsets, counts))
    }

    /// Forgets all keys.
    pub fn clear(&mut self) {
        each!(&mut self.0, index => index.clear());
    }
}

/// The index of keys of `N` bytes.
struct Index<const N: usize> {
    capacity: usize,
    hasher: Hasher,
    table: Table,
    slots: Slots<N>,
    /// Hash and slot of each key of a call.
    call: Vec<Located>,
}

/// Where a key is.
#[derive(Clone, Copy, Default)]
struct Located {
    hash: u32,
    /// 0: nowhere.
    slot: u32,
}

impl<const N: usize> Index<N> {
    fn new(capacity: usize) -> Result<Self> {
        let (table, slots) = (Table::new(capacity)?, Slots::new(capacity)?);
        Ok(Self { capacity, hasher: Hasher::new(), table, slots, call: Vec::new() })
    }

    fn insert(&mut self, keys: &[[u8; N]], evicted: &mut [u8]) -> Result<Inserted> {
        let keys = &keys[..keys.len().min(self.capacity)];
        let mut room = evicted.chunks_exact_mut(N);
        let most = (self.slots.len() + keys.len()).saturating_sub(self.capacity);
        if room.len() < most {
            return Err(Error::invalid(format!(
                "{most} keys may be evicted, and there is room for {}: pass {} bytes",
                room.len(),
                most * N
            )));
        }
        let mut call = std::mem::take(&mut self.call);
        call.clear();
        call.resize(keys.len(), Located::default());
        for (keys, located) in keys.chunks(PIECE).zip(call.chunks_mut(PIECE)) {
            self.locate(keys, located);
        }
        // Those that are there become younger than all others, so that what is evicted is none of them.
        for located in &call {
            if located.slot != 0 {
                self.slots.touch(located.slot);
            }
        }
        let mut done = Inserted { inserted: 0, evicted: 0 };
        for (keys, located) in keys.rchunks(PIECE).zip(call.rchunks(PIECE)) {
            self.approach(located);
            for (key, &Located { hash, slot }) in keys.iter().zip(located).rev() {
                let slot = if slot == 0 { self.find(hash, key) } else { slot };
                if slot != 0 {
                    self.slots.touch(slot);
                    continue;
                }
                if self.slots.len() == self.capacity {
                    let oldest = self.slots.oldest();
                    let gone = self.slots.key(oldest);
                    if let Some(room) = room.next() {
                        room.copy_from_slice(gone);
                    }
                    self.table.remove(self.hasher.hash(gone), oldest);
                    self.slots.give_back(oldest);
                    done.evicted += 1;
                }
                self.table.insert(hash, self.slots.take(key));
                done.inserted += 1;
            }
        }
        self.call = call;
        Ok(done)
    }

    fn remove(&mut self, keys: &[[u8; N]]) -> usize {
        let before = self.slots.len();
        let mut located = [Located::default(); PIECE];
        for keys in keys.chunks(PIECE) {
            self.locate(keys, &mut located[..keys.len()]);
            for (key, &Located { hash, .. }) in keys.iter().zip(&located) {
                // Sought again: the same key may have been removed just now.
                let slot = self.find(hash, key);
                if slot != 0 {
                    self.table.remove(hash, slot);
                    self.slots.give_back(slot);
                }
            }
        }
        before - self.slots.len()
    }

    fn contains(&self, keys: &[[u8; N]], found: &mut [u8]) -> Result<usize> {
        if found.len() != keys.len() {
            return Err(Error::invalid(format!(
                "there are {} keys and room for {} answers: pass one byte for each key",
                keys.len(),
                found.len()
            )));
        }
        let mut located = [Located::default(); PIECE];
        for (keys, found) in keys.chunks(PIECE).zip(found.chunks_mut(PIECE)) {
            self.locate(keys, &mut located[..keys.len()]);
            for (found, located) in found.iter_mut().zip(located) {
                *found = u8::from(located.slot != 0);
            }
        }
        Ok(found.iter().map(|found| usize::from(*found)).sum())
    }

    fn match_prefixes(
        &mut self,
        keys: &[[u8; N]],
        offsets: &[u32],
        counts: &mut [u32],
    ) -> Result<()> {
        check_offsets(offsets, keys.len())?;
        if counts.len() != offsets.len() - 1 {
            return Err(Error::invalid(format!(
                "there are {} requests and room for {} counts: pass one for each",
                offsets.len() - 1,
                counts.len()
            )));
        }
        let mut call = std::mem::take(&mut self.call);
        for (range, count) in offsets.windows(2).zip(counts) {
            let keys = &keys[range[0] as usize..range[1] as usize];
            call.clear();
            let mut piece = 1; // many requests end with their first key
            while call.len() < keys.len() {
                let start = call.len();
                let sought = &keys[start..keys.len().min(start + piece)];
                call.resize(start + sought.len(), Located::default());
                self.locate(sought, &mut call[start..]);
                if let Some(missing) = call[start..].iter().position(|located| located.slot == 0) {
                    call.truncate(start + missing);
                    break;
                }
                // Keys that came in one call often lie side by side, the last one first.
                let mut slot = call[call.len() - 1].slot - 1;
                while slot > 0
                    && let Some(key) = keys.get(call.len())
                    && self.slots.holds(slot, key)
                {
                    call.push(Located { hash: 0, slot });
                    slot -= 1;
                }
                piece = PIECE;
            }
            // A request's keys are those between two offsets: fewer than 2³².
            *count = u32::try_from(call.len()).unwrap_or(u32::MAX);
            for located in call.iter().rev() {
                self.slots.touch(located.slot);
            }
        }
        self.call = call;
        Ok(())
    }

    fn clear(&mut self) {
        self.table.clear();
        self.slots.clear();
    }

    fn find(&self, hash: u32, key: &[u8; N]) -> u32 {
        self.table.find(hash, |slot| self.slots.key(slot) == key)
    }

    /// Finds the keys of a piece. Each step is taken for all of them before the next one, so that the
    /// processor waits for memory once for many keys and not for each.
    fn locate(&self, keys: &[[u8; N]], located: &mut [Located]) {
        for (key, located) in keys.iter().zip(&mut *located) {
            located.hash = self.hasher.hash(key);
        }
        black_box(located.iter().fold(0, |read, it| read ^ self.table.at_home(it.hash)));
        for located in &mut *located {
            located.slot = self.table.find(located.hash, |_| true);
        }
        black_box(located.iter().fold(0, |read, it| read ^ self.slots.read(it.slot)));
        for (key, located) in keys.iter().zip(located) {
            if located.slot != 0 && self.slots.key(located.slot) != key {
                located.slot = self.find(located.hash, key);
            }
        }
    }

    /// Reads early what inserting a piece needs: the places of its keys, and those of the keys that may go.
    fn approach(&self, located: &[Located]) {
        let mut read = 0;
        let mut oldest = self.slots.oldest();
        let full = self.slots.len() + located.len() > self.capacity;
        for located in located {
            read ^= self.table.at_home(located.hash);
            if full && oldest != 0 {
                read ^= self.table.at_home(self.hasher.hash(self.slots.key(oldest)));
                oldest = self.slots.younger(oldest);
            }
        }
        black_box(read);
    }
}

/// A hash with a random seed, strongly universal: any two keys have any two hashes with the same probability,
/// whoever chose the keys without the seed. It is Multilinear-HM of Lemire and Kaser, Strongly universal string
/// hashing is fast (2012); mixing at the end is a bijection, and keeps keys in arithmetic progression apart.
struct Hasher {
    seed: [u64; 9],
}

impl Hasher {
    fn new() -> Self {
        let random = RandomState::new();
        Self { seed: std::array::from_fn(|at| random.hash_one(at)) }
    }

    fn hash<const N: usize>(&self, key: &[u8; N]) -> u32 {
        let (pairs, _) = key.as_chunks::<8>();
        let (seeds, _) = self.seed[1..].as_chunks::<2>();
        let mut sum = self.seed[0];
        for (pair, seed) in pairs.iter().zip(seeds) {
            let pair = u64::from_le_bytes(*pair);
            let (low, high) = (pair & u64::from(u32::MAX), pair >> 32);
            sum = sum
                .wrapping_add(low.wrapping_add(seed[0]).wrapping_mul(high.wrapping_add(seed[1])));
        }
        let mut hash = (sum >> 32) as u32;
        // The constants are those of lowbias32 by Chris Wellons.
        hash = (hash ^ (hash >> 16)).wrapping_mul(0x7feb_352d);
        hash = (hash ^ (hash >> 15)).wrapping_mul(0x846c_a68b);
        hash ^ (hash >> 16)
    }
}

/// An empty vector that never moves: it has room for `len` elements.
fn reserve<T>(len: usize) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    match vector.try_reserve_exact(len) {
        Ok(()) => Ok(vector),
        Err(reason) => Err(Error::new(
            ErrorCode::System,
            format!(
                "{} bytes for an index could not be had ({reason}): choose a smaller capacity",
                len.saturating_mul(size_of::<T>())
            ),
        )),
    }
}

/// The keys in these bytes.
fn whole<const N: usize>(bytes: &[u8]) -> Result<&[[u8; N]]> {
    let (keys, rest) = bytes.as_chunks();
    if !rest.is_empty() {
        return Err(Error::invalid(format!(
            "{} bytes are no whole number of keys of {N} bytes",
            bytes.len()
        )));
    }
    if u32::try_from(keys.len()).is_err() {
        return Err(Error::invalid(format!(
            "{} keys in one call are more than {}: pass them in parts",
            keys.len(),
            u32::MAX
        )));
    }
    Ok(keys)
}

fn check_offsets(offsets: &[u32], keys: usize) -> Result<()> {
    let remedy = "offsets ascend from 0 to the number of keys";
    match (offsets.first(), offsets.last()) {
        (None, _) | (_, None) => {
            return Err(Error::invalid(format!("there are no offsets: {remedy}")));
        }
        (Some(0), _) => {}
        (Some(first), _) => {
            return Err(Error::invalid(format!("the first offset is {first}: {remedy}")));
        }
    }
    if let Some(at) = offsets.windows(2).position(|pair| pair[0] > pair[1]) {
        return Err(Error::invalid(format!(
            "the offset at position {} is {}, after {}: {remedy}",
            at + 1,
            offsets[at + 1],
            offsets[at]
        )));
    }
    match offsets.last() {
        Some(last) if *last as usize != keys => Err(Error::invalid(format!(
            "the last offset is {last} and there are {keys} keys: {remedy}"
        ))),
        _ => Ok(()),
    }
}
