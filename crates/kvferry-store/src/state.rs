//! What a store remembers: peers, instances, sessions, reservations; and how each of them ends.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Instant;

use kvferry_copy::POOL_STEP;
use kvferry_core::defect::{Defect, is_active};
use kvferry_core::explain::RemovalCause;
use kvferry_core::key::{Key, Layout};
use kvferry_core::{Error, ErrorCode, Result};

use crate::eviction::Policy;
use crate::index::{Demand, Handle, Index};
use crate::pool::{Grant, PAGE, Pool};
use crate::prompt::Prompt;
use crate::space::{Spaces, space};
use crate::store::{Departure, Limits, Owner};
use crate::tiers::{Coming, Promotion, Saving};

pub(crate) struct State {
    pub(crate) pool: Pool,
    pub(crate) index: Index,
    pub(crate) owners: HashMap<Owner, Belongings>,
    /// The layout that lookups of a (model, world size) mean whose peer says nothing of its own: the latest that was
    /// registered.
    pub(crate) layouts: HashMap<(String, u32), Arc<Registered>>,
    /// The layout that each rank of a (model, world size) was last seen with, while it is registered: stages of
    /// a pipeline may have unlike shapes, and registering does not say whose shape it is.
    pub(crate) rank_layouts: HashMap<(String, u32), Vec<Option<Arc<Registered>>>>,
    pub(crate) instances: HashMap<u64, Instance>,
    pub(crate) spaces: Spaces,
    pub(crate) sessions: HashMap<String, Session>,
    pub(crate) sessions_by_age: BTreeMap<(Instant, u64), String>,
    pub(crate) session_bytes: u64,
    /// The instance of each reservation.
    pub(crate) reservations_by_age: BTreeMap<(Instant, u64), (u64, Range)>,
    /// What readers that are gone may still be reading, by when they must have ended.
    pub(crate) held: BTreeMap<(Instant, u64), Vec<Handle>>,
    pub(crate) sequence: u64,
    pub(crate) limits: Limits,
    /// What is kept free by growing: it takes a moment, and what overtakes it is refused.
    pub(crate) headroom: u64,
    /// Whether all of the memory is to be reserved, whatever is free: as long as there is some to be had.
    pub(crate) whole: bool,
    pub(crate) coming: Coming,
    /// How often everything was cleared.
    pub(crate) clears: u64,
    pub(crate) growth_failed: Option<Instant>,
    pub(crate) counters: Counters,
    /// Objects that come from a tier below, and the requests that wait for them.
    pub(crate) loading: HashMap<Handle, BTreeSet<String>>,
    /// Objects that are being saved.
    pub(crate) saving: HashMap<Handle, Saving>,
    /// Whom to wake: after the lock is let go, since who is woken may call the store at once.
    pub(crate) woken: Vec<Waker>,
}

/// The state, for as long as nobody else may have it.
pub(crate) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    /// Dropped after the lock.
    woken: Woken,
}

struct Woken(Vec<Waker>);

impl<'a> Locked<'a> {
    pub(crate) fn new(state: &'a Mutex<State>) -> Self {
        let state = state.lock().unwrap_or_else(PoisonError::into_inner);
        Self { state, woken: Woken(Vec::new()) }
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.woken.0 = std::mem::take(&mut self.state.woken);
    }
}

