//! The handles of a paged engine's connectors.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use kvferry_copy::cuda::{CudaMemory, IpcArray};
use kvferry_copy::{HostArrays, HostMemory};
use kvferry_core::cache::Cache;
use kvferry_core::copy_plan::CopyShape;
use kvferry_core::copy_sums::CopySums;
use kvferry_core::copying::{Copying, KvMemory};
use kvferry_core::key::Dtype;
use kvferry_core::kv_layout::{KvLayout, Order, Planes};
use kvferry_core::paged::{self, Load, Place, Range, Scheduler, Store, Worker};
use kvferry_core::{Error, ErrorCode};
use napi::bindgen_prelude::{BigInt, PromiseRaw, Uint8Array, Uint8ArraySlice};
use napi::{Env, Result};
use napi_derive::napi;

use crate::error::to_napi;
use crate::promise::{begin, deadline, promise};

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
    /// Before `inner`: when that goes, its slots are given back, and nothing must be copied any more.
    pub(crate) memory: Arc<OnceLock<Registered>>,
    pub(crate) inner: Arc<Worker>,
    array_bytes: f64,
}

/// Chunks to be copied into blocks.
#[napi]
pub struct PagedLoad {
    inner: Mutex<Option<Load>>,
    copies: Arc<Copies>,
    verify: OnceLock<bool>,
    chunks: u32,
}

/// Room for chunks to be copied to.
#[napi]
pub struct PagedStore {
    inner: Mutex<Option<Store>>,
    copies: Arc<Copies>,
    chunks: u32,
    refused: Option<u32>,
}

/// The copies of a load or store: planned, then under way.
#[derive(Default)]
struct Copies {
    planned: Mutex<Option<Planned>>,
    copying: OnceLock<Copying>,
    /// One for each chunk, where they were asked for, once all is copied in a caller's arrays.
    checksums: OnceLock<Vec<u64>>,
}

/// KV memory that copies run to and from by themselves.
pub(crate) struct Registered {
    pub(crate) memory: Box<dyn KvMemory>,
    worker: Arc<Worker>,
    /// What keeps the memory alive, if it is JavaScript's.
    _arrays: Vec<Uint8Array>,
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

/// What is planned, and how many of its bytes are copied.
struct Planned {
    copies: paged::Copies,
    at: u64,
    /// What is summed of it, if it is to be.
    sums: Option<CopySums>,
}

impl Copies {
    fn plan(&self, copies: paged::Copies, verify: bool) {
        *lock(&self.planned) =
            Some(Planned { copies, at: 0, sums: verify.then(CopySums::default) });
    }

