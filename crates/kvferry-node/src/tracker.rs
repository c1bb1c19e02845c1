//! Request trackers: `ts/tracker.ts` checks what JavaScript passes and allocates what is written here.

#![allow(clippy::too_many_arguments, reason = "a column of the step is an argument of its own")]

use kvferry_core::key;
use kvferry_core::tracker::{self, Layout, Plan, State, Step, Tracker};
use napi::bindgen_prelude::{Result, Uint32ArraySlice};
use napi_derive::napi;

use crate::error::to_napi;

/// Refuses a salt that no key can hold.
#[napi(catch_unwind)]
pub fn check_salt(salt: String) -> Result<()> {
    key::check_salt(&salt).map_err(to_napi)
}

/// The requests of one scheduler.
#[napi]
pub struct Trackers {
    inner: tracker::Trackers,
}

#[napi]
impl Trackers {
    /// An empty table.
    #[napi(constructor, catch_unwind)]
    pub fn new(chunk: u32, groups: Vec<u32>, blocks: u32, relocation_window: u32) -> Result<Self> {
        let layout = Layout { chunk, groups, blocks, relocation_window };
        Ok(Self { inner: tracker::Trackers::new(layout).map_err(to_napi)? })
    }

    /// Requests in the table.
    #[napi(getter, catch_unwind)]
    pub fn size(&self) -> u32 {
        u32::try_from(self.inner.len()).unwrap_or(u32::MAX)
    }

    /// Adds a request: tokens, limit, scheduled, local hit, external hit, stored, state; and its blocks.
    #[napi(catch_unwind)]
    pub fn add(&mut self, fields: &[u32], block_offsets: &[u32], block_ids: &[u32]) -> Result<u32> {
        let [tokens, limit, scheduled, local_hit, external_hit, stored, state] = *fields else {
            return Err(napi::Error::from_reason("INTERNAL: a tracker has seven fields"));
        };
        let state = State::from_number(state).map_err(to_napi)?;
        let tracker = Tracker { tokens, limit, scheduled, local_hit, external_hit, stored, state };
        self.inner.add(tracker, block_offsets, block_ids).map_err(to_napi)
    }

    /// Forgets a request.
    #[napi(catch_unwind)]
    pub fn remove(&mut self, handle: u32) -> Result<()> {
        self.inner.remove(handle).map_err(to_napi)
    }

    /// The fields of a request, as for `add`.
    #[napi(catch_unwind)]
    pub fn get(&self, handle: u32) -> Result<Vec<u32>> {
        let tracker = self.inner.get(handle).map_err(to_napi)?;
        let Tracker { tokens, limit, scheduled, local_hit, external_hit, stored, state } = tracker;
        Ok(vec![tokens, limit, scheduled, local_hit, external_hit, stored, state as u32])
    }

    /// The blocks of a request's group.
    #[napi(catch_unwind)]
    pub fn blocks(&self, handle: u32, group: u32) -> Result<Vec<u32>> {
        self.inner.blocks(handle, group as usize).map(<[u32]>::to_vec).map_err(to_napi)
    }

    /// How many blocks of the group there are.
    #[napi(catch_unwind)]
    pub fn block_count(&self, handle: u32, group: u32) -> Result<u32> {
        let blocks = self.inner.blocks(handle, group as usize).map_err(to_napi)?;
        Ok(u32::try_from(blocks.len()).unwrap_or(u32::MAX))
    }

    /// Takes in what a lookup found.
    #[napi(catch_unwind)]
    pub fn set_hits(&mut self, handle: u32, local: u32, external: u32) -> Result<()> {
        self.inner.set_hits(handle, local, external).map_err(to_napi)
    }

    /// Takes in the blocks that a request has; returns its state.
    #[napi(catch_unwind)]
    pub fn allocate(
        &mut self,
        handle: u32,
        block_offsets: &[u32],
        block_ids: &[u32],
        load: bool,
    ) -> Result<u32> {
        let state = self.inner.allocate(handle, block_offsets, block_ids, load);
        state.map(|state| state as u32).map_err(to_napi)
    }

    /// Leaves the cache out for a request.
    #[napi(catch_unwind)]
    pub fn bypass(&mut self, handle: u32) -> Result<()> {
        self.inner.bypass(handle).map_err(to_napi)
    }

    /// Plans a step. Writes operations and blocks of the plan to `size`; `false`: the arrays are too
    /// small, and nothing has changed.
    #[napi(catch_unwind)]
    pub fn plan(
        &mut self,
        handles: &[u32],
        scheduled: &[u32],
        tokens: &[u32],
        block_offsets: &[u32],
        block_ids: &[u32],
        mut operations: Uint32ArraySlice<'_>,
        mut operation_blocks: Uint32ArraySlice<'_>,
        mut operation_block_ids: Uint32ArraySlice<'_>,
        mut size: Uint32ArraySlice<'_>,
    ) -> Result<bool> {
        let step = Step { handles, scheduled, tokens, block_offsets, block_ids };
        let mut plan = Plan {
            // SAFETY: the call is synchronous and ts/tracker.ts owns this array alone.
            operations: unsafe { operations.as_mut() },
            // SAFETY: as above, with an array of its own.
            block_offsets: unsafe { operation_blocks.as_mut() },
            // SAFETY: as above, with an array of its own.
            block_ids: unsafe { operation_block_ids.as_mut() },
        };
        let (planned, fits) = self.inner.plan(&step, &mut plan).map_err(to_napi)?;
        // SAFETY: as above, with an array of its own.
        if let [operations, blocks] = unsafe { size.as_mut() } {
            *operations = u32::try_from(planned.operations).unwrap_or(u32::MAX);
            *blocks = u32::try_from(planned.blocks).unwrap_or(u32::MAX);
        }
        Ok(fits)
    }
}
