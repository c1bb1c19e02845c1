//! What a paged engine's connectors ask of a cache: the salt of a request is part of every question, and loads and
//! stores in one go end what they began.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::future::{Future, pending, ready};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use kvferry_core::cache::{Cache, CacheFuture, Memory, RetrieveGrant, Slot, StoreGrant};
use kvferry_core::copy_plan::{CopyPlan, CopyShape, Direction};
use kvferry_core::copying::{Copying, KvMemory, Progress, copying};
use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_core::kv_layout::{KvLayout, Order, Planes};
use kvferry_core::paged::{Place, Range, Scheduler, Worker};
use kvferry_core::transfer::{Blocks, Transfer};
use kvferry_core::{Error, ErrorCode, Result};

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
    /// Loads find nothing any more.
    gone: bool,
    /// Nothing that ends is answered.
    hangs: bool,
    /// The checksums of commits.
    sums: Mutex<Vec<u64>>,
    /// How the instance ended.
    instance: Mutex<Vec<&'static str>>,
}

impl Recorder {
    fn asked<'a, T: Send + 'a>(&self, by: &'static str, key: &Key, value: T) -> CacheFuture<'a, T> {
        self.asked.lock().unwrap().push((by, key.clone()));
        answer(value)
    }
}

impl Recorder {
    fn ending<'a, T: Send + 'a>(
        &self,
        by: &'static str,
        key: &Key,
        value: T,
    ) -> CacheFuture<'a, T> {
        let answer = self.asked(by, key, value);
        if self.hangs { Box::pin(pending()) } else { answer }
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
        self.instance.lock().unwrap().push("unregister");
        answer(())
    }

    fn give_up(&self, instance: u64) {
        assert_eq!(instance, 1);
        self.instance.lock().unwrap().push("give_up");
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
        checksums: &'a [u64],
        _: Instant,
    ) -> CacheFuture<'a, bool> {
        self.sums.lock().unwrap().extend(checksums);
        self.asked("commit_store", key, true)
    }

    fn abandon_store<'a>(&'a self, key: &'a Key, _: u64, _: Instant) -> CacheFuture<'a, ()> {
        self.ending("abandon_store", key, ())
    }

    fn prepare_retrieve<'a>(
        &'a self,
        key: &'a Key,
        _: u64,
        _: Instant,
    ) -> CacheFuture<'a, Option<RetrieveGrant>> {
        let grant = RetrieveGrant { slots: slots(), memory: Arc::new(NoMemory) };
        self.asked("prepare_retrieve", key, (!self.gone).then_some(grant))
    }

    fn commit_retrieve<'a>(
        &'a self,
        key: &'a Key,
        _: u64,
        _: &'a [Slot],
        _: Instant,
    ) -> CacheFuture<'a, bool> {
        self.ending("commit_retrieve", key, true)
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

fn worker(recorder: &Arc<Recorder>) -> (Scheduler, Worker) {
    let cache: Arc<dyn Cache> = Arc::<Recorder>::clone(recorder);
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
    let scheduler = Scheduler::new(Arc::clone(&cache), place.clone()).unwrap();
    (scheduler, now(Worker::register(cache, place, 0, layout, deadline())).unwrap())
}

fn range() -> Range {
    Range {
        request_id: "r".into(),
        token_ids: (0..CHUNK).collect(),
        start: 0,
        end: CHUNK.into(),
        cache_salt: "tenant".into(),
    }
}

#[test]
fn the_salt_is_dropped_at_no_operation_of_scheduler_and_worker() {
    let recorder = Arc::new(Recorder::default());
    let (scheduler, worker) = worker(&recorder);

    assert_eq!(now(scheduler.lookup(range(), deadline())).unwrap(), 1);
    now(scheduler.release(range(), deadline())).unwrap();
    let load = now(worker.load(range(), deadline())).unwrap();
    assert!(now(worker.finish(load, None, deadline())).unwrap());
    let store = now(worker.store(range(), deadline())).unwrap();
    assert_eq!(now(worker.commit(store, &[], deadline())).unwrap(), 1);
    let store = now(worker.store(range(), deadline())).unwrap();
    now(worker.abandon(store, None, deadline())).unwrap();

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

/// Memory whose copies go on as a test says.
struct Slow {
    shape: Arc<CopyShape>,
    copies: Mutex<Vec<(Direction, Option<Progress>)>>,
    refuses: bool,
    /// Its copies may be under way for ever.
    in_doubt: bool,
}

impl Slow {
    fn of(worker: &Worker) -> Self {
        let shape = Arc::clone(worker.shape());
        Self { shape, copies: Mutex::default(), refuses: false, in_doubt: false }
    }

    /// Ends the copy that was begun last.
    fn end(&self, result: Result<()>) {
        let progress = self.progress();
        progress.checksums(vec![7]);
        progress.end(result);
    }

    fn progress(&self) -> Progress {
        self.copies.lock().unwrap().last_mut().unwrap().1.take().unwrap()
    }

    fn begun(&self) -> Vec<Direction> {
        self.copies.lock().unwrap().iter().map(|(direction, _)| *direction).collect()
    }
}

impl KvMemory for Slow {
    fn shape(&self) -> &Arc<CopyShape> {
        &self.shape
    }

    fn copy(&self, plan: CopyPlan, _: Arc<dyn Memory>, _: bool) -> Result<Copying> {
        if self.refuses {
            return Err(broken());
        }
        let (progress, copying) = copying();
        self.copies.lock().unwrap().push((plan.direction(), Some(progress)));
        Ok(copying)
    }

    fn close(&self) {}

    fn doubt(&self) -> Option<Error> {
        self.in_doubt.then(broken)
    }
}

fn broken() -> Error {
    Error::new(ErrorCode::CudaFailed, "the device is lost")
}

fn blocks<'a>(memory: &'a Slow, blocks: &'a [u32], verify: bool) -> Blocks<'a> {
    Blocks { memory, blocks, skip: 0, verify }
}

const MINUTE: Duration = Duration::from_secs(60);

fn operations(recorder: &Recorder) -> Vec<&'static str> {
    recorder.asked.lock().unwrap().drain(..).map(|(by, _)| by).collect()
}

