//! Between memory and the disk: what is committed is saved behind the request's back, and what a lookup finds on
//! the disk comes back to memory before the lookup is answered, or within its time.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::future::poll_fn;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Instant;

use kvferry_core::Result;
use kvferry_core::cache::Slot;
use kvferry_core::explain::RemovalCause;
use kvferry_core::key::Key;

use crate::disk::{Disk, DiskStatus, Loaded, Saved};
use crate::events::Origin;
use crate::index::{Demand, Handle, ObjectId};
use crate::pool::PAGE;
use crate::probe::PROBE_MODEL;
use crate::prompt::Prompt;
use crate::state::{Locked, Registered, State};
use crate::store::{Store, ids_of};

/// A lookup that waits for chunks from the disk.
pub(crate) struct Promotion {
    prompt: Arc<Prompt>,
    /// Those that it waits for, and those between them that memory has.
    chunks: Range<usize>,
    spaces: Vec<[u8; 32]>,
    readers: u32,
    /// Chunks before them: leased already.
    hit: u64,
    loading: BTreeSet<Handle>,
    /// What must not go before the lookup is answered: pinned once each.
    kept: Vec<Handle>,
    until: Instant,
    wakers: Vec<Waker>,
}

/// What a lookup asks for, as far as promotion needs it.
pub(crate) struct Wanted<'a> {
    pub(crate) key: &'a Key,
    pub(crate) prompt: &'a Arc<Prompt>,
    /// Those of the range that memory has not.
    pub(crate) chunks: Range<usize>,
    /// The layout and space of each rank's objects.
    pub(crate) spaces: Vec<(Arc<Registered>, [u8; 32])>,
    pub(crate) readers: u32,
    /// Chunks of the range before them.
    pub(crate) hit: u64,
    pub(crate) until: Instant,
}

/// Where an object is that a lookup wants.
enum Place {
    Memory(Handle),
    /// It is being loaded.
    Coming(Handle),
    Disk,
}

/// A load that is to begin: room for it is reserved.
pub(crate) struct Load {
    handle: Handle,
    id: ObjectId,
    slot: Slot,
}

/// A save that is to begin: the object is pinned for it.
pub(crate) struct Save {
    handle: Handle,
    saved: Saved,
    slot: Slot,
}

impl State {
    /// Reserves room for those of the wanted chunks that the disk has, up to the first that nobody has; the
    /// lookup's session waits for them.
    pub(crate) fn promote(&mut self, disk: &Disk, wanted: Wanted<'_>) -> Vec<Load> {
        let Wanted { key, prompt, chunks, spaces, readers, hit, until } = wanted;
        let (registered, spaces): (Vec<_>, Vec<_>) = spaces.into_iter().unzip();
        // What is there already must not make room for what comes.
        let (mut known, mut kept) = (Vec::new(), Vec::new());
        let mut missing = 0;
        for chunk in chunks.clone() {
            let places: Option<Vec<_>> = ids_of(prompt, chunk, &spaces)
                .zip(&registered)
                .map(|(id, registered)| Some((id, self.place(disk, &id, registered.object_bytes)?)))
                .collect();
            let Some(places) = places else { break };
            for ((_, place), registered) in places.iter().zip(&registered) {
                match place {
                    Place::Memory(handle) => {
                        self.index.pin(*handle);
                        kept.push(*handle);
                    }
                    Place::Coming(_) => {}
                    Place::Disk => missing += registered.object_bytes.next_multiple_of(PAGE),
                }
            }
            known.push((places, kept.len()));
        }
        let (mut loads, mut loading) = (Vec::new(), BTreeSet::new());
        let mut end = chunks.start;
        let mut kept_to_end = 0;
        for (places, kept) in known {
            let Some(of_chunk) = self.reserve(key, prompt, end, &places, &registered) else {
                self.headroom = self.headroom.max(missing); // as the pool grows, the next lookup finds it
                break;
            };
            let coming = places.iter().filter_map(|(_, place)| match place {
                Place::Coming(handle) => Some(*handle),
                _ => None,
            });
            loading.extend(coming.chain(of_chunk.iter().map(|load| load.handle)));
            loads.extend(of_chunk);
            end += 1;
            kept_to_end = kept;
        }
        self.unpin(&kept.split_off(kept_to_end));
        let session = self.sessions.get_mut(&key.request_id);
        let Some(session) = session.filter(|_| !loading.is_empty()) else {
            self.unpin(&kept);
            return loads;
        };
        for handle in &loading {
            self.loading.entry(*handle).or_default().insert(key.request_id.clone());
        }
        session.hit = None;
        session.promotion = Some(Promotion {
            prompt: Arc::clone(prompt),
            chunks: chunks.start..end,
            spaces,
            readers,
            hit,
            loading,
            kept,
            until,
            wakers: Vec::new(),
        });
        loads
    }

