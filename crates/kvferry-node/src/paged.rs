//! The handles of a paged engine's connectors.

use std::sync::{Arc, Mutex, PoisonError};

use kvferry_core::cache::Cache;
use kvferry_core::key::Dtype;
use kvferry_core::kv_layout::{KvLayout, Order, Planes};
use kvferry_core::paged::{Arrays, Load, Place, Range, Scheduler, Store, Worker};
use kvferry_core::{Error, ErrorCode};
use napi::bindgen_prelude::{PromiseRaw, Uint8ArraySlice};
use napi::{Env, Result};
use napi_derive::napi;

use crate::error::to_napi;
use crate::promise::{begin, deadline};

/// Whose KV it is; `ts/connector/cache-adapter.ts` has the defaults.
#[napi(object)]
pub struct PagedPlace {
    /// The model.
    pub model_name: String,
    /// Pieces that a chunk's KV has.
    pub kv_world_size: u32,
    /// Ranks that load each piece.
    pub num_kv_readers: u32,
}

/// An engine's KV memory.
#[napi(object)]
pub struct PagedLayout {
    /// Layers of this rank.
    pub num_layers: u32,
    /// Blocks of each array.
    pub num_blocks: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// KV heads of this rank.
    pub num_kv_heads: u32,
    /// Elements of a head.
    pub head_size: u32,
    /// torch's name of the element type.
    pub dtype: String,
    /// "separate", "fused" or "latent".
    pub planes: String,
    /// "NHD" or "HND".
    pub order: String,
}

/// Some of a request's tokens.
#[napi(object)]
pub struct PagedRange {
    /// The request.
    pub request_id: String,
    /// First token.
    pub start: u32,
    /// Token after the last.
    pub end: u32,
    /// The tenant.
    pub cache_salt: String,
}

/// The scheduler's side.
#[napi]
pub struct PagedScheduler {
    inner: Arc<Scheduler>,
}

/// A worker's side.
#[napi]
pub struct PagedWorker {
    inner: Arc<Worker>,
    array_bytes: f64,
}

/// Chunks to be copied into blocks.
#[napi]
pub struct PagedLoad {
    inner: Mutex<Option<Load>>,
    chunks: u32,
}

/// Room for chunks to be copied to.
#[napi]
pub struct PagedStore {
    inner: Mutex<Option<Store>>,
    chunks: u32,
    refused: Option<u32>,
}

impl From<PagedPlace> for Place {
    fn from(place: PagedPlace) -> Self {
        let PagedPlace { model_name, kv_world_size, num_kv_readers } = place;
        Self { model_name, world_size: kv_world_size, num_kv_readers }
    }
}

impl TryFrom<PagedLayout> for KvLayout {
    type Error = Error;

    fn try_from(layout: PagedLayout) -> kvferry_core::Result<Self> {
        let planes = match layout.planes.as_str() {
            "separate" => Planes::Separate,
            "fused" => Planes::Fused,
            "latent" => Planes::Latent,
            other => return Err(Error::invalid(format!("planes {other:?} are not known"))),
        };
        let order = match layout.order.as_str() {
            "NHD" => Order::Nhd,
            "HND" => Order::Hnd,
            other => return Err(Error::invalid(format!("the order {other:?} is not known"))),
        };
        Ok(Self {
            num_layers: layout.num_layers,
            num_blocks: layout.num_blocks,
            block_size: layout.block_size,
            num_kv_heads: layout.num_kv_heads,
            head_size: layout.head_size,
            dtype: Dtype::new(&layout.dtype)?,
            planes,
            order,
        })
    }
}

/// Arrays of JavaScript's, for the time of a call.
struct Borrowed<'a>(Vec<Uint8ArraySlice<'a>>);

