//! Objects that are stored only to see whether storing works.

use kvferry_core::Result;
use kvferry_core::key::Key;

use crate::index::ObjectId;
use crate::store::Store;

/// The model name of such objects. No event tells of them: one every few seconds would push the others
/// out of the log of an idle server.
pub const PROBE_MODEL: &str = "kvferry/readyz";

impl Store {
    /// Takes the objects of the key's range and rank out at once, counted nowhere; says how many it were.
    /// Those that are leased stay.
    pub fn take_out(&self, key: &Key, instance: u64) -> Result<u64> {
        let chunks = self.chunks(key)?;
        let prompt = self.prompt(key);
        let mut state = self.lock();
        let (_, range) = state.range(key, instance, &prompt, &chunks)?;
        let Some(range) = range else { return Ok(0) };
        let mut taken = 0;
        for chunk in chunks.rev() {
            let id = ObjectId { chunk: prompt.hashes[chunk], space: range.space, rank: range.rank };
            let Some(handle) = state.index.get_visible(&id) else { continue };
            if let Some(grant) = state.index.remove_unpinned(handle) {
                state.pool.give_back(grant);
                taken += 1;
            }
        }
        Ok(taken)
    }
}
