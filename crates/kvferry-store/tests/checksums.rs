//! Checksums that writers tell: readers get them with the slots, for as long as the object is there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{CHUNK, Engine, finish, key, layout};
use kvferry_core::ErrorCode;
use kvferry_core::cache::{Cache, Slot};
use kvferry_core::key::Key;
use kvferry_store::{Departure, Embedded};

impl Engine {
    fn granted(&self, key: &Key, instance: u64) -> Vec<Slot> {
        self.store.prepare_store(self.owner, key, instance, self.now).unwrap().slots
    }

    fn put_with(&self, key: &Key, instance: u64, checksums: &[u64]) {
        assert_eq!(self.reserve(key, instance), checksums.len());
        assert!(self.store.commit_store(key, instance, checksums).unwrap());
    }

    /// What a reader of the key's chunks is told.
    fn told(&self, key: &Key, instance: u64) -> Vec<Option<u64>> {
        assert_eq!(self.lookup(key), key.end / u64::from(CHUNK));
        let slots = self.store.prepare_retrieve(self.owner, key, instance, self.now).unwrap();
        assert!(self.store.commit_retrieve(self.owner, key, instance).unwrap());
        self.store.end_session(&key.request_id);
        slots.unwrap().iter().map(|slot| slot.checksum).collect()
    }

    fn keep(&self, instance: u64, slots: &[Slot], checksums: &[u64]) -> u64 {
        let slots = slots.iter().map(|slot| (slot.offset, slot.generation.unwrap()));
        self.store.keep_checksums(instance, slots.zip(checksums.iter().copied()))
    }
}

#[test]
fn readers_are_told_the_checksum_of_each_object_by_whoever_wrote_it() {
    let engine = Engine::registered(8);
    engine.put_with(&key(0, 2), 1, &[0, u64::MAX]);
    assert_eq!(engine.told(&key(0, 2), 1), [Some(0), Some(u64::MAX)]);
    engine.put(&key(0, 3)); // as a peer that knows no checksums
    engine.put_with(&key(0, 4), 1, &[4]);
    assert_eq!(engine.told(&key(0, 4), 1), [Some(0), Some(u64::MAX), None, Some(4)]);
}

#[test]
fn a_checksum_goes_with_its_object() {
    let engine = Engine::registered(2);
    let prompt = key(0, 2);
    engine.put_with(&prompt, 1, &[1, 2]);
    engine.discard(&prompt);
    engine.put(&prompt);
    assert_eq!(engine.told(&prompt, 1), [None, None], "damaged, and stored anew without");
    engine.discard(&prompt);
    engine.put_with(&prompt, 1, &[3, 4]);
    assert_eq!(engine.told(&prompt, 1), [Some(3), Some(4)], "and with others");

    engine.put(&key(100, 2)); // evicts both, and takes their slots
    assert_eq!(engine.told(&key(100, 2), 1), [None, None]);
    engine.put_with(&prompt, 1, &[5, 6]);
    engine.store.clear();
    engine.put(&prompt);
    assert_eq!(engine.told(&prompt, 1), [None, None], "cleared");
}

#[test]
fn each_rank_has_its_own() {
    let engine = Engine::registered(8);
    let rank =
        |rank| Key { model_name: "two".into(), world_size: 2, worker_id: Some(rank), ..key(0, 2) };
    engine.register(10, layout("two", 2));
    engine.register(11, layout("two", 2));
    engine.put_with(&rank(0), 10, &[1, 2]);
    engine.put_with(&rank(1), 11, &[3, 4]);
    assert_eq!(engine.told(&rank(0), 10), [Some(1), Some(2)]);
    assert_eq!(engine.told(&rank(1), 11), [Some(3), Some(4)]);
}

