//! Which LMCache's operation ids a server knows: [`Dialect`] has the table. A server that knows none
//! of them stays silent, as one does that hangs, so the questions end by the caller's deadline.

use std::time::Duration;

use bytes::Bytes;
use kvferry_core::Result;
use kvferry_wire::{Dialect, Operation, Reply, Request};
use tokio::time::timeout;

use crate::link::Link;

/// What a server told of itself.
pub(crate) struct Release {
    pub(crate) dialect: Dialect,
    /// Tokens of one chunk, at least 1.
    pub(crate) chunk_size: u32,
    /// What it can beside its dialect, by names.
    pub(crate) announced: Vec<String>,
}

impl Release {
    pub(crate) fn announces(&self, name: &str) -> bool {
        self.announced.iter().any(|announced| announced == name)
    }
}

/// Asks. A server that is silent for `patience` is asked the older question too; its answer to the
/// first one counts all the same, when it comes late.
pub(crate) async fn find(link: &mut Link, patience: Duration) -> Result<Release> {
    let current = link.ask(&Request::GetChunkSize, Dialect::Current)?;
    let answer = match timeout(patience, link.answer(&[&current])).await {
        Ok(answer) => answer?.1,
        Err(_) => {
            let old = link.ask(&Request::GetChunkSize, Dialect::Lmcache047)?;
            loop {
                let (uid, answer) = link.answer(&[&current, &old]).await?;
                if uid == current {
                    break answer;
                }
                // Ours answers "no" to a commit of nothing, which this is to it.
                if let Some(size @ 1..) = integer(&answer) {
                    return Ok(Release {
                        dialect: Dialect::Lmcache047,
                        chunk_size: chunk_size(link, size)?,
                        announced: Vec::new(),
                    });
                }
            }
        }
    };
    if let Some(size) = integer(&answer) {
        let chunk_size = chunk_size(link, size)?;
        let names = link.ask(&Request::GetExperimental, Dialect::Current)?;
        // Releases that do not know the question answer this one only. Both go at once and are
        // answered in their order.
        let noop = link.ask(&Request::Noop, Dialect::Current)?;
        let (uid, answer) = link.answer(&[&names, &noop]).await?;
        if uid == noop {
            let (dialect, announced) = (Dialect::Lmcache053, Vec::new());
            return Ok(Release { dialect, chunk_size, announced });
        }
        let announced = match Reply::decode(Operation::GetExperimental, &answer) {
            Ok(Reply::Names(names)) => names,
            _ => Vec::new(),
        };
        return Ok(Release { dialect: Dialect::Current, chunk_size, announced });
    }
    if Reply::decode(Operation::Noop, &answer).is_err() {
        return Err(link.broken(format!(
            "it answers neither as a server does nor as one of an older release; kvferry knows {}",
            Dialect::RELEASES
        )));
    }
    let asked = link.ask(&Request::GetChunkSize, Dialect::Lmcache050)?;
    let (_, answer) = link.answer(&[&asked]).await?;
    let size = integer(&answer).unwrap_or(0);
    let chunk_size = chunk_size(link, size)?;
    Ok(Release { dialect: Dialect::Lmcache050, chunk_size, announced: Vec::new() })
}

fn integer(payload: &[Bytes]) -> Option<u64> {
    match Reply::decode(Operation::GetChunkSize, payload) {
        Ok(Reply::Integer(value)) => Some(value),
        _ => None,
    }
}

fn chunk_size(link: &Link, size: u64) -> Result<u32> {
    let size = u32::try_from(size).ok().filter(|size| *size > 0);
    size.ok_or_else(|| link.broken("its chunks have no size from 1 to 2^32 - 1"))
}
