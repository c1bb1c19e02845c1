//! The least recently used goes first.

use std::time::Instant;

use super::links::{Links, List, NONE};
use super::{Eviction, Use};

/// What may go, in the order in which it was released.
#[derive(Default)]
pub(super) struct Lru {
    list: List,
    links: Links,
    listed: Vec<bool>,
}

impl Eviction for Lru {
    fn request(&mut self, _uses: &[Use], _ranks: usize, _now: Instant) {}

    fn add(&mut self, place: u32, _key: u64) {
        let places = place as usize + 1;
        self.links.grow(places);
        self.listed.resize(self.listed.len().max(places), false);
    }

    fn release(&mut self, place: u32) {
        self.links.push(&mut self.list, place);
        self.listed[place as usize] = true;
    }

    fn hold(&mut self, place: u32) {
        if std::mem::take(&mut self.listed[place as usize]) {
            self.links.unlink(&mut self.list, place);
        }
    }

    fn remove(&mut self, place: u32) {
        self.hold(place);
    }

    fn victim(&mut self) -> Option<u32> {
        Some(self.list.first).filter(|first| *first != NONE)
    }
}
