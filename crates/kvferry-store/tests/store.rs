//! What peers of the store may rely on, each test by what a user would miss.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::ErrorCode;
use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_store::{Departure, Limits, Owner, Policy, READ_HOLD, Store, StoreOptions};
use proptest::prelude::*;

const CHUNK: u32 = 4;
/// One object is a page.
const OBJECT: u64 = 4096;

struct Engine {
    store: Store,
    owner: Owner,
    now: Instant,
}

fn layout(model: &str, world_size: u32) -> Layout {
    Layout {
        model_name: model.into(),
        world_size,
        block_size: 2,
        num_layers: 1,
        hidden_dim_size: 1024,
        dtype: Dtype::new("uint8").unwrap(),
        single_plane: true,
        num_physical_slots: None,
    }
}

fn engine(objects: u64) -> Engine {
    engine_with(objects, Limits::default())
}

fn engine_with(objects: u64, limits: Limits) -> Engine {
    let options = StoreOptions {
        chunk_size: CHUNK,
        memory: objects * OBJECT,
        shared_name: None,
        policy: Policy::Lru,
        disk: None,
        remote: None,
        limits,
    };
    let store = Store::new(options).unwrap();
    let owner = store.connect();
    store.register(owner, 1, layout("m", 1)).unwrap();
    Engine { store, owner, now: Instant::now() }
}

/// `chunks` chunks of a prompt that begins with `first`.
fn key(request: &str, first: u32, chunks: u64) -> Key {
    let end = chunks * u64::from(CHUNK);
    Key {
        model_name: "m".into(),
        world_size: 1,
        worker_id: Some(0),
        token_ids: (first..).take(usize::try_from(end).unwrap() + 1).collect(),
        start: 0,
        end,
        request_id: request.into(),
        cache_salt: String::new(),
        num_kv_readers: 1,
    }
}

impl Engine {
    fn put(&self, key: &Key) -> u64 {
        let reserved = self.store.prepare_store(self.owner, key, 1, self.now).unwrap();
        for (slot, chunk) in reserved.slots.iter().zip(&reserved.chunk_indices) {
            self.store.memory().write(slot.offset, &content(key, *chunk)).unwrap();
        }
        if !reserved.slots.is_empty() {
            assert!(self.store.commit_store(key, 1, &[]).unwrap());
        }
        reserved.slots.len() as u64
    }

    fn hits(&self, key: &Key) -> u64 {
        let hit = self.store.lookup(self.owner, key, 1, self.now).unwrap();
        self.store.end_session(&key.request_id);
        hit
    }

    /// Looks up and reads; checks every byte. The chunks that were read.
    fn get(&self, key: &Key) -> u64 {
        let hit = self.store.lookup(self.owner, key, 1, self.now).unwrap();
        let range = Key { end: hit * u64::from(CHUNK), ..key.clone() };
        let slots = self.store.prepare_retrieve(self.owner, &range, 1, self.now).unwrap().unwrap();
        for (chunk, slot) in (0u32..).zip(&slots) {
            let mut bytes = vec![0; 4096];
            self.store.memory().read(slot.offset, &mut bytes).unwrap();
            assert_eq!(bytes, content(key, chunk));
        }
        assert_eq!(self.store.commit_retrieve(self.owner, &range, 1).unwrap(), hit > 0);
        self.store.end_session(&key.request_id);
        hit
    }

    fn status(&self, name: &str) -> u64 {
        let status = self.store.status(self.now);
        status.iter().find(|(known, _)| *known == name).expect("a known figure").1
    }
}

/// A function of all that the chunk's content depends on.
fn content(key: &Key, chunk: u32) -> Vec<u8> {
    let end = ((chunk + 1) * CHUNK) as usize;
    let words = key.token_ids[..end].iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    let text = format!("{} {}", key.cache_salt, words);
    text.bytes().cycle().take(4096).collect()
}

#[test]
fn what_one_request_stored_the_next_one_reads() {
    let engine = engine(16);
    assert_eq!(engine.put(&key("a", 0, 3)), 3);
    assert_eq!(engine.get(&key("b", 0, 3)), 3);
    assert_eq!(engine.get(&key("c", 0, 5)), 3, "a longer prompt hits its prefix");
    assert_eq!(engine.get(&key("d", 1, 3)), 0, "other tokens");
    assert_eq!(engine.put(&key("e", 0, 5)), 2, "only what is missing is written");
    assert_eq!(engine.get(&key("f", 0, 5)), 5);
}

#[test]
fn nothing_is_seen_before_its_commit() {
    let engine = engine(16);
    let key = key("a", 0, 2);
    let reserved = engine.store.prepare_store(engine.owner, &key, 1, engine.now).unwrap();
    assert_eq!(reserved.slots.len(), 2);
    assert_eq!(engine.hits(&key), 0);
    let second = engine.store.prepare_store(engine.owner, &key, 1, engine.now).unwrap();
    assert!(second.slots.is_empty(), "one writer at a time");
    assert_eq!(second.refused, 0, "being written is not refused");
    engine.store.commit_store(&key, 1, &[]).unwrap();
    assert_eq!(engine.hits(&key), 2);
}

#[test]
fn an_abandoned_store_leaves_nothing_and_can_be_done_again() {
    let engine = engine(16);
    let key = key("a", 0, 2);
    engine.store.prepare_store(engine.owner, &key, 1, engine.now).unwrap();
    engine.store.abandon_store(&key, 1).unwrap();
    assert!(!engine.store.commit_store(&key, 1, &[]).unwrap());
    assert_eq!(engine.status("used_bytes"), 0);
    assert_eq!(engine.put(&key), 2);
}

#[test]
fn a_prefix_counts_only_where_every_rank_has_it() {
    let engine = engine(16);
    let two = |rank| Key { world_size: 2, worker_id: Some(rank), ..key("a", 0, 3) };
    for rank in 0..2 {
        let instance = 10 + u64::from(rank);
        engine.store.register(engine.owner, instance, layout("m", 2)).unwrap();
        let chunks = Key { end: u64::from(CHUNK * (3 - rank)), ..two(rank) };
        engine.store.prepare_store(engine.owner, &chunks, instance, engine.now).unwrap();
        engine.store.commit_store(&chunks, instance, &[]).unwrap();
    }
    let lookup = Key { worker_id: None, ..two(0) };
    assert_eq!(engine.hits(&lookup), 2);
    assert_eq!(engine.hits(&key("b", 0, 3)), 0, "another world size is another shape");
}

