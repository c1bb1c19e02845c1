//! The store: what peers may do with the pool, and what becomes of it when they stop half-way.
//!
//! Every call takes the time, so that a simulated clock can drive it. One lock guards the whole state;
//! it is held for bookkeeping only, never while hashing, copying or reserving memory.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use kvferry_copy::PrivateRegion;
use kvferry_core::cache::{Memory, Slot, check_checksums};
use kvferry_core::defect::{Defect, is_active};
use kvferry_core::hash::{ChunkAlgorithm, ChunkHasher};
use kvferry_core::key::{Key, Layout, WORLD_SIZE_MAX, check_model_name, check_salt};
use kvferry_core::{Error, ErrorCode, Result};

use crate::ages::Ages;
use crate::clock::now;
use crate::disk::{Disk, DiskOptions};
use crate::events::Origin;
use crate::eviction::Policy;
use crate::index::{Demand, Handle, ObjectId};
use crate::pool::{PAGE, Pool, Region};
use crate::prompt::Prompt;
use crate::remote::{Remote, RemoteOptions};
use crate::state::{
    Belongings, Instance, Locked, Range, Registered, Reservation, Retrieval, State,
};
use crate::tenants::{PROBES, Quotas, TenantStatus, tenant_of};
use crate::tiers::{Below, Wanted};

/// Readers of one object that a lookup may announce at most.
const READERS_MAX: u32 = 255;
/// Leases of one object that one request may hold at most.
const LEASES_MAX: u32 = 4_096;
/// Slots of one answer at most: a reply of the wire (8 MiB) holds them.
const SLOTS_MAX: usize = 65_536;
/// Objects of one lookup, over all ranks, of which the policy is told, and of what memory lacks those that are looked for
/// below it, at most; leading chunks come first. A message names up to 255 ranks of each of its chunks.
const USES_MAX: usize = 1 << 18;
/// For how long, from its grant on, a slot that was granted for reading is not used anew, unless its reader commits
/// before: whoever has copied within this time needs not ask whether it was in time.
pub const READ_HOLD: Duration = Duration::from_secs(1);
/// From so many retrievals of readers that are gone on, no more are granted.
const HELD_MAX: usize = 64 << 10;
/// Instances of one peer at most: others find room beside it.
const PEER_INSTANCES_MAX: usize = 256;
/// Retrievals of one instance that are not committed, at most.
const RETRIEVALS_MAX: usize = 4_096;
/// Begins the name of every segment of ours.
#[cfg(target_os = "linux")]
const PREFIX: &str = "kvferry_";
/// After shared memory ran out, growing is not tried again for this long.
const GROWTH_RETRY: Duration = Duration::from_secs(5);

/// How a store is set up.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Tokens of one chunk, 1..=65536. Default 256.
    pub chunk_size: u32,
    /// Bytes of the pool, 4096 or more.
    pub memory: u64,
    /// The shared-memory segment's name, 1 to 200 bytes without `/` and NUL; `None` keeps the pool in
    /// this process's own memory. `kvferry_` is put before it where it is missing, so that no other
    /// program's segment is ever taken for a stale one of ours.
    pub shared_name: Option<String>,
    /// What goes when room is needed. Default: ours.
    pub policy: Policy,
    /// Where chunks stay when memory has no room for them, and over restarts. Default: nowhere.
    pub disk: Option<DiskOptions>,
    /// Where chunks stay that several stores share. Default: nowhere.
    pub remote: Option<RemoteOptions>,
    /// Deadlines and bounds.
    pub limits: Limits,
}

/// Deadlines and bounds of a store.
#[derive(Debug, Clone)]
pub struct Limits {
    /// A session that is not used for this long ends, and its leases with it. Default 300 s.
    pub session_idle: Duration,
    /// A reservation that is not committed for this long is set apart: its chunks can be stored by
    /// others, its slots stay the writer's. Default 600 s.
    pub reservation: Duration,
    /// Sessions at most; the one unused longest goes first. Default 65,536.
    pub sessions: usize,
    /// Bytes of tokens, hashes and request ids that sessions may hold together. Default 256 MiB.
    pub session_bytes: u64,
    /// How long a lookup waits for chunks from the disk and the remote; what has not come by then makes a shorter hit. Default 2 s.
    pub promotion: Duration,
    /// Registered instances at most. Of those whose peer is gone and that hold nothing, the oldest makes
    /// room for one more; without any it is refused. Default 4,096.
    pub instances: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            session_idle: Duration::from_secs(300),
            reservation: Duration::from_secs(600),
            promotion: Duration::from_secs(2),
            sessions: 65_536,
            session_bytes: 256 << 20,
            instances: 4_096,
        }
    }
}

/// A peer of the store: a connection, or the engine that embeds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(pub(crate) u64);

/// Why a peer is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// Its own kernel ended the connection: it does not touch the pool any more.
    Ended,
    /// The same, and its instances with it: where it comes back, it registers them anew, as LMCache's do not.
    Left,
    /// We gave it up (deadline, malformed input): it may still write to slots that it was told of.
    GivenUp,
}

/// What a store reserved.
#[derive(Debug)]
pub struct Reserved {
    /// Slots to fill, one for each chunk to write.
    pub slots: Vec<Slot>,
    /// Each slot's chunk, counted from the range's start, ascending.
    pub chunk_indices: Vec<u32>,
    /// Chunks at the range's end for which there was no room.
    pub refused: u32,
    /// Whether memory was being reserved for them: they were a moment early.
    pub growing: bool,
    /// The object of each slot, for [`Store::write`].
    pub objects: Vec<ReservedObject>,
}

/// An object that is being written, in this use of its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReservedObject(Handle);

/// The shape that an instance registered, for replies.
#[derive(Debug)]
pub struct Shape {
    /// Outermost first.
    pub dimensions: Vec<u64>,
    /// torch's name of the element type.
    pub dtype: String,
}

