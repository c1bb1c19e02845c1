#![allow(clippy::cast_possible_truncation, reason = "small numbers in tests")]

use proptest::prelude::*;

use super::*;

const BLOCK: u32 = 16;
const CHUNK: u32 = 64;

fn layout() -> Layout {
    Layout { chunk: CHUNK, groups: vec![BLOCK], blocks: 1000, relocation_window: 0 }
}

fn table() -> Trackers {
    Trackers::new(layout()).unwrap()
}

/// An operation with its blocks of each group.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Planned {
    handle: u32,
    store: bool,
    tokens: (u32, u32),
    skip: u32,
    blocks: Vec<Vec<u32>>,
}

fn plan_into(table: &mut Trackers, step: &Step<'_>, room: Size) -> Result<Option<Vec<Planned>>> {
    let groups = table.layout.groups.len();
    let mut operations = vec![0; room.operations * OPERATION_WORDS];
    let mut block_offsets = vec![0; room.operations * groups + 1];
    let mut block_ids = vec![0; room.blocks];
    let mut plan = Plan {
        operations: &mut operations,
        block_offsets: &mut block_offsets,
        block_ids: &mut block_ids,
    };
    let (size, fits) = table.plan(step, &mut plan)?;
    let lists: Vec<Vec<u32>> =
        block_offsets.windows(2).map(|pair| slice(&block_ids, pair).to_vec()).collect();
    let planned =
        operations.chunks(OPERATION_WORDS).zip(lists.chunks(groups)).take(size.operations);
    Ok(fits.then(|| {
        planned
            .map(|(words, blocks)| Planned {
                handle: words[0],
                store: words[1] == 1,
                tokens: (words[2], words[3]),
                skip: words[4],
                blocks: blocks.to_vec(),
            })
            .collect()
    }))
}

fn plan(table: &mut Trackers, step: &Step<'_>) -> Vec<Planned> {
    plan_into(table, step, Size { operations: 64, blocks: 4096 }).unwrap().unwrap()
}

const NOTHING: Step<'static> =
    Step { handles: &[], scheduled: &[], tokens: &[], block_offsets: &[0], block_ids: &[] };

/// One request with its blocks, after a lookup.
fn request(table: &mut Trackers, tokens: u32, local: u32, external: u32, blocks: u32) -> u32 {
    let handle = table.add(Tracker::new(tokens, u32::MAX), &[0, 0], &[]).unwrap();
    table.set_hits(handle, local, external).unwrap();
    let ids: Vec<u32> = (100..100 + blocks).collect();
    table.allocate(handle, &[0, blocks], &ids, external > local).unwrap();
    handle
}

/// What is stored after `scheduled` tokens, with no new blocks.
fn stored(table: &mut Trackers, handle: u32, scheduled: u32) -> Vec<(u32, u32)> {
    let tokens = [table.get(handle).unwrap().tokens];
    let step = Step {
        handles: &[handle],
        scheduled: &[scheduled],
        tokens: &tokens,
        block_offsets: &[0, 0],
        block_ids: &[],
    };
    let planned = plan(table, &step);
    planned.iter().filter(|operation| operation.store).map(|operation| operation.tokens).collect()
}

#[test]
fn blocks_that_are_not_computed_yet_are_not_stored_when_both_hits_count_the_same_tokens() {
    let mut table = table();
    let handle = request(&mut table, 320, 64, 64, 20);
    // 16 + 64 tokens are there; the sum of the hits would make it 144, and a chunk of garbage.
    assert_eq!(stored(&mut table, handle, 16), []);
    assert_eq!(stored(&mut table, handle, 48), [(64, 128)]);
}

#[test]
fn blocks_that_the_engine_had_cached_are_stored_when_the_external_hit_is_shorter() {
    let mut table = table();
    let handle = request(&mut table, 320, 128, 64, 20);
    // With the external hit alone these 64 tokens would never be stored.
    assert_eq!(stored(&mut table, handle, 0), [(64, 128)]);
    let without = request(&mut table, 320, 128, 0, 20);
    assert_eq!(stored(&mut table, without, 0), [(0, 128)], "nor with a miss");
}

#[test]
fn asking_again_counts_no_block_twice() {
    let mut table = table();
    let handle = table.add(Tracker::new(320, u32::MAX), &[0, 0], &[]).unwrap();
    for _ in 0..3 {
        table.set_hits(handle, 0, 64).unwrap();
    }
    assert_eq!(table.get(handle).unwrap().stored, 64);
}

#[test]
fn a_load_begins_at_a_chunk_and_skips_what_the_engine_has() {
    let mut table = table();
    let handle = request(&mut table, 320, 80, 192, 20);
    assert_eq!(table.get(handle).unwrap().state, State::WaitingForLoad);
    let load = Planned {
        handle,
        store: false,
        tokens: (64, 192),
        skip: 16,
        blocks: vec![(104..112).collect()],
    };
    assert_eq!(plan(&mut table, &NOTHING), [load]);
    assert_eq!(table.get(handle).unwrap().state, State::Ready);
    assert_eq!(plan(&mut table, &NOTHING), [], "once");
}