#[test]
fn another_salt_is_another_cache() {
    let engine = engine(16);
    let salted = |salt: &str| Key { cache_salt: salt.into(), ..key("a", 0, 2) };
    engine.put(&salted("tenant-a"));
    assert_eq!(engine.get(&salted("tenant-b")), 0);
    assert_eq!(engine.get(&salted("")), 0);
    assert_eq!(engine.get(&salted("tenant-a")), 2);
    let looked_up = salted("tenant-a");
    engine.store.lookup(engine.owner, &looked_up, 1, engine.now).unwrap();
    let other = salted("tenant-b");
    let stolen = engine.store.prepare_retrieve(engine.owner, &other, 1, engine.now).unwrap();
    assert!(stolen.is_none(), "a lease of one tenant opens nothing of another");
}

#[test]
fn no_operation_with_another_salt_touches_what_a_tenant_holds() {
    let Engine { store, owner, now } = &engine(16);
    let status = |name| store.status(*now).into_iter().find(|(known, _)| *known == name).unwrap().1;
    let mine = Key { cache_salt: "tenant-a".into(), ..key("a", 0, 2) };
    for salt in ["tenant-b", ""] {
        let other = Key { cache_salt: salt.into(), ..mine.clone() };
        store.prepare_store(*owner, &mine, 1, *now).unwrap();
        assert!(!store.commit_store(&other, 1, &[]).unwrap(), "a commit");
        store.abandon_store(&other, 1).unwrap();
        assert_eq!(status("slots_writing"), 2, "an abandoned store");
        store.abandon_store(&mine, 1).unwrap();
        assert_eq!(status("slots_writing"), 0);
    }
    store.prepare_store(*owner, &mine, 1, *now).unwrap();
    assert!(store.commit_store(&mine, 1, &[]).unwrap());
    for salt in ["tenant-b", ""] {
        let other = Key { cache_salt: salt.into(), ..mine.clone() };
        assert_eq!(store.lookup(*owner, &mine, 1, *now).unwrap(), 2);
        store.release(&other, 1, *now).unwrap();
        assert_eq!(status("leases"), 2, "leases given back");
        store.release(&mine, 1, *now).unwrap();
        assert_eq!(status("leases"), 0);
        assert_eq!(store.lookup(*owner, &mine, 1, *now).unwrap(), 2);
        store.prepare_retrieve(*owner, &mine, 1, *now).unwrap().unwrap();
        assert!(!store.commit_retrieve(*owner, &other, 1).unwrap(), "a load's end");
        assert_eq!(status("slots_reading"), 2);
        assert!(store.commit_retrieve(*owner, &mine, 1).unwrap());
    }
}

#[test]
fn a_full_pool_makes_room_by_dropping_what_was_used_longest_ago() {
    let engine = engine(8);
    engine.put(&key("a", 0, 4));
    engine.put(&key("b", 100, 4));
    engine.get(&key("c", 0, 4)); // the first is used again
    engine.put(&key("d", 200, 2));
    assert_eq!(engine.get(&key("e", 0, 4)), 4);
    assert_eq!(engine.get(&key("f", 100, 4)), 2, "its last chunks went first");
    assert_eq!(engine.get(&key("g", 200, 2)), 2);
    assert_eq!(engine.status("evicted_objects"), 2);
}

#[test]
fn what_was_looked_up_is_there_when_it_is_retrieved() {
    let engine = engine(4);
    let first = key("a", 0, 4);
    engine.put(&first);
    assert_eq!(engine.store.lookup(engine.owner, &first, 1, engine.now).unwrap(), 4);
    assert_eq!(engine.put(&key("b", 100, 4)), 0, "all are leased: nothing can make room");
    assert_eq!(engine.status("refused_chunks"), 4);
    let slots = engine.store.prepare_retrieve(engine.owner, &first, 1, engine.now).unwrap();
    assert_eq!(slots.map(|slots| slots.len()), Some(4));
    engine.store.end_session("a");
    assert_eq!(engine.put(&key("c", 100, 4)), 0, "still being read");
    engine.store.commit_retrieve(engine.owner, &first, 1).unwrap();
    assert_eq!(engine.put(&key("d", 100, 4)), 4);
}

#[test]
fn each_reader_has_a_lease_of_its_own() {
    let engine = engine(4);
    let key = Key { num_kv_readers: 2, ..key("a", 0, 1) };
    engine.put(&key);
    engine.store.lookup(engine.owner, &key, 1, engine.now).unwrap();
    for reader in 0..3 {
        let slots = engine.store.prepare_retrieve(engine.owner, &key, 1, engine.now).unwrap();
        assert_eq!(slots.is_some(), reader < 2, "reader {reader}");
        if slots.is_some() {
            engine.store.commit_retrieve(engine.owner, &key, 1).unwrap();
        }
    }
}

#[test]
fn readers_that_are_not_said_count_as_the_tensor_parallel_size() {
    let engine = engine(4);
    let key = Key { num_kv_readers: 0, ..key("a", 0, 1) };
    engine.put(&key);
    engine.store.lookup(engine.owner, &key, 3, engine.now).unwrap();
    assert_eq!(engine.status("leases"), 3);
    engine.store.release(&key, 3, engine.now).unwrap();
    assert_eq!(engine.status("leases"), 0);
}

#[test]
fn retrieving_without_a_lookup_or_beyond_the_hit_fails_and_changes_nothing() {
    let engine = engine(8);
    let key = key("a", 0, 2);
    engine.put(&key);
    let retrieve =
        |key: &Key| engine.store.prepare_retrieve(engine.owner, key, 1, engine.now).unwrap();
    assert!(retrieve(&key).is_none());
    engine.store.lookup(engine.owner, &key, 1, engine.now).unwrap();
    assert!(retrieve(&Key { request_id: "b".into(), ..key.clone() }).is_none());
    assert!(retrieve(&key).is_some(), "the failed attempts took no lease");
}

#[test]
fn leading_chunks_can_be_given_back_and_the_rest_retrieved() {
    let engine = engine(4);
    let all = key("a", 0, 3);
    engine.put(&all);
    engine.store.lookup(engine.owner, &all, 1, engine.now).unwrap();
    let (head, tail) = (Key { end: 4, ..all.clone() }, Key { start: 4, ..all.clone() });
    engine.store.release(&head, 1, engine.now).unwrap();
    assert_eq!(engine.status("leases"), 2);
    let slots = engine.store.prepare_retrieve(engine.owner, &tail, 1, engine.now).unwrap();
    assert_eq!(slots.map(|slots| slots.len()), Some(2));
    assert!(engine.store.commit_retrieve(engine.owner, &tail, 1).unwrap());
    assert!(!engine.store.commit_retrieve(engine.owner, &tail, 1).unwrap(), "once");
}

