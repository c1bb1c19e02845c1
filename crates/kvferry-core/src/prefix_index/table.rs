//! From 32-bit hashes to slots: open addressing with linear probing, half full at most.
//!
//! Not a table of the standard library or of the crate hashbrown: an index that is full removes a key for each
//! one that it inserts. Their tables mark removed places and clear the marks now and then by moving everything;
//! here the entries behind a removed one close up at once.

use super::reserve;
use crate::Result;

/// Slots by hash. Slots are at least 1.
pub(super) struct Table {
    /// Hash and slot, or 0. An entry stands at its home or behind it, with no empty place between.
    entries: Vec<u64>,
}

impl Table {
    /// Room for `capacity` entries.
    pub(super) fn new(capacity: usize) -> Result<Self> {
        let mut entries = reserve(2 * capacity)?;
        entries.resize(2 * capacity, 0);
        Ok(Self { entries })
    }

    pub(super) fn clear(&mut self) {
        self.entries.fill(0);
    }

    /// What stands at the home of `hash`: for reading it early.
    pub(super) fn at_home(&self, hash: u32) -> u64 {
        self.entries[self.home(hash)]
    }

    /// The first slot of this hash that `is` the one sought, or 0.
    pub(super) fn find(&self, hash: u32, is: impl Fn(u32) -> bool) -> u32 {
        let mut at = self.home(hash);
        loop {
            let entry = self.entries[at];
            if entry == 0 || (hash_of(entry) == hash && is(slot_of(entry))) {
                return slot_of(entry);
            }
            at = self.after(at);
        }
    }

    /// Adds an entry. There is room: the caller has at most as many slots as the capacity.
    pub(super) fn insert(&mut self, hash: u32, slot: u32) {
        let mut at = self.home(hash);
        while self.entries[at] != 0 {
            at = self.after(at);
        }
        self.entries[at] = u64::from(hash) << 32 | u64::from(slot);
    }

    /// Removes an entry, if it is there.
    pub(super) fn remove(&mut self, hash: u32, slot: u32) {
        let mut hole = self.home(hash);
        while slot_of(self.entries[hole]) != slot {
            if self.entries[hole] == 0 {
                return;
            }
            hole = self.after(hole);
        }
        let mut at = hole;
        loop {
            at = self.after(at);
            let entry = self.entries[at];
            if entry == 0 {
                break;
            }
            // It may move to the hole unless its home lies behind the hole.
            if self.distance(self.home(hash_of(entry)), at) >= self.distance(hole, at) {
                self.entries[hole] = entry;
                hole = at;
            }
        }
        self.entries[hole] = 0;
    }

    /// Where the search for a hash begins: homes are in the order of the hashes, whatever the length.
    fn home(&self, hash: u32) -> usize {
        ((u64::from(hash) * self.entries.len() as u64) >> 32) as usize
    }

    fn after(&self, at: usize) -> usize {
        if at + 1 == self.entries.len() { 0 } else { at + 1 }
    }

    /// Steps forward from one place to another.
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.entries.len() - from }
    }
}

fn hash_of(entry: u64) -> u32 {
    (entry >> 32) as u32
}

#[allow(clippy::cast_possible_truncation, reason = "the lower half is what is wanted")]
fn slot_of(entry: u64) -> u32 {
    entry as u32
}
