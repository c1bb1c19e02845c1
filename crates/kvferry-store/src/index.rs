//! Which objects there are, how they hang together, and which may go.
//!
//! Objects of one prefix form a chain: each knows the object of the chunk before it. An object is
//! *pinned* while it is reserved or leased, and while any child of it is pinned. Which of the unpinned
//! ones goes first, a policy says. An object becomes unpinned after its children, so a policy that takes
//! what became so first takes children before parents.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::cache::Slot;
use kvferry_core::explain::RemovalCause;

mod removal;

use crate::ages::Ages;
use crate::events::{EventLog, Origin, What};
use crate::eviction::{Eviction, Policy, Use};
use crate::pool::{Grant, place_of, use_of};
use crate::prompt::Tokens;
use crate::space::Space;
use crate::table::Table;
use crate::tenants::{Quotas, Tenants, tenant_of};

const NONE: u32 = u32::MAX;
/// How exact ages are.
const TICK: Duration = Duration::from_millis(100);

/// The identity of an object, 256 bits twice over: what was computed (the chunk's chained hash), for
/// whom and in which shape (model, salt, layout), and the shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ObjectId {
    pub(crate) chunk: [u8; 32],
    pub(crate) space: [u8; 32],
    pub(crate) rank: u32,
}

impl ObjectId {
    /// 64 bits of it, for policies: a collision makes a choice worse and nothing wrong.
    fn key(&self) -> u64 {
        let first =
            |hash: &[u8; 32]| hash.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let rank = u64::from(self.rank).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        first(&self.chunk) ^ first(&self.space) ^ rank
    }
}

/// A reference to an object that notices when the object is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Handle {
    generation: NonZeroU64,
    index: u32,
}

impl Handle {
    /// Of the slot's use.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.get()
    }
}

/// There may be millions of these.
struct Object {
    chunk: [u8; 32],
    space: Arc<Space>,
    grant: Grant,
    /// The place of the object of the chunk before it, and the number of the use that its slot was in.
    parent: u32,
    parent_use: u32,
    pins: u32,
    /// Objects whose parent it is.
    children: u32,
    tenant: u32,
    /// When it was stored or last looked up, as [`Index::now`] was.
    used: u32,
    rank: u16,
    flags: Flags,
}

const _: () = assert!(size_of::<Option<Object>>() <= 104);

#[derive(Clone, Copy, Default)]
struct Flags(u8);

/// Readers find it.
const VISIBLE: u8 = 1;
/// Nobody finds it any more; it goes first.
const DISCARDED: u8 = 2;
/// In its tenant's list of what may go.
const FREE: u8 = 4;
/// The policy wanted it to go, and its tenant's guarantee keeps it.
const PARKED: u8 = 8;
/// It is among those that are doomed.
const DOOMED: u8 = 16;

impl Flags {
    fn has(self, flag: u8) -> bool {
        self.0 & flag != 0
    }

    /// Whether it was set before.
    fn set(&mut self, flag: u8) -> bool {
        let before = self.has(flag);
        self.0 |= flag;
        before
    }

    /// Whether it was set before.
    fn clear(&mut self, flag: u8) -> bool {
        let before = self.has(flag);
        self.0 &= !flag;
        before
    }
}

impl Object {
    fn id(&self) -> ObjectId {
        ObjectId { chunk: self.chunk, space: self.space.id, rank: self.rank.into() }
    }

    fn is_visible(&self) -> bool {
        self.flags.has(VISIBLE)
    }

    fn is_discarded(&self) -> bool {
        self.flags.has(DISCARDED)
    }
}

/// For whom room is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Demand {
    /// Guarantees of all others are kept.
    Tenant(u32),
    /// For nobody in particular: guarantees are kept.
    Nobody,
    /// Everything is to go.
    All,
}

/// All objects of the store.
pub(crate) struct Index {
    objects: Vec<Option<Object>>,
    unused: Vec<u32>,
    /// Places by identity.
    by_id: Table<u32>,
    hashes: RandomState,
    eviction: Box<dyn Eviction>,
    /// The hashes of the chunks before those that are reserved, by place.
    parents: HashMap<u32, [u8; 32]>,
    /// Discarded ones that nothing keeps.
    doomed: VecDeque<Handle>,
    pub(crate) tenants: Tenants,
    visible: u64,
    /// What became visible and what went.
    pub(crate) events: EventLog,
    /// From the first [`Index::tick`] to the latest, in steps of [`TICK`]; a u32 of them lasts for 13 years.
    now: u32,
    started: Option<Instant>,
    /// Of what made room.
    pub(crate) ages: Ages,
}

