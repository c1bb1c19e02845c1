//! Each cause of a miss, told apart from the others.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{CHUNK, Engine, OBJECT, finish, key, layout};
use kvferry_core::cache::Cache;
use kvferry_core::explain::{
    Evictor, Explanation, LISTED_MAX, MissingChunk, ObjectLayout, Removal, RemovalCause,
    count_hits, prompt_key,
};
use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_core::{Error, ErrorCode};
use kvferry_store::{Embedded, Quota, Quotas};

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

/// What the store says of all ranks' chunks.
fn explain(engine: &Engine, key: &Key) -> Explanation {
    let key = Key { worker_id: None, request_id: "doctor".into(), ..key.clone() };
    finish(engine.store.explain(&key, str::to_owned).unwrap())
}

/// The same of the chunk that is missing, and which one it is.
fn missing(engine: &Engine, key: &Key) -> (u64, MissingChunk) {
    let explanation = explain(engine, key);
    (explanation.hit_chunks, explanation.missing.expect("a chunk is missing"))
}

/// Nothing is known of the chunk.
fn nothing(found: &MissingChunk) -> MissingChunk {
    MissingChunk {
        chunk: found.chunk,
        missing_ranks: vec![],
        writing_ranks: vec![],
        other_salts: 0,
        other_models: vec![],
        other_world_sizes: vec![],
        other_layouts: vec![],
        removed: None,
        log_since_ms: found.log_since_ms,
    }
}

#[test]
fn a_hit_is_a_hit_and_takes_no_lease() {
    let engine = Engine::registered(4);
    engine.put(&key(0, 3));
    let hit = Explanation { chunks: 3, hit_chunks: 3, registered: true, missing: None };
    assert_eq!(explain(&engine, &key(0, 3)), hit);
    let shorter = Explanation { chunks: 2, hit_chunks: 2, ..hit.clone() };
    assert_eq!(explain(&engine, &key(0, 2)), shorter);
    let nothing = Explanation { chunks: 0, hit_chunks: 0, ..hit };
    assert_eq!(explain(&engine, &key(0, 0)), nothing);
    assert_eq!(engine.store.clear(), 3, "nothing is held");
}

#[test]
fn never_stored_is_said_with_since_when_that_is_known() {
    let before = now_ms();
    let engine = Engine::registered(4);
    let after = now_ms();
    engine.put(&key(0, 2));
    let (hits, found) = missing(&engine, &key(0, 3));
    assert_eq!((hits, &found), (2, &nothing(&found)));
    assert!((before..=after).contains(&found.log_since_ms), "since the store started");
    let (hits, found) = missing(&engine, &key(100, 3));
    assert_eq!((hits, &found), (0, &nothing(&found)));
}

#[test]
fn other_salts_are_counted_and_never_named() {
    let engine = Engine::registered(16);
    let salted = |salt: &str| Key { cache_salt: salt.into(), ..key(0, 1) };
    engine.put(&salted("secret-a"));
    engine.put(&salted("secret-b"));
    engine.register(2, layout("secret-model", 1));
    for salt in ["secret-b", "secret-c"] {
        // Asked for with that salt, it would be another model's all the same.
        engine.put_as(&Key { model_name: "secret-model".into(), ..salted(salt) }, 2);
    }
    for salt in ["", "mine"] {
        let (hits, found) = missing(&engine, &salted(salt));
        assert_eq!((hits, &found), (0, &MissingChunk { other_salts: 2, ..nothing(&found) }));
        assert!(!format!("{found:?}").contains("secret"));
    }
    engine.put(&key(0, 1));
    let (_, found) = missing(&engine, &salted("mine"));
    assert_eq!(found.other_salts, 3, "no salt is one of them");
}

#[test]
fn other_models_are_named_up_to_a_bound() {
    let engine = Engine::registered(32);
    for number in 0..12u64 {
        let model = format!("model {number:02}");
        engine.register(10 + number, layout(&model, 1));
        engine.put_as(&Key { model_name: model, ..key(0, 1) }, 10 + number);
        let (hits, found) = missing(&engine, &key(0, 1));
        let count = LISTED_MAX.min(usize::try_from(number).unwrap() + 1);
        let other_models = (0..count).map(|number| format!("model {number:02}")).collect();
        assert_eq!((hits, &found), (0, &MissingChunk { other_models, ..nothing(&found) }));
    }
}

