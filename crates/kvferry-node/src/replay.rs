//! Replays of recorded requests.

use std::sync::Arc;
use std::time::Duration;

use kvferry_core::{Error, ErrorCode};
use kvferry_store::Policy;
use kvferry_store::replay::{Replay, Request};
use napi::bindgen_prelude::{Float64Array, PromiseRaw, Uint32Array};
use napi::{Env, Result};
use napi_derive::napi;

use crate::promise::promise;
use crate::server::whole;

/// What came of a replay.
#[napi(object)]
pub struct ReplayReport {
    /// Requests.
    pub requests: f64,
    /// Blocks of all of them.
    pub blocks: f64,
    /// Leading blocks that were there, of all of them.
    pub hits: f64,
    /// Blocks that the policy knows in the end, where it counts them.
    pub known: f64,
    /// Bytes that it takes for them.
    pub known_bytes: f64,
}

/// Replays requests: for each its time in milliseconds and the number of its blocks, which follow each other in
/// `blocks`.
#[napi(catch_unwind)]
pub fn replay(
    env: &Env,
    times: Float64Array,
    lengths: Uint32Array,
    blocks: Uint32Array,
    capacity: f64,
    policy: String,
) -> Result<PromiseRaw<'_, ReplayReport>> {
    let (times, lengths, blocks) = (times.to_vec(), lengths.to_vec(), blocks.to_vec());
    promise(env, async move {
        let lost = |_| Error::new(ErrorCode::Internal, "the replay was given up");
        let replayed = move || run(&times, &lengths, &blocks, capacity, &policy);
        tokio::task::spawn_blocking(replayed).await.map_err(lost)?
    })
}

#[expect(clippy::cast_precision_loss, reason = "counts below 2^53")]
fn run(
    times: &[f64],
    lengths: &[u32],
    blocks: &[u32],
    capacity: f64,
    policy: &str,
) -> kvferry_core::Result<ReplayReport> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let policy = Policy::from_name(policy)?;
    let mut replay = Replay::new(whole(capacity, "capacity")?, longest.into(), policy)?;
    let mut rest = blocks;
    for (ms, length) in times.iter().zip(lengths) {
        let (blocks, others) = rest.split_at_checked(*length as usize).ok_or_else(|| {
            Error::invalid(format!("a request of {length} blocks has {} left", rest.len()))
        })?;
        rest = others;
        let at = Duration::try_from_secs_f64(ms / 1000.0)
            .map_err(|_| Error::invalid(format!("the time {ms} is none after the first")))?;
        replay.request(&Request { at, blocks: Arc::from(blocks) })?;
    }
    let report = replay.report();
    Ok(ReplayReport {
        requests: report.requests as f64,
        blocks: report.blocks as f64,
        hits: report.hits as f64,
        known: report.known as f64,
        known_bytes: report.known_bytes as f64,
    })
}
