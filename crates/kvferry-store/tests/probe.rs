//! Objects that are stored only to see whether storing works.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Engine, key, layout};
use kvferry_core::key::Key;
use kvferry_store::PROBE_MODEL;

fn probe_key(first: u32) -> Key {
    Key { model_name: PROBE_MODEL.into(), ..key(first, 1) }
}

#[test]
fn what_is_taken_out_leaves_room_and_no_trace() {
    let engine = Engine::new(1);
    let store = &engine.store;
    store.register(engine.owner, 9, layout(PROBE_MODEL, 1)).unwrap();
    let before = store.status(engine.now);
    for first in 0..3 {
        let key = probe_key(first * 100);
        let slots = store.prepare_store(engine.owner, &key, 9, engine.now).unwrap().slots;
        assert_eq!(slots.len(), 1, "the former one does not take the only page");
        assert!(store.commit_store(&key, 9, &[]).unwrap());
        assert_eq!(store.lookup(engine.owner, &key, 1, engine.now).unwrap(), 1);
        assert_eq!(store.take_out(&key, 9).unwrap(), 0, "it is leased");
        store.end_session(&key.request_id);
        assert_eq!(store.take_out(&key, 9).unwrap(), 1);
        assert_eq!(store.take_out(&key, 9).unwrap(), 0);
        assert_eq!(store.lookup(engine.owner, &key, 1, engine.now).unwrap(), 0);
        store.end_session(&key.request_id);
    }
    let figure = |name| {
        move |status: &[(&str, u64)]| status.iter().find(|(known, _)| *known == name).unwrap().1
    };
    let after = store.status(engine.now);
    for name in ["used_bytes", "objects", "evicted_objects", "leases", "sessions"] {
        assert_eq!(figure(name)(&after), figure(name)(&before), "{name}");
    }
    assert!(store.events(0, 9).events.is_empty());
}

#[test]
fn what_others_stored_before_and_after_is_still_evicted_in_its_order() {
    let engine = Engine::new(3);
    let store = &engine.store;
    store.register(engine.owner, 7, layout("m", 1)).unwrap();
    store.register(engine.owner, 9, layout(PROBE_MODEL, 1)).unwrap();
    let put = |key: &Key, instance| {
        store.prepare_store(engine.owner, key, instance, engine.now).unwrap();
        assert!(store.commit_store(key, instance, &[]).unwrap());
    };
    let held = |first| {
        let hit = store.lookup(engine.owner, &key(first, 1), 1, engine.now).unwrap();
        store.end_session(&key(first, 1).request_id);
        hit
    };
    put(&key(100, 1), 7);
    put(&probe_key(0), 9);
    put(&key(200, 1), 7);
    assert_eq!(store.take_out(&probe_key(0), 9).unwrap(), 1);
    put(&key(300, 1), 7);
    put(&key(400, 1), 7); // the pool is full: the oldest goes
    assert_eq!([100, 200, 300, 400].map(held), [0, 1, 1, 1]);
    for first in [500, 600, 700] {
        put(&key(first, 1), 7);
    }
    assert_eq!([200, 300, 400, 500, 600, 700].map(held), [0, 0, 0, 1, 1, 1]);
    assert_eq!(store.clear(), 3);
}