    /// Copies on, between a pool and arrays of JavaScript's; `false` when that was the rest.
    fn copy_some(&self, shape: &Arc<CopyShape>, arrays: &[Uint8ArraySlice<'_>]) -> Result<bool> {
        let Some(mut planned) = lock(&self.planned).take() else { return Ok(false) };
        let places: Vec<(*mut u8, usize)> =
            arrays.iter().map(|array| (array.as_ptr().cast_mut(), array.len())).collect();
        // SAFETY: this thread, which runs the arrays' JavaScript, does nothing else during the call, and the value
        // is gone after it. A SharedArrayBuffer may be written by another thread meanwhile: its bytes are then any
        // mixture, and none of them is invalid.
        let arrays = unsafe { HostArrays::new(Arc::clone(shape), &places) }.map_err(to_napi)?;
        let paged::Copies { plan, memory } = &planned.copies;
        let end = plan.bytes().min(planned.at + BORROWED);
        let copied = match &mut planned.sums {
            Some(sums) => arrays.copy_summed(plan, planned.at..end, &**memory, sums),
            None => arrays.copy(plan, planned.at..end, &**memory),
        };
        copied.map_err(to_napi)?;
        if end < plan.bytes() {
            planned.at = end;
            *lock(&self.planned) = Some(planned);
            return Ok(true);
        }
        if let Some(sums) = planned.sums {
            let _ = self.checksums.set(sums.finish(plan).map_err(to_napi)?);
        }
        Ok(false)
    }

    /// Begins to copy between a pool and registered memory.
    fn start(&self, memory: Option<&Registered>) -> Result<()> {
        let memory = memory.ok_or_else(|| to_napi(unregistered()))?;
        if self.copying.get().is_some() {
            return Err(ended());
        }
        let planned = lock(&self.planned).take().ok_or_else(ended)?;
        let paged::Copies { plan, memory: pool } = planned.copies;
        let copying = memory.memory.copy(plan, pool, planned.sums.is_some()).map_err(to_napi)?;
        let _ = self.copying.set(copying); // there was none
        Ok(())
    }

    /// What must have ended before slots are given back.
    fn under_way(&self) -> Option<Copying> {
        self.copying.get().cloned()
    }

    /// One for each chunk; none where none were asked for, or not everything was copied.
    fn checksums(&self) -> Vec<u64> {
        let copying = || self.copying.get().map(Copying::checksums).unwrap_or_default();
        self.checksums.get().cloned().unwrap_or_else(copying)
    }
}

impl Registered {
    fn close(&self) {
        self.worker.close(&*self.memory);
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.close();
    }
}

/// Ends copies with the environment that owns their memory.
fn close_with(env: &Env, memory: &Arc<OnceLock<Registered>>) -> Result<()> {
    let close = |memory: Weak<OnceLock<Registered>>| {
        if let Some(memory) = memory.upgrade()
            && let Some(memory) = memory.get()
        {
            memory.close();
        }
    };
    env.add_env_cleanup_hook(Arc::downgrade(memory), close).map(drop)
}

/// Waits until nothing is copied any more.
async fn copied(copying: Option<&Copying>) -> kvferry_core::Result<()> {
    match copying {
        Some(copying) => copying.ended().await,
        None => Ok(()),
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

pub(crate) fn unregistered() -> Error {
    Error::invalid("no memory is registered that copies could run to")
}

pub(crate) fn range(range: PagedRange, tokens: &[u32]) -> Range {
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
            Ok(Self { inner: Arc::new(inner), array_bytes, memory: Arc::default() })
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

    /// Names arrays on SharedArrayBuffers, which copies then run to and from by themselves.
    #[napi(catch_unwind)]
    pub fn register_shared(&self, env: &Env, arrays: Vec<Uint8Array>) -> Result<()> {
        let places: Vec<(*mut u8, usize)> =
            arrays.iter().map(|array| (array.as_ptr().cast_mut(), array.len())).collect();
        // SAFETY: a SharedArrayBuffer can neither move nor be detached, and the references to the arrays go after
        // the memory was closed: by its drop, or by the hook when the environment ends before.
        let arrays_by_address = unsafe { HostArrays::new(self.inner.shape().clone(), &places) };
        let memory = HostMemory::new(arrays_by_address.map_err(to_napi)?);
        self.register(env, Box::new(memory), arrays)
    }

    /// Names host memory by address, which copies then run to and from by themselves. It must stay until
    /// [`PagedWorker::close`] has resolved.
    #[napi(catch_unwind)]
    pub fn register_host(&self, env: &Env, addresses: &[u64]) -> Result<()> {
        let places = self.places(addresses).map_err(to_napi)?;
        // SAFETY: who calls promises it, see `KvPointer` in `ts/connector/adapter.ts`.
        let arrays = unsafe { HostArrays::new(self.inner.shape().clone(), &places) };
        let memory = HostMemory::new(arrays.map_err(to_napi)?);
        self.register(env, Box::new(memory), Vec::new())
    }

    /// Names a GPU's memory by address, which copies then run to and from by themselves. It must stay until
    /// [`PagedWorker::close`] has resolved.
    #[napi(catch_unwind)]
    pub fn register_cuda<'env>(
        &self,
        env: &'env Env,
        device: u32,
        stream: BigInt,
        addresses: &[u64],
    ) -> Result<PromiseRaw<'env, ()>> {
        let (bytes, stream) = (self.inner.shape().array_bytes(), stream.get_u64().1);
        let arrays: Vec<(u64, u64)> = addresses.iter().map(|address| (*address, bytes)).collect();
        self.register_later(env, move |shape| {
            // SAFETY: who calls promises it, see `KvPointer` in `ts/connector/adapter.ts`.
            unsafe { CudaMemory::new(shape, device, stream, &arrays) }
        })
    }

    /// The same for memory that another process has: handles of 64 bytes, behind each other.
    #[napi(catch_unwind)]
    pub fn register_cuda_ipc<'env>(
        &self,
        env: &'env Env,
        device: u32,
        stream: BigInt,
        handles: &[u8],
        offsets: &[u64],
    ) -> Result<PromiseRaw<'env, ()>> {
        let (bytes, stream) = (self.inner.shape().array_bytes(), stream.get_u64().1);
        let handles = handles.as_chunks().0.iter().zip(offsets);
        let arrays: Vec<IpcArray> = handles
            .map(|(handle, offset)| IpcArray { handle: *handle, offset: *offset, bytes })
            .collect();
        self.register_later(env, move |shape| {
            // SAFETY: who calls promises it, see `KvIpcHandle` in `ts/connector/adapter.ts`.
            unsafe { CudaMemory::open_ipc(shape, device, stream, &arrays) }
        })
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
                copies: Arc::default(),
                verify: OnceLock::new(),
            })
        })
    }

    /// Plans a load into blocks; `false` when its chunks are gone.
    #[napi(catch_unwind)]
    pub fn plan_load(
        &self,
        load: &PagedLoad,
        blocks: &[u32],
        skip: u32,
        verify: bool,
    ) -> Result<bool> {
        let inner = lock(&load.inner);
        let inner = inner.as_ref().ok_or_else(ended)?;
        let copies = self.inner.plan_load(inner, blocks, skip).map_err(to_napi)?;
        let _ = load.verify.set(verify);
        Ok(copies.map(|copies| load.copies.plan(copies, verify)).is_some())
    }

    /// Copies on into arrays that it has for the time of the call, some milliseconds long; `false` when that was
    /// the rest.
    #[napi(catch_unwind)]
    pub fn copy_in(&self, load: &PagedLoad, arrays: Vec<Uint8ArraySlice<'_>>) -> Result<bool> {
        load.copies.copy_some(self.inner.shape(), &arrays)
    }

    /// Begins to copy into registered memory.
    #[napi(catch_unwind)]
    pub fn start_in(&self, load: &PagedLoad) -> Result<()> {
        load.copies.start(self.memory.get())
    }

    /// Ends a load, after the copy that was begun; `false` when what was copied must not be used. The time begins
    /// with the copy's end.
    #[napi(catch_unwind)]
    pub fn finish<'env>(
        &self,
        env: &'env Env,
        load: &PagedLoad,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, bool>> {
        let (copies, verify) = (Arc::clone(&load.copies), load.verify.get() == Some(&true));
        let (inner, load) = (Arc::clone(&self.inner), take(&load.inner)?);
        begin(env, async move {
            let copied = copied(copies.under_way().as_ref()).await;
            let checksums = verify.then(|| copies.checksums());
            let held = inner.finish(load, checksums, deadline(timeout_ms)).await;
            copied.and(held)
        })
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
                copies: Arc::default(),
                chunks,
                refused,
            })
        })
    }

    /// Plans a store out of blocks.
    #[napi(catch_unwind)]
    pub fn plan_store(&self, store: &PagedStore, blocks: &[u32], verify: bool) -> Result<()> {
        let inner = lock(&store.inner);
        let inner = inner.as_ref().ok_or_else(ended)?;
        let copies = self.inner.plan_store(inner, blocks).map_err(to_napi)?;
        store.copies.plan(copies, verify);
        Ok(())
    }

    /// Copies on out of arrays that it has for the time of the call, some milliseconds long; `false` when that
    /// was the rest.
    #[napi(catch_unwind)]
    pub fn copy_out(&self, store: &PagedStore, arrays: Vec<Uint8ArraySlice<'_>>) -> Result<bool> {
        store.copies.copy_some(self.inner.shape(), &arrays)
    }

    /// Begins to copy out of registered memory.
    #[napi(catch_unwind)]
    pub fn start_out(&self, store: &PagedStore) -> Result<()> {
        store.copies.start(self.memory.get())
    }

    /// Makes a store visible, after the copy that was begun; the chunks that it had. Where the copy failed, it is
    /// abandoned. The time begins with the copy's end.
    #[napi(catch_unwind)]
    pub fn commit<'env>(
        &self,
        env: &'env Env,
        store: &PagedStore,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, u32>> {
        let copies = Arc::clone(&store.copies);
        let (inner, store) = (Arc::clone(&self.inner), take(&store.inner)?);
        begin(env, async move {
            let copying = copies.under_way();
            let copied = copied(copying.as_ref()).await;
            let until = deadline(timeout_ms);
            if let Err(error) = copied {
                let _ = inner.abandon(store, copying.as_ref(), until).await; // the first error tells more
                return Err(error);
            }
            inner.commit(store, &copies.checksums(), until).await
        })
    }

    /// Gives a store's room back, after the copy that was begun, unless that ended in doubt.
    #[napi(catch_unwind)]
    pub fn abandon<'env>(
        &self,
        env: &'env Env,
        store: &PagedStore,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, ()>> {
        let copies = Arc::clone(&store.copies);
        let (inner, store) = (Arc::clone(&self.inner), take(&store.inner)?);
        begin(env, async move {
            let copying = copies.under_way();
            let _ = copied(copying.as_ref()).await;
            inner.abandon(store, copying.as_ref(), deadline(timeout_ms)).await
        })
    }

    /// Unregisters.
    #[napi(catch_unwind)]
    pub fn close<'env>(&self, env: &'env Env, timeout_ms: u32) -> Result<PromiseRaw<'env, ()>> {
        let (inner, until) = (Arc::clone(&self.inner), deadline(timeout_ms));
        let memory = Arc::clone(&self.memory);
        begin(env, async move {
            // It waits for copies under way, and gives page-locked memory back: not on JavaScript's thread.
            let close = move || memory.get().map(Registered::close);
            let closed = tokio::task::spawn_blocking(close).await;
            inner.unregister(until).await?;
            let lost = |_| Error::new(ErrorCode::Internal, "closing the KV memory was given up");
            closed.map(|_| ()).map_err(lost)
        })
    }

    fn places(&self, addresses: &[u64]) -> kvferry_core::Result<Vec<(*mut u8, usize)>> {
        let bytes = self.inner.shape().array_bytes();
        let too_large = || Error::invalid(format!("this process cannot have {bytes} bytes"));
        let bytes = usize::try_from(bytes).map_err(|_| too_large())?;
        let place = |address: &u64| {
            let address = usize::try_from(*address).map_err(|_| too_large())?;
            Ok((std::ptr::with_exposed_provenance_mut(address), bytes))
        };
        addresses.iter().map(place).collect()
    }

    fn register(
        &self,
        env: &Env,
        memory: Box<dyn KvMemory>,
        arrays: Vec<Uint8Array>,
    ) -> Result<()> {
        close_with(env, &self.memory)?;
        let registered = Registered { memory, worker: Arc::clone(&self.inner), _arrays: arrays };
        self.memory.set(registered).map_err(|_| to_napi(again()))
    }

    /// The same for memory that takes a while to make.
    fn register_later<'env, M: KvMemory + 'static>(
        &self,
        env: &'env Env,
        make: impl FnOnce(Arc<CopyShape>) -> kvferry_core::Result<M> + Send + 'static,
    ) -> Result<PromiseRaw<'env, ()>> {
        close_with(env, &self.memory)?;
        let (memory, worker) = (Arc::clone(&self.memory), Arc::clone(&self.inner));
        let shape = Arc::clone(worker.shape());
        promise(env, async move {
            let made = tokio::task::spawn_blocking(move || make(shape)).await;
            let lost = |_| Error::new(ErrorCode::Internal, "registering memory was given up");
            let made = Box::new(made.map_err(lost)??);
            let registered = Registered { memory: made, worker, _arrays: Vec::new() };
            memory.set(registered).map_err(|_| again())
        })
    }
}

