//! The prefix index against absolute limits, on one core: 10 µs for the longest prefix of a prompt of 131,072
//! tokens in chunks of 256, and 10 million block operations a second. A block operation is one block stored,
//! one evicted for it, or one looked up (and touched, if it is there). Every answer is compared with that of a
//! plain model. The index is an old one: full, and turned over by prompts of many lengths, so that the blocks of
//! a prompt lie scattered. vLLM and LMCache publish no figures for theirs.
#![allow(clippy::cast_possible_truncation, reason = "the sizes are known here")]

use std::collections::VecDeque;
use std::time::Instant;

use kvferry_bench::Rows;
use kvferry_core::Result;
use kvferry_core::prefix_index::{Inserted, PrefixIndex};

const WIDTH: usize = 32;
/// Blocks of one call.
const CALL: usize = 1024;
/// Calls of each kind in one sample.
const CALLS: usize = 32;
/// How often all blocks were replaced before anything is timed.
const TURNS: usize = 8;
/// Chunks of 131,072 tokens.
const LONG: usize = 512;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut rows = Rows::default();
    for capacity in [100_000, 1_000_000] {
        let name = |what: &str| format!("{what}, {capacity} resident");
        let mut load = Load::new(capacity)?;
        for (what, kind) in [
            ("block operation, mixed", Kind::Mixed),
            ("block stored or evicted", Kind::Store),
            ("block looked up", Kind::Lookup),
            ("first block of a prompt looked up, missing", Kind::Miss),
        ] {
            let mut failure = Ok(());
            rows.limit(&name(what), 100.0, || {
                load.sample(kind).unwrap_or_else(|error| {
                    failure = Err(error);
                    f64::NAN
                })
            });
            failure?;
        }
        load.store_long_prompts()?;
        let mut young = Load::empty(capacity)?;
        young.store_long_prompts()?;
        for (what, load) in [
            ("longest prefix of 512 chunks", &mut young),
            ("longest prefix of 512 chunks, scattered", &mut load),
        ] {
            let mut failure = Ok(());
            rows.limit(&name(what), 10_000.0, || {
                load.longest_prefix().unwrap_or_else(|error| {
                    failure = Err(error);
                    f64::NAN
                })
            });
            failure?;
        }
    }
    rows.finish()?;
    Ok(())
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// As many blocks stored as looked up.
    Mixed,
    Store,
    Lookup,
    Miss,
}

/// A full index under load, and a plain model of it.
struct Load {
    capacity: usize,
    index: PrefixIndex,
    /// Prompts with blocks in the index, the least recently used first.
    model: VecDeque<Prompt>,
    random: Random,
}

struct Prompt {
    keys: Vec<u8>,
    /// How many leading blocks are left.
    held: usize,
}

/// One call, prepared, and what it must answer.
struct Call {
    store: bool,
    keys: Vec<u8>,
    offsets: Vec<u32>,
    evicted: Vec<u8>,
    counts: Vec<u32>,
    expected_evicted: Vec<u8>,
    expected_counts: Vec<u32>,
}

impl Load {
    fn empty(capacity: usize) -> Result<Self> {
        let (index, model) = (PrefixIndex::new(WIDTH, capacity)?, VecDeque::new());
        Ok(Self { capacity, index, model, random: Random(1) })
    }

    /// Full and old: as many blocks were looked up as stored, many times over.
    fn new(capacity: usize) -> Result<Self> {
        let mut load = Self::empty(capacity)?;
        while load.index.len() < capacity {
            let blocks = load.random.length().min(capacity - load.index.len());
            let keys = load.random.keys(blocks);
            load.index.insert(&keys, &mut [])?;
            load.model.push_back(Prompt { keys, held: blocks });
        }
        for _ in 0..TURNS * capacity / (CALL * CALLS) {
            load.sample(Kind::Mixed)?;
        }
        Ok(load)
    }

    /// Nanoseconds of one block operation.
    fn sample(&mut self, kind: Kind) -> Result<f64> {
        let mut calls: Vec<Call> = match kind {
            Kind::Store => (0..CALLS).map(|_| self.store()).collect(),
            Kind::Lookup => (0..CALLS).map(|_| self.lookup()).collect(),
            Kind::Miss => (0..CALLS).map(|_| self.miss()).collect(),
            Kind::Mixed => (0..CALLS).flat_map(|_| [self.store(), self.lookup()]).collect(),
        };
        let mut stored = Vec::with_capacity(calls.len());

        let start = Instant::now();
        for Call { store, keys, offsets, evicted, counts, .. } in &mut calls {
            if *store {
                stored.push(self.index.insert(keys, evicted)?);
            } else {
                self.index.match_prefixes(keys, offsets, counts)?;
            }
        }
        let ns = start.elapsed().as_nanos() as f64;

        let mut operations = 0;
        for call in &calls {
            assert!(call.evicted == call.expected_evicted, "the least recently used blocks went");
            assert_eq!(call.counts, call.expected_counts);
            operations += if call.store { 2 * CALL } else { 0 };
            for (range, count) in call.offsets.windows(2).zip(&call.counts) {
                // The block that was missing was looked up too.
                operations += (count + 1).min(range[1] - range[0]) as usize;
            }
        }
        assert!(stored.iter().all(|it| *it == Inserted { inserted: CALL, evicted: CALL }));
        Ok(ns / operations as f64)
    }

