//! What a policy would have made of requests that were recorded: they go through a store of their own, whose bytes
//! nobody touches.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_core::{Error, Result};

use crate::embedded::next_instance;
use crate::eviction::Policy;
use crate::pool::PAGE;
use crate::store::{Limits, Store, StoreOptions};

/// Blocks that a replayed store may have at most: its pool is an address range of 16 TiB at most.
const CAPACITY_MAX: u64 = 1 << 31;
const MODEL: &str = "replay";

/// A recorded request.
#[derive(Debug, Clone)]
pub struct Request {
    /// Since the first one. Those that go back in time count as of the latest time.
    pub at: Duration,
    /// Its blocks, by numbers: the same block after the same ones before it.
    pub blocks: Arc<[u32]>,
}

/// What came of requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// How many there were.
    pub requests: u64,
    /// Blocks of all of them.
    pub blocks: u64,
    /// Leading blocks that were there, of all of them.
    pub hits: u64,
    /// Blocks that the policy knows in the end, there or not; 0 where it does not count them.
    pub known: u64,
    /// Bytes that it takes for them.
    pub known_bytes: u64,
}

/// A store of `capacity` blocks that gets requests one by one.
pub struct Replay {
    store: Store,
    owner: crate::store::Owner,
    instance: u64,
    capacity: u64,
    started: Instant,
    now: Duration,
    report: Report,
}

impl Replay {
    /// An empty store for requests of up to `longest` blocks.
    ///
    /// # Errors
    /// `capacity` and `longest` together are 0, or more than 2^31 blocks.
    pub fn new(capacity: u64, longest: u64, policy: Policy) -> Result<Self> {
        // A whole request is offered before anything goes.
        let blocks = capacity.saturating_add(longest);
        if blocks == 0 || blocks > CAPACITY_MAX {
            return Err(Error::invalid(format!(
                "a replay of {capacity} blocks and requests of {longest}: both together must be 1 to {CAPACITY_MAX}"
            )));
        }
        let store = Store::new(StoreOptions {
            chunk_size: 1,
            memory: blocks * PAGE,
            shared_name: None,
            policy,
            disk: None,
            remote: None,
            limits: Limits::default(),
        })?;
        let owner = store.connect();
        let instance = next_instance();
        let layout = Layout {
            model_name: MODEL.to_owned(),
            world_size: 1,
            block_size: 1,
            num_layers: 1,
            hidden_dim_size: 1,
            dtype: Dtype::new("uint8")?,
            single_plane: true,
            num_physical_slots: None,
        };
        store.register(owner, instance, layout)?;
        let (started, now) = (Instant::now(), Duration::ZERO);
        Ok(Self { store, owner, instance, capacity, started, now, report: Report::default() })
    }

    /// Looks the request up, stores what is missing, and takes out what is too much.
    ///
    /// # Errors
    /// It has more blocks than the longest.
    pub fn request(&mut self, request: &Request) -> Result<()> {
        let Self { store, owner, instance, .. } = self;
        self.now = self.now.max(request.at);
        let now = self.started.checked_add(self.now).ok_or_else(|| {
            Error::invalid(format!("a request comes {:?} after the first one", self.now))
        })?;
        let blocks = request.blocks.len() as u64;
        let key = Key {
            model_name: MODEL.to_owned(),
            world_size: 1,
            worker_id: Some(0),
            token_ids: Arc::clone(&request.blocks),
            start: 0,
            end: blocks,
            request_id: "replay".to_owned(),
            cache_salt: String::new(),
            num_kv_readers: 1,
        };
        let hits = store.lookup(*owner, &key, 1, now)?;
        let stored = store.prepare_store(*owner, &key, *instance, now)?;
        if stored.refused > 0 {
            return Err(Error::invalid(format!("a request of {blocks} blocks has no room")));
        }
        if !stored.slots.is_empty() {
            store.commit_store(&key, *instance, &[])?;
        }
        store.end_session(&key.request_id);
        store.trim(self.capacity);
        self.report.requests += 1;
        self.report.blocks += blocks;
        self.report.hits += hits;
        Ok(())
    }

    /// What came of the requests so far.
    pub fn report(&self) -> Report {
        let (bytes, known) = self.store.lock().index.policy_takes().unwrap_or_default();
        Report { known: known as u64, known_bytes: bytes as u64, ..self.report }
    }
}
