//! Recovery from KV blocks that could not be loaded: how many tokens each request still has computed,
//! and which blocks the engine's prefix cache must forget.
//!
//! The rules are those of vLLM 0.33's scheduler (vLLM pull request 38096). The engine counts the tokens of
//! a step as computed when it schedules them, but reports invalid blocks while that step ends: what was
//! computed before the step is `computed − scheduled`, and only that may lie in a block that was loaded.

use std::collections::{HashMap, HashSet};

use crate::defect::{Defect, is_active};
use crate::{Error, Result};

/// What becomes of a request whose KV could not be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadFailurePolicy {
    /// It ends with an error, and what may be wrong is evicted.
    Fail,
    /// It computes what is missing into the blocks that it has; nothing is evicted.
    Recompute,
}

/// The requests of one step in the order of their scan, and the blocks that were reported invalid in it.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Tokens of a block, at least 1.
    pub block_size: u32,
    /// Whether the blocks behind an invalid one are evicted.
    pub policy: LoadFailurePolicy,
    /// Tokens that each request counts as computed, those of this step included.
    pub computed: &'a [u32],
    /// Tokens of each request that were scheduled in this step: at most those computed.
    pub scheduled: &'a [u32],
    /// Whether each request loads between steps: 0 for no. Such blocks are in no prefix cache yet, so none
    /// is evicted, and blocks that running requests have too are counted apart.
    pub asynchronous: &'a [u8],
    /// Where each request's blocks begin in `block_ids`, and the end: requests + 1 ascending numbers from 0.
    pub block_offsets: &'a [u32],
    /// The blocks of each request in the order of its tokens, those allocated in this step included.
    pub block_ids: &'a [u32],
    /// Blocks that could not be loaded, in any order. An id may be there twice, or be of no request.
    pub invalid: &'a [u32],
}

/// What follows from a step's invalid blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    /// Tokens that each request has computed: never more than before.
    pub computed: Vec<u32>,
    /// Whether each request had an invalid block among those computed before the step.
    pub affected: Vec<bool>,
    /// The invalid blocks that such requests had, each once, in the order of `invalid`.
    pub found: Vec<u32>,
    /// Blocks that the prefix cache must forget, each once, in the order of the scan.
    pub evicted: Vec<u32>,
    /// Tokens that have to be computed again, or for the first time; of shared blocks counted once.
    pub affected_tokens: u64,
}

/// Of an invalid block: a request that loads between steps has it.
const FOUND_ASYNCHRONOUS: u8 = 1;
/// Of an invalid block: a running request has it.
const FOUND_SYNCHRONOUS: u8 = 2;

/// Cuts every request at its first invalid block. Of a block that several requests of a kind share, the first
/// of them computes it anew; the others keep it, and go back to what they had before this step, if that is all
/// that is wrong with them. The time is linear in the blocks and the invalid ids.
pub fn recover(step: &Step<'_>) -> Result<Recovery> {
    check(step)?;
    let mut found: HashMap<u32, u8> = step.invalid.iter().map(|id| (*id, 0)).collect();
    let mut evicting = HashSet::new();
    let mut recovery = Recovery {
        computed: step.computed.to_vec(),
        affected: vec![false; step.computed.len()],
        found: Vec::new(),
        evicted: Vec::new(),
        affected_tokens: 0,
    };
    for (request, range) in step.block_offsets.windows(2).enumerate() {
        let ids = &step.block_ids[range[0] as usize..range[1] as usize];
        let kind = match step.asynchronous[request] {
            0 => FOUND_SYNCHRONOUS,
            _ => FOUND_ASYNCHRONOUS,
        };
        let mut before = step.computed[request] - step.scheduled[request];
        if is_active(Defect::RecoveryWithoutSubtraction) {
            before = step.computed[request];
        }
        let mut affected = false;
        let mut cut = None;
        for (at, id) in (0..before.div_ceil(step.block_size)).zip(ids) {
            let Some(found) = found.get_mut(id) else { continue };
            affected = true;
            if *found & kind == 0 {
                *found |= kind;
                cut = cut.or(Some(at));
            }
        }
        if !affected {
            continue;
        }
        recovery.affected[request] = true;
        recovery.computed[request] = match cut {
            Some(at) => {
                let kept = at * step.block_size;
                recovery.affected_tokens += u64::from(before - kept);
                if kind == FOUND_SYNCHRONOUS && step.policy == LoadFailurePolicy::Fail {
                    let behind = ids[at as usize..].iter();
                    recovery.evicted.extend(behind.filter(|id| evicting.insert(**id)));
                }
                kept
            }
            None => {
                recovery.affected_tokens += u64::from(step.scheduled[request]);
                before
            }
        };
    }
    let reported = step.invalid.iter().copied();
    recovery.found =
        reported.filter(|id| found.remove(id).is_some_and(|found| found > 0)).collect();
    Ok(recovery)
}

fn check(step: &Step<'_>) -> Result<()> {
    if step.block_size == 0 {
        return Err(Error::invalid("blockSize is 0: a block has at least one token"));
    }
    let requests = step.computed.len();
    if step.scheduled.len() != requests || step.asynchronous.len() != requests {
        return Err(Error::invalid(format!(
            "{requests} requests have {} counts of scheduled tokens and {} kinds of load",
            step.scheduled.len(),
            step.asynchronous.len()
        )));
    }
    let Step { block_offsets: offsets, block_ids: ids, .. } = step;
    let ascending = offsets.is_sorted() && offsets.first() == Some(&0);
    let whole = offsets.last().is_some_and(|last| *last as usize == ids.len());
    if offsets.len() != requests + 1 || !ascending || !whole {
        return Err(Error::invalid(format!(
            "the block offsets of {requests} requests are {} ascending numbers from 0 to the number of block \
             ids, {}",
            requests + 1,
            ids.len()
        )));
    }
    let mut counts = step.computed.iter().zip(step.scheduled);
    match counts.position(|(computed, scheduled)| scheduled > computed) {
        None => Ok(()),
        Some(request) => Err(Error::invalid(format!(
            "request {request} of the step has {} computed tokens but {} scheduled in this step: the computed \
             ones must include those scheduled",
            step.computed[request], step.scheduled[request]
        ))),
    }
}

#[cfg(test)]
mod tests;