/// The chunk store. Cloning gives another handle to the same store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    region: Region,
    hasher: ChunkHasher,
    chunk_size: u32,
    boot_token: [u8; 16],
    growing: AtomicBool,
    state: Arc<Mutex<State>>,
    disk: Option<Disk>,
    remote: Option<Arc<Remote>>,
}

/// A store that goes when nobody else has it.
pub(crate) struct WeakStore(Weak<Inner>);

impl WeakStore {
    pub(crate) fn upgrade(&self) -> Option<Store> {
        self.0.upgrade().map(|inner| Store { inner })
    }
}

impl Store {
    /// Creates the pool. Errors: a live server has the name, shared memory is too small for it, or a
    /// value is out of range.
    pub fn new(options: StoreOptions) -> Result<Self> {
        Self::on(options, Disk::open, Remote::open)
    }

    pub(crate) fn on(
        options: StoreOptions,
        open: impl FnOnce(&DiskOptions) -> Result<Disk>,
        reach: impl FnOnce(RemoteOptions, u64) -> Result<Remote>,
    ) -> Result<Self> {
        let StoreOptions { chunk_size, memory, shared_name, policy, disk, remote, limits } =
            options;
        let hasher = ChunkHasher::new(ChunkAlgorithm::Blake3, chunk_size)?;
        let mut boot_token = [0; 16];
        getrandom::fill(&mut boot_token).map_err(|error| {
            Error::new(ErrorCode::System, format!("no random numbers: {error}"))
        })?;
        let mut pool = Pool::new(memory)?;
        // What waits to be saved stays in memory, and must not take all of it: a prompt of half the memory is saved whole.
        let disk = disk.map(|options| {
            let queue_bytes = (memory / 2).max(PAGE);
            open(&DiskOptions { queue_bytes, ..options })
        });
        let disk = disk.transpose()?;
        // Beside a disk the remote, which may be slow for long, takes a quarter of it.
        let queue_bytes = memory / if disk.is_some() { 4 } else { 2 };
        let reach = |options| reach(options, queue_bytes.max(PAGE)).map(Arc::new);
        let remote = remote.map(reach).transpose()?;
        let region = match shared_name {
            Some(name) => shared(name, memory)?,
            None => Region::Private(Arc::new(PrivateRegion::new(memory)?)),
        };
        let private = matches!(region, Region::Private(_));
        while let Some(step) = pool.next_step() {
            region.reserve(step)?;
            pool.grow();
            if !private {
                break; // the others follow as they are needed
            }
        }
        let growing = AtomicBool::new(false);
        let mut state = State::new(pool, limits, policy);
        if let Some(disk) = &disk {
            // After a restart all of it is asked for at once.
            state.headroom = state.headroom.max(disk.status().bytes.min(memory));
        }
        let state = Arc::new(Mutex::new(state));
        let inner = Inner { region, hasher, chunk_size, boot_token, growing, state, disk, remote };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Tokens of one chunk.
    pub fn chunk_size(&self) -> u32 {
        self.inner.chunk_size
    }

    /// Random at each start: tells this store from those before it under the same name.
    pub fn boot_token(&self) -> [u8; 16] {
        self.inner.boot_token
    }

    /// The segment's name, and the pool's bytes; the name is empty when it is not shared.
    pub fn pool(&self) -> (String, u64) {
        let bytes = self.lock().pool.bytes();
        match &self.inner.region {
            #[cfg(target_os = "linux")]
            Region::Shared { name, .. } => (name.clone(), bytes),
            Region::Private(_) => (String::new(), bytes),
        }
    }

    /// The pool's bytes, for an engine in this process.
    pub fn memory(&self) -> Arc<dyn Memory> {
        self.inner.region.memory()
    }

    /// Which file of which kernel the pool is; `None` when it is not shared.
    pub fn segment(&self) -> Option<String> {
        match &self.inner.region {
            #[cfg(target_os = "linux")]
            Region::Shared { region, .. } => region.identity().ok(),
            Region::Private(_) => None,
        }
    }

    /// Writes a piece of an object that is reserved and not committed, for a peer that cannot reach the pool. `false`, and
    /// nothing is written, when it is neither any more, or the piece does not lie in it.
    ///
    /// Whoever may commit it, or unregister its instance, is not to do so at the same time.
    pub fn write(&self, object: ReservedObject, at: u64, bytes: &[u8]) -> bool {
        let slot = self.lock().index.reserved_slot(object.0);
        let end = at.checked_add(bytes.len() as u64);
        let inside = |slot: &Slot| end.is_some_and(|end| end <= slot.length);
        let Some(slot) = slot.filter(inside) else { return false };
        self.inner.region.memory().write(slot.offset + at, bytes).is_ok()
    }

    /// Reads from byte `at` of the slot at `offset`. `false` when it was used anew before the end: what was read must be
    /// thrown away.
    pub fn read(&self, offset: u64, generation: u64, at: u64, into: &mut [u8]) -> bool {
        let held = || self.lock().index.holds(offset, generation);
        let place = offset.checked_add(at).filter(|_| held());
        let read = |place| self.inner.region.memory().read(place, into).is_ok();
        place.is_some_and(read) && held()
    }

    /// A new peer.
    pub fn connect(&self) -> Owner {
        let mut state = self.lock();
        let owner = Owner(state.next());
        state.owners.insert(owner, Belongings::default());
        owner
    }

    /// The peer is gone: its leases are released. Slots that it was told of come back, unless it may
    /// still write to them ([`Departure::GivenUp`]).
    pub fn disconnect(&self, owner: Owner, departure: Departure) {
        self.depart(owner, departure);
    }

    /// The same as [`Store::disconnect`] of a peer that we gave up; the instances of which it may still touch slots.
    pub fn give_up(&self, owner: Owner) -> Vec<u64> {
        let left = self.depart(owner, Departure::GivenUp);
        left.into_iter().filter(|instance| self.is_apart(owner, *instance)).collect()
    }

    /// Whether slots of the instance are set apart because of this peer.
    pub fn is_apart(&self, owner: Owner, instance: u64) -> bool {
        self.lock().is_apart(owner, instance)
    }

    /// A peer that was given up does not touch these instances' slots any more: they come back.
    pub fn take_back(&self, owner: Owner, instance: u64) {
        self.lock().leave(instance, owner, Departure::Ended);
    }

    /// Says which instances it had.
    fn depart(&self, owner: Owner, departure: Departure) -> HashSet<u64> {
        let Some(belongings) = self.lock().owners.remove(&owner) else { return HashSet::new() };
        // Others have their turn in between: it may be a lot.
        for request in belongings.sessions.values() {
            self.lock().end_session_of(owner, request);
        }
        for id in &belongings.instances {
            let mut state = self.lock();
            state.leave(*id, owner, departure);
            if departure == Departure::Left && state.is_deserted(*id) {
                state.unregister(*id);
            }
        }
        belongings.instances
    }

    /// The peer may write to what this instance of its was granted for ever: that stays apart, and the peer's departure,
    /// however it goes, gives nothing of it back.
    pub fn give_up_instance(&self, owner: Owner, instance: u64) {
        self.lock().give_up(instance, owner);
    }

    /// Registers `instance` with its layout. The same registration again changes nothing; another
    /// layout for the same instance is an error.
    pub fn register(&self, owner: Owner, instance: u64, layout: Layout) -> Result<()> {
        let object_bytes = layout.object_bytes(self.inner.chunk_size)?;
        let mut state = self.lock();
        if let Some(known) = state.instances.get(&instance) {
            if known.registered.layout != layout {
                return Err(Error::invalid(format!(
                    "instance {instance} is registered with another layout; unregister it first"
                )));
            }
        } else if state.belongings(owner).instances.len() >= PEER_INSTANCES_MAX {
            return Err(Error::invalid(format!(
                "a connection has {PEER_INSTANCES_MAX} instances, the most that are allowed; unregister one"
            )));
        } else if state.instances.len() >= state.limits.instances && !state.forget_deserted() {
            return Err(Error::invalid(format!(
                "{} instances are registered and in use, the most that are allowed; unregister one",
                state.limits.instances
            )));
        }
        let age = state.next();
        if let Some(known) = state.instances.get_mut(&instance) {
            known.used = age; // of its own peer's it is the latest; others mean what they meant
        } else {
            let place = (layout.model_name.clone(), layout.world_size);
            let layout_is_whole = layout.world_size == 1;
            let known = state.layouts.get(&place).filter(|it| it.layout == layout);
            let registered =
                known.map_or_else(|| Arc::new(Registered { layout, object_bytes }), Arc::clone);
            if layout_is_whole {
                state.rank_layouts.remove(&place); // there is but one rank that it can be of
            }
            state.layouts.insert(place, Arc::clone(&registered));
            state.headroom = state.headroom.max(16 * object_bytes);
            state.instances.insert(instance, Instance::new(registered, age));
        }
        state.own_instance(owner, instance);
        if let Some(known) = state.instances.get_mut(&instance) {
            known.registrants.insert(owner);
        }
        self.grow_if_needed(&mut state, Instant::now());
        Ok(())
    }

    /// Reserves all of the memory, in the background. A GPU copies from and to pages that are mapped and locked only: both takes
    /// far longer than its copies, and can be done ahead of them where pages are reserved.
    pub(crate) fn reserve_whole(&self) {
        let mut state = self.lock();
        state.whole = true;
        self.grow_if_needed(&mut state, Instant::now());
    }

    /// Whether there is less room than `bytes`, and more on its way: what is stored now would be refused.
    pub fn lacks_room(&self, bytes: u64) -> bool {
        self.inner.growing.load(Ordering::Acquire) && self.lock().pool.free() < bytes
    }

    /// Whether the peer registered the instance; or nobody who is there did, as when an LMCache worker's connection was made
    /// anew. An instance that is not registered is everybody's.
    pub fn may_unregister(&self, owner: Owner, instance: u64, only_its_own: bool) -> bool {
        let state = self.lock();
        state.instances.get(&instance).is_none_or(|known| {
            let registrants = &known.registrants;
            registrants.contains(&owner) || (registrants.is_empty() && !only_its_own)
        })
    }

    /// Forgets the instance and takes back every slot that it was told of. Its objects stay.
    pub fn unregister(&self, instance: u64) {
        self.lock().unregister(instance);
    }

    /// The shape of an instance's objects.
    pub fn shape(&self, instance: u64) -> Option<Shape> {
        let state = self.lock();
        let layout = &state.instances.get(&instance)?.registered.layout;
        Some(Shape {
            dimensions: layout.shape(self.inner.chunk_size),
            dtype: layout.dtype.name().to_owned(),
        })
    }

    /// Leases the leading chunks of the range that all ranks have, once for each reader. How many they are,
    /// [`Store::take_hit`] says; this, how many of them memory has.
    pub fn lookup(&self, owner: Owner, key: &Key, tp_size: u32, now: Instant) -> Result<u64> {
        self.lookup_until(owner, key, tp_size, now, None)
    }

    /// The same; what has not come from below by `until` makes a shorter hit.
    pub(crate) fn lookup_until(
        &self,
        owner: Owner,
        key: &Key,
        tp_size: u32,
        now: Instant,
        until: Option<Instant>,
    ) -> Result<u64> {
        let chunks = self.chunks(key)?;
        let readers = readers(key, tp_size)?;
        let prompt = self.prompt(key);
        let mut state = self.lock();
        state.expire(now);
        let mut hit: Vec<Handle> = Vec::new();
        let layouts = state.layouts(key, Some(owner));
        let spaces: Option<Vec<[u8; 32]>> =
            layouts.as_ref().map(|layouts| layouts.iter().map(|(_, space)| *space).collect());
        let asked = state.sessions.get(&key.request_id);
        // A request that asks again has not used anything again.
        if let Some(spaces) = &spaces
            && !asked.is_some_and(|session| Arc::ptr_eq(&session.prompt, &prompt))
        {
            let used = chunks.clone().take(USES_MAX / spaces.len().max(1));
            let ids = used.flat_map(|chunk| ids_of(&prompt, chunk, spaces));
            state.index.request(ids, spaces.len(), now);
        }
        if let Some(spaces) = spaces {
            for chunk in chunks.clone() {
                let found: Vec<Handle> = ids_of(&prompt, chunk, &spaces)
                    .map_while(|id| state.index.get_visible(&id))
                    .collect();
                let enough = if is_active(Defect::AnyRankHits) { 1 } else { key.world_size };
                if found.len() < enough as usize {
                    break;
                }
                if let Some(parents) = hit.len().checked_sub(found.len()) {
                    for (parent, child) in hit[parents..].iter().zip(&found) {
                        state.index.adopt(*parent, *child);
                    }
                }
                hit.extend(found);
            }
        }
        let mut hit_chunks = hit.len() as u64 / u64::from(key.world_size);
        if is_active(Defect::AnyRankHits) {
            hit_chunks = (hit.len() as u64).div_ceil(u64::from(key.world_size));
        }
        let held = state.sessions.get(&key.request_id).map(|session| &session.leases);
        let most = held.and_then(|leases| hit.iter().filter_map(|handle| leases.get(handle)).max());
        if most.is_some_and(|most| most + readers > LEASES_MAX) {
            return Err(Error::invalid(format!(
                "request {:?} holds {LEASES_MAX} leases of one object; end its session",
                key.request_id
            )));
        }
        let session = state.session(owner, &key.request_id, Arc::clone(&prompt), now);
        session.hit = Some(hit_chunks);
        if is_active(Defect::LeaseNotTaken) {
            hit.clear();
        }
        for handle in &hit {
            *session.leases.entry(*handle).or_default() += readers;
        }
        for handle in hit.iter().rev() {
            state.index.pin_often(*handle, readers);
        }
        state.counters.lookups += 1;
        state.counters.lookup_chunks += chunks.len() as u64;
        state.counters.hit_chunks += hit_chunks;
        let below = self.below();
        let Some(spaces) = layouts.filter(|_| !below.is_empty()) else { return Ok(hit_chunks) };
        let first = chunks.start + usize::try_from(hit_chunks).unwrap_or(usize::MAX);
        if let Some(disk) = below.disk {
            for chunk in chunks.start..first {
                for (rank, (_, space)) in (0u32..).zip(&spaces) {
                    disk.touch(&prompt.hashes[chunk], space, rank, now); // it goes with what memory has
                }
            }
        }
        let latest = now + state.limits.promotion;
        let most = first.saturating_add(USES_MAX / spaces.len().max(1));
        let wanted = Wanted {
            key,
            prompt: &prompt,
            chunks: first..chunks.end.min(most),
            spaces,
            readers,
            hit: hit_chunks,
            until: until.map_or(latest, |until| until.min(latest)),
        };
        let time = wanted.until.saturating_duration_since(now);
        let (loads, ask) = state.promote(below, wanted);
        self.grow_if_needed(&mut state, now);
        drop(state);
        self.load(loads);
        if let Some(ask) = ask {
            self.ask(ask, time);
        }
        Ok(hit_chunks)
    }

    /// How long a lookup waits for chunks from below at most.
    pub fn promotion(&self) -> Duration {
        self.lock().limits.promotion
    }

    /// The hit of the request's latest lookup, once; 0 for a request that is not known. `None` as long as chunks
    /// are on their way from below, up to [`Limits::promotion`] after the lookup.
    pub fn take_hit(&self, request_id: &str, now: Instant) -> Option<u64> {
        let mut state = self.lock();
        state.touch(request_id, now);
        let session = state.sessions.get(request_id);
        if let Some(promotion) = session.and_then(|session| session.promotion.as_ref()) {
            if !promotion.is_late(now) {
                return None;
            }
            state.settle(request_id);
        }
        let session = state.sessions.get_mut(request_id);
        Some(session.and_then(|session| session.hit.take()).unwrap_or(0))
    }

    /// Gives back the leases of the range's chunks, one for each reader.
    pub fn release(&self, key: &Key, tp_size: u32, now: Instant) -> Result<()> {
        let chunks = self.chunks(key)?;
        let readers = readers(key, tp_size)?;
        let prompt = self.prompt(key);
        let mut state = self.lock();
        state.touch(&key.request_id, now);
        let asked = state.sessions.get(&key.request_id).map(|session| session.owner);
        let Some(spaces) = state.spaces(key, asked) else { return Ok(()) };
        let mut released = Vec::new();
        for chunk in chunks {
            let ids = ids_of(&prompt, chunk, &spaces);
            let held: Vec<Handle> = ids.map_while(|id| state.index.get(&id)).collect();
            if held.is_empty() {
                break; // what is leased is a prefix, and is there
            }
            for handle in held {
                released.push((handle, state.take_leases(&key.request_id, handle, readers)));
            }
        }
        for (handle, count) in released.into_iter().rev() {
            state.index.unpin_often(handle, count);
        }
        Ok(())
    }

    /// Ends the session: leases that no worker was handed are released.
    pub fn end_session(&self, request_id: &str) {
        self.lock().end_session(request_id);
    }

    /// Reserves slots for the range's chunks that are neither stored nor being written; leading chunks
    /// first, as many as there is room for, and 65,536 at most. Others make room as the policy says. None as long as the
    /// instance has an earlier store of the range that was neither committed nor abandoned.
    pub fn prepare_store(
        &self,
        owner: Owner,
        key: &Key,
        instance: u64,
        now: Instant,
    ) -> Result<Reserved> {
        let chunks = self.chunks(key)?;
        let prompt = self.prompt(key);
        let mut state = self.lock();
        state.expire(now);
        let (registered, range) = state.range(key, instance, &prompt, &chunks)?;
        state.own_instance(owner, instance);
        let mut reserved = Reserved {
            slots: Vec::new(),
            chunk_indices: Vec::new(),
            refused: 0,
            growing: false,
            objects: Vec::new(),
        };
        let Some(range) = range else { return Ok(reserved) };
        state.meet_rank(key, owner, instance, range.rank);
        state.place_rank(key, range.rank, &registered);
        // A commit names no more than the range, and could be meant for either.
        if state.is_reserved(instance, &range) {
            return Ok(reserved);
        }
        let id = |chunk: usize| ObjectId {
            chunk: prompt.hashes[chunk],
            space: range.space,
            rank: range.rank,
        };
        // Who stores without having asked has used it, too.
        let new: Vec<ObjectId> =
            chunks.clone().map(id).filter(|id| !state.index.knows(id)).collect();
        if !new.is_empty() {
            state.index.request(new, 1, now);
        }
        // What is there already must not make room for what follows it.
        let mut kept = Vec::new();
        let mut parent = chunks.start.checked_sub(1).and_then(|chunk| state.index.get(&id(chunk)));
        if let Some(parent) = parent {
            state.index.pin(parent);
            kept.push(parent);
        }
        let mut objects = Vec::new();
        let mut space = None;
        for (position, chunk) in (0u32..).zip(chunks.clone()) {
            if let Some(known) = state.index.get(&id(chunk)) {
                if let Some(parent) = parent {
                    state.index.adopt(parent, known);
                }
                state.index.pin(known);
                kept.push(known);
                parent = Some(known);
                continue;
            }
            let room = objects.len() < SLOTS_MAX;
            let whose = tenant_of(&key.model_name, &key.cache_salt);
            let grant = room.then(|| state.allocate(registered.object_bytes, whose));
            let grant = grant.flatten();
            let Some(grant) = grant else {
                let rest = chunks.clone().skip(position as usize);
                let missing = rest.filter(|chunk| state.index.get(&id(*chunk)).is_none()).count();
                reserved.refused = u32::try_from(missing).unwrap_or(u32::MAX);
                if room && state.is_growing() {
                    reserved.growing = true;
                    // What comes next is likely to be as much.
                    let bytes = registered.object_bytes.saturating_mul(missing as u64);
                    state.headroom = state.headroom.max(bytes.min(state.pool.bytes()));
                }
                break;
            };
            reserved.slots.push(grant.slot());
            reserved.chunk_indices.push(position);
            let space = space
                .get_or_insert_with(|| state.spaces.get(range.space, &registered, &key.cache_salt));
            let before = chunk.checked_sub(1).map(|before| prompt.hashes[before]);
            let origin = Origin { space: Arc::clone(space), parent: before };
            let handle = state.index.reserve(id(chunk), origin, grant, parent);
            objects.push(handle);
            reserved.objects.push(ReservedObject(handle));
            parent = Some(handle);
        }
        state.unpin(&kept);
        let counters = &mut state.counters;
        *(if reserved.growing {
            &mut counters.refused_growing_chunks
        } else {
            &mut counters.refused_chunks
        }) += u64::from(reserved.refused);
        if !objects.is_empty() {
            let age = (now + state.limits.reservation, state.next());
            state.reservations_by_age.insert(age, (instance, range));
            let reservation = Reservation { owner, objects, age };
            if let Some(known) = state.instances.get_mut(&instance) {
                known.stores.entry(range).or_default().push_back(reservation);
            }
        }
        self.grow_if_needed(&mut state, now);
        Ok(reserved)
    }

    /// Makes what was reserved for the range visible. `false`: nothing was reserved, or it was set
    /// apart meanwhile. `checksums` are those of the slots, in their order, or none; readers get them
    /// with the slots.
    pub fn commit_store(&self, key: &Key, instance: u64, checksums: &[u64]) -> Result<bool> {
        let (chunks, prompt) = (self.chunks(key)?, self.prompt(key));
        let mut state = self.lock();
        let (_, range) = state.range(key, instance, &prompt, &chunks)?;
        let Some(range) = range else { return Ok(false) };
        match state.reserved(instance, &range) {
            0 => return Ok(false),
            slots => check_checksums(checksums, slots)?,
        }
        let Some(reservation) = state.take_reservation(instance, range) else { return Ok(false) };
        for (handle, checksum) in reservation.objects.iter().zip(checksums) {
            state.index.keep_checksum(*handle, *checksum);
        }
        let saves = match self.below().all().count() {
            0 => Vec::new(),
            tiers => state.saves(&reservation.objects, tiers),
        };
        state.index.commit(&reservation.objects, prompt.tokens_of(chunks));
        let grants = reservation.objects.iter().filter_map(|handle| state.index.grant(*handle));
        let bytes = grants.map(|grant| grant.slot().length).sum::<u64>();
        state.counters.stored_chunks += reservation.objects.len() as u64;
        state.counters.stored_bytes += bytes;
        self.save(&mut state, saves);
        Ok(true)
    }

    /// Keeps checksums of the bytes in slots (offset, generation) that the instance has reserved and not
    /// committed; says how many it were. Other slots are left alone.
    pub fn keep_checksums(
        &self,
        instance: u64,
        checksums: impl IntoIterator<Item = ((u64, u64), u64)>,
    ) -> u64 {
        let mut checksums: HashMap<(u64, u64), u64> = checksums.into_iter().collect();
        let told = checksums.len();
        let mut state = self.lock();
        let State { instances, index, .. } = &mut *state;
        let Some(known) = instances.get(&instance) else { return 0 };
        for handle in known.stores.values().flatten().flat_map(|reserved| &reserved.objects) {
            if checksums.is_empty() {
                break;
            }
            let Some(grant) = index.grant(*handle) else { continue };
            if let Some(checksum) = checksums.remove(&(grant.offset(), grant.generation())) {
                index.keep_checksum(*handle, checksum);
            }
        }
        (told - checksums.len()) as u64
    }

    /// Gives what was reserved for the range back; nothing of it becomes visible.
    pub fn abandon_store(&self, key: &Key, instance: u64) -> Result<()> {
        let Some((mut state, range)) = self.reserved_range(key, instance)? else { return Ok(()) };
        if let Some(reservation) = state.take_reservation(instance, range) {
            state.abandon(&reservation.objects);
        }
        Ok(())
    }

    /// The slots of the range's chunks for the key's rank, if each is there and leased by the key's
    /// request; otherwise `None`, and nothing changes. At most 65,536 at once, and 4,096 retrievals of an
    /// instance that are not committed.
    pub fn prepare_retrieve(
        &self,
        owner: Owner,
        key: &Key,
        instance: u64,
        now: Instant,
    ) -> Result<Option<Vec<Slot>>> {
        let chunks = self.chunks(key)?;
        let prompt = self.prompt(key);
        let mut state = self.lock();
        state.touch(&key.request_id, now);
        let (registered, range) = state.range(key, instance, &prompt, &chunks)?;
        let Some(range) = range else { return Ok(Some(Vec::new())) };
        state.meet_rank(key, owner, instance, range.rank);
        if state.held.len() >= HELD_MAX {
            return Err(Error::new(
                ErrorCode::Timeout,
                format!("{HELD_MAX} readers that are gone may still read for a moment; try again"),
            ));
        }
        if chunks.len() > SLOTS_MAX || state.retrievals(instance) >= RETRIEVALS_MAX {
            return Err(Error::invalid(format!(
                "instance {instance} retrieves more than {SLOTS_MAX} chunks at once, or commits none of {RETRIEVALS_MAX} retrievals"
            )));
        }
        let objects: Vec<Handle> = chunks
            .clone()
            .map_while(|chunk| {
                let id =
                    ObjectId { chunk: prompt.hashes[chunk], space: range.space, rank: range.rank };
                let handle = state.index.get_visible(&id)?;
                let session = state.sessions.get(&key.request_id)?;
                session.leases.contains_key(&handle).then_some(handle)
            })
            .collect();
        if objects.len() < chunks.len() {
            state.counters.failed_retrievals += 1;
            return Ok(None);
        }
        state.place_rank(key, range.rank, &registered);
        let slots =
            objects.iter().filter_map(|handle| Some(state.index.grant(*handle)?.slot())).collect();
        for handle in &objects {
            state.take_leases(&key.request_id, *handle, 1); // its pin is the retrieval's now
        }
        state.own_instance(owner, instance);
        state.counters.retrieved_chunks += objects.len() as u64;
        state.counters.retrieved_bytes += registered.object_bytes * objects.len() as u64;
        if let Some(known) = state.instances.get_mut(&instance) {
            let held_until = now + READ_HOLD;
            let retrieval = Retrieval { owner, objects, apart: false, held_until };
            known.retrievals.entry(range).or_default().push_back(retrieval);
        }
        Ok(Some(slots))
    }

    /// Whether memory has each of the range's chunks for the key's rank.
    ///
    /// # Errors
    /// As [`Store::prepare_retrieve`].
    pub(crate) fn has(&self, key: &Key, instance: u64) -> Result<bool> {
        let chunks = self.chunks(key)?;
        let prompt = self.prompt(key);
        let state = self.lock();
        let Some(range) = state.range(key, instance, &prompt, &chunks)?.1 else { return Ok(true) };
        let id = |chunk: usize| ObjectId {
            chunk: prompt.hashes[chunk],
            space: range.space,
            rank: range.rank,
        };
        Ok(chunks.map(id).all(|id| state.index.get_visible(&id).is_some()))
    }

    /// Ends the owner's oldest retrieval of the range, or one of a reader that was given up and says that it is done; `false`
    /// when there was none.
    pub fn commit_retrieve(&self, owner: Owner, key: &Key, instance: u64) -> Result<bool> {
        let Some((mut state, range)) = self.reserved_range(key, instance)? else {
            return Ok(false);
        };
        let Some(known) = state.instances.get_mut(&instance) else { return Ok(false) };
        let Some(retrievals) = known.retrievals.get_mut(&range) else { return Ok(false) };
        // Another owner's is not this one's to end: it may still be reading.
        let own = retrievals.iter().position(|retrieval| retrieval.owner == owner);
        let oldest = own.or_else(|| retrievals.iter().position(|retrieval| retrieval.apart));
        let ended = oldest.and_then(|oldest| retrievals.remove(oldest));
        if retrievals.is_empty() {
            known.retrievals.remove(&range);
        }
        if let Some(retrieval) = &ended {
            state.unpin(&retrieval.objects);
        }
        Ok(ended.is_some())
    }

    /// Whether every slot is still in the use that its generation counts.
    pub fn holds(&self, slots: impl IntoIterator<Item = (u64, u64)>) -> bool {
        let state = self.lock();
        slots.into_iter().all(|(offset, generation)| state.index.holds(offset, generation))
    }

    /// The same for a reader, of what the instance retrieves just now and has not committed.
    pub fn discard_read(&self, instance: u64, generations: impl IntoIterator<Item = u64>) -> u64 {
        let told: HashSet<u64> = generations.into_iter().take(SLOTS_MAX).collect();
        let read: Vec<u64> = {
            let state = self.lock();
            let known = state.instances.get(&instance);
            let retrievals = known.into_iter().flat_map(|known| known.retrievals.values());
            let objects = retrievals.flatten().flat_map(|retrieval| &retrieval.objects);
            objects.map(Handle::generation).filter(|generation| told.contains(generation)).collect()
        };
        self.discard(read)
    }

    /// Retrievals of the instance that are not committed.
    pub fn retrievals(&self, instance: u64) -> usize {
        self.lock().retrievals(instance)
    }

    /// What the range's next commit would make visible, with the offsets of its slots.
    ///
    /// # Errors
    /// As [`Store::commit_store`].
    pub fn reserved(&self, key: &Key, instance: u64) -> Result<Vec<(ReservedObject, u64)>> {
        let Some((state, range)) = self.reserved_range(key, instance)? else {
            return Ok(Vec::new());
        };
        let known = state.instances.get(&instance);
        let next = known.and_then(|known| known.stores.get(&range)?.front());
        let objects = next.map(|reservation| reservation.objects.as_slice()).unwrap_or_default();
        let with_offset = |handle: &Handle| {
            let offset = state.index.grant(*handle)?.offset();
            Some((ReservedObject(*handle), offset))
        };
        Ok(objects.iter().filter_map(with_offset).collect())
    }

    /// Drops the objects in these uses of slots whose bytes are not what was stored; says how many it were. A slot that
    /// was used anew meanwhile is left alone: no two uses have one generation.
    pub fn discard(&self, generations: impl IntoIterator<Item = u64>) -> u64 {
        let mut state = self.lock();
        let generations = generations.into_iter().collect();
        let discarded = state.index.discard(&generations);
        state.counters.damaged_chunks += discarded.len() as u64;
        // Under the lock: nobody may load it once more in between.
        self.below().all().for_each(|tier| tier.remove(&discarded));
        discarded.len() as u64
    }

    /// Evicts everything that is neither leased, read nor reserved, and all that is on the disk and in the remote; says how many
    /// objects went from memory. What is on its way from below does not arrive.
    pub fn clear(&self) -> u64 {
        let mut state = self.lock();
        state.let_go(now());
        let cleared = state.clear();
        // Under the lock: nobody may load anything in between.
        self.below().all().for_each(|tier| tier.clear());
        cleared
    }

    /// Takes the tenant's objects out that are neither leased, reserved nor being saved; says how many it were. They go
    /// from the tiers below as well; what is there alone stays until it is evicted.
    pub fn clear_tenant(&self, cache_salt: &str) -> u64 {
        let mut state = self.lock();
        state.let_go(now());
        let mut cleared = Vec::new();
        while let Some((id, grant)) = state.index.clear_one(cache_salt) {
            state.pool.give_back(grant);
            cleared.push(id);
        }
        self.below().all().for_each(|tier| tier.remove(&cleared));
        cleared.len() as u64
    }

    /// What each tenant may have of the memory, from now on. Nothing goes at once: who has more than its cap makes room
    /// as it stores.
    ///
    /// # Errors
    /// See [`Quotas::check`]. Quotas stay as they were then.
    pub fn set_quotas(&self, quotas: Quotas) -> Result<()> {
        let mut state = self.lock();
        quotas.check(state.pool.bytes())?;
        state.index.set_quotas(quotas);
        Ok(())
    }

    /// The quotas that hold.
    pub fn quotas(&self) -> Quotas {
        self.lock().index.tenants.quotas().clone()
    }

    /// How those tenants stand that have objects or are named, by their salts.
    pub fn tenants(&self) -> Vec<TenantStatus> {
        let state = self.lock();
        let tenants = state.index.tenants.all().filter(|tenant| tenant.cache_salt != PROBES);
        let mut tenants: Vec<_> = tenants.cloned().collect();
        tenants.sort_unstable_by(|a, b| a.cache_salt.cmp(&b.cache_salt));
        tenants
    }

    /// Evicts until no more than so many objects are left, as far as they may go.
    pub(crate) fn trim(&self, objects: u64) {
        let mut state = self.lock();
        while state.index.visible() > objects && state.evict(Demand::Nobody) {}
    }

    /// For how long what made room in memory had not been looked up or stored.
    pub fn evicted_ages(&self) -> Ages {
        self.lock().index.ages
    }

    /// Figures for operators, by name.
    pub fn status(&self, now: Instant) -> Vec<(&'static str, u64)> {
        let mut state = self.lock();
        state.expire(now);
        let mut apart = (0, 0);
        let mut granted = (0, 0);
        for instance in state.instances.values() {
            for (grant, _) in instance.apart.values().flatten().flat_map(|apart| &apart.grants) {
                apart = (apart.0 + 1, apart.1 + grant.bytes());
            }
            let stores = instance.stores.values().flatten();
            granted.0 += stores.map(|store| store.objects.len() as u64).sum::<u64>();
            for retrieval in instance.retrievals.values().flatten() {
                let count = retrieval.objects.len() as u64;
                granted.1 += count;
                apart.0 += if retrieval.apart { count } else { 0 };
            }
        }
        granted.1 += state.held.values().map(|objects| objects.len() as u64).sum::<u64>();
        let leases = state.sessions.values().flat_map(|session| session.leases.values());
        let leases = leases.map(|count| u64::from(*count)).sum();
        let counters = &state.counters;
        let mut figures = vec![
            ("chunk_size", u64::from(self.inner.chunk_size)),
            ("pool_bytes", state.pool.bytes()),
            ("reserved_bytes", state.pool.reserved()),
            ("used_bytes", state.pool.reserved() - state.pool.free()),
            ("objects", state.index.visible()),
            ("instances", state.instances.len() as u64),
            ("sessions", state.sessions.len() as u64),
            ("leases", leases),
            ("slots_writing", granted.0),
            ("slots_reading", granted.1),
            ("slots_apart", apart.0),
            ("slots_apart_bytes", apart.1),
            ("lookups", counters.lookups),
            ("lookup_chunks", counters.lookup_chunks),
            ("hit_chunks", counters.hit_chunks),
            ("promoted_hit_chunks", counters.promoted_hit_chunks),
            ("stored_chunks", counters.stored_chunks),
            ("stored_bytes", counters.stored_bytes),
            ("refused_chunks", counters.refused_chunks),
            ("refused_growing_chunks", counters.refused_growing_chunks),
            ("abandoned_chunks", counters.abandoned_chunks),
            ("retrieved_chunks", counters.retrieved_chunks),
            ("retrieved_bytes", counters.retrieved_bytes),
            ("failed_retrievals", counters.failed_retrievals),
            ("damaged_chunks", counters.damaged_chunks),
            ("evicted_objects", counters.evicted_objects),
            ("evicted_bytes", counters.evicted_bytes),
            ("expired_sessions", counters.expired_sessions),
            ("promoted_chunks", counters.promoted_chunks),
            ("growth_failed", u64::from(state.growth_failed.is_some())),
        ];
        if self.below().remote.is_some() {
            figures.push(("remote_promoted_chunks", counters.remote_promoted_chunks));
            figures.push(("remote_promoted_hit_chunks", counters.remote_promoted_hit_chunks));
        }
        figures
    }

    /// The chunks of the key's range, checked.
    pub(crate) fn chunks(&self, key: &Key) -> Result<std::ops::Range<usize>> {
        check_model_name(&key.model_name)?;
        check_salt(&key.cache_salt)?;
        if key.world_size == 0 || key.world_size > WORLD_SIZE_MAX {
            return Err(Error::invalid(format!(
                "world size {} is not in 1..={WORLD_SIZE_MAX}",
                key.world_size
            )));
        }
        let (start, end, tokens) = (key.start, key.end, key.token_ids.len() as u64);
        let chunk = u64::from(self.inner.chunk_size);
        if start > end || end > tokens || start % chunk != 0 || end % chunk != 0 {
            return Err(Error::invalid(format!(
                "the range {start}..{end} of {tokens} tokens is not one of whole chunks of {chunk}"
            )));
        }
        let index = |token: u64| usize::try_from(token / chunk).unwrap_or(usize::MAX);
        Ok(index(start)..index(end))
    }

    /// The hashes of the key's tokens up to its end, those that its session knows reused.
    pub(crate) fn prompt(&self, key: &Key) -> Arc<Prompt> {
        let known =
            self.lock().sessions.get(&key.request_id).map(|session| Arc::clone(&session.prompt));
        let end = usize::try_from(key.end).unwrap_or(usize::MAX).min(key.token_ids.len());
        Prompt::new(&key.token_ids, end, known, &self.inner.hasher, self.inner.chunk_size as usize)
    }

    /// The locked state and the range that a commit's key names; `None` for an empty one.
    fn reserved_range(&self, key: &Key, instance: u64) -> Result<Option<(Locked<'_>, Range)>> {
        let chunks = self.chunks(key)?;
        let prompt = self.prompt(key);
        let state = self.lock();
        let (_, range) = state.range(key, instance, &prompt, &chunks)?;
        Ok(range.map(|range| (state, range)))
    }

    /// Reserves more of the pool on a thread of its own when little is free.
    fn grow_if_needed(&self, state: &mut State, now: Instant) {
        let retry =
            state.growth_failed.is_none_or(|at| now.saturating_duration_since(at) > GROWTH_RETRY);
        if !retry || !state.should_grow() || self.inner.growing.swap(true, Ordering::AcqRel) {
            return;
        }
        let inner = Arc::clone(&self.inner);
        let grow = move || inner.grow(now);
        if std::thread::Builder::new().name("kvferry-pool".into()).spawn(grow).is_err() {
            self.inner.growing.store(false, Ordering::Release);
            state.growth_failed = Some(now);
        }
    }

    pub(crate) fn lock(&self) -> Locked<'_> {
        self.inner.lock()
    }

