//! The pool: one region of memory, the steps of it that are reserved, and what of those is free.

use std::num::NonZeroU64;
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
    length: u64,
    /// Smaller than a [`Slot`]: there is one of these for each object.
    generation: NonZeroU64,
    pub(crate) checksum: Option<u64>,
}

impl Grant {
    /// Where it is, as peers are told.
    pub(crate) fn slot(&self) -> Slot {
        Slot {
            offset: self.offset(),
            length: self.length,
            generation: Some(self.generation()),
            checksum: self.checksum,
        }
    }

    /// Bytes from the start of the pool.
    pub(crate) fn offset(&self) -> u64 {
        u64::from(self.allocation.page) * PAGE
    }

    /// Bytes of the pool that the slot takes, whole pages.
    pub(crate) fn bytes(&self) -> u64 {
        self.length.next_multiple_of(PAGE)
    }

    /// The count that tells this use of the slot from every other.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.get()
    }

    /// The same.
    pub(crate) fn count(&self) -> NonZeroU64 {
        self.generation
    }
}

/// Which pages of the pool are free, among those that are reserved.
pub(crate) struct Pool {
    bytes: u64,
    reserved: u64,
    allocator: Allocator,
    uses: NonZeroU64,
}

impl Pool {
    /// A pool of `bytes`, of which nothing is reserved yet.
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        if bytes < PAGE || bytes / PAGE > u64::from(u32::MAX) {
            return Err(Error::invalid(format!(
                "a pool of {bytes} bytes is not in {PAGE} bytes..16 TiB"
            )));
        }
        Ok(Self { bytes, reserved: 0, allocator: Allocator::new(), uses: NonZeroU64::MIN })
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
        self.uses = self.uses.saturating_add(1);
        let allocation = self.allocator.allocate(pages, self.uses.get())?;
        Some(Grant { allocation, length, generation: self.uses, checksum: None })
    }

    /// Takes a slot back.
    pub(crate) fn give_back(&mut self, grant: Grant) {
        self.allocator.free(grant.allocation);
    }

    /// Whether the slot at `offset` is still in the use that `generation` counts.
    pub(crate) fn holds(&self, offset: u64, generation: u64) -> bool {
        let page = u32::try_from(offset / PAGE).ok().filter(|_| offset.is_multiple_of(PAGE));
        page.and_then(|page| self.allocator.stamp(page)) == Some(generation)
    }
}
