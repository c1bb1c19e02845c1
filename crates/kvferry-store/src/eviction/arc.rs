//! ARC: what was used once and what was used more often share the room, as what returns says.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use super::links::{Links, List, NONE};
use super::{Eviction, Use};

/// What was used once (the paper's T1 and B1), and what was used more often (T2 and B2).
const ONCE: usize = 0;
const OFTEN: usize = 1;

#[derive(Debug, Clone, Copy, Default)]
struct Object {
    key: u64,
    often: bool,
    listed: bool,
}

/// Keys of what went, latest last.
#[derive(Default)]
struct Gone {
    keys: VecDeque<(u64, u64)>,
    /// Those that are still in a list of what went.
    count: usize,
}

#[derive(Default)]
pub(super) struct Arc {
    objects: Vec<Object>,
    links: Links,
    /// Of what may go, least recently used first.
    lists: [List; 2],
    /// Objects that are there, whether they may go or not.
    counts: [usize; 2],
    gone: [Gone; 2],
    /// Which list of those a key is in, with the number of its entry.
    by_key: HashMap<u64, (bool, u64)>,
    entries: u64,
    /// Keys that were used, are not there, and were remembered: they come back as used often.
    returning: HashMap<u64, ()>,
    /// How many of what was used once there should be (the paper's p).
    target: f64,
}

impl Arc {
    fn forget(&mut self, key: u64) -> Option<bool> {
        let (often, _) = self.by_key.remove(&key)?;
        self.gone[usize::from(often)].count -= 1;
        Some(often)
    }

    /// Drops the oldest of what went, until no more than `most` are left.
    fn trim(&mut self, often: bool, most: usize) {
        let gone = &mut self.gone[usize::from(often)];
        while gone.count > most || gone.keys.len() > 2 * most + 64 {
            let Some((key, entry)) = gone.keys.pop_front() else { break };
            if self.by_key.get(&key) == Some(&(often, entry)) {
                self.by_key.remove(&key);
                gone.count -= 1;
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a share needs few bits")]
impl Eviction for Arc {
    fn request(&mut self, uses: &[Use], _ranks: usize, _now: Instant) {
        let resident = self.counts[ONCE] + self.counts[OFTEN];
        for Use { key, place } in uses.iter().rev() {
            if let Some(place) = place {
                let object = &mut self.objects[*place as usize];
                if object.often {
                    continue; // it moves when it is released
                }
                object.often = true;
                self.counts[ONCE] -= 1;
                self.counts[OFTEN] += 1;
                if object.listed {
                    self.links.unlink(&mut self.lists[ONCE], *place);
                    self.links.push(&mut self.lists[OFTEN], *place);
                }
                continue;
            }
            let counts = [self.gone[ONCE].count as f64, self.gone[OFTEN].count as f64];
            match self.forget(*key) {
                Some(false) => {
                    let more = (counts[OFTEN] / counts[ONCE]).max(1.0);
                    self.target = (self.target + more).min(resident as f64);
                }
                Some(true) => {
                    let less = (counts[ONCE] / counts[OFTEN]).max(1.0);
                    self.target = (self.target - less).max(0.0);
                }
                None => continue,
            }
            self.returning.insert(*key, ());
        }
        if self.returning.len() > resident.max(1024) {
            self.returning.clear(); // they were not stored
        }
    }

    fn add(&mut self, place: u32, key: u64) {
        let places = place as usize + 1;
        self.links.grow(places);
        self.objects.resize(self.objects.len().max(places), Object::default());
        let often = self.returning.remove(&key).is_some();
        self.objects[place as usize] = Object { key, often, listed: false };
        self.counts[usize::from(often)] += 1;
    }

    fn release(&mut self, place: u32) {
        let object = &mut self.objects[place as usize];
        object.listed = true;
        self.links.push(&mut self.lists[usize::from(object.often)], place);
    }

    fn hold(&mut self, place: u32) {
        let object = &mut self.objects[place as usize];
        if std::mem::take(&mut object.listed) {
            self.links.unlink(&mut self.lists[usize::from(object.often)], place);
        }
    }

    fn remove(&mut self, place: u32) {
        self.hold(place);
        let resident = self.counts[ONCE] + self.counts[OFTEN];
        let Object { key, often, .. } = self.objects[place as usize];
        self.counts[usize::from(often)] -= 1;
        self.forget(key);
        self.entries += 1;
        self.by_key.insert(key, (often, self.entries));
        let gone = &mut self.gone[usize::from(often)];
        gone.keys.push_back((key, self.entries));
        gone.count += 1;
        self.trim(false, resident.saturating_sub(self.counts[ONCE]));
        self.trim(true, resident.saturating_sub(self.gone[ONCE].count));
    }

    fn victim(&mut self) -> Option<u32> {
        let once = self.counts[ONCE] as f64 > self.target;
        let order = if once { [ONCE, OFTEN] } else { [OFTEN, ONCE] };
        order.map(|list| self.lists[list].first).into_iter().find(|first| *first != NONE)
    }
}
