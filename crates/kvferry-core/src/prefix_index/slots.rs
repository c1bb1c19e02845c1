//! Where the keys are, in the order of their last use.

use super::reserve;
use crate::Result;

/// Keys in slots from 1 on. Those in use are in a ring that begins and ends at 0, youngest first.
pub(super) struct Slots<const N: usize> {
    slots: Vec<Slot<N>>,
    /// The first of the slots that were given back; each one's `older` is the next, its `younger` itself.
    free: u32,
    used: u32,
}

/// Key and links beside each other: whoever reads one soon needs the other.
#[derive(Clone, Copy)]
struct Slot<const N: usize> {
    key: [u8; N],
    older: u32,
    younger: u32,
}

impl<const N: usize> Slot<N> {
    const END: Self = Self { key: [0; N], older: 0, younger: 0 };
}

impl<const N: usize> Slots<N> {
    /// Room for `capacity` slots.
    pub(super) fn new(capacity: usize) -> Result<Self> {
        let mut slots = reserve(capacity + 1)?;
        slots.push(Slot::END);
        Ok(Self { slots, free: 0, used: 0 })
    }

    pub(super) fn clear(&mut self) {
        self.slots.clear();
        self.slots.push(Slot::END);
        (self.free, self.used) = (0, 0);
    }

    /// Slots in use.
    pub(super) fn len(&self) -> usize {
        self.used as usize
    }

    /// The key in a slot; in slot 0, zeros.
    pub(super) fn key(&self, slot: u32) -> &[u8; N] {
        &self.slots[slot as usize].key
    }

    /// Whether a slot is in use and has this key.
    pub(super) fn holds(&self, slot: u32, key: &[u8; N]) -> bool {
        let Slot { key: there, younger, .. } = &self.slots[slot as usize];
        there == key && *younger != slot
    }

    /// What stands at the beginning and at the end of a slot: for reading it early.
    pub(super) fn read(&self, slot: u32) -> u32 {
        let slot = &self.slots[slot as usize];
        u32::from(slot.key[0]) ^ slot.younger
    }

    /// The slot used longest ago, or 0.
    pub(super) fn oldest(&self) -> u32 {
        self.younger(0)
    }

    /// The slot used next after this one, or 0.
    pub(super) fn younger(&self, slot: u32) -> u32 {
        self.slots[slot as usize].younger
    }

    /// Takes a slot into use, as the youngest. The caller keeps to the capacity.
    pub(super) fn take(&mut self, key: &[u8; N]) -> u32 {
        let slot = if self.free != 0 {
            let slot = self.free;
            self.free = self.slots[slot as usize].older;
            slot
        } else {
            self.slots.push(Slot::END);
            self.used + 1
        };
        self.slots[slot as usize].key = *key;
        self.used += 1;
        self.link(slot);
        slot
    }

    /// Makes a slot the youngest.
    pub(super) fn touch(&mut self, slot: u32) {
        self.unlink(slot);
        self.link(slot);
    }

    /// Gives a slot back. Its key stays, but nobody may take it for one that is there.
    pub(super) fn give_back(&mut self, slot: u32) {
        self.unlink(slot);
        self.slots[slot as usize].older = self.free;
        self.slots[slot as usize].younger = slot;
        self.free = slot;
        self.used -= 1;
    }

    fn link(&mut self, slot: u32) {
        let youngest = self.slots[0].older;
        self.slots[slot as usize].older = youngest;
        self.slots[slot as usize].younger = 0;
        self.slots[youngest as usize].younger = slot;
        self.slots[0].older = slot;
    }

    fn unlink(&mut self, slot: u32) {
        let Slot { older, younger, .. } = self.slots[slot as usize];
        self.slots[older as usize].younger = younger;
        self.slots[younger as usize].older = older;
    }
}
