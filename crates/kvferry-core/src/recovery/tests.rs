#![allow(clippy::cast_possible_truncation, reason = "small numbers in tests")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const BLOCK: u32 = 16;

#[derive(Debug, Clone)]
struct Request {
    computed: u32,
    scheduled: u32,
    asynchronous: bool,
    blocks: Vec<u32>,
}

fn running(computed: u32, scheduled: u32, blocks: &[u32]) -> Request {
    Request { computed, scheduled, asynchronous: false, blocks: blocks.to_vec() }
}

fn loading(computed: u32, blocks: &[u32]) -> Request {
    Request { asynchronous: true, ..running(computed, 0, blocks) }
}

fn try_recover(
    block_size: u32,
    policy: LoadFailurePolicy,
    requests: &[Request],
    invalid: &[u32],
) -> Result<Recovery> {
    let column = |of: fn(&Request) -> u32| requests.iter().map(of).collect::<Vec<u32>>();
    let mut block_offsets = vec![0];
    let mut block_ids = Vec::new();
    for request in requests {
        block_ids.extend(&request.blocks);
        block_offsets.push(block_ids.len() as u32);
    }
    recover(&Step {
        block_size,
        policy,
        computed: &column(|request| request.computed),
        scheduled: &column(|request| request.scheduled),
        asynchronous: &requests.iter().map(|it| u8::from(it.asynchronous)).collect::<Vec<_>>(),
        block_offsets: &block_offsets,
        block_ids: &block_ids,
        invalid,
    })
}

fn fail(requests: &[Request], invalid: &[u32]) -> Recovery {
    try_recover(BLOCK, LoadFailurePolicy::Fail, requests, invalid).unwrap()
}

fn recompute(requests: &[Request], invalid: &[u32]) -> Recovery {
    try_recover(BLOCK, LoadFailurePolicy::Recompute, requests, invalid).unwrap()
}

#[test]
fn tokens_scheduled_in_this_step_do_not_count_as_computed_before_they_are() {
    // 40 tokens before the step, 24 scheduled: blocks 10 to 12 were loaded, 13 is yet to be computed.
    let request = running(64, 24, &[10, 11, 12, 13]);
    assert_eq!(fail(std::slice::from_ref(&request), &[13]).affected, [false]);
    let recovery = fail(&[request], &[12]);
    assert_eq!((recovery.computed, recovery.affected_tokens), (vec![32], 8));
}

#[test]
fn the_subtraction_is_made_for_loads_between_steps_too() {
    let request = Request { asynchronous: true, ..running(48, 16, &[10, 11, 12]) };
    assert!(!recompute(std::slice::from_ref(&request), &[12]).affected[0]);
    assert_eq!(recompute(&[request], &[11]).affected_tokens, 16);
}

#[test]
fn a_shared_block_is_counted_once_and_kept_by_the_others() {
    let requests = [running(64, 16, &[1, 2, 3, 4]), running(65, 17, &[1, 2, 3, 5])];
    let recovery = recompute(&requests, &[2]);
    assert_eq!(recovery.affected, [true, true]);
    // The first goes back to block 2; the other only loses what this step built on it.
    assert_eq!(recovery.computed, [16, 48]);
    assert_eq!(recovery.affected_tokens, 32 + 17);
    assert_eq!(recovery.found, [2]);
    // One with an invalid block of its own is cut there, behind the shared one.
    let recovery = recompute(&requests, &[2, 3]);
    assert_eq!(recovery.computed, [16, 48]);
    let own = [requests[0].clone(), running(64, 16, &[1, 2, 9, 5])];
    assert_eq!(recompute(&own, &[9, 2]).computed, [16, 32]);
}

#[test]
fn loads_between_steps_are_counted_apart_from_running_requests() {
    let requests = [loading(48, &[1, 2, 3]), running(48, 0, &[1, 2, 3])];
    let recovery = fail(&requests, &[2]);
    assert_eq!((recovery.computed, recovery.affected_tokens), (vec![16, 16], 64));
    assert_eq!(recovery.found, [2]);
}

#[test]
fn only_fail_evicts_and_only_what_running_requests_have() {
    let requests =
        [loading(48, &[7, 8, 9]), running(48, 16, &[1, 2, 3, 4]), running(32, 0, &[1, 5])];
    let recovery = fail(&requests, &[5, 2, 8]);
    assert_eq!(recovery.evicted, [2, 3, 4, 5]);
    assert_eq!(recompute(&requests, &[5, 2, 8]), Recovery { evicted: vec![], ..recovery });
}

#[test]
fn blocks_of_no_request_and_blocks_named_twice_change_nothing() {
    let requests = [running(32, 0, &[1, 2])];
    assert_eq!(fail(&requests, &[99, 2, 2]), fail(&requests, &[2]));
    let recovery = fail(&requests, &[99]);
    let Recovery { affected, found, affected_tokens, .. } = &recovery;
    assert_eq!((&affected[..], &found[..], *affected_tokens), (&[false][..], &[][..], 0));
}

#[test]
fn counts_up_to_the_largest_are_added_without_overflow() {
    let requests = vec![running(u32::MAX, 0, &[1]); 3];
    let recovery = try_recover(u32::MAX, LoadFailurePolicy::Fail, &requests[..1], &[1]).unwrap();
    assert_eq!((recovery.computed[0], recovery.affected_tokens), (0, u64::from(u32::MAX)));
    let last = Request { scheduled: u32::MAX, ..requests[0].clone() };
    assert!(!fail(&[last], &[1]).affected[0]);
    let more = [running(u32::MAX, 0, &[1]), running(u32::MAX, 0, &[2])];
    assert_eq!(fail(&more, &[1, 2]).affected_tokens, 2 * u64::from(u32::MAX));
}

