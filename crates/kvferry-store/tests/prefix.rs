//! The prefix cache of kvferry-core on the embedded store: what comes back is what went in, or nothing.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use kvferry_core::cache::{FileBuffer, Memory};
use kvferry_core::llama_state::{self, Geometry, Layer, Plane, StateFile, Target};
use kvferry_core::prefix::PrefixCache;
use kvferry_core::{ErrorCode, Result};
use kvferry_store::{Embedded, Limits, Policy, READ_HOLD, Store, StoreOptions};

const CHUNK: u32 = 16;
const PAYLOAD: u64 = 100_000;

/// The embedded store answers at once.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("the embedded store made someone wait"),
    }
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

const POOL: usize = 16 << 20;

fn store() -> Store {
    let options = StoreOptions {
        chunk_size: CHUNK,
        memory: POOL as u64,
        shared_name: None,
        policy: Policy::Lru,
        disk: None,
        remote: None,
        limits: Limits::default(),
    };
    Store::new(options).unwrap()
}

fn cache(store: &Store, identity: &str, payload: u64) -> PrefixCache {
    let cache = Arc::new(Embedded::new(store.clone()));
    now(PrefixCache::open(cache, identity.as_bytes(), payload, 7, deadline())).unwrap()
}

fn tokens(chunks: u32) -> Vec<u32> {
    (0..chunks * CHUNK).collect()
}

fn payload(chunk: u32) -> Vec<u8> {
    let text = format!("chunk {chunk};");
    text.bytes().cycle().take(usize::try_from(PAYLOAD).unwrap()).collect()
}

fn put(cache: &PrefixCache, tokens: &[u32]) -> Vec<u32> {
    let writing = now(cache.store(tokens, "", deadline())).unwrap();
    let chunks = writing.chunks().to_vec();
    for (place, chunk) in chunks.iter().enumerate() {
        writing.write(place, |next| payload(*chunk).chunks(777).try_for_each(next)).unwrap();
    }
    assert!(now(cache.commit(writing, deadline())).unwrap());
    chunks
}

/// The leading chunks that can be read, each compared with what was stored.
fn get(cache: &PrefixCache, tokens: &[u32]) -> u32 {
    let hit = now(cache.lookup(tokens, "", deadline())).unwrap();
    let Some(reading) = now(cache.load(&hit, deadline())).unwrap() else { return 0 };
    let damaged = cache.damaged_chunks();
    let whole = (0..reading.chunks()).take_while(|chunk| {
        let mut bytes = payload(99);
        let whole =
            reading.read(*chunk, |next| bytes.chunks_mut(50_001).try_for_each(next)).unwrap();
        assert!(!whole || bytes == payload(*chunk), "wrong bytes were called whole");
        whole
    });
    let whole = u32::try_from(whole.count()).unwrap();
    let counted = cache.damaged_chunks() - damaged;
    assert_eq!(counted, u64::from(whole < reading.chunks()), "before the load is ended");
    assert!(now(cache.finish(&hit, Some(reading), deadline())).unwrap());
    whole
}

/// Where the pool holds `needle`.
fn find(memory: &dyn Memory, needle: &[u8]) -> u64 {
    let mut pool = vec![0; POOL];
    memory.read(0, &mut pool).unwrap();
    pool.windows(needle.len()).position(|window| window == needle).unwrap() as u64
}

#[test]
fn payloads_come_back_in_whatever_pieces_they_are_copied() {
    let store = store();
    let cache = cache(&store, "model", PAYLOAD);
    assert_eq!(put(&cache, &tokens(3)), [0, 1, 2]);
    assert_eq!(get(&cache, &tokens(3)), 3);
    assert_eq!(get(&cache, &tokens(5)), 3);
}

