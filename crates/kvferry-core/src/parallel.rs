//! Which shard of a chunk's KV a worker has, and whether it stores it.
//!
//! vLLM numbers workers by rank = pipeline rank × tensor-parallel size + tensor-parallel rank. The rules are
//! those of LMCache 0.5.6's `ParallelStrategy`; for one server and no decode context parallelism they are
//! vLLM's too (pull request 38810).

use crate::defect::{Defect, is_active};
use crate::key::WORLD_SIZE_MAX;
use crate::{Error, Result};

/// How an engine is spread over workers, and which of them this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parallelism {
    /// Workers that share each layer.
    pub tensor: u32,
    /// Stages that share the layers.
    pub pipeline: u32,
    /// This worker, among tensor × pipeline.
    pub rank: u32,
    /// Whether all KV is that of multi-head latent attention, which every worker of a stage has whole. `false`
    /// for hybrid models.
    pub mla: bool,
    /// Cache servers that the ranks are shared out to.
    pub servers: u32,
    /// Workers of a stage that share a chunk's tokens (decode context parallelism).
    pub decode_context: u32,
}

/// What follows for the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strategy {
    /// Pieces that a chunk's KV has at one server.
    pub kv_world_size: u32,
    /// Which of them is this worker's.
    pub kv_worker_id: u32,
    /// Workers that load one piece: a lookup leases it for so many.
    pub num_kv_readers: u32,
    /// Whether the worker is the first of its tensor-parallel group.
    pub first_of_group: bool,
    /// Whether the worker stores its piece; others have the same one.
    pub stores: bool,
    /// Workers of each server.
    pub ranks_per_server: u32,
    /// This worker's server.
    pub server: u32,
}

impl Parallelism {
    /// The strategy. An error names what does not fit together.
    pub fn strategy(&self) -> Result<Strategy> {
        let Self { tensor, pipeline, rank, mla, servers, decode_context } = *self;
        for (name, size) in [
            ("tensor-parallel size", tensor),
            ("pipeline-parallel size", pipeline),
            ("number of servers", servers),
            ("decode context parallel size", decode_context),
        ] {
            if size == 0 {
                return Err(Error::invalid(format!("the {name} is 0; it is at least 1")));
            }
        }
        let world = tensor.checked_mul(pipeline).filter(|world| *world <= u32::from(u16::MAX));
        let world = world.ok_or_else(|| {
            Error::invalid(format!(
                "{tensor} × {pipeline} ranks are more than {}: use smaller parallel sizes",
                u16::MAX
            ))
        })?;
        if rank >= world {
            return Err(Error::invalid(format!(
                "rank {rank} is not one of the {world} of {tensor} (tensor) × {pipeline} (pipeline): \
                 ranks go from 0 to {}",
                world - 1
            )));
        }
        for (name, part) in [("servers", servers), ("token shards", decode_context)] {
            if !tensor.is_multiple_of(part) {
                return Err(Error::invalid(format!(
                    "{part} {name} cannot share {tensor} tensor-parallel ranks evenly: use a divisor"
                )));
            }
        }
        let per_server = tensor / servers;
        if world / servers < decode_context {
            return Err(Error::invalid(format!(
                "each server needs {decode_context} ranks to hold all token shards, and {servers} servers \
                 leave {} each: use fewer servers or a smaller decode context parallel size",
                world / servers
            )));
        }
        let ranks_per_server = world / servers;
        let (stage, within) = (rank / tensor, rank % tensor);
        let strategy = if mla {
            Strategy {
                kv_world_size: pipeline * decode_context,
                kv_worker_id: stage * decode_context + within % decode_context,
                num_kv_readers: per_server.div_ceil(decode_context),
                first_of_group: within == 0,
                // All ranks of a stage have the same KV: stored once for each server and token shard.
                stores: match decode_context {
                    _ if is_active(Defect::EveryRankStores) => true,
                    1 => rank.is_multiple_of(per_server),
                    _ => rank % ranks_per_server.min(tensor) < decode_context,
                },
                ranks_per_server,
                server: rank / ranks_per_server,
            }
        } else {
            Strategy {
                kv_world_size: ranks_per_server,
                kv_worker_id: rank % ranks_per_server,
                num_kv_readers: 1,
                first_of_group: within == 0,
                stores: true,
                ranks_per_server,
                server: rank / ranks_per_server,
            }
        };
        if strategy.kv_world_size > WORLD_SIZE_MAX {
            return Err(Error::invalid(format!(
                "{} pieces of a chunk are more than the {WORLD_SIZE_MAX} that a key can name: use smaller \
                 parallel sizes or more servers",
                strategy.kv_world_size
            )));
        }
        Ok(strategy)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn parallelism(tensor: u32, pipeline: u32, rank: u32, mla: bool) -> Parallelism {
        Parallelism { tensor, pipeline, rank, mla, servers: 1, decode_context: 1 }
    }

    /// For each server and piece: workers that store it, and workers that load it.
    fn pieces(of: Parallelism) -> HashMap<(u32, u32), (u32, u32)> {
        let mut pieces = HashMap::new();
        for rank in 0..of.tensor * of.pipeline {
            let strategy = Parallelism { rank, ..of }.strategy().unwrap();
            let piece: &mut (u32, u32) =
                pieces.entry((strategy.server, strategy.kv_worker_id)).or_default();
            piece.0 += u32::from(strategy.stores);
            piece.1 += 1;
        }
        pieces
    }

    #[test]
    fn every_piece_is_stored_once_and_leased_for_all_who_load_it() {
        for tensor in [1, 2, 4, 8] {
            for pipeline in [1, 2, 4] {
                for decode_context in [1, 2, 4] {
                    for mla in [false, true] {
                        let decode_context = if mla { decode_context } else { 1 };
                        let of =
                            Parallelism { decode_context, ..parallelism(tensor, pipeline, 0, mla) };
                        let Ok(strategy) = of.strategy() else { continue };
                        let pieces = pieces(of);
                        assert_eq!(pieces.len(), strategy.kv_world_size as usize, "{of:?}");
                        for (stored, loaded) in pieces.values() {
                            assert_eq!(*stored, 1, "{of:?}");
                            assert_eq!(*loaded, strategy.num_kv_readers, "{of:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_together_is_named() {
        let fits = parallelism(4, 2, 0, true);
        for (of, why) in [
            (Parallelism { tensor: 0, ..fits }, "tensor-parallel size is 0"),
            (Parallelism { servers: 0, ..fits }, "number of servers is 0"),
            (Parallelism { rank: 8, ..fits }, "rank 8 is not one of the 8"),
            (Parallelism { servers: 3, ..fits }, "3 servers"),
            (Parallelism { decode_context: 3, ..fits }, "3 token shards"),
            (parallelism(u32::MAX, 2, 0, false), "ranks are more than"),
            (parallelism(256, 1, 0, false), "256 pieces"),
            (Parallelism { servers: 4, decode_context: 4, pipeline: 1, ..fits }, "fewer servers"),
        ] {
            assert!(of.strategy().unwrap_err().message.contains(why), "{of:?}");
        }
        assert!(parallelism(256, 1, 255, true).strategy().is_ok(), "MLA's are one piece");
    }
}
