//! The store as the engine's own cache: the same operations as through a server, no socket between.

use std::future::ready;
use std::mem::forget;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kvferry_core::cache::{Cache, CacheFuture, RetrieveGrant, Slot, StoreGrant};
use kvferry_core::events::Events;
use kvferry_core::explain::Explanation;
use kvferry_core::key::{Key, Layout};
use tokio::time::timeout_at;

use crate::clock::now;
use crate::store::{Departure, Owner, Store};

/// A peer of a store in the same process. Dropping it gives back what it held.
pub struct Embedded {
    store: Store,
    owner: Owner,
}

/// Instances of embedded engines; servers' peers choose their own, at random and below 2^63.
static INSTANCES: AtomicU64 = AtomicU64::new(1 << 63);

pub(crate) fn next_instance() -> u64 {
    INSTANCES.fetch_add(1, Ordering::Relaxed)
}

impl Embedded {
    /// A new peer of `store`.
    pub fn new(store: Store) -> Self {
        let owner = store.connect();
        Self { store, owner }
    }
}

/// Ends a session unless forgotten: whoever gives up waiting must not leave leases.
struct EndSession<'a> {
    store: &'a Store,
    request_id: &'a str,
}

impl Drop for EndSession<'_> {
    fn drop(&mut self) {
        self.store.end_session(self.request_id);
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        // Whoever copies holds this peer, so no copy is under way, unless its instance was given up.
        self.store.disconnect(self.owner, Departure::Left);
    }
}

impl Cache for Embedded {
    fn chunk_size(&self) -> u32 {
        self.store.chunk_size()
    }

    fn register(&self, layout: Layout, _deadline: Instant) -> CacheFuture<'_, u64> {
        let instance = next_instance();
        Box::pin(ready(self.store.register(self.owner, instance, layout).map(|()| instance)))
    }

    fn unregister(&self, instance: u64, _deadline: Instant) -> CacheFuture<'_, ()> {
        self.store.unregister(instance);
        Box::pin(ready(Ok(())))
    }

    fn give_up(&self, instance: u64) {
        self.store.give_up_instance(self.owner, instance);
    }

    fn lookup<'a>(&'a self, key: &'a Key, deadline: Instant) -> CacheFuture<'a, u64> {
        Box::pin(async move {
            let (store, request_id, begin) = (&self.store, &key.request_id, now());
            // What has come by the deadline is worth more than an error just after it.
            let until = deadline - deadline.saturating_duration_since(begin) / 8;
            let until = until.min(begin + store.lock().limits.promotion);
            store.lookup_until(self.owner, key, 1, begin, Some(until))?;
            if let Some(hit) = store.take_hit(request_id, begin) {
                return Ok(hit);
            }
            let given_up = EndSession { store, request_id };
            let hit = match timeout_at(until.into(), store.hit(request_id)).await {
                Ok(hit) => hit,
                Err(_) => store.take_hit(request_id, until.max(now())).unwrap_or(0),
            };
            forget(given_up);
            Ok(hit)
        })
    }

    fn release<'a>(&'a self, key: &'a Key, _deadline: Instant) -> CacheFuture<'a, ()> {
        Box::pin(ready(self.store.release(key, 1, now())))
    }

    fn end_session<'a>(&'a self, request_id: &'a str, _deadline: Instant) -> CacheFuture<'a, ()> {
        self.store.end_session(request_id);
        Box::pin(ready(Ok(())))
    }

    fn prepare_store<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        _deadline: Instant,
    ) -> CacheFuture<'a, StoreGrant> {
        let reserved = self.store.prepare_store(self.owner, key, instance, now());
        Box::pin(ready(reserved.map(|reserved| StoreGrant {
            slots: reserved.slots,
            chunk_indices: reserved.chunk_indices,
            refused: Some(reserved.refused),
            memory: self.store.memory(),
        })))
    }

    fn commit_store<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        checksums: &'a [u64],
        _deadline: Instant,
    ) -> CacheFuture<'a, bool> {
        Box::pin(ready(self.store.commit_store(key, instance, checksums)))
    }

    fn abandon_store<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        _deadline: Instant,
    ) -> CacheFuture<'a, ()> {
        Box::pin(ready(self.store.abandon_store(key, instance)))
    }

    fn prepare_retrieve<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        _deadline: Instant,
    ) -> CacheFuture<'a, Option<RetrieveGrant>> {
        let slots = self.store.prepare_retrieve(self.owner, key, instance, now());
        let memory = self.store.memory();
        Box::pin(ready(slots.map(|slots| slots.map(|slots| RetrieveGrant { slots, memory }))))
    }

    fn clear(&self, _deadline: Instant) -> CacheFuture<'_, ()> {
        self.store.clear();
        Box::pin(ready(Ok(())))
    }

    fn discard<'a>(
        &'a self,
        _instance: u64,
        slots: &'a [Slot],
        _deadline: Instant,
    ) -> CacheFuture<'a, ()> {
        self.store.discard(slots.iter().filter_map(|slot| slot.generation));
        Box::pin(ready(Ok(())))
    }

    fn commit_retrieve<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        _slots: &'a [Slot],
        _deadline: Instant,
    ) -> CacheFuture<'a, bool> {
        // What was granted stays until this very call: there are no generations to compare.
        Box::pin(ready(self.store.commit_retrieve(self.owner, key, instance)))
    }

    fn events(&self, cursor: u64, max: u32, _deadline: Instant) -> CacheFuture<'_, Events> {
        Box::pin(ready(Ok(self.store.events(cursor, max))))
    }

    fn explain<'a>(&'a self, key: &'a Key, _deadline: Instant) -> CacheFuture<'a, Explanation> {
        Box::pin(async move { Ok(self.store.explain(key, |_| "unnamed".into())?.await) })
    }
}