#[test]
fn loads_come_first_and_older_requests_before_younger_ones_whatever_their_handles() {
    let mut table = table();
    let first = request(&mut table, 128, 0, 0, 8);
    table.remove(first).unwrap();
    let storing = request(&mut table, 128, 0, 0, 8);
    let older = request(&mut table, 128, 0, 64, 8);
    table.remove(storing).unwrap();
    let younger = request(&mut table, 128, 0, 64, 8);
    assert!(younger < older, "the handle is used anew");
    let another = request(&mut table, 128, 0, 0, 8);
    let step = Step {
        handles: &[another],
        scheduled: &[64],
        tokens: &[128],
        block_offsets: &[0, 0],
        block_ids: &[],
    };
    let order: Vec<u32> = plan(&mut table, &step).iter().map(|planned| planned.handle).collect();
    assert_eq!(order, [older, younger, another]);
}

#[test]
fn a_plan_without_room_changes_nothing_and_says_how_much_it_needs() {
    let mut table = table();
    let loading = request(&mut table, 128, 0, 64, 4);
    let storing = request(&mut table, 128, 0, 0, 4);
    let step = Step {
        handles: &[storing],
        scheduled: &[128],
        tokens: &[128],
        block_offsets: &[0, 4],
        block_ids: &[1, 2, 3, 4],
    };
    for room in [
        Size { operations: 1, blocks: 12 },
        Size { operations: 2, blocks: 11 },
        Size { operations: 0, blocks: 0 },
    ] {
        assert_eq!(plan_into(&mut table, &step, room).unwrap(), None);
    }
    let whole = plan_into(&mut table, &step, Size { operations: 2, blocks: 12 }).unwrap().unwrap();
    assert_eq!(whole[0].handle, loading);
    assert_eq!(whole[1].blocks, [[100, 101, 102, 103, 1, 2, 3, 4]]);
}

#[test]
fn a_failed_load_is_computed_and_may_be_stored_after() {
    let mut table = table();
    let handle = request(&mut table, 128, 0, 64, 4);
    table.bypass(handle).unwrap();
    assert_eq!(plan(&mut table, &NOTHING), []);
    assert_eq!(table.get(handle).unwrap().state, State::Bypassed);
    let ids: Vec<u32> = (0..8).collect();
    assert_eq!(table.allocate(handle, &[0, 8], &ids, false).unwrap(), State::Ready);
    assert_eq!(stored(&mut table, handle, 128), [(0, 128)]);
}

#[test]
fn bad_input_is_refused_and_changes_nothing() {
    let mut table = table();
    let handle = request(&mut table, 320, 0, 64, 4);
    let (before, blocks) = (table.get(handle).unwrap(), table.blocks(handle, 0).unwrap().to_vec());
    fn step<'a>(
        handles: &'a [u32],
        scheduled: &'a [u32],
        block_offsets: &'a [u32],
        block_ids: &'a [u32],
    ) -> Step<'a> {
        Step { handles, scheduled, tokens: &[320, 320][..handles.len()], block_offsets, block_ids }
    }
    let (one, two) = ([handle], [handle, handle]);
    let steps = [
        (step(&[7], &[1], &[0, 0], &[]), "request 7 is not tracked"),
        (step(&two, &[1, 1], &[0, 0, 0], &[]), "twice"),
        (step(&one, &[], &[0, 0], &[]), "0 counts"),
        (step(&one, &[1], &[0, 1], &[1000]), "block 1000 is not below 1000"),
        (step(&one, &[1], &[0, 2], &[1]), "ascending"),
        (step(&one, &[1], &[1, 1], &[1]), "ascending"),
        (step(&one, &[1], &[0], &[]), "ascending"),
    ];
    for (step, why) in steps {
        let error = plan_into(&mut table, &step, Size { operations: 8, blocks: 64 }).unwrap_err();
        assert!(error.message.contains(why), "{error}");
    }
    for (error, why) in [
        (table.set_hits(handle, 0, 65).unwrap_err(), "65 tokens is not a whole number"),
        (table.set_hits(handle, 0, 384).unwrap_err(), "within the 320"),
        (table.allocate(handle, &[0, 3], &[1, 2, 3], true).unwrap_err(), "has 4 blocks"),
        (table.allocate(handle, &[0, 5], &[1, 2, 3, 4, 1000], true).unwrap_err(), "1000"),
        (table.allocate(handle, &[0, 4], &[20, 21, 22, 23], true).unwrap_err(), "block 20 where"),
        (table.blocks(handle, 1).unwrap_err(), "group 1"),
        (table.remove(9).unwrap_err(), "request 9"),
    ] {
        assert!(error.message.contains(why), "{error}");
    }
    assert_eq!((table.get(handle).unwrap(), table.blocks(handle, 0).unwrap()), (before, &*blocks));
    assert_eq!(plan(&mut table, &NOTHING).len(), 1, "the load is still planned");
    for (chunk, groups) in [(0, vec![16]), (64, vec![]), (64, vec![16, 24])] {
        assert!(Trackers::new(Layout { chunk, groups, ..layout() }).is_err());
    }
}