#[test]
fn a_chunk_whose_bytes_changed_is_a_miss_and_those_before_it_are_not() {
    for (needle, offset) in
        [("chunk 1;", 3), ("KVFY", 1), ("KVFY", 5), ("KVFY", 9), ("KVFY", 17), ("KVFY", 30)]
    {
        let store = store();
        let cache = cache(&store, "model", PAYLOAD);
        put(&cache, &tokens(3));
        let memory = store.memory();
        let first = find(&*memory, b"chunk 0;");
        let second = find(&*memory, b"chunk 1;");
        let at = if needle == "KVFY" { second - 64 } else { second } + offset;
        assert!(second > first);
        let mut byte = [0];
        memory.read(at, &mut byte).unwrap();
        memory.write(at, &[byte[0] ^ 0x10]).unwrap();
        assert_eq!(get(&cache, &tokens(3)), 1, "{needle} + {offset}");
        assert_eq!(cache.damaged_chunks(), 1);
        assert_eq!(put(&cache, &tokens(3)), [1], "what is damaged does not stay");
        assert_eq!(get(&cache, &tokens(3)), 3);
        assert_eq!(store.clear(), 4, "it went when nobody read it any more");
    }
}

#[test]
fn a_chunk_in_another_ones_place_is_a_miss() {
    let (first, second) = (tokens(1), tokens(1).iter().map(|token| token + 99).collect::<Vec<_>>());
    for (identity, salt, other_tokens) in
        [("model", "", &second), ("model", "tenant", &first), ("another", "", &first)]
    {
        let store = store();
        let here = cache(&store, "model", PAYLOAD);
        let there = cache(&store, identity, PAYLOAD);
        put(&here, &first);
        let writing = now(there.store(other_tokens, salt, deadline())).unwrap();
        writing.write(0, |next| next(&vec![1; usize::try_from(PAYLOAD).unwrap()])).unwrap();
        assert!(now(there.commit(writing, deadline())).unwrap());
        let memory = store.memory();
        let from = find(&*memory, b"chunk 0;") - 64;
        let to = find(&*memory, &[1; 64]) - 64;
        let mut object = vec![0; 64 + usize::try_from(PAYLOAD).unwrap()];
        memory.read(from, &mut object).unwrap();
        memory.write(to, &object).unwrap();
        let hit = now(there.lookup(other_tokens, salt, deadline())).unwrap();
        let reading = now(there.load(&hit, deadline())).unwrap().unwrap();
        let mut bytes = payload(99);
        assert!(!reading.read(0, |next| next(&mut bytes)).unwrap(), "{identity:?} {salt:?}");
        assert_eq!(get(&here, &first), 1);
    }
}

#[test]
fn an_engine_that_goes_without_a_word_leaves_nothing_held() {
    let store = store();
    let cache = cache(&store, "model", PAYLOAD);
    put(&cache, &tokens(1));
    let hit = now(cache.lookup(&tokens(1), "", deadline())).unwrap();
    let reading = now(cache.load(&hit, deadline())).unwrap();
    let writing = now(cache.store(&tokens(3), "", deadline())).unwrap();
    drop((hit, reading, writing, cache));
    let status = store.status(Instant::now() + READ_HOLD);
    for name in ["leases", "sessions", "slots_reading", "slots_writing", "slots_apart"] {
        assert_eq!(status.iter().find(|row| row.0 == name).unwrap().1, 0, "{name}");
    }
}

#[test]
fn a_payload_that_is_too_short_or_too_long_is_refused() {
    let store = store();
    let cache = cache(&store, "model", PAYLOAD);
    let writing = now(cache.store(&tokens(1), "", deadline())).unwrap();
    for bytes in [vec![0; 10], vec![0; usize::try_from(PAYLOAD).unwrap() + 1]] {
        let error = writing.write(0, |next| next(&bytes)).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
    }
    assert!(writing.write(1, |_| Ok(())).is_err(), "no such place");
    now(cache.abandon(writing, deadline())).unwrap();
    assert_eq!(get(&cache, &tokens(1)), 0);
}

