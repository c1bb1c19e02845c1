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
    lent: HashMap<u64, Lent>,
    /// The last pieces that were sent; memory of one that is gone is used again.
    sent: VecDeque<Piece>,
}

/// How many of them.
const SENT: usize = 3;

#[derive(Debug)]
struct Lent {
    generation: u64,
    length: u64,
    instance: u64,
    /// What it may write; `None` for what it may read.
    object: Option<ReservedObject>,
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
            lent.retain(|offset, lent| store.holds([(*offset, lent.generation)]));
        }
        for (slot, object) in slots.take(LENT_MAX.saturating_sub(lent.len())) {
            let Some(generation) = slot.generation else { continue };
            lent.insert(slot.offset, Lent { generation, length: slot.length, instance, object });
        }
    }

    /// Keeps no memory for further pieces.
    pub(crate) fn rest(&mut self) {
        self.sent.clear();
    }

    fn find(&self, instance: u64, offset: u64, generation: u64) -> Option<&Lent> {
        let fits = |lent: &&Lent| (lent.instance, lent.generation) == (instance, generation);
        self.lent.get(&offset).filter(fits)
    }

    /// Whether the piece is in the slot now.
    pub(crate) fn write(
        &self,
        store: &Store,
        instance: u64,
        (offset, generation): (u64, u64),
        at: u64,
        piece: &Piece,
    ) -> bool {
        let object = self.find(instance, offset, generation).and_then(|lent| lent.object);
        object.is_some_and(|object| store.write(object, at, piece.data()))
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
        let lent = self.find(instance, offset, generation)?;
        let bytes = usize::try_from(bytes).ok().filter(|bytes| *bytes <= PIECE_MAX)?;
        at.checked_add(bytes as u64).filter(|end| *end <= lent.length)?;
        let read =
            |into: &mut [u8]| store.read(offset, generation, at, into).then_some(()).ok_or(());
        let full = self.sent.len() == SENT;
        let memory = self.sent.pop_front_if(|_| full).map(Piece::into_memory).unwrap_or_default();
        let piece = Piece::refill(memory, bytes, read).ok()?;
        self.sent.push_back(piece.clone());
        Some(piece)
    }
}
