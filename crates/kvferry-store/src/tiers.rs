//! Between memory and the tiers below it, the disk and the remote: what is committed is saved behind the request's
//! back, and what a lookup finds in them comes back to memory before the lookup is answered, or within its time.
//!
//! What the disk has is known at once. The remote is asked, once for each lookup, about what neither memory nor the
//! disk has; the lookup waits for its answer as it waits for loads.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Instant;

use kvferry_core::Result;
use kvferry_core::cache::{Memory, Slot};
use kvferry_core::explain::RemovalCause;
use kvferry_core::key::Key;

use crate::disk::{Disk, DiskStatus, LoadDone, Loaded, Saved, SummedDone};
use crate::events::Origin;
use crate::index::{Demand, Handle, ObjectId};
use crate::pool::{Grant, PAGE};
use crate::probe::PROBE_MODEL;
use crate::prompt::Prompt;
use crate::remote::{Remote, RemoteStatus};
use crate::state::{Locked, Registered, State};
use crate::store::{Store, ids_of};

/// What keeps objects below the memory.
pub(crate) trait Tier: Send + Sync {
    /// Saves bytes of `memory` (offset, length), which must stay until `done` is called: with `Ok(false)` when they have
    /// another checksum than this. `false`: it is not saved, counted, and `done` is not called.
    #[must_use = "a save that was refused calls nothing back"]
    fn save(
        &self,
        saved: Saved,
        memory: Arc<dyn Memory>,
        place: (u64, u64),
        checksum: Option<u64>,
        done: SummedDone,
    ) -> bool;

    /// Loads the object to `memory` (offset, length), which must stay until `done` is called; until then, and after
    /// anything but `Ok(Some(_))`, what lies there may be anything. `false`: refused, counted, and `done` is not called.
    #[must_use = "a load that was refused calls nothing back"]
    fn load(
        &self,
        id: &ObjectId,
        memory: Arc<dyn Memory>,
        place: (u64, u64),
        done: LoadDone,
    ) -> bool;

    /// The objects are not found any more, and no save of them that was accepted before brings them back.
    fn remove(&self, ids: &[ObjectId]);

    /// Nothing that was saved until now is found any more.
    fn clear(&self);

    /// Waits until everything that was accepted so far is saved; or why it is not.
    fn flush(&self, deadline: Instant) -> Result<()>;

    /// Ends what is under way, and gives back what waits. Calling it again only waits.
    fn close(&self, deadline: Instant) -> Result<()>;
}

/// The tiers of a store.
#[derive(Clone, Copy)]
pub(crate) struct Below<'a> {
    pub(crate) disk: Option<&'a Disk>,
    pub(crate) remote: Option<&'a Remote>,
}

/// A tier below the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Disk,
    Remote,
}

impl<'a> Below<'a> {
    pub(crate) fn all(self) -> impl Iterator<Item = &'a dyn Tier> {
        let disk = self.disk.map(|disk| disk as &dyn Tier);
        disk.into_iter().chain(self.remote.map(|remote| remote as &dyn Tier))
    }

    pub(crate) fn is_empty(self) -> bool {
        self.disk.is_none() && self.remote.is_none()
    }

    fn at(self, level: Level) -> Option<&'a dyn Tier> {
        match level {
            Level::Disk => self.disk.map(|disk| disk as &dyn Tier),
            Level::Remote => self.remote.map(|remote| remote as &dyn Tier),
        }
    }
}

/// Bytes of memory that loads under way have reserved.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Coming {
    all: u64,
    /// Of these from the remote.
    remote: u64,
}

/// A lookup that waits for chunks from below.
pub(crate) struct Promotion {
    wanted: Arc<Wants>,
    /// Those that it waits for, and those between them that memory has.
    chunks: Range<usize>,
    /// Chunks before them: leased already.
    hit: u64,
    loading: BTreeSet<Handle>,
    /// The remote has not answered it yet.
    question: Option<Question>,
    /// What must not go before the lookup is answered: pinned once each.
    kept: Vec<Handle>,
    /// Which of it came from where.
    came: HashMap<Handle, Level>,
    until: Instant,
    wakers: Vec<Waker>,
}

/// What a lookup asks the remote for.
struct Question {
    /// Unlike that of any other.
    number: u64,
    /// In the order of the chunks, each with the bytes of its value.
    objects: Vec<(ObjectId, u64)>,
    /// The chunks that they are of, with those between them that memory or the disk has.
    chunks: Range<usize>,
}