#[test]
fn a_cache_that_is_closed_keeps_its_slots_until_its_last_store_ends() {
    let figure = |store: &Store, name: &str| {
        store.status(Instant::now()).iter().find(|row| row.0 == name).unwrap().1
    };
    let store = store();
    let closed = cache(&store, "closed", PAYLOAD);
    let first = now(closed.store(&tokens(1), "", deadline())).unwrap();
    let second = now(closed.store(&tokens(2), "", deadline())).unwrap();
    now(closed.close(deadline())).unwrap();
    now(closed.close(deadline())).unwrap();
    let other = cache(&store, "other", PAYLOAD);
    let fits = u32::try_from(put(&other, &tokens(100)).len()).unwrap();
    assert_eq!(figure(&store, "slots_writing"), 2);
    for (place, writing) in [(0, &first), (0, &second)] {
        writing.write(place, |next| next(&payload(99))).unwrap();
    }
    assert_eq!(get(&other, &tokens(100)), fits, "nothing was written over");
    now(closed.abandon(first, deadline())).unwrap();
    assert_eq!(figure(&store, "instances"), 2);
    assert!(now(closed.commit(second, deadline())).unwrap());
    assert_eq!((figure(&store, "instances"), figure(&store, "slots_writing")), (1, 0));
    let error = now(closed.store(&tokens(1), "", deadline())).map(drop).unwrap_err();
    assert_eq!(error.code, ErrorCode::Closed);
}

struct File(Vec<u8>);

impl FileBuffer for File {
    fn resize(&mut self, bytes: u64) -> Result<&mut [u8]> {
        self.0.resize(usize::try_from(bytes).unwrap(), 0xaa);
        Ok(&mut self.0)
    }
}

/// `heads` times as large as the smallest.
fn geometry(transposed: bool, heads: u32) -> Geometry {
    let plane = |runs, run_bytes| Plane { ggml_type: 1, runs, run_bytes };
    let values = if transposed { plane(3 * heads, 2) } else { plane(1, 6 * heads) };
    let layers = vec![Layer { keys: plane(1, 8 * heads), values }; 4];
    Geometry::new(transposed, layers).unwrap()
}

/// A state file of `tokens`, as an engine would save it: every byte a function of its place.
fn engine_file(geometry: &Geometry, tokens: &[u32]) -> Vec<u8> {
    let plan = llama_state::AssemblePlan::new(geometry, tokens, 1, 0).unwrap();
    let size = usize::try_from(plan.file_bytes()).unwrap();
    let mut file: Vec<u8> = (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect();
    for piece in plan.pieces() {
        let at = usize::try_from(piece.offset).unwrap();
        file[at..at + piece.bytes.len()].copy_from_slice(&piece.bytes);
    }
    StateFile::parse(&file).unwrap();
    file
}

#[test]
fn an_engine_gets_byte_for_byte_the_state_that_it_saved() {
    // With 4000 heads a chunk has 3.5 MB, which are copied in four parts.
    let shapes = [(false, 1), (true, 1), (false, 4000), (true, 4000)];
    let cases = shapes.into_iter().flat_map(|shape| [0, 50, 100].map(|percent| (shape, percent)));
    for ((transposed, heads), damaged_percent) in cases {
        let store = store();
        let geometry = geometry(transposed, heads);
        let payload = geometry.chunk_payload_bytes(CHUNK).unwrap();
        let cache = cache(&store, "llama", payload);
        let saved = engine_file(&geometry, &tokens(3));
        let run = &kvferry_copy::run_copies;
        let stored =
            now(llama_state::store(&cache, &geometry, &tokens(3), &saved, "", deadline(), run))
                .unwrap();
        assert_eq!((stored.chunks, stored.bytes, stored.refused), (3, 3 * payload, Some(0)));
        let restore = |count: u32, file: &mut File| {
            let tokens = tokens(count);
            let target = Target {
                geometry: &geometry,
                tokens: &tokens,
                chunk_size: CHUNK,
                streams: 1,
                sequence: 0,
                beyond: 0,
            };
            {
                let restoring = llama_state::restore(&cache, &target, "", file, deadline(), run);
                let (restored, held) = now(restoring).unwrap();
                now(held.end(&cache, deadline()));
                restored.written
            }
        };
        let mut file = File(Vec::new());
        assert_eq!(restore(4, &mut file), 3);
        assert_eq!(file.0, saved);
        assert_eq!(restore(2, &mut file), 2, "a shorter prefix");
        assert_eq!(StateFile::parse(&file.0).unwrap().tokens(), tokens(2));
        // The last chunk is damaged: the file is that of the two before it.
        let two = file.0.clone();
        let memory = store.memory();
        let mut pool = vec![0; POOL];
        memory.read(0, &mut pool).unwrap();
        let headers = pool.windows(4).enumerate().filter(|(_, window)| window == b"KVFY");
        let last = headers.map(|(at, _)| at as u64).max().unwrap() + 64;
        let at = last + (payload - 1) * damaged_percent / 100;
        let mut byte = [0];
        memory.read(at, &mut byte).unwrap();
        memory.write(at, &[!byte[0]]).unwrap();
        assert_eq!(restore(3, &mut file), 2, "{heads} heads, damaged at {damaged_percent} %");
        assert_eq!(file.0, two);
        assert_eq!(cache.damaged_chunks(), 1);
        let status = store.status(Instant::now());
        for name in ["leases", "sessions", "slots_reading", "slots_writing"] {
            assert_eq!(status.iter().find(|row| row.0 == name).unwrap().1, 0, "{name}");
        }
    }
}

#[test]
fn a_state_of_another_shape_is_refused_and_nothing_of_it_stored() {
    let store = store();
    let expected = geometry(false, 1);
    let cache = cache(&store, "llama", expected.chunk_payload_bytes(CHUNK).unwrap());
    let saved = engine_file(&geometry(true, 1), &tokens(2));
    let run = &kvferry_copy::run_copies;
    let error = now(llama_state::store(&cache, &expected, &tokens(2), &saved, "", deadline(), run))
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidState);
    let status = store.status(Instant::now());
    assert_eq!(status.iter().find(|row| row.0 == "used_bytes").unwrap().1, 0);
}