#[test]
fn ranks_that_lack_a_chunk_are_named() {
    let engine = Engine::new(16);
    engine.register(1, layout("m", 4));
    let rank = |rank| Key { world_size: 4, worker_id: Some(rank), ..key(0, 2) };
    for number in [0, 2] {
        engine.put(&rank(number));
    }
    engine.put(&Key { end: u64::from(CHUNK), ..rank(1) });
    engine.put(&Key { end: u64::from(CHUNK), ..rank(3) });
    let (hits, found) = missing(&engine, &rank(0));
    let expected = MissingChunk { missing_ranks: vec![1, 3], ..nothing(&found) };
    assert_eq!((hits, &found), (1, &expected));

    engine.reserve(&rank(3), 1);
    let (_, found) = missing(&engine, &rank(0));
    let (missing_ranks, writing_ranks) = (vec![1], vec![3]);
    assert_eq!(found, MissingChunk { missing_ranks, writing_ranks, ..nothing(&found) });
    engine.put(&rank(1));
    engine.store.commit_store(&rank(3), 1, &[]).unwrap();
    assert_eq!(explain(&engine, &rank(0)).missing, None);
}

#[test]
fn another_world_size_is_named() {
    let engine = Engine::registered(16);
    for world_size in [8, 2] {
        engine.register(world_size.into(), layout("m", world_size));
        engine.put_as(&Key { world_size, ..key(0, 1) }, world_size.into());
    }
    let (_, found) = missing(&engine, &key(0, 1));
    assert_eq!(found, MissingChunk { other_world_sizes: vec![2, 8], ..nothing(&found) });
}

#[test]
fn another_layout_of_the_model_is_named() {
    let engine = Engine::registered(16);
    engine.put(&key(0, 1));
    let float16 = Dtype::new("float16").unwrap();
    engine.register(2, Layout { dtype: float16, hidden_dim_size: 512, ..layout("m", 1) });
    let (_, found) = missing(&engine, &key(0, 1));
    let stored = ObjectLayout { shape: vec![1, CHUNK.into(), 1024], dtype: "uint8".into() };
    assert_eq!(found, MissingChunk { other_layouts: vec![stored], ..nothing(&found) });
}

#[test]
fn a_chunk_that_is_being_written_is_neither_there_nor_unknown() {
    let engine = Engine::registered(16);
    engine.reserve(&key(0, 2), 1);
    let (hits, found) = missing(&engine, &key(0, 2));
    assert_eq!((hits, &found), (0, &MissingChunk { writing_ranks: vec![0], ..nothing(&found) }));
    let other = Key { cache_salt: "other".into(), ..key(0, 2) };
    let (_, found) = missing(&engine, &other);
    assert_eq!(found, nothing(&found), "what another tenant writes is not stored yet");
}

#[test]
fn how_a_chunk_went_is_said_with_the_time() {
    let engine = Engine::registered(2);
    let removed = |prompt: &Key| missing(&engine, prompt).1.removed.unwrap();
    let before = now_ms();
    engine.put(&key(0, 2));
    engine.put(&key(100, 1));
    let (hits, found) = missing(&engine, &key(0, 2));
    let removal = found.removed.clone().unwrap();
    assert_eq!((hits, removal.cause), (1, RemovalCause::Evicted));
    assert!((before..=now_ms()).contains(&removal.at_ms));
    assert_eq!(found, MissingChunk { removed: Some(removal), ..nothing(&found) });

    engine.put(&key(0, 2));
    engine.store.clear();
    assert_eq!(removed(&key(0, 2)).cause, RemovalCause::Cleared, "the latest counts");
    engine.put(&key(0, 2));
    engine.discard(&key(0, 1));
    assert_eq!(removed(&key(0, 2)).cause, RemovalCause::Damaged);
    engine.put(&key(0, 2));
    assert_eq!(explain(&engine, &key(0, 2)).missing, None);

    let other = Key { cache_salt: "other".into(), ..key(0, 2) };
    let (_, found) = missing(&engine, &other);
    assert_eq!(found.removed, None, "that was another tenant's");
}

