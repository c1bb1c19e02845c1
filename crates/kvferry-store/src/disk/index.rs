//! Which objects lie on the disk, what they take, and which goes first.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant, SystemTime};

use super::format::{Kind, Named, kind};
use crate::index::ObjectId;

/// An object on the disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Object {
    pub(crate) named: Named,
    /// Of the file.
    pub(crate) bytes: u64,
    /// What the file's time says of its last use.
    pub(crate) stamped: SystemTime,
    tick: i64,
    pins: u32,
    /// The tick at which it could not be removed; 0 for never.
    failed: i64,
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
    /// Of another version of the format, or one that nobody needs.
    Other(String, u64),
}

/// What goes when its turn comes.
enum Place {
    Object(ObjectId),
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
    /// Objects by their last use, other files before them, what could not be removed where it failed.
    order: BTreeMap<i64, Place>,
    /// Where other files stand that a restart would take for an object: it must not outlive the object's removal.
    formers: HashMap<ObjectId, Vec<i64>>,
    others: u64,
    /// Of what came last, and of what goes first.
    tick: i64,
    first: i64,
    bytes: u64,
}

impl Index {
    pub(crate) fn objects(&self) -> u64 {
        self.objects.len() as u64
    }

    pub(crate) fn others(&self) -> u64 {
        self.others
    }

    /// What failed later than now has a larger one.
    pub(crate) fn tick(&self) -> i64 {
        self.tick
    }

    /// Of all files that are neither being written nor on their way out.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn get(&self, id: &ObjectId) -> Option<&Object> {
        self.objects.get(id)
    }

    /// Adds the most recently used object. A former one of its identity, which could not be removed, is a file that
    /// nobody needs.
    pub(crate) fn insert(&mut self, named: Named, bytes: u64, stamped: SystemTime, aged: Duration) {
        if let Some(former) = self.remove(&named.id) {
            self.put_back(Victim::Other(former.named.name(), former.bytes));
        }
        self.tick += 1;
        self.bytes += bytes;
        self.order.insert(self.tick, Place::Object(named.id));
        let (tick, used) = (self.tick, Instant::now());
        let object = Object { named, bytes, stamped, tick, pins: 0, failed: 0, used, aged };
        self.objects.insert(named.id, object);
    }

    /// A file of another version: it goes before all objects.
    pub(crate) fn insert_other(&mut self, name: String, bytes: u64) {
        self.first -= 1;
        self.put_other(self.first, name, bytes);
    }

    fn put_other(&mut self, tick: i64, name: String, bytes: u64) {
        if let Kind::Object(named) = kind(&name) {
            self.formers.entry(named.id).or_default().push(tick);
        }
        self.bytes += bytes;
        self.others += 1;
        self.order.insert(tick, Place::Other(name, bytes));
    }

    fn take_other(&mut self, tick: i64) -> Option<Victim> {
        let Some(Place::Other(name, bytes)) = self.order.remove(&tick) else { return None };
        if let Kind::Object(Named { id, .. }) = kind(&name)
            && let Some(ticks) = self.formers.get_mut(&id)
        {
            ticks.retain(|other| *other != tick);
            if ticks.is_empty() {
                self.formers.remove(&id);
            }
        }
        self.bytes -= bytes;
        self.others -= 1;
        Some(Victim::Other(name, bytes))
    }

    /// Takes out the files that a restart would take for the object.
    pub(crate) fn remove_formers(&mut self, id: &ObjectId) -> Vec<Victim> {
        let ticks = self.formers.remove(id).unwrap_or_default();
        ticks.into_iter().filter_map(|tick| self.take_other(tick)).collect()
    }

    /// The object is used now.
    pub(crate) fn touch(&mut self, id: &ObjectId, now: Instant) {
        let Some(object) = self.objects.get_mut(id) else { return };
        (object.used, object.aged) = (now, Duration::ZERO);
        self.order.remove(&object.tick);
        self.tick += 1;
        object.tick = self.tick;
        self.order.insert(self.tick, Place::Object(*id));
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

    /// Takes out what goes first of what did not fail after `since`: so each is tried once, however often one asks.
    pub(crate) fn evict(&mut self, since: i64) -> Option<Victim> {
        let may_go = |(tick, place): &(&i64, &Place)| match place {
            Place::Object(id) => {
                self.objects.get(id).is_some_and(|it| it.pins == 0 && it.failed <= since)
            }
            Place::Other(..) => **tick <= since,
        };
        match self.order.iter().find(may_go)? {
            (_, &Place::Object(id)) => self.remove(&id).map(Victim::Object),
            (&tick, Place::Other(..)) => self.take_other(tick),
        }
    }

    /// The file could not be removed: it stays what it was, and everything else goes before it.
    pub(crate) fn put_back(&mut self, victim: Victim) {
        self.tick += 1;
        let tick = self.tick;
        match victim {
            // Meanwhile it was saved anew.
            Victim::Object(object) if self.objects.contains_key(&object.named.id) => {
                self.put_other(tick, object.named.name(), object.bytes);
            }
            Victim::Object(object) => {
                let id = object.named.id;
                self.bytes += object.bytes;
                self.order.insert(tick, Place::Object(id));
                self.objects.insert(id, Object { tick, failed: tick, ..object });
            }
            Victim::Other(name, bytes) => self.put_other(tick, name, bytes),
        }
    }

    /// Takes all out.
    pub(crate) fn drain(&mut self) -> Vec<Victim> {
        (self.bytes, self.others) = (0, 0);
        self.formers.clear();
        let places = std::mem::take(&mut self.order).into_values();
        let victims = places.filter_map(|place| match place {
            Place::Object(id) => self.objects.remove(&id).map(Victim::Object),
            Place::Other(name, bytes) => Some(Victim::Other(name, bytes)),
        });
        victims.collect()
    }
}