/// An object, as [`Index::find`] comes upon it.
pub(crate) struct Seen<'a> {
    pub(crate) id: ObjectId,
    pub(crate) space: &'a Space,
    /// Else it is being written.
    pub(crate) visible: bool,
}

impl Index {
    /// Of nothing, to be emptied as the policy says.
    pub(crate) fn new(policy: Policy) -> Self {
        Self {
            objects: Vec::new(),
            unused: Vec::new(),
            by_id: Table::default(),
            hashes: RandomState::new(),
            eviction: policy.eviction(),
            parents: HashMap::new(),
            doomed: VecDeque::new(),
            tenants: Tenants::default(),
            visible: 0,
            events: EventLog::default(),
            now: 0,
            started: None,
            ages: Ages::default(),
        }
    }

    /// It is so late now. Ages go by what was told last: nobody asks the clock for an eviction.
    pub(crate) fn tick(&mut self, now: Instant) {
        let started = *self.started.get_or_insert(now);
        let passed = now.saturating_duration_since(started).as_millis();
        self.now = self.now.max(u32::try_from(passed / TICK.as_millis()).unwrap_or(u32::MAX));
    }

    /// A request uses these, its first chunk first; `ranks` of each chunk.
    pub(crate) fn request(
        &mut self,
        ids: impl IntoIterator<Item = ObjectId>,
        ranks: usize,
        now: Instant,
    ) {
        let place = |id: &ObjectId| self.get(id).map(|handle| handle.index);
        let uses = ids.into_iter().map(|id| Use { key: id.key(), place: place(&id) });
        let uses: Vec<Use> = uses.collect();
        self.tick(now);
        for place in uses.iter().filter_map(|one| one.place) {
            let now = self.now;
            if let Some(object) = self.at(place) {
                object.used = now;
            }
        }
        self.eviction.request(&uses, ranks, now);
    }

    /// Whether a request has used it, as far as the policy remembers.
    pub(crate) fn knows(&self, id: &ObjectId) -> bool {
        self.get(id).is_some() || self.eviction.knows(id.key())
    }

    /// What the policy takes, see [`Eviction::takes`].
    pub(crate) fn policy_takes(&self) -> Option<(usize, usize)> {
        self.eviction.takes()
    }

    /// Visible objects.
    pub(crate) fn visible(&self) -> u64 {
        self.visible
    }

    /// The object of this identity, reserved ones included.
    pub(crate) fn get(&self, id: &ObjectId) -> Option<Handle> {
        let same = |index: u32| {
            self.objects[index as usize].as_ref().is_some_and(|object| object.id() == *id)
        };
        let index = self.by_id.find(self.hashes.hash_one(id.key()), same)?;
        let object = self.objects.get(index as usize)?.as_ref()?;
        Some(Handle { generation: object.grant.count(), index })
    }

    /// The object of this identity if readers may see it.
    pub(crate) fn get_visible(&self, id: &ObjectId) -> Option<Handle> {
        self.get(id).filter(|handle| self.object(*handle).is_some_and(Object::is_visible))
    }

    pub(crate) fn grant(&self, handle: Handle) -> Option<&Grant> {
        self.object(handle).map(|object| &object.grant)
    }

    /// The slot of an object that is still being written.
    pub(crate) fn reserved_slot(&self, handle: Handle) -> Option<Slot> {
        self.object(handle).filter(|object| !object.is_visible()).map(|object| object.grant.slot())
    }

    /// What it is, where from, and where its bytes are.
    pub(crate) fn describe(&self, handle: Handle) -> Option<(ObjectId, Origin, Slot)> {
        let object = self.object(handle)?;
        Some((object.id(), self.origin(handle.index, object), object.grant.slot()))
    }

    /// What listeners are told. The chunk before one that is not reserved any more is known as long as it is there.
    fn origin(&self, place: u32, object: &Object) -> Origin {
        let before = || Some(self.object(self.parent_of(object)?)?.chunk);
        let parent = self.parents.get(&place).copied().or_else(before);
        Origin { space: Arc::clone(&object.space), parent }
    }

