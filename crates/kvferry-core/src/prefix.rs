//! A prefix cache for engines without paging, over any [`Cache`]: each chunk of a prompt has a payload
//! of bytes that mean something to the engine alone.
//!
//! Every payload is stored behind a header, so that what comes back is checked whatever the server is:
//!
//! ```text
//! 0   "KVFY"
//! 4   u32 version = 1
//! 8   u64 bytes of the payload
//! 16  u64 CRC-64/NVME of the payload
//! 24  u8[32] BLAKE3 of (SHA-256 of the identity, chunk hash, salt): this very chunk, for this engine
//! 56  u64 0
//! 64  the payload; what follows it means nothing
//! ```
//!
//! Little-endian. To a server an object is one layer of uint8 in a single plane, registered under the
//! model name `kvferry/` + the hexadecimal SHA-256 of the identity.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crc_fast::{CrcAlgorithm, Digest};
use sha2::Digest as _;

use crate::cache::{Cache, Memory, Slot};
use crate::checksum::Joiner;
use crate::hash::{ChunkAlgorithm, ChunkHasher};
use crate::key::{Dtype, Key, Layout, check_salt};
use crate::{Error, ErrorCode, Result};

const HEADER: usize = 64;
const MAGIC: [u8; 4] = *b"KVFY";
const VERSION: u32 = 1;
/// Bytes that are copied before they are summed: they are still in the processor's cache then.
const PIECE: usize = 64 << 10;

/// Chunks of prompts by their tokens, for one engine configuration.
pub struct PrefixCache {
    cache: Arc<dyn Cache>,
    hasher: ChunkHasher,
    chunk_size: u32,
    identity: [u8; 32],
    model_name: String,
    payload_bytes: u64,
    instance: u64,
    /// Tells this cache's requests from those of others at the same server.
    nonce: u64,
    requests: AtomicU64,
    stores: Arc<Mutex<Stores>>,
    /// Its readings count, too: who sees that a chunk is damaged finds it counted.
    damaged: Arc<AtomicU64>,
}

/// Stores under way. Unregistering gives their slots to others, so it waits for the last of them.
#[derive(Default)]
struct Stores {
    under_way: usize,
    closed: bool,
}

/// One of them, until it is dropped.
struct UnderWay(Arc<Mutex<Stores>>);

/// What a lookup found, leased until it is loaded or released.
pub struct Hit {
    key: Key,
    chunks: u32,
    hashes: Vec<[u8; 32]>,
}

/// Chunks being loaded.
pub struct Reading {
    slots: Vec<Slot>,
    memory: Arc<dyn Memory>,
    identities: Vec<[u8; 32]>,
    payload_bytes: u64,
    /// Places of slots whose bytes were not what was stored.
    damaged: Mutex<BTreeSet<usize>>,
    /// The cache's.
    damaged_chunks: Arc<AtomicU64>,
}

/// Chunks being stored.
pub struct Writing {
    key: Key,
    slots: Vec<Slot>,
    chunks: Vec<u32>,
    refused: Option<u32>,
    memory: Arc<dyn Memory>,
    identities: Vec<[u8; 32]>,
    payload_bytes: u64,
    under_way: UnderWay,
}

/// A chunk's payload on its way to or from its slot.
pub struct Passage {
    /// The slot, among those of its reading or writing.
    place: usize,
    /// Where the payload begins in the pool.
    start: u64,
    /// The payload's bytes that go by: those from `from` on, until `at` so far.
    from: u64,
    at: u64,
    digest: Digest,
    /// What the header says, of a reading.
    checksum: u64,
}

