use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

/// An object as a test keeps it.
#[derive(Debug, Clone, Copy)]
struct Model {
    key: u64,
    held: bool,
    leaf: bool,
    /// What it hangs on.
    parent: Option<u32>,
}

/// A policy, and what it was told.
struct Told {
    eviction: Box<dyn Eviction>,
    objects: BTreeMap<u32, Model>,
    now: Instant,
    /// Whether the policy spares what others hang on.
    leaves_only: bool,
}

impl Told {
    fn new(policy: Policy) -> Self {
        let leaves_only = policy == Policy::Default;
        let (objects, now) = (BTreeMap::new(), Instant::now());
        Self { eviction: policy.eviction(), objects, now, leaves_only }
    }

    fn request(&mut self, keys: &[u64]) {
        let place_of = |key| self.objects.iter().find(|(_, it)| it.key == key).map(|(at, _)| *at);
        let uses: Vec<Use> =
            keys.iter().map(|key| Use { key: *key, place: place_of(*key) }).collect();
        self.eviction.request(&uses, 1, self.now);
    }

    fn add(&mut self, key: u64) -> u32 {
        let place = (0..).find(|place| !self.objects.contains_key(place)).unwrap();
        self.objects.insert(place, Model { key, held: true, leaf: true, parent: None });
        self.eviction.add(place, key);
        place
    }

    fn hold(&mut self, place: u32, held: bool) {
        let Some(object) = self.objects.get_mut(&place).filter(|object| object.held != held) else {
            return;
        };
        object.held = held;
        match held {
            true => self.eviction.hold(place),
            false => self.eviction.release(place),
        }
    }

    fn leaf(&mut self, place: u32, leaf: bool) {
        if let Some(object) = self.objects.get_mut(&place).filter(|object| object.leaf != leaf) {
            object.leaf = leaf;
            self.eviction.is_leaf(place, leaf);
        }
    }

    fn may_go(&self, object: &Model) -> bool {
        !object.held && (object.leaf || !self.leaves_only)
    }

    /// Takes the victim out, after a look at whether it may be one.
    fn evict(&mut self) -> Option<u64> {
        let may_any = self.objects.values().any(|object| self.may_go(object));
        let victim = self.eviction.victim();
        assert_eq!(victim.is_some(), may_any);
        let place = victim?;
        let object = self.objects.remove(&place).expect("what goes is there");
        assert!(self.may_go(&object), "{object:?}");
        self.eviction.remove(place);
        if let Some(parent) = object.parent {
            self.leaf(parent, true);
        }
        Some(object.key)
    }

