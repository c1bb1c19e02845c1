//! Tensors through a prefix cache.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod liar;

use kvferry_core::ErrorCode;
use kvferry_core::key::Dtype;
use kvferry_core::kv_tensors::KvTensors;
use kvferry_core::prefix::PrefixCache;
use liar::{CHUNK, Liar, POOL, deadline, now};
use proptest::prelude::*;

/// From a slot's start to its payload.
const HEADER: usize = 64;
const SLOT: usize = 2048;

/// A model's tensors `[1, heads, tokens, size]` of float16.
#[derive(Debug, Clone, Copy)]
struct Model {
    tensors: usize,
    heads: usize,
    size: usize,
}

impl Model {
    fn kv(self) -> KvTensors {
        let count = |number: usize| u32::try_from(number).unwrap();
        let dtype = Dtype::new("float16").unwrap();
        KvTensors::new(count(self.tensors), count(self.heads), count(self.size), dtype, CHUNK)
            .unwrap()
    }

    /// Bytes of one token of one head.
    fn row(self) -> usize {
        self.size * 2
    }

    /// The byte that a tensor has at one place; none is 0.
    fn byte(tensor: usize, head: usize, token: usize, at: usize) -> u8 {
        u8::try_from(1 + (tensor * 89 + head * 53 + token * 17 + at * 5) % 255).unwrap()
    }

    /// The tensors of a prompt.
    fn prompt(self, tokens: usize) -> Vec<Vec<u8>> {
        let tensor = |tensor| {
            let head = move |head| (0..tokens).map(move |token| (head, token));
            let rows = (0..self.heads).flat_map(head);
            rows.flat_map(|(head, token)| {
                (0..self.row()).map(move |at| Self::byte(tensor, head, token, at))
            })
            .collect()
        };
        (0..self.tensors).map(tensor).collect()
    }

    /// A chunk's payload.
    fn payload(self, chunk: usize) -> Vec<u8> {
        let chunk_size = CHUNK as usize;
        let mut bytes = Vec::new();
        for tensor in 0..self.tensors {
            for head in 0..self.heads {
                for token in chunk * chunk_size..(chunk + 1) * chunk_size {
                    bytes.extend((0..self.row()).map(|at| Self::byte(tensor, head, token, at)));
                }
            }
        }
        bytes
    }
}

/// A server with slots for the chunks `missing`, or all of `hits`.
fn server(hits: u32, missing: &[u32]) -> std::sync::Arc<Liar> {
    let slots: Vec<(u64, u64)> =
        (0..missing.len()).map(|slot| ((slot * SLOT) as u64, SLOT as u64)).collect();
    Liar::new(hits.into(), &slots, missing)
}

fn tokens(count: usize) -> Vec<u32> {
    (0..u32::try_from(count).unwrap()).collect()
}

/// Stores what the server wants of `prompt`, `go` bytes at a time; how many times that took.
fn store(cache: &PrefixCache, model: Model, prompt: &[Vec<u8>], count: usize, go: u64) -> usize {
    let writing = now(cache.store(&tokens(count), "", deadline())).unwrap();
    let mut store = model.kv().store(&writing, u32::try_from(count).unwrap()).unwrap();
    let prompt: Vec<&[u8]> = prompt.iter().map(Vec::as_slice).collect();
    let mut times = 1;
    while store.copy(&writing, &prompt, go).unwrap() {
        times += 1;
    }
    times
}

/// Loads the first `chunks`, `go` bytes at a time: the tensors, and how many chunks of them are good.
fn load(cache: &PrefixCache, model: Model, chunks: u32, go: u64) -> (Vec<Vec<u8>>, u32) {
    let hit = now(cache.lookup(&tokens((chunks * CHUNK) as usize), "", deadline())).unwrap();
    let reading = now(cache.load(&hit, deadline())).unwrap().unwrap();
    let mut load = model.kv().load(chunks).unwrap();
    let mut tensors: Vec<Vec<u8>> = model.prompt((chunks * CHUNK) as usize);
    tensors.iter_mut().for_each(|tensor| tensor.fill(0));
    let mut into: Vec<&mut [u8]> = tensors.iter_mut().map(Vec::as_mut_slice).collect();
    while load.copy(&reading, &mut into, go).unwrap() {}
    (tensors, load.loaded())
}

