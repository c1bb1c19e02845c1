//! S3-FIFO: a small queue that what is not used again passes, a main one, and keys of what has passed. One use is
//! enough for the main queue here, as prefixes are seldom used more often (the paper's figure is two).

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use super::links::{Links, List, NONE};
use super::{Eviction, Use};

const SMALL: usize = 0;
const MAIN: usize = 1;
/// The small queue has one in so many objects.
const SHARE: usize = 10;
/// Uses are counted up to this many.
const USES_MAX: u8 = 3;

#[derive(Debug, Clone, Copy, Default)]
struct Object {
    key: u64,
    /// The queue that it is in: it waits there while it may not go.
    queue: Option<usize>,
    held: bool,
    uses: u8,
}

#[derive(Default)]
pub(super) struct S3Fifo {
    objects: Vec<Object>,
    links: Links,
    queues: [List; 2],
    counts: [usize; 2],
    /// Objects in each that may go.
    free: [usize; 2],
    gone: VecDeque<(u64, u64)>,
    /// The latest entry of each key that has gone.
    by_key: HashMap<u64, u64>,
    entries: u64,
}

impl S3Fifo {
    fn push(&mut self, place: u32, queue: usize) {
        self.objects[place as usize].queue = Some(queue);
        self.counts[queue] += 1;
        self.free[queue] += usize::from(!self.objects[place as usize].held);
        self.links.push(&mut self.queues[queue], place);
    }

    fn unlink(&mut self, place: u32) -> Option<usize> {
        let object = &mut self.objects[place as usize];
        let queue = object.queue.take()?;
        self.free[queue] -= usize::from(!object.held);
        self.counts[queue] -= 1;
        self.links.unlink(&mut self.queues[queue], place);
        Some(queue)
    }
}

impl Eviction for S3Fifo {
    fn request(&mut self, uses: &[Use], _ranks: usize, _now: Instant) {
        for place in uses.iter().filter_map(|used| used.place) {
            let object = &mut self.objects[place as usize];
            object.uses = USES_MAX.min(object.uses + 1);
        }
    }

    fn add(&mut self, place: u32, key: u64) {
        let places = place as usize + 1;
        self.links.grow(places);
        self.objects.resize(self.objects.len().max(places), Object::default());
        self.objects[place as usize] = Object { key, queue: None, held: true, uses: 0 };
    }

    fn release(&mut self, place: u32) {
        let object = &mut self.objects[place as usize];
        object.held = false;
        match object.queue {
            Some(queue) => self.free[queue] += 1,
            None => {
                let known = self.by_key.remove(&object.key).is_some();
                self.push(place, if known { MAIN } else { SMALL });
            }
        }
    }

    fn hold(&mut self, place: u32) {
        let object = &mut self.objects[place as usize];
        if !std::mem::replace(&mut object.held, true)
            && let Some(queue) = object.queue
        {
            self.free[queue] -= 1;
        }
    }

    fn remove(&mut self, place: u32) {
        self.hold(place);
        let key = self.objects[place as usize].key;
        if self.unlink(place) == Some(SMALL) {
            self.entries += 1;
            self.by_key.insert(key, self.entries);
            self.gone.push_back((key, self.entries));
        }
        while self.gone.len() > self.counts[MAIN].max(64) {
            let Some((key, entry)) = self.gone.pop_front() else { break };
            if self.by_key.get(&key) == Some(&entry) {
                self.by_key.remove(&key);
            }
        }
    }

    fn victim(&mut self) -> Option<u32> {
        loop {
            let all = self.counts[SMALL] + self.counts[MAIN];
            let queue = match self.free {
                [0, 0] => return None,
                [0, _] => MAIN,
                [_, 0] => SMALL,
                _ if self.counts[SMALL] * SHARE >= all => SMALL,
                _ => MAIN,
            };
            let place = Some(self.queues[queue].first).filter(|first| *first != NONE)?;
            let Object { held, uses, .. } = self.objects[place as usize];
            let again = match queue {
                SMALL if uses > 0 => Some((MAIN, 0)),
                SMALL => held.then_some((MAIN, uses)),
                _ if uses > 0 => Some((MAIN, uses - 1)),
                _ => held.then_some((MAIN, 0)),
            };
            let Some((queue, uses)) = again else { return Some(place) };
            self.unlink(place);
            self.objects[place as usize].uses = uses;
            self.push(place, queue);
        }
    }
}
