//! What a paged engine's connectors ask of a cache: the salt of a request is part of every question.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::future::{Future, ready};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use kvferry_core::Result;
use kvferry_core::cache::{Cache, CacheFuture, Memory, RetrieveGrant, Slot, StoreGrant};
use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_core::kv_layout::{KvLayout, Order, Planes};
use kvferry_core::paged::{Place, Range, Scheduler, Worker};

const CHUNK: u32 = 4;

struct NoMemory;

impl Memory for NoMemory {
    fn bytes(&self) -> u64 {
        u64::MAX
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }
}

/// Has everything and room for everything, and remembers the keys that it was asked with.
#[derive(Default)]
struct Recorder {
    asked: Mutex<Vec<(&'static str, Key)>>,
}

impl Recorder {
    fn asked<'a, T: Send + 'a>(&self, by: &'static str, key: &Key, value: T) -> CacheFuture<'a, T> {
        self.asked.lock().unwrap().push((by, key.clone()));
        answer(value)
    }
}

fn answer<'a, T: Send + 'a>(value: T) -> CacheFuture<'a, T> {
    Box::pin(ready(Ok(value)))
}

fn slots() -> Vec<Slot> {
    vec![Slot { offset: 0, length: 8, generation: None, checksum: None }]
}

impl Cache for Recorder {
    fn chunk_size(&self) -> u32 {
        CHUNK
    }

    fn register(&self, _: Layout, _: Instant) -> CacheFuture<'_, u64> {
        answer(1)
    }

    fn unregister(&self, _: u64, _: Instant) -> CacheFuture<'_, ()> {
        answer(())
    }

    fn lookup<'a>(&'a self, key: &'a Key, _: Instant) -> CacheFuture<'a, u64> {
        self.asked("lookup", key, 1)
    }

    fn release<'a>(&'a self, key: &'a Key, _: Instant) -> CacheFuture<'a, ()> {
        self.asked("release", key, ())
    }

    fn clear(&self, _: Instant) -> CacheFuture<'_, ()> {
        answer(())
    }

    fn end_session<'a>(&'a self, _: &'a str, _: Instant) -> CacheFuture<'a, ()> {
        answer(())
    }

    fn prepare_store<'a>(
        &'a self,
        key: &'a Key,
        _: u64,
        _: Instant,
    ) -> CacheFuture<'a, StoreGrant> {
        let memory = Arc::new(NoMemory);
        let grant = StoreGrant { slots: slots(), chunk_indices: vec![0], refused: Some(0), memory };
        self.asked("prepare_store", key, grant)
    }

    fn commit_store<'a>(
        &'a self,
        key: &'a Key,
        _: u64,
        _: &'a [u64],
        _: Instant,
    ) -> CacheFuture<'a, bool> {
        self.asked("commit_store", key, true)
    }

    fn abandon_store<'a>(&'a self, key: &'a Key, _: u64, _: Instant) -> CacheFuture<'a, ()> {
        self.asked("abandon_store", key, ())
    }

    fn prepare_retrieve<'a>(
        &'a self,
        key: &'a Key,
        _: u64,
        _: Instant,
    ) -> CacheFuture<'a, Option<RetrieveGrant>> {
        let grant = RetrieveGrant { slots: slots(), memory: Arc::new(NoMemory) };
        self.asked("prepare_retrieve", key, Some(grant))
    }

    fn commit_retrieve<'a>(
        &'a self,
        key: &'a Key,
        _: u64,
        _: &'a [Slot],
        _: Instant,
    ) -> CacheFuture<'a, bool> {
        self.asked("commit_retrieve", key, true)
    }
}

fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("someone waits"),
    }
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

#[test]
fn the_salt_is_dropped_at_no_operation_of_scheduler_and_worker() {
    let recorder = Arc::new(Recorder::default());
    let cache: Arc<dyn Cache> = Arc::<Recorder>::clone(&recorder);
    let place = Place { model_name: "m".into(), world_size: 1, num_kv_readers: 1 };
    let layout = KvLayout {
        num_layers: 1,
        num_blocks: 4,
        block_size: CHUNK,
        num_kv_heads: 1,
        head_size: 1,
        dtype: Dtype::new("uint8").unwrap(),
        planes: Planes::Separate,
        order: Order::Nhd,
        block_stride: None,
    };
    let range = || Range {
        request_id: "r".into(),
        token_ids: (0..CHUNK).collect(),
        start: 0,
        end: CHUNK.into(),
        cache_salt: "tenant".into(),
    };
    let scheduler = Scheduler::new(Arc::clone(&cache), place.clone()).unwrap();
    let worker = now(Worker::register(cache, place, 0, layout, deadline())).unwrap();

    assert_eq!(now(scheduler.lookup(range(), deadline())).unwrap(), 1);
    now(scheduler.release(range(), deadline())).unwrap();
    let load = now(worker.load(range(), deadline())).unwrap();
    assert!(now(worker.finish(load, None, deadline())).unwrap());
    let store = now(worker.store(range(), deadline())).unwrap();
    assert_eq!(now(worker.commit(store, &[], deadline())).unwrap(), 1);
    let store = now(worker.store(range(), deadline())).unwrap();
    now(worker.abandon(store, deadline())).unwrap();

    let asked = recorder.asked.lock().unwrap();
    let salts: Vec<_> = asked.iter().map(|(by, key)| (*by, &*key.cache_salt)).collect();
    let operations = [
        "lookup",
        "release",
        "prepare_retrieve",
        "commit_retrieve",
        "prepare_store",
        "commit_store",
        "prepare_store",
        "abandon_store",
    ];
    assert_eq!(salts, operations.map(|operation| (operation, "tenant")));
}