/// The same rules for one group, in blocks, about one request at a time.
#[derive(Debug, Clone, Default)]
struct Model {
    handle: u32,
    tokens: u32,
    scheduled: u32,
    local: u32,
    external: u32,
    stored: u32,
    ids: Vec<u32>,
    waits: bool,
}

impl Model {
    fn store(&mut self) -> Option<(u32, u32)> {
        let mut last = None;
        // Chunk by chunk: is each block of it hashed, allocated, and computed?
        while (self.stored / BLOCK..self.stored / BLOCK + CHUNK / BLOCK).all(|block| {
            let end = (block + 1) * BLOCK;
            let computed = |hit: u32| end <= hit + self.scheduled;
            end <= self.tokens
                && (block as usize) < self.ids.len()
                && (computed(self.local) || computed(self.external))
        }) {
            let start = last.map_or(self.stored, |(start, _)| start);
            self.stored += CHUNK;
            last = Some((start, self.stored));
        }
        last
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_run_is_planned_as_a_plain_model_would(
        actions in prop::collection::vec((0..6_u8, any::<[u16; 4]>()), 1..60),
    ) {
        let mut table = table();
        let mut model: Vec<Model> = Vec::new();
        for (action, [a, b, c, d]) in actions {
            let (a, b, c) = (u32::from(a), u32::from(b), u32::from(c));
            let nth = (d as usize).checked_rem(model.len());
            match (action, nth) {
                (0, _) => {
                    let tokens = a % 700;
                    let handle = table.add(Tracker::new(tokens, u32::MAX), &[0, 0], &[]).unwrap();
                    let external = (b % 12 * CHUNK).min(tokens / CHUNK * CHUNK);
                    let local = c % 40 * BLOCK;
                    table.set_hits(handle, local, external).unwrap();
                    let stored = external;
                    let request = Model { handle, tokens, local, external, stored, ..Model::default() };
                    model.push(request);
                }
                (1, Some(nth)) => {
                    let Model { handle, .. } = model.remove(nth);
                    table.remove(handle).unwrap();
                }
                (2, Some(nth)) => {
                    let request = &mut model[nth];
                    let fresh = table.get(request.handle).unwrap().state == State::Prefetching;
                    request.ids.extend((0..a % 20).map(|i| (b + i) % 1000));
                    let count = request.ids.len() as u32;
                    table.allocate(request.handle, &[0, count], &request.ids, c % 2 == 0).unwrap();
                    request.waits |= fresh && c % 2 == 0 && request.external > request.local;
                }
                _ => {
                    let chosen: Vec<usize> = (0..model.len()).filter(|i| (a >> (i % 16)) & 1 == 1).collect();
                    let mut expected = Vec::new();
                    for request in &mut model {
                        if mem::take(&mut request.waits) {
                            let start = request.local / CHUNK * CHUNK;
                            let blocks = request.ids.iter().copied()
                                .take((request.external / BLOCK) as usize)
                                .skip((start / BLOCK) as usize).collect();
                            expected.push(Planned {
                                handle: request.handle,
                                store: false,
                                tokens: (start, request.external),
                                skip: request.local - start,
                                blocks: vec![blocks],
                            });
                        }
                    }
                    let (mut handles, mut scheduled, mut tokens) = (vec![], vec![], vec![]);
                    let (mut offsets, mut ids) = (vec![0], vec![]);
                    for i in chosen {
                        let request = &mut model[i];
                        request.scheduled += b % 100;
                        request.tokens += c % 3;
                        let new: Vec<u32> = (0..u32::from(d) % 5).collect();
                        request.ids.extend(&new);
                        handles.push(request.handle);
                        scheduled.push(b % 100);
                        tokens.push(request.tokens);
                        ids.extend(new);
                        offsets.push(ids.len() as u32);
                        if let Some((start, end)) = request.store() {
                            let blocks = request.ids[(start / BLOCK) as usize..(end / BLOCK) as usize].to_vec();
                            expected.push(Planned {
                                handle: request.handle,
                                store: true,
                                tokens: (start, end),
                                skip: 0,
                                blocks: vec![blocks],
                            });
                        }
                    }
                    let step = Step {
                        handles: &handles,
                        scheduled: &scheduled,
                        tokens: &tokens,
                        block_offsets: &offsets,
                        block_ids: &ids,
                    };
                    prop_assert_eq!(plan(&mut table, &step), expected);
                }
            }
            prop_assert_eq!(table.len(), model.len());
            for request in &model {
                prop_assert_eq!(table.get(request.handle).unwrap().stored, request.stored);
            }
        }
    }
}
