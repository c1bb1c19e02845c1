//! Readiness: a store and a load that really worked a moment ago, in each tier.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvferry_core::cache::Slot;
use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_core::{Error, ErrorCode, Result};
use kvferry_store::disk::Loaded;
use kvferry_store::remote::RemoteStatus;
use kvferry_store::{Departure, Owner, PROBE_MODEL, Store};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout_at;

use crate::figures::Figures;
use crate::json::Object;

/// From the end of a probe to the next one.
const PERIOD: Duration = Duration::from_secs(5);
/// A probe has failed after this long.
const DEADLINE: Duration = Duration::from_secs(2);
/// An older result says nothing any more: probes have stopped. The remote's come every 10 s.
const AGE_MAX: Duration = Duration::from_secs(15);
/// While the pool grows in the background a probe waits this long for it, and asks again.
const ROOM_RETRY: Duration = Duration::from_millis(20);
/// Bytes of the probe's object.
const OBJECT: u32 = 64;
/// A probe of the disk has failed after this long: it waits for what is to be saved before it.
const DISK_DEADLINE: Duration = Duration::from_secs(5);
const MEMORY: &str = "memory";
/// Without these the server goes on.
const DISK: &str = "disk";
const REMOTE: &str = "remote";

/// How a tier's latest probe ended.
#[derive(Debug, Clone)]
struct Probe {
    ended: Instant,
    took: Duration,
    result: Result<()>,
}

/// A tier, for `/readyz`, `/status` and `/metrics`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tier {
    pub(super) name: &'static str,
    /// Why it is not ready.
    pub(super) failure: Option<String>,
    /// How long the probe took, and how long ago it ended; `None` before the first.
    pub(super) took: Option<Duration>,
    pub(super) age: Option<Duration>,
}

impl Tier {
    /// Whether the server is of no use while it fails.
    pub(super) fn is_needed(&self) -> bool {
        self.name == MEMORY
    }

    pub(super) fn json(&self) -> String {
        let ms = |duration: Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
        let mut tier = Object::new().raw("ok", self.failure.is_none());
        if let Some(failure) = &self.failure {
            tier = tier.text("reason", failure);
        }
        if let (Some(took), Some(age)) = (self.took, self.age) {
            tier = tier.number("ms", ms(took)).number("age_ms", ms(age).round());
        }
        tier.end()
    }
}

/// The latest probe of each tier.
pub(super) struct Readiness {
    memory: Mutex<Option<Probe>>,
    /// `None` without one.
    disk: Option<Mutex<Option<Probe>>>,
    /// Its remote has a keeper that stores and loads.
    store: Store,
}

impl Readiness {
    pub(super) fn new(store: &Store) -> Self {
        let disk = store.has_disk().then(Mutex::default);
        Self { memory: Mutex::default(), disk, store: store.clone() }
    }

    /// Probes at once and then again and again. To be dropped when the server ends.
    pub(super) async fn keep(&self, store: &Store, figures: &Arc<Figures>) {
        let memory = async {
            let mut stuck = None;
            loop {
                let begun = Instant::now();
                put(&self.memory, begun, probe(store, figures, &mut stuck).await);
                tokio::time::sleep(PERIOD).await;
            }
        };
        let disk = async {
            let Some(disk) = &self.disk else { return };
            loop {
                let begun = Instant::now();
                put(disk, begun, probe_disk(store).await);
                tokio::time::sleep(PERIOD).await;
            }
        };
        tokio::join!(memory, disk);
    }

    /// Every tier.
    pub(super) fn tiers(&self, now: Instant) -> Vec<Tier> {
        let latest = |probe: &Mutex<Option<Probe>>| {
            probe.lock().unwrap_or_else(PoisonError::into_inner).clone()
        };
        let disk = self.disk.iter().map(|disk| tier(DISK, latest(disk), now));
        let remote = self.store.remote_status().map(|remote| remote_tier(remote, now));
        std::iter::once(tier(MEMORY, latest(&self.memory), now)).chain(disk).chain(remote).collect()
    }
}

fn put(latest: &Mutex<Option<Probe>>, begun: Instant, result: Result<()>) {
    let probe = Probe { ended: Instant::now(), took: begun.elapsed(), result };
    *latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(probe);
}

