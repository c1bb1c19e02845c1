//! A cache as an engine with a paged KV pool uses it: what the scheduler asks, and what a worker copies.

use std::sync::Arc;
use std::time::Instant;

use crate::cache::{Cache, Memory, Slot};
use crate::defect::{Defect, is_active};
use crate::key::{Key, check_model_name, check_salt};
use crate::kv_layout::{KvLayout, Piece};
use crate::{Error, ErrorCode, Result};

/// A worker's arrays, one borrowed at a time: they may share memory.
pub trait Arrays {
    /// How many there are.
    fn count(&self) -> usize;
    /// One of them.
    fn array(&mut self, index: usize) -> &mut [u8];
}

/// Whose KV it is.
#[derive(Debug, Clone)]
pub struct Place {
    /// Without `@`.
    pub model_name: String,
    /// KV shards of the model, 1..=255.
    pub world_size: u32,
    /// Ranks that load each object, 1..=255.
    pub num_kv_readers: u32,
}

/// Some of a request's tokens.
#[derive(Debug, Clone)]
pub struct Range {
    /// Names the request.
    pub request_id: String,
    /// The request's tokens, up to `end` or more.
    pub token_ids: Arc<[u32]>,
    /// First token, a multiple of the chunk size.
    pub start: u64,
    /// Token after the last, a multiple of the chunk size.
    pub end: u64,
    /// The tenant; empty for none.
    pub cache_salt: String,
}

/// The scheduler's side: it asks, and takes leases for the workers.
pub struct Scheduler {
    cache: Arc<dyn Cache>,
    place: Place,
}

/// A worker's side: it has registered its memory, and copies.
pub struct Worker {
    cache: Arc<dyn Cache>,
    place: Place,
    worker_id: u32,
    layout: KvLayout,
    chunk_size: u32,
    instance: u64,
}

/// Chunks that may be copied into blocks. Ends with [`Worker::finish`].
pub struct Load {
    key: Key,
    slots: Vec<Slot>,
    memory: Option<Arc<dyn Memory>>,
}

/// Room that chunks may be copied to. Ends with [`Worker::commit`] or [`Worker::abandon`].
pub struct Store {
    key: Key,
    slots: Vec<Slot>,
    chunks: Vec<u32>,
    refused: Option<u32>,
    memory: Arc<dyn Memory>,
}

impl Place {
    fn key(&self, range: Range, worker_id: Option<u32>) -> Key {
        let Range { request_id, token_ids, start, end, mut cache_salt } = range;
        let Self { world_size, mut num_kv_readers, .. } = *self;
        if is_active(Defect::SaltLeftOut) {
            cache_salt.clear();
        }
        if is_active(Defect::OneReaderUnderMla) {
            num_kv_readers = 1;
        }
        let first = is_active(Defect::FirstShardForAll).then_some(0);
        let worker_id = worker_id.and(first).or(worker_id);
        Key {
            model_name: self.model_name.clone(),
            world_size,
            worker_id,
            token_ids,
            start,
            end,
            request_id,
            cache_salt,
            num_kv_readers,
        }
    }
}

impl Scheduler {
    /// The scheduler of an engine.
    ///
    /// # Errors
    /// A model name with `@`, or too long.
    pub fn new(cache: Arc<dyn Cache>, place: Place) -> Result<Self> {
        check_model_name(&place.model_name)?;
        Ok(Self { cache, place })
    }

    /// How many leading chunks of the range are there for all ranks. They are leased for all readers.
    pub async fn lookup(&self, range: Range, deadline: Instant) -> Result<u64> {
        check_salt(&range.cache_salt)?;
        self.cache.lookup(&self.place.key(range, None), deadline).await
    }

    /// Gives back the leases of the range's chunks.
    pub async fn release(&self, range: Range, deadline: Instant) -> Result<()> {
        self.cache.release(&self.place.key(range, None), deadline).await
    }

    /// Drops what is stored and not in use, of all models.
    pub async fn clear(&self, deadline: Instant) -> Result<()> {
        self.cache.clear(deadline).await
    }

    /// The request has ended: its leases end, those excepted that a worker reads under.
    pub async fn end_session(&self, request_id: &str, deadline: Instant) -> Result<()> {
        self.cache.end_session(request_id, deadline).await
    }
}

