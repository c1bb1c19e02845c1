//! The handles of a paged engine's connectors.

use std::sync::{Arc, Mutex, PoisonError};

use kvferry_copy::HostArrays;
use kvferry_core::cache::Cache;
use kvferry_core::copy_plan::CopyShape;
use kvferry_core::key::Dtype;
use kvferry_core::kv_layout::{KvLayout, Order, Planes};
use kvferry_core::paged::{Copies, Load, Place, Range, Scheduler, Store, Worker};
use kvferry_core::{Error, ErrorCode};
use napi::bindgen_prelude::{PromiseRaw, Uint8ArraySlice};
use napi::{Env, Result};
use napi_derive::napi;

use crate::error::to_napi;
use crate::promise::{begin, deadline};

/// Bytes that are copied in one go while JavaScript stands still: a millisecond or two.
const BORROWED: u64 = 8 << 20;

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
    /// Bytes from a block to the next, if they do not follow each other.
    pub block_stride: Option<f64>,
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
    planned: Mutex<Option<Planned>>,
    chunks: u32,
}

/// Room for chunks to be copied to.
#[napi]
pub struct PagedStore {
    inner: Mutex<Option<Store>>,
    planned: Mutex<Option<Planned>>,
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
            block_stride: layout.block_stride.map(integer).transpose()?,
        })
    }
}

/// Copies that are planned, and how many of their bytes are copied.
struct Planned {
    copies: Copies,
    at: u64,
}

impl Planned {
    fn new(copies: Copies) -> Self {
        Self { copies, at: 0 }
    }

    /// Copies on, between a pool and arrays of JavaScript's, about so many bytes; `false` when that was the rest.
    fn copy_some(
        planned: &Mutex<Option<Self>>,
        shape: &Arc<CopyShape>,
        arrays: &mut [Uint8ArraySlice<'_>],
    ) -> Result<bool> {
        let taken = planned.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut this) = taken else { return Ok(false) };
        let places: Vec<(*mut u8, usize)> =
            arrays.iter().map(|array| (array.as_ptr().cast_mut(), array.len())).collect();
        // SAFETY: this thread, which runs the arrays' JavaScript, does nothing else during the call, and the value
        // is gone after it. A SharedArrayBuffer may be written by another thread meanwhile: its bytes are then any
        // mixture, and none of them is invalid.
        let arrays = unsafe { HostArrays::new(Arc::clone(shape), &places) }.map_err(to_napi)?;
        let Copies { plan, memory } = &this.copies;
        let end = plan.bytes().min(this.at + BORROWED);
        arrays.copy(plan, this.at..end, &**memory).map_err(to_napi)?;
        let more = end < plan.bytes();
        this.at = end;
        if more {
            *planned.lock().unwrap_or_else(PoisonError::into_inner) = Some(this);
        }
        Ok(more)
    }
}

fn integer(number: f64) -> kvferry_core::Result<u64> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked just before"
    )]
    match number {
        _ if number.fract() == 0.0 && (0.0..9_007_199_254_740_992.0).contains(&number) => {
            Ok(number as u64)
        }
        _ => Err(Error::invalid(format!("{number} is no number of bytes"))),
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
            Ok(PagedLoad {
                chunks: load.chunks(),
                inner: Mutex::new(Some(load)),
                planned: Mutex::default(),
            })
        })
    }

    /// Plans a load into blocks; `false` when its chunks are gone.
    #[napi(catch_unwind)]
    pub fn plan_load(&self, load: &PagedLoad, blocks: &[u32], skip: u32) -> Result<bool> {
        let inner = load.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let inner = inner.as_ref().ok_or_else(ended)?;
        let copies = self.inner.plan_load(inner, blocks, skip).map_err(to_napi)?;
        let there = copies.is_some();
        *load.planned.lock().unwrap_or_else(PoisonError::into_inner) = copies.map(Planned::new);
        Ok(there)
    }

    /// Copies on what was planned, some milliseconds long; `false` when that was the rest.
    #[napi(catch_unwind)]
    pub fn copy_in(&self, load: &PagedLoad, mut arrays: Vec<Uint8ArraySlice<'_>>) -> Result<bool> {
        Planned::copy_some(&load.planned, self.inner.shape(), &mut arrays)
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
            Ok(PagedStore {
                inner: Mutex::new(Some(store)),
                planned: Mutex::default(),
                chunks,
                refused,
            })
        })
    }

    /// Plans a store out of blocks.
    #[napi(catch_unwind)]
    pub fn plan_store(&self, store: &PagedStore, blocks: &[u32]) -> Result<()> {
        let inner = store.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let inner = inner.as_ref().ok_or_else(ended)?;
        let copies = self.inner.plan_store(inner, blocks).map_err(to_napi)?;
        *store.planned.lock().unwrap_or_else(PoisonError::into_inner) = Some(Planned::new(copies));
        Ok(())
    }

    /// Copies on what was planned, some milliseconds long; `false` when that was the rest.
    #[napi(catch_unwind)]
    pub fn copy_out(
        &self,
        store: &PagedStore,
        mut arrays: Vec<Uint8ArraySlice<'_>>,
    ) -> Result<bool> {
        Planned::copy_some(&store.planned, self.inner.shape(), &mut arrays)
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