/// Saves fresh bytes on the disk, loads them, and removes them. The disk takes its time on threads of its own, and
/// what has not begun by the deadline never does.
async fn probe_disk(store: &Store) -> Result<()> {
    let deadline = tokio::time::Instant::now() + DISK_DEADLINE;
    let saved_and_loaded = async {
        // Twice, as somebody may clear the cache in between.
        Ok(round_trip(store).await? || round_trip(store).await?)
    };
    match timeout_at(deadline, saved_and_loaded).await {
        Ok(Ok(true)) => Ok(()),
        Ok(Ok(false)) => Err(broken("what was saved on the disk does not come back from it")),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            let message = format!("the disk has not answered within {} s", DISK_DEADLINE.as_secs());
            Err(Error::new(ErrorCode::Timeout, message))
        }
    }
}

/// `false`: it is not there, or not the same.
async fn round_trip(store: &Store) -> Result<bool> {
    let probe = store.disk_probe()?;
    let (done, saved) = oneshot::channel();
    probe.save(Box::new(move |result| {
        let _ = done.send(result); // we may have stopped waiting
    }))?;
    match saved.await {
        Ok(Err(error)) if error.code == ErrorCode::Aborted => return Ok(false),
        Ok(saved) => saved?,
        Err(_) => return Err(broken("the disk's probe ended abruptly")),
    }
    let (done, loaded) = oneshot::channel();
    probe.load(Box::new(move |result: Result<Option<Loaded>>| {
        let _ = done.send(result); // as above
    }))?;
    let loaded = loaded.await.map_err(|_| broken("the disk's probe ended abruptly"))??;
    Ok(loaded.is_some() && probe.is_same()?)
}

/// The keeper's latest round, and what loads and saves have found out since.
fn remote_tier(remote: RemoteStatus, now: Instant) -> Tier {
    let probe = remote.probe.map(|(took, ended)| Probe {
        ended,
        took,
        result: remote.failed.map_or(Ok(()), |reason| Err(Error::new(ErrorCode::System, reason))),
    });
    let mut tier = tier(REMOTE, probe, now);
    if tier.age.is_none() {
        tier.failure = Some("the remote has not answered yet".to_owned());
    }
    tier
}

fn tier(name: &'static str, probe: Option<Probe>, now: Instant) -> Tier {
    let Some(Probe { ended, took, result }) = probe else {
        let failure = Some("nothing was stored and loaded yet".to_owned());
        return Tier { name, failure, took: None, age: None };
    };
    let age = now.saturating_duration_since(ended);
    let failure = match result {
        Err(error) => Some(error.message),
        Ok(()) if age > AGE_MAX => {
            Some(format!("nothing was stored and loaded for {} s", age.as_secs()))
        }
        Ok(()) => None,
    };
    Tier { name, failure, took: Some(took), age: Some(age) }
}

/// Stores a small object and loads it, as a peer of the store does, and leaves nothing behind. At most one object
/// of others is evicted for it, when the pool is full. An attempt that has not ended by the deadline is left in
/// `stuck`, and the next probe waits for it: no second thread gets stuck with it.
async fn probe(
    store: &Store,
    figures: &Arc<Figures>,
    stuck: &mut Option<JoinHandle<Result<bool>>>,
) -> Result<()> {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        let mut attempt = stuck.take().unwrap_or_else(|| {
            let (store, figures) = (store.clone(), Arc::clone(figures));
            tokio::task::spawn_blocking(move || attempt(&store, &figures, |_| {}))
        });
        match timeout_at(deadline, &mut attempt).await {
            Ok(Ok(Ok(true))) => return Ok(()),
            Ok(Ok(Ok(false))) if tokio::time::Instant::now() + ROOM_RETRY < deadline => {
                tokio::time::sleep(ROOM_RETRY).await;
            }
            Ok(Ok(Ok(false))) => {
                return Err(broken(
                    "there is no room for another object: all that are there are leased or being written",
                ));
            }
            Ok(Ok(Err(error))) => return Err(error),
            Ok(Err(_)) => return Err(broken("the probe ended abruptly")),
            Err(_) => {
                *stuck = Some(attempt);
                let message = format!("the store has not answered within {} s", DEADLINE.as_secs());
                return Err(Error::new(ErrorCode::Timeout, message));
            }
        }
    }
}

