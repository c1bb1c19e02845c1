//! A cache as an engine with a paged KV pool uses it: what the scheduler asks, and what a worker copies.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::cache::{Cache, Memory, Slot};
use crate::copy_plan::{ChunkCopy, CopyPlan, CopyShape, Direction};
use crate::copying::{Copying, KvMemory};
use crate::defect::{Defect, is_active};
use crate::key::{Key, check_model_name, check_salt};
use crate::kv_layout::KvLayout;
use crate::{Error, ErrorCode, Result};

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
    shape: Arc<CopyShape>,
    block_size: u32,
    chunk_size: u32,
    instance: u64,
    /// Why, when nothing tells whether copies of its memory have ended: see [`Cache::give_up`].
    given_up: OnceLock<Error>,
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

/// What to copy, between the engine's memory and this one.
pub struct Copies {
    /// From slots to blocks, or from blocks to slots.
    pub plan: CopyPlan,
    /// Where the slots are.
    pub memory: Arc<dyn Memory>,
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
        let (shape, block_size) = (Arc::new(layout.copy_shape(chunk_size)), layout.block_size);
        let given_up = OnceLock::new();
        Ok(Self { cache, place, worker_id, shape, block_size, chunk_size, instance, given_up })
    }

    /// What its copies have in common.
    pub fn shape(&self) -> &Arc<CopyShape> {
        &self.shape
    }

    /// Closes the memory that its copies run to and from. To be called before it is unregistered, and before the cache
    /// goes: what ended in doubt keeps its slots.
    pub fn close(&self, memory: &dyn KvMemory) {
        memory.close();
        if let Some(doubt) = memory.doubt() {
            self.give_up(doubt);
        }
    }

    /// Forgets the memory; what is stored stays. Nothing is forgotten where slots of it may yet be written to.
    pub async fn unregister(&self, deadline: Instant) -> Result<()> {
        match self.given_up.get() {
            Some(_) => Ok(()),
            None => self.cache.unregister(self.instance, deadline).await,
        }
    }

    fn give_up(&self, why: Error) {
        if self.given_up.set(why).is_ok() {
            self.cache.give_up(self.instance);
        }
    }

    fn check_goes_on(&self) -> Result<()> {
        self.given_up.get().map_or(Ok(()), |why| Err(why.clone()))
    }

    /// Begins to load the range's chunks; a load without memory when any of them is gone.
    ///
    /// # Errors
    /// What the cache says; why a copy ended in doubt, from then on.
    pub async fn load(&self, range: Range, deadline: Instant) -> Result<Load> {
        self.check_goes_on()?;
        let key = self.place.key(range, Some(self.worker_id));
        let grant = self.cache.prepare_retrieve(&key, self.instance, deadline).await?;
        Ok(match grant {
            Some(grant) => Load { key, slots: grant.slots, memory: Some(grant.memory) },
            None => Load { key, slots: Vec::new(), memory: None },
        })
    }

    /// The copies into `blocks` of all but the first `skip` tokens, which the engine has itself, and the memory
    /// that they read. The last chunk may have fewer blocks: an engine computes a prompt's last token itself, and
    /// need not have its block. `None`: the chunks are gone.
    ///
    /// # Errors
    /// Blocks that are not the range's, beyond the engine's, or named twice; slots that are not the range's.
    pub fn plan_load(&self, load: &Load, blocks: &[u32], skip: u32) -> Result<Option<Copies>> {
        let of_chunk = self.check_range(&load.key, blocks, true)?;
        let Some(memory) = &load.memory else { return Ok(None) };
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
        let chunks: Vec<ChunkCopy<'_>> = (0u32..)
            .zip(blocks.chunks(of_chunk))
            .zip(&load.slots)
            .map(|((chunk, blocks), slot)| ChunkCopy {
                blocks,
                skip: skip.saturating_sub(chunk.saturating_mul(self.chunk_size)),
                slot: slot.offset,
            })
            .collect();
        let plan = self.shape.plan(Direction::Scatter, &chunks, memory.bytes())?;
        Ok(Some(Copies { plan, memory: Arc::clone(memory) }))
    }

    /// Ends a load. `false`: it was none; or a slot was used anew meanwhile, and what was copied must not be used.
    /// With `checksums`, one for each chunk as it was copied, also when one is not the chunk's as it was stored, or
    /// its writer told none. What turned out to be damaged is dropped from the cache.
    pub async fn finish(
        &self,
        load: Load,
        checksums: Option<Vec<u64>>,
        deadline: Instant,
    ) -> Result<bool> {
        let Load { key, slots, memory } = load;
        if memory.is_none() {
            return Ok(false);
        }
        let mut right = true;
        if let Some(checksums) = checksums {
            let differs =
                |(slot, sum): &(&Slot, &u64)| slot.checksum.is_some_and(|told| told != **sum);
            let damaged: Vec<Slot> = slots
                .iter()
                .zip(&checksums)
                .filter(differs)
                .map(|(slot, _)| slot.clone())
                .collect();
            right = damaged.is_empty()
                && checksums.len() == slots.len()
                && slots.iter().all(|slot| slot.checksum.is_some());
            if !damaged.is_empty() {
                // They stay a miss when this fails.
                let _ = self.cache.discard(self.instance, &damaged, deadline).await;
            }
        }
        Ok(self.cache.commit_retrieve(&key, self.instance, &slots, deadline).await? && right)
    }

    /// Reserves room for those chunks of the range that are not stored.
    ///
    /// # Errors
    /// As [`Worker::load`].
    pub async fn store(&self, range: Range, deadline: Instant) -> Result<Store> {
        self.check_goes_on()?;
        let key = self.place.key(range, Some(self.worker_id));
        let grant = self.cache.prepare_store(&key, self.instance, deadline).await?;
        if is_active(Defect::CommitBeforeFill) {
            self.cache.commit_store(&key, self.instance, &[], deadline).await?;
        }
        Ok(Store {
            key,
            slots: grant.slots,
            chunks: grant.chunk_indices,
            refused: grant.refused,
            memory: grant.memory,
        })
    }

    /// The copies out of `blocks`, those of the whole range, of what there is room for, and the memory that they
    /// write.
    ///
    /// # Errors
    /// As [`Worker::plan_load`].
    pub fn plan_store(&self, store: &Store, blocks: &[u32]) -> Result<Copies> {
        let of_chunk = self.check_range(&store.key, blocks, false)?;
        self.check_slots(&store.slots)?;
        let chunks = store.chunks.iter().zip(&store.slots).map(|(chunk, slot)| {
            let first = *chunk as usize * of_chunk;
            let blocks = blocks.get(first..first + of_chunk).ok_or_else(|| {
                Error::new(
                    ErrorCode::Protocol,
                    format!("the server granted chunk {chunk}, beyond the range"),
                )
            })?;
            Ok(ChunkCopy { blocks, skip: 0, slot: slot.offset })
        });
        let chunks: Vec<ChunkCopy<'_>> = chunks.collect::<Result<_>>()?;
        let plan = self.shape.plan(Direction::Gather, &chunks, store.memory.bytes())?;
        Ok(Copies { plan, memory: Arc::clone(&store.memory) })
    }

    /// Makes what was copied visible; says how many chunks it were. `checksums` has none, or one for each chunk.
    pub async fn commit(&self, store: Store, checksums: &[u64], deadline: Instant) -> Result<u32> {
        let chunks = u32::try_from(store.chunks.len()).unwrap_or(u32::MAX);
        let visible = chunks > 0
            && (is_active(Defect::CommitBeforeFill)
                || self.cache.commit_store(&store.key, self.instance, checksums, deadline).await?);
        Ok(if visible { chunks } else { 0 })
    }

    /// Gives the room back; nothing of it becomes visible. `copying` is the copy that was begun, which has ended. Where that
    /// was in doubt, nothing is given back: what is written late would be in another's object.
    pub async fn abandon(
        &self,
        store: Store,
        copying: Option<&Copying>,
        deadline: Instant,
    ) -> Result<()> {
        if let Some(doubt) = copying.and_then(Copying::doubt) {
            self.give_up(doubt);
            return Ok(());
        }
        if store.chunks.is_empty() {
            return Ok(());
        }
        self.cache.abandon_store(&store.key, self.instance, deadline).await
    }

    /// Blocks of a chunk, if `blocks` are just those of the key's range; of its last chunk some may be missing
    /// where `may_end_short`.
    fn check_range(&self, key: &Key, blocks: &[u32], may_end_short: bool) -> Result<usize> {
        let tokens = blocks.len() as u64 * u64::from(self.block_size);
        let missing = (key.end - key.start).checked_sub(tokens);
        let most = if may_end_short { u64::from(self.chunk_size) } else { 1 };
        if missing.is_none_or(|missing| missing >= most) {
            return Err(Error::invalid(format!(
                "{} blocks of {} tokens were given for the tokens {}..{}",
                blocks.len(),
                self.block_size,
                key.start,
                key.end
            )));
        }
        Ok((self.chunk_size / self.block_size) as usize)
    }

    /// A slot is as long as an object, whatever a server answers.
    fn check_slots(&self, slots: &[Slot]) -> Result<()> {
        let bytes = self.shape.object_bytes();
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