#[test]
fn a_prompt_larger_than_the_pool_stores_its_leading_chunks() {
    let engine = engine(4);
    let key = key("a", 0, 6);
    let reserved = engine.store.prepare_store(engine.owner, &key, 1, engine.now).unwrap();
    assert_eq!(reserved.chunk_indices, [0, 1, 2, 3]);
    assert_eq!(reserved.refused, 2);
    engine.store.commit_store(&key, 1, &[]).unwrap();
    assert_eq!(engine.hits(&key), 4);
    assert_eq!(engine.put(&key), 0, "its own prefix does not make room for its tail");
    assert_eq!(engine.hits(&key), 4);
}

#[test]
fn the_hit_is_told_once() {
    let engine = engine(4);
    let key = key("a", 0, 1);
    engine.put(&key);
    engine.store.lookup(engine.owner, &key, 1, engine.now).unwrap();
    assert_eq!(engine.store.take_hit("a", engine.now), Some(1));
    assert_eq!(engine.store.take_hit("a", engine.now), Some(0));
    assert_eq!(engine.store.take_hit("never seen", engine.now), Some(0));
}

#[test]
fn a_session_whose_tokens_change_does_not_keep_the_old_hashes() {
    let engine = engine(8);
    engine.put(&key("x", 0, 2));
    let hit =
        |first| engine.store.lookup(engine.owner, &key("same", first, 2), 1, engine.now).unwrap();
    assert_eq!(hit(0), 2);
    assert_eq!(hit(50), 0);
    assert_eq!(hit(0), 2);
}

#[test]
fn a_peer_that_ended_leaves_nothing_held_but_for_a_moment_what_it_may_still_read() {
    let mut engine = engine(4);
    let (reading, writing) = (key("r", 0, 1), key("w", 100, 2));
    engine.put(&reading);
    engine.store.lookup(engine.owner, &reading, 1, engine.now).unwrap();
    engine.store.prepare_retrieve(engine.owner, &reading, 1, engine.now).unwrap().unwrap();
    engine.store.lookup(engine.owner, &reading, 1, engine.now).unwrap();
    engine.store.prepare_store(engine.owner, &writing, 1, engine.now).unwrap();
    engine.store.disconnect(engine.owner, Departure::Ended);
    assert_eq!(engine.status("leases"), 0);
    assert_eq!(engine.status("slots_writing"), 0);
    assert_eq!(engine.status("used_bytes"), OBJECT, "the committed object stays");
    engine.owner = engine.store.connect();
    engine.now += READ_HOLD - Duration::from_nanos(1);
    assert_eq!(engine.put(&key("n", 200, 4)), 3);
    assert_eq!(engine.status("slots_reading"), 1);
    engine.now += Duration::from_nanos(1);
    assert_eq!(engine.put(&key("m", 300, 4)), 4);
    assert_eq!(engine.status("slots_reading"), 0);
}

#[test]
fn a_load_is_ended_by_its_own_peer_or_if_that_was_given_up_by_another() {
    let engine = engine(4);
    let key = key("r", 0, 1);
    engine.put(&key);
    let reader = engine.store.connect();
    engine.store.lookup(engine.owner, &key, 1, engine.now).unwrap();
    engine.store.prepare_retrieve(reader, &key, 1, engine.now).unwrap().unwrap();
    assert!(!engine.store.commit_retrieve(engine.owner, &key, 1).unwrap());
    assert_eq!(engine.status("slots_reading"), 1);
    engine.store.disconnect(reader, Departure::GivenUp);
    assert!(engine.store.commit_retrieve(engine.owner, &key, 1).unwrap());
    assert_eq!(engine.status("slots_reading"), 0);
}

#[test]
fn what_a_reader_that_went_long_ago_had_is_cleared_though_nothing_was_asked_since() {
    let mut engine = engine(4);
    engine.now -= 2 * READ_HOLD;
    let key = key("r", 0, 1);
    engine.put(&key);
    engine.store.lookup(engine.owner, &key, 1, engine.now).unwrap();
    engine.store.prepare_retrieve(engine.owner, &key, 1, engine.now).unwrap().unwrap();
    engine.store.disconnect(engine.owner, Departure::Ended);
    assert_eq!(engine.store.clear(), 1);
}

#[test]
fn an_instance_goes_with_a_peer_that_would_register_it_anew_unless_another_uses_it() {
    for (departure, others, left) in [
        (Departure::Left, 0, 0),
        (Departure::Left, 1, 1),
        (Departure::Ended, 0, 1),
        (Departure::GivenUp, 0, 1),
    ] {
        let engine = engine(4);
        engine.put(&key("r", 0, 1));
        for _ in 0..others {
            let other = engine.store.connect();
            engine.store.prepare_store(other, &key("w", 100, 1), 1, engine.now).unwrap();
        }
        engine.store.disconnect(engine.owner, departure);
        assert_eq!(engine.status("instances"), left, "{departure:?}, {others} others");
        assert_eq!(engine.status("objects"), 1);
    }
}

#[test]
fn slots_of_a_peer_that_was_given_up_are_never_reused_until_it_says_so() {
    let mut engine = engine(4);
    let (reading, writing) = (key("r", 0, 1), key("w", 100, 2));
    engine.put(&reading);
    engine.store.lookup(engine.owner, &reading, 1, engine.now).unwrap();
    engine.store.prepare_retrieve(engine.owner, &reading, 1, engine.now).unwrap().unwrap();
    let told = engine.store.prepare_store(engine.owner, &writing, 1, engine.now).unwrap().slots;
    engine.store.disconnect(engine.owner, Departure::GivenUp);
    assert_eq!(engine.status("slots_apart"), 3);
    engine.owner = engine.store.connect();
    let other = engine.store.prepare_store(engine.owner, &key("n", 200, 4), 1, engine.now).unwrap();
    assert_eq!(other.slots.len(), 1, "only what nobody was told of");
    assert!(other.slots.iter().all(|slot| told.iter().all(|told| told.offset != slot.offset)));
    engine.store.abandon_store(&key("n", 200, 4), 1).unwrap();
    let again = Key { request_id: "w2".into(), ..writing.clone() };
    assert_eq!(engine.put(&again), 1, "its chunks are free for others to store");
    assert!(!engine.store.commit_store(&writing, 1, &[]).unwrap(), "late: nothing becomes visible");
    assert_eq!(engine.status("slots_apart"), 1, "but its slots come back");
    engine.store.commit_retrieve(engine.owner, &reading, 1).unwrap();
    assert_eq!(engine.status("slots_apart"), 0);
    assert_eq!(engine.put(&key("m", 300, 4)), 4);
}

