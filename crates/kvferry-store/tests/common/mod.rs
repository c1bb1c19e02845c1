//! Engines on a store of their own, for tests that look at what the store tells of it.

#![allow(dead_code, reason = "no test file uses all of it")]

use std::time::Instant;

use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_store::{Limits, Owner, Policy, Store, StoreOptions};

/// Tokens of a chunk.
pub(crate) const CHUNK: u32 = 4;
/// One object is a page.
pub(crate) const OBJECT: u64 = 4096;

/// Objects of a page.
pub(crate) fn layout(model: &str, world_size: u32) -> Layout {
    Layout {
        model_name: model.into(),
        world_size,
        block_size: 2,
        num_layers: 1,
        hidden_dim_size: 1024,
        dtype: Dtype::new("uint8").unwrap(),
        single_plane: true,
        num_physical_slots: None,
    }
}

/// `chunks` chunks of model "m" of a prompt that begins with `first`.
pub(crate) fn key(first: u32, chunks: u64) -> Key {
    let end = chunks * u64::from(CHUNK);
    Key {
        model_name: "m".into(),
        world_size: 1,
        worker_id: Some(0),
        token_ids: (first..).take(usize::try_from(end).unwrap() + 1).collect(),
        start: 0,
        end,
        request_id: format!("request {first}"),
        cache_salt: String::new(),
        num_kv_readers: 1,
    }
}

/// A store, and a peer of it.
pub(crate) struct Engine {
    pub(crate) store: Store,
    pub(crate) owner: Owner,
    pub(crate) now: Instant,
}

impl Engine {
    /// Room for so many objects; nothing is registered.
    pub(crate) fn new(objects: u64) -> Self {
        Self::with(objects, Policy::Lru)
    }

    /// The same, emptied by another policy.
    pub(crate) fn with(objects: u64, policy: Policy) -> Self {
        let store = Store::new(StoreOptions {
            chunk_size: CHUNK,
            memory: objects * OBJECT,
            shared_name: None,
            policy,
            disk: None,
            remote: None,
            limits: Limits::default(),
        })
        .unwrap();
        let owner = store.connect();
        Self { store, owner, now: Instant::now() }
    }

    /// The same, with model "m" registered as instance 1.
    pub(crate) fn registered(objects: u64) -> Self {
        let engine = Self::new(objects);
        engine.register(1, layout("m", 1));
        engine
    }

    pub(crate) fn register(&self, instance: u64, layout: Layout) {
        self.store.register(self.owner, instance, layout).unwrap();
    }

    /// Reserves, without a commit; how many chunks.
    pub(crate) fn reserve(&self, key: &Key, instance: u64) -> usize {
        self.store.prepare_store(self.owner, key, instance, self.now).unwrap().slots.len()
    }

    /// Stores, whatever lies in the slots; how many chunks were new.
    pub(crate) fn put_as(&self, key: &Key, instance: u64) -> usize {
        let new = self.reserve(key, instance);
        assert_eq!(self.store.commit_store(key, instance, &[]).unwrap(), new > 0);
        new
    }

    pub(crate) fn put(&self, key: &Key) -> usize {
        self.put_as(key, 1)
    }

    /// Looks up, and leases what is there; how many chunks.
    pub(crate) fn lookup(&self, key: &Key) -> u64 {
        self.store.lookup(self.owner, key, 1, self.now).unwrap()
    }

    /// Has the store drop these chunks, as a reader does whose bytes were not what was stored.
    pub(crate) fn discard(&self, key: &Key) -> u64 {
        assert_eq!(self.lookup(key), key.end / u64::from(CHUNK));
        let slots = self.store.prepare_retrieve(self.owner, key, 1, self.now).unwrap().unwrap();
        let dropped = self.store.discard(slots.iter().map(|slot| slot.generation.unwrap()));
        self.store.commit_retrieve(self.owner, key, 1).unwrap();
        self.store.end_session(&key.request_id);
        dropped
    }
}

/// Runs a future that never waits for anything but itself.
pub(crate) fn finish<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
}
