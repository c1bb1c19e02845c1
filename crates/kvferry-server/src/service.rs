//! From a message to its answer: what LMCache's operations mean for the store.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::key::Key;
use kvferry_core::kv_descriptors::KvRegistration;
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_store::{EngineMemory, GoOn, Owner, READ_HOLD, Store, clock};
use kvferry_wire::message::{Control, EXTENSION, Hello, KV_EVENT_STREAM, Slots, StoreSlots, Value};
use kvferry_wire::{Header, Operation, Reply, Request};
use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::figures::Figures;
use crate::frames::Frames;
use crate::lmcache_driven::{Copiers, Engines};
use crate::notes::Level;
use crate::quotas::Labels;
use crate::streams::{Streams, Subscription, places};
use crate::waits::Waits;

/// How long a registration is answered late, so that there is room for the first stores.
const GROWTH: Duration = Duration::from_millis(500);
/// Objects that are stored first, as far as there shall be room.
const FIRST: u64 = 16;
/// Between two looks at whether there is.
const GROWTH_LOOK: Duration = Duration::from_millis(5);

/// One connection, as the store knows it.
pub(crate) struct Peer {
    owner: Owner,
    /// It said hello: it gets what LMCache's replies cannot say.
    extended: bool,
    /// It may do what concerns everybody.
    admin: bool,
    /// It takes and gives bytes in frames.
    frames: Option<Frames>,
    engines: Engines,
    streams: Streams,
    waits: Waits,
    /// The last time that nothing was there from it: what it asks now, it asked then at the earliest.
    waits_since: Instant,
    distant: bool,
}

impl Peer {
    pub(crate) fn new(owner: Owner) -> Self {
        let (engines, streams, waits) = Default::default();
        let (extended, admin, frames, distant) = (false, false, None, false);
        let waits_since = Instant::now();
        Self { owner, extended, admin, frames, engines, streams, waits, waits_since, distant }
    }

    /// Of another machine, which cannot have mapped the pool, whatever it says.
    pub(crate) fn distant(owner: Owner) -> Self {
        Self { frames: Some(Frames::default()), distant: true, ..Self::new(owner) }
    }

    /// Whether it writes to the pool by itself.
    pub(crate) fn is_distant(&self) -> bool {
        self.distant
    }

    /// Whether it is a client of kvferry's.
    pub(crate) fn is_ours(&self) -> bool {
        self.extended
    }

    /// Nothing more was there from it.
    pub(crate) fn is_heard_out(&mut self) {
        self.waits_since = Instant::now();
    }

    #[cfg(test)]
    pub(crate) fn waits_since(&self) -> Instant {
        self.waits_since
    }

    /// Whether there may be more for it than answers.
    pub(crate) fn listens(&self) -> bool {
        !self.streams.is_empty() || !self.waits.is_empty()
    }

    pub(crate) fn make_admin(&mut self) {
        self.admin = true;
    }

    pub(crate) fn owner(&self) -> Owner {
        self.owner
    }
}

/// Answers messages; keeps count of those that it does not.
pub(crate) struct Service {
    store: Store,
    /// As an admin's connection is told.
    hello: Hello,
    figures: Arc<Figures>,
    labels: Labels,
    copiers: Copiers,
    /// Of streams.
    places: Arc<Semaphore>,
    /// Which time it is that something arrived.
    turns: AtomicU64,
}

