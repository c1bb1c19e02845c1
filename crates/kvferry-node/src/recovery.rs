//! Invalid-block recovery: `ts/recovery.ts` has the types and defaults.

#![allow(clippy::too_many_arguments, reason = "a column of the step is an argument of its own")]

use kvferry_core::recovery::{self, LoadFailurePolicy, Step};
use napi::bindgen_prelude::{Result, Uint32Array};
use napi_derive::napi;

use crate::error::to_napi;

/// What follows from a step's invalid blocks.
#[napi(object)]
pub struct NativeRecovery {
    /// Tokens that each request has computed.
    pub computed: Uint32Array,
    /// Positions of the affected requests.
    pub affected: Uint32Array,
    /// The invalid blocks that they had.
    pub found: Uint32Array,
    /// Blocks that the prefix cache must forget.
    pub evicted: Uint32Array,
    /// Tokens that have to be computed again.
    pub affected_tokens: i64,
}

/// Cuts every request at its first invalid block.
#[napi(catch_unwind)]
pub fn recover(
    block_size: u32,
    fails: bool,
    computed: &[u32],
    scheduled: &[u32],
    asynchronous: &[u8],
    block_offsets: &[u32],
    block_ids: &[u32],
    invalid: &[u32],
) -> Result<NativeRecovery> {
    let policy = if fails { LoadFailurePolicy::Fail } else { LoadFailurePolicy::Recompute };
    let step = Step {
        block_size,
        policy,
        computed,
        scheduled,
        asynchronous,
        block_offsets,
        block_ids,
        invalid,
    };
    let recovery = recovery::recover(&step).map_err(to_napi)?;
    let affected = (0..).zip(&recovery.affected).filter(|(_, affected)| **affected);
    Ok(NativeRecovery {
        affected: affected.map(|(request, _)| request).collect::<Vec<u32>>().into(),
        computed: recovery.computed.into(),
        found: recovery.found.into(),
        evicted: recovery.evicted.into(),
        affected_tokens: i64::try_from(recovery.affected_tokens).unwrap_or(i64::MAX),
    })
}
