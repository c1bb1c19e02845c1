//! LMCache's `lmcache_driven` mode: this process copies from and to an engine's memory by itself, between a reservation
//! and its commit that nobody else can end.

use std::sync::Arc;

use crc_fast::{CrcAlgorithm, Digest};
use kvferry_copy::SegmentMemory;
use kvferry_copy::cuda::ExportedMemory;
use kvferry_core::cache::{Memory, Slot};
use kvferry_core::copy_plan::{ChunkCopy, CopyPlan, CopyShape, Direction};
use kvferry_core::key::{Key, check_model_name};
use kvferry_core::kv_descriptors::{DescribedMemory, KvRegistration, NULL_BLOCK, Storages};
use kvferry_core::{Error, Result};

use crate::clock::now;
use crate::embedded::next_instance;
use crate::store::{Departure, Owner, Store};

/// Bytes that are summed at a time: the processor's cache holds them.
const STEP: usize = 128 << 10;
/// Blocks of one request at most: a plan has a few words for each.
const BLOCKS_MAX: usize = 1 << 20;

/// An engine's memory that was registered; forgotten when it is dropped. Its calls copy on the caller's thread. One at a
/// time: a commit is of the range's oldest reservation.
pub struct EngineMemory {
    store: Store,
    owner: Owner,
    /// No peer of a server names it, so none takes a slot back that is being copied to.
    instance: u64,
    memory: Arrays,
    blocks_per_chunk: usize,
}

/// Asked again and again while a copy runs; its error ends it.
pub type GoOn<'a> = &'a dyn Fn() -> Result<()>;

/// The engine's arrays.
enum Arrays {
    /// In segments of the host.
    Host(SegmentMemory),
    /// On a CUDA device.
    Device(ExportedMemory),
}

impl Arrays {
    fn open(memory: &DescribedMemory) -> Result<Self> {
        match memory.storages {
            Storages::Segments(_) => SegmentMemory::open(memory).map(Self::Host),
            Storages::Cuda { .. } => ExportedMemory::open(memory).map(Self::Device),
        }
    }

    fn shape(&self) -> &Arc<CopyShape> {
        match self {
            Self::Host(memory) => memory.shape(),
            Self::Device(memory) => memory.shape(),
        }
    }

    fn copy(&self, plan: CopyPlan, pool: Arc<dyn Memory>, go_on: GoOn<'_>) -> Result<()> {
        match self {
            Self::Host(memory) => memory.copy(&plan, &*pool, go_on),
            Self::Device(memory) => memory.copy(plan, pool, go_on),
        }
    }

    /// Whether a copy may be under way for ever.
    fn is_in_doubt(&self) -> bool {
        match self {
            Self::Host(_) => false,
            Self::Device(memory) => memory.is_in_doubt(),
        }
    }
}

impl EngineMemory {
    /// Opens the engine's memory and registers its layout: lookups of the model hit what it stores.
    ///
    /// # Errors
    /// See [`KvRegistration::memory`], [`SegmentMemory::open`], [`ExportedMemory::open`] and [`Store::register`].
    pub fn register(store: &Store, registration: &KvRegistration) -> Result<Self> {
        let KvRegistration { model_name, world_size, .. } = registration;
        // The check's own message has the name, and these end up in logs.
        check_model_name(model_name).map_err(|error| {
            Error::new(error.code, "the model's name has an '@', or is too long")
        })?;
        let chunk_size = store.chunk_size();
        let described = registration.memory(chunk_size)?;
        let memory = Arrays::open(&described)?;
        let (owner, instance) = (store.connect(), next_instance());
        let engine = Self {
            store: store.clone(),
            owner,
            instance,
            memory,
            blocks_per_chunk: (chunk_size / described.layout.block_size) as usize,
        };
        let layout = described.layout.registration(model_name, *world_size, chunk_size);
        store.register(owner, instance, layout)?;
        if engine.is_on_device() {
            store.reserve_whole();
        }
        Ok(engine)
    }

    /// Bytes of an object.
    pub fn object_bytes(&self) -> u64 {
        self.memory.shape().object_bytes()
    }

    /// Whether it is a device's, whose streams go on by themselves: [`EngineMemory::wait_for`] comes before a copy then.
    pub fn is_on_device(&self) -> bool {
        matches!(self.memory, Arrays::Device(_))
    }

    /// Waits until the engine's device has come to where `event` was recorded. A host has nothing to wait for.
    ///
    /// # Errors
    /// See [`ExportedMemory::wait_for`].
    pub fn wait_for(&self, event: &[u8], go_on: GoOn<'_>) -> Result<()> {
        match &self.memory {
            Arrays::Host(_) => Ok(()),
            Arrays::Device(memory) => memory.wait_for(event, go_on),
        }
    }

