//! The prefix cache's handles.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError};

use kvferry_core::cache::Cache;
use kvferry_core::{Error, ErrorCode, prefix};
use napi::bindgen_prelude::{PromiseRaw, Uint8ArraySlice};
use napi::{Env, Result};
use napi_derive::napi;

use crate::error::to_napi;
use crate::promise::{deadline, promise};
use crate::server::whole;

/// A prefix cache.
#[napi]
pub struct PrefixCache {
    pub(crate) inner: Arc<prefix::PrefixCache>,
}

/// What is handed over once: taken by the call that ends it.
pub(crate) type Once<T> = Mutex<Option<T>>;

/// What a lookup found.
#[napi]
pub struct PrefixHit {
    hit: Once<prefix::Hit>,
    chunks: u32,
}

/// Chunks being loaded.
#[napi]
pub struct PrefixReading {
    hit: Once<prefix::Hit>,
    pub(crate) reading: Arc<Once<prefix::Reading>>,
}

/// Chunks being stored.
#[napi]
pub struct PrefixWriting {
    pub(crate) writing: Arc<Once<prefix::Writing>>,
    chunks: Vec<u32>,
    refused: Option<u32>,
}

impl PrefixCache {
    pub(crate) fn open(
        env: &Env,
        cache: Arc<dyn Cache>,
        identity: Vec<u8>,
        payload_bytes: f64,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'_, Self>> {
        let payload_bytes = whole(payload_bytes, "bytesPerChunk").map_err(to_napi)?;
        let until = deadline(timeout_ms);
        let nonce = RandomState::new().hash_one(std::process::id());
        promise(env, async move {
            let inner =
                prefix::PrefixCache::open(cache, &identity, payload_bytes, nonce, until).await?;
            Ok(Self { inner: Arc::new(inner) })
        })
    }
}

#[napi]
impl PrefixCache {
    /// Tokens of one chunk.
    #[napi(getter, catch_unwind)]
    pub fn chunk_size(&self) -> u32 {
        self.inner.chunk_size()
    }

    /// Chunks that came back with other bytes than were stored.
    #[napi(getter, catch_unwind)]
    pub fn damaged_chunks(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "JavaScript's numbers")]
        {
            self.inner.damaged_chunks() as f64
        }
    }

    /// Looks up the leading chunks of `tokens`.
    #[napi(catch_unwind, ts_return_type = "Promise<PrefixHit>")]
    pub fn lookup<'env>(
        &self,
        env: &'env Env,
        tokens: &[u32],
        salt: String,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, PrefixHit>> {
        let (inner, tokens, until) =
            (Arc::clone(&self.inner), tokens.to_vec(), deadline(timeout_ms));
        promise(env, async move {
            let hit = inner.lookup(&tokens, &salt, until).await?;
            Ok(PrefixHit { chunks: hit.chunks(), hit: Mutex::new(Some(hit)) })
        })
    }

    /// Begins to load a hit, which it takes.
    #[napi(catch_unwind, ts_return_type = "Promise<PrefixReading>")]
    pub fn load<'env>(
        &self,
        env: &'env Env,
        hit: &PrefixHit,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, PrefixReading>> {
        let (inner, hit, until) = (Arc::clone(&self.inner), take(&hit.hit)?, deadline(timeout_ms));
        promise(env, async move {
            let reading = match inner.load(&hit, until).await {
                Ok(reading) => reading,
                Err(error) => {
                    let _ = inner.finish(&hit, None, until).await; // the first error tells more
                    return Err(error);
                }
            };
            let reading = Arc::new(Mutex::new(reading));
            Ok(PrefixReading { hit: Mutex::new(Some(hit)), reading })
        })
    }

    /// Gives a hit's leases back unread.
    #[napi(catch_unwind)]
    pub fn release<'env>(
        &self,
        env: &'env Env,
        hit: &PrefixHit,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, bool>> {
        let (inner, hit, until) = (Arc::clone(&self.inner), take(&hit.hit)?, deadline(timeout_ms));
        promise(env, async move { inner.finish(&hit, None, until).await })
    }

    /// Ends a load; `false` when what was read must be thrown away.
    #[napi(catch_unwind)]
    pub fn finish<'env>(
        &self,
        env: &'env Env,
        reading: &PrefixReading,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, bool>> {
        let (inner, until) = (Arc::clone(&self.inner), deadline(timeout_ms));
        let hit = take(&reading.hit)?;
        let reading = reading.reading.lock().unwrap_or_else(PoisonError::into_inner).take();
        promise(env, async move { inner.finish(&hit, reading, until).await })
    }

    /// Reserves room for the chunks of `tokens` that are not stored.
    #[napi(catch_unwind, ts_return_type = "Promise<PrefixWriting>")]
    pub fn store<'env>(
        &self,
        env: &'env Env,
        tokens: &[u32],
        salt: String,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, PrefixWriting>> {
        let (inner, tokens, until) =
            (Arc::clone(&self.inner), tokens.to_vec(), deadline(timeout_ms));
        promise(env, async move {
            let writing = inner.store(&tokens, &salt, until).await?;
            let (chunks, refused) = (writing.chunks().to_vec(), writing.refused());
            Ok(PrefixWriting { writing: Arc::new(Mutex::new(Some(writing))), chunks, refused })
        })
    }

    /// Makes what was written visible.
    #[napi(catch_unwind)]
    pub fn commit<'env>(
        &self,
        env: &'env Env,
        writing: &PrefixWriting,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, bool>> {
        let (inner, until) = (Arc::clone(&self.inner), deadline(timeout_ms));
        let writing = take(&writing.writing)?;
        promise(env, async move { inner.commit(writing, until).await })
    }

    /// Gives the reserved room back.
    #[napi(catch_unwind)]
    pub fn abandon<'env>(
        &self,
        env: &'env Env,
        writing: &PrefixWriting,
        timeout_ms: u32,
    ) -> Result<PromiseRaw<'env, ()>> {
        let (inner, until) = (Arc::clone(&self.inner), deadline(timeout_ms));
        let writing = take(&writing.writing)?;
        promise(env, async move { inner.abandon(writing, until).await })
    }

    /// Unregisters.
    #[napi(catch_unwind)]
    pub fn close<'env>(&self, env: &'env Env, timeout_ms: u32) -> Result<PromiseRaw<'env, ()>> {
        let (inner, until) = (Arc::clone(&self.inner), deadline(timeout_ms));
        promise(env, async move { inner.close(until).await })
    }
}