    /// The object that this one hangs on, if it is there.
    fn parent_of(&self, object: &Object) -> Option<Handle> {
        let parent = self.objects.get(object.parent as usize)?.as_ref()?;
        let generation = parent.grant.count();
        let is_same = use_of(generation.get()) == object.parent_use;
        is_same.then_some(Handle { generation, index: object.parent })
    }

    /// Whether the slot at `offset` is still in the use of this generation.
    pub(crate) fn holds(&self, offset: u64, generation: u64) -> bool {
        let object = self.objects.get(place_of(generation)).and_then(Option::as_ref);
        let grant = object.map(|object| &object.grant);
        grant.is_some_and(|it| it.offset() == offset && it.generation() == generation)
    }

    /// Where the next object that is reserved will be.
    pub(crate) fn next_place(&self) -> usize {
        self.unused.last().map_or(self.objects.len(), |index| *index as usize)
    }

    /// Adds a reserved object: pinned once, seen by nobody. Its slot was allocated for [`Index::next_place`].
    pub(crate) fn reserve(
        &mut self,
        id: ObjectId,
        origin: Origin,
        grant: Grant,
        parent: Option<Handle>,
    ) -> Handle {
        let generation = grant.count();
        let parent = parent.filter(|parent| self.object(*parent).is_some());
        let Origin { space, parent: before } = origin;
        let event = &space.event;
        let whose = tenant_of(&event.model_name, &event.cache_salt);
        let tenant = self.tenants.number(whose);
        self.tenants.charge(tenant, grant.bytes());
        self.unpark(tenant, grant.bytes());
        let object = Object {
            chunk: id.chunk,
            space,
            grant,
            parent: parent.map_or(NONE, |parent| parent.index),
            parent_use: parent.map_or(0, |parent| use_of(parent.generation.get())),
            pins: 1,
            children: 0,
            tenant,
            used: self.now,
            rank: u16::try_from(id.rank).unwrap_or(u16::MAX), // below WORLD_SIZE_MAX
            flags: Flags::default(),
        };
        let index = match self.unused.pop() {
            Some(index) => {
                self.objects[index as usize] = Some(object);
                index
            }
            None => {
                self.objects.push(Some(object));
                u32::try_from(self.objects.len() - 1).unwrap_or(NONE)
            }
        };
        let handle = Handle { index, generation };
        if let Some(before) = before {
            self.parents.insert(index, before);
        }
        let (objects, hashes) = (&self.objects, &self.hashes);
        let hash = |index: u32| {
            let key = objects[index as usize].as_ref().map_or(0, |object| object.id().key());
            hashes.hash_one(key)
        };
        self.by_id.insert(hashes.hash_one(id.key()), index, hash);
        self.eviction.add(index, id.key());
        if let Some(parent) = parent {
            self.pin(parent);
            self.add_child(parent);
        }
        handle
    }

    /// The object's bytes have this checksum. It goes with the object's slot.
    pub(crate) fn keep_checksum(&mut self, handle: Handle, checksum: u64) {
        if let Some(object) = self.object_mut(handle) {
            object.grant.keep_checksum(checksum);
        }
    }

    /// Makes reserved objects, parents first, visible and takes their reservations' pins away. `tokens` are asked for in
    /// the order of the objects.
    pub(crate) fn commit(
        &mut self,
        handles: &[Handle],
        mut tokens: impl FnMut(&[u8; 32]) -> Tokens,
    ) {
        let mut committed = Vec::with_capacity(handles.len());
        for handle in handles.iter().rev() {
            if let Some(object) = self.object_mut(*handle)
                && !object.flags.set(VISIBLE)
            {
                committed.push(*handle);
                self.visible += 1;
                self.unpin(*handle);
            }
        }
        // Listeners hear of parents first.
        for handle in committed.iter().rev() {
            if let Some(object) = self.object(*handle) {
                let (id, origin) = (object.id(), self.origin(handle.index, object));
                self.parents.remove(&handle.index);
                let what = What::Stored(if origin.is_told() { tokens(&id.chunk) } else { None });
                self.events.push(id.chunk, id.rank, origin, what);
            }
        }
    }