    pub(crate) fn state(&self) -> &Arc<Mutex<State>> {
        &self.inner.state
    }

    pub(crate) fn disk(&self) -> Option<&Disk> {
        self.inner.disk.as_ref()
    }

    pub(crate) fn remote(&self) -> Option<&Arc<Remote>> {
        self.inner.remote.as_ref()
    }

    pub(crate) fn below(&self) -> Below<'_> {
        Below { disk: self.inner.disk.as_ref(), remote: self.inner.remote.as_deref() }
    }

    pub(crate) fn downgrade(&self) -> WeakStore {
        WeakStore(Arc::downgrade(&self.inner))
    }
}

impl Inner {
    fn lock(&self) -> Locked<'_> {
        Locked::new(&self.state)
    }

    /// Reserves steps until enough is free or nothing is left to reserve.
    fn grow(&self, now: Instant) {
        loop {
            let step = {
                let state = self.lock();
                let step = state.pool.next_step().filter(|_| state.should_grow());
                if step.is_none() {
                    // Under the lock: who wants more from now on sees that nobody is at it.
                    self.growing.store(false, Ordering::Release);
                }
                step
            };
            let Some(step) = step else { return };
            let reserved = self.region.reserve(step);
            let mut state = self.lock();
            match reserved {
                Ok(()) => {
                    state.pool.grow();
                    state.growth_failed = None;
                }
                Err(_) => {
                    state.whole = false; // it is not to be had: what is needed is tried for again
                    state.growth_failed = Some(now);
                    self.growing.store(false, Ordering::Release);
                    return;
                }
            }
        }
    }
}