/// Whose chunks a lookup wants.
pub(crate) struct Wants {
    pub(crate) cache_salt: String,
    pub(crate) prompt: Arc<Prompt>,
    /// The layout of each rank's objects.
    pub(crate) layouts: Vec<Arc<Registered>>,
    /// Their spaces.
    pub(crate) spaces: Vec<[u8; 32]>,
    pub(crate) readers: u32,
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
    Below(Level),
}

/// A load that is to begin: room for it is reserved.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    handle: Handle,
    id: ObjectId,
    /// Of the prompt.
    chunk: usize,
    /// Offset and length in the pool.
    place: (u64, u64),
    from: Level,
    /// Clears until then.
    clears: u64,
}

/// A question that is to be asked for a lookup.
pub(crate) struct Ask {
    request_id: String,
    number: u64,
    objects: Vec<(ObjectId, u64)>,
}

/// A save that is to begin: the object is pinned for it.
pub(crate) struct Save {
    handle: Handle,
    saved: Saved,
    slot: Slot,
}

/// An object that is being saved.
pub(crate) struct Saving {
    /// Tiers that have not ended.
    tiers: usize,
    /// Its slot, if it is gone from the index.
    cleared: Option<Grant>,
}

/// What was done about the chunks that a lookup wants.
struct Gathered {
    loads: Vec<Load>,
    loading: BTreeSet<Handle>,
    kept: Vec<Handle>,
    /// The first chunk for which nothing was done.
    end: usize,
    /// There was no room for that one.
    full: bool,
}

impl State {
    /// Reserves room for those of the wanted chunks that are below, up to the first that nobody is known to have; the
    /// lookup's session waits for them, and for the remote's word on those from there on.
    pub(crate) fn promote(
        &mut self,
        below: Below<'_>,
        wanted: Wanted<'_>,
    ) -> (Vec<Load>, Option<Ask>) {
        let Wanted { key, prompt, chunks, spaces, readers, hit, until } = wanted;
        let (layouts, spaces): (Vec<_>, Vec<_>) = spaces.into_iter().unzip();
        let wants = Wants {
            cache_salt: key.cache_salt.clone(),
            prompt: Arc::clone(prompt),
            layouts,
            spaces,
            readers,
        };
        let gathered = self.gather(below, &wants, chunks.clone(), &HashSet::new());
        let Gathered { loads, loading, kept, end, full } = gathered;
        let rest = end..chunks.end;
        let question = match below.remote {
            Some(remote) if !full && remote.answers() => self.question(below, &wants, rest),
            _ => None,
        };
        let ask = question.as_ref().map(|Question { number, objects, .. }| Ask {
            request_id: key.request_id.clone(),
            number: *number,
            objects: objects.clone(),
        });
        let session = self.sessions.get_mut(&key.request_id);
        let waits = !loading.is_empty() || question.is_some();
        let Some(session) = session.filter(|_| waits) else {
            self.unpin(&kept);
            return (loads, None);
        };
        session.hit = None;
        session.promotion = Some(Promotion {
            wanted: Arc::new(wants),
            chunks: chunks.start..end,
            hit,
            loading: loading.clone(),
            question,
            kept,
            came: HashMap::new(),
            until,
            wakers: Vec::new(),
        });
        self.wait_for(&key.request_id, &loading);
        (loads, ask)
    }

    /// The request waits for these loads.
    fn wait_for(&mut self, request_id: &str, loading: &BTreeSet<Handle>) {
        for handle in loading {
            self.loading.entry(*handle).or_default().insert(request_id.to_owned());
        }
    }