    /// Hangs `child` under `parent`, when it lost its former one or never had one.
    pub(crate) fn adopt(&mut self, parent: Handle, child: Handle) {
        let orphan = self.object(child).is_some_and(|object| self.parent_of(object).is_none());
        if orphan && parent != child && self.object(parent).is_some() {
            self.pin(child);
            if let Some(object) = self.object_mut(child) {
                (object.parent, object.parent_use) =
                    (parent.index, use_of(parent.generation.get()));
            }
            self.add_child(parent);
            self.pin(parent); // as the parent of a pinned child
            self.unpin(child);
        }
    }

    /// Keeps the object, and with it the chain before it.
    pub(crate) fn pin(&mut self, handle: Handle) {
        self.pin_often(handle, 1);
    }

    /// As often at once.
    pub(crate) fn pin_often(&mut self, handle: Handle, times: u32) {
        let mut next = Some(handle).filter(|_| times > 0).map(|handle| (handle, times));
        while let Some((handle, times)) = next.take() {
            let Some(object) = self.object_mut(handle) else { return };
            let first = object.pins == 0;
            object.pins += times;
            if first {
                let parent = self.object(handle).and_then(|object| self.parent_of(object));
                next = parent.map(|parent| (parent, 1));
                self.hold(handle.index);
            }
        }
    }

    /// Takes one pin away; after the last, the object may go.
    pub(crate) fn unpin(&mut self, handle: Handle) {
        self.unpin_often(handle, 1);
    }

    /// As many at once.
    pub(crate) fn unpin_often(&mut self, handle: Handle, times: u32) {
        let mut next = Some(handle).filter(|_| times > 0).map(|handle| (handle, times));
        while let Some((handle, times)) = next.take() {
            let Some(object) = self.object_mut(handle) else { return };
            object.pins = object.pins.saturating_sub(times);
            if object.pins == 0 {
                let discarded = object.is_discarded();
                let parent = self.object(handle).and_then(|object| self.parent_of(object));
                next = parent.map(|parent| (parent, 1));
                match discarded {
                    true => self.doom(handle),
                    false => self.release(handle.index),
                }
            }
        }
    }

    /// Makes visible objects of these generations unseen, and room; says which there were. Who reads
    /// them goes on.
    pub(crate) fn discard(&mut self, generations: &HashSet<u64>) -> Vec<ObjectId> {
        let at = |generation: &u64| {
            let place = place_of(*generation);
            let object = self.objects.get(place)?.as_ref()?;
            let is_it = object.grant.generation() == *generation;
            let is_seen = is_it && object.is_visible() && !object.is_discarded();
            is_seen.then_some((u32::try_from(place).ok()?, object.id()))
        };
        let mut found: Vec<(u32, ObjectId)> = generations.iter().filter_map(at).collect();
        found.sort_unstable_by_key(|(place, _)| *place); // the same order each time
        for (index, id) in &found {
            self.forget(id, *index);
            let Some(object) = self.objects.get(*index as usize).and_then(Option::as_ref) else {
                continue;
            };
            let origin = self.origin(*index, object);
            let Some(object) = self.at(*index) else { continue };
            object.flags.set(DISCARDED);
            let pins = object.pins;
            let handle = Handle { index: *index, generation: object.grant.count() };
            let what = What::Removed(RemovalCause::Damaged, None);
            self.events.push(id.chunk, id.rank, origin, what);
            if pins == 0 {
                self.hold(*index);
                self.doom(handle);
            }
        }
        found.into_iter().map(|(_, id)| id).collect()
    }

    /// Takes the object out that goes first; `None` when nothing may go.
    pub(crate) fn evict(&mut self, cause: RemovalCause, demand: Demand) -> Option<Grant> {
        let index = self.next_doomed().or_else(|| self.victim(demand))?;
        let by = match demand {
            Demand::Tenant(tenant) => self.tenants.name(tenant),
            Demand::Nobody | Demand::All => None,
        };
        self.remove(index, cause, by)
    }

    /// Takes the object out that the tenant used longest ago.
    pub(crate) fn evict_own(&mut self, cause: RemovalCause, tenant: u32) -> Option<Grant> {
        // What is damaged counts for its tenant until it goes.
        let index = self.next_doomed().or_else(|| self.tenants.first(tenant))?;
        let by = self.tenants.name(tenant);
        self.remove(index, cause, by)
    }

    /// Takes one of the tenant's objects out that may go.
    pub(crate) fn clear_one(&mut self, cache_salt: &str) -> Option<(ObjectId, Grant)> {
        let tenant = self.tenants.find(cache_salt)?;
        let index = self.tenants.first(tenant)?;
        let id = self.at(index)?.id();
        Some((id, self.remove(index, RemovalCause::Cleared, None)?))
    }