#[test]
fn whose_store_a_chunk_made_room_for_is_said_by_its_label_and_whether_it_is_the_one_that_asks() {
    let engine = Engine::registered(2);
    let of = |salt: &str, first| Key { cache_salt: salt.into(), ..key(first, 2) };
    let by = |key: &Key| {
        let key = Key { request_id: "doctor".into(), ..key.clone() };
        let told = finish(engine.store.explain(&key, |salt| format!("<{salt}>")).unwrap());
        told.missing.unwrap().removed.unwrap().by
    };
    engine.put(&of("a", 0));
    engine.put(&of("b", 100));
    assert_eq!(by(&of("a", 0)), Some(Evictor { tenant: "<b>".into(), own: false }));
    engine.put(&of("b", 200));
    assert_eq!(by(&of("b", 100)), Some(Evictor { tenant: "<b>".into(), own: true }));
    let quota = Quota { cap: Some(2 * OBJECT), guarantee: 0 };
    engine.store.set_quotas(Quotas { default: quota, ..Quotas::default() }).unwrap();
    engine.put(&of("b", 300));
    assert_eq!(by(&of("b", 200)), Some(Evictor { tenant: "<b>".into(), own: true }), "its cap");
    engine.store.clear();
    assert_eq!(by(&of("b", 300)), None, "nobody stored anything");
}

#[test]
fn what_makes_room_is_counted_by_how_long_it_was_not_used() {
    let mut engine = Engine::registered(2);
    let start = engine.now;
    let ages = |engine: &Engine| engine.store.evicted_ages();
    engine.put(&key(0, 2));
    engine.now = start + Duration::from_secs(100);
    engine.put(&key(100, 1)); // for the second chunk
    assert_eq!(ages(&engine).sum(), Duration::from_secs(100));
    assert_eq!(ages(&engine).cumulative()[..5], [0, 0, 0, 1, 1]);
    assert_eq!(engine.lookup(&key(0, 1)), 1); // the first is used
    engine.store.end_session("request 0");
    engine.now = start + Duration::from_secs(105);
    engine.put(&key(200, 2)); // for all that is there
    assert_eq!(ages(&engine).sum(), Duration::from_secs(110));
    assert_eq!(ages(&engine).cumulative()[..5], [0, 2, 2, 3, 3]);
    engine.store.clear();
    assert_eq!(ages(&engine).cumulative()[10], 3, "what is cleared makes no room");
}

#[test]
fn what_the_log_has_forgotten_is_not_known() {
    let engine = Engine::registered(1);
    engine.put(&key(0, 1));
    engine.store.clear();
    // Each but the first of these removes the one before: 65,535 events after those two.
    (1..=32_768).for_each(|prompt| assert_eq!(engine.put(&key(prompt * 10, 1)), 1));
    let removed = missing(&engine, &key(0, 1)).1.removed;
    assert_eq!(removed.map(|removal| removal.cause), Some(RemovalCause::Cleared));
    engine.put(&key(500_000, 1));
    let (_, found) = missing(&engine, &key(0, 1));
    assert_eq!(found, nothing(&found));
    let oldest = engine.store.events(0, 1).events[0].at_ms;
    assert_eq!(found.log_since_ms, oldest);
}

#[test]
fn the_log_is_looked_through_from_end_to_end() {
    let engine = Engine::registered(1);
    let prompt = |number: u32| key(number * 10, 1);
    (0..6_000).for_each(|number| assert_eq!(engine.put(&prompt(number)), 1));
    // Two events each: these are where one slice of the log ends and the next one begins.
    for number in (1_850..1_950).chain(3_900..4_000) {
        let removed = missing(&engine, &prompt(number)).1.removed;
        assert_eq!(removed.map(|removal| removal.cause), Some(RemovalCause::Evicted), "{number}");
    }
}