#[test]
fn slots_of_an_instance_that_was_given_up_outlive_its_peer() {
    for departure in [Departure::Left, Departure::Ended, Departure::GivenUp] {
        let mut engine = engine(4);
        let (doubtful, known) = (key("w", 0, 1), key("k", 100, 1));
        let prepare = |key: &Key| {
            let reserved = engine.store.prepare_store(engine.owner, key, 1, engine.now).unwrap();
            reserved.slots
        };
        let told = prepare(&doubtful);
        prepare(&known);
        engine.store.give_up_instance(engine.owner, 1);
        assert_eq!(engine.status("slots_apart"), 2);
        // A copy of which the end was seen gives its slots back; what began meanwhile leaves with its peer.
        engine.store.abandon_store(&known, 1).unwrap();
        assert_eq!(engine.status("slots_apart"), 1);
        assert_eq!(prepare(&key("l", 200, 1)).len(), 1);
        engine.store.disconnect(engine.owner, departure);
        engine.now += Duration::from_secs(601);
        engine.owner = engine.store.connect();
        engine.store.register(engine.owner, 2, layout("m", 1)).unwrap();
        let others = engine.store.prepare_store(engine.owner, &key("n", 300, 4), 2, engine.now);
        let others = others.unwrap().slots;
        let left = if departure == Departure::GivenUp { 2 } else { 3 };
        assert_eq!(others.len(), left, "{departure:?}");
        assert!(others.iter().all(|slot| slot.offset != told[0].offset), "{departure:?}");
    }
}

#[test]
fn a_writer_past_its_deadline_keeps_its_slots_and_loses_its_chunks() {
    let mut engine = engine(4);
    let writing = key("w", 0, 2);
    let told = engine.store.prepare_store(engine.owner, &writing, 1, engine.now).unwrap().slots;
    engine.now += Duration::from_secs(601);
    let other = engine.store.connect();
    engine.store.register(other, 2, layout("m", 1)).unwrap();
    let again = engine.store.prepare_store(other, &writing, 2, engine.now).unwrap().slots;
    assert_eq!(again.len(), 2);
    assert!(again.iter().all(|slot| told.iter().all(|told| told.offset != slot.offset)));
    for slot in &told {
        engine.store.memory().write(slot.offset, &[0xee; 4096]).unwrap(); // late, into its own slots
    }
    assert!(!engine.store.commit_store(&writing, 1, &[]).unwrap());
    for (chunk, slot) in (0u32..).zip(&again) {
        engine.store.memory().write(slot.offset, &content(&writing, chunk)).unwrap();
    }
    assert!(engine.store.commit_store(&writing, 2, &[]).unwrap());
    assert_eq!(engine.get(&key("r", 0, 2)), 2, "what is served is what was committed");
    assert_eq!(engine.status("slots_apart"), 0);
}

#[test]
fn leases_end_with_an_idle_session_but_not_what_a_worker_is_reading() {
    let mut engine = engine(2);
    let key_ = key("a", 0, 2);
    engine.put(&key_);
    engine.store.lookup(engine.owner, &key_, 1, engine.now).unwrap();
    let first = Key { end: 4, ..key_.clone() };
    engine.store.prepare_retrieve(engine.owner, &first, 1, engine.now).unwrap().unwrap();
    engine.now += Duration::from_secs(299);
    assert_eq!(engine.status("leases"), 1);
    engine.store.take_hit("a", engine.now); // in use
    engine.now += Duration::from_secs(299);
    assert_eq!(engine.status("leases"), 1);
    engine.now += Duration::from_secs(2);
    assert_eq!(engine.status("leases"), 0);
    assert_eq!(engine.put(&key("b", 100, 2)), 1, "the chunk that is being read stays");
    assert_eq!(engine.hits(&key_), 1);
}

#[test]
fn sessions_are_bounded_in_number_and_bytes() {
    let limits = Limits { sessions: 10, session_bytes: 2_000, ..Limits::default() };
    let engine = engine_with(4, limits);
    for request in 0..100 {
        engine.store.lookup(engine.owner, &key(&request.to_string(), 0, 2), 1, engine.now).unwrap();
        assert!(engine.status("sessions") <= 10);
    }
    let long = key("long", 0, 100); // 400 tokens and 100 hashes: over the bound alone
    engine.store.lookup(engine.owner, &long, 1, engine.now).unwrap();
    assert_eq!(engine.status("sessions"), 1, "the newest one is served all the same");
}

#[test]
fn who_has_the_most_sessions_makes_room_for_others() {
    let few = Limits { sessions: 10, ..Limits::default() };
    let small = Limits { session_bytes: 10_000, ..Limits::default() };
    for limits in [few, small] {
        let engine = engine_with(4, limits);
        engine.put(&key("a", 0, 2));
        assert_eq!(engine.store.lookup(engine.owner, &key("a", 0, 2), 1, engine.now).unwrap(), 2);
        let greedy = engine.store.connect();
        for request in 0..200 {
            let key = key(&format!("greedy {request}"), 100, 2);
            engine.store.lookup(greedy, &key, 1, engine.now).unwrap();
        }
        assert_eq!(engine.status("leases"), 2, "the other's oldest are still there");
        // Who has the most loses, whoever is the last to come.
        let before = engine.status("sessions");
        engine.store.lookup(engine.owner, &key("b", 100, 2), 1, engine.now).unwrap();
        assert!(engine.status("sessions") <= before);
        assert_eq!(engine.status("leases"), 2);
        let late = engine.store.connect();
        engine.store.lookup(late, &key("c", 100, 2), 1, engine.now).unwrap();
        engine.store.disconnect(greedy, Departure::Ended);
        assert_eq!(engine.status("sessions"), 3);
    }
}

#[test]
fn a_request_id_counts_as_much_as_it_takes() {
    let engine = engine_with(4, Limits { session_bytes: 10_000, ..Limits::default() });
    for request in 0..10 {
        let long = format!("{request}{}", "x".repeat(1_500));
        engine.store.lookup(engine.owner, &key(&long, 0, 2), 1, engine.now).unwrap();
    }
    assert_eq!(engine.status("sessions"), 2);
}

