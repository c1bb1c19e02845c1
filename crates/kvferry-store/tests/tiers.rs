//! A store with a disk, as its peers see it: what they stored is there after a restart, for them and nobody else.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use common::{CHUNK, Engine, OBJECT, key, layout};
use crc_fast::{CrcAlgorithm, checksum};
use kvferry_core::ErrorCode;
use kvferry_core::cache::Slot;
use kvferry_core::key::{Key, Layout};
use kvferry_store::disk::{DiskOptions, DiskStatus};
use kvferry_store::{Limits, Policy, Store, StoreOptions};

/// A directory that goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = format!("kvferry-tiers-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(path);
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    /// The files of objects, in order.
    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.0.join("objects")).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| !path.ends_with("cleared"));
        files.sort();
        files
    }

    fn options(&self, objects: u64) -> StoreOptions {
        StoreOptions {
            chunk_size: CHUNK,
            memory: objects * OBJECT,
            shared_name: None,
            policy: Policy::Lru,
            disk: Some(DiskOptions::new(&self.0, 64 << 20)),
            remote: None,
            limits: Limits::default(),
        }
    }

    /// An engine on a store with room for many objects, and whatever was on the disk.
    fn start(&self) -> Engine {
        let engine = self.start_with(self.options(256));
        engine.register(1, layout("m", 1));
        engine
    }

    fn start_with(&self, options: StoreOptions) -> Engine {
        let store = Store::new(options).unwrap();
        let owner = store.connect();
        Engine { store, owner, now: Instant::now() }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future on this thread. Whoever is not woken within 20 seconds was forgotten.
fn wait<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let (mut future, give_up) = (pin!(future), soon());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        std::thread::park_timeout(give_up.saturating_duration_since(Instant::now()));
        assert!(Instant::now() < give_up, "nobody woke it");
    }
}

/// A function of all that the bytes of a chunk depend on.
fn content(key: &Key, chunk: u32) -> Vec<u8> {
    let end = ((chunk + 1) * CHUNK) as usize;
    let words = key.token_ids[..end].iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    let text = format!("{:?} {} {} {}", key.worker_id, key.model_name, key.cache_salt, words);
    text.bytes().cycle().take(usize::try_from(OBJECT).unwrap()).collect()
}