impl Arrays for Borrowed<'_> {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn array(&mut self, index: usize) -> &mut [u8] {
        // SAFETY: this thread, which runs the array's JavaScript, does nothing else during the call, and the
        // borrow of `self` keeps any other array, which may share memory, from being borrowed at the same
        // time. A SharedArrayBuffer may be written by another thread meanwhile: its bytes are then any
        // mixture, and none of them is invalid.
        unsafe { self.0[index].as_mut() }
    }
}

fn range(range: PagedRange, tokens: &[u32]) -> Range {
    let PagedRange { request_id, start, end, cache_salt } = range;
    Range { request_id, token_ids: tokens.into(), start: start.into(), end: end.into(), cache_salt }
}

impl PagedScheduler {
    pub(crate) fn open(cache: Arc<dyn Cache>, place: PagedPlace) -> Result<Self> {
        let inner = Scheduler::new(cache, place.into()).map_err(to_napi)?;
        Ok(Self { inner: Arc::new(inner) })
    }
}

#[napi]
impl PagedScheduler {
    /// Leading chunks of the range that are there, leased now.
    #[napi(catch_unwind)]
    pub fn lookup<'env>(
        &self,
        env: &'env Env,
        tokens: &[u32],
        which: PagedRange,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, u32>> {
        let (inner, which, until) =
            (Arc::clone(&self.inner), range(which, tokens), deadline(timeout_ms));
        begin(env, async move {
            let chunks = inner.lookup(which, until).await?;
            Ok(u32::try_from(chunks).unwrap_or(u32::MAX))
        })
    }

    /// Gives leases back.
    #[napi(catch_unwind)]
    pub fn release<'env>(
        &self,
        env: &'env Env,
        tokens: &[u32],
        which: PagedRange,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, ()>> {
        let (inner, which, until) =
            (Arc::clone(&self.inner), range(which, tokens), deadline(timeout_ms));
        begin(env, async move { inner.release(which, until).await })
    }

    /// Drops what is stored and not in use.
    #[napi(catch_unwind)]
    pub fn clear<'env>(&self, env: &'env Env, timeout_ms: u32) -> Result<PromiseRaw<'env, ()>> {
        let (inner, until) = (Arc::clone(&self.inner), deadline(timeout_ms));
        begin(env, async move { inner.clear(until).await })
    }

    /// Ends a request's session.
    #[napi(catch_unwind)]
    pub fn end_session<'env>(
        &self,
        env: &'env Env,
        request_id: String,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, ()>> {
        let (inner, until) = (Arc::clone(&self.inner), deadline(timeout_ms));
        begin(env, async move { inner.end_session(&request_id, until).await })
    }
}

impl PagedWorker {
    pub(crate) fn open(
        env: &Env,
        cache: Arc<dyn Cache>,
        place: PagedPlace,
        worker_id: u32,
        layout: PagedLayout,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'_, Self>> {
        let layout = KvLayout::try_from(layout).map_err(to_napi)?;
        let until = deadline(timeout_ms);
        #[expect(clippy::cast_precision_loss, reason = "below 2^53, as registering checks")]
        let array_bytes = layout.array_bytes() as f64;
        begin(env, async move {
            let inner = Worker::register(cache, place.into(), worker_id, layout, until).await?;
            Ok(Self { inner: Arc::new(inner), array_bytes })
        })
    }
}

#[napi]
impl PagedWorker {
    /// Bytes that each array of the memory has.
    #[napi(getter, catch_unwind)]
    pub fn array_bytes(&self) -> f64 {
        self.array_bytes
    }

    /// Begins a load.
    #[napi(catch_unwind, ts_return_type = "Promise<PagedLoad>")]
    pub fn load<'env>(
        &self,
        env: &'env Env,
        tokens: &[u32],
        which: PagedRange,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, PagedLoad>> {
        let (inner, which, until) =
            (Arc::clone(&self.inner), range(which, tokens), deadline(timeout_ms));
        begin(env, async move {
            let load = inner.load(which, until).await?;
            Ok(PagedLoad { chunks: load.chunks(), inner: Mutex::new(Some(load)) })
        })
    }

