//! Stages of a pipeline whose objects have unlike shapes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{CHUNK, Engine, finish, key, layout};
use kvferry_core::key::{Key, Layout};

fn stage(rank: u32, chunks: u64) -> Key {
    Key { world_size: 2, worker_id: Some(rank), ..key(1, chunks) }
}

/// Two stages: one page for each layer.
fn pipeline(objects: u64, layers: [u32; 2]) -> Engine {
    let engine = Engine::new(objects);
    for (instance, num_layers) in (1..).zip(layers) {
        engine.register(instance, Layout { num_layers, ..layout("m", 2) });
    }
    engine
}

#[test]
fn a_prefix_of_all_stages_is_found_and_given_back() {
    for layers in [[2, 2], [2, 1], [1, 2]] {
        let engine = pipeline(64, layers);
        assert_eq!(engine.put_as(&stage(0, 3), 1), 3);
        assert_eq!(engine.lookup(&stage(0, 3)), 0, "one stage has it, {layers:?}");
        assert_eq!(engine.put_as(&stage(1, 3), 2), 3);
        assert_eq!(engine.lookup(&stage(0, 3)), 3, "{layers:?}");
        let first = Key { end: u64::from(CHUNK), ..stage(0, 3) };
        engine.store.release(&first, 1, engine.now).unwrap();
        for (rank, instance) in [(0, 1), (1, 2)] {
            let rest = Key { start: u64::from(CHUNK), ..stage(rank, 3) };
            let slots =
                engine.store.prepare_retrieve(engine.owner, &rest, instance, engine.now).unwrap();
            assert_eq!(slots.unwrap().len(), 2);
            assert!(engine.store.commit_retrieve(engine.owner, &rest, instance).unwrap());
        }
        let status = engine.store.status(engine.now);
        assert!(status.contains(&("leases", 0)), "{status:?}");
    }
}

#[test]
fn what_misses_is_explained_by_stage() {
    let engine = pipeline(64, [2, 1]);
    engine.put_as(&stage(0, 2), 1);
    engine.put_as(&stage(1, 1), 2);
    let explained = finish(engine.store.explain(&stage(0, 2), str::to_owned).unwrap());
    assert_eq!((explained.chunks, explained.hit_chunks), (2, 1));
    assert_eq!(explained.missing.unwrap().missing_ranks, [1]);
}

#[test]
fn another_engine_with_other_stages_does_not_get_what_the_former_one_stored() {
    let engine = pipeline(64, [2, 1]);
    engine.put_as(&stage(0, 2), 1);
    engine.put_as(&stage(1, 2), 2);
    engine.store.unregister(1);
    engine.store.unregister(2);
    for (instance, num_layers) in [(3, 1), (4, 2)] {
        engine.register(instance, Layout { num_layers, ..layout("m", 2) });
    }
    assert_eq!(engine.lookup(&stage(0, 2)), 0);
    engine.put_as(&stage(0, 2), 3);
    engine.put_as(&stage(1, 2), 4);
    assert_eq!(engine.lookup(&stage(0, 2)), 2);
}