#[test]
fn leases_and_reads_that_nobody_ends_are_bounded() {
    let engine = engine(4);
    let key_ = key("a", 0, 1);
    engine.put(&key_);
    let lease = |request: &str| {
        let key = Key { num_kv_readers: 255, ..key(request, 0, 1) };
        engine.store.lookup(engine.owner, &key, 1, engine.now)
    };
    for _ in 0..16 {
        lease("a").unwrap(); // 255 at a time
    }
    assert!(lease("a").is_err());
    assert_eq!(engine.status("leases"), 16 * 255, "what was refused leased nothing");

    let read = |request: &str| {
        engine.store.prepare_retrieve(engine.owner, &key(request, 0, 1), 1, engine.now)
    };
    for _ in 0..16 * 255 {
        read("a").unwrap().unwrap();
    }
    lease("b").unwrap();
    let more = (0..255).take_while(|_| read("b").is_ok()).count();
    assert_eq!(more, 16, "4,096 in all");
    engine.store.commit_retrieve(engine.owner, &key("a", 0, 1), 1).unwrap();
    read("b").unwrap().unwrap();
}

#[test]
fn instances_whose_peers_are_gone_make_room_and_those_in_use_do_not() {
    let engine = engine_with(4, Limits { instances: 4, ..Limits::default() });
    engine.put(&key("a", 0, 1));
    // Killed ones, one of which was given up in the middle of a store.
    let gone = |instance, departure| {
        let peer = engine.store.connect();
        engine.store.register(peer, instance, layout("m", 1)).unwrap();
        engine.store.prepare_store(peer, &key("w", 100, 1), instance, engine.now).unwrap();
        engine.store.disconnect(peer, departure);
    };
    gone(2, Departure::GivenUp);
    for instance in 3..20 {
        gone(instance, Departure::Ended);
    }
    assert_eq!(engine.status("instances"), 4);
    assert_eq!(engine.status("slots_apart"), 1, "the one that may still write is remembered");
    assert_eq!(engine.hits(&key("b", 0, 1)), 1, "and so is the one that is connected");
    assert!(engine.store.prepare_store(engine.owner, &key("c", 0, 2), 1, engine.now).is_ok());

    let live = engine.store.connect();
    for instance in [20, 21] {
        engine.store.register(live, instance, layout("m", 1)).unwrap();
    }
    assert!(engine.store.register(live, 22, layout("m", 1)).is_err());
    engine.store.unregister(20);
    engine.store.register(live, 22, layout("m", 1)).unwrap();
}

#[test]
fn generations_tell_that_a_slot_was_used_anew() {
    let engine = engine(1);
    let key_ = key("a", 0, 1);
    let slot =
        engine.store.prepare_store(engine.owner, &key_, 1, engine.now).unwrap().slots.remove(0);
    engine.store.commit_store(&key_, 1, &[]).unwrap();
    let pair = (slot.offset, slot.generation.unwrap());
    assert!(engine.store.holds([pair]));
    engine.put(&key("b", 100, 1));
    assert!(!engine.store.holds([pair]));
}

#[test]
fn registering_again_is_fine_and_with_another_shape_an_error() {
    let engine = engine(4);
    engine.store.register(engine.owner, 1, layout("m", 1)).unwrap();
    let other = Layout { num_layers: 2, ..layout("m", 1) };
    assert!(engine.store.register(engine.owner, 1, other.clone()).is_err());
    engine.put(&key("a", 0, 1));
    engine.store.unregister(1);
    engine.store.register(engine.owner, 1, other).unwrap();
    assert_eq!(engine.hits(&key("b", 0, 1)), 0, "another shape is another object");
    engine.store.unregister(1);
    engine.store.register(engine.owner, 7, layout("m", 1)).unwrap();
    assert_eq!(engine.hits(&key("c", 0, 1)), 1, "objects outlive their instance");
}

#[test]
fn an_engine_that_leaves_takes_its_own_layout_along_and_no_other() {
    let engine = engine(4);
    engine.put(&key("a", 0, 1));
    engine.store.register(engine.owner, 2, Layout { num_layers: 2, ..layout("m", 1) }).unwrap();
    assert_eq!(engine.hits(&key("b", 0, 1)), 0, "lookups mean the layout of the latest");
    engine.store.unregister(2);
    assert_eq!(engine.hits(&key("c", 0, 1)), 1);
    engine.store.register(engine.owner, 2, Layout { num_layers: 2, ..layout("m", 1) }).unwrap();
    engine.store.register(engine.owner, 1, layout("m", 1)).unwrap();
    assert_eq!(engine.hits(&key("d", 0, 1)), 1);
    engine.store.unregister(2);
    engine.store.unregister(1);
    assert_eq!(engine.hits(&key("e", 0, 1)), 0, "nothing is remembered of who is gone");
}

#[test]
fn another_shape_or_element_type_is_another_object() {
    let layouts = [
        layout("m", 1),
        Layout { dtype: Dtype::new("int8").unwrap(), ..layout("m", 1) },
        Layout { num_physical_slots: Some(CHUNK), ..layout("m", 1) },
        Layout { num_physical_slots: Some(0), ..layout("m", 1) },
        Layout { single_plane: false, ..layout("m", 1) },
        Layout { num_layers: 2, ..layout("m", 1) },
        Layout { hidden_dim_size: 512, ..layout("m", 1) },
    ];
    let engine = engine(16);
    for (instance, layout) in (2..).zip(layouts) {
        if engine.store.register(engine.owner, instance, layout.clone()).is_err() {
            continue; // it has no size
        }
        assert_eq!(engine.hits(&key("a", 0, 1)), 0, "{layout:?}");
        let key = key("b", 0, 1);
        let slots = engine.store.prepare_store(engine.owner, &key, instance, engine.now).unwrap();
        assert_eq!(slots.slots.len(), 1);
        assert!(engine.store.commit_store(&key, instance, &[]).unwrap());
    }
}

#[test]
fn an_instance_serves_no_model_but_its_own() {
    let engine = engine(4);
    engine.store.register(engine.owner, 2, layout("n", 1)).unwrap();
    let other = Key { model_name: "n".into(), ..key("a", 0, 1) };
    let error = engine.store.prepare_store(engine.owner, &other, 1, engine.now).unwrap_err();
    assert_eq!(error.code, ErrorCode::Protocol);
    assert!(engine.store.prepare_store(engine.owner, &other, 2, engine.now).is_ok());
}

#[test]
fn what_a_store_goes_on_from_does_not_make_room_for_it() {
    let engine = engine(2);
    engine.put(&key("a", 0, 1));
    engine.put(&key("x", 50, 1));
    let rest = Key { start: CHUNK.into(), ..key("a", 0, 2) };
    assert_eq!(engine.put(&rest), 1);
    assert_eq!(engine.hits(&key("a", 0, 2)), 2);
}

