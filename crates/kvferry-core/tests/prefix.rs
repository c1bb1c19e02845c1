//! The prefix cache over a server that says what it should not: errors and misses, never a panic and
//! nothing outside its slots.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod liar;

use std::sync::atomic::Ordering;

use kvferry_core::ErrorCode;
use liar::{CHUNK, Liar, POOL, deadline, now};

const PAYLOAD: usize = 100;

fn tokens(chunks: u32) -> Vec<u32> {
    (0..chunks * CHUNK).collect()
}

#[test]
fn more_hits_than_were_asked_for_are_no_hits() {
    let cache = Liar::new(u64::MAX, &[], &[]).cache(PAYLOAD as u64);
    assert_eq!(now(cache.lookup(&tokens(2), "", deadline())).unwrap().chunks(), 2);
}

#[test]
fn a_load_with_another_number_of_slots_is_an_error() {
    for slots in [&[][..], &[(0, 4096); 1], &[(0, 4096); 3]] {
        let cache = Liar::new(2, slots, &[]).cache(PAYLOAD as u64);
        let hit = now(cache.lookup(&tokens(2), "", deadline())).unwrap();
        let error = now(cache.load(&hit, deadline())).map(drop).unwrap_err();
        assert_eq!(error.code, ErrorCode::Protocol);
    }
}

#[test]
fn a_store_of_chunks_that_were_not_asked_for_is_given_back() {
    for indices in [&[2][..], &[u32::MAX], &[0, 1], &[]] {
        let liar = Liar::new(0, &[(0, 4096)], indices);
        let error = now(liar.cache(PAYLOAD as u64).store(&tokens(2), "", deadline()))
            .map(drop)
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::Protocol, "{indices:?}");
        assert_eq!(liar.abandoned.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn slots_that_do_not_fit_are_neither_read_nor_written() {
    let pool = POOL as u64;
    for slot in [(0, 163), (pool - 100, 4096), (u64::MAX - 63, 4096), (u64::MAX, u64::MAX)] {
        let liar = Liar::new(1, &[slot], &[0]);
        let cache = liar.cache(PAYLOAD as u64);
        let writing = now(cache.store(&tokens(1), "", deadline())).unwrap();
        assert!(writing.write(0, |next| next(&[0xff; PAYLOAD])).is_err(), "{slot:?}");
        assert!(liar.memory.0.lock().unwrap().iter().all(|byte| *byte == 0), "{slot:?}");
        let hit = now(cache.lookup(&tokens(1), "", deadline())).unwrap();
        let reading = now(cache.load(&hit, deadline())).unwrap().unwrap();
        let read = reading.read(0, |next| next(&mut [0; PAYLOAD]));
        assert!(!read.unwrap_or(false), "{slot:?}");
    }
}
