//! The cache as an engine sees it. The store (embedded, no socket between) and the client (a server
//! in another process) both implement [`Cache`], so everything above is written once.

use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use crate::events::Events;
use crate::explain::Explanation;
use crate::key::{Key, Layout};
use crate::{Error, ErrorCode, Result};

/// A boxed future, so that [`Cache`] can be a trait object.
pub type CacheFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// Bytes that other processes may change while they are read: a shared-memory pool. There are no
/// references into it, only copies.
pub trait Memory: Any + Send + Sync {
    /// All bytes.
    fn bytes(&self) -> u64;
    /// Copies `into.len()` bytes from `offset`; an error, and nothing copied, when out of bounds.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()>;
    /// Copies `from` to `offset`; an error, and nothing copied, when out of bounds.
    fn write(&self, offset: u64, from: &[u8]) -> Result<()>;

    /// Whether reaching `bytes` at `offset` takes no time of its own: pages of shared memory are mapped when they are
    /// first touched, and that takes milliseconds.
    fn is_mapped(&self, _offset: u64, _bytes: u64) -> bool {
        true
    }

    /// Does so now; `true` is what [`Memory::is_mapped`] says afterwards.
    ///
    /// # Errors
    /// What the system says.
    fn map(&self, _offset: u64, _bytes: u64) -> Result<()> {
        Ok(())
    }

    /// The memory that this one lets others write to only for a time.
    fn guarded(&self) -> Option<&Arc<dyn Memory>> {
        None
    }

    /// To be held by those who write by other ways than [`Memory::write`], and not for long: what ends the
    /// time of writing waits for it.
    ///
    /// # Errors
    /// The time of writing is over.
    fn permit(&self) -> Result<Permit> {
        Ok(Permit::default())
    }
}

/// Leave to write to a [`Memory`], until it is dropped.
#[derive(Default)]
pub struct Permit {
    _held: Option<Box<dyn Send>>,
}

impl Permit {
    /// Leave that ends when `held` is dropped.
    pub fn holding(held: impl Send + 'static) -> Self {
        Self { _held: Some(Box::new(held)) }
    }
}

/// A file that is written by its bytes, for an engine that loads files.
pub trait FileBuffer {
    /// Makes the file `bytes` long and gives all of it for writing; what it held may still be there.
    fn resize(&mut self, bytes: u64) -> Result<&mut [u8]>;
}

/// Where one object lies in the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Bytes from the start of the pool, a multiple of 4096.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// How often the slot has been used; `None` when the server does not say.
    pub generation: Option<u64>,
    /// CRC-64/NVME of the object's `length` bytes, as its writer told it; `None` when it told none, when the
    /// server does not keep them, and as long as the slot is being written.
    pub checksum: Option<u64>,
}

/// What `prepare_store` grants: slots to fill, then commit.
pub struct StoreGrant {
    /// One for each chunk to write.
    pub slots: Vec<Slot>,
    /// The chunk of each slot, counted from the range's start, ascending.
    pub chunk_indices: Vec<u32>,
    /// Chunks at the range's end that did not fit; `None` when the server does not say.
    pub refused: Option<u32>,
    /// The pool as it was mapped when the slots were granted.
    pub memory: Arc<dyn Memory>,
}

/// What `prepare_retrieve` grants: slots to read, one for each chunk of the range, then commit.
pub struct RetrieveGrant {
    /// In the order of the range's chunks.
    pub slots: Vec<Slot>,
    /// The pool as it was mapped when the slots were granted.
    pub memory: Arc<dyn Memory>,
}

/// LMCache's engine-driven operations. Any failure means "compute it": callers turn errors into a
/// miss. Every wait ends at `deadline`, and a call that fails or is dropped leaves no lease and no
/// reservation behind.
pub trait Cache: Send + Sync {
    /// Tokens of one chunk.
    fn chunk_size(&self) -> u32;

    /// Announces objects of this layout; the answer names the instance in later calls. The layout is
    /// remembered until [`Cache::unregister`], over reconnects too.
    fn register(&self, layout: Layout, deadline: Instant) -> CacheFuture<'_, u64>;

    /// Forgets the instance; slots that were granted to it become free.
    fn unregister(&self, instance: u64, deadline: Instant) -> CacheFuture<'_, ()>;