    /// Copies a load into blocks; `false` when its chunks are gone.
    #[napi(catch_unwind)]
    pub fn copy_in(
        &self,
        load: &PagedLoad,
        arrays: Vec<Uint8ArraySlice<'_>>,
        blocks: &[u32],
        skip: u32,
    ) -> Result<bool> {
        let load = load.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let load = load.as_ref().ok_or_else(ended)?;
        self.inner.copy_in(load, &mut Borrowed(arrays), blocks, skip).map_err(to_napi)
    }

    /// Ends a load; `false` when what was copied must not be used.
    #[napi(catch_unwind)]
    pub fn finish<'env>(
        &self,
        env: &'env Env,
        load: &PagedLoad,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, bool>> {
        let (inner, load, until) =
            (Arc::clone(&self.inner), take(&load.inner)?, deadline(timeout_ms));
        begin(env, async move { inner.finish(load, until).await })
    }

    /// Begins a store.
    #[napi(catch_unwind, ts_return_type = "Promise<PagedStore>")]
    pub fn store<'env>(
        &self,
        env: &'env Env,
        tokens: &[u32],
        which: PagedRange,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, PagedStore>> {
        let (inner, which, until) =
            (Arc::clone(&self.inner), range(which, tokens), deadline(timeout_ms));
        begin(env, async move {
            let store = inner.store(which, until).await?;
            let (chunks, refused) = (store.chunks(), store.refused());
            Ok(PagedStore { inner: Mutex::new(Some(store)), chunks, refused })
        })
    }

    /// Copies blocks out.
    #[napi(catch_unwind)]
    pub fn copy_out(
        &self,
        store: &PagedStore,
        arrays: Vec<Uint8ArraySlice<'_>>,
        blocks: &[u32],
    ) -> Result<()> {
        let store = store.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let store = store.as_ref().ok_or_else(ended)?;
        let arrays: Vec<&[u8]> = arrays.iter().map(|array| &**array).collect();
        self.inner.copy_out(store, &arrays, blocks).map_err(to_napi)
    }

    /// Makes a store visible; the chunks that it had.
    #[napi(catch_unwind)]
    pub fn commit<'env>(
        &self,
        env: &'env Env,
        store: &PagedStore,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, u32>> {
        let (inner, store, until) =
            (Arc::clone(&self.inner), take(&store.inner)?, deadline(timeout_ms));
        begin(env, async move { inner.commit(store, until).await })
    }

    /// Gives a store's room back.
    #[napi(catch_unwind)]
    pub fn abandon<'env>(
        &self,
        env: &'env Env,
        store: &PagedStore,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, ()>> {
        let (inner, store, until) =
            (Arc::clone(&self.inner), take(&store.inner)?, deadline(timeout_ms));
        begin(env, async move { inner.abandon(store, until).await })
    }

    /// Unregisters.
    #[napi(catch_unwind)]
    pub fn close<'env>(&self, env: &'env Env, timeout_ms: u32) -> Result<PromiseRaw<'env, ()>> {
        let (inner, until) = (Arc::clone(&self.inner), deadline(timeout_ms));
        begin(env, async move { inner.unregister(until).await })
    }
}

#[napi]
impl PagedLoad {
    /// Chunks that can be copied.
    #[napi(getter, catch_unwind)]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }
}

#[napi]
impl PagedStore {
    /// Chunks that there is room for.
    #[napi(getter, catch_unwind)]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Chunks that did not fit; absent when the server does not say.
    #[napi(getter, catch_unwind)]
    pub fn refused(&self) -> Option<u32> {
        self.refused
    }
}

fn take<T>(once: &Mutex<Option<T>>) -> Result<T> {
    once.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(ended)
}

fn ended() -> napi::Error {
    to_napi(Error::new(ErrorCode::Closed, "this operation has ended already; begin another one"))
}
