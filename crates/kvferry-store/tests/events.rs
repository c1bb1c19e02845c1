//! What a listener may rely on, each test by what its index would get wrong.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::HashSet;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use common::{CHUNK, Engine, key, layout};
use kvferry_core::cache::Cache;
use kvferry_core::events::{EVENT_SPACES_MAX, EventKind, Events, KvEvent};
use kvferry_core::hash::{ChunkAlgorithm, ChunkHasher};
use kvferry_core::key::Key;
use kvferry_store::{Departure, Embedded};
use proptest::prelude::*;

/// Events that a store remembers.
const KEPT: u64 = 65_536;

fn hashes(key: &Key) -> Vec<[u8; 32]> {
    let mut hashes = Vec::new();
    let hasher = ChunkHasher::new(ChunkAlgorithm::Blake3, CHUNK).unwrap();
    hasher.extend(&mut hashes, &key.token_ids[..usize::try_from(key.end).unwrap()]);
    hashes
}

/// What became of which chunk, in order.
fn story(events: &[KvEvent]) -> Vec<(EventKind, [u8; 32])> {
    events.iter().map(|event| (event.kind, event.chunk)).collect()
}

fn all(engine: &Engine) -> Events {
    engine.store.events(0, u32::MAX)
}

#[test]
fn a_commit_is_told_parents_first_with_whose_it_is_and_a_reservation_is_not() {
    let engine = Engine::registered(16);
    engine.register(2, layout("tp", 2));
    assert_eq!(all(&engine).next(), 1);
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    let prompt = Key { cache_salt: "tenant".into(), ..key(0, 2) };
    engine.reserve(&prompt, 1);
    assert_eq!(all(&engine).events, [], "nobody can find it yet");
    engine.store.commit_store(&prompt, 1, &[]).unwrap();
    let second = Key { model_name: "tp".into(), world_size: 2, worker_id: Some(1), ..key(0, 1) };
    engine.put_as(&second, 2);
    let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();

    let events = all(&engine);
    assert_eq!((events.first, events.next(), events.lost), (1, 4, false));
    let hashes = hashes(&prompt);
    let told = events.events;
    let facts = told.iter().map(|event| (event.kind, event.chunk, event.parent, event.rank));
    let stored = EventKind::Stored;
    assert!(facts.eq([
        (stored, hashes[0], None, 0),
        (stored, hashes[1], Some(hashes[0]), 0),
        (stored, hashes[0], None, 1),
    ]));
    let spaces = told
        .iter()
        .map(|event| (&*event.space.model_name, event.space.world_size, &*event.space.cache_salt));
    assert!(spaces.eq([("m", 1, "tenant"), ("m", 1, "tenant"), ("tp", 2, "")]));
    assert!(told.iter().all(|event| (before..=after).contains(&event.at_ms.into())));
}

#[test]
fn a_chunk_that_continues_what_was_stored_before_names_its_parent() {
    let engine = Engine::registered(16);
    let prompt = key(0, 3);
    engine.put(&Key { end: u64::from(CHUNK), ..prompt.clone() });
    engine.put(&Key { start: u64::from(CHUNK), ..prompt.clone() });
    let hashes = hashes(&prompt);
    let parents: HashSet<_> =
        all(&engine).events.iter().map(|event| (event.chunk, event.parent)).collect();
    let expected = [(hashes[0], None), (hashes[1], Some(hashes[0])), (hashes[2], Some(hashes[1]))];
    assert_eq!(parents, HashSet::from(expected));
}

#[test]
fn evicted_cleared_and_discarded_chunks_are_told_once() {
    use EventKind::{Removed, Stored};
    let engine = Engine::registered(2);
    let (first, second) = (key(0, 1), key(100, 2));
    let (a, b) = (hashes(&first)[0], hashes(&second));
    engine.put(&first);
    engine.put(&second);
    let events = all(&engine).events;
    assert_eq!(story(&events[..2]), [(Stored, a), (Removed, a)], "evicted before the commit");
    assert_eq!(events.len(), 4);
    assert_eq!(engine.store.clear(), 2);
    let cleared = engine.store.events(5, 9).events;
    assert_eq!(story(&cleared), [(Removed, b[1]), (Removed, b[0])], "children first");

    engine.put(&first);
    assert_eq!(engine.discard(&first), 1);
    engine.put(&first);
    engine.put(&second); // takes the slot of the discarded one, of which no more is to be told
    let events = engine.store.events(7, 99).events;
    let expected = [(Stored, a), (Removed, a), (Stored, a), (Removed, a)];
    assert_eq!(story(&events[..4]), expected);
    assert_eq!(events.len(), 6);
    assert_eq!(events[1].parent, None);
    assert_eq!(cleared[0].parent, Some(b[0]));
}

#[test]
fn what_was_never_visible_is_not_told_to_be_gone() {
    let engine = Engine::registered(16);
    engine.reserve(&key(0, 2), 1);
    engine.store.abandon_store(&key(0, 2), 1).unwrap();
    engine.reserve(&key(10, 2), 1);
    engine.store.disconnect(engine.owner, Departure::GivenUp);
    engine.reserve(&key(20, 2), 1);
    engine.store.unregister(1);
    assert_eq!(all(&engine).next(), 1);
}

