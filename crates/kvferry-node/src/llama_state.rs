//! llama.cpp's state files between an engine and a prefix cache.

use std::mem::replace;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvferry_copy::MemFd;
use kvferry_core::llama_state::{self, Geometry, Restored, StateFile, Target};
use kvferry_core::{Error, ErrorCode, prefix};
use napi::bindgen_prelude::{PromiseRaw, Uint8Array};
use napi::{Env, Result};
use napi_derive::napi;

use crate::cache::PrefixCache;
use crate::error::to_napi;
use crate::promise::{deadline, promise, run_copies};

/// Files that are kept for the next use.
const KEPT: usize = 2;

/// Files that are kept; none any more once the cache was closed.
type Kept = Arc<Mutex<Option<Vec<MemFd>>>>;

/// Where the memory of a [`LlamaStateFile`] is.
enum Slot {
    Here(MemFd),
    BeingStored,
    /// Also while it is still being stored: that gives it back when it ends.
    Released,
}

/// One engine context's state in a prefix cache.
#[napi]
pub struct LlamaState {
    cache: Arc<prefix::PrefixCache>,
    geometry: Arc<Geometry>,
    streams: u32,
    kept: Kept,
}

/// A state file in memory.
#[napi]
pub struct LlamaStateFile {
    slot: Arc<Mutex<Slot>>,
    kept: Kept,
    path: String,
    tokens: u32,
    found: u32,
    bytes: f64,
    lookup_ms: f64,
}

/// What was stored.
#[napi(object)]
pub struct LlamaStored {
    /// Chunks that were written now.
    pub chunks: u32,
    /// Bytes of their payloads.
    pub bytes: f64,
    /// Chunks that did not fit; absent when the server does not say.
    pub refused: Option<u32>,
}

/// What a state file tells about all those that its context saves.
#[napi(object)]
pub struct LlamaShape {
    /// The geometry's descriptor.
    pub descriptor: Uint8Array,
    /// Streams of the context.
    pub streams: u32,
}

/// Reads the shape of a context's state from a state file.
#[napi(catch_unwind)]
pub fn llama_shape(file: &[u8]) -> Result<LlamaShape> {
    let state = StateFile::parse(file).map_err(to_napi)?;
    Ok(LlamaShape { descriptor: state.geometry().encode().into(), streams: state.streams() })
}

/// Bytes of one chunk's payload for a geometry.
#[napi(catch_unwind)]
pub fn llama_payload_bytes(descriptor: &[u8], chunk_size: u32) -> Result<f64> {
    let geometry = Geometry::decode(descriptor).map_err(to_napi)?;
    let bytes = geometry.chunk_payload_bytes(chunk_size).map_err(to_napi)?;
    #[expect(clippy::cast_precision_loss, reason = "JavaScript's numbers")]
    Ok(bytes as f64)
}

#[napi]
impl LlamaState {
    /// `descriptor` describes the geometry; `streams` is the number of the context's streams.
    #[napi(constructor, catch_unwind)]
    pub fn new(cache: &PrefixCache, descriptor: &[u8], streams: u32) -> Result<Self> {
        let geometry = Arc::new(Geometry::decode(descriptor).map_err(to_napi)?);
        let kept = Arc::new(Mutex::new(Some(Vec::new())));
        Ok(Self { cache: Arc::clone(&cache.inner), geometry, streams, kept })
    }

    /// Gives the memory of files back, that of those in use as soon as they are released.
    #[napi(catch_unwind)]
    pub fn close(&self) {
        lock(&self.kept).take();
    }

    /// An empty file for the engine to save into.
    #[napi(catch_unwind)]
    pub fn create_file(&self) -> Result<LlamaStateFile> {
        let nothing = Restored { found: 0, written: 0, lookup: Duration::ZERO };
        self.file().map(|file| self.handle(file, nothing, 0)).map_err(to_napi)
    }

    /// Writes the state of the longest stored prefix of `tokens` to a file; its `tokens` is 0 when there
    /// is none, or none of more than `beyond` tokens.
    #[napi(catch_unwind, ts_return_type = "Promise<LlamaStateFile>")]
    pub fn restore<'env>(
        &self,
        env: &'env Env,
        tokens: &[u32],
        beyond: u32,
        salt: String,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, LlamaStateFile>> {
        let this = self.clone();
        let (tokens, until) = (tokens.to_vec(), deadline(timeout_ms));
        promise(env, async move {
            let chunk_size = this.cache.chunk_size();
            let target = Target {
                geometry: &this.geometry,
                tokens: &tokens,
                chunk_size,
                streams: this.streams,
                sequence: 0,
                beyond,
            };
            let mut file = this.file()?;
            let (restored, held) =
                llama_state::restore(&this.cache, &target, &salt, &mut file, until, &run_copies)
                    .await?;
            let cache = Arc::clone(&this.cache);
            tokio::spawn(async move { held.end(&cache, until).await });
            let bytes = if restored.written == 0 { 0 } else { file.contents()?.len() };
            Ok(this.handle(file, restored, bytes))
        })
    }

