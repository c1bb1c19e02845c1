//! Which objects lie on the disk, what they take, and which goes first.

use std::collections::{BTreeMap, HashMap};
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
        self.bytes += bytes;
        self.others += 1;
        self.order.insert(self.first, Place::Other(name, bytes));
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
        let (&tick, _) = self.order.iter().find(may_go)?;
        match self.order.remove(&tick)? {
            Place::Object(id) => self.remove(&id).map(Victim::Object),
            Place::Other(name, bytes) => {
                self.bytes -= bytes;
                self.others -= 1;
                Some(Victim::Other(name, bytes))
            }
        }
    }

    /// The file could not be removed: it stays what it was, and everything else goes before it.
    pub(crate) fn put_back(&mut self, victim: Victim) {
        self.tick += 1;
        let tick = self.tick;
        self.bytes += victim.bytes();
        let place = match victim {
            // Meanwhile it was saved anew.
            Victim::Object(object) if self.objects.contains_key(&object.named.id) => {
                Place::Other(object.named.name(), object.bytes)
            }
            Victim::Object(object) => {
                let id = object.named.id;
                self.objects.insert(id, Object { tick, failed: tick, ..object });
                Place::Object(id)
            }
            Victim::Other(name, bytes) => Place::Other(name, bytes),
        };
        self.others += u64::from(matches!(place, Place::Other(..)));
        self.order.insert(tick, place);
    }

    /// Takes all out.
    pub(crate) fn drain(&mut self) -> Vec<Victim> {
        (self.bytes, self.others) = (0, 0);
        let places = std::mem::take(&mut self.order).into_values();
        let victims = places.filter_map(|place| match place {
            Place::Object(id) => self.objects.remove(&id).map(Victim::Object),
            Place::Other(name, bytes) => Some(Victim::Other(name, bytes)),
        });
        victims.collect()
    }
}