/// The objects of a chunk, one for each rank.
pub(crate) fn ids_of<'a>(
    prompt: &'a Prompt,
    chunk: usize,
    spaces: &'a [[u8; 32]],
) -> impl Iterator<Item = ObjectId> + 'a {
    let of_rank = move |(rank, space): (u32, &[u8; 32])| ObjectId {
        chunk: prompt.hashes[chunk],
        space: *space,
        rank,
    };
    (0u32..).zip(spaces).map(of_rank)
}

/// Readers of each object: LMCache's `num_kv_readers`, where absent or 0 counts as `max(1, tp_size)`.
fn readers(key: &Key, tp_size: u32) -> Result<u32> {
    let readers = if key.num_kv_readers == 0 { tp_size.max(1) } else { key.num_kv_readers };
    if readers > READERS_MAX {
        return Err(Error::invalid(format!(
            "{readers} readers of one object are more than {READERS_MAX}"
        )));
    }
    Ok(readers)
}

#[cfg(target_os = "linux")]
fn shared(name: String, bytes: u64) -> Result<Region> {
    let name = if name.starts_with(PREFIX) { name } else { format!("{PREFIX}{name}") };
    kvferry_copy::SharedRegion::remove_stale(PREFIX);
    let region = Arc::new(kvferry_copy::SharedRegion::create(&name, bytes)?);
    Ok(Region::Shared { region, name })
}

#[cfg(not(target_os = "linux"))]
fn shared(_name: String, _bytes: u64) -> Result<Region> {
    Err(Error::new(
        ErrorCode::UnsupportedPlatform,
        "the shared-memory pool is for Linux; here, embed the store in the engine's process",
    ))
}