    /// In place of [`Cache::unregister`] where something may write to what the instance was granted for as long as this
    /// process lives: none of it is granted to anybody again until then. What is still ended by its commit or
    /// abandonment, whose caller knows better, comes back.
    fn give_up(&self, instance: u64);

    /// How many leading chunks of `key`'s range every rank has. Takes a lease on each, for each
    /// reader, until it is retrieved, released or the request ends.
    fn lookup<'a>(&'a self, key: &'a Key, deadline: Instant) -> CacheFuture<'a, u64>;

    /// Gives back the leases of the range's chunks (one for each reader).
    fn release<'a>(&'a self, key: &'a Key, deadline: Instant) -> CacheFuture<'a, ()>;

    /// Ends the session: leases that no worker was handed are given back.
    fn end_session<'a>(&'a self, request_id: &'a str, deadline: Instant) -> CacheFuture<'a, ()>;

    /// Reserves slots for the range's chunks that are neither stored nor being written; none as long as the instance
    /// is storing this very range for the request, which it has not committed or abandoned.
    fn prepare_store<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        deadline: Instant,
    ) -> CacheFuture<'a, StoreGrant>;

    /// Makes the reserved chunks visible. `false`: there was nothing to commit, they are not stored.
    ///
    /// `checksums` has the CRC-64/NVME of the bytes in each granted slot, in the order of the slots, or
    /// nothing; readers find them in [`Slot::checksum`]. Servers that do not keep them commit without.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] when there are as many neither as slots nor none; nothing is
    /// committed then, and the slots stay granted.
    fn commit_store<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        checksums: &'a [u64],
        deadline: Instant,
    ) -> CacheFuture<'a, bool>;

    /// Gives the reservation back without making anything visible.
    fn abandon_store<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        deadline: Instant,
    ) -> CacheFuture<'a, ()>;

    /// The slots of the range's chunks; `None` when any of them is gone or was not leased.
    fn prepare_retrieve<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        deadline: Instant,
    ) -> CacheFuture<'a, Option<RetrieveGrant>>;

    /// Drops everything that is neither leased nor being written.
    fn clear(&self, deadline: Instant) -> CacheFuture<'_, ()>;

    /// Drops objects of the instance whose bytes turned out not to be what was stored, so that they are
    /// stored anew. Servers that cannot, keep them.
    fn discard<'a>(
        &'a self,
        _instance: u64,
        _slots: &'a [Slot],
        _deadline: Instant,
    ) -> CacheFuture<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Ends a retrieval, one lease for each chunk. `false`: a slot was used anew in the meantime, what
    /// was copied must be thrown away.
    fn commit_retrieve<'a>(
        &'a self,
        key: &'a Key,
        instance: u64,
        slots: &'a [Slot],
        deadline: Instant,
    ) -> CacheFuture<'a, bool>;

    /// Up to `max` events from `cursor` on, [`EVENTS_MAX`](crate::events::EVENTS_MAX) at most; 0 is the
    /// oldest event that is still known.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedOption`] from a cache without a log of events.
    fn events(&self, _cursor: u64, _max: u32, _deadline: Instant) -> CacheFuture<'_, Events> {
        not_offered("log of events")
    }

    /// Why the key's range is no hit, or how much of it is; for all ranks, and without a lease.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedOption`] from a cache that does not know.
    fn explain<'a>(&'a self, _key: &'a Key, _deadline: Instant) -> CacheFuture<'a, Explanation> {
        not_offered("explanation of misses")
    }
}

/// [`Cache::commit_store`]'s error for checksums that do not go with so many granted slots.
///
/// # Errors
/// [`ErrorCode::InvalidArgument`].
pub fn check_checksums(checksums: &[u64], slots: usize) -> Result<()> {
    if checksums.is_empty() || checksums.len() == slots {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{} checksums were given for {slots} slots; give one for each slot, or none",
        checksums.len()
    )))
}

fn not_offered<'a, T: Send + 'a>(what: &str) -> CacheFuture<'a, T> {
    let message = format!("this cache has no {what}; kvferry's own server and store have one");
    Box::pin(std::future::ready(Err(Error::new(ErrorCode::UnsupportedOption, message))))
}