    /// Where the object is; `None`: nowhere, or another is writing it, nobody knows for how long.
    fn place(&self, disk: &Disk, id: &ObjectId, bytes: u64) -> Option<Place> {
        match self.index.get(id) {
            None => {
                let there = disk.find(&id.chunk, &id.space, id.rank)?;
                (there == bytes).then_some(Place::Disk)
            }
            Some(handle) if self.index.get_visible(id).is_some() => Some(Place::Memory(handle)),
            Some(handle) => self.loading.contains_key(&handle).then_some(Place::Coming(handle)),
        }
    }

    /// Room for those objects of a chunk that are on the disk; `None`: there is none.
    fn reserve(
        &mut self,
        key: &Key,
        prompt: &Prompt,
        chunk: usize,
        places: &[(ObjectId, Place)],
        registered: &[Arc<Registered>],
    ) -> Option<Vec<Load>> {
        let before = chunk.checked_sub(1).map(|before| prompt.hashes[before]);
        let mut loads = Vec::new();
        for ((id, place), registered) in places.iter().zip(registered) {
            let parent = before.and_then(|chunk| self.index.get(&ObjectId { chunk, ..*id }));
            if let (Place::Memory(handle), Some(parent)) = (place, parent) {
                self.index.adopt(parent, *handle);
            }
            if !matches!(place, Place::Disk) {
                continue;
            }
            let Some(grant) = self.allocate(registered.object_bytes, &key.cache_salt) else {
                loads.iter().rev().for_each(|load: &Load| self.take_back(load.handle));
                return None;
            };
            let slot = grant.slot();
            let space = self.spaces.get(id.space, registered, &key.cache_salt);
            let handle = self.index.reserve(*id, Origin { space, parent: before }, grant, parent);
            loads.push(Load { handle, id: *id, slot });
        }
        Some(loads)
    }

    /// What was reserved for a load is free again.
    fn take_back(&mut self, handle: Handle) {
        if let Some(grant) = self.index.remove_reserved(handle) {
            self.pool.give_back(grant);
        }
    }

    /// A load has ended.
    fn loaded(&mut self, handle: Handle, loaded: Option<&Loaded>) {
        let Some(requests) = self.loading.remove(&handle) else { return };
        let mut waiting = Vec::new();
        for request_id in requests {
            let session = self.sessions.get_mut(&request_id);
            if let Some(promotion) = session.and_then(|it| it.promotion.as_mut())
                && promotion.loading.remove(&handle)
            {
                if loaded.is_some() {
                    promotion.kept.push(handle);
                    self.index.pin(handle);
                }
                if promotion.loading.is_empty() {
                    waiting.push(request_id);
                }
            }
        }
        match loaded {
            Some(loaded) => {
                self.counters.promoted_chunks += 1;
                self.index.keep_checksum(handle, loaded.checksum);
                self.index.commit(&[handle]);
            }
            None => self.take_back(handle),
        }
        waiting.iter().for_each(|request_id| self.settle(request_id));
    }

    /// Answers a lookup with what has come.
    pub(crate) fn settle(&mut self, request_id: &str) {
        let session = self.sessions.get_mut(request_id);
        let Some(promotion) = session.and_then(|session| session.promotion.take()) else { return };
        let mut hit = Vec::new();
        let mut chunks = 0;
        for chunk in promotion.chunks.clone() {
            let found: Vec<Handle> = ids_of(&promotion.prompt, chunk, &promotion.spaces)
                .map_while(|id| self.index.get_visible(&id))
                .collect();
            if found.len() < promotion.spaces.len() {
                break;
            }
            hit.extend(found);
            chunks += 1;
        }
        for handle in hit.iter().rev() {
            for _ in 0..promotion.readers {
                self.index.pin(*handle);
            }
        }
        if let Some(session) = self.sessions.get_mut(request_id) {
            session.hit = Some(promotion.hit + chunks);
            for handle in hit {
                *session.leases.entry(handle).or_default() += promotion.readers;
            }
        }
        self.counters.hit_chunks += chunks;
        self.counters.promoted_hit_chunks += chunks;
        self.forget_promotion(Some(promotion));
    }

    /// Nobody waits any more; what comes is there for others.
    pub(crate) fn forget_promotion(&mut self, promotion: Option<Promotion>) {
        if let Some(promotion) = promotion {
            self.unpin(&promotion.kept);
            self.woken.extend(promotion.wakers);
        }
    }

    /// What of a reservation is to be saved.
    pub(crate) fn saves(&mut self, objects: &[Handle]) -> Vec<Save> {
        let mut saves = Vec::with_capacity(objects.len());
        for handle in objects {
            let Some((id, origin, slot)) = self.index.describe(*handle) else { continue };
            if origin.space.event.model_name == PROBE_MODEL {
                continue;
            }
            let saved = Saved {
                chunk: id.chunk,
                space: id.space,
                rank: id.rank,
                parent: origin.parent,
                layout: origin.space.registered.layout.clone(),
                cache_salt: origin.space.event.cache_salt.clone(),
            };
            saves.push(Save { handle: *handle, saved, slot });
            self.index.pin(*handle);
            self.saving.insert(*handle, None);
        }
        saves
    }

