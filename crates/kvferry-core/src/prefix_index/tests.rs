#![allow(clippy::cast_possible_truncation, reason = "small numbers in tests")]

use std::collections::{HashMap, HashSet, VecDeque};

use super::*;

/// What the index promises, said plainly. The youngest key is the first.
struct Model {
    capacity: usize,
    there: HashSet<Vec<u8>>,
    order: VecDeque<Vec<u8>>,
}

impl Model {
    fn new(capacity: usize) -> Self {
        Self { capacity, there: HashSet::new(), order: VecDeque::new() }
    }

    fn touch(&mut self, key: &[u8]) {
        self.order.retain(|other| other != key);
        self.order.push_front(key.to_vec());
    }

    /// The number of new keys, and the evicted ones.
    fn insert(&mut self, keys: &[Vec<u8>]) -> (usize, Vec<Vec<u8>>) {
        let keys = &keys[..keys.len().min(self.capacity)];
        let (mut new, mut evicted) = (0, Vec::new());
        for key in keys.iter().rev() {
            if self.there.insert(key.clone()) {
                new += 1;
                if self.there.len() > self.capacity {
                    let oldest = self.order.iter().rposition(|old| !keys.contains(old)).unwrap();
                    let oldest = self.order.remove(oldest).unwrap();
                    self.there.remove(&oldest);
                    evicted.push(oldest);
                }
            }
            self.touch(key);
        }
        (new, evicted)
    }

    fn remove(&mut self, keys: &[Vec<u8>]) -> usize {
        let there = keys.iter().filter(|key| self.there.remove(*key)).count();
        self.order.retain(|key| self.there.contains(key));
        there
    }

