//! A small producer and consumer, as an engine and a cache are: the engine computes a block in its stream, and the cache
//! copies it to pinned memory in another. Each deliberate defect is caught, however things happen to run.

use crate::support::*;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Defect {
    None,
    NoEventWait,
    NoSynchronization,
    WrongContext,
    BlockOutOfRange,
    UseAfterFree,
    AnyOrder,
}

const BLOCK: usize = 256;

/// Returns what the first violation says, if there is one.
fn run(defect: Defect, seed: u64) -> Option<String> {
    let fake = Fake::start();
    fake.fakeCudaControlSchedule(seed, seed % 4 * 100);
    let (compute, copy, ready) = (fake.stream(), fake.stream(), fake.event());
    let (pool, slot) = (fake.alloc(4 * BLOCK), fake.pinned(BLOCK));
    let block = if defect == Defect::BlockOutOfRange { 4 } else { 3 };
    let from = pool + block * BLOCK as u64;

    assert_eq!(fake.cuMemsetD8Async(pool + 3 * BLOCK as u64, 42, BLOCK, compute), 0);
    assert_eq!(fake.cuEventRecord(ready, compute), 0);
    if defect == Defect::UseAfterFree {
        assert_eq!(fake.cuStreamSynchronize(compute), 0);
        assert_eq!(fake.cuMemFree_v2(pool), 0);
    }
    if defect != Defect::NoEventWait {
        assert_eq!(fake.cuStreamWaitEvent(copy, ready, 0), 0);
    }
    let order = if defect == Defect::AnyOrder { ANY_ORDER } else { STREAM_ORDER };
    let copies = [(address(slot), from, BLOCK)];
    let code = if defect == Defect::WrongContext {
        std::thread::scope(|scope| {
            scope.spawn(|| fake.batch(&copies, order, copy).0).join().unwrap()
        })
    } else {
        fake.batch(&copies, order, copy).0
    };
    if code == 0 {
        if defect != Defect::NoSynchronization {
            assert_eq!(fake.cuStreamSynchronize(copy), 0);
        }
        fake.fakeCudaHostAccess(slot.as_ptr(), BLOCK, 0);
    }
    if defect == Defect::None {
        assert_eq!(slot, [42; BLOCK]);
    }
    assert_eq!(fake.cuCtxSynchronize(), 0);
    fake.violations().first().cloned()
}

#[test]
fn every_defect_is_caught_every_time() {
    for seed in 0..25 {
        for (defect, words) in [
            (Defect::NoEventWait, "race"),
            (Defect::NoSynchronization, "an access of the host"),
            (Defect::WrongContext, "no context is current"),
            (Defect::BlockOutOfRange, "in no allocation"),
            (Defect::UseAfterFree, "was freed"),
            (Defect::AnyOrder, "reading in ANY order"),
        ] {
            let caught = run(defect, seed);
            assert!(
                caught.as_ref().is_some_and(|text| text.contains(words)),
                "{defect:?}: {caught:?}"
            );
        }
        assert_eq!(run(Defect::None, seed), None);
    }
}