impl Service {
    pub(crate) fn new(
        store: Store,
        boot_token: [u8; 16],
        figures: Arc<Figures>,
        labels: Labels,
    ) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let segment = store.segment();
        let hello = Hello {
            boot_token,
            version,
            pid: std::process::id(),
            admin: true,
            segment,
            read_hold_ms: u32::try_from(READ_HOLD.as_millis()).unwrap_or(u32::MAX),
        };
        let (copiers, places, turns) = (Copiers::default(), places(), AtomicU64::new(0));
        Self { store, hello, figures, labels, copiers, places, turns }
    }

    /// Counts that something arrived; two of a peer are one apart where no other's came between them.
    pub(crate) fn next_turn(&self) -> u64 {
        self.turns.fetch_add(1, Ordering::Relaxed)
    }

    /// The reply to a message; `None` for one that LMCache would not answer either. It is counted.
    pub(crate) async fn answer(
        &self,
        peer: &mut Peer,
        frames: &[Bytes],
        now: Instant,
    ) -> Option<Vec<Bytes>> {
        if let Some(control) = Control::decode(frames) {
            match control {
                Ok((uid, control)) => peer.streams.control(uid, control),
                Err(error) => self.drop_message(error.label()),
            }
            return None;
        }
        let (header, payload) = match Header::decode(frames) {
            Ok(message) => message,
            Err(error) => {
                self.drop_message(error.label());
                return None;
            }
        };
        let reply = match Request::decode(header.operation, payload) {
            Ok(_) if needs_admin(header.operation) && !peer.admin => Err("not_admin"),
            Ok(Request::SubscribeKvEvents { instance_id, model_name, cursor, max_events }) => {
                let wanted = Subscription { instance: instance_id, model_name, cursor, max_events };
                let places = peer.admin.then_some(&self.places);
                match peer.streams.begin(&self.store, places, &header, wanted) {
                    Ok(refused) => return refused, // all that a stream says comes from `told`
                    Err(error) => Err(error.code.as_str()),
                }
            }
            Ok(Request::WaitPrefetchStatus { request_id, timeout_s })
                if peer.waits.have_room_for(&request_id) =>
            {
                let Some(hit) = self.store.take_hit(&request_id, now) else {
                    peer.waits.begin(&header, request_id, now + self.wait(timeout_s));
                    self.figures.observe(header.operation, now.elapsed());
                    return None; // it is answered by `told`
                };
                Ok(Reply::Integer(hit))
            }
            Ok(request) => {
                self.carry_out(peer, request, now).await.map_err(|error| error.code.as_str())
            }
            Err(error) => Err(error.label()),
        };
        let reply = match reply {
            Ok(reply) => reply,
            Err(label) => {
                self.drop_message(label);
                refusal(header.operation)?
            }
        };
        let reply = header.reply(&if peer.extended { reply } else { reply.plain() });
        self.figures.observe(header.operation, now.elapsed());
        Some(reply)
    }

    /// The next message of the peer's streams, or the next answer that it waits for, whenever that is.
    pub(crate) async fn told(&self, peer: &mut Peer) -> Vec<Bytes> {
        let Peer { streams, waits, .. } = peer;
        tokio::select! {
            biased;
            answer = waits.next(&self.store), if !waits.is_empty() => answer,
            message = self.store.after_events(|| streams.next(&self.store)),
                if !streams.is_empty() => message,
        }
    }

    /// How long a request that waits for a prefetch waits. At its lookup's deadline there is an answer, however long it would.
    fn wait(&self, timeout_s: f64) -> Duration {
        Duration::try_from_secs_f64(timeout_s).unwrap_or_default().min(self.store.promotion())
    }

    /// Counts what was dropped, by why.
    pub(crate) fn drop_message(&self, label: &'static str) {
        self.figures.drop_message(label);
    }

    async fn carry_out(&self, peer: &mut Peer, request: Request, now: Instant) -> Result<Reply> {
        let (store, owner) = (&self.store, peer.owner);
        Ok(match request {
            Request::Lookup { key, tp_size } => {
                store.lookup(owner, &key.key, ranks(tp_size)?, now)?;
                Reply::None
            }
            Request::WaitPrefetchStatus { request_id, timeout_s } => {
                // More at once than are kept beside the connection's other requests: these wait, too.
                let most = self.wait(timeout_s);
                let hit = match store.take_hit(&request_id, now) {
                    None => tokio::time::timeout(most, store.hit(&request_id)).await.ok(),
                    hit => hit,
                };
                // Past the lookup's deadline there is an answer, too.
                hit.or_else(|| store.take_hit(&request_id, clock::now()))
                    .map_or(Reply::None, Reply::Integer)
            }
            Request::QueryPrefetchStatus { request_id } => {
                store.take_hit(&request_id, now).map_or(Reply::None, Reply::Integer)
            }
            Request::FreeLookupLocks { key, tp_size } => {
                store.release(&key.key, ranks(tp_size)?, now)?;
                Reply::None
            }
            Request::EndSession { request_id } => {
                store.end_session(&request_id);
                Reply::None
            }
            Request::Register { instance_id, layout } => {
                let object_bytes = layout.object_bytes(store.chunk_size())?;
                let registered = store.register(owner, instance_id, layout);
                registered.inspect_err(|error| self.note_refusal(error))?;
                self.wait_for_room(object_bytes).await;
                let (shm_name, pool_size) = store.pool();
                Reply::Registered { shm_name, pool_size }
            }
            Request::Unregister { instance_id } => {
                // Its slots would be others' while its own peer still writes to them.
                match store.may_unregister(owner, instance_id, peer.distant) {
                    true => store.unregister(instance_id),
                    false => self.drop_message("not_its_own"),
                }
                Reply::None
            }
            Request::PrepareStore { key, instance_id } => {
                self.prepare_store(peer, &key.key, instance_id, now)?
            }
            Request::CommitStore { key, instance_id } => {
                if let Some(frames) = &mut peer.frames {
                    // What no piece was written to has the bytes of whoever had the slot before.
                    let reserved = store.reserved(&key.key, instance_id)?;
                    if !frames.take_whole(instance_id, &reserved) {
                        store.abandon_store(&key.key, instance_id)?;
                    }
                }
                Reply::Boolean(store.commit_store(&key.key, instance_id, &[])?)
            }
            Request::PrepareRetrieve { key, instance_id } => {
                let slots = store.prepare_retrieve(owner, &key.key, instance_id, now)?;
                if let (Some(frames), Some(slots)) = (&mut peer.frames, &slots) {
                    frames.lend_to_read(store, instance_id, slots);
                }
                Reply::RetrieveSlots(slots.map(|slots| self.slots(slots, instance_id)))
            }
            Request::CommitRetrieve { key, instance_id } => {
                store.commit_retrieve(owner, &key.key, instance_id)?;
                if let Some(frames) = &mut peer.frames
                    && store.retrievals(instance_id) == 0
                {
                    frames.end_reads(instance_id);
                }
                Reply::Boolean(true) // as LMCache: there is nothing to be done about "false"
            }
            Request::RegisterKvCache { instance_id, registration } => {
                let bytes = self.register_memory(peer, instance_id, registration).await?;
                self.wait_for_room(bytes).await;
                Reply::None
            }
            Request::UnregisterKvCache { instance_id } => {
                peer.engines.unregister(instance_id).await;
                Reply::None
            }
            Request::Store { key, instance_id, block_ids, event } => {
                let copy = move |engine: &EngineMemory, blocks: &[u32], go_on: GoOn<'_>| {
                    engine.store(&key.key, blocks, go_on)
                };
                let (engines, since) = (&peer.engines, peer.waits_since);
                let copied = self.copiers.copy(engines, instance_id, block_ids, event, since, copy);
                let (event, done) = copied.await?;
                Reply::Copied { event, done }
            }
            Request::Retrieve { key, instance_id, block_ids, event, skip_first_n_tokens } => {
                let skip = u32::try_from(skip_first_n_tokens).unwrap_or(u32::MAX);
                let copy = move |engine: &EngineMemory, blocks: &[u32], go_on: GoOn<'_>| {
                    engine.retrieve(&key.key, blocks, skip, go_on)
                };
                let (engines, since) = (&peer.engines, peer.waits_since);
                let copied = self.copiers.copy(engines, instance_id, block_ids, event, since, copy);
                let (event, done) = copied.await?;
                Reply::Copied { event, done }
            }
            Request::Clear { .. } => {
                let detail = format!("{} objects, for a peer", store.clear());
                self.figures.notes.add(Level::Info, "cleared", "peer", detail);
                Reply::None
            }
            Request::GetChunkSize => Reply::Integer(store.chunk_size().into()),
            Request::Ping { .. } => Reply::Boolean(true),
            Request::ReportBlockAllocation { .. } => Reply::None,
            Request::Noop => Reply::Text("OK".into()),
            Request::GetExperimental => {
                let named = [EXTENSION, Operation::Checksums.name(), Operation::Frames.name()];
                // Who may not listen goes on by what it stores itself.
                let streams = peer.admin.then_some(KV_EVENT_STREAM);
                Reply::Names(named.into_iter().chain(streams).map(str::to_owned).collect())
            }
            Request::SubscribeKvEvents { .. } => {
                return Err(Error::new(ErrorCode::Protocol, "a stream has no single answer"));
            }
            Request::Hello => {
                peer.extended = true;
                Reply::Hello(Hello { admin: peer.admin, ..self.hello.clone() })
            }
            Request::AbandonStore { key, instance_id } => {
                if let Some(frames) = &mut peer.frames {
                    frames.take_whole(instance_id, &store.reserved(&key.key, instance_id)?);
                }
                store.abandon_store(&key.key, instance_id)?;
                Reply::None
            }
            Request::Confirm { offsets, generations, .. } => {
                let held = offsets.len() == generations.len()
                    && store.holds(offsets.into_iter().zip(generations));
                Reply::Boolean(held)
            }
            // A peer without the pool has offsets of its own.
            Request::Discard { instance_id, generations, .. } => {
                Reply::Integer(store.discard_read(instance_id, generations))
            }
            Request::Checksums { instance_id, offsets, generations, checksums } => {
                let slots = offsets.into_iter().zip(generations);
                Reply::Integer(store.keep_checksums(instance_id, slots.zip(checksums)))
            }
            Request::Frames => {
                peer.frames.get_or_insert_default();
                Reply::None
            }
            Request::Write { instance_id, offset, generation, at, piece } => {
                let (slot, bytes) = ((offset, generation), piece.data().len() as u64);
                let may = |frames: &&mut Frames| frames.may(instance_id, slot, at, bytes, true);
                let Some(frames) = peer.frames.as_mut().filter(may) else {
                    return Ok(Reply::Boolean(false));
                };
                self.map(offset, at, bytes).await;
                Reply::Boolean(frames.write(store, instance_id, slot, at, &piece))
            }
            Request::Read { instance_id, offset, generation, at, bytes } => {
                let slot = (offset, generation);
                let may = |frames: &&mut Frames| frames.may(instance_id, slot, at, bytes, false);
                let Some(frames) = peer.frames.as_mut().filter(may) else {
                    return Ok(Reply::Piece(None));
                };
                self.map(offset, at, bytes).await;
                Reply::Piece(frames.read(store, instance_id, slot, at, bytes))
            }
            Request::Status => Reply::Status(self.status(now)),
            Request::Events { cursor, max } => Reply::Events(store.events(cursor, max)),
            // Looks at all objects; other connections are served in between.
            Request::Explain { key } => {
                let labels = self.labels;
                let explaining = store.explain(&key.key, move |salt| labels.of(salt))?;
                Reply::Explanation(explaining.await)
            }
        })
    }

    /// Waits until there is room for the objects that are stored first, where memory is being reserved for them.
    async fn wait_for_room(&self, object_bytes: u64) {
        let until = Instant::now() + GROWTH;
        while self.store.lacks_room(FIRST * object_bytes) && Instant::now() < until {
            sleep(GROWTH_LOOK).await;
        }
    }

    /// The bytes of an object of what is registered. A refusal is noted with its reason: the engine is answered all the same,
    /// and goes on without the cache.
    async fn register_memory(
        &self,
        peer: &mut Peer,
        instance: u64,
        registration: KvRegistration,
    ) -> Result<u64> {
        let registered = if peer.distant {
            let message = "an engine of another machine has no memory here";
            Err(Error::new(ErrorCode::UnsupportedOption, message))
        } else {
            let (store, engines) = (&self.store, &mut peer.engines);
            self.copiers.register(store, engines, instance, registration).await
        };
        registered.inspect_err(|error| self.note_refusal(error))
    }

    /// An engine was not registered, and its peer is not told why.
    fn note_refusal(&self, error: &Error) {
        let (code, reason) = (error.code.as_str(), error.message.clone());
        self.figures.notes.add(Level::Warn, "engine_refused", code, reason);
    }

    fn prepare_store(
        &self,
        peer: &mut Peer,
        key: &Key,
        instance: u64,
        now: Instant,
    ) -> Result<Reply> {
        let reserved = self.store.prepare_store(peer.owner, key, instance, now)?;
        if let Some(frames) = &mut peer.frames {
            frames.lend_to_write(&self.store, instance, &reserved.slots, &reserved.objects);
        }
        Ok(Reply::StoreSlots(Some(StoreSlots {
            slots: self.slots(reserved.slots, instance),
            chunk_indices: reserved.chunk_indices,
            refused: Some(reserved.refused),
        })))
    }

    /// Maps pages of the pool that this process has not touched yet on another thread: it takes milliseconds, once.
    async fn map(&self, offset: u64, at: u64, bytes: u64) {
        let (memory, place) = (self.store.memory(), offset.saturating_add(at));
        if !memory.is_mapped(place, bytes) {
            // Whoever copies tries again, and says so.
            let _ = tokio::task::spawn_blocking(move || memory.map(place, bytes)).await;
        }
    }

    fn slots(&self, slots: Vec<kvferry_core::cache::Slot>, instance: u64) -> Slots {
        let shape = self.store.shape(instance).filter(|_| !slots.is_empty());
        let (shape, dtype) = shape.map(|shape| (shape.dimensions, shape.dtype)).unwrap_or_default();
        Slots { slots, shape, dtype }
    }

    fn status(&self, now: Instant) -> Vec<(String, Value)> {
        let mut status: Vec<(String, Value)> = vec![
            ("version".into(), Value::Text(self.hello.version.clone())),
            ("pid".into(), Value::Integer(self.hello.pid.into())),
            ("uptime_seconds".into(), Value::Float(self.figures.uptime(now).as_secs_f64())),
        ];
        let count = |value: u64| Value::Integer(i64::try_from(value).unwrap_or(i64::MAX));
        let figures = self.figures.store(&self.store, now).into_iter();
        status.extend(figures.map(|(name, value)| (name.to_owned(), count(value))));
        if let Some(disk) = self.store.disk_status() {
            let figures = disk.figures().into_iter();
            status.extend(figures.map(|(name, value)| (name.to_owned(), count(value))));
            let failure = disk.failed.unwrap_or_default();
            status.push(("disk_failure".into(), Value::Text(failure)));
        }
        if let Some(remote) = self.store.remote_status() {
            let figures = remote.figures().into_iter();
            status.extend(figures.map(|(name, value)| (name.to_owned(), count(value))));
            let failure = remote.failed.unwrap_or_default();
            status.push(("remote_failure".into(), Value::Text(failure)));
        }
        let dropped = self.figures.dropped();
        status.push(("dropped_messages".into(), count(dropped.values().sum())));
        let by_reason = dropped.into_iter();
        status.extend(
            by_reason
                .map(|(why, dropped)| (format!("dropped_{}", why.to_lowercase()), count(dropped))),
        );
        status
    }
}