impl Drop for Woken {
    fn drop(&mut self) {
        std::mem::take(&mut self.0).into_iter().for_each(Waker::wake);
    }
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

/// What has to be looked at when a peer goes.
#[derive(Default)]
pub(crate) struct Belongings {
    /// The one unused longest first.
    pub(crate) sessions: BTreeMap<(Instant, u64), String>,
    /// What they count for in [`Limits::session_bytes`].
    pub(crate) session_bytes: u64,
    pub(crate) instances: HashSet<u64>,
    /// Instances of other peers that stored or retrieved for requests which this one looked up, the latest last: an LMCache
    /// scheduler's workers have connections of their own.
    pub(crate) workers: VecDeque<u64>,
}

/// Workers of a peer that are remembered.
const WORKERS_MAX: usize = 256;

pub(crate) struct Registered {
    pub(crate) layout: Layout,
    pub(crate) object_bytes: u64,
}

impl Registered {
    fn is_of(&self, key: &Key) -> bool {
        let Layout { model_name, world_size, .. } = &self.layout;
        *model_name == key.model_name && *world_size == key.world_size
    }
}

pub(crate) struct Instance {
    pub(crate) registered: Arc<Registered>,
    /// Peers that registered it or were told of its slots, and are there.
    pub(crate) owners: HashSet<Owner>,
    /// Those among them that registered it.
    pub(crate) registrants: HashSet<Owner>,
    /// Larger for one that was registered later.
    pub(crate) age: u64,
    /// The same, of its last store or load.
    pub(crate) used: u64,
    pub(crate) ranks: Ranks,
    /// Oldest first, as their commits come.
    pub(crate) stores: HashMap<Range, VecDeque<Reservation>>,
    pub(crate) retrievals: HashMap<Range, VecDeque<Retrieval>>,
    /// Reservations that were given up: their objects are gone from the index.
    pub(crate) apart: HashMap<Range, VecDeque<Apart>>,
}

/// The ranks that an instance has stored or loaded for; registering does not say.
#[derive(Default)]
pub(crate) struct Ranks([u64; 4]);

impl Ranks {
    fn insert(&mut self, rank: u32) {
        if let Some(bits) = self.0.get_mut(rank as usize / 64) {
            *bits |= 1 << (rank % 64);
        }
    }

    fn has(&self, rank: usize) -> bool {
        self.0.get(rank / 64).is_some_and(|bits| bits >> (rank % 64) & 1 == 1)
    }
}

impl Instance {
    pub(crate) fn new(registered: Arc<Registered>, age: u64) -> Self {
        Self {
            registered,
            owners: HashSet::new(),
            registrants: HashSet::new(),
            age,
            used: age,
            ranks: Ranks::default(),
            stores: HashMap::new(),
            retrievals: HashMap::new(),
            apart: HashMap::new(),
        }
    }

    /// Whether its peers are all gone, and it holds nothing.
    fn is_deserted(&self) -> bool {
        let holds_nothing =
            self.stores.is_empty() && self.retrievals.is_empty() && self.apart.is_empty();
        holds_nothing && self.owners.is_empty()
    }
}

pub(crate) struct Apart {
    pub(crate) owner: Owner,
    /// Each with the tenant that it counts for.
    pub(crate) grants: Vec<(Grant, u32)>,
}

impl Apart {
    /// Its slots come back.
    fn give_back(self, pool: &mut Pool, index: &mut Index) {
        for (grant, tenant) in self.grants {
            index.discharge(tenant, grant.bytes());
            pool.give_back(grant);
        }
    }
}

/// Pairs a prepare with its commit: the tokens up to `end` by their last hash. Unlike LMCache's, the
/// request counts: else one request's commit would make visible what another has not filled yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Range {
    pub(crate) space: [u8; 32],
    pub(crate) last: [u8; 32],
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) rank: u32,
    pub(crate) request: [u8; 32],
}

pub(crate) struct Reservation {
    pub(crate) owner: Owner,
    pub(crate) objects: Vec<Handle>,
    pub(crate) age: (Instant, u64),
}

pub(crate) struct Retrieval {
    pub(crate) owner: Owner,
    pub(crate) objects: Vec<Handle>,
    pub(crate) apart: bool,
    /// See [`READ_HOLD`](crate::READ_HOLD).
    pub(crate) held_until: Instant,
}

pub(crate) struct Session {
    pub(crate) owner: Owner,
    pub(crate) prompt: Arc<Prompt>,
    /// Hit chunks that were not asked for yet.
    pub(crate) hit: Option<u64>,
    /// What it waits for before there is one.
    pub(crate) promotion: Option<Promotion>,
    /// Leases that no worker was handed.
    pub(crate) leases: HashMap<Handle, u32>,
    pub(crate) age: (Instant, u64),
    /// What it counts for in [`Limits::session_bytes`].
    pub(crate) bytes: u64,
}