    fn prefix(&mut self, keys: &[Vec<u8>]) -> u32 {
        let there: Vec<_> = keys.iter().take_while(|key| self.there.contains(*key)).collect();
        there.iter().rev().for_each(|key| self.touch(key));
        there.len() as u32
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}

/// Keys that differ in one place only, a different one for different numbers.
fn key(width: usize, number: usize) -> Vec<u8> {
    let mut key = vec![0; width];
    key[number % width] = (1 + number / width) as u8;
    key
}

fn keys(width: usize, numbers: impl IntoIterator<Item = usize>) -> Vec<u8> {
    numbers.into_iter().flat_map(|number| key(width, number)).collect()
}

/// The prefix of one request.
fn prefix(index: &mut PrefixIndex, keys: &[u8], count: u32) -> u32 {
    let mut counts = [u32::MAX];
    index.match_prefixes(keys, &[0, count], &mut counts).unwrap();
    counts[0]
}

/// Without a seed, keys with one byte that is not 0 have all the same hash.
fn weaken(index: &mut PrefixIndex) {
    *match &mut index.0 {
        Widths::W8(index) => &mut index.hasher.seed,
        Widths::W16(index) => &mut index.hasher.seed,
        Widths::W32(index) => &mut index.hasher.seed,
    } = [0; 9];
}

#[test]
fn random_calls_answer_as_a_plain_model() {
    for seed in 0..240 {
        let mut random = Random(seed);
        let width = [8, 16, 32][random.below(3)];
        let size = [5, 60, 300][random.below(3)];
        let capacity = 1 + random.below(size);
        let universe = capacity + 1 + random.below(2 * capacity);
        let mut index = PrefixIndex::new(width, capacity).unwrap();
        let mut model = Model::new(capacity);
        if seed % 4 == 0 {
            weaken(&mut index);
        }
        for call in 0..80 {
            // Prompts are runs of numbers that begin at few places, so that they share prefixes.
            let mut requests: Vec<Vec<Vec<u8>>> = Vec::new();
            for _ in 0..random.below(4) {
                let start = random.below(universe) / 7 * 7;
                let length = random.below(200).min(universe - start);
                let step = 1 + random.below(12) / 11;
                let numbers = (0..length).map(|at| start + at * step % (universe - start));
                requests.push(numbers.map(|number| key(width, number)).collect());
            }
            let flat: Vec<Vec<u8>> = requests.concat();
            let bytes = flat.concat();
            match random.below(8) {
                0..3 => {
                    let mut evicted = vec![0; bytes.len()];
                    let done = index.insert(&bytes, &mut evicted).unwrap();
                    let (inserted, expected) = model.insert(&flat);
                    assert_eq!((done.inserted, done.evicted), (inserted, expected.len()));
                    assert!(evicted.starts_with(&expected.concat()), "seed {seed}, call {call}");
                }
                3 => {
                    let some = &flat[..random.below(flat.len() + 1)];
                    assert_eq!(index.remove(&some.concat()).unwrap(), model.remove(some));
                }
                4 => {
                    let mut found = vec![2; flat.len()];
                    let expected: Vec<u8> =
                        flat.iter().map(|key| u8::from(model.there.contains(key))).collect();
                    let count = index.contains(&bytes, &mut found).unwrap();
                    assert_eq!(found, expected, "seed {seed}, call {call}");
                    assert_eq!(count, expected.iter().filter(|found| **found == 1).count());
                }
                5..8 => {
                    let mut offsets = vec![0];
                    for request in &requests {
                        offsets.push(offsets[offsets.len() - 1] + request.len() as u32);
                    }
                    let mut counts = vec![u32::MAX; requests.len()];
                    index.match_prefixes(&bytes, &offsets, &mut counts).unwrap();
                    let expected: Vec<u32> =
                        requests.iter().map(|request| model.prefix(request)).collect();
                    assert_eq!(counts, expected, "seed {seed}, call {call}");
                }
                _ => unreachable!(),
            }
            assert_eq!(index.len(), model.there.len());
            if random.below(60) == 0 {
                index.clear();
                model = Model::new(capacity);
            }
        }
    }
}

#[test]
fn a_prompt_loses_its_last_chunks_first() {
    let mut index = PrefixIndex::new(32, 6).unwrap();
    let (first, second) = (keys(32, 0..4), keys(32, 10..14));
    index.insert(&first, &mut []).unwrap();
    let mut evicted = vec![0; 4 * 32];
    let done = index.insert(&second, &mut evicted).unwrap();
    assert_eq!(done, Inserted { inserted: 4, evicted: 2 });
    assert_eq!(evicted[..64], keys(32, [3, 2]));
    assert_eq!(prefix(&mut index, &first, 4), 2);
    assert_eq!(prefix(&mut index, &second, 4), 4);
}

#[test]
fn a_match_is_a_use_and_contains_is_none() {
    for (used, survivor) in [(false, 1), (true, 0)] {
        let mut index = PrefixIndex::new(16, 2).unwrap();
        index.insert(&keys(16, [0]), &mut []).unwrap();
        index.insert(&keys(16, [1]), &mut []).unwrap();
        if used {
            assert_eq!(prefix(&mut index, &key(16, 0), 1), 1);
        } else {
            assert_eq!(index.contains(&key(16, 0), &mut [0]).unwrap(), 1);
        }
        index.insert(&keys(16, [2]), &mut [0; 16]).unwrap();
        let mut found = [9; 2];
        index.contains(&keys(16, [survivor, 1 - survivor]), &mut found).unwrap();
        assert_eq!(found, [1, 0]);
    }
}

#[test]
fn a_longer_prompt_evicts_none_of_its_own_prefix() {
    let mut index = PrefixIndex::new(8, 4).unwrap();
    index.insert(&keys(8, [0, 1]), &mut []).unwrap();
    index.insert(&keys(8, [8, 9]), &mut []).unwrap();
    let mut evicted = [0; 32];
    let done = index.insert(&keys(8, 0..4), &mut evicted).unwrap();
    assert_eq!(done, Inserted { inserted: 2, evicted: 2 });
    assert_eq!(evicted[..16], keys(8, [9, 8]));
    assert_eq!(prefix(&mut index, &keys(8, 0..4), 4), 4);
    // More than fit: the leading ones stay.
    let done = index.insert(&keys(8, 0..9), &mut evicted).unwrap();
    assert_eq!(done, Inserted { inserted: 0, evicted: 0 });
    assert_eq!(prefix(&mut index, &keys(8, 0..9), 9), 4);
}

#[test]
fn a_removed_key_is_not_found_where_it_was() {
    let mut index = PrefixIndex::new(32, 100).unwrap();
    let prompt = keys(32, 0..90);
    index.insert(&prompt, &mut []).unwrap();
    assert_eq!(index.remove(&keys(32, [40, 40, 80])).unwrap(), 2);
    assert_eq!(prefix(&mut index, &prompt, 90), 40);
    index.insert(&keys(32, [40]), &mut []).unwrap();
    assert_eq!(prefix(&mut index, &prompt, 90), 80);
}

#[test]
fn a_table_closes_up_behind_a_removed_entry() {
    for seed in 0..200 {
        let mut random = Random(seed);
        let capacity = 1 + random.below(40);
        let mut table = Table::new(capacity).unwrap();
        let mut model: HashMap<u32, u32> = HashMap::new();
        for _ in 0..400 {
            let slot = 1 + random.below(capacity) as u32;
            // Many homes at the end, whose entries go on at the beginning; some hashes are the same.
            let hash = u32::MAX - (random.below(9) as u32) * (u32::MAX / 11);
            match model.remove(&slot) {
                Some(hash) => {
                    table.remove(hash, slot);
                    assert_eq!(table.find(hash, |found| found == slot), 0, "seed {seed}");
                }
                None => {
                    table.insert(hash, slot);
                    model.insert(slot, hash);
                }
            }
            for (slot, hash) in &model {
                assert_eq!(table.find(*hash, |found| found == *slot), *slot, "seed {seed}");
            }
        }
    }
}

#[test]
fn each_index_hashes_in_its_own_way() {
    let hashes = |width: usize| -> HashSet<u32> {
        let hash = |_| {
            let index = PrefixIndex::new(width, 1).unwrap();
            let key = [7; 32];
            match &index.0 {
                Widths::W8(index) => index.hasher.hash(&[7; 8]),
                Widths::W16(index) => index.hasher.hash(&[7; 16]),
                Widths::W32(index) => index.hasher.hash(&key),
            }
        };
        (0..50).map(hash).collect()
    };
    for width in [8, 16, 32] {
        assert!(hashes(width).len() > 45);
    }
}

#[test]
fn every_bit_of_a_key_counts() {
    let hasher = Hasher::new();
    let hashes: HashSet<u32> = (0..256)
        .map(|bit| {
            let mut key = [0; 32];
            key[bit / 8] = 1 << (bit % 8);
            hasher.hash(&key)
        })
        .collect();
    assert!(hashes.len() > 250, "{} hashes of 256 keys", hashes.len());
}

#[test]
fn memory_is_what_the_documentation_says() {
    for width in [8, 16, 32] {
        let mut index = None;
        let taken = allocation_counter::measure(|| {
            index = Some(PrefixIndex::new(width, 1000).unwrap());
        });
        assert_eq!(taken.bytes_total as usize, 1000 * (width + 24) + width + 8);
        let mut index = index.unwrap();
        let all = keys(width, 0..255);
        let mut evicted = vec![0; all.len()];
        let taken = allocation_counter::measure(|| {
            for start in 0..200 {
                index.insert(&all[start * width..], &mut evicted).unwrap();
                prefix(&mut index, &all, 255);
                index.remove(&all[..start * width]).unwrap();
            }
        });
        assert!(taken.bytes_max <= 8 * 255, "{} bytes", taken.bytes_max);
    }
}

#[test]
fn what_does_not_fit_is_named_and_changes_nothing() {
    for (width, capacity, why) in [
        (32, 0, "a capacity of 0 keys"),
        (32, PrefixIndex::MAX_CAPACITY + 1, "a capacity of 268435457 keys"),
        (20, 1, "keys of 20 bytes"),
        (0, 1, "keys of 0 bytes"),
    ] {
        assert!(PrefixIndex::new(width, capacity).err().unwrap().message.contains(why), "{why}");
    }
    let mut index = PrefixIndex::new(16, 4).unwrap();
    let prompt = keys(16, 0..4);
    index.insert(&prompt, &mut []).unwrap();
    let other = keys(16, 20..24);
    let mut counts = [7; 2];
    let mut refused = vec![
        (
            index.insert(&other, &mut [0; 63]).map(drop),
            "4 keys may be evicted, and there is room for 3",
        ),
        (index.insert(&other[1..], &mut [0; 64]).map(drop), "63 bytes are no whole number"),
        (index.remove(&prompt[..17]).map(drop), "17 bytes"),
        (index.contains(&prompt[..15], &mut [0]).map(drop), "15 bytes"),
        (index.contains(&prompt, &mut [0; 3]).map(drop), "4 keys and room for 3"),
    ];
    for (offsets, why) in [
        (&[][..], "no offsets"),
        (&[1, 2, 4], "first offset is 1"),
        (&[0, 3, 2], "position 2 is 2, after 3"),
        (&[0, 2, 3], "last offset is 3 and there are 4 keys"),
        (&[0, 2, 5], "last offset is 5"),
        (&[0, 4], "1 requests and room for 2"),
    ] {
        refused.push((index.match_prefixes(&prompt, offsets, &mut counts), why));
    }
    for (result, why) in refused {
        let error = result.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        assert!(error.message.contains(why), "{}", error.message);
    }
    assert_eq!(counts, [7; 2]);
    assert_eq!(index.len(), 4);
    assert_eq!(prefix(&mut index, &prompt, 4), 4);
}