#[test]
fn chunks_that_were_stored_out_of_order_go_in_order() {
    for by_lookup in [false, true] {
        let engine = engine(2);
        let (whole, head) = (key("a", 0, 2), key("a", 0, 1));
        let tail = Key { start: CHUNK.into(), ..whole.clone() };
        engine.put(&tail);
        engine.put(&head);
        if by_lookup {
            assert_eq!(engine.hits(&whole), 2);
        } else {
            assert_eq!(engine.put(&whole), 0);
        }
        assert_eq!(engine.hits(&tail), 1, "now the tail is the one used last");
        engine.put(&key("x", 50, 1));
        assert_eq!(engine.hits(&whole), 1, "and it goes before the head nevertheless");
    }
}

#[test]
fn chunks_that_others_are_writing_are_not_refused() {
    let engine = engine(2);
    let tail = Key { start: u64::from(CHUNK) * 2, ..key("a", 0, 4) };
    let held = engine.store.prepare_store(engine.owner, &tail, 1, engine.now).unwrap();
    assert_eq!(held.slots.len(), 2);
    let whole = engine.store.prepare_store(engine.owner, &key("b", 0, 4), 1, engine.now).unwrap();
    assert_eq!((whole.slots.len(), whole.refused), (0, 2));
}

#[test]
fn a_range_that_is_being_stored_is_granted_no_second_time_whose_commit_could_be_meant_for_either() {
    let engine = engine(4);
    let other = key("b", 50, 2);
    engine.store.prepare_store(engine.owner, &other, 1, engine.now).unwrap();
    let whole = key("a", 0, 4);
    let prepare = || engine.store.prepare_store(engine.owner, &whole, 1, engine.now).unwrap();
    let first = prepare();
    assert_eq!((first.slots.len(), first.refused), (2, 2));
    engine.store.abandon_store(&other, 1).unwrap(); // there is room for the rest now
    let second = prepare();
    assert_eq!((second.slots.len(), second.refused), (0, 0));
    assert_eq!(engine.hits(&key("c", 0, 4)), 0, "nothing of the first is seen");
    assert!(engine.store.commit_store(&whole, 1, &[]).unwrap());
    assert_eq!(engine.hits(&key("c", 0, 4)), 2);
    assert_eq!(prepare().chunk_indices, [2, 3]);
    assert!(engine.store.commit_store(&whole, 1, &[]).unwrap());
    assert_eq!(engine.hits(&key("c", 0, 4)), 4);
}

#[test]
fn one_answer_has_a_bounded_number_of_slots() {
    const MOST: u64 = 65_536;
    let engine = engine(MOST + 4);
    let whole = key("a", 0, MOST + 1);
    let first = engine.store.prepare_store(engine.owner, &whole, 1, engine.now).unwrap();
    assert_eq!((first.slots.len() as u64, first.refused), (MOST, 1));
    assert!(engine.store.commit_store(&whole, 1, &[]).unwrap());
    assert_eq!(engine.put(&whole), 1, "the rest is another store's");
    let hit = engine.store.lookup(engine.owner, &whole, 1, engine.now).unwrap();
    assert_eq!(hit, MOST + 1);
    assert!(engine.store.prepare_retrieve(engine.owner, &whole, 1, engine.now).is_err());
}

#[test]
fn a_request_that_another_peer_goes_on_with_is_that_peers() {
    let engine = engine(4);
    engine.put(&key("a", 0, 1));
    let other = engine.store.connect();
    for owner in [engine.owner, other] {
        engine.store.lookup(owner, &key("r", 0, 1), 1, engine.now).unwrap();
    }
    engine.store.disconnect(engine.owner, Departure::Ended);
    assert_eq!(engine.status("leases"), 2);
    engine.store.disconnect(other, Departure::Ended);
    assert_eq!((engine.status("leases"), engine.status("sessions")), (0, 0));
}

#[test]
fn a_request_that_is_looked_up_again_and_again_takes_its_bytes_once() {
    let limits = Limits { session_bytes: 1_000, ..Limits::default() };
    let engine = engine_with(4, limits);
    engine.store.lookup(engine.owner, &key("a", 0, 1), 1, engine.now).unwrap();
    for _ in 0..100 {
        engine.store.lookup(engine.owner, &key("b", 9, 1), 1, engine.now).unwrap();
    }
    assert_eq!((engine.status("sessions"), engine.status("expired_sessions")), (2, 0));
}

#[test]
fn keys_that_make_no_sense_are_errors_and_change_nothing() {
    let engine = engine(4);
    let good = key("a", 0, 2);
    let bad = [
        Key { end: 9, ..good.clone() },
        Key { start: 8, end: 4, ..good.clone() },
        Key { end: 400, ..good.clone() },
        Key { end: u64::MAX - 3, ..good.clone() },
        Key { start: 1, ..good.clone() },
        Key { model_name: "m@x".into(), ..good.clone() },
        Key { cache_salt: "a/b".into(), ..good.clone() },
        Key { world_size: 0, ..good.clone() },
        Key { world_size: 256, ..good.clone() },
        Key { worker_id: Some(1), ..good.clone() },
        Key { worker_id: None, ..good.clone() },
    ];
    for key in &bad {
        assert!(engine.store.prepare_store(engine.owner, key, 1, engine.now).is_err(), "{key:?}");
    }
    assert!(
        engine.store.prepare_store(engine.owner, &good, 99, engine.now).is_err(),
        "not registered"
    );
    let many = Key { num_kv_readers: 256, ..good.clone() };
    assert!(engine.store.lookup(engine.owner, &many, 1, engine.now).is_err());
    assert_eq!(engine.status("used_bytes"), 0);
    assert_eq!(engine.status("sessions"), 0);
}

#[test]
fn clear_drops_what_nobody_holds() {
    let engine = engine(4);
    engine.put(&key("a", 0, 2));
    engine.put(&key("b", 100, 2));
    engine.store.lookup(engine.owner, &key("r", 100, 1), 1, engine.now).unwrap();
    assert_eq!(engine.store.clear(), 3);
    assert_eq!(engine.hits(&key("c", 0, 2)), 0);
    assert_eq!(engine.hits(&key("d", 100, 2)), 1);
}