#[test]
fn a_store_is_committed_when_its_copy_has_ended_and_not_before() {
    let recorder = Arc::new(Recorder::default());
    let (_, worker) = worker(&recorder);
    for verify in [false, true] {
        let (memory, transfer) = (Slow::of(&worker), Transfer::default());
        let mut context = Context::from_waker(Waker::noop());
        let mut store =
            pin!(worker.store_blocks(range(), blocks(&memory, &[2], verify), &transfer, MINUTE));
        let mut copied = pin!(transfer.copied(usize::MAX));
        assert!(copied.as_mut().poll(&mut context).is_pending(), "nobody was asked yet");
        assert!(store.as_mut().poll(&mut context).is_pending());
        assert!(copied.as_mut().poll(&mut context).is_pending());
        assert_eq!(operations(&recorder), ["prepare_store"]);
        assert!(!transfer.forbid(), "it has begun");
        memory.end(Ok(()));
        assert_eq!(copied.as_mut().poll(&mut context), Poll::Ready(Ok(())));
        assert_eq!(store.as_mut().poll(&mut context), Poll::Ready(Ok(1)));
        assert_eq!(operations(&recorder), ["commit_store"]);
        assert_eq!(memory.begun(), [Direction::Gather]);
    }
    assert_eq!(*recorder.sums.lock().unwrap(), [7, 7]);
}

#[test]
fn a_store_that_cannot_be_copied_gives_its_room_back() {
    let recorder = Arc::new(Recorder::default());
    let (_, worker) = worker(&recorder);
    let transfer = Transfer::default();
    let mut memory = Slow::of(&worker);
    {
        let mut store =
            pin!(worker.store_blocks(range(), blocks(&memory, &[0], false), &transfer, MINUTE));
        let mut context = Context::from_waker(Waker::noop());
        assert!(store.as_mut().poll(&mut context).is_pending());
        memory.end(Err(broken()));
        assert_eq!(store.as_mut().poll(&mut context), Poll::Ready(Err(broken())));
        assert_eq!(now(transfer.copied(1)), Err(broken()));
    }
    memory.refuses = true;
    let transfer = Transfer::default();
    let refused = worker.store_blocks(range(), blocks(&memory, &[0], false), &transfer, MINUTE);
    assert_eq!(now(refused), Err(broken()));
    assert_eq!(now(transfer.copied(1)), Ok(()), "nobody waits for what will not be");
    let wrong = worker.store_blocks(range(), blocks(&memory, &[9], false), &transfer, MINUTE);
    assert_eq!(now(wrong).unwrap_err().code, ErrorCode::InvalidArgument);
    assert_eq!(operations(&recorder), ["prepare_store", "abandon_store"].repeat(3));
}

#[test]
fn a_store_that_ends_in_doubt_gives_nothing_back_and_is_the_workers_last() {
    let recorder = Arc::new(Recorder::default());
    let (_, worker) = worker(&recorder);
    let (memory, transfer) = (Slow::of(&worker), Transfer::default());
    let from = blocks(&memory, &[0], false);
    {
        let mut store = pin!(worker.store_blocks(range(), from, &transfer, MINUTE));
        let mut context = Context::from_waker(Waker::noop());
        assert!(store.as_mut().poll(&mut context).is_pending());
        memory.progress().end_in_doubt(broken());
        assert_eq!(store.as_mut().poll(&mut context), Poll::Ready(Err(broken())));
    }
    assert_eq!(operations(&recorder), ["prepare_store"], "neither committed nor abandoned");
    let later = Transfer::default();
    assert_eq!(now(worker.store_blocks(range(), from, &later, MINUTE)), Err(broken()));
    assert_eq!(now(worker.load_blocks(range(), from, &later, MINUTE)), Err(broken()));
    worker.close(&memory);
    now(worker.unregister(deadline())).unwrap();
    assert_eq!(operations(&recorder), [""; 0]);
    assert_eq!(*recorder.instance.lock().unwrap(), ["give_up"]);
}