    /// What to ask the remote of these chunks, if anything.
    fn question(
        &mut self,
        below: Below<'_>,
        wants: &Wants,
        chunks: Range<usize>,
    ) -> Option<Question> {
        let mut objects = Vec::new();
        let mut end = chunks.start;
        'chunks: for chunk in chunks.clone() {
            let before = objects.len();
            for (id, layout) in ids_of(&wants.prompt, chunk, &wants.spaces).zip(&wants.layouts) {
                if self.place(below.disk, &HashSet::new(), &id, layout.object_bytes).is_some() {
                    continue;
                }
                if self.index.get(&id).is_some() {
                    objects.truncate(before); // another writes it, nobody knows for how long
                    break 'chunks;
                }
                let (salt, length) = (&wants.cache_salt, layout.object_bytes);
                objects.push((id, Remote::value_bytes(&layout.layout, salt, length)));
            }
            end = chunk + 1;
        }
        let number = self.next();
        (!objects.is_empty()).then_some(Question { number, objects, chunks: chunks.start..end })
    }

    /// The remote's answer to a lookup's question: so many of the objects are there.
    pub(crate) fn found(
        &mut self,
        below: Below<'_>,
        request_id: &str,
        number: u64,
        there: usize,
    ) -> Vec<Load> {
        let session = self.sessions.get_mut(request_id);
        let Some(promotion) = session.and_then(|session| session.promotion.as_mut()) else {
            return Vec::new(); // it was answered, or asked again
        };
        let Some(question) = promotion.question.take_if(|question| question.number == number)
        else {
            return Vec::new();
        };
        let there = question.objects.iter().take(there).map(|(id, _)| *id).collect();
        let wants = Arc::clone(&promotion.wanted);
        let gathered = self.gather(below, &wants, question.chunks, &there);
        self.wait_for(request_id, &gathered.loading);
        let session = self.sessions.get_mut(request_id);
        if let Some(promotion) = session.and_then(|session| session.promotion.as_mut()) {
            promotion.chunks.end = gathered.end;
            promotion.loading.extend(gathered.loading);
            promotion.kept.extend(gathered.kept);
            if promotion.is_over() {
                self.settle(request_id);
            }
        }
        gathered.loads
    }

    /// Reserves room for those of the chunks that are below, up to the first that nobody has.
    fn gather(
        &mut self,
        below: Below<'_>,
        wants: &Wants,
        chunks: Range<usize>,
        remote: &HashSet<ObjectId>,
    ) -> Gathered {
        let Wants { prompt, layouts, spaces, .. } = wants;
        // What is there already must not make room for what comes.
        let (mut known, mut kept) = (Vec::new(), Vec::new());
        let mut missing = 0;
        for chunk in chunks.clone() {
            let places: Option<Vec<_>> = ids_of(prompt, chunk, spaces)
                .zip(layouts)
                .map(|(id, layout)| {
                    Some((id, self.place(below.disk, remote, &id, layout.object_bytes)?))
                })
                .collect();
            let Some(places) = places else { break };
            for ((_, place), layout) in places.iter().zip(layouts) {
                match place {
                    Place::Memory(handle) => {
                        self.index.pin(*handle);
                        kept.push(*handle);
                    }
                    Place::Coming(_) => {}
                    Place::Below(_) => missing += layout.object_bytes.next_multiple_of(PAGE),
                }
            }
            known.push((places, kept.len()));
        }
        let (mut loads, mut loading) = (Vec::new(), BTreeSet::new());
        let mut end = chunks.start;
        let mut kept_to_end = 0;
        let mut full = false;
        let alone = self.coming.all == 0; // one prompt may need all the memory
        for (places, kept) in known {
            let bytes_from = |level| {
                let from = |place: &Place| matches!(place, Place::Below(from) if *from == level);
                let of_level = places.iter().zip(layouts).filter(|((_, place), _)| from(place));
                of_level.map(|(_, it)| it.object_bytes.next_multiple_of(PAGE)).sum::<u64>()
            };
            let (of_disk, of_remote) = (bytes_from(Level::Disk), bytes_from(Level::Remote));
            if !(alone || self.may_come(of_disk + of_remote))
                || !self.may_come_from_remote(of_remote)
            {
                full = true;
                break;
            }
            let Some(of_chunk) = self.reserve(wants, end, &places) else {
                self.headroom = self.headroom.max(missing); // as the pool grows, the next lookup finds it
                full = true;
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
        Gathered { loads, loading, kept, end, full }
    }

    /// Where the object is, as far as is known; `None`: nowhere, or another is writing it, nobody knows for how long.
    fn place(
        &self,
        disk: Option<&Disk>,
        remote: &HashSet<ObjectId>,
        id: &ObjectId,
        bytes: u64,
    ) -> Option<Place> {
        match self.index.get(id) {
            None => {
                let on_disk = disk.and_then(|disk| disk.find(&id.chunk, &id.space, id.rank));
                if on_disk == Some(bytes) {
                    return Some(Place::Below(Level::Disk));
                }
                remote.contains(id).then_some(Place::Below(Level::Remote))
            }
            Some(handle) if self.index.get_visible(id).is_some() => Some(Place::Memory(handle)),
            Some(handle) => self.loading.contains_key(&handle).then_some(Place::Coming(handle)),
        }
    }

    /// Room for those objects of a chunk that are below; `None`: there is none.
    fn reserve(
        &mut self,
        wants: &Wants,
        chunk: usize,
        places: &[(ObjectId, Place)],
    ) -> Option<Vec<Load>> {
        let Wants { prompt, layouts, cache_salt, .. } = wants;
        let before = chunk.checked_sub(1).map(|before| prompt.hashes[before]);
        let mut loads = Vec::new();
        for ((id, place), layout) in places.iter().zip(layouts) {
            let parent = before.and_then(|chunk| self.index.get(&ObjectId { chunk, ..*id }));
            if let (Place::Memory(handle), Some(parent)) = (place, parent) {
                self.index.adopt(parent, *handle);
            }
            let Place::Below(from) = place else { continue };
            let Some(grant) = self.allocate(layout.object_bytes, cache_salt) else {
                loads.iter().rev().for_each(|load: &Load| {
                    self.has_come(load.handle, load.from);
                    self.take_back(load.handle);
                });
                return None;
            };
            let Slot { offset, length, .. } = grant.slot();
            self.coming.all += grant.bytes();
            self.coming.remote += if *from == Level::Remote { grant.bytes() } else { 0 };
            let space = self.spaces.get(id.space, layout, cache_salt);
            let handle = self.index.reserve(*id, Origin { space, parent: before }, grant, parent);
            let (place, clears) = ((offset, length), self.clears);
            loads.push(Load { handle, id: *id, chunk, place, from: *from, clears });
        }
        Some(loads)
    }

    /// What was reserved for a load is free again.
    fn take_back(&mut self, handle: Handle) {
        if let Some(grant) = self.index.remove_reserved(handle) {
            self.pool.give_back(grant);
        }
    }

    /// Whether loads may reserve so many bytes more. What a lookup does not live to see stays reserved until it is there,
    /// and a tier that hangs must not take all of the memory: a quarter stays for what is stored.
    fn may_come(&self, bytes: u64) -> bool {
        bytes == 0 || self.coming.all + bytes <= self.pool.bytes() - self.pool.bytes() / 4
    }

    /// The remote may be slow for long.
    fn may_come_from_remote(&self, bytes: u64) -> bool {
        let Coming { remote, .. } = self.coming;
        bytes == 0 || remote == 0 || remote + bytes <= self.pool.bytes() / 4
    }

    /// A load has ended.
    fn has_come(&mut self, handle: Handle, from: Level) {
        let Some(grant) = self.index.grant(handle) else { return };
        self.coming.all = self.coming.all.saturating_sub(grant.bytes());
        if from == Level::Remote {
            self.coming.remote = self.coming.remote.saturating_sub(grant.bytes());
        }
    }

    /// A load has ended, or goes on from the remote: where the disk's came to nothing, that may have the object.
    fn loaded(
        &mut self,
        load: Load,
        loaded: Option<&Loaded>,
        remote_answers: bool,
    ) -> Option<Load> {
        let Load { handle, from, chunk, .. } = load;
        // A tier may have ended it just before it was cleared itself.
        let was_cleared = load.clears != self.clears;
        let loaded = loaded.filter(|_| !was_cleared);
        if let (None, Level::Disk, true, Some(grant)) =
            (loaded, from, remote_answers, self.index.grant(handle))
            && !was_cleared
            && self.may_come_from_remote(grant.bytes())
        {
            self.coming.remote += grant.bytes();
            return Some(Load { from: Level::Remote, ..load });
        }
        self.has_come(handle, from);
        let requests = self.loading.remove(&handle)?;
        let mut waiting = Vec::new();
        let mut wants = None;
        for request_id in requests {
            let session = self.sessions.get_mut(&request_id);
            if let Some(promotion) = session.and_then(|it| it.promotion.as_mut())
                && promotion.loading.remove(&handle)
            {
                wants.get_or_insert_with(|| Arc::clone(&promotion.wanted));
                if loaded.is_some() {
                    promotion.kept.push(handle);
                    promotion.came.insert(handle, from);
                    self.index.pin(handle);
                }
                if promotion.is_over() {
                    waiting.push(request_id);
                }
            }
        }
        match loaded {
            Some(loaded) => {
                match from {
                    Level::Disk => self.counters.promoted_chunks += 1,
                    Level::Remote => self.counters.remote_promoted_chunks += 1,
                }
                self.index.keep_checksum(handle, loaded.checksum);
                let prompt = wants.as_ref().map(|wants| &wants.prompt);
                let mut tokens = prompt.map(|prompt| prompt.tokens_of(chunk..chunk + 1));
                self.index.commit(&[handle], |hash| tokens.as_mut()?(hash));
            }
            None => self.take_back(handle),
        }
        waiting.iter().for_each(|request_id| self.settle(request_id));
        None
    }

    /// Answers a lookup with what has come.
    pub(crate) fn settle(&mut self, request_id: &str) {
        let session = self.sessions.get_mut(request_id);
        let Some(promotion) = session.and_then(|session| session.promotion.take()) else { return };
        let mut hit = Vec::new();
        let mut chunks = 0;
        for chunk in promotion.chunks.clone() {
            let found: Vec<Handle> =
                ids_of(&promotion.wanted.prompt, chunk, &promotion.wanted.spaces)
                    .map_while(|id| self.index.get_visible(&id))
                    .collect();
            if found.len() < promotion.wanted.spaces.len() {
                break;
            }
            let came = |level| found.iter().any(|it| promotion.came.get(it) == Some(&level));
            if came(Level::Remote) {
                self.counters.remote_promoted_hit_chunks += 1;
            } else if came(Level::Disk) {
                self.counters.promoted_hit_chunks += 1;
            }
            hit.extend(found);
            chunks += 1;
        }
        for handle in hit.iter().rev() {
            self.index.pin_often(*handle, promotion.wanted.readers);
        }
        if let Some(session) = self.sessions.get_mut(request_id) {
            session.hit = Some(promotion.hit + chunks);
            for handle in hit {
                *session.leases.entry(handle).or_default() += promotion.wanted.readers;
            }
        }
        self.counters.hit_chunks += chunks;
        self.forget_promotion(request_id, Some(promotion));
    }

    /// The request does not wait any more; what comes is there for others.
    pub(crate) fn forget_promotion(&mut self, request_id: &str, promotion: Option<Promotion>) {
        if let Some(promotion) = promotion {
            for handle in &promotion.loading {
                if let Some(requests) = self.loading.get_mut(handle) {
                    requests.remove(request_id);
                }
            }
            self.unpin(&promotion.kept);
            self.woken.extend(promotion.wakers);
        }
    }

    /// What of a reservation is to be saved in so many tiers.
    pub(crate) fn saves(&mut self, objects: &[Handle], tiers: usize) -> Vec<Save> {
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
            self.saving.insert(*handle, Saving { tiers, cleared: None });
        }
        saves
    }

    /// A save in one tier has ended. `whole`: as far as is known, the bytes are those that were stored.
    fn saved(&mut self, handle: Handle, whole: bool) {
        let Some(saving) = self.saving.get_mut(&handle) else { return };
        saving.tiers -= 1;
        let (is_last, is_cleared) = (saving.tiers == 0, saving.cleared.is_some());
        if !whole
            && !is_cleared
            && let Some(grant) = self.index.grant(handle)
        {
            let generation = grant.generation();
            let discarded = self.index.discard(&HashSet::from([generation]));
            self.counters.damaged_chunks += discarded.len() as u64;
        }
        if is_last && let Some(saving) = self.saving.remove(&handle) {
            match saving.cleared {
                Some(cleared) => self.pool.give_back(cleared),
                None => self.index.unpin(handle),
            }
        }
    }

    /// Evicts everything that is neither leased nor reserved; says how many objects it were. The slots of those that
    /// are being saved come back when that ends.
    pub(crate) fn clear(&mut self) -> u64 {
        self.clears += 1;
        let unsaved = self.saving.iter().filter(|(_, saving)| saving.cleared.is_none());
        let mut unsaved: Vec<Handle> = unsaved.map(|(handle, _)| *handle).collect();
        unsaved.sort_unstable(); // parents first
        self.unpin(&unsaved);
        let generation = |handle: &Handle| Some((self.index.grant(*handle)?.generation(), *handle));
        let by_generation: HashMap<u64, Handle> = unsaved.iter().filter_map(generation).collect();
        let mut cleared = 0;
        while let Some(grant) = self.index.evict(RemovalCause::Cleared, Demand::All) {
            let handle = by_generation.get(&grant.generation());
            match handle.and_then(|handle| self.saving.get_mut(handle)) {
                Some(saving) => saving.cleared = Some(grant),
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
        let mut refused = Vec::new();
        for Save { handle, saved, slot } in saves {
            for tier in self.below().all() {
                let state = Arc::downgrade(self.state());
                let done = Box::new(move |saved: Result<bool>| {
                    if let Some(state) = state.upgrade() {
                        Locked::new(&state).saved(handle, saved.unwrap_or(true));
                    }
                });
                let place = (slot.offset, slot.length);
                if !tier.save(saved.clone(), self.memory(), place, slot.checksum, done) {
                    refused.push(handle);
                }
            }
        }
        refused.into_iter().rev().for_each(|handle| committed.saved(handle, true));
    }

    /// Begins to load what a lookup reserved room for.
    pub(crate) fn load(&self, loads: Vec<Load>) {
        for load in loads {
            let then = self.remote().filter(|_| load.from == Level::Disk);
            begin(load, self.below().at(load.from), then, self.state(), self.memory());
        }
    }

    /// Asks the remote what a lookup waits to know, for `time` at most.
    pub(crate) fn ask(&self, ask: Ask, time: std::time::Duration) {
        let Ask { request_id, number, objects } = ask;
        let Some(remote) = self.below().remote else { return };
        let (store, request) = (self.downgrade(), request_id.clone());
        let done = Box::new(move |there| {
            if let Some(store) = store.upgrade() {
                store.found(&request, number, there);
            }
        });
        if !remote.find(objects, Instant::now() + time, done) {
            self.found(&request_id, number, 0);
        }
    }

    fn found(&self, request_id: &str, number: u64, there: usize) {
        let mut state = self.lock();
        let loads = state.found(self.below(), request_id, number, there);
        drop(state);
        self.load(loads);
    }

    /// Waits until all that was committed so far outlives a power loss, as far as the disk took it, and is in the
    /// remote, as far as that took it. Returns at once without either.
    ///
    /// # Errors
    /// [`kvferry_core::ErrorCode::Timeout`] at `deadline`; why a tier failed.
    pub fn flush(&self, deadline: Instant) -> Result<()> {
        self.below().all().map(|tier| tier.flush(deadline)).fold(Ok(()), Result::and)
    }

    /// Ends disk and remote, after all that was committed so far is in them or `deadline` has come. The store goes on in
    /// memory.
    ///
    /// # Errors
    /// [`kvferry_core::ErrorCode::Timeout`]: something was not written; why a tier failed.
    pub fn close_tiers(&self, deadline: Instant) -> Result<()> {
        let flushed = self.flush(deadline);
        self.below().all().map(|tier| tier.close(deadline)).fold(Ok(()), Result::and)?;
        flushed
    }

    /// What the remote did and could not do; `None` without one.
    pub fn remote_status(&self) -> Option<RemoteStatus> {
        self.below().remote.map(Remote::status)
    }

    /// The hit of the request's latest lookup, once all has come from below; 0 for a request that is not known. It
    /// waits for as long as the tiers do: at the lookup's deadline [`Store::take_hit`] has what has come.
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

    /// What the disk has, did and could not do; `None` without one.
    pub fn disk_status(&self) -> Option<DiskStatus> {
        self.below().disk.map(Disk::status)
    }
}

/// Begins a load from a tier. One that comes to nothing goes on from the remote `then`, if there is one.
fn begin(
    load: Load,
    tier: Option<&dyn Tier>,
    then: Option<&Arc<Remote>>,
    state: &Arc<Mutex<State>>,
    memory: Arc<dyn Memory>,
) {
    let ended = {
        // Not of the store: a tier must not end on a thread of its own.
        let (state, remote) = (Arc::downgrade(state), then.map(Arc::downgrade));
        let memory = Arc::clone(&memory);
        move |loaded: Option<&Loaded>| {
            let Some(state) = state.upgrade() else { return };
            let remote = remote.and_then(|remote| remote.upgrade());
            let answers = remote.as_deref().is_some_and(Remote::answers);
            let rest = Locked::new(&state).loaded(load, loaded, answers);
            if let (Some(load), Some(remote)) = (rest, remote) {
                begin(load, Some(&*remote), None, &state, memory);
            }
        }
    };
    let done = ended.clone();
    let done = Box::new(move |loaded: Result<Option<Loaded>>| done(loaded.ok().flatten().as_ref()));
    if !tier.is_some_and(|tier| tier.load(&load.id, memory, load.place, done)) {
        ended(None);
    }
}

#[cfg(test)]
mod tests;

impl Promotion {
    /// There is nothing left to wait for.
    fn is_over(&self) -> bool {
        self.loading.is_empty() && self.question.is_none()
    }

    pub(crate) fn is_late(&self, now: Instant) -> bool {
        self.until <= now
    }
}
