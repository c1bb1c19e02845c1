//! A lookup of many chunks for many ranks.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Engine, key, layout};
use kvferry_core::key::Key;

#[test]
fn a_lookup_takes_no_memory_for_each_chunk_and_rank() {
    let engine = Engine::new(4);
    engine.register(1, layout("m", 255));
    let key = Key { world_size: 255, worker_id: None, ..key(0, 16_384) };
    let taken = allocation_counter::measure(|| assert_eq!(engine.lookup(&key), 0));
    assert!(taken.bytes_max < 16 << 20, "{taken:?}");
}
