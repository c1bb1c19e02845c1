//! Tables that objects are found by: in parts, so that no request waits until a table of all objects has grown.

use hashbrown::HashTable;

/// A million objects have 16,000 in each: a part that grows takes a millisecond or two.
const PARTS: usize = 64;

/// Numbers by their hashes. What they stand for, and so what is equal, the caller knows.
#[derive(Debug)]
pub(crate) struct Table(Box<[HashTable<u32>]>);

impl Default for Table {
    fn default() -> Self {
        Self((0..PARTS).map(|_| HashTable::new()).collect())
    }
}

impl Table {
    /// The number of this hash for which `is` holds.
    pub(crate) fn find(&self, hash: u64, mut is: impl FnMut(u32) -> bool) -> Option<u32> {
        self.0[part(hash)].find(hash, |number| is(*number)).copied()
    }

    /// Adds a number that is not in it; `hash_of` tells the hashes of those that are.
    pub(crate) fn insert(&mut self, hash: u64, number: u32, hash_of: impl Fn(u32) -> u64) {
        self.0[part(hash)].insert_unique(hash, number, |number| hash_of(*number));
    }

    /// Takes a number out, if it is in it.
    pub(crate) fn remove(&mut self, hash: u64, number: u32) {
        if let Ok(entry) = self.0[part(hash)].find_entry(hash, |known| *known == number) {
            entry.remove();
        }
    }

    /// Bytes that it takes.
    pub(crate) fn bytes(&self) -> usize {
        self.0.iter().map(HashTable::allocation_size).sum()
    }
}

/// Of bits that [`HashTable`] does not look at: it takes the lowest and the highest.
fn part(hash: u64) -> usize {
    usize::try_from(hash >> 40).unwrap_or_default() % PARTS
}