    fn remove(&mut self, index: u32, cause: RemovalCause, by: Option<Arc<str>>) -> Option<Grant> {
        let origin = self.origin(index, self.objects.get(index as usize)?.as_ref()?);
        let object = self.take(index)?;
        if cause == RemovalCause::Evicted {
            let ticks = self.now.saturating_sub(object.used);
            self.ages.count(TICK * ticks);
        }
        self.tenants.count_evicted(object.tenant, object.grant.bytes());
        self.tenants.forget_idle(object.tenant);
        if !object.is_discarded() {
            let what = What::Removed(cause, by);
            self.events.push(object.chunk, object.rank.into(), origin, what);
        }
        Some(object.grant)
    }

    /// What the policy says goes, as far as guarantees allow.
    fn victim(&mut self, demand: Demand) -> Option<u32> {
        if demand == Demand::All {
            for handle in self.tenants.take_parked() {
                self.end_parking(handle);
            }
        }
        while let Some(index) = self.eviction.victim() {
            let object = self.objects.get_mut(index as usize)?.as_mut()?;
            // Who has less than its guarantee takes from others before it replaces its own.
            let own = match demand {
                Demand::All => true,
                Demand::Tenant(tenant) => {
                    tenant == object.tenant && self.tenants.may_lose(tenant, 0)
                }
                Demand::Nobody => false,
            };
            if own || self.tenants.may_lose(object.tenant, object.grant.bytes()) {
                return Some(index);
            }
            // It waits until its tenant has more than its guarantee, or uses it.
            object.flags.set(PARKED);
            let (tenant, generation) = (object.tenant, object.grant.count());
            self.tenants.park(tenant, Handle { index, generation });
            self.eviction.hold(index);
            if self.tenants.is_stale(tenant) {
                let objects = &self.objects;
                self.tenants.tidy(tenant, |handle| {
                    let object = objects.get(handle.index as usize).and_then(Option::as_ref);
                    object.is_some_and(|object| {
                        object.flags.has(PARKED) && object.grant.count() == handle.generation
                    })
                });
            }
        }
        // All that is left is guaranteed: what is so by default, then one's own, goes all the same.
        loop {
            let unnamed = self.tenants.next_parked_unnamed();
            let handle = unnamed.or_else(|| match demand {
                Demand::Tenant(tenant) => self.tenants.next_parked(tenant),
                _ => None,
            })?;
            if self.object(handle).is_some_and(|object| object.flags.has(PARKED)) {
                return Some(handle.index);
            }
        }
    }

    /// The tenant has so many bytes more than before: as many of those above its guarantee may go.
    fn unpark(&mut self, tenant: u32, bytes: u64) {
        let mut left = self.tenants.above(tenant).min(bytes);
        while left > 0 {
            let Some(handle) = self.tenants.next_parked(tenant) else { return };
            left = left.saturating_sub(self.end_parking(handle));
        }
    }

    /// How many bytes may go now that could not.
    fn end_parking(&mut self, handle: Handle) -> u64 {
        let Some(object) = self.object_mut(handle) else { return 0 };
        if !object.flags.clear(PARKED) {
            return 0;
        }
        let bytes = object.grant.bytes();
        self.eviction.release(handle.index);
        bytes
    }

    /// Other quotas, from now on.
    pub(crate) fn set_quotas(&mut self, quotas: Quotas) {
        for handle in self.tenants.take_parked() {
            self.end_parking(handle);
        }
        self.tenants.set_quotas(quotas);
    }

    /// Nothing keeps it any more.
    fn release(&mut self, index: u32) {
        if let Some(object) = self.objects.get_mut(index as usize).and_then(Option::as_mut) {
            object.flags.set(FREE);
            self.tenants.list(object.tenant, index);
        }
        self.eviction.release(index);
    }

    /// Something keeps it.
    fn hold(&mut self, index: u32) {
        if let Some(object) = self.objects.get_mut(index as usize).and_then(Option::as_mut) {
            object.flags.clear(PARKED);
            if object.flags.clear(FREE) {
                self.tenants.unlist(object.tenant, index);
            }
        }
        self.eviction.hold(index);
    }