/// Whether this concerns other peers too: it empties everybody's cache, or tells of everybody's salts and models.
fn needs_admin(operation: Operation) -> bool {
    matches!(
        operation,
        Operation::Clear | Operation::Status | Operation::Events | Operation::Explain
    )
}

/// What a client is told when its request makes no sense or cannot be served. A prepare is always
/// answered, and so is what has the server copy: vLLM's worker ends when it is not. The others are met with silence, as LMCache does.
fn refusal(operation: Operation) -> Option<Reply> {
    Some(match operation {
        Operation::PrepareStore => Reply::StoreSlots(Some(StoreSlots::default())),
        Operation::PrepareRetrieve => Reply::RetrieveSlots(None),
        Operation::RegisterKvCache => Reply::None,
        Operation::Store | Operation::Retrieve => {
            Reply::Copied { event: Bytes::new(), done: false }
        }
        Operation::CommitStore | Operation::Confirm | Operation::Write => Reply::Boolean(false),
        Operation::CommitRetrieve => Reply::Boolean(true),
        Operation::Discard | Operation::Checksums => Reply::Integer(0),
        Operation::Read => Reply::Piece(None),
        _ => return None,
    })
}

/// `tp_size` in the range that the store takes.
fn ranks(tp_size: u64) -> Result<u32> {
    u32::try_from(tp_size).map_err(|_| Error::invalid(format!("tp_size {tp_size} is out of range")))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;
    use std::process::Command;
    use std::sync::atomic::AtomicBool;

    use kvferry_core::key::{Dtype, Layout};
    use kvferry_core::kv_descriptors::{KvDescriptor, KvStorage};
    use kvferry_store::disk::DiskOptions;
    use kvferry_store::{Limits, Policy, StoreOptions};
    use kvferry_wire::Dialect;

    use super::*;

    #[tokio::test]
    async fn a_peer_of_another_machine_registers_no_memory_of_this_one() {
        let options = StoreOptions {
            chunk_size: 16,
            memory: 1 << 20,
            shared_name: None,
            policy: Policy::Lru,
            disk: None,
            remote: None,
            limits: Limits::default(),
        };
        let store = Store::new(options).unwrap();
        let name = format!("/lmcache_kv_service_{}", std::process::id());
        let segment = format!("/dev/shm{name}");
        std::fs::write(&segment, [0; 4096]).unwrap();
        let tensor = KvDescriptor {
            storage: KvStorage::Segment { shm_name: name, bytes: 4096 },
            dtype: Dtype::new("uint8").unwrap(),
            shape: vec![4, 16, 64],
            stride: vec![1024, 64, 1],
            storage_offset: 0,
        };
        let registration = KvRegistration {
            model_name: "m".into(),
            world_size: 1,
            engine_type: "vllm".into(),
            kv_layout: None,
            groups: Vec::new(),
            layers: vec![tensor],
        };
        let service =
            Service::new(store.clone(), [0; 16], Arc::new(Figures::new()), Labels([0; 32]));
        for (mut peer, expected) in [
            (Peer::new(store.connect()), Ok(Reply::None)),
            (Peer::distant(store.connect()), Err(ErrorCode::UnsupportedOption)),
        ] {
            let registration = registration.clone();
            let request = Request::RegisterKvCache { instance_id: 1, registration };
            let answer = service.carry_out(&mut peer, request, Instant::now()).await;
            assert_eq!(answer.map_err(|error| error.code), expected);
        }
        std::fs::remove_file(segment).unwrap();
    }

    #[tokio::test]
    async fn who_registers_is_answered_when_there_is_room_for_what_it_stores_first() {
        let options = StoreOptions {
            chunk_size: 16,
            memory: 256 << 20,
            shared_name: Some(format!("kvferry_grown_{}", std::process::id())),
            policy: Policy::Lru,
            disk: None,
            remote: None,
            limits: Limits::default(),
        };
        let store = Store::new(options).unwrap();
        let service =
            Service::new(store.clone(), [0; 16], Arc::new(Figures::new()), Labels([0; 32]));
        let mut peer = Peer::new(store.connect());
        let layout = Layout {
            model_name: "m".into(),
            world_size: 1,
            block_size: 16,
            num_layers: 1,
            hidden_dim_size: 512 << 10, // of 16 tokens 8 MiB, of which 16 shall have room
            dtype: Dtype::new("uint8").unwrap(),
            single_plane: true,
            num_physical_slots: None,
        };
        let request = Request::Register { instance_id: 1, layout };
        let asked = Instant::now();
        service.carry_out(&mut peer, request, asked).await.unwrap();
        let waited = asked.elapsed();
        let figures = store.status(Instant::now());
        let figure = |name| figures.iter().find(|(known, _)| *known == name).unwrap().1;
        assert!(figure("reserved_bytes") >= 128 << 20 || waited >= GROWTH, "{figures:?}");
    }

    #[tokio::test]
    async fn who_waits_for_a_prefetch_is_answered_at_the_lookups_deadline_whatever_the_disk_does() {
        let directory =
            std::env::temp_dir().join(format!("kvferry-service-{}", std::process::id()));
        let start = || {
            let limits = Limits { promotion: Duration::from_millis(200), ..Limits::default() };
            let options = StoreOptions {
                chunk_size: 16,
                memory: 1 << 20,
                shared_name: None,
                policy: Policy::Lru,
                disk: Some(DiskOptions::new(&directory, 1 << 20)),
                remote: None,
                limits,
            };
            let store = Store::new(options).unwrap();
            let service =
                Service::new(store.clone(), [0; 16], Arc::new(Figures::new()), Labels([0; 32]));
            let peer = Peer::new(store.connect());
            let layout = Layout {
                model_name: "m".into(),
                world_size: 1,
                block_size: 16,
                num_layers: 1,
                hidden_dim_size: 256,
                dtype: Dtype::new("uint8").unwrap(),
                single_plane: true,
                num_physical_slots: None,
            };
            store.register(peer.owner(), 1, layout).unwrap();
            (store, service, peer)
        };
        let key = Key {
            model_name: "m".into(),
            world_size: 1,
            worker_id: Some(0),
            token_ids: (0..16).collect(),
            start: 0,
            end: 16,
            request_id: "r".into(),
            cache_salt: String::new(),
            num_kv_readers: 1,
        };
        let soon = || Instant::now() + Duration::from_secs(20);
        let (store, _, peer) = start();
        store.prepare_store(peer.owner(), &key, 1, Instant::now()).unwrap();
        assert!(store.commit_store(&key, 1, &[]).unwrap());
        store.close_tiers(soon()).unwrap();

        let (store, service, mut peer) = start();
        // Whoever opens a pipe waits until another writes to it.
        let file = std::fs::read_dir(directory.join("objects")).unwrap().next().unwrap().unwrap();
        std::fs::remove_file(file.path()).unwrap();
        assert!(Command::new("mkfifo").arg(file.path()).status().unwrap().success());
        let lookup = Request::Lookup { key: key.into(), tp_size: 1 };
        // Beside the connection's other requests, and never told that the time is over before it is.
        service.carry_out(&mut peer, lookup.clone(), Instant::now()).await.unwrap();
        let asked = Instant::now();
        let wait = Request::WaitPrefetchStatus { request_id: "r".into(), timeout_s: 30.0 };
        let wait = wait.encode(1, Dialect::Current);
        assert_eq!(service.answer(&mut peer, &wait, asked).await, None);
        let noop = Request::Noop.encode(2, Dialect::Current);
        assert!(service.answer(&mut peer, &noop, asked).await.is_some());
        assert!(asked.elapsed() < Duration::from_millis(150), "it was not waited for");
        let told = service.told(&mut peer).await;
        assert!(asked.elapsed() > Duration::from_millis(150));
        assert_eq!(told[0], wait[0]);
        let told = Reply::decode(Operation::WaitPrefetchStatus, &told[2..]);
        assert_eq!(told.unwrap(), Reply::Integer(0), "and not that it timed out");
        assert!(!peer.listens());

        service.carry_out(&mut peer, lookup, Instant::now()).await.unwrap();
        let give_up = soon();
        loop {
            let request = Request::WaitPrefetchStatus { request_id: "r".into(), timeout_s: 0.01 };
            match service.carry_out(&mut peer, request, Instant::now()).await.unwrap() {
                Reply::Integer(hit) => break assert_eq!(hit, 0),
                reply => assert_eq!(reply, Reply::None),
            }
            assert!(Instant::now() < give_up, "it waits for as long as the disk does");
        }
        // However often the disk opens the pipe, somebody comes and goes.
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let over = &over;
            let mut options = std::fs::File::options();
            options.write(true).custom_flags(0o4000); // O_NONBLOCK: without a reader it is an error
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    drop(options.open(file.path()));
                    std::thread::yield_now();
                }
            });
            let closed = store.close_tiers(soon());
            over.store(true, Ordering::Relaxed);
            closed.unwrap();
        });
        std::fs::remove_dir_all(directory).unwrap();
    }
}