fn sum(bytes: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

impl Engine {
    /// Stores what the chunks' bytes are, and waits until it is on the disk.
    fn save_as(&self, key: &Key, instance: u64) -> usize {
        let reserved = self.store.prepare_store(self.owner, key, instance, self.now).unwrap();
        for (slot, chunk) in reserved.slots.iter().zip(&reserved.chunk_indices) {
            self.store.memory().write(slot.offset, &content(key, *chunk)).unwrap();
        }
        let stored = self.store.commit_store(key, instance, &[]).unwrap();
        assert_eq!(stored, !reserved.slots.is_empty());
        self.store.flush(soon()).unwrap();
        reserved.slots.len()
    }

    fn save(&self, key: &Key) -> usize {
        self.save_as(key, 1)
    }

    /// Chunks that the key's request finds; the request holds them.
    fn find(&self, key: &Key) -> u64 {
        self.lookup(key);
        wait(self.store.hit(&key.request_id))
    }

    /// Chunks that it finds, each compared with what was stored; nothing is held afterwards.
    fn read_as(&self, key: &Key, instance: u64) -> u64 {
        let hit = self.find(key);
        self.read_found(key, hit, instance);
        self.store.end_session(&key.request_id);
        hit
    }

    fn read(&self, key: &Key) -> u64 {
        self.read_as(key, 1)
    }

    fn read_found(&self, key: &Key, hit: u64, instance: u64) {
        let range = Key { end: hit * u64::from(CHUNK), ..key.clone() };
        let slots =
            self.store.prepare_retrieve(self.owner, &range, instance, self.now).unwrap().unwrap();
        for (chunk, Slot { offset, checksum, .. }) in (0..).zip(&slots) {
            let mut bytes = vec![0; usize::try_from(OBJECT).unwrap()];
            self.store.memory().read(*offset, &mut bytes).unwrap();
            assert!(bytes == content(key, chunk), "wrong bytes of chunk {chunk}");
            assert!(checksum.is_none_or(|told| told == sum(&bytes)));
        }
        assert_eq!(slots.len() as u64, hit);
        assert_eq!(self.store.commit_retrieve(self.owner, &range, instance).unwrap(), hit > 0);
    }

    fn disk(&self) -> DiskStatus {
        self.store.disk_status().unwrap()
    }

    fn status(&self, name: &str) -> u64 {
        let status = self.store.status(self.now);
        status.iter().find(|(known, _)| *known == name).expect("a known figure").1
    }

    fn close(self) {
        self.store.close_tiers(soon()).unwrap();
    }
}

#[test]
fn what_was_stored_before_a_restart_is_read_after_it() {
    let directory = Directory::new();
    let engine = directory.start();
    assert_eq!(engine.save(&key(0, 5)), 5);
    engine.close();
    let engine = directory.start();
    assert_eq!(engine.lookup(&key(0, 9)), 0, "of which memory has none");
    assert_eq!(wait(engine.store.hit(&key(0, 9).request_id)), 5);
    engine.read_found(&key(0, 9), 5, 1);
    engine.store.end_session(&key(0, 9).request_id);
    assert_eq!(engine.read(&key(0, 3)), 3);
    assert_eq!(engine.read(&key(1, 5)), 0, "other tokens");
    assert_eq!(engine.save(&key(0, 7)), 2, "only what is missing is written");
    let status = engine.disk();
    assert_eq!((status.loads, status.saves, status.objects), (5, 2, 7));
    let figures = ["lookups", "lookup_chunks", "hit_chunks", "promoted_chunks", "stored_chunks"];
    assert_eq!(figures.map(|name| engine.status(name)), [3, 9 + 3 + 5, 5 + 3, 5, 2]);
    assert_eq!(engine.status("promoted_hit_chunks"), 5);
    assert_eq!((engine.status("leases"), engine.status("sessions")), (0, 0));
    engine.close();
    assert_eq!(directory.start().read(&key(0, 7)), 7);
}

#[test]
fn what_comes_back_from_the_disk_is_told_to_listeners_with_its_tokens() {
    let directory = Directory::new();
    let stored = key(0, 3);
    let engine = directory.start();
    engine.save(&stored);
    engine.close();
    let engine = directory.start();
    assert_eq!(engine.find(&Key { request_id: "b".into(), ..stored.clone() }), 3);
    let batch = engine.store.kv_events("m", 0, 9);
    let mut told: Vec<_> = batch.events.iter().map(|event| event.token_ids.to_vec()).collect();
    told.sort(); // loads end in any order
    let chunks = stored.token_ids.chunks_exact(CHUNK as usize).take(3);
    assert_eq!(told, chunks.map(<[u32]>::to_vec).collect::<Vec<_>>());
}

#[test]
fn a_store_that_is_closed_writes_what_was_waiting_first() {
    let directory = Directory::new();
    let engine = directory.start();
    let prompt = key(0, 40);
    engine.put(&prompt);
    engine.close();
    let engine = directory.start();
    assert_eq!(engine.disk().objects, 40);
    assert_eq!(engine.find(&prompt), 40);
}

#[test]
fn whoever_stored_it_reads_it_after_a_restart_and_nobody_else() {
    let directory = Directory::new();
    let salted = |salt: &str| Key { cache_salt: salt.into(), ..key(0, 3) };
    let engine = directory.start();
    assert_eq!(engine.save(&salted("mine")), 3);
    engine.close();

    let engine = directory.start();
    engine.register(2, layout("another", 1));
    engine.register(3, layout("m", 2));
    let wider = Layout { hidden_dim_size: 512, num_layers: 2, ..layout("m", 1) };
    for other in ["yours", "", "min", "mine "] {
        assert_eq!(engine.read(&salted(other)), 0, "{other:?}");
    }
    let model = Key { model_name: "another".into(), ..salted("mine") };
    assert_eq!(engine.read_as(&model, 2), 0);
    let ranks = Key { world_size: 2, ..salted("mine") };
    assert_eq!(engine.find(&ranks), 0);
    engine.store.end_session(&ranks.request_id);
    assert_eq!(engine.disk().loads, 0, "nothing of it came to memory");
    assert_eq!(engine.read(&salted("mine")), 3);
    engine.store.unregister(1);
    engine.register(1, wider);
    assert_eq!(engine.find(&salted("mine")), 0, "another layout of as many bytes");
    engine.store.end_session(&key(0, 3).request_id);
    engine.close();

    let engine =
        directory.start_with(StoreOptions { chunk_size: 2 * CHUNK, ..directory.options(64) });
    engine.register(1, layout("m", 1));
    let chunks = Key { end: 8, ..salted("mine") };
    assert_eq!(engine.find(&chunks), 0, "chunks of another size");
    engine.close();
    assert_eq!(directory.start().read(&salted("mine")), 3, "it is still there");
}

#[test]
fn every_rank_has_to_have_a_chunk_in_memory_or_on_the_disk() {
    let directory = Directory::new();
    let rank = |rank, chunks| Key {
        model_name: "two".into(),
        world_size: 2,
        worker_id: Some(rank),
        ..key(0, chunks)
    };
    let start = || {
        let engine = directory.start();
        engine.register(10, layout("two", 2));
        engine
    };
    let engine = start();
    assert_eq!(engine.save_as(&rank(0, 3), 10), 3);
    assert_eq!(engine.save_as(&rank(1, 1), 10), 1);
    engine.close();
    let engine = start();
    assert_eq!(engine.save_as(&rank(1, 2), 10), 2, "nobody has asked for the first");
    // The second chunk: one rank's on the disk, the other's in memory. The third: one rank's is nowhere.
    let hit = engine.find(&rank(0, 3));
    assert_eq!(hit, 2);
    for reader in [0, 1] {
        engine.read_found(&rank(reader, 3), hit, 10);
    }
    engine.store.end_session(&rank(0, 3).request_id);
    assert_eq!((engine.status("promoted_chunks"), engine.status("leases")), (2, 0));
}

#[test]
fn each_reader_that_was_announced_has_a_lease_of_what_came_from_the_disk() {
    let directory = Directory::new();
    let engine = directory.start();
    engine.save(&key(0, 2));
    engine.close();
    let engine = directory.start();
    let prompt = Key { num_kv_readers: 3, ..key(0, 2) };
    assert_eq!(engine.find(&prompt), 2);
    assert_eq!(engine.status("leases"), 6);
    for _ in 0..3 {
        engine.read_found(&prompt, 2, 1);
    }
    let range = prompt.clone();
    let fourth = engine.store.prepare_retrieve(engine.owner, &range, 1, engine.now).unwrap();
    assert!(fourth.is_none(), "each lease is for one");
    assert_eq!(engine.find(&prompt), 2);
    engine.store.release(&prompt, 1, engine.now).unwrap();
    assert_eq!(engine.status("leases"), 0);
}

#[test]
fn a_damaged_file_is_a_miss_and_what_is_stored_anew_is_whole() {
    let directory = Directory::new();
    let engine = directory.start();
    for chunks in 1..=4 {
        engine.save(&key(0, chunks));
    }
    engine.close();
    for path in directory.files() {
        let mut bytes = fs::read(&path).unwrap();
        if bytes[4096..] == content(&key(0, 4), 1) {
            bytes[5000] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
    }
    let engine = directory.start();
    assert_eq!(engine.read(&key(0, 4)), 1);
    assert_eq!((engine.disk().damaged, engine.disk().objects), (1, 3));
    assert_eq!(engine.save(&key(0, 4)), 1, "the others came from the disk");
    assert_eq!(engine.read(&key(0, 4)), 4);
    engine.close();
    let engine = directory.start();
    assert_eq!(engine.read(&key(0, 4)), 4);
    assert_eq!(engine.disk().damaged, 0);
}

#[test]
fn what_was_discarded_or_cleared_stays_away_after_a_restart() {
    let directory = Directory::new();
    let engine = directory.start();
    engine.save(&key(0, 2));
    engine.save(&key(100, 2));
    assert_eq!(engine.discard(&key(0, 2)), 2);
    engine.close();
    let engine = directory.start();
    assert_eq!((engine.read(&key(0, 2)), engine.read(&key(100, 2))), (0, 2));
    assert_eq!(engine.store.clear(), 2);
    assert_eq!(engine.read(&key(100, 2)), 0);
    engine.close();
    assert_eq!(directory.start().read(&key(100, 2)), 0);
}

#[test]
fn prompts_beyond_the_memory_are_all_found_again_with_every_policy() {
    for policy in Policy::ALL {
        let directory = Directory::new();
        let options = StoreOptions { policy, ..directory.options(64) };
        let engine = directory.start_with(options);
        engine.register(1, layout("m", 1));
        for prompt in 0..8 {
            assert_eq!(engine.save(&key(prompt * 1000, 16)), 16);
        }
        for prompt in 0..8 {
            assert_eq!(engine.read(&key(prompt * 1000, 16)), 16, "{policy}");
        }
        assert!(engine.status("promoted_chunks") >= 64);
        assert!(engine.status("evicted_objects") >= 64);
        engine.store.clear();
        assert_eq!(engine.status("used_bytes"), 0);
    }
}

#[test]
fn a_prompt_of_half_the_memory_is_saved_whole() {
    let directory = Directory::new();
    let engine = directory.start_with(directory.options(64));
    engine.register(1, layout("m", 1));
    engine.save(&key(0, 32));
    engine.close();
    assert_eq!(directory.start().read(&key(0, 32)), 32);
}

#[test]
fn an_object_larger_than_half_of_the_memory_is_saved_too() {
    let directory = Directory::new();
    let engine = directory.start_with(directory.options(2));
    engine.register(1, layout("m", 1));
    engine.save(&key(0, 1));
    engine.close();
    assert_eq!(directory.start().read(&key(0, 1)), 1);
}

#[test]
#[cfg(target_os = "linux")]
fn a_shared_pool_grows_for_what_lookups_find_on_the_disk() {
    const MIB: u64 = 1 << 20;
    let directory = Directory::new();
    let start = || {
        let options = StoreOptions {
            memory: 256 * MIB,
            shared_name: Some(format!("tiers-{}", std::process::id())),
            disk: Some(DiskOptions::new(&directory.0, 256 * MIB)),
            ..directory.options(1)
        };
        let engine = directory.start_with(options);
        engine.register(1, Layout { num_layers: 256, ..layout("m", 1) });
        engine
    };
    let prompt = key(0, 80); // of a MiB each; the first step of a pool is 64
    let engine = start();
    let (mut stored, give_up) = (0, soon());
    while stored < 80 {
        let part = key(0, stored + 16);
        engine.put(&part);
        engine.store.flush(soon()).unwrap();
        stored = engine.lookup(&part); // less while the pool grows
        engine.store.end_session(&part.request_id);
        assert!(Instant::now() < give_up);
    }
    engine.close();
    let engine = start();
    let give_up = soon();
    while engine.find(&prompt) < 80 {
        engine.store.end_session(&prompt.request_id);
        assert!(Instant::now() < give_up, "nobody made the pool grow");
    }
    assert_eq!(engine.status("evicted_objects"), 0);
}

#[test]
fn one_store_at_a_time_has_the_directory_and_a_store_that_could_not_start_has_not() {
    let directory = Directory::new();
    let engine = directory.start();
    let error = Store::new(directory.options(8)).err().unwrap();
    assert_eq!(error.code, ErrorCode::DiskInUse);
    engine.close();
    let refused = StoreOptions { shared_name: Some("a/b".into()), ..directory.options(8) };
    assert!(Store::new(refused).is_err());
    directory.start().close();
}

#[test]
fn a_request_that_asks_again_after_its_chunks_went_gets_them_from_the_disk() {
    let directory = Directory::new();
    let engine = directory.start_with(directory.options(4));
    engine.register(1, layout("m", 1));
    for chunks in 1..=3 {
        engine.save(&key(0, chunks));
    }
    assert_eq!(engine.find(&key(0, 3)), 3);
    engine.store.release(&key(0, 3), 1, engine.now).unwrap();
    for chunks in 1..=4 {
        assert_eq!(engine.save(&key(500, chunks)), 1);
    }
    assert_eq!(engine.find(&key(0, 3)), 3, "the same request");
    assert_eq!(engine.status("leases"), 3);
    engine.read_found(&key(0, 3), 3, 1);
}