    /// Stores the whole chunks of `tokens`, the leading ones of those whose state the engine saved into
    /// `file`.
    #[napi(catch_unwind, ts_return_type = "Promise<LlamaStored>")]
    pub fn store<'env>(
        &self,
        env: &'env Env,
        file: &LlamaStateFile,
        tokens: &[u32],
        salt: String,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, LlamaStored>> {
        let (this, tokens, until) = (self.clone(), tokens.to_vec(), deadline(timeout_ms));
        let (slot, mut file) = (Arc::clone(&file.slot), file.take()?);
        promise(env, async move {
            let (cache, geometry) = (&this.cache, &this.geometry);
            let stored = match file.contents() {
                Ok(bytes) => {
                    llama_state::store(cache, geometry, &tokens, bytes, &salt, until, &run_copies)
                        .await
                }
                Err(error) => Err(error),
            };
            let mut slot = lock(&slot);
            if matches!(*slot, Slot::Released) {
                keep(&this.kept, file); // whoever asked for the store has left it
            } else {
                *slot = Slot::Here(file);
            }
            drop(slot);
            stored.map(|stored| LlamaStored {
                chunks: stored.chunks,
                #[expect(clippy::cast_precision_loss, reason = "JavaScript's numbers")]
                bytes: stored.bytes as f64,
                refused: stored.refused,
            })
        })
    }
}

impl LlamaState {
    fn clone(&self) -> Self {
        Self {
            cache: Arc::clone(&self.cache),
            geometry: Arc::clone(&self.geometry),
            streams: self.streams,
            kept: Arc::clone(&self.kept),
        }
    }

    fn file(&self) -> kvferry_core::Result<MemFd> {
        let kept = lock(&self.kept).as_mut().and_then(Vec::pop);
        kept.map_or_else(|| MemFd::new(c"kvferry-state"), Ok)
    }

    fn handle(&self, file: MemFd, restored: Restored, bytes: usize) -> LlamaStateFile {
        let chunk_size = self.cache.chunk_size();
        LlamaStateFile {
            path: file.path(),
            slot: Arc::new(Mutex::new(Slot::Here(file))),
            kept: Arc::clone(&self.kept),
            tokens: restored.written * chunk_size,
            found: restored.found * chunk_size,
            #[expect(clippy::cast_precision_loss, reason = "JavaScript's numbers")]
            bytes: bytes as f64,
            lookup_ms: restored.lookup.as_secs_f64() * 1e3,
        }
    }
}

#[napi]
impl LlamaStateFile {
    /// Opens the file, until it is released.
    #[napi(getter, catch_unwind)]
    pub fn path(&self) -> String {
        self.path.clone()
    }

    /// Tokens whose state it holds.
    #[napi(getter, catch_unwind)]
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Leading tokens that are stored.
    #[napi(getter, catch_unwind)]
    pub fn found(&self) -> u32 {
        self.found
    }

    /// Its size.
    #[napi(getter, catch_unwind)]
    pub fn bytes(&self) -> f64 {
        self.bytes
    }

    /// Milliseconds until the cache had answered.
    #[napi(getter, catch_unwind)]
    pub fn lookup_ms(&self) -> f64 {
        self.lookup_ms
    }

    /// Lets go of the file, once it is stored; it is used again for the next one.
    #[napi(catch_unwind)]
    pub fn release(&self) {
        if let Slot::Here(file) = replace(&mut *lock(&self.slot), Slot::Released) {
            keep(&self.kept, file);
        }
    }

    fn take(&self) -> Result<MemFd> {
        let mut slot = lock(&self.slot);
        match replace(&mut *slot, Slot::BeingStored) {
            Slot::Here(file) => Ok(file),
            other => {
                *slot = other;
                Err(to_napi(Error::new(
                    ErrorCode::Closed,
                    "the state file was released or is being stored",
                )))
            }
        }
    }
}

fn keep(kept: &Kept, file: MemFd) {
    if let Some(files) = lock(kept).as_mut().filter(|files| files.len() < KEPT) {
        files.push(file);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
