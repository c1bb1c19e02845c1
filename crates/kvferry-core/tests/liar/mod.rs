//! A server that says what it is told to say, for the tests of what rests on a prefix cache.

use std::future::{Future, ready};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use kvferry_core::cache::{Cache, CacheFuture, Memory, RetrieveGrant, Slot, StoreGrant};
use kvferry_core::key::{Key, Layout};
use kvferry_core::prefix::PrefixCache;
use kvferry_core::{Error, Result};

/// Tokens of a chunk.
pub(crate) const CHUNK: u32 = 4;
/// Bytes of the pool.
pub(crate) const POOL: usize = 8192;

/// A pool.
pub(crate) struct Bytes(pub(crate) Mutex<Vec<u8>>);

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
pub(crate) struct Liar {
    hits: u64,
    slots: Vec<Slot>,
    chunk_indices: Vec<u32>,
    pub(crate) memory: Arc<Bytes>,
    pub(crate) abandoned: AtomicUsize,
}

impl Liar {
    pub(crate) fn new(hits: u64, slots: &[(u64, u64)], chunk_indices: &[u32]) -> Arc<Self> {
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

    /// A prefix cache over it, for payloads of so many bytes.
    pub(crate) fn cache(self: &Arc<Self>, payload_bytes: u64) -> PrefixCache {
        let cache: Arc<dyn Cache> = Arc::<Self>::clone(self);
        now(PrefixCache::open(cache, b"model", payload_bytes, 7, deadline())).unwrap()
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

    fn give_up(&self, _: u64) {}

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

pub(crate) fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("someone waits"),
    }
}

pub(crate) fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}