fn again() -> Error {
    Error::invalid("memory is registered already")
}

#[napi]
impl PagedLoad {
    /// Chunks that can be copied.
    #[napi(getter, catch_unwind)]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Resolves when the first `arrays` arrays of registered memory have what is copied to them; or, of arrays
    /// that there are not, when the copy has ended.
    #[napi(catch_unwind)]
    pub fn copied<'env>(&self, env: &'env Env, arrays: u32) -> Result<PromiseRaw<'env, ()>> {
        let copying = self.copies.under_way().ok_or_else(ended)?;
        begin(env, async move { copying.array(arrays as usize).await })
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

    /// Resolves when all is copied out of registered memory.
    #[napi(catch_unwind)]
    pub fn copied<'env>(&self, env: &'env Env) -> Result<PromiseRaw<'env, ()>> {
        let copying = self.copies.under_way().ok_or_else(ended)?;
        begin(env, async move { copying.ended().await })
    }
}

fn take<T>(once: &Mutex<Option<T>>) -> Result<T> {
    lock(once).take().ok_or_else(ended)
}

fn lock<T>(once: &Mutex<T>) -> MutexGuard<'_, T> {
    once.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ended() -> napi::Error {
    to_napi(Error::new(ErrorCode::Closed, "this operation has ended already; begin another one"))
}