    /// A chain that a request uses and stores.
    fn chain(&mut self, keys: &[u64]) {
        self.request(keys);
        let there: HashSet<u64> = self.objects.values().map(|object| object.key).collect();
        let new: Vec<u64> = keys.iter().filter(|key| !there.contains(key)).copied().collect();
        let places: Vec<u32> = new.iter().map(|key| self.add(*key)).collect();
        for place in places.iter().rev() {
            self.hold(*place, false);
        }
        for (parent, place) in places.iter().zip(places.iter().skip(1)) {
            self.leaf(*parent, false);
            self.objects.get_mut(place).unwrap().parent = Some(*parent);
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Request(Vec<u64>),
    Add(u64),
    Hold(u32, bool),
    Leaf(u32, bool),
    Remove(u32),
    Evict,
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        prop::collection::vec(0..60_u64, 0..12).prop_map(Step::Request),
        (0..60_u64).prop_map(Step::Add),
        (0..30_u32, any::<bool>()).prop_map(|(place, held)| Step::Hold(place, held)),
        (0..30_u32, any::<bool>()).prop_map(|(place, leaf)| Step::Leaf(place, leaf)),
        (0..30_u32).prop_map(Step::Remove),
        Just(Step::Evict),
        (0..60_000_u64).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 0..400)
}

proptest! {
    #[test]
    fn what_goes_may_go_and_in_the_end_everything_does(steps in steps()) {
        for policy in Policy::ALL {
            let mut told = Told::new(policy);
            for step in steps.clone() {
                match step {
                    Step::Request(keys) => told.request(&keys),
                    Step::Add(key) => drop(told.add(key)),
                    Step::Hold(place, held) => told.hold(place, held),
                    Step::Leaf(place, leaf) => told.leaf(place, leaf),
                    Step::Remove(place) => if told.objects.remove(&place).is_some() {
                        told.eviction.remove(place);
                    },
                    Step::Evict => drop(told.evict()),
                    Step::Wait(ms) => told.now += Duration::from_millis(ms),
                }
            }
            for place in told.objects.keys().copied().collect::<Vec<_>>() {
                told.hold(place, false);
                told.leaf(place, true);
            }
            while told.evict().is_some() {}
            prop_assert!(told.objects.is_empty(), "{policy}");
        }
    }
}

#[test]
fn names_are_read_back_and_others_are_refused_with_those_that_there_are() {
    for policy in Policy::ALL {
        assert_eq!(Policy::from_name(policy.name()), Ok(policy));
    }
    let error = Policy::from_name("LRU").unwrap_err();
    assert!(error.message.contains("\"LRU\"") && error.message.contains("s3fifo"), "{error}");
}

/// Conversations whose every second request comes back after a minute, beside prompts that never do.
fn learn(told: &mut Told) {
    for round in 0..2_000_u64 {
        let talk = 1_000_000 + round / 2 * 10;
        told.chain(&[talk, talk + 1, talk + 2, talk + 3, talk + 4, talk + 5]);
        let single = 9_000_000 + round * 10;
        told.chain(&[single, single + 1]);
        told.now += Duration::from_secs(30);
        while told.objects.len() > 64 {
            told.evict().unwrap();
        }
    }
}

#[test]
fn what_was_never_used_again_goes_before_what_was_however_recent_it_is() {
    let mut told = Told::new(Policy::Default);
    learn(&mut told);
    told.chain(&[1, 2, 3, 4, 5, 6]);
    told.now += Duration::from_secs(5);
    told.chain(&[101, 102]);
    told.now += Duration::from_secs(5);
    let gone: Vec<u64> = std::iter::from_fn(|| told.evict()).collect();
    let place = |key| gone.iter().position(|gone| *gone == key).unwrap();
    assert!(place(102) < place(6), "the tail of a prompt that is not continued: {gone:?}");
    let mut lru = Told::new(Policy::Lru);
    learn(&mut lru);
    lru.chain(&[1, 2, 3, 4, 5, 6]);
    lru.chain(&[101, 102]);
    let gone: Vec<u64> = std::iter::from_fn(|| lru.evict()).collect();
    assert_eq!(gone[gone.len() - 8..], [6, 5, 4, 3, 2, 1, 102, 101]);
}

#[test]
fn what_is_remembered_is_bounded_and_takes_64_bytes_at_most() {
    let mut told = Told::new(Policy::Default);
    for request in 0..40_000_u64 {
        told.request(&[request * 4, request * 4 + 1, request * 4 + 2]);
        told.now += Duration::from_millis(100);
    }
    let (bytes, known) = told.eviction.takes().unwrap();
    assert_eq!(known, 16_384, "nothing of it is there");
    assert!(bytes / known <= 64, "{bytes} bytes for {known}");
    assert!(!told.eviction.knows(0) && told.eviction.knows(4 * 39_999));
}

#[test]
fn two_objects_with_the_same_64_bits_are_two() {
    for policy in Policy::ALL {
        let mut told = Told::new(policy);
        for _ in 0..3 {
            let place = told.add(7);
            told.hold(place, false);
        }
        assert_eq!(std::iter::from_fn(|| told.evict()).count(), 3, "{policy}");
    }
}

#[test]
fn the_paper_s_scan_does_not_push_out_what_is_used_often() {
    for policy in [Policy::Arc, Policy::S3Fifo] {
        let mut told = Told::new(policy);
        for _ in 0..4 {
            told.chain(&[1, 2, 3, 4]);
        }
        for scan in 0..500_u64 {
            told.chain(&[1_000 + scan]);
            while told.objects.len() > 32 {
                told.evict().unwrap();
            }
        }
        let there: Vec<u64> = told.objects.values().map(|object| object.key).collect();
        assert!([1, 2, 3, 4].iter().all(|key| there.contains(key)), "{policy}: {there:?}");
    }
}