impl PrefixCache {
    /// Registers with `cache`. `identity` is everything that the payloads depend on besides tokens and
    /// salt (model, precision, engine release, …), in any form that is always the same;
    /// `payload_bytes` (≥ 1) is the size of one chunk's payload; `nonce` is random.
    pub async fn open(
        cache: Arc<dyn Cache>,
        identity: &[u8],
        payload_bytes: u64,
        nonce: u64,
        deadline: Instant,
    ) -> Result<Self> {
        let chunk_size = cache.chunk_size();
        let hasher = ChunkHasher::new(ChunkAlgorithm::Blake3, chunk_size)?;
        let identity: [u8; 32] = sha2::Sha256::digest(identity).into();
        let mut model_name = "kvferry/".to_owned();
        for byte in identity {
            let _ = write!(model_name, "{byte:02x}"); // writing into a String cannot fail
        }
        let hidden = payload_bytes
            .checked_add(HEADER as u64)
            .filter(|_| payload_bytes > 0)
            .and_then(|bytes| u32::try_from(bytes.div_ceil(u64::from(chunk_size))).ok())
            .ok_or_else(|| {
                Error::invalid(format!(
                    "a chunk's payload of {payload_bytes} bytes is not in 1 byte..=chunk size × 4 GiB"
                ))
            })?;
        let layout = Layout {
            model_name: model_name.clone(),
            world_size: 1,
            block_size: chunk_size,
            num_layers: 1,
            hidden_dim_size: hidden,
            dtype: Dtype::new("uint8")?,
            single_plane: true,
            num_physical_slots: None,
        };
        let instance = cache.register(layout, deadline).await?;
        Ok(Self {
            cache,
            hasher,
            chunk_size,
            identity,
            model_name,
            payload_bytes,
            instance,
            nonce,
            requests: AtomicU64::new(0),
            stores: Arc::default(),
            damaged: Arc::default(),
        })
    }

    /// Tokens of one chunk.
    pub fn chunk_size(&self) -> u32 {
        self.chunk_size
    }

    /// Chunks that came back with other bytes than were stored, since this cache was opened.
    pub fn damaged_chunks(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }

    /// Bytes of one chunk's payload.
    pub fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// Which leading whole chunks of `tokens` are stored for `salt` ("" is none). They are leased: end
    /// with [`PrefixCache::load`] and [`PrefixCache::finish`], or [`PrefixCache::finish`] alone.
    pub async fn lookup(&self, tokens: &[u32], salt: &str, deadline: Instant) -> Result<Hit> {
        let (mut key, hashes) = self.key(tokens, salt)?;
        if hashes.is_empty() {
            return Ok(Hit { key, chunks: 0, hashes });
        }
        let chunks = self.cache.lookup(&key, deadline).await?.min(hashes.len() as u64);
        key.end = chunks * u64::from(self.chunk_size);
        if chunks == 0 {
            // There is nothing to end for who asked; if this fails, the session ends by itself.
            let _ = self.cache.end_session(&key.request_id, deadline).await;
        }
        Ok(Hit { key, chunks: u32::try_from(chunks).unwrap_or(u32::MAX), hashes })
    }

    /// Begins to load the hit's chunks; `None` when they are gone after all.
    pub async fn load(&self, hit: &Hit, deadline: Instant) -> Result<Option<Reading>> {
        if hit.chunks == 0 {
            return Ok(None);
        }
        let grant = self.cache.prepare_retrieve(&hit.key, self.instance, deadline).await?;
        let Some(grant) = grant else { return Ok(None) };
        if grant.slots.len() != hit.chunks as usize {
            let message =
                format!("the server granted {} slots for {} chunks", grant.slots.len(), hit.chunks);
            return Err(Error::new(ErrorCode::Protocol, message));
        }
        Ok(Some(Reading {
            slots: grant.slots,
            memory: grant.memory,
            identities: self.identities(&hit.hashes, &hit.key.cache_salt),
            payload_bytes: self.payload_bytes,
            damaged: Mutex::default(),
            damaged_chunks: Arc::clone(&self.damaged),
        }))
    }

    /// Ends a hit: what was read of it (if anything) and its leases. `false`: a slot was used anew while
    /// it was read, so what was read must not be used.
    pub async fn finish(
        &self,
        hit: &Hit,
        reading: Option<Reading>,
        deadline: Instant,
    ) -> Result<bool> {
        let mut held = Ok(true);
        if let Some(reading) = reading {
            let damaged = reading.damaged.into_inner().unwrap_or_else(PoisonError::into_inner);
            let damaged = damaged.into_iter().filter_map(|place| reading.slots.get(place).cloned());
            let damaged: Vec<Slot> = damaged.collect();
            if !damaged.is_empty() {
                // They stay a miss when this fails.
                let _ = self.cache.discard(self.instance, &damaged, deadline).await;
            }
            held =
                self.cache.commit_retrieve(&hit.key, self.instance, &reading.slots, deadline).await;
        }
        if hit.key.end > 0 {
            self.cache.end_session(&hit.key.request_id, deadline).await?;
        }
        held
    }

