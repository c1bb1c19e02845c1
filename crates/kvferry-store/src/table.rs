//! Tables that objects are found by: in parts, so that no request waits until a table of all objects has grown.

use hashbrown::HashTable;

/// A million objects have a thousand in each: a part that grows takes 60 µs, where hashes have to be found out.
const PARTS: usize = 1024;

/// Entries by their hashes. What they stand for, and so what is equal, the caller knows.
#[derive(Debug)]
pub(crate) struct Table<E>(Box<[HashTable<E>]>);

impl<E> Default for Table<E> {
    fn default() -> Self {
        Self((0..PARTS).map(|_| HashTable::new()).collect())
    }
}

impl<E: Copy> Table<E> {
    /// The entry of this hash for which `is` holds.
    pub(crate) fn find(&self, hash: u64, mut is: impl FnMut(E) -> bool) -> Option<E> {
        self.0[part(hash)].find(hash, |entry| is(*entry)).copied()
    }

    /// Adds an entry that is not in it; `hash_of` tells the hashes of those that are.
    pub(crate) fn insert(&mut self, hash: u64, entry: E, hash_of: impl Fn(E) -> u64) {
        self.0[part(hash)].insert_unique(hash, entry, |entry| hash_of(*entry));
    }

    /// Takes the entry out for which `is` holds, if it is in it.
    pub(crate) fn remove(&mut self, hash: u64, mut is: impl FnMut(E) -> bool) {
        if let Ok(entry) = self.0[part(hash)].find_entry(hash, |entry| is(*entry)) {
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