#[cfg(target_os = "linux")]
#[test]
fn a_shared_pool_grows_off_the_request_path_until_it_has_all_its_memory() {
    let name = format!("kvferry_test_{}_growth", std::process::id());
    let step = kvferry_copy::POOL_STEP;
    let options = StoreOptions {
        chunk_size: CHUNK,
        memory: 3 * step,
        shared_name: Some(name.clone()),
        policy: Policy::Lru,
        disk: None,
        remote: None,
        limits: Limits::default(),
    };
    let store = Store::new(options.clone()).unwrap();
    assert!(Store::new(options).is_err(), "the name is taken");
    let (owner, now) = (store.connect(), Instant::now());
    let hidden = u32::try_from(step / 2 / u64::from(CHUNK)).unwrap();
    let big = Layout { hidden_dim_size: hidden, ..layout("m", 1) };
    let figure = |name: &str| store.status(now).iter().find(|row| row.0 == name).unwrap().1;
    assert_eq!(figure("reserved_bytes"), step);
    store.register(owner, 1, big).unwrap(); // 16 such objects are wanted: the whole pool
    let deadline = Instant::now() + Duration::from_secs(20);
    while figure("reserved_bytes") < 3 * step {
        assert!(Instant::now() < deadline, "the pool did not grow");
        std::thread::yield_now();
    }
    let reserved = store.prepare_store(owner, &key("a", 0, 7), 1, now).unwrap();
    assert_eq!((reserved.slots.len(), reserved.refused), (6, 1));
    assert_eq!(store.pool(), (name, 3 * step));
}

#[cfg(target_os = "linux")]
#[test]
fn what_comes_faster_than_the_pool_grows_is_counted_by_itself_and_finds_room_the_next_time() {
    const MIB: u64 = 1 << 20;
    let store = Store::new(StoreOptions {
        chunk_size: CHUNK,
        memory: 512 * MIB,
        shared_name: Some(format!("kvferry_test_{}_burst", std::process::id())),
        policy: Policy::Lru,
        disk: None,
        remote: None,
        limits: Limits::default(),
    })
    .unwrap();
    let (owner, now) = (store.connect(), Instant::now());
    let figure = |name: &str| store.status(now).iter().find(|row| row.0 == name).unwrap().1;
    let wait_for = |reserved: u64| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while figure("reserved_bytes") < reserved * MIB {
            assert!(Instant::now() < deadline, "the pool did not grow");
            std::thread::yield_now();
        }
    };
    let hidden = u32::try_from(MIB / u64::from(CHUNK)).unwrap();
    store.register(owner, 1, Layout { hidden_dim_size: hidden, ..layout("m", 1) }).unwrap();
    wait_for(128);
    let reserved = store.prepare_store(owner, &key("a", 0, 300), 1, now).unwrap();
    assert_eq!((reserved.slots.len(), reserved.refused, reserved.growing), (128, 172, true));
    assert_eq!((figure("refused_chunks"), figure("refused_growing_chunks")), (0, 172));
    wait_for(320); // room for as many, in steps of 64 MiB
    let reserved = store.prepare_store(owner, &key("b", 100_000, 172), 1, now).unwrap();
    assert_eq!((reserved.slots.len(), reserved.refused), (172, 0));
    wait_for(512);
    let reserved = store.prepare_store(owner, &key("c", 200_000, 300), 1, now).unwrap();
    assert_eq!((reserved.slots.len(), reserved.growing), (212, false), "it is full");
    assert_eq!((figure("refused_chunks"), figure("refused_growing_chunks")), (88, 172));
}

#[test]
fn many_threads_store_and_read_and_nothing_wrong_is_served() {
    let engine = Arc::new(engine(16));
    std::thread::scope(|scope| {
        for thread in 0u32..4 {
            let engine = Arc::clone(&engine);
            scope.spawn(move || {
                for round in 0u32..300 {
                    let key = key(&format!("{thread}-{round}"), (thread * 7 + round) % 9 * 50, 3);
                    let reserved =
                        engine.store.prepare_store(engine.owner, &key, 1, engine.now).unwrap();
                    for (slot, chunk) in reserved.slots.iter().zip(&reserved.chunk_indices) {
                        let bytes = content(&key, *chunk);
                        engine.store.memory().write(slot.offset, &bytes).unwrap();
                    }
                    engine.store.commit_store(&key, 1, &[]).unwrap();
                    // Another thread's commit of the same range may come between: only reads count.
                    let hit = engine.store.lookup(engine.owner, &key, 1, engine.now).unwrap();
                    let range = Key { end: hit * u64::from(CHUNK), ..key.clone() };
                    let slots =
                        engine.store.prepare_retrieve(engine.owner, &range, 1, engine.now).unwrap();
                    for (chunk, slot) in (0u32..).zip(slots.unwrap()) {
                        let mut bytes = vec![0; 4096];
                        engine.store.memory().read(slot.offset, &mut bytes).unwrap();
                        assert_eq!(bytes, content(&key, chunk));
                    }
                    engine.store.commit_retrieve(engine.owner, &range, 1).unwrap();
                    engine.store.end_session(&key.request_id);
                }
            });
        }
    });
}