    /// Reserves room for those whole chunks of `tokens` that are not stored yet. Ends with
    /// [`PrefixCache::commit`] or [`PrefixCache::abandon`].
    pub async fn store(&self, tokens: &[u32], salt: &str, deadline: Instant) -> Result<Writing> {
        let (key, hashes) = self.key(tokens, salt)?;
        let under_way = self.begin_store()?;
        let grant = self.cache.prepare_store(&key, self.instance, deadline).await?;
        let fits = grant.slots.len() == grant.chunk_indices.len()
            && grant.chunk_indices.iter().all(|chunk| (*chunk as usize) < hashes.len());
        if !fits {
            let _ = self.cache.abandon_store(&key, self.instance, deadline).await;
            return Err(Error::new(
                ErrorCode::Protocol,
                format!(
                    "the server granted slots for chunks that were not asked: {:?}",
                    grant.chunk_indices
                ),
            ));
        }
        let identities = self.identities(&hashes, salt);
        Ok(Writing {
            key,
            slots: grant.slots,
            chunks: grant.chunk_indices,
            refused: grant.refused,
            memory: grant.memory,
            identities,
            payload_bytes: self.payload_bytes,
            under_way,
        })
    }

    /// Makes what was written visible. `false`: it is not stored.
    pub async fn commit(&self, writing: Writing, deadline: Instant) -> Result<bool> {
        let committed = match writing.slots.is_empty() {
            true => Ok(true),
            false => self.cache.commit_store(&writing.key, self.instance, &[], deadline).await,
        };
        self.end_store(writing, deadline).await;
        committed
    }

    /// Gives the reserved room back.
    pub async fn abandon(&self, writing: Writing, deadline: Instant) -> Result<()> {
        let abandoned = match writing.slots.is_empty() {
            true => Ok(()),
            false => self.cache.abandon_store(&writing.key, self.instance, deadline).await,
        };
        self.end_store(writing, deadline).await;
        abandoned
    }

    /// Unregisters: at once, or when the last store that is under way is committed or abandoned. The
    /// stored chunks stay.
    pub async fn close(&self, deadline: Instant) -> Result<()> {
        {
            let mut stores = lock(&self.stores);
            if std::mem::replace(&mut stores.closed, true) || stores.under_way > 0 {
                return Ok(());
            }
        }
        self.cache.unregister(self.instance, deadline).await
    }

    fn begin_store(&self) -> Result<UnderWay> {
        let mut stores = lock(&self.stores);
        if stores.closed {
            return Err(Error::new(
                ErrorCode::Closed,
                "the prefix cache was closed; open another one",
            ));
        }
        stores.under_way += 1;
        Ok(UnderWay(Arc::clone(&self.stores)))
    }

    async fn end_store(&self, writing: Writing, deadline: Instant) {
        drop(writing.under_way);
        let last = {
            let stores = lock(&self.stores);
            stores.closed && stores.under_way == 0
        };
        if last {
            let _ = self.cache.unregister(self.instance, deadline).await; // the connection's end does it
        }
    }

    fn key(&self, tokens: &[u32], salt: &str) -> Result<(Key, Vec<[u8; 32]>)> {
        check_salt(salt)?;
        let chunk = self.chunk_size as usize;
        let tokens = &tokens[..tokens.len() / chunk * chunk];
        let mut hashes = Vec::with_capacity(tokens.len() / chunk);
        self.hasher.extend(&mut hashes, tokens);
        let request = self.requests.fetch_add(1, Ordering::Relaxed);
        let key = Key {
            model_name: self.model_name.clone(),
            world_size: 1,
            worker_id: Some(0),
            token_ids: tokens.into(),
            start: 0,
            end: tokens.len() as u64,
            request_id: format!("kvferry-{:016x}-{request}", self.nonce),
            cache_salt: salt.to_owned(),
            num_kv_readers: 1,
        };
        Ok((key, hashes))
    }