#[test]
fn memory_that_is_closed_in_doubt_is_given_up_and_other_memory_unregistered() {
    for (in_doubt, end) in [(true, "give_up"), (false, "unregister")] {
        let recorder = Arc::new(Recorder::default());
        let (_, worker) = worker(&recorder);
        // Of a store that was begun nobody waits for the end.
        let _store = now(worker.store(range(), deadline())).unwrap();
        worker.close(&Slow { in_doubt, ..Slow::of(&worker) });
        now(worker.unregister(deadline())).unwrap();
        assert_eq!(*recorder.instance.lock().unwrap(), [end]);
    }
}

#[test]
fn a_copy_that_was_forbidden_never_begins() {
    let recorder = Arc::new(Recorder::default());
    let (_, worker) = worker(&recorder);
    let (memory, transfer) = (Slow::of(&worker), Transfer::default());
    assert!(transfer.forbid());
    assert!(!transfer.forbid(), "once");
    assert_eq!(now(transfer.copied(1)), Ok(()));
    let from = blocks(&memory, &[0], false);
    assert_eq!(now(worker.store_blocks(range(), from, &transfer, MINUTE)), Ok(0));
    assert_eq!(now(worker.load_blocks(range(), from, &transfer, MINUTE)), Ok(0));
    assert!(memory.begun().is_empty());
    let asked = ["prepare_store", "abandon_store", "prepare_retrieve", "commit_retrieve"];
    assert_eq!(operations(&recorder), asked);
}

#[test]
fn a_load_ends_its_leases_however_it_ends() {
    let recorder = Arc::new(Recorder::default());
    let (_, worker) = worker(&recorder);
    // Late reads of a slot harm nobody: its lease ends in doubt, too.
    for (verify, end, expected) in [
        (false, Some(Ok(())), Ok(1)),
        (true, Some(Ok(())), Ok(0)),
        (false, Some(Err(broken())), Err(broken())),
        (false, None, Err(broken())),
    ] {
        let (memory, transfer) = (Slow::of(&worker), Transfer::default());
        let mut load =
            pin!(worker.load_blocks(range(), blocks(&memory, &[3], verify), &transfer, MINUTE));
        let mut context = Context::from_waker(Waker::noop());
        assert!(load.as_mut().poll(&mut context).is_pending());
        assert_eq!(operations(&recorder), ["prepare_retrieve"]);
        match end {
            Some(end) => memory.end(end),
            None => memory.progress().end_in_doubt(broken()),
        }
        // With `verify` nothing may be used: the slot's writer told no checksum.
        assert_eq!(load.as_mut().poll(&mut context), Poll::Ready(expected));
        assert_eq!(operations(&recorder), ["commit_retrieve"]);
        assert_eq!(memory.begun(), [Direction::Scatter]);
    }
    let (memory, transfer) = (Slow::of(&worker), Transfer::default());
    let wrong = worker.load_blocks(range(), blocks(&memory, &[4], false), &transfer, MINUTE);
    assert_eq!(now(wrong).unwrap_err().code, ErrorCode::InvalidArgument);
    assert_eq!(operations(&recorder), ["prepare_retrieve", "commit_retrieve"]);
}

#[test]
fn a_load_of_what_is_gone_copies_nothing() {
    let recorder = Arc::new(Recorder { gone: true, ..Recorder::default() });
    let (_, worker) = worker(&recorder);
    let (memory, transfer) = (Slow::of(&worker), Transfer::default());
    let gone = worker.load_blocks(range(), blocks(&memory, &[0], false), &transfer, MINUTE);
    assert_eq!(now(gone), Ok(0));
    assert_eq!(now(transfer.copied(1)), Ok(()));
    assert!(memory.begun().is_empty());
}

#[test]
fn nobody_waits_for_a_copy_that_could_not_begin_until_the_cache_has_answered_that() {
    let recorder = Arc::new(Recorder { hangs: true, ..Recorder::default() });
    let (_, worker) = worker(&recorder);
    let memory = Slow { refuses: true, ..Slow::of(&worker) };
    let mut context = Context::from_waker(Waker::noop());
    for wrong in [0, 9] {
        let (numbers, transfer) = ([wrong], Transfer::default());
        let blocks = blocks(&memory, &numbers, false);
        let mut store = pin!(worker.store_blocks(range(), blocks, &transfer, MINUTE));
        assert!(store.as_mut().poll(&mut context).is_pending());
        assert_eq!(now(transfer.copied(1)), Ok(()));
        assert!(!transfer.forbid(), "it failed, and was not dropped");
        let transfer = Transfer::default();
        let mut load = pin!(worker.load_blocks(range(), blocks, &transfer, MINUTE));
        assert!(load.as_mut().poll(&mut context).is_pending());
        assert_eq!(now(transfer.copied(1)), Ok(()));
    }
}