    /// A discarded object that nothing keeps.
    fn next_doomed(&mut self) -> Option<u32> {
        while let Some(handle) = self.doomed.pop_front() {
            if let Some(object) = self.object_mut(handle) {
                object.flags.clear(DOOMED);
                if object.pins == 0 {
                    return Some(handle.index);
                }
            }
        }
        None
    }

    /// A discarded object that nothing keeps goes first.
    fn doom(&mut self, handle: Handle) {
        if let Some(object) = self.object_mut(handle)
            && !object.flags.set(DOOMED)
        {
            self.doomed.push_back(handle);
        }
    }

    /// Shows objects of this chunk, whosever they are, among those in the places of `range`; the place
    /// to go on from, `None` at the end. Discarded ones are gone.
    pub(crate) fn find(
        &self,
        chunk: &[u8; 32],
        range: Range<usize>,
        mut show: impl FnMut(Seen<'_>),
    ) -> Option<usize> {
        let end = range.end.min(self.objects.len());
        let places = self.objects.get(range.start..end).unwrap_or_default();
        for object in places.iter().flatten() {
            if object.chunk == *chunk && !object.is_discarded() {
                let (id, space) = (object.id(), &*object.space);
                show(Seen { id, space, visible: object.is_visible() });
            }
        }
        (end < self.objects.len()).then_some(end)
    }

    /// Takes a reserved object out, whatever else hangs on it.
    pub(crate) fn remove_reserved(&mut self, handle: Handle) -> Option<Grant> {
        let object = self.object(handle).filter(|object| !object.is_visible())?;
        let parent = self.parent_of(object);
        let object = self.take(handle.index);
        if let Some(parent) = parent {
            self.unpin(parent);
        }
        if let Some(object) = &object {
            self.tenants.forget_idle(object.tenant);
        }
        object.map(|object| object.grant)
    }

    /// The same; its tenant, who is told, has it on its account until [`Index::discharge`].
    pub(crate) fn set_apart(&mut self, handle: Handle) -> Option<(Grant, u32)> {
        let object = self.object(handle).filter(|object| !object.is_visible())?;
        let (tenant, bytes) = (object.tenant, object.grant.bytes());
        self.tenants.charge(tenant, bytes);
        self.remove_reserved(handle).map(|grant| (grant, tenant))
    }

    /// The tenant has something less.
    pub(crate) fn discharge(&mut self, tenant: u32, bytes: u64) {
        self.tenants.discharge(tenant, bytes);
        self.tenants.forget_idle(tenant);
    }

    fn take(&mut self, index: u32) -> Option<Object> {
        let object = self.objects.get_mut(index as usize)?.take()?;
        self.unused.push(index);
        self.parents.remove(&index);
        if object.flags.has(FREE) {
            self.tenants.unlist(object.tenant, index);
        }
        self.tenants.discharge(object.tenant, object.grant.bytes());
        self.eviction.remove(index);
        if let Some(parent) = self.parent_of(&object)
            && let Some(known) = self.object_mut(parent)
        {
            known.children -= 1;
            if known.children == 0 {
                self.eviction.is_leaf(parent.index, true);
            }
        }
        if !object.is_discarded() {
            self.forget(&object.id(), index); // else another may have the identity
        }
        self.visible -= u64::from(object.is_visible());
        Some(object)
    }

    /// Nobody finds what is there any more.
    fn forget(&mut self, id: &ObjectId, index: u32) {
        self.by_id.remove(self.hashes.hash_one(id.key()), |known| known == index);
    }

    fn object(&self, handle: Handle) -> Option<&Object> {
        let object = self.objects.get(handle.index as usize)?.as_ref()?;
        (object.grant.count() == handle.generation).then_some(object)
    }

    fn object_mut(&mut self, handle: Handle) -> Option<&mut Object> {
        let object = self.objects.get_mut(handle.index as usize)?.as_mut()?;
        (object.grant.count() == handle.generation).then_some(object)
    }

    fn at(&mut self, index: u32) -> Option<&mut Object> {
        self.objects.get_mut(index as usize)?.as_mut()
    }

    fn add_child(&mut self, parent: Handle) {
        if let Some(known) = self.object_mut(parent) {
            known.children += 1;
            if known.children == 1 {
                self.eviction.is_leaf(parent.index, false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::pool::Pool;
    use crate::space::test_space;

    struct Chains {
        pool: Pool,
        index: Index,
    }

    impl Chains {
        fn new() -> Self {
            let mut pool = Pool::new(1 << 20).unwrap();
            pool.grow();
            Self { pool, index: Index::new(Policy::Lru) }
        }

        fn add(&mut self, name: u8, parent: Option<Handle>) -> Handle {
            let id = ObjectId { chunk: [name; 32], space: [0; 32], rank: 0 };
            let grant = self.pool.allocate(4096, self.index.next_place()).unwrap();
            let origin = Origin { space: test_space(), parent: None };
            self.index.reserve(id, origin, grant, parent)
        }

        /// A committed chain, named `first`, `first + 1`, …
        fn chain(&mut self, first: u8, length: u8) -> Vec<Handle> {
            let mut handles: Vec<Handle> = Vec::new();
            for name in first..first + length {
                handles.push(self.add(name, handles.last().copied()));
            }
            for handle in &handles {
                self.index.commit(&[*handle], |_| None);
            }
            handles
        }

        fn use_chain(&mut self, handles: &[Handle]) {
            handles.iter().for_each(|handle| self.index.pin(*handle));
            handles.iter().for_each(|handle| self.index.unpin(*handle));
        }

        fn evict_all(&mut self) -> Vec<u8> {
            let objects = self.index.objects.iter().flatten();
            let ids: HashMap<u64, u8> =
                objects.map(|object| (object.grant.generation(), object.chunk[0])).collect();
            std::iter::from_fn(|| {
                self.index
                    .evict(RemovalCause::Evicted, Demand::Nobody)
                    .map(|grant| ids[&grant.generation()])
            })
            .collect()
        }
    }

    #[test]
    fn children_go_before_parents_in_whatever_order_they_were_committed() {
        let mut store = Chains::new();
        store.chain(0, 4);
        assert_eq!(store.evict_all(), [3, 2, 1, 0]);
    }

    #[test]
    fn the_chain_that_was_used_last_goes_last_and_a_shared_prefix_with_it() {
        let mut store = Chains::new();
        let shared = store.chain(0, 2);
        let left = store.add(10, Some(shared[1]));
        let right = store.add(20, Some(shared[1]));
        store.index.commit(&[left], |_| None);
        store.index.commit(&[right], |_| None);
        store.use_chain(&[shared[0], shared[1], left]);
        assert_eq!(store.evict_all(), [20, 10, 1, 0]);
    }

    #[test]
    fn what_is_leased_stays_and_so_does_the_chain_before_it() {
        let mut store = Chains::new();
        let chain = store.chain(0, 4);
        store.index.pin(chain[2]);
        assert_eq!(store.evict_all(), [3]);
        store.index.unpin(chain[2]);
        assert_eq!(store.evict_all(), [2, 1, 0]);
    }

    #[test]
    fn a_reserved_object_is_seen_by_nobody_and_never_evicted() {
        let mut store = Chains::new();
        let parent = store.chain(0, 1)[0];
        let reserved = store.add(1, Some(parent));
        let id = ObjectId { chunk: [1; 32], space: [0; 32], rank: 0 };
        assert!(store.index.get(&id).is_some());
        assert!(store.index.get_visible(&id).is_none());
        assert_eq!(store.evict_all(), [0; 0]);
        assert!(store.index.remove_reserved(reserved).is_some());
        assert!(store.index.get(&id).is_none());
        assert_eq!(store.evict_all(), [0]);
    }

    #[test]
    fn an_object_whose_parent_went_is_adopted_by_the_next_one() {
        let mut store = Chains::new();
        let first = store.add(0, None);
        let second = store.add(1, Some(first));
        store.index.remove_reserved(first);
        store.index.commit(&[second], |_| None); // its parent was abandoned
        let first = store.add(0, None);
        store.index.commit(&[first], |_| None);
        store.index.adopt(first, second);
        assert_eq!(store.evict_all(), [1, 0]);
    }

    #[test]
    fn a_stale_handle_touches_nothing() {
        let mut store = Chains::new();
        let old = store.add(0, None);
        let grant = store.index.remove_reserved(old).unwrap();
        store.pool.give_back(grant);
        let new = store.add(5, None);
        assert_eq!(old.index, new.index, "the place is used again");
        store.index.commit(&[old], |_| None);
        store.index.unpin(old);
        assert!(store.index.remove_reserved(old).is_none());
        assert!(store.index.grant(new).is_some());
        assert_eq!(store.index.visible(), 0);
    }
}