impl Worker {
    /// Registers a worker's memory.
    ///
    /// # Errors
    /// [`KvLayout::check`]; a rank beyond the world; what the cache says.
    pub async fn register(
        cache: Arc<dyn Cache>,
        place: Place,
        worker_id: u32,
        layout: KvLayout,
        deadline: Instant,
    ) -> Result<Self> {
        let chunk_size = cache.chunk_size();
        layout.check(chunk_size)?;
        if worker_id >= place.world_size {
            return Err(Error::invalid(format!(
                "KV rank {worker_id} is beyond the world of {}",
                place.world_size
            )));
        }
        let registration = layout.registration(&place.model_name, place.world_size, chunk_size);
        let instance = cache.register(registration, deadline).await?;
        Ok(Self { cache, place, worker_id, layout, chunk_size, instance })
    }

    /// Forgets the memory; what is stored stays.
    pub async fn unregister(&self, deadline: Instant) -> Result<()> {
        self.cache.unregister(self.instance, deadline).await
    }

    /// Begins to load the range's chunks; a load without memory when any of them is gone.
    pub async fn load(&self, range: Range, deadline: Instant) -> Result<Load> {
        let key = self.place.key(range, Some(self.worker_id));
        let grant = self.cache.prepare_retrieve(&key, self.instance, deadline).await?;
        Ok(match grant {
            Some(grant) => Load { key, slots: grant.slots, memory: Some(grant.memory) },
            None => Load { key, slots: Vec::new(), memory: None },
        })
    }

    /// Copies the chunks into `blocks`, all but the first `skip` tokens, which the engine has itself. The last
    /// chunk may have fewer blocks: an engine computes a prompt's last token itself, and need not have its block.
    /// `false`: they are gone, and nothing was copied.
    ///
    /// # Errors
    /// Blocks that are not the range's, or beyond the engine's; arrays of other sizes than were
    /// registered. Nothing was copied then.
    pub fn copy_in(
        &self,
        load: &Load,
        arrays: &mut impl Arrays,
        blocks: &[u32],
        skip: u32,
    ) -> Result<bool> {
        let lengths: Vec<usize> = (0..arrays.count()).map(|i| arrays.array(i).len()).collect();
        self.check_arrays(&lengths)?;
        let of_chunk = self.check_range(&load.key, blocks, true)?;
        let Some(memory) = &load.memory else { return Ok(false) };
        self.check_slots(&load.slots)?;
        if load.slots.len() != blocks.len().div_ceil(of_chunk) {
            return Err(Error::new(
                ErrorCode::Protocol,
                format!(
                    "the server granted {} slots for {} blocks",
                    load.slots.len(),
                    blocks.len()
                ),
            ));
        }
        for ((chunk, blocks), slot) in (0u32..).zip(blocks.chunks(of_chunk)).zip(&load.slots) {
            let skip = skip.saturating_sub(chunk.saturating_mul(self.chunk_size));
            self.layout.pieces(
                blocks,
                self.chunk_size,
                skip,
                |Piece { array, at, object, length }| {
                    memory.read(slot.offset + object, &mut arrays.array(array)[at..at + length])
                },
            )?;
        }
        Ok(true)
    }

    /// Ends a load. `false`: it was none, or a slot was used anew meanwhile, and what was copied must not
    /// be used.
    pub async fn finish(&self, load: Load, deadline: Instant) -> Result<bool> {
        match load.memory {
            None => Ok(false),
            Some(_) => {
                self.cache.commit_retrieve(&load.key, self.instance, &load.slots, deadline).await
            }
        }
    }

    /// Reserves room for those chunks of the range that are not stored.
    pub async fn store(&self, range: Range, deadline: Instant) -> Result<Store> {
        let key = self.place.key(range, Some(self.worker_id));
        let grant = self.cache.prepare_store(&key, self.instance, deadline).await?;
        if is_active(Defect::CommitBeforeFill) {
            self.cache.commit_store(&key, self.instance, deadline).await?;
        }
        Ok(Store {
            key,
            slots: grant.slots,
            chunks: grant.chunk_indices,
            refused: grant.refused,
            memory: grant.memory,
        })
    }