#[napi]
impl PrefixHit {
    /// Leading chunks that are stored.
    #[napi(getter, catch_unwind)]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }
}

#[napi]
impl PrefixReading {
    /// Chunks that can be read; 0 when they went after the lookup.
    #[napi(getter, catch_unwind)]
    pub fn chunks(&self) -> u32 {
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        reading.as_ref().map_or(0, prefix::Reading::chunks)
    }

    /// Copies a chunk's payload into `into`, of just its size; `false` when it is not what was stored.
    #[napi(catch_unwind)]
    pub fn read(&self, chunk: u32, mut into: Uint8ArraySlice<'_>) -> Result<bool> {
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let reading = reading.as_ref().ok_or_else(ended)?;
        // SAFETY: this thread, which runs the array's JavaScript, does nothing else during the call. A
        // SharedArrayBuffer may be written by another one meanwhile: its bytes are then any mixture,
        // as for any two writers there, and none of them is invalid.
        let into = unsafe { into.as_mut() };
        reading.read(chunk, |next| next(into)).map_err(to_napi)
    }
}

#[napi]
impl PrefixWriting {
    /// The chunks to write.
    #[napi(getter, catch_unwind)]
    pub fn chunks(&self) -> Vec<u32> {
        self.chunks.clone()
    }

    /// Chunks that did not fit; absent when the server does not say.
    #[napi(getter, catch_unwind)]
    pub fn refused(&self) -> Option<u32> {
        self.refused
    }

    /// Copies `payload` into the place of `chunks[place]`.
    #[napi(catch_unwind)]
    pub fn write(&self, place: u32, payload: &[u8]) -> Result<()> {
        let writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let writing = writing.as_ref().ok_or_else(ended)?;
        writing.write(place as usize, |next| next(payload)).map_err(to_napi)
    }
}

fn take<T>(once: &Once<T>) -> Result<T> {
    once.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(ended)
}

pub(crate) fn ended() -> napi::Error {
    to_napi(Error::new(ErrorCode::Closed, "this operation has ended already; begin another one"))
}