/// `false` when there is no room. Between storing and loading, `meddle` is told where the object lies.
fn attempt(store: &Store, figures: &Figures, meddle: impl FnOnce(&Slot)) -> Result<bool> {
    // Held all the while: readers of the figures see all of an attempt, and subtract it.
    let mut probed = figures.probing();
    let mut count = |name, count| *probed.entry(name).or_default() += count;
    let mut random = [0; 4 + 8 + OBJECT as usize];
    getrandom::fill(&mut random)
        .map_err(|error| Error::new(ErrorCode::System, format!("no random numbers: {error}")))?;
    let (names, bytes) = random.split_at(12);
    let instance = u64::from_le_bytes(names[4..].try_into().unwrap_or_default()) | 1 << 63;
    let key = key(store.chunk_size(), instance, &names[..4]);
    let peer = Peer { store, owner: store.connect(), instance, key };
    let Peer { owner, ref key, .. } = peer;
    store.register(owner, instance, layout()?)?;

    let reserved = store.prepare_store(owner, key, instance, Instant::now())?;
    let refused = if reserved.growing { "refused_growing_chunks" } else { "refused_chunks" };
    count(refused, reserved.refused.into());
    let Some(slot) = reserved.slots.first() else { return Ok(false) };
    let memory = store.memory();
    if let Err(error) = memory.write(slot.offset, bytes) {
        count("abandoned_chunks", 1); // as the peer leaves
        return Err(error);
    }
    if !store.commit_store(key, instance, &[])? {
        return Err(broken("what was stored could not be made visible"));
    }
    count("stored_chunks", 1);
    count("stored_bytes", slot.length);
    meddle(slot);

    let hit = store.lookup(owner, key, 1, Instant::now())?;
    count("lookups", 1);
    count("lookup_chunks", 1);
    count("hit_chunks", hit);
    let slots = store.prepare_retrieve(owner, key, instance, Instant::now())?;
    let Some(slot) = slots.as_ref().and_then(|slots| slots.first()) else {
        count("failed_retrievals", 1);
        return Err(broken("what was stored is not found"));
    };
    count("retrieved_chunks", 1);
    count("retrieved_bytes", slot.length);
    let mut read = [0; OBJECT as usize];
    memory.read(slot.offset, &mut read)?;
    store.commit_retrieve(owner, key, instance)?;
    if read != bytes {
        return Err(broken("what was loaded is not what was stored"));
    }
    Ok(true)
}

/// The probe, as the store knows it; gone with all that it held, however it ends.
struct Peer<'a> {
    store: &'a Store,
    owner: Owner,
    instance: u64,
    key: Key,
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        self.store.disconnect(self.owner, Departure::Ended);
        let _ = self.store.take_out(&self.key, self.instance); // it may not have got as far as registering
        self.store.unregister(self.instance);
    }
}

fn broken(what: &str) -> Error {
    Error::new(ErrorCode::Internal, what)
}

fn layout() -> Result<Layout> {
    Ok(Layout {
        model_name: PROBE_MODEL.into(),
        world_size: 1,
        block_size: 1,
        num_layers: 1,
        hidden_dim_size: OBJECT,
        dtype: Dtype::new("uint8")?,
        single_plane: true,
        num_physical_slots: Some(1),
    })
}

/// One chunk that nobody has stored yet.
fn key(chunk_size: u32, request: u64, first: &[u8]) -> Key {
    let first = u32::from_le_bytes(first.try_into().unwrap_or_default());
    let low = u32::try_from(request & u64::from(u32::MAX)).unwrap_or_default();
    let tokens =
        (0..chunk_size).map(|place| if place == 0 { first } else { low.wrapping_add(place) });
    Key {
        model_name: PROBE_MODEL.into(),
        world_size: 1,
        worker_id: Some(0),
        token_ids: tokens.collect(),
        start: 0,
        end: chunk_size.into(),
        request_id: format!("{PROBE_MODEL}/{request:x}"),
        cache_salt: String::new(),
        num_kv_readers: 1,
    }
}

