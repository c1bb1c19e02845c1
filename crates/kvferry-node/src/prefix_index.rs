//! The prefix index: `ts/prefix-index.ts` checks what JavaScript passes and allocates what is written here.

use kvferry_core::prefix_index;
use napi::bindgen_prelude::{Result, Uint8ArraySlice, Uint32ArraySlice};
use napi_derive::napi;

use crate::error::to_napi;

/// Which hashes are known to be stored.
#[napi]
pub struct PrefixIndex {
    inner: prefix_index::PrefixIndex,
}

/// What an insertion did.
#[napi(object)]
pub struct NativeInserted {
    /// Hashes that were not there.
    pub inserted: u32,
    /// Hashes that went for them.
    pub evicted: u32,
}

#[napi]
impl PrefixIndex {
    /// An empty index of `capacity` hashes of `width` bytes.
    #[napi(constructor, catch_unwind)]
    pub fn new(width: u32, capacity: u32) -> Result<Self> {
        let inner = prefix_index::PrefixIndex::new(width as usize, capacity as usize);
        Ok(Self { inner: inner.map_err(to_napi)? })
    }

    /// Hashes that are there.
    #[napi(getter, catch_unwind)]
    pub fn size(&self) -> u32 {
        count(self.inner.len())
    }

    /// Adds hashes, and writes those that went for them to `evicted`.
    #[napi(catch_unwind)]
    pub fn insert(
        &mut self,
        hashes: &[u8],
        mut evicted: Uint8ArraySlice<'_>,
    ) -> Result<NativeInserted> {
        // SAFETY: the call is synchronous and ts/prefix-index.ts owns this array alone.
        let evicted = unsafe { evicted.as_mut() };
        let done = self.inner.insert(hashes, evicted).map_err(to_napi)?;
        Ok(NativeInserted { inserted: count(done.inserted), evicted: count(done.evicted) })
    }

    /// Removes hashes; returns how many were there.
    #[napi(catch_unwind)]
    pub fn remove(&mut self, hashes: &[u8]) -> Result<u32> {
        self.inner.remove(hashes).map(count).map_err(to_napi)
    }

    /// Writes whether each hash is there; returns how many are.
    #[napi(catch_unwind)]
    pub fn contains(&self, hashes: &[u8], mut found: Uint8ArraySlice<'_>) -> Result<u32> {
        // SAFETY: the call is synchronous and ts/prefix-index.ts owns this array alone.
        let found = unsafe { found.as_mut() };
        self.inner.contains(hashes, found).map(count).map_err(to_napi)
    }

    /// Writes how many leading hashes of each request are there.
    #[napi(catch_unwind)]
    pub fn match_prefixes(
        &mut self,
        hashes: &[u8],
        offsets: &[u32],
        mut counts: Uint32ArraySlice<'_>,
    ) -> Result<()> {
        // SAFETY: the call is synchronous and ts/prefix-index.ts lets no other argument share this buffer.
        let counts = unsafe { counts.as_mut() };
        self.inner.match_prefixes(hashes, offsets, counts).map_err(to_napi)
    }

    /// Forgets all hashes.
    #[napi(catch_unwind)]
    pub fn clear(&mut self) {
        self.inner.clear();
    }
}

/// A count of hashes, which the core keeps below 2³².
fn count(hashes: usize) -> u32 {
    u32::try_from(hashes).unwrap_or(u32::MAX)
}
