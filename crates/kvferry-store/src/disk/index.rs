//! Which objects lie on the disk, what they take, and which goes first.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use super::format::Named;
use crate::index::ObjectId;

/// An object on the disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Object {
    pub(crate) named: Named,
    /// Of the file.
    pub(crate) bytes: u64,
    /// What the file's time says of its last use.
    pub(crate) stamped: SystemTime,
    tick: u64,
    pins: u32,
    /// When it was last used; the age that its file had then comes on top.
    used: Instant,
    aged: Duration,
}

impl Object {
    /// For how long it has not been used.
    pub(crate) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.used).saturating_add(self.aged)
    }
}

/// A file to be removed. It counts until it is.
pub(crate) enum Victim {
    Object(Object),
    /// Of another version of the format.
    Other(String, u64),
}

impl Victim {
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Object(object) => object.named.name(),
            Self::Other(name, _) => name.clone(),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Object(object) => object.bytes,
            Self::Other(_, bytes) => *bytes,
        }
    }
}

/// All of them. No file is looked at to answer.
#[derive(Default)]
pub(crate) struct Index {
    objects: HashMap<ObjectId, Object>,
    /// By their last use.
    order: BTreeMap<u64, ObjectId>,
    others: VecDeque<(String, u64)>,
    tick: u64,
    bytes: u64,
}

impl Index {
    pub(crate) fn objects(&self) -> u64 {
        self.objects.len() as u64
    }

    pub(crate) fn others(&self) -> u64 {
        self.others.len() as u64
    }

    /// Of all files that are neither being written nor on their way out.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn get(&self, id: &ObjectId) -> Option<&Object> {
        self.objects.get(id)
    }

    /// Adds the most recently used object. There must be none of its identity.
    pub(crate) fn insert(&mut self, named: Named, bytes: u64, stamped: SystemTime, aged: Duration) {
        self.tick += 1;
        self.bytes += bytes;
        self.order.insert(self.tick, named.id);
        let object =
            Object { named, bytes, stamped, tick: self.tick, pins: 0, used: Instant::now(), aged };
        self.objects.insert(named.id, object);
    }

    /// A file of another version: it goes before all objects.
    pub(crate) fn insert_other(&mut self, name: String, bytes: u64) {
        self.bytes += bytes;
        self.others.push_back((name, bytes));
    }

    /// The object is used now.
    pub(crate) fn touch(&mut self, id: &ObjectId, now: Instant) {
        let Some(object) = self.objects.get_mut(id) else { return };
        (object.used, object.aged) = (now, Duration::ZERO);
        self.order.remove(&object.tick);
        self.tick += 1;
        object.tick = self.tick;
        self.order.insert(self.tick, *id);
    }

    /// The file's time was written.
    pub(crate) fn stamp(&mut self, named: &Named, time: SystemTime) {
        if let Some(object) = self.objects.get_mut(&named.id)
            && object.named == *named
        {
            object.stamped = time;
        }
    }

    /// Keeps the object from being evicted until [`Index::unpin`]; it is used now.
    pub(crate) fn pin(&mut self, id: &ObjectId) -> Option<Object> {
        self.touch(id, Instant::now());
        let object = self.objects.get_mut(id)?;
        object.pins += 1;
        Some(*object)
    }

    pub(crate) fn unpin(&mut self, named: &Named) {
        if let Some(object) = self.objects.get_mut(&named.id)
            && object.named == *named
        {
            object.pins = object.pins.saturating_sub(1);
        }
    }

    pub(crate) fn remove(&mut self, id: &ObjectId) -> Option<Object> {
        let object = self.objects.remove(id)?;
        self.order.remove(&object.tick);
        self.bytes -= object.bytes;
        Some(object)
    }

    /// Takes out what goes first.
    pub(crate) fn evict(&mut self) -> Option<Victim> {
        if let Some((name, bytes)) = self.others.pop_front() {
            self.bytes -= bytes;
            return Some(Victim::Other(name, bytes));
        }
        let unpinned = |id: &&ObjectId| self.objects.get(id).is_some_and(|it| it.pins == 0);
        let id = *self.order.values().find(unpinned)?;
        self.remove(&id).map(Victim::Object)
    }

    /// The file could not be removed: it stays what it was.
    pub(crate) fn put_back(&mut self, victim: Victim) {
        self.bytes += victim.bytes();
        match victim {
            // Meanwhile it was saved anew.
            Victim::Object(object) if self.objects.contains_key(&object.named.id) => {
                self.others.push_front((object.named.name(), object.bytes));
            }
            Victim::Object(object) => {
                self.order.insert(object.tick, object.named.id);
                self.objects.insert(object.named.id, object);
            }
            Victim::Other(name, bytes) => self.others.push_front((name, bytes)),
        }
    }

    /// Takes all out.
    pub(crate) fn drain(&mut self) -> Vec<Victim> {
        self.order.clear();
        self.bytes = 0;
        let others = self.others.drain(..).map(|(name, bytes)| Victim::Other(name, bytes));
        others.chain(self.objects.drain().map(|(_, object)| Victim::Object(object))).collect()
    }
}
