//! Bytes in frames, for peers that have not mapped the pool: which slots a connection may touch so.

use std::collections::HashMap;

use kvferry_core::cache::Slot;
use kvferry_store::{ReservedObject, Store};
use kvferry_wire::message::{PIECE_MAX, Piece};

/// Slots of one connection at most that it may touch; those that it is granted beyond, it cannot fill.
const LENT_MAX: usize = 131_072;

/// What the connection was granted.
#[derive(Debug, Default)]
pub(crate) struct Frames(HashMap<u64, Lent>);

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
        let Self(lent) = self;
        if lent.len() + slots.len() > LENT_MAX {
            lent.retain(|offset, lent| store.holds([(*offset, lent.generation)]));
        }
        for (slot, object) in slots.take(LENT_MAX.saturating_sub(lent.len())) {
            let Some(generation) = slot.generation else { continue };
            lent.insert(slot.offset, Lent { generation, length: slot.length, instance, object });
        }
    }

    fn find(&self, instance: u64, offset: u64, generation: u64) -> Option<&Lent> {
        let fits = |lent: &&Lent| (lent.instance, lent.generation) == (instance, generation);
        self.0.get(&offset).filter(fits)
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
        &self,
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
        Piece::fill(bytes, read).ok()
    }
}
