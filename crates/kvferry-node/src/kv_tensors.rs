//! Tensors of an engine without paging, copied to and from a prefix cache.

use std::sync::{Arc, Mutex, PoisonError};

use kvferry_core::key::Dtype;
use kvferry_core::kv_tensors::{self, Load, Store};
use kvferry_core::prefix::{Reading, Writing};
use napi::Result;
use napi::bindgen_prelude::Uint8ArraySlice;
use napi_derive::napi;

use crate::cache::{Once, PrefixReading, PrefixWriting, ended};
use crate::error::to_napi;

/// Bytes that are copied in one go while JavaScript stands still: a millisecond or two.
const GO: u64 = 4 << 20;

/// What all tensors of a model have in common.
#[napi]
pub struct KvTensors {
    inner: kv_tensors::KvTensors,
}

/// Chunks on their way into tensors.
#[napi]
pub struct KvTensorsLoad {
    load: Mutex<Load>,
    reading: Arc<Once<Reading>>,
}

/// Chunks on their way out of tensors.
#[napi]
pub struct KvTensorsStore {
    store: Mutex<Store>,
    writing: Arc<Once<Writing>>,
}

#[napi]
impl KvTensors {
    /// `dtype` is torch's name of the element type.
    #[napi(constructor, catch_unwind)]
    pub fn new(
        tensors: u32,
        heads: u32,
        head_size: u32,
        dtype: String,
        chunk_size: u32,
    ) -> Result<Self> {
        let inner = Dtype::new(&dtype).and_then(|dtype| {
            kv_tensors::KvTensors::new(tensors, heads, head_size, dtype, chunk_size)
        });
        Ok(Self { inner: inner.map_err(to_napi)? })
    }

    /// Bytes of a chunk.
    #[napi(getter, catch_unwind)]
    pub fn payload_bytes(&self) -> Result<f64> {
        let bytes = self.inner.payload_bytes().map_err(to_napi)?;
        #[expect(clippy::cast_precision_loss, reason = "below 2^53")]
        Ok(bytes as f64)
    }

    /// Loads the first `chunks` of a reading into tensors of as many tokens.
    #[napi(catch_unwind)]
    pub fn load(&self, reading: &PrefixReading, chunks: u32) -> Result<KvTensorsLoad> {
        let load = self.inner.load(chunks).map_err(to_napi)?;
        Ok(KvTensorsLoad { load: Mutex::new(load), reading: Arc::clone(&reading.reading) })
    }

    /// Stores a writing's chunks out of tensors of `tokens`.
    #[napi(catch_unwind)]
    pub fn store(&self, writing: &PrefixWriting, tokens: u32) -> Result<KvTensorsStore> {
        let store = {
            let writing = writing.writing.lock().unwrap_or_else(PoisonError::into_inner);
            self.inner.store(writing.as_ref().ok_or_else(ended)?, tokens).map_err(to_napi)?
        };
        Ok(KvTensorsStore { store: Mutex::new(store), writing: Arc::clone(&writing.writing) })
    }
}

#[napi]
impl KvTensorsLoad {
    /// Copies on, some milliseconds long; `false` when there is no more to copy.
    #[napi(catch_unwind)]
    pub fn copy(&self, mut tensors: Vec<Uint8ArraySlice<'_>>) -> Result<bool> {
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let reading = reading.as_ref().ok_or_else(ended)?;
        let mut tensors: Vec<&mut [u8]> = tensors
            .iter_mut()
            .map(|tensor| {
                // SAFETY: this thread, which runs the arrays' JavaScript, does nothing else during the call, and
                // its only caller gives tensors that it has just made, each with a buffer of its own.
                unsafe { tensor.as_mut() }
            })
            .collect();
        let mut load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        load.copy(reading, &mut tensors, GO).map_err(to_napi)
    }

    /// Leading chunks that are loaded.
    #[napi(getter, catch_unwind)]
    pub fn loaded(&self) -> u32 {
        self.load.lock().unwrap_or_else(PoisonError::into_inner).loaded()
    }
}

#[napi]
impl KvTensorsStore {
    /// Copies on, some milliseconds long; `false` when there is no more to copy.
    #[napi(catch_unwind)]
    pub fn copy(&self, tensors: Vec<Uint8ArraySlice<'_>>) -> Result<bool> {
        let writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let writing = writing.as_ref().ok_or_else(ended)?;
        let tensors: Vec<&[u8]> = tensors.iter().map(|tensor| &**tensor).collect();
        let mut store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        store.copy(writing, &tensors, GO).map_err(to_napi)
    }
}
