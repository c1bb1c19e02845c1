//! The pool: one region of memory, the steps of it that are reserved, and what of those is free.

use std::collections::HashMap;
use std::sync::Arc;

use kvferry_copy::{POOL_STEP, PrivateRegion};
use kvferry_core::cache::{Memory, Slot};
use kvferry_core::{Error, Result};

use crate::allocator::{Allocation, Allocator};

/// Slots are aligned to this many bytes, as LMCache's are (`--l1-align-bytes`).
pub(crate) const PAGE: u64 = 4096;

/// The memory behind the pool.
pub(crate) enum Region {
    /// Shared with clients under a name.
    #[cfg(target_os = "linux")]
    Shared { region: Arc<kvferry_copy::SharedRegion>, name: String },
    /// Of this process alone.
    Private(Arc<PrivateRegion>),
}

impl Region {
    pub(crate) fn memory(&self) -> Arc<dyn Memory> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Shared { region, .. } => Arc::<kvferry_copy::SharedRegion>::clone(region),
            Self::Private(region) => Arc::<PrivateRegion>::clone(region),
        }
    }

    /// Makes sure that the pages of `step` are there.
    pub(crate) fn reserve(&self, step: u64) -> Result<()> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Shared { region, .. } => region.reserve(step),
            Self::Private(_) => {
                let _ = step; // private pages come on first touch
                Ok(())
            }
        }
    }
}

/// What is granted of the pool: a slot that nobody else has until it is given back.
#[derive(Debug)]
pub(crate) struct Grant {
    allocation: Allocation,
    pub(crate) slot: Slot,
}

impl Grant {
    /// Bytes of the pool that the slot takes, whole pages.
    pub(crate) fn bytes(&self) -> u64 {
        self.slot.length.next_multiple_of(PAGE)
    }

    /// The count that tells this use of the slot from every other.
    pub(crate) fn generation(&self) -> u64 {
        self.slot.generation.unwrap_or_default()
    }
}

/// Which pages of the pool are free, among those that are reserved.
pub(crate) struct Pool {
    bytes: u64,
    reserved: u64,
    allocator: Allocator,
    /// The latest use of each slot in use, by offset.
    generations: HashMap<u64, u64>,
    uses: u64,
}

impl Pool {
    /// A pool of `bytes`, of which nothing is reserved yet.
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        if bytes < PAGE || bytes / PAGE > u64::from(u32::MAX) {
            return Err(Error::invalid(format!(
                "a pool of {bytes} bytes is not in {PAGE} bytes..16 TiB"
            )));
        }
        Ok(Self {
            bytes,
            reserved: 0,
            allocator: Allocator::new(),
            generations: HashMap::new(),
            uses: 0,
        })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn reserved(&self) -> u64 {
        self.reserved
    }

    pub(crate) fn free(&self) -> u64 {
        self.allocator.free_pages() * PAGE
    }

    /// The step to reserve next; `None` when all are.
    pub(crate) fn next_step(&self) -> Option<u64> {
        (self.reserved / PAGE < self.bytes / PAGE).then_some(self.reserved / POOL_STEP)
    }

    /// The next step is reserved now.
    pub(crate) fn grow(&mut self) {
        let pages = (self.bytes - self.reserved).min(POOL_STEP) / PAGE;
        if let Ok(pages) = u32::try_from(pages) {
            self.allocator.grow(pages);
            self.reserved += u64::from(pages) * PAGE;
        }
    }

    /// A slot of `length` bytes; `None` when no hole is large enough.
    pub(crate) fn allocate(&mut self, length: u64) -> Option<Grant> {
        let pages = u32::try_from(length.div_ceil(PAGE)).ok().filter(|pages| *pages > 0)?;
        let allocation = self.allocator.allocate(pages)?;
        let offset = u64::from(allocation.page) * PAGE;
        self.uses += 1;
        self.generations.insert(offset, self.uses);
        let slot = Slot { offset, length, generation: Some(self.uses), checksum: None };
        Some(Grant { allocation, slot })
    }

    /// Takes a slot back.
    pub(crate) fn give_back(&mut self, grant: Grant) {
        self.generations.remove(&grant.slot.offset);
        self.allocator.free(grant.allocation);
    }

    /// Whether the slot at `offset` is still in the use that `generation` counts.
    pub(crate) fn holds(&self, offset: u64, generation: u64) -> bool {
        self.generations.get(&offset) == Some(&generation)
    }
}