    /// Stores those of the range's chunks that are not there yet, out of its blocks; whether all are there now. What
    /// was not copied whole is not visible.
    ///
    /// # Errors
    /// A range or blocks that make no sense, what copying says, `go_on`'s. Nothing is stored then.
    pub fn store(&self, key: &Key, blocks: &[u32], go_on: GoOn<'_>) -> Result<bool> {
        let blocks = self.blocks_of(key, blocks)?;
        let null = |chunk: &[u32]| chunk.iter().all(|block| *block == NULL_BLOCK);
        if blocks.chunks(self.blocks_per_chunk).any(null) {
            return Err(Error::invalid(format!(
                "a chunk has no block but {NULL_BLOCK}, which stands for none"
            )));
        }
        let reserved = self.store.prepare_store(self.owner, key, self.instance, now())?;
        if !reserved.slots.is_empty() {
            let unless_committed = Abandon { engine: self, key };
            let chunks = reserved.chunk_indices.iter().zip(&reserved.slots);
            let chunks = chunks.map(|(chunk, slot)| (*chunk as usize, slot));
            self.copy(Direction::Gather, blocks, 0, chunks, go_on)?;
            std::mem::forget(unless_committed);
            if !self.store.commit_store(key, self.instance, &[])? {
                return Ok(false); // it took longer than reservations are kept
            }
        }
        self.store.has(key, self.instance)
    }

    /// Loads the range's chunks into its blocks, but for the first `skip` tokens; `false`, and nothing is changed, when
    /// any is not there or not leased by the key's request.
    ///
    /// # Errors
    /// As [`EngineMemory::store`]; blocks may be filled in part then.
    pub fn retrieve(&self, key: &Key, blocks: &[u32], skip: u32, go_on: GoOn<'_>) -> Result<bool> {
        let blocks = self.blocks_of(key, blocks)?;
        let slots = self.store.prepare_retrieve(self.owner, key, self.instance, now())?;
        let Some(slots) = slots else { return Ok(false) };
        let _in_the_end = EndRead { engine: self, key };
        if !self.are_whole(&slots, go_on)? {
            return Ok(false);
        }
        self.copy(Direction::Scatter, blocks, skip, slots.iter().enumerate(), go_on)?;
        Ok(true)
    }

    /// Whether these hold what was stored, as far as whoever stored it told its checksum; what does not, goes.
    fn are_whole(&self, slots: &[Slot], go_on: GoOn<'_>) -> Result<bool> {
        let pool = self.store.memory();
        let mut damaged = Vec::new();
        for slot in slots {
            let Some(expected) = slot.checksum else { continue };
            let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
            let mut bytes = vec![0; STEP];
            for at in (0..slot.length).step_by(STEP) {
                go_on()?;
                let left = usize::try_from(slot.length - at).unwrap_or(STEP).min(STEP);
                pool.read(slot.offset + at, &mut bytes[..left])?;
                digest.update(&bytes[..left]);
            }
            if digest.finalize() != expected {
                damaged.extend(slot.generation);
            }
        }
        let whole = damaged.is_empty();
        self.store.discard_read(self.instance, damaged);
        Ok(whole)
    }

    /// The blocks of the key's range, of which there may be more.
    fn blocks_of<'a>(&self, key: &Key, blocks: &'a [u32]) -> Result<&'a [u32]> {
        let wanted = self.store.chunks(key)?.len() * self.blocks_per_chunk;
        if wanted > BLOCKS_MAX {
            return Err(Error::invalid(format!(
                "a range of {wanted} blocks is more than {BLOCKS_MAX}: ask for a part of it"
            )));
        }
        blocks.get(..wanted).ok_or_else(|| {
            Error::invalid(format!("{} blocks were given for {wanted}", blocks.len()))
        })
    }

    fn copy<'a>(
        &self,
        direction: Direction,
        blocks: &[u32],
        skip: u32,
        chunks: impl Iterator<Item = (usize, &'a Slot)>,
        go_on: GoOn<'_>,
    ) -> Result<()> {
        let chunk_size = self.store.chunk_size();
        let chunks: Vec<ChunkCopy<'_>> = chunks
            .map(|(chunk, slot)| {
                let before = u32::try_from(chunk).unwrap_or(u32::MAX).saturating_mul(chunk_size);
                ChunkCopy {
                    blocks: &blocks[chunk * self.blocks_per_chunk..][..self.blocks_per_chunk],
                    skip: skip.saturating_sub(before),
                    slot: slot.offset,
                }
            })
            .collect();
        let pool = self.store.memory();
        let plan = self.memory.shape().plan(direction, &chunks, pool.bytes())?;
        self.memory.copy(plan, pool, go_on)
    }
}

impl Drop for EngineMemory {
    fn drop(&mut self) {
        if self.memory.is_in_doubt() {
            // Its slots stay apart, as those of a peer that may yet write to them.
            return self.store.disconnect(self.owner, Departure::GivenUp);
        }
        self.store.unregister(self.instance);
        self.store.disconnect(self.owner, Departure::Ended);
    }
}

/// Gives a reservation back, whatever ends the copy.
struct Abandon<'a> {
    engine: &'a EngineMemory,
    key: &'a Key,
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        if self.engine.memory.is_in_doubt() {
            return;
        }
        // Without it the reservation would be the next commit's. The key was right a moment ago.
        let _ = self.engine.store.abandon_store(self.key, self.engine.instance);
    }
}

/// Ends a retrieval, whatever ends the copy.
struct EndRead<'a> {
    engine: &'a EngineMemory,
    key: &'a Key,
}

impl Drop for EndRead<'_> {
    fn drop(&mut self) {
        if self.engine.memory.is_in_doubt() {
            return;
        }
        let _ =
            self.engine.store.commit_retrieve(self.engine.owner, self.key, self.engine.instance);
    }
}