    fn identities(&self, hashes: &[[u8; 32]], salt: &str) -> Vec<[u8; 32]> {
        let identity = |hash: &[u8; 32]| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&self.identity).update(hash).update(salt.as_bytes());
            *hasher.finalize().as_bytes()
        };
        hashes.iter().map(identity).collect()
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        lock(&self.0).under_way -= 1;
    }
}

fn lock(stores: &Mutex<Stores>) -> MutexGuard<'_, Stores> {
    stores.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hit {
    /// Leading chunks that are stored.
    pub fn chunks(&self) -> u32 {
        self.chunks
    }
}

impl Reading {
    /// Chunks that can be read.
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    /// Reads one chunk: `into` gets a function that fills its argument with the payload's next bytes, and
    /// takes all of the payload through it. `false`: the bytes are not what was stored, and must not be
    /// used. The check is over the bytes as they arrived, so later changes in the pool do not matter.
    pub fn read(
        &self,
        chunk: u32,
        into: impl FnOnce(&mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<()>,
    ) -> Result<bool> {
        let Some(mut passage) = self.begin(chunk, 0)? else { return Ok(false) };
        into(&mut |bytes| self.next(&mut passage, bytes))?;
        self.end([&passage])
    }

    /// Begins to read a chunk in several goes, from byte `from` of its payload on; `None` when it is not what was
    /// stored, by its header.
    pub fn begin(&self, chunk: u32, from: u64) -> Result<Option<Passage>> {
        let place = chunk as usize;
        let (Some(slot), Some(identity)) = (self.slots.get(place), self.identities.get(place))
        else {
            return Err(Error::invalid(format!(
                "chunk {chunk} is not among the {} of the hit",
                self.chunks()
            )));
        };
        let Some(start) = payload_start(slot, self.payload_bytes) else { return Ok(None) };
        let mut header = [0; HEADER];
        self.memory.read(slot.offset, &mut header)?;
        match parse_header(&header, self.payload_bytes, identity) {
            Some(checksum) => {
                Ok(Some(Passage { from, at: from, checksum, ..Passage::new(place, start) }))
            }
            None => {
                self.note_damage(place);
                Ok(None)
            }
        }
    }

    /// Fills `bytes` with the payload's next ones.
    pub fn next(&self, passage: &mut Passage, bytes: &mut [u8]) -> Result<()> {
        for piece in bytes.chunks_mut(PIECE) {
            let at = passage.advance(piece.len(), self.payload_bytes)?;
            self.memory.read(at, piece)?;
            passage.digest.update(piece);
        }
        Ok(())
    }

    /// Whether what was read is what was stored, see [`Reading::read`]: of one chunk, in passages that follow each other
    /// from the payload's first byte to its last.
    pub fn end<'a>(&self, passages: impl IntoIterator<Item = &'a Passage>) -> Result<bool> {
        let (mut place, mut at, mut sum, mut expected) = (0, 0, 0, None);
        let mut joiner = Joiner::default();
        for passage in passages {
            if passage.from != at {
                return Err(Error::invalid(format!(
                    "a payload was read until byte {at}, and from byte {} on",
                    passage.from
                )));
            }
            sum = joiner.join(sum, passage.digest.finalize(), passage.at - at);
            (place, at) = (passage.place, passage.at);
            expected.get_or_insert(passage.checksum);
        }
        if at != self.payload_bytes {
            return Err(Error::invalid(format!(
                "{at} of the payload's {} bytes were read",
                self.payload_bytes
            )));
        }
        let whole = expected == Some(sum);
        if !whole {
            self.note_damage(place);
        }
        Ok(whole)
    }

