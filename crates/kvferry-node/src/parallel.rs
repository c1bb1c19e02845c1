//! Parallel strategies: `ts/parallel.ts` has the types and defaults.

use kvferry_core::key;
use kvferry_core::parallel::Parallelism;
use napi::bindgen_prelude::Result;
use napi_derive::napi;

use crate::error::to_napi;

/// What follows for a worker.
#[napi(object)]
pub struct NativeStrategy {
    /// Pieces that a chunk's KV has at one server.
    pub kv_world_size: u32,
    /// Which of them is this worker's.
    pub kv_worker_id: u32,
    /// Workers that load one piece.
    pub num_kv_readers: u32,
    /// Whether the worker is the first of its tensor-parallel group.
    pub first_of_group: bool,
    /// Whether the worker stores its piece.
    pub stores: bool,
    /// Workers of each server.
    pub ranks_per_server: u32,
    /// This worker's server.
    pub server: u32,
    /// The piece in LMCache's object keys.
    pub kv_rank: u32,
}

/// Works out which piece of a chunk a worker has.
#[napi(catch_unwind)]
pub fn parallel_strategy(
    tensor: u32,
    pipeline: u32,
    rank: u32,
    mla: bool,
    servers: u32,
    decode_context: u32,
) -> Result<NativeStrategy> {
    let parallelism = Parallelism { tensor, pipeline, rank, mla, servers, decode_context };
    let strategy = parallelism.strategy().map_err(to_napi)?;
    Ok(NativeStrategy {
        kv_world_size: strategy.kv_world_size,
        kv_worker_id: strategy.kv_worker_id,
        num_kv_readers: strategy.num_kv_readers,
        first_of_group: strategy.first_of_group,
        stores: strategy.stores,
        ranks_per_server: strategy.ranks_per_server,
        server: strategy.server,
        kv_rank: key::kv_rank(strategy.kv_world_size, strategy.kv_worker_id),
    })
}