#[derive(Debug, Clone)]
enum Step {
    Prepare {
        first: u32,
        chunks: u64,
        instance: u64,
    },
    Commit {
        first: u32,
        chunks: u64,
        instance: u64,
    },
    Abandon {
        first: u32,
        chunks: u64,
        instance: u64,
    },
    Lookup {
        first: u32,
        chunks: u64,
        request: u32,
    },
    Retrieve {
        first: u32,
        chunks: u64,
        request: u32,
        instance: u64,
        by: usize,
    },
    /// Of one of the retrievals.
    CommitRetrieve {
        which: usize,
        by: usize,
    },
    Release {
        first: u32,
        chunks: u64,
        request: u32,
    },
    End {
        request: u32,
    },
    Disconnect {
        instance: u64,
        ended: bool,
    },
    Unregister {
        instance: u64,
    },
    Wait {
        seconds: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let (first, chunks, instance, request, by) = (0u32..4, 1u64..5, 0u64..3, 0u32..4, 0usize..3);
    let place = (first, chunks, instance, request, by);
    (0u32..40, place, any::<bool>(), 0u64..400).prop_map(
        |(kind, (first, chunks, instance, request, by), ended, seconds)| match kind {
            0..9 => Step::Prepare { first, chunks, instance },
            9..16 => Step::Commit { first, chunks, instance },
            16..18 => Step::Abandon { first, chunks, instance },
            18..25 => Step::Lookup { first, chunks, request },
            25..30 => Step::Retrieve { first, chunks, request, instance, by },
            30..33 => Step::CommitRetrieve { which: first as usize, by },
            33..35 => Step::Release { first, chunks, request },
            35 => Step::End { request },
            36 | 37 => Step::Disconnect { instance, ended },
            38 => Step::Unregister { instance },
            _ => Step::Wait { seconds },
        },
    )
}

/// Slots that an instance was told of for writing.
struct Told {
    instance: u64,
    owner: Owner,
    range: (u32, u64),
    offsets: Vec<u64>,
}

/// Slots that an instance was told of for reading.
struct Read {
    instance: u64,
    owner: Owner,
    range: (u32, u64, u32),
    offsets: Vec<u64>,
    /// Its reader may commit it yet.
    open: bool,
    /// Its owner was given up, so that another may.
    apart: bool,
    until: Instant,
}

impl Read {
    fn holds(&self, offset: u64, now: Instant) -> bool {
        (self.open || self.until > now) && self.offsets.contains(&offset)
    }
}

/// A commit or an abandonment ends the oldest prepare of its range.
fn end_oldest(told: &mut Vec<Told>, instance: u64, range: (u32, u64)) {
    if let Some(oldest) =
        told.iter().position(|held| (held.instance, held.range) == (instance, range))
    {
        told.remove(oldest);
    }
}

proptest! {
    // What may go wrong takes several steps that belong together, which few cases have.
    #![proptest_config(ProptestConfig { cases: 8192, ..ProptestConfig::default() })]

    /// Whatever peers do and wherever they stop: a slot that one of them was told of is nobody else's
    /// until it gives it back, and in the end all of the pool comes back.
    #[test]
    fn no_slot_is_ever_granted_twice_and_none_is_lost(steps in prop::collection::vec(step(), 1..120)) {
        let mut engine = engine(8);
        engine.store.unregister(1);
        let mut owners: Vec<Owner> = (0..3).map(|_| engine.store.connect()).collect();
        for (instance, owner) in (0..).zip(&owners) {
            engine.store.register(*owner, instance, layout("m", 1)).unwrap();
        }
        let mut told: Vec<Told> = Vec::new();
        let mut read: Vec<Read> = Vec::new();
        for step in steps {
            match step {
                Step::Prepare { first, chunks, instance } => {
                    let key = key("w", first * 100, chunks);
                    let owner = owners[usize::try_from(instance).unwrap()];
                    let Ok(reserved) = engine.store.prepare_store(owner, &key, instance, engine.now) else { continue };
                    let offsets: Vec<u64> = reserved.slots.iter().map(|slot| slot.offset).collect();
                    for offset in &offsets {
                        prop_assert!(told.iter().all(|held| !held.offsets.contains(offset)), "granted twice");
                        prop_assert!(!read.iter().any(|held| held.holds(*offset, engine.now)), "written while read");
                    }
                    if !offsets.is_empty() {
                        told.push(Told { instance, owner, range: (first, chunks), offsets });
                    }
                }
                Step::Commit { first, chunks, instance } => {
                    let _ = engine.store.commit_store(&key("w", first * 100, chunks), instance, &[]);
                    end_oldest(&mut told, instance, (first, chunks));
                }
                Step::Abandon { first, chunks, instance } => {
                    let _ = engine.store.abandon_store(&key("w", first * 100, chunks), instance);
                    end_oldest(&mut told, instance, (first, chunks));
                }
                Step::Lookup { first, chunks, request } => {
                    let key = key(&request.to_string(), first * 100, chunks);
                    engine.store.lookup(owners[0], &key, 1, engine.now).unwrap();
                }
                Step::Retrieve { first, chunks, request, instance, by } => {
                    let key = key(&request.to_string(), first * 100, chunks);
                    let owner = owners[by];
                    if let Ok(Some(slots)) = engine.store.prepare_retrieve(owner, &key, instance, engine.now) {
                        let offsets: Vec<u64> = slots.iter().map(|slot| slot.offset).collect();
                        for offset in &offsets {
                            prop_assert!(told.iter().all(|held| !held.offsets.contains(offset)), "read while written");
                        }
                        let (range, until) = ((first, chunks, request), engine.now + READ_HOLD);
                        read.push(Read { instance, owner, range, offsets, open: true, apart: false, until });
                    }
                }
                Step::CommitRetrieve { which, by } => {
                    let Some(one) = read.get(which) else { continue };
                    let (owner, instance, (first, chunks, request)) = (owners[by], one.instance, one.range);
                    let key = key(&request.to_string(), first * 100, chunks);
                    let mine = |held: &Read| held.open && (held.instance, held.range) == (instance, (first, chunks, request));
                    let own = read.iter().position(|held| mine(held) && held.owner == owner);
                    let ended = own.or_else(|| read.iter().position(|held| mine(held) && held.apart));
                    let committed = engine.store.commit_retrieve(owner, &key, instance).unwrap_or_default();
                    prop_assert_eq!(committed, ended.is_some());
                    ended.map(|ended| read.remove(ended));
                }
                Step::Release { first, chunks, request } => {
                    engine.store.release(&key(&request.to_string(), first * 100, chunks), 1, engine.now).unwrap();
                }
                Step::End { request } => engine.store.end_session(&request.to_string()),
                Step::Disconnect { instance, ended } => {
                    let index = usize::try_from(instance).unwrap();
                    let departure = if ended { Departure::Ended } else { Departure::GivenUp };
                    engine.store.disconnect(owners[index], departure);
                    if ended {
                        told.retain(|held| held.owner != owners[index]);
                    }
                    for held in read.iter_mut().filter(|held| held.owner == owners[index]) {
                        (held.open, held.apart) = (held.open && !ended, !ended);
                    }
                    owners[index] = engine.store.connect();
                    let _ = engine.store.register(owners[index], instance, layout("m", 1));
                }
                Step::Unregister { instance } => {
                    engine.store.unregister(instance);
                    told.retain(|held| held.instance != instance);
                    read.iter_mut().filter(|held| held.instance == instance).for_each(|held| held.open = false);
                    let owner = owners[usize::try_from(instance).unwrap()];
                    engine.store.register(owner, instance, layout("m", 1)).unwrap();
                }
                Step::Wait { seconds } => engine.now += Duration::from_secs(seconds),
            }
            prop_assert!(engine.status("used_bytes") <= 8 * OBJECT);
        }
        for (instance, owner) in (0..).zip(owners) {
            engine.store.disconnect(owner, Departure::Ended);
            engine.store.unregister(instance);
        }
        engine.now += READ_HOLD;
        prop_assert_eq!(engine.status("leases"), 0);
        prop_assert_eq!(engine.status("slots_reading"), 0);
        engine.store.clear();
        prop_assert_eq!(engine.status("used_bytes"), 0);
    }
}