#[test]
fn a_list_of_another_length_than_the_slots_commits_nothing() {
    let engine = Engine::registered(4);
    let prompt = key(0, 2);
    engine.reserve(&prompt, 1);
    for wrong in [&[1][..], &[1, 2, 3]] {
        let error = engine.store.commit_store(&prompt, 1, wrong).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        assert!(error.message.contains("2 slots"), "{error}");
        assert_eq!(engine.lookup(&prompt), 0);
    }
    assert!(engine.store.commit_store(&prompt, 1, &[1, 2]).unwrap(), "the slots are still granted");
    assert_eq!(engine.told(&prompt, 1), [Some(1), Some(2)]);
    assert!(!engine.store.commit_store(&prompt, 1, &[1]).unwrap(), "nothing to go with");

    // A reservation that was set apart has slots too, and ends with a commit that goes with them.
    let late = key(100, 2);
    let gone = engine.store.connect();
    engine.store.prepare_store(gone, &late, 1, engine.now).unwrap();
    engine.store.disconnect(gone, Departure::GivenUp);
    assert!(engine.store.commit_store(&late, 1, &[1]).is_err());
    assert!(!engine.store.commit_store(&late, 1, &[1, 2]).unwrap());
    assert_eq!(engine.reserve(&late, 1), 2, "their room is free");
}

#[test]
fn checksums_told_before_a_commit_are_kept_for_slots_that_the_instance_is_writing() {
    let engine = Engine::registered(8);
    engine.register(2, layout("m", 1));
    let (mine, others) = (key(0, 2), key(100, 1));
    let slots = engine.granted(&mine, 1);
    let other_slots = engine.granted(&others, 2);
    assert_eq!(engine.keep(2, &slots, &[8, 9]), 0, "another's slots");
    assert_eq!(engine.keep(99, &slots, &[8, 9]), 0, "nobody's slots");
    let another = |slot: &Slot| {
        [
            Slot { generation: slot.generation.map(|use_| use_ + 9), ..slot.clone() },
            Slot { offset: slot.offset + 4096 * 9, ..slot.clone() },
        ]
    };
    assert_eq!(engine.keep(1, &another(&slots[0]), &[8, 9]), 0, "another use, another place");
    assert_eq!(engine.keep(1, &[slots[1].clone(), other_slots[0].clone()], &[2, 9]), 1);
    assert!(engine.store.commit_store(&mine, 1, &[]).unwrap());
    assert!(engine.store.commit_store(&others, 2, &[]).unwrap());
    assert_eq!(engine.told(&mine, 1), [None, Some(2)]);
    assert_eq!(engine.told(&others, 1), [None]);
    assert_eq!(engine.keep(1, &slots, &[8, 9]), 0, "readers rely on what is committed");
    assert_eq!(engine.told(&mine, 1), [None, Some(2)]);
}

#[test]
fn what_was_told_of_an_abandoned_store_is_not_the_next_ones() {
    let engine = Engine::registered(2);
    let prompt = key(0, 2);
    let slots = engine.granted(&prompt, 1);
    assert_eq!(engine.keep(1, &slots, &[1, 2]), 2);
    engine.store.abandon_store(&prompt, 1).unwrap();
    assert_eq!(engine.keep(1, &slots, &[1, 2]), 0);
    let again = engine.granted(&prompt, 1);
    assert_eq!(again.len(), slots.len());
    assert!(engine.store.commit_store(&prompt, 1, &[]).unwrap());
    assert_eq!(engine.told(&prompt, 1), [None, None]);
}

#[test]
fn an_engine_in_the_same_process_stores_and_reads_them_as_any_cache_does() {
    let Engine { store, now, .. } = Engine::new(4);
    let cache = Embedded::new(store);
    let prompt = key(0, 2);
    let instance = finish(cache.register(layout("m", 1), now)).unwrap();
    let grant = finish(cache.prepare_store(&prompt, instance, now)).unwrap();
    assert!(grant.slots.iter().all(|slot| slot.checksum.is_none()));
    assert!(finish(cache.commit_store(&prompt, instance, &[1], now)).is_err());
    assert!(finish(cache.commit_store(&prompt, instance, &[1, 2], now)).unwrap());
    assert_eq!(finish(cache.lookup(&prompt, now)).unwrap(), 2);
    let grant = finish(cache.prepare_retrieve(&prompt, instance, now)).unwrap().unwrap();
    assert!(grant.slots.iter().map(|slot| slot.checksum).eq([Some(1), Some(2)]));
}
