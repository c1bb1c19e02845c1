//! Loads and stores of registered memory in one go: JavaScript may be busy meanwhile.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvferry_core::transfer::{Blocks, Transfer};
use kvferry_core::{Error, ErrorCode};
use napi::bindgen_prelude::{PromiseRaw, Uint32Array};
use napi::{Env, Result};
use napi_derive::napi;
use tokio::sync::oneshot;

use crate::error::to_napi;
use crate::paged::{PagedRange, PagedWorker, Registered, range, unregistered};
use crate::promise::{begin, begin_detached};

/// What to copy.
#[napi(object)]
pub struct PagedBlocks {
    /// The blocks of the whole range.
    pub blocks: Uint32Array,
    /// Leading tokens of the range that a load leaves alone.
    pub skip: u32,
    /// Whether checksums are told with a store, and compared after a load.
    pub verify: bool,
}

/// A load or store that runs by itself.
#[napi]
pub struct PagedTransfer {
    transfer: Arc<Transfer>,
    end: Mutex<Option<oneshot::Receiver<kvferry_core::Result<u32>>>>,
}

type Chunks<'a> = Pin<Box<dyn Future<Output = kvferry_core::Result<u32>> + Send + 'a>>;

impl PagedTransfer {
    /// Begins `work`, now as far as it needs not wait.
    fn begin(
        worker: &PagedWorker,
        what: &PagedBlocks,
        work: impl for<'a> FnOnce(Blocks<'a>, &'a Transfer) -> Chunks<'a> + Send + 'static,
    ) -> Self {
        let transfer = Arc::new(Transfer::default());
        let (told, end) = oneshot::channel();
        let PagedBlocks { blocks, skip, verify } = what;
        let (blocks, skip, verify) = (blocks.to_vec(), *skip, *verify);
        let (memory, under_way) = (Arc::clone(&worker.memory), Arc::clone(&transfer));
        begin_detached(async move {
            let chunks = match memory.get() {
                Some(Registered { memory, .. }) => {
                    let blocks = Blocks { memory: &**memory, blocks: &blocks, skip, verify };
                    work(blocks, &under_way).await
                }
                None => {
                    under_way.forbid();
                    Err(unregistered())
                }
            };
            let _ = told.send(chunks); // nobody need wait for it
        });
        Self { transfer, end: Mutex::new(Some(end)) }
    }
}

#[napi]
impl PagedWorker {
    /// Loads a range into registered memory.
    #[napi(catch_unwind)]
    pub fn load_blocks(
        &self,
        tokens: &[u32],
        which: PagedRange,
        into: PagedBlocks,
        timeout_ms: u32,
    ) -> PagedTransfer {
        let (inner, which) = (Arc::clone(&self.inner), range(which, tokens));
        let timeout = Duration::from_millis(timeout_ms.into());
        PagedTransfer::begin(self, &into, move |into, transfer| {
            Box::pin(async move { inner.load_blocks(which, into, transfer, timeout).await })
        })
    }

    /// Stores a range out of registered memory.
    #[napi(catch_unwind)]
    pub fn store_blocks(
        &self,
        tokens: &[u32],
        which: PagedRange,
        from: PagedBlocks,
        timeout_ms: u32,
    ) -> PagedTransfer {
        let (inner, which) = (Arc::clone(&self.inner), range(which, tokens));
        let timeout = Duration::from_millis(timeout_ms.into());
        PagedTransfer::begin(self, &from, move |from, transfer| {
            Box::pin(async move { inner.store_blocks(which, from, transfer, timeout).await })
        })
    }
}

#[napi]
impl PagedTransfer {
    /// Keeps the copy from beginning; `false` when it has begun, or never will.
    #[napi(catch_unwind)]
    pub fn forbid(&self) -> bool {
        self.transfer.forbid()
    }

    /// Resolves when the first `arrays` arrays are copied; with more than there are, when all are, and when nothing will
    /// be copied.
    #[napi(catch_unwind)]
    pub fn copied<'env>(&self, env: &'env Env, arrays: u32) -> Result<PromiseRaw<'env, ()>> {
        let transfer = Arc::clone(&self.transfer);
        begin(env, async move { transfer.copied(arrays as usize).await })
    }

    /// How many chunks were loaded or stored. To be called once.
    #[napi(catch_unwind)]
    pub fn ended<'env>(&self, env: &'env Env) -> Result<PromiseRaw<'env, u32>> {
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner).take();
        let lost = || Error::new(ErrorCode::Closed, "this operation has ended already");
        let end = end.ok_or_else(|| to_napi(lost()))?;
        begin(env, async move { end.await.unwrap_or_else(|_| Err(lost())) })
    }
}
