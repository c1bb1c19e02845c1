//! Loads and stores in one go: from the request to the cache's last answer nobody needs to be asked in between.

use std::time::{Duration, Instant};

use crate::Result;
use crate::copying::{Copying, KvMemory, Watched};
use crate::paged::{Copies, Range, Worker};

/// What may be asked of a load or store in one go while it runs.
#[derive(Debug, Default)]
pub struct Transfer(Watched<Stage>);

#[derive(Debug, Default)]
enum Stage {
    /// The cache was not asked yet, or has not answered.
    #[default]
    Asking,
    /// The copy is about to begin.
    Beginning,
    Copying(Copying),
    /// Nothing will be copied.
    Over,
}

/// An engine's memory, and which blocks of it a load or store is of.
#[derive(Clone, Copy)]
pub struct Blocks<'a> {
    /// Where the blocks are.
    pub memory: &'a dyn KvMemory,
    /// The blocks of the whole range, see [`Worker::plan_load`].
    pub blocks: &'a [u32],
    /// Leading tokens of the range that a load leaves alone.
    pub skip: u32,
    /// Whether checksums are told with a store, and compared after a load.
    pub verify: bool,
}

impl Transfer {
    /// Keeps the copy from beginning; `false` when it has begun, or never will.
    pub fn forbid(&self) -> bool {
        self.0.change(0, |stage| {
            let asking = matches!(stage, Stage::Asking);
            if asking {
                *stage = Stage::Over;
            }
            asking
        })
    }

    /// Waits until the first `arrays` arrays are copied, all where there are fewer; not at all where nothing will be
    /// copied.
    ///
    /// # Errors
    /// Why the copy ended before that.
    pub async fn copied(&self, arrays: usize) -> Result<()> {
        let copying = self.0.until(0, |stage| match stage {
            Stage::Asking | Stage::Beginning => None,
            Stage::Over => Some(None),
            Stage::Copying(copying) => Some(Some(copying.clone())),
        });
        match copying.await {
            Some(copying) => copying.array(arrays).await,
            None => Ok(()),
        }
    }

    /// Begins the copy, unless that was forbidden.
    fn begin(&self, start: impl FnOnce() -> Result<Copying>) -> Result<Option<Copying>> {
        let forbidden = self.0.change(0, |stage| {
            let asking = matches!(stage, Stage::Asking);
            if asking {
                *stage = Stage::Beginning;
            }
            !asking
        });
        if forbidden {
            return Ok(None);
        }
        let copying = start()?;
        self.0.change(0, |stage| *stage = Stage::Copying(copying.clone()));
        Ok(Some(copying))
    }

    /// Nothing will be copied, unless it is already.
    fn over(&self) {
        self.0.change(0, |stage| {
            if !matches!(stage, Stage::Copying(_)) {
                *stage = Stage::Over;
            }
        });
    }
}

/// Tells who waits that nothing will be copied, however the work ended.
struct Over<'a>(&'a Transfer);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over();
    }
}

impl Worker {
    /// Loads the range's chunks into `into`; says how many chunks may be used, all of them or none: see
    /// [`Worker::finish`]. Each of the cache's answers may take `timeout`.
    ///
    /// # Errors
    /// As [`Worker::plan_load`]; what the cache or the memory says. Blocks may be filled in part then.
    pub async fn load_blocks(
        &self,
        range: Range,
        into: Blocks<'_>,
        transfer: &Transfer,
        timeout: Duration,
    ) -> Result<u32> {
        let _over = Over(transfer);
        let load = self.load(range, Instant::now() + timeout).await?;
        let chunks = load.chunks();
        let begun = self.plan_load(&load, into.blocks, into.skip).and_then(|copies| match copies {
            Some(copies) => begin(transfer, into, copies),
            None => Ok(None),
        });
        let copied = ended(transfer, &begun).await;
        let sums = match &copied {
            Ok(Some(copying)) if into.verify => Some(copying.checksums()),
            _ => None,
        };
        let held = self.finish(load, sums, Instant::now() + timeout).await;
        let copied = copied?.is_some(); // its error tells more
        Ok(if held? && copied { chunks } else { 0 })
    }

    /// Stores those of the range's chunks that are not there yet, out of `from`; says how many it were. Each of the
    /// cache's answers may take `timeout`.
    ///
    /// # Errors
    /// As [`Worker::plan_store`]; what the cache or the memory says. Nothing is stored then, and its room is given back as
    /// [`Worker::abandon`] does.
    pub async fn store_blocks(
        &self,
        range: Range,
        from: Blocks<'_>,
        transfer: &Transfer,
        timeout: Duration,
    ) -> Result<u32> {
        let _over = Over(transfer);
        let store = self.store(range, Instant::now() + timeout).await?;
        let planned = self.plan_store(&store, from.blocks);
        let begun = planned.and_then(|copies| begin(transfer, from, copies));
        let copied = ended(transfer, &begun).await;
        let until = Instant::now() + timeout;
        match copied {
            Ok(Some(copying)) => self.commit(store, &copying.checksums(), until).await,
            not => {
                let copying = begun.as_ref().ok().and_then(Option::as_ref);
                let abandoned = self.abandon(store, copying, until).await;
                not.and(abandoned).map(|()| 0)
            }
        }
    }
}

fn begin(transfer: &Transfer, blocks: Blocks<'_>, copies: Copies) -> Result<Option<Copying>> {
    transfer.begin(|| blocks.memory.copy(copies.plan, copies.memory, blocks.verify))
}

/// Waits for the end of what was begun.
async fn ended<'a>(
    transfer: &Transfer,
    begun: &'a Result<Option<Copying>>,
) -> Result<Option<&'a Copying>> {
    match begun {
        Ok(Some(copying)) => copying.ended().await?,
        Ok(None) | Err(_) => transfer.over(),
    }
    begun.as_ref().map(Option::as_ref).map_err(Clone::clone)
}