#[derive(Debug, Default, Clone)]
pub(crate) struct Counters {
    pub(crate) lookups: u64,
    pub(crate) lookup_chunks: u64,
    pub(crate) hit_chunks: u64,
    /// Those among them that came from the disk.
    pub(crate) promoted_hit_chunks: u64,
    /// Those that came from the remote.
    pub(crate) remote_promoted_hit_chunks: u64,
    pub(crate) stored_chunks: u64,
    pub(crate) stored_bytes: u64,
    pub(crate) refused_chunks: u64,
    /// Besides: those for which memory was being reserved.
    pub(crate) refused_growing_chunks: u64,
    pub(crate) abandoned_chunks: u64,
    pub(crate) retrieved_chunks: u64,
    pub(crate) retrieved_bytes: u64,
    pub(crate) failed_retrievals: u64,
    pub(crate) damaged_chunks: u64,
    pub(crate) evicted_objects: u64,
    pub(crate) evicted_bytes: u64,
    pub(crate) expired_sessions: u64,
    pub(crate) promoted_chunks: u64,
    pub(crate) remote_promoted_chunks: u64,
}

impl State {
    pub(crate) fn new(pool: Pool, limits: Limits, policy: Policy) -> Self {
        Self {
            pool,
            index: Index::new(policy),
            owners: HashMap::new(),
            layouts: HashMap::new(),
            rank_layouts: HashMap::new(),
            instances: HashMap::new(),
            spaces: Spaces::default(),
            sessions: HashMap::new(),
            sessions_by_age: BTreeMap::new(),
            session_bytes: 0,
            reservations_by_age: BTreeMap::new(),
            held: BTreeMap::new(),
            sequence: 0,
            limits,
            headroom: POOL_STEP + POOL_STEP / 2,
            whole: false,
            coming: Coming::default(),
            clears: 0,
            growth_failed: None,
            counters: Counters::default(),
            loading: HashMap::new(),
            saving: HashMap::new(),
            woken: Vec::new(),
        }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    pub(crate) fn belongings(&mut self, owner: Owner) -> &mut Belongings {
        self.owners.entry(owner).or_default()
    }

    /// The peer has registered the instance, or is told of its slots.
    pub(crate) fn own_instance(&mut self, owner: Owner, instance: u64) {
        if let Some(known) = self.instances.get_mut(&instance) {
            known.owners.insert(owner);
            self.belongings(owner).instances.insert(instance);
        }
    }

    pub(crate) fn should_grow(&self) -> bool {
        (self.whole || self.pool.free() < self.headroom) && self.pool.next_step().is_some()
    }

    /// Whether more memory is on its way: nothing needs to go for what has no room yet.
    pub(crate) fn is_growing(&self) -> bool {
        self.should_grow() && self.growth_failed.is_none()
    }

    /// A slot, for which objects make room as the policy says, unless more memory is on its way.
    /// A tenant at its cap makes room itself.
    pub(crate) fn allocate(&mut self, bytes: u64, whose: &str) -> Option<Grant> {
        if bytes > self.pool.bytes() {
            return None;
        }
        let tenant = self.index.tenants.number(whose);
        let grant = self.make_room(bytes, tenant);
        if grant.is_none() {
            self.index.tenants.forget_idle(tenant);
        }
        grant
    }

    fn make_room(&mut self, bytes: u64, tenant: u32) -> Option<Grant> {
        let cap = self.index.tenants.cap(tenant);
        let need = bytes.next_multiple_of(PAGE);
        if need > cap {
            return None;
        }
        // What is above a cap that was lowered goes little by little.
        let most = cap.max(self.index.tenants.used(tenant).saturating_sub(need));
        while self.index.tenants.used(tenant) + need > most {
            let evicted = self.index.evict_own(RemovalCause::Evicted, tenant)?;
            self.count_evicted(evicted);
        }
        let may_grow = self.is_growing();
        loop {
            if let Some(grant) = self.pool.allocate(bytes, self.index.next_place()) {
                return Some(grant);
            }
            if may_grow {
                return None;
            }
            if !self.evict(Demand::Tenant(tenant)) {
                return None;
            }
        }
    }

    /// Makes room; `false` when nothing may go.
    pub(crate) fn evict(&mut self, demand: Demand) -> bool {
        let evicted = self.index.evict(RemovalCause::Evicted, demand);
        evicted.map(|evicted| self.count_evicted(evicted)).is_some()
    }

    fn count_evicted(&mut self, evicted: Grant) {
        self.counters.evicted_objects += 1;
        self.counters.evicted_bytes += evicted.bytes();
        self.pool.give_back(evicted);
    }

    /// The layout and the space of each rank's objects as `whose` peer means them, or anybody; `None` when no engine of the
    /// model is registered.
    ///
    /// Engines of one model may have unlike layouts: a peer means that of its own instances, or of those that work for
    /// it. What others stored last is only for who has none, and for stages of a pipeline that it has not met.
    pub(crate) fn layouts(
        &self,
        key: &Key,
        whose: Option<Owner>,
    ) -> Option<Vec<(Arc<Registered>, [u8; 32])>> {
        let place = (key.model_name.clone(), key.world_size);
        let latest = self.layouts.get(&place)?;
        let ranks = self.rank_layouts.get(&place);
        let seen = |rank: usize| ranks.and_then(|ranks| ranks.get(rank)?.as_ref());
        let own = self.own(key, whose);
        let newest = own.last().map(|instance| &instance.registered);
        // A pipeline's other stages have been seen with layouts of their own; another engine's ranks with none of ours.
        let ours =
            |seen: &Arc<Registered>| own.iter().any(|it| it.registered.layout == seen.layout);
        let whole = newest.filter(|_| key.world_size == 1);
        let mixed = whole.is_none() && (0..key.world_size as usize).filter_map(seen).any(ours);
        let mut last: Option<(&Arc<Registered>, [u8; 32])> = None;
        let spaces = (0..key.world_size as usize).map(|rank| {
            let placed = own.iter().rev().find(|instance| instance.ranks.has(rank));
            let registered = match (whole, placed, newest) {
                (Some(whole), ..) => whole,
                (None, Some(placed), _) => &placed.registered,
                (None, None, Some(newest)) if !mixed => newest,
                (None, None, newest) => seen(rank).or(newest).unwrap_or(latest),
            };
            let id = match last {
                Some((known, id)) if Arc::ptr_eq(known, registered) => id,
                _ => space(&registered.layout, &key.cache_salt),
            };
            last = Some((registered, id));
            (Arc::clone(registered), id)
        });
        Some(spaces.collect())
    }

    /// The peer's instances of the key's model: first those that work for it, then those that it registered or used itself,
    /// the latest last.
    fn own(&self, key: &Key, whose: Option<Owner>) -> Vec<&Instance> {
        let Some(belongings) = whose.and_then(|owner| self.owners.get(&owner)) else {
            return Vec::new();
        };
        let workers = belongings.workers.iter().map(|id| (false, id));
        let all = workers.chain(belongings.instances.iter().map(|id| (true, id)));
        let mut own: Vec<(bool, &Instance)> = all
            .filter_map(|(itself, id)| Some((itself, self.instances.get(id)?)))
            .filter(|(_, instance)| instance.registered.is_of(key))
            .collect();
        own.sort_unstable_by_key(|(itself, instance)| (*itself, instance.used));
        own.into_iter().map(|(_, instance)| instance).collect()
    }

    /// The space of each rank's objects, as [`State::layouts`].
    pub(crate) fn spaces(&self, key: &Key, whose: Option<Owner>) -> Option<Vec<[u8; 32]>> {
        Some(self.layouts(key, whose)?.into_iter().map(|(_, space)| space).collect())
    }

    /// A rank stores or loads with the layout of its instance, for whoever looked the request up.
    pub(crate) fn meet_rank(&mut self, key: &Key, owner: Owner, instance: u64, rank: u32) {
        let used = self.next();
        let Some(known) = self.instances.get_mut(&instance) else { return };
        known.used = used;
        known.ranks.insert(rank);
        let asked = self.sessions.get(&key.request_id).map(|session| session.owner);
        let asked = asked.filter(|asked| *asked != owner).and_then(|it| self.owners.get_mut(&it));
        let Some(Belongings { instances, workers, .. }) = asked else { return };
        if instances.contains(&instance) || workers.contains(&instance) {
            return;
        }
        if workers.len() == WORKERS_MAX {
            workers.pop_front();
        }
        workers.push_back(instance);
    }

    /// What the rank stores or has loaded is what others are to look for who have no layout of their own.
    pub(crate) fn place_rank(&mut self, key: &Key, rank: u32, registered: &Arc<Registered>) {
        let ranks = self.rank_layouts.entry((key.model_name.clone(), key.world_size)).or_default();
        let rank = rank as usize;
        if ranks.len() <= rank {
            ranks.resize(rank + 1, None);
        }
        if !ranks[rank].as_ref().is_some_and(|known| Arc::ptr_eq(known, registered)) {
            ranks[rank] = Some(Arc::clone(registered));
        }
    }

    /// The instance's registration, and the key's range in it (`None` when it is empty).
    pub(crate) fn range(
        &self,
        key: &Key,
        instance: u64,
        prompt: &Prompt,
        chunks: &std::ops::Range<usize>,
    ) -> Result<(Arc<Registered>, Option<Range>)> {
        let unknown = || {
            Error::new(
                ErrorCode::Protocol,
                format!("instance {instance} is not registered for {:?}", key.model_name),
            )
        };
        let known = &self.instances.get(&instance).ok_or_else(unknown)?.registered;
        let layout = &known.layout;
        if !known.is_of(key) {
            return Err(unknown());
        }
        let rank = key.worker_id.filter(|rank| *rank < key.world_size).ok_or_else(|| {
            Error::invalid(format!("worker {:?} is not in 0..{}", key.worker_id, key.world_size))
        })?;
        let last = chunks.clone().next_back().map(|chunk| prompt.hashes[chunk]);
        let range = last.map(|last| Range {
            space: space(layout, &key.cache_salt),
            last,
            start: key.start,
            end: key.end,
            rank,
            request: *blake3::hash(key.request_id.as_bytes()).as_bytes(),
        });
        Ok((Arc::clone(known), range))
    }

    /// The session of a request, made or refreshed.
    pub(crate) fn session(
        &mut self,
        owner: Owner,
        request_id: &str,
        prompt: Arc<Prompt>,
        now: Instant,
    ) -> &mut Session {
        let bytes = prompt.bytes() + 3 * request_id.len() as u64; // three maps have it
        let age = (now + self.limits.session_idle, self.next());
        let mut leases = HashMap::new();
        if let Some(former) = self.remove_session(request_id) {
            leases = former.leases;
            self.forget_promotion(request_id, former.promotion);
        }
        self.session_bytes += bytes;
        self.sessions_by_age.insert(age, request_id.to_owned());
        let belongings = self.belongings(owner);
        belongings.session_bytes += bytes;
        belongings.sessions.insert(age, request_id.to_owned());
        loop {
            let too_many = self.sessions.len() >= self.limits.sessions;
            if !too_many && self.session_bytes <= self.limits.session_bytes {
                break;
            }
            // Who has the most of what there is too much of makes room, whoever came last.
            let amount = |it: &Belongings| match too_many {
                true => it.sessions.len() as u64,
                false => it.session_bytes,
            };
            let owners = self.owners.iter().filter_map(|(owner, it)| {
                let oldest = it.sessions.values().find(|id| *id != request_id)?;
                Some(((amount(it), owner.0), oldest))
            });
            let Some((_, oldest)) = owners.max_by_key(|(amount, _)| *amount) else { break };
            let oldest = oldest.clone();
            self.end_session(&oldest);
            self.counters.expired_sessions += 1;
        }
        let session = Session { owner, prompt, hit: None, promotion: None, leases, age, bytes };
        self.sessions.entry(request_id.to_owned()).insert_entry(session).into_mut()
    }

    /// Takes a session out of everything that knows it by its age.
    fn remove_session(&mut self, request_id: &str) -> Option<Session> {
        let session = self.sessions.remove(request_id)?;
        self.sessions_by_age.remove(&session.age);
        self.session_bytes -= session.bytes;
        if let Some(belongings) = self.owners.get_mut(&session.owner) {
            belongings.session_bytes -= session.bytes;
            belongings.sessions.remove(&session.age);
        }
        Some(session)
    }

    /// The request is in use: its session's deadline moves on.
    pub(crate) fn touch(&mut self, request_id: &str, now: Instant) {
        self.expire(now);
        let age = (now + self.limits.session_idle, self.next());
        if let Some(session) = self.sessions.get_mut(request_id)
            && let Some(id) = self.sessions_by_age.remove(&session.age)
        {
            if let Some(belongings) = self.owners.get_mut(&session.owner) {
                belongings.sessions.remove(&session.age);
                belongings.sessions.insert(age, id.clone());
            }
            session.age = age;
            self.sessions_by_age.insert(age, id);
        }
    }

    /// The same unless it is another peer's by now.
    pub(crate) fn end_session_of(&mut self, owner: Owner, request_id: &str) {
        if self.sessions.get(request_id).is_some_and(|session| session.owner == owner) {
            self.end_session(request_id);
        }
    }

    pub(crate) fn end_session(&mut self, request_id: &str) {
        let Some(session) = self.remove_session(request_id) else { return };
        self.forget_promotion(request_id, session.promotion);
        if is_active(Defect::SessionKept) {
            return;
        }
        // In an order that does not depend on the map: what is evicted next must not be left to chance.
        let mut leases: Vec<_> = session.leases.into_iter().collect();
        leases.sort_unstable_by_key(|(handle, _)| std::cmp::Reverse(*handle));
        for (handle, count) in leases {
            self.index.unpin_often(handle, count);
        }
    }

    /// Takes leases from a session, with their pins; how many it had of so many.
    pub(crate) fn take_leases(&mut self, request_id: &str, handle: Handle, most: u32) -> u32 {
        let Some(session) = self.sessions.get_mut(request_id) else { return 0 };
        let Some(count) = session.leases.get_mut(&handle) else { return 0 };
        let taken = most.min(*count);
        *count -= taken;
        if *count == 0 {
            session.leases.remove(&handle);
        }
        taken
    }

    pub(crate) fn unpin(&mut self, handles: &[Handle]) {
        for handle in handles.iter().rev() {
            self.index.unpin(*handle);
        }
    }

    /// Slots of the reservation that [`State::take_reservation`] would end; 0 for none.
    pub(crate) fn reserved(&self, instance: u64, range: &Range) -> usize {
        let Some(known) = self.instances.get(&instance) else { return 0 };
        match known.apart.get(range).and_then(VecDeque::front) {
            Some(apart) => apart.grants.len(),
            None => {
                let oldest = known.stores.get(range).and_then(VecDeque::front);
                oldest.map_or(0, |reservation| reservation.objects.len())
            }
        }
    }

    /// Whether a store of the range has begun that was neither committed nor abandoned.
    pub(crate) fn is_reserved(&self, instance: u64, range: &Range) -> bool {
        let known = self.instances.get(&instance);
        known.is_some_and(|it| it.stores.contains_key(range) || it.apart.contains_key(range))
    }

    /// Takes the range's oldest reservation out to end it. If it was set apart, its slots come back
    /// now, since the writer says that it is done, and nothing else does.
    pub(crate) fn take_reservation(&mut self, instance: u64, range: Range) -> Option<Reservation> {
        let known = self.instances.get_mut(&instance)?;
        if let Some(apart) = take_first(&mut known.apart, &range) {
            apart.give_back(&mut self.pool, &mut self.index);
            return None;
        }
        let reservation = take_first(&mut known.stores, &range)?;
        self.reservations_by_age.remove(&reservation.age);
        Some(reservation)
    }

    /// Takes reserved objects out and their slots back.
    pub(crate) fn abandon(&mut self, objects: &[Handle]) {
        for handle in objects.iter().rev() {
            if let Some(grant) = self.index.remove_reserved(*handle) {
                self.pool.give_back(grant);
                self.counters.abandoned_chunks += 1;
            }
        }
    }

    /// A reservation loses its chunks, and its slots stay the writer's.
    fn set_apart(&mut self, instance: u64, range: Range, reservation: &Reservation) {
        self.reservations_by_age.remove(&reservation.age);
        let objects = reservation.objects.iter().rev();
        let grants: Vec<_> = objects.filter_map(|handle| self.index.set_apart(*handle)).collect();
        self.counters.abandoned_chunks += grants.len() as u64;
        let apart = Apart { owner: reservation.owner, grants };
        match self.instances.get_mut(&instance) {
            Some(known) if !is_active(Defect::LateSlotReused) => {
                known.apart.entry(range).or_default().push_back(apart);
            }
            _ => apart.give_back(&mut self.pool, &mut self.index),
        }
    }

    /// Retrievals of an instance that are not committed.
    pub(crate) fn retrievals(&self, instance: u64) -> usize {
        let known = self.instances.get(&instance);
        known.map_or(0, |known| known.retrievals.values().map(VecDeque::len).sum())
    }

    /// The reader is gone, and may not have noticed yet.
    fn hold(&mut self, retrieval: Retrieval) {
        let age = (retrieval.held_until, self.next());
        self.held.insert(age, retrieval.objects);
    }

    /// Lets go of what readers that are gone had until now.
    pub(crate) fn let_go(&mut self, now: Instant) {
        while let Some(entry) = self.held.first_entry()
            && entry.key().0 <= now
        {
            let read = entry.remove();
            self.unpin(&read);
        }
    }

    /// Forgets an instance and takes back every slot that it was told of.
    pub(crate) fn unregister(&mut self, instance: u64) {
        let Some(gone) = self.instances.remove(&instance) else { return };
        for owner in &gone.owners {
            if let Some(belongings) = self.owners.get_mut(owner) {
                belongings.instances.remove(&instance);
            }
        }
        for reservation in gone.stores.into_values().flatten() {
            self.reservations_by_age.remove(&reservation.age);
            self.abandon(&reservation.objects);
        }
        for retrieval in gone.retrievals.into_values().flatten() {
            self.hold(retrieval);
        }
        for apart in gone.apart.into_values().flatten() {
            apart.give_back(&mut self.pool, &mut self.index);
        }
        let is_gone = |known: &Arc<Registered>| Arc::ptr_eq(known, &gone.registered);
        let layout = &gone.registered.layout;
        let place = (layout.model_name.clone(), layout.world_size);
        if !self.instances.values().any(|other| is_gone(&other.registered))
            && let Some(ranks) = self.rank_layouts.get_mut(&place)
        {
            ranks.iter_mut().for_each(|rank| drop(rank.take_if(|known| is_gone(known))));
            if ranks.iter().all(Option::is_none) {
                self.rank_layouts.remove(&place);
            }
        }
        if self.layouts.get(&place).is_some_and(|known| Arc::ptr_eq(known, &gone.registered)) {
            let same_place = |instance: &&Instance| {
                let Layout { model_name, world_size, .. } = &instance.registered.layout;
                (model_name, *world_size) == (&place.0, place.1)
            };
            let latest = self.instances.values().filter(same_place).max_by_key(|other| other.age);
            match latest.map(|other| Arc::clone(&other.registered)) {
                Some(registered) => self.layouts.insert(place, registered),
                None => self.layouts.remove(&place),
            };
        }
    }

    /// Whether the instance's peers are all gone, and it holds nothing.
    pub(crate) fn is_deserted(&self, instance: u64) -> bool {
        self.instances.get(&instance).is_some_and(Instance::is_deserted)
    }

    /// Forgets the oldest instance whose peers are all gone and that holds nothing: engines that were
    /// killed did not unregister theirs. `false` when there is none.
    pub(crate) fn forget_deserted(&mut self) -> bool {
        let deserted = self.instances.iter().filter(|(_, known)| known.is_deserted());
        let oldest = deserted.min_by_key(|(_, instance)| instance.age).map(|(id, _)| *id);
        oldest.inspect(|id| self.unregister(*id)).is_some()
    }

    /// Whether the peer was given up while it was told of this instance's slots.
    pub(crate) fn is_apart(&self, owner: Owner, instance: u64) -> bool {
        self.instances.get(&instance).is_some_and(|known| {
            let mut retrievals = known.retrievals.values().flatten();
            known.apart.values().flatten().any(|apart| apart.owner == owner)
                || retrievals.any(|retrieval| retrieval.apart && retrieval.owner == owner)
        })
    }

    /// A peer that was told of this instance's slots is gone.
    pub(crate) fn leave(&mut self, instance: u64, owner: Owner, departure: Departure) {
        let Some(known) = self.instances.get_mut(&instance) else { return };
        known.owners.remove(&owner);
        known.registrants.remove(&owner);
        if departure == Departure::GivenUp {
            for (range, given_up) in extract(&mut known.stores, |it| it.owner == owner) {
                self.set_apart(instance, range, &given_up);
            }
            if let Some(known) = self.instances.get_mut(&instance) {
                let retrievals = known.retrievals.values_mut().flatten();
                for retrieval in retrievals.filter(|retrieval| retrieval.owner == owner) {
                    retrieval.apart = true;
                }
            }
            return;
        }
        let stores = extract(&mut known.stores, |reservation| reservation.owner == owner);
        let retrievals = extract(&mut known.retrievals, |retrieval| retrieval.owner == owner);
        for (_, apart) in extract(&mut known.apart, |apart| apart.owner == owner) {
            apart.give_back(&mut self.pool, &mut self.index);
        }
        for (_, retrieval) in retrievals {
            self.hold(retrieval);
        }
        for (_, reservation) in stores {
            self.reservations_by_age.remove(&reservation.age);
            self.abandon(&reservation.objects);
        }
    }

    /// The peer may write for ever to what it was told of as this instance: its own departure gives none of it back.
    pub(crate) fn give_up(&mut self, instance: u64, owner: Owner) {
        self.leave(instance, owner, Departure::GivenUp);
        let nobody = Owner(self.next());
        let Some(known) = self.instances.get_mut(&instance) else { return };
        let stores = known.apart.values_mut().flatten().map(|apart| &mut apart.owner);
        let retrievals = known.retrievals.values_mut().flatten().map(|read| &mut read.owner);
        stores.chain(retrievals).filter(|it| **it == owner).for_each(|it| *it = nobody);
    }

    /// Ends what is past its deadline.
    pub(crate) fn expire(&mut self, now: Instant) {
        self.index.tick(now);
        while let Some(entry) = self.sessions_by_age.first_entry()
            && entry.key().0 <= now
        {
            let request = entry.get().clone();
            self.end_session(&request);
            self.counters.expired_sessions += 1;
        }
        self.let_go(now);
        while let Some(entry) = self.reservations_by_age.first_entry()
            && entry.key().0 <= now
        {
            let (age, (instance, range)) = entry.remove_entry();
            let known = self.instances.get_mut(&instance);
            let expired = known.and_then(|known| {
                let list = known.stores.get_mut(&range)?;
                let place = list.iter().position(|reservation| reservation.age == age)?;
                let expired = list.remove(place);
                if list.is_empty() {
                    known.stores.remove(&range);
                }
                expired
            });
            if let Some(reservation) = expired {
                self.set_apart(instance, range, &reservation);
            }
        }
    }
}

/// Takes the first of a list out of a map of lists, and the list if it becomes empty with it.
fn take_first<T>(map: &mut HashMap<Range, VecDeque<T>>, range: &Range) -> Option<T> {
    let list = map.get_mut(range)?;
    let first = list.pop_front();
    if list.is_empty() {
        map.remove(range);
    }
    first
}

/// Takes out of a map of lists what `which` picks, and lists that become empty with it.
fn extract<T>(
    map: &mut HashMap<Range, VecDeque<T>>,
    which: impl Fn(&T) -> bool,
) -> Vec<(Range, T)> {
    let mut taken = Vec::new();
    map.retain(|range, list| {
        let (picked, rest) = std::mem::take(list).into_iter().partition::<VecDeque<T>, _>(&which);
        *list = rest;
        taken.extend(picked.into_iter().map(|item| (*range, item)));
        !list.is_empty()
    });
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Origin;
    use crate::index::ObjectId;
    use crate::space::test_space;

    #[test]
    fn free_space_in_holes_that_are_too_small_does_not_keep_others_from_being_evicted() {
        const SMALL: u64 = 1 << 20;
        let pool = Pool::new(4 * POOL_STEP).unwrap();
        let mut state = State::new(pool, Limits::default(), Policy::Lru);
        state.headroom = POOL_STEP / 2;
        state.pool.grow();
        let grants: Vec<Grant> = std::iter::from_fn(|| state.pool.allocate(SMALL, 0)).collect();
        for (number, grant) in (0u8..).zip(grants) {
            if number % 2 == 0 {
                state.pool.give_back(grant);
            } else {
                let id = ObjectId { chunk: [number; 32], space: [0; 32], rank: 0 };
                let origin = Origin { space: test_space(), parent: None };
                let object = state.index.reserve(id, origin, grant, None);
                state.index.commit(&[object], |_| None);
            }
        }
        assert!(!state.should_grow(), "half of the step is free");
        assert!(state.allocate(2 * SMALL, "").is_some());
        assert_eq!(state.counters.evicted_objects, 1);
    }
}