    fn note_damage(&self, place: usize) {
        if self.damaged.lock().unwrap_or_else(PoisonError::into_inner).insert(place) {
            self.damaged_chunks.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Passage {
    fn new(place: usize, start: u64) -> Self {
        Self {
            place,
            start,
            from: 0,
            at: 0,
            digest: Digest::new(CrcAlgorithm::Crc64Nvme),
            checksum: 0,
        }
    }

    /// Where the payload's next `length` bytes begin in the pool.
    fn advance(&mut self, length: usize, payload_bytes: u64) -> Result<u64> {
        let (from, end) = (self.at, self.at + length as u64);
        if end > payload_bytes {
            return Err(too_long(end, payload_bytes));
        }
        self.at = end;
        Ok(self.start + from)
    }
}

impl Writing {
    /// The chunks to write, counted from the prompt's start, ascending. The others are stored, are
    /// being written by someone else, or did not fit.
    pub fn chunks(&self) -> &[u32] {
        &self.chunks
    }

    /// Chunks that did not fit; `None` when the server does not say.
    pub fn refused(&self) -> Option<u32> {
        self.refused
    }

    /// Writes one of [`Writing::chunks`], by its place there: `from` gets a function that appends to the
    /// payload, and gives it all of the payload.
    pub fn write(
        &self,
        place: usize,
        from: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let mut passage = self.begin(place)?;
        from(&mut |bytes| self.next(&mut passage, bytes))?;
        self.end(&passage)
    }

    /// Begins to write one of [`Writing::chunks`] in several goes.
    pub fn begin(&self, place: usize) -> Result<Passage> {
        let Some(slot) = self.slots.get(place) else {
            return Err(Error::invalid(format!(
                "place {place} is not among the {} to write",
                self.slots.len()
            )));
        };
        let start = payload_start(slot, self.payload_bytes).ok_or_else(|| {
            let Slot { offset, length, .. } = slot;
            Error::new(
                ErrorCode::Protocol,
                format!("the server's slot of {length} bytes at {offset} cannot hold the chunk"),
            )
        })?;
        Ok(Passage::new(place, start))
    }

    /// Appends to the payload.
    pub fn next(&self, passage: &mut Passage, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(PIECE) {
            let at = passage.advance(piece.len(), self.payload_bytes)?;
            self.memory.write(at, piece)?;
            passage.digest.update(piece);
        }
        Ok(())
    }

    /// Writes the header, which makes a chunk of the payload.
    pub fn end(&self, passage: &Passage) -> Result<()> {
        if passage.at != self.payload_bytes {
            return Err(Error::invalid(format!(
                "{} of the payload's {} bytes were written",
                passage.at, self.payload_bytes
            )));
        }
        let (slot, chunk) = (&self.slots[passage.place], self.chunks[passage.place]);
        let identity = &self.identities[chunk as usize];
        let header = header(self.payload_bytes, passage.digest.finalize(), identity);
        self.memory.write(slot.offset, &header)
    }
}

/// Where the payload begins in the pool, if the slot has room for it.
fn payload_start(slot: &Slot, payload_bytes: u64) -> Option<u64> {
    slot.offset.checked_add(slot.length)?;
    let fits = slot.length >= HEADER as u64 + payload_bytes;
    fits.then_some(slot.offset + HEADER as u64)
}

fn too_long(bytes: u64, payload_bytes: u64) -> Error {
    Error::invalid(format!("{bytes} bytes are more than the payload's {payload_bytes}"))
}

fn header(payload_bytes: u64, checksum: u64, identity: &[u8; 32]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&MAGIC);
    header[4..8].copy_from_slice(&VERSION.to_le_bytes());
    header[8..16].copy_from_slice(&payload_bytes.to_le_bytes());
    header[16..24].copy_from_slice(&checksum.to_le_bytes());
    header[24..56].copy_from_slice(identity);
    header
}

/// The payload's checksum, if the header is this very chunk's.
fn parse_header(bytes: &[u8; HEADER], payload_bytes: u64, identity: &[u8; 32]) -> Option<u64> {
    let checksum = u64::from_le_bytes(bytes[16..24].try_into().ok()?);
    (*bytes == header(payload_bytes, checksum, identity)).then_some(checksum)
}
