//! Bytes in frames, for peers that have not mapped the pool: which slots a connection may touch so.

use std::collections::{HashMap, VecDeque};

use kvferry_core::cache::Slot;
use kvferry_store::{ReservedObject, Store};
use kvferry_wire::message::{PIECE_MAX, Piece};

/// Slots of one connection at most that it may touch; those that it is granted beyond, it cannot fill.
const LENT_MAX: usize = 131_072;

/// What the connection was granted.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    /// By slot and instance.
    lent: HashMap<(u64, u64), Lent>,
    /// The last pieces that were sent; memory of one that is gone is used again.
    sent: VecDeque<Piece>,
}

/// How many of them.
const SENT: usize = 3;

#[derive(Debug)]
struct Lent {
    generation: u64,
    length: u64,
    /// What it may write; `None` for what it may read.
    object: Option<ReservedObject>,
    /// So many bytes from the start were written. What lies behind them is a former owner's.
    written: u64,
}

impl Frames {
    pub(crate) fn lend_to_write(
        &mut self,
        store: &Store,
        instance: u64,
        slots: &[Slot],
        objects: &[ReservedObject],
    ) {
        let objects = objects.iter().map(|object| Some(*object));
        self.lend(store, instance, slots.iter().zip(objects));
    }

    pub(crate) fn lend_to_read(&mut self, store: &Store, instance: u64, slots: &[Slot]) {
        self.lend(store, instance, slots.iter().map(|slot| (slot, None)));
    }

    fn lend<'a>(
        &mut self,
        store: &Store,
        instance: u64,
        slots: impl ExactSizeIterator<Item = (&'a Slot, Option<ReservedObject>)>,
    ) {
        let lent = &mut self.lent;
        if lent.len() + slots.len() > LENT_MAX {
            lent.retain(|(offset, _), lent| store.holds([(*offset, lent.generation)]));
        }
        for (slot, object) in slots.take(LENT_MAX.saturating_sub(lent.len())) {
            let Some(generation) = slot.generation else { continue };
            let (offset, length) = (slot.offset, slot.length);
            lent.insert((offset, instance), Lent { generation, length, object, written: 0 });
        }
    }

    /// Whether all of these were written whole; they are not lent any more.
    pub(crate) fn take_whole(&mut self, instance: u64, reserved: &[(ReservedObject, u64)]) -> bool {
        reserved.iter().fold(true, |whole, (object, offset)| {
            let lent = self.lent.remove(&(*offset, instance));
            let is_whole = |lent: Lent| lent.object == Some(*object) && lent.written == lent.length;
            lent.is_some_and(is_whole) && whole
        })
    }

    /// Nothing is read for the instance any more, and no memory kept for further pieces.
    pub(crate) fn end_reads(&mut self, instance: u64) {
        self.lent.retain(|(_, of), lent| *of != instance || lent.object.is_some());
        self.sent.clear();
    }

    /// Whether the connection may write, or read, these bytes of a slot.
    pub(crate) fn may(
        &self,
        instance: u64,
        (offset, generation): (u64, u64),
        at: u64,
        bytes: u64,
        writes: bool,
    ) -> bool {
        let fits = |lent: &Lent| {
            lent.generation == generation
                && lent.object.is_some() == writes
                && at.checked_add(bytes).is_some_and(|end| end <= lent.length)
                && bytes <= PIECE_MAX as u64
        };
        self.lent.get(&(offset, instance)).is_some_and(fits)
    }

    /// Whether the piece is in the slot now. Pieces come from its start on, without gaps.
    pub(crate) fn write(
        &mut self,
        store: &Store,
        instance: u64,
        (offset, generation): (u64, u64),
        at: u64,
        piece: &Piece,
    ) -> bool {
        let bytes = piece.data().len() as u64;
        if !self.may(instance, (offset, generation), at, bytes, true) {
            return false;
        }
        let Some(lent) = self.lent.get_mut(&(offset, instance)) else { return false };
        let in_order = |_: &ReservedObject| at == lent.written;
        let Some(object) = lent.object.filter(in_order) else { return false };
        let written = store.write(object, at, piece.data());
        lent.written += if written { bytes } else { 0 };
        written
    }

    /// A piece of the slot.
    pub(crate) fn read(
        &mut self,
        store: &Store,
        instance: u64,
        (offset, generation): (u64, u64),
        at: u64,
        bytes: u64,
    ) -> Option<Piece> {
        if !self.may(instance, (offset, generation), at, bytes, false) {
            return None;
        }
        let bytes = usize::try_from(bytes).ok()?;
        let read =
            |into: &mut [u8]| store.read(offset, generation, at, into).then_some(()).ok_or(());
        let full = self.sent.len() == SENT;
        let memory = self.sent.pop_front_if(|_| full).map(Piece::into_memory).unwrap_or_default();
        let piece = Piece::refill(memory, bytes, read).ok()?;
        self.sent.push_back(piece.clone());
        Some(piece)
    }
}