#[cfg(test)]
mod tests {
    use kvferry_store::{Limits, StoreOptions};

    use super::*;

    const PAGE: u64 = 4096;

    fn store(pages: u64) -> Store {
        let limits = Limits { instances: 2, ..Limits::default() };
        let options = StoreOptions {
            chunk_size: 16,
            memory: pages * PAGE,
            shared_name: None,
            policy: kvferry_store::Policy::Lru,
            disk: None,
            remote: None,
            limits,
        };
        Store::new(options).unwrap()
    }

    #[test]
    fn a_probe_leaves_nothing_behind_but_its_counts_which_are_subtracted() {
        let (store, figures) = (store(1), Figures::new());
        let (fresh, now) = (store.status(Instant::now()), Instant::now());
        for _ in 0..100 {
            assert!(attempt(&store, &figures, |_| {}).unwrap());
        }
        assert_eq!(figures.store(&store, now), fresh);
        assert_ne!(store.status(now), fresh, "else nothing was stored");
        assert!(store.events(0, 9).events.is_empty());
    }

    #[test]
    fn a_chunk_of_one_token_is_probed_as_well() {
        let options = StoreOptions {
            chunk_size: 1,
            memory: PAGE,
            shared_name: None,
            policy: kvferry_store::Policy::Lru,
            disk: None,
            remote: None,
            limits: Limits::default(),
        };
        assert!(attempt(&Store::new(options).unwrap(), &Figures::new(), |_| {}).unwrap());
    }

    #[test]
    fn damage_between_storing_and_loading_is_noticed_and_taken_out() {
        let (store, figures) = (store(1), Figures::new());
        let (fresh, now) = (store.status(Instant::now()), Instant::now());
        for byte in 0..u64::from(OBJECT) {
            let damage = |slot: &Slot| {
                let mut held = [0];
                store.memory().read(slot.offset + byte, &mut held).unwrap();
                store.memory().write(slot.offset + byte, &[!held[0]]).unwrap();
            };
            let error = attempt(&store, &figures, damage).unwrap_err();
            assert_eq!(error.message, "what was loaded is not what was stored");
        }
        assert_eq!(figures.store(&store, now), fresh);
        assert!(attempt(&store, &figures, |_| {}).unwrap());
    }

    #[test]
    fn an_object_that_vanishes_is_noticed() {
        let (store, figures) = (store(1), Figures::new());
        let error = attempt(&store, &figures, |_| assert_eq!(store.clear(), 1)).unwrap_err();
        assert_eq!(error.message, "what was stored is not found");
        assert!(attempt(&store, &figures, |_| {}).unwrap());
    }

    #[test]
    fn a_store_that_refuses_the_probe_is_not_ready_and_its_reason_is_told() {
        let (store, figures) = (store(1), Figures::new());
        let owner = store.connect();
        for instance in 0..2 {
            store.register(owner, instance, layout().unwrap()).unwrap();
        }
        let error = attempt(&store, &figures, |_| {}).unwrap_err();
        assert!(error.message.contains("2 instances are registered"), "{error}");
    }

    #[test]
    fn results_are_for_a_short_while_only() {
        let readiness = Readiness::new(&store(1));
        let start = Instant::now();
        let failure = |at| readiness.tiers(at)[0].failure.clone();
        assert_eq!(failure(start).as_deref(), Some("nothing was stored and loaded yet"));
        let probe = Probe { ended: start, took: Duration::from_millis(3), result: Ok(()) };
        *readiness.memory.lock().unwrap() = Some(probe);
        assert_eq!(failure(start + AGE_MAX), None);
        let late = start + AGE_MAX + Duration::from_secs(1);
        assert_eq!(failure(late).as_deref(), Some("nothing was stored and loaded for 16 s"));
        let json: serde_json::Value =
            serde_json::from_str(&readiness.tiers(start + PERIOD)[0].json()).unwrap();
        assert_eq!(json, serde_json::json!({ "ok": true, "ms": 3, "age_ms": 5000 }));
    }
}