#[test]
fn a_listener_reads_in_parts_without_gaps_or_repetition() {
    let engine = Engine::registered(64);
    for prompt in 0..20 {
        engine.put(&key(prompt * 100, 2));
    }
    let (mut cursor, mut heard) = (0, Vec::new());
    loop {
        let events = engine.store.events(cursor, 7);
        assert!(!events.lost);
        if cursor > 0 {
            assert_eq!(events.first, cursor);
        }
        cursor = events.next();
        if events.events.is_empty() {
            break;
        }
        assert!(events.events.len() <= 7);
        heard.extend(events.events);
    }
    assert_eq!((cursor, &heard), (41, &all(&engine).events));
    assert_eq!(engine.store.events(cursor, 0).next(), cursor);
    engine.put(&key(5000, 1));
    let more = engine.store.events(cursor, 7);
    assert_eq!((more.first, more.events.len(), more.lost), (41, 1, false));
}

#[test]
fn a_listener_that_was_too_slow_or_comes_from_elsewhere_is_told() {
    let engine = Engine::registered(1);
    let mut prompts = 0..;
    let mut store = |count| {
        for prompt in prompts.by_ref().take(count) {
            engine.put(&key(prompt * 100, 1));
        }
    };
    store(10); // each of them but the first removes the one before: 19 events
    assert_eq!(engine.store.events(20, 5).next(), 20);
    assert!(!engine.store.events(1, 5).lost);
    store(usize::try_from(KEPT / 2).unwrap());
    let end = 20 + KEPT;
    let kept = end - KEPT;
    for (cursor, lost) in [(0, false), (1, true), (kept - 1, true), (kept, false)] {
        let events = engine.store.events(cursor, 5);
        assert_eq!((events.first, events.events.len(), events.lost), (kept, 5, lost), "{cursor}");
    }
    let ahead = engine.store.events(end + 1, 5);
    assert_eq!((ahead.next(), ahead.lost), (end, true), "that cursor was never given out");
    assert!(!engine.store.events(end, 5).lost);
}

#[test]
fn each_start_of_a_store_is_another_incarnation() {
    let (first, second) = (Engine::new(1), Engine::new(1));
    let incarnation = all(&first).incarnation;
    assert_eq!(incarnation, first.store.boot_token());
    assert_eq!(incarnation, all(&first).incarnation);
    assert_ne!(incarnation, all(&second).incarnation);
}

#[test]
fn an_answer_has_a_bound_however_many_tenants_it_tells_of() {
    let engine = Engine::registered(4096);
    for tenant in 0..2000 {
        engine.put(&Key { cache_salt: tenant.to_string(), ..key(0, 1) });
    }
    let (mut cursor, mut heard) = (1, 0);
    while heard < 2000 {
        let events = engine.store.events(cursor, u32::MAX);
        let spaces: HashSet<_> = events.events.iter().map(|event| &event.space).collect();
        assert!((1..=EVENT_SPACES_MAX).contains(&spaces.len()), "{}", spaces.len());
        assert_eq!((events.first, events.lost), (cursor, false));
        cursor = events.next();
        heard += events.events.len();
    }
    assert_eq!(cursor, 2001);
}

#[test]
fn an_engine_that_embeds_the_store_hears_them_as_well() {
    let engine = Engine::registered(4);
    engine.put(&key(0, 2));
    let embedded = Embedded::new(engine.store.clone());
    let events = common::finish(embedded.events(0, 9, Instant::now())).unwrap();
    assert_eq!(events, engine.store.events(0, 9));
    assert_eq!(events.events.len(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// Whatever happens, an index that follows the events has what lookups find.
    #[test]
    fn an_index_of_the_events_is_the_stores(
        steps in prop::collection::vec((0..6_u8, 0..4_u32, 1..4_u64), 1..60),
    ) {
        let engine = Engine::registered(6);
        let (mut index, mut cursor) = (HashSet::new(), 1);
        for (step, prompt, chunks) in steps {
            let key = key(prompt * 100, chunks);
            match step {
                0..=2 => drop(engine.put(&key)),
                3 => drop(engine.lookup(&key)),
                4 => engine.store.end_session(&key.request_id),
                _ if prompt == 0 => drop(engine.store.clear()),
                _ => {
                    let hit = engine.lookup(&key);
                    engine.store.end_session(&key.request_id);
                    if hit == chunks {
                        engine.discard(&key);
                    }
                }
            }
            let events = engine.store.events(cursor, 1000);
            prop_assert_eq!((events.first, events.lost), (cursor, false));
            cursor = events.next();
            for event in events.events {
                match event.kind {
                    EventKind::Stored => prop_assert!(index.insert(event.chunk), "told twice"),
                    EventKind::Removed => prop_assert!(index.remove(&event.chunk), "never told"),
                }
            }
        }
        for prompt in 0..4 {
            let key = Key { request_id: "probe".into(), ..key(prompt * 100, 3) };
            let found = hashes(&key).iter().take_while(|hash| index.contains(*hash)).count();
            prop_assert_eq!(engine.lookup(&key), found as u64);
            engine.store.end_session("probe");
        }
    }
}
