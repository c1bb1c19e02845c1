//! Engines of one model whose objects have unlike layouts: bf16 states beside 8-bit ones.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Engine, key, layout};
use kvferry_core::key::{Dtype, Key, Layout};
use kvferry_store::{Owner, Store};

fn wide(world_size: u32) -> Layout {
    Layout { dtype: Dtype::new("bfloat16").unwrap(), ..layout("m", world_size) }
}

/// The prompt as another engine's request.
fn request(name: &str, world_size: u32, rank: u32) -> Key {
    Key { request_id: name.into(), world_size, worker_id: Some(rank), ..key(1, 2) }
}

/// What one of two engines asks with.
struct Asks<'a> {
    engine: &'a Engine,
    scheduler: Owner,
    workers: Vec<(Owner, u64)>,
    name: &'static str,
}

impl<'a> Asks<'a> {
    fn new(
        engine: &'a Engine,
        name: &'static str,
        layout: &Layout,
        instances: &[u64],
        apart: bool,
    ) -> Self {
        let store: &Store = &engine.store;
        let scheduler = store.connect();
        let workers = instances.iter().map(|instance| {
            let worker = if apart { store.connect() } else { scheduler };
            store.register(worker, *instance, layout.clone()).unwrap();
            (worker, *instance)
        });
        let workers = workers.collect();
        Self { engine, scheduler, workers, name }
    }

    fn key(&self, rank: usize) -> Key {
        let world_size = u32::try_from(self.workers.len()).unwrap();
        request(self.name, world_size, u32::try_from(rank).unwrap())
    }

    fn lookup(&self) -> u64 {
        let Engine { store, now, .. } = self.engine;
        store.lookup(self.scheduler, &self.key(0), 1, *now).unwrap()
    }

    /// How many chunks were new, of all ranks.
    fn store(&self) -> usize {
        let Engine { store, now, .. } = self.engine;
        let ranks = self.workers.iter().enumerate();
        let stored = ranks.map(|(rank, (worker, instance))| {
            let key = self.key(rank);
            let new = store.prepare_store(*worker, &key, *instance, *now).unwrap().slots.len();
            assert_eq!(store.commit_store(&key, *instance, &[]).unwrap(), new > 0);
            new
        });
        stored.sum()
    }

    /// Whether all ranks may load what was found.
    fn load(&self) -> bool {
        let Engine { store, now, .. } = self.engine;
        let ranks = self.workers.iter().enumerate();
        let granted = ranks.map(|(rank, (worker, instance))| {
            let key = self.key(rank);
            let slots = store.prepare_retrieve(*worker, &key, *instance, *now).unwrap();
            slots.is_some_and(|_| store.commit_retrieve(*worker, &key, *instance).unwrap())
        });
        let granted = granted.fold(true, |all, one| all & one);
        store.end_session(self.name);
        granted
    }
}

#[test]
fn each_engine_finds_what_it_can_load_whoever_stored_or_registered_last() {
    for (apart, [a, b]) in [
        (false, [&[1][..], &[2]]),
        (true, [&[1], &[2]]),
        (false, [&[1, 3], &[2, 4]]),
        (true, [&[1, 3], &[2, 4]]),
    ] {
        let engine = Engine::new(64);
        let world_size = u32::try_from(a.len()).unwrap();
        let wide = Asks::new(&engine, "a", &wide(world_size), a, apart);
        assert_eq!(wide.lookup(), 0);
        assert_eq!(wide.store(), 2 * a.len());
        let narrow = Asks::new(&engine, "b", &layout("m", world_size), b, apart);
        assert_eq!(wide.lookup(), 2, "{apart} {a:?}: the other has registered");
        assert!(wide.load());
        if !apart {
            assert_eq!(narrow.lookup(), 0, "nothing of its own is there");
        }
        assert_eq!(narrow.store(), 2 * a.len());
        for _ in 0..3 {
            for asks in [&wide, &narrow] {
                let hit = asks.lookup();
                // The first time a scheduler is told what its workers cannot load, as nobody knew that they are its own.
                let known = asks.load() || apart;
                assert!(known && hit == 2, "{apart} {a:?} {}: {hit}", asks.name);
            }
        }
        for asks in [&wide, &narrow] {
            assert_eq!((asks.lookup(), asks.load()), (2, true), "{apart} {a:?} {}", asks.name);
            let (worker, instance) = asks.workers[0];
            let again = if asks.name == "a" { self::wide } else { |ranks| layout("m", ranks) };
            engine.store.register(worker, instance, again(world_size)).unwrap();
            assert_eq!((wide.lookup(), wide.load()), (2, true), "{} registered again", asks.name);
        }
    }
}

#[test]
fn who_has_no_instance_is_told_of_the_layout_that_was_registered_last() {
    let engine = Engine::new(64);
    let wide = Asks::new(&engine, "a", &wide(1), &[1], true);
    assert_eq!(wide.store(), 2);
    let narrow = Asks::new(&engine, "b", &layout("m", 1), &[2], true);
    let ask = |name: &str| {
        let owner = engine.store.connect();
        engine.store.lookup(owner, &request(name, 1, 0), 1, engine.now).unwrap()
    };
    assert_eq!(ask("c"), 0, "what the last one registered has stored nothing");
    assert_eq!(narrow.store(), 2);
    assert_eq!(ask("d"), 2);
    // Neither a load that fails nor registering again makes the other one the last.
    engine.store.end_session("d");
    engine.store.clear();
    assert_eq!(narrow.store(), 2);
    assert!(!wide.load());
    let (worker, instance) = wide.workers[0];
    engine.store.register(worker, instance, self::wide(1)).unwrap();
    assert_eq!(ask("e"), 2);
    engine.store.unregister(2);
    assert_eq!(ask("f"), 0);
}
