//! Between memory and the disk: what is committed is saved behind the request's back, and what a lookup finds on
//! the disk comes back to memory before the lookup is answered, or within its time.

use std::collections::HashSet;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Instant;

use kvferry_core::Result;
use kvferry_core::cache::Slot;
use kvferry_core::key::Key;

use crate::disk::{Disk, DiskStatus, Loaded, Saved};
use crate::events::Origin;
use crate::index::{Handle, ObjectId};
use crate::prompt::Prompt;
use crate::state::{Registered, State};
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
    loading: HashSet<Handle>,
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
        let (mut loads, mut loading, mut kept) = (Vec::new(), HashSet::new(), Vec::new());
        let mut end = chunks.start;
        'chunks: for chunk in chunks.clone() {
            let known: Option<Vec<_>> = ids_of(prompt, chunk, &spaces)
                .zip(&registered)
                .map(|(id, registered)| {
                    let there = self.index.get(&id).map(|handle| (id, Some(handle)));
                    let loads = |handle: &Handle| self.loading.contains_key(handle);
                    match there {
                        // Another is writing it: nobody knows for how long.
                        Some((_, Some(handle))) => {
                            let comes = self.index.get_visible(&id).is_some() || loads(&handle);
                            there.filter(|_| comes)
                        }
                        _ => {
                            let bytes = disk.find(&id.chunk, &id.space, id.rank)?;
                            (bytes == registered.object_bytes).then_some((id, None))
                        }
                    }
                })
                .collect();
            let Some(known) = known else { break };
            let mut of_chunk = Vec::new();
            for ((id, there), registered) in known.into_iter().zip(&registered) {
                let Some(handle) = there else {
                    let Some(grant) = self.allocate(registered.object_bytes, &key.cache_salt)
                    else {
                        for Load { handle, .. } in of_chunk {
                            self.abandon(&[handle]);
                        }
                        break 'chunks;
                    };
                    let slot = grant.slot();
                    let before = chunk.checked_sub(1);
                    let parent = before.and_then(|before| {
                        let chunk = prompt.hashes[before];
                        self.index.get(&ObjectId { chunk, ..id })
                    });
                    let space = self.spaces.get(id.space, registered, &key.cache_salt);
                    let parent_hash = before.map(|before| prompt.hashes[before]);
                    let origin = Origin { space, parent: parent_hash };
                    let handle = self.index.reserve(id, origin, grant, parent);
                    of_chunk.push(Load { handle, id, slot });
                    continue;
                };
                if self.index.get_visible(&id).is_some() {
                    self.index.pin(handle);
                    kept.push(handle);
                } else {
                    loading.insert(handle);
                }
            }
            loading.extend(of_chunk.iter().map(|load| load.handle));
            loads.extend(of_chunk);
            end = chunk + 1;
        }
        if loading.is_empty() {
            self.unpin(&kept);
            return loads;
        }
        for handle in &loading {
            self.loading.entry(*handle).or_default().push(key.request_id.clone());
        }
        let promotion = Promotion {
            prompt: Arc::clone(prompt),
            chunks: chunks.start..end,
            spaces,
            readers,
            hit,
            loading,
            kept,
            until,
            wakers: Vec::new(),
        };
        match self.sessions.get_mut(&key.request_id) {
            Some(session) => {
                session.hit = None;
                session.promotion = Some(promotion);
            }
            None => self.forget_promotion(Some(promotion)),
        }
        loads
    }

    /// A load has ended. Whom to wake.
    fn loaded(&mut self, handle: Handle, loaded: Option<&Loaded>) -> Vec<Waker> {
        let Some(requests) = self.loading.remove(&handle) else { return Vec::new() };
        match loaded {
            Some(loaded) => {
                self.counters.promoted_chunks += 1;
                self.index.keep_checksum(handle, loaded.checksum);
                for request_id in &requests {
                    let session = self.sessions.get_mut(request_id);
                    if let Some(promotion) = session.and_then(|it| it.promotion.as_mut())
                        && promotion.loading.contains(&handle)
                    {
                        promotion.kept.push(handle);
                        self.index.pin(handle);
                    }
                }
                self.index.commit(&[handle]);
            }
            None => self.abandon(&[handle]),
        }
        let mut wakers = Vec::new();
        for request_id in &requests {
            let session = self.sessions.get_mut(request_id);
            let Some(promotion) = session.and_then(|it| it.promotion.as_mut()) else { continue };
            if promotion.loading.remove(&handle) && promotion.loading.is_empty() {
                wakers.extend(self.settle(request_id));
            }
        }
        wakers
    }

    /// Answers a lookup with what has come. Whom to wake.
    pub(crate) fn settle(&mut self, request_id: &str) -> Vec<Waker> {
        let session = self.sessions.get_mut(request_id);
        let Some(promotion) = session.and_then(|session| session.promotion.take()) else {
            return Vec::new();
        };
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
        self.unpin(&promotion.kept);
        promotion.wakers
    }

    /// Nobody waits any more; what comes is there for others.
    pub(crate) fn forget_promotion(&mut self, promotion: Option<Promotion>) {
        if let Some(promotion) = promotion {
            self.unpin(&promotion.kept);
            promotion.wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// What of a reservation is to be saved.
    pub(crate) fn saves(&mut self, objects: &[Handle]) -> Vec<Save> {
        let mut saves = Vec::with_capacity(objects.len());
        for handle in objects {
            let Some((id, origin, slot)) = self.index.describe(*handle) else { continue };
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
        }
        saves
    }
}

impl Store {
    /// Begins to save what was committed.
    pub(crate) fn save(&self, saves: Vec<Save>) {
        let Some(disk) = self.disk() else { return };
        let mut refused = Vec::new();
        for Save { handle, saved, slot } in saves {
            let state = Arc::downgrade(self.state());
            let done = Box::new(move |_| {
                if let Some(state) = state.upgrade() {
                    lock(&state).unpin(&[handle]);
                }
            });
            if !disk.save(saved, self.memory(), slot.offset, slot.length, done) {
                refused.push(handle);
            }
        }
        if !refused.is_empty() {
            self.lock().unpin(&refused);
        }
    }

    /// Begins to load what a lookup reserved room for.
    pub(crate) fn load(&self, loads: Vec<Load>) {
        let Some(disk) = self.disk() else { return };
        for Load { handle, id, slot } in loads {
            // Of the state alone: the disk must not end on a thread of its own.
            let state = Arc::downgrade(self.state());
            let done = Box::new(move |loaded: Result<Option<Loaded>>| {
                if let Some(state) = state.upgrade() {
                    end_load(&state, handle, loaded.ok().flatten().as_ref());
                }
            });
            let place = (&id.chunk, &id.space, id.rank);
            if !disk.load(place, self.memory(), slot.offset, slot.length, done) {
                end_load(self.state(), handle, None);
            }
        }
    }

    /// The hit of the request's latest lookup, once all has come from the disk, or at the lookup's deadline; 0 for a
    /// request that is not known.
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

impl Promotion {
    pub(crate) fn is_late(&self, now: Instant) -> bool {
        self.until <= now
    }
}

fn end_load(state: &Mutex<State>, handle: Handle, loaded: Option<&Loaded>) {
    let wakers = lock(state).loaded(handle, loaded);
    wakers.into_iter().for_each(Waker::wake);
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