    /// A call that stores prompts.
    fn store(&mut self) -> Call {
        let prompts = self.fresh();
        let mut expected_evicted = Vec::with_capacity(CALL * WIDTH);
        while expected_evicted.len() < CALL * WIDTH {
            let Some(oldest) = self.model.front_mut() else { break };
            if oldest.held == 0 {
                self.model.pop_front();
                continue;
            }
            oldest.held -= 1;
            expected_evicted.extend(&oldest.keys[oldest.held * WIDTH..][..WIDTH]);
        }
        let keys = prompts.concat();
        // The call counts as if its last block was stored first.
        for keys in prompts.into_iter().rev() {
            let held = keys.len() / WIDTH;
            self.model.push_back(Prompt { keys, held });
        }
        let evicted = vec![0xff; CALL * WIDTH];
        let (offsets, counts, expected_counts) = (Vec::new(), Vec::new(), Vec::new());
        Call { store: true, keys, offsets, evicted, counts, expected_evicted, expected_counts }
    }

    /// A call that looks prompts up, of which the index may have lost the last blocks.
    fn lookup(&mut self) -> Call {
        let (mut keys, mut offsets, mut expected_counts) = (Vec::new(), vec![0], Vec::new());
        while keys.len() < CALL * WIDTH {
            let at = self.random.below(self.model.len());
            let Some(prompt) = self.model.remove(at) else { break };
            let left = CALL - keys.len() / WIDTH;
            // A prompt that is used in part is touched in part: leave that to the next call.
            if prompt.held > left || prompt.held == 0 {
                self.model.insert(at, prompt);
                if left < 64 {
                    break;
                }
                continue;
            }
            let blocks = (prompt.keys.len() / WIDTH).min(left);
            keys.extend(&prompt.keys[..blocks * WIDTH]);
            offsets.push((keys.len() / WIDTH) as u32);
            expected_counts.push(prompt.held as u32);
            self.model.push_back(prompt);
        }
        let counts = vec![u32::MAX; expected_counts.len()];
        let (evicted, expected_evicted) = (Vec::new(), Vec::new());
        Call { store: false, keys, offsets, evicted, counts, expected_evicted, expected_counts }
    }

    /// A call that looks up prompts that are not there.
    fn miss(&mut self) -> Call {
        let prompts = self.fresh();
        let mut offsets = vec![0];
        for prompt in &prompts {
            offsets.push(offsets[offsets.len() - 1] + (prompt.len() / WIDTH) as u32);
        }
        let counts = vec![u32::MAX; prompts.len()];
        Call {
            store: false,
            keys: prompts.concat(),
            offsets,
            evicted: Vec::new(),
            expected_evicted: Vec::new(),
            expected_counts: vec![0; counts.len()],
            counts,
        }
    }

    /// New prompts for one call.
    fn fresh(&mut self) -> Vec<Vec<u8>> {
        let (mut prompts, mut left) = (Vec::new(), CALL);
        while left > 0 {
            let blocks = self.random.length().min(left);
            prompts.push(self.random.keys(blocks));
            left -= blocks;
        }
        prompts
    }

    /// Replaces everything by prompts of 512 chunks and, now and then, up to two less.
    fn store_long_prompts(&mut self) -> Result<()> {
        self.model.clear();
        let mut evicted = vec![0; LONG * WIDTH];
        for _ in 0..self.capacity / LONG {
            let (keys, held) = (self.random.keys(LONG), LONG - self.random.below(3));
            self.index.insert(&keys[..held * WIDTH], &mut evicted)?;
            self.model.push_back(Prompt { keys, held });
        }
        Ok(())
    }

    /// Nanoseconds of one call for one long prompt. The hashes were computed just before, so they are in the
    /// processor's cache; what the index has of them need not be.
    fn longest_prefix(&mut self) -> Result<f64> {
        const CALLS: usize = 200;
        let (mut ns, mut request) = (0, vec![0; LONG * WIDTH]);
        for _ in 0..CALLS {
            let prompt = &self.model[self.random.below(self.model.len())];
            request.copy_from_slice(&prompt.keys);
            let mut count = [u32::MAX];
            let start = Instant::now();
            self.index.match_prefixes(&request, &[0, LONG as u32], &mut count)?;
            ns += start.elapsed().as_nanos();
            assert_eq!(count[0] as usize, prompt.held);
        }
        Ok(ns as f64 / CALLS as f64)
    }
}

/// The generator splitmix64, so that every run has the same keys.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Blocks of a prompt: 1 to 64.
    fn length(&mut self) -> usize {
        1 + self.below(64)
    }

    fn keys(&mut self, count: usize) -> Vec<u8> {
        (0..count * WIDTH / 8).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}