#[test]
fn without_an_engine_the_stored_layout_counts() {
    let engine = Engine::registered(64);
    engine.put(&key(0, 3));
    engine.register(2, Layout { hidden_dim_size: 512, ..layout("m", 1) });
    engine.put_as(&key(0, 2), 2);
    engine.store.unregister(1);
    engine.store.unregister(2);
    assert_eq!(engine.lookup(&key(0, 3)), 0, "lookups need a registration");
    let hit = Explanation { chunks: 3, hit_chunks: 3, registered: false, missing: None };
    assert_eq!(explain(&engine, &key(0, 3)), hit, "the layout of which most is there");
    let longer = explain(&engine, &key(0, 4));
    assert_eq!((longer.hit_chunks, longer.registered), (3, false));
    let unknown = explain(&engine, &Key { model_name: "n".into(), ..key(0, 3) });
    let found = unknown.missing.unwrap();
    assert_eq!((unknown.hit_chunks, unknown.registered), (0, false));
    assert_eq!(found, MissingChunk { other_models: vec!["m".into()], ..nothing(&found) });
    engine.store.clear();
    let (_, found) = missing(&engine, &key(0, 3));
    let cause = found.removed.map(|removal| removal.cause);
    assert_eq!(cause, Some(RemovalCause::Cleared), "of whatever layout");
}

#[test]
fn the_lock_is_let_go_in_between() {
    let engine = Engine::registered(20_000);
    engine.put(&key(0, 19_000));
    let prompt = Key { request_id: "doctor".into(), ..key(50_000, 1) };
    let mut explaining = std::pin::pin!(engine.store.explain(&prompt, str::to_owned).unwrap());
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let mut turns = 0;
    let explanation = loop {
        match explaining.as_mut().poll(&mut context) {
            std::task::Poll::Ready(explanation) => break explanation,
            std::task::Poll::Pending => turns += 1,
        }
        if turns == 2 {
            engine.put(&prompt); // what others do meanwhile is done
        }
    };
    assert!(turns > 19_000 / 4096, "{turns} slices");
    assert_eq!(explanation.missing, None, "it came while the objects were looked at");
    assert_eq!(explanation.hit_chunks, 1);
}

#[test]
fn impossible_questions_are_refused_by_name() {
    let engine = Engine::registered(4);
    let code =
        |key: Key| engine.store.explain(&key, str::to_owned).err().map(|Error { code, .. }| code);
    let salted = Key { cache_salt: "a@b".into(), ..key(0, 1) };
    assert_eq!(code(salted), Some(ErrorCode::InvalidSalt));
    assert_eq!(code(Key { world_size: 0, ..key(0, 1) }), Some(ErrorCode::InvalidArgument));
    assert_eq!(code(Key { end: 3, ..key(0, 1) }), Some(ErrorCode::InvalidArgument));
}

#[test]
fn an_engine_that_embeds_the_store_is_told_as_well() {
    let engine = Engine::registered(4);
    engine.put(&key(0, 2));
    let embedded = Embedded::new(engine.store.clone());
    let tokens = key(0, 3).token_ids;
    let prompt = prompt_key("m".into(), 1, tokens, String::new(), "doctor".into(), CHUNK);
    assert_eq!((prompt.start, prompt.end), (0, 3 * u64::from(CHUNK)), "whole chunks of it");
    let told = finish(embedded.explain(&prompt, Instant::now())).unwrap();
    assert_eq!((told.chunks, told.hit_chunks), (3, 2));
    assert!(told.missing.is_some());

    let hits = finish(count_hits(&embedded, &prompt, Instant::now())).unwrap();
    assert_eq!(hits, 2);
    assert_eq!(engine.store.clear(), 2, "no lease is left");
    let gone = finish(embedded.explain(&prompt, Instant::now())).unwrap().missing.unwrap();
    assert!(matches!(gone.removed, Some(Removal { cause: RemovalCause::Cleared, .. })));
}