    /// A save has ended. `whole`: as far as is known, the bytes are those that were stored.
    fn saved(&mut self, handle: Handle, whole: bool) {
        if let Some(Some(cleared)) = self.saving.remove(&handle) {
            self.pool.give_back(cleared);
            return;
        }
        if !whole && let Some(grant) = self.index.grant(handle) {
            let generation = grant.generation();
            let discarded = self.index.discard(&HashSet::from([generation]));
            self.counters.damaged_chunks += discarded.len() as u64;
        }
        self.index.unpin(handle);
    }

    /// Evicts everything that is neither leased nor reserved; says how many objects it were. The slots of those that
    /// are being saved come back when that ends.
    pub(crate) fn clear(&mut self) -> u64 {
        let unsaved = self.saving.iter().filter(|(_, cleared)| cleared.is_none());
        let mut unsaved: Vec<Handle> = unsaved.map(|(handle, _)| *handle).collect();
        unsaved.sort_unstable(); // parents first
        self.unpin(&unsaved);
        let generation = |handle: &Handle| Some((self.index.grant(*handle)?.generation(), *handle));
        let by_generation: HashMap<u64, Handle> = unsaved.iter().filter_map(generation).collect();
        let mut cleared = 0;
        while let Some(grant) = self.index.evict(RemovalCause::Cleared, Demand::All) {
            match by_generation.get(&grant.generation()) {
                Some(handle) => {
                    self.saving.insert(*handle, Some(grant));
                }
                None => self.pool.give_back(grant),
            }
            cleared += 1;
        }
        unsaved.iter().for_each(|handle| self.index.pin(*handle)); // those that are leased, too
        cleared
    }
}

impl Store {
    /// Begins to save what was committed, under the lock of the commit: what is cleared or discarded after it was
    /// queued before.
    pub(crate) fn save(&self, committed: &mut State, saves: Vec<Save>) {
        let Some(disk) = self.disk() else { return };
        let mut refused = Vec::new();
        for Save { handle, saved, slot } in saves {
            let state = Arc::downgrade(self.state());
            let done = Box::new(move |saved: Result<bool>| {
                if let Some(state) = state.upgrade() {
                    Locked::new(&state).saved(handle, saved.unwrap_or(true));
                }
            });
            let place = (slot.offset, slot.length);
            if !disk.save_summed(saved, self.memory(), place, slot.checksum, done) {
                refused.push(handle);
            }
        }
        refused.into_iter().rev().for_each(|handle| committed.saved(handle, true));
    }

    /// Begins to load what a lookup reserved room for.
    pub(crate) fn load(&self, loads: Vec<Load>) {
        let Some(disk) = self.disk() else { return };
        for Load { handle, id, slot } in loads {
            // Of the state alone: the disk must not end on a thread of its own.
            let state = Arc::downgrade(self.state());
            let done = Box::new(move |loaded: Result<Option<Loaded>>| {
                if let Some(state) = state.upgrade() {
                    Locked::new(&state).loaded(handle, loaded.ok().flatten().as_ref());
                }
            });
            let place = (&id.chunk, &id.space, id.rank);
            if !disk.load(place, self.memory(), slot.offset, slot.length, done) {
                self.lock().loaded(handle, None);
            }
        }
    }

    /// The hit of the request's latest lookup, once all has come from the disk; 0 for a request that is not known. It
    /// waits for as long as the disk does: at the lookup's deadline [`Store::take_hit`] has what has come.
    pub async fn hit(&self, request_id: &str) -> u64 {
        poll_fn(|context| {
            let mut state = self.lock();
            let Some(session) = state.sessions.get_mut(request_id) else { return Poll::Ready(0) };
            match &mut session.promotion {
                Some(promotion) => {
                    if !promotion.wakers.iter().any(|known| known.will_wake(context.waker())) {
                        promotion.wakers.push(context.waker().clone());
                    }
                    Poll::Pending
                }
                None => Poll::Ready(session.hit.take().unwrap_or(0)),
            }
        })
        .await
    }

    /// Waits until all that was committed so far outlives a power loss, as far as the disk took it. Returns at once
    /// without a disk.
    ///
    /// # Errors
    /// [`kvferry_core::ErrorCode::Timeout`] at `deadline`; why the disk failed.
    pub fn flush(&self, deadline: Instant) -> Result<()> {
        self.disk().map_or(Ok(()), |disk| disk.flush(deadline))
    }

    /// Ends the disk, after all that was committed so far is on it or `deadline` has come. The store goes on in memory.
    ///
    /// # Errors
    /// [`kvferry_core::ErrorCode::Timeout`]: something was not written; why the disk failed.
    pub fn close_disk(&self, deadline: Instant) -> Result<()> {
        let Some(disk) = self.disk() else { return Ok(()) };
        let flushed = disk.flush(deadline);
        disk.close(deadline)?;
        flushed
    }

    /// What the disk has, did and could not do; `None` without one.
    pub fn disk_status(&self) -> Option<DiskStatus> {
        self.disk().map(Disk::status)
    }
}

#[cfg(test)]
mod tests;

impl Promotion {
    pub(crate) fn is_late(&self, now: Instant) -> bool {
        self.until <= now
    }
}