    /// Copies out of `blocks`, those of the whole range, what there is room for.
    ///
    /// # Errors
    /// As [`Worker::copy_in`].
    pub fn copy_out(&self, store: &Store, arrays: &[&[u8]], blocks: &[u32]) -> Result<()> {
        let lengths: Vec<usize> = arrays.iter().map(|array| array.len()).collect();
        self.check_arrays(&lengths)?;
        let of_chunk = self.check_range(&store.key, blocks, false)?;
        self.check_slots(&store.slots)?;
        for (chunk, slot) in store.chunks.iter().zip(&store.slots) {
            let first = *chunk as usize * of_chunk;
            let blocks = blocks.get(first..first + of_chunk).ok_or_else(|| {
                Error::new(
                    ErrorCode::Protocol,
                    format!("the server granted chunk {chunk}, beyond the range"),
                )
            })?;
            self.layout.pieces(
                blocks,
                self.chunk_size,
                0,
                |Piece { array, at, object, length }| {
                    store.memory.write(slot.offset + object, &arrays[array][at..at + length])
                },
            )?;
        }
        Ok(())
    }

    /// Makes what was copied visible; says how many chunks it were.
    pub async fn commit(&self, store: Store, deadline: Instant) -> Result<u32> {
        let chunks = u32::try_from(store.chunks.len()).unwrap_or(u32::MAX);
        let visible = chunks > 0
            && (is_active(Defect::CommitBeforeFill)
                || self.cache.commit_store(&store.key, self.instance, deadline).await?);
        Ok(if visible { chunks } else { 0 })
    }

    /// Gives the room back; nothing of it becomes visible.
    pub async fn abandon(&self, store: Store, deadline: Instant) -> Result<()> {
        if store.chunks.is_empty() {
            return Ok(());
        }
        self.cache.abandon_store(&store.key, self.instance, deadline).await
    }

    /// Blocks of a chunk, if `blocks` are just those of the key's range; of its last chunk some may be missing
    /// where `may_end_short`.
    fn check_range(&self, key: &Key, blocks: &[u32], may_end_short: bool) -> Result<usize> {
        let tokens = blocks.len() as u64 * u64::from(self.layout.block_size);
        let missing = (key.end - key.start).checked_sub(tokens);
        let most = if may_end_short { u64::from(self.chunk_size) } else { 1 };
        if missing.is_none_or(|missing| missing >= most) {
            return Err(Error::invalid(format!(
                "{} blocks of {} tokens were given for the tokens {}..{}",
                blocks.len(),
                self.layout.block_size,
                key.start,
                key.end
            )));
        }
        self.layout.check_blocks(blocks)?;
        Ok((self.chunk_size / self.layout.block_size) as usize)
    }

    fn check_arrays(&self, lengths: &[usize]) -> Result<()> {
        let (arrays, bytes) = (self.layout.arrays(), self.layout.array_bytes());
        if lengths.len() != arrays {
            return Err(Error::invalid(format!(
                "{} arrays were given for {arrays}",
                lengths.len()
            )));
        }
        match lengths.iter().find(|length| **length as u64 != bytes) {
            None => Ok(()),
            Some(length) => Err(Error::invalid(format!(
                "an array of the KV memory has {length} bytes instead of {bytes}: was it transferred or \
                 resized?"
            ))),
        }
    }

    /// A slot is as long as an object, whatever a server answers.
    fn check_slots(&self, slots: &[Slot]) -> Result<()> {
        let layout = self.layout.registration(
            &self.place.model_name,
            self.place.world_size,
            self.chunk_size,
        );
        let bytes = layout.object_bytes(self.chunk_size)?;
        match slots
            .iter()
            .find(|slot| slot.length != bytes || slot.offset.checked_add(slot.length).is_none())
        {
            None => Ok(()),
            Some(slot) => Err(Error::new(
                ErrorCode::Protocol,
                format!(
                    "the server granted a slot of {} bytes for an object of {bytes}",
                    slot.length
                ),
            )),
        }
    }
}

impl Load {
    /// Chunks that can be copied; 0 when any is gone.
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }
}

impl Store {
    /// Chunks that there is room for, and that are not stored yet.
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.chunks.len()).unwrap_or(u32::MAX)
    }

    /// Chunks that did not fit; `None` when the server does not say.
    pub fn refused(&self) -> Option<u32> {
        self.refused
    }
}