#[test]
fn a_payload_is_read_from_its_first_byte_to_its_last_in_parts_that_follow_each_other() {
    let store = store();
    let cache = cache(&store, "model", PAYLOAD);
    put(&cache, &tokens(1));
    let hit = now(cache.lookup(&tokens(1), "", deadline())).unwrap();
    let reading = now(cache.load(&hit, deadline())).unwrap().unwrap();
    let part = |from: u64, bytes: usize| {
        let mut passage = reading.begin(0, from).unwrap().unwrap();
        let mut part = vec![0; bytes];
        reading.next(&mut passage, &mut part).unwrap();
        assert_eq!(part, payload(0)[usize::try_from(from).unwrap()..][..bytes]);
        passage
    };
    let (first, second) = (part(0, 30_000), part(30_000, 70_000));
    assert!(reading.end([&first, &second]).unwrap());
    for wrong in [vec![&second, &first], vec![&first], vec![&second], vec![&first, &first], vec![]]
    {
        assert_eq!(reading.end(wrong).unwrap_err().code, ErrorCode::InvalidArgument);
    }
    assert!(now(cache.finish(&hit, Some(reading), deadline())).unwrap());
    assert_eq!(cache.damaged_chunks(), 0);
}

#[test]
fn a_stored_state_of_another_shape_is_never_the_engines() {
    let store = store();
    let geometry = geometry(false, 1);
    let payload = geometry.chunk_payload_bytes(CHUNK).unwrap();
    let cache = cache(&store, "llama", payload);
    let writing = now(cache.store(&tokens(1), "", deadline())).unwrap();
    writing.write(0, |next| next(&vec![7; usize::try_from(payload).unwrap()])).unwrap();
    assert!(now(cache.commit(writing, deadline())).unwrap());
    let target = Target {
        geometry: &geometry,
        tokens: &tokens(1),
        chunk_size: CHUNK,
        streams: 1,
        sequence: 0,
        beyond: 0,
    };
    let (mut file, run) = (File(Vec::new()), &kvferry_copy::run_copies);
    let restoring = llama_state::restore(&cache, &target, "", &mut file, deadline(), run);
    let (restored, held) = now(restoring).unwrap();
    now(held.end(&cache, deadline()));
    assert_eq!((restored.found, restored.written), (1, 0));
}