proptest! {
    #[test]
    fn come_back_as_they_were_whatever_is_copied_in_one_go(
        model in (1usize..4, 1usize..4, 1usize..5)
            .prop_map(|(tensors, heads, size)| Model { tensors, heads, size }),
        chunks in 1u32..4,
        more in 0..CHUNK,
        go in prop_oneof![1u64..50, Just(1 << 20)],
    ) {
        let count = (chunks * CHUNK + more) as usize;
        let liar = server(chunks, &(0..chunks).collect::<Vec<_>>());
        let cache = liar.cache(model.kv().payload_bytes().unwrap());
        let times = store(&cache, model, &model.prompt(count), count, go);
        {
            let pool = liar.memory.0.lock().unwrap();
            for chunk in 0..chunks as usize {
                let payload = model.payload(chunk);
                let from = chunk * SLOT + HEADER;
                prop_assert_eq!(&pool[from..from + payload.len()], payload.as_slice());
                let rest = &pool[from + payload.len()..(chunk + 1) * SLOT];
                prop_assert!(rest.iter().all(|byte| *byte == 0), "nothing behind the payload");
            }
            let bytes = model.payload(0).len() as u64 * u64::from(chunks);
            prop_assert_eq!(times as u64, bytes.div_ceil(go));
        }
        let (tensors, good) = load(&cache, model, chunks, go);
        prop_assert_eq!(good, chunks);
        prop_assert_eq!(tensors, model.prompt((chunks * CHUNK) as usize));
    }

    #[test]
    fn end_before_the_first_chunk_that_is_not_what_was_stored(
        at in 0usize..HEADER + 2 * 2 * 3 * 2 * CHUNK as usize,
        chunk in 0u32..3,
        go in prop_oneof![1u64..50, Just(1 << 20)],
    ) {
        let model = Model { tensors: 2, heads: 2, size: 3 };
        let liar = server(3, &[0, 1, 2]);
        let cache = liar.cache(model.kv().payload_bytes().unwrap());
        store(&cache, model, &model.prompt(12), 12, 1 << 20);
        liar.memory.0.lock().unwrap()[chunk as usize * SLOT + at] ^= 1;
        prop_assert_eq!(load(&cache, model, 3, go).1, chunk);
    }
}

const MODEL: Model = Model { tensors: 2, heads: 2, size: 3 };

#[test]
fn only_what_is_missing_is_stored() {
    let liar = server(0, &[2]);
    let cache = liar.cache(MODEL.kv().payload_bytes().unwrap());
    store(&cache, MODEL, &MODEL.prompt(14), 14, 1 << 20);
    let pool = liar.memory.0.lock().unwrap();
    let payload = MODEL.payload(2);
    assert_eq!(&pool[HEADER..HEADER + payload.len()], payload.as_slice());
    assert!(pool[SLOT..].iter().all(|byte| *byte == 0));
    let all = server(0, &[0, 1, 2]);
    let cache = all.cache(MODEL.kv().payload_bytes().unwrap());
    store(&cache, MODEL, &MODEL.prompt(14), 14, 1 << 20);
    assert_eq!(
        pool[..SLOT],
        all.memory.0.lock().unwrap()[2 * SLOT..3 * SLOT],
        "as the third chunk"
    );
}

#[test]
fn that_are_not_what_was_said_are_refused_before_a_byte_moves() {
    let liar = server(1, &[0]);
    let cache = liar.cache(MODEL.kv().payload_bytes().unwrap());
    let writing = now(cache.store(&tokens(6), "", deadline())).unwrap();
    let mut prompts = vec![MODEL.prompt(6); 4];
    prompts[0].pop();
    prompts[1].push(Vec::new());
    prompts[2][1].pop();
    prompts[3][0].clear();
    for prompt in prompts {
        let prompt: Vec<&[u8]> = prompt.iter().map(Vec::as_slice).collect();
        let mut store = MODEL.kv().store(&writing, 6).unwrap();
        let error = store.copy(&writing, &prompt, 1 << 20).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
    }
    assert!(MODEL.kv().store(&writing, CHUNK - 1).is_err(), "the first chunk is not there");
    let two = server(0, &[0, 1]).cache(MODEL.kv().payload_bytes().unwrap());
    let writing = now(two.store(&tokens(8), "", deadline())).unwrap();
    assert!(MODEL.kv().store(&writing, 7).is_err(), "the second chunk is not there");
    assert_eq!(*liar.memory.0.lock().unwrap(), vec![0; POOL]);
}

#[test]
fn that_cannot_be_are_refused() {
    let float = || Dtype::new("float32").unwrap();
    for (tensors, heads, size) in
        [(0, 1, 1), (1, 0, 1), (1, 1, 0), (u32::MAX, 2, 1), (1, 1, u32::MAX)]
    {
        let chunk = if size == u32::MAX { u32::MAX } else { 4 };
        assert!(
            KvTensors::new(tensors, heads, size, float(), chunk).is_err(),
            "{tensors} {heads} {size}"
        );
    }
    assert!(
        KvTensors::new(1 << 16, 1 << 15, 1 << 20, float(), 4).unwrap().payload_bytes().is_err()
    );
    assert!(KvTensors::new(2, 2, 8, float(), 4).unwrap().load(u32::MAX).is_err());
}
