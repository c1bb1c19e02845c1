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

/// Of [`Grant::length`]: the checksum is one.
const SUMMED: u64 = 1 << 63;
/// Bits of a generation that tell the object's place in the index: for more objects than that, each place has those
/// of another. The other 36 count uses.
const PLACE_BITS: u32 = 28;
const PLACES: u64 = 1 << PLACE_BITS;

/// What is granted of the pool: a slot that nobody else has until it is given back. Smaller than a [`Slot`]: there is
/// one of these for each object.
#[derive(Debug)]
pub(crate) struct Grant {
    allocation: Allocation,
    /// And [`SUMMED`].
    length: u64,
    generation: NonZeroU64,
    checksum: u64,
}

impl Grant {
    /// Where it is, as peers are told.
    pub(crate) fn slot(&self) -> Slot {
        Slot {
            offset: self.offset(),
            length: self.length(),
            generation: Some(self.generation()),
            checksum: (self.length & SUMMED != 0).then_some(self.checksum),
        }
    }

    /// Bytes that were asked for.
    fn length(&self) -> u64 {
        self.length & !SUMMED
    }

    /// The bytes have this checksum.
    pub(crate) fn keep_checksum(&mut self, checksum: u64) {
        self.checksum = checksum;
        self.length |= SUMMED;
    }

    /// Bytes from the start of the pool.
    pub(crate) fn offset(&self) -> u64 {
        u64::from(self.allocation.page) * PAGE
    }

    /// Bytes of the pool that the slot takes, whole pages.
    pub(crate) fn bytes(&self) -> u64 {
        self.length().next_multiple_of(PAGE)
    }

    /// What tells this use of the slot from every other, and the object's place, see [`place_of`].
    pub(crate) fn generation(&self) -> u64 {
        self.generation.get()
    }

    /// The same.
    pub(crate) fn count(&self) -> NonZeroU64 {
        self.generation
    }
}

/// The place in the index of what is in the use of this generation, if anything is.
pub(crate) fn place_of(generation: u64) -> usize {
    usize::try_from(generation % PLACES).unwrap_or_default()
}

/// The number of the use, of which a wrong one is hit once in 2³².
#[expect(clippy::cast_possible_truncation, reason = "the lowest bits of the count")]
pub(crate) fn use_of(generation: u64) -> u32 {
    (generation >> PLACE_BITS) as u32
}

/// Which pages of the pool are free, among those that are reserved.
pub(crate) struct Pool {
    bytes: u64,
    reserved: u64,
    allocator: Allocator,
    uses: u64,
}

impl Pool {
    /// A pool of `bytes`, of which nothing is reserved yet.
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        if bytes < PAGE || bytes / PAGE > u64::from(u32::MAX) {
            return Err(Error::invalid(format!(
                "a pool of {bytes} bytes has not {PAGE} bytes or more, and fewer than 16 TiB"
            )));
        }
        Ok(Self { bytes, reserved: 0, allocator: Allocator::new(), uses: 0 })
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

    /// A slot of `length` bytes for the object that will be in `place` of the index; `None` when no hole is large
    /// enough.
    pub(crate) fn allocate(&mut self, length: u64, place: usize) -> Option<Grant> {
        let pages = u32::try_from(length.div_ceil(PAGE)).ok().filter(|pages| *pages > 0)?;
        let allocation = self.allocator.allocate(pages)?;
        self.uses += 1;
        let generation = self.uses << PLACE_BITS | (place as u64 % PLACES);
        let generation = NonZeroU64::new(generation).unwrap_or(NonZeroU64::MAX);
        Some(Grant { allocation, length, generation, checksum: 0 })
    }

    /// Takes a slot back.
    pub(crate) fn give_back(&mut self, grant: Grant) {
        self.allocator.free(grant.allocation);
    }
}
