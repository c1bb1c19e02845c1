//! The prefix cache over a server that says what it should not: errors and misses, never a panic and
//! nothing outside its slots.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::future::{Future, ready};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use kvferry_core::cache::{Cache, CacheFuture, Memory, RetrieveGrant, Slot, StoreGrant};
use kvferry_core::key::{Key, Layout};
use kvferry_core::prefix::PrefixCache;
use kvferry_core::{Error, ErrorCode, Result};

const CHUNK: u32 = 4;
const PAYLOAD: usize = 100;
const POOL: usize = 8192;

struct Bytes(Mutex<Vec<u8>>);

impl Memory for Bytes {
    fn bytes(&self) -> u64 {
        u64::MAX
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let pool = self.0.lock().unwrap();
        let from = usize::try_from(offset).unwrap();
        let end = from.checked_add(into.len()).ok_or_else(|| Error::invalid("outside"))?;
        into.copy_from_slice(pool.get(from..end).ok_or_else(|| Error::invalid("outside"))?);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let mut pool = self.0.lock().unwrap();
        let to = usize::try_from(offset).unwrap();
        let end = to.checked_add(from.len()).ok_or_else(|| Error::invalid("outside"))?;
        pool.get_mut(to..end).ok_or_else(|| Error::invalid("outside"))?.copy_from_slice(from);
        Ok(())
    }
}

/// Answers every lookup with `hits`, and every prepare with `slots`.
struct Liar {
    hits: u64,
    slots: Vec<Slot>,
    chunk_indices: Vec<u32>,
    memory: Arc<Bytes>,
    abandoned: AtomicUsize,
}

impl Liar {
    fn new(hits: u64, slots: &[(u64, u64)], chunk_indices: &[u32]) -> Arc<Self> {
        let slot = |(offset, length): &(u64, u64)| Slot {
            offset: *offset,
            length: *length,
            generation: None,
            checksum: None,
        };
        Arc::new(Self {
            hits,
            slots: slots.iter().map(slot).collect(),
            chunk_indices: chunk_indices.to_vec(),
            memory: Arc::new(Bytes(Mutex::new(vec![0; POOL]))),
            abandoned: AtomicUsize::new(0),
        })
    }

    fn cache(self: &Arc<Self>) -> PrefixCache {
        let cache: Arc<dyn Cache> = Arc::<Self>::clone(self);
        now(PrefixCache::open(cache, b"model", PAYLOAD as u64, 7, deadline())).unwrap()
    }
}

fn answer<'a, T: Send + 'a>(value: T) -> CacheFuture<'a, T> {
    Box::pin(ready(Ok(value)))
}

impl Cache for Liar {
    fn chunk_size(&self) -> u32 {
        CHUNK
    }

    fn register(&self, _: Layout, _: Instant) -> CacheFuture<'_, u64> {
        answer(1)
    }

    fn unregister(&self, _: u64, _: Instant) -> CacheFuture<'_, ()> {
        answer(())
    }

    fn lookup<'a>(&'a self, _: &'a Key, _: Instant) -> CacheFuture<'a, u64> {
        answer(self.hits)
    }

    fn release<'a>(&'a self, _: &'a Key, _: Instant) -> CacheFuture<'a, ()> {
        answer(())
    }

    fn clear(&self, _: Instant) -> CacheFuture<'_, ()> {
        answer(())
    }

    fn end_session<'a>(&'a self, _: &'a str, _: Instant) -> CacheFuture<'a, ()> {
        answer(())
    }

    fn prepare_store<'a>(&'a self, _: &'a Key, _: u64, _: Instant) -> CacheFuture<'a, StoreGrant> {
        answer(StoreGrant {
            slots: self.slots.clone(),
            chunk_indices: self.chunk_indices.clone(),
            refused: None,
            memory: Arc::<Bytes>::clone(&self.memory),
        })
    }

    fn commit_store<'a>(
        &'a self,
        _: &'a Key,
        _: u64,
        _: &'a [u64],
        _: Instant,
    ) -> CacheFuture<'a, bool> {
        answer(true)
    }

    fn abandon_store<'a>(&'a self, _: &'a Key, _: u64, _: Instant) -> CacheFuture<'a, ()> {
        self.abandoned.fetch_add(1, Ordering::Relaxed);
        answer(())
    }

    fn prepare_retrieve<'a>(
        &'a self,
        _: &'a Key,
        _: u64,
        _: Instant,
    ) -> CacheFuture<'a, Option<RetrieveGrant>> {
        let memory = Arc::<Bytes>::clone(&self.memory);
        answer(Some(RetrieveGrant { slots: self.slots.clone(), memory }))
    }

    fn commit_retrieve<'a>(
        &'a self,
        _: &'a Key,
        _: u64,
        _: &'a [Slot],
        _: Instant,
    ) -> CacheFuture<'a, bool> {
        answer(true)
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

fn tokens(chunks: u32) -> Vec<u32> {
    (0..chunks * CHUNK).collect()
}

#[test]
fn more_hits_than_were_asked_for_are_no_hits() {
    let cache = Liar::new(u64::MAX, &[], &[]).cache();
    assert_eq!(now(cache.lookup(&tokens(2), "", deadline())).unwrap().chunks(), 2);
}

#[test]
fn a_load_with_another_number_of_slots_is_an_error() {
    for slots in [&[][..], &[(0, 4096); 1], &[(0, 4096); 3]] {
        let cache = Liar::new(2, slots, &[]).cache();
        let hit = now(cache.lookup(&tokens(2), "", deadline())).unwrap();
        let error = now(cache.load(&hit, deadline())).map(drop).unwrap_err();
        assert_eq!(error.code, ErrorCode::Protocol);
    }
}

#[test]
fn a_store_of_chunks_that_were_not_asked_for_is_given_back() {
    for indices in [&[2][..], &[u32::MAX], &[0, 1], &[]] {
        let liar = Liar::new(0, &[(0, 4096)], indices);
        let error = now(liar.cache().store(&tokens(2), "", deadline())).map(drop).unwrap_err();
        assert_eq!(error.code, ErrorCode::Protocol, "{indices:?}");
        assert_eq!(liar.abandoned.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn slots_that_do_not_fit_are_neither_read_nor_written() {
    let pool = POOL as u64;
    for slot in [(0, 163), (pool - 100, 4096), (u64::MAX - 63, 4096), (u64::MAX, u64::MAX)] {
        let liar = Liar::new(1, &[slot], &[0]);
        let cache = liar.cache();
        let writing = now(cache.store(&tokens(1), "", deadline())).unwrap();
        assert!(writing.write(0, |next| next(&[0xff; PAYLOAD])).is_err(), "{slot:?}");
        assert!(liar.memory.0.lock().unwrap().iter().all(|byte| *byte == 0), "{slot:?}");
        let hit = now(cache.lookup(&tokens(1), "", deadline())).unwrap();
        let reading = now(cache.load(&hit, deadline())).unwrap().unwrap();
        let read = reading.read(0, |next| next(&mut [0; PAYLOAD]));
        assert!(!read.unwrap_or(false), "{slot:?}");
    }
}