#[test]
fn more_scheduled_than_computed_is_refused() {
    let requests = [running(16, 0, &[1]), running(16, 17, &[2, 3])];
    let error = try_recover(BLOCK, LoadFailurePolicy::Fail, &requests, &[1]).unwrap_err();
    assert!(error.message.starts_with("request 1 of the step has 16 computed tokens but 17"));
}

#[test]
fn columns_that_do_not_fit_together_are_refused() {
    let good = Step {
        block_size: BLOCK,
        policy: LoadFailurePolicy::Fail,
        computed: &[16],
        scheduled: &[0],
        asynchronous: &[0],
        block_offsets: &[0, 1],
        block_ids: &[1],
        invalid: &[],
    };
    assert!(recover(&good).is_ok());
    for bad in [
        Step { block_size: 0, ..good },
        Step { scheduled: &[], ..good },
        Step { asynchronous: &[0, 1], ..good },
        Step { block_offsets: &[], ..good },
        Step { block_offsets: &[0], ..good },
        Step { block_offsets: &[1, 1], ..good },
        Step { block_offsets: &[0, 2], ..good },
        Step {
            computed: &[16, 0],
            scheduled: &[0, 0],
            asynchronous: &[0, 0],
            block_offsets: &[0, 2, 1],
            ..good
        },
    ] {
        recover(&bad).unwrap_err();
    }
}

/// The same from sets of token positions: `Recovery` with its lists sorted.
fn model(
    block_size: u32,
    policy: LoadFailurePolicy,
    requests: &[Request],
    invalid: &BTreeSet<u32>,
) -> Recovery {
    let block_of = |request: &Request, position: u32| {
        request.blocks.get((position / block_size) as usize).copied()
    };
    // Positions that were loaded or computed before the step, and lie in an invalid block.
    let wrong = |request: &Request| -> BTreeSet<u32> {
        let before = request.computed - request.scheduled;
        let is_invalid = |position: &u32| {
            block_of(request, *position).is_some_and(|block| invalid.contains(&block))
        };
        (0..before).filter(is_invalid).collect()
    };
    // Who computes each block anew: of each kind the first that has it there.
    let mut owners = BTreeMap::new();
    for (at, request) in requests.iter().enumerate() {
        for position in wrong(request) {
            let block = block_of(request, position).unwrap();
            owners.entry((request.asynchronous, block)).or_insert(at);
        }
    }
    let mut lost_tokens = 0;
    let mut evicted = BTreeSet::new();
    let mut computed = Vec::new();
    for (at, request) in requests.iter().enumerate() {
        let before: BTreeSet<u32> = (0..request.computed - request.scheduled).collect();
        let owned = |position: &u32| {
            let block = block_of(request, *position).unwrap();
            owners[&(request.asynchronous, block)] == at
        };
        let wrong = wrong(request);
        let first = wrong.iter().copied().find(owned);
        let kept = match first {
            Some(first) => before.iter().copied().filter(|position| *position < first).collect(),
            None if wrong.is_empty() => (0..request.computed).collect(),
            None => before.clone(),
        };
        lost_tokens += match first {
            Some(_) => before.difference(&kept).count(),
            None => request.computed as usize - kept.len(),
        };
        let built_on_it = |(index, _): &(usize, &u32)| {
            first.is_some_and(|first| *index as u32 * block_size >= first)
        };
        if policy == LoadFailurePolicy::Fail && !request.asynchronous {
            let blocks = request.blocks.iter().enumerate().filter(built_on_it);
            evicted.extend(blocks.map(|(_, block)| *block));
        }
        computed.push(kept.len() as u32);
    }
    let found: BTreeSet<u32> = owners.keys().map(|(_, block)| *block).collect();
    Recovery {
        computed,
        affected: requests.iter().map(|request| !wrong(request).is_empty()).collect(),
        found: found.into_iter().collect(),
        evicted: evicted.into_iter().collect(),
        affected_tokens: lost_tokens as u64,
    }
}

/// A request of a small pool, whose blocks may be shared, be there twice, be too many or too few.
fn requests() -> impl Strategy<Value = Request> {
    let blocks = prop::collection::vec(0..24_u32, 0..10);
    (0..40_u32, any::<prop::sample::Index>(), any::<bool>(), blocks).prop_map(
        |(computed, scheduled, asynchronous, blocks)| Request {
            computed,
            scheduled: scheduled.index(computed as usize + 1) as u32,
            asynchronous,
            blocks,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn recovery_is_that_of_sets_of_positions(
        block_size in 1..6_u32,
        fails in any::<bool>(),
        requests in prop::collection::vec(requests(), 0..6),
        invalid in prop::collection::vec(0..28_u32, 0..6),
    ) {
        let policy = if fails { LoadFailurePolicy::Fail } else { LoadFailurePolicy::Recompute };
        let mut recovery = try_recover(block_size, policy, &requests, &invalid).unwrap();
        for list in [&mut recovery.found, &mut recovery.evicted] {
            list.sort_unstable();
        }
        let invalid = invalid.into_iter().collect();
        prop_assert_eq!(&recovery, &model(block_size, policy, &requests, &invalid));
        // An engine that takes the counts over never counts a token as computed that it did not before.
        for (request, computed) in requests.iter().zip(&recovery.computed) {
            prop_assert!(*computed <= request.computed);
        }
    }
}
